"""The callback in a stock `Trainer`: the scores of `CalibrationTrainer`, and a calibrator when training ends."""

import pytest
import torch
from transformers import BertConfig, BertModel, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_calib import AutoCalibrator, attached_calibrator, load_calibrated, uncalibrated
from hf_calib.training import CalibrationCallback

from . import one_step as tiny


def stock_trainer(kind, folder, rows, **arguments):
    args = TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **arguments,
        },
    )
    model = tiny.TASKS[kind]() if kind in tiny.TASKS else tiny.tiny_language_model(kind)
    train = tiny.task_rows(kind, 16) if kind in tiny.TASKS else tiny.language_rows(16)
    return Trainer(model, args, train_dataset=train, eval_dataset=rows)


def rows_for(kind):
    return tiny.held_out_task_rows(kind, 29) if kind in tiny.TASKS else tiny.held_out_language_rows(kind, 29)


KINDS = [*tiny.OWN_LOSS, *tiny.LANGUAGE_MODELS]


@pytest.mark.filterwarnings("ignore:.*no finite")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_calibrator_are_those_of_our_trainer(kind, tmp_path):
    rows = rows_for(kind)
    trainer = stock_trainer(kind, tmp_path, rows, learning_rate=0.0)
    callback = CalibrationCallback(trainer, rows)
    trainer.add_callback(callback)
    found = trainer.evaluate()
    model = tiny.TASKS[kind]() if kind in tiny.TASKS else None
    ours = tiny.make_trainer(kind, tmp_path, model=model, trainer={"train_dataset": None})
    expected = ours.evaluate(rows)
    names = [f"eval_{name}" for name in ("nll", "ece", "brier", "temperature", "refinement")]
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    logged = [log for log in trainer.state.log_history if "eval_refinement" in log]
    assert [logged[0][name] for name in names] == [found[name] for name in names]

    trainer.train()  # with a learning rate of 0: the same weights
    assert attached_calibrator(trainer.model) is callback.fitted
    fitted = ours.calibrate(rows)
    for name, tensor in fitted.tensors().items():
        torch.testing.assert_close(callback.fitted.tensors()[name], tensor, rtol=1e-5, atol=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoCalibrator.from_pretrained(tmp_path / "saved").name == "temperature"
    after = trainer.evaluate()
    assert after["eval_nll"] <= found["eval_nll"] + 1e-6


def test_the_best_checkpoint_by_refinement_is_kept(tmp_path):
    rows = tiny.held_out_task_rows("several", 40)
    trainer = stock_trainer(
        "several", tmp_path, rows, max_steps=5, learning_rate=0.5, eval_strategy="steps", save_strategy="steps",
        eval_steps=1, save_steps=1, metric_for_best_model="refinement", greater_is_better=False,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.add_callback(CalibrationCallback(trainer))
    trainer.train()
    found = [log["eval_refinement"] for log in trainer.state.log_history if "eval_refinement" in log]
    assert len(found) == 5
    assert trainer.state.best_metric == min(found) < max(found) - 0.01
    assert attached_calibrator(trainer.model) is None


def test_evaluations_of_several_sets(tmp_path):
    sets = {"first": tiny.held_out_task_rows("several", 20), "second": tiny.held_out_task_rows("several", 29)[20:]}
    trainer = stock_trainer("several", tmp_path, sets)
    trainer.add_callback(CalibrationCallback(trainer))
    found = trainer.evaluate()
    ours = tiny.make_trainer("sequence", tmp_path, model=tiny.several_labels())
    for name, rows in sets.items():
        assert found[f"eval_{name}_nll"] == pytest.approx(ours.evaluate(rows)["eval_nll"], rel=1e-6)


def test_the_scores_are_of_the_rows_that_were_evaluated(tmp_path):
    own, other = tiny.held_out_task_rows("several", 20), tiny.held_out_task_rows("several", 29)[20:]
    ours = tiny.make_trainer("sequence", tmp_path, model=tiny.several_labels())
    trainer = stock_trainer("several", tmp_path, {"val": own, "val_hard": other})
    trainer.add_callback(CalibrationCallback(trainer))
    found = trainer.evaluate()
    for name, rows in (("val", own), ("val_hard", other)):
        assert found[f"eval_{name}_nll"] == pytest.approx(ours.evaluate(rows)["eval_nll"], rel=1e-6)
    assert trainer.evaluate(other)["eval_nll"] == found["eval_val_hard_nll"]
    assert trainer.evaluate(other, metric_key_prefix="test")["test_nll"] == found["eval_val_hard_nll"]


def test_in_our_own_trainer_it_only_calibrates(tmp_path):
    rows = tiny.held_out_rows("sequence", 30)
    trainer = tiny.make_trainer("sequence", tmp_path, trainer={"eval_dataset": rows}, eval_strategy="epoch")
    trainer.add_callback(CalibrationCallback(trainer, rows))
    trainer.train()  # a warning would be an error
    assert attached_calibrator(trainer.model) is not None
    assert [set(log) - {"epoch", "step"} != set() for log in trainer.state.log_history].count(False) == 0


def test_early_stopping_reads_its_scores(tmp_path):
    rows = tiny.held_out_task_rows("several", 30)
    trainer = stock_trainer(
        "several", tmp_path, rows, max_steps=12, learning_rate=0.5, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, metric_for_best_model="refinement", greater_is_better=False,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.add_callback(CalibrationCallback(trainer))
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    assert trainer.state.global_step < 12


def test_refusals(tmp_path):
    trainer = stock_trainer("several", tmp_path, None)
    with pytest.raises(ValueError, match="calibrator: got 'temprature'; allowed are 'auto'"):
        CalibrationCallback(trainer, calibrator="temprature")
    headless = Trainer(BertModel(BertConfig(num_hidden_layers=1)), trainer.args)
    with pytest.raises(ValueError, match="model: got BertModel; allowed are transformers models that classify"):
        CalibrationCallback(headless)
    trainer.add_callback(CalibrationCallback(trainer, trainer.train_dataset))
    with pytest.raises(ValueError, match="dataset: 16 of 16 rows are in train_dataset too"):
        trainer.train()
    assert trainer.state.global_step == 0, "before the first step"
    language = stock_trainer("gpt2", tmp_path, None)
    with pytest.raises(ValueError, match="calibrator: got 'vector'; allowed for a language model are temperature"):
        CalibrationCallback(language, calibrator="vector")
    best = stock_trainer("several", tmp_path, None, metric_for_best_model="eval_nll")
    with pytest.raises(ValueError, match="greater_is_better: got True, which keeps the worst where"):
        CalibrationCallback(best)
    CalibrationCallback(stock_trainer("several", tmp_path, None, metric_for_best_model="neg_nll"))  # somebody's own


def test_a_second_training_does_not_see_the_calibrator_of_the_first(tmp_path):
    rows = tiny.held_out_task_rows("image", 29)
    steps = dict.fromkeys(("eval_strategy", "save_strategy"), "steps") | {"eval_steps": 1, "save_steps": 1}
    trainer = stock_trainer("image", tmp_path, rows, **steps)
    callback = CalibrationCallback(trainer, rows)
    trainer.add_callback(callback)
    trainer.train()
    first = callback.fitted
    first.temperature.fill_(5.0)  # it would show
    trainer.train()
    scored = [log for log in trainer.state.log_history if "eval_nll" in log]
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert scored[-1]["eval_nll"] == pytest.approx(losses[-1], rel=1e-5)  # the stock loss is of raw logits
    assert attached_calibrator(trainer.model) is callback.fitted is not first
    found = trainer.evaluate()  # outside of a training, as the calibrator has it
    assert found["eval_nll"] < found["eval_loss"] - 0.01
    with pytest.warns(UserWarning, match="fitted for other weights"):
        load_calibrated(tmp_path / "checkpoint-1")
    trainer.save_model(str(tmp_path / "saved"))
    load_calibrated(tmp_path / "saved")  # a warning would be an error


def test_an_interrupted_training_leaves_the_calibrator_on(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = stock_trainer("image", tmp_path, None)
    ours = tiny.make_trainer("sequence", tmp_path, model=trainer.model, trainer={"train_dataset": None})
    rows = tiny.held_out_task_rows("image", 29)
    ours.calibrate(rows)
    trainer.add_callback(CalibrationCallback(trainer))
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    pixels = rows[0]["pixel_values"][None]
    with torch.no_grad():
        calibrated = trainer.model.eval()(pixels).logits
        with uncalibrated(trainer.model):
            raw = trainer.model(pixels).logits
    assert not torch.allclose(calibrated, raw)


def test_a_metric_that_is_called_a_runtime(tmp_path):
    trainer = stock_trainer("several", tmp_path, tiny.held_out_task_rows("several", 20))
    trainer.compute_metrics = lambda prediction: {"model_runtime": 1.0}
    trainer.add_callback(CalibrationCallback(trainer))
    assert {"eval_model_runtime", "eval_nll", "eval_refinement"} <= set(trainer.evaluate())
