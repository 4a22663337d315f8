"""The command: what it makes, and one line for whatever is wrong with its input."""

import io
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import ModelCard
from pyarrow import parquet
from transformers import AutoModelForSequenceClassification, BertForTokenClassification, BertModel, pipeline

import hf_calib
from hf_calib.card_text import END, START
from hf_calib.cli import main
from hf_calib.cli_sources import naming

from .tiny import mostly_predicted, save_sentiment_classifier


NAMES = ["negative", "positive"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a model, data of every kind, and things that are wrong."""
    monkeypatch.chdir(tmp_path)
    save_sentiment_classifier("model", num_numbers=60)
    shutil.copytree("model", "broken")
    broken = AutoModelForSequenceClassification.from_pretrained("model")
    torch.nn.init.constant_(broken.classifier.bias, torch.nan)
    broken.save_pretrained("broken")
    texts = [f"{'good' if row % 3 else 'bad'} {row}" for row in range(60)]
    labels = mostly_predicted("model", texts)
    rows = Dataset.from_dict({"text": texts, "label": labels})
    rows.to_json("rows.jsonl")
    rows.to_csv("rows.csv")
    rows.to_parquet("rows.parquet")
    rows.select(range(0)).to_parquet("empty.parquet")
    rows.map(lambda row: {"label": row["label"].upper()}).to_json("shouting.jsonl")
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})
    Dataset.from_dict({"text": texts, "label": [-1] * 60}, features=features).to_parquet("unlabelled.parquet")
    rows.select(range(4)).to_csv("few.csv")
    rows.filter(lambda row: row["label"] == "negative").to_csv("one.csv")
    (tmp_path / "logits.csv").write_text("probs,label\n0.5,1\n2.5,1\n")
    (tmp_path / "zero.csv").touch()
    (tmp_path / "zero.jsonl").touch()
    (tmp_path / "ragged.csv").write_text("text,label\ngood,positive\nbad,negative,and,more\n")
    (tmp_path / "malformed.jsonl").write_text('{"text": "good", "label": "positive"}\n{"text": \n')
    for folder, kind in (("headless", BertModel), ("tokens", BertForTokenClassification)):
        shutil.copytree("model", folder)
        kind.from_pretrained("model").save_pretrained(folder)
    temperature = hf_calib.TemperatureScaling().fit(torch.eye(2).repeat(9, 1), torch.tensor([0, 1] * 8 + [1, 0]))
    tokens = hf_calib.attach_calibrator(BertForTokenClassification.from_pretrained("tokens"), temperature)
    hf_calib.save_calibrated(tokens, "calibrated-tokens")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("mine")
    return tmp_path


def run(monkeypatch, line: str) -> int:
    """Runs the command in this process and returns its exit code."""
    monkeypatch.setattr("sys.argv", ["hf-calib", *line.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


@pytest.mark.parametrize("data", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_fit_saves_a_folder_that_scores_as_it_says(data, place, monkeypatch, capsys):
    assert run(monkeypatch, f"fit --model model --dataset {data} --output made --method temperature") == 0
    shown = capsys.readouterr().out
    assert "Smooth ECE" in shown
    assert "Saved made, calibrator folded" in shown
    rows = hf_calib.collect_predictions(
        AutoModelForSequenceClassification.from_pretrained("model"), Dataset.from_json("rows.jsonl")
    )
    wanted = hf_calib.AutoCalibrator.from_pretrained("made").log_probs(rows.logits).exp()
    found = pipeline("text-classification", model="made")(Dataset.from_json("rows.jsonl")["text"][:], top_k=None)
    scores = [[{entry["label"]: entry["score"] for entry in row}[name] for name in NAMES] for row in found]
    torch.testing.assert_close(torch.tensor(scores), wanted, atol=1e-6, rtol=0)
    fit = json.loads((place / "made" / "calibrator.json").read_text())["fit"]
    assert (fit["model"], fit["dataset"], fit["rows"]) == ("model", data, 60)
    assert "split" not in fit


def test_a_calibrated_model_can_be_calibrated_again(place, monkeypatch, capsys):
    for source, method in (("model", "isotonic"), ("first", "temperature"), ("second", "isotonic")):
        made = {"model": "first", "first": "second", "second": "third"}[source]
        assert run(monkeypatch, f"fit --model {source} --dataset rows.csv --output {made} --method {method}") == 0
    first, third = (hf_calib.AutoCalibrator.from_pretrained(name) for name in ("first", "third"))
    torch.testing.assert_close(first.thresholds, third.thresholds, atol=1e-6, rtol=0)


def test_a_label_map_says_which_is_which(place, monkeypatch):
    line = "fit --model model --dataset shouting.jsonl --output made --method temperature"
    assert run(monkeypatch, f"{line} --label-map NEGATIVE=negative --label-map POSITIVE=positive") == 0


def test_fit_says_when_the_rows_are_too_few(place, monkeypatch, capsys):
    run(monkeypatch, "fit --model model --dataset rows.csv --output made --method isotonic")
    assert "rows are too few to tell" in " ".join(capsys.readouterr().out.split())


def test_evaluate_changes_nothing_and_prints_what_the_function_says(place, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert run(monkeypatch, "evaluate --model model --dataset rows.jsonl --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    rows = hf_calib.collect_predictions(
        AutoModelForSequenceClassification.from_pretrained("model"), Dataset.from_json("rows.jsonl")
    )
    assert shown == {**hf_calib.evaluate_calibration(rows.probs, rows.labels).to_dict(), "verdict": ""}


def test_the_table_can_be_of_other_rows(place, monkeypatch, capsys):
    Dataset.from_json("rows.jsonl").select(range(20, 60)).to_json("others.jsonl")
    line = "fit --model model --dataset rows.jsonl --test-dataset others.jsonl --output made --method temperature"
    assert run(monkeypatch, line) == 0
    assert "40 rows; in brackets" in (shown := capsys.readouterr().out)
    assert "The table's rows: other rows than those of the fit." in shown
    assert "type: others.jsonl" in (place / "made" / "README.md").read_text()


THEIRS = "---\nlicense: mit\nlanguage: no\n---\n# Mine\n\nMy own words.\n"


def test_fit_keeps_the_card_of_its_model(place, monkeypatch, capsys):
    (place / "model" / "README.md").write_text(THEIRS)
    line = "fit --dataset rows.csv --method temperature"
    assert run(monkeypatch, f"{line} --model model --output made") == 0
    first = (place / "made" / "README.md").read_text()
    assert first.startswith("---\nlicense: mit\nlanguage: no\nlibrary_name: transformers\n")
    _, section = first.split("# Mine\n\nMy own words.\n\n")
    assert section.startswith(START)
    assert section.endswith(f"{END}\n")
    assert 'model="made"' in section
    assert run(monkeypatch, f"{line} --model made --output again") == 0
    again = (place / "again" / "README.md").read_text()
    expected = first.replace('"made"', '"again"').replace("name: made\n", "name: again\n")
    fingerprint = re.compile(r"(?<=labels: )\w+")  # of logits that were folded and unfolded in between
    assert fingerprint.sub("", again) == fingerprint.sub("", expected)
    assert (place / "model" / "README.md").read_text() == THEIRS
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("default:model")
def test_fit_says_that_a_malformed_card_is_not_kept(place, monkeypatch, capsys):
    (place / "model" / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n")
    assert run(monkeypatch, "fit --model model --dataset rows.csv --output made --method temperature") == 0
    assert "warning: model: the new card does not keep the text of its card (README.md: the" in capsys.readouterr().err
    assert "\n# made\n" in (place / "made" / "README.md").read_text()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def fitted(place, monkeypatch, capsys):
    """A calibrated model whose card somebody has written in, and rows that are not those of its fit."""
    assert run(monkeypatch, "fit --model model --dataset rows.jsonl --output made --method isotonic") == 0
    card = (place / "made" / "README.md").read_text()
    (place / "made" / "README.md").write_text(f"{card.replace('# made', '# Mine')}\nMy own words.\n")
    texts = [f"{'fine' if row % 2 else 'poor'} {row}" for row in range(50)]
    Dataset.from_dict({"text": texts, "label": mostly_predicted("model", texts)}).to_json("later.jsonl")
    capsys.readouterr()
    return place / "made"


def test_report_puts_other_rows_into_the_card_and_changes_nothing_else(fitted, monkeypatch, capsys):
    before, others = contents(fitted), set(fitted.parent.iterdir())
    assert run(monkeypatch, "evaluate --model made --dataset later.jsonl") == 0
    table = capsys.readouterr().out
    assert run(monkeypatch, "report --model made --dataset later.jsonl") == 0
    assert capsys.readouterr().out == f"{table}Wrote README.md and reliability.png in made.\n"
    after = contents(fitted)
    assert {name for name in before if after[name] != before[name]} == {"README.md", "reliability.png"}
    assert set(after) == set(before)
    assert set(fitted.parent.iterdir()) == others
    old, new = (files["README.md"].decode() for files in (before, after))
    assert new.split(START)[0].split("---\n")[2] == "\n# Mine\n\n"
    assert new.endswith(f"{END}\n\nMy own words.\n")
    assert ("50 rows; in brackets" in old, "50 rows; in brackets" in new) == (False, True)
    assert 'hf_calib.load_calibrated("made")' in new
    assert "- Data set: rows.jsonl\n- Rows: 60\n" in new
    assert "- The table's rows: dataset later.jsonl; reported on after the fit, by hf-calib report\n" in new
    sets = {result.dataset_type: result for result in ModelCard(new).data.eval_results}
    assert set(sets) == {"rows.jsonl", "later.jsonl"}, "the numbers of the fit are still those of its rows"
    assert run(monkeypatch, "report --model made --dataset later.jsonl") == 0
    assert contents(fitted)["README.md"] == after["README.md"]


def test_report_into_a_new_folder_leaves_the_model_alone(fitted, monkeypatch, capsys):
    (fitted.parent / "rows").mkdir()
    shutil.copy("later.jsonl", "rows/test.jsonl")
    before = contents(fitted)
    assert run(monkeypatch, "report --model made --dataset rows --output new/card") == 0
    assert contents(fitted) == before
    assert set(contents(fitted.parent / "new" / "card")) == {"README.md", "reliability.png"}
    card = (fitted.parent / "new" / "card" / "README.md").read_text()
    assert 'hf_calib.load_calibrated("made")' in card
    assert "- The table's rows: dataset rows, split test; reported on after" in card
    assert {result.dataset_split for result in ModelCard(card).data.eval_results} == {None, "test"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("report --model made --dataset rows.jsonl", ["dataset", "rows.jsonl", "the rows of the fit"]),
        ("report --model made --dataset rows.jsonl --batch-size 1", ["dataset", "rows.jsonl", "the rows of the fit"]),
        ("report --model made --dataset rows.csv", ["dataset", "rows.csv", "the rows of the fit"]),
        ("report --model made --dataset later.jsonl --output model", ["output", "model exists already"]),
        ("report --model model --dataset later.jsonl", ["model", "'model'", "holds no calibrator.json"]),
        ("report --model malformed --dataset later.jsonl", ["model", "'malformed'", "README.md", "not valid YAML"]),
        ("push model me/mine", ["model", "holds no calibrator.json"]),
        ("push made me/mine", ["made", "training_args.bin", "no pickles"]),
        ("push malformed me/mine", ["README.md", "not valid YAML"]),
        ("push calibrated-tokens me/mine", ["repo_id", "cannot push to 'me/mine'", "offline"]),
    ],
)
def test_report_and_push_refuse_in_one_line(line, words, fitted, monkeypatch, capsys):
    shutil.copytree(fitted, "malformed")
    (fitted.parent / "malformed" / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n")
    (fitted / "training_args.bin").touch()
    before = sorted(fitted.parent.rglob("*"))
    assert run(monkeypatch, line) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("hf-calib: ")
    for word in words:
        assert word in err
    assert sorted(fitted.parent.rglob("*")) == before


@pytest.mark.parametrize("method", ["isotonic", "temperature"])
def test_evaluate_of_a_calibrated_model_shows_before_and_after(method, place, monkeypatch, capsys):
    run(monkeypatch, f"fit --model model --dataset rows.csv --output made --method {method}")
    capsys.readouterr()
    assert run(monkeypatch, "evaluate --model made --dataset rows.csv --json") == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"before", "after", "change"}


def test_evaluate_reads_confidence_and_correctness(place, monkeypatch, capsys):
    Dataset.from_dict({"probs": [0.9, 0.8, 0.6, 0.7], "label": [1, 1, 0, 1]}).to_csv("pairs.csv")
    assert run(monkeypatch, "evaluate pairs.csv --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert "accuracy" not in shown["after"]
    assert shown["after"]["brier"]["value"] == pytest.approx((0.01 + 0.04 + 0.36 + 0.09) / 4)


def write_predictions(folder, num_rows=300, seed=0):
    """Class probabilities, labels drawn from them but in one town at random, and the town, in a Parquet file."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(3), num_rows)
    labels = (probs.cumsum(1) > rng.uniform(size=(num_rows, 1))).argmax(1)
    towns = np.array(["[bold]", "Paris"])[np.arange(num_rows) % 2]
    labels[::2] = rng.integers(0, 3, len(labels[::2]))
    columns = {"probs": probs.tolist(), "label": labels.tolist(), "town": towns.tolist()}
    parquet.write_table(pa.table(columns), folder / "predictions.parquet")
    return torch.from_numpy(probs), torch.from_numpy(labels)


def test_evaluate_of_a_file_says_what_its_metrics_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    probs, labels = write_predictions(tmp_path)
    assert run(monkeypatch, "evaluate predictions.parquet --json --seed 3") == 0
    shown = json.loads(capsys.readouterr().out)
    metrics = hf_calib.metrics.MetricCollection(["accuracy", "nll", "brier", "ece", "smooth_ece"])
    metrics.update(probs, labels)
    assert shown.keys() == {"num_rows", "num_resamples", "after", "verdict"}
    assert list(shown["after"]) == list(metrics.metrics)
    for name, estimate in metrics.interval(seed=3).items():
        assert shown["after"][name] == pytest.approx(dict(zip(("value", "low", "high"), estimate, strict=False)))
    exact = hf_calib.evaluate_calibration(probs, labels)
    for name, estimate in exact.after.items():
        assert shown["after"][name]["value"] == pytest.approx(estimate.value, abs=1e-4)
        assert shown["after"][name]["low"] == pytest.approx(estimate.low, abs=0.2 * (estimate.high - estimate.low))
    assert run(monkeypatch, "evaluate predictions.parquet") == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[:6]] == ["Metric", "Accuracy", "NLL", "Brier", "ECE", "Smooth"]
    assert table[6] == "300 rows; in brackets the 95 % interval over 1,000 bootstrap resamples."


def test_evaluate_takes_metrics_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_predictions(tmp_path)
    line = "evaluate predictions.parquet --metric kuiper --metric adaptive_ece"
    assert run(monkeypatch, line) == 0
    rows = [text.split() for text in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:4]] == ["kuiper", "kuiper_p_value", "adaptive_ece"]
    assert [len(row) for row in rows[1:4]] == [4, 2, 2], "an interval where there is one"
    assert float(rows[2][1]) < 1e-3, "a p-value is shown, however small"
    assert float(rows[2][1]) > 0
    assert run(monkeypatch, f"{line} --json") == 0
    after = json.loads(capsys.readouterr().out)["after"]
    assert after["adaptive_ece"]["low"] is after["kuiper_p_value"]["high"] is None
    assert run(monkeypatch, "evaluate predictions.parquet --metric adaptive_ece") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "300 rows."


def test_evaluate_shows_groups_and_the_worst_of_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_predictions(tmp_path)
    assert run(monkeypatch, "evaluate predictions.parquet --group-column town --metric nll --metric accuracy") == 0
    shown = capsys.readouterr().out
    assert [line.split()[:2] for line in shown.splitlines()[4:7]] == [
        ["Group", "Rows"], ["Paris", "150"], ["[bold]", "150"]
    ]  # fmt: skip
    assert "Worst by NLL (nats): [bold], " in shown
    assert "Worst by Accuracy: [bold], " in shown
    assert run(monkeypatch, "evaluate predictions.parquet --group-column town --json") == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["groups"]) == {"Paris", "[bold]"}
    assert {found["group"] for found in record["worst"].values()} == {"[bold]"}


class Terminal(io.StringIO):
    """What a terminal is sent."""

    def isatty(self):
        return True


def test_a_bar_counts_the_rows_on_a_terminal_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    write_predictions(tmp_path)
    assert run(monkeypatch, "evaluate predictions.parquet") == 0
    plain = capsys.readouterr()
    assert plain.err == ""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert run(monkeypatch, "evaluate predictions.parquet") == 0
    assert "300 rows" in terminal.getvalue()
    assert capsys.readouterr().out == plain.out


def test_an_interrupted_evaluation_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_predictions(tmp_path)

    def interrupt(*rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_calib.metrics.MetricCollection, "update", interrupt)
    assert run(monkeypatch, "evaluate predictions.parquet") == 130
    assert capsys.readouterr().err.startswith("hf-calib: interrupted")


FIT = "fit --model model --dataset rows.jsonl --output made"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("demo --method magic", ["method", "magic", "temperature"]),
        ("demo --output taken", ["output", "taken", "new folder"]),
        (f"{FIT} --method magic", ["method", "magic", "temperature"]),
        ("fit --model model --dataset rows.jsonl --output taken", ["output", "taken", "new folder"]),
        (f"{FIT} --text-column body", ["body", "text, label"]),
        (f"{FIT} --label-column stars", ["stars", "text, label"]),
        ("fit --model model --dataset shouting.jsonl --output made", ["NEGATIVE", "[negative, positive]"]),
        (f"{FIT} --label-map nonsense", ["label_map", "nonsense"]),
        (f"{FIT} --label-map up=down", ["label_map", "up=down", "negative, positive"]),
        ("fit --model model --dataset empty.parquet --output made", ["dataset", "empty.parquet", "0 rows"]),
        ("fit --model model --dataset unlabelled.parquet --output made", ["label", "no label"]),
        ("fit --model model --dataset zero.csv --output made", ["dataset", "zero.csv", "0 rows"]),
        ("fit --model model --dataset zero.jsonl --output made", ["dataset", "zero.jsonl", "0 rows"]),
        ("fit --model model --dataset ragged.csv --output made", ["dataset", "ragged.csv", "fields"]),
        ("fit --model model --dataset malformed.jsonl --output made", ["dataset", "malformed.jsonl", "JSON"]),
        ("fit --model model --dataset few.csv --output made", ["got 4 rows", "10 and more"]),
        ("fit --model model --dataset one.csv --output made", ["no label is positive", "two classes"]),
        (f"{FIT} --test-split test", ["test_split", "rows of the fit", "--test-dataset"]),
        (f"{FIT} --test-dataset rows.csv", ["test", "rows of predictions"]),
        ("fit --model headless --dataset rows.jsonl --output made", ["model", "BertModel", "ForSequenceClass"]),
        ("fit --model tokens --dataset rows.jsonl --output made", ["model", "BertForTokenClassification"]),
        ("evaluate --model calibrated-tokens --dataset rows.jsonl", ["BertForTokenClassification", "AutoModelForSeq"]),
        ("fit --model taken/none --dataset rows.jsonl --output made", ["model", "taken/none"]),
        ("fit --model ./none --dataset rows.jsonl --output made", ["model", "./none", "where nothing is"]),
        ("fit --model model --dataset rows.jsonl --output rows.csv/made", ["output", "rows.csv is a file"]),
        (f"{FIT} --seed -1", ["--seed", "greater than or equal to 0"]),
        ("fit --model broken --dataset rows.jsonl --output made", ["logits", "NaN"]),
        ("fit --model nowhere --dataset rows.jsonl --output made", ["model", "nowhere"]),
        ("fit --model model --dataset nowhere.jsonl --output made", ["nowhere.jsonl"]),
        ("fit --model model --dataset taken/precious.txt --output made", ["dataset", "precious.txt", ".jsonl"]),
        (f"{FIT} --batch-size 0", ["batch_size", "0"]),
        (f"{FIT} --batch-size many", ["--batch-size", "integer"]),
        (f"{FIT} --colour red", ["--colour"]),
        ("fit --model model --output made", ["--dataset"]),
        ("evaluate", ["predictions", "--model"]),
        ("evaluate rows.jsonl --model model --dataset rows.jsonl", ["predictions", "either"]),
        ("evaluate nowhere.parquet", ["predictions", "nowhere.parquet"]),
        ("evaluate taken/precious.txt", ["predictions", "precious.txt", ".parquet"]),
        ("evaluate rows.csv", ["probs", "text, label"]),
        ("evaluate logits.csv", ["logits.csv, row 1: probs: got values from 2.5", "logits.sigmoid()"]),
        ("evaluate rows.csv --metric magic", ["metrics", "magic", "smooth_ece"]),
        ("evaluate rows.csv --metric calibration_curve", ["metrics", "calibration_curve", "curve"]),
        ("evaluate logits.csv --group-column town", ["logits.csv", "town", "probs, label"]),
        ("evaluate --model model --dataset rows.csv --metric nll", ["predictions", "metric is for a file"]),
        ("evaluate --model model --dataset rows.csv --group-column text", ["group_column is for a file"]),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(line, words, place, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(place.rglob("*"))
    assert run(monkeypatch, line) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("hf-calib: ")
    for word in words:
        assert word in shown
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(("cause", "said"), [(OSError("Broken pipe\nat 3"), r" \(Broken pipe\)"), (None, "")])
def test_the_line_says_the_cause_where_the_error_does_not(cause, said):
    with (
        pytest.raises(ValueError, match=rf"^repo_id: cannot push to 'a/b': uploading failed{said}$"),
        naming("repo_id", "a/b", "push to"),
    ):
        raise RuntimeError("uploading failed") from cause
