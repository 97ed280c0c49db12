"""The manifold of networks whose scales are normalised: a unit sphere for every unit with a scale,
the rest flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bnnflow.arguments import Count, checked
from bnnflow.seeding import as_generator
from bnnflow.symmetry.canonical import normalise_scale, scale_tensors
from bnnflow.types import Seed
from bnnflow.weights import WeightSpec

__all__ = ["Spheres"]


@checked
@dataclass(frozen=True, eq=False)
class Spheres:
    """The product of the unit spheres and the flat space that `normalise_scale` maps networks to.

    What enters a unit of a homogeneous activation, its bias included, is a point of one sphere; all
    other weights are flat (Pittorino et al. 2022, "Deep Networks on Toroids"). Points ``x`` and
    tangent vectors ``v`` keep the layout of the weights, ``(..., dim)``, and the metric is that of
    the space around. Permutations of hidden units are isometries of the manifold. Where there is no
    scale symmetry all is flat.

    Args:
        spec: what the entries mean.

    Raises:
        ValueError: if a unit has one incoming weight only: its sphere would be two points; if the
            symmetries are not known.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> spheres = Spheres(WeightSpec.of(net))
        >>> spheres.dim, spheres.units, spheres.dim_manifold
        (131, 16, 115)
    """

    spec: WeightSpec

    def __post_init__(self) -> None:
        for label, sizes in self.by_label(self.sizes).items():
            if bool((sizes < 2).any()):
                raise ValueError(
                    f"units of {label} have one incoming weight, which is a sign and "
                    "no point of a sphere"
                )

    @cached_property
    def owner(self) -> Tensor:
        """The sphere of each weight, ``(dim,)``; that of flat weights is ``units``."""
        parts = {
            name: torch.full((math.prod(self.spec.shapes[name]),), self.units)
            for name in self.spec.names
        }
        first = 0
        for label, names in scale_tensors(self.spec).items():
            width = self.spec.widths[label]
            for name in names:
                shape, written = self.spec.unit_axes(name)[0], self.spec.written(name)
                numbers = torch.arange(first, first + width).reshape(
                    -1, *(1,) * (len(shape) - written - 1)
                )
                parts[name] = numbers.expand(shape).flatten()
            first += width
        return torch.cat(list(parts.values()))

    @cached_property
    def _widths(self) -> dict[str, int]:
        """Number of spheres of each hidden layer that has some, in the order of depth."""
        return {label: self.spec.widths[label] for label in scale_tensors(self.spec)}

    @property
    def units(self) -> int:
        """Number of spheres."""
        return sum(self._widths.values())

    @cached_property
    def sizes(self) -> Tensor:
        """Number of incoming weights of each unit, ``(units,)``.

        Its sphere has one dimension less.
        """
        return self.owner.bincount(minlength=self.units + 1)[:-1]

    @property
    def dim(self) -> int:
        """Length of a point."""
        return self.spec.dim

    @property
    def dim_manifold(self) -> int:
        """Dimension of the manifold."""
        return self.dim - self.units

    @cached_property
    def _owner_on(self) -> Callable[[torch.device], Tensor]:
        return cache(self.owner.to)

    @cached_property
    def _axes_on(self) -> Callable[[torch.device], Tensor]:
        """Indicators of the first and of the second weight of every sphere, ``(2, dim)``."""
        axes = torch.zeros(2, self.dim)
        order = self.owner.argsort(stable=True)
        first = self.sizes.cumsum(0) - self.sizes
        axes[0, order[first]] = axes[1, order[first + 1]] = 1.0
        return cache(axes.to)

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner products on every sphere, ``(..., units + 1)``.

        That of the flat part is zero.
        """
        product = a * b
        sums = product.new_zeros(*product.shape[:-1], self.units + 1)
        return F.pad(
            sums.index_add(-1, self._owner_on(product.device), product)[..., :-1], (0, 1)
        )

    def each(self, values: Tensor) -> Tensor:
        """Give every weight the value of its sphere, ``(..., units + 1)`` to ``(..., dim)``."""
        return values.index_select(-1, self._owner_on(values.device))

    # ---------------------------------------- points

    @checked
    def project(self, theta: Tensor) -> Tensor:
        """Return the points of networks, whose functions they keep; see `normalise_scale`.

        A unit without incoming weights has no point. In a chain it is dead, and gets equal ones,
        which nothing reads.

        Raises:
            ValueError: if there is such a unit in a network that is no chain, where others may
                write to it later.
        """
        x = normalise_scale(theta, self.spec)
        dead = self.inner(x, x)[..., :-1] == 0  # (..., units)
        if not bool(dead.any()):
            return x
        if not self.spec.layers:
            raise ValueError(
                "a unit has no incoming weights, and so no point on its sphere"
            )
        halved = (
            self.spec.rescale(
                torch.ones_like(x), self.by_label(torch.where(dead, 2.0, 1.0))
            )
            < 1
        )
        equal = F.pad(torch.where(dead, self.sizes.to(x).rsqrt(), 0.0), (0, 1))
        # Units that read nothing but dead ones are dead, too.
        return self.project(torch.where(halved, 0.0, x) + self.each(equal))

    def by_label(self, values: Tensor) -> dict[str, Tensor]:
        """Split values of all units with a sphere, ``(..., units)``, by hidden layer."""
        return dict(
            zip(self._widths, values.split(list(self._widths.values()), -1), strict=True)
        )

    def retract(self, x: Tensor) -> Tensor:
        """Divide the weights of each sphere by their norm, and leave all others: the nearest point,
        not the network.
        """
        square = self.inner(x, x)
        return x * self.each(torch.where(square > 0, square, 1.0).rsqrt())

    @checked
    def sample(
        self,
        n: Count,
        seed: Seed = 0,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw ``(n, dim)``: uniform on the spheres, standard normal on the rest."""
        generator = as_generator(seed, device)
        return self.retract(
            torch.randn(
                n, self.dim, generator=generator, device=generator.device, dtype=dtype
            )
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density of `sample`, with respect to the volume of the manifold, ``(...)``
        in float64.
        """
        half = self.sizes.double() / 2
        area = (math.log(2) + half * math.log(math.pi) - torch.lgamma(half)).sum()
        flat = x.double().square() * (self._owner_on(x.device) == self.units)
        free = self.dim - int(self.sizes.sum())
        return -0.5 * flat.sum(-1) - 0.5 * free * math.log(2 * math.pi) - float(area)

    # ---------------------------------------- tangent vectors and geodesics

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the part of ``v`` that is tangent at ``x``."""
        return v - self.each(self.inner(x, v)) * x

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow the geodesic from ``x`` with velocity ``v`` for unit time."""
        cosine, sinc, _ = _circle(self.inner(v, v))
        return self.retract(self.each(cosine) * x + self.each(sinc) * v)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the velocity that takes ``x`` to ``y`` on the shortest path in unit time.

        Values and gradients are finite everywhere. Between opposite points all directions are as
        short: the path goes by the first incoming weight of the unit, or the second where ``x`` is
        close to the first.
        """
        x, y = torch.broadcast_tensors(x, y)
        difference = y - x
        cosine = 1 + self.inner(x, difference)  # 1 on the flat part
        # again, for opposite points leave nothing but rounding
        across = self.tangent(x, self.tangent(x, difference))
        square = self.inner(across, across)
        opposite = (cosine < 0) & (square < (32 * torch.finfo(x.dtype).eps) ** 2)
        first, second = self._axes_on(x.device).to(x)
        beside = torch.where(self.each(self.inner(x, first * x)) < 0.5, first, second)
        beside = self.retract(self.tangent(x, beside)) * (
            self._owner_on(x.device) < self.units
        )
        direction = torch.where(self.each(opposite), beside, across)
        return direction * self.each(
            torch.where(opposite, math.pi, _angle_over_sine(cosine, square, opposite))
        )

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the length of the shortest path, ``(...)``."""
        return self.log(x, y).norm(dim=-1)

    def geodesic(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the shortest path from ``x0`` to ``x1`` is at times ``t`` ``(...)``, and its
        velocity there.
        """
        v, t = self.log(x0, x1), t.unsqueeze(-1)
        speed2 = self.inner(v, v)
        cosine, sinc, _ = _circle(t * t * speed2)
        point = self.retract(self.each(cosine) * x0 + self.each(t * sinc) * v)
        return point, self.tangent(
            point, self.each(cosine) * v - self.each(t * speed2 * sinc) * x0
        )

    def log_velocity(self, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        """Return how fast log(x, y) changes when y = exp(x, w) moves with velocity ``v``.

        The inverse of the differential of exp at ``w``, for ``w`` shorter than pi on every sphere:
        a curve on the manifold becomes one in the tangent space at ``x``, where any solver can
        follow it.
        """
        _, sinc, bend = _circle(self.inner(w, w))
        radial = self.inner(x, v)
        return self.each(1 / sinc) * (
            v - self.each(radial) * x - self.each(radial * bend / sinc) * w
        )


def _angle_over_sine(cosine: Tensor, square: Tensor, opposite: Tensor) -> Tensor:
    """Return a / sin a for angles with this cosine and square of the sine, but where they are
    opposite.
    """
    near = (cosine > 0) & (square < 0.01 * cosine * cosine)
    one = torch.ones_like(square)
    safe = torch.where(near, cosine, one)
    series = (
        _series(
            torch.where(near, square, 0.0) / (safe * safe),
            [(-1) ** k / (2 * k + 1) for k in range(9)],
        )
        / safe
    )
    sine = torch.where(near | opposite, one, square).sqrt()
    return torch.where(near, series, torch.atan2(sine, cosine) / sine)


def _circle(square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cos a, sin(a) / a and (sin a - a cos a) / a^3 for squares of angles, smooth down to
    zero.
    """
    near = square < 0.1
    small = torch.where(near, square, 0.0)
    sinc = _series(small, [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)])
    bend = _series(
        small, [(-1) ** k * (2 * k + 2) / math.factorial(2 * k + 3) for k in range(8)]
    )
    large = torch.where(near, 1.0, square)
    angle = large.sqrt()
    far_cosine, far_sinc = angle.cos(), angle.sin() / angle
    return (
        torch.where(near, sinc - small * bend, far_cosine),
        torch.where(near, sinc, far_sinc),
        torch.where(near, bend, (far_sinc - far_cosine) / large),
    )


def _series(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total
