"""Perceptrons of one hidden layer, unit by unit, and many data sets at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from bnnflow.activations import Activation
from bnnflow.model.priors import FlatPrior
from bnnflow.model.transported import Transport
from bnnflow.tracing import Layer
from bnnflow.weights import WeightSpec

__all__ = ["DataSets", "Linearised", "Shallow", "affine_layers"]


class DataSets(NamedTuple):
    """Rows of data, a set for each point."""

    x: Tensor  # (batch, rows, inputs)
    y: Tensor  # (batch, rows)
    counted: Tensor  # (batch, rows), one for a row and zero for what fills a shorter set up
    noise: Tensor  # (batch, 1), standard deviation

    def expand(self, batch: int) -> DataSets:
        """Return one data set for each of so many points."""
        return DataSets(*(part.expand(batch, *part.shape[1:]) for part in self))


class Linearised(NamedTuple):
    """Networks around some points, whose outputs and rows are in units of the noise."""

    activations: Tensor  # (batch, units, rows)
    slopes: Tensor  # (batch, units, rows), of the activations
    outputs: Tensor  # (batch, rows), in units of y
    residuals: Tensor  # (batch, rows)
    jacobian: Tensor  # (batch, dim, rows), of the outputs


def affine_layers(spec: WeightSpec) -> tuple[Layer, Layer]:
    """Return the two layers of a perceptron with one hidden layer of odd units and one output.

    Raises:
        ValueError: if it is another network.
    """
    layers = spec.layers
    alike = len(layers) == 2 and layers[0].activation.odd and not spec.extras
    if not alike or None in (layers[0].bias, layers[1].bias):
        raise ValueError(
            "model must have a network of one hidden layer of odd units, such as tanh, with "
            f"biases, and no other parameters, got {spec!r}"
        )
    if (outputs := spec.shapes[layers[1].weight][0]) != 1:
        raise ValueError(f"model must have one output, got {outputs}")
    return layers[0], layers[1]


@dataclass(frozen=True, eq=False)
class Shallow:
    """Networks of one hidden layer of odd units and one output, in the coordinates in which the
    prior is N(0, I), and these in the order of units.

    Attributes:
        units: in the hidden layer.
        inputs: of the network.
        activation: of the units.
        order: where in ``theta`` each weight stands, ``(dim,)``: for one unit after the other its
            incoming weights, its bias and its outgoing weight, and the output's bias at the end.
        scale: the prior's standard deviations in that order, ``(dim,)``.
        transport: from the coordinates to weights, if the prior is its push-forward.
    """

    units: int
    inputs: int
    activation: Activation
    order: Tensor
    scale: Tensor
    transport: Transport | None = None

    @classmethod
    def of(
        cls, spec: WeightSpec, prior: FlatPrior, transport: Transport | None = None
    ) -> Self:
        """Read the network.

        Raises:
            ValueError: if it is another one, or its prior is not normal around zero.
        """
        first, last = affine_layers(spec)
        units, inputs = spec.shapes[first.weight]
        scale = prior.scale
        centre = torch.zeros(1, spec.dim, dtype=prior.dtype, device=prior.device)
        if scale is None or bool((prior.log_prob_and_grad(centre)[1] != 0).any()):
            raise ValueError("model must have a normal prior around zero on all weights")
        at = torch.arange(spec.dim, device=prior.device)
        parts = {name: at[where] for name, where in spec.slices.items()}
        by_unit = [
            parts[first.weight].view(units, inputs),
            parts[str(first.bias)].view(units, 1),
            parts[last.weight].view(units, 1),
        ]
        order = torch.cat([torch.cat(by_unit, 1).flatten(), parts[str(last.bias)]])
        return cls(units, inputs, first.activation, order, scale[order], transport)

    @property
    def dim(self) -> int:
        """Length of a weight vector."""
        return len(self.order)

    @property
    def of_a_unit(self) -> int:
        """Weights of a unit."""
        return self.inputs + 2

    def by_unit(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Part ``(batch, dim)`` into units ``(batch, units, of_a_unit)`` and the output's bias
        ``(batch, 1)``.
        """
        units, bias = z[:, :-1], z[:, -1:]
        return units.reshape(len(z), self.units, self.of_a_unit), bias

    def outputs(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the outputs ``(batch, rows)`` at inputs ``(batch, rows, inputs)``."""
        return self._evaluated(self._weights(z), x)[2]

    def linearised(self, z: Tensor, data: DataSets) -> Linearised:
        """Return the networks around ``(batch, dim)``, on the rows of their own data sets."""
        weights, pulled_back = self._weights_and_pullback(z)
        design, value, outputs, slope, outgoing = self._evaluated(weights, data.x)
        by_outgoing = value
        by_incoming = (outgoing * slope).unsqueeze(2) * design.mT.unsqueeze(1)
        units = torch.cat([by_incoming, by_outgoing.unsqueeze(2)], 2).flatten(1, 2)
        jacobian = torch.cat([units, torch.ones_like(units[:, :1])], 1)
        share = data.counted / data.noise
        return Linearised(
            value * data.counted.unsqueeze(1),
            slope * data.counted.unsqueeze(1),
            outputs,
            (data.y - outputs) * share,
            pulled_back(jacobian) * share.unsqueeze(1),
        )

    def _weights(self, z: Tensor) -> Tensor:
        if self.transport is None:
            return z * self.scale
        return self.transport.forward(z[:, self.order.argsort()])[:, self.order]

    def _weights_and_pullback(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the weights, and what turns derivatives by them, ``(batch, dim, rows)``, into
        those by the coordinates.
        """
        if self.transport is None:
            scale = self.scale.unsqueeze(-1)
            return self._weights(z), lambda by_weights: by_weights * scale
        weights, pullback, *_ = torch.func.vjp(self._weights, z)
        return weights, torch.func.vmap(lambda row: pullback(row)[0], 2, 2)

    def _evaluated(self, weights: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        units, bias = self.by_unit(weights)
        design = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        before = units[..., :-1] @ design.mT
        value = self.activation(before)
        outgoing = units[..., -1:]
        outputs = (outgoing * value).sum(1) + bias
        return design, value, outputs, self.activation.derivative(before, value), outgoing
