"""Weights of models, from the log densities that they give to rows which they have not seen."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bnnflow.arguments import checked, finite
from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = ["pseudo_bma", "stacking"]

_RESAMPLES = 1000  # of the Bayesian bootstrap


@checked
def stacking(log_densities: Tensor) -> Tensor:
    """Return the weights with which the mixture of the models has the best log score.

    They maximise sum_i log sum_k w_k p_k(y_i), which is concave, over weights that are not negative
    and sum to one (Yao, Vehtari, Simpson & Gelman 2018).

    Args:
        log_densities: of each row under each model that has not seen it, ``(n, models)``.

    Returns:
        ``(models,)``, float64.

    Raises:
        ValueError: if they are not ``(n, models)``, or one is NaN or infinite.
    """
    from scipy.optimize import minimize

    values = _checked(log_densities)
    densities = (values - values.amax(1, keepdim=True)).exp().numpy()
    count = densities.shape[1]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixture = densities @ weights
        return -np.log(mixture).mean(), -(densities / mixture[:, None]).mean(0)

    found = minimize(
        loss,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    weights = torch.from_numpy(found.x).clamp(min=0)
    return weights / weights.sum()


@checked
def pseudo_bma(log_densities: Tensor, *, seed: Seed = 0) -> Tensor:
    """Return weights in proportion to exp(elpd), averaged over what another data set might have
    been: pseudo-BMA+ with the Bayesian bootstrap (Yao et al. 2018).

    Args:
        log_densities: of each row under each model that has not seen it, ``(n, models)``.
        seed: of the bootstrap.

    Returns:
        ``(models,)``, float64.

    Raises:
        ValueError: if they are not ``(n, models)``, or one is NaN or infinite.
    """
    values = _checked(log_densities)
    generator = as_generator(seed, values.device)
    shares = torch.empty(_RESAMPLES, len(values), dtype=torch.float64)
    shares.exponential_(generator=generator)
    shares /= shares.sum(1, keepdim=True)
    return (len(values) * shares @ values).softmax(1).mean(0)


def _checked(log_densities: Tensor) -> Tensor:
    if log_densities.dim() != 2 or 0 in log_densities.shape:
        raise ValueError(
            f"log_densities must be (n, models), got {tuple(log_densities.shape)}"
        )
    return finite("log_densities", log_densities.detach().cpu().double())
