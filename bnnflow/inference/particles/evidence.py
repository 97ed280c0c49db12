"""The evidence of draws of the posterior, by annealing them back to the prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnnflow.arguments import checked
from bnnflow.bridge import bennett
from bnnflow.draws import Draws, as_theta, outliers, unresolved
from bnnflow.inference.particles.paths import Backwards
from bnnflow.inference.particles.smc import SMC
from bnnflow.inference.particles.tempering import Particles, Tempering, systematic
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.ranks import ALONE
from bnnflow.seeding import as_generator
from bnnflow.types import Seed
from bnnflow.warn import warn

__all__ = ["evidence"]

_APART = 0.1  # share of draws that may be left out
_FAILED = 0.1  # of the particles: a step that leaves fewer effective has failed


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
    tempering = smc.tempering(Backwards(smc.path(model)), ALONE, generator, generator)
    state = _at_the_posterior(tempering, smc.particles, theta)
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
            state = tempering.advance(before, bar)
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


def _at_the_posterior(tempering: Tempering, particles: int, theta: Tensor) -> Particles:
    """Take as many draws as there are particles, evenly, without those that lie far below."""
    n = min(particles, len(theta))
    rows = torch.linspace(0, len(theta) - 1, n).round().long().to(theta.device)
    state = tempering.first(theta[rows].unsqueeze(0))
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
        state = tempering.first(theta[rows].unsqueeze(0))
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
