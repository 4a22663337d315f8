"""The training losses as modules, and the table of their names.

A module holds hyper-parameters and nothing else; the mathematics, and all that the arguments mean, is in
`hf_calib.functional`. The losses in `ADDITIVE` are sums over rows: with `reduction="sum"`, divided by the number of
rows of the whole step, they are exact under gradient accumulation and over several processes. That is what
`CalibrationTrainer` does. The others compare confidence and accuracy over a batch, which is then the micro-batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from .functional.batch_losses import mdca_loss, mmce_loss, soft_binned_ece_loss
from .functional.losses import (
    brier_loss,
    confidence_penalty_loss,
    cross_entropy_loss,
    dual_focal_loss,
    focal_loss,
    label_smoothing_loss,
    margin_label_smoothing_loss,
    sample_dependent_focal_loss,
)


NOT_OF_THE_LOSS = ("ignore_index", "reduction")  # whoever trains decides on these, not who chooses the loss


class _Loss(nn.Module):
    """Called with logits `(..., C)` and labels, `(...)` class numbers or `(..., C)` shares; lower is better.

    It takes what its function takes after these two, by name and with the same defaults.
    """

    function: ClassVar[Callable[..., torch.Tensor]]

    def __init_subclass__(cls) -> None:
        options = list(inspect.signature(cls.function).parameters.values())[2:]
        cls.__signature__ = inspect.Signature(options)

    def __init__(self, **settings: Any):
        super().__init__()
        bound = self.__signature__.bind(**settings)
        bound.apply_defaults()
        self.settings = bound.kwargs
        # The functions check their own arguments. One call here makes a bad value fail now, not at step one.
        weights = self.settings["class_weights"]
        num_classes = len(weights) if hasattr(weights, "__len__") and len(weights) else 2
        self(torch.zeros(1, num_classes, device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu"))

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.function(logits, labels, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items() if value is not None)


class CrossEntropy(_Loss):
    r"""Negative log-likelihood.

    $$L = -\log p_y$$

    When to use: the baseline, and the right choice where a calibrator is fitted on held-out data afterwards.
    Arguments, returns, errors and source: `hf_calib.functional.losses.cross_entropy_loss`.
    """

    function = staticmethod(cross_entropy_loss)


class LabelSmoothing(_Loss):
    r"""Cross-entropy against softened labels.

    $$L = -(1 - \varepsilon) \log p_y - \frac{\varepsilon}{C} \sum_k \log p_k$$

    When to use: where labels are noisy, or a network trained by cross-entropy is far too confident.
    Arguments, returns, errors and source: `hf_calib.functional.losses.label_smoothing_loss`.
    """

    function = staticmethod(label_smoothing_loss)


class MarginLabelSmoothing(_Loss):
    r"""Cross-entropy with a price on distant logits.

    $$L = -\log p_y + \frac{\alpha}{C} \sum_k \max(0, \max_j z_j - z_k - m)$$

    When to use: in place of label smoothing, where only what is far too sure is to be held back.
    Arguments, returns, errors and source: `hf_calib.functional.losses.margin_label_smoothing_loss`.
    """

    function = staticmethod(margin_label_smoothing_loss)


class FocalLoss(_Loss):
    r"""Cross-entropy that lets go of rows that are right.

    $$L = -(1 - p_y)^\gamma \log p_y$$

    When to use: against overconfidence in training. Fit a temperature afterwards all the same.
    Arguments, returns, errors and source: `hf_calib.functional.losses.focal_loss`.
    """

    function = staticmethod(focal_loss)


class SampleDependentFocalLoss(_Loss):
    r"""Focal loss with a larger gamma for rows it is less sure of (FLSD-53).

    $$L = -(1 - p_y)^{\gamma(p_y)} \log p_y$$

    When to use: as the focal loss, where hard rows are too sure.
    Arguments, returns, errors and source: `hf_calib.functional.losses.sample_dependent_focal_loss`.
    """

    function = staticmethod(sample_dependent_focal_loss)


class DualFocalLoss(_Loss):
    r"""Focal loss by the gap to the next class below.

    $$L = -(1 - p_y + p_j)^\gamma \log p_y$$

    When to use: as the focal loss, where it makes the model too unsure.
    Arguments, returns, errors and source: `hf_calib.functional.losses.dual_focal_loss`.
    """

    function = staticmethod(dual_focal_loss)


class BrierLoss(_Loss):
    r"""Squared distance to the one-hot label.

    $$L = \sum_k (p_k - [k = y])^2$$

    When to use: where a bounded proper score is wanted, which single wrong labels cannot dominate.
    Arguments, returns, errors and source: `hf_calib.functional.losses.brier_loss`.
    """

    function = staticmethod(brier_loss)


class ConfidencePenalty(_Loss):
    r"""Cross-entropy less a share of the entropy.

    $$L = -\log p_y - \beta H(p)$$

    When to use: as label smoothing; it weighs most where the model is sure.
    Arguments, returns, errors and source: `hf_calib.functional.losses.confidence_penalty_loss`.
    """

    function = staticmethod(confidence_penalty_loss)


class MMCE(_Loss):
    r"""Cross-entropy plus the maximum mean calibration error of the batch.

    $$L = -\log p_y + \lambda \, \mathrm{MMCE}$$

    When to use: with batches of dozens of rows, where a penalty on the gap itself is wanted.
    Arguments, returns, errors and source: `hf_calib.functional.batch_losses.mmce_loss`.
    """

    function = staticmethod(mmce_loss)


class SoftBinnedECE(_Loss):
    r"""Cross-entropy plus a soft-binned calibration error of the batch.

    $$L = -\log p_y + \lambda \, \mathrm{ECE}_\mathrm{soft}$$

    When to use: as MMCE, with larger batches.
    Arguments, returns, errors and source: `hf_calib.functional.batch_losses.soft_binned_ece_loss`.
    """

    function = staticmethod(soft_binned_ece_loss)


class MDCA(_Loss):
    r"""Cross-entropy plus the gap of every class over the batch.

    $$L = -\log p_y + \lambda \, \mathrm{MDCA}$$

    When to use: where the probabilities of all classes matter, and batches hold many rows of each.
    Arguments, returns, errors and source: `hf_calib.functional.batch_losses.mdca_loss`.
    """

    function = staticmethod(mdca_loss)


ADDITIVE: dict[str, type[nn.Module]] = {
    "cross_entropy": CrossEntropy,
    "label_smoothing": LabelSmoothing,
    "margin_label_smoothing": MarginLabelSmoothing,
    "focal": FocalLoss,
    "sample_dependent_focal": SampleDependentFocalLoss,
    "dual_focal": DualFocalLoss,
    "brier": BrierLoss,
    "confidence_penalty": ConfidencePenalty,
}
LOSSES: dict[str, type[nn.Module]] = {**ADDITIVE, "mmce": MMCE, "soft_binned_ece": SoftBinnedECE, "mdca": MDCA}


def make_loss(name: str, kwargs: dict[str, Any] | None = None, *, reduction: str = "mean") -> nn.Module:
    """Builds a loss from its name and its hyper-parameters.

    Args:
        name (`str`): a key of `LOSSES`.
        kwargs (`dict`, *optional*): hyper-parameters by name, such as `{"gamma": 3.0}`, and `"class_weights"`. How
            rows are masked and reduced is not among them: whoever trains decides that, not who chooses the loss.
        reduction (`"mean"`, `"sum"` or `"none"`): as in the losses.
    Returns:
        `torch.nn.Module` that maps logits `(..., C)` and labels `(...)` to the loss.
    Raises:
        ValueError: the name is unknown, the loss has no such hyper-parameter, or a value is out of its range.
    Example:
        >>> from hf_calib.losses import make_loss
        >>> make_loss("focal", {"gamma": 2.0})
        FocalLoss(gamma=2.0, ignore_index=-100, reduction='mean')
    """
    if not isinstance(name, str) or name not in LOSSES:
        raise ValueError(f"name: got {name!r}; allowed are {', '.join(map(repr, LOSSES))}")
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(kwargs, dict):
        raise ValueError(f"kwargs: got {kwargs!r}; allowed are None and a dict of hyper-parameters")
    allowed = [key for key in inspect.signature(LOSSES[name]).parameters if key not in NOT_OF_THE_LOSS]
    unknown = [key for key in kwargs if key not in allowed]
    if unknown:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"kwargs of {name!r}: got {unknown[0]!r} = {kwargs[unknown[0]]!r}; allowed are {choices}")
    return LOSSES[name](**kwargs, reduction=reduction)
