"""How evaluate's modules take rows: as the tensors that they are, or through evaluate's Arrow files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Features, List, Value


SHAPES = ((1, 0), (0, 0), (1, 1), (2, 1), (2, 2))  # list levels of a row's prediction and of its reference


class TensorInputs:
    """What goes in front of `evaluate.Metric` or `evaluate.Comparison`, so that rows stay tensors wherever they can.

    `compute` with all rows, in one process and with nothing added before, hands them to `scores` as they are. In every
    other case they go through evaluate's own Arrow files, and `scores` gets equal tensors.
    """

    scores: Callable[..., dict[str, Any]]  # (**inputs, **options), inputs by the names of the features

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, Any] | None:
        """Computes the module. Without inputs, of what was added before; `None` on all processes but the first."""
        given = {"predictions": predictions, "references": references, **options}
        inputs = {name: given.get(name) for name in self._feature_names()}
        if self.num_process > 1 or self.writer is not None or any(value is None for value in inputs.values()):
            return super().compute(**given)
        return self._compute(**inputs, **{name: value for name, value in options.items() if name not in inputs})

    def add_batch(self, *, predictions: Any = None, references: Any = None, **others: Any) -> None:
        """Adds rows: arrays, tensors or lists."""
        super().add_batch(**self._for_arrow({"predictions": predictions, "references": references, **others}))

    def add(self, *, prediction: Any = None, reference: Any = None, **others: Any) -> None:
        """Adds one row."""
        row = self._for_arrow({"predictions": prediction, "references": reference, **others})
        super().add(prediction=row.pop("predictions", None), reference=row.pop("references"), **row)

    def _for_arrow(self, given: dict[str, Any]) -> dict[str, Any]:
        """Exact arrays that evaluate can store: float64 holds the values of every narrower dtype."""
        names = self._feature_names()  # of which predictions need not be one
        tensors = _tensors({name: value for name, value in given.items() if name in names or value is not None})
        # [()] makes a number of an array without dimensions
        return {
            name: (tensor.long() if name == "references" else tensor.double()).cpu().numpy()[()]
            for name, tensor in tensors.items()
        }

    def _compute(self, **given: Any) -> dict[str, Any]:
        inputs = {name: given.pop(name) for name in self._feature_names()}
        read = _of_arrow if isinstance(inputs["references"], pa.ChunkedArray) else _tensors
        return type(self).scores(**read(inputs), **given)


def row_features(*predictions: str) -> list[Features]:
    """Features of a module for every shape of row; those of class probabilities, which the widget shows, first."""

    def nested(dtype: str, levels: int) -> Any:
        return List(nested(dtype, levels - 1)) if levels else Value(dtype)

    return [
        Features(
            {name: nested("float64", levels) for name in predictions} | {"references": nested("int64", label_levels)}
        )
        for levels, label_levels in SHAPES
    ]


def _tensors(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Floating predictions and integer references of whatever holds them, one shape for all."""
    tensors = {name: _tensor(name, value) for name, value in inputs.items()}
    labels = tensors["references"]
    # a column of numbers that somebody typed into a table comes as floats
    if labels.is_floating_point() and bool((labels == labels.round()).all()):
        labels = labels.long()
    for name, probs in tensors.items():
        if name == "references":
            continue
        if not probs.is_floating_point():
            raise ValueError(f"{name}: got {probs.dtype} values; allowed are floating probabilities, not labels")
        if labels.is_floating_point() or labels.shape != probs.shape[: labels.dim()]:
            raise ValueError(
                f"references: got {labels.dtype} of shape {tuple(labels.shape)} for {name} of shape "
                f"{tuple(probs.shape)}; allowed are integers, one per row"
            )
    return tensors | {"references": labels.to(tensors[next(iter(tensors))].device)}


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, list | tuple) and value and all(isinstance(row, torch.Tensor) for row in value):
        value = torch.stack(tuple(value))
    if isinstance(value, torch.Tensor):
        return value.detach()
    if not isinstance(value, np.ndarray) and hasattr(value, "tolist"):  # a pandas.Series, whose rows may be lists
        value = value.tolist()
    try:
        array = np.asarray(value, order="C")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor do we write to it
            return torch.from_numpy(array)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: got {type(value).__name__} that is no array of numbers; allowed are arrays, tensors and lists "
            "with rows of one length (pad, and give the padding the label -100)"
        ) from None


def _of_arrow(inputs: dict[str, pa.ChunkedArray]) -> dict[str, torch.Tensor]:
    """What was stored, flat: sequences need not be of one length."""
    levels = {name: _levels(column.type) for name, column in inputs.items()}
    labels = levels.pop("references")
    multilabel = labels > 0 and labels == max(levels.values())
    tensors = {name: _narrow(_flatten(name, inputs[name], keep_last=levels[name] > 0)) for name in levels}
    return tensors | {"references": _flatten("references", inputs["references"], keep_last=multilabel)}


def _levels(kind: pa.DataType) -> int:
    return 1 + _levels(kind.value_type) if pa.types.is_list(kind) else 0


def _flatten(name: str, column: pa.ChunkedArray, *, keep_last: bool) -> torch.Tensor:
    """The numbers of a column: `(M, size)` if the last lists are to be kept, which then have one size, else `(M,)`."""
    values, size = column.combine_chunks(), None
    while pa.types.is_list(values.type):
        size = pc.min_max(values.value_lengths())
        values = values.flatten()
    numbers = torch.tensor(values.to_numpy())
    if not keep_last:
        return numbers
    if size["min"] != size["max"]:
        raise ValueError(f"{name}: got rows of {size['min']} to {size['max']} numbers; allowed is one length")
    return numbers.view(-1, size["max"].as_py())


def _narrow(probs: torch.Tensor) -> torch.Tensor:
    """Stored float64 in the dtype that it came in, which says how far rows may miss 1 and where edges of bins lie.

    It is the narrowest in which all values survive. Round ones such as 0.25 survive in narrower ones too, where only a
    bin's edge that is rounded onto such a value could tell.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal((narrowed := probs.to(dtype)).double(), probs):
            return narrowed
    return probs
