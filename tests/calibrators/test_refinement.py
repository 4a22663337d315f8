import math

import pytest
import torch
import torch.nn.functional as F

from hf_calib import TemperatureScaling
from hf_calib.calibrators.refinement import RefinementSums
from hf_calib.calibrators.streaming import BLOCK_LOGITS


def rows(scale, temperature, count=3000, classes=10):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(count, classes, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def sums_of(logits, labels, size=256):
    sums = RefinementSums()
    for part in zip(logits.split(size), labels.split(size), strict=True):
        sums.update(*part)
    return sums.compute()


@pytest.mark.parametrize(("scale", "temperature"), [(3, 0.15), (3, 0.3), (2, 1.0), (3, 2.0), (10, 1.1), (2, 6.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_nll_at_the_fitted_temperature(scale, temperature, dtype):
    logits, labels = rows(scale, temperature)
    found, best = sums_of(logits.to(dtype), labels), float(TemperatureScaling().fit(logits, labels).temperature)
    assert found.num_rows == 3000
    assert found.nll == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-7)
    assert found.refinement == pytest.approx(F.cross_entropy(logits.double() / best, labels).item(), abs=2e-6)
    assert found.temperature == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.2, 0.4, 1.0, 3.0, 6.0])
def test_with_many_classes_it_is_nearly_that(temperature):
    logits, labels = rows(3, temperature, classes=1000)
    found, best = sums_of(logits, labels), float(TemperatureScaling().fit(logits, labels).temperature)
    expected = F.cross_entropy(logits.double() / best, labels).item()
    assert found.refinement == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("temperature", "end"), [(0.05, 1 / 8), (40.0, 8.0)])
def test_beyond_the_range_it_is_that_of_its_end(temperature, end):
    logits, labels = rows(2, temperature)
    found = sums_of(logits, labels)
    assert found.temperature == end
    assert found.refinement == pytest.approx(F.cross_entropy(logits.double() / end, labels).item(), abs=1e-5)


def test_shares_masks_and_half_precision():
    logits, labels = rows(2, 1.5, classes=3)
    found = sums_of(logits, F.one_hot(labels, 3).float())
    assert found.refinement == pytest.approx(sums_of(logits, labels).refinement, abs=1e-8)
    masked = F.pad(logits, (0, 1), value=-torch.inf)
    assert sums_of(masked, labels).refinement == pytest.approx(found.refinement, abs=1e-8)
    assert sums_of(masked, F.one_hot(labels, 4).float()).refinement == pytest.approx(found.refinement, abs=1e-8)
    half = logits.bfloat16()
    assert sums_of(half, labels).refinement == sums_of(half.float(), labels).refinement


def test_a_block_is_cut_anywhere(monkeypatch):
    logits, labels = rows(2, 1.5)
    expected = sums_of(logits, labels)
    monkeypatch.setitem(BLOCK_LOGITS, "cpu", 70)
    assert sums_of(logits, labels).refinement == pytest.approx(expected.refinement, abs=1e-8)


def test_rows_that_all_classes_share_have_no_temperature_to_find():
    found = sums_of(torch.zeros(5, 4), torch.tensor([0, 1, 2, 3, 0]))
    assert found.nll == found.refinement == pytest.approx(math.log(4))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_best_temperature_may_be_the_last_node_of_a_centre(temperature):
    logits = torch.tensor([[0.0, temperature * math.log(3)]]).repeat(4, 1)
    found = sums_of(logits, torch.tensor([1, 1, 1, 0]))
    assert found.temperature == pytest.approx(temperature, rel=1e-4)
    assert found.refinement == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-6)


def test_nan_is_shown_and_no_row_is_nan():
    assert math.isnan(RefinementSums().compute().nll)
    logits, labels = rows(2, 1.5, count=8)
    logits[3, 2] = torch.nan
    found = sums_of(logits, labels)
    assert math.isnan(found.nll)
    assert math.isnan(found.refinement)
