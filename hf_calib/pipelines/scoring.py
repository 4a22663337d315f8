"""What the pipelines share: a score is one probability, which a calibrator of whole scores may map."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Pipeline

from ..attaching import in_eval_mode
from ..calibrators import Calibrator
from ..evaluate_modules.scores import as_calibrator


LOG_PROBS = (math.log(torch.finfo(torch.float64).tiny), -(2.0**-53))  # of scores that float64 knows from 0 and 1


def log_odds(scores: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """What a calibrator of answers is fitted on: `log p - log(1 - p)` of the scores that a pipeline gives.

    Args:
        scores (`torch.Tensor` of any shape, or floats, in `[0, 1]`): of a pipeline without `calibrator`.
    Returns:
        `torch.Tensor` of that shape, float64: finite, also of scores that are rounded to 0 or 1.
    Raises:
        ValueError: a score is not within `[0, 1]`.
    Example:
        >>> log_odds([0.5, 0.9, 1.0])
        tensor([ 0.0000,  2.1972, 36.7368], dtype=torch.float64)
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    wrong = scores[((scores >= 0) & (scores <= 1)).logical_not()]
    if len(wrong):
        raise ValueError(f"scores: got {float(wrong[0])}; allowed are probabilities from 0 to 1")
    return _log_odds(scores.log())


def _log_odds(log_probs: torch.Tensor) -> torch.Tensor:
    log_probs = log_probs.clamp(*LOG_PROBS)
    return log_probs - torch.log(-torch.expm1(log_probs))


class ScoredPipeline(Pipeline):
    """What both pipelines share: the model in evaluation mode, and the calibrator of whole scores."""

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        calibrator: Calibrator | str | Path | None = None,
        **options: Any,
    ):
        self._check_parts(model, tokenizer)
        self.calibrator = None if calibrator is None else _score_calibrator(calibrator)
        super().__init__(model, tokenizer, **options)

    def forward(self, model_inputs: dict[str, Any], **forward_params: Any) -> dict[str, Any]:
        """The same model gives the same scores, whoever trained it a moment ago."""
        with in_eval_mode(self.model):
            return super().forward(model_inputs, **forward_params)

    def _run(self, inputs: Any, options: dict[str, Any]) -> Any:
        """`Pipeline.__call__`, which takes a tuple for one input and fails on an empty list."""
        inputs = list(inputs) if isinstance(inputs, tuple) else inputs
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **options)

    def _scores(self, log_probs: torch.Tensor) -> list[float]:
        """Probabilities of `(K,)` float64 log-probabilities, after the calibrator."""
        if self.calibrator is not None:
            log_probs = self.calibrator.log_probs(_log_odds(log_probs))
        return log_probs.exp().tolist()

    def _check_parts(self, model: nn.Module, tokenizer: Any) -> None:
        raise NotImplementedError


def _score_calibrator(calibrator: Calibrator | str | Path) -> Calibrator:
    """A copy on the CPU, where scores are; a ValueError unless it is fitted for the log-odds of one event."""
    calibrator = as_calibrator(calibrator)
    if calibrator.num_labels is None:
        raise ValueError(f"calibrator: got a {type(calibrator).__name__} that is not fitted; call fit first")
    if calibrator.task != "binary":
        raise ValueError(f'calibrator: got task={calibrator.task!r}; allowed is task="binary", of right and wrong')
    if calibrator.needs_groups:
        raise ValueError(f"calibrator: {calibrator.name} needs the groups of rows, which a pipeline is not told of")
    return copy.deepcopy(calibrator).cpu()
