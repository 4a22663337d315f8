"""Bins are `(low, high]` in every precision, there are exactly `num_bins`, and a sum over bins is a sum over rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_calib.functional import binning
from hf_calib.functional.binning import bin_numbers, bin_sums, interior_edges, rank_cells

from .every import every_dtype


def bins_of(scores, num_bins, how="width"):
    scores = scores[:, None]
    return bin_numbers(scores, interior_edges(scores, num_bins, how))[:, 0].tolist()


def equal_mass_bins(scores, num_bins):
    """Row `i` of the sorted rows ends bin `k` when `i + 1` is `k n / num_bins`, rounded down; equals share a bin."""
    ordered, num_rows = sorted(scores), len(scores)
    ends = [ordered[max(0, k * num_rows // num_bins - 1)] for k in range(1, num_bins)]
    return [sum(score > end for end in ends) for score in scores]


@every_dtype
@pytest.mark.parametrize("num_bins", [2, 3, 7, 10, 15, 20, 100])
def test_an_edge_belongs_to_the_lower_bin(dtype, num_bins):
    """What a user writes as k / num_bins is the edge, in every precision; its neighbour above is in the next bin."""
    edges = torch.tensor([k / num_bins for k in range(1, num_bins)], dtype=torch.float64).to(dtype)
    above = torch.nextafter(edges, torch.ones_like(edges))
    below = torch.nextafter(edges, torch.zeros_like(edges))
    assert bins_of(edges, num_bins) == list(range(num_bins - 1))
    assert bins_of(below, num_bins) == list(range(num_bins - 1))
    assert bins_of(above, num_bins) == list(range(1, num_bins))


@every_dtype
@pytest.mark.parametrize("num_bins", [1, 2, 10, 15])
def test_0_falls_into_the_first_bin_and_1_into_the_last(dtype, num_bins):
    ends = torch.tensor([0.0, -0.0, 1e-7, 1.0], dtype=dtype)
    assert bins_of(ends, num_bins) == [0, 0, 0, num_bins - 1]


@pytest.mark.parametrize("how", ["width", "mass"])
@pytest.mark.parametrize("num_bins", [1, 4, 15, 1000])
def test_there_are_exactly_num_bins_bins(how, num_bins):
    scores = torch.tensor([0.0, 0.3, 0.3, 0.9, 1.0])[:, None]
    sums = bin_sums(scores, scores > 0.5, interior_edges(scores, num_bins, how))
    assert sums.shape == (3, 1, num_bins)
    assert sums.sum(-1)[:, 0].tolist() == pytest.approx([5, 2.5, 2])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scores=st.lists(st.floats(0, 1, width=16), min_size=1, max_size=40),
    num_bins=st.integers(1, 50),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_equal_mass_bins_are_those_of_a_naive_program(scores, num_bins, dtype):
    assert bins_of(torch.tensor(scores, dtype=dtype), num_bins, "mass") == equal_mass_bins(scores, num_bins)


@pytest.mark.parametrize(("num_rows", "num_bins"), [(60, 15), (61, 15), (100, 7), (5, 5), (14, 15)])
def test_equal_mass_bins_of_distinct_scores_differ_by_one_row_at_most(num_rows, num_bins):
    scores = torch.rand(num_rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(torch.tensor(bins_of(scores, num_bins, "mass")), minlength=num_bins)
    assert counts.max() - counts.min() <= 1


def test_equal_scores_share_a_bin():
    scores = torch.tensor([0.9] * 7 + [0.1, 0.95, 0.97])
    assert len(set(bins_of(scores, 5, "mass")[:7])) == 1
    assert set(bins_of(torch.full((20,), 1.0), 5, "mass")) == {0}


def test_sums_are_count_scores_and_outcomes_of_each_bin():
    scores = torch.tensor([[0.1, 0.8], [0.5, 0.6], [0.75, 0.25]], dtype=torch.float64)
    outcomes = torch.tensor([[True, False], [False, True], [True, True]])
    counts, confidence, happened = bin_sums(scores, outcomes, interior_edges(scores, 2, "width"))
    assert counts.tolist() == [[2, 1], [1, 2]]
    torch.testing.assert_close(confidence, torch.tensor([[0.6, 0.75], [0.25, 1.4]], dtype=torch.float64))
    assert happened.tolist() == [[1, 1], [1, 1]]


@every_dtype
@pytest.mark.parametrize("how", ["width", "mass"])
@pytest.mark.parametrize("block_elements", [1, 7, 64])
def test_sums_do_not_depend_on_how_the_rows_are_split(monkeypatch, dtype, how, block_elements):
    scores = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    outcomes = torch.arange(150).view(50, 3) % 2 == 0
    edges = interior_edges(scores, 15, how)
    whole = bin_sums(scores, outcomes, edges)
    halves = bin_sums(scores[:17], outcomes[:17], edges) + bin_sums(scores[17:], outcomes[17:], edges)
    monkeypatch.setattr(binning, "BLOCK_ELEMENTS", block_elements)
    torch.testing.assert_close(bin_sums(scores, outcomes, edges), whole)
    torch.testing.assert_close(halves, whole)
    assert whole.dtype == torch.float64


@pytest.mark.parametrize("how", ["width", "mass"])
def test_every_column_has_bins_of_its_own(how):
    scores = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    together = bin_numbers(scores, interior_edges(scores, 7, how))
    for column in range(3):
        assert together[:, column].tolist() == bins_of(scores[:, column], 7, how)


@every_dtype
@pytest.mark.parametrize("num_bins", [40, 1000, 7680])
def test_a_look_up_finds_what_a_search_finds(dtype, num_bins):
    """Scores on edges, right beside them and anywhere, in columns; edges of equal width and others."""
    edges = interior_edges(torch.zeros(1, 2, dtype=dtype), num_bins, "width")
    up, down = (torch.nextafter(edges[0].float(), torch.tensor(end)).to(dtype) for end in (2.0, -1.0))
    anywhere = torch.rand(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores = torch.cat([edges[0], up, down, anywhere, torch.tensor([0.0, 1.0, 5e-8], dtype=dtype)]).clamp(0, 1)
    scores = torch.stack([scores, scores.flip(0)], dim=1)
    for among in (edges, edges.square(), torch.stack([edges[0], edges[1].sqrt()])):
        found = bin_numbers(scores, among)
        expected = torch.stack([(scores[:, k, None] > among[k]).sum(-1) for k in range(2)], dim=1)
        assert torch.equal(found, expected)


def test_cells_of_ranks_part_rows_where_scores_differ():
    scores = torch.tensor([[0.3, 0.0], [0.1, 1.0], [0.3, 1.0], [0.9, 0.5]])
    assert rank_cells(scores, 4).T.tolist() == [[1, 0, 1, 3], [0, 2, 2, 1]]
    assert rank_cells(scores, 7680).T.tolist() == [[1, 0, 1, 3], [0, 2, 2, 1]]


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0]), min_size=1, max_size=60), st.integers(1, 70))
def test_cells_of_ranks_keep_the_order_and_equal_counts(scores, num_cells):
    scores = torch.tensor(scores)
    cells = rank_cells(scores[:, None], num_cells)[:, 0]
    assert cells.min() >= 0
    assert cells.max() < num_cells
    assert (cells[scores.argsort()].diff() >= 0).all()
    for score in scores.unique():
        assert len(cells[scores == score].unique()) == 1
    if len(scores) <= num_cells:
        assert len(cells.unique()) == len(scores.unique())


def test_cells_of_distinct_ranks_hold_equal_counts():
    scores = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) ** 8
    for cells in rank_cells(scores, 100).T:
        assert torch.bincount(cells).tolist() == [10] * 100
