"""Selection: by a proper score, on rows that the fit has not seen, with doing nothing as a candidate."""

import json
import math

import pytest
import torch

from hf_calib import CALIBRATORS, AutoCalibrator, TemperatureScaling, select_calibrator
from hf_calib.calibrators.selection import _deal, held_out_log_probs


def problem(seed, rows=1000, classes=3, temperature=2.5):
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(rows, classes, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)
    return temperature * log_p, log_p.exp().multinomial(1, generator=generator)[:, 0]


def scores_of(calibrator):
    return {row.name: row.score for row in calibrator.selection}


# -- what it chooses


@pytest.mark.parametrize("score", ["nll", "brier"])
@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_temperature_on_scaled_logits(temperature, score):
    for seed in range(3):
        calibrator = select_calibrator(*problem(seed, temperature=temperature), score=score)
        assert calibrator.name == "temperature"
        assert calibrator.temperature.item() == pytest.approx(temperature, rel=0.2)


def test_mostly_identity_on_calibrated_logits():
    chosen = [select_calibrator(*problem(seed, temperature=1.0)).name for seed in range(20)]
    assert "isotonic" not in chosen
    assert chosen.count("identity") >= 12


def test_isotonic_on_many_rows_of_a_distortion_that_no_temperature_removes():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20_000, generator=generator, dtype=torch.float64)
    labels = torch.bernoulli(p, generator=generator).long()
    logits = torch.stack([1 - p**3, p**3], -1).log()
    for score in ("nll", "brier"):
        assert select_calibrator(logits, labels, score=score).name == "isotonic"


def test_of_equals_the_simplest():
    calibrator = select_calibrator(torch.zeros(30, 3), torch.arange(30) % 3, candidates=["temperature"])
    assert len(set(scores_of(calibrator).values())) == 1
    assert calibrator.name == "identity"


def test_the_winner_is_fitted_on_all_rows():
    logits, labels = problem(0)
    winner = select_calibrator(logits.reshape(10, 100, 3), labels.reshape(10, 100))
    assert torch.equal(winner.temperature, TemperatureScaling().fit(logits, labels).temperature)
    assert winner.provenance["rows"] == 1000


# -- the table


def test_identity_always_takes_part():
    assert list(scores_of(select_calibrator(*problem(0)))) == list(CALIBRATORS)
    for candidates in (["temperature"], ("temperature", "identity"), {"temperature"}):
        assert list(scores_of(select_calibrator(*problem(0), candidates=candidates))) == ["identity", "temperature"]
    assert list(scores_of(select_calibrator(*problem(0), candidates=[]))) == ["identity"]


@pytest.mark.parametrize("score", ["nll", "brier"])
def test_the_table_by_hand(score):
    logits, labels = problem(1)
    rows = select_calibrator(logits, labels, score=score, num_folds=4, seed=7).selection
    for row in rows:
        fit = CALIBRATORS[row.name]().fit
        log_probs = held_out_log_probs(fit, logits, labels, num_folds=4, seed=7)
        if score == "nll":
            scores = [-min(row_[label].item(), 0) for row_, label in zip(log_probs, labels, strict=True)]
        else:
            one_hot = torch.nn.functional.one_hot(labels, 3)
            scores = (log_probs.exp() - one_hot).square().sum(-1).tolist()
        mean = math.fsum(scores) / 1000
        variance = math.fsum((value - mean) ** 2 for value in scores) / 999
        assert row.score == pytest.approx(mean, rel=1e-9)
        assert row.standard_error == pytest.approx(math.sqrt(variance / 1000), rel=1e-9)
        assert 0 <= row.seconds < 60
    identity_nll = -logits.log_softmax(-1).gather(-1, labels[:, None]).mean().item()
    assert score == "brier" or rows[0].score == pytest.approx(identity_nll, rel=1e-9)


def test_the_table_is_kept_with_the_calibrator(tmp_path):
    calibrator = select_calibrator(*problem(0))
    calibrator.save_pretrained(tmp_path)
    kept = AutoCalibrator.from_pretrained(tmp_path).provenance["selection"]
    assert [entry["name"] for entry in kept] == list(CALIBRATORS)
    assert [entry["score"] for entry in kept] == list(scores_of(calibrator).values())
    assert "NaN" not in json.dumps(kept)


def test_the_seed_decides():
    logits, labels = problem(2)
    first, again, other = (scores_of(select_calibrator(logits, labels, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first["temperature"] != other["temperature"]
    assert first["identity"] == pytest.approx(other["identity"], rel=1e-12)


def test_the_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    select_calibrator(*problem(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_ignored_rows_take_no_part():
    logits, labels = problem(4)
    marked = labels.clone()
    marked[::4] = -1
    kept = marked != -1
    expected = select_calibrator(logits[kept], labels[kept])
    logits[::4] = torch.nan
    assert scores_of(select_calibrator(logits, marked, ignore_index=-1)) == scores_of(expected)


# -- folds


class Spy:
    """Stands for a calibrator: knows the rows that it was fitted on, and refuses to calibrate them."""

    def __init__(self, logits, labels):
        self.fitted_on = set(logits[:, 0].tolist())
        self.labels = labels

    def log_probs(self, logits):
        rows = set(logits[:, 0].tolist())
        assert not rows & self.fitted_on
        assert len(rows | self.fitted_on) == 103  # all others were used
        return logits


@pytest.mark.parametrize("num_folds", [2, 5, 103])
def test_no_row_calibrates_itself(num_folds):
    logits, labels = torch.arange(103.0)[:, None].expand(103, 3), torch.arange(103) % 3
    assert torch.equal(held_out_log_probs(Spy, logits, labels, num_folds=num_folds), logits)


@pytest.mark.parametrize("num_folds", [2, 3, 10])
def test_each_fold_gets_its_share_of_each_class(num_folds):
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 3)
    folds = _deal(labels, num_folds, seed=0)
    for of_class in (labels >= 0, labels == 0, labels == 1, labels == 2):
        counts = folds[of_class].bincount(minlength=num_folds)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(folds, _deal(labels, num_folds, seed=1))


def test_a_class_with_fewer_members_than_folds():
    logits, labels = problem(5, rows=100)
    labels = labels % 2
    labels[0] = 2
    assert all(math.isfinite(score) for score in scores_of(select_calibrator(logits, labels)).values())


@pytest.mark.parametrize("num_folds", [-1, 0, 1, 21])
def test_num_folds_out_of_bounds(num_folds):
    with pytest.raises(ValueError, match=rf"^num_folds: got {num_folds} for 20 rows"):
        select_calibrator(*problem(6, rows=20), num_folds=num_folds)


@pytest.mark.parametrize("num_folds", [2, 20])
def test_num_folds_at_the_bounds(num_folds):
    assert select_calibrator(*problem(7, rows=20), candidates=["isotonic"], num_folds=num_folds).num_labels == 3


# -- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ["temperature", "temprature"]}, r"^candidates: got 'temprature'; allowed are identity, temp"),
        ({"score": "ece"}, r"^score: got 'ece'; allowed are 'nll', 'brier'"),
    ],
)
def test_unknown_words(options, message):
    with pytest.raises(ValueError, match=message):
        select_calibrator(*problem(0, rows=20), **options)


def test_wrong_rows():
    with pytest.raises(ValueError, match=r"^labels: no row is left"):
        select_calibrator(torch.zeros(3, 2), torch.full((3,), -100))
