"""Non-reversible parallel tempering: ladders of chains between prior and posterior that exchange
their states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.inference.loop import Tuned, WarmUp, run_chains
from bnnflow.inference.mcmc.hmc import hmc
from bnnflow.inference.mcmc.mass import Moments
from bnnflow.inference.mcmc.trajectories import ChainState, TrajectoryInfo
from bnnflow.inference.mcmc.warmup import window_ends
from bnnflow.inference.particles.paths import FromPrior
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.model.target import PosteriorTarget
from bnnflow.ranks import ALONE, Ranks
from bnnflow.types import Kernel

__all__ = [
    "Ladder",
    "LadderInfo",
    "LadderState",
    "ParallelTempering",
    "Settings",
    "equalised",
    "tempering_warm_up",
]


class LadderState(NamedTuple):
    """Where every ladder is; level 0 is the prior, the last level the posterior."""

    theta: Tensor  # (ladder, dim), of the posterior
    log_joint: Tensor  # (ladder,), float64
    levels: Tensor  # (ladder, level, dim)
    log_prior: Tensor  # (ladder, level), float64
    prior_grad: Tensor  # (ladder, level, dim)
    log_ratio: Tensor  # (ladder, level), log posterior - log prior, float64
    ratio_grad: Tensor  # (ladder, level, dim)
    rising: Tensor  # (ladder, level), at the prior since it was at the posterior
    exchanges: Tensor  # (ladder,), rounds of exchanges so far
    round_trips: Tensor  # (ladder,), arrivals of states from the prior at the posterior


class LadderInfo(NamedTuple):
    """What a person wants to know of one transition; ``(ladder,)`` each."""

    acceptance_rate: Tensor  # at the posterior, here and in the next
    diverging: Tensor
    n_steps: Tensor  # gradients of all levels
    step_size: Tensor  # at the posterior
    exchange_rate: Tensor  # mean over pairs of neighbours
    round_trips: Tensor  # so far
    log_evidence: Tensor  # estimate of all transitions so far


class Settings(NamedTuple):
    """Of the levels of ladders."""

    fractions: Tensor  # (ladder, level), inverse temperatures from 0 to 1, float64
    step_size: Tensor  # (ladder, level), float64
    inverse_mass_matrix: Tensor  # (ladder, level, dim)


class Seen(NamedTuple):
    """What a transition has seen of its levels; float64."""

    moves: Tensor  # (ladder, level), rates of acceptance, but the prior's
    exchanges: Tensor  # (ladder, pair), of neighbours, if each had been tried
    log_ratio: Tensor  # (ladder, level), log posterior - log prior before they were


class Ladder:
    """Ladders whose levels move alone and then exchange states.

    Level l has the density prior^(1 - b) posterior^b at its inverse temperature b. The prior is
    drawn from anew, every other level makes a Hamiltonian transition. Then neighbours exchange
    their states with probability min(1, ratio of densities), in turns the pairs that begin at even
    levels and those at odd ones: states travel, where random pairs would let them diffuse (Okabe et
    al. 2001; Syed, Bouchard-Cote, Deligiannidis and Doucet 2022). Leaves the product of the
    densities invariant exactly.

    Args:
        model: whose prior and posterior are the ends.
        settings: of the levels.
        trajectory_length: mean time of a transition, in units of the square root of the inverse
            mass matrix.
        max_leapfrog: bound on the leapfrog steps of a transition.
    """

    def __init__(
        self,
        model: BayesianModel,
        settings: Settings,
        trajectory_length: float,
        max_leapfrog: int,
    ) -> None:
        self.model, self.settings = model, settings
        self._path = FromPrior(model, settings.fractions.numel())
        mass = settings.inverse_mass_matrix[:, 1:].flatten(0, 1)
        fraction = settings.fractions[:, 1:].flatten()
        colder = fraction / model.temperature
        target = PosteriorTarget(model.density, colder, 1 - fraction + colder)
        step_size = settings.step_size[:, 1:].flatten()
        n_leapfrog = (trajectory_length / (0.75 * step_size)).round().clamp(1, max_leapfrog)
        self._move = hmc(
            target,
            step_size.unsqueeze(1).to(mass),
            n_leapfrog.long(),
            mass,
        )

    def start(self, theta: Tensor) -> LadderState:
        """Put all levels of every ladder at one point, ``(ladder, dim)``."""
        fractions = self.settings.fractions
        levels = theta.unsqueeze(1).expand(-1, fractions.shape[1], -1).contiguous()
        none = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
        rising = torch.zeros_like(fractions, dtype=torch.bool)
        empty = LadderState(
            theta, fractions[:, 0], levels, fractions, levels, fractions, levels, rising,
            none, none,
        )  # fmt: skip
        state = self._at(levels, empty)
        return state._replace(log_joint=state.log_prior[:, -1] + state.log_ratio[:, -1])

    def advance(
        self, state: LadderState, generator: torch.Generator
    ) -> tuple[LadderState, Seen, TrajectoryInfo]:
        """Make a transition of all ladders.

        Returns:
            Where they come to, what was seen of all levels, and what is said of the moves
            ``(ladder,)``: the gradients are those of all levels, the rest is the posterior's.
        """
        fractions = self.settings.fractions
        ladders, n = fractions.shape
        chain, info = self._move.step(_chains(state, fractions), generator)
        info = TrajectoryInfo(*(each.unflatten(0, (ladders, n - 1)) for each in info))
        prior = self.model.sample_prior(ladders, generator).to(chain.theta)
        moved = chain.theta.unflatten(0, (ladders, n - 1))
        levels = torch.cat([prior.unsqueeze(1), moved], 1)
        state = self._at(levels, state)
        order, exchanges = _exchanged(
            state.exchanges, fractions, state.log_ratio, generator
        )
        seen = Seen(info.acceptance_rate, exchanges, state.log_ratio)
        rising = state.rising.index_fill(1, order.new_zeros(1), True)
        state = state._replace(rising=rising)
        state = state._replace(
            **{name: _ordered(getattr(state, name), order) for name in _TRAVELLING}
        )
        arrived = state.rising[:, -1].clone()
        state = state._replace(
            theta=state.levels[:, -1].clone(),
            log_joint=state.log_prior[:, -1] + state.log_ratio[:, -1],
            rising=state.rising.index_fill(1, order.new_tensor([n - 1]), False),
            exchanges=state.exchanges + 1,
            round_trips=state.round_trips + arrived,
        )
        gradients = n + info.n_steps.sum(1)
        top = TrajectoryInfo(*(values[:, -1] for values in info))
        return state, seen, top._replace(n_steps=gradients)

    def _at(self, levels: Tensor, state: LadderState) -> LadderState:
        """Return ladders whose levels have gone elsewhere."""
        shape = levels.shape[:2]
        first, first_grad, last, last_grad = (
            each.unflatten(0, shape) for each in self._path.ends(levels.flatten(0, 1))
        )
        # a state of no density is one of the prior alone
        ratio = (last - first).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        return state._replace(
            levels=levels,
            log_prior=first,
            prior_grad=first_grad,
            log_ratio=ratio,
            ratio_grad=last_grad - first_grad,
        )


_TRAVELLING = (
    "levels",
    "log_prior",
    "prior_grad",
    "log_ratio",
    "ratio_grad",
    "rising",
)


def _ordered(values: Tensor, order: Tensor) -> Tensor:
    """Return ``(ladder, level, ...)`` with the levels of every ladder in another order."""
    index = order if values.dim() == 2 else order.unsqueeze(-1).expand_as(values)
    return values.gather(1, index)


def _chains(state: LadderState, fractions: Tensor) -> ChainState:
    """Return all levels but the priors as chains."""
    part = fractions[:, 1:]
    value = state.log_prior[:, 1:] + part * state.log_ratio[:, 1:]
    slope = part.to(state.levels).unsqueeze(-1) * state.ratio_grad[:, 1:]
    parts = (state.levels[:, 1:], value, state.prior_grad[:, 1:] + slope)
    return ChainState(*(each.flatten(0, 1) for each in parts))


def _exchanged(
    exchanges: Tensor, fractions: Tensor, ratio: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return from which level every level takes its state, ``(ladder, level)``, and with what
    probability neighbours would have exchanged theirs, ``(ladder, pair)``.
    """
    gain = fractions.diff(dim=1) * (ratio[:, :-1] - ratio[:, 1:])
    chance = gain.nan_to_num(0.0, posinf=math.inf, neginf=-math.inf).clamp(max=0).exp()
    uniform = torch.rand(
        chance.shape, generator=generator, device=generator.device, dtype=chance.dtype
    )
    pair = torch.arange(chance.shape[1], device=ratio.device)
    turn = pair % 2 == exchanges.unsqueeze(1) % 2
    swapped = ((uniform.to(chance.device) < chance) & turn).long()
    still = torch.zeros_like(swapped[:, :1])
    order = torch.arange(ratio.shape[1], device=ratio.device)
    order = order + torch.cat([swapped, still], 1) - torch.cat([still, swapped], 1)
    return order, chance


class _Counted(NamedTuple):
    """Ladders, and what the bridges between their levels have seen."""

    theta: Tensor  # (ladder, dim)
    log_joint: Tensor  # (ladder,)
    ladders: LadderState
    up: Tensor  # (ladder, pair), sums of the bridge's function at the lower level, float64
    down: Tensor  # and at the upper


def _sampling(ladder: Ladder, log_normalisers: Tensor) -> Kernel:
    """Return the kernel that draws, and estimates the evidence as it goes.

    Neighbours are bridged by logistic functions (Bennett 1976) that begin to fall where the
    differences of their log normalisers, ``(ladder, pair)``, were found to be: for any such
    numbers the estimate is consistent, for the right ones it is the best.
    """

    def init(theta: Tensor, generator: torch.Generator) -> _Counted:
        state, nothing = ladder.start(theta), torch.zeros_like(log_normalisers)
        return _Counted(state.theta, state.log_joint, state, nothing, nothing)

    def step(state: _Counted, generator: torch.Generator) -> tuple[_Counted, LadderInfo]:
        ladders, seen, info = ladder.advance(state.ladders, generator)
        gain, ratio = ladder.settings.fractions.diff(dim=1), seen.log_ratio
        up = state.up + (gain * ratio[:, :-1] - log_normalisers).sigmoid()
        down = state.down + (log_normalisers - gain * ratio[:, 1:]).sigmoid()
        after = _Counted(ladders.theta, ladders.log_joint, ladders, up, down)
        return after, LadderInfo(
            info.acceptance_rate,
            info.diverging,
            info.n_steps,
            info.step_size,
            seen.exchanges.mean(1),
            ladders.round_trips,
            (log_normalisers + up.log() - down.log()).sum(1),
        )

    return Kernel(init, step)


# ---------------------------------------- warm-up


def equalised(fractions: Tensor, rejection: Tensor) -> Tensor:
    """Return the inverse temperatures at which neighbours reject each other's states equally often.

    The rejections of neighbours add up to a barrier along the path, the same for every fine enough
    schedule, which is cut into equal parts (Syed et al. 2022). Between two levels it is taken to
    grow with the logarithm of the inverse temperature, from the prior to the first with the inverse
    temperature itself.

    Args:
        fractions: present ones, increasing from 0 to 1, ``(ladder, level)``.
        rejection: mean rates of rejection, ``(ladder, pair)``.
    """
    found = []
    pairs = zip(fractions.cpu().numpy(), rejection.cpu().numpy(), strict=True)
    for at, rates in pairs:
        barrier = np.concatenate([[0.0], np.cumsum(np.maximum(rates, 1e-3))])
        wanted = np.linspace(0.0, barrier[-1], len(at))[1:-1]
        logs = np.exp(np.interp(wanted, barrier[1:], np.log(at[1:])))
        first = wanted / barrier[1] * at[1]
        found.append([0.0, *np.where(wanted < barrier[1], first, logs), 1.0])
    return torch.tensor(np.array(found), dtype=fractions.dtype, device=fractions.device)


class _Tuning(NamedTuple):
    """What warm-up has learned so far; see `tempering_warm_up`."""

    theta: Tensor  # (ladder, dim)
    log_joint: Tensor  # (ladder,)
    ladders: LadderState
    fractions: Tensor  # (ladder, level)
    log_step: Tensor  # (ladder, level), float64
    averaged: Tensor  # (ladder, level), the same on average over what was tried of late
    inverse_mass_matrix: Tensor  # (ladder, level, dim)
    moments: Moments
    sweeps: int  # transitions since the temperatures changed, and sums over them:
    rejected: Tensor  # (ladder, pair)
    log_up: Tensor  # (ladder, pair), log, of weights of the lower level for the upper
    done: int

    @property
    def log_normalisers(self) -> Tensor:
        """What the log normalisers of neighbours differ by, as far as known."""
        if self.sweeps == 0:
            return torch.zeros_like(self.log_up)
        return (self.log_up - math.log(self.sweeps)).nan_to_num(0.0, neginf=0.0)


def tempering_warm_up(
    model: BayesianModel,
    n: int,
    settings: ParallelTempering,
    ranks: Ranks = ALONE,
) -> WarmUp:
    """Tune temperatures, step sizes and diagonal mass matrices of ladders in ``n`` transitions.

    Every ladder has temperatures of its own, which equalise the rates at which its neighbours
    exchange states. Every level of every ladder has a step size of its own, found by its acceptance
    rate, and a mass matrix: its variances, shrunk towards those of that level over all ladders.
    Temperatures and mass matrices are set at the ends of windows of doubling length; the last
    window only settles step sizes and looks at the normalisers.

    Args:
        model: whose prior and posterior are the ends.
        n: number of transitions.
        settings: what warm-up aims at.
        ranks: the processes that share the ladders.
    """
    ends = window_ends(n)

    def ladder(tuning: _Tuning, log_step: Tensor) -> Ladder:
        tuned = Settings(tuning.fractions, log_step.exp(), tuning.inverse_mass_matrix)
        return Ladder(model, tuned, settings.trajectory_length, settings.max_leapfrog)

    def init(theta: Tensor, generator: torch.Generator) -> _Tuning:
        fractions = _first_fractions(model, len(theta), settings.levels, generator)
        log_step = torch.full_like(fractions, math.log(0.1 * model.dim**-0.25))
        mass = torch.ones_like(theta).unsqueeze(1).repeat(1, settings.levels, 1)
        first = Settings(fractions, log_step.exp(), mass)
        state = Ladder(model, first, 1.0, 1).start(theta)
        moments = Moments.start(state.levels.flatten(1), mass.flatten(1))
        nothing = torch.zeros_like(fractions[:, 1:])
        return _Tuning(
            state.theta, state.log_joint, state, fractions, log_step, log_step, mass, moments,
            0, nothing, nothing - math.inf, 0,
        )  # fmt: skip

    def step(tuning: _Tuning, generator: torch.Generator) -> tuple[_Tuning, TrajectoryInfo]:
        present = ladder(tuning, tuning.log_step)
        state, seen, info = present.advance(tuning.ladders, generator)
        sweeps, done = tuning.sweeps + 1, tuning.done + 1
        gap = seen.moves - settings.target_acceptance
        log_step = tuning.log_step.clone()
        log_step[:, 1:] += gap * max(sweeps**-0.5, 0.05)
        late = 2 / (sweeps + 1)  # weights grow in proportion to the sweeps
        gain = tuning.fractions.diff(dim=1) * seen.log_ratio[:, :-1]
        tuning = tuning._replace(
            theta=state.theta, log_joint=state.log_joint, ladders=state, log_step=log_step,
            moments=tuning.moments.update(state.levels.flatten(1)), sweeps=sweeps,
            averaged=torch.lerp(tuning.averaged, log_step, late),
            rejected=tuning.rejected + 1 - seen.exchanges,
            log_up=torch.logaddexp(tuning.log_up, gain), done=done,
        )  # fmt: skip
        if done in ends[1:]:
            tuning = _with_mass(tuning, ranks)
        if done in ends:
            tuning = _with_fractions(tuning)
        return tuning, info

    def tuned(tuning: _Tuning) -> Tuned:
        final = ladder(tuning, tuning.averaged)
        none = torch.zeros_like(tuning.log_up)
        begun = tuning.ladders._replace(
            round_trips=torch.zeros_like(tuning.ladders.round_trips)
        )
        state = _Counted(begun.theta, begun.log_joint, begun, none, none)
        rejected = tuning.rejected / max(1, tuning.sweeps)
        found = {
            "step_size": float(ranks.mean(tuning.averaged[:, -1].mean()).exp()),
            "inverse_temperatures": ranks.gather(tuning.fractions).tolist(),
            "barrier": float(ranks.mean(rejected.sum(1).mean())),
        }
        return Tuned(_sampling(final, tuning.log_normalisers), state, found)

    return WarmUp(init, step, tuned)


def _with_mass(tuning: _Tuning, ranks: Ranks) -> _Tuning:
    """Take the mass matrices that were seen, and the same steps in the new coordinates."""
    before = tuning.inverse_mass_matrix
    mass = tuning.moments.inverse_mass_matrix(before.flatten(1), ranks).view_as(before)
    grown = (mass.double() / before).log().mean(2)
    return tuning._replace(inverse_mass_matrix=mass, log_step=tuning.log_step - 0.5 * grown)


def _with_fractions(tuning: _Tuning) -> _Tuning:
    """Take the temperatures that equalise rejections, and the step sizes that belong to them."""
    before = tuning.fractions
    after = equalised(before, tuning.rejected / tuning.sweeps)
    log_step = tuning.log_step.clone()
    for own, old, new in zip(log_step, before, after, strict=True):
        there, here = (each[1:].log().cpu().numpy() for each in (new, old))
        own[1:] = torch.from_numpy(np.interp(there, here, own[1:].cpu().numpy())).to(own)
    moments = Moments.start(
        tuning.ladders.levels.flatten(1), tuning.inverse_mass_matrix.flatten(1)
    )
    return tuning._replace(
        fractions=after, log_step=log_step, averaged=log_step, moments=moments, sweeps=0,
        rejected=torch.zeros_like(tuning.rejected),
        log_up=torch.full_like(tuning.log_up, -math.inf),
    )  # fmt: skip


_PRIOR_DRAWS = 256


def _first_fractions(
    model: BayesianModel, ladders: int, levels: int, generator: torch.Generator
) -> Tensor:
    """Return inverse temperatures ``(ladder, level)`` to begin with: where the densities of most
    draws of the prior differ by a nat, and from there evenly in the logarithm to 1.
    """
    first, _, last, _ = FromPrior(model, _PRIOR_DRAWS).ends(
        model.sample_prior(_PRIOR_DRAWS, generator)
    )
    ratio = (last - first).sort().values.clamp(min=torch.finfo(last.dtype).min / 4)
    spread = float(ratio[3 * _PRIOR_DRAWS // 4] - ratio[_PRIOR_DRAWS // 4])
    least = min(0.5, 1 / spread) if spread > 0 else 0.5
    rungs = torch.logspace(math.log10(least), 0, levels - 1, dtype=torch.float64)
    fractions = torch.cat([rungs.new_zeros(1), rungs]).to(first.device)
    return fractions.expand(ladders, -1).clone()


@dataclass(frozen=True)
class ParallelTempering(Method):
    """Sample several modes and the evidence with ladders of chains that exchange their states,
    tuned during warm-up (Syed et al. 2022).

    Each chain of the draws is the top of a ladder of its own, whose levels lead from the prior,
    which is drawn from anew in every transition, to the posterior; see `Ladder` and
    `tempering_warm_up`. Leaves the posterior invariant exactly once warm-up has ended.
    ``stats["round_trips"]`` counts the states that came from the prior to the posterior so far:
    where it stays at zero the levels are too few, or the warm-up too short. ``info["barrier"]``
    is the sum of the rates at which neighbours reject each other's states, and twice that number
    of levels the best use of the time. ``draws.log_evidence`` has the standard error by the
    spread of the ladders, which know nothing of each other. At a temperature other than 1 it is
    the normaliser of the tempered posterior, ``info["log_tempered_normaliser"]``, instead.

    Args:
        levels: of a ladder, prior and posterior included.
        target_acceptance: mean acceptance rate that warm-up aims at, at every level.
        trajectory_length: mean integration time of a transition, in units of a level's standard
            deviations.
        max_leapfrog: bound on the leapfrog steps of a transition.
    """

    levels: int = 20
    target_acceptance: float = 0.8
    trajectory_length: float = 1.5
    max_leapfrog: int = 128

    def __post_init__(self) -> None:
        settle(self, integer, "levels", least=3)
        settle(self, number, "target_acceptance", above=0, below=1)
        settle(self, number, "trajectory_length", above=0)
        settle(self, integer, "max_leapfrog", least=1)

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Run the ladders; see `bnnflow.sample`. ``chains`` is the number of ladders."""
        chains, draws = run.chains_or(8), run.draws or 1000
        warmup = 500 if run.warmup is None else run.warmup
        process = tempering_warm_up(model, warmup, self, run.ranks)
        found = run_chains(
            model, run, process, chains=chains, warmup=warmup, draws=draws,
            name="parallel tempering",
        )  # fmt: skip
        ladders = found.stats["log_evidence"][:, -1].double()
        error = float(ladders.std()) / math.sqrt(chains) if chains > 1 else math.nan
        estimate = (float(ladders.mean()), error)
        info = found.info | {
            "round_trips": found.stats["round_trips"][:, -1].tolist(),
            "exchange_rate": float(found.stats["exchange_rate"].mean()),
            "log_evidence_of_ladders": ladders.tolist(),
        }
        if model.temperature != 1:
            return replace(found, info=info | {"log_tempered_normaliser": estimate})
        return replace(found, info=info, log_evidence=estimate)
