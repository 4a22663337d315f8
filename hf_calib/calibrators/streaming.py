"""Temperature from batches that are read once: sums at a few temperatures stand for all rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..functional.checks import describe
from .hermite import interpolate, rising_root
from .rows import check_rows, two_class_logits


# Inverse temperatures in units of the first rows' optimum: powers of one exponential, close to evenly spaced in
# log T, and such that the polynomial through three derivatives at each is off by far less than 1e-3 between them.
NODES = np.array([0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0])
HALF_WIDTH = math.log(2)
RANGE = 1.8  # the optimum may be this many times the first rows' or a fraction of it: 2 less the centre's rounding
CENTRE_UNIT = HALF_WIDTH / 4  # of log T, so that processes and other splits mostly sum at the very same nodes
FIRST_ROWS, FIRST_LOGITS = 10_000, 2**21  # batches are kept until there are so many rows or logits
START_LOGITS = 2**23  # of these, so many at most find the centre
BLOCK_LOGITS = {"cpu": 2**17, "cuda": 2**21}  # worked on at a time
LOWEST_EXPONENT = -86.0  # of a normal float32
MAX_DOUBT = 1e-2  # between the polynomial and a coarser one, in log T: its own error is a tenth of that or less


class StreamedTemperature(NamedTuple):
    """What a stream says; the temperature is 1 where every row is constant."""

    temperature: float
    num_labels: int
    num_rows: int
    is_separable: bool  # the best had the least sure row been wrong
    is_flat: bool  # the first rows' highest, where all classes are equally probable


class Start(NamedTuple):
    """What `start` makes of the first rows: `log_t` is None where they are constant."""

    log_t: float | None
    is_flat: bool


def stream_temperature(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    start: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Start],
    *,
    ignore_index: int,
    task: str | None = None,
) -> StreamedTemperature:
    """The temperature of lowest NLL over all batches, of all processes where `torch.distributed` is initialised.

    Args:
        batches (iterable of `(logits, labels)`): as in `TemperatureScaling.fit_batches`.
        start (callable): finds the optimum of the first rows from logits, labels and weights.
    Raises:
        ValueError: a batch is wrong, there is no row, or the optimum is out of range.
    """
    reader = BatchReader(batches, ignore_index, task)
    first, error, message = [], None, [0.0] * 5
    try:
        first = reader.first()
        message = _start_message(first, start, reader)
    except Exception as caught:  # the others would wait for this process
        error = caught
    centre, is_flat, num_labels = _agree_on_start(gather(message, error))
    error, message = None, [0.0] * (4 + 3 * len(NODES))
    try:
        message = _sum_up(first, reader, math.exp(centre))
    except Exception as caught:
        error = caught
    messages = gather(message, error)
    rows, wrong, label_sum = messages[:, :3].sum(0)
    if rows == 0:
        raise ValueError(f"labels: no row of any batch is left after leaving out ignore_index={ignore_index}")
    if wrong == 0:  # separable: the optimum with the runner-up as the label in the row where it is closest
        label_sum -= messages[:, 3].min()
    sums = messages[:, 4:].sum(0).reshape(len(NODES), 3)
    if not sums[:, 1:].any():
        return StreamedTemperature(1.0, num_labels, int(rows), False, False)
    objective = nll_derivatives(NODES, sums / rows, label_sum / rows * math.exp(-centre))
    if is_flat and objective[-1, 1] < 0:
        return StreamedTemperature(math.exp(centre), num_labels, int(rows), wrong == 0, True)
    return StreamedTemperature(
        math.exp(centre + _optimum(objective, centre)), num_labels, int(rows), wrong == 0, False
    )


class BatchReader:
    """Batches with checked shapes, flat; none is held while the next one is made."""

    def __init__(self, batches: Iterable, ignore_index: int, task: str | None):
        self.ignore_index, self.task = ignore_index, task
        self.number, self.num_labels = -1, 0  # of the last batch; of classes, 0 before the first
        self.batches = self._read(iter(batches))

    def _read(self, batches: Iterator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while (batch := next(batches, None)) is not None:
            self.number += 1
            logits, labels = self._flat(batch)
            del batch
            if len(labels):
                yield logits, labels
            del logits, labels

    def first(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches until they hold rows enough to start with, checked; copies, for callers may use a tensor again."""
        first, rows = [], 0
        for logits, labels in self.batches:
            kept = self.kept(logits, labels)
            rows += 0 if kept is None else len(kept[1])
            del kept
            first.append((logits, labels))
            if rows >= FIRST_ROWS or sum(z.numel() for z, _ in first) >= FIRST_LOGITS:
                break
            first[-1] = (logits.clone(), labels.clone())
            del logits, labels
        return first

    def kept(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rows that are not ignored; a ValueError with the batch's number says what is wrong with their values."""
        if not bool((labels != self.ignore_index).any()):
            return None
        try:
            rows = check_rows(logits, labels, ignore_index=self.ignore_index)
        except ValueError as error:
            raise self.error(str(error)) from None
        return rows.logits, rows.labels

    def error(self, reason: str) -> ValueError:
        return ValueError(f"{reason} (in batch {self.number})")

    def _flat(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            logits, labels = batch
        except (TypeError, ValueError):
            raise self.error(f"batches: got {type(batch).__name__}; allowed are pairs of logits and labels") from None
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
            raise self.error(f"logits: got {describe(logits)}; allowed are floating torch tensors")
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            raise self.error(f"labels: got {describe(labels)}; allowed are integer classes")
        if self.task == "binary" and logits.shape in (labels.shape, (*labels.shape, 1)):
            logits = two_class_logits(logits.reshape(labels.shape))
        if logits.dim() < 1 or logits.shape[-1] < 2 or logits.shape[:-1] != labels.shape:
            allowed = "one logit for each label" if self.task else "(..., C) logits of at least two classes"
            raise self.error(
                f"logits: got shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}; allowed are "
                f"{allowed} for (...) labels"
            )
        self.num_labels = self.num_labels or logits.shape[-1]
        if logits.shape[-1] != self.num_labels:
            raise self.error(f"logits: got {logits.shape[-1]} classes; those before have {self.num_labels}")
        labels = labels.detach().reshape(-1).to(logits.device, torch.int64, non_blocking=True)
        return logits.detach().reshape(-1, self.num_labels), labels


def _start_message(
    first: list[tuple[torch.Tensor, torch.Tensor]], start: Callable, reader: BatchReader
) -> list[float]:
    """Number of classes, rows, rows that tell a temperature, its logarithm times these, and rows where it is flat."""
    rows = [kept for batch in first if (kept := reader.kept(*batch)) is not None]
    if not rows:
        return [reader.num_labels, 0, 0, 0, 0]
    number = sum(len(labels) for _, labels in rows)
    share = min(1.0, FIRST_ROWS / number, START_LOGITS / (number * reader.num_labels))
    if share < 1:
        rows = [_subsample(*kept, share) for kept in rows]
    logits, labels = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*rows, strict=True))
    log_t, is_flat = start(logits, labels, torch.ones(len(labels), dtype=torch.float64, device=logits.device))
    telling = 0 if log_t is None else number
    return [reader.num_labels, number, telling, telling * (log_t or 0.0), telling * is_flat]


def _subsample(logits: torch.Tensor, labels: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows, at least one; drawn, for a stride may match the length of sequences."""
    some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: math.ceil(share * len(labels))]
    some = some.to(logits.device)
    return logits[some], labels[some]


def _agree_on_start(messages: np.ndarray) -> tuple[float, bool, int]:
    """The centre, whether all first rows are flat there, and the number of classes."""
    classes = {int(number) for number in messages[:, 0] if number}
    if len(classes) > 1:
        raise ValueError(f"logits: got {sorted(classes)} classes in different processes; allowed is one number")
    _, _, telling, log_t, flat = messages.sum(0)
    centre = CENTRE_UNIT * round(log_t / telling / CENTRE_UNIT) if telling else 0.0
    return centre, bool(telling) and flat == telling, classes.pop() if classes else 0


def _sum_up(first: list, reader: BatchReader, temperature: float) -> list[float]:
    """Rows, wrong rows, the sum of the labels' logits below the best, the closest runner-up, and sums at the nodes."""
    totals, wrong = torch.zeros(3 + 3 * len(NODES), dtype=torch.float64), 0.0
    closest = torch.tensor(torch.inf, dtype=torch.float64)
    while first or reader.batches is not None:
        batch = first.pop(0) if first else next(reader.batches, None)
        if batch is None:
            break
        logits, labels = batch
        del batch
        sums, bad, gap = _batch_sums(logits, labels, reader.ignore_index, temperature, find_gap=wrong == 0)
        totals, closest = totals.to(sums.device) + sums, closest.to(sums.device).minimum(gap)
        bad, wrong = torch.stack([bad, totals[1]]).tolist()  # the one time that a GPU is waited for
        if bad:
            reader.kept(logits, labels)  # says what is wrong
        del logits, labels
    rows, wrong, label_sum, *sums = totals.tolist()
    return [rows, wrong, label_sum, closest.item(), *sums]


def _batch_sums(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, temperature: float, *, find_gap: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over the rows of a batch, the number of bad rows, and the least distance of a runner-up from the best."""
    sums = torch.zeros(3 + 3 * len(NODES), dtype=torch.float64, device=logits.device)
    bad, gap = sums.new_zeros(()), sums.new_full((), torch.inf)
    for z, y in split_rows(logits, labels):
        kept = y != ignore_index
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        best = z.amax(-1, keepdim=True)
        happened = z.gather(-1, y.clamp(0, z.shape[-1] - 1)[:, None]).double() - best.double()
        happened = happened[:, 0]
        in_range = (y >= 0) & (y < z.shape[-1])
        bad += (kept & ~(best[:, 0].isfinite() & happened.isfinite() & in_range)).sum()
        if find_gap:
            runner_up = z.masked_fill(z == best, -torch.inf).amax(-1)
            gap = gap.minimum((best[:, 0].double() - runner_up.double()).masked_fill(~kept, torch.inf).min())
        own = torch.stack([torch.ones_like(happened), (happened < 0).double(), happened])
        nodes = _node_values((z - best) * (1 / temperature))
        sums += torch.cat([own, nodes.double()]).where(kept, 0).sum(-1)
    return sums, bad, gap


def _node_values(u: torch.Tensor) -> torch.Tensor:
    """`log sum exp(b u)` and its first two derivatives in `log b` at each of the nodes `b`: `(3 * nodes, rows)`.

    Args:
        u (`torch.Tensor` of shape `(rows, C)`): centred logits over the temperature in the centre.
    """
    values = []
    # Floors keep every power a normal number, for others are slow; what they change is below e^-43
    for unit, powers in ((1 / 8, (4, 5, 6)), (1 / 4, (4, 5, 6, 8))):
        v = u.clamp_min(LOWEST_EXPONENT / (unit * powers[-1]))
        one = (v * unit).exp_()
        two = one * one
        four = two * two
        made = {8: four * four} if 8 in powers else {}
        made |= {5: one.mul_(four), 6: two.mul_(four), 4: four}
        for power in powers:
            b, e = unit * power, made.pop(power)
            m0 = e.sum(-1)
            m1 = e.mul_(v).sum(-1) / m0
            m2 = e.mul_(v).sum(-1) / m0
            values += [m0.log(), b * m1, b * m1 + b * b * (m2 - m1 * m1)]
    return torch.stack(values)


def split_rows(logits: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in blocks that a cache holds."""
    rows = max(1, BLOCK_LOGITS.get(logits.device.type, BLOCK_LOGITS["cpu"]) // logits.shape[-1])
    return zip(logits.split(rows), labels.split(rows), strict=True)


def nll_derivatives(nodes: np.ndarray, means: np.ndarray, label_mean: float) -> np.ndarray:
    """Mean NLL and its first two derivatives in log T at each inverse temperature: `(nodes, 3)`.

    Args:
        means (`(nodes, 3)`): of `log sum exp(b u)` and its first two derivatives in `log b`, over rows.
        label_mean (`float`): of the label's u.
    """
    return (means - (nodes * label_mean)[:, None]) * np.array([1, -1, 1])  # log T is log b turned


def _optimum(objective: np.ndarray, centre: float) -> float:
    """Where the NLL is lowest: log T less the centre; a ValueError where it is outside of the nodes."""
    slopes = objective[:, 1]
    if not slopes[-1] < 0 < slopes[0]:
        low, high = math.exp(centre) / RANGE, math.exp(centre) * RANGE
        raise ValueError(
            f"batches: the optimum lies {'above' if slopes[0] <= 0 else 'below'} {low:.4g} to {high:.4g}, the range "
            f"around the first rows' temperature in which one pass finds it. Shuffle the rows, or put more of them "
            "into the first batch"
        )
    hot = int((slopes > 0).nonzero()[0][-1])  # the last node, from hot to cold, that is too hot
    bracket = -np.log(NODES[hot + 1]), -np.log(NODES[hot])
    fine, coarse = (
        rising_root(interpolate(-np.log(NODES), objective, orders, HALF_WIDTH).deriv(), *bracket)
        for orders in ((0, 1, 2), (1, 2))
    )
    if not abs(fine - coarse) < MAX_DOUBT:
        raise ValueError(
            "batches: the rows' logits are so alike that the NLL changes too abruptly with the temperature for one "
            "pass. Use fit on a sample of the rows"
        )
    return fine


def gather(message: Sequence[float], error: Exception | None) -> np.ndarray:
    """The message of every process, one a row; raises in all of them when one has failed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        if error is not None:
            raise error
        return np.array([message])
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    own = torch.tensor([float(error is not None), *message], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, own)
    if error is not None:
        raise error
    gathered = torch.stack(everyone).cpu().numpy()
    if (failed := gathered[:, 0].nonzero()[0]).size:
        raise ValueError(f"batches: process {failed[0]} failed; its own error says why")
    return gathered[:, 1:]
