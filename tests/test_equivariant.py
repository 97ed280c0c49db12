"""Laws of the weight-space layers: they commute with the group, and they are all the maps that
do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bnnflow import WeightSpec
from bnnflow.equivariant import DWSInvariant, DWSLayer, DWSNet
from bnnflow.equivariant.layout import Layout
from bnnflow.weights import Symmetries

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module]) -> nn.Module:
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


def chain(*widths: int, bias: bool = True) -> WeightSpec:
    def make() -> nn.Module:
        modules: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            modules += [nn.Linear(n_in, n_out, bias=bias), nn.Tanh()]
        return nn.Sequential(*modules[:-1])

    return WeightSpec.of(built(make))


class Backwards(nn.Module):
    """A chain whose layers are defined from the output to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.a = nn.Linear(4, 2), nn.Linear(3, 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Residual(nn.Module):
    """A perceptron with a skip connection: two matrices between the same two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Linear(2, 3),
            nn.Linear(3, 4),
            nn.Linear(4, 3),
            nn.Linear(3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.d(x + self.c(torch.tanh(self.b(x))))


class Square(nn.Module):
    """A residual connection around one layer, whose matrix has the same units on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.c(x + torch.tanh(self.b(x)))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 2, 2),
        nn.ReLU(),
        nn.Conv1d(2, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 2, 2),
    )


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, 3),
        nn.LayerNorm(3),
        nn.ReLU(),
        nn.Linear(3, 4),
        nn.ReLU(),
        nn.Linear(4, 1),
    )


def elements(spec: WeightSpec) -> Tensor:
    """Return every element of the permutation group as a reordering of the weights,
    ``(element, dim)``.
    """
    index = torch.arange(spec.dim).unsqueeze(0)
    for label, width in spec.widths.items():
        perms = torch.tensor(list(itertools.permutations(range(width))))
        index = torch.cat([spec.permute(index, {label: perm}) for perm in perms])
    return index


def dimensions(spec: WeightSpec) -> tuple[int, int]:
    """Return the dimensions of the equivariant and of the invariant linear maps, from the
    characters of the group.
    """
    fixed = (elements(spec) == torch.arange(spec.dim)).sum(-1).double()
    return round(float(fixed.square().mean())), round(float(fixed.mean()))


def span(module: nn.Module, dim: int, *, of_bias: bool = False) -> Tensor:
    """Return the map that each parameter alone makes, ``(parameters, dim * out)``."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    zeros = {
        name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()
    }
    features = (
        torch.zeros(1, dim, 1, dtype=F64)
        if of_bias
        else torch.eye(dim, dtype=F64).unsqueeze(-1)
    )
    maps = []
    for name, size in sizes.items():
        for i in range(size):
            one = torch.zeros(size, dtype=F64)
            one[i] = 1
            params = zeros | {name: one.reshape(zeros[name].shape)}
            maps.append(torch.func.functional_call(module, params, (features,)).flatten())
    return torch.stack(maps)


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-10))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def formula(widths: tuple[int, ...]) -> tuple[int, int]:
    """Return the dimensions that the documentation of `DWSLayer` states."""
    n = len(widths) - 1
    if n == 1:
        dim = widths[0] * widths[1] + widths[1]
        return dim**2, dim
    g = 2 * n - 3 + widths[0] + 2 * widths[-1]
    k = [
        1 + (widths[0] if m == 0 else 1) + (widths[-1] if m == n - 2 else 1)
        for m in range(n - 1)
    ]
    return g**2 + sum(each**2 for each in k) + n - 2, g


KNOWN = {
    (2, 3, 4, 3, 2): 164,
    (2, 3, 3, 1): 75,
    (2, 4, 3, 4, 3, 2): 222,
    (3, 4, 2): 100,
    (3, 2): 64,
}
SPECS: dict[str, Callable[[], WeightSpec]] = {
    **{
        "-".join(map(str, widths)): lambda widths=widths: chain(*widths) for widths in KNOWN
    },
    "without biases": lambda: chain(2, 3, 4, 3, bias=False),
    "shallow without biases": lambda: chain(3, 4, 2, bias=False),
    "with extras": lambda: chain(2, 3, 3, 1).extend({"noise": (1,), "others": (2,)}),
    "extras without biases": lambda: chain(2, 3, 4, 1, bias=False).extend({"noise": (1,)}),
    "defined backwards": lambda: WeightSpec.of(built(Backwards)),
    "widths 2": lambda: chain(2, 2, 2, 1),
    "widths 2 without biases": lambda: chain(1, 2, 2, 2, bias=False),
    "a width 1": lambda: chain(1, 1, 3, 1),
    "a width 1 inside": lambda: chain(2, 3, 1, 2, 1),
    "convolutions": lambda: WeightSpec.of(built(convolutional)),
    "layer norm": lambda: WeightSpec.of(built(normalised)),
    "residual": lambda: WeightSpec.of(built(Residual)),
}


# ---------------------------------------- completeness


@pytest.mark.parametrize("widths", KNOWN, ids=str)
def test_layer_has_the_dimension_that_it_states(widths: tuple[int, ...]) -> None:
    layer = built(lambda: DWSLayer(chain(*widths), 1, 1, bias=False))
    assert count(layer) == KNOWN[widths] == formula(widths)[0]
    assert formula(widths) == dimensions(chain(*widths))


@pytest.mark.parametrize("name", SPECS)
def test_layer_is_complete_and_without_redundancy(name: str) -> None:
    spec = SPECS[name]()
    equivariant, invariant = dimensions(spec)
    layer = built(lambda: DWSLayer(spec, 1, 1, bias=False))
    assert rank(span(layer, spec.dim)) == count(layer) == equivariant
    with_bias = built(lambda: DWSLayer(spec, 1, 1))
    assert (
        rank(span(with_bias, spec.dim, of_bias=True))
        == count(with_bias) - count(layer)
        == invariant
    )
    pooled = built(lambda: DWSInvariant(spec, 1, 1, bias=False))
    assert rank(span(pooled, spec.dim)) == count(pooled) == invariant


def test_layer_is_full_where_nothing_can_be_permuted() -> None:
    spec = chain(2, 1, 1, 2)
    layer = built(lambda: DWSLayer(spec, 1, 1, bias=False))
    assert rank(span(layer, spec.dim)) == count(layer) == spec.dim**2


def test_layer_spans_what_group_averaging_finds() -> None:
    spec = chain(2, 3, 3, 1)
    matrices = torch.eye(spec.dim, dtype=F64)[elements(spec)]  # (36, dim, dim)
    # onto equivariant maps
    projector = torch.stack([torch.kron(matrix, matrix) for matrix in matrices]).mean(0)
    found = span(built(lambda: DWSLayer(spec, 1, 1, bias=False)), spec.dim)
    torch.testing.assert_close(found @ projector, found, rtol=0, atol=1e-12)
    assert rank(found) == rank(projector) == 75


@pytest.mark.parametrize("features", [(1, 3), (2, 1), (3, 2)], ids=str)
def test_parameters_grow_with_pairs_of_features(features: tuple[int, int]) -> None:
    n_in, n_out = features
    spec = chain(2, 3, 3, 1)
    equivariant, invariant = dimensions(spec)
    assert (
        count(built(lambda: DWSLayer(spec, n_in, n_out)))
        == n_in * n_out * equivariant + n_out * invariant
    )
    assert (
        count(built(lambda: DWSInvariant(spec, n_in, n_out)))
        == n_in * n_out * invariant + n_out
    )


# ---------------------------------------- equivariance


def permutations(spec: WeightSpec) -> Symmetries:
    return Symmetries(frozenset(spec.widths), frozenset(), frozenset())


def permuted(spec: WeightSpec, *features: Tensor) -> tuple[Tensor, ...]:
    """Apply one random permutation per batch entry to features ``(batch, dim, feature)``, the same
    to all of them.
    """
    index = torch.arange(spec.dim).expand(len(features[0]), -1)
    (moved,) = spec.transform(permutations(spec), 5, index)
    if spec.widths:
        assert not torch.equal(moved, index)
    return tuple(
        each.gather(1, moved.unsqueeze(-1).expand(-1, -1, each.shape[-1]))
        for each in features
    )


def check_close(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-10
    assert expected.std() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_layer_commutes_with_permutations(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]()
    features = torch.randn(5, spec.dim, 3, generator=generator(), dtype=F64).to(dtype)
    layer = built(lambda: DWSLayer(spec, 3, 4)).to(dtype)
    moved, expected = permuted(
        spec, features, torch.zeros(5, spec.dim, 4, dtype=dtype) + layer(features)
    )
    check_close(layer(moved), expected)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_invariant_layer_ignores_permutations(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]()
    features = torch.randn(5, spec.dim, 3, generator=generator(), dtype=F64).to(dtype)
    layer = built(lambda: DWSInvariant(spec, 3, 4)).to(dtype)
    check_close(layer(*permuted(spec, features)), layer(features))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_network_commutes_with_permutations(
    name: str, dtype: torch.dtype, depth: int
) -> None:
    spec = SPECS[name]()
    g = generator()
    features = torch.randn(5, spec.dim, 2, generator=g, dtype=F64).to(dtype)
    t = torch.rand(5, generator=g, dtype=F64).to(dtype)
    net = built(lambda: DWSNet(spec, 2, 3, width=12, depth=depth, time=True)).to(dtype)
    moved, expected = permuted(spec, features, net(features, t))
    check_close(net(moved, t), expected)


def test_network_depends_on_time_and_on_every_weight() -> None:
    spec = SPECS["with extras"]()
    net = built(lambda: DWSNet(spec, 1, 1, width=12, depth=2, time=True))
    theta = torch.randn(spec.dim, generator=generator(), dtype=F64)

    def field(theta: Tensor, t: float) -> Tensor:
        return net(theta.reshape(1, -1, 1), torch.tensor([t], dtype=F64)).flatten()

    assert not torch.allclose(field(theta, 0.2), field(theta, 0.7))
    assert field(theta, 1.0).isfinite().all()
    assert (torch.func.jacrev(field)(theta, 0.5) != 0).all()


def test_network_starts_at_zero() -> None:
    with torch.random.fork_rng(devices=[]):
        net = DWSNet(chain(2, 3, 3, 1), 1, 2, width=8, depth=2)
    outputs = net(torch.ones(3, 25, 1))
    assert torch.equal(outputs, torch.zeros(3, 25, 2))


# ---------------------------------------- layout


@pytest.mark.parametrize("name", SPECS)
def test_layout_goes_there_and_back(name: str) -> None:
    spec = SPECS[name]()
    layout = Layout(spec)
    for lead in [(), (0,), (4,), (2, 3)]:
        features = torch.randn(*lead, spec.dim, 3, generator=generator())
        assert torch.equal(layout.unpack(layout.pack(features), 3), features)


@pytest.mark.parametrize("lead", [(), (0,), (2, 3)], ids=str)
def test_any_leading_axes(lead: tuple[int, ...]) -> None:
    spec = chain(2, 3, 4, 1)
    features = torch.randn(*lead, spec.dim, 2, generator=generator(), dtype=F64)
    layer, pooled = (
        built(lambda: DWSLayer(spec, 2, 3)),
        built(lambda: DWSInvariant(spec, 2, 3)),
    )
    assert layer(features).shape == (*lead, spec.dim, 3)
    assert pooled(features).shape == (*lead, 3)
    if math.prod(lead) > 1:
        torch.testing.assert_close(layer(features)[1, 2], layer(features[1, 2]))


def test_state_is_saved_without_the_layout() -> None:
    spec = chain(2, 3, 4, 1)
    first, second = (
        built(lambda: DWSNet(spec, 1, 1, width=8, depth=1)),
        built(lambda: DWSNet(spec, 1, 1, width=8, depth=1)),
    )
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    second.load_state_dict(first.state_dict())
    features = torch.ones(2, spec.dim, 1, dtype=F64)
    assert torch.equal(first(features), second(features))
    assert all(value.is_floating_point() for value in first.state_dict().values())


@pytest.mark.parametrize("layer", [DWSLayer, DWSInvariant, DWSNet])
def test_networks_without_labels_are_refused(layer: Callable) -> None:
    net = built(lambda: nn.Conv1d(1, 2, 2))
    with pytest.raises(ValueError, match=r"a chain of layers.*its weights have no labels"):
        layer(WeightSpec.unlabelled(net), 1, 1)
    # known to have no symmetry: any map will do
    free = WeightSpec.unlabelled(net, unknown="")
    built(lambda: layer(free, 1, 1))


@pytest.mark.parametrize("layer", [DWSLayer, DWSInvariant, DWSNet])
def test_a_square_residual_matrix_is_refused_by_name(layer: Callable) -> None:
    with pytest.raises(
        ValueError, match=r"'b.weight' has one hidden layer twice.*graph network"
    ):
        layer(WeightSpec.of(built(Square)), 1, 1)


def test_three_hidden_axes_are_refused_by_name() -> None:
    spec = chain(2, 3, 4, 2, 1)
    extended = spec.extend({"odd": (3, 4, 2)}, {"odd": ("h1", "h2", "h3")})
    with pytest.raises(ValueError, match="'odd' has 3 hidden axes"):
        DWSLayer(extended, 1, 1)
