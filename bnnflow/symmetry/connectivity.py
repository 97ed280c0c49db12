"""Mode connectivity: what the loss does on the way from one network to another.

A way is a `Path`: a straight line or a low-loss curve in weight space (`Curve`), or the shortest
way on the manifold of networks whose scales are normalised (`Geodesic`). All are batched over pairs
of networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bnnflow.arguments import Count, NonNegative, Positive, checked, shaped
from bnnflow.inference.start import Adam, cosine
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator
from bnnflow.symmetry.spheres import Spheres
from bnnflow.types import Seed
from bnnflow.weights import WeightSpec

__all__ = [
    "Barrier",
    "Curve",
    "Geodesic",
    "Path",
    "Plane",
    "barrier",
    "barrier_along",
    "fit_curve",
    "loss_plane",
]

Loss = Callable[[Tensor], Tensor]
"""Networks to losses, ``(..., dim) -> (...)``, such as
``lambda theta: -model.log_likelihood(theta) / n``.

A model's buffers are those of one network. For networks with running statistics of their own take a
`NetworkLoss`.
"""


class Path(Protocol):
    """A way from one network to another, or many ways at once."""

    def at(self, t: Tensor) -> Tensor:
        """Return the networks at times ``(points,)`` in [0, 1], ``(..., points, dim)``."""
        ...


class Barrier(NamedTuple):
    """The losses along a path, and by how much they exceed the straight line between the losses of
    its ends.

    Attributes:
        t: ``(points,)``, times from 0 to 1.
        losses: ``(..., points)``.
        midpoint: ``(...)``, the loss halfway.
        maximum: ``(...)``, the largest excess, at least 0: the barrier.
        area: ``(...)``, the integral of the excess over t, negative where the path dips below its
            ends.
    """

    t: Tensor
    losses: Tensor
    midpoint: Tensor
    maximum: Tensor
    area: Tensor


@checked
@dataclass(frozen=True, eq=False)
class Curve:
    """Curves through weight space, linear in their control points.

    Attributes:
        control: ``(..., k, dim)``, the ends and, between them, the bends.
        kind: ``"bezier"``, which its bends attract, or ``"chain"``, straight from bend to bend.
            With two control points both are the line.
    """

    control: Tensor
    kind: Literal["bezier", "chain"] = "bezier"

    def __post_init__(self) -> None:
        if (
            self.control.dim() < 2
            or self.control.shape[-2] < 2
            or self.control.shape[-1] == 0
        ):
            raise ValueError(
                f"control must be (..., two or more points, dim), got {tuple(self.control.shape)}"
            )

    def weights(self, t: Tensor) -> Tensor:
        """Return what each control point contributes at times ``t`` ``(...)``, ``(..., k)``.

        They sum to 1.
        """
        degree = self.control.shape[-2] - 1
        t, index = (
            t.to(self.control).unsqueeze(-1),
            torch.arange(degree + 1, device=self.control.device),
        )
        if self.kind == "chain":
            return (1 - (t * degree - index).abs()).clamp(min=0)
        binomial = torch.tensor([math.comb(degree, i) for i in range(degree + 1)]).to(t)
        return binomial * t**index * (1 - t) ** (degree - index)

    @checked
    def at(self, t: Tensor) -> Tensor:
        """Return the networks at times ``(points,)``, or ``(..., points)`` for times of each pair's
        own.
        """
        # (..., points, dim)
        return self.weights(shaped("t", t.to(self.control), None, lead=True)) @ self.control


@checked
class Geodesic:
    """Shortest paths between networks whose scales are normalised (Pittorino et al. 2022, "Deep
    Networks on Toroids").

    What enters a unit of a homogeneous activation lives on a sphere once its norm is 1, and goes
    along a great circle at constant speed. All other weights, those of the output layer among them,
    go straight.

    Args:
        theta_a: the starts, ``(..., dim)``. Their scales are normalised here, which keeps their
            functions.
        theta_b: the ends.
        spec: what the entries mean.

    Raises:
        ValueError: if no unit has a scale, or the symmetries are not known.
    """

    def __init__(self, theta_a: Tensor, theta_b: Tensor, spec: WeightSpec) -> None:
        shaped("theta_a", theta_a, spec.dim, lead=True)
        shaped("theta_b", theta_b, spec.dim, lead=True)
        self._spheres = Spheres(spec)
        if not self._spheres.units:
            raise ValueError(
                "spec has no hidden layer with a scale symmetry: take the straight line"
            )
        self.start = self._spheres.project(theta_a)
        self._velocity = self._spheres.log(self.start, self._spheres.project(theta_b))

    @checked
    def at(self, t: Tensor) -> Tensor:
        """Return the networks at times ``(points,)``, ``(..., points, dim)``."""
        t = shaped("t", t.to(self.start), None).unsqueeze(-1)
        return self._spheres.exp(self.start.unsqueeze(-2), t * self._velocity.unsqueeze(-2))


@checked
def barrier(theta_a: Tensor, theta_b: Tensor, loss: Loss, *, points: Count = 25) -> Barrier:
    """Measure the loss barrier on the straight line between networks (Frankle et al. 2020).

    Copies of one network under its symmetries have barriers between them. What is measured is an
    upper bound on the barrier modulo symmetry: match the networks first (`match`) for a closer one.
    Of a network whose symmetries are not known no closer one can be had.

    Args:
        theta_a: ``(..., dim)``.
        theta_b: ``(..., dim)``, broadcast against ``theta_a``.
        loss: ``(..., dim) -> (...)``.
        points: on the line, ends included; an odd number.

    Raises:
        ValueError: if the networks do not broadcast, or points is even or below 3.

    Example:
        >>> ends = torch.tensor([[-1.0], [1.0]])
        >>> double_well = lambda theta: (theta**2 - 1).square().squeeze(-1)
        >>> found = barrier(*ends, double_well)
        >>> float(found.midpoint), float(found.maximum)
        (1.0, 1.0)
    """
    return barrier_along(Curve(_ends(theta_a, theta_b)), loss, points=points)


@checked
def barrier_along(path: Path, loss: Loss, *, points: Count = 25) -> Barrier:
    """Measure the loss along any path; as `barrier`."""
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and at least 3, got {points}")
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    with torch.no_grad():
        # A few points at once: all activations of all pairs and points together need not fit into
        # memory.
        # (..., points)
        losses = torch.cat([_losses(loss, path.at(few)) for few in t.split(5)], -1)
    t = t.to(losses)
    excess = losses - torch.lerp(losses[..., :1], losses[..., -1:], t)
    return Barrier(
        t,
        losses,
        losses[..., points // 2],
        excess.amax(-1).clamp(min=0),
        torch.trapezoid(excess, t),
    )


def _ends(theta_a: Tensor, theta_b: Tensor) -> Tensor:
    """Return both ends, ``(..., 2, dim)``, in the narrower of their types."""
    theta_a, theta_b = _alike(theta_a=theta_a, theta_b=theta_b)
    of = f"{tuple(theta_a.shape)} and {tuple(theta_b.shape)}"
    shapes = f"theta_a and theta_b of shapes {of} do not pair"
    if theta_a.shape[-1:] != theta_b.shape[-1:]:
        raise ValueError(shapes)
    try:
        return torch.stack(torch.broadcast_tensors(theta_a, theta_b), -2)
    except RuntimeError as error:
        raise ValueError(shapes) from error


def _alike(**networks: Tensor) -> list[Tensor]:
    """Return networks in the narrowest of their types, finite in it: lists and arrays come as
    float64.
    """
    for name, theta in networks.items():
        if not theta.is_floating_point():
            raise TypeError(f"{name} must hold floating-point numbers, got {theta.dtype}")
    like = min(networks.values(), key=lambda theta: theta.element_size())
    alike = {name: theta.to(like) for name, theta in networks.items()}
    for name, theta in alike.items():
        if not bool(theta.isfinite().all()):
            raise ValueError(f"{name} holds weights that are NaN or infinite")
    return list(alike.values())


def _losses(loss: Loss, theta: Tensor) -> Tensor:
    """Return the losses of networks ``(..., dim)``, ``(...)``, checked."""
    losses = loss(theta)
    if not isinstance(losses, Tensor) or losses.shape != theta.shape[:-1]:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss must map (..., dim) to (...), got {got} for {tuple(theta.shape)}"
        )
    return losses


@checked
def fit_curve(
    theta_a: Tensor,
    theta_b: Tensor,
    loss: Loss,
    *,
    kind: Literal["bezier", "chain"] = "bezier",
    bends: Count = 1,
    steps: Count = 300,
    learning_rate: Positive = 0.02,
    samples: Count = 4,
    seed: Seed = 0,
    progress: bool = True,
) -> Curve:
    """Find curves of low loss between networks (Garipov et al. 2018), all pairs at once.

    Minimises the expected loss at a uniform time over the bends, by Adam from evenly spaced points
    of the line; the ends stay. One bend of a Bezier curve is the quadratic one of the paper, one of
    a chain its polygonal chain.

    Args:
        theta_a: ``(..., dim)``.
        theta_b: ``(..., dim)``, broadcast against ``theta_a``.
        loss: ``(..., dim) -> (...)``, differentiable; it may be a random mini-batch's.
        kind: of curve, see `Curve`.
        bends: control points between the ends.
        steps: of Adam; a cosine takes the learning rate to zero.
        learning_rate: its first value.
        samples: times a step for each pair, one uniform in each of as many equal stretches of [0,
            1].
        seed: source of the times.
        progress: whether to show a bar.

    Raises:
        ValueError: if the networks do not broadcast, or a count is below 1.
    """
    ends = _ends(theta_a, theta_b).detach()
    generator = as_generator(seed, ends.device)
    # (..., bends, dim)
    inner = Curve(ends).at(torch.linspace(0, 1, bends + 2, dtype=torch.float64)[1:-1])
    adam = Adam(inner)
    stretches = torch.arange(samples, device=ends.device)
    with progress_bar(steps, "curve", progress, "step") as bar:
        for step in range(1, steps + 1):
            curve = Curve(torch.cat([ends[..., :1, :], inner, ends[..., 1:, :]], -2), kind)
            jitter = torch.rand(
                *ends.shape[:-2], samples, generator=generator, device=ends.device
            )
            weights = curve.weights((stretches + jitter) / samples)  # (..., samples, k)
            theta = (weights @ curve.control).requires_grad_()
            # (..., samples, dim)
            (grad,) = torch.autograd.grad(_losses(loss, theta).sum(), theta)
            # The curve is linear in its bends, so their gradient is a weighted sum.
            of_bends = weights[..., 1:-1].mT @ grad / samples
            inner = adam.step(inner, -of_bends, cosine(learning_rate, step, steps))
            bar.update()
    return Curve(torch.cat([ends[..., :1, :], inner, ends[..., 1:, :]], -2), kind)


class Plane(NamedTuple):
    """The losses on the plane through three networks, in an orthonormal frame.

    Attributes:
        x: ``(points,)``, distance from the first network in the direction of the second.
        y: ``(points,)``, distance from the line through these two, on the side of the third.
        losses: ``(points, points)``, rows of y.
        origin: ``(dim,)``, the first network.
        frame: ``(2, dim)``, the directions of x and y, of norm 1.
        networks: ``(3, 2)``, where the three networks are.
    """

    x: Tensor
    y: Tensor
    losses: Tensor
    origin: Tensor
    frame: Tensor
    networks: Tensor

    def locate(self, theta: Tensor) -> Tensor:
        """Return the coordinates of networks ``(..., dim)``, projected on the plane,
        ``(..., 2)``.
        """
        return (theta - self.origin) @ self.frame.mT


@checked
def loss_plane(
    theta_a: Tensor,
    theta_b: Tensor,
    theta_c: Tensor,
    loss: Loss,
    *,
    points: Count = 41,
    margin: NonNegative = 0.25,
) -> Plane:
    """Evaluate the loss on the plane through three networks, such as the ends and the bend of a
    curve.

    Args:
        theta_a: ``(dim,)``.
        theta_b: ``(dim,)``.
        theta_c: ``(dim,)``.
        loss: ``(..., dim) -> (...)``.
        points: along either direction.
        margin: how far the picture reaches beyond the networks, as a fraction of their extent.

    Raises:
        ValueError: if the networks are no three of one space, finite and not on one line.
    """
    theta_a, theta_b, theta_c = _alike(theta_a=theta_a, theta_b=theta_b, theta_c=theta_c)
    for name, theta in (("theta_a", theta_a), ("theta_b", theta_b), ("theta_c", theta_c)):
        if theta.dim() != 1 or theta.shape != theta_a.shape:
            raise ValueError(f"{name} must be (dim,) as theta_a, got {tuple(theta.shape)}")
    along, aside = theta_b - theta_a, theta_c - theta_a
    along = along / along.norm()
    aside = aside - (aside @ along) * along
    if not aside.norm() > 1e-6 * (theta_c - theta_a).norm():
        raise ValueError("the three networks are on one line and span no plane")
    frame = torch.stack([along, aside / aside.norm()])
    networks = (torch.stack([theta_a, theta_b, theta_c]) - theta_a) @ frame.mT
    low, high = networks.amin(0), networks.amax(0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    x, y = (
        torch.linspace(float(low[i]), float(high[i]), points).to(theta_a) for i in range(2)
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (points, points, 2)
    with torch.no_grad():
        losses = loss(theta_a + grid @ frame)
    return Plane(x, y, losses, theta_a, frame, networks)
