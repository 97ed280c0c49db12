"""Rows that count more or less than once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnnflow.model.likelihood import Kind, Likelihood, Score
from bnnflow.model.likelihoods.based import Based

__all__ = ["Weighted"]


@dataclass(frozen=True)
class Weighted(Based):
    """Another likelihood, each row to the power of its weight: a row of weight 2 counts twice.

    Weights are the last column of the targets, so that they go wherever these go: into
    mini-batches, blocks and subsets. A density is made of it; the model, whose targets are none of
    such, keeps the base.

    Args:
        base: the likelihood of a row that counts once.
        labels: whether its targets are int64 ``(n,)``.
    """

    base: Likelihood
    labels: bool
    wide_targets = True

    @classmethod
    def with_targets(
        cls, base: Likelihood, y: Tensor, row_weights: Tensor
    ) -> tuple[Weighted, Tensor]:
        """Return the likelihood and its targets ``(n, targets + 1)``, of those of the base."""
        columns = y.double().reshape(len(y), -1)
        return cls(base, y.dim() == 1), torch.cat([columns, row_weights[:, None]], 1)

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        """That of the base."""
        return self.base.kind

    @property
    def discrete(self) -> bool:  # type: ignore[override]
        """Whether those of the base are counts."""
        return self.base.discrete

    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the base's: a row is predicted as it is, however often it counted."""
        return self.base.mean(outputs, parameters)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``: the base's log density, times the weights."""
        y, weights = self.parts(y, outputs)
        return weights * self.base.log_prob(outputs, y, parameters)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the base's gradients, of weighted rows."""
        if parameters:  # whose gradients the base has summed over rows: automatic
            return super().score(outputs, y, parameters)
        y, weights = self.parts(y, outputs)
        by_outputs, _ = self.base.score(outputs, y, parameters)
        return weights.unsqueeze(-1) * by_outputs, {}

    def information(
        self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the base's `fisher_factor`, of weighted rows."""
        factor, others = self.base.fisher_factor(outputs, parameters)
        weights = self.parts(y, outputs)[1]
        roots = weights.sqrt()[..., None, None]
        # what does not depend on outputs is as large for every row
        others = {
            name: roots * each if each.dim() == 4 else weights.mean() * each
            for name, each in others.items()
        }
        return roots * factor, others

    def whitened_score(
        self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]
    ) -> Tensor:
        """Return the base's, of weighted rows."""
        y, weights = self.parts(y, outputs)
        whitened = self.base.whitened_score(outputs, y, parameters)
        return weights.sqrt().unsqueeze(-1) * whitened

    def parts(self, y: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return targets as the base takes them, and weights ``(..., n)``, in a type like that."""
        y, weights = y[..., :-1], y[..., -1].to(like.dtype)
        if self.labels:
            return y[..., 0].long(), weights
        return y if self.base.wide_targets else y.to(like.dtype), weights
