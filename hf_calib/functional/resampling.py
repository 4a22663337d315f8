"""The bootstrap: how much a number could have differed had the rows been drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


BLOCK_ELEMENTS = 2**21  # resample weights held at a time
FEW = 4096  # rows up to which groups are resampled row by row
MANY = 1000  # rows of a group from which a normal number stands for a Poisson one: its skewness is 0.03


class Estimate(NamedTuple):
    """A number, its 95 % bootstrap interval where it has one, and how many rows are behind it."""

    value: float
    low: float | None
    high: float | None
    num_rows: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            # a p-value can be tiny
            return f"{self.value:.4f}" if abs(self.value) >= 1e-4 or self.value == 0 else f"{self.value:.1e}"
        return f"{self.value:.4f} [{self.low:.3f}, {self.high:.3f}]"


class SumStatistic(NamedTuple):
    """A metric as a function of sums over rows, which is what lets thousands of resamples cost a few passes.

    Each row adds `values` to its `cells`; `finish` maps the sums to the metric.
    """

    cells: torch.Tensor  # (N, k) int64 in [0, size)
    values: torch.Tensor  # (N, k) float64
    size: int
    finish: Callable[[torch.Tensor], torch.Tensor]  # (..., size) -> (...)

    def __call__(self, counts: torch.Tensor) -> torch.Tensor:
        """The metric of rows that occur `counts` times: `(N, R)` floating gives `(R,)` float64."""
        if self.size == 1:
            return self.finish((self.values.sum(1) @ counts)[:, None])
        sums = torch.zeros(self.size, counts.shape[1], dtype=torch.float64)
        for cells, values in zip(self.cells.T, self.values.T, strict=True):
            sums.index_add_(0, cells, values[:, None] * counts)
        return self.finish(sums.T)


def mean_statistic(values: torch.Tensor) -> SumStatistic:
    """The mean of one value per row, `(N,)` float64, in resamples of as many rows."""
    cells = torch.zeros(len(values), 1, dtype=torch.int64)
    return SumStatistic(cells, values[:, None], 1, lambda sums: sums[..., 0] / len(values))


def resample_counts(
    num_rows: int, num_resamples: int, *, seed: int = 0, size: int | None = None
) -> Iterator[torch.Tensor]:
    """How often each row occurs in resamples of `num_rows` rows, drawn with replacement, in blocks of resamples.

    Statistics that are given the same blocks are paired.

    Args:
        num_rows (`int`): rows to draw from, and rows in each resample.
        num_resamples (`int`): resamples in all.
        seed (`int`): the same seed gives the same resamples; the global random state is not touched.
        size (`int`, *optional*): numbers that one resample takes, which bounds the blocks; by default `num_rows`.
    Yields:
        `torch.Tensor` of shape `(num_rows, block)`, float64: column sums are `num_rows`.
    """
    generator = torch.Generator().manual_seed(seed)
    block = max(1, BLOCK_ELEMENTS // (size or num_rows))
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn = torch.randint(num_rows, (size, num_rows), generator=generator)
        # int8 is what a cache holds most of; a row is never drawn 128 times: 1 in 128! for many rows
        counts = torch.zeros(size, num_rows, dtype=torch.int8)
        counts.scatter_add_(1, drawn, counts.new_ones(1).expand(size, num_rows))
        yield counts.T.to(torch.float64, memory_format=torch.contiguous_format)


def resample_groups(counts: torch.Tensor, num_resamples: int, *, seed: int = 0) -> torch.Tensor:
    """How often each group of equal rows occurs in resamples of all rows: what a streaming metric still knows of them.

    Few rows are drawn one by one. Of many, each group's count is an independent Poisson number, or of large groups a
    normal one: the sizes of the
    resamples then vary by `1 / sqrt(N)`, which drops out of every average (Chamandy et al. 2012, "Estimating
    uncertainty for massive data streams").

    Args:
        counts (`torch.Tensor` of shape `(G,)`, float64, whole): rows in each group.
        num_resamples (`int`): resamples in all.
        seed (`int`): as in `resample_counts`.
    Returns:
        `torch.Tensor` of shape `(num_resamples, G)`, float64.
    """
    num_rows = int(counts.sum())
    if num_rows > FEW:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(num_resamples, len(counts), generator=generator)
        drawn = drawn.double().mul_(counts.sqrt()).add_(counts).round_()
        few = (counts < MANY).nonzero()[:, 0]
        drawn[:, few] = torch.poisson(counts[few].float().expand(num_resamples, -1), generator=generator).double()
        return drawn
    group = torch.arange(len(counts)).repeat_interleave(counts.long())
    blocks = resample_counts(num_rows, num_resamples, seed=seed)
    sums = [
        torch.zeros(len(counts), block.shape[1], dtype=torch.float64).index_add_(0, group, block) for block in blocks
    ]
    return torch.cat(sums, dim=1).T


def bootstrap_interval(estimate: float, replicates: torch.Tensor, *, level: float = 0.95) -> tuple[float, float]:
    """The interval between percentiles of the replicates, moved so that their mean lies on the estimate.

    For a mean (NLL, Brier, accuracy) the move is nothing but noise and this is the percentile interval. A plug-in
    calibration error is biased upward and resampling adds the same bias again; without the move the interval of a
    well-calibrated model lies wholly above its own estimate. What remains is the bias of the estimate itself.
    Resamples on which the statistic is not defined (NaN, as AUROC where all rows are right) are left out.

    Args:
        estimate (`float`): the statistic on the rows themselves.
        replicates (`torch.Tensor` of shape `(num_resamples,)`, float64): the statistic on each resample.
        level (`float`): coverage in (0, 1).
    Returns:
        `(low, high)`.
    Source:
        Efron & Tibshirani 1993, chapters 10 and 13.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}; allowed are numbers between 0 and 1")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (torch.nanquantile(replicates, tails) - replicates.nanmean() + estimate).tolist()
    return low, high
