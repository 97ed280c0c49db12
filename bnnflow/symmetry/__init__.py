"""Canonical forms and alignment of networks modulo their symmetries."""

from bnnflow.symmetry.matching import align, match, sort_units

__all__ = ["align", "match", "sort_units"]
