"""A learned prior beside the plain one: their mixture, whose weights the data infer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bnnflow import verdicts
from bnnflow.arguments import Fraction, checked
from bnnflow.draws import Draws
from bnnflow.inference import SMC, sample
from bnnflow.model import BayesianModel
from bnnflow.model.transported import HasPushforward
from bnnflow.predictive import Stacked, predict, prior_p_value, stacked
from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = ["Family", "PriorMixture", "mix_priors"]

Family = Literal["like", "unlike", "undecided"]

_PARTICLES = SMC(particles=256, moves=2, max_leapfrog=16)
_RUNS = 2


@dataclass(frozen=True, eq=False, repr=False)
class PriorMixture:
    """A posterior under the mixture of a learned prior and a plain one, made by `mix_priors`.

    Printing it says what to make of it.

    Attributes:
        models: of the data under the learned prior, and under the plain one.
        draws: of both posteriors.
        share: of the learned prior in the mixture, before any data.
        p_value: how often data sets that the learned prior draws are as unlikely as these, see
            `bnnflow.predictive.prior_p_value`; None if the likelihood cannot draw.
    """

    models: tuple[BayesianModel, BayesianModel]
    draws: tuple[Draws, Draws]
    share: float
    p_value: float | None

    @property
    def log_bayes_factor(self) -> tuple[float, float]:
        """Log evidence of the learned prior over that of the plain one, and its standard error."""
        (ours, error), (theirs, other) = map(_evidence, self.draws)
        return ours - theirs, math.hypot(error, other)

    @property
    def probability(self) -> float:
        """Of the learned prior, given the data."""
        odds = math.log(self.share) - math.log1p(-self.share) + self.log_bayes_factor[0]
        return float(torch.sigmoid(torch.tensor(odds, dtype=torch.float64)))

    @property
    def log_evidence(self) -> tuple[float, float]:
        """Of the mixture, and its standard error."""
        (ours, error), (theirs, other) = map(_evidence, self.draws)
        p = self.probability
        value = np.logaddexp(math.log(self.share) + ours, math.log1p(-self.share) + theirs)
        return float(value), math.hypot(p * error, (1 - p) * other)

    @property
    def family(self) -> Family:
        """Whether the task is like those that the prior was learned from.

        It is unlike them if the p-value is .01 or less, or the plain prior's evidence three nats
        above the learned one's; undecided if the standard error of the Bayes factor exceeds a nat.
        """
        factor, error = self.log_bayes_factor
        surprising = self.p_value is not None and self.p_value <= verdicts.PRIOR_P_VALUE
        if surprising or factor < -max(verdicts.UNLIKE, 2 * error):
            return "unlike"
        return "undecided" if error > verdicts.EVIDENCE else "like"

    def predict(self, x: Tensor | np.ndarray | None = None) -> Stacked:
        """Return the prediction of the mixture.

        Args:
            x: inputs ``(n, ...)``; those of training if None.
        """
        pairs = zip(self.models, self.draws, strict=True)
        parts = [predict(model, draws, x) for model, draws in pairs]
        p = self.probability
        return stacked(parts, torch.tensor([p, 1 - p]))

    def __repr__(self) -> str:
        """Say in one line how much of the posterior is whose."""
        return f"PriorMixture(learned: {self.probability:.3g}, {self.family})"

    def __str__(self) -> str:
        """Say what the data make of both priors."""
        factor, error = self.log_bayes_factor
        told = {
            "like": "The task is like those that the prior was learned from.",
            "unlike": "The task is not like those that the prior was learned from.",
            "undecided": "The evidences are too uncertain to tell: take more particles.",
        }
        lines = [
            told[self.family],
            f"  - learned prior: {self.share:.0%} before the data, {self.probability:.0%} after",
            f"  - log evidence over the plain prior's: {factor:+.2f} (standard error {error:.2f})",
        ]
        if self.p_value is not None:
            lines.append(
                f"  - of data sets that it draws {self.p_value:.1%} are as unlikely"
            )
        return "\n".join(lines)


@checked
def mix_priors(
    model: BayesianModel,
    prior: HasPushforward,
    share: Fraction = 0.5,
    *,
    draws: tuple[Draws, Draws] | None = None,
    smc: SMC | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> PriorMixture:
    """Protect a task from a prior that was learned from other ones: mix it with the model's own.

    The posterior under a mixture of two priors is the mixture of both posteriors, weighted by their
    evidences (the robust mixture priors of Schmidli et al. 2014). A learned prior whose functions
    pass near the rows by chance can still have the larger evidence and predict worse: what the
    mixture loses to the plain prior alone falls with ``share``.

    Args:
        model: with the plain prior.
        prior: a `bnnflow.Flow` or a map distilled of one, see `BayesianModel.transported`.
        share: of the learned prior in the mixture, before any data.
        draws: of the posterior under the learned prior, and under the plain one, with their
            ``log_evidence``; sampled by ``smc`` if None.
        smc: ``SMC(particles=256, moves=2, max_leapfrog=16)`` if None. Two runs of each.
        seed: an int or a generator.
        progress: show bars at a terminal.

    Raises:
        ValueError: before any work, if the prior is none of the model's weights, the model's
            temperature is not 1, or draws are of other models or have no ``log_evidence``.

    Example:
        >>> from bnnflow import BayesianModel, fit_prior, likelihoods, priors
        >>> from bnnflow.options import Training
        >>> tasks = []
        >>> for shift in (0.0, 0.5):
        ...     layers = torch.nn.Linear(1, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)
        ...     given = priors.Normal(), likelihoods.Gaussian(0.3)
        ...     x = torch.linspace(-1, 1, 8)[:, None]
        ...     net = torch.nn.Sequential(*layers)
        ...     tasks.append(BayesianModel(net, *given, x, torch.sin(2 * x + shift)))
        >>> prior = fit_prior(tasks, training=Training(steps=2), progress=False)
        >>> few = SMC(particles=64, moves=1, max_leapfrog=4)
        >>> mixed = mix_priors(tasks[0].subset(slice(0, 3)), prior, smc=few, progress=False)
        >>> mixed.predict(x).mean.shape
        torch.Size([8])
    """
    if model.temperature != 1:
        raise ValueError(f"model must have temperature 1, got {model.temperature}")
    learned = model.transported(prior)
    models = learned, model
    generator = as_generator(seed, model.device)
    if draws is None:
        given = {"chains": _RUNS, "seed": generator, "progress": progress}
        ours, theirs = (sample(each, smc or _PARTICLES, **given) for each in models)
        if ours.info.get("interrupted") or theirs.info.get("interrupted"):
            raise KeyboardInterrupt
        draws = ours, theirs
    else:
        for number, (each, own) in enumerate(zip(models, draws, strict=True)):
            if own.log_evidence is None:
                raise ValueError(
                    f"draws[{number}] have no log_evidence: sample them by SMC"
                )
            each.spec.check(own.theta, f"draws[{number}]")
            each.check_draws(own)
    p_value = prior_p_value(learned, seed=generator) if model.likelihood.can_draw else None
    return PriorMixture(models, draws, share, p_value)


def _evidence(draws: Draws) -> tuple[float, float]:
    assert draws.log_evidence is not None
    value, error = draws.log_evidence
    return float(value), float(error)
