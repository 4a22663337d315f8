"""Calibration for Hugging Face models: fit it in one command, keep it in the model repo, trust the scores.

Importing registers `CalibTransformer` with the Auto classes. Everything else is imported when it is first used.
"""

from importlib import import_module
from typing import Any

from .models import register as _register
from .version import __version__


_MODULES = {
    "attaching": ("attach_calibrator", "attached_calibrator", "detach_calibrator", "uncalibrated"),
    "calibrators": (
        "CALIBRATORS",
        "AutoCalibrator",
        "Calibrator",
        "IdentityCalibration",
        "IsotonicCalibration",
        "TemperatureScaling",
        "select_calibrator",
    ),
    "docstrings": ("docstring_dataset",),
    "evaluate_modules": ("evaluate_module",),
    "evaluation": ("CalibrationEvaluator",),
    "folding": ("apply_calibrator", "fold_calibrator", "unfold_calibrator"),
    "hub": ("load_calibrated", "push_calibrated", "save_calibrated"),
    "losses": ("LOSSES",),
    "metrics": ("METRICS",),
    "models": (
        "CalibTransformerConfig",
        "CalibTransformerDecoderModel",
        "CalibTransformerEncoderModel",
        "CalibTransformerForCausalLM",
        "CalibTransformerForConditionalGeneration",
        "CalibTransformerForQuestionAnswering",
        "CalibTransformerForSequenceClassification",
        "CalibTransformerForTokenClassification",
        "CalibTransformerModel",
    ),
    "predictions": ("Predictions", "average_predictions", "collect_predictions"),
    "report": ("CalibrationReport", "evaluate_calibration"),
    "training": ("CalibrationCallback", "CalibrationTrainer", "CalibrationTrainingArguments"),
}
_PACKAGES = ("functional", "metrics")
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_PACKAGES, *sorted(_MODULE_OF)]

_register()


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
