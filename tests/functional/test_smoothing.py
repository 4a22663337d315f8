"""The heat kernel: the reflected Gaussian, with the whole weight of masses at the ends; and the grid it works on."""

import pytest
import torch

from hf_calib.functional.smoothing import NUM_CELLS, grid_masses, grid_position, smooth, smooth_error


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


def test_the_smoothed_norm_falls_with_the_width():
    """So that there is one crossing for the bisection to find."""
    masses = torch.randn(NUM_CELLS + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / NUM_CELLS
    widths = torch.linspace(0.001, 0.5, 40, dtype=torch.float64)  # wider than this, nothing is left to cancel
    norms = trapezoid(smooth(masses.expand(40, -1), widths).abs())
    assert (norms.diff() < 0).all()


@pytest.mark.parametrize("mass", [0.0, 1e-6, -0.3, 1.0])
@pytest.mark.parametrize("point", [0, 1, 500, 1024])
def test_the_smooth_error_of_one_mass_is_the_mass(point, mass):
    assert smooth_error(masses_at([point], [mass])).item() == pytest.approx(abs(mass), abs=1e-9)


def test_the_smooth_error_takes_any_number_of_rows():
    masses = torch.randn(2, 3, NUM_CELLS + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masses = masses / NUM_CELLS
    each = [[smooth_error(row).item() for row in rows] for rows in masses]
    torch.testing.assert_close(smooth_error(masses), torch.tensor(each, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_score_lies_between_its_two_grid_points(dtype):
    scores = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(200, generator=torch.Generator().manual_seed(0))])
    scores = scores.to(dtype)
    cells, upper = grid_position(scores)
    assert cells.dtype == torch.int64
    assert cells.min() >= 0
    assert cells.max() <= NUM_CELLS - 1
    assert ((upper >= 0) & (upper <= 1)).all()
    torch.testing.assert_close((cells + upper) / NUM_CELLS, scores.double(), atol=1e-15, rtol=0)
    assert (cells[1], upper[1]) == (NUM_CELLS - 1, 1)


def test_residuals_are_shared_between_neighbours_by_nearness():
    """A right row a quarter above point 512, a wrong one at 1."""
    scores = torch.tensor([[512.25 / NUM_CELLS], [1.0]], dtype=torch.float64)
    residual = 1 - 512.25 / NUM_CELLS
    expected = masses_at([512, 513, 1024], [0.75 * residual / 2, 0.25 * residual / 2, -1 / 2])
    torch.testing.assert_close(grid_masses(scores, torch.tensor([[True], [False]]))[0], expected)


def test_every_column_has_its_own_masses_and_keeps_their_sum():
    scores = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outcomes = torch.arange(150).view(50, 3) % 2 == 0
    masses = grid_masses(scores, outcomes)
    torch.testing.assert_close(masses.sum(-1), (outcomes.double() - scores).mean(0))
    for column in range(3):
        alone = grid_masses(scores[:, column, None], outcomes[:, column, None])[0]
        torch.testing.assert_close(masses[column], alone)
