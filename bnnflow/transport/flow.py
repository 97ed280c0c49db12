"""The flow: a trained field with its source, as a posterior that can be sampled and evaluated."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Unpack, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bnnflow import storage
from bnnflow.arguments import Count, Limit, NonNegative, Range, checked, shaped
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator
from bnnflow.transport.coordinates import Context
from bnnflow.transport.displacement import Displacement
from bnnflow.transport.field import Field
from bnnflow.transport.guidance import GuidedVelocity
from bnnflow.transport.options import DensityOptions, SampleOptions, Steps, Tracing, together
from bnnflow.transport.paths import AffinePath
from bnnflow.transport.solvers import (
    integrate,
    integrate_sde,
    integrate_with_trace,
    node_times,
    order_of,
    rows_within,
    time_grid,
    twice_as_long,
)
from bnnflow.transport.source import Source
from bnnflow.transport.stored import ROWS, check_weights, dtype_of, rows_looked_at, rows_to_look_at, solver_of
from bnnflow.transport.velocity import DriveVelocity, restore
from bnnflow.types import FixedSolver, Seed, Solver, Trace
from bnnflow.warn import warn
from bnnflow.weights import WeightSpec

__all__ = ["Flow", "GaussNewtonFlow"]

_LOG_2PI = math.log(2 * math.pi)
_PATIENCE = 3.0  # seconds, from which a bar says how long it will take
_ROUGH = 1.0  # nats, from which a log density takes more evaluations of the divergence, or is told to be in doubt


@checked
@dataclass(frozen=True)
class Flow:
    """A transport of a source, by default the prior, to the posterior; a `Posterior`.

    Draws solve dx/dt = velocity(t, x) from t = 0, x ~ N(0, I) in the coordinates of the source, to t = 1. Log densities
    follow d log p / dt = -div velocity along the path, and include the Jacobian of the coordinates, so that they are
    densities over ``theta``. Their error is the solver's: compare two values of ``steps``.

    Attributes:
        velocity: the field, in evaluation mode.
        source: the law at t = 0.
        spec: the meaning of the weights.
        fingerprint: of the model that the field is bound to, or was fitted on.
        solver: rule used unless a call says otherwise.
        steps: its number of steps.
        info: how the flow was made.
    """

    velocity: Field
    source: Source
    spec: WeightSpec
    fingerprint: str
    solver: Solver = "midpoint"
    steps: Count = 8
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @checked
    def of(cls, velocity: nn.Module, model: BayesianModel, source: Source | None = None, **options: Any) -> Flow:
        """Make a flow of a field, bound to a model; an untrained `InformedVelocity` is a sampler of its own.

        Args:
            velocity: a field for the model's weights.
            model: gives the prior and, to informed fields, the data.
            source: the law at t = 0; the prior if None.
            options: other attributes of the flow.
        """
        context = Context(model, source)
        return cls(Field.of(velocity).bind(context).eval(), context.source, model.spec, model.fingerprint(), **options)

    @property
    def dim(self) -> int:
        """Length of a weight vector."""
        return self.spec.dim

    @property
    def path(self) -> AffinePath:
        """The path of the pairs that the field is made for."""
        return self.velocity.path

    @checked
    def bind(self, model: BayesianModel) -> Flow:
        """Return the same field bound to another model's prior and data."""
        return self._on(self.velocity, model)

    @checked
    def transfer(self, model: BayesianModel) -> Flow:
        """Return the field with the same parameters for a network of other hidden widths.

        The parameters of a network over weights do not depend on the widths of hidden layers, only on their number and
        on inputs and outputs. A field of your own says with `Field.on` what it is there. That the result is a flow
        *to the posterior* is a hope, not a law: check it.

        Raises:
            ValueError: if the field is tied to its weights, or the networks differ in more than widths.
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
            guide: a model of the task with weights like these, or a function of them, ``(batch, dim) -> (batch,)``.
            strength: a number, or a function of the time; negative strengths repel.
            steps: gradient steps of the pull at each evaluation.
            max_norm: bound on the length of one of them, in standard deviations of the source.

        Raises:
            ValueError: if the guide is a model with other weights.
        """
        if isinstance(guide, BayesianModel) and guide.dim != self.dim:
            raise ValueError(f"the guide has {guide.dim} weights, the flow {self.dim}")
        bent = GuidedVelocity(self.velocity, guide, self.source, strength, steps=steps, max_norm=max_norm)
        return replace(self, velocity=bent.eval())

    @checked
    def on_batch(self, size: Count, seed: Seed) -> Flow:
        """Return the flow with a random part of the data, for large data: the field then costs as much less.

        The likelihood of the part is scaled to all rows. Log densities of this flow are conditional on the part, which
        is fixed; draws of many such flows come from the mixture, whose density is not known.

        Args:
            size: rows of the data.
            seed: decides which.

        Raises:
            ValueError: if the field does not look at the data.
        """
        if self.velocity.posterior is None:
            raise ValueError("this flow looks at no data: its cost does not depend on their number")
        part = self.velocity.posterior.batch(size, as_generator(seed, self._device))
        return replace(self, velocity=self.velocity.bind(part))

    @checked
    def to(self, device: torch.device | str, dtype: torch.dtype) -> Flow:
        """Return the flow on another device or in another floating-point type."""
        posterior = self.velocity.posterior
        moved = copy.deepcopy(self.velocity.bind(None)).to(device, dtype)  # without the data, which do not move
        moved = moved.bind(None if posterior is None else posterior.to(device, dtype))
        return replace(self, velocity=moved.eval(), source=self.source.to(device, dtype))

    def _on(self, velocity: nn.Module, model: BayesianModel) -> Flow:
        source = self.source.on(model)
        return Flow.of(velocity, model, source, solver=self.solver, steps=self.steps, info=self.info)

    # ---------------------------------------------------------------- sampling and densities

    @checked
    def sample(
        self,
        n: Count,
        seed: Seed = 0,
        *,
        steps: Steps | None = None,
        solver: Solver | None = None,
        epsilon: NonNegative | Callable[[Tensor], Tensor | float] = 0.0,
        chunk_size: Count | None = None,
    ) -> Tensor:
        """Draw ``(n, dim)`` posterior weights.

        Args:
            n: number of draws.
            seed: decides the starting points and so the draws.
            steps: steps of the solver, or its times; the flow's own if None.
            solver: its rule; an adaptive one chooses its own steps.
            epsilon: noise on the way, a number or a function of time that may vanish on parts of the path: the same
                marginals if the field is exact, and less memory of its errors if it is not. Wants more steps, and
                vanishes best before t = 1, where the score is not known.
            chunk_size: draws that travel together, which bounds the memory, see `rows_within`; as many as are fastest
                unless said otherwise.

        Raises:
            FloatingPointError: if the velocity becomes NaN, or draws are not finite.
        """
        generator = as_generator(seed, self._device)
        starts = self.start(n, generator).split(chunk_size or together(self._device))
        with torch.no_grad():
            if epsilon == 0:
                return _finite([self.push(x0, steps=steps, solver=solver) for x0 in starts])
            return _finite([self._push_with_noise(x0, steps, solver, epsilon, generator) for x0 in starts])

    def _push_with_noise(
        self,
        x0: Tensor,
        steps: Steps | None,
        solver: Solver | None,
        epsilon: NonNegative | Callable[[Tensor], Tensor | float],
        generator: torch.Generator,
    ) -> Tensor:
        def field(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            velocity = self.velocity(t, x)
            return velocity, self.path.score(t, x, velocity)

        rule = solver or self.solver
        x1 = integrate_sde(field, epsilon, x0, self._grid(steps), generator, rule)  # type: ignore[arg-type]
        return self.source.from_normal(x1)

    @checked
    def rows_within(self, memory: Count, trace: Trace | None = None) -> int:
        """Return the ``chunk_size`` whose tensors stay within ``memory`` bytes, without or with a density."""
        x0 = self.start(2, 0)
        times = self._grid(1)

        def work(x: Tensor) -> Any:
            if trace is None:
                return integrate(lambda t, state: (self.velocity(t, state[0]),), (x,), times, "euler")
            return self._transport(x, Tracing(trace, steps=1, solver="euler"))

        with torch.no_grad():
            return rows_within(memory, work, x0)

    @checked
    def solver_error(
        self,
        n: Annotated[int, Range(least=2)] = 64,
        seed: Seed = 0,
        *,
        steps: Count | None = None,
        solver: Solver | None = None,
        density: bool = True,
    ) -> dict[str, float]:
        """Compare ``steps`` with twice as many on the same starts: what the solver is responsible for.

        Args:
            n: number of draws.
            seed: decides the starting points.
            steps: the flow's own if None.
            solver: a rule with fixed steps.
            density: compare log densities too.

        Returns:
            ``"theta"``, the root mean square difference in standard deviations of the draws, and with ``density``
            ``"log_prob"``, the mean absolute difference, and ``"log_prob_worst"``, the largest.
        """
        steps = self.steps if steps is None else steps
        x0 = self.start(n, seed)
        with torch.no_grad():
            if not density:
                few, many = (self.push(x0, steps=m, solver=solver) for m in (steps, 2 * steps))
                return {"theta": float(((few - many) / many.std(0)).square().mean().sqrt())}
            (few, log_few), (many, log_many) = (
                self.push_with_log_prob(x0, steps=m, solver=solver) for m in (steps, 2 * steps)
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
        return torch.randn(n, self.dim, generator=generator, device=self._device, dtype=self.source.dtype)

    @checked
    def push(self, x0: Tensor, *, steps: Steps | None = None, solver: Solver | None = None) -> Tensor:
        """Carry latent points ``(n, dim)`` to weights; differentiable, all in one chunk."""
        grid, x0 = self._grid(steps), self._rows("x0", x0)
        (x1,) = integrate(lambda t, state: (self.velocity(t, state[0]),), (x0,), grid, solver or self.solver)
        return self.source.from_normal(x1)

    @checked
    def sample_with_log_prob(self, n: Count, seed: Seed = 0, **options: Unpack[SampleOptions]) -> tuple[Tensor, Tensor]:
        """Draw ``(n, dim)`` and their log densities ``(n,)`` in one pass forwards; see `DensityOptions`."""
        generator = as_generator(seed, self._device)
        with torch.no_grad():
            options = SampleOptions(**({"progress": True} | options))  # type: ignore[typeddict-item]
            theta, log_prob = self.push_with_log_prob(self.start(n, generator), seed=generator, **options)
        return _finite([theta]), log_prob

    @checked
    def push_with_log_prob(self, x0: Tensor, **options: Unpack[DensityOptions]) -> tuple[Tensor, Tensor]:
        """Carry latent points ``(n, dim)`` to weights, with their log densities ``(n,)`` there; differentiable."""
        tracing = Tracing(**options).on(self._device)
        thetas, log_probs, doubtful = [], [], 0
        x0 = self._rows("x0", x0)
        with self._bar(x0, tracing) as bar:
            for rows in x0.split(tracing.chunk_size):
                x1, change, doubts = self._transport(rows, tracing, bar=bar)
                doubtful += doubts
                theta = self.source.from_normal(x1)
                thetas.append(theta)
                log_probs.append(_log_normal(rows) - change + self.source.log_jacobian(theta))
        self._tell(doubtful, len(x0), tracing)
        return torch.cat(thetas), torch.cat(log_probs)

    @checked
    def pull_with_log_prob(self, theta: Tensor, **options: Unpack[DensityOptions]) -> tuple[Tensor, Tensor]:
        """Carry weights ``(n, dim)`` back to latent points, with their log densities ``(n,)``; differentiable."""
        tracing = Tracing(**options).on(self._device)
        starts, log_probs, doubtful = [], [], 0
        theta = self._rows("theta", theta)
        with self._bar(theta, tracing) as bar:
            for rows in theta.split(tracing.chunk_size):
                x0, change, doubts = self._transport(self.source.to_normal(rows), tracing, backwards=True, bar=bar)
                doubtful += doubts
                starts.append(x0)
                log_probs.append(_log_normal(x0) + change + self.source.log_jacobian(rows))
        self._tell(doubtful, len(theta), tracing)
        return torch.cat(starts), torch.cat(log_probs)

    @checked
    def log_prob(self, theta: Tensor, **options: Unpack[DensityOptions]) -> Tensor:
        """Return the log density of the flow at ``theta``, ``(..., dim) -> (...)`` in float64.

        Far from the posterior fields are stiff, and a rule with fixed steps may miss by hundreds of nats: a warning
        says for how many weights steps of twice the length make a difference of a nat.

        Args:
            theta: weights.
            options: ``trace``, ``probes``, ``noise``, ``seed``, ``steps``, ``solver``, ``chunk_size``, ``progress``;
                see `DensityOptions`.
        """
        flat = shaped("theta", theta, self.dim, lead=True).reshape(-1, self.dim)
        options = DensityOptions(**({"progress": True} | options))  # type: ignore[typeddict-item]
        with torch.no_grad():
            _, log_probs = self.pull_with_log_prob(flat, **options)
        return log_probs.reshape(theta.shape[:-1])

    def _bar(self, x: Tensor, tracing: Tracing) -> tqdm:
        """Return a bar for the divergences of ``x`` that are certain to be evaluated."""
        steps = self.steps if tracing.steps is None else tracing.steps
        total = 2 * steps * len(x) if isinstance(steps, int) else None
        return progress_bar(total, "log density", tracing.progress, "divergence", delay=_PATIENCE)

    def _transport(
        self, x: Tensor, tracing: Tracing, *, backwards: bool = False, bar: tqdm | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """Carry ``x`` from one end to the other and integrate the divergence on the way; say for how many in doubt."""
        probes = tracing.draw(x)  # one set for the whole path, or the solver would integrate noise
        solver = tracing.solver or self.solver
        steps = self.steps if tracing.steps is None else tracing.steps

        def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if bar is not None:
                bar.update(len(state[0]))
            return self.velocity.with_divergence(t, state[0], tracing.trace, probes)

        if isinstance(steps, int) and solver in get_args(FixedSolver):
            return self._along_nodes(x, probes, tracing.trace, 2 * steps, solver, backwards, bar)
        grid = self._grid(steps)
        start = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        grid = grid.flip(0) if backwards else grid
        end, change = integrate(slope, (x, start), grid, solver)
        if solver not in get_args(FixedSolver) or len(grid) < 3:
            return end, change, 0
        with torch.no_grad():
            other, other_change = integrate(slope, (x, start), twice_as_long(grid), solver)
        apart = change - other_change
        if backwards:
            apart = apart + _log_normal(end) - _log_normal(other)
        return end, change, int((apart.abs() > _ROUGH).sum())

    @torch.no_grad()
    def _doubt(self, x: Tensor, end: Tensor, grid: Tensor, solver: Solver) -> Tensor:
        """Return by how many nats the log density of the source is off at the end of the steps, ``(n,)`` (Richardson).

        The way alone is gone again in steps of twice the length, which costs no divergence.
        """
        (other,) = integrate(lambda t, state: (self.velocity(t, state[0]),), (x,), twice_as_long(grid), solver)
        return (_log_normal(end) - _log_normal(other)).abs() / (2 ** order_of(solver) - 1)

    def _tell(self, doubtful: int, n: int, tracing: Tracing) -> None:
        if doubtful:
            warn(
                f"log densities of {doubtful} of {n} weights may be wrong by more than a nat: the field is too stiff "
                f"there for fixed steps of {tracing.solver or self.solver!r}, as it is far from the posterior. Take "
                "more steps, or an adaptive solver such as 'dopri5'"
            )

    def _along_nodes(
        self,
        x: Tensor,
        probes: Tensor | None,
        trace: Trace,
        nodes: int,
        solver: Solver,
        backwards: bool,
        bar: tqdm | None,
    ) -> tuple[Tensor, Tensor, int]:
        """Integrate the divergence at nodes, and at twice and four times as many where they are too few.

        They are where the divergence is rough along the path, or the way back to the source in doubt.
        """
        rows = torch.arange(len(x), device=x.device)
        end, change = torch.empty_like(x), torch.empty(len(x), dtype=torch.float64, device=x.device)
        before = torch.full_like(change, torch.nan)
        doubtful = 0
        for count in (nodes, 2 * nodes, 4 * nodes):
            some = None if probes is None else probes[:, rows]
            if bar is not None and bar.total is not None and count > nodes:
                bar.total += count * len(rows)
            field = _Traced(self.velocity, trace, some, bar)
            found, total, rough = integrate_with_trace(field, field.trace, x[rows], count, solver, backwards=backwards)
            end, change = end.index_copy(0, rows, found), change.index_copy(0, rows, total)
            value = total.detach()
            if backwards:
                value = value + _log_normal(found.detach())
                doubt = self._doubt(x[rows], found, node_times(count, x.device).flip(0), solver)
                rough = torch.maximum(rough, doubt)
            more = rough > _ROUGH
            # A rule of order two leaves a third of what half the steps change; others less, once they are short enough.
            doubtful = int(((value - before).abs() / 3 > _ROUGH)[more].sum())
            rows, before = rows[more], value[more]
            if len(rows) == 0:
                break
        return end, change, doubtful

    def _rows(self, name: str, points: Tensor) -> Tensor:
        """Return points ``(n, dim)``, checked, in the flow's type and on its device."""
        if points.dim() != 2 or points.shape[0] == 0 or points.shape[1] != self.dim:
            raise ValueError(f"{name} must be (n, {self.dim}), got shape {tuple(points.shape)}")
        return points.to(self._device, self.source.dtype)

    @property
    def _device(self) -> torch.device:
        return self.source.device

    def _grid(self, steps: Steps | None) -> Tensor:
        return time_grid(self.steps if steps is None else steps, device=self._device)

    # ---------------------------------------------------------------- storage

    @checked
    def save(self, path: str | Path) -> Path:
        """Write field, source and meaning of the weights to an ``.npz`` file without pickle, and no data.

        Of a flow by `on_batch` the numbers of its rows are written, too.

        Raises:
            ValueError: if the velocity is not one of bnnflow's own and cannot be rebuilt from a description.
        """
        description = self.velocity.describe()
        if description is None:
            raise ValueError(f"cannot save a {self.velocity._get_name()}: it has no describe()")
        header = {
            "velocity": description,
            "source": self.source.describe(),
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "spec": self.spec.describe(),
            "fingerprint": self.fingerprint,
            "solver": self.solver,
            "steps": self.steps,
            "info": self.info,
        }
        arrays = {name: value.cpu().numpy() for name, value in self.velocity.state_dict().items()}
        arrays |= self.source.arrays() | rows_looked_at(self.velocity)
        return storage.write(path, "flow", 2, json.loads(json.dumps(header)), arrays)

    @classmethod
    @checked
    def load(cls, path: str | Path, model: BayesianModel | None = None) -> Flow:
        """Read a flow that ``save`` wrote.

        Args:
            path: the file.
            model: binds a likelihood-informed field, which knows its data only through the model; for any other it must
                have the same weights.

        Raises:
            ValueError: if the field is informed and there is no model, or it is another one than the file's.
        """
        with storage.described(path):
            return cls.from_file(*storage.read(path, {"flow": 2}), model)

    @classmethod
    def from_file(cls, header: dict[str, Any], arrays: dict[str, np.ndarray], model: BayesianModel | None) -> Flow:
        """Build a flow from the contents of a file."""
        spec = WeightSpec.from_description(header["spec"])
        plain = header["source"]
        if isinstance(plain, list):  # version 1 knew no source but the prior
            plain = {"prior": plain, "arrays": []}
        check_weights(spec, model)
        state = {name: values for name, values in arrays.items() if name not in (*plain["arrays"], ROWS)}
        dtype = header["dtype"] if "dtype" in header else str(next(iter(state.values())).dtype)  # version 1 has none
        dtype = dtype_of(dtype)
        velocity = restore(header["velocity"], spec, state, dtype)
        if velocity.informed and model is None:
            raise ValueError("a likelihood-informed flow needs its model: Flow.load(path, model)")
        if velocity.informed and model is not None and not model.recognises(header["fingerprint"]):
            raise ValueError(
                "this is not the model that the flow was fitted on (data, prior, likelihood or network differ); "
                "load it with its own model and call flow.bind(model) to use it on another"
            )
        source = Source.from_description(plain, arrays, dtype, model)
        if velocity.informed and model is not None:
            velocity = velocity.bind(Context(model, source, rows_to_look_at(arrays, model)))
        rest = (str(header["fingerprint"]), *solver_of(header), dict(header["info"]))
        return cls(velocity, source, spec, *rest)


@checked
def GaussNewtonFlow(
    model: BayesianModel,
    displacement: Displacement | None = None,
    *,
    source: Source | None = None,
    path: AffinePath | None = None,
    steps: Count | None = None,
    solver: Solver = "midpoint",
) -> Flow:
    """Return the flow of a `DriveVelocity`: a sampler that needs neither draws nor training, for any network.

    Exact for a linear Gaussian model; elsewhere an approximation that follows curvature and, by its curved paths, some
    of the posterior's shape. It is a start for `refine`, `correct` and SMC, and a source of training targets.

    Args:
        model: the posterior; its likelihood needs a ``fisher_factor`` for Gauss-Newton.
        displacement: `GaussNewton` unless said otherwise.
        source: the law at t = 0; the prior if None.
        path: the path from it.
        steps: of the solver; if None 20, and for a linear Gaussian model as many as bring its draws to their width.
        solver: its rule.
    """
    context = Context(model, source)
    steps = _resolving(context) if steps is None else steps
    field = DriveVelocity(displacement, path, context.source.symmetries(model))
    return Flow.of(field, model, context.source, steps=steps, solver=solver, info={"untrained": True})


_USUAL, _MOST = 20, 1000  # steps
_POWERS = 20  # of a matrix, to find its largest eigenvalue
_ROUNDING = 1e-3  # of a matrix that is the same everywhere


def _resolving(context: Context) -> int:
    """Return how many steps bring draws of a linear Gaussian model to their width; the usual number for other models.

    The last of n steps is 1 / n^2 of the path. A quarter of the posterior's least width, as a share of the source's,
    leaves that width off by some percent.
    """
    least = _least_width(context)
    wanted = math.ceil(2 / least**0.5)
    if wanted > _MOST:
        warn(
            f"in some direction the posterior is {least:.1e} times as wide as the source, which would take {wanted} "
            f"steps; after {_MOST} draws are too narrow there: take a source that is nearer"
        )
    return max(_USUAL, min(wanted, _MOST))


@torch.no_grad()
def _least_width(context: Context) -> float:
    """Return the least standard deviation of a linear Gaussian posterior in units of the source's; 1 for others."""
    if not context.model.likelihood.has_fisher_factor:
        return 1.0
    x, v = torch.randn(2, 2, context.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        context.source.device, context.source.dtype
    )
    _, times = context.at(x).grad_and_product()
    first, second = times(v[:1].expand(2, -1))
    if not (first - second).norm() <= _ROUNDING * first.norm():  # at two points it would be one matrix
        return 1.0
    largest = 0.0
    for _ in range(_POWERS):
        image = times(v)
        largest = float(image.norm() / v.norm())
        v = image / image.norm() if largest else v
    return (1 + largest) ** -0.5


class _Traced:
    """A field that remembers its velocity where its divergence was taken last, from where the next step begins."""

    def __init__(self, velocity: Field, trace: Trace, probes: Tensor | None, bar: tqdm | None) -> None:
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
            f"{broken} of {len(theta)} draws are infinite or NaN: take more steps, fit the flow for longer, or let "
            "`correct` leave them out"
        )
    return theta


def _log_normal(x: Tensor) -> Tensor:
    return -0.5 * (x * x).sum(-1, dtype=torch.float64) - 0.5 * x.shape[-1] * _LOG_2PI
