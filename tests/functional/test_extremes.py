"""The ends of what probabilities can be: every metric stays finite, in bounds and blind to the order of rows."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_calib.functional.calibration import events

from .every import DTYPES, METRICS, MULTILABEL, OF_EVENTS


HIGHEST = {"brier": 2.02, "nll": 87.34}  # others 1; a row that rounding has made too heavy can exceed Brier's 2
NUM_CLASSES = [1, 2, 3, 20, 21]  # on both sides of where reading the top label changes its way

few_examples = settings(max_examples=25, deadline=None, derandomize=True)
dtypes = st.sampled_from(DTYPES)


def subnormal(dtype):
    """The smallest number above 0."""
    return torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)).item()


def one_hot(logits, dtype):
    return torch.eye(logits.shape[1], dtype=dtype)[logits.argmax(-1)]


KINDS = {
    "one-hot": one_hot,
    "hot and subnormal": lambda logits, dtype: one_hot(logits, dtype).clamp_min(subnormal(dtype)),
    "equals": lambda logits, dtype: logits.clamp(0, 0.1).mul(1000).softmax(-1).to(dtype),
    "rounded": lambda logits, dtype: logits.softmax(-1).to(dtype),
    "saturated": lambda logits, dtype: (1e4 * logits).to(dtype).clamp(-6e4, 6e4).softmax(-1),
}


@st.composite
def class_rows(draw):
    """Rows `(a, b, C)` of one extreme kind or of all mixed, and their labels `(a, b)`."""
    shape = draw(st.sampled_from([(1, 1), (1, 7), (2, 5)]))
    dtype, num_classes = draw(dtypes), draw(st.sampled_from(NUM_CLASSES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    logits = 3 * torch.randn(*shape, num_classes, generator=generator, dtype=torch.float64).flatten(0, 1)
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=3, unique=True))
    sides = [KINDS[kind](logits, dtype) for kind in kinds]
    probs = torch.stack([sides[row % len(sides)][row] for row in range(len(logits))])
    return probs.view(*shape, num_classes), torch.randint(num_classes, shape, generator=generator)


@st.composite
def event_rows(draw):
    """`(N, L)` probabilities of events out of the extreme ones, and what happened."""
    dtype = draw(dtypes)
    eps, least = torch.finfo(dtype).eps, subnormal(dtype)
    values = [0.0, -0.0, least, torch.finfo(dtype).tiny, eps, 0.5, 1 - eps, 1.0]
    num_rows, num_labels = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    cells = st.lists(st.tuples(st.sampled_from(values), st.integers(0, 1)), min_size=num_labels, max_size=num_labels)
    rows = torch.tensor(draw(st.lists(cells, min_size=num_rows, max_size=num_rows)), dtype=torch.float64)
    return rows[..., 0].to(dtype), rows[..., 1].long()


def check_bounds(name, value):
    assert (value.dtype, value.shape) == (torch.float64, ()), name
    assert 0 <= value <= HIGHEST.get(name, 1.0), name  # NaN is not


def message_of(metric, *rows, **options):
    with pytest.raises(ValueError, match=r"\S") as caught:
        metric(*rows, **options)
    return str(caught.value)


@few_examples
@given(rows=class_rows())
def test_extreme_rows_are_within_bounds_in_any_order(rows):
    probs, labels = rows
    flat_probs, flat_labels = probs.flatten(0, 1).flip(0), labels.flatten().flip(0)
    for name, metric in METRICS.items():
        value = metric(probs, labels)
        check_bounds(name, value)
        torch.testing.assert_close(metric(flat_probs, flat_labels), value, msg=name)


@few_examples
@given(rows=event_rows())
def test_extreme_events_are_within_bounds_in_any_order(rows):
    several = [(name, partial(metric, task="multilabel"), rows) for name, metric in MULTILABEL.items()]
    single = [(name, metric, [side[:, 0] for side in rows]) for name, metric in OF_EVENTS.items()]
    for name, metric, sides in several + single:
        value = metric(*sides)
        check_bounds(name, value)
        torch.testing.assert_close(metric(*(side.flip(0) for side in sides)), value, msg=name)


@few_examples
@given(
    levels=st.lists(st.lists(st.integers(1, 3), min_size=21, max_size=21), min_size=1, max_size=6),
    num_classes=st.sampled_from(NUM_CLASSES),
    dtype=dtypes,
)
def test_the_first_of_equals_is_the_top_label(levels, num_classes, dtype):
    levels = [row[:num_classes] for row in levels]
    weights = torch.tensor(levels, dtype=torch.float64)
    probs = (weights / weights.sum(-1, keepdim=True)).to(dtype)
    first = [row.index(max(row)) for row in levels]
    for label in range(num_classes):
        scores, outcomes = events(probs, torch.full((len(levels),), label))
        assert torch.equal(scores[:, 0], torch.stack([row[k] for row, k in zip(probs, first, strict=True)]))
        assert outcomes[:, 0].tolist() == [k == label for k in first]


@few_examples
@given(rows=class_rows(), place=st.integers(0, 1000))
def test_one_bad_row_is_refused_and_named(rows, place):
    """Logits, too little, NaN and infinity."""
    probs, labels = rows
    place %= labels.numel()
    for first, others in ((2.0, 2.0), (0.5, 0.0), (math.nan, 0.0), (math.inf, 0.0)):
        bad = probs.clone()
        row = bad.view(-1, probs.shape[-1])[place]  # a view: what is written is written to `bad`
        row.fill_(others)[0] = first
        expected = f"probs: row {place} sums to {first + others * (len(row) - 1):.6g}; allowed is 1 within "
        for metric in METRICS.values():
            message = message_of(metric, bad, labels)
            assert message.startswith(expected)
            assert "\n" not in message


@few_examples
@given(rows=class_rows().filter(lambda rows: rows[0].shape[-1] > 1), place=st.integers(0, 1000))
def test_a_negative_probability_is_refused_though_its_row_sums_to_1(rows, place):
    probs, labels = rows
    bad = probs.clone()
    row = bad.view(-1, probs.shape[-1])[place % labels.numel()]
    row.zero_()[:2] = torch.tensor([1.25, -0.25])
    for metric in METRICS.values():
        assert message_of(metric, bad, labels) == "probs: got -0.25; allowed are values in [0, 1]"


@few_examples
@given(rows=event_rows(), place=st.integers(0, 1000), bad=st.sampled_from([-0.25, 1.5, math.nan, math.inf]))
def test_a_bad_event_is_refused_and_named(rows, place, bad):
    probs, labels = rows
    spoilt = probs.clone()
    spoilt[place % len(probs), 0] = bad
    messages = [message_of(metric, spoilt[:, 0], labels[:, 0]) for metric in OF_EVENTS.values()]
    messages += [message_of(metric, spoilt, labels, task="multilabel") for metric in MULTILABEL.values()]
    for message in messages:
        assert message.startswith("probs: got values from ")
        assert f"{bad:.6g}" in message.split(";")[0]
        assert "\n" not in message


@few_examples
@given(rows=class_rows(), place=st.integers(0, 1000), beyond=st.sampled_from([-101, -1, 0, 1000]))
def test_a_label_out_of_range_is_refused_and_named(rows, place, beyond):
    probs, labels = rows
    wrong = labels.clone()
    number = beyond if beyond < 0 else probs.shape[-1] + beyond
    wrong.view(-1)[place % labels.numel()] = number
    for metric in METRICS.values():
        assert message_of(metric, probs, wrong) == f"labels: got {number}; allowed are 0 to {probs.shape[-1] - 1}"


@few_examples
@given(rows=class_rows(), ignore_index=st.sampled_from([-100, 0, 255]))
def test_a_mask_that_leaves_nothing_is_refused(rows, ignore_index):
    probs, labels = rows
    masked = torch.full_like(labels, ignore_index)
    expected = f"labels: no row is left after leaving out those equal to ignore_index={ignore_index}"
    for metric in METRICS.values():
        assert message_of(metric, probs, masked, ignore_index=ignore_index) == expected
