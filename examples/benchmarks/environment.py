"""Where a result was made: what every result file says of its machine and its versions."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def environment(*packages: str) -> dict[str, dict[str, str | int | None]]:
    """The machine, and the versions of Python and of these packages."""
    return {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def write_result(path: Path, record: dict, *packages: str) -> None:
    """The record with its environment, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, **environment(*packages)}, indent=2) + "\n")
