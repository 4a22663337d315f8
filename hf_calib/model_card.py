"""The model card of a calibrated model: what was done, the table before and after, the diagram, how to load it."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from .calibrators import Calibrator
from .card_text import END, START, TAGS, check_card, merge_cards, replace_model_card
from .report import TITLES, CalibrationReport


DIAGRAM_NAME = "reliability.png"
DIAGRAM_DPI = 150
IMPORT = "import hf_calib\n"


class Task(NamedTuple):
    """What a card says of a model for a task, and of the lines that run it."""

    what: str
    rows: str  # of what it is sure
    processor: str = "AutoTokenizer"
    option: str = "tokenizer"  # of the pipeline
    result: str = "classifier"


TASKS = {
    "text-classification": Task("A text classifier with calibrated probabilities", "texts"),
    "token-classification": Task("A token classifier with calibrated probabilities", "tokens"),
    "image-classification": Task(
        "An image classifier with calibrated probabilities", "images", "AutoImageProcessor", "image_processor"
    ),
    "audio-classification": Task(
        "An audio classifier with calibrated probabilities", "recordings", "AutoFeatureExtractor", "feature_extractor"
    ),
    "text-generation": Task("A language model with calibrated token probabilities", "tokens", result="generator"),
    "text2text-generation": Task("A sequence-to-sequence model with calibrated token probabilities", "tokens"),
    "fill-mask": Task("A masked language model with calibrated token probabilities", "tokens", result="fill"),
    "question-answering": Task("A model that finds answers, with calibrated probabilities", "answers"),
}
# Tasks for which transformers 5 has no pipeline: the Auto class, and what to do with the model
WITHOUT_PIPELINE = {
    "text2text-generation": (
        "AutoModelForSeq2SeqLM",
        'generated = model.generate(**tokenizer("a text", return_tensors="pt"))',
    ),
    "question-answering": (
        "AutoModelForQuestionAnswering",
        'answer = model(**tokenizer("a question", "a text that answers it", return_tensors="pt"))',
    ),
}


def write_model_card(
    folder: Path,
    *,
    name: str,
    calibrator: Calibrator,
    applied: str,
    task: str,
    report: CalibrationReport | None,
    stock: bool,
    existing: str | None = None,
) -> None:
    """Writes `README.md`, and `reliability.png` where there is a report and matplotlib, into a model's folder.

    Args:
        folder (`Path`): exists.
        name (`str`): the folder's name or the repo's id, for the title, the `model-index` and the lines that load it.
        calibrator ([`Calibrator`]): its `provenance` says what it was fitted on.
        applied (`"folded"` or `"attached"`): which decides how the card says to load the model.
        task (`str`): the Hub's name of it, a key of `TASKS`.
        report ([`CalibrationReport`], *optional*): the numbers.
        stock (`bool`): transformers knows the architecture without this library.
        existing (`str`, *optional*): the text of a card that is there already: only our section and our metadata are
            put into it, as by `merge_cards`.
    Raises:
        ValueError: `existing` is malformed. The card that is there is left as it is.
    """
    if existing is not None:
        check_card(existing)  # before the diagram is replaced
    diagram = report is not None and bool(report.events) and write_diagram(folder / DIAGRAM_NAME, report)
    parts = [
        START,
        f"## Calibration\n\n{_introduction(calibrator, applied, task)}",
        _results(report, diagram),
        f"### How to load it\n\n```python\n{usage(name, applied, task, stock)}\n```",
        _fit(calibrator),
        END,
    ]
    section = "\n\n".join(part for part in parts if part)
    card = f"---\n{_metadata(name, calibrator, task, report)}\n---\n\n# {name}\n\n{section}\n"
    replace_model_card(folder, merge_cards(existing or card, card))


def update_model_card(folder: Path, **card: Any) -> list[str]:
    """As `write_model_card`, into any folder, each file whole or not at all; their names."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as partial:
        write_model_card(Path(partial), **card)
        names = sorted(path.name for path in Path(partial).iterdir())
        folder.mkdir(exist_ok=True)
        for name in reversed(names):  # the card last, which shows the diagram
            os.replace(Path(partial) / name, folder / name)
    return names


def write_diagram(path: Path, report: CalibrationReport) -> bool:
    """Draws the report's reliability diagram; False, with a warning, where matplotlib is not installed."""
    try:
        figure = report.figure()
    except ImportError as error:
        warnings.warn(f"{path.name}: not drawn, because {error}", stacklevel=2)
        return False
    figure.savefig(path, dpi=DIAGRAM_DPI)
    return True


def usage(name: str, applied: str, task: str, stock: bool) -> str:
    """The lines of Python that load the model, calibrated, and run it: in a stock pipeline, where its task has one."""
    name = json.dumps(name, ensure_ascii=False)  # quoted: a path on Windows holds backslashes
    _, _, processor, option, result = TASKS[task]
    folded = applied == "folded"
    start = IMPORT if not (folded and stock) else ""
    if task in WITHOUT_PIPELINE:
        auto_class, run = WITHOUT_PIPELINE[task]
        loader = f"{auto_class}.from_pretrained" if folded else "hf_calib.load_calibrated"
        return (
            f"{start}from transformers import {f'{auto_class}, ' if folded else ''}{processor}\n\n"
            f"model = {loader}({name})\n{option} = {processor}.from_pretrained({name})\n{run}"
        )
    if folded:
        return f'{start}from transformers import pipeline\n\n{result} = pipeline("{task}", model={name})'
    return (
        f"{start}from transformers import {processor}, pipeline\n\n"
        f"model = hf_calib.load_calibrated({name})\n{option} = {processor}.from_pretrained({name})\n"
        f'{result} = pipeline("{task}", model=model, {option}={option})'
    )


def _metadata(name: str, calibrator: Calibrator, task: str, report: CalibrationReport | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if report is not None:
        data = calibrator.provenance
        dataset = data.get("report_dataset", data.get("dataset", "unknown"))
        shared: dict[str, Any] = {
            "task_type": task,
            "dataset_type": dataset,
            "dataset_name": dataset,
            "dataset_config": data.get("report_config"),
            "dataset_split": data.get("report_split"),
        }
        results = [
            EvalResult(**shared, metric_type=key, metric_name=TITLES[key], metric_value=round(estimate.value, 6))
            for key, estimate in report.after.items()
        ]
    card = ModelCardData(
        base_model=_hub_id(calibrator.provenance.get("model", "")),
        library_name="transformers",
        pipeline_tag=task,
        tags=list(TAGS),
        model_name=name,
        eval_results=results,
    )
    return card.to_yaml()


def _hub_id(name: str) -> str | None:
    """What the card may link to; a folder's name leads nowhere."""
    return name if "/" in name else None


def _introduction(calibrator: Calibrator, applied: str, task: str) -> str:
    how = {
        "folded": "It is folded into the weights: whatever loads them gives calibrated scores.",
        "attached": "It lies beside the weights: `hf_calib.load_calibrated` applies it.",
    }[applied]
    what, rows, *_ = TASKS[task]
    labels = "" if calibrator.label_names is None else f"\n\nLabels: {', '.join(calibrator.label_names)}."
    return (
        f"{what}: of the {rows} it is 80 % sure about, about 80 % should be "
        f"right. The calibrator is `{calibrator.name}`. {how}{labels}"
    )


def _results(report: CalibrationReport | None, diagram: bool) -> str:
    if report is None:
        return ""
    picture = f"\n\n![Reliability diagram before and after calibration]({DIAGRAM_NAME})" if diagram else ""
    return f"### Before and after\n\n{report.to_markdown()}{picture}"


def _fit(calibrator: Calibrator) -> str:
    names = {
        "dataset": "Data set",
        "config": "Configuration",
        "split": "Split",
        "rows": "Rows",
        "fingerprint": "Fingerprint of logits and labels",
    }
    known = [
        f"- {title}: {calibrator.provenance[key]}" for key, title in names.items() if key in calibrator.provenance
    ]
    if "report_rows" in calibrator.provenance:
        known.append(f"- The table's rows: {calibrator.provenance['report_rows']}")
    return "### What the calibrator was fitted on\n\n" + "\n".join(known) if known else ""
