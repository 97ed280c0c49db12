"""Empirical Bayes: the precision of a normal prior at which the Laplace evidence is highest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor
from torch.distributions import Normal

from bnnflow.model import BayesianModel, priors
from bnnflow.progress import until_interrupted

__all__ = ["Expansion", "check_tunable", "tune_prior"]

_ROUNDS = 30
_GAIN = 1e-4  # nats of evidence for which another round is worth its price
# by which the precision may change in a round: the curvature is that where it begins
_FACTOR = 100.0
# factor of the model's own precision: beyond it all weights are as good as zero, or as free
_WIDEST = 1e12
_GRID = 401  # precisions that are compared before the best is made exact


class Expansion(NamedTuple):
    """A model, its mode, and the Gaussian there."""

    model: BayesianModel
    mode: Tensor  # (dim,)
    precision: Tensor | None  # (k, k), or its diagonal (k,)
    posterior: Any
    log_evidence: float
    info: dict[str, Any]  # what the search for the mode says of itself


def check_tunable(model: BayesianModel) -> None:
    """Raise ``ValueError`` unless the model has a prior whose precisions can be tuned, and an
    evidence to tune them to.

    Learned parameters of the likelihood, such as the noise, are at their mode, as in any Laplace
    approximation.
    """
    if model.temperature != 1:
        raise ValueError(
            "prior_precision='evidence' needs temperature 1: a tempered posterior has no evidence"
        )
    if _normals(model) is None:
        raise ValueError(
            "prior_precision='evidence' is for normal priors of fixed scale, such as priors.Normal "
            "and priors.FanIn, "
            f"not {model.prior.name}"
        )


def _normals(model: BayesianModel) -> dict[str, Normal] | None:
    """Return the normal distribution of every tensor.

    None where a prior has others, or infers their parameters.
    """
    if model.prior.has_parameters:
        return None
    found: dict[str, Any] = model.prior.distributions(model.spec.network)
    return found if all(type(each) is Normal for each in found.values()) else None


def tune_prior(
    first: Expansion,
    names: tuple[str, ...],
    expand: Callable[[BayesianModel, Tensor], Expansion],
) -> tuple[Expansion, dict[str, Any]]:
    """Maximise the Laplace evidence by one factor of all the prior's precisions (MacKay 1992).

    The expansion at the mode gives the evidence for other precisions in closed form (Immer et al.
    2021); it is maximised, the mode is found again, and so on until the evidence no longer rises.
    Exact for linear models with normal noise.

    A factor for each tensor reached a higher evidence on a classifier of digits, and worse
    predictions: it drove the first layer to where its activations are linear.

    Args:
        first: the model as it was given.
        names: tensors that ``precision`` is about, in the order of ``theta``; those of the network
            are tuned.
        expand: finds the mode of a model from a point near it, and the Gaussian there.

    Returns:
        The expansion with the highest evidence, after Ctrl-C of those so far, and what
        ``draws.info`` says of it.
    """
    own = _normals(first.model)
    assert own is not None
    tuned = tuple(name for name in names if name not in first.model.spec.extras)
    best, log, radius, gradients = first, 0.0, math.log(_FACTOR), first.info["gradients"]
    with until_interrupted(least=0) as taken:
        for _ in range(_ROUNDS):
            found, promised, theta = _Local(best, names, own, log).maximise(log, radius)
            if promised < _GAIN or radius < 0.1:
                break
            factors = dict.fromkeys(tuned, math.exp(found))
            try:
                there = expand(_with_precisions(first.model, own, factors), theta)
            except ValueError:  # no Gaussian there: too far
                radius = 0.25 * abs(found - log)
                continue
            gradients += there.info["gradients"]
            if there.info["interrupted"]:
                raise KeyboardInterrupt
            if there.log_evidence > best.log_evidence:
                best, log = there, found
            else:
                radius = 0.25 * abs(found - log)
    precisions = {
        name: math.exp(log) * float(own[name].scale.double().pow(-2).mean())
        for name in tuned
    }
    return best, {
        "prior_precision": precisions,
        "log_evidence_tuned": best.log_evidence,
        "gradients": gradients,
        "interrupted": taken.interrupted,
    }


def _with_precisions(
    model: BayesianModel, own: dict[str, Normal], factors: dict[str, float]
) -> BayesianModel:
    """Return the model with the precisions of these tensors multiplied."""
    scaled = {
        name: (d.loc.double(), d.scale.double() * factors.get(name, 1.0) ** -0.5)
        for name, d in own.items()
    }
    return model.with_prior(
        priors.PerTensor({name: Normal(*each) for name, each in scaled.items()})
    )


class _Local:
    """The evidence by the precision of the prior, with the likelihood as the Gaussian that it is at
    the mode.

    In coordinates in which the prior is N(0, I) its precision is A + a I, a the factor. One
    decomposition of A gives the evidence for every a; learned parameters of the likelihood are
    eliminated, each at its best for the weights.

    Args:
        at: the expansion there.
        names: tensors that its precision is about.
        own: the prior whose precisions are multiplied.
        log: logarithm of the factor that the model at the mode has.
    """

    def __init__(
        self, at: Expansion, names: tuple[str, ...], own: dict[str, Normal], log: float
    ) -> None:
        spec, theta = at.model.spec, at.mode
        assert at.precision is not None
        tuned = [name for name in names if name not in spec.extras]
        where = [
            torch.arange(spec.slices[name].start, spec.slices[name].stop) for name in names
        ]
        self._mode, self._where = theta, torch.cat(where).to(theta.device)
        loc, self._scale = (
            torch.cat(
                [
                    getattr(own[name], each).to(theta).expand(spec.shapes[name]).flatten()
                    for name in tuned
                ]
            )
            for each in ("loc", "scale")
        )
        k = len(loc)
        offset = (theta[self._where[:k]] - loc) / self._scale
        if at.precision.dim() == 1:
            self._vectors = self._others = None
            self._values = at.precision[:k] * self._scale.square() - math.exp(log)
        else:
            weights, coupling, others = (
                at.precision[:k, :k],
                at.precision[k:, :k],
                at.precision[k:, k:],
            )
            # by which the others follow the weights
            self._others = torch.linalg.solve(others, coupling)
            curvature = (
                self._scale[:, None] * (weights - coupling.T @ self._others) * self._scale
            )
            self._values, self._vectors = torch.linalg.eigh(curvature)
            self._values, offset = self._values - math.exp(log), self._vectors.T @ offset
        self._pull = (
            self._values + math.exp(log)
        ) * offset  # the gradient at the prior's centre

    def _evidence(self, logs: np.ndarray) -> np.ndarray:
        """Return the log evidences up to a constant, -inf where the curvature is not positive."""
        logs_ = torch.from_numpy(np.atleast_1d(logs)).to(self._values).unsqueeze(-1)
        precision = self._values + logs_.exp()
        terms = logs_ - precision.log() + self._pull.square() / precision
        return 0.5 * terms.sum(-1).nan_to_num(-math.inf, neginf=-math.inf).cpu().numpy()

    def maximise(self, log: float, radius: float) -> tuple[float, float, Tensor]:
        """Return the best logarithm within ``radius`` of ``log``, what it gains, and the mode then,
        ``(dim,)``.
        """
        widest = math.log(_WIDEST)
        grid = np.linspace(max(-widest, log - radius), min(widest, log + radius), _GRID)
        top = int(self._evidence(grid).argmax())
        bounds = grid[max(top - 1, 0)], grid[min(top + 1, _GRID - 1)]
        options: dict[str, Any] = {
            "bounds": bounds,
            "method": "bounded",
            "options": {"xatol": 1e-9},
        }
        search: Any = scipy.optimize.minimize_scalar(
            lambda each: -self._evidence(each)[0], **options
        )
        found = float(search.x)
        gain = float(self._evidence(np.array(found))[0] - self._evidence(np.array(log))[0])
        change = self._pull / (self._values + math.exp(found)) - self._pull / (
            self._values + math.exp(log)
        )
        moved = self._scale * (change if self._vectors is None else self._vectors @ change)
        others = moved[:0] if self._others is None else -self._others @ moved
        moved = torch.cat(
            [moved, others, moved.new_zeros(len(self._where) - len(moved) - len(others))]
        )
        return found, gain, self._mode.index_add(0, self._where, moved)
