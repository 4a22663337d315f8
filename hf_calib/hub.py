"""A calibrated model as a folder and as a Hub repo: weights, tokenizer, calibrator, model card and diagram."""

from __future__ import annotations

import copy
import json
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
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .attaching import (
    FOLDED_KEY,
    attach_copy,
    attached_calibrator,
    check_can_calibrate,
    check_same_labels,
    folded_calibrator,
    mark_folded,
    without_adapters,
    write_beside,
)
from .calibrators.loading import calibrator_folder, load_with_record
from .calibrators.storage import weights_sha256
from .card_text import read_model_card
from .folders import ADAPTER_CONFIG, check_new_folder, check_replaceable, new_folder
from .model_card import write_model_card
from .models import CalibTransformerConfig
from .publishing import read_hub_card
from .report import CalibrationReport


# The Auto class that loads a head with logits, and what the Hub calls its task
TASKS = {
    AutoModelForSequenceClassification: "text-classification",
    AutoModelForTokenClassification: "token-classification",
    AutoModelForImageClassification: "image-classification",
    AutoModelForAudioClassification: "audio-classification",
    AutoModelForCausalLM: "text-generation",
    AutoModelForSeq2SeqLM: "text2text-generation",
    AutoModelForMaskedLM: "fill-mask",
    AutoModelForQuestionAnswering: "question-answering",
}
# What PEFT calls the tasks for which it has an Auto class of its own
ADAPTER_TASKS = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    None: "AutoPeftModel",
}
# Of a model that was in a repo before: one that is not replaced must not be loaded in the place of the new one
STALE_WEIGHTS = ["model-*.safetensors", "model.safetensors", "model.safetensors.index.json"]


def save_calibrated(
    model: PreTrainedModel,
    path: str | Path,
    *,
    processing_class: Any = None,
    report: CalibrationReport | None = None,
    overwrite: bool = False,
) -> Path:
    """Saves all that a Hub repo of a calibrated model holds; the whole folder appears at once, or none of it.

    Args:
        model ([`~transformers.PreTrainedModel`], or one with PEFT adapters): with a calibrator attached or folded. Of
            adapters, they alone are saved, and the calibrator beside them.
        path (`str` or `Path`): a folder that does not exist yet, or is empty.
        processing_class (*optional*): the tokenizer to save beside it.
        report ([`CalibrationReport`], *optional*): for the model card's table and, with matplotlib, its diagram.
        overwrite (`bool`): replace the model and the calibrator that `path` holds, by an exchange of two folders that
            cannot be seen half done on Linux and macOS; its other files, and the text of its card, stay.
    Returns:
        the folder.
    Raises:
        ValueError: no calibrator is attached or folded, or `load_calibrated` could not load it again.
        FileExistsError: the folder holds something, with `overwrite` something else than a model.
    """
    path = Path(path).resolve()
    check_calibrated(model)
    check_replaceable("path", path) if overwrite else check_new_folder("path", path)
    with new_folder(path) as folder:
        _write(model, folder, processing_class, report, path.name, read_model_card(path))
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
    """Pushes what `save_calibrated` saves to the Hub, in one commit. A card that is there keeps its text.

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
        existing = read_hub_card(repo_id, token=token) if api.repo_exists(repo_id) else None
        _write(model, Path(folder), processing_class, report, repo_id, existing)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload calibrated model",
            delete_patterns=None if (Path(folder) / ADAPTER_CONFIG).exists() else STALE_WEIGHTS,
        )
    return str(commit.commit_url)


def load_calibrated(
    path_or_repo_id: str | Path, *, revision: str | None = None, token: str | None = None, **options: Any
) -> PreTrainedModel:
    """Loads a model and applies its calibrator exactly once: attached, or already in the weights.

    The Auto class is that of the head in the config: a classifier of texts, tokens, images or sounds, or a model of
    language or of answers. Adapters are loaded by PEFT, with the model that they name.

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
        UserWarning: the calibrator was fitted for other weights than those that it lies beside.
    """
    folder = calibrator_folder(path_or_repo_id, revision=revision, token=token)
    calibrator, record = load_with_record(folder)
    applied = record.get("applied")
    if applied not in ("attached", "folded"):
        raise ValueError(
            f'{path_or_repo_id}: calibrator.json says applied={applied!r}; allowed are "attached" and "folded"'
        )
    hub = {"revision": revision, "token": token}
    if (adapter := _adapter_config(path_or_repo_id, folder, hub)) is not None:
        model = _load_adapters(path_or_repo_id, adapter, calibrator.label_names, {**hub, **options})
    else:
        code = {key: options[key] for key in ("trust_remote_code",) if key in options}
        config = AutoConfig.from_pretrained(path_or_repo_id, **hub, **code)
        model = auto_class_of(str(path_or_repo_id), config).from_pretrained(path_or_repo_id, **hub, **options)
    if applied == "attached":
        check_can_calibrate(model, calibrator)
        attach_copy(model, calibrator)
    else:
        check_same_labels(model, calibrator)
        if getattr(model.config, FOLDED_KEY, None) != calibrator.name:
            raise ValueError(
                f"{path_or_repo_id}: calibrator.json says that {calibrator.name} is folded into the weights, but "
                "config.json does not; save the two together"
            )
        mark_folded(model, calibrator)
    fitted_for = [record.get("weights"), calibrator.provenance.get("weights") if applied == "attached" else None]
    present = weights_sha256(folder)
    if present is not None and any(weights not in (None, present) for weights in fitted_for):
        warnings.warn(
            f"{path_or_repo_id}: the calibrator was fitted for other weights than these; fit it again", stacklevel=2
        )
    return model


def _adapter_config(path_or_repo_id: str | Path, folder: Path, hub: dict[str, Any]) -> dict[str, Any] | None:
    """PEFT's config where the folder or repo holds adapters; `None` where it holds a whole model."""
    path = folder / ADAPTER_CONFIG
    if not Path(path_or_repo_id).is_dir() and not path.exists():
        from transformers.utils import find_adapter_config_file

        found = find_adapter_config_file(str(path_or_repo_id), **hub)
        if found is None:
            return None
        path = Path(found)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _load_adapters(
    path_or_repo_id: str | Path, adapter: dict[str, Any], names: list[str] | None, options: dict[str, Any]
) -> Any:
    """A PEFT model on the base that it names, whose head gets the labels that only the calibrator's file knows."""
    try:
        import peft
    except ImportError:
        raise ImportError(f"{path_or_repo_id}: it holds adapters; pip install peft") from None
    task = adapter.get("task_type")
    if task not in ADAPTER_TASKS:
        raise ValueError(
            f"{path_or_repo_id}: adapters for {task!r}; allowed are {', '.join(filter(None, ADAPTER_TASKS))}"
        )
    if names is not None:
        options["id2label"] = dict(enumerate(names))
        options["label2id"] = {name: index for index, name in enumerate(names)}
    return getattr(peft, ADAPTER_TASKS[task]).from_pretrained(str(path_or_repo_id), **options)


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
    base = without_adapters(model)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"model: got {type(model).__name__}; allowed are transformers models, and PEFT's on them")
    if base is model and getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "model: it has adapters that transformers added; allowed are those of peft.get_peft_model or "
            "PeftModel.from_pretrained"
        )
    if base is not model and not getattr(model.active_peft_config, "base_model_name_or_path", None):
        raise ValueError(
            "model: its adapters do not say what they are for; save the base and load it from there first"
        )
    task_of(model)
    if attached_calibrator(model) is None and folded_calibrator(model) is None:
        raise ValueError("model: no calibrator is attached or folded; attach_calibrator or fold_calibrator first")


def task_of(model: PreTrainedModel) -> str:
    """What the Hub calls the task of this model; a ValueError where `load_calibrated` could not load it again."""
    base = without_adapters(model)
    config = copy.copy(base.config)
    config.architectures = [type(base).__name__]
    return TASKS[auto_class_of("model", config)]


def _write(
    model: PreTrainedModel,
    folder: Path,
    processing_class: Any,
    report: CalibrationReport | None,
    name: str,
    existing: str | None,
) -> None:
    """Fills a folder; of a card that exists already, only our section is replaced."""
    type(model).save_pretrained(model, folder)
    write_beside(model, folder)
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
        existing=existing,
    )


def is_stock(model: PreTrainedModel) -> bool:
    """Whether plain transformers knows the architecture, so that a folded model needs nothing else."""
    return model.config.model_type != CalibTransformerConfig.model_type
