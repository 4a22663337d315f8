"""Calibrators that map each probability by a monotone function of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from ..functional.checks import PROBABILITY_FLOOR, check_choice
from .base import Calibrator


TIE = 1e-12  # probabilities that differ by less, relatively, differ by rounding
SAME = 1e-11  # values that differ by less differ by rounding
BLOCK_ELEMENTS = 2**17  # probabilities sorted at once: few enough for a cache
ABOVE = 1 + 1e-9  # how far over the runner-up, relatively, the top class stays
TARGETS = ("class", "top")


class IsotonicCalibration(Calibrator):
    r"""The monotone step function of each class's probability that fits best, one class against the rest.

    $$\hat p_k \propto m_k(p_k), \qquad m_k = \arg\min_{m \text{ rising}} \sum_i w_i ([y_i = k] - m(p_{ik}))^2$$

    Between its steps the function is interpolated; the classes' values are divided by their sum. Rows in which a
    class is impossible do not count for it; a class that is possible in no row keeps its probability.

    With `target="top"` there is one function, of the largest probability, fitted to whether that class is right. The
    other classes share what it leaves in proportion to their probabilities. The top class stays on top: its
    probability never falls below the runner-up's.

    *When to use:* with thousands of rows and a distortion that no temperature removes. On few rows it memorises: a
    class can get probability 0, which one surprise makes expensive (see `select_calibrator`). With many classes and
    few rows of each, `target="top"`.

    Args:
        target (`"class"` or `"top"`): every class's probability, or that of the most probable one.
        task: as in [`Calibrator`].
    Attributes:
        thresholds (`torch.Tensor` of shape `(C, M)`, or `(1, M)` of the top class, float64): probabilities at the
            knots, rising; the last one repeats.
        values (`torch.Tensor` of the same shape, float64): the function there.
    Source:
        Zadrozny & Elkan 2002, section 4; scikit-learn's solver, knots and interpolation. Top-label: Gupta & Ramdas
        2022 (arXiv 2107.08353), with one function for all classes.
    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]).log()
        >>> calibrator = IsotonicCalibration().fit(logits, torch.tensor([0, 1, 1, 1]))
        >>> calibrator.log_probs(logits).exp()[0]
        tensor([0.5000, 0.5000])
    """

    name = "isotonic"
    tensor_names = ("thresholds", "values")
    tensor_dtype = torch.float64
    setting_names = ("target",)
    preserves_accuracy = False
    contains_identity = False  # each class's map may be the identity, but least squares need not choose it
    is_centred: ClassVar[bool] = False

    def __init__(self, *, target: str = "class", task: str | None = None):
        super().__init__(task=task)
        check_choice("target", target, TARGETS)
        self.target = target
        self.preserves_accuracy = target == "top"

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        make_knots = centred_knots if self.is_centred else step_knots
        if self.target == "top":
            top = logits.max(-1)
            scores = logits.double().softmax(-1).gather(-1, top.indices[:, None])
            rows = [sort_rows(scores, (top.indices == labels)[:, None], weights)]
        else:
            rows = sorted_classes(logits, labels, weights)
        thresholds, values = tables([make_knots(fit_pools(r)) for r in rows])
        return {"thresholds": thresholds.to(logits.device), "values": values.to(logits.device)}

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        shapes = [tuple(tensors[name].shape) for name in self.tensor_names]
        rows = 1 if self.target == "top" else num_labels
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != rows or shapes[0][1] < 2:
            return f"thresholds and values have shapes {shapes}; allowed are two of ({rows}, M), M from 2 up"
        for name, tensor in tensors.items():
            if bool((tensor.diff(dim=-1) < 0).any()) or tensor.min() < 0 or tensor.max() > 1:
                return f"{name} do not rise within [0, 1]"
        return None

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        if self.target == "top":
            return self._calibrate_top(logits)
        columns = logits.double().softmax(-1).reshape(-1, logits.shape[-1]).T.contiguous()
        mapped = interpolate(columns, self.thresholds, self.values).T.reshape(logits.shape)
        return log_shares(mapped, logits)

    def _calibrate_top(self, logits: torch.Tensor) -> torch.Tensor:
        top = logits.argmax(-1, keepdim=True)
        wide = logits.double()
        confidence = wide.softmax(-1).gather(-1, top)
        mapped = interpolate(confidence.reshape(1, -1), self.thresholds, self.values).reshape(confidence.shape)
        # Of the others alone, since 1 - confidence may be 0
        rest = wide.scatter(-1, top, -torch.inf).log_softmax(-1).nan_to_num(nan=-torch.inf)
        runner_up = rest.amax(-1, keepdim=True).exp()
        mapped = torch.maximum(mapped, ABOVE * runner_up / (1 + runner_up))
        lowest = torch.finfo(logits.dtype).min
        others = (rest + (1 - mapped).clamp_min(PROBABILITY_FLOOR).log()).clamp_min(lowest)
        calibrated = others.scatter(-1, top, mapped.clamp_min(PROBABILITY_FLOOR).log())
        return calibrated.where(logits != -torch.inf, wide).to(logits.dtype)


class CentredIsotonicCalibration(IsotonicCalibration):
    r"""Isotonic calibration with each step drawn together into one point, so that it rises strictly.

    Where isotonic regression has a flat step over scores $p_a \dots p_b$ with weights $w$, this one passes through
    its value at

    $$\bar p = \sum_{i=a}^b w_i p_i \Big/ \sum_{i=a}^b w_i$$

    and is linear in between. Beyond the first and the last point it is constant.

    *When to use:* in the place of `isotonic`: different scores stay different, so that the order of the rows is
    kept, and fewer classes get probability 0.

    Args:
        target, task: as in [`IsotonicCalibration`].
    Source:
        Oron & Flournoy 2017 (arXiv 1701.05964), section 2. Steps at 0 and 1 are drawn together too; the authors may
        leave those flat.
    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9]]).log()
        >>> calibrator = CentredIsotonicCalibration().fit(logits, torch.tensor([0, 1, 0, 1]))
        >>> calibrator.thresholds[1], calibrator.values[1]
        (tensor([0.1000, 0.5500, 0.9000], dtype=torch.float64), tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64))
    """

    name = "centred_isotonic"
    is_centred = True


class SortedRows(NamedTuple):
    """Rows in rising order of a score, for one function after the other."""

    scores: np.ndarray  # (R,) float64
    outcomes: np.ndarray  # (R,) bool
    weights: np.ndarray  # (R,) float64
    starts: np.ndarray  # (K + 1,) int64: the rows of function k are starts[k] up to starts[k + 1]


class Pools(NamedTuple):
    """Blocks of rows on which isotonic functions are constant, in rising order, one function after the other."""

    lowest: np.ndarray  # (B,) float64: the scores of a block
    highest: np.ndarray
    centres: np.ndarray
    values: np.ndarray
    counts: np.ndarray  # (K,) int64: blocks of each function


class Knots(NamedTuple):
    """Piecewise linear functions, one after the other."""

    thresholds: np.ndarray  # (B,) float64
    values: np.ndarray
    counts: np.ndarray  # (K,) int64: knots of each function


def sorted_classes(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> list[SortedRows]:
    """Rows sorted by each class's probability, without those in which it is impossible; many classes at once.

    Args:
        logits, labels, weights: as in `Calibrator._fit`.
    """
    probs = logits.double().softmax(-1).masked_fill(logits == -torch.inf, -1)
    classes = torch.arange(probs.shape[-1], device=labels.device)
    size = max(1, BLOCK_ELEMENTS // len(labels))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # NumPy sorts without Python's lock
        return list(
            pool.map(
                lambda scores, those: sort_rows(scores, labels[:, None] == those, weights),
                probs.split(size, dim=-1),
                classes.split(size),
            )
        )


def sort_rows(scores: torch.Tensor, outcomes: torch.Tensor, weights: torch.Tensor) -> SortedRows:
    """Each column's rows by rising score; a negative score leaves its row out.

    Args:
        scores, outcomes (`torch.Tensor` of shape `(N, K)`, float64 and bool).
        weights (`torch.Tensor` of shape `(N,)`, float64 above 0).
    """
    scores, outcomes = scores.T.contiguous().cpu().numpy(), outcomes.T.contiguous().cpu().numpy()
    weights = weights.cpu().numpy()
    if (weights == weights[0]).all():
        # A sort alone is quicker than one that gives the order. It carries outcomes in the scores' last bits
        keys = scores.view(np.int64) & -2
        keys |= outcomes
        keys.sort(axis=-1)
        outcomes, scores = (keys & 1).astype(bool), (keys & -2).view(np.float64)
        weights = np.broadcast_to(weights[0], scores.shape)
    else:
        order = scores.argsort(axis=-1)
        scores, outcomes = np.take_along_axis(scores, order, -1), np.take_along_axis(outcomes, order, -1)
        weights = weights[order]
    kept = scores >= 0
    starts = np.append(0, kept.sum(-1).cumsum())
    return SortedRows(scores[kept], outcomes[kept], weights[kept], starts)


def group_ties(rows: SortedRows) -> np.ndarray:
    """The first row of each distinct score."""
    is_new = np.diff(rows.scores, prepend=-1) > TIE * rows.scores
    is_new[rows.starts[:-1][np.diff(rows.starts) > 0]] = True
    return np.flatnonzero(is_new)


def segment(rows: SortedRows, groups: np.ndarray) -> np.ndarray:
    """Which groups begin a segment: a score with a positive outcome, or a run of scores without one.

    No isotonic function has a step within such a run, so that the solver sees at most two segments for each positive
    row, however many negative ones there are.
    """
    begins = np.zeros(len(groups) + 1, dtype=bool)
    positive = np.searchsorted(groups, np.flatnonzero(rows.outcomes), side="right")
    begins[positive - 1] = begins[positive] = True
    begins[np.searchsorted(groups, rows.starts[:-1])] = True
    return np.flatnonzero(begins[:-1])


def fit_pools(rows: SortedRows) -> Pools:
    """Isotonic regression of outcomes on scores, for all functions in one call of scikit-learn's solver."""
    from sklearn.isotonic import isotonic_regression

    groups = group_ties(rows)
    first = groups[segment(rows, groups)]
    weight, positive = (np.add.reduceat(x, first) for x in (rows.weights, rows.weights * rows.outcomes))
    owner = np.searchsorted(rows.starts, first, side="right") - 1
    # Functions of values two apart have no block in common
    fitted = isotonic_regression(positive / weight + 2 * owner, sample_weight=weight)
    begins = np.flatnonzero(np.diff(fitted, prepend=-1) > SAME)
    weight, positive = np.add.reduceat(weight, begins), np.add.reduceat(positive, begins)
    first = first[begins]
    lowest, highest = rows.scores[first], rows.scores[np.append(first[1:], len(rows.scores)) - 1]
    centres = (np.add.reduceat(rows.weights * rows.scores, first) / weight).clip(lowest, highest)
    counts = np.bincount(owner[begins], minlength=len(rows.starts) - 1)
    return Pools(lowest, highest, centres, positive / weight, counts)


def step_knots(pools: Pools) -> Knots:
    """Knots at both ends of each block, or one where they are the same."""
    ends = np.stack([pools.lowest, pools.highest], axis=-1)
    kept = np.stack([np.ones(len(ends), dtype=bool), pools.lowest < pools.highest], axis=-1)
    owner = np.repeat(np.arange(len(pools.counts)), pools.counts)
    counts = np.bincount(owner, weights=kept.sum(-1), minlength=len(pools.counts)).astype(np.int64)
    return Knots(ends[kept], np.repeat(pools.values, kept.sum(-1)), counts)


def centred_knots(pools: Pools) -> Knots:
    """A knot at the centre of each block."""
    return Knots(pools.centres, pools.values, pools.counts)


def tables(parts: list[Knots]) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds and values of all functions, `(K, M)` each; a function without a knot is the identity."""
    thresholds, values, counts = (np.concatenate(part) for part in zip(*parts, strict=True))
    index = np.arange(max(2, counts.max()))
    flat = (counts.cumsum() - counts)[:, None] + np.minimum(index, counts[:, None] - 1)
    empty = counts[:, None] == 0
    padded = [np.where(empty, index.clip(0, 1), x[flat.clip(0, len(x) - 1)]) for x in (thresholds, values)]
    # What rounding may have put a hair out of order
    rising = [torch.from_numpy(np.maximum.accumulate(x, axis=-1)) for x in padded]
    return rising[0], rising[1]


def interpolate(scores: torch.Tensor, thresholds: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Piecewise linear functions, one a row, constant beyond their ends.

    Args:
        scores (`torch.Tensor` of shape `(K, N)`, float64).
        thresholds, values (`torch.Tensor` of shape `(K, M)`, float64, thresholds rising, `M >= 2`).
    Returns:
        `torch.Tensor` of shape `(K, N)`, float64.
    """
    if scores.numel() > BLOCK_ELEMENTS and len(scores) > 1:
        size = max(1, BLOCK_ELEMENTS // scores.shape[-1])
        parts = zip(scores.split(size), thresholds.split(size), values.split(size), strict=True)
        return torch.cat([interpolate(*part) for part in parts])
    upper = torch.searchsorted(thresholds, scores).clamp(1, thresholds.shape[-1] - 1)
    x0, x1 = thresholds.gather(-1, upper - 1), thresholds.gather(-1, upper)
    y0, y1 = values.gather(-1, upper - 1), values.gather(-1, upper)
    share = ((scores - x0) / (x1 - x0)).nan_to_num(nan=0).clamp(0, 1)  # 0 / 0 where the last knot repeats
    return (y0 + share * (y1 - y0)).where(scores.isfinite(), scores)


def log_shares(mapped: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Logarithms of what each class's own probability is of their sum, in the logits' dtype.

    Args:
        mapped (`torch.Tensor` of shape `(..., C)`, float64): the probabilities, floored here.
        logits (`torch.Tensor` of shape `(..., C)`, floating): `-inf` where a class is impossible.
    """
    mapped = mapped.clamp_min(PROBABILITY_FLOOR).masked_fill(logits == -torch.inf, 0)
    total = mapped.sum(-1, keepdim=True).clamp_min(PROBABILITY_FLOOR)  # 0 where nothing is possible
    return (mapped / total).log().to(logits.dtype)
