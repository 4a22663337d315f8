"""The polynomial through values and derivatives at a few points: a mean NLL over log T, from sums at temperatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.polynomial import Chebyshev, chebyshev


def interpolate(points: np.ndarray, derivatives: np.ndarray, orders: Sequence[int], half_width: float) -> Chebyshev:
    """The polynomial of lowest degree that has these derivatives at these points.

    Args:
        points (`(n,)`): in `[-half_width, half_width]`.
        derivatives (`(n, K)`): by order: the value, the slope, ...
        orders: which of them to take. Slopes alone leave the constant open.
    """
    x, size = points / half_width, len(points) * len(orders)
    equations = [
        chebyshev.chebvander(x, size - 1 - order) @ chebyshev.chebder(np.eye(size), order) for order in orders
    ]
    known = np.concatenate([derivatives[:, order] * half_width**order for order in orders])
    # least squares do not mind what is left open
    coefficients = np.linalg.lstsq(np.concatenate(equations), known, rcond=None)[0]
    return Chebyshev(coefficients, domain=[-half_width, half_width])


def rising_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that is negative at `low` and positive at `high` vanishes, by bisection."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2
