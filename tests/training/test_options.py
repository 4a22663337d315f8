"""Options of `TrainingArguments` that change how a step is computed: the step stays the same."""

import pytest
import torch
import torch.nn.functional as F

from hf_calib import attach_calibrator, attached_calibrator, load_calibrated
from hf_calib.calibrators import TemperatureScaling
from hf_calib.training import CalibrationTrainingArguments

from . import one_step as tiny
from .test_trainer import assert_equal_steps, batch_logits, collate, lora_model


@pytest.mark.slow
@pytest.mark.parametrize("loss", [None, "focal"])
def test_a_compiled_model_takes_the_same_step(loss, tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    found = tiny.one_step("sequence", tmp_path, calibration_loss=loss, **compiled)
    assert_equal_steps(found, tiny.one_step("sequence", tmp_path, calibration_loss=loss))


@pytest.mark.slow
def test_a_compiled_model_with_a_calibrator_is_trained_on_raw_logits(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
    calibrator = TemperatureScaling().fit(3 * torch.eye(3), torch.tensor([0, 1, 0]))
    model = attach_calibrator(tiny.tiny_model("sequence"), calibrator)
    trainer = tiny.make_trainer("sequence", tmp_path, model=model, calibration_loss="focal", **compiled)
    with pytest.warns(UserWarning, match="fitted before this training"):
        trainer.train()
    found = {key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm")}
    assert_equal_steps(found, tiny.one_step("sequence", tmp_path, calibration_loss="focal"))
    trainer.save_model(str(tmp_path / "saved"))
    with pytest.warns(UserWarning, match="fitted for other weights than these"):
        load_calibrated(tmp_path / "saved")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["sequence", "gpt2", "seq2seq"])
def test_gradient_checkpointing_takes_the_same_step(kind, tmp_path):
    found = tiny.one_step(kind, tmp_path, calibration_loss="brier", gradient_checkpointing=True)
    assert_equal_steps(found, tiny.one_step(kind, tmp_path, calibration_loss="brier"))


@pytest.mark.parametrize("kind", ["token", "gpt2"])
@pytest.mark.parametrize("loss", [None, "dual_focal"])
def test_bfloat16_takes_nearly_the_same_step(kind, loss, tmp_path):
    found = tiny.one_step(kind, tmp_path, calibration_loss=loss, bf16=True)
    assert_equal_steps(found, tiny.one_step(kind, tmp_path, calibration_loss=loss), 0.05)


def test_an_evaluation_in_bfloat16_is_computed_in_float32(tmp_path):
    rows = tiny.held_out_rows("token", 20)
    found = tiny.make_trainer("token", tmp_path, bf16_full_eval=True, per_device_eval_batch_size=20).evaluate(rows)
    batch = collate(rows)
    logits = batch_logits(tiny.tiny_model("token").bfloat16(), batch)
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.double().flatten(0, 1), batch["labels"].flatten()).item()
    assert found["eval_nll"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_come_back_with_their_calibrator(tmp_path):
    tiny.tiny_model("sequence").save_pretrained(tmp_path / "base")
    base = type(tiny.tiny_model("sequence")).from_pretrained(tmp_path / "base")
    trainer = tiny.make_trainer(
        "sequence", tmp_path, model=lora_model("sequence", base), learning_rate=1e-3, calibration_loss="focal"
    )
    trainer.train()
    rows = tiny.held_out_rows("sequence", 33)
    fitted = trainer.calibrate(rows)
    trainer.save_model(str(tmp_path / "adapters"))
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    loaded = load_calibrated(tmp_path / "adapters")
    assert torch.equal(attached_calibrator(loaded).temperature, fitted.temperature)
    batch = collate(rows)
    torch.testing.assert_close(batch_logits(loaded, batch), batch_logits(trainer.model, batch))


def test_a_configuration_for_sharded_training_is_accepted(tmp_path):
    args = CalibrationTrainingArguments(
        str(tmp_path),
        calibration_loss="focal",
        use_cpu=True,
        fsdp="full_shard auto_wrap",
        fsdp_config={"transformer_layer_cls_to_wrap": ["BertLayer"]},
    )
    assert args.fsdp_plugin_args is not None
    assert args.make_loss().settings["gamma"] == 3.0
