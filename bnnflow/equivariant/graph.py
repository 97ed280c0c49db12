"""A graph attention network over weight space, for every network that `WeightSpec` can label.

The weights are drawn as a graph. Hidden units, inputs and outputs are nodes, and the entries of a
weight matrix are edges between a *writer* (its row) and a *reader* (its column). A bias or a norm
parameter is a feature of its node; kernel positions, and the entries of one unit where a
convolution is flattened, are features of one edge. A global node, joined to all others, carries
what belongs to no unit. All nodes share their parameters, and so do all edges: what a node is and
how deep it lies are features, so that nothing in the network depends on widths, depth or labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnflow.arguments import Count, Whole, checked
from bnnflow.equivariant.network import TimeEmbedding, embedded_condition, perceptron
from bnnflow.weights import WeightSpec

__all__ = ["GraphNet"]

_KINDS = ("hidden", "input", "output", "global")
LOGIT_RANGE = 10.0
_Group = tuple[str, str]  # kind and name


class _Matrix(NamedTuple):
    """The edges of one tensor: the groups of nodes at the two ends, and their numbers."""

    rows: int
    columns: int
    n_rows: int
    n_columns: int
    entries: int


class WeightGraph(nn.Module):
    """Where the entries of a flat weight vector lie in the graph.

    Nodes are numbered group by group: hidden layers in order of depth, inputs, outputs, and the
    global node last. Edges are numbered matrix by matrix, row-major, and end with those from the
    global node to every other node.

    Attributes:
        dim: entries of theta.
        hidden: nodes of each hidden layer by label.
        groups: kind and name of each group; the name is a label, or the number of positions.
        sizes: nodes of each group, the global node left out.
        entries: entries of theta on each node of a group.
        matrices: the tensors that are edges.
        loose: entries on the global node.
        node_features: kind and relative depth of each node, ``(nodes, features)``.
        matrix_features: depths of the two ends of a matrix, its rank among parallel ones, whether
            it is the global node's, ``(matrices + 1, features)``.

    Raises:
        ValueError: if a tensor has hidden units along an axis that is neither its first nor its
            second.
    """

    node_features: Tensor
    matrix_features: Tensor

    def __init__(self, spec: WeightSpec) -> None:
        super().__init__()
        sizes, places = _places(spec)
        self.dim, self.hidden = spec.dim, spec.widths
        self.groups = sorted(sizes, key=lambda group: _KINDS.index(group[0]))
        self.sizes = [sizes[group] for group in self.groups]
        nodes = [
            torch.cat(
                [
                    torch.empty(sizes[group], 0, dtype=torch.long),
                    *(i for ends, i in places if ends == (group,)),
                ],
                -1,
            )
            for group in self.groups
        ]
        edges = [(ends, index) for ends, index in places if len(ends) == 2]
        loose = [index for ends, index in places if not ends]
        self.entries = [index.shape[-1] for index in nodes]
        self.matrices = [
            _Matrix(*(self.groups.index(end) for end in ends), *index.shape)
            for ends, index in edges
        ]
        self.loose = sum(len(index) for index in loose)
        parts = [index.flatten() for index in [*nodes, *(index for _, index in edges)]]
        self._lengths = [*(len(part) for part in parts), self.loose]
        order = torch.cat([*parts, *loose])
        self._order: Tensor
        self._inverse: Tensor
        self.register_buffer("_order", order, persistent=False)
        self.register_buffer("_inverse", order.argsort(), persistent=False)
        self._describe()

    def _describe(self) -> None:
        """Make the features that tell nodes, and matrices, apart."""
        kinds = [kind for kind, _ in self.groups] + ["global"]
        n_hidden = kinds.count("hidden")
        depths = {"input": 0.0, "output": 1.0, "global": 0.5}
        of_depth = _waves(
            [depths.get(kind, (i + 1) / (n_hidden + 1)) for i, kind in enumerate(kinds)]
        )
        of_kind = F.one_hot(
            torch.tensor([_KINDS.index(kind) for kind in kinds]), len(_KINDS)
        )
        of_group = torch.cat([of_kind, of_depth], -1)
        self.register_buffer(
            "node_features",
            of_group.repeat_interleave(torch.tensor([*self.sizes, 1]), 0),
            False,
        )
        pairs = [(matrix.rows, matrix.columns) for matrix in self.matrices]
        ranks = [
            (pairs[:i].count(pair) + 1) / (pairs.count(pair) + 1)
            for i, pair in enumerate(pairs)
        ]
        of_rank = _waves([*ranks, 0.5])
        ends = torch.tensor([*pairs, (-1, -1)])
        self.register_buffer(
            "matrix_features", torch.cat([of_group[ends].flatten(1), of_rank], -1), False
        )

    def pack(self, features: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Sort ``(batch, dim, f)`` into ``(batch, nodes or edges, entries * f)`` by group and
        matrix, and the rest.
        """
        batch, _, each = features.shape
        parts = features.index_select(1, self._order).split(self._lengths, 1)
        shapes = [*zip(self.sizes, self.entries, strict=True)]
        shapes += [(m.n_rows * m.n_columns, m.entries) for m in self.matrices] + [
            (1, self.loose)
        ]
        shaped = [
            part.reshape(batch, n, k * each)
            for part, (n, k) in zip(parts, shapes, strict=True)
        ]
        n_groups = len(self.groups)
        return shaped[:n_groups], shaped[n_groups:-1], shaped[-1]

    def unpack(self, parts: Iterable[Tensor], features: int) -> Tensor:
        """Return to features on every weight, ``(batch, dim, features)``."""
        flat = [
            part.reshape(len(part), length, features)
            for part, length in zip(parts, self._lengths, strict=True)
        ]
        return torch.cat(flat, 1).index_select(1, self._inverse)

    def ends(self, writers: Tensor, readers: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split ``(..., nodes)`` into what the two ends of each matrix hold, ``(..., rows)`` and
        ``(..., columns)``.
        """
        rows, columns = (
            writers.split([*self.sizes, 1], -1),
            readers.split([*self.sizes, 1], -1),
        )
        pairs = [(rows[matrix.rows], columns[matrix.columns]) for matrix in self.matrices]
        return [*pairs, (rows[-1], readers[..., :-1])]

    def split(self, edges: Tensor) -> list[Tensor]:
        """Split ``(..., edges)`` into matrices, ``(..., rows, columns)``."""
        shapes = [(matrix.n_rows, matrix.n_columns) for matrix in self.matrices] + [
            (1, sum(self.sizes))
        ]
        parts = edges.split([rows * columns for rows, columns in shapes], -1)
        return [
            part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)
        ]

    def collect(self, written: list[Tensor], read: list[Tensor]) -> Tensor:
        """Add up what the rows and the columns of each matrix got, by node: ``(..., nodes)``."""
        groups = [*read[-1].split(self.sizes, -1), written[-1]]
        for matrix, rows, columns in zip(self.matrices, written, read, strict=False):
            groups[matrix.rows] = groups[matrix.rows] + rows
            groups[matrix.columns] = groups[matrix.columns] + columns
        return torch.cat(groups, -1)


def _places(
    spec: WeightSpec,
) -> tuple[dict[_Group, int], list[tuple[tuple[_Group, ...], Tensor]]]:
    """Return the size of every group of nodes.

    And for every tensor its groups and its entries there.

    Two groups make edges, ``(rows, columns, entries)``, one makes features of nodes,
    ``(nodes, entries)``, and none leaves ``(entries,)`` to the global node.
    """
    # in order of depth
    labels = sorted(spec.widths, key=[*spec.activations, *spec.widths].index)
    sizes: dict[_Group, int] = {("hidden", label): spec.widths[label] for label in labels}
    places = []
    # matrices say what outputs there are
    for name in sorted(spec.names, key=lambda name: -len(spec.axes[name])):
        axes, shape, where = spec.axes[name], spec.shapes[name], spec.slices[name]
        if any(axes[2:]):
            raise ValueError(
                "hidden units must index the first two axes of a tensor, but "
                f"{name!r} has axes {axes}"
            )
        ends: tuple[_Group, ...] = tuple(
            (kind, str(size)) if label is None else ("hidden", label)
            for kind, label, size in zip(("output", "input"), axes, shape, strict=False)
        )
        if not any(axes) and (
            name in spec.extras or (len(ends) == 1 and ends[0] not in sizes)
        ):
            ends = ()
        n = [spec.widths[end] if kind == "hidden" else int(end) for kind, end in ends]
        sizes |= dict(zip(ends, n, strict=True))
        index = torch.arange(where.start, where.stop)
        if len(ends) == 2:  # flattened channels are blocks of entries of one unit
            index = index.reshape(
                n[0], shape[0] // n[0], n[1], shape[1] // n[1], -1
            ).transpose(1, 2)
        places.append((ends, index.reshape(*n, -1)))
    return sizes, places


def _waves(positions: list[float]) -> Tensor:
    """Return smooth features of numbers in [0, 1], ``(numbers, 4)``."""
    return torch.cos(math.pi * torch.tensor(positions).unsqueeze(-1) * torch.arange(1, 5))


@checked
class GraphNet(nn.Module):
    """A graph attention network over the weights of a network, equivariant or invariant to its
    permutations.

    Works for every network that `WeightSpec` can label: chains, convolutions, residual connections,
    a hidden layer at both ends of one tensor. Maps features on every weight,
    ``(batch, dim, in_features)``, to features on every weight or, if ``invariant``, to one vector a
    network. Each block makes a message on every edge from the edge and both of its ends, and adds
    it to the edge. A node attends to its incident edges alone, as a writer and as a reader with
    different parameters, in one softmax over all tensors that touch it (Velickovic et al. 2018; the
    scores come from the message, as in Brody et al. 2022): it takes in the messages themselves and
    the other ends' values, multiplied by a gate from the message as activations are by weights.
    Time and memory are linear in the number of edges. In the spirit of Lim et al. (2023), Kofinas
    et al. (2024) and Diao and Loynd (2023).

    The parameters depend on ``spec`` only through the number of its inputs and outputs, the kernel
    positions of its tensors (and entries of a unit in a flattened axis), the one-axis entries of
    its units (a bias, say) and the loose entries (such as likelihood parameters): each such number
    has its own maps into and out of the graph. A ``state_dict`` loads into the network of another
    ``spec`` that has the same numbers: perceptrons of other widths and depths, for example.

    Args:
        spec: any network.
        in_features: features on every weight.
        out_features: features of the result, on every weight or in all.
        width: channels of a node; an edge has about a quarter of it.
        depth: number of blocks.
        heads: attention heads; divides ``width``.
        invariant: give one vector a network; else the result is equivariant and starts at zero.
        time: condition on a time in [0, 1] (AdaLN).
        context: length of a vector to condition on (AdaLN), 0 for none.
        unit_features: additional features of hidden units, 0 for none.

    Raises:
        ValueError: if ``heads`` does not divide ``width``, or if a tensor has hidden units along an
            axis that is neither its first nor its second.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        >>> spec = WeightSpec.of(net)
        >>> GraphNet(spec, 1, 10, invariant=True)(torch.ones(5, spec.dim, 1)).shape
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
        heads: Count = 4,
        invariant: bool = False,
        time: bool = False,
        context: Whole = 0,
        unit_features: Whole = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"heads must divide width, got {heads} heads and width {width}"
            )
        edge_width = heads * max(2, width // (4 * heads))
        self.graph = graph = WeightGraph(spec)
        self._in_features, self._unit_features, self._context_length = (
            in_features,
            unit_features,
            context,
        )
        self.time = TimeEmbedding(width) if time else None
        self.context = (
            nn.Sequential(perceptron(context, width, width), nn.SiLU()) if context else None
        )
        self.lift = _Lift(graph, in_features, unit_features, width, edge_width)
        self.blocks = nn.ModuleList(
            _Block(
                graph,
                width,
                edge_width,
                heads,
                time or context > 0,
                updates_edges=not invariant or i < depth - 1,
            )
            for i in range(depth)
        )
        self.head = (
            perceptron(3 * width, width, out_features)
            if invariant
            else _Head(graph, out_features, width, edge_width)
        )

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
            t: ``(batch,)``, if built with ``time``.
            context: ``(batch, context)``, if built with ``context``.
            units: ``(batch, width, unit_features)`` for each hidden layer by label, if built with
                ``unit_features``.

        Returns:
            ``(batch, dim, out_features)``, or ``(batch, out_features)`` if invariant.

        Raises:
            ValueError: if an argument is missing or not wanted.
        """
        self._check(features, units)
        condition = embedded_condition(
            (self.time, t), (self.context, context), self._context_length
        )
        nodes, edges = self.lift(features, units)
        for block in self.blocks:
            nodes, edges = block(nodes, edges, condition)
        nodes = F.layer_norm(nodes, nodes.shape[-1:])
        if isinstance(self.head, _Head):
            return self.head(nodes, _normalised_edges(edges))
        return self.head(torch.cat([nodes[:, -1], nodes.mean(1), nodes.amax(1)], -1))

    def _check(self, features: Tensor, units: Mapping[str, Tensor] | None) -> None:
        """Raise ``ValueError`` unless the features fit the network."""
        expected = (self.graph.dim, self._in_features)
        if features.dim() != 3 or features.shape[1:] != expected:
            raise ValueError(
                f"features must be (batch, {expected[0]}, {expected[1]}), got "
                f"{tuple(features.shape)}"
            )
        k = self._unit_features
        wanted = (
            {label: (len(features), size, k) for label, size in self.graph.hidden.items()}
            if k
            else {}
        )
        found = {label: tuple(values.shape) for label, values in (units or {}).items()}
        if found != wanted:
            raise ValueError(f"this network takes features of units {wanted}, got {found}")


class _Lift(nn.Module):
    """Features on weights to channels of nodes and edges."""

    def __init__(
        self,
        graph: WeightGraph,
        in_features: int,
        unit_features: int,
        width: int,
        edge_width: int,
    ) -> None:
        super().__init__()
        self.graph = graph
        on_nodes, on_edges = (
            sorted({*graph.entries} - {0}),
            sorted({matrix.entries for matrix in graph.matrices}),
        )
        self.nodes = nn.ModuleDict(
            {str(k): nn.Linear(k * in_features, width) for k in on_nodes}
        )
        self.edges = nn.ModuleDict(
            {str(k): _EdgeLinear(k * in_features, edge_width) for k in on_edges}
        )
        self.loose = nn.Linear(graph.loose * in_features, width) if graph.loose else None
        self.units = nn.Linear(unit_features, width) if unit_features else None
        self.positions = nn.ParameterDict(
            {
                kind + name: torch.randn(int(name), width)
                for kind, name in graph.groups
                if kind != "hidden"
            }
        )
        self.node_kinds = nn.Linear(graph.node_features.shape[-1], width)
        self.matrix_kinds = nn.Linear(graph.matrix_features.shape[-1], edge_width)

    def forward(
        self, features: Tensor, units: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return ``(batch, nodes, width)`` and ``(batch, edges, edge_width)``."""
        graph, batch = self.graph, len(features)
        on_nodes, on_edges, loose = graph.pack(features)
        *of_groups, of_global = self.node_kinds(graph.node_features).split(
            [*graph.sizes, 1]
        )
        groups = []
        for (kind, name), k, own, values in zip(
            graph.groups, graph.entries, of_groups, on_nodes, strict=True
        ):
            nodes = own + self.nodes[str(k)](values) if k else own.expand(batch, -1, -1)
            if kind != "hidden":
                nodes = nodes + self.positions[kind + name]
            elif self.units is not None and units:
                nodes = nodes + self.units(units[name])
            groups.append(nodes)
        groups.append(
            of_global + self.loose(loose)
            if self.loose is not None
            else of_global.expand(batch, -1, -1)
        )
        # (channels, 1) each
        *of_matrices, of_links = self.matrix_kinds(graph.matrix_features).unsqueeze(-1)
        matrices = [
            own + self.edges[str(matrix.entries)](values.transpose(1, 2))
            for matrix, own, values in zip(
                graph.matrices, of_matrices, on_edges, strict=True
            )
        ]
        links = of_links.expand(batch, -1, sum(graph.sizes))
        return torch.cat(groups, 1), torch.cat([*matrices, links], -1)


class _EdgeLinear(nn.Linear):
    """A linear map of the channels of ``(batch, channels, edges)``."""

    def forward(
        self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Apply the map to ``input * (1 + scale) + shift``, both ``(batch or 1, 1, channels)``."""
        # There are far more edges than channels: scaling the map is cheaper than scaling them.
        weight = self.weight.unsqueeze(0) if scale is None else self.weight * (1 + scale)
        bias = (
            self.bias.unsqueeze(0)
            if shift is None
            else F.linear(shift, self.weight, self.bias)
        )
        return torch.baddbmm(bias.mT, weight.expand(len(input), -1, -1), input)


class _Messages(nn.Module):
    """A message on every edge, from the edge, its two ends and their product:
    ``(batch, channels, edges)``.
    """

    def __init__(self, graph: WeightGraph, width: int, edge_width: int) -> None:
        super().__init__()
        self.graph = graph
        self.own = _EdgeLinear(edge_width, edge_width)
        self.ends = nn.Linear(width, 2 * edge_width)
        nn.init.ones_(self.ends.bias)  # (1 + a) (1 + b): both ends and their product

    def forward(
        self,
        nodes: Tensor,
        edges: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Apply the map to normalised nodes and edges, the latter scaled and shifted."""
        own = self.graph.split(self.own(edges, scale, shift))
        ends = self.graph.ends(*self.ends(nodes).transpose(1, 2).chunk(2, 1))
        sums = [
            torch.addcmul(matrix, rows.unsqueeze(-1), columns.unsqueeze(-2)).flatten(-2)
            for matrix, (rows, columns) in zip(own, ends, strict=True)
        ]
        return F.silu(torch.cat(sums, -1))


class Attention(nn.Module):
    """What every node takes in from its incident edges, ``(batch, nodes, width)``.

    See `GraphNet`.
    """

    def __init__(self, graph: WeightGraph, width: int, edge_width: int, heads: int) -> None:
        super().__init__()
        self.graph, self.heads = graph, heads
        self.scores = _EdgeLinear(edge_width, 4 * heads)
        nn.init.ones_(self.scores.bias[2 * heads :])  # gates start open
        self.values = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width + 2 * edge_width, width)

    def forward(self, nodes: Tensor, messages: Tensor) -> Tensor:
        """Apply the map to normalised nodes."""
        scores = self.scores(messages).unflatten(1, (2, 2, self.heads))
        # (batch, 2, heads, edges): as seen by writers, and by readers
        logits, gates = scores.unbind(1)
        # Bounded logits need no maximum before the exponential, so that the matrices' sums can
        # simply be added.
        weights = (LOGIT_RANGE * torch.sigmoid(logits)).exp()
        # (batch, 2, heads, v, nodes)
        values = self.values(nodes).unflatten(-1, (2, self.heads, -1)).movedim(1, -1)
        written, read = [], []
        for weight, gated, message, (rows, columns) in zip(
            self.graph.split(weights),
            self.graph.split(weights * gates),
            self.graph.split(messages.unflatten(1, (self.heads, -1))),
            self.graph.ends(*values.unbind(1)),
            strict=True,
        ):
            (to_rows, to_columns), (gated_to_rows, gated_to_columns) = (
                weight.unbind(1),
                gated.unbind(1),
            )
            written.append(_received(to_rows, gated_to_rows, message, columns, side=0))
            read.append(
                _received(to_columns.mT, gated_to_columns.mT, message.mT, rows, side=1)
            )
        total, received = self.graph.collect(written, read).tensor_split([1], 2)
        return self.out((received / total).flatten(1, 2).transpose(1, 2))


def _received(
    weights: Tensor, gated: Tensor, messages: Tensor, values: Tensor, side: int
) -> Tensor:
    """Sum the weights, and all that they weigh, over the neighbours of every node.

    Args:
        weights: ``(batch, heads, nodes, neighbours)``.
        gated: weights of the values, likewise.
        messages: ``(batch, heads, m, nodes, neighbours)``.
        values: ``(batch, heads, v, neighbours)``.
        side: 0 for writers, 1 for readers, whose messages go to other channels.

    Returns:
        ``(batch, heads, 1 + v + 2 m, nodes)``.
    """
    told = (weights.unsqueeze(2) * messages).sum(-1)
    none = torch.zeros_like(told)
    return torch.cat(
        [
            weights.sum(-1).unsqueeze(2),
            values @ gated.mT,
            *((told, none) if side == 0 else (none, told)),
        ],
        2,
    )


def _normalised_edges(edges: Tensor) -> Tensor:
    """Divide the channels of ``(batch, channels, edges)`` by their root mean square.

    They are features of a network of ours, made of standardised weights: 1e-5 is small whatever the
    units of these.
    """
    return edges * (edges.square().mean(1, keepdim=True) + 1e-5).rsqrt()


class _Block(nn.Module):
    """One residual block; see `GraphNet`."""

    def __init__(
        self,
        graph: WeightGraph,
        width: int,
        edge_width: int,
        heads: int,
        conditioned: bool,
        updates_edges: bool,
    ) -> None:
        super().__init__()
        self.messages = _Messages(graph, width, edge_width)
        self.attend = Attention(graph, width, edge_width, heads)
        self.mix = perceptron(width, 2 * width, width)
        self.update = _EdgeLinear(edge_width, edge_width) if updates_edges else None
        self._sizes = [width] * 6 + [edge_width] * (3 if updates_edges else 2)
        self.modulation = nn.Parameter(torch.zeros(sum(self._sizes)))
        self.modulate = (
            nn.Linear(width, sum(self._sizes), bias=False) if conditioned else None
        )
        if self.modulate is not None:
            nn.init.zeros_(self.modulate.weight)

    def forward(
        self, nodes: Tensor, edges: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Apply the block to ``(batch, nodes, width)``, ``(batch, edges, edge_width)``, given
        ``(batch, width)``.
        """
        modulation = self.modulation.unsqueeze(0)
        if self.modulate is not None and condition is not None:
            # (batch, 1, channels)
            modulation = modulation + self.modulate(condition).unsqueeze(1)
        (
            scale,
            shift,
            gate,
            scale_mix,
            shift_mix,
            gate_mix,
            scale_edge,
            shift_edge,
            *gate_edge,
        ) = modulation.split(self._sizes, -1)
        seen = _normalised(nodes, scale, shift)
        messages = self.messages(seen, _normalised_edges(edges), scale_edge, shift_edge)
        nodes = torch.addcmul(nodes, 1 + gate, self.attend(seen, messages))
        nodes = torch.addcmul(
            nodes, 1 + gate_mix, self.mix(_normalised(nodes, scale_mix, shift_mix))
        )
        if self.update is not None:
            edges = edges + self.update(messages, *gate_edge)
        return nodes, edges


def _normalised(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise the channels, then scale and shift them."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class _Head(nn.Module):
    """Channels of nodes and edges to features on every weight, zero at the start."""

    def __init__(
        self, graph: WeightGraph, out_features: int, width: int, edge_width: int
    ) -> None:
        super().__init__()
        self.graph, self._out_features = graph, out_features
        on_nodes, on_edges = (
            sorted({*graph.entries} - {0}),
            sorted({matrix.entries for matrix in graph.matrices}),
        )
        self.messages = _Messages(graph, width, edge_width)
        self.nodes = nn.ModuleDict(
            {str(k): nn.Linear(width, k * out_features) for k in on_nodes}
        )
        self.edges = nn.ModuleDict(
            {str(k): _EdgeLinear(2 * edge_width, k * out_features) for k in on_edges}
        )
        self.loose = nn.Linear(width, graph.loose * out_features) if graph.loose else None
        for linear in [
            *self.nodes.values(),
            *self.edges.values(),
            *([self.loose] if self.loose else []),
        ]:
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """Return ``(batch, dim, out_features)``."""
        graph = self.graph
        *groups, last = nodes.split([*graph.sizes, 1], 1)
        *matrices, _ = graph.split(torch.cat([edges, self.messages(nodes, edges)], 1))
        parts = [
            self.nodes[str(k)](group) if k else group[..., :0]
            for k, group in zip(graph.entries, groups, strict=True)
        ]
        parts += [
            self.edges[str(matrix.entries)](own.flatten(-2)).transpose(1, 2)
            for matrix, own in zip(graph.matrices, matrices, strict=True)
        ]
        parts.append(self.loose(last) if self.loose is not None else last[..., :0])
        return graph.unpack(parts, self._out_features)
