"""A metric is a name: the word in Python, on the command line, in `evaluate` and in reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .base import Metric
from .calibration import (
    AdaptiveCalibrationError,
    CalibrationCurve,
    ClasswiseCalibrationError,
    DebiasedCalibrationError,
    ExpectedCalibrationError,
    MaximumCalibrationError,
    Overconfidence,
    SmoothCalibrationError,
    Underconfidence,
    WeightedCalibrationError,
)
from .scoring import Accuracy, BrierScore, NegativeLogLikelihood
from .selective import (
    AccuracyAtCoverage,
    AreaUnderGeneralisedRiskCoverage,
    AreaUnderRiskCoverage,
    ConfidenceAUROC,
    CoverageAtRisk,
    RiskCoverage,
)
from .significance import KolmogorovSmirnov, Kuiper, Spiegelhalter


METRICS: dict[str, type[Metric]] = {
    "accuracy": Accuracy,
    "nll": NegativeLogLikelihood,
    "brier": BrierScore,
    "ece": ExpectedCalibrationError,
    "smooth_ece": SmoothCalibrationError,
    "debiased_ece": DebiasedCalibrationError,
    "classwise_ece": ClasswiseCalibrationError,
    "adaptive_ece": AdaptiveCalibrationError,
    "mce": MaximumCalibrationError,
    "overconfidence": Overconfidence,
    "underconfidence": Underconfidence,
    "weighted_ece": WeightedCalibrationError,
    "ks": KolmogorovSmirnov,
    "kuiper": Kuiper,
    "spiegelhalter": Spiegelhalter,
    "aurc": AreaUnderRiskCoverage,
    "augrc": AreaUnderGeneralisedRiskCoverage,
    "auroc": ConfidenceAUROC,
    "accuracy_at_coverage": AccuracyAtCoverage,
    "coverage_at_risk": CoverageAtRisk,
    "calibration_curve": CalibrationCurve,
    "risk_coverage_curve": RiskCoverage,
}


def make_metrics(
    metrics: Sequence[str] | Mapping[str, Metric], *, task: str | None = None, ignore_index: int = -100
) -> dict[str, Metric]:
    """Fresh metrics by their names, or the mapping itself; a ValueError lists the names when there is none."""
    if isinstance(metrics, Mapping):
        for name, metric in metrics.items():
            _check_metric(name, metric, task, ignore_index)
        return dict(metrics)
    if isinstance(metrics, str):
        metrics = [metrics]
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics: got {name!r}; allowed are {', '.join(METRICS)}")
    return {name: METRICS[name](task=task, ignore_index=ignore_index) for name in metrics}


def make_metric(metric: str | Metric, *, task: str | None = None, ignore_index: int = -100) -> Metric:
    """A fresh metric by its name, or the metric itself."""
    if isinstance(metric, Metric):
        return metric
    return make_metrics([metric], task=task, ignore_index=ignore_index)[metric]


def _check_metric(name: str, metric: Metric, task: str | None, ignore_index: int) -> None:
    if not isinstance(metric, Metric):
        raise ValueError(f"metrics: {name!r} is {metric!r}; allowed are metrics, such as METRICS['ece'](num_bins=10)")
    if not metric.reads_rows:
        raise ValueError(
            f"metrics: {name!r} reads structured outputs by itself; allowed are metrics of probabilities and labels, "
            "which its events can be given to"
        )
    if (metric.task, metric.ignore_index) != (task, ignore_index):
        raise ValueError(
            f"metrics: {name!r} has task={metric.task!r} and ignore_index={metric.ignore_index}; allowed are those of "
            f"the call, {task!r} and {ignore_index}"
        )
