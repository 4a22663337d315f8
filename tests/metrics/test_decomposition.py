"""The split of a proper score: it adds up, the truth has nothing to remove, and what a calibrator removes is found."""

import pytest
import torch

from hf_calib import TemperatureScaling
from hf_calib.functional import brier_score, negative_log_likelihood
from hf_calib.metrics import score_decomposition


FUNCTIONS = {"nll": negative_log_likelihood, "brier": brier_score}
every_score = pytest.mark.parametrize("score", FUNCTIONS)


def rows(num_rows=4000, *, seed=0):
    """True probabilities and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    truth = logits.softmax(-1)
    return truth, truth.multinomial(1, generator=generator)[:, 0]


@every_score
@pytest.mark.parametrize("form", ["classes", "events", "multilabel"])
def test_the_parts_add_up_to_the_score(score, form):
    truth, labels = rows(300)
    task = None
    if form == "events":
        truth, labels = truth[:, 0], (labels == 0).long()
    if form == "multilabel":
        labels, task = (labels[:, None] == torch.arange(3)).long(), "multilabel"
    parts = score_decomposition(truth, labels, score=score, calibrator="temperature", task=task)
    assert parts.total.item() == pytest.approx(FUNCTIONS[score](truth, labels, task=task).item(), abs=1e-12)
    assert (parts.calibration + parts.refinement).item() == pytest.approx(parts.total.item(), abs=1e-12)
    assert {part.dtype for part in parts} == {torch.float64}


@every_score
def test_the_truth_has_nothing_to_remove(score):
    truth, labels = rows()
    for calibrator in (None, "identity", "temperature"):
        parts = score_decomposition(truth, labels, score=score, calibrator=calibrator)
        assert parts.calibration.item() == pytest.approx(0, abs=2e-3)


@every_score
def test_refinement_is_the_score_of_the_truth_behind_a_distortion(score):
    truth, labels = rows()
    sure = (2.5 * truth.log()).softmax(-1)
    best = FUNCTIONS[score](truth, labels).item()
    for calibrator in (None, "temperature"):
        parts = score_decomposition(sure, labels, score=score, calibrator=calibrator)
        assert parts.calibration > 0.01
        assert parts.refinement.item() == pytest.approx(best, abs=3e-3)


def test_what_is_fitted_on_the_rows_themselves_promises_more():
    """On few rows isotonic memorises: fitted on all of them it shows a refinement that no other rows would."""
    truth, labels = rows(60)
    from hf_calib import IsotonicCalibration

    fitted = IsotonicCalibration().fit(truth.log(), labels).log_probs(truth.log())
    parts = score_decomposition(truth, labels, calibrator="isotonic")
    assert negative_log_likelihood(log_probs=fitted, labels=labels) < parts.total < parts.refinement


def test_temperature_removes_what_its_own_fit_removes():
    truth, labels = rows()
    sure = (2.5 * truth.log()).softmax(-1)
    fitted = TemperatureScaling().fit(sure.log(), labels).log_probs(sure.log())
    parts = score_decomposition(sure, labels, calibrator="temperature")
    assert parts.refinement.item() == pytest.approx(
        negative_log_likelihood(log_probs=fitted, labels=labels).item(), abs=2e-3
    )


def test_certainty_that_is_wrong_has_a_defined_split():
    probs, labels = torch.eye(2).repeat(20, 1), torch.tensor([0, 1] * 18 + [1, 0] * 2)
    parts = score_decomposition(probs, labels, calibrator="temperature")
    assert all(part.isfinite() for part in parts)
    assert parts.calibration > 5


def test_wrong_arguments_are_refused():
    truth, labels = rows(20)
    with pytest.raises(ValueError, match=r"^score: got 'ece'; allowed are 'nll', 'brier'"):
        score_decomposition(truth, labels, score="ece")
    with pytest.raises(ValueError, match=r"^calibrator: got 'magic'; allowed are identity"):
        score_decomposition(truth, labels, calibrator="magic")
    with pytest.raises(ValueError, match=r"^num_folds: got 50 for 20 rows"):
        score_decomposition(truth, labels, num_folds=50)
    with pytest.raises(ValueError, match=r"^probs: row 0 sums to"):
        score_decomposition(truth.log(), labels)
