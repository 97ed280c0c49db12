"""The joint density of weights and data, and its gradient, for many networks at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bnnflow.arguments import tracked
from bnnflow.compiled import is_tracked, is_untracked_cpu, stratified_rows
from bnnflow.model.fused import FusedDensity, weights_of
from bnnflow.model.hessian import ChainHessian
from bnnflow.model.likelihood import Likelihood, Score
from bnnflow.model.linearised import LinearisedNetwork
from bnnflow.model.network import ChainNetwork, ModuleNetwork, Pullback
from bnnflow.model.priors import FlatPrior
from bnnflow.model.priors.marginals import unvalidated
from bnnflow.model.target import PosteriorTarget
from bnnflow.weights import WeightSpec

__all__ = ["LogJoint", "Network", "stretches"]

Network = ChainNetwork | ModuleNetwork | LinearisedNetwork

Evaluation = Callable[..., tuple[Tensor, ...]]
"""``(theta, x, y, per_network) -> (networks, ...)`` each."""


class LogJoint:
    """What a model says of weights: `BayesianModel` describes the methods that share its names.

    Args:
        spec: the layout of ``theta``.
        network: the batched network.
        likelihood: of a row of data.
        prior: along ``theta``.
        x: inputs, ``(n, ...)``.
        y: targets, as the likelihood validated them.
        temperature: by which both are divided.
        n_outputs: of the network.
    """

    def __init__(
        self,
        spec: WeightSpec,
        network: Network,
        likelihood: Likelihood,
        prior: FlatPrior,
        x: Tensor,
        y: Tensor,
        temperature: float,
        n_outputs: int,
    ) -> None:
        self.spec = spec
        self.network = network
        self.likelihood = likelihood
        self.prior = prior
        self.x = x
        self.y = y
        self.temperature = temperature
        self.n_outputs = n_outputs
        self.dtype = prior.dtype
        self.device = prior.device
        self.dim = spec.dim
        self.weights = spec.network.dim  # how many come first in theta
        self._places = {}  # of the likelihood's parameters
        for key in likelihood.parameters:
            name = f"likelihood.log_{key}"
            self._places[key] = (spec.slices[name], spec.shapes[name])
        self.n_parameters = sum(math.prod(shape) for _, shape in self._places.values())

    @property
    def over_weights(self) -> LogJoint:
        """What says the same of networks: itself, unless ``theta`` are latent points."""
        return self

    # ---------------------------------------- what is made once

    @cached_property
    def fused(self) -> FusedDensity | None:
        """The compiled density, where the network, the likelihood and the machine allow one."""
        return FusedDensity.of(self.spec, self.likelihood, self.prior, self.x, self.y)

    @cached_property
    def target(self) -> PosteriorTarget:
        """The log joint as chains move in it."""
        return PosteriorTarget(self, 1 / self.temperature, 1 / self.temperature)

    @cached_property
    def hessian(self) -> ChainHessian | None:
        """The second derivatives, where the network is a perceptron of moderate size."""
        return ChainHessian.of(self.spec, self.n_parameters)

    @cached_property
    def network_hessian(self) -> ChainHessian:
        """Second derivatives by the weights alone; only where there are such of the likelihood."""
        return ChainHessian(self.spec.network, 0)

    @property
    def has_gauss_newton_slope(self) -> bool:
        """Whether `Curvature.slope` returns anything, at no cost."""
        return self.hessian is not None and self.likelihood.has_fisher_factor

    def of_rows(self, x: Tensor, y: Tensor) -> LogJoint:
        """Return the same of other data."""
        given = (self.spec, self.network, self.likelihood, self.prior)
        return LogJoint(*given, x, y, self.temperature, self.n_outputs)

    # ---------------------------------------- values

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the learned parameters of the likelihood, positive, ``(..., *shape)`` each."""
        return {
            key: theta[..., where].unflatten(-1, shape).exp()
            for key, (where, shape) in self._places.items()
        }

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """Evaluate the network, ``(..., dim) -> (..., n, out)``."""

        def evaluate(flat: Tensor) -> Tensor:
            parts = self.in_blocks(
                lambda theta, x, y, per_network: (self.network(theta, x),), flat, x
            )
            return _joined([outputs for (outputs,) in parts], 1)

        return self._batched(evaluate, theta)

    def log_prior(self, theta: Tensor) -> Tensor:
        """Return the log prior density, untempered, ``(..., dim) -> (...)``."""
        return self.prior.log_prob(self.checked(theta))

    def log_likelihood(self, theta: Tensor) -> Tensor:
        """Return the log likelihood summed over the data, untempered, ``(..., dim) -> (...)``."""
        return self._batched(self._summed_log_likelihood, theta)

    def pointwise_log_likelihood(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the log likelihood of every row, ``(..., dim) -> (..., n)``."""

        def evaluate(flat: Tensor) -> Tensor:
            parts = self.in_blocks(self._log_likelihoods, flat, x, y)
            return _joined([values for (values,) in parts], 1)

        return self._batched(evaluate, theta)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the log likelihood of every row.

        What overflows in a distribution is no error, but a divergence.
        """
        with unvalidated():
            return self.likelihood.log_prob(outputs, y, parameters)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the likelihood's score, as `log_prob` with whatever parameters."""
        with unvalidated():
            return self.likelihood.score(outputs, y, parameters)

    # ---------------------------------------- gradients

    def log_likelihood_and_grad(
        self, theta: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what `BayesianModel.log_likelihood_and_grad` does."""
        theta = self.checked(theta)
        if fused := self.compiled(theta, rows):
            theta, rows, scale = self.batch(theta, rows)
            return fused(theta, rows, weights_of(scale, 0.0))
        value, grad = self._in_sum(self._value_and_grad, theta, rows)
        return value.reshape(theta.shape[:-1]), grad.reshape(theta.shape)

    def log_likelihood_grad(self, theta: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the gradient of the log likelihood alone, ``(..., dim) -> (..., dim)``.

        Differentiable again.
        """
        theta = self.checked(theta)
        if self.compiled(theta, rows):
            return self.log_likelihood_and_grad(theta, rows)[1]
        return self._in_sum(self._grad, theta, rows)[0].reshape(theta.shape)

    def log_joint_and_grad(
        self, theta: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log_joint and its gradient, ``(..., dim) -> (...), (..., dim)``.

        Differentiable again.

        ``rows`` choose mini-batches as in `log_likelihood_and_grad`; the prior is always counted
        once.
        """
        theta = self.checked(theta)
        if fused := self.compiled(theta, rows):
            theta, rows, scale = self.batch(theta, rows)
            weights = weights_of(scale / self.temperature, 1 / self.temperature)
            return fused(theta, rows, weights)
        value, grad = self.log_likelihood_and_grad(theta, rows)
        prior, prior_grad = self.prior.log_prob_and_grad(theta)
        return (value + prior) / self.temperature, (grad + prior_grad) / self.temperature

    def weighted_and_grad(self, theta: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return a weighted sum of log likelihood and log prior, and its gradient.

        Args:
            theta: ``(chain, dim)``.
            weights: of the two, float64 ``(chain, 2)``, or ``(1, 2)`` for all.
        """
        theta = self.checked(theta)
        if fused := self.compiled(theta, None):
            return fused(theta, None, weights)
        value, grad = self.log_likelihood_and_grad(theta)
        prior, prior_grad = self.prior.log_prob_and_grad(theta)
        ours, priors = weights.to(value.device).unbind(1)
        near, far = (each.to(grad.dtype)[:, None] for each in (ours, priors))
        return ours * value + priors * prior, near * grad + far * prior_grad

    def _log_likelihoods(
        self, theta: Tensor, x: Tensor, y: Tensor, per_network: bool
    ) -> tuple[Tensor]:
        outputs = self.network(theta, x, per_network=per_network)
        return (self.log_prob(outputs, y, self.parameters(theta)),)

    def _summed_log_likelihood(self, theta: Tensor) -> Tensor:
        def sums(*block: Any) -> tuple[Tensor]:
            return (self._log_likelihoods(*block)[0].sum(-1, dtype=torch.float64),)

        parts = self.in_blocks(sums, theta, self.x, self.y)
        return functools.reduce(torch.add, (values for (values,) in parts))

    def _grad(
        self, theta: Tensor, x: Tensor, y: Tensor, per_network: bool
    ) -> tuple[Tensor]:
        outputs, pullback = self.network.pullback(
            theta, x, per_network=per_network, reuse=True
        )
        return (self._pull(pullback, *self.score(outputs, y, self.parameters(theta))),)

    def _value_and_grad(
        self, theta: Tensor, x: Tensor, y: Tensor, per_network: bool
    ) -> tuple[Tensor, Tensor]:
        outputs, pullback = self.network.pullback(
            theta, x, per_network=per_network, reuse=True
        )
        parameters = self.parameters(theta)
        value = self.log_prob(outputs, y, parameters).sum(-1, dtype=torch.float64)
        return value, self._pull(pullback, *self.score(outputs, y, parameters))

    def _pull(
        self, pullback: Pullback, grad_outputs: Tensor, grad_parameters: dict[str, Tensor]
    ) -> Tensor:
        return self.with_parameters(pullback(grad_outputs), grad_parameters)

    # ---------------------------------------- mini-batches

    def minibatch_log_joint_and_grad(
        self, theta: Tensor, generator: torch.Generator, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Return `log_joint_and_grad` of rows drawn by `random_rows` for every network."""
        theta = self.checked(theta)
        self._check_batch_size(batch_size)
        if fused := self.compiled(theta, None):
            scale = len(self.x) / (batch_size * self.temperature)
            weights = weights_of(scale, 1 / self.temperature)
            return fused.minibatch(theta, generator, batch_size, weights)
        return self.log_joint_and_grad(
            theta, self.random_rows(theta.shape[:-1], generator, batch_size)
        )

    def random_rows(
        self, shape: tuple[int, ...], generator: torch.Generator, batch_size: int
    ) -> Tensor:
        """Draw the rows of mini-batches, int64 ``(*shape, batch_size)``: one from each stretch of
        the data.
        """
        self._check_batch_size(batch_size)
        n, device = len(self.x), self.x.device
        rows = stratified_rows(shape, batch_size, n, generator, self.dtype)
        if rows is not None:
            return rows
        where = torch.rand(
            *shape, batch_size, generator=generator, device=device, dtype=torch.float64
        )
        where = (where + torch.arange(batch_size, device=device)) * (n / batch_size)
        return where.long().clamp_(max=n - 1)

    def _check_batch_size(self, batch_size: int) -> None:
        if not 1 <= batch_size <= len(self.x):
            raise ValueError(
                f"batch_size must be between 1 and the {len(self.x)} rows of data, got {batch_size}"
            )

    def batch(
        self, theta: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None, float]:
        """Return checked weights, checked rows, ``(batch,)`` or ``(networks, batch)``, and n /
        batch.
        """
        theta = self.checked(theta)
        if rows is None:
            return theta, None, 1.0
        if rows.dtype != torch.int64 or rows.dim() == 0 or rows.shape[-1] == 0:
            raise ValueError(
                f"rows must be int64 (batch,) or (..., batch), got {rows.dtype} {tuple(rows.shape)}"
            )
        if rows.dim() > 1 and rows.shape[:-1] != theta.shape[:-1]:
            raise ValueError(
                f"rows {tuple(rows.shape)} do not fit theta {tuple(theta.shape)}"
            )
        return (
            theta,
            rows.flatten(0, -2) if rows.dim() > 1 else rows,
            len(self.x) / rows.shape[-1],
        )

    # ---------------------------------------- blocks of bounded memory

    def in_blocks(
        self,
        function: Evaluation,
        theta: Tensor,
        x: Tensor,
        y: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> list[tuple[Tensor, ...]]:
        """Evaluate ``function`` for all networks and rows: a block at a time where nothing follows
        derivatives.

        Args:
            function: called with theta, x, y and whether every network has rows of its own.
            theta: ``(networks, dim)``.
            x: inputs.
            y: targets.
            rows: which of them, int64 ``(m,)`` or ``(networks, m)``; all if None.

        Returns:
            Its results, ``(networks, ...)`` each, for one block of rows after the other.
        """
        n, per_network = (
            len(x) if rows is None else rows.shape[-1],
            rows is not None and rows.dim() > 1,
        )
        some, several = self.block_size(theta, x, n)
        found = []
        for part in stretches(n, some):
            data = None if per_network else _chosen(x, y, rows, part)
            results = [
                function(
                    theta[which], *(data or _chosen(x, y, rows, part, which)), per_network
                )
                for which in stretches(len(theta), several)
            ]
            found.append(tuple(_joined(each, 0) for each in zip(*results, strict=True)))
        return found

    def block_size(self, theta: Tensor, x: Tensor, n: int) -> tuple[int, int]:
        """Return how many of ``n`` rows, and how many networks, are evaluated at once."""
        whole = torch.compiler.is_compiling() or is_tracked(theta, x)
        return (n, len(theta)) if whole else self.network.at_once(x, n)

    def _in_sum(
        self, function: Evaluation, theta: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the results of a function of flattened ``theta``, summed over the rows and scaled
        to all of them.
        """
        theta, rows, scale = self.batch(theta, rows)
        parts = self.in_blocks(function, theta.reshape(-1, self.dim), self.x, self.y, rows)
        total = tuple(
            functools.reduce(torch.add, each) for each in zip(*parts, strict=True)
        )
        return total if scale == 1 else tuple(scale * each for each in total)

    def with_parameters(self, grad: Tensor, grad_parameters: dict[str, Tensor]) -> Tensor:
        """Append zeros for the prior's parameters and the gradient by the likelihood's:
        ``(batch, dim)``.
        """
        if self.dim == self.weights:
            return grad
        by_name = [grad_parameters[name].flatten(1) for name in self._places]
        missing = self.dim - self.weights - self.n_parameters
        return torch.cat([grad, grad.new_zeros(len(grad), missing), *by_name], -1)

    def compiled(self, theta: Tensor, rows: Tensor | None) -> FusedDensity | None:
        """Return the compiled density if it can be evaluated here: nothing may track
        derivatives.
        """
        ours = theta.dtype == self.dtype and (
            is_untracked_cpu(theta) if rows is None else is_untracked_cpu(theta, rows)
        )
        return self.fused if ours else None

    def checked(self, theta: Tensor) -> Tensor:
        """Return checked weights in the model's type and on its device.

        Their derivatives are kept.
        """
        theta = self.spec.check(theta)
        return (
            theta
            if theta.dtype == self.dtype
            else tracked("theta", theta).to(self.device, self.dtype)
        )

    def _batched(self, function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
        theta = self.checked(theta)
        result = function(theta.reshape(-1, self.dim))
        return result.reshape((*theta.shape[:-1], *result.shape[1:]))


def stretches(length: int, size: int) -> list[slice]:
    """Cut a length into stretches of at most this size; one at least."""
    return [slice(start, start + size) for start in range(0, max(length, 1), max(size, 1))]


def _chosen(
    x: Tensor,
    y: Tensor | None,
    rows: Tensor | None,
    part: slice,
    which: slice = slice(None),
) -> tuple[Tensor, Tensor | None]:
    """Return a part of the rows of data; those of some networks, where each has its own."""
    if rows is None and part.start == 0 and part.stop >= len(x):
        return x, y  # the very tensors, by which a linearised network knows them
    if rows is None:
        return x[part], None if y is None else y[part]
    index = rows[part] if rows.dim() == 1 else rows[which, part]

    def gathered(data: Tensor) -> Tensor:
        # One gather for all networks; index_select is several times faster than indexing by a
        # matrix.
        return data.index_select(0, index.flatten()).unflatten(0, index.shape)

    return gathered(x), None if y is None else gathered(y)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
