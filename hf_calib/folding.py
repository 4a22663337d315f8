"""A calibrator folded into the model's own weights: exact, free, and all that plain transformers needs.

The layer to scale is found by what it computes, not by its name: its output are the logits, or a selection of their
rows (Llama, Qwen and GPT-2 classifiers score every token and pick one). Whether that was right is measured afterwards.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from .attaching import (
    attach_calibrator,
    attached_calibrator,
    check_can_calibrate,
    detach_calibrator,
    folded_calibrator,
    forget_folded,
    mark_folded,
)
from .calibrators import Calibrator, IdentityCalibration, TemperatureScaling


TOLERANCE = 1e-5  # of the calibrated probabilities, in float32
PROBE_TOKENS = 7


def fold_calibrator(model: PreTrainedModel, calibrator: Calibrator) -> PreTrainedModel:
    """Writes the calibrator into the weights of the layer that makes the logits.

    Args:
        model ([`~transformers.PreTrainedModel`]): a text classifier whose last layer is linear and its own.
        calibrator ([`Calibrator`]): a fitted temperature; other maps are not linear, or not yet supported: attach
            them.
    Returns:
        the same model object. Its `save_pretrained` writes the calibrator's files too, marked as applied.
    Raises:
        ValueError: it cannot be exact; the message says why, and the weights are as they were.
    """
    check_can_calibrate(model, calibrator)
    if not isinstance(calibrator, TemperatureScaling | IdentityCalibration):
        raise ValueError(f"calibrator: {calibrator.name} cannot be folded, only temperature can; attach_calibrator it")
    if next(model.parameters()).dtype != torch.float32:
        raise ValueError(f"model: got {model.dtype} weights, which would round; attach it, or load in float32 to fold")
    before = _probe(model)
    layer = _logits_layer(model)
    _scale(layer, 1 / _divisor(calibrator))
    wanted = copy.deepcopy(calibrator).to(model.device)(before)
    deviation = float((_probe(model).softmax(-1) - wanted.softmax(-1)).abs().max())
    if deviation > TOLERANCE:
        _scale(layer, _divisor(calibrator))
        raise ValueError(
            f"model: folding would miss the calibrated probabilities by {deviation:.1e}; attach it instead"
        )
    mark_folded(model, calibrator)
    return model


def unfold_calibrator(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `fold_calibrator` up to rounding: the same model object; a ValueError when nothing is folded."""
    calibrator = folded_calibrator(model)
    if calibrator is None:
        raise ValueError(
            "model: no calibrator is known to be folded into it; load_calibrated knows it from the folder"
        )
    _scale(_logits_layer(model), _divisor(calibrator))
    forget_folded(model)
    return model


def apply_calibrator(model: PreTrainedModel, calibrator: Calibrator) -> str:
    """Folds where that is exact and attaches otherwise; returns `"folded"` or `"attached"`."""
    try:
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


def _probe_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two rows of different tokens, all of them real."""
    vocab_size = model.config.get_text_config().vocab_size
    pad = model.config.pad_token_id
    tokens = [token for token in range(min(vocab_size, 4 * PROBE_TOKENS)) if token != pad][: 2 * PROBE_TOKENS]
    input_ids = torch.tensor(tokens, device=model.device).view(2, -1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _probe(model: PreTrainedModel) -> torch.Tensor:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**_probe_inputs(model)).logits
    finally:
        model.train(was_training)


def _logits_layer(model: PreTrainedModel) -> nn.Linear:
    """The one linear layer whose output are the logits, and which shares its weight with nothing."""
    outputs: dict[nn.Linear, torch.Tensor] = {}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    hooks = [
        layer.register_forward_hook(lambda layer, args, output: outputs.update({layer: output})) for layer in linears
    ]
    try:
        logits = _probe(model)
    finally:
        for hook in hooks:
            hook.remove()
    found = [layer for layer, output in outputs.items() if _holds_rows(output, logits)]
    if len(found) != 1:
        raise ValueError(
            f"model: found {len(found)} layers whose output are the logits, where folding needs one; attach it"
        )
    weights = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    if weights.count(id(found[0].weight)) > 1:
        raise ValueError("model: the layer that makes the logits shares its weight with another; attach it instead")
    return found[0]


def _holds_rows(output: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether every row of the logits is, to the bit, one of the rows of a layer's output."""
    rows = output.reshape(-1, output.shape[-1])
    return bool((rows[None] == logits[:, None]).all(-1).any(-1).all())


def _divisor(calibrator: Calibrator) -> float:
    """What the calibrator divides logits by."""
    return calibrator.temperature.double().item() if isinstance(calibrator, TemperatureScaling) else 1.0


def _scale(layer: nn.Linear, factor: float) -> None:
    with torch.no_grad():
        layer.weight.mul_(factor)
        if layer.bias is not None:
            layer.bias.mul_(factor)
