"""Posteriors that are weighed from draws of the prior."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.importance import khat_limit
from bnnflow.transport import Flow, Solver, WeightsVelocity
from tests.problems import built, normal
from tests.test_update import SCALE, N, X, Y, check_change, check_law, law, linear

ROWS = slice(0, 3)
SMALL = bf.SMC(particles=400, ess=0.4, moves=2)


def bank_of(model: bf.BayesianModel, n: int = 4000, seed: int = 0) -> bf.PriorBank:
    return bf.PriorBank.of(model, n, seed=seed)


def noisy(n: int, scale: float | None = None) -> bf.BayesianModel:
    """A network whose noise is learned, unless it is given."""
    net = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    given = priors.Normal(1.0), likelihoods.Gaussian(scale)
    return bf.BayesianModel(net, *given, X[:n].float(), Y[:n].float())


def learned(model: bf.BayesianModel) -> Flow:
    field = built(lambda: WeightsVelocity(model.spec, 4, 1), model.dtype)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.1 * normal(*parameter.shape, dtype=model.dtype)
    return Flow.of(field, model, solver=Solver("euler", 2))


@pytest.mark.parametrize("route", ["weights", "tempering"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_posterior_and_evidence_are_those_of_the_data(
    route: str, temperature: float
) -> None:
    model = linear(ROWS if route == "weights" else slice(0, N), temperature=temperature)
    n = 2**15 if route == "weights" else 1000
    found = [
        bf.update(model, bank_of(linear(), n, seed), smc=SMALL, seed=seed)
        for seed in range(16)
    ]
    assert {each.info["route"] for each in found} == {route}
    mean, covariance, evidence = law(model)
    check_law(found, mean, covariance)
    if temperature != 1:
        assert all(each.log_evidence is None for each in found)
        return
    check_change(found, evidence)
    for each in found:
        assert list(each.log_evidence or ()) == each.info["log_evidence_change"]
        torch.testing.assert_close(each.log_joint, model.log_joint(each.theta))


def test_of_a_weighed_bank_as_many_draws_are_kept_as_asked_for() -> None:
    model = linear(ROWS)
    draws = bf.update(model, bank_of(model, 2**15), smc=SMALL)
    assert draws.info["route"] == "weights"
    weights = draws.log_weights
    assert weights is not None
    assert len(draws.flat.unique(dim=0)) == draws.n_draws <= 400
    assert float(weights.exp().sum()) == pytest.approx(1)
    # as many as all are worth, less what choosing costs
    assert 0.5 * 400 * 0.4 < draws.info["ess"] < 400
    counts = 400 * weights.exp()
    torch.testing.assert_close(counts, counts.round())
    assert bf.diagnose(model, draws).draws.grade != "no"


def test_heavy_tails_of_bounded_weights_do_no_harm() -> None:
    """k-hat of few good draws among many is large; how many there are is what counts."""
    model = linear(slice(0, 6))
    seen = [
        bf.update(model, bank_of(model, 2**17, seed), smc=SMALL, seed=seed)
        for seed in range(12)
    ]
    assert {each.info["route"] for each in seen} == {"weights"}
    assert max(each.info["khat"] for each in seen) > khat_limit(2**17)
    check_change(seen, law(model)[2])


def test_a_learned_prior_s_networks_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = noisy(4, scale=0.5)
    model = plain.transported(learned(plain))
    bank = bank_of(model, 3000)
    torch.testing.assert_close(bank.weights, model.weights_of(bank.theta))
    assert not bank.weights.allclose(bank.theta)
    other = noisy(5, scale=0.5).transported(learned(plain))
    torch.testing.assert_close(
        bank.log_likelihood(other), other.log_likelihood(bank.theta).double()
    )
    monkeypatch.setattr(type(model.density.transport), "forward", None)
    draws = bf.update(other, bank, smc=replace(SMALL, ess=0.01))
    assert draws.info["route"] == "weights"
    assert draws.log_evidence is not None


def test_a_learned_prior_s_evidence_is_that_of_smc() -> None:
    plain = noisy(8)
    model = plain.transported(learned(plain))
    smc = bf.sample(model, bf.SMC(particles=500), chains=4, seed=0)
    tempered = bf.update(model, bank_of(model, 1000), smc=replace(SMALL, ess=0.9))
    assert tempered.info["route"] == "tempering"
    for each in (bf.update(model, bank_of(model, 2**14)), tempered):
        value, error = each.log_evidence
        gap = value - smc.log_evidence[0]
        assert abs(gap) < 4 * math.hypot(error, smc.log_evidence[1])
        assert error < 0.2


def test_rows_that_come_later_are_for_another_update() -> None:
    first, second = noisy(4), noisy(6)
    draws = bf.update(first, bank_of(first, 2**14))
    after = bf.update(second, draws)
    bank = bf.update(second, bank_of(second, 2**16))
    assert after.log_evidence is not None
    error = math.hypot(after.log_evidence[1], bank.log_evidence[1])
    assert abs(after.log_evidence[0] - bank.log_evidence[0]) < 4 * error


def test_seeds_decide_and_nothing_else() -> None:
    model = linear(ROWS)
    assert bank_of(model, 50).theta.equal(bank_of(model, 50).theta)
    assert not bank_of(model, 50).theta.equal(bank_of(model, 50, seed=1).theta)
    bank = bank_of(model, 2**14)
    one, again, other = (bf.update(model, bank, seed=seed) for seed in (0, 0, 1))
    assert one.theta.equal(again.theta)
    assert one.theta.shape != other.theta.shape or not one.theta.equal(other.theta)


def test_bad_input_is_named() -> None:
    model = linear(ROWS)
    bank = bank_of(model, 100)
    with pytest.raises(ValueError, match="bank of another prior"):
        bf.update(linear(ROWS, scale=2 * SCALE), bank)
    with pytest.raises(ValueError, match="bank of another prior"):
        bf.update(noisy(4), bank)
    plain = noisy(4)
    with pytest.raises(ValueError, match="bank of another prior"):
        bf.update(plain.transported(learned(plain)), bank_of(plain, 100))
    with pytest.raises(ValueError, match="previous must be None"):
        bf.update(model, bank, linear())
    with pytest.raises(ValueError, match="at least 10, got 5"):
        bf.update(model, bank_of(model, 5))
    with pytest.raises(ValueError, match="temperature of at most 1, got 2"):
        bf.update(linear(ROWS, temperature=2.0), bank)
    assert repr(bank) == "PriorBank(100 draws of 4 weights)"
    with pytest.raises(ValueError, match="n must be"):
        bf.PriorBank.of(model, 0)
    broken = replace(bank, weights=bank.weights * math.nan)
    with pytest.raises(ValueError, match="none of them has a finite density"):
        bf.update(model, broken)


@pytest.mark.parametrize(
    ("likelihood", "bounded"),
    [
        (likelihoods.Gaussian(0.3), True),
        (likelihoods.Gaussian(), False),
        (likelihoods.StudentT(scale=0.3), True),
        (likelihoods.StudentT(), False),
        (likelihoods.HeteroscedasticGaussian(), False),
        (likelihoods.Gamma(), False),
        (likelihoods.Poisson(), True),
        (likelihoods.NegativeBinomial(), True),
        (likelihoods.Levels((0.0, 1.0)), True),
        (likelihoods.Bernoulli(), True),
        (likelihoods.Categorical(), True),
        (likelihoods.Ordinal(3), True),
        (likelihoods.LogNormal(likelihoods.Gaussian(0.3)), True),
        (likelihoods.LogNormal(likelihoods.Gaussian()), False),
        (likelihoods.Standardised(likelihoods.Gaussian(), 1.0, 2.0), False),
    ],
)
def test_densities_that_have_a_bound_say_so(
    likelihood: likelihoods.Likelihood, bounded: bool
) -> None:
    assert likelihood.is_bounded == bounded


def test_where_weights_have_no_bound_k_hat_decides() -> None:
    """The same heavy tails with a learned noise are moved."""
    model = noisy(6)
    draws = bf.update(model, bank_of(model, 2**12), smc=replace(SMALL, ess=0.01))
    assert draws.info["khat"] > khat_limit(2**12)
    assert draws.info["route"] == "tempering"


def test_priors_are_mixed_by_the_evidences_of_their_banks() -> None:
    plain = noisy(4, scale=0.5)
    flow = learned(plain)
    carried = plain.transported(flow)
    draws = (bf.update(carried, bank_of(carried)), bf.update(plain, bank_of(plain)))
    mixed = bf.mix_priors(plain, flow, draws=draws)
    ours, theirs = (each.log_evidence for each in draws)
    assert ours is not None
    assert theirs is not None
    assert mixed.log_bayes_factor[0] == pytest.approx(ours[0] - theirs[0])
    assert mixed.predict(X[:5].float()).mean.shape == (5,)
