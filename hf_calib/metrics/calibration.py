"""Streaming calibration errors, all read off sums over cells of confidence."""

from __future__ import annotations

import torch

from ..functional import calibration as exact
from ..functional.binning import BINNINGS, bin_numbers, interior_edges
from ..functional.calibration import (
    DEBIASED_NORMS,
    NORMS,
    ReliabilityCurve,
    binned_error,
    curve_of_sums,
    debiased_error,
)
from ..functional.checks import check_choice, check_count
from ..functional.resampling import SumStatistic
from ..functional.sequence import weighted_bin_sums, weighted_calibration_error
from ..functional.smoothing import NUM_CELLS as NUM_GRID_CELLS
from ..functional.smoothing import grid_position, masses_of_cells, smooth_error
from .base import NUM_CELLS, EventMetric, Metric, Rows


class BinnedMetric(EventMetric):
    """A metric over bins of confidence.

    Equal to the function (1e-9) with bins of equal width. With `binning="mass"` the edges lie on the grid of 7,680
    cells: equal to the function where no cell holds two different confidences, and otherwise a row may be in the
    neighbouring bin. State: as in `EventMetric`; with `target="class"` and equal widths `(3, C, num_bins)`, 360 kB for
    1,000 classes and 15 bins.

    Args:
        num_bins, binning, target, task, ignore_index: as in `expected_calibration_error`.
    """

    def __init__(
        self,
        *,
        num_bins: int = 15,
        binning: str = "width",
        target: str = "top",
        task: str | None = None,
        ignore_index: int = -100,
    ):
        super().__init__(target=target, task=task, ignore_index=ignore_index)
        check_count("num_bins", num_bins)
        check_choice("binning", binning, BINNINGS)
        self.num_bins, self.binning = num_bins, binning
        divides = NUM_CELLS % num_bins == 0 and target == "top" and task is None
        self.num_cells = NUM_CELLS if divides or binning == "mass" else num_bins

    def _cells(self, scores: torch.Tensor) -> tuple[torch.Tensor, int]:
        if self.binning == "mass":
            return super()._cells(scores)
        return bin_numbers(scores, interior_edges(scores, self.num_bins, "width")), self.num_bins

    def _bins(self, sums: torch.Tensor) -> torch.Tensor:
        """`(3, ..., cells)` to `(3, ..., num_bins)`."""
        if self.binning == "width":
            return sums.unflatten(-1, (self.num_bins, -1)).sum(-1)
        # all rows of a cell go into the bin of its first, as equal confidences do in the function
        total = sums[0].sum(-1, keepdim=True)
        rank = sums[0].cumsum(-1) - sums[0] + 1
        bins = (rank * self.num_bins / total).ceil().sub(1).clamp(0, self.num_bins - 1).long()
        return sums.new_zeros(*sums.shape[:-1], self.num_bins).scatter_add_(-1, bins.expand_as(sums), sums)


class ExpectedCalibrationError(BinnedMetric):
    """`expected_calibration_error`, streaming.

    *When to use:* to say in one number, in units of probability, how far confidence is from accuracy.

    Args:
        norm, **options: as in `expected_calibration_error`.
    """

    name = "ece"
    function = staticmethod(exact.expected_calibration_error)

    def __init__(self, *, norm: str = "l1", **options):
        super().__init__(**options)
        check_choice("norm", norm, NORMS)
        self.norm = norm

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        return binned_error(self._bins(sums), self.norm)


class MaximumCalibrationError(ExpectedCalibrationError):
    """`maximum_calibration_error`, streaming. *When to use:* where the worst bin matters, and every bin is full."""

    name = "mce"
    function = staticmethod(exact.maximum_calibration_error)

    def __init__(self, **options):
        super().__init__(norm="max", **options)


class Overconfidence(ExpectedCalibrationError):
    """`overconfidence`, streaming. *When to use:* to see which sign the calibration error has."""

    name = "overconfidence"
    function = staticmethod(exact.overconfidence)

    def __init__(self, **options):
        super().__init__(norm="over", **options)


class Underconfidence(ExpectedCalibrationError):
    """`underconfidence`, streaming. *When to use:* to see which sign the calibration error has."""

    name = "underconfidence"
    function = staticmethod(exact.underconfidence)

    def __init__(self, **options):
        super().__init__(norm="under", **options)


class ClasswiseCalibrationError(ExpectedCalibrationError):
    """`classwise_calibration_error`, streaming. *When to use:* where every class's probability is used."""

    name = "classwise_ece"
    function = staticmethod(exact.classwise_calibration_error)

    def __init__(self, **options):
        super().__init__(target="class", **options)


class AdaptiveCalibrationError(ExpectedCalibrationError):
    """`adaptive_calibration_error`, streaming. State: 184 kB for each class.

    *When to use:* class-wise, where most probabilities crowd near 0.
    """

    name = "adaptive_ece"
    function = staticmethod(exact.adaptive_calibration_error)

    def __init__(self, **options):
        super().__init__(binning="mass", target="class", **options)


class DebiasedCalibrationError(BinnedMetric):
    """`debiased_calibration_error`, streaming. *When to use:* on few rows, where a plug-in error is mostly noise.

    Args:
        norm, **options: as in `debiased_calibration_error`.
    """

    name = "debiased_ece"
    function = staticmethod(exact.debiased_calibration_error)

    def __init__(self, *, norm: str = "l2", binning: str = "mass", **options):
        super().__init__(binning=binning, **options)
        check_choice("norm", norm, DEBIASED_NORMS)
        self.norm = norm

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        return debiased_error(self._bins(sums), self.norm)


class SmoothCalibrationError(EventMetric):
    """`smooth_calibration_error`, streaming. *When to use:* in place of ECE, without a choice of bins.

    Equal to the function where no cell holds two different confidences; otherwise confidences move by less than a
    cell, 1.3e-4, which moves values above 0.01 by less than 1 % and smaller ones by less than 1e-4.
    """

    name = "smooth_ece"
    function = staticmethod(exact.smooth_calibration_error)

    def statistic(self, rows: Rows) -> SumStatistic:
        """On the function's own grid, which is exact and smaller than the sketch."""
        scores, outcomes = (column.cpu() for column in rows.events(self.target))
        cells, upper = grid_position(scores)
        cells = cells + torch.arange(cells.shape[1]) * (NUM_GRID_CELLS + 1)
        residuals = outcomes.double() - scores.double()
        return SumStatistic(
            torch.cat([cells, cells + 1], dim=1),
            torch.cat([residuals * (1 - upper), residuals * upper], dim=1),
            scores.shape[1] * (NUM_GRID_CELLS + 1),
            lambda sums: smooth_error(sums.unflatten(-1, (scores.shape[1], -1)) / len(scores)).mean(-1),
        )

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        return smooth_error(masses_of_cells(sums))


class CalibrationCurve(BinnedMetric):
    """`reliability_curve`, streaming: what a reliability diagram draws. `compute` gives a `ReliabilityCurve`.

    Bins have equal width. It is no single number: it has no interval.
    """

    name = "calibration_curve"
    is_curve = True
    function = staticmethod(exact.reliability_curve)

    def __init__(self, *, num_bins: int = 15, task: str | None = None, ignore_index: int = -100):
        check_choice("task", task, (None,))
        super().__init__(num_bins=num_bins, ignore_index=ignore_index)

    def _result(self, sums: torch.Tensor) -> ReliabilityCurve:
        edges = torch.linspace(0, 1, self.num_bins + 1, dtype=torch.float64, device=sums.device)
        return curve_of_sums(self._bins(sums.view(3, -1)), edges)


class WeightedCalibrationError(Metric):
    """`weighted_calibration_error`, streaming. *When to use:* for the distributions that a decoder searches.

    State: weights, weighted confidence and weighted outcomes of each bin, `(3, num_bins)` float64.

    Args:
        num_bins, ignore_index: as in `weighted_calibration_error`.
    """

    name = "weighted_ece"
    function = staticmethod(weighted_calibration_error)

    def __init__(self, *, num_bins: int = 15, task: str | None = None, ignore_index: int = -100):
        check_choice("task", task, (None,))
        check_count("num_bins", num_bins)
        super().__init__(ignore_index=ignore_index)
        self.num_bins = num_bins

    def statistic(self, rows: Rows) -> SumStatistic:
        weights, labels = self._class_probs(rows).cpu(), rows.labels.cpu()[:, None]
        bins = bin_numbers(weights, interior_edges(weights, self.num_bins, "width"))
        weights, sums = weights.double(), torch.zeros(3, len(rows), self.num_bins, dtype=torch.float64)
        sums[0].scatter_add_(1, bins, weights)
        sums[1].scatter_add_(1, bins, weights.square())
        sums[2].scatter_add_(1, bins.gather(1, labels), weights.gather(1, labels))
        values = sums.movedim(0, 1).flatten(1)
        size = values.shape[1]
        return SumStatistic(torch.arange(size).expand(len(rows), -1), values, size, self._value)

    def _sums(self, rows: Rows) -> torch.Tensor:
        return weighted_bin_sums(self._class_probs(rows), rows.labels, self.num_bins)

    def _class_probs(self, rows: Rows) -> torch.Tensor:
        if rows.probs.dim() != 2:
            raise ValueError(f"probs: got shape {tuple(rows.probs.shape)}; allowed are (..., C) class probabilities")
        return rows.probs

    def _value(self, sums: torch.Tensor) -> torch.Tensor:
        return binned_error(sums.unflatten(-1, (3, -1)).movedim(-2, 0))
