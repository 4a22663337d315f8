"""Two classes: optima of logistic regressions, raw scores of any origin, and what lies outside the fitted range."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hf_calib.calibrators import BetaCalibration, OneVsRest, PlattScaling, QuadraticScaling


KINDS = [PlattScaling, BetaCalibration, QuadraticScaling]
every_kind = pytest.mark.parametrize("kind", KINDS)


def events(rows=2000, slope=0.5, bias=-0.4, seed=0):
    """Scores d of events whose log-odds are `slope * d + bias`."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(rows, generator=generator, dtype=torch.float64)
    return scores, (slope * scores + bias).sigmoid().bernoulli(generator=generator).long()


def nll(calibrator, scores, labels):
    mapped = calibrator(scores)
    return torch.nn.functional.binary_cross_entropy_with_logits(mapped, labels.double()).item()


def test_platt_is_scikit_learns_logistic_regression():
    scores, labels = events()
    weights = torch.arange(2000) % 3 + 0.5
    expected = LogisticRegression(C=np.inf, tol=1e-10).fit(scores[:, None], labels, sample_weight=weights)
    found = PlattScaling(task="binary").fit(scores, labels, sample_weight=weights)
    assert found.slope.item() == pytest.approx(expected.coef_.item(), rel=1e-4)
    assert found.intercept.item() == pytest.approx(expected.intercept_.item(), rel=1e-4)
    assert found.slope.item() == pytest.approx(0.5, abs=0.05)


def test_beta_is_logistic_regression_of_both_logarithms():
    scores, labels = events()
    features = torch.stack([torch.nn.functional.logsigmoid(scores), -torch.nn.functional.logsigmoid(-scores)], -1)
    expected = LogisticRegression(C=np.inf, tol=1e-10).fit(features, labels)
    found = BetaCalibration(task="binary").fit(scores, labels)
    assert (expected.coef_ > 0).all()
    assert [found.a.item(), found.b.item()] == pytest.approx(expected.coef_[0].tolist(), rel=1e-3)
    assert found.c.item() == pytest.approx(expected.intercept_.item(), rel=1e-3)


def test_a_bend_is_found():
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    truth = torch.where(scores > 0, 2 * scores, 0.3 * scores)
    labels = truth.sigmoid().bernoulli(generator=generator).long()
    losses = [nll(kind(task="binary").fit(scores, labels), scores, labels) for kind in KINDS]
    truth_nll = torch.nn.functional.binary_cross_entropy_with_logits(truth, labels.double()).item()
    assert losses[1] < losses[0] - 0.01
    assert losses[2] < losses[0] - 0.01
    assert losses[1] == pytest.approx(truth_nll, abs=6e-3)


@every_kind
def test_the_fit_is_not_worse_than_the_scores_themselves(kind):
    for slope, bias, rows in ((1.0, 0.0, 50), (0.5, 1.0, 30), (2.0, -2.0, 2000), (-1.0, 0.0, 200)):
        scores, labels = events(rows, slope, bias)
        before = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels.double()).item()
        assert nll(kind(task="binary").fit(scores, labels), scores, labels) <= before + 1e-9


@every_kind
@pytest.mark.parametrize("unit", [1e-30, 1e-3, 1e3, 1e30])
def test_the_unit_of_raw_scores(kind, unit):
    """Platt and quadratic scaling do not depend on it; beta needs scores that are log-odds, and is defined anyway."""
    scores, labels = events()
    found = kind(task="binary").fit(scores * unit, labels).log_probs(scores * unit)
    assert found.isfinite().all()
    if kind is not BetaCalibration:
        torch.testing.assert_close(found, kind(task="binary").fit(scores, labels).log_probs(scores), atol=1e-5, rtol=0)


@every_kind
def test_constant_scores_give_the_base_rate(kind):
    labels = torch.tensor([1, 1, 1, 0])
    for value in (0.0, 3.0):
        scores = torch.full((4,), value, dtype=torch.float64)
        assert kind(task="binary").fit(scores, labels).log_probs(scores).exp().tolist() == pytest.approx([0.75] * 4)


@every_kind
def test_separated_labels_warn_and_stay_bounded(kind):
    scores, labels = torch.tensor([-2.0, -1, 1, 2]), torch.tensor([0, 0, 1, 1])
    with pytest.warns(UserWarning, match=f"^{kind.name}: no finite map is best") as caught:
        calibrator = kind(task="binary").fit(scores, labels)
    assert caught[0].filename == __file__
    probs = calibrator.log_probs(scores).exp()
    assert (probs[2:] > 0.5).all()
    assert (probs[:2] < 0.5).all()
    assert probs.isfinite().all()


@every_kind
def test_far_outside_the_fitted_range_a_surer_score_means_no_less(kind):
    calibrator = kind(task="binary").fit(*events())
    far = torch.tensor([-1e6, -1e3, -50.0, 0.0, 50.0, 1e3, 1e6], dtype=torch.float64)
    assert (calibrator(far).diff() >= 0).all()


def test_falling_scores():
    scores, labels = events()
    up, down = (PlattScaling(task="binary").fit(sign * scores, labels) for sign in (1, -1))
    assert down.slope.item() == pytest.approx(-up.slope.item(), rel=1e-6)


@every_kind
def test_three_classes_are_refused_and_lifted(kind):
    logits, labels = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    with pytest.raises(ValueError, match=rf"^logits: got 3 classes; allowed for {kind.name} are 2. OneVsRest\("):
        kind().fit(logits, labels)
    assert OneVsRest(kind()).fit(logits, labels).log_probs(logits).exp().sum(-1).tolist() == pytest.approx([1] * 60)
