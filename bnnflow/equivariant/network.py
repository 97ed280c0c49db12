"""A deep network over weight space with time conditioning."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnflow.equivariant.layers import FusedLinear
from bnnflow.equivariant.layout import Channels, Fused, Layout
from bnnflow.weights import WeightSpec

__all__ = ["DWSNet", "TimeEmbedding"]


class TimeEmbedding(nn.Module):
    """Sines, cosines and log(1 - t), mixed by a small perceptron: ``(batch,) -> (batch, width)``."""

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        self._frequencies: Tensor
        self.register_buffer("_frequencies", torch.arange(1, frequencies + 1) * math.pi / 2, persistent=False)
        self.mix = nn.Sequential(nn.Linear(2 * frequencies + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        """Embed times in [0, 1]."""
        angles = t.unsqueeze(-1) * self._frequencies
        late = (1 - t + 1e-2).log().unsqueeze(-1)
        return self.mix(torch.cat([angles.sin(), angles.cos(), late, t.unsqueeze(-1)], -1))


class DWSNet(nn.Module):
    """A residual stack of equivariant layers in the fused layout.

    Maps features on every weight, ``(batch, dim, in_features)``, and a time to ``(batch, dim, out_features)``, and
    commutes with permutations of hidden units. Each block normalises the channels, shifts and scales them by the
    time (AdaLN), mixes them by a `FusedLinear` that also sees maxima over units and a low-rank bilinear term between
    the units at the two ends of an edge, and adds the result through a gate. The head starts at zero.

    Args:
        spec: a chain of layers.
        in_features: features on every weight.
        out_features: features on every weight of the result.
        width: channels of a hidden unit and of the globals; matrices between hidden layers have a quarter of it.
        depth: number of blocks.
    """

    def __init__(self, spec: WeightSpec, in_features: int, out_features: int, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.layout = Layout(spec)
        self._out_features = out_features
        n_units, n_matrices = len(self.layout.widths), len(self.layout.ends)
        hidden = Channels((width,) * n_units, (max(8, width // 4),) * n_matrices, width)
        self.time = TimeEmbedding(width)
        self.lift = FusedLinear(self.layout, self.layout.scaled_channels(in_features), hidden)
        self.blocks = nn.ModuleList(_Block(self.layout, hidden, width) for _ in range(depth))
        self.head = FusedLinear(self.layout, hidden, self.layout.scaled_channels(out_features))
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, t: Tensor, features: Tensor) -> Tensor:
        """Apply the network; ``t`` is ``(batch,)``."""
        condition = self.time(t)
        fused = self.lift(self.layout.pack(features))
        for block in self.blocks:
            fused = block(fused, condition)
        return self.layout.unpack(self.head(fused), self._out_features)


class _Block(nn.Module):
    """One residual block; see `DWSNet`."""

    def __init__(self, layout: Layout, channels: Channels, condition: int, expansion: int = 2) -> None:
        super().__init__()
        self._ends = layout.ends
        seen = Channels(
            channels.units,
            tuple(2 * c for c in channels.matrices),  # the bilinear term beside the matrix itself
            channels.globals + sum(channels.units),  # the maxima beside the globals themselves
        )
        wide = Channels(
            tuple(expansion * c for c in channels.units),
            tuple(expansion * c for c in channels.matrices),
            expansion * channels.globals,
        )
        self.mix = FusedLinear(layout, seen, wide)
        self.narrow = nn.ModuleList(
            nn.Linear(expansion * c, c) for c in [*channels.units, *channels.matrices, channels.globals]
        )
        self.rows = nn.ModuleList(
            nn.Linear(channels.units[r], c, bias=False)
            for (r, _), c in zip(layout.ends, channels.matrices, strict=True)
        )
        self.columns = nn.ModuleList(
            nn.Linear(channels.units[k], c, bias=False)
            for (_, k), c in zip(layout.ends, channels.matrices, strict=True)
        )
        self._sizes = [*channels.units, *channels.matrices, channels.globals]
        self.modulate = nn.Linear(condition, 3 * sum(self._sizes))
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, fused: Fused, condition: Tensor) -> Fused:
        parts = [*fused.units, *fused.matrices, fused.globals]
        scales, shifts, gates = self.modulate(condition).chunk(3, -1)
        split = [zip(*(m.split(self._sizes, -1) for m in (scales, shifts, gates)), strict=True)]
        modulation = list(split[0])
        normed = []
        for part, (scale, shift, _) in zip(parts, modulation, strict=True):
            scale, shift = (_spread(m, part) for m in (scale, shift))
            normed.append(torch.addcmul(shift, F.layer_norm(part, part.shape[-1:]), 1 + scale))
        n = len(fused.units)
        units, matrices, loose = normed[:n], normed[n:-1], normed[-1]
        edges = [
            row(units[r]).unsqueeze(-2) * column(units[k]).unsqueeze(-3)
            for row, column, (r, k) in zip(self.rows, self.columns, self._ends, strict=True)
        ]
        matrices = [torch.cat(pair, -1) for pair in zip(matrices, edges, strict=True)]
        loose = torch.cat([loose, *(block.amax(-2) for block in units)], -1)
        mixed = self.mix(Fused(units, matrices, loose))
        results = [
            torch.addcmul(part, 1 + _spread(gate, part), narrow(F.silu(wide)))
            for part, narrow, wide, (_, _, gate) in zip(
                parts, self.narrow, [*mixed.units, *mixed.matrices, mixed.globals], modulation, strict=True
            )
        ]
        return Fused(results[:n], results[n:-1], results[-1])


def _spread(modulation: Tensor, like: Tensor) -> Tensor:
    """Insert axes so that ``(batch, channels)`` broadcasts over the hidden axes of ``like``."""
    return modulation.reshape(modulation.shape[0], *(1,) * (like.dim() - 2), modulation.shape[-1])
