"""Scores of libraries around sentence-transformers become probabilities through the same calibrators."""

import pytest
import torch
from sentence_transformers import CrossEncoder
from setfit import SetFitModel

from hf_calib import TemperatureScaling, attach_calibrator, fold_calibrator
from hf_calib.calibrators import IsotonicCalibration, PlattScaling

from .tiny import SPECIAL, make_classifier, make_tokenizer


WORDS = ["good", "bad", *map(str, range(50))]
PAIRS = [(WORDS[index % 2], str(index // 2)) for index in range(100)]


@pytest.fixture
def reranker(tmp_path):
    make_classifier(["relevant"], len(SPECIAL) + len(WORDS)).save_pretrained(tmp_path / "reranker")
    make_tokenizer(WORDS).save_pretrained(tmp_path / "reranker")
    return CrossEncoder(str(tmp_path / "reranker"), device="cpu")


@pytest.fixture
def scores(reranker):
    return reranker.predict(PAIRS, activation_fn=torch.nn.Identity(), convert_to_tensor=True)


@pytest.fixture
def relevant(scores):
    """Drawn from other probabilities than the model's own."""
    probs = (0.3 * scores + 1).sigmoid()
    return (torch.rand(len(probs), generator=torch.Generator().manual_seed(0)) < probs).long()


@pytest.mark.parametrize("kind", [PlattScaling, IsotonicCalibration])
def test_a_score_becomes_a_probability(kind, scores, relevant):
    calibrator = kind(task="binary").fit(scores, relevant)
    probs = calibrator(scores).sigmoid()
    share = float(relevant.double().mean())
    assert float(probs.mean()) == pytest.approx(share, abs=1e-3)
    assert abs(float(scores.sigmoid().mean()) - share) > 0.1


def test_a_folded_reranker_gives_probabilities_and_is_saved_as_any_other(reranker, scores, relevant, tmp_path):
    calibrator = PlattScaling(task="binary").fit(scores, relevant)
    reranker.activation_fn = torch.nn.Identity()  # as well-known ones have it
    fold_calibrator(reranker.model, calibrator)
    reranker.activation_fn = torch.nn.Sigmoid()
    reranker.save_pretrained(str(tmp_path / "saved"))
    expected = calibrator(scores).sigmoid().tolist()
    for each in (reranker, CrossEncoder(str(tmp_path / "saved"), device="cpu")):
        assert each.predict(PAIRS).tolist() == pytest.approx(expected, abs=1e-6)


def test_an_attached_reranker_is_raw_as_the_readme_says(reranker, scores, relevant):
    attach_calibrator(reranker.model, PlattScaling(task="binary").fit(scores, relevant))
    assert reranker.predict(PAIRS).tolist() == pytest.approx(scores.sigmoid().tolist(), abs=1e-6)


def test_the_probabilities_of_setfit_are_calibrated(reranker, tmp_path):
    texts, labels = [f"{first} {second}" for first, second in PAIRS], torch.arange(100) % 2
    model = SetFitModel.from_pretrained(str(tmp_path / "reranker"), device="cpu")
    model.model_head.fit(model.model_body.encode(texts[:40]), labels[:40].tolist())
    noisy = torch.where(torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.3, 1 - labels, labels)
    logits = model.predict_proba(texts).log()
    calibrator = TemperatureScaling().fit(logits[40:], noisy[40:])
    before, after = (
        torch.nn.functional.cross_entropy(found[40:], noisy[40:]) for found in (logits, calibrator(logits))
    )
    assert after < before - 0.01
