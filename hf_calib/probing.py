"""Made-up inputs that any model of texts, images or sounds takes: enough to see what its layers compute."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


TOKENS, ROWS = 7, 2
SAMPLES = 4000  # a quarter of a second of sound


def probe_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A few rows of what the model takes, the same at every call; a ValueError where that is unknown."""
    name, config = model.main_input_name, model.config
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        return _texts(model)
    if name == "pixel_values" and isinstance(size := getattr(config, "image_size", 224), int):
        shape = (ROWS, getattr(config, "num_channels", 3), size, size)
    elif name == "input_values":  # sound as it is, or the spectrogram that a config with mel bins asks for
        bins = getattr(config, "num_mel_bins", None)
        shape = (ROWS, SAMPLES) if bins is None else (ROWS, config.max_length, bins)
    else:
        raise ValueError(f"model: it takes {name}; allowed are models of input_ids, pixel_values and input_values")
    return {name: torch.randn(shape, generator=generator).to(model.device, model.dtype)}


def _texts(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Rows of different tokens, all of them real, that end as the model expects of texts.

    T5 and Bart classify at the one end-of-text token of each row; Llama and GPT-2 without a padding token take one row
    at a time.
    """
    config = model.config.get_text_config()
    pad, end = (getattr(model.config, name, None) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    tokens = [token for token in range(min(config.vocab_size, 4 * TOKENS)) if token not in (pad, *ends)]
    rows = [[tokens[(row * TOKENS + i) % len(tokens)] for i in range(TOKENS)] + ends[:1] for row in range(ROWS)]
    input_ids = torch.tensor(rows[:1] if pad is None else rows, device=model.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if model.config.is_encoder_decoder and model.get_output_embeddings() is not None:
        inputs["decoder_input_ids"] = input_ids[:, :-1]
    return inputs
