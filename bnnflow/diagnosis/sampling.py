"""Are these draws of the posterior, and how many are they worth?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnflow import verdicts
from bnnflow.diagnosis.answers import Answer, Finding, Grade
from bnnflow.diagnosis.chains import Disagreement, disagreement
from bnnflow.diagnosis.convergence import compare_chains, predicted_values
from bnnflow.diagnosis.identities import (
    Stein,
    copies,
    log_joint_and_grad,
    some,
    stein,
    wrong_log_joint,
)
from bnnflow.diagnosis.invariance import drift
from bnnflow.draws import Draws, counted_alike, evenly, unresolved
from bnnflow.model import BayesianModel
from bnnflow.predictive import Prediction
from bnnflow.verdicts import Bounds

__all__ = ["HINTS", "QUESTION", "Sampling"]

QUESTION = "Are these draws of the posterior?"

# What a reader of an approximation's draws should know of it.
HINTS = {
    "Laplace": "draws of a wide Gaussian predict poorly through the network itself: predict with "
    "model.linearised(draws.posterior.loc) too, which is often better",
    "MCDropout": "the rate sets the width of the predictions, whatever the data",
}
_FEW = 0.05  # of the predictions, which may have fewer effective draws than are wanted
_LONGER = (
    "run a longer warm-up and more draws, or start from a trained network or an ensemble"
)
_MORE = "take more particles, or draw more"
_MOVE_ON = "move them on with bnnflow.refine(model, draws), or take an exact sampler"


@dataclass
class Sampling:
    """The look at draws: what was found, and the numbers that were computed on the way."""

    model: BayesianModel
    draws: Draws
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    rows: np.ndarray | None = None
    values: np.ndarray | None = None  # (chain, draw, rows, outputs)
    r_hat: np.ndarray | None = None
    ess_bulk: np.ndarray | None = None
    ess_tail: np.ndarray | None = None
    off_in_spread: bool = False  # was said of the configurational temperature

    def say(self, grade: Grade, why: str, next: str = "") -> None:
        """Note a finding."""
        self.findings.append(Finding(grade, why, next))

    def above(self, value: float, bounds: Bounds, why: str, next: str) -> None:
        """Note a finding if a value exceeds the bounds; NaN does."""
        if not value <= bounds.good:
            self.say("with care" if value <= bounds.bad else "no", why, next)

    def answer(self, good: str) -> Answer:
        """Add the findings up."""
        return Answer.of(QUESTION, self.findings, good, self.figures)

    # ---------------------------------------- of any draws

    def identities(self, log_weights: Tensor | None) -> Stein | None:
        """Look at what draws of a posterior satisfy, whoever drew them."""
        theta = self.draws.theta
        self._resolution(theta)
        if log_weights is not None:
            theta = equal(theta.flatten(0, 1), log_weights, theta.shape[:2].numel())[None]
        chosen = some(theta, len(self.model.x))
        computed, grads = log_joint_and_grad(self.model, theta[:, chosen])
        lost = int((~computed.isfinite()).sum())
        if lost:
            why = f"{lost} of {computed.numel()} draws looked at have no finite log joint"
            self.say("no", why, "leave them out, or find out where they come from")
            return None
        if log_weights is None:
            gap = wrong_log_joint(self.draws.log_joint[:, chosen], computed, theta.dtype)
            if gap > 0:
                self.say(
                    "no",
                    f"the stored log joint is not this model's: they are {gap:.3g} nats apart",
                    "these are draws of another model or data set, or were changed since; draw "
                    "again, or give the model that they are of",
                )
        found = stein(theta, chosen, grads)
        if found is not None:
            self._stein(found)
        return found

    def _resolution(self, theta: Tensor) -> None:
        flat = theta.flatten(0, 1)
        if len(flat) < 2:
            return
        count, kind = int(unresolved(flat).sum()), str(flat.dtype).removeprefix("torch.")
        if count:
            self.say(
                "no",
                f"draws of {count} of {flat.shape[1]} weights are closer than {kind} tells apart, "
                "or never move",
                "standardise the data, take a float64 network",
            )

    def _stein(self, found: Stein) -> None:
        self.figures |= {"temperature": found.temperature, "slope": found.slope}
        off = abs(found.temperature - 1)
        if off > 4 * found.temperature_error:
            narrow = found.temperature < 1
            why = (
                f"draws are too {'narrow' if narrow else 'spread'}: their configurational "
                f"temperature is {found.temperature:.2f} and should be 1"
            )
            what = self._advice(
                "chains may still be near where they began; run longer"
                if narrow
                else "take a smaller step size, or less noisy gradients"
            )
            bounds = self._allowed(verdicts.SPREAD)
            self.off_in_spread = off > bounds.good
            self.above(off, bounds, why, what)
        if found.slope_p_value <= verdicts.P_VALUE / 2:
            why = (
                "the log joint still rises where the draws are (mean gradient "
                f"{found.slope:.2f} of its standard deviation)"
            )
            bounds = self._allowed(verdicts.SLOPE)
            self.above(found.slope, bounds, why, self._advice(_LONGER))

    def _advice(self, to_chains: str) -> str:
        """Return what to do about draws that are in the wrong place: nobody can run an
        approximation longer.
        """
        if self.draws.log_weights is not None:
            return _MORE
        return to_chains if self.draws.stats else _MOVE_ON

    def _allowed(self, bounds: Bounds) -> Bounds:
        """An approximation is not told off for what it is, but for what is no approximation."""
        return bounds if self.draws.stats else Bounds(2 * bounds.bad, 4 * bounds.bad)

    def invariance(self, theta: Tensor, x: Tensor) -> bool:
        """Look at what transitions that leave the posterior as it is do to independent draws
        ``(n, dim)``, and say whether they were seen to leave them alone.
        """
        found = drift(self.model, theta, x)
        if found is None:
            return False
        self.figures["drift"] = found.shift
        if found.p_value > verdicts.P_VALUE / 2:
            return True
        why = (
            "transitions that leave the posterior as it is take what these draws predict "
            f"{found.shift:.2g} standard deviations away, in place or in width"
        )
        self.above(found.shift, verdicts.MOVED, why, _MOVE_ON)
        return False

    def again(self) -> None:
        """Look for draws that are copies of others."""
        found = copies(self.draws.theta)
        self.figures |= found._asdict()
        if self.draws.info.get("method") == "MCDropout":
            return  # few units have few masks
        advice = "draw again: a file was read or written twice, or seeds were the same"
        # where levels exchange states, one may go and come back
        later = 0.0 if "exchange_rate" in self.draws.stats else found.again
        for share, where in ((found.across, "in another chain"), (later, "later on")):
            if share > 0:
                why = f"{share:.0%} of the draws come again {where}"
                grave = share > verdicts.COPIED and bool(self.draws.stats)
                self.say("no" if grave else "with care", why, advice)
        rejected = 1 - self.mean("acceptance_rate", 0.98)
        if found.repeated > 2 * rejected + 0.05 and found.repeated < 1:
            why = (
                f"{found.repeated:.0%} of the draws repeat the one before, of which rejected "
                f"proposals explain {rejected:.0%}"
            )
            self.say("no" if found.repeated > 0.4 else "with care", why, advice)

    def mean(self, name: str, default: float) -> float:
        """Return the mean of what the sampler recorded."""
        stats = self.draws.stats
        return float(stats[name].double().mean()) if name in stats else default

    # ---------------------------------------- of chains

    def compare(self, prediction: Prediction) -> None:
        """Compare chains in what they predict, and in the log densities of prior and posterior."""
        draws = self.draws
        if draws.n_draws < 4:
            self.say(
                "no",
                "there are fewer than 4 draws a chain: nothing can be said",
                "draw more",
            )
            return
        shape = draws.n_chains, draws.n_draws
        self.rows, self.values = predicted_values(prediction, shape)
        self.r_hat, self.ess_bulk, self.ess_tail = compare_chains(self.values)
        if not bool((self.values != self.values[:1, :1]).any()):
            self.say("no", "no chain ever moved", "reduce the step size")
            return
        densities = self._densities()
        flat = self.values.reshape(*self.values.shape[:2], -1)
        of_functions = disagreement(flat)
        of_densities = disagreement(densities)
        self.figures |= {
            "r_hat": float(self.r_hat.max()),
            "shift": of_functions.shift,
            "p_value": of_functions.p_value,
        }
        self._disagreement(of_functions, of_densities)
        self._worth()

    def _densities(self) -> np.ndarray:
        """Return log prior and log joint, ``(chain, draw, 2)``."""
        flat = self.draws.flat.to(self.model.device, self.model.dtype)
        with torch.no_grad():
            prior = torch.cat([self.model.log_prior(part) for part in flat.split(1024)])
        pair = [prior.cpu().reshape(self.draws.theta.shape[:2]), self.draws.log_joint.cpu()]
        return torch.stack([each.double() for each in pair], -1).nan_to_num(0.0).numpy()

    def _disagreement(self, functions: Disagreement, densities: Disagreement) -> None:
        worst = float(self.r_hat.max()) if self.r_hat is not None else math.nan
        if functions.p_value <= verdicts.P_VALUE / 2:
            why = (
                f"chains disagree about predictions: one lies {functions.shift:.1f} standard "
                f"deviations from the others (R-hat up to {worst:.4g})"
            )
            self.above(
                functions.shift,
                verdicts.SHIFT,
                why,
                f"{_LONGER}; weight_convergence shows in which layer they differ",
            )
        if densities.p_value <= verdicts.P_VALUE / 2:
            why = (
                "chains disagree about weights that these inputs say little of (their log prior or "
                f"log joint: one lies {densities.shift:.1f} standard deviations from the others), "
                "and may about predictions elsewhere"
            )
            self.above(densities.shift, verdicts.SHIFT_OF_DENSITY, why, _LONGER)

    def _worth(self) -> None:
        assert self.ess_bulk is not None
        assert self.ess_tail is not None
        every = np.minimum(self.ess_bulk, self.ess_tail)
        worst = float(every.min())
        usual = float(np.quantile(every, _FEW))  # the worst estimate of many is noise
        total = self.draws.n_chains * self.draws.n_draws
        self.figures["ess"] = worst
        wanted = verdicts.ESS.good
        if total >= wanted:
            wanted = min(wanted, total / 3)
        if usual >= wanted and worst >= verdicts.ESS.bad:
            return
        more = (
            f"take about {math.ceil(verdicts.ESS.good / worst)} times as many draws"
            if worst > 0
            else "take many more draws"
        )
        grade: Grade = "with care" if worst >= verdicts.ESS.bad else "no"
        self.say(
            grade,
            f"there are only {worst:.0f} effective draws of the worst prediction",
            more,
        )


def equal(theta: Tensor, log_weights: Tensor | None, count: int) -> Tensor:
    """Return at most ``count`` draws of equal weight of ``(n, dim)``: evenly spaced, or chosen by
    their weights (systematic resampling).
    """
    if log_weights is None:
        return theta[evenly(len(theta), count).to(theta.device)]
    return theta[counted_alike(log_weights, count).to(theta.device)]
