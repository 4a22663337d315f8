"""Bins `(low, high]` over [0, 1]: 0 falls into the first, 1 into the last, and there are exactly `num_bins`."""

from __future__ import annotations

import torch

from .checks import check_choice, check_count


BINNINGS = ("width", "mass")
BLOCK_ELEMENTS = 2**19  # scores binned at a time: small enough for a cache, large enough for a call to pay
FEW_EDGES = 32  # up to here a comparison with each edge is quicker than a search


def interior_edges(scores: torch.Tensor, num_bins: int, binning: str) -> torch.Tensor:
    """The `num_bins - 1` edges between the bins of each column of scores, in the scores' own precision.

    Args:
        scores (`torch.Tensor` of shape `(N, K)`, floating in `[0, 1]`).
        num_bins (`int`): at least 1.
        binning (`"width"` or `"mass"`): equal widths, or as near to equal counts as ties allow: equal scores share a
            bin.
    Returns:
        `torch.Tensor` of shape `(K, num_bins - 1)`, ascending, dtype of `scores`.
    """
    check_count("num_bins", num_bins)
    check_choice("binning", binning, BINNINGS)
    if binning == "width":
        edges = torch.arange(1, num_bins, dtype=torch.float64, device=scores.device) / num_bins
        return edges.to(scores.dtype).expand(scores.shape[1], -1)
    num_rows = len(scores)
    last_of_bin = torch.arange(1, num_bins, device=scores.device) * num_rows // num_bins - 1
    return scores.sort(dim=0).values[last_of_bin.clamp_min(0)].T.contiguous()


def all_edges(interior: torch.Tensor) -> torch.Tensor:
    """The `num_bins + 1` edges of one column, float64, from 0 to 1, of its `(num_bins - 1,)` interior ones."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=interior.device)
    return torch.cat([ends[:1], interior.double(), ends[1:]])


def bin_numbers(scores: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """The bin of each score: `(N, K)` scores and `(K, num_bins - 1)` edges give `(N, K)` int64 in `[0, num_bins)`."""
    if edges.shape[1] > FEW_EDGES:
        return _search(scores, edges)
    numbers, above = torch.zeros_like(scores), torch.empty_like(scores)
    for edge in edges.T:
        numbers += torch.gt(scores, edge, out=above)  # floating, which torch vectorises; bool it does not
    return numbers.long()


def _search(scores: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """`bin_numbers` among many edges: looked up where equal widths would have them, and searched where that is wrong.

    A look-up takes a twentieth of the time of a search. In half precision neighbouring edges coincide.
    """
    num_columns, num_bins = edges.shape[0], edges.shape[1] + 1
    if scores.dtype in (torch.float32, torch.float64):
        ends = edges.new_tensor([-1.0, 2.0]).expand(num_columns, 2)
        bounds = torch.cat([ends[:, :1], edges, ends[:, 1:]], dim=1).reshape(-1)
        first = torch.arange(num_columns, device=scores.device) * (num_bins + 1)
        cells = (scores * num_bins).long().clamp_max_(num_bins - 1).add_(first)
        cells -= (scores <= bounds[cells]).long()  # the product is rounded, and bins include their upper end
        cells += (scores > bounds[cells + 1]).long()
        if bool(((scores > bounds[cells]) & (scores <= bounds[cells + 1])).all()):
            return cells.sub_(first)
    return torch.searchsorted(edges.contiguous(), scores.T.contiguous()).T


def rank_cells(scores: torch.Tensor, num_cells: int) -> torch.Tensor:
    """Cells of each column in the order of its scores, of as nearly equal counts as ties allow.

    With no more rows than cells, rows share a cell where their scores are equal, and only there.

    Args:
        scores (`torch.Tensor` of shape `(N, K)`, floating).
        num_cells (`int`): at least 1.
    Returns:
        `torch.Tensor` of shape `(N, K)`, int64 in `[0, num_cells)`.
    """
    ordered, order = scores.sort(dim=0)
    ranks = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores).clone()
    ranks[1:][ordered[1:] == ordered[:-1]] = 0
    ranks = ranks.cummax(dim=0).values  # of the first among equals
    return torch.empty_like(ranks).scatter_(0, order, ranks * num_cells // max(num_cells, len(scores)))


def bin_sums(scores: torch.Tensor, outcomes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Sums over the rows of each bin: count, sum of scores, sum of outcomes.

    Args:
        scores (`torch.Tensor` of shape `(N, K)`, floating).
        outcomes (`torch.Tensor` of shape `(N, K)`, bool): whether what the score is the probability of has happened.
        edges (`torch.Tensor` of shape `(K, num_bins - 1)`).
    Returns:
        `torch.Tensor` of shape `(3, K, num_bins)`, float64.
    """
    num_columns, num_bins = scores.shape[1], edges.shape[1] + 1
    sums = torch.zeros(3, num_columns * num_bins, dtype=torch.float64, device=scores.device)
    first_bin = torch.arange(num_columns, device=scores.device) * num_bins
    rows = max(num_bins, BLOCK_ELEMENTS // num_columns)  # no fewer scores than sums
    for block, happened in zip(scores.split(rows), outcomes.split(rows), strict=True):
        cells = (bin_numbers(block, edges) + first_bin).reshape(-1)
        for total, weights in zip(sums, (None, block, happened), strict=True):
            weights = None if weights is None else weights.reshape(-1).double()
            total += torch.bincount(cells, weights, minlength=len(total))
    return sums.view(3, num_columns, num_bins)
