"""Time and memory of every training loss at a vocabulary's size, and of a training step, beside the stock ones.

The losses run forward and backward on float32 logits of 2,048 tokens and a vocabulary of 49,152, the steps on a BERT
classifier of 4 layers of 256. Everything is timed in interleaved rounds and divided by the stock time of the same
round; memory is the peak of a process of its own beyond the logits, of which the gradient is as large as they.

    python examples/benchmarks/losses.py            # about five minutes on two cores
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from environment import write_result
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hf_calib
from hf_calib.losses import ADDITIVE, LOSSES, make_loss


RESULT = Path(__file__).parent / "results" / "losses.json"
TOKENS, VOCABULARY = 2_048, 49_152
STOCK = "stock cross-entropy"
BATCH, LENGTH, STEPS = 32, 64, 8
STEP = f"a BERT of 4 layers of 256 and {BATCH} x {LENGTH} tokens"


def stock(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What transformers' language models compute."""
    return F.cross_entropy(logits.float(), labels)


def loss_named(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A loss of this library, or the stock one."""
    return stock if name == STOCK else make_loss(name)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that ask for a gradient, and labels of which some are ignored."""
    torch.manual_seed(0)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[::7] = -100
    return torch.randn(TOKENS, VOCABULARY, requires_grad=True), labels


def time_losses(rounds: int) -> dict[str, float]:
    """Median time of every loss over the stock one of the same round; and of that, in seconds."""
    logits, labels = rows()
    names = (STOCK, *LOSSES)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            logits.grad = None
            started = time.perf_counter()
            loss_named(name)(logits, labels).backward()
            seconds[name].append(time.perf_counter() - started)
    return _ratios(seconds)


def peak_megabytes(name: str) -> float:
    """Peak memory of the loss and its gradient beyond the logits, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--memory-of", name], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(name: str) -> None:
    """Runs the loss once, and prints by how many megabytes the process has grown at the most."""
    logits, labels = rows()
    small = torch.randn(4, 8, requires_grad=True)
    loss_named(name)(small, torch.arange(4)).backward()  # what is loaded at the first use
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    loss_named(name)(logits, labels).backward()
    print(_high_water() - before)


def _high_water() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def time_steps(rounds: int) -> dict[str, float]:
    """Median time of a training step with every additive loss over the stock Trainer's; and of that, in seconds."""
    names = (STOCK, *ADDITIVE)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(name, folder) for name in names}
        for number in range(rounds + 1):
            for name, trainer in trainers.items():
                started = time.perf_counter()
                trainer.train()
                if number:  # the first one warms up
                    seconds[name].append((time.perf_counter() - started) / STEPS)
    return _ratios(seconds)


def make_trainer(name: str, folder: str) -> Trainer:
    """Trains the same classifier on the same rows for a few steps at every call of `train`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    model = BertForSequenceClassification(BertConfig(vocab_size=2000, num_labels=10, **sizes))
    ids = torch.randint(2000, (BATCH * STEPS, LENGTH))
    data = [{"input_ids": row, "labels": row.sum() % 10} for row in ids]
    shared = {
        "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": BATCH, "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    if name == STOCK:
        trainer = Trainer(model, TrainingArguments(**shared), train_dataset=data)
    else:
        args = hf_calib.CalibrationTrainingArguments(calibration_loss=name, **shared)
        trainer = hf_calib.CalibrationTrainer(model, args, train_dataset=data)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    ratios = {
        name: statistics.median(own / beside for own, beside in zip(times, seconds[STOCK], strict=True))
        for name, times in seconds.items()
        if name != STOCK
    }
    return {f"{STOCK}, seconds": statistics.median(seconds[STOCK]), **ratios}


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", choices=(STOCK, *LOSSES))
    options = parser.parse_args()
    if options.memory_of:
        print_peak(options.memory_of)
        return
    memory = {name: peak_megabytes(name) for name in (STOCK, *LOSSES)}
    record = {"memory_megabytes": memory, "losses": time_losses(options.rounds), "steps": time_steps(options.rounds)}
    record |= {"what": f"{TOKENS} x {VOCABULARY} float32", "step": STEP, "rounds": options.rounds}
    write_result(RESULT, record, "hf_calib", "torch", "transformers")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
