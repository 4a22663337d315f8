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
    in_eval_mode,
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
    if not isinstance(model, PreTrainedModel) or not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"model: got {type(model).__name__}; allowed are transformers' ...ForSequenceClassification models; "
            "attach it instead"
        )
    if next(model.parameters()).dtype != torch.float32:
        raise ValueError(f"model: got {model.dtype} weights, which would round; attach it, or load in float32 to fold")
    wanted = copy.deepcopy(calibrator).to(model.device)(_probe(model)).softmax(-1)
    layer = _logits_layer(model)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    try:
        _scale(layer, 1 / divisor(calibrator))
        deviation = float((_probe(model).softmax(-1) - wanted).abs().max())
        if not deviation <= TOLERANCE:  # written so that NaN is refused
            raise ValueError(
                f"model: folding would miss the calibrated probabilities by {deviation:.1e}; attach it instead"
            )
    except BaseException:  # also when interrupted: weights that nothing marks as folded must not be
        with torch.no_grad():
            for parameter, value in zip(layer.parameters(), before, strict=True):
                parameter.copy_(value)
        raise
    mark_folded(model, calibrator)
    return model


def unfold_calibrator(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `fold_calibrator` up to rounding: the same model object; a ValueError when nothing is folded."""
    calibrator = folded_calibrator(model)
    if calibrator is None:
        raise ValueError(
            "model: no calibrator is known to be folded into it; load_calibrated knows it from the folder"
        )
    _scale(_logits_layer(model), divisor(calibrator))
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
    """Two rows of different tokens, all of them real, that end as the model expects of texts.

    T5 and Bart classify at the one end-of-text token of each row; Llama and GPT-2 without a padding token take one row
    at a time.
    """
    config = model.config.get_text_config()
    pad, end = (getattr(model.config, name, None) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    tokens = [token for token in range(min(config.vocab_size, 4 * PROBE_TOKENS)) if token not in (pad, *ends)]
    rows = [[tokens[(row * PROBE_TOKENS + i) % len(tokens)] for i in range(PROBE_TOKENS)] + ends[:1] for row in (0, 1)]
    input_ids = torch.tensor(rows[:1] if pad is None else rows, device=model.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _probe(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad(), in_eval_mode(model):
        return model(**_probe_inputs(model), return_dict=True).logits


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


def divisor(calibrator: Calibrator | None) -> float:
    """What a calibrator that can be folded, or none, divides logits by."""
    return calibrator.temperature.double().item() if isinstance(calibrator, TemperatureScaling) else 1.0


def _scale(layer: nn.Linear, factor: float) -> None:
    with torch.no_grad():
        layer.weight.mul_(factor)
        if layer.bias is not None:
            layer.bias.mul_(factor)
