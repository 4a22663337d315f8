"""Training and greedy generation of encoder-decoders of one size: CalibTransformer beside Bart, Marian and T5.

The terms are equal: float32 on two threads, SDPA, tied embeddings, dropout 0, as many heads for keys as for queries,
no `torch.compile`, and parameters within 2 % of each other where the architectures allow it. The models take turns in
one process, so that a machine that slows down slows all of them down; a product of two large matrices takes its turn
too, for the share of the machine's peak that training reaches. Memory is that of a process of its own for each model.
The medians go to `results/transformer.json`.

    python examples/benchmarks/transformer.py            # some nine minutes on two cores
    python examples/benchmarks/transformer.py --rounds 2 --new-tokens 32
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from environment import write_result
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_calib import CalibTransformerConfig, CalibTransformerForConditionalGeneration


VOCAB, SIZE, LAYERS, HEADS, INNER, POSITIONS = 8_000, 256, 4, 8, 1_024, 514
TRAIN_ROWS, GENERATE_ROWS, LENGTH = 32, 8, 64
PEAK_SIZE = 2_048
RESULT = Path(__file__).parent / "results" / "transformer.json"
PEERS = ("Bart", "Marian", "T5")
OURS = ("CalibTransformer", "CalibTransformer, vanilla")


def make_model(name: str) -> nn.Module:
    """The model of this name, with random weights."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    common = {**tokens, "vocab_size": VOCAB, "tie_word_embeddings": True, "attn_implementation": "sdpa"}
    if name == "T5":
        sizes = {"d_model": SIZE, "d_kv": SIZE // HEADS, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS}
        return T5ForConditionalGeneration(T5Config(dropout_rate=0.0, **sizes, **common))
    if name in ("Bart", "Marian"):
        sizes = {"d_model": SIZE, "max_position_embeddings": POSITIONS}
        for side in ("encoder", "decoder"):
            sizes |= {f"{side}_layers": LAYERS, f"{side}_attention_heads": HEADS, f"{side}_ffn_dim": INNER}
        bart = name == "Bart"
        config, model = (BartConfig, BartForConditionalGeneration) if bart else (MarianConfig, MarianMTModel)
        return model(config(dropout=0.0, activation_dropout=0.0, forced_eos_token_id=None, **sizes, **common))
    common |= {"dropout": 0.0, "max_position_embeddings": POSITIONS}
    if name == "CalibTransformer":
        sizes = {"hidden_size": SIZE, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
        return CalibTransformerForConditionalGeneration(CalibTransformerConfig(**sizes, **common))
    # A wider feed-forward block makes up for the tables of positions that Bart and Marian count as parameters
    sizes = {"d_model": SIZE, "nhead": HEADS, "num_layers": LAYERS, "intermediate_size": INNER + 32}
    return CalibTransformerForConditionalGeneration(CalibTransformerConfig.vanilla(**sizes, **common))


def random_tokens(rows: int) -> torch.Tensor:
    """Tokens `(rows, LENGTH)` without special ones."""
    return torch.randint(3, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(rows))


def trainer(model: nn.Module) -> Callable[[], None]:
    """A function that takes one step of AdamW."""
    model.train()
    tokens = random_tokens(TRAIN_ROWS)
    mask = torch.ones_like(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def generator(model: nn.Module, new_tokens: int) -> Callable[[], None]:
    """A function that generates exactly so many tokens for each row, greedily."""
    model.eval()
    tokens = random_tokens(GENERATE_ROWS)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}

    def generate() -> None:
        found = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
        if found.shape != (GENERATE_ROWS, new_tokens + 1):
            raise RuntimeError(f"generated {tuple(found.shape)}")

    return generate


def median_seconds(jobs: dict[str, Callable[[], None]], rounds: int, what: str) -> dict[str, float]:
    """Median seconds of each job; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if turn:  # the first time warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(what, {name: float(f"{value:.3g}") for name, value in medians.items()}, flush=True)
    return medians


def peak_memory(name: str, checkpointing: bool) -> float:
    """Megabytes that two steps of training take, in a process of its own, beyond those of the imports."""
    command = [sys.executable, __file__, "--memory", name, *(["--checkpointing"] if checkpointing else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def report_memory(name: str, checkpointing: bool) -> None:
    """What the process of `peak_memory` does."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = make_model(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
    step = trainer(model)
    step()
    step()
    unit = 1 if sys.platform == "darwin" else 1024
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 1e6)


def measure(rounds: int, new_tokens: list[int]) -> dict[str, dict]:
    """Speed and memory of every model, by name."""
    found: dict[str, dict] = {}
    # First, because a process inherits the peak of the one that starts it
    for name in (*PEERS, *OURS):
        plain, checkpointing = peak_memory(name, checkpointing=False), peak_memory(name, checkpointing=True)
        found[name] = {"training_megabytes": plain, "training_megabytes_with_checkpointing": checkpointing}
    models = {name: make_model(name) for name in found}
    for name, model in models.items():
        found[name]["parameters"] = sum(parameter.numel() for parameter in model.parameters())

    square = torch.randn(PEAK_SIZE, PEAK_SIZE)
    jobs = {name: trainer(model) for name, model in models.items()}
    seconds = median_seconds({**jobs, "product": lambda: square @ square}, 3 * rounds, "training step, s")
    peak = 2 * PEAK_SIZE**3 / seconds.pop("product")
    for name, value in seconds.items():
        found[name]["training_tokens_per_second"] = 2 * TRAIN_ROWS * LENGTH / value
        found[name]["share_of_peak"] = matrix_operations(models[name]) / value / peak
        found[name]["generated_tokens_per_second"] = {}
    for tokens in new_tokens:
        jobs = {name: generator(model, tokens) for name, model in models.items()}
        # Few tokens are soon generated, so their rounds are more
        for name, value in median_seconds(jobs, rounds * max(1, 256 // tokens), f"{tokens} tokens, s").items():
            found[name]["generated_tokens_per_second"][str(tokens)] = GENERATE_ROWS * tokens / value
    return found


def matrix_operations(model: nn.Module) -> float:
    """Multiplications and additions of the matrix products of a step: forward, and twice that backward."""
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    attention = 2 * 3 * LAYERS * LENGTH * SIZE  # scores and values of three attentions, for each token
    return 3 * 2 * TRAIN_ROWS * LENGTH * (weights + attention)


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    if options.memory:
        report_memory(options.memory, options.checkpointing)
        return
    found = measure(options.rounds, options.new_tokens)
    record = {
        "what": f"encoder-decoders of {LAYERS} + {LAYERS} layers of {SIZE}, {HEADS} heads, {VOCAB} tokens; training "
        f"with AdamW on {TRAIN_ROWS} x ({LENGTH} + {LENGTH}) tokens, greedy generation of {GENERATE_ROWS} x {LENGTH}",
        "rounds": options.rounds,
        "models": found,
    }
    write_result(options.output, record, "hf_calib", "torch", "transformers")


if __name__ == "__main__":
    main()
