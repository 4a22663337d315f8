"""Calibrated training on `transformers.Trainer`."""

from .arguments import CalibrationTrainingArguments
from .callbacks import CalibrationCallback
from .trainer import CalibrationTrainer


__all__ = ["CalibrationCallback", "CalibrationTrainer", "CalibrationTrainingArguments"]
