"""`decision.json`: the temperature for each type of question that `pipeline("decision")` reads, fitted on answers.

transformers divides the scores of a question's options by a temperature that its decision config names. Here it comes
from answers that are known: the folder that is saved is what the pipeline takes as `decision_config`.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.utils import logging

from ..calibrate import FEWEST_ROWS, Calibration, calibrate_with
from ..calibrators import Calibrator, TemperatureScaling
from ..calibrators.rows import FitRows
from ..folders import check_new_folder, new_folder
from ..hub import auto_class_of
from ..predictions import Predictions


CONFIG_NAME = "decision.json"
OUR_KEY = "hf_calib"  # in that file, where transformers ignores it: what the temperatures were fitted on


def collect_decisions(decide: Any, rows: Iterable[Mapping[str, Any]]) -> dict[str, Predictions]:
    """Asks a decision pipeline questions whose answers are known; its temperatures are undone.

    Args:
        decide (`DecisionPipeline`): `pipeline("decision", model=...)`.
        rows (iterable of `dict`): requests as the pipeline takes them (`"state"`, `"questions"`, maybe `"assets"`),
            with `"answers"`: by the name of the question the option of a `choice`, the level of a `score` counted from
            0, or the truth of a `noul`. Questions without an answer, or with one option, are left out.
    Returns:
        `dict`: for each type that was answered, [`Predictions`]: `logits` `(N, C)` float32, log-probabilities in the
        order of the options, `-inf` where a question has fewer than `C`; `labels` `(N,)` int64, the right option.
    Raises:
        ValueError: a row is no request, an answer is none of the options, or nothing is answered.
    """
    scores: dict[str, list[torch.Tensor]] = {}
    labels: dict[str, list[int]] = {}
    for index, row in enumerate(logging.tqdm(rows, desc="Deciding")):
        answers = row.get("answers") if isinstance(row, Mapping) else None
        if not isinstance(answers, Mapping):
            raise ValueError(f"rows: row {index} has no answers; allowed are objects with state, questions, answers")
        request = {key: value for key, value in row.items() if key != "answers"}
        try:
            asked = _ask(decide, request, answers)
        except Exception as error:  # templates, tokenizers and models raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"rows: row {index}: {reason}") from error
        for kind, found, label in asked:
            scores.setdefault(kind, []).append(found)
            labels.setdefault(kind, []).append(label)
    if not scores:
        raise ValueError("rows: no question of two options or more is answered; allowed are rows with answers")
    return {kind: _predictions(found, labels[kind]) for kind, found in scores.items()}


def calibrate_decisions(
    predictions: Mapping[str, Predictions],
    *,
    temperature: Mapping[str, float] | None = None,
    test: Mapping[str, Predictions] | None = None,
    seed: int = 0,
) -> dict[str, Calibration]:
    """Fits a temperature for each type of question and reports on answers that the fit has not seen.

    Args:
        predictions (`dict`): as `collect_decisions` returns it.
        temperature (`dict`, *optional*): what the pipeline divides by so far, `decide.decision_config.temperature`:
            the report says what changes beside that.
        test (`dict`, *optional*): other ones for the report, which is cross-fitted without, as in
            `calibrate_predictions`.
        seed (`int`): of the folds and of the bootstrap.
    Returns:
        `dict`: for each type of at least 10 answers, its [`Calibration`].
    Raises:
        ValueError: no type has 10 answers, or `test` has none of a type that has, or the same.
    Warns:
        UserWarning: a type has fewer than 10 answers; its temperature stays as it is.
    """
    enough = {kind: found for kind, found in predictions.items() if len(found) >= FEWEST_ROWS}
    if not enough:
        raise ValueError(f"predictions: no type of question has {FEWEST_ROWS} answers; allowed are more rows")
    for kind in predictions.keys() - enough:
        warnings.warn(f"{len(predictions[kind])} answers of type {kind} are too few; it is left alone", stacklevel=2)
    if test is not None and (missing := enough.keys() - test.keys()):
        raise ValueError(f"test: got no answers of type {', '.join(sorted(missing))}; allowed are rows with all types")
    return {
        kind: calibrate_with(
            _fit_temperature,
            *_of_one_width(found, None if test is None else test[kind]),
            before=(temperature or {}).get(kind, 1.0),
            seed=seed,
        )
        for kind, found in enough.items()
    }


def save_decisions(
    decide: Any, calibrations: Mapping[str, Calibration], path: str | Path, *, origin: Mapping[str, Any] | None = None
) -> Path:
    """Saves the pipeline's decision config with the fitted temperatures; the folder appears whole, or not at all.

    Args:
        decide (`DecisionPipeline`): the one that was asked; it is not changed.
        calibrations (`dict`): as `calibrate_decisions` returns it.
        path (`str` or `Path`): a folder that does not exist yet, or is empty:
            `pipeline("decision", model=..., decision_config=path)` reads it.
        origin (`dict`, *optional*): what `decision.json` says of the data, such as `{"dataset": "me/rows"}`.
    Returns:
        the folder.
    Raises:
        FileExistsError: the folder holds something.
        ValueError: the pipeline's config names adapters, which would be looked for in that folder.
    """
    path = Path(path).resolve()
    check_new_folder("path", path)
    if decide.decision_config.adapter:
        raise ValueError("decide: its decision.json names an adapter beside it; allowed are configs without")
    config = copy.copy(decide.decision_config)
    fitted = {kind: round(float(found.calibrator.temperature), 6) for kind, found in calibrations.items()}
    config.temperature = {**config.temperature, **fitted}
    fits = {kind: found.calibrator.provenance for kind, found in calibrations.items()}
    with new_folder(path) as folder:
        config.save_pretrained(folder)
        record = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        record[OUR_KEY] = {**(origin or {}), "fits": fits}
        (folder / CONFIG_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def check_decides(model: str) -> None:
    """Raises a ValueError unless a checkpoint's own head scores options; of any other, transformers makes one up."""
    names = ("AutoModelForDecision", "AutoModelForImageTextToText", "AutoModelForCausalLM")
    known = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    auto_class_of("model", AutoConfig.from_pretrained(model), known)


def read_decisions(path: Path) -> list[Any]:
    """The rows of a `.jsonl` file, as `collect_decisions` takes them.

    Raises:
        ValueError: it is no such file, or a line is no JSON.
    """
    if path.suffix != ".jsonl" or not path.is_file():
        raise ValueError(f"dataset: got {path}; allowed for decisions is a .jsonl file")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # JSON strings may hold other ends of lines
        try:
            rows += [json.loads(line.decode())] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"dataset: {path} line {number} is no JSON ({error})") from None
    return rows


def _fit_temperature(rows: FitRows) -> Calibrator:
    return TemperatureScaling().fit_rows(rows)


def _ask(decide: Any, request: dict[str, Any], answers: Mapping[str, Any]) -> list[tuple[str, torch.Tensor, int]]:
    """Type, log-probabilities without temperature, and right option of each question that is answered."""
    outputs = decide.forward(decide.preprocess(request))
    unknown = set(answers)
    found = []
    for (_, questions), scores in zip(outputs["prompts"], outputs["scores"], strict=True):
        for question, score in zip(questions, scores, strict=True):
            unknown.discard(question.name)
            answer = answers.get(question.name)
            if answer is None:
                continue
            option = str(answer).lower() if isinstance(answer, bool) else str(answer)
            if option not in question.options:
                allowed = ", ".join(question.options)
                raise ValueError(f"the answer to {question.name} is {answer!r}; allowed are {allowed}")
            if len(question.options) < 2:
                continue
            raw = score.float().cpu() * float(decide.decision_config.temperature.get(question.type, 1.0))
            found.append((question.type, raw.log_softmax(-1), question.options.index(option)))
    if unknown:
        raise ValueError(f"answers to {', '.join(sorted(unknown))}, which nobody asked")
    return found


def _predictions(scores: list[torch.Tensor], labels: list[int]) -> Predictions:
    most = max(map(len, scores))
    logits = torch.stack([_padded(row, most) for row in scores])
    return Predictions(logits, torch.tensor(labels), [str(option) for option in range(most)])


def _of_one_width(*predictions: Predictions | None) -> list[Predictions | None]:
    """The same with as many options as the widest has; None stays None."""
    names = max((found.label_names for found in predictions if found is not None), key=len)
    return [found and Predictions(_padded(found.logits, len(names)), found.labels, names) for found in predictions]


def _padded(scores: torch.Tensor, num_options: int) -> torch.Tensor:
    return torch.nn.functional.pad(scores, (0, num_options - scores.shape[-1]), value=-torch.inf)
