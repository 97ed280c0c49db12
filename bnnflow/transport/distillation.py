"""A flow in few evaluations: a map between fixed times, learned from a flow's own solutions."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnflow import storage
from bnnflow.arguments import Count, checked
from bnnflow.method import Sampleable
from bnnflow.model import BayesianModel
from bnnflow.options import Training
from bnnflow.seeding import as_generator
from bnnflow.transport.field import Field
from bnnflow.transport.flow import Flow
from bnnflow.transport.options import default_chunk
from bnnflow.transport.paths import ProbabilityPath
from bnnflow.transport.pushforward import Pushforward
from bnnflow.transport.solvers import integrate, time_grid
from bnnflow.transport.source import Source
from bnnflow.transport.stored import (
    ROWS,
    check_weights,
    dtype_of,
    rows_looked_at,
    rows_to_look_at,
)
from bnnflow.transport.training import train
from bnnflow.transport.velocity import restore
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.types import Seed
from bnnflow.weights import WeightSpec

__all__ = ["FlowMap", "distil"]


@dataclass(frozen=True)
class FlowMap(Sampleable):
    """An approximate sampler in a few evaluations, made from a flow by `distil`.

    x_{k+1} = x_k + (t_{k+1} - t_k) field(t_k, x_k): every step is a map that was trained to land
    where the flow does. It has *no density*: the composition is not the solution of an equation
    whose divergence could be integrated. Correct its draws by `refine`, which needs none.

    Attributes:
        velocity: the field of the steps, in evaluation mode.
        source: the law at t = 0.
        spec: the meaning of the weights.
        times: ``(evaluations + 1,)``.
        info: how the map was made; ``info["approximate"]`` is always true.
    """

    velocity: Field
    source: Source
    spec: WeightSpec
    times: Tensor
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """Length of a weight vector."""
        return self.spec.dim

    def pushforward(self) -> Pushforward:
        """Return the map of latent points to weights, as `BayesianModel.transported` takes it.

        Raises:
            ValueError: if the field looks at data.
        """
        return Pushforward.of(self.velocity, self.source, self.spec, self.times, "euler")

    @property
    def gradients_per_draw(self) -> int:
        """Gradients of the likelihood that a draw takes."""
        return (len(self.times) - 1) * self.velocity.gradients

    @checked
    def sample(
        self, n: Count, seed: Seed = 0, *, chunk_size: Count | None = None
    ) -> Tensor:
        """Draw ``(n, dim)`` weights, approximately from the posterior."""
        generator = as_generator(seed, self.source.device)
        x0 = torch.randn(
            n,
            self.dim,
            generator=generator,
            device=self.source.device,
            dtype=self.source.dtype,
        )
        with torch.no_grad():
            return torch.cat(
                [
                    self.source.from_normal(self._carry(rows))
                    for rows in x0.split(chunk_size or default_chunk(x0.device))
                ]
            )

    def _carry(self, x: Tensor) -> Tensor:
        return integrate(
            lambda t, state: (self.velocity(t, state[0]),), (x,), self.times, "euler"
        )[0]

    def save(self, path: str | Path) -> Path:
        """Write the map to an ``.npz`` file without pickle, and no data.

        Read it back with ``bnnflow.load``.
        """
        header = {
            "velocity": self.velocity.describe(),
            "source": self.source.describe(),
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "spec": self.spec.describe(),
            "times": self.times.tolist(),
            "info": self.info,
        }
        if self.velocity.posterior is not None:
            header["fingerprint"] = self.velocity.posterior.model.fingerprint()
        arrays = {
            name: value.cpu().numpy() for name, value in self.velocity.state_dict().items()
        }
        arrays |= self.source.arrays() | rows_looked_at(self.velocity)
        return storage.write(path, "flow-map", 1, json.loads(json.dumps(header)), arrays)

    @classmethod
    def from_file(
        cls,
        header: dict[str, Any],
        arrays: dict[str, np.ndarray],
        model: BayesianModel | None,
    ) -> FlowMap:
        """Build a map from the contents of a file; one that looks at the data needs its model."""
        spec, dtype = WeightSpec.from_description(header["spec"]), dtype_of(header["dtype"])
        check_weights(spec, model)
        own = {
            name: values
            for name, values in arrays.items()
            if name not in (*header["source"]["arrays"], ROWS)
        }
        velocity = restore(header["velocity"], spec, own, dtype)
        source = Source.from_description(header["source"], arrays, dtype, model)
        if velocity.informed:
            if model is None:
                raise ValueError(
                    "a likelihood-informed flow map needs its model: load(path, model)"
                )
            # earlier files have none
            if not model.recognises(header.get("fingerprint", model.fingerprint())):
                raise ValueError("this is not the model that the flow map was made for")
            velocity = velocity.bind(
                WhitenedPosterior(model, source, rows_to_look_at(arrays, model))
            )
        times = torch.tensor(header["times"], dtype=torch.float64)
        if times.dim() != 1 or len(times) < 2:
            raise ValueError(f"the times of a flow map are {tuple(times.shape)}")
        return cls(velocity, source, spec, times, dict(header["info"]))


@checked
def distil(
    flow: Flow,
    evaluations: Count = 6,
    *,
    trajectories: Count = 4096,
    training: Training | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> FlowMap:
    """Learn the flow's map between fixed times, starting from its own field: progressive steps in
    one go.

    Solves the flow once from ``trajectories`` starts and regresses each step of the map on where
    the solution went: unlike flow matching this has no noise in its targets, so that what remains
    is what the network cannot represent (Salimans and Ho 2022 and Boffi et al. 2024 learn such
    maps).

    Args:
        flow: a trained flow whose field can be trained.
        evaluations: steps of the map, one evaluation each.
        trajectories: number of solutions.
        training: how long and how fast; by default 120 seconds, with AdamW at a learning rate of
            1e-3.
        seed: an int or a generator.
        progress: show a bar at a terminal.

    Raises:
        ValueError: if there is nothing to train in the flow's field, or no step or trajectory.
    """
    if next(flow.velocity.parameters(), None) is None:
        raise ValueError(f"a {flow.velocity._get_name()} has no parameters to train")
    generator = as_generator(seed, flow.source.device)
    times = time_grid(evaluations, device=flow.source.device)
    walks = _walks(flow, flow.start(trajectories, generator), times)

    def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(walks), (n,), generator=generator, device=walks.device)
        return walks[rows, 0], walks[rows].flatten(1)

    student = (
        copy.deepcopy(flow.velocity.bind(None))
        .requires_grad_()
        .bind(flow.velocity.posterior)
    )
    grid = _Grid(times, walks.shape[-1])
    training = (training or Training()).with_defaults(1e-3, "adamw")
    _, info = train(
        student,
        pairs,
        path=grid,
        times=grid,
        training=training,
        seed=generator,
        progress=progress,
    )
    info |= {"approximate": True, "evaluations": evaluations, "trajectories": trajectories}
    return FlowMap(student, flow.source, flow.spec, times, info)


def _walks(flow: Flow, x0: Tensor, times: Tensor) -> Tensor:
    """Return where the flow is at the given times, ``(n, times, dim)``, solved with at least its
    own steps.
    """
    steps = len(flow.solver.grid("cpu")) - 1
    between = max(1, -(-steps // (len(times) - 1)))
    part = torch.linspace(0, 1, between + 1, dtype=times.dtype, device=times.device)
    walks = []
    with torch.no_grad():
        for rows in x0.split(2048):
            walk = [rows]
            for start, stop in itertools.pairwise(times):
                between_times = start + (stop - start) * part
                walk += integrate(
                    lambda t, state: (flow.velocity(t, state[0]),),
                    (walk[-1],),
                    between_times,
                    flow.solver.rule,
                )
            walks.append(torch.stack(walk, 1))
    return torch.cat(walks)


@dataclass(frozen=True)
class _Grid(ProbabilityPath):
    """The steps of the map as a path: the pair's second end holds the whole walk,
    ``(batch, times * dim)``.
    """

    times: Tensor
    dim: int

    def sample(self, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the times at which steps begin, ``(n,)``."""
        which = torch.randint(
            len(self.times) - 1, (n,), generator=generator, device=like.device
        )
        return self.times[which].to(like.dtype)

    def point(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return where each step begins and its slope, ``(batch, dim)`` both."""
        walk = x1.unflatten(-1, (len(self.times), self.dim))
        which = (t.unsqueeze(-1) - self.times.to(t)).abs().argmin(-1)
        rows = torch.arange(len(t), device=t.device)
        here, there = walk[rows, which], walk[rows, which + 1]
        return here, (there - here) / (self.times[which + 1] - self.times[which]).to(
            t
        ).unsqueeze(-1)
