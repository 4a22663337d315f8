import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_calib.functional import expected_calibration_error, reliability_curve, smooth_calibration_error
from hf_calib.metrics import METRICS
from hf_calib.plots import (
    HISTOGRAM_BINS,
    plot_reliability,
    plot_reliability_comparison,
    prepare_reliability,
    prepare_reliability_from,
)


def event_probabilities(num_rows, *, sharpness=1.0, seed=0):
    """Probabilities of events that do happen that often, made too sure by a sharpness above 1."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    labels = (torch.rand(num_rows, generator=generator) < truth).long()
    return (sharpness * truth.logit()).sigmoid(), labels


def reflected_kernel(points, scores, sigma):
    """The Gaussian with its images at both ends: O(N * G), as the formula reads."""
    images = torch.stack([2.0 * k + sign * scores for k in (-1, 0, 1) for sign in (-1, 1)])
    return torch.exp(-0.5 * ((points[:, None, None] - images) / sigma).square()).sum(1)


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts] + [text.get_text() for text in figure.texts]


@pytest.fixture(scope="module")
def too_sure():
    return prepare_reliability(*event_probabilities(2000, sharpness=2.2), num_resamples=50)


@pytest.fixture(scope="module")
def calibrated():
    return prepare_reliability(*event_probabilities(2000), num_resamples=50)


def test_calibrated_counts_lie_on_the_diagonal():
    """At confidence k/20, exactly k of every 20 rows are right. At the ends a smoother of outcomes would bend away."""
    share = torch.arange(21, dtype=torch.float64) / 20
    labels = (torch.arange(20)[None] < torch.arange(21)[:, None]).long().repeat(1, 10)
    data = prepare_reliability(share[:, None].expand(21, 200).reshape(-1), labels.reshape(-1))
    assert torch.isfinite(data.curve).all()
    assert (data.curve - data.grid).abs().max() < 1e-3
    assert (data.low <= data.grid + 1e-3).all()
    assert (data.high >= data.grid - 1e-3).all()


def test_the_band_of_a_calibrated_model_covers_the_diagonal_nearly_everywhere():
    data = prepare_reliability(*event_probabilities(5000), num_resamples=300)
    covered = (data.low <= data.grid) & (data.grid <= data.high)
    assert covered.double().mean() > 0.8
    sure = prepare_reliability(*event_probabilities(5000, sharpness=2.2), num_resamples=300)
    away = (sure.grid - 0.5).abs() > 0.2  # in the middle the two lines cross
    assert not ((sure.low <= sure.grid) & (sure.grid <= sure.high))[away].any()


@pytest.mark.parametrize("num_rows", [40, 3000])
def test_the_curve_is_the_formula(num_rows):
    scores, labels = event_probabilities(num_rows, sharpness=1.7)
    data = prepare_reliability(scores, labels, num_resamples=2)
    points = torch.tensor([0, 3, 200, 511, 700, 1000, 1024])
    points = points[torch.isfinite(data.curve[points])]
    assert len(points) >= 4
    kernel = reflected_kernel(data.grid[points], scores, data.bandwidth)
    expected = data.grid[points] + (kernel * (labels - scores)).sum(1) / kernel.sum(1)
    torch.testing.assert_close(data.curve[points], expected.clamp(0, 1), atol=1e-3, rtol=0)
    density = kernel.sum(1) / (num_rows * data.bandwidth * (2 * torch.pi) ** 0.5)
    torch.testing.assert_close(data.density[points], density, atol=0, rtol=0.02)


def test_the_numbers_are_those_of_the_metrics():
    probs = (2 * torch.randn(300, 5, generator=torch.Generator().manual_seed(0))).softmax(-1)
    labels = torch.randint(5, (300,), generator=torch.Generator().manual_seed(1))
    data = prepare_reliability(probs, labels, num_bins=10, num_resamples=2)
    assert data.ece == expected_calibration_error(probs, labels, num_bins=10).item()
    assert data.smooth_ece == smooth_calibration_error(probs, labels).item()
    assert data.accuracy == pytest.approx((probs.argmax(-1) == labels).double().mean().item())
    assert data.mean_confidence == pytest.approx(probs.amax(-1).double().mean().item())
    assert data.num_rows == 300
    assert len(data.binned.counts) == 10
    assert len(data.histogram) == HISTOGRAM_BINS
    assert data.binned.counts.sum() == data.histogram.sum() == 300
    rounded = probs.bfloat16()
    expected = reliability_curve(rounded, labels)  # whose edges are rounded too
    found = prepare_reliability(rounded, labels, num_resamples=2).binned
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_ignored_rows_change_nothing():
    scores, labels = event_probabilities(200)
    more = torch.cat([labels, torch.full((50,), 7)])
    expected = prepare_reliability(scores, labels, num_resamples=20)
    found = prepare_reliability(torch.cat([scores, torch.rand(50)]), more, num_resamples=20, ignore_index=7)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_band_contains_the_curve(too_sure, calibrated):
    few = prepare_reliability(*event_probabilities(30), num_resamples=20)
    for data in (too_sure, calibrated, few):
        shown = torch.isfinite(data.curve)
        assert shown.any()
        assert (data.low <= data.curve)[shown].all()
        assert (data.curve <= data.high)[shown].all()
        assert torch.equal(shown, torch.isfinite(data.low))
        assert (data.low[shown] >= 0).all()
        assert (data.high[shown] <= 1).all()
    assert (few.high - few.low).nanmean() > 3 * (calibrated.high - calibrated.low).nanmean()


def test_the_band_is_the_bootstrap_of_rows():
    """Against rows drawn one by one, each resample's curve computed by the formula."""
    scores, labels = event_probabilities(200, sharpness=1.5)
    data = prepare_reliability(scores, labels, num_resamples=2000)
    points = torch.tensor([100, 400, 600, 900])
    kernel = reflected_kernel(data.grid[points], scores, data.bandwidth)
    drawn = torch.randint(200, (2000, 200), generator=torch.Generator().manual_seed(5))
    resampled = (kernel * (labels - scores))[:, drawn].sum(-1) / kernel[:, drawn].sum(-1) + data.grid[points, None]
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    torch.testing.assert_close(data.low[points], low.clamp(0, 1), atol=0.02, rtol=0)
    torch.testing.assert_close(data.high[points], high.clamp(0, 1), atol=0.02, rtol=0)


def test_a_seed_decides_the_band_and_nothing_else():
    rows = event_probabilities(300)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    first, again, other = (prepare_reliability(*rows, num_resamples=30, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    torch.testing.assert_close(first, again, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(first.curve, other.curve, rtol=0, atol=0, equal_nan=True)
    assert not torch.allclose(first.low, other.low, equal_nan=True)


def test_no_curve_where_there_are_no_rows():
    """Two heaps and nothing between: no line joins them, and none leaves the range of the confidences."""
    generator = torch.Generator().manual_seed(0)
    heap = 0.1 * torch.rand(1000, generator=generator)
    scores = torch.cat([0.2 + heap, 0.8 + heap])
    data = prepare_reliability(scores, torch.arange(2000) % 2, num_resamples=10)
    shown = data.grid[torch.isfinite(data.curve)]
    assert ((shown < 0.4) | (shown > 0.7)).all()
    assert 0.199 < shown.min() < 0.22
    assert 0.88 < shown.max() < 0.901


def test_a_handful_of_rows_makes_no_splinter():
    """Nine rows at the edge of being enough: the stretch that they alone would support is shorter than a bandwidth."""
    scores = torch.cat([torch.full((2000,), 0.9), 0.3 + 0.056 * torch.linspace(0, 1, 9)])
    data = prepare_reliability(scores, torch.arange(2009) % 2, num_resamples=2)
    assert torch.isnan(data.curve[data.grid < 0.6]).all()
    assert torch.isfinite(data.curve).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype(dtype):
    probs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).softmax(-1).to(dtype)
    data = prepare_reliability(probs, torch.zeros(50, dtype=torch.long), num_resamples=5)
    assert data.curve.dtype == data.low.dtype == torch.float64
    assert data.histogram.sum() == 50


def test_a_wrong_number_of_resamples_is_refused():
    with pytest.raises(ValueError, match="num_resamples: got 0"):
        prepare_reliability(*event_probabilities(20), num_resamples=0)


@pytest.mark.parametrize("sharpness", [1.0, 2.2])
def test_a_streaming_metric_has_kept_enough(sharpness):
    """Rows in batches, forgotten: the same diagram but for confidences that have moved within their cell."""
    scores, labels = event_probabilities(3000, sharpness=sharpness)
    metric = METRICS["ece"]()
    for batch in torch.arange(3000).split(700):
        metric.update(scores[batch], labels[batch])
    expected, found = prepare_reliability(scores, labels), prepare_reliability_from(metric)
    torch.testing.assert_close(found.curve, expected.curve, atol=1e-3, rtol=0, equal_nan=True)
    for name in ("low", "high"):  # of other draws
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=0.02, rtol=0, equal_nan=True)
    torch.testing.assert_close(found.binned, expected.binned, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.density, expected.density, atol=0, rtol=0.01)
    assert torch.equal(found.histogram, expected.histogram)
    assert (found.num_rows, found.bandwidth) == (3000, expected.bandwidth)
    numbers = [[data.ece, data.mean_confidence, data.accuracy] for data in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-12)
    assert found.smooth_ece == pytest.approx(expected.smooth_ece, rel=0.01)


@pytest.mark.parametrize(
    "metric",
    [
        METRICS["ece"](),
        METRICS["ece"](num_bins=7).update(torch.rand(9), torch.ones(9, dtype=torch.long)),
        METRICS["classwise_ece"]().update(torch.full((9, 2), 0.5), torch.ones(9, dtype=torch.long)),
        METRICS["brier"]().update(torch.rand(9), torch.ones(9, dtype=torch.long)),
    ],
    ids=["no row", "seven bins", "class by class", "no bins"],
)
def test_other_sums_are_refused(metric):
    with pytest.raises(
        ValueError, match=r"metric: got .*; allowed are metrics that have seen rows and keep the sums of 7680"
    ):
        prepare_reliability_from(metric)


# the ink


def test_a_panel_says_what_it_shows(too_sure):
    ax = plot_reliability(too_sure, title="A title")
    written = texts(ax.figure)
    assert f"ECE {too_sure.ece:.3f}    smooth ECE {too_sure.smooth_ece:.3f}" in written
    assert {"A title", "too sure", "too modest"} <= set(written)
    assert any(text.startswith("2,000 rows, accuracy") for text in written)
    assert ax.get_xlim() == ax.get_ylim() == (0, 1)
    assert ax.get_aspect() == 1
    assert ax.get_ylabel() == "Accuracy"
    (below,) = ax.child_axes
    assert below.get_xlabel() == "Confidence"
    assert below.get_xlim() == (0, 1)


def test_a_panel_is_drawn_where_it_is_told(too_sure):
    from matplotlib.figure import Figure

    given = Figure().subplots()
    assert plot_reliability(too_sure, given) is given


def test_the_gap_is_on_the_side_of_its_word(too_sure):
    """Overconfident at the top: points at high confidence lie below the diagonal, towards "too sure"."""
    ax = plot_reliability(too_sure)
    places = {text.get_text(): text.get_position() for text in ax.texts}
    assert places["too sure"][0] > places["too sure"][1]
    assert places["too modest"][0] < places["too modest"][1]
    points = np.asarray(ax.collections[-1].get_offsets())
    assert (points[:, 0] > points[:, 1])[points[:, 0] > 0.8].all()
    sizes = ax.collections[-1].get_sizes()
    counts = too_sure.binned.counts[too_sure.binned.counts > 0]
    assert sizes.argmax() == counts.argmax()
    assert sizes.min() < sizes.max()


def test_a_comparison_is_a_picture(too_sure, calibrated, tmp_path):
    figure = plot_reliability_comparison(too_sure, calibrated, title="One title")
    written = texts(figure)
    assert {"Before", "After", "One title"} <= set(written)
    for data in (too_sure, calibrated):
        assert f"ECE {data.ece:.3f}    smooth ECE {data.smooth_ece:.3f}" in written
    assert written.index("Before") < written.index("After")
    figure.savefig(tmp_path / "reliability.png", dpi=80)
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("title", [None, "One title"])
def test_no_words_overlap_or_leave_the_picture(too_sure, calibrated, title):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plot_reliability_comparison(too_sure, calibrated._replace(num_rows=1_000_000), title=title)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    axes = [ax for panel in figure.axes for ax in (panel, *panel.child_axes)]
    words = [text for ax in axes for text in (*ax.texts, ax.xaxis.label, ax.yaxis.label)] + figure.texts
    words += [label for ax in axes for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels()]
    boxes = [(word.get_text(), word.get_window_extent(renderer)) for word in words if word.get_text()]
    boxes = [(text, box) for text, box in boxes if box.width > 0]
    assert len(boxes) > 15
    for index, (text, box) in enumerate(boxes):
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
        for other_text, other in boxes[index + 1 :]:
            assert not box.overlaps(other), (text, other_text)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ([0.7], [1]),
        ([1.0], [0]),
        ([0.0], [0]),
        ([1.0] * 500, [1] * 500),
        ([1.0] * 500, [1, 0] * 250),
        ([0.0, 1.0] * 50, [0, 1] * 50),
    ],
)
def test_extremes_are_drawn_without_a_warning(scores, labels, tmp_path):
    data = prepare_reliability(torch.tensor(scores), torch.tensor(labels), num_resamples=10)
    figure = plot_reliability_comparison(data, data)
    figure.savefig(tmp_path / "extreme.png", dpi=40)
    assert f"{len(scores):,} row{'s' if len(scores) > 1 else ''}, accuracy" in "\n".join(texts(figure))


def run_python(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


SETUP = "import sys, io, torch\nfrom hf_calib.plots import *\n"
DATA = "data = prepare_reliability(torch.rand(50), torch.ones(50, dtype=torch.long), num_resamples=5)\n"


def test_pyplot_is_never_imported_and_no_setting_is_changed():
    code = SETUP + DATA + (
        "assert 'matplotlib' not in sys.modules\n"
        "import matplotlib\n"
        "settings = dict(matplotlib.rcParams.copy())\n"
        "plot_reliability_comparison(data, data).savefig(io.BytesIO(), dpi=40)\n"
        "plot_reliability(data)\n"
        "assert settings == dict(matplotlib.rcParams.copy())\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )  # fmt: skip
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_without_matplotlib_one_line_says_what_to_install():
    code = SETUP + "sys.modules['matplotlib'] = None\n" + DATA + (
        "try: plot_reliability(data)\n"
        "except ImportError as error: print(error)\n"
    )  # fmt: skip
    result = run_python(code)
    assert result.stdout.strip() == 'matplotlib is not installed: pip install "hf_calib[plots]"', result.stderr
