"""Proper scores: values by hand, scikit-learn's values, and lowest for the truth."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from hf_calib.functional import accuracy, brier_score, negative_log_likelihood
from hf_calib.functional.checks import PROBABILITY_FLOOR

from .every import every_dtype


FLOOR_NATS = 126 * math.log(2)
SCORES = [brier_score, negative_log_likelihood]
every_score = pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(5, (200,), generator=generator)


# by hand


def test_scores_by_hand():
    probs, labels = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]], dtype=torch.float64), torch.tensor([0, 2])
    expected = [0.3**2 + 0.2**2 + 0.1**2, 0.5**2 + 0.25**2 + 0.75**2]
    assert brier_score(probs, labels, reduction="none").tolist() == pytest.approx(expected)
    surprise = negative_log_likelihood(probs, labels, reduction="none")
    assert surprise.tolist() == pytest.approx([-math.log(0.7), -math.log(0.25)])
    assert accuracy(probs, labels, reduction="none").tolist() == [1, 0]


def test_scores_of_events_by_hand():
    scores, labels = torch.tensor([0.9, 0.4], dtype=torch.float64), torch.tensor([1, 0])
    assert brier_score(scores, labels, reduction="none").tolist() == pytest.approx([0.01, 0.16])
    surprise = negative_log_likelihood(scores, labels, reduction="none")
    assert surprise.tolist() == pytest.approx([-math.log(0.9), -math.log(0.6)])


@every_score
def test_a_multilabel_row_has_the_mean_of_its_labels(score):
    probs, labels = torch.tensor([[0.9, 0.4], [0.2, 1.0]]), torch.tensor([[1, 0], [1, 1]])
    found = score(probs, labels, task="multilabel", reduction="none")
    torch.testing.assert_close(found, score(probs.view(-1), labels.view(-1), reduction="none").view(2, 2).mean(1))


@every_dtype
def test_the_floor_of_a_probability_is_the_same_for_every_dtype(dtype):
    impossible = torch.tensor([[1.0, 0.0]], dtype=dtype)
    label = torch.tensor([1])
    assert torch.finfo(torch.float32).tiny == PROBABILITY_FLOOR
    for value in (
        negative_log_likelihood(impossible, label),
        negative_log_likelihood(log_probs=impossible.log(), labels=label),
        negative_log_likelihood(impossible[:, 1], label),
        negative_log_likelihood(impossible[:, 0], 1 - label),
    ):
        assert value.item() == pytest.approx(FLOOR_NATS, abs=1e-12)


@every_dtype
def test_certainty_that_is_right_has_score_0_and_not_minus_0(dtype):
    certain, label = torch.tensor([[1.0, 0.0]], dtype=dtype), torch.tensor([0])
    for value in (
        brier_score(certain, label),
        negative_log_likelihood(certain, label),
        negative_log_likelihood(certain[:, 0], 1 - label),
        negative_log_likelihood(log_probs=certain.log(), labels=label),
    ):
        assert (value.item(), math.copysign(1, value.item())) == (0, 1)


# references


def test_scores_are_those_of_scikit_learn(rows):
    logits, labels = rows
    probs, columns = logits.softmax(-1), range(5)
    assert negative_log_likelihood(probs, labels).item() == pytest.approx(log_loss(labels, probs, labels=columns))
    expected = brier_score_loss(labels, probs.numpy(), labels=list(columns), scale_by_half=False)
    assert brier_score(probs, labels).item() == pytest.approx(expected)
    assert accuracy(probs, labels).item() == pytest.approx(accuracy_score(labels, probs.argmax(-1)))


def test_scores_of_events_are_those_of_scikit_learn(rows):
    scores, labels = rows[0][:, 0].sigmoid(), (rows[1] > 2).long()
    assert brier_score(scores, labels).item() == pytest.approx(brier_score_loss(labels, scores.numpy()))
    assert negative_log_likelihood(scores, labels).item() == pytest.approx(log_loss(labels, scores))


# laws


@every_score
def test_the_truth_has_the_lowest_expected_score(score):
    """Labels in the exact proportions of the truth: every other forecast is worse."""
    truth = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    others = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = others / others.sum(-1, keepdim=True)
    best = score(truth.expand(10, 3), labels)
    assert all(score(other.expand(10, 3), labels) > best for other in others)


@every_score
def test_the_mean_is_that_of_the_rows_that_are_kept(score, rows):
    probs, labels = rows[0].softmax(-1), rows[1].clone()
    labels[::3] = -100
    values = score(probs, labels, reduction="none")
    assert values.shape == (int((labels != -100).sum()),)
    assert values.dtype == torch.float64
    torch.testing.assert_close(score(probs, labels), values.mean())


def test_accuracy_takes_the_first_of_equals():
    assert accuracy(torch.full((4, 4), 0.25), torch.arange(4), reduction="none").tolist() == [1, 0, 0, 0]


def test_accuracy_needs_classes():
    with pytest.raises(ValueError, match=r"probs: got shape \(2,\); accuracy needs"):
        accuracy(torch.tensor([0.5, 0.5]), torch.tensor([0, 1]))


# log-probabilities


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 0.01), (torch.bfloat16, 0.05)],
    ids=str,
)
def test_log_probs_give_the_same_as_probs(rows, dtype, tolerance):
    logits, labels = rows
    expected = negative_log_likelihood(logits.softmax(-1), labels, reduction="none")
    found = negative_log_likelihood(log_probs=logits.to(dtype).log_softmax(-1), labels=labels, reduction="none")
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_log_probs_flatten_and_leave_out_ignored_rows(rows):
    log_probs, labels = rows[0].log_softmax(-1), rows[1].clone()
    expected = negative_log_likelihood(log_probs=log_probs[50:], labels=labels[50:])
    labels[:50] = 7
    nonsense = torch.cat([torch.full((50, 5), math.nan), log_probs[50:]])
    found = negative_log_likelihood(log_probs=nonsense.view(10, 20, 5), labels=labels.view(10, 20), ignore_index=7)
    torch.testing.assert_close(found, expected)


def test_log_probs_keep_what_probs_lose():
    """exp(-40) beside 1: the other class's float32 probability is 1, its surprise is exp(-40) all the same."""
    log_probs = torch.tensor([[-4.25e-18, -40.0]], dtype=torch.float64)
    assert negative_log_likelihood(log_probs=log_probs, labels=torch.tensor([0])).item() == pytest.approx(4.25e-18)
    assert negative_log_likelihood(log_probs.exp(), torch.tensor([0])).item() == 0


def test_log_probs_of_a_masked_class_are_accepted():
    log_probs = torch.tensor([[0.3, -math.inf, 1.0]]).log_softmax(-1)
    value = negative_log_likelihood(log_probs=log_probs, labels=torch.tensor([0]))
    assert value.item() == pytest.approx(math.log1p(math.exp(0.7)), abs=1e-6)


def test_log_probs_just_above_0_count_as_certainty():
    value = negative_log_likelihood(log_probs=torch.tensor([[5e-4, -math.inf]]), labels=torch.tensor([0]))
    assert value == 0


@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
@every_dtype
def test_rounded_log_probs_of_70000_classes_are_accepted(dtype, scale):
    logits = scale * torch.randn(4, 70000, generator=torch.Generator().manual_seed(0))
    log_probs, labels = logits.log_softmax(-1), torch.arange(4)
    expected = negative_log_likelihood(log_probs=log_probs, labels=labels)
    found = negative_log_likelihood(log_probs=log_probs.to(dtype), labels=labels)
    torch.testing.assert_close(found, expected, rtol=float(torch.finfo(dtype).eps), atol=0)


GOOD = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()


@pytest.mark.parametrize(
    ("log_probs", "labels", "message"),
    [
        (torch.tensor([[2.0, -1.0], [0.0, 1.0]]), [0, 1], r"log_probs: a row's logsumexp is off 0 by 2.*log_softmax"),
        (GOOD.exp(), [0, 1], "log_probs: a row's logsumexp is off 0 by"),
        (GOOD * math.nan, [0, 1], "log_probs: a row's logsumexp is off 0 by inf"),
        (GOOD * math.inf, [0, 1], "log_probs: a row's logsumexp is off 0"),
        (GOOD - GOOD * math.inf, [0, 1], "log_probs: a row's logsumexp is off 0"),
        (GOOD[:, 0], [0, 1], r"log_probs: got shape \(2,\); allowed are \(\.\.\., C\) rows"),
        (GOOD.long(), [0, 1], r"log_probs: got a torch\.int64 tensor"),
        (GOOD.tolist(), [0, 1], "log_probs: got list"),
        (GOOD, [0, 2], "labels: got 2; allowed are 0 to 1"),
        (GOOD, [-1, 0], "labels: got -1; allowed are 0 to 1"),
        (GOOD, [0.0, 1.0], r"labels: got a torch\.float32 tensor"),
        (GOOD, [0, 1, 1], r"labels: got shape \(3,\) for log_probs of shape \(2, 2\)"),
        (GOOD, [-100, -100], "labels: no row is left"),
    ],
)
def test_what_are_no_log_probabilities_is_refused(log_probs, labels, message):
    with pytest.raises(ValueError, match=message):
        negative_log_likelihood(log_probs=log_probs, labels=torch.tensor(labels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.tensor([0, 1])}, "probs: give either probs or log_probs=, not both and not neither"),
        ({"probs": GOOD.exp(), "log_probs": GOOD, "labels": torch.tensor([0, 1])}, "probs: give either"),
        ({"log_probs": GOOD}, "labels: got NoneType"),
        ({"probs": GOOD.exp()}, "labels: got NoneType"),
        ({"log_probs": GOOD, "labels": torch.tensor([0, 1]), "task": "multilabel"}, "task: got 'multilabel'"),
    ],
)
def test_probs_or_log_probs_with_labels(arguments, message):
    with pytest.raises(ValueError, match=message):
        negative_log_likelihood(**arguments)


@every_dtype
def test_scores_are_computed_in_float64(dtype):
    """Against NumPy on the same rounded numbers: nothing is rounded a second time."""
    probs = torch.rand(300, 7, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1).to(dtype)
    labels = torch.arange(300) % 7
    exact = probs.double().numpy()
    truth = np.eye(7)[labels]
    assert brier_score(probs, labels).item() == pytest.approx(((exact - truth) ** 2).sum(1).mean(), rel=1e-12)
    expected = -np.log(exact[np.arange(300), labels]).mean()
    assert negative_log_likelihood(probs, labels).item() == pytest.approx(expected, rel=1e-12)
