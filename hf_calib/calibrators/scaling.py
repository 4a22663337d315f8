"""Calibrators that scale logits."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from .base import Calibrator
from .rows import warn_caller
from .streaming import Start, stream_temperature


BLOCK_ELEMENTS = 2**19  # logits worked on at a time: small enough for a cache, large enough for a call to pay
START_ROWS = 2000  # rows of the random subsample that starts the search
MAX_PASSES = 60
# How far T may lie above the logits' spread: beyond e^9 a softmax is uniform to four digits. Below it T may lie as
# far as float32 goes, since a few huge entries, such as masks of -1e9, can be all of that spread.
LOG_RANGE = 9.0
LOWEST, HIGHEST = -87.0, 88.0  # log T of normal float32 numbers
# A third-order step of this length in log T leaves an error of its cube, far below 1e-7 nats.
LAST_STEP = 0.04
SEPARABLE = "every label is the most probable class; took the best one had the least sure row been wrong (at most 1)"
FLAT = "the logits do not predict the labels; took {:.3g}, which makes all classes equally probable"


class TemperatureScaling(Calibrator):
    r"""Divides logits by one number: $z / T$.

    *When to use:* first. One parameter, needs few rows, cannot change which class is on top.

    Attributes:
        temperature (`torch.Tensor` of shape `()`, float32): above 1 where the model was too sure of itself.
    Source:
        Guo et al. 2017 (arXiv 1706.04599), section 4.2. Where LBFGS is usual, the NLL, convex in $1/T$, is minimised
        by third-order steps in $\log T$, kept inside a shrinking bracket.
    Example:
        >>> import torch
        >>> p = torch.tensor([0.8, 0.2])  # what really happens: class 0 eight times in ten
        >>> logits = (2.5 * p.log()).expand(10, 2)  # what the model says: far too sure
        >>> calibrator = TemperatureScaling().fit(logits, torch.tensor([0] * 8 + [1] * 2))
        >>> round(calibrator.temperature.item(), 4)
        2.5
    """

    name = "temperature"
    tensor_names = ("temperature",)
    preserves_accuracy = True
    contains_identity = True
    is_affine = True
    scales_alike = True

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        temperature = fit_temperature(logits, labels, weights)
        return {"temperature": torch.tensor(temperature, dtype=torch.float32, device=logits.device)}

    def fit_batches(
        self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, ignore_index: int = -100
    ) -> TemperatureScaling:
        r"""Fits on a stream that is read once, in memory that does not depend on the number of rows.

        The NLL and its first two derivatives in $\log T$, summed at seven temperatures around the optimum of the first
        rows (10,000 rows or two million logits, at least one batch), give the optimum of all rows: to 1e-3, mostly
        1e-6, of $T$ if it lies within 1.8 times and 1 / 1.8 times that of the first rows.

        Where `torch.distributed` is initialised, every process calls this with its own rows, if any, and gets the
        temperature of all.

        Args:
            batches (iterable of `(logits, labels)`): `(..., C)` floating and `(...)` integer in `[0, C)`, as in `fit`.
            ignore_index (`int`): rows with this label are left out.
        Returns:
            the calibrator itself.
        Raises:
            ValueError: naming the argument, the value, what is allowed and the batch, counted from 0; or the optimum
                is out of that range, as in a stream that is sorted. The fitted state is then unchanged.
        """
        if self.task == "multilabel":
            raise ValueError('task: got "multilabel"; allowed are None and "binary". Use fit')
        with torch.no_grad():
            found = stream_temperature(batches, _start, ignore_index=ignore_index, task=self.task)
        temperature = found.temperature
        if found.is_separable:
            _warn(SEPARABLE)
            temperature = min(temperature, 1.0)
        elif found.is_flat:
            _warn(FLAT.format(temperature))
        self.set_tensors({"temperature": torch.tensor(temperature)}, num_labels=1 if self.task else found.num_labels)
        self.provenance = {"rows": found.num_rows}
        return self

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        return temperature_problem(tensors["temperature"])

    def extra_repr(self) -> str:
        fitted = self.temperature is not None and not self.temperature.is_meta
        return f"temperature={self.temperature.item():.4f}, {super().extra_repr()}" if fitted else super().extra_repr()

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        # Half-precision logits are divided in float32: torch would round T itself to the logits' dtype otherwise
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # A T below 1 would take a finite mask, such as torch.finfo(dtype).min, to -inf
        return in_dtype_of(logits, wide / self.temperature)


def temperature_problem(temperature: torch.Tensor) -> str | None:
    """What is wrong with a fitted temperature, if anything is."""
    if temperature.dim() > 0 or temperature <= 0:
        return f"temperature is {temperature.tolist()}; allowed is one number above 0"
    return None


def in_dtype_of(logits: torch.Tensor, calibrated: torch.Tensor) -> torch.Tensor:
    """Calibrated logits in the dtype of those given: finite, but for what was not."""
    limits = torch.finfo(logits.dtype)
    return calibrated.clamp(limits.min, limits.max).where(logits.isfinite(), logits).to(logits.dtype)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> float:
    """The temperature of lowest NLL, at most `e**LOG_RANGE` times the logits' spread.

    A random subsample starts the search, so that one or two passes over all rows end it.

    Args:
        logits (`torch.Tensor` of shape `(N, C)`, floating, checked).
        labels (`torch.Tensor` of shape `(N,)`, int64).
        weights (`torch.Tensor` of shape `(N,)`, float64).
    Warns:
        UserWarning: no finite temperature is best, because no row is wrong, or because the logits do not predict
        labels.
    """
    log_t, is_flat, is_separable = _search(logits, labels, weights)
    if log_t is None:
        return 1.0  # every row is constant: all temperatures are the same
    temperature = math.exp(log_t)
    if is_separable:
        _warn(SEPARABLE)
        return min(temperature, 1.0)
    if is_flat:
        _warn(FLAT.format(temperature))
    return temperature


def _start(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> Start:
    """The optimum of a stream's first rows."""
    return Start(*_search(logits, labels, weights)[:2])


def _search(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[float | None, bool, bool]:
    """The best log T, None of constant rows; whether none is best, with all classes equal; whether none is wrong."""
    is_large = len(logits) > 2 * START_ROWS
    some = slice(None)
    if is_large:  # drawn, for a stride may match the length of sequences
        some = torch.randint(len(logits), (START_ROWS,), generator=torch.Generator().manual_seed(0)).to(logits.device)
    spread = _spread(logits[some]) or _spread(logits)
    if spread == 0:
        return None, False, False
    ceiling = min(math.log(spread) + LOG_RANGE, HIGHEST)
    if separable := _is_separable(logits, labels):
        labels = _flip_least_sure(logits, labels)
    margin = _margin(logits[some], labels[some]) or _margin(logits, labels)
    log_t = min(max(math.log(margin), LOWEST), ceiling)
    if is_large and not _is_separable(logits[some], labels[some]):
        log_t = _minimise(logits[some], labels[some], weights[some], log_t, ceiling)
    log_t = _minimise(logits, labels, weights, log_t, ceiling)
    return log_t, log_t == ceiling, separable


def _warn(reason: str) -> None:
    warn_caller(f"temperature: no finite value is best, because {reason}. Fit on more rows.")


def _is_separable(logits: torch.Tensor, labels: torch.Tensor) -> bool:
    return bool((logits.gather(-1, labels[:, None])[:, 0] == logits.amax(-1)).all())


def _flip_least_sure(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The labels with the runner-up, which is no equal of the best, in the row where it is closest."""
    best = logits.amax(-1, keepdim=True)
    runner_up = logits.masked_fill(logits == best, -torch.inf).max(-1)
    row = (best[:, 0] - runner_up.values).argmin()
    labels = labels.clone()
    labels[row] = runner_up.indices[row]
    return labels


def _spread(logits: torch.Tensor) -> float:
    """Mean distance of finite logits from their row's largest, in the logits' unit."""
    total, number = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for z in logits.split(max(1, BLOCK_ELEMENTS // logits.shape[-1])):
        below = z.amax(-1, keepdim=True).double() - z.double()
        finite = below.isfinite()
        total += below.where(finite, 0).sum()
        number += finite.sum()
    return float(total / number)


def _margin(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Median distance of the label's logit from the best other one, where they differ; no mask reaches it."""
    happened = logits.gather(-1, labels[:, None])[:, 0].double()
    others = logits.scatter(-1, labels[:, None], -torch.inf).amax(-1).double()
    distance = (happened - others).abs()
    distance = distance[distance.isfinite() & (distance > 0)]
    return float(distance.median()) if len(distance) else 0.0


def _minimise(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, log_t: float, high: float) -> float:
    """Safeguarded third-order steps on the NLL as a function of log T, from `log_t`; at most `high`."""
    low = LOWEST
    for _ in range(MAX_PASSES):
        slope, curvature, third = _derivatives(logits, labels, weights, math.exp(log_t))
        # The NLL is convex in 1 / T, so the sign of the slope tells on which side of here the optimum lies
        low, high = (log_t, high) if slope < 0 else (low, log_t)
        step = _step(slope, curvature, third)
        if not low <= log_t + step <= high:
            step = min(max((low + high) / 2 - log_t, -LOG_RANGE / 2), LOG_RANGE / 2)
        elif abs(step) < LAST_STEP:
            return log_t + step
        if high - low < 1e-6:
            return high  # where it began when nothing below it is flat enough
        log_t += step
    return log_t


def _step(slope: float, curvature: float, third: float) -> float:
    """Halley's step to where the slope vanishes; NaN, which no bracket holds, where it is no guide.

    Near an inflection, where the NLL stops being convex in log T, it is far shorter than Newton's and means nothing.
    """
    denominator = 2 * curvature * curvature - slope * third
    is_guide = curvature > 0 and 0 < denominator <= 4 * curvature * curvature
    return -2 * slope * curvature / denominator if is_guide else math.nan


def _derivatives(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, temperature: float
) -> tuple[float, float, float]:
    """First three derivatives of the mean NLL in log T, in one pass over blocks of rows."""
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    rows = max(1, BLOCK_ELEMENTS // logits.shape[-1])
    for z, y, w in zip(logits.split(rows), labels.split(rows), weights.split(rows), strict=True):
        sums += row_derivatives(z, y, temperature) @ w
    return tuple((sums / weights.sum()).tolist())


def row_derivatives(logits: torch.Tensor, labels: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """First three derivatives of each row's NLL in log T, `(3, N)` float64, at one temperature or `(N, 1)` of them.

    They follow from the mean, variance and third central moment of z / T under softmax(z / T).
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = (z - z.amax(-1, keepdim=True)) / temperature
    z.clamp_min_(-1e6)  # -inf and its like: exp gives 0, and 0 times a finite number stays 0
    e = z.exp()
    m0 = e.sum(-1)
    m1, m2, m3 = (e.mul_(z).sum(-1) / m0 for _ in range(3))
    happened = z.gather(-1, labels[:, None])[:, 0]
    moments = torch.stack([m1 - happened, m2 - m1 * m1, m3 - 3 * m1 * m2 + 2 * m1 * m1 * m1])
    first, second, third = moments.double()
    # The moments are derivatives in b, where b / T is the inverse temperature, at b = 1; with log T - log b in the
    # place of log T, each derivative in log b is b d/db of the one before
    return torch.stack([-first, first + second, -(first + 3 * second + third)])
