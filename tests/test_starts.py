"""Where methods begin, and what they say when training leads nowhere."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.estimators import recipe
from bnnflow.inference.start import Climb, of_the_prior, random_points, starting_points

F64 = torch.float64


def built(seed: int = 0, hidden: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double()


@pytest.fixture(scope="module")
def model() -> bf.BayesianModel:
    x = torch.linspace(-1.5, 1.5, 12, dtype=F64).unsqueeze(-1)
    noise = 0.2 * torch.randn(12, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    return bf.BayesianModel(
        built(), priors.Normal(), likelihoods.Gaussian(), x, (2 * x).sin() + noise
    )


@pytest.fixture(scope="module")
def modes(model) -> Tensor:
    """Three trained networks, as weights."""
    return bf.sample(model, bf.DeepEnsemble(3, 1500), seed=0).flat


SHORT = {"chains": 3, "warmup": 0, "draws": 1}
# Methods that hardly leave where they begin.
STILL: dict[str, tuple[Any, dict[str, Any]]] = {
    "HMC": (bf.HMC(step_size=1e-9, max_leapfrog=1), SHORT),
    "AdjustedMCLMC": (bf.AdjustedMCLMC(step_size=1e-9, max_leapfrog=1), SHORT),
    "MCLMC": (bf.MCLMC(step_size=1e-9, L=1.0, thinning=1), SHORT),
    "SGLD": (bf.SGLD(step_size=1e-18, thinning=1), SHORT),
    "SGHMC": (bf.SGHMC(step_size=1e-9, friction=1.0, thinning=1), SHORT),
    "SGNHT": (bf.SGNHT(step_size=1e-9, friction=1.0, thinning=1), SHORT),
    "VI": (bf.VI(steps=1, learning_rate=1e-9, scale=1e-9), {"draws": 3}),
    "flow VI": (
        bf.NormalizingFlowVI(steps=1, learning_rate=1e-9, scale=1e-9),
        {"draws": 3},
    ),
    "SWAG": (bf.SWAG(learning_rate=1e-12), {"draws": 3}),
    "DeepEnsemble": (bf.DeepEnsemble(steps=1, learning_rate=1e-9), {}),
}
ONE_POINT = {"VI", "flow VI"}


@pytest.mark.parametrize("name", STILL)
def test_methods_begin_where_they_are_told(name: str, model, modes: Tensor) -> None:
    method, sizes = STILL[name]

    def start(init: Any) -> Tensor:
        return bf.sample(model, method, init=init, seed=0, **sizes).theta

    given = modes[1] if name in ONE_POINT else modes
    networks = [model.network_at(each) for each in modes]
    forms = [given, given.numpy(), given.tolist(), given.float()]
    for form in forms:
        found = start(form)
        where = given if name in ONE_POINT else given.unsqueeze(int(name != "DeepEnsemble"))
        torch.testing.assert_close(found, where.expand_as(found), rtol=0, atol=2e-4)
    found = start(networks[1] if name in ONE_POINT else networks)
    weights = slice(0, model.spec.network.dim)
    torch.testing.assert_close(
        found[..., weights], where.expand_as(found)[..., weights], rtol=0, atol=2e-4
    )
    assert start("prior").isfinite().all()


@pytest.mark.parametrize("name", [*STILL, "Laplace", "MCDropout"])
def test_starts_that_make_no_sense_are_refused(
    name: str, model, modes: Tensor, seeded
) -> None:
    method, sizes = STILL.get(name, (getattr(bf, name, None), {}))
    method = method() if isinstance(method, type) else method
    with seeded(0):
        other = nn.Linear(1, 1)
    wrong = [
        ("posterior", ValueError, "init must be"),
        (object(), TypeError, "init must"),
        (other, ValueError, "does not fit the model"),
        ([], (TypeError, ValueError), "init must be"),
        ([other, modes[0]], TypeError, r"init\[1\] must be a Module"),
        (modes[:, 1:], ValueError, "axis of length"),
        (modes[None], ValueError, r"init must be \(dim,\) or \(n, dim\)"),
        (modes * math.nan, ValueError, "log_joint is not finite at the starting point"),
    ]
    for init, error, message in wrong:
        with pytest.raises(error, match=message):
            bf.sample(model, method, init=init, **sizes)


def test_a_fit_of_one_density_begins_at_one_point(model, modes: Tensor) -> None:
    for method in (bf.VI(), bf.VI(rank="full"), bf.NormalizingFlowVI()):
        with pytest.raises(ValueError, match="begins at one point, but init has 3"):
            bf.sample(model, method, init=modes)
    with pytest.raises(ValueError, match="copies of one are no ensemble"):
        bf.sample(model, bf.DeepEnsemble(), init=modes[0])
    with pytest.raises(ValueError, match="SMC takes particles and a start, not"):
        bf.sample(model, bf.SMC(), init=modes[0])


def test_as_many_chains_as_starts(model, modes: Tensor) -> None:
    method = bf.HMC(max_leapfrog=1)
    assert bf.sample(model, method, init=modes, warmup=0, draws=1).n_chains == 3
    assert bf.sample(model, method, init=modes[0], warmup=0, draws=1).n_chains == 16
    with pytest.raises(ValueError, match=r"init must be \(dim,\) or \(2, dim\)"):
        bf.sample(model, method, init=modes, chains=2, warmup=0, draws=1)


def test_an_ensemble_that_exists_stays_and_learns_its_noise(model, modes: Tensor) -> None:
    """The noise of trained networks is not in them: it climbs to its mode, which is where the first
    ensemble had it.
    """
    draws = bf.sample(
        model, bf.DeepEnsemble(), init=[model.network_at(each) for each in modes]
    )
    weights = slice(0, model.spec.network.dim)
    assert torch.equal(draws.theta[0, :, weights], modes[:, weights])
    slope = model.log_joint_and_grad(draws.theta[0])[1][
        :, model.spec.slices["likelihood.log_scale"]
    ]
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=0.05)
    assert "diverged" not in draws.info


def test_full_rank_vi_begins_at_a_network(model, modes: Tensor) -> None:
    draws = bf.sample(
        model, bf.VI(rank="full", steps=1, learning_rate=1e-9), init=modes[2], draws=5
    )
    torch.testing.assert_close(draws.posterior.loc, modes[2])


def test_dropout_trains_the_networks_that_it_is_given(model, modes: Tensor) -> None:
    method = bf.MCDropout(rate=1e-9, steps=1, learning_rate=1e-12)
    draws = bf.sample(model, method, init=modes, draws=2, seed=0)
    torch.testing.assert_close(
        draws.theta, modes.unsqueeze(1).expand(-1, 2, -1), rtol=1e-6, atol=1e-6
    )


def test_laplace_goes_on_from_a_trained_network(model, modes: Tensor) -> None:
    theta = bf.sample(model, bf.Laplace(), draws=2).posterior.loc
    near = theta + 0.01 * torch.randn(
        theta.shape, generator=torch.Generator().manual_seed(0), dtype=F64
    )
    mode = bf.sample(model, bf.Laplace(), init=near, draws=2)
    moved = mode.info["moved"]
    assert 0 < moved["log_joint"] < 1
    assert moved["predictions"] < 0.1
    assert moved["weights"] == pytest.approx(
        float((theta - near).norm() / near.norm()), rel=1e-3
    )
    assert float(model.log_joint_and_grad(mode.posterior.loc[None])[1].norm()) < 1e-4
    best = bf.sample(model, bf.Laplace(), init=torch.cat([modes, near[None]]), draws=2)
    torch.testing.assert_close(best.posterior.loc, theta, rtol=0, atol=1e-4)


def test_laplace_warns_where_the_mode_is_another_network(model) -> None:
    with pytest.warns(UserWarning, match="the mode near init is another network") as told:
        draws = bf.sample(model, bf.Laplace(), init=model.theta_of(built(5)), draws=2)
    # the line that called, not one of the package
    assert told.pop(UserWarning).filename == __file__
    assert draws.info["moved"]["predictions"] > 0.25
    assert draws.info["moved"]["log_joint"] > 1


# ---------------------------------------- training that diverges

DIVERGING: dict[str, Any] = {
    "SWAG": bf.SWAG(learning_rate=1e12, steps=50, snapshots=20),
    "DeepEnsemble": bf.DeepEnsemble(3, 50, learning_rate=1e12),
    "MCDropout": bf.MCDropout(steps=50, learning_rate=1e12),
    "MCDropout, overflowing": bf.MCDropout(steps=50, learning_rate=1e200),
    "VI": bf.VI(steps=10, learning_rate=8.0),
}


@pytest.mark.parametrize("name", DIVERGING)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_divergence_is_told_and_never_returned_as_nan(
    name: str, dtype: torch.dtype, model
) -> None:
    with pytest.warns(UserWarning, match="diverged"):
        draws = bf.sample(model, DIVERGING[name], seed=0, dtype=dtype)
    assert draws.theta.isfinite().all()
    assert draws.info["diverged"]
    assert bf.diagnose(model, draws).verdict == "do not trust"


@pytest.mark.parametrize(
    "method",
    [
        bf.VI(steps=20, learning_rate=1e12),
        bf.VI(rank=2, steps=20, learning_rate=1e12),
        bf.VI(rank="full", steps=20, learning_rate=1e12),
        bf.NormalizingFlowVI(steps=20, learning_rate=1e12),
    ],
    ids=repr,
)
def test_a_fit_without_a_finite_density_is_an_error(method: Any, model) -> None:
    with pytest.raises(FloatingPointError, match=r"diverged: .*learning_rate"):
        bf.sample(model, method, seed=0)


def test_laplace_finds_a_mode_whatever_the_rate(model) -> None:
    draws = bf.sample(model, bf.Laplace(learning_rate=1e12, steps=20), draws=5, seed=0)
    assert draws.info["converged"]
    assert draws.theta.isfinite().all()


def test_arrays_are_weights_too(model, modes: Tensor) -> None:
    theta = np.asarray(modes[0])
    method = bf.HMC(max_leapfrog=1)
    found = [
        bf.sample(model, method, init=each, warmup=1, draws=1, seed=0).theta
        for each in (theta, modes[0])
    ]
    assert torch.equal(*found)


class OneScale(priors.Prior):
    """Weights of a family of one scale, which is inferred: a prior of the user's own."""

    def __init__(self, family: Callable[[Tensor], td.Distribution]) -> None:
        self.family = family

    def parameters(self, spec: Any) -> dict[str, td.Distribution]:
        return {"scale": td.HalfNormal(torch.tensor(1.0, dtype=F64))}

    def conditional(self, spec: Any, given: dict[str, Tensor]) -> dict[str, Any]:
        scale = given["scale"]
        return {
            name: self.family(scale.reshape(*scale.shape[:-1], *(1,) * len(shape)))
            for name, shape in spec.shapes.items()
        }


SCALED: dict[str, priors.Prior] = {
    "a scale a tensor": priors.Hierarchical(),
    "with heavy tails": priors.Hierarchical(td.HalfCauchy(1.0), fan_in=True),
    "away from zero": priors.Hierarchical(td.InverseGamma(2.0, 1.0)),
    "horseshoe": priors.Horseshoe(),
    "a scale a weight": priors.Horseshoe(local="weight"),
    "a scale an output": priors.OutputScales(),
    "of one's own": OneScale(lambda scale: td.Laplace(0.0, scale)),
    "without quantiles": OneScale(lambda scale: td.StudentT(5.0, 0.0, scale)),
}
CLIMBS: dict[str, Callable[[bf.BayesianModel], Tensor]] = {
    "chains": lambda model: starting_points(
        model, 3, None, torch.Generator().manual_seed(0), False
    ),
    "recipe": lambda model: recipe.warm_start(model, 3, torch.Generator().manual_seed(0)),
    "ensemble": lambda model: bf.sample(model, bf.DeepEnsemble(3, 400), seed=0).flat,
    "dropout": lambda model: (
        bf.sample(model, bf.MCDropout(0.02, members=3, steps=400), seed=0).flat
    ),
}


@pytest.fixture(scope="module")
def two_outputs() -> tuple[nn.Module, Tensor, Tensor]:
    """Targets that one input of ten says."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 10, generator=g, dtype=F64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    return net, x, torch.cat([(2 * x[:, :1]).tanh(), x[:, :1].sin()], 1)


@pytest.mark.crossed
@pytest.mark.parametrize("climb", CLIMBS)
@pytest.mark.parametrize("prior", SCALED)
def test_climbs_do_not_end_where_scales_and_weights_are_zero(
    prior: str, climb: str, two_outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The joint density of both has no bound there, and the network says nothing."""
    net, x, y = two_outputs
    model = bf.BayesianModel(net, SCALED[prior], likelihoods.Gaussian(0.3), x, y)
    monkeypatch.setattr(recipe, "STEPS", 400)
    theta = CLIMBS[climb](model)
    residual = model.outputs(theta, x) - y
    assert float(residual.square().mean()) < 0.1 * float(y.var(0).mean())
    flat = model.flat_prior
    own = flat.sample(1000, 0)[:, model.spec.network.dim :]
    lowest = own.quantile(0.01, dim=0)
    assert (theta[:, model.spec.network.dim :] > lowest - 1e-9).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("prior", SCALED)
def test_a_climb_sees_the_density_with_its_volume(
    prior: str, temperature: float, two_outputs
) -> None:
    """Log density + log |d theta / d z|, the untempered volume, and its derivative."""
    net, x, y = two_outputs
    given = (net, SCALED[prior], likelihoods.Gaussian(), x, y)
    model = bf.BayesianModel(*given, temperature=temperature)
    climb = Climb(model)
    theta = random_points(model, 2, torch.Generator().manual_seed(0))
    z = climb.coordinates(theta)
    torch.testing.assert_close(climb.theta(z), theta)
    value, grad = climb.log_joint_and_grad(z)
    rows = climb.theta(z).unbind()
    jacobian = [
        torch.autograd.functional.jacobian(lambda at: climb.theta(at.unsqueeze(0))[0], each)
        for each in z
    ]
    volume = torch.stack([each.slogdet().logabsdet for each in jacobian])
    expected = model.log_joint(torch.stack(rows)) + volume / temperature
    torch.testing.assert_close(value, expected)
    slope = torch.autograd.functional.jacobian(
        lambda at: climb.log_joint_and_grad(at)[0].sum(), z
    )
    held = prior == "without quantiles"
    moves = ~of_the_prior(model) if held else torch.ones_like(z[0], dtype=torch.bool)
    torch.testing.assert_close(grad, slope * moves)
    assert not held or not grad[:, of_the_prior(model)].any()


def test_trained_networks_keep_their_weights_while_scales_climb(two_outputs) -> None:
    net, x, y = two_outputs
    model = bf.BayesianModel(net, priors.Hierarchical(), likelihoods.Gaussian(0.3), x, y)
    init = bf.sample(model, bf.DeepEnsemble(2, 200), seed=0).flat
    draws = bf.sample(model, bf.DeepEnsemble(), init=init, seed=0)
    weights = model.spec.network.dim
    assert torch.equal(draws.flat[:, :weights], init[:, :weights])
    assert not torch.equal(draws.flat[:, weights:], init[:, weights:])
