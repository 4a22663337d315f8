"""What every metric demands of its input, checked once and in one place."""

from __future__ import annotations

import torch


# A probability of zero would make an event that happens infinitely surprising. Logarithms floor it at float32's
# smallest normal number (87.3 nats), whatever the dtype, so that no ordinary float32 or float64 probability is
# touched.
PROBABILITY_FLOOR = 2.0**-126

TASKS = (None, "multilabel")


def check_probs(
    probs: torch.Tensor, labels: torch.Tensor, *, task: str | None = None, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Validates probabilities and labels, flattens leading dimensions and leaves out ignored rows.

    Args:
        probs (`torch.Tensor`, floating): `(..., C)` rows that sum to 1; or `(N,)` probabilities of an event; or
            `(..., L)` independent probabilities when `task="multilabel"`.
        labels (`torch.Tensor`, integer): `(...)` in `[0, C)`; or `(N,)` in {0, 1}; or `(..., L)` in {0, 1}.
        task (`None` or `"multilabel"`): the one switch; everything else is told by the shapes.
        ignore_index (`int`): a row whose label (every label, when multi-label) equals it is left out.
    Returns:
        `(N, C)` and `(N,)`; or `(N,)` and `(N,)`; or `(N, L)` and `(N, L)`.
    Raises:
        ValueError: shapes disagree, a row does not sum to 1 within the dtype's tolerance, a value is not finite or out
            of range, or no row is left. The message names the argument, the value and what is allowed.
    """
    _check_shapes(probs, labels, task)
    if probs.dim() > 1:
        probs = probs.reshape(-1, probs.shape[-1])
    labels = labels.reshape(probs.shape if task == "multilabel" else (-1,))
    kept = labels != ignore_index
    if kept.dim() == 2:
        kept = kept.any(-1)
    if not kept.all():
        probs, labels = probs[kept], labels[kept]
    if len(labels) == 0:
        raise ValueError(f"labels: no row is left after leaving out those equal to ignore_index={ignore_index}")
    events = probs.dim() == 1 or task == "multilabel"
    check_labels(labels, 2 if events else probs.shape[-1])
    _check_range(probs) if events else _check_rows(probs)
    return probs, labels


def check_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Raises a ValueError unless every label lies in `[0, num_labels)`."""
    low, high = (int(value) for value in torch.aminmax(labels.long()))
    if low < 0 or high >= num_labels:
        raise ValueError(f"labels: got {low if low < 0 else high}; allowed are 0 to {num_labels - 1}")


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raises a ValueError that lists what is allowed unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(map(repr, allowed))}")


def check_count(name: str, value: int) -> None:
    """Raises a ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}; allowed are integers from 1 up")


def _check_shapes(probs: torch.Tensor, labels: torch.Tensor, task: str | None) -> None:
    check_choice("task", task, TASKS)
    if not isinstance(probs, torch.Tensor) or not probs.is_floating_point():
        raise ValueError(f"probs: got {_describe(probs)}; allowed are floating torch tensors")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels: got {_describe(labels)}; allowed are integer torch tensors")
    if task == "multilabel":
        if probs.dim() < 2 or probs.shape != labels.shape:
            raise ValueError(f"labels: got shape {tuple(labels.shape)} for multi-label probs of {tuple(probs.shape)}; "
                             "allowed is one label per probability, (..., L) each")  # fmt: skip
        return
    expected = probs.shape if probs.dim() == 1 else probs.shape[:-1]
    if probs.dim() == 0 or labels.shape != expected:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)} for probs of shape {tuple(probs.shape)}; allowed are (...) "
            "labels for (..., C) rows, (N,) for the (N,) probabilities of an event, or task='multilabel'"
        )


def _check_rows(probs: torch.Tensor) -> None:
    """Rows sum to 1: half-precision rows honestly miss it by their own rounding, so the tolerance follows."""
    tolerance = max(1e-4, torch.finfo(probs.dtype).eps)
    total = probs.sum(-1, dtype=torch.promote_types(probs.dtype, torch.float32))
    wrong = ((total - 1).abs() <= tolerance).logical_not()  # written so that NaN is wrong too
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"probs: row {row} sums to {float(total[row]):.6g}; allowed is 1 within {tolerance:.2g}. "
            "Logits become probabilities by logits.softmax(-1)"
        )
    lowest = float(probs.min())
    if lowest < 0:
        raise ValueError(f"probs: got {lowest:.6g}; allowed are values in [0, 1]")


def _check_range(probs: torch.Tensor) -> None:
    low, high = (float(value) for value in torch.aminmax(probs))
    if not (low >= 0 and high <= 1):  # written so that NaN is refused
        raise ValueError(
            f"probs: got values from {low:.6g} to {high:.6g}; allowed are finite values in [0, 1]. "
            "Logits of single events become probabilities by logits.sigmoid()"
        )


def _describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
