"""Venn-Abers calibration: isotonic regression that says how far one more row could move it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..functional.checks import PROBABILITY_FLOOR
from .base import Calibrator
from .binary import log_odds
from .rows import two_class_logits


MARGIN = 1e-6  # scores that differ by less, relatively, are equal: rounding must not tell them apart


class VennAbersCalibration(Calibrator):
    r"""Two isotonic regressions: with the row in question among the fitted ones as a 0, and as a 1.

    $$\hat p = \frac{p_1}{1 - p_0 + p_1}, \qquad p_0 \le p_1$$

    `interval` gives $p_0$ and $p_1$. One of the two is perfectly calibrated, whatever the model, if rows are
    exchangeable; where they are far apart, the rows of the fit are too few to say more.

    *When to use:* in the place of `isotonic` for two classes, also with few rows: it gives nothing the probability 0,
    and says how sure it is.

    Args:
        task: as in [`Calibrator`].
    Attributes:
        edges (`torch.Tensor` of shape `(M,)`, float64): log-odds between the cells in which both are constant.
        lower (`torch.Tensor` of shape `(M + 1,)`, float64): $p_0$ in each cell.
        upper (`torch.Tensor` of the same shape, float64): $p_1$.
    Source:
        Vovk, Petej & Fedorova 2015 (arXiv 1511.00213): inductive Venn-Abers predictors, section 2, and the mean for
        log loss, section 4. With weights, the row in question weighs as much as one does on average.
    Example:
        >>> import torch
        >>> scores, labels = torch.tensor([-2.0, -1, 1, 2]), torch.tensor([0, 1, 0, 1])
        >>> calibrator = VennAbersCalibration(task="binary").fit(scores, labels)
        >>> calibrator.interval(torch.tensor([3.0]))
        (tensor([0.5000], dtype=torch.float64), tensor([1.], dtype=torch.float64))
        >>> calibrator.log_probs(torch.tensor([3.0])).exp()
        tensor([0.6667])
    """

    name = "venn_abers"
    tensor_names = ("edges", "lower", "upper")
    tensor_dtype = torch.float64
    preserves_accuracy = False
    contains_identity = False
    two_classes_only = True

    def interval(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """$p_0$ and $p_1$ of the second class: logits as in `forward`.

        Returns:
            two `torch.Tensor` of shape `(...)`, float64 in [0, 1]; with a `task` in the logits' shape. Where a class
            is impossible both are 0 or both are 1.
        """
        self.check_logits(logits)
        if self.task == "multilabel":
            columns = zip(self.members, logits.unbind(-1), strict=True)
            lower, upper = zip(*(member.interval(column) for member, column in columns), strict=True)
            return torch.stack(lower, dim=-1), torch.stack(upper, dim=-1)
        logits = two_class_logits(logits) if self.task == "binary" else logits
        lower, upper = self._cells(logits)
        absent, present = (logits == -torch.inf).unbind(-1)
        only = present.logical_not().double()
        return tuple(p.where(~(absent | present), only) for p in (lower, upper))

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        possible = (logits > -torch.inf).all(-1)  # a row that can be of one class only says nothing
        scores, order = log_odds(logits[possible]).sort()
        outcomes, weights = labels[possible][order].double(), weights[possible][order]
        cells = venn_abers_cells(*(x.cpu().numpy() for x in (scores, outcomes, weights)))
        return {name: torch.from_numpy(x).to(logits.device) for name, x in cells._asdict().items()}

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        lower, upper = self._cells(logits)
        probs = torch.stack([1 - lower, upper], dim=-1).clamp_min(PROBABILITY_FLOOR)
        log_probs = (probs / probs.sum(-1, keepdim=True)).log()
        return log_probs.masked_fill(logits == -torch.inf, -torch.inf).to(logits.dtype)

    def _cells(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = log_odds(logits)
        cells = torch.searchsorted(self.edges, scores.contiguous())
        return tuple(table[cells].where(scores.isfinite(), scores) for table in (self.lower, self.upper))

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        edges, lower, upper = (tensors[name] for name in self.tensor_names)
        if edges.dim() != 1 or lower.shape != (len(edges) + 1,) or upper.shape != lower.shape:
            shapes = [tuple(tensor.shape) for tensor in (edges, lower, upper)]
            return f"edges, lower and upper have shapes {shapes}; allowed are (M,) and twice (M + 1,)"
        if any(bool((tensor.diff() < 0).any()) for tensor in (edges, lower, upper)):
            return "edges, lower and upper do not rise"
        if lower.min() < 0 or upper.max() > 1 or bool((lower > upper).any()):
            return "lower and upper are not 0 <= lower <= upper <= 1"
        return None


class Cells(NamedTuple):
    """Step functions of a score: cell m reaches from edge m - 1, exclusive, to edge m, inclusive."""

    edges: np.ndarray  # (M,) float64
    lower: np.ndarray  # (M + 1,)
    upper: np.ndarray


def venn_abers_cells(scores: np.ndarray, outcomes: np.ndarray, weights: np.ndarray) -> Cells:
    """What isotonic regression says of one more row, as a 0 and as a 1, for every score that it may have.

    Args:
        scores (`np.ndarray` of shape `(N,)`, float64, rising), outcomes (0 or 1), weights: of the rows.
    """
    if len(scores) == 0:
        return Cells(np.zeros(0), np.zeros(1), np.ones(1))
    first = np.flatnonzero(np.diff(scores, prepend=-np.inf) > MARGIN * (1 + np.abs(scores)))
    first[0] = 0
    weight, positive = np.add.reduceat(weights, first), np.add.reduceat(weights * outcomes, first)
    upper = values_of_added_ones(weight, positive)
    lower = 1 - values_of_added_ones(weight[::-1], (weight - positive)[::-1])[::-1]
    lowest, highest = scores[first], scores[np.append(first[1:], len(scores)) - 1]
    # One cell around each distinct score, as wide as rounding is, and one in each gap
    with np.errstate(over="ignore"):
        gaps = np.diff(np.stack([highest[:-1], lowest[1:]]), axis=0)[0] / 2
        margin = MARGIN * (1 + np.abs(lowest)) / 2, MARGIN * (1 + np.abs(highest)) / 2
    below = lowest - np.minimum(margin[0], np.append(np.inf, gaps))
    above = highest + np.minimum(margin[1], np.append(gaps, np.inf))
    edges = np.maximum.accumulate(np.stack([below, above], axis=1).ravel())
    # The value as a 1 is that of the distinct score from the gap below on, and as a 0 to the gap above
    upper = np.append(np.repeat(upper, 2), 1.0)
    lower = np.append(0.0, np.repeat(lower, 2))
    lower, upper = (np.maximum.accumulate(x.clip(0, 1)) for x in (np.minimum(lower, upper), upper))
    changes = (np.diff(lower) != 0) | (np.diff(upper) != 0)
    kept = np.append(True, changes)
    return Cells(edges[changes], lower[kept], upper[kept])


def values_of_added_ones(weight: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Isotonic regression's value for a row of outcome 1 and weight 1, put before each of G groups: `(G,)`.

    That is the slope, there, of the greatest convex minorant of the path of cumulative (weight, outcome), into which
    a step (1, 1) is put. As the step moves on, the slope rises; so of the path before the step only the last point
    at which the minorant touches it is ever needed again.
    """
    x, y = np.append(0.0, weight.cumsum()).tolist(), np.append(0.0, positive.cumsum()).tolist()
    points = list(zip(x, y, strict=True))
    corners = []  # of the minorant right of `left`, the nearest last
    for point in reversed(points):
        _add_corner(corners, point)
    left, values = (-1.0, -1.0), np.empty(len(weight))
    _drop_hidden(corners, left)
    for i in range(len(weight)):
        (x0, y0), (x1, y1) = left, corners[-1]
        values[i] = (y1 - y0) / (x1 - x0)
        if corners[-1] == points[i]:  # the end of the step, which moves on
            x1, y1 = corners.pop() and corners[-1]
        moved = (points[i + 1][0] - 1, points[i + 1][1] - 1)
        if (moved[1] - y0) * (x1 - x0) < (y1 - y0) * (moved[0] - x0):  # below the minorant
            left = moved
            _drop_hidden(corners, left)
    return values


def _add_corner(corners: list[tuple[float, float]], point: tuple[float, float]) -> None:
    """A point on the left of a convex path, whose corners that come to lie above it go."""
    _drop_hidden(corners, point)
    corners.append(point)


def _drop_hidden(corners: list[tuple[float, float]], point: tuple[float, float]) -> None:
    """Corners above the line from a point to the one after them go."""
    x0, y0 = point
    while len(corners) > 1:
        (x1, y1), (x2, y2) = corners[-1], corners[-2]
        if (y1 - y0) * (x2 - x0) < (y2 - y0) * (x1 - x0):
            break
        corners.pop()
