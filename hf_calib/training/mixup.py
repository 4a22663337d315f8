"""Mixup: a batch is trained on as mixtures of its rows, in the space of embeddings where these are texts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..attaching import without_adapters
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
    if base.main_input_name == "input_ids" and "inputs_embeds" not in takes:
        raise ValueError(f"mixup_alpha: {type(base).__name__} takes no inputs_embeds, which mixtures of texts are")


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
