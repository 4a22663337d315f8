"""A calibrator folded into the model's own weights: exact, free, and all that plain transformers needs.

The place is found by what it computes, not by its name. It is the linear layer whose output are the logits, or of
whose rows they are a selection (Llama, Qwen and GPT-2 classifiers score every token and pick one). Where that layer
shares its weight with the embeddings, a temperature goes into the normalisation in front of it instead, so that
nothing is untied. Whether all that was right is measured afterwards, on the saved and reloaded folder.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .attaching import (
    answers_questions,
    attach_calibrator,
    attached_calibrator,
    check_can_calibrate,
    detach_calibrator,
    folded_calibrator,
    forget_folded,
    in_eval_mode,
    mark_folded,
)
from .calibrators import Calibrator
from .calibrators.affine import AffineMap, affine_map
from .calibrators.storage import weights_sha256
from .probing import probe_inputs


TOLERANCE = 1e-5  # of the calibrated probabilities, in float32
ROUNDED_TOLERANCE = 0.05  # with weights of lower precision: more than that is no rounding
UNDO_TOLERANCE = 1e-3  # of the raw probabilities that unfolding would give back
NO_BIAS = 1e-9  # a bias of no more, in nats, is none

Values = dict[torch.Tensor, torch.Tensor]  # parameters and what they become


class Head(NamedTuple):
    """Where the logits come from."""

    layer: nn.Linear
    added: torch.Tensor | None  # to the layer's output, such as Bart's `final_logits_bias`
    norm: nn.Module | None  # in front of it, where the layer's weight is shared
    offset: float  # that the norm adds to its weight: Gemma's is 1 + w


def fold_calibrator(model: PreTrainedModel, calibrator: Calibrator) -> PreTrainedModel:
    """Writes the calibrator into the weights that make the logits.

    To prove it, the model is saved to a temporary folder twice and loaded once: it takes the memory of a second model
    for a while, and the disk space of one.

    Args:
        model ([`~transformers.PreTrainedModel`]): any whose logits come out of a linear layer: classifiers of texts,
            tokens or images, language models, and those that find answers in texts.
        calibrator ([`Calibrator`]): fitted, and an affine map: `temperature`, `vector`, `matrix`, `platt`,
            `bias_corrected_temperature`, `prior_correction`, `structured_vector` and `structured_matrix` with
            `foldable=True`, and chains of these. Of models whose last layer shares its weight with the embeddings, a
            temperature alone.
    Returns:
        the same model object. Its `save_pretrained` writes the calibrator's files too, marked as applied.
    Raises:
        ValueError: it cannot be exact; the message says why, and the weights are as they were.
    Warns:
        UserWarning: the weights have less precision than float32, and how far the probabilities are off.
    """
    check_can_calibrate(model, calibrator)
    _check_can_fold(model)
    mapped = affine_map(calibrator)
    if mapped is None and "foldable" in calibrator.setting_names and not calibrator.foldable:
        raise ValueError(
            f"calibrator: {calibrator.name} takes log-probabilities; with foldable=True it can be folded; attach it"
        )
    if mapped is None:
        raise ValueError(f"calibrator: {calibrator.name} is no affine map of logits of a size to fold; attach it")
    mapped = mapped.to(model.device)
    head, raw = _find_head(model), _probe(model)
    weights = _sha256_of(model)
    with _changed(_mapped_values(head, mapped)):
        deviation = _verify(model, raw, mapped, calibrator.task)
    if _is_rounded(model):
        warnings.warn(f"folded {model.dtype} weights are off by up to {deviation:.1e} in probability", stacklevel=2)
    mark_folded(model, calibrator)
    folded_calibrator(model).provenance["weights"] = weights
    return model


def unfold_calibrator(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `fold_calibrator` up to rounding: the same model object; a ValueError when nothing is folded."""
    undo = undoing_map(model)
    if undo is None:
        raise ValueError(
            "model: no calibrator is known to be folded into it; load_calibrated knows it from the folder"
        )
    with _changed(_mapped_values(_find_head(model), undo.to(model.device))):
        forget_folded(model)
    return model


def undoing_map(model: PreTrainedModel) -> AffineMap | None:
    """What takes the logits of a folded model back to the raw ones; `None` where nothing is known to be folded."""
    calibrator = folded_calibrator(model)
    return None if calibrator is None else affine_map(calibrator).inverse().to(model.device)


def apply_calibrator(model: PreTrainedModel, calibrator: Calibrator) -> str:
    """Folds where that is exact and attaches otherwise; returns `"folded"` or `"attached"`."""
    try:
        if _is_rounded(model):
            raise ValueError("rounding is not exact")
        fold_calibrator(model, calibrator)
    except ValueError:
        attach_calibrator(model, calibrator)  # raises in its turn where the two do not belong together
        return "attached"
    return "folded"


def remove_calibrator(model: PreTrainedModel) -> PreTrainedModel:
    """Detaches or unfolds whatever calibrates the model, if anything does; the same model object."""
    if attached_calibrator(model) is not None:
        return detach_calibrator(model)
    return model if folded_calibrator(model) is None else unfold_calibrator(model)


def _check_can_fold(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"model: got {type(model).__name__}; allowed are transformers models without adapters; attach it, or "
            "merge the adapters first"
        )
    tensors = list(model.parameters())
    if any(tensor.is_meta or not tensor.is_floating_point() for tensor in tensors):
        raise ValueError("model: its weights are quantised or not in memory; attach it")


def _is_rounded(model: nn.Module) -> bool:
    return any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())


# -- what the model says of a few made-up inputs


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Logits, `(..., C)` float64; of a model that finds answers, start and end are the two columns."""
    with torch.no_grad(), in_eval_mode(model):
        output = model(**probe_inputs(model), return_dict=True)
    logits = torch.stack([output.start_logits, output.end_logits], -1) if answers_questions(model) else output.logits
    return logits.double()


def _probs(model: PreTrainedModel, logits: torch.Tensor, task: str | None) -> torch.Tensor:
    if task is not None:
        return logits.sigmoid()
    return logits.softmax(1 if answers_questions(model) else -1)


def _verify(model: PreTrainedModel, raw: torch.Tensor, mapped: AffineMap, task: str | None) -> float:
    """How far the folded model's probabilities are off; a ValueError if too far, here, reloaded or undone."""
    folded = _probe(model)
    with _saved(model) as folder:
        options = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
        reloaded = _probe(type(model).from_pretrained(folder, **options).to(model.device))
    probs = [_probs(model, logits, task) for logits in (mapped(raw), folded, reloaded)]
    deviation = max(float((found - probs[0]).abs().max()) for found in probs[1:])
    if not deviation <= (ROUNDED_TOLERANCE if _is_rounded(model) else TOLERANCE):  # so that NaN is refused
        raise ValueError(
            f"model: folding would miss the calibrated probabilities by {deviation:.1e}; attach it instead"
        )
    undone = _probs(model, mapped.inverse()(folded), task) - _probs(model, raw, task)
    if not _is_rounded(model) and not float(undone.abs().max()) <= UNDO_TOLERANCE:
        raise ValueError("calibrator: it nearly merges classes, so that folding could not be undone; attach it")
    return deviation


@contextmanager
def _saved(model: PreTrainedModel) -> Iterator[Path]:
    """The model as a folder, for a while; what saving writes into the config is taken back."""
    config = dict(vars(model.config))
    try:
        with tempfile.TemporaryDirectory() as folder, _without_bars():
            type(model).save_pretrained(model, folder)
            yield Path(folder)
    finally:
        vars(model.config).clear()
        vars(model.config).update(config)


def _sha256_of(model: PreTrainedModel) -> str | None:
    with _saved(model) as folder:
        return weights_sha256(folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """The user has asked for no model to be loaded."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


# -- where the logits are made


def _find_head(model: PreTrainedModel) -> Head:
    """The linear layer that makes the logits and, where it shares its weight, the norm in front of it."""
    outputs: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, output: outputs.update({module: output}))
        for module in model.modules()
        if isinstance(module, nn.Linear) or _is_norm(module)
    ]
    try:
        logits = _probe(model)
    finally:
        for hook in hooks:
            hook.remove()
    layers = {m: o for m, o in outputs.items() if isinstance(m, nn.Linear) and o.shape[-1] == logits.shape[-1]}
    layer, added = _layer_of(model, layers, logits)
    shared = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    if shared.count(id(layer.weight)) == 1:
        return Head(layer, added, None, 0.0)
    norms = [module for module in outputs if _is_norm(module)]
    return Head(layer, added, *_norm_before(model, layer, norms))


def _is_norm(module: nn.Module) -> bool:
    """Whether all that the module has is a weight for each feature, and perhaps a bias."""
    weight, has_children = getattr(module, "weight", None), any(True for _ in module.children())
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and not has_children


def _layer_of(
    model: PreTrainedModel, layers: dict[nn.Linear, torch.Tensor], logits: torch.Tensor
) -> tuple[nn.Linear, torch.Tensor | None]:
    """The one layer whose output are the logits, and what is added to it, if anything is."""
    found = [(layer, None) for layer, output in layers.items() if _holds_rows(output, logits)]
    if not found:
        constants = [t for t in (*model.parameters(), *model.buffers()) if t.numel() == logits.shape[-1]]
        found = [
            (layer, constant)
            for layer, output in layers.items()
            for constant in constants
            if constant is not layer.bias and _holds_rows(output + constant.flatten(), logits)
        ]
    if len(found) != 1:
        raise ValueError(
            f"model: found {len(found)} layers whose output are the logits, where folding needs one; attach it"
        )
    return found[0]


def _holds_rows(output: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether every row of the logits is, to the bit, one of the rows of a layer's output."""
    rows = output.reshape(-1, output.shape[-1])
    return all(bool((rows == row).all(-1).any()) for row in logits.reshape(-1, logits.shape[-1]))


def _norm_before(model: PreTrainedModel, layer: nn.Linear, norms: list[nn.Module]) -> tuple[nn.Module, float]:
    """The norm whose weight scales all that the layer is given, and the offset of that weight."""
    if norms:
        before = _input_of(model, layer)
        for offset in (0.0, 1.0):
            with _changed(_scaled_norm(norms[-1], offset, 0.5), keep=False):  # half: exact in every precision
                halved = _input_of(model, layer)
            if torch.allclose(2 * halved, before, rtol=1e-3, atol=1e-3 * float(before.abs().mean())):
                return norms[-1], offset
    raise ValueError(
        "model: the layer that makes the logits shares its weight with another, and no norm in front of it scales "
        "them; attach it instead"
    )


def _input_of(model: PreTrainedModel, layer: nn.Linear) -> torch.Tensor:
    found: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda layer, args: found.append(args[0]))
    try:
        _probe(model)
    finally:
        hook.remove()
    return found[-1]


# -- what becomes of the weights


def _mapped_values(head: Head, mapped: AffineMap) -> Values:
    """The weights with which the logits are mapped; a ValueError where the map has no place in them."""
    values: Values = {}
    if head.norm is None:
        values[head.layer.weight] = mapped.linear(head.layer.weight.T).T
    elif mapped.weight.dim() == 0 and mapped.bias is None:
        values |= _scaled_norm(head.norm, head.offset, float(mapped.weight))
    else:
        raise ValueError(
            "model: the layer that makes the logits shares its weight with another, so that only a temperature can be "
            "folded; attach it instead"
        )
    biases = [tensor for tensor in (head.layer.bias, head.added) if tensor is not None]
    for number, bias in enumerate(biases):
        row = bias.flatten()
        values[bias] = (mapped(row) if number == 0 else mapped.linear(row)).view_as(bias)
    if not biases and mapped.bias is not None and float(mapped.bias.abs().max()) > NO_BIAS:
        raise ValueError(
            "calibrator: its bias has no place in the layer that makes the logits, which has none; attach it instead"
        )
    return values


def _scaled_norm(norm: nn.Module, offset: float, factor: float) -> Values:
    values = {parameter: parameter.double() * factor for parameter in norm.parameters()}
    return values | {norm.weight: (norm.weight.double() + offset) * factor - offset}


@contextmanager
def _changed(values: Values, *, keep: bool = True) -> Iterator[None]:
    """The weights have other values within the block, and after it too unless it fails or they are not to be kept."""
    before = {tensor: tensor.detach().clone() for tensor in values}
    try:
        with torch.no_grad():
            for tensor, value in values.items():
                tensor.copy_(value)
        yield
    except BaseException:  # also when interrupted: weights that nothing marks as folded must not be
        keep = False
        raise
    finally:
        if not keep:
            with torch.no_grad():
                for tensor, value in before.items():
                    tensor.copy_(value)
