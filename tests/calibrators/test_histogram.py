"""Binning: frequencies counted by hand, edges that no rounding moves a row over, streams, and refusals."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_calib.calibrators import AutoCalibrator, HistogramBinning, ScalingBinning, TemperatureScaling


def problem(seed=0, rows=600, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(rows, classes, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)
    return (2 * log_p).to(dtype), log_p.exp().multinomial(1, generator=generator)[:, 0]


def batches_of(logits, labels, size):
    return zip(logits.split(size), labels.split(size), strict=True)


def counted(column, right, edges):
    """Values of each bin of one class, by a loop."""
    bins = np.searchsorted(edges, column, side="left")
    values = []
    ends = np.concatenate([[0], edges, [1]])
    for b in range(len(edges) + 1):
        inside = bins == b
        found = 0.99 * right[inside].mean() + 0.01 * column[inside].mean() if inside.any() else ends[b : b + 2].mean()
        values.append(found)
    return np.array(values)


def test_values_are_frequencies_in_bins_of_equal_widths():
    logits, labels = problem()
    calibrator = HistogramBinning(num_bins=10).fit(logits, labels)
    probs = logits.softmax(-1).numpy()
    edges = np.arange(1, 10) / 10
    values = np.stack([counted(probs[:, k], labels.numpy() == k, edges) for k in range(3)])
    np.testing.assert_allclose(calibrator.values.numpy(), values, atol=1e-6)
    bins = np.stack([np.searchsorted(edges, probs[:, k], side="left") for k in range(3)], axis=1)
    shares = np.take_along_axis(values.T, bins, axis=0)
    found = calibrator.log_probs(logits).exp().numpy()
    np.testing.assert_allclose(found, shares / shares.sum(1, keepdims=True), atol=1e-6)


def test_bins_of_equal_mass_hold_equal_numbers():
    logits, labels = problem()
    calibrator = HistogramBinning(num_bins=5, binning="mass").fit(logits, labels)
    bins = torch.searchsorted(calibrator.edges, logits.softmax(-1).T.contiguous())
    assert all(torch.bincount(of_class, minlength=5).tolist() == [120] * 5 for of_class in bins)
    for k in range(3):
        expected = counted(logits.softmax(-1)[:, k].numpy(), labels.numpy() == k, calibrator.edges[k].numpy())
        np.testing.assert_allclose(calibrator.values[k].numpy(), expected, atol=1e-12)


def test_equal_scores_share_a_bin():
    probs = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64).repeat_interleave(torch.tensor([1, 6, 2, 1]))
    calibrator = HistogramBinning(num_bins=2, binning="mass", task="binary").fit(probs.logit(), (probs > 0.5).long())
    torch.testing.assert_close(calibrator.edges[1], torch.tensor([0.5], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_moves_no_row_over_an_edge(dtype):
    """Stated confidences lie on edges: 0.8 is the end of a bin, whatever its logits have been shifted by."""
    probs = torch.tensor([0.2, 0.4, 0.6, 0.8]).to(dtype)
    logits = torch.stack([1 - probs, probs], dim=-1).log().repeat(10, 1)
    labels = torch.arange(40) % 2
    calibrator = HistogramBinning(num_bins=5).fit(logits, labels)
    for shift in torch.linspace(-3, 3, 50).to(dtype):
        assert torch.equal(calibrator(logits + shift), calibrator(logits))


@pytest.mark.parametrize("size", [7, 100, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_stream_equals_the_fit(size, dtype):
    logits, labels = problem(dtype=dtype)
    labels[::5] = -100
    labels[100:200] = -100
    fitted = HistogramBinning().fit(logits, labels)
    streamed = HistogramBinning().fit_batches([(logits[:0], labels[:0]), *batches_of(logits, labels, size)])
    assert streamed.provenance == fitted.provenance
    assert streamed.num_labels == 3
    torch.testing.assert_close(streamed.values, fitted.values, atol=1e-12, rtol=0)
    assert torch.equal(streamed.edges, fitted.edges)


def test_a_stream_of_one_logit():
    logits, labels = problem(classes=2)
    scores = logits[:, 1] - logits[:, 0]
    fitted = HistogramBinning(task="binary").fit(scores, labels)
    streamed = HistogramBinning(task="binary").fit_batches(batches_of(scores, labels, 50))
    torch.testing.assert_close(streamed.log_probs(scores), fitted.log_probs(scores), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "labels: no row"),
        ([(torch.zeros(3, 4), torch.full((3,), -100))], "labels: no row"),
        ([(torch.eye(3), torch.arange(3)), (torch.eye(4), torch.arange(4))], "logits: got 4 classes.*batch 1"),
        ([(torch.eye(3), torch.arange(3)), (torch.eye(3), torch.arange(3) + 1)], "labels: got 3.*batch 1"),
        ([torch.eye(3)], r"logits: .*batch 0|batches: .*batch 0"),
    ],
)
def test_bad_streams_are_refused_and_change_nothing(batches, message):
    calibrator = HistogramBinning().fit(*problem())
    before = calibrator.values.clone()
    with pytest.raises(ValueError, match=f"^({message})"):
        calibrator.fit_batches(batches)
    assert torch.equal(calibrator.values, before)


def test_streams_need_bins_of_equal_widths_and_no_several_labels():
    for calibrator in (HistogramBinning(binning="mass"), HistogramBinning(task="multilabel")):
        with pytest.raises(ValueError, match=r"^binning, task: got"):
            calibrator.fit_batches([])


def test_scaling_binning_has_means_of_scaled_probabilities():
    logits, labels = problem()
    calibrator = ScalingBinning(num_bins=4).fit(logits, labels)
    temperature = TemperatureScaling().fit(logits, labels).temperature.double()
    torch.testing.assert_close(calibrator.temperature, temperature, rtol=1e-6, atol=0)
    scaled = (logits / calibrator.temperature).softmax(-1)
    for k in range(3):
        order = scaled[:, k].argsort()
        means = scaled[order, k].view(4, 150).mean(1)
        torch.testing.assert_close(calibrator.values[k], means, atol=1e-9, rtol=0)
    assert len(calibrator.log_probs(logits).exp().unique(dim=0)) <= 4**3


def test_no_surprise_is_infinitely_expensive():
    logits, labels = 8 * torch.eye(3).repeat(40, 1), torch.arange(3).repeat(40)
    for calibrator in (HistogramBinning(), HistogramBinning(binning="mass")):
        assert calibrator.fit(logits, labels).log_probs(logits).min() > -20


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"^num_bins: got 0"):
        HistogramBinning(num_bins=0)
    with pytest.raises(ValueError, match=r"^binning: got 'area'"):
        ScalingBinning(binning="area")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("edges", torch.rand(3, 14).double().sort(descending=True).values, "edges do not rise"),
        ("edges", torch.zeros(2, 14).double(), "edges has shape"),
        ("values", torch.full((3, 15), 2.0).double(), "values do not lie"),
        ("temperature", torch.tensor(-1.0).double(), "temperature is -1"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, value, message):
    calibrator = ScalingBinning().fit(*problem())
    calibrator.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "calibrator.json").read_text())["settings"] == {"num_bins": 15, "binning": "mass"}
    path = tmp_path / "calibrator.safetensors"
    save_file(load_file(path) | {name: value.contiguous()}, path)
    with pytest.raises(ValueError, match=message):
        AutoCalibrator.from_pretrained(tmp_path)
