"""Metrics of structured outputs: batch by batch they say what the function says of all events at once."""

import pytest
import torch

from hf_calib.functional.sequence import (
    entity_events,
    inference_events,
    sequence_events,
    span_events,
    token_events,
)
from hf_calib.metrics import (
    METRICS,
    EntityMetric,
    InferenceMetric,
    SequenceMetric,
    SpanMetric,
    TokenMetric,
    bootstrap,
)


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def tokens(num_sequences=40, length=7):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_sequences, length, 5, generator=generator, dtype=torch.float64)
    labels = (2 * logits).softmax(-1).flatten(0, 1).multinomial(1, generator=generator).view(num_sequences, length)
    lengths = torch.randint(1, length + 1, (num_sequences, 1), generator=generator)
    return logits.softmax(-1), labels.masked_fill(torch.arange(length) >= lengths, -100)


def answers(num_rows=40, length=9):
    generator = torch.Generator().manual_seed(1)
    probs = [3 * torch.randn(num_rows, length, generator=generator, dtype=torch.float64) for _ in range(2)]
    positions = torch.randint(length, (2, num_rows), generator=generator).sort(0).values
    return *(row.softmax(-1) for row in probs), *positions


def texts(num_rows=40, length=6):
    generator = torch.Generator().manual_seed(2)
    confidence = torch.rand(num_rows, length, generator=generator, dtype=torch.float64)
    written, references = torch.randint(4, (2, num_rows, length), generator=generator)
    return confidence, written, references


CASES = {
    "token": (lambda **options: TokenMetric(**options), token_events, tokens),
    "shifted": (lambda **options: TokenMetric(shift=True, **options), lambda *x: token_events(*x, shift=True), tokens),
    "entity": (lambda **options: EntityMetric(TAGS, **options), lambda *x: entity_events(*x, TAGS), tokens),
    "weakest": (
        lambda **options: EntityMetric(TAGS, aggregate="min", **options),
        lambda *x: entity_events(*x, TAGS, aggregate="min"),
        tokens,
    ),
    "sequence": (lambda **options: SequenceMetric(**options), sequence_events, tokens),
    "span": (
        lambda **options: SpanMetric(max_length=4, **options),
        lambda *x: span_events(*x, max_length=4),
        answers,
    ),
    "inference": (lambda **options: InferenceMetric(**options), inference_events, texts),
}
every_case = pytest.mark.parametrize("case", CASES)


@every_case
@pytest.mark.parametrize("name", ["ece", "nll", "auroc", "ks"])
def test_batches_are_the_whole(case, name):
    make, events_of, outputs = CASES[case]
    metric = make(metric=name)
    for batch in zip(*(tensor.split(7) for tensor in outputs()), strict=True):
        metric.update(*batch)
    events = events_of(*outputs())
    expected = METRICS[name]().update(*events)
    assert metric.num_rows == len(events[0]) > 10
    found, value = metric.compute(), expected.compute()
    torch.testing.assert_close(found, value, atol=1e-9, rtol=0)
    assert metric.higher_is_better == expected.higher_is_better
    interval = metric.interval(num_resamples=100)
    assert interval.low < interval.high
    assert interval.num_rows == metric.num_rows
    assert bootstrap([name], *events, num_resamples=100)[name].num_rows == metric.num_rows


@every_case
def test_merging_is_adding_and_wants_equal_options(case):
    make, _, outputs = CASES[case]
    parts = [make().update(*(tensor[half] for tensor in outputs())) for half in (slice(0, 13), slice(13, None))]
    whole = make().update(*outputs())
    assert make().merge(*parts).compute().item() == pytest.approx(whole.compute().item(), abs=1e-12)
    assert make().merge(*reversed(parts)).num_rows == whole.num_rows
    with pytest.raises(ValueError, match=r"^others: got .* allowed are equal metrics"):
        make().merge(make(metric=METRICS["ece"](num_bins=10)))
    with pytest.raises(ValueError, match=r"^others: got .* allowed are equal metrics"):
        make().merge(METRICS["ece"]())


def test_a_batch_without_events_adds_nothing():
    probs, labels = tokens()
    metric = EntityMetric(TAGS)
    nothing = torch.tensor([0.8, 0.05, 0.05, 0.05, 0.05]).expand(2, 3, 5)
    assert metric.update(nothing, torch.zeros(2, 3, dtype=torch.int64)).num_rows == 0
    padding = torch.full_like(labels, -100)
    assert TokenMetric().update(probs, padding).num_rows == SequenceMetric().update(probs, padding).num_rows == 0
    with pytest.raises(ValueError, match=r"^entity: no row was seen"):
        metric.compute()


def test_wrong_inputs_are_refused():
    probs, labels = tokens()
    with pytest.raises(ValueError, match=r"^label_names: got 4"):
        EntityMetric(TAGS[:4]).update(probs, labels)
    with pytest.raises(ValueError, match=r"^probs: row 0 sums to"):
        SequenceMetric().update(probs * 2, labels)
    with pytest.raises(ValueError, match=r"^metrics: got 'entropy'"):
        SpanMetric("entropy")
