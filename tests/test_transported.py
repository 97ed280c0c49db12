"""A flow's push-forward as the prior of a model."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.transport import Field, Flow, InformedVelocity, Solver, WeightsVelocity, distil
from tests.problems import F64, built, conjugate, generator

X = torch.linspace(-2, 2, 12, dtype=F64)[:, None]
Y = torch.sin(2 * X[:, 0])


class Still(Field):
    """Moves nothing."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Wind(Field):
    """Moves everything by the same vector."""

    def __init__(self, by: Tensor) -> None:
        super().__init__()
        self.register_buffer("by", by)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.by.to(x.dtype).expand_as(x)


def perceptron(likelihood: object = None, dtype: torch.dtype = F64) -> bf.BayesianModel:
    net = built(lambda: nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)), dtype)
    return bf.BayesianModel(
        net, priors.Normal(1.0), likelihood or likelihoods.Gaussian(0.3), X, Y
    )


def bent(model: bf.BayesianModel, architecture: str = "signed") -> Flow:
    """An equivariant flow that moves points by about their size."""
    field = built(
        lambda: WeightsVelocity(model.spec, width=8, depth=2, architecture=architecture),
        model.dtype,
    )
    noise = generator(3)
    with torch.no_grad():
        for each in field.parameters():
            each.add_(0.1 * torch.randn(each.shape, generator=noise).to(each))
    return Flow.of(field, model, solver=Solver("midpoint", 4))


def test_a_flow_that_stays_is_the_standard_normal_prior() -> None:
    model = perceptron()
    same = model.transported(Flow.of(Still(), model))
    theta = model.sample_prior(6, 0)
    torch.testing.assert_close(same.log_joint(theta), model.log_joint(theta))
    for ours, theirs in zip(
        same.log_joint_and_grad(theta), model.log_joint_and_grad(theta), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert same.weights_of(theta).equal(theta)


def test_prior_of_a_flow_is_its_push_forward_whatever_the_model_s_own() -> None:
    """Scales of 1.5 are those of the flow's coordinates; a shift makes it N(b, 1.5^2)."""
    problem = conjugate()
    by = torch.tensor([0.5, -0.5, 0.2, 0.1], dtype=F64)
    model = problem.model
    shifted = model.transported(Flow.of(Wind(by), model, solver=Solver("euler", 3)))
    z = torch.randn(5, 4, generator=generator(0), dtype=F64)
    torch.testing.assert_close(shifted.weights_of(z), 1.5 * (z + by))
    draws = bf.sample(shifted, bf.SMC(particles=2000), chains=6, seed=0)
    # y is N(1.5 design b, marginal): the evidence of a Gaussian prior around 1.5 b
    design = torch.cat([model.x, torch.ones(25, 1, dtype=F64)], 1)
    covariance = 0.25 * torch.eye(25, dtype=F64) + 2.25 * design @ design.T
    right = torch.distributions.MultivariateNormal(design @ (1.5 * by), covariance)
    assert draws.log_evidence is not None
    value, error = draws.log_evidence
    assert abs(value - float(right.log_prob(model.y.flatten()))) < 4 * error + 0.02
    assert error < 0.1
    weights = shifted.weights_of(draws.theta)
    precision = design.T @ design / 0.25 + torch.eye(4, dtype=F64) / 2.25
    mean = torch.linalg.solve(
        precision, design.T @ model.y.flatten() / 0.25 + 1.5 * by / 2.25
    )
    assert draws.log_weights is not None
    found = (draws.log_weights.exp().unsqueeze(-1) * weights).sum(1)
    errors = (found.mean(0) - mean).abs() / (found.std(0) / math.sqrt(6))
    assert errors.max() < 6


@pytest.mark.parametrize("architecture", ["signed", "dws"])
def test_moved_latent_points_are_moved_weights(architecture: str) -> None:
    model = perceptron()
    carried = model.transported(bent(model, architecture))
    group = carried.symmetries()
    assert group.permutation == {"h1"}
    assert (group.sign == {"h1"}) == (architecture == "signed")
    z = carried.sample_prior(4, 0)
    assert (carried.weights_of(z) - z).std() > 0.1
    weights = carried.weights_of(z)
    moved, moved_weights = model.spec.transform(group, 5, z, weights)
    assert not moved.equal(z)
    torch.testing.assert_close(carried.log_joint(moved), carried.log_joint(z))
    torch.testing.assert_close(carried.weights_of(moved), moved_weights)


def test_unknown_fields_claim_no_symmetry() -> None:
    model = perceptron()
    assert not any(model.transported(Flow.of(Still(), model)).symmetries())


@pytest.mark.parametrize(
    "likelihood",
    [likelihoods.Gaussian(0.3), likelihoods.Gaussian(), likelihoods.StudentT(4.0)],
    ids=["known noise", "learned noise", "heavy tails"],
)
def test_gradients_are_right_in_every_way(likelihood: object) -> None:
    model = perceptron(likelihood)
    if model.dim == 16:
        flow = bent(model)
    else:  # the noise travels with the weights
        flow = Flow.of(
            Wind(0.1 * torch.arange(model.dim, dtype=F64)), model, solver=Solver("euler", 2)
        )
    carried = model.transported(flow)
    z = 0.5 * carried.sample_prior(3, 0)
    direction = torch.randn(carried.dim, generator=generator(1), dtype=F64)
    value, grad = carried.log_joint_and_grad(z)
    torch.testing.assert_close(value, carried.log_joint(z))
    step = 1e-5
    up, down = (carried.log_joint(z + s * step * direction) for s in (1, -1))
    torch.testing.assert_close(
        (up - down) / (2 * step), grad @ direction, rtol=1e-6, atol=1e-6
    )
    _, forwards = torch.func.jvp(carried.log_joint, (z,), (direction.expand_as(z),))
    torch.testing.assert_close(forwards, grad @ direction)
    hessian = torch.func.hessian(carried.log_joint)(z[0])
    again = torch.autograd.functional.jacobian(
        lambda point: carried.log_joint_and_grad(point)[1], z[0]
    )
    torch.testing.assert_close(again, hessian, rtol=1e-6, atol=1e-6)
    rows = torch.tensor([1, 5, 5])
    part = carried.log_joint_and_grad(z, rows)[0]
    likelihood_of_rows = carried.pointwise_log_likelihood(z)[:, rows].sum(1) * len(X) / 3
    torch.testing.assert_close(part, likelihood_of_rows + carried.log_prior(z))


def test_values_of_any_shape_fit_together() -> None:
    model = perceptron(likelihoods.Gaussian())
    carried = model.transported(Flow.of(Still(), model))
    z = carried.sample_prior(6, 0).unflatten(0, (2, 3))
    assert carried.outputs(z).shape == (2, 3, 12, 1)
    assert carried.log_likelihood(z).shape == (2, 3)
    assert carried.likelihood_parameters(z)["scale"].shape == (2, 3, 1)
    torch.testing.assert_close(
        carried.pointwise_log_likelihood(z).sum(-1), carried.log_likelihood(z)
    )


def test_everything_that_takes_a_model_takes_this_one(tmp_path: Path) -> None:
    model = perceptron(dtype=torch.float32)
    by = torch.linspace(-0.5, 0.5, model.dim)
    flow = Flow.of(Wind(by), model, solver=Solver("euler", 1))
    carried = model.transported(flow)
    settings = {"chains": 4, "warmup": 60, "draws": 40, "seed": 0}
    draws = bf.sample(carried, bf.HMC(max_leapfrog=16), **settings)
    place = bf.Checkpoint(tmp_path / "run", resume=True)
    kept = bf.sample(carried, bf.HMC(max_leapfrog=16), **settings, checkpoint=place)
    assert kept.theta.equal(draws.theta)
    more = bf.sample(carried, bf.MCLMC(), chains=4, warmup=60, draws=40, seed=0)
    for each in (draws, more, bf.refine(carried, draws, 2, n_leapfrog=4)):
        prediction = bf.predict(carried, each, X)
        nets = carried.network_at(each.flat[0])
        torch.testing.assert_close(
            nets(X.float()), carried.outputs(each.flat[:1], X)[0], rtol=1e-4, atol=1e-4
        )
        assert prediction.mean.shape == (12,)
    assert bf.diagnose(carried, draws, X, Y).headline
    value, error = bf.evidence(
        carried, draws, bf.SMC(particles=60, moves=2, max_leapfrog=8)
    )
    assert math.isfinite(value)
    assert error < 5
    velocity = built(lambda: WeightsVelocity(carried.spec, width=4, depth=1))
    training = bf.Training(steps=3)
    again = bf.fit_flow(carried, draws, velocity=velocity, training=training)
    assert again.sample(5).shape == (5, 16)
    rows = carried.subset(torch.arange(11))
    assert bf.update(rows, draws, carried).info["route"] in ("weights", "tempering")


def test_draws_are_aligned_by_what_the_flow_keeps() -> None:
    model = perceptron()
    carried = model.transported(bent(model))
    z = carried.sample_prior(6, 0).unsqueeze(0)
    draws = bf.Draws(z, carried.log_joint(z))
    aligned = bf.align(carried, draws)
    assert not aligned.theta.equal(z)
    torch.testing.assert_close(carried.log_joint(aligned.theta), draws.log_joint)


def test_files_and_types_keep_the_prior(tmp_path: Path) -> None:
    model = perceptron()
    flow = bent(model)
    carried = model.transported(flow)
    flow.save(tmp_path / "flow.npz")
    loaded = model.transported(bf.load(tmp_path / "flow.npz", model))
    assert loaded.fingerprint() == carried.fingerprint()
    assert carried.fingerprint() != model.fingerprint()
    finer = replace(flow, solver=Solver("midpoint", 8))
    assert model.transported(finer).fingerprint() != carried.fingerprint()
    single = carried.to(dtype=torch.float32)
    z = carried.sample_prior(3, 0)
    torch.testing.assert_close(
        single.log_joint(z.float()), carried.log_joint(z), rtol=1e-4, atol=1e-3
    )
    more = carried.extended(X[:2], Y[:2])
    assert more.is_transported
    torch.testing.assert_close(
        more.log_joint(z),
        carried.log_joint(z) + carried.pointwise_log_likelihood(z)[:, :2].sum(1),
    )


def test_the_model_of_a_flow_follows_no_training() -> None:
    """What happens to the flow's field afterwards does not change the prior."""
    model = perceptron()
    flow = bent(model)
    carried, z = model.transported(flow), model.sample_prior(2, 0)
    before = carried.log_joint(z)
    with torch.no_grad():
        for each in flow.velocity.parameters():
            each.mul_(2)
    assert carried.log_joint(z).equal(before)


def test_trajectories_that_diverge_are_rejected() -> None:
    model = perceptron()
    carried = model.transported(bent(model))
    z = carried.sample_prior(3, 0)
    z[1] = 1e200
    value, _ = carried.log_joint_and_grad(z)
    assert not bool(value[1].isfinite())
    assert bool(value[[0, 2]].isfinite().all())


def test_a_distilled_map_is_a_prior_too() -> None:
    model = perceptron()
    few = distil(
        bent(model), 2, trajectories=64, training=bf.Training(steps=3), progress=False
    )
    carried = model.transported(few)
    z = torch.randn(64, 16, generator=generator(0), dtype=F64)
    assert bool(carried.log_joint(z).isfinite().all())
    torch.testing.assert_close(
        few.sample(5, 7),
        carried.weights_of(torch.randn(5, 16, generator=generator(7), dtype=F64)),
    )


def test_bad_input_is_named() -> None:
    model = perceptron()
    flow = bent(model)
    wide = built(lambda: nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)), F64)
    other = bf.BayesianModel(wide, priors.Normal(1.0), likelihoods.Gaussian(0.3), X, Y)
    with pytest.raises(ValueError, match="flow is one of other weights"):
        other.transported(flow)
    with pytest.raises(ValueError, match="chooses its steps"):
        model.transported(replace(flow, solver=Solver("dopri5")))
    looking = built(lambda: InformedVelocity(model.spec, width=4, depth=1), F64)
    informed = Flow.of(looking, model)
    with pytest.raises(ValueError, match="looks at the data"):
        model.transported(informed)
    carried = model.transported(flow)
    for refused in (
        lambda: carried.transported(flow),
        lambda: carried.with_prior(priors.Normal(2.0)),
        lambda: carried.linearised(carried.sample_prior(1, 0)[0]),
        lambda: carried.theta_of(model.net),
        lambda: carried.at(carried.sample_prior(1, 0)),
        carried.to_pyro,
    ):
        with pytest.raises(ValueError, match="needs a model of weights"):
            refused()
    with pytest.raises(ValueError, match="linearised"):
        model.linearised(model.sample_prior(1, 0)[0]).transported(flow)
