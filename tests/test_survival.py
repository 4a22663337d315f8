"""What a calibrator survives: export, compilation, wrappers, other devices, quantised weights, any history."""

import itertools
import time

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

from hf_calib import (
    CALIBRATORS,
    AutoCalibrator,
    TemperatureScaling,
    attach_calibrator,
    attached_calibrator,
    fold_calibrator,
    load_calibrated,
    save_calibrated,
    uncalibrated,
)
from hf_calib.attaching import folded_calibrator
from hf_calib.folding import remove_calibrator


APPLY = {"attached": attach_calibrator, "folded": fold_calibrator}


@torch.no_grad()
def logits_of(model, tokens):
    return model(**tokens).logits


def structured(num_labels=3):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(300, num_labels, generator=generator)
    labels = torch.multinomial((logits / 2 + torch.linspace(-1, 1, num_labels)).softmax(-1), 1, generator=generator)
    return CALIBRATORS["structured_vector"](foldable=True).fit(logits, labels[:, 0])


# -- export


# torch 2.13's exporter and the scripts that it brings warn of their own future
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("applied", APPLY)
def test_onnx_has_it(applied, classifier, tokens, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    calibrator = structured()
    wanted = calibrator.log_probs(logits_of(classifier, tokens)).exp()
    model = load_calibrated(save_calibrated(APPLY[applied](classifier, calibrator), tmp_path / "model"))
    inputs, path = (tokens["input_ids"], tokens["attention_mask"]), tmp_path / "model.onnx"
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
    torch.onnx.export(model, inputs, path, dynamo=True, verbose=False, **names)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(["logits"], {name: tokens[name].numpy() for name in names["input_names"]})
    torch.testing.assert_close(torch.from_numpy(found).softmax(-1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("applied", APPLY)
def test_torch_export_has_it(applied, classifier, temperature, tokens):
    APPLY[applied](classifier, temperature)
    exported = torch.export.export(classifier, (), tokens).module()
    torch.testing.assert_close(logits_of(exported, tokens), logits_of(classifier, tokens))


# -- wrappers, devices, weights


def test_data_parallel_training_sees_it(classifier, temperature, tokens, tmp_path):
    wanted = temperature(logits_of(classifier, tokens))
    attach_calibrator(classifier, temperature)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(classifier)
        output = wrapped(**tokens, labels=torch.tensor([0, 1, 2, 0]))
        output.loss.backward()
        torch.testing.assert_close(output.logits.detach(), wanted)
        assert all(parameter.grad is not None for parameter in classifier.classifier.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_weights_that_wait_on_disk_are_calibrated(classifier, temperature, tokens, tmp_path):
    wanted = temperature(logits_of(classifier, tokens))
    attach_calibrator(classifier, temperature).save_pretrained(tmp_path / "model")
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    loaded = load_calibrated(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(logits_of(loaded, tokens), wanted)
    with pytest.raises(ValueError, match="model: its weights are quantised or not in memory"):
        fold_calibrator(remove_calibrator(loaded), temperature)


def test_it_follows_the_logits_to_their_device(classifier, temperature):
    """The meta device stands for another one: nothing is computed there, but a wrong device is an error."""
    attached = attach_calibrator(classifier, temperature)._modules["hf_calib_calibrator"]
    assert attached(torch.ones(2, 3, device="meta")).device.type == "meta"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_weights_are_calibrated(classifier, temperature, tokens):
    quantised = torch.ao.quantization.quantize_dynamic(classifier, {nn.Linear}, dtype=torch.qint8)
    raw = logits_of(quantised, tokens)
    attach_calibrator(quantised, temperature)
    torch.testing.assert_close(logits_of(quantised, tokens), temperature(raw))


# -- pipelines


@pytest.mark.parametrize("applied", APPLY)
def test_zero_shot_classification_is_calibrated_pair_by_pair(applied, tokenizer):
    from .tiny import SPECIAL, make_classifier

    model = make_classifier(["entailment", "neutral", "contradiction"], len(SPECIAL) + 40)
    calibrator = structured()
    text, candidates = "w1 w2 w3", ["w4", "w5", "w6"]
    pairs = tokenizer([text] * 3, candidates, return_tensors="pt", padding=True)
    entailed = calibrator(logits_of(model, pairs))
    APPLY[applied](model, calibrator)
    options = {"hypothesis_template": "{}", "batch_size": 2}
    classify = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    found = classify(text, candidates, multi_label=True, **options)
    scores = dict(zip(found["labels"], found["scores"], strict=True))
    # of the pair's three classes, this pipeline looks at two
    wanted = entailed[:, [0, 2]].softmax(-1)[:, 0]
    torch.testing.assert_close(torch.tensor([scores[name] for name in candidates]), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("applied", APPLY)
def test_token_classification_is_calibrated(applied, tokenizer):
    from transformers import BertForTokenClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=44, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5, num_labels=3,
    )  # fmt: skip
    model, calibrator = BertForTokenClassification(config).eval(), structured()
    texts = ["w1 w2 w3", "w4 w5", "w6"]
    raw = [logits_of(model, tokenizer(text, return_tensors="pt"))[0, 1:-1] for text in texts]
    APPLY[applied](model, calibrator)
    tag = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    found = [
        [entry["score"] for entry in row if entry["word"] not in ("[CLS]", "[SEP]")]
        for row in tag(texts, batch_size=2)
    ]
    wanted = [calibrator.log_probs(logits).exp().amax(-1) for logits in raw]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("applied", APPLY)
def test_image_classification_is_calibrated(applied):
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    try:
        from transformers import ViTImageProcessorPil as Processor
    except ImportError:  # in older releases it has the plain name
        from transformers import ViTImageProcessor as Processor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    model, calibrator, processor = ViTForImageClassification(config).eval(), structured(), Processor(size=8)
    pixels = torch.randint(256, (3, 8, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = [Image.fromarray(each.numpy()) for each in pixels]
    wanted = calibrator.log_probs(logits_of(model, processor(images, return_tensors="pt"))).exp()
    APPLY[applied](model, calibrator)
    classify = pipeline("image-classification", model=model, image_processor=processor)
    for found, probs in zip(classify(images, top_k=None, batch_size=2), wanted, strict=True):
        scores = {entry["label"]: entry["score"] for entry in found}
        assert [scores[f"LABEL_{index}"] for index in range(3)] == pytest.approx(probs.tolist(), abs=1e-5)
    assert len(classify(images, top_k=2)[0]) == 2


# -- history


def save_and_load(model, folder):
    return load_calibrated(save_calibrated(model, folder / "model", overwrite=True))


def attach_again(model, folder):
    calibrator = attached_calibrator(model) or folded_calibrator(model)
    return attach_calibrator(remove_calibrator(model), calibrator)


def fold_again(model, folder):
    calibrator = attached_calibrator(model) or folded_calibrator(model)
    return fold_calibrator(remove_calibrator(model), calibrator)


def calibrate_again(model, folder):
    """The same calibrator from a file, which a new fit on the same rows would give."""
    calibrator = attached_calibrator(model) or folded_calibrator(model)
    calibrator.save_pretrained(folder / "calibrator")
    return attach_calibrator(remove_calibrator(model), AutoCalibrator.from_pretrained(folder / "calibrator"))


def train_on(model, folder):
    """Steps that change the weights and lead back."""
    with uncalibrated(model):
        for step in (0.01, -0.01):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(step)
    return model


STEPS = (save_and_load, attach_again, fold_again, calibrate_again, train_on)


@pytest.mark.filterwarnings("ignore:.*the calibrator was fitted for other weights")  # rightly, after training
@pytest.mark.parametrize("first", APPLY)
def test_in_any_order_it_is_applied_once(first, classifier, tokens, tmp_path):
    calibrator = structured()
    wanted = calibrator.log_probs(logits_of(classifier, tokens)).exp()
    raw = classifier.state_dict()
    raw = {name: tensor.clone() for name, tensor in raw.items()}
    for number, steps in enumerate(itertools.permutations(STEPS, 3)):
        classifier.load_state_dict(raw)
        model = APPLY[first](classifier, calibrator)
        for step in steps:
            model = step(model, tmp_path / str(number))
        found = logits_of(model, tokens).softmax(-1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, msg=str([step.__name__ for step in steps]))
        classifier = remove_calibrator(model)


# -- time


@pytest.mark.parametrize("num_labels", [2, 1000])
def test_the_calibrators_own_time_is_at_most_a_hundredth_of_the_models(num_labels):
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}  # a third of BERT's: less time
    model = BertForSequenceClassification(BertConfig(num_labels=num_labels, **sizes)).eval()
    logits = torch.randn(200, num_labels)
    labels = torch.multinomial((logits / 2).softmax(-1), 1)[:, 0]
    ids = torch.randint(1000, (32, 128))
    with torch.inference_mode():
        of_model = seconds_of(lambda: model(ids))
        attach_calibrator(model, TemperatureScaling().fit(logits, labels))
        attached, rows = model._modules["hf_calib_calibrator"], torch.randn(32, num_labels)
        of_calibrator = seconds_of(lambda: attached(rows))
    print(f"{num_labels} labels: model {of_model:.3f} s, calibrator {1e6 * of_calibrator:.0f} us")
    assert of_calibrator <= 0.01 * of_model


def seconds_of(run):
    """The median of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[1]
