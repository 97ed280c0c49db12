"""Scores of a prediction. Each takes ``(prediction, y)`` and is a mean over rows.

Lower case, no synonyms.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bnnflow.arguments import Count, Fraction, checked
from bnnflow.predictive.average import Prediction
from bnnflow.types import Seed

__all__ = [
    "Reliability",
    "accuracy",
    "brier",
    "coverage",
    "crps",
    "ece",
    "lppd",
    "pit",
    "reliability",
    "rmse",
    "rowwise",
]

_NODES = 8  # Gauss-Legendre nodes of a panel
# of the sum over counts, in standard deviations: the rest is below 1e-4 of them, by Cantelli
_SPREAD = 15.0
_MAX_NUMBERS = 2**14  # terms of that sum
_NUMBERS_AT_ONCE = 64
_REACH = 5.0  # of the integral, in asinh of standard deviations: sinh(5) = 74


class Reliability(NamedTuple):
    """Rows binned by the probability of the predicted class.

    ``(bins,)`` each, NaN means of empty bins.
    """

    confidence: Tensor  # mean probability of the predicted class
    accuracy: Tensor  # fraction of rows predicted right
    rows: Tensor  # how many rows fell into the bin
    edges: Tensor  # (bins + 1,)


@checked
def accuracy(prediction: Prediction, y: Tensor | np.ndarray) -> float:
    """Return the fraction of rows whose most probable class is the label."""
    return float(_correct(prediction, y).mean())


@checked
def rmse(prediction: Prediction, y: Tensor | np.ndarray) -> float:
    """Return the root mean squared error of the predictive mean, over rows and targets."""
    return float(_squared_error(prediction, y).mean().sqrt())


@checked
def lppd(prediction: Prediction, y: Tensor | np.ndarray) -> float:
    """Return the log pointwise predictive density: the mean over rows of the mixture's log density,
    in nats.
    """
    return float(prediction.log_prob(y).mean())


@checked
def brier(prediction: Prediction, y: Tensor | np.ndarray) -> float:
    """Return the Brier score: squared error of the probabilities summed over classes, mean over
    rows; 0 to 2.
    """
    return float(_brier(prediction, y).mean())


@checked
def crps(prediction: Prediction, y: Tensor | np.ndarray) -> float:
    """Return the continuous ranked probability score, mean over rows and targets, in units of y.

    CRPS = integral of (F(z) - 1{z >= y})^2 dz, with F the cdf of the predictive mixture, by
    Gauss-Legendre panels on both sides of y (in asinh of standard deviations, so that tails are
    cheap). The error is below 1e-4 standard deviations as long as the mixture is smooth on a scale
    of a tenth of its standard deviation, or has few draws: the panels grow finer as draws get
    fewer. For counts the integral is a sum over whole numbers, the ranked probability score, exact
    but for tails beyond 15 standard deviations.

    Raises:
        ValueError: for classes, if y does not fit, or for counts that spread over more than 16,000
            numbers.
    """
    return float(_crps(prediction, y).mean())


@checked
def pit(prediction: Prediction, y: Tensor | np.ndarray, *, seed: Seed = 0) -> Tensor:
    """Return the probability integral transform, the mixture's cdf at y.

    Uniform if the prediction is calibrated.

    The cdf of counts jumps at y: there the transform is uniform between the values before and after
    the jump, which keeps it uniform under calibration (Czado, Gneiting & Held 2009). Nothing else
    is random.

    Args:
        prediction: for regression.
        y: ``(n,)`` or ``(n, targets)``.
        seed: for counts.

    Returns:
        ``(n,)`` or ``(n, targets)``.
    """
    return prediction.transforms(prediction.targets(y)[None], seed)[0]


@checked
def coverage(prediction: Prediction, y: Tensor | np.ndarray, level: Fraction) -> float:
    """Return the fraction of targets inside the central predictive interval of probability
    ``level``.

    A target is inside if its probability integral transform is within level / 2 of a half, so no
    quantile is needed. For counts the interval includes its ends, `Prediction.interval`, and a
    calibrated prediction covers at least ``level``.

    Raises:
        ValueError: for classes, or a level outside (0, 1).
    """
    after = prediction.cdf(prediction.targets(y))
    if not prediction.discrete:
        return float(((after - 0.5).abs() <= level / 2).double().mean())
    before = _cdf_before(prediction, y)
    return float(((after >= (1 - level) / 2) & (before < (1 + level) / 2)).double().mean())


@checked
def reliability(
    prediction: Prediction, y: Tensor | np.ndarray, bins: Count = 15
) -> Reliability:
    """Bin rows by the probability of the predicted class, in bins of equal width from 0 to 1, both
    ends included.

    Raises:
        ValueError: for regression, or if y does not fit.
    """
    correct = _correct(prediction, y)
    confidence = prediction.probs.max(-1).values
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=count.device)

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(index, weights=values, minlength=bins) / count

    return Reliability(mean(confidence), mean(correct), count, edges)


@checked
def ece(prediction: Prediction, y: Tensor | np.ndarray, bins: Count = 15) -> float:
    """Return the expected calibration error of the predicted class (Guo et al. 2017).

    The mean gap between confidence and accuracy over the bins of `reliability`, weighted by their
    rows.
    """
    binned = reliability(prediction, y, bins)
    gaps = (binned.confidence - binned.accuracy).abs().nan_to_num(0.0)
    return float((gaps * binned.rows).sum() / binned.rows.sum())


@checked
def rowwise(prediction: Prediction, y: Tensor | np.ndarray) -> dict[str, Tensor]:
    """Return what the metrics average, ``(n,)`` each, for standard errors and paired comparisons.

    Returns:
        ``log_prob`` always; ``correct`` and ``brier`` for classes; for regression
        ``squared_error``, and ``crps`` where the likelihood has intervals, means over targets.
    """
    scores = {"log_prob": prediction.log_prob(y)}
    if prediction.kind == "classification":
        return scores | {"correct": _correct(prediction, y), "brier": _brier(prediction, y)}
    several = {"squared_error": _squared_error(prediction, y)}
    if prediction.has_intervals:
        several["crps"] = _crps(prediction, y)
    return scores | {
        name: values.reshape(len(prediction), -1).mean(-1)
        for name, values in several.items()
    }


def _correct(prediction: Prediction, y: Tensor | np.ndarray) -> Tensor:
    return (prediction.probs.argmax(-1) == prediction.targets(y)).double()


def _brier(prediction: Prediction, y: Tensor | np.ndarray) -> Tensor:
    probs = prediction.probs
    return (probs - F.one_hot(prediction.targets(y), probs.shape[-1])).square().sum(-1)


def _squared_error(prediction: Prediction, y: Tensor | np.ndarray) -> Tensor:
    if prediction.kind != "regression":
        raise ValueError(
            "the squared error is defined for regression; for classes use brier"
        )
    return (prediction.mean - prediction.targets(y)).square()


def _crps(prediction: Prediction, y: Tensor | np.ndarray) -> Tensor:
    if prediction.kind != "regression":
        raise ValueError("the CRPS is defined for regression; for classes use brier")
    y = prediction.targets(y)
    flat = y.reshape(len(prediction), -1)  # (n, targets)
    if prediction.discrete:
        return _ranked_probability(prediction, flat).reshape(y.shape)
    mean, sd = prediction.mean.reshape(flat.shape), prediction.sd.reshape(flat.shape)
    at_y = ((flat - mean) / sd).asinh()
    panels = min(512, max(6, 2**14 // len(prediction.theta)))
    nodes, weights = _panels(panels)
    nodes, weights = (
        torch.from_numpy(values).to(flat).reshape(-1, 1, 1) for values in (nodes, weights)
    )
    total = torch.zeros_like(flat)
    # y itself may lie beyond
    below, above = (at_y.clamp(max=-_REACH), at_y), (at_y, at_y.clamp(min=_REACH))
    for start, stop in (below, above):
        u = start + (stop - start) * nodes  # (nodes, n, targets)
        cdf = prediction._cdf(mean + sd * u.sinh())
        integrand = (cdf if stop is at_y else 1 - cdf).square() * sd * u.cosh()
        total += (integrand * weights).sum(0) * (stop - start)
    return total.reshape(y.shape)


def _ranked_probability(prediction: Prediction, y: Tensor) -> Tensor:
    """Return the sum of (F(k) - 1{k >= y})^2 over the whole numbers k, ``(n, targets)`` in and
    out.
    """
    mean, sd = prediction.mean.reshape(y.shape), prediction.sd.reshape(y.shape)
    first = (mean - _SPREAD * sd).floor().clamp(min=0)
    last = (mean + _SPREAD * sd).ceil()
    numbers = int((last - first).max()) + 1
    if numbers > _MAX_NUMBERS:
        raise ValueError(
            f"the CRPS of counts sums over {numbers} numbers here, more than {_MAX_NUMBERS}"
        )
    # Beyond the window the cdf is 0 or 1, and every number between the window and y costs one.
    total = (first - y).clamp(min=0) + (y - last - 1).clamp(min=0)
    for start in range(0, numbers, _NUMBERS_AT_ONCE):
        offsets = torch.arange(
            start, min(start + _NUMBERS_AT_ONCE, numbers), device=y.device
        ).reshape(-1, 1, 1)
        k = first + offsets  # (numbers, n, targets)
        terms = (prediction._cdf(k) - (k >= y).to(y)).square()
        total = total + torch.where(k <= last, terms, 0.0).sum(0)
    return total


def _cdf_before(prediction: Prediction, y: Tensor | np.ndarray) -> Tensor:
    """Return P(target < y) for counts, in the shape of the mean."""
    return prediction._squeeze(prediction._cdf(prediction._targets(y)[None] - 1)[0])


def _panels(panels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of the composite Gauss-Legendre rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    starts = np.arange(panels)[:, None]
    return ((starts + (nodes + 1) / 2) / panels).ravel(), np.tile(
        weights / (2 * panels), panels
    )
