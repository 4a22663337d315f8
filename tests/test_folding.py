"""A folded calibrator: plain transformers gives calibrated scores, exactly once, or the weights are untouched."""

import copy
import json
import pickle

import pytest
import torch
import transformers as hf
from torch import nn

from hf_calib import (
    CalibTransformerConfig,
    IdentityCalibration,
    IsotonicCalibration,
    TemperatureScaling,
    apply_calibrator,
    attach_calibrator,
    attached_calibrator,
    collect_predictions,
    fold_calibrator,
    load_calibrated,
    unfold_calibrator,
)
from hf_calib.attaching import folded_calibrator
from hf_calib.calibrators import CALIBRATORS, Chain
from hf_calib.folding import remove_calibrator


COMMON = {"vocab_size": 44, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2, "num_labels": 3}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART_SIZES = {
    **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
       {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()},
    "d_model": 16, "decoder_start_token_id": 3, "forced_eos_token_id": None,
}  # fmt: skip
CONFIGS = {
    "bert": (hf.BertConfig, SIZES),
    "distilbert": (hf.DistilBertConfig, {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}),
    "roberta": (hf.RobertaConfig, SIZES),
    "deberta-v2": (hf.DebertaV2Config, {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "modernbert": (hf.ModernBertConfig, {**SIZES, "cls_token_id": 2, "sep_token_id": 3}),
    "calib_transformer": (CalibTransformerConfig, SIZES),
    "llama": (hf.LlamaConfig, SIZES),
    "qwen2": (hf.Qwen2Config, {**SIZES, "num_key_value_heads": 2}),
    "gpt2": (hf.GPT2Config, {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    "t5": (hf.T5Config, T5_SIZES),
    "bart": (hf.BartConfig, BART_SIZES),
}
T = 2.5  # what the fixture `temperature` was fitted to


def make(architecture, **changes):
    torch.manual_seed(0)
    config_class, sizes = CONFIGS[architecture]
    model = hf.AutoModelForSequenceClassification.from_config(config_class(**{**COMMON, **sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # logits far from each other, and no bias that is zero
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def bert():
    return make("bert")


def fitted(name, num_labels=3, **settings):
    """A calibrator that has something to do, fitted on logits that are too sure, of labels with other priors."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, num_labels, generator=generator)
    tilt = torch.linspace(-1, 1, num_labels)
    labels = torch.multinomial((logits / 2 + tilt).softmax(-1), 1, generator=generator)[:, 0]
    if settings.get("task") == "multilabel":
        labels = (torch.rand(400, num_labels, generator=generator) < (logits / 2 + tilt).sigmoid()).long()
    return CALIBRATORS[name](**settings).fit(logits, labels)


@torch.no_grad()
def logits_of(model, batch=4):
    ids = torch.randint(4, 44, (batch, 6), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = COMMON["eos_token_id"]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def probs_of(model):
    return logits_of(model).softmax(-1)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- exact


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # older releases script parts of DeBERTa
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_plain_load_of_the_saved_folder_is_calibrated(architecture, temperature, tmp_path):
    model = make(architecture)
    raw = logits_of(model)
    assert fold_calibrator(model, temperature) is model
    model.save_pretrained(tmp_path)
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    wanted = (raw / T).softmax(-1)
    torch.testing.assert_close(probs_of(plain), wanted, rtol=0, atol=1e-5)
    assert (raw.softmax(-1) - wanted).abs().max() > 0.02
    assert torch.equal(logits_of(unfold_calibrator(model)).argmax(-1), raw.argmax(-1))
    torch.testing.assert_close(probs_of(model), raw.softmax(-1), rtol=0, atol=1e-6)


AFFINE = ["vector", "matrix", "structured_vector", "structured_matrix", "bias_corrected_temperature", "chain"]


@pytest.mark.parametrize("name", AFFINE)
def test_an_affine_map_is_folded_and_undone(name, bert, tmp_path):
    if name == "chain":
        calibrator = Chain([CALIBRATORS["temperature"](), CALIBRATORS["prior_correction"]()])
        calibrator.fit(3 * torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 2, 0, 1, 1, 0, 1, 2, 0, 1, 0]))
        calibrator.members[1].target_priors.copy_(torch.tensor([0.2, 0.3, 0.5]))
    else:
        calibrator = fitted(name, **({"foldable": True} if name.startswith("structured") else {}))
    raw = logits_of(bert)
    fold_calibrator(bert, calibrator).save_pretrained(tmp_path)
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    wanted = calibrator.log_probs(raw).exp()
    torch.testing.assert_close(probs_of(plain), wanted, rtol=0, atol=1e-5)
    assert (raw.softmax(-1) - wanted).abs().max() > 0.02
    loaded = load_calibrated(tmp_path)
    torch.testing.assert_close(probs_of(unfold_calibrator(loaded)), raw.softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["temperature", "platt", "vector"])
def test_labels_of_which_several_are_right_are_folded_one_by_one(name):
    model, calibrator = make("bert", problem_type="multi_label_classification"), fitted(name, task="multilabel")
    raw = logits_of(model)
    fold_calibrator(model, calibrator)
    torch.testing.assert_close(logits_of(model).sigmoid(), calibrator(raw).sigmoid(), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of(unfold_calibrator(model)), raw, rtol=1e-4, atol=1e-4)


def test_raw_logits_are_collected_of_whatever_is_folded(classifier, tokenizer, labelled_texts):
    raw = collect_predictions(classifier, labelled_texts, processing_class=tokenizer)
    fold_calibrator(classifier, fitted("structured_matrix", foldable=True))
    again = collect_predictions(classifier, labelled_texts, processing_class=tokenizer)
    torch.testing.assert_close(again.probs, raw.probs, rtol=0, atol=1e-5)
    assert torch.equal(again.labels, raw.labels)


def test_the_layer_is_found_by_what_it_computes_not_by_its_name(bert, temperature):
    class RenamedForSequenceClassification(hf.BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.decoy = nn.Linear(config.hidden_size, config.num_labels)
            self.verdict, self.classifier = self.classifier, nn.Identity()

        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            self.decoy(output.logits)
            return hf.modeling_outputs.SequenceClassifierOutput(logits=self.verdict(output.logits))

    model = RenamedForSequenceClassification(bert.config).eval()
    raw, decoy = logits_of(model), model.decoy.weight.clone()
    fold_calibrator(model, temperature)
    torch.testing.assert_close(probs_of(model), (raw / T).softmax(-1), rtol=0, atol=1e-5)
    assert torch.equal(model.decoy.weight, decoy)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_that_takes_one_row_at_a_time_is_folded(architecture, temperature):
    model = make(architecture, pad_token_id=None)
    raw = logits_of(model, batch=1)
    fold_calibrator(model, temperature)
    torch.testing.assert_close(logits_of(model, batch=1).softmax(-1), (raw / T).softmax(-1), rtol=0, atol=1e-5)


def test_a_tiny_vocabulary_is_enough(temperature):
    fold_calibrator(make("bert", vocab_size=9), temperature)


def test_the_identity_is_folded_for_free(bert):
    labels = torch.tensor([0, 1, 2])
    before = weights_of(bert)
    fold_calibrator(bert, IdentityCalibration().fit(torch.eye(3), labels))
    assert same_weights(bert, before)
    assert folded_calibrator(bert).name == "identity"


@pytest.mark.parametrize("training", [True, False])
def test_every_part_of_the_model_is_left_in_its_mode(training, bert, temperature):
    bert.train(training).bert.embeddings.eval()
    before = [module.training for module in bert.modules()]
    unfold_calibrator(fold_calibrator(bert, temperature))
    assert [module.training for module in bert.modules()] == before


# -- once


def test_the_mark_travels_with_plain_saves_and_blocks_a_second_calibrator(bert, temperature, tmp_path):
    fold_calibrator(bert, temperature).save_pretrained(tmp_path / "first")
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    plain.save_pretrained(tmp_path / "second")
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["hf_calib_folded"] == "temperature"
    for model in (bert, plain, again):
        before = logits_of(model)
        for apply in (fold_calibrator, attach_calibrator, apply_calibrator):
            with pytest.raises(ValueError, match="model: a calibrator is folded into its weights already"):
                apply(model, temperature)
        assert torch.equal(logits_of(model), before)


def test_unfolding_leaves_no_trace(bert, temperature, tmp_path):
    names, config = set(vars(bert)), bert.config.to_dict()
    unfold_calibrator(fold_calibrator(bert, temperature))
    assert set(vars(bert)) == names
    assert bert.config.to_dict() == config
    bert.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="model: no calibrator is known to be folded"):
        unfold_calibrator(bert)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent(duplicate, bert, temperature, tmp_path):
    folded = probs_of(fold_calibrator(bert, temperature))
    twin = duplicate(bert)
    unfold_calibrator(twin).save_pretrained(tmp_path / "twin")
    bert.save_pretrained(tmp_path / "bert")
    assert torch.equal(probs_of(bert), folded)
    assert torch.equal(probs_of(load_calibrated(tmp_path / "bert")), folded)
    assert fold_calibrator(twin, temperature) is twin
    assert not (tmp_path / "twin" / "calibrator.json").exists()


# -- refused, with the weights as they were


def isotonic():
    generator = torch.Generator().manual_seed(0)
    return IsotonicCalibration().fit(
        torch.randn(50, 3, generator=generator), torch.randint(3, (50,), generator=generator)
    )


def of_temperature(value):
    calibrator = TemperatureScaling()
    calibrator.set_tensors({"temperature": torch.tensor(value)}, num_labels=3)
    return calibrator


class CappedForSequenceClassification(hf.BertForSequenceClassification):
    """Its logits are no layer's output."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits.tanh()
        return output


class DoubledForSequenceClassification(hf.BertForSequenceClassification):
    """Its head's weight is another layer's too."""

    def __init__(self, config):
        super().__init__(config)
        self.twin = nn.Linear(config.hidden_size, config.num_labels)
        self.twin.weight = self.classifier.weight


def refused(case, config):
    """A model and a calibrator that cannot be folded into it."""
    cases = {
        "isotonic": lambda: (make("bert"), isotonic()),
        "structured": lambda: (make("bert"), fitted("structured_vector")),
        "dirichlet": lambda: (make("bert"), fitted("dirichlet")),
        "no layer": lambda: (CappedForSequenceClassification(config).eval(), of_temperature(T)),
        "shared": lambda: (DoubledForSequenceClassification(config).eval(), of_temperature(T)),
        "no bias": lambda: (make("llama"), fitted("vector")),
        "overflow": lambda: (make("bert"), of_temperature(1e-39)),
        "merging": lambda: (make("bert"), merging()),
        "quantised": lambda: (quantised(), of_temperature(T)),
    }
    return cases[case]()


def merging():
    """Vector scaling that leaves next to nothing of the third class's logit."""
    calibrator = fitted("vector")
    calibrator.weight[2] = 1e-9
    calibrator.weight[1] = 1e-9
    return calibrator


def quantised():
    model = make("bert")
    model.classifier.weight = nn.Parameter(model.classifier.weight.detach().to(torch.int8), requires_grad=False)
    model.classifier.forward = lambda x: nn.functional.linear(x, model.classifier.weight.float())
    return model


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("isotonic", "calibrator: isotonic is no affine map of logits of a size to fold; attach it"),
        (
            "structured",
            "calibrator: structured_vector takes log-probabilities; with foldable=True it can be folded; att",
        ),
        ("dirichlet", "calibrator: dirichlet is no affine map of logits of a size to fold; attach it"),
        ("no layer", "model: found 0 layers whose output are the logits, where folding needs one; attach it"),
        (
            "shared",
            "model: the layer that makes the logits shares its weight with another, and no norm in front of it",
        ),
        ("no bias", "calibrator: its bias has no place in the layer that makes the logits, which has none; attach it"),
        ("overflow", "model: folding would miss the calibrated probabilities by nan; attach it instead"),
        ("merging", "calibrator: it nearly merges classes, so that folding could not be undone; attach it"),
        ("quantised", "model: its weights are quantised or not in memory; attach it"),
    ],
)
def test_what_cannot_be_exact_is_refused_and_attached_instead(case, message, bert):
    model, calibrator = refused(case, bert.config)
    before = weights_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        fold_calibrator(model, calibrator)
    assert len(str(caught.value).splitlines()) == 1
    assert same_weights(model, before)
    assert not hasattr(model.config, "hf_calib_folded")
    assert apply_calibrator(model, calibrator) == "attached"
    assert same_weights(model, before)


def test_rounded_weights_are_folded_with_a_warning_that_says_how_far_off(bert, temperature):
    bert = bert.to(torch.bfloat16)
    raw = logits_of(bert).double()
    assert apply_calibrator(copy.deepcopy(bert), temperature) == "attached"
    with pytest.warns(
        UserWarning, match=r"^folded torch.bfloat16 weights are off by up to \d\.\de-0\d in probability$"
    ):
        fold_calibrator(bert, temperature)
    torch.testing.assert_close(probs_of(bert).double(), (raw / T).softmax(-1), rtol=0, atol=0.02)


@pytest.mark.parametrize("error", [ValueError("model: would miss"), KeyboardInterrupt()])
def test_a_fold_that_fails_half_way_restores_every_bit(error, bert, temperature, monkeypatch):
    from hf_calib import folding

    before, probe, calls = weights_of(bert), folding._probe, []

    def failing_probe(model):
        calls.append(same_weights(model, before))
        if not calls[-1]:
            raise error
        return probe(model)

    monkeypatch.setattr(folding, "_probe", failing_probe)
    with pytest.raises(type(error)):
        fold_calibrator(bert, temperature)
    assert calls == [True, True, False]
    assert same_weights(bert, before)


# -- choosing


def test_apply_folds_where_it_can_and_remove_undoes_both(bert, temperature):
    raw = probs_of(bert)
    assert apply_calibrator(bert, temperature) == "folded"
    assert attached_calibrator(bert) is None
    assert remove_calibrator(bert) is bert
    torch.testing.assert_close(probs_of(bert), raw, rtol=0, atol=1e-6)
    assert apply_calibrator(bert, isotonic()) == "attached"
    assert remove_calibrator(remove_calibrator(bert)) is bert
    torch.testing.assert_close(probs_of(bert), raw, rtol=0, atol=1e-6)


def test_apply_refuses_what_does_not_belong_together(bert):
    with pytest.raises(ValueError, match="is not fitted"):
        apply_calibrator(bert, TemperatureScaling())


# -- without this library


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
from transformers import pipeline
folder, texts = json.load(sys.stdin)
print(json.dumps(pipeline("text-classification", model=folder)(texts, top_k=None)))
"""


def test_the_folded_folder_needs_no_library_of_ours(
    classifier, temperature, tokenizer, labelled_texts, tmp_path, in_new_process
):
    texts = labelled_texts["text"][:5]
    with torch.no_grad():
        raw = torch.cat([classifier(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    fold_calibrator(classifier, temperature).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = in_new_process(WITHOUT_THE_LIBRARY, [str(tmp_path), texts])
    rows = [{entry["label"]: entry["score"] for entry in row} for row in found]
    found = torch.tensor([[row[name] for name in ("sad", "calm", "glad")] for row in rows])
    torch.testing.assert_close(found, (raw / T).softmax(-1), rtol=0, atol=1e-5)
