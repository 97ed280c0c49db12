"""What can be labelled: reshaped, transposed and embedded units, on random architectures.

Every claim is a symmetry.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors, symmetry
from bnnflow.activations import Sine
from bnnflow.report import WeightConvergence, weight_convergence
from bnnflow.symmetry import match, normalise_scale, normalise_sign, sort_units
from bnnflow.weights import Symmetries, WeightSpec

F64 = torch.float64
NONE = Symmetries(frozenset(), frozenset(), frozenset())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make().double().eval()


class Net(nn.Module):
    """Layers by name and a forward pass of one's own."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def outputs(net: nn.Module, spec: WeightSpec, theta: Tensor, x: Tensor) -> Tensor:
    """Evaluate the module itself, one network after the other:
    ``(batch, dim) -> (batch, n, ...)``.
    """
    params = spec.unflatten(theta)
    each = ({name: value[i] for name, value in params.items()} for i in range(len(theta)))
    with torch.no_grad():
        return torch.stack(
            [torch.func.functional_call(net, weights, (x,)) for weights in each]
        )


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...] | int  # shape of a row, or the number of words of a row's two
    widths: dict[str, int]
    scale: str = ""  # labels of units with a scale, without their "h"


def chain(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


def decoder(activation: Callable[[], nn.Module]) -> nn.Module:
    return chain(
        nn.Linear(3, 5), activation(), nn.Linear(5, 24), activation(), nn.Unflatten(1, (4, 2, 3)),
        nn.ConvTranspose2d(4, 3, 2), activation(), nn.ConvTranspose2d(3, 1, 2), nn.Flatten(),
    )  # fmt: skip


CASES = {
    "image from a row": Case(
        lambda: chain(
            nn.Unflatten(1, (1, 3, 4)),
            nn.Conv2d(1, 4, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 2),
        ),
        (12,),
        {"h1": 4},
        "1",
    ),
    "view of the inputs": Case(
        lambda: Net(
            lambda n, x: n.b(torch.relu(n.a(x.view(-1, 1, 3, 4))).flatten(1)),
            a=nn.Conv2d(1, 4, 2),
            b=nn.Linear(24, 2),
        ),
        (12,),
        {"h1": 4},
        "1",
    ),
    "channels first": Case(
        lambda: Net(
            lambda n, x: n.b(torch.relu(n.a(x.permute(0, 3, 1, 2))).mean((2, 3))),
            a=nn.Conv2d(2, 4, 2),
            b=nn.Linear(4, 2),
        ),
        (3, 4, 2),
        {"h1": 4},
        "1",
    ),
    "channels last": Case(
        lambda: Net(
            lambda n, x: n.c(
                torch.relu(n.b(torch.relu(n.a(x)).permute(0, 2, 3, 1))).mean((1, 2))
            ),
            a=nn.Conv2d(1, 4, 2),
            b=nn.Linear(4, 3),
            c=nn.Linear(3, 2),
        ),
        (1, 3, 4),
        {"h1": 4, "h2": 3},
        "12",
    ),
    "features of the inputs": Case(
        lambda: Net(
            lambda n, x: n.b(torch.relu(n.a(torch.cat([x, x**2, x[:, :1].sin()], -1)))),
            a=nn.Linear(7, 4),
            b=nn.Linear(4, 2),
        ),
        (3,),
        {"h1": 4},
        "1",
    ),
    "sequence": Case(
        lambda: Net(
            lambda n, x: n.b(torch.relu(n.a(x.transpose(1, 2)))[:, :, -1]),
            a=nn.Conv1d(2, 4, 2),
            b=nn.Linear(4, 2),
        ),
        (5, 2),
        {"h1": 4},
        "1",
    ),
    "view with sizes": Case(
        lambda: Net(
            lambda n, x: n.c(
                F.relu(n.b(F.relu(n.a(x)).view(x.size(0), 4, 2, 3))).reshape(x.shape[0], -1)
            ),
            a=nn.Linear(3, 24),
            b=nn.Conv2d(4, 5, 2),
            c=nn.Linear(10, 2),
        ),
        (3,),
        {"h1": 4, "h2": 5},
        "12",
    ),
    "decoder relu": Case(
        lambda: decoder(nn.ReLU), (3,), {"h1": 5, "h2": 4, "h3": 3}, "123"
    ),
    "decoder tanh": Case(lambda: decoder(nn.Tanh), (3,), {"h1": 5, "h2": 4, "h3": 3}),
    "there and back": Case(
        lambda: chain(
            nn.Linear(3, 12),
            nn.ReLU(),
            nn.Unflatten(1, (3, 4)),
            nn.Flatten(),
            nn.Linear(12, 2),
        ),
        (3,),
        {"h1": 12},
        "1",
    ),
    "words": Case(
        lambda: chain(nn.Embedding(6, 5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)),
        6,
        {"h1": 5, "h2": 4},
        "12",
    ),
    "words through convolutions": Case(
        lambda: Net(
            lambda n, x: n.b(torch.relu(n.a(torch.relu(n.e(x)).transpose(1, 2))).mean(-1)),
            e=nn.Embedding(6, 5),
            a=nn.Conv1d(5, 4, 2),
            b=nn.Linear(4, 2),
        ),
        6,
        {"h1": 5, "h2": 4},
        "12",
    ),
    "padding and upsampling": Case(
        lambda: chain(
            nn.Conv2d(1, 3, 2),
            nn.ReLU(),
            nn.ZeroPad2d(1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.ReflectionPad2d(1),
            nn.Conv2d(3, 4, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
        (1, 3, 4),
        {"h1": 3, "h2": 4},
        "12",
    ),
    "squeezed space": Case(
        lambda: Net(
            lambda n, x: n.b(
                F.adaptive_avg_pool2d(torch.relu(n.a(x)), 1).squeeze(-1).squeeze(-1)
            ),
            a=nn.Conv2d(1, 4, 2),
            b=nn.Linear(4, 2),
        ),
        (1, 3, 4),
        {"h1": 4},
        "1",
    ),
    "partial flatten": Case(
        lambda: Net(
            lambda n, x: n.b(torch.relu(n.a(x)).flatten(2).mean(2)),
            a=nn.Conv2d(1, 4, 2),
            b=nn.Linear(4, 2),
        ),
        (1, 3, 4),
        {"h1": 4},
        "1",
    ),
    "flattened norm": Case(
        lambda: chain(
            nn.Conv1d(2, 4, 2),
            nn.Flatten(),
            nn.LayerNorm(16),
            nn.ReLU(),
            nn.Unflatten(1, (4, 4)),
            nn.Conv1d(4, 3, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(9, 2),
        ),
        (2, 5),
        {"h1": 4, "h2": 3},
        "12",
    ),
    "one convolution": Case(lambda: nn.Conv1d(2, 3, 2), (2, 4), {}),
    "one embedding": Case(lambda: nn.Embedding(6, 3), 6, {}),
}


def rows(case: Case, n: int = 3) -> Tensor:
    if isinstance(case.inputs, int):
        return torch.randint(case.inputs, (n, 2), generator=generator(9))
    return torch.randn(n, *case.inputs, generator=generator(9), dtype=F64)


def points(spec: WeightSpec, n: int, seed: int = 1) -> Tensor:
    return 0.7 * torch.randn(n, spec.dim, generator=generator(seed), dtype=F64)


def changes(expected: Tensor, found: Tensor) -> float:
    return float((found - expected).abs().amax() / expected.abs().amax().clamp(min=1))


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_labels_are_found_and_keep_functions(case: Case) -> None:
    net = built(case.make)
    spec = WeightSpec.of(net)
    assert spec.widths == case.widths
    group = spec.symmetries()
    assert group.permutation == set(case.widths)
    assert group.scale == {f"h{i}" for i in case.scale}
    theta, x = points(spec, 4), rows(case)
    moved = spec.random_symmetry(theta, seed=3)
    assert not case.widths or not torch.equal(moved, theta)
    assert changes(outputs(net, spec, theta, x), outputs(net, spec, moved, x)) < 1e-10


def test_canonical_forms_and_matching_find_copies(case: Case) -> None:
    net = built(case.make)
    spec = WeightSpec.of(net)
    theta, x = points(spec, 3), rows(case)
    moved = spec.random_symmetry(theta, seed=4)
    expected = outputs(net, spec, theta, x)

    def form(networks: Tensor) -> Tensor:
        return sort_units(normalise_sign(normalise_scale(networks, spec), spec), spec)

    torch.testing.assert_close(form(moved), form(theta), rtol=1e-8, atol=1e-8)
    assert changes(expected, outputs(net, spec, form(theta), x)) < 1e-10
    near = match(normalise_scale(moved, spec), spec, normalise_scale(theta, spec))
    assert changes(expected, outputs(net, spec, near, x)) < 1e-10
    spheres = symmetry.Spheres(spec)
    assert changes(expected, outputs(net, spec, spheres.project(theta), x)) < 1e-10


def test_descriptions_come_back(case: Case) -> None:
    spec = WeightSpec.of(built(case.make))
    assert WeightSpec.from_description(spec.describe()) == spec


# what else happens to units, and whether the network is a plain chain of layers all the same
CHAINS = {
    "view of the inputs": (lambda n, x: n.b(torch.tanh(n.a(x.view(-1, 3)))), True),
    "inputs flattened": (lambda n, x: n.b(torch.tanh(n.a(x.flatten(1)))), True),
    "inputs cut": (lambda n, x: n.b(torch.tanh(n.a(x.view(-1, 1, 3)))).flatten(1), False),
    "units viewed": (lambda n, x: n.b(torch.tanh(n.a(x)).view(-1, 4)), False),
    "units cut": (
        lambda n, x: n.b(torch.tanh(n.a(x)).unflatten(-1, (2, 2)).flatten(1)),
        False,
    ),
    "one more axis": (
        lambda n, x: n.b(torch.tanh(n.a(x)).unflatten(1, (1, 4)))[:, 0],
        False,
    ),
    "outputs cut": (lambda n, x: n.b(torch.tanh(n.a(x))).unflatten(1, (1, 2))[:, 0], False),
    "exchanged twice": (
        lambda n, x: n.b(
            torch.tanh(n.a(x)).unflatten(1, (1, 4)).transpose(1, 2).transpose(1, 2)
        )[:, 0],
        False,
    ),
    "sizes computed": (
        lambda n, x: n.b(torch.tanh(n.a(x)).view(x.size(0), x.size(1) + 1)),
        False,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_only_what_is_a_chain_is_taken_for_one(name: str) -> None:
    """The fast path computes what the module computes."""
    forward, is_chain = CHAINS[name]
    net = built(lambda: Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)))
    x = torch.randn(5, 3, generator=generator(1), dtype=F64)
    model = bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(), x, x[:, :2])
    assert bool(model.spec.layers) == is_chain
    assert model.spec.symmetries().permutation == {"h1"}
    theta = model.theta_of(net)
    torch.testing.assert_close(model.outputs(theta), net(x).detach())


# ---------------------------------------- random architectures


ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU, lambda: Sine(2.0), nn.Identity]


def random_network(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A random stack of convolutions, pools, norms, skips, reshapes and linear layers, and the
    shape of its inputs.
    """
    g = generator(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    act = pick(*ACTIVATIONS)
    modules: list[nn.Module] = []
    channels = pick(1, 2)
    inputs: tuple[int, ...] = (channels, 6, 5)
    if pick(0, 1):
        modules, inputs = [nn.Unflatten(1, inputs)], (channels * 30,)
    elif pick(0, 1):
        c = pick(2, 3)
        modules = [
            nn.Linear(4, 5),
            act(),
            nn.Linear(5, c * 30),
            pick(nn.Identity, act)(),
            nn.Unflatten(1, (c, 6, 5)),
        ]
        channels, inputs = c, (4,)
    for _ in range(pick(1, 2, 3)):
        width = pick(3, 4)
        block = pick("conv", "transposed", "separable", "residual", "norm", "upsampled")
        if block == "transposed":
            modules += [nn.ConvTranspose2d(channels, width, 3, padding=1), act()]
        else:
            modules += [
                nn.Conv2d(channels, width, 3, padding=1, bias=pick(True, False)),
                act(),
            ]
        if block == "separable":
            modules += [nn.Conv2d(width, width, 3, padding=1, groups=width), act()]
        if block == "residual":
            modules += [Skip(chain(nn.Conv2d(width, 3, 1), act(), nn.Conv2d(3, width, 1)))]
        if block == "norm":
            modules += [
                pick(
                    nn.GroupNorm(1, width),
                    nn.GroupNorm(width, width),
                    nn.InstanceNorm2d(width),
                ),
                act(),
            ]
        if block == "upsampled":
            modules += [
                nn.Upsample(scale_factor=2),
                nn.AvgPool2d(2),
                nn.ReplicationPad2d(1),
                nn.MaxPool2d(3, 1),
            ]
        channels = width
    how = pick("flatten", "average", "last")
    if how == "flatten":
        modules += [nn.AdaptiveMaxPool2d((2, 3)), nn.Flatten(), nn.Linear(channels * 6, 4)]
    elif how == "average":
        modules += [Last(lambda h: h.mean((2, 3))), nn.Linear(channels, 4)]
    else:
        modules += [
            Last(lambda h: h.permute(0, 2, 3, 1)),
            nn.Linear(channels, 4),
            Last(lambda h: h[:, -1, 0]),
        ]
    modules += [act(), pick(nn.Identity(), nn.LayerNorm(4)), nn.Linear(4, 2)]
    return chain(*modules), inputs


class Skip(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Last(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("seed", range(60))
def test_claims_hold_on_random_architectures(seed: int) -> None:
    net = built(lambda: random_network(seed)[0], seed)
    x = torch.randn(3, *random_network_inputs(seed), generator=generator(seed), dtype=F64)
    spec = WeightSpec.of(net)
    assert spec.symmetries().permutation
    theta = points(spec, 2, seed)
    expected = outputs(net, spec, theta, x)
    for kind, labels in spec.symmetries()._asdict().items():  # each kind, then all together
        alone = type(spec.symmetries())(
            *(labels if kind == each else frozenset() for each in spec.symmetries()._fields)
        )
        (moved,) = spec.transform(alone, seed, theta)
        assert changes(expected, outputs(net, spec, moved, x)) < 1e-10, kind
    moved = spec.random_symmetry(theta, seed)
    assert (moved - theta).abs().max() > 1e-3
    assert changes(expected, outputs(net, spec, moved, x)) < 1e-10


def random_network_inputs(seed: int) -> tuple[int, ...]:
    with torch.random.fork_rng(devices=[]):
        return random_network(seed)[1]


# ---------------------------------------- constants


def test_equal_constants_do_not_tie_units() -> None:
    """A frozen norm as it comes, or a frozen bias of zeros, is the same for every unit."""
    net = built(
        lambda: chain(
            nn.Linear(3, 4),
            nn.LayerNorm(4),
            nn.ReLU(),
            nn.Linear(4, 5),
            nn.ReLU(),
            nn.Linear(5, 2),
        )
    )
    nn.init.zeros_(net[3].bias)
    for parameter in (net[1].weight, net[1].bias, net[3].bias):
        parameter.requires_grad_(False)
    spec = WeightSpec.of(net)
    assert spec.symmetries().permutation == {"h1", "h2"}
    assert spec.symmetries().scale == {"h2"}
    theta, x = points(spec, 3), torch.randn(4, 3, generator=generator(9), dtype=F64)
    moved = spec.random_symmetry(theta, 0)
    assert changes(outputs(net, spec, theta, x), outputs(net, spec, moved, x)) < 1e-10
    net[1].weight.data[0] = 2.0
    assert WeightSpec.of(net).symmetries().permutation == {"h2"}


# ---------------------------------------- the network of the documentation


def docs_model() -> bf.BayesianModel:
    """Run the block of docs/inference.md that defines the convnet, on rows of random pixels."""
    text = (Path(__file__).parents[1] / "docs" / "inference.md").read_text()
    (block,) = [
        each
        for each in re.findall(r"```python\n(.*?)```", text, re.S)
        if "torch.nn.Unflatten(" in each
    ]
    defines = block[block.index("class Residual") : block.index("images = ")]
    code = "\n".join(line for line in defines.splitlines() if "bf.data.load" not in line)
    scope: dict[str, Any] = {"torch": torch}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        exec(code, scope)
    x = torch.randn(20, 64, generator=generator(1))
    return bf.BayesianModel(
        scope["image"], priors.FanIn(), likelihoods.Categorical(), x, torch.arange(20) % 10
    )


def test_the_convnet_of_the_documentation_is_aligned() -> None:
    model = docs_model()
    assert model.spec.widths["h1"] == 4
    theta = model.sample_prior(1, 0).double()
    copies = model.spec.random_symmetry(theta.expand(4, -1), 1, model.symmetries())
    assert (copies - theta).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(
        bf.align(model, copies, reference=theta[0]), theta.expand(4, -1)
    )


def test_copies_of_the_convnet_have_one_form() -> None:
    """What `weight_convergence` compares, before and after a symmetry of the function."""
    model = docs_model().to(dtype=F64)
    spec = model.spec
    theta = model.sample_prior(1, 0) + 0.02 * torch.randn(
        8, model.dim, generator=generator(), dtype=F64
    )
    copies = spec.random_symmetry(theta, 2)

    def aligned(networks: Tensor) -> Tensor:
        forms = sort_units(normalise_scale(networks, spec), spec)
        return match(forms, spec, sort_units(normalise_scale(theta[0], spec), spec))

    assert (copies - theta).abs().amax(-1).min() > 0.1
    torch.testing.assert_close(aligned(copies), aligned(theta), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_chains_in_copies_of_the_convnet_are_found_to_agree() -> None:
    model = docs_model().to(dtype=F64)
    chain = model.sample_prior(1, 0) + 0.02 * torch.randn(
        8, model.dim, generator=generator(), dtype=F64
    )
    copy = torch.stack(model.spec.transform(model.spec.symmetries(), 2, *chain))

    def compared(*chains: Tensor) -> WeightConvergence:
        theta = torch.stack(chains)
        return weight_convergence(
            model, bf.Draws(theta, model.log_joint(theta), {"n_steps": torch.ones(2, 8)})
        )

    same, moved = compared(chain, chain), compared(chain, copy)
    assert not moved.unknown
    for name, each in moved.aligned.items():  # but for ties, which rounding breaks
        assert abs(each.worst[0] - same.aligned[name].worst[0]) < 0.05


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_reads_no_units_is_refused_by_name(seeded):
    with seeded(0):
        first = nn.Conv2d(3, 0, 1)
        nets = [
            nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(0, 3)),
            nn.Sequential(
                first, nn.GroupNorm(1, 0), nn.ReLU(), nn.Flatten(), nn.Linear(0, 3)
            ),
            nn.Sequential(
                nn.Conv2d(3, 4, 1), nn.Conv2d(4, 0, 1), nn.Flatten(), nn.Linear(0, 3)
            ),
        ]
    for net in nets:
        with pytest.raises(
            ValueError,
            match=r"cannot label module '\d' \(Linear\): what it reads has no units",
        ):
            WeightSpec.of(net)
