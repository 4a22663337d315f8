"""Reliability diagrams beside the scores, in the trackers that `report_to` names."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import TrackioCallback, WandbCallback

from hf_calib.training import CalibrationCallback, diagrams

from . import one_step as tiny


@pytest.fixture
def drawn(monkeypatch):
    """The numbers of every diagram that is drawn."""
    found, plot = [], diagrams.plot_reliability

    def keep(data, **options):
        found.append(data)
        return plot(data, **options)

    monkeypatch.setattr(diagrams, "plot_reliability", keep)
    return found


def images_in(folder):
    """`{tag: [(step, PNG)]}` of TensorBoard's files."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (path,) = {file.parent for file in folder.rglob("events.out.tfevents.*")}
    accumulator = event_accumulator.EventAccumulator(str(path)).Reload()
    return {
        tag: [(event.step, event.encoded_image_string) for event in accumulator.Images(tag)]
        for tag in accumulator.Tags()["images"]
    }


def evaluating_trainer(folder, **arguments):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "learning_rate": 0.05, **arguments}
    rows = tiny.held_out_rows("sequence", 29)
    return tiny.make_trainer("sequence", folder, trainer={"eval_dataset": rows}, **arguments)


def test_tensorboard_has_a_diagram_for_each_evaluation(tmp_path, drawn):
    trainer = evaluating_trainer(tmp_path, report_to="tensorboard")
    trainer.train()
    images = images_in(tmp_path)
    assert list(images) == ["eval/reliability"]
    assert [step for step, _ in images["eval/reliability"]] == [1, 2, 3]
    assert len({png for _, png in images["eval/reliability"]}) == 3
    assert all(png.startswith(b"\x89PNG") for _, png in images["eval/reliability"])
    scores = [log["eval_ece"] for log in trainer.state.log_history if "eval_ece" in log]
    assert [data.ece for data in drawn] == pytest.approx(scores)
    assert [data.num_rows for data in drawn] == [29] * 3


def test_each_evaluation_set_has_its_own(tmp_path, drawn):
    trainer = evaluating_trainer(tmp_path, report_to="tensorboard", eval_strategy="no")
    rows = trainer.eval_dataset
    trainer.eval_dataset = {"first": rows[:9], "second": rows[9:]}
    trainer.train()
    assert drawn == []
    trainer.evaluate()
    assert list(images_in(tmp_path)) == ["eval/first_reliability", "eval/second_reliability"]
    assert [data.num_rows for data in drawn] == [9, 20]


def test_a_stock_trainer_with_the_callback(tmp_path, drawn):
    rows = tiny.held_out_task_rows("several", 29)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="no", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, report_to="tensorboard",
    )  # fmt: skip
    trainer = Trainer(tiny.several_labels(), args, train_dataset=tiny.task_rows("several", 16), eval_dataset=rows)
    trainer.add_callback(CalibrationCallback(trainer))
    trainer.train()
    assert [step for step, _ in images_in(tmp_path)["eval/reliability"]] == [1, 2]
    scores = [log["eval_ece"] for log in trainer.state.log_history if "eval_ece" in log]
    assert [data.ece for data in drawn] == pytest.approx(scores)
    assert [data.num_rows for data in drawn] == [29 * 3] * 2  # every label is an event


@pytest.mark.parametrize(("kind", "name"), [(WandbCallback, "wandb"), (TrackioCallback, "trackio")])
def test_other_trackers_get_the_same_picture(kind, name, tmp_path, monkeypatch):
    """With a stand-in for the package, which is not installed here."""
    logged = []
    tracker = SimpleNamespace(log=logged.append, Image=lambda pixels: pixels, run=SimpleNamespace(summary={}))
    monkeypatch.setitem(sys.modules, name, tracker)
    callback = object.__new__(kind)
    callback._initialized = True
    setattr(callback, f"_{name}", tracker)
    trainer = evaluating_trainer(tmp_path)
    trainer.add_callback(callback)
    trainer.state.global_step = 7
    trainer.evaluate()
    scores, diagram = logged
    assert "eval/ece" in scores
    assert set(diagram) == {"eval/reliability", "train/global_step"}
    assert diagram["train/global_step"] == scores["train/global_step"] == 7
    pixels = torch.from_numpy(diagram["eval/reliability"])
    assert pixels.dtype == torch.uint8
    assert pixels.shape[2] == 3
    assert pixels.shape[0] > pixels.shape[1] > 300
    assert len(pixels.reshape(-1, 3).unique(dim=0)) > 20


def test_nothing_is_drawn_without_a_tracker_or_of_shares(tmp_path, drawn):
    evaluating_trainer(tmp_path / "none").train()
    rows = {"train_dataset": tiny.task_rows("shares", 16), "eval_dataset": tiny.held_out_task_rows("shares", 9)}
    trainer = tiny.make_trainer(
        "sequence", tmp_path / "shares", trainer=rows, eval_strategy="steps", report_to="tensorboard",
        calibration_loss="cross_entropy",
    )  # fmt: skip
    trainer.train()
    assert any("eval_refinement" in log for log in trainer.state.log_history)
    assert drawn == []


def test_without_matplotlib_it_says_so_and_trains_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = evaluating_trainer(tmp_path, report_to="tensorboard", max_steps=1)
    with pytest.warns(UserWarning, match="No reliability diagram is logged: matplotlib is not installed"):
        trainer.train()
    assert trainer.state.global_step == 1
