"""Temperatures of groups: found where there are rows, shared where there are not, never worse for a small group."""

import pytest
import torch

from hf_calib.calibrators import AutoCalibrator, GroupTemperature, TemperatureScaling
from hf_calib.calibrators.grouped import group_spread


def grouped(temperatures, sizes, seed=0):
    """Logits too sure by another temperature in each group."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    log_p = torch.randn(len(groups), 3, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)
    labels = log_p.exp().multinomial(1, generator=generator)[:, 0]
    return torch.tensor(temperatures, dtype=torch.float64)[groups, None] * log_p, labels, groups


def nll(calibrator, logits, labels, **options):
    return -calibrator.log_probs(logits, **options).gather(-1, labels[:, None]).mean().item()


def fit(logits, labels, groups):
    return GroupTemperature(by="group").fit(logits, labels, groups=groups)


def test_large_groups_get_their_own():
    logits, labels, groups = grouped([1.0, 2.0, 4.0], [5000] * 3)
    calibrator = fit(logits, labels, groups)
    for group in range(3):
        alone = TemperatureScaling().fit(logits[groups == group], labels[groups == group]).temperature.item()
        assert calibrator.group_temperatures[group].item() == pytest.approx(alone, rel=0.02)


def test_groups_that_differ_by_chance_alone_share():
    shared = 0
    for seed in range(10):
        logits, labels, groups = grouped([2.0] * 8, [60] * 8, seed)
        calibrator = fit(logits, labels, groups)
        spread = calibrator.group_temperatures.log() - calibrator.temperature.log()
        shared += bool(spread.abs().max() < 0.02)
        assert spread.abs().max() < 0.5
    assert shared >= 4


def test_a_small_group_is_drawn_towards_the_rest():
    logits, labels, groups = grouped([1.5, 2.0, 2.5, 3.0, 2.0], [2000, 2000, 2000, 2000, 12])
    calibrator = fit(logits, labels, groups)
    small = groups == 4
    alone = TemperatureScaling().fit(logits[small], labels[small]).temperature.log()
    own, shared = calibrator.group_temperatures[4].log(), calibrator.temperature.log()
    assert abs(own - shared) < abs(alone - shared)


def test_on_other_rows_a_small_group_is_no_worse_off():
    """Over many draws, beside the shared temperature and beside one of its own."""
    worse, better = [], []
    for seed in range(30):
        temperatures = [1.2, 1.8, 2.4, 3.0, 2.1]
        calibrator = fit(*grouped(temperatures, [1000, 1000, 1000, 1000, 25], seed))
        logits, labels, groups = grouped(temperatures[-1:], [4000], 1000 + seed)
        shared = TemperatureScaling()
        shared.set_tensors({"temperature": calibrator.temperature.float()}, num_labels=3)
        small = grouped(temperatures, [1000, 1000, 1000, 1000, 25], seed)
        alone = TemperatureScaling().fit(small[0][-25:], small[1][-25:])
        found = nll(calibrator, logits, labels, groups=groups + 4)
        worse.append(found - nll(shared, logits, labels))
        better.append(found - nll(alone, logits, labels))
    assert sum(worse) / 30 < 0.01
    assert sum(better) / 30 < -0.005


def test_by_class_needs_no_groups():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(9000, 3, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    labels = log_p.exp().multinomial(1, generator=generator)[:, 0]
    logits = log_p * torch.tensor([1.0, 2, 4], dtype=torch.float64)[log_p.argmax(-1)][:, None]
    calibrator = GroupTemperature().fit(logits, labels)
    assert calibrator.group_temperatures.tolist() == pytest.approx([1, 2, 4], rel=0.15)
    assert not calibrator.needs_groups
    assert nll(calibrator, logits, labels) < nll(TemperatureScaling().fit(logits, labels), logits, labels) - 0.01


def test_unseen_groups_have_the_shared_temperature(tmp_path):
    logits, labels, groups = grouped([1.0, 3.0], [500, 500])
    calibrator = fit(logits, labels, groups)
    other = torch.full_like(groups, 7)
    torch.testing.assert_close(calibrator(logits, groups=other), logits / calibrator.temperature)
    calibrator.save_pretrained(tmp_path)
    loaded = AutoCalibrator.from_pretrained(tmp_path)
    assert loaded.by == "group"
    assert torch.equal(loaded(logits, groups=groups), calibrator(logits, groups=groups))


def test_groups_are_needed_at_the_fit_and_at_every_use():
    logits, labels, groups = grouped([1.0, 3.0], [50, 50])
    with pytest.raises(ValueError, match=r"^groups: got none; allowed for group_temperature is a tensor"):
        GroupTemperature(by="group").fit(logits, labels)
    calibrator = fit(logits, labels, groups)
    with pytest.raises(ValueError, match=r"^groups: got none"):
        calibrator(logits)
    with pytest.raises(ValueError, match=r"^groups: got shape \(3,\); allowed is \(100,\)"):
        calibrator(logits, groups=groups[:3])
    with pytest.raises(ValueError, match=r"^groups: got torch.int64 or a negative number"):
        calibrator(logits, groups=groups - 1)
    with pytest.raises(ValueError, match=r"^by: got 'language'; allowed are 'class', 'group'"):
        GroupTemperature(by="language")


def test_the_spread_of_slopes():
    """Slopes as large as their rows' noise say nothing; larger ones say how far off the optima are."""
    ones = torch.ones(1000, dtype=torch.float64)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert group_spread(10 * noise, 100 * ones, 100 * ones) < 0.04
    assert group_spread((10**2 + (100 * 0.3) ** 2) ** 0.5 * noise, 100 * ones, 100 * ones) == pytest.approx(
        0.3, rel=0.15
    )
    assert group_spread(ones[:1], ones[:1], ones[:1]) == 0
