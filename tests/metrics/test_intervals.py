"""Bootstrap intervals cover the truth as often as they say; a plug-in ECE is biased, and the debiased one is not."""

import pytest
import torch

from hf_calib.functional import expected_calibration_error, resampling
from hf_calib.metrics import METRICS, bootstrap, compare

from .every import class_rows


TRIALS = 300


def draw(num_rows, generator):
    """Probabilities that are too sure, and labels of the truth; the expected scores are known."""
    logits = 1.2 * torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    truth, probs = logits.softmax(-1), (1.7 * logits).softmax(-1)
    return probs, truth, truth.multinomial(1, generator=generator)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rows", "sums"])
def test_intervals_of_brier_and_nll_cover_the_truth(how):
    """In 92 to 98 of 100 trials of 150 rows."""
    generator = torch.Generator().manual_seed(1)
    probs, truth, _ = draw(1_000_000, generator)
    expected = {
        "nll": -(truth * probs.log()).sum(-1).mean().item(),
        "brier": (probs.square().sum(-1) - 2 * (truth * probs).sum(-1) + 1).mean().item(),
    }
    covered = dict.fromkeys(expected, 0)
    for trial in range(TRIALS):
        probs, _, labels = draw(150, generator)
        if how == "rows":
            found = bootstrap(list(expected), probs, labels, num_resamples=400, seed=trial)
        else:
            found = {name: METRICS[name]().update(probs, labels).interval(seed=trial) for name in expected}
        for name, value in expected.items():
            covered[name] += found[name].low <= value <= found[name].high
    for name, count in covered.items():
        assert 0.92 <= count / TRIALS <= 0.98, name


@pytest.mark.slow
def test_the_plug_in_error_of_few_rows_is_biased_and_the_debiased_one_is_not():
    """A calibrated model: the truth is 0. Squared, since the root of an unbiased square is not unbiased."""
    generator = torch.Generator().manual_seed(2)
    plug_in, debiased = [], []
    for _ in range(400):
        scores = torch.rand(200, generator=generator, dtype=torch.float64)
        labels = (torch.rand(200, generator=generator, dtype=torch.float64) < scores).long()
        plug_in.append(expected_calibration_error(scores, labels, binning="mass", norm="l2"))
        debiased.append(METRICS["debiased_ece"].function(scores, labels))
    assert torch.stack(plug_in).median() > 0.08
    assert torch.stack(debiased).median() < 0.02
    # where there is an error, 0.2 everywhere, the debiased estimate finds it and the plug-in one overstates it
    found = []
    for _ in range(400):
        scores = 0.2 + 0.8 * torch.rand(200, generator=generator, dtype=torch.float64)
        labels = (torch.rand(200, generator=generator, dtype=torch.float64) < scores - 0.2).long()
        pair = (
            expected_calibration_error(scores, labels, binning="mass", norm="l2"),
            METRICS["debiased_ece"].function(scores, labels),
        )
        found.append(torch.stack(pair).square())
    plug_in, debiased = torch.stack(found).mean(0).tolist()
    assert debiased == pytest.approx(0.04, abs=0.001)
    assert plug_in > 0.044


def test_several_metrics_share_their_resamples():
    probs, labels = class_rows()
    together = bootstrap(["ece", "nll", "auroc"], probs, labels, num_resamples=50)
    for name, estimate in together.items():
        assert bootstrap([name], probs, labels, num_resamples=50)[name] == estimate
    assert bootstrap(["ece"], probs, labels, num_resamples=50, seed=1) != {"ece": together["ece"]}


def test_options_and_levels_are_heard():
    probs, labels = class_rows()
    wide, narrow = (bootstrap(["brier"], probs, labels, level=level)["brier"] for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high
    found = bootstrap({"ten": METRICS["ece"](num_bins=10)}, probs, labels, num_resamples=20)
    assert found["ten"].value == expected_calibration_error(probs, labels, num_bins=10).item()
    multilabel = bootstrap(["ece", "brier"], probs, (labels[:, None] == torch.arange(4)).long(), task="multilabel")
    assert multilabel["ece"].value == pytest.approx(
        expected_calibration_error(probs, labels, target="class").item(), abs=1e-12
    )


def test_a_comparison_is_paired():
    """A constant difference has an interval without width; the same rows have no difference at all."""
    probs, labels = class_rows()
    same = compare(["nll", "ece", "auroc"], probs, labels, before=probs, num_resamples=50)
    assert all(found.change[:3] == (0, 0, 0) for found in same.values())
    sharper = probs.square() / probs.square().sum(-1, keepdim=True)
    found = compare(["nll", "brier"], sharper, labels, before=probs)
    for name, (before, after, change) in found.items():
        assert before == bootstrap([name], probs, labels)[name]
        assert after == bootstrap([name], sharper, labels)[name]
        assert change.value == pytest.approx(after.value - before.value)
        assert change.low <= change.value <= change.high
        unpaired = (after.high - after.low) + (before.high - before.low)
        assert change.high - change.low < unpaired


def test_wrong_arguments_are_refused():
    probs, labels = class_rows(20)
    with pytest.raises(ValueError, match=r"^before: got shape \(10, 4\); allowed is that of probs, \(20, 4\)"):
        compare(["nll"], probs, labels, before=probs[:10])
    with pytest.raises(ValueError, match=r"^before: row 0 sums to"):
        compare(["nll"], probs, labels, before=probs.log())
    with pytest.raises(ValueError, match=r"^probs: row 0 sums to"):
        compare(["nll"], probs.log(), labels, before=probs)
    with pytest.raises(ValueError, match=r"^num_resamples: got 0; allowed are integers from 1 up"):
        bootstrap(["nll"], probs, labels, num_resamples=0)
    with pytest.raises(ValueError, match=r"^metrics: got 'entropy'; allowed are accuracy, nll"):
        bootstrap(["entropy"], probs, labels)
    for level in (0, 1, 95, -1):
        with pytest.raises(ValueError, match=rf"^level: got {level}; allowed are numbers between 0 and 1"):
            bootstrap(["nll"], probs, labels, level=level)
    with pytest.raises(ValueError, match=r"^num_resamples: got 0; allowed are integers from 1 up"):
        METRICS["ece"]().update(probs, labels).interval(num_resamples=0)


def test_a_block_of_resamples_is_bounded_by_the_sums_too(monkeypatch):
    """Sums of four classes over 7,680 cells are more than twenty rows."""
    monkeypatch.setattr(resampling, "BLOCK_ELEMENTS", 3 * 4 * 7680 * 2)
    blocks = [block.shape[1] for block in resampling.resample_counts(20, 5, size=3 * 4 * 7680)]
    assert blocks == [2, 2, 1]
    found = bootstrap(["adaptive_ece"], *class_rows(20), num_resamples=5)
    monkeypatch.undo()
    assert found == bootstrap(["adaptive_ece"], *class_rows(20), num_resamples=5)
