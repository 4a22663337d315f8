"""Calibrators: objects over tensors that turn logits into logits whose softmax can be trusted."""

from .base import Calibrator, IdentityCalibration
from .monotone import IsotonicCalibration
from .registry import CALIBRATORS, make_calibrator
from .scaling import TemperatureScaling
from .selection import SelectionRow, select_calibrator
from .storage import AutoCalibrator


__all__ = [
    "CALIBRATORS",
    "AutoCalibrator",
    "Calibrator",
    "IdentityCalibration",
    "IsotonicCalibration",
    "SelectionRow",
    "TemperatureScaling",
    "make_calibrator",
    "select_calibrator",
]
