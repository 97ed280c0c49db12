"""A posterior flow without a Markov chain: sample, correct, fit, repeat."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from bnnflow.arguments import Count, checked
from bnnflow.inference.particles.refine import refine
from bnnflow.model import BayesianModel
from bnnflow.options import Training
from bnnflow.progress import until_interrupted
from bnnflow.seeding import as_generator
from bnnflow.transport.fitting import fit_flow
from bnnflow.transport.flow import Flow, GaussNewtonFlow
from bnnflow.transport.proximal_step import ProximalStep
from bnnflow.types import Seed

__all__ = ["fit_flow_without_draws"]


@checked
def fit_flow_without_draws(
    model: BayesianModel,
    *,
    rounds: Count = 2,
    targets: Count = 4096,
    refine_steps: Count = 16,
    proximal_step: ProximalStep | None = None,
    velocity: Literal["informed", "weights", "residual"] | nn.Module = "informed",
    training: Training | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> Flow:
    """Fit a flow to targets that it makes itself: no draws of the posterior are needed, no warm-up,
    no chain.

    The first targets are draws of the untrained `GaussNewtonFlow`, moved by `refine`; those of each
    later round are draws of the flow so far, moved in the same way, and training goes on from its
    field. The targets are as good as refinement makes them: it leaves the posterior invariant, but
    a few transitions do not move draws between modes that are far apart. Compare two values of
    ``refine_steps``, or ask `correct` for a verdict.

    Args:
        model: the posterior; its likelihood needs a ``fisher_factor`` unless a proximal step is
            given.
        rounds: how often targets are made.
        targets: draws in each round.
        refine_steps: transitions of every draw in each round.
        proximal_step: of the untrained flow.
        velocity: the field; see `fit_flow`.
        training: how long and how fast, all rounds together; see `fit_flow`.
        seed: an int or a generator.
        progress: show bars at a terminal.

    Returns:
        The flow, after Ctrl-C as far as it got, with ``info["interrupted"]`` set.
        ``info["gradients_per_target"]`` counts the gradients of refinement, ``info["rounds"]``
        keeps what `fit_flow` and `refine` said of each.

    Raises:
        ValueError: if there is no round or no target.
    """
    training = training or Training()
    steps = training.steps
    if steps is not None and steps < rounds:
        raise ValueError(
            f"training.steps must be at least the {rounds} rounds, got {steps}"
        )
    share = replace(
        training,
        budget=training.budget / rounds,
        steps=None if steps is None else steps // rounds,
    )
    generator = as_generator(seed, model.device)
    flow = GaussNewtonFlow(model, proximal_step)
    history, gradients = [], 0.0
    with until_interrupted() as fitted:
        for _ in range(rounds):
            theta = flow.sample(targets, generator)
            moved = refine(model, theta, refine_steps, seed=generator, progress=progress)
            if moved.info["interrupted"]:
                raise KeyboardInterrupt
            flow = fit_flow(
                model,
                moved.flat,
                velocity=velocity,
                training=share,
                seed=generator,
                progress=progress,
            )
            velocity = flow.velocity
            gradients += moved.info["gradients_per_draw"]
            history.append({"refine": moved.info, "fit": flow.info})
            fitted.done += 1
            if flow.info["interrupted"]:
                break
    info = {"rounds": history, "gradients_per_target": gradients}
    info["interrupted"] = fitted.interrupted or flow.info["interrupted"]
    return replace(flow, info=flow.info | info)
