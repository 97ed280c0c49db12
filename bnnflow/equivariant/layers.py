"""The deep-weight-space layers: every linear map that commutes with permutations of hidden units.

Navon et al. (2023), "Equivariant Architectures for Learning in Deep Weight Spaces". One rule makes the layer: pool
over every subset of the hidden axes, mix channels, broadcast back. In the fused layout that is one product for
everything pooled to the globals, one per hidden layer for its units, and one per matrix between hidden layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnnflow.equivariant.layout import Channels, Fused, Layout
from bnnflow.weights import WeightSpec

__all__ = ["DWSInvariant", "DWSLayer", "FusedLinear", "pool"]


def pool(fused: Fused) -> Tensor:
    """Average everything over its hidden axes, ``(..., channels)``."""
    units = [block.mean(-2) for block in fused.units]
    matrices = [block.mean((-2, -3)) for block in fused.matrices]
    return torch.cat([*units, *matrices, fused.globals], -1)


class FusedLinear(nn.Module):
    """The general equivariant affine map between two sets of channels on one `Layout`.

    Complete and without redundancy while every width exceeds 2: its parameters span all maps that commute with
    permutations of the hidden units.

    Args:
        layout: where the features live.
        inputs: channels of the argument.
        outputs: channels of the result.
        bias: add an equivariant bias.
    """

    def __init__(self, layout: Layout, inputs: Channels, outputs: Channels, bias: bool = True) -> None:
        super().__init__()
        self._ends = layout.ends
        self._outputs = outputs
        total = (sum(sum(c) if isinstance(c, tuple) else c for c in channels) for channels in (inputs, outputs))
        self.mix_globals = nn.Linear(*total, bias=bias)
        self.mix_units = nn.ModuleList()
        self._unit_splits: list[list[int]] = []
        for layer in range(len(layout.widths)):
            touching = [m for m, ends in enumerate(layout.ends) for end in ends if end == layer]
            n_in = inputs.units[layer] + sum(inputs.matrices[m] for m in touching)
            split = [outputs.units[layer], *(outputs.matrices[m] for m in touching)]
            self._unit_splits.append(split)
            self.mix_units.append(nn.Linear(n_in, sum(split), bias=False))
        self.mix_matrices = nn.ModuleList(
            nn.Linear(i, o, bias=False) for i, o in zip(inputs.matrices, outputs.matrices, strict=True)
        )

    def forward(self, fused: Fused) -> Fused:
        """Apply the map."""
        out = self._outputs
        pooled = self.mix_globals(pool(fused))
        pooled = pooled.split([*out.units, *out.matrices, out.globals], -1)
        matrices = [mix(block) for mix, block in zip(self.mix_matrices, fused.matrices, strict=True)]
        matrices = [
            block + part[..., None, None, :] for block, part in zip(matrices, pooled[len(out.units) : -1], strict=True)
        ]
        units = []
        for layer, mix in enumerate(self.mix_units):
            touching = [(m, axis) for m, ends in enumerate(self._ends) for axis, end in enumerate(ends) if end == layer]
            # A matrix (..., rows, columns, channels) belongs to its row layer once its columns are pooled, and back.
            seen = [fused.matrices[m].mean(-2 if axis == 0 else -3) for m, axis in touching]
            mixed = mix(torch.cat([fused.units[layer], *seen], -1) if seen else fused.units[layer])
            own, *sent = mixed.split(self._unit_splits[layer], -1)
            units.append(own + pooled[layer].unsqueeze(-2))
            for (m, axis), part in zip(touching, sent, strict=True):
                matrices[m] = matrices[m] + part.unsqueeze(-2 if axis == 0 else -3)
        return Fused(units, matrices, pooled[-1])


class DWSLayer(nn.Module):
    """The complete equivariant affine layer over weight space, for a chain of any depth.

    Maps ``(..., dim, in_features)`` to ``(..., dim, out_features)`` and commutes with every permutation of hidden
    units. It has g^2 + sum_m k_m^2 + (L - 2) parameters a pair of features (g more a feature with a bias), the
    dimension of that space, where L counts weight matrices, g = 2L - 3 + d_0 + 2 d_L and k_m = 1 + (d_0 if m is the
    first hidden layer else 1) + (d_L if it is the last else 1). A network with a single weight matrix has no hidden
    unit, and the layer is a full one. Entries that no symmetry acts on (output biases, likelihood parameters) are
    globals.

    Args:
        spec: a chain of layers.
        in_features: features on every weight of the argument.
        out_features: features on every weight of the result.
        bias: add the equivariant bias.
    """

    def __init__(self, spec: WeightSpec, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.layout = Layout(spec)
        self._out_features = out_features
        inputs, outputs = self.layout.scaled_channels(in_features), self.layout.scaled_channels(out_features)
        self.linear = FusedLinear(self.layout, inputs, outputs, bias)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layer, ``(..., dim, in_features) -> (..., dim, out_features)``."""
        return self.layout.unpack(self.linear(self.layout.pack(features)), self._out_features)


class DWSInvariant(nn.Module):
    """The complete invariant affine layer over weight space, ``(..., dim, in_features) -> (..., out_features)``.

    Has g parameters a pair of features; see `DWSLayer`.
    """

    def __init__(self, spec: WeightSpec, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.layout = Layout(spec)
        channels = self.layout.scaled_channels(in_features)
        n_in = sum(channels.units) + sum(channels.matrices) + channels.globals
        self.linear = nn.Linear(n_in, out_features, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layer."""
        return self.linear(pool(self.layout.pack(features)))
