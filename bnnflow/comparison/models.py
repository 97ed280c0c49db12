"""Models of the same data side by side: how well each predicts, by how much, and together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bnnflow.arguments import Count, Positive, Whole, checked, shown
from bnnflow.comparison.unseen import Unseen, folds_of, k_fold, leave_one_out
from bnnflow.comparison.weights import pseudo_bma, stacking
from bnnflow.draws import Draws
from bnnflow.estimators.base import BayesianEstimator
from bnnflow.model import BayesianModel
from bnnflow.predictive import Prediction, Stacked, predict, stacked
from bnnflow.tables import in_columns
from bnnflow.verdicts import KHAT

__all__ = ["Difference", "ModelComparison", "Score", "Standing", "compare", "difference"]

Standing = Literal["best", "equal", "worse", "undecided"]
Fitted = tuple[BayesianModel, Draws] | BayesianEstimator


@dataclass(frozen=True)
class Difference:
    """By how much a model predicts worse than the best one, the rows being paired.

    Attributes:
        elpd: sum over rows of the differences, in nats.
        se: its standard error.
        low: lower end of the interval of 95% probability.
        high: upper end.
        standing: ``"best"``; ``"equal"`` if the interval lies inside the margin; ``"worse"`` if it
            lies below zero, and not inside; ``"undecided"`` if the rows are too few to tell.
    """

    elpd: float
    se: float
    low: float
    high: float
    standing: Standing


@dataclass(frozen=True, eq=False)
class Score:
    """How well one model predicts rows that it has not seen.

    Attributes:
        elpd: expected log pointwise predictive density, a sum over rows in nats.
        se: its standard error.
        p_loo: effective number of parameters, by how much it predicts rows that it has seen better;
            None for folds.
        pointwise: log predictive density of every row, ``(n,)``.
        khat: Pareto shape of every row's weights, ``(n,)``; None for folds.
        refitted: numbers of the rows that were predicted by draws without them.
        unresolved: numbers of the rows whose k-hat exceeds 0.7 and that were not refitted.
        difference: to the best model.
        stacking: weight in the mixture of best log score.
        pseudo_bma: pseudo-BMA+ weight.
        log_evidence: value and standard error, where the draws have one.
    """

    elpd: float
    se: float
    p_loo: float | None
    pointwise: Tensor
    khat: Tensor | None
    refitted: tuple[int, ...]
    unresolved: tuple[int, ...]
    difference: Difference
    stacking: float
    pseudo_bma: float
    log_evidence: tuple[float, float] | None


@dataclass(frozen=True, eq=False, repr=False)
class ModelComparison:
    """Models of the same data, compared by `compare`. Printing it shows the table.

    Attributes:
        models: what was compared, by name.
        scores: how well each predicts, by name, the best first.
        criterion: how rows were left out.
        margin: nats, within which models count as equal.
    """

    models: dict[str, Fitted]
    scores: dict[str, Score]
    criterion: str
    margin: float

    @property
    def best(self) -> str:
        """Name of the model of largest elpd."""
        return next(iter(self.scores))

    @property
    def weights(self) -> dict[str, float]:
        """Stacking weights, by name, in the order given."""
        return {name: self.scores[name].stacking for name in self.models}

    def predict(self, x: Any) -> Stacked:
        """Return the mixture of the models' predictions, with stacking weights.

        Args:
            x: rows, as each model takes them: a table for estimators, ``(n, ...)`` for models; or a
                dict of them by name, where models take different ones.

        Raises:
            ValueError: if x does not fit, or a dict lacks a model.
        """
        given = x if isinstance(x, Mapping) else dict.fromkeys(self.models, x)
        if missing := [name for name in self.models if name not in given]:
            raise ValueError(f"x has no rows for {', '.join(missing)}")
        parts = [_prediction(each, given[name]) for name, each in self.models.items()]
        return stacked(parts, torch.tensor(list(self.weights.values())))

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain values: no row by row ones."""
        return {
            "criterion": self.criterion,
            "margin": self.margin,
            "best": self.best,
            "models": {name: _row(score) for name, score in self.scores.items()},
        }

    def __repr__(self) -> str:
        """Say how the models compare in one line."""
        names = ", ".join(f"{name}: {each.elpd:.1f}" for name, each in self.scores.items())
        return f"ModelComparison({self.criterion}, elpd {names})"

    def __str__(self) -> str:
        """Lay the table out for a terminal."""
        table = [
            ["", "elpd", "to best", "stacking", "BMA+", "p_loo", "k > 0.7", "log evidence"]
        ]
        table += [[name, *_cells(score)] for name, score in self.scores.items()]
        lines = in_columns(table)
        lines += [f"  - {name}: {text}" for name, text in self._remarks()]
        head = f"{self.criterion}; equal: 95% of the difference within {self.margin:g} nats"
        return "\n".join([head, *lines])

    def _remarks(self) -> list[tuple[str, str]]:
        found = []
        for name, score in self.scores.items():
            if score.refitted:
                count = len(score.refitted)
                found.append(
                    (
                        name,
                        f"{count} rows of k-hat > {KHAT} predicted by draws without them",
                    )
                )
            if score.unresolved:
                count = len(score.unresolved)
                found.append(
                    (
                        name,
                        f"{count} rows of k-hat > {KHAT} are not to be relied on: take folds=10",
                    )
                )
        return found


@checked
def compare(
    models: Mapping[str, Any],
    *,
    folds: Count | None = None,
    refit: Mapping[str, Callable[[BayesianModel], Draws]] | None = None,
    refits: Whole = 50,
    margin: Positive = 4.0,
    seed: int = 0,
    progress: bool = True,
) -> ModelComparison:
    """Compare models of the same data by how well they predict rows that they have not seen.

    Each row is left out by importance weights (PSIS-LOO, Vehtari, Gelman & Gabry 2017). Where these
    fail, k-hat above 0.7, `bnnflow.update` carries the draws to the posterior without the row, and
    both sets of draws give its density. With ``folds`` rows are left out in as many groups, and the
    draws carried to the posterior of the rest.

    Two models are said to be equal only if the 95% interval of their paired difference lies inside
    the margin: four nats a data set, below which differences matter little (Sivula, Magnusson &
    Vehtari 2020). An interval that holds zero and more than the margin says nothing.

    Class probabilities are those of the posterior, before any calibration of an estimator.

    Stacking weights are those of the mixture with the best log score, pseudo-BMA+ weights those of
    Yao et al. (2018). ``predict`` of the result is the stacked prediction.

    Args:
        models: ``{name: (model, draws)}``, or fitted estimators in place of the pairs. Inputs,
            networks, priors and likelihoods may differ, targets must not.
        folds: take K-fold cross-validation in place of leave-one-out.
        refit: with folds, how a model is fitted to the rest, by name: a function of a model that
            returns draws, such as ``lambda part: bf.sample(part, bf.DeepEnsemble(), seed=0)``. What
            is no posterior, such as an ensemble, needs one; draws of others are moved.
        refits: the most rows of each model that are refitted in leave-one-out, those of the largest
            k-hat; 0 for none.
        margin: nats, see above.
        seed: of folds, moves and bootstrap.
        progress: show a bar at a terminal.

    Returns:
        The table, which prints itself.

    Raises:
        ValueError: for models of other targets, naming them; draws of another model; draws of no
            posterior without ``folds`` and ``refit``; more folds than rows.

    Example:
        >>> from bnnflow import HMC, BayesianModel, likelihoods, priors, sample
        >>> x, fitted = torch.linspace(-1, 1, 20)[:, None], {}
        >>> for width in (1, 4):
        ...     layers = torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
        ...     net = torch.nn.Sequential(*layers)
        ...     model = BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.1), x, x.sin())
        ...     fitted[f"{width} units"] = model, sample(model, HMC(), draws=50, warmup=100)
        >>> compared = compare(fitted, refits=0)
        >>> abs(sum(compared.weights.values()) - 1) < 1e-9
        True
    """
    fitted = {name: _checked(name, each) for name, each in models.items()}
    _check_same_data(fitted)
    n = len(next(iter(fitted.values()))[0].x)
    refit = refit or {}
    if unknown := refit.keys() - fitted.keys():
        raise ValueError(f"refit names {min(unknown)!r}, which is none of models")
    if folds is None and refit:
        raise ValueError("refit is used with folds only")
    if folds is not None and not 2 <= folds <= n:
        raise ValueError(
            f"folds must be between 2 and the number of rows, {n}, got {folds}"
        )
    if folds is None:
        unseen = {
            name: leave_one_out(name, *each, refits, seed, progress)
            for name, each in fitted.items()
        }
    else:
        parts = folds_of(n, folds, seed)
        unseen = {
            name: k_fold(name, *each, parts, refit.get(name), seed, progress)
            for name, each in fitted.items()
        }
    for name, each in unseen.items():
        if len(rows := (~each.elpd.isfinite()).nonzero()):
            raise ValueError(
                f"{name}: row {int(rows[0])} has no probability under its draws: refit more rows, "
                "or give folds"
            )
    criterion = "PSIS leave-one-out" if folds is None else f"{folds}-fold cross-validation"
    return ModelComparison(
        dict(models), _scores(fitted, unseen, margin, seed), criterion, margin
    )


def difference(values: Tensor, best: Tensor, margin: float) -> Difference:
    """Compare log densities of the same rows, ``(n,)`` each: a model's and the best one's."""
    from scipy import stats

    gaps = values - best
    n, elpd = len(gaps), float(gaps.sum())
    se = math.sqrt(n) * float(gaps.std()) if n > 1 else math.nan
    reach = se * float(stats.t.ppf(0.975, max(1, n - 1)))
    low, high = elpd - reach, elpd + reach
    if values is best:
        standing: Standing = "best"
    elif low >= -margin and high <= margin:
        standing = "equal"
    else:
        standing = "worse" if high < 0 else "undecided"
    return Difference(elpd, se, low, high, standing)


def _scores(
    fitted: dict[str, tuple[BayesianModel, Draws]],
    unseen: dict[str, Unseen],
    margin: float,
    seed: int,
) -> dict[str, Score]:
    order = sorted(unseen, key=lambda name: -float(unseen[name].elpd.sum()))
    best = unseen[order[0]].elpd
    table = torch.stack([each.elpd for each in unseen.values()], 1)
    weights = dict(zip(unseen, stacking(table).tolist(), strict=True))
    bma = dict(zip(unseen, pseudo_bma(table, seed=seed).tolist(), strict=True))
    scores = {}
    for name in order:
        each, (model, draws) = unseen[name], fitted[name]
        refitted, failed = _numbers(each.refitted), set[int]()
        if each.khat is not None:
            failed = {*_numbers((each.khat > KHAT).nonzero().squeeze(1))}
        scores[name] = Score(
            elpd=float(each.elpd.sum()),
            se=math.sqrt(len(best)) * float(each.elpd.std()) if len(best) > 1 else math.nan,
            p_loo=None if each.lpd is None else float((each.lpd - each.elpd).sum()),
            pointwise=each.elpd,
            khat=each.khat,
            refitted=refitted,
            unresolved=tuple(sorted(failed.difference(refitted))),
            difference=difference(each.elpd, best, margin),
            stacking=weights[name],
            pseudo_bma=bma[name],
            # at another temperature it is the normaliser of something else
            log_evidence=draws.log_evidence if model.temperature == 1 else None,
        )
    return scores


def _numbers(rows: Tensor | None) -> tuple[int, ...]:
    return () if rows is None else tuple(rows.tolist())


def _checked(name: str, given: Any) -> tuple[BayesianModel, Draws]:
    if isinstance(given, BayesianEstimator):
        if not hasattr(given, "draws_"):
            raise ValueError(f"{name}: the estimator is not fitted")
        return given.model_, given.draws_
    if (
        not isinstance(given, tuple | list)
        or len(given) != 2
        or not isinstance(given[0], BayesianModel)
        or not isinstance(given[1], Draws)
    ):
        raise TypeError(
            f"models[{name!r}] must be a pair (model, draws) or an estimator, got {shown(given)}"
        )
    model, draws = given
    try:
        predict(model, draws)
    except ValueError as error:  # draws that are not the model's, or not finite
        raise ValueError(f"{name}: {error}") from None
    return model, draws


def _check_same_data(fitted: dict[str, tuple[BayesianModel, Draws]]) -> None:
    """Raise ``ValueError`` unless all models are of the same targets."""
    if not fitted:
        raise ValueError("models must hold at least one model")
    (first, (reference, _)), *others = fitted.items()
    for name, (model, _) in others:
        ours, theirs = reference.likelihood, model.likelihood
        if (ours.kind, ours.discrete) != (theirs.kind, theirs.discrete):
            raise ValueError(
                f"{name} and {first} give {_measure(theirs)} and {_measure(ours)}, "
                "which cannot be compared"
            )
        same = model.y.shape == reference.y.shape and np.allclose(
            model.y.double().cpu(), reference.y.double().cpu(), rtol=1e-5, atol=0
        )
        if not same:
            raise ValueError(
                f"{name} and {first} are models of other targets (other rows, another order, or "
                "other units): compare models of the same y"
            )
        if not torch.equal(model.counts_of(), reference.counts_of()):
            raise ValueError(f"{name} and {first} weigh their rows differently")


def _measure(likelihood: Any) -> str:
    if likelihood.kind == "classification":
        return "probabilities of classes"
    return "probabilities of counts" if likelihood.discrete else "densities"


def _prediction(fitted: Fitted, x: Any) -> Prediction:
    """Return what was compared: the posterior's average, before any calibration."""
    if isinstance(fitted, BayesianEstimator):
        plain = copy(fitted)
        plain.draws_ = replace(fitted.draws_, calibration=None)
        return plain.predict_dist(x)
    model, draws = fitted
    return predict(model, replace(draws, calibration=None), x)


def _row(score: Score) -> dict[str, Any]:
    """Return a line of the table as plain values."""
    failed = len(score.refitted) + len(score.unresolved)
    return {
        "elpd": score.elpd,
        "se": score.se,
        "p_loo": score.p_loo,
        "khat_max": None if score.khat is None else float(score.khat.max()),
        "khat_above": None if score.khat is None else failed,
        "refitted": len(score.refitted),
        "unresolved": len(score.unresolved),
        "difference": score.difference.elpd,
        "difference_se": score.difference.se,
        "standing": score.difference.standing,
        "stacking": score.stacking,
        "pseudo_bma": score.pseudo_bma,
        "log_evidence": score.log_evidence,
    }


def _cells(score: Score) -> list[str]:
    gap = score.difference
    to_best = "best"
    if gap.standing != "best":
        to_best = f"{gap.elpd:.1f} ± {gap.se:.1f} ({gap.standing})"
    failed = len(score.refitted) + len(score.unresolved)
    evidence = score.log_evidence
    return [
        f"{score.elpd:.1f} ± {score.se:.1f}",
        to_best,
        f"{score.stacking:.2f}",
        f"{score.pseudo_bma:.2f}",
        "" if score.p_loo is None else f"{score.p_loo:.1f}",
        "" if score.khat is None else str(failed),
        "" if evidence is None else f"{evidence[0]:.2f} ± {evidence[1]:.2f}",
    ]
