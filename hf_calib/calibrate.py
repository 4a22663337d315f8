"""The whole job on collected predictions: choose a calibrator, fit it, and say honestly what it changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

from .calibrators import CALIBRATORS, Calibrator, make_calibrator
from .calibrators.folds import held_out_log_probs
from .calibrators.rows import FitRows, check_rows
from .calibrators.selection import PREFER_SINGLE, select_for_rows
from .predictions import Predictions
from .report import CalibrationReport, evaluate_calibration


METHODS = ("auto", *CALIBRATORS)
FEWEST_ROWS = 10  # so that every fold of a fold has some


class Calibration(NamedTuple):
    """A fitted calibrator and what it does to rows that it was not fitted on."""

    calibrator: Calibrator
    report: CalibrationReport


def calibrate_predictions(
    predictions: Predictions, *, method: str = "auto", test: Predictions | None = None, seed: int = 0
) -> Calibration:
    """Fits a calibrator on predictions and reports on rows that the fit has not seen.

    Args:
        predictions ([`Predictions`]): raw logits and labels of rows that the model was not trained on.
        method (`str`): a name in `CALIBRATORS`, or `"auto"` to choose among them by cross-validated NLL.
        test ([`Predictions`], *optional*): other rows for the report. Without them the report is cross-fitted: each
            fold is calibrated by a calibrator that was chosen and fitted on the other folds.
        seed (`int`): of the folds and of the bootstrap.
    Returns:
        [`Calibration`]: the calibrator fitted on all of `predictions`, and the report.
    Raises:
        ValueError: an unknown method, fewer than 10 rows, labels of one class only, `test` has the rows of the fit, or
            as `Calibrator.fit`.
    Warns:
        UserWarning: a class is missing: nothing can be learnt of it.
    """
    check_method(method)
    _check_rows(predictions, test)

    def fit(rows: FitRows) -> Calibrator:
        return (
            select_for_rows(rows, seed=seed, tolerance=PREFER_SINGLE)
            if method == "auto"
            else make_calibrator(method).fit_rows(rows)
        )

    return calibrate_with(fit, predictions, test, seed=seed)


def calibrate_with(
    fit: Callable[[FitRows], Calibrator],
    predictions: Predictions,
    test: Predictions | None,
    *,
    before: float = 1.0,
    seed: int,
) -> Calibration:
    """As `calibrate_predictions`, by a function that fits a calibrator, and without its checks of the labels.

    The report starts from the logits divided by the temperature `before`.
    """
    if test is not None and test.fingerprint() == predictions.fingerprint():
        raise ValueError("test: got the rows of predictions; allowed are other ones, or None for cross-fitting")
    fitting_rows = check_rows(predictions.logits, predictions.labels)
    calibrator = fit(fitting_rows)
    calibrator.label_names = predictions.label_names
    calibrator.provenance["fingerprint"] = predictions.fingerprint()
    if test is None:
        log_probs = held_out_log_probs(fit, fitting_rows, seed=seed)
        rows, how = predictions, "those of the fit, each calibrated by a fit on the others (cross-fitting)"
    else:
        log_probs = calibrator.log_probs(test.logits)
        rows, how = test, "other rows than those of the fit"
    report = evaluate_calibration(log_probs.exp(), rows.labels, before=(rows.logits / before).softmax(-1), seed=seed)
    calibrator.provenance["report_rows"] = how
    calibrator.provenance["scores"] = report.to_dict()
    return Calibration(calibrator, report)


def _check_rows(predictions: Predictions, test: Predictions | None) -> None:
    names = predictions.label_names
    if test is not None and test.label_names != names:
        raise ValueError(f"test: got labels {test.label_names}; allowed are {names}, as in predictions")
    if len(predictions) < FEWEST_ROWS:
        raise ValueError(f"predictions: got {len(predictions)} rows; allowed are {FEWEST_ROWS} and more")
    missing = [name for index, name in enumerate(names) if not (predictions.labels == index).any()]
    if len(missing) >= len(names) - 1:
        raise ValueError(f"predictions: no label is {' or '.join(missing)}; allowed are rows of two classes or more")
    if missing:
        warnings.warn(f"no label is {' or '.join(missing)}: nothing can be learnt of what is missing", stacklevel=3)


def check_method(method: str) -> None:
    """Raises a ValueError that lists the methods unless this is one of them."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; allowed are {', '.join(METHODS)}")
