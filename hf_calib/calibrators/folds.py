"""Cross-validation: what calibrators say of rows that they were not fitted on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .base import Calibrator
from .rows import FitRows


def held_out_log_probs(
    fit: Callable[[FitRows], Calibrator], rows: FitRows, *, num_folds: int = 5, seed: int = 0
) -> torch.Tensor:
    """Calibrated log-probabilities of each row by a calibrator that was fitted on the other folds.

    Args:
        fit (callable): rows -> fitted calibrator of classes.
        rows ([`FitRows`]): as `check_rows` returns them.
        num_folds (`int`), seed (`int`): as in `deal_rows`.
    Returns:
        `torch.Tensor` of shape `(N, C)`, float32, or float64 when the logits are.
    """
    dtype = torch.promote_types(rows.logits.dtype, torch.float32)
    log_probs = torch.empty(rows.logits.shape, dtype=dtype, device=rows.logits.device)
    folds = deal_rows(rows.labels, num_folds, seed)
    for fold in range(num_folds):
        fitted = fit(take_rows(rows, folds != fold))
        held_out = take_rows(rows, folds == fold)
        options = {"groups": held_out.groups} if fitted.needs_groups else {}
        log_probs[folds == fold] = fitted.log_probs(held_out.logits, **options)
    return log_probs


def take_rows(rows: FitRows, chosen: torch.Tensor) -> FitRows:
    """Some of the rows, `(N,)` bool, with weights that sum to their number."""
    groups = None if rows.groups is None else rows.groups[chosen]
    weights = rows.weights[chosen]
    return FitRows(rows.logits[chosen], rows.labels[chosen], weights / weights.mean(), groups, len(weights))


def deal_rows(labels: torch.Tensor, num_folds: int, seed: int) -> torch.Tensor:
    """The fold of each row: shuffled, then dealt out class by class, so that each fold gets its share of each.

    Args:
        labels (`torch.Tensor` of shape `(N,)`, int64, or `(N, C)`, floating).
    Returns:
        `torch.Tensor` of shape `(N,)`, int64 in `[0, num_folds)`.
    Raises:
        ValueError: fewer rows than folds.
    """
    labels = labels.argmax(-1) if labels.dim() == 2 else labels
    if not 2 <= num_folds <= len(labels):
        raise ValueError(f"num_folds: got {num_folds} for {len(labels)} rows; allowed are 2 to the number of rows")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[by_class] = torch.arange(len(labels), device=labels.device) % num_folds
    return folds
