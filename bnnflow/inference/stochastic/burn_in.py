"""From the settings of a stochastic-gradient method to its draws: burn-in, the size of the step,
what a draw holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bnnflow.arguments import flag, integer, number, settle
from bnnflow.draws import Draws
from bnnflow.inference.loop import Tuned, WarmUp, run_chains, thinned
from bnnflow.inference.start import WARM_START, maximise
from bnnflow.inference.stochastic.gradients import (
    Anchor,
    Scales,
    StochasticTarget,
    anchored,
    averaged,
    control_variates,
    measure,
    move_anchor,
    stochastic,
)
from bnnflow.inference.stochastic.schedules import Constant, Schedule
from bnnflow.method import Run
from bnnflow.model import BayesianModel
from bnnflow.types import Kernel

__all__ = [
    "MakeKernel",
    "Scheme",
    "Settings",
    "StepSizeRule",
    "check",
    "record_draws",
    "run_stochastic",
    "skip_exploration",
]

MakeKernel = Callable[[StochasticTarget, Scales, float, Schedule, int], Kernel]
"""``(target, scales, step size, schedule, gradients a step) -> kernel``."""

StepSizeRule = Callable[[Scales], tuple[float, float]]
"""Scales to the step size to sample with, and the longest that is safely stable, however noisy."""


class Settings(Protocol):
    """What all stochastic-gradient methods are told."""

    @property
    def step_size(self) -> float | None: ...  # noqa: D102
    @property
    def batch_size(self) -> int | None: ...  # noqa: D102
    @property
    def preconditioner(self) -> Literal["none", "diagonal", "rmsprop"] | None: ...  # noqa: D102
    @property
    def control_variates(self) -> bool: ...  # noqa: D102
    @property
    def bias(self) -> float: ...  # noqa: D102
    @property
    def schedule(self) -> Schedule: ...  # noqa: D102
    @property
    def thinning(self) -> int: ...  # noqa: D102


def check(settings: Settings, *positive: str) -> None:
    """Check the settings that all of them have, and the numbers named, which must be ``positive``
    too.
    """
    settle(settings, number, "step_size", *positive, above=0)
    settle(settings, integer, "batch_size", "thinning", least=1)
    settle(settings, number, "bias", above=0, below=1)
    settle(settings, flag, "control_variates")
    if settings.control_variates and settings.batch_size is None:
        raise ValueError(
            "control_variates reduce the noise of mini-batches: give a batch_size"
        )
    if not callable(settings.schedule):
        raise ValueError(
            f"schedule must be a schedule such as Constant(), got {settings.schedule!r}"
        )


class Scheme(NamedTuple):
    """What sets one stochastic-gradient method apart from another."""

    make_kernel: MakeKernel
    step_size_rule: StepSizeRule  # the step size, where none is given
    # scales and step size to what the reader should know
    notes: Callable[[Scales, float], dict[str, Any]]
    # statistics of the kernel and the configurational temperature to those of a draw
    draw: Callable[..., Any]
    settle: Callable[[Any, Scales, float], Any] = lambda chain, scales, step_size: chain
    """Puts what a chain learns slowly where it belongs, before each transition of the first half of
    warm-up.
    """


def run_stochastic(
    model: BayesianModel, run: Run, settings: Settings, scheme: Scheme
) -> Draws:
    """Run a stochastic-gradient method; see `bnnflow.sample`."""
    n = len(model.x)
    if settings.batch_size is not None and settings.batch_size > n:
        raise ValueError(
            f"batch_size must be at most the {n} rows of data, got {settings.batch_size}"
        )
    warmup = 200 if run.warmup is None else run.warmup
    burn_in = _BurnIn(model, run, settings, scheme, warmup)
    process = WarmUp(burn_in.init, burn_in.step, burn_in.tuned)
    name = type(settings).__name__
    return run_chains(
        model,
        run,
        process,
        chains=run.chains_or(16),
        warmup=warmup,
        draws=run.draws or 1000,
        name=name,
    )


class BurnIn(NamedTuple):
    """Where the chains are, and what has been learned."""

    chain: Any
    scales: Scales
    anchor: Anchor | None
    shrink: float  # factor on the step size
    lowest: float  # smallest of the last quarter
    done: int  # transitions


class _BurnIn:
    """The warm-up of stochastic-gradient methods.

    A step size that is found rather than given starts at the longest stable one and comes down to
    the one to sample with over the first half, as in annealing: what is far from the mode gets
    there and cools. Scales are measured at the start and three times in the first half, where also
    an anchor moves to where its chain is, if the density is higher there; the second half averages
    curvature and noise over three measurements. Chains that diverge and have not risen shorten the
    step, to a quarter where all do, and clean transitions lengthen it by 5%, never beyond what was
    asked for or found; what is used in the end is the shortest of the last quarter.
    """

    def __init__(
        self,
        model: BayesianModel,
        run: Run,
        settings: Settings,
        scheme: Scheme,
        warmup: int,
    ) -> None:
        self.model, self.run, self.settings, self.scheme, self.warmup = (
            model,
            run,
            settings,
            scheme,
            warmup,
        )
        own = "diagonal" if settings.step_size is None else "none"
        self.diagonal = (settings.preconditioner or own) == "diagonal"
        self.early = {round(warmup * part) for part in (0.05, 0.25, 0.5)} - {0, warmup}
        self.late = {
            round(warmup * part): 1 / k
            for k, part in enumerate((0.625, 0.75, 0.875), 1)
            if warmup >= 8
        }

    def init(self, theta: Tensor, generator: torch.Generator) -> BurnIn:
        anchor = None
        if self.settings.control_variates:
            there = self.run.init is None
            anchor = anchored(
                self.model,
                theta
                if there
                else maximise(self.model, theta, WARM_START, 0.02, False, ""),
            )
        flat = Scales(torch.ones_like(theta[0]), torch.zeros_like(theta[0]), 0.0, 1.0, 0)
        state = BurnIn(None, flat, anchor, 1.0, 1.0, 0)
        # for the metric, if it has its own
        chain = self.kernel(state, 1.0, Constant()).init(theta, generator)
        state = state._replace(scales=self.measured(state._replace(chain=chain), generator))
        return state._replace(
            chain=self.kernel(state, self.step_size(state), Constant()).init(
                theta, generator
            )
        )

    def step(self, state: BurnIn, generator: torch.Generator) -> tuple[BurnIn, Any]:
        extra = state.scales.gradients if state.done == 0 else 0
        if state.done in self.early:
            anchor = state.anchor and move_anchor(
                self.model, state.anchor, state.chain.theta
            )
            state = state._replace(anchor=anchor)
            state = state._replace(scales=self.measured(state, generator))
            extra = state.scales.gradients + (anchor is not None)
        elif state.done in self.late:
            new = self.measured(state, generator, state.scales.metric)
            state = state._replace(
                scales=averaged(state.scales, new, self.late[state.done])
            )
            extra = new.gradients
        size = self.step_size(state, max(0.0, 1 - 2 * state.done / max(1, self.warmup)))
        chain = state.chain
        if 2 * state.done <= self.warmup:
            chain = self.scheme.settle(chain, state.scales, size)
        before = chain.log_joint
        chain, info = self.kernel(state, size, Constant()).step(chain, generator)
        # not those on a long way uphill
        lost = info.diverging & ~(chain.log_joint > before)
        diverged = float(self.run.ranks.mean(lost.double().mean()))
        shrink = max(
            1e-12, min(1.0, state.shrink * math.exp(0.05 * (diverged < 1) - 1.4 * diverged))
        )
        lowest = min(state.lowest, shrink) if state.done > 0.75 * self.warmup else shrink
        state = BurnIn(chain, state.scales, state.anchor, shrink, lowest, state.done + 1)
        return state, info._replace(n_steps=info.n_steps + extra)

    def tuned(self, state: BurnIn) -> Tuned:
        size = self.step_size(state._replace(shrink=state.lowest))
        exact = (
            None
            if self.settings.batch_size is None
            else torch.no_grad()(self.model.log_joint)
        )
        sampling = self.kernel(state, size, self.settings.schedule)
        found = {
            "exact": False,
            "step_size": size,
            "curvature": state.scales.curvature,
            "gradient_noise": state.scales.noise_level,
        } | self.scheme.notes(state.scales, size)
        chain = state.chain._replace(done=0)  # schedules begin here
        return Tuned(
            record_draws(sampling, exact, chain.theta, self.scheme.draw), chain, found
        )

    def target(self, anchor: Anchor | None) -> StochasticTarget:
        batch_size = self.settings.batch_size
        if anchor is None or batch_size is None:
            return stochastic(self.model, batch_size)
        return control_variates(self.model, anchor, batch_size)

    def kernel(self, state: BurnIn, step_size: float, schedule: Schedule) -> Kernel:
        cost = 2 if self.settings.control_variates else 1
        kernel = self.scheme.make_kernel(
            self.target(state.anchor), state.scales, step_size, schedule, cost
        )
        return thinned(skip_exploration(kernel, schedule), self.settings.thinning)

    def measured(
        self, state: BurnIn, generator: torch.Generator, metric: Tensor | None = None
    ) -> Scales:
        theta = state.chain.theta
        metric = getattr(state.chain, "metric", metric)
        if metric is None and not self.diagonal:
            metric = torch.ones_like(theta[0])
        noisy = None if self.settings.batch_size is None else self.target(state.anchor)
        return measure(self.model, noisy, theta, generator, metric, self.run.ranks)

    def step_size(self, state: BurnIn, heat: float = 0.0) -> float:
        """Return the step size: the longest stable one at heat 1, the one to sample with at
        heat 0.
        """
        if self.settings.step_size is not None:
            return state.shrink * self.settings.step_size
        final, longest = self.scheme.step_size_rule(state.scales)
        return state.shrink * final * max(1.0, longest / final) ** heat


def skip_exploration(kernel: Kernel, schedule: Schedule) -> Kernel:
    """Return the kernel one step of which also makes all steps before it in which the schedule
    explores.
    """

    def step(state: Any, generator: torch.Generator) -> tuple[Any, Any]:
        before = []
        while not schedule(state.done).sampling:
            state, info = kernel.step(state, generator)
            before.append(info)
        state, info = kernel.step(state, generator)
        for other in before:
            info = info._replace(
                n_steps=info.n_steps + other.n_steps,
                diverging=info.diverging | other.diverging,
            )
        return state, info

    return Kernel(kernel.init, step)


def record_draws(
    kernel: Kernel,
    log_joint: Callable[[Tensor], Tensor] | None,
    centre: Tensor,
    info: Callable[..., Any],
) -> Kernel:
    """Return the kernel whose transitions are draws: with the exact density, and a check of the
    law.

    The configurational temperature is (centre - theta) . grad log_joint / dim. Its mean is 1 under
    the posterior whatever the constant centre is, here the chain's first point: integrate by parts.
    Mini-batch gradients leave the mean as it is, as their batch is independent of theta. It is near
    0 while a chain has not yet moved away from where it began, and far from 1 while it drifts.

    Args:
        kernel: its states have ``theta``, ``log_joint`` and ``grad``.
        log_joint: the exact density, evaluated once a draw; None if the kernel's is exact.
        centre: ``(chain, dim)``.
        info: makes the statistics of those of the kernel, with ``configurational_temperature``
            added.
    """

    def step(state: Any, generator: torch.Generator) -> tuple[Any, Any]:
        state, found = kernel.step(state, generator)
        temperature = ((centre - state.theta) * state.grad).sum(
            -1, dtype=torch.float64
        ) / centre.shape[-1]
        if log_joint is not None:
            state = state._replace(log_joint=log_joint(state.theta))
        return state, info(*found, configurational_temperature=temperature)

    return Kernel(kernel.init, step)
