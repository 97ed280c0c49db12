"""Several answers to one question: evaluate each method on the same test rows and say which to
use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnflow import arguments
from bnnflow.diagnosis import Diagnosis
from bnnflow.diagnosis.diagnose import judge
from bnnflow.draws import Draws, as_theta
from bnnflow.model import BayesianModel
from bnnflow.predictive import Prediction, metrics, predict
from bnnflow.stopwatch import Stopwatch
from bnnflow.transport import Flow

__all__ = ["Comparison", "Entry", "Evaluation", "compare", "duration", "gather"]

MARGIN = (
    0.05  # nats a row: predictions whose difference is known to be smaller are called equal
)
_SHARE = 0.05  # of the best value of another score, the same
_SAME_WIDTH = 1.25  # ratio of predictive widths up to which two methods are as sure
_CONVERGED = ("trust", "trust with care")
TAKEN = 4000  # draws that are taken of a posterior given as a distribution


@dataclass(frozen=True, eq=False)
class Entry:
    """One method's draws, whatever form they came in."""

    name: str
    draws: Draws | tuple[Tensor, Tensor | None]
    info: dict[str, Any]
    seconds: float | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One method's results: ``row`` holds its line of the table, ``scores`` what the metrics
    average.
    """

    entry: Entry
    prediction: Prediction
    diagnosis: Diagnosis
    scores: dict[str, Tensor]
    row: dict[str, Any]

    @property
    def name(self) -> str:
        """The method's name in the report."""
        return self.entry.name

    @property
    def exact(self) -> bool:
        """Whether the method leaves the posterior invariant: chains with an accept step, unless
        ``info`` says.
        """
        draws = self.entry.draws
        metropolis = isinstance(draws, Draws) and "acceptance_rate" in draws.stats
        return self.diagnosis.kind == "chains" and bool(
            self.entry.info.get("exact", metropolis)
        )

    @property
    def usable(self) -> bool:
        """Whether nothing forbids to use the predictions."""
        return self.diagnosis.verdict in (*_CONVERGED, "trust predictions only")

    @property
    def ess(self) -> float:
        """Bulk effective sample size of the worst prediction; zero if unknown."""
        bulk = self.diagnosis.ess_bulk
        return 0.0 if bulk is None else float(bulk.min())


@dataclass(frozen=True, eq=False)
class Comparison:
    """All methods on the same rows.

    Attributes:
        evaluations: in the order given.
        reference: name of the exact sampler that has converged, or None.
        chosen: name of the method that the headline recommends and the others are compared with:
            the reference, else the best of those whose predictions may be used; None if there are
            none.
        headline: which method to use, in a sentence.
        remarks: a sentence for each method, in the same order.
        left_out: why, for methods whose draws or weights are not finite.
    """

    evaluations: tuple[Evaluation, ...]
    reference: str | None
    chosen: str | None
    headline: str
    remarks: tuple[str, ...]
    left_out: dict[str, str]


def gather(
    results: Mapping[str, Any], model: BayesianModel, seconds: Mapping[str, float] | None
) -> list[tuple[str, Any]]:
    """Check everything that was passed and return the methods, before any work starts.

    Raises:
        ValueError: for no methods, names that are not text, values that are no draws, weights of
            another model.
    """
    if not isinstance(results, Mapping) or not results:
        raise ValueError("results must map at least one method's name to its draws")
    unknown = set(seconds or {}) - set(results)
    if unknown:
        raise ValueError(
            f"seconds names methods that have no results: {', '.join(sorted(map(str, unknown)))}"
        )
    for name, value in results.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a method's name must be text, got {name!r}")
        theta = _theta(value)
        if theta is None:
            if not callable(getattr(value, "sample", None)):
                raise ValueError(
                    f"{name}: expected Draws, weights, (weights, log weights) or something with "
                    f"sample(n, seed), got {type(value).__name__}"
                )
        elif theta.dim() == 0 or theta.shape[-1] != model.dim or theta.numel() == 0:
            raise ValueError(
                f"{name}: weights must be (..., {model.dim}) and not empty, got "
                f"{tuple(theta.shape)}"
            )
    return list(results.items())


def compare(
    results: list[tuple[str, Any]],
    model: BayesianModel,
    x: Tensor,
    y: Tensor,
    seconds: Mapping[str, float] | None = None,
    *,
    held_out: bool = True,
) -> Comparison:
    """Evaluate every method at rows (checked by the caller), those of training if none are held
    out, and put the outcome into words.

    Raises:
        ValueError: if no method has draws and weights that are finite.
    """
    entries = [_entry(name, value, (seconds or {}).get(name)) for name, value in results]
    broken = {entry.name: _broken(entry) for entry in entries}
    left_out = {name: why for name, why in broken.items() if why}
    if len(left_out) == len(entries):
        raise ValueError("; ".join(f"{name}: {why}" for name, why in left_out.items()))
    evaluations = [
        _evaluate(entry, model, x, y, held_out)
        for entry in entries
        if entry.name not in left_out
    ]
    _mark_best(evaluations)
    candidates = [e for e in evaluations if e.exact and e.diagnosis.verdict in _CONVERGED]
    reference = max(candidates, key=lambda e: e.ess, default=None)
    usable = [e for e in evaluations if e.usable]
    best = reference or max(usable, key=lambda e: e.row["lppd"], default=None)
    return Comparison(
        tuple(evaluations),
        reference.name if reference else None,
        best.name if best else None,
        _headline(evaluations, reference, best),
        tuple(_remark(e, best) for e in evaluations),
        left_out,
    )


# ---------------------------------------- evaluation


def _theta(value: Any) -> Tensor | None:
    """Return the weights of anything that holds weights, or None."""
    if isinstance(value, tuple):
        value = value[0] if len(value) == 2 else None
    theta = (
        value if isinstance(value, Tensor | np.ndarray) else getattr(value, "theta", None)
    )
    return None if theta is None else arguments.tensor("weights", theta)


def _entry(name: str, value: Any, seconds: float | None) -> Entry:
    info = dict(getattr(value, "info", None) or {})
    seconds = seconds if seconds is not None else info.get("seconds")
    if isinstance(value, Draws):
        return Entry(name, value, info, seconds)
    theta = _theta(value)
    if theta is None:
        watch = Stopwatch()
        theta = value.sample(TAKEN, 0)
        info = {"method": type(value).__name__, "draws taken": TAKEN, "seed": 0} | info
        seconds = seconds if seconds is not None else watch.seconds
    if isinstance(value, Flow):
        error = value.solver_error(density=False)["theta"]
        info |= value.about | {"solver error": f"{error:.2g} sd of a weight"}
    weights = value[1] if isinstance(value, tuple) else getattr(value, "log_weights", None)
    return Entry(
        name,
        (
            theta,
            None
            if weights is None
            else arguments.tensor(f"log weights of {name}", weights),
        ),
        info,
        seconds,
    )


def _broken(entry: Entry) -> str:
    """Say why draws cannot be averaged over; nothing if they can."""
    try:
        theta, _ = as_theta(entry.draws)
    except ValueError as error:
        return str(error).removeprefix("draws: ")
    lost = int((~theta.isfinite().all(-1)).sum())
    return f"{lost} of {len(theta)} draws have NaN or infinite weights" if lost else ""


def _evaluate(
    entry: Entry, model: BayesianModel, x: Tensor, y: Tensor, held_out: bool
) -> Evaluation:
    prediction = predict(model, entry.draws, x).evaluated()
    scores = metrics.rowwise(prediction, y)
    log_likelihood, log_joint = _mean_densities(prediction)
    n = len(scores["log_prob"])
    row: dict[str, Any] = {"method": entry.name}
    if prediction.kind == "classification":
        row |= {
            "accuracy": float(scores["correct"].mean()),
            "lppd": float(scores["log_prob"].mean()),
            "lppd_se": _standard_error(scores["log_prob"]),
            "brier": float(scores["brier"].mean()),
            "ece": metrics.ece(prediction, y),
        }
    else:
        row |= {
            "rmse": float(scores["squared_error"].mean().sqrt()),
            "lppd": float(scores["log_prob"].mean()),
            "lppd_se": _standard_error(scores["log_prob"]),
        }
        if prediction.has_intervals:
            row["crps"] = float(scores["crps"].mean())
            row["coverage_90"] = metrics.coverage(prediction, y, 0.9)
    draws = entry.draws.theta if isinstance(entry.draws, Draws) else entry.draws[0]
    count = draws.shape[:-1].numel()
    unseen = (prediction.x, y) if held_out else (None, None)
    diagnosis = judge(prediction, entry.draws, *unseen)
    row |= {
        "log_likelihood": log_likelihood,
        "log_joint": log_joint,
        **_evidence(entry),
        "draws": count,
        "seconds": entry.seconds,
        "seconds_per_1000_draws": None
        if entry.seconds is None
        else 1000 * entry.seconds / count,
        "gradients": entry.info.get("gradients") or None,
        "verdict": diagnosis.verdict,
        "headline": diagnosis.headline,
        "rows": n,
        "best": (),
    }
    return Evaluation(entry, prediction, diagnosis, scores, row)


def _evidence(entry: Entry) -> dict[str, float]:
    """Return the log evidence and its error, where the method estimates them."""
    found = entry.draws.log_evidence if isinstance(entry.draws, Draws) else None
    return {} if found is None else {"log_evidence": found[0], "log_evidence_se": found[1]}


def _mean_densities(prediction: Prediction) -> tuple[float, float]:
    """Return the weighted means over draws of the training data's log likelihood and of
    log_joint.
    """
    model = prediction.model
    chunk_size = max(1, prediction.chunk_size * len(prediction) // len(model.x))
    log_likelihood = log_joint = 0.0
    weights = prediction.log_weights.exp().split(chunk_size)
    for theta, weight in zip(prediction.theta.split(chunk_size), weights, strict=True):
        theta = theta.detach().to(model.device, model.dtype)
        with torch.no_grad():
            likelihood, prior = model.log_likelihood(theta), model.log_prior(theta)
        log_likelihood += float((weight * likelihood).sum())
        log_joint += float((weight * (likelihood + prior)).sum()) / model.temperature
    return log_likelihood, log_joint


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


_BETTER = {
    "accuracy": ("correct", 1),
    "rmse": ("squared_error", -1),
    "lppd": ("log_prob", 1),
}
_BETTER |= {"brier": ("brier", -1), "crps": ("crps", -1)}


def _mark_best(evaluations: list[Evaluation]) -> None:
    """Mark, column by column, the values that are known to be as good as the best: the 95%
    interval of the paired difference lies within a margin. What a test cannot tell apart is not.
    """
    if len(evaluations) < 2:
        return
    for column, (score, sign) in _BETTER.items():
        if column not in evaluations[0].row:
            continue
        values = {e.name: sign * e.scores[score] for e in evaluations}
        best = max(float(each.mean()) for each in values.values())
        margin = MARGIN if column == "lppd" else _SHARE * abs(best)
        for e in evaluations:
            gaps = [_difference(other, values[e.name]) for other in values.values()]
            if all(gap + 2 * noise <= margin for gap, noise in gaps if gap > 0):
                e.row["best"] += (column,)


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the mean of a - b over rows and its standard error; the rows are paired."""
    noise = _standard_error(a - b)
    return float((a - b).mean()), 0.0 if math.isnan(noise) else noise


# ---------------------------------------- words


def _headline(
    evaluations: list[Evaluation], reference: Evaluation | None, best: Evaluation | None
) -> str:
    if len(evaluations) == 1:
        return evaluations[0].diagnosis.headline
    if best is None:
        names = ", ".join(e.name for e in evaluations)
        worst = evaluations[0].diagnosis
        return f"None of {names} may be used as it is. {worst.headline}"
    if reference is not None:
        start = f"Use {reference.name}, an exact sampler that has converged."
    else:
        why = {
            0: "no exact sampler is among the methods",
            1: "the exact sampler has not converged",
        }.get(sum(e.exact for e in evaluations), "none of the exact samplers has converged")
        start = (
            f"Use the predictions of {best.name}, the best here of those that may be used; {why}, "
            "so evidences and summaries of weights are not known."
        )
    return f"{start} {best.diagnosis.headline}"


def _remark(e: Evaluation, best: Evaluation | None) -> str:
    """Say in a line how a method predicts beside the chosen one; else its own headline."""
    if best is None or e is best:
        return e.diagnosis.headline
    mean, error = _difference(e.scores["log_prob"], best.scores["log_prob"])
    low, high = mean - 2 * error, mean + 2 * error
    against = f"{best.name} ({_against(e, best)})"
    if low >= -MARGIN and high <= MARGIN:
        text = f"Within {MARGIN} nats a row of {against}{_width(e, best)}."
    elif high < 0:
        text = f"Worse than {against}."
    elif low > 0:
        text = f"Better than {against} on these rows."
    else:
        text = f"These rows do not tell it from {against}."
    if e.usable:
        return text
    return f"{text} {e.diagnosis.headline}"


def _width(e: Evaluation, best: Evaluation) -> str:
    """Say how sure a method is beside another: equal scores on some rows are no promise for
    others.
    """
    if (
        e.prediction.kind == "classification"
        or not e.prediction.model.likelihood.has_variance
    ):
        return ""
    ratio = (best.prediction.epistemic / e.prediction.epistemic.clamp(min=1e-300)).flatten()
    most = float(ratio.quantile(0.95))
    if most <= _SAME_WIDTH:
        return ""
    return f", but surer of its function by up to {most:.2g} times: elsewhere it may be too sure"


def _against(e: Evaluation, reference: Evaluation) -> str:
    difference, noise = _difference(e.scores["log_prob"], reference.scores["log_prob"])
    return f"LPPD {difference:+.3f} ± {noise:.3f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Return a length of time in words, rounded."""
    if seconds is None:
        return "unknown time"
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
