"""Calibrated probabilities for what models that generate text are asked."""

from .decisions import calibrate_decisions, collect_decisions, save_decisions


__all__ = ["calibrate_decisions", "collect_decisions", "save_decisions"]
