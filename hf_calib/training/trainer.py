"""A `Trainer` that trains with a calibration loss and fits a calibrator on held-out data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..attaching import (
    attach_copy,
    attached_calibrator,
    check_can_calibrate,
    forget_folded,
    is_folded,
    uncalibrated,
    without_adapters,
)
from ..calibrators import Calibrator
from ..calibrators.loading import load_with_record
from ..calibrators.rows import warn_caller
from ..calibrators.storage import JSON_NAME
from ..functional.losses import cross_entropy_loss
from .arguments import CalibrationTrainingArguments
from .diagrams import log_diagram
from .evaluating import EvaluationSums, prefix_of
from .fitting import check_calibrator, check_fit, fit_and_attach, own_rows
from .mixup import check_mixes, draw_mixture, mixed_inputs
from .targets import (
    TaskRows,
    check_class_numbers,
    check_labels_are_there,
    check_model,
    count_labels,
    has_row_loss,
    has_several_labels,
    inputs_of_model,
    label_columns,
    rows_of,
)


class CalibrationTrainer(Trainer):
    r"""`transformers.Trainer` with the loss that `args.calibration_loss` names, and `calibrate`.

    $$L = \frac{1}{n} \sum_i \ell(z_i, y_i)$$

    where n counts the labels that are not -100 in the whole step: over all accumulated micro-batches and processes. So
    one batch of 16, four accumulated batches of 4, and two processes with 8 each take the same step. `Trainer` alone
    (5.23) does not do this for classification heads: it adds up the micro-batches' means.

    Without a `calibration_loss`, it is the model's own loss, scaled in the same way; of answers and of several labels,
    cross-entropy, which is theirs. A loss with a name takes the place of all that the model's own holds, also of a
    router's balancing, which is a mean of the micro-batches' and so not exact. A loss that compares a batch with
    itself (`mmce`, `soft_binned_ece`, `mdca`) is the mean of the micro-batches', by their labels.

    The evaluation loss is the mean negative log-likelihood, whatever the training loss, so that runs with different
    losses compare, and `metric_for_best_model="loss"` selects by a proper score. It is exact: rows that a last, uneven
    batch repeats do not count, every token weighs the same, and a NaN is shown, not left out. Beside it stand, of the
    same rows and from sums alone: `nll` (the same), `ece`, `brier`, `temperature`, the best one from 1/8 to 8, and
    `refinement`, the NLL that it would leave: `metric_for_best_model="refinement"` chooses the checkpoint that is best
    once it is calibrated. TensorBoard, Weights & Biases and Trackio, where `report_to` names one, get the reliability
    diagram of every evaluation as `eval/reliability`, if matplotlib is installed.

    While it trains, an attached calibrator is suspended, also in the evaluations in between; `evaluate` and `predict`
    outside of `train` see it. Checkpoints carry it, and a training that is resumed from one has it again.

    When to use: for classification of texts (of one label or several), tokens, images and sounds, for models that
    generate text, fill masks or find answers: any of `transformers`, `hf_calib`'s own, or either with PEFT adapters.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`, *optional*): with such a head. Pass it or
            `model_init`.
        args (`CalibrationTrainingArguments`, *optional*): as in `Trainer`.
        more, kwargs: everything else that `Trainer` takes; `compute_loss_func` in the place of a `calibration_loss`.
    Raises:
        ValueError: the model has another head, or one label, or an argument would be ignored or would make the loss
            wrong: other arguments than `CalibrationTrainingArguments`, `compute_loss_func` beside a
            `calibration_loss`, `label_smoothing_factor`, `label_names`, Liger kernels, `nn.DataParallel`, tensor or
            sequence parallelism.
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
            check_model(model)
        self._in_training: contextlib.ExitStack | None = None
        super().__init__(model, args, *more, **kwargs)
        self._refuse_ignored_arguments()
        self.model_accepts_loss_kwargs = False  # labels are counted here
        self._evaluated: TaskRows | None = None
        self._sums = EvaluationSums(of_events=self.model is not None and has_several_labels(self.model))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As `Trainer.call_model_init`; refuses what `CalibrationTrainer` refuses."""
        model = super().call_model_init(trial)
        check_model(model)
        if self._in_training is not None:
            self._leave_raw(model)
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        r"""This process's share of the step's mean loss; `Trainer.compute_loss` is not used.

        Args:
            model (`torch.nn.Module`): in training mode, the loss is `args.calibration_loss`, or else
                `compute_loss_func`, or else the model's own; out of it, cross-entropy.
            inputs (`dict`): a batch with labels, placed as the model's own loss takes them.
            return_outputs (`bool`): whether to return the model's outputs too.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): labels in the whole step; None: in this batch.
        Returns:
            `torch.Tensor` of shape `()`, float32: lower is better. Or it and the outputs.
        Raises:
            ValueError: `inputs` has no labels, or labels that do not fit the logits.
        """
        check_labels_are_there(self.model, inputs)
        items = count_labels(self.model, inputs) if num_items_in_batch is None else num_items_in_batch
        if model.training and self.args.mixup_alpha > 0:
            loss, outputs = self._mixed_loss(model, inputs, items)
        elif model.training and self.compute_loss_func is not None:
            loss, outputs = self._users_loss(model, inputs, items)
        elif model.training and self.args.calibration_loss is None and not has_row_loss(self.model):
            loss, outputs = self._models_loss(model, inputs, items)
        else:
            outputs = model(**inputs_of_model(self.model, inputs))
            rows = rows_of(self.model, inputs, outputs)
            if not model.training:
                self._evaluated = rows
            # Made anew each time, because a hyper-parameter search changes args after __init__.
            loss = self._share((self.args.make_loss() if model.training else _nll)(*rows), items)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The processes' gradients are averaged afterwards, and these are shares: their sum is the mean.
            loss = loss * self.accelerator.num_processes
        if not return_outputs:
            return loss
        # Trainer takes what stands first in a tuple for the loss.
        return loss, (outputs if isinstance(outputs, Mapping) else (loss, *outputs))

    def _mixed_loss(
        self, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor | int
    ) -> tuple[torch.Tensor, Any]:
        """The loss of mixtures of the batch's rows, and, where they have a weight, that of the rows themselves."""
        plain, loss_of = inputs_of_model(self.model, inputs), self.args.make_loss()
        share, order = draw_mixture(len(inputs["labels"]), self.args.mixup_alpha)
        outputs = model(**mixed_inputs(self.model, plain, share, order))
        logits, labels = rows_of(self.model, inputs, outputs)
        total = share * loss_of(logits, labels) + (1 - share) * loss_of(logits, labels[order.to(labels.device)])
        if self.args.mixup_weight is not None:
            outputs = model(**plain)
            total = self.args.mixup_weight * total + loss_of(*rows_of(self.model, inputs, outputs))
        return self._share(total, items), outputs

    def _users_loss(
        self, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor | int
    ) -> tuple[torch.Tensor, Any]:
        """That of `compute_loss_func`, which has scaled it."""
        outputs = model(**inputs_of_model(self.model, inputs))
        labels = tuple(inputs[name] for name in label_columns(self.model))
        loss = self.compute_loss_func(outputs, labels if len(labels) > 1 else labels[0], num_items_in_batch=items)
        return loss, outputs

    def _models_loss(
        self, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor | int
    ) -> tuple[torch.Tensor, Any]:
        """The model's own: a mean over the labels of the batch, of which this is the share."""
        check_class_numbers(self.model, inputs)
        outputs = model(**{**inputs, "labels": inputs["labels"].long()})
        mean = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
        if mean is None or mean.dim() > 0:
            raise ValueError(
                f"calibration_loss: got None, and {type(model).__name__} gives no loss of its own; name one"
            )
        own = count_labels(self.model, inputs).to(mean.device)
        return self._share(mean.where(own > 0, 0.0) * own, items), outputs  # a mean of no labels is NaN

    def _share(self, total: torch.Tensor, items: torch.Tensor | int) -> torch.Tensor:
        return total / torch.as_tensor(items, device=total.device).clamp(min=1)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """As `Trainer.get_batch_samples`, with the labels of the whole step counted as the loss counts them."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for inputs in samples:
            check_labels_are_there(self.model, inputs)
        if not samples:
            return samples, None
        items = sum(count_labels(self.model, inputs) for inputs in samples).to(device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            items = self.accelerator.gather(items).sum()
        return samples, items

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **kwargs: Any) -> tuple:
        """As `Trainer.prediction_step`; also adds this process's own rows to the evaluation's sums."""
        self._evaluated = None
        result = super().prediction_step(model, inputs, *more, **kwargs)
        rows, self._evaluated = self._evaluated, None
        if rows is not None:
            self._sums.add(own_rows(self, rows))
        return result

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the exact mean negative log-likelihood as the loss, and the scores."""
        self._sums = EvaluationSums(of_events=has_several_labels(self.model))
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = self._sums.compute()
        if found is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = found["nll"]
            for name, value in found.items():
                output.metrics.setdefault(f"{metric_key_prefix}_{name}", value)
        elif f"{metric_key_prefix}_loss" in output.metrics:  # every label is ignored: that is not a loss of 0
            output.metrics[f"{metric_key_prefix}_loss"] = math.nan
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; beside the scores of an evaluation, trackers get its reliability diagram."""
        super().log(logs, *args, **kwargs)
        if f"{(prefix := prefix_of(logs))}_refinement" in logs:
            log_diagram(self, prefix, self._sums.confidences)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`, with an attached calibrator suspended and a folded one forgotten; warns of either."""
        self._attached_before = None
        with contextlib.ExitStack() as self._in_training:
            self._in_training.callback(setattr, self, "_in_training", None)
            if self.model is not None:
                self._leave_raw(self.model)
            output = super().train(*args, **kwargs)
        if self._attached_before is not None and attached_calibrator(self.model) is self._attached_before:
            warn_caller(
                "The attached calibrator was fitted before this training and does not fit the model any more. "
                "Fit it again: trainer.calibrate(dataset)."
            )
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As `Trainer`, with the calibrator that the model had in the process that wrote the checkpoint."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        if attached_calibrator(self.model) is not None or not (folder / JSON_NAME).exists():
            return
        try:
            calibrator, record = load_with_record(folder)
            if record.get("applied") != "attached":
                raise ValueError("it was in the weights, and training has changed these")
            check_can_calibrate(self.model, calibrator)
        except (ValueError, FileNotFoundError) as error:
            warn_caller(f"The calibrator in {folder} is not attached: {error}")
            return
        attach_copy(self.model, calibrator)
        self._leave_raw(self.model)

    def _leave_raw(self, model: nn.Module) -> None:
        """Until training ends, the model gives raw logits."""
        self._attached_before = attached_calibrator(model)
        if is_folded(base := without_adapters(model)):
            forget_folded(base)
            warn_caller(
                "The calibrator in the model's weights is forgotten, because training changes them. "
                "Fit one afterwards: trainer.calibrate(dataset)."
            )
        self._in_training.enter_context(uncalibrated(model))

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
                language model, or one that finds answers, `"temperature"`.
        Returns:
            `Calibrator`: the fitted one, as it is attached to `self.model`: on its device, with its label names.
        Raises:
            ValueError: the calibrator is unknown, one is folded into the weights, rows are in `train_dataset` too, or
                no row has a label.
        """
        name = self.args.calibrator if calibrator is None else calibrator
        check_fit(self, dataset, name)
        return fit_and_attach(self, dataset, name)

    def _refuse_ignored_arguments(self) -> None:
        """Raises a ValueError for what `Trainer` takes but this loss would ignore, or get wrong."""
        args = self.args
        if self.model is not None:
            check_calibrator(self.model, args.calibrator)
            if args.mixup_alpha > 0:
                check_mixes(self.model)
        columns = list(label_columns(self.model)) if self.model is not None else self.label_names
        func = None if args.calibration_loss is None and args.mixup_alpha == 0 else self.compute_loss_func
        refused = (
            ("compute_loss_func", func, None, "the loss is args.calibration_loss"),
            ("label_smoothing_factor", args.label_smoothing_factor, 0, "use calibration_loss='label_smoothing'"),
            ("label_names", self.label_names, columns, "the loss is computed from these columns"),
            ("use_liger_kernel", args.use_liger_kernel, False, "its losses return no logits"),
            ("n_gpu", max(args.n_gpu, 1), 1, "start one process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES=0"),
            ("tensor parallel size", self.get_tp_size(), 1, "only data parallelism"),
            ("context parallel size", self.get_cp_size(), 1, "only data parallelism"),
            ("sequence parallel size", self.get_sp_size(), 1, "only data parallelism"),
        )
        for name, value, allowed, reason in refused:
            if value != allowed:
                raise ValueError(f"{name}: got {value!r}; allowed is {allowed!r}: {reason}")


def _nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy_loss(logits, labels, reduction="sum")
