"""Laws of the network that also commutes with signs: random group elements, parity, and where it
may be used.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import WeightSpec
from bnnflow.equivariant import DWSNet, GraphNet, SignedDWSNet
from bnnflow.equivariant.signed import has_signs
from bnnflow.transport import (
    Flow,
    GaussNewton,
    GradientSteps,
    InformedVelocity,
    Matching,
    Source,
    WeightsVelocity,
)
from tests.problems import built, chain, generator, normal, one_in

F64 = torch.float64


class Residual(nn.Module):
    """Two matrices between the same two hidden layers, and two layers that share the signs of their
    units.
    """

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
        return self.d(torch.tanh(x + self.c(torch.tanh(self.b(x)))))


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


def spec_of(make: Callable[[], nn.Module]) -> WeightSpec:
    return WeightSpec.of(built(make))


def perceptron(*widths: int, bias: bool = True) -> nn.Module:
    return chain(*widths, activation=nn.Tanh, bias=bias)


def filled(make: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    """Build a network with random weights everywhere, in double precision, and without
    gradients.
    """
    net, g = built(make).requires_grad_(False), generator(seed)
    for parameter in net.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g, dtype=F64))
    return net


SPECS: dict[str, Callable[[], WeightSpec]] = {
    "one layer": lambda: spec_of(lambda: perceptron(4, 6, 3)),
    "two layers": lambda: spec_of(lambda: perceptron(3, 5, 4, 2)),
    "three layers": lambda: spec_of(lambda: perceptron(2, 4, 3, 5, 1)),
    "no biases": lambda: spec_of(lambda: perceptron(2, 4, 3, 1, bias=False)),
    "one unit": lambda: spec_of(lambda: perceptron(2, 1, 3, 1)),
    "residual": lambda: spec_of(Residual),
}


def network(
    spec: WeightSpec,
    in_features: int,
    out_features: int,
    *,
    time: bool = True,
    seed: int = 1,
) -> nn.Module:
    return filled(
        lambda: SignedDWSNet(spec, in_features, out_features, 8, 2, time=time, heads=2),
        seed,
    )


def moved(spec: WeightSpec, seed: int, *features: Tensor) -> list[Tensor]:
    """Move features ``(batch, dim, f)`` by a permutation and signs, the same for all that stand at
    the same place.
    """
    columns = [column for each in features for column in each.unbind(-1)]
    results = iter(spec.transform(spec.symmetries(), seed, *columns))
    return [
        torch.stack([next(results) for _ in range(each.shape[-1])], -1) for each in features
    ]


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_commutes_with_permutations_and_signs(name, dtype):
    spec = SPECS[name]()
    g = generator()
    features = torch.randn(20, spec.dim, 2, generator=g, dtype=F64).to(dtype)
    t = torch.rand(20, generator=g, dtype=F64).to(dtype)
    net = network(spec, 2, 3).to(dtype)
    outputs = net(features, t)
    turned, expected = moved(spec, 5, features, outputs)
    assert float((expected - outputs).abs().max()) > 0.1 * float(outputs.std())
    error = (net(turned, t) - expected).abs().max() / outputs.std()
    assert float(error) < (1e-4 if dtype == torch.float32 else 1e-12)


def test_a_dws_network_does_not_commute_with_signs():
    """What the signed network is for."""
    spec = SPECS["one layer"]()
    features = torch.randn(4, spec.dim, 1, generator=generator(), dtype=F64)
    net = filled(lambda: DWSNet(spec, 1, 1, 8, 2))
    turned, expected = moved(spec, 5, features, net(features))
    assert float((net(turned) - expected).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["one layer", "two layers", "residual"])
def test_every_weight_and_the_time_are_seen(name):
    spec = SPECS[name]()
    net = network(spec, 1, 1)
    theta = torch.randn(spec.dim, generator=generator(), dtype=F64)

    def field(theta: Tensor, t: float) -> Tensor:
        return net(theta.reshape(1, -1, 1), torch.tensor([t], dtype=F64)).flatten()

    assert not torch.allclose(field(theta, 0.2), field(theta, 0.7))
    assert field(theta, 1.0).isfinite().all()
    assert (torch.func.jacrev(field)(theta, 0.5) != 0).all()


def test_units_of_a_layer_hear_of_each_other_through_their_second_moments():
    """With the outputs of unit 1 turned and its inputs kept nothing even about single units
    changes: only pairs do.
    """
    spec = SPECS["one layer"]()
    net = network(spec, 1, 1, time=False)
    for name, parameter in net.named_parameters():
        if "mix_globals" in name:
            parameter.zero_()
    theta = torch.randn(spec.dim, generator=generator(), dtype=F64)
    other = theta.clone()
    unit = torch.arange(spec.dim)[spec.slices["2.weight"]].reshape(3, 6)[:, 1]
    other[unit] = -other[unit]
    outputs = [
        net(each.reshape(1, -1, 1)).flatten()[spec.slices["0.bias"]]
        for each in (theta, other)
    ]
    changed = (outputs[0] - outputs[1]).abs()
    assert float(changed[[0, 2, 3, 4, 5]].min()) > 1e-6


def test_starts_at_zero_and_takes_empty_batches():
    spec = SPECS["two layers"]()
    net = built(lambda: SignedDWSNet(spec, 1, 2, 8, 2), torch.float32)
    assert torch.equal(net(torch.ones(3, spec.dim, 1)), torch.zeros(3, spec.dim, 2))
    assert net(torch.ones(0, spec.dim, 1)).shape == (0, spec.dim, 2)
    with pytest.raises(ValueError, match="takes no time"):
        net(torch.ones(3, spec.dim, 1), torch.ones(3))


def test_parameters_fit_other_widths():
    here, there = SPECS["two layers"](), spec_of(lambda: perceptron(3, 7, 9, 2))
    net, other = network(here, 1, 1), network(there, 1, 1, seed=2)
    other.load_state_dict(net.state_dict())
    features = torch.randn(2, there.dim, 1, generator=generator(), dtype=F64)
    assert other(features, torch.tensor([0.1, 0.9], dtype=F64)).abs().sum() > 0


@pytest.mark.parametrize(
    "make",
    [lambda: chain(2, 4, 1), Normalised, lambda: nn.Linear(2, 1)],
    ids=["relu", "norm", "none"],
)
def test_units_that_cannot_be_turned_are_refused(make):
    spec = spec_of(make)
    assert not has_signs(spec)
    with pytest.raises(ValueError, match="odd activation"):
        SignedDWSNet(spec, 1, 1)


@pytest.mark.parametrize(
    ("width", "edge_width", "heads"), [(7, 8, 1), (8, 0, 1), (8, 3, 1), (8, 8, 0)]
)
def test_sizes_that_cannot_be_are_refused(width, edge_width, heads):
    with pytest.raises(ValueError, match="must be"):
        SignedDWSNet(SPECS["two layers"](), 1, 1, width, edge_width=edge_width, heads=heads)


# ---------------------------------------- fields


def model_of(
    prior: bf.priors.Prior,
    activation: type[nn.Module] = nn.Tanh,
    dtype: torch.dtype = torch.float32,
) -> bf.BayesianModel:
    x, noise = normal(12, 2, dtype=dtype), normal(12, seed=1, dtype=dtype)
    net = built(lambda: chain(2, 5, 1, activation=activation), dtype)
    return bf.BayesianModel(
        net, prior, bf.likelihoods.Gaussian(0.5), x, x[:, 0] + 0.1 * noise
    )


@pytest.mark.parametrize(
    "proximal_step",
    one_in(2, [GradientSteps(4), GaussNewton(2)]),
    ids=["gradient", "newton"],
)
def test_the_informed_field_commutes_with_the_whole_group_of_the_posterior(proximal_step):
    model = model_of(bf.priors.Normal(1.0), dtype=F64)
    field = built(
        lambda: InformedVelocity(model.spec, proximal_step, 8, 2, architecture="signed")
    ).requires_grad_(False)
    for parameter in field.parameters():
        parameter.add_(
            0.1 * torch.randn(parameter.shape, generator=generator(2), dtype=F64)
        )
    source = Source(model.flat_prior)
    group = source.symmetries(model)
    assert field.symmetries == group == model.spec.symmetries()
    flow = Flow.of(field, model, source)
    x = torch.randn(10, model.dim, generator=generator(3), dtype=F64)
    z, pushed = model.spec.transform(group, 4, x, flow.forward(x))
    assert float((flow.forward(z) - pushed).abs().max()) < 1e-8 * float(pushed.abs().max())
    before, after = (flow.log_prob(each) for each in (flow.forward(x), pushed))
    assert torch.allclose(before, after, atol=1e-6)


@pytest.mark.crossed
@pytest.mark.parametrize("velocity", ["informed", "weights"])
@pytest.mark.parametrize(
    ("prior", "activation", "network"),
    [
        (bf.priors.Normal(1.0), nn.Tanh, SignedDWSNet),
        (bf.priors.Normal(1.0), nn.ReLU, DWSNet),
        (torch.distributions.Normal(0.5, 1.0), nn.Tanh, DWSNet),
    ],
    ids=["odd and even", "relu", "a prior that is not even"],
)
def test_fit_flow_takes_the_signed_network_where_signs_are_kept(
    velocity, prior, activation, network, tmp_path
):
    model = model_of(prior, activation)
    draws = model.sample_prior(64, 0)
    flow = bf.fit_flow(
        model,
        draws,
        velocity=velocity,
        seed=0,
        progress=False,
        training=bf.Training(steps=2, batch_size=16),
        matching=Matching(targets="pairs"),
    )
    assert isinstance(flow.velocity.net, network)
    loaded = Flow.load(flow.save(tmp_path / "flow"), model)
    assert torch.equal(loaded.sample(3, 1), flow.sample(3, 1))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("dws", DWSNet), ("signed", SignedDWSNet), ("graph", GraphNet)],
)
def test_fields_of_weights_alone_take_every_architecture(architecture, kind):
    assert isinstance(
        built(
            lambda: WeightsVelocity(SPECS["one layer"](), 8, 1, architecture=architecture)
        ).net,
        kind,
    )


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="architecture must be"):
        WeightsVelocity(SPECS["one layer"](), 8, 1, architecture="odd")  # type: ignore[arg-type]
