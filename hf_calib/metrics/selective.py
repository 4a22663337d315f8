"""Streaming metrics of answering only when sure, read off sums over cells of confidence."""

from __future__ import annotations

import torch

from ..functional import selective as exact
from ..functional.checks import check_choice
from ..functional.selective import RiskCoverageCurve
from .base import EventMetric


class ConfidenceMetric(EventMetric):
    """A metric of the most probable class, or of events.

    Equal to the function (1e-9) where no cell holds two different confidences. Otherwise rows of one cell count as
    equally sure: as if confidences had been rounded to 1.3e-4.
    """

    def __init__(self, *, task: str | None = None, ignore_index: int = -100):
        check_choice("task", task, (None,))
        super().__init__(ignore_index=ignore_index)


class AreaUnderRiskCoverage(ConfidenceMetric):
    """`area_under_risk_coverage`, streaming. *When to use:* to compare models that may abstain."""

    name = "aurc"
    function = staticmethod(exact.area_under_risk_coverage)

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        return exact.aurc_of_sums(sums)


class AreaUnderGeneralisedRiskCoverage(ConfidenceMetric):
    """`area_under_generalised_risk_coverage`, streaming. *When to use:* as AURC, weighing every mistake alike."""

    name = "augrc"
    function = staticmethod(exact.area_under_generalised_risk_coverage)

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        return exact.augrc_of_sums(sums)


class AccuracyAtCoverage(ConfidenceMetric):
    """`accuracy_at_coverage`, streaming. *When to use:* where a fixed share of the rows can go to people.

    Args:
        coverage, ignore_index: as in `accuracy_at_coverage`.
    """

    name = "accuracy_at_coverage"
    function = staticmethod(exact.accuracy_at_coverage)
    higher_is_better = True

    def __init__(self, *, coverage: float = 0.8, **options):
        super().__init__(**options)
        exact.check_share("coverage", coverage, zero=False)
        self.coverage = coverage

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        return exact.accuracy_at_coverage_of_sums(sums, self.coverage)


class CoverageAtRisk(ConfidenceMetric):
    """`coverage_at_risk`, streaming. *When to use:* where a fixed share of mistakes is bearable.

    Args:
        risk, ignore_index: as in `coverage_at_risk`.
    """

    name = "coverage_at_risk"
    function = staticmethod(exact.coverage_at_risk)
    higher_is_better = True

    def __init__(self, *, risk: float = 0.05, **options):
        super().__init__(**options)
        exact.check_share("risk", risk, zero=True)
        self.risk = risk

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        return exact.coverage_at_risk_of_sums(sums, self.risk)


class ConfidenceAUROC(ConfidenceMetric):
    """`confidence_auroc`, streaming. *When to use:* to see whether confidence ranks right above wrong."""

    name = "auroc"
    function = staticmethod(exact.confidence_auroc)
    higher_is_better = True

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        return exact.auroc_of_sums(sums)


class RiskCoverage(ConfidenceMetric):
    """`risk_coverage_curve`, streaming, a point per cell: `compute` gives a `RiskCoverageCurve`; without interval."""

    name = "risk_coverage_curve"
    is_curve = True
    function = staticmethod(exact.risk_coverage_curve)

    def _result(self, sums: torch.Tensor) -> RiskCoverageCurve:
        return exact.risk_coverage_of_sums(sums.view(3, -1))
