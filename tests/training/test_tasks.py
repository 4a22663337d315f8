"""Tasks beside classification and generation: several labels, shares, masks, answers, images; other losses."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from hf_calib import attached_calibrator
from hf_calib.calibrators import TemperatureScaling, make_calibrator
from hf_calib.functional import brier_score, expected_calibration_error
from hf_calib.losses import ADDITIVE, LOSSES, make_loss
from hf_calib.training.targets import LABELS_COME_SHIFTED

from . import one_step as tiny
from .test_trainer import assert_equal_steps, collate


PARTS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize("name", tiny.TASKS)
@pytest.mark.parametrize("loss", [None, *ADDITIVE])
def test_accumulated_batches_equal_one(name, loss, tmp_path):
    if name == "shares" and loss in (None, "dual_focal"):
        with pytest.raises(ValueError, match=r"labels: got a? ?torch\.float32"):
            tiny.task_step(name, tmp_path, calibration_loss=loss)
        return
    whole = tiny.task_step(name, tmp_path, calibration_loss=loss)
    assert_equal_steps(tiny.task_step(name, tmp_path, calibration_loss=loss, **PARTS), whole)


@pytest.mark.parametrize("name", tiny.OWN_LOSS)
def test_no_loss_is_the_models_own(name, tmp_path):
    model, batch = tiny.TASKS[name](), collate(tiny.task_rows(name, 16))
    if "answers" in name:  # whose own weighs starts and ends alike, however many are in the text
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        output = model(**inputs)
        logits = torch.cat([output.start_logits, output.end_logits])
        labels = torch.cat([batch["start_positions"], batch["end_positions"]])
        own = F.cross_entropy(logits, labels.where(labels < 6, -100).where(labels >= 0, -100))
    else:
        own = model(**batch).loss
    own.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    expected = {"loss": own.item(), "grad_norm": norm.item()}
    assert_equal_steps(tiny.task_step(name, tmp_path), expected)
    assert_equal_steps(tiny.task_step(name, tmp_path, calibration_loss="cross_entropy"), expected)


def decoder_alone(model_type):
    """A tiny decoder by the name of its configuration, whose sizes have many names."""
    sizes = dict.fromkeys(
        ("d_model", "hidden_size", "n_embd", "emb_dim", "dim_model", "d_inner", "intermediate_size"), 16
    )
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "dim_ff"), 16)
    sizes |= dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers"), 1)
    sizes |= dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 1)
    sizes |= dict.fromkeys(("n_head", "n_heads", "num_attention_heads", "attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_decoder_attention_heads"), 2)
    config = AutoConfig.for_model(model_type)
    known = {name: value for name, value in sizes.items() if hasattr(config, name)}
    if model_type == "prophetnet":  # which has the name, and refuses it
        del known["num_hidden_layers"]
    config = type(config)(**known, vocab_size=50, pad_token_id=0, is_decoder=True)
    torch.manual_seed(0)
    auto_class = AutoModelForMaskedLM if model_type == "flaubert" else AutoModelForCausalLM
    return auto_class.from_config(config).eval()


@pytest.mark.parametrize("model_type", [*LABELS_COME_SHIFTED, "bert", "electra", "gpt2", "opt", "xglm"])
def test_the_rows_of_a_decoder_are_those_of_its_own_loss(model_type, tmp_path):
    model, rows = decoder_alone(model_type), tiny.language_rows(8)
    for row in rows:  # some of these models compute another loss with a mask, or know only unpadded texts
        row.update(input_ids=row["input_ids"].clamp_min(1), attention_mask=torch.ones(6, dtype=torch.long))
    model.disable_ngram_loss = True  # of ProphetNet, whose own is else also of the token after the next
    with torch.no_grad():
        own = float(model(**collate(rows)).loss)
    trainer = tiny.make_trainer("sequence", tmp_path, model=model)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(own, rel=1e-5)


def test_a_penalty_of_the_model_counts_too(tmp_path):
    class WithPenalty(type(tiny.tiny_model("sequence"))):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            output = super().forward(input_ids, attention_mask, labels=labels)
            return type(output)(loss=None if output.loss is None else output.loss + 3, logits=output.logits)

    model = WithPenalty(tiny.tiny_model("sequence").config)
    model.load_state_dict(tiny.tiny_model("sequence").state_dict())
    trainer = tiny.make_trainer("sequence", tmp_path, model=model, **PARTS)
    trainer.train()
    expected = tiny.one_step("sequence", tmp_path)["loss"] + 3
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_several_labels_may_be_whole_numbers_and_ignored(tmp_path):
    rows = tiny.task_rows("several", 16)
    for row in rows[::2]:
        row["labels"][1] = -100
    found = [
        tiny.make_trainer(
            "sequence", tmp_path, model=tiny.several_labels(), trainer={"train_dataset": each}, **batches
        )
        for each in (rows, [{**row, "labels": row["labels"].long()} for row in rows])
        for batches in ({}, PARTS)
    ]
    for trainer in found:
        trainer.train()
    batch = collate(rows)
    logits = tiny.several_labels()(batch["input_ids"], batch["attention_mask"]).logits
    kept = batch["labels"] != -100
    expected = F.binary_cross_entropy_with_logits(logits[kept], batch["labels"][kept]).item()
    assert [trainer.state.log_history[0]["loss"] for trainer in found] == [pytest.approx(expected, rel=1e-5)] * 4


def test_a_decoder_that_cannot_shift_its_labels_is_helped(tmp_path):
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {f"{side}_{key}": 1 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16, "init_std": 0.3, "dropout": 0.0}
    config = M2M100Config(
        vocab_size=50, max_position_embeddings=16, pad_token_id=0, decoder_start_token_id=2, attention_dropout=0.0,
        activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0, **sizes,
    )  # fmt: skip
    model = M2M100ForConditionalGeneration(config)
    rows = tiny.language_rows(16)
    own = model.eval()(**collate(rows)).loss.item()
    trainer = tiny.make_trainer("bart", tmp_path, model=model)
    assert trainer.evaluate(rows)["eval_nll"] == pytest.approx(own, rel=1e-5)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(own, rel=1e-5)
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"model.config: got decoder_start_token_id=None and pad_token_id=0; allowed"):
        trainer.evaluate(rows)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_virtual_tokens_of_a_tuned_prompt_predict_nothing(tmp_path):
    from peft import PromptTuningConfig, TaskType, get_peft_model

    torch.manual_seed(0)
    prompt = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model = get_peft_model(tiny.tiny_language_model("gpt2"), prompt)
    trainer = tiny.make_trainer("gpt2", tmp_path, model=model, calibration_loss="cross_entropy")
    rows = tiny.language_rows(16)
    batch = collate(rows)
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 3:-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    assert trainer.evaluate(rows)["eval_nll"] == pytest.approx(expected, rel=1e-5)
    trainer.train()


def test_what_a_stock_head_would_misread_is_refused(tmp_path):
    rows = [{**row, "labels": torch.tensor(5)} for row in tiny.tiny_rows("sequence", 16)]
    with pytest.raises(ValueError, match="labels: got 5; allowed are 0 to 2"):
        tiny.make_trainer("sequence", tmp_path, trainer={"train_dataset": rows}).train()

    class Dumb(type(tiny.tiny_model("sequence"))):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return {"loss": super().forward(input_ids, attention_mask, labels=labels).loss}

    model = Dumb(tiny.tiny_model("sequence").config)
    with pytest.raises(ValueError, match="model: got Dumb, which gives no logits"):
        tiny.make_trainer("sequence", tmp_path, model=model, calibration_loss="focal").train()


def test_a_model_without_a_loss_of_its_own_needs_a_name(tmp_path):
    class Silent(type(tiny.tiny_model("sequence"))):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return super().forward(input_ids, attention_mask)

    model = Silent(tiny.tiny_model("sequence").config)
    with pytest.raises(ValueError, match="calibration_loss: got None, and Silent gives no loss of its own; name one"):
        tiny.make_trainer("sequence", tmp_path, model=model).train()
    tiny.make_trainer("sequence", tmp_path, model=model, calibration_loss="brier").train()


@pytest.mark.parametrize("kind", ["sequence", "bart"])
def test_a_loss_function_of_the_user(kind, tmp_path):
    def total(outputs, labels, num_items_in_batch):
        logits = outputs.logits.flatten(0, -2)
        return F.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch

    for batches in ({}, PARTS):
        trainer = tiny.make_trainer(kind, tmp_path, trainer={"compute_loss_func": total}, **batches)
        trainer.train()
        found = {key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm")}
        assert_equal_steps(found, tiny.one_step(kind, tmp_path, calibration_loss="cross_entropy"))


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - set(ADDITIVE)))
def test_a_loss_of_the_batch_is_the_mean_of_the_parts(loss, tmp_path):
    whole = tiny.one_step("token", tmp_path, calibration_loss=loss)
    model, rows = tiny.tiny_model("token"), tiny.tiny_rows("token", 16)
    values, counts = [], []
    for part in (rows, *(rows[start : start + 4] for start in range(0, 16, 4))):
        batch = collate(part)
        values.append(make_loss(loss)(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]))
        counts.append((batch["labels"] != -100).sum())
    assert whole["loss"] == pytest.approx(values[0].item(), rel=1e-5)
    expected = sum(value * count for value, count in zip(values[1:], counts[1:], strict=True)) / counts[0]
    parts = tiny.one_step("token", tmp_path, calibration_loss=loss, **PARTS)
    assert parts["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights_reach_the_step(tmp_path):
    weights = {"calibration_loss": "cross_entropy", "calibration_loss_kwargs": '{"class_weights": [1, 0, 3]}'}
    batch = collate(tiny.tiny_rows("sequence", 16))
    logits = tiny.tiny_model("sequence")(batch["input_ids"], batch["attention_mask"]).logits
    total = F.cross_entropy(logits, batch["labels"], weight=torch.tensor([1.0, 0, 3]), reduction="sum")
    assert tiny.one_step("sequence", tmp_path, **weights)["loss"] == pytest.approx(total.item() / 16, rel=1e-5)


# -- evaluation and calibration


def rows_by_hand(name, model, batch):
    """Rows of logits in float64, and their labels, from the model alone."""
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        output = model.eval()(**inputs)
    if "answers" in name:
        logits = torch.stack([output.start_logits, output.end_logits], 1)
        labels = torch.stack([batch["start_positions"], batch["end_positions"]], 1)
        inside = (labels >= 0) & (labels < 6)
        logits, labels = logits[inside], labels[inside]
    elif name == "several":
        logits = torch.stack([torch.zeros_like(output.logits), output.logits], -1).flatten(0, 1)
        labels = batch["labels"].flatten().long()
    elif name == "masked":
        logits, labels = output.logits[batch["labels"] != -100], batch["labels"][batch["labels"] != -100]
    else:
        logits, labels = output.logits, batch["labels"]
    return logits.double(), labels


@pytest.mark.parametrize("name", tiny.TASKS)
def test_scores_of_an_evaluation(name, tmp_path):
    rows = tiny.held_out_task_rows(name, 45)
    trainer = tiny.make_trainer("sequence", tmp_path, model=tiny.TASKS[name]())
    found = trainer.evaluate(rows)
    logits, labels = rows_by_hand(name, tiny.TASKS[name](), collate(rows))
    nll = F.cross_entropy(logits, labels.double() if name == "shares" else labels).item()
    assert found["eval_loss"] == found["eval_nll"] == pytest.approx(nll, rel=1e-6)
    temperature = TemperatureScaling().fit(logits, labels).temperature
    best = F.cross_entropy(
        logits / temperature.clamp(1 / 8, 8), labels.double() if name == "shares" else labels
    ).item()
    assert found["eval_refinement"] == pytest.approx(best, rel=1e-5)
    assert found["eval_temperature"] == pytest.approx(temperature.clamp(1 / 8, 8).item(), rel=1e-3)
    if name == "shares":
        assert torch.tensor([found["eval_ece"], found["eval_brier"]]).isnan().all()
        return
    probs = logits.softmax(-1)[:, 1] if name == "several" else logits.softmax(-1)
    assert found["eval_ece"] == pytest.approx(expected_calibration_error(probs, labels).item(), rel=1e-5)
    assert found["eval_brier"] == pytest.approx(brier_score(probs, labels).item(), rel=1e-5)


@pytest.mark.parametrize("name", tiny.TASKS)
def test_calibrate(name, tmp_path):
    rows = tiny.held_out_task_rows(name, 45)
    trainer = tiny.make_trainer("sequence", tmp_path, model=tiny.TASKS[name](), trainer={"train_dataset": None})
    before = trainer.evaluate(rows)
    fitted = trainer.calibrate(rows)
    assert attached_calibrator(trainer.model) is fitted
    after = trainer.evaluate(rows)
    if name == "several":  # a temperature for each label, where the evaluation has one for all
        batch = collate(rows)
        with torch.no_grad():
            logits = tiny.TASKS[name]().eval()(batch["input_ids"], batch["attention_mask"]).logits
        expected = make_calibrator("temperature", task="multilabel").fit(logits, batch["labels"].long())
        torch.testing.assert_close(fitted(logits), expected(logits), rtol=1e-4, atol=1e-5)
        assert after["eval_nll"] < before["eval_refinement"]
    else:
        assert float(fitted.temperature) == pytest.approx(before["eval_temperature"], rel=1e-3)
        assert after["eval_nll"] == pytest.approx(before["eval_refinement"], rel=1e-5)


def test_texts_of_other_lengths_have_other_numbers_of_positions(tmp_path):
    def trimmed(rows):
        batch = collate(rows)
        longest = int(batch["attention_mask"].sum(1).max())
        return {key: value[:, :longest] if value.dim() == 2 else value for key, value in batch.items()}

    rows = tiny.held_out_task_rows("answers", 48)
    rows.sort(key=lambda row: int(row["attention_mask"].sum()))
    trainer = tiny.make_trainer(
        "sequence", tmp_path, model=tiny.reader(), trainer={"train_dataset": None, "data_collator": trimmed}
    )
    fitted, logits, labels = trainer.calibrate(rows), [], []
    for start in range(0, 48, 4):
        batch = trimmed(rows[start : start + 4])
        length = batch["input_ids"].shape[1]
        with torch.no_grad():
            output = tiny.reader().eval()(batch["input_ids"], batch["attention_mask"])
        for name in ("start", "end"):
            kept = (batch[f"{name}_positions"] >= 0) & (batch[f"{name}_positions"] < length)
            logits.append(F.pad(output[f"{name}_logits"][kept], (0, 6 - length), value=-torch.inf))
            labels.append(batch[f"{name}_positions"][kept])
    expected = TemperatureScaling().fit(torch.cat(logits), torch.cat(labels))
    assert float(fitted.temperature) == pytest.approx(float(expected.temperature), rel=1e-4)


def test_what_does_not_fit_the_task_is_refused(tmp_path):
    trainer = tiny.make_trainer("sequence", tmp_path, model=tiny.reader(), trainer={"train_dataset": None})
    with pytest.raises(ValueError, match="calibrator: got 'auto'; allowed for a model that finds answers are temper"):
        trainer.calibrate(tiny.task_rows("answers", 8), calibrator="auto")
    trainer = tiny.make_trainer(
        "sequence", tmp_path, model=tiny.reader(), trainer={"train_dataset": tiny.task_rows("several", 4)}
    )
    with pytest.raises(ValueError, match=r"inputs: got the columns .*allowed are batches with start_positions, end_p"):
        trainer.train()
    trainer = tiny.make_trainer("several", tmp_path, model=tiny.several_labels(), trainer={"train_dataset": None})
    fitted = trainer.calibrate(tiny.held_out_task_rows("several", 60), calibrator="auto")
    names = {row.name for row in fitted.members[0].selection}
    assert "temperature" in names


def test_rows_of_answers_that_were_trained_on_are_refused(tmp_path):
    train = tiny.task_rows("answers", 12)
    trainer = tiny.make_trainer("sequence", tmp_path, model=tiny.reader(), trainer={"train_dataset": train})
    with pytest.raises(ValueError, match="dataset: 12 of 12 rows are in train_dataset too"):
        trainer.calibrate([{**row, "start_positions": torch.tensor(0)} for row in train])


def test_the_best_checkpoint_by_refinement_is_kept(tmp_path):
    trainer = tiny.make_trainer(
        "sequence",
        tmp_path,
        trainer={"eval_dataset": tiny.held_out_rows("sequence", 40)},
        max_steps=6,
        learning_rate=0.5,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        metric_for_best_model="refinement",
        load_best_model_at_end=True,
    )
    trainer.train()
    found = [log["eval_refinement"] for log in trainer.state.log_history if "eval_refinement" in log]
    assert len(found) == 6
    assert max(found) > min(found) + 0.01
    assert trainer.state.best_metric == min(found)
    assert trainer.evaluate()["eval_refinement"] == pytest.approx(min(found), rel=1e-6)
