"""Probabilities and labels in a file (Parquet, CSV, JSON lines, `.npz`), read at once or in batches."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pyarrow import compute, csv, json, parquet

from .functional.checks import check_count


BATCH_NUMBERS = 2**20  # probabilities that a batch holds, by default
BATCH_ROWS = 2**17  # and rows, at most
STREAM_BYTES = 2**20  # read at a time of each Parquet column
BLOCK_BYTES = 2**24  # text that is parsed at a time; a row of JSON may not be longer

# Reads some columns; how many rows at a time is a wish, since text comes in blocks of bytes
Reader = Callable[[list[str], int | None], Iterable[pa.RecordBatch]]


def read_predictions(
    path: str | Path, *, probs_column: str = "probs", label_column: str = "label"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads probabilities and labels for `evaluate_calibration`: all batches of `iterate_predictions` in one.

    Args:
        path, probs_column, label_column: as in `iterate_predictions`.
    Returns:
        `(N, C)` or `(N,)` probabilities and `(N,)` int64 labels.
    Raises:
        ValueError: as `iterate_predictions`.
    """
    batches = iterate_predictions(path, probs_column=probs_column, label_column=label_column)
    probs, labels = zip(*batches, strict=True)
    return torch.cat(probs), torch.cat(labels)


def iterate_predictions(
    path: str | Path, *, probs_column: str = "probs", label_column: str = "label", batch_rows: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Reads batches of probabilities and labels. But for `.npz`, memory does not grow with the file.

    Args:
        path (`str` or `Path`): a `.parquet`, `.csv` (with a header), `.jsonl` or `.npz` file.
        probs_column (`str`): a list per row (class probabilities), a number per row (the probability of an event), or
            the stem of one column per class: `probs_0`, `probs_1`, ...
        label_column (`str`): the class's number, or whether the event happened.
        batch_rows (`int`, *optional*): rows in a batch, at most; by default as many as have a million probabilities.
    Yields:
        `(n, C)` or `(n,)` probabilities, as precise as the file where it is floating and float64 elsewhere, and `(n,)`
        int64 labels.
    Raises:
        ValueError: another kind of file, one that cannot be read or holds no rows, a missing column, or values that
            are no numbers, with the number of their row in the file.
    """
    if batch_rows is not None:
        check_count("batch_rows", batch_rows)
    for batch in read_batches(Path(path), probs_column, label_column, None, batch_rows):
        yield batch.probs, batch.labels


def count_rows(path: str | Path) -> int | None:
    """How many rows a Parquet file has; other files do not say so before they are read."""
    path = Path(path)
    if path.suffix != ".parquet":
        return None
    _check_file(path)
    with _reading(path):
        return parquet.read_metadata(path).num_rows


class Batch(NamedTuple):
    """A batch of a file."""

    first_row: int
    probs: torch.Tensor
    labels: torch.Tensor
    groups: pa.Array | None


def read_batches(
    path: Path, probs_column: str, label_column: str, group_column: str | None, batch_rows: int | None = None
) -> Iterator[Batch]:
    """The file's batches, checked to be numbers."""
    _check_file(path)
    names, read = _open(path)
    classes = _probs_columns(names, probs_column)
    columns = [*classes, label_column] if group_column is None else [*classes, label_column, group_column]
    for name in columns:
        if name not in names:
            raise ValueError(f"column: {path} has no {name!r}; it has {', '.join(names)}")
    width = None
    for first_row, batch in _each(path, read, list(dict.fromkeys(columns)), batch_rows):
        cells = {name: _Cells(batch[name], name, path, first_row) for name in columns}
        if classes == [probs_column]:
            probs = cells[probs_column].probs(width)
        else:
            probs = torch.stack([cells[name].numbers() for name in classes], dim=1)
        labels, width = cells[label_column].whole_numbers(), probs[0].numel()
        size = batch_rows or _batch_rows(width)
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            groups = None if group_column is None else batch[group_column][part]
            yield Batch(first_row + start, probs[part], labels[part], groups)


def _batch_rows(numbers: float) -> int:
    """Rows of so many numbers each that make a batch."""
    return max(1, min(BATCH_ROWS, int(BATCH_NUMBERS / max(1, numbers))))


def _check_file(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"predictions: got {path}; allowed are {', '.join(SUFFIXES)} files")
    if not path.is_file():
        raise FileNotFoundError(f"predictions: there is no file {path}")
    with path.open("rb") as file:
        lines = islice(filter(bytes.strip, file), 2) if path.suffix in (".csv", ".jsonl") else [file.read(1)]
        if sum(map(bool, lines)) <= (path.suffix == ".csv"):  # a header is no row
            raise _no_rows(path)


def _no_rows(path: Path) -> ValueError:
    return ValueError(f"predictions: {path} holds no rows")


@contextmanager
def _reading(path: Path, first_row: int = 0) -> Iterator[None]:
    """One line for what the readers of NumPy and pyarrow raise of damaged files, which is all sorts of errors."""
    try:
        yield
    except Exception as error:
        where = f" from row {first_row} on" if first_row else ""
        raise ValueError(f"predictions: cannot read {path}{where}: {' '.join(str(error).split())}") from None


def _each(
    path: Path, read: Reader, columns: list[str], batch_rows: int | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches that have rows, and the number of their first row."""
    first_row = 0
    with _reading(path):
        batches = iter(read(columns, batch_rows))
    while True:
        with _reading(path, first_row):
            batch = next(batches, None)
        if batch is None:
            break
        if batch.num_rows:
            yield first_row, batch
        first_row += batch.num_rows
    if first_row == 0:
        raise _no_rows(path)


def _open(path: Path) -> tuple[list[str], Reader]:
    """The names of the columns, and what reads some of them."""
    with _reading(path):
        names, read = OPENERS[path.suffix](path)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"it has two columns {', '.join(twice)}")
    return names, read


def _open_parquet(path: Path) -> tuple[list[str], Reader]:
    # pre-buffering keeps all that it has read; a buffered stream, a megabyte of each column
    file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=STREAM_BYTES)

    def read(columns: list[str], batch_rows: int | None) -> Iterable[pa.RecordBatch]:
        if batch_rows is None and file.metadata.num_row_groups:
            group = file.metadata.row_group(0)
            chunks = (group.column(index) for index in range(group.num_columns))
            numbers = sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
            batch_rows = _batch_rows(numbers / max(1, group.num_rows))
        return file.iter_batches(batch_rows or BATCH_ROWS, columns=columns)

    return file.schema_arrow.names, read


def _open_csv(path: Path) -> tuple[list[str], Reader]:
    def start(**options: Any) -> csv.CSVStreamingReader:
        return csv.open_csv(
            path, read_options=csv.ReadOptions(block_size=BLOCK_BYTES), convert_options=csv.ConvertOptions(**options)
        )

    def read(columns: list[str], batch_rows: int | None) -> Iterable[pa.RecordBatch]:
        # as text, or else 0.5 would be refused after a block of 0 and 1
        types = dict.fromkeys(columns, pa.string())
        return start(include_columns=columns, column_types=types, strings_can_be_null=True)

    return start().schema.names, read


def _open_jsonl(path: Path) -> tuple[list[str], Reader]:
    def start(**options: Any) -> json.JSONStreamingReader:
        return json.open_json(
            path, read_options=json.ReadOptions(block_size=BLOCK_BYTES), parse_options=json.ParseOptions(**options)
        )

    schema = start().schema

    def read(columns: list[str], batch_rows: int | None) -> Iterable[pa.RecordBatch]:
        # floating, or else 0.5 would be refused after a block of 0 and 1
        types = pa.schema([(name, _floating(schema.field(name).type)) for name in columns])
        return start(explicit_schema=types, unexpected_field_behavior="ignore")

    return schema.names, read


def _floating(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_floating(kind.value_type))
    return pa.float64() if pa.types.is_integer(kind) or pa.types.is_null(kind) else kind


def _open_npz(path: Path) -> tuple[list[str], Reader]:
    with path.open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it is a single array, where columns have names")
        arrays = {name: np.atleast_1d(array) for name, array in arrays.items()}

    def read(columns: list[str], batch_rows: int | None) -> Iterable[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict({name: _arrow(arrays[name]) for name in columns})

    return list(arrays), read


def _arrow(values: np.ndarray) -> pa.Array:
    """A list per row for each dimension after the first."""
    array = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


OPENERS = {".parquet": _open_parquet, ".csv": _open_csv, ".jsonl": _open_jsonl, ".npz": _open_npz}
SUFFIXES = tuple(OPENERS)


def _probs_columns(names: list[str], name: str) -> list[str]:
    """The column itself, or the numbered ones, counted from 0."""
    numbered = [column for column in names if re.fullmatch(re.escape(name) + r"_\d+", column)]
    return [name] if name in names or not numbered else [f"{name}_{index}" for index in range(len(numbered))]


class _Cells(NamedTuple):
    """A column of a batch, and what an error calls its cells."""

    values: pa.Array
    name: str
    path: Path
    first_row: int

    def probs(self, width: int | None) -> torch.Tensor:
        """`(n,)` numbers, or `(n, width)` lists of them; without a width, that of the first row."""
        kind, allowed = self.values.type, "numbers, or lists of them that are equally long"
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            return self.numbers(allowed)
        lengths = compute.list_value_length(self.values).to_numpy(zero_copy_only=False)  # NaN where there is none
        wrong = np.flatnonzero(lengths != (lengths[0] if width is None else width))
        if len(wrong):
            raise self.refused(int(wrong[0]), allowed)
        if (numbers := _numbers(self.values.flatten())) is None:
            raise self.refused(0, allowed)
        return numbers.view(len(self.values), -1)

    def numbers(self, allowed: str = "numbers") -> torch.Tensor:
        """`(n,)` floating, NaN where there is a gap."""
        values = _parsed(self.values) if self.path.suffix == ".csv" else self.values
        if (numbers := _numbers(values)) is None:
            raise self.refused(
                next((row for row, cell in enumerate(values) if not _is_number(cell.as_py())), 0), allowed
            )
        return numbers

    def whole_numbers(self) -> torch.Tensor:
        """`(n,)` int64."""
        if pa.types.is_integer(self.values.type) and not self.values.null_count:
            return torch.from_dlpack(self.values.cast(pa.int64(), safe=False))
        numbers = self.numbers("whole numbers")
        wrong = (numbers.frac() == 0).logical_not().nonzero()  # written so that NaN and infinity are wrong too
        if len(wrong):
            row = int(wrong[0])
            raise self.refused(row, "whole numbers", numbers[row].item())
        return numbers.long()

    def refused(self, row: int, allowed: str, value: object = None) -> ValueError:
        value = self.values[row].as_py() if value is None else value
        if self.path.suffix == ".csv" and str(value).startswith("["):
            allowed = (
                f"numbers; a CSV cannot hold lists, use columns {self.name}_0, {self.name}_1, ... or another format"
            )
        place = f"{self.name!r} is {reprlib.repr(value)} in row {self.first_row + row}"
        return ValueError(f"predictions: {self.path}: {place}; allowed are {allowed}")


def _numbers(values: pa.Array) -> torch.Tensor | None:
    """Floating, NaN where there is a gap; `None` where they are no numbers."""
    kind = values.type
    if not pa.types.is_floating(kind):
        if not any(
            test(kind) for test in (pa.types.is_integer, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
        ):
            return None
        values = values.cast(pa.float64(), safe=False)
    return torch.from_dlpack(values.fill_null(float("nan")) if values.null_count else values)


def _parsed(text: pa.Array) -> pa.Array:
    """The numbers or truth values that all entries are; or the text as it was."""
    for kind in (pa.float64(), pa.bool_()):
        try:
            return compute.utf8_trim_whitespace(text).cast(kind)
        except pa.ArrowInvalid:
            continue
    return text


def _is_number(value: Any) -> bool:
    try:
        return float(value) == value or isinstance(value, str)
    except (TypeError, ValueError):
        return False
