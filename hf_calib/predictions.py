"""A model's raw logits on labelled rows: what calibrators are fitted on and reports are made from."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .attaching import folded_calibrator, in_eval_mode, is_folded, label_names_of, uncalibrated
from .folding import undoing_map
from .functional.checks import check_count


PROGRESS_NAME, LOGITS_NAME = "progress.json", "logits.npy"
PARTIAL = "partial-"  # in front of the name of a file that is being made
INCIDENTAL = ("_name_or_path", "transformers_version", "architectures", "dtype")  # of a config: where weights lie
NO_LIMIT = 2**31  # tokenizers that know no longest text say 10**30, which overflows


@dataclass(frozen=True)
class Predictions:
    """Raw logits and the labels that go with them, in the order of the data set."""

    logits: torch.Tensor  # (N, C) float32; memory-mapped when collected into a folder
    labels: torch.Tensor  # (N,) int64, ids of the model
    label_names: list[str]  # C names, in the order of the columns

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def probs(self) -> torch.Tensor:
        """The model's own probabilities, `(N, C)`."""
        return self.logits.softmax(-1)

    def fingerprint(self) -> str:
        """A short hash of every logit and label: which rows, under which weights."""
        digest = hashlib.sha256()
        for rows in (self.logits, self.labels):
            digest.update(rows.contiguous().numpy().data)
        return digest.hexdigest()[:16]


def collect_predictions(
    model: PreTrainedModel,
    dataset: Any,
    *,
    processing_class: Any = None,
    text_column: str | Sequence[str] = "text",
    label_column: str = "label",
    label_map: Mapping[str, str] | None = None,
    batch_size: int = 32,
    output_dir: str | Path | None = None,
    passes: int = 0,
    seed: int = 0,
) -> Predictions:
    """Runs a text classifier over labelled rows, with any attached calibrator suspended and any folded one undone.

    Labels are matched by name: the names of the data set's `ClassLabel` (or its strings) against the model's
    `id2label`. Equal numbers mean nothing when two lists are ordered differently: an integer is the label of that
    name, or a number only where the model's labels have no names (`LABEL_0`, `LABEL_1`, ...).

    Args:
        model ([`~transformers.PreTrainedModel`]): single-label sequence classification, on whatever device it is.
        dataset ([`~datasets.Dataset`]): labelled rows that the model was not trained on.
        processing_class (*optional*): the tokenizer; by default the one that lies beside the model.
        text_column (`str` or pair of `str`): the column that holds the text, or the two of a sentence pair.
        label_column (`str`): a `ClassLabel`, strings or integers.
        label_map (`dict`, *optional*): data set label name -> model label name, for names that differ.
        batch_size (`int`): rows of similar length that run together.
        output_dir (`str` or `Path`, *optional*): a folder that takes the logits as they come; an interrupted
            collection of the same rows by the same model goes on where it stopped, and a finished one is read back,
            memory-mapped.
        passes (`int`): 0 runs the model once, with nothing dropped. K runs it K times with its dropout (Monte Carlo
            dropout, Gal and Ghahramani 2016, arXiv 1506.02142): the logits are the logarithm of the mean probability.
        seed (`int`): of what is dropped.
    Returns:
        [`Predictions`]: `logits` `(N, C)` float32, `labels` `(N,)` int64.
    Raises:
        ValueError: a column is missing, a label is not one of the model's, the data set is empty, the model is no
            single-label classifier or holds a calibrator in its weights that only `load_calibrated` knows, or
            `output_dir` holds something else.
    """
    texts = [text_column] if isinstance(text_column, str) else list(text_column)
    if not 1 <= len(texts) <= 2:
        raise ValueError(f"text_column: got {len(texts)} columns; allowed are one, or the two of a sentence pair")
    _check_model(model)
    _check_dataset(dataset, [*texts, label_column])
    dataset = dataset.with_format(None)  # plain Python values, whatever it was set to
    check_count("batch_size", batch_size)
    if passes != 0:
        check_count("passes", passes)
    labels = torch.tensor(model_labels(dataset, label_column, model.config, label_map))
    tokenizer = processing_class if processing_class is not None else _tokenizer_of(model)
    _check_tokenizer(tokenizer)
    encoded = _encode(dataset, texts, tokenizer, model)
    shape = (len(labels), model.config.num_labels)
    drops = {} if passes == 0 else {"passes": passes, "seed": seed, "batch_size": batch_size}
    store = (
        _Store(shape)
        if output_dir is None
        else _FolderStore(shape, Path(output_dir), _digest(model, encoded, labels, drops))
    )
    _run(model, encoded, tokenizer, batch_size, store, passes, seed)
    return Predictions(torch.from_numpy(store.finished()), labels, label_names_of(model.config))


def average_predictions(predictions: Sequence[Predictions]) -> Predictions:
    """The predictions of several models of the same rows as those of one: a deep ensemble.

    Args:
        predictions (sequence of [`Predictions`]): of models that differ in their training, such as in its seed.
    Returns:
        [`Predictions`]: whose logits are the logarithm of the mean probability.
    Raises:
        ValueError: there is none, or their rows or labels differ.
    Source:
        Lakshminarayanan et al. 2017 (arXiv 1612.01474).
    """
    if len(predictions) == 0:
        raise ValueError("predictions: got none; allowed are those of one model or more")
    first = predictions[0]
    for number, other in enumerate(predictions):
        if other.label_names != first.label_names or not torch.equal(other.labels, first.labels):
            raise ValueError(f"predictions: number {number} is of other rows or labels than the first")
    return Predictions(_log_mean_probs([each.logits for each in predictions]), first.labels, first.label_names)


def _check_model(model: PreTrainedModel) -> None:
    config = model.config
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(f"model: got {type(model).__name__}; allowed are ...ForSequenceClassification models")
    if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"model: got problem_type={config.problem_type!r} with {config.num_labels} labels; "
            "allowed is single-label classification with at least two"
        )
    if is_folded(model) and folded_calibrator(model) is None:
        raise ValueError(
            "model: it has a calibrator in its weights; load it by hf_calib.load_calibrated, so that its raw logits "
            "are known"
        )


def _check_dataset(dataset: Any, columns: list[str]) -> None:
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset: got {type(dataset).__name__}; allowed is one split, a datasets.Dataset")
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"column: the data set has no {column!r}; it has {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError("dataset: got 0 rows; allowed are splits with at least one")


def model_labels(dataset: Any, column: str, config: Any, label_map: Mapping[str, str] | None) -> list[int]:
    """The model's id of each row's label, matched by name."""
    values, feature, known = dataset[column][:], dataset.features[column], label_names_of(config)
    names = getattr(feature, "names", None)
    if names is not None:
        values = [None if value is None or value < 0 else names[value] for value in values]
    elif not all(isinstance(value, str | int | None) for value in values):
        raise ValueError(f"{column}: got {feature}; allowed are a ClassLabel, strings or integers, one per row")
    unlabelled = [row for row, value in enumerate(values) if value is None]
    if unlabelled:
        have = "has" if len(unlabelled) == 1 else f"and {len(unlabelled) - 1} more have"
        raise ValueError(f"{column}: row {unlabelled[0]} {have} no label; leave such rows out")
    label_map = {str(source): str(target) for source, target in (label_map or {}).items()}
    _check_label_map(label_map, names, known)
    ids = _match_names(column, names or sorted(set(values), key=str), known, label_map)
    return [ids[value] for value in values]


def _check_label_map(label_map: dict[str, str], names: list[str] | None, known: list[str]) -> None:
    """`names` are the data set's; a column that is no `ClassLabel` may lack some of them in this split."""
    for source, target in label_map.items():
        if target not in known or (names is not None and source not in names):
            theirs = "a label of the data set" if names is None else f"one of the data set's [{', '.join(names)}]"
            raise ValueError(
                f"label_map: got {source}={target}; allowed is {theirs} = one of the model's [{', '.join(known)}]"
            )


def _match_names(column: str, names: list[Any], known: list[str], label_map: dict[str, str]) -> dict[Any, int]:
    """Data set label -> model id, or an error that prints both lists."""
    if known == [f"LABEL_{i}" for i in range(len(known))]:  # no names: a number is all that a label can be called
        label_map = {str(i): name for i, name in enumerate(known)} | label_map
    targets = {name: label_map.get(str(name), str(name)) for name in names}
    missing = [name for name, target in targets.items() if target not in known]
    if missing:
        raise ValueError(
            f"{column}: the model has no label {missing[0]!r}; the data set has [{', '.join(map(str, names))}], the "
            f"model has [{', '.join(known)}]; say which is which by label_map, such as {{'neg': 'NEGATIVE'}} "
            "(--label-map neg=NEGATIVE)"
        )
    return {name: known.index(target) for name, target in targets.items()}


def _tokenizer_of(model: PreTrainedModel) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError):
        raise ValueError(
            f"processing_class: got None and found no tokenizer beside the model {model.name_or_path!r}; pass it"
        ) from None


def _check_tokenizer(tokenizer: Any) -> None:
    """Where a model lies without its tokenizer, transformers makes an empty one up: every text is unknown to it."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"processing_class: the tokenizer of {tokenizer.name_or_path!r} knows special tokens only, as when its "
            "files are missing; pass the model's own"
        )


def _encode(dataset: Any, texts: list[str], tokenizer: Any, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Token ids of every row, cut to what the model can read."""
    columns = [dataset[column][:] for column in texts]
    for name, column in zip(texts, columns, strict=True):
        for row, text in enumerate(column):
            if not isinstance(text, str):
                raise ValueError(f"{name}: row {row} is {text!r}; allowed are strings")
    limit = max_length(tokenizer, model)
    encoded = tokenizer(*columns, truncation=limit is not None, max_length=limit)
    for row, tokens in enumerate(encoded["input_ids"]):
        if not tokens:
            raise ValueError(f"{' and '.join(texts)}: row {row} has no tokens; leave such rows out")
    return [{key: encoded[key][row] for key in encoded} for row in range(len(dataset))]


def max_length(tokenizer: Any, model: PreTrainedModel) -> int | None:
    """The most tokens that both can take, if there is a most. RoBERTa's first positions are kept for padding."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or NO_LIMIT]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            limits.append(module.num_embeddings - (-1 if module.padding_idx is None else module.padding_idx) - 1)
    return min((limit for limit in limits if 0 < limit < NO_LIMIT), default=None)


def _digest(model: PreTrainedModel, encoded: list[dict[str, Any]], labels: torch.Tensor, drops: dict[str, int]) -> str:
    """What was asked for: which rows, of which model, wherever it lies, and how it drops out, if it does."""
    config = json.loads(
        model.config.to_json_string(use_diff=False),
        object_hook=lambda part: {key: value for key, value in part.items() if key not in INCIDENTAL},
    )
    digest = hashlib.sha256(json.dumps([encoded, labels.tolist(), config, *([drops] if drops else [])]).encode())
    folded = folded_calibrator(model)
    for name, tensor in [*model.state_dict().items(), *({} if folded is None else folded.tensors()).items()]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _run(
    model: PreTrainedModel,
    encoded: list[dict],
    tokenizer: Any,
    batch_size: int,
    store: _Store,
    passes: int,
    seed: int,
) -> None:
    """Fills the store batch by batch, longest rows first: what does not fit into memory fails at once."""
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]["input_ids"]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    undo = undoing_map(model)

    def predict(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits = model(**inputs, return_dict=True).logits.float()
        return logits if undo is None else undo(logits).float()

    try:
        with torch.inference_mode(), in_eval_mode(model), uncalibrated(model):
            for batch in logging.tqdm(batches, desc="Predicting", unit="batch"):
                if store.done[batch].all():
                    continue
                inputs = tokenizer.pad([encoded[row] for row in batch], return_tensors="pt").to(model.device)
                if passes == 0:
                    logits = predict(inputs)
                else:  # a batch drops the same whether or not others have run before it
                    with _dropping_out(model, seed=seed + batch[0]):
                        logits = _log_mean_probs([predict(inputs) for _ in range(passes)])
                store.put(batch, logits.cpu().numpy())
    finally:
        store.flush()


@contextmanager
def _dropping_out(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Within the block, dropout drops as in training, from this seed; what learns from batches does not."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        try:
            yield
        finally:
            model.eval()


def _log_mean_probs(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([each.log_softmax(-1) for each in logits]).logsumexp(0) - math.log(len(logits))


class _Store:
    """Logits in memory, and which rows are there."""

    def __init__(self, shape: tuple[int, int]):
        self.logits, self.done = np.empty(shape, dtype=np.float32), np.zeros(shape[0], dtype=bool)

    def put(self, rows: list[int], logits: np.ndarray) -> None:
        if not np.isfinite(logits.max(-1)).all():
            raise ValueError("logits: the model returned NaN or infinite values; check its weights and precision")
        self.logits[rows] = logits
        self.done[rows] = True

    def flush(self) -> None:
        """Nothing to do in memory."""

    def finished(self) -> np.ndarray:
        """All of the logits."""
        return self.logits


class _FolderStore(_Store):
    """The same in a `.npy` file that an interrupted run leaves usable: a row that is not there yet is NaN."""

    def __init__(self, shape: tuple[int, int], folder: Path, request: str):
        self.file, progress = folder / LOGITS_NAME, folder / PROGRESS_NAME
        partial = folder / (PARTIAL + PROGRESS_NAME)
        if not folder.exists() or (folder.is_dir() and set(folder.iterdir()) <= {partial}):
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"request": request}))
            os.replace(partial, progress)  # first: from here on the folder is ours, whatever interrupts
        try:
            if json.loads(progress.read_text()) != {"request": request}:
                raise ValueError("another request")
            self.logits = self._open(shape)
        except (FileNotFoundError, NotADirectoryError, EOFError, ValueError):
            raise ValueError(
                f"output_dir: got {folder}, which holds something else, or damaged files; allowed are a new folder, "
                "or one that holds predictions of the same model on the same rows"
            ) from None
        self.done = ~np.isnan(self.logits).any(-1)

    def _open(self, shape: tuple[int, int]) -> np.ndarray:
        if not self.file.exists():
            partial = self.file.with_name(PARTIAL + LOGITS_NAME)
            np.save(partial, np.broadcast_to(np.float32(np.nan), shape))
            os.replace(partial, self.file)
        found = np.load(self.file, mmap_mode="r")  # refuses a file that is too short; "r+" would fill it up with zeros
        if found.shape != shape or found.dtype != np.float32:
            raise ValueError("another array")
        return np.load(self.file, mmap_mode="r+")

    def flush(self) -> None:
        self.logits.flush()

    def finished(self) -> np.ndarray:
        return np.load(self.file, mmap_mode="c")  # what a user does to the tensor stays out of the file
