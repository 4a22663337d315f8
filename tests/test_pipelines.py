"""Answers and generated texts: their scores are the probabilities that plain Python counts out of the logits."""

import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetForQuestionAnswering,
    pipeline,
)

from hf_calib import (
    CalibTransformerConfig,
    CalibTransformerForConditionalGeneration,
    CalibTransformerForQuestionAnswering,
    IsotonicCalibration,
    TemperatureScaling,
    attach_calibrator,
    fold_calibrator,
)
from hf_calib.calibrators import GroupTemperature, PlattScaling
from hf_calib.pipelines import CalibratedQuestionAnsweringPipeline, log_odds
from hf_calib.pipelines.generating import _surprise, _text_tokens

from .conftest import WORDS
from .test_attaching import fitted_temperature
from .tiny import SPECIAL, make_reader, make_tokenizer, make_writer


VOCAB_SIZE = len(SPECIAL) + len(WORDS)
QUESTION = "w1 w2"
SHORT, LONG = (" ".join(WORDS[(7 * i + i // 40) % 40] for i in range(length)) for length in (9, 60))
ALL = {"top_k": 10**6, "handle_impossible_answer": True}
TEXTS = ["w1 w2", "w3", "w4 w5 w6 w7 w8 w9", "w3 w3 w3"]


@pytest.fixture
def reader():
    return make_reader(VOCAB_SIZE)


def writer_of(kind):
    """A tiny encoder-decoder. T5 begins with padding, the others with a token of their own."""
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "eos_token_id": 3}
    if kind == "bart":
        return make_writer(VOCAB_SIZE)
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "initializer_factor": 0.5}
        config = T5Config(decoder_start_token_id=0, tie_word_embeddings=False, **sizes, **tokens)
        return T5ForConditionalGeneration(config).eval()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
    return CalibTransformerForConditionalGeneration(CalibTransformerConfig(bos_token_id=2, **sizes, **tokens)).eval()


@pytest.fixture
def writer():
    return make_writer(VOCAB_SIZE)


def answers_of(model, tokenizer, **options):
    return pipeline("calibrated-question-answering", model=model, tokenizer=tokenizer, **options)


def texts_of(model, tokenizer, **options):
    return pipeline("calibrated-text2text-generation", model=model, tokenizer=tokenizer, **options)


def with_template(words, single, pair):
    """The tests' tokenizer with its special tokens in other places."""
    tokenizer = make_tokenizer(words)
    known = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=known
    )
    return tokenizer


def make_byte_tokenizer():
    """A token for each byte, and one for " a"."""
    vocabulary = {letter: 4 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"[PAD]": 0, "[CLS]": 2, "[SEP]": 3, "Ġa": 1}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="$A", pair="[CLS] $A [SEP] $B:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", pad_token="[PAD]")


# -- question answering, beside a loop over all windows and spans

# How the tokens of a question and of a piece of context make an input, where the context begins, which token is null
LAYOUTS = {
    "bert": lambda q, c: ([2, *q, 3, *c, 3], 2 + len(q), 0),
    "last": lambda q, c: ([*q, 3, *c, 3, 2], 1 + len(q), 2 + len(q) + len(c)),
    "none": lambda q, c: ([*q, 3, *c], 1 + len(q), 0),
    "context first": lambda q, c: ([2, *c, 3, *q, 3], 1, 0),
}
TEMPLATES = {
    "last": ("$A [SEP] [CLS]", "$A [SEP] $B:1 [SEP]:1 [CLS]:1"),
    "none": ("$A", "$A [SEP] $B:1"),
}


def tokens_of(text):
    """Ids and the characters that each of the words takes."""
    ends = [len(" ".join(text.split()[: i + 1])) for i in range(len(text.split()))]
    return [
        (len(SPECIAL) + WORDS.index(word), end - len(word), end) for word, end in zip(text.split(), ends, strict=True)
    ]


def count_out(model, question, context, *, layout="bert", size=24, stride=None, longest=15, null=False, heat=1.0):
    """Start and end of every candidate -> its probability, by loops alone."""
    questions, contexts = [token for token, _, _ in tokens_of(question)], tokens_of(context)
    room = size - len(LAYOUTS[layout](questions, [])[0])
    step = room - (room // 2 if stride is None else stride)
    logits, nulls, begin = {}, [], 0
    while True:
        piece = contexts[begin : begin + room]
        ids, first, null_at = LAYOUTS[layout](questions, [token for token, _, _ in piece])
        with torch.no_grad():
            outputs = model(input_ids=torch.tensor([ids]))
        starts, ends = ((x[0].double() / heat).tolist() for x in (outputs.start_logits, outputs.end_logits))
        for i in range(len(piece)):
            for j in range(i, min(i + longest, len(piece))):
                span = (piece[i][1], piece[j][2])
                logits[span] = max(logits.get(span, -math.inf), starts[first + i] + ends[first + j])
        nulls.append(starts[null_at] + ends[null_at])
        if begin + room >= len(contexts):
            break
        begin += step
    if null:
        logits[0, 0] = min(nulls)
    highest = max(logits.values())
    total = sum(math.exp(logit - highest) for logit in logits.values())
    return {span: math.exp(logit - highest) / total for span, logit in logits.items()}, len(nulls)


def check_answers(found, expected, context):
    scores = [answer["score"] for answer in found]
    assert scores == sorted(scores, reverse=True)
    assert len(found) == len(expected)  # none is there twice
    assert {(a["start"], a["end"]): a["score"] for a in found} == pytest.approx(expected, rel=1e-4)
    assert all(a["answer"] == context[a["start"] : a["end"]] for a in found)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("context", "num_windows", "options"),
    [
        (SHORT, 1, {}),
        (LONG, 6, {}),
        (LONG, 9, {"max_seq_len": 15, "doc_stride": 3, "max_answer_len": 4}),
        (LONG, 4, {"doc_stride": 0, "max_answer_len": 1}),
        (LONG, 42, {"doc_stride": 18, "max_answer_len": 40}),
    ],
)
def test_the_score_is_a_softmax_over_the_spans_of_all_windows(
    context, num_windows, options, batch_size, null, reader, tokenizer
):
    names = {"max_seq_len": "size", "doc_stride": "stride", "max_answer_len": "longest"}
    expected, counted = count_out(reader, QUESTION, context, null=null, **{names[k]: v for k, v in options.items()})
    assert counted == num_windows
    asked = {**options, "batch_size": batch_size, "handle_impossible_answer": null, "top_k": 10**6}
    found = answers_of(reader, tokenizer)(question=QUESTION, context=context, **asked)
    check_answers(found, expected, context)
    assert math.fsum(a["score"] for a in found) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("layout", ["last", "none"])
def test_no_answer_is_the_classification_token_or_the_first_one(layout, reader):
    tokenizer = with_template(WORDS, *TEMPLATES[layout])
    if layout == "none":
        tokenizer.cls_token = None
    expected, _ = count_out(reader, QUESTION, LONG, layout=layout, null=True)
    check_answers(answers_of(reader, tokenizer)(question=QUESTION, context=LONG, **ALL), expected, LONG)


def test_where_padding_is_on_the_left_the_context_comes_first():
    torch.manual_seed(0)
    config = CalibTransformerConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, num_attention_heads=2, initializer_range=0.5, pad_token_id=0
    )
    model, tokenizer = CalibTransformerForQuestionAnswering(config).eval(), make_tokenizer(WORDS)
    tokenizer.padding_side = "left"
    expected, _ = count_out(model, QUESTION, LONG, layout="context first", null=True)
    read = answers_of(model, tokenizer, max_seq_len=24)
    for batch_size in (1, 4):  # the last window is shorter and padded
        check_answers(read(question=QUESTION, context=LONG, batch_size=batch_size, **ALL), expected, LONG)


def test_windows_of_several_questions_share_batches(reader, tokenizer):
    asked = [{"question": QUESTION, "context": context} for context in (LONG, SHORT, LONG[:50], "w5")]
    read = answers_of(reader, tokenizer)
    for found, example in zip(read(asked, batch_size=3, **ALL), asked, strict=True):
        check_answers(found, count_out(reader, QUESTION, example["context"], null=True)[0], example["context"])


@pytest.mark.parametrize("apply", [attach_calibrator, fold_calibrator])
def test_a_calibrated_model_gives_the_probabilities_of_its_logits(apply, reader, tokenizer):
    expected, _ = count_out(reader, QUESTION, LONG, null=True, heat=2.5)
    calibrator = TemperatureScaling()
    calibrator.set_tensors({"temperature": torch.tensor(2.5)}, num_labels=2)
    calibrated = apply(copy.deepcopy(reader), calibrator)
    check_answers(answers_of(calibrated, tokenizer)(question=QUESTION, context=LONG, **ALL), expected, LONG)
    assert max(expected.values()) < 0.8 * max(count_out(reader, QUESTION, LONG, null=True)[0].values())


def test_a_candidate_is_a_span_of_characters_without_spaces_around(reader):
    """Two tokens for one letter, a space as a token, a space before a word: answers that read the same are one."""
    context = "é ab  c"
    tokenizer = make_byte_tokenizer()
    reader.resize_token_embeddings(300)
    encoded = tokenizer("q", context, return_offsets_mapping=True)
    assert encoded["offset_mapping"][3:] == [(0, 1), (0, 1), (1, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    with torch.no_grad():
        outputs = reader(input_ids=torch.tensor([encoded["input_ids"]]))
    places = {3: (0, 1), 4: (0, 1), 5: (2, 3), 6: (3, 4), 9: (6, 7)}  # 7 and 8 are spaces
    logits = {}
    for i, (start, _) in places.items():
        for j, (_, end) in places.items():
            if j >= i:
                logit = float(outputs.start_logits[0, i].double() + outputs.end_logits[0, j].double())
                logits[start, end] = max(logits.get((start, end), -math.inf), logit)
    total = sum(map(math.exp, logits.values()))
    found = answers_of(reader, tokenizer)(question="q", context=context, top_k=100)
    check_answers(found, {span: math.exp(logit) / total for span, logit in logits.items()}, context)


def test_one_answer_is_a_dict_and_several_are_a_list(reader, tokenizer):
    read = answers_of(reader, tokenizer)
    several = read(question=QUESTION, context=SHORT, top_k=3)
    assert read(question=QUESTION, context=SHORT) == several[0]
    assert len(several) == 3
    assert answers_of(reader, tokenizer, top_k=2)(question=QUESTION, context=SHORT) == several[:2]
    assert read(question=QUESTION, context="w5", top_k=3) == [{"score": 1.0, "start": 0, "end": 2, "answer": "w5"}]


def test_questions_come_in_every_form(reader, tokenizer):
    read = answers_of(reader, tokenizer)
    example = {"question": QUESTION, "context": SHORT, "id": 7}
    expected = read(question=QUESTION, context=SHORT)
    assert read(example) == expected
    assert read([example, example]) == read((example, example)) == [expected, expected]
    assert list(read(example for _ in range(2))) == [expected, expected]
    assert read([]) == []


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ({"context": SHORT}, {}, "question: got None; allowed are strings that are not empty"),
        ({"question": "w1"}, {}, "context: got None; allowed are strings that are not empty"),
        ({"question": " ", "context": SHORT}, {}, "question: got ' '; allowed"),
        ({"question": "w1", "context": ""}, {}, "context: got ''; allowed"),
        ({"question": "w1", "context": ["w2"]}, {}, r"context: got \['w2'\]; allowed"),
        ("w1", {}, "inputs: got str; allowed are dicts with a question and a context"),
        ({}, {"top_k": 0}, "top_k: got 0; allowed are integers from 1 up"),
        ({}, {"max_answer_len": 0}, "max_answer_len: got 0; allowed are integers from 1 up"),
        ({}, {"max_seq_len": 0}, "max_seq_len: got 0; allowed are integers from 1 up"),
        ({}, {"max_seq_len": 25}, "max_seq_len: got 25; allowed are integers up to 24, the model's most"),
        ({}, {"doc_stride": 24}, "doc_stride: got 24; allowed are integers from 0 to below max_seq_len=24"),
        ({}, {"max_seq_len": 9, "doc_stride": 9}, "doc_stride: got 9; allowed .* below max_seq_len=9"),
        ({}, {"doc_stride": -1}, "doc_stride: got -1; allowed"),
        ({}, {"doc_stride": 1.5}, "doc_stride: got 1.5; allowed"),
        ({}, {"stride": 1}, "options: got 'stride'; allowed are 'max_seq_len', 'doc_stride', 'top_k'"),
        (
            {"question": QUESTION, "context": SHORT},
            {"doc_stride": 19},
            "question: got 2 tokens, which leave 19 of max_seq_len=24 to the context; .* more than doc_stride=19",
        ),
        (
            {"question": LONG, "context": SHORT},
            {},
            "question: got 60 tokens, which leave 0 of max_seq_len=24 to the context; .* more than doc_stride=0",
        ),
    ],
)
def test_wrong_questions_and_options_are_refused(example, options, message, reader, tokenizer):
    with pytest.raises(ValueError, match=message) as caught:
        answers_of(reader, tokenizer)(example or {"question": QUESTION, "context": SHORT}, **options)
    assert "\n" not in str(caught.value)


def test_what_leaves_one_token_of_room_is_allowed(reader, tokenizer):
    found = answers_of(reader, tokenizer)(question=QUESTION, context=SHORT, max_seq_len=6, **ALL)
    check_answers(found, count_out(reader, QUESTION, SHORT, size=6, null=True)[0], SHORT)


def test_a_context_without_tokens_is_refused(reader, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("-")
    with pytest.raises(ValueError, match="context: got '--', in which the tokenizer finds no token"):
        answers_of(reader, tokenizer)(question="w1", context="--", handle_impossible_answer=True)


def test_two_kinds_of_input_at_once_are_refused(reader, tokenizer):
    with pytest.raises(ValueError, match="inputs: got them and a question or a context"):
        answers_of(reader, tokenizer)({"question": QUESTION, "context": SHORT}, question=QUESTION)


def test_models_and_tokenizers_that_cannot_answer_are_refused(classifier, reader, tokenizer):
    with pytest.raises(
        ValueError, match="model: got BertForSequenceClassification; allowed are models of AutoModelForQ"
    ):
        answers_of(classifier, tokenizer)
    with pytest.raises(ValueError, match="tokenizer: got NoneType; allowed are fast tokenizers"):
        CalibratedQuestionAnsweringPipeline(reader)
    config = XLNetConfig(vocab_size=VOCAB_SIZE, d_model=16, n_layer=1, n_head=2, d_inner=16)
    with pytest.raises(ValueError, match="model: the outputs of XLNetForQuestionAnswering have no start_logits and"):
        answers_of(XLNetForQuestionAnswering(config), tokenizer)(question=QUESTION, context=SHORT)


# -- generated texts, beside the model's own forward pass

OPTIONS = {  # untrained models repeat one token, unless a processor forbids it
    "greedy": {"no_repeat_ngram_size": 1},
    "beams": {"no_repeat_ngram_size": 1, "num_beams": 4, "num_return_sequences": 3},
    "sampled": {
        "do_sample": True,
        "num_return_sequences": 6,
        "temperature": 3.0,
        "repetition_penalty": 2.0,
        "top_k": 9,
    },
}
ENDS = list(range(3, 20))  # many end tokens, so that untrained models end their texts now and then


def log_probability(model, text, tokens, tokenizer, *, heat=1.0):
    """Of the decoder's tokens without the first one, given those before; one forward pass for each token."""
    inputs = tokenizer(text, return_tensors="pt")
    total = 0.0
    for i in range(1, len(tokens)):
        with torch.no_grad():
            outputs = model(**inputs, decoder_input_ids=torch.tensor([tokens[:i]]))
        total += float((outputs.logits[0, -1].double() / heat).log_softmax(-1)[tokens[i]])
    return total


def own_texts(model, text, tokenizer, **options):
    """What `generate` makes of it, by rows, without the padding at the end."""
    torch.manual_seed(1)
    rows = model.generate(**tokenizer(text, return_tensors="pt"), **options).tolist()
    cut = []
    for first, *row in rows:
        ends = [i for i, token in enumerate(row) if token in ENDS]
        cut.append([first, *row[: ends[0] + 1]] if ends else [first, *row])
    return cut, max(map(len, rows))


@pytest.mark.parametrize("kind", ["bart", "t5", "calib_transformer"])
@pytest.mark.parametrize("how", list(OPTIONS))
def test_the_score_is_the_probability_of_the_text_and_its_end(kind, how, tokenizer):
    model = writer_of(kind)
    options = {**OPTIONS[how], "max_new_tokens": 7, "eos_token_id": ENDS}
    write = texts_of(model, tokenizer)
    lengths = set()
    for text in TEXTS:
        rows, longest = own_texts(model, text, tokenizer, **options)
        torch.manual_seed(1)
        found = write(text, **options)
        assert [a["generated_text"] for a in found] == tokenizer.batch_decode(rows, skip_special_tokens=True)
        expected = [math.exp(log_probability(model, text, row, tokenizer)) for row in rows]
        assert [a["score"] for a in found] == pytest.approx(expected, rel=1e-4)
        lengths |= {len(row) - longest for row in rows}
    assert how == "greedy" or 0 in lengths, "every row is padded"
    assert how == "greedy" or len(lengths) > 1, "no row is padded"


@pytest.mark.parametrize("how", ["greedy", "beams"])
def test_texts_of_one_batch_have_the_scores_that_they_have_alone(how, writer, tokenizer):
    options = {**OPTIONS[how], "max_new_tokens": 7, "eos_token_id": ENDS}
    write = texts_of(writer, tokenizer, **options)
    alone = [write(text) for text in TEXTS]
    assert [len(texts) for texts in alone] == [options.get("num_return_sequences", 1)] * len(TEXTS)
    for batch_size in (1, 3):
        for found, expected in zip(write(TEXTS, batch_size=batch_size), alone, strict=True):
            assert [a["generated_text"] for a in found] == [a["generated_text"] for a in expected]
            assert [a["score"] for a in found] == pytest.approx([a["score"] for a in expected], rel=1e-4)
    assert list(write(text for text in TEXTS)) == alone
    assert write([]) == []


def test_an_attached_temperature_divides_the_logits_of_every_token(writer, tokenizer):
    options = {"max_new_tokens": 7, "eos_token_id": ENDS, "num_beams": 3}
    calibrator = fitted_temperature(VOCAB_SIZE)
    heat = calibrator.temperature.item()
    raw = copy.deepcopy(writer)
    attach_calibrator(writer, calibrator)
    (row,), _ = own_texts(writer, TEXTS[0], tokenizer, **options)
    (found,) = texts_of(writer, tokenizer)(TEXTS[0], **options)
    expected = math.exp(log_probability(raw, TEXTS[0], row, tokenizer, heat=heat))
    assert found["score"] == pytest.approx(expected, rel=1e-4)
    assert abs(math.log(expected) - log_probability(raw, TEXTS[0], row, tokenizer)) > 0.1


def test_a_language_that_is_forced_is_no_part_of_the_text(writer, tokenizer):
    options = {"max_new_tokens": 5, "forced_bos_token_id": 30}
    (row,), _ = own_texts(writer, "w1 w2", tokenizer, **options)
    assert row[1] == 30
    assert len(row) > 2
    whole, language = (log_probability(writer, "w1 w2", tokens, tokenizer) for tokens in (row, row[:2]))
    (found,) = texts_of(writer, tokenizer, **options)("w1 w2")
    assert found["score"] == pytest.approx(math.exp(whole - language), rel=1e-4)


STOPS = {"stop_strings": ["w5"]}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"eos_token_id": 3, "pad_token_id": 0}, "111100 111111 111111"),
        ({"eos_token_id": 3}, "111100 111111 111111"),
        ({"eos_token_id": [3, 6], "pad_token_id": 0}, "110000 111111 111111"),
        ({"eos_token_id": 3, "pad_token_id": 3}, "111100 111111 111111"),
        ({"eos_token_id": 3, "pad_token_id": 0, **STOPS}, "111100 111111 111100"),
        ({"eos_token_id": 4, "pad_token_id": 4, **STOPS}, "111111 111111 111111"),
        ({"pad_token_id": 0, "stopping_criteria": [len]}, "111100 111111 111100"),
        ({"eos_token_id": 3, **STOPS}, "111100 111111 111111"),
        ({"pad_token_id": 0, "forced_bos_token_id": 5}, "011111 111111 011111"),
        ({}, "111111 111111 111111"),
    ],
)
def test_a_text_ends_with_its_first_end_and_without_padding(settings, kept):
    # it ends; it is cut off, with a padding token in its middle; it is stopped without an end
    tokens = torch.tensor([[5, 6, 7, 3, 0, 0], [9, 0, 7, 8, 9, 4], [5, 7, 8, 9, 0, 0]])
    found = _text_tokens(tokens, settings)
    assert " ".join("".join(map(str, row)) for row in found.int().tolist()) == kept


def test_a_text_that_a_string_stops_is_what_it_is_until_then(writer):
    tokenizer = make_byte_tokenizer()
    writer.resize_token_embeddings(300)
    options = {"max_new_tokens": 9, "num_return_sequences": 6, "do_sample": True, "stop_strings": [" a"]}
    inputs, stop = tokenizer("abc", return_tensors="pt"), tokenizer.convert_tokens_to_ids("Ġa")
    writer.final_logits_bias[0, stop] = 6
    torch.manual_seed(1)
    padded = writer.generate(**inputs, **options, tokenizer=tokenizer).tolist()
    rows = [row[: row.index(stop) + 1] if stop in row else row for row in padded]
    assert {len(row) < len(whole) for row, whole in zip(rows, padded, strict=True)} == {False, True}
    torch.manual_seed(1)
    found = texts_of(writer, tokenizer)("abc", **options)
    expected = [math.exp(log_probability(writer, "abc", row, tokenizer)) for row in rows]
    assert [a["score"] for a in found] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_left_of_certainty_is_not_lost(dtype):
    logits = torch.tensor([[40.0, 0.0, 0.0], [0.0, 40.0, 0.0], [-torch.inf, 1.0, -torch.inf]], dtype=dtype)
    found = _surprise(logits, torch.tensor([0, 0, 1]))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.tolist() == pytest.approx([2 * math.exp(-40), 40, 0], rel=1e-5, abs=0)


def test_long_texts_are_cut_on_request(writer, tokenizer):
    write = texts_of(writer, tokenizer, max_new_tokens=3)
    long = " ".join(["w1"] * 50)
    assert write(long, truncation=True) == write(" ".join(["w1"] * 30))  # and two special tokens


def test_models_and_inputs_without_texts_are_refused(classifier, reader, writer, tokenizer):
    decoder = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    for model in (classifier, reader, decoder):
        message = f"model: got {type(model).__name__}; allowed are models of AutoModelForSeq2SeqLM"
        with pytest.raises(ValueError, match=message):
            texts_of(model, tokenizer)
    with pytest.raises(ValueError, match="inputs: got 5; allowed are strings"):
        texts_of(writer, tokenizer)([5])
    bare = with_template(WORDS, "$A", "$A $B")
    with pytest.raises(ValueError, match="inputs: got '', in which the tokenizer finds no token"):
        texts_of(writer, bare)("")


# -- both


@pytest.fixture
def of_scores():
    """A calibrator of scores that makes them smaller."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, generator=generator)
    right = torch.bernoulli((logits / 3 - 1).sigmoid(), generator=generator).long()
    return PlattScaling(task="binary").fit(logits, right)


def test_the_calibrator_of_answers_maps_the_log_odds_of_their_scores(of_scores, reader, tokenizer, tmp_path):
    plain = answers_of(reader, tokenizer)(question=QUESTION, context=LONG, **ALL)
    of_scores.save_pretrained(tmp_path)
    for calibrator in (of_scores, tmp_path, str(tmp_path)):
        found = answers_of(reader, tokenizer, calibrator=calibrator)(question=QUESTION, context=LONG, **ALL)
        assert [a["start"] for a in found] == [a["start"] for a in plain]
        p = torch.tensor([a["score"] for a in plain], dtype=torch.float64)
        expected = of_scores(torch.logit(p)).sigmoid()
        assert [a["score"] for a in found] == pytest.approx(expected.tolist(), rel=1e-9)
        assert (expected - p).abs().max() > 0.01


def test_the_order_is_the_model_s(reader, tokenizer):
    falling = IsotonicCalibration(task="binary").fit(torch.tensor([-1.0, 1.0]), torch.tensor([1, 0]))
    options = {"question": QUESTION, "context": LONG, "top_k": 5}
    plain = answers_of(reader, tokenizer)(**options)
    found = answers_of(reader, tokenizer, calibrator=falling)(**options)
    assert [a["answer"] for a in found] == [a["answer"] for a in plain]
    assert [a["score"] for a in found] == pytest.approx([0.5] * 5)


def test_the_calibrator_of_texts_maps_the_log_odds_of_their_scores(of_scores, writer, tokenizer):
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 4}
    plain = texts_of(writer, tokenizer)(TEXTS, **options)
    found = texts_of(writer, tokenizer, calibrator=of_scores)(TEXTS, **options)
    scores = [a["score"] for row in plain for a in row]
    expected = of_scores.log_probs(log_odds(scores)).exp().tolist()
    assert [a["score"] for row in found for a in row] == pytest.approx(expected, rel=1e-9)
    assert [a["generated_text"] for row in found for a in row] == [a["generated_text"] for row in plain for a in row]


def test_the_pipeline_has_a_calibrator_of_its_own(of_scores, reader, tokenizer):
    read = answers_of(reader, tokenizer, calibrator=of_scores)
    before = read(question=QUESTION, context=SHORT)
    of_scores.intercept += 3
    assert read(question=QUESTION, context=SHORT) == before


@pytest.mark.parametrize("kind", ["answers", "texts"])
def test_calibrators_of_anything_else_are_refused(kind, temperature, reader, writer, tokenizer):
    groups = GroupTemperature(by="group", task="binary")
    logits, labels = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0]), torch.tensor([1, 0, 1, 0, 0])
    groups.fit(logits, labels, groups=torch.tensor([0, 0, 1, 1, 0]))
    for calibrator, message in {
        temperature: 'calibrator: got task=None; allowed is task="binary", of right and wrong',
        PlattScaling(task="binary"): "calibrator: got a PlattScaling that is not fitted; call fit first",
        groups: "calibrator: group_temperature needs the groups of rows",
        5: "calibrator: got int; allowed are a Calibrator, a folder or a repo id",
    }.items():
        make, model = (answers_of, reader) if kind == "answers" else (texts_of, writer)
        with pytest.raises(ValueError, match=message):
            make(model, tokenizer, calibrator=calibrator)


def test_log_odds_are_finite_and_exact():
    p = torch.tensor([1e-300, 1e-17, 0.3, 0.5, 0.999999], dtype=torch.float64)
    assert log_odds(p).tolist() == pytest.approx([math.log(x) - math.log1p(-x) for x in p.tolist()], rel=1e-12)
    assert log_odds([[0.0, 1.0]]).shape == (1, 2)
    lowest, highest = log_odds([0.0, 1.0]).tolist()
    assert -709 < lowest < -708
    assert 36 < highest < 37
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"scores: got {wrong}; allowed are probabilities from 0 to 1"):
            log_odds([0.5, wrong])


def test_scores_of_certain_answers_are_calibrated_too(of_scores, reader, tokenizer):
    (only,) = answers_of(reader, tokenizer, calibrator=of_scores)(question=QUESTION, context="w5", top_k=2)
    assert only["score"] == pytest.approx(of_scores.log_probs(log_odds([1.0])).exp().item(), rel=1e-12)
    assert only["score"] < 1


def test_a_model_in_training_gives_the_same_scores_and_goes_on_training(reader, writer, tokenizer):
    for model, run in ((reader, answers_of), (writer, texts_of)):
        inputs = {"question": QUESTION, "context": SHORT} if model is reader else "w1 w2"
        options = {} if model is reader else {"max_new_tokens": 4}
        expected = run(model, tokenizer)(inputs, **options)
        assert run(model.train(), tokenizer)(inputs, **options) == expected
        assert model.training


def test_folders_load_and_pipelines_save_no_code(reader, writer, tokenizer, tmp_path):
    for task, model, inputs in (
        ("calibrated-question-answering", reader, {"question": QUESTION, "context": SHORT}),
        ("calibrated-text2text-generation", writer, "w1 w2"),
    ):
        run = pipeline(task, model=model, tokenizer=tokenizer)
        run.save_pretrained(tmp_path / task)
        assert not list((tmp_path / task).glob("*.py"))
        options = {} if model is reader else {"max_new_tokens": 4}
        loaded = pipeline(task, model=str(tmp_path / task))
        assert loaded(inputs, **options) == run(inputs, **options)
        assert AutoTokenizer.from_pretrained(tmp_path / task).get_vocab() == tokenizer.get_vocab()
