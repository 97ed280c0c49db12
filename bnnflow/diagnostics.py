"""R-hat, effective sample sizes and Pareto smoothing, as ArviZ defines them.

R-hat and effective sizes are those of ArviZ for all quantities at once, in a small part of the
time. Its smoothing is wrapped: ArviZ 0.x is one package that smooths log weights; 1.x is several,
and smooths the weights that belong to log *likelihoods*, the negative of what is given.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import numpy as np

__all__ = [
    "autocorrelation_time",
    "ess",
    "import_arviz",
    "is_datatree",
    "normal_scores",
    "psis",
    "psis_of_rows",
    "rhat",
    "summarised",
]


def import_arviz() -> ModuleType:
    """Import ArviZ without the announcement that it makes on import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def is_datatree() -> bool:
    """Say whether ArviZ keeps its groups in an xarray ``DataTree``, as it does from 1.0 on."""
    return hasattr(import_arviz(), "convert_to_datatree")


BLOCK = 2**18  # numbers that are worked on at once
_SHORTEST_TAIL = 5  # values that a Pareto law is fitted to


def rhat(values: np.ndarray) -> np.ndarray:
    """Return the rank-normalised split R-hat of ``(chain, draw, ...)``, ``(...)`` (Vehtari et al.
    2021).

    NaN for fewer than two chains or four draws, for quantities that never change, and where one of
    them is NaN.
    """
    if len(values) < 2 or values.shape[1] < 4:
        return np.full(values.shape[2:], np.nan)
    return _of_quantities(_rhat, values)


def ess(values: np.ndarray, method: Literal["bulk", "tail", "mean"]) -> np.ndarray:
    """Return the effective sample size of ``(chain, draw, ...)``, ``(...)``, all chains together.

    ``"tail"`` is the smaller one of the 5 % and the 95 % quantile. NaN for fewer than four draws,
    and where one of them is NaN.
    """
    if values.shape[1] < 4:
        return np.full(values.shape[2:], np.nan)
    return _of_quantities(_ESS[method], values)


def autocorrelation_time(values: np.ndarray) -> np.ndarray:
    """Return how many draws of ``(chain, draw, ...)`` are worth one, ``(...)``, each chain beside
    its own mean: chains that disagree do not make it longer. At least 1.
    """
    return _of_quantities(_times_within, values)


def summarised(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a summary of quantities ``(chain, draw, n)``, ``(n,)`` each."""
    low, high = np.quantile(values, (0.05, 0.95), (0, 1))
    sd = values.std((0, 1), ddof=1, dtype=np.float64)
    r_hat, bulk = np.full((2, values.shape[2]), np.nan)
    if values.shape[1] >= 4:  # from the same ranks
        r_hat, bulk = _of_quantities(_rhat_and_bulk, values, rows=2)
    return {
        "mean": values.mean((0, 1), dtype=np.float64),
        "sd": sd,
        "5%": low,
        "95%": high,
        "mcse_mean": sd / np.sqrt(ess(values, "mean")),
        "ess_bulk": bulk,
        "ess_tail": ess(values, "tail"),
        "r_hat": r_hat if len(values) > 1 else np.full_like(r_hat, np.nan),
    }


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Smooth the largest of the log weights ``(n,)`` by a generalised Pareto law (Vehtari et al.
    2024).

    Returns:
        The smoothed log weights, normalised to sum to one, and the law's shape, k-hat: infinite
        where the tail is too short to fit, or holds one value only.
    """
    ascending = np.sort(log_weights)
    tail = math.ceil(min(0.2 * len(ascending), 3 * math.sqrt(len(ascending))))
    if tail < _SHORTEST_TAIL or ascending[-tail] == ascending[-1]:
        return log_weights - np.logaddexp.reduce(log_weights), math.inf
    arviz = import_arviz()
    if is_datatree():
        from arviz_stats.base import array_stats  # type: ignore[import-not-found]  # of 1.x

        smoothed, khat = array_stats.psislw(-log_weights)
    else:
        smoothed, khat = arviz.psislw(log_weights)
    return np.asarray(smoothed), float(khat)


def psis_of_rows(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smooth each row of ``(n, draws)`` as `psis` does; return them and their k-hats ``(n,)``."""
    smoothed, khats = zip(*map(psis, log_weights), strict=True)
    return np.stack(smoothed), np.array(khats)


# ---------------------------------------- of (chain, draw, quantity)


def _of_quantities(
    diagnostic: Callable[[np.ndarray], np.ndarray],
    values: np.ndarray,
    rows: int | None = None,
) -> np.ndarray:
    """Return a diagnostic of every quantity, or ``rows`` of them, NaN where a draw is NaN, a block
    of quantities at a time.
    """
    flat = values.reshape(*values.shape[:2], -1)
    found = np.empty((rows or 1, flat.shape[2]))
    size = max(1, BLOCK // (flat.shape[0] * flat.shape[1]))
    with np.errstate(all="ignore"):
        for start in range(0, flat.shape[2], size):
            block = _standardised(flat[..., start : start + size])
            lost = np.isnan(block).any((0, 1))
            found[:, start : start + size] = np.where(
                lost, np.nan, diagnostic(np.where(lost, 0.0, block))
            )
    return found.reshape((rows, *values.shape[2:]) if rows else values.shape[2:])


def _standardised(values: np.ndarray) -> np.ndarray:
    """Bring every quantity to one scale: a range below 1e-15 is taken for none."""
    offset = values.astype(np.float64) - values[:1, :1]
    reach = np.abs(offset).max((0, 1), keepdims=True, initial=0.0)
    return offset / np.where(reach > 0, reach, 1.0)


def _halves(values: np.ndarray) -> np.ndarray:
    """Make two chains of each, without the draw in the middle of an odd number."""
    half = values.shape[1] // 2
    return np.concatenate([values[:, :half], values[:, -half:]])


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Return the normal quantiles of ranks among all of ``(chain, draw, ...)`` (Blom 1958)."""
    from scipy.special import ndtri

    count = values.shape[0] * values.shape[1]
    flat = np.ascontiguousarray(values.reshape(count, -1).T)
    scores = ndtri((_ranks(flat) - 0.375) / (flat.shape[1] + 0.25))
    return scores.T.reshape(values.shape)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks, from 1, within each row of ``(rows, n)``; ties share their mean rank."""
    order = values.argsort(1)
    ascending = np.take_along_axis(values, order, 1)
    places = np.broadcast_to(np.arange(1.0, values.shape[1] + 1), values.shape).copy()
    new = ascending[:, 1:] != ascending[:, :-1]
    tied = ~new.all(1)
    places[tied] = _shared(new[tied])
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, places, 1)
    return ranks


def _shared(new: np.ndarray) -> np.ndarray:
    """Return the mean places of sorted values, given which differ from the one before
    ``(rows, n - 1)``.
    """
    rows, n = len(new), new.shape[1] + 1
    edge, places = np.ones((rows, 1), bool), np.arange(1.0, n + 1)
    first = np.where(np.hstack([edge, new]), places, 0.0)
    last = np.where(np.hstack([new, edge]), places, n)
    first = np.maximum.accumulate(first, 1)
    last = np.minimum.accumulate(last[:, ::-1], 1)[:, ::-1]
    return (first + last) / 2


def _rhat(values: np.ndarray) -> np.ndarray:
    return _worse_rhat(_halves(values), normal_scores(_halves(values)))


def _rhat_and_bulk(values: np.ndarray) -> np.ndarray:
    halves = _halves(values)
    scores = normal_scores(halves)
    return np.stack([_worse_rhat(halves, scores), _ess_of_means(scores)])


def _worse_rhat(halves: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return R-hat of the normal scores, or of those of distances from the median if worse."""
    bulk = _ratio(scores)
    tail = _ratio(normal_scores(np.abs(halves - np.median(halves, (0, 1)))))
    return np.where(tail > bulk, tail, bulk)


def _ratio(chains: np.ndarray) -> np.ndarray:
    """Return the root of the variance of all draws over that within chains."""
    draws = chains.shape[1]
    between = draws * chains.mean(1).var(0, ddof=1)
    return np.sqrt((between / chains.var(1, ddof=1).mean(0) + draws - 1) / draws)


def _ess_of_tails(values: np.ndarray) -> np.ndarray:
    quantiles = np.quantile(values, (0.05, 0.95), (0, 1))
    return np.minimum(
        *(_ess_of_means(_halves((values <= each).astype(float))) for each in quantiles)
    )


def _ess_of_means(chains: np.ndarray) -> np.ndarray:
    """Return how many independent draws would have means as sharp; all where nothing varies."""
    count, draws, _ = chains.shape
    means, covariance = chains.mean(1), _covariance(chains)
    within = covariance[0] * draws / (draws - 1)
    variance = covariance[0] + (means.var(0, ddof=1) if count > 1 else 0.0)
    correlations = 1 - (within - covariance) / variance
    total = count * draws
    times = np.array([_time(each) for each in correlations.T.tolist()])
    found = total / np.maximum(times, 1 / math.log10(total))
    return np.where(np.ptp(chains, (0, 1)) < 1e-15, total, found)


def _covariance(chains: np.ndarray) -> np.ndarray:
    """Return the autocovariance by lag, the mean over chains, ``(draw, quantity)``."""
    from scipy import fft

    draws = chains.shape[1]
    size = fft.next_fast_len(2 * draws, real=True)
    waves: Any = fft.rfft(chains - chains.mean(1, keepdims=True), size, axis=1)
    power = (waves.real**2 + waves.imag**2).mean(0)
    return fft.irfft(power, size, axis=0)[:draws] / draws


def _times_within(chains: np.ndarray) -> np.ndarray:
    covariance = _covariance(chains)
    correlations = covariance / np.where(covariance[0] > 0, covariance[0], 1.0)
    return np.maximum(1.0, [_time(each) for each in correlations.T.tolist()])


def _time(correlations: list[float]) -> float:
    """Return the integrated autocorrelation time by the initial positive and monotone sequence of
    sums of neighbours (Geyer 1992).
    """
    even, odd = 1.0, correlations[1]
    kept = [even, odd]
    while len(kept) < len(correlations) - 2 and even + odd > 0:
        even, odd = correlations[len(kept)], correlations[len(kept) + 1]
        kept += [even, odd] if even + odd >= 0 else [0.0, 0.0]
    last = len(kept) - 2  # its pair is not summed
    if even > 0:
        kept[last] = even
    for i in range(2, last, 2):
        before = kept[i - 2] + kept[i - 1]
        if kept[i] + kept[i + 1] > before:
            kept[i] = kept[i + 1] = before / 2
    return -1 + 2 * sum(kept[:last]) + kept[last]


_ESS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bulk": lambda values: _ess_of_means(normal_scores(_halves(values))),
    "tail": _ess_of_tails,
    "mean": lambda values: _ess_of_means(_halves(values)),
}
