"""Laws of the manifold of normalised networks, and of flows on it: closed forms, invariances,
agreement of routes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import WeightSpec
from bnnflow.activations import Activation
from bnnflow.symmetry import Spheres, normalise_scale
from bnnflow.transport import Density, Field, Flow, Solver, WeightsVelocity
from bnnflow.transport.divergence import exact_divergence
from bnnflow.transport.geometry import RiemannianPath, TangentVelocity
from bnnflow.transport.manifold import CompletedFlow, ManifoldFlow, Radii, fit_manifold_flow
from bnnflow.transport.solvers import integrate
from bnnflow.weights import Symmetries
from tests.problems import F64, built, chain, generator, normal, one_in


class Residual(nn.Module):
    """A stream of units that a block reads and writes back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read = nn.Linear(3, 4), nn.Linear(4, 5)
        self.write, self.last = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        return self.last(stream + self.write(torch.relu(self.read(stream))))


NETS: dict[str, Callable[[], nn.Module]] = {
    "one hidden": lambda: chain(2, 3, 1),
    "two hidden": lambda: chain(3, 4, 5, 2),
    "leaky, no biases": lambda: chain(
        3, 4, 2, activation=lambda: nn.LeakyReLU(0.2), bias=False
    ),
    "mixed": lambda: nn.Sequential(
        chain(3, 4), nn.ReLU(), chain(4, 5), nn.Tanh(), chain(5, 2)
    ),
    "residual": Residual,
    "tanh": lambda: chain(3, 4, 2, activation=nn.Tanh),
}


def spheres_of(name: str) -> Spheres:
    return Spheres(WeightSpec.of(built(NETS[name])).extend({"noise": (1,)}))


def sphere(k: int) -> Spheres:
    """The unit sphere in k dimensions, and nothing else."""
    spec = WeightSpec(
        ("0.weight",),
        {"0.weight": (1, k)},
        {"0.weight": ("h1", None)},
        {"h1": Activation("relu")},
    )
    return Spheres(spec)


def pairs(
    spheres: Spheres, n: int, seed: int, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor]:
    """Draw pairs, of which three eighths are equal, opposite or close to that, at all distances."""
    x, y = spheres.sample(n, seed, dtype=dtype), spheres.sample(n, seed + 1, dtype=dtype)
    eighth = n // 8
    y[:eighth] = x[:eighth]
    y[eighth : 2 * eighth] = -x[eighth : 2 * eighth]
    close = 10 ** (
        -12 * torch.rand(2 * eighth, 1, generator=generator(seed + 2), dtype=dtype)
    )
    sign = torch.where(torch.arange(2 * eighth) % 2 == 0, 1.0, -1.0).to(dtype).unsqueeze(-1)
    near = slice(2 * eighth, 4 * eighth)
    y[near] = spheres.retract(
        sign * x[near] + close * normal(2 * eighth, spheres.dim, seed=seed + 3, dtype=dtype)
    )
    return x, y


def norms(spheres: Spheres, x: Tensor) -> Tensor:
    return spheres.inner(x, x)[..., :-1].sqrt()


def outputs(net: nn.Module, spheres: Spheres, theta: Tensor, inputs: Tensor) -> Tensor:
    return torch.func.functional_call(net, spheres.spec.unflatten(theta), (inputs,))


@pytest.fixture(params=NETS)
def spheres(request: pytest.FixtureRequest) -> Spheres:
    return spheres_of(request.param)


# ---------------------------------------- the manifold


def test_points_keep_the_functions_of_networks() -> None:
    for name, make in NETS.items():
        net = built(make)
        spheres = Spheres(WeightSpec.of(net))
        theta, inputs = (
            normal(20, spheres.dim),
            normal(7, next(net.parameters()).shape[1], seed=1),
        )
        x = spheres.project(theta)
        for before, after in zip(theta, x, strict=True):
            outputs = [
                torch.func.functional_call(net, spheres.spec.unflatten(row), (inputs,))
                for row in (before, after)
            ]
            torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
        assert torch.equal(x, normalise_scale(theta, spheres.spec)), name
        torch.testing.assert_close(
            norms(spheres, x), torch.ones(20, spheres.units, dtype=F64)
        )
        torch.testing.assert_close(spheres.project(x), x)
        torch.testing.assert_close(spheres.retract(x), x)


def test_units_are_the_spheres() -> None:
    spheres = Spheres(WeightSpec.of(built(NETS["mixed"])))
    assert (spheres.units, spheres.dim_manifold) == (4, spheres.dim - 4)
    assert spheres.sizes.tolist() == [4] * 4
    flat = spheres.owner == spheres.units
    assert flat[spheres.spec.slices["2.0.weight"]].all()
    params = spheres.spec.unflatten(spheres.owner)
    assert params["0.0.weight"].tolist() == [[i] * 3 for i in range(4)]
    assert params["0.0.bias"].tolist() == [0, 1, 2, 3]
    residual = spheres_of("residual")
    written_back = residual.spec.unflatten(residual.owner)["write.weight"]
    # would lose its norm when its readers are normalised
    assert (written_back == residual.units).all()


def test_dead_units_get_a_point_and_stay_dead() -> None:
    net = built(NETS["two hidden"])
    spheres = Spheres(WeightSpec.of(net))
    theta = normal(3, spheres.dim)
    params = {name: value.clone() for name, value in spheres.spec.unflatten(theta).items()}
    params["0.weight"][1:, :3], params["0.bias"][1:, :3] = 0.0, 0.0  # three units are dead,
    # and one that reads nothing but them
    params["2.weight"][2, 1, 3], params["2.bias"][2, 1] = 0.0, 0.0
    theta = spheres.spec.flatten(params).requires_grad_()
    x = spheres.project(theta)
    torch.testing.assert_close(norms(spheres, x), torch.ones(3, spheres.units, dtype=F64))
    inputs = normal(7, 3, seed=1)
    for before, after in zip(theta, x, strict=True):
        torch.testing.assert_close(
            *(outputs(net, spheres, row, inputs) for row in (before, after))
        )
    (grad,) = torch.autograd.grad(x.sum(), theta)
    assert grad.isfinite().all()


def test_points_that_do_not_exist_are_refused() -> None:
    residual = spheres_of("residual")
    with pytest.raises(ValueError, match="no incoming weights"):
        residual.project(torch.zeros(residual.dim, dtype=F64))
    with pytest.raises(ValueError, match="one incoming weight"):
        Spheres(WeightSpec.of(built(lambda: chain(1, 4, 2, bias=False))))
    with pytest.raises(ValueError, match="axis of length"):
        residual.project(torch.zeros(3))


def test_a_network_without_scales_is_flat() -> None:
    flat = spheres_of("tanh")
    x, y, t = (
        normal(5, flat.dim),
        normal(5, flat.dim, seed=1),
        torch.rand(5, generator=generator(), dtype=F64),
    )
    assert flat.dim_manifold == flat.dim
    torch.testing.assert_close(flat.exp(x, y), x + y)
    torch.testing.assert_close(flat.log(x, y), y - x)
    point, velocity = flat.geodesic(x, y, t)
    torch.testing.assert_close(point, torch.lerp(x, y, t.unsqueeze(-1)))
    torch.testing.assert_close(velocity, y - x)
    torch.testing.assert_close(
        flat.log_prob(x), torch.distributions.Normal(0, 1).log_prob(x).sum(-1)
    )


# ---------------------------------------- maps


def test_no_nan_in_many_pairs() -> None:
    spheres = Spheres(WeightSpec.of(built(lambda: chain(2, 2, 1))))
    n = 10_000  # at once, so that all stays in the cache
    weight = 1.0 + torch.arange(spheres.dim)
    for seed, dtype in enumerate([torch.float32, F64] * 10):
        x, y = (each.requires_grad_() for each in pairs(spheres, n, 10 * seed, dtype))
        t = torch.rand(n, generator=generator(seed), dtype=dtype)
        v = spheres.log(x, y)
        point, velocity = spheres.geodesic(x, y, t)
        rate = spheres.log_velocity(x, t.unsqueeze(-1) * v, velocity)
        values = [v, spheres.exp(x, v), point, velocity, rate, v.norm(dim=-1)]
        assert all(bool(value.isfinite().all()) for value in values)
        total = (
            sum((value * value).sum() for value in values[:-1])
            + (v * weight).sum()
            + values[-1].sum()
        )
        assert all(
            bool(grad.isfinite().all()) for grad in torch.autograd.grad(total, (x, y))
        )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (F64, 1e-13)])
def test_exp_undoes_log(dtype: torch.dtype, bound: float, spheres: Spheres) -> None:
    x, y = pairs(spheres, 800, 5, dtype)
    v = spheres.log(x, y)
    end = spheres.exp(x, v)
    assert (end - y).abs().max() < bound
    assert ((norms(spheres, end) - 1).abs() < bound).all()
    assert (spheres.inner(x, v).abs() < bound).all()
    assert (norms(spheres, v) < math.pi + bound).all()
    assert (v[:100].abs() < bound).all()  # equal points


def test_distances_are_angles(spheres: Spheres) -> None:
    x, y = spheres.sample(50, 0, dtype=F64), spheres.sample(50, 1, dtype=F64)
    flat = spheres.owner == spheres.units
    squares = spheres.inner(x, y)[..., :-1].acos().square().sum(-1) + (y - x)[
        :, flat
    ].square().sum(-1)
    torch.testing.assert_close(spheres.distance(x, y), squares.sqrt())
    torch.testing.assert_close(spheres.distance(x, y), spheres.distance(y, x))
    opposite = torch.where(flat, x, -x)
    far = torch.full((50,), math.pi * spheres.units**0.5, dtype=F64)
    torch.testing.assert_close(spheres.distance(x, opposite), far)
    assert torch.equal(spheres.log(x, opposite), spheres.log(x, opposite))


def test_geodesics_have_constant_speed(spheres: Spheres) -> None:
    x0, x1 = spheres.sample(20, 0, dtype=F64), spheres.sample(20, 1, dtype=F64)
    path, gen = RiemannianPath(spheres), generator()
    for t in torch.linspace(0, 1, 7, dtype=F64):
        times, h = t.expand(20), 1e-5
        point, velocity = path.point(x0, x1, times, gen)
        assert ((norms(spheres, point) - 1).abs() < 1e-12).all()
        assert (spheres.inner(point, velocity).abs() < 1e-12).all()
        torch.testing.assert_close(velocity.norm(dim=-1), spheres.distance(x0, x1))
        torch.testing.assert_close(
            spheres.distance(x0, point), t * spheres.distance(x0, x1), rtol=1e-7, atol=1e-9
        )
        torch.testing.assert_close(
            (1 - t) * velocity, spheres.log(point, x1), rtol=1e-7, atol=1e-9
        )
        after, before = (spheres.geodesic(x0, x1, times + step)[0] for step in (h, -h))
        torch.testing.assert_close(
            (after - before) / (2 * h), velocity, rtol=1e-7, atol=1e-8
        )
    torch.testing.assert_close(path.point(x0, x1, torch.ones(20, dtype=F64), gen)[0], x1)


@pytest.mark.parametrize("length", [1e-9, 0.1, 1.0, 0.8 * math.pi])
def test_velocities_in_normal_coordinates(spheres: Spheres, length: float) -> None:
    x, v = spheres.sample(20, 0, dtype=F64), normal(20, spheres.dim, seed=1)
    w = spheres.tangent(x, normal(20, spheres.dim, seed=2))
    w = (
        length
        * w
        / spheres.each(
            torch.where(spheres.inner(w, w) > 0, spheres.inner(w, w), 1.0)
        ).sqrt()
    )
    y = spheres.exp(x, w)
    v, h = spheres.tangent(y, v), 1e-5
    expected = (
        spheres.log(x, spheres.exp(y, h * v)) - spheres.log(x, spheres.exp(y, -h * v))
    ) / (2 * h)
    torch.testing.assert_close(
        spheres.log_velocity(x, w, v), expected, rtol=1e-6, atol=1e-7
    )


def test_permutations_are_isometries(spheres: Spheres) -> None:
    spec, n = spheres.spec, 40
    group = Symmetries(spec.symmetries().permutation, frozenset(), frozenset())
    x, y, v, t = (
        spheres.sample(n, 0, dtype=F64),
        spheres.sample(n, 1, dtype=F64),
        normal(n, spec.dim),
        torch.rand(n, generator=generator(), dtype=F64),
    )
    moved_x, moved_y, moved_v = spec.transform(group, 3, x, y, v)
    assert not torch.equal(moved_x, x)

    def maps(x: Tensor, y: Tensor, v: Tensor) -> list[Tensor]:
        v = spheres.tangent(x, v)
        return [
            v,
            spheres.exp(x, v),
            spheres.log(x, y),
            spheres.log_velocity(x, v, y),
            *spheres.geodesic(x, y, t),
        ]

    for expected, got in zip(
        spec.transform(group, 3, *maps(x, y, v)),
        maps(moved_x, moved_y, moved_v),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(spheres.distance(moved_x, moved_y), spheres.distance(x, y))
    torch.testing.assert_close(spheres.log_prob(moved_x), spheres.log_prob(x))
    torch.testing.assert_close(
        spheres.project(moved_v), spec.transform(group, 3, spheres.project(v))[0]
    )


def test_the_source_is_uniform() -> None:
    n, spheres = 100_000, spheres_of("one hidden")
    x = spheres.sample(n, 0, dtype=F64)
    unit = x[:, spheres.owner == 0]  # a sphere of two dimensions
    flat = x[:, spheres.owner == spheres.units]
    for values, mean in [
        *((unit[:, i], 0.0) for i in range(3)),
        *((unit[:, i] ** 2, 1 / 3) for i in range(3)),
        *((unit[:, i] ** 4, 1 / 5) for i in range(3)),
        (unit[:, 0] * unit[:, 1], 0.0),
        ((unit[:, 2].abs() < 0.3).double(), 0.3),  # Archimedes: heights are uniform
        (flat[:, 0] ** 2, 1.0),
        (flat[:, 0] * unit[:, 0], 0.0),
    ]:
        assert abs(float(values.mean()) - mean) < 4.5 * float(values.std()) / n**0.5
    assert torch.equal(x, spheres.sample(n, 0, dtype=F64))
    spherical = 3 * math.log(4 * math.pi)
    expected = torch.distributions.Normal(0, 1).log_prob(flat.double()).sum(-1) - spherical
    torch.testing.assert_close(spheres.log_prob(x), expected)
    assert float(sphere(2).log_prob(torch.tensor([1.0, 0.0]))) == pytest.approx(
        -math.log(2 * math.pi)
    )


# ---------------------------------------- flows


class Towards(Field):
    """The gradient of rate * x[0]: a conformal flow, which takes the uniform law to a closed
    form.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate: Tensor
        self.register_buffer("rate", torch.tensor(rate, dtype=F64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return F.one_hot(torch.zeros(len(x), dtype=torch.long), x.shape[-1]) * self.rate


def spherical_cauchy(x: Tensor, rate: float) -> Tensor:
    """What `Towards` makes of the uniform law: a Poisson kernel to the power k - 1 (Kato and
    McCullagh 2020).
    """
    k, rho = x.shape[-1], math.tanh(rate / 2)
    area = math.log(2) + k / 2 * math.log(math.pi) - math.lgamma(k / 2)
    return (k - 1) * ((1 - rho**2) / (1 + rho**2 - 2 * rho * x[..., 0])).log() - area


class VonMisesFisher(Field):
    """A field on the sphere in three dimensions from the uniform law to von Mises-Fisher, around
    the first axis.

    At time t the law is that of concentration a = t * kappa. Heights z = x[0] move by - dG/dt / g,
    with G the distribution function expm1(a (z + 1)) / expm1(2 a) and g its density, and points
    along their meridians.
    """

    def __init__(self, kappa: float) -> None:
        super().__init__()
        self.kappa: Tensor
        self.register_buffer("kappa", torch.tensor(kappa, dtype=F64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        z, a = x[:, 0], (self.kappa * t).clamp(min=1e-4)
        up, all_ = a * (z + 1), 2 * a
        by_a = (
            (z + 1) * up.exp() - 2 * all_.exp() * torch.expm1(up) / torch.expm1(all_)
        ) / torch.expm1(all_)
        density = a * up.exp() / torch.expm1(all_)
        lift = -self.kappa * by_a / density / (1 - z * z).clamp(min=1e-12)
        axis = torch.eye(3, dtype=F64)[0]
        return lift.unsqueeze(-1) * (axis - z.unsqueeze(-1) * x)

    def log_prob(self, x: Tensor) -> Tensor:
        kappa = self.kappa
        return kappa * x[..., 0] + (kappa / (4 * math.pi * kappa.sinh())).log()


def randomised(velocity: Field, scale: float = 0.1) -> Field:
    """Give every parameter a random value: a zero head would hide what the network does."""
    for seed, parameter in enumerate(velocity.parameters()):
        parameter.data.add_(scale * normal(*parameter.shape, seed=seed).to(parameter))
    return velocity.requires_grad_(False)


def network_flow(name: str = "two hidden", solver: Solver = Solver()) -> ManifoldFlow:
    spec = WeightSpec.of(built(NETS[name]))
    velocity = randomised(built(lambda: TangentVelocity(spec, width=8, depth=1)))
    return ManifoldFlow(velocity.eval(), Spheres(spec), solver)


class Wavy(Field):
    """A smooth field on a sphere that depends on time and has no symmetry."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.first: Tensor
        self.register_buffer("first", 0.6 * normal(k, k))
        self.register_buffer("second", normal(k, k, seed=1))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first + torch.cos(3 * t)) @ self.second


@pytest.mark.parametrize("k", [2, 3, 6])
def test_density_of_a_conformal_flow(k: int) -> None:
    flow = ManifoldFlow(Towards(1.5), sphere(k), Solver("rk4", 28))
    x, log_prob = flow.sample_with_log_prob(200, 0)
    torch.testing.assert_close(log_prob, spherical_cauchy(x, 1.5), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        flow.log_prob(x), spherical_cauchy(x, 1.5), rtol=0, atol=1e-6
    )


def test_density_of_von_mises_and_fisher() -> None:
    kappa, velocity = 4.0, VonMisesFisher(4.0)
    flow = ManifoldFlow(velocity, sphere(3), Solver("rk4", 40))
    x, log_prob = flow.sample_with_log_prob(200, 0)
    torch.testing.assert_close(log_prob, velocity.log_prob(x), rtol=0, atol=1e-5)
    uniform = sphere(3).sample(200, 1, dtype=F64)
    torch.testing.assert_close(
        flow.log_prob(uniform), velocity.log_prob(uniform), rtol=0, atol=1e-5
    )
    heights = flow.sample(20_000, 2, solver=Solver(steps=8))[:, 0]
    mean = 1 / math.tanh(kappa) - 1 / kappa
    assert abs(float(heights.mean()) - mean) < 4 * float(heights.std()) / 20_000**0.5


def quadrature(latitudes: int = 40, meridians: int = 64) -> tuple[Tensor, Tensor]:
    """Return points of the unit sphere in three dimensions, and their weights."""
    nodes, weights = (
        torch.tensor(each, dtype=F64) for each in np.polynomial.legendre.leggauss(latitudes)
    )
    angle = 2 * math.pi * torch.arange(meridians, dtype=F64) / meridians
    ring = (1 - nodes * nodes).sqrt().unsqueeze(-1)
    x = torch.stack(
        [ring * angle.cos(), ring * angle.sin(), nodes.unsqueeze(-1).expand(-1, meridians)],
        -1,
    )
    return x.reshape(-1, 3), (weights * 2 * math.pi / meridians).repeat_interleave(
        meridians
    )


def test_densities_integrate_to_one() -> None:
    flow = ManifoldFlow(Wavy(3), sphere(3), Solver("rk4", 24))
    x, weights = quadrature()
    density = flow.log_prob(x).exp()
    assert density.max() > 4 * density.min()
    assert float((density * weights).sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_divergences_of_closed_form_fields(k: int) -> None:
    """The gradients of linear and quadratic functions, whose Laplacians on the sphere are known."""
    spheres, a, b = sphere(k), normal(k), normal(k, k, seed=1)
    x = spheres.sample(30, 2, dtype=F64)
    symmetric = b + b.T

    class Gradient(Field):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return a + x @ symmetric

    _, change = ManifoldFlow(Gradient(), spheres).transport(
        x, torch.tensor([0, 1e-6], dtype=F64), Solver("euler"), Density()
    )
    form = torch.einsum("ni,ij,nj->n", x, symmetric, x)
    expected = -(k - 1) * x @ a + symmetric.trace() - k * form
    torch.testing.assert_close(change / 1e-6, expected)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the Jacobian of each row, (n, dim, dim)."""
    return torch.func.jacrev(lambda z: function(z).sum(0))(x).movedim(0, 1)


@pytest.mark.parametrize("name", ["one hidden", "residual"])
def test_densities_agree_with_the_jacobian_of_the_flow(name: str) -> None:
    """Volumes spanned by the images of tangent bases, whatever the divergence says."""
    flow = network_flow(name, Solver("rk4", 10))
    spheres = flow.spheres
    x0 = flow.start(2, 0)
    x1, change = flow.transport(x0, flow.times(), density=Density())
    jacobian = by_rows(lambda x: flow.transport(x, flow.times())[0], x0)

    def basis(x: Tensor) -> Tensor:
        """An orthonormal basis of the tangent space, (dim, dim_manifold)."""
        normals = torch.nn.functional.one_hot(spheres.owner)[
            :, : spheres.units
        ] * x.unsqueeze(-1)
        return torch.linalg.qr(normals, mode="complete")[0][:, spheres.units :]

    for start, end, matrix, divergence in zip(x0, x1, jacobian, change, strict=True):
        volume = torch.linalg.slogdet(basis(end).T @ matrix @ basis(start))[1]
        torch.testing.assert_close(volume, divergence, rtol=0, atol=1e-3)
    assert change.abs().max() > 0.1
    _, log_prob = flow.sample_with_log_prob(2, 0)
    torch.testing.assert_close(log_prob, spheres.log_prob(x0) - change)


def test_divergence_agrees_with_finite_differences() -> None:
    flow = network_flow()
    spheres, t, h = flow.spheres, torch.tensor(0.3, dtype=F64), 1e-5
    x = flow.start(3, 0)

    def extended(z: Tensor) -> Tensor:
        z = spheres.retract(z)
        return spheres.tangent(z, flow.velocity(t, z))

    basis = h * torch.eye(flow.dim, dtype=F64)
    differences = [
        (extended(x + row) - extended(x - row))[:, i] / (2 * h)
        for i, row in enumerate(basis)
    ]
    torch.testing.assert_close(
        exact_divergence(extended, x)[1], torch.stack(differences).sum(0), rtol=0, atol=1e-6
    )
    _, change = flow.transport(x, torch.stack([t, t + 1e-6]), Solver("euler"), Density())
    torch.testing.assert_close(
        change / 1e-6, torch.stack(differences).sum(0), rtol=0, atol=1e-5
    )


def test_forward_and_reverse_agree() -> None:
    flow = network_flow("one hidden", Solver("rk4"))
    gaps = []
    for steps in (10, 20):
        x, forward = flow.sample_with_log_prob(5, 0, solver=Solver("rk4", steps))
        gaps.append((flow.log_prob(x, solver=Solver("rk4", steps)) - forward).abs().max())
    assert gaps[1] < 1e-3
    assert gaps[1] < gaps[0] / 8
    assert torch.equal(flow.sample(5, 0, solver=Solver("rk4", 20)), x)
    assert flow.log_prob(x.reshape(5, 1, -1), solver=Solver(steps=1)).shape == (5, 1)


@pytest.mark.parametrize(
    ("trace", "probes", "noise"),
    [
        ("hutchinson", 1, "rademacher"),
        ("hutchinson", 1, "gaussian"),
        ("hutch++", 3, "gaussian"),
    ],
)
def test_estimated_densities_are_unbiased(trace, probes: int, noise) -> None:
    flow = network_flow(solver=Solver(steps=3))
    x = flow.start(2, 0)
    truth = flow.log_prob(x)
    density = Density(trace, probes, noise)
    estimates = flow.log_prob(
        x[0].expand(400, -1), seed=1, density=density, chunk_size=1000
    )
    assert abs(float(estimates.mean() - truth[0])) < 4 * float(estimates.std()) / 20
    assert torch.equal(
        estimates,
        flow.log_prob(x[0].expand(400, -1), seed=1, density=density, chunk_size=1000),
    )
    many = flow.log_prob(
        x[0].expand(50, -1), seed=1, density=replace(density, probes=16 * probes)
    )
    assert many.std() < 0.5 * estimates.std()


@functools.cache
def wavy_ends(solver: Any, steps: int) -> tuple[Tensor, Tensor]:
    grid = torch.linspace(0, 1, steps + 1, dtype=F64)
    flow = ManifoldFlow(Wavy(4), sphere(4), Solver(solver))
    return flow.transport(sphere(4).sample(8, 0, dtype=F64), grid, density=Density())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_solvers_keep_their_order_on_the_manifold(solver, order: int) -> None:
    truth, errors = wavy_ends("rk4", 100), []
    for steps in (16, 32):
        ends = wavy_ends(solver, steps)
        assert ((norms(sphere(4), ends[0]) - 1).abs() < 1e-14).all()
        errors.append(
            [float((end - true).norm()) for end, true in zip(ends, truth, strict=True)]
        )
    for coarse, fine in zip(*errors, strict=True):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.4)


def test_adaptive_solvers_serve_too() -> None:
    spheres, grid = sphere(4), torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    flow, x0 = (
        ManifoldFlow(Wavy(4), spheres, Solver("dopri5")),
        spheres.sample(2, 0, dtype=F64),
    )
    found = flow.transport(x0, grid, density=Density())
    expected = flow.transport(
        x0, torch.linspace(0, 1, 33, dtype=F64), Solver("rk4"), Density()
    )
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)


def test_flows_along_geodesics_take_one_step() -> None:
    spheres = spheres_of("two hidden")
    x0, x1 = spheres.sample(30, 0, dtype=F64), spheres.sample(30, 1, dtype=F64)

    class ToEnds(Field):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return spheres.log(x, x1) / (1 - t)

    for solver in ("euler", "midpoint"):
        end, _ = ManifoldFlow(ToEnds(), spheres, Solver(solver)).transport(
            x0, torch.tensor([0.0, 1.0], dtype=F64)
        )
        torch.testing.assert_close(end, x1)


@pytest.mark.parametrize("name", ["two hidden", "residual"])
def test_flows_commute_with_permutations(name: str) -> None:
    flow = network_flow(name)
    group = flow.velocity.symmetries
    x = flow.start(10, 0)
    (moved,) = flow.spec.transform(group, 1, x)
    field = flow.velocity(torch.tensor(0.4), x)
    assert (field.abs().amax(-1) > 1e-3).all()
    assert (flow.spheres.inner(x, field).abs() < 1e-12).all()
    torch.testing.assert_close(
        flow.velocity(torch.tensor(0.4), moved), flow.spec.transform(group, 1, field)[0]
    )
    end, change = flow.transport(x, flow.times(), density=Density())
    moved_end, moved_change = flow.transport(moved, flow.times(), density=Density())
    torch.testing.assert_close(moved_end, flow.spec.transform(group, 1, end)[0])
    torch.testing.assert_close(moved_change, change)


def test_on_flat_space_it_is_the_ordinary_flow() -> None:
    flow = network_flow("tanh")
    x0 = flow.start(5, 0)
    x1, change = flow.transport(x0, flow.times(), density=Density())

    def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return exact_divergence(lambda z: flow.velocity(t, z), state[0])

    expected = integrate(
        slope, (x0, torch.zeros(5, dtype=F64)), flow.times(), flow.solver.rule
    )
    torch.testing.assert_close(x1, expected[0])
    torch.testing.assert_close(change, expected[1])


def test_a_field_trained_on_draws_has_their_density() -> None:
    kappa = 3.0
    truth = VonMisesFisher(kappa)
    path = RiemannianPath(sphere(3))
    targets = ManifoldFlow(truth, sphere(3), Solver("rk4", 10)).sample(10_000, 0).float()

    class Perceptron(Field):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3)
            )

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.net(torch.cat([t.expand(len(x)).to(x).unsqueeze(-1), x], -1))

    field, gen, steps = built(Perceptron, torch.float32), generator(1), 500
    optimiser = torch.optim.Adam(field.parameters(), 5e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        x1 = targets[torch.randint(len(targets), (256,), generator=gen)]
        t = torch.rand(256, generator=gen)
        x, velocity = path.point(path.spheres.sample(256, gen), x1, t, gen)
        optimiser.zero_grad()
        (path.spheres.tangent(x, field(t, x)) - velocity).square().sum(-1).mean().backward()
        optimiser.step()
    flow = ManifoldFlow(field.double().requires_grad_(False), sphere(3), Solver("rk4", 8))
    x, log_prob = flow.sample_with_log_prob(1000, 2)
    divergence = float((log_prob - truth.log_prob(x)).mean())
    assert abs(divergence) < 0.02
    assert float((log_prob - truth.log_prob(x)).std()) < 0.15
    # what no training would leave
    assert float((flow.spheres.log_prob(x) - truth.log_prob(x)).mean()) < -0.5


def test_fitted_flows_reach_their_targets(tmp_path: Path) -> None:
    """Copies of three networks at all scales, permuted: what comes out is one of the three,
    normalised.
    """
    spec = WeightSpec.of(built(lambda: chain(2, 2, 1)))
    modes = normal(3, spec.dim, seed=4).float()
    draws = spec.random_symmetry(modes.repeat(50, 1), 0)
    training = bf.Training(steps=200, batch_size=64, learning_rate=5e-3)
    velocity = built(lambda: TangentVelocity(spec, 16, 2), torch.float32)
    flow = fit_manifold_flow(
        spec, draws, velocity=velocity, seed=1, training=training, progress=False
    )
    assert flow.info["coupling"] == "Independent"
    assert flow.info["steps"] == 200
    flat = flow.spheres.owner == flow.spheres.units

    def gaps(x: Tensor) -> Tensor:
        """Distances from the nearest of all copies."""
        copies = spec.permute(
            flow.spheres.project(modes), {"h1": torch.tensor([[[0, 1]], [[1, 0]]])}
        ).reshape(-1, spec.dim)
        return flow.spheres.distance(x.unsqueeze(1), copies).amin(1)

    assert gaps(flow.sample(200, 2)).median() < 0.35 * gaps(flow.start(200, 2)).median()
    assert flow.sample(5)[:, flat].isfinite().all()
    short = replace(training, steps=5)
    first, again = (
        fit_manifold_flow(
            spec, draws, velocity=velocity, seed=1, training=short, progress=False
        )
        for _ in range(2)
    )
    assert torch.equal(again.sample(5), first.sample(5))
    assert torch.equal(
        ManifoldFlow.load(flow.save(tmp_path / "flow")).sample(5), flow.sample(5)
    )
    weighted = fit_manifold_flow(
        spec,
        (draws, torch.linspace(-9.0, 0.0, len(draws))),
        velocity=velocity,
        training=short,
    )
    assert weighted.sample(3).isfinite().all()
    for bad in (draws[:0], torch.nan * draws):
        with pytest.raises(ValueError, match="finite draws"):
            fit_manifold_flow(spec, bad)


def test_nan_is_an_error() -> None:
    class Broken(Field):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.where(t > 0.5, torch.nan, x)

    with pytest.raises(FloatingPointError, match="NaN between t = 0"):
        ManifoldFlow(Broken(), sphere(3)).sample(3)


def test_densities_are_of_points_on_the_manifold_only() -> None:
    flow = network_flow()
    with pytest.raises(ValueError, match="on the manifold"):
        flow.log_prob(2 * flow.start(3))
    with pytest.raises(ValueError, match="on the manifold"):
        flow.log_prob(torch.zeros(flow.dim, dtype=F64))
    with pytest.raises(ValueError, match="trace must be"):
        flow.log_prob(flow.start(3), density=Density(trace="none"))  # type: ignore[arg-type]
    # which is what a correction of weights asks for
    assert not hasattr(flow, "forward_with_log_prob")


def plain_flow() -> Flow:
    net, x = built(NETS["two hidden"]), normal(6, 3)
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.5), x, normal(6, 2, seed=1)
    )
    return Flow.of(
        randomised(built(lambda: WeightsVelocity(model.spec, 8, 1))),
        model,
        solver=Solver(steps=3),
    )


def completed_flow() -> CompletedFlow:
    flow = network_flow(solver=Solver(steps=3))
    return flow.complete(normal(200, flow.dim, seed=7))


BOTH_WAYS = (
    "sample_with_log_prob",
    "forward_with_log_prob",
    "inverse_with_log_prob",
    "log_prob",
)
DENSITIES = {
    "flow": (plain_flow, BOTH_WAYS),
    "manifold": (
        lambda: network_flow(solver=Solver(steps=3)),
        ("sample_with_log_prob", "log_prob"),
    ),
    "completed": (completed_flow, BOTH_WAYS),
}


@pytest.mark.filterwarnings("ignore:log densities of")  # three steps are few
@pytest.mark.parametrize(
    ("kind", "method"),
    one_in(2, [(kind, method) for kind, (_, all_) in DENSITIES.items() for method in all_]),
)
def test_every_option_reaches_every_density(kind: str, method: str) -> None:
    flow = DENSITIES[kind][0]()
    draws = method == "sample_with_log_prob"
    given = 2 if draws else flow.start(1, 0).expand(2, -1)

    def log_prob(**options: Any) -> Tensor:
        found = getattr(flow, method)(given, **options)
        return found[1] if isinstance(found, tuple) else found

    options = {
        "density": Density("hutchinson", 3, "gaussian"),
        "solver": Solver("midpoint", 3),
        "seed": 0,
        "chunk_size": 9,
    }
    found = log_prob(**options)
    assert torch.equal(found, log_prob(**options))
    others = [
        ("density", Density("hutch++", 3, "gaussian")),
        ("density", Density("hutchinson", 4, "gaussian")),
        ("density", Density("hutchinson", 3, "rademacher")),
        ("solver", Solver("euler", 3)),
        ("solver", Solver("midpoint", 2)),
        ("solver", Solver("midpoint", [0.0, 0.5, 1.0])),
        ("seed", 1),
        ("chunk_size", 1),
    ]
    for name, value in others:
        changed = log_prob(**(options | {name: value}))
        assert not torch.equal(changed, found), name
        # the same point in two chunks gets other probes
        assert draws or changed[0] != changed[1]
    defaults = {"density": Density(), "seed": 0, "solver": None, "chunk_size": 512}
    assert torch.equal(log_prob(), log_prob(**defaults))
    with pytest.raises(TypeError, match="'probe'"):
        log_prob(probe=3)


# ---------------------------------------- densities over weights


def still(spec: WeightSpec) -> ManifoldFlow:
    """The flow of an untrained field, which is zero."""
    velocity = built(lambda: TangentVelocity(spec, width=8, depth=1)).requires_grad_(False)
    return ManifoldFlow(velocity, Spheres(spec), Solver("euler", 1))


def test_directions_and_radii_make_a_gaussian() -> None:
    """Of what enters the units, that is.

    What the units send out is read at the scale that they had.
    """
    spec = WeightSpec.of(built(NETS["two hidden"]))
    zero = torch.zeros(9, dtype=F64)
    flow = CompletedFlow(still(spec), Radii(zero, zero + 1))
    theta = normal(40, spec.dim, seed=3)
    params = spec.unflatten(theta)

    def norm(layer: int) -> Tensor:
        return torch.cat(
            [params[f"{layer}.weight"], params[f"{layer}.bias"].unsqueeze(-1)], -1
        ).norm(dim=-1)

    r1 = norm(0)
    scaled = params["2.weight"] * r1.unsqueeze(-2)
    r2 = torch.cat([scaled, params["2.bias"].unsqueeze(-1)], -1).norm(dim=-1)
    params |= {"2.weight": scaled, "4.weight": params["4.weight"] * r2.unsqueeze(-2)}
    expected = torch.distributions.Normal(0, 1).log_prob(spec.flatten(params)).sum(-1)
    # each is read by as many weights
    expected = expected + 5 * r1.log().sum(-1) + 2 * r2.log().sum(-1)
    torch.testing.assert_close(flow.log_prob(theta), expected)
    drawn = spec.unflatten(flow.sample(20_000, 0))
    assert drawn["0.weight"].var() == pytest.approx(1, abs=0.02)


def test_radii_are_those_of_the_weights() -> None:
    spec = WeightSpec.of(built(NETS["two hidden"]))
    spheres = Spheres(spec)
    theta = normal(4000, spec.dim)
    own = Radii.fit(theta, spheres)
    torch.testing.assert_close(
        own.location[:4], torch.zeros(4, dtype=F64), rtol=0, atol=0.05
    )
    torch.testing.assert_close(own.scale[:4], torch.ones(4, dtype=F64), rtol=0, atol=0.05)
    tripled = Radii.fit(spec.rescale(theta, {"h1": torch.full((4,), 3.0)}), spheres)
    torch.testing.assert_close(tripled.location[:4], own.location[:4] + math.log(3))
    torch.testing.assert_close(tripled.location[4:], own.location[4:])
    torch.testing.assert_close(tripled.scale, own.scale)
    for bad in (theta[0], theta[:1], spheres.project(theta), torch.nan * theta):
        with pytest.raises(ValueError, match="radii"):
            Radii.fit(bad, spheres)


@pytest.mark.parametrize("name", ["two hidden", "mixed", "residual"])
def test_densities_over_weights_agree_with_the_jacobian(name: str) -> None:
    """Of directions that stay where they are: the law of those that move is tested above."""
    spec = WeightSpec.of(built(NETS[name]))
    flow = still(spec).complete(normal(200, spec.dim, seed=7))
    z = flow.start(3, 0)
    theta, log_prob = flow.forward_with_log_prob(z)
    expected = (
        torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
        - torch.linalg.slogdet(by_rows(flow.forward, z))[1]
    )
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(flow.log_prob(theta), expected)


def test_completed_flows_can_be_inverted() -> None:
    spec = WeightSpec.of(built(NETS["one hidden"]))
    flow = network_flow("one hidden", Solver("rk4", 8)).complete(
        normal(200, spec.dim, seed=7)
    )
    z = flow.start(3, 0)
    theta, log_prob = flow.forward_with_log_prob(z)
    torch.testing.assert_close(flow.forward(z), theta)
    back, reverse = flow.inverse_with_log_prob(theta)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-3)
    torch.testing.assert_close(reverse, log_prob, rtol=0, atol=1e-2)
    # another network of the same point
    doubled = spec.rescale(theta, {"h1": torch.full((3,), 2.0)})
    torch.testing.assert_close(
        flow.flow.spheres.project(doubled), flow.flow.spheres.project(theta)
    )
    assert (flow.log_prob(doubled) - reverse).abs().min() > 0.1


def test_completed_flows_are_posteriors() -> None:
    flow = network_flow(solver=Solver(steps=3)).complete(
        normal(200, WeightSpec.of(built(NETS["two hidden"])).dim, seed=7)
    )
    theta, log_prob = flow.sample_with_log_prob(
        6, 1, density=Density(trace="hutchinson", probes=2)
    )
    coarse = flow.sample(
        6, 1, solver=Solver(steps=flow.flow.times(Solver(steps=2)).tolist())
    )
    torch.testing.assert_close(coarse, flow.sample(6, 1, solver=Solver(steps=2)))
    assert (coarse - theta).abs().max() > 1e-3
    assert theta.shape == (6, flow.dim)
    assert log_prob.dtype == F64
    torch.testing.assert_close(flow.sample(6, 1), theta)
    assert flow.log_prob(theta.reshape(2, 3, -1)).shape == (2, 3)
    points = flow.flow.spheres.project(theta)
    torch.testing.assert_close(
        points,
        flow.flow.transport(flow.flow.spheres.retract(flow.start(6, 1)), flow.flow.times())[
            0
        ],
    )
    (grad,) = torch.autograd.grad(
        flow.forward(x0 := flow.start(2).requires_grad_()).square().sum(), x0
    )
    assert (grad.abs() > 0).any(-1).all()


def test_corrections_need_the_radii() -> None:
    """The evidence of a small network by importance sampling from a completed flow, and from the
    prior.
    """
    x = torch.linspace(-1, 1, 4, dtype=F64).unsqueeze(-1)
    prior, likelihood = bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.5)
    model = bf.BayesianModel(built(lambda: chain(1, 2, 1)), prior, likelihood, x, x.sin())
    flow = still(model.spec)
    with pytest.raises(ValueError, match="completes the measure"):
        bf.correct(model, flow)
    from_prior = model.log_likelihood(model.sample_prior(200_000, 0)).exp()
    corrected = bf.correct(
        model,
        flow.complete(model.sample_prior(500, 1)),
        4000,
        "importance",
        seed=2,
        progress=False,
    )
    assert corrected.log_evidence is not None
    evidence, error = corrected.log_evidence
    truth, spread = float(from_prior.mean()), float(from_prior.std()) / 200_000**0.5
    assert abs(evidence - math.log(truth)) < 4 * math.hypot(error, spread / truth)
    assert error < 0.1
