"""What the estimators share: the way from a table to draws, and back to a table's units."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    check_random_state,
    validate_data,
)
from torch import Tensor, nn

from bnnflow import arguments
from bnnflow.activations import Sine
from bnnflow.diagnosis import diagnose
from bnnflow.draws import Draws
from bnnflow.estimators import storage
from bnnflow.estimators.recipe import LARGE, automatic
from bnnflow.estimators.table import Columns, Table, columns_of, is_frame, ordered
from bnnflow.inference import sample
from bnnflow.method import Method
from bnnflow.model import BayesianModel, priors
from bnnflow.model.likelihoods import Likelihood
from bnnflow.options import Checkpoint
from bnnflow.predictive import Prediction, calibrate, predict
from bnnflow.report import report, to_arviz
from bnnflow.seeding import isolated

if TYPE_CHECKING:
    from bnnflow.diagnosis import Diagnosis
    from bnnflow.report.html import Report

__all__ = ["BayesianEstimator", "check_lengths"]


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "sin": Sine,
}


class _Rows(NamedTuple):
    """A table as a model takes it."""

    x: np.ndarray  # encoded, (n, inputs)
    y: np.ndarray  # (n, targets) or labels (n,)
    weights: np.ndarray | None  # how often each counts, (n,)


class BayesianEstimator(BaseEstimator, ABC):
    """Fitting, diagnosis, reports and files; the regressor and the classifier add the rest."""

    model_: BayesianModel
    draws_: Draws
    table_: Table
    target_names_: list[str]
    n_features_in_: int
    _by_default: ClassVar[tuple[int, str]]  # hidden layers and activation for "auto"

    def __init__(
        self,
        network: tuple[int, ...] | nn.Module | str = "auto",
        *,
        activation: str = "auto",
        prior: Any = "auto",
        likelihood: Any = "auto",
        method: Any = "auto",
        budget: float | None = None,
        n_draws: int = 500,
        random_state: Any = 0,
        n_jobs: int | None = None,
        progress: bool = False,
    ) -> None:
        self.network = network
        self.activation = activation
        self.prior = prior
        self.likelihood = likelihood
        self.method = method
        self.budget = budget
        self.n_draws = n_draws
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.progress = progress

    # ---------------------------------------- fitting

    def _fit(
        self,
        rows: _Rows,
        likelihood: Likelihood,
        outputs: int,
        checkpoint: str | Path | None,
    ) -> Self:
        """Draw from the posterior of a network with so many outputs, given encoded rows."""
        generator = torch.Generator().manual_seed(self._seed())
        with self._threads():
            x = torch.as_tensor(rows.x, dtype=torch.float32)
            y, weights = torch.as_tensor(rows.y), rows.weights
            self.model_ = self._model(likelihood, x, y, outputs, weights)
            self.draws_ = self._thinned(self._sampled(generator, checkpoint))
            if self.method == "auto" and likelihood.kind == "classification":
                self.draws_ = calibrate(self._wide, self.draws_)
        return self

    def _model(
        self,
        likelihood: Any,
        x: Tensor,
        y: Tensor,
        outputs: int,
        row_weights: np.ndarray | None,
    ) -> BayesianModel:
        prior = self._prior(likelihood)
        with isolated(torch.Generator().manual_seed(0)):  # its weights are not used
            net = self._network(len(x), x.shape[1], outputs)
        return BayesianModel(net, prior, likelihood, x, y, row_weights=row_weights)

    def _prior(self, likelihood: Likelihood) -> Any:
        if isinstance(self.prior, int | float):
            return priors.Normal(self.prior)
        if self.prior != "auto":
            return self.prior
        ours = not isinstance(self.network, nn.Module)
        sized = ours and likelihood.kind == "regression"
        return priors.OutputScales() if sized else priors.Normal(1.0)

    def _network(self, rows: int, inputs: int, outputs: int) -> nn.Module:
        if isinstance(self.network, nn.Module):
            return self.network
        activation = self._activation()
        layers: list[nn.Module] = []
        for width in self._widths(rows):
            layers += [nn.Linear(inputs, width), activation()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))

    def _sampled(self, generator: torch.Generator, folder: str | Path | None) -> Draws:
        progress = self.progress
        if isinstance(self.method, Method):
            kept = folder and Checkpoint(folder, resume=True)
            return sample(
                self.model_, self.method, seed=generator, checkpoint=kept, progress=progress
            )
        return automatic(
            self.model_, generator, budget=self.budget, checkpoint=folder, progress=progress
        )

    def _thinned(self, draws: Draws) -> Draws:
        """Keep as many draws as were asked for, evenly."""
        step = max(1, draws.n_chains * draws.n_draws // self.n_draws)
        return replace(
            draws,
            theta=draws.theta[:, ::step].contiguous(),
            log_joint=draws.log_joint[:, ::step],
            stats={name: values[:, ::step] for name, values in draws.stats.items()},
            log_weights=None if draws.log_weights is None else draws.log_weights[:, ::step],
        )

    def _check_settings(self) -> None:
        """Raise ``ValueError`` for settings that make no sense, before any work."""
        if not isinstance(self.network, nn.Module):
            for width in self._widths(1):
                arguments.integer("network", width, least=1)
        self._activation()
        if self.method != "auto" and not isinstance(self.method, Method):
            raise ValueError(
                f"method must be 'auto' or one of bnnflow's, such as HMC(), got {self.method!r}"
            )
        if self.budget is not None:
            arguments.number("budget", self.budget, above=0)
        arguments.integer("n_draws", self.n_draws, least=1)

    def _widths(self, rows: int) -> tuple[int, ...] | list[int]:
        """Return the widths of the hidden layers for a table of so many rows."""
        if isinstance(self.network, tuple | list):
            return self.network
        if self.network == "auto":
            width = 16 if rows <= LARGE else 32 if rows <= 4 * LARGE else 48
            return (width,) * self._by_default[0]
        raise TypeError(
            "network must be the widths of hidden layers, such as (16, 16), 'auto' or a "
            f"torch.nn.Module, got {self.network!r}"
        )

    def _activation(self) -> Callable[[], nn.Module]:
        names = ("auto", *_ACTIVATIONS)
        name = arguments.choice("activation", self.activation, names)
        return _ACTIVATIONS[self._by_default[1] if name == "auto" else name]

    def _seed(self) -> int:
        if self.random_state is None:
            return torch.Generator().seed()
        if isinstance(self.random_state, int | np.integer):
            return arguments.integer("random_state", self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        """Let torch take as many threads as ``n_jobs`` says."""
        before = torch.get_num_threads()
        if self.n_jobs is not None:
            wanted = arguments.integer("n_jobs", self.n_jobs, least=-1)
            torch.set_num_threads(wanted if wanted > 0 else before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    # ---------------------------------------- tables

    def _columns(self, X: Any, *, reset: bool) -> Columns:
        """Return the columns of a table, checked; with ``reset`` their names are learned."""
        least = 2 if reset else 1
        if not is_frame(X):
            checks: Any = {"dtype": np.float64, "ensure_min_samples": least}
            try:
                return columns_of(validate_data(self, X, reset=reset, **checks))
            except (TypeError, ValueError) as error:
                raise type(error)(f"X cannot be taken: {error}") from error
        validate_data(self, X, reset=reset, skip_check_array=True)
        if len(X) < least:
            raise ValueError(f"X has {len(X)} row(s), and at least {least} are needed")
        return columns_of(X)

    def _rows(self, columns: Columns, y: np.ndarray, sample_weight: Any) -> _Rows:
        """Learn the table; return encoded rows and their targets in an order of their own."""
        check_lengths(len(next(iter(columns.values()))), len(y))
        weights = sample_weight
        if weights is not None:
            try:
                weights = _check_sample_weight(
                    weights, np.empty((len(y), 1)), dtype=np.float64
                )
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"sample_weight cannot be taken: {error}") from error
        rows, weights = ordered(columns, y, weights)
        columns = {name: values[rows] for name, values in columns.items()}
        self.table_ = Table.fit(columns)
        return _Rows(self.table_.transform(columns), y[rows], weights)

    def _encoded(self, X: Any) -> Tensor:
        check_is_fitted(self, "draws_")
        return torch.as_tensor(self.table_.transform(self._columns(X, reset=False)))

    def _unseen_rows(self, X: Any, y: Any) -> tuple[Tensor | None, Tensor | None]:
        """Return rows and targets as the model takes them, each None if it was not given.

        Raises:
            ValueError: for targets without rows, or another number of them.
        """
        check_is_fitted(self, "draws_")
        if y is not None and X is None:
            raise ValueError("y needs its X: give the rows of these targets")
        x = None if X is None else self._encoded(X).to(self.model_.dtype)
        targets = None if y is None else self.model_.targets(self._targets(y))
        if x is not None and targets is not None:
            check_lengths(len(x), len(targets))
        return x, targets

    # ---------------------------------------- predictions

    def predict_dist(self, X: Any) -> Prediction:
        """Return the predictive distribution of every row: quantiles, cdf, samples, densities.

        Args:
            X: ``(n, columns)``, as in training.
        """
        x = self._encoded(X)
        return predict(self._wide, self.draws_, x)

    @property
    def _wide(self) -> BayesianModel:
        """The model without rounding, so that a row's prediction does not depend on the rows beside
        it.
        """
        return self.model_.to(dtype=torch.float64)

    def diagnose(self, X: Any = None, y: Any = None) -> Diagnosis:
        """Say whether predictions may be used, the model fits, and what the draws are worth.

        See `bnnflow.diagnose`.

        Args:
            X: rows that were not fitted, ``(n, columns)``; those of training if None.
            y: their targets.
        """
        return diagnose(self.model_, self.draws_, *self._unseen_rows(X, y))

    def report(
        self,
        path: str | Path | None,
        X: Any = None,
        y: Any = None,
        *,
        targets: Sequence[str] | None = None,
        units: Sequence[str] | None = None,
    ) -> Report:
        """Write an HTML report on rows that were not fitted; see `bnnflow.report`.

        Args:
            path: the file; None writes none.
            X: rows, ``(n, columns)``; without them the page tells what the rows of training can.
            y: their targets.
            targets: name of each target; those that y had in training if None.
            units: of each target, as ``["EUR"]``.

        Raises:
            ValueError: for one of X and y without the other, or of another length.
        """
        x, truth = self._unseen_rows(X, y)
        if x is not None and truth is None:
            raise ValueError(
                "X needs its y: give the targets of these rows, or leave out both"
            )
        called = self.__repr__(N_CHAR_MAX=10**6)
        draws = replace(self.draws_, info=self.draws_.info | {"fitted": called})
        classes = self._coords().get("class")
        return report(
            self.model_,
            draws,
            x,
            truth,
            path,
            targets=targets or self.target_names_ or None,
            units=units,
            classes=None if classes is None else [str(label) for label in classes],
        )

    def to_arviz(self, X: Any = None, y: Any = None) -> Any:
        """Convert the draws for ArviZ, with names of inputs and classes, and targets in units of y;
        see `bnnflow.to_arviz`.

        Args:
            X: rows of the group ``predictions``; those of training if None.
            y: their targets.
        """
        return to_arviz(
            self.model_, self.draws_, *self._unseen_rows(X, y), coords=self._coords()
        )

    def _coords(self) -> dict[str, list[Any]]:
        """Return the names along axes of what is exported."""
        return {"input": self.table_.inputs}

    @abstractmethod
    def _targets(self, y: Any) -> Tensor:
        """Return targets as the model takes them."""

    # ---------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Write the fitted estimator to one file, which `bnnflow.load` reads in any process.

        It holds the settings, the draws and the rows of training, and no pickle.

        Raises:
            ValueError: for a ``network`` of your own, or another setting that a file cannot hold:
                pickle such an estimator.
        """
        check_is_fitted(self, "draws_")
        return storage.save(self, path)

    @abstractmethod
    def _fitted(self) -> dict[str, Any]:
        """Return what else a fit has learned, as plain values."""

    @abstractmethod
    def _restore(self, fitted: dict[str, Any]) -> None:
        """Take that back."""

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "draws_")


def check_lengths(rows: int, targets: int) -> None:
    """Raise ``ValueError`` unless X has as many rows as y."""
    if rows != targets:
        raise ValueError(f"X has {rows} rows and y has {targets}")
