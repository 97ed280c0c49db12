"""Laws of parallel tempering: every level follows its own density, and ladders weigh modes that
chains never leave.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.diagnostics import ess
from bnnflow.inference.loop import warm_up
from bnnflow.inference.mcmc import parallel_tempering as tempering
from tests.problems import F64, built, conjugate, generator, tiny_network


def two_modes(scale: float = 0.05) -> bf.BayesianModel:
    """Return y = w2 tanh(w1 x), whose posterior is the same at (w1, w2) and (-w1, -w2)."""
    x = torch.linspace(-2, 2, 15, dtype=F64).unsqueeze(-1)
    net = built(
        lambda: torch.nn.Sequential(
            torch.nn.Linear(1, 1, bias=False),
            torch.nn.Tanh(),
            torch.nn.Linear(1, 1, bias=False),
        )
    )
    return bf.BayesianModel(
        net, priors.Normal(1.5), likelihoods.Gaussian(scale), x, 1.2 * (0.8 * x).tanh()
    )


def by_quadrature(model: bf.BayesianModel) -> float:
    """Integrate exp(log_joint) over two weights."""
    axis = torch.linspace(-6, 6, 1001, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    log_joint = torch.cat([model.log_joint(rows) for rows in grid.split(200_000)])
    return float(log_joint.logsumexp(0)) + 2 * math.log(float(axis[1] - axis[0]))


@pytest.fixture(scope="module")
def ladders() -> bf.Draws:
    method = bf.ParallelTempering(levels=12)
    return bf.sample(two_modes(), method, chains=4, warmup=300, draws=600, seed=0)


def test_modes_are_weighed_where_chains_stay(ladders: bf.Draws) -> None:
    model = two_modes()
    chains = bf.sample(model, bf.HMC(), chains=4, warmup=100, draws=100, seed=0)
    assert ((chains.theta[..., 0] > 0).double().mean(1) % 1 == 0).all()  # each in its own
    side = (ladders.theta[..., 0] > 0).double()
    error = 0.5 / math.sqrt(ess(side.numpy()[..., None], "mean").item())
    assert error < 0.1
    assert abs(float(side.mean()) - 0.5) < 4 * error
    assert (ladders.stats["round_trips"][:, -1] > 5).all()
    assert ladders.info["round_trips"] == ladders.stats["round_trips"][:, -1].tolist()


def test_the_evidence_is_that_of_quadrature(ladders: bf.Draws) -> None:
    value, error = ladders.log_evidence or (math.nan, math.nan)
    assert error < 0.15
    assert value == pytest.approx(by_quadrature(two_modes()), abs=4 * error + 0.02)
    own = torch.tensor(ladders.info["log_evidence_of_ladders"], dtype=F64)
    assert value == pytest.approx(float(own.mean()))
    assert error == pytest.approx(float(own.std()) / 2)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_normaliser_of_a_line(temperature: float) -> None:
    problem = conjugate(temperature=temperature)
    draws = bf.sample(
        problem.model,
        bf.ParallelTempering(levels=8),
        chains=8,
        warmup=200,
        draws=300,
        seed=1,
    )
    assert (draws.log_evidence is None) == (temperature != 1)
    name = "log_tempered_normaliser"
    assert (name in draws.info) == (temperature != 1)
    value, error = draws.log_evidence or draws.info[name]
    mean, covariance = problem.mean.double(), problem.covariance.double()
    # exp(log_joint) over the normal law that it is proportional to
    law = torch.distributions.MultivariateNormal(mean, covariance)
    exact = float(problem.model.log_joint(mean) - law.log_prob(mean))
    assert error < 0.2
    assert value == pytest.approx(exact, abs=4 * error + 0.02)


def tuned_ladder(
    levels: int = 6, ladders: int = 3, temperature: float = 1.0
) -> tuple[tempering.Ladder, tempering.LadderState, Any]:
    """Return ladders over a conjugate problem, well tuned, where warm-up left them."""
    problem = conjugate(temperature=temperature)
    method = bf.ParallelTempering(levels=levels)
    process = tempering.tempering_warm_up(problem.model, 400, method)
    g = generator(3)
    theta = problem.model.sample_prior(ladders, g)
    state = process.init(theta, g)
    for _ in range(400):
        state, _ = process.step(state, g)
    settings = tempering.Settings(
        state.fractions, state.averaged.exp(), state.inverse_mass_matrix
    )
    return tempering.Ladder(problem.model, settings, 1.0, 64), state.ladders, problem


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_every_level_follows_its_own_law(temperature: float) -> None:
    """The prior exactly, and the powers of the likelihood between it and the posterior."""
    ladder, state, problem = tuned_ladder(temperature=temperature)
    g, seen = generator(4), []
    for _ in range(800):
        state, _, _ = ladder.advance(state, g)
        seen.append(state.levels)
    levels = torch.stack(seen, 1)  # (ladder, draw, level, dim)
    prior = problem.model.sample_prior(4000, 5)
    mean, precision = prior.mean(0), torch.linalg.inv(problem.covariance)
    start = torch.linalg.inv(torch.cov(prior.T))
    for at in range(levels.shape[2]):
        b = ladder.settings.fractions[:, at]
        assert (b - b.mean()).abs().max() < 0.2  # the ladders' own, near each other
        for one in range(len(levels)):
            covariance = torch.linalg.inv((1 - b[one]) * start + b[one] * precision)
            centre = covariance @ (
                (1 - b[one]) * start @ mean + b[one] * precision @ problem.mean
            )
            z = (levels[one, :, at] - centre) / covariance.diag().sqrt()
            effective = ess(z.unsqueeze(0).numpy(), "mean")
            assert (effective > 100).all()
            assert (z.mean(0).abs().numpy() < 4.5 / np.sqrt(effective) + 0.06).all()
            assert (z.var(0) - 1).abs().max() < 0.45


def test_the_prior_is_drawn_from_anew() -> None:
    ladder, state, problem = tuned_ladder(levels=3, ladders=400)
    g = generator(5)
    moved, seen, _ = ladder.advance(state, g)
    path = tempering.FromPrior(problem.model, 1000)
    expected, _ = path(problem.model.sample_prior(4000, 6).unsqueeze(0))
    fresh = problem.model.log_joint(problem.model.sample_prior(4000, 6)) - expected[0]
    assert stats.ks_2samp(seen.log_ratio[:, 0], fresh).pvalue > 1e-3
    assert (moved.exchanges == state.exchanges + 1).all()


def test_rates_of_exchange_become_equal() -> None:
    model = two_modes()
    process = tempering.tempering_warm_up(model, 600, bf.ParallelTempering(levels=10))
    g = generator(1)
    theta = model.sample_prior(8, g)
    first = process.init(theta, g)
    tuned = warm_up(process, theta, 600, generator(1))
    fractions = torch.tensor(tuned.found["inverse_temperatures"], dtype=F64)
    assert (fractions[:, 0] == 0).all()
    assert (fractions[:, -1] == 1).all()
    assert (fractions.diff(dim=1) > 0).all()
    spread = []
    for at in (first.fractions, fractions):
        settings = tempering.Settings(
            at, torch.full((8, 10), 0.2, dtype=F64), torch.ones(8, 10, 2, dtype=F64)
        )
        ladder, rates = tempering.Ladder(model, settings, 1.0, 16), []
        state = ladder.start(tuned.state.theta)
        for _ in range(300):
            state, seen, _ = ladder.advance(state, g)
            rates.append(seen.exchanges.mean(0))
        rate = torch.stack(rates[100:]).mean(0)
        spread.append(float(rate.max() - rate.min()))
    assert spread[1] < 0.2
    assert spread[1] < 0.6 * spread[0]
    assert tuned.found["barrier"] == pytest.approx(9 - float(rate.sum()), abs=1.0)


def test_temperatures_cut_the_barrier_into_equal_parts() -> None:
    fractions = torch.tensor([[0.0, 0.01, 0.1, 1.0], [0.0, 0.2, 0.4, 1.0]], dtype=F64)
    equal = torch.full((2, 3), 0.4, dtype=F64)
    torch.testing.assert_close(tempering.equalised(fractions, equal), fractions)
    lopsided = torch.tensor([[0.1, 0.1, 0.7], [0.6, 0.2, 0.1]], dtype=F64)
    found = tempering.equalised(fractions, lopsided)
    assert found[0, 1] == pytest.approx(0.1 * 10 ** (0.1 / 0.7))  # two thirds lie beyond
    assert found[1, 1] == pytest.approx(0.1)  # half the way to the first
    flipped = tempering.equalised(fractions.flip(0), lopsided.flip(0))
    assert torch.equal(flipped, found.flip(0))  # ladders know nothing of each other
    nothing = tempering.equalised(fractions, torch.zeros_like(equal))
    assert (nothing.diff(dim=1) > 0).all()


def test_neighbours_exchange_in_turns() -> None:
    g = generator(2)
    fractions = torch.linspace(0, 1, 6, dtype=F64).expand(500, -1)
    ratio = 3 * torch.randn(500, 6, generator=g, dtype=F64)
    ratio[::7, 0] = -math.inf
    for turn in (0, 1):
        at = torch.full((500,), turn)
        order, chance = tempering._exchanged(at, fractions, ratio, g)
        assert torch.equal(order.sort(1).values, torch.arange(6).expand(500, -1))
        assert torch.equal(order.gather(1, order), torch.arange(6).expand(500, -1))
        moved = order != torch.arange(6)
        untouched = [0, 5] if turn else []
        assert not moved[:, untouched].any()
        joint = fractions.diff(dim=1) * (ratio[:, :-1] - ratio[:, 1:])
        torch.testing.assert_close(chance, joint.exp().clamp(max=1))
        for pair in range(turn, 5, 2):
            rate, expected = moved[:, pair].double().mean(), chance[:, pair].mean()
            assert abs(float(rate - expected)) < 0.08
        assert not moved[::7, 0].any()  # no density, no exchange


def test_states_of_no_density_stay_at_the_prior() -> None:
    model = conjugate().model
    settings = tempering.Settings(
        torch.tensor([[0.0, 0.5, 1.0]], dtype=F64),
        torch.full((1, 3), 0.1, dtype=F64),
        torch.ones(1, 3, model.dim, dtype=F64),
    )
    ladder = tempering.Ladder(model, settings, 1.0, 4)
    state, g = ladder.start(torch.zeros(1, model.dim, dtype=F64)), generator()
    model.sample_prior = lambda n, seed: torch.full((n, model.dim), 1e200, dtype=F64)  # type: ignore[method-assign]
    for _ in range(5):
        state, seen, _ = ladder.advance(state, g)
        assert float(seen.log_ratio[0, 0]) == -math.inf
        assert float(seen.exchanges[0, 0]) == 0
        assert state.theta.isfinite().all()
        assert state.log_joint.isfinite().all()


def test_both_forms_of_the_dynamics_give_the_same_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawn() -> Tensor:
        method = bf.ParallelTempering(levels=5, max_leapfrog=6)
        model = tiny_network()
        return bf.sample(model, method, chains=2, warmup=60, draws=10, seed=0).theta

    compiled = drawn()
    monkeypatch.setattr(tempering.PosteriorTarget, "_compiled", lambda *given: None)
    assert torch.equal(drawn(), compiled)


def test_models_without_a_compiled_density_are_tempered() -> None:
    x = torch.linspace(-1, 1, 10, dtype=F64).unsqueeze(-1)
    net = built(lambda: torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.ELU()))
    model = bf.BayesianModel(
        net, priors.Normal(), likelihoods.Gaussian(0.3), x, x.repeat(1, 3)
    )
    assert not model.is_compiled
    method = bf.ParallelTempering(levels=4, max_leapfrog=4)
    draws = bf.sample(model, method, chains=2, warmup=40, draws=20, seed=0)
    torch.testing.assert_close(draws.log_joint, model.log_joint(draws.theta))


def test_states_that_come_back_are_no_copies(ladders: bf.Draws) -> None:
    model = two_modes()
    back = ladders.theta.clone()
    back[0, 5] = back[0, 0]
    come = bf.diagnose(model, ladders.with_theta(back), model.x, model.y)
    assert "come again" not in str(come)


def test_one_ladder_says_nothing_of_its_error() -> None:
    method = bf.ParallelTempering(levels=4, max_leapfrog=4)
    draws = bf.sample(tiny_network(), method, chains=1, warmup=30, draws=5, seed=0)
    assert draws.log_evidence is not None
    assert math.isfinite(draws.log_evidence[0])
    assert math.isnan(draws.log_evidence[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("levels", 2),
        ("target_acceptance", 1.0),
        ("trajectory_length", 0),
        ("max_leapfrog", 0),
    ],
)
def test_settings_without_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        bf.ParallelTempering(**{name: value})
