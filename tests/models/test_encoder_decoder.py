"""Encoder and decoder together, and the decoder alone: what they compute, generate and refuse."""

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
)

import hf_calib
from hf_calib.models import (
    CalibTransformerConfig,
    CalibTransformerDecoderModel,
    CalibTransformerEncoderModel,
    CalibTransformerForCausalLM,
    CalibTransformerForConditionalGeneration,
    CalibTransformerForQuestionAnswering,
    CalibTransformerForTokenClassification,
    CalibTransformerModel,
)


CLOSE = {"atol": 2e-5, "rtol": 2e-5}
KINDS = ("modern", "vanilla")
OLD_CHECKPOINTING_NAME = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny_config(kind="modern", **changes):
    common = {"dropout": 0.0, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, **changes}
    if kind == "vanilla":
        return CalibTransformerConfig.vanilla(50, d_model=32, nhead=4, num_layers=2, **common)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CalibTransformerConfig(**sizes, num_key_value_heads=2, decoder_layers=3, **common)


def ids(rows, length):
    return torch.randint(3, 50, (rows, length))


# --- the architecture of 2017


def copied_from(ours, theirs):
    """Weights of a `torch.nn.Transformer` as the state of our encoder and decoder."""
    names = {
        "self_attn.in_proj_": "self_attn.qkv_proj.",
        "self_attn.out_proj.": "self_attn.o_proj.",
        "multihead_attn.out_proj.": "cross_attn.o_proj.",
        "linear1.": "mlp.up_proj.",
        "linear2.": "mlp.down_proj.",
        "norm1.": "self_attn_norm.",
    }
    state = {name: value for name, value in ours.state_dict().items() if "embed_tokens" in name}
    for name, value in theirs.state_dict().items():
        in_decoder = name.startswith("decoder.layers")
        norms = {"norm2.": "cross_attn_norm.", "norm3.": "mlp_norm."} if in_decoder else {"norm2.": "mlp_norm."}
        changes = {**names, **norms}
        new_name = name
        for old, new in changes.items():
            new_name = new_name.replace(old, new)
        if "multihead_attn.in_proj_" in name:
            kind = name.rsplit("_", 1)[1]
            for part, rows in (("q_proj", value[:32]), ("kv_proj", value[32:])):
                state[name.replace(f"multihead_attn.in_proj_{kind}", f"cross_attn.{part}.{kind}")] = rows
        else:
            state[new_name] = value
    return state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vanilla_computes_what_torch_nn_transformer_computes(attention):
    theirs = torch.nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True).eval()
    for parameter in theirs.parameters():
        torch.nn.init.uniform_(parameter, -0.3, 0.3)
    config = tiny_config("vanilla", intermediate_size=64, attn_implementation=attention)
    ours = CalibTransformerModel(config).eval()
    ours.load_state_dict(copied_from(ours, theirs))
    source, target = ids(3, 7), ids(3, 5)
    source_mask, target_mask = torch.ones_like(source), torch.ones_like(target)
    source_mask[1, 4:] = source_mask[2, 6:] = target_mask[2, 3:] = 0

    def with_positions(tokens):  # the table of section 3.5, entry by entry
        table = torch.zeros(tokens.shape[1], 32)
        for position in range(tokens.shape[1]):
            for i in range(0, 32, 2):
                angle = torch.tensor(position / 10000 ** (i / 32))
                table[position, i], table[position, i + 1] = angle.sin(), angle.cos()
        return ours.encoder.embed_tokens(tokens) * 32**0.5 + table

    expected = theirs(
        with_positions(source),
        with_positions(target),
        tgt_mask=torch.ones(5, 5, dtype=torch.bool).triu(1),
        src_key_padding_mask=source_mask == 0,
        tgt_key_padding_mask=target_mask == 0,
        memory_key_padding_mask=source_mask == 0,
    )
    output = ours(source, source_mask, target, target_mask).last_hidden_state
    kept = target_mask == 1
    torch.testing.assert_close(output[kept], expected[kept], **CLOSE)


# --- masks, padding and the cache


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_sees_the_past_and_the_encoder_only(kind):
    model = CalibTransformerForConditionalGeneration(tiny_config(kind)).eval()
    source, target = ids(1, 6), ids(1, 5)
    logits = model(source, decoder_input_ids=target).logits
    changed = target.clone()
    changed[0, 3] = 3 + (target[0, 3] - 2) % 47
    other = model(source, decoder_input_ids=changed).logits
    torch.testing.assert_close(other[:, :3], logits[:, :3])
    assert (other[:, 3:] - logits[:, 3:]).abs().max() > 1e-3
    assert (model(source.flip(1), decoder_input_ids=target).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_and_right_padding_give_the_same(kind, attention):
    model = CalibTransformerForCausalLM(tiny_config(kind, attn_implementation=attention)).eval()
    tokens = ids(1, 4)
    alone = model(tokens).logits
    pad, mask = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    right = model(torch.cat((tokens, pad), 1), attention_mask=mask).logits[:, :4]
    left = model(torch.cat((pad, tokens), 1), attention_mask=mask.flip(1)).logits[:, 3:]
    torch.testing.assert_close(right, alone, **CLOSE)
    torch.testing.assert_close(left, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [CalibTransformerForConditionalGeneration, CalibTransformerForCausalLM])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_with_a_cache_equals_generation_without(kind, head, options):
    model = head(tiny_config(kind)).eval()
    tokens = ids(3, 6)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0  # on the left, as generation wants it
    settings = {"attention_mask": mask, "max_new_tokens": 9, "min_new_tokens": 9, "repetition_penalty": 5.0}
    without = model.generate(tokens, **settings, num_beams=options.get("num_beams", 1), use_cache=False)
    assert torch.equal(model.generate(tokens, **settings, **options), without)
    assert len(without[0, -9:].unique()) > 2  # not one token over and over, which a broken cache would give too


def test_assisted_generation_equals_greedy_generation():
    model = CalibTransformerForCausalLM(tiny_config()).eval()
    assistant = CalibTransformerForCausalLM(tiny_config(initializer_range=0.1)).eval()
    tokens = ids(1, 6)
    greedy = model.generate(tokens, max_new_tokens=9, do_sample=False)
    assert torch.equal(model.generate(tokens, max_new_tokens=9, do_sample=False, assistant_model=assistant), greedy)


# --- losses


def test_seq2seq_loss_is_of_the_next_token_and_sums_over_micro_batches():
    model = CalibTransformerForConditionalGeneration(tiny_config()).eval()
    source, labels = ids(4, 6), ids(4, 5)
    labels[1, 3:] = labels[2, 1:] = -100
    shifted = torch.cat((torch.ones(4, 1, dtype=torch.long), labels[:, :-1].clamp(min=0)), 1)
    whole = model(source, labels=labels)
    assert whole.past_key_values is None
    logits = model(source, decoder_input_ids=shifted).logits
    torch.testing.assert_close(whole.loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    count = (labels != -100).sum()
    parts = [model(source[i], labels=labels[i], num_items_in_batch=count).loss for i in (slice(1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), whole.loss)


def test_causal_loss_is_of_the_next_token_and_sums_over_micro_batches():
    model = CalibTransformerForCausalLM(tiny_config()).eval()
    tokens = ids(4, 6)
    whole = model(tokens, labels=tokens).loss
    logits = model(tokens).logits
    torch.testing.assert_close(whole, F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    parts = [model(tokens[i], labels=tokens[i], num_items_in_batch=20).loss for i in (slice(1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), whole)
    assert torch.equal(model(tokens, logits_to_keep=2).logits, logits[:, -2:])


def test_token_and_question_answering_losses():
    tokens = ids(3, 5)
    model = CalibTransformerForTokenClassification(tiny_config(num_labels=4)).eval()
    labels = torch.randint(4, (3, 5))
    labels[0, 2:] = -100
    output = model(tokens, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    model = CalibTransformerForQuestionAnswering(tiny_config()).eval()
    start, end = torch.tensor([0, 2, 5]), torch.tensor([1, 4, 5])  # the third was cut off
    output = model(tokens, start_positions=start, end_positions=end)
    losses = [F.cross_entropy(output.start_logits[:2], start[:2]), F.cross_entropy(output.end_logits[:2], end[:2])]
    torch.testing.assert_close(output.loss, sum(losses) / 2)


# --- what is refused, from shapes and configuration alone


def test_errors_name_the_argument():
    source, target = ids(2, 6), ids(2, 5)
    seq2seq = CalibTransformerForConditionalGeneration(tiny_config(max_position_embeddings=6)).eval()
    with pytest.raises(ValueError, match=r"labels has shape \(2, 4\); allowed is \(2, 5\)"):
        seq2seq(source, decoder_input_ids=target, labels=target[:, 1:])
    with pytest.raises(ValueError, match=r"7 positions.*max_position_embeddings=6"):
        seq2seq(source, decoder_input_ids=ids(2, 7))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\); allowed is \(2, 6\)"):
        seq2seq(source, attention_mask=torch.ones(2, 3), decoder_input_ids=target)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        seq2seq(source)
    causal = CalibTransformerForCausalLM(tiny_config()).eval()
    with pytest.raises(ValueError, match=r"labels has shape \(2, 6\)"):
        causal(target, labels=source)
    with pytest.raises(ValueError, match=r"encoder_hidden_states: given, but config\.is_encoder_decoder=False"):
        causal.model(target, encoder_hidden_states=torch.zeros(2, 3, 32))
    with pytest.raises(ValueError, match=r"labels has shape \(2,\)"):
        CalibTransformerForTokenClassification(tiny_config())(source, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"end_positions has shape \(3,\)"):
        CalibTransformerForQuestionAnswering(tiny_config())(
            source, start_positions=torch.zeros(2, dtype=torch.long), end_positions=torch.zeros(3, dtype=torch.long)
        )


# --- the ecosystem


@pytest.mark.parametrize(
    ("model_class", "auto_class", "base_class"),
    [
        (CalibTransformerModel, AutoModel, CalibTransformerModel),
        (CalibTransformerEncoderModel, AutoModel, CalibTransformerEncoderModel),
        (CalibTransformerDecoderModel, AutoModel, CalibTransformerDecoderModel),
        (CalibTransformerForConditionalGeneration, AutoModelForSeq2SeqLM, CalibTransformerModel),
        (CalibTransformerForCausalLM, AutoModelForCausalLM, CalibTransformerDecoderModel),
        (CalibTransformerForTokenClassification, AutoModelForTokenClassification, CalibTransformerEncoderModel),
        (CalibTransformerForQuestionAnswering, AutoModelForQuestionAnswering, CalibTransformerEncoderModel),
    ],
)
def test_auto_classes_give_back_what_was_saved(tmp_path, model_class, auto_class, base_class):
    config = tiny_config()
    before = config.to_dict()
    model = model_class(config).eval()
    assert config.to_dict() == before  # a class that needs other flags takes a copy
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class is getattr(hf_calib, model_class.__name__, model_class)
    assert not any(info.values())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is base_class
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(base.state_dict()[name], value), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:The new embeddings")
def test_the_vocabulary_grows(tied):
    model = CalibTransformerForConditionalGeneration(tiny_config(tie_word_embeddings=tied)).eval()
    source, labels = ids(2, 6), ids(2, 5)
    logits = model(source, labels=labels).logits
    decoder_rows = model.model.decoder.embed_tokens.weight.clone()
    model.resize_token_embeddings(57)
    output = model(source + 7, labels=labels + 7)
    assert output.logits.shape == (2, 5, 57)
    torch.testing.assert_close(model(source, labels=labels).logits[..., :50], logits, **CLOSE)
    assert torch.equal(model.model.decoder.embed_tokens.weight[:50], decoder_rows)
    assert (model.lm_head.weight is model.model.encoder.embed_tokens.weight) == tied
    assert (model.model.decoder.embed_tokens.weight is model.model.encoder.embed_tokens.weight) == tied


@OLD_CHECKPOINTING_NAME
@pytest.mark.parametrize("head", [CalibTransformerForConditionalGeneration, CalibTransformerForCausalLM])
def test_lora_has_a_default(head):
    model = head(tiny_config())
    task = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    adapted = get_peft_model(model, LoraConfig(task_type=task, r=2))
    tokens = ids(2, 5)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert {name.split(".lora")[0].rsplit(".")[-1] for name in trained} == (
        {"qkv_proj", "q_proj", "kv_proj"} if model.config.is_encoder_decoder else {"qkv_proj"}
    )
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


LOADS_WITHOUT_HF_CALIB = """
import json, sys
sys.modules["hf_calib"] = None  # importing it raises
from transformers import AutoModelForSeq2SeqLM
import torch
request = json.load(sys.stdin)
model = AutoModelForSeq2SeqLM.from_pretrained(request["path"], trust_remote_code=True)
tokens = torch.tensor(request["tokens"])
print(json.dumps(model.generate(tokens, max_new_tokens=5, do_sample=False).tolist()))
"""


def test_a_repository_with_its_code_loads_where_hf_calib_cannot_be_imported(tmp_path, in_new_process):
    model, tokens = CalibTransformerForConditionalGeneration(tiny_config()).eval(), ids(2, 6)
    try:
        CalibTransformerConfig.register_for_auto_class()
        CalibTransformerForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
        model.save_pretrained(tmp_path / "repo")
    finally:
        CalibTransformerConfig._auto_class = None
        CalibTransformerForConditionalGeneration._auto_class = None
    request = {"path": str(tmp_path / "repo"), "tokens": tokens.tolist()}
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False).tolist()
    assert in_new_process(LOADS_WITHOUT_HF_CALIB, request) == expected
