"""The command `hf-calib`: the library's own functions, one line for whatever is wrong with their input."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_sources import check_apart, check_exists, load_data, load_model, naming, origin_of, pairs, public_name


app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Calibration for Hugging Face models: when it says 0.9, it should be right nine times in ten.",
)  # fmt: skip

# typer brings its own copy of click in newer releases and click itself in older ones; this is the right one's
UsageError = typer.BadParameter.__base__
TASKS = ("text-classification", "decision")
INTERRUPTED = 130  # newer releases of typer return it where older ones raise Abort

Model = Annotated[str, typer.Option(help="A Hub id or a folder: a sequence classifier.")]
Data = Annotated[str, typer.Option(help="A Hub id, a folder, or a .jsonl, .json, .csv or .parquet file.")]
Config = Annotated[str | None, typer.Option(help="The configuration of a Hub data set that has several.")]
Text = Annotated[list[str], typer.Option(help="The column with the text; twice for a sentence pair.")]
Label = Annotated[str, typer.Option(help="The column with the label.")]
Map = Annotated[list[str], typer.Option(help="DATASET_LABEL=MODEL_LABEL, once for each name that differs.")]
Method = Annotated[str, typer.Option(help="auto chooses by cross-validated NLL; or identity, temperature, isotonic.")]
Batch = Annotated[int, typer.Option(help="Rows that run together.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same numbers.")]


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
    context: typer.Context,
    model: Model,
    dataset: Data,
    output: Annotated[Path, typer.Option(help="A new folder for the calibrated model.")],
    task: Annotated[str, typer.Option(help="text-classification; or decision, of a chat model.")] = TASKS[0],
    split: Annotated[str, typer.Option(help="Rows that training has not seen.")] = "validation",
    test_split: Annotated[
        str | None, typer.Option(help="Other rows for the table, which is cross-fitted without.")
    ] = None,
    test_dataset: Annotated[str | None, typer.Option(help="Where these are, if not in --dataset.")] = None,
    dataset_config: Config = None,
    text_column: Text = ["text"],  # noqa: B006  (typer reads the default, nothing changes it)
    label_column: Label = "label",
    label_map: Map = [],  # noqa: B006
    method: Method = "auto",
    batch_size: Batch = 32,
    seed: Seed = 0,
) -> None:
    """Calibrate a text classifier and save it as a folder that is ready for the Hub.

    With --task decision: fit the temperatures that pipeline("decision") reads from decision.json.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}; allowed are {' and '.join(TASKS)}")
    if task == "decision":
        _check_given(context, ("model", "dataset", "output", "task", "test_dataset", "seed"))
        return _fit_decisions(model, dataset, output, test_dataset, seed)
    from rich.console import Console

    from .attaching import check_not_folded
    from .calibrate import calibrate_predictions, check_method
    from .console import bars_on_a_terminal, print_report, print_selection
    from .folders import check_new_folder
    from .folding import apply_calibrator, remove_calibrator
    from .hub import is_stock, save_calibrated
    from .model_card import usage
    from .predictions import collect_predictions
    from .publishing import card_to_keep

    check_method(method)
    check_new_folder("output", output)
    sources = [(dataset, split)]
    if test_dataset or test_split:
        sources.append((test_dataset or dataset, test_split or "test"))
        check_apart(*sources)
    columns = {"text_column": text_column, "label_column": label_column, "label_map": pairs(label_map)}
    with bars_on_a_terminal():
        classifier, tokenizer = load_model(model)
        check_not_folded(remove_calibrator(classifier))  # of an earlier fit
        card = card_to_keep(model)
        rows = [load_data(name, dataset_config, part) for name, part in sources]
        predictions = [
            collect_predictions(classifier, part, processing_class=tokenizer, batch_size=batch_size, **columns)
            for part in rows
        ]
    calibrator, report = calibrate_predictions(predictions[0], method=method, test=(*predictions, None)[1], seed=seed)
    calibrator.provenance |= {"model": public_name(model), **origin_of(*sources[0], dataset_config, "")}
    calibrator.provenance |= origin_of(*sources[-1], dataset_config, "report_")
    console = Console()
    print_selection(calibrator, console)
    print_report(report, console)
    console.print(f"The table's rows: {calibrator.provenance['report_rows']}.", markup=False, highlight=False)
    applied = apply_calibrator(classifier, calibrator)
    with bars_on_a_terminal():
        save_calibrated(classifier, output, processing_class=tokenizer, report=report)
    if card is not None:
        _keep_card(card, output.resolve())
    console.print(f"Saved {output}, calibrator {applied}. To use it:", markup=False, highlight=False)
    code = usage(str(output), applied, "text-classification", is_stock(classifier))
    console.print(code, markup=False, soft_wrap=True)
    return None


def _check_given(context: typer.Context, allowed: tuple[str, ...]) -> None:
    """Raises a ValueError for an option on the command line that would be ignored."""
    for name in context.params:
        if context.get_parameter_source(name).name == "COMMANDLINE" and name not in allowed:
            raise ValueError(f"{name}: --task decision has no such thing; allowed are {', '.join(allowed)}")


def _fit_decisions(model: str, dataset: str, output: Path, test_dataset: str | None, seed: int) -> None:
    """Fits the temperature of each type of question, prints its table, and saves decision.json."""
    from rich.console import Console
    from transformers import pipeline

    from .console import bars_on_a_terminal, print_report
    from .folders import check_new_folder
    from .generation import calibrate_decisions, collect_decisions, save_decisions
    from .generation.decisions import check_decides, read_decisions

    check_new_folder("output", output)
    check_exists("model", model)
    names = [dataset] if test_dataset is None else [dataset, test_dataset]
    if len({Path(name).resolve() for name in names}) < len(names):
        raise ValueError(f"test_dataset: got {test_dataset!r}, the rows of the fit; allowed are other ones")
    sources = [read_decisions(Path(name)) for name in names]
    with bars_on_a_terminal():
        with naming("model", model):
            check_decides(model)
            decide = pipeline("decision", model=model)
        found = [collect_decisions(decide, rows) for rows in sources]
    temperature = decide.decision_config.temperature
    calibrations = calibrate_decisions(found[0], temperature=temperature, test=(*found, None)[1], seed=seed)
    console = Console()
    for kind, (calibrator, table) in calibrations.items():
        line = f"{kind}: temperature {calibrator.temperature.item():.4f} from {len(found[0][kind]):,} answers"
        console.print(line, markup=False, highlight=False)
        print_report(table, console)
    origin = dict(zip(("dataset", "report_dataset"), map(public_name, names), strict=False))
    save_decisions(decide, calibrations, output, origin={"model": public_name(model), **origin})
    console.print(f"Saved {output}. To use it:", markup=False, highlight=False)
    code = f'pipeline("decision", model="{model}", decision_config="{output}")'
    console.print(f"from transformers import pipeline\n\ndecide = {code}", markup=False, soft_wrap=True)


@app.command()
def evaluate(
    predictions: Annotated[
        Path | None, typer.Argument(help="A .parquet, .csv, .jsonl or .npz file of probabilities and labels.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="In place of a file: a Hub id or a folder.")] = None,
    dataset: Annotated[str | None, typer.Option(help="With --model: a Hub id, a folder or a file.")] = None,
    split: Annotated[str, typer.Option(help="Rows that neither training nor fitting has seen.")] = "test",
    dataset_config: Config = None,
    text_column: Text = ["text"],  # noqa: B006
    label_column: Label = "label",
    label_map: Map = [],  # noqa: B006
    probs_column: Annotated[str, typer.Option(help="In a file: a list, a number, or NAME_0, NAME_1 ...")] = "probs",
    metric: Annotated[
        list[str], typer.Option(help="Of a file: a name in hf_calib.METRICS, once for each, in place of the five.")
    ] = [],  # noqa: B006
    group_column: Annotated[
        str | None, typer.Option(help="In a file: the metrics by group too, and the worst.")
    ] = None,
    batch_size: Batch = 32,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Print accuracy, NLL, Brier, ECE and smooth ECE with intervals; changes nothing."""
    from rich.console import Console

    from .console import print_groups, print_report

    if (predictions is None) == (model is None) or (model is None) != (dataset is None):
        raise ValueError("predictions: give either a file of predictions, or --model and --dataset")
    groups = {}
    if predictions is not None:
        columns = {"probs_column": probs_column, "label_column": label_column, "group_column": group_column}
        report, groups = _evaluate_file(predictions, metric, seed, **columns)
    elif metric or group_column:
        raise ValueError(f"predictions: got none; {'metric' if metric else 'group_column'} is for a file of them")
    else:
        columns = {"text_column": text_column, "label_column": label_column, "label_map": pairs(label_map)}
        classifier, found = _predict(model, (dataset, dataset_config, split), batch_size, **columns)
        report = _report_on(classifier, found, seed)
    if as_json:
        print(json.dumps({**report.to_dict(), "verdict": report.verdict(), **groups}, indent=2))
    else:
        print_report(report, Console())
        print_groups(groups, Console())


def _evaluate_file(path: Path, metrics: list[str], seed: int, **columns: str | None) -> tuple[Any, dict[str, Any]]:
    """The report of a file of any length, of whose rows sums are kept; and its groups."""
    from .console import row_bar
    from .measuring import measure_predictions
    from .prediction_files import count_rows

    with row_bar(count_rows(path)) as advance:
        found = measure_predictions(path, metrics, advance=advance, **columns)
    return found.report(seed), found.group_records(seed)


def _predict(model: str, data: tuple[str, str | None, str], batch_size: int, **columns: Any) -> tuple[Any, Any]:
    """A model, calibrated if it was saved so, and its raw predictions."""
    from .console import bars_on_a_terminal
    from .predictions import collect_predictions

    with bars_on_a_terminal():
        classifier, tokenizer = load_model(model)
        rows = load_data(*data)
        found = collect_predictions(classifier, rows, processing_class=tokenizer, batch_size=batch_size, **columns)
    return classifier, found


def _report_on(classifier: Any, found: Any, seed: int) -> Any:
    """The report of a model, before and after its calibrator where it has one."""
    from .report import evaluate_calibration

    probs, before = found.probs, None
    if (calibrator := _calibrator_of(classifier)) is not None:
        probs, before = calibrator.log_probs(found.logits).exp(), probs
    return evaluate_calibration(probs, found.labels, before=before, seed=seed)


def _calibrator_of(classifier: Any) -> Any:
    from .attaching import attached_calibrator, folded_calibrator

    return attached_calibrator(classifier) or folded_calibrator(classifier)


@app.command()
def report(
    model: Annotated[str, typer.Option(help="A Hub id or a folder: a calibrated sequence classifier.")],
    dataset: Data,
    split: Annotated[str, typer.Option(help="Rows that neither training nor fitting has seen.")] = "test",
    output: Annotated[
        Path | None, typer.Option(help="A new folder for the card, in place of the model's own.")
    ] = None,
    dataset_config: Config = None,
    text_column: Text = ["text"],  # noqa: B006
    label_column: Label = "label",
    label_map: Map = [],  # noqa: B006
    batch_size: Batch = 32,
    seed: Seed = 0,
) -> None:
    """Print the table of other rows, and put it and its diagram into the calibrated model's card."""
    from rich.console import Console

    from .attaching import attached_calibrator
    from .calibrators.loading import calibrator_folder
    from .card_text import card_name
    from .console import print_report
    from .folders import check_new_folder
    from .hub import is_stock, task_of
    from .model_card import update_model_card
    from .publishing import card_of

    check_exists("model", model)
    if output is not None:
        check_new_folder("output", output)
    elif not Path(model).is_dir():
        raise ValueError(f"output: got none; allowed is a new folder, since {model} is no folder")
    with naming("model", model):
        calibrator_folder(model)
        card = card_of(model)
    columns = {"text_column": text_column, "label_column": label_column, "label_map": pairs(label_map)}
    classifier, found = _predict(model, (dataset, dataset_config, split), batch_size, **columns)
    calibrator = _calibrator_of(classifier)
    _check_unseen(calibrator.provenance, dataset, dataset_config, split, found)
    table = _report_on(classifier, found, seed)
    fit = {key: value for key, value in calibrator.provenance.items() if not key.startswith("report_")}
    calibrator.provenance = fit | _later_rows(dataset, dataset_config, split)
    console, folder = Console(), (output or Path(model)).resolve()
    print_report(table, console)
    names = update_model_card(
        folder,
        name=(card and card_name(card)) or public_name(model),
        calibrator=calibrator,
        applied="folded" if attached_calibrator(classifier) is None else "attached",
        task=task_of(classifier),
        report=table,
        stock=is_stock(classifier),
        existing=card,
    )
    console.print(f"Wrote {' and '.join(names)} in {output or model}.", markup=False, highlight=False, soft_wrap=True)


def _check_unseen(fit: dict[str, Any], dataset: str, config: str | None, split: str, found: Any) -> None:
    """Raises a ValueError for the rows of the fit, as far as calibrator.json tells which these were."""
    asked = origin_of(dataset, split, config, "")
    same_name = {key: fit[key] for key in ("dataset", "config", "split") if key in fit} == asked
    if fit.get("fingerprint") == found.fingerprint() or (same_name and fit.get("rows") == len(found)):
        raise ValueError(f"dataset: got {dataset}, the rows of the fit; allowed are rows that it has not seen")


def _later_rows(dataset: str, config: str | None, split: str) -> dict[str, str]:
    """What the card says of the rows of a report that was made after the fit."""
    origin = origin_of(dataset, split, config, "report_")
    parts = ", ".join(f"{key.removeprefix('report_')} {value}" for key, value in origin.items())
    return origin | {"report_rows": f"{parts}; reported on after the fit, by hf-calib report"}


def _keep_card(card: str, folder: Path) -> None:
    """Puts our section of the card that is in a folder into another one, which takes its place."""
    from .card_text import merge_cards, read_model_card, rename_card, replace_model_card

    replace_model_card(folder, merge_cards(rename_card(card, folder.name), read_model_card(folder)))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What hf-calib fit or save_calibrated wrote.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME, or NAME for your own; made if it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made, only you and your team see it.")] = False,
    token: Annotated[str | None, typer.Option(help="By default the one that this machine is logged in with.")] = None,
) -> None:
    """Push a calibrated folder to the Hub as it is, in one commit."""
    from .publishing import check_calibrated_folder, push_folder

    check_calibrated_folder(folder)
    with naming("repo_id", repo_id, "push to"):
        pushed = push_folder(folder, repo_id, private=private or None, token=token)
    if pushed.kept_card:
        print("The repo's README.md keeps its text; the section on calibration is new.")
    print(pushed.commit_url)


def main() -> None:
    """Runs the command. Whatever is wrong with its input is one line on stderr and exit code 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UsageError as error:
        code = _fail(error.format_message())
    except (ValueError, OSError, ImportError) as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _fail("interrupted; no half-written folder is left")
    sys.exit(code)


def _show_warning(message: Warning | str, *where: Any) -> None:
    print(f"hf-calib: warning: {message}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"hf-calib: {(message.strip().splitlines() or ['stopped'])[0]}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
