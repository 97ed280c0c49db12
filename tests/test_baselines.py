"""Density baselines: conjugate posteriors recovered, densities that integrate to one, fair starts,
bad input.
"""

import itertools
import math
import time
from dataclasses import fields, replace

import pytest
import torch

import bnnflow as bf
from bnnflow import likelihoods
from bnnflow.transport import Flow
from bnnflow.transport.baselines import (
    TransformedDensity,
    fit_cnf,
    fit_coupling,
    fit_gaussian,
)
from tests.problems import conjugate, generator, linear, network, one_in

SHORT = bf.Training(steps=200, batch_size=128, learning_rate=1e-3, patience=8)
SMALL = {
    "cnf": {"width": 32, "solver_steps": 3},
    "coupling": {"couplings": 4, "hidden": 32},
}


def fit(kind: str, model: bf.BayesianModel, draws, **options):
    training = replace(
        SHORT,
        **{
            each.name: options.pop(each.name)
            for each in fields(SHORT)
            if each.name in options
        },
    )
    if kind == "gaussian":
        return fit_gaussian(model, draws, **options)
    method = {"cnf": fit_cnf, "coupling": fit_coupling}[kind]
    return method(model, draws, training=training, progress=False, **SMALL[kind] | options)


ALL = pytest.mark.parametrize("kind", ["gaussian", "coupling", "cnf"])
LEARNED = pytest.mark.parametrize("kind", ["coupling", "cnf"])


class _ScaledStudent:
    """Student-t weights of an inferred scale, for which torch has no inverse cdf."""

    def parameters(self, spec):
        return {"scale": torch.distributions.HalfNormal(1.0)}

    def conditional(self, spec, parameters):
        scale = parameters["scale"]  # (..., 1)
        ones = {name: (1,) * len(shape) for name, shape in spec.shapes.items()}
        lead = scale.shape[:-1]
        return {
            name: torch.distributions.StudentT(5.0, 0.0, scale.reshape(*lead, *one))
            for name, one in ones.items()
        }


def bananas(n: int, seed: int) -> torch.Tensor:
    first, second = torch.randn(2, n, generator=generator(seed), dtype=torch.float64)
    return torch.stack([first, 0.7 * (first * first - 1) + 0.3 * second], -1)


def banana_log_prob(theta: torch.Tensor) -> torch.Tensor:
    unit = torch.distributions.Normal(0.0, 1.0)
    second = (theta[:, 1] - 0.7 * (theta[:, 0].square() - 1)) / 0.3
    return unit.log_prob(theta[:, 0]) + unit.log_prob(second) - math.log(0.3)


# ---------------------------------------- closed forms


@ALL
def test_conjugate_posterior_is_recovered(kind):
    model, exact = conjugate().model, conjugate().posterior
    found = fit(kind, model, exact.sample(4000, 0), steps=75)
    unseen = exact.sample(2000, 1)
    divergences = exact.log_prob(unseen) - found.log_prob(unseen)
    drawn = found.sample(2000, 2)
    reverse = found.log_prob(drawn) - exact.log_prob(drawn)
    # A Gaussian with 14 fitted numbers from 3,600 draws is 14 / 2 / 3600 = 0.002 nats off.
    for difference in (divergences, reverse):
        assert difference.mean() < 0.02 + 4 * difference.std() / math.sqrt(2000)
        assert difference.mean() > -4 * difference.std() / math.sqrt(2000)
    z = (drawn.mean(0) - exact.loc) / (drawn.var(0) * (1 / 2000 + 1 / 3600)).sqrt()
    assert z.abs().max() < 4.5
    assert found.log_prob(unseen).dtype == torch.float64


@pytest.mark.parametrize("kind", one_in(2, ["coupling", "cnf"]))
def test_learned_density_leaves_the_gaussian_behind_on_a_banana(kind):
    model = linear(2)
    draws, unseen = bananas(5000, 1), bananas(1000, 2)
    gaussian = fit_gaussian(model, draws)
    found = fit(kind, model, draws, steps=200, learning_rate=8e-3)
    truth = banana_log_prob(unseen)
    assert (truth - gaussian.log_prob(unseen)).mean() > 0.8
    assert (truth - found.log_prob(unseen)).mean() < 0.15
    # The same density forwards and backwards, and one that integrates to one.
    grid = torch.cartesian_prod(
        torch.linspace(-5, 5, 40, dtype=torch.float64),
        torch.linspace(-4, 16, 80, dtype=torch.float64),
    )
    assert float(found.log_prob(grid).exp().sum()) * (10 / 39) * (20 / 79) == pytest.approx(
        1.0, abs=0.02
    )
    drawn = found.sample(1000, 3)
    assert (found.log_prob(drawn) - banana_log_prob(drawn)).median().abs() < 0.2
    if isinstance(found, Flow):  # it says the error of its solver, and that is small
        change = (
            (found.log_prob(unseen) - found.log_prob(unseen, solver=found.solver.finer()))
            .abs()
            .mean()
        )
        assert found.info["solver_error"] < 0.01
        assert change < 2 * found.info["solver_error"] + 1e-4


@ALL
def test_density_carries_the_jacobian_of_a_prior_that_is_not_normal(kind):
    laplace = torch.distributions.Laplace(
        torch.tensor(0.3).double(), torch.tensor(0.8).double()
    )
    model = linear(1, laplace)
    draws = 1 + 0.4 * torch.randn(1000, 1, generator=generator(4), dtype=torch.float64)
    found = fit(kind, model, draws, steps=50)
    grid = torch.linspace(-6, 8, 4001, dtype=torch.float64)
    density = found.log_prob(grid[:, None]).exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=2e-3)
    drawn = found.sample(4000, 1)
    mean = torch.trapezoid(density * grid, grid)
    assert abs(drawn.mean() - mean) < 4.5 * drawn.std() / math.sqrt(4000)


# ---------------------------------------- matching, weights, held-out draws


def test_matching_undoes_random_symmetries():
    model = network(width=4, dtype=torch.float32)
    centre = 1.5 * torch.randn(model.dim, generator=generator(5))
    cloud = centre + 0.1 * torch.randn(2000, model.dim, generator=generator(6))
    scrambled = model.spec.random_symmetry(cloud, 7, model.symmetries())
    assert not torch.allclose(cloud, scrambled)
    entropy = model.dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.1))
    matched, plain = (
        fit_gaussian(model, scrambled),
        fit_gaussian(model, scrambled, matched=False),
    )
    assert matched.info["held_out"] == pytest.approx(-entropy, abs=1.0)
    assert plain.info["held_out"] < -entropy - 10
    theta = matched.sample(500, 0)
    reference = bf.symmetry.align(model, cloud, reference=theta.mean(0))
    assert isinstance(reference, torch.Tensor)
    assert (theta.mean(0) - reference.mean(0)).abs().max() < 0.03


@pytest.mark.parametrize("kind", one_in(2, ["coupling", "cnf"]))
def test_early_stopping_never_ends_below_the_gaussian(kind):
    """30 draws in 17 dimensions: everything learned is noise, and the held-out draws know."""
    model = network(width=4, dtype=torch.float32)
    draws, held_out = (torch.randn(n, model.dim, generator=generator(n)) for n in (30, 400))
    gaussian = fit_gaussian(model, draws, matched=False, held_out=held_out)
    found = fit(
        kind,
        model,
        draws,
        matched=False,
        held_out=held_out,
        steps=1000,
        patience=2,
        learning_rate=1e-2,
    )
    assert found.info["held_out"] >= gaussian.info["held_out"] - 1e-4
    assert found.info["steps"] < 1000
    unseen = torch.randn(400, model.dim, generator=generator(9))
    assert found.log_prob(unseen).mean() > gaussian.log_prob(unseen).mean() - 0.5


@ALL
def test_held_out_likelihood_is_that_of_the_density_returned(kind):
    """30 draws again, and an end by the number of steps, long after the best state."""
    model = network(width=4, dtype=torch.float32)
    draws, held_out = (torch.randn(n, model.dim, generator=generator(n)) for n in (30, 300))
    found = fit(
        kind, model, draws, matched=False, held_out=held_out, steps=75, learning_rate=1e-2
    )
    assert float(found.log_prob(held_out).mean()) == pytest.approx(
        found.info["held_out"], abs=1e-3
    )


@ALL
def test_weighted_draws_are_fitted_by_their_weights(kind):
    model = linear(4)
    near, far = (
        where + 0.1 * torch.randn(500, 4, generator=generator(8), dtype=torch.float64)
        for where in (1.0, -5.0)
    )
    weights = torch.cat([torch.zeros(500), torch.full((500,), -1e4)])
    found = fit(kind, model, (torch.cat([near, far]), weights), steps=25)
    assert (found.sample(500, 0).mean(0) - 1.0).abs().max() < 0.05


# ---------------------------------------- seeds, budgets, storage, errors


@ALL
def test_same_seed_same_density(kind):
    model, exact = conjugate().model, conjugate().posterior
    draws = exact.sample(300, 0)
    first, again, other = (
        fit(kind, model, draws, steps=30, seed=seed).sample(5, 0) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@LEARNED
def test_budget_ends_in_time(kind, monkeypatch):
    """By a clock that goes on by a hundredth of a second whenever somebody looks at it."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 0.01).__next__)
    model = network(width=4, dtype=torch.float32)
    found = fit(
        kind, model, model.sample_prior(300, 0), steps=None, budget=1.0, patience=10**6
    )
    assert 0.9 < found.info["seconds"] < 4
    assert found.info["steps"] > 1


@LEARNED
def test_interrupt_returns_what_was_reached(kind, monkeypatch):
    model = network(width=4, dtype=torch.float32)
    real, calls = torch.optim.Adam.step, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.warns(
        UserWarning, match="interrupted: returning the density after 30 steps"
    ):
        found = fit(kind, model, model.sample_prior(300, 0), steps=100)
    assert found.info["interrupted"]
    assert found.log_prob(model.sample_prior(5, 1)).isfinite().all()


def test_continuous_flow_is_a_flow_that_can_be_saved(tmp_path):
    model = network(width=4, dtype=torch.float32)
    flow = fit("cnf", model, model.sample_prior(300, 0), steps=25)
    assert isinstance(flow, Flow)
    loaded = bf.load(flow.save(tmp_path / "cnf"))
    assert isinstance(loaded, Flow)
    theta = flow.sample(4, 0)
    assert torch.allclose(loaded.sample(4, 0), theta, atol=1e-5)
    assert torch.allclose(loaded.log_prob(theta), flow.log_prob(theta), atol=1e-4)


@ALL
def test_draws_that_do_not_fit_are_refused(kind):
    model = network(width=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="axis of length"):
        fit(kind, model, torch.zeros(50, 3))
    draws = model.sample_prior(50, 0)
    draws[2, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 50 are NaN"):
        fit(kind, model, draws)
    with pytest.raises(ValueError, match="ten finite draws"):
        fit(kind, model, model.sample_prior(5, 0))
    with pytest.raises(ValueError, match="held_out must be ten finite"):
        fit(kind, model, model.sample_prior(50, 0), held_out=model.sample_prior(5, 0))
    student = bf.BayesianModel(
        model.net, _ScaledStudent(), likelihoods.Gaussian(0.3), model.x, model.y
    )
    with pytest.raises(ValueError, match="StudentT prior needs its cdf"):
        fit(kind, student, student.sample_prior(50, 0))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cnf", {"width": 0}),
        ("cnf", {"solver_steps": 0}),
        ("cnf", {"learning_rate": 0.0}),
        ("coupling", {"couplings": 0}),
        ("coupling", {"hidden": 0}),
        ("coupling", {"steps": 0}),
        ("coupling", {"budget": -1.0}),
        ("coupling", {"batch_size": 0}),
        ("cnf", {"patience": 0}),
        ("cnf", {"optimiser": "adamw"}),
        ("coupling", {"compile": True}),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, options):
    model = network(width=4, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=f"{next(iter(options))} must be|densities are fitted by Adam"
    ):
        fit(kind, model, model.sample_prior(20, 0), **options)


def test_densities_are_posteriors_over_weights():
    model, exact = conjugate().model, conjugate().posterior
    found = fit_gaussian(model, exact.sample(200, 0))
    assert isinstance(found, TransformedDensity)
    assert found.sample(3, 0).shape == (3, 4)
    assert found.log_prob(found.sample(6, 0).reshape(2, 3, 4)).shape == (2, 3)
