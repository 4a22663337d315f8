"""PEFT: a calibrator travels with the adapters, through whatever wraps what."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_calib import (
    TemperatureScaling,
    attach_calibrator,
    attached_calibrator,
    detach_calibrator,
    fold_calibrator,
    load_calibrated,
    save_calibrated,
    uncalibrated,
)


peft = pytest.importorskip("peft")
# peft 0.21 asks transformers 5.23 for a property by the name it had before
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "calibrator.json", "calibrator.safetensors"}


@torch.no_grad()
def logits_of(model, tokens):
    return model(**tokens).logits


def adapt(model, task="SEQ_CLS", target="query"):
    options = {"init_lora_weights": False, "fan_in_fan_out": target == "c_attn"}  # as GPT-2's layers have it
    return peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules=[target], **options)).eval()


@pytest.fixture
def base(classifier, tmp_path):
    """A model of two nameless labels in a folder: the adapters bring a head of three."""
    classifier.bert.save_pretrained(tmp_path / "base")
    names = {"id2label": classifier.config.id2label, "label2id": classifier.config.label2id}
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **names)


@pytest.fixture(params=["attached last", "attached first"])
def adapted(request, base, temperature):
    if request.param == "attached last":
        return attach_calibrator(adapt(base), temperature)
    return adapt(attach_calibrator(base, temperature))


def test_the_calibrator_travels_with_the_adapters(adapted, temperature, tokens, tmp_path):
    folder = save_calibrated(adapted, tmp_path / "adapters")
    assert {path.name for path in folder.iterdir()} == FILES
    loaded = load_calibrated(folder)
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    assert torch.equal(logits_of(loaded, tokens), logits_of(adapted, tokens))
    with uncalibrated(loaded):
        raw = logits_of(loaded, tokens)
    plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    assert torch.equal(logits_of(plain, tokens), raw)
    assert torch.equal(logits_of(loaded, tokens), temperature(raw))
    assert loaded.config.id2label == {0: "sad", 1: "calm", 2: "glad"}
    record = json.loads((folder / "calibrator.json").read_text())
    assert (record["applied"], record["label_names"]) == ("attached", ["sad", "calm", "glad"])


def test_a_plain_save_of_the_adapters_carries_it_too(base, temperature, tokens, tmp_path):
    adapted = attach_calibrator(adapt(base), temperature)
    adapted.save_pretrained(tmp_path / "adapters")
    assert torch.equal(logits_of(load_calibrated(tmp_path / "adapters"), tokens), logits_of(adapted, tokens))


def test_other_adapters_are_loaded_with_a_warning(adapted, tmp_path):
    folder = save_calibrated(adapted, tmp_path / "adapters")
    detach_calibrator(adapted)
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).add_(1)
    adapted.save_pretrained(folder)
    with pytest.warns(UserWarning, match="the calibrator was fitted for other weights than these; fit it again"):
        load_calibrated(folder)


def test_merging_keeps_it_and_needs_no_adapters_any_more(adapted, tokens, tmp_path):
    wanted = logits_of(adapted, tokens)
    merged = adapted.merge_and_unload()
    assert attached_calibrator(merged) is not None
    torch.testing.assert_close(logits_of(merged, tokens), wanted, rtol=1e-4, atol=1e-5)
    folder = save_calibrated(merged, tmp_path / "merged")
    torch.testing.assert_close(logits_of(load_calibrated(folder), tokens), wanted, rtol=1e-4, atol=1e-5)
    calibrator = attached_calibrator(merged)
    fold_calibrator(detach_calibrator(merged), calibrator)
    torch.testing.assert_close(logits_of(merged, tokens).softmax(-1), wanted.softmax(-1), rtol=0, atol=1e-5)


def test_adapters_of_nothing_are_refused(classifier, temperature, tmp_path):
    model = attach_calibrator(adapt(classifier), temperature)
    with pytest.raises(ValueError, match="model: its adapters do not say what they are for; save the base"):
        save_calibrated(model, tmp_path / "adapters")
    assert not list(tmp_path.iterdir())


def test_adapters_that_transformers_added_are_refused(base, temperature, tmp_path):
    base.add_adapter(peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="model: it has adapters that transformers added; allowed are those of peft"):
        save_calibrated(attach_calibrator(base, temperature), tmp_path / "adapters")


def test_generation_through_adapters_is_calibrated(tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.5}
    config = GPT2Config(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    adapted = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "CAUSAL_LM", "c_attn")
    logits = 3 * torch.randn(300, 50)
    calibrator = TemperatureScaling().fit(logits, torch.multinomial((logits / 2).softmax(-1), 1)[:, 0])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["input_ids"] = torch.tensor([[5, 6, 7]])
    raw = adapted.generate(**options).logits
    found = attach_calibrator(adapted, calibrator).generate(**options).logits
    loaded = load_calibrated(save_calibrated(adapted, tmp_path / "adapters")).generate(**options).logits
    for ours, again, theirs in zip(found, loaded, raw, strict=True):
        torch.testing.assert_close(ours, calibrator(theirs))
        torch.testing.assert_close(again, ours)
