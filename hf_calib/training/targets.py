"""What a model's outputs and labels mean: rows of logits, and the label that each row is for.

Every task comes down to rows: a text, a token, a place where the next token is predicted, a start or an end of an
answer, one of several labels that a text may have. A loss, a count and a calibrator then need to know of rows alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..attaching import answers_questions, generates_text, predicts_tokens, without_adapters
from ..functional.checks import check_labels


IGNORED_LABEL = -100  # what Trainer counts, pads and gathers by; not a choice
OF_WHOLE = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
CLASSIFIERS = (*OF_WHOLE, "ForTokenClassification")
POSITIONS = ("start_positions", "end_positions")
# Decoders whose own loss takes a label for the logits at its own place: their labels come shifted (transformers 5.23)
LABELS_COME_SHIFTED = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "flaubert", "marian", "mbart", "mvp",
    "pegasus", "plbart", "prophetnet", "trocr", "whisper", "xlm", "xlnet",
)  # fmt: skip
PROBLEMS = (None, "single_label_classification", "multi_label_classification")


class TaskRows(NamedTuple):
    """Logits `(B, ..., C)`, and labels `(B, ...)` or shares `(B, ..., C)`; ignored ones are -100."""

    logits: torch.Tensor
    labels: torch.Tensor


def check_model(model: nn.Module) -> None:
    """Raises a ValueError unless the model has a head and a configuration whose rows are known."""
    model = without_adapters(model)
    if isinstance(model, PreTrainedModel) and (answers_questions(model) or predicts_tokens(model)):
        return
    if not isinstance(model, PreTrainedModel) or not has_head(model, CLASSIFIERS):
        raise ValueError(
            f"model: got {type(model).__name__}; allowed are transformers models that classify (a class named "
            f"...{' or ...'.join(CLASSIFIERS)}), generate text, fill masks or find answers"
        )
    problem = getattr(model.config, "problem_type", None)
    if problem not in PROBLEMS:
        raise ValueError(f"model.config.problem_type: got {problem!r}; allowed are {', '.join(map(repr, PROBLEMS))}")
    if model.config.num_labels < 2 and problem != "multi_label_classification":
        raise ValueError(
            f"model.config.num_labels: got {model.config.num_labels}, which means regression; allowed are 2 and more"
        )


def has_head(model: nn.Module, heads: Iterable[str]) -> bool:
    """Whether the model's class, or one that it is made from, is named for such a head."""
    return any(head in kind.__name__ for kind in type(model).__mro__ for head in heads)


def label_columns(model: nn.Module) -> tuple[str, ...]:
    """The columns of a batch that are labels."""
    return POSITIONS if answers_questions(without_adapters(model)) else ("labels",)


def has_several_labels(model: nn.Module) -> bool:
    """Whether a row of the batch has any number of the labels, each an event of its own."""
    return getattr(without_adapters(model).config, "problem_type", None) == "multi_label_classification"


def check_labels_are_there(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises a ValueError for a batch without labels."""
    columns = label_columns(model)
    if any(inputs.get(name) is None for name in columns):
        raise ValueError(f"inputs: got the columns {', '.join(inputs)}; allowed are batches with {', '.join(columns)}")


def check_class_numbers(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises a ValueError for labels that a stock head would misread, or that crash it."""
    labels, base = inputs["labels"], without_adapters(model)
    if labels.is_floating_point():  # stock heads guess that a row has several labels
        raise ValueError(
            f"labels: got {labels.dtype} of shape {tuple(labels.shape)}; allowed are class numbers. Shares take a "
            'calibration_loss, and several labels model.config.problem_type="multi_label_classification"'
        )
    dims, shape = (1, "(B,)") if has_head(base, OF_WHOLE) else (2, "(B, L)")
    if labels.dtype == torch.bool or labels.dim() != dims:
        raise ValueError(
            f"labels: got {labels.dtype} of shape {tuple(labels.shape)}; allowed are class numbers, integers {shape}"
        )
    kept = labels[labels != IGNORED_LABEL]
    if kept.numel() and not predicts_tokens(base):
        check_labels(kept, base.config.num_labels)


def has_row_loss(model: nn.Module) -> bool:
    """Whether the model's own loss is cross-entropy over rows that are not counted as in the stock head.

    A stock reader weighs starts and ends alike, however many of each lie in the text; a stock head of several labels
    takes -100 for a label.
    """
    return has_several_labels(model) or answers_questions(without_adapters(model))


def inputs_of_model(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without its labels; of these, an encoder-decoder needs what its decoder has to continue."""
    kept = {name: value for name, value in inputs.items() if name not in label_columns(model)}
    base = without_adapters(model)
    decodes = generates_text(base) and base.config.is_encoder_decoder
    if decodes and kept.keys().isdisjoint(("decoder_input_ids", "decoder_inputs_embeds")):
        kept["decoder_input_ids"] = _decoder_inputs(base, inputs["labels"])
    return kept


def _decoder_inputs(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """The labels one place later, after the token that starts a decoder."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    if start is None or pad is None:
        raise ValueError(
            f"model.config: got decoder_start_token_id={start} and pad_token_id={pad}; allowed are token numbers, or "
            "batches with decoder_input_ids"
        )
    return F.pad(labels[..., :-1], (1, 0), value=start).where(F.pad(labels[..., :-1], (1, 0)) != IGNORED_LABEL, pad)


def rows_of(model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> TaskRows:
    """The rows of a batch, from what the model made of its inputs without the labels."""
    if answers_questions(without_adapters(model)):
        named = isinstance(outputs, Mapping)
        start, end = (outputs["start_logits"], outputs["end_logits"]) if named else outputs[:2]
        return TaskRows(torch.stack([start, end], 1), _positions(inputs, start.shape[-1]).to(start.device))
    if isinstance(outputs, Mapping) and outputs.get("logits") is None:
        raise ValueError(f"model: got {type(without_adapters(model)).__name__}, which gives no logits")
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    labels = inputs["labels"].to(logits.device)
    if _predicts_next(model):
        logits = logits[:, -labels.shape[-1] :]  # without the virtual tokens of a tuned prompt
        return TaskRows(logits, F.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL))
    if has_several_labels(model):
        return TaskRows(torch.stack([torch.zeros_like(logits), logits], -1), _of_events(labels))
    return TaskRows(logits, labels)


def count_labels(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """How many rows of a batch have a label, `()` int64, without running the model."""
    if answers_questions(without_adapters(model)):
        texts = inputs["inputs_embeds"][..., 0] if inputs.get("input_ids") is None else inputs["input_ids"]
        return (_positions(inputs, texts.shape[-1]) != IGNORED_LABEL).sum()
    labels = inputs["labels"]
    if _predicts_next(model):
        labels = labels[..., 1:]
    kept = labels != IGNORED_LABEL
    are_shares = labels.is_floating_point() and not has_several_labels(model)
    return (kept.any(-1) if are_shares else kept).sum()


def _predicts_next(model: nn.Module) -> bool:
    """Whether the logits at a place are for the token after it, which its labels have one place further on."""
    model = without_adapters(model)
    in_place = model.config.is_encoder_decoder or model.config.model_type in LABELS_COME_SHIFTED
    return generates_text(model) and not in_place


def _positions(inputs: Mapping[str, Any], length: int) -> torch.Tensor:
    """`(B, 2)`: where answers start and end; an answer outside of the text is ignored."""
    positions = torch.stack([inputs[name].reshape(-1) for name in POSITIONS], 1)
    return positions.where((positions >= 0) & (positions < length), IGNORED_LABEL)


def _of_events(labels: torch.Tensor) -> torch.Tensor:
    """`(B, L)` of 0 and 1 as class numbers, and anything between as shares `(B, L, 2)` of its absence and presence."""
    if not labels.is_floating_point() or bool((labels == labels.round()).all()):
        return labels.long()
    return torch.stack([1 - labels, labels], -1).where((labels != IGNORED_LABEL)[..., None], IGNORED_LABEL)
