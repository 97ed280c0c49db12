"""The Bayesian model: a network, a prior, a likelihood and data, as one density over flat weights."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bnnflow.arguments import Count, Positive, checked, columns_of, finite, tensor, tracked
from bnnflow.forward_mode import jvp
from bnnflow.identity import Identity
from bnnflow.model.arrowhead import Arrowhead
from bnnflow.model.factored import ClosedFactor, FactoredJacobian
from bnnflow.model.fused import FusedDensity, plain, recorded, stratified_rows
from bnnflow.model.hessian import ChainHessian, Curvature
from bnnflow.model.likelihood import Likelihood
from bnnflow.model.linearised import LinearisedNetwork
from bnnflow.model.network import ChainNetwork, ModuleNetwork, Pullback, at_once
from bnnflow.model.priors import FixedPrior, FlatPrior, HierarchicalPrior, Prior, as_prior
from bnnflow.model.priors.hyperparameters import Hyperparameter
from bnnflow.model.priors.marginals import unvalidated
from bnnflow.model.probe import check_outputs, probe, probe_likelihood
from bnnflow.model.pyro import pyro_model
from bnnflow.seeding import isolated
from bnnflow.types import LikelihoodMembers, Seed
from bnnflow.weights import Symmetries, WeightSpec, free_parameters

__all__ = ["BayesianModel"]

_FINGERPRINTS = 2  # version of what they cover; those of version 1 have no number


_State = list[tuple[Tensor, int]]


@checked
class BayesianModel:
    """What is inferred: p(theta) p(y | net(x; theta)), with every constant.

    ``theta`` holds the network's weights in ``named_parameters()`` order, then the parameters of the prior that are
    inferred (logarithms of positive ones), then the logarithm of every likelihood parameter that is learned; all
    coordinates are unconstrained. Densities are summed over the data, carry the log-Jacobian of each constraint, and
    are accumulated in float64.

    Args:
        net: any module that maps ``(n, ...)`` inputs to ``(n, out)`` outputs; perceptrons take a fast path. The
            parameters that require gradients are inferred, and their values neither used nor changed. The others
            (``requires_grad=False``) are constants, as buffers are: a trained trunk under a head to be inferred, or
            batch normalisation, which is accepted in ``eval()`` mode.
        prior: a `Prior`, one torch or Pyro distribution for every weight, or a dict of them by
            tensor name.
        likelihood: a `Likelihood`.
        x: inputs, ``(n, ...)``, tensor or array, already standardised as the prior assumes. Integers become
            floating-point numbers unless the network needs them as they are, as an embedding does.
        y: targets, ``(n,)`` or ``(n, targets)``.
        temperature: the posterior is p(theta | x, y) ** (1 / temperature): prior and likelihood are tempered together.

    Raises:
        ValueError: for empty data, NaN or infinite rows, mismatched lengths, labels out of range or of one class
            only, constant targets, layers that mix rows or are random, and networks that do not fit the likelihood.

    Example:
        >>> from bnnflow import likelihoods, priors
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
        >>> model = BayesianModel(net, priors.Normal(1.0), likelihoods.Gaussian(0.1), x, x.sum(1))
        >>> model.log_joint(model.sample_prior(3, seed=0)).shape
        torch.Size([3])
    """

    # Of a model in another floating-point type: the fingerprint of what it was converted from, and its own data.
    _origin: tuple[str, _State] | None = None
    _network_of: str | None = None  # of a linearised model: the fingerprint of the model that it expands
    _recognised: tuple[str, _State] | None = None  # of what draws, with which data, it was last said that they are ours

    def __init__(
        self,
        net: nn.Module,
        prior: Prior | FixedPrior | HierarchicalPrior | Distribution | Mapping[str, Distribution],
        likelihood: Likelihood | LikelihoodMembers,
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        *,
        temperature: Positive = 1.0,
    ) -> None:
        _check_modules(net)
        parameter = next(iter(free_parameters(net).values()))
        _check_parameters(net)
        _check_gradients(net)
        self._dtype, self._device = parameter.dtype, parameter.device
        self._columns = columns_of(x)
        x, y = _check_data(x, y)
        self.net = _copied(net)
        self.net.zero_grad(set_to_none=True)
        self.prior = as_prior(prior)
        self.likelihood = Likelihood.of(likelihood)
        self.temperature = temperature
        try:
            network_spec = WeightSpec.of(copy.deepcopy(self.net))  # what tracing runs may change it
        except ValueError as error:
            network_spec = WeightSpec.unlabelled(net, str(error))
        self._anchor: Tensor | None = None  # where the network is linearised
        own = Hyperparameter.of_prior(self.prior, network_spec)
        self.hyperparameters = own + Hyperparameter.of_likelihood(self.likelihood.parameters)
        axes = {extra.name: network_spec.parameter_axes(extra.key, extra.shape) for extra in own}
        self.spec = network_spec.extend({extra.name: extra.shape for extra in self.hyperparameters}, axes)
        self._architecture = self.spec  # says how to evaluate the network, where the spec of a linearised one does not
        known = self.spec.layers and all(_of_torch(module) for module in net.modules())
        fresh = None if known else copy.deepcopy(self.net)  # never called, which may change it
        self.x, self._n_outputs = self._accepted(x.to(self._device))
        self._written = frozenset() if fresh is None else probe(fresh, self.x)
        y = self.likelihood.validate(y, self._n_outputs)
        if len(y) != len(self.x):
            raise ValueError(f"the likelihood's validate must keep the {len(self.x)} rows of y, got {len(y)}")
        _check_informative(y)
        self.y = _placed("y", y, self._device, self._dtype)
        self.flat_prior = FlatPrior.of(self.prior, self.spec, self.hyperparameters).to(self._device, self._dtype)
        self._check_likelihood()

    @property
    def dim(self) -> int:
        """Length of ``theta``."""
        return self.spec.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the data and of ``theta``."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self._device

    @checked
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BayesianModel:
        """Return the same model on another device or in another floating-point type."""
        moved = copy.copy(self)
        moved._device, moved._dtype = torch.device(device or self.device), dtype or self.dtype
        moved.net = copy.deepcopy(self.net).to(moved._device, moved._dtype)
        moved.x, moved.y = (
            _placed(name, data, moved._device, moved._dtype) for name, data in (("x", self.x), ("y", self.y))
        )
        moved.flat_prior = self.flat_prior.to(moved._device, moved._dtype)
        moved._anchor = None if self._anchor is None else self._anchor.to(moved._device, moved._dtype)
        moved._network_of = self._network_of
        if moved._dtype != self._dtype or self._origin is not None:  # values may have been rounded
            moved._origin = (self.fingerprint(), moved._state())
        return moved

    @cached_property
    def network(self) -> ChainNetwork | ModuleNetwork | LinearisedNetwork:
        """The batched network: the fast path for perceptrons, ``vmap`` for the rest."""
        spec = self._architecture
        network = ChainNetwork(spec) if spec.layers else ModuleNetwork(self.net, spec)
        return network if self._anchor is None else LinearisedNetwork(network, self._anchor)

    @cached_property
    def _fused(self) -> FusedDensity | None:
        """The compiled density, where the network, the likelihood and the machine allow one."""
        if self._anchor is not None:
            return None
        return FusedDensity.of(self.spec, self.likelihood, self.flat_prior, self.x, self.y)

    @property
    def is_compiled(self) -> bool:
        """Whether gradients are computed by compiled code, whose last bits are not those of torch."""
        return self._fused is not None

    @cached_property
    def _hessian(self) -> ChainHessian | None:
        """The second derivatives, where the network is a perceptron of moderate size."""
        return None if self._anchor is not None else ChainHessian.of(self.spec, self._n_parameters)

    @cached_property
    def _network_hessian(self) -> ChainHessian:
        """Second derivatives by the weights alone; only where there are such of the likelihood."""
        return ChainHessian(self.spec.network, 0)

    @property
    def has_hessian(self) -> bool:
        """Whether `log_likelihood_hessian` returns anything, at no cost."""
        return self._hessian is not None

    @property
    def has_gauss_newton_slope(self) -> bool:
        """Whether `gauss_newton_slope` returns anything, at no cost."""
        return self.has_hessian and self.likelihood.has_fisher_factor

    @property
    def _of_prior(self) -> list[Hyperparameter]:
        return [each for each in self.hyperparameters if each.owner == "prior"]

    @property
    def _of_likelihood(self) -> list[Hyperparameter]:
        return [each for each in self.hyperparameters if each.owner == "likelihood"]

    @property
    def _n_parameters(self) -> int:
        """Length of the end of ``theta`` that belongs to the likelihood."""
        return sum(math.prod(extra.shape) for extra in self._of_likelihood)

    def __copy__(self) -> BayesianModel:
        """Copy without what was made for this model's data, since a copy is there to become another."""
        made = ("network", "_fused", "_hessian", "_network_hessian", "_origin", "_network_of", "_recognised")
        copied = object.__new__(type(self))
        copied.__dict__ = {name: value for name, value in self.__dict__.items() if name not in made}
        return copied

    @checked
    def linearised(self, theta: Tensor) -> BayesianModel:
        """Return the model whose network is its own first-order expansion at ``theta``.

        outputs(theta', x) = f(x; theta) + J(x) (theta' - theta), the model of linearised Laplace predictions
        (Immer, Korzepa & Bauer 2021); prior, likelihood, data and temperature are the same. Its function has none of
        the network's symmetries, and its spec claims none. The expansion of a linearised model is itself.

        Args:
            theta: the point of expansion, ``(dim,)``; parameters of prior and likelihood in it have no effect.

        Raises:
            ValueError: if theta is not ``(dim,)``.
        """
        self.spec.check(theta)
        if theta.dim() != 1:
            raise ValueError(f"theta must be ({self.dim},), got {tuple(theta.shape)}")
        if self._anchor is not None:
            return self
        moved = copy.copy(self)
        moved._network_of = self.fingerprint()
        moved._anchor = theta.detach().to(self.device, self.dtype)
        network_spec = WeightSpec.unlabelled(self.net, unknown="")
        moved.spec = network_spec.extend({extra.name: extra.shape for extra in self.hyperparameters})
        return moved

    def with_prior(self, prior: Prior) -> BayesianModel:
        """Return the same model with another prior, of fixed distributions as its own.

        Raises:
            ValueError: if one of the two priors has parameters that are inferred: ``theta`` would be another vector.
        """
        prior = as_prior(prior)
        if self._of_prior or prior.parameters(self.spec.network):
            raise ValueError("a prior with inferred parameters cannot take another's place: make a model with it")
        changed = copy.copy(self)
        changed.prior = prior
        changed.flat_prior = FlatPrior.of(prior, self.spec, self.hyperparameters).to(self.device, self.dtype)
        return changed

    def symmetries(self) -> Symmetries:
        """Return the symmetries of the posterior: those of the network's function that keep the prior."""
        return self.prior.symmetries(self.spec)

    def known_symmetries(self) -> Symmetries:
        """Return `symmetries` for what cannot do without.

        Raises:
            ValueError: if the network could not be labelled, with the module or operation that is the reason.
        """
        self.spec.known_symmetries()
        return self.symmetries()

    # ---------------------------------------------------------------- evaluation

    def outputs(self, theta: Tensor, x: Tensor | np.ndarray | None = None) -> Tensor:
        """Evaluate the network, ``(..., dim) -> (..., n, out)``.

        Args:
            theta: weights.
            x: inputs; the training inputs if None.

        Raises:
            ValueError: if theta or x has the wrong shape, or x has NaN or infinite rows.
        """
        x = self.inputs(x)

        def evaluate(flat: Tensor) -> Tensor:
            parts = self._in_blocks(lambda theta, x, y, per_network: (self.network(theta, x),), flat, x)
            return _joined([outputs for (outputs,) in parts], 1)

        return self._batched(evaluate, theta)

    def inputs(self, x: Tensor | np.ndarray | None, name: str = "x") -> Tensor:
        """Return checked inputs, called ``name``, on the model's device; the training inputs for None."""
        if x is None or x is self.x:
            return self.x
        columns = columns_of(x)
        if columns and self._columns and columns != self._columns:
            said = (", ".join(map(repr, names)) for names in (self._columns, columns))
            raise ValueError("{} must have the columns of training, {}, got {}".format(name, *said))
        x = tensor(name, x, device=self.device)
        if not self.x.is_floating_point() and (x.is_floating_point() or x.dtype == torch.bool):
            raise ValueError(f"{name} must hold integers as in training, got {x.dtype}")
        x = x.to(self.x.dtype)
        if x.dim() == 0 or x.shape[1:] != self.x.shape[1:]:
            raise ValueError(
                f"{name} must be (n, {', '.join(map(str, self.x.shape[1:]))}) as in training, got {tuple(x.shape)}"
            )
        if len(x) == 0:
            raise ValueError(f"{name} has no rows")
        finite(name, x)
        if not x.is_floating_point():
            self._probe(x)  # an index beyond the table of an embedding is found out here
        return x

    def likelihood_parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the learned likelihood parameters, positive, ``(..., *shape)`` each; the shape of a scalar is (1,)."""
        return {
            extra.key: theta[..., self.spec.slices[extra.name]].unflatten(-1, extra.shape).exp()
            for extra in self._of_likelihood
        }

    def log_prior(self, theta: Tensor) -> Tensor:
        """Return the log prior density of ``theta``, untempered, ``(..., dim) -> (...)``."""
        return self.flat_prior.log_prob(self._weights(theta))

    def log_likelihood(self, theta: Tensor) -> Tensor:
        """Return the log likelihood summed over the data, untempered, ``(..., dim) -> (...)``."""
        return self._batched(self._summed_log_likelihood, theta)

    def log_joint(self, theta: Tensor) -> Tensor:
        """Return (log prior + log likelihood) / temperature, ``(..., dim) -> (...)``."""
        return (self.log_prior(theta) + self.log_likelihood(theta)) / self.temperature

    def pointwise_log_likelihood(
        self, theta: Tensor, x: Tensor | np.ndarray | None = None, y: Tensor | np.ndarray | None = None
    ) -> Tensor:
        """Return the log likelihood of every row, ``(..., dim) -> (..., n)``; training data if x and y are None."""
        x, y = self.inputs(x), self.targets(y)
        if len(x) != len(y):
            raise ValueError(f"y must have a value for each of the {len(x)} rows of x, got {len(y)}")

        def evaluate(flat: Tensor) -> Tensor:
            parts = self._in_blocks(self._log_likelihoods, flat, x, y)
            return _joined([values for (values,) in parts], 1)

        return self._batched(evaluate, theta)

    def targets(self, y: Tensor | np.ndarray | None, name: str = "y") -> Tensor:
        """Return checked targets, called ``name``, on the model's device; the training targets for None."""
        if y is None or y is self.y:
            return self.y
        y = tensor(name, y)
        if y.dim() == 0 or len(y) == 0:
            raise ValueError(f"{name} has no rows")
        try:
            y = self.likelihood.validate(finite(name, y), self._n_outputs)
        except ValueError as error:
            raise ValueError(str(error) if name == "y" else f"{name}: {error}") from None
        return y.to(self.device, self.dtype if y.is_floating_point() else None)

    def log_likelihood_and_grad(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the log likelihood and its gradient, ``(..., dim) -> (...), (..., dim)``; differentiable again.

        Args:
            theta: weights.
            rows: int64 indices of the rows of data to use, ``(batch,)`` for all networks or ``(..., batch)`` with a
                batch for each; all the data if None. Both results are multiplied by n / batch, which makes them
                unbiased for the full ones if every row is equally likely.

        Raises:
            ValueError: if theta or rows has the wrong shape or dtype.
        """
        theta = self._weights(theta)
        if fused := self._compiled(theta, rows):
            theta, rows, scale = self._batch(theta, rows)
            return fused(theta, rows, scale, 0.0)
        value, grad = self._in_sum(self._value_and_grad, theta, rows)
        return value.reshape(theta.shape[:-1]), grad.reshape(theta.shape)

    def log_likelihood_grad(self, theta: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the gradient of the log likelihood alone, ``(..., dim) -> (..., dim)``; differentiable again."""
        theta = self._weights(theta)
        if self._compiled(theta, rows):
            return self.log_likelihood_and_grad(theta, rows)[1]
        return self._in_sum(self._grad, theta, rows)[0].reshape(theta.shape)

    def log_joint_and_grad(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return log_joint and its gradient, ``(..., dim) -> (...), (..., dim)``; differentiable again.

        ``rows`` choose mini-batches as in `log_likelihood_and_grad`; the prior is always counted once.
        """
        theta = self._weights(theta)
        if fused := self._compiled(theta, rows):
            theta, rows, scale = self._batch(theta, rows)
            return fused(theta, rows, scale / self.temperature, 1 / self.temperature)
        value, grad = self.log_likelihood_and_grad(theta, rows)
        prior, prior_grad = self.flat_prior.log_prob_and_grad(theta)
        return (value + prior) / self.temperature, (grad + prior_grad) / self.temperature

    def minibatch_log_joint_and_grad(
        self, theta: Tensor, generator: torch.Generator, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Estimate log_joint and its gradient without bias, from a batch of data of its own for every network.

        The batch is a stratified sample: the data in their order are cut into ``batch_size`` stretches of equal
        length, and one row is drawn from each. Every row is equally likely, so the estimate is unbiased; its variance
        is never above that of drawing with replacement, and zero for ``batch_size = n``. The cost does not grow with n.

        Args:
            theta: ``(..., dim)``.
            generator: source of the rows, on the model's device.
            batch_size: rows in a batch, 1 to n.

        Raises:
            ValueError: if there are fewer rows of data than ``batch_size``, or theta has the wrong shape.
        """
        theta = self._weights(theta)
        self._check_batch_size(batch_size)
        if fused := self._compiled(theta, None):
            scale = len(self.x) / (batch_size * self.temperature)
            return fused.minibatch(theta, generator, batch_size, scale, 1 / self.temperature)
        return self.log_joint_and_grad(theta, self.random_rows(theta.shape[:-1], generator, batch_size))

    def random_rows(self, shape: tuple[int, ...], generator: torch.Generator, batch_size: int) -> Tensor:
        """Draw the rows of mini-batches, int64 ``(*shape, batch_size)``, as `minibatch_log_joint_and_grad` does.

        Raises:
            ValueError: unless ``batch_size`` is between 1 and the number of rows.
        """
        self._check_batch_size(batch_size)
        n = len(self.x)
        rows = stratified_rows(shape, batch_size, n, generator, self.dtype)
        if rows is not None:
            return rows
        where = torch.rand(*shape, batch_size, generator=generator, device=self.device, dtype=torch.float64)
        where = (where + torch.arange(batch_size, device=self.device)) * (n / batch_size)
        return where.long().clamp_(max=n - 1)

    def _check_batch_size(self, batch_size: int) -> None:
        if not 1 <= batch_size <= len(self.x):
            raise ValueError(f"batch_size must be between 1 and the {len(self.x)} rows of data, got {batch_size}")

    def _in_blocks(
        self, function: _Evaluation, theta: Tensor, x: Tensor, y: Tensor | None = None, rows: Tensor | None = None
    ) -> list[tuple[Tensor, ...]]:
        """Evaluate ``function`` for all networks and rows: a block at a time where nothing follows derivatives.

        Args:
            function: called with theta, x, y and whether every network has rows of its own.
            theta: ``(networks, dim)``.
            x: inputs.
            y: targets.
            rows: which of them, int64 ``(m,)`` or ``(networks, m)``; all if None.

        Returns:
            Its results, ``(networks, ...)`` each, for one block of rows after the other.
        """
        n, per_network = len(x) if rows is None else rows.shape[-1], rows is not None and rows.dim() > 1
        some, several = self._block_size(theta, x, n)
        found = []
        for part in _stretches(n, some):
            data = None if per_network else _chosen(x, y, rows, part)
            results = [
                function(theta[which], *(data or _chosen(x, y, rows, part, which)), per_network)
                for which in _stretches(len(theta), several)
            ]
            found.append(tuple(_joined(each, 0) for each in zip(*results, strict=True)))
        return found

    def _block_size(self, theta: Tensor, x: Tensor, n: int) -> tuple[int, int]:
        """Return how many of ``n`` rows, and how many networks, are evaluated at once."""
        whole = torch.compiler.is_compiling() or recorded(theta, x)
        return (n, len(theta)) if whole else self.network.at_once(x, n)

    def _in_sum(self, function: _Evaluation, theta: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        """Return the results of a function of flattened ``theta``, summed over the rows and scaled to all of them."""
        theta, rows, scale = self._batch(theta, rows)
        parts = self._in_blocks(function, theta.reshape(-1, self.dim), self.x, self.y, rows)
        total = tuple(functools.reduce(torch.add, each) for each in zip(*parts, strict=True))
        return total if scale == 1 else tuple(scale * each for each in total)

    def _log_likelihoods(self, theta: Tensor, x: Tensor, y: Tensor, per_network: bool) -> tuple[Tensor]:
        outputs = self.network(theta, x, per_network=per_network)
        return (self._log_prob(outputs, y, self.likelihood_parameters(theta)),)

    def _summed_log_likelihood(self, theta: Tensor) -> Tensor:
        def sums(*block: Any) -> tuple[Tensor]:
            return (self._log_likelihoods(*block)[0].sum(-1, dtype=torch.float64),)

        parts = self._in_blocks(sums, theta, self.x, self.y)
        return functools.reduce(torch.add, (values for (values,) in parts))

    def _grad(self, theta: Tensor, x: Tensor, y: Tensor, per_network: bool) -> tuple[Tensor]:
        outputs, pullback = self.network.pullback(theta, x, per_network=per_network, reuse=True)
        return (self._pull(pullback, *self._score(outputs, y, self.likelihood_parameters(theta))),)

    def _value_and_grad(self, theta: Tensor, x: Tensor, y: Tensor, per_network: bool) -> tuple[Tensor, Tensor]:
        outputs, pullback = self.network.pullback(theta, x, per_network=per_network, reuse=True)
        parameters = self.likelihood_parameters(theta)
        value = self._log_prob(outputs, y, parameters).sum(-1, dtype=torch.float64)
        return value, self._pull(pullback, *self._score(outputs, y, parameters))

    def _batch(self, theta: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None, float]:
        """Return checked weights, checked rows, ``(batch,)`` or ``(networks, batch)``, and n / batch."""
        theta = self._weights(theta)
        if rows is None:
            return theta, None, 1.0
        if rows.dtype != torch.int64 or rows.dim() == 0 or rows.shape[-1] == 0:
            raise ValueError(f"rows must be int64 (batch,) or (..., batch), got {rows.dtype} {tuple(rows.shape)}")
        if rows.dim() > 1 and rows.shape[:-1] != theta.shape[:-1]:
            raise ValueError(f"rows {tuple(rows.shape)} do not fit theta {tuple(theta.shape)}")
        return theta, rows.flatten(0, -2) if rows.dim() > 1 else rows, len(self.x) / rows.shape[-1]

    def _compiled(self, theta: Tensor, rows: Tensor | None) -> FusedDensity | None:
        """Return the compiled density if it can be evaluated here: nothing may track derivatives."""
        ours = theta.dtype == self.dtype and (plain(theta) if rows is None else plain(theta, rows))
        return self._fused if ours else None

    def _pull(self, pullback: Pullback, grad_outputs: Tensor, grad_parameters: dict[str, Tensor]) -> Tensor:
        return self._with_extras(pullback(grad_outputs), grad_parameters)

    def _with_extras(self, grad: Tensor, grad_parameters: dict[str, Tensor]) -> Tensor:
        """Append zeros for the prior's parameters and the gradient by the likelihood's: ``(batch, dim)``."""
        if not self.hyperparameters:
            return grad
        by_name = [grad_parameters[name].flatten(1) for name in self.likelihood.parameters]
        missing = sum(math.prod(extra.shape) for extra in self._of_prior)
        return torch.cat([grad, grad.new_zeros(len(grad), missing), *by_name], -1)

    def row_blocks(self, *, copies: int = 1, entries: int = 0) -> Iterator[BayesianModel]:
        """Cut the data into models of a few rows, so that what is made of one is bounded in memory.

        Their likelihoods multiply to that of all rows; the prior is in each.

        Args:
            copies: how often what one network writes for a row is held, as once for every direction of a derivative.
            entries: numbers that are made of each row beside these.
        """
        size, _ = at_once(len(self.x), copies * self.network.elements(self.x) + entries)
        for part in _stretches(len(self.x), size):
            block = copy.copy(self)
            block.x, block.y = self.x[part], self.y[part]
            block.network = self.network  # which knows no data
            yield block

    def gauss_newton(
        self,
        theta: Tensor,
        rows: Tensor | None = None,
        *,
        names: Collection[str] | None = None,
        changes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Linearise the likelihood: the Gauss-Newton matrix of -log likelihood is A^T A.

        Args:
            theta: ``(batch, dim)``.
            rows: use only these rows of the data, int64 ``(m,)``, scaled to all of them.
            names: take the derivatives by these tensors of the network only, in the order of theta; the parameters of
                prior and likelihood follow them all the same.
            changes: of the weights that the derivatives are by, ``(k, weights)``: the Fisher information is averaged
                over the outputs that the linearised network has there.

        Returns:
            The gradient of the log likelihood ``(batch, dim)``, and the factor A ``(batch, rows, dim)``: the
            network's Jacobian times a square root of the likelihood's Fisher information.

        Raises:
            ValueError: if the likelihood has no ``fisher_factor``.
        """
        if not self.likelihood.has_fisher_factor:
            raise ValueError(f"{self.likelihood.name} has no fisher_factor")
        theta, rows, scale = self._batch(theta, rows)
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        outputs, jacobian = self.network.jacobian(theta, x, names=names)  # (batch, n, out, network dim)
        parameters = self.likelihood_parameters(theta)
        grad_outputs, grad_parameters = self._score(outputs, y, parameters)
        if changes is None:
            factor, information = self.likelihood.fisher_factor(outputs, parameters)
        else:
            moves = torch.einsum("bnkd,sd->bsnk", jacobian, changes)
            factor, information = self._averaged_factor(outputs.unsqueeze(1) + moves, parameters)
        grad = self._with_extras(torch.einsum("bnk,bnkd->bd", grad_outputs, jacobian), grad_parameters)
        by_weights = torch.einsum("bnkr,bnkd->bnrd", factor, jacobian).flatten(1, 2)  # (batch, rows, network dim)
        batch, size = by_weights.shape[:2]
        columns, below = [by_weights], []
        columns += [by_weights.new_zeros(batch, size, math.prod(extra.shape)) for extra in self._of_prior]
        for each in information.values():
            if each.dim() == 4:  # factors that share their rows with the outputs, (batch, n, size, rank)
                columns.append(each.mT.flatten(1, 2))
            else:  # independent of the outputs: Fisher information (batch, size)
                start = sum(column.shape[-1] for column in columns)
                columns.append(by_weights.new_zeros(batch, size, each.shape[-1]))
                extra = torch.diag_embed(each.sqrt())  # (batch, size, size)
                below.append(torch.nn.functional.pad(extra, (start, grad.shape[-1] - start - each.shape[-1])))
        whole = torch.cat([torch.cat(columns, -1), *below], 1)
        return (grad, whole) if scale == 1 else (scale * grad, scale**0.5 * whole)

    def _averaged_factor(self, outputs: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``fisher_factor`` of the information averaged over outputs ``(batch, k, n, out)``."""
        batch, k = outputs.shape[:2]
        repeated = {name: each.repeat_interleave(k, 0) for name, each in parameters.items()}
        factor, information = self.likelihood.fisher_factor(outputs.flatten(0, 1), repeated)
        each_of = {name: each.unflatten(0, (batch, k)) for name, each in information.items()}
        shared = [name for name, each in each_of.items() if each.dim() == 5]
        parts = [factor.unflatten(0, (batch, k)), *(each_of[name] for name in shared)]
        whole = torch.cat(parts, -2)  # (batch, k, n, out and parameters, rank)
        mean = (whole @ whole.mT).mean(1)
        values, vectors = torch.linalg.eigh(mean)
        roots = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)).split([part.shape[-2] for part in parts], -2)
        averaged = {name: each.mean(1) for name, each in each_of.items()} | dict(zip(shared, roots[1:], strict=True))
        return roots[0], averaged

    def gauss_newton_factored(
        self, theta: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, FactoredJacobian, Tensor] | None:
        """Return what `gauss_newton` does with A as its factors, several times as fast where rows are fewer than dim.

        None where they are not, where the network is no perceptron, where the prior has parameters, and where those of
        the likelihood share their Fisher information with the outputs.

        Args:
            theta: ``(batch, dim)``.
            rows: use only these rows of the data, int64 ``(m,)``, scaled to all of them.

        Returns:
            The gradient, the rows by the weights, and ``(batch, parameters)``: what every parameter of the likelihood
            has in a row of its own below them.
        """
        network = self.network
        plain_prior = self.dim == self.spec.network.dim + self._n_parameters
        known = isinstance(network, ChainNetwork) and self.likelihood.has_fisher_factor
        if not (plain_prior and known):
            return None
        assert isinstance(network, ChainNetwork)
        theta, rows, scale = self._batch(theta, rows)
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        outputs, factored = network.factored(theta, x)
        parameters = self.likelihood_parameters(theta)
        grad_outputs, grad_parameters = self._score(outputs, y, parameters)
        factor, others = self.likelihood.fisher_factor(outputs, parameters)
        shared = any(each.dim() == 4 for each in others.values())
        if shared or factor.shape[1] * factor.shape[-1] >= self.dim:
            return None
        by_weights = factored(grad_outputs.unsqueeze(-1)).transposed(torch.ones_like(outputs[..., 0]))
        grad = scale * self._with_extras(by_weights, grad_parameters)
        below = torch.cat([theta[:, :0], *((scale * each).sqrt() for each in others.values())], 1)
        return grad, factored(scale**0.5 * factor), below

    def gauss_newton_closed(
        self, theta: Tensor, slope: Arrowhead, pull: Pullback, rows: Tensor | None = None
    ) -> ClosedFactor | None:
        """Return the factor A of `gauss_newton` by other coordinates without forming it; not differentiable.

        None where there are fewer rows than weights, no closed second derivatives, and where parameters of the
        likelihood share their Fisher information with the outputs.

        Args:
            theta: ``(batch, dim)``.
            slope: derivative of ``theta`` by coordinates.
            pull: carries vectors of these to those of others that they are a symmetric linear function of.
            rows: use only these rows of the data, int64 ``(m,)``, scaled to all of them.
        """
        network = self.network
        if not self.has_gauss_newton_slope or not isinstance(network, ChainNetwork):
            return None
        theta, rows, scale = self._batch(theta, rows)
        x = (self.x if rows is None else self.x[rows]).flatten(1)
        outputs, push, back = network.products(theta, x)
        factor, others = self.likelihood.fisher_factor(outputs, self.likelihood_parameters(theta))
        shared = any(each.dim() == 4 for each in others.values())
        if shared or factor.shape[1] * factor.shape[-1] < self.dim:
            return None
        factor = factor.permute(0, 2, 3, 1).contiguous()  # (batch, out, rank, n)

        def product(some: slice) -> Tensor:
            information = scale * (factor[some].unsqueeze(2) * factor[some].unsqueeze(1)).sum(3)
            return self._network_hessian.gauss_newton(theta[some, : self.spec.network.dim], x, information)

        below = torch.cat([theta[:, :0], *((scale * each).sqrt() for each in others.values())], 1)
        return ClosedFactor(push, back, scale**0.5 * factor, below, slope, pull, product)

    def gauss_newton_residual(self, theta: Tensor, rows: Tensor | None = None) -> Tensor | None:
        """Return b with A^T b the gradient of the log likelihood, ``(batch, rows)``; A as in `gauss_newton`.

        Steps made from it keep in float32 what they lose when made from the gradient, where the likelihood is sharp.
        None where it has no ``whitened_score``; normal and Student laws have one.

        Args:
            theta: ``(batch, dim)``.
            rows: use only these rows of the data, int64 ``(m,)``, scaled to all of them.
        """
        if not self.likelihood.has_whitened_score:
            return None
        theta, rows, scale = self._batch(theta, rows)
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        outputs, parameters = self.network(theta, x), self.likelihood_parameters(theta)
        by_parameters = self._score(outputs, y, parameters)[1]
        information = self.likelihood.fisher_factor(outputs, parameters)[1]
        of_rows = self.likelihood.whitened_score(outputs, y, parameters)
        others = [by_parameters[name] / each.sqrt() for name, each in information.items()]
        return scale**0.5 * torch.cat([of_rows.flatten(1), *others], 1)

    def gauss_newton_slope(self, theta: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor | None:
        """Return the derivative by theta of grad - A^T A v at fixed v, ``(batch, dim, dim)``, in closed form.

        Both as in `gauss_newton`. Row i is that of element i; the matrix is not symmetric. None where there is no
        `log_likelihood_hessian` or no ``fisher_factor``.

        Args:
            theta: ``(batch, dim)``.
            v: ``(batch, dim)``.
            rows: use only these rows of the data, int64 ``(m,)``, scaled to all of them.
        """
        if not self.has_gauss_newton_slope:
            return None
        theta, rows, scale = self._batch(theta, rows)
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        size = max(64, 8 * self.dim // self._n_outputs)  # no more than eight times the result at once, or little
        parts = zip(x.flatten(1).split(size), y.split(size), strict=True)
        slope = functools.reduce(torch.add, (self._slope(theta, v, *part) for part in parts))
        slope = slope if scale == 1 else scale * slope
        missing = self.dim - slope.shape[-1]
        if not missing:
            return slope
        start, stop = self.spec.network.dim, self.spec.network.dim + missing  # the parameters of the prior
        whole = slope.new_zeros(len(slope), self.dim, self.dim)
        whole[:, :start, :start], whole[:, :start, stop:] = slope[:, :start, :start], slope[:, :start, start:]
        whole[:, stop:, :start], whole[:, stop:, stop:] = slope[:, start:, :start], slope[:, start:, start:]
        return whole

    def _slope(self, theta: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return `gauss_newton_slope` of these rows, by the weights and the likelihood's parameters.

        With J the Jacobian of the outputs and F the Fisher information of outputs and parameters, grad - A^T A v by
        the weights is J^T r, with r what F leaves of the score when it has met J v and v. Its derivative is the
        network's curvature along r, and J^T (M J - F D): M is the derivative of r by outputs with J v held fixed, and D
        the derivative of J v, which is that of J along v.
        """
        network = self.network
        assert isinstance(network, ChainNetwork)

        def parts(weights: Tensor, seeds: Tensor) -> list[tuple[Tensor, Tensor]]:
            return [(part.entering, part.leaving) for part in network.factored(weights, x)[1](seeds).parts]

        outputs, along, *_ = jvp(lambda weights: network(weights, x), (theta,), (v,))
        given = self._curvature(theta, outputs, y, (along, v[:, self.dim - self._n_parameters :]))
        assert given.outputs is not None
        factor, others = self.likelihood.fisher_factor(outputs, self.likelihood_parameters(theta))
        information, eye = factor @ factor.mT, torch.eye(outputs.shape[-1], dtype=theta.dtype, device=theta.device)
        eye = eye.expand_as(information).contiguous()
        mixed = network.factored(theta, x)[1]  # S -> S^T J
        changes = jvp(parts, (theta, -information), (v, given.outputs.mT))[1]
        change = mixed(-information).tangent(changes)  # M J - F D
        jacobian = mixed(eye).matrix
        bent = self._network_hessian.along(theta, x, given.by_outputs)
        if not self._n_parameters:
            return bent.baddbmm_(jacobian.mT, change)
        assert given.transposed is not None
        by_weights = given.transposed.flatten(2) @ jacobian
        shared = [each for each in others.values() if each.dim() == 4]
        if shared:  # the information of outputs and parameters together, (batch, n, parameters, out)
            cross = (torch.cat(shared, 2) @ factor.mT).movedim(2, 1).flatten(2)
            moved = jvp(parts, (theta, eye), (v, torch.zeros_like(eye)))[1]
            by_weights = by_weights - cross @ mixed(eye).tangent(moved)
        above = torch.cat([bent.baddbmm_(jacobian.mT, change), jacobian.mT @ given.mixed.flatten(2).mT], 2)
        return torch.cat([above, torch.cat([by_weights, given.parameters.mT], 2)], 1)

    def gauss_newton_product(
        self, theta: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return what `gauss_newton` does without forming a Jacobian.

        Args:
            theta: ``(batch, dim)``.
            rows: use only these rows of the data, int64 ``(m,)``, scaled to all of them.

        Returns:
            The gradient of the log likelihood ``(batch, dim)``, and the function v -> A^T A v, ``(batch, dim)``; each
            product costs about two gradients.

        Raises:
            ValueError: if the likelihood has no ``fisher_factor``.
        """
        if not self.likelihood.has_fisher_factor:
            raise ValueError(f"{self.likelihood.name} has no fisher_factor")
        theta, rows, scale = self._batch(theta, rows)
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        some, several = self._block_size(theta, x, len(x))
        if some >= len(x) and several >= len(theta):
            grad, product = self._linearised_likelihood(theta, x, y)
            return scale * grad, lambda v: scale * product(v)

        # What linearises all of it would be too much to keep, so that every product begins anew.
        def of_block(both: Tensor, x: Tensor, y: Tensor, per_network: bool) -> tuple[Tensor]:
            theta, v = both.split(self.dim, 1)
            return (self._linearised_likelihood(theta, x, y)[1](v),)

        def in_blocks(v: Tensor) -> Tensor:
            parts = self._in_blocks(of_block, torch.cat([theta, v], 1), x, y)
            return scale * functools.reduce(torch.add, (each for (each,) in parts))

        return self.log_likelihood_grad(theta, rows), in_blocks

    def _linearised_likelihood(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return `gauss_newton_product` of these rows."""
        outputs, pullback = self.network.pullback(theta, x)
        parameters = self.likelihood_parameters(theta)
        grad_outputs, grad_parameters = self._score(outputs, y, parameters)
        start = self.dim - self._n_parameters

        def product(v: Tensor) -> Tensor:
            tangent = jvp(lambda weights: self.network(weights, x), (theta,), (v,))[1]
            by_outputs, by_parameters = self._informed(outputs, parameters, tangent, v[:, start:])
            return self._with_extras(pullback(by_outputs), by_parameters)

        return self._with_extras(pullback(grad_outputs), grad_parameters), product

    def log_likelihood_hessian(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Return the gradient and the Hessian of the log likelihood, ``(batch, dim)`` and ``(batch, dim, dim)``.

        The exact one, with the curvature of the network that `gauss_newton` leaves out, for about a hundred compiled
        gradients. None where only automatic differentiation knows it: networks that are no chains of linear layers,
        linearised ones, and those of so many weights that a dense matrix for each is too much.

        Args:
            theta: ``(batch, dim)``.
            rows: use only these rows of the data, int64 ``(m,)`` or ``(batch, m)``, scaled to all of them.
        """
        if self._hessian is None:
            return None
        theta, rows, scale = self._batch(theta, rows)
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        x = x.flatten(1 if rows is None or rows.dim() == 1 else 2)
        grad, hessian = self._hessian(theta, x, y, lambda outputs, y: self._curvature(theta, outputs, y))
        return (grad, hessian) if scale == 1 else (scale * grad, scale * hessian)

    def _curvature(
        self, theta: Tensor, outputs: Tensor, y: Tensor, along: tuple[Tensor, Tensor] | None = None
    ) -> Curvature:
        """Return what the likelihood makes of outputs: derivatives of its score, which cost next to nothing.

        With ``along``, a change of the outputs and of the logarithms of its parameters, of the score less the Fisher
        information of both times that.
        """
        out, start = outputs.shape[-1], self.dim - self._n_parameters
        weights, logs = theta[:, :start], theta[:, start:]

        def score(outputs: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
            parameters = self.likelihood_parameters(torch.cat([weights, logs], 1))
            by_outputs, by_parameters = self._score(outputs, y, parameters)
            if along is not None:
                of_outputs, of_parameters = self._informed(outputs, parameters, *along)
                by_outputs = by_outputs - of_outputs
                by_parameters = {name: by_parameters[name] - each for name, each in of_parameters.items()}
            named = [by_parameters[name].flatten(1) for name in self.likelihood.parameters]
            return by_outputs, torch.cat([logs[:, :0], *named], 1)

        def derivative(of_logs: Tensor) -> Tensor:
            tangents = torch.zeros_like(outputs), of_logs.expand_as(logs)
            return jvp(score, (outputs, logs), tangents)[1][0]

        # Reverse mode: in forward mode torch takes half a millisecond for every constant that it meets.
        (by_outputs, by_logs), pull, *_ = torch.func.vjp(score, outputs, logs)
        size = logs.shape[1]
        eye = torch.eye(out + size, dtype=theta.dtype, device=theta.device)
        seeds = eye[:, None, None, :out].expand(-1, *outputs.shape), eye[:, None, out:].expand(-1, *logs.shape)
        of_outputs, of_logs = torch.func.vmap(lambda *seed: pull(seed))(*seeds)  # (element, batch, ...)
        transposed = of_outputs[out:].movedim(0, 1)
        mixed, twice = transposed, (of_outputs[:out].movedim(0, -2), of_logs[out:].movedim(0, -1))
        if along is not None and size:  # the information is no derivative: nothing is symmetric
            mixed = torch.func.vmap(derivative)(eye[out:, out:]).movedim(0, 1)
        return Curvature(by_outputs, by_logs, twice[0], mixed, twice[1], transposed)

    def _informed(
        self, outputs: Tensor, parameters: dict[str, Tensor], along: Tensor, logs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the Fisher information of outputs and log parameters times changes of both, by each of them."""
        factor, information = self.likelihood.fisher_factor(outputs, parameters)
        sizes = [parameters[name].shape[-1] for name in self.likelihood.parameters]
        changes = dict(zip(self.likelihood.parameters, logs.split(sizes, -1), strict=True))
        inner = (factor.mT @ along.unsqueeze(-1)).squeeze(-1)  # (batch, n, rank)
        shared = {name: each for name, each in information.items() if each.dim() == 4}
        for name, each in shared.items():
            inner = inner + torch.einsum("bnsr,bs->bnr", each, changes[name])
        by_parameters = {
            name: torch.einsum("bnsr,bnr->bs", each, inner) if name in shared else each * changes[name]
            for name, each in information.items()
        }
        return (factor @ inner.unsqueeze(-1)).squeeze(-1), by_parameters

    def _log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the log likelihood of every row; what overflows in a distribution is no error, but a divergence."""
        with unvalidated():
            return self.likelihood.log_prob(outputs, y, parameters)

    def _check_likelihood(self) -> None:
        """Let a caller's own likelihood see all targets once, with torch's checks, and probe it."""
        theta = torch.zeros(1, self.dim, dtype=self.dtype, device=self.device)
        with torch.no_grad(), isolated():
            outputs = self.network(theta, self.x[:1]).expand(-1, len(self.x), -1)
            try:
                self.likelihood.log_prob(outputs, self.y, self.likelihood_parameters(theta))
            except ValueError as error:
                if "support" in str(error):
                    raise ValueError(f"y does not fit {self.likelihood.name}: {error}") from error
            except RuntimeError:  # what is wrong is said below
                pass
        if not type(self.likelihood.given).__module__.startswith("bnnflow."):
            shapes = {extra.key: extra.shape for extra in self._of_likelihood}
            probe_likelihood(self._log_prob, self._score, self.y[:4], self._n_outputs, shapes)

    def _score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with unvalidated():
            return self.likelihood.score(outputs, y, parameters)

    # ---------------------------------------------------------------- sampling and other views

    @checked
    def sample_prior(self, n: Count, seed: Seed) -> Tensor:
        """Draw ``(n, dim)`` from the prior."""
        return self.flat_prior.sample(n, seed)

    @checked
    def from_network(self, net: nn.Module) -> Tensor:
        """Return the weights of a trained network as ``theta`` ``(dim,)``.

        Parameters of the prior are put at the mode of their density given the weights, those of the likelihood at 0.1.

        Raises:
            ValueError: if its parameters have other names or shapes, or its constants other values.
        """
        given = dict(net.named_parameters())
        for name, own in self.net.named_parameters():
            if name not in given or given[name].shape != own.shape:
                raise ValueError(f"net does not fit the model: {name} must be {tuple(own.shape)}")
        constants = {name: own for name, own in self._constants() if not name.endswith("num_batches_tracked")}
        theirs = given | dict(net.named_buffers())
        for name, own in constants.items():
            if name not in theirs or not torch.equal(theirs[name].detach().to(own), own):
                raise ValueError(
                    f"{name} is a constant of the model (a parameter with requires_grad=False, or a buffer), but "
                    "differs in the network; make the model from the network that has the right one"
                )
        params = {name: given[name].detach().to(self.device, self.dtype) for name in self.spec.network.names}
        for extra in self.hyperparameters:
            start = math.log(0.1) if extra.positive else 0.0
            params[extra.name] = torch.full(extra.shape, start, device=self.device, dtype=self.dtype)
        return self.flat_prior.at_mode(self.spec.flatten(params))

    def _constants(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the network computes with and does not infer, by name."""
        for name, value in (*self.net.named_parameters(), *self.net.named_buffers()):
            if name not in self.spec.shapes:
                yield name, value.detach()

    @checked
    def to_network(self, theta: Tensor) -> nn.Module:
        """Return a copy of the network with the weights ``theta`` ``(dim,)``; constants stay as they are.

        Raises:
            ValueError: for a linearised model, which is no longer a network.
        """
        if self._anchor is not None:
            raise ValueError("a linearised model is not a network with other weights")
        if self.spec.check(theta).dim() != 1:
            raise ValueError(f"theta must be ({self.dim},), got {tuple(theta.shape)}")
        net = copy.deepcopy(self.net)
        params = self.spec.unflatten(theta)
        for name, parameter in net.named_parameters():
            if name in params:
                parameter.data.copy_(params[name])
        return net

    def to_pyro(self) -> Callable[[], None]:
        """Return the same model as a Pyro model: one site per tensor, for Pyro's samplers and guides.

        The sites are named as the tensors; the sites ``prior.<name>`` and ``likelihood.<name>`` of inferred parameters
        are the variables themselves, not their logarithms. Temperature scales both prior and likelihood.
        """

        def log_likelihood(theta: Tensor) -> Tensor:
            return self.pointwise_log_likelihood(theta).sum(-1)

        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return pyro_model(self.prior, self.hyperparameters, self.spec, log_likelihood, self.temperature, like)

    def fingerprint(self) -> str:
        """Return a hash of the data, the network, the prior, the likelihood and the temperature.

        It is the same in every process, and for the same model in another floating-point type that holds its values.
        Of the network count its code, settings, constants and buffers; the number in front is the version of the rule.
        Where something cannot be identified (see `unidentified`) no other process finds the same.
        """
        if self._origin is not None and self._is_in(self._origin[1]):
            return self._origin[0]
        return self._identity()[0]

    def check_draws(self, draws: object) -> None:
        """Raise ``ValueError`` if draws say that they are draws of another posterior.

        `Draws` carry the fingerprint of their model. This model's are its own, those of the same model on another
        device or in another floating-point type, and for a linearised model those of the model that it expands. Plain
        weights say nothing and pass: ``draws.theta``, with ``draws.log_weights`` beside it, where draws of one
        posterior are to be used with another on purpose.
        """
        theirs = getattr(draws, "info", {}).get("model")
        if not isinstance(theirs, str) or theirs == self._network_of:
            return
        kept = self._recognised  # a fingerprint reads all data
        if kept is not None and kept[0] == theirs and self._is_in(kept[1]):
            return
        if not self.recognises(theirs):
            raise ValueError(
                f"these are draws of another model, with fingerprint {theirs}; this one has {self.fingerprint()}. "
                "To use their weights all the same, pass draws.theta"
            )
        self._recognised = (theirs, self._state())

    def _state(self) -> _State:
        """Return the data and how often they have been changed in place."""
        return [(data, 0 if data.is_inference() else data._version) for data in (self.x, self.y)]

    def _is_in(self, state: _State) -> bool:
        """Say whether the data are those of a `_state`."""
        return all(a is b and m == n for (a, m), (b, n) in zip(state, self._state(), strict=True))

    def recognises(self, fingerprint: str) -> bool:
        """Say whether a fingerprint is this model's; of one of an earlier version, as far as that could see."""
        return fingerprint == (self.fingerprint() if ":" in fingerprint else self._first_fingerprint())

    def _first_fingerprint(self) -> str:
        """Return the fingerprint as files of the first version have it, blind to much of what a module is made of."""
        digest = hashlib.sha256()
        for data in (self.x.double(), self.y.double()):
            digest.update(repr(tuple(data.shape)).encode())
            digest.update(data.cpu().numpy().tobytes())
        digest.update(repr((self.spec.shapes, self._architecture.layers, self.temperature)).encode())
        digest.update(repr(self.flat_prior.describe()).encode())
        settings = getattr(self.likelihood.given, "__dict__", {}).items()
        numbers = {name: value for name, value in settings if isinstance(value, bool | int | float | str | None)}
        digest.update(repr((self.likelihood.name, numbers)).encode())
        if not self._architecture.layers:
            digest.update(repr(self.net).encode())
            for name, buffer in self.net.named_buffers():
                digest.update(name.encode() + buffer.double().cpu().numpy().tobytes())
        if self._anchor is not None:
            digest.update(b"linearised" + self._anchor[: self.spec.network.dim].double().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def unidentified(self) -> tuple[str, ...]:
        """What the fingerprint cannot identify, and where: runs of such a model cannot be resumed.

        Locks, open files, generators and the like, as attributes of the network, the likelihood or the prior.
        """
        return self._identity()[1]

    def _identity(self) -> tuple[str, tuple[str, ...]]:
        layers = self._architecture.layers
        found = Identity(free_parameters(self.net), self._written)
        found.add(self.x, "x").add(self.y, "y").add(self.temperature, "temperature")
        found.add((self.spec.shapes, repr(layers)), "spec")
        found.add(self.flat_prior.identity(), "prior").add(self.likelihood.given, "likelihood")
        if self.prior.has_parameters:
            found.add(self.prior.given, "prior")
        if not layers:  # the labels do not say what the network computes
            found.add(self.net, "net")
        if self._anchor is not None:
            found.add(self._anchor[: self.spec.network.dim], "anchor")
        return f"{_FINGERPRINTS}:{found.digest}", tuple(found.unknown)

    def __repr__(self) -> str:
        """Say what the model is in one line."""
        return (
            f"BayesianModel({type(self.net).__name__}, dim={self.dim}, n={len(self.x)}, "
            f"likelihood={self.likelihood.name}, temperature={self.temperature:g})"
        )

    def _weights(self, theta: Tensor) -> Tensor:
        """Return checked weights in the model's type and on its device; their derivatives are kept."""
        theta = self.spec.check(theta)
        return theta if theta.dtype == self._dtype else tracked("theta", theta).to(self._device, self._dtype)

    def _batched(self, function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
        theta = self._weights(theta)
        result = function(theta.reshape(-1, self.dim))
        return result.reshape((*theta.shape[:-1], *result.shape[1:]))

    def _accepted(self, x: Tensor) -> tuple[Tensor, int]:
        """Return x in the type that the network takes, and its number of outputs."""
        whole = not (x.is_floating_point() or x.dtype == torch.bool)
        try:
            outputs = self._probe(x.to(self._dtype))
        except ValueError:
            if not whole:
                raise
            x = x if x.dtype == torch.int32 else x.long()  # the two that torch takes as indices
            return x, self._probe(x)
        return _placed("x", x if x.is_floating_point() else x.double(), self._device, self._dtype), outputs

    def _probe(self, x: Tensor) -> int:
        """Run rows through the network and return its number of outputs."""
        rows = x[:2] if x.is_floating_point() else x  # any index may be beyond the table of an embedding
        zeros = {name: torch.zeros_like(value) for name, value in free_parameters(self.net).items()}
        try:
            with torch.no_grad(), isolated():
                outputs = torch.func.functional_call(self.net, zeros, (rows.clone(),))
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"x of shape {tuple(x.shape)} does not fit net: {error}") from error
        return check_outputs(outputs, len(rows)).shape[-1]


_Evaluation = Callable[..., tuple[Tensor, ...]]
"""``(theta, x, y, per_network) -> (networks, ...)`` each."""


def _stretches(length: int, size: int) -> list[slice]:
    """Cut a length into stretches of at most this size; one at least."""
    return [slice(start, start + size) for start in range(0, max(length, 1), max(size, 1))]


def _chosen(
    x: Tensor, y: Tensor | None, rows: Tensor | None, part: slice, which: slice = slice(None)
) -> tuple[Tensor, Tensor | None]:
    """Return a part of the rows of data; those of some networks, where each has its own."""
    if rows is None and part.start == 0 and part.stop >= len(x):
        return x, y  # the very tensors, by which a linearised network knows them
    if rows is None:
        return x[part], None if y is None else y[part]
    index = rows[part] if rows.dim() == 1 else rows[which, part]

    def gathered(data: Tensor) -> Tensor:
        # One gather for all networks; index_select is several times faster than indexing by a matrix.
        return data.index_select(0, index.flatten()).unflatten(0, index.shape)

    return gathered(x), None if y is None else gathered(y)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _placed(name: str, data: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move data; integers stay integers, other numbers are rounded to ``dtype`` if they can be told apart in it."""
    if data.is_floating_point():
        _check_rounding(name, data, dtype)
        data = data.to(dtype)
        finite(name, data)
    return data.to(device)


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _check_modules(net: nn.Module) -> None:
    for name, module in net.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._NormBase):
            per_row = isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats
            constant = module.track_running_stats and module.running_mean is not None and not module.training
            if not (per_row or constant):
                raise ValueError(
                    f"module {name!r} ({kind}) makes a row's output depend on the other rows, so there is no "
                    "likelihood of single rows; use LayerNorm or GroupNorm, or call net.eval() on a network with "
                    "running statistics, which are then constants"
                )
        chance = module.dropout if isinstance(module, nn.MultiheadAttention) else getattr(module, "p", 0)
        random = isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention) and module.training
        if random and chance > 0:
            raise ValueError(f"module {name!r} ({kind}) is random in training mode; call net.eval() or remove it")


def _check_gradients(net: nn.Module) -> None:
    """Refuse modules of torch whose weights cannot be exchanged, or whose gradient is not the outputs' derivative."""
    for name, module in net.named_modules():
        kind = f"module {name!r} ({type(module).__name__})"
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            raise ValueError(
                f"{kind} is recurrent, and torch's code for it takes one set of weights only; write its cell with "
                "Linear layers, in a loop over time, or, if its weights are constants, give its outputs as x"
            )
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or not module.weight.requires_grad:
            continue
        if module.padding_idx is not None:
            raise ValueError(
                f"{kind} has padding_idx={module.padding_idx}: that row would be inferred, but torch gives it no "
                "gradient; make the embedding without it and mask what is padded, or make its weight a constant by "
                "requires_grad_(False)"
            )
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise ValueError(
                    f"{kind} has {option}={getattr(module, option)}, which changes its weights or its gradient "
                    "behind the back of the inference; make it without"
                )


def _copied(net: nn.Module) -> nn.Module:
    """Return a copy, so that the caller's network may change later."""
    try:
        return copy.deepcopy(net)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"net cannot be copied: {error}. Pruning and the old weight_norm keep computed weights as attributes: take "
            "torch.nn.utils.prune.remove, and torch.nn.utils.parametrizations"
        ) from error


def _check_parameters(net: nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        raise ValueError(
            "net is compiled by torch.jit, which keeps its own weights: give the module that it was made of"
        )
    kinds = {parameter.dtype: name for name, parameter in free_parameters(net).items()}
    if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
        said = ", ".join(f"{name!r} of {kind}" for kind, name in kinds.items())
        raise ValueError(f"net must have parameters of one floating-point type, got {said}")
    for name, parameter in net.named_parameters():
        if parameter.numel() == 0:
            raise ValueError(
                f"net: {name!r} has no elements, {tuple(parameter.shape)}: a layer without inputs or units"
            )


def _check_data(x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Return copies, so that both may change later."""
    x, y = (tensor(name, values).clone() for name, values in (("x", x), ("y", y)))
    if x.dim() < 2:
        raise ValueError(f"x must be (n, ...) with at least two axes, got {tuple(x.shape)}")
    if len(x) == 0:
        raise ValueError("x has no rows")
    if y.dim() == 0 or len(x) != len(y):
        raise ValueError(f"y must have a value for each of the {len(x)} rows of x, got shape {tuple(y.shape)}")
    finite("x", x)
    finite("y", y)
    return x, y


def _check_rounding(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Raise where rounding to ``dtype`` would blur what tells rows apart: large numbers that vary by little."""
    if values.dtype == dtype or not bool(values.to(dtype).isfinite().all()):
        return
    columns = values.reshape(len(values), -1).double()
    error = torch.stack([(part.to(dtype).double() - part).abs().amax(0) for part in columns.split(4096)]).amax(0)
    size = columns.abs().amax(0)
    spread = columns.std(0, correction=0)
    share = max(1e-3, 16 * torch.finfo(dtype).eps)  # the second for data of mean 0 in sixteen bits
    # A column that varies in the last digits of float64 alone is a constant.
    lost = ((error > share * spread) & (spread > 1e-14 * size)).nonzero().flatten()
    if len(lost):
        column = int(lost[0])
        raise ValueError(
            f"{name} cannot be told apart in {dtype}: column {column} varies by {spread[column]:.3g} around values up "
            f"to {size[column]:.3g}, which rounding changes by up to {error[column]:.3g}; standardise it, or make the "
            "network one of float64 by net.double()"
        )


def _check_informative(y: Tensor) -> None:
    """Raise unless the training targets vary."""
    columns = y.reshape(len(y), -1)
    constant = (columns == columns[:1]).all(0).nonzero().flatten()
    if len(y) > 1 and len(constant):
        column = int(constant[0])
        what = f"holds only the value {columns[0, column].item():g}" + (f" in column {column}" if y.dim() > 1 else "")
        raise ValueError(f"y {what}: there is nothing to learn from a constant target or a single class")
