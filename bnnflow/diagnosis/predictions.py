"""May the predictions be used? Calibration, trivial rivals, and Monte-Carlo errors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow import diagnostics, verdicts
from bnnflow.diagnosis import rivals
from bnnflow.diagnosis.answers import Answer, Finding, Grade
from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.predictive import Prediction, PredictiveCheck, calibration_check
from bnnflow.predictive.average import TINY
from bnnflow.predictive.checks import LEVELS
from bnnflow.verdicts import Bounds

__all__ = ["HELD_OUT", "LEFT_OUT", "QUESTION", "held_out", "left_out", "monte_carlo_error"]

QUESTION = "May the predictions be used?"
HELD_OUT, LEFT_OUT = "held-out rows", "leave-one-out"
_ROWS = 200  # of training, that are left out one at a time
_MOST = 0.9
_NORMAL_DENSITY = 0.103  # of the standard normal at its 5% point


class _Look(NamedTuple):
    """How calibrated predictions turned out to be on some rows."""

    rows: int
    where: str
    found: dict[str, float]
    expected: dict[str, float]
    chance: dict[str, tuple[float, float]]  # 95% of calibrated predictions lie between
    p_values: dict[str, float]
    p_value: float


def held_out(prediction: Prediction, y: Tensor, error: float | None) -> Answer:
    """Judge predictions of rows that were not fitted.

    Args:
        prediction: of these rows, by a few hundred draws.
        y: their targets.
        error: `monte_carlo_error` of the predictions, if known.
    """
    model, x = prediction.model, prediction.x
    log_prob = prediction.log_prob(y).cpu()
    beside = rivals.log_scores(model, x, prediction.targets(y))
    figures: dict[str, Any] = {"rows": len(x), "log_score": float(log_prob.mean())}
    findings = _beside(log_prob, beside, figures)
    if _can_be_checked(model):
        check = calibration_check(prediction, y)
        findings += _calibrated(_Look(len(x), HELD_OUT, *_of_check(check)), figures)
    else:
        findings.append(_cannot(model))
    findings += _noise(error, figures)
    return Answer.of(QUESTION, findings, _praise(figures, HELD_OUT), figures)


def left_out(model: BayesianModel, draws: Draws, error: float | None) -> Answer:
    """Judge predictions of rows of training by Pareto-smoothed importance sampling, each left out
    of the posterior (PSIS-LOO, Vehtari, Gelman & Gabry 2017).
    """
    rows = model.some_rows(_ROWS)
    x, y, theta = model.x[rows], model.y[rows], draws.flat
    with torch.no_grad():
        values = model.pointwise_log_likelihood(theta, x, y).double().cpu()  # (k, n)
    if not bool(values.isfinite().all()):
        lost = int((~values.isfinite().all(1)).sum())
        why = f"{lost:,} of {len(values):,} draws give a row of training no finite density"
        finding = Finding("no", why, "leave them out, or standardise inputs and targets")
        return Answer.of(QUESTION, [finding], "", {"rows": len(rows)})
    powers = model.powers_of(rows).cpu()
    smoothed, khat = diagnostics.psis_of_rows((-values * powers).T.numpy())
    log_weights = torch.from_numpy(smoothed).T
    figures: dict[str, Any] = {
        "rows": len(rows),
        "khat_above_0.7": float((khat > verdicts.KHAT).mean()),
    }
    failed = figures["khat_above_0.7"]
    if not failed <= verdicts.LEFT_OUT_FAILS:
        findings = [
            Finding(
                "not looked at",
                f"leave-one-out weights fail for {failed:.0%} of the rows (k-hat above "
                f"{verdicts.KHAT}), and no held-out rows were given",
                "give rows that were not fitted, diagnose(model, draws, x, y)",
            )
        ]
        findings += _noise(error, figures)
        return Answer.of(QUESTION, findings, "", figures)
    log_prob, looks = torch.logsumexp(log_weights + values, 0), []
    if model.likelihood.kind == "classification":
        log_probs = _left_out_probs(model, draws, x, log_weights)
        log_prob = log_probs.gather(1, y.cpu().reshape(-1, 1).long())[:, 0]
        looks = [_left_out_labels(log_probs, y.cpu().reshape(-1).long())]
    elif _can_be_checked(model):
        looks = [_left_out_numbers(model, theta, x, y, log_weights)]
    figures["log_score"] = float(log_prob.mean())
    findings = _beside(log_prob, rivals.left_out(model, rows), figures)
    for look in looks:
        findings += _calibrated(look, figures)
    findings += _noise(error, figures)
    return Answer.of(QUESTION, findings, _praise(figures, LEFT_OUT), figures)


def monte_carlo_error(
    prediction: Prediction, values: np.ndarray, ess: np.ndarray
) -> float | None:
    """Return the Monte-Carlo standard error of predictive means, below which nine of ten rows are,
    or that of the ends of 90% intervals, in predictive standard deviations; None where the
    likelihood has no variance.

    Args:
        prediction: at the rows of ``values``, by all draws.
        values: what each draw predicts, ``(chain, draw, rows, outputs)``.
        ess: effective draws of each, ``(rows, outputs)``.
    """
    ess = np.maximum(ess, len(values))  # a chain is worth a draw, however stuck
    with np.errstate(all="ignore"):  # of predictions that overflow nothing is finite
        spread = values.std((0, 1)) / np.sqrt(ess)
    if prediction.kind == "classification":
        probs = values.mean((0, 1))
        sd = np.sqrt(np.maximum(probs * (1 - probs), 1e-12))
        # what decides nothing needs no digits
        return float(np.quantile(spread / np.maximum(sd, 0.05), _MOST))
    if not prediction.model.likelihood.has_variance:
        return None
    error = spread / prediction.sd.cpu().numpy().reshape(values.shape[2:])
    if not np.isfinite(error).all():
        return None
    return float(
        max(np.quantile(error, _MOST), _error_of_ends(prediction, values.shape[:2]))
    )


def _error_of_ends(prediction: Prediction, shape: tuple[int, ...]) -> float:
    """Return the error of the ends of intervals, by how chains, or halves of one, differ."""
    likelihood = prediction.model.likelihood
    if likelihood.discrete or not _can_be_checked(prediction.model):
        return 0.0
    ends = prediction.quantile([0.05, 0.95])
    if not bool(ends.isfinite().all()):
        return math.inf
    numbers = torch.arange(len(prediction.theta)).reshape(shape)
    parts = numbers if len(numbers) > 1 else numbers[0].tensor_split(2)
    levels = torch.stack(
        [torch.stack([prediction.select(part).cdf(q) for q in ends]) for part in parts]
    )
    # the root mean square over rows: the worst of a few chains is noise
    error = levels.var(0).div(len(parts)).mean().sqrt()
    return float(error) / _NORMAL_DENSITY


# ---------------------------------------- findings


def _can_be_checked(model: BayesianModel) -> bool:
    likelihood = model.likelihood
    return likelihood.kind == "classification" or (
        likelihood.has_sample and likelihood.has_cdf
    )


def _cannot(model: BayesianModel) -> Finding:
    return Finding(
        "with care",
        f"{model.likelihood.name} has no sample and cdf: calibration was not looked at",
        "write them, and intervals can be judged",
    )


def _of_check(check: PredictiveCheck) -> tuple[Any, ...]:
    chance = {name: (check.low[name], check.high[name]) for name in check.found}
    return check.found, check.expected, chance, check.p_values, check.p_value


def _of_rows(named: dict[str, tuple[Tensor, Tensor, Tensor]]) -> _Look:
    """Look at means over rows left out, each of which is taken to be right or wrong by itself.

    Args:
        named: what was found in each row ``(n,)``, what was expected, and its variance.
    """
    from scipy.stats import norm

    found, expected, chance, p_values, n = {}, {}, {}, {}, 0
    for name, (seen, mean, variance) in named.items():
        n = len(seen)
        found[name], expected[name] = float(seen.mean()), float(mean.mean())
        spread = math.sqrt(float(variance.sum())) / n
        chance[name] = (expected[name] - 2 * spread, expected[name] + 2 * spread)
        gap = abs(found[name] - expected[name])
        p_values[name] = float(2 * norm.sf(gap / max(spread, 1e-12)))
    p_value = min(1.0, len(p_values) * min(p_values.values()))
    return _Look(n, LEFT_OUT, found, expected, chance, p_values, p_value)


def _left_out_numbers(
    model: BayesianModel, theta: Tensor, x: Tensor, y: Tensor, log_weights: Tensor
) -> _Look:
    """Look at probability integral transforms, each under the posterior without its row."""
    outputs, parameters, weights = _left_out_terms(model, theta, x, log_weights)
    y = y.double().reshape(len(y), -1)
    u = (weights * model.likelihood.cdf(outputs, y, parameters)).sum(0)
    if model.likelihood.discrete:  # uniform between the values before and after the jump
        before = (weights * model.likelihood.cdf(outputs, y - 1, parameters)).sum(0)
        generator = torch.Generator(u.device).manual_seed(0)
        share = torch.rand(u.shape, generator=generator, dtype=u.dtype, device=u.device)
        u = torch.lerp(before, u, share)
    u = u.cpu().flatten()
    ones = torch.ones_like(u)
    named = {
        f"inside {level:.0%}": (
            ((u - 0.5).abs() <= level / 2).double(),
            level * ones,
            level * (1 - level) * ones,
        )
        for level in LEVELS
    }
    return _of_rows(named | {"mean PIT": (u, 0.5 * ones, ones / 12)})


def _left_out_probs(
    model: BayesianModel, draws: Draws, x: Tensor, log_weights: Tensor
) -> Tensor:
    """Return log probabilities of the classes, each row under the posterior without it,
    ``(n, classes)``.
    """
    outputs, parameters, weights = _left_out_terms(model, draws.flat, x, log_weights)
    probs = (weights * model.likelihood.mean(outputs, parameters)).sum(0).cpu()
    log_probs = probs.clamp(min=TINY).log()
    return log_probs if draws.calibration is None else draws.calibration(log_probs)


def _left_out_labels(log_probs: Tensor, y: Tensor) -> _Look:
    """Look at class probabilities, each under the posterior without its row."""
    probs = log_probs.exp()
    confidence, label = probs.max(1)
    mean = (probs * log_probs).sum(1)
    named = {
        "right beyond it": (
            (y == label).double() - confidence,
            torch.zeros_like(confidence),
            confidence * (1 - confidence),
        ),
        "log probability": (
            log_probs.gather(1, y[:, None])[:, 0],
            mean,
            (probs * log_probs.square()).sum(1) - mean.square(),
        ),
    }
    return _of_rows(named)


def _left_out_terms(
    model: BayesianModel, theta: Tensor, x: Tensor, log_weights: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return outputs ``(k, n, out)``, likelihood parameters, and weights ``(k, n, 1)``."""
    with torch.no_grad():
        outputs = model.outputs(theta, x).double()
        parameters = model.likelihood_parameters(theta)
    wide = {name: each.double() for name, each in parameters.items()}
    return outputs, wide, log_weights.exp().to(outputs)[..., None]


def _calibrated(look: _Look, figures: dict[str, Any]) -> list[Finding]:
    figures["calibration"] = {
        name: {"found": look.found[name], "chance": look.chance[name]}
        for name in look.found
    }
    figures["calibration_p_value"] = look.p_value
    if look.p_value > verdicts.P_VALUE:
        return []
    grave = [(name, _size(name, look)) for name in look.found]
    # what lies farthest beyond its bounds
    name, size = max(grave, key=lambda each: each[1])
    if size < 1 or look.p_values[name] > 2 * verdicts.P_VALUE:
        return []
    found, (low, high) = look.found[name], look.chance[name]
    # what is too wide or too unsure wastes, and misleads nobody
    unsure = name not in ("mean PIT", "KS distance") and found > look.expected[name]
    grade: Grade = "no" if size >= 2 and not unsure else "with care"
    where = f"{look.rows:,} {look.where if look.where == HELD_OUT else 'rows left out'}"
    if name.startswith("inside"):
        what = "too narrow" if found < look.expected[name] else "too wide"
        why = (
            f"intervals are {what}: those of {name.removeprefix('inside ')} hold {found:.0%} of "
            f"{where}, where chance leaves {low:.0%} to {high:.0%}"
        )
    elif "right" in name or name == "log probability":
        what = "too sure" if found < look.expected[name] else "too unsure"
        why = (
            f"class probabilities are {what} ({name} {found:+.3f} on {where}, where chance leaves "
            f"{low:+.3f} to {high:+.3f})"
        )
    else:
        side = "high" if look.found.get("mean PIT", 0.5) < 0.5 else "low"
        why = (
            f"predictions lie {side} of targets, or have another shape ({name} {found:.3f} on "
            f"{where}, where chance leaves {low:.3f} to {high:.3f})"
        )
    advice = (
        "look at the answers about the model and the draws, which say where it comes from; else "
        "learn the noise, or let it vary (likelihoods.HeteroscedasticGaussian)"
    )
    return [Finding(grade, why, advice)]


def _size(name: str, look: _Look) -> float:
    """Return how far a statistic lies from what was expected, in units that matter: 1 is worth a
    word, 2 forbids the use.
    """
    return abs(look.found[name] - look.expected[name]) / verdicts.CALIBRATION[name]


def _beside(
    log_prob: Tensor, beside: dict[str, Tensor], figures: dict[str, Any]
) -> list[Finding]:
    """Compare log scores with those of rivals, row by row."""
    findings = []
    if rivals.CONSTANT in beside:
        lost = int((log_prob < beside[rivals.CONSTANT] - verdicts.IMPOSSIBLE).sum())
        figures["impossible_rows"] = lost
        if lost:
            why = (
                f"{lost:,} of {len(log_prob):,} rows lie where predictions say that none can (over "
                f"{verdicts.IMPOSSIBLE:.0f} nats below {rivals.CONSTANT})"
            )
            advice = (
                "look at these rows; take likelihoods.StudentT, or more draws or members"
            )
            findings.append(Finding("no", why, advice))
    for name, theirs in beside.items():
        gap = log_prob - theirs
        mean = float(gap.mean())
        error = float(gap.std() / math.sqrt(len(gap))) if len(gap) > 1 else math.inf
        figures[f"above {name}"] = (mean, error)
        said = f"{name} predicts these rows better, by {abs(mean):.2f} ± {error:.2f} nats a row"
        worst = verdicts.RIVAL.bad if name == rivals.LINEAR else verdicts.RIVAL.good
        if mean < -max(3 * error, worst):
            advice = (
                "take it, or standardise inputs and targets, and look at the answers about the "
                "model and the draws"
            )
            findings.append(Finding("no", said, advice))
        elif name == rivals.CONSTANT and not mean > 2 * error:
            why = (
                f"these rows are predicted no better than by {name} ({mean:+.2f} ± {error:.2f} "
                "nats a row)"
            )
            advice = (
                "check that inputs and targets belong together, or find inputs that matter"
            )
            findings.append(Finding("with care", why, advice))
        elif mean < -max(3 * error, verdicts.RIVAL.good):
            advice = "take it, or more draws, other inputs, another prior or likelihood"
            findings.append(Finding("with care", said, advice))
    return findings


def _noise(error: float | None, figures: dict[str, Any]) -> list[Finding]:
    if error is None:
        return []
    figures["monte_carlo_error"] = error
    bounds: Bounds = verdicts.MONTE_CARLO
    if error <= bounds.good:
        return []
    why = (
        f"the Monte-Carlo error of a prediction is {error:.2f} of its standard deviation (of the "
        "mean, or an end of a 90% interval)"
    )
    times = math.ceil((error / bounds.good) ** 2)
    advice = f"take about {times} times as many draws, from more chains"
    return [Finding("with care" if error <= bounds.bad else "no", why, advice)]


def _praise(figures: dict[str, Any], where: str) -> str:
    rows = figures["rows"]
    place = f"{rows:,} held-out rows" if where == HELD_OUT else f"{rows:,} rows left out"
    parts = []
    covered = figures.get("calibration", {}).get("inside 90%")
    if covered:
        parts.append(f"90% intervals hold {covered['found']:.0%} of {place}")
    elif "calibration" in figures:
        parts.append(f"probabilities are as right as they say on {place}")
    above = figures.get(f"above {rivals.LINEAR}") or figures.get(f"above {rivals.CONSTANT}")
    name = rivals.LINEAR if f"above {rivals.LINEAR}" in figures else rivals.CONSTANT
    if above:
        mean, error = above
        parts.append(f"log score {mean:+.2f} ± {error:.2f} nats a row beside {name}")
    return "; ".join(parts)
