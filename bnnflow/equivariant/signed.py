"""A network over weight space that also commutes with the signs of hidden units.

A unit of an odd activation (tanh) can be turned around: its incoming weights, its bias and its
outgoing weights change sign and the function stays. A `DWSNet` commutes with permutations alone and
would have to learn these 2^n signs. Here every feature has a parity: *odd* features of a unit
change sign with it, those of a matrix with the units at both ends, *even* ones never do. Odd
features are mixed linearly, multiplied by even ones, and carried along what has the signs of both
ends; products of two odd features are even, and there the general layer takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnflow.arguments import Count, checked
from bnnflow.equivariant.layers import FusedLinear
from bnnflow.equivariant.layout import Channels, Fused, Layout
from bnnflow.equivariant.network import Messages, TimeEmbedding, embedded_condition
from bnnflow.weights import WeightSpec

__all__ = ["SignedDWSNet", "has_signs"]

_EXPANSION = 2  # of the channels inside a block
_FLOOR = 1e-2  # of the mean square that odd features are divided by: they may all be small


def has_signs(spec: WeightSpec) -> bool:
    """Say whether every hidden unit may be turned around, and every weight at a unit turns with
    it.
    """
    signed = spec.symmetries().sign
    scale_exponents = [
        power
        for name in spec.names
        for label, power in zip(
            spec.unit_axes(name)[1], spec.scale_exponents(name), strict=True
        )
        if label is not None
    ]
    return bool(scale_exponents) and all(scale_exponents) and signed >= set(spec.widths)


@checked
class SignedDWSNet(nn.Module):
    """A residual stack that commutes with permutations and signs of hidden units, for networks of
    odd activations.

    Maps features on every weight, ``(batch, dim, in_features)``, each of which turns with its unit
    as the weight itself does, to features ``(batch, dim, out_features)`` that do so too; the head
    starts at zero. Each block multiplies odd features to even ones, mixes these by a `FusedLinear`
    that also sees maxima over units, and gates odd features by them. Units of a layer hear of each
    other through their second moments, sum_k (q_j . k_k) v_k, attention without a softmax, which
    has the sign of unit j alone; and those of neighbouring layers through the matrix between them.
    No parameter depends on the width of a hidden layer.

    On parity and gates see Lim et al. (2023), "Expressive Sign Equivariant Networks", and
    Kalogeropoulos et al. (2024), "Scale Equivariant Graph Metanetworks".

    Args:
        spec: a chain of layers, or a residual network without square residual matrices.
        in_features: features on every weight.
        out_features: features of the result.
        width: odd channels of a hidden unit; there are half as many even ones, here and in
            matrices.
        depth: number of blocks.
        edge_width: odd channels of a matrix between hidden layers, by default a quarter of
            ``width`` and at least 8. In wide networks they decide the cost.
        time: expect a time in [0, 1].
        heads: of the messages between layers.

    Raises:
        ValueError: if a hidden unit cannot be turned around, the network has no labels, a tensor
            has one label twice, or a width is odd.

    Example:
        >>> spec = WeightSpec.of(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))
        >>> SignedDWSNet(spec, 1, 1)(torch.ones(5, spec.dim, 1)).shape
        torch.Size([5, 33, 1])
    """

    def __init__(
        self,
        spec: WeightSpec,
        in_features: Count,
        out_features: Count,
        width: Count = 64,
        depth: Count = 4,
        *,
        edge_width: Count | None = None,
        time: bool = False,
        heads: Count = 4,
    ) -> None:
        super().__init__()
        if not has_signs(spec):
            raise ValueError(
                "a signed network needs an odd activation (tanh) after every hidden "
                "layer: use a DWSNet"
            )
        edge_width = max(8, width // 8 * 2) if edge_width is None else edge_width
        if width % 2 or edge_width % 2:
            raise ValueError(
                f"width and edge_width must be even, got {width} and {edge_width}"
            )
        self.layout = layout = Layout(spec)
        given, results = (
            layout.channels.scaled(in_features),
            layout.channels.scaled(out_features),
        )
        self._out_features = out_features
        of_units, of_matrices = (
            (width,) * len(given.units),
            (edge_width,) * len(given.matrices),
        )
        odd = [*of_units, *of_matrices]
        even = Channels(
            tuple(c // 2 for c in of_units), tuple(c // 2 for c in of_matrices), width // 2
        )
        condition = width // 2 if time else 0
        self.time = TimeEmbedding(condition) if time else None
        self.lift = nn.ModuleList(
            nn.Linear(k, 2 * c, bias=False) for k, c in zip(given.flat, odd, strict=False)
        )
        self.lift_even = FusedLinear(
            layout, Channels(of_units, of_matrices, given.globals), even
        )
        self.carry = nn.ModuleList(nn.Linear(c, heads, bias=False) for c in given.matrices)
        self.blocks = nn.ModuleList(
            _Block(layout, odd, even, condition, heads) for _ in range(depth)
        )
        self.head = nn.ModuleList(
            nn.Linear(c, k, bias=False) for c, k in zip(odd, results.flat, strict=False)
        )
        self.head_globals = (
            nn.Linear(even.globals, results.globals) if results.globals else nn.Identity()
        )
        for parameter in [*self.head.parameters(), *self.head_globals.parameters()]:
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, t: Tensor | None = None) -> Tensor:
        """Apply the network.

        Args:
            features: ``(batch, dim, in_features)``.
            t: times ``(batch,)``, for a network with ``time``.

        Raises:
            ValueError: if the time is missing or unexpected, or the features are of another size.
        """
        condition = embedded_condition((self.time, t), (None, None), 0)
        packed = self.layout.pack(features)
        n, given = len(packed.units), [*packed.units, *packed.matrices]
        lifted = [
            lift(part).chunk(2, -1) for lift, part in zip(self.lift, given, strict=True)
        ]
        odd = [own for own, _ in lifted]
        # a product of large weights would swamp others
        squares = [torch.asinh(own * other) for own, other in lifted]
        fused = self.lift_even(Fused(*_parts(squares, n), packed.globals))
        even = [*fused.units, *fused.matrices, fused.globals]
        carriers = [
            torch.tanh(carry(block))
            .movedim(-1, 1)
            .contiguous()  # (batch, heads, rows, columns)
            for carry, block in zip(self.carry, packed.matrices, strict=True)
        ]
        for block in self.blocks:
            odd, even = block(odd, even, condition, carriers)
        loose = self.head_globals(even[-1]) if packed.globals.shape[-1] else packed.globals
        results = _parts([head(part) for head, part in zip(self.head, odd, strict=True)], n)
        return self.layout.unpack(Fused(*results, loose), self._out_features)


class _Block(nn.Module):
    """One residual block.

    See `SignedDWSNet`. Lists of parts go through units and matrices, of even ones to globals.

    Args:
        layout: where the features live.
        odd: channels of the odd features of units and matrices.
        even: channels of the even features.
        condition: length of what modulates the block, 0 for nothing.
        heads: of messages.
    """

    def __init__(
        self, layout: Layout, odd: list[int], even: Channels, condition: int, heads: int
    ) -> None:
        super().__init__()
        self._layout, self._odd, self._even = layout, odd, even
        of_units, of_matrices = _parts(odd, len(even.units))
        width = of_units[0]
        # Two factors of even features everywhere, and of units what second moments are made of.
        shares = [*(4 * c for c in of_units), *(2 * c for c in of_matrices)]
        self.factors = nn.ModuleList(
            nn.Linear(c, k, bias=False) for c, k in zip(odd, shares, strict=True)
        )
        channels = Channels(tuple(of_units), tuple(of_matrices), width)
        norm = partial(nn.RMSNorm, eps=_FLOOR)
        self.messages = Messages(layout, channels, heads, norm) if of_matrices else None
        heard = 0 if self.messages is None else self.messages.length
        self.rows = nn.ModuleList(nn.Linear(width, c, bias=False) for c in of_matrices)
        self.columns = nn.ModuleList(nn.Linear(width, c, bias=False) for c in of_matrices)
        units = [e + c for e, c in zip(even.units, of_units, strict=True)]
        matrices = [e + c for e, c in zip(even.matrices, of_matrices, strict=True)]
        self._splits = [
            (_EXPANSION * e, _EXPANSION * c) for e, c in zip(even.flat, odd, strict=False)
        ]
        inner = _parts([sum(split) for split in self._splits], len(units))
        self.mix = FusedLinear(
            layout,
            # the maxima beside the globals
            Channels(tuple(units), tuple(matrices), even.globals + sum(units)),
            Channels(tuple(inner[0]), tuple(inner[1]), _EXPANSION * even.globals),
        )
        seen = [*(c + heard for c in of_units), *(2 * c for c in of_matrices)]
        self.odd_in = nn.ModuleList(
            nn.Linear(n, _EXPANSION * c, bias=False) for n, c in zip(seen, odd, strict=True)
        )
        self.odd_out = nn.ModuleList(nn.Linear(_EXPANSION * c, c, bias=False) for c in odd)
        self.even_out = nn.ModuleList(nn.Linear(_EXPANSION * c, c) for c in even.flat)
        total = 2 * sum(odd) + 3 * sum(even.flat)
        self.modulation = nn.Parameter(torch.zeros(1, total))
        self.modulate = nn.Linear(condition, total, bias=False) if condition else None
        if self.modulate is not None:
            nn.init.zeros_(self.modulate.weight)

    def forward(
        self,
        odd: list[Tensor],
        even: list[Tensor],
        condition: Tensor | None,
        carriers: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        values = (
            self.modulation
            if self.modulate is None
            else self.modulation + self.modulate(condition)
        )
        (odd_scales, odd_gates), (scales, shifts, gates) = self._modulation(
            values, odd, even
        )
        odd_normed = [
            _normed(part) * scale for part, scale in zip(odd, odd_scales, strict=True)
        ]
        normed = [
            torch.addcmul(shift, F.layer_norm(part, part.shape[-1:]), scale)
            for part, scale, shift in zip(even, scales, shifts, strict=True)
        ]
        odd_added, added = self._change(odd_normed, normed, carriers)
        return (
            [
                torch.addcmul(part, gate, more)
                for part, gate, more in zip(odd, odd_gates, odd_added, strict=True)
            ],
            [
                torch.addcmul(part, gate, more)
                for part, gate, more in zip(even, gates, added, strict=True)
            ],
        )

    def _modulation(
        self, values: Tensor, odd: list[Tensor], even: list[Tensor]
    ) -> list[list[list[Tensor]]]:
        """Return scales and gates of the odd parts; scales, shifts and gates of the even ones.

        They broadcast.
        """
        of_odd, of_even = values.split([2 * sum(self._odd), 3 * sum(self._even.flat)], -1)
        found = []
        for parts, own, sizes, base in (
            (odd, of_odd, self._odd, (1, 1)),
            (even, of_even, self._even.flat, (1, 0, 1)),
        ):
            rows = [
                each + one for each, one in zip(own.chunk(len(base), -1), base, strict=True)
            ]
            found.append(
                [
                    [
                        piece.reshape(len(piece), *(1,) * (part.dim() - 2), piece.shape[-1])
                        for piece, part in zip(row.split(sizes, -1), parts, strict=True)
                    ]
                    for row in rows
                ]
            )
        return found

    def _change(
        self, odd: list[Tensor], even: list[Tensor], carriers: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return what is added to the odd and to the even parts."""
        n = len(self._layout.widths)
        units, (_, matrices) = odd[:n], _parts(even[:-1], n)
        factors = [
            factor(part).split(c, -1)
            for factor, part, c in zip(self.factors, odd, self._odd, strict=True)
        ]
        pairs = [
            rows(units[row]).unsqueeze(-2) * columns(units[column]).unsqueeze(-3)
            for rows, columns, (row, column) in zip(
                self.rows, self.columns, self._layout.ends, strict=True
            )
        ]
        seen_units = [
            torch.cat([block, one * other], -1)
            for block, (one, other, *_) in zip(even[:n], factors[:n], strict=True)
        ]
        seen_matrices = [
            torch.cat([block, one * (other + pair)], -1)
            for block, (one, other), pair in zip(matrices, factors[n:], pairs, strict=True)
        ]
        maxima = [block.amax(-2) for block in seen_units]
        mixed = self.mix(
            Fused(seen_units, seen_matrices, torch.cat([even[-1], *maxima], -1))
        )
        split = [
            part.split(sizes, -1)
            for part, sizes in zip(
                [*mixed.units, *mixed.matrices], self._splits, strict=True
            )
        ]
        seen = [unit + _heard(*own) for unit, own in zip(units, factors[:n], strict=True)]
        if self.messages is not None:
            seen = [
                torch.cat(both, -1)
                for both in zip(seen, self.messages(units, carriers), strict=True)
            ]
        seen += [torch.cat(both, -1) for both in zip(odd[n:], pairs, strict=True)]
        odd_added = [
            self.odd_out[i](self.odd_in[i](part) * F.silu(1 + gate))
            for i, (part, (_, gate)) in enumerate(zip(seen, split, strict=True))
        ]
        hidden = [*(own for own, _ in split), mixed.globals]
        return odd_added, [
            out(F.silu(part)) for out, part in zip(self.even_out, hidden, strict=True)
        ]


def _heard(query: Tensor, _: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what each unit hears of the second moments of its layer, ``(batch, n, channels)``."""
    return query @ (key.mT @ value / (key.shape[1] * key.shape[2]) ** 0.5)


def _normed(odd: Tensor) -> Tensor:
    """Divide odd features by their size."""
    return odd * torch.rsqrt(odd.square().mean(-1, keepdim=True) + _FLOOR)


_Item = TypeVar("_Item")


def _parts(both: Sequence[_Item], n: int) -> tuple[list[_Item], list[_Item]]:
    """Separate what belongs to the ``n`` hidden layers from what belongs to the matrices."""
    return list(both[:n]), list(both[n:])
