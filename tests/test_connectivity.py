"""Laws of paths between networks: ends stay, spheres are kept, barriers agree with closed forms,
curves avoid them.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from bnnflow import WeightSpec
from bnnflow.model.network import ChainNetwork
from bnnflow.report import plots
from bnnflow.symmetry import (
    Curve,
    Geodesic,
    barrier,
    barrier_along,
    fit_curve,
    loss_plane,
    match,
)

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spec_of(*widths: int, activation=nn.ReLU) -> WeightSpec:
    with torch.random.fork_rng(devices=[]):
        modules: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            modules += [nn.Linear(n_in, n_out), activation()]
        return WeightSpec.of(nn.Sequential(*modules[:-1]))


def weights(spec: WeightSpec, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, spec.dim, generator=generator(seed), dtype=F64)


def outputs(spec: WeightSpec, theta: Tensor) -> Tensor:
    x = torch.randn(
        9, spec.shapes[spec.layers[0].weight][1], generator=generator(9), dtype=F64
    )
    network = ChainNetwork(spec.network)
    flat = theta[..., : spec.network.dim].reshape(-1, spec.network.dim)
    return network(flat, x).reshape(*theta.shape[:-1], 9, -1)


def ring(theta: Tensor) -> Tensor:
    """A loss whose minima are the unit circle."""
    return (theta.square().sum(-1) - 1).square()


# ---------------------------------------- barriers


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_barrier_of_a_quadratic_agrees_with_its_closed_form(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 6, 5, generator=generator(), dtype=dtype)
    apart = (a - b).square().sum(-1)
    hill = barrier(a, b, lambda theta: -theta.square().sum(-1), points=101)
    assert hill.losses.shape == (6, 101)
    assert hill.losses.dtype == hill.t.dtype == dtype
    torch.testing.assert_close(hill.midpoint, -((a + b) / 2).square().sum(-1))
    torch.testing.assert_close(hill.maximum, apart / 4)
    torch.testing.assert_close(hill.area, apart / 6, rtol=1e-3, atol=0)
    valley = barrier(a, b, lambda theta: theta.square().sum(-1))
    assert (valley.maximum == 0).all()
    assert (valley.area < 0).all()


def test_pairs_broadcast_and_do_not_mix() -> None:
    a, b = (
        torch.randn(3, 1, 4, generator=generator()),
        torch.randn(2, 4, generator=generator(1)),
    )
    both = barrier(a, b, ring)
    assert both.losses.shape == (3, 2, 25)
    torch.testing.assert_close(both.losses[2, 1], barrier(a[2, 0], b[1], ring).losses)


@pytest.mark.parametrize("points", [1, 2, 24])
def test_points_must_include_the_midpoint(points: int) -> None:
    with pytest.raises(ValueError, match="odd"):
        barrier(torch.zeros(2), torch.ones(2), ring, points=points)


def test_networks_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="do not pair"):
        barrier(torch.zeros(2, 3), torch.ones(3, 3), ring)


def test_alignment_removes_the_barrier_between_copies() -> None:
    spec = spec_of(3, 8, 8, 2)
    a = weights(spec, 10)
    (b,) = spec.transform(spec.symmetries()._replace(scale=frozenset()), 2, a)
    target = outputs(spec, a)

    def loss(theta: Tensor) -> Tensor:  # (pair, points, dim)
        return (outputs(spec, theta) - target[:, None]).square().mean((-1, -2))

    assert (barrier(a, b, loss).maximum > 0.1).all()
    assert (barrier(a, match(b, spec, a), loss).maximum < 1e-20).all()


# ---------------------------------------- curves


@pytest.mark.parametrize("kind", ["bezier", "chain"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_curves_keep_their_ends_and_weights_sum_to_one(kind, k: int) -> None:
    curve = Curve(torch.randn(4, k, 7, generator=generator(), dtype=F64), kind)
    t = torch.linspace(0, 1, 11, dtype=F64)
    path = curve.at(t)
    assert path.shape == (4, 11, 7)
    torch.testing.assert_close(path[:, 0], curve.control[:, 0])
    torch.testing.assert_close(path[:, -1], curve.control[:, -1])
    torch.testing.assert_close(curve.weights(t).sum(-1), torch.ones(11, dtype=F64))
    own = torch.rand(4, 3, generator=generator(1), dtype=F64)  # times of each pair's own
    torch.testing.assert_close(curve.at(own)[2], Curve(curve.control[2], kind).at(own[2]))


def test_curves_agree_with_their_formulas() -> None:
    a, bend, b = control = torch.randn(3, 7, generator=generator(), dtype=F64)
    t = torch.linspace(0, 1, 9, dtype=F64)[:, None]
    bezier = (1 - t) ** 2 * a + 2 * t * (1 - t) * bend + t**2 * b
    torch.testing.assert_close(Curve(control).at(t[:, 0]), bezier)
    chain = torch.where(t < 0.5, a + 2 * t * (bend - a), bend + (2 * t - 1) * (b - bend))
    torch.testing.assert_close(Curve(control, "chain").at(t[:, 0]), chain)


@pytest.mark.parametrize(
    ("kind", "bends"), [("bezier", 1), ("bezier", 3), ("chain", 1), ("chain", 3)]
)
def test_fitted_curves_go_around_the_barrier(kind, bends: int) -> None:
    angles = torch.tensor([[0.0, 2.0], [1.0, 3.5], [2.0, 4.2]])
    ends = torch.stack([angles.cos(), angles.sin()], -1)  # (pair, 2, 2)
    curve = fit_curve(
        ends[:, 0],
        ends[:, 1],
        ring,
        kind=kind,
        bends=bends,
        steps=200,
        learning_rate=0.05,
        seed=0,
    )
    assert curve.control.shape == (3, bends + 2, 2)
    assert torch.equal(curve.control[:, [0, -1]], ends)
    line, around = barrier(ends[:, 0], ends[:, 1], ring), barrier_along(curve, ring)
    assert (around.maximum < 0.35 * line.maximum).all()
    again = fit_curve(
        ends[:, 0],
        ends[:, 1],
        ring,
        kind=kind,
        bends=bends,
        steps=200,
        learning_rate=0.05,
        seed=0,
    )
    assert torch.equal(again.control, curve.control)


def test_one_pair_needs_no_batch() -> None:
    curve = fit_curve(
        torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), ring, steps=5, seed=0
    )
    assert curve.control.shape == (3, 2)
    assert curve.at(torch.tensor([0.5])).shape == (1, 2)


@pytest.mark.parametrize("option", ["bends", "steps", "samples"])
def test_counts_of_a_fit_must_be_positive(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        fit_curve(torch.zeros(2), torch.ones(2), ring, **{option: 0})


# ---------------------------------------- geodesics


def incoming(spec: WeightSpec, theta: Tensor, layer: int) -> Tensor:
    params = spec.unflatten(theta)
    each = spec.layers[layer]
    parts = [params[each.weight]] + ([params[each.bias].unsqueeze(-1)] if each.bias else [])
    return torch.cat(parts, -1)  # (..., width, fan in)


def test_geodesics_stay_on_the_spheres_at_constant_speed() -> None:
    spec = spec_of(3, 6, 5, 2).extend({"noise": (1,)})
    a, b = weights(spec, 4), weights(spec, 4, seed=2)
    path = Geodesic(a, b, spec)
    t = torch.linspace(0, 1, 9, dtype=F64)
    along = path.at(t)
    assert along.shape == (4, 9, spec.dim)
    torch.testing.assert_close(outputs(spec, along[:, 0]), outputs(spec, a))
    torch.testing.assert_close(outputs(spec, along[:, -1]), outputs(spec, b))
    for layer in (0, 1):
        units = incoming(spec, along, layer)
        torch.testing.assert_close(
            units.norm(dim=-1), torch.ones(4, 9, units.shape[-2], dtype=F64)
        )
        cosines = (units[:, 1:] * units[:, :-1]).sum(-1)
        torch.testing.assert_close(cosines, cosines[:, :1].expand_as(cosines))
    torch.testing.assert_close(along[..., -1], torch.lerp(a[:, -1:], b[:, -1:], t))


def test_geodesics_are_the_same_for_every_scale_of_their_ends() -> None:
    spec = spec_of(3, 6, 5, 2)
    a, b = weights(spec, 4), weights(spec, 4, seed=2)
    scales = spec.symmetries()._replace(permutation=frozenset())
    moved = Geodesic(spec.transform(scales, 1, a)[0], spec.transform(scales, 2, b)[0], spec)
    t = torch.linspace(0, 1, 5, dtype=F64)
    torch.testing.assert_close(moved.at(t), Geodesic(a, b, spec).at(t))


def test_units_without_a_great_circle_go_straight() -> None:
    spec = spec_of(3, 4, 1)
    a = weights(spec)
    dead, opposite = a.clone(), a.clone()
    params = spec.unflatten(dead)
    params["0.weight"][1], params["0.bias"][1] = 0.0, 0.0
    dead = spec.flatten(params)
    opposite[spec.slices["0.weight"]] *= -1
    opposite[spec.slices["0.bias"]] *= -1
    t = torch.linspace(0, 1, 5, dtype=F64)
    for end in (a, dead, opposite):
        along = Geodesic(a, end, spec).at(t)
        assert along.isfinite().all()
        torch.testing.assert_close(outputs(spec, along[-1]), outputs(spec, end))


def test_geodesics_need_a_scale_symmetry() -> None:
    spec = spec_of(3, 4, 1, activation=nn.Tanh)
    with pytest.raises(ValueError, match="scale symmetry"):
        Geodesic(weights(spec), weights(spec), spec)


# ---------------------------------------- planes and pictures


def test_plane_goes_through_three_networks() -> None:
    a, b, c = torch.randn(3, 6, generator=generator(), dtype=F64)
    plane = loss_plane(a, b, c, ring, points=21)
    torch.testing.assert_close(plane.frame @ plane.frame.mT, torch.eye(2, dtype=F64))
    torch.testing.assert_close(
        plane.origin + plane.networks @ plane.frame, torch.stack([a, b, c])
    )
    torch.testing.assert_close(plane.locate(torch.stack([a, b, c])), plane.networks)
    inside = plane.origin + torch.stack([plane.x[7], plane.y[3]]) @ plane.frame
    torch.testing.assert_close(plane.losses[3, 7], ring(inside))
    wide = loss_plane(a, b, c, ring, points=21, margin=1.0)
    for axis, narrow, here in (
        (wide.x, plane.x, plane.networks[:, 0]),
        (wide.y, plane.y, plane.networks[:, 1]),
    ):
        extent = float(here.max() - here.min())
        assert float(axis[-1] - axis[0]) == pytest.approx(3 * extent)
        assert float(narrow[-1] - narrow[0]) == pytest.approx(1.5 * extent)
    with pytest.raises(ValueError, match="one line"):
        loss_plane(a, b, (a + b) / 2, ring)


def test_pictures() -> None:
    angles = torch.tensor([0.0, 2.0])
    a, b = torch.stack([angles.cos(), angles.sin()], -1)
    curve = fit_curve(a, b, ring, steps=50, seed=0)
    barriers = {"line": barrier(a, b, ring), "curve": barrier_along(curve, ring)}
    ax = plots.barrier(barriers, y_label="energy").axes[0]
    assert len(ax.lines) == 2
    assert ax.get_ylabel() == "energy"
    with pytest.raises(ValueError, match="no barriers"):
        plots.barrier({})
    plane = loss_plane(a, b, curve.control[1], ring)
    picture = plots.loss_plane(plane, curve)
    assert {text.get_text() for text in picture.axes[0].texts} == {"A", "B", "bend"}
    assert math.isclose(picture.axes[0].get_aspect(), 1.0)


def test_networks_of_another_space_are_refused_by_name() -> None:
    theta = torch.randn(3, 5, generator=generator(), dtype=F64)
    square = lambda theta: theta.square().sum(-1)  # noqa: E731
    for other in (theta[0, :1], theta[:, :1], theta[0, 1:]):
        with pytest.raises(ValueError, match="do not pair"):
            barrier(theta[0], other, square)
    with pytest.raises(ValueError, match="theta_b holds weights that are NaN"):
        barrier(theta[0], theta[1] * float("nan"), square)
    with pytest.raises(TypeError, match="theta_a must hold floating-point"):
        fit_curve(theta[0].long(), theta[1], square, progress=False)
    with pytest.raises(ValueError, match="theta_c must be"):
        loss_plane(theta[0], theta[1], theta, square)
    with pytest.raises(ValueError, match="theta_b holds weights"):
        loss_plane(theta[0], theta[1] / 0, theta[2], square)
