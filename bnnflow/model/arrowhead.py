"""Derivatives of coordinates in which weights meet no other weights, only the parameters of their
prior.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Arrowhead", "Bend", "Pairs"]


class Arrowhead(NamedTuple):
    """Matrices with a diagonal, and whole columns for the parameters of the prior, which follow the
    weights.

    Entry (i, j) is ``diagonal[i]`` for i = j and ``columns[i, j - weights]`` where i is one of the
    weights and j one of the parameters. Without such parameters ``columns`` is None, and the matrix
    diagonal.
    """

    diagonal: Tensor  # (batch, dim)
    columns: Tensor | None  # (batch, weights, parameters)
    # (2, k) int64: weights, and for each a parameter of which all other weights know nothing
    own: Tensor | None = None

    @property
    def _parts(self) -> tuple[slice, slice]:
        """Where the weights are, and where the parameters."""
        assert self.columns is not None
        weights, parameters = self.columns.shape[1:]
        return slice(0, weights), slice(weights, weights + parameters)

    def times(self, v: Tensor) -> Tensor:
        """Return T v, ``(batch, dim)``."""
        image = self.diagonal * v
        if self.columns is None:
            return image
        weights, parameters = self._parts
        along = (self.columns @ v[:, parameters].unsqueeze(-1)).squeeze(-1)
        return torch.cat([image[:, weights] + along, image[:, weights.stop :]], 1)

    def right(self, matrix: Tensor) -> Tensor:
        """Return M T, ``(batch, rows, dim)``."""
        image = matrix * self.diagonal.unsqueeze(-2)
        if self.columns is None:
            return image
        weights, parameters = self._parts
        along = image[..., parameters] + matrix[..., weights] @ self.columns
        return torch.cat([image[..., weights], along, image[..., parameters.stop :]], -1)

    def both(self, matrix: Tensor) -> Tensor:
        """Return T^T M T, ``(batch, dim, dim)``."""
        return self.left(self.right(matrix))

    def of_weights(self, matrix: Tensor) -> Tensor:
        """Return T^T M T, ``(batch, dim, dim)``, of a symmetric M ``(batch, weights, weights)``,
        zero elsewhere.
        """
        count, dim = matrix.shape[-1], self.diagonal.shape[-1]
        scales = self.diagonal[:, :count]
        inner = matrix * scales.unsqueeze(-2) * scales.unsqueeze(-1)
        if count == dim:
            return inner
        found = matrix.new_zeros(len(matrix), dim, dim)
        found[:, :count, :count] = inner
        if self.columns is not None:
            weights, parameters = self._parts
            image = matrix @ self.columns
            across = image * scales.unsqueeze(-1)
            found[:, weights, parameters] = across
            found[:, parameters, weights] = across.mT
            found[:, parameters, parameters] = self.columns.mT @ image
        return found

    def left(self, matrix: Tensor) -> Tensor:
        """Return T^T M, ``(batch, dim, columns)``."""
        image = matrix * self.diagonal.unsqueeze(-1)
        if self.columns is None:
            return image
        weights, parameters = self._parts
        along = image[:, parameters] + self.columns.mT @ matrix[:, weights]
        return torch.cat([image[:, weights], along, image[:, parameters.stop :]], 1)

    def compact(self) -> tuple[Arrowhead, Pairs | None]:
        """Return T Q without columns of zeros, for rotations Q that the second knows.

        T itself where there are none.

        A weight and a parameter of its own are felt as one number d z + c u. With both turned, the
        first coordinate of each pair is that number over its length and the second has no effect:
        the matrices are that much smaller.
        """
        if self.own is None or self.columns is None:
            return self, None
        (weights, parameters), (count, extra) = self.own, self.columns.shape[1:]
        z, u = self.diagonal[:, weights], self.columns[:, weights, parameters]
        length = torch.hypot(z, u)
        safe = torch.where(length > 0, length, 1)
        pairs = Pairs(
            weights, count + parameters, torch.where(length > 0, z / safe, 1), u / safe
        )
        shared = torch.ones(extra, dtype=torch.bool, device=weights.device)
        shared[parameters] = False
        kept = torch.cat(
            [
                shared.new_ones(count),
                shared,
                shared.new_ones(self.diagonal.shape[1] - count - extra),
            ]
        )
        diagonal = self.diagonal.index_copy(1, weights, length)[:, kept]
        return Arrowhead(diagonal, self.columns[:, :, shared]), pairs


class Pairs(NamedTuple):
    """Rotations of pairs of coordinates: of vectors ``(batch, dim)``, or matrices
    ``(batch, dim, k)``.
    """

    first: Tensor  # (pairs,) int64
    second: Tensor
    cosine: Tensor  # (batch, pairs)
    sine: Tensor

    def solved(self, vectors: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function to all but the second coordinates, turned there and back.

        Those stay as they are.
        """
        cosine, sine = (
            part[(..., *(None,) * (vectors.dim() - 2))] for part in (self.cosine, self.sine)
        )
        kept = torch.ones(vectors.shape[1], dtype=torch.bool, device=vectors.device)
        kept[self.second] = False
        one, other = vectors[:, self.first], vectors[:, self.second]
        turned = vectors.index_copy(1, self.first, cosine * one + sine * other)
        found = torch.empty_like(vectors)
        found[:, kept] = solve(turned[:, kept])
        one, other = found[:, self.first], cosine * other - sine * one
        found[:, self.first], found[:, self.second] = (
            cosine * one - sine * other,
            sine * one + cosine * other,
        )
        return found


class Bend(NamedTuple):
    """Symmetric matrices with such columns, their mirror image, and a block between the parameters.

    Attributes:
        arrow: the diagonal, zero at the parameters, and the columns.
        block: of the parameters, ``(batch, parameters, parameters)``; None without any.
    """

    arrow: Arrowhead
    block: Tensor | None

    def add_to(self, matrix: Tensor) -> None:
        """Add this to matrices ``(batch, dim, dim)``, in their memory."""
        matrix.diagonal(dim1=-2, dim2=-1).add_(self.arrow.diagonal)
        if self.block is None or self.arrow.columns is None:
            return
        weights, parameters = self.arrow._parts
        matrix[:, weights, parameters].add_(self.arrow.columns)
        matrix[:, parameters, weights].add_(self.arrow.columns.mT)
        matrix[:, parameters, parameters].add_(self.block)
