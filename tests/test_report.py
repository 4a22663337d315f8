"""The report: its numbers are the metrics', its intervals are paired, and its sentence says no more than they do."""

import json
import math

import pytest
import torch

from hf_calib.functional import (
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    smooth_calibration_error,
)
from hf_calib.functional.resampling import Estimate
from hf_calib.report import TITLES, CalibrationReport, evaluate_calibration


METRICS = {
    "accuracy": accuracy,
    "nll": negative_log_likelihood,
    "brier": brier_score,
    "ece": expected_calibration_error,
    "smooth_ece": smooth_calibration_error,
}
NAMES = list(METRICS)


def rows_of_classes(num_rows=300, *, seed=0):
    """Probabilities that are too sure, the truth, and labels drawn from the truth."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(num_rows, 4, generator=generator, dtype=torch.float64)
    truth = logits.softmax(-1)
    return (3 * logits).softmax(-1), truth, truth.multinomial(1, generator=generator)[:, 0]


def rows_of_events(num_rows=300):
    sure, _, labels = rows_of_classes(num_rows)
    confidence, predicted = sure.max(-1)
    return confidence, (predicted == labels).long()


@pytest.fixture(scope="module")
def comparison():
    sure, truth, labels = rows_of_classes()
    return evaluate_calibration(truth, labels, before=sure, num_resamples=200)


def a_change(gain, low, high, num_rows=1000):
    """A report whose NLL falls by `gain`, with the interval of that gain."""
    estimates = {"nll": Estimate(0.5, 0.4, 0.6, num_rows)}
    change = {"nll": Estimate(-gain, -high, -low, num_rows)}
    return CalibrationReport(num_rows, 1000, after=estimates, before=estimates, change=change)


# the numbers


def test_values_are_those_of_the_metrics(comparison):
    sure, truth, labels = rows_of_classes()
    for side, probs in ((comparison.before, sure), (comparison.after, truth)):
        assert list(side) == NAMES
        for name, metric in METRICS.items():
            assert side[name].value == pytest.approx(metric(probs, labels).item(), abs=1e-9), name
    assert comparison.num_rows == 300


def test_the_change_is_after_minus_before(comparison):
    for name in NAMES:
        expected = comparison.after[name].value - comparison.before[name].value
        assert comparison.change[name].value == pytest.approx(expected, abs=1e-12)
    assert comparison.change["nll"].value < 0


def test_every_interval_contains_its_value_and_keeps_the_metric_s_bounds(comparison):
    for side in (comparison.before, comparison.after, comparison.change):
        for value, low, high, num_rows in side.values():
            assert low <= value <= high
            assert num_rows == 300
    for side in (comparison.before, comparison.after):
        for name, estimate in side.items():
            assert estimate.low >= 0
            assert estimate.high <= {"nll": math.inf, "brier": 2}.get(name, 1)


def test_no_interval_of_an_almost_perfect_model_leaves_0_to_1():
    probs = torch.eye(2).repeat(100, 1)
    labels = torch.tensor([0, 1]).repeat(100)
    labels[0] = 1
    for seed in range(5):
        found = evaluate_calibration(probs, labels, num_resamples=50, seed=seed).after
        assert found["accuracy"].high <= 1
        assert min(estimate.low for estimate in found.values()) >= 0


def test_nothing_changes_when_before_is_after():
    sure, _, labels = rows_of_classes()
    report = evaluate_calibration(sure, labels, before=sure.clone(), num_resamples=50)
    assert set(report.change.values()) == {Estimate(0.0, 0.0, 0.0, 300)}
    assert report.before == report.after
    assert report.verdict() == "Nothing changed: the probabilities are the same before and after."


def test_changes_are_paired():
    """The interval of a small change of all rows is far narrower than those of what changed."""
    sure, _, labels = rows_of_classes()
    report = evaluate_calibration(0.99 * sure + 0.01 / 4, labels, before=sure, num_resamples=200)
    change, after = report.change["brier"], report.after["brier"]
    assert change.high - change.low < 0.2 * (after.high - after.low)


def test_a_seed_decides_the_intervals_and_nothing_else():
    sure, truth, labels = rows_of_classes()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (
        evaluate_calibration(truth, labels, before=sure, num_resamples=40, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert first != other
    assert [estimate.value for estimate in first.after.values()] == [e.value for e in other.after.values()]


def test_ignored_rows_and_leading_dimensions_change_nothing():
    sure, truth, labels = rows_of_classes()
    expected = evaluate_calibration(truth, labels, before=sure, num_resamples=20)
    padding = torch.full((60, 4), math.nan, dtype=torch.float64)
    padded = [torch.cat([side, padding]).view(6, 60, 4) for side in (truth, sure)]
    labels = torch.cat([labels, torch.full((60,), -1)]).view(6, 60)
    assert evaluate_calibration(padded[0], labels, before=padded[1], num_resamples=20, ignore_index=-1) == expected


def test_an_event_has_no_accuracy():
    report = evaluate_calibration(*rows_of_events(), num_resamples=20)
    assert list(report.after) == NAMES[1:]
    assert [row[0] for row in report.rows()] == [TITLES[name] for name in NAMES[1:]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_dtype_and_probabilities_with_a_gradient(dtype):
    sure, truth, labels = rows_of_classes()
    after = truth.to(dtype).requires_grad_()
    report = evaluate_calibration(after, labels, before=sure.to(dtype), num_resamples=10)
    assert report.after["nll"].value == pytest.approx(negative_log_likelihood(after, labels).item())


# what is refused


def test_before_of_another_shape_is_refused():
    sure, truth, labels = rows_of_classes()
    for before in (sure[:-1], sure[:, :3], sure[:, 0]):
        with pytest.raises(ValueError, match=r"before: got shape .* allowed is that of probs, \(300, 4\)"):
            evaluate_calibration(truth, labels, before=before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"before": torch.tensor([[3.0, -1.0], [0.0, 2.0]])}, "before: row 0 sums to 2"),
        ({"before": [[0.5, 0.5], [0.5, 0.5]]}, "before: got list; allowed are floating"),
        ({"probs": torch.tensor([[3.0, -1.0], [0.0, 2.0]])}, "probs: row 0 sums to 2"),
        ({"probs": torch.eye(2).numpy()}, "probs: got ndarray; allowed are floating torch tensors"),
        ({"labels": [0, 1]}, "labels: got list; allowed are integer torch tensors"),
        ({"labels": torch.tensor([0, 2])}, "labels: got 2; allowed are 0 to 1"),
        ({"num_resamples": 0}, "num_resamples: got 0; allowed are integers from 1 up"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_calibration(**{"probs": torch.eye(2), "labels": torch.tensor([0, 1]), **arguments})


# what is read


@pytest.mark.parametrize(
    ("gain", "low", "high", "sentence"),
    [
        (
            0.1,
            0.05,
            0.15,
            "The gain is real: NLL falls by 0.1000 nats (95 % interval of the gain +0.0500 to +0.1500).",
        ),
        (
            -0.1,
            -0.15,
            -0.05,
            "Do not use this calibrator: NLL rises by 0.1000 nats (95 % interval of the gain -0.1500 to -0.0500).",
        ),
        (
            0.01,
            -0.03,
            0.05,
            "1,000 rows are too few to tell: NLL falls by 0.0100 nats (95 % interval of the gain -0.0300 to +0.0500); "
            "about 16,000 rows would settle it.",
        ),
        (
            -0.02,
            -0.05,
            0.01,
            "1,000 rows are too few to tell: NLL rises by 0.0200 nats (95 % interval of the gain -0.0500 to +0.0100); "
            "about 2,300 rows would settle it.",
        ),
        (
            0.0,
            -0.04,
            0.04,
            "1,000 rows are too few to tell: NLL rises by 0.0000 nats (95 % interval of the gain -0.0400 to +0.0400); "
            "no number of rows like these would settle it.",
        ),
        (0.0, 0.0, 0.0, "Nothing changed: the probabilities are the same before and after."),
        (1e-8, -1e-7, 1e-7, "Nothing changed: the probabilities are the same before and after."),
    ],
)
def test_the_verdict_is_one_sentence(gain, low, high, sentence):
    assert a_change(gain, low, high).verdict() == sentence


@pytest.mark.parametrize(("num_rows", "some"), [(1, "1 row is"), (3, "3 rows are"), (29, "29 rows are")])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_handful_of_rows_never_tells(num_rows, some, sign):
    """The bootstrap of one row has an interval without width; of few it is far too narrow."""
    interval = sorted((0.09 * sign, 0.11 * sign))
    report = a_change(0.1 * sign, *interval, num_rows=num_rows)
    assert report.verdict().startswith(f"{some} too few to tell")
    assert report.verdict().endswith("; about 30 rows would settle it.")
    assert "too few" not in a_change(0.1 * sign, *interval, num_rows=30).verdict()


def test_nobody_is_told_to_label_millions_of_rows():
    assert a_change(1e-5, -0.01, 0.01).verdict().endswith("no number of rows like these would settle it.")


def test_there_is_no_verdict_without_a_before():
    report = evaluate_calibration(*rows_of_events(), num_resamples=5)
    assert report.verdict() == ""
    assert report.to_markdown().endswith("in brackets the 95 % interval over 5 bootstrap resamples.")


def test_a_large_gain_is_real_and_its_reverse_is_not():
    sure, truth, labels = rows_of_classes()
    assert evaluate_calibration(truth, labels, before=sure, num_resamples=50).verdict().startswith("The gain is real")
    assert evaluate_calibration(sure, labels, before=truth, num_resamples=50).verdict().startswith("Do not use this")


def test_the_number_of_rows_that_would_settle_it_is_about_right():
    """Of samples of that many rows, about half, and surely a quarter, tell; of ten times fewer, hardly one in four."""

    def report_on(labels):
        after, before = (torch.full((len(labels),), score) for score in (0.7, 0.65))
        return evaluate_calibration(after, labels, before=before, num_resamples=60)

    typical = report_on((torch.arange(100) < 70).long())  # seven of ten, which is what 0.7 says
    words = typical.verdict().split("; about ")[1].split()
    num_rows = int(words[0].replace(",", ""))
    assert 500 < num_rows < 3000
    generator = torch.Generator().manual_seed(0)
    telling = {}
    for size in (num_rows, num_rows // 10):
        reports = [report_on((torch.rand(size, generator=generator) < 0.7).long()) for _ in range(30)]
        telling[size] = sum("too few" not in report.verdict() for report in reports) / 30
    assert 0.25 <= telling[num_rows] <= 0.9
    assert telling[num_rows // 10] < 0.25


def test_the_dictionary_is_json_and_comes_back(comparison):
    alone = evaluate_calibration(*rows_of_events(), num_resamples=5)
    for report, sides in ((comparison, ["before", "after", "change"]), (alone, ["after"])):
        record = report.to_dict()
        assert list(record) == ["num_rows", "num_resamples", *sides]
        assert set(record["after"]["ece"]) == {"value", "low", "high"}
        assert CalibrationReport.from_dict(json.loads(json.dumps(record))) == report


def table_of(report):
    lines = report.to_markdown().split("\n\n")[0].splitlines()
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    return [line[2:-2].split(" | ") for line in lines]


def test_the_table_has_a_row_for_every_metric_and_a_column_for_every_side(comparison):
    table = table_of(comparison)
    assert table[0] == ["Metric", "Before", "After", "Change"]
    assert table[1] == [":---", "---:", "---:", "---:"]
    assert [row[0] for row in table[2:]] == list(TITLES.values())
    assert {len(row) for row in table} == {4}
    assert table_of(evaluate_calibration(*rows_of_events(), num_resamples=5))[0] == ["Metric", "Value"]
    paragraphs = comparison.to_markdown().split("\n\n")
    assert paragraphs[1:] == [comparison.note(), comparison.verdict()]
    assert comparison.note() == "300 rows; in brackets the 95 % interval over 200 bootstrap resamples."


def test_cells_are_written_with_four_digits_and_a_sign_for_the_change():
    side = {"nll": Estimate(0.52341, 0.41, 0.6149, 10)}
    report = CalibrationReport(10, 20, after=side, before=side, change={"nll": Estimate(-0.01234, -0.02, 0.0301, 10)})
    cell = "0.5234 [0.410, 0.615]"
    assert report.rows() == [["NLL (nats)", cell, cell, "-0.0123 [-0.020, +0.030]"]]


def test_perfection_is_0_and_not_minus_0():
    report = evaluate_calibration(torch.eye(3), torch.arange(3), before=torch.eye(3), num_resamples=5)
    assert "-0.0" not in "".join("".join(row) for row in report.rows())


# the figure


def test_the_figure_shows_before_and_after(comparison):
    pytest.importorskip("matplotlib")
    alone = evaluate_calibration(*rows_of_events(), num_resamples=5)
    for report, num_panels in ((comparison, 2), (alone, 1)):
        figure = report.figure(title="A title")
        assert len(figure.axes) == num_panels
        written = [text.get_text() for text in [*figure.texts, *(text for ax in figure.axes for text in ax.texts)]]
        assert "A title" in written
        assert any(f"ECE {report.after['ece'].value:.3f}" in text for text in written)


def test_a_report_that_was_read_has_no_figure(comparison):
    with pytest.raises(ValueError, match="events: this report was read from a record"):
        CalibrationReport.from_dict(comparison.to_dict()).figure()
