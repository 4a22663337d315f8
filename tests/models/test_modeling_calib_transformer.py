import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_calib.models import (
    CalibTransformerConfig,
    CalibTransformerEncoderModel,
    CalibTransformerForSequenceClassification,
    register,
)
from hf_calib.models.modeling_calib_transformer import mean_over_tokens, rotary_table, rotate


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# transformers 5.20 knows only gradient_checkpointing_enable, later versions deprecate it; peft 0.21 uses the old names
OLD_CHECKPOINTING_NAME = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny_config(**changes):
    # Weights of ordinary size (not 0.02), so that attention is far from uniform and a wrong mask or angle shows
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "num_labels": 3,
    }
    return CalibTransformerConfig(**{**sizes, **changes})


def tiny_model(**changes):
    return CalibTransformerForSequenceClassification(tiny_config(**changes)).eval()


def tokens(lengths, *, width=None, side="right"):
    """Random sequences of the given lengths, padded with token 0 on one side to `width`."""
    width = width or max(lengths)
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        input_ids[row, place] = torch.randint(1, 50, (length,), generator=generator)
        attention_mask[row, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


# --- the parts


def test_rotary_angles_are_position_times_frequency():
    cos, sin = rotary_table(torch.tensor([[0, 3]]), head_dim=4, theta=100.0)
    angles = torch.tensor([[[[0.0, 0.0, 0.0, 0.0], [3.0, 0.3, 3.0, 0.3]]]])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin() * torch.tensor([-1, -1, 1, 1]))


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 8)

    def score(query_position, key_position):
        turned_query = rotate(query, rotary_table(torch.tensor([[query_position]]), 8, 10000.0))
        turned_key = rotate(key, rotary_table(torch.tensor([[key_position]]), 8, 10000.0))
        torch.testing.assert_close(turned_query.norm(), query.norm())
        return (turned_query * turned_key).sum()

    torch.testing.assert_close(score(2, 7), score(32, 37), atol=1e-4, rtol=1e-4)
    assert (score(2, 7) - score(2, 8)).abs() > 1e-3


def test_mean_over_tokens_leaves_padding_out():
    states = torch.tensor([[[1.0], [3.0], [90.0]], [[90.0], [90.0], [90.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(mean_over_tokens(states, mask), torch.tensor([[2.0], [0.0]]))
    torch.testing.assert_close(mean_over_tokens(states[:1]), torch.tensor([[94.0 / 3]]))


def test_the_whole_encoder_against_a_plain_computation():
    """One layer written out with loops over heads, straight from the formulas."""
    config = tiny_config(num_hidden_layers=1, norm_eps=1e-3)
    model = CalibTransformerEncoderModel(config).eval()
    for norm in (model.layers[0].self_attn_norm, model.layers[0].mlp_norm, model.norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    input_ids = tokens([7])["input_ids"]
    layer = model.layers[0]

    def norm(x, module):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * module.weight

    def turn(x):  # each pair of dimensions as one complex number
        angles = torch.arange(7.0)[:, None] * 10000.0 ** (-torch.arange(4.0) / 4)
        turned = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    x = model.embed_tokens(input_ids)[0]
    weight = layer.self_attn.qkv_proj.weight
    heads = []
    for head in range(4):
        group = head // 2
        query_weight = weight[8 * head : 8 * head + 8]
        key_weight, value_weight = weight[32 + 8 * group : 40 + 8 * group], weight[48 + 8 * group : 56 + 8 * group]
        y = norm(x, layer.self_attn_norm)
        scores = turn(y @ query_weight.T) @ turn(y @ key_weight.T).T / 8**0.5
        heads.append(scores.softmax(-1) @ (y @ value_weight.T))
    x = x + torch.cat(heads, dim=-1) @ layer.self_attn.o_proj.weight.T
    gate, up = (norm(x, layer.mlp_norm) @ layer.mlp.up_proj.weight.T).split(config.intermediate_size, dim=-1)
    x = x + (gate * gate.sigmoid() * up) @ layer.mlp.down_proj.weight.T
    torch.testing.assert_close(model(input_ids).last_hidden_state[0], norm(x, model.norm), atol=1e-4, rtol=1e-4)


# --- batches and padding


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_equals_padding_on_the_right(attention):
    model = tiny_model(attn_implementation=attention)
    right = model(**tokens([9, 4, 1], side="right")).logits
    left = model(**tokens([9, 4, 1], side="left")).logits
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)  # cosines of larger angles round differently


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_batch_around_a_sequence_does_not_change_its_logits(attention):
    model = tiny_model(attn_implementation=attention)
    batch = model(**tokens([9, 4, 1], width=20)).logits
    inputs = tokens([9, 4, 1])
    for row, length in enumerate([9, 4, 1]):
        torch.testing.assert_close(batch[row], model(inputs["input_ids"][row : row + 1, :length]).logits[0], **CLOSE)


def test_what_stands_under_the_padding_does_not_matter():
    model = tiny_model()
    inputs = tokens([9, 4, 1])
    scribbled = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
    assert torch.equal(model(**inputs).logits, model(scribbled, inputs["attention_mask"]).logits)


def test_order_of_tokens_matters():
    model = tiny_model()
    input_ids = tokens([9])["input_ids"]
    assert (model(input_ids).logits - model(input_ids.flip(1)).logits).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_of_nothing_but_padding_scores_the_bias(attention):
    model = tiny_model(attn_implementation=attention)
    torch.nn.init.uniform_(model.classifier.bias)
    torch.testing.assert_close(model(**tokens([5, 0])).logits[1], model.classifier.bias)


def test_embeddings_in_place_of_tokens():
    model = tiny_model()
    inputs = tokens([9, 4])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    logits = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(logits, model(**inputs).logits)


def test_errors_from_shapes():
    model = tiny_model()
    model(torch.ones(1, 64, dtype=torch.long))
    with pytest.raises(ValueError, match=r"65 positions.*max_position_embeddings=64"):
        model(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(torch.ones(1, 2, dtype=torch.long), inputs_embeds=torch.ones(1, 2, 32))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 3, 3\).*\(1, 3\)"):
        model(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))


# --- attention implementations and precision


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_eager_equals_sdpa(num_key_value_heads):
    model = tiny_model(num_key_value_heads=num_key_value_heads)
    inputs = tokens([9, 4, 1])
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(**inputs).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits, sdpa, **CLOSE)


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values():
    grouped, full = tiny_model(num_key_value_heads=2), tiny_model(num_key_value_heads=4)
    state = grouped.state_dict()
    for name in [name for name in state if "qkv_proj" in name]:
        query, key, value = state[name].split((32, 16, 16))
        key, value = (part.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32) for part in (key, value))
        state[name] = torch.cat((query, key, value))
    full.load_state_dict(state)
    inputs = tokens([9, 4])
    torch.testing.assert_close(grouped(**inputs).logits, full(**inputs).logits, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_stays_its_own_and_close_to_float32(dtype, attention):
    model = tiny_model(attn_implementation=attention, initializer_range=0.1)
    inputs = tokens([9, 4, 1])
    labels = torch.tensor([0, 1, 2])
    reference = model(**inputs).logits
    output = model.to(dtype)(**inputs, labels=labels)
    assert output.logits.dtype == dtype
    assert output.loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(output.logits.float(), reference, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast(attention):
    model = tiny_model(attn_implementation=attention).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**tokens([9, 4]), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- the loss


def test_loss_is_cross_entropy_and_skips_ignored_rows():
    model = tiny_model()
    inputs = tokens([9, 4, 1])
    logits = model(**inputs).logits
    loss = model(**inputs, labels=torch.tensor([2, -100, 1])).loss
    by_hand = -(logits[0].log_softmax(-1)[2] + logits[2].log_softmax(-1)[1]) / 2
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        ("single_label_classification", 3, torch.tensor([0, 1, 2, 1, -100])),
        ("multi_label_classification", 3, torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0.0]])),
        ("regression", 1, torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0])),
        ("regression", 2, torch.tensor([[0.5, -1.0], [2.0, 0.0], [3.0, 1.0], [0.0, 1.0], [1.0, 1.0]])),
    ],
)
def test_micro_batches_add_up_to_the_whole_batch(problem_type, num_labels, labels):
    # Only regression on several targets must be asked for: the others show in num_labels and the labels' dtype
    model = tiny_model(num_labels=num_labels, problem_type="regression" if num_labels == 2 else None)
    inputs = tokens([9, 4, 1, 6, 2])
    whole = model(**inputs, labels=labels).loss
    assert model.config.problem_type == problem_type
    reference = {
        "single_label_classification": F.cross_entropy,
        "multi_label_classification": F.binary_cross_entropy_with_logits,
        "regression": lambda logits, labels: F.mse_loss(logits, labels.view_as(logits)),
    }[problem_type]
    torch.testing.assert_close(whole, reference(model(**inputs).logits, labels))
    num_items = labels.ne(-100).sum()  # as Trainer counts
    parts = [
        model(**{name: x[rows] for name, x in inputs.items()}, labels=labels[rows], num_items_in_batch=num_items).loss
        for rows in (slice(0, 1), slice(1, 5))
    ]
    torch.testing.assert_close(sum(parts), whole, **CLOSE)


def test_another_loss_can_be_put_in_and_gets_num_items_in_batch():
    model = tiny_model()
    model.loss_function = lambda labels, pooled_logits, num_items_in_batch, **kwargs: num_items_in_batch
    assert model(**tokens([3]), labels=torch.tensor([0]), num_items_in_batch=8).loss == 8


# --- training


@OLD_CHECKPOINTING_NAME
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    inputs = {**tokens([9, 4]), "labels": torch.tensor([0, 1])}
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_model(dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(None))
        model(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(calls) == 1 + 2  # the checkpointed layer really ran a second time
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_acts_in_training_only_and_at_each_rate(attention):
    inputs = tokens([9, 4])
    for rate in ("dropout", "attention_dropout", "classifier_dropout"):
        off = {"dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
        model = tiny_model(**{**off, rate: 0.5}, attn_implementation=attention)
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits), rate
    model = tiny_model(**off).train()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_it_learns_from_the_order_of_tokens():
    """Is the first token 1 or 2, with both always there: needs positions, attention and the head to work together."""
    model = CalibTransformerForSequenceClassification(
        tiny_config(initializer_range=0.05, dropout=0.0, num_labels=2)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        labels = torch.randint(0, 2, (32,))
        filler = torch.randint(3, 50, (32, 4))
        input_ids = torch.cat((1 + labels[:, None], filler, 2 - labels[:, None]), dim=1)
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


# --- outputs


@pytest.mark.parametrize("head", [False, True])
def test_hidden_states_and_attentions_on_request(head):
    config = tiny_config(attn_implementation="eager")
    model = (CalibTransformerForSequenceClassification if head else CalibTransformerEncoderModel)(config).eval()
    inputs = tokens([9, 4])
    plain = model(**inputs)
    assert plain.hidden_states is None
    assert plain.attentions is None
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 9, 32)] * 3
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(inputs["input_ids"]))
    if not head:
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 9, 9)] * 2
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
        assert (weights[1, :, :, 4:] == 0).all()  # padding is not looked at


def test_return_dict_false_gives_the_same_in_a_tuple():
    model = tiny_model()
    inputs = {**tokens([9, 4]), "labels": torch.tensor([0, 1])}
    output = model(**inputs)
    loss, logits = model(**inputs, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


# --- saving, loading and the rest of the ecosystem


def test_save_and_load_through_the_auto_classes(tmp_path):
    register()
    register()  # a second time changes nothing
    model, inputs = tiny_model(id2label={0: "a", 1: "b", 2: "c"}), tokens([9, 4])
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CalibTransformerConfig
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is CalibTransformerForSequenceClassification
    assert not any(info.values())
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}

    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is CalibTransformerEncoderModel
    assert torch.equal(encoder(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_a_new_head_on_a_saved_encoder_is_initialised_and_nothing_else_is(tmp_path):
    encoder = CalibTransformerEncoderModel(tiny_config())
    torch.nn.init.uniform_(encoder.norm.weight)  # an initialiser would put ones here
    encoder.save_pretrained(tmp_path)
    # from_pretrained builds the model on the meta device, so a tensor that nobody fills would hold garbage
    model, info = CalibTransformerForSequenceClassification.from_pretrained(
        tmp_path, num_labels=300, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    for name, parameter in encoder.named_parameters():
        assert torch.equal(model.model.get_parameter(name), parameter), name
    assert (model.classifier.bias == 0).all()
    assert model.classifier.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert not list(model.buffers())


def test_initial_weights_have_the_spread_of_the_config():
    for name, parameter in tiny_model(initializer_range=0.07, hidden_size=64).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name == "classifier.bias":
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.07, rel=0.2), name


def test_the_model_files_stand_alone_in_a_repository(tmp_path):
    """`register_for_auto_class` copies the two files: the copies need no hf_calib, and score the same."""
    model, inputs = tiny_model(), tokens([9, 4])
    try:
        CalibTransformerConfig.register_for_auto_class()
        CalibTransformerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
        model.save_pretrained(tmp_path)
    finally:
        CalibTransformerConfig._auto_class = None
        CalibTransformerForSequenceClassification._auto_class = None
    copies = {path.name: path.read_text() for path in tmp_path.glob("*.py")}
    assert set(copies) >= {"configuration_calib_transformer.py", "modeling_calib_transformer.py"}
    assert not any("hf_calib" in text for text in copies.values())
    name = "modeling_calib_transformer.CalibTransformerForSequenceClassification"
    copied_class = get_class_from_dynamic_module(name, tmp_path)
    assert copied_class is not CalibTransformerForSequenceClassification
    assert torch.equal(copied_class.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


@OLD_CHECKPOINTING_NAME
def test_lora():
    model, inputs = tiny_model(), tokens([9, 4])
    targets = ["qkv_proj", "o_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=targets))
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum("lora_A" in name for name in trainable) == 2 * len(targets)
    assert {name.split(".modules_to_save.")[0].rsplit(".")[-1] for name in trainable if "lora" not in name} == {
        "classifier"
    }
    adapted.train()
    adapted(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)
