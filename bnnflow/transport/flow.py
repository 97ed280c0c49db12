"""The flow: a trained field with its source, as a posterior that can be sampled and evaluated."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnnflow import storage
from bnnflow.model import BayesianModel
from bnnflow.model.priors import FlatPrior
from bnnflow.seeding import as_generator
from bnnflow.transport.coordinates import Context
from bnnflow.transport.divergence import exact_divergence, hutchinson_divergence, probe_noise
from bnnflow.transport.solvers import integrate, time_grid
from bnnflow.transport.velocity import InformedVelocity, bound, rebuild
from bnnflow.types import Noise, Seed, Solver, Trace
from bnnflow.weights import WeightSpec

__all__ = ["Flow"]

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Flow:
    """A transport of the prior to the posterior; a `Posterior`.

    Samples solve dx/dt = velocity(t, x) from t = 0, x ~ N(0, I) in the prior's standard normal coordinates, to t = 1.
    Log densities follow d log p / dt = -div velocity along the path, and include the Jacobian of the coordinates, so
    that they are densities over ``theta``. Their error is the solver's: compare two values of ``steps``.

    Attributes:
        velocity: the field, in evaluation mode.
        source: the prior.
        spec: the meaning of the weights.
        fingerprint: of the model that the field is bound to, or was fitted on.
        solver: rule and number of steps used unless a call says otherwise.
        steps: see ``solver``.
        info: how the flow was made.
    """

    velocity: nn.Module
    source: FlatPrior
    spec: WeightSpec
    fingerprint: str
    solver: Solver = "midpoint"
    steps: int = 8
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, velocity: nn.Module, model: BayesianModel, **options: Any) -> Flow:
        """Make a flow of a field, bound to a model; an untrained `InformedVelocity` is a sampler of its own.

        Args:
            velocity: a field for the model's weights.
            model: gives the source and, to informed fields, the data.
            options: other attributes of the flow.
        """
        field = bound(velocity, Context(model))
        return cls(field.eval(), model.flat_prior, model.spec, model.fingerprint(), **options)

    @property
    def dim(self) -> int:
        """Length of a weight vector."""
        return self.spec.dim

    def bind(self, model: BayesianModel) -> Flow:
        """Return the same field bound to another model's prior and data."""
        return Flow.of(self.velocity, model, solver=self.solver, steps=self.steps, info=self.info)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Flow:
        """Return the flow on another device or in another floating-point type."""
        moved = copy.deepcopy(bound(self.velocity, None)).to(device, dtype)  # without the data, which do not move
        context: Context | None = getattr(self.velocity, "context", None)
        moved = bound(moved, None if context is None else context.to(device, dtype))
        return replace(self, velocity=moved.eval(), source=self.source.to(device, dtype))

    # ---------------------------------------------------------------- sampling and densities

    def sample(
        self, n: int, seed: Seed = 0, *, steps: int | None = None, solver: Solver | None = None, chunk_size: int = 2048
    ) -> Tensor:
        """Draw ``(n, dim)`` posterior weights.

        Args:
            n: number of draws.
            seed: decides the starting points and so the draws.
            steps: steps of the solver; the flow's own if None.
            solver: its rule.
            chunk_size: draws that travel together, which bounds the memory.

        Raises:
            FloatingPointError: if the velocity becomes NaN.
        """
        grid = self._grid(steps)

        def travel(x0: Tensor) -> Tensor:
            (x1,) = integrate(lambda t, s: (self.velocity(t, s[0]),), (x0,), grid, solver or self.solver)
            return self.source.from_normal(x1)

        with torch.no_grad():
            return torch.cat([travel(x0) for x0 in self._start(n, seed).split(chunk_size)])

    def sample_with_log_prob(
        self,
        n: int,
        seed: Seed = 0,
        *,
        trace: Trace = "exact",
        probes: int = 8,
        noise: Noise = "rademacher",
        steps: int | None = None,
        solver: Solver | None = None,
        chunk_size: int = 512,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``(n, dim)`` and their log densities ``(n,)`` in one pass forwards; see ``log_prob``."""
        generator = as_generator(seed, self._device)
        grid = self._grid(steps)
        thetas, log_probs = [], []
        for x0 in self._start(n, generator).split(chunk_size):
            x1, change = self._transport(x0, grid, trace, probes, noise, generator, solver)
            theta = self.source.from_normal(x1)
            thetas.append(theta)
            log_probs.append(_log_normal(x0) - change + self.source.log_jacobian(theta))
        return torch.cat(thetas), torch.cat(log_probs)

    def log_prob(
        self,
        theta: Tensor,
        *,
        trace: Trace = "exact",
        probes: int = 8,
        noise: Noise = "rademacher",
        seed: Seed = 0,
        steps: int | None = None,
        solver: Solver | None = None,
        chunk_size: int = 512,
    ) -> Tensor:
        """Return the log density of the flow at ``theta``, ``(..., dim) -> (...)`` in float64.

        Args:
            theta: weights.
            trace: ``"exact"`` costs dim forward-mode products an evaluation; ``"hutchinson"`` is unbiased for the
                log density (not for the density) and costs ``probes`` reverse-mode products.
            probes: number of random probes, whose estimates are averaged.
            noise: their law; Rademacher has never the larger variance for a symmetric Jacobian.
            seed: of the probes, which stay fixed along a path.
            steps: steps of the solver; the flow's own if None.
            solver: its rule.
            chunk_size: draws that travel together, which bounds the memory.
        """
        self.spec.check(theta)
        generator = as_generator(seed, self._device)
        grid = self._grid(steps).flip(0)
        flat = theta.reshape(-1, self.dim)
        log_probs = []
        for rows in flat.split(chunk_size):
            x0, change = self._transport(self.source.to_normal(rows), grid, trace, probes, noise, generator, solver)
            log_probs.append(_log_normal(x0) + change + self.source.log_jacobian(rows))
        return torch.cat(log_probs).reshape(theta.shape[:-1])

    def _transport(
        self,
        x: Tensor,
        grid: Tensor,
        trace: Trace,
        probes: int,
        noise: Noise,
        generator: torch.Generator,
        solver: Solver | None,
    ) -> tuple[Tensor, Tensor]:
        """Carry ``x`` along the grid and integrate the divergence on the way."""
        if trace not in ("exact", "hutchinson"):
            raise ValueError(f"trace must be 'exact' or 'hutchinson', got {trace!r}")
        # One set of probes for the whole path, or the solver would integrate noise.
        directions = probe_noise(noise, probes, x, generator) if trace == "hutchinson" else None

        def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            def field(z: Tensor) -> Tensor:
                return self.velocity(t, z)

            if directions is None:
                return exact_divergence(field, state[0])
            velocity, estimates = hutchinson_divergence(field, state[0], directions)
            return velocity, estimates.mean(0)

        start = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        with torch.no_grad():
            end, change = integrate(slope, (x, start), grid, solver or self.solver)
        return end, change

    @property
    def _device(self) -> torch.device:
        return self.source.device

    def _grid(self, steps: int | None) -> Tensor:
        return time_grid(self.steps if steps is None else steps, device=self._device)

    def _start(self, n: int, seed: Seed) -> Tensor:
        generator = as_generator(seed, self._device)
        return torch.randn(n, self.dim, generator=generator, device=self._device, dtype=self.source.dtype)

    # ---------------------------------------------------------------- storage

    def save(self, path: str | Path) -> Path:
        """Write field, source and meaning of the weights to an ``.npz`` file without pickle, and no data.

        Raises:
            ValueError: if the velocity is not one of bnnflow's own and cannot be rebuilt from a description.
        """
        if not hasattr(self.velocity, "describe"):
            raise ValueError(f"cannot save a {type(self.velocity).__name__}: it has no describe()")
        header = {
            "velocity": self.velocity.describe(),  # type: ignore[operator]
            "source": self.source.describe(),
            "spec": self.spec.describe(),
            "fingerprint": self.fingerprint,
            "solver": self.solver,
            "steps": self.steps,
            "info": self.info,
        }
        arrays = {name: value.cpu().numpy() for name, value in self.velocity.state_dict().items()}
        return storage.write(path, "flow", 1, json.loads(json.dumps(header)), arrays)

    @classmethod
    def load(cls, path: str | Path, model: BayesianModel | None = None) -> Flow:
        """Read a flow that ``save`` wrote.

        Args:
            path: the file.
            model: binds a likelihood-informed field, which knows its data only through the model.

        Raises:
            ValueError: if the field is informed and there is no model, or it is another one than the file's.
        """
        return cls.from_file(*storage.read(path, {"flow": 1}), model)

    @classmethod
    def from_file(cls, header: dict[str, Any], arrays: dict[str, np.ndarray], model: BayesianModel | None) -> Flow:
        """Build a flow from the contents of a file."""
        spec = WeightSpec.from_description(header["spec"])
        velocity = rebuild(header["velocity"], spec)
        state = {name: torch.from_numpy(value) for name, value in arrays.items()}
        dtype = next(iter(state.values())).dtype
        velocity.to(dtype).requires_grad_(False).load_state_dict(state)
        if isinstance(velocity, InformedVelocity):
            if model is None:
                raise ValueError("a likelihood-informed flow needs its model: Flow.load(path, model)")
            if model.fingerprint() != header["fingerprint"]:
                raise ValueError(
                    "this is not the model that the flow was fitted on (data, prior, likelihood or network differ); "
                    "load it with its own model and call flow.bind(model) to use it on another"
                )
            velocity = velocity.bind(Context(model))
        return cls(
            velocity.eval(),
            FlatPrior.from_description(header["source"], dtype),
            spec,
            header["fingerprint"],
            header["solver"],
            header["steps"],
            header["info"],
        )


def _log_normal(x: Tensor) -> Tensor:
    return -0.5 * (x * x).sum(-1, dtype=torch.float64) - 0.5 * x.shape[-1] * _LOG_2PI
