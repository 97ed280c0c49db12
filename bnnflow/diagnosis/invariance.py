"""Draws of a posterior stay draws of it under transitions that leave it as it is; others drift
towards it, and what they predict with them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bnnflow.diagnosis.chains import Disagreement, disagreement
from bnnflow.diagnosis.convergence import predicted_values
from bnnflow.draws import evenly
from bnnflow.inference import refine
from bnnflow.model import BayesianModel
from bnnflow.predictive import predict

__all__ = ["drift"]

_TRANSITIONS = 8
_LEAPFROG = 16  # steps of one at most; their number is uniform from half of it on
_DRAWS = 512  # at most, that are moved
_LEAST = 64  # by which a drift worth a word is told from chance
# Multiplications of all networks evaluated, some seconds on one core: by compiled code, by torch,
# and by torch in the large matrices of a learned prior's map.
_COMPILED, _PLAIN, _MAPPED = 2e10, 4e9, 4e10


def drift(model: BayesianModel, theta: Tensor, x: Tensor) -> Disagreement | None:
    """Move draws ``(n, dim)`` by Hamiltonian transitions, and compare what they predict at some of
    ``x``, and the learned parameters of the likelihood, before and after, like two chains. None
    where draws are too few, or gradients too dear.

    A change shows that draws are not the posterior's, and how far they are from it at least, since
    so few transitions may not arrive. No change says nothing of modes that no draw is in.
    """
    work = _COMPILED if model.is_compiled else _PLAIN
    work = _MAPPED if model.is_transported else work
    affordable = work / (_TRANSITIONS * _LEAPFROG * _multiplications(model))
    theta = theta[evenly(len(theta), min(_DRAWS, int(affordable))).to(theta.device)]
    if len(theta) < _LEAST:
        return None
    moved = refine(model, theta, _TRANSITIONS, n_leapfrog=_LEAPFROG, seed=0, progress=False)
    if moved.info["interrupted"]:
        raise KeyboardInterrupt
    both = [_quantities(model, each, x) for each in (theta, moved.flat)]
    return disagreement(np.stack(both))


def _multiplications(model: BayesianModel) -> int:
    """Return how many a network takes for all rows of training; a learned prior's map takes as many
    whatever the number of rows.
    """
    theta = model.sample_prior(1, seed=0)

    def of(rows: Tensor) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.outputs(theta, rows)
        return counter.get_total_flops() // 2

    row = model.x[:1]
    one, two = of(row), of(torch.cat([row, row]))
    return max(1, one + (two - one) * (len(model.x) - 1))


def _quantities(model: BayesianModel, theta: Tensor, x: Tensor) -> np.ndarray:
    """Return what draws predict, and logarithms of learned parameters, ``(n, quantity)``."""
    _, values = predicted_values(predict(model, theta, x), (len(theta),))
    learned = model.likelihood_parameters(theta.to(model.device, model.dtype).double())
    rest = [each.flatten(1).log().cpu().numpy() for each in learned.values()]
    return np.concatenate([values.reshape(len(values), -1), *rest], 1)
