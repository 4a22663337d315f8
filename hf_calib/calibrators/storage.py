"""A calibrator as files: `calibrator.json` says what it is, `calibrator.safetensors` holds its tensors."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..version import __version__
from .base import Calibrator
from .registry import CALIBRATORS, COMPOSED


JSON_NAME = "calibrator.json"
TENSORS_NAME = "calibrator.safetensors"
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
        folder = calibrator_folder(path_or_repo_id, revision=revision, token=token)
        return load_calibrator(folder)


def calibrator_folder(path_or_repo_id: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder that holds the two calibrator files of a folder or, downloaded, of a Hub repo."""
    folder = Path(path_or_repo_id)
    if not folder.is_dir():
        folder = _download(str(path_or_repo_id), revision, token)
    for name in (JSON_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path_or_repo_id}: holds no {name}; save a calibrator there first")
    return folder


def write_calibrator(calibrator: Calibrator, folder: Path, **extra: Any) -> None:
    """Writes both files; `extra` keys (`applied`, `weights`) go into the JSON."""
    if calibrator.num_labels is None:
        raise ValueError(f"calibrator: got a {type(calibrator).__name__} that is not fitted; fit it first")
    names = calibrator.label_names
    if names is not None and not _are_names(names, calibrator.num_labels):
        raise ValueError(f"label_names: got {names!r}; allowed is a list of {calibrator.num_labels} strings")
    record = {
        "library": "hf_calib",
        "library_version": __version__,
        **describe_calibrator(calibrator),
        "label_names": names,
        "fit": calibrator.provenance,
        **extra,
    }
    record = json.loads(json.dumps(record))  # as it will be read: the keys of a dict are strings there
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in calibrator.tensors().items()}
    content = save(tensors, metadata={"format": "pt"})
    record["sha256"] = calibrator_sha256(record, content)
    text = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()  # may fail: no file is touched so far
    folder.mkdir(parents=True, exist_ok=True)
    _replace({folder / TENSORS_NAME: content, folder / JSON_NAME: text})


def calibrator_sha256(record: dict[str, Any], content: bytes) -> str:
    """Hash of both files: of all else that the JSON says, however it is laid out, and of the tensors' file."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode() + content).hexdigest()


def describe_calibrator(calibrator: Calibrator) -> dict[str, Any]:
    """What a calibrator is, without what was fitted: its type, its settings and, the same way, its members."""
    record = {"type": calibrator.name, "num_labels": calibrator.num_labels}
    if settings := calibrator.settings():
        record["settings"] = settings
    if len(calibrator.members):
        record["members"] = [describe_calibrator(member) for member in calibrator.members]
    return record


def build_calibrator(record: Any, path: Path, depth: int = 0) -> Calibrator:
    """The calibrator that `describe_calibrator` has described, with fresh state."""
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


def read_record(folder: Path) -> dict[str, Any]:
    """`calibrator.json`, checked: the keys this version needs are there and of the right kind."""
    path = folder / JSON_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError(TOO_DEEP.format(path)) from None
    if not isinstance(record, dict) or record.get("library") != "hf_calib":
        raise ValueError(f'{path}: not a calibrator of this library ("library" must be "hf_calib")')
    num_labels, names = build_calibrator(record, path).num_labels, record.get("label_names")
    if names is not None and not _are_names(names, num_labels):
        raise ValueError(f"{path}: label_names is no list of {num_labels} names")
    if not isinstance(record.get("fit") or {}, dict):
        raise ValueError(f"{path}: fit is {record['fit']!r}; allowed is an object")
    if unknown := sorted(set(record) - KNOWN_KEYS):
        version = record.get("library_version")
        warnings.warn(f"{path}: ignoring {', '.join(unknown)}, written by hf_calib {version}", stacklevel=4)
    return record


def load_calibrator(folder: Path) -> Calibrator:
    """The calibrator that the two files of a local folder describe; a ValueError where they do not agree."""
    record = read_record(folder)
    calibrator = build_calibrator(record, folder / JSON_NAME)
    path = folder / TENSORS_NAME
    content = path.read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if set(tensors) != set(calibrator.tensors()):
        raise ValueError(f"{path}: holds {sorted(tensors)}; {record['type']} needs {sorted(calibrator.tensors())}")
    fill_calibrator(calibrator, tensors, path)
    if record.get("sha256") != calibrator_sha256(record, content):
        if read_record(folder) != record:  # somebody has just saved another one
            return load_calibrator(folder)
        raise ValueError(f"{folder / JSON_NAME}: changed since it was saved, or {path.name} was; save it anew")
    calibrator.label_names = record.get("label_names")
    calibrator.provenance = record.get("fit") or {}
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


def weights_sha256(folder: Path) -> str | None:
    """One hash of the model weights in a folder: sha256 of its safetensors files, in order of name; None without."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != TENSORS_NAME)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(2**20), b""):
                digest.update(block)
    return digest.hexdigest() if files else None


def push_calibrator(calibrator: Calibrator, repo_id: str, *, private: bool | None, token: str | None) -> str:
    """Both files in one commit; returns its URL."""
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with TemporaryDirectory() as folder:
        write_calibrator(calibrator, Path(folder))
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Add {calibrator.name} calibrator"
        )
    return str(commit.commit_url)


def _are_names(names: Any, num_labels: int) -> bool:
    return isinstance(names, list) and len(names) == num_labels and all(isinstance(name, str) for name in names)


def _replace(contents: dict[Path, bytes]) -> None:
    """Writes files of one folder: all are complete before the first takes the place of an old one."""
    unfinished = {}
    try:
        for path, content in contents.items():
            handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
            unfinished[path] = Path(name)
            with open(handle, "wb") as file:
                file.write(content)
            unfinished[path].chmod(0o644)  # mkstemp's files are private
        for path, written in unfinished.items():
            os.replace(written, path)
    finally:
        for written in unfinished.values():
            written.unlink(missing_ok=True)


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
