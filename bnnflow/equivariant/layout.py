"""The fused layout: weight-space features grouped by what a permutation does to them.

A tensor with no hidden axis is *global*: nothing moves it. A tensor with one hidden axis gives
*channels to the units* of that layer: a hidden unit carries its bias, its column of the first
matrix or its row of the last one. A tensor with two hidden axes gives channels to the *matrix*
between two layers. Pooling a matrix over one axis makes unit channels, pooling units makes global
channels, and broadcasting goes back: that is all that equivariant maps do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnnflow.weights import WeightSpec

__all__ = ["Channels", "Fused", "Layout"]


class Fused(NamedTuple):
    """Features in the fused layout; the last axis is channels."""

    units: list[Tensor]  # one per hidden layer, (..., n, channels)
    # one per pair of connected hidden layers, (..., rows, columns, channels)
    matrices: list[Tensor]
    globals: Tensor  # (..., channels)


class Channels(NamedTuple):
    """How many channels each part of a `Fused` has."""

    units: tuple[int, ...]
    matrices: tuple[int, ...]
    globals: int

    def scaled(self, factor: int) -> Channels:
        """Return ``factor`` times as many everywhere."""
        units, matrices = (
            tuple(factor * c for c in part) for part in (self.units, self.matrices)
        )
        return Channels(units, matrices, factor * self.globals)

    @property
    def flat(self) -> list[int]:
        """Channels of the units, the matrices and the globals, in this order."""
        return [*self.units, *self.matrices, self.globals]


class _Entry(NamedTuple):
    """How one tensor of the flat vector lies in a block."""

    shape: tuple[int, ...]
    order: tuple[int, ...]  # its axes, hidden ones first
    hidden: tuple[int, ...]  # sizes of the hidden axes
    free: int  # entries at one place of the hidden axes

    @property
    def moved(self) -> bool:
        """Say whether the axes stand in another order in the block."""
        return self.order != tuple(range(len(self.shape)))


class Layout:
    """Carry features on every weight to the fused layout and back.

    The axes of a tensor that carry no label (inputs, outputs, kernel positions) are free: they
    count as channels. Tensors between the same two hidden layers share one block, whichever of the
    two is written.

    Blocks of one *kind* are mixed by the same parameters. Every block is a kind of its own, or,
    with ``shared``, all hidden layers are one kind, whose units have channels for a bias, a column
    of the first matrix and a row of the last one (zero where a layer has none), and all matrices
    between them another.

    Args:
        spec: a network in which no tensor has more than two hidden axes; chains and residual
            networks are such.
        merge: treat hidden layers of one unit, which have no symmetry, as if they had no label.
        shared: one kind for all hidden layers, which takes a chain of linear layers with a hidden
            one.

    Attributes:
        widths: units of each hidden layer, by label.
        ends: (hidden layer of the rows, hidden layer of the columns) of each matrix.
        unit_kinds: the kind of each hidden layer.
        matrix_kinds: the kind of each matrix.
        kinds: the kind of every block, counted through units, matrices and globals.
        touching: for each hidden layer, the (matrix, axis) that end there; None where an end of the
            kind is missing.
        free: free entries of each tensor.
        channels: channels of each kind for one feature on every weight.

    Raises:
        ValueError: if the symmetries are not known, if a tensor has one label twice or more than
            two of them, or if layers cannot be shared.
    """

    def __init__(
        self, spec: WeightSpec, *, merge: bool = False, shared: bool = False
    ) -> None:
        if spec.unknown:
            raise ValueError(
                "weight-space layers need labelled hidden units, of a chain of layers or the like, "
                "and here none are "
                f"known: {spec.unknown} (a GraphNet takes any network: architecture='graph' for a "
                "flow's field)"
            )
        # those that are shared in order of depth
        labels = list(spec.activations if shared else spec.widths)
        self.widths = {
            label: spec.widths[label]
            for label in labels
            if spec.widths[label] > 1 or not merge
        }
        self.shared = shared
        self.ends: list[tuple[int, int]] = []
        self._sizes = [math.prod(spec.shapes[name]) for name in spec.names]
        self._entries: list[_Entry] = []
        homes = [self._place(spec, name) for name in spec.names]
        n_units, n_matrices = len(self.widths), len(self.ends)
        keys = [*((layer,) for layer in range(n_units)), *self.ends, ()]
        self._members = [[i for i, home in enumerate(homes) if home == key] for key in keys]
        ends = [
            (m, axis, end)
            for m, pair in enumerate(self.ends)
            for axis, end in enumerate(pair)
        ]
        self.touching: list[list[tuple[int, int] | None]]
        if shared:
            self._share(spec)
            self.unit_kinds, self.matrix_kinds = [0] * n_units, [0] * n_matrices
            self.touching = [
                [
                    next(((m, a) for m, a, end in ends if (a, end) == (axis, layer)), None)
                    for axis in (0, 1)
                ]
                for layer in range(n_units)
            ]
        else:
            self.unit_kinds, self.matrix_kinds = (
                list(range(n_units)),
                list(range(n_matrices)),
            )
            self.touching = [
                [(m, a) for m, a, end in ends if end == layer] for layer in range(n_units)
            ]
        n = len(set(self.unit_kinds))
        last = 2 if shared else n_units + n_matrices
        self.kinds = [*self.unit_kinds, *(n + kind for kind in self.matrix_kinds), last]
        self.free = [entry.free for entry in self._entries]
        self.channels = self.count(self.free)

    def _place(self, spec: WeightSpec, name: str) -> tuple[int, ...]:
        """Add the entry of a tensor and return the hidden layers of its block."""
        labels = list(self.widths)
        shape, axes = spec.unit_axes(name)
        hidden = [axis for axis, label in enumerate(axes) if label in self.widths]
        home = tuple(labels.index(axes[axis]) for axis in hidden)  # type: ignore[arg-type]
        if len(set(home)) < len(home):
            raise ValueError(
                f"tensor {name!r} has one hidden layer twice: use the graph network (GraphNet)"
            )
        if len(home) > 2:
            raise ValueError(
                f"tensor {name!r} has {len(home)} hidden axes; a matrix has at most two"
            )
        if len(home) == 2 and home[::-1] in self.ends:
            hidden, home = hidden[::-1], home[::-1]
        elif len(home) == 2 and home not in self.ends:
            self.ends.append((home[0], home[1]))
        free = [axis for axis in range(len(shape)) if axis not in hidden]
        sizes, entries = (
            tuple(shape[axis] for axis in hidden),
            math.prod(shape[axis] for axis in free),
        )
        self._entries.append(_Entry(shape, (*hidden, *free), sizes, entries))
        return home

    def _share(self, spec: WeightSpec) -> None:
        """Give the units of all hidden layers, and the globals, the same channels."""
        if not spec.layers or not self.widths:
            raise ValueError(
                "sharing over depth needs a chain of linear layers with at least one hidden layer"
            )
        labelled = [name for name in spec.extras if any(spec.axes[name])]
        if labelled:
            raise ValueError(
                f"sharing over depth cannot place {labelled[0]!r}, which belongs to hidden units"
            )
        first, last = spec.layers[0].weight, spec.layers[-1].weight
        d_in, d_out = spec.shapes[first][1], spec.shapes[last][0]
        for layer, width in enumerate(self.widths.values()):
            columns = first if layer == 0 else None
            rows = last if layer == len(self.widths) - 1 else None
            roles = [(spec.layers[layer].bias, 1), (columns, d_in), (rows, d_out)]
            self._members[layer] = [
                self._member(spec, name, (width,), size) for name, size in roles
            ]
        biases = self._member(spec, spec.layers[-1].bias, (), d_out)
        self._members[-1] = [biases, *(spec.names.index(name) for name in spec.extras)]

    def _member(
        self, spec: WeightSpec, name: str | None, hidden: tuple[int, ...], free: int
    ) -> int:
        """Return the entry of a tensor.

        One that the network lacks becomes an entry that stays zero.
        """
        if name is not None:
            return spec.names.index(name)
        self._entries.append(
            _Entry((*hidden, free), tuple(range(len(hidden) + 1)), hidden, free)
        )
        return len(self._entries) - 1

    def count(self, free: list[int]) -> Channels:
        """Return the channels of each kind for one feature on every weight, given the free entries
        of each tensor.
        """
        sizes = [sum(free[i] for i in members) for members in self._members]
        n = len(self.widths)
        if self.shared:
            return Channels((sizes[0],), (1,), sizes[-1])
        return Channels(tuple(sizes[:n]), tuple(sizes[n:-1]), sizes[-1])

    def split(self, features: Tensor) -> list[Tensor]:
        """Return the tensors of ``(..., dim, features)``, ``(..., *hidden, free, features)`` each.

        Raises:
            ValueError: if the last axis but one is not ``dim`` long.
        """
        if features.dim() < 2 or features.shape[-2] != sum(self._sizes):
            raise ValueError(
                f"features must be (..., {sum(self._sizes)}, features), got {tuple(features.shape)}"
            )
        lead, each = features.shape[:-2], features.shape[-1]
        tensors = []
        for part, entry in zip(
            features.split(self._sizes, -2), self._entries, strict=False
        ):
            if entry.moved:
                axes = [len(lead) + axis for axis in entry.order]
                part = part.reshape(*lead, *entry.shape, each).permute(
                    *range(len(lead)), *axes, -1
                )
            tensors.append(part.reshape(*lead, *entry.hidden, entry.free, each))
        return tensors

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Return to ``(..., dim, features)``."""
        parts = []
        for part, entry, size in zip(tensors, self._entries, self._sizes, strict=False):
            lead, each = part.shape[: -len(entry.hidden) - 2], part.shape[-1]
            if entry.moved:
                moved = [entry.shape[axis] for axis in entry.order]
                axes = [
                    len(lead) + entry.order.index(axis) for axis in range(len(entry.shape))
                ]
                part = part.reshape(*lead, *moved, each).permute(
                    *range(len(lead)), *axes, -1
                )
            parts.append(part.reshape(*lead, size, each))
        return torch.cat(parts, -2)

    def fuse(self, tensors: list[Tensor]) -> Fused:
        """Join the tensors of each block, ``(..., *hidden, free, features)``, along their free
        axis.
        """
        first = tensors[0]
        lead, each = first.shape[: -len(self._entries[0].hidden) - 2], first.shape[-1]
        missing = self._entries[len(tensors) :]
        tensors = [
            *tensors,
            *(first.new_zeros(*lead, *entry.hidden, entry.free, each) for entry in missing),
        ]
        widths, n = list(self.widths.values()), len(self.widths)
        blocks = []
        for i, members in enumerate(self._members):
            parts = [tensors[member] for member in members]
            if not parts:  # hidden units that no bias belongs to, or no globals
                parts = [first.new_zeros(*lead, *widths[i : i + 1], 0, each)]
            # A view of some of the weights would make slow products.
            joined = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -2)
            blocks.append(joined.flatten(-2))
        return Fused(blocks[:n], blocks[n:-1], blocks[-1])

    def divide(self, fused: Fused, free: list[int], features: int) -> list[Tensor]:
        """Undo `fuse`, given the free entries of each tensor."""
        tensors: dict[int, Tensor] = {}
        for block, members in zip(
            [*fused.units, *fused.matrices, fused.globals], self._members, strict=True
        ):
            sizes = [free[member] for member in members]
            if members:
                tensors |= zip(
                    members,
                    block.unflatten(-1, (sum(sizes), features)).split(sizes, -2),
                    strict=True,
                )
        return [tensors[i] for i in range(len(self._sizes))]

    def pack(self, features: Tensor) -> Fused:
        """Fuse ``(..., dim, features)``."""
        return self.fuse(self.split(features))

    def unpack(self, fused: Fused, features: int) -> Tensor:
        """Return to features on every weight, ``(..., dim, features)``."""
        return self.join(self.divide(fused, self.free, features))
