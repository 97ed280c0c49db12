"""Tempered sequential Monte Carlo: particles from the prior to the posterior or back, and the
evidence on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnnflow.arguments import checked, integer, number, settle
from bnnflow.bridge import bennett
from bnnflow.draws import Draws, as_theta, outliers, unresolved
from bnnflow.gaussian import positive
from bnnflow.inference.mcmc.hmc import hmc
from bnnflow.inference.mcmc.warmup import followed
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar, until_interrupted
from bnnflow.ranks import ALONE, Ranks
from bnnflow.seeding import as_generator
from bnnflow.types import LogDensityAndGrad, Posterior, Seed
from bnnflow.warn import warn

__all__ = ["SMC", "evidence"]

_APART = 0.1  # share of draws that may be left out
_FINE = 1e-13  # relative to a step of the temperature: how well it is found,
_HALVINGS = 1100  # if it is not smaller than all numbers
_FAILED = 0.1  # of the particles: a step that leaves fewer effective has failed


class _Particles(NamedTuple):
    """Where the particles of every run are on their way; those of this process."""

    theta: Tensor  # (run, particle, dim)
    log_ratio: (
        Tensor  # (run, particle), log density of the last end - that of the first, float64
    )
    log_first: Tensor  # (run, particle), float64
    log_weights: Tensor  # (run, particle), normalised over the particles of all processes
    root: Tensor  # (run, particle), which of the first particles it descends from
    fraction: Tensor  # (run,), the inverse temperature, 0 to 1,
    remainder: (
        Tensor  # (run,), and what it lacks of 1: each keeps its digits where it is small
    )
    log_normaliser: Tensor  # (run,), of the density now over that of the first end
    merged: Tensor  # (run,), log of how much less apart families are for resampling alone
    least: Tensor  # (run,), smallest share of the particles that a temperature has left effective
    step_size: float
    acceptance: float
    gradients: float
    shared: Tensor  # state of the generator that all processes have in common


class _Reweighted(NamedTuple):
    """Weights of all particles at the next temperature of every run."""

    log_weights: Tensor  # (run, particle), normalised
    fraction: Tensor  # (run,)
    remainder: Tensor  # (run,)
    last: Tensor  # (run,), whether it is the last temperature
    log_normaliser: Tensor  # (run,), of its density over that of the temperature before
    left: Tensor  # (run,), share of the particles that is effective


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
        path = _Path(model, self.start, self.chunk_size)
        generator = ranks.own_generator(run.generator)
        draw = model.sample_prior if self.start is None else self.start.sample
        theta = (
            draw(runs * mine, generator)
            .to(model.device, model.dtype)
            .unflatten(0, (runs, mine))
        )
        state = self._first(path, theta, ranks, run.generator)
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
                state = self._advance(path, state, ranks, generator, run.generator, bar)
                taken.done = steps = steps + 1
                stream = generator.get_state()
                if checkpoint and checkpoint.due(True, generator.device):
                    save()
        if taken.interrupted:
            generator.set_state(stream)  # a temperature that was broken off is made anew
        save()
        return self._draws(model, state, steps, ranks, taken.interrupted)

    def _first(
        self, path: _Path, theta: Tensor, ranks: Ranks, shared: torch.Generator
    ) -> _Particles:
        """Put particles of equal weight ``(run, particle, dim)``, those of this process, at the
        first end.
        """
        runs, mine, _ = theta.shape
        device = theta.device
        log_first, log_last = path(theta)
        zeros = torch.zeros(runs, dtype=torch.float64, device=device)
        root = torch.arange(mine, device=device) + mine * ranks.rank
        return _Particles(
            theta=theta,
            log_ratio=log_last - log_first,
            log_first=log_first,
            log_weights=torch.full_like(log_last, -math.log(mine * ranks.size)),
            root=root.expand(runs, -1),
            fraction=zeros,
            remainder=torch.ones_like(zeros),
            log_normaliser=zeros,
            merged=zeros,
            least=torch.ones_like(zeros),
            step_size=0.5 * path.model.dim**-0.25,
            acceptance=0.0,
            gradients=1.0,
            shared=shared.get_state(),
        )

    def _advance(
        self,
        path: _Path,
        state: _Particles,
        ranks: Ranks,
        generator: torch.Generator,
        shared: torch.Generator,
        bar: Any,
    ) -> _Particles:
        """Go to the next temperature: reweight, resample, move."""
        step = self._reweighted(
            state,
            ranks.gather(state.log_ratio, 1),
            ranks.gather(state.log_weights, 1),
            self.ess,
        )
        weights, last = step.log_weights, step.last[:, None]
        everyone = ranks.gather(state.theta, 1)  # (run, particle, dim)
        parents = systematic(weights, shared)
        unmoved = torch.arange(weights.shape[1], device=parents.device)
        parents = torch.where(last, unmoved, parents)
        roots = ranks.gather(state.root, 1)
        merged = merging(weights, roots)
        roots = roots.gather(1, parents)
        weights = torch.where(last, weights, -math.log(weights.shape[1]))
        everyone = everyone.gather(1, parents.unsqueeze(-1).expand_as(everyone))

        def own(values: Tensor) -> Tensor:
            if ranks.size == 1:
                return values
            return values.chunk(ranks.size, 1)[ranks.rank].clone()

        mass = weighted_variance(everyone, weights).to(everyone.dtype)  # (run, dim)
        particles = own(everyone)
        count = particles.shape[1]
        target = path.tempered(
            step.fraction.repeat_interleave(count), step.remainder.repeat_interleave(count)
        )
        theta, step_size, acceptance, steps = self._move(
            target, particles, mass, state, ranks, generator
        )
        log_first, log_last = path(theta)
        gradients = state.gradients + steps + 1
        bar.update()
        bar.set_postfix(
            at=f"{float(step.fraction.min()):.2e}",
            accept=f"{acceptance:.2f}",
            step=f"{step_size:.1e}",
            gradients=f"{gradients:.0f}",
        )
        return _Particles(
            theta=theta,
            log_ratio=log_last - log_first,
            log_first=log_first,
            log_weights=own(weights),
            root=own(roots),
            fraction=step.fraction,
            remainder=step.remainder,
            log_normaliser=state.log_normaliser + step.log_normaliser,
            merged=state.merged + torch.where(step.last, 0.0, merged),
            least=_least(step.left, state.least),
            step_size=step_size,
            acceptance=acceptance,
            gradients=gradients,
            shared=shared.get_state(),
        )

    def _reweighted(
        self, state: _Particles, ratio: Tensor, log_weights: Tensor, ess: float
    ) -> _Reweighted:
        """Choose the next temperature of every run, at which the fraction ``ess`` of the particles
        is effective, and weigh all particles ``(run, particle)`` for it.
        """
        usable = torch.where(ratio.isnan(), -math.inf, ratio)
        further = _next_step(usable, log_weights, state.fraction, state.remainder, ess)
        last = further == state.remainder
        log_weights = log_weights + further[:, None] * usable
        total = log_weights.logsumexp(1)
        log_weights = log_weights - total[:, None]
        return _Reweighted(
            log_weights=log_weights,
            fraction=torch.where(last, 1.0, state.fraction + further),
            remainder=state.remainder - further,
            last=last,
            log_normaliser=total,
            left=(-(2 * log_weights).logsumexp(1)).exp() / log_weights.shape[1],
        )

    def _move(
        self,
        target: LogDensityAndGrad,
        theta: Tensor,
        mass: Tensor,
        state: _Particles,
        ranks: Ranks,
        generator: torch.Generator,
    ) -> tuple[Tensor, float, float, float]:
        """Move all particles by jittered Hamiltonian transitions.

        Return them, the step size, acceptance, gradients.
        """
        runs, mine, _ = theta.shape
        step_size, acceptance, steps = state.step_size, 0.0, 0.0
        flat, scales = theta.flatten(0, 1), mass.repeat_interleave(mine, 0)
        chain: Any = None
        for _ in range(self.moves):
            n_leapfrog = max(
                1,
                min(self.max_leapfrog, round(self.trajectory_length / (0.75 * step_size))),
            )
            kernel = hmc(target, step_size, n_leapfrog, scales)
            chain = kernel.init(flat, generator) if chain is None else chain
            chain, info = kernel.step(chain, generator)
            acceptance = float(ranks.mean(info.acceptance_rate.mean()))
            step_size = followed(step_size, acceptance, self.target_acceptance)
            steps += float(info.n_steps[0])
        return chain.theta.unflatten(0, (runs, mine)), step_size, acceptance, steps + 1

    def _weighed(self, state: _Particles) -> _Particles:
        """Weigh the particles for the posterior, wherever they are, and say what that leaves."""
        step = self._reweighted(state, state.log_ratio, state.log_weights, ess=0.0)
        warn(
            f"interrupted at {float(state.fraction.min()):.2g} of the way: the particles are "
            "weighed for the posterior, which leaves "
            f"{float(step.left.min()):.1%} of them effective"
        )
        return state._replace(
            log_weights=step.log_weights,
            log_normaliser=state.log_normaliser + step.log_normaliser,
            least=_least(step.left, state.least),
        )

    def _draws(
        self,
        model: BayesianModel,
        state: _Particles,
        steps: int,
        ranks: Ranks,
        interrupted: bool,
    ) -> Draws:
        """Gather the particles and estimate the evidence with its error."""
        if interrupted:
            state = self._weighed(state)
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


@checked
def evidence(
    model: BayesianModel,
    draws: Draws | Tensor | tuple[Tensor, Tensor | None],
    smc: SMC | None = None,
    *,
    seed: Seed = 0,
    progress: bool = True,
) -> tuple[float, float]:
    """Estimate the log evidence from draws of the posterior, by annealing them back to the prior.

    `SMC` the other way round (Grosse, Ghahramani and Adams 2015). It needs no density of the draws,
    so they may come from anywhere: chains, or a flow after `refine`. From a narrow density to a
    wide one weights have heavy tails and their mean comes out too small, so the steps are short,
    and neighbouring temperatures are compared by the optimal bridge between the particles at both
    (Bennett 1976). Particles that lag behind a density that widens make the evidence too large, so
    there are more moves than `SMC` makes; what is left is half an error with 150 particles. Draws
    that do not quite follow the posterior bias the first steps, until the moves of the particles
    have mended them. A draw far below all others would get all the weight on the way back and stay
    where it is; such are left out, with a warning.

    Args:
        model: the posterior, at temperature 1.
        draws: ``(..., dim)``; weighted ones are resampled. Of more than there are particles some
            are taken, evenly.
        smc: how to anneal, and where to if not to the prior (``start``);
            ``SMC(particles=500, ess=0.9, moves=8)`` if None. Of its particles as many are used as
            there are draws.
        seed: an int or a generator.
        progress: show a bar at a terminal.

    Returns:
        The log evidence and its standard error by the delta method, as if the draws were
        independent; with what the particles have in common with their ancestors.

    Raises:
        ValueError: if the draws do not fit the model, are fewer than ten, not finite or of no
            density, more than a tenth of them lie far below the others, or the temperature is not
            1.
    """
    theta, log_weights = _checked(model, draws)
    smc, generator = (
        smc or SMC(particles=500, ess=0.9, moves=8),
        as_generator(seed, model.device),
    )
    theta = theta.to(model.device, model.dtype)
    if log_weights is not None:
        theta = theta[
            systematic(log_weights.double().to(model.device).unsqueeze(0), generator)[0]
        ]
    path = _Path(model, smc.start, smc.chunk_size, back=True)
    state = _at_the_posterior(smc, path, theta, generator)
    n = state.theta.shape[1]
    value = variance = 0.0
    # of every particle on `value`, times their number
    influence = torch.zeros_like(state.log_ratio)
    # the influences of its ancestors, with which its own is correlated
    lineage = torch.zeros_like(influence)
    everyone = torch.arange(n, device=theta.device).unsqueeze(0)
    with progress_bar(None, "evidence", progress, "temperature") as bar:
        while float(state.fraction) < 1:
            before = state._replace(root=everyone)
            state = smc._advance(path, before, ALONE, generator, generator, bar)
            part, weights = (
                float(before.remainder - state.remainder),
                state.log_weights.exp(),
            )
            step, here, there = bennett(
                part * before.log_ratio, part * state.log_ratio, weights
            )
            value += float(step)
            slope = float(
                (here * (1 - here)).mean() + (weights * there * (1 - there)).sum()
            )
            influence = influence + (here - here.mean()) / slope
            variance += _with_ancestors(influence, lineage) / n**2
            lineage = (lineage + influence).gather(1, state.root)
            influence = ((weights * there).sum() - there) / slope
    variance += _with_ancestors(n * state.log_weights.exp() * influence, lineage) / n**2
    if not float(state.least) >= _FAILED:
        warn(
            f"a temperature has left only {float(state.least):.1e} of the particles effective: the "
            "evidence is not to be trusted; the likelihood is too steep for the precision of its "
            "numbers: standardise, or take float64"
        )
    return -value, math.sqrt(variance)


def _checked(
    model: BayesianModel, draws: Draws | Tensor | tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Return draws ``(n, dim)`` that an evidence can start from, and their log weights."""
    theta, log_weights = as_theta(draws)
    model.spec.check(theta, "draws")
    model.check_draws(draws)
    if model.temperature != 1:
        raise ValueError(
            f"the evidence is that of temperature 1, and the model's is {model.temperature}"
        )
    if len(theta) < 10:
        raise ValueError(f"evidence needs at least ten draws, got {len(theta)}")
    if broken := int((~theta.isfinite().all(1)).sum()):
        raise ValueError(f"{broken} of {len(theta)} draws are NaN or infinite")
    return theta, log_weights


def _at_the_posterior(
    smc: SMC, path: _Path, theta: Tensor, generator: torch.Generator
) -> _Particles:
    """Take as many draws as there are particles, evenly, without those that lie far below."""
    n = min(smc.particles, len(theta))
    rows = torch.linspace(0, len(theta) - 1, n).round().long().to(theta.device)
    state = smc._first(path, theta[rows].unsqueeze(0), ALONE, generator)
    if not bool(state.log_ratio.isfinite().all()):
        raise ValueError(
            "some draws have no finite posterior or start density: they are not the posterior's"
        )
    apart = outliers(state.log_first[0])
    if bool(apart.any()):
        found = f"{int(apart.sum())} of {n} draws lie far below the others in log density"
        if float(apart.double().mean()) > _APART:
            raise ValueError(
                f"{found}: these are no draws of one posterior, refine them first"
            )
        warn(f"{found} and are left out: refine the draws, or for longer")
        rows = rows[~apart]
        state = smc._first(path, theta[rows].unsqueeze(0), ALONE, generator)
    if bool(unresolved(theta[rows]).any()):
        warn(f"{_too_close(theta)}: the evidence is not to be trusted")
    return state


def _with_ancestors(influence: Tensor, lineage: Tensor) -> float:
    """Return what particles ``(1, particle)`` add to the squared sum of influences, at least as if
    independent.
    """
    alone = float(influence.square().sum())
    return max(alone, alone + 2 * float((influence * lineage).sum()))


def _too_close(theta: Tensor) -> str:
    count, kind = int(unresolved(theta).sum()), str(theta.dtype).removeprefix("torch.")
    return (
        f"draws of {count} of {theta.shape[1]} weights are closer than {kind} tells apart"
    )


class _Path:
    """From the start, the prior if None, to the posterior, or back.

    Both ends are evaluated in chunks.
    """

    def __init__(
        self,
        model: BayesianModel,
        start: Posterior | None,
        chunk_size: int,
        *,
        back: bool = False,
    ) -> None:
        self.model, self._start, self._chunk_size, self._back = (
            model,
            start,
            chunk_size,
            back,
        )

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log densities of both ends, ``(run, particle)`` each."""
        log_first, _, log_last, _ = self._ends(theta.flatten(0, 1))
        return log_first.reshape(theta.shape[:2]), log_last.reshape(theta.shape[:2])

    def tempered(
        self, fraction: Tensor, remainder: Tensor
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return the density at fractions ``(particle,)`` of the way, one of its own for every
        particle.

        ``remainder`` is one less the fraction, and known better near the end: the first density may
        be so steep that the last digits of that matter.
        """

        def target(theta: Tensor) -> tuple[Tensor, Tensor]:
            log_first, first_grad, log_last, last_grad = self._ends(theta)
            near, far = (
                part[:, None].to(last_grad.dtype) for part in (remainder, fraction)
            )
            return (
                remainder * log_first + fraction * log_last,
                near * first_grad + far * last_grad,
            )

        return target

    def _ends(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return value and gradient of the log density at the first end and at the last, at
        ``(particle, dim)``.
        """
        parts = [self._chunk(rows) for rows in theta.split(self._chunk_size)]
        log_start, start_grad, log_joint, grad = (
            torch.cat(values) for values in zip(*parts, strict=True)
        )
        if self._back:
            return log_joint, grad, log_start, start_grad
        return log_start, start_grad, log_joint, grad

    def _chunk(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model = self.model
        if self._start is not None:
            with torch.no_grad():
                log_joint, grad = model.log_joint_and_grad(theta)
            with torch.enable_grad():
                at = theta.detach().requires_grad_()
                value = self._start.log_prob(at)
                (start_grad,) = torch.autograd.grad(value.sum(), at)
            return value.detach().double(), start_grad, log_joint, grad
        with torch.no_grad():
            prior, prior_grad = model.flat_prior.log_prob_and_grad(theta)
            likelihood, grad = model.log_likelihood_and_grad(theta)
            return (
                prior,
                prior_grad,
                (prior + likelihood) / model.temperature,
                (prior_grad + grad) / model.temperature,
            )


def next_fraction(
    ratio: Tensor, log_weights: Tensor, fraction: Tensor, ess: float
) -> Tensor:
    """Return the largest inverse temperatures ``(run,)`` that leave at least ``ess`` of the
    particles effective.
    """
    remainder = 1 - fraction
    step = _next_step(ratio, log_weights, fraction, remainder, ess)
    return torch.where(step == remainder, 1.0, fraction + step)


def _next_step(
    ratio: Tensor, log_weights: Tensor, fraction: Tensor, remainder: Tensor, ess: float
) -> Tensor:
    """Return the same as steps from ``fraction``, of which ``remainder`` is the longest."""

    def remaining(step: Tensor) -> Tensor:
        weights = log_weights + step[:, None] * ratio
        weights = weights - weights.logsumexp(1, keepdim=True)
        return (-(2 * weights).logsumexp(1)).exp() / weights.shape[1]

    # Bisection of the step itself, whose digits do not end: noise of 1e-6 of the data wants a first
    # one of 1e-13.
    low, high = torch.zeros_like(remainder), remainder
    whole = remaining(remainder) >= ess
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        enough = remaining(middle) >= ess
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        if not bool((high - low > _FINE * high).any()):
            break
    # Never stand still, however steep the density: the weights then say what it cost.
    least = torch.minimum(_spacing(fraction), _spacing(remainder))
    return torch.where(
        whole, remainder, torch.minimum(torch.maximum(low, least), remainder)
    )


def _least(left: Tensor, before: Tensor) -> Tensor:
    """Return the smaller of two shares; NaN is the smallest."""
    return torch.where(left >= before, before, left)


def _spacing(values: Tensor) -> Tensor:
    """Return how far the next larger numbers are."""
    return torch.nextafter(values, torch.full_like(values, torch.inf)) - values


def systematic(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the parents ``(run, particle)`` of the next particles by systematic resampling."""
    runs, n = log_weights.shape
    offset = torch.rand(
        runs, 1, generator=generator, device=generator.device, dtype=torch.float64
    )
    points = (
        torch.arange(n, device=log_weights.device) + offset.to(log_weights.device)
    ) / n
    heights = log_weights.exp().cumsum(1)
    return torch.searchsorted(heights / heights[:, -1:], points).clamp(max=n - 1)


def weighted_variance(theta: Tensor, log_weights: Tensor) -> Tensor:
    """Return the weighted variance of the particles of each run, ``(run, dim)`` in float64."""
    weights, theta = log_weights.exp().unsqueeze(-1), theta.double()
    mean = (weights * theta).sum(1, keepdim=True)
    variance = (weights * (theta - mean).square()).sum(1)
    return positive(variance)


def _shares(log_weights: Tensor, root: Tensor) -> Tensor:
    """Return the weight of every family, the descendants of one of the first particles,
    ``(run, make_kernel)``.
    """
    return torch.zeros_like(log_weights).scatter_add_(1, root, log_weights.exp())


def merging(log_weights: Tensor, root: Tensor) -> Tensor:
    """Return minus the log of what systematic resampling leaves, on average, of the chance that
    families differ.

    Siblings lie side by side, so that a family's number of children is its expectation rounded up
    or down.
    """
    n = log_weights.shape[1]
    shares = _shares(log_weights, root)
    part = (n * shares).frac()
    apart = (1 - shares.square().sum(1)).clamp(min=1 / n)
    return -torch.log1p(-(part * (1 - part)).sum(1) / n**2 / apart)


def relative_variance(log_weights: Tensor, root: Tensor, merged: Tensor) -> Tensor:
    """Estimate the relative variance of each run's evidence from the families alive (after Lee and
    Whiteley 2018).

    Two draws of the particles belong to different families less often than independent ones would.
    Their factor n / (n - 1) for every multinomial resampling is that of systematic resampling here.
    """
    n = log_weights.shape[1]
    apart = 1 - _shares(log_weights, root).square().sum(1)
    return (1 - n / (n - 1) * merged.exp() * apart).clamp(min=0.0)
