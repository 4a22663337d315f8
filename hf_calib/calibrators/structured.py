"""Linear maps of logits: a weight for each class or each pair of classes, and a bias."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
import torch

from ..functional.checks import check_choice
from .base import Calibrator
from .scaling import fit_temperature, in_dtype_of, temperature_problem


BLOCK_ELEMENTS = 2**19  # logits worked on at a time
NEGLIGIBLE = -1000.0  # of scaled logits below the largest: masks, such as -1e9, of probability e^-1000
TINY = 1e-6  # of a penalty that only keeps weights finite
GRADIENT = 2e-5  # of whitened steps: half its square is what a parameter leaves, in nats
ROUNDING = 1e-9  # what the largest curvature leaves of the smallest
MAX_STEPS = 500
FEW_ELEMENTS = 2**15  # up to here float64 costs nothing
FEW_CLASSES = 12  # whose matrix has a curvature that can be factorised
CURVATURE_ROWS = 1000


class Penalty(NamedTuple):
    """How much squared distances from the temperature-scaled logits cost, in nats per row."""

    diagonal: float
    off_diagonal: float
    bias: float


class LinearScaling(Calibrator):
    r"""$W x + b$, where $x$ are the logits divided by their best temperature, centred over the possible classes.

    The start is the temperature, and the penalty is 0 there. Classes more than 1,000 below the largest $x$ are masks
    and stay as they are, as those of $-\infty$ do.

    Attributes:
        temperature (`torch.Tensor` of shape `()`, float64): fitted first, alone.
        weight (`torch.Tensor` of shape `()`, `(C,)` or `(C, C)`, float64): one for all, the diagonal, or all of $W$.
        bias (`torch.Tensor` of shape `(C,)`, float64).
    """

    tensor_names = ("temperature", "weight", "bias")
    tensor_dtype = torch.float64
    preserves_accuracy = False
    contains_identity = True
    is_affine = True
    weight_dims: ClassVar[int] = 1
    of_log_probs: bool = False

    def _penalty(self, num_rows: float, num_labels: int) -> Penalty:
        raise NotImplementedError

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        temperature = torch.tensor(fit_temperature(logits, labels, weights), dtype=torch.float64, device=logits.device)
        num_labels = logits.shape[-1]
        weight = torch.ones(num_labels if self.weight_dims else (), dtype=torch.float64, device=logits.device)
        weight = weight.diag() if self.weight_dims == 2 else weight
        bias = torch.zeros(num_labels, dtype=torch.float64, device=logits.device)
        rows = Problem(*self._features(logits, temperature), labels, weights / weights.sum())
        penalty = self._penalty(float(weights.sum()), num_labels)
        weight, bias = minimise(rows, weight, bias, penalty)
        return {"temperature": temperature, "weight": weight, "bias": bias}

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / self.temperature
        features, possible = self._features(logits, self.temperature)
        return in_dtype_of(logits, linear(features, self.weight, self.bias).where(possible, scaled))

    def _features(self, logits: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """$x$, `(..., C)` float64, 0 where a class is impossible, and where it is not."""
        scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
        possible = (scaled > NEGLIGIBLE) | scaled.isnan()
        if self.of_log_probs:
            shift = scaled.masked_fill(~possible, -torch.inf).logsumexp(-1, keepdim=True)
        else:
            shift = scaled.where(possible, 0).sum(-1, keepdim=True) / possible.sum(-1, keepdim=True)
        return (scaled - shift).where(possible, 0), possible

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        temperature, weight, bias = (tensors[name] for name in self.tensor_names)
        if (problem := temperature_problem(temperature)) is not None:
            return problem
        if weight.shape != (num_labels,) * self.weight_dims or bias.shape != (num_labels,):
            return (
                f"weight and bias have shapes {tuple(weight.shape)} and {tuple(bias.shape)}; allowed are "
                f"{(num_labels,) * self.weight_dims} and {(num_labels,)}"
            )
        return None


class VectorScaling(LinearScaling):
    r"""A weight and a bias for each class: $w_k x_k + b_k$.

    *When to use:* with hundreds of rows for each class. `structured_vector` is safer.

    Attributes:
        temperature, weight, bias: as in [`LinearScaling`]; `weight` is `(C,)`.
    Source:
        Guo et al. 2017 (arXiv 1706.04599), section 4.2; here with a penalty of 1e-6 on squared distances from the
        temperature, which keeps the weights finite where the classes can be separated.
    Example:
        >>> import torch
        >>> logits, labels = 3 * torch.eye(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 0])
        >>> VectorScaling().fit(logits, labels).weight.shape
        torch.Size([3])
    """

    name = "vector"

    def _penalty(self, num_rows: float, num_labels: int) -> Penalty:
        return Penalty(TINY, 0.0, TINY)


class MatrixScaling(LinearScaling):
    r"""A weight for each pair of classes, and a bias: $W x + b$.

    *When to use:* hardly ever: its parameters grow with the square of the classes, and so does what it memorises.
    `structured_matrix` is the same map with a penalty that holds it back.

    Attributes:
        temperature, weight, bias: as in [`LinearScaling`]; `weight` is `(C, C)`.
    Source:
        Guo et al. 2017 (arXiv 1706.04599), section 4.2; penalty as in [`VectorScaling`].
    """

    name = "matrix"
    weight_dims = 2

    def _penalty(self, num_rows: float, num_labels: int) -> Penalty:
        return Penalty(TINY, TINY, TINY)


class StructuredScaling(LinearScaling):
    """Linear scaling of log-probabilities or, where it is to be folded, of centred logits.

    Args:
        foldable (`bool`): take centred logits, so that the map is affine and `fold_calibrator` can write it into a
            model's last layer. Log-probabilities fit a little better, and much better where tiny probabilities have
            been clipped: only they tell how far a row's classes lie from all others together.
        task: as in [`Calibrator`].
    """

    setting_names = ("foldable",)

    def __init__(self, *, foldable: bool = False, task: str | None = None):
        super().__init__(task=task)
        check_choice("foldable", foldable, (False, True))
        self.foldable = self.is_affine = foldable
        self.of_log_probs = not foldable


class StructuredVectorScaling(StructuredScaling):
    r"""Vector scaling that stays near the temperature unless the rows insist.

    $$\min_{w, b} \; \mathrm{NLL} + \frac{C}{N} \left(\lVert w - 1 \rVert^2 + \lVert b \rVert^2\right)$$

    *When to use:* second, after temperature: the map of choice from a hundred classes up.

    Attributes:
        temperature, weight, bias: as in [`LinearScaling`]; `weight` is `(C,)`.
    Args:
        foldable, task: as in [`StructuredScaling`].
    Source:
        Berta, Holzmüller, Jordan & Bach 2025 (arXiv 2511.03685), ridge penalty with its default strengths.
    Example:
        >>> import torch
        >>> logits, labels = 3 * torch.eye(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 0])
        >>> StructuredVectorScaling().fit(logits, labels).bias.shape
        torch.Size([3])
    """

    name = "structured_vector"

    def _penalty(self, num_rows: float, num_labels: int) -> Penalty:
        return Penalty(num_labels / num_rows, 0.0, num_labels / num_rows)


class StructuredMatrixScaling(StructuredScaling):
    r"""Matrix scaling whose weights between classes are held back most.

    $$\min_{W, b} \; \mathrm{NLL} + \frac{C}{N} \left(\lVert \mathrm{diag}(W) - 1 \rVert^2 + \lVert b \rVert^2\right)
    + \frac{C (C - 1)}{N} \lVert \mathrm{off}(W) \rVert^2$$

    *When to use:* for few classes that are mistaken for each other, with some hundred rows: the strongest single map.

    Attributes:
        temperature, weight, bias: as in [`LinearScaling`]; `weight` is `(C, C)`.
    Args:
        foldable, task: as in [`StructuredScaling`].
    Source:
        As [`StructuredVectorScaling`].
    """

    name = "structured_matrix"
    weight_dims = 2

    def _penalty(self, num_rows: float, num_labels: int) -> Penalty:
        each = num_labels / num_rows
        return Penalty(each, each * (num_labels - 1), each)


class DirichletCalibration(LinearScaling):
    r"""Matrix scaling of log-probabilities, $W \log p + b$, with off-diagonal and intercept regularisation (ODIR).

    *When to use:* to compare with published results; `structured_matrix` is stronger.

    Attributes:
        temperature, weight, bias: as in [`LinearScaling`]; `weight` is `(C, C)`, of scaled log-probabilities.
    Source:
        Kull et al. 2019 (arXiv 1910.12656), with both strengths at 1e-3 as means over the penalised weights.
    """

    name = "dirichlet"
    of_log_probs = True
    is_affine = False
    weight_dims = 2

    def _penalty(self, num_rows: float, num_labels: int) -> Penalty:
        return Penalty(TINY, 1e-3 / (num_labels * (num_labels - 1)), 1e-3 / num_labels)


class BiasCorrectedTemperature(LinearScaling):
    r"""A temperature and a bias for each class: $w x_k + b_k$.

    *When to use:* before the priors are corrected for other class frequencies, see [`PriorCorrection`].

    Attributes:
        temperature, weight, bias: as in [`LinearScaling`]; `weight` is `()`.
    Source:
        Alexandari, Kundaje & Shrikumar 2020 (arXiv 1901.06852), section 3.2; penalty as in [`VectorScaling`].
    """

    name = "bias_corrected_temperature"
    weight_dims = 0

    def _penalty(self, num_rows: float, num_labels: int) -> Penalty:
        return Penalty(TINY, 0.0, TINY)


class Problem(NamedTuple):
    """Rows of a logistic regression."""

    features: torch.Tensor  # (N, C) float64
    possible: torch.Tensor | None  # (N, C) bool; None where all are
    labels: torch.Tensor  # (N,) int64
    weights: torch.Tensor  # (N,) float64, with sum 1


def linear(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`(..., C)` features under a weight of shape `()`, `(C,)` or `(C, C)`."""
    return (features @ weight.T if weight.dim() == 2 else features * weight) + bias


def minimise(
    rows: Problem, weight: torch.Tensor, bias: torch.Tensor, penalty: Penalty
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of lowest NLL plus penalty, from a start where the penalty is 0: L-BFGS in whitened steps."""
    from scipy.optimize import minimize

    start = torch.cat([weight.flatten(), bias])
    strength = torch.full_like(weight, penalty.off_diagonal if weight.dim() == 2 else penalty.diagonal)
    if weight.dim() == 2:
        strength.fill_diagonal_(penalty.diagonal)
    strengths = torch.cat([strength.flatten(), torch.full_like(bias, penalty.bias)])
    whitener = whiten(rows, weight, bias, 2 * strengths)
    if rows.possible is not None and bool(rows.possible.all()):
        rows = rows._replace(possible=None)
    exact = rows.features.numel() <= FEW_ELEMENTS
    if not exact:
        rows = rows._replace(features=rows.features.float(), weights=rows.weights.float())

    def evaluate(step: np.ndarray) -> tuple[float, np.ndarray]:
        moved = whitener.move(torch.from_numpy(step).to(start.device))
        value, gradient = _nll(rows, start + moved, weight.shape)
        value += float(strengths @ moved.square())
        return value, whitener.gradient(gradient + 2 * strengths * moved).cpu().numpy()

    options = {
        "maxiter": MAX_STEPS,
        "maxcor": 20,
        "ftol": 1e-13 if exact else 1e-6,
        "gtol": 1e-7 if exact else GRADIENT,
    }
    found = minimize(evaluate, np.zeros(len(start)), jac=True, method="L-BFGS-B", options=options)
    best = start + whitener.move(torch.from_numpy(found.x).to(start.device))
    return best[: weight.numel()].view_as(weight), best[weight.numel() :]


def _nll(rows: Problem, parameters: torch.Tensor, shape: torch.Size) -> tuple[float, torch.Tensor]:
    """Mean NLL and its gradient, in blocks of rows."""
    num_labels = rows.features.shape[-1]
    parameters = parameters.to(rows.features.dtype)
    weight, bias = parameters[:-num_labels].view(shape), parameters[-num_labels:]
    total = torch.zeros((), dtype=torch.float64, device=bias.device)
    gradient = torch.zeros(len(parameters), dtype=torch.float64, device=bias.device)
    size = max(1, BLOCK_ELEMENTS // num_labels)
    for start in range(0, len(rows.labels), size):
        part = slice(start, start + size)
        features, labels, weights = rows.features[part], rows.labels[part, None], rows.weights[part]
        mapped = linear(features, weight, bias)
        if rows.possible is not None:
            mapped.masked_fill_(~rows.possible[part], -torch.inf)
        mapped -= mapped.amax(-1, keepdim=True)
        happened = mapped.gather(-1, labels)
        residual = mapped.exp_()
        mass = residual.sum(-1, keepdim=True)
        total += (mass.log() - happened)[:, 0].double() @ weights.double()
        residual *= weights[:, None] / mass
        residual.scatter_add_(-1, labels, -weights[:, None])
        if weight.dim() == 2:
            of_weight = residual.T @ features
        else:
            of_weight = (residual * features).sum(0)
            of_weight = of_weight if weight.dim() else of_weight.sum()
        gradient += torch.cat([of_weight.flatten(), residual.sum(0)]).double()
    return float(total), gradient


class Whitener(NamedTuple):
    """Units of steps in which the objective is about equally curved in all directions.

    Of few parameters all are taken together. Of a large matrix those of the diagonal and the bias are, and what one
    class takes from the others has the curvature $s_k B + r$, with the features' second moments $B$.
    """

    dense: torch.Tensor  # indices of the parameters whose curvature is known together
    root: torch.Tensor  # its Cholesky factor
    basis: torch.Tensor | None = None  # (C, C): eigenvectors of B
    units: torch.Tensor | None = None  # (C, C): of class k along each of them

    def move(self, step: torch.Tensor) -> torch.Tensor:
        """Parameters that a step adds."""
        moved = self._along_basis(step)
        moved[self.dense] += torch.linalg.solve_triangular(self.root.T, step[self.dense, None], upper=True)[:, 0]
        return moved

    def gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient by steps from that by parameters."""
        found = self._along_basis(gradient, last=True)
        found[self.dense] = torch.linalg.solve_triangular(self.root, gradient[self.dense, None], upper=False)[:, 0]
        return found

    def _along_basis(self, values: torch.Tensor, last: bool = False) -> torch.Tensor:
        found = torch.zeros_like(values)
        if self.basis is not None:
            size = self.basis.numel()
            matrix = values[:size].view_as(self.basis)
            if not last:
                matrix = matrix - matrix.diagonal().diag()
            found[:size] = (((matrix @ self.basis) * self.units) @ self.basis.T).flatten()
        return found


def whiten(rows: Problem, weight: torch.Tensor, bias: torch.Tensor, ridge: torch.Tensor) -> Whitener:
    """The curvature at the start, of the NLL on some of the rows and of a ridge, `(P,)`."""
    some = slice(None, None, max(1, len(rows.labels) // CURVATURE_ROWS))
    features, possible, weights = rows.features[some], rows.possible[some], rows.weights[some]
    weights = weights / weights.sum()
    probs = linear(features, weight, bias).masked_fill(~possible, -torch.inf).softmax(-1)
    num_labels = len(bias)
    dense, basis, units = torch.arange(len(ridge), device=ridge.device), None, None
    together = weight.dim() == 2 and num_labels <= FEW_CLASSES
    if weight.dim() == 2 and not together:
        moments, basis = torch.linalg.eigh((features * weights[:, None]).T @ features)
        spread = weights @ (probs * (1 - probs))
        units = (spread[:, None] * moments.clamp_min(0) + ridge[1]).rsqrt()
        dense = torch.cat([dense[:-num_labels].view_as(weight).diagonal(), dense[-num_labels:]])
    curvature = _curvature(features, probs, weights, all_pairs=together)
    if weight.dim() == 0:  # one weight moves those of all classes
        curvature = torch.cat([curvature[:num_labels].sum(0, keepdim=True), curvature[num_labels:]])
        curvature = torch.cat([curvature[:, :num_labels].sum(1, keepdim=True), curvature[:, num_labels:]], dim=1)
    curvature.diagonal().add_(ridge[dense] + ROUNDING * curvature.diagonal().max())
    return Whitener(dense, torch.linalg.cholesky(curvature), basis, units)


def _curvature(features: torch.Tensor, probs: torch.Tensor, weights: torch.Tensor, *, all_pairs: bool) -> torch.Tensor:
    """Second derivatives of the mean NLL by the weights, then by the biases.

    Of the diagonal weights, `(2 C, 2 C)`, or of those of all pairs, `(C (C + 1), C (C + 1))`.
    """
    num_rows, num_labels = features.shape
    ones = torch.ones_like(features)
    if all_pairs:
        inputs = torch.cat([features, ones[:, :1]], dim=1)[:, None].expand(-1, num_labels, -1)
    else:
        inputs = torch.stack([features, ones], dim=-1)
    moved = (probs[..., None] * inputs).reshape(num_rows, -1)
    curvature = -(moved * weights[:, None]).T @ moved
    width = inputs.shape[-1]
    blocks = torch.einsum("nk,nkq,nkr->kqr", probs * weights[:, None], inputs, inputs)
    curvature += torch.block_diag(*blocks)
    order = torch.arange(num_labels * width, device=features.device).view(num_labels, width)
    order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
    return curvature[order][:, order]
