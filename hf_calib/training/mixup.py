"""Mixup: a batch is trained on as mixtures of its rows, in the space of embeddings where these are texts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..attaching import in_eval_mode, without_adapters
from ..probing import probe_inputs
from .targets import OF_WHOLE, has_head


def check_mixes(model: nn.Module) -> None:
    """Raises a ValueError unless the model classifies whole inputs, and takes them as embeddings or numbers."""
    base = without_adapters(model)
    takes = inspect.signature(base.forward).parameters
    if not has_head(base, OF_WHOLE) or base.config.is_encoder_decoder:
        raise ValueError(
            f"mixup_alpha: {type(base).__name__} cannot be trained on mixtures; allowed are encoders that classify "
            "whole texts, images or sounds"
        )
    if base.main_input_name != "input_ids":
        return
    if "inputs_embeds" not in takes:
        raise ValueError(f"mixup_alpha: {type(base).__name__} takes no inputs_embeds, which mixtures of texts are")
    if not _reads_embeddings_alone(base):
        raise ValueError(
            f"mixup_alpha: {type(base).__name__} finds the end of a text by its tokens, which mixtures have none of; "
            "allowed are encoders, which have the attention mask"
        )


def _reads_embeddings_alone(model: nn.Module) -> bool:
    """Whether the embeddings of padded texts give the logits that their tokens give."""
    inputs = probe_inputs(model)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    mask[:, -2:] = 0
    pad = getattr(model.config, "pad_token_id", None) or 0
    tokens = tokens.where(mask == 1, pad)
    with in_eval_mode(model), torch.no_grad():
        by_tokens = model(input_ids=tokens, attention_mask=mask).logits
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(tokens), attention_mask=mask).logits
    return torch.allclose(by_tokens, by_embeddings, rtol=1e-2, atol=1e-2 * float(by_tokens.abs().max()))


def draw_mixture(num_rows: int, alpha: float) -> tuple[float, torch.Tensor]:
    """The share of each row in its mixture, from Beta(alpha, alpha), and the row that it is mixed with."""
    return float(torch.distributions.Beta(alpha, alpha).sample()), torch.randperm(num_rows)


def mixed_inputs(model: nn.Module, inputs: Mapping[str, Any], share: float, order: torch.Tensor) -> dict[str, Any]:
    """A batch of mixtures: `share` of each row and the rest of the row that `order` puts in its place.

    Source:
        Zhang et al. 2018 (arXiv 1710.09412); in embedding space, and for calibration: Thulasidasan et al. 2019
        (arXiv 1905.11001).
    """
    mixed, base = dict(inputs), without_adapters(model)
    name = base.main_input_name
    values = mixed.pop(name)
    if name == "input_ids":
        name, values = "inputs_embeds", base.get_input_embeddings()(values)
    order = order.to(values.device)
    mixed[name] = share * values + (1 - share) * values[order]
    if mixed.get("attention_mask") is not None:  # where either text is
        mixed["attention_mask"] = mixed["attention_mask"].maximum(mixed["attention_mask"][order])
    return mixed
