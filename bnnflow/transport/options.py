"""The options of log densities along a flow: what a caller may say, and what a solve is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from bnnflow.arguments import Count
from bnnflow.seeding import as_generator
from bnnflow.transport.divergence import probe_noise
from bnnflow.types import Noise, Seed, Solver, Trace

__all__ = ["DensityOptions", "SampleOptions", "Steps", "Tracing", "together"]

Steps = Count | Sequence[float] | Tensor
"""How many steps a solver takes, or the times between them, from 0 to 1."""


def together(device: torch.device) -> int:
    """Return how many draws travel together unless said otherwise: what fits into the caches of a CPU."""
    return 256 if device.type == "cpu" else 4096


class SampleOptions(TypedDict, total=False):
    """Options of draws with their log densities, whose seed is that of the draws; see `DensityOptions`."""

    trace: Trace
    probes: Count
    noise: Noise
    steps: Steps | None
    solver: Solver | None
    chunk_size: Count
    progress: bool


class DensityOptions(SampleOptions, total=False):
    """Keyword arguments of everything that returns a log density along a flow; all may be left out.

    Attributes:
        trace: ``"exact"``, by default: the field's own trace if it has one, else dim reverse-mode products an
            evaluation. ``"hutchinson"`` and ``"hutch++"`` are unbiased for the log density (not for the density) and
            cost ``probes`` products.
        probes: number of random probes, whose estimates are averaged; 8 by default.
        noise: their law; ``"rademacher"``, by default, has never the larger variance for a symmetric Jacobian.
        seed: of the probes, which stay fixed along a path; 0 by default.
        steps: n of them mean 2 n evaluations of the divergence, at the nodes of the rule of Gauss and Legendre, and a
            step of the solver from each to the next; up to four times as many for draws on whose way it is rough.
            Times of one's own, or a solver that chooses them, integrate the divergence along with the state, at every
            evaluation. By default the flow's own.
        solver: its rule; by default the flow's own.
        chunk_size: points that travel together, which bounds the memory; 512 by default.
        progress: show a bar at a terminal that says how long it will take, if that is more than some seconds. ``True``
            by default in ``log_prob`` and ``sample_with_log_prob`` of a `Flow`, else ``False``.
    """

    seed: Seed


@dataclass(frozen=True)
class Tracing:
    """The values of `DensityOptions`, and the defaults."""

    trace: Trace = "exact"
    probes: int = 8
    noise: Noise = "rademacher"
    seed: Seed = 0
    steps: Steps | None = None
    solver: Solver | None = None
    chunk_size: int = 512
    progress: bool = False

    def on(self, device: torch.device) -> Tracing:
        """Return the same with one stream of random numbers for all chunks."""
        return replace(self, seed=as_generator(self.seed, device))

    def draw(self, x: Tensor) -> Tensor | None:
        """Draw the probes of one solve, ``(probes, batch, dim)``; None if the trace needs none."""
        if self.trace == "exact":
            return None
        return probe_noise(self.noise, self.probes, x, as_generator(self.seed, x.device))
