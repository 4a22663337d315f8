"""A weighted mean of calibrators, with weights from rows that they were not fitted on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..functional.checks import PROBABILITY_FLOOR
from .base import Calibrator
from .compose import ComposedCalibrator
from .folds import deal_rows, take_rows
from .rows import FitRows


NUM_DRAWS = 4000
EM_STEPS = 300
PRIOR_ROWS = 3.0


class Ensemble(ComposedCalibrator):
    r"""A weighted mean of what several calibrators say.

    $$\hat p = \sum_m w_m \hat p_m, \qquad w_m \ge 0, \quad \sum_m w_m = 1$$

    The weights are those of lowest cross-validated NLL, drawn a little towards each member's chance to be the best.

    *When to use:* where no single method is clearly best, which is most of the time: averaging those that may be best
    loses less than picking one of them.

    Args:
        members, task: as in [`ComposedCalibrator`].
        num_folds (`int`), seed (`int`): of the cross-validation that the weights come from.
    Attributes:
        mixture (`torch.Tensor` of shape `(M,)`, float64): the weights.
    Source:
        Yao et al. 2018 (arXiv 1704.02030): stacking, section 3.1, here with a prior of three rows at the weights of
        section 3.4 (pseudo-BMA with the uncertainty of the scores).
    Example:
        >>> import torch
        >>> from hf_calib.calibrators import CALIBRATORS
        >>> logits, labels = 3 * torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 2, 0, 1, 0] * 2)
        >>> ensemble = Ensemble([CALIBRATORS["identity"](), CALIBRATORS["temperature"]()]).fit(logits, labels)
        >>> round(ensemble.mixture.sum().item(), 6)
        1.0
    """

    name = "ensemble"
    tensor_names = ("mixture",)
    tensor_dtype = torch.float64
    setting_names = ("num_folds", "seed")

    def __init__(self, members: Sequence[Calibrator], *, num_folds: int = 5, seed: int = 0, task: str | None = None):
        super().__init__(members, task=task)
        self.num_folds, self.seed = num_folds, seed

    def _fit_rows(self, rows: FitRows) -> tuple[dict[str, torch.Tensor], list[Calibrator]]:
        held_out = hold_out(self.templates, rows, num_folds=self.num_folds, seed=self.seed)
        members = [copy.deepcopy(template).fit_rows(rows) for template in self.templates]
        return {"mixture": held_out.best_mixture(rows.weights)}, members

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        shares = self.mixture.to(wide.dtype).log()
        log_probs = torch.stack([member(wide).log_softmax(-1) for member in self.members])
        mean = (log_probs + shares.view(-1, *[1] * wide.dim())).logsumexp(0)
        impossible = logits == -torch.inf  # also where a row has no possible class, of which no softmax is defined
        return mean.masked_fill(impossible, -torch.inf).to(logits.dtype)

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        mixture = tensors["mixture"]
        if mixture.shape != (len(self.members),) or bool((mixture < 0).any()) or abs(float(mixture.sum()) - 1) > 1e-6:
            return f"mixture is {mixture.tolist()}; allowed are {len(self.members)} weights that sum to 1"
        return None


class HeldOutNLL(NamedTuple):
    """What M calibrators say of the labels of N rows that they were not fitted on."""

    probs: torch.Tensor  # (M, N, k) float64: of the row's label, or of all classes where labels are soft
    shares: torch.Tensor  # (N, k) float64: of each of them

    def scores(self, mixture: torch.Tensor) -> torch.Tensor:
        """The surprise of each row, `(N,)` float64, under `(M,)` float64 shares that sum to 1."""
        mixed = torch.tensordot(mixture, self.probs, dims=1)
        return -(self.shares * mixed.clamp_min(PROBABILITY_FLOOR).log()).sum(-1)

    def best_mixture(self, weights: torch.Tensor) -> torch.Tensor:
        """The shares of lowest mean NLL, of which `PRIOR_ROWS` rows more speak for `chance_of_best`.

        Without these rows, stacking by so few parameters still overfits a few hundred rows; each step raises the
        objective, which is concave, until it stands (EM).
        """
        prior = chance_of_best(torch.stack([self.scores(alone) for alone in _alone(self.probs)]), weights)
        mixture = (prior + 1 / len(prior)) / 2
        counts = (weights[:, None] * self.shares).flatten()
        probs = self.probs.flatten(1).clamp_min(PROBABILITY_FLOOR)
        for _ in range(EM_STEPS):
            mixed = mixture @ probs
            mixture = mixture * (probs @ (counts / mixed)) + PRIOR_ROWS * prior
            mixture = mixture / mixture.sum()
        return mixture


class HeldOutBrier(NamedTuple):
    """What M calibrators miss in N rows that they were not fitted on."""

    products: torch.Tensor  # (M, M, N) float64: of what each two of them miss

    def scores(self, mixture: torch.Tensor) -> torch.Tensor:
        """The Brier score of each row, `(N,)` float64, under `(M,)` float64 shares that sum to 1."""
        return torch.einsum("m,k,mkn->n", mixture, mixture, self.products)

    def best_mixture(self, weights: torch.Tensor) -> torch.Tensor:
        """`chance_of_best`."""
        return chance_of_best(self.products.diagonal().T, weights)


def hold_out(
    calibrators: Sequence[Calibrator], rows: FitRows, *, score: str = "nll", num_folds: int = 5, seed: int = 0
) -> HeldOutNLL | HeldOutBrier:
    """Fits copies of the calibrators on all folds but one, for each fold, and asks them about that one."""
    folds = deal_rows(rows.labels, num_folds, seed)
    parts, order = [], []
    for fold in range(num_folds):
        training, held_out = take_rows(rows, folds != fold), take_rows(rows, folds == fold)
        fitted = (copy.deepcopy(calibrator).fit_rows(training) for calibrator in calibrators)
        log_probs = torch.stack([calibrator.log_probs(held_out.logits) for calibrator in fitted])
        parts.append((_at_labels if score == "nll" else _products)(log_probs, held_out.labels))
        order.append((folds == fold).nonzero()[:, 0])
    back = torch.cat(order).argsort()
    if score == "brier":
        return HeldOutBrier(torch.cat(parts, dim=-1)[..., back])
    probs, shares = zip(*parts, strict=True)
    return HeldOutNLL(torch.cat(probs, dim=1)[:, back], torch.cat(shares)[back])


def chance_of_best(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The chance of each calibrator to have the lowest sum of scores, were the rows drawn again: `(M,)` float64.

    Args:
        scores (`torch.Tensor` of shape `(M, N)`, float64): of held-out rows.
        weights (`torch.Tensor` of shape `(N,)`, float64): of the rows, with mean 1.
    """
    excess = (scores - scores.mean(0)) * weights
    total = excess.sum(1)
    centred = excess - excess.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    noise = torch.randn(NUM_DRAWS, len(scores), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = total + (noise.to(scores.device) * values.clamp_min(0).sqrt()) @ vectors.T
    return (-draws).softmax(-1).mean(0)


def _alone(like: torch.Tensor) -> torch.Tensor:
    """Shares that give everything to one: `(M, M)`."""
    return torch.eye(len(like), dtype=torch.float64, device=like.device)


def _at_labels(log_probs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if labels.is_floating_point():
        return log_probs.double().exp(), labels
    index = labels[:, None].expand(len(log_probs), -1, 1)
    return log_probs.gather(-1, index).double().exp(), torch.ones_like(labels, dtype=torch.float64)[:, None]


def _products(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if not labels.is_floating_point():
        labels = nn.functional.one_hot(labels, log_probs.shape[-1])
    missed = log_probs.double().exp() - labels
    return torch.einsum("mnc,knc->mkn", missed, missed)
