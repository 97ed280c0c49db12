"""A learned prior made sharper: its map is trained on what the rows of all tasks say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bnnflow.arguments import checked
from bnnflow.draws import Draws
from bnnflow.identity import digest, seed_identity
from bnnflow.inference.mcmc.hmc import hmc
from bnnflow.model import BayesianModel
from bnnflow.options import Checkpoint, Training
from bnnflow.progress import progress_bar
from bnnflow.ranks import connect
from bnnflow.seeding import as_generator
from bnnflow.transport.batches import Reuse
from bnnflow.transport.distillation import FlowMap
from bnnflow.transport.flow import Flow
from bnnflow.transport.learned_prior import (
    check_draws,
    check_tasks,
    identity_of,
    log_evidence_by_prior,
    posteriors,
    seeds_of,
)
from bnnflow.transport.pushforward import Pushforward
from bnnflow.transport.times import Uniform
from bnnflow.transport.training import Pairs, Task, run
from bnnflow.types import Seed
from bnnflow.warn import warn

__all__ = ["sharpen"]

_TRAINING = Training(steps=1500, batch_size=128)
_CHAINS = 8  # of each task
_PAIR = 2  # of them at least in a step: many tasks and few points of each
_TOGETHER = 16  # tasks, all of whose chains move at once
_N_LEAPFROG = 4
_ACCEPTANCE, _GAIN = 0.7, 0.3
_STEP_SIZE, _LONGEST = 0.02, 0.5  # the first, and the largest; points have a spread of 1
_SETTLING = 16  # transitions before the map changes
_JUDGED_BY, _DRAWS = 8, 2**14  # rows of the judging tasks, and draws of the prior


@checked
def sharpen(
    prior: FlowMap,
    flow: Flow,
    tasks: Sequence[BayesianModel],
    draws: Sequence[Draws] | None = None,
    *,
    training: Training | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> FlowMap:
    """Raise the evidence of the tasks that a prior was learned from.

    `fit_prior` matches draws of weights, and a small error in weights can be a large one in
    functions. Here the map itself is trained: latent points of every task follow their posterior by
    Hamiltonian transitions, and the map climbs the log likelihood of each task's rows at its
    points, step by step in turns. That is expectation and maximisation of the evidence with
    persistent chains (alternating back-propagation, Han et al. 2017). Under ``torchrun`` every
    process has chains of its own in all tasks, and a share of the batch.

    Args:
        prior: a map of few evaluations, made from ``flow`` by `distil`.
        flow: what `fit_prior` returned for these tasks.
        tasks: those that were given to `fit_prior`, in their order. The ones that judged it judge
            here too, and nothing is learned from them.
        draws: of each task's posterior under its own prior, where chains start; sampled by HMC if
            None.
        training: 1,500 steps of 128 points with AdamW at a learning rate of 3e-5 unless it says
            otherwise.
        checkpoint: a file that keeps the state of training and of the chains; see
            `bnnflow.transport.train`.
        seed: an int or a generator.
        progress: show bars at a terminal.

    Returns:
        The sharper map. ``info["log_evidence"]`` has the mean log evidence of the judging tasks'
        first eight rows before and after, by draws of the prior. If it has not risen, the prior
        as it was, with a warning. After Ctrl-C as far as training got, with
        ``info["interrupted"]`` set.

    Raises:
        ValueError: before any work, if tasks, draws, prior and flow do not belong together, or the
            checkpoint holds another run, or one that is not to be resumed.
    """
    training = (training or _TRAINING).with_defaults(3e-5, "adamw")
    if training.autocast or training.compile:
        raise ValueError("training: a map is neither autocast nor compiled")
    check_tasks(tasks)
    if draws is not None:
        check_draws(tasks, draws)
    judges = _judges(flow, len(tasks))
    for name, given in (("prior", prior), ("flow", flow)):
        if given.spec.shapes != tasks[0].spec.shapes:
            raise ValueError(f"{name} is of another network than the tasks")
    learner = prior.pushforward()  # a copy of its own
    learner.velocity.requires_grad_()
    ranks = connect(tasks[0].device)
    identity = identity_of(tasks, draws) | {
        "prior": digest(prior.velocity.state_dict()),
        "flow": digest(flow.velocity.state_dict()),
    }
    generator = as_generator(seed, tasks[0].device)
    ranks.check_same(
        identity | {"training": training, "seed": seed_identity(seed)}, tasks[0].device
    )
    of_tasks, _, of_score = seeds_of(len(tasks), generator)
    posterior = posteriors(tasks, draws, _CHAINS, of_tasks)
    known = [number for number in range(len(tasks)) if number not in judges]
    chains = _Chains(
        [tasks[number] for number in known],
        learner,
        lambda number: flow.inverse(posterior(known[number])),
    )
    task = _Likelihood(
        learner.velocity, chains.drawn, None, Uniform(), Reuse(), None, chains
    )
    info = run(
        task, training, checkpoint, generator, progress, ranks=ranks, identity=identity
    )
    judged = [tasks[number] for number in judges]
    sharper = FlowMap(learner.velocity, prior.source, prior.spec, prior.times, {})
    scores = [
        float(
            log_evidence_by_prior(judged, each.sample(_DRAWS, of_score), _JUDGED_BY).mean()
        )
        for each in (prior, sharper)
    ]
    told = {name: info[name] for name in ("steps", "seconds", "cpu_seconds", "interrupted")}
    told = prior.info | told | {"log_evidence": scores, "held_out_tasks": sorted(judges)}
    if not scores[1] > scores[0]:
        warn("the evidence of held-out tasks has not risen: returning the prior as it was")
        return replace(prior, info=told)
    return replace(sharper, info=told)


def _judges(flow: Flow, count: int) -> set[int]:
    """Return the numbers of the tasks that judged the flow."""
    judges = flow.info.get("held_out_tasks")
    if judges is None:
        raise ValueError(
            "flow must come from fit_prior: it does not say which tasks judged it"
        )
    if flow.info["tasks"] + len(judges) != count:
        raise ValueError(
            f"tasks must be those that the flow was learned from, "
            f"{flow.info['tasks'] + len(judges)}, got {count}"
        )
    return set(judges)


class _Chains:
    """Latent points of many tasks that follow their posteriors under a map that changes.

    Args:
        tasks: of one network.
        push: the map, whose parameters are trained.
        first: the number of a task to points ``(some, dim)`` where its chains start, in turns.
    """

    def __init__(
        self,
        tasks: Sequence[BayesianModel],
        push: Pushforward,
        first: Callable[[int], Tensor],
    ) -> None:
        self.tasks, self.push, self.first = tasks, push, first
        self.points = torch.zeros(
            len(tasks), _CHAINS, tasks[0].dim, dtype=tasks[0].dtype, device=tasks[0].device
        )
        self.step_sizes = torch.full_like(self.points[..., :1], _STEP_SIZE)
        self.rows = sum(len(task.x) for task in tasks) / len(tasks)

    def log_likelihood(self, which: Tensor, points: Tensor) -> Tensor:
        """Return that of each task's rows, tempered, at its points ``(some, chains, dim)``,
        ``(some, chains)``.
        """
        theta = self.push.forward(points.flatten(0, 1)).reshape(points.shape)
        found = []
        for number, own in zip(which.tolist(), theta, strict=True):
            task = self.tasks[number]
            found.append(task.log_likelihood(own) / task.temperature)
        return torch.stack(found)

    def move(self, which: Tensor, chains: Tensor, generator: torch.Generator) -> Tensor:
        """Move some chains ``(some, m)`` of some tasks ``(some,)`` once; return their points."""
        own = which[:, None], chains
        before, step_sizes = self.points[own], self.step_sizes[own]

        def target(flat: Tensor) -> tuple[Tensor, Tensor]:
            flat = flat.detach().requires_grad_()
            likelihood = self.log_likelihood(which, flat.reshape(before.shape)).flatten()
            value = likelihood - flat.square().sum(1) / 2
            (grad,) = torch.autograd.grad(value.sum(), flat)
            return value.detach(), grad

        mass = torch.ones_like(before[0, 0])
        kernel = hmc(target, step_sizes.flatten(0, 1), _N_LEAPFROG, mass)
        state, info = kernel.step(kernel.init(before.flatten(0, 1), generator), generator)
        rate = info.acceptance_rate.to(before).nan_to_num(0.0).reshape(step_sizes.shape)
        change = (_GAIN * (rate - _ACCEPTANCE)).exp()
        self.step_sizes[own] = (step_sizes * change).clamp(max=_LONGEST)
        self.points[own] = state.theta.reshape(before.shape)
        return self.points[own]

    def drawn(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` chains or so, of as many tasks as there are; return the tasks' numbers
        ``(some,)`` and those of their chains ``(some, m)``.
        """
        tasks = min(len(self.tasks), max(1, n // _PAIR))
        each = min(_CHAINS, max(1, n // tasks))
        order, of_chains = (
            torch.rand(size, generator=generator, device=generator.device).argsort(-1)
            for size in ((len(self.tasks),), (tasks, _CHAINS))
        )
        return order[:tasks], of_chains[:, :each]

    def begin(self, generator: torch.Generator, progress: bool) -> None:
        """Start all chains, and bring them to their posteriors under the map as it is."""
        chains = torch.arange(_CHAINS, device=self.points.device)
        with progress_bar(len(self.tasks), "tasks", progress, "task") as bar:
            for number in range(len(self.tasks)):
                first = self.first(number)
                self.points[number] = first[chains % len(first)]
                bar.update()
        numbers = torch.arange(len(self.tasks), device=self.points.device)
        with progress_bar(_SETTLING, "chains", progress, "step") as bar:
            for _ in range(_SETTLING):
                for which in numbers.split(_TOGETHER):
                    self.move(which, chains.expand(len(which), -1), generator)
                bar.update()


@dataclass(frozen=True)
class _Likelihood(Task):
    """The likelihood of rows at points that move."""

    chains: _Chains

    def weighting(self, t: Tensor) -> Tensor:
        """All count alike."""
        return torch.ones_like(t)

    def begin(self, generator: torch.Generator, progress: bool) -> None:
        """Bring all chains to their posteriors."""
        self.chains.begin(generator, progress)

    def memory(self) -> dict[str, Tensor]:
        """Return where the chains are."""
        return {"points": self.chains.points, "step_sizes": self.chains.step_sizes}

    def batch(self, n: int, pairs: Pairs, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return no times, the numbers of some tasks, and points of theirs ``(n, dim)``, moved."""
        which, of_chains = pairs(n, generator)
        points = self.chains.move(which, of_chains, generator).flatten(0, 1)
        return torch.zeros_like(points[:, 0]), which, points

    def errors(
        self, call: Callable[..., Tensor], t: Tensor, target: Tensor, *given: Tensor
    ) -> Tensor:
        """Return minus the log likelihood of a row, of each point."""
        points = given[0].unflatten(0, (len(target), -1))
        return -self.chains.log_likelihood(target, points).flatten() / self.chains.rows
