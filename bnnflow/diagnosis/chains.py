"""Do chains agree? A test that knows how many quantities it looks at, and how long chains are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bnnflow import diagnostics

__all__ = ["Disagreement", "disagreement"]

# draws by which the spread of an autocorrelation time is that of a variance of as many
_DRAWS_OF_A_TIME = 10


class Disagreement(NamedTuple):
    """How far chains are apart, and whether chance explains it.

    Attributes:
        p_value: of all quantities together: small where chance does not explain it.
        shift: the largest distance of one chain from the others, in location or width, in standard
            deviations, of the quantity that chance explains least.
    """

    p_value: float
    shift: float


def disagreement(values: np.ndarray) -> Disagreement:
    """Test whether chains ``(chain, draw, quantity)`` have the same law, and have it from start to
    end.

    R-hat compares chains too, but what it is by chance depends on the number of draws, of chains
    and of quantities of which the worst is taken. Here the means of normal scores, and of those of
    the distance from the median, are compared between chains and between halves of chains by F
    tests, each with the chains' own autocorrelation time; the smallest p-value counts as the best
    of as many as there are independent quantities (by the eigenvalues of their correlations, Galwey
    2009).
    """
    with np.errstate(all="ignore"):  # of quantities that overflow nothing is said
        spread = values.std((0, 1))
    moving = (spread > 0) & np.isfinite(spread)
    values = values[..., moving]
    if values.shape[-1] == 0 or values.shape[1] < 4:
        return Disagreement(1.0, 0.0)
    folded = np.abs(values - np.median(values, (0, 1)))
    scores = [diagnostics.normal_scores(each) for each in (values, folded)]
    p = np.stack([p for each in scores for p in _tests(each)])  # (4, quantity)
    count = _independent(scores[0])
    worst = int(p.min(0).argmin())
    shift = max(_shift(each[..., worst]) for each in scores)
    return Disagreement(float(min(1.0, len(p) * count * p.min())), shift)


def _shift(scores: np.ndarray) -> float:
    """Return the largest distance of the mean of a chain from that of others; of one chain, that
    of its halves.
    """
    parts = scores if len(scores) > 1 else np.array_split(scores[0], 2)
    means = np.array([part.mean() for part in parts])
    others = (means.sum() - means) / (len(means) - 1)
    return float(np.abs(means - others).max() / scores.std())


def _tests(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return p-values of the difference between chains, and between the halves of chains."""
    from scipy.stats import f

    chains, draws, _ = scores.shape
    time = diagnostics.autocorrelation_time(scores)
    variance = scores.var(1, ddof=1).mean(0) * time / draws  # of a chain's mean
    variance = np.maximum(variance, 1e-12)
    freedom = np.maximum(4.0, chains * draws / time / _DRAWS_OF_A_TIME)
    half = draws // 2
    drift = scores[:, :half].mean(1) - scores[:, half:].mean(1)
    of_halves = f.sf((drift**2).mean(0) / (4 * variance), chains, freedom)
    if chains == 1:
        return np.ones_like(of_halves), of_halves
    between = scores.mean(1).var(0, ddof=1) / variance
    return f.sf(between, chains - 1, freedom), of_halves


def _independent(scores: np.ndarray) -> float:
    """Return the effective number of independent quantities."""
    pooled = scores.reshape(-1, scores.shape[-1])
    if pooled.shape[1] == 1:
        return 1.0
    with np.errstate(all="ignore"):
        correlations = np.nan_to_num(np.corrcoef(pooled.T))
    values = np.linalg.eigvalsh(correlations).clip(min=0)
    return float(np.sqrt(values).sum() ** 2 / values.sum())
