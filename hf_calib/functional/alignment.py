"""Which tokens of a text a shortest edit into another text keeps: edit distance, vectorised over texts."""

from __future__ import annotations

import torch


def kept_tokens(
    tokens: torch.Tensor, references: torch.Tensor, real: torch.Tensor, expected: torch.Tensor
) -> torch.Tensor:
    """Which tokens are paired with an equal one by the cheapest alignment: insert, delete and replace at cost 1 each.

    Of several cheapest alignments it is the one that, read from the end, pairs tokens before it inserts one, and
    inserts one before it deletes one.

    Args:
        tokens (`torch.Tensor` of shape `(B, T)`, int64) and references (`(B, S)`, int64).
        real (`torch.Tensor` of shape `(B, T)`, bool) and expected (`(B, S)`, bool): which of them are no padding.
    Returns:
        `torch.Tensor` of shape `(B, T)`, bool; `False` for padding.
    """
    # padding is moved behind the rest, where no alignment comes by
    order = real.long().argsort(dim=1, descending=True, stable=True)
    references = references.gather(1, expected.long().argsort(dim=1, descending=True, stable=True))
    equal = tokens.gather(1, order)[:, :, None] == references[:, None, :]
    found = _alignment_cells(~equal, real.sum(1), expected.sum(1)) & equal
    return torch.zeros_like(real).scatter_(1, order, found.any(-1))


def _alignment_cells(unequal: torch.Tensor, num_tokens: torch.Tensor, num_references: torch.Tensor) -> torch.Tensor:
    """Cells of `(B, T, S)` through which the cheapest alignment of the first `num_tokens` and `num_references` goes.

    `costs[b, i, j]` is the price of aligning the first `i` tokens with the first `j` references.
    """
    width = unequal.shape[2] + 1
    column = torch.arange(width, dtype=torch.int32, device=unequal.device)
    costs = [column.expand(len(unequal), -1)]
    for replaced in unequal.unbind(1):
        cost = costs[-1] + 1
        cost[:, 1:] = torch.minimum(cost[:, 1:], costs[-1][:, :-1] + replaced)
        # deletions run along the row: the least over k <= j of cost[k] + (j - k)
        costs.append((cost - column).cummin(1).values + column)
    costs = torch.stack(costs, 1)
    # how far back in the flattened table the step before lies: a deletion, an insertion, or a pair
    back = torch.ones_like(costs)
    back[:, 1:][costs[:, 1:] == costs[:, :-1] + 1] = width
    back[:, 1:, 1:][costs[:, 1:, 1:] == costs[:, :-1, :-1] + unequal] = width + 1
    back[:, 0, 0] = 0
    back = back.flatten(1)
    visited = torch.zeros_like(back, dtype=torch.bool)
    cell = (num_tokens * width + num_references)[:, None]
    for _ in range(int((num_tokens + num_references).max())):
        visited.scatter_(1, cell, True)
        cell = cell - back.gather(1, cell)
    return visited.view_as(costs)[:, 1:, 1:]
