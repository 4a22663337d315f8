"""Probabilities and labels in a file: Parquet, CSV, JSON lines or `.npz`."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch


SUFFIXES = (".parquet", ".csv", ".jsonl", ".npz")


def read_predictions(
    path: str | Path, *, probs_column: str = "probs", label_column: str = "label"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads probabilities and labels for `evaluate_calibration`.

    Args:
        path (`str` or `Path`): a `.parquet`, `.csv` (with a header), `.jsonl` or `.npz` file.
        probs_column (`str`): a list per row (class probabilities), a number per row (the probability of an event), or
            the stem of one column per class: `probs_0`, `probs_1`, ...
        label_column (`str`): the class's number, or whether the event happened.
    Returns:
        `(N, C)` or `(N,)` float64 probabilities and `(N,)` int64 labels.
    Raises:
        ValueError: another kind of file, one that cannot be read or holds no rows, a missing column, or values that
            are no numbers.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"predictions: got {path}; allowed are {', '.join(SUFFIXES)} files")
    if not path.is_file():
        raise FileNotFoundError(f"predictions: there is no file {path}")
    columns = _read(path)
    probs, labels = _probs(columns, probs_column, path), _labels(columns, label_column, path)
    return torch.from_numpy(probs), torch.from_numpy(labels)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The file's columns."""
    with path.open("rb") as file:
        lines = list(islice(filter(bytes.strip, file), 2))
    if len(lines) <= (path.suffix == ".csv"):  # a header is no row
        raise ValueError(f"predictions: {path} holds no rows")
    try:
        return _read_npz(path) if path.suffix == ".npz" else _read_table(path)
    except Exception as error:  # of damaged files the readers of NumPy and pyarrow raise all sorts
        raise ValueError(f"predictions: cannot read {path}: {' '.join(str(error).split())}") from None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it is a single array, where columns have names")
        return {name: np.atleast_1d(array) for name, array in arrays.items()}


def _read_table(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table as read
    elif path.suffix == ".csv":
        from pyarrow.csv import read_csv as read
    else:
        from pyarrow.json import read_json as read
    table = read(path)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _probs(columns: dict, name: str, path: Path) -> np.ndarray:
    numbered = [column for column in columns if re.fullmatch(re.escape(name) + r"_\d+", column)]
    if name not in columns and numbered:
        classes = [_numbers(columns, f"{name}_{index}", path) for index in range(len(numbered))]
        lengths = sorted({len(values) for values in classes})
        if len(lengths) > 1:
            raise ValueError(
                f"predictions: {path}: {name}_0, {name}_1, ... have {lengths} rows; allowed is one length"
            )
        return np.stack(classes, axis=1)
    return _numbers(columns, name, path)


def _numbers(columns: dict, name: str, path: Path) -> np.ndarray:
    values = _column(columns, name, path)
    try:
        return np.array(np.stack(values) if values.dtype == object else values, dtype=np.float64)
    except (TypeError, ValueError):
        shapes = [_shape(value) for value in values]
        row = next((row for row, shape in enumerate(shapes) if shape is None or shape != shapes[0]), 0)
        wrong, allowed = np.asarray(values[row]).tolist(), "numbers, or lists of them that are equally long"
    if path.suffix == ".csv" and str(wrong).startswith("["):
        allowed = f"numbers; a CSV cannot hold lists, use columns {name}_0, {name}_1, ... or another format"
    raise ValueError(f"predictions: {path}: {name!r} is {wrong!r} in row {row}; allowed are {allowed}")


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of a number or a list of numbers."""
    try:
        return np.asarray(value, dtype=np.float64).shape
    except (TypeError, ValueError):
        return None


def _labels(columns: dict, name: str, path: Path) -> np.ndarray:
    labels = _column(columns, name, path)
    for row, label in enumerate(labels.tolist()):
        if not _is_whole(label):
            raise ValueError(f"predictions: {path}: {name!r} is {label!r} in row {row}; allowed are whole numbers")
    return labels.astype(np.int64)


def _is_whole(value: Any) -> bool:
    try:
        return bool(int(value) == value)
    except (TypeError, ValueError, OverflowError):  # of text and gaps, and of infinity
        return False


def _column(columns: dict, name: str, path: Path) -> np.ndarray:
    if name not in columns:
        raise ValueError(f"column: {path} has no {name!r}; it has {', '.join(columns)}")
    if not columns[name].size:
        raise ValueError(f"predictions: {path} holds no rows")
    return columns[name]
