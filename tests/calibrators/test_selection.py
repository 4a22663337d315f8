"""Selection: by a proper score, on rows that the fit has not seen, with doing nothing as a candidate."""

import json
import math
import warnings

import pytest
import torch

from hf_calib import CALIBRATORS, AutoCalibrator, TemperatureScaling, select_calibrator
from hf_calib.calibrators.ensemble import HeldOutNLL
from hf_calib.calibrators.folds import deal_rows, held_out_log_probs
from hf_calib.calibrators.rows import check_rows


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
        calibrator = select_calibrator(*problem(seed, temperature=temperature), score=score, tolerance=2.0)
        assert calibrator.name == "temperature"
        assert calibrator.temperature.item() == pytest.approx(temperature, rel=0.2)


def test_mostly_identity_on_calibrated_logits():
    chosen = [select_calibrator(*problem(seed, temperature=1.0), tolerance=2.0).name for seed in range(20)]
    assert "isotonic" not in chosen
    assert chosen.count("identity") >= 12


def distorted(rows=20_000):
    """Events of probability p of which the model says p cubed."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(rows, generator=generator, dtype=torch.float64)
    return torch.stack([1 - p**3, p**3], -1).log(), torch.bernoulli(p, generator=generator).long()


def test_a_distortion_that_no_temperature_removes():
    logits, labels = distorted()
    for score in ("nll", "brier"):
        calibrator = select_calibrator(logits, labels, score=score, candidates=["temperature", "isotonic"])
        scores = scores_of(calibrator)
        assert scores["isotonic"] < scores["temperature"] - 0.01
        assert calibrator.name == "isotonic" or calibrator.mixture[-1] > 0.5
    assert select_calibrator(logits, labels, tolerance=2.0).name != "temperature"


# -- the mean


def test_a_mean_beats_its_members_on_other_rows():
    generator = torch.Generator().manual_seed(0)
    truth = 1.5 * torch.randn(6000, 4, generator=generator, dtype=torch.float64)
    labels = truth.softmax(-1).multinomial(1, generator=generator)[:, 0]
    logits = 2 * truth + 2 * (2 * truth).sin()
    names = ("temperature", "structured_matrix", "isotonic")
    ensemble = select_calibrator(logits[:1000], labels[:1000], candidates=names)
    assert ensemble.name == "ensemble"

    def nll(calibrator):
        return -calibrator.log_probs(logits[1000:]).gather(-1, labels[1000:, None]).mean().item()

    for name in names:
        assert nll(ensemble) < nll(CALIBRATORS[name]().fit(logits[:1000], labels[:1000]))
    assert scores_of(ensemble)["ensemble"] == min(scores_of(ensemble).values())


def test_a_mean_by_hand():
    logits, labels = problem(3, rows=300)
    ensemble = select_calibrator(logits, labels)
    mixed = sum(
        share * CALIBRATORS[member.name]().fit(logits, labels).log_probs(logits).exp()
        for share, member in zip(ensemble.mixture, ensemble.members, strict=True)
    )
    torch.testing.assert_close(ensemble.log_probs(logits).exp(), mixed)
    assert ensemble.mixture.sum().item() == pytest.approx(1)
    assert (ensemble.mixture >= 0.01).all()


def test_shares_are_stacking_with_three_rows_of_prior():
    """Where one member is right and the others are far off, it has nearly everything; equals share."""
    probs = torch.tensor([[0.9], [0.1], [0.1]], dtype=torch.float64).expand(3, 500)[..., None]
    held_out = HeldOutNLL(probs, torch.ones(500, 1, dtype=torch.float64))
    shares = held_out.best_mixture(torch.ones(500, dtype=torch.float64))
    assert shares[0] > 0.99
    same = held_out._replace(probs=torch.full((3, 500, 1), 0.5, dtype=torch.float64))
    torch.testing.assert_close(
        same.best_mixture(torch.ones(500, dtype=torch.float64)), torch.full((3,), 1 / 3, dtype=torch.float64)
    )
    two = torch.tensor([0.9, 0.2]).repeat(250)  # each is right on its half of the rows
    both = held_out._replace(probs=torch.stack([two, two.flip(0)])[..., None].double())
    assert both.best_mixture(torch.ones(500, dtype=torch.float64)).tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_a_few_rows_do_not_make_it_worse_than_doing_nothing():
    """Calibrated logits with few mistakes: what is chosen costs little, whatever the rows say."""
    excess = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        truth = 4 * torch.randn(4000, 4, generator=generator, dtype=torch.float64)
        labels = truth.softmax(-1).multinomial(1, generator=generator)[:, 0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = select_calibrator(truth[:200], labels[:200])
        after, before = (
            x.gather(-1, labels[:, None])[200:].mean() for x in (chosen.log_probs(truth), truth.log_softmax(-1))
        )
        excess.append((before - after).item())
    assert sum(excess) / 10 < 0.01


def test_candidates_suit_rows_and_classes():
    few, many = problem(0, rows=60, classes=20), problem(0, rows=600, classes=20)
    assert "structured_matrix" not in scores_of(select_calibrator(*few))
    assert "structured_matrix" in scores_of(select_calibrator(*many))
    assert "platt" in scores_of(select_calibrator(*problem(0, classes=2)))


# -- tasks, weights, soft labels


def test_an_event_is_two_classes():
    logits, labels = problem(1, classes=2)
    score = logits[:, 1] - logits[:, 0]
    binary, pair = select_calibrator(score, labels, task="binary"), select_calibrator(logits, labels)
    assert binary.num_labels == 1
    assert [row.score for row in binary.selection] == pytest.approx([row.score for row in pair.selection])
    torch.testing.assert_close(binary.log_probs(score), pair.log_probs(logits)[:, 1], atol=1e-6, rtol=0)


def test_each_label_gets_its_own(tmp_path):
    logits, labels = problem(1, classes=2)
    scores = torch.stack([logits[:, 1] - logits[:, 0], 3 * (logits[:, 0] - logits[:, 1])], -1)
    events = torch.stack([labels, 1 - labels], -1)
    calibrator = select_calibrator(scores, events, task="multilabel")
    for k in range(2):
        alone = select_calibrator(scores[:, k], events[:, k], task="binary")
        torch.testing.assert_close(calibrator(scores)[:, k], alone(scores[:, k]))
    calibrator.save_pretrained(tmp_path)
    assert torch.equal(AutoCalibrator.from_pretrained(tmp_path)(scores), calibrator(scores))


def test_weights_and_soft_labels_count():
    logits, labels = problem(2)
    weights = (torch.arange(1000) % 2).double()
    halves = select_calibrator(logits, labels, sample_weight=weights, seed=1)
    assert halves.provenance["rows"] == 500
    soft = torch.nn.functional.one_hot(labels, 3).double()
    found, expected = (select_calibrator(logits, y) for y in (soft, labels))
    assert scores_of(found) == pytest.approx(scores_of(expected))
    smoothed = select_calibrator(logits, 0.7 * soft + 0.1)
    assert smoothed.log_probs(logits).exp().amax(-1).mean() < found.log_probs(logits).exp().amax(-1).mean() - 0.05


def test_of_equals_the_simplest():
    calibrator = select_calibrator(torch.zeros(30, 3), torch.arange(30) % 3, candidates=["temperature"])
    assert len(set(scores_of(calibrator).values())) == 1
    assert calibrator.name == "identity"


def test_the_winner_is_fitted_on_all_rows():
    logits, labels = problem(0)
    winner = select_calibrator(logits.reshape(10, 100, 3), labels.reshape(10, 100), tolerance=2.0)
    assert torch.equal(winner.temperature, TemperatureScaling().fit(logits, labels).temperature)
    assert winner.provenance["rows"] == 1000


# -- the table


def test_identity_always_takes_part():
    for candidates in (["temperature"], ("temperature", "identity"), {"temperature"}):
        names = list(scores_of(select_calibrator(*problem(0), candidates=candidates)))
        assert [name for name in names if name != "ensemble"] == ["identity", "temperature"]
    assert list(scores_of(select_calibrator(*problem(0), candidates=[]))) == ["identity"]


@pytest.mark.parametrize("score", ["nll", "brier"])
def test_the_table_by_hand(score):
    logits, labels = problem(1)
    rows = select_calibrator(logits, labels, score=score, num_folds=4, seed=7).selection
    for row in rows[:-1]:
        fit = CALIBRATORS[row.name]().fit_rows
        log_probs = held_out_log_probs(fit, check_rows(logits, labels), num_folds=4, seed=7)
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
    assert [entry["name"] for entry in kept] == list(scores_of(calibrator))
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

    needs_groups = False

    def __init__(self, rows):
        self.fitted_on = set(rows.logits[:, 0].tolist())

    def log_probs(self, logits):
        rows = set(logits[:, 0].tolist())
        assert not rows & self.fitted_on
        assert len(rows | self.fitted_on) == 103  # all others were used
        return logits


@pytest.mark.parametrize("num_folds", [2, 5, 103])
def test_no_row_calibrates_itself(num_folds):
    logits, labels = torch.arange(103.0)[:, None].expand(103, 3), torch.arange(103) % 3
    assert torch.equal(held_out_log_probs(Spy, check_rows(logits, labels), num_folds=num_folds), logits)


@pytest.mark.parametrize("num_folds", [2, 3, 10])
def test_each_fold_gets_its_share_of_each_class(num_folds):
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 3)
    folds = deal_rows(labels, num_folds, seed=0)
    for of_class in (labels >= 0, labels == 0, labels == 1, labels == 2):
        counts = folds[of_class].bincount(minlength=num_folds)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(folds, deal_rows(labels, num_folds, seed=1))


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
