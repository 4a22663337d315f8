import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertModel,
    TrainingArguments,
)

import hf_calib.functional as functional
from hf_calib.attaching import attach_calibrator, attached_calibrator, uncalibrated
from hf_calib.calibrators import CALIBRATORS, TemperatureScaling
from hf_calib.folding import fold_calibrator
from hf_calib.functional import brier_score, expected_calibration_error
from hf_calib.hub import load_calibrated
from hf_calib.losses import ADDITIVE
from hf_calib.models.configuration_calib_transformer import CalibTransformerConfig
from hf_calib.models.modeling_calib_transformer import CalibTransformerForSequenceClassification
from hf_calib.training import CalibrationTrainer, CalibrationTrainingArguments

from . import one_step as tiny


every_kind = pytest.mark.parametrize("kind", tiny.MODELS)


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def batch_logits(model, batch):
    with torch.no_grad():
        return model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def assert_equal_steps(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for key, value in expected.items():  # where the NLL is flat, rounding moves the best temperature further
        assert found[key] == pytest.approx(value, rel=10 * tolerance if key == "temperature" else tolerance), key


def assert_exact_metrics(found, logits, labels, prefix="eval"):
    kept = labels != -100
    probs, labels = logits[kept].softmax(-1), labels[kept]
    assert found[f"{prefix}_ece"] == pytest.approx(expected_calibration_error(probs, labels).item(), rel=1e-6)
    assert found[f"{prefix}_brier"] == pytest.approx(brier_score(probs, labels).item(), rel=1e-6)


# ---- one step ----


@every_kind
@pytest.mark.parametrize("loss", ADDITIVE)
def test_accumulated_batches_equal_one(kind, loss, tmp_path):
    whole = tiny.one_step(kind, tmp_path, calibration_loss=loss)
    parts = tiny.one_step(
        kind, tmp_path, calibration_loss=loss, per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    assert_equal_steps(parts, whole)

    model, batch = tiny.tiny_model(kind), collate(tiny.tiny_rows(kind, 16))
    by_hand = getattr(functional, f"{loss}_loss")(
        model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
    )
    by_hand.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert_equal_steps(whole, {"loss": by_hand.item(), "grad_norm": norm.item()})


@every_kind
def test_no_loss_is_cross_entropy(kind, tmp_path):
    batch = collate(tiny.tiny_rows(kind, 16))
    logits = batch_logits(tiny.tiny_model(kind), batch)
    expected = F.cross_entropy(logits.reshape(-1, 3), batch["labels"].reshape(-1))
    found = tiny.one_step(kind, tmp_path)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_equal_steps(tiny.one_step(kind, tmp_path, calibration_loss="cross_entropy"), found, 1e-6)


def test_hyperparameters_reach_the_step(tmp_path):
    kwargs = {"calibration_loss": "focal", "calibration_loss_kwargs": {"gamma": 0}}
    assert_equal_steps(tiny.one_step("token", tmp_path, **kwargs), tiny.one_step("token", tmp_path))
    trainer = tiny.make_trainer("token", tmp_path, **kwargs)
    trainer.args.calibration_loss_kwargs = {"gamma": 3.0}  # what a hyper-parameter search does
    trainer.train()
    expected = tiny.one_step("token", tmp_path, calibration_loss="focal")
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_a_step_without_labels_is_not_nan(tmp_path):
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in tiny.tiny_rows("token", 16)]
    trainer = tiny.make_trainer("token", tmp_path, trainer={"train_dataset": rows}, logging_nan_inf_filter=False)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_bfloat16(tmp_path):
    found = tiny.one_step("sequence", tmp_path, bf16=True, calibration_loss="focal")
    assert_equal_steps(found, tiny.one_step("sequence", tmp_path, calibration_loss="focal"), 0.05)


def lora_model(kind, model=None):
    from peft import LoraConfig, TaskType, get_peft_model

    task_type = {"sequence": TaskType.SEQ_CLS, "token": TaskType.TOKEN_CLS}[kind]
    model = tiny.tiny_model(kind) if model is None else model
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, LoraConfig(task_type=task_type, target_modules=["query", "value"], r=2))


def test_peft(tmp_path):
    steps = {}
    for name, batch in {"whole": (16, 1), "parts": (4, 4)}.items():
        model = lora_model("token")
        trainer = tiny.make_trainer(
            "token",
            tmp_path,
            model=model,
            calibration_loss="focal",
            per_device_train_batch_size=batch[0],
            gradient_accumulation_steps=batch[1],
            learning_rate=0.1,
        )
        before = {key: value.clone() for key, value in model.named_parameters()}
        trainer.train()
        steps[name] = {key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm")}
        changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
        assert changed == {
            key for key, value in before.items() if value.requires_grad and "lora_A" not in key
        }  # at the first step lora_B is 0, so lora_A has no gradient
    assert_equal_steps(steps["parts"], steps["whole"])


def calib_transformer():
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return CalibTransformerForSequenceClassification(CalibTransformerConfig(vocab_size=50, num_labels=3, **size))


def bart():
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForSequenceClassification(BartConfig(vocab_size=50, max_position_embeddings=16, **size, **heads))


def bert_with_tuples():
    return tiny.tiny_model("sequence", return_dict=False)


@pytest.mark.parametrize("make_model", [calib_transformer, bart, bert_with_tuples])
def test_other_models(make_model, tmp_path):
    torch.manual_seed(0)
    model = make_model()
    rows = tiny.tiny_rows("sequence", 16)
    if isinstance(model, BartForSequenceClassification):  # needs exactly one end of sentence in each row
        rows = [{**row, "input_ids": row["input_ids"].clone()} for row in rows]
        for row in rows:
            row["input_ids"][row["input_ids"] == 2] = 3
            row["input_ids"][int(row["attention_mask"].sum()) - 1] = 2
    trainer = tiny.make_trainer("sequence", tmp_path, model=model, trainer={"train_dataset": rows})
    trainer.train()
    output = trainer.predict(rows)
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    expected = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(output.label_ids))
    assert output.metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


# ---- models that generate text ----

every_language_model = pytest.mark.parametrize("kind", tiny.LANGUAGE_MODELS)


def language_logits(model, batch):
    """Logits and what each has to predict, computed from the model alone."""
    decoder = {}
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        shifted = F.pad(batch["labels"][:, :-1], (1, 0), value=start)
        shifted = shifted.masked_fill(shifted == -100, model.config.pad_token_id)
        decoder["decoder_input_ids"] = batch.get("decoder_input_ids", shifted)
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"], **decoder).logits
    if model.config.is_encoder_decoder:
        return logits, batch["labels"]
    return logits[:, :-1], batch["labels"][:, 1:]


def mean_nll(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten()).item()


@every_language_model
@pytest.mark.parametrize("loss", ADDITIVE)
def test_accumulated_batches_of_tokens_equal_one(kind, loss, tmp_path):
    whole = tiny.one_step(kind, tmp_path, calibration_loss=loss)
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    assert_equal_steps(tiny.one_step(kind, tmp_path, calibration_loss=loss, **parts), whole)


@every_language_model
def test_losses_of_tokens_are_the_nll(kind, tmp_path):
    expected = mean_nll(*language_logits(tiny.tiny_language_model(kind), collate(tiny.language_rows(16))))
    assert tiny.one_step(kind, tmp_path)["loss"] == pytest.approx(expected, rel=1e-5)
    rows = tiny.language_rows(13, seed=1)
    logits, labels = language_logits(tiny.tiny_language_model(kind), collate(rows))
    found = tiny.make_trainer(kind, tmp_path).evaluate(rows)
    assert found["eval_loss"] == pytest.approx(mean_nll(logits, labels), rel=1e-6)
    assert_exact_metrics(found, logits, labels)


@every_language_model
def test_calibrate_a_language_model(kind, tmp_path):
    rows = tiny.held_out_language_rows(kind, 60)
    trainer = tiny.make_trainer(kind, tmp_path)
    logits, labels = language_logits(trainer.model, collate(rows))
    expected = TemperatureScaling().fit(logits[labels != -100], labels[labels != -100])
    fitted = trainer.calibrate(rows)
    assert float(fitted.temperature) == pytest.approx(float(expected.temperature), rel=1e-4)
    assert attached_calibrator(trainer.model) is fitted
    assert fitted.provenance["rows"] == int((labels != -100).sum())
    torch.testing.assert_close(language_logits(trainer.model, collate(rows))[0], fitted(logits))
    nll = mean_nll(fitted(logits), labels)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(nll, rel=1e-5)
    output = trainer.model.generate(rows[0]["input_ids"][None], max_new_tokens=2, min_new_tokens=2)
    assert output.shape[1] >= 3
    with pytest.raises(ValueError, match="calibrator: got 'isotonic'; allowed for a language model are temperature"):
        trainer.calibrate(rows, calibrator="isotonic")
    with pytest.raises(ValueError, match="dataset: 16 of 16 rows are in train_dataset too"):
        trainer.calibrate(tiny.language_rows(16))
    without = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows]
    with pytest.raises(ValueError, match="labels: no row of any batch is left"):
        trainer.calibrate(without)
    assert attached_calibrator(trainer.model) is fitted


# ---- evaluation ----


@every_kind
@pytest.mark.parametrize("loss", [None, "focal"])
def test_eval_loss_is_the_exact_nll(kind, loss, tmp_path):
    rows = tiny.tiny_rows(kind, 13, seed=1)  # batches of 4, 4, 4 and 1, with differing numbers of labels
    batch = collate(rows)
    logits = batch_logits(tiny.tiny_model(kind), batch)
    expected = F.cross_entropy(logits.reshape(-1, 3).double(), batch["labels"].reshape(-1)).item()
    trainer = tiny.make_trainer(kind, tmp_path, calibration_loss=loss)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    found = trainer.evaluate({"a": rows})
    assert found["eval_a_loss"] == pytest.approx(expected, rel=1e-6)
    assert_exact_metrics(found, logits, batch["labels"], prefix="eval_a")


def test_infinite_logits_are_shown(tmp_path):
    trainer = tiny.make_trainer("sequence", tmp_path)
    trainer.model.classifier.bias.data[0] = torch.inf
    found = trainer.evaluate(tiny.tiny_rows("sequence", 9, seed=1))
    names = ("loss", "ece", "brier", "refinement", "temperature")
    assert np.isnan([found[f"eval_{name}"] for name in names]).all()


def test_labels_that_are_all_ignored_are_no_loss_of_zero(tmp_path):
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in tiny.tiny_rows("token", 5)]
    assert np.isnan(tiny.make_trainer("token", tmp_path).evaluate(rows)["eval_loss"])


def test_eval_loss_shows_nan(tmp_path):
    trainer = tiny.make_trainer("sequence", tmp_path)
    rows = tiny.tiny_rows("sequence", 9, seed=1)
    with torch.no_grad():
        trainer.model.bert.embeddings.word_embeddings.weight[int(rows[8]["input_ids"][0])] = torch.nan
    found = trainer.evaluate(rows)
    assert np.isnan([found["eval_loss"], found["eval_ece"], found["eval_brier"]]).all()


@every_kind
def test_metrics_get_logits_and_labels(kind, tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen.update(logits=prediction.predictions, labels=prediction.label_ids)
        return {"rows": len(prediction.label_ids)}

    rows = tiny.tiny_rows(kind, 6, seed=1)
    trainer = tiny.make_trainer(kind, tmp_path, trainer={"compute_metrics": compute_metrics})
    assert trainer.evaluate(rows)["eval_rows"] == 6
    torch.testing.assert_close(torch.from_numpy(seen["logits"]), batch_logits(trainer.model, collate(rows)))
    assert np.array_equal(seen["labels"], collate(rows)["labels"])


def unlabelled(rows):
    return [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]


def test_predicting_without_labels(tmp_path):
    rows = unlabelled(tiny.tiny_rows("sequence", 5))
    trainer = tiny.make_trainer("sequence", tmp_path, trainer={"train_dataset": rows})
    output = trainer.predict(rows)
    assert output.predictions.shape == (5, 3)
    assert "test_loss" not in output.metrics
    with pytest.raises(ValueError, match=r"inputs: got the columns .*; allowed are batches with labels"):
        trainer.train()
    with pytest.raises(ValueError, match="dataset: got no labelled row; allowed are rows with a label"):
        tiny.make_trainer("sequence", tmp_path).calibrate(unlabelled(tiny.tiny_rows("sequence", 5, seed=1)))
    with pytest.raises(ValueError, match="dataset: got no labelled row; allowed are rows with a label"):
        tiny.make_trainer("sequence", tmp_path, trainer={"train_dataset": None}).calibrate([])


# ---- refusals ----


HEADS = "allowed are transformers models that classify .*, generate text, fill masks or find answers"


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: BertModel(BertConfig(num_hidden_layers=1)), f"model: got BertModel; {HEADS}"),
        (lambda: torch.nn.Linear(2, 3), f"model: got Linear; {HEADS}"),
        (
            lambda: tiny.tiny_model("sequence", problem_type="regression"),
            "model.config.problem_type: got 'regression'; allowed are None, 'single_label_classification', 'multi",
        ),
        (
            lambda: tiny.tiny_model("sequence", num_labels=1),
            "num_labels: got 1, which means regression; allowed",
        ),
    ],
    ids=["no head", "module", "regression", "one label"],
)
def test_models_that_are_refused(make_model, message, tmp_path):
    args = CalibrationTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=message):
        CalibrationTrainer(make_model(), args)
    with pytest.raises(ValueError, match=message):
        CalibrationTrainer(args=args, model_init=make_model)


@pytest.mark.parametrize(
    ("trainer", "arguments", "message"),
    [
        (
            {"compute_loss_func": lambda *_: 0},
            {"calibration_loss": "focal"},
            "compute_loss_func: got .*; allowed is None: the loss is",
        ),
        ({"kind": "gpt2"}, {"calibrator": "vector"}, "calibrator: got 'vector'; allowed for a language model are"),
        ({}, {"label_names": ["tags"]}, r"label_names: got \['tags'\]; allowed is \['labels'\]"),
        (
            {},
            {"calibration_loss": "focal", "label_smoothing_factor": 0.1},
            "label_smoothing_factor: got 0.1; allowed is 0",
        ),
    ],
)
def test_arguments_that_are_refused(trainer, arguments, message, tmp_path):
    kind = trainer.pop("kind", "sequence")
    with pytest.raises(ValueError, match=message):
        tiny.make_trainer(kind, tmp_path, trainer=trainer, **arguments)


def test_arguments_changed_later_are_refused(tmp_path):
    args = CalibrationTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match=r"label_smoothing_factor: got 0\.1; allowed is 0"):
        CalibrationTrainer(tiny.tiny_model("sequence"), args)
    args.label_smoothing_factor, args._n_gpu = 0.0, 2
    with pytest.raises(ValueError, match="n_gpu: got 2; allowed is 1: start one process per GPU with torchrun"):
        CalibrationTrainer(tiny.tiny_model("sequence"), args)


def test_stock_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="args: got TrainingArguments; allowed are CalibrationTrainingArguments"):
        CalibrationTrainer(tiny.tiny_model("sequence"), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_float_labels_are_refused_before_the_first_step(tmp_path):
    rows = [{**row, "labels": row["labels"].float()} for row in tiny.tiny_rows("sequence", 16)]
    trainer = tiny.make_trainer("sequence", tmp_path, trainer={"train_dataset": rows})
    with pytest.raises(ValueError, match=r"labels: got torch\.float32 of shape \(16,\); allowed are class numbers"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert trainer.model.config.problem_type is None
    trainer = tiny.make_trainer("sequence", tmp_path, trainer={"train_dataset": rows}, calibration_loss="brier")
    with pytest.raises(ValueError, match=r"labels: got torch\.float32 of shape \(16,\) for logits"):
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sequence", lambda labels: labels[None], r"int64 of shape \(16, 1\); allowed are .* integers \(B,\)"),
        ("sequence", lambda labels: labels > 0, r"bool of shape \(16,\); allowed are .* integers \(B,\)"),
        ("token", lambda labels: labels[0], r"int64 of shape \(16,\); allowed are .* integers \(B, L\)"),
    ],
)
def test_labels_of_another_shape_or_kind_are_refused_before_the_first_step(kind, change, message, tmp_path):
    """Stock heads take some of these, in training and not in an evaluation."""
    rows = [{**row, "labels": change(row["labels"])} for row in tiny.tiny_rows(kind, 16)]
    trainer = tiny.make_trainer(kind, tmp_path, trainer={"train_dataset": rows})
    with pytest.raises(ValueError, match=rf"labels: got torch\.{message}"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("loss", [None, "focal"])
def test_labels_of_another_width_are_the_same(loss, tmp_path):
    rows = [{**row, "labels": row["labels"].int()} for row in tiny.tiny_rows("sequence", 16)]
    trainer = tiny.make_trainer("sequence", tmp_path, trainer={"train_dataset": rows}, calibration_loss=loss)
    trainer.train()
    expected = tiny.one_step("sequence", tmp_path, calibration_loss=loss)
    assert trainer.state.log_history[0]["loss"] == expected["loss"]


# ---- calibration ----


@every_kind
@pytest.mark.filterwarnings("ignore:.*no finite")
@pytest.mark.parametrize("name", [name for name, kind in CALIBRATORS.items() if not kind.two_classes_only])
def test_calibrate_fits_raw_logits_and_attaches(kind, name, tmp_path):
    trainer = tiny.make_trainer(kind, tmp_path, calibrator=name)
    rows = tiny.held_out_rows(kind, 33)
    batch = collate(rows)
    raw = batch_logits(trainer.model, batch)
    kept = batch["labels"] != -100
    expected = CALIBRATORS[name]().fit(raw[kept], batch["labels"][kept])

    fitted = trainer.calibrate(rows)
    assert type(fitted) is CALIBRATORS[name]
    assert attached_calibrator(trainer.model) is fitted
    torch.testing.assert_close(fitted.log_probs(raw), expected.log_probs(raw), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch_logits(trainer.model, batch), fitted(raw))
    nll = functional.cross_entropy_loss(fitted.log_probs(raw), batch["labels"]).item()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(nll, rel=1e-5)

    again = trainer.calibrate(rows)  # with one attached: the same raw logits, and the old one is replaced
    assert attached_calibrator(trainer.model) is again
    torch.testing.assert_close(again.log_probs(raw), fitted.log_probs(raw))


def test_calibrate_finds_the_temperature(tmp_path):
    trainer = tiny.make_trainer("token", tmp_path, per_device_eval_batch_size=256)
    assert float(trainer.calibrate(tiny.held_out_rows("token", 1500)).temperature) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("num_rows", [30, 3])
def test_calibrate_drops_no_rows(num_rows, tmp_path):
    trainer = tiny.make_trainer("sequence", tmp_path, dataloader_drop_last=True)  # batches of 4
    rows = tiny.held_out_rows("sequence", 30)[:num_rows]
    assert trainer.calibrate(rows).provenance["rows"] == num_rows
    assert trainer.args.dataloader_drop_last


def test_calibrate_selects(tmp_path):
    trainer = tiny.make_trainer("sequence", tmp_path)
    fitted = trainer.calibrate(tiny.held_out_rows("sequence", 40), calibrator="auto")
    assert {"identity", "temperature"} < {row.name for row in fitted.selection}
    assert attached_calibrator(trainer.model) is fitted
    with pytest.raises(ValueError, match=r"calibrator: got 'temprature'; allowed are 'auto', .*'temperature'"):
        trainer.calibrate(tiny.held_out_rows("sequence", 40), calibrator="temprature")


def test_calibrate_is_not_disturbed_by_how_the_user_evaluates(tmp_path):
    rows = tiny.held_out_rows("token", 21)
    expected = float(tiny.make_trainer("token", tmp_path).calibrate(rows).temperature)

    def argmax(logits, labels):
        return logits.argmax(-1)

    def compute_metrics(prediction, compute_result=True):
        raise AssertionError("not asked for")

    user = {"preprocess_logits_for_metrics": argmax, "compute_metrics": compute_metrics}
    for arguments in ({}, {"eval_do_concat_batches": False}, {"batch_eval_metrics": True}):
        trainer = tiny.make_trainer("token", tmp_path, trainer=user, prediction_loss_only=True, **arguments)
        assert float(trainer.calibrate(rows).temperature) == pytest.approx(expected, rel=1e-5)
        assert trainer.preprocess_logits_for_metrics is argmax
        assert trainer.compute_metrics is compute_metrics
        assert trainer.args.prediction_loss_only


@every_kind
def test_calibrate_refuses_rows_that_training_has_seen(kind, tmp_path):
    trainer = tiny.make_trainer(kind, tmp_path)
    fresh = tiny.held_out_rows(kind, 20)
    seen = [dict(row) for row in tiny.tiny_rows(kind, 16)[3:5]]
    seen[0]["input_ids"] = torch.cat([seen[0]["input_ids"], torch.zeros(3, dtype=torch.int64)])  # padded further
    seen[0]["attention_mask"] = torch.cat([seen[0]["attention_mask"], torch.zeros(3, dtype=torch.int64)])
    seen[1]["labels"] = torch.zeros_like(seen[1]["labels"])  # relabelled
    seen[1]["input_ids"] = seen[1]["input_ids"].tolist()  # of another type
    rows = [*fresh, *seen]
    with pytest.raises(ValueError, match=r"dataset: 2 of 22 rows are in train_dataset too \(row 20, 21\)"):
        trainer.calibrate(rows)
    assert attached_calibrator(trainer.model) is None
    with pytest.raises(ValueError, match=r"dataset: 16 of 16 rows are in .* \(row 0, 1, 2, 3, 4, \.\.\.\)"):
        trainer.calibrate(trainer.train_dataset)
    reordered = dict(fresh[0], input_ids=fresh[0]["input_ids"].flip(0), attention_mask=torch.ones(6).long())
    trainer.train_dataset = [reordered]
    trainer.calibrate(fresh)


def test_rows_of_hugging_face_datasets_compare_with_others(tmp_path):
    from datasets import Dataset

    rows = tiny.tiny_rows("sequence", 16)
    lists = [{key: value.tolist() for key, value in row.items()} for row in rows]
    unpadded = [
        {"input_ids": row["input_ids"][: sum(row["attention_mask"])], "labels": row["labels"]} for row in lists
    ]
    narrow = [{**row, "input_ids": np.asarray(row["input_ids"], dtype=np.int32)} for row in lists]
    table = Dataset.from_list(lists)
    trainer = tiny.make_trainer("sequence", tmp_path)
    for dataset in (lists, narrow, unpadded, table, table.with_format("torch")):
        with pytest.raises(ValueError, match="dataset: 16 of 16 rows are in train_dataset too"):
            trainer.calibrate(dataset)


def test_rows_that_cannot_be_compared_are_a_warning(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny.tiny_rows("sequence", 16))

    rows = tiny.held_out_rows("sequence", 20)
    for train_dataset in (Stream(), [{"text": "made into inputs by the collator", "label": 0}], [(1, 2)]):
        trainer = tiny.make_trainer("sequence", tmp_path, trainer={"train_dataset": train_dataset})
        with pytest.warns(UserWarning, match="cannot be checked whether training has seen rows of"):
            trainer.calibrate(rows)
    trainer = tiny.make_trainer("sequence", tmp_path, trainer={"train_dataset": None})
    trainer.calibrate(rows)


def test_rows_without_a_label_are_refused(tmp_path):
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in tiny.held_out_rows("token", 5)]
    with pytest.raises(ValueError, match="dataset: every label is -100; allowed are rows with a label"):
        tiny.make_trainer("token", tmp_path).calibrate(rows)


@every_kind
def test_training_runs_on_raw_logits(kind, tmp_path):
    expected = tiny.one_step(kind, tmp_path)
    model = tiny.tiny_model(kind)
    calibrator = TemperatureScaling().fit(torch.eye(3), torch.tensor([0, 1, 0]))
    attach_calibrator(model, calibrator)
    trainer = tiny.make_trainer(kind, tmp_path, model=model)
    with pytest.warns(UserWarning, match="fitted before this training .* Fit it again: trainer.calibrate"):
        trainer.train()
    assert_equal_steps({key: trainer.state.log_history[0][key] for key in expected}, expected, 1e-6)
    batch = collate(tiny.tiny_rows(kind, 16))
    with uncalibrated(model):
        raw = batch_logits(model, batch)
    torch.testing.assert_close(batch_logits(model, batch), calibrator(raw))


def test_a_calibrator_of_a_model_made_for_the_training_is_suspended_too(tmp_path):
    expected = tiny.one_step("sequence", tmp_path, calibration_loss="focal")

    def make():
        return attach_calibrator(
            tiny.tiny_model("sequence"), TemperatureScaling().fit(3 * torch.eye(3), torch.tensor([0, 1, 0]))
        )

    args = tiny.make_trainer("sequence", tmp_path, calibration_loss="focal").args
    trainer = CalibrationTrainer(args=args, model_init=make, train_dataset=tiny.tiny_rows("sequence", 16))
    with pytest.warns(UserWarning, match="fitted before this training"):
        trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    batch = collate(tiny.tiny_rows("sequence", 4))
    with uncalibrated(trainer.model):
        raw = batch_logits(trainer.model, batch)
    assert not torch.allclose(batch_logits(trainer.model, batch), raw)


def test_a_calibration_set_is_one_data_set(tmp_path):
    for dataset, name in ((None, "NoneType"), ({"a": tiny.tiny_rows("sequence", 5)}, "dict"), ("me/rows", "str")):
        with pytest.raises(ValueError, match=f"dataset: got {name}; allowed is one data set"):
            tiny.make_trainer("sequence", tmp_path).calibrate(dataset)


@pytest.mark.parametrize("is_known", [True, False])
def test_training_forgets_a_calibrator_in_the_weights(is_known, tmp_path):
    """Weights that have changed hold nothing that a calibrator.json beside them could describe."""
    model = tiny.tiny_model("sequence")
    fold_calibrator(model, TemperatureScaling().fit(torch.eye(3), torch.tensor([0, 1, 0])))
    if not is_known:
        model.save_pretrained(tmp_path / "folded")
        model = type(model).from_pretrained(tmp_path / "folded")
    trainer = tiny.make_trainer("sequence", tmp_path, model=model, learning_rate=0.1)
    rows = tiny.held_out_rows("sequence", 33)
    with pytest.raises(ValueError, match="folded into its weights already; " + ("unfold" if is_known else "load it")):
        trainer.calibrate(rows)
    with pytest.warns(UserWarning, match="weights is forgotten, .* trainer.calibrate"):
        trainer.train()
    model.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / "calibrator.json").exists()
    raw = batch_logits(model, collate(rows))
    fitted = trainer.calibrate(rows)
    torch.testing.assert_close(batch_logits(model, collate(rows)), fitted(raw))
    model.save_pretrained(tmp_path / "calibrated")
    loaded = attached_calibrator(load_calibrated(tmp_path / "calibrated"))
    assert torch.equal(loaded.temperature, fitted.temperature)


def test_calibrate_a_peft_model(tmp_path):
    model = lora_model("sequence")
    trainer = tiny.make_trainer("sequence", tmp_path, model=model, learning_rate=0.1)
    trainer.train()
    rows = tiny.held_out_rows("sequence", 33)
    raw = batch_logits(model, collate(rows))
    fitted = trainer.calibrate(rows)
    torch.testing.assert_close(batch_logits(model, collate(rows)), fitted(raw))


def test_calibrate_a_model_that_was_calibrated_before_peft_wrapped_it(tmp_path):
    model = tiny.tiny_model("sequence")
    attach_calibrator(model, TemperatureScaling().fit(torch.eye(3), torch.tensor([0, 1, 0])))
    trainer = tiny.make_trainer("sequence", tmp_path, model=lora_model("sequence", model), learning_rate=0.1)
    with pytest.warns(UserWarning, match="fitted before this training"):
        trainer.train()
    rows = tiny.held_out_rows("sequence", 33)
    with uncalibrated(trainer.model):
        raw = batch_logits(trainer.model, collate(rows))
    fitted = trainer.calibrate(rows)
    torch.testing.assert_close(batch_logits(trainer.model, collate(rows)), fitted(raw))


# ---- two processes ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no finite")
def test_two_processes_equal_one(tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*command, str(Path(tiny.__file__)), str(tmp_path), str(result)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found.pop("processes") == 2
    expected = tiny.measure(tmp_path, per_device=16)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert_equal_steps(found[key], values)
