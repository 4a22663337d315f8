"""The bootstrap: resamples are what they say, sums over them are the metric, intervals cover."""

import math

import pytest
import torch

from hf_calib.functional import resampling
from hf_calib.functional.resampling import (
    SumStatistic,
    bootstrap_interval,
    mean_statistic,
    resample_counts,
    resample_groups,
)


def all_counts(*args, **options):
    return torch.cat(list(resample_counts(*args, **options)), dim=1)


@pytest.mark.parametrize(("num_rows", "num_resamples"), [(1, 3), (7, 1), (50, 40)])
def test_every_resample_has_as_many_rows_as_there_are(num_rows, num_resamples):
    counts = all_counts(num_rows, num_resamples)
    assert counts.shape == (num_rows, num_resamples)
    assert counts.dtype == torch.float64
    assert (counts >= 0).all()
    assert counts.sum(0).tolist() == [num_rows] * num_resamples


@pytest.mark.parametrize("block_elements", [1, 50, 60, 149, 10**6])
def test_blocks_joined_are_the_request(monkeypatch, block_elements):
    expected = all_counts(50, 7, seed=3)
    monkeypatch.setattr(resampling, "BLOCK_ELEMENTS", block_elements)
    blocks = list(resample_counts(50, 7, seed=3))
    assert all(block.shape[1] * 50 <= max(50, block_elements) for block in blocks)
    assert torch.equal(torch.cat(blocks, dim=1), expected)


def test_a_seed_decides_the_resamples():
    first, again, other = (all_counts(30, 5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(5)
    first, state = all_counts(30, 5), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(all_counts(30, 5), first)


def test_every_row_is_drawn_as_often_as_every_other():
    """A row's count is binomial(n, 1 / n): mean 1, variance 1 - 1 / n, and 0 with probability (1 - 1 / n)^n."""
    counts = all_counts(20, 20_000)
    assert counts.mean(1).tolist() == pytest.approx([1] * 20, abs=0.04)
    assert counts.var(1).tolist() == pytest.approx([0.95] * 20, abs=0.06)
    assert (counts == 0).double().mean().item() == pytest.approx(0.95**20, abs=0.01)


def test_a_mean_is_the_mean_of_the_repeated_rows():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = all_counts(40, 6)
    expected = [values.repeat_interleave(column.long()).mean() for column in counts.T]
    torch.testing.assert_close(mean_statistic(values)(counts), torch.stack(expected))
    assert mean_statistic(values)(torch.ones(40, 1, dtype=torch.float64)).item() == pytest.approx(values.mean().item())


@pytest.mark.parametrize("size", [1, 5])
def test_a_row_may_add_to_several_cells(size):
    """And to one cell several times."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(size, (30, 3), generator=generator)
    values = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    statistic = SumStatistic(cells, values, size, lambda sums: sums.abs().sum(-1))
    counts = all_counts(30, 4)
    expected = torch.zeros(size, 4, dtype=torch.float64)
    for row in range(30):
        for column in range(3):
            expected[cells[row, column]] += values[row, column] * counts[row]
    torch.testing.assert_close(statistic(counts), expected.abs().sum(0))


def test_the_interval_lies_between_percentiles_and_around_the_estimate():
    replicates = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert bootstrap_interval(0.5, replicates) == pytest.approx((0.025, 0.975))
    assert bootstrap_interval(0.5, replicates, level=0.5) == pytest.approx((0.25, 0.75))
    # replicates that lie half a unit above the estimate on average: their bias is taken out
    assert bootstrap_interval(0.0, replicates) == pytest.approx((-0.475, 0.475))
    assert bootstrap_interval(0.25, torch.full((10,), 0.3, dtype=torch.float64)) == pytest.approx((0.25, 0.25))


def test_resamples_without_a_value_are_left_out():
    replicates = torch.linspace(0, 1, 1001, dtype=torch.float64)
    with_gaps = torch.cat([replicates, replicates.new_full((10,), torch.nan)])
    assert bootstrap_interval(0.5, with_gaps) == pytest.approx((0.025, 0.975))
    assert all(math.isnan(end) for end in bootstrap_interval(0.5, with_gaps[-10:]))


@pytest.mark.parametrize("num_rows", [60, 60_000])
def test_groups_occur_as_often_as_their_rows(num_rows):
    """A group's count is binomial, or Poisson where rows are many; the groups make up the resample."""
    counts = torch.tensor([1, 0, 3, 6], dtype=torch.float64) * num_rows / 10
    drawn = resample_groups(counts, 4000, seed=1)
    assert drawn.shape == (4000, 4)
    assert (drawn[:, 1] == 0).all()
    assert drawn.mean(0).tolist() == pytest.approx(counts.tolist(), rel=0.01, abs=0)
    share = counts / num_rows
    variance = counts * (1 - share) if num_rows == 60 else counts
    assert drawn.var(0).tolist() == pytest.approx(variance.tolist(), rel=0.1)
    if num_rows == 60:
        assert drawn.sum(1).tolist() == [60.0] * 4000
    assert torch.equal(drawn, resample_groups(counts, 4000, seed=1))
    assert not torch.equal(drawn, resample_groups(counts, 4000, seed=2))


def test_the_interval_covers_a_known_mean():
    """In 92 to 98 of 100 trials: skewed values, 200 rows, 500 resamples."""
    num_trials, num_rows = 1000, 200
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(num_trials, num_rows, generator=generator, dtype=torch.float64).log().neg()  # exponential
    replicates = values @ all_counts(num_rows, 500) / num_rows
    intervals = [bootstrap_interval(float(row.mean()), draws) for row, draws in zip(values, replicates, strict=True)]
    covered = sum(low <= 1.0 <= high for low, high in intervals) / num_trials
    assert 0.92 <= covered <= 0.98
