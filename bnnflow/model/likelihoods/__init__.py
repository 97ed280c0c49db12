"""Likelihoods: the density of one row of data given the network's outputs.

Each is a small frozen class. ``outputs`` is ``(..., n, out)``; a learned parameter comes as a
positive tensor ``(..., *shape)``, ``(..., 1)`` for a scalar, in ``parameters`` and is
differentiated through its logarithm. ``score`` and ``fisher_factor`` are the first and second
derivatives in closed form; both stay differentiable.
"""

from bnnflow.model.likelihood import Likelihood
from bnnflow.model.likelihoods.classes import Bernoulli, Categorical, Ordinal
from bnnflow.model.likelihoods.counts import Levels, NegativeBinomial, Poisson
from bnnflow.model.likelihoods.positive import Gamma
from bnnflow.model.likelihoods.real import (
    Gaussian,
    HeteroscedasticGaussian,
    HeteroscedasticStudentT,
    StudentT,
)
from bnnflow.model.likelihoods.transformed import LogNormal, Standardised

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gamma",
    "Gaussian",
    "HeteroscedasticGaussian",
    "HeteroscedasticStudentT",
    "Levels",
    "Likelihood",
    "LogNormal",
    "NegativeBinomial",
    "Ordinal",
    "Poisson",
    "Standardised",
    "StudentT",
]

# Their homes are no part of their names: what is stored or compared names them by this package.
for _name in __all__:
    if _name != "Likelihood":
        globals()[_name].__module__ = __name__
