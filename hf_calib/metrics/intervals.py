"""Bootstrap intervals of any metric from its rows: of one set of probabilities, and of the change between two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..functional.checks import check_count
from ..functional.resampling import Estimate, bootstrap_interval, resample_counts
from .base import Metric, Rows
from .registry import make_metrics


class Comparison(NamedTuple):
    """A metric before and after, and the change, which is after minus before on the same resamples."""

    before: Estimate
    after: Estimate
    change: Estimate


def bootstrap(
    metrics: Sequence[str] | Mapping[str, Metric],
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    task: str | None = None,
    ignore_index: int = -100,
) -> dict[str, Estimate]:
    """Metrics with their bootstrap intervals, all on the same resamples.

    Args:
        metrics (names in `METRICS`, or `dict` of `str` to [`Metric`], for options): what they have seen plays no part.
        probs, labels, task, ignore_index: as in `expected_calibration_error`.
        num_resamples (`int`), seed (`int`): as in `resample_counts`.
        level (`float`): coverage in (0, 1).
    Returns:
        `dict` of `str` to [`Estimate`]: `value`, `low`, `high`, `num_rows`. Values are those of the metrics' functions
        (1e-9); above 7,680 rows, neighbouring confidences count as equal where a metric ranks them or bins them by
        mass. An interval is about noise alone: a plug-in ECE is biased upward on few rows, and so is its interval;
        `"debiased_ece"` is what to ask there.
    Raises:
        ValueError: as the metrics' functions; a metric that is no single number.
    Source:
        `hf_calib.functional.resampling.bootstrap_interval`.
    Example:
        >>> import torch
        >>> found = bootstrap(["brier"], torch.tensor([0.9, 0.8, 0.4]), torch.tensor([1, 1, 0]), num_resamples=100)
        >>> found["brier"].num_rows, round(found["brier"].value, 3)
        (3, 0.07)
    """
    metrics = make_metrics(metrics, task=task, ignore_index=ignore_index)
    rows = Rows(probs, labels, task=task, ignore_index=ignore_index)
    values, replicates = _resampled(metrics, [rows], num_resamples, seed)
    return {
        name: metric.estimate(values[0][name], replicates[0][name], len(rows), level=level)
        for name, metric in metrics.items()
    }


def compare(
    metrics: Sequence[str] | Mapping[str, Metric],
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    before: torch.Tensor,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    task: str | None = None,
    ignore_index: int = -100,
) -> dict[str, Comparison]:
    """Two sets of probabilities of the same rows, by a paired bootstrap.

    Args:
        before (`torch.Tensor`): other probabilities, in the shape of `probs`.
        metrics, probs, labels, num_resamples, level, seed, task, ignore_index: as in `bootstrap`.
    Returns:
        `dict` of `str` to [`Comparison`]: a change is real where its interval does not contain 0.
    Raises:
        ValueError: as `bootstrap`; `before` has another shape than `probs`.
    """
    metrics = make_metrics(metrics, task=task, ignore_index=ignore_index)
    sides = [Rows(probs, labels, task=task, ignore_index=ignore_index)]
    if isinstance(before, torch.Tensor) and before.shape != probs.shape:
        raise ValueError(f"before: got shape {tuple(before.shape)}; allowed is that of probs, {tuple(probs.shape)}")
    sides.append(Rows(before, labels, task=task, ignore_index=ignore_index, name="before"))
    (later, earlier), (later_draws, earlier_draws) = _resampled(metrics, sides, num_resamples, seed)
    num_rows = len(sides[0])
    found = {}
    for name, metric in metrics.items():
        change = float(later[name] - earlier[name])
        interval = bootstrap_interval(change, later_draws[name] - earlier_draws[name], level=level)
        found[name] = Comparison(
            metric.estimate(earlier[name], earlier_draws[name], num_rows, level=level),
            metric.estimate(later[name], later_draws[name], num_rows, level=level),
            Estimate(change, *interval, num_rows),
        )
    return found


def _resampled(
    metrics: dict[str, Metric], sides: list[Rows], num_resamples: int, seed: int
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Each side's values, and their replicates on resamples that the sides share."""
    check_count("num_resamples", num_resamples)
    for metric in metrics.values():
        metric.check_number()
    statistics = [{name: metric.statistic(rows) for name, metric in metrics.items()} for rows in sides]

    def evaluate(counts: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [{name: statistic(counts) for name, statistic in side.items()} for side in statistics]

    num_rows = len(sides[0])
    values = evaluate(torch.ones(num_rows, 1, dtype=torch.float64))
    # a block holds the sums of its resamples too, of which some metrics have more than rows
    size = max([num_rows, *(statistic.size for side in statistics for statistic in side.values())])
    blocks = [evaluate(counts) for counts in resample_counts(num_rows, num_resamples, seed=seed, size=size)]
    replicates = [
        {name: torch.cat([block[index][name] for block in blocks]) for name in metrics} for index in range(len(sides))
    ]
    return values, replicates
