"""Laws of tempered sequential Monte Carlo: evidences in closed form, honest errors, and its
parts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.bridge import bennett
from bnnflow.inference.particles.tempering import (
    merging,
    next_fraction,
    relative_variance,
    systematic,
    weighted_variance,
)
from tests.problems import (
    F64,
    built,
    check_runs,
    conjugate,
    generator,
    moments,
    tiny_network,
    two_weights,
)

# ---------------------------------------- evidence


def wide(posterior: bf.Gaussian) -> bf.Gaussian:
    """Return a Gaussian near the posterior, but wrong: shifted, too wide, and without
    correlations.
    """
    sd = (posterior.scale_tril @ posterior.scale_tril.T).diagonal().sqrt()
    return bf.Gaussian(posterior.loc + sd, 2 * sd)


@pytest.mark.crossed
@pytest.mark.parametrize("hard", [False, True], ids=["mild", "correlated and badly scaled"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("start", [None, wide], ids=["prior", "Gaussian"])
def test_the_normaliser_is_the_closed_form(
    hard: bool, temperature: float, start: Any
) -> None:
    problem = conjugate(hard, temperature=temperature)
    method = bf.SMC(particles=250, start=start and start(problem.posterior))
    draws = bf.sample(problem.model, method, chains=16, seed=0)
    if temperature == 1:
        assert "log_tempered_normaliser" not in draws.info
        value, error = draws.log_evidence
    else:
        assert draws.log_evidence is None
        value, error = draws.info["log_tempered_normaliser"]
    assert 0.005 < error < 0.15
    assert abs(value - problem.log_normaliser) < 4 * error
    check_runs(
        draws, moments(draws.theta, problem.mean, problem.covariance), least_ess=100, k=5.0
    )
    torch.testing.assert_close(draws.log_joint, problem.model.log_joint(draws.theta))


MANY = pytest.mark.parametrize(
    "many", [False, pytest.param(True, marks=pytest.mark.validate)]
)
"""Repetitions: few each day, all of them in `make validate`, by the same bounds."""


@MANY
@pytest.mark.parametrize("runs", [1, 3])
def test_the_error_of_the_evidence_is_honest(runs: int, many: bool) -> None:
    """Over independent repetitions the error divided by its own estimate has a standard deviation
    near one.
    """
    problem = conjugate()
    scores = []
    for seed in range(24 if many else 12):
        value, error = bf.sample(
            problem.model, bf.SMC(particles=150), chains=runs, seed=seed
        ).log_evidence
        scores.append((value - problem.log_normaliser) / error)
    z = np.array(scores)
    # as 99.7% of the means of 24 squared standard normal numbers
    assert 0.6 < np.sqrt((z**2).mean()) < 1.45
    assert np.abs(z).max() < 4.5


def test_the_evidence_of_two_modes_is_the_quadratures() -> None:
    model = two_weights()
    grid = torch.linspace(-7, 7, 701, dtype=F64)
    theta = torch.cartesian_prod(grid, grid)
    log_joint = model.log_joint(theta)
    log_evidence = float(log_joint.logsumexp(0)) + 2 * math.log(float(grid[1] - grid[0]))
    weights = log_joint.softmax(0)
    mean = weights @ theta
    covariance = (weights[:, None] * theta).T @ theta - torch.outer(mean, mean)
    assert mean.abs().max() < 1e-9
    assert covariance[0, 1] > 0.5  # the modes are where both weights have one sign

    draws = bf.sample(model, bf.SMC(particles=500), chains=12, seed=0)
    value, error = draws.log_evidence
    assert error < 0.05
    assert abs(value - log_evidence) < 4 * error
    check_runs(draws, moments(draws.theta, mean, covariance), k=5.0)
    right = (draws.log_weights.exp() * (draws.theta[..., 0] > 0)).sum(1)
    assert right.min() > 0.2  # no run has lost a mode
    assert right.max() < 0.8


def test_more_particles_are_closer() -> None:
    problem = conjugate()
    spreads = []
    for particles in (50, 800):
        draws = bf.sample(problem.model, bf.SMC(particles=particles), chains=16, seed=0)
        spreads.append(float(np.std(draws.info["log_evidence_of_runs"])))
    assert 2 < spreads[0] / spreads[1] < 8  # sqrt(16) = 4


# ---------------------------------------- evidence of draws


def test_a_bridge_between_two_gaussians_is_their_ratio_for_each_row_of_a_batch() -> None:
    """p = 3 N(1, 0.5^2) over q = N(0, 1): c is log 3, also where p has twice the draws and those
    have weights.
    """
    g, n = generator(0), 20_000
    q, p = (
        torch.randn(5, n, generator=g, dtype=F64),
        1 + 0.5 * torch.randn(5, 2 * n, generator=g, dtype=F64),
    )

    def log_ratio(x: Tensor) -> Tensor:
        return math.log(3 / 0.5) - 2 * (x - 1).square() + 0.5 * x.square()

    weights = torch.full((5, 2 * n), 0.5 / n, dtype=F64)
    value, ours, theirs = bennett(log_ratio(q), log_ratio(p), weights, math.log(2))
    assert (value - math.log(3)).abs().max() < 0.03
    torch.testing.assert_close(ours.mean(1), 2 * theirs.mean(1))
    # weights of zero: no draws
    doubled = torch.cat([p, p + 9], 1), torch.cat([weights, torch.zeros_like(weights)], 1)
    again, _, _ = bennett(
        log_ratio(q[2]), log_ratio(doubled[0][2]), doubled[1][2], math.log(2)
    )
    torch.testing.assert_close(again, value[2])
    nothing, _, _ = bennett(
        torch.full((3,), -math.inf, dtype=F64), log_ratio(p[0]), weights[0]
    )
    assert nothing.isnan()


@pytest.mark.parametrize("hard", [False, True], ids=["mild", "correlated and badly scaled"])
@pytest.mark.parametrize("start", [None, wide], ids=["prior", "Gaussian"])
def test_the_evidence_of_exact_draws_is_the_closed_form(hard: bool, start: Any) -> None:
    problem = conjugate(hard)
    smc = bf.SMC(particles=2000, ess=0.9, start=start and start(problem.posterior))
    value, error = bf.evidence(problem.model, problem.posterior.sample(2000, 1), smc)
    assert 0.002 < error < 0.1
    assert abs(value - problem.log_normaliser) < 4 * error


@MANY
@pytest.mark.validate
def test_the_error_of_the_evidence_of_draws_is_honest(many: bool) -> None:
    problem, smc = conjugate(), bf.SMC(particles=300, ess=0.9)
    found = [
        bf.evidence(problem.model, problem.posterior.sample(300, seed), smc, seed=99 + seed)
        for seed in range(16 if many else 8)
    ]
    value, error = np.array(found).T
    z = (value - problem.log_normaliser) / error
    # as 99.7% of the means of 16 squared standard normal numbers
    assert 0.5 < np.sqrt((z**2).mean()) < 1.55
    assert np.abs(z).max() < 4.5
    assert abs(z.mean()) < 3 / 4


def ridge(
    n: int = 30, dim: int = 12
) -> tuple[bf.BayesianModel, torch.distributions.MultivariateNormal, float]:
    """A linear model whose inputs are much alike, its posterior and its evidence."""
    g = generator(5)
    x = torch.randn(n, dim - 1, generator=g, dtype=F64)
    x = x + 2 * x[:, :1]
    y = x @ torch.randn(dim - 1, 1, generator=g, dtype=F64) + 0.3 * torch.randn(
        n, 1, generator=g, dtype=F64
    )
    net = built(lambda: nn.Linear(dim - 1, 1), F64)
    model = bf.BayesianModel(net, bf.priors.Normal(), bf.likelihoods.Gaussian(0.3), x, y)
    features = torch.cat([x, torch.ones(n, 1, dtype=F64)], 1)
    covariance = (features.T @ features / 0.09 + torch.eye(dim, dtype=F64)).inverse()
    posterior = torch.distributions.MultivariateNormal(
        (covariance @ features.T @ y / 0.09)[:, 0], covariance
    )
    marginal = features @ features.T + 0.09 * torch.eye(n, dtype=F64)
    law = torch.distributions.MultivariateNormal(torch.zeros(n, dtype=F64), marginal)
    return model, posterior, float(law.log_prob(y[:, 0]))


@MANY
@pytest.mark.validate
def test_the_error_of_the_evidence_of_alike_inputs_is_honest(
    seeded: Any, many: bool
) -> None:
    """Directions in which particles hardly move bias the evidence, and make particles and ancestors
    alike.
    """
    model, posterior, log_evidence = ridge()
    with seeded(0):
        found = [
            bf.evidence(model, posterior.sample((250,)), seed=seed, progress=False)
            for seed in range(6 if many else 3)
        ]
    value, error = np.array(found).T
    z = (value - log_evidence) / error
    # as 99.7% of the means of 6 squared standard normal numbers
    assert 0.26 < np.sqrt((z**2).mean()) < 1.89
    assert abs(z.mean()) < 3 / math.sqrt(6)


def test_the_way_there_and_the_way_back_agree_on_two_modes() -> None:
    model = two_weights()
    there = bf.sample(model, bf.SMC(particles=500), chains=12, seed=0)
    back = bf.evidence(model, there, bf.SMC(particles=2000, ess=0.9), seed=1)
    assert abs(back[0] - there.log_evidence[0]) < 4 * math.hypot(
        back[1], there.log_evidence[1]
    )
    assert back[1] < 0.1


def test_the_moves_mend_draws_that_are_too_wide() -> None:
    """Draws half as wide again as the posterior are off by nats in density, by a tenth of one in
    the evidence.
    """
    problem = conjugate()
    mean, draws = problem.posterior.loc, problem.posterior.sample(1000, 1)
    value, error = bf.evidence(
        problem.model, mean + 1.5 * (draws - mean), bf.SMC(particles=1000, ess=0.9)
    )
    assert abs(value - problem.log_normaliser) < 0.1 + 4 * error


@pytest.mark.validate
def test_draws_far_below_the_others_are_left_out_of_the_evidence_or_refused() -> None:
    """Left in, three of 200 take all the weight on the way back, where they hardly move: -12 in
    place of 39.
    """
    with torch.random.fork_rng(devices=[]):
        net = torch.nn.Sequential(
            torch.nn.Linear(1, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)
        ).double()
    x = torch.linspace(-2, 2, 30, dtype=F64)[:, None]
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.03), x, (2 * x[:, 0]).sin()
    )
    draws = bf.sample(model, bf.HMC(), chains=8, warmup=150, draws=25, seed=0).flat
    smc = bf.SMC(particles=200, ess=0.7)
    clean, error = bf.evidence(model, draws, smc)
    draws[[0, 50, 199]] = model.sample_prior(3, 5)
    with pytest.warns(UserWarning, match="3 of 200 draws lie far below the others") as told:
        value, _ = bf.evidence(model, draws, smc)
    # the line that called, not one of the package
    assert told.pop(UserWarning).filename == __file__
    assert abs(value - clean) < 6 * error
    draws[:30] = model.sample_prior(30, 6)
    with pytest.raises(ValueError, match="refine them first"):
        bf.evidence(model, draws)


def test_weights_of_draws_count_in_their_evidence() -> None:
    problem = conjugate()
    start = wide(problem.posterior)
    theta = start.sample(4000, 0)
    log_weights = problem.model.log_joint(theta).double() - start.log_prob(theta)
    smc = bf.SMC(particles=1000, ess=0.9)
    value, error = bf.evidence(problem.model, (theta, log_weights), smc)
    assert abs(value - problem.log_normaliser) < 4 * error


def test_the_evidence_of_draws_can_be_repeated_and_takes_them_evenly() -> None:
    model = tiny_network()
    draws = bf.sample(model, bf.HMC(), chains=4, warmup=60, draws=50, seed=0)
    smc = bf.SMC(particles=40)
    assert bf.evidence(model, draws, smc, seed=3) == bf.evidence(model, draws, smc, seed=3)
    assert bf.evidence(model, draws, smc, seed=3) != bf.evidence(model, draws, smc, seed=4)
    rows = torch.linspace(0, 199, 40).round().long()
    assert bf.evidence(model, draws.flat[rows], smc, seed=3) == bf.evidence(
        model, draws, smc, seed=3
    )
    cut = bf.evidence(model, draws, bf.SMC(particles=40, chunk_size=7), seed=3)
    assert cut == pytest.approx(bf.evidence(model, draws, smc, seed=3), abs=1e-4)


def test_what_has_no_evidence_is_refused() -> None:
    model = tiny_network()
    theta = model.sample_prior(20, 0)
    with pytest.raises(ValueError, match="at least ten draws, got 9"):
        bf.evidence(model, theta[:9])
    broken = theta.clone()
    broken[3, 2] = math.nan
    with pytest.raises(ValueError, match="1 of 20 draws are NaN or infinite"):
        bf.evidence(model, broken)
    with pytest.raises(ValueError, match="10"):
        bf.evidence(model, theta[:, :-1])
    far = theta.clone()
    far[3] = 1e200
    with pytest.raises(ValueError, match="no finite posterior"):
        bf.evidence(model, far)
    cold = conjugate(temperature=0.5)
    with pytest.raises(ValueError, match=r"temperature 1, and the model's is 0\.5"):
        bf.evidence(cold.model, cold.posterior.sample(20, 0))


# ---------------------------------------- parts


def test_runs_are_independent_and_weights_normalised() -> None:
    model = tiny_network()
    draws = bf.sample(model, bf.SMC(particles=60), chains=3, seed=0)
    assert draws.theta.shape == (3, 60, 10)
    torch.testing.assert_close(
        draws.log_weights.logsumexp(1), torch.zeros(3, dtype=F64), rtol=0, atol=1e-12
    )
    assert len(set(draws.info["log_evidence_of_runs"])) == 3
    pooled = np.logaddexp.reduce(draws.info["log_evidence_of_runs"]) - math.log(3)
    assert draws.log_evidence[0] == pytest.approx(pooled)
    assert draws.info["first_ancestors"] > 1


def test_particles_are_chunked_without_a_change() -> None:
    model = tiny_network()
    whole = bf.sample(model, bf.SMC(particles=40), chains=2, seed=0)
    cut = bf.sample(model, bf.SMC(particles=40, chunk_size=7), chains=2, seed=0)
    torch.testing.assert_close(cut.theta, whole.theta, rtol=1e-6, atol=1e-6)


def test_gradients_are_counted() -> None:
    model = tiny_network()
    calls, function = [0], model.log_likelihood_and_grad

    def counted(theta: Tensor) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        return function(theta)

    model.log_likelihood_and_grad = counted  # type: ignore[method-assign]
    draws = bf.sample(model, bf.SMC(particles=50), chains=2, seed=0)
    assert draws.info["gradients_per_chain"] == calls[0]


def test_particles_where_there_is_no_density_die() -> None:
    """Half of the prior's mass has a NaN likelihood: the posterior is what is left."""
    model = two_weights()
    function = model.log_likelihood_and_grad

    def fenced(theta: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = function(theta)
        beyond = theta[:, 0] < 0
        return torch.where(beyond, math.nan, value), torch.where(
            beyond[:, None], math.nan, grad
        )

    whole = bf.sample(model, bf.SMC(particles=400), chains=8, seed=0)
    model.log_likelihood_and_grad = fenced  # type: ignore[method-assign]
    half = bf.sample(model, bf.SMC(particles=400), chains=8, seed=0)
    assert (half.theta[..., 0] >= 0).all()
    assert half.theta.isfinite().all()
    error = math.hypot(half.log_evidence[1], whole.log_evidence[1])
    assert abs(half.log_evidence[0] - (whole.log_evidence[0] - math.log(2))) < 4 * error


# ---------------------------------------- parts


def log_weights(runs: int, n: int, spread: float, seed: int) -> Tensor:
    weights = spread * torch.randn(runs, n, generator=generator(seed), dtype=F64)
    return weights - weights.logsumexp(1, keepdim=True)


@given(st.integers(2, 200), st.floats(0, 20), st.integers(0, 1000))
def test_parents_are_as_many_as_their_weights_say(n: int, spread: float, seed: int) -> None:
    weights = log_weights(3, n, spread, seed)
    parents = systematic(weights, generator(seed))
    assert parents.shape == (3, n)
    counts = torch.stack([torch.bincount(row, minlength=n) for row in parents])
    assert ((counts - n * weights.exp()).abs() < 1 + 1e-9).all()


def test_parents_are_right_on_average() -> None:
    weights = log_weights(1, 12, 1.5, 0).expand(20_000, -1)
    parents = systematic(weights, generator(1))
    counts = torch.nn.functional.one_hot(parents, 12).sum(1).double()
    error = counts.std(0) / math.sqrt(len(counts)) + 1e-9
    assert ((counts.mean(0) - 12 * weights[0].exp()).abs() < 4.5 * error).all()


def test_the_dead_have_no_children() -> None:
    weights = torch.full((2, 6), -math.inf, dtype=F64)
    weights[0, 0] = weights[1, 5] = 0.0
    for seed in range(50):
        parents = systematic(weights, generator(seed))
        assert (parents[0] == 0).all()
        assert (parents[1] == 5).all()


def effective(weights: Tensor) -> Tensor:
    weights = weights - weights.logsumexp(1, keepdim=True)
    return (-(2 * weights).logsumexp(1)).exp() / weights.shape[1]


@given(st.floats(0.05, 0.95), st.floats(0, 0.9), st.floats(0.01, 1e5), st.integers(0, 1000))
def test_the_next_temperature_leaves_the_wanted_particles(
    wanted: float, fraction: float, spread: float, seed: int
) -> None:
    ratio = spread * torch.randn(4, 300, generator=generator(seed), dtype=F64)
    weights = torch.full((4, 300), -math.log(300), dtype=F64)
    now = torch.full((4,), fraction, dtype=F64)
    then = next_fraction(ratio, weights, now, wanted)
    assert (then > now).all()
    assert (then <= 1).all()
    left = effective(weights + (then - now)[:, None] * ratio)
    arrived = then == 1
    assert (left[arrived] >= wanted).all()
    assert ((left[~arrived] - wanted).abs() < 1e-3).all() or spread > 1e3
    rest = effective(weights + (1 - now)[:, None] * ratio)
    assert (rest[~arrived] < wanted).all()


def test_temperatures_go_on_where_no_particle_is_left() -> None:
    """A single particle with a density, or a cliff of any height: the schedule neither stops nor
    turns back.
    """
    ratio = torch.full((3, 10), -math.inf, dtype=F64)
    ratio[0, 0] = 0.0
    ratio[1] = torch.linspace(-1e30, 0, 10, dtype=F64)
    ratio[2] = 5.0
    weights = torch.full((3, 10), -math.log(10), dtype=F64)
    fraction = torch.tensor([0.0, 0.5, 0.2], dtype=F64)
    found = next_fraction(ratio, weights, fraction, 0.7)
    assert (found > fraction).all()
    assert found[2] == 1


def test_variances_are_weighted_and_positive() -> None:
    theta = torch.randn(2, 5000, 3, generator=generator(), dtype=F64) * torch.tensor(
        [1.0, 3.0, 0.0], dtype=F64
    )
    weights = log_weights(2, 5000, 0.5, 1)
    found = weighted_variance(theta, weights)
    torch.testing.assert_close(
        found[:, :2], torch.tensor([[1.0, 9.0]], dtype=F64).expand(2, -1), rtol=0.1, atol=0
    )
    assert (found[:, 2] > 0).all()  # a coordinate that never moves does not stop the others


def test_the_rounding_of_resampling_is_no_error() -> None:
    """Where particles forget all between two temperatures, every reweighting adds the variance of
    its weights.
    """
    n, g = 200, generator(3)
    root, merged = torch.arange(n).expand(500, -1), torch.zeros(500, dtype=F64)
    for _ in range(10):
        weights = log_weights(500, n, 0.6, int(torch.randint(1 << 30, (), generator=g)))
        merged = merged + merging(weights, root)
        root = root.gather(1, systematic(weights, g))
    equal = torch.full((500, n), -math.log(n), dtype=F64)
    expected = 10 * (math.exp(0.36) - 1) / n
    assert float(relative_variance(equal, root, merged).mean()) == pytest.approx(
        expected, rel=0.2
    )


def test_the_error_of_plain_importance_sampling() -> None:
    """Without any resampling the estimate is the textbook's: the mean square of the weights, less
    one.
    """
    n = 1000
    weights = log_weights(1, n, 0.4, 2)
    found = relative_variance(
        weights, torch.arange(n).expand(1, -1), torch.zeros(1, dtype=F64)
    )
    textbook = (n * weights.exp()).var() / n
    assert float(found[0]) == pytest.approx(float(textbook), rel=0.01)


# ---------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 9}, "particles must be at least 10"),
        ({"ess": 0.0}, "ess must be strictly between 0 and 1"),
        ({"ess": 1.0}, "ess must be strictly between 0 and 1"),
        ({"target_acceptance": 1.5}, "target_acceptance must be strictly between 0 and 1"),
        ({"moves": 0}, "moves must be at least 1"),
        ({"trajectory_length": -1.0}, "trajectory_length must be positive and finite"),
        ({"max_leapfrog": 0}, "max_leapfrog must be at least 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_settings_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bf.SMC(**options)


@pytest.mark.parametrize(
    "options",
    [{"warmup": 10}, {"draws": 10}, {"init": "prior"}],
    ids=lambda o: next(iter(o)),
)
def test_what_particles_do_not_have_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="SMC takes particles and a start, not"):
        bf.sample(tiny_network(), bf.SMC(), **options)
