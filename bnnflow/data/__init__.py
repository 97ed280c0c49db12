"""Data sets with fixed splits, and standardisation."""

from bnnflow.data.images import load_images
from bnnflow.data.loaders import Dataset, load
from bnnflow.data.standardise import Standardiser, standardise
from bnnflow.data.synthetic import gap_function, gap_regression

__all__ = [
    "Dataset",
    "Standardiser",
    "gap_function",
    "gap_regression",
    "load",
    "load_images",
    "standardise",
]
