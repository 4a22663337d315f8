"""`torch.export` and `torch.compile`: whole graphs, and the numbers of the model as it is."""

import shutil

import pytest
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_calib.models import (
    CalibTransformerConfig,
    CalibTransformerForCausalLM,
    CalibTransformerForConditionalGeneration,
    CalibTransformerForQuestionAnswering,
    CalibTransformerForSequenceClassification,
    CalibTransformerForTokenClassification,
)


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
every_kind = pytest.mark.parametrize("kind", ["modern", "vanilla"])
LAYERS, HEADS, HEAD_DIM = 2, 4, 8


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.compiler.reset()


def tiny_config(kind):
    common = {"dropout": 0.0, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "vanilla":
        return CalibTransformerConfig.vanilla(50, d_model=HEADS * HEAD_DIM, nhead=HEADS, num_layers=LAYERS, **common)
    sizes = {"vocab_size": 50, "hidden_size": HEADS * HEAD_DIM, "num_hidden_layers": LAYERS}
    return CalibTransformerConfig(num_attention_heads=HEADS, num_key_value_heads=HEADS, **sizes, **common)


def padded(rows, length):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(3, 50, (rows, length)), "attention_mask": mask}


@torch.no_grad()
def decoding(kind, has_encoder):
    """A model that generates, tokens, what an encoder made of a source, if there is one, and the tokens' logits."""
    kinds = (CalibTransformerForCausalLM, CalibTransformerForConditionalGeneration)
    model = kinds[has_encoder](tiny_config(kind)).eval()
    tokens, source = torch.randint(3, 50, (3, 9)), padded(3, 6)
    if not has_encoder:
        return model, tokens, {}, model(tokens).logits
    encoder = {"states": model.model.encoder(**source).last_hidden_state, "mask": source["attention_mask"]}
    return model, tokens, encoder, model(**source, decoder_input_ids=tokens).logits


# --- torch.export


@every_kind
def test_exported_classifier(kind, tmp_path):
    model = CalibTransformerForSequenceClassification(tiny_config(kind)).eval()
    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=4, max=128)
    shapes = {name: {0: rows, 1: length} for name in ("input_ids", "attention_mask")}
    program = torch.export.export(model, (), padded(3, 7), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "classifier.pt2")
    exported = torch.export.load(tmp_path / "classifier.pt2").module()
    for size in ((3, 7), (2, 12), (5, 4)):
        batch = padded(*size)
        with torch.no_grad():
            torch.testing.assert_close(exported(**batch).logits, model(**batch).logits, **CLOSE)


class Step(nn.Module):
    """One step of a decoder as a function of tensors: the next tokens, and the keys and values of those before."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, token, past, states=None, mask=None):
        cache = DynamicCache(past)
        if states is not None:
            both = EncoderDecoderCache(cache, DynamicCache())
            inputs = {"decoder_input_ids": token, "encoder_outputs": (states,), "attention_mask": mask}
            output = self.model(**inputs, past_key_values=both)
        else:
            output = self.model(token, past_key_values=cache)
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


@every_kind
@pytest.mark.parametrize("has_encoder", [False, True])
def test_exported_step_of_a_decoder(kind, has_encoder):
    model, tokens, encoder, expected = decoding(kind, has_encoder)
    step = Step(model)
    past = [(torch.randn(3, HEADS, 4, HEAD_DIM), torch.randn(3, HEADS, 4, HEAD_DIM)) for _ in range(LAYERS)]
    length = torch.export.Dim("length", min=2, max=60)
    shapes = {"token": {}, "past": [({2: length}, {2: length})] * LAYERS, **{name: {} for name in encoder}}
    exported = torch.export.export(step, (tokens[:, :1], past), encoder, dynamic_shapes=shapes, strict=False).module()
    with torch.no_grad():
        _, past = step(tokens[:, :3], [], **encoder)
        for place in range(3, 9):
            logits, past = exported(tokens[:, place : place + 1], past, **encoder)
            torch.testing.assert_close(logits[:, 0], expected[:, place], **CLOSE)


# --- torch.compile, in one graph or an error


def labelled(model, batch):
    rows, length = batch["input_ids"].shape
    if isinstance(model, CalibTransformerForSequenceClassification):
        return {**batch, "labels": torch.arange(rows) % 2}
    if isinstance(model, CalibTransformerForQuestionAnswering):
        return {**batch, "start_positions": torch.arange(rows) % 2, "end_positions": torch.arange(rows)}
    classes = 2 if isinstance(model, CalibTransformerForTokenClassification) else 50
    return {**batch, "labels": torch.randint(classes, (rows, length)).masked_fill(batch["attention_mask"] == 0, -100)}


@every_kind
@pytest.mark.parametrize(
    "head",
    [
        CalibTransformerForSequenceClassification,
        CalibTransformerForTokenClassification,
        CalibTransformerForQuestionAnswering,
        CalibTransformerForCausalLM,
        CalibTransformerForConditionalGeneration,
    ],
)
def test_compiled_training(head, kind):
    model = head(tiny_config(kind)).train()
    batch = labelled(model, padded(3, 7))

    def loss_and_gradients(call):
        model.zero_grad()
        loss = call(**batch).loss
        loss.backward()
        return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}

    expected = loss_and_gradients(model)
    found = loss_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, expected, **CLOSE)


@every_kind
@pytest.mark.parametrize("has_encoder", [False, True])
def test_compiled_decoding_with_a_static_cache(has_encoder, kind):
    model, tokens, encoder, expected = decoding(kind, has_encoder)
    cache, inputs, name = StaticCache(model.config, max_cache_len=16), {}, "input_ids"
    if has_encoder:
        cache = EncoderDecoderCache(cache, StaticCache(model.config, max_cache_len=6))
        inputs = {"encoder_outputs": (encoder["states"],), "attention_mask": encoder["mask"]}
        name = "decoder_input_ids"
    with torch.no_grad():
        model(**{name: tokens[:, :3]}, **inputs, past_key_values=cache)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for place in range(3, 9):
            with torch.compiler.set_stance("default" if place < 5 else "fail_on_recompile"):
                logits = compiled(**{name: tokens[:, place : place + 1]}, **inputs, past_key_values=cache).logits
            torch.testing.assert_close(logits[:, 0], expected[:, place], **CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler for what torch.compile writes")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_trains():
    model = CalibTransformerForTokenClassification(tiny_config("modern")).train()
    batch = labelled(model, padded(3, 7))
    expected = model(**batch).loss
    loss = torch.compile(model, fullgraph=True)(**batch).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    loss.backward()
