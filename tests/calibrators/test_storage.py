"""Storage: two plain files, and a clear error for each way in which they can be wrong."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import safetensors
import torch

from hf_calib import AutoCalibrator, IsotonicCalibration, TemperatureScaling
from hf_calib.calibrators.storage import files_sha256
from hf_calib.version import __version__

from ..forged import change_json, change_tensors, forge


LOGITS = 3 * torch.eye(3).repeat(4, 1)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 2, 0])


@pytest.fixture
def folder(tmp_path):
    """What `save_pretrained` writes for a temperature."""
    calibrator = TemperatureScaling().fit(LOGITS, LABELS)
    calibrator.label_names = ["sad", "calm", "glad"]
    calibrator.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def isotonic(tmp_path):
    IsotonicCalibration().fit(LOGITS, LABELS).save_pretrained(tmp_path)
    return tmp_path


# -- what is written


def test_the_files_are_json_and_safetensors(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["calibrator.json", "calibrator.safetensors"]
    record = json.loads((folder / "calibrator.json").read_text(encoding="utf-8"))
    assert record.pop("sha256") == files_sha256(record, (folder / "calibrator.safetensors").read_bytes())
    assert record == {
        "library": "hf_calib",
        "library_version": __version__,
        "type": "temperature",
        "num_labels": 3,
        "label_names": ["sad", "calm", "glad"],
        "fit": {"rows": 12},
    }
    with safetensors.safe_open(folder / "calibrator.safetensors", "pt") as file:
        assert list(file.keys()) == ["temperature"]
        assert file.metadata() == {"format": "pt"}


def test_a_person_can_read_the_json(folder):
    assert '\n  "type": "temperature",\n' in (folder / "calibrator.json").read_text()


def test_names_keep_their_letters(folder):
    calibrator = AutoCalibrator.from_pretrained(folder)
    calibrator.label_names = ["traurig", "ruhig", "fröhlich"]
    calibrator.save_pretrained(folder)
    assert "fröhlich" in (folder / "calibrator.json").read_text(encoding="utf-8")
    assert AutoCalibrator.from_pretrained(folder).label_names == calibrator.label_names


def test_saving_replaces_what_was_there(folder):
    IsotonicCalibration().fit(LOGITS, LABELS).save_pretrained(str(folder))
    assert AutoCalibrator.from_pretrained(str(folder)).name == "isotonic"


@pytest.mark.parametrize(
    ("attribute", "value", "error", "message"),
    [
        (
            "label_names",
            ["sad", "glad"],
            ValueError,
            r"^label_names: got \['sad', 'glad'\]; allowed is a list of 3 str",
        ),
        ("label_names", [0, 1, 2], ValueError, r"^label_names: got \[0, 1, 2\]; allowed"),
        ("label_names", ["\ud800", "calm", "glad"], UnicodeEncodeError, "surrogates not allowed"),
        ("provenance", {"data": object()}, TypeError, "not JSON serializable"),
    ],
)
def test_a_failed_save_leaves_the_old_files(folder, attribute, value, error, message):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calibrator = TemperatureScaling().fit(2 * LOGITS, LABELS)
    setattr(calibrator, attribute, value)
    with pytest.raises(error, match=message):
        calibrator.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_reader_sees_a_half_written_file(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replaced = []

    def full_disk(source, target):
        if {path.name for path in folder.iterdir()} - set(before) != {source.name}:
            assert not replaced, "both are complete before one is replaced"
        replaced.append(target.name)
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        TemperatureScaling().fit(2 * LOGITS, LABELS).save_pretrained(folder)
    assert replaced
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_read_is_what_was_saved_whatever_keys_it_has(folder):
    calibrator = TemperatureScaling().fit(LOGITS, LABELS)
    calibrator.provenance |= {"per_class": {2: 0.5, 10: 0.1}, "other": {None: 1, "a": 2}}
    calibrator.save_pretrained(folder)
    assert AutoCalibrator.from_pretrained(folder).provenance["per_class"] == {"2": 0.5, "10": 0.1}


def test_a_reader_goes_on_to_the_calibrator_that_is_saved_meanwhile(folder, monkeypatch):
    real, newer = Path.read_bytes, TemperatureScaling().fit(2 * LOGITS, LABELS)

    def after_another_save(path):
        monkeypatch.setattr(Path, "read_bytes", real)
        newer.save_pretrained(folder)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", after_another_save)
    assert AutoCalibrator.from_pretrained(folder).temperature == newer.temperature


# -- what is read


def test_a_newer_file_loads_with_a_warning(folder):
    expected = AutoCalibrator.from_pretrained(folder)
    forge(folder, library_version="99.0", smoothing=0.1, mode="new")
    with pytest.warns(UserWarning, match=r"ignoring mode, smoothing, written by hf_calib 99\.0") as warned:
        loaded = AutoCalibrator.from_pretrained(folder)
    assert warned[0].filename == __file__
    assert torch.equal(loaded.temperature, expected.temperature)


def test_the_keys_of_a_model_beside_it_are_known(folder):
    forge(folder, applied="folded", weights={"fitted_on": "abc"})
    assert AutoCalibrator.from_pretrained(folder).name == "temperature"


@pytest.mark.parametrize("key", ["label_names", "fit", "library_version"])
def test_what_is_not_needed_may_be_missing(folder, key):
    forge(folder, **{key: None})
    assert AutoCalibrator.from_pretrained(folder).num_labels == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"library": "other"}, "not a calibrator of this library"),
        ({"library": None}, "not a calibrator of this library"),
        ({"type": "temprature"}, "type 'temprature' is unknown; allowed are identity, temperature"),
        ({"type": None}, "type None is unknown"),
        ({"type": ["temperature"]}, r"type \['temperature'\] is unknown"),
        ({"num_labels": None}, "num_labels is None"),
        ({"num_labels": "3"}, "num_labels is '3'"),
        ({"num_labels": 3.0}, r"num_labels is 3\.0"),
        ({"num_labels": True}, "num_labels is True"),
        ({"num_labels": 1, "label_names": None}, "num_labels is 1; allowed are integers from 2 up"),
        ({"num_labels": 4}, "label_names is no list of 4 names"),
        ({"label_names": ["sad", "glad"]}, "label_names is no list of 3 names"),
        ({"label_names": "abc"}, "label_names is no list of 3 names"),
        ({"label_names": [1, 2, 3]}, "label_names is no list of 3 names"),
        ({"fit": ["rows"]}, r"fit is \['rows'\]; allowed is an object"),
    ],
)
def test_wrong_json_values(folder, changes, message):
    change_json(folder, **changes)
    with pytest.raises(ValueError, match=rf"calibrator\.json: {message}"):
        AutoCalibrator.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"library": "hf_calib",', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "not a calibrator of this library"),
        (b"null", "not a calibrator of this library"),
    ],
)
def test_damaged_json(folder, content, message):
    (folder / "calibrator.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"calibrator\.json: {message}"):
        AutoCalibrator.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": torch.tensor(0.0)}, r"temperature is 0\.0; allowed is one number above 0"),
        ({"temperature": torch.tensor(-2.0)}, r"temperature is -2\.0; allowed is one number above 0"),
        ({"temperature": torch.tensor(torch.nan)}, "temperature is not a finite torch.float32 tensor"),
        ({"temperature": torch.tensor(torch.inf)}, "temperature is not a finite torch.float32 tensor"),
        ({"temperature": torch.tensor(2.0).half()}, "temperature is not a finite torch.float32 tensor"),
        ({"temperature": torch.tensor(2)}, "temperature is not a finite torch.float32 tensor"),
        ({"temperature": torch.tensor([2.0])}, r"temperature is \[2\.0\]; allowed is one number"),
        ({"temperature": None}, r"holds \[\]; temperature needs \['temperature'\]"),
        ({"bias": torch.zeros(3)}, r"holds \['bias', 'temperature'\]; temperature needs \['temperature'\]"),
    ],
)
def test_wrong_temperatures(folder, changes, message):
    change_tensors(folder, **changes)
    with pytest.raises(ValueError, match=rf"calibrator\.safetensors: {message}"):
        AutoCalibrator.from_pretrained(folder)


RISING = torch.tensor([0.1, 0.9], dtype=torch.float64).repeat(3, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": RISING[:2]}, r"thresholds and values have shapes \[\(3, 2\), \(2, 2\)\]"),
        ({"values": RISING[:2], "thresholds": RISING[:2]}, r"allowed are two of \(3, M\)"),
        ({"values": RISING[:, :1], "thresholds": RISING[:, :1]}, "M from 2 up"),
        ({"values": RISING[0], "thresholds": RISING[0]}, "thresholds and values have shapes"),
        ({"values": RISING.flip(-1)}, r"values do not rise within \[0, 1\]"),
        ({"thresholds": RISING.flip(-1)}, r"thresholds do not rise within \[0, 1\]"),
        ({"values": RISING + 0.2}, r"values do not rise within \[0, 1\]"),
        ({"values": RISING - 0.2}, r"values do not rise within \[0, 1\]"),
        ({"values": RISING.float()}, "values is not a finite torch.float64 tensor"),
        ({"values": RISING * torch.nan}, "values is not a finite torch.float64 tensor"),
        ({"values": None}, r"holds \['thresholds'\]; isotonic needs \['thresholds', 'values'\]"),
    ],
)
def test_wrong_isotonic_maps(isotonic, changes, message):
    change_tensors(isotonic, **{"thresholds": RISING, "values": RISING} | changes)
    with pytest.raises(ValueError, match=rf"calibrator\.safetensors: .*{message}"):
        AutoCalibrator.from_pretrained(isotonic)


def test_a_label_space_that_the_tensors_do_not_have(isotonic):
    change_json(isotonic, num_labels=5)
    with pytest.raises(ValueError, match=r"calibrator\.safetensors: .*allowed are two of \(5, M\)"):
        AutoCalibrator.from_pretrained(isotonic)


def test_files_of_two_calibrators(folder):
    change_json(folder, type="isotonic")
    with pytest.raises(ValueError, match=r"calibrator\.safetensors: holds \['temperature'\]; isotonic needs"):
        AutoCalibrator.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_truncated_tensors(folder, length):
    path = folder / "calibrator.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"calibrator\.safetensors: not a readable safetensors file"):
        AutoCalibrator.from_pretrained(folder)


FOREIGN = {
    "a pickle": pickle.dumps({"temperature": 2.0}),
    "a header of 10 GB": struct.pack("<Q", 10 * 2**30) + b"{}",
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_tensors(folder, content):
    (folder / "calibrator.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"calibrator\.safetensors: not a readable .*header too large"):
        AutoCalibrator.from_pretrained(folder)


CHAINS = '{"library": "hf_calib"' + ', "type": "chain", "num_labels": 3, "members": [{"type": "identity"' * 400


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"library": "hf_calib", "members": ' + "[" * 100_000, CHAINS + "}]" * 400 + "}"]
)
def test_deep_nesting(folder, text):
    (folder / "calibrator.json").write_text(text)
    with pytest.raises(ValueError, match=r"calibrator\.json: nested too deeply to be a calibrator"):
        AutoCalibrator.from_pretrained(folder)


def test_no_file_is_opened_that_the_json_names(folder):
    forge(folder, file="../../secret")
    with pytest.warns(UserWarning, match="ignoring file"):
        AutoCalibrator.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_json(folder, label_names=["glad", "calm", "sad"]),
        lambda folder: change_json(folder, applied="folded"),
        lambda folder: change_json(folder, sha256=None),
        lambda folder: change_tensors(folder, temperature=torch.tensor(2.0)),
    ],
)
def test_what_was_changed_is_refused_though_it_is_well_formed(folder, change):
    change(folder)
    with pytest.raises(ValueError, match=r"calibrator\.json: changed since it was saved, or calibrator\.safetensors"):
        AutoCalibrator.from_pretrained(folder)


def test_the_layout_of_the_json_is_free(folder):
    path = folder / "calibrator.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record, sort_keys=True, indent=7))
    assert AutoCalibrator.from_pretrained(folder).num_labels == 3


PAIR = {"type": "temperature", "num_labels": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": [PAIR]}, r"temperature has members of \[2\] labels; allowed are 0 of 0"),
        ({"type": "chain", "members": [PAIR]}, r"chain has members of \[2\] labels; allowed are 1 of 3"),
        ({"type": "one_vs_rest", "members": [PAIR]}, r"one_vs_rest has members of \[2\] labels; allowed are 3 of 2"),
        (
            {"settings": {"task": "multilabel"}, "num_labels": 10**12},
            r"temperature has members of \[\] labels; allowed are 10{12} of 1",
        ),
        ({"type": "chain", "members": ["temperature"]}, "a member is 'temperature'; allowed are objects"),
        (
            {"settings": {"task": "multilabel"}, "members": [{**PAIR, "num_labels": 1}] * 3},
            "num_labels is 1; allowed are integers from 2 up",
        ),
    ],
)
def test_wrong_members(folder, changes, message):
    change_json(folder, label_names=None, **changes)
    with pytest.raises(ValueError, match=rf"calibrator\.json: {message}"):
        AutoCalibrator.from_pretrained(folder)


@pytest.mark.parametrize("name", ["calibrator.json", "calibrator.safetensors"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder.name}: holds no {name}"):
        AutoCalibrator.from_pretrained(folder)


# -- the Hub


def hub_client():
    import os

    import pytest
    import torch
    from huggingface_hub import HfApi, constants

    from hf_calib import AutoCalibrator, IsotonicCalibration

    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 3, generator=generator), torch.arange(200) % 3
    calibrator = IsotonicCalibration().fit(logits, labels)
    calibrator.label_names = ["sad", "calm", "glad"]
    print(calibrator.push_to_hub("org/calibrator", private=True))
    first = HfApi().model_info("org/calibrator").sha

    def loads_equal(**options):
        loaded = AutoCalibrator.from_pretrained("org/calibrator", **options)
        assert torch.equal(loaded(logits), calibrator(logits))
        assert (loaded.label_names, loaded.provenance) == (calibrator.label_names, {"rows": 200})

    loads_equal()
    IsotonicCalibration().fit(2 * logits, labels.flip(0)).push_to_hub("org/calibrator")
    with pytest.raises(AssertionError):
        loads_equal()
    loads_equal(revision=first)

    with pytest.raises(FileNotFoundError, match=r"^org/missing: neither a folder nor a Hub repo"):
        AutoCalibrator.from_pretrained("org/missing")
    with pytest.raises(FileNotFoundError, match=r"^no/such/folder: neither a folder nor a Hub repo"):
        AutoCalibrator.from_pretrained("no/such/folder")
    HfApi().create_repo("org/empty")
    with pytest.raises(FileNotFoundError, match=r"^org/empty: the repo holds no calibrator\.json"):
        AutoCalibrator.from_pretrained("org/empty")

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    loads_equal(revision=first)  # from the cache
    with pytest.raises(FileNotFoundError, match=r"^org/elsewhere: .* the Hub is out of reach"):
        AutoCalibrator.from_pretrained("org/elsewhere")


def test_push_then_load_gives_equal_bits(loopback_hub, tmp_path):
    urls = loopback_hub.run(hub_client, tmp_path).split()
    assert loopback_hub.commits("org/calibrator") == ["Add isotonic calibrator"] * 2
    assert sorted(loopback_hub.files("org/calibrator")) == ["calibrator.json", "calibrator.safetensors"]
    assert len(urls) == 1
    assert urls[0].startswith(f"{loopback_hub.url}/org/calibrator/commit/")
