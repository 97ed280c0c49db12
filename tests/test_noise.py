"""Noise of each target's own, likelihoods of a user's own, and settings that torch does not
check.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.distributions import Distribution, HalfNormal, Laplace, Poisson

import bnnflow as bf
from bnnflow import likelihoods, priors
from tests.processes import run

F64 = torch.float64


@pytest.fixture
def problem(seeded):
    with seeded(0):
        net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=g, dtype=F64)
    noise = torch.randn(20, 3, generator=g, dtype=F64) * torch.tensor([0.05, 0.5, 2.0])
    return net, x, x.sum(1, keepdim=True) + noise


def each(count=3):
    return HalfNormal(torch.ones(count, dtype=F64))


MAKES = {
    "normal": (lambda prior: likelihoods.Gaussian(scale_prior=prior), lambda y: y),
    "student": (lambda prior: likelihoods.StudentT(scale_prior=prior), lambda y: y),
    "counts": (
        lambda prior: likelihoods.NegativeBinomial(dispersion_prior=prior),
        lambda y: y.abs().round(),
    ),
}


@pytest.mark.parametrize("name", MAKES)
def test_noise_of_each_target_is_three_models_of_one(name, problem, seeded):
    net, x, y = problem
    make, targets = MAKES[name]
    y = targets(y)
    together = bf.BayesianModel(net, priors.Normal(), make(each()), x, y)
    theta = together.sample_prior(4, seed=0)
    assert together.spec.shapes[together.spec.extras[0]] == (3,)
    weights, logs = theta[:, :-3], theta[:, -3:]
    total = torch.zeros(4, 20, dtype=F64)
    for k in range(3):
        with seeded(0):
            one = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        single = bf.BayesianModel(one, priors.Normal(), make(each(1)), x, y[:, k])
        params = together.spec.network.unflatten(weights)
        params["2.weight"], params["2.bias"] = (
            params["2.weight"][:, k : k + 1],
            params["2.bias"][:, k : k + 1],
        )
        flat = torch.cat([single.spec.network.flatten(params), logs[:, k : k + 1]], 1)
        total += single.pointwise_log_likelihood(flat)
    torch.testing.assert_close(together.pointwise_log_likelihood(theta), total)
    value, grad = together.log_joint_and_grad(theta)
    at = theta.clone().requires_grad_()
    joint = together.log_joint(at)
    torch.testing.assert_close(value, joint.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(joint.sum(), at)[0])


@pytest.mark.parametrize("name", ["normal", "student"])
def test_the_information_of_each_scale_is_its_own(name, problem):
    net, x, y = problem
    model = bf.BayesianModel(net, priors.Normal(), MAKES[name][0](each()), x, y)
    theta = model.sample_prior(2, seed=0)
    by_factor = model.at(theta).grad_and_factor()[1]
    product = model.at(theta).grad_and_product()[1]
    v = torch.randn(2, model.dim, generator=torch.Generator().manual_seed(0), dtype=F64)
    dense = by_factor.mT @ by_factor
    torch.testing.assert_close((dense @ v.unsqueeze(-1)).squeeze(-1), product(v))
    df = 4.0
    expected = 2 * 20 * (1.0 if name == "normal" else df / (df + 3))
    torch.testing.assert_close(
        dense[0].diagonal()[-3:], torch.full((3,), expected, dtype=F64)
    )


def test_scales_are_found_one_by_one(seeded):
    """With a network of zero weights y ~ N(0, s_k^2): the posterior mode of s_k is the root mean
    square of a column.
    """
    noise = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = torch.tensor([0.1, 1.0, 5.0], dtype=F64) * noise
    with seeded(0):
        net = nn.Linear(1, 3).double()
    wide = HalfNormal(torch.full((3,), 1e3, dtype=F64))
    model = bf.BayesianModel(
        net,
        priors.Normal(1e-6),
        likelihoods.Gaussian(scale_prior=wide),
        torch.zeros(4000, 1),
        y,
    )
    logs = y.square().mean(0).sqrt().log()
    theta = torch.cat([torch.zeros(6, dtype=F64), logs]).unsqueeze(0)
    # of 4000 rows: the prior's part
    assert model.log_joint_and_grad(theta)[1][0, -3:].abs().max() < 1.5
    assert model.likelihood_parameters(theta)["scale"].flatten().tolist() == pytest.approx(
        [0.1, 1, 5], rel=0.05
    )


@pytest.mark.parametrize("name", MAKES)
def test_a_number_of_scales_that_fits_nothing_is_refused(name, problem):
    net, x, y = problem
    with pytest.raises(
        ValueError,
        match=r"_prior must have shape \(\) or \(3,\), one for each output, got \(2,\)",
    ):
        bf.BayesianModel(
            net, priors.Normal(), MAKES[name][0](each(2)), x, MAKES[name][1](y)
        )


@dataclass(frozen=True)
class LaplaceNoise:
    """y = output + Laplace noise of a scale that is learned."""

    scale_prior: Distribution = field(default_factory=lambda: HalfNormal(torch.tensor(1.0)))
    kind: str = "regression"

    @property
    def parameters(self):
        return {"scale": self.scale_prior}

    def validate(self, y, n_outputs):
        return y.reshape(len(y), n_outputs)

    def log_prob(self, outputs, y, parameters):
        return Laplace(outputs, parameters["scale"].unsqueeze(-2)).log_prob(y).sum(-1)

    def mean(self, outputs, parameters=None):
        return outputs


def test_a_likelihood_of_ones_own_survives_what_overflows(seeded):
    with seeded(0):
        net = nn.Linear(2, 1)
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    model = bf.BayesianModel(net, priors.Normal(), LaplaceNoise(), x, x.sum(1))
    theta = torch.zeros(6, 4)
    theta[:, -1] = torch.tensor([-2000.0, -200.0, 0.0, 200.0, 2000.0, math.nan])
    theta[3, 0] = math.inf
    value, grad = model.log_joint_and_grad(theta)
    assert value.isfinite().tolist() == [False, False, True, False, False, False]
    assert grad.shape == theta.shape
    before = Distribution._validate_args
    draws = bf.sample(
        model,
        bf.HMC(step_size=50.0),
        chains=2,
        warmup=0,
        draws=5,
        seed=0,
        init="prior",
        progress=False,
    )
    assert draws.theta.isfinite().all()
    assert Distribution._validate_args == before


def test_an_object_with_the_members_of_a_likelihood_is_called_by_its_own_name() -> None:
    likelihood = bf.likelihoods.Likelihood.of(LaplaceNoise())
    assert (likelihood.name, likelihood.has_fisher_factor) == ("LaplaceNoise", False)
    assert repr(likelihood) == repr(LaplaceNoise())
    outputs = torch.zeros(1, 3, 1)
    for missing in (likelihood.fisher_factor, likelihood.variance):
        with pytest.raises(
            ValueError, match=f"LaplaceNoise has no {missing.__name__}, which this needs"
        ):
            missing(outputs, {})
    for missing in (likelihood.whitened_score, likelihood.cdf):
        with pytest.raises(
            ValueError, match=f"LaplaceNoise has no {missing.__name__}, which this needs"
        ):
            missing(outputs, outputs, {})
    with pytest.raises(ValueError, match="LaplaceNoise has no sample, which this needs"):
        likelihood.sample(outputs, {}, torch.Generator())


class Counts(LaplaceNoise):
    """Counts by torch's own distribution."""

    parameters = {}  # noqa: RUF012

    def log_prob(self, outputs, y, parameters):
        return Poisson(outputs.exp()).log_prob(y).sum(-1)


@pytest.mark.parametrize("checked", [True, False])
def test_targets_outside_the_support_of_ones_own_likelihood_are_refused(
    checked: bool, seeded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch's checks are off, as they are after the first ``torch.compile``."""
    monkeypatch.setattr(Distribution, "_validate_args", checked)
    with seeded(0):
        net = nn.Linear(2, 1)
    x = torch.arange(8.0).reshape(4, 2)
    bf.BayesianModel(net, priors.Normal(), Counts(), x, torch.tensor([3.0, 0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match=r"y does not fit Counts.*support"):
        bf.BayesianModel(
            net, priors.Normal(), Counts(), x, torch.tensor([3.0, -1.0, 1.0, 2.0])
        )
    assert Distribution._validate_args == checked


REFUSED = """
import importlib.machinery, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "bnnflow"]:
    del sys.modules[name]
def optimised(loader, name):
    source = loader.get_data(loader.path)
    return compile(source, loader.path, "exec", dont_inherit=True, optimize=1)
importlib.machinery.SourceFileLoader.get_code = optimised
import math, torch, torch.distributions as td
from torch import nn
import bnnflow as bf
from bnnflow import priors, likelihoods
td.Distribution.set_default_validate_args(False)
net, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), torch.arange(8.0).reshape(4, 2)
def model(prior, likelihood=None):
    bf.BayesianModel(net, prior, likelihood or likelihoods.Gaussian(0.1), x, x[:, 0])
half = lambda value: td.HalfNormal(torch.tensor(value))
for bad in (-1.0, 0.0, math.nan, math.inf):
    for make in (
        lambda: model(priors.Normal(bad)), lambda: model(priors.Laplace(bad)),
        lambda: model(priors.StudentT(bad)),
        lambda: model(priors.StudentT(4.0, bad)), lambda: model(priors.FanIn(bad)),
        lambda: model(priors.FanIn(1.0, bad)),
        lambda: model(td.Normal(0.0, bad)),
        lambda: model(priors.PerTensor({"0.weight": td.Normal(0.0, bad)}, td.Normal(0.0, 1.0))),
        lambda: model(priors.Hierarchical(half(bad))), lambda: model(priors.Horseshoe(bad)),
        lambda: model(priors.Horseshoe(slab_scale=bad)),
        lambda: model(priors.Horseshoe(bias_scale=bad)),
        lambda: model(priors.Normal(), likelihoods.Gaussian(bad)),
        lambda: model(priors.Normal(), likelihoods.StudentT(bad)),
        lambda: model(priors.Normal(), likelihoods.StudentT(4.0, bad)),
        lambda: model(priors.Normal(), likelihoods.NegativeBinomial(bad)),
        lambda: model(priors.Normal(), likelihoods.HeteroscedasticGaussian(bad)),
        lambda: model(priors.Normal(), likelihoods.Gaussian(scale_prior=half(bad))),
    ):
        try:
            make()
        except ValueError:
            continue
        code = make.__code__
        raise SystemExit(f"{bad} passed line {code.co_firstlineno}, {code.co_names}")
for bad in (math.nan, math.inf):
    try:
        model(priors.Normal(1.0, bad))
    except ValueError:
        continue
    raise SystemExit("loc")
"""


def test_settings_out_of_range_are_refused_whatever_torch_checks():
    """Without the checks of torch's distributions, and without assert statements."""
    assert run(REFUSED) == 0
