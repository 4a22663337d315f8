"""Metrics of files: those of their rows, however many come at a time; what is wrong is named by its row."""

import numpy as np
import pytest
import torch

from hf_calib import measuring, prediction_files
from hf_calib.functional import brier_score, expected_calibration_error, negative_log_likelihood
from hf_calib.measuring import measure_predictions
from hf_calib.metrics import METRICS, GroupedMetric, MetricCollection
from hf_calib.prediction_files import SUFFIXES

from .test_prediction_files import EVENTS, HAPPENED, columns_of, many, small_blocks, write


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metrics_of_a_file_are_those_of_its_rows(suffix, tmp_path, monkeypatch):
    small_blocks(monkeypatch, 500)
    monkeypatch.setattr(prediction_files, "BATCH_ROWS", 7)
    probs, labels = many(100)
    labels[::9] = -100
    path, seen = write(tmp_path / f"rows{suffix}", columns_of(probs, labels, suffix)), []
    found = measure_predictions(path, advance=seen.append)
    assert (found.groups, found.total.num_rows) == ({}, 88)
    assert sum(seen) == 100
    assert len(seen) > 10
    numbers = found.total.compute()
    assert list(numbers) == ["accuracy", "nll", "brier", "ece", "smooth_ece"]
    for name, function in (
        ("nll", negative_log_likelihood),
        ("brier", brier_score),
        ("ece", expected_calibration_error),
    ):
        torch.testing.assert_close(numbers[name], function(probs, labels), rtol=0, atol=1e-12)


def test_events_have_no_accuracy_and_metrics_can_be_chosen(tmp_path):
    path = write(tmp_path / "rows.csv", {"probs": EVENTS, "label": HAPPENED})
    assert list(measure_predictions(path).total.metrics) == ["nll", "brier", "ece", "smooth_ece"]
    assert list(measure_predictions(path, ["mce", "brier"]).total.metrics) == ["mce", "brier"]
    refused_metrics(path, "metrics: got 'magic'; allowed are accuracy, nll", ["magic"])
    refused_metrics(path, "metrics: got 'calibration_curve', which is a curve", ["calibration_curve"])
    refused_metrics(path, r"^probs: got shape .*; accuracy needs", ["accuracy"])


def refused_metrics(path, message, metrics=(), **options):
    with pytest.raises(ValueError, match=message) as caught:
        measure_predictions(path, metrics, **options)
    assert len(str(caught.value).splitlines()) == 1


WRONG = [
    ([2.0, -1.0], 0, "probs: got -1; allowed are values in"),
    ([3.0, 1.0], 0, r"probs: the row sums to 4; allowed is 1 within 0\.0001\. Logits become"),
    ([0.5, 0.49], 0, "probs: the row sums to 0.99; .* Rounded ones"),
    ([np.nan, 1.0], 0, "probs: the row sums to nan"),
    ([0.5, 0.5], 2, "labels: got 2; allowed are 0 to 1"),
    ([0.5, 0.5], -1, "labels: got -1; allowed are 0 to 1"),
]


@pytest.mark.parametrize(("row", "label", "message"), WRONG)
@pytest.mark.parametrize("where", [0, 6, 17, 39])
def test_a_wrong_row_is_named_by_its_number_in_the_file(row, label, message, where, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_files, "BATCH_ROWS", 8)
    probs, labels = np.full((40, 2), 0.5), np.full(40, 1)
    labels[1:6] = -100  # rows that are left out are counted
    probs[where], labels[where] = row, label
    probs[min(where + 2, 39)] = row  # a later mistake does not come first
    np.savez(tmp_path / "rows.npz", probs=probs, label=labels)
    refused_metrics(tmp_path / "rows.npz", rf"^predictions: .*rows\.npz, row {where}: {message}")


def test_events_that_are_logits_are_named_by_their_row(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_files, "BATCH_ROWS", 8)
    for value in (2.5, -0.1, np.nan):
        events = np.full(20, 0.5)
        events[13] = value
        np.savez(tmp_path / "rows.npz", probs=events, label=np.ones(20, dtype=int))
        refused_metrics(tmp_path / "rows.npz", r"rows\.npz, row 13: probs: got values from .*logits\.sigmoid")


def test_rows_that_are_left_out_do_not_count_and_cannot_be_all(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_files, "BATCH_ROWS", 2)
    path = write(tmp_path / "rows.npz", {"probs": EVENTS, "label": [-100, -100, 1, 0]})
    assert measure_predictions(path).total.num_rows == 2
    path = write(tmp_path / "none.npz", {"probs": EVENTS, "label": [-100] * 4})
    refused_metrics(path, "labels: no row of .* is left after leaving out those equal to -100")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_groups_are_measured_by_themselves(suffix, kind, tmp_path, monkeypatch):
    small_blocks(monkeypatch, 500)
    monkeypatch.setattr(prediction_files, "BATCH_ROWS", 7)
    probs, labels = many(90)
    labels[4] = -100
    groups = [{"names": ["de", "en", "fr"], "numbers": [3, 1, 2]}[kind][row % 3] for row in range(90)]
    labels[[row for row in range(90) if row % 3 == 2]] = 0
    path = write(tmp_path / f"rows{suffix}", {**columns_of(probs, labels, suffix), "group": groups})
    found = measure_predictions(path, ["nll", "accuracy", "spiegelhalter", "adaptive_ece"], group_column="group")
    record = found.group_records()
    assert list(record["groups"]) == sorted(map(str, set(groups)))
    assert sum(numbers["num_rows"] for numbers in record["groups"].values()) == found.total.num_rows == 89
    assert list(record["worst"]) == ["nll", "accuracy", "adaptive_ece"], "a test has no worst group"
    for name in record["worst"]:
        wanted = GroupedMetric(name).update(probs, labels, groups).compute()
        assert record["worst"][name]["group"] == wanted.worst
        for group, value in wanted.values.items():
            assert record["groups"][group][name] == pytest.approx(float(value), abs=1e-12)
    worst = record["worst"]["nll"]
    assert worst["low"] < worst["value"] < worst["high"]
    assert worst["num_rows"] == record["groups"][worst["group"]]["num_rows"]
    assert record["worst"]["adaptive_ece"]["low"] is None
    whole = MetricCollection(["nll"])
    whole.update(probs, labels)
    assert float(found.total.compute()["nll"]) == pytest.approx(float(whole.compute()["nll"]), abs=1e-12)
    assert measure_predictions(path).group_records() == {}


def test_a_gap_is_a_group_and_a_group_of_ignored_rows_is_none(tmp_path):
    groups = ["a", None, "b", "a"]
    path = write(tmp_path / "rows.parquet", {"probs": EVENTS, "label": [1, 0, -100, 0], "group": groups})
    assert list(measure_predictions(path, group_column="group").groups) == ["None", "a"]


def test_groups_without_end_and_without_names_are_refused(tmp_path, monkeypatch):
    path = write(
        tmp_path / "rows.parquet", {"probs": EVENTS, "label": HAPPENED, "group": [4, 3, 2, 1], "wide": [[1]] * 4}
    )
    refused_metrics(path, "group_column: got a column of list.*; allowed are names and numbers", group_column="wide")
    refused_metrics(path, "column: .* has no 'town'; it has probs, label, group, wide", group_column="town")
    monkeypatch.setattr(measuring, "MAX_GROUPS", 3)
    refused_metrics(path, "group_column: got 'group'; allowed are at most 3 groups", group_column="group")


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if not metric.is_curve])
def test_every_metric_that_is_a_number_can_be_asked_for(name, tmp_path):
    probs, labels = many(50)
    path = write(tmp_path / "rows.npz", columns_of(probs, labels, ".npz"))
    assert measure_predictions(path, [name]).total.num_rows == 50


def test_the_number_of_threads_is_as_it_was(tmp_path, monkeypatch):
    path, before = write(tmp_path / "rows.npz", {"probs": EVENTS, "label": HAPPENED}), torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        used = []
        found = measure_predictions(path, advance=lambda rows: used.append(torch.get_num_threads()))
        assert found.report().num_rows == 4
        monkeypatch.setattr(
            measuring.CalibrationReport, "from_metrics", lambda metrics, seed: used.append(torch.get_num_threads())
        )
        found.report()
        assert (used, torch.get_num_threads()) == ([1, 1], before + 1)
        with pytest.raises(ValueError, match="allowed are accuracy"):
            measure_predictions(path, ["magic"])
        with pytest.raises(ValueError, match="accuracy needs"):
            measure_predictions(path, ["accuracy"])
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_reading_is_one_batch_ahead_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_files, "BATCH_ROWS", 10)
    np.savez(tmp_path / "rows.npz", probs=np.full(100, 0.5), label=np.ones(100, dtype=int))
    read, ahead, plain = [], [], measuring.read_batches

    def watched(*options):
        for batch in plain(*options):
            read.append(len(batch.labels))
            yield batch

    monkeypatch.setattr(measuring, "read_batches", watched)
    measured = []
    measure_predictions(
        tmp_path / "rows.npz", advance=lambda rows: (measured.append(rows), ahead.append(len(read) - len(measured)))
    )
    assert len(measured) == 10
    assert max(ahead) <= 1
