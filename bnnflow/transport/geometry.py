"""Transport on the manifold of networks whose scales are normalised: paths along geodesics, and
tangent fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnflow.arguments import Count, checked
from bnnflow.equivariant import DWSNet, Wiring
from bnnflow.symmetry import Spheres
from bnnflow.transport.field import Field
from bnnflow.transport.paths import ProbabilityPath
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["RiemannianPath", "TangentVelocity"]


@checked
@dataclass(frozen=True)
class RiemannianPath(ProbabilityPath):
    """The geodesic from x0 to x1 at constant speed (Chen and Lipman 2024).

    On the flat part this is the linear path.

    Args:
        spheres: the manifold that both ends are on.
    """

    spheres: Spheres

    def point(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return where each pair is at its time and its velocity there, ``(batch, dim)`` both, for
        t ``(batch,)``.
        """
        return self.spheres.geodesic(x0, x1, t)


@checked
class TangentVelocity(Field):
    """A field on the manifold that sees weights and time only: a `DWSNet`, projected to the tangent
    space.

    Equivariant to permutations of hidden units, which are isometries of the manifold and keep the
    tangent spaces.

    Args:
        spec: a chain of layers, or a residual network.
        width: channels of the network.
        depth: blocks of the network.
    """

    def __init__(self, spec: WeightSpec, width: Count = 64, depth: Count = 4) -> None:
        super().__init__()
        self.spheres = Spheres(spec)
        self._config = {"width": width, "depth": depth}
        self.symmetries = Symmetries(frozenset(spec.widths), frozenset(), frozenset())
        self.net = DWSNet(spec, 1, 1, width, depth, time=True, wiring=Wiring(heads=0))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity at points of the manifold, ``(batch, dim)``."""
        change = self.net(x.unsqueeze(-1), t.expand(len(x)).to(x)).squeeze(-1)
        return self.spheres.tangent(x, change)

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the module is rebuilt."""
        return {"kind": "tangent"} | self._config
