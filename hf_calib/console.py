"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from .calibrators import Calibrator
from .report import CalibrationReport


def print_report(report: CalibrationReport, console: Console) -> None:
    """The report's table, its note and its verdict."""
    table = Table(*report.header(), box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in report.rows():
        table.add_row(*map(_escape, row))
    console.print(table)
    for line in filter(None, (report.note(), report.verdict())):
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


def _escape(cell: str) -> str:
    return cell.replace("[", r"\[")
