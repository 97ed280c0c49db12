"""Fixed-grid solvers for ordinary differential equations; they know nothing of flows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from bnnflow.types import Solver

__all__ = ["integrate", "time_grid"]

State = tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]


def time_grid(steps: int, power: float = 1.5, device: torch.device | str = "cpu") -> Tensor:
    """Return ``steps + 1`` float64 times from 0 to 1, denser towards 1 for powers above 1.

    A posterior narrower than its prior bends the path most just before it arrives.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return 1 - (1 - torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=device)) ** power


def integrate(field: Field, state: State, grid: Tensor, solver: Solver = "rk4") -> State:
    """Integrate d state / dt = field(t, state) over the times of ``grid``, forwards or backwards.

    Args:
        field: takes a scalar time and a tuple of tensors, returns their derivatives.
        state: where to start.
        grid: ``(steps + 1,)`` monotone times.
        solver: Euler (1 evaluation a step), the midpoint rule (2) or the classical Runge-Kutta rule (4).

    Raises:
        ValueError: for an unknown solver.
        FloatingPointError: as soon as a state is NaN, saying when.
    """
    rules = {"euler": _euler, "midpoint": _midpoint, "rk4": _rk4}
    if solver not in rules:
        raise ValueError(f"solver must be one of {sorted(rules)}, got {solver!r}")
    for start, stop in pairwise(grid):
        state = rules[solver](field, start, stop - start, state)
        if any(bool(part.isnan().any()) for part in state):
            raise FloatingPointError(f"the velocity became NaN between t = {float(start):.4f} and {float(stop):.4f}")
    return state


def _along(state: State, h: Tensor | float, slope: State) -> State:
    return tuple(part + h * d for part, d in zip(state, slope, strict=True))


def _euler(field: Field, t: Tensor, h: Tensor, state: State) -> State:
    return _along(state, h, field(t, state))


def _midpoint(field: Field, t: Tensor, h: Tensor, state: State) -> State:
    return _along(state, h, field(t + h / 2, _along(state, h / 2, field(t, state))))


def _rk4(field: Field, t: Tensor, h: Tensor, state: State) -> State:
    k1 = field(t, state)
    k2 = field(t + h / 2, _along(state, h / 2, k1))
    k3 = field(t + h / 2, _along(state, h / 2, k2))
    k4 = field(t + h, _along(state, h, k3))
    slope = tuple((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
    return _along(state, h, slope)
