"""A `Trainer` that trains with a calibration loss and fits a calibrator on held-out data."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..attaching import (
    attach_calibrator,
    attached_calibrator,
    check_not_folded,
    detach_calibrator,
    forget_folded,
    generates_text,
    in_eval_mode,
    is_folded,
    uncalibrated,
    without_adapters,
)
from ..calibrators import CALIBRATORS, Calibrator, select_calibrator
from ..calibrators.selection import PREFER_SINGLE
from ..functional.losses import cross_entropy_loss
from ..metrics import MetricCollection
from ..metrics.distributed import sum_over_processes
from .arguments import CalibrationTrainingArguments, check_calibrator_name


IGNORED_LABEL = -100  # what Trainer counts, pads and gathers by; not a choice
SUPPORTED_HEADS = ("ForSequenceClassification", "ForTokenClassification")
STREAMING = ("temperature",)  # what is fitted on logits that come a batch at a time, at the size of a vocabulary
NO_LABELLED_ROW = "dataset: got no labelled row; allowed are rows with a label, as in train_dataset"
EVALUATION_METRICS = ("ece", "brier")
LABEL_COLUMNS = ("labels", "label", "label_ids")


class CalibrationTrainer(Trainer):
    r"""`transformers.Trainer` with the loss that `args.calibration_loss` names, and `calibrate`.

    $$L = \frac{1}{n} \sum_i \ell(z_i, y_i)$$

    where n counts the labels that are not -100 in the whole step: over all accumulated micro-batches and processes. So
    one batch of 16, four accumulated batches of 4, and two processes with 8 each take the same step. `Trainer` alone
    (5.23) does not do this for classification heads: it adds up the micro-batches' means.

    The evaluation loss is the mean negative log-likelihood, whatever the training loss, so that runs with different
    losses compare, and `metric_for_best_model="loss"` selects by a proper score. It is exact: rows that a last, uneven
    batch repeats do not count, every token weighs the same, and a NaN is shown, not left out. Beside it stand `ece`
    and `brier` of the same rows, from sums: no logits are kept or gathered for them.

    While it trains, an attached calibrator is suspended, also in the evaluations in between; `evaluate` and `predict`
    outside of `train` see it.

    When to use: for single-label sequence classification, token classification, or a model that generates text, with
    any `transformers` model, one of `hf_calib`'s own, or either with PEFT adapters.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`, *optional*): with a sequence or token classification
            head, a causal language model, or an encoder-decoder that generates. Pass it or `model_init`.
        args (`CalibrationTrainingArguments`, *optional*): as in `Trainer`.
        more, kwargs: everything else that `Trainer` takes, except `compute_loss_func`.
    Raises:
        ValueError: the model has another head, one label or several at once, or an argument would be ignored or would
            make the loss wrong: other arguments than `CalibrationTrainingArguments`, `compute_loss_func`,
            `label_smoothing_factor`, `label_names`, Liger kernels, `nn.DataParallel`, tensor or sequence parallelism.
    Source:
        transformers issue 47688, for what goes wrong in `Trainer.compute_loss`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: CalibrationTrainingArguments | None = None,
        *more: Any,
        **kwargs: Any,
    ):
        if args is None:
            args = CalibrationTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, CalibrationTrainingArguments):
            raise ValueError(f"args: got {type(args).__name__}; allowed are CalibrationTrainingArguments")
        if model is not None:
            _check_model(model)
        super().__init__(model, args, *more, **kwargs)
        self._refuse_ignored_arguments()
        # Only with this does Trainer count the labels of a step. It is about the model's own loss, which is not used.
        self.model_accepts_loss_kwargs = True
        self._evaluated: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # logits, labels, their losses
        self._start_evaluation()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As `Trainer.call_model_init`; refuses what `CalibrationTrainer` refuses."""
        model = super().call_model_init(trial)
        _check_model(model)
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        r"""This process's share of the step's mean loss, from the logits; `Trainer.compute_loss` is not used.

        Args:
            model (`torch.nn.Module`): in training mode, the loss is `args.calibration_loss`; else cross-entropy.
            inputs (`dict`): a batch with `labels`.
            return_outputs (`bool`): whether to return the model's outputs too.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): labels in the whole step; None: in this batch.
        Returns:
            `torch.Tensor` of shape `()`, float32, at least 0: lower is better. Or it and the outputs.
        Raises:
            ValueError: `inputs` has no labels, or labels that do not fit the logits.
        """
        if inputs.get("labels") is None:
            raise ValueError(f"inputs: got the columns {', '.join(inputs)}; allowed are batches with labels")
        outputs = model(**self._inputs_of_model(inputs))
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        labels = self._labels_of_logits(inputs["labels"]).to(logits.device)
        if model.training:
            # Made anew each time, because a hyper-parameter search changes args after __init__.
            total = self.args.make_loss()(logits, labels)
        else:
            losses = cross_entropy_loss(logits, labels, reduction="none")
            self._evaluated = logits, labels, losses
            total = losses.sum()
        items = (labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(items, device=logits.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The processes' gradients are averaged afterwards, and these are shares: their sum is the mean.
            loss = loss * self.accelerator.num_processes
        if not return_outputs:
            return loss
        # Trainer takes what stands first in a tuple for the loss.
        return loss, (outputs if isinstance(outputs, Mapping) else (loss, *outputs))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """As `Trainer.get_batch_samples`; of a causal language model, it does not count the first token of a row."""
        if _predicts_next(self.model):
            epoch_iterator = map(_without_first_label, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _inputs_of_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch without its labels; of these, an encoder-decoder needs what its decoder has to continue."""
        kept = {name: value for name, value in inputs.items() if name != "labels"}
        model = without_adapters(self.model)
        decodes = generates_text(model) and model.config.is_encoder_decoder
        if decodes and kept.keys().isdisjoint(("decoder_input_ids", "decoder_inputs_embeds")):
            kept["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        return kept

    def _labels_of_logits(self, labels: torch.Tensor) -> torch.Tensor:
        """What each place's logits are for: in a causal language model, the token after it."""
        return F.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL) if _predicts_next(self.model) else labels

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **kwargs: Any) -> tuple:
        """As `Trainer.prediction_step`; also adds the batch's rows to the exact evaluation loss and the metrics."""
        result, evaluated = self._predict_batch(model, inputs, *more, **kwargs)
        if evaluated is not None:
            self._add_evaluated(*evaluated)
        return result

    def _predict_batch(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **kwargs: Any) -> tuple:
        """What `Trainer.prediction_step` returns, and logits, labels and losses of this process's own rows."""
        self._evaluated = None
        result = super().prediction_step(model, inputs, *more, **kwargs)
        evaluated, self._evaluated = self._evaluated, None
        if evaluated is not None:
            evaluated = tuple(values[: self._num_own_rows(len(values))] for values in evaluated)
        return result, evaluated

    def _start_evaluation(self) -> None:
        self._nll_sums = torch.zeros(2, dtype=torch.float64)  # of the losses, and of the labels that count
        self._metrics = MetricCollection(EVALUATION_METRICS)

    def _add_evaluated(self, logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor) -> None:
        kept = labels != IGNORED_LABEL
        self._nll_sums += torch.stack([losses.double().sum(), kept.sum()]).cpu()
        if kept.any() and not self._nll_sums[0].isnan():
            self._metrics.update(logits[kept].float().softmax(-1), labels[kept])

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the exact mean negative log-likelihood as the loss, and the metrics."""
        self._start_evaluation()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        _, (total, count) = sum_over_processes(0, self._nll_sums)
        if count > 0:
            output.metrics[f"{metric_key_prefix}_loss"] = float(total / count)
            found = {} if total.isnan() else self._metrics.all_reduce().compute()
            for name in EVALUATION_METRICS:
                output.metrics.setdefault(f"{metric_key_prefix}_{name}", float(found.get(name, torch.nan)))
        return output

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`, with an attached calibrator suspended and a folded one forgotten; warns of either."""
        if self.model is not None and is_folded(base := without_adapters(self.model)):
            forget_folded(base)
            warnings.warn(
                "The calibrator in the model's weights is forgotten, because training changes them. "
                "Fit one afterwards: trainer.calibrate(dataset).",
                stacklevel=2,
            )
        with uncalibrated(self.model):
            output = super().train(*args, **kwargs)
        if attached_calibrator(self.model) is not None:
            warnings.warn(
                "The attached calibrator was fitted before this training and does not fit the model any more. "
                "Fit it again: trainer.calibrate(dataset).",
                stacklevel=2,
            )
        return output

    def calibrate(self, dataset: Any, *, calibrator: str | None = None) -> Calibrator:
        """Fits a calibrator to the model's predictions on held-out data and attaches it.

        Every process predicts its part; all of them fit on all rows and come to the same calibrator. Of a language
        model, whose logits do not fit into memory, each batch is used and forgotten. One that was attached before is
        suspended meanwhile and then replaced; if anything fails, it stays.

        Args:
            dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): labelled rows as in `train_dataset`, none of
                them in it: on rows that it was trained on, a model is surer and more often right than on new ones.
                Rows are compared by their model inputs, without padding. Where that cannot be done, because a dataset
                is iterable or its rows become inputs in the collator only, it warns.
            calibrator (`str`, *optional*): a key of `CALIBRATORS` or `"auto"`; None is `args.calibrator`. Of a
                language model, one that is fitted on a stream: `"temperature"`.
        Returns:
            `Calibrator`: the fitted one, as it is attached to `self.model`: on its device, with its label names.
        Raises:
            ValueError: the calibrator is unknown, one is folded into the weights, rows are in `train_dataset` too, or
                no row has a label.
        """
        name = self.args.calibrator if calibrator is None else calibrator
        check_calibrator_name(name)
        check_not_folded(without_adapters(self.model))
        streams = generates_text(without_adapters(self.model))
        if streams and name not in STREAMING:
            raise ValueError(f"calibrator: got {name!r}; allowed for a language model are {', '.join(STREAMING)}")
        self._refuse_seen_rows(dataset)
        if streams:
            fitted = CALIBRATORS[name]().fit_batches(self._logit_batches(dataset))
        else:
            logits, labels = self._predict_logits(dataset)
            fitted = (
                select_calibrator(logits, labels, tolerance=PREFER_SINGLE)
                if name == "auto"
                else CALIBRATORS[name]().fit(logits, labels)
            )
        if attached_calibrator(self.model) is not None:
            detach_calibrator(self.model)
        attach_calibrator(self.model, fitted)
        return attached_calibrator(self.model)

    def _predict_logits(self, dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw logits `(N, C)` and labels `(N,)` of every labelled row, gathered over the processes."""
        changes = (
            (self, "compute_metrics", None),
            (self, "preprocess_logits_for_metrics", _first_output),  # not the user's, which may well take the argmax
            (self.args, "prediction_loss_only", False),
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(uncalibrated(self.model))
            for owner, name, value in changes:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            output = self.predict(dataset, metric_key_prefix="calibration")
        if output.predictions is None or output.label_ids is None:
            raise ValueError(NO_LABELLED_ROW)
        batched = isinstance(output.predictions, list)  # where args.eval_do_concat_batches is False
        pairs = zip(output.predictions, output.label_ids, strict=True) if batched else [output[:2]]
        rows = [(logits[labels != IGNORED_LABEL], labels[labels != IGNORED_LABEL]) for logits, labels in pairs]
        logits, labels = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        if len(labels) == 0:
            raise ValueError(f"dataset: every label is {IGNORED_LABEL}; allowed are rows with a label")
        return torch.from_numpy(logits), torch.from_numpy(labels)

    def _logit_batches(self, dataset: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Raw logits `(n, C)` and labels `(n,)` of this process's rows, a batch at a time."""
        with uncalibrated(self.model), in_eval_mode(self.model):
            for inputs in self.get_test_dataloader(dataset):
                _, evaluated = self._predict_batch(self.model, inputs, prediction_loss_only=True)
                if evaluated is None:
                    raise ValueError(NO_LABELLED_ROW)
                logits, labels, _ = evaluated
                kept = labels != IGNORED_LABEL
                yield logits[kept], labels[kept]

    def _num_own_rows(self, batch_size: int) -> int:
        """How many rows of this process's batch are not there to fill up the last one."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return batch_size
        return max(0, state.remainder - self.accelerator.process_index * batch_size)

    def _refuse_ignored_arguments(self) -> None:
        """Raises a ValueError for what `Trainer` takes but this loss would ignore, or get wrong."""
        args = self.args
        refused = (
            ("compute_loss_func", self.compute_loss_func, None, "the loss is args.calibration_loss"),
            ("label_smoothing_factor", args.label_smoothing_factor, 0, "use calibration_loss='label_smoothing'"),
            ("label_names", self.label_names, ["labels"], "the loss is computed from that column"),
            ("use_liger_kernel", args.use_liger_kernel, False, "its losses return no logits"),
            ("n_gpu", max(args.n_gpu, 1), 1, "start one process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES=0"),
            ("tensor parallel size", self.get_tp_size(), 1, "only data parallelism"),
            ("context parallel size", self.get_cp_size(), 1, "only data parallelism"),
            ("sequence parallel size", self.get_sp_size(), 1, "only data parallelism"),
        )
        for name, value, allowed, reason in refused:
            if value != allowed:
                raise ValueError(f"{name}: got {value!r}; allowed is {allowed!r}: {reason}")

    def _refuse_seen_rows(self, dataset: Any) -> None:
        """Raises a ValueError if rows of `dataset` are in `self.train_dataset`; warns where that cannot be told."""
        if self.train_dataset is None:
            return
        columns = _input_columns(self.train_dataset, dataset, without_adapters(self.model))
        if not columns:
            warnings.warn(
                "It cannot be checked whether training has seen rows of the calibration dataset: it or train_dataset "
                "is not a map-style dataset of dictionaries, or they have no column in common that the model takes.",
                stacklevel=3,
            )
            return
        train_rows = set(_row_hashes(self.train_dataset, columns))
        seen = [index for index, row in enumerate(_row_hashes(dataset, columns)) if row in train_rows]
        if seen:
            raise ValueError(
                f"dataset: {len(seen)} of {len(dataset)} rows are in train_dataset too (row "
                f"{', '.join(map(str, seen[:5]))}{', ...' if len(seen) > 5 else ''}); allowed are rows that training "
                "has not seen"
            )


def _check_model(model: nn.Module) -> None:
    """Raises a ValueError unless the model has a head and a configuration that the loss is right for."""
    model = without_adapters(model)
    names = [base.__name__ for base in type(model).__mro__]
    if isinstance(model, PreTrainedModel) and generates_text(model):
        return
    if not isinstance(model, PreTrainedModel) or not any(head in name for name in names for head in SUPPORTED_HEADS):
        raise ValueError(
            f"model: got {names[0]}; allowed are transformers models for single-label sequence classification or "
            f"token classification (a class named ...{' or ...'.join(SUPPORTED_HEADS)}), and those that generate text"
        )
    problem = getattr(model.config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"model.config.problem_type: got {problem!r}; allowed are None and 'single_label_classification'"
        )
    if model.config.num_labels < 2:
        raise ValueError(
            f"model.config.num_labels: got {model.config.num_labels}, which means regression; allowed are 2 and more"
        )


def _predicts_next(model: nn.Module) -> bool:
    """Whether the logits at a place are for the token after it, which its labels have one place further on."""
    model = without_adapters(model)
    return generates_text(model) and not model.config.is_encoder_decoder


def _without_first_label(batch: Any) -> Any:
    """The batch, whose first tokens nothing predicts: without a label they do not count, however they are counted."""
    if not isinstance(batch, Mapping) or batch.get("labels") is None:
        return batch
    return {**batch, "labels": F.pad(batch["labels"][..., 1:], (1, 0), value=IGNORED_LABEL)}


def _first_output(predictions: Any, labels: torch.Tensor) -> torch.Tensor:
    """The logits: first of everything that a model returns besides the loss."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def _input_columns(train_dataset: Any, dataset: Any, model: nn.Module) -> list[str]:
    """Columns to compare rows by: the model's inputs that both datasets have; none where one has no such rows."""
    columns = None
    for rows in (train_dataset, dataset):
        if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            return []
        if len(rows) == 0 or not isinstance(rows[0], Mapping):
            return []
        columns = set(rows[0]) if columns is None else columns & set(rows[0])
    columns -= {*LABEL_COLUMNS, "attention_mask"}
    return sorted(columns & set(inspect.signature(model.forward).parameters))


def _row_hashes(dataset: Any, columns: list[str]) -> Iterator[bytes]:
    for index in range(len(dataset)):
        row = dataset[index]
        mask = None if row.get("attention_mask") is None else np.asarray(row["attention_mask"]) == 1
        digest = hashlib.blake2b(digest_size=16)
        for name in columns:
            values = _as_array(row[name])
            # Padding differs between two preparations of the same text, and is not content.
            if mask is not None and mask.ndim == 1 and values.shape[:1] == mask.shape:
                values = values[mask]
            digest.update(f"{name}{values.shape}".encode())
            digest.update(values.tobytes())
        yield digest.digest()


def _as_array(value: Any) -> np.ndarray:
    """One dtype for integers and one for floats, so that lists, arrays and tensors of the same numbers are equal."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # ragged lists, bfloat16 tensors
        array = np.asarray(repr(value))
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    return np.frombuffer(repr(value).encode(), dtype=np.uint8)
