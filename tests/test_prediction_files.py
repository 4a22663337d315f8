"""Predictions in every kind of file, and one line for whatever is wrong with one."""

import json
import re
from zipfile import ZipFile

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hf_calib import prediction_files
from hf_calib.prediction_files import (
    SUFFIXES,
    count_rows,
    iterate_predictions,
    read_predictions,
)


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
    refused(path, r"predictions: cannot read .*: .* length: 3 vs 4")


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
    (".jsonl", b'{"probs": 0.5, "label": 1, "label": 0}\n'),
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


def small_blocks(monkeypatch, num_bytes=64):
    """Text files are read a few rows at a time."""
    monkeypatch.setattr(prediction_files, "BLOCK_BYTES", num_bytes)


def many(num_rows, num_labels=3, seed=0):
    """Rows of class probabilities that sum to 1 in float64, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(num_rows, num_labels, generator=generator, dtype=torch.float64).softmax(-1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


def columns_of(probs, labels, suffix):
    """A list column, or where the format has no lists, a column per class."""
    if suffix == ".csv":
        return {**{f"probs_{k}": probs[:, k].tolist() for k in range(probs.shape[1])}, "label": labels.tolist()}
    return {"probs": probs.tolist(), "label": labels.tolist()}


@settings(max_examples=25, deadline=None)
@given(
    suffix=st.sampled_from(SUFFIXES),
    num_rows=st.integers(1, 40),
    num_labels=st.integers(1, 5),
    batch_rows=st.one_of(st.none(), st.integers(1, 50)),
    block=st.integers(130, 400),
)
def test_batches_are_the_rows_in_their_order_however_they_are_cut(
    suffix, num_rows, num_labels, batch_rows, block, tmp_path_factory
):
    probs, labels = many(num_rows, num_labels)
    path = write(tmp_path_factory.mktemp("cut") / f"rows{suffix}", columns_of(probs, labels, suffix))
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch, block)
        batches = list(iterate_predictions(path, batch_rows=batch_rows))
    assert all(len(part) <= (batch_rows or num_rows) for part, _ in batches)
    assert torch.equal(torch.cat([part for part, _ in batches]), probs)
    assert torch.equal(torch.cat([part for _, part in batches]), labels)


@pytest.mark.parametrize("batch_rows", [0, -1, 1.5])
def test_a_batch_has_a_row_at_least(batch_rows, tmp_path):
    path = write(tmp_path / "rows.csv", {"probs": EVENTS, "label": HAPPENED})
    with pytest.raises(ValueError, match=f"batch_rows: got {batch_rows}; allowed are integers from 1 up"):
        next(iterate_predictions(path, batch_rows=batch_rows))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_text_comes_in_blocks(suffix, tmp_path, monkeypatch):
    small_blocks(monkeypatch, 400)
    path = write(tmp_path / f"rows{suffix}", columns_of(*many(40), suffix))
    assert len(list(iterate_predictions(path))) > 5


def test_wide_rows_come_in_fewer_at_a_time(tmp_path):
    probs, labels = many(5000, 1000)
    parquet.write_table(pa.table({"probs": list(probs.numpy()), "label": labels.numpy()}), tmp_path / "rows.parquet")
    np.savez(tmp_path / "rows.npz", probs=probs.numpy(), label=labels.numpy())
    for name in ("rows.parquet", "rows.npz"):
        sizes, before, held = [], pa.total_allocated_bytes(), 0
        for part, _ in iterate_predictions(tmp_path / name):
            sizes.append(len(part))
            held = max(held, pa.total_allocated_bytes() - before)
        assert sum(sizes) == 5000
        assert 1000 < max(sizes) <= 2**20 / 1000
        assert held < 24e6, "two batches of 8 MB, and not all 40 MB"


def test_spaces_in_a_csv_are_not_text(tmp_path):
    (tmp_path / "rows.csv").write_text("probs,label\n0.5, 1\n 0.25 ,0\n")
    assert [values.tolist() for values in read_predictions(tmp_path / "rows.csv")] == [[0.5, 0.25], [1, 0]]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_whole_numbers_first_and_fractions_later_are_one_column(suffix, tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    columns = {"probs": [0] * 30 + [0.5], "label": [1] * 30 + [0.0]}
    probs, labels = read_predictions(write(tmp_path / f"rows{suffix}", columns))
    assert probs.tolist() == [0.0] * 30 + [0.5]
    assert labels.tolist() == columns["label"]
    if suffix == ".jsonl":
        columns = {"probs": [[0, 1]] * 30 + [[0.5, 0.5]], "label": [1] * 31}
        assert read_predictions(write(tmp_path / "lists.jsonl", columns))[0][-1].tolist() == [0.5, 0.5]


LISTS = [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 3)]


@pytest.mark.parametrize("kind", LISTS, ids=["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_file_s_precision_is_kept(kind, dtype, tmp_path):
    value, path = getattr(pa, dtype)(), tmp_path / "rows.parquet"
    rows = [[np.dtype(dtype).type(value) for value in row] for row in PROBS]
    table = pa.table({"probs": pa.array(rows, kind(value)), "label": pa.array(LABELS, pa.uint8())})
    parquet.write_table(table, path, row_group_size=3)
    probs, labels = read_predictions(path)
    assert probs.dtype == getattr(torch, dtype)
    assert torch.equal(probs, torch.tensor(PROBS, dtype=probs.dtype))
    assert torch.equal(labels, torch.tensor(LABELS))


def test_columns_of_several_precisions_take_the_highest(tmp_path):
    table = pa.table({"probs_0": pa.array([0.5], pa.float32()), "probs_1": [0.5], "label": pa.array([0], pa.int8())})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert read_predictions(tmp_path / "rows.parquet")[0].dtype == torch.float64


def test_other_kinds_of_numbers_are_float64(tmp_path):
    for values in (pa.array([1, 0]), pa.array([True, False]), pa.array([1, 0], pa.decimal128(3, 1))):
        parquet.write_table(pa.table({"probs": values, "label": [1, 0]}), tmp_path / "rows.parquet")
        probs, _ = read_predictions(tmp_path / "rows.parquet")
        assert (probs.dtype, probs.tolist()) == (torch.float64, [1.0, 0.0])


def test_lists_of_lists_and_of_text_are_refused(tmp_path):
    for values in ([[[0.5], [0.5]]], [["a", "b"]]):
        parquet.write_table(pa.table({"probs": values, "label": [1]}), tmp_path / "rows.parquet")
        refused(tmp_path / "rows.parquet", r"'probs' is \[.* in row 0; allowed are numbers, or lists of them")
    parquet.write_table(pa.table({"probs": ["0.5"], "label": [1]}), tmp_path / "rows.parquet")
    refused(tmp_path / "rows.parquet", r"'probs' is '0.5' in row 0; allowed are numbers, or lists")
    np.savez(tmp_path / "deep.npz", probs=np.full((2, 2, 2), 0.5), label=[0, 1])
    refused(tmp_path / "deep.npz", r"'probs' is \[\[0.5, 0.5\], \[0.5, 0.5\]\] in row 0")


def test_a_long_list_is_not_shown_in_full(tmp_path):
    parquet.write_table(pa.table({"probs": [[0.5, 0.5], [0.001] * 1000], "label": [1, 0]}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="in row 1") as caught:
        read_predictions(tmp_path / "rows.parquet")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bad_cell_is_named_by_its_row_in_the_file(suffix, tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    monkeypatch.setattr(prediction_files, "BATCH_ROWS", 4)
    events, labels = [0.5] * 40, [1.0] * 29 + [0.5] + [0.0] * 10
    path = write(tmp_path / f"label{suffix}", {"probs": events, "label": labels})
    refused(path, r"'label' is 0\.5 in row 29; allowed are whole numbers")
    if suffix == ".csv":
        path = write(tmp_path / "text.csv", {"probs": [*events[:-3], "high", 0.5, 0.5], "label": [1] * 40})
        refused(path, r"'probs' is 'high' in row 37; allowed are numbers")
    elif suffix != ".npz":
        for wrong in ([1.0], None):
            lists = [[0.5, 0.5]] * 33 + [wrong] + [[0.5, 0.5]] * 6
            path = write(tmp_path / f"lists{suffix}", {"probs": lists, "label": [1] * 40})
            refused(path, rf"'probs' is {re.escape(str(wrong))} in row 33; .* equally long")


def test_all_rows_are_as_long_as_the_first_of_the_file(tmp_path):
    lists = [[0.5, 0.5]] * 4 + [[0.2, 0.3, 0.5]] * 4
    parquet.write_table(pa.table({"probs": lists, "label": [1] * 8}), tmp_path / "rows.parquet", row_group_size=4)
    with pytest.raises(ValueError, match=r"'probs' is \[0.2, 0.3, 0.5\] in row 4; .* equally long"):
        list(iterate_predictions(tmp_path / "rows.parquet", batch_rows=4))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_damage_in_the_middle_is_placed(suffix, tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    path = write(tmp_path / f"rows{suffix}", {"probs": EVENTS * 10, "label": LABELS * 10})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:30], lines[30] + ",]", *lines[31:]]))
    refused(path, rf"predictions: cannot read .*rows{suffix} from row (2\d|30) on: .")


def test_a_parquet_is_read_without_being_kept(tmp_path):
    """A single row group of 48 MB, of which a few megabytes are held at a time."""
    path, num_rows = tmp_path / "rows.parquet", 2_000_000
    events = np.random.default_rng(0).uniform(size=num_rows)
    label = np.random.default_rng(1).integers(0, 2, num_rows)
    table = pa.table({"probs": events, "label": label, "unused": events})
    parquet.write_table(table, path, row_group_size=num_rows, use_dictionary=False)
    del table
    before, held, read = pa.total_allocated_bytes(), 0, 0
    for probs, _ in iterate_predictions(path):
        held, read = max(held, pa.total_allocated_bytes() - before), read + len(probs)
    assert read == count_rows(path) == num_rows
    assert held < 12e6
    assert path.stat().st_size > 32e6


def test_only_parquet_knows_its_rows(tmp_path):
    for suffix in SUFFIXES:
        path = write(tmp_path / f"rows{suffix}", {"probs": EVENTS, "label": HAPPENED})
        assert count_rows(path) == (4 if suffix == ".parquet" else None)
    for name, message in (("none.parquet", "there is no file"), ("damaged.parquet", "cannot read")):
        (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            count_rows(tmp_path / name)
