"""The heat kernel on [0, 1]: what the smooth calibration error smooths with.

A Gaussian reflected at both ends is the heat kernel of an interval with insulated ends, whose eigenfunctions are
cosines: smoothing by sigma multiplies the k-th cosine coefficient by exp(-(pi k sigma)^2 / 2). On a grid that
includes both ends the cosine transform is a real FFT of the mirrored values, and a point at the end keeps its full
weight.
"""

from __future__ import annotations

import torch


NUM_CELLS = 1024
STEPS = 9  # the width is known to 1e-8


def grid_masses(scores: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """Residuals (outcome minus score) summed onto a grid, each shared between its two neighbouring points.

    Args:
        scores (`torch.Tensor` of shape `(N, K)`, floating in `[0, 1]`).
        outcomes (`torch.Tensor` of shape `(N, K)`, bool).
    Returns:
        `torch.Tensor` of shape `(K, NUM_CELLS + 1)`, float64: masses per row, `N` of which were shared out.
    """
    num_rows, num_columns = scores.shape
    cells, upper_share = grid_position(scores)
    residuals = outcomes.double() - scores.double()
    cells = cells + torch.arange(num_columns, device=scores.device) * (NUM_CELLS + 1)
    size = num_columns * (NUM_CELLS + 1)
    lower = torch.bincount(cells.reshape(-1), (residuals * (1 - upper_share)).reshape(-1), minlength=size)
    upper = torch.bincount(cells.reshape(-1) + 1, (residuals * upper_share).reshape(-1), minlength=size)
    return (lower + upper).view(num_columns, -1) / num_rows


def masses_of_cells(sums: torch.Tensor) -> torch.Tensor:
    """`grid_masses` from sums over cells of confidence, each taken to lie at its mean confidence.

    Args:
        sums (`torch.Tensor` of shape `(3, ..., cells)`, float64): count, sum of scores, sum of outcomes.
    Returns:
        `torch.Tensor` of shape `(..., NUM_CELLS + 1)`, float64.
    """
    counts, scores, outcomes = sums
    cells, upper_share = grid_position(scores / counts.clamp_min(1))
    residuals = (outcomes - scores) / counts.sum(-1, keepdim=True)
    masses = residuals.new_zeros(*residuals.shape[:-1], NUM_CELLS + 1)
    masses.scatter_add_(-1, cells, residuals * (1 - upper_share))
    return masses.scatter_add_(-1, cells + 1, residuals * upper_share)


def grid_position(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid point below each score (int64, at most `NUM_CELLS - 1`) and the share of the point above it."""
    position = scores.double() * NUM_CELLS
    cells = position.floor().clamp_max(NUM_CELLS - 1)
    return cells.long(), position - cells


def smooth(masses: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The density of masses on the grid after smoothing by the heat kernel, at the points of the grid.

    Args:
        masses (`torch.Tensor` of shape `(..., NUM_CELLS + 1)`, float64).
        sigma (`torch.Tensor` of shape `(...)` or `()`, float64, positive): the kernel's width.
    Returns:
        `torch.Tensor` of shape `(..., NUM_CELLS + 1)`, float64: its integral over [0, 1] is the sum of the masses.
    """
    return _smoothed_density(_cosine_coefficients(masses), sigma)


def smooth_error(masses: torch.Tensor) -> torch.Tensor:
    """The smooth calibration error of residual masses on the grid: the sigma at which the smoothed error equals sigma.

    The smoothed error falls with sigma (the heat flow contracts the L1 norm), so there is one crossing. Regula falsi
    with the Illinois rule finds it.

    Args:
        masses (`torch.Tensor` of shape `(..., NUM_CELLS + 1)`, float64): from `grid_masses`.
    Returns:
        `torch.Tensor` of shape `(...)`, float64, in `[0, 1]`.
    """
    coefficients = _cosine_coefficients(masses)
    low = torch.zeros(masses.shape[:-1], dtype=torch.float64, device=masses.device)
    high = torch.ones_like(low)
    excess_low, excess_high = _smoothed_norm(coefficients, low), _smoothed_norm(coefficients, high) - 1
    below_again, above_again = torch.zeros_like(low, dtype=torch.bool), torch.zeros_like(low, dtype=torch.bool)
    for _ in range(STEPS):
        sigma = _crossing(low, high, excess_low, excess_high)
        excess = _smoothed_norm(coefficients, sigma) - sigma
        above = excess > 0
        # an end that stays twice counts half, or it would stay for ever
        excess_low = torch.where(above, excess, torch.where(below_again, excess_low / 2, excess_low))
        excess_high = torch.where(above, torch.where(above_again, excess_high / 2, excess_high), excess)
        low, high = torch.where(above, sigma, low), torch.where(above, high, sigma)
        below_again, above_again = ~above, above
    return _crossing(low, high, excess_low, excess_high)


def _crossing(low: torch.Tensor, high: torch.Tensor, at_low: torch.Tensor, at_high: torch.Tensor) -> torch.Tensor:
    """Where a line falls to 0; `low` where it is 0 everywhere."""
    drop = (at_low - at_high).clamp_min(torch.finfo(torch.float64).tiny)
    return low + (high - low) * at_low / drop


def _cosine_coefficients(masses: torch.Tensor) -> torch.Tensor:
    """`sum_j masses_j cos(pi k j / NUM_CELLS)` for every k: a real FFT of the masses padded to a full circle."""
    return torch.fft.rfft(masses, n=2 * NUM_CELLS).real


def _smoothed_density(coefficients: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    frequency = torch.arange(NUM_CELLS + 1, dtype=torch.float64, device=sigma.device) * torch.pi
    damped = coefficients * torch.exp(-0.5 * (frequency * sigma[..., None]).square())
    # density(t) = a_0 + 2 sum_k a_k cos(pi k t); irfft supplies the factor 2 and the sum over both signs of k
    return torch.fft.irfft(damped, n=2 * NUM_CELLS)[..., : NUM_CELLS + 1] * 2 * NUM_CELLS


def _smoothed_norm(coefficients: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """L1 norm over [0, 1] of the masses smoothed by sigma, by the trapezoid rule on the grid."""
    density = _smoothed_density(coefficients, sigma).abs()
    return (density.sum(-1) - (density[..., 0] + density[..., -1]) / 2) / NUM_CELLS
