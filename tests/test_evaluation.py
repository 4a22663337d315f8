"""The evaluator: probabilities of a pipeline, against what `collect_predictions` reads of the same model."""

import evaluate
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import pipeline

from hf_calib import (
    CalibrationEvaluator,
    IdentityCalibration,
    attach_calibrator,
    collect_predictions,
    evaluate_module,
    fold_calibrator,
    load_calibrated,
    save_calibrated,
)
from hf_calib.evaluate_modules.scores import calibration_scores

from .conftest import WORDS


TIMING = {"total_time_in_seconds", "samples_per_second", "latency_in_seconds"}


@pytest.fixture(scope="module")
def evaluator():
    return CalibrationEvaluator()


@pytest.fixture
def scores(classifier, tokenizer):
    """What `collect_predictions` and the functions say of the model as it is, without evaluate."""

    def compute(dataset, calibrator=None, *, options=None, **columns):
        predictions = collect_predictions(classifier, dataset, processing_class=tokenizer, **columns)
        logits = predictions.logits if calibrator is None else calibrator(predictions.logits)
        return pytest.approx(calibration_scores(logits.softmax(-1), predictions.labels, **(options or {})), abs=1e-6)

    return compute


def without_timing(found):
    assert set(found) >= TIMING
    assert found["samples_per_second"] == pytest.approx(1 / found["latency_in_seconds"])
    return {name: value for name, value in found.items() if name not in TIMING}


@pytest.mark.parametrize("kind", ["model", "pipeline", "str", "path"])
def test_a_model_in_every_form(kind, evaluator, scores, classifier, tokenizer, labelled_texts, tmp_path):
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"tokenizer": tokenizer} if kind == "model" else {}
    given = {"model": classifier, "str": str(tmp_path), "path": tmp_path}.get(kind)
    given = given or pipeline("text-classification", model=classifier, tokenizer=tokenizer)
    assert without_timing(evaluator.compute(given, labelled_texts, **options)) == scores(labelled_texts)


def test_it_is_what_a_script_for_evaluate_expects(evaluator):
    assert isinstance(evaluator, evaluate.TextClassificationEvaluator)
    assert evaluator.prepare_metric(None).name == "calibration"


def test_options_go_to_the_module(evaluator, scores, classifier, tokenizer, labelled_texts):
    options = {"metrics": {"ece": {"num_bins": 4}, "ks": {}}, "intervals": False, "seed": 2}
    found = evaluator.compute(classifier, labelled_texts, tokenizer=tokenizer, **options)
    assert without_timing(found) == scores(labelled_texts, options=options)
    options = {"metrics": "brier", "intervals": True, "num_resamples": 20}
    found = evaluator.compute(classifier, labelled_texts, tokenizer=tokenizer, **options)
    assert without_timing(found) == scores(labelled_texts, options=options)


def test_another_module_gets_the_rows(evaluator, scores, classifier, tokenizer, labelled_texts):
    module = evaluate.load(evaluate_module("calibration"))
    module.add_batch(predictions=[[0.5, 0.25, 0.25]], references=[0])
    found = evaluator.compute(classifier, labelled_texts, tokenizer=tokenizer, metric=module)
    assert found["num_rows"] == 31


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_batch_size_is_the_caller_s(batch_size, evaluator, classifier, tokenizer, labelled_texts):
    sizes = []
    handle = classifier.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    evaluator.compute(classifier, labelled_texts, tokenizer=tokenizer, batch_size=batch_size, metrics="nll")
    handle.remove()
    assert max(sizes) == (batch_size or 30)


def test_a_pipeline_keeps_its_own_batch_size(evaluator, classifier, tokenizer, labelled_texts):
    sizes = []
    classifier.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    pipe = pipeline("text-classification", model=classifier, tokenizer=tokenizer, batch_size=7)
    evaluator.compute(pipe, labelled_texts, metrics="nll")
    assert max(sizes) == 7


def test_nothing_drops_out(evaluator, scores, classifier, tokenizer, labelled_texts):
    expected = scores(labelled_texts)
    classifier.train()
    assert without_timing(evaluator.compute(classifier, labelled_texts, tokenizer=tokenizer)) == expected
    assert classifier.training


def test_a_long_text_is_cut_as_for_a_fit(evaluator, scores, classifier, tokenizer):
    long = Dataset.from_dict({"text": [" ".join(WORDS), "w1"], "label": ["sad", "glad"]})
    assert tokenizer.model_max_length > 10**9
    assert without_timing(evaluator.compute(classifier, long, tokenizer=tokenizer)) == scores(long)


def test_a_sentence_pair(evaluator, scores, classifier, tokenizer, labelled_texts):
    pairs = labelled_texts.add_column("second", labelled_texts["text"][:][::-1]).rename_columns(
        {"text": "first", "label": "truth"}
    )
    columns = {"input_column": "first", "second_input_column": "second", "label_column": "truth"}
    found = evaluator.compute(classifier, pairs, tokenizer=tokenizer, **columns)
    assert without_timing(found) == scores(pairs, text_column=["first", "second"], label_column="truth")


# Calibrators


@pytest.mark.parametrize("kind", ["object", "folder", "str"])
def test_a_calibrator_shows_before_and_after(
    kind, evaluator, scores, classifier, tokenizer, temperature, labelled_texts, tmp_path
):
    temperature.save_pretrained(tmp_path)
    given = {"object": temperature, "folder": tmp_path, "str": str(tmp_path)}[kind]
    found = without_timing(evaluator.compute(classifier, labelled_texts, tokenizer=tokenizer, calibrator=given))
    before = {name.removeprefix("before_"): found.pop(name) for name in list(found) if name.startswith("before_")}
    assert found == scores(labelled_texts, temperature)
    assert {**before, "num_rows": 30} == scores(labelled_texts)


@pytest.mark.parametrize("apply", [attach_calibrator, fold_calibrator])
def test_a_model_s_own_calibrator_is_part_of_it(
    apply, evaluator, scores, classifier, tokenizer, temperature, labelled_texts, tmp_path
):
    expected = scores(labelled_texts, temperature)
    model = apply(classifier, temperature)
    assert without_timing(evaluator.compute(model, labelled_texts, tokenizer=tokenizer)) == expected
    with pytest.raises(ValueError, match=r"^model: a calibrator is .* it(s weights)? already"):
        evaluator.compute(model, labelled_texts, tokenizer=tokenizer, calibrator=temperature)
    save_calibrated(model, tmp_path / "saved", processing_class=tokenizer)
    loaded = load_calibrated(tmp_path / "saved")
    assert without_timing(evaluator.compute(loaded, labelled_texts, tokenizer=tokenizer)) == expected


def test_a_calibrator_of_other_labels_is_refused(evaluator, classifier, tokenizer, labelled_texts):
    calibrator = IdentityCalibration().fit(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^calibrator: it was fitted for 2 unnamed labels; allowed are the model's"):
        evaluator.compute(classifier, labelled_texts, tokenizer=tokenizer, calibrator=calibrator)


# Labels


def relabelled(dataset, values, feature):
    """The data set with other words for its labels, which are named glad, sad and calm."""
    labels = [values[label] for label in dataset["label"]]
    features = Features({"text": Value("string"), "label": feature})
    return Dataset.from_dict({"text": dataset["text"][:], "label": labels}, features=features)


@pytest.mark.parametrize(
    ("values", "feature", "label_mapping"),
    [
        (["glad", "sad", "calm"], Value("string"), None),
        ([5, 7, 9], Value("int64"), {"glad": 5, "sad": 7, "calm": 9}),
        ([5, 7, 9], Value("int64"), {"glad": 5.0, "sad": 7.0, "calm": 9.0}),
        (["+", "-", "o"], Value("string"), {"glad": "+", "sad": "-", "calm": "o"}),
        ([2, 1, 0], ClassLabel(names=["o", "-", "+"]), {"glad": 2, "sad": 1, "calm": 0}),
        ([2, 1, 0], ClassLabel(names=["o", "-", "+"]), {"glad": "+", "sad": "-", "calm": "o"}),
        ([2, 1, 0], ClassLabel(names=["2", "1", "0"]), {"glad": 2, "sad": 1, "calm": 0}),
    ],
)
def test_labels_are_matched_by_name_or_by_mapping(
    values, feature, label_mapping, evaluator, scores, classifier, tokenizer, labelled_texts
):
    dataset = relabelled(labelled_texts, values, feature)
    found = evaluator.compute(classifier, dataset, tokenizer=tokenizer, label_mapping=label_mapping)
    assert without_timing(found) == scores(labelled_texts)


@pytest.mark.parametrize(
    ("label_mapping", "message"),
    [
        (
            None,
            r"label: the model has no label 5; .*, calm, glad\]; say which is which by label_mapping, such",
        ),
        ({"glad": 5, "sad": 5}, r"label_mapping: got \{'glad': 5, 'sad': 5\}; allowed is another value for every"),
        ({"happy": 5}, "label_map: got 5=happy; allowed is a label of the data set = one of the model's"),
    ],
)
def test_labels_without_a_match_are_refused(label_mapping, message, evaluator, classifier, tokenizer, labelled_texts):
    dataset = relabelled(labelled_texts, [5, 7, 9], Value("int64"))
    with pytest.raises(ValueError, match=f"^{message}"):
        evaluator.compute(classifier, dataset, tokenizer=tokenizer, label_mapping=label_mapping)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "got problem_type='multi_label_classification' and labels"),
        ({"id2label": {0: "a", 1: "b", 2: "a"}}, r"got problem_type=None and labels \['a', 'b', 'a'\]; allowed is"),
    ],
)
def test_other_classifiers_are_refused(changes, message, evaluator, classifier, tokenizer, labelled_texts):
    for name, value in changes.items():
        setattr(classifier.config, name, value)
    with pytest.raises(ValueError, match=f"^model_or_pipeline: {message}"):
        evaluator.compute(classifier, labelled_texts, tokenizer=tokenizer)


def test_other_pipelines_are_refused(evaluator, classifier, tokenizer, labelled_texts):
    zero_shot = pipeline("zero-shot-classification", model=classifier, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"^model_or_pipeline: got zero-shot-classification; allowed are a text"):
        evaluator.compute(zero_shot, labelled_texts)
    with pytest.raises(ValueError, match=r"^model_or_pipeline: got NoneType; allowed are a text-classification pipe"):
        evaluator.compute(None, labelled_texts)


def test_columns_that_are_not_there_are_refused(evaluator, classifier, tokenizer, labelled_texts):
    with pytest.raises(ValueError, match="Invalid `input_column` sentence specified"):
        evaluator.compute(classifier, labelled_texts, tokenizer=tokenizer, input_column="sentence")
