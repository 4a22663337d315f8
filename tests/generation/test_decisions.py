"""The temperatures of `decision.json`: found on answers, saved, and read by the stock pipeline in a new process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from hf_calib import Predictions, cli
from hf_calib.generation import calibrate_decisions, collect_decisions, save_decisions
from hf_calib.generation.decisions import read_decisions

from ..tiny import save_chat_model, save_sentiment_classifier


pytest.importorskip("transformers.decision", reason="decisions came with transformers 5.23")
TRUE = {"noul": 3.0, "choice": 0.5}  # the temperatures by which the answers are drawn
NUM_ROWS = 400
QUESTIONS = {
    "urgent": {"type": "noul", "instructions": "Now ?"},
    "tone": {"type": "choice", "criteria": {"calm": None, "pushy": "It presses", "sad": None}},
    "place": {"type": "choice", "criteria": {"here": None, "there": None}},
}

ONE = {"type": "choice", "criteria": {"yes": None}}


@pytest.fixture(scope="module")
def decide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_chat_model(folder, num_numbers=NUM_ROWS)
    return pipeline("decision", model=str(folder))


@pytest.fixture(scope="module")
def rows(decide):
    """Requests with answers that the model's own probabilities, at the true temperatures, would give."""
    torch.manual_seed(0)
    rows = []
    for number in range(NUM_ROWS):
        request = {"state": f"{number}", "questions": QUESTIONS}
        told = decide(request)
        yes = torch.tensor([told["urgent"]["noul"], 1 - told["urgent"]["noul"]])
        answers = {"urgent": not _draw(yes, "noul")}
        for name in ("tone", "place"):
            probs = told[name]["probabilities"]
            answers[name] = list(probs)[_draw(torch.tensor(list(probs.values())), "choice")]
        rows.append({**request, "answers": answers})
    return rows


def _draw(probs, kind):
    return int(torch.multinomial((probs.log() / TRUE[kind]).softmax(-1), 1))


@pytest.fixture(scope="module")
def found(decide, rows):
    return collect_decisions(decide, rows)


def test_what_is_collected_are_the_pipelines_probabilities_without_temperature(decide, rows, found):
    told = [decide({key: row[key] for key in ("state", "questions")}) for row in rows[:20]]
    noul = torch.tensor([answer["urgent"]["noul"] for answer in told])
    assert torch.allclose(found["noul"].probs[:20, 0], noul, atol=1e-6)
    choices = [list(answer[name]["probabilities"].values()) for answer in told for name in ("tone", "place")]
    expected = torch.tensor([[*probs, 0.0][:3] for probs in choices])
    assert torch.allclose(found["choice"].probs[:40], expected, atol=1e-6)
    assert (len(found["noul"]), len(found["choice"])) == (NUM_ROWS, 2 * NUM_ROWS)
    assert found["noul"].labels[0] == int(not rows[0]["answers"]["urgent"])


def test_temperatures_of_the_config_are_undone(decide, rows, found, monkeypatch):
    monkeypatch.setitem(decide.decision_config.temperature, "noul", 4.0)
    monkeypatch.setattr(decide.decision_config, "_logits_processors", None)
    again = collect_decisions(decide, rows[:20])
    assert torch.allclose(again["noul"].logits, found["noul"].logits[:20], atol=1e-5)


def test_the_temperature_of_each_type_is_found(found):
    fitted = {kind: float(each.calibrator.temperature) for kind, each in calibrate_decisions(found).items()}
    for kind, temperature in TRUE.items():
        assert abs(fitted[kind] / temperature - 1) < 0.3
    assert fitted["noul"] > 2 > 1 > fitted["choice"]


def test_a_report_of_other_rows(decide, rows, found):
    fitting, later = collect_decisions(decide, rows[:300]), collect_decisions(decide, rows[300:])
    calibration = calibrate_decisions(fitting, test=later)["choice"]
    assert calibration.report.num_rows == 200
    assert calibration.calibrator.provenance["report_rows"] == "other rows than those of the fit"
    expected = calibration.calibrator.log_probs(later["choice"].logits).gather(1, later["choice"].labels[:, None])
    assert calibration.report.after["nll"].value == pytest.approx(-float(expected.mean()), abs=1e-6)


def test_the_report_starts_from_the_temperatures_that_are_there(found):
    calibration = calibrate_decisions(found, temperature={"noul": 2.5})["noul"]
    before = (found["noul"].logits / 2.5).log_softmax(-1).gather(1, found["noul"].labels[:, None])
    assert calibration.report.before["nll"].value == pytest.approx(-float(before.mean()), abs=1e-6)
    assert "is real" not in calibration.report.verdict()


def test_other_rows_may_have_more_or_fewer_options(found):
    choice = found["choice"]
    narrow = Predictions(choice.logits[1::2, :2], choice.labels[1::2], choice.label_names[:2])
    wide = Predictions(choice.logits[::2], choice.labels[::2], choice.label_names)
    for fitting, other in ((narrow, wide), (wide, narrow)):
        calibration = calibrate_decisions({"choice": fitting}, test={"choice": other})["choice"]
        assert calibration.report.num_rows == len(other)
    with pytest.raises(ValueError, match="test: got the rows of predictions"):
        calibrate_decisions({"choice": wide}, test={"choice": wide})


def test_the_seed_is_that_of_the_folds(found):
    one, same, other = (calibrate_decisions(found, seed=seed)["noul"].report for seed in (0, 0, 1))
    assert one.after["nll"] == same.after["nll"] != other.after["nll"]


def test_what_cannot_be_fitted_is_said(found):
    few = {kind: type(each)(each.logits[:5], each.labels[:5], each.label_names) for kind, each in found.items()}
    with pytest.raises(ValueError, match="predictions: no type of question has 10 answers"):
        calibrate_decisions(few)
    with pytest.warns(UserWarning, match="5 answers of type noul are too few"):
        assert list(calibrate_decisions({**found, "noul": few["noul"]})) == ["choice"]
    with pytest.raises(ValueError, match="test: got no answers of type choice; allowed"):
        calibrate_decisions(found, test={"noul": found["noul"]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "rows: row 0 has no answers; allowed are objects with state, questions, answers"),
        ({"state": "1", "questions": QUESTIONS}, "rows: row 0 has no answers"),
        ({"questions": QUESTIONS, "answers": {"tone": "calm"}}, "rows: row 0: A request is"),
        ({"state": "1", "questions": {"a": {"type": "odd"}}, "answers": {}}, "rows: row 0: Question 'a': `type` must"),
        (
            {"state": "1", "questions": QUESTIONS, "answers": {"tone": "loud"}},
            "rows: row 0: the answer to tone is 'loud'; allowed are calm, pushy, sad",
        ),
        (
            {"state": "1", "questions": QUESTIONS, "answers": {"urgent": 1}},
            "rows: row 0: the answer to urgent is 1; allowed are true, false",
        ),
        (
            {"state": "1", "questions": QUESTIONS, "answers": {"time": True}},
            "rows: row 0: answers to time, which nobody asked",
        ),
        ({"state": "1", "questions": QUESTIONS, "answers": {"tone": None}}, "rows: no question of two options or"),
        ({"state": "1", "questions": {"a": ONE}, "answers": {"a": "yes"}}, "rows: no question of two options or more"),
        ({"state": "1", "questions": {"a": ONE}, "answers": {"a": "no"}}, "rows: row 0: the answer to a is 'no'; all"),
        (
            {"state": "\ud800", "questions": QUESTIONS, "answers": {"tone": "calm"}},
            "rows: row 0: TextEncodeInput",
        ),
    ],
)
def test_rows_that_cannot_be_asked(row, message, decide):
    with pytest.raises(ValueError, match=f"^{message}"):
        collect_decisions(decide, [row])


def test_levels_are_counted_from_zero(decide):
    questions = {"when": {"type": "score", "criteria": ["later", "soon", "now"]}}
    found = collect_decisions(decide, [{"state": "1", "questions": questions, "answers": {"when": 2}}])
    assert found["score"].labels.tolist() == [2]


def test_saving_leaves_the_pipeline_and_what_is_there_alone(decide, found, tmp_path, monkeypatch):
    calibrations = calibrate_decisions({"choice": found["choice"]})
    monkeypatch.setattr(decide.decision_config, "chat_template", "{{ state }}")
    monkeypatch.setitem(decide.decision_config.temperature, "score", 4.0)
    save_decisions(decide, calibrations, tmp_path / "made", origin={"dataset": "mine"})
    assert decide.decision_config.temperature == {"score": 4.0}
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"decision.json", "decision_template.jinja"}
    record = json.loads((tmp_path / "made" / "decision.json").read_text())
    fitted = pytest.approx(float(calibrations["choice"].calibrator.temperature))
    assert record["temperature"] == {"choice": fitted, "score": 4.0}
    assert record["hf_calib"]["dataset"] == "mine"
    assert record["hf_calib"]["fits"]["choice"]["rows"] == 2 * NUM_ROWS
    with pytest.raises(FileExistsError, match=r"path: .* exists already"):
        save_decisions(decide, calibrations, tmp_path / "made")
    monkeypatch.setattr(decide.decision_config, "adapter", "lora")
    with pytest.raises(ValueError, match=r"decide: its decision\.json names an adapter"):
        save_decisions(decide, calibrations, tmp_path / "other")
    assert not (tmp_path / "other").exists()


READER = """
import json, sys
sys.modules["hf_calib"] = None  # an import raises
from transformers import pipeline
decide = pipeline("decision", model=sys.argv[1], decision_config=sys.argv[2])
print(json.dumps(decide(json.loads(sys.argv[3]))))
"""


def test_the_command_fits_and_a_new_process_without_us_reads_it(decide, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, part in (("rows", rows[:300]), ("later", rows[300:])):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")
    line = f"fit --task decision --model {decide.model.name_or_path} --dataset rows.jsonl --output made"
    assert run(f"{line} --test-dataset later.jsonl", monkeypatch) == 0
    out = capsys.readouterr().out
    temperature = json.loads(Path("made/decision.json").read_text())["temperature"]
    for kind, answers in (("noul", 300), ("choice", 600)):
        assert f"{kind}: temperature {temperature[kind]:.4f} from {answers} answers\n" in out
    assert "200 rows; in brackets" in out
    assert 'decision_config="made")' in out
    request = {"state": "7", "questions": QUESTIONS}
    command = [sys.executable, "-c", READER, decide.model.name_or_path, "made", json.dumps(request)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    before = decide(request)["tone"]["probabilities"]
    expected = (torch.tensor(list(before.values())).log() / temperature["choice"]).softmax(-1)
    assert list(told["tone"]["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)


def run(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-calib", *line.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset rows.jsonl --method isotonic", "method: --task decision has no such thing; allowed are model, "),
        ("--dataset rows.csv", "dataset: got rows.csv; allowed for decisions is a .jsonl file"),
        ("--dataset bad.jsonl", "dataset: bad.jsonl line 2 is no JSON"),
        ("--dataset latin.jsonl", "dataset: latin.jsonl line 1 is no JSON ('utf-8' codec can't decode"),
        ("--dataset deep.jsonl", "dataset: deep.jsonl line 1 is no JSON (maximum recursion depth"),
        ("--dataset rows.jsonl --model classifier", "model: got a BertForSequenceClassification; allowed are models"),
        ("--dataset rows.jsonl --test-dataset ./rows.jsonl", "test_dataset: got './rows.jsonl', the rows of the fit"),
        ("--dataset rows.jsonl --output full", "output: full exists already"),
        ("--dataset rows.jsonl --task guess", "task: got 'guess'; allowed are text-classification and decision"),
    ],
)
def test_the_command_refuses_in_one_line(line, message, decide, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"state": "1", "questions": {}, "answers": {}}\n')
    Path("bad.jsonl").write_text("{}\n{\n")
    Path("latin.jsonl").write_bytes(b'"\xe9"')
    Path("deep.jsonl").write_text("[" * 100_000)
    save_sentiment_classifier("classifier", num_numbers=4)
    Path("full").mkdir()
    Path("full", "here").touch()
    capsys.readouterr()
    model = decide.model.name_or_path
    assert run(f"fit --task decision --model {model} --output made {line}", monkeypatch) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"hf-calib: {message}")
    assert err.count("\n") == 1
    assert not Path("made").exists()


def test_empty_lines_are_no_rows_and_text_may_hold_other_ends_of_lines(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"b": "\u2028\x85"}\r\n', encoding="utf-8")
    assert read_decisions(tmp_path / "rows.jsonl") == [{"a": 1}, {"b": "\u2028\x85"}]
