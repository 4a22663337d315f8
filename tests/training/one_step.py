"""Tiny models, rows and trainers for the tests; as a script, it writes what a step, an evaluation and a fit give.

`test_trainer.py` runs it with torchrun and compares with the same measurements in its own process.
"""

import json
import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from hf_calib.losses import LOSSES
from hf_calib.training import CalibrationTrainer, CalibrationTrainingArguments


NUM_LABELS, LENGTH = 3, 6
MODELS = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification}


def tiny_model(kind, **config):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        **{"num_labels": NUM_LABELS, **config},
    )
    return MODELS[kind](config)


def tiny_rows(kind, count, seed=0):
    """Padded rows of 2 to 6 tokens. Token labels are -100 on padding and on others, in some rows everywhere."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = 2 + int(torch.randint(LENGTH - 1, (1,), generator=generator))
        mask = torch.arange(LENGTH) < length
        labels = torch.randint(NUM_LABELS, (LENGTH,), generator=generator)
        ignored = (torch.rand(LENGTH, generator=generator) < 0.3) | ~mask | (index % 5 == 4)
        rows.append(
            {
                "input_ids": torch.randint(1, 50, (LENGTH,), generator=generator) * mask,
                "attention_mask": mask.long(),
                "labels": labels.masked_fill(ignored, -100) if kind == "token" else labels[0],
            }
        )
    return rows


def held_out_rows(kind, count):
    """Rows with labels drawn from `tiny_model`'s probabilities at temperature 2: it is overconfident on them."""
    rows, generator = tiny_rows(kind, count, seed=1), torch.Generator().manual_seed(2)
    model = tiny_model(kind).eval()
    for row in rows:
        with torch.no_grad():
            logits = model(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0]
        drawn = torch.multinomial((logits / 2).softmax(-1), 1, generator=generator)[..., 0]
        row["labels"] = torch.where(row["labels"] == -100, -100, drawn)
    return rows


def make_trainer(kind, output_dir, *, model=None, trainer=None, **arguments):
    args = CalibrationTrainingArguments(
        output_dir=str(output_dir),
        **{
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,  # pinning warns where there is no GPU
            **arguments,
        },
    )
    model = tiny_model(kind) if model is None else model
    return CalibrationTrainer(model, args, **{"train_dataset": tiny_rows(kind, 16), **(trainer or {})})


def one_step(kind, output_dir, **arguments):
    trainer = make_trainer(kind, output_dir, **arguments)
    trainer.train()
    return {key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm")}


def measure(output_dir, per_device):
    """One step of 16 rows, an evaluation with an uneven last batch, and a calibration."""
    found = {}
    for kind in MODELS:
        for loss in LOSSES:
            arguments = {"calibration_loss": loss, "per_device_train_batch_size": per_device}
            found[f"{kind} {loss}"] = one_step(kind, output_dir, **arguments)
        trainer = make_trainer(kind, output_dir)
        rows = held_out_rows(kind, 29)  # 4 batches of 4 on each of two processes, the last one uneven
        found[f"{kind} evaluation"] = {"loss": trainer.evaluate(rows)["eval_loss"]}
        calibrator = trainer.calibrate(rows)
        found[f"{kind} calibration"] = {
            "temperature": float(calibrator.temperature),
            "rows": calibrator.provenance["rows"],
            "loss": trainer.evaluate(rows)["eval_loss"],
        }
    return found


if __name__ == "__main__":
    found = measure(sys.argv[1], per_device=8)
    if torch.distributed.get_rank() == 0:
        with open(sys.argv[2], "w") as file:
            json.dump({"processes": torch.distributed.get_world_size(), **found}, file)
    torch.distributed.destroy_process_group()
