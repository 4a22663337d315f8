"""Folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .calibrators.storage import JSON_NAME, TENSORS_NAME


ADAPTER_CONFIG = "adapter_config.json"
CONFIGS = ("config.json", ADAPTER_CONFIG)
# What belongs to the model that is replaced, and must not lie beside the new one
REPLACED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    *CONFIGS,
    JSON_NAME,
    TENSORS_NAME,
)
AT_CWD = -100  # of Linux's renameat2: paths are relative to the working directory
EXCHANGE = 2  # the flag of Linux's renameat2 and of macOS's renamex_np


def check_new_folder(name: str, path: Path) -> None:
    """Raises a FileExistsError naming the argument if something would be overwritten or is in the way."""
    for parent in path.parents:
        if parent.is_file():
            raise FileExistsError(f"{name}: {parent} is a file; allowed are a new folder or an empty one")
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{name}: {path} exists already; allowed are a new folder or an empty one")


def check_replaceable(name: str, path: Path) -> None:
    """Raises a FileExistsError naming the argument if what would be replaced is not a model."""
    if not any((path / config).is_file() for config in CONFIGS):
        check_new_folder(name, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which then becomes `path`; if that fails, or the process is killed, nothing has changed.

    What `path` held of a model is replaced, and its other files stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's folders are private
        yield partial
        if path.is_dir() and any(path.iterdir()):
            _keep_others(path, partial)
            _exchange(partial, path)
        else:
            os.replace(partial, path)  # renaming onto an empty folder replaces it
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # half of the new one, or the old one


def _keep_others(old: Path, new: Path) -> None:
    """Links, or copies, into the new folder what the old one has beside a model."""
    for entry in old.iterdir():
        if (new / entry.name).exists() or any(entry.match(pattern) for pattern in REPLACED):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders: at once where the system can, and elsewhere by renames, with nothing there in between."""
    if not _exchanged_at_once(one, other):
        aside = one.with_name(one.name + "-old")
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)


def _exchanged_at_once(one: Path, other: Path) -> bool:
    names = os.fsencode(one), os.fsencode(other)
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return library.renameat2(AT_CWD, names[0], AT_CWD, names[1], EXCHANGE) == 0
    return hasattr(library, "renamex_np") and library.renamex_np(*names, EXCHANGE) == 0
