"""Empirical Bayes: the precisions of a normal prior, one a tensor, at which the Laplace evidence is highest."""

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

__all__ = ["Expansion", "check_tunable", "tune_prior"]

_ROUNDS = 30
_GAIN = 1e-2  # nats of evidence for which another round is worth its price
_FACTOR = 4.0  # by which a precision may change in a round: the curvature is taken from where the round begins
_WIDEST = 1e12  # factor of the model's own precisions: beyond it a tensor is as good as zero, or as free


class Expansion(NamedTuple):
    """A model, its mode, and the Gaussian there."""

    model: BayesianModel
    mode: Tensor  # (dim,)
    precision: Tensor | None  # (k, k), or its diagonal (k,)
    posterior: Any
    log_evidence: float
    info: dict[str, Any]  # what the search for the mode says of itself


def check_tunable(model: BayesianModel) -> None:
    """Raise ``ValueError`` unless the model has a prior whose precisions can be tuned, and an evidence to tune them to.

    Learned parameters of the likelihood, such as the noise, are at their mode, as in any Laplace approximation.
    """
    if model.temperature != 1:
        raise ValueError("prior_precision='evidence' needs temperature 1: a tempered posterior has no evidence")
    if _normals(model) is None:
        raise ValueError(
            "prior_precision='evidence' is for normal priors of fixed scale, such as priors.Normal and priors.FanIn, "
            f"not {type(model.prior).__name__}"
        )


def _normals(model: BayesianModel) -> dict[str, Normal] | None:
    """Return the normal distribution of every tensor; None where a prior has others, or infers their parameters."""
    prior: Any = model.prior
    if not hasattr(prior, "distributions"):
        return None
    found = prior.distributions(model.spec.network)
    return found if all(type(each) is Normal for each in found.values()) else None


def tune_prior(
    first: Expansion, names: tuple[str, ...], expand: Callable[[BayesianModel, Tensor], Expansion]
) -> tuple[Expansion, dict[str, Any]]:
    """Maximise the Laplace evidence by the precisions of the prior, a factor for each tensor (MacKay 1992).

    The expansion at the mode gives the evidence for other precisions in closed form (Immer et al. 2021); it is
    maximised, the mode is found again, and so on until the evidence no longer rises. Exact for linear models with
    normal noise.

    Args:
        first: the model as it was given.
        names: tensors that ``precision`` is about, in the order of ``theta``; those of the network are tuned.
        expand: finds the mode of a model from a point near it, and the Gaussian there.

    Returns:
        The expansion with the highest evidence, and what ``draws.info`` says of it.
    """
    spec = first.model.spec
    own = _normals(first.model)
    assert own is not None
    tuned = tuple(name for name in names if name not in spec.extras)
    best, logs, reach, gradients = first, np.zeros(len(tuned)), math.log(_FACTOR), first.info["gradients"]
    for _ in range(_ROUNDS):
        found, theta = _Local(best, names, own, logs).maximise(logs, reach)
        factors = dict(zip(tuned, np.exp(found).tolist(), strict=True))
        there = expand(_with_precisions(first.model, own, factors), theta)
        gain, gradients = there.log_evidence - best.log_evidence, gradients + there.info["gradients"]
        if gain > 0:
            best, logs = there, found
        if abs(gain) < _GAIN or reach < 0.1:
            break
        reach = reach if gain > 0 else 0.25 * reach
    precisions = {
        name: math.exp(log) * float(own[name].scale.double().pow(-2).mean())
        for name, log in zip(tuned, logs, strict=True)
    }
    return best, {
        "prior_precision": precisions,
        "log_evidence_tuned": best.log_evidence,
        "gradients": gradients,
    }


def _with_precisions(model: BayesianModel, own: dict[str, Normal], factors: dict[str, float]) -> BayesianModel:
    """Return the model with the precisions of these tensors multiplied."""
    scaled = {name: (d.loc.double(), d.scale.double() * factors.get(name, 1.0) ** -0.5) for name, d in own.items()}
    return model.with_prior(priors.PerTensor({name: Normal(*each) for name, each in scaled.items()}))


class _Local:
    """The evidence by the precisions of the prior, with the likelihood as the Gaussian that it is at the mode.

    Args:
        at: the expansion there.
        names: tensors that its precision is about.
        own: the prior whose precisions are multiplied.
        logs: logarithms of the factors that the model at the mode has.
    """

    def __init__(self, at: Expansion, names: tuple[str, ...], own: dict[str, Normal], logs: np.ndarray) -> None:
        spec, theta = at.model.spec, at.mode
        assert at.precision is not None
        self._at, self._where = at, torch.cat([torch.arange(spec.dim)[spec.slices[name]] for name in names])
        groups, precisions, offsets = [], [], []
        for i, name in enumerate(names):
            values = theta[spec.slices[name]]
            group, precision, offset = torch.full(values.shape, -1), torch.zeros_like(values), torch.zeros_like(values)
            if name not in spec.extras:
                loc, scale = (
                    each.to(theta).expand(spec.shapes[name]).flatten() for each in (own[name].loc, own[name].scale)
                )
                group, precision, offset = torch.full(values.shape, i), scale.pow(-2), values - loc
            groups.append(group)
            precisions.append(precision)
            offsets.append(offset)
        self._group, self._own, self._offset = torch.cat(groups), torch.cat(precisions), torch.cat(offsets)
        self._sizes = np.array([int((self._group == i).sum()) for i in range(len(logs))])
        prior = self._prior(logs)
        self._dense = at.precision.dim() == 2
        self._likelihood = at.precision - (prior.diag() if self._dense else prior)
        pull = self._likelihood @ self._offset if self._dense else self._likelihood * self._offset
        self._pull = pull + prior * self._offset  # the gradient of the log likelihood at the prior's centre

    def _prior(self, logs: np.ndarray) -> Tensor:
        factors = torch.from_numpy(np.append(np.exp(logs), 0.0)).to(self._own)  # -1, of what has no factor, is the last
        return self._own * factors[self._group]

    def _solve(self, logs: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mode's offset from the prior's centre, the variances, and log |precision|."""
        prior = self._prior(logs)
        if not self._dense:
            precision = self._likelihood + prior
            return self._pull / precision, precision.reciprocal(), precision.log().sum()
        factor = torch.linalg.cholesky(self._likelihood + prior.diag())
        offset = torch.cholesky_solve(self._pull[:, None], factor).squeeze(1)
        return offset, torch.cholesky_inverse(factor).diagonal(), 2 * factor.diagonal().log().sum()

    def _negative(self, logs: np.ndarray) -> tuple[float, np.ndarray]:
        """Return minus the log evidence, up to a constant, and its gradient."""
        offset, variance, log_det = self._solve(logs)
        value = 0.5 * float(self._pull @ offset - log_det) + 0.5 * float(self._sizes @ logs)
        spread = self._prior(logs) * (offset.square() + variance)
        by_group = np.array([float(spread[self._group == i].sum()) for i in range(len(logs))])
        return -value, -0.5 * (self._sizes - by_group)

    def maximise(self, logs: np.ndarray, reach: float) -> tuple[np.ndarray, Tensor]:
        """Return the best logarithms within ``reach`` of ``logs``, and about where the mode then is, ``(dim,)``."""
        widest = math.log(_WIDEST)
        bounds = [(max(-widest, log - reach), min(widest, log + reach)) for log in logs]
        options = {"ftol": 1e-12, "gtol": 1e-8}
        found = scipy.optimize.minimize(
            self._negative, logs, jac=True, method="L-BFGS-B", bounds=bounds, options=options
        ).x
        moved = self._solve(found)[0] - self._offset
        return found, self._at.mode.index_add(0, self._where.to(moved.device), moved)
