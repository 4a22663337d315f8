"""Linear maps: the optimum of their own objective, what penalties do, probmetrics' numbers, and masks."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from hf_calib.calibrators import TemperatureScaling
from hf_calib.calibrators.structured import (
    BiasCorrectedTemperature,
    DirichletCalibration,
    MatrixScaling,
    StructuredMatrixScaling,
    StructuredVectorScaling,
    VectorScaling,
    linear,
)


KINDS = [
    VectorScaling,
    MatrixScaling,
    StructuredVectorScaling,
    StructuredMatrixScaling,
    DirichletCalibration,
    BiasCorrectedTemperature,
]


def skewed(rows=400, classes=4, seed=0):
    """Logits that need a map of their own for each class, and labels drawn from the truth."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2
    labels = truth.softmax(-1).multinomial(1, generator=generator)[:, 0]
    return truth * torch.linspace(1, 2.5, classes) + torch.linspace(-1, 1, classes), labels


def nll(calibrator, logits, labels):
    return -calibrator.log_probs(logits).gather(-1, labels[:, None]).mean().item()


def objective(calibrator, logits, labels, weight=None, bias=None):
    """The penalised NLL, written out."""
    num_rows, num_labels = logits.shape
    weight = calibrator.weight if weight is None else weight
    bias = calibrator.bias if bias is None else bias
    scaled = logits / calibrator.temperature
    if calibrator.of_log_probs:
        features = scaled - scaled.logsumexp(-1, keepdim=True)
    else:
        features = scaled - scaled.mean(-1, keepdim=True)
    penalty = calibrator._penalty(num_rows, num_labels)
    value = torch.nn.functional.cross_entropy(linear(features, weight, bias), labels)
    value = value + penalty.bias * bias.square().sum()
    if weight.dim() < 2:
        return value + penalty.diagonal * (weight - 1).square().sum()
    off = weight - weight.diagonal().diag()
    return (
        value + penalty.diagonal * (weight.diagonal() - 1).square().sum() + penalty.off_diagonal * off.square().sum()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [60, 400])
def test_no_other_parameters_are_better(kind, rows):
    """Against scipy's BFGS, started elsewhere."""
    logits, labels = skewed(rows)
    calibrator = kind().fit(logits, labels)
    shape, size = calibrator.weight.shape, calibrator.weight.numel()

    def evaluate(parameters):
        theta = torch.tensor(parameters, requires_grad=True)
        value = objective(calibrator, logits, labels, theta[:size].view(shape), theta[size:])
        value.backward()
        return value.item(), theta.grad.numpy()

    start = np.concatenate([0.5 * np.eye(4).ravel() if size == 16 else np.full(size, 0.5), np.full(4, 0.3)])
    best = minimize(evaluate, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000}).fun
    assert objective(calibrator, logits, labels).item() == pytest.approx(best, abs=1e-7)


def test_the_temperature_is_fitted_first():
    logits, labels = skewed()
    alone = TemperatureScaling().fit(logits, labels).temperature.item()
    for kind in KINDS:
        assert kind().fit(logits, labels).temperature.item() == pytest.approx(alone, rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which its optimiser uses
@pytest.mark.parametrize(
    ("kind", "method"), [(StructuredVectorScaling, "svs"), (StructuredMatrixScaling, "sms")], ids=["svs", "sms"]
)
@pytest.mark.parametrize("classes", [3, 10, 30])
def test_probmetrics_agrees_on_other_rows(kind, method, classes):
    from probmetrics.calibrators import get_calibrator

    logits, labels = skewed(3000, classes)
    peer = get_calibrator(method)
    peer.fit(logits[:1500].softmax(-1).numpy(), labels[:1500].numpy())
    probs = np.asarray(peer.predict_proba(logits[1500:].softmax(-1).numpy()))
    expected = -np.log(np.take_along_axis(probs, labels[1500:, None].numpy(), axis=1)).mean()
    found = nll(kind().fit(logits[:1500], labels[:1500]), logits[1500:], labels[1500:])
    assert found == pytest.approx(expected, rel=2e-3)


def test_penalties_hold_back_on_few_rows_what_they_allow_on_many():
    test_logits, test_labels = skewed(4000, seed=1)
    few, many = skewed(40), skewed(4000, seed=2)
    temperature, matrix, structured = TemperatureScaling(), MatrixScaling(), StructuredMatrixScaling()
    losses = [nll(kind.fit(*few), test_logits, test_labels) for kind in (temperature, matrix, structured)]
    assert losses[2] < losses[0] + 0.02 < losses[1]
    losses = [nll(kind.fit(*many), test_logits, test_labels) for kind in (temperature, matrix, structured)]
    assert losses[2] == pytest.approx(losses[1], abs=2e-3)
    assert losses[2] < losses[0] - 0.1


@pytest.mark.parametrize("kind", [StructuredVectorScaling, StructuredMatrixScaling, VectorScaling])
def test_a_large_problem_in_single_precision_is_that_of_its_blocks(kind):
    """Above some thousand elements the search runs in float32, above twelve classes in other directions."""
    logits, labels = skewed(4000, 30)
    calibrator = kind().fit(logits, labels)
    found = objective(calibrator, logits, labels).item()
    for _ in range(20):
        generator = torch.Generator().manual_seed(_)
        shift = 1e-2 * torch.randn(30, generator=generator, dtype=torch.float64)
        assert objective(calibrator, logits, labels, bias=calibrator.bias + shift).item() > found
        moved = calibrator.weight + 1e-2 * torch.randn(calibrator.weight.shape, generator=generator).double()
        assert objective(calibrator, logits, labels, weight=moved).item() > found


def test_masks_take_no_part():
    """Whether impossible classes are -inf or far below makes no difference to the others."""
    logits, labels = skewed(classes=4)
    wide = torch.cat([logits, torch.zeros(400, 2, dtype=torch.float64)], dim=1)
    for kind in KINDS:
        found = {}
        for mask in (-torch.inf, -1e9, -1e30):
            masked = wide.clone()
            masked[:, 4:] = mask
            found[mask] = kind().fit(masked, labels)
            calibrated = found[mask](masked)
            assert (calibrated[:, 4:] < calibrated[:, :4].amin(-1, keepdim=True) - 100).all()
        for mask in (-1e9, -1e30):
            torch.testing.assert_close(
                found[mask].log_probs(wide[:, :])[:, :4].softmax(-1),
                found[-torch.inf].log_probs(wide)[:, :4].softmax(-1),
                atol=2e-4,
                rtol=0,
            )


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_tensors_are_told(kind):
    calibrator = kind().fit(*skewed())
    tensors = calibrator.tensors()
    assert calibrator._problem(tensors, 4) is None
    assert "temperature is" in calibrator._problem(tensors | {"temperature": -tensors["temperature"]}, 4)
    assert "weight and bias have shapes" in calibrator._problem(tensors, 5)


def test_many_classes_take_seconds():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3000, 300, generator=generator) * 2
    labels = truth.softmax(-1).multinomial(1, generator=generator)[:, 0]
    logits = 1.7 * truth + torch.randn(300, generator=generator)
    before = -logits.log_softmax(-1).gather(-1, labels[:, None]).mean().item()
    for kind in (StructuredVectorScaling, StructuredMatrixScaling):
        assert nll(kind().fit(logits, labels), logits, labels) < before - 0.5
