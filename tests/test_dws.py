"""Laws of networks over weight space: whole pipelines, conditions, sharing over depth, embedded
inputs, scaling.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bnnflow import WeightSpec
from bnnflow.equivariant import DWSInvariant, DWSLayer, DWSNet, TensorScaler, Wiring
from bnnflow.equivariant.layout import Channels, Layout
from bnnflow.equivariant.network import Messages
from bnnflow.weights import Symmetries

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64).to(dtype)


def built(make: Callable[[], nn.Module], dtype: torch.dtype = F64) -> nn.Module:
    """Build a module and fill all of its parameters from a seed, without a trace in the global
    generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = make().to(dtype)
    g = generator(1)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=g, dtype=F64))
    return module


def chain(*widths: int, bias: bool = True) -> WeightSpec:
    modules: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        for n_in, n_out in itertools.pairwise(widths):
            modules += [nn.Linear(n_in, n_out, bias=bias), nn.Tanh()]
    return WeightSpec.of(nn.Sequential(*modules[:-1]))


def convolutional() -> WeightSpec:
    with torch.random.fork_rng(devices=[]):
        return WeightSpec.of(
            nn.Sequential(
                nn.Conv2d(1, 3, 2),
                nn.ReLU(),
                nn.Conv2d(3, 4, 2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(16, 2),
            )
        )


SPECS: dict[str, Callable[[], WeightSpec]] = {
    "perceptron": lambda: chain(2, 3, 4, 3, 2),
    "shallow": lambda: chain(3, 5, 2),
    "without biases": lambda: chain(2, 3, 4, 1, bias=False),
    "with extras": lambda: chain(2, 3, 4, 1).extend({"noise": (2,)}),
}
KINDS = {
    "equivariant": {},
    "invariant": {"invariant": True},
    "conditioned": {"time": True, "context": 3, "unit_features": 2},
    "invariant and conditioned": {
        "invariant": True,
        "time": True,
        "context": 3,
        "unit_features": 2,
    },
    "with sines": {"wiring": Wiring(frequency=2.0)},
    "without messages": {"wiring": Wiring(heads=0)},
    "shared": {"wiring": Wiring(shared=True)},
    "shared and invariant": {
        "wiring": Wiring(shared=True, frequency=2.0),
        "invariant": True,
        "context": 3,
        "unit_features": 2,
    },
}


class Pipeline(nn.Module):
    """Scaled weights and one more feature through a network."""

    def __init__(
        self, spec: WeightSpec, n: int = 5, dtype: torch.dtype = F64, **options
    ) -> None:
        super().__init__()
        self.spec, self.options = spec, options
        theta = 3 + 2 * randn(n, spec.dim, seed=7)
        self.scaler = TensorScaler.fit(theta, spec).to(dtype)
        self.net = built(lambda: DWSNet(spec, 1, 3, width=12, depth=2, **options), dtype)

    def forward(self, theta: Tensor, t: Tensor, context: Tensor, *units: Tensor) -> Tensor:
        given = dict(zip(self.spec.widths, units, strict=True))
        return self.net(
            self.scaler(theta).unsqueeze(-1),
            t if "time" in self.options else None,
            context if "context" in self.options else None,
            given if "unit_features" in self.options else None,
        )

    def inputs(self, n: int = 5, dtype: torch.dtype = F64) -> list[Tensor]:
        units = [
            randn(n, width, 2, seed=11, dtype=dtype) for width in self.spec.widths.values()
        ]
        t = torch.rand(n, generator=generator(8), dtype=F64).to(dtype)
        return [
            randn(n, self.spec.dim, dtype=dtype),
            t,
            randn(n, 3, seed=9, dtype=dtype),
            *units,
        ]


def moved(
    spec: WeightSpec, theta: Tensor, units: list[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Permute weights and unit features of every network; return also the order of the weights."""
    tracked = spec.extend(
        {label: (n,) for label, n in spec.widths.items()},
        {label: (label,) for label in spec.widths},
    )
    group = Symmetries(frozenset(spec.widths), frozenset(), frozenset())
    (index,) = tracked.transform(group, 5, torch.arange(tracked.dim).expand(len(theta), -1))
    assert not torch.equal(index[0], index[1])
    parts = index.split([spec.dim, *spec.widths.values()], -1)
    orders = [part - part.min() for part in parts]
    shuffled = [
        u.gather(1, order.unsqueeze(-1).expand_as(u))
        for u, order in zip(units, orders[1:], strict=True)
    ]
    return theta.gather(1, orders[0]), shuffled, orders[0]


def check_close(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-10
    assert expected.std() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---------------------------------------- pipelines


@pytest.mark.crossed
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_pipeline_and_its_gradients_follow_permutations(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    spec = SPECS[name]()
    pipeline = Pipeline(spec, dtype=dtype, **KINDS[kind])
    theta, t, context, *units = pipeline.inputs(dtype=dtype)
    other, shuffled, order = moved(spec, theta, units)

    def run(
        theta: Tensor, units: list[Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        theta = theta.clone().requires_grad_(True)
        result = pipeline(theta, t, context, *units)
        loss = result.square().sum()
        gradient, *others = torch.autograd.grad(
            loss, [theta, *pipeline.net.parameters()], allow_unused=True
        )
        return result.detach(), gradient, tuple(g for g in others if g is not None)

    before, after = run(theta, units), run(other, shuffled)
    if pipeline.net.invariant:
        assert before[0].shape == (5, 3)
        check_close(after[0], before[0])
    else:
        assert before[0].shape == (5, spec.dim, 3)
        check_close(after[0], before[0].gather(1, order.unsqueeze(-1).expand(-1, -1, 3)))
    check_close(after[1], before[1].gather(1, order))
    scale = max(g.abs().max() for g in before[2])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert all(
        (a - b).abs().max() <= tolerance * scale
        for a, b in zip(after[2], before[2], strict=True)
    )


def test_convolutional_networks_go_through_the_pipeline() -> None:
    spec = convolutional()
    pipeline = Pipeline(spec, invariant=True)
    theta, t, context, *units = pipeline.inputs()
    other, _, _ = moved(spec, theta, units)
    check_close(pipeline(other, t, context, *units), pipeline(theta, t, context, *units))


def test_messages_are_sums_over_edges() -> None:
    spec = chain(2, 3, 4, 1)
    layout = Layout(spec)
    channels = Channels((6, 6), (8,), 6)
    messages = built(lambda: Messages(layout, channels, heads=2))
    units, heads = (
        [randn(5, 3, 6, seed=1), randn(5, 4, 6, seed=2)],
        randn(5, 2, 4, 3, seed=3),
    )
    rows, columns = messages.to_rows[0](units[0]), messages.to_columns[0](units[1])
    to_rows, to_columns = torch.zeros(5, 4, 6, dtype=F64), torch.zeros(5, 3, 6, dtype=F64)
    for head, part in enumerate([slice(0, 3), slice(3, 6)]):
        for i, j in itertools.product(range(4), range(3)):
            to_rows[:, i, part] += heads[:, head, i, j, None] * rows[:, j, part]
            to_columns[:, j, part] += heads[:, head, i, j, None] * columns[:, i, part]
    found = messages(units, [heads])
    check_close(found[0], messages.norms[0](to_columns))
    check_close(found[1], messages.norms[1](to_rows))


@pytest.mark.parametrize("what", ["t", "context", "units"])
@pytest.mark.parametrize("kind", ["invariant and conditioned", "conditioned"])
def test_network_depends_on_every_condition(kind: str, what: str) -> None:
    pipeline = Pipeline(chain(2, 3, 4, 1), **KINDS[kind])
    inputs = pipeline.inputs()
    at = {"t": 1, "context": 2, "units": 4}[what]
    others = [*inputs[:at], inputs[at].flip(0), *inputs[at + 1 :]]
    assert not torch.allclose(pipeline(*inputs), pipeline(*others))


def test_invariant_network_does_not_start_at_zero() -> None:
    with torch.random.fork_rng(devices=[]):
        net = DWSNet(chain(2, 3, 3, 1), 1, 2, width=8, depth=2, invariant=True)
    assert net(randn(4, 25, 1, dtype=torch.float32)).std(0).min() > 1e-4


def test_wrong_conditions_are_refused() -> None:
    spec = chain(2, 3, 1)
    plain, full = (
        built(lambda: DWSNet(spec, 1, 1, width=8, depth=1)),
        built(
            lambda: DWSNet(
                spec, 1, 1, width=8, depth=1, time=True, context=3, unit_features=2
            )
        ),
    )
    features, t, context, units = (
        randn(2, spec.dim, 1),
        randn(2),
        randn(2, 3),
        {"h1": randn(2, 3, 2)},
    )
    assert full(features, t, context, units).shape == features.shape
    with pytest.raises(ValueError, match=r"must be \(..., 13, features\), got \(2, 13\)"):
        plain(features.squeeze(-1))
    with pytest.raises(ValueError, match="takes no time"):
        plain(features, t)
    with pytest.raises(ValueError, match="needs a time"):
        full(features, None, context, units)
    with pytest.raises(ValueError, match=r"context of length 3, got \(2, 2\)"):
        full(features, t, context[:, :2], units)
    with pytest.raises(ValueError, match="2 features of each unit"):
        full(features, t, context)
    with pytest.raises(ValueError, match="2 features of each unit"):
        full(features, t, context, {"h2": units["h1"]})


# ---------------------------------------- transforms of torch


@pytest.mark.parametrize("kind", ["conditioned", "shared and invariant"])
def test_forward_mode_and_vmap_agree_with_reverse_mode(kind: str) -> None:
    pipeline = Pipeline(chain(2, 3, 4, 1), **KINDS[kind])
    theta, *rest = pipeline.inputs()
    tangent = randn(*theta.shape, seed=3)
    result, forward = torch.func.jvp(
        lambda theta: pipeline(theta, *rest), (theta,), (tangent,)
    )
    cotangent = randn(*result.shape, seed=4)
    (reverse,) = torch.autograd.grad(
        pipeline(theta.requires_grad_(True), *rest), theta, cotangent
    )
    torch.testing.assert_close((forward * cotangent).sum(), (reverse * tangent).sum())
    single = torch.func.vmap(
        lambda *inputs: pipeline(*(each.unsqueeze(0) for each in inputs)).squeeze(0)
    )
    torch.testing.assert_close(single(theta.detach(), *rest), result)


def test_autocast_stays_close() -> None:
    pipeline = Pipeline(
        chain(2, 3, 4, 1), dtype=torch.float32, **KINDS["invariant and conditioned"]
    )
    inputs = pipeline.inputs(dtype=torch.float32)
    exact = pipeline(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = pipeline(*inputs)
        rough.float().sum().backward()
    assert (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()


COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.validate,
            pytest.mark.skipif(
                shutil.which("g++") is None, reason="inductor needs a C++ compiler"
            ),
        ],
    ),
]


# of torch about itself, while it loads its compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_network_agrees(compiler: str) -> None:
    spec = chain(1, 2, 1)
    net = built(lambda: DWSNet(spec, 1, 1, width=8, depth=1, invariant=True))
    features = randn(3, spec.dim, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(net, backend=compiler, fullgraph=True)(features), net(features)
        )


@pytest.mark.parametrize("kind", ["conditioned", "shared and invariant"])
def test_network_traces_as_one_graph(kind: str) -> None:
    pipeline = Pipeline(chain(2, 3, 4, 1), **KINDS[kind])
    inputs = pipeline.inputs()
    torch.testing.assert_close(
        torch.compile(pipeline, backend="eager", fullgraph=True)(*inputs), pipeline(*inputs)
    )


# ---------------------------------------- sharing over depth


@pytest.mark.parametrize("invariant", [False, True])
def test_shared_network_fits_other_widths_and_depths(invariant: bool) -> None:
    specs = [
        chain(2, 3, 1),
        chain(2, 5, 4, 1),
        chain(2, 3, 4, 5, 6, 1),
        chain(2, 3, 3, 1, bias=False),
    ]
    nets = [
        built(
            lambda s=s: DWSNet(
                s, 1, 2, width=8, depth=2, invariant=invariant, wiring=Wiring(shared=True)
            )
        )
        for s in specs
    ]
    for spec, net in zip(specs, nets, strict=True):
        net.load_state_dict(nets[0].state_dict())
        result = net(randn(3, spec.dim, 1))
        assert result.shape == ((3, 2) if invariant else (3, spec.dim, 2))
        assert result.isfinite().all()
        assert result.std() > 0


def test_shared_network_depends_on_every_weight_and_tells_layers_apart() -> None:
    spec = chain(2, 3, 3, 3, 3, 1)
    net = built(lambda: DWSNet(spec, 1, 1, width=8, depth=1, wiring=Wiring(shared=True)))
    jacobian = torch.func.jacrev(lambda theta: net(theta.reshape(1, -1, 1)).flatten())(
        randn(spec.dim)
    )
    assert (jacobian != 0).all()
    biases = spec.unflatten(net(torch.ones(1, spec.dim, 1, dtype=F64)).squeeze(-1))
    assert not torch.allclose(biases["2.bias"], biases["4.bias"])


def test_units_keep_their_parameters_at_any_width() -> None:
    nets = [
        built(lambda w=w: DWSNet(chain(2, w, 4, 1), 1, 1, width=8, depth=1, invariant=True))
        for w in (1, 3)
    ]
    nets[1].load_state_dict(nets[0].state_dict())


def test_sharing_is_refused_outside_perceptrons() -> None:
    for spec in (convolutional(), chain(3, 2)):
        with pytest.raises(ValueError, match="at least one hidden layer"):
            DWSNet(spec, 1, 1, wiring=Wiring(shared=True))
    labelled = chain(2, 3, 1).extend({"scale": (3,)}, {"scale": ("h1",)})
    with pytest.raises(ValueError, match="cannot place 'scale'"):
        DWSNet(labelled, 1, 1, wiring=Wiring(shared=True))


# ---------------------------------------- embedded inputs


def test_embedded_layers_commute_with_permutations() -> None:
    spec = chain(9, 3, 4, 7)
    layer, pooled = (
        built(lambda: DWSLayer(spec, 2, 3, slots=3)),
        built(lambda: DWSInvariant(spec, 2, 3, slots=3)),
    )
    features = randn(4, spec.dim, 2)
    index = torch.arange(spec.dim).expand(4, -1)
    (index,) = spec.transform(
        Symmetries(frozenset(spec.widths), frozenset(), frozenset()), 5, index
    )
    other = features.gather(1, index.unsqueeze(-1).expand_as(features))
    result = layer(features)
    check_close(layer(other), result.gather(1, index.unsqueeze(-1).expand_as(result)))
    check_close(pooled(other), pooled(features))
    jacobian = torch.func.jacrev(
        lambda theta: layer(theta.reshape(1, -1, 2))[..., 0].flatten()
    )(features[0])
    assert (jacobian != 0).all()


def test_embedding_starts_where_the_exact_layer_becomes_large() -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.random.fork_rng(devices=[]):
        exact, embedded = DWSLayer(chain(30, 4, 1), 8, 8), DWSLayer(chain(30, 4, 1), 64, 64)
        spec = chain(784, 32, 10)
        image = DWSLayer(spec, 64, 64)
    assert len(exact.compress) == 0 < len(embedded.compress)
    assert count(image) < 1e7
    result = image(randn(1, spec.dim, 64, dtype=torch.float32))
    assert result.isfinite().all()
    assert result.std() > 0


# ---------------------------------------- scaling


def test_scaler_standardises_tensors_and_goes_back() -> None:
    spec = chain(2, 3, 4, 1).extend({"noise": (1,)})
    theta = 5 + 3 * randn(50, spec.dim)
    theta[:, spec.slices["2.bias"]] = 0.7
    scaler = TensorScaler.fit(theta, spec)
    scaled = scaler(theta)
    for name, part in spec.unflatten(scaled).items():
        assert abs(part.mean()) < 1e-12
        assert torch.isclose(
            part.std(correction=0),
            torch.tensor(0.0 if name == "2.bias" else 1.0, dtype=F64),
        )
    torch.testing.assert_close(scaler.inverse(scaled), theta)
    fresh = TensorScaler(spec).double()
    assert torch.equal(fresh(theta), theta)
    fresh.load_state_dict(scaler.state_dict())
    assert torch.equal(fresh(theta), scaled)


def test_scaler_commutes_with_permutations() -> None:
    spec = chain(2, 3, 4, 1)
    theta = randn(6, spec.dim)
    other, _, order = moved(spec, theta, [randn(6, n, 1) for n in spec.widths.values()])
    scaler = TensorScaler.fit(theta, spec)
    torch.testing.assert_close(scaler(other), scaler(theta).gather(1, order))
    torch.testing.assert_close(TensorScaler.fit(other, spec)(theta), scaler(theta))


def test_scaler_refuses_what_it_cannot_fit() -> None:
    spec = chain(2, 3, 1)
    with pytest.raises(ValueError, match="theta must hold at least one network"):
        TensorScaler.fit(torch.empty(0, spec.dim), spec)
    with pytest.raises(ValueError, match="theta has NaN or infinite values in 2 of 2 rows"):
        TensorScaler.fit(torch.full((2, spec.dim), torch.nan), spec)
    with pytest.raises(ValueError, match="must end in an axis"):
        TensorScaler.fit(torch.ones(2, 3), spec)
