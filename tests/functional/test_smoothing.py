import pytest
import torch

from hf_calib.functional.smoothing import NUM_CELLS, smooth, smooth_error


GRID = torch.arange(NUM_CELLS + 1, dtype=torch.float64) / NUM_CELLS


def masses_at(points, weights):
    masses = torch.zeros(NUM_CELLS + 1, dtype=torch.float64)
    masses[torch.tensor(points)] = torch.tensor(weights, dtype=torch.float64)
    return masses


def reflected_density(masses, sigma):
    """The Gaussian density with its images at both ends, summed mass by mass."""
    images = torch.stack([2.0 * k + sign * GRID for k in range(-3, 4) for sign in (-1, 1)])
    kernel = torch.exp(-0.5 * ((GRID[:, None, None] - images) / sigma).square()).sum(1)
    return kernel @ masses / (sigma * (2 * torch.pi) ** 0.5)


def trapezoid(density):
    return torch.trapezoid(density, dx=1 / NUM_CELLS)


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.7])
def test_smoothing_is_the_reflected_gaussian(sigma):
    masses = masses_at([0, 200, 1024], [0.5, -0.2, 0.3])
    density = smooth(masses, torch.tensor(sigma, dtype=torch.float64))
    torch.testing.assert_close(density, reflected_density(masses, sigma), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(trapezoid(density), masses.sum())


def test_smoothing_takes_a_width_for_each_row():
    masses = torch.stack([masses_at([100], [1.0]), masses_at([900], [2.0])])
    sigma = torch.tensor([0.05, 0.2], dtype=torch.float64)
    together = smooth(masses, sigma)
    for row in range(2):
        torch.testing.assert_close(together[row], smooth(masses[row], sigma[row]))


def test_the_smooth_error_is_the_norm_of_what_smoothing_by_it_leaves():
    masses = masses_at([0, 300, 1024], [0.1, 0.2, -0.25])
    error = smooth_error(masses)
    torch.testing.assert_close(trapezoid(smooth(masses, error).abs()), error, atol=1e-6, rtol=0)
