"""Streaming means of one number per row: the proper scores, and accuracy."""

from __future__ import annotations

import math

import torch

from ..functional import scoring as exact
from .base import MeanMetric, Rows


class NegativeLogLikelihood(MeanMetric):
    """`negative_log_likelihood` of probabilities, streaming. *When to use:* to choose between calibrators."""

    name = "nll"
    function = staticmethod(exact.negative_log_likelihood)
    row_values = staticmethod(exact.row_surprise)
    bounds = (0.0, math.inf)


class BrierScore(MeanMetric):
    """`brier_score`, streaming. *When to use:* as NLL, where a single sure mistake must not decide."""

    name = "brier"
    function = staticmethod(exact.brier_score)
    row_values = staticmethod(exact.row_brier)
    bounds = (0.0, 2.0)


class Accuracy(MeanMetric):
    """`accuracy`, streaming. *When to use:* beside the others: calibration must not cost it."""

    name = "accuracy"
    function = staticmethod(exact.accuracy)
    higher_is_better = True

    def _values(self, rows: Rows) -> torch.Tensor:
        exact.check_has_accuracy(rows.probs, rows.task)
        return rows.top[1][:, 0].double()  # which the calibration errors of the same rows read too
