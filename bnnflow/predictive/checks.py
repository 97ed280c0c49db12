"""Whether targets look like what was predicted of them: predictive checks by whole sets of targets
that the prediction itself draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnnflow.arguments import Count, checked
from bnnflow.draws import evenly
from bnnflow.model import BayesianModel
from bnnflow.predictive.average import Prediction, predict
from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = [
    "LEVELS",
    "PredictiveCheck",
    "Statistics",
    "calibration_check",
    "predictive_check",
    "prior_p_value",
]

LEVELS = (0.5, 0.9, 0.95)  # of the intervals whose coverage is looked at
_ROWS = 500  # at most, evenly spaced: what more would cost is worth little
_PRIOR_ROWS = 50  # the same of a prior predictive, whose draws soon miss all rows of many

Statistics = Callable[[Prediction, Tensor, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of targets beside those of targets that the prediction itself has drawn.

    Attributes:
        found: the statistics of y, by name.
        expected: their means over the sets drawn.
        low: the 2.5% points of each.
        high: the 97.5% points.
        p_values: of each, two-sided.
        p_value: of all together: below .05 for one of twenty predictions that are right.
        rows: how many rows were looked at.
    """

    found: dict[str, float]
    expected: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    p_values: dict[str, float]
    p_value: float
    rows: int


@checked
def calibration_check(
    prediction: Prediction,
    y: Tensor | np.ndarray,
    *,
    replicates: Count = 199,
    seed: Seed = 0,
) -> PredictiveCheck:
    """Test whether targets that were not fitted look like what was predicted of them.

    For numbers the statistics are the coverage of central intervals, the mean of the probability
    integral transform (PIT) and its largest distance from the uniform law (Kolmogorov-Smirnov); for
    classes the mean log probability, and how much more often rows are right than they say, of all
    rows and of those less and more sure than most.

    Args:
        prediction: of rows that were not fitted.
        y: their targets, ``(n,)`` or ``(n, targets)``, or labels ``(n,)``.
        replicates: sets of targets drawn; ``1 / (replicates + 1)`` is the smallest p-value.
        seed: an int or a generator.

    Raises:
        ValueError: if y does not fit, or the likelihood has no ``sample`` or ``cdf``.
    """
    look = _of_labels if prediction.kind == "classification" else _of_numbers
    return predictive_check(prediction, y, look, replicates=replicates, seed=seed)


@checked
def predictive_check(
    prediction: Prediction,
    y: Tensor | np.ndarray,
    statistics: Statistics,
    *,
    replicates: Count = 199,
    seed: Seed = 0,
) -> PredictiveCheck:
    """Compare statistics of targets with those of targets that the prediction draws.

    Rows of one data set are not independent under a posterior: where the weights are uncertain,
    many rows miss together. So y is compared with whole sets of targets, each drawn with weights of
    its own. Of rows that were not fitted, y is one more of them if the draws are the posterior's
    and the model is right: the p-values are exact whatever the number of rows. Of rows of training
    they are conservative (Gelman, Meng & Stern 1996). The statistic that lies farthest out, in
    standard deviations, has its own law among the replicates, which makes one p-value of all.

    Args:
        prediction: of the rows; of at most 500 of them, evenly spaced.
        y: their targets, ``(n,)`` or ``(n, targets)``, or labels ``(n,)``.
        statistics: of a prediction, sets of targets ``(sets, n, ...)`` and a generator: named
            tensors ``(sets,)``.
        replicates: sets of targets drawn.
        seed: an int or a generator.

    Raises:
        ValueError: if y does not fit, or the likelihood has no ``sample``.
    """
    y = prediction.targets(y)
    rows = evenly(len(y), _ROWS)
    prediction = prediction.subset(rows)
    y = y[rows.to(y.device)]
    generator = as_generator(seed, prediction.model.device)
    drawn = prediction.sample(replicates, generator)
    together = torch.cat([y[None].to(drawn), drawn])  # (1 + replicates, n, ...)
    named = statistics(prediction, together, generator)
    values = torch.stack(list(named.values()), 1).double().cpu()  # (sets, statistics)
    # the farthest statistic of a set, in standard deviations over all sets
    far = (values - values.mean(0)).abs() / values.std(0).clamp(min=1e-300)
    farthest = far.amax(1)
    ends = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)

    def by_name(row: Tensor) -> dict[str, float]:
        return dict(zip(named, row.tolist(), strict=True))

    return PredictiveCheck(
        by_name(values[0]),
        by_name(values[1:].mean(0)),
        by_name(ends[0]),
        by_name(ends[1]),
        by_name(_two_sided(values)),
        float((farthest >= farthest[0]).double().mean()),
        len(rows),
    )


@checked
def prior_p_value(
    model: BayesianModel, *, draws: Count = 8192, replicates: Count = 499, seed: Seed = 0
) -> float:
    """Return how often data sets that a model draws from its prior are as unlikely as its own.

    The statistic is the evidence, p(y), of 50 rows at most (Box 1980), by the mean likelihood of
    draws of the prior. All data sets are seen by the same draws, which made none of them, so that
    the p-value holds however few of these fit a data set: it is .01 or less for one in a hundred
    that are of the prior.

    Args:
        model: with its data.
        draws: of the prior, by which the evidence is estimated.
        replicates: data sets drawn; ``1 / (replicates + 1)`` is the smallest p-value.
        seed: an int or a generator.

    Raises:
        ValueError: if the likelihood has no ``sample``.
    """
    generator = as_generator(seed, model.device)
    rows = model.some_rows(_PRIOR_ROWS)
    x, y = model.x[rows], model.y[rows]
    makers = model.sample_prior(replicates, generator)
    drawn = predict(model, makers, x).sample(replicates, generator)
    theta = model.sample_prior(draws, generator)
    with torch.no_grad():
        outputs, parameters = model.outputs(theta, x), model.likelihood_parameters(theta)

    def log_evidence(y: Tensor) -> Tensor:
        pointwise = model.likelihood.log_prob(outputs, y, parameters)
        return pointwise.sum(1).double().logsumexp(0)

    own = log_evidence(y)
    sets = drawn.to(y).reshape(replicates, *y.shape)
    others = torch.stack([log_evidence(each) for each in sets])
    return (1 + int((others <= own).sum())) / (1 + replicates)


def _two_sided(values: Tensor) -> Tensor:
    """Return the p-value of the first set ``(sets, statistics)`` among all of them."""
    above = (values >= values[0]).double().mean(0)
    below = (values <= values[0]).double().mean(0)
    return (2 * torch.minimum(above, below)).clamp(max=1)


def _of_numbers(
    prediction: Prediction, y: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return statistics of the probability integral transforms of sets ``(sets, n, ...)``."""
    u = prediction.transforms(y, generator).flatten(1)
    ranked = u.sort(1).values
    steps = torch.arange(u.shape[1] + 1, dtype=u.dtype, device=u.device) / u.shape[1]
    distance = torch.maximum((steps[1:] - ranked).amax(1), (ranked - steps[:-1]).amax(1))
    covered = {
        f"inside {level:.0%}": ((u - 0.5).abs() <= level / 2).double().mean(1)
        for level in LEVELS
    }
    return covered | {"mean PIT": u.mean(1), "KS distance": distance}


def _of_labels(
    prediction: Prediction, y: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return statistics of the probabilities of sets of labels ``(sets, n)``."""
    probs = prediction.probs
    log_prob = probs.log().expand(len(y), *probs.shape).gather(2, y.long()[..., None])
    confidence, label = probs.max(1)
    gap = (y == label).double() - confidence  # (sets, n)
    sure = confidence > confidence.median()
    found = {"log probability": log_prob.squeeze(2).mean(1), "right beyond it": gap.mean(1)}
    if bool(sure.any()):
        found["right beyond it, less sure"] = gap[:, ~sure].mean(1)
        found["right beyond it, more sure"] = gap[:, sure].mean(1)
    return found
