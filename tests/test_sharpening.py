"""A learned prior whose map climbs the likelihood of its tasks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.transport import AmortisedVelocity, Flow, FlowMap, distil, sharpen, sharpening
from bnnflow.transport.learned_prior import log_evidence_by_prior
from bnnflow.transport.pushforward import Pushforward
from bnnflow.transport.sharpening import _Chains
from tests.problems import F64, built, conjugate, generator, normal
from tests.processes import run_ranks
from tests.test_learned_prior import fitted, posterior, task

STEPS = bf.Training(steps=150, batch_size=112, learning_rate=1e-3)


@pytest.fixture(scope="module")
def tasks() -> list[bf.BayesianModel]:
    return [task(seed) for seed in range(20)]


@pytest.fixture(scope="module")
def draws(tasks: list[bf.BayesianModel]) -> list[bf.Draws]:
    return [posterior(each, seed) for seed, each in enumerate(tasks)]


@pytest.fixture(scope="module")
def flow(tasks: list[bf.BayesianModel], draws: list[bf.Draws]) -> Flow:
    return fitted(tasks, draws, held_out=0.3)


@pytest.fixture(scope="module")
def prior(flow: Flow) -> FlowMap:
    return distil(flow, 2, trajectories=512, training=bf.Training(steps=100))


@pytest.fixture(scope="module")
def sharper(
    tasks: list[bf.BayesianModel], draws: list[bf.Draws], flow: Flow, prior: FlowMap
) -> FlowMap:
    return sharpen(prior, flow, tasks, draws, training=STEPS, seed=0)


@pytest.fixture
def judged(
    monkeypatch,
    tasks: list[bf.BayesianModel],
    draws: list[bf.Draws],
    flow: Flow,
    prior: FlowMap,
) -> Callable[..., FlowMap]:
    """Sharpen in a few steps, and be told evidences before and after."""

    def sharpened(
        before: float, after: float, steps: int, seed: int = 0, **given: object
    ) -> FlowMap:
        scores = iter((before, after))
        monkeypatch.setattr(
            sharpening, "log_evidence_by_prior", lambda *given: torch.tensor([next(scores)])
        )
        few = replace(STEPS, steps=steps)
        given = {"draws": draws, "training": few, "seed": seed} | given
        return sharpen(prior, flow, tasks, **given)  # type: ignore[arg-type]

    return sharpened


class Still(nn.Module):
    """A field that leaves N(0, 1) as it is."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def chains_at(points: Tensor, models: list[bf.BayesianModel], push: Pushforward) -> _Chains:
    """Return chains that are at points ``(tasks, chains, dim)``."""
    chains = _Chains(models, push, points.__getitem__)
    chains.points = points
    return chains


def broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come in the third step."""
    drawn, calls = _Chains.drawn, itertools.count(1)

    def until_the_third(
        self: _Chains, n: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return drawn(self, n, generator)

    monkeypatch.setattr(_Chains, "drawn", until_the_third)


def evidence(tasks: list[bf.BayesianModel], prior: FlowMap) -> Tensor:
    """Return the log evidence of all rows of each task, by draws of a prior."""
    return log_evidence_by_prior(tasks, prior.sample(2**15, 1), len(tasks[0].x))


def test_the_evidence_of_the_tasks_rises(
    tasks: list[bf.BayesianModel], flow: Flow, prior: FlowMap, sharper: FlowMap
) -> None:
    assert sharper.info["held_out_tasks"] == flow.info["held_out_tasks"]
    assert sharper.info["steps"] == STEPS.steps
    before, after = sharper.info["log_evidence"]
    assert after > before
    learned = [each for n, each in enumerate(tasks) if n not in flow.info["held_out_tasks"]]
    gain = evidence(learned, sharper) - evidence(learned, prior)
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))
    unseen = [task(seed) for seed in range(1000, 1040)]
    gain = evidence(unseen, sharper) - evidence(unseen, prior)
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))
    assert not any(p.requires_grad for p in sharper.velocity.parameters())


def test_a_sharper_map_keeps_the_symmetries(
    tasks: list[bf.BayesianModel], sharper: FlowMap
) -> None:
    carried = tasks[0].transported(sharper)
    z = normal(20, sharper.dim, dtype=torch.float32)
    moved = tasks[0].spec.random_symmetry(z, 3, carried.symmetries())
    assert not torch.allclose(moved, z)
    torch.testing.assert_close(
        carried.log_joint(moved), carried.log_joint(z), rtol=1e-4, atol=1e-3
    )


def test_the_same_seed_gives_the_same_map(
    judged: Callable[..., FlowMap], prior: FlowMap
) -> None:
    one, again, other = (judged(0.0, 1.0, steps=3, seed=seed) for seed in (0, 0, 1))
    assert again.sample(3, 0).equal(one.sample(3, 0))
    assert not other.sample(3, 0).equal(one.sample(3, 0))
    assert not prior.sample(3, 0).equal(one.sample(3, 0))


def test_ctrl_c_keeps_what_was_learned(
    monkeypatch, judged: Callable[..., FlowMap], prior: FlowMap
) -> None:
    broken_off(monkeypatch)
    with pytest.warns(UserWarning, match="interrupted: returning the flow after 2 steps"):
        short = judged(1.0, 2.0, steps=150)
    assert (short.info["steps"], short.info["interrupted"]) == (2, True)
    assert not short.sample(3, 0).equal(prior.sample(3, 0))


def test_it_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: Callable[..., FlowMap]
) -> None:
    whole, path = judged(1.0, 2.0, steps=5), tmp_path / "state.npz"
    with monkeypatch.context() as patch:
        broken_off(patch)
        with pytest.warns(UserWarning, match="2 steps"):
            judged(1.0, 2.0, steps=5, checkpoint=path)
        # chains have started and settled, and do so no more
        patch.setattr(_Chains, "begin", None)
        go_on = bf.Checkpoint(path, resume=True)
        again = judged(1.0, 2.0, steps=5, checkpoint=go_on)
    assert again.info["steps"] == 5
    assert again.sample(3, 0).equal(whole.sample(3, 0))
    monkeypatch.setattr(_Chains, "begin", None)  # refused before anything is sampled
    with pytest.raises(ValueError, match="already holds a training"):
        judged(1.0, 2.0, steps=5, checkpoint=path)
    with pytest.raises(ValueError, match="another draws"):
        judged(1.0, 2.0, steps=5, checkpoint=go_on, draws=None)


def test_chains_may_start_at_few_draws(
    judged: Callable[..., FlowMap], draws: list[bf.Draws], prior: FlowMap
) -> None:
    few = [
        replace(each, theta=each.theta[:1, :3], log_joint=each.log_joint[:1, :3], stats={})
        for each in draws
    ]
    sharper = judged(1.0, 2.0, steps=2, draws=few)
    assert not sharper.sample(3, 0).equal(prior.sample(3, 0))


def test_two_processes_sharpen_one_map(tmp_path: Path) -> None:
    program = f"""
import os
import bnnflow as bf
from bnnflow.transport import distil, sharpen
from tests.test_learned_prior import fitted, posterior, task
tasks = [task(seed) for seed in range(4)]
draws = [posterior(each, seed) for seed, each in enumerate(tasks)]
flow = fitted(tasks, draws, held_out=0.3)
prior = distil(flow, 2, trajectories=64, training=bf.Training(steps=5))
few = bf.Training(steps=3, batch_size=16, learning_rate=1e-3)
folder = {str(tmp_path)!r}
state = bf.Checkpoint(folder + "/state.npz", resume=True)
sharper = sharpen(prior, flow, tasks, draws, training=few, checkpoint=state)
sharper.save(folder + "/" + os.environ["RANK"] + ".npz")
"""
    assert run_ranks(program) == [0, 0]
    ours, theirs = (bf.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    assert ours.sample(3, 0).equal(theirs.sample(3, 0))
    points = np.load(tmp_path / "state.npz")["points"]
    assert points.shape[:1] == (2,)
    assert not np.isclose(points[0], points[1]).any()  # chains of their own


def test_it_is_kept_in_a_file(tmp_path, sharper: FlowMap) -> None:
    again = bf.load(sharper.save(tmp_path / "prior.npz"))
    assert again.sample(3, 0).equal(sharper.sample(3, 0))
    assert again.info["log_evidence"] == sharper.info["log_evidence"]


def test_a_prior_that_gets_no_better_is_returned_as_it_was(
    judged: Callable[..., FlowMap], prior: FlowMap
) -> None:
    with pytest.warns(UserWarning, match="has not risen"):
        same = judged(-1.0, -2.0, steps=2)
    assert same.sample(3, 0).equal(prior.sample(3, 0))
    assert same.info["log_evidence"] == [-1.0, -2.0]


def test_points_follow_their_own_posterior() -> None:
    """Under the identity as the map they are draws of each task's posterior, in closed form."""
    first = conjugate()
    model = first.model.with_prior(bf.priors.Normal(1.0))
    other = model.subset(torch.arange(6))
    flow = Flow.of(Still(), model)
    push = FlowMap(
        flow.velocity, flow.source, flow.spec, torch.linspace(0, 1, 2)
    ).pushforward()
    torch.testing.assert_close(push.forward(normal(3, 4)), normal(3, 4))
    chains = chains_at(normal(64, 8, 4, seed=1), [model, other] * 32, push)
    g = generator(2)
    for _ in range(60):
        chains.move(*chains.drawn(512, g), g)
    for number, task_ in enumerate((model, other)):
        design = torch.cat([task_.x, torch.ones(len(task_.x), 1, dtype=F64)], 1)
        covariance = torch.linalg.inv(design.T @ design / 0.25 + torch.eye(4, dtype=F64))
        mean = covariance @ design.T @ task_.y.flatten() / 0.25
        points = chains.points[number::2].flatten(0, 1)
        sd = covariance.diag().sqrt()
        assert bool(((points.mean(0) - mean).abs() < 4 * sd / math.sqrt(256)).all())
        assert bool(((points.std(0) / sd).log().abs() < 0.15).all())


def test_the_slope_of_the_map_is_that_of_finite_differences(
    tasks: list[bf.BayesianModel], prior: FlowMap
) -> None:
    push = prior.pushforward().to("cpu", F64)
    models = [each.to("cpu", F64) for each in tasks[:2]]
    push.velocity.requires_grad_()
    z: Tensor = normal(2, 3, prior.dim)
    chains = chains_at(z, models, push)
    weight = next(p for p in push.velocity.parameters() if p.dim() > 0 and p.numel() > 3)
    (slope,) = torch.autograd.grad(
        chains.log_likelihood(torch.tensor([0, 1]), z).sum(), weight
    )
    entry = int(slope.abs().argmax())
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            weight.view(-1)[entry] += step
            ends.append(float(chains.log_likelihood(torch.tensor([0, 1]), z).sum()))
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(
        float(slope.view(-1)[entry]), rel=1e-4
    )


def test_bad_input_is_named(
    tasks: list[bf.BayesianModel], draws: list[bf.Draws], flow: Flow, prior: FlowMap
) -> None:
    def refuse(message: str, **changed: object) -> None:
        given = {"prior": prior, "flow": flow, "tasks": tasks, "draws": draws} | changed
        with pytest.raises(ValueError, match=message):
            sharpen(**given)  # type: ignore[arg-type]  # what is refused

    refuse("flow must come from fit_prior", flow=replace(flow, info={}))
    refuse(
        "tasks must be those that the flow was learned from, 20, got 19",
        tasks=tasks[1:],
        draws=draws[1:],
    )
    wide = [task(seed, width=5) for seed in range(20)]
    refuse("prior is of another network", tasks=wide, draws=None)
    refuse(
        r"tasks\[1\] has another prior", tasks=[tasks[0], task(1, scale=2.0), *tasks[2:]]
    )
    refuse("draws must be as many as tasks", draws=draws[:3])
    refuse(r"draws\[0\]: these are draws of another model", draws=draws[::-1])
    refuse("neither autocast nor compiled", training=bf.Training(steps=1, autocast=True))
    looking = FlowMap(
        built(lambda: AmortisedVelocity(tasks[0].spec, 2, 1)),
        prior.source,
        prior.spec,
        prior.times,
    )
    refuse("looks at the data of a posterior", prior=looking)
