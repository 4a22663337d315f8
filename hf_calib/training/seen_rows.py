"""Whether rows that a calibrator is to be fitted on were trained on: compared by what the model is given of them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import IterableDataset

from ..calibrators.rows import warn_caller


NOT_INPUTS = {"labels", "label", "label_ids", "start_positions", "end_positions", "attention_mask"}


def refuse_seen_rows(train_dataset: Any, dataset: Any, model: nn.Module) -> None:
    """Raises a ValueError if rows of `dataset` are in `train_dataset`; warns where that cannot be told."""
    if train_dataset is None:
        return
    columns = _input_columns(train_dataset, dataset, model)
    if not columns:
        warn_caller(
            "It cannot be checked whether training has seen rows of the calibration dataset: it or train_dataset "
            "is not a map-style dataset of dictionaries, or they have no column in common that the model takes."
        )
        return
    train_rows = set(_row_hashes(train_dataset, columns))
    seen = [index for index, row in enumerate(_row_hashes(dataset, columns)) if row in train_rows]
    if seen:
        raise ValueError(
            f"dataset: {len(seen)} of {len(dataset)} rows are in train_dataset too (row "
            f"{', '.join(map(str, seen[:5]))}{', ...' if len(seen) > 5 else ''}); allowed are rows that training "
            "has not seen"
        )


def _input_columns(train_dataset: Any, dataset: Any, model: nn.Module) -> list[str]:
    """Columns to compare rows by: the model's inputs that both datasets have; none where one has no such rows."""
    columns = None
    for rows in (train_dataset, dataset):
        if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            return []
        if len(rows) == 0 or not isinstance(rows[0], Mapping):
            return []
        columns = set(rows[0]) if columns is None else columns & set(rows[0])
    return sorted((columns - NOT_INPUTS) & set(inspect.signature(model.forward).parameters))


def _row_hashes(dataset: Any, columns: list[str]) -> Iterator[bytes]:
    for index in range(len(dataset)):
        row = dataset[index]
        mask = None if row.get("attention_mask") is None else np.asarray(row["attention_mask"]) == 1
        digest = hashlib.blake2b(digest_size=16)
        for name in columns:
            values = _as_array(row[name])
            # Padding differs between two preparations of the same text, and is not content.
            if mask is not None and mask.ndim == 1 and values.shape[:1] == mask.shape:
                values = values[mask]
            digest.update(f"{name}{values.shape}".encode())
            digest.update(values.tobytes())
        yield digest.digest()


def _as_array(value: Any) -> np.ndarray:
    """One dtype for integers and one for floats, so that lists, arrays and tensors of the same numbers are equal."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # ragged lists, bfloat16 tensors
        array = np.asarray(repr(value))
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    return np.frombuffer(repr(value).encode(), dtype=np.uint8)
