"""A temperature for each group of rows, drawn towards the one that all of them share."""

from __future__ import annotations

import math

import torch

from ..functional.checks import check_choice
from .base import Calibrator
from .scaling import BLOCK_ELEMENTS, fit_temperature, in_dtype_of, row_derivatives, temperature_problem


KINDS_OF_GROUPS = ("class", "group")
MAX_STEPS = 50
LONGEST_STEP = 0.5  # in log T
LAST_STEP = 1e-7
SPREADS = torch.logspace(-3, 1, 81, dtype=torch.float64)  # of the groups' log T that are tried, beside 0


class GroupTemperature(Calibrator):
    r"""A temperature for each group: $z / T_g$ with $\log T_g$ drawn towards $\log T$, which is that of all rows.

    $$\min_{T_g} \; \sum_{i \in g} \mathrm{NLL}_i(T_g) + \frac{(\log T_g - \log T)^2}{2 \tau^2}$$

    The spread $\tau$ of the groups is the most likely one. Where the slopes of the groups' NLL at the shared $T$
    differ no more than chance lets them, it is 0 and all groups share $T$.

    *When to use:* where languages, sources or predicted classes are too sure to different degrees, and some have few
    rows.

    Args:
        by (`"class"` or `"group"`): the class on top, which the logits tell; or groups that are given, at the fit and
            at every use, so that it cannot be attached to a model.
        task: as in [`Calibrator`].
    Attributes:
        temperature (`torch.Tensor` of shape `()`, float64): shared, also by groups that the fit has not seen.
        group_temperatures (`torch.Tensor` of shape `(G,)`, float64): of each group.
    Source:
        Empirical Bayes (Efron & Morris 1975), on the temperature of Guo et al. 2017 (arXiv 1706.04599).
    Example:
        >>> import torch
        >>> p = torch.tensor([0.8, 0.2]).log()
        >>> logits = torch.cat([p.expand(100, 2), 4 * p.expand(100, 2)])  # the second half is far too sure
        >>> labels, groups = torch.tensor([0, 0, 0, 0, 1]).repeat(40), torch.arange(2).repeat_interleave(100)
        >>> GroupTemperature(by="group").fit(logits, labels, groups=groups).group_temperatures.round()
        tensor([1., 4.], dtype=torch.float64)
    """

    name = "group_temperature"
    tensor_names = ("temperature", "group_temperatures")
    tensor_dtype = torch.float64
    setting_names = ("by",)
    preserves_accuracy = True
    contains_identity = True

    def __init__(self, *, by: str = "class", task: str | None = None):
        super().__init__(task=task)
        check_choice("by", by, KINDS_OF_GROUPS)
        self.by = by
        self.needs_groups = by == "group"

    def _fit(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        groups = logits.argmax(-1) if groups is None else groups
        num_groups = logits.shape[-1] if self.by == "class" else int(groups.max()) + 1
        shared = fit_temperature(logits, labels, weights)
        log_t = torch.full((num_groups,), math.log(shared), dtype=torch.float64, device=logits.device)
        slopes, curvatures, variances = _group_sums(logits, labels, weights, groups, log_t)
        spread = group_spread(slopes, curvatures, variances)
        steps = MAX_STEPS if spread > 0 else 0
        for _ in range(steps):
            slopes, curvatures, _ = _group_sums(logits, labels, weights, groups, log_t)
            precision = curvatures.clamp_min(0) + 1 / spread**2
            step = -(slopes + (log_t - math.log(shared)) / spread**2) / precision
            log_t = log_t + step.clamp(-LONGEST_STEP, LONGEST_STEP)
            if float(step.abs().max()) < LAST_STEP:
                break
            # the first spread took the NLL for a parabola; a step of EM takes what is now known of the optima
            spread = math.sqrt(float(((log_t - math.log(shared)).square() + 1 / precision).mean()))
        return {"temperature": log_t.new_tensor(shared), "group_temperatures": log_t.exp()}

    def _calibrate(self, logits: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
        groups = logits.argmax(-1) if groups is None else groups
        if groups.shape != logits.shape[:-1]:
            raise ValueError(f"groups: got shape {tuple(groups.shape)}; allowed is {tuple(logits.shape[:-1])}")
        if groups.is_floating_point() or (not groups.is_meta and groups.numel() and int(groups.min()) < 0):
            raise ValueError(f"groups: got {groups.dtype} or a negative number; allowed are integers from 0 up")
        temperatures = torch.cat([self.group_temperatures, self.temperature[None]])
        divisor = temperatures[groups.clamp_max(len(self.group_temperatures))][..., None]
        return in_dtype_of(logits, logits.double() / divisor)

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        shared, of_groups = tensors["temperature"], tensors["group_temperatures"]
        if (problem := temperature_problem(shared)) is not None:
            return problem
        if (
            of_groups.dim() != 1
            or bool((of_groups <= 0).any())
            or (self.by == "class" and len(of_groups) != num_labels)
        ):
            return f"group_temperatures has shape {tuple(of_groups.shape)}; allowed are numbers above 0, one per group"
        return None


def group_spread(slopes: torch.Tensor, curvatures: torch.Tensor, variances: torch.Tensor) -> float:
    r"""The standard deviation of the groups' log T, by maximum likelihood.

    A group's slope at the shared temperature is normal with the variance of its rows' slopes, and with
    $h^2 \tau^2$ more where the group's own optimum is $\tau$ off and its curvature is h.

    Args:
        slopes, curvatures, variances (`torch.Tensor` of shape `(G,)`, float64): sums over the rows of each group of
            the NLL's first and second derivative in log T and of the squared first one.
    """
    seen = variances > 0
    slopes, curvatures, variances = slopes[seen], curvatures[seen], variances[seen]
    if len(slopes) < 2:
        return 0.0
    spreads = torch.cat([SPREADS.new_zeros(1), SPREADS]).to(slopes.device)
    total = variances + (curvatures * spreads[:, None]).square()
    surprise = (slopes.square() / total + total.log()).sum(-1)
    return float(spreads[surprise.argmin()])


def _group_sums(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor, log_t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over each group's rows of the NLL's slope, curvature and squared slope in log T: `(G,)` each."""
    sums = torch.zeros(3, len(log_t), dtype=torch.float64, device=logits.device)
    rows = max(1, BLOCK_ELEMENTS // logits.shape[-1])
    for z, y, w, g in zip(*(part.split(rows) for part in (logits, labels, weights, groups)), strict=True):
        slope, curvature, _ = row_derivatives(
            z, y, log_t[g].exp().to(torch.promote_types(z.dtype, torch.float32))[:, None]
        )
        sums.index_add_(1, g, torch.stack([slope * w, curvature * w, slope.square() * w]))
    return sums[0], sums[1], sums[2]
