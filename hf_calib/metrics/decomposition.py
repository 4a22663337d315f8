"""A proper score, split into what a calibrator can remove and what none can."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..calibrators import Calibrator, make_calibrator
from ..calibrators.folds import held_out_log_probs
from ..calibrators.rows import FitRows, check_rows
from ..calibrators.selection import SCORES, select_for_rows
from ..functional.checks import check_choice, check_probs
from ..functional.scoring import logits_of
from .registry import METRICS


class ScoreDecomposition(NamedTuple):
    """`total = calibration + refinement`, `()` float64 each, in the score's unit."""

    total: torch.Tensor
    calibration: torch.Tensor
    refinement: torch.Tensor


def score_decomposition(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    score: str = "nll",
    calibrator: str | None = None,
    num_folds: int = 5,
    seed: int = 0,
    task: str | None = None,
    ignore_index: int = -100,
) -> ScoreDecomposition:
    r"""Splits NLL or Brier into calibration, which a calibrator removes, and refinement, which none can.

    $$\mathrm{score}(p) = \underbrace{\mathrm{score}(p) - \mathrm{score}(\mathrm{cal}(p))}_{\mathrm{calibration}}
    + \underbrace{\mathrm{score}(\mathrm{cal}(p))}_{\mathrm{refinement}}$$

    Every row is calibrated by a calibrator that was fitted on the other folds, so that nothing is promised that a fit
    on these rows would not keep. It needs all rows at once.

    Args:
        probs, labels, task, ignore_index: as in `brier_score`. With `task="multilabel"` labels are split one by one,
            and the parts are averaged.
        score (`"nll"` or `"brier"`): the proper score.
        calibrator (`str`, *optional*): a name in `CALIBRATORS`; by default each fold chooses by its own
            cross-validation.
        num_folds (`int`), seed (`int`): of the folds.
    Returns:
        [`ScoreDecomposition`]: `total`, `calibration`, `refinement`. `calibration` below 0 says that the calibrator
        loses more to the noise of its fit than it gains.
    Raises:
        ValueError: as `expected_calibration_error`; an unknown score or calibrator; fewer rows than folds.
    Source:
        Bröcker 2009, "Reliability, sufficiency, and the decomposition of proper scores"; estimated by a fitted
        calibrator as in Berta et al. 2025 (arXiv 2501.19195), here cross-fitted.
    """
    check_choice("score", score, SCORES)
    probs, labels = check_probs(probs, labels, task=task, ignore_index=ignore_index)
    if task == "multilabel":
        options = {"score": score, "calibrator": calibrator, "num_folds": num_folds, "seed": seed}
        parts = [score_decomposition(*column, **options) for column in zip(probs.T, labels.T, strict=True)]
        return ScoreDecomposition(*(torch.stack(values).mean() for values in zip(*parts, strict=True)))

    def fit(rows: FitRows) -> Calibrator:
        if calibrator is None:
            return select_for_rows(rows, score=score, num_folds=num_folds, seed=seed)
        return make_calibrator(calibrator).fit_rows(rows)

    rows = check_rows(logits_of(probs), labels)
    held_out = held_out_log_probs(fit, rows, num_folds=num_folds, seed=seed).exp()
    calibrated = held_out if probs.dim() == 2 else held_out[:, 1].clamp_max(1)
    function = METRICS[score].function
    total, refinement = function(probs, labels), function(calibrated, labels)
    return ScoreDecomposition(total, total - refinement, refinement)
