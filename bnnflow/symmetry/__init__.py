"""Canonical forms and alignment of networks modulo their symmetries."""

from bnnflow.symmetry.alignment import align, frechet_mean
from bnnflow.symmetry.canonical import normalise_scale, normalise_sign, sort_units
from bnnflow.symmetry.connectivity import (
    Barrier,
    Curve,
    Geodesic,
    Path,
    Plane,
    barrier,
    barrier_along,
    fit_curve,
    loss_plane,
)
from bnnflow.symmetry.matching import match, match_activations
from bnnflow.symmetry.sinkhorn import sinkhorn_rebasin
from bnnflow.symmetry.spheres import Spheres
from bnnflow.symmetry.statistics import NetworkLoss

__all__ = [
    "Barrier",
    "Curve",
    "Geodesic",
    "NetworkLoss",
    "Path",
    "Plane",
    "Spheres",
    "align",
    "barrier",
    "barrier_along",
    "fit_curve",
    "frechet_mean",
    "loss_plane",
    "match",
    "match_activations",
    "normalise_scale",
    "normalise_sign",
    "sinkhorn_rebasin",
    "sort_units",
]
