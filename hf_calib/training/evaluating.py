"""What an evaluation says of calibration, from sums over rows: no logits are kept or gathered."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..calibrators.refinement import RefinementSums
from ..metrics import EventMetric, MetricCollection
from .targets import IGNORED_LABEL, TaskRows


METRICS = ("ece", "brier")


class EvaluationSums:
    """Rows are added batch by batch; `compute` adds up the processes.

    Args:
        of_events (`bool`): rows of two classes are an event that happens or not, as with several labels.
    Attributes:
        confidences ([`EventMetric`], *optional*): once computed, how often was right what had which confidence; None
            where that cannot be known.
    """

    def __init__(self, *, of_events: bool = False):
        self.of_events = of_events
        self.metrics = MetricCollection(METRICS)
        self.refinement = RefinementSums()
        self.confidences: EventMetric | None = None

    def add(self, rows: TaskRows) -> None:
        """Adds the rows of a batch that have a label."""
        logits, labels = kept_rows(rows)
        if len(labels) == 0:
            return
        self.refinement.update(logits, labels)
        probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        if not labels.is_floating_point() and not probs.isnan().any():
            self.metrics.update(probs[:, 1] if self.of_events else probs, labels)

    def compute(self) -> dict[str, float] | None:
        """The mean NLL of all rows, and what it would be after the best temperature; ECE and Brier of class numbers.

        Returns:
            `dict`: `nll`, `refinement`, `temperature`, `ece` and `brier`, where a NaN says that one cannot be known;
            None where no row has a label.
        """
        found = self.refinement.compute()
        if found.num_rows == 0:
            return None
        metrics = self.metrics.all_reduce()
        scores = {"nll": found.nll, "refinement": found.refinement, "temperature": found.temperature}
        if metrics.num_rows < found.num_rows:  # shares are no class numbers
            return scores | dict.fromkeys(METRICS, math.nan)
        self.confidences = metrics.metrics["ece"]
        return scores | {key: float(value) for key, value in metrics.compute().items()}


def prefix_of(metrics: Mapping[str, float]) -> str | None:
    """What stands before the names of an evaluation's metrics, such as `"eval"`; None where these are of none."""
    found = [name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")]
    return found[-1] if found else None  # Trainer's own stands after those of the user


def kept_rows(rows: TaskRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(n, C)` and labels `(n,)`, or shares `(n, C)`, of the rows that have a label."""
    logits, labels = rows
    kept = labels != IGNORED_LABEL
    if labels.is_floating_point():
        kept = kept.any(-1)
    return logits[kept], labels[kept]
