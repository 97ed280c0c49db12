"""A mixture of the predictions of several models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnnflow.arguments import checked
from bnnflow.predictive.average import Chunk, Prediction

__all__ = ["Stacked", "stacked"]

_PASSES = 4  # over a grid of 16 points between the quantiles of the models


@dataclass(frozen=True, eq=False, repr=False)
class Stacked(Prediction):
    """The mixture p(y | x) = sum_k w_k p_k(y | x) of the predictions of several models, made by
    `stacked`.

    It has the whole interface of a `Prediction`. A draw of it is one of all draws of all models;
    ``theta`` says which, ``(draws, 2)``: the number of the model and of its draw. ``model`` and
    ``x`` are those of the first one.

    Attributes:
        parts: the predictions.
    """

    parts: tuple[Prediction, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.parts[0]):
            raise ValueError("the rows of a stacked prediction are those of its parts")

    def __repr__(self) -> str:
        """Say what is predicted in one line."""
        size = f"n={len(self)}, models={len(self.parts)}, draws={len(self.theta)}"
        return f"Stacked({size}, kind={self.kind!r})"

    def subset(self, rows: Tensor) -> Stacked:
        """Return the prediction of some rows, numbers ``(k,)``."""
        x = self.x[rows.to(self.x.device)]
        return replace(self, x=x, parts=tuple(part.subset(rows) for part in self.parts))

    def evaluated(self) -> Stacked:
        """Return the prediction with the outputs of the networks, where they are not too many."""
        return replace(self, parts=tuple(part.evaluated() for part in self.parts))

    @property
    def weights(self) -> Tensor:
        """The weight of each model, ``(models,)``."""
        shares = torch.zeros(len(self.parts), dtype=torch.float64)
        return shares.index_add(0, self.theta[:, 0], self.log_weights.exp().cpu())

    @property
    def _has_variance(self) -> bool:
        return all(part._has_variance for part in self.parts)

    def _chunks(self, theta: Tensor, index: Tensor | None = None) -> Iterator[Chunk]:
        """Yield the outputs of the draws ``theta`` ``(draws, 2)``, model by model."""
        chosen = theta if index is None else theta[index]
        log_weights = self.log_weights if index is None else self.log_weights[index]
        for number, part in enumerate(self.parts):
            own = (chosen[:, 0] == number).nonzero().squeeze(1)
            start = 0
            for chunk in part._chunks(part.theta, chosen[own, 1]):
                places = own[start : start + len(chunk.log_weights)]
                yield chunk._replace(log_weights=log_weights[places])
                start += len(places)

    def _sampled(self, index: Tensor, generator: torch.Generator) -> Tensor:
        drawn, places = [], []
        chosen = self.theta[index]
        for number, part in enumerate(self.parts):
            own = (chosen[:, 0] == number).nonzero().squeeze(1)
            if len(own):
                drawn.append(part._sampled(chosen[own, 1], generator))
                places.append(own)
        return torch.cat(drawn)[torch.cat(places).argsort()]

    def _inverted(self, levels: Tensor) -> Tensor:
        """Return quantiles: those of the mixture lie between the least and the largest of its
        parts.
        """
        each = torch.stack([part._inverted(levels) for part in self.parts])
        low, high = each.amin(0), each.amax(0)
        if self.discrete:
            return self._narrowed_counts(low - 1, high, levels)
        passes = torch.full_like(levels, _PASSES)
        return self._narrowed(torch.stack([low, high]), levels, passes)


@checked
def stacked(predictions: Sequence[Prediction], weights: Tensor) -> Stacked:
    """Mix predictions of the same rows.

    Args:
        predictions: of the same rows and the same kind of targets.
        weights: of each, ``(predictions,)``; they need not sum to one.

    Raises:
        ValueError: for no predictions, or predictions of other rows or other targets; for weights
            that are negative or all zero.

    Example:
        >>> from bnnflow import BayesianModel, likelihoods, predict, priors
        >>> x, parts = torch.linspace(-1, 1, 20)[:, None], []
        >>> for width in (2, 8):
        ...     layers = torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
        ...     net = torch.nn.Sequential(*layers)
        ...     model = BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.1), x, x.sin())
        ...     parts.append(predict(model, model.sample_prior(50, seed=0), x))
        >>> stacked(parts, torch.tensor([0.3, 0.7])).interval(0.9)[0].shape
        torch.Size([20])
    """
    weights = weights.double().cpu()
    if not predictions:
        raise ValueError("predictions must hold at least one")
    if weights.shape != (len(predictions),):
        raise ValueError(
            f"weights must be ({len(predictions)},), one for each prediction, "
            f"got {tuple(weights.shape)}"
        )
    if not bool((weights >= 0).all() & (weights.sum() > 0) & weights.isfinite().all()):
        raise ValueError("weights must not be negative, and not all be zero")
    kinds = {
        (each.kind, each.discrete, next(each.functions()).shape[1:]) for each in predictions
    }
    if len(kinds) > 1:
        raise ValueError(
            "predictions must be of the same rows and of the same kind of targets, got "
            + ", ".join(f"{each!r}" for each in predictions)
        )
    kept = [number for number, weight in enumerate(weights.tolist()) if weight > 0]
    parts = tuple(predictions[number] for number in kept)
    logs = (weights[kept] / weights.sum()).log()
    theta = torch.cat(
        [
            torch.stack(
                [torch.full((len(part.theta),), number), torch.arange(len(part.theta))], 1
            )
            for number, part in enumerate(parts)
        ]
    )
    first = parts[0]
    log_weights = torch.cat(
        [part.log_weights + log for part, log in zip(parts, logs.tolist(), strict=True)]
    )
    return Stacked(first.model, theta, log_weights, first.x, first.chunk_size, parts)
