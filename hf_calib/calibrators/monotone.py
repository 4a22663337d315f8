"""Calibrators that map each probability by a monotone function of it."""

from __future__ import annotations

import numpy as np
import torch

from ..functional.checks import PROBABILITY_FLOOR
from .base import Calibrator


TIE = 1e-12  # probabilities that differ by less, relatively, differ by rounding


class IsotonicCalibration(Calibrator):
    r"""The monotone step function of each class's probability that fits best, one class against the rest.

    $$\hat p_k \propto m_k(p_k), \qquad m_k = \arg\min_{m \text{ rising}} \sum_i ([y_i = k] - m(p_{ik}))^2$$

    Between its steps the function is interpolated; the classes' values are divided by their sum.

    *When to use:* with thousands of rows and a distortion that no temperature removes. On few rows it memorises: a
    class can get probability 0, which one surprise makes expensive (see `select_calibrator`).

    Attributes:
        thresholds (`torch.Tensor` of shape `(C, M)`, float64): probabilities at the knots, rising; the last one
            repeats.
        values (`torch.Tensor` of shape `(C, M)`, float64): the function there.
    Source:
        Zadrozny & Elkan 2002, section 4; scikit-learn's solver, knots and interpolation.
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
    preserves_accuracy = False
    contains_identity = False  # each class's map may be the identity, but least squares need not choose it

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        probs = logits.double().softmax(-1).T.cpu().numpy()
        labels, row_weights = labels.cpu().numpy(), weights.cpu().numpy()
        knots = [fit_isotonic(p, labels == k, row_weights) for k, p in enumerate(probs)]
        width = max(2, *(len(thresholds) for thresholds, _ in knots))
        padded = np.stack([np.pad(np.stack(knot), ((0, 0), (0, width - len(knot[0]))), mode="edge") for knot in knots])
        thresholds, values = torch.from_numpy(padded).to(logits.device).unbind(1)
        return {"thresholds": thresholds.contiguous(), "values": values.contiguous()}

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        shapes = [tuple(tensors[name].shape) for name in self.tensor_names]
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != num_labels or shapes[0][1] < 2:
            return f"thresholds and values have shapes {shapes}; allowed are two of ({num_labels}, M), M from 2 up"
        for name, tensor in tensors.items():
            if bool((tensor.diff(dim=-1) < 0).any()) or tensor.min() < 0 or tensor.max() > 1:
                return f"{name} do not rise within [0, 1]"
        return None

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        columns = logits.double().softmax(-1).reshape(-1, logits.shape[-1]).T.contiguous()
        mapped = interpolate(columns, self.thresholds, self.values).T.reshape(logits.shape)
        impossible = logits == -torch.inf
        mapped = mapped.clamp_min(PROBABILITY_FLOOR).masked_fill(impossible, 0)
        total = mapped.sum(-1, keepdim=True).clamp_min(PROBABILITY_FLOOR)  # 0 where nothing is possible
        return (mapped / total).log().to(logits.dtype)


def fit_isotonic(scores: np.ndarray, outcomes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots of the isotonic regression of outcomes on scores: where its blocks begin and end, and its values there.

    Args:
        scores, outcomes, weights (`np.ndarray` of shape `(N,)`): float64, bool, float64 above 0.
    Returns:
        two float64 arrays of the same length, both rising.
    """
    from sklearn.isotonic import isotonic_regression

    distinct, group = np.unique(scores, return_inverse=True)
    is_new = np.diff(distinct, prepend=-np.inf) > TIE * distinct
    distinct, group = distinct[is_new], (is_new.cumsum() - 1)[group]
    group_weights = np.bincount(group, weights)
    means = np.bincount(group, weights * outcomes) / group_weights
    fitted = isotonic_regression(means, sample_weight=group_weights)
    inside = np.zeros(len(fitted), dtype=bool)
    inside[1:-1] = (fitted[1:-1] == fitted[:-2]) & (fitted[1:-1] == fitted[2:])
    return distinct[~inside], fitted[~inside]


def interpolate(scores: torch.Tensor, thresholds: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Piecewise linear functions, one a row, constant beyond their ends.

    Args:
        scores (`torch.Tensor` of shape `(K, N)`, float64).
        thresholds, values (`torch.Tensor` of shape `(K, M)`, float64, thresholds rising, `M >= 2`).
    Returns:
        `torch.Tensor` of shape `(K, N)`, float64.
    """
    upper = torch.searchsorted(thresholds, scores).clamp(1, thresholds.shape[-1] - 1)
    x0, x1 = thresholds.gather(-1, upper - 1), thresholds.gather(-1, upper)
    y0, y1 = values.gather(-1, upper - 1), values.gather(-1, upper)
    share = ((scores - x0) / (x1 - x0)).nan_to_num(nan=0).clamp(0, 1)  # 0 / 0 where the last knot repeats
    return (y0 + share * (y1 - y0)).where(scores.isfinite(), scores)
