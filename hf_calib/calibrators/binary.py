"""Calibrators of two classes: logistic regressions on a few functions of the log-odds."""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from .base import Calibrator
from .rows import two_class_logits, warn_caller


MAX_STEPS = 100
LAST_GAIN = 1e-12  # nats that a Newton step promises when it is the last; the one after would promise its square
SMALLEST_SCALE = 1e-290  # scores that differ by less are equal: the slope between them would overflow
LARGEST = 1e100  # of a standardised score: its square is finite
LARGEST_LOG_ODDS = 1e300
CENTRE = (0.01, 0.99)  # shares of the rows that lie below the ends of what a quadratic is fitted to bend


class LogOddsRegression(Calibrator):
    r"""A weighted logistic regression $f(d) = \theta_0 + \sum_j \theta_j x_j(d)$ on functions of the log-odds d.

    The functions are such that all $\theta_j = 1$ and $\theta_0 = 0$ is the identity. Subclasses name them.
    """

    tensor_dtype = torch.float64
    preserves_accuracy = False  # the threshold of 1/2 moves
    contains_identity = True
    two_classes_only = True
    is_rising: ClassVar[bool]  # no slope below 0

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        possible = (logits > -torch.inf).all(-1)  # a row that can be of one class only says nothing
        d, labels, weights = log_odds(logits)[possible], labels[possible], weights[possible]
        knots = self._knots(d, weights)
        features = self._features(d, knots)
        if len(d) == 0:
            return self._named(features.new_tensor([0.0] + [1.0] * features.shape[-1]), knots)
        targets = labels.double()
        if _is_separable(d, labels, is_rising=self.is_rising):
            warn_caller(
                f"{self.name}: no finite map is best, because a threshold on the scores separates the labels; counted "
                "the scores' own probabilities as one row in all. Fit on more rows."
            )
            targets = (targets * len(d) + d.sigmoid()) / (len(d) + 1)
        return self._named(fit_logistic(features, targets, weights, is_rising=self.is_rising), knots)

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        knots = getattr(self, "knots", None)
        intercept, coefficients = self._coefficients()
        mapped = intercept + (self._features(log_odds(logits), knots) * coefficients).sum(-1)
        limits = torch.finfo(logits.dtype)
        calibrated = two_class_logits(mapped).clamp(limits.min, limits.max).to(logits.dtype)
        return calibrated.masked_fill(logits == -torch.inf, -torch.inf)

    def _knots(self, d: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """What the functions depend on beside the log-odds."""
        return None

    def _features(self, d: torch.Tensor, knots: torch.Tensor | None) -> torch.Tensor:
        """`(...)` log-odds as `(..., K)` functions of them, float64."""
        raise NotImplementedError

    def _named(self, theta: torch.Tensor, knots: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Fitted tensors by name, from the intercept and the coefficients."""
        raise NotImplementedError

    def _coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The intercept `()` and the coefficients `(K,)`."""
        raise NotImplementedError

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        for name, tensor in tensors.items():
            allowed = (2,) if name in ("slopes", "knots") else ()
            if tuple(tensor.shape) != allowed:
                return f"{name} has shape {tuple(tensor.shape)}; allowed is {allowed}"
            if self.is_rising and name in ("a", "b", "slopes") and bool((tensor < 0).any()):
                return f"{name} is {tensor.tolist()}; allowed are numbers from 0 up"
            if name == "knots" and tensor[0] > tensor[1]:
                return f"knots are {tensor.tolist()}; allowed are two that rise"
        return None


class PlattScaling(LogOddsRegression):
    r"""A straight line through the log-odds: $f = a d + b$ with $d = z_1 - z_0$.

    *When to use:* first, for two classes and for raw scores of any origin, falling ones too: two parameters, few rows.

    Attributes:
        slope (`torch.Tensor` of shape `()`, float64): a; below 0 where higher scores mean less.
        intercept (`torch.Tensor` of shape `()`, float64): b.
    Source:
        Platt 1999, section 2.1. The line of lowest NLL, as unpenalised logistic regression finds it: Platt's
        targets $(n_+ + 1) / (n_+ + 2)$ would depend on the unit of the weights. Where a threshold separates the
        labels no line is best; then the scores' own probabilities count as one row in all, and a warning says so.
    Example:
        >>> import torch
        >>> logits = torch.tensor([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0])
        >>> labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
        >>> calibrator = PlattScaling(task="binary").fit(logits, labels)
        >>> calibrator.log_probs(torch.tensor([2.0, 0.0])).exp()
        tensor([0.7500, 0.5000])
    """

    name = "platt"
    tensor_names = ("slope", "intercept")
    is_rising = False
    is_affine = True

    def _features(self, d: torch.Tensor, knots: torch.Tensor | None) -> torch.Tensor:
        return d[..., None]

    def _named(self, theta: torch.Tensor, knots: torch.Tensor | None) -> dict[str, torch.Tensor]:
        intercept, slope = theta
        return {"slope": slope.clone(), "intercept": intercept.clone()}

    def _coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.intercept, self.slope[None]


class BetaCalibration(LogOddsRegression):
    r"""One slope where an event is likely and one where it is not: $f = a \log p - b \log(1 - p) + c$, $a, b \ge 0$.

    With $p = \sigma(d)$ it is a line of slope b far above $d = 0$ and of slope a far below.

    *When to use:* where the model errs in one direction more than in the other. Its scores should be
    log-odds, or at least have their zero in the right place.

    Attributes:
        a (`torch.Tensor` of shape `()`, float64).
        b (`torch.Tensor` of shape `()`, float64).
        c (`torch.Tensor` of shape `()`, float64).
    Source:
        Kull, Silva Filho & Flach 2017, section 4; the best of all a and b from 0 up, where theirs drops a negative
        one. Separated labels: as [`PlattScaling`].
    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([3.0, 3.0, 3.0, -1.0, -1.0]), torch.tensor([1, 1, 0, 0, 1])
        >>> calibrator = BetaCalibration(task="binary").fit(logits, labels)
        >>> calibrator.log_probs(torch.tensor([3.0, -1.0])).exp()
        tensor([0.6667, 0.5000])
    """

    name = "beta"
    tensor_names = ("a", "b", "c")
    is_rising = True

    def _features(self, d: torch.Tensor, knots: torch.Tensor | None) -> torch.Tensor:
        return torch.stack([logsigmoid(d), -logsigmoid(-d)], dim=-1)

    def _named(self, theta: torch.Tensor, knots: torch.Tensor | None) -> dict[str, torch.Tensor]:
        c, a, b = theta
        return {"a": a.clone(), "b": b.clone(), "c": c.clone()}

    def _coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.c, torch.stack([self.a, self.b])


class QuadraticScaling(LogOddsRegression):
    r"""A rising quadratic in the log-odds: $f = c_0 + c_1 d + c_2 d^2$ in the middle, straight on outside.

    Its slope runs linearly from one knot to the other, which 1 % of the rows lie below and above, and stays there
    what it is at the knot. Neither slope is below 0, so that a surer score never means less.

    *When to use:* with some hundred rows of two classes, where a line is not enough.

    Attributes:
        slopes (`torch.Tensor` of shape `(2,)`, float64): at and beyond the lower and the upper knot.
        knots (`torch.Tensor` of shape `(2,)`, float64): log-odds between which it bends.
        intercept (`torch.Tensor` of shape `()`, float64): $f(d) - d$ is this where both slopes are 1.
    Source:
        Quadratic scaling as in probmetrics (Berta et al. 2025, arXiv 2511.03685), there without knots, which may fall
        and explodes beyond the rows it was fitted on. Separated labels: as [`PlattScaling`].
    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([3.0, 3.0, 3.0, -1.0, -1.0]), torch.tensor([1, 1, 0, 0, 1])
        >>> calibrator = QuadraticScaling(task="binary").fit(logits, labels)
        >>> calibrator.log_probs(torch.tensor([3.0, -1.0])).exp()
        tensor([0.6667, 0.5000])
    """

    name = "quadratic"
    tensor_names = ("slopes", "knots", "intercept")
    is_rising = True

    def _knots(self, d: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if len(d) == 0:
            return d.new_zeros(2)
        order = d.argsort()
        shares = weights[order].cumsum(0) / weights.sum()
        ends = torch.searchsorted(shares, shares.new_tensor(CENTRE) - 1e-9).clamp_max(len(d) - 1)
        knots = d[order[ends]]
        return knots if knots[1] > knots[0] else torch.stack(torch.aminmax(d))

    def _features(self, d: torch.Tensor, knots: torch.Tensor) -> torch.Tensor:
        low, high = knots
        inside = torch.clamp(d, low, high)
        middle, width = low / 2 + high / 2, (high - low).clamp_min(SMALLEST_SCALE)
        # Integrals of the share of either slope: (high - d) / width and (d - low) / width, from 0 to 1
        of_low = (d - inside).clamp_max(0) - (high - inside) * ((high - inside) / (2 * width))
        of_high = (d - inside).clamp_min(0) + (inside - low) * ((inside - low) / (2 * width))
        return torch.stack([of_low + middle / 2, of_high + middle / 2], dim=-1)

    def _named(self, theta: torch.Tensor, knots: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {"slopes": theta[1:].clone(), "knots": knots, "intercept": theta[0].clone()}

    def _coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.intercept, self.slopes


def log_odds(logits: torch.Tensor) -> torch.Tensor:
    """`(..., 2)` logits as `(...)` float64 log-odds of the second class, finite but for NaN."""
    absent, present = logits.double().clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS).unbind(-1)
    return (present - absent).clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)


def fit_logistic(
    features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, *, is_rising: bool
) -> torch.Tensor:
    """The logistic regression of lowest NLL, which is never above that of all coefficients 1 and no intercept.

    Args:
        features (`torch.Tensor` of shape `(N, K)`, float64): of any scale. The coefficient of one that is constant
            is 0.
        targets (`torch.Tensor` of shape `(N,)`, float64 in `[0, 1]`).
        weights (`torch.Tensor` of shape `(N,)`, float64).
        is_rising (`bool`): no coefficient below 0.
    Returns:
        `torch.Tensor` of shape `(K + 1,)`, float64: the intercept first.
    """
    centre = features.median(0).values  # robust, for a few entries may be masks of -1e30
    distance = (features - centre).abs()
    scale = distance.median(0).values
    scale = torch.where(scale > SMALLEST_SCALE, scale, (distance / len(distance)).sum(0))
    varies = scale > SMALLEST_SCALE
    scale = scale.where(varies, torch.inf)  # its column becomes 0, and so does its coefficient
    columns = ((features - centre) / scale).clamp(-LARGEST, LARGEST)
    design = torch.cat([torch.ones_like(columns[:, :1]), columns], dim=1)
    weights = weights / weights.sum()
    mean = (targets @ weights).clamp(1e-12, 1 - 1e-12)
    starts = [torch.cat([centre.sum()[None], scale.where(varies, 0)]), torch.cat([mean.logit()[None], 0 * centre])]
    start = min(starts, key=lambda theta: _nll(design @ theta, targets, weights))
    theta = _minimise(design, targets, weights, start)
    if is_rising and bool((theta[1:] < 0).any()):
        theta = _minimise_rising(design, targets, weights, start)
    slopes = theta[1:] / scale
    return torch.cat([(theta[0] - slopes @ centre)[None], slopes])


def _minimise_rising(
    design: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """The best theta with no coefficient below 0: as the NLL is convex, that of the best feasible set of columns."""
    best, lowest = start.clamp_min(0), torch.inf
    num_features = design.shape[1] - 1
    for size in range(num_features):
        for kept in combinations(range(1, num_features + 1), size):
            columns = [0, *kept]
            theta = torch.zeros_like(start)
            theta[columns] = _minimise(design[:, columns], targets, weights, start[columns])
            nll = _nll(design @ theta, targets, weights)
            if bool((theta[1:] >= 0).all()) and nll < lowest:
                best, lowest = theta, nll
    return best


def _minimise(design: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Newton's steps on the NLL, which is convex; each as long as the slope along it says."""
    for _ in range(MAX_STEPS):
        fitted = design @ theta
        error = weights * (fitted.sigmoid() - targets)
        slope = error @ design
        spread = weights * fitted.sigmoid() * (-fitted).sigmoid()
        curvature = design.T @ (spread[:, None] * design)
        # In units in which its diagonal is 1, and damped: columns may be constant, or equal, or rows all be sure
        unit = curvature.diagonal().sqrt()
        unit = unit.where(unit > 0, 1)
        damped = curvature / unit / unit[:, None] + 1e-12 * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        step = -torch.linalg.solve(damped, slope / unit) / unit
        gain = -float(slope @ step)
        if not gain > 0:
            break
        length = _length(fitted, design @ step, targets, weights, gain)
        theta = theta + length * step
        if length == 1 and gain < LAST_GAIN:
            break
    return theta


def _length(
    fitted: torch.Tensor, step: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, gain: float
) -> float:
    """How far to go along a step: all of it, or the power of 2 near which the NLL stops falling."""

    def slope_at(exponent: float) -> float:
        there = (fitted + 2.0**exponent * step).clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
        return float(weights @ ((there.sigmoid() - targets) * step))

    if abs(slope_at(0)) <= gain / 2:
        return 1.0
    is_too_far = slope_at(0) > 0
    low, high = (-1000.0, 0.0) if is_too_far else (0.0, 1000.0)
    reach = 1.0
    while reach < 1000 and (slope_at(-reach) > 0 if is_too_far else slope_at(reach) < 0):
        low, high = (low, -reach) if is_too_far else (reach, high)
        reach *= 2
    low, high = (max(low, -reach), high) if is_too_far else (low, min(high, reach))
    while high - low > 0.1:
        middle = (low + high) / 2
        low, high = (middle, high) if slope_at(middle) < 0 else (low, middle)
    return 2.0**low


def _nll(fitted: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> float:
    fitted = fitted.clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
    return -float(weights @ (targets * logsigmoid(fitted) + (1 - targets) * logsigmoid(-fitted)))


def _is_separable(d: torch.Tensor, labels: torch.Tensor, *, is_rising: bool) -> bool:
    """Whether a threshold on the log-odds tells the labels apart, equal scores at the threshold aside."""
    absent, present = d[labels == 0], d[labels == 1]
    if len(absent) == 0 or len(present) == 0:
        return True
    if d.min() == d.max():
        return False  # then their frequency is best
    return bool(absent.max() <= present.min()) or (not is_rising and bool(present.max() <= absent.min()))
