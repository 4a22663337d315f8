"""The command `hf-calib`: the library's own functions, one line for whatever is wrong with their input."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Calibration for Hugging Face models: when it says 0.9, it should be right nine times in ten.",
)  # fmt: skip

# typer brings its own copy of click in newer releases and click itself in older ones; this is the right one's
UsageError = typer.BadParameter.__base__
INTERRUPTED = 130  # newer releases of typer return it where older ones raise Abort

Model = Annotated[str, typer.Option(help="A Hub id or a folder: a sequence classifier.")]
Data = Annotated[str, typer.Option(help="A Hub id, a folder, or a .jsonl, .csv or .parquet file.")]
Config = Annotated[str | None, typer.Option(help="The configuration of a Hub data set that has several.")]
Text = Annotated[list[str], typer.Option(help="The column with the text; twice for a sentence pair.")]
Label = Annotated[str, typer.Option(help="The column with the label.")]
Map = Annotated[list[str], typer.Option(help="DATASET_LABEL=MODEL_LABEL, once for each name that differs.")]
Method = Annotated[str, typer.Option(help="auto chooses by cross-validated NLL; or identity, temperature, isotonic.")]
Batch = Annotated[int, typer.Option(help="Rows that run together.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same numbers.")]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="A new folder for the calibrated model.")] = Path(
        "docstring-classifier"
    ),
    method: Method = "auto",
    seed: Seed = 0,
    fast: Annotated[bool, typer.Option("--fast", help="A small version of the same path.")] = False,
) -> None:
    """Train a small classifier on real text, calibrate it, save it, and prove it in a new process."""
    from .demo import run_demo

    run_demo(output, fast=fast, seed=seed, method=method)


@app.command()
def fit(
    model: Model,
    dataset: Data,
    output: Annotated[Path, typer.Option(help="A new folder for the calibrated model.")],
    split: Annotated[str, typer.Option(help="Rows that training has not seen.")] = "validation",
    test_split: Annotated[str | None, typer.Option(help="Other rows for the table; cross-fitting without.")] = None,
    dataset_config: Config = None,
    text_column: Text = ["text"],  # noqa: B006  (typer reads the default, nothing changes it)
    label_column: Label = "label",
    label_map: Map = [],  # noqa: B006
    method: Method = "auto",
    batch_size: Batch = 32,
    seed: Seed = 0,
) -> None:
    """Calibrate a text classifier and save it as a folder that is ready for the Hub."""
    from rich.console import Console

    from .calibrate import calibrate_predictions, check_method
    from .console import print_report, print_selection
    from .folding import apply_calibrator, remove_calibrator
    from .hub import check_new_folder, save_calibrated
    from .model_card import usage
    from .predictions import collect_predictions

    check_method(method)
    check_new_folder("output", output)
    columns = {"text_column": text_column, "label_column": label_column, "label_map": _pairs(label_map)}
    classifier, tokenizer = _load_model(model)
    remove_calibrator(classifier)  # of an earlier fit
    splits = [split] if test_split is None else [split, test_split]
    rows = [_load_data(dataset, dataset_config, name) for name in splits]
    predictions = [
        collect_predictions(classifier, part, processing_class=tokenizer, batch_size=batch_size, **columns)
        for part in rows
    ]
    calibrator, report = calibrate_predictions(predictions[0], method=method, test=(*predictions, None)[1], seed=seed)
    calibrator.provenance |= {"model": model, "dataset": dataset, "split": split, "report_split": splits[-1]}
    console = Console()
    print_selection(calibrator, console)
    print_report(report, console)
    applied = apply_calibrator(classifier, calibrator)
    save_calibrated(classifier, output, processing_class=tokenizer, report=report)
    console.print(f"Saved {output}, calibrator {applied}. To use it:", highlight=False)
    console.print(usage(str(output), applied), markup=False, soft_wrap=True)


@app.command()
def evaluate(
    predictions: Annotated[Path | None, typer.Argument(help="A file of probabilities and labels.")] = None,
    model: Annotated[str | None, typer.Option(help="In place of a file: a Hub id or a folder.")] = None,
    dataset: Annotated[str | None, typer.Option(help="With --model: a Hub id, a folder or a file.")] = None,
    split: Annotated[str, typer.Option(help="Rows that neither training nor fitting has seen.")] = "test",
    dataset_config: Config = None,
    text_column: Text = ["text"],  # noqa: B006
    label_column: Label = "label",
    label_map: Map = [],  # noqa: B006
    probs_column: Annotated[str, typer.Option(help="In a file: a list, a number, or NAME_0, NAME_1 ...")] = "probs",
    batch_size: Batch = 32,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Print accuracy, NLL, Brier, ECE and smooth ECE with intervals; changes nothing."""
    from rich.console import Console

    from .attaching import attached_calibrator
    from .console import print_report
    from .prediction_files import read_predictions
    from .predictions import collect_predictions
    from .report import evaluate_calibration

    if (predictions is None) == (model is None) or (model is None) != (dataset is None):
        raise ValueError("predictions: give either a file of predictions, or --model and --dataset")
    before = None
    if predictions is not None:
        probs, labels = read_predictions(predictions, probs_column=probs_column, label_column=label_column)
    else:
        classifier, tokenizer = _load_model(model)
        columns = {"text_column": text_column, "label_column": label_column, "label_map": _pairs(label_map)}
        rows = _load_data(dataset, dataset_config, split)
        found = collect_predictions(classifier, rows, processing_class=tokenizer, batch_size=batch_size, **columns)
        probs, labels, calibrator = found.probs, found.labels, attached_calibrator(classifier)
        if calibrator is not None:
            probs, before = calibrator.log_probs(found.logits).exp(), probs
    report = evaluate_calibration(probs, labels, before=before, seed=seed)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report, Console())


def main() -> None:
    """Runs the command. Whatever is wrong with its input is one line on stderr and exit code 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(standalone_mode=False)
    except UsageError as error:
        code = _fail(error.format_message())
    except (ValueError, OSError, ImportError) as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _fail("interrupted; nothing was saved")
    sys.exit(code)


def _show_warning(message: Warning | str, *where: Any) -> None:
    print(f"hf-calib: warning: {message}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"hf-calib: {message.strip().splitlines()[0]}", file=sys.stderr)
    return 2


def _pairs(entries: list[str]) -> dict[str, str]:
    for entry in entries:
        if entry.count("=") != 1:
            raise ValueError(f"label_map: got {entry!r}; allowed is DATASET_LABEL=MODEL_LABEL")
    return dict(entry.split("=") for entry in entries)


@contextmanager
def _naming(argument: str, value: str) -> Iterator[None]:
    """The libraries' own messages do not say which argument was wrong."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{argument}:"):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{argument}: cannot load {value!r}: {reason}") from error


def _load_model(model: str) -> tuple[Any, Any]:
    """The classifier, calibrated if it was saved so, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from .hub import load_calibrated

    with _naming("model", model):
        try:
            classifier = load_calibrated(model)
        except FileNotFoundError:
            classifier = AutoModelForSequenceClassification.from_pretrained(model)
        return classifier.eval(), AutoTokenizer.from_pretrained(model)


def _load_data(dataset: str, config: str | None, split: str) -> Any:
    """One split of a Hub data set, of a folder, or of a file, whose one split has whatever name is asked for."""
    import datasets

    builders = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    path = Path(dataset)
    if path.is_file() and path.suffix not in builders:
        raise ValueError(f"dataset: got {dataset}; allowed files are {', '.join(builders)}")
    with _naming("dataset", dataset):
        if path.is_file():
            return datasets.load_dataset(builders[path.suffix], data_files={split: str(path)}, split=split)
        return datasets.load_dataset(dataset, config, split=split)


if __name__ == "__main__":
    main()
