"""Several metrics of the same rows, by themselves and inside a Trainer that keeps no logits."""

import pytest
import torch
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainingArguments

from hf_calib.metrics import METRICS, ComputeMetrics, MetricCollection, SequenceMetric

from .every import class_rows, event_rows


NAMES = ["accuracy", "nll", "ece", "classwise_ece", "smooth_ece", "auroc"]


def numbers(collection):
    return {name: value.item() for name, value in collection.compute().items()}


def test_a_collection_says_what_each_metric_says():
    probs, labels = class_rows()
    collection = MetricCollection(NAMES)
    for part in range(0, 400, 130):
        collection.update(probs[part : part + 130], labels[part : part + 130])
    for name, value in numbers(collection).items():
        assert value == pytest.approx(METRICS[name].function(probs, labels).item(), abs=1e-3)
    assert list(collection.compute()) == NAMES
    assert collection.num_rows == 400


def test_options_are_given_as_metrics():
    probs, labels = class_rows()
    collection = MetricCollection({"ten": METRICS["ece"](num_bins=10), "twenty": METRICS["ece"](num_bins=20)})
    collection.update(probs, labels)
    for name, num_bins in (("ten", 10), ("twenty", 20)):
        assert numbers(collection)[name] == METRICS["ece"].function(probs, labels, num_bins=num_bins).item()


def test_several_labels_at_once():
    probs, labels = class_rows()
    happened = (labels[:, None] == torch.arange(4)).long()
    collection = MetricCollection(["ece", "brier", "nll", "smooth_ece"], task="multilabel")
    for part in range(0, 400, 130):
        collection.update(probs[part : part + 130], happened[part : part + 130])
    for name, value in numbers(collection).items():
        expected = METRICS[name].function(probs, happened, task="multilabel").item()
        assert value == pytest.approx(expected, abs=2e-4 if name == "smooth_ece" else 1e-12)


def test_collections_merge_and_forget():
    probs, labels = event_rows()
    halves = [MetricCollection(["ece", "nll"]) for _ in range(2)]
    for half, part in zip(halves, (slice(0, 99), slice(99, 400)), strict=True):
        half.update(probs[part], labels[part])
    whole = MetricCollection(["ece", "nll"])
    whole.update(probs, labels)
    merged = MetricCollection(["ece", "nll"]).merge(*halves)
    assert numbers(merged) == pytest.approx(numbers(whole), abs=1e-12)
    assert merged.interval(num_resamples=50).keys() == {"ece", "nll"}
    with pytest.raises(ValueError, match=r"^others: got brier; allowed are ece, nll"):
        merged.merge(MetricCollection(["brier"]))
    merged.reset()
    assert merged.num_rows == 0


def test_what_is_refused_leaves_every_metric_as_it_was():
    collection = MetricCollection(["nll", "accuracy"])
    with pytest.raises(ValueError, match=r"^probs: got shape \(400,\); accuracy needs"):
        collection.update(*event_rows())
    assert all(metric.num_rows == 0 for metric in collection.metrics.values())
    with pytest.raises(ValueError, match=r"^metrics: got 'entropy'; allowed are accuracy, nll"):
        MetricCollection(["entropy"])


def test_batches_of_an_evaluation_are_the_whole_of_it():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(12, 5, 4, generator=generator), torch.randint(4, (12, 5), generator=generator)
    labels[:, 3:] = -100
    compute_metrics = ComputeMetrics(NAMES)
    for _ in range(2):  # an evaluation starts from nothing
        for part in (slice(0, 5), slice(5, 10)):
            assert compute_metrics(EvalPrediction(logits[part], labels[part]), compute_result=False) == {}
        found = compute_metrics(EvalPrediction((logits[10:], "hidden states"), labels[10:]), compute_result=True)
        expected = MetricCollection(NAMES)
        expected.update(logits.softmax(-1), labels)
        assert found == pytest.approx(numbers(expected), abs=1e-9)
    all_at_once = EvalPrediction(logits.numpy(), labels.numpy())
    assert compute_metrics(all_at_once) == pytest.approx(found, abs=1e-9)


def test_a_language_model_s_logits_are_about_the_next_token():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 6, 9, generator=generator), torch.randint(9, (3, 6), generator=generator)
    found = ComputeMetrics(["nll"], shift=True)(EvalPrediction(logits, labels))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert found["nll"] == pytest.approx(expected.item(), abs=1e-6)


def test_several_labels_come_as_floats_and_through_the_sigmoid():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(30, 4, generator=generator), torch.randint(2, (30, 4), generator=generator).float()
    found = ComputeMetrics(["nll"], task="multilabel")(EvalPrediction(logits, labels))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert found["nll"] == pytest.approx(expected.item(), abs=1e-6)


def test_tests_and_curves_are_named_numbers():
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    found = ComputeMetrics(["ks", "nll"])(EvalPrediction(logits, torch.arange(50) % 3))
    assert list(found) == ["ks", "ks_p_value", "nll"]
    with pytest.raises(ValueError, match=r"^metrics: calibration_curve is no number"):
        ComputeMetrics(["calibration_curve"])


def test_two_kinds_of_labels_are_refused():
    with pytest.raises(ValueError, match=r"^label_ids: got 2 kinds of labels; allowed is one per row"):
        ComputeMetrics(["nll"])(EvalPrediction(torch.zeros(2, 3), (torch.zeros(2), torch.zeros(2))))


@pytest.mark.parametrize("size", [4, 30])
def test_a_trainer_evaluates_without_keeping_logits(classifier, tokenizer, labelled_texts, tmp_path, size):
    """Also with an uneven last batch: 30 rows in batches of four."""
    rows = labelled_texts.map(lambda row: tokenizer(row["text"]), remove_columns="text")
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=size, batch_eval_metrics=True, report_to="none", use_cpu=True
    )
    trainer = Trainer(
        classifier,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=ComputeMetrics(["accuracy", "nll", "ece"]),
    )
    found = trainer.evaluate(rows)
    assert found["eval_nll"] == pytest.approx(found["eval_loss"], abs=1e-4)
    plain = Trainer(classifier, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
                    data_collator=DataCollatorWithPadding(tokenizer)).predict(rows)  # fmt: skip
    assert found["eval_accuracy"] == (plain.predictions.argmax(-1) == plain.label_ids).mean()
    probs = torch.tensor(plain.predictions).softmax(-1)
    expected = METRICS["ece"].function(probs, torch.tensor(plain.label_ids)).item()
    assert found["eval_ece"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("how", [MetricCollection, ComputeMetrics])
def test_metrics_that_do_not_read_rows_or_read_other_rows_are_refused(how):
    """A structured metric would be given tokens for sequences; other rows would be counted than the metric says."""
    with pytest.raises(ValueError, match=r"^metrics: 'it' reads structured outputs by itself"):
        how({"it": SequenceMetric("brier")})
    with pytest.raises(ValueError, match=r"^metrics: 'it' has task=None and ignore_index=0; allowed are those of"):
        how({"it": METRICS["accuracy"](ignore_index=0)})
    with pytest.raises(ValueError, match=r"^metrics: 'it' is <class .*allowed are metrics, such as METRICS"):
        how({"it": METRICS["ece"]})


def test_what_is_added_up_over_processes_ignores_the_same_rows():
    collection = MetricCollection(["accuracy"], ignore_index=0)
    collection.update(*class_rows())
    total = collection.all_reduce()
    total.update(*class_rows())
    assert total.num_rows == 2 * collection.num_rows < 800


def test_a_merge_that_fails_changes_nothing():
    one, other = (MetricCollection(["nll", "classwise_ece"]) for _ in range(2))
    one.update(*class_rows())
    other.update(*class_rows(num_labels=3))
    with pytest.raises(ValueError, match=r"^others: got one of other classes, 135 sums; allowed are 180"):
        one.merge(other)
    assert [metric.num_rows for metric in one.metrics.values()] == [400, 400]


def test_several_labels_have_defaults_too():
    logits, labels = torch.zeros(4, 3), torch.ones(4, 3)
    assert list(ComputeMetrics(task="multilabel")(EvalPrediction(logits, labels))) == ["nll", "brier", "ece"]
