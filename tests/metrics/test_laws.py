"""The laws of every streaming metric: rows may come in any parts, and the class says what the function says."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_calib.functional.resampling import resample_counts
from hf_calib.metrics import METRICS, MetricCollection, Rows, bootstrap

from .every import (
    CLASSES_ONLY,
    CURVES,
    SCALARS,
    TESTS,
    VARIANTS,
    class_rows,
    coarse_rows,
    event_rows,
    make,
    number,
)


OF_EVENTS = [key for key, (name, _) in VARIANTS.items() if name not in CLASSES_ONLY]
every_variant = pytest.mark.parametrize("key", VARIANTS)
every_scalar = pytest.mark.parametrize("key", SCALARS)
lawful = settings(deadline=None, derandomize=True, max_examples=10)

# How far the class may be from the function on rows from a continuum, where cells hold several confidences: one cell
# of 7,680 (1.3e-4) in confidence; a row in the neighbouring of fifteen bins; a tie between two of 400 rows.
CLOSE = {
    "smooth_ece": 2e-4, "smooth-class": 2e-4, "ks": 2e-3, "kuiper": 4e-3, "aurc": 1e-4, "augrc": 1e-4, "auroc": 1e-3,
    "accuracy_at_coverage": 2e-3, "accuracy-at-half": 2e-3, "coverage_at_risk": 4e-3, "coverage-at-30": 4e-3,
    "debiased_ece": 4e-3, "ece-mass": 4e-3, "adaptive_ece": 4e-3,
}  # fmt: skip


def stream(key, probs, labels, sizes=(97,)):
    metric, _ = make(key)
    cut = list(sizes) if sum(sizes) == len(labels) else sizes[0]
    for part, happened in zip(probs.split(cut), labels.split(cut), strict=True):
        metric.update(part, happened)
    return metric


def assert_equal(found, expected, tolerance=1e-9):
    """Numbers, curves and tests alike."""
    if isinstance(expected, tuple):
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, atol=max(tolerance, 1e-9), rtol=0, equal_nan=True)
    else:
        assert found.dtype == torch.float64
        assert found.shape == ()
        assert found.item() == pytest.approx(float(expected), abs=tolerance, nan_ok=True)


@every_variant
@lawful
@given(cuts=st.lists(st.integers(0, 400), max_size=5), seed=st.integers(0, 3))
def test_any_split_gives_the_same(key, cuts, seed):
    probs, labels = class_rows(seed=seed)
    bounds = [0, *sorted(set(cuts) - {0, 400}), 400]
    sizes = [high - low for low, high in pairwise(bounds)]
    whole = make(key)[0].update(probs, labels)
    assert_equal(stream(key, probs, labels, sizes).compute(), whole.compute())
    assert stream(key, probs, labels, sizes).num_rows == 400


@every_variant
def test_merging_commutes_and_associates(key):
    probs, labels = class_rows()
    parts = [make(key)[0].update(probs[part::3], labels[part::3]) for part in range(3)]
    orders = [(0, 1, 2), (2, 1, 0), (1, 0, 2)]
    merged = [make(key)[0].merge(*(parts[index] for index in order)) for order in orders]
    nested = make(key)[0].merge(parts[0], make(key)[0].merge(parts[1], parts[2]))
    whole = make(key)[0].update(probs, labels)
    for metric in (*merged, nested):
        assert_equal(metric.compute(), whole.compute())
        assert metric.num_rows == 400
    assert [part.num_rows for part in parts] == [134, 133, 133], "merging changes none of the others"


@pytest.mark.parametrize(("key", "rows"), [
    *((key, coarse_rows) for key in VARIANTS), *((key, partial(event_rows, 7)) for key in OF_EVENTS)])  # fmt: skip
def test_the_class_is_the_function_where_cells_hold_one_confidence(key, rows):
    metric, function = make(key)
    assert_equal(metric.update(*rows()).compute(), function(*rows()))


@every_scalar
@pytest.mark.parametrize("seed", range(3))
def test_the_class_is_close_to_the_function_elsewhere(key, seed):
    probs, labels = class_rows(seed=seed)
    metric, function = make(key)
    found, expected = metric.update(probs, labels).compute(), function(probs, labels)
    assert number(found) == pytest.approx(number(expected), abs=CLOSE.get(key, 1e-9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_bins", [10, 15, 20, 30])
def test_the_sketch_knows_these_bins_exactly_in_every_precision(dtype, num_bins):
    """Also where scores lie on edges that the precision has moved."""
    scores = torch.cat([torch.linspace(0, 1, 301), torch.rand(300, generator=torch.Generator().manual_seed(0))])
    scores = scores.to(dtype)
    labels = (torch.arange(len(scores)) % 3 == 0).long()
    for key in ("ece", "mce", "overconfidence", "underconfidence"):
        metric = METRICS[key](num_bins=num_bins)
        expected = METRICS[key].function(scores, labels, num_bins=num_bins)
        assert metric.update(scores, labels).compute().item() == pytest.approx(expected.item(), abs=1e-12)


@every_variant
def test_reset_forgets(key):
    probs, labels = class_rows()
    metric = make(key)[0].update(*class_rows(seed=5)).reset()
    assert metric.num_rows == 0
    assert metric.sums is None
    assert_equal(metric.update(probs, labels).compute(), make(key)[0].update(probs, labels).compute())


@every_variant
def test_what_cannot_be_computed_or_merged_says_so(key):
    metric = make(key)[0]
    with pytest.raises(ValueError, match=rf"^{metric.name}: no row was seen; call update"):
        metric.compute()
    with pytest.raises(ValueError, match=rf"^{metric.name}: no row was seen; call update"):
        metric.interval()
    other = METRICS["ece"](num_bins=3)
    with pytest.raises(
        ValueError, match=r"^others: got ExpectedCalibrationError.*num_bins=3.* allowed are equal metrics"
    ):
        metric.merge(other)
    with pytest.raises(ValueError, match=r"^probs: row 0 sums to 2"):
        metric.update(torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"^labels: no row is left"):
        metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([-100]))
    assert metric.num_rows == 0, "what was refused leaves no trace"


@pytest.mark.parametrize("key", ["classwise_ece", "adaptive_ece", "ece-class", "smooth-class"])
def test_rows_of_other_classes_are_refused(key):
    metric = make(key)[0].update(*class_rows())
    with pytest.raises(ValueError, match=r"^probs: got other classes than in earlier rows"):
        metric.update(*class_rows(num_labels=3))


@every_variant
def test_ignored_rows_and_leading_dimensions_change_nothing(key):
    probs, labels = class_rows()
    expected = make(key)[0].update(probs[:200], labels[:200])
    masked = labels.masked_fill(torch.arange(400) >= 200, -100)
    found = make(key)[0].update(probs.view(20, 20, 4), masked.view(20, 20))
    assert_equal(found.compute(), expected.compute(), 1e-12)
    assert found.num_rows == 200


@every_variant
def test_the_state_does_not_grow(key):
    probs, labels = class_rows()
    metric = make(key)[0].update(probs, labels)
    size = metric.sums.shape
    for _ in range(5):
        metric.update(probs, labels)
    assert metric.sums.shape == size
    assert metric.sums.dtype == torch.float64
    assert metric.num_rows == 2400


def test_the_state_is_as_small_as_the_docstrings_say():
    def bytes_of(name, probs, **options):
        metric = METRICS[name](**options).update(probs, torch.zeros(len(probs), dtype=torch.int64))
        return metric.sums.numel() * metric.sums.element_size()

    thousand = torch.full((2, 1000), 1e-3, dtype=torch.float64)
    assert bytes_of("classwise_ece", thousand) == 360_000
    assert bytes_of("ece", thousand) == 184_320
    assert bytes_of("nll", thousand) == 24


@pytest.mark.slow
def test_ten_million_rows_leave_the_state_as_it_is():
    scores, labels = event_rows(100_000)
    metrics = MetricCollection(["ece", "nll", "aurc"])
    for _ in range(100):
        metrics.update(scores, labels)
    assert metrics.num_rows == 10_000_000
    assert sum(metric.sums.numel() for metric in metrics.metrics.values()) == 2 * 3 * 7680 + 3
    for name, value in metrics.compute().items():
        once = METRICS[name]().update(scores, labels).compute()
        assert value.item() == pytest.approx(once.item(), abs=1e-4 if name == "aurc" else 1e-9)


@every_scalar
def test_numbers_stay_in_bounds_and_are_best_at_the_truth(key):
    metric, _ = make(key)
    scores = torch.arange(21, dtype=torch.float64).div(20).repeat_interleave(20)
    happened = (torch.arange(20).repeat(21) < (scores * 20).round()).long()
    if metric.name in CLASSES_ONLY:
        scores = torch.stack([1 - scores, scores], dim=-1)
    calibrated = number(metric.update(scores, happened).compute())
    low, high = metric.bounds
    assert low <= calibrated <= high
    if "ece" in key or metric.name in (*TESTS, "mce", "overconfidence", "underconfidence"):
        assert calibrated == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("key", "rows"), [
    *((key, class_rows) for key in SCALARS),
    *((key, event_rows) for key in OF_EVENTS if key in SCALARS)])  # fmt: skip
def test_a_resample_has_the_metric_of_the_repeated_rows(key, rows):
    """The function's own, exactly, also where nearly all confidences lie in one cell of the sketch."""
    probs, labels = rows(300)
    probs = 1 - (1 - probs) / 1e5 if probs.dim() == 1 else probs
    metric, function = make(key)
    statistic = metric.statistic(Rows(probs, labels))
    counts = torch.cat(list(resample_counts(300, 4)), dim=1)
    found = statistic(counts)
    for value, column in zip(found, counts.T.long(), strict=True):
        expected = function(probs.repeat_interleave(column, 0), labels.repeat_interleave(column))
        assert value.item() == pytest.approx(number(expected), abs=1e-9)


@every_scalar
def test_an_interval_contains_its_value_and_ends_where_the_metric_does(key):
    metric, _ = make(key)
    probs, labels = class_rows(300)
    found = bootstrap({"it": metric}, probs, labels, num_resamples=200)["it"]
    assert found.num_rows == 300
    assert metric.bounds[0] <= found.low <= found.value <= found.high <= metric.bounds[1]
    assert found.low < found.high


@pytest.mark.parametrize("num_rows", [300, 6000])
@pytest.mark.parametrize("key", [key for key, (name, options) in SCALARS.items() if not (
    name in ("spiegelhalter", "classwise_ece", "adaptive_ece", "weighted_ece") or "target" in options)])  # fmt: skip
def test_the_sums_alone_give_the_interval_of_the_rows(key, num_rows):
    """Few rows are drawn one by one, of many the cells are Poisson numbers: the same up to the noise of resampling."""
    if key.startswith("mce") and num_rows > 300:
        pytest.skip("its fullest sparse bin holds six rows: both intervals are noise")
    probs, labels = class_rows(num_rows)
    metric = make(key)[0].update(probs, labels)
    found, expected = metric.interval(), bootstrap({"it": make(key)[0]}, probs, labels)["it"]
    width = expected.high - expected.low
    assert found.value == pytest.approx(expected.value, abs=CLOSE.get(key, 1e-9))
    assert found.num_rows == num_rows
    assert found.low == pytest.approx(expected.low, abs=width / 5)
    assert found.high == pytest.approx(expected.high, abs=width / 5)


@pytest.mark.parametrize(
    "key", ["classwise_ece", "adaptive_ece", "ece-class", "smooth-class", "weighted_ece", "spiegelhalter"]
)
def test_sums_that_do_not_know_how_rows_differ_say_so(key):
    metric = make(key)[0].update(*class_rows())
    with pytest.raises(ValueError, match=rf"^{metric.name}: its sums cannot be resampled"):
        metric.interval()


@pytest.mark.parametrize("name", CLASSES_ONLY)
def test_events_are_no_classes(name):
    with pytest.raises(ValueError, match=r"^probs: got shape \(400,\); .*\(\.\.\., C\) class probabilities"):
        METRICS[name]().update(*event_rows())
    with pytest.raises(ValueError, match=r"^probs: got shape \(400,\); .*\(\.\.\., C\) class probabilities"):
        bootstrap([name], *event_rows())


@pytest.mark.parametrize("name", CURVES)
def test_what_has_no_interval_says_so(name):
    with pytest.raises(ValueError, match=rf"^metrics: {name} .* no interval"):
        bootstrap([name], *class_rows())
    with pytest.raises(ValueError, match=rf"^metrics: {name} .* no interval"):
        METRICS[name]().update(*class_rows()).interval()


@pytest.mark.parametrize("key", CURVES)
def test_curves_come_from_the_same_sums(key):
    probs, labels = class_rows()
    curve = make(key)[0].update(probs, labels).compute()
    if key == "calibration_curve":
        gaps = (curve.counts * (curve.accuracy - curve.confidence).abs()).nansum() / curve.counts.sum()
        assert gaps.item() == pytest.approx(number(make("ece")[1](probs, labels)), abs=1e-12)
    else:
        assert curve.coverage[-1] == 1
        assert curve.risk[-1].item() == pytest.approx(1 - number(make("accuracy")[1](probs, labels)))
        assert (curve.threshold.diff() < 0).all()
