"""The flow: a trained field with its source, as a posterior that can be sampled and evaluated."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bnnflow import storage
from bnnflow.arguments import Count, Limit, NonNegative, Range, checked, shaped
from bnnflow.method import Sampleable
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator
from bnnflow.transport.field import Field
from bnnflow.transport.guidance import GuidedVelocity
from bnnflow.transport.options import Density, Solver, default_chunk
from bnnflow.transport.paths import AffinePath
from bnnflow.transport.proximal_step import ProximalStep
from bnnflow.transport.pushforward import Pushforward
from bnnflow.transport.solvers import (
    integrate,
    integrate_sde,
    integrate_with_trace,
    largest_chunk,
    node_times,
    order_of,
    twice_as_long,
)
from bnnflow.transport.source import Source
from bnnflow.transport.stored import (
    ROWS,
    check_weights,
    dtype_of,
    rows_looked_at,
    rows_to_look_at,
    solver_of,
    stored_solver,
)
from bnnflow.transport.velocity import ScoreVelocity, restore
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.types import FixedRule, Rule, Seed, Trace
from bnnflow.warn import warn
from bnnflow.weights import WeightSpec

__all__ = ["Flow", "GaussNewtonFlow"]

_LOG_2PI = math.log(2 * math.pi)
_PATIENCE = 3.0  # seconds, from which a bar says how long it will take
_CHUNK = 512  # points that travel together with a density
# nats, from which a log density takes more evaluations of the divergence, or is told to be in doubt
ROUGH = 1.0


@checked
@dataclass(frozen=True, repr=False)
class Flow(Sampleable):
    """A transport of a source, by default the prior, to the posterior.

    A `Posterior`, and a method of `bnnflow.sample`.

    Draws solve dx/dt = velocity(t, x) from t = 0, x ~ N(0, I) in the coordinates of the source, to
    t = 1. Log densities follow d log p / dt = -div velocity along the path, and include the
    Jacobian of the coordinates, so that they are densities over ``theta``. Their error is the
    solver's: see `solver_error`.

    Attributes:
        velocity: the field, in evaluation mode.
        source: the law at t = 0.
        spec: the meaning of the weights.
        fingerprint: of the model that the field is bound to, or was fitted on.
        solver: of the equation, unless a call says otherwise.
        info: how the flow was made.
    """

    velocity: Field
    source: Source
    spec: WeightSpec
    fingerprint: str
    solver: Solver = Solver()
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @checked
    def of(
        cls,
        velocity: nn.Module,
        model: BayesianModel,
        source: Source | None = None,
        **options: Any,
    ) -> Flow:
        """Make a flow of a field, bound to a model.

        An untrained `InformedVelocity` is a sampler of its own.

        Args:
            velocity: a field for the model's weights.
            model: gives the prior and, to informed fields, the data.
            source: the law at t = 0; the prior if None.
            options: other attributes of the flow.
        """
        posterior = WhitenedPosterior(model, source)
        return cls(
            Field.of(velocity).bind(posterior).eval(),
            posterior.source,
            model.spec,
            model.fingerprint(),
            **options,
        )

    @property
    def dim(self) -> int:
        """Length of a weight vector."""
        return self.spec.dim

    def __repr__(self) -> str:
        """Say what moves how many weights, and how it is solved."""
        return f"Flow({self.velocity._get_name()} of {self.dim:,} weights, {self.solver})"

    @property
    def gradients_per_draw(self) -> int | None:
        """Gradients of the likelihood that a draw takes.

        None where the solver chooses its steps.
        """
        if not self.velocity.gradients:
            return 0
        evaluations = self.solver.evaluations
        return None if evaluations is None else evaluations * self.velocity.gradients

    @property
    def about(self) -> dict[str, Any]:
        """How the field was fitted, and how its equation is solved."""
        told = {"steps": "training_steps", "seconds": "training_seconds"}
        told |= {name: name for name in ("loss", "held_out_loss", "loss_by_time")}
        known = {told[name]: self.info[name] for name in told if self.info.get(name)}
        return {"solver": str(self.solver)} | known

    def check_model(self, model: BayesianModel) -> None:
        """Raise ``ValueError`` if the flow is one to another model's posterior."""
        if not model.recognises(self.fingerprint):
            raise ValueError(
                "method: this flow is one to another posterior; flow.bind(model) uses its field on "
                "this one"
            )

    @property
    def path(self) -> AffinePath:
        """The path of the pairs that the field is made for."""
        return self.velocity.path

    @checked
    def bind(self, model: BayesianModel) -> Flow:
        """Return the same field bound to another model's prior and data."""
        return self._on(self.velocity, model)

    def pushforward(self) -> Pushforward:
        """Return the map of latent points to weights, as `BayesianModel.transported` takes it.

        Raises:
            ValueError: if the field looks at data, or the solver chooses its steps: the map of a
                point would depend on the points beside it.
        """
        if self.solver.evaluations is None:
            raise ValueError(
                f"flow is solved by {self.solver.rule}, which chooses its steps: take fixed ones, "
                'dataclasses.replace(flow, solver=Solver("midpoint", 4))'
            )
        times, rule = self.solver.grid(self._device), cast(FixedRule, self.solver.rule)
        return Pushforward.of(self.velocity, self.source, self.spec, times, rule)

    @checked
    def transfer(self, model: BayesianModel) -> Flow:
        """Return the field with the same parameters for a network of other hidden widths.

        The parameters of a network over weights do not depend on the widths of hidden layers, only
        on their number and on inputs and outputs. A field of your own says with `Field.on` what it
        is there. That the result is a flow *to the posterior* is a hope, not a law: check it.

        Raises:
            ValueError: if the field is tied to its weights, or the networks differ in more than
                widths.
        """
        if not self.source.exchangeable:
            raise ValueError("this flow is tied to its own weights, by its source")
        velocity = self.velocity.on(model.spec).to(model.device, model.dtype)
        return self._on(velocity.requires_grad_(False), model)

    @checked
    def guided(
        self,
        guide: BayesianModel | Callable[[Tensor], Tensor],
        strength: float | Callable[[Tensor], Tensor] = 1.0,
        *,
        steps: Count = 2,
        max_norm: Limit = 2.0,
    ) -> Flow:
        """Return the flow bent towards a task by its gradient; see `GuidedVelocity`.

        Args:
            guide: a model of the task with weights like these, or a function of them,
                ``(batch, dim) -> (batch,)``.
            strength: a number, or a function of the time; negative strengths repel.
            steps: gradient steps of the pull at each evaluation.
            max_norm: bound on the length of one of them, in standard deviations of the source.

        Raises:
            ValueError: if the guide is a model with other weights.
        """
        if isinstance(guide, BayesianModel) and guide.dim != self.dim:
            raise ValueError(f"the guide has {guide.dim} weights, the flow {self.dim}")
        bent = GuidedVelocity(
            self.velocity, guide, self.source, strength, steps=steps, max_norm=max_norm
        )
        return replace(self, velocity=bent.eval())

    @checked
    def on_batch(self, size: Count, seed: Seed) -> Flow:
        """Return the flow with a random part of the data, for large data: the field then costs as
        much less.

        The likelihood of the part is scaled to all rows. Log densities of this flow are conditional
        on the part, which is fixed; draws of many such flows come from the mixture, whose density
        is not known.

        Args:
            size: rows of the data.
            seed: decides which.

        Raises:
            ValueError: if the field does not look at the data.
        """
        if self.velocity.posterior is None:
            raise ValueError(
                "this flow looks at no data: its cost does not depend on their number"
            )
        part = self.velocity.posterior.batch(size, as_generator(seed, self._device))
        return replace(self, velocity=self.velocity.bind(part))

    @checked
    def to(self, device: torch.device | str, dtype: torch.dtype) -> Flow:
        """Return the flow on another device or in another floating-point type."""
        posterior = self.velocity.posterior
        # without the data, which do not move
        moved = copy.deepcopy(self.velocity.bind(None)).to(device, dtype)
        moved = moved.bind(None if posterior is None else posterior.to(device, dtype))
        return replace(self, velocity=moved.eval(), source=self.source.to(device, dtype))

    def _on(self, velocity: nn.Module, model: BayesianModel) -> Flow:
        source = self.source.on(model)
        return Flow.of(velocity, model, source, solver=self.solver, info=self.info)

    # ---------------------------------------- sampling and densities

    @checked
    def sample(
        self,
        n: Count,
        seed: Seed = 0,
        *,
        solver: Solver | None = None,
        diffusion: NonNegative | Callable[[Tensor], Tensor | float] = 0.0,
        chunk_size: Count | None = None,
    ) -> Tensor:
        """Draw ``(n, dim)`` posterior weights.

        Args:
            n: number of draws.
            seed: decides the starting points and so the draws.
            solver: of the equation; the flow's own if None.
            diffusion: noise on the way, a number or a function of time that may vanish on parts of
                the path: the same marginals if the field is exact, and less memory of its errors if
                it is not. Wants more steps, and vanishes best before t = 1, where the score is not
                known.
            chunk_size: draws that travel together, which bounds the memory, see `largest_chunk`; as
                many as are fastest unless said otherwise.

        Raises:
            FloatingPointError: if the velocity becomes NaN, or draws are not finite.
        """
        if diffusion == 0:
            parts = self.batches(n, seed, solver=solver, chunk_size=chunk_size)
            return torch.cat(list(parts))
        generator = as_generator(seed, self._device)
        starts = self.start(n, generator).split(chunk_size or default_chunk(self._device))
        with torch.no_grad():
            return _finite(
                [
                    self._diffuse(x0, solver or self.solver, diffusion, generator)
                    for x0 in starts
                ]
            )

    def batches(
        self,
        n: int,
        seed: Seed,
        *,
        solver: Solver | None = None,
        chunk_size: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield the draws of `sample`, as many as travel together at a time."""
        generator = as_generator(seed, self._device)
        for x0 in self.start(n, generator).split(chunk_size or default_chunk(self._device)):
            with torch.no_grad():
                part = _finite([self.forward(x0, solver=solver)])
            yield part

    def _diffuse(
        self,
        x0: Tensor,
        solver: Solver,
        diffusion: NonNegative | Callable[[Tensor], Tensor | float],
        generator: torch.Generator,
    ) -> Tensor:
        def field(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            velocity = self.velocity(t, x)
            return velocity, self.path.score(t, x, velocity)

        grid = solver.grid(self._device)
        x1 = integrate_sde(field, diffusion, x0, grid, generator, solver.rule)  # type: ignore[arg-type]
        return self.source.from_normal(x1)

    @checked
    def largest_chunk(self, memory: Count, density: Density | None = None) -> int:
        """Return the ``chunk_size`` whose tensors stay within ``memory`` bytes, without or with a
        density.
        """
        x0 = self.start(2, 0)
        one_step = Solver("euler", 1)

        def work(x: Tensor) -> Any:
            if density is None:
                return self._integrate(x, one_step)
            return self._transport(
                x, _Solve(one_step, density, as_generator(0, self._device))
            )

        with torch.no_grad():
            return largest_chunk(memory, work, x0)

    @checked
    def solver_error(
        self,
        n: Annotated[int, Range(least=2)] = 64,
        seed: Seed = 0,
        *,
        solver: Solver | None = None,
        density: bool = True,
    ) -> dict[str, float]:
        """Compare a solver with a finer one on the same starts: what it is responsible for.

        Args:
            n: number of draws.
            seed: decides the starting points.
            solver: compared with one of half its steps, or a tenth of its tolerances; the flow's
                own if None.
            density: compare log densities too.

        Returns:
            ``"theta"``, the root mean square difference in standard deviations of the draws, and
            with ``density`` ``"log_prob"``, the mean absolute difference, and ``"log_prob_worst"``,
            the largest.
        """
        solver = solver or self.solver
        solvers = solver, solver.finer()
        x0 = self.start(n, seed)
        with torch.no_grad():
            if not density:
                few, many = (self.forward(x0, solver=each) for each in solvers)
                return {"theta": float(((few - many) / many.std(0)).square().mean().sqrt())}
            solves = (self._solve(each, None, 0) for each in solvers)
            (few, log_few, _), (many, log_many, _) = (
                self._forward(x0, each, _CHUNK, False) for each in solves
            )
        apart = (log_few - log_many).abs()
        return {
            "theta": float(((few - many) / many.std(0)).square().mean().sqrt()),
            "log_prob": float(apart.mean()),
            "log_prob_worst": float(apart.max()),
        }

    @checked
    def start(self, n: Count, seed: Seed) -> Tensor:
        """Draw latent points ``(n, dim)``: the source in its own coordinates, N(0, I)."""
        generator = as_generator(seed, self._device)
        return torch.randn(
            n, self.dim, generator=generator, device=self._device, dtype=self.source.dtype
        )

    @checked
    def forward(self, x0: Tensor, *, solver: Solver | None = None) -> Tensor:
        """Carry latent points ``(n, dim)`` to weights; differentiable, all in one chunk."""
        x1 = self._integrate(self._rows("x0", x0), solver or self.solver)
        return self.source.from_normal(x1)

    @checked
    def inverse(self, theta: Tensor, *, solver: Solver | None = None) -> Tensor:
        """Carry weights ``(n, dim)`` back to latent points; differentiable, all in one chunk."""
        x1 = self.source.to_normal(self._rows("theta", theta))
        return self._integrate(x1, solver or self.solver, backwards=True)

    @checked
    def sample_with_log_prob(
        self,
        n: Count,
        seed: Seed = 0,
        *,
        density: Density | None = None,
        solver: Solver | None = None,
        chunk_size: Count = _CHUNK,
        progress: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Draw weights and their log densities in one pass forwards.

        Args:
            n: number of draws.
            seed: decides the starting points, and the probes of an estimated trace.
            density: how the trace is found; exactly if None.
            solver: of the equation; the flow's own if None.
            chunk_size: draws that travel together, which bounds the memory.
            progress: show a bar at a terminal, for what takes more than some seconds.

        Returns:
            ``(n, dim)``, and ``(n,)`` in float64.

        Raises:
            FloatingPointError: if the velocity becomes NaN, or draws are not finite.
        """
        generator = as_generator(seed, self._device)
        with torch.no_grad():
            theta, log_prob = self.forward_with_log_prob(
                self.start(n, generator),
                density=density,
                solver=solver,
                seed=generator,
                chunk_size=chunk_size,
                progress=progress,
            )
        return _finite([theta]), log_prob

    @checked
    def forward_with_log_prob(
        self,
        x0: Tensor,
        *,
        density: Density | None = None,
        solver: Solver | None = None,
        seed: Seed = 0,
        chunk_size: Count = _CHUNK,
        progress: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Carry latent points to weights, with their log densities there; differentiable.

        Args:
            x0: latent points, ``(n, dim)``.
            density: how the trace is found; exactly if None.
            solver: of the equation; the flow's own if None.
            seed: of the probes of an estimated trace, which stay fixed along a path.
            chunk_size: points that travel together, which bounds the memory.
            progress: show a bar at a terminal, for what takes more than some seconds.

        Returns:
            ``(n, dim)``, and ``(n,)`` in float64.
        """
        solve = self._solve(solver, density, seed)
        theta, log_prob, doubtful = self._forward(
            self._rows("x0", x0), solve, chunk_size, progress
        )
        self._tell(doubtful, len(theta), solve.solver.rule)
        return theta, log_prob

    def _forward(
        self, x0: Tensor, solve: _Solve, chunk_size: int, progress: bool
    ) -> tuple[Tensor, Tensor, int]:
        """Carry latent points to weights, with their log densities, and say how many of these are
        in doubt.
        """
        thetas, log_probs, doubtful = [], [], 0
        with self._bar(x0, solve, progress) as bar:
            for rows in x0.split(chunk_size):
                x1, change, doubts = self._transport(rows, solve, bar=bar)
                doubtful += doubts
                theta = self.source.from_normal(x1)
                thetas.append(theta)
                log_probs.append(
                    _log_normal(rows) - change + self.source.log_jacobian(theta)
                )
        return torch.cat(thetas), torch.cat(log_probs), doubtful

    @checked
    def inverse_with_log_prob(
        self,
        theta: Tensor,
        *,
        density: Density | None = None,
        solver: Solver | None = None,
        seed: Seed = 0,
        chunk_size: Count = _CHUNK,
        progress: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Carry weights back to latent points, with their log densities; differentiable.

        Args:
            theta: weights, ``(n, dim)``.
            density: how the trace is found; exactly if None.
            solver: of the equation; the flow's own if None.
            seed: of the probes of an estimated trace, which stay fixed along a path.
            chunk_size: points that travel together, which bounds the memory.
            progress: show a bar at a terminal, for what takes more than some seconds.

        Returns:
            The latent points ``(n, dim)``, and ``(n,)`` in float64.
        """
        solve = self._solve(solver, density, seed)
        starts, log_probs, doubtful = [], [], 0
        theta = self._rows("theta", theta)
        with self._bar(theta, solve, progress) as bar:
            for rows in theta.split(chunk_size):
                x0, change, doubts = self._transport(
                    self.source.to_normal(rows), solve, backwards=True, bar=bar
                )
                doubtful += doubts
                starts.append(x0)
                log_probs.append(_log_normal(x0) + change + self.source.log_jacobian(rows))
        self._tell(doubtful, len(theta), solve.solver.rule)
        return torch.cat(starts), torch.cat(log_probs)

    @checked
    def log_prob(
        self,
        theta: Tensor,
        *,
        density: Density | None = None,
        solver: Solver | None = None,
        seed: Seed = 0,
        chunk_size: Count = _CHUNK,
        progress: bool = True,
    ) -> Tensor:
        """Return the log density of the flow at ``theta``, ``(..., dim) -> (...)`` in float64.

        Far from the posterior fields are stiff, and a rule with fixed steps may miss by hundreds of
        nats: a warning says for how many weights steps of twice the length make a difference of a
        nat.

        Args:
            theta: weights.
            density: how the trace is found; exactly if None.
            solver: of the equation; the flow's own if None.
            seed: of the probes of an estimated trace, which stay fixed along a path.
            chunk_size: points that travel together, which bounds the memory.
            progress: show a bar at a terminal, for what takes more than some seconds.
        """
        flat = shaped("theta", theta, self.dim, lead=True).reshape(-1, self.dim)
        with torch.no_grad():
            _, log_probs = self.inverse_with_log_prob(
                flat,
                density=density,
                solver=solver,
                seed=seed,
                chunk_size=chunk_size,
                progress=progress,
            )
        return log_probs.reshape(theta.shape[:-1])

    def _solve(self, solver: Solver | None, density: Density | None, seed: Seed) -> _Solve:
        return _Solve(
            solver or self.solver, density or Density(), as_generator(seed, self._device)
        )

    def _bar(self, x: Tensor, solve: _Solve, progress: bool) -> tqdm:
        """Return a bar for the divergences of ``x`` that are certain to be evaluated."""
        nodes = solve.solver.nodes
        total = None if nodes is None else nodes * len(x)
        return progress_bar(total, "log density", progress, "divergence", delay=_PATIENCE)

    def _integrate(self, x: Tensor, solver: Solver, *, backwards: bool = False) -> Tensor:
        """Carry ``x`` from t = 0 to t = 1, or back, without a density."""

        def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self.velocity(t, state[0]),)

        (end,) = solver.integrate(slope, (x,), backwards=backwards)
        return end

    def _transport(
        self, x: Tensor, solve: _Solve, *, backwards: bool = False, bar: tqdm | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """Carry ``x`` from one end to the other and integrate the divergence on the way.

        Say for how many in doubt.
        """
        # One set for the whole path, or the solver would integrate noise.
        probes = solve.density.draw(x, solve.generator)
        trace, solver = solve.density.trace, solve.solver

        def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if bar is not None:
                bar.update(len(state[0]))
            return self.velocity.with_divergence(t, state[0], trace, probes)

        if solver.nodes is not None:
            return self._along_nodes(x, probes, solve, backwards, bar)
        start = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        end, change = solver.integrate(slope, (x, start), backwards=backwards)
        grid = solver.grid(x.device)
        # a rule that minds its own error, or no longer steps
        if solver.evaluations is None or len(grid) < 3:
            return end, change, 0
        grid = twice_as_long(grid.flip(0) if backwards else grid)
        with torch.no_grad():
            other, other_change = integrate(slope, (x, start), grid, solver.rule)
        apart = change - other_change
        if backwards:
            apart = apart + _log_normal(end) - _log_normal(other)
        return end, change, int((apart.abs() > ROUGH).sum())

    @torch.no_grad()
    def _doubt(self, x: Tensor, end: Tensor, grid: Tensor, rule: Rule) -> Tensor:
        """Return by how many nats the log density of the source is off at the end of the steps,
        ``(n,)`` (Richardson).

        The way alone is gone again in steps of twice the length, which costs no divergence.
        """
        (other,) = integrate(
            lambda t, state: (self.velocity(t, state[0]),), (x,), twice_as_long(grid), rule
        )
        return (_log_normal(end) - _log_normal(other)).abs() / (2 ** order_of(rule) - 1)

    def _tell(self, doubtful: int, n: int, rule: Rule) -> None:
        if doubtful:
            warn(
                f"log densities of {doubtful} of {n} weights may be wrong by more than a nat: the "
                f"field is too stiff there for fixed steps of {rule!r}, as it is far from the "
                "posterior. Take more steps, or an adaptive "
                "solver such as bf.transport.Solver('dopri5')"
            )

    def _along_nodes(
        self,
        x: Tensor,
        probes: Tensor | None,
        solve: _Solve,
        backwards: bool,
        bar: tqdm | None,
    ) -> tuple[Tensor, Tensor, int]:
        """Integrate the divergence at nodes, and at twice and four times as many where they are too
        few.

        They are where the divergence is rough along the path, or the way back to the source in
        doubt.
        """
        nodes, rule = solve.solver.nodes, solve.solver.rule
        assert nodes is not None
        rows = torch.arange(len(x), device=x.device)
        end, change = (
            torch.empty_like(x),
            torch.empty(len(x), dtype=torch.float64, device=x.device),
        )
        before = torch.full_like(change, torch.nan)
        doubtful = 0
        for count in (nodes, 2 * nodes, 4 * nodes):
            some = None if probes is None else probes[:, rows]
            if bar is not None and bar.total is not None and count > nodes:
                bar.total += count * len(rows)
            field = _Traced(self.velocity, solve.density.trace, some, bar)
            found, total, rough = integrate_with_trace(
                field, field.trace, x[rows], count, rule, backwards=backwards
            )
            end, change = end.index_copy(0, rows, found), change.index_copy(0, rows, total)
            value = total.detach()
            if backwards:
                value = value + _log_normal(found.detach())
                doubt = self._doubt(
                    x[rows], found, node_times(count, x.device).flip(0), rule
                )
                rough = torch.maximum(rough, doubt)
            more = rough > ROUGH
            # A rule of order two leaves a third of what half the steps change; others less, once
            # they are short enough.
            doubtful = int(((value - before).abs() / 3 > ROUGH)[more].sum())
            rows, before = rows[more], value[more]
            if len(rows) == 0:
                break
        return end, change, doubtful

    def _rows(self, name: str, points: Tensor) -> Tensor:
        """Return points ``(n, dim)``, checked, in the flow's type and on its device."""
        if points.dim() != 2 or points.shape[0] == 0 or points.shape[1] != self.dim:
            raise ValueError(
                f"{name} must be (n, {self.dim}), got shape {tuple(points.shape)}"
            )
        return points.to(self._device, self.source.dtype)

    @property
    def _device(self) -> torch.device:
        return self.source.device

    # ---------------------------------------- storage

    @checked
    def save(self, path: str | Path) -> Path:
        """Write field, source and meaning of the weights to an ``.npz`` file without pickle, and no
        data.

        Of a flow by `on_batch` the numbers of its rows are written, too.

        Raises:
            ValueError: if the velocity is not one of bnnflow's own and cannot be rebuilt from a
                description.
        """
        description = self.velocity.describe()
        if description is None:
            raise ValueError(
                f"cannot save a {self.velocity._get_name()}: it has no describe()"
            )
        header = {
            "velocity": description,
            "source": self.source.describe(),
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "spec": self.spec.describe(),
            "fingerprint": self.fingerprint,
            **stored_solver(self.solver),
            "info": self.info,
        }
        arrays = {
            name: value.cpu().numpy() for name, value in self.velocity.state_dict().items()
        }
        arrays |= self.source.arrays() | rows_looked_at(self.velocity)
        return storage.write(path, "flow", 2, json.loads(json.dumps(header)), arrays)

    @classmethod
    @checked
    def load(cls, path: str | Path, model: BayesianModel | None = None) -> Flow:
        """Read a flow that ``save`` wrote.

        Args:
            path: the file.
            model: binds a likelihood-informed field, which knows its data only through the model;
                for any other it must have the same weights.

        Raises:
            ValueError: if the field is informed and there is no model, or it is another one than
                the file's.
        """
        with storage.described(path):
            return cls.from_file(*storage.read(path, {"flow": 2}), model)

    @classmethod
    def from_file(
        cls,
        header: dict[str, Any],
        arrays: dict[str, np.ndarray],
        model: BayesianModel | None,
    ) -> Flow:
        """Build a flow from the contents of a file."""
        spec = WeightSpec.from_description(header["spec"])
        plain = header["source"]
        if isinstance(plain, list):  # version 1 knew no source but the prior
            plain = {"prior": plain, "arrays": []}
        check_weights(spec, model)
        state = {
            name: values
            for name, values in arrays.items()
            if name not in (*plain["arrays"], ROWS)
        }
        # version 1 has none
        dtype = (
            header["dtype"] if "dtype" in header else str(next(iter(state.values())).dtype)
        )
        dtype = dtype_of(dtype)
        velocity = restore(header["velocity"], spec, state, dtype)
        if velocity.informed and model is None:
            raise ValueError(
                "a likelihood-informed flow needs its model: Flow.load(path, model)"
            )
        if (
            velocity.informed
            and model is not None
            and not model.recognises(header["fingerprint"])
        ):
            raise ValueError(
                "this is not the model that the flow was fitted on (data, prior, likelihood or "
                "network differ); load it with its own model and call flow.bind(model) to use it "
                "on another"
            )
        source = Source.from_description(plain, arrays, dtype, model)
        if velocity.informed and model is not None:
            velocity = velocity.bind(
                WhitenedPosterior(model, source, rows_to_look_at(arrays, model))
            )
        rest = (str(header["fingerprint"]), solver_of(header), dict(header["info"]))
        return cls(velocity, source, spec, *rest)


@checked
def GaussNewtonFlow(
    model: BayesianModel,
    proximal_step: ProximalStep | None = None,
    *,
    source: Source | None = None,
    path: AffinePath | None = None,
    solver: Solver | None = None,
) -> Flow:
    """Return the flow of a `ScoreVelocity`: a sampler that needs neither draws nor training, for
    any network.

    Exact for a linear Gaussian model; elsewhere an approximation that follows curvature and, by its
    curved paths, some of the posterior's shape. It is a start for `refine`, `correct` and SMC, and
    a source of training targets.

    Args:
        model: the posterior; its likelihood needs a ``fisher_factor`` for Gauss-Newton.
        proximal_step: `GaussNewton` unless said otherwise.
        source: the law at t = 0; the prior if None.
        path: the path from it.
        solver: of the equation; if None the midpoint rule in 20 steps, and for a linear Gaussian
            model in as many as bring its draws to their width.
    """
    posterior = WhitenedPosterior(model, source)
    solver = Solver(steps=_resolving(posterior)) if solver is None else solver
    field = ScoreVelocity(proximal_step, path, posterior.source.symmetries(model))
    return Flow.of(field, model, posterior.source, solver=solver, info={"untrained": True})


_USUAL, _MOST = 20, 1000  # steps
_POWERS = 20  # of a matrix, to find its largest eigenvalue
_ROUNDING = 1e-3  # of a matrix that is the same everywhere


def _resolving(posterior: WhitenedPosterior) -> int:
    """Return how many steps bring draws of a linear Gaussian model to their width.

    The usual number for other models.

    The last of n steps is 1 / n^2 of the path. A quarter of the posterior's least width, as a share
    of the source's, leaves that width off by some percent.
    """
    least = _least_width(posterior)
    wanted = math.ceil(2 / least**0.5)
    if wanted > _MOST:
        warn(
            f"in some direction the posterior is {least:.1e} times as wide as the source, which "
            f"would take {wanted} steps; after {_MOST} draws are too narrow there: take a source "
            "that is nearer"
        )
    return max(_USUAL, min(wanted, _MOST))


@torch.no_grad()
def _least_width(posterior: WhitenedPosterior) -> float:
    """Return the least standard deviation of a linear Gaussian posterior in units of the source's.

    1 for others.
    """
    if not posterior.model.likelihood.has_fisher_factor:
        return 1.0
    x, v = torch.randn(
        2, 2, posterior.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(posterior.source.device, posterior.source.dtype)
    _, times = posterior.at(x).grad_and_product()
    first, second = times(v[:1].expand(2, -1))
    # at two points it would be one matrix
    if not (first - second).norm() <= _ROUNDING * first.norm():
        return 1.0
    largest = 0.0
    for _ in range(_POWERS):
        image = times(v)
        largest = float(image.norm() / v.norm())
        v = image / image.norm() if largest else v
    return (1 + largest) ** -0.5


class _Solve(NamedTuple):
    """What a solve with a density is told."""

    solver: Solver
    density: Density
    generator: torch.Generator  # one stream of random numbers for all chunks


class _Traced:
    """A field that remembers its velocity where its divergence was taken last, from where the next
    step begins.
    """

    def __init__(
        self, velocity: Field, trace: Trace, probes: Tensor | None, bar: tqdm | None
    ) -> None:
        self._velocity, self._probes, self._bar = velocity, probes, bar
        self._trace: Trace = trace
        self._known: tuple[Tensor, Tensor] | None = None

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        if self._known is not None and self._known[0] is x:
            return self._known[1]
        return self._velocity(t, x)

    def trace(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the divergence, ``(batch,)`` in float64."""
        if self._bar is not None:
            self._bar.update(len(x))
        velocity, trace = self._velocity.with_divergence(t, x, self._trace, self._probes)
        self._known = x, velocity
        return trace


def _finite(parts: list[Tensor]) -> Tensor:
    """Join draws, or say how many of them are none."""
    theta = torch.cat(parts)
    broken = int((~theta.isfinite().all(-1)).sum())
    if broken:
        raise FloatingPointError(
            f"{broken} of {len(theta)} draws are infinite or NaN: take more steps, fit the flow "
            "for longer, or let "
            "`correct` leave them out"
        )
    return theta


def _log_normal(x: Tensor) -> Tensor:
    return -0.5 * (x * x).sum(-1, dtype=torch.float64) - 0.5 * x.shape[-1] * _LOG_2PI
