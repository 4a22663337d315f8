"""From a text file to generated text whose probabilities hold: tokenizer, training, calibration, generation.

A line of the file is a source and a target with a tab between them, or one text, of which the second half is then the
target. An encoder-decoder reads the source and writes the target; a decoder alone continues the line. Without a file,
the lines are functions and what their docstrings say of them, from the packages that are installed here.

    python examples/train_from_text.py                           # some three minutes on two cores
    python examples/train_from_text.py train.txt --decoder-only
    python examples/train_from_text.py train.txt --output my-model --epochs 20 --hidden-size 256 --layers 4
"""

import argparse
import ast
import importlib.util
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from hf_calib import CalibTransformerConfig, CalibTransformerForCausalLM, CalibTransformerForConditionalGeneration
from hf_calib.training import CalibrationTrainer, CalibrationTrainingArguments


PACKAGES = ("numpy", "pandas", "scipy", "sklearn", "transformers")
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
MAX_LENGTH = 64  # tokens of a source, of a target, and of a line for a decoder alone
LEAST_LINES = 100


# --- the text


def installed_docstrings(packages: tuple[str, ...]) -> Iterator[str]:
    """Every documented function of these packages, and the first sentence on it, with a tab between them."""
    roots = [Path(importlib.util.find_spec(package).origin).parent for package in packages]
    paths = [path for root in roots for path in sorted(root.rglob("*.py")) if "tests" not in path.parts]
    for path in tqdm(paths, desc="Reading docstrings", unit="file"):
        yield from documented_functions(path.read_text(encoding="utf-8", errors="ignore"))


def documented_functions(code: str) -> Iterator[str]:
    """Those of one module; none of one for another Python."""
    try:
        nodes = ast.walk(ast.parse(code))
    except SyntaxError:
        return
    for node in nodes:
        if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)):
            continue
        sentence = " ".join(docstring.split("\n\n")[0].split()).split(". ")[0]
        if 25 <= len(sentence) <= 200:
            yield f"{node.name}({', '.join(argument.arg for argument in node.args.args)})\t{sentence}"


def source_and_target(line: str) -> tuple[str, str]:
    """What stands before and after the tab; of a line without one, its two halves."""
    if "\t" in line:
        source, target = line.split("\t", 1)
        return source, target
    words = line.split(" ")
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def train_tokenizer(lines: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding, trained on these lines: no text has an unknown character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def prompt_tokens(source: str, tokenizer: PreTrainedTokenizerFast, decoder_only: bool) -> list[int]:
    """What the model is given of a line when it generates."""
    text, end = (BOS + source + "\t", "") if decoder_only else (source, EOS)
    return tokenizer(text + end, truncation=True, max_length=MAX_LENGTH)["input_ids"]


def make_dataset(lines: list[str], tokenizer: PreTrainedTokenizerFast, decoder_only: bool) -> Dataset:
    """One row for each line, without those whose tokens another has, so that no part of the data sees another's."""
    rows = {}
    for line in lines:
        source, target = source_and_target(line)
        inputs = prompt_tokens(source, tokenizer, decoder_only)
        labels = tokenizer(target + EOS, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        if decoder_only:
            inputs = labels = (inputs + labels)[:MAX_LENGTH]
        rows.setdefault(tuple(inputs), {"input_ids": inputs, "labels": labels, "source": source, "target": target})
    return Dataset.from_list(list(rows.values()))


# --- the model


def make_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, decoder_only: bool
) -> PreTrainedModel:
    """A CalibTransformer with random weights that knows the tokenizer's special tokens."""
    config = CalibTransformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 32),
        max_position_embeddings=2 * MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CalibTransformerForCausalLM if decoder_only else CalibTransformerForConditionalGeneration)(config)


@torch.no_grad()
def show_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Dataset) -> None:
    """Generates greedily, token by token with a cache, and says how probable the model found what it wrote."""
    decoder_only = not model.config.is_encoder_decoder
    model.eval()
    for row in rows:
        prompt = torch.tensor([prompt_tokens(row["source"], tokenizer, decoder_only)], device=model.device)
        options = {"max_new_tokens": MAX_LENGTH // 2, "do_sample": False, "repetition_penalty": 1.1}
        output = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **options)
        tokens = output.sequences[0, -len(output.logits) :]
        # An attached calibrator has calibrated these logits already
        log_probs = torch.cat(output.logits).log_softmax(-1).gather(1, tokens[:, None])
        print(f"\n  source     {row['source']}\n  target     {row['target']}")
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        print(f"  generated  {text}  (a token's probability {log_probs.mean().exp():.2f}, geometric mean)")


# --- the whole way


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, nargs="?", help="one text, or a source, a tab and a target, a line")
    parser.add_argument("--decoder-only", action="store_true", help="a causal language model in place of both halves")
    parser.add_argument("--output", type=Path, help="folder for the model, its tokenizer and its calibrator")
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-lines", type=int, default=6_000, help="so many, drawn at random")
    options = parser.parse_args()
    if options.text is not None and not options.text.is_file():
        parser.error(f"text: got {str(options.text)!r}; allowed is a text file")
    return options


def read_lines(options: argparse.Namespace) -> list[str]:
    """The lines to learn from, shuffled."""
    if options.text is None:
        lines = list(dict.fromkeys(installed_docstrings(PACKAGES)))
    else:
        lines = [line for line in options.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < LEAST_LINES:
        raise SystemExit(f"text: got {len(lines)} lines with text; allowed are {LEAST_LINES} and more")
    random.Random(0).shuffle(lines)
    return lines[: options.max_lines]


def main() -> None:
    """Trains, calibrates on rows that training has not seen, reports on others, and generates."""
    options = read_options()
    set_seed(0)
    lines = read_lines(options)
    tokenizer = train_tokenizer(lines[: len(lines) * 8 // 10], options.vocab_size)
    dataset = make_dataset(lines, tokenizer, options.decoder_only)
    train, rest = dataset.train_test_split(0.2, seed=0).values()
    calibration, validation = rest.train_test_split(0.5, seed=0).values()

    model = make_model(tokenizer, options.hidden_size, options.layers, options.decoder_only)
    print(f"{len(train)} lines to train, {len(calibration)} to calibrate, {len(validation)} to validate;", end=" ")
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    with tempfile.TemporaryDirectory() as folder:
        arguments = CalibrationTrainingArguments(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=2e-3,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = CalibrationTrainer(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        trainer.train()
        before = trainer.evaluate()
        calibrator = trainer.calibrate(calibration)
        after = trainer.evaluate()
        if options.output:
            trainer.save_model(options.output)

    print(f"\ntemperature {float(calibrator.temperature):.3f}, fitted on {calibrator.provenance['rows']} tokens")
    print(f"{'validation':<22}{'before':>10}{'after':>10}")
    print(f"{'perplexity':<22}{math.exp(before['eval_loss']):>10.2f}{math.exp(after['eval_loss']):>10.2f}")
    for name, key in (("NLL, nats a token", "loss"), ("token-level ECE", "ece"), ("token-level Brier", "brier")):
        print(f"{name:<22}{before[f'eval_{key}']:>10.4f}{after[f'eval_{key}']:>10.4f}")
    show_samples(model, tokenizer, validation.select(range(min(5, len(validation)))))
    if options.output:
        print("\nsaved as", ", ".join(sorted(path.name for path in options.output.iterdir())))


if __name__ == "__main__":
    main()
