"""Laws of the transport: closed forms, invariances, and agreement of every route to a density."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import MultivariateNormal

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.draws import outliers
from bnnflow.inference import refine
from bnnflow.transport import (
    Density,
    Flow,
    GaussianVelocity,
    GaussNewton,
    GradientSteps,
    Independent,
    InformedVelocity,
    Matched,
    Matching,
    Solver,
    Source,
    WeightsVelocity,
)
from bnnflow.transport import flow as flow_module
from bnnflow.transport.divergence import (
    exact_divergence,
    hutchinson_divergence,
    probe_noise,
)
from bnnflow.transport.solvers import integrate, integrate_with_trace, time_grid
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.weights import Symmetries
from tests.problems import built, two_weights

GOLDEN = Path(__file__).parent / "golden"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_model(
    dtype: torch.dtype = torch.float64, prior=None
) -> tuple[bf.BayesianModel, torch.Tensor, torch.Tensor]:
    """Return Bayesian linear regression with its posterior mean and covariance."""
    g = generator(1)
    x = torch.randn(30, 3, generator=g, dtype=dtype)
    y = (
        x @ torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
        + 0.3
        + 0.5 * torch.randn(30, generator=g, dtype=dtype)
    )
    model = bf.BayesianModel(
        nn.Linear(3, 1, dtype=dtype),
        prior or priors.Normal(1.5, 0.2),
        likelihoods.Gaussian(0.5),
        x,
        y,
    )
    design = torch.cat([x, torch.ones(30, 1, dtype=dtype)], 1)
    precision = design.T @ design / 0.25 + torch.eye(4, dtype=dtype) / 2.25
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (design.T @ y / 0.25 + 0.2 / 2.25)
    return model, mean, covariance


def network_model(
    kind: str = "categorical",
    dtype: torch.dtype = torch.float64,
    widths: tuple[int, ...] = (5,),
    temperature=1.0,
) -> bf.BayesianModel:
    g = generator(2)
    x = torch.randn(12, 2, generator=g, dtype=dtype)
    likelihood, outputs, y = {
        "categorical": (likelihoods.Categorical(), 3, torch.arange(12) % 3),
        "bernoulli": (likelihoods.Bernoulli(), 1, torch.arange(12) % 2),
        "gaussian": (likelihoods.Gaussian(0.3), 1, x.sum(1).sin()),
        "learned": (likelihoods.Gaussian(), 1, x.sum(1).sin()),
        "heteroscedastic": (likelihoods.HeteroscedasticGaussian(), 2, x.sum(1).sin()),
    }[kind]
    layers: list[nn.Module] = []
    for n_in, n_out in zip((2, *widths), widths, strict=False):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Linear(widths[-1], outputs)).to(dtype)
    return bf.BayesianModel(
        net, priors.Normal(1.0), likelihood, x, y, temperature=temperature
    )


def randomised(velocity: nn.Module, scale: float = 0.05) -> nn.Module:
    """Give every parameter a random value: a zero head would hide what the network does."""
    g = generator(3)
    for parameter in velocity.parameters():
        parameter.data.add_(
            scale * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
        )
    return velocity.requires_grad_(False)


def informed(model: bf.BayesianModel, proximal_step=None, **sizes) -> InformedVelocity:
    velocity = InformedVelocity(
        model.spec, proximal_step, **({"width": 16, "depth": 2} | sizes)
    ).to(model.dtype)
    return randomised(velocity).bind(WhitenedPosterior(model))


@pytest.fixture(autouse=True)
def _seeded_modules():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# ---------------------------------------- closed forms


def test_closed_form_field_gives_the_exact_density():
    model, mean, covariance = linear_model()
    z_mean, z_cov = (mean - 0.2) / 1.5, covariance / 2.25
    flow = Flow.of(GaussianVelocity(z_mean, z_cov), model)
    theta = bf.Gaussian(mean, torch.linalg.cholesky(covariance)).sample(50, 0)
    truth = bf.Gaussian(mean, torch.linalg.cholesky(covariance)).log_prob(theta)
    got = flow.log_prob(theta, solver=Solver("rk4", 128))
    assert (got - truth).abs().max() < 1e-6
    drawn, log_q = flow.sample_with_log_prob(50, 1, solver=Solver("rk4", 128))
    assert (
        log_q - bf.Gaussian(mean, torch.linalg.cholesky(covariance)).log_prob(drawn)
    ).abs().max() < 1e-6


def test_untrained_gauss_newton_field_is_exact_for_a_linear_gaussian_model():
    model, mean, covariance = linear_model()
    velocity = InformedVelocity(
        model.spec, GaussNewton(1, max_norm=math.inf), width=8, depth=1
    ).double()
    flow = Flow.of(velocity, model)
    drawn, log_q = flow.sample_with_log_prob(40, 0, solver=Solver("rk4", 48))
    truth = bf.Gaussian(mean, torch.linalg.cholesky(covariance)).log_prob(drawn)
    assert (log_q - truth).abs().max() < 1e-4
    # The evidence of a linear Gaussian model follows from any single draw.
    assert torch.allclose(
        model.log_joint(drawn) - log_q,
        (model.log_joint(drawn) - truth)[0].expand(40),
        atol=1e-3,
    )


class Burst(nn.Module):
    """x' = x f(t) where the first coordinate is positive, and nothing elsewhere.

    F is a peak of width 0.02.
    """

    # where a node of the first try meets it
    when = float((np.polynomial.legendre.leggauss(16)[0][6] + 1) / 2)
    mass = 40 * 0.02 * math.pi**0.5

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (
            torch.where(x[:, :1] > 0, 40 * torch.exp(-(((t - self.when) / 0.02) ** 2)), 0.0)
            * x
        )


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_density_takes_more_nodes_where_the_divergence_has_a_peak_on_the_way(trace):
    model = network_model("gaussian")
    flow = Flow.of(Burst().double(), model, solver=Solver("rk4", 8))
    theta = torch.randn(6, model.dim, generator=generator(), dtype=torch.float64)
    theta[::2, 0], theta[1::2, 0] = 1.0, -1.0
    peak = torch.where(theta[:, 0] > 0, Burst.mass, 0.0)
    exact = model.log_prior(theta * torch.exp(-peak).unsqueeze(1)) - model.dim * peak
    # half of the nodes had missed ten nats
    with pytest.warns(UserWarning, match="3 of 6 weights may be wrong"):
        found = flow.log_prob(theta, density=Density(trace=trace))
    assert (found - exact).abs().max() < 0.05 * model.dim
    few = integrate_with_trace(
        flow.velocity,
        lambda t, x: exact_divergence(lambda z: flow.velocity(t, z), x)[1],
        theta,
        16,
        backwards=True,
    )
    assert (few[1][::2] + model.dim * Burst.mass).abs().min() > model.dim


@pytest.mark.crossed
@pytest.mark.parametrize("steps", [8, tuple((torch.arange(17) / 16).tolist())])
@pytest.mark.parametrize("sd", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("far", [1.0, 100.0])
def test_densities_that_fixed_steps_get_wrong_are_told(steps, sd, far):
    """Far out the way back to the source is as long as the weights are many of their standard
    deviations away.
    """
    x = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    model = bf.BayesianModel(
        nn.Linear(2, 1).double(), priors.Normal(1.0), likelihoods.Gaussian(1.0), x, x[:, 0]
    )
    law = MultivariateNormal(
        torch.ones(model.dim).double(), sd**2 * torch.eye(model.dim).double()
    )
    flow = Flow.of(
        bf.transport.GaussianVelocity(law.mean, law.covariance_matrix),
        model,
        solver=Solver(steps=steps),
    )
    theta = law.mean + far * sd * torch.randn(
        20, model.dim, generator=generator(), dtype=torch.float64
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        off = (flow.log_prob(theta) - law.log_prob(theta)).abs()
    assert bool(told) == bool((off > 1).any())
    exact = flow.log_prob(theta, solver=Solver("dopri5", rtol=1e-9, atol=1e-9))
    torch.testing.assert_close(exact, law.log_prob(theta), rtol=1e-5, atol=1e-3)


def test_gradient_steps_agree_with_gauss_newton_where_the_curvature_is_one_number():
    model = bf.BayesianModel(
        nn.Linear(1, 1, bias=False).double(),
        priors.Normal(1.0),
        likelihoods.Gaussian(0.5),
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([1.0, 2.5]),
    )
    context = WhitenedPosterior(model)
    mu, s2 = (
        torch.tensor([[0.3], [-0.4]], dtype=torch.float64),
        torch.tensor([[0.4], [0.9]], dtype=torch.float64),
    )
    steps = GradientSteps(2, max_norm=1e6, memory=0.0)(context, mu, s2)
    newton = GaussNewton(1, max_norm=1e6)(context, mu, s2)
    assert torch.allclose(steps.w, newton.w, rtol=1e-5)


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_gradient_steps_climb_to_the_top_and_cost_what_they_say(memory):
    model, *_ = linear_model()
    context = WhitenedPosterior(model)
    counted = 0

    class Counting:
        def grad(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal counted
            counted += 1
            return context.grad(x)

    mu, s2 = (
        torch.randn(6, 4, dtype=torch.float64, generator=generator()),
        torch.full((6, 1), 0.5).double(),
    )
    exact = GaussNewton(1, max_norm=math.inf)(context, mu, s2).w
    errors = []
    for steps in (4, 12, 40):
        counted = 0
        errors.append(
            (GradientSteps(steps, 1e6, memory)(Counting(), mu, s2).w - exact).norm()
        )
        assert counted == 2 * steps + 1
    assert errors[2] < 1e-3 * exact.norm()
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("proximal_step", [GradientSteps(), GaussNewton(2)])
@pytest.mark.parametrize(
    "kind", ["categorical", "bernoulli", "gaussian", "learned", "heteroscedastic"]
)
def test_drive_is_finite_at_the_end_and_equals_the_gradient_there(kind, proximal_step):
    model = network_model(kind)
    context = WhitenedPosterior(model)
    z = torch.randn(6, model.dim, generator=generator(), dtype=torch.float64)
    score = proximal_step(context, z, torch.zeros(6, 1, dtype=torch.float64))
    assert torch.allclose(score.w, context.grad(z), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["categorical", "learned"])
def test_context_gradient_is_that_of_log_posterior_over_normal_density(kind, temperature):
    model = network_model(kind, temperature=temperature)
    z = torch.randn(
        5, model.dim, generator=generator(), dtype=torch.float64, requires_grad=True
    )
    theta = model.flat_prior.from_normal(z)
    # of the posterior, over z
    log_density = model.log_joint(theta) - model.flat_prior.log_jacobian(theta)
    (expected,) = torch.autograd.grad((log_density + 0.5 * (z * z).sum(-1)).sum(), z)
    assert torch.allclose(
        WhitenedPosterior(model).grad(z.detach()), expected, rtol=1e-7, atol=1e-8
    )


# ---------------------------------------- densities


@pytest.mark.crossed
@pytest.mark.parametrize(
    "proximal_step", [GradientSteps(3), GaussNewton(1), GaussNewton(2)]
)
@pytest.mark.parametrize("kind", ["categorical", "gaussian", "learned"])
@pytest.mark.parametrize("t", [0.1, 0.6, 0.97])
def test_divergence_of_the_informed_field_matches_central_differences(
    kind, proximal_step, t
):
    model = network_model(kind)
    velocity = informed(model, proximal_step)
    x = torch.randn(4, model.dim, generator=generator(), dtype=torch.float64)
    time = torch.tensor(t, dtype=torch.float64)
    value, divergence = exact_divergence(lambda z: velocity(time, z), x)
    assert torch.allclose(value, velocity(time, x))
    step = 1e-6 * torch.eye(model.dim, dtype=torch.float64)
    forward = velocity(time, (x[:, None] + step).flatten(0, 1)).reshape(
        4, model.dim, model.dim
    )
    backward = velocity(time, (x[:, None] - step).flatten(0, 1)).reshape(
        4, model.dim, model.dim
    )
    differences = (forward - backward).diagonal(dim1=1, dim2=2).sum(-1) / 2e-6
    # Finite-difference curvature (GradientSteps) is itself differenced here, hence the looser
    # bound.
    assert torch.allclose(divergence, differences, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: informed(m, GaussNewton()),
        lambda m: randomised(WeightsVelocity(m.spec, 16, 2).double()),
    ],
)
def test_forward_accumulation_equals_the_reverse_solve(make):
    model = network_model("categorical")
    flow = Flow.of(make(model), model)
    theta, log_q = flow.sample_with_log_prob(2, 0, solver=Solver("rk4", 16))
    assert (flow.log_prob(theta, solver=Solver("rk4", 16)) - log_q).abs().max() < 2e-3


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_mean_agrees_with_the_exact_trace_within_its_error(noise):
    model = network_model("categorical")
    velocity = informed(model)
    x = torch.randn(6, model.dim, generator=generator(), dtype=torch.float64)
    field = lambda z: velocity(torch.tensor(0.5), z)  # noqa: E731
    _, exact = exact_divergence(field, x)
    _, estimates = hutchinson_divergence(
        field, x, probe_noise(noise, 2000, x, generator(4))
    )
    error = estimates.std(0) / math.sqrt(2000)
    assert ((estimates.mean(0) - exact).abs() < 4.5 * error).all()


@pytest.mark.filterwarnings("ignore:log densities of")  # two steps are few, for both alike
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_log_prob_agrees_with_the_exact_one(noise):
    model = network_model("gaussian")
    flow = Flow.of(informed(model, GradientSteps(3)), model, solver=Solver(steps=2))
    theta = flow.sample(1, 0).expand(200, -1)
    exact = flow.log_prob(theta[:1])
    estimates = flow.log_prob(
        theta, seed=5, density=Density(trace="hutchinson", probes=1, noise=noise)
    )
    assert abs(estimates.mean() - exact) < 4.5 * estimates.std() / math.sqrt(200)


@pytest.mark.filterwarnings("ignore:log densities of")
def test_hutchinson_probes_are_fixed_along_a_path_and_by_the_seed():
    model = network_model("gaussian")
    flow = Flow.of(informed(model), model, solver=Solver(steps=2))
    theta = flow.sample(3, 0)
    first, again = (
        flow.log_prob(theta, seed=7, density=Density(trace="hutchinson", probes=2))
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(
        first, flow.log_prob(theta, seed=8, density=Density(trace="hutchinson", probes=2))
    )


def test_density_carries_the_jacobian_of_a_prior_that_is_not_normal():
    model = bf.BayesianModel(
        nn.Linear(1, 1, bias=False).double(),
        torch.distributions.Laplace(torch.tensor(0.3), torch.tensor(0.8)),
        likelihoods.Gaussian(0.7),
        torch.tensor([[1.0], [0.5]]),
        torch.tensor([0.4, 1.0]),
    )
    flow = Flow.of(
        InformedVelocity(model.spec, GaussNewton(1), width=8, depth=1).double(), model
    )
    grid = torch.linspace(-6, 6, 500, dtype=torch.float64)
    mass = torch.trapezoid(
        flow.log_prob(grid[:, None], solver=Solver("rk4", 16)).exp(), grid
    )
    assert mass == pytest.approx(1.0, abs=2e-3)


# ---------------------------------------- symmetry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(6,), (5, 4)])
@pytest.mark.parametrize("kind", ["weights", "steps", "newton"])
def test_velocity_commutes_with_the_group_it_declares(kind, widths, dtype):
    model = network_model("categorical", dtype, widths)
    if kind == "weights":
        velocity = randomised(WeightsVelocity(model.spec, 16, 2).to(dtype))
    else:
        velocity = informed(model, GradientSteps() if kind == "steps" else GaussNewton())
    x = torch.randn(20, model.dim, generator=generator(), dtype=dtype)
    t = torch.rand(20, generator=generator(1), dtype=dtype)
    v = velocity(t, x)
    moved_x, moved_v = model.spec.transform(velocity.symmetries, 5, x, v)
    error = (velocity(t, moved_x) - moved_v).abs().max() / v.abs().max()
    bound = 1e-10 if dtype == torch.float64 else (1e-5 if kind == "weights" else 1e-4)
    assert velocity.symmetries.permutation == set(model.spec.widths)
    assert error <= bound


@pytest.mark.filterwarnings("ignore:log densities of")  # which are the same, however wrong
def test_density_of_an_equivariant_flow_is_invariant():
    model = network_model("categorical")
    flow = Flow.of(informed(model), model, solver=Solver(steps=2))
    theta = flow.sample(4, 0)
    (moved,) = model.spec.transform(flow.velocity.symmetries, 1, theta)
    assert torch.allclose(flow.log_prob(theta), flow.log_prob(moved), atol=1e-8)


@pytest.mark.parametrize("coupling", [Independent(), Matched()])
@pytest.mark.parametrize("prior", [priors.Normal(1.0), priors.FanIn(1.3)])
def test_source_marginals_stay_the_prior_under_every_coupling(coupling, prior):
    net = nn.Sequential(
        nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)
    )
    x = torch.randn(10, 2, generator=generator())
    model = bf.BayesianModel(net, prior, likelihoods.Gaussian(0.1), x, x.sum(1))
    # A target far from symmetric, so that matching has something to pull at.
    x1 = 2 + 0.3 * torch.randn(4000, model.dim, generator=generator(1)) * torch.linspace(
        0.1, 3, model.dim
    )
    x0 = torch.randn(4000, model.dim, generator=generator(2))
    paired, target = coupling.pair(
        x0, x1, model.spec, Source(model.flat_prior).symmetries(model), generator(3)
    )
    p_values = [stats.kstest(column.numpy(), "norm").pvalue for column in paired.T]
    assert min(p_values) > 0.001 / model.dim
    if isinstance(coupling, Matched):
        assert (paired - target).square().sum() < 0.95 * (x0 - x1).square().sum()
    theta = model.flat_prior.from_normal(paired)
    assert torch.allclose(
        model.log_prior(theta).sort().values,
        model.log_prior(model.flat_prior.from_normal(x0)).sort().values,
        atol=1e-2,
    )


def test_matching_without_a_random_element_would_bias_the_source():
    """The power of the test above: matched x0 alone is no longer the prior."""
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(10, 2, generator=generator())
    model = bf.BayesianModel(
        net, priors.Normal(1.0), likelihoods.Gaussian(0.1), x, x.sum(1)
    )
    x0 = torch.randn(2000, model.dim, generator=generator(2))
    x1 = torch.linspace(-3, 3, model.dim).expand(2000, -1)
    matched = bf.symmetry.match(x0, model.spec, x1)
    assert min(stats.kstest(column.numpy(), "norm").pvalue for column in matched.T) < 1e-8


def test_prior_that_is_not_exchangeable_shrinks_the_group_or_raises():
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    uneven = {
        "0.weight": torch.distributions.Normal(
            torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [3.0]])
        )
    }
    x = torch.randn(10, 1, generator=generator())
    prior = priors.PerTensor(uneven, torch.distributions.Normal(0.5, 1.0))
    model = bf.BayesianModel(net, prior, likelihoods.Gaussian(0.1), x, x.sum(1))
    assert Source(model.flat_prior).symmetries(model) == Symmetries(
        frozenset(), frozenset(), frozenset()
    )
    with pytest.raises(ValueError, match="exchangeable"):
        bf.fit_flow(
            model,
            model.sample_prior(50, 0),
            training=bf.Training(steps=1),
            matching=Matching(coupling=Matched()),
        )


# ---------------------------------------- solvers


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_solvers_have_their_order(solver, order):
    errors, reference = [], torch.linspace(0, 1, 1001, dtype=torch.float64)
    for steps in (8, 16):
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        (x,) = integrate(
            lambda t, s: (-(s[0] ** 2) + t,),
            (torch.ones(1, dtype=torch.float64),),
            grid,
            solver,
        )
        (fine,) = integrate(
            lambda t, s: (-(s[0] ** 2) + t,),
            (torch.ones(1, dtype=torch.float64),),
            reference,
            "rk4",
        )
        errors.append(abs(float(x - fine)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("solver", ["dopri5", "dopri8"])
def test_adaptive_solvers_carry_trained_flows_both_ways(solver):
    """The field ends at t = 1: beyond, the time of its network has no logarithm."""
    model = network_model("gaussian")
    field = WeightsVelocity(model.spec, width=4, depth=1).double()
    flow = bf.fit_flow(
        model,
        0.3 * model.sample_prior(64, 0),
        velocity=field,
        progress=False,
        training=bf.Training(steps=5, batch_size=16),
    )
    theta, log_q = flow.sample_with_log_prob(3, 0, solver=Solver(solver))
    assert torch.allclose(theta, flow.sample(3, 0, solver=Solver("rk4", 64)), atol=1e-3)
    assert torch.allclose(flow.log_prob(theta, solver=Solver(solver)), log_q, atol=1e-2)


@pytest.mark.parametrize("solver", ["bosh3", "adaptive_heun"])
def test_adaptive_solvers_carry_flows_that_look_at_the_data(solver):
    flow = bf.GaussNewtonFlow(network_model("gaussian"))
    assert torch.allclose(
        flow.sample(2, 0, solver=Solver(solver)),
        flow.sample(2, 0, solver=Solver("rk4", 32)),
        atol=1e-2,
    )


def test_advice_about_a_field_too_stiff_for_an_adaptive_solver_can_be_followed():
    class Jagged(nn.Module):
        def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return (1e5 * t).sin() * torch.ones_like(x)

    flow = Flow.of(Jagged(), network_model("gaussian"))
    with pytest.raises(RuntimeError, match="take a rule with fixed steps, such as 'rk4'"):
        flow.sample(2, 0, solver=Solver("dopri5"))
    assert flow.sample(2, 0, solver=Solver("rk4")).isfinite().all()


def test_nan_velocity_raises_and_says_when():
    with pytest.raises(FloatingPointError, match=r"between t = 0\.0000"):
        integrate(lambda t, s: (s[0] * math.nan,), (torch.ones(1),), time_grid(4))
    with pytest.raises(ValueError, match="rule"):
        integrate(lambda t, s: s, (torch.ones(1),), time_grid(4), "rk5")  # type: ignore[arg-type]


# ---------------------------------------- fitting, storage, refinement


def test_fit_is_reproducible_by_steps_and_seed():
    model = network_model("categorical", torch.float32)
    draws = model.sample_prior(200, 1)
    training = bf.Training(steps=2, batch_size=16)

    def make(seed):
        flow = bf.fit_flow(model, draws, seed=seed, training=training)
        return flow.sample(5, 0, solver=Solver(steps=2))

    first, again, other = make(0), make(0), make(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fit_by_budget_stops_in_time_and_can_be_repeated_by_its_steps(monkeypatch):
    """By a clock that goes on by a tenth of a second whenever somebody looks at it."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 0.1).__next__)
    model = network_model("categorical", torch.float32)
    draws = model.sample_prior(200, 1)
    field = WeightsVelocity(model.spec, width=8, depth=1)
    flow = bf.fit_flow(
        model, draws, velocity=field, training=bf.Training(budget=1.0, batch_size=16)
    )
    assert flow.info["seconds"] < 2
    again = bf.fit_flow(
        model,
        draws,
        velocity=field,
        training=bf.Training(steps=flow.info["steps"], batch_size=16),
    )
    assert torch.equal(flow.sample(3, 0), again.sample(3, 0))


@pytest.mark.crossed
@pytest.mark.parametrize("velocity", ["informed", "weights"])
@pytest.mark.parametrize("kind", ["categorical", "learned"])
def test_save_and_load_round_trip(tmp_path, velocity, kind):
    model = network_model(kind, torch.float32, (4, 3))
    size = {"width": 8, "depth": 1}
    proximal_step = GaussNewton(2) if kind == "learned" else GradientSteps()
    field = {
        "informed": lambda: InformedVelocity(model.spec, proximal_step, **size),
        "weights": lambda: WeightsVelocity(model.spec, **size),
    }[velocity]
    flow = bf.fit_flow(
        model,
        model.sample_prior(100, 1),
        velocity=built(field, torch.float32),
        training=bf.Training(steps=2, batch_size=8),
    )
    path = flow.save(tmp_path / "flow")
    loaded = bf.load(path, model)
    # Equal weights, not equal bits: memory alignment decides the order of sums in a matrix product.
    state, loaded_state = flow.velocity.state_dict(), loaded.velocity.state_dict()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    few = Solver(steps=3)
    theta = flow.sample(4, 0, solver=few)
    assert torch.allclose(loaded.sample(4, 0, solver=few), theta, atol=1e-5)
    log_q = flow.log_prob(theta[:2], solver=few)
    assert torch.allclose(loaded.log_prob(theta[:2], solver=few), log_q)
    assert (loaded.solver, loaded.info) == (flow.solver, flow.info)
    other = network_model(
        "gaussian" if kind == "learned" else "bernoulli", torch.float32, (4, 3)
    )
    if velocity == "informed":
        with pytest.raises(ValueError, match="needs its model"):
            bf.load(path)
        with pytest.raises(ValueError, match="not the model"):
            bf.load(path, other)
    else:
        assert torch.allclose(bf.load(path).sample(4, 0, solver=few), theta, atol=1e-5)


def test_golden_file_of_format_version_1_still_loads():
    flow = bf.load(GOLDEN / "flow-v1.npz")
    assert flow.spec.dim == 13
    assert flow.velocity.symmetries.permutation == {"h1"}
    expected = torch.tensor([1.5359, -0.0822, -2.1945])
    assert torch.allclose(
        flow.sample(1, 0, solver=Solver(steps=time_grid(flow.solver.steps, 1.5)))[0, :3],
        expected,
        atol=2e-4,
    )


def test_golden_file_of_format_version_2_still_loads():
    flow = bf.load(GOLDEN / "flow-v2.npz")
    assert (flow.path.schedule, flow.solver) == ("variance_preserving", Solver("rk4", 4))
    theta = flow.sample(1, 0, solver=Solver("rk4", time_grid(4, 1.5)))
    assert torch.allclose(theta[0, :3], torch.tensor([1.6201, 0.2186, -1.3710]), atol=2e-4)
    assert float(flow.log_prob(theta, solver=Solver("rk4", 32))) == pytest.approx(
        -16.60893, abs=2e-4
    )


def test_bind_gives_the_same_field_with_another_models_data():
    model = network_model("categorical")
    flow = Flow.of(informed(model), model)
    other = bf.BayesianModel(
        model.net, priors.Normal(1.0), likelihoods.Categorical(), model.x, model.y.roll(1)
    )
    assert not torch.allclose(flow.sample(3, 0), flow.bind(other).sample(3, 0))
    assert torch.equal(flow.sample(3, 0), flow.bind(other).bind(model).sample(3, 0))


def test_to_changes_the_precision_of_everything():
    model = network_model("categorical", torch.float32)
    flow = Flow.of(informed(model), model, solver=Solver(steps=6))
    double = flow.to("cpu", torch.float64)
    x = torch.randn(5, model.dim, generator=generator())
    single, exact = (
        flow.velocity(torch.tensor(0.4), x),
        double.velocity(torch.tensor(0.4), x.double()),
    )
    assert exact.dtype == torch.float64
    assert double.sample(2, 0).dtype == torch.float64
    assert torch.allclose(single.double(), exact, atol=1e-3)


def test_weighted_draws_are_fitted_by_their_weights():
    model, _, _ = linear_model(torch.float32)
    near, far = torch.zeros(100, 4) + 1.0, torch.zeros(100, 4) - 5.0
    weights = torch.cat([torch.zeros(100), torch.full((100,), -1e4)])
    flow = bf.fit_flow(
        model,
        (torch.cat([near, far]), weights),
        velocity=WeightsVelocity(model.spec, width=16, depth=1),
        training=bf.Training(steps=300, batch_size=64),
    )
    assert (flow.sample(500, 0).mean(0) - 1.0).abs().max() < 0.3


def test_any_network_and_any_module_as_field():
    """A softmax between units leaves no labels that we know: such a flow needs a field of one's
    own, and no more.
    """
    g = generator(4)
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Softmax(1), nn.Flatten(), nn.Linear(8, 1))
    x = torch.randn(20, 1, 6, generator=g)
    model = bf.BayesianModel(
        net, priors.Normal(1.0), likelihoods.Gaussian(0.5), x, x.sum((1, 2))
    )
    draws = 0.1 * torch.randn(300, model.dim, generator=g) + 1

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(model.dim + 1, 64), nn.SiLU(), nn.Linear(64, model.dim)
            )

        def forward(self, t, x):
            return self.net(torch.cat([x, t.expand(len(x))[:, None].to(x.dtype)], -1))

    with pytest.raises(ValueError, match="chain of layers"):
        bf.fit_flow(model, draws, training=bf.Training(steps=1))
    flow = bf.fit_flow(
        model, draws, velocity=Field(), training=bf.Training(steps=300, batch_size=64)
    )
    assert (flow.sample(500, 0).mean(0) - 1).abs().max() < 0.3
    assert flow.log_prob(draws[:3]).shape == (3,)
    with pytest.raises(ValueError, match="cannot save a Field"):
        flow.save("never")


def test_fit_refuses_draws_that_do_not_fit():
    model = network_model("categorical", torch.float32)
    with pytest.raises(ValueError, match="axis of length"):
        bf.fit_flow(model, torch.zeros(5, 3))
    draws = model.sample_prior(5, 0)
    draws[2, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 5 are NaN"):
        bf.fit_flow(model, draws)
    with pytest.raises(ValueError, match="velocity must be"):
        bf.fit_flow(model, model.sample_prior(5, 0), velocity="magic")  # type: ignore[arg-type]


def test_flow_from_a_student_prior_has_its_jacobian():
    model = bf.BayesianModel(
        nn.Linear(1, 1, bias=False).double(),
        torch.distributions.StudentT(2.5, 0.3, 0.8),
        likelihoods.Gaussian(0.7),
        torch.tensor([[1.0], [0.5]]),
        torch.tensor([0.4, 1.0]),
    )
    flow = Flow.of(
        InformedVelocity(model.spec, GaussNewton(1), width=8, depth=1).double(), model
    )
    grid = torch.linspace(-9, 9, 500, dtype=torch.float64)
    mass = torch.trapezoid(
        flow.log_prob(grid[:, None], solver=Solver("rk4", 16)).exp(), grid
    )
    assert mass == pytest.approx(1.0, abs=2e-3)


def test_refine_brings_prior_draws_to_a_gaussian_posterior():
    model, mean, covariance = linear_model()
    refined = refine(model, model.sample_prior(4000, 0), 20, seed=1)
    theta = refined.flat
    error = (theta.mean(0) - mean) / (covariance.diagonal() / 4000).sqrt()
    assert error.abs().max() < 4.5
    assert torch.allclose(
        torch.cov(theta.T), covariance, atol=0.1 * float(covariance.diagonal().max())
    )
    assert refined.info["gradients_per_draw"] <= 20 * 16 + 2


def test_refine_leaves_exact_draws_exact():
    model, mean, covariance = linear_model()
    exact = bf.Gaussian(mean, torch.linalg.cholesky(covariance)).sample(5000, 0)
    theta = refine(model, exact, 3, seed=1).flat
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (theta - mean).T, upper=False
    )
    assert min(stats.kstest(row.numpy(), "norm").pvalue for row in whitened) > 1e-4


def test_refine_frees_draws_that_start_where_the_posterior_is_too_steep():
    """With one step size for all, 40 of 800 draws never move: their every trajectory diverges."""
    model = two_weights()
    theta = 2 * torch.randn(
        800, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    refined = refine(model, theta, 16, seed=1)
    assert (refined.flat != theta).any(1).all()
    # of 4,000 exact draws the least likely has -7.9
    assert int((refined.log_joint < -20).sum()) <= 4


def test_refine_brings_up_the_last_draws():
    """Three of 400 start where two steps do not get them anywhere near, in the tails of a posterior
    of 21 weights.
    """
    model = network_model("gaussian", torch.float64)
    draws = bf.sample(model, bf.HMC(), chains=8, warmup=100, draws=50, seed=0).flat
    draws[[3, 77, 399]] *= 6
    assert int(outliers(model.log_joint(draws)).sum()) == 3
    refined = refine(model, draws, 2, seed=1)
    assert refined.info["outliers"] == 0
    assert refined.log_joint.min() > refined.log_joint.median() - 60
    assert torch.allclose(refined.log_joint[0], model.log_joint(refined.flat).double())


def test_an_interrupt_while_the_last_draws_move_keeps_all_and_is_told(monkeypatch):
    model = network_model("gaussian", torch.float64)
    draws = bf.sample(model, bf.HMC(), chains=8, warmup=100, draws=50, seed=0).flat
    draws[[3, 77, 399]] *= 40
    real = model.log_joint_and_grad

    def interrupted(theta):
        if len(theta) == 3:
            raise KeyboardInterrupt
        return real(theta)

    monkeypatch.setattr(model, "log_joint_and_grad", interrupted)
    with pytest.warns(UserWarning, match="some draws still lie far below"):
        refined = refine(model, draws, 2, seed=1)
    assert refined.info["interrupted"]
    assert (refined.info["steps"], refined.info["outliers"], refined.n_draws) == (2, 3, 400)


@pytest.mark.parametrize("shape", [0.5, 1.0, 20.0, 500.0])
def test_draws_of_a_gaussian_do_not_stray(shape):
    law = torch.distributions.Gamma(torch.tensor(shape, dtype=torch.float64), 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = -law.sample((1_000_000,))
    assert int(outliers(values).sum()) <= 2
    far = torch.tensor(
        [math.nan, -math.inf, float(values.median()) - 12 * (shape**0.5 + 2)]
    )
    assert outliers(torch.cat([values, far]))[-3:].all()


def test_refine_survives_an_interrupt_and_refuses_weights(monkeypatch):
    model, _, _ = linear_model()
    calls, real = [], model.log_joint_and_grad

    def interrupted(theta):
        calls.append(len(theta))
        if calls.count(100) > 40:  # the pilot moves 64 draws, the refinement all 100
            raise KeyboardInterrupt
        return real(theta)

    monkeypatch.setattr(model, "log_joint_and_grad", interrupted)
    theta = model.sample_prior(100, 0)
    with pytest.warns(UserWarning, match="interrupted: returning the draws after"):
        refined = refine(model, theta, 50)
    assert refined.info["interrupted"]
    assert 1 <= refined.info["steps"] <= 5
    assert not torch.equal(refined.flat, theta)
    with pytest.raises(ValueError, match="equal weight"):
        refine(model, (theta, torch.zeros(100)))


@pytest.mark.filterwarnings("ignore:log densities of")  # what is rough is in doubt
@pytest.mark.parametrize("rough", [False, True])
def test_long_log_densities_say_how_long_they_take(rough, monkeypatch):
    """Every divergence is counted, those of a second look at rough paths too, and a bar is on
    unless switched off.
    """
    bars = []

    class Bar:
        def __init__(self, total, description, progress, unit, *, delay):
            self.total, self.shown, self.n = total, progress, 0
            bars.append(self)

        def update(self, n):
            self.n += n

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(flow_module, "progress_bar", Bar)
    monkeypatch.setattr(flow_module, "ROUGH", -1.0 if rough else 1e9)
    gaussian = bf.transport.GaussianVelocity(
        torch.tensor([1.0, 2.0]).double(), torch.eye(2).double()
    )
    net = nn.utils.skip_init(nn.Linear, 1, 1, dtype=torch.float64)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    model = bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(1.0), x, x)
    flow = bf.Flow.of(gaussian, model, solver=Solver(steps=4))
    theta, _ = flow.sample_with_log_prob(3, 0, chunk_size=2)
    flow.log_prob(theta, chunk_size=2, progress=False)
    flow.log_prob(theta, solver=Solver(steps=[0.0, 0.5, 1.0]))
    flow.forward_with_log_prob(theta)
    assert [bar.shown for bar in bars] == [True, False, True, False]
    for bar in bars[:2]:
        assert bar.n == bar.total == 3 * 8 * (7 if rough else 1)
    assert bars[2].total is None
    assert bars[2].n > 0
