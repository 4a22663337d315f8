"""Metrics of a file of any length: what is kept of its rows are sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from .functional.checks import check_probs
from .metrics import METRICS, GroupedMetric, MetricCollection, make_metrics
from .metrics.collection import named_numbers
from .prediction_files import Batch, read_batches
from .report import CalibrationReport, default_metrics


MAX_GROUPS = 1000  # each has sums of its own, up to some hundred kB
IGNORED = -100


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads that share a batch wait for each other many times: on a busy machine, longer than the work takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Measured(NamedTuple):
    """Metrics of all rows of a file, and of each group of them where there is a group column."""

    total: MetricCollection
    groups: dict[str, MetricCollection]

    @_one_thread()
    def report(self, seed: int = 0) -> CalibrationReport:
        """The report of all rows."""
        return CalibrationReport.from_metrics(self.total, seed=seed)

    @_one_thread()
    def group_records(self, seed: int = 0) -> dict[str, Any]:
        """Plain JSON values: each group's numbers, and the worst group of each metric with the interval there.

        Tests of calibration have no worst group: their statistics depend on how many rows there are. Without a group
        column, nothing.
        """
        groups = {
            group: {"num_rows": found.num_rows, **named_numbers(found.compute())}
            for group, found in self.groups.items()
        }
        worst = {}
        for name, metric in self.total.metrics.items() if groups else ():
            if not isinstance(metric.compute(), tuple):
                grouped = GroupedMetric(metric)
                grouped.groups = {group: found.metrics[name] for group, found in self.groups.items()}
                group = grouped.compute().worst
                report = CalibrationReport.from_metrics(MetricCollection({name: grouped.groups[group]}), seed=seed)
                worst[name] = {"group": group, "num_rows": report.num_rows, **report.to_dict()["after"][name]}
        return {"groups": groups, "worst": worst} if groups else {}


@_one_thread()
def measure_predictions(
    path: str | Path,
    metrics: Sequence[str] = (),
    *,
    probs_column: str = "probs",
    label_column: str = "label",
    group_column: str | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> Measured:
    """Streams a file into metrics, in memory that does not grow with its rows.

    Args:
        path, probs_column, label_column: as in `iterate_predictions`. Rows with the label -100 are left out.
        metrics (names in `METRICS`, but not of curves): by default accuracy, NLL, Brier, ECE and smooth ECE; of events
            there is no accuracy.
        group_column (`str`, *optional*): names or numbers, at most 1,000 different ones.
        advance (callable): is told the number of rows after each batch.
    Returns:
        [`Measured`]: `total`, and `groups` by name.
    Raises:
        ValueError: as `iterate_predictions` and, with the number of the row, as the metrics' functions.
    """
    path = Path(path)
    for name in make_metrics(metrics):
        if METRICS[name].is_curve:
            raise ValueError(f"metrics: got {name!r}, which is a curve; allowed are those that are numbers")
    groups: dict[str, MetricCollection] = {}
    for batch in _ahead(read_batches(path, probs_column, label_column, group_column)):
        if not metrics:
            metrics = default_metrics(classes=batch.probs.dim() > 1)
        for name, rows in _members(batch):
            if name not in groups and len(groups) == MAX_GROUPS:
                raise ValueError(f"group_column: got {group_column!r}; allowed are at most {MAX_GROUPS} groups")
            collection = groups.setdefault(name, MetricCollection(metrics))
            try:
                collection.update(batch.probs[rows], batch.labels[rows])
            except ValueError as error:
                raise _of_a_row(error, batch, path) from None
        advance(len(batch.labels))
    if not groups:
        raise ValueError(f"labels: no row of {path} is left after leaving out those equal to {IGNORED}")
    total = MetricCollection(metrics).merge(*groups.values())
    return Measured(total, {} if group_column is None else dict(sorted(groups.items())))


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, each read while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def _members(batch: Batch) -> Iterator[tuple[str, slice | torch.Tensor]]:
    """The groups of a batch and their rows, which are not all ignored."""
    kept = batch.labels != IGNORED
    if batch.groups is None:
        if kept.any():
            yield "", slice(None)
        return
    if pa.types.is_nested(batch.groups.type):
        raise ValueError(f"group_column: got a column of {batch.groups.type}; allowed are names and numbers")
    encoded = batch.groups.dictionary_encode("encode")  # gaps are a group too
    rows = kept.nonzero()[:, 0]
    codes = torch.from_dlpack(encoded.indices)[rows].long()
    parts = rows[codes.argsort(stable=True)].split(torch.bincount(codes, minlength=len(encoded.dictionary)).tolist())
    for name, part in zip(encoded.dictionary.to_pylist(), parts, strict=True):
        if len(part):
            # JSON's whole numbers are floating here
            yield str(int(name) if isinstance(name, float) and name.is_integer() else name), part


def _of_a_row(error: ValueError, batch: Batch, path: Path) -> ValueError:
    """What is wrong with the first wrong row, and its number; the error itself where each row alone is right."""
    rows = (batch.labels != IGNORED).nonzero()[:, 0]
    while len(rows) > 1:
        half = rows[: len(rows) // 2]
        rows = half if _complaint(batch, half) else rows[len(half) :]
    if not (complaint := _complaint(batch, rows)):
        return error
    complaint = complaint.replace("row 0 ", "the row ", 1)  # of the one row that was checked
    return ValueError(f"predictions: {path}, row {batch.first_row + int(rows)}: {complaint}")


def _complaint(batch: Batch, rows: torch.Tensor) -> str:
    try:
        check_probs(batch.probs[rows], batch.labels[rows])
    except ValueError as error:
        return str(error)
    return ""
