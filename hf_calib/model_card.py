"""The model card of a calibrated model: what was done, the table before and after, the diagram, how to load it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from .calibrators import Calibrator
from .report import TITLES, CalibrationReport


CARD_NAME = "README.md"
DIAGRAM_NAME = "reliability.png"
DIAGRAM_DPI = 150
IMPORT = "import hf_calib\n"


def write_model_card(
    folder: Path, *, name: str, calibrator: Calibrator, applied: str, report: CalibrationReport | None, stock: bool
) -> None:
    """Writes `README.md`, and `reliability.png` where there is a report and matplotlib, into a model's folder.

    Args:
        folder (`Path`): exists.
        name (`str`): the folder's name or the repo's id, for the title, the `model-index` and the lines that load it.
        calibrator ([`Calibrator`]): its `provenance` says what it was fitted on.
        applied (`"folded"` or `"attached"`): which decides how the card says to load the model.
        report ([`CalibrationReport`], *optional*): the numbers.
        stock (`bool`): transformers knows the architecture without this library.
    """
    from huggingface_hub import ModelCard

    diagram = report is not None and bool(report.events) and write_diagram(folder / DIAGRAM_NAME, report)
    parts = [
        f"---\n{_metadata(name, calibrator, report)}\n---",
        f"# {name}",
        _introduction(calibrator, applied),
        _results(report, diagram),
        f"## How to use it\n\n```python\n{usage(name, applied, stock)}\n```",
        _fit(calibrator),
    ]
    ModelCard("\n\n".join(part for part in parts if part) + "\n").save(folder / CARD_NAME)


def write_diagram(path: Path, report: CalibrationReport) -> bool:
    """Draws the report's reliability diagram; False, with a warning, where matplotlib is not installed."""
    try:
        figure = report.figure()
    except ImportError as error:
        warnings.warn(f"{path.name}: not drawn, because {error}", stacklevel=2)
        return False
    figure.savefig(path, dpi=DIAGRAM_DPI)
    return True


def usage(name: str, applied: str, stock: bool) -> str:
    """The lines of Python that load the model, calibrated, and run a stock pipeline on it."""
    name = json.dumps(name, ensure_ascii=False)  # quoted: a path on Windows holds backslashes
    if applied == "folded":
        return (
            f"{'' if stock else IMPORT}from transformers import pipeline\n\n"
            f'classifier = pipeline("text-classification", model={name})'
        )
    return (
        f"{IMPORT}from transformers import AutoTokenizer, pipeline\n\n"
        f"model, tokenizer = hf_calib.load_calibrated({name}), AutoTokenizer.from_pretrained({name})\n"
        'classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)'
    )


def _metadata(name: str, calibrator: Calibrator, report: CalibrationReport | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if report is not None:
        data = calibrator.provenance
        dataset = data.get("report_dataset", data.get("dataset", "unknown"))
        shared: dict[str, Any] = {
            "task_type": "text-classification",
            "dataset_type": dataset,
            "dataset_name": dataset,
            "dataset_split": data.get("report_split"),
        }
        results = [
            EvalResult(**shared, metric_type=key, metric_name=TITLES[key], metric_value=round(estimate.value, 6))
            for key, estimate in report.after.items()
        ]
    card = ModelCardData(
        base_model=_hub_id(calibrator.provenance.get("model", "")),
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["calibration", "hf_calib"],
        model_name=name,
        eval_results=results,
    )
    return card.to_yaml()


def _hub_id(name: str) -> str | None:
    """What the card may link to; a folder's name leads nowhere."""
    return name if "/" in name else None


def _introduction(calibrator: Calibrator, applied: str) -> str:
    how = {
        "folded": "It is folded into the weights: whatever loads them gives calibrated scores.",
        "attached": "It lies beside the weights: `hf_calib.load_calibrated` applies it.",
    }[applied]
    labels = ", ".join(calibrator.label_names or [])
    return (
        "A text classifier with calibrated probabilities: of the texts it is 80 % sure about, about 80 % should be "
        f"right. The calibrator is `{calibrator.name}`. {how}\n\nLabels: {labels}."
    )


def _results(report: CalibrationReport | None, diagram: bool) -> str:
    if report is None:
        return ""
    picture = f"\n\n![Reliability diagram before and after calibration]({DIAGRAM_NAME})" if diagram else ""
    return f"## Calibration\n\n{report.to_markdown()}{picture}"


def _fit(calibrator: Calibrator) -> str:
    names = {
        "dataset": "Data set",
        "split": "Split",
        "rows": "Rows",
        "fingerprint": "Fingerprint of logits and labels",
    }
    known = [
        f"- {title}: {calibrator.provenance[key]}" for key, title in names.items() if key in calibrator.provenance
    ]
    if "report_rows" in calibrator.provenance:
        known.append(f"- The table's rows: {calibrator.provenance['report_rows']}")
    return "## What the calibrator was fitted on\n\n" + "\n".join(known) if known else ""
