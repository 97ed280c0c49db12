"""The Jacobian of a perceptron as its factors, never formed, and the interface that it shares with
a matrix.

The derivative of one output at one row of data by the weights of a layer is an outer product: what
leaves the layer times what enters it. The Gram matrix of such rows is a sum over layers of
elementwise products of two small Gram matrices, so that an entry costs in + out multiplications for
each layer in place of in * out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bnnflow.compiled import is_untracked_cpu
from bnnflow.model.arrowhead import Arrowhead, Pairs
from bnnflow.weights import Layer

__all__ = [
    "BorderedFactor",
    "ClosedFactor",
    "Factor",
    "FactoredJacobian",
    "MatrixFactor",
    "Outer",
]


class Factor(Protocol):
    """A matrix A for every network of a batch, ``(batch, rows, dim)``."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def matrix(self) -> Tensor:
        """A itself, ``(batch, rows, dim)``."""
        ...

    def __getitem__(self, some: slice) -> Factor:
        """Return the matrices of some networks."""
        ...

    def gram(self) -> Tensor:
        """Return A A^T, ``(batch, rows, rows)``."""
        ...

    def times(self, v: Tensor) -> Tensor:
        """Return A v, ``(batch, dim) -> (batch, rows)``."""
        ...

    def transposed(self, u: Tensor) -> Tensor:
        """Return A^T u, ``(batch, rows) -> (batch, dim)``."""
        ...


@dataclass(frozen=True)
class MatrixFactor:
    """A matrix that is there, ``(batch, rows, dim)``."""

    matrix: Tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.matrix.shape[1]

    def __getitem__(self, some: slice) -> MatrixFactor:
        return MatrixFactor(self.matrix[some])

    def normal(self, some: slice) -> Tensor:
        """Return A^T A of some networks, ``(networks, dim, dim)``."""
        return self.matrix[some].mT @ self.matrix[some]

    def gram(self) -> Tensor:
        """Return A A^T, ``(batch, rows, rows)``."""
        return self.matrix @ self.matrix.mT

    def times(self, v: Tensor) -> Tensor:
        """Return A v, ``(batch, dim) -> (batch, rows)``."""
        return (self.matrix @ v.unsqueeze(-1)).squeeze(-1)

    def transposed(self, u: Tensor) -> Tensor:
        """Return A^T u, ``(batch, rows) -> (batch, dim)``."""
        return (self.matrix.mT @ u.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class ClosedFactor:
    """A whose rows by the weights are never formed, and A^T A is known in closed form: for more
    rows than columns.

    Args:
        jvp: takes directions of theta ``(batch, dim)`` to those of the outputs,
            ``(batch, n, out)``.
        back: takes gradients by the outputs to those by the weights, ``(batch, weights)``.
        mix: what makes rows of outputs, ``(batch, out, rank, n)``: rows of data last, where sums
            are fast.
        below: ``(batch, parameters)``: what each parameter of the likelihood has in a row of its
            own.
        slope: derivative of ``theta`` by the coordinates of the prior.
        vjp: carries vectors of these to those of the source.
        product: the first rows' product with themselves for some networks,
            ``(networks, weights, weights)``.
    """

    jvp: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    mix: Tensor
    below: Tensor
    slope: Arrowhead
    vjp: Callable[[Tensor], Tensor]
    product: Callable[[slice], Tensor]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self._of_outputs + self.below.shape[1]

    @property
    def _of_outputs(self) -> int:
        """Number of rows that are made of outputs, those of the data times the rank."""
        return math.prod(self.mix.shape[2:])

    def normal(self, some: slice) -> Tensor:
        """Return A^T A of some networks, ``(networks, dim, dim)``."""
        return self._normal(self.slope, some)

    def compact_normal(self, some: slice) -> Tensor:
        """Return the same without what `pairs` turn to zeros."""
        return self._normal(self._compact[0], some)

    @property
    def pairs(self) -> Pairs | None:
        """Rotations of coordinates, after which one of two has no effect."""
        return self._compact[1]

    @cached_property
    def _compact(self) -> tuple[Arrowhead, Pairs | None]:
        return self.slope.compact()

    def _normal(self, slope: Arrowhead, some: slice) -> Tensor:
        slope = Arrowhead(
            slope.diagonal[some], None if slope.columns is None else slope.columns[some]
        )
        whole = slope.of_weights(self.product(some))
        # of the likelihood's parameters: no others meet them
        own = slice(whole.shape[-1] - self.below.shape[1], None)
        scale = slope.diagonal[:, own]
        whole.diagonal(dim1=1, dim2=2)[:, own] += self.below[some].square() * scale * scale
        return self.vjp(self.vjp(whole).mT)

    def times(self, v: Tensor) -> Tensor:
        """Return A v, ``(batch, dim) -> (batch, rows)``."""
        moved = self.slope.times(self.vjp(v))
        # small: faster than products of matrices
        of_rows = (self.mix * self.jvp(moved).mT.unsqueeze(2)).sum(1).mT
        return torch.cat(
            [
                of_rows.flatten(1),
                self.below * moved[:, moved.shape[1] - self.below.shape[1] :],
            ],
            1,
        )

    def transposed(self, u: Tensor) -> Tensor:
        """Return A^T u, ``(batch, rows) -> (batch, dim)``."""
        count, rank = self._of_outputs, self.mix.shape[2]
        of_rows, own = u[:, :count].unflatten(1, (-1, rank)).mT.contiguous(), u[:, count:]
        by_weights = self.back((self.mix * of_rows.unsqueeze(1)).sum(2).mT)
        missing = self.slope.diagonal.shape[1] - by_weights.shape[1] - own.shape[1]
        back = torch.cat(
            [by_weights, by_weights.new_zeros(len(u), missing), self.below * own], 1
        )
        return self.vjp(self.slope.left(back.unsqueeze(-1)).squeeze(-1))


@dataclass(frozen=True)
class BorderedFactor:
    """A of weights, and of parameters that have a row each of their own.

    Args:
        weights: the rows by the weights.
        below: ``(batch, parameters)``, the only entries of the rows below, in the last columns.
    """

    weights: FactoredJacobian
    below: Tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.weights.rows + self.below.shape[1]

    @property
    def matrix(self) -> Tensor:
        """A itself, ``(batch, rows, dim)``."""
        above = nn.functional.pad(self.weights.matrix, (0, self.below.shape[1]))
        own = nn.functional.pad(
            torch.diag_embed(self.below), (above.shape[-1] - self.below.shape[1], 0)
        )
        return torch.cat([above, own], 1)

    def __getitem__(self, some: slice) -> BorderedFactor:
        return BorderedFactor(self.weights[some], self.below[some])

    def gram(self) -> Tensor:
        """Return A A^T, ``(batch, rows, rows)``."""
        above = nn.functional.pad(self.weights.gram(), (0, self.below.shape[1]))
        own = nn.functional.pad(
            torch.diag_embed(self.below.square()), (self.weights.rows, 0)
        )
        return torch.cat([above, own], 1)

    def times(self, v: Tensor) -> Tensor:
        """Return A v, ``(batch, dim) -> (batch, rows)``."""
        of_weights, own = v.split(
            [v.shape[1] - self.below.shape[1], self.below.shape[1]], 1
        )
        return torch.cat([self.weights.times(of_weights), self.below * own], 1)

    def transposed(self, u: Tensor) -> Tensor:
        """Return A^T u, ``(batch, rows) -> (batch, dim)``."""
        of_rows, own = u.split([self.weights.rows, self.below.shape[1]], 1)
        return torch.cat([self.weights.transposed(of_rows), self.below * own], 1)


class Outer(NamedTuple):
    """The rows by the weights of one layer."""

    layer: Layer
    entering: Tensor  # (in, n) or (batch, in, n)
    leaving: Tensor  # (batch, out, n, rank)


@dataclass(frozen=True)
class FactoredJacobian:
    """A = S J D: the Jacobian J of a perceptron's outputs, mixed by S for each row of data and
    scaled by D.

    Args:
        parts: of every layer, in the order of the layers; S is in what leaves them. Row (i, r) of A
            is rank r of row i.
        names: the tensors in the order of ``theta``.
        scales: D, a number for every tensor.
    """

    parts: list[Outer]
    names: tuple[str, ...]
    scales: Mapping[str, float]

    @property
    def rows(self) -> int:
        """Number of rows, those of the data times the rank."""
        return math.prod(self.parts[0].leaving.shape[-2:])

    @property
    def matrix(self) -> Tensor:
        """A itself, ``(batch, rows, dim)``, made anew at each call."""
        found = self._zeros()
        for part in self.parts:
            self._add(found, part)
        return found.mT

    def tangent(self, changes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the derivative of A, ``(batch, rows, dim)``, given those of what enters and leaves
        every layer.

        Inputs that networks share, ``(in, n)``, are data and have none.
        """
        found = self._zeros()
        for part, (by_entering, by_leaving) in zip(self.parts, changes, strict=True):
            self._add(found, part._replace(leaving=by_leaving))
            if part.entering.dim() == 3:
                self._add(found, part._replace(entering=by_entering), bias=False)
        return found.mT

    def _zeros(self) -> Tensor:
        """Return what rows are added to, ``(batch, dim, rows)``."""
        first = self.parts[0].leaving
        return first.new_zeros(
            len(first), sum(map(math.prod, self._shapes().values())), self.rows
        )

    def _add(self, found: Tensor, part: Outer, *, bias: bool = True) -> None:
        """Add the rows by the weights of one layer, each number written once."""
        (layer, entering, leaving), views = part, self._split(found.mT)
        # (batch, out, in, n, rank)
        into = views[layer.weight].movedim(1, -1).unflatten(-1, leaving.shape[2:])
        factors = leaving.unsqueeze(2), entering.unsqueeze(-3).unsqueeze(-1)
        into.addcmul_(*factors, value=self.scales[layer.weight])
        if bias and layer.bias is not None:
            views[layer.bias].mT.add_(leaving.flatten(2), alpha=self.scales[layer.bias])

    def __getitem__(self, some: slice) -> FactoredJacobian:
        parts = [
            Outer(layer, entering if entering.dim() == 2 else entering[some], leaving[some])
            for layer, entering, leaving in self.parts
        ]
        return FactoredJacobian(parts, self.names, self.scales)

    def scaled(self, scales: Mapping[str, float]) -> FactoredJacobian:
        """Return A D with other scales."""
        return FactoredJacobian(self.parts, self.names, scales)

    def gram(self) -> Tensor:
        """Return A A^T, ``(batch, rows, rows)``."""
        total: Tensor | None = None
        for layer, entering, leaving in self.parts:
            outer = leaving.flatten(2)
            # (n, n) or (batch, n, n)
            inner = self.scales[layer.weight] ** 2 * (entering.mT @ entering)
            if layer.bias is not None:
                inner = inner + self.scales[layer.bias] ** 2
            product = (
                (outer.mT @ outer)
                .unflatten(2, leaving.shape[2:])
                .unflatten(1, leaving.shape[2:])
            )
            inner = inner.unsqueeze(-1).unsqueeze(-3)
            # Into the memory that is there, where nothing follows: fresh memory costs more than the
            # sums.
            ours = is_untracked_cpu(product, inner)
            product = product.mul_(inner) if ours else product * inner
            total = (
                product
                if total is None
                else total.add_(product)
                if ours
                else total + product
            )
        assert total is not None
        return total.flatten(3).flatten(1, 2)

    def times(self, v: Tensor) -> Tensor:
        """Return A v, ``(batch, dim) -> (batch, rows)``."""
        given = self._split(v)
        total: Tensor | None = None
        for layer, entering, leaving in self.parts:
            # (batch, out, n)
            along = self.scales[layer.weight] * (given[layer.weight] @ entering)
            if layer.bias is not None:
                along = along + self.scales[layer.bias] * given[layer.bias].unsqueeze(-1)
            product = (leaving * along.unsqueeze(-1)).sum(1)
            total = product if total is None else total + product
        assert total is not None
        return total.flatten(1)

    def transposed(self, u: Tensor) -> Tensor:
        """Return A^T u, ``(batch, rows) -> (batch, dim)``."""
        found = {}
        for layer, entering, leaving in self.parts:
            # (batch, out, n)
            back = (leaving * u.unflatten(1, leaving.shape[2:]).unsqueeze(1)).sum(-1)
            found[layer.weight] = self.scales[layer.weight] * (back @ entering.mT).flatten(
                1
            )
            if layer.bias is not None:
                found[layer.bias] = self.scales[layer.bias] * back.sum(-1)
        return torch.cat([found[name] for name in self.names], -1)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return those of the tensors of weights."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, entering, leaving in self.parts:
            shapes[layer.weight] = (leaving.shape[1], entering.shape[-2])
            if layer.bias is not None:
                shapes[layer.bias] = (leaving.shape[1],)
        return shapes

    def _split(self, v: Tensor) -> dict[str, Tensor]:
        """Return the tensors within ``(..., dim)``."""
        shapes = self._shapes()
        pieces = v.split([math.prod(shapes[name]) for name in self.names], -1)
        return {
            name: piece.unflatten(-1, shapes[name])
            for name, piece in zip(self.names, pieces, strict=True)
        }
