"""The data set of docstring sentences: what counts as a sentence, and what no split may share with another."""

import importlib.metadata
import importlib.util
import os
import random
import subprocess
import sys
from collections import Counter

import datasets
import pytest

from hf_calib import docstrings
from hf_calib.docstrings import (
    LIBRARIES,
    SPLIT_PERCENT,
    collect_sentences,
    docstring_dataset,
    first_paragraph,
    fold,
    is_sentence,
    read_docstrings,
    source_files,
    split_sentences,
)


MODULE = '''
"""First line of the module,
   continued here.

Second paragraph."""

if True:
    class Outer:
        """A class inside a condition."""

        def method(self):
            """A method \\d with an invalid escape."""
            def inner():
                """A function inside a method."""

try:
    pass
except ValueError:
    async def handler():
        """A coroutine inside an except block."""

def silent():
    return """A string that is no docstring."""
'''


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_library(folder, word, num_files=12):
    letters = "abcdefghijklmnopqrstuvwxyz"
    for i in range(num_files):
        functions = [
            f'def f{j}():\n    """Return the {word} of every {letters[i]}{letters[j]} element."""\n' for j in range(5)
        ]
        write(folder / f"part{i % 3}" / f"file{i}.py", "\n".join(functions))


@pytest.fixture
def fake_libraries(tmp_path, monkeypatch):
    words = ["mean", "sum", "product", "maximum", "norm", "range", "order", "name"]
    folders = {label: tmp_path / "installed" / word for label, word in zip(LIBRARIES, words, strict=True)}
    for folder in folders.values():
        write_library(folder, folder.name)
    monkeypatch.setattr(docstrings, "library_folders", lambda: folders)
    return folders


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def real(real_cache):
    return docstring_dataset(rows_per_class=30, seed=0, cache_dir=real_cache)


def refuse(*args, **kwargs):
    raise AssertionError("a file was parsed")


class TestReading:
    def test_finds_every_docstring_and_warns_of_nothing(self, tmp_path):
        write(tmp_path / "module.py", MODULE)
        assert sorted(first_paragraph(text) for text in read_docstrings(tmp_path / "module.py")) == [
            "A class inside a condition.",
            "A coroutine inside an except block.",
            "A function inside a method.",
            "A method \\d with an invalid escape.",
            "First line of the module, continued here.",
        ]

    @pytest.mark.parametrize(
        "source",
        [
            b'"""Python 2."""\nprint "hello"\n',
            b"# -*- coding: no-such-codec -*-\n",
            b'"""Text."""\n\n\n# \xff\xfe\n',
            b"x = 1\0\n",
        ],
        ids=["syntax", "cookie", "encoding", "null byte"],
    )
    def test_skips_a_file_that_does_not_parse(self, tmp_path, source):
        (tmp_path / "odd.py").write_bytes(source)
        assert read_docstrings(tmp_path / "odd.py") == []

    def test_skips_a_file_that_is_gone(self, tmp_path):
        assert read_docstrings(tmp_path / "gone.py") == []

    def test_reads_the_encoding_that_a_file_declares(self, tmp_path):
        (tmp_path / "latin.py").write_bytes('# -*- coding: latin-1 -*-\n"""Größe"""\n'.encode("latin-1"))
        assert read_docstrings(tmp_path / "latin.py") == ["Größe"]

    def test_leaves_out_tests_and_the_code_of_others(self, tmp_path):
        kept = ["a.py", "core/b.py", "core/contest.py"]
        left_out = [
            "core/tests/c.py",
            "test/d.py",
            "core/test_b.py",
            "core/b_test.py",
            "conftest.py",
            "site-packages/numpy/e.py",
            "externals/f.py",
            "idlelib/g.py",
            "core/data.txt",
        ]
        for name in kept + left_out:
            write(tmp_path / name, "")
        assert source_files(tmp_path) == kept

    def test_does_not_depend_on_the_order_of_the_file_system(self, tmp_path, monkeypatch):
        write_library(tmp_path, "mean")
        expected = collect_sentences(tmp_path, enough=20, order=random.Random(0))
        walk = os.walk

        def walk_backwards(folder):
            for parent, children, names in walk(folder):
                children.reverse()
                yield parent, children, names[::-1]

        monkeypatch.setattr(os, "walk", walk_backwards)
        assert list(collect_sentences(tmp_path, enough=20, order=random.Random(0)).items()) == list(expected.items())

    def test_keeps_near_duplicates_once(self, tmp_path):
        write(tmp_path / "a.py", '"""Return the mean of 2 arrays."""')
        write(tmp_path / "b.py", '"""return the MEAN, of arrays"""')
        assert list(collect_sentences(tmp_path, enough=9, order=random.Random(0))) == ["returnthemeanofarrays"]

    def test_opens_no_file_more_than_it_needs(self, tmp_path):
        write_library(tmp_path, "mean")  # five sentences a file
        assert len(collect_sentences(tmp_path, enough=11, order=random.Random(0))) == 15


class TestSentences:
    @pytest.mark.parametrize(
        "text",
        ["Return the mean of the array.", "Compute `X @ w` for every row of *X*.", "sort a list (stable) in place"],
    )
    def test_keeps(self, text):
        assert is_sentence(text)

    @pytest.mark.parametrize(
        "text",
        [
            "Return the mean.",
            "Return the mean " * 20,
            "Return the größte element of all.",
            "Return the \x00 element of an array.",
            "Parameters ---------- values : the array of numbers",
            "reshape(shape, order, copy) returns a new array",
            "num_queries (`int`, *optional*): Number of queries",
            "Multidimensional interpolation.",
            "the sum of 1.25e-12 + (3.75e+24) * 4.5e-678",
        ],
        ids=["short", "long", "not ASCII", "control", "heading", "signature", "argument", "two words", "formula"],
    )
    def test_leaves_out(self, text):
        assert not is_sentence(text)

    def test_folds_case_digits_spaces_and_punctuation(self):
        assert fold("The `k-Means` of 2 arrays.") == fold("the kmeans of 10   ARRAYS") == "thekmeansofarrays"
        assert fold("the mean of arrays") != fold("the mean of an array")


class TestSplitting:
    def sentences(self, **counts):
        return {
            label: {f"{label}{i}": f"{label.upper()} {i}" for i in range(count)} for label, count in counts.items()
        }

    def test_every_class_has_the_same_proportions(self):
        splits = split_sentences(self.sentences(a=250, b=90), 200, seed=0)
        sizes = {split: Counter(label for _, label in rows) for split, rows in splits.items()}
        assert sizes["train"] == {"a": 120, "b": 54}
        assert {split: size["a"] for split, size in sizes.items()} == {
            "train": 120,
            "validation": 16,
            "calibration": 32,
            "test": 32,
        }
        assert sum(size["b"] for size in sizes.values()) == 90  # a small library gives all it has
        rows = [row for rows in splits.values() for row in rows]
        assert len(set(rows)) == len(rows) == 290

    def test_a_sentence_of_two_labels_has_none(self):
        sentences = self.sentences(a=100, b=100)
        sentences["b"] |= {"a7": "A! 7", "a8": "A! 8"}
        texts = [text for rows in split_sentences(sentences, 200, seed=0).values() for text, _ in rows]
        assert len(texts) == 198
        assert not {"A 7", "A! 7", "A 8", "A! 8"} & set(texts)

    def test_the_classes_are_mixed(self):
        rows = split_sentences(self.sentences(a=100, b=100), 100, seed=0)["train"]
        assert {label for _, label in rows[:20]} == {"a", "b"}


class TestDataset:
    def test_columns_and_labels(self, real):
        assert list(real) == ["train", "validation", "calibration", "test"] == list(SPLIT_PERCENT)
        for split in real.values():
            assert split.features == {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=list(LIBRARIES)),
            }
        names = real["train"].features["label"].names
        assert names[3] == "scikit-learn"
        assert names[-1] == "standard library"

    def test_stratified(self, real):
        for split, size in {"train": 18, "validation": 2, "calibration": 5, "test": 5}.items():
            assert Counter(real[split]["label"]) == dict.fromkeys(range(8), size)

    def test_no_sentence_twice(self, real):
        texts = [text for split in real.values() for text in split["text"]]
        assert len({fold(text) for text in texts}) == len(texts) == 240
        assert all(is_sentence(text) for text in texts)

    def test_the_label_is_the_library_that_has_the_sentence(self, real):
        label = real["train"].features["label"].str2int("scikit-learn")
        text = next(row["text"] for row in real["train"] if row["label"] == label)
        folder = docstrings.library_folders()["scikit-learn"]
        assert folder.name == "sklearn"
        assert fold(text) in collect_sentences(folder, enough=10**9, order=random.Random(1))

    def test_the_seed_fixes_the_rows(self, real, tmp_path, monkeypatch):
        again = docstring_dataset(rows_per_class=30, seed=0, cache_dir=tmp_path)
        other = docstring_dataset(rows_per_class=30, seed=1, cache_dir=tmp_path)
        for split in real:
            assert again[split].to_list() == real[split].to_list()
            assert other[split].to_list() != real[split].to_list()

    def test_too_few_rows_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="rows_per_class must be at least 20, got 19"):
            docstring_dataset(rows_per_class=19, cache_dir=tmp_path)


class TestCache:
    def test_second_call_parses_nothing(self, real, real_cache, monkeypatch):
        monkeypatch.setattr(docstrings, "read_docstrings", refuse)
        again = docstring_dataset(rows_per_class=30, seed=0, cache_dir=real_cache)
        assert {split: rows.to_list() for split, rows in again.items()} == {
            split: rows.to_list() for split, rows in real.items()
        }

    @pytest.mark.parametrize("change", ["rows_per_class", "seed", "version", "python", "format"])
    def test_is_read_only_for_the_same_request(self, real, real_cache, monkeypatch, change):
        request = {"rows_per_class": 30, "seed": 0}
        if change in request:
            request[change] += 1
        elif change == "version":
            version = importlib.metadata.version
            monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "torch" else version(name))
        elif change == "python":
            monkeypatch.setattr(docstrings.platform, "python_version", lambda: "3.0")
        else:
            monkeypatch.setattr(docstrings, "FORMAT_VERSION", 0)
        monkeypatch.setattr(docstrings, "read_docstrings", refuse)
        with pytest.raises(AssertionError, match="a file was parsed"):
            docstring_dataset(**request, cache_dir=real_cache)

    def test_default_folder_is_in_the_hugging_face_cache(self, fake_libraries, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "home"))
        docstring_dataset(rows_per_class=20)
        assert len(list((tmp_path / "home" / "hf_calib").iterdir())) == 1

    def test_an_interrupted_build_leaves_nothing(self, fake_libraries, tmp_path, monkeypatch):
        cache = tmp_path / "cache"
        save_to_disk = datasets.DatasetDict.save_to_disk

        def interrupted(self, path):
            save_to_disk(self, path)
            assert list(cache.iterdir())
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(datasets.DatasetDict, "save_to_disk", interrupted)
            with pytest.raises(KeyboardInterrupt):
                docstring_dataset(rows_per_class=20, cache_dir=cache)
        assert list(cache.iterdir()) == []
        assert docstring_dataset(rows_per_class=20, cache_dir=cache)["train"].num_rows == 8 * 12

    def test_two_builds_at_once_both_succeed(self, fake_libraries, tmp_path, monkeypatch):
        save_to_disk = datasets.DatasetDict.save_to_disk

        def overtaken(self, path):
            monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", save_to_disk)
            docstring_dataset(rows_per_class=20, cache_dir=tmp_path / "cache")
            save_to_disk(self, path)

        monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", overtaken)
        assert docstring_dataset(rows_per_class=20, cache_dir=tmp_path / "cache")["train"].num_rows == 8 * 12
        assert len(list((tmp_path / "cache").iterdir())) == 1


class TestLibraries:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("matplotlib", r'matplotlib is not installed: pip install "hf_calib\[plots\]"'),
            ("sklearn", "scikit-learn is"),
        ],
    )
    def test_a_missing_library_is_named(self, tmp_path, monkeypatch, name, message):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else find_spec(wanted))
        with pytest.raises(ImportError, match=message):
            docstring_dataset(rows_per_class=20, cache_dir=tmp_path)

    def test_libraries_are_found_without_importing_them(self):
        code = (
            "import sys; from hf_calib import docstrings; folders = docstrings.library_folders(); "
            "assert all(folder.is_dir() for folder in folders.values()); "
            "assert not {'datasets', 'matplotlib'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
