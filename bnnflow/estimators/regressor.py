"""The regressor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils.validation import check_array, column_or_1d
from torch import Tensor

from bnnflow import arguments
from bnnflow.estimators.base import BayesianEstimator, check_lengths
from bnnflow.estimators.likelihood import NAMES, choose
from bnnflow.estimators.table import names_of
from bnnflow.model import likelihoods

__all__ = ["BayesianMLPRegressor"]


class BayesianMLPRegressor(RegressorMixin, BayesianEstimator):
    """Regression with calibrated intervals: a Bayesian neural network for a table.

    A perceptron, or any ``network``, whose weights have a normal prior, and draws of its posterior.
    Columns are typed, categories encoded, inputs and targets standardised inside; predictions are
    in units of y.

    Args:
        network: widths of the hidden layers, for ``"auto"`` (16, 16), (32, 32) beyond 4,096 rows
            and (48, 48) beyond 16,384; or a module of your own, from the encoded columns ``(n,
            inputs)`` to the outputs that the likelihood needs, two a target for
            ``"heteroscedastic"`` and ``"heteroscedastic_student"``.
        activation: ``"relu"``, ``"tanh"``, ``"gelu"``, ``"silu"``, ``"elu"``, ``"sigmoid"``,
            ``"softplus"`` or ``"sin"``; ``"auto"`` is tanh.
        prior: the standard deviation of every weight, or one of `bnnflow.priors`; ``"auto"`` for
            `bnnflow.priors.OutputScales`, or N(0, 1) for a module of your own.
        likelihood: ``"auto"`` chooses by what y looks like, and says so in ``likelihood_``;
            ``"heteroscedastic"`` (normal noise that depends on the inputs),
            ``"heteroscedastic_student"`` (the same with tails that are learned), ``"normal"``,
            ``"student"``, ``"lognormal"`` and ``"gamma"`` for positive y, ``"poisson"`` and
            ``"negative_binomial"`` for counts, ``"ordinal"`` for a few whole numbers; or one of
            `bnnflow.likelihoods`, which then sees y as it is.
        method: ``"auto"``, or one of bnnflow's methods, such as ``bf.HMC()`` or ``bf.Laplace()``.
        budget: seconds after which ``"auto"`` begins no further chains; as many as are needed if
            None, so that the same ``random_state`` gives the same fit.
        n_draws: draws that are kept, evenly over all chains.
        random_state: an int, a ``RandomState``, or None for another fit each time.
        n_jobs: threads of torch; -1 or None for as many as torch takes by itself.
        progress: show bars at a terminal.

    Attributes:
        model_: the `bnnflow.BayesianModel`, whose x are the encoded rows and whose y are raw.
        draws_: the `bnnflow.Draws` that are kept.
        table_: how columns became inputs.
        target_names_: the names that y had; empty if it was an array.
        likelihood_: which likelihood was chosen, and why.

    Example:
        >>> import numpy as np
        >>> x = np.linspace(-2, 2, 80)[:, None]
        >>> y = 100 + 20 * np.sin(2 * x[:, 0])
        >>> fitted = BayesianMLPRegressor((8,), budget=1e-6).fit(x, y)
        >>> fitted.predict_interval(x[:3], level=0.9).shape
        (3, 2)
    """

    likelihood_: str
    _by_default = 2, "tanh"

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
            y: ``(n,)`` or ``(n, targets)``, in any units.
            sample_weight: how often each row counts, ``(n,)``: its likelihood to that power. They
                are not normalised.
            checkpoint: a folder in which chains are kept as they run: after a kill the same fit
                goes on from there, bit for bit.

        Raises:
            ValueError: naming what is wrong, before any work: missing values, targets that never
                change, settings that make no sense.
        """
        self._check_settings()
        columns = self._columns(X, reset=True)
        self.target_names_ = names_of(y)
        rows = self._rows(columns, _numbers(y, warn=True), sample_weight)
        targets = rows.y
        constant = (targets == targets[:1]).all(0)
        if constant.any():
            value, n = targets[0, constant.argmax()], len(targets)
            raise ValueError(f"y has only one value, {value:g}, in n_samples={n} rows")
        with np.errstate(over="ignore"):
            spread = targets.std(0)
        if not (np.isfinite(spread) & (spread > np.finfo(float).tiny)).all():
            raise ValueError(
                f"y has a standard deviation of {spread}: give it in other units"
            )
        choice = choose(self._likelihood(), targets)
        self.likelihood_ = f"{_named(choice.likelihood)}: {choice.why}"
        return self._fit(rows, choice.likelihood, choice.outputs, checkpoint)

    def _likelihood(self) -> Any:
        if isinstance(self.likelihood, likelihoods.Likelihood):
            return self.likelihood
        return arguments.choice("likelihood", self.likelihood, NAMES)

    # ---------------------------------------- predictions

    @overload
    def predict(self, X: Any, return_std: Literal[False] = False) -> np.ndarray: ...
    @overload
    def predict(
        self, X: Any, return_std: Literal[True]
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return the predictive mean, ``(n,)`` or ``(n, targets)``, in units of y.

        Args:
            X: ``(n, columns)``.
            return_std: return the predictive standard deviation, noise included, beside it.
        """
        prediction = self.predict_dist(X)
        mean = prediction.mean.numpy()
        return (mean, prediction.sd.numpy()) if return_std else mean

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return R^2 of the predictive mean; with several targets, their average.

        Args:
            X: ``(n, columns)``.
            y: ``(n,)`` or ``(n, targets)``.
            sample_weight: any weights of rows, ``(n,)``.

        Raises:
            ValueError: if y does not fit X or the targets of training.
        """
        mean, truth = self.predict(X), _numbers(y)
        check_lengths(len(mean), len(truth))
        mean = mean.reshape(len(mean), -1)
        if truth.shape != mean.shape:
            raise ValueError(
                f"y must hold {mean.shape[1]} target(s) as in training, got {truth.shape[1]}"
            )
        return float(r2_score(truth, mean, sample_weight=sample_weight))

    def predict_interval(self, X: Any, level: float = 0.9) -> np.ndarray:
        """Return the ends of the central interval that holds ``level`` of the probability.

        Returns:
            ``(n, 2)``, or ``(n, 2, targets)``: low and high.

        Raises:
            ValueError: for a level outside (0, 1).
        """
        level = arguments.number("level", level, above=0, below=1)
        return torch.stack(self.predict_dist(X).interval(level), 1).numpy()

    def predict_quantiles(self, X: Any, quantiles: Any = (0.05, 0.5, 0.95)) -> np.ndarray:
        """Return quantiles of the predictive distribution, noise included.

        Returns:
            ``(n, quantiles)``, or ``(n, quantiles, targets)``.

        Raises:
            ValueError: for quantiles outside (0, 1).
        """
        levels = np.atleast_1d(np.asarray(quantiles, dtype=np.float64))
        if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
            raise ValueError(
                f"quantiles must lie strictly between 0 and 1, got {quantiles}"
            )
        return self.predict_dist(X).quantile(levels.tolist()).movedim(0, 1).numpy()

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0) -> np.ndarray:
        """Draw targets from the predictive distribution, ``(n, n_samples)`` or
        ``(n, targets, n_samples)``.
        """
        n = arguments.integer("n_samples", n_samples, least=1)
        drawn = self.predict_dist(X).sample(
            n, seed=arguments.integer("random_state", random_state)
        )
        return drawn.movedim(0, -1).numpy()

    def _targets(self, y: Any) -> Tensor:
        return torch.from_numpy(_numbers(y))

    # ---------------------------------------- files

    def _fitted(self) -> dict[str, Any]:
        return {"likelihood": self.likelihood_}

    def _restore(self, fitted: dict[str, Any]) -> None:
        self.likelihood_ = fitted["likelihood"]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _numbers(y: Any, *, warn: bool = False) -> np.ndarray:
    """Return targets as ``(n, targets)``, float64; ``warn`` if a vector came as a column."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    try:
        y = check_array(y, ensure_2d=False, dtype="numeric", input_name="y", allow_nd=True)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=warn)
    except (TypeError, ValueError) as error:
        raise type(error)(f"y cannot be taken: {error}") from error
    if y.ndim not in (1, 2):
        raise ValueError(f"y must be (n,) or (n, targets), got {y.shape}")
    return y.astype(np.float64).reshape(len(y), -1)


def _named(likelihood: Any) -> str:
    """Return the name of a likelihood and of its base, if it has one."""
    base = getattr(likelihood, "base", None)
    return likelihood.name if base is None else f"{likelihood.name}({_named(base)})"
