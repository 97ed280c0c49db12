"""Draws carried from one posterior to a neighbouring one."""

import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.inference.particles import paths
from bnnflow.inference.particles.tempering import relative_variance
from bnnflow.inference.particles.update import _Neighbours
from bnnflow.transport import Flow, Solver, WeightsVelocity
from tests.problems import F64, built, generator

N, NOISE, SCALE = 40, 0.5, 1.5
X = torch.randn(N, 3, generator=generator(0), dtype=F64)
Y = X @ torch.tensor([1.0, -0.5, 0.2], dtype=F64) + NOISE * torch.randn(
    N, generator=generator(1), dtype=F64
)
SMALL = bf.SMC(particles=400, ess=0.5, moves=2)


def linear(
    rows: Tensor | slice = slice(None),
    noise: float = NOISE,
    scale: float = SCALE,
    temperature: float = 1.0,
) -> bf.BayesianModel:
    return bf.BayesianModel(
        built(lambda: nn.Linear(3, 1), F64),
        priors.Normal(scale),
        likelihoods.Gaussian(noise),
        X[rows],
        Y[rows],
        temperature=temperature,
    )


def law(model: bf.BayesianModel, noise: float = NOISE, scale: float = SCALE) -> tuple:
    """Mean and covariance of the posterior, and the log evidence at temperature 1."""
    design = torch.cat([model.x, torch.ones(len(model.x), 1, dtype=F64)], 1)
    precision = design.T @ design / noise**2 + torch.eye(4, dtype=F64) / scale**2
    covariance = torch.linalg.inv(precision)
    y = model.y.flatten()
    marginal = noise**2 * torch.eye(len(y), dtype=F64) + scale**2 * design @ design.T
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), marginal)
    mean = covariance @ design.T @ y / noise**2
    return mean, model.temperature * covariance, float(evidence.log_prob(y))


def exact(model: bf.BayesianModel, n: int, seed: int, **settings: float) -> bf.Draws:
    """Independent draws of the posterior, as a sampler returns them."""
    mean, covariance, evidence = law(model, **settings)
    noise = torch.randn(n, 4, generator=generator(seed), dtype=F64)
    theta = (mean + noise @ torch.linalg.cholesky(covariance).T).unsqueeze(0)
    info = {"method": "exact", "model": model.fingerprint(), "rows": len(model.x)}
    return bf.Draws(theta, model.log_joint(theta), log_evidence=(evidence, 1e-9), info=info)


def scores(draws: bf.Draws, mean: Tensor, covariance: Tensor) -> Tensor:
    """Weighted means of what has mean zero under the law: first and second moments."""
    z = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (draws.flat - mean).T, upper=False
    ).T
    weights = torch.full((len(z),), 1 / len(z), dtype=F64)
    if draws.log_weights is not None:
        weights = draws.log_weights.flatten().exp()
    products = (z.unsqueeze(2) * z.unsqueeze(1) - torch.eye(4, dtype=F64)).flatten(1)
    return weights @ torch.cat([z, products], 1)


def check_law(
    found: list[bf.Draws], mean: Tensor, covariance: Tensor, k: float = 5.0
) -> None:
    """Compare independent repetitions with a law, the errors coming from their spread."""
    values = torch.stack([scores(each, mean, covariance) for each in found])
    errors = values.mean(0).abs() / (values.std(0) / math.sqrt(len(values)))
    assert errors.max() < k, f"a moment is off by {errors.max():.1f} standard errors"


def check_change(found: list[bf.Draws], right: float) -> None:
    """The evidence's change is right, and so is its error."""
    changes = torch.tensor([each.info["log_evidence_change"] for each in found])
    z = (changes[:, 0] - right) / changes[:, 1]
    assert z.mean().abs() < 5 / math.sqrt(len(z))
    assert 0.3 < z.square().mean() < 3


FEW, ALL = slice(0, 37), slice(None)
ROWS = {
    "rows came": (linear(FEW), linear(ALL)),
    "rows went": (linear(ALL), linear(torch.arange(3, N))),
    "rows came and went": (linear(slice(0, 38)), linear(slice(2, 40))),
    "a row came twice": (linear(ALL), linear(torch.tensor([*range(N), 5, 5, 6, 6, 7, 7]))),
}
KINDS = {name: (*pair, {}, {}) for name, pair in ROWS.items()} | {
    "noise": (linear(), linear(noise=0.6), {}, {"noise": 0.6}),
    "prior": (linear(), linear(scale=0.4), {}, {"scale": 0.4}),
}


@pytest.mark.crossed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["weights", "tempering"])
def test_posterior_and_evidence_are_those_of_the_new_model(kind: str, route: str) -> None:
    old, new, before, after = KINDS[kind]
    # so many effective draws that weights have to do, or cannot
    n, ess = (4000, 0.05) if route == "weights" else (800, 0.9)
    smc = replace(SMALL, ess=ess, particles=n)
    found = [
        bf.update(new, exact(old, n, seed, **before), old, smc, seed=seed)
        for seed in range(16)
    ]
    assert {each.info["route"] for each in found} == {route}
    mean, covariance, evidence = law(new, **after)
    check_law(found, mean, covariance)
    check_change(found, evidence - law(old, **before)[2])
    for each in found:
        assert each.log_evidence is not None
        known, change = law(old, **before)[2], each.info["log_evidence_change"]
        assert each.log_evidence[0] == pytest.approx(known + change[0])
        torch.testing.assert_close(each.log_joint, new.log_joint(each.theta))


def test_tempered_posteriors_are_reached_and_have_no_evidence() -> None:
    old, new = linear(), linear(temperature=2.0)
    found = [bf.update(new, exact(old, 800, s), old, SMALL, seed=s) for s in range(16)]
    mean, covariance, _ = law(new)
    check_law(found, mean, covariance)
    assert all(each.log_evidence is None for each in found)


def test_a_far_posterior_is_reached_in_many_steps() -> None:
    old, new = linear(slice(0, 2)), linear()
    found = [bf.update(new, exact(old, 500, s), old, SMALL, seed=s) for s in range(16)]
    assert min(each.info["temperatures"] for each in found) > 3
    mean, covariance, evidence = law(new)
    check_law(found, mean, covariance)
    check_change(found, evidence - law(old)[2])


def test_a_stream_of_batches_ends_at_the_posterior_of_all_rows() -> None:
    found, routes = [], set()
    for seed in range(8):
        model = linear(slice(0, 4))
        draws = exact(model, 1000, seed)
        for start in range(4, N):
            model = model.extended(X[start : start + 1], Y[start : start + 1])
            draws = bf.update(model, draws, smc=SMALL, seed=seed)
            routes.add(draws.info["route"])
        found.append(draws)
    assert routes == {"weights", "tempering"}
    mean, covariance, evidence = law(linear())
    check_law(found, mean, covariance)
    evidences = torch.tensor([each.log_evidence for each in found])
    errors = (evidences[:, 0] - evidence) / evidences[:, 1]
    assert errors.abs().max() < 4
    assert evidences[:, 1].max() < 0.2
    # the draws do not grow in number
    assert all(each.theta.shape[1] in (400, 1000) for each in found)


def test_errors_of_a_stream_know_who_is_related() -> None:
    """Particles that hardly move are no more than their first ancestors, however many updates ago
    these were.
    """
    still = bf.SMC(particles=60, ess=0.9, moves=1, max_leapfrog=1, trajectory_length=1e-3)
    found, forgetful = [], []
    for seed in range(6):
        model = linear(slice(0, 3))
        draws = exact(model, 100, seed)
        for start in range(3, N):
            before, model = (
                model,
                model.extended(X[start : start + 1], Y[start : start + 1]),
            )
            alone = bf.update(model, replace(draws, stats={}), before, still, seed=seed)
            draws = bf.update(model, draws, before, still, seed=seed)
            forgetful.append(alone.info["log_evidence_change"][1])
        assert draws.log_weights is not None
        merged = torch.tensor([draws.info["merged"]])
        own = relative_variance(draws.log_weights, draws.stats["ancestor"], merged)
        assert draws.log_evidence[1] ** 2 >= 0.99 * own > 0.1
        assert draws.info["first_ancestors"] == len(draws.stats["ancestor"].unique())
        found.append(draws)
    told = str(bf.diagnose(model, found[0]))
    assert "descend from" in told
    assert "sample the posterior anew" in told
    assert max(len(each.stats["ancestor"].unique()) for each in found) < 20
    value, error = torch.tensor([each.log_evidence for each in found]).T
    assert error.square().mean() > 1.5 * torch.tensor(forgetful).square().sum() / 6
    assert ((value - law(linear())[2]) / error).square().mean().sqrt() < 2


def test_descendants_of_few_move_far() -> None:
    x = torch.linspace(-2, 2, 30)[:, None]
    net = built(lambda: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
    new = bf.BayesianModel(
        net, priors.Normal(), likelihoods.Gaussian(0.02), x, torch.sin(2 * x[:, 0])
    )
    old = new.subset(torch.arange(27))
    draws = bf.sample(old, bf.HMC(), chains=32, warmup=200, draws=10)
    related = replace(draws, stats={"ancestor": torch.arange(320).reshape(32, 10) % 8})
    ours, theirs = (bf.update(new, each, old, seed=0) for each in (draws, related))
    assert {ours.info["route"], theirs.info["route"]} == {"tempering"}
    gradients, more = (each.info["gradients_per_draw"] for each in (ours, theirs))
    assert more > 2 * gradients
    assert (
        len(theirs.stats["ancestor"].unique()) <= 8 < len(ours.stats["ancestor"].unique())
    )


def test_ancestors_are_kept_in_a_file_and_by_weights(tmp_path: Path) -> None:
    old, new = linear(slice(0, 30)), linear()
    moved = bf.update(new, exact(old, 800, 0), old, replace(SMALL, particles=800, ess=0.9))
    again = bf.load(moved.save(tmp_path / "draws.npz"))
    assert again.stats["ancestor"].equal(moved.stats["ancestor"])
    weighed = bf.update(linear(noise=0.51), again, new)
    assert weighed.info["route"] == "weights"
    assert weighed.info["merged"] == moved.info["merged"]
    one, other = (
        each.stats["ancestor"].unique(return_inverse=True)[1] for each in (weighed, moved)
    )
    assert one.equal(other)


def test_draws_of_an_unknown_posterior_are_refined() -> None:
    old, new = linear(torch.arange(4, N)), linear()  # the rows that came are not the last
    found = [
        bf.update(new, exact(old, 400, s), smc=replace(SMALL, ess=0.99), seed=s)
        for s in range(16)
    ]
    assert {each.info["route"] for each in found} == {"refine"}
    assert all(each.log_evidence is None for each in found)
    mean, covariance, _ = law(new)
    check_law(found, mean, covariance)


def test_weights_of_the_old_draws_count() -> None:
    """Draws of a wider law, weighted, are as good as draws of the old posterior."""
    old, new = linear(slice(0, 36)), linear()
    mean, covariance, _ = law(old)
    wide = torch.distributions.MultivariateNormal(mean, 2 * covariance)
    narrow = torch.distributions.MultivariateNormal(mean, covariance)
    found = {"weights": [], "tempering": []}
    for route, ess in (("weights", 0.05), ("tempering", 0.99)):
        for seed in range(16):
            z = torch.randn(1, 800, 4, generator=generator(seed), dtype=F64)
            theta = mean + math.sqrt(2) * z @ torch.linalg.cholesky(covariance).T
            draws = bf.Draws(
                theta,
                old.log_joint(theta),
                log_weights=narrow.log_prob(theta) - wide.log_prob(theta),
            )
            smc = replace(SMALL, ess=ess)
            found[route].append(bf.update(new, draws, old, smc, seed=seed))
            assert found[route][-1].info["route"] == route
    mean, covariance, evidence = law(new)
    for each in found.values():
        check_law(each, mean, covariance)
        check_change(each, evidence - law(old)[2])


def test_correlated_chains_have_an_evidence_of_honest_error() -> None:
    """Each independent draw repeated four times in a row is worth a quarter of its number."""
    old, new = linear(slice(0, 36)), linear()
    found = []
    for seed in range(40):
        one = exact(old, 200, seed)
        theta = one.theta.repeat_interleave(4, 1)
        draws = replace(one, theta=theta, log_joint=old.log_joint(theta))
        found.append(bf.update(new, draws, old, replace(SMALL, ess=0.02), seed=seed))
    assert {each.info["route"] for each in found} == {"weights"}
    check_change(found, law(new)[2] - law(old)[2])


def test_correlated_chains_are_not_forgotten_after_one_update() -> None:
    """Each independent draw repeated ten times is worth a tenth in every update."""
    found = []
    for seed in range(40):
        model = linear(slice(0, 36))
        one = exact(model, 400, seed)
        theta = one.theta.repeat_interleave(10, 1)
        draws = replace(one, theta=theta, log_joint=model.log_joint(theta))
        for row in range(36, N):
            model = model.extended(X[row : row + 1], Y[row : row + 1])
            draws = bf.update(model, draws, smc=replace(SMALL, ess=1e-3), seed=seed)
            assert draws.info["route"] == "weights"
            assert draws.info["ess"] < 800
        found.append(draws)
    value, error = torch.tensor([each.log_evidence for each in found]).T
    off = (value - law(linear())[2]) / error
    assert 0.3 < off.square().mean() < 3


def test_previous_may_be_in_another_floating_point_type() -> None:
    old, new = linear(slice(0, 36)), linear()
    draws = exact(old, 400, 0)
    as_given = bf.update(new, draws, old, SMALL, seed=0)
    single = bf.update(new.to("cpu", torch.float32), draws, old, SMALL, seed=0)
    assert single.theta.dtype == torch.float32
    assert single.info["log_evidence_change"] == pytest.approx(
        as_given.info["log_evidence_change"], abs=1e-3
    )


def test_a_network_s_posterior_follows_a_row() -> None:
    """Chains, float32 and compiled gradients; the same posterior by chains of its own."""
    x = torch.linspace(-2, 2, 30)[:, None]
    y = torch.sin(2 * x[:, 0]) + 0.2 * torch.randn(30, generator=generator(3))
    net = built(lambda: nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)))
    new = bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.2), x, y)
    old = new.subset(torch.arange(27))
    settings = {"chains": 32, "warmup": 200, "draws": 40}
    draws = bf.sample(old, bf.HMC(), **settings, seed=0)
    updated = bf.update(new, draws, seed=0)
    rerun = bf.sample(new, bf.HMC(), **settings, seed=1)
    ours, theirs = (bf.predict(new, each, x) for each in (updated, rerun))
    gap = (ours.mean - theirs.mean) / theirs.sd
    assert gap.square().mean().sqrt() < 0.1
    assert updated.info["gradients_per_draw"] <= 64


def test_seeds_decide_and_nothing_else() -> None:
    old, new = linear(slice(0, 30)), linear()
    draws = exact(old, 300, 0)
    first, second, other = (
        bf.update(new, draws, old, replace(SMALL, ess=0.99), seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.theta.equal(second.theta)
    assert not first.theta.equal(other.theta)


def test_the_same_model_again_changes_nothing() -> None:
    model = linear()
    draws = exact(model, 100, 0)
    same = bf.update(model, draws)
    assert same.info["route"] == "weights"
    assert same.theta.equal(draws.theta)
    assert same.log_weights is not None
    assert float(same.log_weights.max() - same.log_weights.min()) < 1e-9
    assert same.info["log_evidence_change"][0] == pytest.approx(0, abs=1e-9)


def test_bias_of_the_sampler_is_not_forgotten() -> None:
    old, new = linear(slice(0, 36)), linear()
    draws = exact(old, 400, 0)
    biased = replace(draws, info=draws.info | {"exact": False})
    assert bf.update(new, biased).info["exact"] is False


def test_ctrl_c_keeps_the_particles_weighed() -> None:
    old, new = linear(slice(0, 2)), linear()
    draws, calls = exact(old, 300, 0), 0

    def interrupt(theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 150:
            signal.raise_signal(signal.SIGINT)
        return bf.BayesianModel.log_joint_and_grad(new, theta, rows)

    object.__setattr__(new, "log_joint_and_grad", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.warns(UserWarning, match="interrupted"):
            found = bf.update(new, draws, old, replace(SMALL, ess=0.95), seed=0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.info["interrupted"]
    assert found.log_evidence is None
    assert found.log_weights is not None
    assert float(found.log_weights.logsumexp(1)) == pytest.approx(0, abs=1e-6)


def other_network() -> bf.BayesianModel:
    net = built(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), F64)
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(NOISE), X, Y)


def test_bad_input_is_named() -> None:
    old, new = linear(slice(0, 36)), linear()
    draws = exact(old, 100, 0)
    with pytest.raises(ValueError, match="previous has other weights"):
        bf.update(new, draws, other_network())
    with pytest.raises(ValueError, match="draws"):
        bf.update(other_network(), draws)
    with pytest.raises(ValueError, match="another model"):
        bf.update(new, draws, linear(slice(0, 20)))
    net, normal = built(lambda: nn.Linear(3, 1), F64), priors.Normal(SCALE)
    far = bf.BayesianModel(net, normal, likelihoods.Gaussian(NOISE), X + 0.01, -9 * Y)
    with pytest.raises(ValueError, match="previous shares no row"):
        bf.update(far, draws, old)
    with pytest.raises(ValueError, match="they share nothing"):
        bf.update(far, draws)
    with pytest.raises(ValueError, match="at least 10"):
        bf.update(new, exact(old, 9, 0))
    broken = draws.theta.clone()
    broken[0, 3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        bf.update(new, replace(draws, theta=broken))
    with pytest.raises(ValueError, match="of no posterior"):
        bf.update(new, replace(draws, info={"method": "DeepEnsemble"}))
    with pytest.raises(ValueError, match="smc must have no start"):
        bf.update(new, draws, smc=bf.SMC(start=bf.Gaussian(torch.zeros(4), torch.eye(4))))
    with pytest.raises(TypeError, match="draws"):
        bf.update(new, draws.theta)  # type: ignore[arg-type]  # what is refused


def test_rows_are_added_after_those_of_the_model() -> None:
    model = linear(slice(0, 36)).extended(X[36:], Y[36:])
    assert model.fingerprint() == linear().fingerprint()
    with pytest.raises(ValueError, match="y must have a value for each of the 2 rows"):
        model.extended(X[:2], Y[:3])
    with pytest.raises(ValueError, match="x must be"):
        model.extended(X[:2, :2], Y[:2])
    with pytest.raises(ValueError, match="NaN"):
        model.extended(X[:1] * torch.nan, Y[:1])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_one_way_back_through_a_flow_is_the_sum_of_both(
    seeded: None, temperature: float
) -> None:
    """Between two posteriors under a learned prior the gradient of the tempered density goes back
    through the flow once, in chunks; value and gradient are those of both ends.
    """
    whole = linear(temperature=temperature)
    with seeded(0):
        field = WeightsVelocity(whole.spec, 8, 1).double()
        for each in field.parameters():
            each.data = 0.5 * torch.randn_like(each)
    flow = Flow.of(field, whole, solver=Solver("euler", 2))
    whole = whole.transported(flow)
    z = whole.sample_prior(7, seed=0)
    fraction = torch.linspace(0, 1, 7, dtype=F64)
    for old, new in (
        (whole.subset(FEW), whole),
        (whole, whole.subset(slice(3, N))),
        (whole.subset(slice(0, 38)), whole.subset(slice(2, N))),
    ):
        path = _Neighbours.of(old, new, chunk_size=3)
        found = path.tempered(fraction, 1 - fraction)(z)
        right = paths.Path.tempered(path, fraction, 1 - fraction)(z)
        for ours, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
