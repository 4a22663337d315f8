"""A streaming metric is sums over rows, and what they mean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import torch

from ..distributed import sum_over_processes
from ..functional.binning import bin_sums, interior_edges, rank_cells
from ..functional.calibration import TARGETS, checked_events
from ..functional.checks import TASKS, check_choice, check_count, check_probs
from ..functional.resampling import Estimate, SumStatistic, bootstrap_interval, mean_statistic, resample_groups


NUM_CELLS = 7680  # a multiple of 10, 15, 20 and 30, so that the sketch knows these bins exactly
BLOCK_RESAMPLES = 32  # whose sums a cache holds
MERGED_CELLS = 4  # cells that a bootstrap of the sketch takes together: 1,920 still know these bins


class Rows:
    """Checked rows, and what several metrics read of them, computed once.

    Args:
        probs, labels, task, ignore_index: as in `expected_calibration_error`.
        name (`str`): what errors call the probabilities.
    Raises:
        ValueError: as `expected_calibration_error`.
    """

    def __init__(
        self,
        probs: torch.Tensor,
        labels: torch.Tensor,
        *,
        task: str | None = None,
        ignore_index: int = -100,
        name: str = "probs",
    ):
        self.probs, self.labels = check_probs(probs, labels, task=task, ignore_index=ignore_index, name=name)
        self.task = task
        self._sums: dict[tuple[str, int], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Events of the most probable class, `(N, 1)` scores and outcomes; those of every label when multi-label."""
        return checked_events(self.probs, self.labels, task=self.task)

    def events(self, target: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `(N, K)` and outcomes `(N, K)`, as `hf_calib.functional.calibration.events` gives them."""
        return self.top if target == "top" else checked_events(self.probs, self.labels, target=target, task=self.task)

    def bin_sums(self, target: str, num_bins: int) -> torch.Tensor:
        """Sums over equal bins: `(3, K, num_bins)` float64."""
        if (target, num_bins) not in self._sums:
            scores, outcomes = self.events(target)
            self._sums[target, num_bins] = bin_sums(scores, outcomes, interior_edges(scores, num_bins, "width"))
        return self._sums[target, num_bins]


class Metric:
    """Remembers sums over rows, as one float64 tensor that does not grow with the rows.

    Merging is adding, so rows may come in any order, in batches of any size, on any number of processes. A subclass
    says which sums (`_sums`), what they mean (`_value`), and what each row adds to them (`statistic`).

    Args:
        task (`None` or `"multilabel"`), ignore_index (`int`): as in `expected_calibration_error`.
    Attributes:
        num_rows (`int`): rows seen, ignored ones left out.
        sums (`torch.Tensor` or `None`): the state, float64, flat; `None` before the first row.
    Example:
        >>> import torch
        >>> from hf_calib.metrics import METRICS
        >>> metric = METRICS["ece"](num_bins=10)
        >>> metric.update(torch.tensor([[0.95, 0.05]]), torch.tensor([0])).num_rows
        1
        >>> other = METRICS["ece"](num_bins=10).update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
        >>> metric.merge(other).compute()
        tensor(0.4750, dtype=torch.float64)
    """

    name: ClassVar[str]  # the key in METRICS
    function: ClassVar[Callable]  # the same, exactly, of all rows at once
    higher_is_better: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = True  # of probabilities and labels, as several metrics can share them
    is_curve: ClassVar[bool] = False  # no number, so without interval
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)  # where an interval ends

    def __init__(self, *, task: str | None = None, ignore_index: int = -100):
        check_choice("task", task, TASKS)
        self.task, self.ignore_index = task, ignore_index
        self.num_rows = 0
        self.sums: torch.Tensor | None = None

    def update(self, probs: torch.Tensor, labels: torch.Tensor) -> Metric:
        """Adds rows; shapes and errors as in the function. Returns the metric itself."""
        rows = Rows(probs, labels, task=self.task, ignore_index=self.ignore_index)
        return self.add(self.sums_of(rows), len(rows))

    def sums_of(self, rows: Rows) -> torch.Tensor:
        """What checked rows add to the state, `(size,)` float64, which stays as it is."""
        sums = self._sums(rows).reshape(-1)
        if self.sums is not None and len(self.sums) != len(sums):
            raise ValueError(
                f"probs: got other classes than in earlier rows, {len(sums)} sums; allowed are {len(self.sums)}"
            )
        return sums

    def add(self, sums: torch.Tensor, num_rows: int) -> Metric:
        """Adds sums over rows to the state. Returns the metric itself."""
        self.sums = sums.clone() if self.sums is None else self.sums + sums.to(self.sums.device)
        self.num_rows += num_rows
        return self

    def compute(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The metric of all rows so far: `()`, float64; or the named tuple that the function returns."""
        self._check_rows()
        return self._result(self.sums)

    def interval(self, *, num_resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Estimate:
        """The value with its bootstrap interval, from the sums alone: rows need not be kept.

        Raises:
            ValueError: no row was seen, or this metric's sums do not say how rows differ; `bootstrap` takes rows.
        """
        check_count("num_resamples", num_resamples)
        self._check_rows()
        self.check_number()
        replicates = self._replicates(self.sums.cpu(), num_resamples, seed)
        return self.estimate(self._value(self.sums), replicates, self.num_rows, level=level)

    def estimate(
        self, value: torch.Tensor, replicates: torch.Tensor, num_rows: int, *, level: float = 0.95
    ) -> Estimate:
        """A value and its interval, which ends where the metric does."""
        low, high = bootstrap_interval(float(value), replicates, level=level)
        return Estimate(float(value), max(low, self.bounds[0]), min(high, self.bounds[1]), num_rows)

    def merge(self, *others: Metric) -> Metric:
        """Adds what others have seen, which must be the same metric with the same options. Returns the metric."""
        self.check_equal(*others)
        for other in others:
            if other.sums is not None:
                self.add(other.sums, other.num_rows)
        return self

    def reset(self) -> Metric:
        """Forgets all rows. Returns the metric itself."""
        self.num_rows, self.sums = 0, None
        return self

    def all_reduce(self) -> Metric:
        """A metric with the rows of all processes of `torch.distributed`; without any, a copy. All must call it."""
        total = copy.copy(self)
        total.num_rows, total.sums = sum_over_processes(self.num_rows, self.sums)
        return total

    def statistic(self, rows: Rows) -> SumStatistic:
        """The metric of these rows as a function of how often each occurs, for the bootstrap."""
        raise NotImplementedError

    def check_equal(self, *others: Metric) -> None:
        """Raises a ValueError unless all are the same metric with the same options, of the same classes."""
        size = None if self.sums is None else len(self.sums)
        for other in others:
            if not isinstance(other, Metric) or other.options() != self.options():
                raise ValueError(f"others: got {other!r}; allowed are equal metrics, {self!r}")
            if other.sums is not None:
                size = size or len(other.sums)
                if len(other.sums) != size:
                    raise ValueError(f"others: got one of other classes, {len(other.sums)} sums; allowed are {size}")

    def check_number(self) -> None:
        """Raises a ValueError unless the metric is a number, as intervals are of numbers."""
        if self.is_curve:
            raise ValueError(f"metrics: {self.name} is a curve and no number; it has no interval")

    def options(self) -> dict:
        """What makes two metrics addable: the class and everything that it was given."""
        return {"name": self.name, **{key: value for key, value in vars(self).items() if key not in STATE}}

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options().items() if key != "name")
        return f"{type(self).__name__}({options})"

    def _check_rows(self) -> None:
        if self.num_rows == 0:
            raise ValueError(f"{self.name}: no row was seen; call update(probs, labels) first")

    def _sums(self, rows: Rows) -> torch.Tensor:
        raise NotImplementedError

    def _value(self, sums: torch.Tensor) -> torch.Tensor:
        """The number that `(..., size)` sums mean: `(...)`."""
        raise NotImplementedError

    def _result(self, sums: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What `compute` returns, where that is more than a number."""
        return self._value(sums)

    def _replicates(self, sums: torch.Tensor, num_resamples: int, seed: int) -> torch.Tensor:
        """The value of resamples, `(num_resamples,)`, from the sums alone."""
        raise ValueError(f"{self.name}: its sums cannot be resampled; bootstrap([{self.name!r}], probs, labels) can")


STATE = ("num_rows", "sums")  # every other attribute is an option


class MeanMetric(Metric):
    """The mean of one number per row. State: the sums of 1, of the number and of its square."""

    row_values: ClassVar[Callable]  # (probs, labels, task) as `check_probs` returns them -> (N,) float64

    def statistic(self, rows: Rows) -> SumStatistic:
        return mean_statistic(self._values(rows).cpu())

    def _values(self, rows: Rows) -> torch.Tensor:
        return type(self).row_values(rows.probs, rows.labels, rows.task)

    def _sums(self, rows: Rows) -> torch.Tensor:
        values = self._values(rows)
        return torch.stack([torch.ones_like(values).sum(), values.sum(), values.square().sum()])

    def _value(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[..., 1] / sums[..., 0]

    def _replicates(self, sums: torch.Tensor, num_resamples: int, seed: int) -> torch.Tensor:
        """Means of resamples are normal, and their variance is that of the rows divided by their number."""
        count, total, squares = sums
        deviation = (squares / count - (total / count).square()).clamp_min(0).div(count).sqrt()
        noise = torch.randn(num_resamples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return total / count + deviation * noise


class EventMetric(Metric):
    """What is said to happen with probability p, against how often it happens.

    State: count, sum of probabilities and sum of outcomes of each cell of an equal grid, `(3, K, cells)` float64. `K`
    is 1 for top labels and single events, and the number of classes or labels otherwise. For top labels and single
    events there are 7,680 cells (184 kB), whatever `num_bins`, unless it does not divide them.

    Args:
        target (`"top"` or `"class"`), task, ignore_index: as in `expected_calibration_error`.
    """

    num_cells: int = NUM_CELLS

    def __init__(self, *, target: str = "top", task: str | None = None, ignore_index: int = -100):
        super().__init__(task=task, ignore_index=ignore_index)
        check_choice("target", target, TARGETS)
        self.target = target

    def statistic(self, rows: Rows) -> SumStatistic:
        """On cells of equal counts, which are exact up to 7,680 rows and fine where the rows are."""
        scores, outcomes = (column.cpu() for column in rows.events(self.target))
        cells, num_cells = self._cells(scores)
        num_columns = scores.shape[1]
        cells = cells + torch.arange(num_columns) * num_cells
        values = torch.cat([torch.ones_like(scores, dtype=torch.float64), scores.double(), outcomes.double()], dim=1)
        size = num_columns * num_cells
        return SumStatistic(
            torch.cat([cells, cells + size, cells + 2 * size], dim=1),
            values,
            3 * size,
            lambda sums: self._mean(sums.unflatten(-1, (3, num_columns, num_cells))),
        )

    def _cells(self, scores: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The cell of each of `(N, K)` scores, and how many there are: enough for this metric alone."""
        num_cells = min(len(scores), NUM_CELLS)
        return rank_cells(scores, num_cells), num_cells

    def _sums(self, rows: Rows) -> torch.Tensor:
        return rows.bin_sums(self.target, self.num_cells)

    def _value(self, sums: torch.Tensor) -> torch.Tensor:
        return self._mean(sums.unflatten(-1, (3, -1, self.num_cells)))

    def _mean(self, sums: torch.Tensor) -> torch.Tensor:
        """The mean over columns of what `(..., 3, K, cells)` sums mean."""
        return self._finish(sums.movedim(-3, 0)).mean(-1)

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        """What `(3, ..., cells)` sums mean: `(...)`."""
        raise NotImplementedError

    def _replicates(self, sums: torch.Tensor, num_resamples: int, seed: int) -> torch.Tensor:
        """Rows of one cell and one outcome are taken to be equal: they are, to a thousandth in confidence."""
        sums = sums.view(3, -1, self.num_cells)
        if sums.shape[1] > 1:
            return super()._replicates(sums, num_resamples, seed)
        if self.num_cells == NUM_CELLS:
            sums = sums.unflatten(-1, (-1, MERGED_CELLS)).sum(-1)
        counts, confidence, happened = sums[:, 0]
        drawn = resample_groups(torch.cat([happened, counts - happened]), num_resamples, seed=seed)
        confidence = confidence / counts.clamp_min(1)
        blocks = []
        for right, wrong in (block.chunk(2, dim=-1) for block in drawn.split(BLOCK_RESAMPLES)):
            drawn_counts = right + wrong
            blocks.append(self._finish(torch.stack([drawn_counts, drawn_counts * confidence, right])))
        return torch.cat(blocks)
