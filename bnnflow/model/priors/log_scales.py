"""The scales of weights that are normal around zero, as functions of the parameters of their
prior.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from bnnflow.weights import WeightSpec

__all__ = ["Curved", "GroupScales", "HorseshoeScales", "LogScales", "Shared"]


class Curved(NamedTuple):
    """Log scales of weights, and their derivatives by the parameters: the second is ``bend`` along
    times along.
    """

    log_scales: Tensor  # (batch, weights)
    slope: Tensor  # (batch, weights, parameters)
    bend: Tensor  # (batch, weights)
    along: Tensor  # (weights, parameters)


class Shared(NamedTuple):
    """Scales that many weights share: ``offset`` plus logarithms of a global and a local scale,
    bounded by a slab's.
    """

    owner: Tensor  # (weights,) int64: which of the k scales is a weight's
    # (k, 3) int64: where in theta the three logarithms are, that of c^2 last; -1 for none
    parameters: Tensor
    offset: Tensor  # (k,) float64


class LogScales(ABC):
    """Logarithms of the standard deviations of weights, given the coordinates of their prior's
    parameters.

    ``theta`` are the weights and the parameters, ``(..., weights and parameters)``.
    """

    @abstractmethod
    def __call__(self, theta: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the log scales ``(..., weights)``, and how a gradient by them becomes one by the
        parameters.
        """

    @abstractmethod
    def curved(self, theta: Tensor) -> Curved:
        """Return the log scales and their derivatives by the parameters."""

    @property
    def own(self) -> Tensor | None:
        """Weights, and of each a parameter that no other has, ``(2, k)`` int64.

        None for no such pairs.
        """
        return None

    @property
    def shared(self) -> Shared | None:
        """The same as the compiled density knows them; None if it does not."""
        return None

    def to(self, device: torch.device | str) -> Self:
        """Return the same on another device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device) if isinstance(value, Tensor) else value)
        return moved


class GroupScales(LogScales):
    """One scale for every group of weights: a constant, times one of the parameters or alone.

    Args:
        owner: the group of every weight, ``(weights,)`` int64.
        parameter: which parameter is a group's, ``(groups,)`` int64; -1 for none.
        log_factors: the logarithm of each group's constant, ``(groups,)`` float64.
    """

    def __init__(self, owner: Tensor, parameter: Tensor, log_factors: Tensor) -> None:
        self._owner, self._parameter, self._log_factors = owner, parameter, log_factors
        # of every weight; groups without a parameter take a zero behind the others
        count = int(parameter.max()) + 1
        self._own = torch.where(parameter < 0, count, parameter)[owner]
        self._log_factor = log_factors[owner]

    def __call__(self, theta: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the log scales ``(..., network dim)``, and how a gradient by them becomes one by
        the parameters.
        """
        logs = torch.nn.functional.pad(theta[..., len(self._owner) :], (0, 1))

        def vjp(grad: Tensor) -> Tensor:
            total = grad.new_zeros(*grad.shape[:-1], logs.shape[-1])
            return total.index_add(-1, self._own, grad)[..., :-1]

        return logs.index_select(-1, self._own) + self._log_factor.to(theta.dtype), vjp

    @property
    def shared(self) -> Shared:
        """One scale for every group."""
        none = torch.full_like(self._parameter, -1)
        where = torch.where(self._parameter < 0, none, len(self._owner) + self._parameter)
        return Shared(self._owner, torch.stack([where, none, none], 1), self._log_factors)

    def curved(self, theta: Tensor) -> Curved:
        """Return the log scales and their derivatives by the parameters."""
        size = len(self._owner)
        parameters = torch.arange(theta.shape[-1] - size, device=theta.device)
        each = (self._parameter[self._owner, None] == parameters).to(theta.dtype)
        none = theta.new_zeros(*theta.shape[:-1], size)
        return Curved(self(theta)[0], each.expand(*theta.shape[:-1], -1, -1), none, each)


class HorseshoeScales(LogScales):
    """Global, local and slab scales, as under `Horseshoe`.

    Args:
        spec: the layout of the weights and the prior's parameters.
        bias_scale: standard deviation of the biases, which is fixed.
    """

    def __init__(self, spec: WeightSpec, bias_scale: float) -> None:
        network = spec.network
        self._size = network.dim
        self._of_biases = torch.full(
            (network.dim,), math.log(bias_scale), dtype=torch.float64
        )
        places, owners = [], []
        for name, where in network.slices.items():
            shape = network.shapes[name]
            if len(shape) > 1:
                self._of_biases[where] = 0.0
                places.append(torch.arange(where.start, where.stop))
                indices = []
                for kind in ("global", "local", "slab"):
                    extra = f"prior.log_{kind}.{name}"
                    at = (
                        torch.arange(spec.slices[extra].start, spec.slices[extra].stop)
                        - network.dim
                    )
                    at = at.reshape(spec.shapes[extra]) if kind == "local" else at
                    indices.append(at.expand(shape).flatten())
                owners.append(torch.stack(indices))
        self._places = torch.cat(places)  # (matrix entries,)
        self._owners = torch.cat(owners, 1)  # (3, matrix entries)
        local = self._owners[1]
        alone = local.bincount()[local] == 1
        self._own = torch.stack([self._places[alone], local[alone]])

    def __call__(self, theta: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the log scales ``(..., network dim)``, and how a gradient by them becomes one by
        the parameters.
        """
        logs = theta[..., self._size :]
        tau, local, slab = (logs.index_select(-1, owner) for owner in self._owners)
        wide = 2 * (tau + local)  # log variance without the slab
        # 1 / variance = 1 / c^2 + 1 / (tau l)^2
        of_matrices = -0.5 * torch.logaddexp(-slab, -wide)
        # of the variance's change that follows tau and l, not c
        share = torch.sigmoid(slab - wide)

        def vjp(grad: Tensor) -> Tensor:
            grad = grad.index_select(-1, self._places)
            parts = (grad * share, grad * share, 0.5 * grad * (1 - share))
            total = grad.new_zeros(*grad.shape[:-1], logs.shape[-1])
            for owner, part in zip(self._owners, parts, strict=True):
                total = total.index_add(-1, owner, part)
            return total

        fixed = self._of_biases.to(theta.dtype).expand(*theta.shape[:-1], -1)
        return fixed.index_add(-1, self._places, of_matrices), vjp

    @property
    def own(self) -> Tensor | None:
        """Weights with a local scale of their own: all of them, or those of units that one other
        reads.
        """
        return self._own if self._own.numel() else None

    @property
    def shared(self) -> Shared:
        """One scale for all weights with the same three parameters, and one for the biases."""
        parameters = torch.full((self._size, 3), -1)
        parameters[self._places] = self._size + self._owners.T
        kinds, owner = torch.cat(
            [parameters, self._of_biases.view(torch.int64).unsqueeze(1)], 1
        ).unique(dim=0, return_inverse=True)
        return Shared(
            owner, kinds[:, :3].contiguous(), kinds[:, 3].contiguous().view(torch.float64)
        )

    def curved(self, theta: Tensor) -> Curved:
        """Return the log scales and their derivatives by the parameters."""
        logs = theta[..., self._size :]
        tau, local, slab = (logs.index_select(-1, owner) for owner in self._owners)
        share = torch.sigmoid(slab - 2 * (tau + local))
        places, size = self._places, logs.shape[-1]
        along = theta.new_zeros(self._size, size)
        slope = theta.new_zeros(*theta.shape[:-1], self._size, size)
        for owner, part, weight in zip(
            self._owners, (share, share, 0.5 * (1 - share)), (2.0, 2.0, -1.0), strict=True
        ):
            along[places, owner] = weight
            slope[..., places, owner] = part
        bend = torch.zeros_like(theta[..., : self._size]).index_add(
            -1, places, -0.5 * share * (1 - share)
        )
        return Curved(self(theta)[0], slope, bend, along)
