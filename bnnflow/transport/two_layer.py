"""A field with two hidden layers over the flat weights, whose trace costs one matrix-vector
product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnnflow.arguments import Count, checked
from bnnflow.equivariant.network import TimeEmbedding
from bnnflow.transport.field import Field
from bnnflow.transport.paths import AffinePath
from bnnflow.weights import NO_SYMMETRY

__all__ = ["TwoLayerVelocity"]


@checked
class TwoLayerVelocity(Field):
    """A plain network with an exact trace, for small unimodal posteriors: align the draws first.

    v = base(t, x) + W3 s(u2) + c, with u2 = g2 o W2 s(u1) + b, u1 = g1 o W1 x + a, s = tanh, and a,
    b, c, g1, g2 functions of time. The Jacobian of the network is W3 diag(s'(u2) g2) W2 diag(s'(u1)
    g1) W1, so that its trace is (s'(u2) g2)^T [W2 o (W1 W3)^T] (s'(u1) g1): one product with a
    matrix that does not depend on x, whatever the dimension. The network is bounded, which keeps a
    solver accurate far from the data too; with an unbounded activation maximum likelihood learns
    errors of the solver. W3 and c start at zero, so that the untrained field is its base. It keeps
    no symmetry.

    Args:
        dim: length of a weight vector.
        width: units of each hidden layer.
        base: a field with a closed divergence, such as a `GaussianVelocity`, which is not trained;
            by default that of a target that equals the source.
        path: the path of the pairs; that of the base if there is one.

    Raises:
        ValueError: if the base does not know its trace.
    """

    def __init__(
        self,
        dim: Count,
        width: Count = 256,
        *,
        base: Field | None = None,
        path: AffinePath | None = None,
    ) -> None:
        super().__init__()
        if base is not None and not base.has_closed_divergence:
            raise ValueError(
                f"the base must know its trace, and {type(base).__name__} has no closed divergence"
            )
        self.dim, self.width = dim, width
        self.symmetries = NO_SYMMETRY
        self.path = base.path if base is not None else path or AffinePath()
        self.base = None if base is None else base.requires_grad_(False)
        self.inner = nn.Linear(dim, width, bias=False)
        self.middle = nn.Linear(width, width, bias=False)
        self.outer = nn.Linear(width, dim, bias=False)
        self.time = TimeEmbedding(64)
        self.modulate = nn.Linear(64, 4 * width + dim)
        for parameter in (self.outer.weight, *self.modulate.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``."""
        g1, a, g2, b, c = self._times(t, x)
        h1 = torch.tanh(g1 * self.inner(x) + a)
        h2 = torch.tanh(g2 * self.middle(h1) + b)
        return self._base(t, x)[0] + self.outer(h2) + c

    def closed_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity and its divergence ``(batch,)`` in float64."""
        g1, a, g2, b, c = self._times(t, x)
        h1 = torch.tanh(g1 * self.inner(x) + a)
        h2 = torch.tanh(g2 * self.middle(h1) + b)
        # (width, width)
        loops = self.middle.weight * (self.inner.weight @ self.outer.weight).T
        trace = ((g2 * (1 - h2 * h2)) @ loops * (g1 * (1 - h1 * h1))).sum(
            -1, dtype=torch.float64
        )
        velocity, known = self._base(t, x)
        return velocity + self.outer(h2) + c, known + trace

    def _times(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Return what depends on time alone, for one time or for the batch."""
        values = self.modulate(self.time(t.to(x.dtype).reshape(-1)))
        g1, a, g2, b, c = values.split([self.width] * 4 + [self.dim], -1)
        return 1 + g1, a, 1 + g2, b, c

    def _base(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.base is not None:
            return self.base.closed_divergence(t, x)
        rest = self.path.coefficients(t.double().expand(len(x))).drift  # (batch,)
        return rest.to(x.dtype).unsqueeze(-1) * x, self.dim * rest

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the module is rebuilt."""
        base = None if self.base is None else self.base.describe()
        return {
            "kind": "two_layer",
            "dim": self.dim,
            "width": self.width,
            "base": base,
            "path": self.path.describe(),
        }
