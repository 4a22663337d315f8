"""Folders that plain transformers loads: calibrated where folded, and the same scores by any way that is left."""

import pytest
import torch
import transformers as hf

from hf_calib import (
    CALIBRATORS,
    TemperatureScaling,
    apply_calibrator,
    attach_calibrator,
    detach_calibrator,
    fold_calibrator,
    load_calibrated,
    save_calibrated,
    uncalibrated,
    unfold_calibrator,
)


VOCABULARY, T = 44, 1.7
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2, "num_labels": 3}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
       {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()},
    "d_model": 16, "decoder_start_token_id": 3, "forced_eos_token_id": None,
}  # fmt: skip
DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
GEMMA = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
VIT = {**SIZES, "image_size": 8, "patch_size": 4}
MODELS = {  # the Auto class, and a config
    "gpt2 language": (hf.AutoModelForCausalLM, hf.GPT2Config, GPT2),
    "llama tied": (hf.AutoModelForCausalLM, hf.LlamaConfig, {**SIZES, "tie_word_embeddings": True}),
    "llama untied": (hf.AutoModelForCausalLM, hf.LlamaConfig, {**SIZES, "tie_word_embeddings": False}),
    "gemma tied": (hf.AutoModelForCausalLM, hf.GemmaConfig, GEMMA),
    "t5 tied": (hf.AutoModelForSeq2SeqLM, hf.T5Config, T5),
    "bart tied": (hf.AutoModelForSeq2SeqLM, hf.BartConfig, BART),
    "bert masked": (hf.AutoModelForMaskedLM, hf.BertConfig, SIZES),
    "bert tokens": (hf.AutoModelForTokenClassification, hf.BertConfig, SIZES),
    "bert answers": (hf.AutoModelForQuestionAnswering, hf.BertConfig, {**SIZES, "num_labels": 2}),
    "vit": (hf.AutoModelForImageClassification, hf.ViTConfig, VIT),
    **{
        name: (hf.AutoModelForSequenceClassification, config, sizes)
        for name, config, sizes in (
            ("bert", hf.BertConfig, SIZES),
            ("distilbert", hf.DistilBertConfig, DISTIL),
            ("roberta", hf.RobertaConfig, SIZES),
            ("deberta-v2", hf.DebertaV2Config, {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
            ("modernbert", hf.ModernBertConfig, {**SIZES, "cls_token_id": 2, "sep_token_id": 3}),
            ("llama", hf.LlamaConfig, SIZES),
            ("qwen2", hf.Qwen2Config, {**SIZES, "num_key_value_heads": 2}),
            ("t5", hf.T5Config, T5),
        )
    },
}
TIED = ("gpt2 language", "llama tied", "gemma tied", "t5 tied", "bart tied")
# older releases script parts of DeBERTa
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def make(name):
    torch.manual_seed(0)
    auto_class, config_class, sizes = MODELS[name]
    model = auto_class.from_config(config_class(**{**TOKENS, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():  # logits far from each other, and no bias that is zero
            parameter.add_(0.3 * torch.randn_like(parameter))
        if name == "bart tied":
            model.final_logits_bias.copy_(torch.randn(1, VOCABULARY))
    return model.eval()


def inputs_of(model):
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)}
    ids = torch.randint(4, VOCABULARY, (4, 6), generator=generator)
    ids[:, -1] = TOKENS["eos_token_id"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if type(model).__name__.endswith("ForConditionalGeneration"):
        inputs["decoder_input_ids"] = ids[:, :-1]
    return inputs


@torch.no_grad()
def logits_of(model):
    output = model(**inputs_of(model))
    if hasattr(output, "start_logits"):  # positions are the last axis
        return torch.stack([output.start_logits, output.end_logits])
    return output.logits


def calibrator_for(model):
    classes = logits_of(model).shape[-1]
    calibrator = TemperatureScaling()
    calibrator.set_tensors({"temperature": torch.tensor(T)}, num_labels=classes)
    return calibrator


@pytest.mark.parametrize("name", MODELS)
def test_folding_is_exact_and_undone(name, tmp_path):
    model = make(name)
    raw, calibrator = logits_of(model), calibrator_for(model)
    embeddings = model.get_input_embeddings().weight.clone() if name != "vit" else None
    fold_calibrator(model, calibrator)
    wanted = (raw.double() / T).softmax(-1).float()
    assert (raw.softmax(-1) - wanted).abs().max() > 0.005
    torch.testing.assert_close(logits_of(model).softmax(-1), wanted, rtol=0, atol=1e-5)
    if name in TIED:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert torch.equal(model.get_input_embeddings().weight, embeddings)
    model.save_pretrained(tmp_path)
    loaded = MODELS[name][0].from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded).softmax(-1), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of(unfold_calibrator(model)), raw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TIED)
def test_what_is_more_than_a_temperature_is_refused_where_weights_are_shared(name):
    model = make(name)
    logits = 3 * torch.randn(500, VOCABULARY, generator=torch.Generator().manual_seed(0))
    calibrator = CALIBRATORS["vector"]().fit(logits, torch.multinomial((logits / 2).softmax(-1), 1)[:, 0])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="shares its weight with another, so that only a temperature can be folded"):
        fold_calibrator(model, calibrator)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert apply_calibrator(model, calibrator) == "attached"


@pytest.mark.parametrize("name", MODELS)
def test_attaching_is_exact_and_undone(name):
    model = make(name)
    raw, calibrator = logits_of(model), calibrator_for(model)
    wanted = (raw.double() / T).softmax(-1).float()
    attach_calibrator(model, calibrator)
    torch.testing.assert_close(logits_of(model).softmax(-1), wanted, rtol=0, atol=1e-6)
    with torch.no_grad():
        inputs, plain = inputs_of(model), model(**inputs_of(model)).to_tuple()
        for one, other in zip(model(**inputs, return_dict=False), plain, strict=False):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other)
    with uncalibrated(model):
        assert torch.equal(logits_of(model), raw)
    assert torch.equal(logits_of(detach_calibrator(model)), raw)


WITHOUT_THE_LIBRARY = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_calib":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocked())
try:
    import hf_calib
except ImportError:
    pass
else:
    raise SystemExit("hf_calib was imported")
import torch
import transformers as hf

answers = []
for folder, auto_class, inputs in json.load(sys.stdin):
    model = getattr(hf, auto_class).from_pretrained(folder)
    with torch.no_grad():
        output = model(**{name: torch.tensor(value) for name, value in inputs.items()})
    answers.append((output.start_logits if "start_logits" in output else output.logits).tolist())
print(json.dumps(answers))
"""


def folded_folders(tmp_path):
    for number, name in enumerate(MODELS):
        model = make(name)
        raw = logits_of(model)
        fold_calibrator(model, calibrator_for(model)).save_pretrained(tmp_path / str(number))
        inputs = {key: value.tolist() for key, value in inputs_of(model).items()}
        yield name, raw, [str(tmp_path / str(number)), MODELS[name][0].__name__, inputs]


def test_a_process_without_this_library_gets_the_calibrated_probabilities(tmp_path, in_new_process):
    names, raws, requests = zip(*folded_folders(tmp_path), strict=True)
    for name, raw, found in zip(names, raws, in_new_process(WITHOUT_THE_LIBRARY, requests), strict=True):
        wanted = ((raw[0] if name == "bert answers" else raw).double() / T).softmax(-1).float()
        torch.testing.assert_close(torch.tensor(found).softmax(-1), wanted, rtol=0, atol=1e-5, msg=name)


IN_A_FRESH_PROCESS = """
import json, sys
import torch
import hf_calib

answers = []
for folder, _, inputs in json.load(sys.stdin):
    with torch.no_grad():
        output = hf_calib.load_calibrated(folder)(**{name: torch.tensor(value) for name, value in inputs.items()})
    answers.append((output.start_logits if "start_logits" in output else output.logits).tolist())
print(json.dumps(answers))
"""


def attached_folders(tmp_path):
    for number, name in enumerate(MODELS):
        model = make(name)
        raw = logits_of(model)
        save_calibrated(attach_calibrator(model, calibrator_for(model)), tmp_path / str(number))
        inputs = {key: value.tolist() for key, value in inputs_of(model).items()}
        yield name, raw, [str(tmp_path / str(number)), MODELS[name][0].__name__, inputs]


def test_a_fresh_process_gets_what_is_attached(tmp_path, in_new_process):
    names, raws, requests = zip(*attached_folders(tmp_path), strict=True)
    for name, raw, found in zip(names, raws, in_new_process(IN_A_FRESH_PROCESS, requests), strict=True):
        wanted = ((raw[0] if name == "bert answers" else raw).double() / T).softmax(-1).float()
        torch.testing.assert_close(torch.tensor(found).softmax(-1), wanted, rtol=0, atol=1e-6, msg=name)


def test_loaded_models_are_calibrated_once(tmp_path):
    for name in ("gpt2 language", "bert answers", "vit"):
        model = make(name)
        fold_calibrator(model, calibrator_for(model)).save_pretrained(tmp_path / name)
        loaded = load_calibrated(tmp_path / name)
        assert torch.equal(logits_of(loaded), logits_of(model))
