"""Choosing a calibrator by what it does to rows it was not fitted on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..functional.checks import check_choice
from ..functional.scoring import brier_score, negative_log_likelihood
from .base import Calibrator, check_fit
from .registry import CALIBRATORS, make_calibrator


SCORES = ("nll", "brier")


class SelectionRow(NamedTuple):
    """One candidate: its mean score on rows it was not fitted on, how sure that is, and the time of a fit."""

    name: str
    score: float
    standard_error: float
    seconds: float


def select_calibrator(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    candidates: Sequence[str] | None = None,
    score: str = "nll",
    num_folds: int = 5,
    seed: int = 0,
    ignore_index: int = -100,
) -> Calibrator:
    """Fits every candidate on all folds but one, scores it on that one, and fits the best of them on all rows.

    Args:
        logits (`torch.Tensor` of shape `(..., C)`, floating): raw logits of rows that the model was not trained on.
        labels (`torch.Tensor` of shape `(...)`, integer in `[0, C)`).
        candidates (sequence of `str`, *optional*): names in `CALIBRATORS`, all of them by default. Identity always
            takes part: a calibrator that does not beat doing nothing is not chosen.
        score (`"nll"` or `"brier"`): a proper score, lower is better. Calibration errors are no choice: they are
            lowest for a calibrator that says the base rate every time.
        num_folds (`int`): parts that the rows are dealt into, each class evenly.
        seed (`int`): of the dealing.
        ignore_index (`int`): rows with this label are left out.
    Returns:
        the calibrator of the lowest mean score (of equals, the first in `CALIBRATORS`, the simplest), fitted on all
        rows. Its `selection` lists every candidate as a [`SelectionRow`].
    Raises:
        ValueError: as `Calibrator.fit`; an unknown candidate or score; fewer rows than folds.
    """
    check_choice("score", score, SCORES)
    names = _candidate_names(candidates)
    logits, labels, _ = check_fit(logits, labels, None, ignore_index)
    table, fitted = [], {}
    for name in names:
        log_probs = held_out_log_probs(
            lambda z, y, name=name: make_calibrator(name).fit(z, y), logits, labels, num_folds=num_folds, seed=seed
        )
        if score == "nll":
            scores = negative_log_likelihood(log_probs=log_probs, labels=labels, reduction="none")
        else:
            scores = brier_score(log_probs.exp(), labels, reduction="none")
        started = time.perf_counter()
        fitted[name] = make_calibrator(name).fit(logits, labels)
        seconds = time.perf_counter() - started
        table.append(SelectionRow(name, float(scores.mean()), float(scores.std() / math.sqrt(len(scores))), seconds))
    winner = fitted[min(table, key=lambda row: row.score).name]
    winner.selection = table
    winner.provenance["selection"] = [{**row._asdict(), "seconds": round(row.seconds, 4)} for row in table]
    return winner


def held_out_log_probs(
    fit: Callable[[torch.Tensor, torch.Tensor], Calibrator],
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_folds: int = 5,
    seed: int = 0,
) -> torch.Tensor:
    """Calibrated log-probabilities of each row by a calibrator that was fitted on the other folds.

    Args:
        fit (callable): logits and labels -> fitted calibrator.
        logits (`torch.Tensor` of shape `(N, C)`, floating).
        labels (`torch.Tensor` of shape `(N,)`, int64).
    Returns:
        `torch.Tensor` of shape `(N, C)`, float32, or float64 when the logits are.
    """
    folds = _deal(labels, num_folds, seed)
    log_probs = torch.empty(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    for fold in range(num_folds):
        held_out = folds == fold
        log_probs[held_out] = fit(logits[~held_out], labels[~held_out]).log_probs(logits[held_out])
    return log_probs


def _candidate_names(candidates: Sequence[str] | None) -> list[str]:
    chosen = set(CALIBRATORS if candidates is None else candidates) | {"identity"}
    for name in chosen - set(CALIBRATORS):
        raise ValueError(f"candidates: got {name!r}; allowed are {', '.join(CALIBRATORS)}")
    return [name for name in CALIBRATORS if name in chosen]


def _deal(labels: torch.Tensor, num_folds: int, seed: int) -> torch.Tensor:
    """The fold of each row: shuffled, then dealt out class by class, so that each fold gets its share of each."""
    if not 2 <= num_folds <= len(labels):
        raise ValueError(f"num_folds: got {num_folds} for {len(labels)} rows; allowed are 2 to the number of rows")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[by_class] = torch.arange(len(labels), device=labels.device) % num_folds
    return folds
