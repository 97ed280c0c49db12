"""Solvers for ordinary and stochastic differential equations; they know nothing of flows.

A state is a tuple of tensors whose first axis runs over samples. Everything is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, get_args
from weakref import finalize

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bnnflow.arguments import Count, NonNegative, Positive, checked
from bnnflow.seeding import as_generator
from bnnflow.types import AdaptiveRule, FixedRule, Rule, Seed, StochasticRule

__all__ = [
    "integrate",
    "integrate_sde",
    "integrate_with_error",
    "integrate_with_trace",
    "largest_chunk",
    "time_grid",
]

State = tuple[Tensor, ...]
Slope = Callable[[Tensor, State], State]


@checked
def time_grid(
    steps: Count | Sequence[float] | Tensor,
    power: Positive = 2.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return float64 times from 0 to 1, denser towards 1 for powers above 1, ``(steps + 1,)``.

    A posterior narrower than its prior bends the path most just before it arrives: at a standard
    deviation sigma of the prior's, where 1 - t is about sigma. Eight steps of the midpoint rule
    carry N(0, 1) to N(0, sigma^2) with its width off by 8, 4, 0.6 and 0.1% for sigma = .01, .02,
    .1 and 1.

    Args:
        steps: how many; or the times themselves, from 0 to 1, which are then used as they are.
        power: the times are 1 - (1 - i / steps)^power.
        device: where they are kept.

    Raises:
        ValueError: if there is no step, or the times do not increase from 0 to 1.
    """
    if isinstance(steps, int):
        return (
            1
            - (1 - torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=device))
            ** power
        )
    times = torch.as_tensor(steps, dtype=torch.float64, device=device)
    _check_monotone(times, "steps")
    if float(times[0]) != 0 or float(times[-1]) != 1:
        raise ValueError(
            f"steps must be times from 0 to 1, got {float(times[0]):g} to {float(times[-1]):g}"
        )
    return times


# ---------------------------------------- ordinary differential equations


@checked
def integrate(
    field: Slope,
    state: State,
    grid: Tensor,
    rule: Rule = "rk4",
    *,
    rtol: Positive = 1e-5,
    atol: Positive = 1e-5,
    max_evaluations: Count = 2000,
) -> State:
    """Integrate d state / dt = field(t, state) over the times of ``grid``, forwards or backwards.

    The field is asked at no time outside the ends of ``grid``.

    Args:
        field: takes a scalar time and a tuple of tensors, returns their derivatives.
        state: where to start.
        grid: ``(steps + 1,)`` monotone times.
        rule: with the steps of ``grid``: Euler (1 evaluation a step), the midpoint rule (2) or the
            classical Runge-Kutta rule (4). Between the ends of ``grid``, with steps of their own
            for the whole batch: an adaptive rule of torchdiffeq (Chen 2018), such as ``"dopri5"``.
        rtol: of adaptive rules, which bound the local error of *every sample*, the root of its mean
            square in units of atol + rtol * |state|; so no sample's accuracy depends on its
            company.
        atol: see ``rtol``. Flows move in coordinates in which their source is N(0, I), so that 1e-5
            of a standard deviation of the prior is meant there, whatever the units of the weights.
        max_evaluations: of the field by an adaptive rule, whose steps the stiffest sample dictates.

    Raises:
        ValueError: for an unknown rule, times that are not monotone, or tolerances that are not
            positive.
        FloatingPointError: as soon as a state is NaN, or a velocity of an adaptive rule is not
            finite, saying when.
        RuntimeError: if an adaptive rule needs more evaluations, or steps too small to be
            represented.
    """
    _check_monotone(grid)
    if not state:
        raise ValueError("state must hold one tensor or more")
    if rule in get_args(AdaptiveRule):
        return _adaptive(field, state, grid, rule, rtol, atol, max_evaluations)
    for start, stop in pairwise(grid):
        state = _RULES[rule][0](field, start, stop - start, state)
        _check_state(state, start, stop)
    return state


def step(
    field: Slope, start: Tensor, length: Tensor, state: State, rule: FixedRule
) -> State:
    """Make one step of a fixed rule, whatever comes of it."""
    return _RULES[rule][0](field, start, length, state)


@checked
def integrate_with_error(
    field: Slope, state: State, grid: Tensor, rule: FixedRule = "rk4"
) -> tuple[State, tuple[Tensor, ...]]:
    """Integrate with the steps of ``grid`` halved, and estimate each sample's error by those of
    twice the length.

    With a rule of order p the end of the short steps is off by about the difference of both ends
    over 2^p - 1 (Richardson). Costs three times the evaluations of ``integrate``. A random field
    must be the same one in both runs.

    Returns:
        The end state of the short steps, and the error of each of its tensors, the root mean square
        over all axes but the first, ``(batch,)`` each in float64.

    Raises:
        ValueError: for a rule that has no fixed order, or times that are not monotone.
        FloatingPointError: as soon as a state is NaN.
    """
    coarse = integrate(field, state, grid, rule)
    middles = (grid[1:] + grid[:-1]) / 2
    fine = integrate(
        field,
        state,
        torch.cat([grid[:1], torch.stack([middles, grid[1:]], 1).flatten()]),
        rule,
    )
    scale = 2 ** _RULES[rule][1] - 1
    return fine, tuple(
        _size(short - long) / scale for short, long in zip(fine, coarse, strict=True)
    )


def integrate_with_trace(
    field: Callable[[Tensor, Tensor], Tensor],
    trace: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    evaluations: int,
    rule: Rule = "rk4",
    *,
    backwards: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve dx / dt = field(t, x) from t = 0 to 1 and integrate ``trace(t, x(t))`` dt along the
    solution.

    For integrands that cost far more than the velocity. They are evaluated at the nodes of the rule
    of Gauss and Legendre, one step of the solver apart, which for smooth integrands of n
    evaluations has an error like that of a polynomial of degree 2 n: carried along as part of the
    state they would need four a step for the fourth order. Neither end is a node. Half the
    difference between the rules on every other node is about what a peak that one node has met
    contributes: where it is large, the integrand is not smooth, and more evaluations are needed.

    Args:
        field: takes a scalar time and ``(batch, dim)``.
        trace: takes the same and returns ``(batch,)`` in float64.
        x: where to start, ``(batch, dim)``.
        evaluations: of the integrand; the rule makes one step more.
        rule: one with fixed steps.
        backwards: from t = 1 to 0, along the way back; the integral is then the negative.

    Returns:
        The end ``(batch, dim)``, the integral ``(batch,)`` in float64, and that difference; zero
        for less than eight evaluations, which cannot tell.

    Raises:
        ValueError: for a rule without fixed steps, or no evaluation.
        FloatingPointError: as soon as a state is NaN.
    """
    if rule not in _RULES:
        raise ValueError(
            f"the steps are fixed: rule must be in {sorted(_RULES)}, got {rule!r}"
        )
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations}")
    points, weights = np.polynomial.legendre.leggauss(evaluations)
    halves = _every_other(points) if evaluations >= 8 else 0 * points
    rules = torch.from_numpy(np.stack([weights, halves]) / 2).to(x.device)
    times = node_times(evaluations, x.device)
    if backwards:
        times, rules = times.flip(0), -rules.flip(1)
    totals = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for index, step in enumerate(times.unfold(0, 2, 1)):
        (x,) = integrate(lambda t, state: (field(t, state[0]),), (x,), step, rule)
        if index < evaluations:
            totals = totals + rules[:, index, None] * trace(step[1], x)
    return x, totals[0], totals[1].abs()


def node_times(evaluations: int, device: torch.device) -> Tensor:
    """Return the times of `integrate_with_trace`: the nodes of Gauss and Legendre in [0, 1], and
    both ends.
    """
    points, _ = np.polynomial.legendre.leggauss(evaluations)
    return torch.from_numpy(np.concatenate([[0.0], (points + 1) / 2, [1.0]])).to(device)


def twice_as_long(grid: Tensor) -> Tensor:
    """Return the times of steps of twice the length, the last one apart."""
    return torch.cat([grid[:-1:2], grid[-1:]])


def order_of(rule: Rule) -> int:
    """Return the order p of a rule: steps of half the length are off by 2^p times less."""
    return _RULES[rule][1]


def _every_other(points: np.ndarray) -> np.ndarray:
    """Return half the difference between the two rules on [-1, 1] that use every other point and
    are exact for them.
    """
    signed = np.empty_like(points)
    for first, sign in ((0, 0.5), (1, -0.5)):
        some = points[first::2]
        moments = np.zeros(len(some))
        moments[0] = 2.0  # of the Legendre polynomials
        signed[first::2] = sign * np.linalg.solve(
            np.polynomial.legendre.legvander(some, len(some) - 1).T, moments
        )
    return signed


def _along(state: State, h: Tensor | float, slope: State) -> State:
    return tuple(part + h * d for part, d in zip(state, slope, strict=True))


def _euler(field: Slope, t: Tensor, h: Tensor, state: State) -> State:
    return _along(state, h, field(t, state))


def _midpoint(field: Slope, t: Tensor, h: Tensor, state: State) -> State:
    return _along(state, h, field(t + h / 2, _along(state, h / 2, field(t, state))))


def _rk4(field: Slope, t: Tensor, h: Tensor, state: State) -> State:
    k1 = field(t, state)
    k2 = field(t + h / 2, _along(state, h / 2, k1))
    k3 = field(t + h / 2, _along(state, h / 2, k2))
    k4 = field(t + h, _along(state, h, k3))
    slope = tuple(
        (a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)
    )
    return _along(state, h, slope)


# with their orders
_RULES = {
    "euler": (_euler, 1),
    "midpoint": (_midpoint, 2),
    "rk4": (_rk4, 4),
}


def _adaptive(
    field: Slope,
    state: State,
    grid: Tensor,
    rule: Rule,
    rtol: float,
    atol: float,
    max_evaluations: int,
) -> State:
    from torchdiffeq import odeint

    sizes, evaluations = [part.numel() for part in state], 0
    first, last = grid[[0, -1]].sort().values

    def joined(parts: State) -> Tensor:
        # in the widest of their types
        return torch.cat([part.reshape(-1) for part in parts])

    def split(flat: Tensor) -> State:
        parts = zip(flat.split(sizes), state, strict=True)
        return tuple(values.reshape(part.shape).to(part.dtype) for values, part in parts)

    def slope(t: Tensor, flat: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        # the first guess of a step may look further, and sums of times are rounded
        t = t.clamp(first, last)
        if evaluations > max_evaluations:
            raise RuntimeError(
                f"{rule} has used {max_evaluations} evaluations by t = {float(t):.4f}: one sample "
                "may be too stiff; "
                "take a rule with fixed steps, such as 'rk4' (or, in integrate itself, looser "
                "tolerances or a larger max_evaluations)"
            )
        velocity = joined(field(t, split(flat)))
        if not bool(velocity.isfinite().all()):
            raise FloatingPointError(
                f"the velocity is NaN or infinite at t = {float(t):.4f}"
            )
        return velocity

    def worst_sample(flat: Tensor) -> Tensor:
        return torch.stack([_size(part).max() for part in split(flat.detach())]).max()

    try:
        # Without a step that ends there, the last one goes beyond the end and is interpolated back.
        options = {"norm": worst_sample, "step_t": grid[-1:]}
        path = odeint(
            slope,
            joined(state),
            grid[[0, -1]],
            rtol=rtol,
            atol=atol,
            method=rule,
            options=options,
        )
    # of torchdiffeq: a step of no length, or a state that is not finite
    except AssertionError as error:
        raise RuntimeError(
            f"{rule} failed: {error}; take a rule with fixed steps, such as 'rk4'"
        ) from error
    assert isinstance(path, Tensor)
    return split(path[-1])


# ---------------------------------------- stochastic differential equations


@checked
def integrate_sde(
    field: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    noise: NonNegative | Callable[[Tensor], Tensor | float],
    x: Tensor,
    grid: Tensor,
    seed: Seed,
    rule: StochasticRule = "midpoint",
) -> Tensor:
    """Integrate dx = (v + noise^2 / 2 * s) dt + noise dW over the times of ``grid``.

    If s is the score of the marginal laws of dx/dt = v, the marginals are the same whatever the
    noise (Song et al. 2021); more of it forgets errors of v sooner, and needs shorter steps. The
    noise is held over a step at its value in the middle, which costs the marginals nothing; so it
    may be zero on part of the path, best with a time of the grid where it jumps. A score is not
    looked at where there is no noise, and never at the last time.

    Args:
        field: takes a scalar time and ``(batch, dim)``, returns v and s, ``(batch, dim)`` each.
        noise: standard deviation of the noise over a unit of time: a number, or a function of time.
        x: where to start, ``(batch, dim)``.
        grid: ``(steps + 1,)`` increasing times.
        seed: of the noise.
        rule: ``"euler"``, that of Euler and Maruyama, of weak order 1, or ``"midpoint"``, two
            evaluations a step and weak order 2 for noise of this kind (Milstein and Tretyakov
            2004). Without noise they are the rules of that name for ordinary equations.

    Raises:
        ValueError: for an unknown rule, times that do not increase, or noise that is negative or
            not finite.
        FloatingPointError: as soon as a state is NaN, saying when.
    """
    _check_monotone(grid)
    if float(grid[0]) > float(grid[-1]):
        raise ValueError("a stochastic equation runs forwards: the times must increase")
    x = x if x.is_floating_point() else x.double()
    generator = as_generator(seed, x.device)
    levels = [
        float(noise(t) if callable(noise) else noise) for t in (grid[1:] + grid[:-1]) / 2
    ]
    if not all(0 <= level < float("inf") for level in levels):
        raise ValueError("noise must be finite and not negative at all times")

    def drift(t: Tensor, x: Tensor, level: float) -> Tensor:
        velocity, score = field(t, x)
        return velocity + 0.5 * level**2 * score if level else velocity

    def wiener(h: Tensor) -> Tensor:
        return h.sqrt() * torch.randn(
            x.shape, generator=generator, device=x.device, dtype=x.dtype
        )

    for (start, stop), level in zip(pairwise(grid), levels, strict=True):
        h = stop - start
        if rule == "euler":
            x = x + h * drift(start, x, level) + level * wiener(h)
        else:
            first, second = level * wiener(h / 2), level * wiener(h / 2)
            middle = x + h / 2 * drift(start, x, level) + first
            x = x + h * drift(start + h / 2, middle, level) + first + second
        _check_state((x,), start, stop)
    return x


# ---------------------------------------- memory


@checked
def largest_chunk(memory: Count, work: Callable[[Tensor], Any], x: Tensor) -> int:
    """Return how many rows of ``x`` may travel together so that ``work`` holds at most ``memory``
    bytes of tensors.

    Runs ``work`` once to begin with, then on two and on four rows, and counts, operation by
    operation, the bytes of the tensors that are alive, arguments and results included. After each
    operation they are a fixed cost and a price for each row; the operation at which the fewest rows
    fit decides. Not counted are buffers inside an operation and what an allocator keeps in reserve:
    leave a margin.

    Args:
        memory: bytes.
        work: what is to be done with rows ``(n, ...)``, by the same operations whatever n. One step
            of a solver stands for all, unless gradients are recorded. Where more rows make it cut
            its work into smaller pieces, as `exact_divergence` does by itself, fewer are returned
            than would fit.
        x: some rows, two at least.

    Raises:
        ValueError: if there are fewer than two rows, not even one would fit, or the operations are
            not the same.
    """
    if x.dim() == 0 or len(x) < 2:
        raise ValueError(
            f"x must have two rows or more, to measure what one costs, got shape {tuple(x.shape)}"
        )
    work(x[:2])  # what is made once and kept is no part of the price
    two, four = (live_bytes(work, torch.cat([x[:2]] * n)) for n in (1, 2))
    if len(two) != len(four):
        raise ValueError(
            "the operations depend on the rows: measure one step of a solver with a fixed grid"
        )
    price = (four - two) / 2
    fixed = two - 2 * price
    rows = int(((memory - fixed) / price.clamp(min=1e-3)).min())
    if rows < 1:
        raise ValueError(
            f"one row needs {float((fixed + price).max()):.0f} bytes, more than the "
            f"{memory} allowed"
        )
    return rows


class _LiveBytes(TorchDispatchMode):
    """Counts, after each operation, the bytes of all tensors that operations have met and that are
    not yet freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten((args, kwargs, result))[0]:
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        self.counts.append(self._live)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._live += size
            finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def live_bytes(work: Callable[[Tensor], Any], rows: Tensor) -> Tensor:
    with _LiveBytes() as counter:
        work(rows)
    return torch.tensor(counter.counts, dtype=torch.float64)


# ---------------------------------------- what all share


def _check_monotone(grid: Tensor, name: str = "grid") -> None:
    if grid.dim() != 1 or len(grid) < 2 or not bool(grid.isfinite().all()):
        raise ValueError(
            f"{name} must be two or more finite times (steps + 1,), got shape {tuple(grid.shape)}"
        )
    lengths = grid.diff()
    if not bool((lengths > 0).all() or (lengths < 0).all()):
        raise ValueError(
            f"{name}: the times must increase throughout, or decrease throughout"
        )


def _check_state(state: State, start: Tensor, stop: Tensor) -> None:
    if any(bool(part.isnan().any()) for part in state):
        raise FloatingPointError(
            f"the velocity became NaN between t = {float(start):.4f} and {float(stop):.4f}"
        )


def _size(part: Tensor) -> Tensor:
    """Return the root mean square of each sample, ``(batch,)`` float64."""
    return part.double().reshape(part.shape[0], -1).square().mean(-1).sqrt()
