"""The reliability diagram: `prepare_reliability` gives the numbers, `plot_reliability` the ink.

The numbers are all sums over cells of confidence. Of rows at hand, each is a cell of its own; a streaming metric has
kept the sums of 7,680 cells and forgotten the rows.

Everything is drawn on `matplotlib.figure.Figure` objects: no backend is chosen, no global style is read or changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from .functional.binning import all_edges, bin_sums, interior_edges
from .functional.calibration import ReliabilityCurve, binned_error, curve_of_sums, events
from .functional.checks import check_count
from .functional.smoothing import NUM_CELLS, masses_of_cells, smooth, smooth_error
from .metrics import EventMetric


NUM_BINS = 15
MIN_ROWS = 8  # within one bandwidth: with fewer the band is so wide that it tells nothing
MIN_BANDWIDTH = 0.01  # ten cells of the grid
HISTOGRAM_BINS = 40

COOL, WARM = "#1f6f9f", "#c8562b"  # told apart by every kind of colour vision, and in grey
INK, MUTED, FAINT = "#222222", "#6b6b6b", "#d4d4d4"

PANEL = 3.9  # inches: the side of a panel, and around it what the labels, the histogram and the heading take
LEFT, RIGHT, BELOW, HEADING, GAP, TITLE = 0.7, 0.2, 1.25, 0.6, 0.4, 0.4


class ReliabilityData(NamedTuple):
    """The numbers of a reliability diagram. NaN: no rows in the bin, or too few near the point of the curve."""

    binned: ReliabilityCurve
    grid: torch.Tensor  # (1025,) float64, from 0 to 1
    curve: torch.Tensor  # (1025,) float64 in [0, 1]: smoothed accuracy at each confidence
    low: torch.Tensor  # (1025,) float64: pointwise 95 % interval of the curve
    high: torch.Tensor  # (1025,) float64
    density: torch.Tensor  # (1025,) float64: of the rows, smoothed as the curve is; integrates to 1
    histogram: torch.Tensor  # (40,) float64: rows by confidence, in bins of equal width
    bandwidth: float
    ece: float
    smooth_ece: float
    mean_confidence: float
    accuracy: float
    num_rows: int


def prepare_reliability(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_bins: int = NUM_BINS,
    num_resamples: int = 500,
    seed: int = 0,
    ignore_index: int = -100,
) -> ReliabilityData:
    r"""Accuracy as a function of confidence: in bins, and as a smooth curve with a bootstrap band.

    $$\hat a(t) = t + \frac{\sum_i (y_i - p_i)\,\tilde K_\sigma(t, p_i)}{\sum_i \tilde K_\sigma(t, p_i)},
    \qquad \sigma = \max\bigl(0.01,\ \tfrac12 n^{-1/3}\bigr)$$

    Args:
        probs (`torch.Tensor`, floating): class probabilities `(..., C)`, read by their top label; or `(N,)`
            probabilities of an event, as confidence-and-correctness pairs are. Logits are refused.
        labels (`torch.Tensor`, integer): `(...)` in `[0, C)`, or `(N,)` in {0, 1}.
        num_bins (`int`): bins `(low, high]` of equal width, of the points and of the ECE.
        num_resamples (`int`): bootstrap resamples behind the band.
        seed (`int`): of the resampling.
        ignore_index (`int`): rows with this label are left out.
    Returns:
        [`ReliabilityData`]: tensors on the CPU, and fractions. The curve is there where about 8 rows or more lie
        within one bandwidth. Where all of these are right, or all wrong, the band is narrower than the truth.
    Raises:
        ValueError: as `expected_calibration_error`; or `num_resamples` is not an integer from 1 up.
    Source:
        Kernel and idea: Błasiok & Nakkiran 2023 (arXiv 2309.12236), section 5. We differ twice. They smooth the
        outcomes; we smooth the residuals, so that a calibrated model lies on the diagonal at the ends too. Their
        bandwidth is the smooth ECE, which flattens the curve of exactly the models that are far off; ours is the rate
        for a curve that is Lipschitz.
    Example:
        >>> import torch
        >>> data = prepare_reliability(torch.full((100,), 0.9), torch.arange(100) % 2)
        >>> f"accuracy {data.accuracy:.2f} at confidence {data.mean_confidence:.2f}: ECE {data.ece:.2f}"
        'accuracy 0.50 at confidence 0.90: ECE 0.40'
    """
    scores, outcomes = (side.cpu() for side in events(probs, labels, ignore_index=ignore_index))
    rows = torch.stack([torch.ones_like(scores), scores, outcomes]).double()
    return _reliability(
        rows[..., 0],
        lambda number: bin_sums(scores, outcomes, interior_edges(scores, number, "width"))[:, 0],
        all_edges(interior_edges(scores, num_bins, "width")[0]),
        num_resamples,
        seed,
    )


def prepare_reliability_from(metric: EventMetric, *, num_resamples: int = 500, seed: int = 0) -> ReliabilityData:
    """`prepare_reliability` of the rows that a streaming metric has seen, from its sums.

    Args:
        metric ([`~hf_calib.metrics.EventMetric`]): such as `METRICS["ece"]()`, of top labels or of one event.
        num_resamples, seed (`int`): as in `prepare_reliability`.
    Returns:
        [`ReliabilityData`]: bins, histogram, ECE and means as of the rows themselves; in the curve, the density and
        the smooth ECE, confidences have moved by less than 1.3e-4, and the band is of other resamples.
    Raises:
        ValueError: no row was seen, or the metric keeps other sums: class by class, or over its own few bins.
    Example:
        >>> import torch
        >>> from hf_calib.metrics import METRICS
        >>> metric = METRICS["ece"]().update(torch.full((100,), 0.9), torch.arange(100) % 2)
        >>> f"{prepare_reliability_from(metric).ece:.2f}"
        '0.40'
    """
    seen = metric.sums if isinstance(metric, EventMetric) else None
    if seen is None or seen.numel() != 3 * EventMetric.num_cells:
        raise ValueError(
            f"metric: got {metric!r}; allowed are metrics that have seen rows and keep the sums of "
            f"{EventMetric.num_cells} cells of top labels or of one event, such as METRICS['ece']()"
        )
    sums = seen.cpu().view(3, -1)
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)
    return _reliability(sums, lambda number: sums.unflatten(-1, (number, -1)).sum(-1), edges, num_resamples, seed)


def _reliability(
    sums: torch.Tensor, binned: Callable[[int], torch.Tensor], edges: torch.Tensor, num_resamples: int, seed: int
) -> ReliabilityData:
    """From count, sum of confidences and of right rows of each cell, `(3, cells)`, and those of so many equal bins."""
    check_count("num_resamples", num_resamples)
    num_rows, confidence, right = sums.sum(1)
    bins, sigma = binned(len(edges) - 1), (0.5 * num_rows ** (-1 / 3)).clamp_min(MIN_BANDWIDTH)
    counts, residuals = _on_grid(sums)
    rows = counts.sum(0)
    shown = _well_supported(rows, float(sigma))
    curve = _smooth_curve(counts, residuals, sigma)
    resampled = _smooth_curve(_resample(counts, num_resamples, seed), residuals, sigma)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return ReliabilityData(
        binned=curve_of_sums(bins, edges),
        grid=_grid(),
        curve=curve.where(shown, torch.nan),
        low=torch.minimum(low, curve).where(shown, torch.nan),
        high=torch.maximum(high, curve).where(shown, torch.nan),
        density=smooth(rows / num_rows, sigma).clamp_min(0),
        histogram=binned(HISTOGRAM_BINS)[0],
        bandwidth=float(sigma),
        ece=float(binned_error(bins)),
        smooth_ece=float(smooth_error(masses_of_cells(sums))),
        mean_confidence=float(confidence / num_rows),
        accuracy=float(right / num_rows),
        num_rows=int(num_rows),
    )


def _on_grid(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and their mean residual at each point of the grid, wrong rows and right ones apart: `(2, 1025)` each.

    A cell moves to its nearest point, by at most 1/2048, but keeps its own residuals.
    """
    counts, confidence, right = sums
    mean = confidence / counts.clamp_min(1)
    points = (mean * NUM_CELLS).round().long().clamp_max(NUM_CELLS)
    rows = torch.stack([counts - right, right])
    at_points = rows.new_zeros(2, NUM_CELLS + 1).index_add_(1, points, rows)
    outcome = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    residuals = rows.new_zeros(2, NUM_CELLS + 1).index_add_(1, points, rows * (outcome - mean))
    return at_points, residuals / at_points.clamp_min(1)


def _resample(counts: torch.Tensor, num_resamples: int, seed: int) -> torch.Tensor:
    """Bootstrap counts `(num_resamples, 2, 1025)`: rows that share a cell need not be drawn one by one."""
    flat = counts.view(-1).numpy()
    drawn = np.random.default_rng(seed).multinomial(int(flat.sum()), flat / flat.sum(), size=num_resamples)
    return torch.from_numpy(drawn).double().view(num_resamples, *counts.shape)


def _smooth_curve(counts: torch.Tensor, residuals: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The curve at the points of the grid: counts `(..., 2, 1025)` give `(..., 1025)`."""
    weight, residual = smooth(counts.sum(-2), sigma), smooth((counts * residuals).sum(-2), sigma)
    # far from all rows both are rounding noise: the floor keeps their ratio finite, and nothing is shown there
    return (_grid() + residual / weight.clamp_min(1e-9)).clamp(0, 1)


def _well_supported(rows: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """Where the curve stands on enough rows: those in a window of two bandwidths, which at the ends stays inside."""
    reach, size = int(bandwidth * NUM_CELLS), len(rows)
    below = F.pad(rows.cumsum(0), (1, 0))
    centre = torch.arange(size).clamp(reach, size - 1 - reach)
    enough = below[centre + reach + 1] - below[centre - reach] >= MIN_ROWS
    # gaps shorter than a bandwidth are closed, and then stretches shorter than one, splinters, are left out
    half = max(1, reach // 2)
    enough = _grow(~_grow(~_grow(enough, half), 2 * half), half)
    between = (below[1:] > 0) & (below[:-1] < below[-1])  # never beyond the lowest and the highest confidence
    return enough & between


def _grow(mask: torch.Tensor, reach: int) -> torch.Tensor:
    return F.max_pool1d(mask.double()[None], 2 * reach + 1, 1, reach)[0].bool()


def _grid() -> torch.Tensor:
    return torch.arange(NUM_CELLS + 1, dtype=torch.float64) / NUM_CELLS


def plot_reliability(data: ReliabilityData, ax: Any = None, *, title: str | None = None, color: str = COOL) -> Any:
    """Draws one reliability diagram: the curve and its band, the bins' points, the diagonal and a histogram below.

    The curve is wider, and a point larger, where more rows are. Below the diagonal a model is too sure, above it too
    modest.

    Args:
        data ([`ReliabilityData`]): from `prepare_reliability`.
        ax (`matplotlib.axes.Axes`, *optional*): where to draw; a new figure when `None`.
        title (`str`, *optional*): stands above the numbers.
        color (`str`): any matplotlib colour.
    Returns:
        `matplotlib.axes.Axes`: `ax.figure.savefig(path, dpi=200)` saves it.
    Raises:
        ImportError: matplotlib is not installed.
    """
    if ax is None:
        ax = _new_panels(1, TITLE if title else 0)[0]
    _draw_frame(ax)
    _draw_curve(ax, data, color)
    _draw_points(ax, data.binned, color)
    _draw_histogram(ax, data.histogram, color)
    _draw_heading(ax, data, title, color)
    return ax


def plot_reliability_comparison(before: ReliabilityData, after: ReliabilityData, *, title: str | None = None) -> Any:
    """Draws two reliability diagrams side by side, "Before" and "After".

    Args:
        before, after ([`ReliabilityData`]): from `prepare_reliability`, of the same rows.
        title (`str`, *optional*): stands above both.
    Returns:
        `matplotlib.figure.Figure`: `figure.savefig(path, dpi=200)` saves it.
    Raises:
        ImportError: matplotlib is not installed.
    """
    left, right = _new_panels(2, 0.75 if title else TITLE)
    plot_reliability(before, left, title="Before", color=WARM)
    plot_reliability(after, right, title="After", color=COOL)
    for ax in (right, *right.child_axes):
        ax.set_ylabel(None)
    right.tick_params(labelleft=False)
    if title:
        width, height = left.figure.get_size_inches()
        left.figure.text(LEFT / width, 1 - 0.12 / height, title, fontsize=15, weight="bold", color=INK, va="top")
    return left.figure


def _new_panels(count: int, above: float) -> list[Any]:
    """A figure of square panels in a row, with `above` inches left for titles."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install "hf_calib[plots]"') from error
    width, height = LEFT + count * PANEL + (count - 1) * GAP + RIGHT, BELOW + PANEL + HEADING + above
    figure = Figure(figsize=(width, height), facecolor="white")
    size = PANEL / width, PANEL / height
    return [figure.add_axes(((LEFT + index * (PANEL + GAP)) / width, BELOW / height, *size)) for index in range(count)]


def _draw_frame(ax: Any) -> None:
    """The unit square and its diagonal."""
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=ticks, yticks=ticks, aspect="equal", facecolor="white")
    ax.set_ylabel("Accuracy", fontsize=11, color=INK)
    ax.grid(color=FAINT, linewidth=0.5, alpha=0.6)
    ax.set_axisbelow(True)
    _quiet(ax)
    ax.tick_params(labelbottom=False, bottom=False)
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, dashes=(4, 3), zorder=2)
    for x, y, side, word in ((0.97, 0.07, "right", "too sure"), (0.03, 0.93, "left", "too modest")):
        ax.text(x, y, word, ha=side, va="center", fontsize=10, style="italic", color=MUTED, zorder=2)


def _quiet(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set(color=FAINT, linewidth=0.8)
    ax.tick_params(length=0, labelsize=9, labelcolor=MUTED)


def _draw_curve(ax: Any, data: ReliabilityData, color: str) -> None:
    from matplotlib.collections import LineCollection

    grid, curve, low, high = (values.numpy() for values in (data.grid, data.curve, data.low, data.high))
    ax.fill_between(grid, low, high, color=color, alpha=0.18, linewidth=0, zorder=3)
    points = np.stack([grid, curve], axis=1)
    segments = np.stack([points[:-1], points[1:]], axis=1)
    drawn = ~np.isnan(segments).any(axis=(1, 2))
    widths = 1.2 + 3 * (data.density / data.density.max()).sqrt().numpy()[1:]
    line = LineCollection(segments[drawn], linewidths=widths[drawn], colors=color, capstyle="round", zorder=4)
    line.set_clip_on(False)
    ax.add_collection(line, autolim=False)


def _draw_points(ax: Any, binned: ReliabilityCurve, color: str) -> None:
    filled = binned.counts > 0
    share = binned.counts[filled] / binned.counts.max()
    ax.scatter(
        binned.confidence[filled].numpy(),
        binned.accuracy[filled].numpy(),
        s=(12 + 110 * share).numpy(),
        facecolor="white",
        edgecolor=color,
        linewidth=1.4,
        zorder=5,
        clip_on=False,
    )


def _draw_histogram(ax: Any, histogram: torch.Tensor, color: str) -> None:
    """Below the panel and sharing its width, so that a glance down from the curve says how many rows it stands on."""
    below = ax.inset_axes([0, -0.19, 1, 0.16])
    edges = np.linspace(0, 1, len(histogram) + 1)
    below.stairs(histogram.numpy(), edges, fill=True, color=color, alpha=0.75, linewidth=0)
    below.set(xlim=(0, 1), ylim=(0, float(histogram.max()) * 1.05), xticks=ax.get_xticks(), yticks=[])
    below.set_xlabel("Confidence", fontsize=11, color=INK)
    below.set_ylabel("Rows", fontsize=9, color=MUTED)
    _quiet(below)
    below.spines["left"].set_visible(False)


def _draw_heading(ax: Any, data: ReliabilityData, title: str | None, color: str) -> None:
    """Title, errors, and what was counted, each on a line of its own above the panel."""
    rows = f"{data.num_rows:,} row" + "s" * (data.num_rows != 1)
    counted = f"{rows}, accuracy {data.accuracy:.3f}, mean confidence {data.mean_confidence:.3f}"
    errors = f"ECE {data.ece:.3f}    smooth ECE {data.smooth_ece:.3f}"
    height = 7.0
    for text, size, ink, weight in (
        (counted, 9, MUTED, "normal"),
        (errors, 11, INK, "normal"),
        (title, 13, color, "bold"),
    ):
        if text:
            ax.annotate(text, (0, 1), (0, height), xycoords="axes fraction", textcoords="offset points",
                        fontsize=size, color=ink, weight=weight, va="bottom")  # fmt: skip
        height += 1.5 * size
