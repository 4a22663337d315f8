"""Events of structured outputs: by hand, by brute force, and untouched by padding, order and how a batch is cut."""

import itertools
import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_calib.functional import expected_calibration_error, sequence
from hf_calib.functional.calibration import binned_error
from hf_calib.functional.sequence import (
    entity_events,
    inference_events,
    sequence_events,
    span_events,
    token_events,
    weighted_bin_sums,
    weighted_calibration_error,
)

from .every import every_dtype


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-PER", "S-PER"]
EVENTS = {
    "token": token_events,
    "entity": partial(entity_events, label_names=TAGS),
    "entity-mean": partial(entity_events, label_names=TAGS, aggregate="mean"),
    "entity-min": partial(entity_events, label_names=TAGS, aggregate="min"),
    "sequence": sequence_events,
    "sequence-mean": partial(sequence_events, aggregate="mean"),
}
every_kind = pytest.mark.parametrize("events", EVENTS.values(), ids=EVENTS)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def batch(num_rows=6, num_tokens=9, num_labels=7, *, seed=0, ignored=0.2):
    """Probabilities `(B, T, C)` and labels drawn from them, in every third row the top ones, some of them -100."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, num_tokens, num_labels, generator=generator, dtype=torch.float64)
    labels = logits.flatten(0, 1).softmax(-1).multinomial(1, generator=generator).reshape(num_rows, num_tokens)
    labels[::3] = logits[::3].argmax(-1)
    left_out = torch.rand(labels.shape, generator=generator) < ignored
    return logits.softmax(-1), labels.masked_fill(left_out, -100)


def one_hot(tags, names=TAGS, *, confidence=1.0):
    """Probabilities of one sequence whose predicted tags are these, and the tags' numbers."""
    numbers = torch.tensor([names.index(tag) for tag in tags], dtype=torch.int64)
    rest = (1 - confidence) / (len(names) - 1)
    probs = torch.full((1, len(tags), len(names)), rest, dtype=torch.float64)
    return probs.scatter_(-1, numbers[None, :, None], confidence), numbers[None]


def padded(probs, labels, left, right):
    """The batch with tokens around it that hold nothing that could be read."""
    rubbish = partial(probs.new_full, fill_value=math.nan)
    rows, _, num_labels = probs.shape
    around = [rubbish((rows, size, num_labels)) for size in (left, right)]
    ignored = [labels.new_full((rows, size), -100) for size in (left, right)]
    return torch.cat([around[0], probs, around[1]], 1), torch.cat([ignored[0], labels, ignored[1]], 1)


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-12)


# what holds for every kind


@every_kind
@pytest.mark.parametrize(("left", "right"), [(0, 3), (4, 0), (2, 5)])
def test_padding_changes_nothing(events, left, right):
    assert_equal(events(*padded(*batch(), left, right)), events(*batch()))


@every_kind
def test_a_batch_is_its_sequences_one_after_the_other(events):
    """So neither the order of rows matters, nor how they are cut into batches."""
    probs, labels = batch()
    order = [4, 2, 0, 5, 1, 3]
    single = [events(probs[row : row + 1], labels[row : row + 1]) for row in order]
    assert_equal(events(probs[order], labels[order]), [torch.cat(column) for column in zip(*single, strict=True)])


@every_kind
@every_dtype
def test_events_are_what_a_metric_takes(events, dtype):
    probs, labels = batch()
    confidence, correct = events(probs.to(dtype), labels)
    narrow = events is token_events or dtype in (torch.float32, torch.float64)
    assert confidence.dtype == (dtype if narrow else torch.float32)
    assert correct.dtype == torch.int64
    assert 0 < correct.sum() < len(correct), "the problem is to have both"
    assert 0 <= expected_calibration_error(confidence, correct) <= 1


@every_kind
def test_no_token_is_no_event_and_no_metric(events):
    probs, labels = batch()
    for some_probs, some_labels in (
        (probs, labels.fill_(-100)),
        (probs[:0], labels[:0]),
        (probs[:, :0], labels[:, :0]),
    ):
        confidence, correct = events(some_probs, some_labels)
        assert confidence.shape == correct.shape == (0,)
        assert (confidence.dtype, correct.dtype) == (torch.float64, torch.int64)
        with pytest.raises(ValueError, match="labels: no row is left"):
            expected_calibration_error(confidence, correct)


@every_kind
def test_inputs_are_left_alone(events):
    probs, labels = batch()
    before = probs.clone(), labels.clone()
    confidence, _ = events(probs.requires_grad_(), labels)
    assert not confidence.requires_grad
    assert torch.equal(probs, before[0])
    assert torch.equal(labels, before[1])


@every_kind
def test_another_number_may_mark_what_is_left_out(events):
    probs, labels = batch()
    other = labels.masked_fill(labels == -100, 5)
    assert_equal(events(probs, other, ignore_index=5), events(probs, other.masked_fill(other == 5, -100)))


# tokens


@every_dtype
def test_the_error_of_token_events_is_that_of_the_rows(dtype):
    probs, labels = batch(50)
    probs = probs.to(dtype)
    found = expected_calibration_error(*token_events(probs, labels))
    assert torch.equal(found, expected_calibration_error(probs, labels))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_an_attention_mask_is_padding(kind, shift):
    """On either side: where nothing is padded the first token has nothing that predicts it, and so it has not here."""
    probs, labels = batch(ignored=0)
    expected = token_events(probs, labels, shift=shift)
    for left, right in ((0, 3), (3, 0), (2, 2)):
        mask = torch.tensor([0] * left + [1] * 9 + [0] * right).expand(6, -1).to(kind)
        wide_probs, wide_labels = padded(probs, labels, left, right)
        wide_labels = wide_labels.masked_fill(wide_labels == -100, 3)
        assert_equal(token_events(wide_probs, wide_labels, attention_mask=mask, shift=shift), expected)


def test_a_causal_model_predicts_the_token_after():
    probs, labels = batch()
    assert_equal(token_events(probs, labels, shift=True), token_events(probs[:, :-1], labels[:, 1:]))
    probs, labels = one_hot(["O", "B-PER", "I-PER"])
    _, correct = token_events(probs, labels.roll(1, 1), shift=True)
    assert correct.tolist() == [1, 1]


# entities


HAND_READ = [
    ("O O", []),
    ("B-PER", [("PER", 0, 0)]),
    ("B-PER I-PER O", [("PER", 0, 1)]),
    ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
    ("I-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
    ("O I-PER I-PER", [("PER", 1, 2)]),
    ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
    ("I-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
    ("B-PER O I-PER", [("PER", 0, 0), ("PER", 2, 2)]),
    ("B-PER I-PER E-PER", [("PER", 0, 2)]),
    ("B-PER E-PER I-PER", [("PER", 0, 1), ("PER", 2, 2)]),
    ("B-PER E-PER E-PER", [("PER", 0, 1), ("PER", 2, 2)]),
    ("E-PER I-PER", [("PER", 0, 0), ("PER", 1, 1)]),
    ("I-LOC E-PER", [("LOC", 0, 0), ("PER", 1, 1)]),
    ("B-PER S-PER I-PER", [("PER", 0, 0), ("PER", 1, 1), ("PER", 2, 2)]),
    ("S-PER S-PER", [("PER", 0, 0), ("PER", 1, 1)]),
    ("S-PER E-PER", [("PER", 0, 0), ("PER", 1, 1)]),
]


def read_spans(tags):
    """By a regular expression over one letter a tag: a start, then what may follow it, for each type by itself."""
    found = []
    for kind in ("PER", "LOC"):
        letters = "".join(tag[0] if tag.endswith(f"-{kind}") else "." for tag in tags)
        found += [(kind, match.start(), match.end() - 1) for match in re.finditer("S|[BI]I*E?|E", letters)]
    return sorted(found, key=lambda span: span[1])


@pytest.mark.parametrize(("tags", "spans"), HAND_READ)
def test_spans_read_by_hand(tags, spans):
    assert read_spans(tags.split()) == spans
    confidence, correct = entity_events(*one_hot(tags.split()), TAGS)
    assert confidence.tolist() == correct.tolist() == [1] * len(spans)


def test_every_pair_of_tags_is_read_as_the_regular_expression_reads_it():
    """All texts of three tags, so every transition, judged against one with a span of each kind."""
    for tags in itertools.product(TAGS, repeat=3):
        probs, _ = one_hot(tags)
        for gold in (tags, ("B-PER", "I-PER", "B-LOC"), ("O", "S-PER", "I-LOC")):
            _, correct = entity_events(probs, one_hot(gold)[1], TAGS)
            assert correct.tolist() == [int(span in read_spans(gold)) for span in read_spans(tags)]


@quick
@given(
    pairs=st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from([*TAGS, None])), min_size=1, max_size=12),
    aggregate=st.sampled_from(["product", "mean", "min"]),
    seed=st.integers(0, 100),
)
def test_entities_are_those_of_a_naive_program(pairs, aggregate, seed):
    probs, labels = one_hot([tag for tag, _ in pairs], confidence=0.9)
    # one confidence a token, the same order of tags
    shares = torch.rand(len(pairs), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probs = (probs + shares) / (probs + shares).sum(-1, keepdim=True)
    labels = torch.tensor([[-100 if gold is None else TAGS.index(gold) for _, gold in pairs]])
    kept = [index for index, (_, gold) in enumerate(pairs) if gold is not None]
    top = probs[0].amax(-1)[kept].tolist()
    predicted, gold = ([pairs[index][side] for index in kept] for side in (0, 1))
    combine = {"product": math.prod, "min": min, "mean": lambda values: sum(values) / len(values)}[aggregate]
    confidence, correct = entity_events(probs, labels, TAGS, aggregate=aggregate)
    spans = read_spans(predicted)
    assert confidence.tolist() == pytest.approx([combine(top[first : last + 1]) for _, first, last in spans])
    assert correct.tolist() == [int(span in read_spans(gold)) for span in spans]


def test_a_span_ends_with_its_sequence():
    probs, labels = one_hot(["B-PER", "I-PER", "I-PER", "I-PER"])
    confidence, correct = entity_events(probs.reshape(2, 2, -1), labels.reshape(2, 2), TAGS)
    assert len(confidence) == 2
    assert correct.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("B-PER I-PER O", 1),
        ("I-PER I-PER O", 1),  # another tag, the same span
        ("B-PER E-PER O", 1),
        ("B-PER O O", 0),  # too long
        ("B-PER I-PER I-PER", 0),  # too short
        ("B-LOC I-LOC O", 0),  # another type
        ("O B-PER O", 0),
        ("O O O", 0),
    ],
)
def test_a_right_entity_has_the_type_and_both_ends(gold, expected):
    probs, _ = one_hot(["B-PER", "I-PER", "O"])
    _, correct = entity_events(probs, one_hot(gold.split())[1], TAGS)
    assert correct.tolist() == [expected]


def test_missed_entities_are_no_events():
    probs, _ = one_hot(["O", "O"])
    confidence, _ = entity_events(probs, one_hot(["B-PER", "B-LOC"])[1], TAGS)
    assert len(confidence) == 0


def test_parts_of_words_that_are_not_labelled_do_not_cut_a_span():
    probs, _ = one_hot(["B-PER", "O", "I-PER"])
    _, correct = entity_events(probs, torch.tensor([[1, -100, 2]]), TAGS)
    assert correct.tolist() == [1]


def test_aggregates_by_hand():
    probs = torch.tensor([[[0.25, 0.75, 0.0], [0.0, 0.5, 0.5], [0.0, 0.25, 0.75]]])
    names = ["O", "I-A", "I-B"]
    for aggregate, of_a in (("product", 0.375), ("mean", 0.625), ("min", 0.5)):
        confidence, correct = entity_events(probs, torch.tensor([[1, 1, 2]]), names, aggregate=aggregate)
        assert confidence.tolist() == [of_a, 0.75]
        assert correct.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_half_precision_are_wide(dtype):
    """0.9 to the 200th is 7e-10, which neither float16 nor eight bits of bfloat16 can tell."""
    tags = ["B-PER"] + ["I-PER"] * 199
    probs, labels = one_hot(tags, confidence=0.9)
    probs = probs.to(dtype)
    exact = probs[0, 0, 1].double() ** 200
    for confidence, _ in (entity_events(probs, labels, TAGS), sequence_events(probs, labels)):
        torch.testing.assert_close(confidence.double(), exact[None], rtol=1e-6, atol=0)
    confidence, _ = sequence_events(probs, labels, aggregate="mean")
    torch.testing.assert_close(confidence.double(), probs[0, 0, 1:2].double(), rtol=1e-6, atol=0)


# spans


def positions(num_rows=40, num_positions=7, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    start, end = (2 * torch.randn(2, num_rows, num_positions, generator=generator, dtype=dtype)).softmax(-1)
    return start, end, *torch.randint(num_positions, (2, num_rows), generator=generator)


def best_span(start, end, max_length):
    """All spans one by one: the first of the best, and its share of them."""
    spans = {
        (first, last): start[first] * end[last]
        for first in range(len(start))
        for last in range(first, len(end))
        if max_length is None or last - first < max_length
    }
    best = max(spans, key=spans.get)
    return best, spans[best] / sum(spans.values())


@quick
@given(num_positions=st.integers(1, 9), max_length=st.sampled_from([None, 1, 2, 4, 100]), seed=st.integers(0, 1000))
def test_spans_are_those_of_a_naive_program(num_positions, max_length, seed):
    start, end, starts, ends = positions(12, num_positions, seed=seed)
    best = [best_span(*rows, max_length) for rows in zip(start.tolist(), end.tolist(), strict=True)]
    # half of the true answers are the predicted ones, so that right and wrong both occur
    for row in range(0, 12, 2):
        starts[row], ends[row] = best[row][0]
    confidence, correct = span_events(start, end, starts, ends, max_length=max_length)
    assert confidence.tolist() == pytest.approx([share for _, share in best], rel=1e-12)
    truth = torch.stack([starts, ends], 1).tolist()
    assert correct.tolist() == [int(list(span) == row) for (span, _), row in zip(best, truth, strict=True)]


def test_spans_by_hand():
    start = torch.tensor([[0.5, 0.25, 0.25]] * 2)
    end = torch.tensor([[0.125, 0.125, 0.75]] * 2)
    truth = torch.tensor([0, 0]), torch.tensor([2, 0])
    # the products of starts and ends in sixteenths of a half: 1 1 6, then . 0.5 3, then . . 3
    confidence, correct = span_events(start, end, *truth)
    assert confidence.tolist() == pytest.approx([6 / 14.5] * 2)
    assert correct.tolist() == [1, 0]
    confidence, correct = span_events(start, end, *truth, max_length=1)
    assert confidence.tolist() == pytest.approx([3 / 4.5] * 2)
    assert correct.tolist() == [0, 0]


def test_no_answer_is_the_span_from_0_to_0():
    start = end = torch.tensor([[0.75, 0.25, 0.0]])
    for max_length in (None, 1):
        confidence, correct = span_events(start, end, torch.tensor([0]), torch.tensor([0]), max_length=max_length)
        assert correct.tolist() == [1]
    assert confidence.tolist() == pytest.approx([9 / 10])


def test_the_first_of_equal_spans_is_the_answer():
    even = torch.full((4, 3), 1 / 3)
    confidence, correct = span_events(even, even, torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 2]))
    assert correct.tolist() == [1, 0, 0, 0]
    assert confidence.tolist() == pytest.approx([1 / 6] * 4)


def test_an_answer_that_ends_before_it_starts_has_no_probability():
    start, end = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    confidence, _ = span_events(start, end, torch.tensor([1]), torch.tensor([0]))
    assert confidence.tolist() == [0]


def test_positions_of_no_probability_change_no_answer():
    start, end, starts, ends = positions()
    wide = [torch.nn.functional.pad(rows, (2, 3)) for rows in (start, end)]
    for max_length in (None, 3):
        found = span_events(*wide, starts + 2, ends + 2, max_length=max_length)
        assert_equal(found, span_events(start, end, starts, ends, max_length=max_length))


def test_answers_left_out_are_no_events():
    start, end, starts, ends = positions()
    expected = span_events(start[2:], end[2:], starts[2:], ends[2:])
    start[:2] = math.nan
    starts[0] = ends[1] = -100
    assert_equal(span_events(start, end, starts, ends), expected)
    confidence, correct = span_events(start, end, starts.fill_(-100), ends)
    assert (len(confidence), confidence.dtype, correct.dtype) == (0, torch.float64, torch.int64)


@every_dtype
def test_spans_of_any_precision(dtype):
    start, end, starts, ends = positions(dtype=torch.float64)
    start, end = start.to(dtype), end.to(dtype)
    confidence, _ = span_events(start, end, starts, ends)
    assert confidence.dtype == torch.promote_types(dtype, torch.float32)
    shares = [best_span(*rows, None)[1] for rows in zip(start.tolist(), end.tolist(), strict=True)]
    assert confidence.tolist() == pytest.approx(shares, rel=1e-6)


# whole sequences


def test_sequences_by_hand():
    probs = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.0, 1.0, 0.0]]] * 3)
    labels = torch.tensor([[0, 2, -100], [0, 1, 1], [-100, -100, -100]])
    confidence, correct = sequence_events(probs, labels)
    assert confidence.tolist() == [0.375, 0.375]
    assert correct.tolist() == [1, 0]
    confidence, _ = sequence_events(probs, labels, aggregate="mean")
    assert confidence.tolist() == pytest.approx([0.375**0.5, 0.375 ** (1 / 3)])


@quick
@given(num_rows=st.integers(1, 5), num_tokens=st.integers(1, 6), seed=st.integers(0, 1000))
def test_sequences_are_those_of_a_naive_program(num_rows, num_tokens, seed):
    probs, labels = batch(num_rows, num_tokens, 3, seed=seed, ignored=0.5)
    rows = [
        [(max(p), p.index(max(p)) == label) for p, label in zip(*row, strict=True) if label != -100]
        for row in zip(probs.tolist(), labels.tolist(), strict=True)
    ]
    rows = [row for row in rows if row]
    confidence, correct = sequence_events(probs, labels)
    assert confidence.tolist() == pytest.approx([math.prod(p for p, _ in row) for row in rows])
    assert correct.tolist() == [int(all(right for _, right in row)) for row in rows]
    confidence, _ = sequence_events(probs, labels, aggregate="mean")
    assert confidence.tolist() == pytest.approx([math.prod(p for p, _ in row) ** (1 / len(row)) for row in rows])


# the weighted error


def weighted_error_by_loops(probs, labels, num_bins):
    gaps, num_tokens = [0.0] * num_bins, 0
    for row, label in zip(probs.flatten(0, -2).tolist(), labels.flatten().tolist(), strict=True):
        if label != -100:
            num_tokens += 1
            for index, p in enumerate(row):
                cell = next(k for k in range(num_bins) if p <= (k + 1) / num_bins or k == num_bins - 1)
                gaps[cell] += p * ((index == label) - p)
    return sum(map(abs, gaps)) / num_tokens


@pytest.mark.parametrize("num_bins", [1, 2, 7, 15, 200])
@pytest.mark.parametrize("block_elements", [1, 40, 2**22])
def test_the_weighted_error_is_that_of_a_naive_program(monkeypatch, num_bins, block_elements):
    monkeypatch.setattr(sequence, "BLOCK_ELEMENTS", block_elements)
    probs, labels = batch(20)
    found = weighted_calibration_error(probs, labels, num_bins=num_bins)
    assert found.item() == pytest.approx(weighted_error_by_loops(probs, labels, num_bins), abs=1e-12)


def test_the_weighted_error_by_hand():
    """Three tokens of 0.75 and 0.25, two of them right: |3 (0.75) (2/3 - 0.75)| and |3 (0.25) (1/3 - 0.25)| of 3."""
    probs = torch.tensor([[0.75, 0.25]] * 3, dtype=torch.float64)
    value = weighted_calibration_error(probs, torch.tensor([0, 0, 1]), num_bins=10)
    assert value.item() == pytest.approx((0.75 + 0.25) / 12, abs=1e-15)


def test_the_weighted_error_of_frequencies_is_zero():
    probs = torch.tensor([[0.5, 0.3, 0.2]] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    for num_bins in (1, 3, 15):
        assert weighted_calibration_error(probs, labels, num_bins=num_bins).item() == pytest.approx(0, abs=1e-12)


def test_the_weighted_error_of_the_certain_is_their_share_of_errors():
    probs, labels = one_hot(TAGS * 3)
    wrong = labels.clone()
    wrong[0, :4] = (wrong[0, :4] + 1) % len(TAGS)
    for num_bins in (1, 15):
        assert weighted_calibration_error(probs, wrong, num_bins=num_bins).item() == pytest.approx(4 / 21)


@every_dtype
def test_an_edge_belongs_to_the_lower_bin_of_the_weighted_error(dtype):
    """0.2 and 0.8 are edges of five bins: their weights are to lie in the first and the fourth."""
    probs = torch.tensor([[0.2, 0.8]], dtype=torch.float64).to(dtype)
    sums = weighted_bin_sums(probs, torch.tensor([1]), 5)
    low, high = probs[0].double().tolist()
    assert sums.tolist() == [[low, 0, 0, high, 0], [pytest.approx(low**2), 0, 0, high**2, 0], [0, 0, 0, high, 0]]
    assert sums.dtype == torch.float64


def test_weighted_sums_add_up_over_batches():
    probs, labels = (column.flatten(0, 1) for column in batch(ignored=0))
    parts = [weighted_bin_sums(probs[rows], labels[rows], 15) for rows in (slice(0, 11), slice(11, None))]
    whole = binned_error(torch.stack(parts).sum(0))
    torch.testing.assert_close(whole, weighted_calibration_error(probs, labels), rtol=1e-12, atol=0)
    stacked = binned_error(torch.stack(parts, 1))
    assert stacked.tolist() == [binned_error(part).item() for part in parts]


def test_the_weighted_error_needs_classes_and_rows():
    with pytest.raises(ValueError, match=r"probs: got shape \(2,\)"):
        weighted_calibration_error(torch.tensor([0.5, 0.5]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels: no row is left"):
        weighted_calibration_error(torch.full((2, 2), 0.5), torch.tensor([-100, -100]))


# generated tokens


def test_generated_tokens_by_hand():
    """A token too many, a padded row, a row without a reference, and the pad token on both sides."""
    tokens = torch.tensor([[5, 9, 6, 7], [5, 6, 0, 0], [5, 6, 7, 8]])
    references = torch.tensor([[5, 6, 8, 0], [5, -100, 6, -100], [-100, 0, -100, 0]])
    confidence = torch.arange(12).reshape(3, 4) / 16
    found = inference_events(confidence, tokens, references, pad_token_id=0)
    assert found[0].tolist() == [0, 1 / 16, 2 / 16, 3 / 16, 4 / 16, 5 / 16]
    assert found[1].tolist() == [1, 0, 1, 0, 1, 1]
    assert found[1].dtype == torch.int64
    _, correct = inference_events(confidence[1:2], tokens[1:2], references[1:2])
    assert correct.tolist() == [1, 1, 0, 0], "without a pad token zeros are tokens"


def generated(num_rows=9, num_tokens=6, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens, references = torch.randint(1, 5, (2, num_rows, num_tokens), generator=generator)
    return torch.rand(num_rows, num_tokens, generator=generator, dtype=torch.float64), tokens, references


def test_padding_and_order_of_generated_tokens_change_nothing():
    confidence, tokens, references = generated()
    expected = inference_events(confidence, tokens, references)
    pad = torch.nn.functional.pad
    wide = pad(confidence, (2, 3), value=math.nan), pad(tokens, (2, 3)), pad(references, (1, 0), value=-100)
    assert_equal(inference_events(*wide, pad_token_id=0), expected)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = inference_events(confidence[order], tokens[order], references[order])
    assert_equal([column.reshape(9, 6)[order] for column in expected], [column.reshape(9, 6) for column in shuffled])


def test_blocks_of_generated_tokens_change_nothing(monkeypatch):
    expected = inference_events(*generated())
    monkeypatch.setattr(sequence, "BLOCK_ELEMENTS", 100)
    assert_equal(inference_events(*generated()), expected)


@every_dtype
def test_the_confidence_of_generated_tokens_keeps_its_precision(dtype):
    confidence, tokens, references = generated()
    found, _ = inference_events(confidence.to(dtype), tokens, references)
    assert torch.equal(found, confidence.to(dtype).flatten())


def test_no_generated_token_is_no_event():
    confidence, tokens, references = generated()
    nothing = torch.full_like(tokens, -100)
    for case in (
        (confidence, nothing, references),
        (confidence, tokens, nothing),
        (confidence, tokens, nothing[:, :0]),
    ):
        found, correct = inference_events(*case)
        assert (found.shape, found.dtype, correct.shape, correct.dtype) == ((0,), torch.float64, (0,), torch.int64)


# what is refused


PROBS, LABELS = batch()
START, END, STARTS, ENDS = positions()
CONFIDENCE, TOKENS, REFERENCES = generated()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_events(PROBS[0], LABELS[0]), r"probs: got shape \(9, 7\); allowed is \(B, T, C\)"),
        (lambda: token_events(PROBS.log(), LABELS), "probs: row 0 sums to .*; allowed is 1"),
        (lambda: token_events(LABELS, LABELS), "probs: got a torch.int64 tensor; allowed are floating"),
        (lambda: token_events(PROBS, LABELS[:, 1:]), r"labels: got shape \(6, 8\); allowed is \(6, 9\)"),
        (lambda: token_events(PROBS, PROBS[..., 0]), "labels: got a torch.float64 tensor; allowed are integer"),
        (lambda: token_events(PROBS, LABELS.clamp_min(7)), "labels: got 7; allowed are 0 to 6"),
        (lambda: token_events(PROBS, LABELS, attention_mask=LABELS[0]), r"attention_mask: got shape \(9,\)"),
        (lambda: token_events(PROBS, LABELS, attention_mask=PROBS[..., 0].log()), "attention_mask: got -.*; allowed"),
        (lambda: token_events(PROBS, LABELS, attention_mask=[1]), "attention_mask: got list; allowed are torch"),
        (lambda: entity_events(PROBS, LABELS, TAGS[1:]), "label_names: got 6 of them; allowed is one for each of 7"),
        (
            lambda: entity_events(PROBS, LABELS, [*TAGS[1:], "PER"]),
            "label_names: got 'PER'; allowed are 'O', and 'B-'",
        ),
        (lambda: entity_events(PROBS, LABELS, [*TAGS[1:], "B-"]), "label_names: got 'B-'"),
        (lambda: entity_events(PROBS, LABELS, [*TAGS[1:], "O-PER"]), "label_names: got 'O-PER'"),
        (lambda: entity_events(PROBS, LABELS, dict(enumerate(TAGS))), "label_names: got 0"),
        (lambda: entity_events(PROBS, LABELS, TAGS, aggregate="max"), "aggregate: got 'max'; allowed are 'product'"),
        (lambda: sequence_events(PROBS, LABELS, aggregate="min"), "aggregate: got 'min'; allowed are 'product'"),
        (lambda: span_events(START, END[1:], STARTS, ENDS), r"end_probs: got shape \(39, 7\); allowed is \(40, 7\)"),
        (lambda: span_events(START, 2 * END, STARTS, ENDS), "end_probs: row 0 sums to 2"),
        (lambda: span_events(-START, END, STARTS, ENDS), "start_probs: row 0 sums to -1"),
        (lambda: span_events(START, END, STARTS[1:], ENDS), r"start_positions: got shape \(39,\)"),
        (lambda: span_events(START, END, STARTS, ENDS + 7), "end_positions: got .*; allowed are 0 to 6"),
        (lambda: span_events(START, END, STARTS - 7, ENDS), "start_positions: got -.*; allowed are 0 to 6"),
        (
            lambda: span_events(START, END, STARTS, ENDS, max_length=0),
            "max_length: got 0; allowed are integers from 1",
        ),
        (lambda: inference_events(CONFIDENCE + 1, TOKENS, REFERENCES), "confidence: got values from 1"),
        (lambda: inference_events(CONFIDENCE, TOKENS[1:], REFERENCES), r"tokens: got shape \(8, 6\)"),
        (
            lambda: inference_events(CONFIDENCE, TOKENS, REFERENCES[1:]),
            r"references: got shape .*; allowed is \(9, S\)",
        ),
        (lambda: inference_events(CONFIDENCE, CONFIDENCE, REFERENCES), "tokens: got a torch.float64 tensor"),
        (lambda: weighted_calibration_error(PROBS, LABELS, num_bins=0), "num_bins: got 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        call()
    assert "\n" not in str(error.value)
