"""The deep-weight-space layers: every linear map that commutes with permutations of hidden units.

Navon et al. (2023), "Equivariant Architectures for Learning in Deep Weight Spaces". One rule makes
the layer: pool over every subset of the hidden axes, mix channels, broadcast back. In the fused
layout that is one product for everything pooled to the globals, one per hidden layer for its units,
and one per matrix between hidden layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnflow.arguments import Count, checked
from bnnflow.equivariant.layout import Channels, Fused, Layout
from bnnflow.weights import WeightSpec

__all__ = ["DWSInvariant", "DWSLayer", "FusedLinear", "by_kind", "mean"]

_EXACT = 256  # channels of the inputs and outputs up to which a layer is exact by default


def mean(block: Tensor, axis: int) -> Tensor:
    """Average over one axis."""
    # a mean would divide its gradient at full size
    return block.sum(axis) / block.shape[axis]


def by_kind(
    values: list[Tensor], kinds: list[int], like: Tensor, sizes: tuple[int, ...]
) -> list[Tensor]:
    """Average the values of each kind, ``(..., size)``; a kind that the network lacks is zero."""
    if kinds == list(range(len(sizes))):
        return values
    groups = [
        [value for value, own in zip(values, kinds, strict=True) if own == kind]
        for kind in range(len(sizes))
    ]
    return [
        torch.stack(group).mean(0) if group else like.new_zeros(*like.shape[:-1], size)
        for group, size in zip(groups, sizes, strict=True)
    ]


class FusedLinear(nn.Module):
    """The general equivariant affine map between two sets of channels on one `Layout`.

    Complete and without redundancy while every width exceeds 1: its parameters span all maps that
    commute with permutations of the hidden units. On a shared layout every hidden layer has the
    same map, the globals see averages over the layers, and the units of a layer and the matrices
    that end there also see averages over that layer.

    Args:
        layout: where the features live.
        inputs: channels of each kind of the argument.
        outputs: channels of each kind of the result.
        bias: add an equivariant bias.
    """

    def __init__(
        self, layout: Layout, inputs: Channels, outputs: Channels, bias: bool = True
    ) -> None:
        super().__init__()
        self._layout, self._inputs, self._outputs = layout, inputs, outputs
        self.mix_globals = nn.Linear(sum(inputs.flat), sum(outputs.flat), bias=bias)
        # A matrix (..., rows, columns, channels) belongs to its row layer once its columns are
        # pooled, and back.
        ends = {
            kind: [
                0 if layout.shared or end is None else layout.matrix_kinds[end[0]]
                for end in touching
            ]
            for kind, touching in zip(layout.unit_kinds, layout.touching, strict=True)
        }
        self._splits = [
            [outputs.units[kind], *(outputs.matrices[m] for m in ends[kind])]
            for kind in ends
        ]
        seen = [
            inputs.units[kind] + sum(inputs.matrices[m] for m in ends[kind])
            for kind in ends
        ]
        pairs = [(n_in, sum(split)) for n_in, split in zip(seen, self._splits, strict=True)]
        self.mix_units = nn.ModuleList(nn.Linear(*pair, bias=False) for pair in pairs)
        self.mix_matrices = nn.ModuleList(
            nn.Linear(i, o, bias=False)
            for i, o in zip(inputs.matrices, outputs.matrices, strict=True)
        )
        if layout.shared:
            self.mix_means = nn.ModuleList(nn.Linear(*pair, bias=False) for pair in pairs)

    def forward(
        self, fused: Fused, edges: list[tuple[Tensor, Tensor]] | None = None
    ) -> Fused:
        """Apply the map.

        Args:
            fused: the argument, with one batch axis if there are edges.
            edges: the last channels of each matrix where they are products of a feature of the row
                and one of the column, ``(batch, rows, channels)`` and
                ``(batch, columns, channels)``; never multiplied out.
        """
        layout = self._layout
        products = edges if edges is not None else [None] * len(fused.matrices)
        seen = [
            _ends(block, edge) for block, edge in zip(fused.matrices, products, strict=True)
        ]
        of_units, of_matrices, loose = self._globals(fused, [rows for rows, _ in seen])
        units = []
        sent: dict[tuple[int, int], Tensor] = {}
        for layer, (kind, touching) in enumerate(
            zip(layout.unit_kinds, layout.touching, strict=True)
        ):
            pooled = [None if end is None else seen[end[0]][end[1]] for end in touching]
            own, *parts = self._units(kind, fused.units[layer], pooled)
            units.append(own + of_units[kind].unsqueeze(-2))
            sent |= {
                end: part
                for end, part in zip(touching, parts, strict=True)
                if end is not None
            }
        matrices = []
        for m, (kind, block, edge) in enumerate(
            zip(layout.matrix_kinds, fused.matrices, products, strict=True)
        ):
            rows, columns = sent[m, 0] + of_matrices[kind].unsqueeze(-2), sent[m, 1]
            weight: Tensor = self.mix_matrices[kind].weight  # type: ignore[assignment]
            mixed = F.linear(block, weight[:, : block.shape[-1]]) + rows.unsqueeze(-2)
            if edge is None:
                matrices.append(mixed + columns.unsqueeze(-3))
            else:
                matrices.append(
                    _add_products(mixed, edge, weight[:, block.shape[-1] :], columns)
                )
        return Fused(units, matrices, loose)

    def _globals(
        self, fused: Fused, rows: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return what all that is pooled sends to the units and the matrices of each kind, and to
        the globals.
        """
        layout, inputs, out = self._layout, self._inputs, self._outputs
        units = by_kind(
            [mean(block, -2) for block in fused.units],
            layout.unit_kinds,
            fused.globals,
            inputs.units,
        )
        matrices = by_kind(
            [mean(row, -2) for row in rows],
            layout.matrix_kinds,
            fused.globals,
            inputs.matrices,
        )
        parts = self.mix_globals(torch.cat([*units, *matrices, fused.globals], -1)).split(
            out.flat, -1
        )
        n = len(out.units)
        return list(parts[:n]), list(parts[n:-1]), parts[-1]

    def _units(
        self, kind: int, units: Tensor, pooled: list[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Return what the units of one layer send to themselves and to the matrices that end
        there.
        """
        missing = self._inputs.matrices[0] if None in pooled else 0
        parts = [
            units.new_zeros(*units.shape[:-1], missing) if part is None else part
            for part in pooled
        ]
        seen = torch.cat([units, *parts], -1) if parts else units
        mixed = self.mix_units[kind](seen)
        if self._layout.shared:
            mixed = mixed + self.mix_means[kind](mean(seen, -2)).unsqueeze(-2)
        return mixed.split(self._splits[kind], -1)


def _ends(block: Tensor, edge: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Average a matrix and its products over the columns, and over the rows."""
    rows, columns = mean(block, -2), mean(block, -3)
    if edge is None:
        return rows, columns
    row, column = edge
    of_rows, of_columns = (
        row * mean(column, -2).unsqueeze(-2),
        column * mean(row, -2).unsqueeze(-2),
    )
    return torch.cat([rows, of_rows], -1), torch.cat([columns, of_columns], -1)


def _add_products(
    mixed: Tensor, edge: tuple[Tensor, Tensor], weight: Tensor, columns: Tensor
) -> Tensor:
    """Return mixed_ijo + sum_c weight_oc row_ic column_jc + columns_jo as one batched product over
    c.
    """
    row, column = edge
    right = column.mT.unsqueeze(-1) * weight.mT.unsqueeze(-2)  # (batch, c, columns, out)
    # (batch, c + 1, columns * out)
    right = torch.cat([right, columns.unsqueeze(-3)], -3).flatten(-2)
    left = F.pad(row, (0, 1), value=1.0)  # (batch, rows, c + 1)
    return torch.baddbmm(mixed.flatten(-2), left, right).view_as(mixed)


@checked
class DWSLayer(nn.Module):
    """The equivariant affine layer over weight space, complete or with embedded inputs and outputs.

    Maps ``(..., dim, in_features)`` to ``(..., dim, out_features)`` and commutes with every
    permutation of hidden units. The complete layer of a chain has g^2 + sum_m k_m^2 + (L - 2)
    parameters a pair of features (g more a feature with a bias), the dimension of that space, where
    L counts weight matrices, g = 2L - 3 + d_0 + 2 d_L and k_m = 1 + (d_0 if m is the first hidden
    layer else 1) + (d_L if it is the last else 1). A network with a single weight matrix has no
    hidden unit, nor has a hidden layer of one unit a symmetry: there the layer is a full one.
    Entries that no symmetry acts on (output biases, likelihood parameters) are globals.
    Convolutions, normalisation and residual connections are covered as far as no tensor has a label
    twice: kernel positions act as channels, and tensors between the same two layers share one
    block, so that the sums above run over blocks with their channels.

    The cost grows with the square of inputs times features. Where that is too much, tensors with
    more than ``slots`` free entries (inputs, outputs, kernel positions) are compressed to that
    number by a learned matrix that all units and features share, take part in the complete map of
    what is left, and are expanded by another one; a map over features that all entries share keeps
    every weight's own value.

    Args:
        spec: a chain of layers, or a residual network without square residual matrices.
        in_features: features on every weight of the argument.
        out_features: features on every weight of the result.
        bias: add the equivariant bias.
        slots: free entries that a tensor keeps; by default all of them while their number in a
            block times the features is at most 256, else 128 / features, at least 4.

    Raises:
        ValueError: if the network has no labels or a tensor has one label twice.
    """

    def __init__(
        self,
        spec: WeightSpec,
        in_features: Count,
        out_features: Count,
        bias: bool = True,
        slots: Count | None = None,
    ) -> None:
        super().__init__()
        self.layout = Layout(spec, merge=True)
        self._out_features = out_features
        self._free = _kept(self.layout, max(in_features, out_features), slots)
        channels = self.layout.count(self._free)
        self.linear = FusedLinear(
            self.layout, channels.scaled(in_features), channels.scaled(out_features), bias
        )
        self._long = [i for i, free in enumerate(self.layout.free) if free > self._free[i]]
        sizes = [(self._free[i], self.layout.free[i]) for i in self._long]
        self.compress = nn.ParameterList(
            torch.randn(kept, free) * free**-0.5 for kept, free in sizes
        )
        self.expand = nn.ParameterList(
            torch.randn(free, kept) * kept**-0.5 for kept, free in sizes
        )
        self.own = nn.ModuleList(
            nn.Linear(in_features, out_features, bias=False) for _ in sizes
        )

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layer, ``(..., dim, in_features) -> (..., dim, out_features)``."""
        tensors = self.layout.split(features)
        kept = list(tensors)
        for i, compress in zip(self._long, self.compress, strict=True):
            kept[i] = compress @ tensors[i]  # (..., *hidden, slots, in_features)
        results = self.layout.divide(
            self.linear(self.layout.fuse(kept)), self._free, self._out_features
        )
        for i, expand, own in zip(self._long, self.expand, self.own, strict=True):
            # (..., *hidden, free, out_features)
            results[i] = expand @ results[i] + own(tensors[i])
        return self.layout.join(results)


@checked
class DWSInvariant(nn.Module):
    """The invariant affine layer over weight space,
    ``(..., dim, in_features) -> (..., out_features)``.

    The complete one has g parameters a pair of features; long tensors are compressed as in
    `DWSLayer`, which has the same arguments.
    """

    def __init__(
        self,
        spec: WeightSpec,
        in_features: Count,
        out_features: Count,
        bias: bool = True,
        slots: Count | None = None,
    ) -> None:
        super().__init__()
        self.layout = Layout(spec, merge=True)
        kept = _kept(self.layout, max(in_features, out_features), slots)
        self._long = [i for i, free in enumerate(self.layout.free) if free > kept[i]]
        sizes = [(kept[i], self.layout.free[i]) for i in self._long]
        self.compress = nn.ParameterList(
            torch.randn(few, free) * free**-0.5 for few, free in sizes
        )
        self.linear = nn.Linear(sum(kept) * in_features, out_features, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layer."""
        pooled = [
            _pooled(tensor, features.dim() - 2) for tensor in self.layout.split(features)
        ]
        for i, compress in zip(self._long, self.compress, strict=True):
            pooled[i] = compress @ pooled[i]  # (..., slots, in_features)
        return self.linear(torch.cat(pooled, -2).flatten(-2))


def _pooled(tensor: Tensor, lead: int) -> Tensor:
    """Average over the hidden axes, ``(..., free, features)``."""
    for axis in range(tensor.dim() - 3, lead - 1, -1):
        tensor = mean(tensor, axis)
    return tensor


def _kept(layout: Layout, features: int, slots: int | None) -> list[int]:
    """Return how many free entries each tensor keeps."""
    if slots is None:
        if max(layout.channels.flat) * features <= _EXACT:
            return layout.free
        slots = max(4, _EXACT // (2 * features))
    return [min(free, slots) for free in layout.free]
