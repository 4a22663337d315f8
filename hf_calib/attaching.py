"""A calibrator attached to a model: the same object, with calibrated `outputs.logits`.

A forward hook applies it, and a submodule holds it, so that it moves with the model. Its tensors are non-persistent
buffers: no key of theirs reaches the weights file. What a model is asked to save, it saves with the calibrator's
files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, PreTrainedConfig

from .calibrators import Calibrator
from .calibrators.storage import weights_sha256, write_files


SUBMODULE = "hf_calib_calibrator"
TRAINED_ON = "before a training"  # in the place of a hash: whoever loads it beside the weights is warned
FOLDED_KEY = "hf_calib_folded"  # in the model's config: it travels with the weights, and so knows what they are


class _Attached(nn.Module):
    """What a calibrated model carries: the calibrator, whether it is suspended, and whether training went on since."""

    def __init__(self, calibrator: Calibrator, of_positions: bool):
        super().__init__()
        self.calibrator = calibrator
        self.of_positions = of_positions
        self.suspended = False
        self.outdated = False

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated logits."""
        if any(tensor.device != logits.device for tensor in self.calibrator.tensors().values()):
            self.to(logits.device)  # a model that is spread over devices may give its logits on any of them
        return self.calibrator.calibrate_positions(logits) if self.of_positions else self.calibrator(logits)

    def watch(self, logits: torch.Tensor) -> None:
        """Notices when a gradient comes back: these are then soon other weights than the calibrator was fitted for."""
        if torch.compiler.is_compiling():
            self.outdated = True
        elif logits.requires_grad:
            logits.register_hook(lambda gradient: setattr(self, "outdated", True))


def attach_calibrator(model: nn.Module, calibrator: Calibrator) -> nn.Module:
    """Makes the model's `outputs.logits` calibrated, whoever calls it: pipelines, `generate`, `Trainer.predict`.

    Of a model that answers questions these are `start_logits` and `end_logits`. Through adapters, the calibrator goes
    onto the model inside, which `generate` calls. A loss that the model computes inside `forward` still sees the raw
    logits, so training is not disturbed.

    Args:
        model ([`~transformers.PreTrainedModel`], or one with PEFT adapters): with logits of as many classes as the
            calibrator knows, or as many as its vocabulary has tokens; or over the positions of a text.
        calibrator ([`Calibrator`]): fitted, for the weights as they are; the model gets a copy. Positions take one
            temperature.
    Returns:
        the same model object.
    Raises:
        ValueError: the model is calibrated already, the calibrator is not fitted, or their labels differ.
    """
    check_can_calibrate(model, calibrator)
    own = _own_copy(model, calibrator)
    own.provenance.pop("weights", None)  # of weights that it lay beside before
    return attach_copy(model, own)


def attach_copy(model: nn.Module, calibrator: Calibrator) -> nn.Module:
    """`attach_calibrator` of a calibrator that has been checked and is nobody else's."""
    base = without_adapters(model)
    attached = _Attached(calibrator, answers_questions(base))
    if base.device.type != "meta":  # of weights that wait on disk
        attached.to(base.device)
    base.add_module(SUBMODULE, attached)
    base._hf_calib_hook = base.register_forward_hook(_calibrate_output)
    for part in {base, model}:
        part.save_pretrained = partial(_save_with_calibrator, part)  # unlike a bound method, it can be pickled
    return model


def detach_calibrator(model: nn.Module) -> nn.Module:
    """Undoes `attach_calibrator`: the same model object with its raw logits; a ValueError when nothing is attached."""
    if attached_calibrator(model) is None:
        raise ValueError("model: no calibrator is attached to it")
    base = without_adapters(model)
    base._hf_calib_hook.remove()
    del base._hf_calib_hook, base._modules[SUBMODULE]
    for part in {base, model}:
        vars(part).pop("save_pretrained", None)
    return model


def attached_calibrator(model: nn.Module) -> Calibrator | None:
    """The calibrator that is attached to this model, or to the model inside its adapters, if one is."""
    attached = _attached_to(model)
    return None if attached is None else attached.calibrator


def without_adapters(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model itself."""
    return getattr(model, "get_base_model", lambda: model)()


def mark_folded(model: nn.Module, calibrator: Calibrator) -> None:
    """Remembers that these weights hold this calibrator: on the object, and in the config that is saved with them."""
    model._hf_calib_folded = _own_copy(model, calibrator)
    setattr(model.config, FOLDED_KEY, calibrator.name)
    model.save_pretrained = partial(_save_with_calibrator, model)


def forget_folded(model: nn.Module) -> None:
    """Undoes `mark_folded`; of a model that plain transformers loaded, only the config remembers."""
    delattr(model.config, FOLDED_KEY)
    if folded_calibrator(model) is not None:
        del model._hf_calib_folded, model.save_pretrained


def is_folded(model: nn.Module) -> bool:
    """Whether these weights hold a calibrator, known or not."""
    return getattr(model.config, FOLDED_KEY, None) is not None


def folded_calibrator(model: nn.Module) -> Calibrator | None:
    """The calibrator that is folded into this model's weights, if this library folded or loaded it."""
    return getattr(model, "_hf_calib_folded", None)


@contextmanager
def uncalibrated(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, every attached calibrator in the model is suspended: its logits are the raw ones."""
    attached = [module for module in model.modules() if isinstance(module, _Attached)]
    before = [module.suspended for module in attached]
    for module in attached:
        module.suspended = True
    try:
        yield model
    finally:
        for module, suspended in zip(attached, before, strict=True):
            module.suspended = suspended


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, nothing drops out; afterwards every part of the model is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in before:
            module.training = training


def check_can_calibrate(model: nn.Module, calibrator: Calibrator) -> None:
    """Raises a ValueError unless this calibrator fits this model and nothing calibrates the model yet."""
    if calibrator.num_labels is None:
        raise ValueError(f"calibrator: got a {type(calibrator).__name__} that is not fitted; call fit first")
    if any(isinstance(module, _Attached) for module in model.modules()):  # PEFT wraps models that may have one
        raise ValueError("model: a calibrator is attached to it already; detach_calibrator(model) first")
    check_not_folded(model)
    if calibrator.needs_groups:
        raise ValueError(f"calibrator: {calibrator.name} needs the groups of rows, which a model is not told of")
    check_same_task(model, calibrator)
    check_same_labels(model, calibrator)


def check_not_folded(model: nn.Module) -> None:
    """Raises a ValueError where the model's own weights hold a calibrator; it says how to get rid of it."""
    if not is_folded(model):
        return
    remedy = "unfold_calibrator(model) first"
    if folded_calibrator(model) is None:
        remedy = f"load it by load_calibrated or, if its calibrator.json is lost, delete {FOLDED_KEY} from config.json"
    raise ValueError(f"model: a calibrator is folded into its weights already; {remedy}")


def check_same_task(model: nn.Module, calibrator: Calibrator) -> None:
    """Raises a ValueError unless the model's logits mean what the calibrator takes them for."""
    model = without_adapters(model)
    if answers_questions(model):
        if calibrator.task is not None or not calibrator.scales_alike:
            raise ValueError(
                f"calibrator: got {calibrator.name} with task={calibrator.task!r} for a model that finds answers in "
                "texts; allowed is a temperature with task=None"
            )
        return
    if predicts_tokens(model):
        if calibrator.task is not None:
            raise ValueError(f"calibrator: got task={calibrator.task!r} for a language model; allowed is task=None")
        return
    problem = getattr(model.config, "problem_type", None)
    if problem == "regression":
        raise ValueError(f"model: got problem_type={problem!r}; allowed is classification")
    task = "binary" if model.config.num_labels == 1 else None
    task = "multilabel" if problem == "multi_label_classification" else task
    if calibrator.task != task:
        raise ValueError(
            f"calibrator: got task={calibrator.task!r} for a model of {model.config.num_labels} labels with "
            f"problem_type={problem!r}; allowed is task={task!r}"
        )


def check_same_labels(model: nn.Module, calibrator: Calibrator) -> None:
    """Raises a ValueError unless the calibrator was fitted for the model's labels, or for its vocabulary."""
    model = without_adapters(model)
    if answers_questions(model):
        return
    if predicts_tokens(model):
        vocab_size = len(model.get_output_embeddings().weight)
        if calibrator.num_labels != vocab_size:
            raise ValueError(
                f"calibrator: it was fitted for {calibrator.num_labels} classes; allowed are the model's {vocab_size} "
                "tokens"
            )
        return
    names = label_names_of(model.config)
    if calibrator.num_labels != len(names) or calibrator.label_names not in (None, names):
        known = calibrator.label_names or f"{calibrator.num_labels} unnamed labels"
        raise ValueError(f"calibrator: it was fitted for {known}; allowed are the model's labels {names}")


def generates_text(model: nn.Module) -> bool:
    """Whether the model's logits are those of the next token."""
    return bool(getattr(model, "can_generate", bool)())


def predicts_tokens(model: nn.Module) -> bool:
    """Whether the model's logits are those of tokens: the next ones, or those that are masked."""
    return generates_text(model) or getattr(model, "get_output_embeddings", lambda: None)() is not None


def answers_questions(model: nn.Module) -> bool:
    """Whether the model has `start_logits` and `end_logits`, of the positions where an answer may begin and end."""
    known = AutoModelForQuestionAnswering._model_mapping.get(type(getattr(model, "config", None)), ())
    return isinstance(model, known)


def label_names_of(config: PreTrainedConfig) -> list[str]:
    """The model's class names in the order of its logits; some configs have numbers for names."""
    return [str(config.id2label[index]) for index in range(config.num_labels)]


def _attached_to(model: nn.Module) -> _Attached | None:
    return without_adapters(model)._modules.get(SUBMODULE)


def _own_copy(model: nn.Module, calibrator: Calibrator) -> Calibrator:
    """A copy that knows the model's label names, so that whoever loads it can tell what its columns are."""
    model, calibrator = without_adapters(model), copy.deepcopy(calibrator)
    has_labels = not predicts_tokens(model) and not answers_questions(model)
    calibrator.label_names = label_names_of(model.config) if has_labels else None
    return calibrator


def _calibrate_output(model: nn.Module, args: tuple, output: Any) -> Any:
    attached = model._modules[SUBMODULE]
    names = ("start_logits", "end_logits") if attached.of_positions else ("logits",)
    first = 1 if isinstance(output, tuple) and output[0].dim() == 0 else 0  # (loss, logits, ...) or (logits, ...)
    if model.training and torch.is_grad_enabled() and not attached.outdated:
        attached.watch(output[first] if isinstance(output, tuple) else output[names[0]])
    if attached.suspended:
        return output
    if isinstance(output, tuple):  # return_dict=False
        last = first + len(names)
        calibrated = (attached(logits) for logits in output[first:last])
        return (*output[:first], *calibrated, *output[last:])
    for name in names:
        output[name] = attached(output[name])
    return output


def _save_with_calibrator(model: nn.Module, save_directory: str | Path, *args: Any, **options: Any) -> None:
    """`save_pretrained` of a calibrated model: the weights as ever, and the calibrator's files beside them."""
    if options.get("push_to_hub"):
        raise ValueError(
            "push_to_hub: got True, which would leave the calibrator behind; use model.push_to_hub(repo_id)"
        )
    type(model).save_pretrained(model, save_directory, *args, **options)
    calibrator = attached_calibrator(model) or folded_calibrator(model)
    if calibrator is None or not options.get("is_main_process", True):
        return
    write_beside(model, Path(save_directory))


def write_beside(model: nn.Module, folder: Path) -> None:
    """Writes a calibrated model's calibrator into the folder that its weights, or adapters, have been saved to."""
    weights = weights_sha256(folder)
    calibrator, applied = folded_calibrator(model), "folded"
    if (attached := _attached_to(model)) is not None:
        calibrator, applied = attached.calibrator, "attached"
        # kept from now on, whatever becomes of the weights
        calibrator.provenance.setdefault("weights", TRAINED_ON if attached.outdated else weights)
    write_files(folder, calibrator.record(applied=applied, weights=weights), calibrator.tensors())
