"""Laws of canonical forms and of alignment on networks of every kind, and of the three ways to
match.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call

import bnnflow as bf
from bnnflow import WeightSpec, likelihoods, priors
from bnnflow.activations import Sine
from bnnflow.compiled import library
from bnnflow.symmetry import (
    align,
    frechet_mean,
    match,
    match_activations,
    normalise_scale,
    normalise_sign,
    sinkhorn_rebasin,
    sort_units,
)
from bnnflow.symmetry.alignment import Method
from bnnflow.symmetry.matching import assign
from bnnflow.symmetry.sinkhorn import soft_permutation
from bnnflow.weights import Symmetries

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perceptron(
    *widths: int, activation: Callable[[], nn.Module] = nn.Tanh, bias: bool = True
) -> nn.Module:
    modules: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        modules += [nn.Linear(n_in, n_out, bias=bias), activation()]
    return nn.Sequential(*modules[:-1])


class Residual(nn.Module):
    """Two blocks that add to the same units.

    With ``square`` of one layer each, which reads what it writes.
    """

    def __init__(
        self, activation: Callable[[], nn.Module], bias: bool = True, square: bool = False
    ) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6, bias=bias), nn.Linear(6, 2, bias=bias)
        inner = 6 if square else 5
        self.up = nn.ModuleList(nn.Linear(6, inner, bias=bias) for _ in range(2))
        self.down = nn.ModuleList(
            [] if square else (nn.Linear(5, 6, bias=bias) for _ in range(2))
        )
        self.activation, self.square = activation(), square

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.stem(x))
        if self.square:
            for up in self.up:
                h = h + up(h)
        else:
            for up, down in zip(self.up, self.down, strict=True):
                h = h + down(self.activation(up(h)))
        return self.head(self.activation(h))


def convolutional(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        activation(),
        nn.Conv2d(4, 5, 2),
        activation(),
        nn.Flatten(),
        nn.Linear(5 * 4, 6),
        activation(),
        nn.Linear(6, 2),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: perceptron(4, 7, 6, 2),
    "relu": lambda: perceptron(4, 7, 6, 2, activation=nn.ReLU),
    "deep relu": lambda: perceptron(4, 6, 6, 6, 6, 6, 2, activation=nn.ReLU),
    "without biases": lambda: perceptron(4, 6, 5, 2, activation=nn.LeakyReLU, bias=False),
    "siren": lambda: perceptron(4, 7, 6, 2, activation=lambda: Sine(3.0)),
    "convolutional": lambda: convolutional(nn.ReLU),
    "odd convolutional": lambda: convolutional(nn.Tanh),
    "residual": lambda: Residual(nn.ReLU),
    "residual without biases": lambda: Residual(nn.ReLU, bias=False),
    "odd residual": lambda: Residual(nn.Tanh),
    "square residual": lambda: Residual(nn.ReLU, square=True),
    "odd square residual": lambda: Residual(nn.Tanh, square=True),
    "normalised": lambda: nn.Sequential(
        nn.Linear(4, 6),
        nn.LayerNorm(6),
        nn.ReLU(),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Linear(5, 2),
    ),
    "odd normalised": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)
    ),
}
CHAINS = ["perceptron", "relu", "deep relu", "without biases", "siren"]


def built(name: str) -> tuple[nn.Module, WeightSpec]:
    """Build a network from a seed, and the spec with one extra that nothing may touch."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = NETS[name]().double()
    return net, WeightSpec.of(net).extend({"noise": (1,)})


def weights(spec: WeightSpec, *shape: int, seed: int = 1) -> Tensor:
    """Draw weights with the fan-in scaling of networks at work."""
    parts = []
    for name in spec.names:
        fan_in = spec.network.shapes[name][1:] if name not in spec.extras else ()
        size = spec.slices[name].stop - spec.slices[name].start
        parts.append(
            torch.full((size,), float(torch.Size(fan_in).numel()) ** -0.5, dtype=F64)
        )
    return torch.cat(parts) * torch.randn(
        *shape, spec.dim, generator=generator(seed), dtype=F64
    )


def data(name: str, rows: int = 40) -> Tensor:
    shape = (1, 5, 5) if "convolutional" in name else (4,)
    return torch.randn(rows, *shape, generator=generator(9), dtype=F64)


def outputs(net: nn.Module, spec: WeightSpec, theta: Tensor, x: Tensor) -> Tensor:
    network = spec.network
    rows = theta.reshape(-1, spec.dim)[:, : network.dim].to(x)
    return torch.stack([functional_call(net, network.unflatten(row), (x,)) for row in rows])


def finite(spec: WeightSpec) -> Symmetries:
    return Symmetries(*spec.symmetries()[:2], scale=frozenset())


def distance(theta: Tensor, reference: Tensor) -> Tensor:
    return (theta - reference).norm(dim=-1)


# ---------------------------------------- canonical forms


@pytest.mark.parametrize("name", NETS)
def test_sorted_form_is_one_for_each_orbit(name: str) -> None:
    net, spec = built(name)
    theta, group = weights(spec, 2, 5), spec.symmetries()._replace(scale=frozenset())
    form = sort_units(theta, spec)
    x = data(name)
    torch.testing.assert_close(
        outputs(net, spec, form, x), outputs(net, spec, theta, x), rtol=1e-9, atol=1e-9
    )
    for seed in range(3):
        moved = sort_units(spec.transform(group, seed, theta)[0], spec)
        torch.testing.assert_close(moved, form, rtol=1e-9, atol=1e-9)


def test_sorted_sines_have_biases_within_a_quarter_turn() -> None:
    _, spec = built("siren")
    bias = spec.unflatten(sort_units(weights(spec, 20), spec))["0.bias"]
    assert (bias >= 0).all()
    assert (bias <= torch.pi / 6).all()
    assert (bias.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("name", NETS)
def test_signed_form_is_one_for_each_orbit_of_signs_and_phases(name: str) -> None:
    net, spec = built(name)
    theta = weights(spec, 2, 5)
    form = normalise_sign(theta, spec)
    x = data(name)
    torch.testing.assert_close(
        outputs(net, spec, form, x), outputs(net, spec, theta, x), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(normalise_sign(form, spec), form, rtol=1e-12, atol=1e-12)
    group = spec.symmetries()._replace(permutation=frozenset(), scale=frozenset())
    for seed in range(3):
        moved = normalise_sign(spec.transform(group, seed, theta)[0], spec)
        torch.testing.assert_close(moved, form, rtol=1e-9, atol=1e-9)
    permutations = Symmetries(spec.symmetries().permutation, frozenset(), frozenset())
    moved, of_form = spec.transform(permutations, 0, theta, form)
    torch.testing.assert_close(normalise_sign(moved, spec), of_form, rtol=1e-9, atol=1e-9)
    assert torch.equal(form, theta) == (not group.sign and not group.phase)


@pytest.mark.parametrize("name", NETS)
def test_normalised_form_keeps_the_function_and_is_one_for_each_orbit(name: str) -> None:
    net, spec = built(name)
    theta = weights(spec, 3, 4)
    form = normalise_scale(theta, spec)
    x = data(name)
    torch.testing.assert_close(
        outputs(net, spec, form, x), outputs(net, spec, theta, x), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(normalise_scale(form, spec), form, rtol=1e-12, atol=1e-12)
    group = Symmetries(frozenset(), frozenset(), spec.symmetries().scale)
    for seed in range(3):
        torch.testing.assert_close(
            normalise_scale(spec.transform(group, seed, theta)[0], spec), form
        )
    moved = spec.random_symmetry(theta, 0)
    torch.testing.assert_close(
        sort_units(normalise_scale(moved, spec), spec),
        sort_units(form, spec),
        rtol=1e-9,
        atol=1e-9,
    )
    assert torch.equal(form, theta) == (not group.scale)


@pytest.mark.parametrize("name", ["relu", "deep relu", "without biases"])
def test_normalised_units_have_incoming_norm_one(name: str) -> None:
    _, spec = built(name)
    theta = weights(spec, 10)
    dead = spec.layers[0]
    for tensor in (dead.weight, dead.bias):
        if tensor is not None:
            theta[:, spec.slices[tensor]].unflatten(-1, spec.shapes[tensor])[:, 2] = 0.0
    params = spec.unflatten(normalise_scale(theta, spec))
    for layer in spec.layers[:-1]:
        squares = params[layer.weight].square().sum(-1)
        if layer.bias is not None:
            squares = squares + params[layer.bias].square()
        expected = torch.ones_like(squares)
        if layer is dead:
            expected[:, 2] = 0.0
        torch.testing.assert_close(squares, expected)


def test_normalising_the_last_layer_multiplies_the_outputs() -> None:
    net, spec = built("relu")
    theta, x = weights(spec, 6), data("relu")
    form = normalise_scale(theta, spec, last_layer=True)
    last = spec.layers[-1]
    params = spec.unflatten(form)
    assert last.bias is not None
    norms = (
        params[last.weight].square().sum((-1, -2)) + params[last.bias].square().sum(-1)
    ).sqrt()
    torch.testing.assert_close(norms, torch.ones_like(norms))
    ratio = outputs(net, spec, form, x) / outputs(net, spec, theta, x)
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    torch.testing.assert_close(normalise_scale(form, spec, last_layer=True), form)
    assert torch.equal(form[:, -1], theta[:, -1])


# ---------------------------------------- matching


def by_activations(theta: Tensor, spec: WeightSpec, reference: Tensor, name: str) -> Tensor:
    net, _ = built(name)
    return match_activations(theta, spec, reference, data(name), net=net)


MATCHERS: dict[str, Callable[[Tensor, WeightSpec, Tensor, str], Tensor]] = {
    "weights": lambda theta, spec, reference, name: match(theta, spec, reference),
    "activations": by_activations,
    "sinkhorn": lambda theta, spec, reference, name: sinkhorn_rebasin(
        theta, spec, reference, steps=3
    ),
}


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("name", NETS)
def test_every_method_keeps_functions(name: str, matcher: str) -> None:
    net, spec = built(name)
    theta, reference, x = weights(spec, 2, 3), weights(spec, seed=2), data(name)
    moved = MATCHERS[matcher](theta, spec, reference, name)
    assert moved.shape == theta.shape
    torch.testing.assert_close(
        outputs(net, spec, moved, x), outputs(net, spec, theta, x), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(moved.abs().sort(-1)[0], theta.abs().sort(-1)[0])


@pytest.mark.parametrize("matcher", ["weights", "activations"])
@pytest.mark.parametrize("name", NETS)
def test_planted_elements_are_found(name: str, matcher: str) -> None:
    if (name, matcher) == ("deep relu", "activations"):
        pytest.skip(
            "some of these networks die in their first layers, and all units behind are alike"
        )
    _, spec = built(name)
    reference = weights(spec, 50)
    (moved,) = spec.transform(finite(spec), 2, reference)
    assert (moved != reference).any(-1).all()
    torch.testing.assert_close(
        MATCHERS[matcher](moved, spec, reference, name), reference, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", NETS)
def test_planted_elements_are_found_under_noise(name: str) -> None:
    _, spec = built(name)
    reference = weights(spec)
    noisy = reference + 0.05 * weights(spec, 30, seed=3)
    found = match(spec.transform(finite(spec), 2, noisy)[0], spec, reference)
    torch.testing.assert_close(found, noisy)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh], ids=["relu", "tanh"])
@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_planted_elements_are_found_at_any_depth(
    depth: int, activation: Callable[[], nn.Module]
) -> None:
    with torch.random.fork_rng(devices=[]):
        spec = WeightSpec.of(perceptron(2, *[16] * depth, 1, activation=activation))
    reference = weights(spec, 100)
    for noise in (0.0, 0.1):
        near = reference + noise * weights(spec, 100, seed=3)
        found = match(spec.transform(finite(spec), 2, near)[0], spec, reference)
        assert int((found == near).all(-1).sum()) == 100


@pytest.mark.parametrize("name", ["relu", "perceptron", "residual", "square residual"])
def test_sinkhorn_finds_planted_elements(name: str) -> None:
    _, spec = built(name)
    reference = weights(spec, 10)
    (moved,) = spec.transform(
        Symmetries(finite(spec).permutation, frozenset(), frozenset()), 2, reference
    )
    found = sinkhorn_rebasin(moved, spec, reference, steps=50)
    assert int((found == reference).all(-1).sum()) >= 9


@pytest.mark.parametrize("name", NETS)
def test_no_distance_grows(name: str) -> None:
    _, spec = built(name)
    theta, reference = weights(spec, 40), weights(spec, 40, seed=2)
    found = match(theta, spec, reference)
    before, after = distance(theta, reference), distance(found, reference)
    assert (after <= before * (1 + 1e-12)).all()
    assert (after < before).any()
    assert (distance(match(found, spec, reference), reference) <= after * (1 + 1e-12)).all()


def test_matching_is_no_worse_than_sinkhorn() -> None:
    _, spec = built("relu")
    theta, reference = weights(spec, 20), weights(spec, seed=2)
    soft = sinkhorn_rebasin(theta, spec, reference)
    assert (
        distance(match(theta, spec, reference), reference).mean()
        <= distance(soft, reference).mean()
    )
    assert distance(soft, reference).mean() < distance(theta, reference).mean()


@pytest.mark.parametrize("matcher", ["weights", "activations"])
@pytest.mark.parametrize("name", ["perceptron", "odd residual", "convolutional"])
def test_a_batch_is_its_networks_one_by_one(name: str, matcher: str) -> None:
    _, spec = built(name)
    theta = weights(spec, 2, 3)
    for reference in (weights(spec, seed=2), weights(spec, 2, 3, seed=2)):
        found = MATCHERS[matcher](theta, spec, reference, name)
        for i, j in itertools.product(range(2), range(3)):
            own = reference if reference.dim() == 1 else reference[i, j]
            assert torch.equal(MATCHERS[matcher](theta[i, j], spec, own, name), found[i, j])


@pytest.mark.parametrize("name", ["perceptron", "odd residual"])
def test_blocks_of_networks_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, spec = built(name)
    theta = weights(spec, 40)
    for reference in (weights(spec, seed=2), weights(spec, 40, seed=2)):
        whole = match(theta, spec, reference)
        with monkeypatch.context() as patch:
            patch.setattr("bnnflow.symmetry.matching._BLOCK", 1)
            assert torch.equal(match(theta, spec, reference), whole)


def gains(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    """Ten assignment problems, with and without ties."""
    drawn = torch.randn(10, n, n, generator=torch.Generator().manual_seed(n))
    ties = {"none": drawn, "some": drawn.round(), "all": torch.zeros_like(drawn)}
    return ties[kind].to(dtype)


@pytest.mark.parametrize("compiles", ["1", "0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", ["none", "some", "all"])
def test_assignments_have_the_largest_gain(
    ties: str, dtype: torch.dtype, compiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BNNFLOW_FUSED", compiles)
    library.cache_clear()
    for n in (1, 2, 3, 7, 8, 9, 33):
        gain = gains(ties, n, dtype)
        found = assign(gain)
        assert torch.equal(found.sort(1)[0], torch.arange(n).expand(10, n))
        for problem, columns in zip(gain.double(), found, strict=True):
            best = linear_sum_assignment(problem.numpy(), maximize=True)
            assert float(problem[range(n), columns].sum()) == pytest.approx(
                float(problem[best].sum())
            )
    library.cache_clear()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gains_that_are_not_finite_are_refused(value: float) -> None:
    gain = gains("none", 5, torch.float32)
    gain[3, 1, 2] = value
    with pytest.raises(ValueError, match="too large to be matched"):
        assign(gain)


def test_weights_whose_products_overflow_are_refused() -> None:
    _, spec = built("perceptron")
    theta = weights(spec, 3).float()
    with pytest.raises(ValueError, match=r"overflow torch\.float32"):
        match(1e30 * theta, spec, 1e30 * theta[0])


@pytest.mark.parametrize("name", ["perceptron", "relu", "odd convolutional"])
def test_single_precision(name: str) -> None:
    net, spec = built(name)
    theta, reference, x = (
        weights(spec, 10).float(),
        weights(spec, seed=2).float(),
        data(name),
    )
    expected = outputs(net, spec, theta, x)
    for moved in (
        match(theta, spec, reference),
        sinkhorn_rebasin(theta, spec, reference, steps=10),
        normalise_scale(theta, spec),
        sort_units(theta, spec),
    ):
        assert moved.dtype == torch.float32
        torch.testing.assert_close(
            outputs(net, spec, moved, x), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["without biases", "perceptron"])
def test_activation_matching_does_not_see_scales(name: str) -> None:
    net, spec = built(name)
    reference = weights(spec, 20)
    moved = spec.random_symmetry(reference, 2)  # leaky units scale, and never die
    expected = normalise_scale(reference, spec)
    for through in (None, net):
        found = match_activations(moved, spec, reference, data(name), net=through)
        torch.testing.assert_close(
            normalise_scale(found, spec), expected, rtol=1e-9, atol=1e-9
        )
    assert not any(module._forward_hooks for module in net.modules())


def test_activation_matching_needs_the_network() -> None:
    _, spec = built("residual")
    theta = weights(spec, 2)
    with pytest.raises(ValueError, match="pass net"):
        match_activations(theta, spec, theta[0], data("residual"))


def test_constant_units_are_matched_to_anything() -> None:
    net, spec = built("relu")
    theta = weights(spec, 5)
    theta[:, spec.slices["0.bias"]] = -100.0  # the first layer is dead
    x = data("relu")
    found = match_activations(theta, spec, weights(spec, seed=2), x)
    torch.testing.assert_close(outputs(net, spec, found, x), outputs(net, spec, theta, x))


# ---------------------------------------- soft permutations


def test_soft_permutations_are_doubly_stochastic_with_the_derivatives_of_the_limit() -> (
    None
):
    scores = torch.randn(3, 5, 5, generator=generator(), dtype=F64, requires_grad=True)
    weight = torch.randn(3, 5, 5, generator=generator(1), dtype=F64)
    soft = soft_permutation(scores, 300)
    for axis in (-1, -2):
        torch.testing.assert_close(soft.sum(axis), torch.ones(3, 5, dtype=F64))
    unrolled = scores
    for _ in range(300):
        unrolled = unrolled.log_softmax(-2).log_softmax(-1)
    grads = [
        torch.autograd.grad((each * weight).sum(), scores)[0]
        for each in (soft, unrolled.exp())
    ]
    torch.testing.assert_close(*grads)


def test_derivatives_of_hard_permutations_are_finite() -> None:
    scores = (100 * torch.eye(4)).repeat(2, 1, 1).requires_grad_()
    soft_permutation(scores).square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert scores.grad.abs().max() < 1e-3


def test_sinkhorn_lowers_a_given_loss() -> None:
    net, spec = built("relu")
    reference = weights(spec)
    x, y = data("relu"), outputs(net, spec, reference, data("relu"))[0]

    def halfway(theta: Tensor) -> Tensor:
        middle = (theta + reference) / 2
        return torch.func.vmap(
            lambda each: (
                (functional_call(net, spec.network.unflatten(each[:-1]), (x,)) - y)
                .square()
                .mean()
            )
        )(middle)

    theta = spec.transform(finite(spec), 2, reference + 0.1 * weights(spec, 20, seed=3))[0]
    found = sinkhorn_rebasin(theta, spec, reference, loss=halfway, steps=50)
    assert halfway(found).mean() < 0.5 * halfway(theta).mean()


# ---------------------------------------- means


def model_of(name: str) -> bf.BayesianModel:
    net, _ = built(name)
    x = data(name, 12)
    y = x.flatten(1)[:, :2] + 0.1
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.5), x, y)


@pytest.mark.parametrize("method", ["weights", "activations", "sinkhorn"])
@pytest.mark.parametrize("name", ["perceptron", "residual", "convolutional"])
def test_alignment_by_every_method_gathers_one_mode(name: str, method: Method) -> None:
    model = model_of(name)
    spec = model.spec
    clean = weights(spec) + 0.03 * weights(spec, 2, 8, seed=3)
    group = model.symmetries()
    group = group._replace(sign=frozenset()) if method == "sinkhorn" else group
    theta = spec.transform(group, 2, clean)[0]
    aligned = align(model, theta, rounds=1 if method == "sinkhorn" else 5, method=method)
    assert isinstance(aligned, Tensor)
    torch.testing.assert_close(
        model.log_joint(aligned), model.log_joint(theta), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        aligned.var((0, 1)).sum(), clean.var((0, 1)).sum(), rtol=1e-6, atol=0
    )


def test_alignment_refuses_an_unknown_method() -> None:
    model = model_of("relu")
    with pytest.raises(ValueError, match="method must be"):
        align(model, weights(model.spec, 3), method="magic")  # type: ignore[arg-type]


def test_every_round_of_a_frechet_mean_comes_closer() -> None:
    _, spec = built("perceptron")
    theta = weights(spec, 60)
    spreads = []
    for rounds in (1, 2, 3, 6):
        moved, mean = frechet_mean(theta, spec, rounds=rounds)
        torch.testing.assert_close(mean, moved.mean(0))
        spreads.append(float(moved.var(0).sum()))
    assert all(
        later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(spreads)
    )
    assert spreads[-1] < float(theta.var(0).sum())
