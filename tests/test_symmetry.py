"""Laws of alignment: planted symmetries are found, functions never change, distances never grow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import bnnflow as bf
from bnnflow import WeightSpec, likelihoods, priors
from bnnflow.symmetry import align, match, sort_units
from bnnflow.weights import Symmetries

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(
    *widths: int, activation: Callable[[], nn.Module] = nn.Tanh, bias: bool = True
) -> nn.Module:
    """Build a perceptron from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        modules: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            modules += [nn.Linear(n_in, n_out, bias=bias), activation()]
        return nn.Sequential(*modules[:-1]).double()


class Scrambled(nn.Module):
    """A chain whose layers are defined in another order than the data visits them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.b, self.d = nn.Linear(5, 7, bias=bias), nn.Linear(6, 2, bias=bias)
        self.a, self.c = nn.Linear(3, 5, bias=bias), nn.Linear(7, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))


def scrambled(bias: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Scrambled(bias).double()


NETS = {
    "1 hidden": lambda: network(3, 8, 2),
    "1 hidden relu": lambda: network(3, 8, 2, activation=nn.ReLU),
    "2 hidden": lambda: network(3, 8, 8, 2),
    "2 hidden without biases": lambda: network(3, 6, 7, 2, bias=False),
    "2 hidden gelu": lambda: network(3, 6, 7, 2, activation=nn.GELU),
    "3 hidden": lambda: network(3, 6, 5, 7, 2),
    "4 hidden": lambda: network(3, 6, 6, 6, 6, 2),
    "scrambled": lambda: scrambled(True),
    "scrambled without biases": lambda: scrambled(False),
}


def weights(spec: WeightSpec, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, spec.dim, generator=generator(seed), dtype=F64)


def outputs(net: nn.Module, spec: WeightSpec, theta: Tensor) -> Tensor:
    x = torch.randn(9, 3, generator=generator(9), dtype=F64)
    return torch.stack(
        [torch.func.functional_call(net, spec.unflatten(row), (x,)) for row in theta]
    )


def finite(spec: WeightSpec) -> Symmetries:
    return spec.symmetries()._replace(scale=frozenset())


def model_of(net: nn.Module, prior=None) -> bf.BayesianModel:
    x = torch.randn(12, 3, generator=generator(8), dtype=F64)
    outputs = net(x).shape[-1]
    y = x[:, :outputs] + 0.1
    return bf.BayesianModel(
        net, priors.Normal() if prior is None else prior, likelihoods.Gaussian(), x, y
    )


@pytest.mark.parametrize("name", NETS)
def test_planted_symmetries_are_found(name: str) -> None:
    spec = WeightSpec.of(NETS[name]()).extend({"noise": (1,)})
    reference = weights(spec, 100)
    (moved,) = spec.transform(finite(spec), 2, reference)
    assert (moved != reference).any(-1).all()
    found = match(moved, spec, reference)
    assert (found == reference).all(-1).sum() == 100


@pytest.mark.parametrize("name", ["1 hidden", "2 hidden", "3 hidden"])
def test_planted_symmetries_are_found_under_noise(name: str) -> None:
    spec = WeightSpec.of(NETS[name]())
    reference = weights(spec)
    noisy = reference + 0.05 * weights(spec, 50, seed=4)
    found = match(spec.transform(finite(spec), 3, noisy)[0], spec, reference)
    torch.testing.assert_close(found, noisy)


@pytest.mark.parametrize("name", NETS)
def test_matching_keeps_functions_and_never_increases_the_distance(name: str) -> None:
    net = NETS[name]()
    spec = WeightSpec.of(net)
    theta, reference = weights(spec, 30), weights(spec, seed=5)
    found = match(theta, spec, reference)
    torch.testing.assert_close(
        outputs(net, spec, found), outputs(net, spec, theta), rtol=1e-10, atol=1e-10
    )
    before, after = ((each - reference).norm(dim=-1) for each in (theta, found))
    assert (after <= before * (1 + 1e-12)).all()
    assert (after < before).any()
    again = match(found, spec, reference)
    assert ((again - reference).norm(dim=-1) <= after * (1 + 1e-12)).all()


def test_single_precision_keeps_functions() -> None:
    net = NETS["3 hidden"]()
    spec = WeightSpec.of(net)
    theta = weights(spec, 20).float()
    found = match(theta, spec, weights(spec, seed=5).float())
    expected = outputs(net, spec, theta.double())
    assert (
        outputs(net, spec, found.double()) - expected
    ).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU], ids=["signs", "no signs"])
def test_one_hidden_layer_is_matched_globally(activation: Callable[[], nn.Module]) -> None:
    spec = WeightSpec.of(network(2, 4, 1, activation=activation))
    theta, reference = weights(spec, 6), weights(spec, 6, seed=5)
    signs = (
        torch.tensor(list(itertools.product([1.0, -1.0], repeat=4)))
        if activation is nn.Tanh
        else torch.ones(1, 4)
    )
    perms = torch.tensor(list(itertools.permutations(range(4))))
    orbit = spec.permute(theta[:, None, :], {"h1": perms})  # (network, permutation, dim)
    if activation is nn.Tanh:
        orbit = spec.flip(orbit[:, :, None, :], {"h1": signs}).flatten(1, 2)
    best = (orbit - reference[:, None]).norm(dim=-1).amin(1)
    torch.testing.assert_close(
        (match(theta, spec, reference) - reference).norm(dim=-1), best, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_any_leading_axes(shape: tuple[int, ...]) -> None:
    spec = WeightSpec.of(NETS["2 hidden"]())
    theta, reference = weights(spec, *shape), weights(spec, seed=5)
    found = match(theta, spec, reference)
    assert found.shape == theta.shape
    rows = [match(row, spec, reference) for row in theta.reshape(-1, spec.dim)]
    assert torch.equal(found.reshape(-1, spec.dim), torch.stack(rows))


GROUPS = {
    "permutations": Symmetries(frozenset({"h1", "h2"}), frozenset(), frozenset()),
    "signs": Symmetries(frozenset(), frozenset({"h1", "h2"}), frozenset()),
    "first layer": Symmetries(frozenset({"h1"}), frozenset({"h1"}), frozenset()),
    "second layer": Symmetries(frozenset({"h2"}), frozenset({"h2"}), frozenset()),
    "mixed": Symmetries(frozenset({"h1"}), frozenset({"h2"}), frozenset()),
    "none": Symmetries(frozenset(), frozenset(), frozenset()),
}


@pytest.mark.parametrize("name", GROUPS)
def test_group_is_respected(name: str) -> None:
    """What a group cannot move stays, and what it can is found."""
    spec, group = WeightSpec.of(NETS["2 hidden"]()), GROUPS[name]
    reference = weights(spec, 20)
    assert torch.equal(
        match(spec.transform(group, 2, reference)[0], spec, reference, group=group),
        reference,
    )

    theta = weights(spec, 20, seed=6)
    before, after = (
        spec.unflatten(theta),
        spec.unflatten(match(theta, spec, reference, group=group)),
    )
    for bias, label in {"0.bias": "h1", "2.bias": "h2"}.items():
        if label not in group.permutation:
            assert torch.equal(after[bias].abs(), before[bias].abs())
        if label not in group.sign:
            assert torch.equal(after[bias].sort(-1)[0], before[bias].sort(-1)[0])


def test_nan_is_refused() -> None:
    spec = WeightSpec.of(NETS["1 hidden"]())
    theta = weights(spec, 3)
    theta[1, 4] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        match(theta, spec, weights(spec))
    with pytest.raises(ValueError, match="NaN or infinite"):
        match(weights(spec), spec, theta[1])


# ---------------------------------------- alignment of draws


def draws_of(
    model: bf.BayesianModel, noise: float, shape: tuple[int, int] = (4, 25)
) -> tuple[Tensor, bf.Draws]:
    """Return draws around one network, and the same scattered over its orbit."""
    centre = weights(model.spec)
    clean = centre + noise * weights(model.spec, *shape, seed=7)
    moved = model.spec.random_symmetry(clean, 3, model.symmetries())
    return clean, bf.Draws(moved, model.log_joint(moved))


@pytest.mark.parametrize("name", NETS)
def test_alignment_gathers_one_mode(name: str) -> None:
    model = model_of(NETS[name]())
    clean, draws = draws_of(model, 0.05)
    aligned = align(model, draws)
    assert isinstance(aligned, bf.Draws)
    # the same in any frame of units
    spreads = [each.var((0, 1)).sort()[0] for each in (aligned.theta, clean)]
    torch.testing.assert_close(*spreads, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        model.log_joint(aligned.theta), draws.log_joint, rtol=1e-10, atol=1e-8
    )
    torch.testing.assert_close(
        model.outputs(aligned.theta), model.outputs(draws.theta), rtol=1e-10, atol=1e-10
    )
    assert torch.equal(aligned.theta[..., -1], draws.theta[..., -1])  # the noise scale
    again = align(model, aligned)
    torch.testing.assert_close(again.theta.var((0, 1)), aligned.theta.var((0, 1)))
    torch.testing.assert_close(align(model, draws.theta), aligned.theta)


@pytest.mark.parametrize("name", ["1 hidden", "2 hidden"])
def test_alignment_narrows_wide_draws(name: str) -> None:
    model = model_of(NETS[name]())
    theta = weights(model.spec, 200)
    aligned = align(model, theta)
    assert aligned.var(0).sum() < theta.var(0).sum()
    again = align(model, aligned)
    assert again.var(0).sum() <= aligned.var(0).sum() * 1.001


def test_alignment_to_a_reference() -> None:
    model = model_of(NETS["2 hidden"]())
    clean, draws = draws_of(model, 0.05)
    reference = clean[0, 0]
    torch.testing.assert_close(align(model, draws, reference=reference).theta, clean)


def test_alignment_uses_only_what_keeps_the_prior() -> None:
    scales = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0])
    for prior, name in (
        (priors.Normal(1.0, 0.5), "signs"),
        (
            priors.PerTensor({"0.bias": Normal(0.0, scales)}, Normal(0.0, 1.0)),
            "permutations",
        ),
    ):
        model = model_of(NETS["1 hidden"](), prior)
        theta = weights(model.spec, 50)
        aligned = align(model, theta)
        torch.testing.assert_close(
            model.log_joint(aligned), model.log_joint(theta), rtol=1e-10, atol=1e-8
        )
        assert not torch.equal(aligned, theta), name


# ---------------------------------------- canonical form


@pytest.mark.parametrize("name", NETS)
def test_sorted_form_is_one_for_each_orbit(name: str) -> None:
    net = NETS[name]()
    spec = WeightSpec.of(net).extend({"noise": (1,)})
    theta = weights(spec, 3, 10)
    form = sort_units(theta, spec)
    torch.testing.assert_close(
        outputs(net, WeightSpec.of(net), form[0, :, :-1]),
        outputs(net, WeightSpec.of(net), theta[0, :, :-1]),
        rtol=1e-10,
        atol=1e-10,
    )
    assert torch.equal(sort_units(form, spec), form)
    for seed in range(3):
        assert torch.equal(
            sort_units(spec.transform(finite(spec), seed, theta)[0], spec), form
        )
    first = spec.layers[0]
    biases = (
        spec.unflatten(form)[first.bias]
        if first.bias
        else spec.unflatten(form)[first.weight][..., 0]
    )
    assert (biases.diff(dim=-1) >= 0).all()
    if spec.activations["h1"].odd:
        assert (biases >= 0).all()


def test_sorted_form_keeps_to_the_priors_group() -> None:
    spec = WeightSpec.of(NETS["1 hidden"]())
    theta, prior = weights(spec, 10), priors.Normal(1.0, 0.5)
    group = prior.symmetries(spec)
    form = sort_units(theta, spec, group=group)
    before, after = spec.unflatten(theta)["0.bias"], spec.unflatten(form)["0.bias"]
    assert torch.equal(after, before.sort(-1)[0])  # sorted, and no sign flipped
    moved = spec.random_symmetry(theta, 0, group)
    assert torch.equal(sort_units(moved, spec, group=group), form)
