"""Real English text that every installation already has: which library is this sentence from?

The rows are the first paragraphs of the docstrings of eight libraries. Their files are parsed, never imported or run,
and nothing is downloaded, so the data set can be built offline wherever `hf_calib` is installed.

What to know before reading scores on it: a sentence may name its own library, and is kept as it is (3 in 100 do);
and the rows follow the installed versions, so scores of two machines compare only where the versions agree.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import sysconfig
import tempfile
import tokenize
import warnings
from collections import Counter
from pathlib import Path


STANDARD_LIBRARY = "standard library"
# label, which is the name of the distribution too -> name to import
LIBRARIES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "scikit-learn": "sklearn",
    "torch": "torch",
    "transformers": "transformers",
    "matplotlib": "matplotlib",
    STANDARD_LIBRARY: None,
}
SPLIT_PERCENT = {"train": 60, "validation": 8, "calibration": 16, "test": 16}
MIN_ROWS_PER_CLASS = 20  # below it, eight per cent may be no row at all
FORMAT_VERSION = 1  # part of the cache key: raise it with every change of the rules below

TEST_FOLDERS = {"test", "tests", "_internal"}  # torch.testing._internal is what generates torch's tests
# Other people's code, whose sentences would carry the wrong label.
VENDORED_FOLDERS = {"site-packages", "dist-packages", "externals", "_vendor", "array_api_compat", "array_api_extra"}
# Parts of the standard library that are applications, tools or demonstrations.
APPLICATION_FOLDERS = {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
SKIPPED_FOLDERS = TEST_FOLDERS | VENDORED_FOLDERS | APPLICATION_FOLDERS | {"__pycache__"}
TEST_FILE = re.compile(r"test_.*\.py|.*_test\.py|conftest\.py")

HEADING_LINE = re.compile(r"[-=~^*#+]{3,}")  # the rule under "Parameters" and around titles
SIGNATURE = re.compile(r"[\w.]+(\(| \(`)")  # `dot(a, b)` and `size (`int`): ...` where a sentence should begin


def docstring_dataset(*, rows_per_class=1500, seed=0, cache_dir=None):
    """Docstring sentences of eight libraries, labelled with the library they come from.

    A sentence is the first paragraph of a docstring. Sentences that are equal once case, digits, spaces and
    punctuation are ignored count as one sentence: it appears once, in one split. One that was found in several
    libraries is left out of all of them, because it has no right label. The first call reads files until it has
    enough, which takes seconds; later calls load what it saved.

    Args:
        rows_per_class (`int`, at least 20): rows of each library, over all splits. A library that has fewer sentences
            gives all it has.
        seed (`int`): fixes which files are read, which sentences are taken and which split each is in. For the same
            installed versions the rows are the same, in the same order, on every run.
        cache_dir (`str` or `os.PathLike`, *optional*): folder that keeps the built data sets. The default is
            `hf_calib` in the Hugging Face cache.
    Returns:
        `datasets.DatasetDict` with the splits `"train"`, `"validation"`, `"calibration"` and `"test"` (60, 8, 16 and
        16 per cent of every class) and the columns `"text"` (string) and `"label"` (`ClassLabel` of the 8 names).
    Raises:
        ImportError: one of the libraries is not installed.
        ValueError: `rows_per_class` is below 20.
    """
    import datasets

    if rows_per_class < MIN_ROWS_PER_CLASS:
        raise ValueError(f"rows_per_class must be at least {MIN_ROWS_PER_CLASS}, got {rows_per_class}.")
    folders = library_folders()
    root = Path(datasets.config.HF_CACHE_HOME) / "hf_calib" if cache_dir is None else Path(cache_dir)
    path = root / f"docstrings-{_cache_key(rows_per_class, seed)}"
    if not path.exists():
        sentences = _read_sentences(folders, rows_per_class, seed)
        _publish(_make_dataset(split_sentences(sentences, rows_per_class, seed)), path)
    return datasets.DatasetDict.load_from_disk(str(path))


def library_folders():
    """Find where the libraries are installed, without importing them.

    Returns:
        `dict[str, Path]`: label to folder, in the order of the class numbers.
    Raises:
        ImportError: a library is not installed. The message names it.
    """
    folders = {}
    for label, name in LIBRARIES.items():
        if name is None:
            folders[label] = Path(sysconfig.get_path("stdlib"))
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            package = "hf_calib[plots]" if label == "matplotlib" else label
            raise ImportError(
                f"The docstring data set is made of {len(LIBRARIES)} libraries, and {label} is not installed: "
                f'pip install "{package}"'
            )
        folders[label] = Path(next(iter(spec.submodule_search_locations)))
    return folders


def collect_sentences(folder, *, enough, order):
    """Read a library's files in random order until enough different sentences are found.

    Args:
        folder (`Path`): the library.
        enough (`int`): no further file is opened once this many sentences are there.
        order (`random.Random`): gives the order. The same state gives the same order on every file system.
    Returns:
        `dict[str, str]`: folded form to the sentence as it was first met.
    """
    files = source_files(folder)
    order.shuffle(files)
    found = {}
    for file in files:
        if len(found) >= enough:
            break
        for docstring in read_docstrings(folder / file):
            sentence = first_paragraph(docstring)
            if is_sentence(sentence):
                found.setdefault(fold(sentence), sentence)
    return found


def source_files(folder):
    """List a library's own source files as sorted relative paths with forward slashes, tests left out."""
    files = []
    for parent, children, names in os.walk(folder):
        children[:] = [child for child in children if child not in SKIPPED_FOLDERS]
        sources = (name for name in names if name.endswith(".py") and not TEST_FILE.fullmatch(name))
        files += [Path(parent, name).relative_to(folder).as_posix() for name in sources]
    return sorted(files)


def read_docstrings(path):
    """Docstrings of a file's module, classes and functions. A file that cannot be read or parsed has none."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the invalid escapes of other people's code
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    docstrings, statements = [], [tree]
    while statements:
        statement = statements.pop()
        if isinstance(statement, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstrings.append(ast.get_docstring(statement))
        # Only statements hold definitions. `ast.walk` would also visit every expression, which are most of the nodes.
        for block in ("body", "orelse", "finalbody", "handlers"):
            children = getattr(statement, block, [])
            statements += children if isinstance(children, list) else []
    return [docstring for docstring in docstrings if docstring]


def first_paragraph(docstring):
    """Text up to the first blank line, with every run of white space made one space."""
    return " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())


def is_sentence(text):
    """Whether a paragraph reads like English: 25 to 300 printable ASCII characters, three words, mostly letters."""
    if not 25 <= len(text) <= 300 or not (text.isascii() and text.isprintable()):
        return False
    if HEADING_LINE.search(text) or SIGNATURE.match(text):
        return False
    letters_and_spaces = sum(character.isalpha() or character == " " for character in text)
    return len(re.findall(r"[A-Za-z]{2,}", text)) >= 3 and letters_and_spaces >= 0.75 * len(text)


def fold(text):
    """Letters only, in lower case: two sentences with the same folded form count as the same sentence."""
    return "".join(character for character in text.casefold() if character.isalpha())


def split_sentences(sentences, rows_per_class, seed):
    """Drop what occurs under several labels, and deal the rest into the splits, every class in the same proportions.

    Args:
        sentences (`dict[str, dict[str, str]]`): label to folded form to sentence.
        rows_per_class (`int`): at most this many sentences of each label are used.
        seed (`int`): fixes which sentences are used and where they go.
    Returns:
        `dict[str, list[tuple[str, str]]]`: split to shuffled rows of sentence and label.
    """
    times_found = Counter(folded for found in sentences.values() for folded in found)
    splits = {split: [] for split in SPLIT_PERCENT}
    for label, found in sentences.items():
        kept = [sentence for folded, sentence in found.items() if times_found[folded] == 1]
        random.Random(f"rows/{seed}/{label}").shuffle(kept)
        kept = kept[:rows_per_class]
        start, percent = 0, 0
        for split, share in SPLIT_PERCENT.items():
            percent += share
            end = len(kept) * percent // 100
            splits[split] += [(sentence, label) for sentence in kept[start:end]]
            start = end
    for split, rows in splits.items():
        random.Random(f"order/{seed}/{split}").shuffle(rows)
    return splits


def _read_sentences(folders, rows_per_class, seed):
    from datasets.utils import tqdm

    # About one sentence in a hundred is found in two libraries and dropped later.
    enough = rows_per_class + rows_per_class // 10 + 10
    return {
        label: collect_sentences(folder, enough=enough, order=random.Random(f"files/{seed}/{label}"))
        for label, folder in tqdm(folders.items(), desc="Reading docstrings", unit="library")
    }


def _make_dataset(splits):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LIBRARIES))})
    columns = {
        split: {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        for split, rows in splits.items()
    }
    return DatasetDict({split: Dataset.from_dict(values, features=features) for split, values in columns.items()})


def _cache_key(rows_per_class, seed):
    versions = {label: importlib.metadata.version(label) for label in LIBRARIES if label != STANDARD_LIBRARY}
    versions[STANDARD_LIBRARY] = platform.python_version()
    key = json.dumps([FORMAT_VERSION, rows_per_class, seed, versions], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _publish(dataset, path):
    """Save so that `path` is either complete or absent, also when the build is interrupted or runs twice at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as building:
        finished = Path(building) / path.name
        dataset.save_to_disk(str(finished))
        try:
            os.replace(finished, path)
        except OSError:
            if not path.exists():  # else another process has just published the same rows
                raise
