"""Choosing a calibrator by what it does to rows it was not fitted on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..functional.checks import check_choice
from .base import Calibrator, check_label_shapes
from .compose import PerLabel
from .ensemble import Ensemble, hold_out
from .registry import CALIBRATORS, make_calibrator
from .rows import FitRows, check_rows


SCORES = ("nll", "brier")
# A temperature goes into a model's weights and needs no library to be used: worth a loss that is not significant
PREFER_SINGLE = 2.0  # the tolerance of whoever puts a calibrator on a model
SMALLEST_SHARE = 0.01  # of a member of an ensemble
# Chosen on the sets of `make bench`. Isotonic maps, poor alone, add in a mean what no scaling can say. Of two classes
# few rows may make one look best alone, so there it is the one that gives nothing the probability 0
DEFAULT_CANDIDATES = ("temperature", "structured_vector", "structured_matrix", "isotonic")
DEFAULT_CANDIDATES_OF_TWO = ("temperature", "platt", "quadratic", "structured_vector", "venn_abers")
ROWS_PER_PAIR = 0.25  # of classes, from which a matrix is tried


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
    sample_weight: torch.Tensor | None = None,
    candidates: Sequence[str] | None = None,
    score: str = "nll",
    tolerance: float = 0.0,
    num_folds: int = 5,
    seed: int = 0,
    task: str | None = None,
    ignore_index: int = -100,
) -> Calibrator:
    """The best that the candidates make of these rows: one of them, or a weighted mean of several.

    Every candidate is fitted on all folds but one and scored on that one. A mean of those that may be best is a
    candidate too, and mostly wins: which of two close methods is better can rarely be told from the rows of a fit.

    Args:
        logits, labels, sample_weight, task, ignore_index: as in `Calibrator.fit`; labels may be soft.
        candidates (sequence of `str`, *optional*): names in `CALIBRATORS`; by default those that suit so many rows and
            classes. Identity always takes part: what does not beat doing nothing is not chosen.
        score (`"nll"` or `"brier"`): a proper score, lower is better. Calibration errors are no choice: they are
            lowest for a calibrator that says the base rate every time.
        tolerance (`float`): the first single candidate in the order of `CALIBRATORS`, which is from simple to complex,
            is taken where it is worse than the mean by at most so many standard errors of the difference. With 2 a
            mean must be significantly better; 0 asks for the lowest score.
        num_folds (`int`): parts that the rows are dealt into, each class evenly.
        seed (`int`): of the dealing.
    Returns:
        the chosen [`Calibrator`], fitted on all rows: one of the candidates or an [`Ensemble`] of some. Its
        `selection` lists every candidate, and the ensemble where there is one, as a [`SelectionRow`]. With
        `task="multilabel"` a [`PerLabel`], whose members have been chosen so.
    Raises:
        ValueError: as `Calibrator.fit`; an unknown candidate or score; fewer rows than folds.
    """
    check_choice("score", score, SCORES)
    options = {"candidates": candidates, "score": score, "tolerance": tolerance, "num_folds": num_folds, "seed": seed}
    if task == "multilabel":
        check_label_shapes(logits, labels)
        options |= {"sample_weight": sample_weight, "ignore_index": ignore_index, "task": "binary"}
        columns = zip(logits.unbind(-1), labels.unbind(-1), strict=True)
        return PerLabel([select_calibrator(*column, **options) for column in columns])
    rows = check_rows(logits, labels, sample_weight, ignore_index=ignore_index, task=task)
    with torch.no_grad():
        return select_for_rows(rows, task=task, **options)


def select_for_rows(
    rows: FitRows,
    *,
    candidates: Sequence[str] | None = None,
    score: str = "nll",
    tolerance: float = 0.0,
    num_folds: int = 5,
    seed: int = 0,
    task: str | None = None,
) -> Calibrator:
    """`select_calibrator` on rows that `check_rows` has returned."""
    names = _candidate_names(candidates, rows)
    held_out = hold_out([make_calibrator(name) for name in names], rows, score=score, num_folds=num_folds, seed=seed)
    mixture = held_out.best_mixture(rows.weights)
    mixture = mixture.where(mixture >= SMALLEST_SHARE, 0)
    mixture /= mixture.sum()
    together = held_out.scores(mixture)
    fitted, table, winner = {}, [], None
    for index, name in enumerate(names):
        started = time.perf_counter()
        fitted[name] = make_calibrator(name, task=task).fit_rows(rows)
        alone = held_out.scores(torch.eye(len(names), dtype=torch.float64, device=mixture.device)[index])
        table.append(_row(name, alone, rows.weights, time.perf_counter() - started))
        excess = _row(name, alone - together, rows.weights, 0.0)
        if winner is None and excess.score <= tolerance * excess.standard_error:
            winner = fitted[name]
    if (mixture > 0).sum() > 1:
        table.append(_row(Ensemble.name, together, rows.weights, sum(row.seconds for row in table)))
        winner = winner or _ensemble(fitted, mixture, task, rows)
    winner.selection = table
    winner.provenance["selection"] = [{**row._asdict(), "seconds": round(row.seconds, 4)} for row in table]
    return winner


def _ensemble(fitted: dict[str, Calibrator], mixture: torch.Tensor, task: str | None, rows: FitRows) -> Ensemble:
    """The mean of fitted calibrators whose share is not 0."""
    members = [calibrator for calibrator, share in zip(fitted.values(), mixture, strict=True) if share > 0]
    ensemble = Ensemble([make_calibrator(member.name) for member in members], task=task)
    for member in members:
        member.task, member.num_labels = None, rows.logits.shape[-1]  # a task is the whole's
    num_labels = 1 if task else rows.logits.shape[-1]
    ensemble.set_tensors({"mixture": mixture[mixture > 0]}, num_labels=num_labels, members=members)
    ensemble.provenance = {"rows": rows.num_rows}
    return ensemble


def _row(name: str, scores: torch.Tensor, weights: torch.Tensor, seconds: float) -> SelectionRow:
    mean = float(scores @ weights / len(scores))
    deviation = math.sqrt(float((scores - mean).square() @ weights) / max(1, len(scores) - 1))
    return SelectionRow(name, mean, deviation / math.sqrt(len(scores)), seconds)


def _candidate_names(candidates: Sequence[str] | None, rows: FitRows) -> list[str]:
    num_rows, num_classes = rows.logits.shape
    if candidates is None:
        candidates = DEFAULT_CANDIDATES if num_classes > 2 else DEFAULT_CANDIDATES_OF_TWO
        if num_rows < ROWS_PER_PAIR * num_classes**2:
            candidates = [name for name in candidates if name != "structured_matrix"]
    chosen = {*candidates, "identity"}
    for name in chosen - set(CALIBRATORS):
        raise ValueError(f"candidates: got {name!r}; allowed are {', '.join(CALIBRATORS)}")
    return [name for name in CALIBRATORS if name in chosen]
