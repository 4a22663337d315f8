"""Calibration errors: values worked out by hand, independent references, and zero where confidence is frequency."""

import math
from functools import partial

import netcal.metrics
import numpy as np
import pytest
import relplot
import torch
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from hf_calib.functional import (
    adaptive_calibration_error,
    classwise_calibration_error,
    debiased_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    overconfidence,
    reliability_curve,
    smooth_calibration_error,
    underconfidence,
)
from hf_calib.functional.calibration import binned_error, events

from .every import ERRORS, every_dtype


every_error = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)


def softmax_rows(num_rows=500, num_labels=5, *, seed=0):
    """Rows drawn from a continuum, so that none lies on an edge, and labels that follow them half-heartedly."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_rows, num_labels, generator=generator, dtype=torch.float64)
    return logits.softmax(-1), (logits / 2).softmax(-1).multinomial(1, generator=generator)[:, 0]


def event_rows(num_rows=500, *, seed=0, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    scores = low + (high - low) * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    return scores, (torch.rand(num_rows, generator=generator) < scores.square()).long()


def event_counts(*groups):
    """Events from `(score, rows, rows where it happened)`."""
    scores = torch.cat([torch.full((rows,), score, dtype=torch.float64) for score, rows, _ in groups])
    labels = torch.cat([(torch.arange(rows) < happened).long() for _, rows, happened in groups])
    return scores, labels


def smooth_error_by_quadrature(scores, labels, num_points=2000):
    """The definition, point by point: reflected Gaussians on a fine grid, and bisection for their width."""
    values, which = np.unique(scores.numpy(), return_inverse=True)
    masses = np.bincount(which, weights=(labels - scores).numpy()) / len(scores)
    points = (np.arange(num_points) + 0.5) / num_points
    distances = np.stack([points[:, None] - (2 * k + sign * values) for k in (-2, -1, 0, 1, 2) for sign in (1, -1)])
    low, high = 1e-3, 1.0
    for _ in range(25):
        sigma = (low + high) / 2
        kernel = np.exp(-0.5 * (distances / sigma) ** 2).sum(0) / (sigma * math.sqrt(2 * math.pi))
        low, high = (sigma, high) if np.abs(kernel @ masses).mean() > sigma else (low, sigma)
    return sigma


# by hand


@every_dtype
def test_confidence_one_falls_into_the_last_bin(dtype):
    """0.95 right and 1.0 wrong: one bin, |0.975 - 0.5|. A hidden bin for 1.0 alone would make it 0.525."""
    tolerance = 1e-6 + torch.finfo(dtype).eps / 4
    probs, labels = torch.tensor([[0.95, 0.05], [1.0, 0.0]], dtype=dtype), torch.tensor([0, 1])
    for value in (
        expected_calibration_error(probs, labels, num_bins=10),
        expected_calibration_error(probs[:, 0], 1 - labels, num_bins=10),
        maximum_calibration_error(probs, labels, num_bins=10),
        classwise_calibration_error(probs, labels, num_bins=10),
    ):
        assert value.item() == pytest.approx(0.475, abs=tolerance)


def test_errors_by_hand():
    """Bins (0, 0.5] and (0.5, 1] hold gaps |0.3 - 0.5| on 2 rows and |0.9 - 2/3| on 3."""
    scores, labels = event_counts((0.2, 1, 0), (0.4, 1, 1), (0.9, 3, 2))
    gaps, shares = [0.2, 0.9 - 2 / 3], [2 / 5, 3 / 5]
    expected = {
        "l1": sum(share * gap for share, gap in zip(shares, gaps, strict=True)),
        "l2": math.sqrt(sum(share * gap**2 for share, gap in zip(shares, gaps, strict=True))),
        "max": max(gaps),
    }
    for norm, value in expected.items():
        found = expected_calibration_error(scores, labels, num_bins=2, norm=norm)
        assert found.item() == pytest.approx(value, abs=1e-15)


def test_equal_mass_error_by_hand():
    """Two bins of two rows: |0.15 - 0| and |0.65 - 1|."""
    scores, labels = torch.tensor([0.1, 0.2, 0.6, 0.7], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    value = expected_calibration_error(scores, labels, num_bins=2, binning="mass")
    assert value.item() == pytest.approx((0.15 + 0.35) / 2)


def test_over_and_underconfidence_by_hand():
    """Bins (0, 0.5] and (0.5, 1]: 0.3 against 0.5 on 2 rows, 0.9 against 2/3 on 3."""
    rows = event_counts((0.2, 1, 0), (0.4, 1, 1), (0.9, 3, 2))
    assert overconfidence(*rows, num_bins=2).item() == pytest.approx(3 / 5 * (0.9 - 2 / 3))
    assert underconfidence(*rows, num_bins=2).item() == pytest.approx(2 / 5 * 0.2)


@pytest.mark.parametrize("target", ["top", "class"])
def test_over_and_underconfidence_add_up_to_the_error(target):
    probs, labels = softmax_rows()
    parts = [part(probs, labels, target=target) for part in (overconfidence, underconfidence)]
    torch.testing.assert_close(sum(parts), expected_calibration_error(probs, labels, target=target))
    assert min(parts) >= 0


def test_debiased_error_by_hand():
    """Bins of 4 and 5 rows: gaps 0.2 - 1/4 and 0.9 - 3/5, noise 3/16 / 3 and 6/25 / 4."""
    rows = event_counts((0.2, 4, 1), (0.9, 5, 3))
    square = (4 * (0.05**2 - 3 / 16 / 3) + 5 * (0.3**2 - 6 / 25 / 4)) / 9
    assert square < 0, "the noise explains it all"
    assert debiased_calibration_error(*rows, num_bins=2, binning="width") == 0
    many = event_counts((0.2, 40, 10), (0.9, 50, 30))
    square = (40 * (0.05**2 - 3 / 16 / 39) + 50 * (0.3**2 - 6 / 25 / 49)) / 90
    found = debiased_calibration_error(*many, num_bins=2, binning="width")
    assert found.item() == pytest.approx(math.sqrt(square), abs=1e-15)


def test_a_bin_of_one_row_has_the_largest_noise_or_counts_in_full():
    rows = event_counts((0.2, 1, 1), (0.9, 1, 1))
    square = ((0.8**2 - 0.25) + (0.1**2 - 0.25)) / 2
    found = debiased_calibration_error(*rows, num_bins=2, binning="width")
    assert found.item() == pytest.approx(math.sqrt(square), abs=1e-15)
    found = debiased_calibration_error(*rows, num_bins=2, binning="width", norm="l1")
    assert found.item() == pytest.approx((0.8 + 0.1) / 2, abs=1e-15)


def test_the_bias_of_the_l1_error_is_that_of_gaussian_noise():
    """By simulation, as the paper has it: accuracies drawn around what was seen."""
    rows = event_counts((0.2, 40, 10), (0.55, 20, 11), (0.9, 50, 43))
    confidence, accuracy = np.array([0.2, 0.55, 0.9]), np.array([10 / 40, 11 / 20, 43 / 50])
    counts = np.array([40, 20, 50])
    drawn = np.random.default_rng(0).normal(accuracy, np.sqrt(accuracy * (1 - accuracy) / counts), (400_000, 3))
    plug_in = (np.abs(accuracy - confidence) * counts).sum() / 110
    noisy = (np.abs(drawn - confidence) * counts).sum(1).mean() / 110
    found = debiased_calibration_error(*rows, num_bins=3, binning="width", norm="l1")
    assert found.item() == pytest.approx(max(2 * plug_in - noisy, 0), abs=2e-4)
    assert 0 < found.item() < plug_in


@pytest.mark.parametrize(
    ("of_classes", "of_events"),
    [
        (classwise_calibration_error, expected_calibration_error),
        (adaptive_calibration_error, ERRORS["mass"]),
        (ERRORS["smooth-classwise"], smooth_calibration_error),
        (partial(maximum_calibration_error, target="class"), maximum_calibration_error),
    ],
)
def test_an_error_of_classes_is_the_mean_of_each_as_an_event(of_classes, of_events):
    probs, labels = softmax_rows()
    each = torch.stack([of_events(probs[:, k], labels == k) for k in range(5)])
    torch.testing.assert_close(of_classes(probs, labels), each.mean())


def test_top_label_error_is_that_of_confidence_and_correctness():
    probs, labels = softmax_rows()
    confidence, predicted = probs.max(-1)
    for error in (expected_calibration_error, smooth_calibration_error):
        assert torch.equal(error(probs, labels), error(confidence, predicted == labels))


def test_the_first_of_equal_classes_is_the_top_label():
    scores, outcomes = events(torch.tensor([[0.25, 0.375, 0.375]] * 3), torch.tensor([0, 1, 2]))
    assert scores.tolist() == [[0.375]] * 3
    assert outcomes.tolist() == [[False], [True], [False]]


def test_empty_bins_contribute_nothing():
    rows = event_counts((0.35, 10, 6))
    for num_bins in (1, 10, 1000):
        assert expected_calibration_error(*rows, num_bins=num_bins).item() == pytest.approx(0.25)
    sums = torch.tensor([[0.0, 4.0], [0.0, 3.0], [0.0, 1.0]])
    for norm in ("l1", "l2", "max"):
        assert binned_error(sums, norm) == 0.5


def test_values_decide_nothing_about_what_they_are():
    """The same four numbers in one batch or in two: the sums of the bins add up, whatever range a batch has."""
    scores, labels = torch.tensor([0.1, 0.4, 0.6, 1.0]), torch.tensor([0, 1, 0, 1])
    whole = expected_calibration_error(scores, labels, num_bins=1)
    assert whole.item() == pytest.approx(abs(0.525 - 0.5))
    halves = [reliability_curve(scores[part], labels[part], num_bins=1) for part in (slice(0, 2), slice(2, 4))]
    gap = sum(half.counts * (half.confidence - half.accuracy) for half in halves) / 4
    torch.testing.assert_close(gap.abs().sum(), whole)


# zero


CALIBRATED = event_counts(*((k / 20, 20, k) for k in range(21)))


@every_error
@pytest.mark.parametrize("num_bins", [1, 10, 15, 30])
def test_zero_on_perfectly_calibrated_counts(error, num_bins):
    options = {} if error in (ERRORS["smooth"], ERRORS["smooth-classwise"]) else {"num_bins": num_bins}
    scores, labels = CALIBRATED
    for probs, task in (
        (scores, None),
        (torch.stack([1 - scores, scores], -1), None),
        (scores[:, None], "multilabel"),
    ):
        wanted = labels[:, None] if task else labels
        assert error(probs, wanted, task=task, **options).item() == pytest.approx(0, abs=1e-12)


@every_error
def test_certain_and_wrong_is_the_worst(error):
    probs = torch.tensor([[1.0, 0.0]]).repeat(10, 1)
    assert error(probs, torch.ones(10, dtype=torch.long)).item() == pytest.approx(1)


# independent references


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("num_bins", [5, 10, 15])
def test_binned_errors_are_those_of_torchmetrics(norm, num_bins):
    """Away from confidence 1, where it opens a bin too many."""
    probs, labels = softmax_rows()
    found = expected_calibration_error(probs, labels, num_bins=num_bins, norm=norm)
    expected = multiclass_calibration_error(probs, labels, num_classes=5, n_bins=num_bins, norm=norm)
    torch.testing.assert_close(found, expected.double(), atol=1e-6, rtol=0)
    scores, happened = event_rows()
    found = expected_calibration_error(scores, happened, num_bins=num_bins, norm=norm)
    expected = binary_calibration_error(scores, happened, n_bins=num_bins, norm=norm)
    torch.testing.assert_close(found, expected.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_bins", [5, 10, 15])
def test_binned_errors_are_those_of_netcal(num_bins):
    probs, labels = softmax_rows()
    measure = netcal.metrics.ECE(num_bins).measure
    top = expected_calibration_error(probs, labels, num_bins=num_bins)
    assert top.item() == pytest.approx(measure(probs.numpy(), labels.numpy()), abs=1e-12)
    largest = maximum_calibration_error(probs, labels, num_bins=num_bins)
    assert largest.item() == pytest.approx(netcal.metrics.MCE(num_bins).measure(probs.numpy(), labels.numpy()))
    by_class = [measure(probs[:, k].numpy(), (labels == k).long().numpy()) for k in range(5)]
    found = classwise_calibration_error(probs, labels, num_bins=num_bins)
    assert found.item() == pytest.approx(np.mean(by_class), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_smooth_error_is_that_of_relplot_in_the_interior(seed):
    """Within 2e-3: relplot looks for the width in steps of 2**-10."""
    scores, labels = event_rows(seed=seed, low=0.25, high=0.75)
    expected = relplot.smECE(scores.numpy(), labels.double().numpy())
    assert smooth_calibration_error(scores, labels).item() == pytest.approx(expected, abs=2e-3)


def test_smooth_error_counts_the_boundary_fully():
    """Two opposite gaps, one of them at confidence 1: counted with half its weight, as relplot does, it is 0.069."""
    scores, labels = event_counts((1.0, 1000, 700), (0.9, 1000, 1000))
    exact = smooth_error_by_quadrature(scores, labels)
    assert exact == pytest.approx(0.1028, abs=1e-4)
    assert smooth_calibration_error(scores, labels).item() == pytest.approx(exact, abs=1e-4)
    mirrored = smooth_calibration_error(1 - scores, 1 - labels)
    assert mirrored.item() == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("score", [0.0, 0.013, 0.5, 1.0])
def test_smooth_error_of_one_confidence_is_its_gap(score, share):
    """Mass of one sign cannot cancel, at whatever width and wherever it lies."""
    value = smooth_calibration_error(*event_counts((score, 100, int(100 * share))))
    assert value.item() == pytest.approx(abs(score - share), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("power", [0.3, 0.98, 2.0])
def test_smooth_error_is_within_one_per_cent_of_its_definition(seed, power):
    """What the grid of 1,025 points is said to cost, and 1e-4 below 0.01."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(12, generator=generator, dtype=torch.float64)
    groups = [(score, 500, round(500 * score**power)) for score in places.tolist()]
    scores, labels = event_counts(*groups)
    exact = smooth_error_by_quadrature(scores, labels)
    assert smooth_calibration_error(scores, labels).item() == pytest.approx(exact, rel=0.01, abs=1e-4)


# the curve


@pytest.mark.parametrize("num_bins", [4, 10, 15])
def test_the_curve_is_that_of_scikit_learn(num_bins):
    """Of the filled bins: scikit-learn leaves out the empty ones."""
    scores, labels = event_rows(low=0.2)
    curve = reliability_curve(scores, labels, num_bins=num_bins)
    filled = curve.counts > 0
    happened, predicted = calibration_curve(labels, scores, n_bins=num_bins, strategy="uniform")
    np.testing.assert_allclose(curve.accuracy[filled], happened, rtol=1e-12)
    np.testing.assert_allclose(curve.confidence[filled], predicted, rtol=1e-12)


@pytest.mark.parametrize("how", ["width", "mass"])
def test_the_error_is_the_weighted_gap_of_the_curve(how):
    probs, labels = softmax_rows()
    curve = reliability_curve(probs, labels, num_bins=7, binning=how)
    gaps = (curve.accuracy - curve.confidence).abs().nan_to_num(nan=0.0)
    expected = (curve.counts * gaps).sum() / curve.counts.sum()
    torch.testing.assert_close(expected_calibration_error(probs, labels, num_bins=7, binning=how), expected)


def test_the_curve_has_an_entry_for_every_bin():
    scores, labels = torch.tensor([0.5, 0.75, 0.75, 1.0]), torch.tensor([1, 1, 0, 1])
    curve = reliability_curve(scores, labels, num_bins=4)
    assert curve.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.counts.tolist() == [0, 1, 2, 1]
    assert curve.confidence.isnan().tolist() == curve.accuracy.isnan().tolist() == [True, False, False, False]
    assert curve.confidence[1:].tolist() == [0.5, 0.75, 1]
    assert curve.accuracy[1:].tolist() == [1, 0.5, 1]
    assert {column.dtype for column in curve} == {torch.float64}
