"""Draws of one posterior carried to a neighbouring one: of more rows, of fewer, of other ones."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bnnflow import diagnostics
from bnnflow.arguments import checked
from bnnflow.draws import Draws, as_theta, evenly, refuse_approximation
from bnnflow.importance import Estimate, khat_limit, kish_ess, psis
from bnnflow.inference.particles.bank import PriorBank
from bnnflow.inference.particles.paths import Ends, FromPrior, Path
from bnnflow.inference.particles.refine import PILOTS, piloted, refine
from bnnflow.inference.particles.smc import SMC
from bnnflow.inference.particles.tempering import (
    Particles,
    Tempering,
    effective_families,
    merging,
    next_step,
    relative_variance,
    systematic,
)
from bnnflow.model import BayesianModel
from bnnflow.model.transported import TransportedLogJoint
from bnnflow.progress import progress_bar, until_interrupted
from bnnflow.ranks import ALONE
from bnnflow.seeding import as_generator, seed_in_words
from bnnflow.stopwatch import Stopwatch
from bnnflow.types import LogDensityAndGrad, Seed

__all__ = ["FEWEST", "Route", "update"]

Route = Literal["weights", "tempering", "refine"]

FEWEST = 10  # draws that weights can be judged by
_PARTICLES = SMC(particles=2000, ess=0.5, moves=1, max_leapfrog=128)
_SHORT = 32  # leapfrog steps at most while families are many
# Share of the particles. Short trajectories leave weights where their ancestors' were: functions of
# few families move, and the posterior that they move in is that of few.
_MANY = 1 / 8
_OF_PRIOR = replace(_PARTICLES, moves=4)  # the way from a bank is long
# A learned prior makes gradients dear, and latent points hardly need them.
_OF_LEARNED = replace(_PARTICLES, particles=500, ess=0.4, moves=2)
_SHORT_OF_LEARNED = 8
_PRIOR_DRAWS = 512  # that draws of who knows what are compared with
_STEPS, _N_LEAPFROG = 5, 16  # of draws whose own posterior is not known


@checked
def update(
    model: BayesianModel,
    draws: Draws | PriorBank,
    previous: BayesianModel | None = None,
    smc: SMC | None = None,
    *,
    seed: Seed = 0,
    progress: bool = True,
) -> Draws:
    """Carry draws to a neighbouring posterior: rows came, went or changed, or the likelihood, the
    prior or the temperature did.

    The cheapest way that holds is taken, and said in ``info["route"]``:

    * ``"weights"``: where the two posteriors are close, all draws are weighted and none moves
      (Vehtari et al. 2024). k-hat has to allow it, and as many draws be effective as tempering
      would leave. This takes no gradient.
    * ``"tempering"``: some of the draws go along p_old^(1 - b) p_new^b, as in `SMC` (Chopin 2002).
      The first step goes as far as all draws together allow, so that those that are moved are few
      and hardly alike.
    * ``"refine"``: where ``previous`` is not known and weights fail, some draws are moved by
      `refine`. What this leaves of the old posterior is not known.

    ``info["log_evidence_change"]`` is the log evidence of the new model over that of the old one
    and its standard error: log p(new rows | old rows) where rows came. If the draws have a
    ``log_evidence`` so has the result. Updates can follow each other: weights are carried on, and
    so is from which of the first draws each one descends, ``stats["ancestor"]``, which errors of
    the evidence are estimated by.

    Args:
        model: whose posterior is wanted; ``theta`` must mean the same as in the old one.
        draws: of the old posterior, weighted or not; or a bank of draws of the prior, which is the
            posterior of no rows. Of these as many as ``smc`` has particles are returned, chosen by
            their weights, and ``log_evidence`` is that of the data.
        previous: the old model. It is found without where rows were added at the end, as
            `BayesianModel.extended` does.
        smc: how to temper. If None ``SMC(particles=2000, ess=0.5, moves=1, max_leapfrog=128)``,
            with 32 leapfrog steps at most until resampling, in this update and those before, has
            left the particles few ancestors. From a bank four moves; if the prior is learned 500
            particles, an ess of 0.4, and two moves of 8 steps. As many particles are used as there
            are draws.
        seed: an int or a generator.
        progress: show a bar at a terminal.

    Returns:
        Draws of the new posterior: the old ones with weights, in their chains, or one chain of
        moved ones, weighted as the last temperature left them. After Ctrl-C, but in the first
        temperature, weighted for the new posterior from where they were, with
        ``info["interrupted"]`` set.

    Raises:
        ValueError: before any work, if the draws are fewer than ten, not finite, of no posterior,
            or of another one than ``previous``; if ``previous`` has another network or shares no
            row with ``model``, or is given with a bank; if the bank is of another prior, or the
            temperature of ``model`` above 1; if draws are as unlikely under ``model`` as draws of
            its prior.

    Example:
        >>> from bnnflow import HMC, BayesianModel, likelihoods, priors, sample
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> model = BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), x, x.sin())
        >>> old = sample(model, HMC(), chains=8, draws=100, warmup=100, progress=False)
        >>> new = update(model.extended(x[:1] + 0.2, x[0].sin()), old)
        >>> new.info["gradients_per_draw"] <= 64  # chains of its own take hundreds
        True
    """
    if smc is not None and smc.start is not None:
        raise ValueError("smc must have no start: the draws are where particles begin")
    if isinstance(draws, PriorBank):
        if previous is not None:
            raise ValueError("previous must be None: a bank is the posterior of no rows")
        start = _Start.of_prior(model, draws)
        usual, short = (
            (_OF_LEARNED, _SHORT_OF_LEARNED)
            if model.is_transported
            else (_OF_PRIOR, _SHORT)
        )
    else:
        start, usual, short = _Start.of(model, draws, previous), _PARTICLES, _SHORT
    paces = f", {short} steps while families are many"
    if smc is None:
        smc = usual
    else:
        short, paces = smc.max_leapfrog, ""
    watch, generator = Stopwatch(), as_generator(seed, model.device)
    weights = start.log_weights + start.log_ratio
    smoothed, khat = psis(weights)
    if start.bounded:
        smoothed = weights.log_softmax(0)
    particles = min(smc.particles, len(start.theta))
    left = kish_ess(smoothed) * start.worth
    info = {
        "seed": seed_in_words(seed),
        "khat": khat,
        "gradients": 0,
        "gradients_per_draw": 0.0,
        "interrupted": False,
    }
    change: Estimate | None
    if (start.bounded or khat <= khat_limit(len(smoothed))) and left >= smc.ess * particles:
        route: Route = "weights"
        result, change = _weighted(start, smoothed), _mean_ratio(start, 1.0)
        if isinstance(draws, PriorBank):
            result = _few_of(result, particles, generator)
    elif start.path is not None:
        route = "tempering"
        result, change = _tempered(start, smc, short, generator, progress)
    else:
        route, change = "refine", None
        rows = systematic(start.log_weights[None], generator, particles)[0]
        result = refine(
            model,
            start.theta[rows],
            _STEPS,
            n_leapfrog=_N_LEAPFROG,
            seed=generator,
            progress=progress,
        )
    info |= result.info | {
        "method": "update",
        "settings": f"update({smc!r}{paces})",
        "route": route,
        "model": model.fingerprint(),
        "rows": len(model.x),
        **watch.read(),
    }
    if start.exact is not None:  # what a sampler has done to its draws, no weights undo
        info["exact"] = start.exact
    if change is not None:
        info["log_evidence_change"] = list(change)
    plain = change is not None and start.untempered and not info["interrupted"]
    evidence = _sum(start.log_evidence, change) if plain else None
    return replace(result, info=info, log_evidence=evidence)


# ---------------------------------------- where it starts


@dataclass(frozen=True, eq=False)
class _Start:
    """Checked draws of the old posterior.

    Attributes:
        theta: ``(n, dim)``, on the device and in the type of the new model.
        log_weights: ``(n,)``, normalised, float64.
        log_joint: log density of the new posterior, ``(n,)``, float64.
        log_ratio: log density of the new posterior less that of the old one, ``(n,)``, float64.
        shape: ``(chain, draw)``.
        path: makes the one to the new posterior, given how many particles are evaluated together;
            None if the old one is not known.
        untempered: whether both models are of temperature 1.
        log_evidence: of the old posterior, if known.
        exact: what the sampler says of its draws, if it does.
        worth: independent draws that one is worth.
        root: which of the first draws each one descends from, ``(n,)``, numbered from 0; None if
            none has been resampled yet.
        merged: see `Particles`.
        bounded: whether ratios have an upper bound. How many draws are effective then says all, and
            k-hat, that the tail of those seen is heavy, nothing.
    """

    theta: Tensor
    log_weights: Tensor
    log_joint: Tensor
    log_ratio: Tensor
    shape: tuple[int, int]
    path: Callable[[int], Path] | None
    untempered: bool
    log_evidence: Estimate | None
    exact: object = None
    worth: float = 1.0
    root: Tensor | None = None
    merged: float = 0.0
    bounded: bool = False

    @classmethod
    def of(
        cls, model: BayesianModel, draws: Draws, previous: BayesianModel | None
    ) -> _Start:
        """Look at draws, and at how they fit both models."""
        theta, log_weights = as_theta(draws)
        model.spec.check(theta, "draws")
        if len(theta) < FEWEST:
            raise ValueError(f"draws must be at least {FEWEST}, got {len(theta)}")
        if broken := int((~theta.isfinite().all(1)).sum()):
            raise ValueError(f"draws: {broken} of {len(theta)} are NaN or infinite")
        refuse_approximation(draws, "draws")
        if previous is None:
            previous = _known(model, draws)
        elif (previous.device, previous.dtype) != (model.device, model.dtype):
            previous = previous.to(model.device, model.dtype)
        if previous is not None:
            _check_neighbours(model, previous, draws)
        theta = theta.to(model.device, model.dtype)
        if previous is None:
            old = draws.log_joint.flatten().double().to(model.device)
        else:
            old = _log_joint(previous, theta)
        log_joint = _log_joint(model, theta)
        ratio = _usable(log_joint - old)
        path = None
        if previous is None:
            _check_informed(model, theta)
        else:
            path = functools.partial(_Neighbours.of, previous, model)
        if log_weights is None:
            log_weights = ratio.new_full((len(theta),), -math.log(len(theta)))
        weights = log_weights.double().to(model.device)
        ancestor = draws.stats.get("ancestor")
        return cls(
            theta,
            weights - weights.logsumexp(0),
            log_joint,
            ratio,
            shape=(draws.n_chains, draws.n_draws),
            path=path,
            untempered=all(
                each is None or each.temperature == 1 for each in (model, previous)
            ),
            log_evidence=draws.log_evidence,
            exact=draws.info.get("exact"),
            worth=_worth(draws, ratio),
            root=None if ancestor is None else _numbered(ancestor.to(model.device)),
            merged=draws.info.get("merged", 0.0),
        )

    @classmethod
    def of_prior(cls, model: BayesianModel, bank: PriorBank) -> _Start:
        """Look at draws of the prior, and at how they fit the data."""
        if len(bank) < FEWEST:
            raise ValueError(f"draws must be at least {FEWEST}, got {len(bank)}")
        if model.temperature > 1:  # weights divide by the prior, and have no bound
            raise ValueError(
                f"model must have a temperature of at most 1, got {model.temperature:g}: its "
                "posterior may be wider than the prior that the bank is of"
            )
        log_likelihood = bank.log_likelihood(model)
        log_prior = bank.log_prior.to(model.device)
        log_joint = (log_prior + log_likelihood) / model.temperature
        return cls(
            bank.theta.to(model.device, model.dtype),
            torch.full_like(log_prior, -math.log(len(bank))),
            log_joint,
            _usable(log_joint - log_prior),
            shape=(1, len(bank)),
            path=functools.partial(FromPrior, model),
            untempered=model.temperature == 1,
            log_evidence=(0.0, 0.0),
            bounded=model.likelihood.is_bounded,
        )

    @property
    def families(self) -> Tensor:
        """Which draws belong together, ``(n,)``: each one to none but itself if none has been
        resampled.
        """
        if self.root is None:
            return torch.arange(len(self.theta), device=self.theta.device)
        return self.root

    def variance(self, log_weights: Tensor) -> float:
        """Return the relative variance of the evidence that weights ``(n,)`` leave, by families."""
        merged = log_weights.new_tensor([self.merged])
        return float(relative_variance(log_weights[None], self.families[None], merged))


def _usable(ratio: Tensor) -> Tensor:
    """Return log ratios of densities with those that are not finite as low as can be."""
    if not bool(ratio.isfinite().any()):
        raise ValueError("draws: none of them has a finite density under model")
    return ratio.nan_to_num(nan=-math.inf, neginf=-math.inf)


def _numbered(ancestor: Tensor) -> Tensor:
    """Number families from 0; return that of every draw, ``(n,)``."""
    return ancestor.flatten().unique(return_inverse=True)[1]


@torch.no_grad()
def _log_joint(model: BayesianModel, theta: Tensor) -> Tensor:
    return model.log_joint(theta).double()


def _known(model: BayesianModel, draws: Draws) -> BayesianModel | None:
    """Return the model that draws are of, if it is of the first rows of this one."""
    fingerprint, rows = draws.info.get("model"), draws.info.get("rows")
    if not isinstance(fingerprint, str) or not isinstance(rows, int):
        return None
    if rows > len(model.x):
        return None
    part = model if rows == len(model.x) else model.subset(slice(0, rows))
    return part if part.recognises(fingerprint) else None


def _check_neighbours(model: BayesianModel, previous: BayesianModel, draws: Draws) -> None:
    """Raise ``ValueError`` unless one posterior can be reached from the other."""
    if previous.spec.shapes != model.spec.shapes:
        raise ValueError(
            "previous has other weights than model: theta means something else"
        )
    previous.check_draws(draws)
    if not set(_keys(previous.x)) & set(_keys(model.x)):
        raise ValueError(
            "previous shares no row of x with model: sample the posterior anew"
        )


def _check_informed(model: BayesianModel, theta: Tensor) -> None:
    """Raise ``ValueError`` if draws of who knows what tell less of the data than the prior does."""
    with torch.no_grad():
        own = model.log_likelihood(theta)
        prior = model.log_likelihood(model.sample_prior(_PRIOR_DRAWS, seed=0))
    if bool((own.nan_to_num(nan=-math.inf) < prior.nanmedian()).all()):
        raise ValueError(
            "draws fit the data of model worse than draws of its prior do: they share nothing; "
            "give previous if they do"
        )


def _worth(draws: Draws, ratio: Tensor) -> float:
    """Return how many independent draws tell as much of the ratio as one of the chains does; of
    chains that an update has weighed already what it found.
    """
    if draws.log_weights is not None or draws.n_draws < 4:
        return float(draws.info.get("worth", 1.0))
    values = ratio.clamp(min=float(ratio[ratio.isfinite()].min())).cpu().numpy()
    found = float(diagnostics.ess(values.reshape(draws.theta.shape[:2]), "mean"))
    return min(1.0, found / len(values)) if found > 0 else 1.0


# ---------------------------------------- by weights


def _weighted(start: _Start, smoothed: Tensor) -> Draws:
    shape = start.shape
    info, stats = {"ess": kish_ess(smoothed) * start.worth, "worth": start.worth}, {}
    if start.root is not None:
        stats["ancestor"] = start.root.reshape(shape)
        families = float(len(start.root.unique()))
        info |= {"merged": start.merged, "first_ancestors": families}
    return Draws(
        start.theta.reshape(*shape, -1),
        start.log_joint.reshape(shape),
        stats=stats,
        log_weights=smoothed.reshape(shape),
        info=info,
    )


def _few_of(draws: Draws, count: int, generator: torch.Generator) -> Draws:
    """Choose ``count`` draws of one chain by their weights; return those that are chosen, weighted
    by how often.
    """
    assert draws.log_weights is not None
    rows, times = systematic(draws.log_weights, generator, count).unique(return_counts=True)
    return replace(
        draws,
        theta=draws.theta[:, rows],
        log_joint=draws.log_joint[:, rows],
        log_weights=(times.double() / count).log()[None],
        info=draws.info | {"ess": 1 / (1 / draws.info["ess"] + 1 / count)},
    )


def _mean_ratio(start: _Start, power: float) -> Estimate:
    """Return the log of the mean of ratio^power over the old posterior, with its standard error."""
    weighted = start.log_weights + power * start.log_ratio
    value = weighted.logsumexp(0)
    after = weighted - value
    alone = float((after.exp() - start.log_weights.exp()).square().sum()) / start.worth
    families = start.variance(after) - start.variance(start.log_weights)
    return float(value), math.sqrt(max(alone, families))


# ---------------------------------------- by tempering


def _tempered(
    start: _Start,
    smc: SMC,
    short: int,
    generator: torch.Generator,
    progress: bool,
) -> tuple[Draws, Estimate]:
    """Carry some of the draws along the path between both posteriors, by ``short`` trajectories
    while their families are many.
    """
    assert start.path is not None
    count = min(smc.particles, len(start.theta))
    path = start.path(smc.chunk_size)
    tempering = smc.tempering(path, ALONE, generator, generator)

    def paced(state: Particles) -> Tempering:
        """Return how particles go on whose families are those of ``state``."""
        families = float(effective_families(state.log_weights, state.root))
        few = families < _MANY * count
        return tempering if few else replace(tempering, max_leapfrog=short)

    with (
        progress_bar(None, "update", progress, "temperature") as bar,
        until_interrupted() as taken,
    ):
        state, first, before = _begun(tempering, start, count)
        state, taken.done = paced(state).moved(state, bar), 1
        alone = 0.0
        while float(state.fraction) < 1:
            ended = tempering.weighed(state)
            if kish_ess(ended.log_weights[0]) >= smc.ess * count:
                alone += _step_variance(state, 0.0)
                state = ended  # as many effective as moves would leave
                break
            alone += _step_variance(state, smc.ess)
            state = paced(state).advance(state, bar)
            taken.done += 1
    if taken.interrupted:
        state = tempering.broken_off(state)
    families = (
        float(relative_variance(state.log_weights, state.root, state.merged)) - before
    )
    value = first[0] + float(state.log_normaliser)
    error = math.sqrt(first[1] ** 2 + max(alone, families))
    info = {
        "temperatures": taken.done,
        "ess": kish_ess(state.log_weights[0]),
        "acceptance_rate": state.acceptance,
        "step_size": state.step_size,
        "gradients_per_draw": path.cost * state.gradients,
        "gradients": round(path.cost * state.gradients * count),
        "merged": float(state.merged),
        "first_ancestors": float(len(state.root.unique())),
        "least_effective_share": float(state.least),
        "interrupted": taken.interrupted,
    }
    result = Draws(
        state.theta,
        state.log_first + state.log_ratio,
        stats={"ancestor": state.root},
        log_weights=state.log_weights,
        info=info,
    )
    return result, (value, error)


def _step_variance(state: Particles, ess: float) -> float:
    """Return what the next temperature adds to the variance of the log evidence if the particles
    are independent: no estimate by their families is to be smaller.
    """
    given = (state.log_ratio, state.log_weights, state.fraction, state.remainder)
    step = next_step(*given, ess)
    weights = (state.log_weights + step[:, None] * state.log_ratio).softmax(1)
    return float((weights - state.log_weights.exp()).square().sum())


def _begun(
    tempering: Tempering, start: _Start, count: int
) -> tuple[Particles, Estimate, float]:
    """Go as far as weights of all draws leave so many effective as tempering wants, and choose
    ``count`` particles by them.

    Return them, not yet moved, the evidence of that temperature over the old one, and the relative
    variance of the evidence, by families, before any is chosen.
    """
    ratio, weights = start.log_ratio[None], start.log_weights[None]
    zero = torch.zeros(1, dtype=torch.float64, device=ratio.device)
    share = tempering.ess * count / (len(start.theta) * start.worth)
    step = next_step(ratio, weights, zero, zero + 1, min(share, tempering.ess))
    reached = (weights + step[:, None] * ratio).log_softmax(1)
    rows = systematic(reached, tempering.generator, count)[0]
    state = tempering.first(start.theta[rows].unsqueeze(0))
    # of how many they are, which `relative_variance` assumes of the first ones too
    numbers = math.log1p(1 / (len(start.theta) - 1)) - math.log1p(1 / (count - 1))
    merged = start.merged + numbers + merging(reached, start.families[None], count)
    state = state._replace(
        root=_numbered(start.families[rows])[None],
        merged=merged,
        fraction=step,
        remainder=1 - step,
    )
    mass = start.theta[evenly(len(start.theta), count).to(rows.device)].double().var(0)
    pilot = evenly(count, min(PILOTS, max(1, count // 8))).to(rows.device)
    at = (each.expand(len(pilot)) for each in (state.fraction, state.remainder))
    step_size, gradients = piloted(
        tempering.path.tempered(*at),
        state.theta[0, pilot],
        mass.to(start.theta.dtype),
        state.step_size,
        tempering.target_acceptance,
        tempering.generator,
    )
    state = state._replace(
        step_size=step_size, gradients=state.gradients + gradients / count
    )
    return state, _mean_ratio(start, float(step)), start.variance(reached[0])


class _Neighbours(Path):
    """From one posterior to another of nearly the same rows.

    Args:
        old: the one to begin with.
        new: the one to end with.
        apart: the rows that only one of them has, and the sign of their log likelihood in the
            difference; None if not only rows differ.
        chunk_size: particles that are evaluated together.
    """

    def __init__(
        self,
        old: BayesianModel,
        new: BayesianModel,
        apart: list[tuple[int, BayesianModel]] | None,
        chunk_size: int,
    ) -> None:
        super().__init__(chunk_size)
        self.old, self.new, self.apart = old, new, apart

    @classmethod
    def of(cls, old: BayesianModel, new: BayesianModel, chunk_size: int) -> _Neighbours:
        """Find out in what they differ."""
        came, gone, shared = _rows_apart(old, new)
        alike = (
            shared is not None
            and old.temperature == new.temperature
            and old.subset(shared[0]).fingerprint() == new.subset(shared[1]).fingerprint()
        )
        if not alike:
            return cls(old, new, None, chunk_size)
        apart = [
            (sign, model.subset(rows))
            for sign, model, rows in ((1, new, came), (-1, old, gone))
            if len(rows)
        ]
        return cls(old, new, apart, chunk_size)

    @property
    def cost(self) -> float:
        """Gradients of the new posterior that an evaluation costs."""
        rows = len(self.old.x)
        if self.apart is not None:
            rows = sum(len(part.x) for _, part in self.apart)
        return 1 + rows / len(self.new.x)

    @torch.no_grad()
    def at(self, theta: Tensor) -> Ends:
        """Evaluate both ends at ``(particle, dim)``."""
        last, last_grad = self.new.log_joint_and_grad(theta)
        if self.apart is None:
            return *self.old.log_joint_and_grad(theta), last, last_grad
        first, first_grad = last, last_grad
        for sign, part in self.apart:
            value, grad = part.log_likelihood_and_grad(theta)
            first = first - sign * value / part.temperature
            first_grad = first_grad - sign * grad / part.temperature
        return first, first_grad, last, last_grad

    def tempered(self, fraction: Tensor, remainder: Tensor) -> LogDensityAndGrad:
        """Return the density at fractions ``(particle,)`` of the way; see `Path.tempered`.

        Through the map of a transported model the gradient goes back once, not once for every end.
        """
        density, apart = self.new.density, self.apart
        if apart is None or not isinstance(density, TransportedLogJoint):
            return super().tempered(fraction, remainder)
        temperature = self.new.temperature

        def likelihood(weights: Tensor, remainder: Tensor) -> tuple[Tensor, Tensor]:
            value, grad = density.inner.log_likelihood_and_grad(weights)
            for sign, part in apart:
                assert isinstance(part.density, TransportedLogJoint)
                own, own_grad = part.density.inner.log_likelihood_and_grad(weights)
                less = sign * remainder
                value = value - less * own
                grad = grad - less[:, None].to(grad.dtype) * own_grad
            return value, grad

        @torch.no_grad()
        def target(theta: Tensor) -> tuple[Tensor, Tensor]:
            found = [
                density.pulled_back(
                    rows, lambda weights, left=left: likelihood(weights, left)
                )
                for rows, left in zip(
                    theta.split(self.chunk_size),
                    remainder.split(self.chunk_size),
                    strict=True,
                )
            ]
            value, grad = (torch.cat(each) for each in zip(*found, strict=True))
            prior, prior_grad = density.prior.log_prob_and_grad(theta)
            return (value + prior) / temperature, (grad + prior_grad) / temperature

        return target


def _rows_apart(
    old: BayesianModel, new: BayesianModel
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return the rows of ``new`` that ``old`` has not, those of ``old`` that ``new`` has not, and
    one that both have, ``(1,)`` in each; a row may come several times.
    """
    before, after = (
        list(zip(*map(_keys, (each.x, each.y, each.counts_of())), strict=True))
        for each in (old, new)
    )
    came, gone = _beyond(after, before), _beyond(before, after)
    common = sorted(set(range(len(before))) - set(gone))

    def numbers(rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=new.device)

    shared = None
    if common:
        shared = numbers([common[0]]), numbers([after.index(before[common[0]])])
    return numbers(came), numbers(gone), shared


def _keys(values: Tensor) -> list[bytes]:
    return [row.tobytes() for row in values.detach().cpu().numpy()]


def _beyond(
    rows: list[tuple[bytes, bytes]], others: list[tuple[bytes, bytes]]
) -> list[int]:
    """Return the numbers of the rows that are more often here than there."""
    left, found = Counter(others), []
    for number, row in enumerate(rows):
        if left[row] > 0:
            left[row] -= 1
        else:
            found.append(number)
    return found


def _sum(known: Estimate | None, change: Estimate | None) -> Estimate | None:
    """Return the new evidence."""
    if known is None or change is None:
        return None
    return known[0] + change[0], math.hypot(known[1], change[1])
