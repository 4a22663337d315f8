"""The examples do what they say, on inputs that are small enough for a test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_calib import AutoCalibrator


EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*arguments):
    command = [sys.executable, "-W", "error::UserWarning", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.fixture
def text(tmp_path):
    animals, places = ["cat", "dog", "cow", "hen", "fox", "owl"], ["house", "field", "river", "tree", "barn", "road"]
    numbers = range(1, 6)
    lines = [
        f"{number} of {a} in the {p}\tthe {p} has {number} {a}" for a in animals for p in places for number in numbers
    ]
    path = tmp_path / "train.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("auto_class", [AutoModelForSeq2SeqLM, AutoModelForCausalLM])
def test_train_from_text(auto_class, text, tmp_path):
    options = ["--hidden-size", 32, "--layers", 1, "--epochs", 2, "--vocab-size", 300, "--output", tmp_path / "model"]
    if auto_class is AutoModelForCausalLM:
        options.append("--decoder-only")
    result = run(EXAMPLES / "train_from_text.py", text, *options)
    assert result.returncode == 0, result.stderr
    assert "144 lines to train, 18 to calibrate, 18 to validate; 300 tokens" in result.stdout
    for row in ("perplexity", "NLL, nats a token", "token-level ECE", "token-level Brier"):
        before, after = result.stdout.split(f"{row}  ")[1].split("\n")[0].split()
        assert float(before) != float(after)
    assert result.stdout.count("  generated  ") == 5

    model = auto_class.from_pretrained(tmp_path / "model").eval()
    calibrator = AutoCalibrator.from_pretrained(tmp_path / "model")
    assert calibrator.num_labels == len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 300
    with torch.no_grad():
        logits = model(
            torch.tensor([[5, 6]]),
            **({} if "--decoder-only" in options else {"decoder_input_ids": torch.tensor([[1]])}),
        ).logits
    torch.testing.assert_close(calibrator(logits), logits / calibrator.temperature)


def test_a_text_that_is_not_there_or_too_short_is_one_line(tmp_path):
    result = run(EXAMPLES / "train_from_text.py", tmp_path / "none.txt")
    assert result.returncode == 2
    assert "none.txt'; allowed is a text file" in result.stderr.splitlines()[-1]
    (tmp_path / "short.txt").write_text("one line\n")
    result = run(EXAMPLES / "train_from_text.py", tmp_path / "short.txt")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "text: got 1 lines with text; allowed are 100 and more"
