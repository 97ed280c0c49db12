"""Derivatives of coordinates in which weights meet no other weights, only the parameters of their prior."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Arrowhead"]


class Arrowhead(NamedTuple):
    """Matrices with a diagonal, and whole columns for the parameters of the prior, which follow the weights.

    Entry (i, j) is ``diagonal[i]`` for i = j and ``columns[i, j - weights]`` where i is one of the weights and j one of
    the parameters. Without such parameters ``columns`` is None, and the matrix diagonal.
    """

    diagonal: Tensor  # (batch, dim)
    columns: Tensor | None  # (batch, weights, parameters)

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
        """Return T^T M T, ``(batch, dim, dim)``, of a symmetric M ``(batch, weights, weights)``, zero elsewhere."""
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
