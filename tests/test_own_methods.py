"""Samplers of the user's own: what they return is looked at, and what is wrong is named."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.inference.loop import Tuned, WarmUp, fixed, run_chains
from bnnflow.types import Kernel
from tests.problems import F64, built
from tests.test_method import METHODS

X = torch.linspace(-1, 1, 6, dtype=F64).unsqueeze(-1)
MODEL = bf.BayesianModel(
    built(lambda: nn.Linear(1, 1)), bf.priors.Normal(), bf.likelihoods.Gaussian(0.3), X, X
)


class State(NamedTuple):
    theta: Tensor
    log_joint: Tensor


class Info(NamedTuple):
    n_steps: Any


class Other(NamedTuple):
    acceptance_rate: Any


def init(theta: Tensor, generator: torch.Generator) -> State:
    return State(theta, MODEL.log_joint(theta))


def step(state: State, generator: torch.Generator) -> tuple[State, Info]:
    moved = state.theta + 0.01 * torch.randn(state.theta.shape, generator=generator)
    return init(moved, generator), Info(torch.ones(len(moved)))


@dataclass(frozen=True)
class Own(bf.inference.Method):
    """A walk whose parts can be replaced."""

    init: Callable[..., Any] = init
    step: Callable[..., Any] = step
    tuned: Callable[..., Any] | None = field(default=None)
    change: Callable[[bf.Draws], Any] = lambda draws: draws

    def draw(self, model: bf.BayesianModel, run: bf.inference.Run) -> bf.Draws:
        kernel = Kernel(self.init, self.step)
        process = fixed(kernel)
        if self.tuned is not None:
            process = WarmUp(self.init, self.step, self.tuned)
        sizes = {"chains": 2, "warmup": run.warmup or 0, "draws": 3}
        return self.change(run_chains(model, run, process, name="own", **sizes))


def test_the_walk_itself_runs() -> None:
    assert bf.sample(MODEL, Own(), seed=0).theta.shape == (2, 3, 2)
    tuned = Own(tuned=lambda state: Tuned(Kernel(init, step), state, {"found": 1.0}))
    assert bf.sample(MODEL, tuned, warmup=2, seed=0).info["found"] == 1.0


STATES = "init and step must return states with theta (chain, dim) and log_joint (chain,)"
PAIR = "step must return a pair (state, info)"
INFO = "an info that is a named tuple of tensors (chain,), n_steps among them"
WRONG: dict[str, tuple[Own, str]] = {
    "weights alone": (Own(init=lambda theta, g: theta), f"{STATES}, got Tensor"),
    "a pair": (Own(init=lambda theta, g: (theta, MODEL.log_joint(theta))), STATES),
    "one density": (
        Own(init=lambda theta, g: State(theta, MODEL.log_joint(theta).sum())),
        f"{STATES}, got State(theta (2, 2), log_joint ())",
    ),
    "a state alone": (Own(step=lambda state, g: state), PAIR),
    "nothing": (Own(step=lambda state, g: None), f"{PAIR}, got NoneType"),
    "three": (Own(step=lambda state, g: (state, Info(torch.ones(2)), 0)), PAIR),
    "a dict": (Own(step=lambda state, g: (state, {"n_steps": 1})), INFO),
    "no count": (Own(step=lambda state, g: (state, Other(torch.ones(2)))), INFO),
    "a number": (
        Own(step=lambda state, g: (state, Info(1))),
        f"{INFO}, got Info(n_steps int) whose n_steps is none",
    ),
    "a state that lost its density": (
        Own(step=lambda state, g: (state._replace(log_joint=None), Info(torch.ones(2)))),
        STATES,
    ),
    "a kernel": (
        Own(tuned=lambda state: Kernel(init, step)),
        "tuned must return a Tuned(kernel, state, found), got Kernel",
    ),
    "no state": (
        Own(tuned=lambda state: Tuned(Kernel(init, step), None, {})),
        f"{STATES}, got NoneType",
    ),
    "weights": (Own(change=lambda draws: draws.theta), "Own.draw must return Draws"),
}


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_returned_and_what_was_expected_is_named(name: str, warmup: int) -> None:
    method, message = WRONG[name]
    with pytest.raises(TypeError) as error:
        bf.sample(MODEL, method, warmup=warmup, seed=0)
    assert message in str(error.value)


def test_weights_of_another_model_are_named() -> None:
    method = Own(change=lambda draws: replace(draws, theta=draws.theta[..., :1]))
    with pytest.raises(
        ValueError, match=r"Own.draw must return weights \(chain, draw, 2\)"
    ):
        bf.sample(MODEL, method, seed=0)


def test_a_density_that_is_nan_is_told_and_the_draws_are_kept() -> None:
    def change(draws: bf.Draws) -> bf.Draws:
        log_joint = draws.log_joint.clone()
        log_joint[0, 1] = torch.nan
        return replace(draws, log_joint=log_joint)

    with pytest.warns(UserWarning, match="Own: log_joint is NaN for 1 of 6 draws"):
        draws = bf.sample(MODEL, Own(change=change), seed=0)
    assert draws.theta.shape == (2, 3, 2)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_which_settings_it_refuses(name: str, tmp_path) -> None:
    method, _ = METHODS[name]
    given = {"chains": 2, "warmup": 3, "draws": 2, "init": "prior", "checkpoint": tmp_path}
    for setting in method.refused:
        with pytest.raises(ValueError, match=rf"takes .*, not {setting}"):
            bf.sample(MODEL, method, seed=0, **{setting: given[setting]})
