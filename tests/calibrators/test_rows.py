"""Rows of a fit: soft labels, weights, groups, one logit or several labels; and what is refused."""

import warnings

import pytest
import torch
from torch.nn.functional import one_hot

from hf_calib.calibrators import CALIBRATORS, AutoCalibrator, IsotonicCalibration, TemperatureScaling
from hf_calib.calibrators.rows import check_rows, hard_rows, two_class_logits, warn_caller


LABELS = torch.tensor([0, 1, 2, 0])


def rows_of(count=400, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(count, classes, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)
    return 2 * log_p, log_p.exp().multinomial(1, generator=generator)[:, 0]


def events_of(count=600, labels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, labels, generator=generator, dtype=torch.float64)
    return 3 * logits, logits.sigmoid().bernoulli(generator=generator).long()


# -- soft labels


def test_a_soft_row_counts_for_each_class_as_much_as_it_says():
    soft = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]])
    weights = torch.tensor([3.0, 1.0])
    rows = check_rows(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), soft, weights)
    assert rows.num_rows == 2
    hard = hard_rows(rows)
    assert hard.logits.tolist() == [[1, 2, 3], [1, 2, 3], [4, 5, 6]]
    assert hard.labels.tolist() == [0, 1, 0]
    assert hard.weights.tolist() == pytest.approx([0.375, 1.125, 0.5])
    assert hard.weights.sum() == pytest.approx(2)


def test_a_temperature_of_soft_labels_is_that_of_many_annotators():
    logits, labels = rows_of()
    others = (labels + (torch.arange(400) % 4 == 0)) % 3
    both = torch.cat([labels, others])
    soft = (one_hot(labels, 3) + one_hot(others, 3)) / 2
    found = TemperatureScaling().fit(logits, soft)
    expected = TemperatureScaling().fit(torch.cat([logits, logits]), both)
    assert found.temperature.item() == pytest.approx(expected.temperature.item(), rel=1e-6)
    assert found.provenance["rows"] == 400


def test_soft_rows_of_ignored_values_are_left_out():
    logits, labels = rows_of()
    soft = one_hot(labels, 3).double()
    soft[::3] = -100
    kept = torch.arange(400) % 3 > 0
    found = TemperatureScaling().fit(logits, soft)
    assert found.temperature == TemperatureScaling().fit(logits[kept], labels[kept]).temperature
    assert found.provenance["rows"] == int(kept.sum())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((4, 3), 0.5), r"labels: row 0 is \[0.5, 0.5, 0.5\] with sum 1.5; allowed are shares from 0 up"),
        (torch.tensor([[2.0, -1, 0]]).repeat(4, 1), r"labels: row 0 is \[2.0, -1.0, 0.0\] with sum 1"),
        (torch.full((4, 3), torch.nan), r"labels: row 0 is \[nan, nan, nan\] with sum nan"),
        (torch.full((4, 2), 0.5), r"labels: got a torch.float32 tensor of shape \(4, 2\); allowed are integer"),
        (one_hot(LABELS, 3), r"logits: got shape \(4, 3\) for labels of shape \(4, 3\)"),
    ],
)
def test_labels_that_are_no_distributions_are_refused(labels, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TemperatureScaling().fit(torch.eye(4)[:, :3], labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shares_in_half_precision_are_within_its_rounding(dtype):
    logits = 2 * torch.randn(400, 30, generator=torch.Generator().manual_seed(0))
    shares = (0.5 * logits).softmax(-1)
    assert ((shares.to(dtype).sum(-1, dtype=torch.float32) - 1).abs() > 1e-4).any()
    found = TemperatureScaling().fit(logits, shares.to(dtype))
    assert float(found.temperature) == pytest.approx(2, rel=0.01)


def test_a_soft_label_of_an_impossible_class_is_refused():
    logits = torch.tensor([[0.0, 1, -torch.inf], [0, 1, 2]])
    allowed, wrong = torch.tensor([[0.5, 0.5, 0], [0, 0, 1]]), torch.tensor([[0.5, 0.4, 0.1], [0, 0, 1]])
    check_rows(logits, allowed)
    with pytest.raises(ValueError, match=r"^labels: row 0 has class 2, whose logit is -inf: it cannot occur"):
        check_rows(logits, wrong)


# -- one logit


def test_one_logit_is_two_classes():
    logits, labels = (column[:, 0] for column in events_of())
    for name in ("temperature", "isotonic"):
        binary = CALIBRATORS[name](task="binary").fit(logits, labels)
        pair = CALIBRATORS[name]().fit(torch.stack([torch.zeros_like(logits), logits], -1), labels)
        assert binary.num_labels == 1
        expected = pair.log_probs(torch.stack([torch.zeros_like(logits), logits], -1))[:, 1]
        torch.testing.assert_close(binary.log_probs(logits), expected)
        column = binary.log_probs(logits[:, None])  # as a head of one output gives them
        torch.testing.assert_close(column[:, 0], expected)
        refitted = CALIBRATORS[name](task="binary").fit(logits[:, None], labels)
        assert torch.equal(refitted(logits), binary(logits))


def test_one_logit_divided_is_exact():
    calibrator = TemperatureScaling(task="binary").fit(*(column[:, 0] for column in events_of()))
    scores = torch.tensor([1e-300, -3.0, 700.0, -torch.inf, torch.inf], dtype=torch.float64)
    assert torch.equal(calibrator(scores), scores / calibrator.temperature)


def test_one_logit_with_soft_and_ignored_labels():
    logits, labels = (column[:, 0] for column in events_of())
    marked = labels.masked_fill(torch.arange(600) % 5 == 0, -100)
    kept = marked != -100
    expected = TemperatureScaling(task="binary").fit(logits[kept], labels[kept]).temperature
    assert TemperatureScaling(task="binary").fit(logits, marked).temperature == expected
    assert TemperatureScaling(task="binary").fit(logits, marked.double()).temperature == expected


def test_two_class_logits_differ_by_the_logit():
    scores = torch.tensor([-torch.inf, -2.0, 0.0, 3.0, torch.inf])
    pair = two_class_logits(scores)
    assert torch.equal(pair[:, 1] - pair[:, 0], scores)
    assert (pair.amax(-1) == 0).all()


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            torch.zeros(4, 2),
            torch.zeros(4, dtype=torch.int64),
            r"logits: got shape \(4, 2\) for labels of shape \(4,\)",
        ),
        (torch.zeros(4), torch.full((4,), 2), "labels: got 2; allowed are 0 to 1"),
        (torch.zeros(4), torch.full((4,), 1.5), r"labels: row 0 is \[-0.5, 1.5\] with sum 1"),
        (torch.full((4,), torch.nan), LABELS % 2, "logits: the largest of row 0 is nan"),
    ],
)
def test_what_is_no_event_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TemperatureScaling(task="binary").fit(logits, labels)


# -- several labels


def test_labels_are_calibrated_one_by_one(tmp_path):
    logits, labels = events_of()
    for kind in (TemperatureScaling, IsotonicCalibration):
        calibrator = kind(task="multilabel").fit(logits, labels)
        assert calibrator.num_labels == 3
        singles = [kind(task="binary").fit(logits[:, k], labels[:, k]) for k in range(3)]
        expected = torch.stack([single(logits[:, k]) for k, single in enumerate(singles)], -1)
        assert torch.equal(calibrator(logits), expected)
        torch.testing.assert_close(calibrator.log_probs(logits), expected.sigmoid().log())
        calibrator.label_names = ["a", "b", "c"]
        calibrator.save_pretrained(tmp_path)
        loaded = AutoCalibrator.from_pretrained(tmp_path)
        assert loaded.task == "multilabel"
        assert torch.equal(loaded(logits), expected)


def test_a_label_that_is_ignored_in_a_row_leaves_the_others():
    logits, labels = events_of()
    marked = labels.clone()
    marked[::2, 1] = -100
    found = TemperatureScaling(task="multilabel").fit(logits, marked)
    expected = TemperatureScaling(task="binary").fit(logits[1::2, 1], labels[1::2, 1])
    assert torch.equal(found.members[1].temperature, expected.temperature)
    assert found.provenance["rows"] == 600


def test_several_labels_that_do_not_fit_are_refused():
    logits, labels = events_of()
    with pytest.raises(ValueError, match=r"^logits: got shape \(600, 3\) for labels of shape \(600,\)"):
        TemperatureScaling(task="multilabel").fit(logits, labels[:, 0])
    calibrator = TemperatureScaling(task="multilabel").fit(logits, labels)
    with pytest.raises(ValueError, match=r"^labels: got 2"):
        calibrator.fit(logits, labels * 2)
    assert calibrator.num_labels == 3  # as it was
    with pytest.raises(ValueError, match=r"^logits: got 2 classes; this calibrator was fitted on 3"):
        calibrator(logits[:, :2])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"^task: got 'multiclass'; allowed are None, 'binary', 'multilabel'"):
        TemperatureScaling(task="multiclass")


# -- groups and warnings


def test_groups_are_refused_where_there_are_none():
    logits, labels = rows_of()
    groups = torch.zeros(400, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^groups: got a tensor; allowed for temperature is none"):
        TemperatureScaling().fit(logits, labels, groups=groups)
    with pytest.raises(ValueError, match=r"^groups: got a tensor; allowed for temperature is none"):
        TemperatureScaling().fit(logits, labels)(logits, groups=groups)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (torch.zeros(4), "groups: got a torch.float32 tensor"),
        (torch.zeros(3, dtype=torch.int64), "groups: got a torch.int64 tensor"),
        ([0, 0, 0, 0], "groups: got list"),
        (torch.tensor([0, 1, -1, 0]), "groups: got -1; allowed are numbers from 0 up"),
    ],
)
def test_wrong_groups_are_refused(groups, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_rows(torch.eye(4)[:, :3], LABELS, groups=groups)


def test_a_warning_points_at_the_callers_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_caller("here")
        TemperatureScaling().fit(10 * torch.eye(3), torch.arange(3))
        TemperatureScaling(task="multilabel").fit(torch.tensor([[1.0], [-1]]), torch.tensor([[1], [0]]))
    assert {warning.filename for warning in caught} == {__file__}
    assert len(caught) == 3
