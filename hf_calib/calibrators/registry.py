"""A method is a name: the word on the command line, in training arguments and in `calibrator.json`."""

from .base import Calibrator, IdentityCalibration
from .monotone import IsotonicCalibration
from .scaling import TemperatureScaling


# Simplest first: the order in which selection breaks ties.
CALIBRATORS: dict[str, type[Calibrator]] = {
    "identity": IdentityCalibration,
    "temperature": TemperatureScaling,
    "isotonic": IsotonicCalibration,
}


def make_calibrator(name: str) -> Calibrator:
    """A fresh calibrator by its name; a ValueError lists the names when there is none."""
    if name not in CALIBRATORS:
        raise ValueError(f"calibrator: got {name!r}; allowed are {', '.join(CALIBRATORS)}")
    return CALIBRATORS[name]()
