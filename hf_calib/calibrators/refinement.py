"""The NLL that the best temperature would leave, from sums over rows: a score of a model as if it were calibrated.

Choosing a checkpoint by it, and calibrating afterwards, are two steps that do not disturb each other
(Berta, Holzmüller, Jordan and Bach 2025, arXiv 2501.19195).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from ..metrics.distributed import sum_over_processes
from .streaming import NODES, node_objective, node_values, polynomial, root, value_at


CENTRES = (0.25, 1.0, 4.0)  # inverse temperatures: with the nodes around each, all from 1/8 to 8
BLOCK_LOGITS = 2**20  # worked on at a time
PER_CENTRE = 3 * len(NODES)


class Refinement(NamedTuple):
    """`nll` of the logits, in nats, and `refinement`, what of it is left at the best `temperature` from 1/8 to 8."""

    num_rows: int
    nll: float
    refinement: float
    temperature: float


class RefinementSums:
    """Sums over rows that tell the best temperature and its NLL, to about 1e-7; rows are forgotten."""

    def __init__(self):
        self.num_rows = 0
        self.sums = torch.zeros(1 + PER_CENTRE * len(CENTRES), dtype=torch.float64)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds rows: logits `(N, C)` and labels `(N,)`, or shares `(N, C)`; none is ignored."""
        rows = max(1, BLOCK_LOGITS // logits.shape[-1])
        sums = torch.zeros_like(self.sums, device=logits.device)
        for z, y in zip(logits.split(rows), labels.split(rows), strict=True):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            z = z - z.amax(-1, keepdim=True)
            if y.is_floating_point():
                happened = (y * z.where(y > 0, 0.0)).sum()
            else:
                happened = z.gather(-1, y[:, None]).double().sum()
            nodes = [node_values(z * centre).double().sum(-1) for centre in CENTRES]
            sums += torch.cat([happened.reshape(1).double(), *nodes])
        self.sums += sums.cpu()
        self.num_rows += len(logits)

    def compute(self) -> Refinement:
        """What the rows of all processes say; NaN where there is none, or one of them is."""
        num_rows, sums = sum_over_processes(self.num_rows, self.sums)
        if num_rows == 0 or not sums.isfinite().all():
            return Refinement(num_rows, math.nan, math.nan, math.nan)
        label_mean, *means = (sums / num_rows).tolist()
        means = np.reshape(means, (len(CENTRES), len(NODES), 3))
        found = [node_objective(mean, label_mean * c) for mean, c in zip(means, CENTRES, strict=True)]
        nll = found[1][list(NODES).index(1.0), 0]
        return Refinement(num_rows, float(nll), *_best(found))


def _best(objectives: list[np.ndarray]) -> tuple[float, float]:
    """The lowest NLL and its temperature: where the slope in log T changes its sign, or an end of the range."""
    hottest, coldest = objectives[0], objectives[-1]
    if not hottest[0, 1] > 0:
        return float(hottest[0, 0]), float(1 / (CENTRES[0] * NODES[0]))
    if not coldest[-1, 1] < 0:
        return float(coldest[-1, 0]), float(1 / (CENTRES[-1] * NODES[-1]))
    number = next(index for index, objective in enumerate(objectives) if objective[-1, 1] <= 0)
    objective = objectives[number]
    fitted = polynomial(objective, (0, 1, 2))
    hot = max((objective[:, 1] > 0).nonzero()[0], default=0)  # the last node, from hot to cold, that is too hot
    log_t = root(fitted, -math.log(NODES[hot + 1]), -math.log(NODES[hot]))
    return value_at(fitted, log_t), math.exp(log_t) / CENTRES[number]
