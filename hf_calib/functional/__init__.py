"""The mathematics: torch tensors in, torch tensors out; no state, no files, no models.

Every function takes probabilities (never logits) and labels, and everything after them by keyword. The one exception
is the losses, which are what a model is trained on and therefore take logits.
"""

from .batch_losses import mdca_loss, mmce_loss, soft_binned_ece_loss
from .calibration import (
    ReliabilityCurve,
    adaptive_calibration_error,
    classwise_calibration_error,
    debiased_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    overconfidence,
    reliability_curve,
    smooth_calibration_error,
    underconfidence,
)
from .losses import (
    brier_loss,
    confidence_penalty_loss,
    cross_entropy_loss,
    dual_focal_loss,
    focal_loss,
    label_smoothing_loss,
    margin_label_smoothing_loss,
    sample_dependent_focal_loss,
)
from .scoring import accuracy, brier_score, negative_log_likelihood
from .selective import (
    RiskCoverageCurve,
    accuracy_at_coverage,
    area_under_generalised_risk_coverage,
    area_under_risk_coverage,
    confidence_auroc,
    coverage_at_risk,
    risk_coverage_curve,
)
from .sequence import (
    entity_events,
    inference_events,
    sequence_events,
    span_events,
    token_events,
    weighted_calibration_error,
)
from .significance import CalibrationTest, kolmogorov_smirnov_test, kuiper_test, spiegelhalter_test


__all__ = [
    "CalibrationTest",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "accuracy",
    "accuracy_at_coverage",
    "adaptive_calibration_error",
    "area_under_generalised_risk_coverage",
    "area_under_risk_coverage",
    "brier_loss",
    "brier_score",
    "classwise_calibration_error",
    "confidence_auroc",
    "confidence_penalty_loss",
    "coverage_at_risk",
    "cross_entropy_loss",
    "debiased_calibration_error",
    "dual_focal_loss",
    "entity_events",
    "expected_calibration_error",
    "focal_loss",
    "inference_events",
    "kolmogorov_smirnov_test",
    "kuiper_test",
    "label_smoothing_loss",
    "margin_label_smoothing_loss",
    "maximum_calibration_error",
    "mdca_loss",
    "mmce_loss",
    "negative_log_likelihood",
    "overconfidence",
    "reliability_curve",
    "risk_coverage_curve",
    "sample_dependent_focal_loss",
    "sequence_events",
    "smooth_calibration_error",
    "soft_binned_ece_loss",
    "span_events",
    "spiegelhalter_test",
    "token_events",
    "underconfidence",
    "weighted_calibration_error",
]
