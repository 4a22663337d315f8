"""Prior correction: the most likely priors, found again where they are known, and better probabilities under them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize

from hf_calib.calibrators import (
    AutoCalibrator,
    BiasCorrectedTemperature,
    Chain,
    IdentityCalibration,
    PriorCorrection,
    TemperatureScaling,
)
from hf_calib.calibrators.label_shift import estimate_priors


SOURCE, TARGET = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.2, 0.7]).double()


def problem(priors, rows=20_000, seed=0):
    """Features from a normal distribution per class, and the exact log-posteriors that the source's priors give."""
    generator = torch.Generator().manual_seed(seed)
    labels = priors.multinomial(rows, replacement=True, generator=generator)
    means = 1.5 * torch.eye(3, dtype=torch.float64)
    features = means[labels] + torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    log_density = -(features[:, None] - means).square().sum(-1) / 2
    return (log_density + SOURCE.log()).log_softmax(-1), labels


def nll(calibrator, logits, labels):
    return -calibrator.log_probs(logits).gather(-1, labels[:, None]).mean().item()


def test_the_priors_are_the_most_likely_ones():
    logits, _ = problem(TARGET, rows=500)
    relative = (logits - SOURCE.log()).exp().numpy()

    def surprise(free):
        weights = torch.tensor([*free, 0.0], dtype=torch.float64).softmax(-1).numpy()
        return -float(torch.from_numpy(relative @ weights).log().mean())

    found = minimize(surprise, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}).x
    expected = torch.tensor([*found, 0.0], dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(estimate_priors(logits, SOURCE), expected, atol=1e-6, rtol=0)


def test_known_priors_are_found_and_nll_falls():
    source, labels = problem(SOURCE)
    target, target_labels = problem(TARGET, seed=1)
    calibrator = PriorCorrection().fit(source, labels)
    torch.testing.assert_close(calibrator.source_priors, SOURCE, atol=0.01, rtol=0)
    before = nll(calibrator, target, target_labels)
    assert calibrator.adapt(target) is calibrator
    torch.testing.assert_close(calibrator.target_priors, TARGET, atol=0.02, rtol=0)
    exact = (target + TARGET.log() - SOURCE.log()).log_softmax(-1)
    best = -exact.gather(-1, target_labels[:, None]).mean().item()
    assert before > best + 0.1
    assert nll(calibrator, target, target_labels) < best + 0.002


def test_without_a_shift_nothing_changes():
    source, labels = problem(SOURCE)
    calibrator = PriorCorrection().fit(source, labels)
    assert torch.equal(calibrator(source), source)
    torch.testing.assert_close(calibrator.adapt(source).target_priors, calibrator.source_priors, atol=1e-6, rtol=0)


def test_a_chain_adapts_a_model_that_is_too_sure_and_biased():
    distort = torch.tensor([1.0, 0.0, -1.0]).double()
    source, labels = problem(SOURCE)
    target, target_labels = problem(TARGET, seed=1)
    chain = Chain([BiasCorrectedTemperature(), PriorCorrection()]).fit(2 * source + distort, labels)
    before = [tensor.clone() for tensor in chain.members[0].tensors().values()]
    without = nll(chain, 2 * target + distort, target_labels)
    assert chain.adapt(2 * target + distort) is chain
    assert all(map(torch.equal, before, chain.members[0].tensors().values()))
    torch.testing.assert_close(chain.members[1].target_priors, TARGET, atol=0.02, rtol=0)
    assert nll(chain, 2 * target + distort, target_labels) < without - 0.1
    ideal = PriorCorrection().fit(source, labels).adapt(target)
    assert nll(chain, 2 * target + distort, target_labels) < nll(ideal, target, target_labels) + 0.002


def test_one_logit_and_several_labels():
    generator = torch.Generator().manual_seed(0)
    scores = 1.5 * torch.randn(5000, generator=generator, dtype=torch.float64)
    labels = torch.bernoulli(scores.sigmoid(), generator=generator).long()
    rare = torch.cat([scores[labels == 0], scores[labels == 1][:200]])
    pair = PriorCorrection().fit(torch.stack([0 * scores, scores], -1), labels)
    one = PriorCorrection(task="binary").fit(scores, labels).adapt(rare)
    several = PriorCorrection(task="multilabel").fit(scores[:, None], labels[:, None]).adapt(rare[:, None])
    pair.adapt(torch.stack([0 * rare, rare], -1))
    assert one.target_priors[1].item() == pytest.approx(200 / len(rare), abs=0.02)
    torch.testing.assert_close(one.target_priors, pair.target_priors)
    assert torch.equal(several.members[0].target_priors, one.target_priors)


def test_impossible_classes_stay_and_shapes_are_free():
    logits, labels = problem(SOURCE, rows=600)
    wide = torch.cat([logits, torch.full((600, 1), -torch.inf, dtype=torch.float64)], dim=1)
    calibrator = PriorCorrection().fit(wide, labels).adapt(wide.view(3, 200, 4)[:, :50])
    assert torch.equal(calibrator(wide) == -torch.inf, wide == -torch.inf)
    assert (calibrator.target_priors > 0).all()


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(0, 3), "logits: got shape"),
        (torch.zeros(4, 2), "logits: got 2 classes"),
        (torch.zeros(4, 3, dtype=torch.int64), "logits: got torch.int64"),
        (torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]]), "logits: the largest of row 1 is nan"),
    ],
)
@pytest.mark.parametrize("make", [PriorCorrection, lambda: Chain([TemperatureScaling(), PriorCorrection()])])
def test_wrong_logits_are_refused_and_change_nothing(make, logits, message):
    calibrator = make().fit(*problem(SOURCE, rows=100))
    before = {name: tensor.clone() for name, tensor in calibrator.tensors().items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        calibrator.adapt(logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in calibrator.tensors().items())


def test_refusals():
    with pytest.raises(ValueError, match="not fitted"):
        PriorCorrection().adapt(torch.zeros(2, 3))
    chain = Chain([TemperatureScaling(), IdentityCalibration()]).fit(*problem(SOURCE, rows=100))
    with pytest.raises(ValueError, match=r"^members: got no PriorCorrection"):
        chain.adapt(torch.zeros(2, 3))


def test_an_adapted_one_is_saved(tmp_path):
    logits, labels = problem(SOURCE, rows=600)
    calibrator = PriorCorrection().fit(logits, labels).adapt(problem(TARGET, rows=600)[0])
    calibrator.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "calibrator.json").read_text())["type"] == "prior_correction"
    assert torch.equal(AutoCalibrator.from_pretrained(tmp_path)(logits), calibrator(logits))
    path = tmp_path / "calibrator.safetensors"
    save_file(load_file(path) | {"target_priors": torch.tensor([0.5, 0.6, -0.1]).double()}, path)
    with pytest.raises(ValueError, match="target_priors is"):
        AutoCalibrator.from_pretrained(tmp_path)
