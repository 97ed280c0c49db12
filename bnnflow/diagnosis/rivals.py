"""Predictions that take no skill: a constant law, and a linear model."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from bnnflow.model import BayesianModel

__all__ = ["left_out", "log_scores"]

CONSTANT, LINEAR = "a constant", "a linear model"
_COLUMNS = 500  # of inputs, beyond which no linear model is fitted
_ROWS = 5000  # of training, evenly spaced
_FOLDS = 5


def log_scores(model: BayesianModel, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return log densities ``(n,)`` of new rows by each rival, fitted to the model's rows.

    Numbers have the predictive law of a normal sample, and of least squares (both Student's);
    counts and levels their frequencies, smoothed, and labels theirs and those of logistic
    regression.
    """
    rows = model.some_rows(_ROWS)
    return _scores(model, _flat(model.x[rows]), _numpy(model.y[rows]), _flat(x), _numpy(y))


def left_out(model: BayesianModel, rows: Tensor) -> dict[str, Tensor]:
    """Return log densities of rows of training, numbers ``(n,)``, each by rivals of the other
    folds.
    """
    x, y = _flat(model.x[rows]), _numpy(model.y[rows])
    # copies of a row are in one fold
    fold = np.unique(rows.cpu().numpy(), return_inverse=True)[1] % _FOLDS
    found: dict[str, Tensor] = {}
    for each in range(min(_FOLDS, len(x))):
        out = fold == each
        for name, values in _scores(model, x[~out], y[~out], x[out], y[out]).items():
            found.setdefault(name, torch.zeros(len(x), dtype=torch.float64))
            found[name][torch.from_numpy(out)] = values
    return found


def _scores(
    model: BayesianModel, x: np.ndarray, y: np.ndarray, x_new: np.ndarray, y_new: np.ndarray
) -> dict[str, Tensor]:
    if model.likelihood.kind == "classification":
        found = _of_labels(model, x, y, x_new, y_new)
    elif model.likelihood.discrete:
        found = {CONSTANT: _frequencies(y, y_new)}
    else:
        found = {CONSTANT: _least_squares(x[:, :0], y, x_new[:, :0], y_new)}
        if x.shape[1] <= _COLUMNS and x.shape[1] < len(x) / 2:
            found[LINEAR] = _least_squares(x, y, x_new, y_new)
    return {name: torch.from_numpy(values) for name, values in found.items()}


def _least_squares(
    x: np.ndarray, y: np.ndarray, x_new: np.ndarray, y_new: np.ndarray
) -> np.ndarray:
    """Return Student's predictive density of a normal linear model, summed over targets."""
    from scipy.stats import t

    centre, spread = x.mean(0), x.std(0)
    keep = spread > 1e-9 * (1 + np.abs(centre))
    design, new = (
        np.column_stack([np.ones(len(each)), (each - centre)[:, keep] / spread[keep]])
        for each in (x, x_new)
    )
    # the slightest ridge, for columns that repeat one another
    gram = design.T @ design + 1e-8 * len(x) * np.eye(design.shape[1])
    weights = np.linalg.solve(gram, design.T @ y)
    freedom = max(1, len(x) - design.shape[1])
    variance = ((y - design @ weights) ** 2).sum(0) / freedom
    leverage = np.einsum("ij,jk,ik->i", new, np.linalg.inv(gram), new)
    scale = np.sqrt(np.maximum(variance, 1e-300) * (1 + leverage)[:, None])
    return t.logpdf(y_new, freedom, new @ weights, scale).sum(-1)


def _frequencies(y: np.ndarray, y_new: np.ndarray) -> np.ndarray:
    """Return log frequencies of whole numbers: half of what is seen, half a geometric law of the
    same mean.
    """
    total = np.zeros(len(y_new))
    for seen, new in zip(y.T, y_new.T, strict=True):
        low = min(seen.min(), new.min())
        counts = (seen[None] == new[:, None]).mean(1)
        share = 1 / (1 + (seen - low).mean())
        geometric = share * (1 - share) ** np.minimum(new - low, 1e4)
        total += np.log(np.maximum(0.5 * counts + 0.5 * geometric, 1e-300))
    return total


def _of_labels(
    model: BayesianModel, x: np.ndarray, y: np.ndarray, x_new: np.ndarray, y_new: np.ndarray
) -> dict[str, np.ndarray]:
    y, y_new = y.reshape(-1).astype(int), y_new.reshape(-1).astype(int)
    classes = int(max(y.max(), y_new.max())) + 1
    counts = np.bincount(y, minlength=classes) + 0.5
    found = {CONSTANT: np.log(counts / counts.sum())[y_new]}
    if x.shape[1] <= _COLUMNS and len(np.unique(y)) > 1:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # short of convergence it is a rival as well
            fitted = LogisticRegression(max_iter=200).fit(scaler.transform(x), y)
        probs = np.full((len(x_new), classes), 1e-6)
        probs[:, fitted.classes_] += fitted.predict_proba(scaler.transform(x_new))
        probs /= probs.sum(1, keepdims=True)
        found[LINEAR] = np.log(probs[np.arange(len(y_new)), y_new])
    return found


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().flatten(1).numpy()


def _numpy(y: Tensor) -> np.ndarray:
    return y.detach().double().cpu().reshape(len(y), -1).numpy()
