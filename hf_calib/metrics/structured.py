"""Streaming metrics of structured outputs: any metric of events, of tokens, entities, answers or sequences.

Each is a function of `hf_calib.functional.sequence` that turns a batch into confidence-and-correctness pairs, and a
metric that sees the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from ..functional import sequence as exact
from .base import Metric, Rows
from .registry import make_metric


class StructuredMetric(Metric):
    """A metric of the events in structured outputs. A batch without any event is no error: it adds nothing.

    Args:
        metric (name in `METRICS`, or [`Metric`] for options): of `(N,)` confidence and correctness.
        ignore_index (`int`): the label that marks padding.
        **options: as in the function that finds the events.
    """

    reads_rows = False
    events_of: ClassVar[Callable[..., tuple[torch.Tensor, torch.Tensor]]]

    def __init__(self, metric: str | Metric = "ece", *, ignore_index: int = -100, **options: Any):
        super().__init__(ignore_index=ignore_index)
        self.metric = make_metric(metric)
        self.events_options = options

    @property
    def bounds(self) -> tuple[float, float]:
        """Those of the metric of events."""
        return self.metric.bounds

    @property
    def is_curve(self) -> bool:
        """As the metric of events."""
        return self.metric.is_curve

    @property
    def higher_is_better(self) -> bool:
        """As of the metric of events."""
        return self.metric.higher_is_better

    def update(self, *outputs: torch.Tensor, **options: torch.Tensor) -> StructuredMetric:
        """Adds a batch; what it takes is what the function that finds the events takes. Returns the metric itself."""
        events = type(self).events_of(*outputs, ignore_index=self.ignore_index, **self.events_options, **options)
        if len(events[0]) == 0:
            return self
        rows = Rows(*events)
        return self.add(self.sums_of(rows), len(rows))

    def options(self) -> dict:
        return {**super().options(), "metric": self.metric.options()}

    def _sums(self, rows: Rows) -> torch.Tensor:
        return self.metric._sums(rows)

    def _value(self, sums: torch.Tensor) -> torch.Tensor:
        return self.metric._value(sums)

    def _result(self, sums: torch.Tensor) -> Any:
        return self.metric._result(sums)

    def _replicates(self, sums: torch.Tensor, num_resamples: int, seed: int) -> torch.Tensor:
        return self.metric._replicates(sums, num_resamples, seed)


class TokenMetric(StructuredMetric):
    """A metric of tokens, as `token_events` finds them. *When to use:* for taggers and language models.

    Example:
        >>> import torch
        >>> metric = TokenMetric("accuracy_at_coverage")
        >>> probs = torch.tensor([[[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]]])
        >>> metric.update(probs, torch.tensor([[0, 1, 1]]), attention_mask=torch.tensor([[1, 1, 0]])).num_rows
        2
    """

    name = "token"
    events_of = staticmethod(exact.token_events)


class EntityMetric(StructuredMetric):
    """A metric of predicted entities, as `entity_events` finds them. *When to use:* for named entities.

    Args:
        label_names (sequence of `str`): the tags, in order.
        metric, ignore_index, aggregate: as in `StructuredMetric` and `entity_events`.
    """

    name = "entity"
    events_of = staticmethod(exact.entity_events)

    def __init__(self, label_names: Sequence[str], metric: str | Metric = "ece", **options: Any):
        super().__init__(metric, label_names=tuple(label_names), **options)


class SpanMetric(StructuredMetric):
    """A metric of answers, as `span_events` finds them. *When to use:* for extractive question answering."""

    name = "span"
    events_of = staticmethod(exact.span_events)


class SequenceMetric(StructuredMetric):
    """A metric of whole sequences, as `sequence_events` finds them. *When to use:* where one mistake spoils all."""

    name = "sequence"
    events_of = staticmethod(exact.sequence_events)


class InferenceMetric(StructuredMetric):
    """A metric of generated tokens, as `inference_events` finds them. *When to use:* on what a model really writes."""

    name = "inference"
    events_of = staticmethod(exact.inference_events)
