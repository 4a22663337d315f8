"""Calibration errors: how far a probability is from the frequency of what it is the probability of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .binning import all_edges, bin_sums, interior_edges
from .checks import check_choice, check_probs
from .scoring import row_top
from .smoothing import grid_masses, smooth_error


NORMS = ("l1", "l2", "max", "over", "under")
DEBIASED_NORMS = ("l2", "l1")
TARGETS = ("top", "class")


class ReliabilityCurve(NamedTuple):
    """The numbers behind a reliability diagram, one entry per bin; empty bins hold NaN."""

    edges: torch.Tensor  # (num_bins + 1,) float64, from 0 to 1
    counts: torch.Tensor  # (num_bins,) float64: rows in the bin
    confidence: torch.Tensor  # (num_bins,) float64: mean predicted probability
    accuracy: torch.Tensor  # (num_bins,) float64: share of rows where it happened


def expected_calibration_error(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_bins: int = 15,
    binning: str = "width",
    norm: str = "l1",
    target: str = "top",
    task: str | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    r"""Gap between confidence and accuracy, averaged over confidence bins.

    $$\mathrm{ECE} = \sum_b \frac{n_b}{n}\,\lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert$$

    Args:
        probs (`torch.Tensor`, floating): class probabilities `(..., C)` with rows that sum to 1; or `(N,)`
            probabilities of an event, as confidence-and-correctness pairs are; or `(..., L)` with
            `task="multilabel"`. Logits are refused.
        labels (`torch.Tensor`, integer): `(...)` in `[0, C)`; or `(N,)` in {0, 1}; or `(..., L)` in {0, 1}.
        num_bins (`int`): bins `(low, high]`; 0 falls into the first, 1 into the last; empty bins contribute 0.
        binning (`"width"` or `"mass"`): bins of equal width, or of equal counts (equal confidences share a bin).
        norm (`"l1"`, `"l2"`, `"max"`, `"over"` or `"under"`): weighted mean of the gaps, root of the weighted mean of
            their squares, the largest gap, or the share of `"l1"` that is over- or underconfidence.
        target (`"top"` or `"class"`): the most probable class of a row, or every class by itself, averaged over
            classes.
        task (`None` or `"multilabel"`): with `"multilabel"`, the mean over labels of each label's own error.
        ignore_index (`int`): rows with this label are left out.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`: a fraction, lower is better. On few rows it is biased
        upward: noise in a bin's accuracy counts as a gap; `debiased_calibration_error` takes that out.
    Raises:
        ValueError: shapes disagree, a row does not sum to 1 within the dtype's tolerance, a value is not finite, a
            label is out of range, or no row is left.
    Source:
        Guo et al. 2017 (arXiv 1706.04599), section 2; `target="class"` is Kull et al. 2019 (arXiv 1910.12656). Bins
        `(low, high]`.
    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.95, 0.05], [1.0, 0.0]])  # one right, one wrong, in the same bin of ten
        >>> expected_calibration_error(probs, torch.tensor([0, 1]), num_bins=10)
        tensor(0.4750, dtype=torch.float64)
    """
    check_choice("norm", norm, NORMS)
    scores, outcomes = events(probs, labels, target=target, task=task, ignore_index=ignore_index)
    sums = bin_sums(scores, outcomes, interior_edges(scores, num_bins, binning))
    return binned_error(sums, norm).mean()


def maximum_calibration_error(probs: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    """Largest gap between confidence and accuracy in any bin: `expected_calibration_error` with `norm="max"`.

    Args:
        probs, labels, **options: as in `expected_calibration_error`, without `norm`.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`; lower is better. One sparse bin can decide it.
    Source:
        Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599), section 2.
    """
    return expected_calibration_error(probs, labels, norm="max", **options)


def adaptive_calibration_error(probs: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    """Gap over bins of equal counts, for every class: `expected_calibration_error` with `"mass"` and `"class"`.

    Args:
        probs, labels, **options: as in `expected_calibration_error`, without `binning` and `target`.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`; lower is better.
    Source:
        Nixon et al. 2019 (arXiv 1904.01685), equation 3.
    """
    return expected_calibration_error(probs, labels, binning="mass", target="class", **options)


def classwise_calibration_error(probs: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    """Gap of every class's probability, averaged over classes: `expected_calibration_error` with `target="class"`.

    Args:
        probs, labels, **options: as in `expected_calibration_error`, without `target`.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`; lower is better. With many classes most probabilities are
        near 0 and the mean is small by nature.
    Source:
        Kull et al. 2019 (arXiv 1910.12656), section 2; the static calibration error of Nixon et al. 2019.
    """
    return expected_calibration_error(probs, labels, target="class", **options)


def overconfidence(probs: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    r"""The part of the expected calibration error that bins contribute whose confidence is above their accuracy.

    $$\sum_b \frac{n_b}{n}\,\max(\mathrm{conf}_b - \mathrm{acc}_b, 0)$$

    Args:
        probs, labels, **options: as in `expected_calibration_error`, without `norm`.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`; lower is better. With `underconfidence` it adds up to the
        expected calibration error.
    Source:
        The two signs of the summand in Guo et al. 2017 (arXiv 1706.04599), section 2.
    Example:
        >>> import torch
        >>> confidence, correct = torch.tensor([0.9, 0.9, 0.4, 0.4]), torch.tensor([1, 0, 1, 0])
        >>> overconfidence(confidence, correct), underconfidence(confidence, correct)
        (tensor(0.2000, dtype=torch.float64), tensor(0.0500, dtype=torch.float64))
    """
    return expected_calibration_error(probs, labels, norm="over", **options)


def underconfidence(probs: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    """The part of the expected calibration error that bins contribute whose confidence is below their accuracy.

    Args, Returns, Source: as in `overconfidence`.
    """
    return expected_calibration_error(probs, labels, norm="under", **options)


def debiased_calibration_error(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_bins: int = 15,
    binning: str = "mass",
    norm: str = "l2",
    target: str = "top",
    task: str | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    r"""Calibration error without what the noise of each bin's accuracy adds to it.

    $$\mathrm{CE}^2 = \sum_b \frac{n_b}{n} \Bigl[(\mathrm{acc}_b - \mathrm{conf}_b)^2
    - \frac{\mathrm{acc}_b (1 - \mathrm{acc}_b)}{n_b - 1}\Bigr]$$

    A plug-in error counts noise as miscalibration, the more so the fewer rows a bin has: a perfectly calibrated model
    of 200 rows shows an ECE of several per cent. Use this one to tell whether anything is left to calibrate.

    Args:
        probs, labels, num_bins, binning, target, task, ignore_index: as in `expected_calibration_error`.
        norm (`"l2"` or `"l1"`): the root of the formula above; or the ECE less the amount by which Gaussian noise in
            each bin's accuracy would raise it.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`; lower is better. Estimates below 0 are cut to 0. A bin of
        one row has no estimate of its noise: it counts in full in `"l1"`, and with the largest possible noise, 1/4, in
        `"l2"`.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        Kumar et al. 2019 (arXiv 1909.10155), section 4; there the bias of `"l1"` is simulated, here it is the mean of
        a folded normal distribution.
    Example:
        >>> import torch
        >>> confidence, correct = torch.full((8,), 0.75), torch.tensor([1, 1, 1, 0, 1, 0, 1, 0])
        >>> expected_calibration_error(confidence, correct, norm="l2"), debiased_calibration_error(confidence, correct)
        (tensor(0.1250, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    check_choice("norm", norm, DEBIASED_NORMS)
    scores, outcomes = events(probs, labels, target=target, task=task, ignore_index=ignore_index)
    return debiased_error(bin_sums(scores, outcomes, interior_edges(scores, num_bins, binning)), norm).mean()


def smooth_calibration_error(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    target: str = "top",
    task: str | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    r"""Calibration error without bins: residuals smoothed by a kernel whose width is the error itself.

    $$\mathrm{smECE}_\sigma = \int_0^1 \Bigl| \frac1n \sum_i (y_i - p_i)\,\tilde K_\sigma(t, p_i) \Bigr|\,dt,
    \qquad \mathrm{smECE} = \mathrm{smECE}_{\sigma^*} \text{ with } \mathrm{smECE}_{\sigma^*} = \sigma^*$$

    The kernel is a Gaussian reflected at 0 and 1, so that mass at confidence 1 counts in full.

    Args:
        probs, labels, target, task, ignore_index: as in `expected_calibration_error`.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`; lower is better. Confidences are placed on a grid of 1,025
        points, which moves values above 0.01 by less than 1 % and smaller ones by less than 1e-4.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        Błasiok & Nakkiran 2023 (arXiv 2309.12236), section 3.
    Example:
        >>> import torch
        >>> round(smooth_calibration_error(torch.full((100,), 0.5), torch.ones(100, dtype=torch.long)).item(), 3)
        0.5
    """
    scores, outcomes = events(probs, labels, target=target, task=task, ignore_index=ignore_index)
    return smooth_error(grid_masses(scores, outcomes)).mean()


def reliability_curve(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_bins: int = 15,
    binning: str = "width",
    ignore_index: int = -100,
) -> ReliabilityCurve:
    """Confidence and accuracy by confidence bin: what a reliability diagram draws.

    Args:
        probs, labels, num_bins, binning, ignore_index: as in `expected_calibration_error`; class probabilities are
            read by their top label.
    Returns:
        [`ReliabilityCurve`]: `edges`, `counts`, `confidence`, `accuracy`.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        DeGroot & Fienberg 1983; Guo et al. 2017 (arXiv 1706.04599), section 2.
    """
    scores, outcomes = events(probs, labels, ignore_index=ignore_index)
    edges = interior_edges(scores, num_bins, binning)
    return curve_of_sums(bin_sums(scores, outcomes, edges)[:, 0], all_edges(edges[0]))


def curve_of_sums(sums: torch.Tensor, edges: torch.Tensor) -> ReliabilityCurve:
    """The curve that per-bin sums `(3, num_bins)` and all `num_bins + 1` edges imply."""
    counts, confidence, happened = sums
    return ReliabilityCurve(edges, counts, confidence / counts, happened / counts)


def events(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    target: str = "top",
    task: str | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a calibration error compares: probabilities of events and whether these happened, a column per kind.

    Args:
        probs, labels, target, task, ignore_index: as in `expected_calibration_error`.
    Returns:
        scores `(N, K)`, floating, and outcomes `(N, K)`, bool. `K` is 1 for top labels and single events, and the
        number of classes or labels otherwise.
    """
    check_choice("target", target, TARGETS)
    return checked_events(*check_probs(probs, labels, task=task, ignore_index=ignore_index), target=target, task=task)


def checked_events(
    probs: torch.Tensor, labels: torch.Tensor, *, target: str = "top", task: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`events` of what `check_probs` has returned."""
    if task == "multilabel":
        return probs, labels == 1
    if probs.dim() == 1:
        return probs[:, None], (labels == 1)[:, None]
    if target == "class":
        return probs, labels[:, None] == torch.arange(probs.shape[1], device=labels.device)
    confidence, predicted = row_top(probs)
    return confidence, predicted == labels[:, None]


def binned_error(sums: torch.Tensor, norm: str = "l1") -> torch.Tensor:
    """The calibration error that per-bin sums imply: `(3, ..., num_bins)` from `bin_sums` gives `(...)`, float64."""
    counts, confidence, happened = sums
    total = counts.sum(-1)
    gaps = confidence - happened
    if norm == "over":
        return gaps.clamp_min(0).sum(-1) / total
    if norm == "under":
        return (-gaps).clamp_min(0).sum(-1) / total
    if norm == "l1":
        return gaps.abs().sum(-1) / total
    if norm == "max":
        return (gaps.abs() / counts.clamp_min(1)).amax(-1)
    return (gaps.square() / counts.clamp_min(1)).sum(-1).div(total).sqrt()


def debiased_error(sums: torch.Tensor, norm: str = "l2") -> torch.Tensor:
    """The debiased error that per-bin sums imply: `(3, ..., num_bins)` from `bin_sums` gives `(...)`, float64."""
    counts, confidence, happened = sums
    rows = counts.clamp_min(1)
    gaps, accuracy = (confidence - happened) / rows, happened / rows
    spread = accuracy * (1 - accuracy)
    if norm == "l2":
        noise = torch.where(counts > 1, spread / (counts - 1).clamp_min(1), 0.25)
        return ((gaps.square() - noise) * counts).sum(-1).div(counts.sum(-1)).clamp_min(0).sqrt()
    deviation = (spread / rows).sqrt()
    ratio = (gaps / deviation.clamp_min(torch.finfo(deviation.dtype).tiny)).abs()
    # E|N(gap, deviation)|, the mean of the folded normal distribution, less |gap|
    bias = deviation * (math.sqrt(2 / math.pi) * torch.exp(-ratio.square() / 2) - ratio * torch.erfc(ratio / 2**0.5))
    return ((gaps.abs() - bias.nan_to_num(nan=0.0)) * counts).sum(-1).div(counts.sum(-1)).clamp_min(0)
