"""Neural networks over the weights of neural networks."""

from bnnflow.equivariant.graph import GraphNet
from bnnflow.equivariant.inr import (
    INRs,
    fit_images,
    fit_inrs,
    image_grid,
    render,
    siren,
    warp,
)
from bnnflow.equivariant.layers import DWSInvariant, DWSLayer
from bnnflow.equivariant.network import DWSNet, Wiring
from bnnflow.equivariant.scaling import TensorScaler
from bnnflow.equivariant.signed import SignedDWSNet

__all__ = [
    "DWSInvariant",
    "DWSLayer",
    "DWSNet",
    "GraphNet",
    "INRs",
    "SignedDWSNet",
    "TensorScaler",
    "Wiring",
    "fit_images",
    "fit_inrs",
    "image_grid",
    "render",
    "siren",
    "warp",
]
