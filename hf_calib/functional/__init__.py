"""The mathematics: torch tensors in, torch tensors out; no state, no files, no models.

Every function takes probabilities (never logits) and labels, and everything after them by keyword. The one exception
is the losses, which are what a model is trained on and therefore take logits.
"""

from .calibration import (
    ReliabilityCurve,
    adaptive_calibration_error,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_curve,
    smooth_calibration_error,
)
from .losses import brier_loss, cross_entropy_loss, focal_loss, label_smoothing_loss
from .scoring import accuracy, brier_score, negative_log_likelihood


__all__ = [
    "ReliabilityCurve",
    "accuracy",
    "adaptive_calibration_error",
    "brier_loss",
    "brier_score",
    "classwise_calibration_error",
    "cross_entropy_loss",
    "expected_calibration_error",
    "focal_loss",
    "label_smoothing_loss",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "reliability_curve",
    "smooth_calibration_error",
]
