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

from hf_calib.demo import prove

from .tiny import save_sentiment_classifier


COMMAND = [str(Path(sys.executable).parent / "hf-calib"), "demo", "--fast"]
LEFT_BEHIND = "no half-written folder may be left behind"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One cache for all of them: only the first builds the data set."""
    return os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("home")), "COLUMNS": "80"}


@pytest.mark.parametrize(("method", "applied"), [("temperature", "folded"), ("isotonic", "attached")])
def test_the_demo_ends_in_a_folder_that_is_proven(method, applied, environment, tmp_path):
    command = [*COMMAND, "--method", method, "--output", "made"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for step in ("1. Data", "2. Train", "3. Calibrating", "4. Before", "5. Saved", "6. A new process", "7. Your turn"):
        assert step in result.stdout
    assert "scores are the calibrated ones" in result.stdout
    folder = tmp_path / "made"
    for name in ("model.safetensors", "tokenizer.json", "calibrator.safetensors", "reliability.png"):
        assert (folder / name).stat().st_size > 0
    record = json.loads((folder / "calibrator.json").read_text())
    assert (record["type"], record["applied"]) == (method, applied)
    card = ModelCard.load(folder / "README.md")
    metrics = {result.metric_type for result in card.data.eval_results}
    assert metrics == {"accuracy", "nll", "brier", "ece", "smooth_ece"}
    assert "| Smooth ECE |" in card.text
    assert [path.name for path in tmp_path.iterdir()] == ["made"], LEFT_BEHIND


def test_an_interrupted_demo_leaves_nothing(environment, tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--output", "made"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    for line in process.stdout:
        if line.startswith("2. Training"):
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "hf-calib: interrupted; no half-written folder is left"
    assert list(tmp_path.iterdir()) == [], LEFT_BEHIND


def test_the_proof_can_fail(tmp_path):
    """A folder whose scores are not the promised ones is not passed off as calibrated."""
    save_sentiment_classifier(tmp_path)
    promised = torch.tensor([[1.0, 0.0]])
    with pytest.raises(RuntimeError, match="miss the calibrated ones"):
        prove(tmp_path, "folded", ["good"], promised, promised, ["negative", "positive"], Console())
