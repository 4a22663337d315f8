"""What a calibrator is fitted on: checked, flat, and without the rows that do not count."""

from __future__ import annotations

import sys
import warnings
from typing import NamedTuple

import torch

from ..functional.checks import check_labels, check_shares, describe


BETWEEN = (__name__.partition(".")[0], "transformers", "accelerate")  # the user and a warning


class FitRows(NamedTuple):
    """Rows of a fit.

    `labels` are `(N,)` int64 classes or, where they are soft, `(N, C)` float64 distributions. `weights` are float64
    and sum to `num_rows`, the rows that were given and count.
    """

    logits: torch.Tensor  # (N, C), their own dtype
    labels: torch.Tensor
    weights: torch.Tensor  # (N,)
    groups: torch.Tensor | None  # (N,) int64
    num_rows: int


def check_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    sample_weight: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    task: str | None = None,
) -> FitRows:
    """Validates what a calibrator is fitted on, flattens it and leaves out ignored rows and those of weight 0.

    Args:
        logits, labels, sample_weight, groups, ignore_index: as in `Calibrator.fit`.
        task (`None` or `"binary"`): one logit of an event becomes logits of two classes.
    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise ValueError(f"logits: got {describe(logits)}; allowed are floating torch tensors")
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"labels: got {describe(labels)}; allowed are torch tensors")
    labels = labels.to(logits.device)
    if task == "binary":
        logits, labels = _two_classes(logits, labels, ignore_index)
    soft = labels.is_floating_point() and labels.shape == logits.shape
    if labels.is_floating_point() and not soft:
        raise ValueError(
            f"labels: got {describe(labels)} of shape {tuple(labels.shape)}; allowed are integer classes, or a "
            "distribution over classes in each row"
        )
    if logits.dim() < 2 or logits.shape[-1] < 2 or (not soft and logits.shape[:-1] != labels.shape):
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}; "
            "allowed are (..., C) logits of at least two classes for (...) labels"
        )
    shape = logits.shape[:-1]
    weights = _check_weights(sample_weight, shape, logits.device)
    groups = _check_groups(groups, shape, logits.device)
    logits = logits.reshape(-1, logits.shape[-1])
    labels = labels.reshape(-1, logits.shape[-1]) if soft else labels.reshape(-1).long()
    kept = ((labels != ignore_index).any(-1) if soft else labels != ignore_index) & (weights > 0)
    if not kept.all():
        logits, labels, weights = logits[kept], labels[kept], weights[kept]
        groups = None if groups is None else groups[kept]
    if len(labels) == 0:
        raise ValueError(f"labels: no row is left after leaving out ignore_index={ignore_index} and weights of 0")
    if soft:
        check_shares(labels, kept)
        labels = labels.double() / labels.sum(-1, dtype=torch.float64, keepdim=True)
    else:
        check_labels(labels, logits.shape[-1])
    _check_highest(logits, kept)
    _check_possible(logits, labels, kept)
    weights = weights / weights.max()  # first, so that the mean of huge weights is finite
    return FitRows(logits, labels, weights / weights.mean(), groups, len(labels))


def check_unlabelled(logits: torch.Tensor) -> torch.Tensor:
    """`(..., C)` logits of rows without labels, checked as those of a fit and flat: `(N, C)`."""
    rows = logits.reshape(-1, logits.shape[-1])
    if len(rows) == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}; allowed is at least one row")
    _check_highest(rows, torch.ones(len(rows), dtype=torch.bool))
    return rows


def hard_rows(rows: FitRows) -> FitRows:
    """The same with hard labels: a soft row counts once for each class, as much as it says that class is right."""
    if not rows.labels.is_floating_point():
        return rows
    row, label = rows.labels.nonzero(as_tuple=True)
    groups = None if rows.groups is None else rows.groups[row]
    weights = rows.weights[row] * rows.labels[row, label]
    return rows._replace(logits=rows.logits[row], labels=label, weights=weights, groups=groups)


def two_class_logits(logits: torch.Tensor) -> torch.Tensor:
    """`(...)` logits of an event as `(..., 2)` logits of its absence and presence, whose difference they are."""
    return torch.stack([(-logits).clamp_max(0), logits.clamp_max(0)], dim=-1)


def _two_classes(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.shape == (*labels.shape, 1):
        logits = logits[..., 0]
    if logits.shape != labels.shape:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}; with "
            'task="binary" allowed are one logit for each label'
        )
    if labels.is_floating_point():
        ignored = (labels == ignore_index)[..., None]
        labels = torch.stack([1 - labels.double(), labels.double()], dim=-1).masked_fill(ignored, ignore_index)
    return two_class_logits(logits), labels


def _check_weights(sample_weight: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor:
    if sample_weight is None:
        return torch.ones(shape.numel(), dtype=torch.float64, device=device)
    if not isinstance(sample_weight, torch.Tensor):
        raise ValueError(f"sample_weight: got {type(sample_weight).__name__}; allowed are tensors")
    if sample_weight.shape != shape:
        raise ValueError(f"sample_weight: got shape {tuple(sample_weight.shape)}; allowed is {tuple(shape)}")
    weights = sample_weight.reshape(-1).double().to(device)
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("sample_weight: got a negative or non-finite value; allowed are finite values from 0 up")
    return weights


def _check_groups(groups: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    if groups is None:
        return None
    if not isinstance(groups, torch.Tensor) or groups.is_floating_point() or groups.shape != shape:
        raise ValueError(f"groups: got {describe(groups)}; allowed are integers of shape {tuple(shape)}")
    if groups.numel() and int(groups.min()) < 0:
        raise ValueError(f"groups: got {int(groups.min())}; allowed are numbers from 0 up")
    return groups.reshape(-1).long().to(device)


def _check_highest(logits: torch.Tensor, kept: torch.Tensor) -> None:
    highest = logits.amax(-1)  # NaN where the row holds one, +inf likewise, -inf where nothing is possible
    wrong = highest.isfinite().logical_not()
    if wrong.any():
        first = wrong.nonzero()[0]
        raise ValueError(
            f"logits: the largest of row {int(kept.nonzero()[first])} is {float(highest[first])}; allowed are finite "
            "values, and -inf for classes that cannot occur"
        )


def _check_possible(logits: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor) -> None:
    if labels.is_floating_point():
        wrong = (labels > 0) & (logits == -torch.inf)
    else:
        wrong = (logits.gather(-1, labels[:, None]) == -torch.inf).expand(-1, 1)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        label = column if labels.is_floating_point() else int(labels[row])
        raise ValueError(
            f"labels: row {int(kept.nonzero()[row])} has class {label}, whose logit is -inf: it cannot occur"
        )


def warn_caller(message: str) -> None:
    """A UserWarning at the line from which all this was called, outside this package and of those that call it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
