"""The distributions of single weights: checks, and stretches of a flat vector that share one
family.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution, constraints

from bnnflow.model.quantiles import FAMILIES, QuantileTable

__all__ = [
    "Marginal",
    "elementwise",
    "exact",
    "has_quantiles",
    "merged",
    "parameters_of",
    "rebuild",
    "unvalidated",
    "validated",
]

LOG_2PI = math.log(2 * math.pi)
TINY = 1e-300  # probabilities have no units: these two are next to 0 and 1 in float64
EPSILON = 1e-16


def exact(value: float) -> Tensor:
    """Keep a setting in double precision; a model rounds it to its own."""
    return torch.tensor(float(value), dtype=torch.float64)


# Derivatives of log densities by the variable, and of those of positive variables by their
# logarithm u, with its Jacobian. Others come from automatic differentiation, which takes ten times
# as long for so few operations.
_SLOPES: dict[type[Distribution], Callable[[Any, Tensor], Tensor]] = {
    td.Normal: lambda d, x: (d.loc - x) / d.scale**2,
    td.Laplace: lambda d, x: (d.loc - x).sign() / d.scale,
    td.Cauchy: lambda d, x: 2 * (d.loc - x) / (d.scale**2 + (x - d.loc) ** 2),
    td.StudentT: lambda d, x: (
        (d.df + 1) * (d.loc - x) / (d.df * d.scale**2 + (x - d.loc) ** 2)
    ),
}
_LOG_SLOPES: dict[type[Distribution], Callable[[Any, Tensor], Tensor]] = {
    td.HalfNormal: lambda d, u: 1 - (u.exp() / d.scale) ** 2,
    td.HalfCauchy: lambda d, u: -torch.tanh(u - d.scale.log()),
    td.LogNormal: lambda d, u: (d.loc - u) / d.scale**2,
    td.Gamma: lambda d, u: d.concentration - d.rate * u.exp(),
    td.InverseGamma: lambda d, u: d.rate * (-u).exp() - d.concentration,
    td.Exponential: lambda d, u: 1 - d.rate * u.exp(),
}


@dataclass(frozen=True)
class Marginal:
    """A stretch of ``theta`` with one distribution.

    ``log`` says that theta is the logarithm of its variable.
    """

    where: slice
    distribution: Distribution  # of shape (size,)
    log: bool = False

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the elementwise log density in the coordinate ``theta`` ``(..., size)``."""
        if self.log:
            return self.distribution.log_prob(theta.exp()) + theta
        return self.distribution.log_prob(theta)

    @cached_property
    def table(self) -> QuantileTable | None:
        """The map to normal coordinates where torch has no inverse cdf."""
        return (
            QuantileTable(self.distribution)
            if type(self.distribution) in FAMILIES
            else None
        )

    @cached_property
    def exact(self) -> Marginal:
        """The same in float64, as tails want it."""
        return Marginal(
            self.where, rebuild(self.distribution, lambda v: v.double()), self.log
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Marginal:
        """Return the same elsewhere."""
        moved = rebuild(self.distribution, lambda v: v.to(device, dtype))
        return Marginal(self.where, moved, self.log)

    def to_normal(self, theta: Tensor) -> Tensor:
        """Map ``theta`` ``(..., size)`` to standard normal coordinates."""
        d = self.distribution
        if isinstance(d, td.Normal):
            return (theta - d.loc) / d.scale
        if self.table is not None:
            return self.table.to_normal(theta.double()).to(theta.dtype)
        value = theta.double().exp() if self.log else theta.double()
        # Neither tail may round to probability zero or one: z is kept between -37 and 8.
        p = self.exact.distribution.cdf(value).clamp(TINY, 1 - EPSILON)
        return torch.special.ndtri(p).to(theta.dtype)

    def from_normal(self, z: Tensor) -> Tensor:
        """Map standard normal coordinates ``(..., size)`` back."""
        d = self.distribution
        if isinstance(d, td.Normal):
            return d.loc + d.scale * z
        if self.table is not None:
            return self.table.from_normal(z.double()).to(z.dtype)
        value = self.exact.distribution.icdf(
            torch.special.ndtr(z.double()).clamp(TINY, 1 - EPSILON)
        )
        return (value.log() if self.log else value).to(z.dtype)

    def derivative(self, z: Tensor) -> Tensor:
        """Return the first of the `derivatives` alone."""
        if isinstance(self.distribution, td.Normal):
            return self.distribution.scale.expand_as(z)
        if self.table is not None:
            return self.table.derivatives(z.double())[0].to(z.dtype)
        exact, z64 = self.exact, z.double()
        return _slope(z64, exact.log_prob(exact.from_normal(z64))).to(z.dtype)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and second derivative of `from_normal`, ``(..., size)`` each.

        Differentiable again.

        From phi(z) = p(theta) theta', which also gives theta'' = -theta' (z + theta' d log p / d
        theta).
        """
        d = self.distribution
        if isinstance(d, td.Normal):
            return d.scale.expand_as(z), torch.zeros_like(z)
        if self.table is not None:
            first, second = self.table.derivatives(z.double())
        else:
            exact, z64 = self.exact, z.double()
            log_p, score = exact.log_prob_and_grad(exact.from_normal(z64))
            first = _slope(z64, log_p)
            second = -first * (z64 + first * score)
        return first.to(z.dtype), second.to(z.dtype)

    def log_prob_and_grad(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the elementwise log density and its derivative, ``(..., size)`` each.

        Differentiable again.
        """
        slope = (_LOG_SLOPES if self.log else _SLOPES).get(type(self.distribution))
        if slope is not None:
            return self.log_prob(theta), slope(self.distribution, theta)
        value, vjp, *_ = torch.func.vjp(self.log_prob, theta)
        return value, vjp(torch.ones_like(value))[0]


def _slope(z: Tensor, log_p: Tensor) -> Tensor:
    """Return d theta / d z, given the log density at theta."""
    return (-0.5 * (z * z + LOG_2PI) - log_p).exp()


_UNVALIDATED = threading.Lock()
_inside: list[bool] = []  # one entry for every context that is open, in any thread


@contextmanager
def unvalidated() -> Iterator[None]:
    """Let distributions take any parameters: a scale that overflows is a divergence to survive, not
    a mistake.

    Torch has one switch for the whole process; the last thread to leave puts it back.
    """
    with _UNVALIDATED:
        _inside.append(_inside[0] if _inside else Distribution._validate_args)
        Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        with _UNVALIDATED:
            before = _inside.pop()
            if not _inside:
                Distribution.set_default_validate_args(before)


@contextmanager
def validated() -> Iterator[None]:
    """Let distributions refuse what they cannot take, whatever the process has chosen.

    The first ``torch.compile`` of a process, and ``python -O``, turn torch's checks off for good.
    Where another thread is inside `unvalidated`, its choice stays.
    """
    with _UNVALIDATED:
        alone, before = not _inside, Distribution._validate_args
        if alone:
            Distribution.set_default_validate_args(True)
    try:
        yield
    finally:
        with _UNVALIDATED:
            if alone and not _inside:
                Distribution.set_default_validate_args(before)


def parameters_of(distribution: Distribution) -> dict[str, Tensor]:
    """Return the tensors that define a distribution.

    Redundant ones (probs beside logits) are left out.
    """
    names = [name for name in distribution.arg_constraints if name in distribution.__dict__]
    # transformed families (HalfNormal, LogNormal) keep theirs behind properties
    if not names:
        names = list(distribution.arg_constraints)
    return {name: torch.as_tensor(getattr(distribution, name)) for name in names}


def rebuild(distribution: Distribution, change: Callable[[Tensor], Tensor]) -> Distribution:
    """Return the same family with ``change`` applied to every parameter."""
    family = getattr(td, type(distribution).__name__)
    return family(
        **{name: change(value) for name, value in parameters_of(distribution).items()},
        validate_args=False,
    )


def elementwise(
    name: str, distribution: Distribution, shape: tuple[int, ...], positive: bool
) -> Distribution:
    """Check one tensor's distribution and expand it to the tensor's shape, without event axes."""
    distribution = unwrapped(distribution)
    family = type(distribution).__name__
    if distribution.event_shape:
        raise ValueError(f"prior of {name!r}: {family} is not elementwise")
    if family not in td.__all__ or not distribution.arg_constraints:
        raise ValueError(
            f"prior of {name!r}: {family} is not a family of torch.distributions with parameters "
            "of its own"
        )
    _check_parameters(name, distribution)
    support = distribution.support
    if positive and not on_half_line(distribution):
        raise ValueError(
            f"prior of {name!r} must have positive support, {family} has {support}"
        )
    if not positive and not isinstance(support, type(constraints.real)):
        raise ValueError(
            f"prior of {name!r} must have the real line as support, {family} has {support}"
        )
    if not broadcasts(distribution.batch_shape, shape):
        raise ValueError(
            f"prior of {name!r} has shape {tuple(distribution.batch_shape)}, the tensor {shape}"
        )
    return rebuild(distribution, lambda v: v.detach().expand(shape))


def _check_parameters(name: str, distribution: Distribution) -> None:
    """Check what torch checks when a distribution is made, unless that was switched off, as
    ``python -O`` does.
    """
    for key, value in parameters_of(distribution).items():
        constraint = distribution.arg_constraints[key]
        if constraints.is_dependent(constraint):
            continue
        if not bool((constraint.check(value) & value.isfinite()).all()):
            raise ValueError(
                f"prior of {name!r}: {key} of {type(distribution).__name__} is out of "
                f"range: {value}"
            )


def on_half_line(distribution: Distribution) -> bool:
    """Whether the support is the positive numbers."""
    support = distribution.support
    half_line = isinstance(
        support, (type(constraints.positive), type(constraints.nonnegative))
    )
    return half_line and bool(torch.as_tensor(support.lower_bound).eq(0).all())  # type: ignore[union-attr]


def has_quantiles(distribution: Distribution) -> bool:
    """Say whether torch has its cdf and inverse cdf, of which normal coordinates are made."""
    if isinstance(distribution, td.Normal):
        return True
    where = next(iter(parameters_of(distribution).values())).device
    try:
        distribution.icdf(distribution.cdf(torch.ones(1, device=where)))
    except NotImplementedError:
        return False
    return True


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether ``shape`` broadcasts to ``to``."""
    try:
        return np.broadcast_shapes(shape, to) == tuple(to)
    except ValueError:
        return False


def merged(blocks: list[Marginal]) -> list[Marginal]:
    """Join neighbouring stretches of normals, and of one family of logarithms: few flat operations
    are fast.
    """
    merged: list[Marginal] = []
    for block in blocks:
        last = merged[-1] if merged else None
        alike = (
            last is not None
            and type(last.distribution) is type(block.distribution)
            and last.log == block.log
        )
        if (
            last is not None
            and alike
            and (block.log or isinstance(block.distribution, td.Normal))
        ):
            ours, theirs = (
                parameters_of(last.distribution),
                parameters_of(block.distribution),
            )
            family = getattr(td, type(block.distribution).__name__)
            joined = family(
                **{name: torch.cat([ours[name], theirs[name]]) for name in ours},
                validate_args=False,
            )
            merged[-1] = Marginal(
                slice(last.where.start, block.where.stop), joined, block.log
            )
        else:
            merged.append(block)
    return merged


def unwrapped(distribution: Distribution) -> Distribution:
    """Return the elementwise distribution inside ``Independent`` and Pyro's masks."""
    while (
        isinstance(distribution, td.Independent)
        or type(distribution).__name__ == "MaskedDistribution"
    ):
        distribution = distribution.base_dist  # type: ignore[attr-defined]
    return distribution


def dtype_of(distribution: Distribution) -> torch.dtype:
    """Return the dtype that a distribution's parameters have."""
    tensors = [getattr(distribution, name, None) for name in distribution.arg_constraints]
    return next(
        (t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()),
        torch.get_default_dtype(),
    )
