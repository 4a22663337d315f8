"""An attached calibrator: calibrated `outputs.logits`, and everything else as it was."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)

from hf_calib import (
    AutoCalibrator,
    IsotonicCalibration,
    TemperatureScaling,
    attach_calibrator,
    attached_calibrator,
    collect_predictions,
    detach_calibrator,
    fold_calibrator,
    load_calibrated,
    uncalibrated,
)


@pytest.fixture(params=["temperature", "isotonic"])
def calibrator(request, temperature):
    if request.param == "temperature":
        return temperature
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, 3, generator=generator)
    return IsotonicCalibration().fit(logits, torch.randint(3, (200,), generator=generator))


@pytest.fixture
def attached(classifier, calibrator):
    return attach_calibrator(classifier, calibrator)


@torch.no_grad()
def logits_of(model, tokens):
    return model(**tokens).logits


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- what the model returns


def test_it_is_the_same_object_with_calibrated_logits(classifier, calibrator, tokens):
    raw = logits_of(classifier, tokens)
    assert attach_calibrator(classifier, calibrator) is classifier
    assert torch.equal(logits_of(classifier, tokens), calibrator(raw))
    assert not torch.equal(calibrator(raw), raw)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 0])])
def test_dictionaries_and_tuples_are_calibrated_and_the_loss_is_not(labels, classifier, calibrator, tokens):
    options = {**tokens, "labels": labels, "output_hidden_states": True}
    with torch.no_grad():
        raw = classifier(**options)
        attach_calibrator(classifier, calibrator)
        found, found_tuple = classifier(**options), classifier(**options, return_dict=False)
    assert torch.equal(found.logits, calibrator(raw.logits))
    assert torch.equal(found["logits"], found.logits)
    assert found.keys() == raw.keys()
    assert len(found_tuple) == len(found)
    for one, other in zip(found.to_tuple(), found_tuple, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    if labels is not None:
        assert torch.equal(found.loss, raw.loss)


def test_a_stock_pipeline_gives_calibrated_scores(attached, calibrator, tokenizer, labelled_texts):
    texts = labelled_texts["text"][:]
    classify = pipeline("text-classification", model=attached, tokenizer=tokenizer)
    rows = classify(texts, top_k=None, batch_size=7)
    found = torch.tensor(
        [[{e["label"]: e["score"] for e in row}[name] for name in ("sad", "calm", "glad")] for row in rows]
    )
    predictions = collect_predictions(attached, labelled_texts, processing_class=tokenizer)
    torch.testing.assert_close(found, calibrator.log_probs(predictions.logits).exp(), rtol=0, atol=1e-5)
    assert (found - predictions.probs).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_calibrator_keeps_its_precision_when_the_model_is_cast(dtype, classifier, calibrator, tokens):
    attach_calibrator(classifier, calibrator).to(dtype)
    kept = attached_calibrator(classifier).tensors()
    assert all(torch.equal(kept[name], tensor) for name, tensor in calibrator.tensors().items())
    assert all(kept[name].dtype == tensor.dtype for name, tensor in calibrator.tensors().items())
    found = logits_of(classifier, tokens)
    assert found.dtype == dtype
    with uncalibrated(classifier):
        assert torch.equal(found, calibrator(logits_of(classifier, tokens)))


def test_a_compiled_model_is_calibrated_in_one_graph(attached, tokens):
    expected = logits_of(attached, tokens)
    compiled = torch.compile(attached, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits_of(compiled, tokens), expected, rtol=1e-5, atol=1e-5)
    with uncalibrated(compiled):
        raw = logits_of(compiled, tokens)
    with uncalibrated(attached):
        torch.testing.assert_close(raw, logits_of(attached, tokens), rtol=1e-5, atol=1e-5)


# -- suspending and detaching


def test_suspensions_nest_and_end_on_exceptions(attached, tokens):
    calibrated = logits_of(attached, tokens)
    with uncalibrated(attached) as same:
        assert same is attached
        raw = logits_of(attached, tokens)
        with pytest.raises(KeyboardInterrupt), uncalibrated(attached):
            raise KeyboardInterrupt
        assert torch.equal(logits_of(attached, tokens), raw)
    assert torch.equal(logits_of(attached, tokens), calibrated)
    assert not torch.equal(raw, calibrated)


def test_a_model_without_a_calibrator_can_be_suspended(classifier, tokens):
    with uncalibrated(classifier):
        logits_of(classifier, tokens)


def test_detaching_gives_the_plain_model_back(classifier, calibrator, tokens, tmp_path):
    before, names = logits_of(classifier, tokens), set(vars(classifier))
    assert detach_calibrator(attach_calibrator(classifier, calibrator)) is classifier
    assert torch.equal(logits_of(classifier, tokens), before)
    assert set(vars(classifier)) == names
    assert attached_calibrator(classifier) is None
    classifier.save_pretrained(tmp_path)
    assert sorted(state(tmp_path)) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="model: no calibrator is attached"):
        detach_calibrator(classifier)
    attach_calibrator(classifier, calibrator)


# -- the object


def test_no_key_reaches_the_weights(classifier, calibrator):
    before = list(classifier.state_dict()), [name for name, _ in classifier.named_parameters()]
    attach_calibrator(classifier, calibrator)
    assert (list(classifier.state_dict()), [name for name, _ in classifier.named_parameters()]) == before


def test_the_model_has_a_copy_that_knows_its_labels(classifier, temperature):
    attach_calibrator(classifier, temperature)
    assert temperature.label_names is None
    assert attached_calibrator(classifier).label_names == ["sad", "calm", "glad"]
    temperature.temperature.fill_(9)
    assert attached_calibrator(classifier).temperature != 9


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent(duplicate, attached, tokens, tmp_path):
    calibrated = logits_of(attached, tokens)
    twin = duplicate(attached)
    assert torch.equal(logits_of(twin, tokens), calibrated)
    with torch.no_grad():
        twin.classifier.bias += 1
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_calibrated(tmp_path), tokens), logits_of(twin, tokens))
    detach_calibrator(twin)
    assert torch.equal(logits_of(attached, tokens), calibrated)
    assert not torch.equal(logits_of(twin, tokens), calibrated)


# -- saving


def test_a_plain_save_carries_the_calibrator(attached, calibrator, tokens, tmp_path):
    attached.save_pretrained(tmp_path)
    files = ["calibrator.json", "calibrator.safetensors", "config.json", "model.safetensors"]
    assert sorted(state(tmp_path)) == files
    assert torch.equal(logits_of(load_calibrated(tmp_path), tokens), logits_of(attached, tokens))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with uncalibrated(attached):
        assert torch.equal(logits_of(plain, tokens), logits_of(attached, tokens))


def test_a_save_that_would_push_without_the_calibrator_is_refused(attached, tmp_path):
    with pytest.raises(ValueError, match=r"push_to_hub: got True.*model.push_to_hub\(repo_id\)"):
        attached.save_pretrained(tmp_path, push_to_hub=True)
    assert not state(tmp_path)


def test_other_processes_than_the_main_one_write_nothing(attached, tmp_path):
    attached.save_pretrained(tmp_path, is_main_process=False)
    assert "calibrator.json" not in state(tmp_path)


# -- refusals


def for_labels(num_labels, names=None):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_labels, (50,), generator=generator)
    calibrator = TemperatureScaling().fit(
        torch.randn(50, num_labels, generator=generator) + 2 * torch.eye(num_labels)[labels], labels
    )
    calibrator.label_names = names
    return calibrator


OWN = r"allowed are the model's labels \['sad', 'calm', 'glad'\]"


@pytest.mark.parametrize("apply", [attach_calibrator, fold_calibrator])
@pytest.mark.parametrize(
    ("calibrator", "message"),
    [
        (TemperatureScaling(), "calibrator: got a TemperatureScaling that is not fitted"),
        (for_labels(4), f"calibrator: it was fitted for 4 unnamed labels; {OWN}"),
        (for_labels(3, ["glad", "calm", "sad"]), rf"fitted for \['glad', 'calm', 'sad'\]; {OWN}"),
    ],
)
def test_a_calibrator_of_something_else_is_refused(apply, calibrator, message, classifier, tokens):
    before = logits_of(classifier, tokens)
    with pytest.raises(ValueError, match=message):
        apply(classifier, calibrator)
    assert torch.equal(logits_of(classifier, tokens), before)


@pytest.mark.parametrize("apply", [attach_calibrator, fold_calibrator])
def test_a_model_is_calibrated_once(apply, classifier, temperature, tokens):
    attach_calibrator(classifier, temperature)
    before = logits_of(classifier, tokens)
    with pytest.raises(ValueError, match="model: a calibrator is attached to it already"):
        apply(classifier, temperature)
    assert torch.equal(logits_of(classifier, tokens), before)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("multi_label_classification", "calibrator: got task=None for a model of 3 labels .* allowed is task='multil"),
        ("regression", "model: got problem_type='regression'; allowed is classification"),
    ],
)
@pytest.mark.parametrize("apply", [attach_calibrator, fold_calibrator])
def test_other_problems_are_refused(apply, problem, message, classifier, temperature):
    classifier.config.problem_type = problem
    with pytest.raises(ValueError, match=f"^{message}"):
        apply(classifier, temperature)


def test_a_calibrator_of_labels_goes_on_a_model_of_labels(classifier, tokens):
    labels = torch.randint(2, (60, 3), generator=torch.Generator().manual_seed(0))
    calibrator = TemperatureScaling(task="multilabel").fit(torch.randn(60, 3) + labels, labels)
    with pytest.raises(ValueError, match=r"^calibrator: got task='multilabel' for a model of 3 labels with problem_t"):
        attach_calibrator(classifier, calibrator)
    before = logits_of(classifier, tokens)
    classifier.config.problem_type = "multi_label_classification"
    attach_calibrator(classifier, calibrator)
    assert torch.equal(logits_of(classifier, tokens), calibrator(before))


def test_a_calibrator_of_groups_is_not_attached(classifier, temperature):
    temperature.needs_groups = True
    with pytest.raises(ValueError, match=r"^calibrator: temperature needs the groups of rows, which a model is not"):
        attach_calibrator(classifier, temperature)


# -- PEFT


@pytest.fixture
def adapted():
    """Wraps a model into LoRA adapters that change its logits."""
    peft = pytest.importorskip("peft")

    def adapt(model):
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()

    return adapt


# peft 0.21 asks transformers 5.23 for a property by the name it had before
on_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@on_peft
def test_a_calibrator_is_seen_through_adapters_that_came_later(attached, adapted, calibrator, tokens):
    model = adapted(attached)
    found = logits_of(model, tokens)
    with uncalibrated(model):
        raw = logits_of(model, tokens)
    assert torch.equal(found, calibrator(raw))
    for apply in (attach_calibrator, fold_calibrator):
        with pytest.raises(ValueError, match="model: a calibrator is attached to it already"):
            apply(model, calibrator)
    assert torch.equal(logits_of(model, tokens), found)


@on_peft
def test_a_calibrator_is_attached_to_adapters(classifier, adapted, calibrator, tokenizer, labelled_texts, tokens):
    model = adapted(classifier)
    raw, collected = logits_of(model, tokens), collect_predictions(model, labelled_texts, processing_class=tokenizer)
    attach_calibrator(model, calibrator)
    assert torch.equal(logits_of(model, tokens), calibrator(raw))
    again = collect_predictions(model, labelled_texts, processing_class=tokenizer)
    assert torch.equal(again.logits, collected.logits)
    assert torch.equal(logits_of(detach_calibrator(model), tokens), raw)


@on_peft
def test_a_calibrator_is_not_folded_into_adapters(classifier, adapted, temperature, tokens):
    model = adapted(classifier)
    before = logits_of(model, tokens)
    with pytest.raises(ValueError, match="model: got PeftModelForSequenceClassification; allowed are"):
        fold_calibrator(model, temperature)
    assert torch.equal(logits_of(model, tokens), before)


def test_a_fresh_model_of_the_same_config_is_not_attached(attached, calibrator):
    attach_calibrator(BertForSequenceClassification(attached.config), calibrator)


# -- models that generate text


@pytest.fixture
def language_model():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)).eval()


def fitted_temperature(num_labels):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(300, num_labels, generator=generator)
    return TemperatureScaling().fit(logits, torch.multinomial((logits / 2).softmax(-1), 1, generator=generator)[:, 0])


def test_generation_is_calibrated(language_model, tmp_path):
    prompt, calibrator = torch.tensor([[5, 6, 7]]), fitted_temperature(50)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    raw = language_model.generate(prompt, **options)
    attach_calibrator(language_model, calibrator)
    calibrated = language_model.generate(prompt, **options)
    assert torch.equal(calibrated.sequences, raw.sequences)
    for ours, theirs in zip(calibrated.logits, raw.logits, strict=True):
        torch.testing.assert_close(ours, calibrator(theirs))

    language_model.save_pretrained(tmp_path)
    loaded = AutoCalibrator.from_pretrained(tmp_path)
    assert (loaded.num_labels, loaded.label_names) == (50, None)
    assert torch.equal(loaded.temperature, calibrator.temperature)


@pytest.mark.parametrize("num_labels", [2, 49])  # 2 is what a config says of labels that a language model has not
def test_a_calibrator_of_another_vocabulary_is_refused(num_labels, language_model):
    message = f"calibrator: it was fitted for {num_labels} classes; allowed are the model's 50 tokens"
    with pytest.raises(ValueError, match=message):
        attach_calibrator(language_model, fitted_temperature(num_labels))
