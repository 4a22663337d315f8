"""What every metric demands of its input, checked once and in one place."""

from __future__ import annotations

import math

import torch


# A probability of zero would make an event that happens infinitely surprising. Logarithms floor it at float32's
# smallest normal number (87.3 nats), whatever the dtype, so that no ordinary float32 or float64 probability is
# touched.
PROBABILITY_FLOOR = 2.0**-126

SHARES_TOLERANCE = 1e-3  # soft labels may have been rounded; in half precision, it is twice the rounding of 1
ROUNDED = 0.05  # a sum that is off 1 by less is that of probabilities which somebody rounded
TASKS = (None, "multilabel")


def check_probs(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    task: str | None = None,
    ignore_index: int = -100,
    name: str = "probs",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Validates probabilities and labels, flattens leading dimensions and leaves out ignored rows.

    Args:
        probs (`torch.Tensor`, floating): `(..., C)` rows that sum to 1; or `(N,)` probabilities of an event; or
            `(..., L)` independent probabilities when `task="multilabel"`.
        labels (`torch.Tensor`, integer): `(...)` in `[0, C)`; or `(N,)` in {0, 1}; or `(..., L)` in {0, 1}.
        task (`None` or `"multilabel"`): the one switch; everything else is told by the shapes.
        ignore_index (`int`): a row whose label (every label, when multi-label) equals it is left out.
        name (`str`): what errors call the probabilities.
    Returns:
        `(N, C)` and `(N,)`; or `(N,)` and `(N,)`; or `(N, L)` and `(N, L)`. Labels are int64. Probabilities are at
        most 1: what rounding has put above is cut.
    Raises:
        ValueError: shapes disagree, a row does not sum to 1 within the dtype's tolerance, a value is not finite or out
            of range, or no row is left. The message names the argument, the value and what is allowed.
    """
    probs, labels = _kept_rows(name, probs, labels, task, ignore_index)
    if probs.dim() == 1 or task == "multilabel":
        _check_range(name, probs)
        return probs, labels
    return _check_rows(name, probs), labels


def check_log_probs(
    log_probs: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `check_probs`, for `(..., C)` rows of normalised log-probabilities; `-inf` is allowed."""
    rows, labels = _kept_rows("log_probs", log_probs, labels, None, ignore_index)
    if rows.dim() != 2:
        raise ValueError(f"log_probs: got shape {tuple(log_probs.shape)}; allowed are (..., C) rows for (...) labels")
    # float32, since in float16 a sum of more than 65,504 exponentials can be infinite
    excess = rows.to(torch.promote_types(rows.dtype, torch.float32)).logsumexp(-1).abs()
    # log_softmax in half precision rounds each entry, so a row's mass may be off by that rounding times its size
    tolerance = max(1e-3, 16 * torch.finfo(rows.dtype).eps)
    if not bool((excess <= tolerance).all()):
        worst = float(excess.nan_to_num(nan=float("inf")).max())
        raise ValueError(f"log_probs: a row's logsumexp is off 0 by {worst:.3g}; allowed is {tolerance:.2g}. "
                         "Logits become log-probabilities by logits.log_softmax(-1)")  # fmt: skip
    return rows, labels


def check_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Raises a ValueError unless every label lies in `[0, num_labels)`."""
    if not _are_in_range(labels, num_labels):
        low, high = (int(value) for value in torch.aminmax(labels.long()))
        raise ValueError(f"labels: got {low if low < 0 else high}; allowed are 0 to {num_labels - 1}")


def check_shares(labels: torch.Tensor, kept: torch.Tensor | None = None) -> None:
    """Raises a ValueError unless each row of soft labels, `(N, C)`, holds shares from 0 up that sum to 1.

    `kept` says which of the caller's rows these are, for the message.
    """
    tolerance = max(SHARES_TOLERANCE, 2 * torch.finfo(labels.dtype).eps)
    total = labels.sum(-1, dtype=torch.promote_types(labels.dtype, torch.float32))
    right = ((total - 1).abs() <= tolerance) & (labels >= 0).all(-1)  # written so that NaN is wrong
    if not right.all():
        row = int((~right).nonzero()[0])
        number = row if kept is None else int(kept.nonzero()[row])
        values = f"{labels[row].tolist()[:5]}{', ...' if labels.shape[1] > 5 else ''}"
        raise ValueError(
            f"labels: row {number} is {values} with sum {float(total[row]):.4g}; allowed are shares from 0 up that "
            "sum to 1"
        )


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raises a ValueError that lists what is allowed unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(map(repr, allowed))}")


def check_count(name: str, value: int) -> None:
    """Raises a ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}; allowed are integers from 1 up")


def check_number(name: str, value: float, *, below: float = math.inf) -> None:
    """Raises a ValueError unless `value` is a number in `[0, below)`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < below:  # NaN is not in any range
        allowed = "finite numbers from 0 up" if below == math.inf else f"numbers in [0, {below:g})"
        raise ValueError(f"{name}: got {value!r}; allowed are {allowed}")


def _kept_rows(
    name: str, probs: torch.Tensor, labels: torch.Tensor, task: str | None, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat rows and int64 labels without the ignored ones; shapes, dtypes and labels are checked, `probs` are not."""
    _check_shapes(name, probs, labels, task)
    probs = probs.detach()  # a metric is a number: what one trains on is a loss
    if probs.dim() > 1:
        probs = probs.reshape(-1, probs.shape[-1])
    # int64 first: in uint8 the label 156 would equal -100
    labels = labels.long().reshape(probs.shape if task == "multilabel" else (-1,))
    num_labels = 2 if probs.dim() == 1 or task == "multilabel" else probs.shape[-1]
    if 0 <= ignore_index < num_labels or not _are_in_range(labels, num_labels):  # else there is none to leave out
        kept = labels != ignore_index
        if kept.dim() == 2:
            kept = kept.any(-1)
        probs, labels = probs[kept], labels[kept]
        if len(labels) == 0:
            raise ValueError(f"labels: no row is left after leaving out those equal to ignore_index={ignore_index}")
        check_labels(labels, num_labels)
    return probs, labels


def _are_in_range(labels: torch.Tensor, num_labels: int) -> bool:
    """Whether there are labels and all of them lie in `[0, num_labels)`."""
    if labels.numel() == 0:
        return False
    low, high = torch.aminmax(labels.long())
    return int(low) >= 0 and int(high) < num_labels


def _check_shapes(name: str, probs: torch.Tensor, labels: torch.Tensor, task: str | None) -> None:
    check_choice("task", task, TASKS)
    if not isinstance(probs, torch.Tensor) or not probs.is_floating_point():
        raise ValueError(f"{name}: got {describe(probs)}; allowed are floating torch tensors")
    if probs.dim() > 1 and probs.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(probs.shape)}; allowed is at least one class")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels: got {describe(labels)}; allowed are integer torch tensors")
    if task == "multilabel":
        if probs.dim() < 2 or probs.shape != labels.shape:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)} for multi-label {name} of {tuple(probs.shape)}; allowed is "
                "one label per probability, (..., L) each"
            )
        return
    expected = probs.shape if probs.dim() == 1 else probs.shape[:-1]
    if probs.dim() == 0 or labels.shape != expected:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)} for {name} of shape {tuple(probs.shape)}; allowed are (...) "
            "labels for (..., C) rows, (N,) for the (N,) probabilities of an event, or task='multilabel'"
        )


def _check_rows(name: str, probs: torch.Tensor) -> torch.Tensor:
    """Rows sum to 1: half-precision rows honestly miss it by their own rounding, so the tolerance follows."""
    tolerance = max(1e-4, torch.finfo(probs.dtype).eps)
    total = probs.sum(-1, dtype=torch.promote_types(probs.dtype, torch.float32))
    # aminmax passes NaN on, and the comparisons are written so that it is wrong too
    if not all(abs(float(end) - 1) <= tolerance for end in torch.aminmax(total)):
        row = int(((total - 1).abs() <= tolerance).logical_not().nonzero()[0])
        remedy = "Logits become probabilities by logits.softmax(-1)"
        if abs(float(total[row]) - 1) < ROUNDED:
            remedy = "Rounded ones are mended by probs / probs.sum(-1, keepdim=True)"
        raise ValueError(
            f"{name}: row {row} sums to {float(total[row]):.6g}; allowed is 1 within {tolerance:.2g}. {remedy}"
        )
    lowest, highest = (float(value) for value in torch.aminmax(probs))
    if lowest < 0:
        raise ValueError(f"{name}: got {lowest:.6g}; allowed are values in [0, 1]")
    return probs.clamp_max(1) if highest > 1 else probs


def _check_range(name: str, probs: torch.Tensor) -> None:
    low, high = (float(value) for value in torch.aminmax(probs))
    if not (low >= 0 and high <= 1):  # written so that NaN is refused
        raise ValueError(
            f"{name}: got values from {low:.6g} to {high:.6g}; allowed are finite values in [0, 1]. "
            "Logits of single events become probabilities by logits.sigmoid()"
        )


def describe(value: object) -> str:
    """What an error says that it got in place of the right tensor."""
    return f"a {value.dtype} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
