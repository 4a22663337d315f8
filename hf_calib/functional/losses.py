r"""Training losses as pure functions of logits and labels, each a sum over rows.

So a batch may be cut in any way: the sums over the parts add up to the sum over the whole. They are computed in
float32 whatever the logits' dtype (float64 stays float64), and beside the logits they hold no second array of their
size but the gradient; `reducing.py` has what they share. Losses that look at a whole batch are in `batch_losses.py`.
"""

from __future__ import annotations

import torch

from .checks import check_number
from .reducing import ClassWeights, at_label, reduce_rows


LESS_SURE = 0.2  # the probability of the label below which a sample-dependent gamma is the larger one


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Negative log-likelihood of the labels.

    $$L = -\log p_y, \qquad p = \mathrm{softmax}(z)$$

    Args:
        logits (`torch.Tensor` of shape `(..., C)`, floating): scores before the softmax. A class may be masked by
            `-inf` where it is not the label.
        labels (`torch.Tensor` of shape `(...)`, int64 in `[0, C)`; or `(..., C)`, floating shares that sum to 1): a
            row of shares is the mean of the losses of its labels. Rows equal to `ignore_index` (every share of them)
            contribute 0.
        class_weights (`torch.Tensor` or numbers, `(C,)`, *optional*): what a row of each class counts, from 0 up.
        ignore_index (`int`): the label that marks such a row.
        reduction (`"mean"`, `"sum"` or `"none"`): the mean is over the rows that are not ignored, by their weights,
            and 0 where there is none, so that a micro-batch without labels does not make the step NaN.
    Returns:
        `torch.Tensor` of shape `()`, or `(...)` for `"none"`; float32 (float64 for float64 logits), in nats, at least
        0: lower is better. It can be differentiated once.
    Raises:
        ValueError: shapes disagree, the logits are not floating, labels, shares or class weights are out of range, or
            `reduction` is unknown.
    Requirements:
        None: it is finite, and so are its gradients, for all finite logits.
    Source:
        Equals `torch.nn.functional.cross_entropy`, except that no kept row gives 0 and not NaN, and that the mean of
        weighted rows of shares is divided by the sum of their weights.
    Example:
        >>> import torch
        >>> from hf_calib.functional.losses import cross_entropy_loss
        >>> cross_entropy_loss(torch.zeros(2, 4), torch.tensor([3, -100]))
        tensor(1.3863)
    """
    return reduce_rows(surprise, logits, labels, class_weights, ignore_index, reduction)


def label_smoothing_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    label_smoothing: float = 0.05,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Cross-entropy against labels that keep a little probability for every class.

    $$L = -(1 - \varepsilon) \log p_y - \frac{\varepsilon}{C} \sum_k \log p_k$$

    Args:
        logits, labels: as in `cross_entropy_loss`.
        label_smoothing (`float` in `[0, 1)`): the share spread evenly over all classes, the right one included; 0 is
            cross-entropy.
        class_weights, ignore_index, reduction: as in `cross_entropy_loss`. A class weight is one of
            rows with that label, and not, as in torch, of the class as part of smoothed labels.
    Returns:
        `torch.Tensor` as `cross_entropy_loss`: in nats, at least the entropy of the smoothed label.
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
    check_number("label_smoothing", label_smoothing, below=1.0)

    def row_loss(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if label_smoothing == 0:  # 0 * inf: keeps a masked class harmless, as in cross-entropy
            return surprise(log_probs, labels)
        return (1 - label_smoothing) * surprise(log_probs, labels) - label_smoothing * log_probs.mean(-1)

    return reduce_rows(row_loss, logits, labels, class_weights, ignore_index, reduction)


def margin_label_smoothing_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    margin: float = 10.0,
    alpha: float = 0.1,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Cross-entropy with a price on logits that are further than a margin below the largest one.

    $$L = -\log p_y + \frac{\alpha}{C} \sum_k \max(0, \max_j z_j - z_k - m)$$

    Args:
        logits, labels: as in `cross_entropy_loss`.
        margin (`float`, at least 0): m, the distance that costs nothing, in the logits' unit.
        alpha (`float`, at least 0): the price; 0 is cross-entropy.
        class_weights, ignore_index, reduction: as in `cross_entropy_loss`.
    Returns:
        `torch.Tensor` as `cross_entropy_loss`.
    Raises:
        ValueError: as `cross_entropy_loss`, or `margin` or `alpha` is out of range.
    Requirements:
        Every class keeps a finite logit: a class masked by `-inf` makes the loss infinite.
    Source:
        Liu et al. 2022 (arXiv 2111.15430), equation 7 with the mean over classes in place of the sum, and with the
        defaults, as the authors' code has them.
    Example:
        >>> import torch
        >>> from hf_calib.functional.losses import margin_label_smoothing_loss
        >>> margin_label_smoothing_loss(torch.tensor([[30.0, 0.0]]), torch.tensor([0]))
        tensor(1.)
    """
    check_number("margin", margin)
    check_number("alpha", alpha)

    def row_loss(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if alpha == 0:
            return surprise(log_probs, labels)
        below = log_probs.amax(-1, keepdim=True) - log_probs
        return surprise(log_probs, labels) + alpha * (below - margin).relu().mean(-1)

    return reduce_rows(row_loss, logits, labels, class_weights, ignore_index, reduction)


def focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 3.0,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Cross-entropy that lets go of a row as the row becomes right, which keeps confidence down.

    $$L = -(1 - p_y)^\gamma \log p_y$$

    Args:
        logits, labels: as in `cross_entropy_loss`.
        gamma (`float`, at least 0): how fast it lets go; 0 is cross-entropy.
        class_weights, ignore_index, reduction: as in `cross_entropy_loss`.
    Returns:
        `torch.Tensor` as `cross_entropy_loss`.
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
    check_number("gamma", gamma)

    def row_loss(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return at_label(lambda log_prob: -_power(-torch.expm1(log_prob), gamma) * log_prob, log_probs, labels)

    return reduce_rows(row_loss, logits, labels, class_weights, ignore_index, reduction)


def sample_dependent_focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 3.0,
    gamma_less_sure: float = 5.0,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Focal loss whose gamma is larger where the label has little probability (FLSD-53).

    $$L = -(1 - p_y)^{\gamma(p_y)} \log p_y, \qquad \gamma(p) = 5 \text{ if } p < 0.2 \text{ else } 3$$

    Args:
        logits, labels: as in `cross_entropy_loss`.
        gamma (`float`, at least 0): of rows whose label has a probability from 0.2 up.
        gamma_less_sure (`float`, at least 0): of the others.
        class_weights, ignore_index, reduction: as in `cross_entropy_loss`.
    Returns:
        `torch.Tensor` as `cross_entropy_loss`; it jumps at 0.2.
    Raises:
        ValueError: as `cross_entropy_loss`, or a gamma is negative or not finite.
    Requirements:
        As `focal_loss`: it is not a proper scoring rule.
    Source:
        Mukhoti et al. 2020 (arXiv 2002.09437), section 5 and its policy FLSD-53.
    Example:
        >>> import torch
        >>> from hf_calib.functional.losses import sample_dependent_focal_loss
        >>> sample_dependent_focal_loss(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([1]))
        tensor(1.3597)
    """
    check_number("gamma", gamma)
    check_number("gamma_less_sure", gamma_less_sure)

    def row_loss(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        def at(log_prob: torch.Tensor) -> torch.Tensor:
            missing = -torch.expm1(log_prob)
            less_sure = log_prob.exp() < LESS_SURE
            return -torch.where(less_sure, _power(missing, gamma_less_sure), _power(missing, gamma)) * log_prob

        return at_label(at, log_probs, labels)

    return reduce_rows(row_loss, logits, labels, class_weights, ignore_index, reduction)


def dual_focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 5.0,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Focal loss that also looks at the closest class below the label, so that it lets go of a gap, not of a height.

    $$L = -(1 - p_y + p_j)^\gamma \log p_y, \qquad p_j = \max_k \{p_k : p_k < p_y\}$$

    Args:
        logits: as in `cross_entropy_loss`.
        labels (`torch.Tensor` of shape `(...)`, int64 in `[0, C)`): it is not defined for shares.
        gamma (`float`, at least 0): how fast it lets go; 0 is cross-entropy.
        class_weights, ignore_index, reduction: as in `cross_entropy_loss`.
    Returns:
        `torch.Tensor` as `cross_entropy_loss`.
    Raises:
        ValueError: as `cross_entropy_loss`, the labels are shares, or `gamma` is negative or not finite.
    Requirements:
        It is not a proper scoring rule: fit a calibrator afterwards.
    Source:
        Tao et al. 2023 (arXiv 2305.13665), with the gamma of its table 13.
    Example:
        >>> import torch
        >>> from hf_calib.functional.losses import dual_focal_loss
        >>> dual_focal_loss(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([0]), gamma=1.0)
        tensor(0.3576)
    """
    check_number("gamma", gamma)
    if labels.is_floating_point():
        raise ValueError(f"labels: got a {labels.dtype} tensor; allowed for the dual focal loss are class numbers")

    def row_loss(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_prob = log_probs.gather(-1, labels[:, None])
        below = log_probs.masked_fill(log_probs >= log_prob, -torch.inf).amax(-1)
        log_prob = log_prob[:, 0]
        return -_power(below.exp() - torch.expm1(log_prob), gamma) * log_prob

    return reduce_rows(row_loss, logits, labels, class_weights, ignore_index, reduction)


def brier_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Squared distance between the probabilities and the one-hot label.

    $$L = \sum_k (p_k - [k = y])^2$$

    Args:
        logits, labels: as in `cross_entropy_loss`.
        class_weights, ignore_index, reduction: as in `cross_entropy_loss`.
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
        probs = log_probs.exp()
        if labels.dim() == 1:
            one = torch.ones_like(labels, dtype=probs.dtype)[:, None]
            return probs.scatter_add(-1, labels[:, None], -one).square().sum(-1)
        return probs.square().sum(-1) + (labels * (1 - 2 * probs)).sum(-1)

    return reduce_rows(row_loss, logits, labels, class_weights, ignore_index, reduction)


def confidence_penalty_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    beta: float = 0.1,
    class_weights: ClassWeights = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Cross-entropy less a share of the entropy of what is predicted.

    $$L = -\log p_y - \beta H(p), \qquad H(p) = -\sum_k p_k \log p_k$$

    Args:
        logits, labels: as in `cross_entropy_loss`.
        beta (`float`, at least 0): how much entropy is worth; 0 is cross-entropy.
        class_weights, ignore_index, reduction: as in `cross_entropy_loss`.
    Returns:
        `torch.Tensor` as `cross_entropy_loss`, but it may be negative.
    Raises:
        ValueError: as `cross_entropy_loss`, or `beta` is negative or not finite.
    Requirements:
        It is not a proper scoring rule: its minimum is flatter than the true probabilities.
    Source:
        Pereyra et al. 2017 (arXiv 1701.06548), equation 2.
    Example:
        >>> import torch
        >>> from hf_calib.functional.losses import confidence_penalty_loss
        >>> confidence_penalty_loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.6238)
    """
    check_number("beta", beta)

    def row_loss(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        possible = log_probs.where(log_probs > -torch.inf, 0.0)  # 0 * inf: a masked class has no share in the entropy
        return surprise(log_probs, labels) + beta * (log_probs.exp() * possible).sum(-1)

    return reduce_rows(row_loss, logits, labels, class_weights, ignore_index, reduction)


def surprise(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-probability of each row's label, `(n,)`."""
    return at_label(torch.neg, log_probs, labels)


def _power(base: torch.Tensor, exponent: float) -> torch.Tensor:
    """`base` of 0 and above to a power from 0 up.

    The floor is for a base of 0, where the derivative is infinite if the power is below 1: a clamped value has
    derivative 0, which is the true limit once it is multiplied by the logarithm of a probability of 1.
    """
    return base.clamp_min(torch.finfo(base.dtype).tiny).pow(exponent)
