"""Answers to questions: the probability of a span among all that the model may choose from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering
from transformers.pipelines.base import ChunkPipeline

from ..functional.checks import check_choice, check_count
from ..predictions import max_length
from .scoring import ScoredPipeline


MAX_SEQ_LEN, DOC_STRIDE, MAX_ANSWER_LEN = 384, 128, 15  # in tokens, as in the pipeline that was removed
WINDOW_OPTIONS = ("max_seq_len", "doc_stride")
ANSWER_OPTIONS = ("top_k", "max_answer_len", "handle_impossible_answer")


class CalibratedQuestionAnsweringPipeline(ScoredPipeline, ChunkPipeline):
    """Extractive question answering: `pipeline("calibrated-question-answering", model=model, tokenizer=tokenizer)`.

    The score of an answer is its share among all that could be one: a softmax over the candidates of all windows
    together. A candidate is a span of the context's characters, made of at most `max_answer_len` tokens that lie in
    one window; its logit is that of its first token as start plus that of its last one as end. Windows overlap: of a
    span that several of them hold, the highest logit counts, once. So the scores of all candidates sum to one.

    With `handle_impossible_answer`, "no answer" is a candidate too. Its logit in a window is that of the first
    classification token as start and end (of the window's first token, where the tokenizer has no classification
    token), and of several windows the smallest counts, as in the scripts of SQuAD 2.0: a question has no answer if no
    window holds one.

    A long context is split by the tokenizer. The question comes first, or last where the tokenizer pads on the left:
    so are models trained on SQuAD by transformers' scripts.

    Args:
        model ([`~transformers.PreTrainedModel`]): of `AutoModelForQuestionAnswering`.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): its own, a fast one.
        calibrator ([`Calibrator`], folder or Hub repo id, *optional*): fitted with `task="binary"` on `log_odds` of
            scores and on whether their answers were right. It maps each score by itself to the probability that the
            answer is right: these need not sum to one, and the order of the answers stays the model's.
        **options: as of every pipeline, and those of a call.
    Raises:
        ValueError: the model, the tokenizer, the calibrator or an option is none of these.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, **options: Any):
        super().__init__(model, tokenizer, **options)
        self._limit = max_length(tokenizer, model)

    def __call__(
        self, inputs: Any = None, *, question: str | None = None, context: str | None = None, **options: Any
    ) -> Any:
        """Answers questions from their contexts.

        Args:
            inputs (`dict`, list, dataset or generator of `dict`): each with a `"question"` and a `"context"`.
            question, context (`str`): in the place of `inputs`.
            top_k (`int`, default 1): how many answers.
            max_answer_len (`int`, default 15): the most tokens of an answer.
            handle_impossible_answer (`bool`, default `False`): whether "no answer" may be one.
            max_seq_len (`int`, *optional*): the most tokens of a window, question included; by default 384, or what
                the model can read where that is less.
            doc_stride (`int`, *optional*): by how many tokens windows overlap; by default 128, or half of the room
                beside the question where that is less.
            batch_size (`int`, default 1): how many windows the model reads at once.
        Returns:
            a `dict` of each question, or with `top_k` above 1 a list of them, best first: `score` (`float`, a
            probability), `start`, `end` (`int`, characters of the context) and `answer` (`str`). No answer is 0, 0 and
            `""`.
        Raises:
            ValueError: an option or an input is wrong, or a question leaves too little room for its context.
        """
        if question is not None or context is not None:
            if inputs is not None:
                raise ValueError("inputs: got them and a question or a context; allowed is one of the two")
            inputs = {"question": question, "context": context}
        return self._run(inputs, options)

    def _check_parts(self, model: nn.Module, tokenizer: Any) -> None:
        if not any("ForQuestionAnswering" in kind.__name__ for kind in type(model).__mro__):
            raise ValueError(
                f"model: got {type(model).__name__}; allowed are models of {AutoModelForQuestionAnswering.__name__}"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer: got {type(tokenizer).__name__}; allowed are fast tokenizers, which know where in the "
                "context a token is"
            )

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name in options:
            check_choice("options", name, (*WINDOW_OPTIONS, *ANSWER_OPTIONS))
        given = {name: value for name, value in options.items() if value is not None}
        for name in given.keys() & {"top_k", "max_answer_len", "max_seq_len"}:
            check_count(name, given[name])
        before, after = (
            {name: given[name] for name in kind if name in given} for kind in (WINDOW_OPTIONS, ANSWER_OPTIONS)
        )
        return before, {}, after

    def preprocess(
        self, example: Mapping[str, str], max_seq_len: int | None = None, doc_stride: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """The windows of one context, in order."""
        question, context = _check_example(example)
        size, stride = self._window(question, max_seq_len, doc_stride)
        question_first = self.tokenizer.padding_side == "right"
        encoded = self.tokenizer(
            *((question, context) if question_first else (context, question)),
            truncation="only_second" if question_first else "only_first",
            max_length=size,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        offsets = [
            _context_offsets(context, positions, encoded.sequence_ids(row), int(question_first))
            for row, positions in enumerate(encoded["offset_mapping"])
        ]
        if not any(start < end for positions in offsets for start, end in positions):
            raise ValueError(f"context: got {context!r}, in which the tokenizer finds no token")
        for row, positions in enumerate(offsets):
            ids = encoded["input_ids"][row]
            null = ids.index(self.tokenizer.cls_token_id) if self.tokenizer.cls_token_id in ids else 0
            inputs = {name: encoded[name][row] for name in self.tokenizer.model_input_names if name in encoded}
            yield {
                **{name: torch.tensor([values]) for name, values in inputs.items()},
                # padded with the others where windows are batched: by nothing of the context, and by no null token
                "offsets": torch.tensor([positions]),
                "is_null": torch.arange(len(ids))[None] == null,
                "context": context,
                "is_last": row == len(offsets) - 1,
            }

    def _window(self, question: str, max_seq_len: int | None, doc_stride: int | None) -> tuple[int, int]:
        """Length and overlap of the windows, of which the tokenizer says nothing clear where they are too small."""
        size = min(MAX_SEQ_LEN, self._limit or MAX_SEQ_LEN) if max_seq_len is None else max_seq_len
        if self._limit is not None and size > self._limit:
            raise ValueError(f"max_seq_len: got {size}; allowed are integers up to {self._limit}, the model's most")
        if doc_stride is not None and (type(doc_stride) is not int or not 0 <= doc_stride < size):
            raise ValueError(
                f"doc_stride: got {doc_stride!r}; allowed are integers from 0 to below max_seq_len={size}"
            )
        length = len(self.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
        room = size - length - self.tokenizer.num_special_tokens_to_add(pair=True)
        stride = max(0, min(DOC_STRIDE, room // 2)) if doc_stride is None else doc_stride
        if stride >= room:
            raise ValueError(
                f"question: got {length} tokens, which leave {max(0, room)} of max_seq_len={size} to the context; "
                f"allowed is what leaves more than doc_stride={stride}"
            )
        return size, stride

    def _forward(self, window: dict[str, Any]) -> dict[str, Any]:
        kept = {name: window.pop(name) for name in ("offsets", "is_null", "context", "is_last")}
        outputs = self.model(**window)
        logits = {name: getattr(outputs, name, None) for name in ("start_logits", "end_logits")}
        if any(scores is None for scores in logits.values()):
            raise ValueError(
                f"model: the outputs of {type(self.model).__name__} have no start_logits and end_logits; allowed are "
                "models that score every token"
            )
        return logits | kept

    def postprocess(
        self,
        windows: list[dict[str, Any]],
        top_k: int = 1,
        max_answer_len: int = MAX_ANSWER_LEN,
        handle_impossible_answer: bool = False,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The answers of one context from the logits of all its windows."""
        context = windows[0]["context"]
        spans = [_span_logits(window, max_answer_len, len(context) + 1) for window in windows]
        places, logits = (torch.cat(parts) for parts in zip(*spans, strict=True))
        places, span = places.unique(return_inverse=True)
        logits = logits.new_full(places.shape, -torch.inf).scatter_reduce(0, span, logits, "amax")
        if handle_impossible_answer:
            nulls = [(w["start_logits"].double() + w["end_logits"].double())[w["is_null"]] for w in windows]
            places, logits = F.pad(places, (1, 0)), torch.cat([torch.cat(nulls).min()[None], logits])
        best = (logits - logits.logsumexp(0)).topk(min(top_k, len(logits)))
        best_places = [divmod(place, len(context) + 1) for place in places[best.indices].tolist()]
        answers = [
            {"score": score, "start": start, "end": end, "answer": context[start:end]}
            for score, (start, end) in zip(self._scores(best.values), best_places, strict=True)
        ]
        return answers[0] if top_k == 1 else answers


def _check_example(example: Any) -> list[str]:
    """Question and context."""
    if not isinstance(example, Mapping):
        raise ValueError(f"inputs: got {type(example).__name__}; allowed are dicts with a question and a context")
    texts = [example.get(name) for name in ("question", "context")]
    for name, text in zip(("question", "context"), texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: got {text!r}; allowed are strings that are not empty")
    return texts


def _context_offsets(
    context: str, offsets: Sequence[tuple[int, int]], sequences: Sequence[int | None], sequence: int
) -> list[tuple[int, int]]:
    """Where in the context each token is: `(0, 0)` where it is not. Some tokenizers count a space to the next word."""
    found = []
    for (start, end), of in zip(offsets, sequences, strict=True):
        text = context[start:end] if of == sequence else ""
        left, right = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
        found.append((left, right) if left < right else (0, 0))
    return found


def _span_logits(window: dict[str, Any], max_answer_len: int, base: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every candidate of a window, `(M,)` each: its place in the context, `start * base + end`, and its logit."""
    starts, ends = (window[name][0].double() for name in ("start_logits", "end_logits"))
    first, last = window["offsets"][0].unbind(-1)
    inside = first < last
    length = min(max_answer_len, len(starts))
    # of a span that starts at token s and has 1 + k tokens, [s, k] is the last one: views, nothing is copied
    ends, last, is_end = (F.pad(x, (0, length - 1)).unfold(0, length, 1) for x in (ends, last, inside))
    kept = inside[:, None] & is_end
    return (first[:, None] * base + last)[kept], (starts[:, None] + ends)[kept]
