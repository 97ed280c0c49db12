"""The prior's precision by the Laplace evidence: closed forms of linear regression, and what is said of it."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import bnnflow as bf
from bnnflow import likelihoods, priors

F64 = torch.float64


def linear(scale: float = 3.0, bias: bool = True, loc: float = 0.0, noise: float | None = 0.5) -> bf.BayesianModel:
    """Return regression whose true weights are far narrower than the prior."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(30, 6, generator=g, dtype=F64)
    y = x @ (0.3 * torch.randn(6, generator=g, dtype=F64)) + 1.0 + 0.5 * torch.randn(30, generator=g, dtype=F64)
    with torch.random.fork_rng(devices=[]):
        net = nn.Linear(6, 1, bias=bias).double()
    return bf.BayesianModel(net, torch.distributions.Normal(loc, scale), likelihoods.Gaussian(noise), x, y)


def log_evidence(model: bf.BayesianModel, precisions: list[float], loc: float = 0.0) -> float:
    """Return the evidence of regression with these precisions of the weights and the bias, in closed form."""
    design = torch.cat([model.x, torch.ones(30, 1, dtype=F64)], 1)[:, : model.dim]
    prior = torch.tensor([precisions[0]] * 6 + precisions[1:], dtype=F64)
    covariance = 0.25 * torch.eye(30, dtype=F64) + design @ (design / prior).T
    return float(MultivariateNormal(loc * design.sum(1), covariance).log_prob(model.y.squeeze()))


def sampled(model: bf.BayesianModel, method: bf.Laplace | None = None, **options) -> bf.Draws:
    return bf.sample(model, method or bf.Laplace(prior_precision="evidence"), seed=0, **{"draws": 2} | options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loc", [0.0, 0.2])
def test_the_tuned_precision_maximises_the_evidence_of_linear_regression(bias: bool, loc: float) -> None:
    model = linear(bias=bias, loc=loc)
    draws = sampled(model)
    found = list(draws.info["prior_precision"].values())
    best = scipy.optimize.minimize(
        lambda logs: -log_evidence(model, list(np.exp(logs)), loc), np.zeros(1 + bias), method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-12},
    )  # fmt: skip
    np.testing.assert_allclose(np.log(found), best.x, rtol=0, atol=1e-3)
    assert draws.info["log_evidence_tuned"] == pytest.approx(-best.fun, abs=1e-6)
    assert draws.log_evidence is not None
    assert draws.log_evidence[0] == pytest.approx(log_evidence(model, [1 / 9] * (1 + bias), loc), abs=1e-6)


def test_draws_are_those_of_the_tuned_model_and_log_joint_is_that_of_the_given_one() -> None:
    model = linear()
    draws = sampled(model, draws=50)
    precisions = draws.info["prior_precision"]
    by_name = {name: torch.distributions.Normal(0.0, p**-0.5) for name, p in precisions.items()}
    tuned = bf.BayesianModel(model.net, priors.PerTensor(by_name), model.likelihood, model.x, model.y)
    there = sampled(tuned, bf.Laplace())
    torch.testing.assert_close(draws.posterior.loc, there.posterior.loc, rtol=0, atol=1e-5)
    torch.testing.assert_close(draws.posterior.scale_tril, there.posterior.scale_tril, rtol=1e-4, atol=1e-5)
    assert there.log_evidence[0] == pytest.approx(draws.info["log_evidence_tuned"], abs=1e-5)
    torch.testing.assert_close(draws.log_joint, model.log_joint(draws.theta))
    assert model.prior.distributions(model.spec)["weight"].scale == 3.0, "the model itself is not changed"


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_prior_that_it_begins_with_does_not_matter(scale: float) -> None:
    found = sampled(linear(scale)).info["prior_precision"]
    expected = sampled(linear(1.0)).info["prior_precision"]
    for name, precision in expected.items():
        assert math.log(found[name]) == pytest.approx(math.log(precision), abs=0.01)


def network(kind: str) -> bf.BayesianModel:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(60, 4, generator=g, dtype=F64)
    y: Tensor = (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    likelihood, out = likelihoods.Categorical(), 3
    if kind == "values":
        y = x[:, 0].sin() + 0.3 * torch.randn(60, generator=g, dtype=F64)
        likelihood, out = likelihoods.Gaussian(), 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, out)).double()
    return bf.BayesianModel(net, priors.Normal(3.0), likelihood, x, y)


@pytest.mark.parametrize("structure", ["full", "diagonal", "last_layer"])
@pytest.mark.parametrize("kind", ["values", "classes"])
@pytest.mark.slow
def test_the_evidence_of_networks_rises(kind: str, structure) -> None:
    model = network(kind)
    method = bf.Laplace(structure, prior_precision="evidence", starts=2, steps=300)
    draws = sampled(model, method, draws=20)
    plain = sampled(model, bf.Laplace(structure, starts=2, steps=300))
    info = draws.info
    tuned = {"2.weight", "2.bias"} if structure == "last_layer" else set(model.spec.network.names)
    assert set(info["prior_precision"]) == tuned
    assert draws.theta.isfinite().all()
    assert draws.log_evidence == plain.log_evidence or math.isnan(draws.log_evidence[1])
    if structure != "last_layer":
        assert info["log_evidence_tuned"] > draws.log_evidence[0] + (1 if kind == "values" else 0)
        assert draws.log_evidence[0] == pytest.approx(plain.log_evidence[0])


@pytest.mark.parametrize(
    ("prior", "message"),
    [(priors.Laplace(1.0), "is for normal priors of fixed scale"), (priors.StudentT(4.0), "is for normal priors"),
     (priors.Hierarchical(), "not Hierarchical")],
)  # fmt: skip
def test_priors_without_a_precision_are_refused(prior, message: str) -> None:
    base = linear()
    model = bf.BayesianModel(base.net, prior, base.likelihood, base.x, base.y)
    with pytest.raises(ValueError, match=message):
        sampled(model)


def test_what_has_no_evidence_is_refused() -> None:
    base = linear()
    model = bf.BayesianModel(base.net, base.prior, base.likelihood, base.x, base.y, temperature=0.5)
    with pytest.raises(ValueError, match="a tempered posterior has no evidence"):
        sampled(model)
    with pytest.raises(ValueError, match="prior_precision must be None for structure='kronecker'"):
        bf.Laplace("kronecker", prior_precision="evidence")
    with pytest.raises(ValueError, match="prior_precision must be one of 'evidence'"):
        bf.Laplace(prior_precision="marglik")  # type: ignore[arg-type]


def test_a_prior_takes_anothers_place() -> None:
    model = linear()
    other = model.with_prior(priors.Normal(0.5))
    theta = torch.ones(2, model.dim, dtype=F64)
    torch.testing.assert_close(
        other.log_joint(theta), bf.BayesianModel(model.net, priors.Normal(0.5), model.likelihood, model.x,
                                                 model.y).log_joint(theta)
    )  # fmt: skip
    assert other.fingerprint() != model.fingerprint()
    with pytest.raises(ValueError, match="inferred parameters"):
        model.with_prior(priors.Hierarchical())
