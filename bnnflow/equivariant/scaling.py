"""Standardisation of weights by one mean and one standard deviation for each tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnnflow.arguments import checked, finite
from bnnflow.weights import WeightSpec

__all__ = ["TensorScaler"]


@checked
class TensorScaler(nn.Module):
    """Standardise weights with one mean and one standard deviation for each tensor.

    All entries of a tensor share the two numbers: statistics of single entries would not move with
    a permutation of hidden units and break the equivariance of whatever follows. A fresh scaler
    changes nothing; `fit` estimates the statistics, which are part of the state dict.

    Args:
        spec: the weight space.

    Example:
        >>> spec = WeightSpec.of(nn.Linear(3, 2))
        >>> theta = torch.arange(16.0).reshape(2, 8)
        >>> scaler = TensorScaler.fit(theta, spec)
        >>> round(float(scaler(theta)[:, :6].std(correction=0)), 5)
        1.0
    """

    def __init__(self, spec: WeightSpec) -> None:
        super().__init__()
        self.mean: Tensor
        self.sd: Tensor
        self._tensor: Tensor
        sizes = torch.tensor([where.stop - where.start for where in spec.slices.values()])
        self.register_buffer("mean", torch.zeros(len(sizes)))
        self.register_buffer("sd", torch.ones(len(sizes)))
        self.register_buffer(
            "_tensor", torch.arange(len(sizes)).repeat_interleave(sizes), persistent=False
        )

    @classmethod
    @checked
    def fit(cls, theta: Tensor, spec: WeightSpec) -> TensorScaler:
        """Return the scaler of weights ``(..., dim)``; a constant tensor keeps its scale.

        Raises:
            ValueError: if there are no weights, of another length, or not finite.
        """
        finite("theta", spec.check(theta))
        if theta.numel() == 0:
            raise ValueError("theta must hold at least one network")
        scaler = cls(spec).to(theta)
        parts = [theta[..., where].double() for where in spec.slices.values()]
        sd = torch.stack([part.std(correction=0) for part in parts])
        scaler.mean.copy_(torch.stack([part.mean() for part in parts]))
        # of which rounding alone leaves a share
        largest = torch.stack([part.abs().max() for part in parts])
        scaler.sd.copy_(torch.where(sd > torch.finfo(theta.dtype).eps * largest, sd, 1.0))
        return scaler

    def forward(self, theta: Tensor) -> Tensor:
        """Standardise ``(..., dim)``."""
        return (theta - self.mean[self._tensor]) / self.sd[self._tensor]

    def inverse(self, theta: Tensor) -> Tensor:
        """Undo `forward`."""
        return theta * self.sd[self._tensor] + self.mean[self._tensor]
