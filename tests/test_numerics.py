"""Laws that hold at every scale: what is exact stays exact, and what cannot be is said."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.equivariant import TensorScaler
from bnnflow.inference.particles.tempering import next_fraction
from bnnflow.transport import Flow, GaussNewton, Solver, time_grid
from tests.problems import one_in

F64 = torch.float64


class Regression(NamedTuple):
    """Linear regression with fixed noise, its posterior and its evidence."""

    model: bf.BayesianModel
    mean: Tensor
    covariance: Tensor
    log_evidence: float

    def standardised(self, theta: Tensor) -> Tensor:
        """Return weights ``(..., dim)`` in coordinates in which the posterior is standard
        normal.
        """
        root = torch.linalg.cholesky(self.covariance)
        offset = (theta.double() - self.mean).reshape(-1, len(self.mean)).T
        return torch.linalg.solve_triangular(root, offset, upper=False).T


def regression(
    inputs: int = 2,
    outputs: int = 1,
    rows: int = 30,
    *,
    noise: float = 0.5,
    data: float = 1.0,
    scale: float = 1.0,
    loc: float = 0.0,
    temperature: float = 1.0,
    dtype: torch.dtype = F64,
) -> Regression:
    """Return y = W x + b + noise; data, noise and prior have the scales that are given."""
    g = torch.Generator().manual_seed(0)
    x = data * torch.randn(rows, inputs, generator=g, dtype=F64)
    weights = loc + scale * torch.randn(outputs, inputs + 1, generator=g, dtype=F64)
    design = torch.cat([x, torch.ones(rows, 1, dtype=F64)], 1)
    y = design @ weights.T + noise * torch.randn(rows, outputs, generator=g, dtype=F64)
    with torch.random.fork_rng(devices=[]):
        net = nn.Linear(inputs, outputs).to(dtype)
    model = bf.BayesianModel(
        net,
        priors.Normal(scale, loc),
        likelihoods.Gaussian(noise),
        x.to(dtype),
        y.to(dtype),
        temperature=temperature,
    )
    dim = inputs + 1
    # In units of the prior: covariance (A^T A + I)^-1 by the singular values of A, exact at every
    # scale.
    u, s, v = torch.linalg.svd(scale * design / noise, full_matrices=True)
    s = torch.cat([s, s.new_zeros(dim - len(s))])
    residual = (y - loc * design.sum(1, keepdim=True)) / noise
    along = u.T[: len(s)] @ residual  # (singular values, outputs)
    along = torch.cat([along, along.new_zeros(dim - len(along), outputs)])
    each = scale**2 * (v.T / (1 + s.square())) @ v
    # (dim, outputs)
    means = loc + scale * v.T @ (s / (1 + s.square())).unsqueeze(1).mul(along)
    of_weights = [o * dim + i for o in range(outputs) for i in range(inputs)]
    # the weights of each output, then the biases
    places = of_weights + [o * dim + inputs for o in range(outputs)]
    covariance = torch.block_diag(*[each] * outputs)[places][:, places]
    mean = means.T.reshape(-1)[places]
    # y ~ N(loc, noise^2 (I + A A^T)); at T = 1
    across = u.T[dim:] @ residual  # no difference of large numbers
    inside = across.square().sum() + (along.square() / (1 + s.square()).unsqueeze(1)).sum()
    value = -0.5 * inside - 0.5 * outputs * torch.log1p(s.square()).sum()
    value = value - rows * outputs * (
        0.5 * torch.log(torch.tensor(2 * torch.pi)) + torch.log(torch.tensor(noise))
    )
    return Regression(model, mean, temperature * covariance, float(value))


# ---------------------------------------- Gauss-Newton flows of linear models

SHAPES = [
    {},
    {"rows": 1},
    {"rows": 500},
    {"inputs": 1, "rows": 3},
    {"inputs": 20, "rows": 25},
    {"inputs": 3, "outputs": 2},
    {"noise": 0.01},
    {"noise": 10.0},
    {"data": 1e3},
    {"data": 1e-3},
    {"scale": 10.0, "noise": 0.01},
    {"scale": 0.1, "loc": 2.0},
    {"scale": 1e3, "loc": -2e3, "data": 1e-3},
    {"temperature": 0.25},
    {"temperature": 3.0},
]


@pytest.mark.parametrize(
    ("shape", "proximal_step"),
    one_in(
        2,
        [
            *((shape, GaussNewton()) for shape in SHAPES),
            *((shape, GaussNewton(2)) for shape in SHAPES[::3]),
        ],
    ),
    ids=str,
)
def test_a_gauss_newton_flow_is_exact_for_linear_gaussian_models(shape, proximal_step):
    """Its map is affine: where it takes a basis tells the mean and the covariance of all draws."""
    problem = regression(**shape)
    flow = bf.GaussNewtonFlow(problem.model, proximal_step, solver=Solver("rk4"))
    basis = torch.cat([torch.zeros(1, flow.dim, dtype=F64), torch.eye(flow.dim, dtype=F64)])
    found = problem.standardised(
        flow.forward(basis, solver=Solver("rk4", time_grid(30, 8.0))).detach()
    )
    matrix = (found[1:] - found[0]).T
    assert found[0].abs().max() < 1e-5
    assert (matrix @ matrix.T - torch.eye(flow.dim, dtype=F64)).abs().max() < 1e-2


@pytest.mark.parametrize("shape", one_in(2, SHAPES), ids=str)
def test_a_gauss_newton_flow_takes_the_steps_that_a_linear_gaussian_model_needs(shape):
    problem = regression(**shape)
    flow = bf.GaussNewtonFlow(problem.model)
    basis = torch.cat([torch.zeros(1, flow.dim, dtype=F64), torch.eye(flow.dim, dtype=F64)])
    found = problem.standardised(flow.forward(basis).detach())
    matrix = (found[1:] - found[0]).T
    assert found[0].abs().max() < 0.05
    assert (matrix @ matrix.T - torch.eye(flow.dim, dtype=F64)).abs().max() < 0.1
    assert (matrix @ matrix.T).diagonal().sub(1).abs().max() < 0.1


def test_a_gauss_newton_flow_says_what_no_number_of_steps_resolves():
    problem = regression(noise=1e-9)
    with pytest.warns(UserWarning, match="times as wide as the source"):
        assert bf.GaussNewtonFlow(problem.model).solver.steps == 1000


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_second_gauss_newton_step_finds_nothing_left_to_do_in_single_precision(shape):
    problem = regression(**shape, dtype=torch.float32)
    x = torch.randn(8, problem.model.dim, generator=torch.Generator().manual_seed(1))
    fields = [
        bf.GaussNewtonFlow(problem.model, GaussNewton(steps)).velocity for steps in (1, 2)
    ]
    for t in (0.0, 0.5, 0.99):
        one, two = (field(torch.tensor(t), x) for field in fields)
        assert (one - two).norm() < 1e-3 * one.norm()


def test_densities_of_gauss_newton_flows_are_smooth_along_the_path(seeded, monkeypatch):
    """Where a long step happens to break even it is no less bounded: the field has no peaks
    there.
    """
    g, rows = torch.Generator().manual_seed(0), 0
    x = torch.randn(30, 2, generator=g, dtype=F64)
    y = x[:, 0].sin() + 0.1 * torch.randn(30, generator=g, dtype=F64)
    with seeded(0):
        net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    model = bf.BayesianModel(net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.1), x, y)
    flow = bf.GaussNewtonFlow(model, solver=Solver(steps=12))
    divergence = flow.velocity.with_divergence

    def counted(t, z, *rest):
        nonlocal rows
        rows += len(z)
        return divergence(t, z, *rest)

    monkeypatch.setattr(flow.velocity, "with_divergence", counted)
    flow.sample_with_log_prob(12, 0, progress=False)
    # those that are rough along the way take two and four times as many
    assert rows < 1.25 * 24 * 12


# ---------------------------------------- samplers and evidences at every scale

SCALES = [
    pytest.param({"noise": 1e-6}, marks=pytest.mark.validate),
    {"data": 1e5},
    {"data": 1e8, "scale": 1e-8},
    {"data": 1e-8, "noise": 1e-8, "scale": 1.0},
    {"noise": 1e-8, "scale": 1e-8},
    pytest.param({"noise": 1e-3, "scale": 1e8}, marks=pytest.mark.validate),
    {"noise": 1e8, "scale": 1e8},
]


@pytest.mark.parametrize("shape", SCALES, ids=str)
def test_tempering_there_and_back_is_right_at_every_scale(shape):
    problem = regression(rows=4, **shape)
    draws = bf.sample(
        problem.model, bf.SMC(particles=300), chains=2, seed=0, progress=False
    )
    check_weighted(problem, draws)
    assert bf.diagnose(problem.model, draws).draws.grade in ("yes", "with care")
    exact = problem.mean + torch.randn(
        300, 3, generator=torch.Generator().manual_seed(2), dtype=F64
    ) @ (torch.linalg.cholesky(problem.covariance).T)
    value, error = bf.evidence(problem.model, exact, seed=0, progress=False)
    assert abs(value - problem.log_evidence) < 4 * error + 0.1


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.validate) for seed in (3, 4))]
)
def test_a_way_back_ends_at_the_prior_however_far_it_is(seed: int) -> None:
    """An inverse temperature of 1 - 1e-17 is rounded to 1: what is left of it is not."""
    problem = regression(rows=4, noise=1e-3, scale=1e8)
    root = torch.linalg.cholesky(problem.covariance)
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    exact = problem.mean + noise @ root.T
    value, error = bf.evidence(problem.model, exact, seed=seed, progress=False)
    assert abs(value - problem.log_evidence) < 4 * error + 0.1


def check_weighted(problem: Regression, draws: bf.Draws) -> None:
    assert draws.log_weights is not None
    assert draws.log_evidence is not None
    weights = (draws.log_weights.flatten() - draws.log_weights.flatten().logsumexp(0)).exp()
    white = problem.standardised(draws.flat)
    mean = weights @ white
    assert mean.abs().max() < 0.35  # of families of particles, there are a few dozen
    assert ((weights @ (white - mean).square()).sqrt() - 1).abs().max() < 0.3
    value, error = draws.log_evidence
    assert abs(value - problem.log_evidence) < 4 * error


def test_particles_that_their_type_cannot_tell_apart_are_not_trusted():
    problem = regression(rows=4, noise=1e-9, dtype=torch.float32)
    draws = bf.sample(
        problem.model, bf.SMC(particles=100), chains=2, seed=0, progress=False
    )
    found = bf.diagnose(problem.model, draws)
    assert found.verdict == "do not trust"
    assert "closer than float32 tells apart" in str(found)
    equal = draws.flat[:1].expand(50, -1)
    with pytest.warns(UserWarning, match="not to be trusted"):
        bf.evidence(problem.model, equal, seed=0, progress=False)


@pytest.mark.parametrize(
    "lost", [{"least_effective_share": 0.01}, {"first_ancestors": 1.5}], ids=str
)
def test_particles_that_were_lost_on_the_way_are_not_trusted(lost):
    problem = regression()
    draws = bf.sample(
        problem.model, bf.SMC(particles=500), chains=2, seed=0, progress=False
    )
    assert bf.diagnose(problem.model, draws).draws.grade in ("yes", "with care")
    worse = replace(draws, info=draws.info | lost)
    assert bf.diagnose(problem.model, worse).draws.grade == "no"


@pytest.mark.parametrize("exponent", [-12, -6, 0])
def test_the_first_temperature_step_is_as_small_as_it_must_be(exponent):
    """Gaussian log ratios of standard deviation s leave exp(-b^2 s^2) of the particles effective at
    b.
    """
    spread = 10.0**-exponent * 10
    ratio = spread * torch.randn(
        1, 20_000, generator=torch.Generator().manual_seed(0), dtype=F64
    )
    equal = torch.full_like(ratio, -torch.tensor(20_000.0).log().item())
    found = next_fraction(ratio, equal, torch.zeros(1, dtype=F64), 0.7)
    assert float(found * spread) == pytest.approx(
        (-torch.tensor(0.7).log().item()) ** 0.5, rel=0.05
    )


def test_microcanonical_chains_forget_all_where_steps_are_longer_than_their_memory():
    problem = regression(rows=4, noise=1e8, scale=1e8)
    draws = bf.sample(
        problem.model, bf.MCLMC(), chains=4, warmup=60, draws=20, seed=0, progress=False
    )
    assert draws.theta.isfinite().all()


@pytest.mark.parametrize("shape", [{"noise": 1e-6}, {"scale": 1e6}, {"data": 1e5}], ids=str)
@pytest.mark.parametrize("n", [4, 200])
def test_refinement_finds_its_step_at_every_scale(shape, n):
    problem = regression(rows=20, **shape)
    root = torch.linalg.cholesky(problem.covariance)
    start = (
        problem.mean
        + 3
        * torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
        @ root.T
    )
    moved = bf.refine(problem.model, start, 16, seed=0, progress=False)
    assert moved.info["acceptance_rate"] > 0.3
    assert not (moved.flat == start).all(1).any()
    # from 9; four draws move by the prior's variances, by seed and processor to 3.3 to 4.2
    most = 4 if n > 8 else 5
    assert problem.standardised(moved.flat).square().mean() < most


# ---------------------------------------- what is not a number


def test_refinement_takes_no_draws_and_no_settings_that_are_not_numbers():
    problem = regression()
    broken = problem.model.sample_prior(20, 0)
    broken[3, 1] = torch.nan
    broken[5] = torch.inf
    with pytest.raises(ValueError, match="2 of 20 draws are NaN or infinite"):
        bf.refine(problem.model, broken, progress=False)
    for name, value in {
        "steps": 0,
        "n_leapfrog": 0,
        "target_acceptance": float("nan"),
    }.items():
        with pytest.raises(ValueError, match=name):
            bf.refine(
                problem.model,
                problem.model.sample_prior(20, 0),
                progress=False,
                **{name: value},
            )


def test_draws_of_a_flow_that_are_not_finite_are_counted():
    class Away(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0, torch.inf, 0.0) * torch.ones_like(x)

    problem = regression()
    flow = Flow.of(Away(), problem.model)
    lost = int((flow.start(100, 0)[:, 0] > 0).sum())
    for draw in (flow.sample, flow.sample_with_log_prob):
        with pytest.raises(
            FloatingPointError, match=f"{lost} of 100 draws are infinite or NaN"
        ):
            draw(100, 0)
    fixed = bf.correct(problem.model, flow, 200, "refine", progress=False)
    assert fixed.theta.isfinite().all()
    assert "of 200 draws were not finite and were left out" in fixed.verdict


@pytest.mark.crossed
@pytest.mark.parametrize(
    "shape",
    [{}, {"noise": 1e4, "scale": 1e4}, {"noise": 1e-6, "scale": 1e-6}, {"noise": 1e-3}],
    ids=str,
)
@pytest.mark.parametrize("rank", [0, "full"])
def test_a_variational_fit_is_right_or_says_that_it_has_not_settled(shape, rank):
    """Its steps have a size of their own, which need not be that of the posterior."""
    problem = regression(**shape)
    draws = bf.sample(
        problem.model, bf.VI(rank, steps=400), draws=250, seed=0, progress=False
    )
    width = draws.flat.std(0) / problem.covariance.diagonal().sqrt()
    off = (draws.flat.mean(0) - problem.mean) / problem.covariance.diagonal().sqrt()
    found = bf.diagnose(problem.model, draws).draws
    converged = draws.info["converged"]
    assert converged == ("has not settled" not in str(found.findings))
    if converged:
        assert (off.abs() < 0.7).all()
        assert ((width - 1).abs() < 0.5).all()
        # transitions may see what steps that have become small do not
        assert found.grade != "no" or ((width - 1).abs() > 0.15).any()
    else:
        assert found.grade == "no"
    assert converged or shape
    assert rank == "full" or converged == (not shape)


# ---------------------------------------- other units


def off(problem: Regression, draws: bf.Draws) -> tuple[float, float]:
    """Return how far mean and standard deviation are from the truth, in posterior standard
    deviations, at worst.
    """
    white = problem.standardised(draws.flat)
    return float(white.mean(0).abs().max()), float((white.std(0) - 1).abs().max())


@pytest.mark.parametrize("shape", SCALES, ids=str)
def test_laplace_is_exact_in_all_units(shape):
    problem = regression(**shape)
    draws = bf.sample(
        problem.model, bf.Laplace(starts=2, steps=50), draws=500, seed=0, progress=False
    )
    assert problem.standardised(draws.posterior.loc).abs().max() < 1e-3
    assert max(off(problem, draws)) < 0.15
    assert draws.log_evidence[0] == pytest.approx(problem.log_evidence, rel=1e-6, abs=1e-4)


@pytest.mark.crossed
@pytest.mark.parametrize("shape", SCALES, ids=str)
@pytest.mark.parametrize(
    "method",
    [bf.HMC(), bf.MCLMC(), bf.SWAG(steps=200, snapshots=60, every=5)],
    ids=["HMC", "MCLMC", "SWAG"],
)
def test_draws_are_right_in_all_units_or_not_trusted(method, shape):
    problem = regression(**shape)
    options = (
        {"draws": 300}
        if isinstance(method, bf.SWAG)
        else {"draws": 200, "warmup": 200, "chains": 4}
    )
    draws = bf.sample(problem.model, method, seed=0, progress=False, **options)
    verdict = bf.diagnose(problem.model, draws).verdict
    mean, width = off(problem, draws)
    assert verdict == "do not trust" or (
        mean < 0.3 and width < (0.7 if isinstance(method, bf.SWAG) else 0.2)
    )
    assert verdict != "do not trust" or shape != SCALES[-1], "the units alone stop nobody"


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1.0, 1e8])
def test_weights_are_standardised_in_all_units_and_constant_ones_keep_theirs(scale, seeded):
    with seeded(0):
        spec = bf.WeightSpec.of(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
    theta = 5.0 + torch.randn(
        50, spec.dim, generator=torch.Generator().manual_seed(0), dtype=F64
    )
    theta[:, spec.slices["2.bias"]] = 0.1
    scaler = TensorScaler.fit(scale * theta, spec)
    found = scaler(scale * theta)
    for name, where in spec.slices.items():
        sd = found[:, where].std(correction=0)
        assert float(sd) == pytest.approx(1.0 if name != "2.bias" else 0.0, abs=1e-6)
    assert torch.allclose(scaler.inverse(found), scale * theta, rtol=1e-9, atol=0)
