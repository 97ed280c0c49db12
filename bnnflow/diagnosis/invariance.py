"""Draws of a posterior stay draws of it under transitions that leave it as it is; others drift
towards it, and what they predict with them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bnnflow import diagnostics, verdicts
from bnnflow.diagnosis.convergence import predicted_values
from bnnflow.draws import evenly
from bnnflow.inference import refine
from bnnflow.model import BayesianModel
from bnnflow.predictive import predict

__all__ = ["TRANSITIONS", "Drift", "compared", "drift"]

TRANSITIONS = 8
_LEAPFROG = 16  # steps of one at most; their number is uniform from half of it on
_DRAWS = 512  # at most, that are moved
_LEAST = 64  # by which a drift worth a word is told from chance
# Multiplications of all networks evaluated, some seconds on one core: by compiled code, and not.
_WORK = {True: 2e10, False: 4e9}


class Drift(NamedTuple):
    """How transitions that leave the posterior as it is change what independent draws predict, as
    far as chance does not explain it.

    Attributes:
        shift: the largest change of a mean, in standard deviations after it; 0 if there is none.
        spread: the factor furthest from 1 by which a standard deviation changes; 1 if there is
            none.
        p_value: of all means and spreads together.
        draws: how many were moved.
    """

    shift: float
    spread: float
    p_value: float
    draws: int


def drift(model: BayesianModel, theta: Tensor, x: Tensor) -> Drift | None:
    """Move draws ``(n, dim)`` by Hamiltonian transitions, and compare what they predict at some of
    ``x``, and the learned parameters of the likelihood, before and after. None where draws are too
    few, or gradients too dear.

    A change shows that draws are not the posterior's; how far they are from it at least, since so
    few transitions may not arrive. No change says nothing of modes that no draw is in.
    """
    affordable = _WORK[model.is_compiled] / (
        TRANSITIONS * _LEAPFROG * _multiplications(model)
    )
    theta = theta[evenly(len(theta), min(_DRAWS, int(affordable))).to(theta.device)]
    if len(theta) < _LEAST:
        return None
    moved = refine(model, theta, TRANSITIONS, n_leapfrog=_LEAPFROG, seed=0, progress=False)
    if moved.info["interrupted"]:
        raise KeyboardInterrupt
    return compared(*(_quantities(model, each, x) for each in (theta, moved.flat)))


def _multiplications(model: BayesianModel) -> int:
    """Return how many the network takes for all rows of training."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.outputs(model.sample_prior(1, seed=0), model.x[:1])
    return max(1, counter.get_total_flops() // 2) * len(model.x)


def _quantities(model: BayesianModel, theta: Tensor, x: Tensor) -> np.ndarray:
    """Return what draws predict, and logarithms of learned parameters, ``(n, quantity)``."""
    _, values = predicted_values(predict(model, theta, x), (len(theta),))
    learned = model.likelihood_parameters(theta.to(model.device, model.dtype).double())
    rest = [each.flatten(1).log().cpu().numpy() for each in learned.values()]
    return np.concatenate([values.reshape(len(values), -1), *rest], 1)


def compared(before: np.ndarray, after: np.ndarray) -> Drift:
    """Compare quantities ``(n, quantity)`` of the same draws by paired tests of means and of
    squared deviations from a common centre: under a reversible kernel before and after may be
    exchanged, and the differences have a symmetric law.
    """
    centre = (before.mean(0) + after.mean(0)) / 2
    p = np.stack(
        [_paired(before, after), _paired((before - centre) ** 2, (after - centre) ** 2)]
    )
    p = (p * p.size).clip(max=1.0)
    told = p <= verdicts.P_VALUE / 2
    with np.errstate(
        all="ignore"
    ):  # of quantities that overflow or never move nothing is said
        shift = np.abs(after.mean(0) - before.mean(0)) / after.std(0)
        spread = np.log(after.std(0) / before.std(0))
    shift, spread = (
        np.where(which & np.isfinite(size), size, 0.0)
        for which, size in zip(told, (shift, spread), strict=True)
    )
    furthest = spread[np.abs(spread).argmax()]
    return Drift(float(shift.max()), float(np.exp(furthest)), float(p.min()), len(before))


def _paired(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return p-values ``(quantity,)`` of a mean difference; 1 where nothing changes."""
    from scipy.stats import t

    change = after - before
    with np.errstate(all="ignore"):
        worth = len(change) / diagnostics.autocorrelation_time(change[None])
        score = np.abs(change.mean(0)) / (change.std(0, ddof=1) / np.sqrt(worth))
    return np.nan_to_num(2 * t.sf(score, len(change) - 1), nan=1.0)
