"""Any metric, of each group of rows by itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from ..distributed import union_over_processes
from ..functional.resampling import Estimate
from .base import Metric
from .intervals import bootstrap
from .registry import make_metric


T = TypeVar("T")


class Groups(NamedTuple, Generic[T]):
    """What each group has, and which group has the worst; of equals the first by name."""

    values: dict[str, T]
    worst: str


class GroupedMetric:
    """One metric for each group of rows, streaming. *When to use:* to see whom an average hides.

    The worst of many small groups is also the unluckiest: read its interval, not its value alone.

    Args:
        metric (name in `METRICS`, or [`Metric`] for options): what is computed of each group.
    Attributes:
        groups (`dict` of `str` to [`Metric`]): the state: one metric per group.
    Example:
        >>> import torch
        >>> metric = GroupedMetric("accuracy")
        >>> probs, labels = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1, 1])
        >>> metric.update(probs, labels, ["de", "de", "fr"]).compute().worst
        'de'
    """

    def __init__(self, metric: str | Metric = "ece"):
        self.metric = make_metric(metric)
        self.metric.check_number()
        self.groups: dict[str, Metric] = {}

    def update(self, probs: torch.Tensor, labels: torch.Tensor, groups: Sequence[Any] | torch.Tensor) -> GroupedMetric:
        """Adds rows; `groups` has a name or number for each entry of the first dimension. Returns the metric."""
        found = GroupedMetric(self.metric)
        for name, members in group_rows(labels, groups, self.metric.ignore_index):
            found.groups[name] = copy.copy(self.metric).reset().update(probs[members], labels[members])
        return self.merge(found)  # not before every group has accepted its rows

    def compute(self) -> Groups[torch.Tensor]:
        """The metric of each group, `()` float64, and the name of the worst group."""
        return self._found({name: metric.compute() for name, metric in self._seen()})

    def interval(self, **options: Any) -> Groups[Estimate]:
        """As `compute`, with each group's interval: `Metric.interval` of its own rows."""
        return self._found({name: metric.interval(**options) for name, metric in self._seen()})

    def merge(self, *others: GroupedMetric) -> GroupedMetric:
        """Adds what others have seen. Returns the metric itself."""
        for other in others:
            for name, metric in other.groups.items():
                self.groups.get(name, self.metric).check_equal(metric)
        for other in others:
            for name, metric in other.groups.items():
                self.groups.setdefault(name, copy.copy(self.metric).reset()).merge(metric)
        return self

    def reset(self) -> GroupedMetric:
        """Forgets all rows and groups. Returns the metric itself."""
        self.groups = {}
        return self

    def all_reduce(self) -> GroupedMetric:
        """A metric with the rows of all processes, as `Metric.all_reduce`; they need not have the same groups."""
        total = GroupedMetric(self.metric)
        none = copy.copy(self.metric).reset()
        names = union_over_processes(list(self.groups))
        total.groups = {name: self.groups.get(name, none).all_reduce() for name in names}
        return total

    def _seen(self) -> list[tuple[str, Metric]]:
        """Groups by name; one without any event, as without a predicted entity, has no number."""
        return [(name, self.groups[name]) for name in sorted(self.groups) if self.groups[name].num_rows]

    def _found(self, values: dict[str, Any]) -> Groups:
        if not values:
            raise ValueError(f"{self.metric.name}: no row was seen; call update(probs, labels, groups) first")
        return Groups(values, _worst(values, self.metric))


def bootstrap_groups(
    metric: str | Metric,
    probs: torch.Tensor,
    labels: torch.Tensor,
    groups: Sequence[Any] | torch.Tensor,
    **options: Any,
) -> Groups[Estimate]:
    """Any metric of each group with its bootstrap interval, also where `GroupedMetric.interval` has none.

    Resampling is stratified: each group's rows are drawn from its own, so that no group is lost from a resample.

    Args:
        metric: as in `GroupedMetric`.
        probs, labels, **options: as in `bootstrap`.
        groups (sequence or integer tensor): a name or number for each entry of the first dimension.
    Returns:
        [`Groups`]: `values`, a `dict` of group name to [`Estimate`], and `worst`, the name of the worst.
    Raises:
        ValueError: as `bootstrap`; or there are not as many groups as rows.
    """
    metric = make_metric(metric, **{key: options[key] for key in ("task", "ignore_index") if key in options})
    options = {"task": metric.task, "ignore_index": metric.ignore_index, **options}
    found = {
        name: bootstrap({name: metric}, probs[members], labels[members], **options)[name]
        for name, members in group_rows(labels, groups, options["ignore_index"])
    }
    found = {name: found[name] for name in sorted(found)}
    return Groups(found, _worst(found, metric))


def group_rows(
    labels: torch.Tensor, groups: Sequence[Any] | torch.Tensor, ignore_index: int
) -> list[tuple[str, torch.Tensor]]:
    """Each group's name and `(n,)` int64 indices of its entries; groups of ignored rows alone are left out."""
    names = [str(name) for name in (groups.tolist() if isinstance(groups, torch.Tensor) else groups)]
    if len(names) != len(labels):
        raise ValueError(f"groups: got {len(names)} for {len(labels)} rows; allowed is one for each")
    labels = labels.long()  # first: in uint8 the label 156 would equal -100
    numbers: dict[str, int] = {}
    codes = torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.int64)
    order = codes.argsort(stable=True)
    parts = order.split(torch.bincount(codes, minlength=len(numbers)).tolist())
    rows = zip(numbers, parts, strict=True)
    found = [(name, part) for name, part in rows if bool((labels[part] != ignore_index).any())]
    if not found:
        raise ValueError(f"labels: no row is left after leaving out those equal to ignore_index={ignore_index}")
    return found


def _worst(values: dict[str, Any], metric: Metric) -> str:
    """A group whose metric is not defined (NaN) is never the worst, unless no other is there."""

    def badness(name: str) -> float:
        value = values[name]
        number = float(value[0] if isinstance(value, tuple) else value)  # of an estimate and of a test
        if metric.bounds[0] < 0:  # a deviation to either side
            number = abs(number)
        return -math.inf if math.isnan(number) else -number if metric.higher_is_better else number

    return max(values, key=badness)
