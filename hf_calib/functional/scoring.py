"""Proper scores are lowest, on average, for the true probabilities. Choose by these; calibration errors illustrate."""

from __future__ import annotations

import math

import torch

from .checks import PROBABILITY_FLOOR, check_choice, check_log_probs, check_probs


REDUCTIONS = ("mean", "none")
FEW_CLASSES = 20  # torch's max over a row is slow for fewer


def negative_log_likelihood(
    probs: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    *,
    log_probs: torch.Tensor | None = None,
    task: str | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Mean surprise at what happened, in nats.

    $$\mathrm{NLL} = -\frac{1}{n} \sum_i \log p_{i, y_i}$$

    Args:
        probs (`torch.Tensor` of shape `(..., C)`, `(N,)`, or `(..., L)` with `task="multilabel"`): probabilities.
            Logits are refused. A probability of 0 counts as `PROBABILITY_FLOOR`, 87.3 nats.
        labels (`torch.Tensor`, integer): what happened; shapes as in `expected_calibration_error`.
        log_probs (`torch.Tensor` of shape `(..., C)`): in place of `probs`, normalised log-probabilities, which keep
            the precision that very small probabilities lose. `-inf` counts as the same floor. Not with `task`.
        task (`None` or `"multilabel"`): with `"multilabel"`, the mean over labels of each label's own NLL.
        ignore_index (`int`): rows with this label are left out.
        reduction (`"mean"` or `"none"`): the mean, or one value per row that is not ignored.
    Returns:
        `torch.Tensor` of shape `()` or `(N,)`, float64, in nats, at least 0; lower is better.
    Raises:
        ValueError: as `expected_calibration_error`; or both or neither of `probs` and `log_probs` are given.
    Source:
        Good 1952, "Rational decisions". The floor is ours.
    Example:
        >>> import torch
        >>> negative_log_likelihood(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([0, 1]))
        tensor(0.6931, dtype=torch.float64)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if (probs is None) == (log_probs is None):
        raise ValueError("probs: give either probs or log_probs=, not both and not neither")
    if log_probs is not None:
        check_choice("task", task, (None,))
        rows, labels = check_log_probs(log_probs, labels, ignore_index=ignore_index)
        log_likelihood = rows.gather(-1, labels[:, None])[:, 0].double()
        surprise = 0 - log_likelihood.clamp(math.log(PROBABILITY_FLOOR), 0)
    else:
        surprise = row_surprise(*check_probs(probs, labels, task=task, ignore_index=ignore_index), task)
    return surprise.mean() if reduction == "mean" else surprise


def brier_score(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    task: str | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Mean squared distance between the probabilities and what happened.

    $$\mathrm{Brier} = \frac{1}{n} \sum_i \sum_k (p_{ik} - [y_i = k])^2$$

    Args:
        probs (`torch.Tensor` of shape `(..., C)`, `(N,)`, or `(..., L)` with `task="multilabel"`): probabilities.
        labels (`torch.Tensor`, integer): what happened; shapes as in `expected_calibration_error`.
        task (`None` or `"multilabel"`): with `"multilabel"`, the mean over labels of each label's own score.
        ignore_index (`int`): rows with this label are left out.
        reduction (`"mean"` or `"none"`): the mean, or one value per row that is not ignored.
    Returns:
        `torch.Tensor` of shape `()` or `(N,)`, float64; lower is better. In `[0, 2]` for class probabilities (the sum
        over classes, as Brier wrote it) and in `[0, 1]` for events and multi-label.
    Raises:
        ValueError: as `expected_calibration_error`.
    Source:
        Brier 1950, "Verification of forecasts expressed in terms of probability".
    Example:
        >>> import torch
        >>> brier_score(torch.tensor([[0.8, 0.2]]), torch.tensor([0]))
        tensor(0.0800, dtype=torch.float64)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    probs, labels = check_probs(probs, labels, task=task, ignore_index=ignore_index)
    scores = row_brier(probs, labels, task)
    return scores.mean() if reduction == "mean" else scores


def accuracy(
    probs: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    """Share of rows whose most probable class is the label (the first of equals).

    Args:
        probs (`torch.Tensor` of shape `(..., C)`): class probabilities.
        labels (`torch.Tensor` of shape `(...)`, integer in `[0, C)`).
        ignore_index (`int`): rows with this label are left out.
        reduction (`"mean"` or `"none"`): the mean, or one value per row that is not ignored.
    Returns:
        `torch.Tensor` of shape `()` or `(N,)`, float64, a fraction in `[0, 1]`; higher is better.
    Raises:
        ValueError: as `expected_calibration_error`; or `probs` are not rows of class probabilities.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    probs, labels = check_probs(probs, labels, ignore_index=ignore_index)
    correct = row_correct(probs, labels)
    return correct.mean() if reduction == "mean" else correct


def row_surprise(probs: torch.Tensor, labels: torch.Tensor, task: str | None = None) -> torch.Tensor:
    """Surprise of each row that `check_probs` has returned, in nats: `(N,)` float64."""
    if probs.dim() == 2 and task is None:
        happened = probs.gather(-1, labels[:, None])[:, 0].double()
    else:
        happened = torch.where(labels == 1, probs.double(), 1 - probs.double())
    surprise = 0 - happened.clamp_min(PROBABILITY_FLOOR).log()  # and not -log: certainty has surprise 0, not -0
    return surprise if surprise.dim() == 1 else surprise.mean(-1)


def row_brier(probs: torch.Tensor, labels: torch.Tensor, task: str | None = None) -> torch.Tensor:
    """Brier score of each row that `check_probs` has returned: `(N,)` float64."""
    if probs.dim() == 2 and task is None:
        # sum_k (p_k - [y = k])^2 = sum_k p_k^2 - 2 p_y + 1, which needs no one-hot copy of the rows
        happened = probs.gather(-1, labels[:, None])[:, 0].double()
        return torch.linalg.vector_norm(probs, dim=-1, dtype=torch.float64).square() - 2 * happened + 1
    scores = (probs.double() - labels).square()
    return scores if scores.dim() == 1 else scores.mean(-1)


def row_top(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest probability of each row that `check_probs` has returned and its class, the first of equals.

    `(N, 1)` each, as `probs.max(-1, keepdim=True)` gives them.
    """
    num_classes = probs.shape[1]
    if num_classes > FEW_CLASSES:
        return probs.max(-1, keepdim=True)
    # class by class these are a few vectorised passes: mark every highest one, and the first mark weighs the most
    by_class = torch.stack(probs.unbind(-1))
    confidence = by_class.amax(0)
    weights = torch.arange(num_classes, 0, -1, dtype=probs.dtype, device=probs.device)
    first = by_class.eq_(confidence).mul_(weights[:, None]).amax(0)
    return confidence[:, None], num_classes - first.long()[:, None]


def row_correct(probs: torch.Tensor, labels: torch.Tensor, task: str | None = None) -> torch.Tensor:
    """Whether the most probable class of each row that `check_probs` has returned is its label: `(N,)` float64."""
    check_has_accuracy(probs, task)
    return (row_top(probs)[1][:, 0] == labels).double()


def check_has_accuracy(probs: torch.Tensor, task: str | None) -> None:
    """Raises a ValueError unless these are rows of class probabilities."""
    if probs.dim() != 2 or task is not None:
        raise ValueError(f"probs: got shape {tuple(probs.shape)}; accuracy needs (..., C) class probabilities")


def logits_of(probs: torch.Tensor) -> torch.Tensor:
    """Logits whose softmax is `probs`, as calibrators take them: `(..., C)`, or `(...)` events as two classes.

    Returns:
        `torch.Tensor` of shape `(..., C)` or `(..., 2)`, float64: logarithms; of 0 that of `PROBABILITY_FLOOR`.
    """
    probs = probs.double()
    rows = probs if probs.dim() > 1 else torch.stack([1 - probs, probs], dim=-1)
    return rows.clamp_min(PROBABILITY_FLOOR).log()
