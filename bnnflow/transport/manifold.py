"""Flows on the manifold of networks whose scales are normalised, and what makes them densities over
weights.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnflow import storage
from bnnflow.arguments import Count, checked, finite
from bnnflow.draws import Draws, as_theta
from bnnflow.method import Sampleable
from bnnflow.model import BayesianModel
from bnnflow.options import Checkpoint, Training
from bnnflow.seeding import as_generator, isolated
from bnnflow.symmetry import Spheres
from bnnflow.symmetry.canonical import split_scale
from bnnflow.transport.couplings import Coupling, Independent
from bnnflow.transport.divergence import divergence
from bnnflow.transport.field import Field
from bnnflow.transport.geometry import RiemannianPath, TangentVelocity
from bnnflow.transport.options import Density, Solver
from bnnflow.transport.solvers import integrate
from bnnflow.transport.stored import dtype_of, solver_of, stored_solver
from bnnflow.transport.training import train
from bnnflow.transport.velocity import restore
from bnnflow.types import Seed
from bnnflow.weights import WeightSpec

__all__ = ["CompletedFlow", "ManifoldFlow", "Radii", "fit_manifold_flow"]


@checked
@dataclass(frozen=True)
class ManifoldFlow:
    """A transport of the uniform law on spheres, and the normal one on the flat rest, to a law of
    normalised networks.

    Points solve dx/dt = the tangent part of velocity(t, x) from t = 0 to t = 1. Every step of the
    solver is taken in normal coordinates, the tangent space at its start, from which the
    exponential map leads back: the points never leave the manifold, the rule keeps its order, and a
    flow along geodesics is followed exactly. Log densities follow d log p / dt = -div velocity with
    the Riemannian divergence (Mathieu and Nickel 2020; Lou et al. 2020): that of the field's
    extension by x -> x / |x| in the space around.

    They are densities with respect to the volume of the *manifold*, for points whose scales are
    normalised: no densities over weights, and nothing to weigh a posterior with. `complete` makes
    them such.

    Attributes:
        velocity: a field ``(t, x) -> (batch, dim)`` in evaluation mode; what is not tangent of it
            is dropped.
        spheres: the manifold.
        solver: of the equation, unless a call says otherwise.
        info: how the flow was made.
    """

    velocity: Field
    spheres: Spheres
    solver: Solver = Solver()
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> WeightSpec:
        """The meaning of the weights."""
        return self.spheres.spec

    @property
    def dim(self) -> int:
        """Length of a point."""
        return self.spheres.dim

    @property
    def like(self) -> Tensor:
        """A tensor on the field's device and of its type."""
        return next(
            (p for p in [*self.velocity.parameters(), *self.velocity.buffers()]),
            torch.empty(0),
        )

    @checked
    def start(self, n: Count, seed: Seed = 0) -> Tensor:
        """Draw ``(n, dim)`` from the source."""
        return self.spheres.sample(n, seed, device=self.like.device, dtype=self.like.dtype)

    @checked
    def sample(
        self,
        n: Count,
        seed: Seed = 0,
        *,
        solver: Solver | None = None,
        chunk_size: Count = 2048,
    ) -> Tensor:
        """Draw ``(n, dim)`` normalised networks.

        Args:
            n: number of draws.
            seed: decides the starting points and so the draws.
            solver: of the equation; the flow's own if None.
            chunk_size: draws that travel together, which bounds the memory.

        Raises:
            FloatingPointError: if the velocity becomes NaN.
        """
        with torch.no_grad():
            chunks = self.start(n, seed).split(chunk_size)
            return torch.cat(
                [self.transport(x0, self.times(solver), solver)[0] for x0 in chunks]
            )

    @checked
    def sample_with_log_prob(
        self,
        n: Count,
        seed: Seed = 0,
        *,
        density: Density | None = None,
        solver: Solver | None = None,
        chunk_size: Count = 512,
    ) -> tuple[Tensor, Tensor]:
        """Draw normalised networks and their log densities on the manifold, forwards.

        Args:
            n: number of draws.
            seed: decides the starting points, and the probes of an estimated trace.
            density: how the trace is found; exactly if None.
            solver: of the equation; the flow's own if None.
            chunk_size: draws that travel together, which bounds the memory.

        Returns:
            ``(n, dim)``, and ``(n,)`` in float64.
        """
        generator = as_generator(seed, self.like.device)
        density = density or Density()
        points, log_probs = [], []
        with torch.no_grad():
            for x0 in self.start(n, generator).split(chunk_size):
                x1, change = self.transport(
                    x0, self.times(solver), solver, density, generator
                )
                points.append(x1)
                log_probs.append(self.spheres.log_prob(x0) - change)
        return torch.cat(points), torch.cat(log_probs)

    @checked
    def log_prob(
        self,
        x: Tensor,
        *,
        density: Density | None = None,
        solver: Solver | None = None,
        seed: Seed = 0,
        chunk_size: Count = 512,
    ) -> Tensor:
        """Return the log density on the manifold at points of it, ``(..., dim) -> (...)`` in
        float64.

        Args:
            x: points.
            density: how the trace is found; exactly if None.
            solver: of the equation; the flow's own if None.
            seed: of the probes of an estimated trace.
            chunk_size: points that travel together, which bounds the memory.

        Raises:
            ValueError: if a point is not on the manifold.
        """
        self.spec.check(x)
        if not bool(((self.spheres.inner(x, x)[..., :-1] - 1).abs() < 1e-3).all()):
            raise ValueError(
                "the density is one of points on the manifold: call spheres.project(theta) first"
            )
        density, generator = density or Density(), as_generator(seed, self.like.device)
        log_probs = []
        with torch.no_grad():
            for rows in x.reshape(-1, self.dim).split(chunk_size):
                x0, change = self.transport(
                    rows, self.times(solver, backwards=True), solver, density, generator
                )
                log_probs.append(self.spheres.log_prob(x0) + change)
        return torch.cat(log_probs).reshape(x.shape[:-1])

    @checked
    def complete(self, theta: Tensor) -> CompletedFlow:
        """Return the flow with a law of the radii fitted to weights ``(n, dim)``, as a density over
        weights.
        """
        theta = finite("theta", self.spec.check(theta.to(self.like)))
        return CompletedFlow(self, Radii.fit(theta, self.spheres))

    # ---------------------------------------- transport

    def times(self, solver: Solver | None = None, *, backwards: bool = False) -> Tensor:
        """Return the times of a solver, ``(steps + 1,)``, of the flow's own if None, from 0 to 1 or
        back.
        """
        grid = (solver or self.solver).grid(self.like.device)
        return grid.flip(0) if backwards else grid

    def transport(
        self,
        x: Tensor,
        times: Tensor,
        solver: Solver | None = None,
        density: Density | None = None,
        seed: Seed = 0,
    ) -> tuple[Tensor, Tensor]:
        """Carry points along the given times, and integrate the divergence on the way.

        Differentiable by the points.

        Args:
            x: points on the manifold, ``(batch, dim)``.
            times: where steps begin and end, ``(steps + 1,)``, forwards or backwards.
            solver: its rule and tolerances; the flow's own if None.
            density: how the divergence is found; it is zero if None.
            seed: of the probes of an estimated trace.

        Returns:
            ``(batch, dim)``, and ``(batch,)`` in float64.
        """
        solver = solver or self.solver
        generator = as_generator(seed, self.like.device)
        spheres = self.spheres
        # One set of probes for the whole path, or the solver would integrate noise.
        probes = None if density is None else density.draw(x, generator)

        def extended(t: Tensor, z: Tensor) -> Tensor:
            z = spheres.retract(z)
            return spheres.tangent(z, self.velocity(t, z))

        def step(x: Tensor, change: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
            def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                y = spheres.exp(x, state[0])
                if density is None:
                    velocity, rate = extended(t, y), torch.zeros_like(change)
                else:
                    velocity, rate = divergence(extended, t, y, density.trace, probes)
                return spheres.log_velocity(x, state[0], velocity), rate

            w, change = integrate(
                slope,
                (torch.zeros_like(x), change),
                ends,
                solver.rule,
                rtol=solver.rtol,
                atol=solver.atol,
            )
            return spheres.exp(x, w), change

        change = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for ends in pairwise(times):
            x, change = step(x, change, torch.stack(ends))
        return x, change

    # ---------------------------------------- storage

    def save(self, path: str | Path) -> Path:
        """Write field and meaning of the weights to an ``.npz`` file without pickle.

        `bnnflow.load` reads it back.

        Raises:
            ValueError: if the velocity cannot be rebuilt from a description, or looks at data.
        """
        return storage.write(path, "manifold-flow", 1, self.describe(), self.arrays())

    def describe(self) -> dict[str, Any]:
        """Return plain values from which, with `arrays`, the flow is rebuilt.

        ``ValueError`` as for `save`.
        """
        description = self.velocity.describe()
        if description is None or self.velocity.informed:
            raise ValueError(f"cannot save a {self.velocity._get_name()} on a manifold")
        return {
            "velocity": description,
            "dtype": str(self.like.dtype).removeprefix("torch."),
            "spec": self.spec.describe(),
            **stored_solver(self.solver),
            "info": self.info,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the state of the field."""
        return {
            name: value.cpu().numpy() for name, value in self.velocity.state_dict().items()
        }

    @classmethod
    def load(cls, path: str | Path, model: BayesianModel | None = None) -> ManifoldFlow:
        """Read a flow that ``save`` wrote.

        Args:
            path: the file.
            model: the model whose weights these must be, if given; the flow needs none.

        Raises:
            ValueError: if the file holds something else, or a flow of other weights than the
                model's.
        """
        with storage.described(path):
            return cls.from_file(*storage.read(path, {"manifold-flow": 1}), model)

    @classmethod
    def from_file(
        cls,
        header: dict[str, Any],
        arrays: dict[str, np.ndarray],
        model: BayesianModel | None,
    ) -> ManifoldFlow:
        """Build a flow from the contents of a file."""
        spec = WeightSpec.from_description(header["spec"])
        if model is not None and model.spec.describe() != spec.describe():
            raise ValueError(
                "these are not the model's weights: names, shapes, order or activations differ"
            )
        velocity = restore(header["velocity"], spec, arrays, dtype_of(header["dtype"]))
        return cls(velocity, Spheres(spec), solver_of(header), dict(header["info"]))


class Radii(NamedTuple):
    """Independent radii of the units, r = exp(location + scale * log chi), with chi the norm of as
    many normals.

    With location 0 and scale 1 these are the norms of Gaussian weights, which a uniform direction
    makes Gaussian.

    Attributes:
        location: ``(units,)``.
        scale: ``(units,)``, positive.
    """

    location: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, theta: Tensor, spheres: Spheres) -> Radii:
        """Match mean and variance of the log radii of weights ``(n, dim)``, the same for all units
        of a layer.

        Raises:
            ValueError: if there are fewer than two networks, or their radii are not finite or do
                not vary.
        """
        spheres.spec.check(theta)
        if theta.dim() != 2 or len(theta) < 2:
            raise ValueError(
                f"radii are fitted to two networks (n, dim) or more, got {tuple(theta.shape)}"
            )
        norms = split_scale(theta.double(), spheres.spec)[1]
        half = {
            label: sizes.to(theta.device).double() / 2
            for label, sizes in spheres.by_label(spheres.sizes).items()
        }
        location, scale = [], []
        for label, norm in norms.items():
            log_norm = norm.log()
            # log chi has mean (log 2 + psi(k / 2)) / 2 and variance psi'(k / 2) / 4.
            scale.append(2 * log_norm.std() * torch.polygamma(1, half[label]).rsqrt())
            location.append(
                log_norm.mean()
                - 0.5 * scale[-1] * (math.log(2) + torch.digamma(half[label]))
            )
        radii = cls(torch.cat(location).to(theta), torch.cat(scale).to(theta))
        if not bool(radii.location.isfinite().all() and (radii.scale > 1e-6).all()):
            raise ValueError("the radii of these weights are not finite, or do not vary")
        return radii


@checked
def fit_manifold_flow(
    spec: WeightSpec,
    draws: Draws | Tensor | tuple[Tensor, Tensor | None],
    *,
    velocity: nn.Module | None = None,
    coupling: Coupling | None = None,
    training: Training | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> ManifoldFlow:
    """Fit a flow of normalised networks by Riemannian flow matching (Chen and Lipman 2024).

    As `fit_flow`, from the uniform law on the spheres and the normal one on the rest, along
    geodesics. Every pair is moved by a random permutation, and sign flip where activations are odd,
    which keep the source.

    Args:
        spec: what the entries mean.
        draws: networks of any scale, which are normalised here: `Draws`, weights, or (weights, log
            weights).
        velocity: a field on the manifold, called as ``field(t, x)``; `TangentVelocity` if None.
        coupling: `Independent` unless said otherwise.
        training: how long and how fast; `Training` with its defaults, Muon at 3e-3, if None.
        checkpoint: a file that keeps the state of training, or a `Checkpoint` that goes on from it.
        seed: an int or a generator.
        progress: show a bar at a terminal.

    Raises:
        ValueError: if there are no draws, they do not fit or are not finite, or the network cannot
            be labelled.
    """
    theta, log_weights = as_theta(draws)
    spec.check(theta, "draws")
    if len(theta) == 0 or not bool(theta.isfinite().all()):
        raise ValueError("a flow needs finite draws, and at least one")
    spheres = Spheres(spec)
    targets = spheres.project(theta)
    weights = (
        targets.new_ones(len(targets))
        if log_weights is None
        else log_weights.to(targets).softmax(0)
    )
    generator = as_generator(seed, targets.device)
    coupling = coupling if coupling is not None else Independent()
    group = spec.symmetries()._replace(scale=frozenset(), phase=frozenset())

    def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.multinomial(weights, n, replacement=True, generator=generator)
        x0 = spheres.sample(n, generator, device=targets.device, dtype=targets.dtype)
        return coupling.pair(x0, targets[rows], spec, group, generator)

    with isolated(generator):
        field = (
            TangentVelocity(spec)
            if velocity is None
            else copy.deepcopy(Field.of(velocity)).requires_grad_()
        )
    _, info = train(
        field.to(targets).train(),
        pairs,
        path=RiemannianPath(spheres),
        training=training,
        checkpoint=checkpoint,
        seed=generator,
        progress=progress,
    )
    return ManifoldFlow(field, spheres, info=info | {"coupling": type(coupling).__name__})


@dataclass(frozen=True)
class CompletedFlow(Sampleable):
    """A manifold flow with a law of the radii: a density over weights, and a `Posterior`.

    A draw of N(0, I) gives both: the directions of its spheres are uniform, and travel on the
    manifold; the norms, independent of them, become radii. Then theta = ``spec.rescale(x, r)``, and
    log q(theta) = log p(x) + log p(log r) - log |d theta / d (x, log r)|.

    Attributes:
        flow: of the normalised networks.
        radii: law of the radii.
    """

    flow: ManifoldFlow
    radii: Radii

    @property
    def spec(self) -> WeightSpec:
        """The meaning of the weights."""
        return self.flow.spec

    @property
    def dim(self) -> int:
        """Length of a weight vector."""
        return self.flow.dim

    @property
    def solver(self) -> Solver:
        """The solver of the flow."""
        return self.flow.solver

    @checked
    def start(self, n: Count, seed: Seed = 0) -> Tensor:
        """Draw ``(n, dim)`` from N(0, I)."""
        like = self.flow.like
        generator = as_generator(seed, like.device)
        return torch.randn(
            n, self.dim, generator=generator, device=like.device, dtype=like.dtype
        )

    @checked
    def forward(self, x0: Tensor, *, solver: Solver | None = None) -> Tensor:
        """Carry draws of N(0, I) to weights, ``(n, dim)``; differentiable by them."""
        x1, _ = self.flow.transport(
            self.flow.spheres.retract(x0), self.flow.times(solver), solver
        )
        return self.spec.rescale(x1, self._radii(self._log_norms(x0)))

    @checked
    def forward_with_log_prob(
        self,
        x0: Tensor,
        *,
        density: Density | None = None,
        solver: Solver | None = None,
        seed: Seed = 0,
        chunk_size: Count = 512,
    ) -> tuple[Tensor, Tensor]:
        """Carry draws of N(0, I) to weights, with their log densities.

        Args:
            x0: ``(n, dim)``.
            density: how the trace is found; exactly if None.
            solver: of the equation; the flow's own if None.
            seed: of the probes of an estimated trace.
            chunk_size: points that travel together, which bounds the memory.

        Returns:
            ``(n, dim)``, and ``(n,)`` in float64.
        """
        density, generator = density or Density(), as_generator(seed, x0.device)
        thetas, log_probs = [], []
        for rows in x0.split(chunk_size):
            start, log_norms = self.flow.spheres.retract(rows), self._log_norms(rows)
            x1, change = self.flow.transport(
                start, self.flow.times(solver), solver, density, generator
            )
            thetas.append(self.spec.rescale(x1, self._radii(log_norms)))
            log_probs.append(
                self.flow.spheres.log_prob(start)
                - change
                + self._log_prob_of_radii(log_norms)
            )
        return torch.cat(thetas), torch.cat(log_probs)

    @checked
    def inverse_with_log_prob(
        self,
        theta: Tensor,
        *,
        density: Density | None = None,
        solver: Solver | None = None,
        seed: Seed = 0,
        chunk_size: Count = 512,
    ) -> tuple[Tensor, Tensor]:
        """Carry weights back to where they come from, with their log densities; undoes `forward`.

        Args:
            theta: ``(n, dim)``.
            density: how the trace is found; exactly if None.
            solver: of the equation; the flow's own if None.
            seed: of the probes of an estimated trace.
            chunk_size: points that travel together, which bounds the memory.

        Returns:
            ``(n, dim)``, and ``(n,)`` in float64.
        """
        density, generator = density or Density(), as_generator(seed, theta.device)
        starts, log_probs = [], []
        for rows in theta.split(chunk_size):
            x1, norms = split_scale(rows, self.spec)
            log_radii = torch.cat([norm.log() for norm in norms.values()], -1)
            log_norms = (log_radii - self.radii.location) / self.radii.scale
            times = self.flow.times(solver, backwards=True)
            x0, change = self.flow.transport(x1, times, solver, density, generator)
            starts.append(
                x0 * self.flow.spheres.each(F.pad(log_norms.exp(), (0, 1), value=1.0))
            )
            log_probs.append(
                self.flow.spheres.log_prob(x0) + change + self._log_prob_of_radii(log_norms)
            )
        return torch.cat(starts), torch.cat(log_probs)

    @checked
    def sample(self, n: Count, seed: Seed = 0, *, solver: Solver | None = None) -> Tensor:
        """Draw ``(n, dim)`` weights."""
        with torch.no_grad():
            return torch.cat(
                [self.forward(x0, solver=solver) for x0 in self.start(n, seed).split(2048)]
            )

    @checked
    def sample_with_log_prob(
        self,
        n: Count,
        seed: Seed = 0,
        *,
        density: Density | None = None,
        solver: Solver | None = None,
        chunk_size: Count = 512,
    ) -> tuple[Tensor, Tensor]:
        """Draw weights and their log densities.

        Args:
            n: number of draws.
            seed: decides the starting points, and the probes of an estimated trace.
            density: how the trace is found; exactly if None.
            solver: of the equation; the flow's own if None.
            chunk_size: draws that travel together, which bounds the memory.

        Returns:
            ``(n, dim)``, and ``(n,)`` in float64.
        """
        generator = as_generator(seed, self.flow.like.device)
        with torch.no_grad():
            return self.forward_with_log_prob(
                self.start(n, generator),
                density=density,
                solver=solver,
                seed=generator,
                chunk_size=chunk_size,
            )

    @checked
    def log_prob(
        self,
        theta: Tensor,
        *,
        density: Density | None = None,
        solver: Solver | None = None,
        seed: Seed = 0,
        chunk_size: Count = 512,
    ) -> Tensor:
        """Return the log density over weights, ``(..., dim) -> (...)`` in float64.

        Args:
            theta: weights.
            density: how the trace is found; exactly if None.
            solver: of the equation; the flow's own if None.
            seed: of the probes of an estimated trace.
            chunk_size: points that travel together, which bounds the memory.
        """
        flat = finite("theta", self.spec.check(theta).to(self.flow.like)).reshape(
            -1, self.dim
        )
        with torch.no_grad():
            _, log_probs = self.inverse_with_log_prob(
                flat, density=density, solver=solver, seed=seed, chunk_size=chunk_size
            )
        return log_probs.reshape(theta.shape[:-1])

    def _log_norms(self, x0: Tensor) -> Tensor:
        """Return the log norms of draws of N(0, I) on each sphere, ``(n, units)``."""
        return 0.5 * self.flow.spheres.inner(x0, x0)[..., :-1].log()

    def _radii(self, log_norms: Tensor) -> dict[str, Tensor]:
        return self.flow.spheres.by_label(
            (self.radii.location + self.radii.scale * log_norms).exp()
        )

    def _log_prob_of_radii(self, log_norms: Tensor) -> Tensor:
        """Return log p(log r) - log |d theta / d (x, log r)|, ``(n,)`` in float64."""
        spheres, log_norms = self.flow.spheres, log_norms.double()
        size = spheres.sizes.to(log_norms)
        log_chi = math.log(2) - 0.5 * size * math.log(2) - torch.lgamma(size / 2)
        log_chi = (
            log_chi
            + size * log_norms
            - 0.5 * (2 * log_norms).exp()
            - self.radii.scale.double().log()
        )
        # At given radii theta is a multiple of x, weight by weight; along a radius the norm of its
        # unit adds no more than 1, since what else changes belongs to later units.
        ones = torch.ones(self.dim, dtype=torch.float64, device=log_norms.device)
        stretch = self.spec.rescale(ones, self._radii(log_norms)).log().sum(-1)
        return log_chi.sum(-1) - stretch

    # ---------------------------------------- storage

    def save(self, path: str | Path) -> Path:
        """Write flow and radii to an ``.npz`` file without pickle; see `ManifoldFlow.save`."""
        radii = {
            f"radii/{name}": value.cpu().numpy()
            for name, value in self.radii._asdict().items()
        }
        return storage.write(
            path, "completed-flow", 1, self.flow.describe(), self.flow.arrays() | radii
        )

    @classmethod
    def load(cls, path: str | Path, model: BayesianModel | None = None) -> CompletedFlow:
        """Read a flow that ``save`` wrote; see `ManifoldFlow.load`."""
        with storage.described(path):
            return cls.from_file(*storage.read(path, {"completed-flow": 1}), model)

    @classmethod
    def from_file(
        cls,
        header: dict[str, Any],
        arrays: dict[str, np.ndarray],
        model: BayesianModel | None,
    ) -> CompletedFlow:
        """Build a flow from the contents of a file."""
        radii = Radii(
            *(torch.from_numpy(arrays[f"radii/{name}"]) for name in Radii._fields)
        )
        state = {
            name: values for name, values in arrays.items() if not name.startswith("radii/")
        }
        flow = ManifoldFlow.from_file(header, state, model)
        if any(value.shape != (flow.spheres.units,) for value in radii):
            raise ValueError(f"the radii are not those of {flow.spheres.units} units")
        return cls(flow, radii)
