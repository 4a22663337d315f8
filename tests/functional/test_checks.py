"""What every metric demands of its input, and the laws that every metric obeys."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_calib.functional import (
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_curve,
    smooth_calibration_error,
)
from hf_calib.functional.checks import check_count, check_labels, check_probs

from .every import DTYPES, METRICS, MULTILABEL, OF_EVENTS, every_dtype


HIGHEST = {"brier": 2.02, "nll": 87.34}  # others 1; the squares of a row that rounding has made too heavy exceed 2

every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
every_event_metric = pytest.mark.parametrize("metric", OF_EVENTS.values(), ids=OF_EVENTS)
every_multilabel_metric = pytest.mark.parametrize("metric", MULTILABEL.values(), ids=MULTILABEL)


def softmax_rows(num_rows=60, num_labels=4, *, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_rows, num_labels, generator=generator, dtype=torch.float64)
    return logits.to(dtype).softmax(-1), torch.randint(num_labels, (num_rows,), generator=generator)


def refuses(probs, labels, message, **options):
    with pytest.raises(ValueError, match=message):
        check_probs(probs, labels, **options)


# laws


@every_metric
def test_row_order_is_irrelevant(metric):
    probs, labels = softmax_rows()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(metric(probs[order], labels[order]), metric(probs, labels))


@every_metric
def test_class_order_is_irrelevant(metric):
    probs, labels = softmax_rows()
    new_number = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(metric(probs[:, new_number.argsort()], new_number[labels]), metric(probs, labels))


@every_metric
def test_leading_dimensions_flatten(metric):
    probs, labels = softmax_rows()
    assert torch.equal(metric(probs.view(3, 4, 5, 4), labels.view(3, 4, 5)), metric(probs, labels))


@every_metric
@pytest.mark.parametrize("ignore_index", [-100, 2, 255])
def test_ignored_rows_have_no_influence(metric, ignore_index):
    """Whatever they hold: padding is not a distribution."""
    probs, labels = softmax_rows()
    ignored = torch.arange(60) % 3 == 0
    labels = labels.where(labels != ignore_index, 0).masked_fill(ignored, ignore_index)
    nonsense = probs.masked_fill(ignored[:, None], math.nan)
    expected = metric(probs[~ignored], labels[~ignored])
    assert torch.equal(metric(nonsense, labels, ignore_index=ignore_index), expected)


@every_multilabel_metric
def test_an_event_is_a_column_of_labels(metric):
    """Both `(N,)` and multi-label `(N, 1)`; a label of two columns is the mean of each alone."""
    probs, labels = softmax_rows(num_labels=2)
    probs, labels = probs[:, :1], (labels[:, None] == 0).long()
    event = metric(probs[:, 0], labels[:, 0])
    torch.testing.assert_close(metric(probs, labels, task="multilabel"), event)
    other_probs, other_labels = probs.flip(0).sqrt(), 1 - labels
    pair = metric(torch.cat([probs, other_probs], 1), torch.cat([labels, other_labels], 1), task="multilabel")
    torch.testing.assert_close(pair, (event + metric(other_probs[:, 0], other_labels[:, 0])) / 2)


@every_multilabel_metric
def test_multilabel_rows_flatten_and_are_ignored_whole(metric):
    probs, _ = softmax_rows()
    labels = torch.randint(2, (60, 4), generator=torch.Generator().manual_seed(3))
    labels[::4] = -100
    kept = labels[:, 0] != -100
    found = metric(probs.view(5, 12, 4), labels.view(5, 12, 4), task="multilabel")
    assert torch.equal(found, metric(probs[kept], labels[kept], task="multilabel"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(1, 12),
    num_labels=st.integers(1, 6),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_every_metric_is_a_float64_within_its_bounds(num_rows, num_labels, scale, dtype, seed):
    probs, labels = softmax_rows(num_rows, num_labels, scale=scale, dtype=dtype, seed=seed)
    for name, metric in METRICS.items():
        value = metric(probs, labels)
        assert (value.dtype, value.shape) == (torch.float64, ())
        assert 0 <= value <= HIGHEST.get(name, 1.0), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 1, width=16) | st.sampled_from([0.0, 1.0, 5e-8]), st.booleans()), min_size=1, max_size=9
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_every_metric_of_events_is_within_its_bounds(rows, dtype):
    scores, labels = (torch.tensor(side) for side in zip(*rows, strict=True))
    for name, metric in OF_EVENTS.items():
        assert 0 <= metric(scores.to(dtype), labels) <= HIGHEST.get(name, 1.0), name


@every_metric
def test_probabilities_with_a_gradient_are_read_as_numbers(metric):
    probs, labels = softmax_rows()
    value = metric(probs.clone().requires_grad_(), labels)
    assert torch.equal(value, metric(probs, labels))
    assert not value.requires_grad


@every_metric
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_every_integer_dtype_of_labels_is_the_same(metric, dtype):
    probs, labels = softmax_rows()
    assert torch.equal(metric(probs, labels.to(dtype)), metric(probs, labels))


@every_event_metric
def test_labels_of_events_may_be_bool(metric):
    probs, labels = softmax_rows(num_labels=2)
    assert torch.equal(metric(probs[:, 0], labels.bool()), metric(probs[:, 0], labels))


def test_a_label_is_not_ignored_for_wrapping_around_in_uint8():
    """-100 is 156 in eight bits."""
    probs, labels = torch.eye(200), torch.arange(200)
    assert len(check_probs(probs, labels.to(torch.uint8))[1]) == 200


# what is accepted


@every_dtype
@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_real_softmax_rows_of_1000_classes_are_accepted(dtype, scale):
    probs, labels = softmax_rows(100, 1000, scale=scale, dtype=dtype)
    for metric in METRICS.values():
        assert metric(probs, labels).isfinite()


def test_bfloat16_rows_really_miss_1():
    probs, labels = softmax_rows(500, 1000, scale=10.0, dtype=torch.bfloat16)
    assert (probs.float().sum(-1) - 1).abs().max() > 1e-3
    check_probs(probs, labels)


@pytest.mark.parametrize(
    ("dtype", "allowed", "refused"),
    [
        (torch.float64, 5e-5, 2e-4),
        (torch.float32, 5e-5, 2e-4),
        (torch.float16, 8e-4, 3e-3),
        (torch.bfloat16, 6e-3, 0.03),
    ],
    ids=str,
)
def test_the_tolerance_follows_the_dtype(dtype, allowed, refused):
    row = torch.full((1, 64), 1 / 64)
    label = torch.zeros(1, dtype=torch.long)
    for miss, is_allowed in ((allowed, True), (refused, False)):
        for sign in (1, -1):
            missing = row.clone()
            missing[0, 0] += sign * min(miss, 1 / 65)
            missing[0, 1] += sign * (miss - min(miss, 1 / 65))
            if is_allowed:
                check_probs(missing.to(dtype), label)
            else:
                refuses(missing.to(dtype), label, "probs: row 0 sums to")


@every_dtype
def test_what_rounding_puts_above_1_is_cut(dtype):
    above = torch.tensor([[1 + max(5e-5, torch.finfo(dtype).eps), 0.0]], dtype=dtype)
    probs, _ = check_probs(above, torch.tensor([0]))
    assert above[0, 0] > 1
    assert torch.equal(probs, torch.tensor([[1.0, 0.0]], dtype=dtype))


def test_kept_rows_are_returned_flat_and_labels_as_int64():
    probs, labels = softmax_rows(6)
    labels[2] = -100
    found_probs, found_labels = check_probs(probs.view(2, 3, 4), labels.view(2, 3).int())
    kept = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(found_probs, probs[kept])
    assert torch.equal(found_labels, labels[kept])


# what is refused


ROW = [[0.5, 0.5], [0.25, 0.75]]
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ([[2.0, -1.0], [0.5, 0.5]], "probs: got -1; allowed are values in"),
        ([[0.5, 0.5], [0.3, 0.6]], r"probs: row 1 sums to 0\.9; allowed is 1 within 0\.0001.*softmax"),
        ([[0.5, 0.5], [0.33, 0.66]], r"probs: row 1 sums to 0\.99; .*keepdim"),  # rounded to two digits
        ([[0.2, 0.9], [0.4, 0.1]], "probs: row 0 sums to 1.1"),  # logits that lie in [0, 1] by chance
        ([[3.0, -1.0], [0.5, 0.5]], "probs: row 0 sums to 2"),
        ([[50.0, 50.0], [0.5, 0.5]], "probs: row 0 sums to 100"),  # per cent
        ([[math.nan, 0.5], [0.5, 0.5]], "probs: row 0 sums to nan"),
        ([[0.5, 0.5], [math.inf, 0.5]], "probs: row 1 sums to inf"),
        ([[0.5, 0.5], [-math.inf, math.inf]], "probs: row 1 sums to nan"),
        ([-0.1, 0.5], r"probs: got values from -0\.1 to 0\.5; .*sigmoid"),
        ([0.1, 1.5], r"probs: got values from 0\.1 to 1\.5"),
        ([math.nan, 0.5], "probs: got values from nan to nan"),
        ([0.5, math.inf], r"probs: got values from 0\.5 to inf"),
    ],
)
def test_what_is_no_probability_is_refused(probs, message):
    for metric in OF_EVENTS.values():
        with pytest.raises(ValueError, match=message):
            metric(torch.tensor(probs), LABELS)


def test_multilabel_values_need_not_sum_to_1_but_lie_in_0_to_1():
    labels = torch.tensor([[1, 0], [1, 1]])
    check_probs(torch.tensor([[0.9, 0.8], [0.0, 0.1]]), labels, task="multilabel")
    refuses(torch.tensor([[0.9, 1.8], [0.0, 0.1]]), labels, r"probs: got values from 0 to 1\.8", task="multilabel")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 2]), "labels: got 2; allowed are 0 to 1"),
        (torch.tensor([-1, 0]), "labels: got -1; allowed are 0 to 1"),
        (torch.tensor([-1, 5]), "labels: got -1"),
        (torch.tensor([0.0, 1.0]), r"labels: got a torch\.float32 tensor; allowed are integer"),
        (torch.tensor([0j, 1j]), r"labels: got a torch\.complex64 tensor"),
        ([0, 1], "labels: got list; allowed are integer"),
        (None, "labels: got NoneType"),
        (torch.tensor([-100, -100]), "labels: no row is left after leaving out those equal to ignore_index=-100"),
        (torch.tensor([0, 1, 1]), r"labels: got shape \(3,\) for probs of shape \(2"),
        (torch.tensor([[0, 1]]), r"labels: got shape \(1, 2\) for probs of shape \(2"),
        (torch.tensor(0), r"labels: got shape \(\) for probs of shape \(2"),
    ],
)
@pytest.mark.parametrize("probs", [ROW, [0.5, 0.25]], ids=["classes", "events"])
def test_wrong_labels_are_refused(probs, labels, message):
    refuses(torch.tensor(probs), labels, message)


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([0.5, 0.5], LABELS, "probs: got list; allowed are floating"),
        (None, LABELS, "probs: got NoneType"),
        (torch.tensor([[1, 0], [0, 1]]), LABELS, r"probs: got a torch\.int64 tensor"),
        (torch.tensor(0.5), torch.tensor(1), r"labels: got shape \(\) for probs of shape \(\)"),
        (torch.zeros(2, 0), LABELS, r"probs: got shape \(2, 0\); allowed is at least one class"),
        (torch.zeros(0, 2), LABELS[:0], "labels: no row is left"),
        (torch.zeros(0), LABELS[:0], "labels: no row is left"),
        (torch.tensor(ROW), torch.tensor([[0, 1], [1, 0]]), r"or task='multilabel'"),
    ],
)
def test_wrong_kinds_and_shapes_are_refused(probs, labels, message):
    refuses(probs, labels, message)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS, r"labels: got shape \(2,\) for multi-label probs of \(2, 2\); allowed is one label per probability"),
        (torch.tensor([[0, 2], [1, 1]]), "labels: got 2; allowed are 0 to 1"),
        (torch.tensor([[1, -100], [0, 1]]), "labels: got -100; allowed are 0 to 1"),  # a row is ignored whole
        (torch.full((2, 2), -100), "labels: no row is left"),
    ],
)
def test_wrong_multilabel_labels_are_refused(labels, message):
    refuses(torch.tensor(ROW), labels, message, task="multilabel")


def test_a_vector_is_not_multilabel():
    refuses(torch.tensor([0.5, 0.5]), LABELS, "for multi-label probs", task="multilabel")


@pytest.mark.parametrize(
    ("metric", "option", "value", "allowed"),
    [
        (expected_calibration_error, "task", "multiclass", "None, 'multilabel'"),
        (expected_calibration_error, "norm", "L1", "'l1', 'l2', 'max', 'over', 'under'"),
        (expected_calibration_error, "binning", "uniform", "'width', 'mass'"),
        (expected_calibration_error, "target", "all", "'top', 'class'"),
        (expected_calibration_error, "num_bins", 0, "integers from 1 up"),
        (expected_calibration_error, "num_bins", 15.0, "integers from 1 up"),
        (expected_calibration_error, "num_bins", True, "integers from 1 up"),
        (smooth_calibration_error, "target", None, "'top', 'class'"),
        (reliability_curve, "num_bins", -3, "integers from 1 up"),
        (brier_score, "reduction", "sum", "'mean', 'none'"),
        (negative_log_likelihood, "reduction", None, "'mean', 'none'"),
        (accuracy, "reduction", "sum", "'mean', 'none'"),
    ],
)
def test_an_unknown_choice_is_refused_by_its_name(metric, option, value, allowed):
    with pytest.raises(ValueError, match=f"^{option}: got {value!r}; allowed are {allowed}$"):
        metric(torch.tensor(ROW), LABELS, **{option: value})


def test_errors_call_the_probabilities_by_the_name_they_are_told():
    refuses(torch.tensor([[3.0, 1.0]]), LABELS[:1], "before: row 0 sums to 4", name="before")
    refuses(torch.tensor([1.5]), LABELS[:1], "before: got values", name="before")
    refuses(torch.tensor(ROW), LABELS[:1], r"for before of shape \(2, 2\)", name="before")


def test_label_and_count_checks_let_the_ends_pass():
    check_labels(torch.tensor([0, 4]), 5)
    check_count("num_bins", 1)
