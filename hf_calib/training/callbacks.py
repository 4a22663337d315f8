"""Calibration for people who train with another `Trainer`: the same scores, and a calibrator when training ends."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..calibrators import Calibrator
from .arguments import check_best_metric
from .diagrams import log_diagram
from .evaluating import EvaluationSums, prefix_of
from .fitting import check_calibrator, check_fit, fit_and_attach, row_batches
from .targets import check_model, has_several_labels


class CalibrationCallback(TrainerCallback):
    """Adds the scores of `CalibrationTrainer` to every evaluation, and fits a calibrator when training ends.

    The scores cost a second pass over the evaluation rows, since a `Trainer` keeps what it has computed to itself.
    They are in the metrics before the best model is chosen: `metric_for_best_model="refinement"` works, with
    `greater_is_better=False`. A callback that reads them, such as `EarlyStoppingCallback`, is added after this one.
    While it trains, the scores are of raw logits; outside of training, of what an attached calibrator makes of them.

    When to use: with a `Trainer` that cannot be a `CalibrationTrainer`, such as TRL's `SFTTrainer`:
    `trainer.add_callback(CalibrationCallback(trainer, dataset))`.

    Args:
        trainer ([`~transformers.Trainer`]): the one that it is added to.
        dataset (*optional*): labelled rows that training has not seen, prepared as `trainer.train_dataset` is; the
            calibrator is fitted on them and attached, so that what is saved from then on carries it.
        calibrator (`str`): a key of `CALIBRATORS`, or `"auto"`.
    Raises:
        ValueError: the calibrator is unknown, the model is none that `CalibrationTrainer` takes, or the best model is
            to be the one of the highest NLL, refinement, ECE or Brier score. When training begins: as
            `CalibrationTrainer.calibrate`.
    """

    def __init__(self, trainer: Trainer, dataset: Any = None, *, calibrator: str = "temperature"):
        check_model(trainer.model)
        check_calibrator(trainer.model, calibrator)
        check_best_metric(trainer.args)
        self.trainer, self.dataset, self.calibrator = trainer, dataset, calibrator
        self.fitted: Calibrator | None = None
        self._batches: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses what could not be fitted in the end."""
        if self.dataset is not None:
            check_fit(self.trainer, self.dataset, self.calibrator)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remembers what is evaluated."""
        self._batches = kwargs["eval_dataloader"]

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Forgets it: a prediction is no evaluation."""
        self._batches = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Adds the scores of the rows that these metrics are of, and logs them and the reliability diagram."""
        batches, self._batches = self._batches, None
        prefix = prefix_of(metrics)
        # no rows, no evaluation of Trainer's, or a CalibrationTrainer has done it
        if batches is None or prefix is None or f"{prefix}_refinement" in metrics:
            return
        sums = EvaluationSums(of_events=has_several_labels(self.trainer.model))
        for rows in row_batches(self.trainer, batches, "Scoring", raw=self.trainer.is_in_train):
            sums.add(rows)
        found = {f"{prefix}_{name}": value for name, value in (sums.compute() or {}).items()}
        new = {key: value for key, value in found.items() if key not in metrics}
        metrics.update(new)
        self.trainer.log(new)
        log_diagram(self.trainer, prefix, sums.confidences)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fits the calibrator and attaches it."""
        if self.dataset is not None:
            self.fitted = fit_and_attach(self.trainer, self.dataset, self.calibrator)
