"""Tests of calibration: values by hand, random walks that are counted exactly, and p-values that are uniform."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_calib.functional import brier_score, significance
from hf_calib.functional.binning import bin_sums, interior_edges
from hf_calib.functional.selective import confidence_groups
from hf_calib.functional.significance import (
    brownian_range_tail,
    brownian_supremum_tail,
    kolmogorov_smirnov_of_sums,
    kolmogorov_smirnov_test,
    kuiper_of_sums,
    kuiper_test,
    spiegelhalter_of_sums,
    spiegelhalter_terms,
    spiegelhalter_test,
)

from .every import every_dtype


TESTS = {"ks": kolmogorov_smirnov_test, "kuiper": kuiper_test, "spiegelhalter": spiegelhalter_test}
TAILS = {"supremum": brownian_supremum_tail, "range": brownian_range_tail}
every_test = pytest.mark.parametrize("test", TESTS.values(), ids=TESTS)
every_tail = pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)


def simulated(num_sets=2000, num_rows=1000, *, distort=lambda scores: scores):
    """Sets of rows with one confidence each, ascending, and events that happen with its distorted value."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(num_sets, num_rows, generator=generator, dtype=torch.float64).sort(-1).values
    return scores, torch.rand(num_sets, num_rows, generator=generator, dtype=torch.float64) < distort(scores)


def p_values(scores, outcomes):
    sums = torch.stack([torch.ones_like(scores), scores, outcomes.double()])
    return {
        "ks": kolmogorov_smirnov_of_sums(sums).p_value,
        "kuiper": kuiper_of_sums(sums).p_value,
        "spiegelhalter": spiegelhalter_of_sums(spiegelhalter_terms(scores, outcomes).sum(-1)).p_value,
    }


# statistics


def test_cumulative_statistics_by_hand():
    """Sums of outcome minus confidence over 0.2, 0.2 (one event), 0.5 (none), 0.9 (event): 0.6, 0.1, 0.2."""
    scores, labels = torch.tensor([0.9, 0.2, 0.5, 0.2], dtype=torch.float64), torch.tensor([1, 0, 0, 1])
    sigma = math.sqrt(2 * 0.16 + 0.25 + 0.09) / 4
    ks, kuiper = kolmogorov_smirnov_test(scores, labels), kuiper_test(scores, labels)
    assert ks.statistic.item() == pytest.approx(0.15, abs=1e-15)
    assert kuiper.statistic.item() == pytest.approx(0.15, abs=1e-15)
    ratio = torch.tensor(0.15 / sigma, dtype=torch.float64)
    torch.testing.assert_close(ks.p_value, brownian_supremum_tail(ratio))
    torch.testing.assert_close(kuiper.p_value, brownian_range_tail(ratio))
    flipped = kuiper_test(1 - scores, 1 - labels)  # runs through the same rows from the other end
    assert flipped.statistic.item() == pytest.approx(0.15, abs=1e-15)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.35, 0.5, 0.8, 1.0]), st.booleans()), min_size=1))
def test_statistics_are_those_of_a_naive_program(rows):
    total, walk, variance, numerator, lever = 0.0, [0.0], 0.0, 0.0, 0.0
    for value in sorted({score for score, _ in rows}):
        total += sum(happened - value for score, happened in rows if score == value)
        walk.append(total / len(rows))
    for score, happened in rows:
        variance += score * (1 - score) / len(rows) ** 2
        numerator += (happened - score) * (1 - 2 * score)
        lever += (1 - 2 * score) ** 2 * score * (1 - score)
    scores, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    scores = scores.double()
    ks, kuiper = kolmogorov_smirnov_test(scores, labels), kuiper_test(scores, labels)
    assert ks.statistic.item() == pytest.approx(max(map(abs, walk)), abs=1e-6)
    assert kuiper.statistic.item() == pytest.approx(max(walk) - min(walk), abs=1e-6)
    _, sigma = significance.cumulative_differences(confidence_groups(scores, labels))
    assert sigma.item() == pytest.approx(math.sqrt(variance), abs=1e-6)
    if lever > 0:
        z = numerator / math.sqrt(lever)
        test = spiegelhalter_test(scores, labels)
        assert test.statistic.item() == pytest.approx(z, abs=1e-5)
        assert test.p_value.item() == pytest.approx(2 * stats.norm.sf(abs(z)), abs=1e-5)


def test_kuiper_sees_gaps_that_cancel():
    """Too timid below and too sure above, in equal measure: half of the range is above 0."""
    scores = torch.tensor([0.25] * 8 + [0.5] * 8 + [0.75] * 8, dtype=torch.float64)
    labels = torch.tensor([1] * 4 + [0] * 4 + [1] * 0 + [0] * 8 + [1] * 8)
    assert kolmogorov_smirnov_test(scores, labels).statistic.item() == pytest.approx(2 / 24)
    assert kuiper_test(scores, labels).statistic.item() == pytest.approx(4 / 24)


def test_spiegelhalter_is_the_brier_score_less_its_expectation():
    scores, outcomes = (column[0] for column in simulated(1, 300))
    numerator, variance = spiegelhalter_terms(scores, outcomes).sum(-1)
    expected = brier_score(scores, outcomes) - (scores * (1 - scores)).mean()
    torch.testing.assert_close(numerator / 300, expected)
    test = spiegelhalter_test(scores, outcomes)
    torch.testing.assert_close(test.statistic, numerator / variance.sqrt())


@pytest.mark.parametrize(("power", "sign"), [(2.0, 1), (0.5, -1)])
def test_spiegelhalter_is_positive_for_probabilities_that_are_too_extreme(power, sign):
    odds = lambda p: (p / (1 - p)) ** (1 / power)  # noqa: E731
    scores, outcomes = simulated(1, 20_000, distort=lambda p: odds(p) / (1 + odds(p)))
    test = spiegelhalter_test(scores[0], outcomes[0])
    assert sign * test.statistic > 5
    assert test.p_value < 1e-6


# without variance


@every_test
@pytest.mark.parametrize("scores", [[0.0, 1.0, 1.0], [1.0], [0.0]])
def test_certainty_that_is_right_is_no_evidence(test, scores):
    scores = torch.tensor(scores)
    found = test(scores, scores.long())
    assert [value.item() for value in found] == [0, 1]
    assert math.copysign(1, found.statistic) == 1


@every_test
def test_certainty_that_is_wrong_refutes(test):
    found = test(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1, 1, 1]))
    assert found.p_value == 0
    assert found.statistic.item() == (math.inf if test is spiegelhalter_test else pytest.approx(1 / 3))


def test_one_half_tells_spiegelhalter_nothing():
    found = spiegelhalter_test(torch.full((50,), 0.5), torch.ones(50, dtype=torch.long))
    assert [value.item() for value in found] == [0, 1]
    assert kuiper_test(torch.full((50,), 0.5), torch.ones(50, dtype=torch.long)).p_value < 1e-6


# the laws of Brownian motion


@every_tail
def test_both_series_agree_where_they_overlap(monkeypatch, tail):
    x = torch.linspace(1, 2.5, 200, dtype=torch.float64)
    values = []
    for switch in (0, math.inf):
        monkeypatch.setattr(significance, "SWITCH", switch)
        values.append(tail(x))
    torch.testing.assert_close(*values, atol=1e-14, rtol=0)


@every_tail
def test_a_tail_falls_from_1_to_0(tail):
    x = torch.cat([torch.linspace(0, 8, 4001, dtype=torch.float64), torch.tensor([40.0, math.inf])])
    values = tail(x)
    assert values[0] == values[1] == 1
    assert (values.diff() <= 0).all()
    assert values[-1] == values[-2] == 0
    assert (values >= 0).all()


def walks_within(num_sites, num_steps):
    """Shares of the simple random walks from each site (rows) to each (columns) that never leave the sites."""
    step = (np.eye(num_sites, k=1) + np.eye(num_sites, k=-1)) / 2
    return np.linalg.matrix_power(step, num_steps)


@pytest.mark.parametrize("wall", [30, 60, 90, 120, 160])
def test_the_supremum_is_that_of_a_long_random_walk(wall):
    num_steps = 4096
    inside = walks_within(2 * wall - 1, num_steps)[wall - 1].sum()
    found = brownian_supremum_tail(torch.tensor(wall / math.sqrt(num_steps), dtype=torch.float64))
    assert found.item() == pytest.approx(1 - inside, abs=2e-4)


@pytest.mark.parametrize("num_sites", [60, 90, 120, 160, 220])
def test_the_range_is_that_of_a_long_random_walk(num_sites):
    """A walk of range r fits into n sites in n - r ways, so the walks that fit at all are a difference of two sums."""
    num_steps = 4096
    inside = walks_within(num_sites, num_steps).sum() - walks_within(num_sites - 1, num_steps).sum()
    # the walls around n sites are n + 1 steps apart, so this is the slope between widths n and n + 1
    found = brownian_range_tail(torch.tensor((num_sites + 0.5) / math.sqrt(num_steps), dtype=torch.float64))
    assert found.item() == pytest.approx(1 - inside, abs=2e-4)


# p-values


@pytest.mark.parametrize("name", TESTS)
def test_p_values_of_calibrated_rows_are_uniform(name):
    """A walk of 1,000 steps stays a little inside the Brownian motion, so p-values lean to the large side."""
    p_value = p_values(*simulated())[name]
    assert stats.kstest(p_value.numpy(), "uniform").statistic < 0.06
    assert (p_value < 0.05).double().mean() < 0.06


@pytest.mark.parametrize("name", TESTS)
def test_p_values_of_miscalibrated_rows_are_small(name):
    assert p_values(*simulated(50, distort=lambda p: 0.4 + p / 5))[name].max() < 1e-3


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("surprises", [5, 20])
def test_p_values_hold_for_confident_models_that_expect_five_errors(name, surprises):
    scores, _ = simulated()
    scores = (1 - 2 * surprises / 1000 * scores).flip(-1)
    outcomes = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) < scores
    assert (p_values(scores, outcomes)[name] < 0.01).double().mean() < 0.016


def test_spiegelhalter_is_blind_where_the_two_sides_cancel():
    """Events of probability p ** 2: what is too timid below 1/2 is too extreme above."""
    found = p_values(*simulated(200, distort=torch.square))
    assert (found["spiegelhalter"] < 0.05).double().mean() < 0.1
    assert found["ks"].max() < 1e-3


# sums


@every_test
def test_one_set_of_rows_is_one_of_a_batch(test):
    scores, outcomes = simulated(6, 100)
    sums = torch.stack([torch.ones_like(scores), scores, outcomes.double()])
    of_sums = {
        kolmogorov_smirnov_test: lambda: kolmogorov_smirnov_of_sums(sums.view(3, 2, 3, 100)),
        kuiper_test: lambda: kuiper_of_sums(sums.view(3, 2, 3, 100)),
        spiegelhalter_test: lambda: spiegelhalter_of_sums(spiegelhalter_terms(scores, outcomes).sum(-1).view(2, 2, 3)),
    }
    batch = of_sums[test]()
    for row, (statistic, p_value) in enumerate(zip(batch.statistic.view(-1), batch.p_value.view(-1), strict=True)):
        order = torch.randperm(100, generator=torch.Generator().manual_seed(row))
        alone = test(scores[row, order], outcomes[row, order])
        torch.testing.assert_close(statistic, alone.statistic, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(p_value, alone.p_value, atol=1e-12, rtol=1e-12)
    assert batch.statistic.shape == batch.p_value.shape == (2, 3)


@pytest.mark.parametrize("num_cells", [4, 50, 7680])
def test_cells_change_statistic_and_deviation_within_the_stated_bounds(num_cells):
    scores, outcomes = (column[0][:, None] for column in simulated(1, 3000, distort=torch.sqrt))
    exact = confidence_groups(scores[:, 0], outcomes[:, 0])
    cells = bin_sums(scores, outcomes, interior_edges(scores, num_cells, "width"))[:, 0]
    assert (cells[0] == 0).any() or num_cells < 7680
    share = cells[0].max().item() / 3000
    for of_sums, slack in ((kolmogorov_smirnov_of_sums, share / 2), (kuiper_of_sums, share)):
        assert -1e-12 <= of_sums(exact).statistic - of_sums(cells).statistic <= slack
    variances = [significance.cumulative_differences(sums)[1].square().item() * 3000 for sums in (exact, cells)]
    assert -1e-12 <= variances[1] - variances[0] <= 1 / (4 * num_cells**2)


# laws


@every_test
def test_class_probabilities_are_read_by_their_top_label(test):
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(300, 4, generator=generator).softmax(-1)
    labels = torch.randint(4, (300,), generator=generator)
    confidence, predicted = probs.max(-1)
    found = test(probs, labels)
    assert [(value.dtype, value.shape) for value in found] == [(torch.float64, ())] * 2
    assert found == test(confidence, predicted == labels)
    padded = torch.cat([torch.full((7, 4), math.nan), probs])
    assert found == test(padded, torch.cat([torch.full((7,), 9), labels]), ignore_index=9)
    with pytest.raises(ValueError, match="probs: row 0 sums to"):
        test(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))


@every_test
@every_dtype
def test_every_dtype_is_computed_in_float64(test, dtype):
    scores, outcomes = (column[0] for column in simulated(1, 200))
    scores = scores.to(dtype)
    for value, expected in zip(test(scores, outcomes), test(scores.double(), outcomes), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
