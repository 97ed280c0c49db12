"""The posterior seen from a flow's latent space: points with both densities, and moves that know
the latent law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bnnflow.gaussian import Gaussian
from bnnflow.model import BayesianModel
from bnnflow.transport.flow import Flow
from bnnflow.transport.options import Density, Solver
from bnnflow.types import Kernel, Seed

__all__ = [
    "Latent",
    "Move",
    "Points",
    "SolverError",
    "Transport",
    "crank_nicolson",
    "log_normal",
]

_LOG_2PI = math.log(2 * math.pi)
_CHUNK = 512  # densities that are asked for at once,
# at most, by flows of few weights, to whom hundreds of points cost hardly more than a few
_MOST = 2048
_NUMBERS = 2**13  # weights of all points that are asked for at once
_PILOT = 32  # draws on which rules of the solver are compared
# nats by which a cheaper rule may change log weights: what is unseen among a thousand draws
TOLERANCE = 0.01
_FEWEST = 4  # steps that can tell where the divergence is rough


class Transport(Protocol):
    """What a correction needs of a flow: both directions, with the density that it gives to each
    point.

    Latent points are standard normal, ``(n, dim)``; log densities are over weights, ``(n,)``
    float64.
    """

    @property
    def dim(self) -> int:
        """Length of a weight vector."""
        ...

    @property
    def solver(self) -> Solver:
        """How its equation is solved."""
        ...

    def start(self, n: int, seed: Seed, /) -> Tensor:
        """Draw latent points."""
        ...

    def forward(self, x0: Tensor, /) -> Tensor:
        """Carry latent points to weights."""
        ...

    def forward_with_log_prob(
        self,
        x0: Tensor,
        /,
        *,
        density: Density | None = ...,
        solver: Solver | None = ...,
        seed: Seed = ...,
    ) -> tuple[Tensor, Tensor]:
        """Carry latent points to weights; return these and their log densities."""
        ...

    def inverse_with_log_prob(
        self, theta: Tensor, /, *, density: Density | None = ..., seed: Seed = ...
    ) -> tuple[Tensor, Tensor]:
        """Carry weights to latent points; return these and the log densities of the weights."""
        ...


class Points(NamedTuple):
    """Latent points, where they go, and the log densities there.

    A row is NaN where the flow has no answer.
    """

    x0: Tensor  # (n, dim)
    theta: Tensor  # (n, dim)
    log_q: Tensor  # (n,), float64
    log_joint: Tensor  # (n,), float64

    @property
    def log_weight(self) -> Tensor:
        """The log importance weight, log_joint - log_q ``(n,)``.

        Minus infinity where either is not a number.
        """
        weight = self.log_joint - self.log_q
        return torch.where(weight < math.inf, weight, -math.inf)

    @property
    def lost(self) -> Tensor:
        """Where there is no weight, ``(n,)``: a density is NaN, or the flow's own is zero."""
        return ~(self.log_joint - self.log_q < math.inf)

    def at(self, rows: Tensor) -> Points:
        """Return some of the points."""
        return Points(*(part[rows] for part in self))


class SolverError(NamedTuple):
    """What more of the solver's steps change, in nats: nothing for an adaptive rule, which is taken
    at its word.
    """

    rms: float = 0.0  # of log weights
    shift: float = 0.0  # of the log of their mean

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> SolverError:
        """Compare log weights ``(n,)`` of the same draws."""
        known = (before > -math.inf) | (after > -math.inf)
        before, after = before[known], after[known]
        shift = float((after.logsumexp(0) - before.logsumexp(0)).abs())
        return cls(float((after - before).square().mean().sqrt()), shift)


class Latent:
    """The posterior in the latent coordinates of a flow, where it has the density N(x0; 0, I)
    exp(log weight).

    Args:
        flow: the transport.
        model: the posterior.
        density: how the flow finds its log densities.
        generator: of random probes.
        progress: show a bar for log densities that take long, where the flow is one of ours.

    Attributes:
        solves: exact or estimated log densities that were integrated so far.
        broken: rows for which the flow had no answer.
        chunk: rows that are best asked for together.
        error: what more of the solver's steps would change, if `settle` has found out.
    """

    def __init__(
        self,
        flow: Transport,
        model: BayesianModel,
        density: Density,
        generator: torch.Generator,
        *,
        progress: bool = False,
    ) -> None:
        self.flow, self.model = flow, model
        self.density = density
        self._options: dict[str, Any] = {"density": density, "seed": generator}
        self.chunk = _CHUNK
        if isinstance(flow, Flow):
            self.chunk = max(_CHUNK, min(_MOST, _NUMBERS // flow.dim))
            self._options |= {"progress": progress, "chunk_size": self.chunk}
        self.solves = self.broken = 0
        self.error: SolverError | None = None

    def settle(self, x0: Tensor) -> None:
        """Take the cheapest rule of the solver that gives the log weights of one far dearer, on
        some points.

        With RK4 the fourth to the half of the flow's own steps may do, for a sixth to a half of the
        price. They are compared with as many RK4 steps as the flow takes of its own rule. It keeps
        that where none of them does, where it chooses its steps itself, and where densities are
        estimates.

        Args:
            x0: latent points, ``(n, dim)``, of which 32 are looked at, or an eighth if these are
                fewer.
        """
        flow = self.flow
        if (
            not isinstance(flow, Flow)
            or self.density.trace != "exact"
            or flow.solver.nodes is None
        ):
            return
        own = flow.solver.nodes // 2
        fewer = sorted({own * eighths // 8 for eighths in (2, 3, 4)} - set(range(_FEWEST)))
        points = x0[: max(8, min(_PILOT, len(x0) // 8))]

        def log_weight(steps: int) -> Tensor:
            self.flow = replace(flow, solver=replace(flow.solver, rule="rk4", steps=steps))
            return self.forward(points).log_weight

        truth = log_weight(own) if fewer else None
        for steps in fewer:
            assert truth is not None
            self.error = SolverError.of(log_weight(steps), truth)
            if self.error.rms <= TOLERANCE:
                return
        self.flow, self.error = flow, None

    @property
    def wide(self) -> int:
        """Number of points whose density costs hardly more than that of a few.

        1 where that is not known.
        """
        return max(1, 2048 // self.flow.dim) if isinstance(self.flow, Flow) else 1

    @torch.no_grad()
    def forward(self, x0: Tensor, solver: Solver | None = None) -> Points:
        """Carry latent points to weights.

        Args:
            x0: ``(n, dim)``.
            solver: of the equation, if not the flow's own.
        """

        def solve(rows: Tensor) -> tuple[Tensor, Tensor]:
            return self.flow.forward_with_log_prob(rows, **self._options, solver=solver)

        theta, log_q = self._surviving(solve, x0)
        return Points(x0, theta, log_q, self.log_joint(theta))

    @torch.no_grad()
    def inverse(self, theta: Tensor) -> Points:
        """Carry weights ``(n, dim)`` to latent points."""

        def solve(rows: Tensor) -> tuple[Tensor, Tensor]:
            return self.flow.inverse_with_log_prob(rows, **self._options)

        x0, log_q = self._surviving(solve, theta)
        return Points(x0, theta, log_q, self.log_joint(theta))

    @torch.no_grad()
    def forward_without_density(self, x0: Tensor) -> Tensor:
        """Carry latent points ``(n, dim)`` to weights, without densities."""

        def solve(rows: Tensor) -> tuple[Tensor, Tensor]:
            return self.flow.forward(rows), torch.zeros(len(rows), device=rows.device)

        theta, _ = self._surviving(solve, x0, solves=0)
        return theta

    @torch.no_grad()
    def log_joint(self, theta: Tensor) -> Tensor:
        """Evaluate the posterior, ``(n, dim) -> (n,)`` in float64."""
        return self.model.log_joint(theta.to(self.model.device, self.model.dtype)).double()

    def log_density_and_grad(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's log density over latent points and its gradient, ``(n,)`` and
        ``(n, dim)``.
        """

        def solve(rows: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                at = rows.detach().requires_grad_()
                theta, log_q = self.flow.forward_with_log_prob(at, **self._options)
                log_joint = self.model.log_joint(
                    theta.to(self.model.device, self.model.dtype)
                )
                value = log_joint.double() - log_q + log_normal(at)
                (grad,) = torch.autograd.grad(value.sum(), at)
            return grad, value.detach()

        grad, value = self._surviving(solve, x0)
        return value, grad

    def _surviving(
        self,
        solve: Callable[[Tensor], tuple[Tensor, Tensor]],
        rows: Tensor,
        solves: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Solve for all rows, with NaN for those whose velocity becomes NaN: halving finds them."""
        self.solves += solves * len(rows)
        try:
            points, log_q = solve(rows)
            return points, log_q.double()
        except FloatingPointError:
            if len(rows) == 1:
                self.broken += 1
                return torch.full_like(rows, math.nan), torch.full((1,), math.nan).to(
                    rows.device, torch.float64
                )
            halves = [self._surviving(solve, half, solves) for half in rows.chunk(2)]
            return torch.cat([points for points, _ in halves]), torch.cat(
                [log_q for _, log_q in halves]
            )


class Move(NamedTuple):
    """What a person wants to know of one latent move; ``(n,)`` each."""

    acceptance_rate: Tensor
    independent: Tensor  # whether the proposal was independent of the present point


def crank_nicolson(
    latent: Latent,
    beta: float,
    *,
    power: float = 1.0,
    independent_share: float = 0.0,
    around: Gaussian | None = None,
) -> Kernel:
    """Build the preconditioned Crank-Nicolson kernel in latent space (Neal 1998; Cotter et al.
    2013).

    Proposes m + sqrt(1 - b^2) (x0 - m) + b L z with z ~ N(0, I), which leaves r = N(m, L L^T)
    invariant, and accepts with probability min(1, a(x0') / a(x0)), a = N(x0; 0, I) w^power / r(x0)
    and w the importance weight. Leaves N(x0; 0, I) w^power invariant: the posterior for power 1. b
    is ``beta``, or 1 with probability ``independent_share``, for every point anew; with r = N(0, I)
    that is an independence Metropolis proposal from the flow.

    Args:
        latent: the posterior in latent space.
        beta: b, between 0 and 1.
        power: inverse temperature between the flow, 0, and the posterior, 1.
        independent_share: of the proposals.
        around: r, ideally near what is left invariant (Rudolf and Sprungk 2018); N(0, I) if None.
    """

    def init(x0: Tensor, generator: torch.Generator) -> Points:
        return latent.forward(x0)

    def height(points: Points) -> Tensor:
        height = power * points.log_weight
        return (
            height
            if around is None
            else height + log_normal(points.x0) - around.log_prob(points.x0)
        )

    def step(points: Points, generator: torch.Generator) -> tuple[Points, Move]:
        x0 = points.x0
        like = {"generator": generator, "device": x0.device, "dtype": x0.dtype}
        noise, centre = torch.randn(x0.shape, **like), torch.zeros_like(x0[0])
        anew = torch.rand(len(x0), **like) < independent_share
        b = torch.where(anew, 1.0, beta).to(x0).unsqueeze(-1)  # (n, 1)
        if around is not None:
            noise, centre = noise @ around.scale_tril.T, around.loc
        proposed = latent.forward(centre + (1 - b * b).sqrt() * (x0 - centre) + b * noise)
        gain = height(proposed) - height(points)
        rate = (
            gain.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
            .clamp(max=0.0)
            .exp()
        )
        accept = (
            torch.rand(len(x0), generator=generator, device=x0.device, dtype=rate.dtype)
            < rate
        )
        moved = (
            torch.where(accept.reshape(-1, *[1] * (old.dim() - 1)), new, old)
            for new, old in zip(proposed, points, strict=True)
        )
        return Points(*moved), Move(rate, anew)

    return Kernel(init, step)


def log_normal(x0: Tensor) -> Tensor:
    """Return the standard normal log density, ``(..., dim) -> (...)`` in float64."""
    return -0.5 * x0.square().sum(-1, dtype=torch.float64) - 0.5 * x0.shape[-1] * _LOG_2PI
