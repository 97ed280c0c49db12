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
# Multiplications of all networks evaluated, some seconds on one core: by compiled code, and not.
_WORK = {True: 2e10, False: 4e9}


def drift(model: BayesianModel, theta: Tensor, x: Tensor) -> Disagreement | None:
    """Move draws ``(n, dim)`` by Hamiltonian transitions, and compare what they predict at some of
    ``x``, and the learned parameters of the likelihood, before and after, like two chains. None
    where draws are too few, or gradients too dear.

    A change shows that draws are not the posterior's, and how far they are from it at least, since
    so few transitions may not arrive. No change says nothing of modes that no draw is in.
    """
    affordable = _WORK[model.is_compiled] / (
        _TRANSITIONS * _LEAPFROG * _multiplications(model)
    )
    theta = theta[evenly(len(theta), min(_DRAWS, int(affordable))).to(theta.device)]
    if len(theta) < _LEAST:
        return None
    moved = refine(model, theta, _TRANSITIONS, n_leapfrog=_LEAPFROG, seed=0, progress=False)
    if moved.info["interrupted"]:
        raise KeyboardInterrupt
    both = [_quantities(model, each, x) for each in (theta, moved.flat)]
    return disagreement(np.stack(both))


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
