"""Modules for `evaluate.load`: a folder each, which can be pushed as a Space as it stands."""

from pathlib import Path

from ..functional.checks import check_choice


EVALUATE_MODULES = ("calibration", "calibration_comparison")


def evaluate_module(name: str) -> str:
    """The folder of a module for `evaluate.load`, which works offline.

    Args:
        name (`"calibration"` or `"calibration_comparison"`): the module; the README in its folder says what it takes.
    Returns:
        `str`: an absolute path.
    Raises:
        ValueError: there is no such module.
    """
    check_choice("name", name, EVALUATE_MODULES)
    return str(Path(__file__).resolve().parent / name)
