"""Mutated calibrator files: each is refused by a ValueError or works; as it was saved, no change is accepted."""

import contextlib
import json
import random
import warnings

import pytest
import torch

from hf_calib import AutoCalibrator
from hf_calib.calibrators import CALIBRATORS, Chain, OneVsRest
from hf_calib.calibrators.registry import COMPOSED

from ..forged import sign


ROUNDS = 400
LOGITS = torch.tensor([[1.0, 2, 0], [3, -1, 1], [0, 0, 4], [2, 1, 0], [-1, 2, 2], [0, 3, 1]])
LABELS = torch.tensor([1, 0, 2, 1, 2, 0])
SAVED = {
    "a matrix": CALIBRATORS["matrix"](),
    "a histogram": CALIBRATORS["histogram"](num_bins=3),
    "a chain": Chain([CALIBRATORS["temperature"](), OneVsRest(CALIBRATORS["beta"]())]),
}
VALUES = [
    *(None, True, -1, 0, 2, 10**12, 1e400, -0.5, "", "a", "../../x", "\ud800", [], {}, [[]], {"type": "identity"}),
    *("binary", "multilabel", *CALIBRATORS, *COMPOSED),
]


def parts_of(value, path=()):
    """The path of each value within a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from parts_of(item, (*path, key))


def mutate_json(content, dice):
    """Replaces, removes, doubles or moves one value of the document."""
    record = json.loads(content)
    *way, key = dice.choice([path for path in parts_of(record) if path])
    place = record
    for step in way:
        place = place[step]
    action = dice.choice(["replace", "remove", "repeat", "swap"])
    if action == "remove":
        del place[key]
    elif action == "repeat" and isinstance(place, list):
        place.insert(key, place[key])
    elif action == "swap" and isinstance(place, dict):
        other = dice.choice(list(place))
        place[key], place[other] = place[other], place[key]
    else:
        place[key] = dice.choice(VALUES)
    return json.dumps(record).encode()


def mutate_bytes(content, dice):
    """Flips, cuts, inserts or repeats bytes."""
    start = dice.randrange(len(content))
    end = min(len(content), start + dice.choice([1, 1, 2, 8, 64]))
    flipped, repeated = bytes([content[start] ^ 1 << dice.randrange(8)]), content[start:end] * 2
    return content[:start] + dice.choice([b"", flipped, repeated, dice.randbytes(end - start)]) + content[end:]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of unknown keys, and of a fit on six rows
@pytest.mark.parametrize("name", SAVED)
def test_no_mutation_crashes_or_is_taken_silently(name, tmp_path):
    calibrator = SAVED[name].fit(LOGITS, LABELS)
    calibrator.label_names = ["sad", "calm", "glad"]
    calibrator.save_pretrained(tmp_path)
    saved = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    described, outcomes, dice = json.loads(saved[tmp_path / "calibrator.json"]), set(), random.Random(0)
    for _ in range(ROUNDS):
        for path, content in saved.items():
            path.write_bytes(content)
        path = dice.choice(list(saved))
        mutate = mutate_json if path.suffix == ".json" and dice.random() < 0.7 else mutate_bytes
        path.write_bytes(mutate(saved[path], dice))
        outcomes.add(as_saved(tmp_path, saved, described))
        outcomes.add(signed_again(tmp_path))
    assert outcomes == {"unchanged", "refused as saved", "works", "refused though signed"}


def as_saved(folder, saved, described):
    """Loaded only if it says the same as before."""
    try:
        AutoCalibrator.from_pretrained(folder)
    except ValueError:
        return "refused as saved"
    tensors = folder / "calibrator.safetensors"
    found = json.loads((folder / "calibrator.json").read_bytes()), tensors.read_bytes()
    assert found == (described, saved[tensors])
    return "unchanged"


def signed_again(folder):
    """By someone who knows how: what loads then calibrates logits of as many classes as it says."""
    with contextlib.suppress(ValueError, AttributeError):  # no JSON object
        sign(folder)
    try:
        calibrator = AutoCalibrator.from_pretrained(folder)
    except ValueError:
        return "refused though signed"
    if calibrator.task is None and calibrator.num_labels == 3 and not calibrator.needs_groups:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not calibrator.log_probs(LOGITS).isnan().any()
    return "works"
