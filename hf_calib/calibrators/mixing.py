"""A temperature mixed with the model's own probabilities and with no knowledge at all."""

from __future__ import annotations

import numpy as np
import torch

from .base import Calibrator
from .scaling import fit_temperature, temperature_problem


SMALLEST = 1e-300  # a probability that a logarithm is taken of


class EnsembleTemperature(Calibrator):
    r"""A mean of three: $w_1 \, \mathrm{softmax}(z / T) + w_2 \, \mathrm{softmax}(z) + w_3 / C$.

    *When to use:* where even the surest rows are wrong now and then, as with mislabelled data: the uniform part bounds
    what one surprise costs.

    Attributes:
        temperature (`torch.Tensor` of shape `()`, float64): of lowest NLL, fitted first.
        mixture (`torch.Tensor` of shape `(3,)`, float64): shares that sum to 1.
    Source:
        Zhang, Kailkhura & Han 2020 (arXiv 2003.07329), section 4.1, with NLL in the place of their squared error; the
        uniform part is over the classes that are possible.
    Example:
        >>> import torch
        >>> logits, labels = 5 * torch.eye(2).repeat(10, 1), torch.tensor([0, 1] * 9 + [1, 0])
        >>> round(EnsembleTemperature().fit(logits, labels).log_probs(logits).exp().max().item(), 3)
        0.9
    """

    name = "ensemble_temperature"
    tensor_names = ("temperature", "mixture")
    tensor_dtype = torch.float64
    preserves_accuracy = True
    contains_identity = True

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        temperature = logits.new_tensor(fit_temperature(logits, labels, weights), dtype=torch.float64)
        parts = _parts(logits.double(), temperature)
        probs = torch.stack([part.gather(-1, labels[:, None])[:, 0] for part in parts]).exp()
        return {"temperature": temperature, "mixture": best_shares(probs, weights)}

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        shares = self.mixture.log().view(3, *[1] * logits.dim())
        mixed = (torch.stack(_parts(logits.double(), self.temperature)) + shares).logsumexp(0)
        lowest = torch.finfo(logits.dtype).min
        return mixed.clamp_min(lowest).where(logits != -torch.inf, logits.double()).to(logits.dtype)

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        temperature, mixture = tensors["temperature"], tensors["mixture"]
        if (problem := temperature_problem(temperature)) is not None:
            return problem
        if mixture.shape != (3,) or bool((mixture < 0).any()) or abs(float(mixture.sum()) - 1) > 1e-6:
            return f"mixture is {mixture.tolist()}; allowed are three shares that sum to 1"
        return None


def _parts(logits: torch.Tensor, temperature: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities of the three parts."""
    centred = logits - logits.amax(-1, keepdim=True)
    possible = logits > -torch.inf
    uniform = torch.zeros_like(logits).masked_fill(~possible & ~logits.isnan(), -torch.inf)
    return [part.log_softmax(-1) for part in (centred / temperature, centred, uniform)]


def best_shares(probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Shares of lowest NLL of what several parts say of each row's label; never worse than one part alone.

    Args:
        probs (`torch.Tensor` of shape `(M, N)`, float64).
        weights (`torch.Tensor` of shape `(N,)`, float64).
    """
    from scipy.optimize import minimize

    probs, weights = probs.clamp_min(SMALLEST), weights / weights.sum()
    corners = np.eye(len(probs))

    def evaluate(shares: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = (torch.from_numpy(shares).to(probs.device) @ probs).clamp_min(SMALLEST)
        gradient = -(probs @ (weights / mixed))
        return -float(mixed.log() @ weights), gradient.cpu().numpy()

    start = corners[np.argmin([evaluate(corner)[0] for corner in corners])]
    found = minimize(
        evaluate,
        0.9 * start + 0.1 / len(probs),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * len(probs),
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 200},
    ).x.clip(0, 1)
    best = min((start, found / found.sum()), key=lambda shares: evaluate(shares)[0])
    return torch.from_numpy(best).to(probs.device)
