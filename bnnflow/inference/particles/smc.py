"""Tempered sequential Monte Carlo: particles from the prior to the posterior, and the evidence on
the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.inference.particles.paths import FromPrior, FromStart, Path
from bnnflow.inference.particles.tempering import Particles, Tempering, relative_variance
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar, until_interrupted
from bnnflow.ranks import Ranks
from bnnflow.types import Posterior

__all__ = ["SMC"]


@dataclass(frozen=True, eq=False)
class SMC(Method):
    """Carry particles from the prior to the posterior by tempering (Del Moral, Doucet and Jasra
    2006).

    Particles drawn from the start q0 follow q0^(1 - b) exp(log_joint)^b for b from 0 to 1. Every b
    is chosen so that reweighting leaves the wanted fraction of effective particles (Jasra et al.
    2011); then they are resampled, unless b = 1, and moved by Hamiltonian Monte Carlo that leaves
    the present density invariant. The weighted particles approximate the posterior and the product
    of the mean weights its evidence, without bias for a given schedule; both become exact as the
    number of particles grows. Chains are independent runs.

    ``draws.log_evidence`` has the standard error of the mean over runs, by the estimate of Lee and
    Whiteley (2018) from the ancestors of the particles or by the spread of the runs, whichever is
    larger. At a temperature other than 1 there is no evidence, only the normaliser of the tempered
    posterior, ``info["log_tempered_normaliser"]``.

    Args:
        particles: in each run.
        ess: fraction of effective particles that a step of the temperature leaves.
        moves: transitions at every temperature.
        trajectory_length: mean integration time of a transition, in units of the particles'
            standard deviations.
        max_leapfrog: bound on the leapfrog steps of a transition.
        target_acceptance: mean acceptance rate to aim at.
        start: the density q0; the prior if None.
        chunk_size: particles that are evaluated together, which bounds the memory.
    """

    refused = ("warmup", "draws", "init")

    particles: int = 1000
    ess: float = 0.7
    moves: int = 4
    trajectory_length: float = 1.0
    max_leapfrog: int = 128
    target_acceptance: float = 0.85
    start: Posterior | None = None
    chunk_size: int = 1024

    def __post_init__(self) -> None:
        settle(self, number, "ess", "target_acceptance", above=0, below=1)
        settle(self, number, "trajectory_length", above=0)
        settle(self, integer, "moves", "max_leapfrog", "chunk_size", least=1)
        settle(self, integer, "particles", least=10)
        able = hasattr(self.start, "sample") and hasattr(self.start, "log_prob")
        if self.start is not None and (isinstance(self.start, type) or not able):
            raise TypeError(
                f"start must be a density with sample and log_prob, got {self.start!r}"
            )

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Run the particles; see `bnnflow.sample`. ``chains`` is the number of independent runs.

        Ctrl-C weighs the particles for the posterior from where they are, with
        ``info["interrupted"]`` and no evidence; a checkpoint keeps them as they are.
        """
        run.refuse(self, "particles and a start")
        runs, ranks, checkpoint = run.chains or 4, run.ranks, run.checkpoint
        mine = ranks.share("particles", self.particles)
        ranks.check_same(run.alike, model.device)
        generator = ranks.own_generator(run.generator)
        draw = model.sample_prior if self.start is None else self.start.sample
        theta = (
            draw(runs * mine, generator)
            .to(model.device, model.dtype)
            .unflatten(0, (runs, mine))
        )
        tempering = self.tempering(self.path(model), ranks, generator, run.generator)
        state = tempering.first(theta)
        steps = 0
        if checkpoint and checkpoint.saved:
            state = checkpoint.saved.state("particles", state)
            steps = checkpoint.saved.header["step"]
            checkpoint.saved.restore(generator)
            if ranks.size > 1:
                run.generator.set_state(state.shared.cpu())

        def save() -> None:
            if checkpoint:
                checkpoint.save(
                    {"stage": "tempering", "step": steps}, generator, particles=state
                )

        # Several processes may be at different temperatures when an interrupt comes.
        least = 1 if ranks.size == 1 else math.inf
        stream = generator.get_state()
        with (
            progress_bar(
                None, "SMC", run.progress and ranks.rank == 0, "temperature", initial=steps
            ) as bar,
            until_interrupted(least) as taken,
        ):
            taken.done = steps
            while bool((state.fraction < 1).any()):
                state = tempering.advance(state, bar)
                taken.done = steps = steps + 1
                stream = generator.get_state()
                if checkpoint and checkpoint.due(True, generator.device):
                    save()
        if taken.interrupted:
            generator.set_state(stream)  # a temperature that was broken off is made anew
        save()
        if taken.interrupted:
            state = tempering.broken_off(state)
        return self._draws(model, state, steps, ranks, taken.interrupted)

    def path(self, model: BayesianModel) -> Path:
        """Return the path from the start to the posterior."""
        if self.start is None:
            return FromPrior(model, self.chunk_size)
        return FromStart(model, self.start, self.chunk_size)

    def tempering(
        self, path: Path, ranks: Ranks, generator: torch.Generator, shared: torch.Generator
    ) -> Tempering:
        """Return how particles go along a path."""
        return Tempering(
            path=path,
            ess=self.ess,
            moves=self.moves,
            trajectory_length=self.trajectory_length,
            max_leapfrog=self.max_leapfrog,
            target_acceptance=self.target_acceptance,
            ranks=ranks,
            generator=generator,
            shared=shared,
        )

    def _draws(
        self,
        model: BayesianModel,
        state: Particles,
        steps: int,
        ranks: Ranks,
        interrupted: bool,
    ) -> Draws:
        """Gather the particles and estimate the evidence with its error."""
        theta, weights = ranks.gather(state.theta, 1), ranks.gather(state.log_weights, 1)
        root = ranks.gather(state.root, 1)
        log_joint = ranks.gather(state.log_ratio + state.log_first, 1)
        runs = len(theta)
        value = state.log_normaliser.logsumexp(0) - math.log(runs)
        variance = relative_variance(weights, root, state.merged).mean() / runs
        if runs > 1:
            spread = (state.log_normaliser - value).exp()
            variance = torch.maximum(variance, spread.var() / runs)
        estimate = (float(value), float(variance.sqrt()))
        gradients = float(ranks.mean(torch.tensor(state.gradients, device=theta.device)))
        families = torch.stack([torch.tensor(float(len(r.unique()))) for r in root])
        info = {
            "temperatures": steps,
            "gradients_per_chain": round(gradients),
            "gradients": round(gradients * theta.shape[0] * theta.shape[1]),
            "acceptance_rate": state.acceptance,
            "step_size": state.step_size,
            "first_ancestors": float(families.mean()),
            "least_effective_share": float(state.least.min()),
            "log_evidence_of_runs": state.log_normaliser.tolist(),
            "interrupted": interrupted,
        }
        if model.temperature != 1:
            info["log_tempered_normaliser"] = estimate
        return Draws(
            theta,
            log_joint,
            log_weights=weights,
            log_evidence=None if interrupted or model.temperature != 1 else estimate,
            info=info,
        )
