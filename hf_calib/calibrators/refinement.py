"""The NLL that the best temperature would leave, from sums over rows: a score of a model as if it were calibrated.

Choosing a checkpoint by it, and calibrating afterwards, are two steps that do not disturb each other
(Berta, Holzmüller, Jordan and Bach 2025, arXiv 2501.19195).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from ..distributed import sum_over_processes
from .hermite import interpolate, rising_root
from .streaming import nll_derivatives, split_rows


# Inverse temperatures, hottest first: each twice the one before, so that its exponentials are squares of those before
NODES = 2.0 ** np.arange(-3, 4)
FARTHEST = -1e4  # below the largest logit: what is masked has no probability at any node
SMALLEST = 1e-19  # whose square is still a normal float32; others are slow, and as good as 0


class Refinement(NamedTuple):
    """`nll` of the logits, in nats, and `refinement`, what of it is left at the best `temperature` from 1/8 to 8."""

    num_rows: int
    nll: float
    refinement: float
    temperature: float


class RefinementSums:
    """Sums over rows that tell the best temperature and its NLL; rows are forgotten.

    The NLL is exact; the refinement is off by less than about 1e-5 nats.
    """

    def __init__(self):
        self.num_rows = 0
        self.sums = torch.zeros(1 + 3 * len(NODES), dtype=torch.float64)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds rows: logits `(N, C)` and labels `(N,)`, or shares `(N, C)`; none is ignored."""
        sums = torch.zeros_like(self.sums, device=logits.device)
        for z, y in split_rows(logits, labels):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            z = z - z.amax(-1, keepdim=True)
            if y.is_floating_point():
                happened = (y * z.where(y > 0, 0.0)).sum()
            else:
                happened = z.gather(-1, y[:, None]).double().sum()
            sums += torch.cat([happened.reshape(1).double(), _node_sums(z)])
        self.sums += sums.cpu()
        self.num_rows += len(logits)

    def compute(self) -> Refinement:
        """What the rows of all processes say; NaN where there is none, or one of them is."""
        num_rows, sums = sum_over_processes(self.num_rows, self.sums)
        if num_rows == 0 or not sums.isfinite().all():
            return Refinement(num_rows, math.nan, math.nan, math.nan)
        label_mean, *means = (sums / num_rows).tolist()
        objective = nll_derivatives(NODES, np.reshape(means, (len(NODES), 3)), label_mean)
        nll = objective[list(NODES).index(1.0), 0]
        return Refinement(num_rows, float(nll), *_best(objective))


def _node_sums(u: torch.Tensor) -> torch.Tensor:
    """Sums over rows of `log sum exp(b u)` and its first two derivatives in `log b`, for each node `b`."""
    u = u.clamp_min(FARTHEST)
    e, squares, values = (u * float(NODES[0])).exp_(), u * u, []
    for b in NODES.tolist():
        if b != NODES[0]:
            e.clamp_min_(SMALLEST)
            e.mul_(e)
        total = e.sum(-1)
        mean = torch.linalg.vecdot(e, u) / total
        variance = torch.linalg.vecdot(e, squares) / total - mean * mean
        values += [total.log(), b * mean, b * mean + b * b * variance]
    return torch.stack(values).double().sum(-1)


def _best(objective: np.ndarray) -> tuple[float, float]:
    """The lowest NLL and its temperature: where the slope in log T changes its sign, or an end of the range."""
    slopes = objective[:, 1]
    if not slopes[0] > 0:  # it still falls at the hottest
        return float(objective[0, 0]), float(1 / NODES[0])
    if not slopes[-1] < 0:
        return float(objective[-1, 0]), float(1 / NODES[-1])
    hot = int((slopes > 0).nonzero()[0][-1])  # the last node that is too hot
    near = slice(max(0, hot - 1), hot + 3)  # more of them would make the polynomial swing at its ends
    points = -np.log(NODES)
    centre, half_width = (points[near][0] + points[near][-1]) / 2, (points[near][0] - points[near][-1]) / 2
    nll = interpolate(points[near] - centre, objective[near], (0, 1, 2), half_width)
    log_t = rising_root(nll.deriv(), points[hot + 1] - centre, points[hot] - centre)
    return float(nll(log_t)), math.exp(log_t + centre)
