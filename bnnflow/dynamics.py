"""Hamiltonian and microcanonical dynamics in a log density: kicks by gradients, drifts between
them.

`Target` is a log density with its gradient, and how chains move in it. What is here is the
reference for the compiled steps of `bnnflow.model.target`, and the way of every other density.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bnnflow.compiled import normal_like, turned, unit
from bnnflow.types import LogDensityAndGrad

__all__ = [
    "MINIMAL_NORM",
    "Point",
    "Scheme",
    "Target",
    "momentum_update",
    "random_directions",
]

DIVERGENCE = 1000.0
"""Nats of energy error beyond which a path has left the level set (Stan's bound)."""


class Point(NamedTuple):
    """Where every chain is, and how it moves."""

    theta: Tensor  # (chain, dim)
    velocity: Tensor  # (chain, dim), in coordinates scaled by the mass matrix
    log_joint: Tensor  # (chain,), float64
    grad: Tensor  # (chain, dim)


class Scheme(NamedTuple):
    """The parts of a step's time that its kicks and drifts take, in turns: a kick comes first, and
    one after each drift, at whose end the gradient is computed. Float64, on the CPU.
    """

    kick: Tensor  # (drifts + 1,), or (chain, drifts + 1)
    drift: Tensor  # (drifts,), or (chain, drifts); chains rest where it is zero

    @classmethod
    def leapfrog(cls, n: int | Tensor) -> Scheme:
        """Return ``n`` leapfrog steps, for every chain its own ``(chain,)``; the halves of two
        kicks at one place are a whole one.
        """
        each = torch.as_tensor(n).cpu().unsqueeze(-1)
        drift = (torch.arange(int(each.max())) < each).double()
        nothing = torch.zeros_like(drift[..., :1])
        halves = torch.cat([nothing, drift], -1) + torch.cat([drift, nothing], -1)
        return cls(0.5 * halves, drift)

    def parts(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every drift with the kick after it, as factors of ``like`` ``(chain, dim)``."""
        kick, drift = (each.to(like).unsqueeze(-1) for each in self)
        for i in range(self.drift.shape[-1]):
            yield drift[..., i, :], kick[..., i + 1, :]

    def first(self, like: Tensor) -> Tensor:
        """Return the kick before all drifts."""
        return self.kick[..., :1].to(like)


# The minimal-norm scheme of second order (McLachlan 1995): twice the gradients of leapfrog, a tenth
# of its error.
_OUTER = 0.1931833275037836
MINIMAL_NORM = Scheme(
    torch.tensor([_OUTER, 1 - 2 * _OUTER, _OUTER], dtype=torch.float64),
    torch.tensor([0.5, 0.5], dtype=torch.float64),
)


def momentum_update(
    direction: Tensor, grad: Tensor, step: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Turn unit vectors ``(chain, dim)`` towards the gradient for a time ``step``, exactly.

    Solves du/dt = (I - u u^T) grad / (dim - 1) at constant gradient (Robnik et al. 2023; ver Steeg
    and Galstyan 2021).

    Returns:
        The new directions, and the change of the kinetic energy ``(chain,)`` in float64: minus the
        change of the log volume that the dynamics make.
    """
    at = torch.as_tensor(step, dtype=grad.dtype, device=grad.device)
    compiled = turned(direction, grad, at)
    if compiled is not None:
        return compiled
    dim = direction.shape[-1]
    norm = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).clamp(
        min=torch.finfo(grad.dtype).tiny
    )
    along = ((direction * grad).sum(-1, keepdim=True) / norm).double().clamp(-1, 1)
    delta = (at * norm).double() / max(1, dim - 1)
    # The gradient's direction wins over all others; a direction straight against it has nowhere to
    # turn, and stays.
    decay = torch.exp(-delta).clamp(min=torch.finfo(grad.dtype).eps ** 0.75)
    towards = (1 - decay) * (1 + along + decay * (1 - along)) / norm
    new = torch.addcmul(
        (2 * decay).to(grad.dtype) * direction, towards.to(grad.dtype), grad
    )
    new = new / torch.linalg.vector_norm(new, dim=-1, keepdim=True)
    change = (dim - 1) * torch.logaddexp(
        ((1 + along) / 2).log() + delta, ((1 - along) / 2).log() - delta
    )
    return new, change.squeeze(-1)


def random_directions(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw directions uniform on the sphere, of the shape of ``like``."""
    return unit(normal_like(like, generator))


class Target:
    """A log density with its gradient, in which chains move.

    Args:
        log_joint_and_grad: ``(chain, dim) -> (chain,), (chain, dim)``.
    """

    def __init__(self, log_joint_and_grad: LogDensityAndGrad) -> None:
        self._log_joint_and_grad = log_joint_and_grad

    @classmethod
    def of(cls, log_joint_and_grad: LogDensityAndGrad) -> Target:
        """Return a target as it is, that of a model for its method, and any other function as a
        target.
        """
        if isinstance(log_joint_and_grad, Target):
            return log_joint_and_grad
        owner = getattr(log_joint_and_grad, "__self__", None)
        if isinstance(owner, HasTarget) and log_joint_and_grad == owner.log_joint_and_grad:
            return owner.target
        return cls(log_joint_and_grad)

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density and its gradient."""
        return self._log_joint_and_grad(theta)

    def of_chains(self, some: Tensor) -> Target:
        """Return the target of some of the chains, ``(chain,)`` bool."""
        return self

    def _moved(
        self, drift: Tensor, theta: Tensor, log_joint: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return density and gradient after a drift, those from before for chains that rest."""
        moved = (drift != 0).squeeze(-1).expand(len(theta))
        if bool(moved.all()):
            return self(theta)
        value, slope = self.of_chains(moved)(theta[moved])
        log_joint, grad = log_joint.clone(), grad.clone()
        log_joint[moved], grad[moved] = value, slope
        return log_joint, grad

    def hamiltonian(
        self, point: Point, time: Tensor, scale: Tensor, scheme: Scheme
    ) -> Point:
        """Follow H = |p|^2 / 2 - log_joint, with p the velocities, in scaled coordinates.

        Args:
            point: where the chains are.
            time: of a step, ``(chain, 1)``.
            scale: ``(dim,)`` or ``(chain, dim)``, maps the coordinates to weights.
            scheme: kicks and drifts, the same for all chains or for every chain its own.
        """
        theta, velocity, log_joint, grad = point
        steps = time * scale
        velocity = velocity + (scheme.first(theta) * steps) * grad
        for drift, kick in scheme.parts(theta):
            theta = theta + (drift * steps) * velocity
            log_joint, grad = self._moved(drift, theta, log_joint, grad)
            velocity = velocity + (kick * steps) * grad
        return Point(theta, velocity, log_joint, grad)

    def microcanonical(
        self, point: Point, time: Tensor, scale: Tensor, scheme: Scheme
    ) -> tuple[Point, Tensor]:
        """Follow dx/dt = u, du/dt = (I - u u^T) grad log_joint / (dim - 1) in scaled coordinates,
        with u the velocities, of unit length.

        Args:
            point: see `hamiltonian`.
            time: of a step, one for all or ``(chain, 1)``.
            scale: see `hamiltonian`.
            scheme: kicks and drifts, the same for all chains.

        Returns:
            Where the chains come to, and the error of the energy ``(chain,)``, which is what the
            change of volume lacks.
        """
        theta, velocity, log_joint, grad = point
        steps = time * scale
        first = scheme.first(theta) * time
        velocity, kinetic = momentum_update(velocity, scale * grad, first)
        for drift, kick in scheme.parts(theta):
            theta = theta + (drift * steps) * velocity
            log_joint, grad = self(theta)
            velocity, change = momentum_update(velocity, scale * grad, kick * time)
            kinetic = kinetic + change
        error = kinetic - (log_joint - point.log_joint)
        return Point(theta, velocity, log_joint, grad), error

    def langevin(
        self,
        point: Point,
        time: Tensor,
        scale: Tensor,
        share: float,
        steps: int,
        generator: torch.Generator,
    ) -> tuple[Point, Tensor]:
        """Make microcanonical steps of the minimal-norm scheme, after each of which directions are
        partly drawn anew.

        A step whose energy error is no number below `DIVERGENCE` is undone, and goes another way.

        Args:
            point: see `hamiltonian`.
            time: see `microcanonical`.
            scale: see `hamiltonian`.
            share: length of the random vector that is added to a direction.
            steps: how many.
            generator: source of the random vectors.

        Returns:
            Where the chains come to, and the error of the energy of every step ``(step, chain)``.
        """
        errors = []
        for _ in range(steps):
            end, error = self.microcanonical(point, time, scale, MINIMAL_NORM)
            anew = random_directions(point.theta, generator)
            velocity = unit(end.velocity + share * anew)
            lost = ~(error.abs() < DIVERGENCE)  # NaN counts
            ours = lost[:, None]
            point = Point(
                torch.where(ours, point.theta, end.theta),
                torch.where(ours, anew, velocity),
                torch.where(lost, point.log_joint, end.log_joint),
                torch.where(ours, point.grad, end.grad),
            )
            errors.append(error)
        return point, torch.stack(errors)


class HasTarget(ABC):
    """What has a log density in which chains move in a way of its own."""

    @abstractmethod
    def log_joint_and_grad(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density and its gradient."""

    @property
    @abstractmethod
    def target(self) -> Target:
        """The same as a target."""
