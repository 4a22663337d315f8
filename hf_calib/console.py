"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .calibrators import Calibrator
from .functional.resampling import Estimate
from .report import TITLES, CalibrationReport


def print_report(report: CalibrationReport, console: Console) -> None:
    """The report's table, its note and its verdict."""
    table = _table(*report.header())
    for row in report.rows():
        table.add_row(*map(_escape, row))
    console.print(table)
    for line in filter(None, (report.note(), report.verdict())):
        console.print(line, markup=False, highlight=False)


def print_groups(record: dict[str, Any], console: Console) -> None:
    """What `Measured.group_records` gives, if that is anything: a row per group, and where each metric is worst."""
    if not record:
        return
    names = list(next(iter(record["groups"].values())))[1:]
    table = _table("Group", "Rows", *(TITLES.get(name, name) for name in names))
    for group, numbers in record["groups"].items():
        num_rows = numbers["num_rows"]
        cells = (str(Estimate(numbers[name], None, None, num_rows)) for name in names)
        table.add_row(_escape(group), f"{num_rows:,}", *cells)
    console.print(table)
    for name, found in record["worst"].items():
        number = Estimate(found["value"], found["low"], found["high"], found["num_rows"])
        line = f"Worst by {TITLES.get(name, name)}: {found['group']}, {number}, {found['num_rows']:,} rows."
        console.print(line, markup=False, highlight=False)


def print_selection(calibrator: Calibrator, console: Console) -> None:
    """The candidates, where there was a choice, and what was fitted."""
    for row in getattr(calibrator, "selection", ()):
        mark = "<- chosen" if row.name == calibrator.name else ""
        console.print(
            f"   {row.name:<12} cross-validated NLL {row.score:.4f} (standard error {row.standard_error:.4f}) {mark}",
            markup=False,
            highlight=False,
        )
    console.print(f"   Fitted {calibrator} on {calibrator.provenance['rows']:,} rows", markup=False, highlight=False)


@contextmanager
def row_bar(total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal, and what moves it by a number of rows."""
    columns = TextColumn("{task.completed:,} rows"), BarColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=total)
        yield lambda rows: progress.advance(task, rows)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the libraries' own progress bars."""
    import datasets
    from transformers.utils import logging

    bars, hidden = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
        if not hidden:
            datasets.enable_progress_bars()


@contextmanager
def no_notices() -> Iterator[None]:
    """Without what transformers logs below an error."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _table(*header: str) -> Table:
    """Words on the left, numbers on the right."""
    table = Table(*header, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _escape(cell: str) -> str:
    return cell.replace("[", r"\[")


def bars_on_a_terminal() -> AbstractContextManager[None]:
    """In a file or a pipe, bars are debris."""
    return nullcontext() if sys.stderr.isatty() else no_bars()
