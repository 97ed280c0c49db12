"""Several models of the same data: how well each predicts rows that it has not seen, and all of
them together.
"""

from bnnflow.comparison.models import (
    Difference,
    ModelComparison,
    Score,
    compare,
    difference,
)
from bnnflow.comparison.priors import PriorMixture, mix_priors
from bnnflow.comparison.weights import pseudo_bma, stacking

__all__ = [
    "Difference",
    "ModelComparison",
    "PriorMixture",
    "Score",
    "compare",
    "difference",
    "mix_priors",
    "pseudo_bma",
    "stacking",
]
