"""A prior learned from the posteriors of many tasks: empirical Bayes, with a flow for the prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bnnflow.arguments import Count, Share, checked
from bnnflow.draws import Draws, as_theta, counted_alike, evenly, refuse_approximation
from bnnflow.identity import digest, seed_identity
from bnnflow.inference.mcmc.hmc import HMC
from bnnflow.inference.particles.refine import refine
from bnnflow.inference.sampling import sample
from bnnflow.model import BayesianModel
from bnnflow.options import Checkpoint, Training
from bnnflow.parts import Parts
from bnnflow.progress import progress_bar, until_interrupted
from bnnflow.ranks import Ranks, connect
from bnnflow.seeding import as_generator
from bnnflow.transport.fitting import fit_flow
from bnnflow.transport.flow import Flow
from bnnflow.transport.options import Matching
from bnnflow.types import Seed

__all__ = [
    "check_draws",
    "check_tasks",
    "fit_prior",
    "identity_of",
    "log_evidence_by_prior",
    "posteriors",
    "seeds_of",
]

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
    checkpoint: Checkpoint | str | Path | None = None,
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
    rounds stop when the evidence of their first three rows has not risen. Under ``torchrun`` all
    processes work on one task after the other, and on the training.

    Args:
        tasks: models of one network, prior and likelihood, whose data differ.
        draws: of each task's posterior, in their order; sampled by HMC if None.
        rounds: the most that are made.
        draws_per_task: so many of each, evenly.
        velocity: the field; one over weights with the symmetries of network and prior if None.
        training: of every round; see `fit_flow`.
        held_out: share of the tasks that judge, drawn at random; one at least.
        checkpoint: a folder that keeps the draws of every task and the states of training. A
            `Checkpoint` with ``resume`` goes on from it, on CPU bit for bit if ``training`` has a
            number of steps. Only ``rounds`` and the length of the training may change.
        seed: an int or a generator.
        progress: show bars at a terminal.

    Returns:
        The flow. ``info["log_evidence"]`` has the mean log evidence of the held-out tasks' first
        rows after every round, ``info["log_evidence_plain"]`` that under the tasks' own prior, by
        importance sampling. After Ctrl-C the best so far, with ``info["interrupted"]`` set.

    Raises:
        ValueError: before any work, if there are fewer than two tasks, or they differ in network,
            prior or likelihood; if draws are not as many as tasks, not theirs, or of no posterior;
            if the checkpoint holds another run, or one that is not to be resumed.
    """
    check_tasks(tasks)
    if draws is not None:
        check_draws(tasks, draws)
    run = identity_of(tasks, draws) | {
        "velocity": None
        if velocity is None
        else digest(list(velocity.state_dict().values())),
        "draws_per_task": draws_per_task,
        "held_out": held_out,
        "seed": seed_identity(seed),
    }
    place, ranks = Checkpoint.of(checkpoint), connect(tasks[0].device)
    generator = as_generator(seed, tasks[0].device)
    judges = _chosen(len(tasks), held_out, generator)
    judged = [tasks[each] for each in judges]
    plain = log_evidence_by_prior(judged, tasks[0].sample_prior(_PRIOR_DRAWS, generator))
    pools: list[Tensor] = []
    scores: list[float] = []
    best: Flow | None = None
    field = "weights" if velocity is None else velocity
    with Parts(place, "task", run, ranks) as kept, until_interrupted(least=1) as taken:
        for number in range(rounds):
            of_tasks, of_training, of_score = seeds_of(len(tasks), generator)
            if best is None:
                moved = posteriors(tasks, draws, draws_per_task, of_tasks)
            else:
                moved = _followed(tasks, pools, best, of_tasks)
            pools = _kept(moved, tasks, kept, number, ranks, progress)
            flow = fit_flow(
                tasks[0],
                torch.cat([pool for i, pool in enumerate(pools) if i not in judges]),
                velocity=field,
                matching=Matching(targets="pairs"),
                training=training,
                held_out=torch.cat([pools[each] for each in judges]),
                checkpoint=kept.folder
                and Checkpoint(kept.folder / f"training-{number + 1}.npz", resume=True),
                seed=of_training,
                progress=progress,
            )
            score = log_evidence_by_prior(judged, flow.sample(_PRIOR_DRAWS, of_score))
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


def log_evidence_by_prior(
    tasks: Sequence[BayesianModel], theta: Tensor, rows: int = _JUDGED_BY
) -> Tensor:
    """Estimate the log evidence of the first rows of each task ``(tasks,)``, by the mean likelihood
    of draws of a prior ``(n, dim)``.
    """
    found = []
    with torch.no_grad():
        for task in tasks:
            first = task.subset(slice(0, rows))
            values = torch.cat([first.log_likelihood(part) for part in theta.split(4096)])
            found.append(values.double().logsumexp(0) - math.log(len(theta)))
    return torch.stack(found)


# ---------------------------------------- posteriors of the tasks


def seeds_of(tasks: int, generator: torch.Generator) -> tuple[list[int], int, int]:
    """Draw the seeds of a round before anything else of it, so that what is kept needs no
    generator: of each task, of the training and of its score.
    """
    device = generator.device
    drawn = torch.randint(2**62, (tasks + 2,), generator=generator, device=device).tolist()
    return drawn[:tasks], *drawn[tasks:]


def _kept(
    moved: Callable[[int], Tensor],
    tasks: Sequence[BayesianModel],
    kept: Parts,
    round_number: int,
    ranks: Ranks,
    progress: bool,
) -> list[Tensor]:
    """Return draws of every task, ``(count, dim)`` each: those that are kept, or ``moved`` of its
    number.
    """
    pools = []
    with progress_bar(len(tasks), "tasks", progress, "task") as bar:
        for number, task in enumerate(tasks):
            index = round_number * len(tasks) + number
            part = kept.read(index)
            if ranks.agree(int(part is not None), task.device):
                if part is None:
                    raise ValueError(f"{kept.folder} must be the same in all processes")
                pools.append(torch.from_numpy(part["theta"]).to(task.device))
            else:
                pools.append(moved(number))
                kept.write(index, {"theta": pools[-1].cpu().numpy()})
            bar.update()
    return pools


def posteriors(
    tasks: Sequence[BayesianModel],
    draws: Sequence[Draws] | None,
    count: int,
    seeds: Sequence[int],
) -> Callable[[int], Tensor]:
    """Return what draws from the posterior of a task under its own prior."""

    def of(number: int) -> Tensor:
        task = tasks[number]
        if draws is None:
            given = sample(
                task,
                HMC(max_leapfrog=_LONGEST),
                chains=_CHAINS,
                warmup=_WARMUP,
                draws=_DRAWS,
                seed=seeds[number],
                progress=False,
            )
        else:
            given = draws[number]
        flat = given.flat.to(task.device, task.dtype)
        if given.log_weights is not None:
            rows = counted_alike(given.log_weights, count)
        else:
            rows = evenly(len(flat), count)
        return flat[rows.to(flat.device)]

    return of


def _followed(
    tasks: Sequence[BayesianModel],
    pools: Sequence[Tensor],
    flow: Flow,
    seeds: Sequence[int],
) -> Callable[[int], Tensor]:
    """Return what moves the draws of a task to its posterior under the flow as the prior."""

    def of(number: int) -> Tensor:
        carried = tasks[number].transported(flow)
        after = refine(
            carried,
            flow.inverse(pools[number]),
            _STEPS,
            n_leapfrog=_N_LEAPFROG,
            seed=seeds[number],
            progress=False,
        )
        return carried.weights_of(after.flat)

    return of


# ---------------------------------------- what is given


def _chosen(count: int, share: float, generator: torch.Generator) -> set[int]:
    """Return the numbers of the tasks that judge."""
    most = min(count - 1, max(1, round(share * count)))
    order = torch.randperm(count, generator=generator, device=generator.device)
    return set(order[:most].tolist())


def check_tasks(tasks: Sequence[BayesianModel]) -> None:
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


def identity_of(
    tasks: Sequence[BayesianModel], draws: Sequence[Draws] | None
) -> dict[str, str | None]:
    """Return what tells tasks and their draws apart."""
    return {
        "tasks": digest([task.fingerprint() for task in tasks]),
        "draws": None if draws is None else digest([as_theta(each) for each in draws]),
    }


def check_draws(tasks: Sequence[BayesianModel], draws: Sequence[Draws]) -> None:
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
