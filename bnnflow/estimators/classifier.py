"""The classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor

from bnnflow import arguments
from bnnflow.estimators.base import BayesianEstimator, check_lengths
from bnnflow.estimators.table import names_of
from bnnflow.model import likelihoods

__all__ = ["BayesianMLPClassifier"]


class BayesianMLPClassifier(ClassifierMixin, BayesianEstimator):
    """Classification with calibrated probabilities: a Bayesian neural network for a table.

    A perceptron, or any ``network``, whose weights have a normal prior, and draws of its posterior.
    Columns are typed, categories encoded and inputs standardised inside.

    Args:
        network: widths of the hidden layers, for ``"auto"`` (16,), (32,) beyond 4,096 rows and
            (48,) beyond 16,384; or a module of your own, from the encoded columns ``(n, inputs)``
            to an output for every class.
        activation: see `BayesianMLPRegressor`; ``"auto"`` is ReLU.
        prior: the standard deviation of every weight, 1 for ``"auto"``, or one of
            `bnnflow.priors`.
        likelihood: ``"auto"`` for `bnnflow.likelihoods.Categorical`; ``"ordinal"`` if the classes,
            as they are sorted, have an order.
        method: see `BayesianMLPRegressor`.
        budget: see `BayesianMLPRegressor`.
        n_draws: draws that are kept, evenly over all chains.
        random_state: an int, a ``RandomState``, or None for another fit each time.
        n_jobs: threads of torch; -1 or None for as many as torch takes by itself.
        progress: show bars at a terminal.

    Attributes:
        classes_: the labels, sorted.
        model_: the `bnnflow.BayesianModel`, whose x are the encoded rows.
        draws_: the `bnnflow.Draws` that are kept. After ``method="auto"`` they have a
            ``calibration`` where leave-one-out says that probabilities are not sure enough, or too
            sure: all predictions follow it.
        calibration_: the same in words.
        table_: how columns became inputs.
        target_names_: the names that y had; empty if it was an array.

    Example:
        >>> import numpy as np
        >>> x = np.linspace(-2, 2, 80)[:, None]
        >>> y = np.where(x[:, 0] > 0, "right", "left")
        >>> fitted = BayesianMLPClassifier((8,), budget=1e-6).fit(x, y)
        >>> fitted.predict(x[[0, -1]]).tolist()
        ['left', 'right']
    """

    classes_: np.ndarray
    _by_default = 1, "relu"

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        checkpoint: str | Path | None = None,
    ) -> Self:
        """Draw from the posterior of the network.

        Args:
            X: a frame of pandas or polars, or an array ``(n, columns)``.
            y: labels ``(n,)``: numbers, words or booleans.
            sample_weight: how often each row counts, ``(n,)``: its likelihood to that power. They
                are not normalised.
            checkpoint: a folder in which chains are kept as they run: after a kill the same fit
                goes on from there, bit for bit.

        Raises:
            ValueError: naming what is wrong, before any work: missing values, one class only,
                settings that make no sense.
        """
        self._check_settings()
        arguments.choice("likelihood", self.likelihood, ("auto", "ordinal"))
        columns = self._columns(X, reset=True)
        self.target_names_ = names_of(y)
        y = _labels(y, warn=True)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        rows = self._rows(columns, labels, sample_weight)
        labels = rows.y
        if len(np.unique(labels)) < 2:
            only = self.classes_[labels[0]].item()
            raise ValueError(f"y has one class only, {only!r}: there is nothing to learn")
        count = len(self.classes_)
        if self.likelihood == "ordinal" and count > 2:
            return self._fit(rows, likelihoods.Ordinal(count), 1, checkpoint)
        return self._fit(rows, likelihoods.Categorical(), count, checkpoint)

    @property
    def calibration_(self) -> str:
        """How probabilities were calibrated."""
        check_is_fitted(self, "draws_")
        return str(self.draws_.calibration or "none: probabilities are those of the draws")

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable label of every row, ``(n,)``."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities of ``classes_``, ``(n, classes)``."""
        return self.predict_dist(X).probs.numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithms of `predict_proba`."""
        return np.log(self.predict_proba(X))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the share of rows whose most probable label is theirs.

        Args:
            X: ``(n, columns)``.
            y: labels ``(n,)``; one that training never saw is missed.
            sample_weight: any weights of rows, ``(n,)``.

        Raises:
            ValueError: if y has another length than X.
        """
        best, truth = self.predict(X), _labels(y)
        check_lengths(len(best), len(truth))
        return float(accuracy_score(truth, best, sample_weight=sample_weight))

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0) -> np.ndarray:
        """Draw labels from the predictive distribution, ``(n, n_samples)``."""
        n = arguments.integer("n_samples", n_samples, least=1)
        drawn = self.predict_dist(X).sample(
            n, seed=arguments.integer("random_state", random_state)
        )
        return self.classes_[drawn.T.numpy()]

    def _coords(self) -> dict[str, list[Any]]:
        return super()._coords() | {"class": self.classes_.tolist()}

    def _targets(self, y: Any) -> Tensor:
        numbers = {label: number for number, label in enumerate(self.classes_.tolist())}
        labels = column_or_1d(y).tolist()
        unseen = list(dict.fromkeys(label for label in labels if label not in numbers))
        if unseen:
            raise ValueError(f"y has labels that training never saw: {unseen[:5]}")
        return torch.tensor([numbers[label] for label in labels])

    # ---------------------------------------- files

    def _fitted(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist(), "dtype": self.classes_.dtype.str}

    def _restore(self, fitted: dict[str, Any]) -> None:
        self.classes_ = np.asarray(fitted["classes"], dtype=fitted["dtype"])


def _labels(y: Any, *, warn: bool = False) -> np.ndarray:
    """Return labels as ``(n,)``; ``warn`` if they came as a column."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    labels = column_or_1d(y, warn=warn)
    if any(label is None or label != label for label in labels):
        raise ValueError("Input y contains NaN: labels are missing")
    return labels
