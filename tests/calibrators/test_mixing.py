"""Ensemble temperature: shares at the optimum, a bound on what one surprise costs."""

import pytest
import torch

from hf_calib.calibrators import EnsembleTemperature, TemperatureScaling
from hf_calib.calibrators.mixing import best_shares


def noisy(rows=4000, wrong=0.1, seed=0):
    """Calibrated logits of four classes, of which a share of the labels is replaced by any class."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    random = torch.randint(4, (rows,), generator=generator)
    return logits, torch.where(torch.rand(rows, generator=generator) < wrong, random, labels)


def nll(calibrator, logits, labels):
    return -calibrator.log_probs(logits).gather(-1, labels[:, None]).mean().item()


def test_the_share_of_wrong_labels_is_found():
    calibrator = EnsembleTemperature().fit(*noisy())
    assert calibrator.mixture[2].item() == pytest.approx(0.1, abs=0.03)
    assert calibrator.mixture.sum().item() == pytest.approx(1)
    test = noisy(seed=1)
    assert nll(calibrator, *test) < nll(TemperatureScaling().fit(*noisy()), *test) - 0.03


def test_no_other_shares_are_better():
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        probs = torch.rand(3, 50, generator=generator, dtype=torch.float64) ** (1 + seed % 4)
        weights = torch.rand(50, generator=generator, dtype=torch.float64)
        best = best_shares(probs, weights)
        others = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((500,))
        losses = -(torch.cat([best[None], others, torch.eye(3, dtype=torch.float64)]) @ probs).log() @ weights
        assert losses[0] <= losses.min() + 1e-7 * weights.sum()


def test_the_uniform_part_is_over_the_possible_classes():
    logits, labels = noisy()
    wide = torch.cat([logits, torch.full((4000, 2), -torch.inf, dtype=torch.float64)], dim=1)
    found, expected = EnsembleTemperature().fit(wide, labels), EnsembleTemperature().fit(logits, labels)
    torch.testing.assert_close(found.log_probs(wide)[:, :4], expected.log_probs(logits), atol=1e-5, rtol=0)


def test_by_hand():
    calibrator = EnsembleTemperature().fit(*noisy(100))
    calibrator.set_tensors(
        {"temperature": torch.tensor(2.0).double(), "mixture": torch.tensor([0.5, 0.3, 0.2]).double()}, num_labels=2
    )
    p, q = torch.tensor([1.0, 0]).softmax(-1), torch.tensor([2.0, 0]).softmax(-1)
    expected = 0.5 * p + 0.3 * q + 0.1
    torch.testing.assert_close(calibrator.log_probs(torch.tensor([2.0, 0])).exp(), expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -1.0, "temperature is -1"),
        ("mixture", [0.5, 0.5, 0.5], "mixture is"),
        ("mixture", [1.0], "mixt"),
    ],
)
def test_wrong_tensors_are_told(name, value, message):
    tensors = EnsembleTemperature().fit(*noisy(100)).tensors()
    assert message in EnsembleTemperature()._problem(tensors | {name: torch.tensor(value).double()}, 4)
