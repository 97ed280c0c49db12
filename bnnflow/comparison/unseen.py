"""Log predictive densities of rows that a posterior has not seen: leave-one-out by importance
weights or by draws without the row, and K-fold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnnflow.bridge import bennett
from bnnflow.draws import Draws, counted_alike, refuse_approximation
from bnnflow.importance import psis
from bnnflow.inference import update
from bnnflow.inference.particles.update import FEWEST
from bnnflow.model import BayesianModel
from bnnflow.predictive import predict
from bnnflow.progress import progress_bar
from bnnflow.verdicts import KHAT

__all__ = ["Unseen", "folds_of", "k_fold", "leave_one_out"]

_ELEMENTS = 2**22  # log densities that are held at once


@dataclass(frozen=True, eq=False)
class Unseen:
    """How well every row is predicted by the rest.

    Attributes:
        elpd: log predictive density of each row under the posterior of others, ``(n,)``.
        lpd: the same under the posterior of all rows, ``(n,)``; None where that is not known.
        khat: Pareto shapes of the importance weights, ``(n,)``; None without weights.
        refitted: rows whose density comes from draws without them, ``(m,)``.
    """

    elpd: Tensor
    lpd: Tensor | None = None
    khat: Tensor | None = None
    refitted: Tensor | None = None


# ---------------------------------------- leave one out


def leave_one_out(
    name: str, model: BayesianModel, draws: Draws, refits: int, seed: int, progress: bool
) -> Unseen:
    """Weigh draws as if a row had not been seen, each row in turn (Vehtari, Gelman & Gabry 2017).

    Draws of an approximation of known density are weighed as such (Magnusson et al. 2019). Where
    k-hat exceeds 0.7, draws are moved to the posterior without the row, and both sets together give
    its density (Bennett 1976); so for the ``refits`` rows of largest k-hat.
    """
    log_weights = _log_weights(name, model, draws)
    n = len(model.x)
    elpd, lpd = (torch.empty(n, dtype=torch.float64) for _ in range(2))
    khat = torch.empty(n, dtype=torch.float64)
    size = max(1, _ELEMENTS // len(draws.flat))
    for rows in torch.arange(n).split(size):
        values = _log_likelihoods(model, draws.flat, rows)  # (draws, rows)
        powers = model.powers_of(rows.to(model.device)).tolist()
        lpd[rows] = (log_weights[:, None] + values).logsumexp(0)
        for row, column, power in zip(rows.tolist(), values.T, powers, strict=True):
            elpd[row], khat[row] = _weighed(log_weights, column, power)
    failed = (khat > KHAT).nonzero().squeeze(1)
    if len(draws.flat) < FEWEST:
        failed = failed[:0]
    failed = failed[khat[failed].argsort(descending=True, stable=True)][:refits]
    with progress_bar(len(failed), f"{name}: without a row", progress, "row") as bar:
        for row in failed.tolist():
            elpd[row] = _without(model, draws, log_weights, row, seed)
            bar.update()
    return Unseen(elpd, lpd, khat, failed.sort().values)


def _weighed(
    log_weights: Tensor, log_likelihood: Tensor, power: float
) -> tuple[float, float]:
    """Return the log predictive density of a row by smoothed weights, and their k-hat.

    The posterior holds its likelihood to this power.
    """
    raw = log_weights - power * log_likelihood
    if bool((raw == math.inf).any()):  # a draw for which the row is impossible
        return -math.inf, math.inf
    smoothed, khat = psis(raw)
    return float((smoothed + log_likelihood).logsumexp(0)), khat


def _without(
    model: BayesianModel, draws: Draws, log_weights: Tensor, row: int, seed: int
) -> float:
    """Return the log predictive density of a row from draws with it and draws without it."""
    rest = torch.arange(len(model.x)) != row
    part = model.subset(rest.nonzero().squeeze(1).to(model.device))
    weighed = _weighed_draws(draws, log_weights)
    moved = _alike(update(part, weighed, model, seed=seed, progress=False))
    at = torch.tensor([row])
    seen = _log_likelihoods(model, draws.flat, at).squeeze(1)
    unseen = _log_likelihoods(model, moved, at).squeeze(1)
    weights = log_weights.exp()
    # each set counts as many draws as it is worth
    shift = math.log(len(unseen) * float(weights.square().sum()))
    power = float(model.powers_of(at.to(model.device)))
    ratios = power * unseen, power * seen
    normaliser, _, _ = bennett(*ratios, weights, -torch.tensor(shift, dtype=torch.float64))
    # of the posterior without the row over the mixture of both sets
    both = torch.cat([unseen, seen])
    share = torch.cat(
        [torch.full_like(unseen, -math.log(len(unseen))), log_weights - shift]
    )
    density = share - torch.logaddexp(
        torch.zeros_like(both), power * both - normaliser - shift
    )
    return float((density + both).logsumexp(0) - density.logsumexp(0))


def _log_weights(name: str, model: BayesianModel, draws: Draws) -> Tensor:
    """Return log weights ``(draws,)``, normalised, that make draws those of the posterior.

    Raises:
        ValueError: for draws that no weights bring there.
    """
    count = len(draws.flat)
    if draws.log_weights is not None:
        weights = draws.log_weights.flatten().double().cpu()
    elif draws.posterior is not None:
        weights = _importance(name, model, draws)
    else:
        refuse_approximation(draws, f"{name}: draws", ", or give folds and refit")
        weights = torch.zeros(count, dtype=torch.float64)
    return weights - weights.logsumexp(0)


def _weighed_draws(draws: Draws, log_weights: Tensor) -> Draws:
    """Return draws of an approximation with the weights that make them the posterior's, and others
    as they are.
    """
    if draws.posterior is None or draws.log_weights is not None:
        return draws
    return replace(draws, log_weights=log_weights.reshape(draws.theta.shape[:2]))


def _importance(name: str, model: BayesianModel, draws: Draws) -> Tensor:
    assert draws.posterior is not None
    with torch.no_grad():
        log_joint = model.log_joint(draws.flat.to(model.device, model.dtype)).double()
        density = draws.posterior.log_prob(draws.flat).double()
    smoothed, khat = psis(log_joint.cpu() - density.cpu())
    if not khat <= KHAT:
        raise ValueError(
            f"{name}: the approximation is too far from the posterior to be weighed (k-hat "
            f"{khat:.1f}): move its draws there by bf.refine first, or give folds and refit"
        )
    return smoothed


# ---------------------------------------- folds


def folds_of(n: int, folds: int, seed: int) -> tuple[Tensor, ...]:
    """Part rows at random into folds of equal size, but for one row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator).tensor_split(folds)


def k_fold(
    name: str,
    model: BayesianModel,
    draws: Draws,
    folds: Sequence[Tensor],
    refit: Callable[[BayesianModel], Draws] | None,
    seed: int,
    progress: bool,
) -> Unseen:
    """Predict each fold from the rest: by draws of ``refit``, else by these draws moved there."""
    if refit is None:
        if len(draws.flat) < FEWEST:
            raise ValueError(f"{name}: folds need at least {FEWEST} draws, or a refit")
        draws = _weighed_draws(draws, _log_weights(name, model, draws))
    elpd = torch.empty(len(model.x), dtype=torch.float64)
    with progress_bar(len(folds), f"{name}: folds", progress, "fold") as bar:
        for rows in folds:
            rest = torch.ones(len(model.x), dtype=torch.bool)
            rest[rows] = False
            part = model.subset(rest.nonzero().squeeze(1).to(model.device))
            fitted = (
                update(part, draws, model, seed=seed, progress=False)
                if refit is None
                else _refitted(name, refit, part)
            )
            at = rows.to(model.device)
            elpd[rows] = predict(part, fitted, model.x[at]).log_prob(model.y[at]).cpu()
            bar.update()
    return Unseen(elpd)


def _refitted(
    name: str, refit: Callable[[BayesianModel], Draws], part: BayesianModel
) -> Draws:
    draws = refit(part)
    if not isinstance(draws, Draws):
        raise TypeError(f"refit of {name} must return Draws, got {type(draws).__name__}")
    part.check_draws(draws)
    return replace(draws, calibration=None)


# ---------------------------------------- both


def _alike(draws: Draws) -> Tensor:
    """Return draws ``(n, dim)`` that count alike."""
    if draws.log_weights is None:
        return draws.flat
    return draws.flat[counted_alike(draws.log_weights).to(draws.flat.device)]


def _log_likelihoods(model: BayesianModel, theta: Tensor, rows: Tensor) -> Tensor:
    """Return ``(draws, rows)``, float64."""
    at = rows.to(model.device)
    theta = theta.to(model.device, model.dtype)
    with torch.no_grad():
        values = model.pointwise_log_likelihood(theta, model.x[at], model.y[at])
    return values.double().cpu()
