"""Imports go only downward: every module of the package stands on a floor and may not import one above it."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_calib


PACKAGE = Path(hf_calib.__file__).parent
FLOORS = (
    {"distributed", "functional", "version"},
    {"calibrators", "losses", "metrics"},
    {"card_text", "model_card", "plots", "report"},
    {
        "attaching", "calibrate", "docstrings", "evaluate_modules", "evaluation", "folders", "folding",
        "generation", "hub",
        "measuring", "models", "pipelines", "prediction_files", "predictions", "probing",
        "publishing", "training",
    },
    {"cli", "cli_sources", "console", "demo"},
)  # fmt: skip
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# What `import hf_calib` must not cost
LATE = ("datasets", "evaluate", "matplotlib", "rich", "sklearn", "transformers.trainer", "typer")


def room_of(path: Path, package: Path = PACKAGE) -> str:
    """The top-level module or sub-package that a file belongs to."""
    return path.relative_to(package).with_suffix("").parts[0]


def imported_names(source: str, path: Path, package: Path = PACKAGE) -> Iterator[str]:
    """Dotted names of what a file imports from the package, at its top or inside its functions."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(package.parent).parts[: -node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.startswith(f"{package.name}."))


def imported_rooms(source: str, path: Path, package: Path = PACKAGE) -> Iterator[str]:
    """Rooms of the package that a file imports."""
    return (name.split(".")[1] for name in imported_names(source, path, package))


def imported_files(path: Path, package: Path = PACKAGE) -> set[Path]:
    """Files of the package that a file imports; where it takes a name from a folder, the file that defines it."""
    found = set()
    for name in imported_names(path.read_text(encoding="utf-8"), path, package):
        place = package.parent.joinpath(*name.split("."))
        for file in (place.with_suffix(".py"), place.parent.with_suffix(".py")):
            if file.exists():
                found.add(file)
                break
        else:  # a name that the folder's __init__ hands on
            found |= handed_on(place.parent / "__init__.py", place.name, package)
    return found - {path}


def handed_on(init: Path, name: str, package: Path) -> set[Path]:
    """The file from which an `__init__` takes a name."""
    if not init.exists() or init.parent == package:
        return set()
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in {alias.name for alias in node.names}:
            return {init.parent.joinpath(*node.module.split(".")).with_suffix(".py")}
    return {init}


def upward_imports(source: str, path: Path, package: Path = PACKAGE) -> list[str]:
    """Rooms above its own that a file imports."""
    floor = FLOOR_OF[room_of(path, package)]
    return sorted({room for room in imported_rooms(source, path, package) if FLOOR_OF.get(room, -1) > floor})


def outside_imports(path: Path) -> set[str]:
    """Top-level packages that a file imports from outside, the standard library left out."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_a_floor_above(path):
    assert room_of(path) in FLOOR_OF, "a new module needs a floor"
    assert upward_imports(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ..cli import main",
        "from .. import report",
        "import hf_calib.hub",
        "from hf_calib.training import CalibrationTrainer",
        "def late():\n    from ..plots import plot_reliability",
    ],
)
def test_an_upward_import_is_found(source):
    assert upward_imports(source, PACKAGE / "functional" / "checks.py")


def test_a_downward_import_is_not_found():
    assert not upward_imports("from .functional.checks import check_probs\nimport torch", PACKAGE / "report.py")


def test_no_files_import_each_other_in_a_circle():
    files = [path for path in MODULES if path.name != "__init__.py"]
    graph = {path: imported_files(path) for path in files}
    assert PACKAGE / "calibrators" / "loading.py" in graph[PACKAGE / "hub.py"]
    assert PACKAGE / "metrics" / "base.py" in graph[PACKAGE / "plots.py"], "handed on by metrics/__init__.py"
    TopologicalSorter(graph).prepare()
    graph[PACKAGE / "functional" / "binning.py"].add(PACKAGE / "plots.py")
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) == "functional"], ids=lambda p: p.name)
def test_the_mathematics_imports_torch_alone(path):
    assert outside_imports(path) <= {"torch"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*_calib_transformer.py")), ids=lambda p: p.name)
def test_model_files_can_be_copied_into_a_repo(path):
    assert outside_imports(path) <= {"torch", "transformers", "huggingface_hub"}
    assert set(imported_rooms(path.read_text(encoding="utf-8"), path)) <= {"models"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "evaluate_modules").glob("*/*.py")), ids=lambda p: p.name)
def test_scripts_of_evaluate_modules_can_be_copied_into_a_space(path):
    """evaluate copies them by themselves: what they import must be installed."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    assert outside_imports(path) <= {"evaluate", "hf_calib"}


def test_importing_the_package_leaves_heavy_libraries_alone(tmp_path):
    """Older releases of transformers import some of them for any model; we add none."""
    code = f"""
        import sys
        from transformers import BertForSequenceClassification
        before = set(sys.modules)
        import hf_calib
        print([name for name in {LATE} if name in sys.modules and name not in before])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", hf_calib.__all__)
def test_every_exported_name_works(name):
    assert getattr(hf_calib, name) is not None
    assert name in dir(hf_calib)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_calib.no_such_name  # noqa: B018
