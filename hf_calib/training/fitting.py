"""Fitting a calibrator to what a `Trainer`'s model says of held-out rows, and attaching it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..attaching import (
    answers_questions,
    attach_calibrator,
    attached_calibrator,
    check_not_folded,
    detach_calibrator,
    in_eval_mode,
    predicts_tokens,
    uncalibrated,
    without_adapters,
)
from ..calibrators import Calibrator, make_calibrator, select_calibrator
from ..calibrators.selection import PREFER_SINGLE
from .arguments import check_calibrator_name
from .evaluating import kept_rows
from .seen_rows import refuse_seen_rows
from .targets import IGNORED_LABEL, TaskRows, has_several_labels, inputs_of_model, label_columns, rows_of


# What is fitted on logits that are too large to keep, or are of as many classes as a text is long
TEMPERATURE = ("temperature",)
NO_LABELLED_ROW = "dataset: got no labelled row; allowed are rows with a label, as in train_dataset"


def check_calibrator(model: nn.Module, name: str) -> None:
    """Raises a ValueError unless there is such a calibrator, and this model can have it."""
    check_calibrator_name(name)
    base = without_adapters(model)
    streams = predicts_tokens(base)
    if (streams or answers_questions(base)) and name not in TEMPERATURE:
        what = "a language model" if streams else "a model that finds answers"
        raise ValueError(f"calibrator: got {name!r}; allowed for {what} are {', '.join(TEMPERATURE)}")


def check_fit(trainer: Trainer, dataset: Any, name: str) -> None:
    """Raises the ValueErrors of `CalibrationTrainer.calibrate` that can be known before any row is predicted."""
    check_calibrator(trainer.model, name)
    check_not_folded(without_adapters(trainer.model))
    if dataset is None or isinstance(dataset, (dict, str)):
        raise ValueError(f"dataset: got {type(dataset).__name__}; allowed is one data set")
    refuse_seen_rows(trainer.train_dataset, dataset, without_adapters(trainer.model))


def fit_and_attach(trainer: Trainer, dataset: Any, name: str) -> Calibrator:
    """`CalibrationTrainer.calibrate` with any `Trainer`, of what `check_fit` has accepted.

    Args:
        trainer ([`~transformers.Trainer`]): its model is calibrated, its data collator and batch size are used.
        dataset: labelled rows, none of them in `trainer.train_dataset`.
        name (`str`): a key of `CALIBRATORS`, or `"auto"`.
    Returns:
        [`Calibrator`]: as it is attached to the model.
    """
    model = trainer.model
    base = without_adapters(model)
    batches = row_batches(trainer, _every_row(trainer, dataset), "Calibrating")
    if predicts_tokens(base):
        fitted = make_calibrator(name).fit_batches(map(kept_rows, batches))
    else:
        logits, labels = _gather_rows(trainer.accelerator, map(_rows_to_fit(base), batches))
        task = "multilabel" if has_several_labels(base) else None
        if name == "auto":
            fitted = select_calibrator(logits, labels, task=task, tolerance=PREFER_SINGLE)
        else:
            fitted = make_calibrator(name, task=task).fit(logits, labels)
    if attached_calibrator(model) is not None:
        detach_calibrator(model)
    attach_calibrator(model, fitted)
    return attached_calibrator(model)


def _every_row(trainer: Trainer, dataset: Any) -> Iterable[dict]:
    """Batches of a data set, also of the rows that `dataloader_drop_last` would leave out."""
    drop, trainer.args.dataloader_drop_last = trainer.args.dataloader_drop_last, False
    try:
        return trainer.get_test_dataloader(dataset)
    finally:
        trainer.args.dataloader_drop_last = drop


def row_batches(trainer: Trainer, batches: Iterable[dict], doing: str, *, raw: bool = True) -> Iterator[TaskRows]:
    """Logits and labels of this process's rows, a batch at a time; raw ones, or as an attached calibrator has them."""
    quiet = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    model = trainer.model
    with uncalibrated(model) if raw else nullcontext(), in_eval_mode(model):
        for inputs in logging.tqdm(batches, desc=doing, disable=quiet):
            inputs = trainer._prepare_inputs(inputs)
            if any(inputs.get(column) is None for column in label_columns(model)):
                raise ValueError(NO_LABELLED_ROW)
            with torch.no_grad(), trainer.compute_loss_context_manager():
                rows = rows_of(model, inputs, model(**inputs_of_model(model, inputs)))
            yield own_rows(trainer, rows)


def _rows_to_fit(model: nn.Module) -> Callable[[TaskRows], tuple[torch.Tensor, torch.Tensor]]:
    """What makes of a batch the logits and labels that a calibrator takes; of several labels, one logit each."""
    if not has_several_labels(model):
        return kept_rows

    def of_events(rows: TaskRows) -> tuple[torch.Tensor, torch.Tensor]:
        labels = rows.labels[..., 1] if rows.labels.is_floating_point() else rows.labels
        return rows.logits[..., 1] - rows.logits[..., 0], labels

    return of_events


def _gather_rows(
    accelerator: Accelerator, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(N, C)`, float32, and labels of the rows of all processes; missing classes are `-inf`."""
    parts = [(logits.float().cpu(), labels.cpu()) for logits, labels in batches]
    if not parts:
        raise ValueError(NO_LABELLED_ROW)
    width = max(logits.shape[-1] for logits, _ in parts)
    logits = torch.cat([F.pad(each, (0, width - each.shape[-1]), value=-torch.inf) for each, _ in parts])
    labels = torch.cat([each for _, each in parts])
    if accelerator.num_processes > 1:
        counts = accelerator.gather(torch.tensor([len(labels)], device=accelerator.device)).tolist()
        logits = accelerator.pad_across_processes(logits.to(accelerator.device), dim=1, pad_index=-torch.inf)
        padded = [accelerator.pad_across_processes(each.to(accelerator.device)) for each in (logits, labels)]
        gathered = [accelerator.gather(each).split(max(counts)) for each in padded]
        logits, labels = (
            torch.cat([part[:count] for part, count in zip(each, counts, strict=True)]) for each in gathered
        )
    if len(labels) == 0:
        raise ValueError(f"dataset: every label is {IGNORED_LABEL}; allowed are rows with a label")
    return logits.cpu(), labels.cpu()


def own_rows(trainer: Trainer, rows: TaskRows) -> TaskRows:
    """Those of this process's batch that are not there to fill up the last one."""
    state, batch_size = trainer.accelerator.gradient_state, len(rows.logits)
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    number = max(0, state.remainder - trainer.accelerator.process_index * batch_size)
    return TaskRows(rows.logits[:number], rows.labels[:number])
