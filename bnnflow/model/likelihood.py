"""The interface of likelihoods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from bnnflow.model.adapted import Adapted, Interface
from bnnflow.types import LikelihoodMembers

__all__ = ["Kind", "Likelihood", "Score", "labels_of", "real_targets"]

Kind = Literal["regression", "classification"]
Score = tuple[Tensor, dict[str, Tensor]]


class Likelihood(Interface, ABC):
    """The density of a row of data given the outputs: write ``log_prob`` and ``mean``, and what
    else you know.

    The rest has a default, or is said to be missing by what needs it: predictions need
    ``variance``, ``cdf`` and ``sample`` for intervals, Laplace and Gauss-Newton steps a
    ``fisher_factor``. ``outputs`` are ``(..., n, out)``. Parameters that are learned are positive
    and come as tensors ``(..., *shape)``, ``(..., 1)`` for a scalar.

    Attributes:
        kind: whether targets are numbers or classes.
        discrete: whether they are counts, so that the cdf is a step function.
        wide_targets: whether they are kept in float64 whatever the model computes in.
    """

    kind: Kind = "regression"
    discrete: bool = False
    wide_targets: bool = False

    @staticmethod
    def of(likelihood: LikelihoodMembers) -> Likelihood:
        """Return a likelihood itself, and any other object with the members of one as a
        likelihood.
        """
        return likelihood if isinstance(likelihood, Likelihood) else _Adapted(likelihood)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The prior of every learned parameter.

        Its batch shape is the parameter's. None by default.
        """
        return {}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return ``y`` in the shape and dtype that ``log_prob`` wants, or raise ``ValueError``.

        By default numbers ``(n, out)``, one for each output, or labels ``(n,)``, one class for each
        output.
        """
        return (labels_of if self.kind == "classification" else real_targets)(y, n_outputs)

    @abstractmethod
    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the log density of every row, ``(..., n, out) -> (..., n)``.

        ``y`` is what ``validate`` returned, or has an axis in front when every network has a
        mini-batch of its own.
        """

    @abstractmethod
    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the predictive mean given the weights, ``(..., n, out)``.

        For classes, their probabilities.
        """

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs, and by each log parameter over all rows: automatic,
        unless written.
        """

        def total(outputs: Tensor, logs: dict[str, Tensor]) -> Tensor:
            values = {name: log.exp() for name, log in logs.items()}
            return self.log_prob(outputs, y, values).sum()

        logs = {name: value.log() for name, value in parameters.items()}
        return torch.func.grad(total, argnums=(0, 1))(outputs, logs)

    # ---------------------------------------- what there may be

    @property
    def has_fisher_factor(self) -> bool:
        """Whether there is a `fisher_factor`."""
        return self._has("fisher_factor")

    @property
    def has_whitened_score(self) -> bool:
        """Whether there is a `whitened_score`."""
        return self._has("whitened_score")

    @property
    def has_variance(self) -> bool:
        """Whether there is a `variance`."""
        return self._has("variance")

    @property
    def has_sample(self) -> bool:
        """Whether there is a `sample`."""
        return self._has("sample")

    @property
    def is_bounded(self) -> bool:
        """Whether the density of a row has an upper bound over outputs and parameters, as
        probabilities have.
        """
        return self.discrete or self.kind == "classification"

    @property
    def can_draw(self) -> bool:
        """Whether targets can be drawn: classes by their probabilities, numbers by a `sample`."""
        return self.kind == "classification" or self.has_sample

    @property
    def has_cdf(self) -> bool:
        """Whether there is a `cdf`."""
        return self._has("cdf")

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs, and that of each log
        parameter.
        """
        raise self._lack("fisher_factor")

    def information(
        self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the `fisher_factor` of the rows that ``y`` are the targets of, which matters only
        where rows count differently.
        """
        return self.fisher_factor(outputs, parameters)

    def whitened_score(
        self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]
    ) -> Tensor:
        """Return b with R b the gradient by the outputs, ``(..., n, out)``.

        R as in `fisher_factor`.
        """
        raise self._lack("whitened_score")

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, out)``."""
        raise self._lack("variance")

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, out)``."""
        raise self._lack("cdf")

    def cdfs(
        self, outputs: Tensor, values: Tensor, parameters: dict[str, Tensor]
    ) -> Iterator[Tensor]:
        """Yield the `cdf` at each of several values of y, ``(k, n, targets)``."""
        for y in values:
            yield self.cdf(outputs, y, parameters)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, out)``."""
        raise self._lack("sample")

    def _has(self, member: str) -> bool:
        return getattr(type(self), member) is not getattr(Likelihood, member)

    def _lack(self, member: str) -> ValueError:
        return ValueError(f"{self.name} has no {member}, which this needs")


class _Adapted(Adapted, Likelihood):
    """An object with the members of a likelihood as one."""

    _optional = (
        "discrete",
        "score",
        "fisher_factor",
        "whitened_score",
        "variance",
        "cdf",
        "sample",
    )

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        return self._given.kind

    @property
    def parameters(self) -> dict[str, Distribution]:
        return self._given.parameters

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        return self._given.validate(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return self._given.log_prob(outputs, y, parameters)

    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return self._given.mean(outputs, parameters)


def real_targets(y: Tensor, n_targets: int) -> Tensor:
    """Return regression targets as ``(n, targets)``, checked."""
    # which holds every integer that is a measurement
    y = y if y.is_floating_point() else y.double()
    y = y.unsqueeze(-1) if y.dim() == 1 else y
    if y.dim() != 2 or y.shape[1] != n_targets:
        raise ValueError(
            f"y must be (n,) or (n, {n_targets}) for this network, got {tuple(y.shape)}"
        )
    return y


def labels_of(y: Tensor, n_classes: int) -> Tensor:
    """Return class labels as int64 ``(n,)``, checked."""
    y = y.squeeze(-1) if y.dim() == 2 and y.shape[1] == 1 else y
    if y.dim() != 1:
        raise ValueError(f"y must be class labels (n,), got {tuple(y.shape)}")
    labels = y.long()
    wrong = ((labels != y) | (labels < 0) | (labels >= n_classes)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"label {y[row].item()} in row {row} is not one of the classes 0 to {n_classes - 1}"
        )
    return labels
