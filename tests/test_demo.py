"""The demo, small: the whole path from text to a proven folder, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console

from hf_calib import TemperatureScaling
from hf_calib.demo import prove


COMMAND = [str(Path(sys.executable).parent / "hf-calib"), "demo", "--fast"]
LEFT_BEHIND = "no half-written folder may be left behind"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One cache for all of them: only the first builds the data set."""
    return os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("home")), "COLUMNS": "80"}


@pytest.mark.parametrize(("method", "applied"), [("temperature", "folded"), ("isotonic", "attached")])
def test_the_demo_ends_in_a_folder_that_is_proven(method, applied, environment, tmp_path):
    started = time.monotonic()
    result = subprocess.run(
        [*COMMAND, "--method", method, "--output", "made"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert time.monotonic() - started < 120  # 20 s on two quiet cores
    for step in ("1. Data", "2. Training", "3. Calibrating", "4. Before", "5. Saved", "6. A new process", "7. Your turn"):
        assert step in result.stdout
    assert "scores are the calibrated ones" in result.stdout
    folder = tmp_path / "made"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "README.md", "calibrator.json", "calibrator.safetensors", "config.json", "model.safetensors", "reliability.png",
        "tokenizer.json",
    }  # fmt: skip
    record = json.loads((folder / "calibrator.json").read_text())
    assert (record["type"], record["applied"]) == (method, applied)
    card = ModelCard.load(folder / "README.md")
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "nll", "brier", "ece", "smooth_ece"}
    assert "| Smooth ECE |" in card.text
    assert [path.name for path in tmp_path.iterdir()] == ["made"], LEFT_BEHIND


def test_an_interrupted_demo_leaves_nothing(environment, tmp_path):
    process = subprocess.Popen([*COMMAND, "--output", "made"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    for line in process.stdout:
        if line.startswith("2. Training"):
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "hf-calib: interrupted; nothing was saved"
    assert list(tmp_path.iterdir()) == [], LEFT_BEHIND


def test_the_proof_can_fail(tiny_classifier, tiny_tokenizer, tmp_path):
    """A folder whose scores are not the promised ones is not passed off as calibrated."""
    model = tiny_classifier(["a", "b"])
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    promised = TemperatureScaling().fit(torch.tensor([[2.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
    expected = promised.log_probs(torch.tensor([[9.0, 0.0]])).exp()
    with pytest.raises(RuntimeError, match="miss the calibrated ones"):
        prove(tmp_path, "folded", ["good"], expected, expected, ["a", "b"], Console())
