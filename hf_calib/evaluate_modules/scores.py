"""What evaluate's modules compute."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..calibrators import AutoCalibrator, Calibrator
from ..calibrators.selection import SCORES
from ..functional.checks import check_choice
from ..functional.scoring import logits_of
from ..metrics import METRICS, Metric, Rows, bootstrap, compare, score_decomposition
from ..metrics.collection import named_numbers
from ..report import CalibrationReport, default_metrics


DECOMPOSITION = "score_decomposition"
DECOMPOSITION_OPTIONS = ("score", "calibrator", "num_folds", "seed")

MetricOptions = Mapping[str, Mapping[str, Any]]


def calibration_scores(
    predictions: torch.Tensor,
    references: torch.Tensor,
    *,
    metrics: str | Sequence[str] | MetricOptions | None = None,
    task: str | None = None,
    ignore_index: int = -100,
    calibrator: Calibrator | str | Path | None = None,
    intervals: bool = False,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What the `calibration` module computes.

    Args:
        predictions, references, task, ignore_index: `probs` and `labels` as in `expected_calibration_error`.
        metrics (name, names, or `dict` of name to options): names in `METRICS`, and `"score_decomposition"`, the split
            of NLL and Brier into what a calibrator can remove and what none can. By default accuracy (of class
            probabilities), NLL, Brier, ECE and smooth ECE.
        calibrator ([`Calibrator`], folder or Hub repo id, *optional*): is applied to the predictions; every key then
            comes twice, after and, as `before_...`, before.
        intervals (`bool`): adds 95 % bootstrap intervals as `..._low` and `..._high`; the decomposition has none.
        num_resamples (`int`), seed (`int`): of the bootstrap; the seed is also that of the decomposition's folds.
    Returns:
        `dict` of `str` to `float` or, for curves, `list[float]`; `num_rows` is an `int`.
    Raises:
        ValueError: as `expected_calibration_error`; an unknown metric or option; `calibrator` with `task`.
    """
    rows = Rows(predictions, references, task=task, ignore_index=ignore_index, name="predictions")
    chosen = _chosen(metrics, rows)
    objects = _metrics(chosen, rows)

    def scores(probs: torch.Tensor) -> dict[str, Any]:
        # the functions, not what streams: of all rows at once they are exact
        found = named_numbers(
            {
                name: metric.function(probs, rows.labels, **_arguments(rows, chosen[name]))
                for name, metric in objects.items()
            }
        )
        if DECOMPOSITION in chosen:
            found |= _decomposed(probs, rows, {"seed": seed, **chosen[DECOMPOSITION]})
        if intervals:
            resampling = {"num_resamples": num_resamples, "seed": seed, "task": task}
            for name, estimate in bootstrap(objects, probs, rows.labels, **resampling).items():
                found |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return found

    if calibrator is None:
        return {**scores(rows.probs), "num_rows": len(rows)}
    after = scores(_calibrated(calibrator, rows))
    before = {f"before_{key}": value for key, value in scores(rows.probs).items()}
    return {**after, **before, "num_rows": len(rows)}


def comparison_scores(
    predictions1: torch.Tensor,
    predictions2: torch.Tensor,
    references: torch.Tensor,
    *,
    metrics: str | Sequence[str] | MetricOptions | None = None,
    task: str | None = None,
    ignore_index: int = -100,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What the `calibration_comparison` module computes: a paired bootstrap of `predictions2` against `predictions1`.

    Args:
        predictions1, predictions2, references, task, ignore_index: as in `calibration_scores`.
        metrics: names in `METRICS` that are single numbers, or a `dict` of name to options; `"nll"`, which the verdict
            is about, always comes too.
        num_resamples (`int`), seed (`int`): of the bootstrap.
    Returns:
        `dict`: for each metric `..._value1`, `..._value2`, `..._change` (2 minus 1) and the 95 % interval of the
        change, `..._low` and `..._high`; `better` is 1 where NLL falls for real and 0 otherwise, which `verdict` says
        in a sentence; `num_rows`.
    Raises:
        ValueError: as `calibration_scores`; the two have different shapes.
    """
    first, second = (
        Rows(probs, references, task=task, ignore_index=ignore_index, name=name)
        for name, probs in (("predictions1", predictions1), ("predictions2", predictions2))
    )
    if first.probs.shape != second.probs.shape:
        raise ValueError(
            f"predictions2: got shape {tuple(predictions2.shape)}; allowed is that of predictions1, "
            f"{tuple(predictions1.shape)}"
        )
    chosen = _chosen(metrics, first)
    if DECOMPOSITION in chosen:
        raise ValueError(f"metrics: got {DECOMPOSITION!r}, which has no interval; allowed are {', '.join(METRICS)}")
    resampling = {"num_resamples": num_resamples, "seed": seed, "task": task}
    objects = _metrics({"nll": {}, **chosen}, first)
    found = compare(objects, second.probs, first.labels, before=first.probs, **resampling)
    scores: dict[str, Any] = {}
    for name, (before, after, change) in found.items():
        scores |= {f"{name}_value1": before.value, f"{name}_value2": after.value, f"{name}_change": change.value}
        scores |= {f"{name}_low": change.low, f"{name}_high": change.high}
    sides = ({name: getattr(item, side) for name, item in found.items()} for side in ("after", "before", "change"))
    report = CalibrationReport(len(first), num_resamples, *sides)
    return {**scores, "better": int(report.gain_is_real()), "verdict": report.verdict(), "num_rows": len(first)}


def as_calibrator(calibrator: Calibrator | str | Path) -> Calibrator:
    """The calibrator, loaded if it is a folder or a Hub repo id."""
    if isinstance(calibrator, str | Path):
        return AutoCalibrator.from_pretrained(calibrator)
    if not isinstance(calibrator, Calibrator):
        raise ValueError(
            f"calibrator: got {type(calibrator).__name__}; allowed are a Calibrator, a folder or a repo id"
        )
    return calibrator


def _chosen(metrics: str | Sequence[str] | MetricOptions | None, rows: Rows) -> dict[str, dict[str, Any]]:
    """Metric name -> its options."""
    classes = rows.probs.dim() == 2 and rows.task is None
    if metrics is None:
        metrics = default_metrics(classes=classes)
    metrics = [metrics] if isinstance(metrics, str) else metrics
    chosen = {name: dict(metrics[name]) if isinstance(metrics, Mapping) else {} for name in metrics}
    for name in chosen:
        check_choice("metrics", name, (*METRICS, DECOMPOSITION))
    if "accuracy" in chosen and not classes:
        raise ValueError("metrics: got 'accuracy', which needs (..., C) class probabilities")
    return chosen


def _metrics(chosen: dict[str, dict[str, Any]], rows: Rows) -> dict[str, Metric]:
    """The chosen metrics as objects, which know their options; the decomposition is none."""
    found = {}
    for name, options in chosen.items():
        if name == DECOMPOSITION:
            continue
        try:
            found[name] = METRICS[name](**_arguments(rows, options))
        except TypeError as error:
            raise ValueError(f"metrics: got {options} for {name!r}: {error}") from None
    return found


def _arguments(rows: Rows, options: Mapping[str, Any]) -> dict[str, Any]:
    return dict(options) if rows.task is None else {"task": rows.task, **options}


def _decomposed(probs: torch.Tensor, rows: Rows, options: dict[str, Any]) -> dict[str, float]:
    for option in options:
        check_choice(f"metrics, options of {DECOMPOSITION}", option, DECOMPOSITION_OPTIONS)
    found = {}
    for score in [options.pop("score")] if "score" in options else SCORES:
        parts = score_decomposition(probs, rows.labels, score=score, **_arguments(rows, options))
        found |= {f"{score}_calibration": float(parts.calibration), f"{score}_refinement": float(parts.refinement)}
    return found


def _calibrated(calibrator: Calibrator | str | Path, rows: Rows) -> torch.Tensor:
    """Calibrated probabilities; those of events pass as two classes."""
    if rows.task is not None:
        raise ValueError(f"calibrator: got one with task={rows.task!r}; allowed are class probabilities and events")
    calibrator = copy.deepcopy(as_calibrator(calibrator)).to(rows.probs.device)
    probs = calibrator.log_probs(logits_of(rows.probs)).exp()
    return probs if rows.probs.dim() == 2 else probs[:, 1]
