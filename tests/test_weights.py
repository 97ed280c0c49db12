"""Laws of weight space: the layout, the group action, and which symmetries keep which prior."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Laplace, Normal
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.parametrizations import spectral_norm

from bnnflow import priors, symmetry
from bnnflow.weights import WeightSpec


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a network from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make()


def perceptron(
    *widths: int, activation: Callable[[], nn.Module] = nn.Tanh, bias: bool = True
) -> nn.Module:
    def make() -> nn.Module:
        modules: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            modules += [nn.Linear(n_in, n_out, bias=bias), activation()]
        return nn.Sequential(*modules[:-1])

    return built(make)


class Functional(nn.Module):
    """A network whose layers are defined in another order than the data visits them."""

    def __init__(self, activation: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.activation = activation
        self.last = nn.Linear(4, 2, bias=bias)
        self.first = nn.Linear(3, 5, bias=bias)
        self.middle = nn.Linear(5, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.middle(self.activation(self.first(x)))))


NETS: dict[str, Callable[[], nn.Module]] = {
    "depth 1": lambda: nn.Linear(3, 2),
    "depth 1 in a sequence": lambda: perceptron(3, 2, bias=False),
    "depth 2 tanh": lambda: perceptron(3, 5, 2),
    "depth 2 relu without biases": lambda: perceptron(
        3, 5, 2, activation=nn.ReLU, bias=False
    ),
    "depth 3 leaky": lambda: perceptron(3, 4, 5, 2, activation=lambda: nn.LeakyReLU(0.2)),
    "depth 3 gelu": lambda: perceptron(3, 4, 5, 2, activation=lambda: nn.GELU("tanh")),
    "depth 4 silu": lambda: perceptron(3, 4, 3, 5, 2, activation=nn.SiLU),
    "depth 4 tanh without biases": lambda: perceptron(3, 4, 3, 5, 2, bias=False),
    "depth 3 linear": lambda: perceptron(3, 4, 5, 2, activation=nn.Identity),
    "mixed": lambda: nn.Sequential(
        nn.Linear(3, 4),
        nn.Tanh(),
        nn.Linear(4, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 4),
        nn.Softsign(),
        nn.Linear(4, 2),
    ),
    "nested": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(3, 4), nn.Tanh()),
        nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU())),
        nn.Dropout(0.0),
        nn.Identity(),
        nn.Linear(4, 2),
        nn.Sigmoid(),
    ),
    "torch.tanh": lambda: Functional(torch.tanh),
    "method tanh": lambda: Functional(lambda a: a.tanh(), bias=False),
    "torch.sin": lambda: Functional(torch.sin),
    "F.relu": lambda: Functional(F.relu),
    "F.leaky_relu": lambda: Functional(lambda a: F.leaky_relu(a, 0.3)),
    "F.gelu": lambda: Functional(F.gelu),
    "F.gelu tanh": lambda: Functional(lambda a: F.gelu(a, approximate="tanh")),
    "F.silu": lambda: Functional(F.silu),
    "F.elu": lambda: Functional(lambda a: F.elu(a, alpha=0.5)),
}


@pytest.fixture(params=NETS, ids=str)
def net(request: pytest.FixtureRequest) -> nn.Module:
    return built(NETS[request.param]).double()


def outputs(net: nn.Module, spec: WeightSpec, theta: Tensor) -> Tensor:
    """Evaluate the module itself at each weight vector, ``(batch, dim) -> (batch, n, out)``."""
    x = torch.randn(7, 3, generator=generator(9), dtype=torch.float64).to(theta)
    return torch.stack(
        [torch.func.functional_call(net, spec.unflatten(row), (x,)) for row in theta]
    )


def weights(
    spec: WeightSpec, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 1
) -> Tensor:
    return torch.randn(*shape, spec.dim, generator=generator(seed), dtype=torch.float64).to(
        dtype
    )


# ---------------------------------------- layout


def test_layout_is_that_of_torch(net: nn.Module) -> None:
    spec = WeightSpec.of(net)
    vector = parameters_to_vector(net.parameters())
    assert spec.dim == len(vector)
    assert torch.equal(spec.flatten(dict(net.named_parameters())), vector)
    for name, parameter in net.named_parameters():
        assert torch.equal(spec.unflatten(vector)[name], parameter)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
def test_flatten_inverts_unflatten(net: nn.Module, lead: tuple[int, ...]) -> None:
    spec = WeightSpec.of(net).extend({"noise": (1,), "other": (2, 3)})
    theta = weights(spec, *lead)
    params = spec.unflatten(theta)
    assert all(
        tensor.shape == (*lead, *spec.shapes[name]) for name, tensor in params.items()
    )
    assert torch.equal(spec.flatten(params), theta)


def test_flatten_broadcasts_leading_axes() -> None:
    spec = WeightSpec.of(perceptron(3, 2))
    theta = spec.flatten({"0.weight": torch.ones(5, 1, 2, 3), "0.bias": torch.zeros(4, 2)})
    assert theta.shape == (5, 4, 8)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"0.weight": torch.ones(2, 3)}, "exactly the tensors"),
        (
            {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2), "more": torch.ones(2)},
            "exactly the tensors",
        ),
        (
            {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(2)},
            r"0\.weight must end in shape \(2, 3\)",
        ),
    ],
    ids=["missing", "left over", "shape"],
)
def test_flatten_refuses(params: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSpec.of(perceptron(3, 2)).flatten(params)


@pytest.mark.parametrize(
    "theta", [torch.ones(7), torch.ones(8, 1), torch.tensor(1.0)], ids=str
)
def test_wrong_length_is_named(theta: Tensor) -> None:
    with pytest.raises(ValueError, match="axis of length 8"):
        WeightSpec.of(perceptron(3, 2)).unflatten(theta)


def test_description_round_trip(net: nn.Module) -> None:
    spec = WeightSpec.of(net).extend({"noise": (1,)})
    rebuilt = WeightSpec.from_description(json.loads(json.dumps(spec.describe())))
    assert rebuilt == spec
    assert rebuilt.network == WeightSpec.of(net)
    assert list(rebuilt.activations) == list(spec.activations)  # the order of depth


# ---------------------------------------- the group action


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str
)
def test_symmetries_leave_outputs_unchanged(
    net: nn.Module, dtype: torch.dtype, tolerance: float
) -> None:
    spec = WeightSpec.of(net)
    theta = weights(spec, 6, dtype=dtype)
    moved = spec.random_symmetry(theta, seed=3)
    if spec.widths:
        assert not torch.allclose(moved, theta)
    expected, found = (
        outputs(net.to(dtype), spec, theta),
        outputs(net.to(dtype), spec, moved),
    )
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


def test_every_action_alone_leaves_outputs_unchanged(net: nn.Module) -> None:
    spec, g = WeightSpec.of(net), generator(4)
    theta = weights(spec, 3)
    expected, group = outputs(net, spec, theta), spec.symmetries()
    for label in group.permutation:
        perms = {label: torch.rand(3, spec.widths[label], generator=g).argsort(-1)}
        torch.testing.assert_close(
            outputs(net, spec, spec.permute(theta, perms)), expected, rtol=1e-12, atol=1e-12
        )
    for label in group.sign:
        signs = {label: 2.0 * torch.randint(2, (3, spec.widths[label]), generator=g) - 1}
        torch.testing.assert_close(
            outputs(net, spec, spec.flip(theta, signs)), expected, rtol=1e-12, atol=1e-12
        )
    for label in group.scale:
        scales = {label: torch.rand(3, spec.widths[label], generator=g) + 0.5}
        torch.testing.assert_close(
            outputs(net, spec, spec.rescale(theta, scales)),
            expected,
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize("name", ["depth 3 linear", "torch.sin", "nested"])
def test_composition_and_inverse(name: str) -> None:
    spec, g = WeightSpec.of(built(NETS[name])), generator(5)
    theta = weights(spec, 2, 3)
    first, second = (
        {k: torch.rand(3, n, generator=g).argsort(-1) for k, n in spec.widths.items()}
        for _ in range(2)
    )
    # Unit i of the second step is unit second[i] of the first, which is unit first[second[i]] of
    # theta.
    both = {label: first[label].gather(-1, second[label]) for label in first}
    assert torch.equal(
        spec.permute(spec.permute(theta, first), second), spec.permute(theta, both)
    )
    inverse = {label: perm.argsort(-1) for label, perm in first.items()}
    assert torch.equal(spec.permute(spec.permute(theta, first), inverse), theta)
    signs = {
        k: 2.0 * torch.randint(2, (spec.widths[k],), generator=g) - 1
        for k in spec.symmetries().sign
    }
    assert torch.equal(spec.flip(spec.flip(theta, signs), signs), theta)
    group = spec.symmetries()
    scales = {
        k: torch.rand(2, 1, spec.widths[k], generator=g).double() + 0.5 for k in group.scale
    }
    back = spec.rescale(
        spec.rescale(theta, scales), {label: 1 / scale for label, scale in scales.items()}
    )
    torch.testing.assert_close(back, theta, rtol=1e-12, atol=0)


def test_batched_elements_act_row_by_row(net: nn.Module) -> None:
    spec, g = WeightSpec.of(net), generator(6)
    theta = weights(spec, 4)
    perms = {
        label: torch.rand(4, n, generator=g).argsort(-1) for label, n in spec.widths.items()
    }
    batched = spec.permute(theta, perms) if perms else theta
    for i in range(4):
        assert torch.equal(
            batched[i],
            spec.permute(theta[i], {label: perm[i] for label, perm in perms.items()}),
        )
    if perms:  # one network, many elements
        one = {label: perm[1] for label, perm in perms.items()}
        assert torch.equal(spec.permute(theta[0], perms)[1], spec.permute(theta[0], one))


def test_permute_moves_units_as_documented() -> None:
    spec = WeightSpec.of(perceptron(3, 4, 2))
    theta, perm = weights(spec), torch.tensor([2, 0, 3, 1])
    before, after = spec.unflatten(theta), spec.unflatten(spec.permute(theta, {"h1": perm}))
    assert torch.equal(after["0.weight"], before["0.weight"][perm])
    assert torch.equal(after["0.bias"], before["0.bias"][perm])
    assert torch.equal(after["2.weight"], before["2.weight"][:, perm])
    assert torch.equal(after["2.bias"], before["2.bias"])


def test_extras_are_untouched(net: nn.Module) -> None:
    spec = WeightSpec.of(net).extend({"noise": (1,), "others": (2, 2)})
    theta = weights(spec, 5)
    moved = spec.random_symmetry(theta, seed=0)
    assert torch.equal(moved[:, -5:], theta[:, -5:])
    assert spec.network == WeightSpec.of(net)


def test_random_symmetry_depends_on_the_seed_alone() -> None:
    spec = WeightSpec.of(perceptron(3, 5, 4, 2))
    theta = weights(spec, 8)
    assert torch.equal(spec.random_symmetry(theta, 1), spec.random_symmetry(theta, 1))
    assert not torch.equal(spec.random_symmetry(theta, 1), spec.random_symmetry(theta, 2))


def test_transform_applies_one_element_to_all() -> None:
    spec = WeightSpec.of(perceptron(3, 5, 4, 2))
    theta = weights(spec, 8)
    a, b = spec.transform(spec.symmetries(), 1, theta, 2 * theta)
    torch.testing.assert_close(b, 2 * a)


def test_random_permutations_and_signs_are_uniform() -> None:
    spec = WeightSpec.of(perceptron(1, 3, 1, bias=False))
    theta = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 1.0]).expand(48_000, -1)
    moved = spec.random_symmetry(theta, seed=0)[:, :3]
    counts = torch.stack(
        [(moved == element).all(-1).sum() for element in _signed_permutations()]
    )
    assert counts.sum() == 48_000  # all 3! 2^3 elements and nothing else
    chi2 = float(((counts - 1000.0) ** 2 / 1000).sum())
    assert chi2 < 47 + 5 * math.sqrt(2 * 47)


def _signed_permutations() -> list[Tensor]:
    values = torch.cartesian_prod(*[torch.tensor([-3.0, -2, -1, 1, 2, 3])] * 3)
    return [v for v in values if sorted(v.abs().tolist()) == [1, 2, 3]]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s, t: s.permute(t, {"h9": torch.arange(4)}), "no hidden layer 'h9'"),
        (lambda s, t: s.permute(t, {"h1": torch.arange(3)}), "an axis of 4"),
        (lambda s, t: s.flip(t, {"h2": torch.ones(4)}), "relu, which has no sign symmetry"),
        (
            lambda s, t: s.rescale(t, {"h1": torch.ones(4)}),
            "tanh, which has no scale symmetry",
        ),
        (lambda s, t: s.rescale(t, {"h2": -torch.ones(4)}), "positive"),
    ],
    ids=["label", "width", "sign", "scale", "negative scale"],
)
def test_wrong_elements_are_refused(act: Callable, message: str) -> None:
    spec = WeightSpec.of(built(NETS["nested"]))
    with pytest.raises(ValueError, match=message):
        act(spec, weights(spec))


def test_log_group_order() -> None:
    def order(net: nn.Module) -> float:
        return WeightSpec.of(net).log_group_order

    signed, plain = math.log(math.factorial(4) * 2**4), math.log(math.factorial(4))
    assert order(perceptron(3, 4, 2)) == pytest.approx(signed)
    assert order(perceptron(3, 4, 2, activation=nn.ReLU)) == pytest.approx(plain)
    assert order(perceptron(3, 4, 4, 2)) == pytest.approx(2 * signed)
    assert order(built(NETS["nested"])) == pytest.approx(signed + plain)
    assert order(built(lambda: nn.Linear(3, 2))) == 0
    assert (
        WeightSpec.unlabelled(built(lambda: nn.Conv2d(1, 2, 3)), unknown="").log_group_order
        == 0
    )


# ---------------------------------------- symmetries of priors

SHIFTED = torch.tensor([[0.5], [0.0], [0.0], [0.0]])
VARIED = torch.tensor([1.0, 2.0, 3.0, 4.0])
STANDARD = Normal(0.0, 1.0)
BOTH = {"h1", "h2"}
# prior, labels whose permutations stay, labels whose signs stay; all of a 3-4-4-2 tanh network
PRIORS = {
    "normal": (priors.Normal(0.7), BOTH, BOTH),
    "fan-in": (priors.FanIn(1.5, 0.5), BOTH, BOTH),
    "laplace": (priors.Laplace(0.7), BOTH, BOTH),
    "student-t": (priors.StudentT(3.0), BOTH, BOTH),
    "shifted": (priors.Normal(0.7, 0.1), BOTH, set()),
    "shifted output bias": (
        priors.PerTensor({"4.bias": Normal(1.0, 1.0)}, STANDARD),
        BOTH,
        BOTH,
    ),
    "shifted output weight": (
        priors.PerTensor({"4.weight": Laplace(1.0, 1.0)}, STANDARD),
        BOTH,
        {"h1"},
    ),
    "one unit shifted": (
        priors.PerTensor({"0.weight": Normal(SHIFTED, 1.0)}, STANDARD),
        {"h2"},
        {"h2"},
    ),
    "scales vary over units": (
        priors.PerTensor({"0.bias": Normal(0.0, VARIED)}, STANDARD),
        {"h2"},
        BOTH,
    ),
    "scales vary over readers": (
        priors.PerTensor({"2.weight": Normal(0.0, VARIED.expand(4, 4))}, STANDARD),
        {"h2"},
        BOTH,
    ),
    "scales vary over inputs": (
        priors.PerTensor({"0.weight": Normal(0.0, VARIED[:3])}, STANDARD),
        BOTH,
        BOTH,
    ),
    "events": (
        priors.PerTensor(
            {"0.bias": Independent(Normal(torch.zeros(4), VARIED), 1)}, STANDARD
        ),
        {"h2"},
        BOTH,
    ),
}


def log_prior(spec: WeightSpec, prior: priors.Prior, theta: Tensor) -> Tensor:
    params, total = (
        spec.unflatten(theta),
        torch.zeros(theta.shape[:-1], dtype=torch.float64),
    )
    for name, distribution in prior.distributions(spec).items():
        total = total + distribution.log_prob(params[name]).reshape(len(theta), -1).sum(-1)
    return total


@pytest.mark.parametrize("name", PRIORS)
def test_which_symmetries_keep_which_prior(name: str) -> None:
    prior, permutations, signs = PRIORS[name]
    spec = WeightSpec.of(perceptron(3, 4, 4, 2))
    group = prior.symmetries(spec)
    assert group.permutation == permutations
    assert group.sign == signs
    assert not group.scale

    theta = weights(spec, 5)
    density = log_prior(spec, prior, theta)
    moved = spec.random_symmetry(theta, 2, group)
    assert not torch.equal(moved, theta)
    torch.testing.assert_close(
        log_prior(spec, prior, moved), density, rtol=1e-10, atol=1e-10
    )

    g = generator(3)
    for label in {"h1", "h2"} - permutations:
        moved = spec.permute(theta, {label: torch.tensor([1, 2, 3, 0])})
        assert (log_prior(spec, prior, moved) - density).abs().min() > 1e-3
    for label in {"h1", "h2"} - signs:
        moved = spec.flip(
            theta, {label: torch.where(torch.rand(5, 4, generator=g) < 0.5, -1.0, 1.0)}
        )
        assert (log_prior(spec, prior, moved) - density).abs().max() > 1e-3


def test_no_prior_keeps_a_rescaling() -> None:
    spec = WeightSpec.of(perceptron(3, 4, 2, activation=nn.ReLU))
    assert spec.symmetries().scale == {"h1"}
    assert not priors.Normal().symmetries(spec).scale


# ---------------------------------------- what cannot be labelled


class Forward(nn.Module):
    """Two linear layers and a forward pass of one's own."""

    def __init__(self, forward: Callable) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(3, 3), nn.Linear(3, 3), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def _tied() -> nn.Module:
    net = perceptron(3, 3, 3)
    net[2].weight = net[0].weight
    return net


def _unused() -> nn.Module:
    net = perceptron(3, 3, 3)
    net.register_parameter("spare", nn.Parameter(torch.zeros(1)))
    return net


def _hooked() -> nn.Module:
    net = perceptron(3, 3, 3)
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    return net


UNLABELLABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
        r"'1' \(BatchNorm1d\)",
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1)),
        r"'1' \(Dropout\)",
    ),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 1)),
        r"'1' \(PReLU\)",
    ),
    "softmax": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)), r"'1' \(Softmax\)"),
    "soft threshold": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Softplus(threshold=1)),
        r"'1' \(Softplus\)",
    ),
    "flatten all": (
        lambda: nn.Sequential(nn.Flatten(0), nn.Linear(3, 4)),
        r"'0' \(Flatten\)",
    ),
    "unknown option": (
        lambda: Forward(lambda s, x: s.b(torch.softmax(s.a(x), -1))),
        "'softmax'",
    ),
    "two outputs": (lambda: Forward(lambda s, x: (s.b(s.a(x)),)), "one tensor"),
    "dict output": (lambda: Forward(lambda s, x: {"mean": s.b(s.a(x))}), "one tensor"),
    "control flow": (
        lambda: Forward(lambda s, x: s.b(x) if x.sum() > 0 else s.a(x)),
        "cannot trace Forward",
    ),
    "unused layer": (lambda: Forward(lambda s, x: s.b(x)), r"'a\.(weight|bias)'"),
    "shared": (_shared, r"'0' \(Linear\): its parameters are used twice"),
    "tied": (_tied, r"'2' \(Linear\): its parameters are used twice"),
    "spare parameter": (_unused, "'spare'"),
    "hooks": (_hooked, r"'0' \(Linear\): it has hooks"),
    "parametrised": (
        lambda: nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)),
        r"'0' \(Parametrized",
    ),
    "own linear": (lambda: Doubled(3, 2), "cannot label"),
    "own linear inside": (lambda: nn.Sequential(Doubled(3, 2)), "cannot label"),
    "no linear": (lambda: nn.Sequential(nn.Flatten(), nn.Identity()), "no Linear layer"),
}


@pytest.mark.parametrize("name", UNLABELLABLE)
def test_what_cannot_be_labelled_is_named(name: str) -> None:
    make, message = UNLABELLABLE[name]
    net = built(make)
    with pytest.raises(ValueError, match=message):
        WeightSpec.of(net)


@pytest.mark.parametrize("name", ["batch norm", "prelu", "shared"])
def test_unlabelled_specs_claim_nothing(name: str) -> None:
    net = built(UNLABELLABLE[name][0])
    spec = WeightSpec.unlabelled(net)
    assert spec.dim == sum(parameter.numel() for parameter in net.parameters())
    assert not any(spec.symmetries())
    theta = weights(spec, 2)
    for act in (
        spec.known_symmetries,
        lambda: spec.random_symmetry(theta, seed=0),
        lambda: spec.log_group_order,
    ):
        with pytest.raises(ValueError, match="not known: its weights have no labels"):
            act()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_no_networks_are_moved_to_no_networks(activation: Callable[[], nn.Module]) -> None:
    spec = WeightSpec.of(perceptron(2, 3, 4, 1, activation=activation))
    none = torch.zeros(2, 0, spec.dim)
    assert spec.random_symmetry(none, 0).shape == none.shape
    assert spec.flatten(spec.unflatten(none)).shape == none.shape
    assert symmetry.sort_units(none, spec).shape == none.shape
    assert symmetry.match(none, spec, torch.zeros(spec.dim)).shape == none.shape


def test_tensors_that_are_not_there_are_refused_by_name() -> None:
    spec = WeightSpec.of(perceptron(2, 3, 1))
    for method in (spec.unit_axes, spec.scale_exponents):
        with pytest.raises(ValueError, match="name must be one of the tensors"):
            method("3.weight")
