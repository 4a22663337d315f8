"""Predictions in every kind of file, and one line for whatever is wrong with one."""

import json
import re
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_calib.prediction_files import SUFFIXES, read_predictions


PROBS = [[0.7, 0.2, 0.1], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0], [0.05, 0.9, 0.05]]
LABELS = [0, 2, 0, 1]
EVENTS, HAPPENED = [0.9, 0.2, 1.0, 0.0], [True, False, True, False]
LISTED = {"probs": PROBS, "label": LABELS}
NUMBERED = {"label": LABELS, **{f"probs_{k}": [row[k] for row in PROBS] for k in (2, 0, 1)}}


def write(path, columns):
    """The columns in the format that the path's suffix names."""
    if path.suffix == ".npz":
        np.savez(path, **{name: np.array(values) for name, values in columns.items()})
    elif path.suffix == ".jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        Dataset.from_dict(columns).to_parquet(path)
    else:
        lines = [columns, *zip(*columns.values(), strict=True)]
        path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return path


def has_lists(columns):
    return any(isinstance(values[0], list) for values in columns.values())


KINDS = [(suffix, columns) for suffix in SUFFIXES for columns in (LISTED, NUMBERED) if not (
    suffix == ".csv" and has_lists(columns))]  # fmt: skip


@pytest.mark.parametrize(("suffix", "columns"), KINDS)
def test_class_probabilities_come_back(suffix, columns, tmp_path):
    probs, labels = read_predictions(write(tmp_path / f"rows{suffix}", columns))
    assert torch.equal(probs, torch.tensor(PROBS, dtype=torch.float64))
    assert torch.equal(labels, torch.tensor(LABELS))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("happened", [HAPPENED, [int(value) for value in HAPPENED], [float(x) for x in HAPPENED]])
def test_event_probabilities_come_back(suffix, happened, tmp_path):
    path = write(tmp_path / f"rows{suffix}", {"confidence": EVENTS, "correct": happened})
    probs, labels = read_predictions(str(path), probs_column="confidence", label_column="correct")
    assert torch.equal(probs, torch.tensor(EVENTS, dtype=torch.float64))
    assert torch.equal(labels, torch.tensor([1, 0, 1, 0]))


def test_more_than_ten_classes_keep_their_order(tmp_path):
    columns = {f"p_{k}": [k / 66] for k in range(12)}
    probs, _ = read_predictions(write(tmp_path / "rows.csv", {**columns, "label": [11]}), probs_column="p")
    assert torch.equal(probs, torch.arange(12, dtype=torch.float64)[None] / 66)


def refused(path, message, error=ValueError, **columns):
    with pytest.raises(error, match=message) as caught:
        read_predictions(path, **columns)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_columns_are_named(suffix, tmp_path):
    path = write(tmp_path / f"rows{suffix}", {"probs": EVENTS, "label": LABELS})
    refused(path, r"column: .* has no 'target'; it has probs, label", label_column="target")
    refused(path, r"column: .* has no 'p'; it has probs, label", probs_column="p")
    gap = write(tmp_path / f"gap{suffix}", {"probs_0": EVENTS, "probs_2": EVENTS, "label": LABELS})
    refused(gap, r"column: .* has no 'probs_1'; it has probs_0, probs_2, label")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("label", ["glad", 1.5])
def test_labels_that_are_no_whole_numbers_are_refused(suffix, label, tmp_path):
    path = write(tmp_path / f"rows{suffix}", {"probs": EVENTS, "label": [label] * 4})
    refused(path, rf"predictions: .*rows{suffix}: 'label' is {label!r} in row 0; allowed are whole numbers")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_gaps_and_ragged_rows_are_refused(suffix, tmp_path):
    refused(
        write(tmp_path / f"gap{suffix}", {"probs": EVENTS, "label": [1, 0, None, 1]}), "predictions: .*'label' is nan"
    )
    for row in ([1.0], None):
        path = write(tmp_path / f"ragged{suffix}", {"probs": [[0.5, 0.5], row], "label": [0, 0]})
        refused(path, rf"predictions: .*: 'probs' is {re.escape(str(row))} in row 1; .* lists .* equally long")


def test_a_gap_or_an_infinite_label_in_other_files_is_refused(tmp_path):
    (tmp_path / "gap.csv").write_text("probs,label\n0.5,1\n0.5,\n")
    refused(tmp_path / "gap.csv", "predictions: .*'label' is nan in row 1; allowed are whole numbers")
    infinite = write(tmp_path / "inf.npz", {"probs": EVENTS, "label": [0.0, 1.0, np.inf, 1.0]})
    refused(infinite, "predictions: .*'label' is inf in row 2; allowed are whole numbers")


def test_a_list_in_a_csv_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "rows.csv").write_text('probs,label\n"[0.5, 0.5]",1\n')
    refused(tmp_path / "rows.csv", r"predictions: .* a CSV cannot hold lists, use columns probs_0, probs_1, \.\.\. or")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_probabilities_that_are_text_are_refused(suffix, tmp_path):
    path = write(tmp_path / f"rows{suffix}", {"probs_0": EVENTS, "probs_1": ["high"] * 4, "label": LABELS})
    refused(path, r"predictions: .*: 'probs_1' is 'high' in row 0; allowed are numbers")


def test_classes_of_unequal_length_are_refused(tmp_path):
    path = write(tmp_path / "rows.npz", {"probs_0": EVENTS, "probs_1": EVENTS[1:], "label": LABELS})
    refused(path, r"predictions: .*: probs_0, probs_1, \.\.\. have \[3, 4\] rows")


EMPTY = [
    *((suffix, b"") for suffix in SUFFIXES),
    (".csv", b"probs,label"),
    (".csv", b"probs,label\n\n"),
    (".jsonl", b"\n"),
]


@pytest.mark.parametrize(("suffix", "content"), EMPTY)
def test_a_file_without_rows_is_refused(suffix, content, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    refused(path, rf"^predictions: .*rows{suffix} holds no rows$")


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_columns_without_rows_are_refused(suffix, tmp_path):
    refused(write(tmp_path / f"rows{suffix}", {"probs": [], "label": []}), r"^predictions: .* holds no rows$")


DAMAGED = [
    *((suffix, b"PK\x03\x04 is how a zip file begins\n\n") for suffix in (".parquet", ".jsonl", ".npz")),
    *((suffix, b'{"no": \xff') for suffix in (".parquet", ".jsonl", ".npz")),
    (".csv", b"probs,label\n0.5,1\n0.5,1,2\n"),
    (".csv", b"label,label\n1,1\n"),
    (".jsonl", b'{"probs": 0.5, "label": 1}\n{"probs": 0.5, "la'),
    (".jsonl", b'{"probs": 0.5, "label": 1}\n[0.5, 1]\n'),
]


@pytest.mark.parametrize(("suffix", "content"), DAMAGED)
def test_damaged_files_are_refused(suffix, content, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    refused(path, rf"^predictions: cannot read .*rows{suffix}: .")


def test_a_parquet_with_damaged_pages_is_refused(tmp_path):
    path = write(tmp_path / "rows.parquet", {"probs": EVENTS, "label": LABELS})
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 20 + whole[24:])
    refused(path, r"^predictions: cannot read .*rows\.parquet: .")  # pyarrow's message has two lines


def test_an_archive_with_a_damaged_array_is_refused(tmp_path):
    for header in (b"{'descr': (" + b" " * 5, b"\x00" * 16):  # NumPy raises no ValueError for the first
        with ZipFile(tmp_path / "rows.npz", "w") as archive:
            archive.writestr("probs.npy", b"\x93NUMPY\x01\x00\x10\x00" + header)
        refused(tmp_path / "rows.npz", r"^predictions: cannot read .*rows\.npz: .")


def test_an_array_that_is_no_archive_and_one_of_objects_are_refused(tmp_path):
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    refused(tmp_path / "array.npz", "predictions: cannot read .*: it is a single array")
    objects = write(tmp_path / "objects.npz", {"probs": np.array([{}]), "label": [0]})
    refused(objects, "predictions: cannot read .*: Object arrays cannot be loaded")
    for single in ({"probs": "high", "label": 0}, {"probs": 0.5, "label": "high"}):  # arrays without dimensions
        refused(write(tmp_path / "single.npz", single), "predictions: .* is 'high' in row 0")


def test_other_files_and_missing_ones_are_refused(tmp_path):
    refused(
        tmp_path / "rows.xlsx", r"predictions: got .*rows\.xlsx; allowed are \.parquet, \.csv, \.jsonl, \.npz files"
    )
    refused(tmp_path / "rows.csv", r"predictions: there is no file .*rows\.csv", FileNotFoundError)
