"""Priors with inferred parameters and empirical ones: densities against closed forms, samples,
groups and storage.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
from pyro import condition, plate, poutine
from scipy import stats
from torch import Tensor, nn

from bnnflow import (
    BayesianModel,
    Draws,
    GaussNewtonFlow,
    WeightSpec,
    align,
    fit_flow,
    likelihoods,
    load,
    predict,
    priors,
    sample,
)
from bnnflow.inference import HMC
from bnnflow.model.priors.marginals import rebuild
from bnnflow.model.quantiles import QuantileTable
from bnnflow.symmetry import match, sort_units
from bnnflow.transport import Solver, Training
from bnnflow.transport.whitened import WhitenedPosterior
from tests.problems import one_in

F64 = torch.float64


@dataclass(frozen=True)
class OneScale:
    """One inferred scale for all weights, and an inferred mean: what a user writes in ten lines."""

    def parameters(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return {"scale": td.Gamma(2.0, 2.0), "mean": td.Normal(0.0, 0.1)}

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, td.Distribution]:
        scale, mean = parameters["scale"], parameters["mean"]  # (..., 1)
        ones = {name: (1,) * len(shape) for name, shape in spec.shapes.items()}
        lead = scale.shape[:-1]
        return {
            n: td.StudentT(5.0, mean.reshape(*lead, *o), scale.reshape(*lead, *o))
            for n, o in ones.items()
        }


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module], dtype: torch.dtype = F64) -> nn.Module:
    """Build a network from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().to(dtype)


def perceptron(dtype: torch.dtype = F64) -> nn.Module:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)
        )

    return built(make, dtype)


def conv() -> nn.Module:
    return built(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(3, 1))
    )


PRIORS: dict[str, Any] = {
    "hierarchical": priors.Hierarchical(),
    "hierarchical, fan in": priors.Hierarchical(td.HalfCauchy(0.7), fan_in=True),
    "horseshoe": priors.Horseshoe(),
    "outputs": priors.OutputScales(scale=0.7),
    "horseshoe of weights": priors.Horseshoe(0.3, 1.5, 5.0, local="weight", bias_scale=0.5),
    "a user's": OneScale(),
}


def model_of(
    prior: Any,
    *,
    net: nn.Module | None = None,
    learned: bool = True,
    dtype: torch.dtype = F64,
    **options: Any,
) -> BayesianModel:
    net = perceptron() if net is None else net
    x = torch.randn(
        9,
        *((2, 2, 2) if isinstance(net[0], nn.Conv2d) else (2,)),
        generator=generator(1),
        dtype=F64,
    )  # type: ignore[index]
    y = torch.randn(9, 1, generator=generator(2), dtype=F64)
    likelihood = likelihoods.Gaussian() if learned else likelihoods.Gaussian(0.3)
    return BayesianModel(net.to(dtype), prior, likelihood, x.to(dtype), y, **options)


def points(model: BayesianModel, *shape: int, seed: int = 3) -> Tensor:
    return 0.7 * torch.randn(*shape, model.dim, generator=generator(seed), dtype=F64).to(
        model.dtype
    )


def autograd(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(function(theta).sum(), theta)[0]


# ---------------------------------------- densities


def test_layout_is_weights_then_prior_then_likelihood() -> None:
    model = model_of(priors.Hierarchical())
    names = model.spec.network.names
    assert model.spec.extras == (
        *(f"prior.log_scale.{name}" for name in names),
        "likelihood.log_scale",
    )
    assert model.spec.dim == model.dim == model.spec.network.dim + 7
    assert model_of(OneScale()).spec.extras == (
        "prior.log_scale",
        "prior.mean",
        "likelihood.log_scale",
    )
    spec = model_of(priors.Horseshoe()).spec
    assert spec.shapes["prior.log_local.2.weight"] == (1, 4)
    assert spec.axes["prior.log_local.2.weight"] == (None, "h1")


@pytest.mark.parametrize("fan_in", [False, True])
def test_hierarchical_density(fan_in: bool) -> None:
    model = model_of(
        priors.Hierarchical(td.HalfNormal(torch.tensor(0.8, dtype=F64)), fan_in),
        learned=False,
    )
    theta = points(model, 1)[0]
    params = {name: value.numpy() for name, value in model.spec.unflatten(theta).items()}
    expected = 0.0
    for name in model.spec.network.names:
        shape, log_scale = params[name].shape, float(params[f"prior.log_scale.{name}"][0])
        scale = math.exp(log_scale) / (
            math.sqrt(shape[1]) if fan_in and len(shape) > 1 else 1.0
        )
        expected += stats.norm.logpdf(params[name], 0, scale).sum()
        expected += stats.halfnorm.logpdf(math.exp(log_scale), scale=0.8) + log_scale
    assert float(model.log_prior(theta)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("local", ["unit", "weight"])
def test_horseshoe_density(local: Any) -> None:
    model = model_of(priors.Horseshoe(0.3, 1.5, 5.0, local, bias_scale=0.6), learned=False)
    theta = points(model, 1)[0]
    params = {name: value.numpy() for name, value in model.spec.unflatten(theta).items()}
    expected = 0.0
    for name in model.spec.network.names:
        w = params[name]
        if w.ndim == 1:
            expected += stats.norm.logpdf(w, 0, 0.6).sum()
            continue
        logs = {
            key: params[f"prior.log_{key}.{name}"] for key in ("global", "local", "slab")
        }
        tau, lam, c2 = (np.exp(logs[key]) for key in ("global", "local", "slab"))
        assert lam.shape == (w.shape if local == "weight" else (1, w.shape[1]))
        # Piironen & Vehtari (2017), equation 2.8
        regularised = c2 * lam**2 / (c2 + tau**2 * lam**2)
        expected += stats.norm.logpdf(w, 0, tau * np.sqrt(regularised)).sum()
        expected += (
            stats.halfcauchy.logpdf(tau, scale=0.3).sum()
            + stats.halfcauchy.logpdf(lam).sum()
        )
        expected += stats.invgamma.logpdf(c2, 2.5, scale=2.5 * 1.5**2).sum()
        expected += sum(each.sum() for each in logs.values())
    assert float(model.log_prior(theta)) == pytest.approx(expected, rel=1e-12)


def test_density_of_a_users_prior() -> None:
    model = model_of(OneScale(), learned=False)
    theta = points(model, 1)[0]
    weights, (log_scale, mean) = theta[:-2], theta[-2:]
    scale = log_scale.exp()
    expected = td.StudentT(5.0, mean, scale).log_prob(weights).sum() + td.Normal(
        0.0, 0.1
    ).log_prob(mean)
    expected += td.Gamma(2.0, 2.0).log_prob(scale) + log_scale
    torch.testing.assert_close(model.log_prior(theta), expected)


@pytest.mark.parametrize("source", ["perceptron", "conv"])
@pytest.mark.parametrize("name", PRIORS)
def test_gradients_are_those_of_autograd(name: str, source: str) -> None:
    model = model_of(
        PRIORS[name], net=conv() if source == "conv" else None, temperature=0.7
    )
    theta = points(model, 2, 3)
    value, grad = model.flat_prior.log_prob_and_grad(theta)
    torch.testing.assert_close(value, model.log_prior(theta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, autograd(model.log_prior, theta), rtol=1e-9, atol=1e-9)
    assert value.shape == (2, 3)
    assert value.dtype == F64
    value, grad = model.log_joint_and_grad(theta)
    torch.testing.assert_close(value, model.log_joint(theta), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, autograd(model.log_joint, theta), rtol=1e-9, atol=1e-9)

    single = model.to(dtype=torch.float32)
    value32, grad32 = single.log_joint_and_grad(theta.float())
    assert grad32.dtype == torch.float32
    torch.testing.assert_close(value32, value, rtol=1e-4, atol=1e-3)
    assert (grad32 - grad).abs().max() < 1e-4 * grad.abs().max()


@pytest.mark.parametrize("name", PRIORS)
def test_gradient_is_differentiable_again(name: str) -> None:
    prior = model_of(PRIORS[name]).flat_prior
    theta, vector = (points(model_of(PRIORS[name]), 2, seed=seed) for seed in (3, 7))
    leaf = theta.clone().requires_grad_()
    gradient = torch.autograd.grad(prior.log_prob(leaf).sum(), leaf, create_graph=True)[0]
    expected = torch.autograd.grad((gradient * vector).sum(), leaf)[0]
    found = torch.func.jvp(
        lambda each: prior.log_prob_and_grad(each)[1], (theta,), (vector,)
    )[1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("source", ["perceptron", "conv"])
@pytest.mark.parametrize("name", [name for name in PRIORS if name != "a user's"])
def test_closed_forms_are_the_generic_ones(name: str, source: str) -> None:
    model = model_of(PRIORS[name], net=conv() if source == "conv" else None)
    closed = model.flat_prior.weights
    generic = copy.copy(closed)
    generic.closed_scales = None
    theta = points(model, 4)[:, : closed.spec.dim]
    for found, expected in zip(
        closed.log_prob_and_grad(theta), generic.log_prob_and_grad(theta), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    owner, places, offset = closed.shared
    # the last for what there is not
    padded = torch.cat([theta, torch.zeros(4, 1, dtype=F64)], 1)
    wide = offset + padded[:, places[:, 0]] + padded[:, places[:, 1]]
    bounded = -0.5 * torch.logaddexp(-padded[:, places[:, 2]], -2 * wide)
    scales = torch.where(places[:, 2] < 0, wide, bounded)[:, owner]
    torch.testing.assert_close(
        scales, closed.closed_scales(theta)[0], rtol=1e-11, atol=1e-11
    )


SCALE_PRIORS = [
    td.HalfNormal(0.5),
    td.HalfCauchy(0.5),
    td.LogNormal(-1.0, 0.5),
    td.Gamma(2.0, 3.0),
    td.InverseGamma(3.0, 2.0),
    td.Exponential(2.0),
    td.Weibull(1.0, 2.0),
]


@pytest.mark.parametrize("scale_prior", SCALE_PRIORS, ids=lambda d: type(d).__name__)
def test_slopes_of_scale_priors(scale_prior: td.Distribution) -> None:
    model = model_of(priors.Hierarchical(scale_prior))
    theta = points(model, 3)
    value, grad = model.flat_prior.log_prob_and_grad(theta)
    torch.testing.assert_close(value, model.log_prior(theta))
    torch.testing.assert_close(
        grad, autograd(model.log_prior, theta), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", PRIORS)
def test_overflowing_scales_raise_nothing(name: str) -> None:
    model = model_of(PRIORS[name])
    for far in (1e4, -1e4, math.nan):
        value, grad = model.log_joint_and_grad(torch.full((2, model.dim), far, dtype=F64))
        assert not value.isfinite().any()
        assert grad.shape == (2, model.dim)


# ---------------------------------------- samples


@pytest.mark.parametrize("name", PRIORS)
def test_weights_are_drawn_given_the_parameters(name: str) -> None:
    model = model_of(PRIORS[name])
    draws = model.sample_prior(3000, seed=1)
    assert draws.shape == (3000, model.dim)
    assert torch.equal(draws[:5], model.sample_prior(3000, seed=1)[:5])
    params = model.spec.unflatten(draws)
    for extra in model.hyperparameters:
        law = td.Independent(extra.distribution.expand(extra.shape), 0)
        values = extra.value(params[extra.name]).flatten(1)[:, 0]
        reference = law.base_dist
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(5)
            other = reference.sample((3000,)).reshape(3000, -1)[:, 0]
        assert stats.ks_2samp(values.numpy(), other.numpy()).pvalue > 1e-4
    given = {
        e.key: e.value(params[e.name]) for e in model.hyperparameters if e.owner == "prior"
    }
    conditional = model.prior.conditional(model.spec.network, given)
    for tensor, law in conditional.items():
        standard = (params[tensor] - law.mean) / law.scale  # a pivot
        pivot = stats.t(5.0) if isinstance(law, td.StudentT) else stats.norm()
        first = standard.flatten(1)[:, -1]
        assert stats.kstest(first.numpy(), pivot.cdf).pvalue > 1e-4


def test_horseshoe_shrinks_most_and_leaves_some() -> None:
    wide = model_of(priors.Normal(1.0)).sample_prior(4000, 0)
    sparse = model_of(priors.Horseshoe(0.1)).sample_prior(4000, 0)
    ratio = lambda w: float(w[:, :8].abs().quantile(0.99) / w[:, :8].abs().median())  # noqa: E731
    assert ratio(sparse) > 5 * ratio(wide)
    assert sparse[:, :8].abs().quantile(0.99) < 8  # the slab


def test_hmc_finds_the_scale_of_the_weights() -> None:
    """Without a likelihood to speak of, chains on theta sample the prior: its scales are
    half-normal.
    """
    net = built(lambda: nn.Linear(1, 1))
    x = torch.tensor([[1.0], [2.0]], dtype=F64)
    likelihood = likelihoods.Gaussian(1e6)
    model = BayesianModel(
        net, priors.Hierarchical(td.LogNormal(0.0, 0.3)), likelihood, x, x
    )
    draws = sample(model, HMC(), chains=4, warmup=300, draws=1500, seed=0, progress=False)
    logs = draws.flat[:, -2:]
    assert (logs.mean(0).abs() < 0.06).all()
    assert ((logs.std(0) - 0.3).abs() < 0.05).all()


# ---------------------------------------- other views


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("source", ["perceptron", "conv"])
@pytest.mark.parametrize("name", PRIORS)
def test_pyro_sees_the_same_density(name: str, source: str, temperature: float) -> None:
    model = model_of(
        PRIORS[name], net=conv() if source == "conv" else None, temperature=temperature
    )
    theta = points(model, 4)
    positive = [extra for extra in model.hyperparameters if extra.positive]

    def sites(each: Tensor) -> dict[str, Tensor]:
        params = model.spec.unflatten(each)
        return {n: params[n] for n in model.spec.network.names} | {
            extra.site: extra.value(params[extra.name]) for extra in model.hyperparameters
        }

    log_jacobian = sum(
        theta[:, model.spec.slices[extra.name]].sum(-1) for extra in positive
    )
    for row in range(4):
        trace = poutine.trace(condition(model.to_pyro(), sites(theta[row]))).get_trace()
        torch.testing.assert_close(
            trace.log_prob_sum() + log_jacobian[row], model.log_joint(theta[row])
        )

    def batched() -> None:
        with plate("particles", 4, dim=-1):
            model.to_pyro()()

    trace = poutine.trace(condition(batched, sites(theta))).get_trace()
    trace.compute_log_prob()
    total = sum(
        site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"
    )
    torch.testing.assert_close(total + log_jacobian, model.log_joint(theta))


@pytest.mark.parametrize("name", PRIORS)
def test_pyro_draws_what_the_prior_says(name: str) -> None:
    model = model_of(PRIORS[name], dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        trace = poutine.trace(model.to_pyro()).get_trace()
    drawn = {
        n: s["value"]
        for n, s in trace.nodes.items()
        if s["type"] == "sample" and not s["is_observed"]
    }
    assert {
        n: tuple(v.shape) for n, v in drawn.items() if n in model.spec.network.names
    } == model.spec.network.shapes
    assert {value.dtype for value in drawn.values()} == {torch.float32}


@dataclass(frozen=True)
class LaplaceScale:
    """Weights with heavier tails than normal ones, whose scale and centre are inferred."""

    def parameters(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return {"scale": td.HalfNormal(1.0), "mean": td.Normal(0.0, 0.1)}

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, td.Distribution]:
        scale, mean = parameters["scale"], parameters["mean"]  # (..., 1)
        lead, ones = (
            scale.shape[:-1],
            {name: (1,) * len(shape) for name, shape in spec.shapes.items()},
        )
        return {
            n: td.Laplace(mean.reshape(*lead, *o), scale.reshape(*lead, *o))
            for n, o in ones.items()
        }


COORDINATES = {name: PRIORS[name] for name in PRIORS if name != "a user's"} | {
    "laplace": LaplaceScale(),
    "student": priors.StudentT(3.0),
}


@pytest.mark.parametrize("name", COORDINATES)
def test_prior_with_parameters_is_standard_normal_in_its_coordinates(name: str) -> None:
    model = model_of(COORDINATES[name])
    prior = model.flat_prior
    prior.require_coordinates()
    z = torch.randn(5, model.dim, generator=generator(), dtype=F64)
    theta = prior.from_normal(z)
    torch.testing.assert_close(prior.to_normal(theta), z, rtol=1e-8, atol=1e-8)
    log_normal = -0.5 * (z * z).sum(-1) - 0.5 * model.dim * math.log(2 * math.pi)
    jacobian = torch.func.jacrev(prior.from_normal)(z[0])
    torch.testing.assert_close(
        prior.log_prob(theta)[0], log_normal[0] - torch.linalg.slogdet(jacobian)[1]
    )
    torch.testing.assert_close(
        prior.log_jacobian(theta), prior.log_prob(theta) - log_normal
    )
    v = torch.randn(5, model.dim, generator=generator(1), dtype=F64)
    torch.testing.assert_close(prior.jvp(z, v)[0], jacobian @ v[0])
    torch.testing.assert_close(prior.vjp(z, v)[0], jacobian.T @ v[0])
    # rows of a factor
    torch.testing.assert_close(prior.vjp(z[:1, None], v[None])[0, 3], jacobian.T @ v[3])
    # Again differentiable, backwards and forwards.
    second = torch.func.jacrev(lambda at: prior.vjp(at, v[:1])[0])(z[:1])[:, 0]
    expected = torch.func.hessian(lambda at: (prior.from_normal(at) * v[0]).sum())(z[0])
    torch.testing.assert_close(second, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        torch.func.jacfwd(lambda at: prior.vjp(at, v[0]))(z[0]),
        expected,
        rtol=1e-6,
        atol=1e-8,
    )


@pytest.mark.parametrize("name", one_in(2, COORDINATES))
def test_flow_from_a_prior_with_parameters_has_the_posteriors_gradient_and_its_density(
    name: str,
) -> None:
    model = model_of(COORDINATES[name])
    context, z = (
        WhitenedPosterior(model),
        torch.randn(3, model.dim, generator=generator(), dtype=F64, requires_grad=True),
    )
    theta = model.flat_prior.from_normal(z)
    u = (
        model.log_joint(theta)
        - model.flat_prior.log_jacobian(theta)
        + 0.5 * (z * z).sum(-1)
    )
    (expected,) = torch.autograd.grad(u.sum(), z)
    torch.testing.assert_close(context.grad(z.detach()), expected, rtol=1e-6, atol=1e-7)
    grad, factor = context.at(z.detach()).grad_and_factor()
    same, product = context.at(z.detach()).grad_and_product()
    v = torch.randn(3, model.dim, generator=generator(1), dtype=F64)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(same, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        product(v), torch.einsum("brd,bre,be->bd", factor, factor, v), rtol=1e-7, atol=1e-7
    )
    # Of data that say little, so that few steps follow the flow.
    vague = likelihoods.Gaussian(scale_prior=td.LogNormal(0.7, 0.3))
    model = BayesianModel(perceptron(), COORDINATES[name], vague, model.x[:4], model.y[:4])
    flow = GaussNewtonFlow(model, solver=Solver("rk4", 5))
    theta, log_q = flow.sample_with_log_prob(1, 0)
    jacobian = torch.func.jacrev(lambda x0: flow.forward(x0)[0])(flow.start(1, 0))[:, 0]
    x0 = flow.start(1, 0)[0]
    log_normal = -0.5 * (x0 * x0).sum() - 0.5 * model.dim * math.log(2 * math.pi)
    torch.testing.assert_close(
        log_q[0], log_normal - torch.linalg.slogdet(jacobian)[1], rtol=0, atol=0.05
    )


def test_flow_from_a_prior_with_parameters_is_fitted_stored_and_needs_its_model(
    tmp_path: Path,
) -> None:
    model = model_of(PRIORS["hierarchical"], dtype=torch.float32)
    flow = fit_flow(
        model,
        model.sample_prior(50, 0),
        velocity="weights",
        training=Training(steps=2, batch_size=8),
    )
    path = flow.save(tmp_path / "flow")
    torch.testing.assert_close(
        load(path, model).sample(3, 0), flow.sample(3, 0), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="needs its model"):
        load(path)


def test_transports_from_conditionals_without_inverse_cdf_are_refused() -> None:
    with pytest.raises(
        ValueError, match="a transport from a StudentT prior needs its cdf and inverse cdf"
    ):
        model_of(PRIORS["a user's"]).flat_prior.require_coordinates()


TABULATED = {
    "t": td.StudentT(
        torch.tensor([1.0, 2.5, 30.0, 2.5]),
        torch.tensor([0.0, -1.0, 2.0, 0.0]),
        torch.ones(4) / 2,
    ),
    "gamma": td.Gamma(torch.tensor([0.3, 2.0, 40.0]), torch.tensor([1.0, 0.1, 7.0])),
    "invgamma": td.InverseGamma(
        torch.tensor([0.6, 2.0, 15.0]), torch.tensor([1.0, 3.0, 0.2])
    ),
    "chi2": td.Chi2(torch.tensor([1.0, 5.0, 5.0])),
}


@pytest.mark.parametrize("name", TABULATED)
def test_tabulated_quantiles_are_scipys_in_both_tails(name: str) -> None:
    distribution = rebuild(TABULATED[name], lambda v: v.double())
    size = distribution.batch_shape[0]
    table, family = QuantileTable(distribution), getattr(stats, name)
    z = torch.linspace(-8.3, 8.3, 997, dtype=F64)[:, None].repeat(1, size)
    got = table.from_normal(z)
    value = got if name == "t" else got.exp()
    for i in range(size):
        shape = (distribution.df if name in ("t", "chi2") else distribution.concentration)[
            i
        ].item()
        loc, scale = 0.0, 1.0
        if name == "t":
            loc, scale = distribution.loc[i].item(), distribution.scale[i].item()
        elif name != "chi2":
            scale = distribution.rate[i].item() ** (1 if name == "invgamma" else -1)
        law, p = (
            family(shape, loc=loc, scale=scale),
            stats.norm.cdf(-np.abs(z[:, i].numpy())),
        )
        expected = np.where(z[:, i].numpy() <= 0, law.ppf(p), law.isf(p))
        np.testing.assert_allclose(
            value[:, i].numpy() - loc, expected - loc, rtol=1e-8, atol=1e-9 * scale
        )
    torch.testing.assert_close(table.to_normal(got), z, rtol=0, atol=1e-9)
    slope = torch.func.jvp(table.from_normal, (z,), (torch.ones_like(z),))[1]
    # of what the table maps to
    log_density = distribution.log_prob(value) + (0 if name == "t" else got)
    log_normal = -0.5 * z * z - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(log_density + slope.log(), log_normal, rtol=1e-7, atol=1e-6)
    back = torch.func.jvp(table.to_normal, (got,), (torch.ones_like(z),))[1]
    torch.testing.assert_close(back * slope, torch.ones_like(z), rtol=1e-9, atol=1e-9)


def test_shapes_whose_quantiles_underflow_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"quantiles of a Gamma prior of shape 0\.01 underflow"
    ):
        QuantileTable(td.Gamma(torch.tensor([0.01]), torch.tensor([1.0])))


def test_fingerprint_tells_priors_apart() -> None:
    variants = [
        priors.Normal(),
        *PRIORS.values(),
        priors.Hierarchical(fan_in=True),
        priors.Hierarchical(td.HalfNormal(2.0)),
        priors.Horseshoe(0.2),
        priors.Horseshoe(slab_scale=3.0),
        priors.Horseshoe(slab_df=3.0),
        priors.Horseshoe(bias_scale=2.0),
        priors.Horseshoe(local="weight"),
        priors.Empirical(perceptron()),
    ]
    prints = [model_of(prior).fingerprint() for prior in variants]
    assert len(set(prints)) == len(prints)
    single = model_of(priors.Horseshoe(), dtype=torch.float32)
    assert (
        single.to(dtype=F64).fingerprint() == single.fingerprint() == single.fingerprint()
    )


@pytest.mark.parametrize("name", PRIORS)
def test_a_networks_parameters_are_at_their_mode(name: str) -> None:
    model = model_of(PRIORS[name])
    net = built(
        lambda: nn.Sequential(
            nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)
        )
    )
    theta = model.theta_of(net)
    start = model.spec.network.dim
    assert torch.equal(
        theta[:start], torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    )
    assert theta[-1] == pytest.approx(math.log(0.1))
    grad = autograd(model.log_prior, theta)[start:-1]
    interior = theta[start:-1].abs() < 4.9
    assert (grad[interior].abs() < 1e-3).all()
    assert interior.any()


def test_the_scale_of_a_layer_of_zeros_is_bounded() -> None:
    net = perceptron()
    with torch.no_grad():
        net[0].bias.zero_()  # type: ignore[index]
    model = model_of(priors.Hierarchical())
    theta = model.theta_of(net)
    assert theta.isfinite().all()
    assert -5 <= theta[model.spec.slices["prior.log_scale.0.bias"]] <= -4
    assert model.log_joint(theta).isfinite()


# ---------------------------------------- symmetries

GROUPS = {  # permutations and signs that stay, of a tanh network with two hidden layers
    "hierarchical": ({"h1", "h2"}, {"h1", "h2"}),
    "hierarchical, fan in": ({"h1", "h2"}, {"h1", "h2"}),
    "horseshoe": ({"h1", "h2"}, {"h1", "h2"}),
    "outputs": ({"h1", "h2"}, {"h1", "h2"}),
    "horseshoe of weights": ({"h1", "h2"}, {"h1", "h2"}),
    "a user's": ({"h1", "h2"}, set()),  # its mean breaks the symmetry of sign
}


@pytest.mark.parametrize("name", PRIORS)
def test_random_symmetries_keep_the_density(name: str) -> None:
    model = model_of(PRIORS[name])
    group = model.symmetries()
    assert (group.permutation, group.sign, group.scale) == (*GROUPS[name], frozenset())
    theta = points(model, 5)
    moved = model.spec.random_symmetry(theta, 2, model.symmetries())
    assert not torch.allclose(moved, theta)
    torch.testing.assert_close(model.outputs(moved), model.outputs(theta))
    torch.testing.assert_close(
        model.log_prior(moved), model.log_prior(theta), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        model.log_joint(moved), model.log_joint(theta), rtol=1e-10, atol=1e-10
    )


@dataclass(frozen=True)
class Unlabelled:
    """A scale for every unit of the first layer, under a name that says nothing of its tensor."""

    uneven: bool = False
    name: str = "scale"

    def parameters(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return {
            self.name: td.HalfNormal(
                torch.linspace(1, 2, 4) if self.uneven else torch.ones(4)
            )
        }

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, td.Distribution]:
        everywhere = {name: td.Normal(0.0, 1.0) for name in spec.names}
        return everywhere | {"0.bias": td.Normal(0.0, parameters[self.name])}


def test_scales_that_do_not_move_with_the_units_shrink_the_group() -> None:
    for prior in (Unlabelled(), Unlabelled(uneven=True, name="scale.0.bias")):
        model = model_of(prior)
        assert model.symmetries().permutation == {"h2"}
        assert model.symmetries().sign == {"h1", "h2"}
    assert model_of(Unlabelled(name="scale.0.bias")).symmetries().permutation == {
        "h1",
        "h2",
    }


def test_local_scales_follow_their_units() -> None:
    model = model_of(priors.Horseshoe())
    theta = points(model, 1)
    perm = torch.tensor([2, 0, 3, 1])
    before = model.spec.unflatten(theta)
    after = model.spec.unflatten(model.spec.permute(theta, {"h1": perm}))
    assert torch.equal(
        after["prior.log_local.2.weight"], before["prior.log_local.2.weight"][..., perm]
    )
    assert torch.equal(
        after["prior.log_global.2.weight"], before["prior.log_global.2.weight"]
    )
    flipped = model.spec.unflatten(
        model.spec.flip(theta, {"h1": torch.tensor([1.0, -1.0, 1.0, -1.0])})
    )
    for name in model.spec.extras:
        assert torch.equal(flipped[name], before[name])


@pytest.mark.parametrize("name", ["hierarchical", "horseshoe", "horseshoe of weights"])
def test_alignment_keeps_function_and_density(name: str) -> None:
    model = model_of(PRIORS[name])
    theta = points(model, 1)
    orbit = model.spec.random_symmetry(theta.expand(20, -1), 4, model.symmetries())
    aligned = align(model, orbit)
    torch.testing.assert_close(aligned, aligned[:1].expand(20, -1))
    torch.testing.assert_close(model.log_joint(aligned), model.log_joint(orbit))
    torch.testing.assert_close(match(orbit, model.spec, theta[0]), theta.expand(20, -1))
    canonical = sort_units(orbit, model.spec, group=model.symmetries())
    torch.testing.assert_close(canonical, canonical[:1].expand(20, -1))


# ---------------------------------------- empirical


def test_empirical_moments_of_a_network() -> None:
    net = perceptron()
    model = model_of(priors.Empirical(net))
    spec = model.spec.network
    for name, law in model.prior.distributions(spec).items():
        values = dict(net.named_parameters())[name].detach()
        if values.numel() == 1:
            assert (float(law.loc), float(law.scale)) == (
                0,
                pytest.approx(float(values.abs())),
            )
        else:
            torch.testing.assert_close(law.loc, values.mean())
            torch.testing.assert_close(law.scale, values.std(correction=0))
    assert model.symmetries().permutation == {"h1", "h2"}
    assert model.log_joint(points(model, 2)).isfinite().all()
    model.flat_prior.require_coordinates()


def test_empirical_moments_of_draws() -> None:
    spec = WeightSpec.of(perceptron())
    theta = (
        torch.randn(4, 50, spec.dim, generator=generator(), dtype=F64)
        * torch.linspace(0.5, 2, spec.dim)
        + 1
    )
    flat = theta.flatten(0, 1)
    laws = priors.Empirical(theta, per="weight").distributions(spec)
    torch.testing.assert_close(
        torch.cat([law.loc.flatten() for law in laws.values()]), flat.mean(0)
    )
    torch.testing.assert_close(
        torch.cat([law.scale.flatten() for law in laws.values()]), flat.std(0, correction=0)
    )
    assert not priors.Empirical(theta, per="weight").symmetries(spec).permutation
    around_zero = priors.Empirical(theta, zero_mean=True)
    for name, law in around_zero.distributions(spec).items():
        torch.testing.assert_close(
            law.scale, flat[:, spec.slices[name]].square().mean().sqrt()
        )
    assert around_zero.symmetries(spec).sign == {"h1", "h2"}


def test_empirical_from_files(tmp_path: Path) -> None:
    net, spec = perceptron(), WeightSpec.of(perceptron())
    expected = priors.Empirical(net).distributions(spec)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    with_extra = torch.cat([theta, torch.zeros(1)]).reshape(1, 1, -1)
    path = Draws(with_extra, torch.zeros(1, 1, dtype=F64)).save(tmp_path / "draws.npz")
    for prior in (
        priors.Empirical.from_file(tmp_path / "net.pt"),
        priors.Empirical.from_file(path, extras=1),
    ):
        for name, law in prior.distributions(spec).items():
            torch.testing.assert_close(law.loc, expected[name].loc)
            torch.testing.assert_close(law.scale, expected[name].scale)
    with pytest.raises(
        ValueError,
        match=r"have 32 entries, the network 31; .* say how many with extras=, got 0",
    ):
        model_of(priors.Empirical.from_file(path))
    weighted = Draws(
        with_extra, torch.zeros(1, 1, dtype=F64), log_weights=torch.zeros(1, 1)
    )
    with pytest.raises(ValueError, match="weighted draws; resample"):
        priors.Empirical.from_file(weighted.save(tmp_path / "weighted.npz"))


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_files_of_weights_execute_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"0.weight": Malicious()}, "bad.pt")
    with pytest.raises(ValueError, match="no file of weights"):
        priors.Empirical.from_file("bad.pt")
    assert not Path("executed").exists()
    Path("text.pt").write_text("not weights")
    with pytest.raises(ValueError, match="no file of weights"):
        priors.Empirical.from_file("text.pt")
    torch.save([1, 2], "list.pt")
    with pytest.raises(ValueError, match="must hold a state_dict"):
        priors.Empirical.from_file("list.pt")
    with pytest.raises(FileNotFoundError):
        priors.Empirical.from_file("absent.pt")


# ---------------------------------------- refusals


@dataclass(frozen=True)
class Broken:
    """A prior with parameters that makes one mistake."""

    given: Callable[[Tensor], dict[str, td.Distribution]]

    def parameters(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return {"scale": td.HalfNormal(1.0)}

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, td.Distribution]:
        return dict.fromkeys(spec.names, td.Normal(0.0, 1.0)) | self.given(
            parameters["scale"]
        )


@dataclass(frozen=True)
class NoParameters:
    def parameters(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return {}

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, td.Distribution]:
        return dict.fromkeys(spec.names, td.Normal(0.0, 1.0))


@dataclass(frozen=True)
class Half:
    def parameters(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return {}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown tensor": (
        lambda: Broken(lambda s: {"9.bias": td.Normal(0.0, 1.0)}),
        r"\['9.bias'\] are not both",
    ),
    "support": (
        lambda: Broken(lambda s: {"0.bias": td.HalfNormal(1.0)}),
        "'0.bias': HalfNormal is not elementwise",
    ),
    "axes": (
        lambda: Broken(lambda s: {"0.weight": td.Normal(0.0, s)}),
        r"shape \(2, 1\).* broadcast to \(2, 4, 2\)",
    ),
    "nothing to infer": (NoParameters, "NoParameters has no parameters to infer"),
    "half a prior": (Half, "prior must be a Prior"),
    "bounded scale": (
        lambda: priors.Hierarchical(td.Uniform(0.0, 1.0)),
        "must have the real line",
    ),
    "no weights": (lambda: priors.Empirical({}), r"lack \['0.weight'"),
    "wrong shapes": (
        lambda: priors.Empirical(built(lambda: nn.Sequential(*[nn.Linear(3, 3)] * 5))),
        r"the trained 0.weight is \(3, 3\), the network's \(4, 2\)",
    ),
    "NaN": (
        lambda: priors.Empirical(torch.full((31,), math.nan)),
        "weights has NaN or infinite",
    ),
    "one network per weight": (
        lambda: priors.Empirical(torch.zeros(31), per="weight"),
        "no spread of each weight",
    ),
    "per": (lambda: priors.Empirical(torch.zeros(31), per="layer"), "per must be"),  # type: ignore[arg-type]
    "min scale": (
        lambda: priors.Empirical(torch.zeros(31), min_scale=0.0),
        "min_scale must be positive",
    ),
    "global scale": (lambda: priors.Horseshoe(0.0), "global_scale must be positive"),
    "local": (
        lambda: priors.Horseshoe(local="layer"),
        "local must be one of 'unit', 'weight'",
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_priors_are_refused_with_a_reason(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        model_of(make())


def test_predictions_under_an_inferred_prior() -> None:
    model = model_of(priors.Horseshoe())
    p = predict(model, points(model, 5))
    assert p.mean.shape == (9,)
    assert p.sd.isfinite().all()
