"""What the arguments of `hf-calib` name: models, data and repos, and one line for those that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # of data sets, by file


def pairs(entries: list[str]) -> dict[str, str]:
    """What `--label-map` says; a ValueError for an entry that is no `A=B`."""
    for entry in entries:
        if entry.count("=") != 1:
            raise ValueError(f"label_map: got {entry!r}; allowed is DATASET_LABEL=MODEL_LABEL")
    return dict(entry.split("=") for entry in entries)


def check_apart(fitting: tuple[str, str], test: tuple[str, str]) -> None:
    """Raises a ValueError where the table would be of the rows of the fit; a file serves any split."""
    if fitting == test or (fitting[0] == test[0] and Path(test[0]).is_file()):
        raise ValueError(
            f"test_split: got {test[1]!r} of {test[0]}, the rows of the fit; allowed are another split, or "
            "--test-dataset"
        )


def public_name(name: str) -> str:
    """A Hub id, or the last part of a path: where it lies on this machine is nobody's business."""
    return Path(name).resolve().name if Path(name).exists() else name


def origin_of(dataset: str, split: str, config: str | None, prefix: str) -> dict[str, str]:
    """What calibrator.json says of rows; a file has no splits."""
    found = {"dataset": public_name(dataset)}
    if not Path(dataset).is_file():
        found |= {"config": config, "split": split}
    return {f"{prefix}{key}": value for key, value in found.items() if value is not None}


@contextmanager
def naming(argument: str, value: str, deed: str = "load") -> Iterator[None]:
    """The libraries' own messages do not say which argument was wrong, and their builders raise anything."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{argument}:"):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = getattr(error, "server_message", None) or str(error.__cause__ or "").split("\n")[0]  # the Hub's word
        said = f" ({reason})" if reason and reason not in lines[0] else ""
        raise ValueError(f"{argument}: cannot {deed} {value!r}: {lines[0]}{said}") from error


def check_exists(argument: str, name: str) -> None:
    """Raises a ValueError for what can only be a path and leads nowhere: asking the Hub for it takes a minute."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in BUILDERS
    if not name or (is_path and not Path(name).exists()):
        raise ValueError(f"{argument}: got {name!r}, where nothing is; allowed are a Hub id, a folder or a file")


def load_model(model: str) -> tuple[Any, Any]:
    """The classifier, calibrated if it was saved so, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from .hub import auto_class_of, load_calibrated

    check_exists("model", model)
    if (Path(model) / "adapter_config.json").is_file():
        raise ValueError(
            f"model: {model} holds adapters; allowed are whole models: merge_and_unload() and save it first"
        )
    with naming("model", model):
        auto_class_of("model", AutoConfig.from_pretrained(model), (AutoModelForSequenceClassification,))
        try:
            classifier = load_calibrated(model)
        except FileNotFoundError:
            classifier = AutoModelForSequenceClassification.from_pretrained(model)
        return classifier.eval(), AutoTokenizer.from_pretrained(model)


def load_data(dataset: str, config: str | None, split: str) -> Any:
    """One split of a Hub data set, a folder, or a file, which has but one."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    check_exists("dataset", dataset)
    path, source = Path(dataset), {"path": dataset, "name": config}
    no_rows = ValueError(f"dataset: {dataset} has 0 rows; allowed are splits with at least one")
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"dataset: got {dataset}; allowed files are {', '.join(BUILDERS)}")
        if path.stat().st_size == 0:
            raise no_rows
        source = {"path": BUILDERS[path.suffix], "data_files": {split: dataset}}
    with naming("dataset", dataset):
        try:
            return datasets.load_dataset(**source, split=split)
        except DatasetGenerationError as error:  # whose own message says nothing
            raise (error.__cause__ or error) from None
        except ValueError as error:
            raise (no_rows if "corresponds to no data" in str(error) else error) from None
