"""A regression whose answer is known, with a gap in which a model should admit that it does not
know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnnflow.arguments import Count, NonNegative, Whole, checked, finite
from bnnflow.data.loaders import Dataset
from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = ["gap_function", "gap_regression"]


@checked
def gap_function(x: Tensor) -> Tensor:
    """Return the noiseless function behind `gap_regression`, elementwise."""
    finite("x", x)
    return torch.sin(2 * x) + 0.3 * x


@checked
def gap_regression(
    seed: Seed = 0, *, n: Count = 60, noise: NonNegative = 0.1, n_test: Whole = 200
) -> Dataset:
    """Make a one-dimensional regression whose inputs leave a gap.

    Half of the training inputs are uniform on (-1.8, -0.6), half on (0.5, 1.8), with y =
    `gap_function` (x) + noise. The test inputs are an evenly spaced grid on [-2.1, 2.1], so that
    they cover the gap and both edges; their targets have the same noise. Nothing is standardised:
    both axes are close to unit scale.

    Args:
        seed: an int or a generator.
        n: training rows.
        noise: standard deviation of the Gaussian noise.
        n_test: test rows.

    Raises:
        ValueError: if there are too few rows or the noise is not positive.
    """
    if n < 2 or n_test < 2 or not noise > 0:
        raise ValueError(
            f"need n >= 2, n_test >= 2 and noise > 0, got {n}, {n_test} and {noise}"
        )
    generator = as_generator(seed)
    left = -1.8 + 1.2 * torch.rand(n // 2, generator=generator)
    right = 0.5 + 1.3 * torch.rand(n - n // 2, generator=generator)
    x = torch.cat([left, right]).sort().values
    grid = torch.linspace(-2.1, 2.1, n_test)
    y = gap_function(x) + noise * torch.randn(n, generator=generator)
    y_grid = gap_function(grid) + noise * torch.randn(n_test, generator=generator)
    return Dataset("gap", x[:, None], y, grid[:, None], y_grid)
