"""Densities over weight space beyond the plain Gaussian: what approximations leave at
``draws.posterior``.

Each is a frozen dataclass whose fields are tensors, tuples of them, or other posteriors, so that
`pack` and `unpack` can store any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bnnflow.gaussian import Gaussian
from bnnflow.seeding import GLOBAL_STATE, as_generator, isolated
from bnnflow.types import Posterior, Seed

if TYPE_CHECKING:
    from torch.distributions import Distribution

__all__ = [
    "Conditional",
    "CouplingFlow",
    "KroneckerGaussian",
    "LowRankGaussian",
    "Mixture",
    "coupling_flow",
]

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class LowRankGaussian:
    """N(loc, factor factor^T + diag(diagonal)), at a cost linear in ``dim``.

    Args:
        loc: ``(dim,)``.
        factor: ``(dim, rank)``.
        diagonal: ``(dim,)``, positive variances.
    """

    loc: Tensor
    factor: Tensor
    diagonal: Tensor

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)``."""
        generator = as_generator(seed, self.loc.device)
        dim, rank = self.factor.shape
        noise = torch.randn(
            n, dim + rank, generator=generator, device=self.loc.device, dtype=self.loc.dtype
        )
        return (
            self.loc
            + noise[:, :dim] * self.diagonal.sqrt()
            + noise[:, dim:] @ self.factor.T
        )

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density, ``(..., dim) -> (...)`` in float64, by Woodbury's identity."""
        diagonal, root, capacitance = self._precision
        z = (theta.double() - self.loc.double()) / diagonal.sqrt()
        along = torch.linalg.solve_triangular(
            capacitance, (z @ root).unsqueeze(-1), upper=False
        ).squeeze(-1)
        log_det = diagonal.log().sum() + 2 * capacitance.diagonal().log().sum()
        return -0.5 * (
            z.square().sum(-1) - along.square().sum(-1) + log_det + len(diagonal) * _LOG_2PI
        )

    @cached_property
    def _precision(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the diagonal, W = diagonal^(-1/2) factor, and the Cholesky factor of I + W^T W."""
        diagonal = self.diagonal.double()
        root = self.factor.double() / diagonal.sqrt().unsqueeze(-1)
        eye = torch.eye(root.shape[1], dtype=torch.float64, device=root.device)
        return diagonal, root, torch.linalg.cholesky(eye + root.T @ root)


@dataclass(frozen=True)
class KroneckerGaussian:
    """A Gaussian whose blocks, one a tensor, have precision (L kron R) diag(precision) (L kron
    R)^T.

    Args:
        loc: ``(dim,)``; the blocks follow each other in it, each a row-major matrix.
        left: orthogonal matrices ``(a, a)``, one a block.
        right: orthogonal matrices ``(b, b)``, one a block.
        precision: eigenvalues ``(a, b)``, one a block.
    """

    loc: Tensor
    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    precision: tuple[Tensor, ...]

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)``."""
        generator = as_generator(seed, self.loc.device)
        noise = torch.randn(
            n,
            len(self.loc),
            generator=generator,
            device=self.loc.device,
            dtype=self.loc.dtype,
        )
        parts = [
            (left @ (block / precision.sqrt()) @ right.T).flatten(1)
            for left, right, precision, block in self._blocks(noise)
        ]
        return self.loc + torch.cat(parts, -1)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density, ``(..., dim) -> (...)`` in float64."""
        offset = theta.double() - self.loc.double()
        value = torch.full_like(offset[..., 0], -0.5 * len(self.loc) * _LOG_2PI)
        for left, right, precision, block in self._blocks(offset):
            z = left.double().T @ block @ right.double()  # (..., a, b)
            value = value - 0.5 * (
                precision.double() * z.square() - precision.double().log()
            ).sum((-1, -2))
        return value

    def _blocks(self, theta: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        blocks = theta.split([p.numel() for p in self.precision], -1)
        return [
            (left, right, precision, block.unflatten(-1, precision.shape))
            for left, right, precision, block in zip(
                self.left, self.right, self.precision, blocks, strict=True
            )
        ]


@dataclass(frozen=True)
class Conditional:
    """A posterior over some coordinates; the others are held fixed.

    ``log_prob`` is the density over the free coordinates, and -inf where another one is not at its
    fixed value.

    Args:
        loc: ``(dim,)``, every coordinate.
        where: indices of the free coordinates, ``(k,)``.
        free: their posterior.
    """

    loc: Tensor
    where: Tensor
    free: Gaussian | KroneckerGaussian

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)``."""
        theta = self.loc.expand(n, -1).clone()
        theta[:, self.where] = self.free.sample(n, seed)
        return theta

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density over the free coordinates, ``(..., dim) -> (...)`` in float64."""
        held = torch.ones(len(self.loc), dtype=torch.bool, device=self.loc.device)
        held[self.where] = False
        outside = (theta[..., held] != self.loc[held]).any(-1)
        return self.free.log_prob(theta[..., self.where]).masked_fill(outside, -math.inf)


@dataclass(frozen=True)
class Mixture:
    """The mixture of posteriors with equal weights.

    Args:
        components: at least one.
    """

    components: tuple[Gaussian | LowRankGaussian, ...]

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)`` in random order of the components."""
        loc = self.components[0].loc
        generator = as_generator(seed, loc.device)
        chosen = torch.randint(
            len(self.components), (n,), generator=generator, device=loc.device
        )
        theta = loc.new_empty(n, len(loc))
        for index, component in enumerate(self.components):
            mine = chosen == index
            theta[mine] = component.sample(int(mine.sum()), generator)
        return theta

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density, ``(..., dim) -> (...)`` in float64."""
        values = torch.stack([component.log_prob(theta) for component in self.components])
        return values.logsumexp(0) - math.log(len(self.components))


@dataclass(frozen=True)
class CouplingFlow:
    """A normal variable sent through affine couplings (Dinh et al. 2017) and scaled, by Pyro's
    transforms.

    Args:
        permutations: the order in which each coupling sees the coordinates, ``(dim,)`` integers.
        parameters: those of `coupling_flow`, in its order; loc and log scale of the last,
            elementwise map come last.
    """

    permutations: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)``."""
        with torch.no_grad(), isolated(as_generator(seed, self.parameters[-1].device)):
            # not the tensor that Pyro caches the inverse of
            return self._distribution.sample((n,)).clone()

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density, ``(..., dim) -> (...)`` in float64; differentiable."""
        # Pyro keeps what the inverse finds in the transform, where threads would share it
        with GLOBAL_STATE:
            return self._distribution.log_prob(theta).double()

    @cached_property
    def _distribution(self) -> Distribution:
        import pyro.distributions as dist

        loc = self.parameters[-1]
        hidden = len(self.parameters[0]) if self.permutations else 1
        with isolated():  # the networks' initial weights are drawn, and then replaced
            transform = coupling_flow(self.permutations, len(loc), hidden).to(loc)
        for own, parameter in zip(transform.parameters(), self.parameters, strict=True):
            own.data = parameter
        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return dist.TransformedDistribution(base, list(transform.requires_grad_(False)))  # type: ignore[arg-type]


def coupling_flow(permutations: tuple[Tensor, ...], dim: int, hidden: int) -> nn.ModuleList:
    """Return Pyro's transforms of a coupling flow: permute and couple in turn, then scale and shift
    elementwise.

    As built, every coupling is the identity. Its network has one hidden layer of ``hidden`` units.
    """
    import pyro.distributions as dist
    from pyro.distributions import transforms
    from pyro.nn import DenseNN

    class Affine(dist.TransformModule):
        """Scale and shift every coordinate."""

        bijective = True
        domain = codomain = dist.constraints.real_vector

        def __init__(self) -> None:
            super().__init__(cache_size=1)
            self.log_scale = nn.Parameter(torch.zeros(dim))
            self.loc = nn.Parameter(torch.zeros(dim))

        def _call(self, x: Tensor) -> Tensor:
            return self.loc + self.log_scale.exp() * x

        def _inverse(self, y: Tensor) -> Tensor:
            return (y - self.loc) * (-self.log_scale).exp()

        def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
            return self.log_scale.sum().expand(x.shape[:-1])

    class Permute(dist.TransformModule):
        """Pyro's permutation, as a module."""

        bijective = True
        domain = codomain = dist.constraints.real_vector
        order: Tensor
        back: Tensor

        def __init__(self, order: Tensor) -> None:
            super().__init__(cache_size=1)
            self.register_buffer("order", order)
            self.register_buffer("back", order.argsort())

        def _call(self, x: Tensor) -> Tensor:
            return x[..., self.order]

        def _inverse(self, y: Tensor) -> Tensor:
            return y[..., self.back]

        def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.zeros_like(x[..., 0])

    split, layers = dim // 2, []
    for order in permutations:
        net = DenseNN(split, [hidden], [dim - split, dim - split], nn.Tanh())
        for parameter in net.layers[-1].parameters():
            nn.init.zeros_(parameter)
        layers += [Permute(order), transforms.AffineCoupling(split, net)]
    return nn.ModuleList([*layers, Affine()])


def coupling_orders(
    dim: int, couplings: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Return random orders of the coordinates, each second one swapping the halves of the one
    before it.
    """
    if dim == 1:  # there is nothing to couple
        return ()
    swap = torch.arange(dim, device=generator.device).roll(-(dim // 2))
    return tuple(
        swap
        if i % 2
        else torch.rand(dim, generator=generator, device=generator.device).argsort()
        for i in range(couplings)
    )


# ---------------------------------------- storage

KINDS: dict[str, Callable[..., Posterior]] = {
    kind.__name__: kind
    for kind in (
        Gaussian,
        LowRankGaussian,
        KroneckerGaussian,
        Conditional,
        Mixture,
        CouplingFlow,
    )
}


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Put every tensor of a posterior into ``tensors`` and return plain values from which `unpack`
    rebuilds it.

    Returns None for a posterior of a kind that is not ours.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return name
    if isinstance(value, tuple):
        return [pack(each, f"{name}/{i}", tensors) for i, each in enumerate(value)]
    if KINDS.get(type(value).__name__) is not type(value):
        return None
    parts = {
        field.name: pack(getattr(value, field.name), f"{name}/{field.name}", tensors)
        for field in fields(value)
    }
    return {"kind": type(value).__name__, "parts": parts}


def unpack(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """Rebuild what `pack` took apart.

    Raises:
        ValueError: if its parts do not fit each other.
    """
    posterior = _unpacked(plain, tensors)
    dimension(posterior)
    return posterior


def dimension(posterior: Any) -> int:
    """Return the length of a draw of a posterior of this module.

    ``ValueError`` if its parts do not fit each other.
    """
    if isinstance(posterior, Mixture):
        sizes = {dimension(each) for each in posterior.components}
        return _fitting(len(sizes) == 1, sizes.pop() if sizes else 0)
    if isinstance(posterior, CouplingFlow):
        return _coupled(posterior)
    dim = len(posterior.loc)
    flat = posterior.loc.shape == (dim,)
    if isinstance(posterior, Gaussian):
        return _fitting(flat and posterior.scale_tril.shape in ((dim,), (dim, dim)), dim)
    if isinstance(posterior, LowRankGaussian):
        fits = (
            posterior.factor.dim() == 2
            and len(posterior.factor) == dim
            and posterior.diagonal.shape == (dim,)
        )
        return _fitting(flat and fits, dim)
    if isinstance(posterior, KroneckerGaussian):
        blocks = list(
            zip(posterior.left, posterior.right, posterior.precision, strict=True)
        )
        fits = all(
            p.shape == (len(a), len(b))
            and a.shape == p.shape[:1] * 2
            and b.shape == p.shape[1:] * 2
            for a, b, p in blocks
        )
        return _fitting(flat and fits and sum(p.numel() for _, _, p in blocks) == dim, dim)
    if isinstance(posterior, Conditional):
        where = posterior.where
        inside = where.dtype == torch.int64 and bool(((where >= 0) & (where < dim)).all())
        return _fitting(
            flat and inside and where.shape == (dimension(posterior.free),), dim
        )
    raise ValueError(f"no posterior of this module: {type(posterior).__name__}")


def _coupled(flow: CouplingFlow) -> int:
    dim = len(flow.parameters[-1])
    orders = all(
        torch.equal(order.sort().values, torch.arange(dim)) for order in flow.permutations
    )
    first = flow.parameters[0]
    # The width of the networks is read from their first weights, so these must be a matrix of it.
    hidden = not flow.permutations or first.shape == (len(first), dim // 2)
    return _fitting(flow.parameters[-1].dim() == 1 and orders and hidden, dim)


def _fitting(fits: bool, dim: int) -> int:
    if not fits:
        raise ValueError("the parts of a density do not fit each other")
    return dim


def _unpacked(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(plain, str):
        return tensors[plain]
    if isinstance(plain, list):
        return tuple(_unpacked(each, tensors) for each in plain)
    if plain["kind"] not in KINDS:
        raise ValueError(
            f"no posterior {plain['kind']!r}; the file is newer than this bnnflow"
        )
    return KINDS[plain["kind"]](
        **{name: _unpacked(part, tensors) for name, part in plain["parts"].items()}
    )
