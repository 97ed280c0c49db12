"""A prior learned from the posteriors of many tasks: empirical Bayes, with a flow for the prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bnnflow.arguments import Count, Share, checked
from bnnflow.draws import Draws, counted_alike, evenly, refuse_approximation
from bnnflow.inference.mcmc.hmc import HMC
from bnnflow.inference.particles.refine import refine
from bnnflow.inference.sampling import sample
from bnnflow.model import BayesianModel
from bnnflow.options import Training
from bnnflow.progress import progress_bar, until_interrupted
from bnnflow.seeding import as_generator
from bnnflow.transport.fitting import fit_flow
from bnnflow.transport.flow import Flow
from bnnflow.transport.options import Matching
from bnnflow.types import Seed

__all__ = ["fit_prior", "log_evidence_by_prior"]

# of a task's first posterior
_CHAINS, _WARMUP, _DRAWS, _LONGEST = 16, 150, 24, 128
_JUDGED_BY = 3  # rows: of more, importance weights from a prior run out
_PRIOR_DRAWS = 4096
_FEWEST = 2  # tasks, one to learn from and one to judge by
_STEPS, _N_LEAPFROG = 2, 8  # of draws that follow a prior's change


@checked
def fit_prior(
    tasks: Sequence[BayesianModel],
    draws: Sequence[Draws] | None = None,
    *,
    rounds: Count = 1,
    draws_per_task: Count = 96,
    velocity: nn.Module | None = None,
    training: Training | None = None,
    held_out: Share = 0.1,
    seed: Seed = 0,
    progress: bool = True,
) -> Flow:
    """Learn the prior that many tasks share, from their posteriors: empirical Bayes by expectation
    and maximisation.

    The posteriors of all tasks are pooled, and a flow from the plain prior is fitted to them, moved
    by random symmetries: a task knows no order of hidden units, so that only a field that is
    equivariant to them can pool tasks at all. As a prior the flow need not be exact:
    `BayesianModel.transported` makes it one. In further rounds the draws follow their posteriors
    under the prior so far, in its latent coordinates, and the field learns on.

    Tasks that are held out judge: training stops when their loss has not fallen for a while, and
    rounds stop when the evidence of their first three rows has not risen.

    Args:
        tasks: models of one network, prior and likelihood, whose data differ.
        draws: of each task's posterior, in their order; sampled by HMC if None.
        rounds: the most that are made.
        draws_per_task: so many of each, evenly.
        velocity: the field; one over weights with the symmetries of network and prior if None.
        training: of every round; see `fit_flow`.
        held_out: share of the tasks that judge, drawn at random; one at least.
        seed: an int or a generator.
        progress: show bars at a terminal.

    Returns:
        The flow. ``info["log_evidence"]`` has the mean log evidence of the held-out tasks' first
        rows after every round, ``info["log_evidence_plain"]`` that under the tasks' own prior, by
        importance sampling. After Ctrl-C the best so far, with ``info["interrupted"]`` set.

    Raises:
        ValueError: before any work, if there are fewer than two tasks, or they differ in network,
            prior or likelihood; if draws are not as many as tasks, not theirs, or of no posterior.
    """
    _check_tasks(tasks)
    if draws is not None:
        _check_draws(tasks, draws)
    generator = as_generator(seed, tasks[0].device)
    judges = _chosen(len(tasks), held_out, generator)
    pools = _posteriors(tasks, draws, draws_per_task, generator, progress)
    judged = [tasks[each] for each in judges]
    plain = log_evidence_by_prior(judged, tasks[0].sample_prior(_PRIOR_DRAWS, generator))
    scores: list[float] = []
    best: Flow | None = None
    field = "weights" if velocity is None else velocity
    with until_interrupted(least=1) as taken:
        for number in range(rounds):
            if best is not None:
                pools = _followed(tasks, pools, best, generator, progress)
            flow = fit_flow(
                tasks[0],
                torch.cat([pool for i, pool in enumerate(pools) if i not in judges]),
                velocity=field,
                matching=Matching(targets="pairs"),
                training=training,
                held_out=torch.cat([pools[each] for each in judges]),
                seed=generator,
                progress=progress,
            )
            score = log_evidence_by_prior(judged, flow.sample(_PRIOR_DRAWS, generator))
            scores.append(float(score.mean()))
            if best is not None and scores[-1] <= max(scores[:-1]):
                break
            best, field, taken.done = flow, flow.velocity, number + 1
            if flow.info.get("interrupted"):
                break
    assert best is not None
    info = best.info | {
        "tasks": len(tasks) - len(judges),
        "held_out_tasks": sorted(judges),
        "rounds": len(scores),
        "log_evidence": scores,
        "log_evidence_plain": float(plain.mean()),
        "log_evidence_rows": _JUDGED_BY,
        "interrupted": taken.interrupted or best.info.get("interrupted", False),
    }
    return replace(best, info=info)


def log_evidence_by_prior(tasks: Sequence[BayesianModel], theta: Tensor) -> Tensor:
    """Estimate the log evidence of the first three rows of each task ``(tasks,)``, by the mean
    likelihood of draws of a prior ``(n, dim)``.
    """
    found = []
    with torch.no_grad():
        for task in tasks:
            first = task.subset(slice(0, _JUDGED_BY))
            values = first.log_likelihood(theta)
            found.append(values.double().logsumexp(0) - math.log(len(theta)))
    return torch.stack(found)


# ---------------------------------------- posteriors of the tasks


def _posteriors(
    tasks: Sequence[BayesianModel],
    draws: Sequence[Draws] | None,
    count: int,
    generator: torch.Generator,
    progress: bool,
) -> list[Tensor]:
    """Return draws of each task under its own prior, ``(count, dim)`` each."""
    pools = []
    with progress_bar(len(tasks), "tasks", progress, "task") as bar:
        for number, task in enumerate(tasks):
            if draws is None:
                given = sample(
                    task,
                    HMC(max_leapfrog=_LONGEST),
                    chains=_CHAINS,
                    warmup=_WARMUP,
                    draws=_DRAWS,
                    seed=generator,
                    progress=False,
                )
            else:
                given = draws[number]
            flat = given.flat.to(task.device, task.dtype)
            if given.log_weights is not None:
                rows = counted_alike(given.log_weights, count)
            else:
                rows = evenly(len(flat), count)
            pools.append(flat[rows.to(flat.device)])
            bar.update()
    return pools


def _followed(
    tasks: Sequence[BayesianModel],
    pools: Sequence[Tensor],
    flow: Flow,
    generator: torch.Generator,
    progress: bool,
) -> list[Tensor]:
    """Move the draws of each task to its posterior under the flow as the prior."""
    moved = []
    with progress_bar(len(tasks), "tasks", progress, "task") as bar:
        for task, pool in zip(tasks, pools, strict=True):
            carried = task.transported(flow)
            latent = flow.inverse(pool)
            after = refine(
                carried,
                latent,
                _STEPS,
                n_leapfrog=_N_LEAPFROG,
                seed=generator,
                progress=False,
            )
            moved.append(carried.weights_of(after.flat))
            bar.update()
    return moved


# ---------------------------------------- what is given


def _chosen(count: int, share: float, generator: torch.Generator) -> set[int]:
    """Return the numbers of the tasks that judge."""
    most = min(count - 1, max(1, round(share * count)))
    order = torch.randperm(count, generator=generator, device=generator.device)
    return set(order[:most].tolist())


def _check_tasks(tasks: Sequence[BayesianModel]) -> None:
    """Raise ``ValueError`` unless tasks differ in their data only."""
    if len(tasks) < _FEWEST:
        raise ValueError(f"tasks must be at least {_FEWEST}, got {len(tasks)}")
    first = tasks[0]
    for number, task in enumerate(tasks):
        if not isinstance(task, BayesianModel):
            raise TypeError(
                f"tasks[{number}] must be a BayesianModel, got {type(task).__name__}"
            )
        if task.is_transported or task.is_linearised:
            raise ValueError(f"tasks[{number}] must be a model of weights")
        if (task.spec.shapes, task.spec.layers) != (first.spec.shapes, first.spec.layers):
            raise ValueError(f"tasks[{number}] has another network than tasks[0]")
        if task.flat_prior.describe() != first.flat_prior.describe():
            raise ValueError(f"tasks[{number}] has another prior than tasks[0]")
        if task.likelihood.name != first.likelihood.name:
            raise ValueError(f"tasks[{number}] has another likelihood than tasks[0]")


def _check_draws(tasks: Sequence[BayesianModel], draws: Sequence[Draws]) -> None:
    """Raise ``ValueError`` unless there are draws of every task's posterior."""
    if len(draws) != len(tasks):
        raise ValueError(f"draws must be as many as tasks, {len(tasks)}, got {len(draws)}")
    for number, (task, each) in enumerate(zip(tasks, draws, strict=True)):
        try:
            task.spec.check(each.theta, "theta")
            task.check_draws(each)
        except ValueError as error:
            raise ValueError(f"draws[{number}]: {error}") from None
        if not bool(each.theta.isfinite().all()):
            raise ValueError(f"draws[{number}] are NaN or infinite in parts")
        refuse_approximation(each, f"draws[{number}]")
