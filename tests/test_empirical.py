"""The prior's precision by the Laplace evidence: closed forms of linear regression, and what is
said of it.
"""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.inference.approximate.laplace import averaged_precision, gauss_newton_precision
from bnnflow.predictive.metrics import lppd

F64 = torch.float64


def linear(
    scale: float = 3.0, bias: bool = True, loc: float = 0.0, noise: float | None = 0.5
) -> bf.BayesianModel:
    """Return regression whose true weights are far narrower than the prior."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(30, 6, generator=g, dtype=F64)
    y = (
        x @ (0.3 * torch.randn(6, generator=g, dtype=F64))
        + 1.0
        + 0.5 * torch.randn(30, generator=g, dtype=F64)
    )
    with torch.random.fork_rng(devices=[]):
        net = nn.Linear(6, 1, bias=bias).double()
    return bf.BayesianModel(
        net, torch.distributions.Normal(loc, scale), likelihoods.Gaussian(noise), x, y
    )


def log_evidence(
    model: bf.BayesianModel, precisions: list[float], loc: float = 0.0
) -> float:
    """Return the evidence of regression with these precisions of the weights and the bias, in
    closed form.
    """
    design = torch.cat([model.x, torch.ones(30, 1, dtype=F64)], 1)[:, : model.dim]
    prior = torch.tensor([precisions[0]] * 6 + precisions[1:], dtype=F64)
    covariance = 0.25 * torch.eye(30, dtype=F64) + design @ (design / prior).T
    return float(
        MultivariateNormal(loc * design.sum(1), covariance).log_prob(model.y.squeeze())
    )


def sampled(
    model: bf.BayesianModel, method: bf.Laplace | None = None, **options
) -> bf.Draws:
    return bf.sample(
        model,
        method or bf.Laplace(prior_precision="evidence"),
        seed=0,
        **{"draws": 2} | options,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loc", [0.0, 0.2])
def test_the_tuned_precision_maximises_the_evidence_of_linear_regression(
    bias: bool, loc: float
) -> None:
    model = linear(bias=bias, loc=loc)
    draws = sampled(model)
    found = list(draws.info["prior_precision"].values())
    best = scipy.optimize.minimize_scalar(
        lambda log: -log_evidence(model, [math.exp(log)] * (1 + bias), loc),
        options={"xtol": 1e-9},
    )
    np.testing.assert_allclose(np.log(found), [best.x] * (1 + bias), rtol=0, atol=1e-3)
    assert draws.info["log_evidence_tuned"] == pytest.approx(-best.fun, abs=1e-6)
    assert draws.log_evidence is not None
    assert draws.log_evidence[0] == pytest.approx(
        log_evidence(model, [1 / 9] * (1 + bias), loc), abs=1e-6
    )


def test_draws_are_those_of_the_tuned_model_and_log_joint_is_that_of_the_given_one() -> (
    None
):
    model = linear()
    draws = sampled(model, draws=50)
    precisions = draws.info["prior_precision"]
    by_name = {
        name: torch.distributions.Normal(0.0, p**-0.5) for name, p in precisions.items()
    }
    tuned = bf.BayesianModel(
        model.net, priors.PerTensor(by_name), model.likelihood, model.x, model.y
    )
    there = sampled(tuned, bf.Laplace())
    torch.testing.assert_close(draws.posterior.loc, there.posterior.loc, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        draws.posterior.scale_tril, there.posterior.scale_tril, rtol=1e-4, atol=1e-5
    )
    assert there.log_evidence[0] == pytest.approx(
        draws.info["log_evidence_tuned"], abs=1e-5
    )
    torch.testing.assert_close(draws.log_joint, model.log_joint(draws.theta))
    assert model.prior.distributions(model.spec)["weight"].scale == 3.0, (
        "the model itself is not changed"
    )


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


@pytest.mark.crossed
@pytest.mark.parametrize("structure", ["full", "diagonal", "last_layer"])
@pytest.mark.parametrize("kind", ["values", "classes"])
@pytest.mark.slow
def test_the_evidence_of_networks_rises(kind: str, structure) -> None:
    model = network(kind)
    method = bf.Laplace(structure, prior_precision="evidence", starts=2, steps=300)
    draws = sampled(model, method, draws=20)
    plain = sampled(model, bf.Laplace(structure, starts=2, steps=300))
    info = draws.info
    tuned = (
        {"2.weight", "2.bias"}
        if structure == "last_layer"
        else set(model.spec.network.names)
    )
    assert set(info["prior_precision"]) == tuned
    assert draws.theta.isfinite().all()
    assert draws.log_evidence == plain.log_evidence or math.isnan(draws.log_evidence[1])
    if structure != "last_layer":
        assert info["log_evidence_tuned"] >= draws.log_evidence[0] + (
            1 if kind == "values" else 0
        )
        assert draws.log_evidence[0] == pytest.approx(plain.log_evidence[0])


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (priors.Laplace(1.0), "is for normal priors of fixed scale"),
        (priors.StudentT(4.0), "is for normal priors"),
        (priors.Hierarchical(), "not Hierarchical"),
    ],
)
def test_priors_without_a_precision_are_refused(prior, message: str) -> None:
    base = linear()
    model = bf.BayesianModel(base.net, prior, base.likelihood, base.x, base.y)
    with pytest.raises(ValueError, match=message):
        sampled(model)


def test_what_has_no_evidence_is_refused() -> None:
    base = linear()
    model = bf.BayesianModel(
        base.net, base.prior, base.likelihood, base.x, base.y, temperature=0.5
    )
    with pytest.raises(ValueError, match="a tempered posterior has no evidence"):
        sampled(model)
    with pytest.raises(
        ValueError, match="prior_precision must be None for structure='kronecker'"
    ):
        bf.Laplace("kronecker", prior_precision="evidence")
    with pytest.raises(ValueError, match="prior_precision must be one of 'evidence'"):
        bf.Laplace(prior_precision="marglik")  # type: ignore[arg-type]


def test_a_prior_takes_anothers_place() -> None:
    model = linear()
    other = model.with_prior(priors.Normal(0.5))
    theta = torch.ones(2, model.dim, dtype=F64)
    torch.testing.assert_close(
        other.log_joint(theta),
        bf.BayesianModel(
            model.net, priors.Normal(0.5), model.likelihood, model.x, model.y
        ).log_joint(theta),
    )
    assert other.fingerprint() != model.fingerprint()
    with pytest.raises(ValueError, match="inferred parameters"):
        model.with_prior(priors.Hierarchical())


# ---------------------------------------- curvature averaged over the Gaussian


def test_with_normal_noise_averaged_curvature_is_that_at_the_mode() -> None:
    model = network("values")
    options = {"starts": 2, "steps": 300}
    averaged, plain = (
        sampled(model, bf.Laplace(hessian=each, **options)) for each in ("averaged", "ggn")
    )
    torch.testing.assert_close(
        averaged.posterior.scale_tril, plain.posterior.scale_tril, rtol=1e-6, atol=1e-9
    )
    assert averaged.log_evidence == plain.log_evidence or math.isnan(
        averaged.log_evidence[1]
    )


@pytest.mark.parametrize("structure", ["full", "diagonal", "last_layer"])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_averaged_curvature_is_the_fixed_point_of_logistic_regression(
    structure, scale: float
) -> None:
    """1 / variance is the prior's precision and the rows' mean curvature under the Gaussian, by
    quadrature.
    """
    x = scale * torch.tensor([[1.0], [2.0], [-1.5], [3.0]], dtype=F64)
    y = torch.tensor([1, 1, 0, 1])
    with torch.random.fork_rng(devices=[]):
        net = nn.Linear(1, 1, bias=False).double()
    prior = torch.distributions.Normal(0.0, 3.0 / scale)
    model = bf.BayesianModel(net, prior, likelihoods.Bernoulli(), x, y)
    polished = bf.sample(
        model,
        bf.Laplace(structure, hessian="averaged"),
        init=2 * torch.ones(1) / scale,
        draws=2,
        seed=0,
    )
    gaussian = polished.posterior.free if structure == "last_layer" else polished.posterior
    mode, sd = polished.posterior.loc, gaussian.scale_tril.squeeze()
    nodes, weights = (
        torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(60)
    )
    p = torch.sigmoid(x * (mode + sd * nodes))
    curvature = (x.square() * p * (1 - p)).sum(0) @ weights / weights.sum()
    assert float(1 / sd.square()) == pytest.approx(
        float((scale / 3) ** 2 + curvature), rel=0.1
    )


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Poisson(),
        likelihoods.StudentT(4.0),
        likelihoods.HeteroscedasticGaussian(),
        likelihoods.Ordinal(3),
        likelihoods.Categorical(),
    ],
)
def test_averaged_curvature_of_every_likelihood(likelihood, seeded) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, generator=g, dtype=F64)
    y = (
        x[:, 0]
        if likelihood.kind == "regression" and not getattr(likelihood, "discrete", False)
        else None
    )
    y = torch.arange(12) % 3 if y is None else y
    outputs = {"HeteroscedasticGaussian": 2, "Categorical": 3}.get(
        type(likelihood).__name__, 1
    )
    with seeded(0):
        net = nn.Linear(2, outputs).double()
    model = bf.BayesianModel(net, priors.Normal(1.0), likelihood, x, y)
    at = 0.1 * model.sample_prior(1, 0)[0]
    found = averaged_precision(model, at, model.spec.names)
    root = torch.linalg.cholesky(found)
    noise = torch.randn(4000, model.dim, generator=g, dtype=F64)
    changes = torch.linalg.solve_triangular(root, noise, upper=False, left=False)
    again = gauss_newton_precision(model, at, changes=changes)
    whitened = torch.linalg.solve_triangular(
        root, torch.linalg.solve_triangular(root, again, upper=False).T, upper=False
    )
    torch.testing.assert_close(whitened, torch.eye(model.dim, dtype=F64), rtol=0, atol=0.3)


def test_a_sure_classifier_predicts_better_by_averaged_curvature(seeded) -> None:
    """At the mode of separable classes there is hardly any curvature: its Gaussian is far too
    wide.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=g, dtype=F64)
    y = (x[:, :3] @ torch.eye(3, dtype=F64) * 3).argmax(1)
    with seeded(0):
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model = bf.BayesianModel(
        net, priors.Normal(3.0), likelihoods.Categorical(), x[:200], y[:200]
    )
    scores = {}
    for hessian in ("ggn", "averaged"):
        draws = sampled(model, bf.Laplace(hessian=hessian, starts=2, steps=300), draws=100)
        prediction = bf.predict(model.linearised(draws.posterior.loc), draws, x[200:])
        scores[hessian] = lppd(prediction, y[200:])
    assert scores["averaged"] > scores["ggn"] + 0.02


def test_the_tuned_factor_is_a_fixed_point_of_mackay() -> None:
    """The prior's precision times the squared weights is the number of weights that the data
    decide.
    """
    draws = sampled(linear(), draws=2)
    covariance = draws.posterior.scale_tril @ draws.posterior.scale_tril.T
    (a,) = {round(each, 9) for each in draws.info["prior_precision"].values()}
    decided = len(covariance) - a * float(covariance.trace())
    assert a * float(draws.posterior.loc.square().sum()) == pytest.approx(decided, rel=1e-3)
