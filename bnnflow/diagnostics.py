"""R-hat, effective sample sizes and Pareto smoothing, as ArviZ defines them.

R-hat and effective sizes are those of ArviZ for all quantities at once, in a small part of the
time. Its smoothing is wrapped: ArviZ 0.x is one package that smooths log weights; 1.x is several,
and smooths the weights that belong to log *likelihoods*, the negative of what is given.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
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
_TAILS = (0.05, 0.95)  # quantiles
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

    ``"tail"`` is the smaller one of the 5% and the 95% quantile. NaN for fewer than four draws,
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
    found = _of_quantities(_summary, values, rows=8)
    mean, sd, low, high, worth, bulk, tail, r_hat = found
    origin, scale = _units(values)
    return {
        "mean": origin + scale * mean,
        "sd": scale * sd,
        "5%": origin + scale * low,
        "95%": origin + scale * high,
        "mcse_mean": scale * sd / np.sqrt(worth),
        "ess_bulk": bulk,
        "ess_tail": tail,
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
    with np.errstate(over="ignore"):  # quantiles of a very heavy tail, which are cut off
        if is_datatree():
            from arviz_stats.base import array_stats  # type: ignore[import-not-found]  # of 1.x

            smoothed, khat = array_stats.psislw(-log_weights)
        else:
            smoothed, khat = arviz.psislw(log_weights)
    # ArviZ 1.x finds no law of a tail in which one weight is all
    return np.asarray(smoothed), math.inf if np.isnan(khat) else float(khat)


def psis_of_rows(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smooth each row of ``(n, draws)`` as `psis` does; return them and their k-hats ``(n,)``."""
    smoothed, khats = zip(*map(psis, log_weights), strict=True)
    return np.stack(smoothed), np.array(khats)


# ---------------------------------------- of (quantity, chain, draw)


def _of_quantities(
    diagnostic: Callable[[np.ndarray], np.ndarray],
    values: np.ndarray,
    rows: int | None = None,
) -> np.ndarray:
    """Return a diagnostic of every quantity of ``(chain, draw, ...)``, or ``rows`` of them, NaN
    where a draw is NaN, a block of quantities at a time.
    """
    flat = values.reshape(*values.shape[:2], -1)
    found = np.empty((rows or 1, flat.shape[2]))
    size = max(1, BLOCK // (flat.shape[0] * flat.shape[1]))
    with np.errstate(all="ignore"):
        for start in range(0, flat.shape[2], size):
            block = _standardised(flat[..., start : start + size])
            lost = np.isnan(block).any((1, 2))
            block[lost] = 0.0
            found[:, start : start + size] = np.where(lost, np.nan, diagnostic(block))
    return found.reshape((rows, *values.shape[2:]) if rows else values.shape[2:])


def _units(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the origin and the scale of each quantity of ``(chain, draw, n)``: its first draw, and
    the reach of the others from there.
    """
    origin = values[0, 0].astype(np.float64)
    reach = np.maximum(values.max((0, 1)) - origin, origin - values.min((0, 1)))
    return origin, np.where(reach > 0, reach, 1.0)


def _standardised(values: np.ndarray) -> np.ndarray:
    """Bring each quantity of ``(chain, draw, n)`` to one scale, ``(n, chain, draw)``: a range below
    1e-15 is taken for none.
    """
    origin, scale = (each[:, None, None] for each in _units(values))
    moved = np.array(values.transpose(2, 0, 1), np.float64, order="C")
    moved -= origin
    moved /= scale
    return moved


def _halves(values: np.ndarray) -> np.ndarray:
    """Make two chains of each, without the draw in the middle of an odd number."""
    n, _, draws = values.shape
    even = values if draws % 2 == 0 else np.delete(values, draws // 2, 2)
    return even.reshape(n, -1, draws // 2)


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Return the normal quantiles of ranks among all of ``(chain, draw, ...)`` (Blom 1958)."""
    count = values.shape[0] * values.shape[1]
    return _scores(*_ordered(values.reshape(count, -1).T)).T.reshape(values.shape)


def _ordered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of all draws of each quantity of ``(n, ...)``, and its values in this
    order.
    """
    flat = values.reshape(len(values), -1)
    order = flat.argsort(1)
    return order, np.take_along_axis(flat, order, 1)


def _quantile(ascending: np.ndarray, probability: float) -> np.ndarray:
    """Return a quantile of each sorted row, between two neighbours."""
    place = probability * (ascending.shape[1] - 1)
    low, high = ascending[:, math.floor(place)], ascending[:, math.ceil(place)]
    return low + (high - low) * (place % 1)


def _scores(order: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Return the normal quantiles of ranks in each row ``(rows, n)``; ties share their mean
    rank.
    """
    from scipy.special import ndtri

    n = ascending.shape[1]
    quantiles = ndtri((np.arange(2, 2 * n + 1) / 2 - 0.375) / (n + 0.25))  # by half ranks
    scores = np.empty(order.shape)
    np.put_along_axis(scores, order, quantiles[None, ::2], 1)
    row, place = np.nonzero(ascending[:, 1:] == ascending[:, :-1])  # with the next one
    if len(row) == 0:
        return scores
    begins = np.diff(row * n + place, prepend=-2) != 1
    ends = np.roll(begins, -1)
    shared = quantiles[place[begins] + place[ends] + 1][begins.cumsum() - 1]
    scores[row, order[row, place]] = shared
    scores[row, order[row, place + 1]] = shared
    return scores


def _summary(values: np.ndarray) -> np.ndarray:
    """Return ``(8, n)``: mean, standard deviation, two quantiles, the effective sizes of the mean,
    of ranks and of tails, and R-hat; the latter four NaN for fewer than four draws.
    """
    ranked = _ordered(values)
    edges = [_quantile(ranked[1], each) for each in _TAILS]
    moments = values.mean((1, 2)), values.std((1, 2), ddof=1), *edges
    if values.shape[2] < 4:
        return np.stack([*moments, *np.full((4, len(values)), np.nan)])
    halves = _halves(values)
    ranked = ranked if halves.size == values.size else _ordered(halves)
    scores = _scores(*ranked).reshape(halves.shape)
    sizes = _ess_of_means(halves), _ess_of_means(scores), _ess_of_tails(values, edges)
    return np.stack([*moments, *sizes, _worse_rhat(scores, *ranked)])


def _rhat(values: np.ndarray) -> np.ndarray:
    halves = _halves(values)
    ranked = _ordered(halves)
    return _worse_rhat(_scores(*ranked).reshape(halves.shape), *ranked)


def _worse_rhat(scores: np.ndarray, order: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Return R-hat of the normal scores of halves, or of those of distances from the median if
    worse.
    """
    middle = ascending.shape[1] // 2  # of an even number
    median = ascending[:, middle - 1 : middle + 1].mean(1, keepdims=True)
    distances = np.abs(ascending - median)
    merged = distances.argsort(1, kind="stable")  # fast: they fall, then rise
    folded = _scores(*(np.take_along_axis(each, merged, 1) for each in (order, distances)))
    bulk, tail = _ratio(scores), _ratio(folded.reshape(scores.shape))
    return np.where(tail > bulk, tail, bulk)


def _ratio(chains: np.ndarray) -> np.ndarray:
    """Return the root of the variance of all draws over that within chains."""
    draws = chains.shape[2]
    between = draws * chains.mean(2).var(1, ddof=1)
    return np.sqrt((between / chains.var(2, ddof=1).mean(1) + draws - 1) / draws)


def _ess_of_tails(values: np.ndarray, edges: Sequence[np.ndarray]) -> np.ndarray:
    """Return the smaller effective size of the tails below two edges ``(n,)``."""
    below = [_halves((values <= edge[:, None, None]).astype(float)) for edge in edges]
    return np.minimum(*map(_ess_of_means, below))


def _ess_of_means(chains: np.ndarray) -> np.ndarray:
    """Return how many independent draws would have means as sharp; all where nothing varies."""
    _, count, draws = chains.shape
    means, covariance = chains.mean(2), _covariance(chains)
    within = covariance[:, :1] * draws / (draws - 1)
    between = means.var(1, ddof=1, keepdims=True) if count > 1 else 0.0
    correlations = 1 - (within - covariance) / (covariance[:, :1] + between)
    total = count * draws
    found = total / np.maximum(_times(correlations), 1 / math.log10(total))
    return np.where(np.ptp(chains, (1, 2)) < 1e-15, total, found)


def _covariance(chains: np.ndarray) -> np.ndarray:
    """Return the autocovariance by lag, the mean over chains, ``(quantity, draw)``."""
    from scipy import fft

    draws = chains.shape[2]
    size = fft.next_fast_len(2 * draws, real=True)
    waves: Any = fft.rfft(chains - chains.mean(2, keepdims=True), size)
    power = (waves.real**2 + waves.imag**2).mean(1)
    covariance: Any = fft.irfft(power, size)
    return covariance[:, :draws] / draws


def _times_within(chains: np.ndarray) -> np.ndarray:
    covariance = _covariance(chains)
    first = covariance[:, :1]
    return np.maximum(1.0, _times(covariance / np.where(first > 0, first, 1.0)))


def _times(correlations: np.ndarray) -> np.ndarray:
    """Return integrated autocorrelation times of ``(quantity, lag)`` by the initial positive and
    monotone sequence of sums of neighbours (Geyer 1992).

    The pair that ends the sequence counts as ArviZ has it: its first member once, if that or the
    sum is positive.
    """
    n = max(1, (correlations.shape[1] - 1) // 2)
    pairs = correlations[:, : 2 * n].reshape(-1, n, 2).copy()
    pairs[:, 0, 0] = 1.0
    sums = pairs.sum(2)
    ended = ~(sums > 0)
    ended[:, -1] = True
    last = ended.argmax(1)[:, None]
    before = np.arange(n) < last
    summed = np.where(before, np.minimum.accumulate(sums, 1), 0.0).sum(1, keepdims=True)
    even = np.take_along_axis(pairs[..., 0], last, 1)
    counts = (even > 0) | (np.take_along_axis(sums, last, 1) >= 0)
    return (2 * summed - 1 + np.where(counts, even, 0.0))[:, 0]


def _bulk(values: np.ndarray) -> np.ndarray:
    halves = _halves(values)
    return _ess_of_means(_scores(*_ordered(halves)).reshape(halves.shape))


def _tail(values: np.ndarray) -> np.ndarray:
    _, ascending = _ordered(values)
    return _ess_of_tails(values, [_quantile(ascending, each) for each in _TAILS])


_ESS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bulk": _bulk,
    "tail": _tail,
    "mean": lambda values: _ess_of_means(_halves(values)),
}
