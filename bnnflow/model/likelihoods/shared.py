"""What likelihoods have in common."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import special
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

__all__ = [
    "LOG_2PI",
    "Parameters",
    "StudentTable",
    "by_scipy",
    "check_owners",
    "dispersion_of",
    "half_normal",
    "over_rows",
    "positive_targets",
    "repeated",
    "student_constant",
    "student_log_density",
    "student_pull",
    "student_slope",
]


LOG_2PI = math.log(2 * math.pi)
# half the degrees of freedom beyond which Stirling's series are right to 1e-13
_MANY = 200.0
Parameters = dict[str, Tensor] | None


def half_normal() -> Distribution:
    """Return the usual prior of a learned scale."""
    return td.HalfNormal(torch.tensor(1.0, dtype=torch.float64))


def by_scipy(function: np.ufunc, *values: Tensor) -> Tensor:
    """Evaluate a special function that torch lacks, in float64 and without derivatives."""
    arrays = [value.detach().double().cpu().numpy() for value in values]
    return torch.as_tensor(function(*arrays)).to(values[0])


def check_owners(parameters: dict[str, Distribution], n_outputs: int) -> None:
    """Raise unless every parameter is one for all outputs, or one for each."""
    for name, prior in parameters.items():
        shape = tuple(prior.batch_shape)
        if shape not in ((), (1,), (n_outputs,)):
            raise ValueError(
                f"{name}_prior must have shape () or ({n_outputs},), one for each "
                f"output, got {shape}"
            )


def over_rows(terms: Tensor, parameter: Tensor) -> Tensor:
    """Sum ``(..., n, out)`` over rows, and over outputs if they share the parameter, to its
    ``(..., 1 or out)``.
    """
    return terms.sum((-1, -2)).unsqueeze(-1) if parameter.shape[-1] == 1 else terms.sum(-2)


def repeated(each: float, outputs: Tensor, parameter: Tensor) -> Tensor:
    """Return as many times ``each`` as there are entries of outputs for one of the parameter,
    ``(..., 1 or out)``.
    """
    size = parameter.shape[-1]
    return torch.full_like(
        outputs[..., 0, :size], each * outputs.shape[-2] * (outputs.shape[-1] // size)
    )


def positive_targets(y: Tensor) -> Tensor:
    """Return targets ``(n, targets)`` if all of them are positive."""
    wrong = (y <= 0).any(-1).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"y in row {row} is {float(y[row].min()):g}: it must be positive")
    return y


def dispersion_of(
    given: float | None, outputs: Tensor, parameters: dict[str, Tensor]
) -> Tensor:
    """Return a dispersion that is given, or learned, to be broadcast with outputs."""
    if given is not None:
        return torch.as_tensor(given, dtype=outputs.dtype, device=outputs.device)
    return parameters["dispersion"].unsqueeze(-2)  # (..., 1, 1)


def student_constant(df: Tensor) -> Tensor:
    """Return the log density of Student's t at zero."""
    half = df.double() / 2  # single precision would lose the difference
    exact = torch.lgamma(half + 0.5) - torch.lgamma(half) - 0.5 * half.log()
    inverse = 1 / half
    series = inverse * (-1 / 8 + inverse**2 / 192)  # where double precision would, too
    return (torch.where(half > _MANY, series, exact) - 0.5 * LOG_2PI).to(df)


def student_slope(df: Tensor) -> Tensor:
    """Return the derivative of `student_constant` by df."""
    half = df.double() / 2
    exact = torch.digamma(half + 0.5) - torch.digamma(half) - 0.5 / half
    inverse = 1 / half
    series = inverse**2 * (1 / 8 - inverse**2 / 64)
    return (torch.where(half > _MANY, series, exact) / 2).to(df)


def student_log_density(z: Tensor, df: Tensor) -> Tensor:
    """Return the log density of Student's t."""
    return student_constant(df) - 0.5 * (df + 1) * (z * z / df).log1p()


def student_pull(z: Tensor, df: Tensor) -> Tensor:
    """Return minus its derivative by z: bounded, an outlier pulls less the farther it lies."""
    return (df + 1) * z / (df + z * z)


class StudentTable:
    """Student's cdf for each of several degrees of freedom, tabulated: the exact function would
    take most of the time of an interval.

    Cubics with the right slopes in arsinh z are off by less than 2e-8; there are no derivatives.

    Args:
        df: degrees of freedom, ``()`` or ``(..., 1, 1)``.
    """

    _REACH, _CELLS = math.asinh(1e7), 1024  # beyond, less than 1e-13 is left

    def __init__(self, df: Tensor) -> None:
        df = df.detach().double().reshape(-1, 1)
        self._cell = 2 * self._REACH / self._CELLS
        nodes = torch.linspace(
            -self._REACH,
            self._REACH,
            self._CELLS + 1,
            dtype=torch.float64,
            device=df.device,
        )
        z = nodes.sinh()
        self._values = by_scipy(special.stdtr, df.expand(-1, len(z)), z.expand(len(df), -1))
        density = student_log_density(z, df).exp()
        self._slopes = density * nodes.cosh() * self._cell  # by cells

    def __call__(self, z: Tensor) -> Tensor:
        """Return P(t <= z), ``(..., n, out)``."""
        where = ((z.detach().double().asinh() + self._REACH) / self._cell).clamp(
            0, self._CELLS - 1e-9
        )
        left = where.floor()  # of NaN any: what comes of it is NaN
        u = where - left
        left = left.nan_to_num(0.0).long().reshape(len(self._values), -1)

        def at(table: Tensor, shift: int) -> Tensor:
            return table.gather(1, left + shift).reshape(z.shape)

        low, first, last = at(self._values, 0), at(self._slopes, 0), at(self._slopes, 1)
        rise = at(self._values, 1) - low
        bend = 3 * rise - 2 * first - last
        return (low + u * (first + u * (bend + u * (first + last - 2 * rise)))).to(z)
