"""Standardisation by the training rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Standardiser", "standardise"]


@dataclass(frozen=True, eq=False)
class Standardiser:
    """The map z = (x - mean) / sd, column by column.

    Attributes:
        mean: ``(features,)``, or ``()`` for one column.
        sd: the same shape, with ddof 0.

    Example:
        >>> scaler = Standardiser.fit(torch.tensor([[0.0], [2.0]]))
        >>> scaler.transform(torch.tensor([[4.0]]))
        tensor([[3.]], dtype=torch.float64)
    """

    mean: Tensor
    sd: Tensor

    @classmethod
    def fit(cls, rows: Tensor | np.ndarray) -> Standardiser:
        """Take mean and standard deviation (ddof 0) of the rows, in float64.

        Args:
            rows: ``(n, features)`` or ``(n,)``.

        Raises:
            ValueError: if there are no rows, NaN or infinite values, or columns that do not vary.
        """
        rows = torch.as_tensor(rows).double()
        if rows.dim() not in (1, 2) or len(rows) == 0:
            raise ValueError(f"rows must be (n, features) or (n,) and not empty, got {tuple(rows.shape)}")
        if not bool(rows.isfinite().all()):
            raise ValueError("rows have NaN or infinite values")
        mean, sd = rows.mean(0), rows.std(0, correction=0)
        constant = (rows == rows[:1]).all(0).reshape(-1).nonzero().flatten()
        if len(constant):
            columns = ", ".join(str(int(column)) for column in constant)
            raise ValueError(f"these columns are constant over the {len(rows)} rows, leave them out: {columns}")
        return cls(mean, sd)

    def transform(self, rows: Tensor | np.ndarray) -> Tensor:
        """Return standardised rows, float64."""
        return (torch.as_tensor(rows).double() - self.mean) / self.sd

    def inverse(self, rows: Tensor | np.ndarray) -> Tensor:
        """Return rows in their own units, float64: ``inverse(transform(x)) == x``."""
        return torch.as_tensor(rows).double() * self.sd + self.mean


def standardise(train: Tensor | np.ndarray, *others: Tensor | np.ndarray) -> tuple[Standardiser, *tuple[Tensor, ...]]:
    """Standardise ``train`` by its own mean and standard deviation, and every other array by the same.

    Returns:
        The `Standardiser`, then the arrays as float32.

    Raises:
        ValueError: as `Standardiser.fit`.
    """
    scaler = Standardiser.fit(train)
    return scaler, *(scaler.transform(rows).float() for rows in (train, *others))
