"""Laws of paths, sources, times and training: conversions, closed forms, resume to the bit, and
what a flow learns.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.transport import (
    AffinePath,
    Beta,
    Field,
    Flow,
    GaussianVelocity,
    GaussNewton,
    GaussNewtonFlow,
    GradientSteps,
    InformedVelocity,
    LogitNormal,
    LogUniformNearEnd,
    Matching,
    ResidualVelocity,
    Reuse,
    ScoreVelocity,
    Solver,
    Source,
    Uniform,
    WeightsVelocity,
    train,
)
from bnnflow.transport.whitened import WhitenedPosterior
from tests.problems import F64, generator, network, regression
from tests.processes import run_ranks

PATHS = [AffinePath(), AffinePath("variance_preserving")]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.schedule)


def spread_of(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T / len(matrix) + 0.1 * torch.eye(
        len(matrix), dtype=matrix.dtype
    )


@pytest.fixture(autouse=True)
def _seeded_modules():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# ---------------------------------------- paths


@paths
def test_path_runs_from_source_to_target_and_its_velocity_is_its_derivative(path):
    x0, x1 = torch.randn(2, 7, 3, generator=generator(), dtype=F64)
    ends = [
        path.point(x0, x1, torch.full((7,), t, dtype=F64), generator())[0]
        for t in (0.0, 1.0)
    ]
    assert torch.allclose(ends[0], x0)
    assert torch.allclose(ends[1], x1, atol=1e-15)
    t = torch.rand(7, generator=generator(1), dtype=F64)
    x, velocity = path.point(x0, x1, t, generator())
    later = path.point(x0, x1, t + 1e-6, generator())[0]
    assert torch.allclose((later - x) / 1e-6, velocity, atol=1e-5)


@paths
def test_conversions_agree_with_the_closed_form_of_a_gaussian_target(path):
    g = generator()
    mean, covariance = (
        torch.randn(3, generator=g, dtype=F64),
        spread_of(torch.randn(3, 3, generator=g, dtype=F64)),
    )
    field = GaussianVelocity(mean, covariance, path)
    x, t = (
        torch.randn(20, 3, generator=g, dtype=F64),
        torch.rand(20, generator=g, dtype=F64) * 0.9 + 0.05,
    )
    velocity = field(t, x)
    a, b, *_ = path.coefficients(t[:, None, None])
    marginal = b * b * covariance + a * a * torch.eye(3, dtype=F64)  # of x_t
    offset = torch.linalg.solve(marginal, (x - b[..., 0] * mean).unsqueeze(-1))
    score, x1 = -offset.squeeze(-1), mean + (b * covariance @ offset).squeeze(-1)
    x0 = (a * offset).squeeze(-1)
    assert torch.allclose(path.score(t, x, velocity), score, atol=1e-9)
    assert torch.allclose(path.velocity_of_score(t, x, score), velocity, atol=1e-9)
    assert torch.allclose(path.velocity_of_x1(t, x, x1), velocity, atol=1e-9)
    for got, expected in zip(path.ends(t, x, velocity), (x0, x1), strict=True):
        assert torch.allclose(got, expected, atol=1e-9)


@paths
def test_own_trace_of_the_gaussian_field_is_that_of_its_jacobian(path):
    g = generator()
    field = GaussianVelocity(
        torch.randn(4, generator=g, dtype=F64),
        spread_of(torch.randn(4, 4, generator=g, dtype=F64)),
        path,
    )
    x, t = torch.randn(1, 4, generator=g, dtype=F64), torch.tensor(0.3, dtype=F64)
    value, divergence = field.with_divergence(t, x)
    jacobian = torch.func.jacrev(lambda z: field(t, z[None])[0])(x[0])
    assert torch.allclose(value, field(t, x))
    assert torch.allclose(divergence, jacobian.trace()[None])


def test_integrating_the_x1_estimate_needs_the_conversion():
    """The exact denoiser of N(1, 1): the converted field gives unit spread, its raw difference to
    x0 half of that.
    """
    path, x0 = AffinePath(), torch.randn(4000, 1, generator=generator(), dtype=F64)

    def solve(field):
        x, steps = x0, 400
        for i in range(steps):
            t = torch.tensor((i + 0.5) / steps, dtype=F64)
            x = x + field(t, x) / steps
        return float(x.std())

    def denoised(t, x):  # E[x1 | x_t]
        return 1 + t / (t * t + (1 - t) ** 2) * (x - t)

    assert solve(lambda t, x: path.velocity_of_x1(t, x, denoised(t, x))) == pytest.approx(
        float(x0.std()), abs=0.01
    )
    assert solve(lambda t, x: denoised(t, x) - x0) < 0.6 * float(x0.std())


def test_marginal_field_of_an_empirical_target_is_what_flow_matching_regresses_on():
    """The gradient of the conditional objective is that of the marginal one (Lipman et al. 2023,
    theorem 2).
    """
    targets = torch.tensor([[-2.0], [0.5], [1.0]], dtype=F64)
    weight = torch.tensor(0.7, dtype=F64, requires_grad=True)
    t = torch.tensor(0.6, dtype=F64)

    def oracle(x):  # E[x1 - x0 | x_t] over the three targets
        x0 = (x - t * targets.T) / (1 - t)  # (n, 3)
        likelihood = (-0.5 * x0.square()).softmax(-1)
        return (likelihood * (targets.T - x0)).sum(-1, keepdim=True)

    n = 400_000
    x0 = torch.randn(n, 1, generator=generator(), dtype=F64)
    x1 = targets[torch.randint(3, (n,), generator=generator(1))]
    x_t = (1 - t) * x0 + t * x1
    predicted = weight * x_t.sin()
    conditional = (predicted - (x1 - x0)).square().squeeze(-1)
    marginal = (predicted - oracle(x_t)).square().squeeze(-1)
    gradients = [
        torch.autograd.grad(each.mean(), weight, retain_graph=True)[0]
        for each in (conditional, marginal)
    ]
    noise = 2 * (x_t.sin() * (oracle(x_t) - (x1 - x0))).std() / math.sqrt(n)
    assert abs(gradients[0] - gradients[1]) < 4 * noise


def test_sigma_blurs_both_ends():
    path = AffinePath(sigma=0.5)
    x0, x1 = torch.zeros(20_000, 1, dtype=F64), torch.zeros(20_000, 1, dtype=F64)
    for t in (0.0, 1.0):
        x, velocity = path.point(x0, x1, torch.full((20_000,), t, dtype=F64), generator())
        assert x.std() == pytest.approx(0.5, rel=0.03)
        assert not velocity.any()
    with pytest.raises(ValueError, match="sigma"):
        AffinePath(sigma=-0.1)
    with pytest.raises(ValueError, match="schedule"):
        AffinePath("cosine")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("times", "law"),
    [
        (Uniform(), stats.uniform),
        (Beta(2.0, 1.5), stats.beta(2.0, 1.5)),
        (LogitNormal(0.5, 0.8), None),
        (LogUniformNearEnd(0.4, 2.0), None),
    ],
)
def test_times_follow_their_law_and_stay_before_the_end(times, law):
    t = times.sample(20_000, torch.zeros(1, dtype=F64), generator())
    assert torch.equal(t, times.sample(20_000, torch.zeros(1, dtype=F64), generator()))
    assert float(t.min()) >= 0
    assert float(t.max()) < 1
    if isinstance(times, LogitNormal):
        law = stats.norm(0.5, 0.8)
        t = t.logit()
    if law is not None:
        assert stats.kstest(t.numpy(), law.cdf).pvalue > 1e-3
    # three tenths of the uniform times are after 0.7, and a share of the late ones by their
    # logarithm
    else:
        expected = 0.6 * 0.3 + 0.4 * (1 + math.log10(0.3) / 2)
        assert float((t > 0.7).double().mean()) == pytest.approx(expected, abs=0.015)


# ---------------------------------------- sources


def gaussian_source(model: bf.BayesianModel) -> Source:
    theta = model.sample_prior(400, 3) * 0.6 + 0.4
    return Source.gaussian(model, theta)


@pytest.mark.parametrize(
    "make", [lambda m: Source.scaled(m, 0.6), gaussian_source], ids=["scaled", "gaussian"]
)
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_source_coordinates_invert_and_have_their_jacobian(kind, make):
    model = network(kind)
    source = make(model)
    x = torch.randn(3, model.dim, generator=generator(), dtype=F64)
    theta = source.from_normal(x)
    assert torch.allclose(source.to_normal(theta), x, atol=1e-9)
    jacobian = torch.func.jacrev(source.to_normal)(theta[0])
    assert torch.allclose(
        source.log_jacobian(theta[:1]), torch.linalg.slogdet(jacobian)[1][None]
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "make", [lambda m: Source.scaled(m, 0.6), gaussian_source], ids=["scaled", "gaussian"]
)
def test_context_of_any_source_is_the_posterior_over_it(make, temperature):
    base = network("learned")
    model = bf.BayesianModel(
        base.net, base.prior, base.likelihood, base.x, base.y, temperature=temperature
    )
    source = make(model)
    x = torch.randn(4, model.dim, generator=generator(), dtype=F64, requires_grad=True)
    theta = source.from_normal(x)
    u = model.log_joint(theta) - source.log_jacobian(theta) + 0.5 * (x * x).sum(-1)
    (expected,) = torch.autograd.grad(u.sum(), x)
    assert torch.allclose(
        WhitenedPosterior(model, source).grad(x.detach()), expected, rtol=1e-7, atol=1e-8
    )


@pytest.mark.crossed
@pytest.mark.parametrize("iterations", [None, 4])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.schedule)
@pytest.mark.parametrize(
    "make",
    [lambda m: None, lambda m: Source.scaled(m, 0.7), gaussian_source],
    ids=["prior", "scaled", "gaussian"],
)
def test_untrained_flow_is_exact_for_a_linear_gaussian_model_from_every_source(
    make, path, iterations
):
    model, mean, covariance = regression()
    # as many iterations as dimensions
    proximal_step = GaussNewton(1, max_norm=math.inf, iterations=iterations)
    flow = GaussNewtonFlow(
        model, proximal_step, source=make(model), path=path, solver=Solver("rk4", 16)
    )
    theta, log_q = flow.sample_with_log_prob(10, 0)
    truth = bf.Gaussian(1.5 * mean, 1.5 * torch.linalg.cholesky(covariance)).log_prob(theta)
    assert (log_q - truth).abs().max() < 2e-2


@pytest.mark.parametrize("kind", ["categorical", "learned"])
def test_conjugate_gradients_approach_the_dense_solution(kind):
    model = network(kind)
    context = WhitenedPosterior(model, Source.scaled(model, 0.8))
    mu, s2 = (
        torch.randn(6, model.dim, generator=generator(), dtype=F64),
        torch.full((6, 1), 0.3, dtype=F64),
    )
    dense = GaussNewton(2)(context, mu, s2)
    errors = [
        float((GaussNewton(2, iterations=n)(context, mu, s2).w - dense.w).abs().max())
        for n in (2, 6, model.dim)
    ]
    assert errors[2] < 1e-5 < errors[1] < errors[0]


def test_gaussian_source_keeps_no_symmetry_and_a_scaled_one_all():
    model = network()
    assert not any(gaussian_source(model).symmetries(model))
    assert Source.scaled(model, 0.5).symmetries(model) == model.symmetries()
    with pytest.raises(ValueError, match="root must be"):
        Source(model.flat_prior, root=-1.0)
    with pytest.raises(ValueError, match="loc must be"):
        Source(model.flat_prior, loc=torch.zeros(3))


# ---------------------------------------- fields


def fields(model: bf.BayesianModel) -> dict[str, nn.Module]:
    spec, vp = model.spec, AffinePath("variance_preserving")
    x = torch.randn(50, model.dim, generator=generator(), dtype=F64)
    return {
        "graph": WeightsVelocity(spec, 8, 1, architecture="graph"),
        "messages": WeightsVelocity(spec, 8, 1, heads=2),
        "x1": WeightsVelocity(spec, 8, 1, parametrisation="x1", path=vp),
        "drive": ScoreVelocity(GaussNewton(iterations=3), vp),
        "mixed": InformedVelocity(spec, (GradientSteps(1), GaussNewton()), 8, 1),
        "residual": ResidualVelocity.fit(spec, x, 8, 1),
    }


@pytest.mark.parametrize("name", ["graph", "messages", "x1", "drive", "mixed", "residual"])
def test_every_field_is_stored_with_its_flow(name, tmp_path):
    model = network("learned")
    field = fields(model)[name].double()
    for parameter in field.parameters():
        parameter.data.add_(
            0.05 * torch.randn(parameter.shape, generator=generator(), dtype=F64)
        )
    few = Solver(steps=3)
    flow = Flow.of(
        field.requires_grad_(False), model, Source.scaled(model, 0.8), solver=few
    )
    loaded = bf.load(flow.save(tmp_path / "flow"), model)
    assert torch.allclose(loaded.sample(3, 0), flow.sample(3, 0))
    assert torch.allclose(loaded.sample(3, 0), flow.to("cpu", F64).sample(3, 0))
    theta = flow.sample(2, 1)
    assert torch.allclose(loaded.log_prob(theta), flow.log_prob(theta))


@pytest.mark.parametrize("name", ["graph", "messages", "x1", "drive", "mixed"])
def test_every_equivariant_field_commutes_with_its_group(name):
    model = network("categorical")
    field = fields(model)[name].double()
    for parameter in field.parameters():
        parameter.data.add_(
            0.1 * torch.randn(parameter.shape, generator=generator(), dtype=F64)
        )
    field = field.bind(WhitenedPosterior(model))
    group = model.symmetries() if name == "drive" else field.symmetries
    assert group.permutation
    x, t = (
        torch.randn(10, model.dim, generator=generator(), dtype=F64),
        torch.rand(10, generator=generator(1)).double(),
    )
    v = field(t, x).detach()
    moved_x, moved_v = model.spec.transform(group, 5, x, v)
    assert torch.allclose(
        field(t, moved_x), moved_v, atol=1e-10 * float(v.abs().max()) + 1e-10
    )


def test_flow_from_a_gaussian_source_is_stored(tmp_path):
    model = network()
    flow = GaussNewtonFlow(model, source=gaussian_source(model), solver=Solver(steps=4))
    loaded = bf.load(flow.save(tmp_path / "flow"), model)
    assert torch.allclose(loaded.sample(3, 0), flow.sample(3, 0))


def test_both_directions_invert_each_other_and_agree_on_the_density():
    model = network("categorical")
    flow = GaussNewtonFlow(model, solver=Solver("rk4", 16))
    x0 = flow.start(2, 0)
    theta, log_q = flow.forward_with_log_prob(x0)
    back, log_q_back = flow.inverse_with_log_prob(theta)
    # by other steps
    assert torch.allclose(theta, flow.forward(x0, solver=Solver("rk4", 24)), atol=1e-4)
    assert torch.allclose(back, x0, atol=1e-4)
    assert torch.allclose(log_q, log_q_back, atol=1e-3)


def test_forward_is_differentiable_and_its_jacobian_is_the_density():
    model, *_ = regression()
    flow = GaussNewtonFlow(model, GaussNewton(max_norm=math.inf), solver=Solver("rk4", 32))
    x0 = flow.start(1, 0)
    jacobian = torch.func.jacrev(
        lambda z: flow.forward(z[None], solver=Solver("rk4", 48))[0]
    )(x0[0])
    _, log_q = flow.forward_with_log_prob(x0)
    log_normal = -0.5 * (x0 * x0).sum() - 2 * math.log(2 * math.pi)
    assert torch.allclose(log_q, log_normal - torch.linalg.slogdet(jacobian)[1], atol=1e-5)


def test_flow_transfers_to_another_width_and_refuses_other_networks():
    narrow, wide = network(width=4), network(width=9)
    flow = bf.fit_flow(
        narrow, narrow.sample_prior(50, 0), training=bf.Training(steps=2, batch_size=8)
    )
    assert flow.transfer(wide).sample(3, 0).shape == (3, wide.dim)
    assert torch.equal(flow.transfer(narrow).sample(3, 0), flow.sample(3, 0))
    with pytest.raises(ValueError, match="more than the widths"):
        flow.transfer(network("categorical"))
    with pytest.raises(ValueError, match="tied to its own weights"):
        GaussNewtonFlow(narrow, source=gaussian_source(narrow)).transfer(wide)


def test_field_of_ones_own_says_what_it_is_on_another_network():
    class Rescaled(Field):
        def __init__(self, scale: torch.Tensor) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(scale)

        def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x

        def on(self, spec: bf.WeightSpec) -> Rescaled:
            return Rescaled(self.scale.detach())

    narrow, wide = network(width=4), network(width=9)
    flow = Flow.of(
        Rescaled(torch.tensor(0.3, dtype=torch.float64)), narrow, solver=Solver("rk4", 64)
    )
    moved = flow.transfer(wide)
    x0 = moved.start(3, 0)
    assert torch.allclose(
        moved.forward(x0), wide.flat_prior.from_normal(math.exp(0.3) * x0)
    )


def test_a_part_of_the_data_costs_less_and_is_scaled_to_all():
    model, mean, _ = regression(n=4000)
    flow = GaussNewtonFlow(model, solver=Solver(steps=16))
    parts = (
        torch.stack([flow.on_batch(400, seed).sample(20, 0).mean(0) for seed in range(12)])
        / 1.5
    )
    spread = parts.std(0) / math.sqrt(12)
    assert ((parts.mean(0) - mean).abs() < 5 * spread + 0.01).all()
    context = flow.on_batch(400, 0).velocity.posterior
    assert context.at(torch.zeros(1, 4, dtype=F64)).grad_and_factor()[1].shape[1] == 400
    with pytest.raises(ValueError, match="looks at no data"):
        Flow.of(WeightsVelocity(model.spec, 8, 1).double(), model).on_batch(10, 0)
    with pytest.raises(ValueError, match="batch_size"):
        flow.on_batch(5000, 0)


# ---------------------------------------- training


def small_field(dim: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(dim + 1, 64),
                nn.SiLU(),
                nn.Linear(64, 64),
                nn.SiLU(),
                nn.Linear(64, dim),
            )

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.net(torch.cat([x, t.expand(len(x))[:, None].to(x.dtype)], -1))

    return Field().to(dtype)


def shifted(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x0, x1 = torch.randn(2, n, 2, generator=g)
    return x0, 0.5 * x1 + 2


def test_trained_field_carries_the_source_to_the_target():
    field, info = train(
        small_field(),
        shifted,
        times=Uniform(),
        training=bf.Training(steps=400, batch_size=256, learning_rate=5e-3),
    )
    x = torch.randn(5000, 2, generator=generator(5))
    for i in range(40):
        x = x + field(torch.tensor((i + 0.5) / 40), x) / 40
    assert (x.mean(0) - 2).abs().max() < 0.1
    assert (x.std(0) - 0.5).abs().max() < 0.1
    assert info["steps"] == 400
    assert len(info["loss_by_time"]) == 4
    assert not any(parameter.requires_grad for parameter in field.parameters())


@pytest.mark.parametrize(("held_out", "reuse"), [(None, 1), (shifted, 1), (None, 3)])
def test_interrupted_training_resumes_to_the_bit(tmp_path, monkeypatch, held_out, reuse):
    file = tmp_path / "training.npz"
    monkeypatch.setattr("bnnflow.transport.batches.POOL", 16)

    def run(**options) -> dict[str, Tensor]:
        torch.manual_seed(7)
        field, _ = train(
            small_field(),
            options.pop("pairs", shifted),
            held_out=held_out,
            checkpoint=bf.Checkpoint(file, **options),
            reuse=Reuse(reuse),
            training=bf.Training(steps=250, batch_size=32),
        )
        return field.state_dict()

    whole = run()
    file.unlink()
    calls = []

    def interrupting(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        calls.append(n)
        if len(calls) > {1: 120, 3: 40}[reuse]:  # the second one while points are drawn
            raise KeyboardInterrupt
        return shifted(n, g)

    with pytest.warns(
        UserWarning,
        match=f"interrupted: returning the flow after {120 if reuse == 1 else 96} steps",
    ):
        part = run(pairs=interrupting)
    resumed = run(resume=True)
    assert not torch.equal(part["net.0.weight"], whole["net.0.weight"])
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


class Recording(Field):
    """The field of `doubled` plus a number that is learned.

    Keeps account of what both parts are asked of batches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))
        self.computed: list[Tensor] = []
        self.seen: list[Tensor] = []

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.from_precomputed(t, x, *self.precompute(t, x))

    def precompute(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        if len(x) == 8:
            self.computed.append(x)
        return (x / (1 + t).unsqueeze(-1),)

    def from_precomputed(self, t: Tensor, x: Tensor, *scores: Tensor) -> Tensor:
        (score,) = scores
        assert torch.equal(score, x / (1 + t).unsqueeze(-1))
        if len(x) == 8:
            self.seen.append(x)
        return score + self.level


def doubled(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x0 = torch.randn(n, 2, generator=g)
    return x0, 2 * x0


def flipped(seed: int, *points: Tensor) -> tuple[Tensor, ...]:
    sign = torch.where(
        torch.rand(len(points[0]), 1, generator=generator(seed)) < 0.5, -1.0, 1.0
    )
    return tuple(sign * each for each in points)


@pytest.mark.parametrize("moves", [None, flipped])
def test_points_are_used_again_as_often_as_said_with_what_belongs_to_them(
    monkeypatch, moves
):
    monkeypatch.setattr("bnnflow.transport.batches.POOL", 16)
    field, info = train(
        Recording(),
        doubled,
        reuse=Reuse(steps=3, moves=moves),
        training=bf.Training(steps=96, batch_size=8, learning_rate=1e-6),
    )
    assert info["loss"] < 1e-6
    computed, seen = torch.cat(field.computed), torch.cat(field.seen)  # type: ignore[arg-type]
    assert len(computed) == 96 * 8 / 3
    assert len(torch.stack(field.seen).unique(dim=0)) == 96  # type: ignore[arg-type]
    if moves is not None:
        turned = (seen.unsqueeze(1) + computed).abs().amin((1, 2)) == 0
        assert 0.4 < turned.float().mean() < 0.6
        seen, computed = seen.abs(), computed.abs()
    assert torch.equal(seen.sort(0).values, computed.repeat(3, 1).sort(0).values)


def test_pairs_that_are_used_again_are_moved_by_the_symmetries_of_the_model(monkeypatch):
    monkeypatch.setattr("bnnflow.transport.batches.POOL", 3)
    model = network(width=4)
    seen = []

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.zeros(()))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            if len(x) == 8:  # a batch
                seen.append(x)
            return self.level * x

    matching, training = (
        Matching(targets="pairs", reuse=2),
        bf.Training(steps=6, batch_size=8),
    )
    draws = model.sample_prior(50, 1)
    bf.fit_flow(
        model,
        draws,
        velocity=Keeping(),
        matching=matching,
        training=training,
        seed=3,
        progress=False,
    )
    points = torch.cat(seen)
    assert len(points) == 48
    assert len(points.unique(dim=0)) == 48
    sorted_once = bf.symmetry.sort_units(
        bf.symmetry.normalise_sign(points, model.spec), model.spec
    )
    apart = torch.cdist(sorted_once, sorted_once).fill_diagonal_(torch.inf).min(1).values
    assert float(apart.max()) < 1e-6


@pytest.mark.parametrize(
    ("elements", "count"),
    [*((2**28, n) for n in (0, 1, 47, 48, 50)), (48 * 4, 7), (1, 7), (1, 6)],
)
def test_resuming_in_a_pool_goes_on_where_it_stopped(
    tmp_path, monkeypatch, elements, count
):
    monkeypatch.setattr("bnnflow.transport.batches.POOL", 16)
    monkeypatch.setattr("bnnflow.transport.batches.ELEMENTS", elements)
    file, seen = tmp_path / "training.npz", []
    reuse = Reuse(3, flipped)
    for steps in (count, 60) if count else (60,):
        field, _ = train(
            Recording(),
            doubled,
            training=bf.Training(steps=steps, batch_size=8),
            checkpoint=bf.Checkpoint(file, resume=True),
            reuse=reuse,
        )
        seen += field.seen  # type: ignore[operator]
    whole, _ = train(
        Recording(), doubled, training=bf.Training(steps=60, batch_size=8), reuse=reuse
    )
    assert torch.equal(torch.stack(seen), torch.stack(whole.seen))  # type: ignore[arg-type]


def test_drives_make_the_field():
    model = network(width=4)
    field = (
        InformedVelocity(model.spec, (GradientSteps(1), GaussNewton()), 8, 1)
        .to(F64)
        .bind(WhitenedPosterior(model))
    )
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.2)
    t, x = (
        torch.rand(5, generator=generator(), dtype=F64),
        torch.randn(5, model.dim, generator=generator(1), dtype=F64),
    )
    scores = field.precompute(t, x)
    assert [part.shape for part in scores] == [x.shape] * 4
    assert torch.equal(field.from_precomputed(t, x, *scores), field(t, x))
    assert not any(part.requires_grad for part in scores)


def test_checkpoint_of_another_field_is_refused(tmp_path):
    file = tmp_path / "training.npz"
    train(
        small_field(), shifted, checkpoint=file, training=bf.Training(steps=2, batch_size=8)
    )
    with pytest.raises(ValueError, match="another field"):
        train(
            small_field(3),
            shifted,
            training=bf.Training(steps=4, batch_size=8),
            checkpoint=bf.Checkpoint(file, resume=True),
        )


def test_training_stops_when_held_out_draws_do_not_gain():
    """Forty targets are learned by heart; draws that are held out tell."""
    few = 0.5 * torch.randn(8, 2, generator=generator(4)) + 2

    def memorised(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 2, generator=g), few[
            torch.randint(len(few), (n,), generator=g)
        ]

    _, info = train(
        small_field(),
        memorised,
        held_out=shifted,
        training=bf.Training(steps=20_000, batch_size=64, patience=3, learning_rate=1e-2),
    )
    assert info["stopped_early"]
    assert info["steps"] < 20_000
    assert info["held_out_loss"] < math.inf


def test_autocast_trains_and_settings_are_checked():
    field, info = train(
        small_field(), shifted, training=bf.Training(steps=3, batch_size=8, autocast=True)
    )
    assert math.isfinite(info["loss"])
    assert next(field.parameters()).dtype == torch.float32
    for options in ({"steps": 0}, {"budget": 0.0}, {"learning_rate": 0.0}, {"patience": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            bf.Training(**options)
    with pytest.raises(ValueError, match="steps must be"):
        Reuse(0)


def test_steps_with_infinite_gradients_are_left_out():
    calls = []

    def sometimes(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        calls.append(n)
        x0, x1 = shifted(n, g)
        return (x0, x1 * math.inf) if len(calls) == 3 else (x0, x1)

    field, info = train(
        small_field(), sometimes, training=bf.Training(steps=6, batch_size=8)
    )
    assert info["steps"] == 6
    assert all(bool(parameter.isfinite().all()) for parameter in field.parameters())


def test_fit_flow_takes_path_source_times_and_held_out_draws():
    model, mean, covariance = regression(torch.float32)
    exact = bf.Gaussian(1.5 * mean, 1.5 * torch.linalg.cholesky(covariance))
    flow = bf.fit_flow(
        model,
        exact.sample(4000, 0),
        velocity="residual",
        source=Source.scaled(model, 0.5),
        matching=Matching(times=Beta(1.5, 1.0), path=AffinePath("variance_preserving")),
        training=bf.Training(steps=30, batch_size=64),
        held_out=exact.sample(500, 1),
    )
    theta, log_q = flow.sample_with_log_prob(300, 2, solver=Solver(steps=24))
    assert flow.path.schedule == "variance_preserving"
    assert float((log_q - exact.log_prob(theta)).abs().mean()) < 0.2
    with pytest.raises(TypeError, match="held_out must be"):
        bf.fit_flow(
            model,
            exact.sample(50, 0),
            held_out=(exact.sample(5, 0), torch.zeros(5)),
            training=bf.Training(steps=1),
        )
    theta = exact.sample(5, 0).unsqueeze(0)
    weighted = bf.Draws(theta, model.log_joint(theta), log_weights=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="held_out must be draws of equal weights"):
        bf.fit_flow(
            model, exact.sample(50, 0), held_out=weighted, training=bf.Training(steps=1)
        )


def test_two_processes_train_one_field(tmp_path):
    program = f"""
import json, os, torch
import bnnflow as bf
from tests.problems import regression
model, mean, covariance = regression(torch.float32)
draws = bf.Gaussian(1.5 * mean, 1.5 * torch.linalg.cholesky(covariance)).sample(500, 0)
torch.manual_seed(0)
training = bf.Training(steps=10, batch_size=64)
flow = bf.fit_flow(model, draws, velocity="weights", training=training, seed=3)
total = sum(float(p.double().sum()) for p in flow.velocity.parameters())
with open(f"{tmp_path}/{{os.environ['RANK']}}.json", "w") as file:
    json.dump({{"sum": total, "loss": flow.info["loss"]}}, file)
"""
    assert run_ranks(program) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["sum"] == second["sum"]
