"""Calibrate logits from anywhere: choose a calibrator on one half of the rows, report on the other, save it.

The metrics before and after are printed with intervals; nothing is downloaded.

    python examples/calibrate_logits.py                    # logits that are too sure by a temperature of 1.8
    python examples/calibrate_logits.py --npz FILE.npz     # your own: arrays `logits` (N, C) and `labels` (N,)
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import hf_calib


def made_up_rows(num_rows: int = 4000, num_labels: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from known probabilities, and logits that are 1.8 times too sure of them."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(num_rows, num_labels, generator=generator) * 1.5
    labels = torch.multinomial(truth.softmax(-1), 1, generator=generator)[:, 0]
    return truth * 1.8, labels


def main() -> None:
    """Fits, reports, saves and loads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--npz", type=Path, help="arrays logits and labels")
    options = parser.parse_args()
    if options.npz:
        with np.load(options.npz, allow_pickle=False) as arrays:
            logits, labels = torch.from_numpy(arrays["logits"]), torch.from_numpy(arrays["labels"])
    else:
        logits, labels = made_up_rows()

    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fitting, test = shuffled.chunk(2)
    calibrator = hf_calib.select_calibrator(logits[fitting], labels[fitting])
    for row in calibrator.selection:
        print(f"{row.name:<12} held-out NLL {row.score:.4f}, fitted in {row.seconds:.3f} s")
    print(f"chosen: {calibrator}\n")

    calibrated = calibrator.log_probs(logits[test]).exp()
    report = hf_calib.evaluate_calibration(calibrated, labels[test], before=logits[test].softmax(-1))
    print(report.to_markdown())

    with tempfile.TemporaryDirectory() as folder:
        calibrator.save_pretrained(folder)
        loaded = hf_calib.AutoCalibrator.from_pretrained(folder)
        print("\nsaved as", ", ".join(sorted(path.name for path in Path(folder).iterdir())))
        assert torch.equal(loaded(logits), calibrator(logits))


if __name__ == "__main__":
    main()
