"""Temperature scaling: the optimum that an independent search finds, in few passes, on any rows."""

import math
import warnings

import pytest
import torch
from scipy.optimize import minimize_scalar

from hf_calib import TemperatureScaling
from hf_calib.calibrators import scaling


def problem(seed, rows, classes, temperature, *, sure=2.0, dtype=torch.float64):
    """Logits `temperature * log p` with labels drawn from `p`: the right temperature is `temperature`."""
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(rows, classes, generator=generator, dtype=torch.float64).mul(sure).log_softmax(-1)
    labels = log_p.exp().multinomial(1, generator=generator)[:, 0]
    return (temperature * log_p).to(dtype), labels


def nll(logits, labels, weights, temperature):
    log_probs = (logits.double() / temperature).log_softmax(-1)
    return float(-(log_probs.gather(-1, labels[:, None])[:, 0] @ weights) / weights.sum())


def best_nll(logits, labels, weights):
    """The lowest NLL by golden sections, from the best of a grid of temperatures."""
    grid = torch.linspace(-12, 12, 49).tolist()
    log_t = min(grid, key=lambda log_t: nll(logits, labels, weights, math.exp(log_t)))
    found = minimize_scalar(
        lambda log_t: nll(logits, labels, weights, math.exp(log_t)),
        bounds=(log_t - 0.5, log_t + 0.5),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return found.fun


def assert_optimal(logits, labels, weights=None):
    calibrator = TemperatureScaling().fit(logits, labels, sample_weight=weights)
    temperature = calibrator.temperature.item()
    assert 0 < temperature < math.inf
    weights = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights.double()
    assert nll(logits, labels, weights, temperature) <= best_nll(logits, labels, weights) + 1e-7
    return calibrator


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 2.5, 40.0])
@pytest.mark.parametrize("classes", [2, 10, 200])
def test_known_answer(classes, temperature):
    logits, labels = problem(0, 20_000, classes, temperature, dtype=torch.float32)
    found = TemperatureScaling().fit(logits, labels).temperature
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found.item() == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "classes"), [(15, 3), (200, 2), (400, 30), (6000, 4), (60, 3000)])
def test_no_other_temperature_is_better(rows, classes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    temperature, sure = torch.rand(2, generator=generator).mul(6).sub(3).exp().tolist()
    logits, labels = problem(seed, rows, classes, temperature, sure=sure, dtype=dtype)
    labels[0] = logits[0].argmin()  # a finite temperature is best, and one row has an outsize pull
    labels[1 : rows // 2] = logits[1 : rows // 2].argmax(-1)
    assert_optimal(logits, labels, torch.rand(rows, generator=generator) if seed % 2 else None)


@pytest.mark.parametrize("unit", [0.05, 1.0, 8.0])
def test_a_start_near_an_inflection_of_the_nll_is_no_optimum(unit):
    """Of few rows of two noisy classes, the median margin, where the search starts, may lie at an inflection."""
    generator = torch.Generator().manual_seed(70)
    for _ in range(150):
        sure = torch.rand((), generator=generator).item()
        truth = torch.randn(50, 2, generator=generator, dtype=torch.float64) * (0.5 + 5 * sure)
        labels = truth.softmax(-1).multinomial(1, generator=generator)[:, 0]
        logits = unit * (truth + 0.3 * torch.randn(50, 2, generator=generator, dtype=torch.float64))
        labels[0] = logits[0].argmin()  # a finite temperature is best
        assert_optimal(logits, labels)


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min, -1e30, -1e12, -1e9, -1e6, -1e4])
@pytest.mark.parametrize("rows", [500, 5000])
def test_masked_classes_have_no_influence(rows, mask):
    logits, labels = problem(1, rows, 4, 2.5, dtype=torch.float32)
    wide = torch.full((rows, 40), mask)
    wide[:, 30:34] = logits
    expected = assert_optimal(logits, labels).temperature
    torch.testing.assert_close(TemperatureScaling().fit(wide, labels + 30).temperature, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype):
    assert_optimal(*problem(2, 3000, 5, 3.0, dtype=dtype))


@pytest.mark.parametrize("unit", [1e-25, 1e-5, 1e5, 1e25])
def test_the_unit_of_logits_is_the_unit_of_the_temperature(unit):
    logits, labels = problem(3, 1000, 5, 2.0)
    expected = unit * TemperatureScaling().fit(logits, labels).temperature
    torch.testing.assert_close(
        TemperatureScaling().fit(logits * unit, labels).temperature, expected, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("period", [2, 3, 10, 16])
def test_rows_that_repeat_in_a_pattern_do_not_mislead_the_subsample(period):
    logits, labels = problem(4, 2000 * period, 3, 2.5, dtype=torch.float32)
    logits[::period] *= 1e-6  # each sequence begins with a token that says nothing
    assert_optimal(logits, labels)


# -- no finite optimum


def separable(rows=50, classes=4, sureness=6.0):
    labels = torch.arange(rows) % classes
    return sureness * torch.nn.functional.one_hot(labels, classes).float(), labels


def fit_with_warning(logits, labels):
    """What it warned of, where, and the temperature."""
    with pytest.warns(UserWarning, match=r"^temperature: no finite value is best") as warned:
        temperature = TemperatureScaling().fit(logits, labels).temperature.item()
    assert [warning.filename for warning in warned] == [__file__]
    return str(warned[0].message), temperature


@pytest.mark.parametrize("sureness", [0.1, 6.0, 1e4])
def test_separable_rows_warn_and_stay_between_the_worst_case_and_1(sureness):
    message, temperature = fit_with_warning(*separable(sureness=sureness))
    assert "every label is the most probable class" in message
    # one of 50 rows wrong: 3 e^-x / (1 + 3 e^-x) = 1 / 50 for x = sureness / T, if that is below 1
    worst_case = sureness / math.log(3 * 49)
    assert temperature == pytest.approx(min(worst_case, 1.0), rel=0.1)


def test_a_row_whose_best_classes_are_equal_is_no_wrong_row():
    logits, labels = separable()
    tied = torch.tensor([[6.0, 6.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    _, expected = fit_with_warning(logits, labels)
    for label in (0, 1):
        _, temperature = fit_with_warning(torch.cat([logits, tied]), torch.cat([labels, torch.tensor([label, 0])]))
        assert temperature == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_anti_correlated_rows_warn_and_make_all_classes_equal(unit):
    logits, labels = separable()
    message, temperature = fit_with_warning(-unit * logits, labels)
    assert "the logits do not predict the labels" in message
    assert 6 * unit * 1e2 < temperature < 6 * unit * 1e4


def test_constant_rows_have_nothing_to_scale():
    assert TemperatureScaling().fit(torch.ones(6, 3), torch.arange(6) % 3).temperature == 1


def test_a_usual_fit_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TemperatureScaling().fit(*problem(5, 100, 3, 1.5))


# -- what it does to logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_divides_in_the_inputs_dtype(dtype):
    logits, labels = problem(6, 500, 4, 2.5, dtype=dtype)
    calibrator = TemperatureScaling().fit(logits, labels)
    assert torch.equal(calibrator(logits), logits / calibrator.temperature.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_divides_half_precision_in_float32(dtype):
    logits, labels = problem(7, 500, 4, 2.8826, dtype=dtype)
    calibrator = TemperatureScaling().fit(logits, labels)
    assert torch.equal(calibrator(logits), (logits.float() / calibrator.temperature).to(dtype))
    assert torch.equal(calibrator.log_probs(logits), (logits.float() / calibrator.temperature).log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_low_temperature_makes_no_class_impossible(dtype):
    calibrator = TemperatureScaling()
    calibrator.set_tensors({"temperature": torch.tensor(0.25)}, num_labels=3)
    lowest = torch.finfo(dtype).min
    logits = torch.tensor([1.0, lowest, -torch.inf], dtype=dtype)
    assert calibrator(logits).tolist() == [4.0, lowest, -torch.inf]


def test_repr_tells_the_temperature():
    calibrator = TemperatureScaling()
    assert repr(calibrator) == "TemperatureScaling(not fitted)"
    calibrator.set_tensors({"temperature": torch.tensor(2.5)}, num_labels=3)
    assert repr(calibrator) == "TemperatureScaling(temperature=2.5000, num_labels=3)"


# -- cost


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 20.0])
def test_few_passes(monkeypatch, temperature):
    passes = []
    derivatives = scaling._derivatives
    monkeypatch.setattr(scaling, "_derivatives", lambda z, *rest: passes.append(len(z)) or derivatives(z, *rest))
    TemperatureScaling().fit(*problem(8, 20_000, 20, temperature, dtype=torch.float32))
    assert len(passes) <= 6
    assert sum(passes) <= 1.5 * 20_000  # one over all rows, the others over a subsample
