"""Streaming tests of calibration: `compute` gives a statistic and its p-value, `interval` is that of the statistic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch

from ..functional import significance as exact
from ..functional.checks import check_choice
from ..functional.resampling import SumStatistic
from ..functional.significance import CalibrationTest
from .base import Metric, Rows
from .selective import ConfidenceMetric


class CumulativeTest(ConfidenceMetric):
    """A test of the cumulative differences between outcomes and confidence."""

    test_of_sums: ClassVar[Callable[[torch.Tensor], CalibrationTest]]

    def _result(self, sums: torch.Tensor) -> CalibrationTest:
        return type(self).test_of_sums(sums.view(3, -1))

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        return type(self).test_of_sums(sums).statistic


class KolmogorovSmirnov(CumulativeTest):
    """`kolmogorov_smirnov_test`, streaming. *When to use:* to ask whether miscalibration is more than chance.

    Differences inside a cell are not seen: the statistic is at most half the share of the largest cell too small.
    """

    name = "ks"
    function = staticmethod(exact.kolmogorov_smirnov_test)
    test_of_sums = staticmethod(exact.kolmogorov_smirnov_of_sums)


class Kuiper(CumulativeTest):
    """`kuiper_test`, streaming. *When to use:* as KS, where a model is too sure here and too modest there.

    Differences inside a cell are not seen: the statistic is at most the share of the largest cell too small.
    """

    name = "kuiper"
    function = staticmethod(exact.kuiper_test)
    test_of_sums = staticmethod(exact.kuiper_of_sums)


class Spiegelhalter(Metric):
    """`spiegelhalter_test`, streaming and exact. State: two sums. *When to use:* as KS; it tests the Brier score."""

    name = "spiegelhalter"
    function = staticmethod(exact.spiegelhalter_test)
    bounds = (-math.inf, math.inf)

    def __init__(self, *, task: str | None = None, ignore_index: int = -100):
        check_choice("task", task, (None,))
        super().__init__(ignore_index=ignore_index)

    def _result(self, sums: torch.Tensor) -> CalibrationTest:
        return exact.spiegelhalter_of_sums(sums)

    def statistic(self, rows: Rows) -> SumStatistic:
        return SumStatistic(torch.arange(2).expand(len(rows), -1), self._terms(rows).T.cpu(), 2, self._value)

    def _sums(self, rows: Rows) -> torch.Tensor:
        return self._terms(rows).sum(-1)

    def _terms(self, rows: Rows) -> torch.Tensor:
        scores, outcomes = rows.top
        return exact.spiegelhalter_terms(scores[:, 0], outcomes[:, 0])

    def _value(self, sums: torch.Tensor) -> torch.Tensor:
        return exact.spiegelhalter_of_sums(sums.movedim(-1, 0)).statistic
