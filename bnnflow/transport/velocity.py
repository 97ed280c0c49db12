"""Velocity fields from N(0, I) to a posterior in the prior's standard normal coordinates.

A field is an ``nn.Module`` called as ``field(t, x)`` with ``t`` a scalar or ``(batch,)`` and ``x`` ``(batch, dim)``.
Ours declare the symmetries that they are equivariant to as ``group``. One that looks at the data also has a ``context``
and a ``bind`` that sets it; the binding is never part of the module's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnnflow.equivariant import DWSNet
from bnnflow.equivariant.network import TimeEmbedding
from bnnflow.transport.coordinates import Context
from bnnflow.transport.displacement import Displacement, GaussNewton, GradientSteps
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["GaussianVelocity", "InformedVelocity", "WeightsVelocity", "bound", "rebuild"]


def _permutations(spec: WeightSpec) -> Symmetries:
    return Symmetries(frozenset(spec.widths), frozenset(), frozenset())


def _times(t: Tensor, x: Tensor) -> Tensor:
    return t.expand(x.shape[0]).to(x.dtype)


class WeightsVelocity(nn.Module):
    """A field that sees weights and time only: the prior's own field plus a `DWSNet`.

    v = (2t - 1) / q x + net(t, x). The first term is the exact field of a posterior that equals the prior. Costs no
    gradient of the likelihood, whatever the size of the data. Equivariant to permutations of hidden units.

    Args:
        spec: a chain of layers.
        width: channels of the network.
        depth: blocks of the network.
    """

    def __init__(self, spec: WeightSpec, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.spec = spec
        self.group = _permutations(spec)
        self._config = {"width": width, "depth": depth}
        self.net = DWSNet(spec, 1, 1, width, depth, time=True, heads=0)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``."""
        t = _times(t, x)
        q = t * t + (1 - t) ** 2
        return ((2 * t - 1) / q).unsqueeze(-1) * x + self.net(x.unsqueeze(-1), t).squeeze(-1)

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the module is rebuilt."""
        return {"kind": "weights"} | self._config


class InformedVelocity(nn.Module):
    """The likelihood-informed field: the prior's own field, the pull of the data, and a learned correction.

    For independent pairs the exact marginal field is v = (2t - 1) / q x + (1 - t) / q E[grad u(x1) | x_t]. The drive
    w of a `Displacement` stands for the expectation, and a `DWSNet` that sees x, the displacement and the gradient
    learns what is missing: v = (2t - 1) / q x + (1 - t) / q c(t) w + net(t, x, s w / (1 + 0.05 / s), asinh(s^2 grad)),
    finite at t = 1. Untrained (c = 1, net = 0) it is a sampler of its own. Equivariant to permutations of hidden units.

    Args:
        spec: a chain of layers.
        displacement: `GradientSteps` or `GaussNewton`.
        width: channels of the network.
        depth: blocks of the network.
    """

    def __init__(
        self, spec: WeightSpec, displacement: Displacement | None = None, width: int = 64, depth: int = 4
    ) -> None:
        super().__init__()
        self.spec = spec
        self.group = _permutations(spec)
        self.displacement = displacement if displacement is not None else GradientSteps()
        self._config = {"width": width, "depth": depth}
        self.net = DWSNet(spec, 3, 1, width, depth, time=True, heads=0)
        self.time = TimeEmbedding(width)
        self.trust = nn.Linear(width, 1)
        nn.init.zeros_(self.trust.weight)
        nn.init.ones_(self.trust.bias)
        self.context: Context | None = None

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``.

        Raises:
            RuntimeError: if the field is not bound to a context.
        """
        if self.context is None:
            raise RuntimeError("a likelihood-informed velocity must be bound to a model first")
        t = _times(t, x)
        q = (t * t + (1 - t) ** 2).unsqueeze(-1)
        rest = (1 - t).unsqueeze(-1)
        s2 = rest * rest / q
        drive = self.displacement(self.context, x * t.unsqueeze(-1) / q, s2)
        features = [x, s2 * drive.w / (s2.sqrt() + 0.05), torch.asinh(s2 * drive.grad)]
        prior = (2 * t.unsqueeze(-1) - 1) / q * x
        pull = rest / q * self.trust(self.time(t)) * drive.w
        return prior + pull + self.net(torch.stack(features, -1), t).squeeze(-1)

    def bind(self, context: Context | None) -> InformedVelocity:
        """Return the same field, sharing its weights, with the pull of another model, or of none."""
        if context is not None and context.dim != self.spec.dim:
            raise ValueError(f"the field is for {self.spec.dim} weights, the model has {context.dim}")
        other = object.__new__(InformedVelocity)
        other.__dict__ = self.__dict__ | {"context": context}
        return other

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the module is rebuilt."""
        displacement = {"kind": type(self.displacement).__name__} | vars(self.displacement)
        return {"kind": "informed", "displacement": displacement} | self._config


class GaussianVelocity(nn.Module):
    """The closed-form field from N(0, I) to N(mean, covariance) along independent pairs.

    v = mean + (t C - (1 - t) I) (t^2 C + (1 - t)^2 I)^-1 (x - t mean), by the eigenvectors of C.

    Args:
        mean: ``(dim,)``.
        covariance: ``(dim, dim)``.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.mean: Tensor
        self.variances: Tensor
        self.vectors: Tensor
        variances, vectors = torch.linalg.eigh(covariance)
        self.group = Symmetries(frozenset(), frozenset(), frozenset())
        for name, value in {"mean": mean, "variances": variances, "vectors": vectors}.items():
            self.register_buffer(name, value)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``."""
        t = _times(t, x).unsqueeze(-1)
        gain = (t * self.variances - (1 - t)) / (t * t * self.variances + (1 - t) ** 2)
        return self.mean + ((x - t * self.mean) @ self.vectors * gain) @ self.vectors.T


def bound(velocity: nn.Module, context: Context | None) -> nn.Module:
    """Return the field bound to a context; a field that looks at no data is returned itself."""
    bind = getattr(velocity, "bind", None)
    return velocity if bind is None else bind(context)


def rebuild(description: dict[str, Any], spec: WeightSpec) -> WeightsVelocity | InformedVelocity:
    """Build an untrained field from what ``describe`` returned."""
    values = dict(description)
    kind = values.pop("kind")
    if kind == "weights":
        return WeightsVelocity(spec, **values)
    if kind == "informed":
        displacement = dict(values.pop("displacement"))
        families: dict[str, Callable[..., Displacement]] = {"GradientSteps": GradientSteps, "GaussNewton": GaussNewton}
        return InformedVelocity(spec, families[displacement.pop("kind")](**displacement), **values)
    raise ValueError(f"unknown velocity {kind!r}")
