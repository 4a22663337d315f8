"""Calibrators that put probabilities into bins, of which each has one value."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch

from ..functional.binning import BINNINGS, BLOCK_ELEMENTS, bin_numbers, interior_edges
from ..functional.checks import check_choice, check_count
from .base import Calibrator
from .monotone import SortedRows, group_ties, log_shares, sorted_classes
from .scaling import fit_temperature, temperature_problem
from .streaming import BatchReader, gather


MARGIN = 1e-6  # a probability that is above an edge by less counts as on it: logits of 0.8 are rarely exact


class BinnedCalibrator(Calibrator):
    """The value of each class's bin, divided by the sum of the classes' values.

    Args:
        num_bins (`int`): bins of each class, over [0, 1].
        binning (`"width"` or `"mass"`): bins of equal widths, or of equal counts as far as ties allow.
        task: as in [`Calibrator`].
    Attributes:
        edges (`torch.Tensor` of shape `(C, num_bins - 1)`, float64): between the bins, which include their upper end.
        values (`torch.Tensor` of shape `(C, num_bins)`, float64): probabilities.
    """

    tensor_names = ("edges", "values")
    tensor_dtype = torch.float64
    setting_names = ("num_bins", "binning")
    preserves_accuracy = False  # classes may share a value
    contains_identity = False
    own_share: ClassVar[float]  # of a value that is the mean probability in the bin, and not a frequency

    def __init__(self, *, num_bins: int = 15, binning: str = "width", task: str | None = None):
        super().__init__(task=task)
        check_count("num_bins", num_bins)
        check_choice("binning", binning, BINNINGS)
        self.num_bins, self.binning = num_bins, binning

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.binning == "width":
            edges = width_edges(logits, self.num_bins)
        else:
            edges = torch.cat([mass_edges(rows, self.num_bins) for rows in sorted_classes(logits, labels, weights)])
            edges = edges.to(logits.device)
        return {"edges": edges, "values": bin_values(sum_bins(logits, labels, weights, edges), edges, self.own_share)}

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        probs = logits.double().softmax(-1)
        columns = probs.reshape(-1, probs.shape[-1]).T.contiguous()
        cells = torch.searchsorted(self.edges, columns)
        mapped = self.values.gather(-1, cells).T.reshape(logits.shape)
        return log_shares(mapped.where(probs.isfinite(), probs), logits)

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        for name, size in (("edges", self.num_bins - 1), ("values", self.num_bins)):
            tensor = tensors[name]
            if tuple(tensor.shape) != (num_labels, size):
                return f"{name} has shape {tuple(tensor.shape)}; allowed is {(num_labels, size)}"
            if tensor.numel() and (tensor.min() < 0 or tensor.max() > 1):
                return f"{name} do not lie within [0, 1]"
        if bool((tensors["edges"].diff(dim=-1) < 0).any()):
            return "edges do not rise"
        return None


class HistogramBinning(BinnedCalibrator):
    r"""How often each class was right among the rows whose probability of it fell into the same bin.

    $$\hat p_k \propto (1 - \epsilon)\, \overline{[y = k]}_{b} + \epsilon\, \bar p_{b}, \qquad \epsilon = 0.01$$

    with means over the rows of the bin b of $p_k$. A bin without rows has its middle. A row does not count for classes
    that are impossible in it.

    *When to use:* for a map that can be read off a table, and for a fit in one pass over data that does not fit into
    memory (`fit_batches`). It needs many rows of each class.

    Args:
        num_bins, binning, task: as in [`BinnedCalibrator`].
    Attributes:
        edges, values: as in [`BinnedCalibrator`].
    Source:
        Zadrozny & Elkan 2001, section 3.1, one class against the rest. Where theirs has a frequency of 0 or 1, which
        one surprise makes expensive, a hundredth of the value is the bin's mean probability before.
    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.9, 0.1]]).log().expand(10, 2)
        >>> calibrator = HistogramBinning().fit(logits, torch.tensor([0] * 8 + [1] * 2))
        >>> calibrator.log_probs(logits[0]).exp()
        tensor([0.8010, 0.1990])
    """

    name = "histogram"
    own_share = 0.01

    def fit_batches(
        self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, ignore_index: int = -100
    ) -> HistogramBinning:
        """`fit` on all batches, each read once, in memory that does not grow with the rows.

        Under `torch.distributed` every process calls it on its own batches, if any, and gets the fit on those of all.

        Args:
            batches (iterable of `(logits, labels)`): each as in `fit`, with integer labels.
            ignore_index (`int`): as in `fit`.
        Returns:
            the calibrator itself.
        Raises:
            ValueError: as `fit`, with the number of the batch; bins of equal counts, which depend on all rows; several
                labels. The fitted state is then unchanged.
        """
        if self.binning != "width" or self.task == "multilabel":
            raise ValueError(
                f"binning, task: got {self.binning!r}, {self.task!r}; allowed with fit_batches are bins of equal "
                "widths, and classes or one logit. Use fit"
            )
        reader = BatchReader(batches, ignore_index, self.task)
        num_rows, sums, error = 0, None, None
        try:
            with torch.no_grad():
                num_rows, sums = self._sum_up(reader)
        except Exception as caught:  # the others would wait for this process
            error = caught
        sizes, rows = gather([reader.num_labels, num_rows], error).T
        if rows.sum() == 0:
            raise ValueError(f"labels: no row of any batch is left after leaving out ignore_index={ignore_index}")
        if len(set(sizes[rows > 0])) > 1:
            raise ValueError(f"logits: got {sorted(set(sizes[rows > 0]))} classes in different processes")
        num_labels, device = int(sizes[rows > 0][0]), "cpu" if sums is None else sums.device
        shape = (3, num_labels, self.num_bins)
        own = np.zeros(shape) if sums is None else sums.cpu().numpy()
        total = torch.from_numpy(gather(own.ravel(), None).sum(0)).view(shape).to(device)
        edges = width_edges(total.new_zeros(1, num_labels), self.num_bins)
        tensors = {"edges": edges, "values": bin_values(total, edges, self.own_share)}
        self.set_tensors(tensors, num_labels=1 if self.task else num_labels)
        self.provenance = {"rows": int(rows.sum())}
        return self

    def _sum_up(self, reader: BatchReader) -> tuple[int, torch.Tensor | None]:
        """The number of rows of a stream, and the sums of its bins."""
        num_rows, total = 0, None
        for batch in reader.batches:
            if (kept := reader.kept(*batch)) is not None:
                logits, labels = kept
                weights = torch.ones(len(labels), dtype=torch.float64, device=logits.device)
                sums = sum_bins(logits, labels, weights, width_edges(logits, self.num_bins))
                num_rows, total = num_rows + len(labels), sums if total is None else total + sums
        return num_rows, total


class ScalingBinning(BinnedCalibrator):
    r"""A temperature, then bins: each has the mean of the scaled probabilities in it, and not a frequency.

    $$\hat p_k \propto \overline{\mathrm{softmax}(z / T)_k}_{\,b}$$

    *When to use:* where a calibration error has to be measured exactly: its outputs take few values, so that their
    calibration can be counted, at less noise than histograms have.

    Args:
        num_bins, binning, task: as in [`BinnedCalibrator`], but with equal counts by default.
    Attributes:
        temperature (`torch.Tensor` of shape `()`, float64): of lowest NLL.
        edges, values: as in [`BinnedCalibrator`], of scaled probabilities.
    Source:
        Kumar, Liang & Ma 2019 (arXiv 1909.10155), algorithm 1, with one temperature as the scaling. They deal the rows
        into three parts; here all rows serve all three steps, of which the last two look at no label.
    Example:
        >>> import torch
        >>> logits, labels = 3 * torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 2, 0])
        >>> ScalingBinning(num_bins=2).fit(logits, labels).log_probs(logits).exp().max().round(decimals=2)
        tensor(0.7500)
    """

    name = "scaling_binning"
    tensor_names = ("temperature", "edges", "values")
    own_share = 1.0

    def __init__(self, *, num_bins: int = 15, binning: str = "mass", task: str | None = None):
        super().__init__(num_bins=num_bins, binning=binning, task=task)

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        temperature = logits.new_tensor(fit_temperature(logits, labels, weights), dtype=torch.float64)
        return {"temperature": temperature, **super()._fit(_scaled(logits, temperature), labels, weights)}

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        return super()._calibrate(_scaled(logits, self.temperature)).to(logits.dtype)

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        return temperature_problem(tensors["temperature"]) or super()._problem(tensors, num_labels)


def _scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    wide = logits.double()
    return ((wide - wide.amax(-1, keepdim=True)) / temperature).masked_fill(logits == -torch.inf, -torch.inf)


def width_edges(logits: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Edges of bins of equal widths, the same for each of the `(..., C)` classes: `(C, num_bins - 1)` float64."""
    like = torch.zeros(1, logits.shape[-1], dtype=torch.float64, device=logits.device)
    return (interior_edges(like, num_bins, "width") + MARGIN).contiguous()


def mass_edges(rows: SortedRows, num_bins: int) -> torch.Tensor:
    """Edges of bins of equal weights, halfway between neighbouring scores: `(K, num_bins - 1)` float64.

    A function without rows has bins of equal widths.
    """
    shares = np.arange(1, num_bins) / num_bins
    first = group_ties(rows)
    lowest, highest = rows.scores[first], rows.scores[np.append(first[1:], len(rows.scores)) - 1]
    weight = np.add.reduceat(rows.weights, first) if len(first) else rows.weights
    edges = np.tile(shares, (len(rows.starts) - 1, 1))
    bounds = np.searchsorted(first, rows.starts)
    for k, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            total = weight[start:end].cumsum()
            below = np.searchsorted(total, shares * total[-1] * (1 - 1e-9))
            above = np.append(lowest[start + 1 : end], 1.0)[below]
            edges[k] = (highest[start:end][below] + above) / 2
    return torch.from_numpy(edges)


def sum_bins(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Sums over the rows of each class's bins: weight, weighted probability, weight of the right ones.

    Returns:
        `torch.Tensor` of shape `(3, C, num_bins)`, float64. A row does not count for classes impossible in it.
    """
    num_classes, num_bins = edges.shape[0], edges.shape[1] + 1
    size = num_classes * num_bins
    first_bin = torch.arange(num_classes, device=edges.device) * num_bins
    total = torch.zeros(3, size, dtype=torch.float64, device=edges.device)
    rows = max(num_bins, BLOCK_ELEMENTS // num_classes)  # no fewer probabilities than sums
    for z, y, w in zip(logits.split(rows), labels.split(rows), weights.split(rows), strict=True):
        probs = z.double().softmax(-1)
        cells = (bin_numbers(probs, edges) + first_bin).flatten()
        counted = w[:, None] * (z > -torch.inf)
        total[0] += torch.bincount(cells, counted.flatten(), minlength=size)
        total[1] += torch.bincount(cells, (counted * probs).flatten(), minlength=size)
        happened = cells.view_as(z).gather(-1, y[:, None])[:, 0]
        total[2].index_add_(0, happened, w)
    return total.view(3, num_classes, num_bins)


def bin_values(sums: torch.Tensor, edges: torch.Tensor, own_share: float) -> torch.Tensor:
    """The value of each bin, `(C, num_bins)`, from `sum_bins`: its middle where no row fell into it."""
    counts, confidence, right = sums
    ends = torch.cat([edges.new_zeros(len(edges), 1), edges, edges.new_ones(len(edges), 1)], dim=1)
    middles = (ends[:, :-1] + ends[:, 1:]) / 2
    values = ((1 - own_share) * right + own_share * confidence) / counts
    return values.where(counts > 0, middles).clamp(0, 1)
