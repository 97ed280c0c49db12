"""Which likelihood fits the targets of a regression: by name, or by what the targets look like."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from bnnflow.model import likelihoods
from bnnflow.model.likelihoods import Likelihood

__all__ = ["NAMES", "Choice", "choose"]

NAMES = (
    "auto",
    "heteroscedastic",
    "heteroscedastic_student",
    "normal",
    "student",
    "lognormal",
    "gamma",
    "poisson",
    "negative_binomial",
    "ordinal",
)

_REAL = {  # and outputs a target
    "normal": (likelihoods.Gaussian, 1),
    "student": (likelihoods.StudentT, 1),
    "heteroscedastic": (likelihoods.HeteroscedasticGaussian, 2),
    "heteroscedastic_student": (likelihoods.HeteroscedasticStudentT, 2),
}
_ROBUST = (
    "student",
    "heteroscedastic_student",
)  # whose units a few values far out must not set
_WILD = 10.0  # standard deviations of the middle half, beyond which such values make that of all
_FEW = 12  # whole numbers that are levels rather than a scale
_SKEWED = 2.0  # skewness of positive targets above which their logarithm is modelled


class Choice(NamedTuple):
    """A likelihood, how many outputs of the network it takes, and why it was chosen."""

    likelihood: Likelihood
    outputs: int
    why: str


def choose(name: str | Likelihood, y: np.ndarray) -> Choice:
    """Return the likelihood called ``name`` for targets ``(n, targets)``.

    Raises:
        ValueError: if the targets are not what it is for.
    """
    targets = y.shape[1]
    if isinstance(name, Likelihood):
        return Choice(name, _outputs_of(name, targets), "as given")
    why = "as asked"
    if name == "auto":
        name, why = _by_looks(y)
    if name == "ordinal":
        return Choice(likelihoods.Levels(_levels(y)), 1, why)
    if name in ("poisson", "negative_binomial"):
        kind = likelihoods.Poisson if name == "poisson" else likelihoods.NegativeBinomial
        return Choice(kind(), targets, why)
    if name == "gamma":
        scale = tuple(np.abs(y).mean(0))
        return Choice(
            likelihoods.Standardised(likelihoods.Gamma(), 0.0, scale), targets, why
        )
    if name == "lognormal":
        if (y <= 0).any():
            raise ValueError(f"likelihood='lognormal' needs positive y, got {y.min():g}")
        # one noise for all rows: where it varied, means of y, exp(m + s^2 / 2), would be wild
        base = _standardised(likelihoods.Gaussian(), np.log(y))
        return Choice(likelihoods.LogNormal(base), targets, why)
    base, outputs = _REAL[name]
    wild = _is_wild(y) if name in _ROBUST else np.zeros(targets, bool)
    if wild.any():
        why += "; a few values lie so far out that the middle half sets its units"
    return Choice(_standardised(base(), y, wild), outputs * targets, why)


def _by_looks(y: np.ndarray) -> tuple[str, str]:
    distinct = min(len(np.unique(column)) for column in y.T)
    whole = bool((y == np.floor(y)).all()) and float(np.abs(y).max()) < 2**53
    if whole and distinct <= _FEW and y.shape[1] == 1:
        return "ordinal", (
            f"y has {distinct} values, all whole: levels, whose probabilities are modelled (the "
            "density of a continuous law could be made as large as one likes)"
        )
    if whole and y.min() >= 0 and distinct <= len(y) / 10 and y.max() <= 10_000:
        return (
            "negative_binomial",
            "y are counts: whole numbers from 0, many of them repeated",
        )
    skewness = stats.skew(y)
    if y.min() > 0 and skewness.min() > _SKEWED:
        return (
            "lognormal",
            f"y is positive with a long tail (skewness {skewness.min():.1f})",
        )
    why = "y is continuous; its noise may differ from row to row, and have heavy tails"
    if distinct <= len(y) / 10:
        why += f" (it has {distinct} values only, of which narrow densities could make too much)"
    return "heteroscedastic_student", why


def _standardised(
    base: Likelihood, y: np.ndarray, wild: np.ndarray | bool = False
) -> Likelihood:
    """Return a likelihood of standardised targets, ``wild`` ones by median and quartiles."""
    centre = np.where(wild, np.median(y, 0), y.mean(0))
    scale = np.where(wild, _middle(y), y.std(0))
    return likelihoods.Standardised(base, tuple(centre), tuple(scale))


def _is_wild(y: np.ndarray) -> np.ndarray:
    """Say of each target whether a few values make its standard deviation."""
    middle = _middle(y)
    return (middle > 0) & (y.std(0) > _WILD * middle)


def _middle(y: np.ndarray) -> np.ndarray:
    """Return the standard deviation of a normal law with these quartiles."""
    low, high = np.quantile(y, [0.25, 0.75], axis=0)
    return (high - low) / 1.349


def _levels(y: np.ndarray) -> tuple[float, ...]:
    if y.shape[1] != 1:
        raise ValueError(f"likelihood='ordinal' takes one target, got {y.shape[1]}")
    levels = np.unique(y)
    if (levels != np.floor(levels)).any():
        raise ValueError(
            f"likelihood='ordinal' needs whole numbers as levels, got {levels[:5]}"
        )
    if 2 < levels[-1] - levels[0] < 2 * _FEW:  # those between them can come, too
        levels = np.arange(levels[0], levels[-1] + 1)
    return tuple(levels)


def _outputs_of(likelihood: Likelihood, targets: int) -> int:
    """Return the number of outputs with which a likelihood takes so many targets."""
    for outputs in (targets, 2 * targets, 1):
        with contextlib.suppress(ValueError):
            likelihood.validate(torch.ones(2, targets), outputs)
            return outputs
    raise ValueError(f"{likelihood.name} does not take {targets} targets")
