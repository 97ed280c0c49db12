"""The fused layout: weight-space features grouped by what a permutation does to them.

A tensor with no hidden axis is *global*: nothing moves it. A tensor with one hidden axis gives *channels to the
units* of that layer: a hidden unit carries its bias, its column of the first matrix or its row of the last one. A
tensor with two hidden axes is a *matrix* between two layers. Pooling a matrix over one axis makes unit channels,
pooling units makes global channels, and broadcasting goes back: that is all that equivariant maps do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnnflow.weights import WeightSpec

__all__ = ["Channels", "Fused", "Layout"]


class Fused(NamedTuple):
    """Features in the fused layout; the last axis is channels."""

    units: list[Tensor]  # one per hidden layer, (..., n, channels)
    matrices: list[Tensor]  # one per matrix between hidden layers, (..., rows, columns, channels)
    globals: Tensor  # (..., channels)


class Channels(NamedTuple):
    """How many channels each part of a `Fused` has."""

    units: tuple[int, ...]
    matrices: tuple[int, ...]
    globals: int


class Layout(nn.Module):
    """Carry features on every weight to the fused layout and back.

    Args:
        spec: a chain of layers.

    Raises:
        ValueError: if the network is no chain; shared labels need another architecture.
    """

    def __init__(self, spec: WeightSpec) -> None:
        super().__init__()
        if not spec.layers:
            raise ValueError("weight-space layers need a network that WeightSpec.of can label: a chain of layers")
        labels = list(spec.widths)
        self.widths = tuple(spec.widths.values())
        units: list[list[Tensor]] = [[] for _ in labels]
        matrices: list[Tensor] = []
        self.ends: list[tuple[int, int]] = []  # (layer of the rows, layer of the columns) of each matrix
        loose: list[Tensor] = []
        for name, where in spec.slices.items():
            axes = spec.axes[name]
            index = torch.arange(where.start, where.stop).reshape(spec.shapes[name])
            hidden = [axis for axis, label in enumerate(axes) if label is not None]
            at = [labels.index(axes[axis]) for axis in hidden]  # type: ignore[arg-type]
            sizes = [spec.shapes[name][axis] for axis in hidden]
            index = index.movedim(hidden, list(range(len(hidden)))).reshape(*sizes, -1)  # hidden axes, then channels
            if len(hidden) == 2:
                matrices.append(index)
                self.ends.append((at[0], at[1]))
            elif hidden:
                units[at[0]].append(index)
            else:
                loose.append(index)
        blocks = [
            torch.cat(parts, -1) if parts else torch.empty(n, 0, dtype=torch.long)
            for parts, n in zip(units, self.widths, strict=True)
        ]
        blocks += [*matrices, torch.cat(loose) if loose else torch.empty(0, dtype=torch.long)]
        self._shapes = [tuple(block.shape) for block in blocks]
        order = torch.cat([block.flatten() for block in blocks])
        self._order: Tensor
        self._inverse: Tensor
        self.register_buffer("_order", order, persistent=False)
        self.register_buffer("_inverse", order.argsort(), persistent=False)
        sizes = [shape[-1] for shape in self._shapes]
        n = len(labels)
        self.channels = Channels(tuple(sizes[:n]), tuple(sizes[n:-1]), sizes[-1])

    def scaled_channels(self, features: int) -> Channels:
        """Return the channels of ``features`` features on every weight."""
        c = self.channels
        return Channels(
            tuple(k * features for k in c.units), tuple(k * features for k in c.matrices), c.globals * features
        )

    def pack(self, features: Tensor) -> Fused:
        """Fuse ``(..., dim, features)``."""
        lead, each = features.shape[:-2], features.shape[-1]
        parts = features.index_select(-2, self._order).split([math.prod(shape) for shape in self._shapes], -2)
        blocks = [
            part.reshape(*lead, *shape[:-1], shape[-1] * each) for part, shape in zip(parts, self._shapes, strict=True)
        ]
        n = len(self.widths)
        return Fused(list(blocks[:n]), list(blocks[n:-1]), blocks[-1])

    def unpack(self, fused: Fused, features: int) -> Tensor:
        """Return to features on every weight, ``(..., dim, features)``."""
        lead = fused.globals.shape[:-1]
        blocks = [*fused.units, *fused.matrices, fused.globals]
        parts = [
            block.reshape(*lead, math.prod(shape), features) for block, shape in zip(blocks, self._shapes, strict=True)
        ]
        return torch.cat(parts, -2).index_select(-2, self._inverse)
