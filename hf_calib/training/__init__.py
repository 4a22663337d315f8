"""Calibrated training on `transformers.Trainer`."""

from .arguments import CalibrationTrainingArguments
from .trainer import CalibrationTrainer


__all__ = ["CalibrationTrainer", "CalibrationTrainingArguments"]
