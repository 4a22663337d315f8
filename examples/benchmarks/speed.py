"""How long a temperature fit and calibration errors take, in passes over the same numbers, beside other packages.

One pass, the floor, is a `logsumexp` and a gather over the logits. Everything is timed in one process, in rounds, so
that a machine that slows down slows all of it down; the medians' ratios are written to `results/speed.json`.

    python examples/benchmarks/speed.py            # about three minutes on two cores
    python examples/benchmarks/speed.py --rounds 3
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import relplot
import torch
from environment import write_result
from netcal.metrics import ECE
from sklearn.calibration import _TemperatureScaling, calibration_curve
from torchmetrics.functional.classification import multiclass_calibration_error

from hf_calib import TemperatureScaling
from hf_calib.functional import expected_calibration_error, smooth_calibration_error


SHAPES = ((50_000, 1_000), (200_000, 10), (50_000, 10))
TRUE_TEMPERATURE = 1.7
NUM_BINS = 15
RESULT = Path(__file__).parent / "results" / "speed.json"


def make_logits(num_rows: int, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are too sure by a known temperature, and labels drawn from the true probabilities."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(num_rows, num_labels, generator=generator) * 2
    labels = torch.multinomial(truth.softmax(-1), 1, generator=generator)[:, 0]
    return truth * TRUE_TEMPERATURE, labels


def sklearn_ece(probs: np.ndarray, labels: np.ndarray) -> float:
    """The ECE that scikit-learn's calibration curve of the top label implies."""
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=NUM_BINS)
    counts = np.histogram(confidence, bins=NUM_BINS, range=(0, 1))[0]
    return float(np.abs(accuracy - mean_confidence) @ counts[counts > 0] / len(labels))


def relplot_smooth_ece(probs: np.ndarray, labels: np.ndarray) -> float:
    """relplot's smooth ECE of the top label."""
    return relplot.smECE(probs.max(1), (probs.argmax(1) == labels).astype(float))


def jobs(num_rows: int, num_labels: int) -> dict[str, Callable[[], object]]:
    """What is timed on one shape, by name; `floor` is what the others are divided by."""
    logits, labels = make_logits(num_rows, num_labels)
    probs = logits.softmax(-1)
    arrays = logits.numpy(), labels.numpy(), probs.numpy()
    return {
        "floor": lambda: (logits.logsumexp(-1), logits.gather(-1, labels[:, None])),
        "temperature": lambda: TemperatureScaling().fit(logits, labels),
        "temperature, scikit-learn": lambda: _TemperatureScaling().fit(arrays[0], arrays[1]),
        "ECE": lambda: expected_calibration_error(probs, labels, num_bins=NUM_BINS),
        "ECE, torchmetrics": lambda: multiclass_calibration_error(probs, labels, num_labels, n_bins=NUM_BINS),
        "ECE, netcal": lambda: ECE(NUM_BINS).measure(arrays[2], arrays[1]),
        "ECE, scikit-learn": lambda: sklearn_ece(arrays[2], arrays[1]),
        "smooth ECE": lambda: smooth_calibration_error(probs, labels),
        "smooth ECE, relplot": lambda: relplot_smooth_ece(arrays[2], arrays[1]),
    }


def measure(num_rows: int, num_labels: int, rounds: int) -> dict[str, float]:
    """Median seconds of the floor, and everything else in floors."""
    timed = jobs(num_rows, num_labels)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, job in timed.items():
            job()  # memory that another job has given back has to be fetched anew: up to six times the work itself
            started = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    floor = medians.pop("floor")
    return {"floor_seconds": floor, **{name: value / floor for name, value in medians.items()}}


def main() -> None:
    """Times every shape and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")  # scikit-learn's LBFGS says where it stopped
    shapes = {}
    for shape in SHAPES:
        shapes["{} x {}".format(*shape)] = found = measure(*shape, options.rounds)
        print(shape, {name: float(f"{value:.3g}") for name, value in found.items()}, flush=True)
    record = {
        "what": "median time in floors; a floor is one logsumexp and gather over the logits",
        "rounds": options.rounds,
        "shapes": shapes,
    }
    packages = ("hf_calib", "torch", "scikit-learn", "torchmetrics", "netcal", "relplot", "numpy")
    write_result(options.output, record, *packages)


if __name__ == "__main__":
    main()
