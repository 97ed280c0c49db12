"""Choices that flows share, as values: how pairs are matched, how the equation is solved, how its
trace is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from bnnflow.arguments import Count, Positive, checked
from bnnflow.transport.couplings import Coupling, Independent
from bnnflow.transport.divergence import probe_noise
from bnnflow.transport.paths import AffinePath
from bnnflow.transport.solvers import Slope, State, integrate, time_grid
from bnnflow.transport.times import LogUniformNearEnd, Times
from bnnflow.types import FixedRule, Noise, Rule, Trace

__all__ = ["Density", "Matching", "Solver", "default_chunk"]


@checked
@dataclass(frozen=True)
class Solver:
    """How the differential equation of a flow is solved.

    Attributes:
        rule: with the steps below: ``"euler"`` (1 evaluation a step), ``"midpoint"`` (2) or
            ``"rk4"`` (4); or an adaptive rule with steps of its own, such as ``"dopri5"``.
        steps: how many, denser towards t = 1 (`time_grid`), or the times between them, from 0 to 1.
            Log densities evaluate the divergence at twice as many nodes of the rule of Gauss and
            Legendre, a step apart, and at up to four times these where it is rough; times of one's
            own, and adaptive rules, integrate it along with the state, at every evaluation.
        rtol: relative tolerance of adaptive rules, for every draw; see `integrate`.
        atol: absolute tolerance of adaptive rules, in standard deviations of the source.
    """

    rule: Rule = "midpoint"
    steps: Count | Sequence[float] = 8
    rtol: Positive = 1e-5
    atol: Positive = 1e-5

    def __post_init__(self) -> None:
        self.grid("cpu")  # which checks times of one's own

    @property
    def nodes(self) -> int | None:
        """Number of nodes at which log densities take the divergence first.

        None where the rule chooses them.
        """
        return (
            2 * self.steps
            if isinstance(self.steps, int) and self.rule in get_args(FixedRule)
            else None
        )

    @property
    def evaluations(self) -> int | None:
        """Evaluations of the field that a draw takes; None where the rule chooses its steps."""
        each = {"euler": 1, "midpoint": 2, "rk4": 4}.get(self.rule)
        return None if each is None else each * (len(self.grid("cpu")) - 1)

    def finer(self) -> Solver:
        """Return the same rule with every step halved, or with a tenth of its tolerances where it
        chooses its steps.

        What changes is about the error of this one.
        """
        if self.rule not in get_args(FixedRule):
            return replace(self, rtol=self.rtol / 10, atol=self.atol / 10)
        if isinstance(self.steps, int):
            return replace(self, steps=2 * self.steps)
        times = self.grid("cpu")
        halved = torch.cat([times, (times[1:] + times[:-1]) / 2]).sort().values
        return replace(self, steps=tuple(halved.tolist()))

    def grid(self, device: torch.device | str) -> Tensor:
        """Return the times of the steps, ``(steps + 1,)`` float64."""
        return time_grid(self.steps, device=device)

    def integrate(self, field: Slope, state: State, *, backwards: bool = False) -> State:
        """Integrate d state / dt = field(t, state) from t = 0 to 1, or back.

        See `bnnflow.transport.integrate`.
        """
        grid = self.grid(state[0].device)
        return integrate(
            field,
            state,
            grid.flip(0) if backwards else grid,
            self.rule,
            rtol=self.rtol,
            atol=self.atol,
        )


@checked
@dataclass(frozen=True)
class Density:
    """How the trace in a log density along a flow is found.

    Attributes:
        trace: ``"exact"``: the field's own trace if it has one, else dim reverse-mode products an
            evaluation. ``"hutchinson"`` and ``"hutch++"`` are unbiased for the log density (not for
            the density) and cost ``probes`` products.
        probes: number of random probes, whose estimates are averaged.
        noise: their law; ``"rademacher"`` has never the larger variance for a symmetric Jacobian.
    """

    trace: Trace = "exact"
    probes: Count = 8
    noise: Noise = "rademacher"

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor | None:
        """Draw the probes of one solve, ``(probes, batch, dim)``; None if the trace needs none."""
        if self.trace == "exact":
            return None
        return probe_noise(self.noise, self.probes, x, generator)


@checked
@dataclass(frozen=True)
class Matching:
    """What a flow is fitted to by flow matching: which pairs, on which path, at which times.

    Attributes:
        coupling: of source and posterior draws; `Matched` straightens the paths.
        path: of the pairs; that of the field if None, and for the fields of bnnflow linear.
        times: at which the field is trained; a third of them near the end unless said otherwise.
        targets: what the field is fitted to. ``"pairs"``: the velocity of each pair.
            ``"posterior"``: estimates of the same mean that know the posterior's gradient and
            symmetries, see `PosteriorTargets`, a fifth of the noise or less; the draws must be the
            posterior's and the coupling independent. ``"auto"``: these where they are valid, as far
            as Stein's identity can tell, and cheap.
        reuse: steps that see each pair, every time moved by another random symmetry. What a field
            computes of a point before anything that it learns, and the target there, are computed
            once and move along: above 1 where these are most of a step, as with Gauss-Newton
            proximal steps.
    """

    coupling: Coupling = Independent()
    path: AffinePath | None = None
    times: Times = LogUniformNearEnd()
    targets: Literal["auto", "posterior", "pairs"] = "auto"
    reuse: Count = 1


def default_chunk(device: torch.device) -> int:
    """Return how many draws travel together unless said otherwise: what fits into the caches of a
    CPU.
    """
    return 256 if device.type == "cpu" else 4096
