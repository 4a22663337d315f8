"""Trains small text classifiers until they are too sure, and keeps their logits on rows that they have not seen.

Each is a bag of word and word-pair embeddings under one hidden layer, trained to (nearly) no error on its own rows.
The calibrators' benchmark reads the files `NAME.npz` in the cache folder; those that exist are not made again.

    python examples/benchmarks/text_logits.py --data FOLDER            # about a minute on two cores

FOLDER holds JSON lines, one folder for each set, with `train.jsonl`, `validation.jsonl` and, where its labels are
public, `test.jsonl`. Their public sources: `sst2`, `trec`, `rte` and `cb` from
github.com/tonyzhaozh/few-shot-learning (a tenth of TREC's training rows set aside for validation),
`tweeteval_emotion` from github.com/cardiffnlp/tweeteval, `clinc150` from github.com/clinc/oos-eval
(`train_small.jsonl` is its data_small.json).
"""

import argparse
import itertools
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


CACHE = Path.home() / ".cache" / "hf_calib" / "benchmark"
MIN_COUNT = 2
WIDTH = 64
BATCH_ROWS = 32


class TextSet(NamedTuple):
    """Where a set's texts and labels are, and how long a classifier learns them.

    `held_share` of the training rows are not trained on but kept with the validation rows, where too few rows have
    public labels.
    """

    folder: str
    label: str
    texts: tuple[str, ...] = ("text",)
    train: str = "train"
    held_share: float = 0.0
    epochs: int = 12


PAIR = ("premise", "hypothesis")
TEXT_SETS = {
    "sst2": TextSet("sst2", "label"),
    "trec": TextSet("trec", "label_name"),
    "trec_fine": TextSet("trec", "fine_label"),
    "emotion": TextSet("tweeteval_emotion", "label"),
    "clinc150": TextSet("clinc150", "label", train="train_small"),
    "rte": TextSet("rte", "label", PAIR, held_share=0.4),
    "cb": TextSet("cb", "label", PAIR, held_share=0.4, epochs=40),
}


class Bags(NamedTuple):
    """Rows of token numbers for `EmbeddingBag`: all tokens in one line, and where each row starts."""

    tokens: torch.Tensor
    starts: torch.Tensor

    def rows(self, chosen: torch.Tensor) -> "Bags":
        """The bags of these rows."""
        ends = torch.cat([self.starts[1:], torch.tensor([len(self.tokens)])])
        parts = [self.tokens[self.starts[row] : ends[row]] for row in chosen.tolist()]
        lengths = torch.tensor([len(part) for part in parts])
        return Bags(torch.cat(parts), lengths.cumsum(0) - lengths)


class BagClassifier(nn.Module):
    """Logits of one text, or of a pair from both bags, their difference and their product."""

    def __init__(self, vocabulary: int, num_texts: int, num_labels: int):
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocabulary, WIDTH, mode="mean")
        self.hidden = nn.Linear(WIDTH * (1 if num_texts == 1 else 4), 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, num_labels)

    def forward(self, texts: list[Bags]) -> torch.Tensor:
        """`(N, num_labels)` float32."""
        found = [self.embedding(bags.tokens, bags.starts) for bags in texts]
        if len(found) == 2:
            first, second = found
            found += [(first - second).abs(), first * second]
        return self.head(F.relu(self.hidden(torch.cat(found, dim=1))))


def words_and_pairs(text: str) -> list[str]:
    """Lower-case words and signs, then each two neighbours."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return words + [f"{first} {second}" for first, second in itertools.pairwise(words)]


def to_bags(texts: list[list[str]], vocabulary: dict[str, int]) -> Bags:
    """Token numbers; a text without a known token is the one token 0."""
    rows = [[vocabulary[token] for token in tokens if token in vocabulary] or [0] for tokens in texts]
    lengths = torch.tensor([len(row) for row in rows])
    return Bags(torch.tensor([token for row in rows for token in row]), lengths.cumsum(0) - lengths)


def read_rows(data: Path, found: TextSet) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows to train on, to calibrate on, and the set's own test rows, if any; no text of these is trained on."""

    def read(name: str) -> list[dict]:
        path = data / found.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    train, validation, test = read(found.train), read("validation"), read("test")
    order = np.random.default_rng(0).permutation(len(train))
    held = order[: round(found.held_share * len(train))]
    validation = [train[row] for row in held] + validation
    unseen = {text_of(row, found) for row in validation + test}
    rest = (train[row] for row in order[len(held) :])
    return [row for row in rest if text_of(row, found) not in unseen], validation, test


def text_of(row: dict, found: TextSet) -> tuple[str, ...]:
    """What a classifier sees of a row, in lower case."""
    return tuple(row[name].lower() for name in found.texts)


def train_classifier(texts: list[Bags], labels: torch.Tensor, vocabulary: int, num_labels: int, epochs: int):
    """A classifier after so many passes over its rows."""
    torch.manual_seed(0)
    model = BagClassifier(vocabulary, len(texts), num_labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(BATCH_ROWS):
            loss = F.cross_entropy(model([bags.rows(chosen) for bags in texts]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def make_logits(data: Path, found: TextSet) -> dict[str, np.ndarray]:
    """Logits and labels of calibration rows, then of test rows, and how many the first are.

    `num_calibration` is 0 where the set has no test rows of its own.
    """
    parts = read_rows(data, found)
    names = sorted({row[found.label] for rows in parts for row in rows})
    number = {name: index for index, name in enumerate(names)}
    tokens = [[[words_and_pairs(row[text]) for row in rows] for text in found.texts] for rows in parts]
    counts = Counter(token for column in tokens[0] for row in column for token in row)
    known = sorted(token for token, count in counts.items() if count >= MIN_COUNT)
    vocabulary = {token: index for index, token in enumerate(known, start=1)}
    train_labels = torch.tensor([number[row[found.label]] for row in parts[0]])
    with torch.enable_grad():
        bags = [to_bags(column, vocabulary) for column in tokens[0]]
        model = train_classifier(bags, train_labels, len(known) + 1, len(names), found.epochs)
    columns = [first + second for first, second in zip(tokens[1], tokens[2], strict=True)]
    labels = np.array([number[row[found.label]] for row in parts[1] + parts[2]])
    logits = model([to_bags(column, vocabulary) for column in columns]).numpy()
    train_accuracy = (model(bags).argmax(1) == train_labels).float().mean().numpy()
    own = len(parts[1]) if parts[2] else 0
    return {"logits": logits, "labels": labels, "num_calibration": np.array(own), "train_accuracy": train_accuracy}


def write_text_logits(data: Path, cache: Path) -> None:
    """Writes `NAME.npz` for every set that is in `data` and not yet in `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    for name, found in TEXT_SETS.items():
        path = cache / f"{name}.npz"
        if path.exists() or not (data / found.folder).exists():
            print(f"{name}: {'in the cache' if path.exists() else 'not in the data folder, skipped'}")
            continue
        started = time.perf_counter()
        made = make_logits(data, found)
        np.savez_compressed(path, **made)
        right = (made["logits"].argmax(1) == made["labels"]).mean()
        shape = "{} rows x {} classes".format(*made["logits"].shape)
        accuracy = f"accuracy {right:.3f}, {made['train_accuracy']:.3f} on its own rows"
        print(f"{name}: {shape}, {accuracy}, {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would be other logits; two threads are no faster
    write_text_logits(options.data, options.cache)


if __name__ == "__main__":
    main()
