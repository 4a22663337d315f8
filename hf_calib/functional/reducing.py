"""What all losses share: rows are masked, weighted and reduced in one place, and never copied all at once.

The logits of a language model are the largest thing in a training step. A loss that turns them into float32
log-probabilities holds them a second and a third time. Here, rows are taken a block at a time, and in the backward
pass once more: beside the logits there is only their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .checks import check_choice, check_labels, check_shares


REDUCTIONS = ("mean", "sum", "none")
BLOCK_LOGITS = {"cpu": 2**20, "cuda": 2**24}  # 4 MB stay in a CPU's cache; a GPU wants few and large operations

ClassWeights = torch.Tensor | Sequence[float] | None
# Log-probabilities `(n, C)` and labels, `(n,)` int64 or `(n, C)` shares that sum to 1, give `(n,)` or `(n, K)`
RowFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LossRows(NamedTuple):
    """Checked rows of a batch, without its leading dimensions."""

    logits: torch.Tensor  # (N, C)
    labels: torch.Tensor  # (N,) int64 in [0, C), or (N, C) shares that sum to 1; anything in [0, C) where not kept
    kept: torch.Tensor  # (N,) bool
    class_weights: torch.Tensor | None  # (C,) float32; None where every class weighs 1

    def weights(self) -> torch.Tensor | None:
        """What each row counts, `(N,)`: as its label; a row of shares as the mean of its labels."""
        if self.class_weights is None or self.labels.dim() == 1:
            return None if self.class_weights is None else self.class_weights[self.labels]
        return self.labels @ self.class_weights.to(self.labels.dtype)


def check_batch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
) -> LossRows:
    """Validates logits, labels and class weights, flattens leading dimensions, and finds which rows count.

    Raises:
        ValueError: as `cross_entropy_loss`.
    """
    if not logits.is_floating_point():
        raise ValueError(f"logits: got a {logits.dtype} tensor; allowed are floating tensors")
    if labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: got a {labels.dtype} tensor; allowed are class numbers, int64, or shares, floating")
    soft = labels.is_floating_point()
    if logits.dim() == 0 or labels.shape != (logits.shape if soft else logits.shape[:-1]):
        raise ValueError(
            f"labels: got {labels.dtype} of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}; "
            "allowed for (..., C) are one class number for each row, (...), or a share for each class, (..., C)"
        )
    num_classes = logits.shape[-1]
    logits, labels = logits.reshape(-1, num_classes), labels.reshape(-1, num_classes) if soft else labels.reshape(-1)
    kept = (labels != ignore_index).any(-1) if soft else labels != ignore_index
    if soft:
        check_shares(labels[kept], kept)
        labels = labels.to(torch.promote_types(labels.dtype, torch.float32)).where(kept[:, None], 1 / num_classes)
    else:
        labels = labels.long().where(kept, 0)
        if labels.numel():
            check_labels(labels, num_classes)
    if class_weights is not None:
        class_weights = _check_class_weights(class_weights, num_classes).to(logits.device)
    return LossRows(logits, labels, kept, class_weights)


def _check_class_weights(class_weights: torch.Tensor | Sequence[float], num_classes: int) -> torch.Tensor:
    """The weights as `(C,)` float32; a ValueError unless they are finite, from 0 up, and not all 0."""
    try:
        weights = torch.as_tensor(class_weights, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"class_weights: got {class_weights!r}; allowed are a tensor or a list of numbers") from None
    if weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights: got shape {tuple(weights.shape)}; allowed is one weight for each of {num_classes} classes"
        )
    if not (weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any()):
        raise ValueError(
            f"class_weights: got {weights.tolist()}; allowed are finite numbers from 0 up, not all of them 0"
        )
    return weights


def reduce_rows(
    row_loss: RowFunction,
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_weights: ClassWeights,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """The loss of every kept row times its weight, 0 for the ignored; then their weighted mean, sum or neither.

    A row of shares is a mixture of rows with one label each: they are shares of the weight.
    """
    rows = check_batch(logits, labels, class_weights, ignore_index)
    weights = rows.weights()
    with torch.autocast(logits.device.type, enabled=False):
        if weights is None or rows.labels.dim() == 1:
            losses = blocked(row_loss, rows)
        else:
            whole = weights[:, None].clamp_min(torch.finfo(weights.dtype).tiny)
            losses = blocked(row_loss, rows._replace(labels=rows.labels * rows.class_weights / whole))
    losses = losses if weights is None else losses * weights
    return reduce_losses(losses, rows.kept, weights, reduction).reshape(
        logits.shape[:-1] if reduction == "none" else ()
    )


def reduce_losses(
    losses: torch.Tensor, kept: torch.Tensor, weights: torch.Tensor | None, reduction: str
) -> torch.Tensor:
    """Weighted losses `(N,)`, 0 where a row is not kept: their sum over the sum of the weights, their sum, or they."""
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if weights is None:
        return losses.sum() / kept.sum().clamp_min(1)
    return losses.sum() / weights.where(kept, 0.0).sum().clamp_min(torch.finfo(torch.float32).tiny)


def blocked(function: RowFunction, rows: LossRows) -> torch.Tensor:
    """`function` of the rows' log-probabilities and labels, 0 where a row is not kept, a block of rows at a time.

    Returns:
        `torch.Tensor` of shape `(N,)` or `(N, K)`, float32 (float64 for float64 logits); differentiable once.
    """
    logits, labels, kept, _ = rows
    if logits.numel() > _block_logits(logits):
        return _Blocks.apply(function, logits, labels, kept)
    # Ignored rows are emptied: what stands in them (NaN after a fully masked attention, too) reaches no gradient
    return _of_block(function, logits.where(kept[:, None], 0.0), labels, kept)


def blocks_of(rows: LossRows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities `(n, C)` and whether they are kept, `(n,)`, a block of rows at a time."""
    for logits, kept in _split(rows.logits, rows.kept):
        yield _log_probs(logits), kept


def at_label(
    function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """`function`, elementwise, of the value `(n, C)` at each row's label; of shares, the mean of what it gives."""
    if labels.dim() == 1:
        return function(values.gather(-1, labels[:, None])[:, 0])
    possible = labels > 0  # 0 * inf: a class that is masked and never the label is harmless
    return (labels * function(values.where(possible, 0.0))).where(possible, 0.0).sum(-1)


def _of_block(function: RowFunction, logits: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    values = function(_log_probs(logits), labels)
    return values.where(kept if values.dim() == 1 else kept[:, None], 0.0)


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


class _Blocks(torch.autograd.Function):
    """Forward and backward go through the rows block by block; the log-probabilities are computed twice."""

    @staticmethod
    def forward(ctx, function: RowFunction, *rows: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*rows)
        return torch.cat([_of_block(function, *block) for block in _split(*rows)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        logits, labels, kept = ctx.saved_tensors
        found = torch.empty_like(logits, memory_format=torch.contiguous_format)
        start = 0
        for block, *rest in _split(logits, labels, kept):
            end = start + len(block)
            with torch.enable_grad():
                leaf = block.detach().requires_grad_()
                values = _of_block(ctx.function, leaf, *rest)
            torch.autograd.backward(values, grad[start:end])
            found[start:end] = leaf.grad
            start = end
        found[~kept] = 0  # whatever stood in the ignored rows
        return None, found, None, None


def _split(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    rows = max(1, _block_logits(logits) // logits.shape[-1])
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


def _block_logits(logits: torch.Tensor) -> int:
    return BLOCK_LOGITS.get(logits.device.type, BLOCK_LOGITS["cuda"])
