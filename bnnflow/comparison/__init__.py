"""Several models of the same data: how well each predicts rows that it has not seen, and all of
them together.
"""

from bnnflow.comparison.models import ModelComparison, Score, compare
from bnnflow.comparison.weights import pseudo_bma, stacking

__all__ = ["ModelComparison", "Score", "compare", "pseudo_bma", "stacking"]
