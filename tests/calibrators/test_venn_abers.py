"""Venn-Abers: equal to isotonic regressions with the row among the others, by scikit-learn, one row at a time."""

import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.isotonic import IsotonicRegression

from hf_calib.calibrators import AutoCalibrator, OneVsRest, VennAbersCalibration


def problem(seed=0, rows=60, levels=None):
    """Scores and labels; with `levels`, scores of so many values."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, generator=generator, dtype=torch.float64)
    if levels:
        scores = torch.randint(levels, (rows,), generator=generator).double() - levels / 2
    return scores, torch.bernoulli((2 * scores).sigmoid(), generator=generator).long()


def with_the_row_added(scores, labels, weights, score):
    """Isotonic regression's value at a score, with it among the rows as a 0 and as a 1."""
    found = []
    for outcome in (0.0, 1.0):
        x, y, w = np.append(scores, score), np.append(labels, outcome), np.append(weights, 1.0)
        found.append(float(IsotonicRegression().fit(x, y, sample_weight=w).predict([score])[0]))
    return found


@pytest.mark.parametrize("weighted", [False, True], ids=["equal rows", "weighted rows"])
@pytest.mark.parametrize(("rows", "levels"), [(60, None), (60, 7), (60, 2), (1, None), (2, None), (5, 3)])
def test_equals_isotonic_regression_with_the_row_added(rows, levels, weighted):
    for seed in range(6):
        scores, labels = problem(seed, rows, levels)
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
        weights = weights / weights.mean() if weighted else torch.ones(rows, dtype=torch.float64)
        calibrator = VennAbersCalibration(task="binary").fit(scores, labels, sample_weight=weights)
        asked = torch.cat([scores, scores + 0.01, scores - 0.01, torch.tensor([-9.0, 0, 9])])
        expected = [with_the_row_added(scores, labels, weights, float(score)) for score in asked]
        lower, upper = calibrator.interval(asked)
        torch.testing.assert_close(
            torch.stack([lower, upper], -1), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0
        )
        merged = upper / (1 - lower + upper)
        torch.testing.assert_close(calibrator.log_probs(asked).exp(), merged, atol=1e-12, rtol=0)


@pytest.mark.parametrize("outcome", [0, 1])
def test_one_outcome_only(outcome):
    scores, _ = problem(rows=9)
    calibrator = VennAbersCalibration(task="binary").fit(scores, torch.full((9,), outcome))
    lower, upper = calibrator.interval(scores)
    assert (lower[-1] == 0) if outcome == 0 else (upper[-1] == 1)
    probs = calibrator.log_probs(scores).exp()
    assert ((probs > 0) & (probs < 1)).all()


def test_the_interval_narrows_with_the_rows():
    wide, narrow = (
        torch.stack(VennAbersCalibration(task="binary").fit(*problem(rows=rows)).interval(torch.zeros(1).double()))
        for rows in (50, 5000)
    )
    assert wide.diff(dim=0) > 0.01
    assert narrow.diff(dim=0) < wide.diff(dim=0) / 3


def test_one_of_the_two_is_calibrated():
    """The theorem: with p0 and p1 chosen by what happens, the mean of the probabilities is that of the outcomes."""
    chosen, outcomes = [], []
    for seed in range(400):
        scores, labels = problem(seed, rows=30)
        calibrator = VennAbersCalibration(task="binary").fit(scores[1:] ** 3, labels[1:])
        chosen.append(torch.stack(calibrator.interval(scores[:1] ** 3))[int(labels[0]), 0])
        outcomes.append(float(labels[0]))
    errors = np.array(chosen) - np.array(outcomes)
    assert abs(errors.mean()) < 2 * errors.std() / len(errors) ** 0.5


def test_two_classes_one_logit_and_several_labels_are_the_same():
    scores, labels = problem()
    logits = torch.stack([-scores / 2, scores / 2], dim=-1)
    pair = VennAbersCalibration().fit(logits, labels)
    one = VennAbersCalibration(task="binary").fit(scores, labels)
    several = VennAbersCalibration(task="multilabel").fit(scores[:, None], labels[:, None])
    for k in range(2):
        torch.testing.assert_close(pair.interval(logits)[k], one.interval(scores)[k], atol=0, rtol=0)
        assert torch.equal(several.interval(scores[:, None])[k][:, 0], one.interval(scores)[k])


def test_impossible_classes_and_shapes():
    scores, labels = problem()
    calibrator = VennAbersCalibration().fit(torch.stack([0 * scores, scores], dim=-1), labels)
    logits = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0], [0.0, 1.0], [torch.nan, 0.0]])
    lower, upper = calibrator.interval(logits.view(2, 2, 2))
    assert lower.shape == upper.shape == (2, 2)
    assert lower[0].tolist() == upper[0].tolist() == [0, 1]
    assert lower[1].isnan().tolist() == [False, True]
    assert calibrator.log_probs(logits)[:2].exp().tolist() == [[1, 0], [0, 1]]


def test_three_classes_by_one_against_the_rest():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(300, 3, generator=generator), torch.randint(3, (300,), generator=generator)
    with pytest.raises(ValueError, match=r"^logits: got 3 classes.*OneVsRest\(VennAbersCalibration\(\)\)"):
        VennAbersCalibration().fit(logits, labels)
    probs = OneVsRest(VennAbersCalibration()).fit(logits, labels).log_probs(logits).exp()
    assert (probs > 0).all()


def test_many_rows_take_seconds_at_most():
    started = time.perf_counter()
    calibrator = VennAbersCalibration(task="binary").fit(*problem(rows=100_000))
    assert time.perf_counter() - started < 5
    assert len(calibrator.edges) < 200_000


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("edges", torch.tensor([2.0, 1.0]).double(), "shapes"),
        ("lower", torch.ones(5).double(), "shapes"),
        ("upper", None, "do not rise"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, value, message):
    calibrator = VennAbersCalibration(task="binary").fit(*problem())
    calibrator.save_pretrained(tmp_path)
    path = tmp_path / "calibrator.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name].flip(0).contiguous() if value is None else value
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        AutoCalibrator.from_pretrained(tmp_path)
