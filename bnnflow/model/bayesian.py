"""The Bayesian model: a network, a prior, a likelihood and data, as one density over flat weights."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bnnflow.model.network import ChainNetwork, ModuleNetwork, Pullback
from bnnflow.model.priors import FlatPrior, as_prior, elementwise, rebuild
from bnnflow.types import Likelihood, Prior, Seed
from bnnflow.weights import WeightSpec

__all__ = ["BayesianModel"]

_PREFIX = "likelihood.log_"


class BayesianModel:
    """What is inferred: p(theta) p(y | net(x; theta)), with every constant.

    ``theta`` holds the network's weights in ``named_parameters()`` order, then the logarithm of every likelihood
    parameter that is learned; all coordinates are unconstrained. Densities are summed over the data, carry the
    log-Jacobian of each constraint, and are accumulated in float64.

    Args:
        net: any module that maps ``(n, ...)`` inputs to ``(n, out)`` outputs; perceptrons take a fast path. Its own
            weights are neither used nor changed; every named parameter is inferred.
        prior: a `Prior`, one torch or Pyro distribution for every weight, or a dict of them by tensor name.
        likelihood: a `Likelihood`.
        x: inputs, ``(n, ...)``, tensor or array, already standardised as the prior assumes.
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

    def __init__(
        self,
        net: nn.Module,
        prior: Prior | Distribution | Mapping[str, Distribution],
        likelihood: Likelihood,
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        *,
        temperature: float = 1.0,
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        _check_modules(net)
        parameters = list(net.parameters())
        if not parameters:
            raise ValueError(f"{type(net).__name__} has no parameters to infer")
        dtype, device = parameters[0].dtype, parameters[0].device
        x, y = _check_data(x, y, dtype)
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.prior = as_prior(prior)
        self.likelihood = likelihood
        self.temperature = float(temperature)
        self.x = x.to(device)
        try:
            network_spec = WeightSpec.of(net)
        except ValueError:
            network_spec = WeightSpec.unlabelled(net)
        self.spec = network_spec.extend({_PREFIX + name: (1,) for name in likelihood.parameters})
        self._n_outputs = self._probe_outputs()
        y = likelihood.validate(y, self._n_outputs)
        _check_informative(y)
        self.y = y.to(device, dtype) if y.is_floating_point() else y.to(device)
        positive = {_PREFIX + name: d for name, d in likelihood.parameters.items()}
        self.flat_prior = FlatPrior(
            self.spec, self.prior.distributions(network_spec) | positive, frozenset(positive)
        ).to(device, dtype)

    @property
    def dim(self) -> int:
        """Length of ``theta``."""
        return self.spec.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the data and of ``theta``."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self.x.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BayesianModel:
        """Return the same model on another device or in another floating-point type."""
        moved = copy.copy(self)
        moved.__dict__.pop("network", None)
        device, dtype = device or self.device, dtype or self.dtype
        moved.net = copy.deepcopy(self.net).to(device, dtype)
        moved.x = self.x.to(device, dtype)
        moved.y = self.y.to(device, dtype) if self.y.is_floating_point() else self.y.to(device)
        moved.flat_prior = self.flat_prior.to(device, dtype)
        return moved

    @cached_property
    def network(self) -> ChainNetwork | ModuleNetwork:
        """The batched network: the fast path for perceptrons, ``vmap`` for the rest."""
        return ChainNetwork(self.spec) if self.spec.layers else ModuleNetwork(self.net, self.spec)

    # ---------------------------------------------------------------- evaluation

    def outputs(self, theta: Tensor, x: Tensor | np.ndarray | None = None) -> Tensor:
        """Evaluate the network, ``(..., dim) -> (..., n, out)``.

        Args:
            theta: weights.
            x: inputs; the training inputs if None.

        Raises:
            ValueError: if theta or x has the wrong shape, or x has NaN or infinite rows.
        """
        return self._batched(lambda flat: self.network(flat, self.inputs(x)), theta)

    def inputs(self, x: Tensor | np.ndarray | None) -> Tensor:
        """Return checked inputs on the model's device; the training inputs for None."""
        if x is None or x is self.x:
            return self.x
        x = _as_tensor(x).to(self.device, self.dtype)
        if x.shape[1:] != self.x.shape[1:]:
            raise ValueError(
                f"x must be (n, {', '.join(map(str, self.x.shape[1:]))}) as in training, got {tuple(x.shape)}"
            )
        if len(x) == 0:
            raise ValueError("x has no rows")
        _check_finite("x", x)
        return x

    def likelihood_parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the learned likelihood parameters, positive, ``(..., 1)`` each."""
        return {name: theta[..., self.spec.slices[_PREFIX + name]].exp() for name in self.likelihood.parameters}

    def log_prior(self, theta: Tensor) -> Tensor:
        """Return the log prior density of ``theta``, untempered, ``(..., dim) -> (...)``."""
        self.spec.check(theta)
        return self.flat_prior.log_prob(theta)

    def log_likelihood(self, theta: Tensor) -> Tensor:
        """Return the log likelihood summed over the data, untempered, ``(..., dim) -> (...)``."""
        return self.pointwise_log_likelihood(theta).sum(-1, dtype=torch.float64)

    def log_joint(self, theta: Tensor) -> Tensor:
        """Return (log prior + log likelihood) / temperature, ``(..., dim) -> (...)``."""
        return (self.log_prior(theta) + self.log_likelihood(theta)) / self.temperature

    def pointwise_log_likelihood(
        self, theta: Tensor, x: Tensor | np.ndarray | None = None, y: Tensor | np.ndarray | None = None
    ) -> Tensor:
        """Return the log likelihood of every row, ``(..., dim) -> (..., n)``; training data if x and y are None."""
        outputs, y = self.outputs(theta, x), self.targets(y)
        if outputs.shape[-2] != len(y):
            raise ValueError(f"x has {outputs.shape[-2]} rows and y has {len(y)}")
        return self.likelihood.log_prob(outputs, y, self.likelihood_parameters(theta))

    def targets(self, y: Tensor | np.ndarray | None) -> Tensor:
        """Return checked targets on the model's device; the training targets for None."""
        if y is None or y is self.y:
            return self.y
        y = self.likelihood.validate(_as_tensor(y), self._n_outputs)
        _check_finite("y", y)
        return y.to(self.device, self.dtype) if y.is_floating_point() else y.to(self.device)

    def log_likelihood_and_grad(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log likelihood and its gradient, ``(..., dim) -> (...), (..., dim)``; differentiable again."""
        self.spec.check(theta)
        flat = theta.reshape(-1, self.dim)
        outputs, pullback = self.network.pullback(flat, self.x)
        parameters = self.likelihood_parameters(flat)
        value = self.likelihood.log_prob(outputs, self.y, parameters).sum(-1, dtype=torch.float64)
        grad = self._pull(pullback, *self._score(outputs, parameters))
        return value.reshape(theta.shape[:-1]), grad.reshape(theta.shape)

    def log_likelihood_grad(self, theta: Tensor) -> Tensor:
        """Return the gradient of the log likelihood alone, ``(..., dim) -> (..., dim)``; differentiable again."""
        self.spec.check(theta)
        flat = theta.reshape(-1, self.dim)
        outputs, pullback = self.network.pullback(flat, self.x)
        grad = self._pull(pullback, *self._score(outputs, self.likelihood_parameters(flat)))
        return grad.reshape(theta.shape)

    @staticmethod
    def _pull(pullback: Pullback, grad_outputs: Tensor, grad_parameters: dict[str, Tensor]) -> Tensor:
        grad = pullback(grad_outputs)
        return torch.cat([grad, *grad_parameters.values()], -1) if grad_parameters else grad

    def log_joint_and_grad(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return log_joint and its gradient, ``(..., dim) -> (...), (..., dim)``; differentiable again."""
        value, grad = self.log_likelihood_and_grad(theta)
        prior, prior_grad = self.flat_prior.log_prob_and_grad(theta)
        return (value + prior) / self.temperature, (grad + prior_grad) / self.temperature

    def gauss_newton(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Linearise the likelihood: the Gauss-Newton matrix of -log likelihood is A^T A.

        Returns:
            The gradient of the log likelihood ``(batch, dim)``, and the factor A ``(batch, rows, dim)``: the
            network's Jacobian times a square root of the likelihood's Fisher information.

        Raises:
            ValueError: if the likelihood has no ``fisher_factor``.
        """
        if not hasattr(self.likelihood, "fisher_factor"):
            raise ValueError(f"{type(self.likelihood).__name__} has no fisher_factor")
        outputs, jacobian = self.network.jacobian(theta, self.x)  # (batch, n, out, network dim)
        parameters = self.likelihood_parameters(theta)
        grad_outputs, grad_parameters = self._score(outputs, parameters)
        factor, information = self.likelihood.fisher_factor(outputs, parameters)  # type: ignore[attr-defined]
        grad = torch.cat([torch.einsum("bnk,bnkd->bd", grad_outputs, jacobian), *grad_parameters.values()], -1)
        rows = torch.einsum("bnkr,bnkd->bnrd", factor, jacobian).flatten(1, 2)  # (batch, n * out, network dim)
        if information:
            extra = torch.diag_embed(torch.cat(list(information.values()), -1).sqrt())  # (batch, extras, extras)
            rows = torch.nn.functional.pad(rows, (0, extra.shape[-1]))
            rows = torch.cat([rows, torch.nn.functional.pad(extra, (rows.shape[-1] - extra.shape[-1], 0))], 1)
        return grad, rows

    def _score(self, outputs: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if hasattr(self.likelihood, "score"):
            return self.likelihood.score(outputs, self.y, parameters)  # type: ignore[attr-defined]

        def total(outputs: Tensor, logs: dict[str, Tensor]) -> Tensor:
            values = {name: log.exp() for name, log in logs.items()}
            return self.likelihood.log_prob(outputs, self.y, values).sum()

        logs = {name: value.log() for name, value in parameters.items()}
        return torch.func.grad(total, argnums=(0, 1))(outputs, logs)

    # ---------------------------------------------------------------- sampling and other views

    def sample_prior(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)`` from the prior."""
        return self.flat_prior.sample(n, seed)

    def from_network(self, net: nn.Module) -> Tensor:
        """Return the weights of a trained network as ``theta`` ``(dim,)``; extras start at log 0.1.

        Raises:
            ValueError: if its parameters have other names or shapes.
        """
        params = dict(net.named_parameters())
        for name in self.spec.network.names:
            if name not in params or tuple(params[name].shape) != self.spec.shapes[name]:
                raise ValueError(f"the network does not fit the model: {name} must be {self.spec.shapes[name]}")
        extras = {name: torch.full((1,), 0.1).log() for name in self.spec.extras}
        params = {name: params[name].detach().to(self.device, self.dtype) for name in self.spec.network.names}
        return self.spec.flatten(params | {n: v.to(self.device, self.dtype) for n, v in extras.items()})

    def to_network(self, theta: Tensor) -> nn.Module:
        """Return a copy of the network with the weights ``theta`` ``(dim,)``."""
        net = copy.deepcopy(self.net)
        params = self.spec.unflatten(theta)
        for name, parameter in net.named_parameters():
            parameter.data.copy_(params[name])
        return net.requires_grad_(True)

    def to_pyro(self) -> Callable[[], None]:
        """Return the same model as a Pyro model: one site per tensor, for Pyro's samplers and guides.

        The sites are named as the tensors; the site ``likelihood.<name>`` of a learned likelihood parameter is the
        positive variable itself. Temperature scales both prior and likelihood.
        """
        import pyro
        import pyro.distributions as dist
        import pyro.poutine as poutine

        network, spec, likelihood = self.network, self.spec, self.likelihood
        sites = {name: (name, d, spec.shapes[name]) for name, d in self.prior.distributions(spec.network).items()}
        sites |= {_PREFIX + name: (f"likelihood.{name}", d, (1,)) for name, d in likelihood.parameters.items()}

        def placed(name: str) -> dist.Independent:
            _, distribution, shape = sites[name]
            flat = elementwise(name, distribution, shape, name in spec.extras)
            return dist.Independent(rebuild(flat, lambda v: v.to(self.device, self.dtype)), len(shape))

        distributions = {name: placed(name) for name in spec.names}

        def model() -> None:
            values = {name: pyro.sample(sites[name][0], distributions[name]) for name in spec.names}
            theta = spec.flatten({n: v.log() if n in spec.extras else v for n, v in values.items()})
            for name in spec.extras:
                # Pyro adds the log-Jacobian of the logarithm untempered, log_joint tempers it with the prior.
                pyro.factor(f"{name}.jacobian", (1 - self.temperature) * theta[..., spec.slices[name]].sum(-1))
            flat = theta.reshape(-1, spec.dim)
            outputs = network(flat, self.x)
            log_likelihood = likelihood.log_prob(outputs, self.y, self.likelihood_parameters(flat)).sum(-1)
            pyro.factor("log_likelihood", log_likelihood.reshape(theta.shape[:-1]))

        return poutine.scale(model, scale=1 / self.temperature)

    def fingerprint(self) -> str:
        """Return a hash of the data, the architecture, the prior, the likelihood and the temperature."""
        digest = hashlib.sha256()
        for tensor in (self.x.double(), self.y.double()):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().numpy().tobytes())
        digest.update(repr((self.spec.shapes, self.spec.layers, self.temperature)).encode())
        digest.update(repr(self.flat_prior.describe()).encode())
        settings = getattr(self.likelihood, "__dict__", {}).items()
        plain = {name: value for name, value in settings if isinstance(value, bool | int | float | str | None)}
        digest.update(repr((type(self.likelihood).__name__, plain)).encode())
        if not self.spec.layers:  # the labels do not say what the network computes
            digest.update(repr(self.net).encode())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        """Say what the model is in one line."""
        return (
            f"BayesianModel({type(self.net).__name__}, dim={self.dim}, n={len(self.x)}, "
            f"likelihood={type(self.likelihood).__name__}, temperature={self.temperature:g})"
        )

    def _batched(self, function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
        self.spec.check(theta)
        result = function(theta.reshape(-1, self.dim))
        return result.reshape(*theta.shape[:-1], *result.shape[1:])

    def _probe_outputs(self) -> int:
        """Run two rows through the network and return its number of outputs."""
        rows = self.x[:2]
        try:
            with torch.no_grad():
                outputs = self.network(torch.zeros(1, self.dim, dtype=self.dtype, device=self.device), rows)
        except RuntimeError as error:
            raise ValueError(f"the network cannot take x of shape {tuple(self.x.shape)}: {error}") from error
        if outputs.dim() != 3 or outputs.shape[1] != len(rows):
            raise ValueError(f"the network must map (n, ...) to (n, out), got {tuple(outputs.shape[1:])}")
        return outputs.shape[-1]


def _check_modules(net: nn.Module) -> None:
    for name, module in net.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(
            module, nn.modules.instancenorm._InstanceNorm
        ):
            raise ValueError(
                f"module {name!r} ({kind}) makes a row's output depend on the other rows, so there is no likelihood "
                "of single rows; use LayerNorm or GroupNorm"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"module {name!r} ({kind}) is random in training mode; call net.eval() or remove it")


def _as_tensor(values: Tensor | np.ndarray) -> Tensor:
    """Return a tensor; an array is copied, so that it may be read-only and may change later."""
    return torch.tensor(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else torch.as_tensor(values)


def _check_data(x: Tensor | np.ndarray, y: Tensor | np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = _as_tensor(x).to(dtype), _as_tensor(y)
    y = y.to(dtype) if y.is_floating_point() else y
    if x.dim() < 2:
        raise ValueError(f"x must be (n, ...) with at least two axes, got {tuple(x.shape)}")
    if len(x) == 0:
        raise ValueError("x has no rows")
    if y.dim() == 0 or len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows and y has {len(y) if y.dim() else 'none'}")
    _check_finite("x", x)
    _check_finite("y", y)
    return x, y


def _check_finite(name: str, values: Tensor) -> None:
    bad = (~values.isfinite()).reshape(len(values), -1).any(1).nonzero().flatten()
    if len(bad):
        rows = ", ".join(str(int(row)) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise ValueError(f"{name} has NaN or infinite values in {len(bad)} of {len(values)} rows: {rows}")


def _check_informative(y: Tensor) -> None:
    """Raise unless the training targets vary."""
    columns = y.reshape(len(y), -1)
    constant = (columns == columns[:1]).all(0).nonzero().flatten()
    if len(y) > 1 and len(constant):
        column = int(constant[0])
        what = f"holds only the value {columns[0, column].item():g}" + (f" in column {column}" if y.dim() > 1 else "")
        raise ValueError(f"y {what}: there is nothing to learn from a constant target or a single class")
