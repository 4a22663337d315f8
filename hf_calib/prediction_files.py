"""Probabilities and labels in a file: Parquet, CSV, JSON lines or `.npz`."""

from __future__ import annotations

import re
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch


SUFFIXES = (".parquet", ".csv", ".jsonl", ".npz")


def read_predictions(
    path: str | Path, *, probs_column: str = "probs", label_column: str = "label"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads probabilities and labels for `evaluate_calibration`.

    Args:
        path (`str` or `Path`): a `.parquet`, `.csv`, `.jsonl` or `.npz` file.
        probs_column (`str`): a list per row (class probabilities), a number per row (the probability of an event), or
            the stem of one column per class: `probs_0`, `probs_1`, ...
        label_column (`str`): the class's number, or whether the event happened.
    Returns:
        `(N, C)` or `(N,)` float64 probabilities and `(N,)` int64 labels.
    Raises:
        ValueError: another kind of file, a missing column, or values that are no numbers.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"predictions: got {path}; allowed are {', '.join(SUFFIXES)} files")
    if not path.is_file():
        raise FileNotFoundError(f"predictions: there is no file {path}")
    try:
        columns = _read_npz(path) if path.suffix == ".npz" else _read_table(path)
        probs = torch.from_numpy(np.array(_probs(columns, probs_column, path), dtype=np.float64))
        labels = np.asarray(_column(columns, label_column, path))
        numbers = labels.astype(np.float64)
        if not (np.isfinite(numbers).all() and np.array_equal(labels, np.trunc(numbers))):
            raise ValueError("labels are not whole numbers")
    except (TypeError, ValueError, EOFError, BadZipFile) as error:
        if str(error).startswith("column:"):
            raise
        raise ValueError(f"predictions: {path} holds values that are no probabilities and labels ({error})") from None
    return probs, torch.from_numpy(labels.astype(np.int64))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it is a single array")
        return dict(arrays)


def _read_table(path: Path) -> dict[str, list]:
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
        return np.stack([_column(columns, f"{name}_{index}", path) for index in range(len(numbered))], axis=1)
    values = _column(columns, name, path)
    return np.stack(values) if values.dtype == object else values


def _column(columns: dict, name: str, path: Path) -> np.ndarray:
    if name not in columns:
        raise ValueError(f"column: {path} has no {name!r}; it has {', '.join(columns)}")
    return columns[name]
