"""Mixtures of rows: what they are by hand, and which models take them."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2ForSequenceClassification

from hf_calib.training import trainer as trainer_module
from hf_calib.training.mixup import draw_mixture

from . import one_step as tiny
from .test_trainer import assert_equal_steps, collate


def fixed(monkeypatch, share, *, with_itself=False):
    def draw(num_rows, alpha):
        order = torch.arange(num_rows)
        return share, order if with_itself else order.flip(0)

    monkeypatch.setattr(trainer_module, "draw_mixture", draw)


def text_model():
    return tiny.tiny_model("sequence")


def plain_loss(name, model, batch):
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    loss = F.binary_cross_entropy_with_logits if name == "several" else F.cross_entropy
    return loss(logits, batch["labels"])


def mixture_loss(name, model, batch, share):
    labels, attention = batch["labels"], {}
    if name == "image":
        mixed = {"pixel_values": share * batch["pixel_values"] + (1 - share) * batch["pixel_values"].flip(0)}
    else:
        embedded = model.get_input_embeddings()(batch["input_ids"])
        mixed = {"inputs_embeds": share * embedded + (1 - share) * embedded.flip(0)}
        attention = {"attention_mask": batch["attention_mask"] | batch["attention_mask"].flip(0)}
    logits = model(**mixed, **attention).logits
    if name == "several":
        return sum(
            part * F.binary_cross_entropy_with_logits(logits, wanted)
            for part, wanted in ((share, labels), (1 - share, labels.flip(0)))
        )
    return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels.flip(0))


MODELS = {"text": text_model, "image": tiny.image, "several": tiny.several_labels, "shares": text_model}


def rows(name):
    return tiny.tiny_rows("sequence", 16) if name == "text" else tiny.task_rows(name, 16)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weight", [None, 0.5])
def test_a_step_is_the_mixture_s_by_hand(name, weight, tmp_path, monkeypatch):
    fixed(monkeypatch, 0.3)
    arguments = {"mixup_alpha": 0.4, "mixup_weight": weight, "train_sampling_strategy": "sequential"}
    trainer = tiny.make_trainer(
        "sequence", tmp_path, model=MODELS[name](), trainer={"train_dataset": rows(name)}, **arguments
    )
    trainer.train()
    model, batch = MODELS[name](), collate(rows(name))
    expected = mixture_loss(name, model, batch, 0.3)
    if weight is not None:
        expected = weight * expected + plain_loss(name, model, batch)
    expected.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    found = {key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm")}
    assert_equal_steps(found, {"loss": expected.item(), "grad_norm": norm.item()})


def test_accumulated_batches_are_scaled_as_one(tmp_path, monkeypatch):
    fixed(monkeypatch, 0.3, with_itself=True)
    whole = tiny.one_step("sequence", tmp_path, mixup_alpha=0.4, calibration_loss="focal")
    parts = tiny.one_step(
        "sequence", tmp_path, mixup_alpha=0.4, calibration_loss="focal", per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    assert_equal_steps(parts, whole)
    assert_equal_steps(whole, tiny.one_step("sequence", tmp_path, calibration_loss="focal"))


def test_shares_are_drawn_from_a_beta_distribution():
    torch.manual_seed(0)
    shares = torch.tensor([draw_mixture(4, 0.4)[0] for _ in range(4000)])
    assert abs(shares.mean() - 0.5) < 0.02
    assert abs(shares.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01
    assert draw_mixture(4, 1.0)[1].sort().values.tolist() == [0, 1, 2, 3]


def test_an_evaluation_mixes_nothing(tmp_path):
    held_out = tiny.held_out_rows("sequence", 20)
    found = tiny.make_trainer("sequence", tmp_path, mixup_alpha=0.4).evaluate(held_out)
    assert found["eval_nll"] == tiny.make_trainer("sequence", tmp_path).evaluate(held_out)["eval_nll"]


@pytest.mark.parametrize("kind", ["token", "gpt2", "bart"])
def test_models_of_parts_of_an_input_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"mixup_alpha: \w+ cannot be trained on mixtures; allowed are encoders"):
        tiny.make_trainer(kind, tmp_path, mixup_alpha=0.4)


def test_a_classifier_that_looks_for_the_last_token_is_refused(tmp_path):
    """From embeddings GPT-2 cannot tell where a padded text ends."""
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=50, pad_token_id=0, num_labels=3)
    with pytest.raises(ValueError, match="mixup_alpha: GPT2ForSequenceClassification finds the end of a text by its"):
        tiny.make_trainer("sequence", tmp_path, model=GPT2ForSequenceClassification(config), mixup_alpha=0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixup_weight": 1.0}, "mixup_weight: got 1.0; allowed is None where mixup_alpha is 0"),
        ({"mixup_alpha": -1.0}, "mixup_alpha: got -1.0; allowed are finite numbers from 0 up"),
        ({"mixup_alpha": 0.4, "mixup_weight": -1.0}, "mixup_weight: got -1.0; allowed are finite numbers from 0 up"),
    ],
)
def test_numbers_that_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny.make_trainer("sequence", tmp_path, **arguments)
    with pytest.raises(ValueError, match=r"compute_loss_func: got .*; allowed is None"):
        tiny.make_trainer("sequence", tmp_path, trainer={"compute_loss_func": lambda *_: 0}, mixup_alpha=0.4)
