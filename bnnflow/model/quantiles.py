"""Normal coordinates of families whose inverse cdf torch does not have: Student-t, gamma and their
kin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributions as td
from torch import Tensor

__all__ = ["FAMILIES", "QuantileTable"]

# standard deviations that the table covers; beyond, its last polynomials go on
_REACH = 9.0
_CELLS = 4096  # cubic splines over these are right to 1e-10


class _Family(NamedTuple):
    """How a family is a shape, a location and a scale away from a standard variable."""

    scipy: str  # its name in scipy.stats
    parts: Callable[[Any], tuple[Tensor, Tensor, Tensor]]  # shape, location, scale


def _student(d: td.StudentT) -> tuple[Tensor, Tensor, Tensor]:
    return d.df, d.loc, d.scale


def _gamma(d: td.Gamma) -> tuple[Tensor, Tensor, Tensor]:
    return d.concentration, torch.zeros_like(d.rate), 1 / d.rate


def _inverse_gamma(d: td.InverseGamma) -> tuple[Tensor, Tensor, Tensor]:
    return d.concentration, torch.zeros_like(d.rate), d.rate


def _chi_squared(d: td.Chi2) -> tuple[Tensor, Tensor, Tensor]:
    return d.df, torch.zeros_like(d.df), torch.ones_like(d.df)


FAMILIES: dict[type, _Family] = {
    td.StudentT: _Family("t", _student),
    td.Gamma: _Family("gamma", _gamma),
    td.InverseGamma: _Family("invgamma", _inverse_gamma),
    td.Chi2: _Family("chi2", _chi_squared),
}


class QuantileTable:
    """The increasing map between a distribution and N(0, 1), by splines through scipy's quantiles.

    Positive families are tabulated by their logarithm, Student-t by its inverse hyperbolic sine, so
    that relative accuracy holds in both tails. Differentiable again and in forward mode.

    Args:
        distribution: of one of `FAMILIES`, with parameters ``(k,)``.

    Raises:
        ValueError: if quantiles underflow: a shape so small that much of the mass is at zero.
    """

    def __init__(self, distribution: td.Distribution) -> None:
        import scipy.special
        import scipy.stats
        from scipy.interpolate import CubicSpline

        family = FAMILIES[type(distribution)]
        shape, self._loc, self._scale = (
            part.double() for part in family.parts(distribution)
        )
        self._signed = family.scipy == "t"
        # the owner of each coordinate, (k,)
        shapes, self._owner = shape.unique(return_inverse=True)
        nodes = torch.linspace(-_REACH, _REACH, _CELLS + 1, dtype=torch.float64)
        lower = nodes <= 0
        p = scipy.special.ndtr(-nodes.abs().numpy())  # torch's is zero at -9
        heights, coefficients = [], []
        for value in shapes.tolist():
            standard = getattr(scipy.stats, family.scipy)(value)
            quantiles = torch.where(
                lower, torch.as_tensor(standard.ppf(p)), torch.as_tensor(standard.isf(p))
            )
            height = quantiles.asinh() if self._signed else quantiles.log()
            if not bool(height.isfinite().all()):
                name = type(distribution).__name__
                raise ValueError(
                    f"the quantiles of a {name} prior of shape {value:g} underflow: "
                    "no normal coordinates"
                )
            heights.append(height)
            # (cells, 4)
            coefficients.append(
                torch.as_tensor(CubicSpline(nodes.numpy(), height.numpy()).c.copy()).T
            )
        device = shape.device
        self._heights = torch.stack(heights).to(device)  # (shapes, cells + 1)
        self._coefficients = torch.stack(coefficients).to(device)  # (shapes, cells, 4)

    def from_normal(self, z: Tensor) -> Tensor:
        """Map ``(..., k)`` float64 to values, those of positive families to their logarithms."""
        height = self._height(z, self._cell(z))
        return (
            self._loc + self._scale * height.sinh()
            if self._signed
            else height + self._scale.log()
        )

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and second derivative of `from_normal`, ``(..., k)`` float64 each.

        Differentiable again.
        """
        cell = self._cell(z)
        a, b, *_ = self._coefficients[self._owner, cell].unbind(-1)
        slope, bend = self._slope(z, cell), 6 * a * (z - self._left(cell)) + 2 * b
        if not self._signed:
            return slope, bend
        height = self._height(z, cell)
        first = self._scale * height.cosh() * slope
        return first, self._scale * (height.sinh() * slope * slope + height.cosh() * bend)

    def to_normal(self, value: Tensor) -> Tensor:
        """Map values ``(..., k)`` float64, the logarithms of positive ones, to normal
        coordinates.
        """
        height = (
            ((value - self._loc) / self._scale).asinh()
            if self._signed
            else value - self._scale.log()
        )
        fixed = height.detach()
        cell = self._cell_of_height(fixed)
        z = self._left(cell) + 0.5 * self._width
        for _ in range(6):
            z = z - (self._height(z, cell) - fixed) / self._slope(z, cell)
        z = z.detach()
        # carries the derivative
        return z - (self._height(z, cell) - height) / self._slope(z, cell)

    @property
    def _width(self) -> float:
        return 2 * _REACH / _CELLS

    def _left(self, cell: Tensor) -> Tensor:
        return cell * self._width - _REACH

    def _cell(self, z: Tensor) -> Tensor:
        return ((z + _REACH) / self._width).floor().clamp(0, _CELLS - 1).long()

    def _cell_of_height(self, height: Tensor) -> Tensor:
        """Return the cell of the table in which each height lies, by bisection: 12 halvings of
        4,096.
        """
        low = torch.zeros_like(height, dtype=torch.long)
        step = _CELLS // 2
        while step >= 1:
            further = low + step
            low = torch.where(self._heights[self._owner, further] <= height, further, low)
            step //= 2
        return low

    def _height(self, z: Tensor, cell: Tensor) -> Tensor:
        a, b, c, d = self._coefficients[self._owner, cell].unbind(-1)
        u = z - self._left(cell)
        return ((a * u + b) * u + c) * u + d

    def _slope(self, z: Tensor, cell: Tensor) -> Tensor:
        a, b, c, _ = self._coefficients[self._owner, cell].unbind(-1)
        u = z - self._left(cell)
        return (3 * a * u + 2 * b) * u + c
