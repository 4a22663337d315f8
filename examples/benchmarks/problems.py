"""The benchmark's problems: logits and labels of real models, and how their rows are split.

Read from the folder that `--data` names, one folder for each source; what is missing is skipped with one line. Public
sources, and the files that are expected:

- `cifar10_resnet50_logits/logits.npz` (`val_logits`, `val_labels`, `test_logits`, `test_labels`): github.com/AIgen/
  df-posthoc-calibration, data/cifar10_resnet50.
- `cifar10_vgg16_probs/probs.npz` (`probs`, `labels`): github.com/p-lambda/verified_calibration, data/cifar_probs.dat.
- `netcal_cifar/*.npz` (`probs`, `labels`): github.com/EFS-OpenSource/calibration-framework,
  examples/classification/records.
- `imagenet_toplabel/*.parquet` (`true_label`, `pred_label`, `confidence`): github.com/hollance/reliability-diagrams,
  results.
- `llm_confidence_sciq_halueval/confidence.parquet` (`llm`, `qset`, `stated_confidence`, `chosen_token_confidence`,
  `correct`) and `sciq_llama31_8b_option_probs.parquet` (`A_prob` to `D_prob`, `Correct Answer Letter`):
  github.com/NoamMichael/Comparing-Confidence-in-LLMs.
- the text sets of `text_logits.py`, from its cache.

A confidence of being right is a problem of two classes, wrong and right.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from text_logits import TEXT_SETS


# A probability below this counts as this, in what is read and in what is scored, so that no method pays more than
# 16.1 nats for one row that it gave no chance.
FLOOR = 1e-7
MAX_CALIBRATION_ROWS = 5_000
NUM_SPLITS = 5


class Problem(NamedTuple):
    """Logits `(N, C)` float32 and labels `(N,)` int64 of one model on one set.

    The first `num_calibration` rows are the set's own calibration rows; 0 where it has no split of its own.
    """

    name: str
    source: str
    logits: torch.Tensor
    labels: torch.Tensor
    num_calibration: int = 0

    def splits(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Calibration rows and test rows: the set's own split first, where it has one, then splits by chance.

        All have the same sizes; without an own split they are halves, of at most 5,000 rows to calibrate on.
        """
        num_rows = len(self.labels)
        size = self.num_calibration or min(num_rows // 2, MAX_CALIBRATION_ROWS)
        own = [torch.arange(num_rows)] if self.num_calibration else []
        drawn = [
            torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
            for seed in range(len(own), NUM_SPLITS)
        ]
        return [(order[:size].sort().values, order[size:].sort().values) for order in own + drawn]


def all_problems(data: Path, cache: Path) -> Iterator[Problem]:
    """Every problem whose files are there."""
    for source, read in SOURCES.items():
        if (data / source).is_dir():
            yield from read(data / source)
        else:
            print(f"{source}: not in the data folder, skipped")
    for name in TEXT_SETS:
        path = cache / f"{name}.npz"
        if path.exists():
            found = np.load(path)
            yield _problem(name, "text", found["logits"], found["labels"], int(found["num_calibration"]))
        else:
            print(f"{name}: not in the cache, skipped")


def from_probs(probs: np.ndarray) -> np.ndarray:
    """Log-probabilities."""
    return np.log(np.maximum(probs, FLOOR))


def from_confidence(confidence: np.ndarray) -> np.ndarray:
    """Logits of two classes, wrong and right."""
    right = np.clip(confidence.astype(np.float64), FLOOR, 1 - FLOOR)
    return np.log(np.stack([1 - right, right], axis=1))


def _cifar10_resnet50(folder: Path) -> Iterator[Problem]:
    found = np.load(folder / "logits.npz")
    logits, labels = (np.concatenate([found[f"val_{what}"], found[f"test_{what}"]]) for what in ("logits", "labels"))
    yield _problem("cifar10_resnet50", folder.name, logits, labels, len(found["val_labels"]))


def _probability_files(folder: Path) -> Iterator[Problem]:
    for path in sorted(folder.glob("*.npz")):
        found = np.load(path)
        name = path.stem.replace("-", "_") if folder.name == "netcal_cifar" else "cifar10_vgg16"
        yield _problem(name, folder.name, from_probs(found["probs"]), found["labels"])


def _imagenet(folder: Path) -> Iterator[Problem]:
    for path in sorted(folder.glob("*.parquet")):
        found = pd.read_parquet(path)
        right = (found["true_label"] == found["pred_label"]).to_numpy()
        yield _problem(f"imagenet_{path.stem}", folder.name, from_confidence(found["confidence"].to_numpy()), right)


def _llm(folder: Path) -> Iterator[Problem]:
    options = pd.read_parquet(folder / "sciq_llama31_8b_option_probs.parquet").dropna()
    letters = [f"{letter}_prob" for letter in "ABCD"]
    labels = options["Correct Answer Letter"].map("ABCD".index).to_numpy()
    yield _problem("sciq_llama8b_options", folder.name, from_probs(options[letters].to_numpy()), labels)
    table = pd.read_parquet(folder / "confidence.parquet")
    for (qset, llm), rows in table.groupby(["qset", "llm"]):
        for kind in ("stated", "chosen_token"):
            kept = rows[rows[f"{kind}_confidence"].notna()]
            if len(kept):
                name = f"{qset.split('_')[0]}_{llm.lower().replace('.', '_').replace('-', '_')}_{kind.split('_')[-1]}"
                logits = from_confidence(kept[f"{kind}_confidence"].to_numpy())
                yield _problem(name, folder.name, logits, kept["correct"].to_numpy())


def _problem(name: str, source: str, logits: np.ndarray, labels: np.ndarray, num_calibration: int = 0) -> Problem:
    tensors = torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
    return Problem(name, source, *tensors, num_calibration)


SOURCES: dict[str, Callable[[Path], Iterator[Problem]]] = {
    "cifar10_resnet50_logits": _cifar10_resnet50,
    "cifar10_vgg16_probs": _probability_files,
    "netcal_cifar": _probability_files,
    "imagenet_toplabel": _imagenet,
    "llm_confidence_sciq_halueval": _llm,
}
