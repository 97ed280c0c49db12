"""Modes of densities with kinks, as ReLU networks and Laplace priors have them.

A mode then often lies in kinks, where the gradient does not vanish: it jumps from piece to piece.
Line searches for smooth functions stop in such places long before, and a Newton step promises what
no step can keep.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.optimize

__all__ = ["minimise", "shortest_mixture"]

_HALVINGS = 40
_ROUNDING = 1e-12  # of the value: what is gained below it is none


def minimise(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    inverse_hessian: np.ndarray,
    iterations: int,
) -> np.ndarray:
    """Descend by BFGS with a bisection for the weak Wolfe conditions (Lewis and Overton 2013).

    The approximation of the Hessian learns the kinks, so that steps come to lie along them.

    Args:
        function: returns value and gradient; infinite values are never stepped to.
        start: ``(dim,)``.
        inverse_hessian: the first approximation, ``(dim, dim)``, positive definite.
        iterations: at most.
    """
    x, inverse = start, inverse_hessian.copy()
    value, grad = function(x)
    for _ in range(iterations):
        direction = -inverse @ grad
        found = _step(function, x, value, direction, float(grad @ direction))
        if found is None:
            break
        step, new, new_grad = found
        change = new_grad - grad
        curvature = float(step @ change)
        if curvature > 0:
            turned = inverse @ change
            inverse += (1 + change @ turned / curvature) * np.outer(step, step) / curvature
            inverse -= (np.outer(step, turned) + np.outer(turned, step)) / curvature
        gain = value - new
        x, value, grad = x + step, new, new_grad
        if gain <= _ROUNDING * (1 + abs(value)):
            break
    return x


def _step(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]],
    x: np.ndarray,
    value: float,
    direction: np.ndarray,
    slope: float,
) -> tuple[np.ndarray, float, np.ndarray] | None:
    """Return a step that descends enough and far enough, with value and gradient there.

    None if there is none.
    """
    if not slope < 0:
        return None
    low, high, size = 0.0, np.inf, 1.0
    for _ in range(_HALVINGS):
        step = size * direction
        new, grad = function(x + step)
        if not new <= value + 1e-4 * size * slope:
            high = size
        elif grad @ direction < 0.9 * slope:
            low = size
        else:
            return step, new, grad
        size = 0.5 * (low + high) if np.isfinite(high) else 2 * low
    return None


def shortest_mixture(gradients: np.ndarray) -> np.ndarray:
    """Return the shortest convex combination of gradients ``(n, dim)``.

    Of gradients near a point that is the direction that descends on every piece (Burke, Lewis and
    Overton 2005); where it is zero there is none. In coordinates in which the curvature is 1, half
    its squared norm is what a step can gain.
    """
    weight = 1e3 * np.abs(gradients).max()
    if not weight > 0:
        return np.zeros(gradients.shape[1])
    # the last one makes the shares add up to 1
    rows = np.vstack([gradients.T, np.full(len(gradients), weight)])
    target = np.append(np.zeros(gradients.shape[1]), weight)
    shares, _ = scipy.optimize.nnls(rows, target, maxiter=30 * len(gradients))
    return shares / shares.sum() @ gradients
