"""Laws of the graph attention network: it commutes with permutations, on every network, and lives
on edges alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnnflow import WeightSpec
from bnnflow.equivariant import GraphNet
from bnnflow.equivariant.graph import LOGIT_RANGE, Attention, WeightGraph
from bnnflow.weights import Symmetries

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module]) -> Any:
    """Build a module and fill all of its parameters from a seed, without a trace in the global
    generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = make().double()
    g = generator(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g, dtype=F64))
    return module


class Net(nn.Module):
    """Layers by name and a forward pass of one's own."""

    def __init__(
        self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def chain(*widths: int, bias: bool = True) -> nn.Module:
    modules: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        modules += [nn.Linear(n_in, n_out, bias=bias), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.ReLU(),
        nn.Linear(5, 2),
    )


def residual() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = x + net.b(F.relu(net.a(net.norm(x))))
        return net.out(x + net.d(F.relu(net.c(x))))

    return Net(
        forward,
        stem=nn.Linear(3, 6),
        norm=nn.LayerNorm(6),
        a=nn.Linear(6, 4),
        b=nn.Linear(4, 6),
        c=nn.Linear(6, 4),
        d=nn.Linear(4, 6),
        out=nn.Linear(6, 2),
    )


def square() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        x = x + torch.tanh(net.a(x))
        return net.out(x + torch.tanh(net.b(x)))

    return Net(
        forward,
        stem=nn.Linear(3, 5),
        a=nn.Linear(5, 5),
        b=nn.Linear(5, 5),
        out=nn.Linear(5, 2),
    )


def of(make: Callable[[], nn.Module]) -> WeightSpec:
    return WeightSpec.of(built(make))


SPECS: dict[str, Callable[[], WeightSpec]] = {
    "linear": lambda: of(lambda: chain(3, 2)),
    "2-5-1": lambda: of(lambda: chain(2, 5, 1)),
    "2-4-3-1": lambda: of(lambda: chain(2, 4, 3, 1)),
    "3-4-4-3-2": lambda: of(lambda: chain(3, 4, 4, 3, 2)),
    "narrow": lambda: of(lambda: chain(1, 1, 3, 1)),
    "without biases": lambda: of(lambda: chain(2, 3, 4, 3, bias=False)),
    "convolutions": lambda: of(convolutions),
    "residual": lambda: of(residual),
    "square": lambda: of(square),
    "with extras": lambda: of(lambda: chain(2, 3, 3, 1)).extend(
        {"noise": (1,), "scale": (), "local": (3, 3), "unit": (3,)},
        {"local": ("h2", "h1"), "unit": ("h1",)},
    ),
    "unlabelled": lambda: WeightSpec.unlabelled(built(lambda: nn.Conv1d(2, 3, 2))),
}


def transformed(spec: WeightSpec, *features: Tensor) -> tuple[Tensor, ...]:
    """Apply one random permutation per batch entry to features ``(batch, dim, feature)``, the same
    to all of them.
    """
    index = torch.arange(spec.dim).expand(len(features[0]), -1)
    group = Symmetries(frozenset(spec.widths), frozenset(), frozenset())
    (moved,) = spec.transform(group, 5, index)
    assert not spec.widths or not torch.equal(moved, index)
    return tuple(
        each.gather(1, moved.unsqueeze(-1).expand(-1, -1, each.shape[-1]))
        for each in features
    )


def check_close(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-10
    assert expected.std() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---------------------------------------- symmetry


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_network_commutes_with_permutations(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]()
    g = generator()
    features = torch.randn(4, spec.dim, 2, generator=g, dtype=F64).to(dtype)
    t, context = (
        torch.rand(4, generator=g, dtype=F64).to(dtype),
        torch.randn(4, 3, generator=g, dtype=F64).to(dtype),
    )
    net = built(lambda: GraphNet(spec, 2, 3, width=12, depth=2, time=True, context=3)).to(
        dtype
    )
    moved, expected = transformed(spec, features, net(features, t, context))
    assert expected.shape == (4, spec.dim, 3)
    check_close(net(moved, t, context), expected)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_invariant_network_ignores_permutations(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]()
    features = torch.randn(4, spec.dim, 2, generator=generator(), dtype=F64).to(dtype)
    net = built(lambda: GraphNet(spec, 2, 3, width=12, depth=2, invariant=True)).to(dtype)
    expected = net(features)
    assert expected.shape == (4, 3)
    check_close(net(*transformed(spec, features)), expected)


def test_features_of_units_move_with_the_units() -> None:
    spec = SPECS["square"]()
    g = generator()
    perm = torch.tensor([3, 0, 4, 1, 2])
    theta = torch.randn(2, spec.dim, generator=g, dtype=F64)
    units = {
        label: torch.randn(2, n, 3, generator=g, dtype=F64)
        for label, n in spec.widths.items()
    }
    label, net = (
        next(iter(units)),
        built(lambda: GraphNet(spec, 1, 1, width=8, depth=2, unit_features=3)),
    )
    expected = net(theta.unsqueeze(-1), units=units)
    moved = net(
        spec.permute(theta, {label: perm}).unsqueeze(-1),
        units=units | {label: units[label][:, perm]},
    )
    check_close(moved.squeeze(-1), spec.permute(expected.squeeze(-1), {label: perm}))
    unmoved = net(spec.permute(theta, {label: perm}).unsqueeze(-1), units=units)
    assert not torch.allclose(unmoved, moved)


# ---------------------------------------- attention


def joined(graph: WeightGraph) -> list[tuple[int, int]]:
    """Return the numbers of the nodes at the two ends of every edge."""
    starts = [0, *itertools.accumulate(graph.sizes)]
    pairs = [
        (starts[matrix.rows] + i, starts[matrix.columns] + j)
        for matrix in graph.matrices
        for i, j in itertools.product(range(matrix.n_rows), range(matrix.n_columns))
    ]
    return pairs + [(starts[-1], j) for j in range(starts[-1])]


def test_attention_is_one_softmax_over_the_incident_edges() -> None:
    g, heads = generator(), 2
    attention = built(lambda: Attention(WeightGraph(SPECS["square"]()), 6, 4, heads))
    pairs = joined(attention.graph)
    n_nodes = attention.graph.node_features.shape[0]
    nodes, messages = (
        torch.randn(n_nodes, 6, generator=g, dtype=F64),
        torch.randn(4, len(pairs), generator=g, dtype=F64),
    )
    scores = (attention.scores.weight @ messages).T + attention.scores.bias
    # (edges, 2, heads)
    logits, gates = (part.unflatten(1, (2, heads)) for part in scores.chunk(2, 1))
    values = attention.values(nodes).unflatten(1, (2, heads, -1))  # (nodes, 2, heads, v)
    told = messages.T.unflatten(1, (heads, -1))  # (edges, heads, m)
    rows = []
    for node in range(n_nodes):
        incident = [
            (e, side, pair[1 - side])
            for e, pair in enumerate(pairs)
            for side in (0, 1)
            if pair[side] == node
        ]
        e, side, other = (torch.tensor(each) for each in zip(*incident, strict=True))
        # (incident, heads, 1)
        weights = (LOGIT_RANGE * torch.sigmoid(logits[e, side])).softmax(0).unsqueeze(-1)
        seen = (weights * gates[e, side].unsqueeze(-1) * values[other, 1 - side]).sum(0)
        by_side = [
            (weights * told[e] * (side == s).reshape(-1, 1, 1)).sum(0) for s in (0, 1)
        ]
        rows.append(torch.cat([seen, *by_side], -1).flatten())
    expected = attention.out(torch.stack(rows))
    torch.testing.assert_close(
        attention(nodes.unsqueeze(0), messages.unsqueeze(0))[0], expected
    )


# ---------------------------------------- what it depends on


@pytest.mark.parametrize("name", SPECS)
def test_everything_depends_on_every_weight(name: str) -> None:
    spec = SPECS[name]()
    theta = torch.randn(spec.dim, generator=generator(), dtype=F64)
    equivariant = built(lambda: GraphNet(spec, 1, 1, width=12, depth=3))
    invariant = built(lambda: GraphNet(spec, 1, 2, width=12, depth=3, invariant=True))
    for net in (equivariant, invariant):
        jacobian = torch.func.jacrev(
            lambda theta, net=net: net(theta.reshape(1, -1, 1)).flatten()
        )(theta)
        assert (jacobian != 0).all()


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_gradients_reach_every_parameter(name: str, invariant: bool) -> None:
    spec = SPECS[name]()
    g = generator()
    net = built(
        lambda: GraphNet(
            spec,
            2,
            2,
            8,
            2,
            invariant=invariant,
            time=True,
            context=2,
            unit_features=2 * bool(spec.widths),
        )
    )
    units = {
        label: torch.randn(3, n, 2, generator=g, dtype=F64)
        for label, n in spec.widths.items()
    }
    features, context = (
        torch.randn(3, n, 2, generator=g, dtype=F64) for n in (spec.dim, 1)
    )
    result = net(features, torch.rand(3, generator=g, dtype=F64), context.squeeze(1), units)
    (result * torch.randn(result.shape, generator=g, dtype=F64)).sum().backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name


def test_network_starts_at_zero_unless_it_is_invariant() -> None:
    spec = SPECS["residual"]()
    with torch.random.fork_rng(devices=[]):
        net, pooled = (
            GraphNet(spec, 1, 2, width=8, depth=2, invariant=invariant)
            for invariant in (False, True)
        )
    assert torch.equal(net(torch.ones(3, spec.dim, 1)), torch.zeros(3, spec.dim, 2))
    assert (pooled(torch.ones(3, spec.dim, 1)) != 0).all()


def test_layers_are_told_apart() -> None:
    """Equal features everywhere: only the place of a weight can make results differ."""
    spec = SPECS["square"]()
    net = built(lambda: GraphNet(spec, 1, 1, width=8, depth=2))
    result = spec.unflatten(net(torch.ones(1, spec.dim, 1, dtype=F64)).squeeze(-1))
    values = torch.cat([tensor.flatten() for tensor in result.values()])
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    for name in ("a.weight", "b.weight"):  # nothing tells its units apart but the diagonal
        assert result[name][0][off_diagonal].std() < 1e-12
    distinct = values.mul(1e10).round().unique()
    # stem and out by position; the matrices; output and unit biases
    assert len(distinct) == 3 + 2 + 2 + 2 + 2 + 1


# ---------------------------------------- transfer


@pytest.mark.parametrize("invariant", [False, True])
def test_parameters_fit_other_widths_and_depths(invariant: bool) -> None:
    specs = [
        of(lambda widths=widths: chain(2, *widths, 1))
        for widths in [(4,), (7,), (3, 5), (6, 2, 3, 4)]
    ]
    nets = [
        built(lambda spec=spec: GraphNet(spec, 1, 2, 8, 2, invariant=invariant))
        for spec in specs
    ]
    state = nets[0].state_dict()
    for spec, net in zip(specs, nets, strict=True):
        net.load_state_dict(state)
        features = torch.randn(2, spec.dim, 1, generator=generator(), dtype=F64)
        assert net(features).isfinite().all()


def test_labels_do_not_matter() -> None:
    spec = SPECS["2-4-3-1"]()
    renamed = {"h1": "first", "h2": "second"}
    other = WeightSpec(
        spec.names,
        spec.shapes,
        {
            name: tuple(renamed.get(label, label) if label else None for label in axes)
            for name, axes in spec.axes.items()
        },
        {renamed[label]: activation for label, activation in spec.activations.items()},
    )
    features = torch.randn(2, spec.dim, 1, generator=generator(), dtype=F64)
    first, second = (
        built(lambda spec=spec: GraphNet(spec, 1, 1, 8, 2)) for spec in (spec, other)
    )
    assert torch.equal(first(features), second(features))


# ---------------------------------------- cost


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            self.numel = max(self.numel, each.numel() if isinstance(each, Tensor) else 0)
        return result


@pytest.mark.parametrize(
    "widths", [(2, *[16] * 40, 1), (784, 8, 10)], ids=["deep", "many inputs"]
)
def test_no_tensor_is_larger_than_the_edges(widths: tuple[int, ...]) -> None:
    spec = of(lambda: chain(*widths))
    net = built(lambda: GraphNet(spec, 1, 1, width=8, depth=2))
    nodes = sum(widths) + 1
    edges = sum(a * b for a, b in itertools.pairwise(widths)) + nodes - 1
    with Largest() as record:
        net(torch.ones(1, spec.dim, 1, dtype=F64)).sum().backward()
    scores = 16  # of an edge: four heads, for both of its ends, and as many gates
    assert (
        record.numel
        <= scores * edges
        < max(nodes**2, scores * widths[0] * (sum(widths[1:]) + 2))
    )


# ---------------------------------------- uses


def test_forward_mode_agrees_with_reverse_mode() -> None:
    spec = SPECS["residual"]()
    net = built(lambda: GraphNet(spec, 1, 1, width=8, depth=2, time=True))
    g = generator()
    theta, tangent, cotangent = torch.randn(3, 2, spec.dim, 1, generator=g, dtype=F64)
    t = torch.rand(2, generator=g, dtype=F64)
    forward = torch.func.jvp(lambda theta: net(theta, t), (theta,), (tangent,))[1]
    theta.requires_grad_()
    (backward,) = torch.autograd.grad(net(theta, t), theta, cotangent)
    torch.testing.assert_close((forward * cotangent).sum(), (backward * tangent).sum())


@pytest.mark.parametrize("invariant", [False, True])
def test_autocast_stays_close(invariant: bool) -> None:
    spec = SPECS["convolutions"]()
    net = built(lambda: GraphNet(spec, 1, 1, width=8, depth=2, invariant=invariant)).float()
    features = torch.randn(4, spec.dim, 1, generator=generator())
    expected = net(features)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(features)
        found.float().square().mean().backward()
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    spec = SPECS["residual"]()
    net = built(lambda: GraphNet(spec, 1, 1, width=8, depth=1, time=True))
    features, t = (
        torch.randn(2, spec.dim, 1, generator=generator(), dtype=F64),
        torch.tensor([0.1, 0.7], dtype=F64),
    )
    torch.testing.assert_close(
        torch.compile(net, backend="eager", fullgraph=True)(features, t), net(features, t)
    )


def test_state_is_saved_without_the_graph() -> None:
    spec = SPECS["convolutions"]()
    net = built(lambda: GraphNet(spec, 1, 1, width=8, depth=1))
    assert all(value.is_floating_point() for value in net.state_dict().values())
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}


def test_empty_batches() -> None:
    spec = SPECS["2-4-3-1"]()
    net = built(lambda: GraphNet(spec, 1, 3, width=8, depth=1))
    assert net(torch.zeros(0, spec.dim, 1, dtype=F64)).shape == (0, spec.dim, 3)


# ---------------------------------------- bad input


def test_what_does_not_fit_is_refused() -> None:
    spec = SPECS["2-4-3-1"]()
    with pytest.raises(ValueError, match="heads must divide width"):
        GraphNet(spec, 1, 1, width=10, heads=4)
    third = WeightSpec(("w",), {"w": (2, 2, 3)}, {"w": (None, None, "h1")}, {})
    with pytest.raises(ValueError, match="first two axes"):
        GraphNet(third, 1, 1)
    features, t, context = torch.zeros(2, spec.dim, 1), torch.zeros(2), torch.zeros(2, 3)
    with torch.random.fork_rng(devices=[]):
        plain = GraphNet(spec, 1, 1, width=8, depth=1)
        conditioned = GraphNet(
            spec, 1, 1, width=8, depth=1, time=True, context=3, unit_features=2
        )
    for arguments, match in [
        ((features[0],), "features must be"),
        ((features[:, 1:],), "features must be"),
        ((features, t), "takes no time"),
        ((features, None, context), "context of length 0"),
        ((features, None, None, {"h1": torch.zeros(2, 4, 2)}), "features of units"),
    ]:
        with pytest.raises(ValueError, match=match):
            plain(*arguments)
    units = {label: torch.zeros(2, n, 2) for label, n in spec.widths.items()}
    assert conditioned(features, t, context, units).shape == (2, spec.dim, 1)
    for arguments, match in [
        ((features, None, context, units), "needs a time"),
        ((features, t, context[:, 1:], units), "context of length 3"),
        ((features, t, context), "features of units"),
        ((features, t, context, units | {"h1": torch.zeros(2, 5, 2)}), "features of units"),
    ]:
        with pytest.raises(ValueError, match=match):
            conditioned(*arguments)
