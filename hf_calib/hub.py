"""A calibrated model as a folder and as a Hub repo: weights, tokenizer, calibrator, model card and diagram."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .attaching import (
    FOLDED_KEY,
    attach_calibrator,
    attached_calibrator,
    check_same_labels,
    folded_calibrator,
    mark_folded,
)
from .calibrators.storage import calibrator_folder, load_calibrator, read_record, weights_sha256
from .model_card import write_model_card
from .models import CalibTransformerConfig
from .report import CalibrationReport


# The Auto class that loads a head with logits, and what the Hub calls its task
TASKS = {
    AutoModelForSequenceClassification: "text-classification",
    AutoModelForTokenClassification: "token-classification",
    AutoModelForImageClassification: "image-classification",
    AutoModelForAudioClassification: "audio-classification",
    AutoModelForCausalLM: "text-generation",
    AutoModelForSeq2SeqLM: "text2text-generation",
}


def save_calibrated(
    model: PreTrainedModel, path: str | Path, *, processing_class: Any = None, report: CalibrationReport | None = None
) -> Path:
    """Saves all that a Hub repo of a calibrated model holds; the whole folder appears at once, or none of it.

    Args:
        model ([`~transformers.PreTrainedModel`]): with a calibrator attached or folded.
        path (`str` or `Path`): a folder that does not exist yet, or is empty.
        processing_class (*optional*): the tokenizer to save beside it.
        report ([`CalibrationReport`], *optional*): for the model card's table and, with matplotlib, its diagram.
    Returns:
        the folder.
    Raises:
        ValueError: no calibrator is attached or folded, or `load_calibrated` could not load it again.
        FileExistsError: the folder holds something; nothing is overwritten.
    """
    path = Path(path).resolve()
    check_calibrated(model)
    check_new_folder("path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's folders are private
        _write(model, partial, processing_class, report, path.name)
        os.replace(partial, path)  # renaming onto an empty folder replaces it
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def push_calibrated(
    model: PreTrainedModel,
    repo_id: str,
    *,
    processing_class: Any = None,
    report: CalibrationReport | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Pushes what `save_calibrated` saves to the Hub, in one commit.

    Args:
        model, processing_class, report: as in `save_calibrated`.
        repo_id (`str`): such as `"me/my-model"`, or `"my-model"` for your own; made if it is missing.
        private (`bool`, *optional*): of a repo that is made.
        token (`str`, *optional*): by default the one that the machine is logged in with.
    Returns:
        the commit's URL.
    """
    from huggingface_hub import HfApi

    check_calibrated(model)
    api = HfApi(token=token)
    if "/" not in repo_id:  # the Hub takes an upload by the full name only, and so do the card's lines
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    with tempfile.TemporaryDirectory() as folder:
        _write(model, Path(folder), processing_class, report, repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload calibrated model")
    return str(commit.commit_url)


def load_calibrated(
    path_or_repo_id: str | Path, *, revision: str | None = None, token: str | None = None, **options: Any
) -> PreTrainedModel:
    """Loads a model and applies its calibrator exactly once: attached, or already in the weights.

    The Auto class is that of the head in the config: a classifier of texts, tokens, images or sounds, or a model that
    generates text.

    Args:
        path_or_repo_id (`str` or `Path`): what `save_calibrated`, `push_calibrated`, or a calibrated model's own
            `save_pretrained` and `push_to_hub` wrote.
        revision, token (`str`, *optional*): of the Hub repo.
        **options: for `from_pretrained`, such as `dtype` or `device_map`.
    Returns:
        the model.
    Raises:
        FileNotFoundError: there is no calibrator.
        ValueError: a calibrator file is damaged, or the two do not belong together.
    Warns:
        UserWarning: the weights are not those that the calibrator was saved with.
    """
    folder = calibrator_folder(path_or_repo_id, revision=revision, token=token)
    record, calibrator = read_record(folder), load_calibrator(folder)
    hub = {"revision": revision, "token": token}
    code = {key: options[key] for key in ("trust_remote_code",) if key in options}
    auto_class = auto_class_of(str(path_or_repo_id), AutoConfig.from_pretrained(path_or_repo_id, **hub, **code))
    model = auto_class.from_pretrained(path_or_repo_id, **hub, **options)
    saved, present = record.get("weights"), weights_sha256(folder)
    if None not in (saved, present) and saved != present:
        warnings.warn(
            f"{path_or_repo_id}: the weights are not those that the calibrator was saved with; fit it again",
            stacklevel=2,
        )
    applied = record.get("applied")
    if applied == "attached":
        return attach_calibrator(model, calibrator)
    if applied == "folded":
        check_same_labels(model, calibrator)
        if getattr(model.config, FOLDED_KEY, None) != calibrator.name:
            raise ValueError(
                f"{path_or_repo_id}: calibrator.json says that {calibrator.name} is folded into the weights, but "
                "config.json does not; save the two together"
            )
        mark_folded(model, calibrator)
        return model
    raise ValueError(
        f'{path_or_repo_id}: calibrator.json says applied={applied!r}; allowed are "attached" and "folded"'
    )


def auto_class_of(name: str, config: PreTrainedConfig, allowed: Iterable[type] = TASKS) -> type:
    """The Auto class that loads a checkpoint's own head; a ValueError where there is none, or none with logits.

    transformers would load any checkpoint with any head, and make one up where the weights have another.
    """
    architecture = (config.architectures or ["model without a head"])[0]
    for auto_class in allowed:
        known = auto_class._model_mapping.get(type(config), ())
        names = {model.__name__ for model in (known if isinstance(known, tuple) else (known,))}
        remote = (getattr(config, "auto_map", None) or {}).get(auto_class.__name__, "")
        if architecture in names or remote.endswith(f".{architecture}"):
            return auto_class
    raise ValueError(
        f"{name}: got a {architecture}; allowed are models of {', '.join(kind.__name__ for kind in allowed)}. On any "
        "other, attach_calibrator(model, AutoCalibrator.from_pretrained(path))"
    )


def check_calibrated(model: PreTrainedModel) -> None:
    """Raises a ValueError unless it is a model that can be loaded again, with a calibrator attached or folded."""
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"model: got {type(model).__name__}; allowed are transformers models without adapters. They are merged "
            "first: attach_calibrator(model.merge_and_unload(), calibrator)"
        )
    task_of(model)
    if attached_calibrator(model) is None and folded_calibrator(model) is None:
        raise ValueError("model: no calibrator is attached or folded; attach_calibrator or fold_calibrator first")


def task_of(model: PreTrainedModel) -> str:
    """What the Hub calls the task of this model; a ValueError where `load_calibrated` could not load it again."""
    config = copy.copy(model.config)
    config.architectures = [type(model).__name__]
    return TASKS[auto_class_of("model", config)]


def check_new_folder(name: str, path: Path) -> None:
    """Raises a FileExistsError naming the argument if something would be overwritten or is in the way."""
    for parent in path.parents:
        if parent.is_file():
            raise FileExistsError(f"{name}: {parent} is a file; allowed are a new folder or an empty one")
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{name}: {path} exists already; allowed are a new folder or an empty one")


def _write(
    model: PreTrainedModel, folder: Path, processing_class: Any, report: CalibrationReport | None, name: str
) -> None:
    model.save_pretrained(folder)  # a calibrated model's own, which writes the calibrator too
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    calibrator = attached_calibrator(model)
    applied = "folded" if calibrator is None else "attached"
    write_model_card(
        folder,
        name=name,
        calibrator=calibrator or folded_calibrator(model),
        applied=applied,
        report=report,
        task=task_of(model),
        stock=is_stock(model),
    )


def is_stock(model: PreTrainedModel) -> bool:
    """Whether plain transformers knows the architecture, so that a folded model needs nothing else."""
    return model.config.model_type != CalibTransformerConfig.model_type
