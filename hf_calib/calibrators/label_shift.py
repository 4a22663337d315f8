"""Other class frequencies than those of the fit, found from logits without labels."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .base import Calibrator
from .rows import check_unlabelled, two_class_logits
from .scaling import in_dtype_of


MAX_STEPS = 2_000
LAST_STEP = 1e-9  # in a prior
SMALLEST_PRIOR = 1e-12
BLOCK_ELEMENTS = 2**21


class PriorCorrection(Calibrator):
    r"""Moves calibrated probabilities to other class frequencies: $\hat p_k \propto p_k\, q_k / \pi_k$.

    `fit` takes the priors $\pi$ from the rows that everything else was fitted on. `adapt` finds the priors $q$ of
    logits without labels; until then they are $\pi$, and nothing changes. It assumes that what makes a class look as
    it does has stayed, and only how often each occurs has not.

    *When to use:* after a calibrator, on data where classes are rarer or more frequent than in the fit:
    `Chain([BiasCorrectedTemperature(), PriorCorrection()]).fit(logits, labels).adapt(new_logits)`.

    Attributes:
        source_priors (`torch.Tensor` of shape `(C,)`, float64): $\pi$.
        target_priors (`torch.Tensor` of shape `(C,)`, float64): $q$.
    Source:
        Saerens, Latinne & Decaestecker 2002, section 3 (EM); Alexandari, Kundaje & Shrikumar 2020 (arXiv 1901.06852):
        calibrate first, with biases, and take as $\pi$ the mean of the calibrated probabilities.
    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 0], [0, 2.0]]).repeat(10, 1), torch.tensor([0, 1]).repeat(10)
        >>> calibrator = PriorCorrection().fit(logits, labels)
        >>> calibrator.adapt(logits[:2][[0, 0, 0, 1]]).target_priors
        tensor([0.8283, 0.1717], dtype=torch.float64)
    """

    name = "prior_correction"
    tensor_names = ("source_priors", "target_priors")
    tensor_dtype = torch.float64
    preserves_accuracy = False
    contains_identity = True
    is_affine = True

    def adapt(self, logits: torch.Tensor) -> PriorCorrection:
        """Sets `target_priors` to the most likely ones of logits without labels.

        Args:
            logits (`torch.Tensor` of shape `(..., C)`, floating): as `forward` takes them.
        Returns:
            the calibrator itself.
        Raises:
            ValueError: naming the argument, the value and what is allowed; the fitted state is then unchanged.
        """
        self.check_logits(logits)
        if self.task == "multilabel":
            columns = zip(self.members, logits.unbind(-1), strict=True)
            self.members = nn.ModuleList([copy.deepcopy(member).adapt(column) for member, column in columns])
            return self
        logits = two_class_logits(logits) if self.task == "binary" else logits
        with torch.no_grad():
            rows = check_unlabelled(logits)
            self.target_priors = estimate_priors(rows, self.source_priors)
        return self

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        priors = _mean_probs(logits, weights).clamp_min(SMALLEST_PRIOR)
        priors = priors / priors.sum()
        return {"source_priors": priors, "target_priors": priors.clone()}

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        ratio = self.target_priors.log() - self.source_priors.log()
        return in_dtype_of(logits, logits.double() + ratio)

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        for name, priors in tensors.items():
            if priors.shape != (num_labels,) or bool((priors <= 0).any()) or abs(float(priors.sum()) - 1) > 1e-6:
                return f"{name} is {priors.tolist()}; allowed are {num_labels} numbers above 0 that sum to 1"
        return None


def estimate_priors(logits: torch.Tensor, source_priors: torch.Tensor) -> torch.Tensor:
    r"""The most likely class frequencies of rows without labels.

    $$\max_q \sum_i \log \sum_k p_{ik}\, q_k / \\pi_k$$

    Concave in q; each step of EM, $q_k \leftarrow \overline{p_k q_k / \pi_k / \sum_l p_l q_l / \pi_l}$, raises it.

    Args:
        logits (`torch.Tensor` of shape `(N, C)`, floating): calibrated for the source.
        source_priors (`torch.Tensor` of shape `(C,)`, float64 above 0).
    Returns:
        `torch.Tensor` of shape `(C,)`, float64, above 0, with sum 1.
    """
    relative = logits.double() - source_priors.log()
    relative = (relative - relative.amax(-1, keepdim=True)).exp()
    priors = source_priors
    for _ in range(MAX_STEPS):
        mass = relative @ priors
        moved = priors * (relative.T @ mass.reciprocal()) / len(relative)
        moved = moved.clamp_min(SMALLEST_PRIOR)
        moved = moved / moved.sum()
        change, priors = float((moved - priors).abs().max()), moved
        if change < LAST_STEP:
            break
    return priors


def _mean_probs(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the rows' probabilities, in blocks: `(C,)` float64."""
    total = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
    rows = max(1, BLOCK_ELEMENTS // logits.shape[-1])
    for z, w in zip(logits.split(rows), weights.split(rows), strict=True):
        total += w @ z.double().softmax(-1)
    return total / weights.sum()
