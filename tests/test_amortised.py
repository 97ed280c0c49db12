"""One flow for all data sets that a model could have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.transport import AffinePath, AmortisedVelocity, Flow, Solver
from bnnflow.transport.amortised import _Simulated, _Simulations
from bnnflow.transport.amortised_velocity import data_of, shallow_of, times
from bnnflow.transport.batches import Reuse
from bnnflow.transport.shallow import DataSets
from bnnflow.transport.times import Uniform
from bnnflow.transport.whitened import WhitenedPosterior
from tests.problems import F64, built, generator, normal
from tests.processes import run_ranks
from tests.test_transported import Still
from tests.test_transported import bent as learned_prior

ROWS, INPUTS, UNITS = 9, 2, 4


def model(
    rows: int = ROWS,
    units: int = UNITS,
    scale: float = 1.0,
    noise: float = 0.3,
    dtype: torch.dtype = F64,
    seed: int = 0,
) -> bf.BayesianModel:
    x = normal(rows, INPUTS, seed=seed, dtype=dtype)
    net = built(
        lambda: nn.Sequential(nn.Linear(INPUTS, units), nn.Tanh(), nn.Linear(units, 1)),
        dtype,
    )
    return bf.BayesianModel(
        net,
        priors.Normal(scale),
        likelihoods.Gaussian(noise),
        x,
        x.sin().sum(1) + noise * normal(rows, seed=seed + 1, dtype=dtype),
    )


def learned(one: bf.BayesianModel) -> bf.BayesianModel:
    """The same model under a learned prior."""
    return one.transported(learned_prior(one))


PRIORS = pytest.mark.parametrize(
    "prior", [lambda one: one, learned], ids=["plain", "learned"]
)
Prior = Callable[[bf.BayesianModel], bf.BayesianModel]


def bent(
    spec: bf.WeightSpec, dtype: torch.dtype = F64, **settings: int
) -> AmortisedVelocity:
    """A field whose every parameter counts."""
    settings = {"width": 8, "depth": 2} | settings
    field = built(lambda: AmortisedVelocity(spec, **settings), dtype)
    noise = generator(3)
    with torch.no_grad():
        for each in field.parameters():
            each.add_(0.2 * torch.randn(each.shape, generator=noise).to(each))
    return field.requires_grad_(False)


# ---------------------------------------- networks, unit by unit


@PRIORS
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_networks_unit_by_unit_are_those_of_the_model(prior: Prior, scale: float) -> None:
    one = prior(model(scale=scale))
    scale = 1.0 if one.is_transported else scale
    shallow, data = shallow_of(one), data_of(WhitenedPosterior(one))
    z = normal(3, one.dim)
    near = shallow.linearised(z[:, shallow.order], data.expand(3))
    theta = scale * z
    outputs = one.outputs(theta, one.x)[..., 0]
    torch.testing.assert_close(near.outputs, outputs)
    torch.testing.assert_close(near.residuals, (one.y[:, 0] - outputs) / 0.3)
    right = torch.func.vmap(torch.func.jacrev(lambda t: one.outputs(t, one.x)[..., 0]))(
        theta
    )
    torch.testing.assert_close(near.jacobian.mT, scale * right[..., shallow.order] / 0.3)


# ---------------------------------------- the field


def test_untrained_field_follows_the_mode() -> None:
    """Gauss-Newton steps arrive where the gradient of the likelihood and the pull back agree."""
    one = model(noise=1.0)
    posterior = WhitenedPosterior(one)
    field = built(lambda: AmortisedVelocity(one.spec, 8, 1, newton=40)).bind(posterior)
    x, t = normal(5, one.dim), torch.linspace(0.93, 0.99, 5, dtype=F64)
    c = field.path.coefficients(t.unsqueeze(1))
    score = (field(t, x) - c.drift * x) / c.score_gain
    at = x * c.b / c.q + c.a.square() / c.q * score
    torch.testing.assert_close(score, posterior.grad(at), rtol=1e-5, atol=1e-5)


@PRIORS
def test_moved_weights_move_velocities(prior: Prior) -> None:
    one = prior(model())
    field = bent(one.spec).bind(WhitenedPosterior(one))
    assert field.symmetries == one.symmetries()
    x, t = normal(6, one.dim), torch.linspace(0, 0.99, 6, dtype=F64)
    group = one.symmetries()
    turned, expected = one.spec.transform(group, 5, x, field(t, x))
    assert not torch.equal(turned, x)
    torch.testing.assert_close(field(t, turned), expected)


def test_order_of_rows_does_not_matter() -> None:
    one = model()
    field, x = bent(one.spec), normal(4, one.dim)
    other = one.subset(torch.randperm(ROWS, generator=generator(1)))
    t = torch.full((4,), 0.4, dtype=F64)
    ours, theirs = (field.bind(WhitenedPosterior(each))(t, x) for each in (one, other))
    torch.testing.assert_close(ours, theirs)


def test_rows_that_do_not_count_are_not_seen() -> None:
    one = model()
    field, shallow = bent(one.spec), shallow_of(one)
    data = data_of(WhitenedPosterior(one))
    z, t = normal(1, one.dim), torch.full((1,), 0.6, dtype=F64)
    filled = DataSets(
        torch.cat([data.x, normal(1, 3, INPUTS)], 1),
        torch.cat([data.y, torch.zeros(1, 3, dtype=F64)], 1),
        torch.cat([data.counted, torch.zeros(1, 3, dtype=F64)], 1),
        data.noise,
    )
    ours, theirs = (field.read(shallow, t, z, each).score for each in (data, filled))
    torch.testing.assert_close(ours, theirs)


def test_a_learned_prior_that_moves_nothing_is_the_plain_one() -> None:
    one = model()
    same = one.transported(Flow.of(Still(), one))
    with pytest.raises(ValueError, match="moves with permuted and mirrored"):
        shallow_of(same)  # of a field that says nothing of its symmetries
    still = Still()
    still.symmetries = one.symmetries()
    same = one.transported(Flow.of(still, one))
    field, x = bent(one.spec), normal(4, one.dim)
    t = torch.linspace(0.1, 0.9, 4, dtype=F64)
    ours, theirs = (field.bind(WhitenedPosterior(each))(t, x) for each in (one, same))
    torch.testing.assert_close(ours, theirs)


def test_finite_at_both_ends() -> None:
    one = model()
    field = bent(one.spec).bind(WhitenedPosterior(one))
    for t in (0.0, 1.0):
        assert field(torch.tensor(t, dtype=F64), normal(3, one.dim)).isfinite().all()


def test_divergence_under_a_learned_prior_is_that_of_finite_differences() -> None:
    one = learned(model(rows=4, units=2))
    field = bent(one.spec).bind(WhitenedPosterior(one))
    x, t, step = normal(2, one.dim), torch.tensor([0.2, 0.8], dtype=F64), 1e-5
    velocity, found = field.with_divergence(t, x)
    torch.testing.assert_close(velocity, field(t, x))
    expected = torch.zeros(2, dtype=F64)
    for i, along in enumerate(step * torch.eye(one.dim, dtype=F64)):
        ends = [field(t, x + side * along)[:, i] for side in (1, -1)]
        expected += (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_densities_go_both_ways() -> None:
    """Derivatives through every step are right: forward and reverse log densities agree."""
    one = model(rows=4, units=2)
    flow = Flow.of(bent(one.spec), one, solver=Solver("rk4", 80))
    theta, log_prob = flow.sample_with_log_prob(4, seed=0)
    torch.testing.assert_close(flow.log_prob(theta), log_prob, rtol=1e-4, atol=1e-3)


# ---------------------------------------- what is learned from


def simulations(one: bf.BayesianModel) -> _Simulations:
    shallow = shallow_of(one)
    simulated = _Simulated({shallow.dim: shallow}, one.x, (2, 5), (0.3, 0.8))
    return _Simulations(bent(one.spec), simulated, None, Uniform(), Reuse(), None)


@PRIORS
def test_control_and_averages_have_mean_zero(prior: Prior) -> None:
    """Whatever depends on x_t and the data alone is uncorrelated with what the averages over
    orders and signs take from x1, and with the control variate.
    """
    one = prior(model(units=3))
    task = simulations(one)
    n = 4000 if one.is_transported else 20_000
    x0, x1, *parts = task.simulated(n, generator(0))
    # the same pairs once more, at times of their own
    t, means, x_t, *_ = task.batch(n, lambda n, g: (x0, x1, *parts), generator(1))
    keep = t < 0.9  # beyond, products have no tails that a mean of so many could stand
    with torch.no_grad():
        read = task.field.read(shallow_of(one), t, x_t, DataSets(*parts))  # type: ignore[union-attr]
    control = means[:, 0] - read.mean - read.s2 * means[:, 1]
    control = control - read.s2 * times(read.gain, times(read.jacobian.mT, control))
    about = torch.stack([torch.ones_like(x_t), x_t.tanh(), (read.mean + read.score).tanh()])
    for noise in (x1 - means[:, 0], control):
        products = (about * noise.clamp(-50, 50))[:, keep]
        error = products.std(1) / products.shape[1] ** 0.5
        assert bool((products.mean(1).abs() <= 5 * error).all())
        assert products.std(1).max() > 0.05  # something was taken


@PRIORS
def test_data_sets_are_those_of_the_model(prior: Prior) -> None:
    one = prior(model())
    simulated = simulations(one).simulated
    n = 400 if one.is_transported else 4000
    x0, x1, x, y, counted, noise = simulated(n, generator(0))
    assert x0.shape == x1.shape == (n, one.dim)
    count = counted.sum(1)
    assert {int(each) for each in count} == {2, 3, 4, 5}
    assert (counted.diff(dim=1) <= 0).all()
    assert (y[counted == 0] == 0).all()
    assert 0.3 <= noise.min() < 0.31 < 0.79 < noise.max() <= 0.8
    points = {tuple(row) for row in one.x.tolist()}
    assert {tuple(row) for row in x.flatten(0, 1).tolist()} == points
    shallow = shallow_of(one)
    theta = torch.empty_like(x1).index_copy(1, shallow.order, x1)
    outputs = torch.stack(
        [one.outputs(w, rows)[:, 0] for w, rows in zip(theta, x, strict=True)]
    )
    z = ((y - outputs) / noise)[counted > 0]
    assert abs(float(z.mean())) < 5 / len(z) ** 0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / len(z)) ** 0.5


# ---------------------------------------- from end to end

SHORT = bf.Training(steps=40, batch_size=64)


def short(**settings: object) -> Flow:
    one = model(rows=60, dtype=torch.float32)
    field = built(lambda: AmortisedVelocity(one.spec, 8, 1), torch.float32)
    given = {"rows": (3, 6), "noise": (0.2, 0.6), "velocity": field, "progress": False}
    return bf.fit_amortised(one, **(given | {"training": SHORT} | settings))


def test_training_brings_the_field_nearer_on_data_sets_it_has_not_seen() -> None:
    flow = short(training=replace(SHORT, steps=150))
    one = model(dtype=torch.float32)
    untrained = built(lambda: AmortisedVelocity(one.spec, 8, 1), torch.float32)
    shallow = shallow_of(one)
    simulated = _Simulated({shallow.dim: shallow}, one.x, (3, 6), (0.2, 0.6))
    task = _Simulations(untrained, simulated, None, Uniform(), Reuse(), None)
    with torch.no_grad():
        t, means, x_t, *parts = task.batch(4000, simulated, generator(8))
        early = t < 0.5  # where posteriors are far from normal
        found = []
        for field in (untrained, flow.velocity):
            read = field.read(shallow, t, x_t, DataSets(*parts))  # type: ignore[operator]
            found.append((means[:, 0] - read.mean - read.s2 * read.score)[early].square())
    before, after = (each.sum(1) for each in found)
    gain = before - after
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5


def test_one_flow_serves_other_data_widths_and_files(tmp_path: Path) -> None:
    flow = short(widths=(3, 4, 6))
    assert flow.info["widths"] == [3, 4, 6]
    assert flow.info["rows"] == [3, 6]
    other = model(rows=5, seed=7, dtype=torch.float32)
    with pytest.raises(ValueError, match="another posterior"):
        bf.sample(other, flow, draws=10)
    draws = bf.sample(other, flow.bind(other), draws=64, seed=1)
    assert draws.theta.shape == (1, 64, other.dim)
    flow.save(tmp_path / "flow.npz")
    loaded = bf.load(tmp_path / "flow.npz", model(rows=60, dtype=torch.float32))
    assert torch.equal(loaded.bind(other).sample(64, seed=1), draws.flat)
    wide = model(rows=5, units=11, dtype=torch.float32)
    moved = flow.transfer(wide)
    assert bf.sample(wide, moved, draws=8).theta.shape == (1, 8, wide.dim)
    refined = bf.refine(other, draws, 2, n_leapfrog=2, progress=False)
    assert refined.flat.isfinite().all()


def test_one_flow_serves_the_tasks_of_a_learned_prior(tmp_path: Path) -> None:
    blank = learned(model(rows=60, dtype=torch.float32))
    field = built(lambda: AmortisedVelocity(blank.spec, 8, 1), torch.float32)
    given = {"rows": (3, 6), "velocity": field, "training": replace(SHORT, steps=3)}
    flow = bf.fit_amortised(blank, **given, progress=False)
    flow.save(tmp_path / "flow.npz")
    flow = bf.load(tmp_path / "flow.npz", blank)
    task = learned(model(rows=5, seed=7, dtype=torch.float32))
    draws = bf.sample(task, flow.bind(task), draws=16, seed=1)
    assert task.weights_of(draws.theta).shape == (1, 16, task.dim)
    refined = bf.refine(task, draws, 2, n_leapfrog=2, progress=False)
    assert refined.flat.isfinite().all()
    with pytest.raises(
        ValueError, match="widths: a learned prior is one of networks of one"
    ):
        bf.fit_amortised(blank, widths=(3, 4))


def parameters_of(flow: Flow) -> list[torch.Tensor]:
    return list(flow.velocity.parameters())


def test_training_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = short(), tmp_path / "state.npz"
    names = inspect.unwrap(bf.fit_amortised).__globals__
    draw, batches = _Simulated.__call__, iter(range(15))

    def until_ctrl_c(
        self: _Simulated, n: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, ...]:
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return draw(self, n, generator)

    with monkeypatch.context() as patch:
        # doctest may import the module again
        patch.setattr(names["_Simulated"], "__call__", until_ctrl_c)
        with pytest.warns(UserWarning, match="15 steps"):
            broken_off = short(checkpoint=path)
    assert broken_off.info["interrupted"]
    again = short(checkpoint=bf.Checkpoint(path, resume=True))
    assert again.info["steps"] == 40
    for ours, theirs in zip(*map(parameters_of, (whole, again)), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="rows"):
        short(rows=(3, 7), checkpoint=bf.Checkpoint(path, resume=True))


def test_two_processes_train_one_flow(tmp_path: Path) -> None:
    program = f"""
import os
from tests.test_amortised import short
flow = short(widths=(3, 5))
flow.save({str(tmp_path)!r} + "/" + os.environ["RANK"] + ".npz")
"""
    assert run_ranks(program) == [0, 0]
    one = model(rows=60, dtype=torch.float32)
    ours, theirs = (
        parameters_of(Flow.load(tmp_path / f"{rank}.npz", one)) for rank in (0, 1)
    )
    assert all(map(torch.equal, ours, theirs))


# ---------------------------------------- bad input


def other_likelihood() -> bf.BayesianModel:
    one = model()
    return bf.BayesianModel(one.net, priors.Normal(), likelihoods.Gaussian(), one.x, one.y)


def two_layers() -> bf.BayesianModel:
    one = model()
    net = built(
        lambda: nn.Sequential(
            nn.Linear(INPUTS, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)
        )
    )
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), one.x, one.y)


def relu() -> bf.BayesianModel:
    one = model()
    net = built(lambda: nn.Sequential(nn.Linear(INPUTS, 3), nn.ReLU(), nn.Linear(3, 1)))
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), one.x, one.y)


def heavy() -> bf.BayesianModel:
    one = model()
    return bf.BayesianModel(
        one.net, priors.Laplace(), likelihoods.Gaussian(0.3), one.x, one.y
    )


def of_no_symmetry() -> bf.BayesianModel:
    one = model()
    return one.transported(learned_prior(one, "dws"))


def weighted() -> bf.BayesianModel:
    one = model()
    return bf.BayesianModel(
        one.net,
        priors.Normal(),
        one.likelihood,
        one.x,
        one.y,
        row_weights=torch.full((ROWS,), 2.0),
    )


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (other_likelihood, "known scale"),
        (two_layers, "one hidden layer"),
        (relu, "odd units"),
        (heavy, "normal prior"),
        (weighted, "row_weights"),
        (of_no_symmetry, "mirrored hidden units"),
    ],
)
def test_other_models_are_refused(make: Callable[[], bf.BayesianModel], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bf.fit_amortised(make(), training=SHORT)
    with pytest.raises(ValueError, match=told):
        Flow.of(bent(model().spec), make())


@pytest.mark.parametrize("make", [two_layers, relu])
def test_a_field_of_other_networks_is_refused(
    make: Callable[[], bf.BayesianModel],
) -> None:
    with pytest.raises(ValueError, match="one hidden layer"):
        AmortisedVelocity(make().spec)
    with pytest.raises(ValueError, match="sigma = 0"):
        AmortisedVelocity(model().spec, path=AffinePath(sigma=0.1))
    several = built(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="one output"):
        AmortisedVelocity(bf.WeightSpec.of(several))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rows": (5, 3)}, "rows"),
        ({"rows": (0, 3)}, "rows"),
        ({"rows": (3,)}, "rows"),
        ({"noise": (0.5, 0.1)}, "noise"),
        ({"noise": (0.0, 0.1)}, "noise"),
        ({"widths": ()}, "widths"),
        ({"widths": (0,)}, "widths"),
        ({"training": bf.Training(autocast=True)}, "autocast"),
        ({"training": bf.Training(compile=True)}, "compiled"),
    ],
)
def test_bad_input_is_named(given: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bf.fit_amortised(model(), **given)  # type: ignore[arg-type]


def test_a_field_of_other_inputs_is_refused() -> None:
    net = built(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)))
    field = bent(bf.WeightSpec.of(net))
    with pytest.raises(ValueError, match="differ in more than the width"):
        bf.fit_amortised(model(), velocity=field)
