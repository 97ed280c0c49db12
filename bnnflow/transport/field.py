"""The interface of velocity fields, from N(0, I) to a posterior in the coordinates of the
source.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from bnnflow.seeding import isolated
from bnnflow.transport.divergence import divergence
from bnnflow.transport.paths import AffinePath
from bnnflow.transport.proximal_step import ProximalStep
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.types import Trace
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["Field", "check_field"]


class Field(nn.Module):
    """A velocity field: write ``forward``, and override what else you know of it.

    It is called as ``field(t, x)``, with ``t`` a scalar or ``(batch,)`` and ``x`` ``(batch, dim)``,
    and acts on each row alone. Whatever needs a field takes any ``nn.Module`` called like this,
    too: see `Field.of`.

    Attributes:
        path: the path of the pairs that the field is made for.
        symmetries: those that the field is equivariant to. Draws are moved by all that the source
            keeps while the field is trained, unless these are none: such a field is for draws that
            were aligned. None if not known.
        posterior: what the field is bound to; never part of the module's weights.
        proximal_steps: by which it follows the data.
    """

    path: AffinePath = AffinePath()
    symmetries: Symmetries | None = None
    posterior: WhitenedPosterior | None = None
    proximal_steps: tuple[ProximalStep, ...] = ()

    @staticmethod
    def of(module: nn.Module) -> Field:
        """Return the module itself if it is a field, else a field that calls it, with ``t`` of the
        type of x, and knows nothing more of it.
        """
        return module if isinstance(module, Field) else _Wrapped(module)

    # ---------------------------------------- the posterior

    @property
    def informed(self) -> bool:
        """Whether the field looks at a posterior, which it must be bound to."""
        return False

    @property
    def gradients(self) -> int:
        """Gradients of the likelihood that an evaluation takes."""
        return sum(proximal_step.gradients for proximal_step in self.proximal_steps)

    def bind(self, posterior: WhitenedPosterior | None) -> Self:
        """Return the same field, sharing its weights, bound to another posterior, or to none."""
        if not self.informed:
            return self
        other = copy.copy(self)
        other.posterior = posterior
        return other

    # ---------------------------------------- training

    def precompute(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Return what of the velocity comes before anything learned, ``(batch, dim)`` each.

        Nothing by default.

        Training computes it once for a point that it uses several times, moved by other symmetries:
        it must be equivariant to them.
        """
        return ()

    def from_precomputed(self, t: Tensor, x: Tensor, *precomputed: Tensor) -> Tensor:
        """Return the velocity at times ``(batch,)``, given `precompute`."""
        return self(t, x)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return what squared errors are multiplied by in training, in the shape of ``t``.

        One by default.
        """
        return torch.ones_like(t)

    # ---------------------------------------- densities

    @property
    def has_closed_divergence(self) -> bool:
        """Whether the field knows its own trace."""
        return type(self).closed_divergence is not Field.closed_divergence

    def closed_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity and its divergence ``(batch,)`` in float64, without a product for
        each coordinate.
        """
        raise NotImplementedError(f"a {self._get_name()} has no closed divergence")

    def with_divergence(
        self, t: Tensor, x: Tensor, trace: Trace = "exact", probes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity and its divergence, by `closed_divergence` where that is asked for
        and known.

        Args:
            t: a scalar or ``(batch,)``.
            x: ``(batch, dim)``.
            trace: see `divergence`.
            probes: of estimates; see `divergence`.

        Returns:
            ``(batch, dim)``, and ``(batch,)`` in float64.
        """
        if trace == "exact" and self.has_closed_divergence:
            return self.closed_divergence(t, x)
        return divergence(self, t, x, trace, probes)

    # ---------------------------------------- other weights, files

    def on(self, spec: WeightSpec) -> Field:
        """Return the field with the same parameters for weights of other hidden widths.

        Raises:
            ValueError: if there is none, which is so unless a field says otherwise.
        """
        raise ValueError(f"a {self._get_name()} is tied to its own weights")

    def lent_to(self, other: Field) -> Field:
        """Return a field of the same kind, for other widths, with the parameters of this one.

        Raises:
            ValueError: if they have other shapes.
        """
        other = other.to(next(self.parameters())).requires_grad_(False)
        try:
            other.load_state_dict(self.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"the networks differ in more than the widths of hidden layers: {error}"
            ) from error
        return other

    def describe(self) -> dict[str, Any] | None:
        """Return plain values from which the module is rebuilt.

        None, the default, if it cannot be saved.
        """
        return None


class _Wrapped(Field):
    """A user's module as a field."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def _get_name(self) -> str:
        return type(self.module).__name__

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.module(t.to(x.dtype), x)


@torch.no_grad()
def check_field(field: Field, t: Tensor, x: Tensor) -> bool:
    """See that a field acts on each row alone, and keeps nothing of the points that it meets.

    Args:
        field: in the mode in which it is trained.
        t: ``(batch,)``; the first few rows are looked at.
        x: ``(batch, dim)``.

    Returns:
        Whether the field draws random numbers in training, as dropout does.

    Raises:
        ValueError: if it is something else.
    """
    t, x = t[:4], x[:4]
    modes = {module: module.training for module in field.modules()}
    kept = {name: (buffer, buffer.clone()) for name, buffer in field.named_buffers()}
    try:
        with isolated():
            drawn = torch.get_rng_state()
            field(t, x)
            random = not torch.equal(drawn, torch.get_rng_state())
        changed = [
            name
            for name, (buffer, before) in kept.items()
            if not torch.equal(buffer, before)
        ]
        if changed:
            raise ValueError(
                f"velocity: {changed[0].removeprefix('module.')!r} is written while the field is "
                "evaluated. "
                "A statistic of points that it met is none of its weights, which are averaged and "
                "kept: take norms of single rows, such as LayerNorm, in place of BatchNorm"
            )
        for module in modes:
            module.training = False
        together = field(t, x)
        if together.shape != x.shape:
            raise ValueError(
                f"velocity: the field must return {tuple(x.shape)} for so many points, got "
                f"{tuple(together.shape)}"
            )
        try:
            field(t[0].double(), x)  # as solvers do
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                "velocity: the field must take a scalar t too, as solvers have it, in float64; "
                f"t = t.to(x.dtype).expand(len(x)) serves both: {error}"
            ) from error
        try:
            alone = torch.cat([field(t[i : i + 1], x[i : i + 1]) for i in range(len(x))])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"velocity: the field cannot take one row: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, before in kept.values():
            buffer.copy_(before)
    # Far above rounding, and far below what another row out of four does.
    if bool(((together - alone).abs().amax() > 1e-2 * together.abs().amax()).any()):
        raise ValueError(
            "velocity: the field makes a row's velocity depend on the other rows, so that draws "
            "and densities would depend on what travels together; the first axis runs over rows"
        )
    return random
