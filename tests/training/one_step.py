"""Tiny models, rows and trainers for the tests; as a script, it writes what a step, an evaluation and a fit give.

`test_trainer.py` runs it with torchrun and compares with the same measurements in its own process.
"""

import json
import sys

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_calib import (
    CalibTransformerConfig,
    CalibTransformerForCausalLM,
    CalibTransformerForConditionalGeneration,
    CalibTransformerForQuestionAnswering,
)
from hf_calib.losses import ADDITIVE
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


def tiny_language_model(kind):
    torch.manual_seed(0)
    common = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.3}
        return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes, **common))
    if kind == "bart":
        sizes = {"d_model": 16, "max_position_embeddings": 16, "init_std": 0.3, "dropout": 0.0}
        for side in ("encoder", "decoder"):
            sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
        return BartForConditionalGeneration(BartConfig(**sizes, **common))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3}
    config = CalibTransformerConfig(dropout=0.0, max_position_embeddings=16, **sizes, **common)
    return LANGUAGE_MODELS[kind](config)


LANGUAGE_MODELS = {
    "gpt2": GPT2LMHeadModel,
    "bart": BartForConditionalGeneration,
    "causal": CalibTransformerForCausalLM,
    "seq2seq": CalibTransformerForConditionalGeneration,
}


def language_rows(count, seed=0):
    """Padded rows whose labels are their own tokens, with some left out; in some rows the first token is one."""
    rows, generator = tiny_rows("token", count, seed=seed), torch.Generator().manual_seed(seed)
    for index, row in enumerate(rows):
        ignored = (torch.rand(LENGTH, generator=generator) < 0.2) | (row["attention_mask"] == 0)
        ignored[0] = index % 3 == 0
        row["labels"] = row["input_ids"].masked_fill(ignored, -100)
    return rows


def held_out_language_rows(kind, count):
    """Rows with labels drawn from the model's probabilities at temperature 2; a decoder reads `input_ids` too."""
    rows, generator = language_rows(count, seed=1), torch.Generator().manual_seed(2)
    model = tiny_language_model(kind).eval()
    for row in rows:
        decoder = {"decoder_input_ids": row["input_ids"]} if model.config.is_encoder_decoder else {}
        inputs = {name: row[name][None] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(**inputs, **{name: ids[None] for name, ids in decoder.items()}).logits[0]
        drawn = torch.multinomial((logits / 2).softmax(-1), 1, generator=generator)[:, 0]
        drawn = drawn if decoder else drawn.roll(1)  # a decoder alone predicts the label after its place
        row.update(decoder, labels=torch.where(row["labels"] == -100, -100, drawn))
    return rows


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


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BERT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "initializer_range": 0.3}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def several_labels():
    return surer(tiny_model("sequence", problem_type="multi_label_classification"), "classifier")


def surer(model, head):
    """The model with larger logits, so that they predict labels that are drawn from them."""
    with torch.no_grad():
        getattr(model, head).weight *= 6
    return model


def masked():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**BERT, **STILL))


def reader():
    torch.manual_seed(0)
    return surer(BertForQuestionAnswering(BertConfig(**BERT, **STILL)), "qa_outputs")


def own_reader():
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "initializer_range": 0.3}
    return CalibTransformerForQuestionAnswering(CalibTransformerConfig(dropout=0.0, **sizes))


def image():
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, **STILL, image_size=8, patch_size=4, num_labels=3, initializer_range=0.5)
    return ViTForImageClassification(config)


TASKS = {
    "several": several_labels, "masked": masked, "answers": reader, "own answers": own_reader, "image": image,
    "shares": lambda: tiny_model("sequence"),
}  # fmt: skip
OWN_LOSS = [name for name in TASKS if name != "shares"]  # a model's own has no shares


def task_rows(name, count, seed=0):
    rows, generator = tiny_rows("token", count, seed), torch.Generator().manual_seed(seed)
    for index, row in enumerate(rows):
        if name == "several":
            row["labels"] = (torch.rand(3, generator=generator) < 0.4).float()
        elif name == "shares":
            row["labels"] = torch.rand(3, generator=generator).softmax(-1)
        elif name == "masked":
            row["labels"] = row["input_ids"].masked_fill(row["labels"] == -100, -100)
        elif "answers" in name:
            del row["labels"]
            length = int(row["attention_mask"].sum())
            start, end = sorted(torch.randint(length, (2,), generator=generator).tolist())
            # some answers are cut off, at their end or as a whole, and some are not in the text
            row["start_positions"] = torch.tensor(20 if index % 4 == 3 else -1 if index % 8 == 6 else start)
            row["end_positions"] = torch.tensor(20 if index % 4 in (1, 3) else -1 if index % 8 == 6 else end)
        else:
            pixels, label = torch.randn(3, 8, 8, generator=generator), torch.randint(3, (), generator=generator)
            rows[index] = {"pixel_values": pixels, "labels": label}
    return rows


def held_out_task_rows(name, count):
    """Rows with labels drawn from the model's probabilities at temperature 2: it is overconfident on them."""
    rows, generator = task_rows(name, count, seed=1), torch.Generator().manual_seed(2)
    model = TASKS[name]().eval()
    for row in rows:
        inputs = {key: row[key][None] for key in ("input_ids", "attention_mask", "pixel_values") if key in row}
        with torch.no_grad():
            output = model(**inputs)
        if "answers" in name:
            for key, logits in (("start", output.start_logits), ("end", output.end_logits)):
                if 0 <= row[f"{key}_positions"] < 6:
                    row[f"{key}_positions"] = torch.multinomial((logits[0] / 2).softmax(-1), 1, generator=generator)[0]
            continue
        logits = output.logits[0] / 2
        if name == "several":
            row["labels"] = torch.bernoulli(logits.sigmoid(), generator=generator)
        elif name == "shares":
            row["labels"] = logits.softmax(-1)
        else:
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[..., 0]
            row["labels"] = drawn.where(row["labels"] != -100, -100)
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
    if kind in LANGUAGE_MODELS:
        model, rows = tiny_language_model(kind) if model is None else model, language_rows(16)
    else:
        model, rows = tiny_model(kind) if model is None else model, tiny_rows(kind, 16)
    return CalibrationTrainer(model, args, **{"train_dataset": rows, **(trainer or {})})


def one_step(kind, output_dir, **arguments):
    trainer = make_trainer(kind, output_dir, **arguments)
    trainer.train()
    return {key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm")}


def task_step(name, output_dir, **arguments):
    rows = {"train_dataset": task_rows(name, 16)}
    trainer = make_trainer("sequence", output_dir, model=TASKS[name](), trainer=rows, **arguments)
    trainer.train()
    return {key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm")}


def scores(metrics):
    names = ("loss", "ece", "brier", "temperature", "refinement")
    return {name: metrics[f"eval_{name}"] for name in names}


def measure(output_dir, per_device):
    """One step of 16 rows, an evaluation with an uneven last batch, and a calibration."""
    found = {}
    for kind in MODELS:
        for loss in ADDITIVE:
            arguments = {"calibration_loss": loss, "per_device_train_batch_size": per_device}
            found[f"{kind} {loss}"] = one_step(kind, output_dir, **arguments)
        trainer = make_trainer(kind, output_dir)
        rows = held_out_rows(kind, 29)  # 4 batches of 4 on each of two processes, the last one uneven
        found[f"{kind} evaluation"] = scores(trainer.evaluate(rows))
        calibrator = trainer.calibrate(rows)
        found[f"{kind} calibration"] = {
            "temperature": float(calibrator.temperature),
            "rows": calibrator.provenance["rows"],
            "loss": trainer.evaluate(rows)["eval_loss"],
        }
    for kind in LANGUAGE_MODELS:
        found[kind] = one_step(kind, output_dir, per_device_train_batch_size=per_device)
        trainer = make_trainer(kind, output_dir)
        rows = held_out_language_rows(kind, 29)
        found[f"{kind} evaluation"] = scores(trainer.evaluate(rows))
        calibrator = trainer.calibrate(rows)
        found[f"{kind} calibration"] = {"temperature": float(calibrator.temperature), **calibrator.provenance}
    for name in OWN_LOSS:
        found[name] = task_step(name, output_dir, per_device_train_batch_size=per_device)
        trainer = make_trainer("sequence", output_dir, model=TASKS[name]())
        rows = held_out_task_rows(name, 29)
        found[f"{name} evaluation"] = scores(trainer.evaluate(rows))
        trainer.train_dataset = None
        calibrator = trainer.calibrate(rows)
        after = trainer.evaluate(rows)["eval_loss"]
        found[f"{name} calibration"] = {"loss": after, "rows": calibrator.provenance.get("rows", 29)}
    return found


if __name__ == "__main__":
    found = measure(sys.argv[1], per_device=8)
    if torch.distributed.get_rank() == 0:
        with open(sys.argv[2], "w") as file:
            json.dump({"processes": torch.distributed.get_world_size(), **found}, file)
    torch.distributed.destroy_process_group()
