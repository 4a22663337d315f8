"""The bootstrap: how much a number could have differed had the rows been drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


BLOCK_ELEMENTS = 2**23  # resample weights held at a time


class SumStatistic(NamedTuple):
    """A metric as a function of sums over rows, which is what lets thousands of resamples cost a few passes.

    Each row adds `values` to its `cells`; `finish` maps the sums, divided by the number of rows, to the metric.
    """

    cells: torch.Tensor  # (N, k) int64 in [0, size)
    values: torch.Tensor  # (N, k) float64
    size: int
    finish: Callable[[torch.Tensor], torch.Tensor]  # (..., size) -> (...)

    def __call__(self, counts: torch.Tensor) -> torch.Tensor:
        """The metric of rows that occur `counts` times: `(N, R)` float64 gives `(R,)` float64."""
        if self.size == 1:
            return self.finish((self.values.sum(1) @ counts)[:, None] / len(counts))
        sums = counts.new_zeros(self.size, counts.shape[1])
        for cells, values in zip(self.cells.T, self.values.T, strict=True):
            sums.index_add_(0, cells, values[:, None] * counts)
        return self.finish(sums.T / len(counts))


def mean_statistic(values: torch.Tensor) -> SumStatistic:
    """The mean of one value per row, `(N,)` float64."""
    cells = torch.zeros(len(values), 1, dtype=torch.int64)
    return SumStatistic(cells, values[:, None], 1, lambda sums: sums[..., 0])


def resample_counts(num_rows: int, num_resamples: int, *, seed: int = 0) -> Iterator[torch.Tensor]:
    """How often each row occurs in resamples of `num_rows` rows, drawn with replacement, in blocks of resamples.

    Statistics that are given the same blocks are paired.

    Args:
        num_rows (`int`): rows to draw from, and rows in each resample.
        num_resamples (`int`): resamples in all.
        seed (`int`): the same seed gives the same resamples; the global random state is not touched.
    Yields:
        `torch.Tensor` of shape `(num_rows, block)`, float64: column sums are `num_rows`.
    """
    generator = torch.Generator().manual_seed(seed)
    block = max(1, BLOCK_ELEMENTS // num_rows)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn = torch.randint(num_rows, (size, num_rows), generator=generator)
        drawn += torch.arange(size)[:, None] * num_rows
        counts = torch.bincount(drawn.reshape(-1), minlength=size * num_rows)
        yield counts.view(size, num_rows).T.to(torch.float64, memory_format=torch.contiguous_format)


def bootstrap_interval(estimate: float, replicates: torch.Tensor, *, level: float = 0.95) -> tuple[float, float]:
    """The interval between percentiles of the replicates, moved so that their mean lies on the estimate.

    For a mean (NLL, Brier, accuracy) the move is nothing but noise and this is the percentile interval. A plug-in
    calibration error is biased upward and resampling adds the same bias again; without the move the interval of a
    well-calibrated model lies wholly above its own estimate. What remains is the bias of the estimate itself.

    Args:
        estimate (`float`): the statistic on the rows themselves.
        replicates (`torch.Tensor` of shape `(num_resamples,)`, float64): the statistic on each resample.
        level (`float`): coverage in (0, 1).
    Returns:
        `(low, high)`.
    Source:
        Efron & Tibshirani 1993, chapters 10 and 13.
    """
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (torch.quantile(replicates, tails) - replicates.mean() + estimate).tolist()
    return low, high
