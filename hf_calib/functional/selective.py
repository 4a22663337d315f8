"""Selective prediction: what answering only the surest rows buys, from the most to the least confident.

Every metric here sees no more of the rows than how many have which confidence and how many of these are right. So each
is a function of sums over cells of confidence (`*_of_sums`), which need not be one cell per distinct value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .calibration import events


class RiskCoverageCurve(NamedTuple):
    """What each threshold on the confidence buys, one entry per distinct confidence, the highest first."""

    coverage: torch.Tensor  # (G,) float64, ascending to 1: share of rows that are answered
    risk: torch.Tensor  # (G,) float64: share of wrong rows among the answered
    threshold: torch.Tensor  # (G,) float64, descending: answered is what has at least this confidence


def risk_coverage_curve(probs: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100) -> RiskCoverageCurve:
    """Share of wrong answers by share of rows answered, when the least confident rows are left unanswered.

    Args:
        probs (`torch.Tensor`, floating): class probabilities `(..., C)`, read by their top label; or the confidence
            `(N,)` of answers, whose labels then say whether they are right.
        labels (`torch.Tensor`, integer): `(...)` in `[0, C)`; or `(N,)` in {0, 1}, 1 for right.
        ignore_index (`int`): rows with this label are left out.
    Returns:
        [`RiskCoverageCurve`]: `coverage`, `risk`, `threshold`. Equal confidences are answered together, so there is
        one point per distinct confidence, in the precision of `probs`.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        El-Yaniv & Wiener 2010, "On the foundations of noise-free selective classification"; Geifman & El-Yaniv 2017
        (arXiv 1705.08500), section 2.
    Example:
        >>> import torch
        >>> confidence, correct = torch.tensor([0.875, 0.75, 0.75, 0.5]), torch.tensor([1, 1, 0, 0])
        >>> curve = risk_coverage_curve(confidence, correct)
        >>> curve.coverage.tolist(), curve.threshold.tolist()
        ([0.25, 0.75, 1.0], [0.875, 0.75, 0.5])
        >>> [round(risk, 3) for risk in curve.risk.tolist()]
        [0.0, 0.333, 0.5]
    """
    scores, outcomes = events(probs, labels, ignore_index=ignore_index)
    curve = risk_coverage_of_sums(confidence_groups(scores[:, 0], outcomes[:, 0]))
    # a threshold must be the confidence itself, and a sum over equal rows divided by their number may just miss it
    return curve._replace(threshold=scores[:, 0].unique().flip(0).double())


def area_under_risk_coverage(probs: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100) -> torch.Tensor:
    r"""Mean risk over all coverages (AURC): how badly the surest rows do, whatever share of them is answered.

    $$\mathrm{AURC} = \frac{1}{n} \sum_{i=1}^{n} \frac{\text{wrong among the } i \text{ surest rows}}{i}$$

    Args:
        probs, labels, ignore_index: as in `risk_coverage_curve`.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`; lower is better. It mixes the ranking with the accuracy: a
        confidence that says nothing has, in expectation, the error rate. Among equal confidences it is the expectation
        over all their orders, so the order of the rows is irrelevant.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        Geifman et al. 2019 (arXiv 1805.08206); curve of Geifman & El-Yaniv 2017 (arXiv 1705.08500). The
        treatment of ties is ours.
    Example:
        >>> import torch
        >>> area_under_risk_coverage(torch.tensor([0.9, 0.8, 0.6, 0.5]), torch.tensor([1, 0, 1, 1]))
        tensor(0.2708, dtype=torch.float64)
    """
    return aurc_of_sums(top_label_groups(probs, labels, ignore_index=ignore_index))


def area_under_generalised_risk_coverage(
    probs: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100
) -> torch.Tensor:
    r"""Mean over all coverages of the share of rows that are answered and wrong (AUGRC).

    $$\mathrm{AUGRC} = \int_0^1 P(\text{answered and wrong})\,d\,\text{coverage}
    = (1 - \mathrm{AUROC})\,a\,(1 - a) + \tfrac12 (1 - a)^2, \quad a \text{ the accuracy}$$

    Args:
        probs, labels, ignore_index: as in `risk_coverage_curve`.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1/2]`; lower is better. Unlike in the AURC, an error of the very
        surest rows weighs no more than others do by their rank.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        Traub et al. 2024 (arXiv 2407.01032). Equal confidences are joined by a straight line.
    Example:
        >>> import torch
        >>> area_under_generalised_risk_coverage(torch.tensor([0.9, 0.8, 0.6, 0.5]), torch.tensor([1, 0, 1, 1]))
        tensor(0.1562, dtype=torch.float64)
    """
    return augrc_of_sums(top_label_groups(probs, labels, ignore_index=ignore_index))


def accuracy_at_coverage(
    probs: torch.Tensor, labels: torch.Tensor, *, coverage: float = 0.8, ignore_index: int = -100
) -> torch.Tensor:
    """Accuracy on the surest rows, as many as make up `coverage`.

    Args:
        probs, labels, ignore_index: as in `risk_coverage_curve`.
        coverage (`float` in `(0, 1]`): share of rows that are answered.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`; higher is better. Where the share ends amid equal
        confidences, or amid a row, that part of them counts proportionally.
    Raises:
        ValueError: as `expected_calibration_error`; or `coverage` is out of range.
    Source:
        One minus the risk of Geifman & El-Yaniv 2017 (arXiv 1705.08500), section 2, at a fixed coverage.
    Example:
        >>> import torch
        >>> confidence, correct = torch.tensor([0.9, 0.8, 0.6, 0.5]), torch.tensor([1, 1, 0, 0])
        >>> accuracy_at_coverage(confidence, correct, coverage=0.625)
        tensor(0.8000, dtype=torch.float64)
    """
    check_share("coverage", coverage, zero=False)
    return accuracy_at_coverage_of_sums(top_label_groups(probs, labels, ignore_index=ignore_index), coverage)


def coverage_at_risk(
    probs: torch.Tensor, labels: torch.Tensor, *, risk: float = 0.05, ignore_index: int = -100
) -> torch.Tensor:
    """Largest share of rows that a threshold on the confidence can answer with at most `risk` of them wrong.

    Args:
        probs, labels, ignore_index: as in `risk_coverage_curve`.
        risk (`float` in `[0, 1]`): share of wrong rows among the answered that is bearable.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`; higher is better, 0 where no threshold does it. It
        describes these rows: a threshold that was chosen on them does a little worse on others.
    Raises:
        ValueError: as `expected_calibration_error`; or `risk` is out of range.
    Source:
        Geifman & El-Yaniv 2017 (arXiv 1705.08500), section 3, without the confidence bound.
    Example:
        >>> import torch
        >>> confidence, correct = torch.tensor([0.9, 0.8, 0.6, 0.5]), torch.tensor([1, 0, 1, 1])
        >>> coverage_at_risk(confidence, correct, risk=0.25), coverage_at_risk(confidence, correct, risk=0.2)
        (tensor(1., dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """
    check_share("risk", risk, zero=True)
    return coverage_at_risk_of_sums(top_label_groups(probs, labels, ignore_index=ignore_index), risk)


def confidence_auroc(probs: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100) -> torch.Tensor:
    """Probability that a right row is more confident than a wrong one; equal confidences count one half.

    Args:
        probs, labels, ignore_index: as in `risk_coverage_curve`.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`; higher is better, 1/2 is chance. NaN where all rows are
        right or all are wrong: there is no pair to compare.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        Hanley & McNeil 1982, "The meaning and use of the area under a ROC curve"; of confidence against correctness in
        Hendrycks & Gimpel 2017 (arXiv 1610.02136).
    Example:
        >>> import torch
        >>> confidence_auroc(torch.tensor([0.9, 0.8, 0.8, 0.5]), torch.tensor([1, 1, 0, 0]))
        tensor(0.8750, dtype=torch.float64)
    """
    return auroc_of_sums(top_label_groups(probs, labels, ignore_index=ignore_index))


def top_label_groups(probs: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100) -> torch.Tensor:
    """`confidence_groups` of the top label, or of the `(N,)` probabilities of events: `(3, G)` float64."""
    scores, outcomes = events(probs, labels, ignore_index=ignore_index)
    return confidence_groups(scores[:, 0], outcomes[:, 0])


def confidence_groups(scores: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """Sums over the rows of each distinct score: count, sum of scores, sum of outcomes.

    Args:
        scores (`torch.Tensor` of shape `(N,)`, floating): told apart in their own precision.
        outcomes (`torch.Tensor` of shape `(N,)`, bool).
    Returns:
        `torch.Tensor` of shape `(3, G)`, float64, in ascending order of the scores: what `bin_sums` gives of cells
        that hold one score each.
    """
    values, group, counts = scores.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    happened = torch.bincount(group, outcomes.double(), minlength=len(values))
    return torch.stack([counts, counts * values, happened])


def check_share(name: str, value: float, *, zero: bool) -> None:
    """Raises a ValueError unless `value` is a number in `[0, 1]`, or in `(0, 1]` without `zero`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and (0 < value <= 1 or (zero and value == 0))):
        raise ValueError(f"{name}: got {value!r}; allowed are numbers in {'[' if zero else '('}0, 1]")


def risk_coverage_of_sums(sums: torch.Tensor) -> RiskCoverageCurve:
    """The curve that `(3, G)` sums imply: a point per cell with rows, whose threshold is its mean confidence."""
    counts, confidence, happened = sums[:, sums[0] > 0].flip(-1)
    answered = counts.cumsum(-1)
    wrong = (counts - happened).cumsum(-1)
    return RiskCoverageCurve(answered / answered[-1], wrong / answered, confidence / counts)


def aurc_of_sums(sums: torch.Tensor) -> torch.Tensor:
    r"""The AURC that sums over ascending cells of confidence imply: `(3, ..., G)` gives `(...)`, float64.

    In a cell of $m$ rows and $e$ errors after $n_0$ rows and $e_0$ errors, the expected risk at row $j$ is
    $(e_0 + e j / m) / (n_0 + j) = e / m + (e_0 - n_0\,e / m) / (n_0 + j)$, and the sum of $1 / (n_0 + j)$ over the
    cell is a difference of two digamma values.
    """
    counts, errors, rows_before, errors_before = _from_the_surest(sums)
    harmonic = torch.digamma(rows_before + counts + 1) - torch.digamma(rows_before + 1)
    excess = errors_before - rows_before * errors / counts.clamp_min(1)
    return (errors + excess * harmonic).sum(-1) / counts.sum(-1)


def augrc_of_sums(sums: torch.Tensor) -> torch.Tensor:
    """The AUGRC that sums over ascending cells of confidence imply: `(3, ..., G)` gives `(...)`, float64."""
    counts, errors, _, errors_before = _from_the_surest(sums)
    return (counts * (errors_before + errors / 2)).sum(-1) / counts.sum(-1).square()


def accuracy_at_coverage_of_sums(sums: torch.Tensor, coverage: float) -> torch.Tensor:
    """Accuracy at a coverage, of sums over ascending cells of confidence: `(3, ..., G)` gives `(...)`, float64."""
    counts, errors, rows_before, _ = _from_the_surest(sums)
    answered = counts.sum(-1) * coverage
    share = ((answered[..., None] - rows_before) / counts.clamp_min(1)).clamp(0, 1)
    return (share * (counts - errors)).sum(-1) / answered


def coverage_at_risk_of_sums(sums: torch.Tensor, risk: float) -> torch.Tensor:
    """Coverage at a risk, of sums over ascending cells of confidence: `(3, ..., G)` gives `(...)`, float64."""
    counts, errors, rows_before, errors_before = _from_the_surest(sums)
    answered = rows_before + counts
    bearable = (errors_before + errors) / answered <= risk  # false for the 0 / 0 of empty cells above all rows
    return (answered * bearable).amax(-1) / counts.sum(-1)


def auroc_of_sums(sums: torch.Tensor) -> torch.Tensor:
    """The AUROC that sums over ascending cells of confidence imply: `(3, ..., G)` gives `(...)`, float64."""
    counts, _, right = sums
    wrong = counts - right
    wrong_below = wrong.cumsum(-1) - wrong
    return (right * (wrong_below + wrong / 2)).sum(-1) / (right.sum(-1) * wrong.sum(-1))


def _from_the_surest(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and errors of each cell, and rows and errors of all cells before it; the highest confidence first."""
    counts, _, happened = sums.flip(-1)
    errors = counts - happened
    return counts, errors, counts.cumsum(-1) - counts, errors.cumsum(-1) - errors
