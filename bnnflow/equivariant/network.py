"""Deep networks over weight space: equivariant or invariant, with time and context."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnflow.arguments import Count, NonNegative, Whole, checked
from bnnflow.equivariant.layers import FusedLinear, by_kind, mean
from bnnflow.equivariant.layout import Channels, Fused, Layout
from bnnflow.weights import WeightSpec

__all__ = [
    "DWSNet",
    "Messages",
    "TimeEmbedding",
    "Wiring",
    "embedded_condition",
    "perceptron",
]


class TimeEmbedding(nn.Module):
    """Sines, cosines and log(1 - t), mixed by a small perceptron:
    ``(batch,) -> (batch, width)``.
    """

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        self._frequencies: Tensor
        self.register_buffer(
            "_frequencies", torch.arange(1, frequencies + 1) * math.pi / 2, persistent=False
        )
        self.mix = nn.Sequential(
            nn.Linear(2 * frequencies + 2, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed times in [0, 1]."""
        angles = t.unsqueeze(-1) * self._frequencies
        late = (1 - t + 1e-2).log().unsqueeze(-1)
        return self.mix(torch.cat([angles.sin(), angles.cos(), late, t.unsqueeze(-1)], -1))


def embedded_condition(
    time: tuple[nn.Module | None, Tensor | None],
    context: tuple[nn.Module | None, Tensor | None],
    length: int,
) -> Tensor | None:
    """Return what modulates a network, ``(batch, width)``, from its embeddings of time and context
    and their values.

    Raises:
        ValueError: if one of the values is missing, unexpected, or not of the ``length`` of the
            context.
    """
    if (time[0] is None) != (time[1] is None):
        raise ValueError(
            "this network takes no time"
            if time[0] is None
            else "this network needs a time t"
        )
    if (0 if context[1] is None else context[1].shape[-1]) != length:
        found = None if context[1] is None else tuple(context[1].shape)
        raise ValueError(f"this network takes a context of length {length}, got {found}")
    parts: list[Tensor] = [
        embed(value) for embed, value in (time, context) if embed is not None
    ]
    return sum(parts[1:], parts[0]) if parts else None


@checked
@dataclass(frozen=True)
class Wiring:
    """How the parts of a `DWSNet` hear of each other.

    Attributes:
        heads: of the messages that units at the two ends of an edge send each other, 0 for none.
        edge_width: channels of a matrix between hidden layers; if None a quarter of the network's
            width and at least 8. In wide networks they decide the cost.
        frequency: of learned sines of the weights of each unit, which it is lifted by too (Fourier
            features); 0 for none. They help with networks of sines, whose weights are frequencies
            themselves.
        shared: use the same parameters in every hidden layer, told apart by their relative depth,
            so that a state dict fits networks of other widths and other depths; the first and the
            last layer keep maps of their own.
    """

    heads: Whole = 4
    edge_width: Count | None = None
    frequency: NonNegative = 0.0
    shared: bool = False


@checked
class DWSNet(nn.Module):
    """A residual stack of equivariant layers in the fused layout, with an equivariant or an
    invariant end.

    Maps features on every weight, ``(batch, dim, in_features)``, to ``(batch, dim, out_features)``,
    and commutes with permutations of hidden units; the head starts at zero. An invariant network
    maps them to ``(batch, out_features)`` by a small perceptron over the means and maxima of all
    blocks. Each block of the stack normalises the channels, shifts, scales and gates them by time
    and context if there are any (AdaLN), mixes them by a `FusedLinear` that also sees maxima over
    units, a low-rank bilinear term between the units at the two ends of an edge, and messages that
    units send along the edges, and adds the result. No parameter depends on the width of a hidden
    layer.

    Args:
        spec: a chain of layers, or a residual network without square residual matrices.
        in_features: features on every weight.
        out_features: features of the result.
        width: channels of a hidden unit and of the globals.
        depth: number of blocks.
        invariant: pool to one result a network.
        time: expect a time in [0, 1].
        context: length of the context vector that is expected, 0 for none.
        unit_features: features of every hidden unit that are expected beside those of the weights.
        wiring: of the blocks; see `Wiring`.

    Raises:
        ValueError: if the network has no labels or a tensor has one label twice; with ``shared``,
            if it is no chain of linear layers.

    Example:
        >>> spec = WeightSpec.of(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))
        >>> DWSNet(spec, 1, 10, invariant=True)(torch.ones(5, spec.dim, 1)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        spec: WeightSpec,
        in_features: Count,
        out_features: Count,
        width: Count = 64,
        depth: Count = 4,
        *,
        invariant: bool = False,
        time: bool = False,
        context: Whole = 0,
        unit_features: Whole = 0,
        wiring: Wiring = Wiring(),
    ) -> None:
        super().__init__()
        heads, frequency = wiring.heads, wiring.frequency
        self.layout = Layout(spec, shared=wiring.shared)
        self.invariant = invariant
        self._out_features = out_features
        self._context_length, self._unit_features = context, unit_features
        channels = self.layout.channels
        n_units, n_matrices = len(channels.units), len(channels.matrices)
        edge_width = max(8, width // 4) if wiring.edge_width is None else wiring.edge_width
        hidden = Channels((width,) * n_units, (edge_width,) * n_matrices, width)
        self._hidden = hidden
        self.time = TimeEmbedding(width) if time else None
        self.context = (
            nn.Sequential(perceptron(context, width, width), nn.SiLU()) if context else None
        )
        given = channels.scaled(in_features)
        self.lift = FusedLinear(self.layout, given, hidden)
        of_matrices = given.matrices if heads else ()
        self.carry = nn.ModuleList(nn.Linear(c, heads) for c in of_matrices)
        of_units = given.units if frequency else ()
        self.lift_sines = nn.ModuleList(nn.Linear(c, width) for c in of_units)
        self._frequency = frequency
        if unit_features:
            self.lift_units = nn.ModuleList(
                nn.Linear(unit_features, width) for _ in range(n_units)
            )
        if wiring.shared:
            self.lift_depth = nn.Linear(1, width + edge_width)
        condition = width if time or context else 0
        self.blocks = nn.ModuleList(
            _Block(self.layout, hidden, condition, heads) for _ in range(depth)
        )
        self.readout = self.head = None
        if invariant:
            pooled = 2 * sum(hidden.flat) - hidden.globals
            self.readout = nn.Sequential(
                nn.LayerNorm(pooled), perceptron(pooled, width, out_features)
            )
        else:
            self.head = FusedLinear(self.layout, hidden, channels.scaled(out_features))
            for parameter in self.head.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        features: Tensor,
        t: Tensor | None = None,
        context: Tensor | None = None,
        units: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Apply the network.

        Args:
            features: ``(batch, dim, in_features)``.
            t: times ``(batch,)``, for a network with ``time``.
            context: ``(batch, context)``, for one with a context.
            units: ``(batch, n, unit_features)`` for each hidden layer by label, for one with unit
                features.

        Raises:
            ValueError: if one of these is missing, unexpected, or of another size.
        """
        condition = embedded_condition(
            (self.time, t), (self.context, context), self._context_length
        )
        packed = self.layout.pack(features)
        carriers = [
            # (batch, heads, rows, columns)
            torch.tanh(self.carry[kind](block)).movedim(-1, 1).contiguous()
            for kind, block in zip(
                self.layout.matrix_kinds if self.carry else [],
                packed.matrices,
                strict=False,
            )
        ]
        fused = self._lift(packed, units)
        for block in self.blocks:
            fused = block(fused, condition, carriers)
        if self.readout is not None:
            return self.readout(_pool(fused, self.layout, self._hidden))
        assert self.head is not None
        return self.layout.unpack(self.head(fused), self._out_features)

    def _lift(self, packed: Fused, units: Mapping[str, Tensor] | None) -> Fused:
        """Return the features in the hidden channels, with what is known of units and of depth."""
        fused = self.lift(packed)
        labels, kinds = list(self.layout.widths), self.layout.unit_kinds
        if set(units or ()) != set(labels if self._unit_features else ()):
            raise ValueError(
                f"this network takes {self._unit_features} features of each unit of {labels}"
            )
        if self._frequency:
            angles = [
                self.lift_sines[kind](self._frequency * own)
                for kind, own in zip(kinds, packed.units, strict=True)
            ]
            fused = fused._replace(
                units=[own + a.sin() for own, a in zip(fused.units, angles, strict=True)]
            )
        if units:
            seen = [
                self.lift_units[kind](units[label])
                for kind, label in zip(kinds, labels, strict=True)
            ]
            fused = fused._replace(
                units=[own + more for own, more in zip(fused.units, seen, strict=True)]
            )
        if self.layout.shared:
            # hidden layers and matrices in turn
            where = torch.linspace(0, 1, 2 * len(labels) + 1)[1:-1, None]
            of_units, of_matrices = self.lift_depth(where.to(fused.globals)).split(
                self._hidden.flat[:2], -1
            )
            fused = Fused(
                [own + of_units[2 * layer] for layer, own in enumerate(fused.units)],
                [
                    own + of_matrices[r + k]
                    for own, (r, k) in zip(fused.matrices, self.layout.ends, strict=True)
                ],
                fused.globals,
            )
        return fused


class _Block(nn.Module):
    """One residual block; see `DWSNet`. Lists over parts go through units, matrices and globals."""

    def __init__(
        self,
        layout: Layout,
        channels: Channels,
        condition: int,
        heads: int,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        self._layout, self._channels = layout, channels
        self.messages = (
            Messages(layout, channels, heads) if heads and channels.matrices else None
        )
        heard = 0 if self.messages is None else self.messages.length
        seen = Channels(
            tuple(c + heard for c in channels.units),
            # the bilinear term beside the matrix itself
            tuple(2 * c for c in channels.matrices),
            channels.globals
            + sum(channels.units),  # the maxima beside the globals themselves
        )
        self.mix = FusedLinear(layout, seen, channels.scaled(expansion))
        self.narrow = nn.ModuleList(nn.Linear(expansion * c, c) for c in channels.flat)
        width = channels.globals
        self.rows = nn.ModuleList(
            nn.Linear(width, c, bias=False) for c in channels.matrices
        )
        self.columns = nn.ModuleList(
            nn.Linear(width, c, bias=False) for c in channels.matrices
        )
        if condition:
            self.modulate = nn.Linear(condition, 3 * sum(channels.flat))
            nn.init.zeros_(self.modulate.weight)
            nn.init.zeros_(self.modulate.bias)
        else:
            self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels.flat)

    def forward(
        self, fused: Fused, condition: Tensor | None, carriers: list[Tensor]
    ) -> Fused:
        parts = [*fused.units, *fused.matrices, fused.globals]
        if condition is None:
            normed = [
                self.norms[kind](part)
                for kind, part in zip(self._layout.kinds, parts, strict=True)
            ]
            added = self._change(normed, carriers)
            results = [part + more for part, more in zip(parts, added, strict=True)]
        else:
            scales, shifts, gates = self._modulation(condition, parts)
            normed = [
                torch.addcmul(shift, F.layer_norm(part, part.shape[-1:]), scale)
                for part, scale, shift in zip(parts, scales, shifts, strict=True)
            ]
            added = self._change(normed, carriers)
            results = [
                torch.addcmul(part, gate, more)
                for part, gate, more in zip(parts, gates, added, strict=True)
            ]
        n = len(fused.units)
        return Fused(results[:n], results[n:-1], results[-1])

    def _modulation(self, condition: Tensor, parts: list[Tensor]) -> list[list[Tensor]]:
        """Return scale, shift and gate of every part, each with axes to broadcast over the hidden
        ones.
        """
        one = torch.tensor(
            [[1.0], [0.0], [1.0]], dtype=condition.dtype, device=condition.device
        )
        # (batch, 3, channels)
        values = self.modulate(condition).unflatten(-1, (3, -1)) + one
        pieces = values.split(self._channels.flat, -1)
        return [
            [
                pieces[kind][:, i].reshape(
                    len(part), *(1,) * (part.dim() - 2), part.shape[-1]
                )
                for kind, part in zip(self._layout.kinds, parts, strict=True)
            ]
            for i in range(3)
        ]

    def _change(self, normed: list[Tensor], carriers: list[Tensor]) -> list[Tensor]:
        """Mix all parts and return what is added to each."""
        layout, n = self._layout, len(self._layout.widths)
        units, matrices, loose = normed[:n], normed[n:-1], normed[-1]
        edges = [
            (self.rows[kind](units[row]), self.columns[kind](units[column]))
            for kind, (row, column) in zip(layout.matrix_kinds, layout.ends, strict=True)
        ]
        maxima = by_kind(
            [block.amax(-2) for block in units],
            layout.unit_kinds,
            loose,
            self._channels.units,
        )
        if self.messages is not None:
            heard = self.messages(units, carriers)
            units = [torch.cat(pair, -1) for pair in zip(units, heard, strict=True)]
        mixed = self.mix(Fused(units, matrices, torch.cat([loose, *maxima], -1)), edges)
        parts = [*mixed.units, *mixed.matrices, mixed.globals]
        return [
            self.narrow[kind](F.silu(part))
            for kind, part in zip(layout.kinds, parts, strict=True)
        ]


class Messages(nn.Module):
    """What the units at the two ends of the edges send each other: features times the heads of
    their edge.

    Unit i of the rows hears sum_j E_ij (V h_j) of every head E, and the columns hear the rows in
    the same way: what a forward and a backward pass through the network itself do.

    Args:
        layout: where the features live.
        channels: of the units; ``globals`` of them are carried.
        heads: of each edge.
        norm: of what is heard.
    """

    def __init__(
        self,
        layout: Layout,
        channels: Channels,
        heads: int,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self._layout = layout
        self._shape = (heads, -(-channels.globals // heads))
        self.length = math.prod(self._shape)
        kinds = range(len(channels.matrices))
        self.to_rows = nn.ModuleList(
            nn.Linear(channels.globals, self.length, bias=False) for _ in kinds
        )
        self.to_columns = nn.ModuleList(
            nn.Linear(channels.globals, self.length, bias=False) for _ in kinds
        )
        self.norms = nn.ModuleList(norm(self.length) for _ in channels.units)

    def forward(self, units: list[Tensor], carriers: list[Tensor]) -> list[Tensor]:
        """Return the sum of all messages to each unit, ``(batch, n, length)`` for each hidden
        layer.

        Args:
            units: features of the units, ``(batch, n, channels)``.
            carriers: heads of the edges of each matrix, ``(batch, heads, rows, columns)``.
        """
        layout = self._layout
        heard: list[list[Tensor]] = [[] for _ in units]
        for kind, (row, column), heads in zip(
            layout.matrix_kinds, layout.ends, carriers, strict=True
        ):
            heard[row].append(self._carried(heads, self.to_rows[kind](units[column])))
            heard[column].append(self._carried(heads.mT, self.to_columns[kind](units[row])))
        silence = [unit.new_zeros(*unit.shape[:-1], self.length) for unit in units]
        return [
            self.norms[kind](sum(parts[1:], parts[0])) if parts else none
            for kind, parts, none in zip(layout.unit_kinds, heard, silence, strict=True)
        ]

    def _carried(self, heads: Tensor, values: Tensor) -> Tensor:
        """Carry values ``(batch, from, length)`` along the edges ``(batch, heads, to, from)``."""
        # (batch, heads, from, length / heads)
        values = values.unflatten(-1, self._shape).movedim(-2, 1)
        return (heads @ values).movedim(1, -2).flatten(-2)


def perceptron(n_in: int, width: int, n_out: int) -> nn.Sequential:
    """Build a perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(n_in, width), nn.SiLU(), nn.Linear(width, n_out))


def _pool(fused: Fused, layout: Layout, channels: Channels) -> Tensor:
    """Return means and maxima over all hidden axes and the globals, ``(batch, features)``."""
    columns = [(mean(block, -2), block.amax(-2)) for block in fused.matrices]
    pooled = [(mean(block, -2), block.amax(-2)) for block in fused.units]
    pooled += [(mean(means, -2), maxima.amax(-2)) for means, maxima in columns]
    sizes = (*channels.units, *channels.matrices)
    by_kinds = [
        by_kind(list(values), layout.kinds[:-1], fused.globals, sizes)
        for values in zip(*pooled, strict=True)
    ]
    return torch.cat(
        [*(value for values in by_kinds for value in values), fused.globals], -1
    )
