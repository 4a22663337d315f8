"""`hf-calib demo`: train a small classifier until it is too sure of itself, calibrate it, save it, prove it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import DataCollatorWithPadding, PrinterCallback, TrainerCallback

from .calibrate import calibrate_predictions, check_method
from .console import no_bars, no_notices, print_report, print_selection
from .docstrings import docstring_dataset
from .folders import check_new_folder
from .folding import apply_calibrator
from .hub import save_calibrated
from .model_card import usage
from .models import CalibTransformerConfig, CalibTransformerForSequenceClassification
from .predictions import collect_predictions
from .training import CalibrationTrainer, CalibrationTrainingArguments


class Size(NamedTuple):
    """How much the demo does."""

    rows_per_class: int
    vocab_size: int
    hidden_size: int
    epochs: int


FULL = Size(rows_per_class=1500, vocab_size=4000, hidden_size=128, epochs=6)
FAST = Size(rows_per_class=150, vocab_size=1000, hidden_size=64, epochs=10)
DATASET = "docstring sentences of installed libraries"
MAX_TOKENS = 512  # more than any sentence of the data set has: nothing is cut, and the stock pipeline never fails
EXAMPLES = 3
PROVEN_ROWS = 64
# of a score: another batch changes a logit's last digits, which isotonic's steep steps, never folded, magnify
TOLERANCE = {"folded": 1e-5, "attached": 1e-3}


def run_demo(output: Path, *, fast: bool = False, seed: int = 0, method: str = "auto") -> None:
    """Runs the whole job, from text to a folder that is ready for the Hub.

    Args:
        output (`Path`): a folder that does not exist yet.
        fast (`bool`): a small version of the same path, for tests.
        seed (`int`): of the splits, the weights and the bootstrap.
        method (`str`): as in `calibrate_predictions`.
    Raises:
        FileExistsError: `output` holds something.
        ValueError: an unknown method.
    """
    check_method(method)
    check_new_folder("output", output)
    size, console = FAST if fast else FULL, Console()
    with no_bars(), no_notices():  # each step has its line here
        console.print("[bold]1. Data:[/] which library is this docstring sentence from?")
        data = docstring_dataset(rows_per_class=size.rows_per_class, seed=seed)
        console.print("   " + ", ".join(f"{len(split):,} {name}" for name, split in data.items()) + " rows")

        console.print("[bold]2. Training[/] a tokenizer and a small CalibTransformer; the best epoch is kept")
        tokenizer = train_tokenizer(data["train"]["text"][:], size.vocab_size)
        model = train_classifier(data, tokenizer, size, seed, console)

        console.print("[bold]3. Calibrating[/] on rows that training has not seen")
        fitting, test = (
            collect_predictions(model, data[name], processing_class=tokenizer) for name in ("calibration", "test")
        )
        calibrator, report = calibrate_predictions(fitting, method=method, test=test, seed=seed)
        calibrator.provenance |= {"dataset": DATASET, "split": "calibration", "report_split": "test"}
        print_selection(calibrator, console)

        console.print(f"[bold]4. Before and after[/] on {len(test):,} test rows")
        print_report(report, console)

        applied = apply_calibrator(model, calibrator)
        save_calibrated(model, output, processing_class=tokenizer, report=report)
        console.print(f"[bold]5. Saved[/] {output}, ready for the Hub; its calibrator is {applied}:", soft_wrap=True)
        console.print("   " + ", ".join(sorted(path.name for path in output.iterdir())))

        console.print("[bold]6. A new process[/] loads the folder and runs a stock pipeline:")
        texts = data["test"]["text"][:PROVEN_ROWS]
        expected = calibrator.log_probs(test.logits[:PROVEN_ROWS]).exp()
        prove(output, applied, texts, expected, test.probs, test.label_names, console)
    console.print(
        "[bold]7. Your turn,[/] with a model of yours and labelled rows that its training has not seen:\n"
        "     hf-calib fit --model ID_OR_PATH --dataset ID_OR_PATH --split validation --output DIR\n"
        "   hf-calib fit --help and the README say the rest.",
        soft_wrap=True,
    )


def train_tokenizer(texts: list[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-pair encoding of these texts, wrapped as a fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=MAX_TOKENS
    )


def train_classifier(
    data: datasets.DatasetDict, tokenizer: Any, size: Size, seed: int, console: Console
) -> CalibTransformerForSequenceClassification:
    """Trains with cross-entropy and keeps the most accurate epoch, as one does; overconfidence comes by itself."""
    names = data["train"].features["label"].names
    transformers.set_seed(seed)
    config = CalibTransformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        dropout=0.3,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = CalibTransformerForSequenceClassification(config)
    encoded = {
        name: data[name].map(
            lambda rows: tokenizer(rows["text"], truncation=True), batched=True, remove_columns="text"
        )
        for name in ("train", "validation")
    }
    with TemporaryDirectory() as folder:
        arguments = CalibrationTrainingArguments(
            output_dir=folder,
            num_train_epochs=size.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            train_sampling_strategy="group_by_length",
            learning_rate=1e-3,
            warmup_steps=0.05,
            weight_decay=0.01,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = CalibrationTrainer(
            model,
            arguments,
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=_accuracy,
        )
        trainer.remove_callback(PrinterCallback)
        with TrainingProgress(console) as progress:
            trainer.add_callback(progress)
            trainer.train()
    return model.eval()


class TrainingProgress(TrainerCallback):
    """A progress bar of the steps that says how the last evaluation went."""

    def __init__(self, console: Console):
        columns = (TextColumn("   {task.description}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)

    def __enter__(self) -> TrainingProgress:
        self.progress.start()
        self.task = self.progress.add_task("epoch 0")
        return self

    def __exit__(self, *details: Any) -> None:
        self.progress.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step, total=state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        numbers = f"accuracy {metrics['eval_accuracy']:.3f}, NLL {metrics['eval_loss']:.3f}"
        self.progress.update(self.task, description=f"epoch {state.epoch:.0f}: {numbers}")


def prove(
    folder: Path,
    applied: str,
    texts: list[str],
    expected: torch.Tensor,
    raw: torch.Tensor,
    names: list[str],
    console: Console,
) -> None:
    """Scores the texts in a new process by the lines that a user would write, and compares with what was promised.

    Raises:
        RuntimeError: the scores of the saved folder are not the calibrated ones.
    """
    code = usage(str(folder.resolve()), applied, "text-classification", stock=False)
    scores = "import json, sys\nprint(json.dumps(classifier(json.load(sys.stdin), top_k=None)))"
    command = [sys.executable, "-c", f"{code}\n{scores}"]
    result = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the saved folder does not load: {result.stderr.strip().splitlines()[-1]}")
    rows = [{entry["label"]: entry["score"] for entry in row} for row in json.loads(result.stdout.splitlines()[-1])]
    deviation = float((torch.tensor([[row[name] for name in names] for row in rows]) - expected).abs().max())
    if deviation > TOLERANCE[applied]:
        raise RuntimeError(f"the saved folder's scores miss the calibrated ones by {deviation:.1e}")
    for text, row, before in zip(texts[:EXAMPLES], rows, raw, strict=False):
        label = max(row, key=row.get)
        console.print(
            f'   "{text[:70]}": {label} {row[label]:.2f} (was {before[names.index(label)]:.2f})', markup=False
        )
    console.print(
        f"   All {len(texts)} x {len(names)} scores are the calibrated ones, to {deviation:.0e}. The lines it ran:"
    )
    code = usage(str(folder), applied, "text-classification", stock=False)
    lines = "\n".join("     " + line for line in code.splitlines())
    console.print(lines, markup=False, soft_wrap=True)


def _accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}
