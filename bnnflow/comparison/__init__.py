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
from bnnflow.comparison.weights import pseudo_bma, stacking

__all__ = [
    "Difference",
    "ModelComparison",
    "Score",
    "compare",
    "difference",
    "pseudo_bma",
    "stacking",
]
