"""What draws of a posterior must satisfy, whoever drew them: their log joint is the model's, they
are no copies of one another, and Stein's identity holds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow import diagnostics
from bnnflow.draws import evenly
from bnnflow.model import BayesianModel

__all__ = [
    "Copies",
    "Stein",
    "copies",
    "log_joint_and_grad",
    "some",
    "stein",
    "wrong_log_joint",
]

_DRAWS = 512  # at most, whose gradients are computed
_LEAST = 64
_FEWEST = 20  # draws, below which nothing is said
_WORK = 4e6  # rows times draws
_COLUMNS = 256  # by which equal rows are told
_COORDINATES = 1000


def some(theta: Tensor, rows: int) -> Tensor:
    """Return numbers ``(k,)`` of draws of every chain of ``(chain, draw, dim)``, evenly spaced: as
    many as their gradients on so many rows are worth.
    """
    most = min(_DRAWS, max(_LEAST, int(_WORK / rows)))
    return evenly(theta.shape[1], max(1, most // len(theta)))


def log_joint_and_grad(model: BayesianModel, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64 for weights ``(chain, k, dim)``, on the CPU."""
    flat = theta.flatten(0, 1).to(model.device, model.dtype)
    pairs = [model.log_joint_and_grad(part) for part in flat.split(64)]
    values, grads = (torch.cat(each).double().cpu() for each in zip(*pairs, strict=True))
    return values.unflatten(0, theta.shape[:2]), grads.unflatten(0, theta.shape[:2])


def wrong_log_joint(stored: Tensor, computed: Tensor, dtype: torch.dtype) -> float:
    """Return the median distance of stored log joint densities from those computed again, in nats;
    0 where rounding explains it.
    """
    stored = stored.double().cpu()
    known = stored.isfinite() & computed.isfinite()
    if not bool(known.any()):
        return 0.0
    gap = (stored - computed).abs()[known]
    rounding = 10 * torch.finfo(dtype).eps ** 0.5 * (1 + computed.abs()[known])
    return float(gap.median()) if bool(gap.median() > rounding.median()) else 0.0


class Stein(NamedTuple):
    """How far draws are from satisfying Stein's identity, E[f'(z) + f(z) grad log p(z)] = 0.

    Attributes:
        temperature: by f = z, averaged over weights: 1 where the spread of draws is right, below
            where they are too narrow.
        temperature_error: its standard error.
        slope: by f = 1, of the worst weight: the mean gradient in its own standard deviations; 0
            where draws are in the right place.
        slope_p_value: of the worst of so many weights.
    """

    temperature: float
    temperature_error: float
    slope: float
    slope_p_value: float


def stein(theta: Tensor, chosen: Tensor, grads: Tensor) -> Stein | None:
    """Look at Stein's identity (Stein 1972) with draws ``(chain, draw, dim)`` and the gradients of
    those chosen, ``(chain, k, dim)``; None where nothing moves.

    Every chain is standardised by itself: the identity holds in each mode that a chain has
    explored, and chains in symmetric copies of one mode are as good as one.
    """
    from scipy.stats import norm

    theta = theta.double().cpu()
    if grads.shape[0] * grads.shape[1] < _FEWEST:
        return None
    axes = 1 if theta.shape[1] >= _FEWEST else (0, 1)  # many short chains are pooled
    mean, sd = theta.mean(axes, keepdim=True), theta.std(axes, keepdim=True)
    if not bool((sd > 0).any()):
        return None
    z = ((theta[:, chosen] - mean) / sd).nan_to_num(0.0, 0.0, 0.0)
    h = (grads * sd).nan_to_num(0.0, 0.0, 0.0)
    moving = (sd > 0).expand_as(h).double().sum(-1).clamp(min=1)
    each = (-(z * h).sum(-1) / moving).numpy()  # (chain, k)
    h = h[..., evenly(h.shape[-1], _COORDINATES)].numpy()
    with np.errstate(all="ignore"):  # of gradients that overflow nothing is said
        error = each.std() * np.sqrt(_worth_of(each[..., None])[0])
        spread = h.std((0, 1))
        slope = h.mean((0, 1)) / np.where(spread > 0, spread, 1.0)
        p = 2 * norm.sf(np.abs(slope) / np.sqrt(_worth_of(h))) * len(slope)
    if not (np.isfinite(error) and np.isfinite(p).all()):
        return None
    worst = int(p.argmin())
    return Stein(
        float(each.mean()), float(error), float(abs(slope[worst])), float(min(1.0, p.min()))
    )


def _worth_of(values: np.ndarray) -> np.ndarray:
    """Return one over the effective number of draws of ``(chain, draw, quantity)``."""
    return diagnostics.autocorrelation_time(values) / (values.shape[0] * values.shape[1])


class Copies(NamedTuple):
    """Shares of draws that equal another one.

    Attributes:
        across: of another chain.
        again: of their own chain, not the one right before.
        repeated: the one right before, as after a rejected proposal.
    """

    across: float
    again: float
    repeated: float


def copies(theta: Tensor) -> Copies:
    """Count equal rows of ``(chain, draw, dim)``."""
    chains, draws, dim = theta.shape
    rows = theta[..., evenly(dim, _COLUMNS)].cpu().numpy().reshape(chains * draws, -1) + 0.0
    _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(chains, draws)
    owner = (first // draws)[which]
    across = owner != np.arange(chains)[:, None]
    repeated = which[:, 1:] == which[:, :-1]
    again = draws - repeated.sum(1) - np.array([len(np.unique(each)) for each in which])
    return Copies(
        float(across.mean()),
        float(again.sum() / which.size),
        float(repeated.mean()) if draws > 1 else 0.0,
    )
