"""A method is a name: the word on the command line, in training arguments and in `calibrator.json`."""

from __future__ import annotations

from typing import Any

from .base import Calibrator, IdentityCalibration
from .binary import BetaCalibration, PlattScaling, QuadraticScaling
from .compose import Chain, OneVsRest, PerLabel
from .ensemble import Ensemble
from .grouped import GroupTemperature
from .histogram import HistogramBinning, ScalingBinning
from .label_shift import PriorCorrection
from .mixing import EnsembleTemperature
from .monotone import CentredIsotonicCalibration, IsotonicCalibration
from .scaling import TemperatureScaling
from .structured import (
    BiasCorrectedTemperature,
    DirichletCalibration,
    MatrixScaling,
    StructuredMatrixScaling,
    StructuredVectorScaling,
    VectorScaling,
)
from .venn_abers import VennAbersCalibration


# Simplest first: the order in which selection breaks ties.
CALIBRATORS: dict[str, type[Calibrator]] = {
    "identity": IdentityCalibration,
    "temperature": TemperatureScaling,
    "ensemble_temperature": EnsembleTemperature,
    "group_temperature": GroupTemperature,
    "prior_correction": PriorCorrection,
    "platt": PlattScaling,
    "beta": BetaCalibration,
    "quadratic": QuadraticScaling,
    "bias_corrected_temperature": BiasCorrectedTemperature,
    "structured_vector": StructuredVectorScaling,
    "structured_matrix": StructuredMatrixScaling,
    "vector": VectorScaling,
    "matrix": MatrixScaling,
    "dirichlet": DirichletCalibration,
    "isotonic": IsotonicCalibration,
    "centred_isotonic": CentredIsotonicCalibration,
    "histogram": HistogramBinning,
    "scaling_binning": ScalingBinning,
    "venn_abers": VennAbersCalibration,
}

# Made of others, so their names are in files only.
COMPOSED: dict[str, type[Calibrator]] = {
    "chain": Chain,
    "ensemble": Ensemble,
    "one_vs_rest": OneVsRest,
    "per_label": PerLabel,
}


def make_calibrator(name: str, **settings: Any) -> Calibrator:
    """A fresh calibrator by its name; a ValueError lists the names when there is none."""
    if name not in CALIBRATORS:
        raise ValueError(f"calibrator: got {name!r}; allowed are {', '.join(CALIBRATORS)}")
    return CALIBRATORS[name](**settings)
