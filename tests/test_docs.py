"""What the documentation says is true: every block runs, every doctest passes, every number has a result file."""

import doctest
import importlib
import importlib.util
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from functools import partial
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import pipeline

import hf_calib
import hf_calib.pipelines

from .loopback_hub import LoopbackHub
from .tiny import (
    SPECIAL,
    make_classifier,
    make_reader,
    make_tokenizer,
    make_writer,
    mostly_predicted,
    save_chat_model,
    save_sentiment_classifier,
)


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
MODULES = [info.name for info in pkgutil.walk_packages(hf_calib.__path__, "hf_calib.")]
WORDS = ("good", "fine", "great", "bad", "poor", "awful")


WHAT_THE_READER_HAS_THEN = """
untouched = AutoModelForSequenceClassification.from_pretrained("me/my-classifier")
raw = hf_calib.collect_predictions(untouched, load_dataset("me/my-reviews", split="test"), processing_class=tokenizer)
assert (test.logits - raw.logits).abs().max() < 1e-5
trained = hf_calib.load_calibrated("trained-and-calibrated")
assert trained.config.hf_calib_folded == "temperature"
"""


def reviews(model: Path, num_rows: int, offset: int) -> Dataset:
    """Texts of two words, no two of them equal."""
    texts = [f"{WORDS[index % len(WORDS)]} {index + offset}" for index in range(num_rows)]
    return Dataset.from_dict({"text": texts, "label": mostly_predicted(model, texts)})


def save_other_models(folder: Path) -> None:
    """All know a few words; the reader is right about three in four of the questions beside it."""
    words = [*WORDS, *map(str, range(20))]
    makers = {"my-reader": make_reader, "my-translator": make_writer, "my-reranker": partial(make_classifier, ["yes"])}
    for name, make in makers.items():
        make(vocab_size=len(SPECIAL) + len(words)).save_pretrained(folder / name)
        make_tokenizer(words).save_pretrained(folder / name)
    read = pipeline("calibrated-question-answering", model=str(folder / "my-reader"))
    rows = []
    for index in range(40):
        example = {"question": WORDS[index % 6], "context": " ".join(words[(index + 5 * i) % 26] for i in range(30))}
        rows.append({**example, "answer": read(example)["answer"] if index % 4 else ""})
    Dataset.from_list(rows).to_json(folder / "my-questions" / "validation.jsonl")


def decision_rows(num_rows: int) -> str:
    """Requests with answers, a line each."""
    questions = {"refund": {"type": "noul"}, "tone": {"type": "choice", "criteria": {"calm": None, "angry": None}}}
    rows = []
    for index in range(num_rows):
        answers = {"refund": index % 3 == 0, "tone": "calm" if index % 2 else "angry"}
        rows.append({"state": str(index), "questions": questions, "answers": answers})
    return "\n".join(map(json.dumps, rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the README's repo ids are local folders and its files exist."""
    folder = tmp_path_factory.mktemp("readme")
    model = folder / "me" / "my-classifier"
    save_sentiment_classifier(model)
    for offset, split in enumerate(("train", "validation", "test")):
        reviews(model, 80, 1000 * offset).to_json(folder / "me" / "my-reviews" / f"{split}.jsonl")
    save_other_models(folder / "me")
    save_chat_model(folder / "me" / "my-chat", num_numbers=60)
    (folder / "decisions.jsonl").write_text(decision_rows(60))
    probs = torch.rand(50, 3, dtype=torch.float64).softmax(-1)
    labels = torch.randint(3, (50,)).tolist()
    Dataset.from_dict({"probs": probs.tolist(), "label": labels}).to_parquet(folder / "predictions.parquet")
    columns = {f"probs_{index}": probs[:, index].tolist() for index in range(3)}
    Dataset.from_dict({**columns, "label": labels}).to_csv(folder / "predictions.csv")
    return folder


def run(command: list[str], folder: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """The command in that folder, with its output."""
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_readme_has_blocks_of_both_kinds_and_no_others():
    assert PYTHON
    assert SHELL
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.slow
def test_the_readme_s_python_runs_from_top_to_bottom(place):
    result = run([sys.executable, "-c", "\n".join([*PYTHON, WHAT_THE_READER_HAS_THEN])], place)
    assert result.returncode == 0, result.stderr
    assert "Smooth ECE" in result.stdout
    assert "NLL falls by" in result.stdout, "the README calibrates what is calibrated already"
    for made in ("my-classifier-calibrated", "my-calibrator", "my-answers", "trained-and-calibrated"):
        assert (place / made / "calibrator.json").is_file(), made
    assert (place / "reliability.png").is_file()


@pytest.mark.slow
def test_the_readme_s_commands_run_in_order(place):
    commands = [line for line in SHELL if line.startswith("hf-calib")]
    if importlib.util.find_spec("transformers.decision") is None:  # before 5.23
        commands = [line for line in commands if "decision" not in line]
    assert len(commands) >= 4
    with LoopbackHub() as hub:
        for line in commands:
            command = [str(Path(sys.executable).parent / "hf-calib"), *shlex.split(line)[1:]]
            result = run(command, place, hub.env(place / "hf_home"))
            assert result.returncode == 0, f"{line}\n{result.stderr}"
    assert hub.commits("me/my-classifier-calibrated") == ["Upload calibrated model"]


def test_the_readme_s_make_targets_exist():
    targets = {line.split()[1] for line in SHELL if line.startswith("make")} | set(
        re.findall(r"`make ([\w-]+)", README)
    )
    assert targets >= {"demo", "test", "lint", "bench"}
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target


def test_the_readme_s_pip_lines_name_extras_that_exist():
    lines = [line for line in SHELL if line.startswith("pip install")]
    assert lines
    for line in lines:
        name, extra = re.fullmatch(r"(\w+)\[(\w+)\]", shlex.split(line)[2]).groups()
        assert extra in metadata(name).get_all("Provides-Extra")


def test_every_shell_line_of_the_readme_is_tested():
    assert [line for line in SHELL if line.split()[0] not in ("hf-calib", "make", "pip")] == []


def test_the_readme_s_tables_are_what_the_result_files_say():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "examples" / "benchmarks" / "readme.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.render(README) == README
    assert script.render(README.replace("| ECE |", "| 0.0 |", 1)) == README, "a typed number must not survive"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_the_readme_s_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_readme_lists_every_method():
    for name in (*hf_calib.CALIBRATORS, *hf_calib.LOSSES):
        assert f"| `{name}` |" in README, name
    listed = [name for line in re.findall(r"^\| (`[^|]*) \|", README, flags=re.MULTILINE) for name in line.split(", ")]
    assert {f"`{name}`" for name in hf_calib.METRICS} <= set(listed)


@pytest.mark.parametrize("name", MODULES)
def test_doctests_pass(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_doctests_can_fail():
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("wrong", loader=None))
    module.__doc__ = ">>> 1 + 1\n3\n"
    assert doctest.testmod(module, verbose=False).failed == 1


@pytest.mark.parametrize("name", [name for name in hf_calib.__all__ if callable(getattr(hf_calib, name))])
def test_every_public_callable_says_what_it_is(name):
    assert getattr(hf_calib, name).__doc__
