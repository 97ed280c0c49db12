"""Neural networks over the weights of neural networks."""

from bnnflow.equivariant.layers import DWSInvariant, DWSLayer
from bnnflow.equivariant.network import DWSNet

__all__ = ["DWSInvariant", "DWSLayer", "DWSNet"]
