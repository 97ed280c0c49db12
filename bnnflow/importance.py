"""Importance weights: smoothed, judged, and their mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnnflow import diagnostics

__all__ = ["SAME", "Estimate", "khat_limit", "kish_ess", "log_mean", "psis"]

Estimate = tuple[float, float]
"""A log evidence and its standard error."""

SAME = 1e-9  # nats of rounding: log densities have no unit


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    """Smooth the largest weights by a generalised Pareto law and return its shape (Vehtari et al.
    2024).

    The shape, k-hat, says how many moments the weights have: none but those below 1 / k.

    Args:
        log_weights: ``(n,)``; minus infinity is a weight of zero.

    Returns:
        The smoothed log weights, normalised to sum to one, and k-hat: infinite where the tail is
        too short to fit, zero where all weights are equal.
    """
    kept = log_weights > -math.inf
    values = log_weights[kept].double()
    if not len(values):
        return torch.full_like(log_weights, -math.inf), math.inf
    khat = 0.0
    if float(values.max() - values.min()) > SAME:
        fitted, khat = diagnostics.psis(values.cpu().numpy())
        values = torch.from_numpy(fitted).to(values)
    result = torch.full_like(log_weights, -math.inf, dtype=torch.float64)
    result[kept] = values - values.logsumexp(0)
    return result, khat


def khat_limit(n: int) -> float:
    """Return the k-hat up to which averages over ``n`` smoothed weights can be relied on (Vehtari
    et al. 2024).
    """
    return min(1 - 1 / math.log10(n), 0.7)


def kish_ess(log_weights: Tensor) -> float:
    """Return Kish's effective number of draws, the squared sum of the weights over the sum of their
    squares.
    """
    if not bool((log_weights > -math.inf).any()):
        return 0.0
    return float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp())


def log_mean(log_weights: Tensor, *strata: int) -> Estimate:
    """Return the log of the mean weight, with the standard error that the delta method gives.

    The mean of raw weights is an unbiased estimate of the evidence, whatever the number of draws.
    The mean of smoothed ones is not, though it varies less.

    Args:
        log_weights: ``(n,)``.
        strata: numbers of draws that belong to each part of a stratified sample, in order; one part
            if not given.
    """
    value = float(log_weights.logsumexp(0)) - math.log(len(log_weights))
    if value == -math.inf:
        return value, math.inf
    relative = (log_weights - value).exp()  # mean 1
    variance = sum(
        float(part.var()) * len(part)
        for part in relative.split(list(strata) or [len(relative)])
    )
    return value, math.sqrt(variance) / len(relative)
