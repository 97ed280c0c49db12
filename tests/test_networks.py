"""Labels and symmetries of real networks: convolutions, residual connections, normalisation,
sines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.activations import Activation, Sine
from bnnflow.model.network import ChainNetwork
from bnnflow.transport import Source
from bnnflow.weights import Symmetries, WeightSpec


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a network from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().eval()


class Net(nn.Module):
    """Layers by name and a forward pass of one's own."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    widths: dict[str, int]  # of every label that is found
    sign: str = ""  # labels, without their "h"
    scale: str = ""
    phase: str = ""


def group_of(case: Case) -> Symmetries:
    return Symmetries(
        frozenset(case.widths),
        *(frozenset(f"h{i}" for i in kind) for kind in (case.sign, case.scale, case.phase)),
    )


def mlp(activation: Callable[[], nn.Module], bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 5, bias),
        activation(),
        nn.Linear(5, 4, bias),
        activation(),
        nn.Linear(4, 2, bias),
    )


def conv_net(activation: Callable[[], nn.Module], bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=bias, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2, bias=bias),
        activation(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3 * 1 * 2, 5, bias),
        activation(),
        nn.Linear(5, 2, bias),
    )


def residual_convolutions(activation: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = activation(net.stem(x))
        x = activation(x + net.b(activation(net.a(x))))
        x = net.skip(x) + net.d(activation(net.c(x)))
        return net.out(torch.flatten(F.adaptive_avg_pool2d(activation(x), 1), 1))

    return Net(
        forward,
        stem=nn.Conv2d(1, 4, 3, padding=1),
        a=nn.Conv2d(4, 3, 3, padding=1),
        b=nn.Conv2d(3, 4, 3, padding=1),
        c=nn.Conv2d(4, 5, 3, padding=1),
        d=nn.Conv2d(5, 6, 1),
        skip=nn.Conv2d(4, 6, 1),
        out=nn.Linear(6, 2),
    )


def residual_mlp(
    pre: bool, activation: Callable[[Tensor], Tensor], norm: bool = True
) -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        if pre:
            return net.out(x + net.b(activation(net.a(net.norm(x)))))
        return net.out(net.norm(x + net.b(activation(net.a(x)))))

    make = nn.LayerNorm if norm else nn.Identity
    return Net(
        forward,
        stem=nn.Linear(3, 6),
        a=nn.Linear(6, 4),
        b=nn.Linear(4, 6),
        norm=make(6),
        out=nn.Linear(6, 2),
    )


def square(activation: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = activation(net.stem(x))
        x = x + activation(net.a(x))
        return net.out(x - activation(net.b(x)))

    return Net(
        forward,
        stem=nn.Linear(3, 5),
        a=nn.Linear(5, 5),
        b=nn.Linear(5, 5),
        out=nn.Linear(5, 2),
    )


def separable(activation: Callable[[], nn.Module], bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 1, bias=bias),
        activation(),
        nn.Conv2d(4, 4, 3, groups=4, bias=bias, padding=1),
        activation(),
        nn.Conv2d(4, 3, 1, bias=bias),
        activation(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 2),
    )


def functional_siren() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.c(torch.sin(3.0 * net.b(torch.sin(net.a(x) * 2))))

    return Net(forward, a=nn.Linear(3, 5), b=nn.Linear(5, 4), c=nn.Linear(4, 2))


def sine_beside(frequency: float) -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a = net.a(x)
        return net.b(torch.sin(a) + (a if frequency == 1 else torch.sin(frequency * a)))

    return Net(forward, a=nn.Linear(3, 5), b=nn.Linear(5, 2))


def global_average(net: Net, x: Tensor) -> Tensor:
    return net.out(torch.relu(net.b(torch.tanh(net.a(x)))).mean((2, 3)))


def sequence(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


ZOO = {
    "mlp relu": Case(lambda: mlp(nn.ReLU), (3,), {"h1": 5, "h2": 4}, "", "12"),
    "mlp tanh": Case(lambda: mlp(nn.Tanh), (3,), {"h1": 5, "h2": 4}, "12"),
    "mlp leaky without biases": Case(
        lambda: mlp(nn.LeakyReLU, False), (3,), {"h1": 5, "h2": 4}, "", "12"
    ),
    "mlp linear": Case(lambda: mlp(nn.Identity), (3,), {"h1": 5, "h2": 4}, "12", "12"),
    "mlp gelu": Case(lambda: mlp(nn.GELU), (3,), {"h1": 5, "h2": 4}),
    "mlp sine": Case(
        lambda: mlp(lambda: Sine(3.0)), (3,), {"h1": 5, "h2": 4}, "12", "", "12"
    ),
    "mlp sine without biases": Case(
        lambda: mlp(lambda: Sine(3.0), False), (3,), {"h1": 5, "h2": 4}, "12"
    ),
    "mlp over tokens": Case(
        lambda: Net(
            lambda n, x: n.out(n.body(x).mean(-2)),
            body=mlp(nn.Tanh),
            out=nn.Linear(2, 2),
        ),
        (4, 3),
        {"h1": 5, "h2": 4, "h3": 2},
        "123",
        "3",
    ),
    "functional siren": Case(functional_siren, (3,), {"h1": 5, "h2": 4}, "12", "", "12"),
    "sine beside its argument": Case(lambda: sine_beside(1.0), (3,), {"h1": 5}, "1"),
    "sines of two frequencies": Case(lambda: sine_beside(2.0), (3,), {"h1": 5}, "1"),
    "two functions": Case(
        lambda: sequence(
            nn.Linear(3, 4),
            nn.ReLU(),
            nn.Tanh(),
            nn.Linear(4, 3),
            Sine(),
            nn.Tanh(),
            nn.Linear(3, 1),
        ),
        (3,),
        {"h1": 4, "h2": 3},
        "2",
        "",
        "2",
    ),
    "products with numbers": Case(
        lambda: Net(
            lambda n, x: n.c(-n.b(torch.tanh(n.a(x) / 3) * 2)),
            a=nn.Linear(3, 5),
            b=nn.Linear(5, 4),
            c=nn.Linear(4, 2),
        ),
        (3,),
        {"h1": 5, "h2": 4},
        "12",
        "2",
    ),
    "flattened image": Case(
        lambda: Net(
            lambda n, x: n.b(torch.relu(n.a(x.view(x.size(0), -1)))),
            a=nn.Linear(6, 4),
            b=nn.Linear(4, 2),
        ),
        (2, 3),
        {"h1": 4},
        "",
        "1",
    ),
    "conv relu": Case(
        lambda: conv_net(nn.ReLU), (2, 6, 10), {"h1": 4, "h2": 3, "h3": 5}, "", "123"
    ),
    "conv tanh without biases": Case(
        lambda: conv_net(nn.Tanh, False),
        (2, 6, 10),
        {"h1": 4, "h2": 3, "h3": 5},
        "23",
    ),
    "conv sine": Case(
        lambda: sequence(
            nn.Conv2d(1, 3, 3), Sine(2.0), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)
        ),
        (1, 6, 6),
        {"h1": 3},
        "1",
        "",
        "1",
    ),
    "conv 1d, a norm and functions": Case(
        lambda: Net(
            lambda n, x: n.c(n.norm(F.max_pool1d(torch.relu(n.a(x)), 2).flatten(1))),
            a=nn.Conv1d(2, 4, 3),
            norm=nn.LayerNorm(12),
            c=nn.Linear(12, 2),
        ),
        (2, 8),
        {"h1": 4},
        "1",
        "1",
    ),
    "conv 3d": Case(
        lambda: Net(
            lambda n, x: n.b(F.avg_pool3d(torch.tanh(n.a(x)), 2).reshape(x.shape[0], -1)),
            a=nn.Conv3d(1, 3, 2),
            b=nn.Linear(6, 2),
        ),
        (1, 3, 3, 5),
        {"h1": 3},
        "1",
    ),
    "separable tanh": Case(lambda: separable(nn.Tanh), (2, 4, 5), {"h1": 4, "h2": 3}, "12"),
    "separable relu without biases": Case(
        lambda: separable(nn.ReLU, False),
        (2, 4, 5),
        {"h1": 4, "h2": 3},
        "",
        "12",
    ),
    "depthwise first": Case(
        lambda: sequence(
            nn.Conv1d(3, 3, 2, groups=3),
            nn.Conv1d(3, 4, 2),
            nn.Tanh(),
            nn.AdaptiveMaxPool1d(1),
            nn.Flatten(),
            nn.Linear(4, 1),
        ),
        (3, 6),
        {"h1": 4},
    ),
    "global average": Case(
        lambda: Net(
            global_average, a=nn.Conv2d(1, 3, 2), b=nn.Conv2d(3, 4, 2), out=nn.Linear(4, 2)
        ),
        (1, 5, 4),
        {"h1": 3, "h2": 4},
        "1",
        "2",
    ),
    "residual mlp": Case(
        lambda: residual_mlp(True, torch.relu, norm=False),
        (3,),
        {"h1": 6, "h2": 4},
        "1",
        "12",
    ),
    "residual mlp, norm before": Case(
        lambda: residual_mlp(True, torch.relu), (3,), {"h1": 6, "h2": 4}, "1", "12"
    ),
    "residual mlp, norm after": Case(
        lambda: residual_mlp(False, torch.tanh), (3,), {"h1": 6, "h2": 4}, "12", "1"
    ),
    "residual to the inputs": Case(
        lambda: Net(
            lambda n, x: n.out(x + n.b(torch.tanh(n.a(x)))),
            a=nn.Linear(3, 4),
            b=nn.Linear(4, 3),
            out=nn.Linear(3, 2),
        ),
        (3,),
        {"h1": 4},
        "1",
    ),
    "residual to the outputs": Case(
        lambda: Net(
            lambda n, x: n.out(x) + n.b(torch.tanh(n.a(x))),
            a=nn.Linear(3, 4),
            b=nn.Linear(4, 2),
            out=nn.Linear(3, 2),
        ),
        (3,),
        {"h1": 4},
        "1",
    ),
    "residual conv relu": Case(
        lambda: residual_convolutions(torch.relu),
        (1, 5, 4),
        {"h1": 4, "h2": 3, "h3": 6, "h4": 5},
        "",
        "1234",
    ),
    "residual conv tanh": Case(
        lambda: residual_convolutions(torch.tanh),
        (1, 5, 4),
        {"h1": 4, "h2": 3, "h3": 6, "h4": 5},
        "1234",
    ),
    "square residual relu": Case(lambda: square(torch.relu), (3,), {"h1": 5}, "", "1"),
    "square residual sine": Case(lambda: square(torch.sin), (3,), {"h1": 5}, "1", "", "1"),
    "a layer without its sine": Case(
        lambda: Net(
            lambda n, x: n.out(torch.sin(n.a(x)) + torch.tanh(n.b(x))),
            a=nn.Linear(3, 5),
            b=nn.Linear(3, 5),
            out=nn.Linear(5, 2),
        ),
        (3,),
        {"h1": 5},
        "1",
    ),
    "sine of a sum": Case(
        lambda: Net(
            lambda n, x: n.out(torch.sin(n.a(x) + n.b(x))),
            a=nn.Linear(3, 5),
            b=nn.Linear(3, 5, bias=False),
            out=nn.Linear(5, 2),
        ),
        (3,),
        {"h1": 5},
        "1",
    ),
    "norm before the function": Case(
        lambda: sequence(
            nn.Linear(3, 5),
            nn.LayerNorm(5),
            nn.Tanh(),
            nn.Linear(5, 4),
            nn.RMSNorm(4),
            nn.ReLU(),
            nn.Linear(4, 2),
        ),
        (3,),
        {"h1": 5, "h2": 4},
        "1",
        "2",
    ),
    "norm without weights": Case(
        lambda: sequence(
            nn.Linear(3, 5), nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 2)
        ),
        (3,),
        {"h1": 5},
    ),
    "norm of the inputs": Case(
        lambda: sequence(nn.LayerNorm(3), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
        (3,),
        {"h1": 5},
        "1",
    ),
    "norms over space": Case(
        lambda: sequence(
            nn.Conv2d(1, 4, 2),
            nn.LayerNorm((4, 3, 4)),
            nn.ReLU(),
            nn.Conv2d(4, 3, 2),
            nn.LayerNorm((2, 3)),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(18, 2),
        ),
        (1, 4, 5),
        {"h1": 4, "h2": 3},
        "",
        "1",
    ),
    "group norms": Case(
        lambda: sequence(
            nn.Conv2d(1, 4, 2),
            nn.GroupNorm(1, 4),
            nn.Tanh(),
            nn.Conv2d(4, 3, 2),
            nn.GroupNorm(3, 3),
            nn.ReLU(),
            nn.Conv2d(3, 5, 1),
            nn.InstanceNorm2d(5, affine=True),
            nn.Flatten(),
            nn.Linear(30, 2),
        ),
        (1, 4, 5),
        {"h1": 4, "h2": 3, "h3": 5},
        "13",
        "23",
    ),
    "late flatten": Case(
        lambda: sequence(
            nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4, 1), nn.Flatten()
        ),
        (3,),
        {"h1": 4},
        "1",
    ),
    "activations at both ends": Case(
        lambda: sequence(
            nn.Tanh(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Tanh(), nn.ReLU()
        ),
        (3,),
        {"h1": 4},
        "",
        "1",
    ),
    "squeezed output": Case(
        lambda: Net(
            lambda n, x: n.b(torch.tanh(n.a(x))).squeeze(-1),
            a=nn.Linear(3, 4),
            b=nn.Linear(4, 1),
        ),
        (3,),
        {"h1": 4},
        "1",
    ),
}


@pytest.fixture(params=ZOO, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return ZOO[request.param]


def points(
    spec: WeightSpec, n: int, dtype: torch.dtype = torch.float64, seed: int = 1
) -> Tensor:
    return 0.7 * torch.randn(
        n, spec.dim, generator=generator(seed), dtype=torch.float64
    ).to(dtype)


def outputs(case: Case, net: nn.Module, spec: WeightSpec, theta: Tensor) -> Tensor:
    """Evaluate the module itself at each weight vector, ``(batch, dim) -> (batch, n, out)``."""
    x = torch.randn(4, *case.inputs, generator=generator(9), dtype=torch.float64).to(theta)
    return torch.vmap(lambda params: torch.func.functional_call(net, params, (x,)))(
        spec.unflatten(theta)
    )


def changes(expected: Tensor, found: Tensor) -> Tensor:
    """The largest change of each network's outputs, relative to their size where that is above
    one.
    """
    size = expected.abs().flatten(1).amax(1).clamp(min=1)
    return (found - expected).abs().flatten(1).amax(1) / size


def elements(
    spec: WeightSpec, label: str, n: int, seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """Random elements of every kind for one label, none of them neutral."""
    shape, g = (n, spec.widths[label]), generator(seed)
    signs = torch.where(torch.rand(shape, generator=g) < 0.5, -1.0, 1.0)
    signs[:, 0], signs[:, 1] = -1, 1
    return {
        "permutation": {label: torch.arange(shape[1]).roll(1).expand(shape)},
        "sign": {label: signs},
        "scale": {label: 0.5 + 1.5 * torch.rand(shape, generator=g, dtype=torch.float64)},
        "phase": {
            label: torch.randint(-2, 3, shape, generator=g).index_fill(
                1, torch.tensor([0]), 1
            )
        },
    }


ACTIONS = {
    "permutation": WeightSpec.permute,
    "sign": WeightSpec.flip,
    "scale": WeightSpec.rescale,
    "phase": WeightSpec.shift,
}


# ---------------------------------------- labels and claims


def test_labels_and_symmetries_are_those_of_the_network(case: Case) -> None:
    spec = WeightSpec.of(built(case.make))
    assert spec.widths == case.widths
    # the order of depth
    assert list(spec.activations) == sorted(case.widths, key=lambda label: int(label[1:]))
    assert spec.symmetries() == group_of(case)
    log_order = sum(math.lgamma(n + 1) for n in case.widths.values())
    log_order += math.log(2) * sum(spec.widths[label] for label in group_of(case).sign)
    assert spec.log_group_order == pytest.approx(log_order)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
def test_random_symmetries_leave_outputs_unchanged(
    case: Case, dtype: torch.dtype, tolerance: float
) -> None:
    net = built(case.make).to(dtype)
    spec = WeightSpec.of(net)
    theta = points(spec, 40, dtype)
    moved = spec.random_symmetry(theta, seed=3)
    # few elements are the identity
    assert ((moved - theta).abs().amax(-1) > 1e-2).double().mean() > 0.9
    found = changes(outputs(case, net, spec, theta), outputs(case, net, spec, moved))
    assert found.max() <= tolerance


def test_every_claimed_kind_alone_leaves_outputs_unchanged(case: Case) -> None:
    net = built(case.make).double()
    spec = WeightSpec.of(net)
    theta = points(spec, 8)
    expected = outputs(case, net, spec, theta)
    for kind, labels in spec.symmetries()._asdict().items():
        for label in labels:
            moved = ACTIONS[kind](spec, theta, elements(spec, label, 8)[kind])
            assert ((moved - theta).abs().amax(-1) > 1e-2).all()
            assert changes(expected, outputs(case, net, spec, moved)).max() <= 1e-10, (
                kind,
                label,
            )


def test_what_is_not_claimed_would_change_outputs(case: Case) -> None:
    net = built(case.make).double()
    spec = WeightSpec.of(net)
    theta = points(spec, 8)
    expected, group = outputs(case, net, spec, theta), spec.symmetries()
    for label in spec.widths:
        for kind in ("sign", "scale"):
            if label not in getattr(group, kind):
                moved = theta * spec.factors(theta, elements(spec, label, 8)[kind])
                acts = any(
                    label == own and power
                    for name in spec.names
                    for own, power in scale_exponents(spec, name)
                )
                assert acts == (not torch.equal(moved, theta))
                if acts:
                    assert (
                        changes(expected, outputs(case, net, spec, moved)).max() > 1e-4
                    ), (
                        kind,
                        label,
                    )


def scale_exponents(spec: WeightSpec, name: str) -> list[tuple[str | None, int]]:
    return list(zip(spec.unit_axes(name)[1], spec.scale_exponents(name), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in ZOO
        if "sine" in name and not ZOO[name].phase and name != "sine of a sum"
    ],
)
def test_phases_that_are_not_claimed_would_change_outputs(name: str) -> None:
    case = ZOO[name]
    net = built(case.make).double()
    spec = WeightSpec.of(net)
    theta = points(spec, 8)
    for label in spec.widths:
        turns = elements(spec, label, 8)["phase"][label]
        moved = spec.unflatten(
            theta * spec.factors(theta, {label: 1 - 2 * (turns % 2)}, written=False)
        )
        for tensor in spec.names:
            if spec.axes[tensor] == (label,):
                moved[tensor] = moved[tensor] + math.pi * turns.double()
        found = outputs(case, net, spec, spec.flatten(moved))
        assert changes(outputs(case, net, spec, theta), found).max() > 1e-4


def test_every_label_is_one_set_of_units(case: Case) -> None:
    """Permuting only one of the tensors that share a label changes the outputs."""
    net = built(case.make).double()
    spec = WeightSpec.of(net)
    theta = points(spec, 8)
    expected = outputs(case, net, spec, theta)
    for label in spec.widths:
        moved = spec.unflatten(spec.permute(theta, elements(spec, label, 8)["permutation"]))
        for name in spec.names:
            other = spec.flatten(spec.unflatten(theta) | {name: moved[name] + 1})
            # biases before norms may not
            matters = changes(expected, outputs(case, net, spec, other)).max() > 1e-4
            if label in spec.axes[name] and matters:
                partly = spec.flatten(spec.unflatten(theta) | {name: moved[name]})
                assert changes(expected, outputs(case, net, spec, partly)).max() > 1e-4, (
                    label,
                    name,
                )


def test_actions_compose_and_invert(case: Case) -> None:
    spec, g = WeightSpec.of(built(case.make)), generator(5)
    theta, group = points(spec, 3), spec.symmetries()
    first, second = (
        {k: torch.rand(3, n, generator=g).argsort(-1) for k, n in spec.widths.items()}
        for _ in range(2)
    )
    both = {label: first[label].gather(-1, second[label]) for label in first}
    assert torch.equal(
        spec.permute(spec.permute(theta, first), second), spec.permute(theta, both)
    )
    inverse = {label: perm.argsort(-1) for label, perm in first.items()}
    assert torch.equal(spec.permute(spec.permute(theta, first), inverse), theta)
    pairs = {kind: [{}, {}] for kind in ("sign", "scale", "phase")}
    for kind, pair in pairs.items():
        for label in getattr(group, kind):
            for seed in (0, 1):
                pair[seed] |= elements(spec, label, 3, seed)[kind]
    for kind, (one, two) in pairs.items():
        act = ACTIONS[kind]
        product = {k: one[k] + two[k] if kind == "phase" else one[k] * two[k] for k in one}
        back = {k: -one[k] if kind == "phase" else 1 / one[k] for k in one}
        torch.testing.assert_close(
            act(spec, act(spec, theta, one), two), act(spec, theta, product)
        )
        torch.testing.assert_close(act(spec, act(spec, theta, one), back), theta)


def test_permutations_move_whole_units(case: Case) -> None:
    """Brute force: every axis of every tensor, block by block."""
    spec = WeightSpec.of(built(case.make))
    theta, g = points(spec, 1)[0], generator(6)
    perms = {
        label: torch.rand(n, generator=g).argsort(-1) for label, n in spec.widths.items()
    }
    moved = spec.unflatten(spec.permute(theta, perms))
    for name, tensor in spec.unflatten(theta).items():
        for axis, label in enumerate(spec.axes[name]):
            if label is not None:
                blocks = tensor.chunk(spec.widths[label], axis)
                tensor = torch.cat([blocks[i] for i in perms[label]], axis)
        assert torch.equal(moved[name], tensor)


def test_elements_may_be_batched(case: Case) -> None:
    spec = WeightSpec.of(built(case.make))
    theta = points(spec, 4)
    for kind, labels in spec.symmetries()._asdict().items():
        for label in labels:
            batch = elements(spec, label, 4)[kind]
            moved = ACTIONS[kind](spec, theta, batch)
            for i in range(4):
                torch.testing.assert_close(
                    moved[i], ACTIONS[kind](spec, theta[i], {label: batch[label][i]})
                )
            torch.testing.assert_close(
                moved[:1], ACTIONS[kind](spec, theta[0], {label: batch[label]})[:1]
            )


def test_descriptions_come_back(case: Case) -> None:
    spec = WeightSpec.of(built(case.make)).extend({"noise": (1,)})
    rebuilt = WeightSpec.from_description(json.loads(json.dumps(spec.describe())))
    assert rebuilt == spec
    assert list(rebuilt.activations) == list(spec.activations)
    assert rebuilt.symmetries() == spec.symmetries()
    assert torch.equal(
        rebuilt.random_symmetry(points(spec, 2), 0),
        spec.random_symmetry(points(spec, 2), 0),
    )


def test_descriptions_from_before_neutral_axes_are_read() -> None:
    spec = WeightSpec.of(built(ZOO["mlp tanh"].make))
    values = spec.describe()
    del values["neutral"]
    assert WeightSpec.from_description(values) == spec


def test_only_chains_have_layers() -> None:
    chains = {name for name, case in ZOO.items() if WeightSpec.of(built(case.make)).layers}
    assert chains == {name for name in ZOO if name.startswith("mlp ") and "tokens" not in name} | {
        "functional siren", "flattened image",
    }  # fmt: skip


def test_numbers_before_a_sine_are_its_frequency() -> None:
    case = ZOO["functional siren"]
    net = built(case.make).double()
    spec = WeightSpec.of(net)
    assert [layer.activation.name for layer in spec.layers] == [
        "sin:2.0",
        "sin:3.0",
        "identity",
    ]
    theta, x = (
        points(spec, 3),
        torch.randn(4, 3, generator=generator(9), dtype=torch.float64),
    )
    torch.testing.assert_close(
        ChainNetwork(spec)(theta, x), outputs(case, net, spec, theta)
    )


def test_axes_and_neutral_axes_by_example() -> None:
    spec = WeightSpec.of(built(ZOO["separable tanh"].make))
    assert spec.axes["2.weight"] == ("h1", None, None, None)
    assert spec.axes["8.weight"] == (None, "h2")
    assert spec.unit_axes("8.weight") == ((2, 3, 4), (None, "h2", None))
    assert spec.scale_exponents("8.weight") == (0, -1, 0)
    assert spec.scale_free_axes == {("2.weight", 0)}
    spec = WeightSpec.of(built(ZOO["norm before the function"].make))
    assert spec.scale_free_axes == {
        ("0.weight", 0),
        ("0.bias", 0),
        ("3.weight", 0),
        ("3.bias", 0),
    }
    assert spec.activations == {"h1": Activation("tanh"), "h2": Activation("relu")}
    spec = WeightSpec.of(built(ZOO["square residual relu"].make))
    assert spec.axes["a.weight"] == ("h1", "h1")
    assert spec.scale_exponents("a.weight") == (1, -1)


def test_groups_without_phases_draw_what_they_always_did() -> None:
    spec = WeightSpec.of(built(ZOO["mlp sine"].make))
    theta, g = points(spec, 3), generator(7)
    group = spec.symmetries()._replace(phase=frozenset())
    perms, signs = {}, {}
    for label, n in spec.widths.items():
        perms[label] = torch.rand(3, n, generator=g).argsort(-1)
    for label, n in spec.widths.items():
        signs[label] = torch.where(torch.rand(3, n, generator=g) < 0.5, -1.0, 1.0)
    assert torch.equal(
        spec.transform(group, 7, theta)[0], spec.flip(spec.permute(theta, perms), signs)
    )


def test_phases_need_a_sine_and_one_bias() -> None:
    spec = WeightSpec.of(built(ZOO["mlp tanh"].make))
    with pytest.raises(ValueError, match="tanh, which has no phase symmetry"):
        spec.shift(points(spec, 1), {"h1": torch.ones(5, dtype=torch.long)})


# ---------------------------------------- priors


def log_prior(spec: WeightSpec, prior: priors.Prior, theta: Tensor) -> Tensor:
    params, total = (
        spec.unflatten(theta),
        torch.zeros(theta.shape[:-1], dtype=torch.float64),
    )
    for name, distribution in prior.distributions(spec).items():
        total = total + distribution.log_prob(params[name]).reshape(len(theta), -1).sum(-1)
    return total


STANDARD = Normal(0.0, 1.0)
UNEVEN = torch.tensor([1.0, 1.0, 2.0, 3.0, 1.0, 1.0])
PRIORS = {  # network, prior, labels whose permutations it keeps, labels whose signs it keeps
    "normal": ("conv tanh without biases", priors.Normal(0.7), "123", "23"),
    "fan-in": ("conv tanh without biases", priors.FanIn(1.5), "123", "23"),
    "fan-in, residual": ("residual conv tanh", priors.FanIn(1.5), "1234", "1234"),
    "fan-in, square": ("square residual sine", priors.FanIn(1.5), "1", "1"),
    "shifted": ("residual conv tanh", priors.Normal(0.7, 0.1), "1234", ""),
    "shifted norm": (
        "norm before the function",
        priors.PerTensor({"1.weight": Normal(1.0, 0.5)}, STANDARD),
        "12",
        "",
    ),
    "shifted before a norm": (
        "norm before the function",
        priors.PerTensor({"0.weight": Normal(1.0, 0.5)}, STANDARD),
        "12",
        "1",
    ),
    "shifted depthwise kernel": (
        "separable tanh",
        priors.PerTensor({"2.weight": Normal(1.0, 0.5)}, STANDARD),
        "12",
        "12",
    ),
    "same for every block": (
        "conv tanh without biases",
        priors.PerTensor(
            {"7.weight": Normal(0.0, torch.tensor([1.0, 2.0]).repeat(3))}, STANDARD
        ),
        "123",
        "23",
    ),
    "other for one block": (
        "conv tanh without biases",
        priors.PerTensor({"7.weight": Normal(0.0, UNEVEN)}, STANDARD),
        "13",
        "23",
    ),
    "other for one channel": (
        "residual conv tanh",
        priors.PerTensor(
            {"b.weight": Normal(0.0, UNEVEN[:4].reshape(4, 1, 1, 1))}, STANDARD
        ),
        "234",
        "1234",
    ),
    "other on the diagonal": (
        "square residual sine",
        priors.PerTensor({"a.weight": Normal(0.0, 1.0 + torch.eye(5))}, STANDARD),
        "1",
        "1",
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_which_symmetries_keep_which_prior(name: str) -> None:
    network, prior, permutation, sign = PRIORS[name]
    spec = WeightSpec.of(built(ZOO[network].make))
    group = prior.symmetries(spec)
    assert group == Symmetries(
        frozenset(f"h{i}" for i in permutation),
        frozenset(f"h{i}" for i in sign),
        frozenset(),
        frozenset(),
    )
    theta = points(spec, 5)
    density = log_prior(spec, prior, theta)
    moved = spec.random_symmetry(theta, 2, group)
    assert not torch.equal(moved, theta)
    torch.testing.assert_close(
        log_prior(spec, prior, moved), density, rtol=1e-10, atol=1e-10
    )
    for label in set(spec.widths) - group.permutation:
        moved = spec.permute(theta, elements(spec, label, 5)["permutation"])
        assert (log_prior(spec, prior, moved) - density).abs().min() > 1e-4
    for label in spec.symmetries().sign - group.sign:
        moved = spec.flip(theta, elements(spec, label, 5)["sign"])
        assert (log_prior(spec, prior, moved) - density).abs().max() > 1e-4


# ---------------------------------------- what cannot be labelled


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gain


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.gain)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x + y)


def two(forward: Callable[..., Any], b: nn.Module | None = None) -> Callable[[], nn.Module]:
    return lambda: Net(
        forward, a=nn.Linear(3, 4), b=b or nn.Linear(4, 4), c=nn.Linear(4, 2)
    )


def conv(forward: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Net(
        forward, a=nn.Conv2d(1, 4, 2), b=nn.Conv2d(4, 4, 1), c=nn.Linear(4, 2)
    )


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (
        lambda: sequence(
            nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 1)
        ),
        r"'1' \(BatchNorm2d\): its running statistics",
    ),
    "tracked instance norm": (
        lambda: sequence(
            nn.Conv1d(1, 4, 2), nn.InstanceNorm1d(4, track_running_stats=True)
        ),
        r"'1' \(InstanceNorm1d\)",
    ),
    "group norm": (
        lambda: sequence(nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4)),
        r"'1' \(GroupNorm\)",
    ),
    "group norm of unknown rank": (
        lambda: sequence(nn.Linear(1, 4), nn.GroupNorm(1, 4)),
        r"'1' \(GroupNorm\)",
    ),
    "norm over tokens": (
        lambda: sequence(nn.Linear(3, 4), nn.LayerNorm((2, 4))),
        r"'1' \(LayerNorm\)",
    ),
    "norm over part": (
        lambda: sequence(nn.Conv1d(1, 4, 2), nn.LayerNorm((2, 4, 3))),
        r"'1' \(LayerNorm\): it treats units",
    ),
    "groups": (
        lambda: sequence(nn.Conv1d(2, 4, 2), nn.Conv1d(4, 4, 1, groups=2)),
        r"'1' \(Conv1d\): its groups",
    ),
    "multiplier": (
        lambda: sequence(nn.Conv1d(2, 4, 2), nn.Conv1d(4, 8, 1, groups=4)),
        r"'1' \(Conv1d\): its groups",
    ),
    "transposed": (
        lambda: sequence(nn.ConvTranspose1d(2, 4, 2, groups=2)),
        r"'0' \(ConvTranspose1d\)",
    ),
    "own convolution": (
        lambda: sequence(type("Own", (nn.Conv1d,), {})(1, 2, 1)),
        r"cannot label",
    ),
    "recurrent": (lambda: sequence(nn.GRU(2, 3)), r"'0' \(GRU\)"),
    "attention": (
        lambda: Net(lambda n, x: n.a(x, x, x)[0], a=nn.MultiheadAttention(2, 1)),
        r"'a' \(MultiheadAttention\)",
    ),
    "linear over space": (
        lambda: sequence(nn.Conv1d(1, 4, 2), nn.Linear(4, 2)),
        r"'1' \(Linear\): it does not read along",
    ),
    "convolution over units": (
        lambda: sequence(nn.Linear(3, 4), nn.Conv1d(1, 4, 2)),
        r"'1' \(Conv1d\): it does not read along",
    ),
    "pooling over units": (
        lambda: sequence(nn.Linear(3, 4), nn.MaxPool1d(2)),
        r"'1' \(MaxPool1d\)",
    ),
    "power pooling": (
        lambda: sequence(nn.Conv1d(1, 4, 2), nn.LPPool1d(2, 2)),
        r"'1' \(LPPool1d\)",
    ),
    "flattened tokens": (
        lambda: sequence(nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 4)),
        r"'2' \(Linear\): it does not read along",
    ),
    "mean over units": (two(lambda n, x: n.b(n.a(x)).mean(-1)), "'mean'"),
    "mean of all": (two(lambda n, x: n.b(n.a(x)).mean()), "'mean'"),
    "mean over channels": (conv(lambda n, x: n.a(x).mean(1)), "'mean'"),
    "mean over rows": (conv(lambda n, x: n.a(x).mean(0)), "'mean'"),
    "flattened rows": (conv(lambda n, x: n.a(x).flatten(0, 1)), "'flatten'"),
    "view": (conv(lambda n, x: n.a(x).view(x.shape[1], -1)), "'view'"),
    "permuted rows": (conv(lambda n, x: n.a(x).permute(1, 0, 2, 3)), "'permute'"),
    "units behind positions": (
        conv(lambda n, x: n.c(n.b(n.a(x)).permute(0, 2, 3, 1).flatten(1))),
        r"'c' \(Linear\): it does not read along",
    ),
    "positions of units": (two(lambda n, x: n.c(n.b(n.a(x))[:, 1:])), "'getitem'"),
    "units cut across": (
        lambda: sequence(
            nn.Linear(3, 12),
            nn.Unflatten(1, (2, 2, 3)),
            nn.Conv2d(2, 2, 1),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.LayerNorm(2),
            nn.Unflatten(1, (1, 2)),
            nn.Conv1d(1, 1, 1),
        ),
        "cannot label",
    ),
    "pooled before it is counted": (
        lambda: sequence(
            nn.Linear(3, 24),
            nn.Unflatten(1, (4, 2, 3)),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 2),
        ),
        "blocks that no tensor counts",
    ),
    "parameter of the inputs": (
        lambda: Gain(),
        "'gain'",
    ),
    "sum with a number": (two(lambda n, x: n.b(n.a(x) + 1)), "'add'"),
    "sum of other units": (
        two(lambda n, x: n.a(x) + n.b(n.a(x))),
        "used twice",
    ),
    "sum over channels": (conv(lambda n, x: n.b(n.a(x)) + n.c(x)), "'add'"),
    "product of units": (two(lambda n, x: n.c(torch.sigmoid(n.b(n.a(x))) * x)), "'mul'"),
    "inverse": (two(lambda n, x: n.c(1 / n.b(n.a(x)))), "'truediv'"),
    "power": (two(lambda n, x: n.c(n.b(n.a(x)) ** 2)), "'pow'"),
    "concatenation": (two(lambda n, x: n.c(torch.cat([n.a(x), x], -1))), "'cat'"),
    "part of the units": (two(lambda n, x: n.c(n.b(n.a(x))[:, :2])), "'getitem'"),
    "functional norm": (
        two(lambda n, x: n.c(F.layer_norm(n.b(n.a(x)), (4,)))),
        "'layer_norm'",
    ),
    "functional dropout": (two(lambda n, x: n.c(F.dropout(n.b(n.a(x)), 0.1))), "'dropout'"),
    "free parameter": (Scaled, "'gain'"),
    "two inputs": (TwoInputs, "one tensor"),
    "no tensor": (lambda: Net(lambda n, x: x.shape, a=nn.Linear(1, 1)), "one tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_labelled_is_named(name: str) -> None:
    make, message = REFUSED[name]
    net = built(make)
    with pytest.raises(ValueError, match=message):
        WeightSpec.of(net)


# ---------------------------------------- models


def model_of(name: str, prior: priors.Prior) -> bf.BayesianModel:
    case = ZOO[name]
    x = torch.randn(12, *case.inputs, generator=generator(2), dtype=torch.float64)
    y = torch.randn(12, 2, generator=generator(3), dtype=torch.float64)
    return bf.BayesianModel(built(case.make).double(), prior, likelihoods.Gaussian(), x, y)


@pytest.mark.parametrize(
    "name", ["conv relu", "residual conv tanh", "separable tanh", "square residual sine"]
)
def test_posterior_densities_have_the_symmetries(name: str) -> None:
    model = model_of(name, priors.FanIn(1.3))
    assert model.symmetries() == Source(model.flat_prior).symmetries(model)
    assert model.symmetries().permutation == set(ZOO[name].widths)
    theta = model.sample_prior(6, 0)
    moved = model.spec.random_symmetry(theta, 1, model.symmetries())
    torch.testing.assert_close(
        model.log_joint(moved), model.log_joint(theta), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        model.outputs(moved), model.outputs(theta), rtol=1e-9, atol=1e-9
    )
    gradient = model.log_joint_and_grad(theta)[1]
    again = model.spec.random_symmetry(
        gradient, 1, model.symmetries()
    )  # permutations and signs move gradients as weights
    torch.testing.assert_close(
        model.log_joint_and_grad(moved)[1], again, rtol=1e-7, atol=1e-7
    )


def test_a_convolutional_network_is_sampled_and_summarised() -> None:
    model = model_of("conv relu", priors.FanIn(1.3))
    draws = bf.sample(
        model, bf.HMC(max_leapfrog=4), chains=2, warmup=10, draws=5, seed=0, progress=False
    )
    assert draws.theta.shape == (2, 5, model.dim)
    assert bf.predict(model, draws, model.x).mean.shape == (12, 2)
    with pytest.raises(ValueError, match="perceptron"):
        bf.sample(model, bf.MCDropout(), draws=2, seed=0, progress=False)
