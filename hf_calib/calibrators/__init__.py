"""Calibrators: objects over tensors that turn logits into logits whose softmax can be trusted."""

from .base import Calibrator, IdentityCalibration
from .binary import BetaCalibration, PlattScaling, QuadraticScaling
from .compose import Chain, OneVsRest, PerLabel
from .ensemble import Ensemble
from .grouped import GroupTemperature
from .histogram import HistogramBinning, ScalingBinning
from .label_shift import PriorCorrection
from .loading import AutoCalibrator
from .mixing import EnsembleTemperature
from .monotone import CentredIsotonicCalibration, IsotonicCalibration
from .registry import CALIBRATORS, make_calibrator
from .scaling import TemperatureScaling
from .selection import SelectionRow, select_calibrator
from .structured import (
    BiasCorrectedTemperature,
    DirichletCalibration,
    MatrixScaling,
    StructuredMatrixScaling,
    StructuredVectorScaling,
    VectorScaling,
)
from .venn_abers import VennAbersCalibration


__all__ = [
    "CALIBRATORS",
    "AutoCalibrator",
    "BetaCalibration",
    "BiasCorrectedTemperature",
    "Calibrator",
    "CentredIsotonicCalibration",
    "Chain",
    "DirichletCalibration",
    "Ensemble",
    "EnsembleTemperature",
    "GroupTemperature",
    "HistogramBinning",
    "IdentityCalibration",
    "IsotonicCalibration",
    "MatrixScaling",
    "OneVsRest",
    "PerLabel",
    "PlattScaling",
    "PriorCorrection",
    "QuadraticScaling",
    "ScalingBinning",
    "SelectionRow",
    "StructuredMatrixScaling",
    "StructuredVectorScaling",
    "TemperatureScaling",
    "VectorScaling",
    "VennAbersCalibration",
    "make_calibrator",
    "select_calibrator",
]
