r"""Training losses that compare confidence with accuracy over a batch: cross-entropy plus a price on the gap.

The gap is one of the batch at hand. Over accumulated micro-batches or several processes, the losses add up to the
cross-entropy of the whole, but their gaps to a mean of gaps of the parts, weighted by rows: a noisier estimate, and
one that is larger on average, the smaller the parts are. `reduction="sum"` is the number of rows times the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .checks import check_count, check_number
from .losses import cross_entropy_loss, surprise
from .reducing import (
    ClassWeights,
    LossRows,
    RowFunction,
    blocked,
    blocks_of,
    check_batch,
    reduce_losses,
)


KERNEL_WIDTH = 0.4  # of confidence: how far apart two rows still tell of each other


def mmce_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float = 1.0,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Cross-entropy plus the maximum mean calibration error: a kernel's sum over all pairs of rows.

    $$L = \frac{1}{n} \sum_i -\log p_{y_i} + \lambda \sqrt{\frac{1}{n^2} \sum_{ij} (c_i - r_i)(c_j - r_j)
    \exp\left(-\frac{|r_i - r_j|}{0.4}\right)}$$

    with the confidence r and whether it was right, c.

    Args:
        logits, labels: as in `cross_entropy_loss`.
        weight (`float`, at least 0): lambda; 0 is cross-entropy.
        class_weights: as in `cross_entropy_loss`, of the cross-entropy alone.
        ignore_index, reduction: as in `cross_entropy_loss`. Each row carries the gap: `"none"` adds it to every row.
    Returns:
        `torch.Tensor` as `cross_entropy_loss`.
    Raises:
        ValueError: as `cross_entropy_loss`, or `weight` is negative or not finite.
    Requirements:
        Batches of dozens of rows; it takes memory of the square of their number.
    Source:
        Kumar, Sarawagi and Jain 2018 (ICML), equation 5 and its Laplacian kernel of width 0.4.
    Example:
        >>> import torch
        >>> from hf_calib.functional.batch_losses import mmce_loss
        >>> mmce_loss(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0]))
        tensor(0.2054)
    """

    def gap(statistics: torch.Tensor) -> torch.Tensor:
        confidence, right = statistics.unbind(-1)
        kernel = (-(confidence[:, None] - confidence).abs() / KERNEL_WIDTH).exp()
        missing = right - confidence
        # The root's derivative is infinite at 0, where all rows are exactly right
        return (missing @ kernel @ missing).clamp_min(1e-12).sqrt() / len(missing)

    return _with_gap(_confidence_and_accuracy, gap, weight, logits, labels, class_weights, ignore_index, reduction)


def soft_binned_ece_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float = 1.0,
    num_bins: int = 15,
    temperature: float = 0.01,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Cross-entropy plus an expected calibration error whose bins are soft, so that it has a derivative.

    $$L = \frac{1}{n} \sum_i -\log p_{y_i} + \lambda \sqrt{\sum_b \frac{s_b}{n} (\bar c_b - \bar r_b)^2}, \qquad
    u_{ib} \propto \exp\left(-\frac{(r_i - \xi_b)^2}{T}\right), \quad s_b = \sum_i u_{ib}$$

    with the bins' middles xi, and the means of a bin over all rows, by their membership u.

    Args:
        logits, labels: as in `cross_entropy_loss`.
        weight (`float`, at least 0): lambda; 0 is cross-entropy.
        num_bins (`int`, at least 1): of equal width.
        temperature (`float`, above 0): T, in squared confidence: how soft the edges are.
        class_weights: as in `cross_entropy_loss`, of the cross-entropy alone.
        ignore_index, reduction: as in `cross_entropy_loss`. Each row carries the gap: `"none"` adds it to every row.
    Returns:
        `torch.Tensor` as `cross_entropy_loss`.
    Raises:
        ValueError: as `cross_entropy_loss`, or `weight`, `num_bins` or `temperature` is out of range.
    Requirements:
        Batches of many rows: in a bin with one row, that row's own outcome is the accuracy.
    Source:
        Karandikar et al. 2021 (arXiv 2108.00106), section 4, the L2 form.
    Example:
        >>> import torch
        >>> from hf_calib.functional.batch_losses import soft_binned_ece_loss
        >>> soft_binned_ece_loss(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0]))
        tensor(0.2054)
    """
    check_count("num_bins", num_bins)
    check_number("temperature", temperature)
    if temperature == 0:
        raise ValueError("temperature: got 0; allowed are numbers above 0")

    def gap(statistics: torch.Tensor) -> torch.Tensor:
        confidence, right = statistics.unbind(-1)
        middles = (torch.arange(num_bins, device=confidence.device, dtype=confidence.dtype) + 0.5) / num_bins
        member = (-(confidence[:, None] - middles).square() / temperature).softmax(-1)
        size = member.sum(0)
        # size * ((right - confidence) of the bin / size) ** 2, with empty bins at 0
        off = ((right - confidence) @ member).square() / size.clamp_min(torch.finfo(size.dtype).eps)
        return (off.sum() / len(confidence)).clamp_min(1e-12).sqrt()

    return _with_gap(_confidence_and_accuracy, gap, weight, logits, labels, class_weights, ignore_index, reduction)


def mdca_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float = 1.0,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Cross-entropy plus the multi-class difference of confidence and accuracy: of every class, over the batch.

    $$L = \frac{1}{n} \sum_i -\log p_{y_i} + \frac{\lambda}{C} \sum_k
    \left| \frac{1}{n} \sum_i p_{ik} - \frac{1}{n} \sum_i [y_i = k] \right|$$

    Args:
        logits, labels: as in `cross_entropy_loss`.
        weight (`float`, at least 0): lambda; 0 is cross-entropy.
        class_weights: as in `cross_entropy_loss`, of the cross-entropy alone.
        ignore_index, reduction: as in `cross_entropy_loss`. Each row carries the gap: `"none"` adds it to every row.
    Returns:
        `torch.Tensor` as `cross_entropy_loss`.
    Raises:
        ValueError: as `cross_entropy_loss`, or `weight` is negative or not finite.
    Requirements:
        Batches with many rows; at a vocabulary's size it goes through the logits once more.
    Source:
        Hebbalaguppe et al. 2022 (arXiv 2203.13834), equation 4.
    Example:
        >>> import torch
        >>> from hf_calib.functional.batch_losses import mdca_loss
        >>> mdca_loss(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0]))
        tensor(0.2054)
    """

    def statistics_of(rows: LossRows) -> RowFunction:
        expected = sum(log_probs.detach().exp()[kept].sum(0) for log_probs, kept in blocks_of(rows))
        labels = rows.labels[rows.kept]
        happened = labels.sum(0) if labels.dim() == 2 else labels.bincount(minlength=len(expected))
        # Given the sign of each class's gap, which is constant almost everywhere, the gap is a sum over rows
        signs = (expected - happened).sign()

        def of_block(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            at = signs[labels] if labels.dim() == 1 else labels.to(signs.dtype) @ signs
            return (log_probs.exp() @ signs - at)[:, None] / len(signs)

        return of_block

    return _with_gap(statistics_of, torch.mean, weight, logits, labels, class_weights, ignore_index, reduction)


def _with_gap(
    statistics_of: Callable[[LossRows], RowFunction],
    gap: Callable[[torch.Tensor], torch.Tensor],
    weight: float,
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_weights: ClassWeights,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """Cross-entropy, with the gap of the whole batch, a function of `(n, K)` of its rows, added to each of them."""
    check_number("weight", weight)
    rows = check_batch(logits, labels, class_weights, ignore_index)
    if weight == 0 or not rows.kept.any():
        return cross_entropy_loss(
            logits, labels, class_weights=class_weights, ignore_index=ignore_index, reduction=reduction
        )
    with torch.autocast(logits.device.type, enabled=False):  # which would multiply in half precision
        statistics = statistics_of(rows)

        def of_block(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            # One pass through the logits, and one gradient of their size, for both parts of the loss
            weighted = log_probs if rows.class_weights is None else log_probs * rows.class_weights
            return torch.cat([surprise(weighted, labels)[:, None], statistics(log_probs, labels)], -1)

        found = blocked(of_block, rows)
        added = weight * gap(found[rows.kept, 1:])
    losses = reduce_losses(found[:, 0], rows.kept, rows.weights(), reduction)
    if reduction == "none":
        return (losses + added * rows.kept).reshape(logits.shape[:-1])
    return losses + (added * rows.kept.sum() if reduction == "sum" else added)


def _confidence_and_accuracy(rows: LossRows) -> RowFunction:
    """The largest probability of a row, and the label's share that is on that class."""

    def of_block(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        largest = log_probs.max(-1)
        best = largest.indices
        right = labels == best if labels.dim() == 1 else labels.gather(-1, best[:, None])[:, 0]
        return torch.stack([largest.values.exp(), right.to(log_probs.dtype)], -1)

    return of_block
