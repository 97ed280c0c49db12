"""Standardisation by the training rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bnnflow.arguments import checked, finite, tensor

__all__ = ["Standardiser", "standardise"]


@checked
@dataclass(frozen=True, eq=False)
class Standardiser:
    """The map z = (x - mean) / sd, column by column.

    Attributes:
        mean: ``(features,)``, or ``()`` for one column.
        sd: the same shape, with ddof 0.

    Example:
        >>> import torch
        >>> scaler = Standardiser.fit(torch.tensor([[0.0], [2.0]]))
        >>> scaler.transform(torch.tensor([[4.0]]))
        tensor([[3.]], dtype=torch.float64)
    """

    mean: Tensor
    sd: Tensor

    def __post_init__(self) -> None:
        if self.mean.dim() > 1 or self.mean.shape != self.sd.shape:
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.sd.shape)}"
            raise ValueError(f"mean and sd must both be (features,) or (), got {shapes}")
        finite("mean", self.mean)
        if not bool((finite("sd", self.sd) > 0).all()):
            raise ValueError(f"sd must be positive, got {float(self.sd.min())}")

    @classmethod
    @checked
    def fit(cls, rows: Tensor | np.ndarray) -> Standardiser:
        """Take mean and standard deviation (ddof 0) of the rows, in float64.

        Args:
            rows: ``(n, features)`` or ``(n,)``.

        Raises:
            ValueError: if there are no rows, NaN or infinite values, or columns that do not vary.
        """
        return cls._fit("rows", rows)

    @classmethod
    def _fit(cls, name: str, given: Tensor | np.ndarray) -> Standardiser:
        rows = tensor(name, given).double()
        if rows.dim() not in (1, 2) or rows.numel() == 0:
            raise ValueError(
                f"{name} must be (n, features) or (n,) and not empty, got {tuple(rows.shape)}"
            )
        finite(name, rows)
        mean, sd = rows.mean(0), rows.std(0, correction=0)
        constant = (rows == rows[:1]).all(0).reshape(-1).nonzero().flatten()
        if len(constant):
            columns = ", ".join(str(int(column)) for column in constant)
            raise ValueError(
                f"{name}: these columns are constant over {len(rows)} rows, leave "
                f"them out: {columns}"
            )
        return cls(mean, sd)

    @checked
    def transform(self, rows: Tensor | np.ndarray) -> Tensor:
        """Return standardised rows, float64."""
        return (self._checked(rows) - self.mean) / self.sd

    @checked
    def inverse(self, rows: Tensor | np.ndarray) -> Tensor:
        """Return rows in their own units, float64: ``inverse(transform(x)) == x``."""
        return self._checked(rows) * self.sd + self.mean

    def _checked(self, given: Tensor | np.ndarray) -> Tensor:
        rows = finite("rows", tensor("rows", given).double())
        if rows.shape[rows.dim() - self.mean.dim() :] != self.mean.shape:
            raise ValueError(
                f"rows must end in an axis of length {len(self.mean)}, got shape "
                f"{tuple(rows.shape)}"
            )
        return rows


@checked
def standardise(
    train: Tensor | np.ndarray, *others: Tensor | np.ndarray
) -> tuple[Standardiser, *tuple[Tensor, ...]]:
    """Standardise ``train`` by its own mean and standard deviation, and every other array by the
    same.

    Returns:
        The `Standardiser`, then the arrays as float32.

    Raises:
        ValueError: as `Standardiser.fit`.
    """
    scaler = Standardiser._fit("train", train)
    return scaler, *(scaler.transform(rows).float() for rows in (train, *others))
