"""Tests of calibration: whether the miscalibration that is seen is more than chance would show.

Kolmogorov-Smirnov and Kuiper need no bins: they add up outcome minus confidence in ascending order of confidence. If
the model is calibrated this sum, divided by its standard deviation, is a Brownian motion, whatever the confidences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .calibration import events
from .selective import top_label_groups


TERMS = 8  # of each series; on its side of SWITCH the next term is below 1e-25
SWITCH = 1.5


class CalibrationTest(NamedTuple):
    """A statistic, and the probability of one at least as large if the model is perfectly calibrated."""

    statistic: torch.Tensor  # () float64
    p_value: torch.Tensor  # () float64 in [0, 1]


def kolmogorov_smirnov_test(probs: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100) -> CalibrationTest:
    r"""Largest cumulative difference between outcomes and confidence, and whether it is more than chance.

    $$\mathrm{KS} = \max_k \frac1n \Bigl|\sum_{i \le k} (y_i - s_i)\Bigr|, \qquad s_1 \le \dots \le s_n$$

    Args:
        probs (`torch.Tensor`, floating): class probabilities `(..., C)`, read by their top label; or `(N,)`
            probabilities of an event.
        labels (`torch.Tensor`, integer): `(...)` in `[0, C)`; or `(N,)` in {0, 1}.
        ignore_index (`int`): rows with this label are left out.
    Returns:
        [`CalibrationTest`]: `statistic`, float64 in `[0, 1]`, a fraction, lower is better; and `p_value`, the chance
        that $\sup_{[0, 1]} |B|$ of a Brownian motion $B$ exceeds $\mathrm{KS} / \sigma$ with
        $\sigma^2 = \sum_i s_i (1 - s_i) / n^2$. Equal confidences are added together, so the order of rows is
        irrelevant. The p-value is that of many rows: with few rows, or few distinct confidences, it is rather too
        large. Below 0.05 it can be too small while $\sum_i s_i (1 - s_i)$ is less than about 5, where one surprise
        decides. Where $\sigma$ is 0 (all confidences are 0 or 1) it is 1 if there is no difference, and else 0.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        Gupta et al. 2021 (arXiv 2006.12800); p-value of Tygert 2022 (arXiv 2202.00100) and Arrieta-Ibarra
        et al. 2022 (arXiv 2205.09680), where it is called ECCE-MAD.
    Example:
        >>> import torch
        >>> test = kolmogorov_smirnov_test(torch.full((100,), 0.5), (torch.arange(100) < 60).long())
        >>> round(test.statistic.item(), 3), round(test.p_value.item(), 3)
        (0.1, 0.091)
    """
    return kolmogorov_smirnov_of_sums(top_label_groups(probs, labels, ignore_index=ignore_index))


def kuiper_test(probs: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100) -> CalibrationTest:
    r"""Range of the cumulative differences between outcomes and confidence, and whether it is more than chance.

    $$\mathrm{Kuiper} = \max_k D_k - \min_k D_k, \qquad D_k = \frac1n \sum_{i \le k} (y_i - s_i), \quad D_0 = 0$$

    It is the largest difference over any interval of confidence: overconfidence in one interval does not hide
    underconfidence in another. Prefer it to Kolmogorov-Smirnov unless the difference has one sign throughout.

    Args:
        probs, labels, ignore_index: as in `kolmogorov_smirnov_test`.
    Returns:
        [`CalibrationTest`]: `statistic`, float64 in `[0, 1]`, a fraction, lower is better; and `p_value`, the chance
        that the range of a Brownian motion on `[0, 1]` exceeds the statistic divided by $\sigma$. All else as in
        `kolmogorov_smirnov_test`.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        Arrieta-Ibarra et al. 2022 (arXiv 2205.09680), where it is called ECCE-R; law of the range: Feller 1951, "The
        asymptotic distribution of the range of sums of independent random variables".
    Example:
        >>> import torch
        >>> test = kuiper_test(torch.full((100,), 0.5), (torch.arange(100) < 60).long())
        >>> round(test.statistic.item(), 3), round(test.p_value.item(), 3)
        (0.1, 0.181)
    """
    return kuiper_of_sums(top_label_groups(probs, labels, ignore_index=ignore_index))


def spiegelhalter_test(probs: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100) -> CalibrationTest:
    r"""Whether the Brier score is another than the probabilities themselves say it should be.

    $$Z = \frac{\sum_i (y_i - s_i)(1 - 2 s_i)}{\sqrt{\sum_i (1 - 2 s_i)^2\,s_i (1 - s_i)}}$$

    The numerator is the sum of $(y_i - s_i)^2$ less what it is expected to be. Miscalibration that leaves this sum
    alone goes unseen: all of it at $s = 1/2$, and too extreme on one side where the other is as much too timid.

    Args:
        probs, labels, ignore_index: as in `kolmogorov_smirnov_test`.
    Returns:
        [`CalibrationTest`]: `statistic` $Z$, float64, standard normal for a calibrated model and many rows, above 0
        where probabilities are too extreme and below 0 where they are too timid; and its two-sided `p_value`. Where
        the variance is 0 (all of `s` are 0, 1/2 or 1) $Z$ is 0 or infinite, and the p-value 1 or 0.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        Spiegelhalter 1986, "Probabilistic prediction in patient management and clinical trials".
    Example:
        >>> import torch
        >>> test = spiegelhalter_test(torch.full((100,), 0.8), (torch.arange(100) < 70).long())
        >>> round(test.statistic.item(), 3), round(test.p_value.item(), 3)
        (2.5, 0.012)
    """
    scores, outcomes = events(probs, labels, ignore_index=ignore_index)
    return spiegelhalter_of_sums(spiegelhalter_terms(scores[:, 0], outcomes[:, 0]).sum(-1))


def kolmogorov_smirnov_of_sums(sums: torch.Tensor) -> CalibrationTest:
    """The test that sums over ascending cells of confidence imply: `(3, ..., G)` gives `(...)` each, float64.

    Differences inside a cell are not seen: the statistic is at most half the share of the largest cell too small.
    """
    differences, sigma = cumulative_differences(sums)
    statistic = differences.abs().amax(-1)
    return CalibrationTest(statistic, brownian_supremum_tail(_ratio(statistic, sigma)))


def kuiper_of_sums(sums: torch.Tensor) -> CalibrationTest:
    """The test that sums over ascending cells of confidence imply: `(3, ..., G)` gives `(...)` each, float64.

    Differences inside a cell are not seen: the statistic is at most the share of the largest cell too small.
    """
    differences, sigma = cumulative_differences(sums)
    statistic = differences.amax(-1).clamp_min(0) - differences.amin(-1).clamp_max(0)
    return CalibrationTest(statistic, brownian_range_tail(_ratio(statistic, sigma)))


def spiegelhalter_of_sums(sums: torch.Tensor) -> CalibrationTest:
    """The test that the two sums of `spiegelhalter_terms` over rows imply: `(2, ...)` gives `(...)` each, float64."""
    numerator, variance = sums
    statistic = _ratio(numerator, variance.sqrt())
    return CalibrationTest(statistic, torch.erfc(statistic.abs() / math.sqrt(2)))


def spiegelhalter_terms(scores: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """What each row adds to the numerator of Z and to its variance: `(...)` and `(...)` give `(2, ...)`, float64."""
    scores = scores.double()
    lever = 1 - 2 * scores
    return torch.stack([(outcomes.double() - scores) * lever, lever.square() * scores * (1 - scores)])


def cumulative_differences(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Cumulative sums of outcome minus confidence at the upper end of each cell, and the last one's deviation.

    A cell's variance $\sum s (1 - s)$ is taken to be $m c (1 - c)$ with its mean confidence $c$. For equal confidences
    this is exact; for a cell of width $w$ it is too large, by at most $m w^2 / 4$.

    Args:
        sums (`torch.Tensor` of shape `(3, ..., G)`, float64): from `bin_sums` or `confidence_groups`.
    Returns:
        `(..., G)` and `(...)`, float64, both divided by the number of rows.
    """
    counts, confidence, happened = sums
    total = counts.sum(-1)
    variance = confidence * (1 - confidence / counts.clamp_min(1))
    return (happened - confidence).cumsum(-1) / total[..., None], variance.sum(-1).sqrt() / total


def brownian_supremum_tail(x: torch.Tensor) -> torch.Tensor:
    r"""Probability that $\sup |B|$ of a Brownian motion on [0, 1] exceeds each `x`, within 1e-14: `(...)`, float64.

    $$1 - \frac4\pi \sum_{k \ge 0} \frac{(-1)^k}{2k + 1}\,e^{-(2k + 1)^2 \pi^2 / 8 x^2}
    = 2 \sum_{k \ge 0} (-1)^k\,\mathrm{erfc}\,\frac{(2k + 1)\,x}{\sqrt2}$$

    by eigenfunctions of the heat equation between two walls, and by reflecting at them.
    """
    k = torch.arange(TERMS, dtype=torch.float64, device=x.device)
    odd, sign = 2 * k + 1, 1 - 2 * (k % 2)
    y = x[..., None]
    below = 1 - 4 / math.pi * (sign / odd * torch.exp(-(odd * math.pi / y).square() / 8)).sum(-1)
    above = 2 * (sign * torch.erfc(odd * y / math.sqrt(2))).sum(-1)
    return torch.where(x < SWITCH, below, above)


def brownian_range_tail(x: torch.Tensor) -> torch.Tensor:
    r"""Probability that the range of a Brownian motion on [0, 1] exceeds each `x`, within 1e-14: `(...)`, float64.

    $$1 - 8 \sum_{k \ge 0} \Bigl(\frac1{x^2} + \frac1{(2k + 1)^2 \pi^2}\Bigr) e^{-(2k + 1)^2 \pi^2 / 2 x^2}
    = 4 \sum_{k \ge 1} (-1)^{k - 1}\,k\,\mathrm{erfc}\,\frac{k x}{\sqrt2}$$

    The second is Feller's density, integrated; the first follows by Poisson summation of the density.
    """
    k = torch.arange(TERMS, dtype=torch.float64, device=x.device)
    rate, sign = ((2 * k + 1) * math.pi).square(), 1 - 2 * (k % 2)
    y = x[..., None].clamp_min(0.1)  # 1 to the last bit below that, and at 0 infinity times 0
    below = 1 - 8 * ((1 / y.square() + 1 / rate) * torch.exp(-rate / (2 * y.square()))).sum(-1)
    above = 4 * (sign * (k + 1) * torch.erfc((k + 1) * y / math.sqrt(2))).sum(-1)
    return torch.where(x < SWITCH, below, above)


def _ratio(difference: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """How many deviations a difference is: no difference is none of them, even where the deviation is 0."""
    return torch.where(difference == 0, 0.0, difference / deviation)
