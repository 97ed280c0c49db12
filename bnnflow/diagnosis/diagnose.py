"""May these draws be used, and what for? Three questions, three answers, one headline."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow import verdicts
from bnnflow.arguments import checked
from bnnflow.diagnosis import predictions
from bnnflow.diagnosis.answers import Answer, Diagnosis, Grade, Kind
from bnnflow.diagnosis.convergence import predicted_values
from bnnflow.diagnosis.fit import fit
from bnnflow.diagnosis.sampling import HINTS, Sampling, equal
from bnnflow.draws import Draws, as_theta
from bnnflow.model import BayesianModel
from bnnflow.predictive import Prediction, predict

__all__ = ["diagnose", "judge"]

_DRAWS = 400  # of equal weight, by which predictions and model are looked at
_LEFT_OUT_DRAWS = 1000


@checked
def diagnose(
    model: BayesianModel,
    draws: Draws | Tensor | tuple[Tensor, Tensor | None],
    x: Tensor | np.ndarray | None = None,
    y: Tensor | np.ndarray | None = None,
) -> Diagnosis:
    """Say whether predictions may be used, whether the model fits, and what the draws are worth.

    *Predictions* are judged on rows that were not fitted, if x and y are given: by the coverage of
    intervals or the calibration of classes beside what so few rows can tell, by log scores beside
    those of a constant and of a linear model, and by their Monte-Carlo error. Without y, rows of
    training are left out one at a time by Pareto-smoothed importance sampling, where that works.
    *The model* is judged by the scales of inputs, targets and prior predictive, by posterior
    predictive checks on the rows of training, and by hidden units that do not respond. *The draws*:
    their log joint is computed again, copies are looked for, Stein's identity is tested, and Markov
    chains are compared by rank-normalised R-hat and effective sample sizes (Vehtari et al. 2021)
    and by a test that knows how many quantities were looked at. Chains are compared in predictions
    at up to 100 inputs: weights that differ by a symmetry of the network give the same predictions.
    `weight_convergence` compares the weights themselves, modulo symmetry.

    Draws without statistics of a sampler are independent draws of an approximation, which cannot
    vouch for itself: held-out rows can, for its predictions. What they predict is compared before
    and after a few Hamiltonian transitions, which leave draws of the posterior draws of it; this
    takes seconds on one core, and is left out where it would take longer.

    Args:
        model: their model.
        draws: draws, weights ``(..., dim)``, or a pair of weights and log weights.
        x: inputs ``(n, ...)`` at which predictions are compared; the training inputs if None.
        y: targets of x that were not fitted: ``(n,)`` or ``(n, targets)``.

    Returns:
        The answers: print it, or look at ``verdict``, ``headline``, ``predictions``, ``model``,
        ``draws``, or ``to_dict()``.

    Raises:
        ValueError: if weights, x or y have the wrong shape, or y comes without x.

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> from bnnflow.model import likelihoods
        >>> x = torch.linspace(-1, 1, 50)[:, None]
        >>> prior = torch.distributions.Normal(0.0, 1.0)
        >>> model = BayesianModel(net, prior, likelihoods.Gaussian(0.1), x, x)
        >>> diagnose(model, model.sample_prior(100, seed=0)).verdict
        'do not trust'
    """
    prediction = predict(model, draws, x)
    if y is not None and x is None:
        raise ValueError("y needs its x: give the inputs of these targets")
    targets = None if y is None else model.targets(y)
    if targets is not None and len(targets) != len(prediction):
        raise ValueError(f"x has {len(prediction)} rows and y has {len(targets)}")
    return judge(prediction, draws, None if x is None else prediction.x, targets)


def judge(
    prediction: Prediction,
    draws: Draws | Tensor | tuple[Tensor, Tensor | None],
    x: Tensor | None,
    y: Tensor | None,
) -> Diagnosis:
    """Diagnose draws whose prediction is there already.

    Args:
        prediction: by the draws, at x, or at the rows of training if x is None.
        draws: as in `diagnose`.
        x: inputs, those of the prediction.
        y: their targets, checked.
    """
    theta, log_weights = as_theta(draws)
    held = draws if isinstance(draws, Draws) else _plain(theta, log_weights)
    look = _Look(prediction, held, theta, log_weights, x, y)
    if log_weights is not None:
        return _weighted(look)
    if held.stats:
        return _chains(look)
    return _independent(look)


class _Look(NamedTuple):
    """What was given, checked."""

    prediction: Prediction  # by all draws
    draws: Draws
    theta: Tensor  # (n, dim)
    log_weights: Tensor | None
    x: Tensor | None
    y: Tensor | None

    @property
    def model(self) -> BayesianModel:
        return self.prediction.model

    @property
    def method(self) -> str:
        return str(self.draws.info.get("method", ""))

    def some(self, count: int) -> Draws:
        """Return so many draws of equal weight, in the model's type."""
        chosen = equal(self.theta, self.log_weights, min(count, len(self.theta)))
        plain = _plain(chosen.to(self.model.device, self.model.dtype), None)
        return replace(plain, calibration=self.draws.calibration)

    def finish(
        self, sampling: Sampling, kind: Kind, good: str, error: float | None
    ) -> Diagnosis:
        """Add the answers about predictions and model, and put all together."""
        if self.model.temperature != 1:
            sampling.say(
                "with care",
                f"this is the posterior tempered at T = {self.model.temperature:g}",
            )
        answer, where = self._predictions(error, kind)
        stats = self.draws.stats
        diverging = stats.get("diverging")
        stein = sampling.figures.get("temperature")
        return Diagnosis(
            answer,
            fit(self.model, self.some(_DRAWS), self.x),
            sampling.answer(good),
            where,
            kind,
            self.method,
            self.draws.n_chains,
            len(self.theta),
            sampling.rows,
            sampling.r_hat,
            sampling.ess_bulk,
            sampling.ess_tail,
            ess_weights=sampling.figures.get("ess_weights"),
            divergences=None if diverging is None else int(diverging.sum()),
            acceptance=sampling.mean("acceptance_rate", math.nan)
            if "acceptance_rate" in stats
            else None,
            e_bfmi=sampling.figures.get("e_bfmi"),
            temperature=sampling.mean("configurational_temperature", math.nan)
            if "configurational_temperature" in stats
            else stein,
            log_evidence=self.draws.log_evidence,
        )

    def _predictions(self, error: float | None, kind: Kind) -> tuple[Answer, str]:
        if self.y is not None:
            prediction = self.prediction.thinned(_DRAWS)
            answer = predictions.held_out(prediction, self.y, error)
            return answer, predictions.HELD_OUT
        answer = predictions.left_out(self.model, self.some(_LEFT_OUT_DRAWS), error)
        return answer, "" if answer.grade == "not looked at" else predictions.LEFT_OUT


def _plain(theta: Tensor, log_weights: Tensor | None) -> Draws:
    """Return weights as draws of which nothing else is known."""
    unknown = torch.full((1, len(theta)), math.nan, dtype=torch.float64)
    weights = None if log_weights is None else log_weights[None]
    return Draws(theta[None], unknown, log_weights=weights)


# ---------------------------------------- by kind


def _independent(look: _Look) -> Diagnosis:
    sampling = Sampling(look.model, look.draws)
    info, n, still = look.draws.info, len(look.theta), False
    if info.get("diverged"):
        sampling.say("no", "training diverged", "take a tenth of the learning rate")
    if info.get("converged") is False:
        sampling.say("no", *_UNSETTLED.get(look.method, _NO_MODE))
    if look.method == "DeepEnsemble":
        why = f"{n} members are {n} fitted networks, not draws: they have no effective sample size"
        sampling.say("not looked at", why, "use their predictions, if held-out rows agree")
    else:
        if sampling.identities(None) is not None:
            still = sampling.invariance(look.theta, look.prediction.x)
        sampling.again()
        if n < verdicts.ESS.bad:
            why = f"{n} draws are few: averages over them are noisy"
            sampling.say("with care", why, "take a thousand")
    sampling.say(
        "not looked at",
        "these are not Markov chains: there are no chains to compare, and "
        + (_STILL if still else "an approximation cannot vouch for itself"),
        _CORRECT if look.method == "Flow" else _COMPARE,
    )
    if look.method in HINTS:
        sampling.say("with care", HINTS[look.method])
    error = None
    if n > 1 and look.method != "DeepEnsemble":
        ones = np.broadcast_to(float(n), ())
        error = _error(look, sampling, ones)
    return look.finish(sampling, "independent", "", error)


_CORRECT = (
    "bnnflow.correct(model, flow) weighs them, and tells k-hat and the solver's error"
)
_STILL = "what transitions leave alone may still lack whole modes"
_COMPARE = "compare its predictions with those of an exact sampler, or with held-out rows"
_NO_MODE = (
    "the point that was expanded about is no mode of the posterior",
    "take more steps of training",
)
_FLOW = (
    "the fit has not settled: in many coordinates its place or width is still far from the best of "
    "its family",
    "take more steps, or a learning rate and a scale of the size of the weights",
)
_UNSETTLED = {"VI": _FLOW, "NormalizingFlowVI": _FLOW}


_MORE = {
    "SMC": "take more particles",
    "update": "take more particles, or sample the posterior anew",
}


def _weighted(look: _Look) -> Diagnosis:
    assert look.log_weights is not None
    sampling = Sampling(look.model, look.draws)
    log_weights = look.log_weights.double().cpu()
    log_weights = log_weights - log_weights.logsumexp(0)
    ess = float((-(2 * log_weights).logsumexp(0)).exp())
    sampling.figures["ess_weights"] = ess
    more = _MORE.get(look.method, "draw more")
    _lost_on_the_way(sampling, more)
    sampling.identities(log_weights)
    if not ess >= verdicts.ESS.good:
        why = f"the weights leave {ess:.0f} effective draws of {len(log_weights):,}"
        sampling.say("with care" if ess >= verdicts.ESS.bad else "no", why, more)
    evidence = look.draws.log_evidence
    if evidence is not None and evidence[1] > verdicts.EVIDENCE:
        why = f"the log evidence has a standard error of {evidence[1]:.1f}"
        sampling.say("with care", why, more)
    good = f"the weights leave {ess:,.0f} effective draws, and Stein's identity holds"
    if look.method == "SMC":
        good += "; twice as many particles show how far predictions and evidence move"
    error = _error(look, sampling, np.broadcast_to(ess, ()))
    return look.finish(sampling, "weighted", good, error)


def _lost_on_the_way(sampling: Sampling, more: str) -> None:
    """Say what speaks against particles that were tempered, and what to do: ``more``; nothing for
    other weighted draws.
    """
    info = sampling.draws.info
    if not info.get("least_effective_share", 1.0) >= verdicts.LEFT_EFFECTIVE:
        why = (
            f"a temperature has left only {info['least_effective_share']:.1e} of the particles "
            "effective: the likelihood is too steep for their number or for the precision of its "
            "numbers"
        )
        sampling.say("no", why, "standardise, or take float64")
    ancestors = info.get("first_ancestors", math.inf)
    if not ancestors >= verdicts.ANCESTORS.good:
        why = (
            f"all particles of a run descend from {ancestors:.3g} of the first: what others knew "
            "is lost, and the error of the evidence is not known"
        )
        grade: Grade = "with care" if ancestors >= verdicts.ANCESTORS.bad else "no"
        sampling.say(grade, why, more)


def _chains(look: _Look) -> Diagnosis:
    sampling = Sampling(look.model, look.draws)
    draws = look.draws
    sampling.compare(look.prediction)
    if draws.n_chains == 1:
        why = "one chain cannot show what it has not found"
        sampling.say("with care", why, "run at least four")
    sampling.identities(None)
    sampling.again()
    _transitions(sampling)
    _bias(sampling)
    if draws.info.get("interrupted"):
        sampling.say("with care", "the run was interrupted", "finish it")
    worth = sampling.figures.get("ess")
    good = f"chains agree, and are worth {worth or 0:,.0f} independent draws or more"
    ess = sampling.ess_bulk
    error = None if ess is None else _error(look, sampling, ess)
    return look.finish(sampling, "chains", good, error)


def _error(look: _Look, sampling: Sampling, ess: np.ndarray) -> float | None:
    """Return the Monte-Carlo error of predictions at the rows where chains were compared."""
    rows, values = sampling.rows, sampling.values
    prediction = look.prediction
    if rows is None or values is None:
        prediction = prediction.thinned(_LEFT_OUT_DRAWS)
        rows, values = predicted_values(prediction, (1, -1))
    at_rows = prediction.subset(torch.from_numpy(rows))
    ess = np.broadcast_to(ess, values.shape[2:])
    return predictions.monte_carlo_error(at_rows, values, ess)


def _transitions(sampling: Sampling) -> None:
    """Judge how the chains moved."""
    draws = sampling.draws
    total = draws.n_chains * draws.n_draws
    diverging, energy = draws.stats.get("diverging"), draws.stats.get("energy")
    if diverging is not None and bool(diverging.any()):
        count = int(diverging.sum())
        sampling.above(
            count / total,
            verdicts.DIVERGENCES,
            f"{count:,} of {total:,} transitions diverged",
            "raise the target acceptance or run a longer warm-up",
        )
    if energy is not None and draws.n_draws >= 4:
        found = _e_bfmi(energy)
        sampling.figures["e_bfmi"] = found
        if not found >= verdicts.E_BFMI:
            why = f"E-BFMI {found:.2f} is below {verdicts.E_BFMI}: energies are explored slowly"
            sampling.say("with care", why, "take more draws")
    accepted = sampling.mean("acceptance_rate", 1.0)
    if not accepted >= verdicts.ACCEPTANCE:
        why = f"acceptance is {accepted:.2f}"
        advice = "run a longer warm-up or start with a smaller step size"
        sampling.say("with care", why, advice)


def _bias(sampling: Sampling) -> None:
    """Judge the bias of chains without an accept step by what the sampler recorded of it."""
    draws = sampling.draws
    errors, asked = (
        sampling.mean("energy_variance", 0.0),
        draws.info.get("energy_variance"),
    )
    if asked is not None and not errors <= verdicts.ENERGY_VARIANCE * asked:
        why = (
            f"energy errors have variance {errors:.2g} a dimension where {asked:.2g} was asked: "
            "predictions are biased"
        )
        sampling.say("no", why, "run a longer warm-up, or an exact sampler such as HMC")
    recorded = sampling.mean("configurational_temperature", 1.0)
    if not sampling.off_in_spread and not abs(recorded - 1) <= verdicts.TEMPERATURE:
        what = (
            "chains are still near where they began; run longer"
            if recorded < 1
            else "draws are too spread; take a smaller step size or less noisy gradients"
        )
        why = f"configurational temperature is {recorded:.2f} and should be 1"
        sampling.say("with care", why, what)


def _e_bfmi(energy: Tensor) -> float:
    """Return the smallest ratio, over chains, of the energy's squared steps to its variance."""
    energy = energy.double()
    steps = energy.diff(dim=1).square().mean(1)
    ratio = steps / energy.var(1, correction=0)
    return float(torch.nan_to_num(ratio, nan=0.0).min())
