"""Calibrators read back from their two files, which are trusted in nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from .base import Calibrator, are_label_names
from .registry import CALIBRATORS, COMPOSED
from .rows import warn_caller
from .storage import JSON_NAME, TENSORS_NAME, files_sha256


DEEPEST = 16  # members within members
TOO_DEEP = "{}: nested too deeply to be a calibrator"
# `applied` and `weights` are written by whoever saves a model beside the calibrator.
KNOWN_KEYS = {
    *("library", "library_version", "type", "settings", "members", "num_labels", "label_names", "fit"),
    *("applied", "weights", "sha256"),
}


class AutoCalibrator:
    """Loads whatever calibrator a folder or a Hub repo holds."""

    @staticmethod
    def from_pretrained(
        path_or_repo_id: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> Calibrator:
        """Reads `calibrator.json` and `calibrator.safetensors` from a folder, or downloads them from a Hub repo.

        Args:
            path_or_repo_id (`str` or `Path`): a folder, or a repo id such as `"me/my-model"`.
            revision (`str`, *optional*): branch, tag or commit of the repo.
            token (`str`, *optional*): for a private repo.
        Returns:
            the fitted [`Calibrator`].
        Raises:
            FileNotFoundError: the folder or repo holds no calibrator.
            ValueError: a file is damaged, or of another type, shape or label space than it says.
        """
        return load_calibrator(calibrator_folder(path_or_repo_id, revision=revision, token=token))


def calibrator_folder(path_or_repo_id: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder that holds the two calibrator files of a folder or, downloaded, of a Hub repo."""
    folder = Path(path_or_repo_id)
    if not folder.is_dir():
        folder = _download(str(path_or_repo_id), revision, token)
    for name in (JSON_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path_or_repo_id}: holds no {name}; save a calibrator there first")
    return folder


def load_calibrator(folder: Path) -> Calibrator:
    """The calibrator that the two files of a local folder describe; a ValueError where they do not agree."""
    return load_with_record(folder)[0]


def load_with_record(folder: Path) -> tuple[Calibrator, dict[str, Any]]:
    """`load_calibrator`, and all that `calibrator.json` says."""
    json_path, path = folder / JSON_NAME, folder / TENSORS_NAME
    record = _read_record(json_path)
    calibrator = build_calibrator(record, json_path)
    _set_record(calibrator, record, json_path)
    content = path.read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if set(tensors) != set(calibrator.tensors()):
        raise ValueError(f"{path}: holds {sorted(tensors)}; {record['type']} needs {sorted(calibrator.tensors())}")
    fill_calibrator(calibrator, tensors, path)
    if record.get("sha256") != files_sha256(record, content):
        if _read_record(json_path) != record:  # somebody has just saved another one
            return load_with_record(folder)
        raise ValueError(f"{json_path}: changed since it was saved, or {path.name} was; save it anew")
    return calibrator, record


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError(TOO_DEEP.format(path)) from None
    if not isinstance(record, dict) or record.get("library") != "hf_calib":
        raise ValueError(f'{path}: not a calibrator of this library ("library" must be "hf_calib")')
    return record


def _set_record(calibrator: Calibrator, record: dict[str, Any], path: Path) -> None:
    """Puts in what is neither settings nor tensors; warns of what is unknown."""
    names, provenance = record.get("label_names"), record.get("fit") or {}
    if names is not None and not are_label_names(names, calibrator.num_labels):
        raise ValueError(f"{path}: label_names is no list of {calibrator.num_labels} names")
    if not isinstance(provenance, dict):
        raise ValueError(f"{path}: fit is {provenance!r}; allowed is an object")
    calibrator.label_names, calibrator.provenance = names, provenance
    if unknown := sorted(set(record) - KNOWN_KEYS):
        warn_caller(f"{path}: ignoring {', '.join(unknown)}, written by hf_calib {record.get('library_version')}")


def build_calibrator(record: Any, path: Path, depth: int = 0) -> Calibrator:
    """The calibrator that such a record, or one of its members, describes, with fresh state."""
    if depth > DEEPEST:
        raise ValueError(TOO_DEEP.format(path))
    if not isinstance(record, dict):
        raise ValueError(f"{path}: a member is {record!r}; allowed are objects")
    kinds, name = CALIBRATORS | COMPOSED, record.get("type")
    if name not in tuple(kinds):  # a tuple may be asked for what cannot be hashed
        raise ValueError(f"{path}: type {name!r} is unknown; allowed are {', '.join(kinds)}")
    kind, settings, described = kinds[name], record.get("settings", {}), record.get("members", [])
    if not isinstance(settings, dict) or not isinstance(described, list):
        raise ValueError(f"{path}: settings must be an object and members a list")
    members = [build_calibrator(member, path, depth + 1) for member in described]
    try:
        calibrator = kind(members, **settings) if kind.is_composed else kind(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the settings of {name} are wrong: {error}") from None
    num_labels, smallest = record.get("num_labels"), 2 if calibrator.task is None else 1
    if type(num_labels) is not int or num_labels < smallest:
        raise ValueError(f"{path}: num_labels is {num_labels!r}; allowed are integers from {smallest} up")
    sizes, (count, size) = [member.num_labels for member in members], calibrator.expected_members(num_labels)
    if len(sizes) != count or any(found != size for found in sizes):
        raise ValueError(f"{path}: {name} has members of {sizes} labels; allowed are {count} of {size}")
    if calibrator.task == "multilabel" and any(member.task != "binary" for member in members):
        raise ValueError(f'{path}: {name} of several labels has members without task="binary"')
    calibrator.set_tensors({}, num_labels=num_labels, members=members)
    return calibrator


def fill_calibrator(calibrator: Calibrator, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Puts tensors into a calibrator that `build_calibrator` has made, and into its members."""
    own = {name: tensors[name] for name in calibrator.own_tensor_names()}
    calibrator.check_tensors(own, calibrator.num_labels, str(path))
    calibrator.set_tensors(own, num_labels=calibrator.num_labels, members=calibrator.members)
    for index, member in enumerate(calibrator.members):
        prefix = f"members.{index}."
        of_member = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        fill_calibrator(member, of_member, path)


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        files = [hf_hub_download(repo_id, name, revision=revision, token=token) for name in (JSON_NAME, TENSORS_NAME)]
    except LocalEntryNotFoundError:
        raise FileNotFoundError(f"{repo_id}: no such folder, nor in the cache, and the Hub is out of reach") from None
    except EntryNotFoundError:
        raise FileNotFoundError(f"{repo_id}: the repo holds no {JSON_NAME} and {TENSORS_NAME}") from None
    except (HFValidationError, RepositoryNotFoundError):
        raise FileNotFoundError(f"{repo_id}: neither a folder nor a Hub repo that this token can read") from None
    return Path(files[0]).parent
