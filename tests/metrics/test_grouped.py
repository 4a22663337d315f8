"""Metrics by group: each group's number is that of its rows, and the worst is named."""

import math

import pytest
import torch

from hf_calib.metrics import METRICS, EntityMetric, GroupedMetric, bootstrap, bootstrap_groups

from .every import class_rows


PROBS, LABELS = class_rows()
GROUPS = ["de" if row % 4 else "fr" for row in range(400)]
FRENCH = torch.arange(400) % 4 == 0


@pytest.mark.parametrize("name", ["ece", "nll", "accuracy", "classwise_ece", "auroc"])
def test_each_group_has_the_number_of_its_rows(name):
    metric = GroupedMetric(name)
    for part in range(0, 400, 90):
        metric.update(PROBS[part : part + 90], LABELS[part : part + 90], GROUPS[part : part + 90])
    found = metric.compute()
    assert list(found.values) == ["de", "fr"]
    for group, members in (("de", ~FRENCH), ("fr", FRENCH)):
        expected = METRICS[name]().update(PROBS[members], LABELS[members]).compute()
        assert found.values[group].item() == pytest.approx(expected.item(), abs=1e-12)
    worst = min if METRICS[name].higher_is_better else max
    assert found.worst == worst(found.values, key=lambda group: found.values[group])


def test_groups_may_be_numbers_and_rows_may_be_sequences():
    expected = GroupedMetric("ece").update(PROBS, LABELS, GROUPS).compute().values
    found = GroupedMetric("ece").update(PROBS, LABELS, FRENCH.long()).compute().values
    assert found == {"0": expected["de"], "1": expected["fr"]}
    sequences = PROBS.view(100, 4, 4), LABELS.view(100, 4)
    found = GroupedMetric("ece").update(*sequences, ["a", "b"] * 50).compute().values
    rows = torch.arange(400) // 4 % 2 == 0
    assert found["a"].item() == METRICS["ece"]().update(PROBS[rows], LABELS[rows]).compute().item()


def test_merging_joins_groups_and_adds_common_ones():
    halves = [
        GroupedMetric("ece").update(PROBS[part], LABELS[part], GROUPS[part])
        for part in (slice(0, 201), slice(201, 400))
    ]
    only = GroupedMetric("ece").update(PROBS[:5], LABELS[:5], ["it"] * 5)
    found = GroupedMetric("ece").merge(*halves, only).compute().values
    expected = GroupedMetric("ece").update(PROBS, LABELS, GROUPS).compute().values
    assert found.keys() == {"de", "fr", "it"}
    for group, value in expected.items():
        assert found[group].item() == pytest.approx(value.item(), abs=1e-12)
    assert set(halves[0].groups) == {"de", "fr"}, "merging changes none of the others"


def test_a_group_of_ignored_rows_is_no_group():
    labels = LABELS.masked_fill(FRENCH, -100)
    assert list(GroupedMetric("ece").update(PROBS, labels, GROUPS).compute().values) == ["de"]
    with pytest.raises(ValueError, match=r"^labels: no row is left"):
        GroupedMetric("ece").update(PROBS, torch.full_like(LABELS, -100), GROUPS)


def test_no_rows_are_no_groups():
    with pytest.raises(ValueError, match=r"^labels: no row is left"):
        GroupedMetric("ece").update(PROBS[:0], LABELS[:0], [])


def test_an_undefined_number_is_never_the_worst():
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6])
    found = GroupedMetric("auroc").update(confidence, torch.tensor([1, 1, 0, 1]), ["a", "a", "b", "b"]).compute()
    assert math.isnan(found.values["a"])
    assert found.worst == "b"


def test_intervals_are_those_of_each_group_s_rows():
    streamed = GroupedMetric("brier").update(PROBS, LABELS, GROUPS).interval()
    drawn = bootstrap_groups("brier", PROBS, LABELS, GROUPS)
    assert drawn.values["fr"] == bootstrap(["brier"], PROBS[FRENCH], LABELS[FRENCH])["brier"]
    assert streamed.worst == drawn.worst
    for group, expected in drawn.values.items():
        found, width = streamed.values[group], expected.high - expected.low
        assert found.num_rows == expected.num_rows == (100 if group == "fr" else 300)
        assert found.low == pytest.approx(expected.low, abs=width / 5)
        assert found.high == pytest.approx(expected.high, abs=width / 5)
    assert bootstrap_groups("classwise_ece", PROBS, LABELS, GROUPS, num_resamples=50).values["de"].low > 0


def test_wrong_groups_are_refused():
    with pytest.raises(ValueError, match=r"^groups: got 3 for 400 rows; allowed is one for each"):
        GroupedMetric("ece").update(PROBS, LABELS, ["a"] * 3)
    with pytest.raises(ValueError, match=r"^metrics: got 'entropy'; allowed are accuracy, nll"):
        GroupedMetric("entropy")
    with pytest.raises(ValueError, match=r"^ece: no row was seen"):
        GroupedMetric("ece").compute()


@pytest.mark.parametrize("name", ["ks", "kuiper", "spiegelhalter"])
def test_the_worst_of_tests_has_the_largest_statistic_of_either_sign(name):
    confidence = torch.full((400,), 0.7, dtype=torch.float64)
    right = (torch.arange(400) % 10 < 9).long()  # too modest, by far
    right[FRENCH] = (torch.arange(100) % 10 < 6).long()  # a little too sure
    assert GroupedMetric(name).update(confidence, right, GROUPS).compute().worst == "de"
    assert bootstrap_groups(name, confidence, right, GROUPS, num_resamples=20).worst == "de"


def test_curves_have_no_worst_group():
    with pytest.raises(ValueError, match=r"^metrics: calibration_curve is a curve and no number"):
        GroupedMetric("calibration_curve")


def test_a_group_without_events_has_no_number():
    tags = ["O", "B-PER"]
    probs = torch.tensor([[[0.1, 0.9], [0.8, 0.2]], [[0.9, 0.1], [0.8, 0.2]]])
    metric = GroupedMetric(EntityMetric(tags, "brier")).update(probs, torch.zeros(2, 2, dtype=torch.int64), ["a", "b"])
    assert list(metric.compute().values) == ["a"]


def test_an_update_that_fails_changes_nothing():
    metric = GroupedMetric("ece").update(PROBS, LABELS, GROUPS)
    wrong = PROBS.clone()
    wrong[::4] = 3.0
    with pytest.raises(ValueError, match=r"^probs: row 0 sums to"):
        metric.update(wrong, LABELS, GROUPS)
    assert {name: found.num_rows for name, found in metric.groups.items()} == {"de": 300, "fr": 100}


def test_labels_in_eight_bits_are_not_ignored_for_wrapping_around():
    probs, labels = torch.full((4, 200), 1 / 200), torch.tensor([156, 156, 1, 2], dtype=torch.uint8)
    assert list(GroupedMetric("ece").update(probs, labels, ["x", "x", "y", "y"]).groups) == ["x", "y"]
