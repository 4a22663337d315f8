"""The training losses as modules, and the table of their names.

A module holds hyper-parameters and nothing else; the mathematics is in `hf_calib.functional.losses`. Each loss is a
sum over rows: with `reduction="sum"`, divided by the number of rows of the whole step, it is exact under gradient
accumulation and over several processes. That is what `CalibrationTrainer` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from .functional.losses import brier_loss, cross_entropy_loss, focal_loss, label_smoothing_loss


class _RowLoss(nn.Module):
    function: ClassVar[Callable[..., torch.Tensor]]

    def __init__(self, *, ignore_index: int, reduction: str, **hyperparameters: float):
        super().__init__()
        self.settings = {**hyperparameters, "ignore_index": ignore_index, "reduction": reduction}
        # The functions check their own arguments. One call here makes a bad value fail now, not at step one.
        self(torch.zeros(1, 2, device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu"))

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.function(logits, labels, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class CrossEntropy(_RowLoss):
    r"""Negative log-likelihood, $-\log p_y$: `hf_calib.functional.losses.cross_entropy_loss` as a module.

    When to use: the baseline, and the right choice where a calibrator is fitted on held-out data afterwards.

    Args:
        ignore_index (`int`): the label of rows that contribute 0.
        reduction (`"mean"`, `"sum"` or `"none"`): over the rows that are not ignored.
    Returns:
        Called with logits `(..., C)` and labels `(...)`: float32, in nats, lower is better.
    Raises:
        ValueError: an argument is out of its range.
    Requirements:
        None.
    Example:
        >>> import torch
        >>> from hf_calib.losses import CrossEntropy
        >>> CrossEntropy()(torch.zeros(2, 4), torch.tensor([3, -100]))
        tensor(1.3863)
    """

    function = staticmethod(cross_entropy_loss)

    def __init__(self, *, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(ignore_index=ignore_index, reduction=reduction)


class LabelSmoothing(_RowLoss):
    r"""Cross-entropy against softened labels: `hf_calib.functional.losses.label_smoothing_loss` as a module.

    $$L = -(1 - \varepsilon) \log p_y - \frac{\varepsilon}{C} \sum_k \log p_k$$

    When to use: where labels are noisy, or a network trained by cross-entropy is far too confident.

    Args:
        label_smoothing (`float` in `[0, 1)`): the share spread evenly over all classes; 0 is cross-entropy.
        ignore_index (`int`): the label of rows that contribute 0.
        reduction (`"mean"`, `"sum"` or `"none"`): over the rows that are not ignored.
    Returns:
        Called with logits `(..., C)` and labels `(...)`: float32, in nats, lower is better.
    Raises:
        ValueError: an argument is out of its range.
    Requirements:
        Every class keeps a finite logit.
    Source:
        Szegedy et al. 2016 (arXiv 1512.00567), section 7; default of Mukhoti et al. 2020 (arXiv 2002.09437).
    Example:
        >>> import torch
        >>> from hf_calib.losses import LabelSmoothing
        >>> LabelSmoothing()(torch.tensor([[4.0, 0.0]]), torch.tensor([0]))
        tensor(0.1181)
    """

    function = staticmethod(label_smoothing_loss)

    def __init__(self, label_smoothing: float = 0.05, *, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction)


class FocalLoss(_RowLoss):
    r"""Cross-entropy that lets go of rows that are right: `hf_calib.functional.losses.focal_loss` as a module.

    $$L = -(1 - p_y)^\gamma \log p_y$$

    When to use: the first thing to try against overconfidence in training. Fit a temperature afterwards all the same.

    Args:
        gamma (`float`, at least 0): how fast it lets go; 0 is cross-entropy.
        ignore_index (`int`): the label of rows that contribute 0.
        reduction (`"mean"`, `"sum"` or `"none"`): over the rows that are not ignored.
    Returns:
        Called with logits `(..., C)` and labels `(...)`: float32, in nats, lower is better.
    Raises:
        ValueError: an argument is out of its range.
    Requirements:
        It is not a proper scoring rule: select checkpoints by another score.
    Source:
        Lin et al. 2017 (arXiv 1708.02002), equation 4; gamma = 3: Mukhoti et al. 2020 (arXiv 2002.09437).
    Example:
        >>> import torch
        >>> from hf_calib.losses import FocalLoss
        >>> FocalLoss(gamma=2.0)(torch.tensor([[0.0, 2.0]]), torch.tensor([0]))
        tensor(1.6501)
    """

    function = staticmethod(focal_loss)

    def __init__(self, gamma: float = 3.0, *, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(gamma=gamma, ignore_index=ignore_index, reduction=reduction)


class BrierLoss(_RowLoss):
    r"""Squared distance to the one-hot label: `hf_calib.functional.losses.brier_loss` as a module.

    $$L = \sum_k (p_k - [k = y])^2$$

    When to use: where a bounded proper score is wanted, which single wrong labels cannot dominate.

    Args:
        ignore_index (`int`): the label of rows that contribute 0.
        reduction (`"mean"`, `"sum"` or `"none"`): over the rows that are not ignored.
    Returns:
        Called with logits `(..., C)` and labels `(...)`: float32, in `[0, 2]` a row, lower is better.
    Raises:
        ValueError: an argument is out of its range.
    Requirements:
        A start that is not yet sure of anything: the gradient vanishes where a wrong class has all the probability.
    Source:
        Brier 1950 (Monthly Weather Review 78).
    Example:
        >>> import torch
        >>> from hf_calib.losses import BrierLoss
        >>> BrierLoss()(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([0]))
        tensor(0.2600)
    """

    function = staticmethod(brier_loss)

    def __init__(self, *, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(ignore_index=ignore_index, reduction=reduction)


LOSSES = {
    "cross_entropy": CrossEntropy,
    "label_smoothing": LabelSmoothing,
    "focal": FocalLoss,
    "brier": BrierLoss,
}


def make_loss(name: str, kwargs: dict[str, Any] | None = None, *, reduction: str = "mean") -> nn.Module:
    """Builds a loss from its name and its hyper-parameters.

    Args:
        name (`str`): a key of `LOSSES`.
        kwargs (`dict`, *optional*): hyper-parameters by name, such as `{"gamma": 3.0}`. How rows are masked and
            reduced is not among them: whoever trains decides that, not who chooses the loss.
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
    if name not in LOSSES:
        raise ValueError(f"name: got {name!r}; allowed are {', '.join(map(repr, LOSSES))}")
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(kwargs, dict):
        raise ValueError(f"kwargs: got {kwargs!r}; allowed are None and a dict of hyper-parameters")
    allowed = [key for key in inspect.signature(LOSSES[name]).parameters if key not in ("ignore_index", "reduction")]
    unknown = [key for key in kwargs if key not in allowed]
    if unknown:
        choices = f"allowed are {', '.join(map(repr, allowed))}" if allowed else "it has none"
        raise ValueError(f"kwargs of {name!r}: got {unknown[0]!r} = {kwargs[unknown[0]]!r}; {choices}")
    return LOSSES[name](**kwargs, reduction=reduction)
