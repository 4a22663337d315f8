"""Collected predictions are the model's own logits, with labels that mean what they say."""

import copy
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from hf_calib import (
    IdentityCalibration,
    attach_calibrator,
    collect_predictions,
    fold_calibrator,
    load_calibrated,
    save_calibrated,
)
from hf_calib.predictions import Predictions, average_predictions


SHUFFLED = ["glad", "sad", "calm"]  # the names of the fixture's ClassLabel, in its order


@pytest.fixture
def collect(classifier, tokenizer, labelled_texts):
    """`collect_predictions` of the fixtures, whatever else is asked for."""

    def collect(dataset=labelled_texts, model=classifier, **options):
        return collect_predictions(model, dataset, **{"processing_class": tokenizer, **options})

    return collect


def rows(text=("w1 w2", "w3"), label=("sad", "glad"), **columns):
    return datasets.Dataset.from_dict({"text": list(text), "label": list(label), **columns})


def own_logits(model, tokenizer, *texts):
    """One row at a time, so without padding."""
    with torch.no_grad():
        return torch.cat([model(**tokenizer(*row, return_tensors="pt")).logits for row in zip(*texts, strict=True)])


class Calls:
    """Counts a model's forward passes and interrupts before the pass of number `stop_at`."""

    def __init__(self, model, stop_at=None):
        self.count, self.stop_at = 0, stop_at
        model.register_forward_pre_hook(self)

    def __call__(self, model, args):
        if self.count == self.stop_at:
            raise KeyboardInterrupt
        self.count += 1


def state(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# -- logits


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_logits_are_the_models_own_in_the_order_of_the_rows(
    batch_size, collect, classifier, tokenizer, labelled_texts
):
    found = collect(batch_size=batch_size)
    assert found.logits.dtype == torch.float32
    assert len(found) == len(labelled_texts)
    expected = own_logits(classifier, tokenizer, labelled_texts["text"])
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.probs, expected.softmax(-1), rtol=1e-5, atol=1e-5)


def test_a_sentence_pair_is_read_from_two_columns(collect, classifier, tokenizer, labelled_texts):
    texts, reversed_texts = labelled_texts["text"][:], labelled_texts["text"][::-1]
    found = collect(labelled_texts.add_column("other", reversed_texts), text_column=["text", "other"])
    expected = own_logits(classifier, tokenizer, texts, reversed_texts)
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)


def test_a_longer_text_than_the_model_reads_is_cut(collect, classifier):
    roberta = RobertaForSequenceClassification(
        RobertaConfig.from_dict({**classifier.config.to_dict(), "model_type": "roberta", "pad_token_id": 1})
    )
    dataset = rows(text=["w1 " * 100, "w1 " * 50])
    for model in (classifier, roberta):  # RoBERTa numbers its positions from pad_token_id + 1
        assert torch.equal(*collect(dataset, model.eval()).logits)


@pytest.mark.parametrize("said", [{}, {"max_position_embeddings": -1}], ids=["T5 says nothing", "XLNet says -1"])
def test_a_tokenizer_and_a_model_without_limit_cut_nothing(said, collect, classifier, tokenizer):
    torch.manual_seed(0)
    sizes = {"vocab_size": 44, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = {"eos_token_id": tokenizer.sep_token_id, "pad_token_id": 0, "decoder_start_token_id": 0}
    config = T5Config(**sizes, **ids, id2label=classifier.config.id2label, **said)
    model, texts = T5ForSequenceClassification(config).eval(), ["w1 w2 " * 50, "w1 w2 " * 51]
    expected = own_logits(model, tokenizer, texts)
    torch.testing.assert_close(collect(rows(text=texts), model).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(*expected)


@pytest.mark.parametrize("training", [True, False])
def test_every_part_of_the_model_is_left_in_its_mode(training, collect, classifier):
    classifier.train(training).bert.embeddings.eval()
    before = [module.training for module in classifier.modules()]
    first, second = collect().logits, collect().logits
    assert torch.equal(first, second)
    assert [module.training for module in classifier.modules()] == before


def test_an_attached_calibrator_is_suspended(collect, classifier, temperature, tokens):
    raw = collect().logits
    attach_calibrator(classifier, temperature)
    calibrated = classifier(**tokens).logits
    assert torch.equal(collect().logits, raw)
    assert torch.equal(classifier(**tokens).logits, calibrated)


@pytest.mark.parametrize("name", ["temperature", "identity"])
def test_a_folded_calibrator_is_undone(name, collect, classifier, temperature, tokens, tmp_path):
    raw, own = collect(), classifier(**tokens).logits
    calibrator = temperature if name == "temperature" else IdentityCalibration().fit(raw.logits, raw.labels)
    fold_calibrator(classifier, calibrator)
    assert torch.equal(classifier(**tokens).logits, own) == (name == "identity")
    torch.testing.assert_close(collect().logits, raw.logits, rtol=0, atol=1e-5)
    loaded = load_calibrated(save_calibrated(classifier, tmp_path / "model"))
    torch.testing.assert_close(collect(model=loaded).logits, raw.logits, rtol=0, atol=1e-5)
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"^model: it has a calibrator in its weights; .*hf_calib\.load_calibrated.*$"
    ):
        collect(model=plain)


def test_a_config_that_asks_for_tuples_changes_nothing(collect, classifier):
    expected = collect().logits
    classifier.config.return_dict = False
    assert torch.equal(collect().logits, expected)


def test_the_default_tokenizer_lies_beside_the_model(collect, classifier, tokenizer, tmp_path):
    classifier.save_pretrained(tmp_path)
    alone = BertForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"processing_class: the tokenizer of .* knows special tokens only"):
        collect(model=alone, processing_class=None)  # transformers makes an empty tokenizer up
    with pytest.raises(ValueError, match="processing_class: got None and found no tokenizer"):
        collect(processing_class=None)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(collect(model=alone, processing_class=None).logits, collect().logits)


# -- labels


def test_class_labels_are_matched_by_name(collect, classifier, labelled_texts):
    found = collect()
    assert found.label_names == ["sad", "calm", "glad"]
    assert [found.label_names[label] for label in found.labels] == [SHUFFLED[i] for i in labelled_texts["label"]]


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_the_format_of_the_data_set_changes_nothing(kind, collect, labelled_texts):
    found, expected = collect(labelled_texts.with_format(kind)), collect()
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize(
    ("label", "label_map", "expected"),
    [
        (["glad", "sad"], None, [2, 0]),
        (["happy", "sad"], {"happy": "glad"}, [2, 0]),
        ([7, 1], {"7": "glad", "1": "sad"}, [2, 0]),
    ],
    ids=["strings", "mapped strings", "mapped integers"],
)
def test_labels_of_other_columns(label, label_map, expected, collect):
    found = collect(rows(label=label), label_map=label_map)
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == expected


def name_labels(model, names):
    model.config.id2label = dict(enumerate(names))


def test_numbers_are_the_ids_of_a_model_without_names(collect, classifier):
    name_labels(classifier, ["LABEL_0", "LABEL_1", "LABEL_2"])
    for label in ([2, 0], ["2", "0"], ["LABEL_2", "LABEL_0"]):
        assert collect(rows(label=label)).labels.tolist() == [2, 0]
    assert collect(class_labels([0, 1], ["2", "0"])).labels.tolist() == [2, 0]
    assert collect(rows(label=[1, 0]), label_map={"1": "LABEL_2"}).labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match="the model has no label 3"):
        collect(rows(label=[3, 0]))


@pytest.mark.parametrize("names", [["1", "0", "2"], [1, 0, 2]])
def test_numbers_are_names_where_the_model_has_such(names, collect, classifier):
    name_labels(classifier, names)
    for label in ([0, 1], ["0", "1"]):
        found = collect(rows(label=label))
        assert found.labels.tolist() == [1, 0]
        assert found.label_names == ["1", "0", "2"]
    with pytest.raises(
        ValueError, match=r"the model has no label 3; the data set has \[0, 3\], the model has \[1, 0, 2\]"
    ):
        collect(rows(label=[0, 3]))


def test_a_label_map_may_name_what_a_split_lacks(collect):
    label_map = {"happy": "glad", "unhappy": "sad"}
    assert collect(rows(label=["happy", "happy"]), label_map=label_map).labels.tolist() == [2, 2]
    assert collect(rows(label=[1, 1]), label_map={0: "sad", 1: "glad"}).labels.tolist() == [2, 2]


def class_labels(values, names):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": ["w1"] * len(values), "label": values}, features=features)


BOTH_LISTS = r"data set has \[sad, happy\], the model has \[sad, calm, glad\]"
REMEDY = r"; say which is which by label_map, such as \{'neg': 'NEGATIVE'\} \(--label-map neg=NEGATIVE\)$"
UNLABELLED = "label: row 1 and 1 more have no label; leave such rows out$"


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (class_labels([0, 1], ["sad", "happy"]), {}, BOTH_LISTS + REMEDY),
        (
            rows(),
            {"label_map": {"glad": "jolly"}},
            "label_map: got glad=jolly; allowed is a label of the data set = one",
        ),
        (rows(label=["sad", None]), {}, "^label: row 1 has no label; leave such rows out$"),
        (class_labels([0, 1], ["sad", "happy"]), {"label_map": {"happy": "jolly"}}, "label_map: got happy=jolly"),
        (class_labels([0, 1], ["sad", "happy"]), {"label_map": {"merry": "glad"}}, "label_map: got merry=glad"),
        (rows(label=["sad", "meh"]), {}, r"label: the model has no label 'meh'.*\[meh, sad\].*\[sad, calm, glad\]"),
        (rows(label=[0, 1]), {}, r"label: the model has no label 0.*\[0, 1\].*\[sad, calm, glad\]"),
        (class_labels([0, -1, -1], SHUFFLED), {}, UNLABELLED),
        (class_labels([0, None, None], SHUFFLED), {}, UNLABELLED),
        (rows(text=["w1"] * 3, label=["sad", None, None]), {}, UNLABELLED),
        (
            rows(label=[["sad", "calm"], ["glad"]]),
            {},
            "label: got List.*allowed are a ClassLabel, strings or integers",
        ),
        (rows(label=[0.0, 1.0]), {}, "label: got Value.*allowed are a ClassLabel, strings or integers"),
        (rows(), {"text_column": "sentence"}, "no 'sentence'; it has text, label"),
        (rows(), {"label_column": "target"}, "no 'target'; it has text, label"),
        (rows(), {"text_column": ["text", "text", "text"]}, "text_column: got 3 columns; allowed are one, or the two"),
        (rows(), {"text_column": []}, "text_column: got 0 columns"),
        (rows(text=["w1", None]), {}, "text: row 1 is None; allowed are strings"),
        (rows(text=[1, 2]), {}, "text: row 0 is 1; allowed are strings"),
        (rows().select([]), {}, "dataset: got 0 rows"),
        (datasets.DatasetDict(test=rows()), {}, "dataset: got DatasetDict; allowed is one split"),
        (rows().to_iterable_dataset(), {}, "dataset: got IterableDataset; allowed is one split"),
        ([{"text": "w1", "label": "sad"}], {}, "dataset: got list; allowed is one split"),
        *((rows(), {"batch_size": size}, f"batch_size: got {size}; allowed") for size in (0, -1, 2.0, True)),
    ],
)
def test_wrong_data_is_refused_by_one_line(dataset, options, message, collect):
    with pytest.raises(ValueError, match=message) as caught:
        collect(dataset, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_text_without_tokens_is_refused(collect, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = processors.Sequence([])  # adds no [CLS] and [SEP]
    with pytest.raises(ValueError, match="text: row 1 has no tokens"):
        collect(rows(text=["w1", ""]), processing_class=plain)


# -- models


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type='multi_label_classification' with 3 labels"),
        ({"problem_type": "regression"}, "problem_type='regression'"),
        ({"id2label": {0: "score"}}, "with 1 labels"),
    ],
)
def test_other_problems_are_refused(changes, message, collect, classifier):
    for name, value in changes.items():
        setattr(classifier.config, name, value)
    with pytest.raises(ValueError, match=message):
        collect()


def test_other_heads_are_refused(collect, classifier):
    with pytest.raises(ValueError, match="model: got BertForTokenClassification; allowed are"):
        collect(model=BertForTokenClassification(classifier.config))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused(value, collect, classifier):
    with torch.no_grad():
        classifier.classifier.bias[1] = value
    with pytest.raises(ValueError, match="logits: the model returned NaN or infinite values"):
        collect()


# -- in a folder


def test_an_interrupted_collection_goes_on_where_it_stopped(collect, classifier, tmp_path):
    expected = collect(batch_size=4)
    calls = Calls(classifier, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        collect(batch_size=4, output_dir=tmp_path)
    assert calls.count == 3
    calls.count, calls.stop_at = 0, None
    found = collect(batch_size=4, output_dir=tmp_path)
    assert calls.count == 8 - 3
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.labels, expected.labels)


def test_a_finished_folder_is_read_back_without_the_model(collect, classifier, tmp_path):
    first = collect(output_dir=tmp_path / "new" / "folder")
    calls = Calls(classifier)
    again = collect(output_dir=tmp_path / "new" / "folder", batch_size=5)
    assert calls.count == 0
    assert torch.equal(again.logits, first.logits)
    assert first.fingerprint() == again.fingerprint() == collect().fingerprint()


def test_logits_of_a_folder_are_memory_mapped_and_safe_from_their_user(collect, tmp_path, monkeypatch):
    modes, load = [], np.load
    monkeypatch.setattr(
        np, "load", lambda *args, mmap_mode: modes.append(mmap_mode) or load(*args, mmap_mode=mmap_mode)
    )
    found = collect(output_dir=tmp_path)
    assert modes[-1] == "c"
    before = state(tmp_path)
    found.logits.mul_(2)
    assert state(tmp_path) == before


def test_a_folder_that_holds_something_else_is_refused_and_kept(collect, classifier, labelled_texts, tmp_path):
    collect(output_dir=tmp_path)
    before = state(tmp_path)

    def refused(**options):
        with pytest.raises(ValueError, match=r"output_dir: got .*, which holds something else"):
            collect(output_dir=tmp_path, **options)
        return state(tmp_path) == before

    assert refused(dataset=labelled_texts.select(range(29)))
    assert refused(dataset=labelled_texts.select([1, 0, *range(2, 30)]))
    with torch.no_grad():
        classifier.classifier.bias[0] += 1e-3
    assert refused()
    (tmp_path / "progress.json").write_text('{"requ')
    before["progress.json"] = b'{"requ'
    assert refused()
    (tmp_path / "progress.json").unlink()
    before.pop("progress.json")
    assert refused()


def test_a_folder_is_of_one_config_wherever_the_model_lies(collect, classifier, tmp_path):
    first = collect(output_dir=tmp_path / "rows")
    for name in ("here", "there"):
        classifier.save_pretrained(tmp_path / name)
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / name)
        calls = Calls(loaded)
        assert torch.equal(collect(model=loaded, output_dir=tmp_path / "rows").logits, first.logits)
        assert calls.count == 0
    other = BertForSequenceClassification.from_pretrained(tmp_path / "here", hidden_act="relu")
    with pytest.raises(ValueError, match="which holds something else"):
        collect(model=other, output_dir=tmp_path / "rows")


def test_a_folder_is_of_one_folded_calibrator(collect, classifier, temperature, tmp_path):
    fold_calibrator(classifier, temperature)
    first = collect(output_dir=tmp_path)
    assert torch.equal(collect(output_dir=tmp_path).logits, first.logits)
    classifier._hf_calib_folded.temperature.mul_(2)  # the same weights, said to come from others
    with pytest.raises(ValueError, match="which holds something else"):
        collect(output_dir=tmp_path)


DAMAGES = {
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 40),
    "without values": lambda path: os.truncate(path, 128),
    "empty": lambda path: os.truncate(path, 0),
    "of another shape": lambda path: np.save(path, np.zeros((30, 2), np.float32)),
    "of another dtype": lambda path: np.save(path, np.zeros((30, 3))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_logits_are_refused_and_kept(damage, collect, tmp_path):
    collect(output_dir=tmp_path)
    damage(tmp_path / "logits.npy")
    before = state(tmp_path)
    with pytest.raises(ValueError, match=r"output_dir: got .* damaged files; allowed are"):
        collect(output_dir=tmp_path)
    assert state(tmp_path) == before


@pytest.mark.parametrize("stage", [0, 1])
def test_an_interruption_between_the_files_leaves_a_folder_that_goes_on(stage, collect, tmp_path, monkeypatch):
    expected, replace = collect(), os.replace

    def stop(source, target):
        if len(state(tmp_path)) > stage:  # both of the files come under another name first
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        collect(output_dir=tmp_path)
    monkeypatch.undo()
    assert len(state(tmp_path)) == stage + 1
    assert torch.equal(collect(output_dir=tmp_path).logits, expected.logits)
    assert sorted(state(tmp_path)) == ["logits.npy", "progress.json"]


@pytest.mark.parametrize("name", ["logits.npy", "partial-logits.npy", "notes.txt"])
def test_files_of_others_are_kept(name, collect, tmp_path):
    (tmp_path / name).write_text("mine")
    for folder in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="which holds something else"):
            collect(output_dir=folder)
    assert state(tmp_path) == {name: b"mine"}


# -- the fingerprint


def test_the_fingerprint_is_of_every_logit_and_label():
    logits = torch.arange(6.0).reshape(3, 2)
    one = Predictions(logits, torch.tensor([0, 1, 0]), ["a", "b"])
    assert one.fingerprint() == "4cce9b1c534811bb"
    others = [
        Predictions(logits + torch.eye(3, 2), one.labels, one.label_names),
        Predictions(logits, torch.tensor([0, 1, 1]), one.label_names),
        Predictions(logits[[1, 0, 2]], one.labels, one.label_names),
    ]
    assert one.fingerprint() not in [other.fingerprint() for other in others]
    strided = Predictions(logits.T.contiguous().T, one.labels, one.label_names)
    assert strided.fingerprint() == one.fingerprint()


# -- passes with dropout, and ensembles


@pytest.fixture
def dropping(classifier):
    """The classifier with half of its hidden units dropped in training."""
    for module in classifier.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    return classifier


def test_nothing_drops_out_of_a_single_pass(collect, dropping):
    assert torch.equal(collect(model=dropping).logits, collect(model=dropping).logits)


def test_passes_are_the_mean_of_what_dropout_leaves(collect, dropping):
    one, many = collect(model=dropping, passes=1), collect(model=dropping, passes=300)
    assert not torch.allclose(one.probs, collect(model=dropping).probs, atol=0.01)
    assert torch.allclose(many.logits.exp().sum(-1), torch.ones(len(many)), atol=1e-5)
    others = [collect(model=dropping, passes=1, seed=1000 * number).probs for number in range(300)]
    assert (many.probs - torch.stack(others).mean(0)).abs().max() < 0.1
    assert (one.probs - many.probs).abs().max() > 0.1
    assert not any(module.training for module in dropping.modules())


def test_the_seed_decides_what_drops_and_leaves_the_generator_alone(collect, dropping):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = [collect(model=dropping, passes=2, seed=seed).logits for seed in (3, 3, 4)]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_interrupted_collection_of_passes_goes_on_as_if_it_had_not_been(collect, dropping, tmp_path):
    expected = collect(model=dropping, passes=3, batch_size=4).logits
    interrupted = copy.deepcopy(dropping)
    Calls(interrupted, stop_at=7)
    with pytest.raises(KeyboardInterrupt):
        collect(model=interrupted, passes=3, batch_size=4, output_dir=tmp_path / "found")
    assert not any(module.training for module in interrupted.modules())
    assert torch.equal(collect(model=dropping, passes=3, batch_size=4, output_dir=tmp_path / "found").logits, expected)
    with pytest.raises(ValueError, match=r"output_dir: got .*, which holds something else"):
        collect(model=dropping, passes=4, batch_size=4, output_dir=tmp_path / "found")


@pytest.mark.parametrize("passes", [-1, 1.0, True, "2"])
def test_numbers_of_passes_that_are_refused(passes, collect):
    with pytest.raises(ValueError, match=f"passes: got {passes!r}; allowed are integers from 1 up"):
        collect(passes=passes)


def test_an_ensemble_is_the_mean_of_probabilities(collect):
    first = collect()
    second = Predictions(first.logits.flip(-1), first.labels, first.label_names)
    mean = average_predictions([first, second])
    torch.testing.assert_close(mean.probs, (first.probs + second.probs) / 2)
    torch.testing.assert_close(average_predictions([first]).probs, first.probs)
    assert torch.equal(mean.labels, first.labels)
    other = Predictions(first.logits, first.labels.flip(0), first.label_names)
    with pytest.raises(ValueError, match="predictions: number 1 is of other rows or labels than the first"):
        average_predictions([first, other])
    with pytest.raises(ValueError, match="predictions: got none; allowed"):
        average_predictions([])
