"""Answers and generated texts with a probability that can be calibrated: pipelines that transformers 5 has removed.

Importing this module registers two tasks, `"calibrated-question-answering"` and `"calibrated-text2text-generation"`
(translation, summarisation). The score of an answer or a text is one probability, from the logits that the model
gives: those of a model with a calibrator attached or folded are calibrated.

    import hf_calib.pipelines
    from transformers import pipeline

    reader = pipeline("calibrated-question-answering", model=model, tokenizer=tokenizer)

Where the model is a folder or a Hub id, transformers loads it: a folded calibrator acts, an attached one is not seen.
For that, pass `model=hf_calib.load_calibrated(folder)` and the tokenizer.

Even where every token's probability is right, that of an answer need not be: what is likely in this text is not
always what is true. Labelled examples correct that, in a second step that sees the whole score:

    answers = reader(questions)  # dicts with a question and a context
    right = torch.tensor([answer["answer"] == truth for answer, truth in zip(answers, truths)]).long()
    scores = log_odds([answer["score"] for answer in answers])
    IsotonicCalibration(task="binary").fit(scores, right).save_pretrained("answers")  # few examples: PlattScaling

    reader = pipeline("calibrated-question-answering", model=model, tokenizer=tokenizer, calibrator="answers")

Fit it on what it will map: the best answers, by the same model and its calibrator, with the same options. Save it into
a folder of its own: beside a model, `calibrator.json` is the model's. A saved pipeline does not hold it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM, GenerationConfig, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from .attaching import generates_text, in_eval_mode
from .calibrators import Calibrator
from .evaluate_modules.scores import as_calibrator
from .functional.checks import check_choice, check_count
from .predictions import max_length


MAX_SEQ_LEN, DOC_STRIDE, MAX_ANSWER_LEN = 384, 128, 15  # in tokens, as in the pipeline that was removed
WINDOW_OPTIONS = ("max_seq_len", "doc_stride")
ANSWER_OPTIONS = ("top_k", "max_answer_len", "handle_impossible_answer")
LOG_PROBS = (math.log(torch.finfo(torch.float64).tiny), -(2.0**-53))  # of scores that float64 knows from 0 and 1


def log_odds(scores: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """What a calibrator of answers is fitted on: `log p - log(1 - p)` of the scores that a pipeline gives.

    Args:
        scores (`torch.Tensor` of any shape, or floats, in `[0, 1]`): of a pipeline without `calibrator`.
    Returns:
        `torch.Tensor` of that shape, float64: finite, also of scores that are rounded to 0 or 1.
    Raises:
        ValueError: a score is not within `[0, 1]`.
    Example:
        >>> log_odds([0.5, 0.9, 1.0])
        tensor([ 0.0000,  2.1972, 36.7368], dtype=torch.float64)
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    wrong = scores[((scores >= 0) & (scores <= 1)).logical_not()]
    if len(wrong):
        raise ValueError(f"scores: got {float(wrong[0])}; allowed are probabilities from 0 to 1")
    return _log_odds(scores.log())


def _log_odds(log_probs: torch.Tensor) -> torch.Tensor:
    log_probs = log_probs.clamp(*LOG_PROBS)
    return log_probs - torch.log(-torch.expm1(log_probs))


class _ScoredPipeline(Pipeline):
    """What both pipelines share: the model in evaluation mode, and the calibrator of whole scores."""

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        calibrator: Calibrator | str | Path | None = None,
        **options: Any,
    ):
        self._check_parts(model, tokenizer)
        self.calibrator = None if calibrator is None else _score_calibrator(calibrator)
        super().__init__(model, tokenizer, **options)

    def forward(self, model_inputs: dict[str, Any], **forward_params: Any) -> dict[str, Any]:
        """The same model gives the same scores, whoever trained it a moment ago."""
        with in_eval_mode(self.model):
            return super().forward(model_inputs, **forward_params)

    def _run(self, inputs: Any, options: dict[str, Any]) -> Any:
        """`Pipeline.__call__`, which takes a tuple for one input and fails on an empty list."""
        inputs = list(inputs) if isinstance(inputs, tuple) else inputs
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **options)

    def _scores(self, log_probs: torch.Tensor) -> list[float]:
        """Probabilities of `(K,)` float64 log-probabilities, after the calibrator."""
        if self.calibrator is not None:
            log_probs = self.calibrator.log_probs(_log_odds(log_probs))
        return log_probs.exp().tolist()

    def _check_parts(self, model: nn.Module, tokenizer: Any) -> None:
        raise NotImplementedError


class CalibratedQuestionAnsweringPipeline(_ScoredPipeline, ChunkPipeline):
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


class CalibratedText2TextGenerationPipeline(_ScoredPipeline):
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


def _score_calibrator(calibrator: Calibrator | str | Path) -> Calibrator:
    """A copy on the CPU, where scores are; a ValueError unless it is fitted for the log-odds of one event."""
    calibrator = as_calibrator(calibrator)
    if calibrator.num_labels is None:
        raise ValueError(f"calibrator: got a {type(calibrator).__name__} that is not fitted; call fit first")
    if calibrator.task != "binary":
        raise ValueError(f'calibrator: got task={calibrator.task!r}; allowed is task="binary", of right and wrong')
    if calibrator.needs_groups:
        raise ValueError(f"calibrator: {calibrator.name} needs the groups of rows, which a pipeline is not told of")
    return copy.deepcopy(calibrator).cpu()


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


def _register() -> None:
    for task, kind, auto_class in (
        ("calibrated-question-answering", CalibratedQuestionAnsweringPipeline, AutoModelForQuestionAnswering),
        ("calibrated-text2text-generation", CalibratedText2TextGenerationPipeline, AutoModelForSeq2SeqLM),
    ):
        PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=kind, pt_model=auto_class, type="text")
        # A pipeline's save_pretrained would take it for code of one's own: copy it into the folder, which would then
        # not load without trust_remote_code.
        del kind._registered_impl


_register()
