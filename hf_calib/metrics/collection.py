"""Several metrics of the same rows, which are checked once; and the Trainer's `compute_metrics` made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..functional.resampling import Estimate
from ..functional.significance import CalibrationTest
from .base import Metric, Rows
from .registry import make_metrics


class MetricCollection:
    """Metrics that see the same rows. Everything that one metric does, for all of them.

    Args:
        metrics (names in `METRICS`, or `dict` of `str` to [`Metric`], for options).
        task (`None` or `"multilabel"`), ignore_index (`int`): as in `expected_calibration_error`.
    Example:
        >>> import torch
        >>> metrics = MetricCollection(["accuracy", "brier"])
        >>> for _ in range(3):
        ...     metrics.update(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        >>> metrics.compute()
        {'accuracy': tensor(1., dtype=torch.float64), 'brier': tensor(0.5000, dtype=torch.float64)}
    """

    def __init__(
        self, metrics: Sequence[str] | Mapping[str, Metric], *, task: str | None = None, ignore_index: int = -100
    ):
        self.metrics = make_metrics(metrics, task=task, ignore_index=ignore_index)
        self.task, self.ignore_index = task, ignore_index

    def update(self, probs: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds rows; shapes and errors as in `expected_calibration_error`."""
        rows = Rows(probs, labels, task=self.task, ignore_index=self.ignore_index)
        found = [(metric, metric.sums_of(rows)) for metric in self.metrics.values()]
        for metric, sums in found:  # not before every metric has accepted the rows
            metric.add(sums, len(rows))

    @property
    def num_rows(self) -> int:
        """Rows seen, ignored ones left out."""
        return max((metric.num_rows for metric in self.metrics.values()), default=0)

    def compute(self) -> dict[str, Any]:
        """Every metric of all rows so far."""
        return {name: metric.compute() for name, metric in self.metrics.items()}

    def interval(self, **options: Any) -> dict[str, Estimate]:
        """Every metric with its interval, as `Metric.interval`."""
        return {name: metric.interval(**options) for name, metric in self.metrics.items()}

    def merge(self, *others: MetricCollection) -> MetricCollection:
        """Adds what others have seen. Returns the collection itself."""
        for other in others:
            if other.metrics.keys() != self.metrics.keys():
                raise ValueError(f"others: got {', '.join(other.metrics)}; allowed are {', '.join(self.metrics)}")
        for name, metric in self.metrics.items():
            metric.check_equal(*(other.metrics[name] for other in others))
        for name, metric in self.metrics.items():
            metric.merge(*(other.metrics[name] for other in others))
        return self

    def reset(self) -> None:
        """Forgets all rows."""
        for metric in self.metrics.values():
            metric.reset()

    def all_reduce(self) -> MetricCollection:
        """A collection with the rows of all processes, as `Metric.all_reduce`."""
        total = {name: metric.all_reduce() for name, metric in self.metrics.items()}
        return MetricCollection(total, task=self.task, ignore_index=self.ignore_index)


class ComputeMetrics:
    """`compute_metrics` for a `Trainer` with `batch_eval_metrics=True`: evaluation that keeps sums, never logits.

    The model's first output are logits; padding (label -100) is left out. The Trainer has gathered a batch from all
    processes before it comes here, so every process sees every row.

    Args:
        metrics, task: as in `MetricCollection`; by default accuracy (of one label), NLL, Brier and ECE. Logits become
            probabilities by softmax, when multi-label by sigmoid.
        shift (`bool`): for causal language models, whose logits at a position are about the next one.
    Example:
        >>> import torch
        >>> from transformers import EvalPrediction
        >>> compute_metrics = ComputeMetrics(["accuracy", "nll"])
        >>> batch = EvalPrediction(predictions=torch.zeros(2, 2), label_ids=torch.tensor([0, -100]))
        >>> compute_metrics(batch, compute_result=False)
        {}
        >>> compute_metrics(batch, compute_result=True)
        {'accuracy': 1.0, 'nll': 0.6931471805599453}
    """

    def __init__(
        self,
        metrics: Sequence[str] | Mapping[str, Metric] | None = None,
        *,
        task: str | None = None,
        shift: bool = False,
    ):
        if metrics is None:
            metrics = ("accuracy", "nll", "brier", "ece") if task is None else ("nll", "brier", "ece")
        self.collection = MetricCollection(metrics, task=task)
        if curves := [name for name, metric in self.collection.metrics.items() if metric.is_curve]:
            raise ValueError(f"metrics: {', '.join(curves)} is no number, which is what a Trainer logs")
        self.shift = shift

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """Adds a batch; with `compute_result`, which the Trainer sets on the last one, the numbers of all of them."""
        logits, labels = (_first_tensor(name, getattr(prediction, name)) for name in ("predictions", "label_ids"))
        labels = labels.long()
        if self.shift:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        logits = logits.float()
        probs = logits.sigmoid() if self.collection.task == "multilabel" else logits.softmax(-1)
        if bool((labels != self.collection.ignore_index).any()):
            self.collection.update(probs, labels)
        if not compute_result:
            return {}
        found = self.collection.compute()
        self.collection.reset()
        return named_numbers(found)


def named_numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `compute` gives as plain floats: of a test `NAME` and `NAME_p_value`, of a curve a list for each column."""
    numbers: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, CalibrationTest):
            numbers |= {name: float(value.statistic), f"{name}_p_value": float(value.p_value)}
        elif isinstance(value, tuple):
            numbers |= {f"{name}_{column}": entries.tolist() for column, entries in value._asdict().items()}
        else:
            numbers[name] = float(value)
    return numbers


def _first_tensor(name: str, value: Any) -> torch.Tensor:
    """The logits, first of everything that a model returns; the labels, of which there is one kind."""
    if isinstance(value, (tuple, list)):
        if name == "label_ids" and len(value) > 1:
            raise ValueError(f"label_ids: got {len(value)} kinds of labels; allowed is one per row")
        value = value[0]
    return torch.as_tensor(value)
