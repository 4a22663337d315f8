"""A calibrator's two files: `calibrator.json` says what it is, `calibrator.safetensors` holds its tensors."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..version import __version__


JSON_NAME = "calibrator.json"
TENSORS_NAME = "calibrator.safetensors"


def write_files(folder: Path, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Writes a calibrator's `record()` and `tensors()`, and that this version of the library wrote them."""
    record = {"library": "hf_calib", "library_version": __version__, **record}
    record = json.loads(json.dumps(record))  # as it will be read: the keys of a dict are strings there
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = save(tensors, metadata={"format": "pt"})
    record["sha256"] = files_sha256(record, content)
    text = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()  # may fail: no file is touched so far
    folder.mkdir(parents=True, exist_ok=True)
    _replace({folder / TENSORS_NAME: content, folder / JSON_NAME: text})


def files_sha256(record: dict[str, Any], content: bytes) -> str:
    """Hash of both files: of all else that the JSON says, however it is laid out, and of the tensors' file."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode() + content).hexdigest()


def weights_sha256(folder: Path) -> str | None:
    """One hash of the model weights in a folder: sha256 of its safetensors files, in order of name; None without."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != TENSORS_NAME)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(2**20), b""):
                digest.update(block)
    return digest.hexdigest() if files else None


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
