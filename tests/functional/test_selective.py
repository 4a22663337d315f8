"""Selective prediction: values by hand, brute force over orders and thresholds, scikit-learn, and grids of cells."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hf_calib.functional import selective
from hf_calib.functional.binning import bin_sums, interior_edges

from .every import every_dtype


SCALARS = {
    "aurc": (selective.area_under_risk_coverage, selective.aurc_of_sums),
    "augrc": (selective.area_under_generalised_risk_coverage, selective.augrc_of_sums),
    "accuracy": (
        partial(selective.accuracy_at_coverage, coverage=0.37),
        partial(selective.accuracy_at_coverage_of_sums, coverage=0.37),
    ),
    "coverage": (
        partial(selective.coverage_at_risk, risk=0.4),
        partial(selective.coverage_at_risk_of_sums, risk=0.4),
    ),
    "auroc": (selective.confidence_auroc, selective.auroc_of_sums),
}
every_scalar = pytest.mark.parametrize(("function", "of_sums"), SCALARS.values(), ids=SCALARS)
few_rows = given(rows=st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), st.booleans()), min_size=1))
quick = settings(max_examples=60, deadline=None, derandomize=True)


def columns(rows):
    confidence, correct = zip(*rows, strict=True)
    return torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct)


def tied_rows(num_rows=400, *, seed=0, values=20):
    """Confidence in twentieths, so that every value is met many times, and correctness that follows it."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.randint(values + 1, (num_rows,), generator=generator).double() / values
    return confidence, (torch.rand(num_rows, generator=generator) < confidence).long()


def surest_first(rows):
    """Groups of equal confidence as `(confidence, rows, right)`, by plain Python."""
    ordered = itertools.groupby(sorted(rows, reverse=True), key=lambda row: row[0])
    groups = [(value, [correct for _, correct in group]) for value, group in ordered]
    return [(value, len(correct), sum(correct)) for value, correct in groups]


# the curve


def test_the_curve_by_hand():
    confidence, correct = columns([(0.5, 1), (0.9, 1), (0.7, 0), (0.7, 1), (0.2, 0)])
    curve = selective.risk_coverage_curve(confidence, correct)
    assert curve.coverage.tolist() == [0.2, 0.6, 0.8, 1.0]
    assert curve.risk.tolist() == [0, 1 / 3, 1 / 4, 2 / 5]
    assert curve.threshold.tolist() == [0.9, 0.7, 0.5, 0.2]
    assert {column.dtype for column in curve} == {torch.float64}


@every_dtype
def test_a_threshold_answers_what_the_curve_says(dtype):
    """Exactly, in the precision of the confidence: a threshold that is off by a rounding would lose its own rows."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(50, generator=generator, dtype=torch.float64).to(dtype)
    confidence = values[torch.randint(50, (600,), generator=generator)]
    correct = torch.rand(600, generator=generator) < confidence
    curve = selective.risk_coverage_curve(confidence, correct)
    assert len(curve.threshold) == len(confidence.unique())
    for coverage, risk, threshold in zip(*curve, strict=True):
        answered = confidence.double() >= threshold
        assert coverage == answered.double().mean()
        assert risk == (~correct[answered]).double().mean()


def test_the_curve_of_cells_leaves_out_empty_ones():
    sums = torch.tensor([[2.0, 0.0, 4.0, 0.0], [0.5, 0.0, 3.0, 0.0], [1.0, 0.0, 4.0, 0.0]], dtype=torch.float64)
    curve = selective.risk_coverage_of_sums(sums)
    assert [column.tolist() for column in curve] == [[4 / 6, 1], [0, 1 / 6], [0.75, 0.25]]


# area under risk and coverage


def test_area_by_hand():
    """Of right, wrong, right, right: (0 + 1/2 + 1/3 + 1/4) / 4."""
    confidence, correct = columns([(0.9, 1), (0.8, 0), (0.6, 1), (0.5, 1)])
    value = selective.area_under_risk_coverage(confidence, correct)
    assert value.item() == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 4, abs=1e-15)
    assert selective.area_under_risk_coverage(confidence, torch.ones(4, dtype=torch.long)) == 0
    assert selective.area_under_risk_coverage(confidence, torch.zeros(4, dtype=torch.long)).item() == pytest.approx(1)


@pytest.mark.parametrize("confidence", [[0.5] * 6, [0.9, 0.5, 0.5, 0.5, 0.5, 0.1], [0.7, 0.7, 0.7, 0.2, 0.2, 0.2]])
def test_ties_are_the_mean_over_all_orders(confidence):
    correct = [1, 0, 0, 1, 1, 0]
    areas = []
    for order in itertools.permutations(range(6)):
        surest = sorted(order, key=lambda row: -confidence[row])  # stable: keeps the order among equals
        wrong = np.cumsum([1 - correct[row] for row in surest])
        areas.append((wrong / np.arange(1, 7)).mean())
    found = selective.area_under_risk_coverage(torch.tensor(confidence), torch.tensor(correct))
    assert found.item() == pytest.approx(np.mean(areas), abs=1e-13)


@pytest.mark.parametrize("num_rows", [10, 1000, 300_000])
def test_area_of_distinct_confidences_is_a_mean_of_risks(num_rows):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randperm(num_rows, generator=generator).double() / num_rows
    correct = torch.rand(num_rows, generator=generator) < 0.2 + 0.6 * confidence
    wrong = (~correct[confidence.argsort(descending=True)]).double().cumsum(0).numpy()
    expected = (wrong / np.arange(1, num_rows + 1)).mean()
    assert selective.area_under_risk_coverage(confidence, correct).item() == pytest.approx(expected, abs=1e-12)


def test_area_of_groups_of_millions_of_rows():
    groups = [(3_000_000, 2_700_000), (1, 0), (2_000_000, 1_100_000), (5, 5)]
    wrong, total, start = 0, 0.0, 0
    for rows, right in groups:
        j = np.arange(1, rows + 1)
        total += ((wrong + (rows - right) * j / rows) / (start + j)).sum()
        wrong, start = wrong + rows - right, start + rows
    counts, right = torch.tensor(groups, dtype=torch.float64).flip(0).T
    found = selective.aurc_of_sums(torch.stack([counts, counts / 2, right]))
    assert found.item() == pytest.approx(total / start, rel=1e-12)


# area under generalised risk and coverage


def test_generalised_area_by_hand():
    """Of right, wrong, right, right: the errors per row go 0, 0, 1/4, 1/4, 1/4 at coverages 0, 1/4, ..., 1."""
    confidence, correct = columns([(0.9, 1), (0.8, 0), (0.6, 1), (0.5, 1)])
    value = selective.area_under_generalised_risk_coverage(confidence, correct)
    assert value.item() == pytest.approx((1 / 8 + 1 / 4 + 1 / 4) / 4, abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_generalised_area_follows_from_auroc_and_accuracy(seed):
    confidence, correct = tied_rows(seed=seed)
    accuracy = correct.double().mean().item()
    auroc = roc_auc_score(correct, confidence)
    expected = (1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    found = selective.area_under_generalised_risk_coverage(confidence, correct)
    assert found.item() == pytest.approx(expected, abs=1e-13)


@quick
@few_rows
def test_generalised_area_is_that_under_the_curve(rows):
    confidence, correct = columns(rows)
    curve = selective.risk_coverage_curve(confidence, correct)
    start = torch.zeros(1, dtype=torch.float64)
    coverage = torch.cat([start, curve.coverage])
    wrong = torch.cat([start, curve.coverage * curve.risk])
    found = selective.area_under_generalised_risk_coverage(confidence, correct)
    torch.testing.assert_close(found, torch.trapezoid(wrong, coverage))


# one point of the curve


def test_accuracy_at_coverage_by_hand():
    """The surest row is right; of the three next, equals, two are; the last is wrong."""
    confidence, correct = columns([(0.9, 1), (0.7, 1), (0.7, 0), (0.7, 1), (0.1, 0)])
    expected = {0.1: 1, 0.2: 1, 0.4: (1 + 2 / 3) / 2, 0.5: (1 + 1.5 * 2 / 3) / 2.5, 0.8: 3 / 4, 0.9: 3 / 4.5, 1: 3 / 5}
    for coverage, accuracy in expected.items():
        found = selective.accuracy_at_coverage(confidence, correct, coverage=coverage)
        assert found.item() == pytest.approx(accuracy, abs=1e-15), coverage
    default = selective.accuracy_at_coverage(confidence, correct)
    assert torch.equal(default, selective.accuracy_at_coverage(confidence, correct, coverage=0.8))


@quick
@given(
    rows=st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.booleans()), min_size=1),
    coverage=st.floats(1e-3, 1),
)
def test_accuracy_at_coverage_is_that_of_a_naive_program(rows, coverage):
    left, right = coverage * len(rows), 0.0
    for _, size, right_of_group in surest_first(rows):
        taken = min(left, size)
        left, right = left - taken, right + right_of_group * taken / size
    found = selective.accuracy_at_coverage(*columns(rows), coverage=coverage)
    assert found.item() == pytest.approx(right / (coverage * len(rows)), abs=1e-9)


def test_coverage_at_risk_by_hand():
    """Risks down the thresholds: 1, 1/2, 1/3, 1/2, 1/2: the largest coverage counts, not the first failure."""
    confidence, correct = columns([(0.9, 0), (0.8, 1), (0.7, 1), (0.6, 0), (0.5, 1), (0.5, 0)])
    expected = {0: 0, 0.3: 0, 0.34: 0.5, 0.49: 0.5, 0.5: 1, 1: 1}
    for risk, coverage in expected.items():
        assert selective.coverage_at_risk(confidence, correct, risk=risk) == coverage, risk


def test_a_risk_that_is_met_exactly_is_bearable():
    confidence, correct = torch.full((20,), 0.5), (torch.arange(20) > 0).long()
    assert selective.coverage_at_risk(confidence, correct) == 1
    assert selective.coverage_at_risk(confidence, correct, risk=0.049999) == 0


@quick
@given(
    rows=st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.booleans()), min_size=1),
    risk=st.floats(0, 1),
)
def test_coverage_at_risk_is_that_of_a_naive_program(rows, risk):
    expected = 0
    for threshold in {confidence for confidence, _ in rows}:
        answered = [correct for confidence, correct in rows if confidence >= threshold]
        if answered.count(False) / len(answered) <= risk:
            expected = max(expected, len(answered) / len(rows))
    assert selective.coverage_at_risk(*columns(rows), risk=risk) == expected


@pytest.mark.parametrize(("coverage", "accuracy"), [(0.25, 0.5), (0.5, 0.75), (1, 0.5)])
def test_coverage_may_end_at_an_empty_cell(coverage, accuracy):
    """Rows from the surest: none, 2 (1 right), none, 2 (2 right), none, 4 (1 right), none."""
    counts, right = torch.tensor([[0, 4, 0, 2, 0, 2, 0], [0, 1, 0, 2, 0, 1, 0]], dtype=torch.float64)
    found = selective.accuracy_at_coverage_of_sums(torch.stack([counts, counts / 2, right]), coverage)
    assert found == accuracy


# AUROC


@every_dtype
def test_auroc_is_that_of_scikit_learn(dtype):
    confidence, correct = tied_rows(values=37)
    confidence = confidence.to(dtype)
    expected = roc_auc_score(correct, confidence.double())
    assert selective.confidence_auroc(confidence, correct).item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("label", [0, 1])
def test_auroc_without_a_pair_is_nan(label):
    value = selective.confidence_auroc(torch.tensor([0.2, 0.9]), torch.full((2,), label))
    assert value.isnan()
    assert value.dtype == torch.float64


# laws


@every_scalar
def test_a_scalar_reads_class_probabilities_by_their_top_label(function, of_sums):
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(300, 4, generator=generator).softmax(-1)
    labels = torch.randint(4, (300,), generator=generator)
    confidence, predicted = probs.max(-1)
    value = function(probs, labels)
    assert (value.dtype, value.shape) == (torch.float64, ())
    assert torch.equal(value, function(confidence, predicted == labels))
    assert torch.equal(value, function(probs.view(10, 30, 4), labels.view(10, 30)))
    ignored = torch.cat([torch.full((7, 4), math.nan), probs])
    padded = torch.cat([torch.full((7,), 9), labels])
    assert torch.equal(value, function(ignored, padded, ignore_index=9))


@every_scalar
def test_the_order_of_the_rows_is_irrelevant(function, of_sums):
    confidence, correct = tied_rows()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert torch.equal(function(confidence, correct), function(confidence[order], correct[order]))


@every_scalar
def test_empty_cells_are_as_if_absent_and_leading_dimensions_are_kept(function, of_sums):
    """Cells as `bin_sums` makes them on a grid that tells the confidences apart, for six sets of rows at once."""
    rows = [tied_rows(num_rows, seed=num_rows) for num_rows in (3, 40, 41, 100, 200, 400)]
    grids = [
        bin_sums(confidence[:, None], correct[:, None] == 1, interior_edges(confidence[:, None], 80, "width"))[:, 0]
        for confidence, correct in rows
    ]
    sums = torch.stack(grids, 1).view(3, 2, 3, 80)
    assert (sums[0] == 0).any()
    values = of_sums(sums)
    assert values.shape == (2, 3)
    expected = torch.stack([function(*pair) for pair in rows]).view(2, 3)
    torch.testing.assert_close(values, expected, atol=1e-13, rtol=0, equal_nan=True)


@every_scalar
def test_a_fine_grid_is_close(function, of_sums):
    """What a streaming metric remembers: 7,680 cells. Rows that share a cell count as equals."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(20_000, 1, generator=generator)
    correct = torch.rand(20_000, 1, generator=generator) < confidence
    sums = bin_sums(confidence, correct, interior_edges(confidence, 7680, "width"))
    found = of_sums(sums)
    assert found.shape == (1,)
    assert found.item() == pytest.approx(function(confidence[:, 0], correct[:, 0]).item(), abs=2e-4)


@every_dtype
def test_groups_are_distinct_scores_in_their_own_precision(dtype):
    pair = torch.tensor([0.7, 1.0], dtype=dtype)
    value, above = pair[0].item(), torch.nextafter(*pair).item()
    scores = torch.tensor([value, 1.0, 0.25, value, 0.0, above, value], dtype=dtype)
    outcomes = torch.tensor([True, True, False, False, False, True, True])
    sums = selective.confidence_groups(scores, outcomes)
    assert sums.tolist() == [[1, 1, 3, 1, 1], [0, 0.25, 3 * value, above, 1], [0, 0, 2, 1, 1]]
    assert sums.dtype == torch.float64


# what is refused


@pytest.mark.parametrize(
    ("function", "name", "value", "allowed"),
    [
        *((selective.accuracy_at_coverage, "coverage", value, "(0, 1]") for value in (0, 0.0, -0.1, 1.01, 80, "all")),
        *((selective.accuracy_at_coverage, "coverage", value, "(0, 1]") for value in (True, None, math.nan)),
        *((selective.coverage_at_risk, "risk", value, "[0, 1]") for value in (-1e-9, 1.01, 5, "5%", False, math.nan)),
    ],
)
def test_a_share_out_of_range_is_refused(function, name, value, allowed):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        function(torch.tensor([0.5]), torch.tensor([1]), **{name: value})
    assert str(refused.value) == f"{name}: got {value!r}; allowed are numbers in {allowed}"


@every_scalar
def test_logits_are_refused(function, of_sums):
    with pytest.raises(ValueError, match="probs: row 0 sums to"):
        function(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
