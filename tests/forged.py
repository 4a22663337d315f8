"""Calibrator files that were changed after they were saved: as they are left, or signed again as a forger would."""

import json

from safetensors.torch import load_file, save_file

from hf_calib.calibrators.storage import files_sha256


def change_json(folder, **changes):
    """Replaces keys; the checksum then no longer fits."""
    path = folder / "calibrator.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, **changes):
    """Replaces tensors; None takes one away."""
    path = folder / "calibrator.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, path)


def forge(folder, **changes):
    """Replaces keys as one who knows about the checksum."""
    change_json(folder, **changes)
    sign(folder)


def sign(folder):
    """Makes the checksum fit what the two files now hold."""
    record = json.loads((folder / "calibrator.json").read_text())
    content = (folder / "calibrator.safetensors").read_bytes()
    change_json(folder, sha256=files_sha256(record, content))
