"""Priors over weights: of fixed distributions, scale mixtures, and learned from trained
networks.
"""

from bnnflow.model.priors.empirical import Empirical
from bnnflow.model.priors.flat import FlatPrior
from bnnflow.model.priors.independent import (
    FanIn,
    Independent,
    Laplace,
    Normal,
    PerTensor,
    StudentT,
    as_prior,
)
from bnnflow.model.priors.prior import FixedPrior, HierarchicalPrior, Prior
from bnnflow.model.priors.scale_mixtures import Hierarchical, Horseshoe, OutputScales

__all__ = [
    "Empirical",
    "FanIn",
    "FixedPrior",
    "FlatPrior",
    "Hierarchical",
    "HierarchicalPrior",
    "Horseshoe",
    "Independent",
    "Laplace",
    "Normal",
    "OutputScales",
    "PerTensor",
    "Prior",
    "StudentT",
    "as_prior",
]

# Under these addresses they are public, and models are identified: files within may be parted
# otherwise.
for _name in __all__:
    globals()[_name].__module__ = __name__
