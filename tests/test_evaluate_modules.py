"""The `evaluate` modules: the same numbers as the functions on every route, and folders that are whole Spaces."""

import doctest
import json
import math
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import evaluate
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset

from hf_calib import METRICS, TemperatureScaling, evaluate_module
from hf_calib.evaluate_modules import EVALUATE_MODULES
from hf_calib.functional.scoring import negative_log_likelihood
from hf_calib.metrics import bootstrap, compare, score_decomposition


FOLDERS = [Path(evaluate_module(name)) for name in EVALUATE_MODULES]
CURVES = ("calibration_curve", "risk_coverage_curve")
TESTS = ("ks", "kuiper", "spiegelhalter")
# A process of two, with other rows than its sister: the first has 20 of 37, in batches, the second the others, at once
PROCESS = """
import json, os, sys
import evaluate
from hf_calib import evaluate_module
rows, rank = json.load(open("rows.json")), int(sys.argv[1])
options = {"num_process": 2, "process_id": rank, "experiment_id": "two", "cache_dir": os.getcwd()}
module = evaluate.load(evaluate_module("calibration"), **options)
given = {}
if rank == 0:
    for first, last in ((0, 8), (8, 16), (16, 20)):
        module.add_batch(predictions=rows["probs"][first:last], references=rows["labels"][first:last])
else:
    given = {"predictions": rows["probs"][20:], "references": rows["labels"][20:]}
print(json.dumps(module.compute(**given)))
"""


@pytest.fixture(scope="module")
def calibration():
    return evaluate.load(evaluate_module("calibration"))


@pytest.fixture(scope="module")
def comparison():
    return evaluate.load(evaluate_module("calibration_comparison"))


@pytest.fixture(scope="module")
def rows():
    """Too sure probabilities of three classes, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 3, generator=generator)
    return (3 * logits).softmax(-1), torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def shaped(rows, kind):
    """The same numbers in every shape that probabilities come in, and the options that go with it."""
    probs, labels = rows
    if kind == "events":
        return probs[:, 0], (labels == 0).long(), {}
    if kind == "multilabel":
        return probs, (labels[:, None] == torch.arange(3)).long(), {"task": "multilabel"}
    if kind == "tokens":
        padded = labels.clone()
        padded[::4] = -100
        return probs.view(30, 10, 3), padded.view(30, 10), {}
    if kind == "multilabel tokens":
        return probs.view(30, 10, 3), (labels.view(30, 10, 1) == torch.arange(3)).long(), {"task": "multilabel"}
    return probs, labels, {}


KINDS = ("classes", "events", "multilabel", "tokens", "multilabel tokens")


# Which modules there are


@pytest.mark.parametrize("folder", FOLDERS, ids=EVALUATE_MODULES)
def test_a_folder_holds_all_that_a_space_needs(folder):
    assert folder.is_absolute()
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {"README.md", "app.py", "requirements.txt", f"{folder.name}.py"}


def test_an_unknown_module_is_refused():
    with pytest.raises(ValueError, match=r"^name: got 'ece'; allowed are 'calibration', 'calibration_comparison'$"):
        evaluate_module("ece")


def test_modules_say_what_they_are(calibration, comparison):
    assert (calibration.name, calibration.module_type) == ("calibration", "metric")
    assert (comparison.name, comparison.module_type) == ("calibration_comparison", "comparison")


# Values


def test_values_by_hand(calibration):
    found = calibration.compute(predictions=[[0.875, 0.125], [0.75, 0.25], [0.25, 0.75]], references=[0, 0, 0])
    assert found == pytest.approx(
        {
            "accuracy": 2 / 3,
            "nll": -math.log(0.875 * 0.75 * 0.25) / 3,
            "brier": 2 * (0.125**2 + 0.25**2 + 0.75**2) / 3,
            "ece": (0.125 + 0.5) / 3,  # .75 twice, right once: |1 - 1.5| in one bin
            "smooth_ece": found["smooth_ece"],
            "num_rows": 3,
        }
    )


def test_every_number_is_that_of_the_function(calibration, rows):
    probs, labels = rows
    numbers = [name for name in METRICS if name not in CURVES]
    found = calibration.compute(predictions=probs, references=labels, metrics=numbers)
    for name in numbers:
        value = METRICS[name].function(probs, labels)
        if name in TESTS:
            assert found.pop(f"{name}_p_value") == float(value.p_value)
            value = value.statistic
        assert found.pop(name) == float(value)
    assert found == {"num_rows": 300}


def test_curves_are_lists(calibration, rows):
    found = calibration.compute(
        predictions=rows[0], references=rows[1], metrics={"calibration_curve": {"num_bins": 4}}
    )
    assert sum(found["calibration_curve_counts"]) == found["num_rows"] == 300
    assert len(found["calibration_curve_edges"]) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_of_every_shape(kind, calibration, rows):
    probs, labels, options = shaped(rows, kind)
    found = calibration.compute(predictions=probs, references=labels, **options)
    classes = kind in ("classes", "tokens")
    assert list(found) == [*["accuracy"][:classes], "nll", "brier", "ece", "smooth_ece", "num_rows"]
    assert found["num_rows"] == (225 if kind == "tokens" else 300)
    for name in ("nll", "brier", "ece", "smooth_ece"):
        assert found[name] == float(METRICS[name].function(probs, labels, **options))


def test_another_label_can_be_left_out(calibration, rows):
    found = calibration.compute(predictions=rows[0], references=rows[1], metrics="nll", ignore_index=2)
    kept = rows[1] != 2
    assert found == {
        "nll": float(negative_log_likelihood(rows[0][kept], rows[1][kept])),
        "num_rows": int(kept.sum()),
    }


def test_options_of_single_metrics(calibration, rows):
    metrics = {"ece": {"num_bins": 7, "norm": "l2"}, "accuracy_at_coverage": {"coverage": 0.3}, "mce": {"num_bins": 3}}
    found = calibration.compute(predictions=rows[0], references=rows[1], metrics=metrics)
    assert found.pop("num_rows") == 300
    assert found == {name: float(METRICS[name].function(*rows, **options)) for name, options in metrics.items()}


@pytest.mark.parametrize("options", [{}, {"score": "brier", "calibrator": "isotonic", "num_folds": 3, "seed": 5}])
def test_the_decomposition(options, calibration, rows):
    metrics = {"score_decomposition": options}
    found = calibration.compute(predictions=rows[0], references=rows[1], metrics=metrics, seed=2)
    expected = {"num_rows": 300}
    for score in [options["score"]] if options else ["nll", "brier"]:
        parts = score_decomposition(*rows, **{"seed": 2, "score": score, **options})
        expected |= {f"{score}_calibration": float(parts.calibration), f"{score}_refinement": float(parts.refinement)}
    assert found == expected


def test_intervals_are_those_of_the_bootstrap(calibration, rows):
    options = {"num_resamples": 50, "seed": 3}
    found = calibration.compute(
        predictions=rows[0], references=rows[1], metrics=["brier", "ece"], intervals=True, **options
    )
    for name, estimate in bootstrap(["brier", "ece"], *rows, **options).items():
        assert (found[f"{name}_low"], found[f"{name}_high"]) == estimate[1:3]
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]


@pytest.mark.parametrize("kind", ["classes", "events", "tokens"])
def test_a_calibrator_shows_before_and_after(kind, calibration, rows, tmp_path):
    probs, labels, _ = shaped(rows, kind)
    columns = torch.stack([1 - probs, probs], dim=-1) if kind == "events" else probs
    calibrator = TemperatureScaling().fit(columns.log(), labels)
    calibrated = calibrator.log_probs(columns.double().log()).exp()
    before = calibration.compute(predictions=probs, references=labels)
    after = calibration.compute(predictions=calibrated[:, 1] if kind == "events" else calibrated, references=labels)
    calibrator.save_pretrained(tmp_path)
    for given in (calibrator, tmp_path, str(tmp_path)):
        found = calibration.compute(predictions=probs, references=labels, calibrator=given)
        expected = {**after, **{f"before_{name}": value for name, value in before.items() if name != "num_rows"}}
        assert found == pytest.approx(expected)
    assert found["nll"] < found["before_nll"]


def hub_client():
    import evaluate
    import torch

    from hf_calib import TemperatureScaling, evaluate_module

    logits, labels = 3 * torch.eye(3), torch.tensor([0, 1, 0])
    calibrator = TemperatureScaling().fit(logits, labels)
    calibrator.push_to_hub("org/for-evaluate")
    module = evaluate.load(evaluate_module("calibration"))
    given = {"predictions": logits.softmax(-1), "references": labels}
    by_name = module.compute(**given, calibrator="org/for-evaluate")
    assert by_name == module.compute(**given, calibrator=calibrator)
    assert by_name["nll"] < by_name["before_nll"]


@pytest.mark.slow
def test_a_calibrator_of_the_hub(loopback_hub, tmp_path):
    loopback_hub.run(hub_client, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": "AUC"}, r"metrics: got 'AUC'; allowed are 'accuracy', .*, 'score_decomposition'$"),
        ({"metrics": {"ece": {"bins": 3}}}, r"metrics: got \{'bins': 3\} for 'ece': .* argument 'bins'$"),
        ({"metrics": {"ece": {"num_bins": 0}}}, "num_bins: got 0; allowed are integers from 1 up"),
        (
            {"metrics": {"score_decomposition": {"folds": 3}}},
            "metrics, options of .*: got 'folds'; allowed are ",
        ),
        ({"metrics": "accuracy", "predictions": [0.5, 0.5]}, "metrics: got 'accuracy', which needs"),
        ({"task": "multi"}, "task: got 'multi'; allowed are None, 'multilabel'"),
        ({"metrics": "ks", "task": "multilabel", "references": [[1, 0]] * 2}, "task: got 'multilabel'; allowed are"),
        ({"predictions": [[2.0, 1.0], [0.5, 0.5]]}, "predictions: row 0 sums to 3; allowed is 1 within .*softmax"),
        ({"predictions": [[math.nan, 1.0], [0.5, 0.5]]}, "predictions: row 0 sums to nan"),
        ({"predictions": [0, 1]}, "predictions: got torch.int64 values; allowed are floating probabilities"),
        ({"predictions": [[0.5, 0.5], [1.0]]}, "predictions: got list that is no array of numbers; .*pad"),
        ({"predictions": ["a", "b"]}, "predictions: got list that is no array of numbers"),
        ({"references": [0, None]}, "references: got list that is no array of numbers"),
        ({"references": [0.5, 1]}, r"references: got torch.float64 of shape \(2,\).*; allowed are integers"),
        ({"references": [0, 1, 1]}, r"references: got torch.int64 of shape \(3,\) .* shape \(2, 2\); allowed"),
        ({"references": [0, 7]}, "labels: got 7; allowed are 0 to 1"),
        ({"references": [-100, -100]}, "labels: no row is left"),
        ({"metrics": "calibration_curve", "intervals": True}, "metrics: calibration_curve is a curve and no number"),
        ({"calibrator": 2.0}, "calibrator: got float; allowed are a Calibrator, a folder or a repo id"),
        ({"calibrator": TemperatureScaling()}, "TemperatureScaling: not fitted"),
        (
            {"calibrator": "x", "task": "multilabel", "references": [[1, 0]] * 2},
            "calibrator: got one with task=",
        ),
    ],
)
def test_bad_input_is_refused_by_one_line(changes, message, calibration):
    given = {"predictions": [[0.5, 0.5], [0.25, 0.75]], "references": [0, 1], **changes}
    with pytest.raises(ValueError, match=f"^{message}") as error:
        calibration.compute(**given)
    assert "\n" not in str(error.value)


# Routes


CONVERSIONS = {
    "numpy": lambda values: values.numpy(),
    "read-only numpy": lambda values: np.broadcast_to(values.numpy(), values.shape),
    "numpy backwards": lambda values: np.ascontiguousarray(values.numpy()[::-1])[::-1],
    "lists": lambda values: values.tolist(),
    "tensors in a list": lambda values: list(values),
    "column of a data set": lambda values: Dataset.from_dict({"x": values.tolist()})["x"],
    "pandas": lambda values: pd.Series(values.tolist()),
    "floats for labels": lambda values: values.double(),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_rows_come_in_many_kinds(convert, calibration, rows):
    probs, labels = rows[0].double(), rows[1]
    expected = calibration.compute(predictions=probs, references=labels)
    assert calibration.compute(predictions=convert(probs), references=convert(labels)) == expected
    calibration.add_batch(predictions=convert(probs), references=convert(labels))
    assert calibration.compute() == expected


def test_gradients_are_no_obstacle(calibration, rows):
    probs = rows[0].bfloat16().requires_grad_()
    expected = calibration.compute(predictions=probs.detach(), references=rows[1])
    for given in (probs, list(probs)):
        assert calibration.compute(predictions=given, references=rows[1]) == expected
        calibration.add_batch(predictions=given, references=rows[1])
        assert calibration.compute() == expected


def test_the_fast_path_neither_copies_nor_stores(calibration, rows, monkeypatch):
    probs, seen = rows[0].numpy(), []
    monkeypatch.setattr(type(calibration), "scores", lambda **given: seen.append(given) or {})
    monkeypatch.setattr(type(calibration), "add_batch", None)
    calibration.compute(predictions=probs, references=rows[1], metrics="ece")
    assert seen[0]["predictions"].data_ptr() == probs.ctypes.data
    assert seen[0]["metrics"] == "ece"


def add_batches(module, probs, labels):
    for first in range(0, len(probs), 7):
        module.add_batch(predictions=probs[first : first + 7], references=labels[first : first + 7])


def add_rows(module, probs, labels):
    for row, label in zip(probs, labels, strict=True):
        module.add(prediction=row, reference=label)


@pytest.mark.parametrize("add", [add_batches, add_rows])
@pytest.mark.parametrize("kind", KINDS)
def test_arrow_gives_the_same_numbers(kind, add, calibration, rows):
    probs, labels, options = shaped(rows, kind)
    add(calibration, probs, labels)
    assert len(calibration) == len(probs)
    assert calibration.compute(**options) == calibration.compute(predictions=probs, references=labels, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arrow_keeps_the_dtype(dtype, calibration):
    """Rows of half precision miss 1, and edges are compared in the precision of the rows."""
    edge = torch.tensor(11 / 15, dtype=dtype)  # in the bin below it
    probs = torch.stack([edge, 1 - edge]).expand(50, 2).clone()
    probs[1:] = torch.randn(49, 2, generator=torch.Generator().manual_seed(0)).to(dtype).softmax(-1)
    labels = torch.arange(50) % 2
    add_batches(calibration, probs, labels)
    found = calibration.compute(metrics=["ece", "calibration_curve"])
    expected = calibration.compute(predictions=probs, references=labels, metrics=["ece", "calibration_curve"])
    assert json.dumps(found) == json.dumps(expected)  # which takes NaN for equal


def test_batches_may_be_padded_to_different_lengths(calibration, rows):
    probs, labels = rows
    calibration.add_batch(predictions=probs[:200].view(20, 10, 3), references=labels[:200].view(20, 10))
    calibration.add_batch(predictions=probs[200:].view(25, 4, 3), references=labels[200:].view(25, 4))
    assert calibration.compute() == calibration.compute(predictions=probs, references=labels)


def test_batches_of_other_classes_are_refused(calibration, rows):
    calibration.add_batch(predictions=rows[0], references=rows[1])
    calibration.add_batch(predictions=[[0.5, 0.5]], references=[0])
    with pytest.raises(ValueError, match=r"^predictions: got rows of 2 to 3 numbers; allowed is one length$"):
        calibration.compute()


def test_what_was_added_is_added_to(calibration, rows):
    probs, labels = rows
    calibration.add_batch(predictions=probs[:100], references=labels[:100])
    found = calibration.compute(predictions=probs[100:], references=labels[100:])
    assert found == calibration.compute(predictions=probs, references=labels)


@pytest.mark.parametrize("given", [{"predictions": [[0.5, 0.5]]}, {"references": [0]}])
def test_half_of_the_inputs_is_refused(given, calibration):
    with pytest.raises(
        ValueError, match=r"^(predictions|references): got NoneType that is no array of numbers; allowed are"
    ):
        calibration.compute(**given)


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_where_rows_are_kept_changes_nothing(where, calibration, rows, tmp_path):
    options = {"keep_in_memory": True} if where == "memory" else {"cache_dir": str(tmp_path)}
    module = evaluate.load(evaluate_module("calibration"), **options)
    for _ in range(2):
        add_batches(module, *rows)
        kept = [path for path in tmp_path.rglob("*.arrow") if path.is_file()]
        assert len(kept) == (where == "folder")
        assert module.compute() == calibration.compute(predictions=rows[0], references=rows[1])
        assert list(tmp_path.rglob("*.arrow")) == []


@pytest.mark.slow
def test_two_processes_with_uneven_rows(calibration, rows, tmp_path):
    probs, labels = rows[0][:37], rows[1][:37]
    (tmp_path / "rows.json").write_text(json.dumps({"probs": probs.tolist(), "labels": labels.tolist()}))
    commands = [[sys.executable, "-c", PROCESS, str(rank)] for rank in range(2)]
    options = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, **options) for command in commands]
    first, second = (json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes)
    assert second is None
    assert first == calibration.compute(predictions=probs, references=labels)


def test_combined_modules_and_saved_results(calibration, comparison, rows, tmp_path):
    probs, labels = rows
    combined = evaluate.combine({"a": calibration, "b": evaluate.load(evaluate_module("calibration"))})
    expected = calibration.compute(predictions=probs, references=labels)
    found = combined.compute(predictions=probs, references=labels)
    assert found == {f"{module}_{name}": value for module in "ab" for name, value in expected.items()}
    combined.add_batch(predictions=probs, references=labels)
    assert combined.compute() == found
    path = evaluate.save(tmp_path, **found)
    assert json.loads(path.read_text())["a_ece"] == expected["ece"]


# The comparison


@pytest.mark.parametrize("kind", KINDS)
def test_a_comparison_is_a_paired_bootstrap(kind, comparison, rows):
    probs, labels, options = shaped(rows, kind)
    better = (probs.logit() / 3).sigmoid()
    better = better if kind == "events" or options else better / better.sum(-1, keepdim=True)
    given = {"predictions1": probs, "predictions2": better, "references": labels, **options}
    found = comparison.compute(**given, metrics=["brier"], num_resamples=100, seed=1)
    expected = compare(["nll", "brier"], better, labels, before=probs, num_resamples=100, seed=1, **options)
    for name, (before, after, change) in expected.items():
        assert found[f"{name}_value1"] == before.value
        assert found[f"{name}_value2"] == after.value
        assert (found[f"{name}_change"], found[f"{name}_low"], found[f"{name}_high"]) == change[:3]
    assert found["better"] == 1
    assert found["num_rows"] == (225 if kind == "tokens" else 300)
    assert found["verdict"].startswith("The gain is real: NLL falls by ")


def test_the_default_metrics_of_a_comparison(comparison, rows):
    given = {"predictions1": rows[0], "predictions2": rows[0].sqrt().softmax(-1), "references": rows[1]}
    found = comparison.compute(**given, num_resamples=10)
    names = ("accuracy", "nll", "brier", "ece", "smooth_ece")
    parts = ("value1", "value2", "change", "low", "high")
    assert set(found) == {f"{name}_{part}" for name in names for part in parts} | {"better", "verdict", "num_rows"}


@pytest.mark.parametrize(
    ("num_rows", "power", "better", "verdict"),
    [
        (300, 3, 1, "The gain is real"),
        (300, 1 / 3, 0, "Do not use this calibrator"),
        (300, 1 + 1e-7, 0, "Nothing changed"),
        (300, 1, 0, "Nothing changed"),
        (20, 3, 0, "20 rows are too few"),
    ],
)
def test_better_says_what_the_verdict_says(num_rows, power, better, verdict, comparison, rows):
    probs, labels = rows[0][:num_rows].double(), rows[1][:num_rows]
    other = (probs.log() / power).softmax(-1)
    found = comparison.compute(predictions1=probs, predictions2=other, references=labels, metrics="nll")
    assert found["better"] == better
    assert found["verdict"].startswith(verdict)


def test_a_comparison_by_batches_is_the_same(comparison, rows):
    probs, labels = rows
    given = {"predictions1": probs, "predictions2": probs.sqrt() / probs.sqrt().sum(-1, keepdim=True)}
    for first in range(0, 300, 80):
        part = {name: values[first : first + 80] for name, values in given.items()}
        comparison.add_batch(**part, references=labels[first : first + 80])
    assert comparison.compute(metrics="nll") == comparison.compute(**given, references=labels, metrics="nll")
    for index in range(20):
        comparison.add(**{name: values[index] for name, values in given.items()}, reference=labels[index])
    first = {name: values[:20] for name, values in given.items()}
    found = comparison.compute(num_resamples=10)
    assert found == comparison.compute(**first, references=labels[:20], num_resamples=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"predictions2": [[0.2, 0.3, 0.5]] * 2},
            r"predictions2: got shape \(2, 3\); allowed is that of predictions1",
        ),
        ({"predictions2": [[2.0, 1.0]] * 2}, "predictions2: row 0 sums to 3"),
        ({"metrics": "score_decomposition"}, "metrics: got 'score_decomposition', which has no interval"),
        ({"metrics": "calibration_curve"}, "metrics: calibration_curve is a curve and no number"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message, comparison):
    given = {"predictions1": [[0.5, 0.5]] * 2, "predictions2": [[0.25, 0.75]] * 2, "references": [0, 1]}
    with pytest.raises(ValueError, match=f"^{message}"):
        comparison.compute(**(given | changes))


# Folders as Spaces


@pytest.mark.parametrize("folder", FOLDERS, ids=EVALUATE_MODULES)
def test_the_card_s_examples_run(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    assert {language for language, _ in blocks} == {"python", "bibtex"}
    code = "\n".join(block for language, block in blocks if language == "python")
    result = doctest.DocTestRunner().run(doctest.DocTestParser().get_doctest(code, {}, folder.name, None, None))
    assert result.failed == 0
    assert result.attempted > 5


@pytest.mark.parametrize("folder", FOLDERS, ids=EVALUATE_MODULES)
def test_the_card_is_one_of_the_ecosystem(folder):
    _, front, card = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(front)
    kind = "metric" if folder.name == "calibration" else "comparison"
    assert front["sdk"] == "gradio"
    assert front["app_file"] == "app.py"
    assert front["tags"] == ["evaluate", kind]
    assert front["pinned"] is False
    assert {"title", "emoji", "colorFrom", "colorTo", "sdk_version", "description"} <= set(front)
    titles = ["How to Use", "Inputs", "Output Values", "Examples", "Limitations", "Citation"]
    assert re.findall(r"^##+ (.*)$", card, flags=re.MULTILINE) == [f"{kind.title()} Description", *titles]
    module = evaluate.load(str(folder))
    assert front["description"] == " ".join(module.description.split())
    assert module.citation.strip() in card


@pytest.mark.parametrize("folder", FOLDERS, ids=EVALUATE_MODULES)
def test_the_requirements_are_what_the_files_import(folder):
    lines = (folder / "requirements.txt").read_text().split()
    assert {re.split("[<>=]", line)[0] for line in lines} == {"evaluate", "hf_calib"}


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # evaluate's own table
@pytest.mark.parametrize("folder", FOLDERS, ids=EVALUATE_MODULES)
def test_the_app_computes_what_is_typed_into_its_table(folder, monkeypatch):
    """With a stand-in for gradio 3, of which evaluate uses this much."""
    made = {}
    gradio = types.ModuleType("gradio")
    gradio.Interface = lambda **options: made.update(options) or types.SimpleNamespace(launch=lambda: None)
    gradio.inputs = types.SimpleNamespace(Dataframe=lambda **options: options)
    gradio.outputs = types.SimpleNamespace(Textbox=lambda **options: options)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.syspath_prepend(str(folder))
    runpy.run_path(str(folder / "app.py"))
    columns = made["inputs"]["headers"]
    assert made["inputs"]["datatype"] == ["str"] * (len(columns) - 1) + ["number"]
    assert made["article"].lstrip().startswith("# ")
    table = pd.DataFrame({name: ["[0.75, 0.25]", "[0.5, 0.5]"] for name in columns[:-1]} | {"references": [0, 1]})
    found = made["fn"](table)
    assert found["num_rows"] == 2
    assert found.get("nll", found.get("nll_value1")) == pytest.approx(-math.log(0.375) / 2)
