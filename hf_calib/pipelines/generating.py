"""Generated texts: the probability of exactly this text, from the model's own logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from ..attaching import generates_text
from ..predictions import max_length
from .scoring import ScoredPipeline


class CalibratedText2TextGenerationPipeline(ScoredPipeline):
    """Translation, summarisation and the like: `pipeline("calibrated-text2text-generation", model=model, ...)`.

    The score of a text is the probability of exactly this text: the product of the probabilities of its tokens, the
    end of the text included, from the model's own logits. One more forward pass over the finished text gives them, so
    the score is the same whether the text was found greedily, by beams or by chance, and no penalty or processor of
    `generate` acts on it. Not part of the text are the token that the decoder starts with, one that
    `forced_bos_token_id` puts behind it (the language to translate into), and padding. Of a text that was cut off by
    `max_new_tokens`, it is the probability that a text begins so.

    A task's prefix belongs into the text. Where a tokenizer has languages (mBART, NLLB), set `tokenizer.src_lang` and
    pass `forced_bos_token_id=tokenizer.convert_tokens_to_ids(language)`.

    Args:
        model ([`~transformers.PreTrainedModel`]): of `AutoModelForSeq2SeqLM`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its own.
        calibrator ([`Calibrator`], folder or Hub repo id, *optional*): fitted with `task="binary"` on `log_odds` of
            scores and on whether their texts were right. It maps each score to the probability that the text is right.
        **options: as of every pipeline, and those of a call.
    Raises:
        ValueError: the model or the calibrator is none of these.
    """

    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """Generates a text from each text.

        Args:
            inputs (`str`, list, dataset or generator of `str`): the texts.
            truncation (`bool`, default `False`): whether texts that are longer than the model can read are cut.
            batch_size (`int`, default 1): how many texts the model reads at once.
            **options: for `generate`, such as `num_beams` or `num_return_sequences`; by default `max_new_tokens=256`.
        Returns:
            for each text a list of `dict`, in the order in which `generate` gives them: `generated_text` (`str`) and
            `score` (`float`, a probability).
        Raises:
            ValueError: an input is no text, or holds no token.
        """
        return self._run(inputs, options)

    def _check_parts(self, model: nn.Module, tokenizer: Any) -> None:
        reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
        if not (generates_text(model) and model.config.is_encoder_decoder and reads_text):
            raise ValueError(
                f"model: got {type(model).__name__}; allowed are models of {AutoModelForSeq2SeqLM.__name__}"
            )
        if tokenizer is None:
            raise ValueError("tokenizer: got None; allowed is the model's own")

    def _sanitize_parameters(
        self, *, truncation: bool | None = None, **generate_kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {} if truncation is None else {"truncation": truncation}, generate_kwargs, {}

    def preprocess(self, text: str, truncation: bool = False) -> dict[str, torch.Tensor]:
        """The tokens of one text."""
        if not isinstance(text, str):
            raise ValueError(f"inputs: got {text!r}; allowed are strings")
        limit = max_length(self.tokenizer, self.model) if truncation else None
        encoded = self.tokenizer(
            text, truncation=limit is not None, max_length=limit, return_attention_mask=True, return_tensors="pt"
        )
        if not encoded["input_ids"].numel():
            raise ValueError(f"inputs: got {text!r}, in which the tokenizer finds no token")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _forward(self, inputs: dict[str, torch.Tensor], **generate_kwargs: Any) -> dict[str, torch.Tensor]:
        options = self._prepare_generate_kwargs(generate_kwargs, return_dict_in_generate=False)
        if "stop_strings" in options:  # generate has to know what they are in tokens
            options = {"tokenizer": self.tokenizer, **options}
        sequences = self.model.generate(**inputs, **options)
        num_texts = len(inputs["input_ids"])
        repeated = {name: rows.repeat_interleave(len(sequences) // num_texts, 0) for name, rows in inputs.items()}
        logits = self.model(**repeated, decoder_input_ids=sequences[:, :-1], use_cache=False).logits
        tokens = sequences[:, 1:]
        surprise = torch.stack([_surprise(*row) for row in zip(logits, tokens, strict=True)])
        # float64 on the CPU: not every device has it
        surprise, kept = surprise.cpu().double(), _text_tokens(tokens.cpu(), self._get_set_generation_params(options))
        log_probs = -surprise.masked_fill(~kept, 0).sum(1)
        return {
            "sequences": sequences.reshape(num_texts, -1, sequences.shape[1]),
            "log_probs": log_probs.reshape(num_texts, -1),
        }

    def postprocess(self, outputs: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """The texts that one text has led to."""
        texts = self.tokenizer.batch_decode(outputs["sequences"][0], skip_special_tokens=True)
        scores = self._scores(outputs["log_probs"][0])
        return [{"generated_text": text, "score": score} for text, score in zip(texts, scores, strict=True)]


def _surprise(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`-log p` of each of `(T,)` tokens from `(T, V)` logits, exact too where p is so near 1 that 1 - p is lost."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = logits.gather(-1, tokens[:, None])
    others = logits.scatter(-1, tokens[:, None], -torch.inf).logsumexp(-1)
    return F.softplus(others - own[:, 0])


def _text_tokens(tokens: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """Which of the `(N, T)` tokens behind the decoder's first one are the text and its end, after these settings."""
    ends = settings.get("eos_token_id")
    is_end = torch.isin(tokens, torch.as_tensor([] if ends is None else ends, dtype=tokens.dtype, device="cpu"))
    is_text = (is_end.cumsum(1) - is_end.long()) == 0
    pad, stops = settings.get("pad_token_id"), settings.get("stop_strings") or settings.get("stopping_criteria")
    if stops and pad is not None:  # a text that something has stopped is padded without an end
        padding = (tokens == pad).flip(1).cumprod(1).flip(1).bool()
        is_text &= is_end | ~padding
    if (forced := settings.get("forced_bos_token_id")) is not None:
        is_text[:, 0] &= tokens[:, 0] != forced
    return is_text
