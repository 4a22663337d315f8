"""A training that is killed goes on from its checkpoint as if nothing had happened, and the calibrator is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_calib import attach_calibrator, attached_calibrator, fold_calibrator, load_calibrated
from hf_calib.calibrators import TemperatureScaling

from . import one_step as tiny


SCRIPT = """
import json, os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import one_step as tiny
from transformers import TrainerCallback


class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


what, folder = sys.argv[2:]
trainer = tiny.make_trainer(
    "token", folder, calibration_loss="focal", max_steps=8, per_device_train_batch_size=4, save_strategy="steps",
    save_steps=2, train_sampling_strategy="random", learning_rate=0.01, gradient_accumulation_steps=2,
    trainer={"callbacks": [Die()] if what == "die" else None},
)
trainer.train(resume_from_checkpoint=True if what == "resume" else None)
losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
weights = sum(float(p.double().abs().sum()) for p in trainer.model.parameters())
print(json.dumps({"losses": losses, "weights": weights, **trainer.evaluate(tiny.held_out_rows("token", 20))}))
"""


def run(what, folder):
    command = [sys.executable, "-c", SCRIPT, str(Path(tiny.__file__).parent), what, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def last_line(done):
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_and_resumed_it_ends_where_it_would_have(tmp_path):
    unbroken = last_line(run("whole", tmp_path / "whole"))
    assert run("die", tmp_path / "killed").returncode == -9
    assert (tmp_path / "killed" / "checkpoint-4").is_dir()
    assert not (tmp_path / "killed" / "checkpoint-6").exists()
    resumed = last_line(run("resume", tmp_path / "killed"))
    assert list(unbroken["losses"]) == [str(step) for step in range(1, 9)]
    assert resumed["losses"] == unbroken["losses"]
    for key in ("weights", "eval_loss", "eval_refinement"):
        assert resumed[key] == pytest.approx(unbroken[key], rel=1e-7)


def test_a_resumed_training_has_the_calibrator_again(tmp_path):
    """As an unbroken one would: suspended while it trains, saved with it, and said to be out of date."""
    stale = "fitted before this training"
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    rows = tiny.held_out_rows("sequence", 20)
    model = tiny.tiny_model("sequence")
    attach_calibrator(model, TemperatureScaling().fit(3 * torch.eye(3), torch.tensor([0, 1, 0])))
    unbroken = tiny.make_trainer("sequence", tmp_path, model=model, trainer={"eval_dataset": rows}, **arguments)
    with pytest.warns(UserWarning, match=stale):
        unbroken.train()
    resumed = tiny.make_trainer("sequence", tmp_path, trainer={"eval_dataset": rows}, **arguments)
    with pytest.warns(UserWarning, match=stale):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(attached_calibrator(resumed.model).temperature, attached_calibrator(model).temperature)
    raw = [trainer.state.log_history[-2]["eval_loss"] for trainer in (unbroken, resumed)]
    calibrated = [trainer.evaluate()["eval_loss"] for trainer in (unbroken, resumed)]
    assert raw[0] == raw[1] > calibrated[0] == calibrated[1]
    with pytest.warns(UserWarning, match="the calibrator was fitted for other weights than these"):
        load_calibrated(tmp_path / "checkpoint-2")


def test_a_calibrator_that_does_not_fit_is_left_and_the_training_goes_on(tmp_path):
    model = tiny.tiny_model("sequence", id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    attach_calibrator(model, TemperatureScaling().fit(3 * torch.eye(3), torch.tensor([0, 1, 0])))
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    with pytest.warns(UserWarning, match="fitted before this training"):
        tiny.make_trainer("sequence", tmp_path, model=model, **arguments).train()
    trainer = tiny.make_trainer("sequence", tmp_path, **arguments)
    with pytest.warns(
        UserWarning, match=r"The calibrator in .*checkpoint-1 is not attached: .*fitted for \['a', 'b', 'c'\]"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2
    assert attached_calibrator(trainer.model) is None


def test_a_calibrator_that_was_in_the_weights_is_not_applied_to_them_again(tmp_path):
    model = fold_calibrator(
        tiny.tiny_model("sequence"), TemperatureScaling().fit(torch.eye(3), torch.tensor([0, 1, 0]))
    )
    args = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False
    )
    Trainer(model, args, train_dataset=tiny.tiny_rows("sequence", 16)).train()
    assert (tmp_path / "checkpoint-1" / "calibrator.json").exists()
    trainer = tiny.make_trainer("sequence", tmp_path, max_steps=2)
    with pytest.warns(UserWarning, match="checkpoint-1 is not attached: it was in the weights") as warned:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [warning.filename for warning in warned if "not attached" in str(warning.message)] == [__file__]
    assert attached_calibrator(trainer.model) is None


def test_a_stock_training_tells_that_the_calibrator_is_of_other_weights(tmp_path):
    model = tiny.tiny_model("sequence")
    attach_calibrator(model, TemperatureScaling().fit(3 * torch.eye(3), torch.tensor([0, 1, 0])))
    model.save_pretrained(tmp_path / "before")
    load_calibrated(tmp_path / "before")  # a warning would be an error
    model = attach_calibrator(tiny.tiny_model("sequence"), attached_calibrator(model))
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    model.eval()(**inputs).logits.sum().backward()  # as an explanation of a prediction does
    model.train()(**inputs)  # as passes with dropout do
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(**inputs)  # as a part of another model that is trained
    model.save_pretrained(tmp_path / "used")
    load_calibrated(tmp_path / "used")  # a warning would be an error
    model = attach_calibrator(tiny.tiny_model("sequence"), attached_calibrator(model))
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False)
    Trainer(model, args, train_dataset=tiny.tiny_rows("sequence", 16)).train()
    model.save_pretrained(tmp_path / "after")
    with pytest.warns(UserWarning, match="fitted for other weights than these"):
        load_calibrated(tmp_path / "after")


def test_a_calibrator_that_is_attached_is_not_replaced_by_the_checkpoints(tmp_path):
    first, second = (TemperatureScaling().fit(size * torch.eye(3), torch.tensor([0, 1, 0])) for size in (3, 5))
    for calibrator, checkpoint in ((first, None), (second, str(tmp_path / "checkpoint-1"))):
        model = attach_calibrator(tiny.tiny_model("sequence"), calibrator)
        trainer = tiny.make_trainer("sequence", tmp_path, model=model, save_strategy="steps", save_steps=1)
        with pytest.warns(UserWarning, match="fitted before this training"):
            trainer.train(resume_from_checkpoint=checkpoint)
        assert torch.equal(attached_calibrator(trainer.model).temperature, calibrator.temperature)


def test_a_checkpoint_carries_the_calibrator_of_the_model(tmp_path):
    model = tiny.tiny_model("sequence")
    calibrator = TemperatureScaling().fit(3 * torch.eye(3), torch.tensor([0, 1, 0]))
    attach_calibrator(model, calibrator)
    trainer = tiny.make_trainer("sequence", tmp_path, model=model, save_strategy="steps", save_steps=1)
    with pytest.warns(UserWarning, match="fitted before this training"):
        trainer.train()
    with pytest.warns(UserWarning, match="the calibrator was fitted for other weights than these"):
        loaded = load_calibrated(tmp_path / "checkpoint-1")
    assert torch.equal(attached_calibrator(loaded).temperature, calibrator.temperature)
    rows = tiny.held_out_rows("sequence", 30)
    fitted = trainer.calibrate(rows)
    trainer.save_model(str(tmp_path / "calibrated"))
    again = load_calibrated(tmp_path / "calibrated")
    assert torch.equal(attached_calibrator(again).temperature, fitted.temperature)
    args = {"input_ids": rows[0]["input_ids"][None], "attention_mask": rows[0]["attention_mask"][None]}
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**args).logits, trainer.model.eval()(**args).logits)
