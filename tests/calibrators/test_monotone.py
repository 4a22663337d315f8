"""Isotonic calibration: scikit-learn's, one class against the rest, made to sum to 1."""

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from hf_calib import IsotonicCalibration
from hf_calib.calibrators import CentredIsotonicCalibration
from hf_calib.calibrators.monotone import interpolate


def problem(seed, rows=400, classes=4, levels=None):
    """Distorted logits and labels; with `levels`, logits of so many values, so that many probabilities are equal."""
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(rows, classes, generator=generator, dtype=torch.float64).log_softmax(-1)
    if levels:
        log_p = torch.randint(levels, (rows, classes), generator=generator).double().log_softmax(-1)
    labels = log_p.exp().multinomial(1, generator=generator)[:, 0]
    return 1.5 * log_p + (log_p / 2).sin(), labels


def one_against_the_rest(logits, labels, weights, test_logits):
    """Probabilities by scikit-learn's estimator."""
    probs, test_probs = logits.softmax(-1).numpy(), test_logits.softmax(-1).numpy()
    columns = []
    for k in range(probs.shape[1]):
        regression = IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1)
        regression.fit(probs[:, k], (labels == k).numpy(), sample_weight=weights)
        columns.append(regression.predict(test_probs[:, k]))
    values = np.stack(columns, axis=1)
    total = values.sum(1, keepdims=True)
    uniform = np.full_like(values, 1 / values.shape[1])
    return torch.from_numpy(np.divide(values, total, out=uniform, where=total > 0))


@pytest.mark.parametrize("levels", [None, 3], ids=["distinct", "tied"])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal rows", "weighted rows"])
@pytest.mark.parametrize(("rows", "classes"), [(400, 2), (400, 4), (12, 3), (60, 20), (1, 3)])
def test_equals_scikit_learn(rows, classes, weighted, levels):
    for seed in range(5):
        logits, labels = problem(seed, rows, classes, levels)
        test_logits = torch.cat([logits, problem(100 + seed, 300, classes)[0] * 2])
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
        weights = weights if weighted else None
        calibrator = IsotonicCalibration().fit(logits, labels, sample_weight=weights)
        expected = one_against_the_rest(logits, labels, None if weights is None else weights.numpy(), test_logits)
        torch.testing.assert_close(calibrator.log_probs(test_logits).exp(), expected, atol=1e-9, rtol=0)


def test_rows_that_every_class_excludes_are_uniform_over_the_possible_classes():
    logits = torch.tensor([[0.9, 0.1, 0], [0.1, 0.9, 0], [0.3, 0.3, 0.4]]).log()
    calibrator = IsotonicCalibration().fit(
        torch.tensor([[8.0, 0, -8], [0, 8, -8], [-8, 0, 8]]), torch.tensor([0, 1, 2])
    )
    calibrator.values.zero_()
    probs = calibrator.log_probs(logits).exp()
    torch.testing.assert_close(probs, torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]))


def test_a_class_that_the_labels_miss_gets_nothing_but_stays_finite():
    logits, labels = problem(0)
    log_probs = IsotonicCalibration().fit(logits, labels % 3).log_probs(logits)
    assert log_probs.isfinite().all()
    assert (log_probs[:, 3] < -80).all()


def test_it_undoes_a_distortion_that_no_temperature_can():
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(20_000, generator=generator, dtype=torch.float64)
    labels = torch.bernoulli(p, generator=generator).long()
    distorted = p**3  # always too low
    logits = torch.stack([1 - distorted, distorted], -1).log()
    found = IsotonicCalibration().fit(logits, labels).log_probs(logits).exp()[:, 1]
    assert (found - p).abs().mean() < 0.02


def test_the_state_is_small_rising_and_within_0_and_1():
    calibrator = IsotonicCalibration().fit(*problem(2, rows=5000))
    for tensor in calibrator.tensors().values():
        assert tensor.dtype == torch.float64
        assert (tensor.diff(dim=-1) >= 0).all()
        assert tensor.min() >= 0
        assert tensor.max() <= 1
        assert tensor.shape[0] == 4
        assert tensor.shape[1] < 400  # knots, not rows


def test_weights_count_within_equal_scores():
    logits = torch.zeros(2, 2)
    calibrator = IsotonicCalibration().fit(logits, torch.tensor([1, 0]), sample_weight=torch.tensor([3.0, 1.0]))
    assert calibrator.log_probs(logits).exp()[0].tolist() == pytest.approx([0.25, 0.75])


def test_a_hundred_classes_at_once_are_each_alone():
    """All functions in one call of the solver, in blocks of classes: equal to scikit-learn class by class."""
    logits, labels = problem(3, 2000, 100)
    expected = one_against_the_rest(logits, labels, None, logits)
    found = IsotonicCalibration().fit(logits, labels).log_probs(logits).exp()
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


# -- the top class alone


def test_the_top_class_is_mapped_and_the_rest_keep_their_proportions():
    logits, labels = problem(1, 3000)
    calibrator = IsotonicCalibration(target="top").fit(logits, labels)
    probs, found = logits.softmax(-1), calibrator.log_probs(logits).exp()
    confidence, top = probs.max(-1)
    regression = IsotonicRegression(out_of_bounds="clip").fit(confidence, (top == labels).numpy())
    expected = torch.from_numpy(regression.predict(confidence))
    inside = expected > 0.55  # the others cannot come above it there
    assert inside.any()
    torch.testing.assert_close(found.gather(-1, top[:, None])[inside, 0], expected[inside], atol=1e-9, rtol=0)
    rest, found_rest = (x.scatter(-1, top[:, None], 0) for x in (probs, found))
    torch.testing.assert_close(
        found_rest / found_rest.sum(-1, keepdim=True), rest / rest.sum(-1, keepdim=True), atol=1e-7, rtol=0
    )
    assert torch.equal(found.argmax(-1), top)
    assert calibrator.preserves_accuracy


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"^target: got 'label'; allowed are 'class', 'top'"):
        IsotonicCalibration(target="label")


# -- centred


def test_centred_by_hand():
    """Scores .1 (wrong), .3 (right), .8 (wrong), .9 (right): the middle pair is one point at .55, of value 1/2."""
    scores = torch.tensor([0.1, 0.3, 0.8, 0.9], dtype=torch.float64).logit()
    calibrator = CentredIsotonicCalibration(task="binary").fit(scores, torch.tensor([0, 1, 0, 1]))
    at = torch.tensor([0.05, 0.1, 0.325, 0.55, 0.725, 0.9, 0.95], dtype=torch.float64)
    expected = torch.tensor([0, 0, 0.25, 0.5, 0.75, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(calibrator.log_probs(at.logit()).exp(), expected, atol=1e-9, rtol=0)


def test_centred_keeps_different_scores_different():
    logits, labels = problem(4, 500, 2)
    scores = (logits[:, 1] - logits[:, 0]).sort().values
    flat, centred = (kind(task="binary").fit(logits[:, 1] - logits[:, 0], labels) for kind in (
        IsotonicCalibration, CentredIsotonicCalibration))  # fmt: skip
    inside = slice(60, -60)
    assert (centred(scores)[inside].diff() > 0).all()
    assert (flat(scores)[inside].diff() == 0).any()


@pytest.mark.parametrize("seed", range(3))
def test_interpolate_equals_numpy(seed):
    generator = torch.Generator().manual_seed(seed)
    thresholds = torch.rand(3, 6, generator=generator, dtype=torch.float64).sort(-1).values
    values = torch.rand(3, 6, generator=generator, dtype=torch.float64).sort(-1).values
    thresholds[1, 4:], values[1, 4:] = thresholds[1, 3], values[1, 3]  # as padding does
    scores = torch.cat([torch.rand(3, 50, generator=generator, dtype=torch.float64) * 1.4 - 0.2, thresholds], -1)
    expected = [np.interp(*rows) for rows in zip(scores.numpy(), thresholds.numpy(), values.numpy(), strict=True)]
    torch.testing.assert_close(interpolate(scores, thresholds, values), torch.from_numpy(np.stack(expected)))
