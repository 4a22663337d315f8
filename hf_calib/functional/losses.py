r"""Training losses as pure functions of logits and labels.

All of them are a sum over rows, so that a batch may be cut in any way: the sums over the parts add up to the sum over
the whole. They are computed in float32 whatever the logits' dtype (float64 stays float64), and they mask and reduce in
one place, `_reduce_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .checks import check_choice, check_labels


REDUCTIONS = ("mean", "sum", "none")


def cross_entropy_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    r"""Negative log-likelihood of the labels.

    $$L = -\log p_y, \qquad p = \mathrm{softmax}(z)$$

    Args:
        logits (`torch.Tensor` of shape `(..., C)`, floating): scores before the softmax. A class may be masked by
            `-inf` where it is not the label.
        labels (`torch.Tensor` of shape `(...)`, int64 in `[0, C)`): rows equal to `ignore_index` contribute 0.
        ignore_index (`int`): the label that marks such a row.
        reduction (`"mean"`, `"sum"` or `"none"`): the mean is over the rows that are not ignored, and 0 where there is
            none, so that a micro-batch without labels does not make the step NaN.
    Returns:
        `torch.Tensor` of shape `()`, or `(...)` for `"none"`; float32 (float64 for float64 logits), in nats, at least
        0: lower is better.
    Raises:
        ValueError: shapes disagree, the logits are not floating, the labels are not integer or out of range, or
            `reduction` is unknown.
    Requirements:
        None: it is finite, and so are its gradients, for all finite logits.
    Source:
        Equals `torch.nn.functional.cross_entropy`, except that no kept row gives 0 and not NaN.
    Example:
        >>> import torch
        >>> from hf_calib.functional.losses import cross_entropy_loss
        >>> cross_entropy_loss(torch.zeros(2, 4), torch.tensor([3, -100]))
        tensor(1.3863)
    """
    return _reduce_rows(lambda log_probs, labels: -_pick(log_probs, labels), logits, labels, ignore_index, reduction)


def label_smoothing_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    label_smoothing: float = 0.05,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Cross-entropy against labels that keep a little probability for every class.

    $$L = -(1 - \varepsilon) \log p_y - \frac{\varepsilon}{C} \sum_k \log p_k$$

    Args:
        logits (`torch.Tensor` of shape `(..., C)`, floating): scores before the softmax.
        labels (`torch.Tensor` of shape `(...)`, int64 in `[0, C)`): rows equal to `ignore_index` contribute 0.
        label_smoothing (`float` in `[0, 1)`): the share spread evenly over all classes, the right one included; 0 is
            cross-entropy.
        ignore_index (`int`): the label that marks such a row.
        reduction (`"mean"`, `"sum"` or `"none"`): as in `cross_entropy_loss`.
    Returns:
        `torch.Tensor` of shape `()`, or `(...)` for `"none"`; float32 (float64 for float64 logits), in nats, at least
        the entropy of the smoothed label: lower is better.
    Raises:
        ValueError: as `cross_entropy_loss`, or `label_smoothing` is out of range.
    Requirements:
        Every class keeps a finite logit: a class masked by `-inf` makes the loss infinite.
    Source:
        Szegedy et al. 2016 (arXiv 1512.00567), section 7; the default is the baseline of Mukhoti et al. 2020
        (arXiv 2002.09437). Equals `torch.nn.functional.cross_entropy(..., label_smoothing=...)`.
    Example:
        >>> import torch
        >>> from hf_calib.functional.losses import label_smoothing_loss
        >>> label_smoothing_loss(torch.tensor([[4.0, 0.0]]), torch.tensor([0]))
        tensor(0.1181)
    """
    _check_number("label_smoothing", label_smoothing, below=1.0, allowed="numbers in [0, 1)")

    def row_loss(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if label_smoothing == 0:  # 0 * inf: keeps a masked class harmless, as in cross-entropy
            return -_pick(log_probs, labels)
        return -(1 - label_smoothing) * _pick(log_probs, labels) - label_smoothing * log_probs.mean(-1)

    return _reduce_rows(row_loss, logits, labels, ignore_index, reduction)


def focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 3.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Cross-entropy that lets go of a row as the row becomes right, which keeps confidence down.

    $$L = -(1 - p_y)^\gamma \log p_y$$

    Args:
        logits (`torch.Tensor` of shape `(..., C)`, floating): scores before the softmax. A class may be masked by
            `-inf` where it is not the label.
        labels (`torch.Tensor` of shape `(...)`, int64 in `[0, C)`): rows equal to `ignore_index` contribute 0.
        gamma (`float`, at least 0): how fast it lets go; 0 is cross-entropy.
        ignore_index (`int`): the label that marks such a row.
        reduction (`"mean"`, `"sum"` or `"none"`): as in `cross_entropy_loss`.
    Returns:
        `torch.Tensor` of shape `()`, or `(...)` for `"none"`; float32 (float64 for float64 logits), in nats, at least
        0: lower is better.
    Raises:
        ValueError: as `cross_entropy_loss`, or `gamma` is negative or not finite.
    Requirements:
        It is not a proper scoring rule: its minimum is not at the true probabilities but mostly at flatter ones. Fit a
        calibrator afterwards, and select checkpoints by another score.
    Source:
        Lin et al. 2017 (arXiv 1708.02002), equation 4, without class weights; its use for calibration, and gamma = 3:
        Mukhoti et al. 2020 (arXiv 2002.09437). Where its minimum is: Charoenphakdee et al. 2021 (arXiv 2011.09172).
    Example:
        >>> import torch
        >>> from hf_calib.functional.losses import focal_loss
        >>> focal_loss(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]), reduction="none")
        tensor([2.1499e-04, 1.4534e+00])
    """
    _check_number("gamma", gamma, below=math.inf, allowed="finite numbers from 0 up")

    def row_loss(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_prob = _pick(log_probs, labels)
        # 1 - p without cancellation. The floor is for p = 1, where the power's derivative is infinite if gamma < 1: a
        # clamped value has derivative 0, which is the true limit of the whole product.
        missing = (-torch.expm1(log_prob)).clamp_min(torch.finfo(log_prob.dtype).tiny)
        return -missing.pow(gamma) * log_prob

    return _reduce_rows(row_loss, logits, labels, ignore_index, reduction)


def brier_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    r"""Squared distance between the probabilities and the one-hot label.

    $$L = \sum_k (p_k - [k = y])^2$$

    Args:
        logits (`torch.Tensor` of shape `(..., C)`, floating): scores before the softmax. A class may be masked by
            `-inf` where it is not the label.
        labels (`torch.Tensor` of shape `(...)`, int64 in `[0, C)`): rows equal to `ignore_index` contribute 0.
        ignore_index (`int`): the label that marks such a row.
        reduction (`"mean"`, `"sum"` or `"none"`): as in `cross_entropy_loss`.
    Returns:
        `torch.Tensor` of shape `()`, or `(...)` for `"none"`; float32 (float64 for float64 logits), in `[0, 2]` a row,
        without unit: lower is better.
    Raises:
        ValueError: as `cross_entropy_loss`.
    Requirements:
        Its gradient vanishes where a wrong class has all the probability: start from a model that is not yet sure of
        anything, as fresh heads are.
    Source:
        Brier 1950 (Monthly Weather Review 78), the sum over classes; as a loss to train with: a baseline of Mukhoti
        et al. 2020 (arXiv 2002.09437).
    Example:
        >>> import torch
        >>> from hf_calib.functional.losses import brier_loss
        >>> brier_loss(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([0]))
        tensor(0.2600)
    """

    def row_loss(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (log_probs.exp() - F.one_hot(labels, log_probs.shape[-1])).square().sum(-1)

    return _reduce_rows(row_loss, logits, labels, ignore_index, reduction)


def _reduce_rows(
    row_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """The loss of every kept row from its log-probabilities, 0 for the ignored; then their mean, sum or neither."""
    _check_batch(logits, labels)
    check_choice("reduction", reduction, REDUCTIONS)
    kept = labels != ignore_index
    labels = labels.long().where(kept, 0)
    if labels.numel():
        check_labels(labels, logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Ignored rows are emptied before the softmax: what stands in them (NaN after a fully masked attention, too) then
    # reaches neither the loss nor a gradient.
    log_probs = F.log_softmax(logits.where(kept[..., None], 0.0), dim=-1)
    losses = row_loss(log_probs, labels).where(kept, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum().clamp_min(1)


def _pick(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return log_probs.gather(-1, labels[..., None])[..., 0]


def _check_batch(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if not logits.is_floating_point():
        raise ValueError(f"logits: got a {logits.dtype} tensor; allowed are floating tensors")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: got a {labels.dtype} tensor; allowed are class numbers, int64")
    if logits.dim() == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}; allowed is one label "
            "for each row of logits, (...) for (..., C)"
        )


def _check_number(name: str, value: float, *, below: float, allowed: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < below:  # NaN is not in any range
        raise ValueError(f"{name}: got {value!r}; allowed are {allowed}")
