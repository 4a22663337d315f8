"""Streaming metrics: what `hf_calib.functional` computes of all rows, of rows that come in batches and processes."""

from .base import EventMetric, MeanMetric, Metric, Rows
from .collection import ComputeMetrics, MetricCollection
from .decomposition import ScoreDecomposition, score_decomposition
from .grouped import GroupedMetric, Groups, bootstrap_groups
from .intervals import Comparison, bootstrap, compare
from .registry import METRICS, make_metrics
from .structured import EntityMetric, InferenceMetric, SequenceMetric, SpanMetric, TokenMetric


__all__ = [
    "METRICS",
    "Comparison",
    "ComputeMetrics",
    "EntityMetric",
    "EventMetric",
    "GroupedMetric",
    "Groups",
    "InferenceMetric",
    "MeanMetric",
    "Metric",
    "MetricCollection",
    "Rows",
    "ScoreDecomposition",
    "SequenceMetric",
    "SpanMetric",
    "TokenMetric",
    "bootstrap",
    "bootstrap_groups",
    "compare",
    "make_metrics",
    "score_decomposition",
]
