"""The Bayesian model: a network, a prior, a likelihood and data, as one density over flat
weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from bnnflow.arguments import Count, Positive, checked, columns_of, finite, tensor
from bnnflow.draws import counted_alike, evenly
from bnnflow.dynamics import HasTarget, Target
from bnnflow.identity import digest
from bnnflow.importance import kish_ess
from bnnflow.model import checks, trunk
from bnnflow.model.curvature import Curvature
from bnnflow.model.fingerprint import DataVersion, ModelIdentity, Provenance
from bnnflow.model.likelihood import Likelihood
from bnnflow.model.likelihoods.transformed import Transformed
from bnnflow.model.likelihoods.weighted import Weighted
from bnnflow.model.linearised import LinearisedNetwork
from bnnflow.model.log_joint import LogJoint, Network
from bnnflow.model.network import ChainNetwork, ModuleNetwork
from bnnflow.model.priors import FixedPrior, FlatPrior, HierarchicalPrior, Prior, as_prior
from bnnflow.model.priors.hyperparameters import Hyperparameter
from bnnflow.model.probe import probe
from bnnflow.model.pyro import pyro_model
from bnnflow.model.transported import HasPushforward, Transport, TransportedLogJoint
from bnnflow.types import LikelihoodMembers, Seed
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["BayesianModel"]

# what a model makes of its parts when it is asked for
_DERIVED = ("network", "density", "_of_rows", "_parts", "_features", "_seen")


_FEW_ROWS = 30  # that a look at data needs, if there are as many


class _Parts(NamedTuple):
    """A network as head(trunk(x)), and the layout of ``theta`` for its head."""

    trunk: nn.Module
    head: nn.Module
    spec: WeightSpec


@checked
class BayesianModel(HasTarget):
    """What is inferred: p(theta) p(y | net(x; theta)), with every constant.

    ``theta`` holds the network's weights in ``named_parameters()`` order, then the parameters of
    the prior that are inferred (logarithms of positive ones), then the logarithm of every
    likelihood parameter that is learned; all coordinates are unconstrained. Densities are summed
    over the data, carry the log-Jacobian of each constraint, and are accumulated in float64.

    Args:
        net: any module that maps ``(n, ...)`` inputs to ``(n, out)`` outputs; perceptrons take a
            fast path. The parameters that require gradients are inferred, and their values neither
            used nor changed. The others (``requires_grad=False``) are constants, as buffers are: a
            trained trunk under a head to be inferred, or batch normalisation, which is accepted in
            ``eval()`` mode.
        prior: a `Prior`, one torch or Pyro distribution for every weight, or a dict of them by
            tensor name.
        likelihood: a `Likelihood`.
        x: inputs, ``(n, ...)``, tensor or array, already standardised as the prior assumes.
            Integers become floating-point numbers unless the network needs them as they are, as an
            embedding does.
        y: targets, ``(n,)`` or ``(n, targets)``.
        temperature: the posterior is p(theta | x, y) ** (1 / temperature): prior and likelihood are
            tempered together.
        row_weights: how often each row of data counts, positive, ``(n,)``: its likelihood to that
            power. The weights are not normalised, their sum is how many rows the posterior counts.
            Each counts once if None, or if all are 1.

    Raises:
        ValueError: for empty data, NaN or infinite rows, mismatched lengths, labels out of range or
            of one class only, constant targets, layers that mix rows or are random, and networks
            that do not fit the likelihood.

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
        prior: Prior
        | FixedPrior
        | HierarchicalPrior
        | Distribution
        | Mapping[str, Distribution],
        likelihood: Likelihood | LikelihoodMembers,
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        *,
        temperature: Positive = 1.0,
        row_weights: Tensor | np.ndarray | None = None,
    ) -> None:
        parameter = checks.check_network(net)
        self._dtype, self._device = parameter.dtype, parameter.device
        self._columns = columns_of(x)
        x, y = checks.checked_data(x, y)
        self.net = checks.copied(net)
        self.net.zero_grad(set_to_none=True)
        self.prior = as_prior(prior)
        self.likelihood = Likelihood.of(likelihood)
        self.temperature = temperature
        self._anchor: Tensor | None = None  # where the network is linearised
        self._transport: Transport | None = None  # whose push-forward is the prior
        self._provenance = Provenance()
        network_spec = _labelled(self.net)
        own = Hyperparameter.of_prior(self.prior, network_spec)
        self.hyperparameters = own + Hyperparameter.of_likelihood(
            self.likelihood.parameters
        )
        axes = {
            each.name: network_spec.parameter_axes(each.key, each.shape) for each in own
        }
        shapes = {each.name: each.shape for each in self.hyperparameters}
        self._extension = shapes, axes
        self.spec = network_spec.extend(shapes, axes)
        # says how to evaluate the network, where the spec of a linearised one does not
        self._architecture = self.spec
        known = self.spec.layers and all(map(checks.of_torch, net.modules()))
        # never called, which may change it
        fresh = None if known else copy.deepcopy(self.net)
        self.x, self._n_outputs = checks.accepted(self.net, x.to(self._device), self._dtype)
        self._written = frozenset() if fresh is None else probe(fresh, self.x)
        y = self.likelihood.validate(y, self._n_outputs)
        if len(y) != len(self.x):
            raise ValueError(
                f"the likelihood's validate must keep the {len(self.x)} rows of y, got {len(y)}"
            )
        checks.check_informative(y)
        self.y = checks.placed("y", y, self._device, self._y_dtype(self._dtype))
        self._row_weights = self._checked_weights(row_weights, len(self.x))
        self.flat_prior = self._laid_out(self.prior)
        checks.check_likelihood(self._of_rows)

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

    @property
    def row_weights(self) -> Tensor | None:
        """How often each row of data counts, float64 ``(n,)``; None where each does once."""
        return None if self._row_weights is None else self._row_weights.clone()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of the frame that x came as; none if it came without."""
        return self._columns

    def __repr__(self) -> str:
        """Say what the model is in one line."""
        return (
            f"BayesianModel({type(self.net).__name__}, dim={self.dim}, n={len(self.x)}, "
            f"likelihood={self.likelihood.name}, temperature={self.temperature:g})"
        )

    # ---------------------------------------- other models

    @checked
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BayesianModel:
        """Return the same model on another device or in another floating-point type."""
        device, dtype = torch.device(device or self.device), dtype or self.dtype
        moved = self._changed(
            _device=device,
            _dtype=dtype,
            net=copy.deepcopy(self.net).to(device, dtype),
            x=checks.placed("x", self.x, device, dtype),
            y=checks.placed("y", self.y, device, self._y_dtype(dtype)),
            _row_weights=None
            if self._row_weights is None
            else self._row_weights.to(device),
            flat_prior=self.flat_prior.to(device, dtype),
            _transport=None
            if self._transport is None
            else self._transport.to(device, dtype),
            _anchor=None if self._anchor is None else self._anchor.to(device, dtype),
        )
        moved._provenance = Provenance(expanded=self._provenance.expanded)
        # values may have been rounded
        if dtype != self.dtype or self._provenance.converted is not None:
            converted = (self.fingerprint(), moved._data_version())
            moved._provenance = replace(moved._provenance, converted=converted)
        return moved

    @checked
    def linearised(self, theta: Tensor) -> BayesianModel:
        """Return the model whose network is its own first-order expansion at ``theta``.

        outputs(theta', x) = f(x; theta) + J(x) (theta' - theta), the model of linearised Laplace
        predictions (Immer, Korzepa & Bauer 2021); prior, likelihood, data and temperature are the
        same. Its function has none of the network's symmetries, and its spec claims none. The
        expansion of a linearised model is itself.

        Args:
            theta: the point of expansion, ``(dim,)``; parameters of prior and likelihood in it have
                no effect.

        Raises:
            ValueError: if theta is not ``(dim,)``.
        """
        self.spec.check(theta)
        if theta.dim() != 1:
            raise ValueError(f"theta must be ({self.dim},), got {tuple(theta.shape)}")
        if self._anchor is not None:
            return self
        self._require_weights("linearised")
        shapes = {each.name: each.shape for each in self.hyperparameters}
        moved = self._changed(
            _anchor=theta.detach().to(self.device, self.dtype),
            spec=WeightSpec.unlabelled(self.net, unknown="").extend(shapes),
        )
        moved._provenance = Provenance(expanded=self.fingerprint())
        return moved

    def with_prior(self, prior: Prior) -> BayesianModel:
        """Return the same model with another prior, of fixed distributions as its own.

        Raises:
            ValueError: if one of the two priors has parameters that are inferred: ``theta`` would
                be another vector.
        """
        self._require_weights("with_prior")
        prior = as_prior(prior)
        if self.prior.has_parameters or prior.has_parameters:
            raise ValueError(
                "a prior with inferred parameters cannot take another's place: make a model with it"
            )
        return self._changed(prior=prior, flat_prior=self._laid_out(prior))

    @checked
    def transported(self, flow: HasPushforward) -> BayesianModel:
        """Return the same model with the push-forward of a flow as its prior.

        Its ``theta`` are the flow's latent points z: weights are T(z), z ~ N(0, I), where T follows
        the flow in the fixed steps of its solver.
        No density of the flow is needed, and its inexactness does not matter: it *is* the prior.
        Everything that takes a model takes this one; `weights_of` gives the weights of draws.
        Symmetries of the network that the flow is equivariant to move latent points as they move
        weights, so they are kept, and the meaning of ``theta`` with them.

        Args:
            flow: a `bnnflow.Flow` or a map distilled of one, of this network's weights, and of any
                posterior or prior. Parameters of the likelihood that are learned travel with them.

        Raises:
            ValueError: if the flow is one of other weights, looks at data, which a prior must not,
                or the model is transported or linearised already.
        """
        self._require_weights("transported")
        if self.is_linearised:
            raise ValueError("a linearised model cannot be transported")
        transport = flow.pushforward()
        if transport.spec.shapes != self.spec.shapes:
            raise ValueError("flow is one of other weights than the model's")
        standard = FlatPrior.standard_normal(self.dim).to(self.device, self.dtype)
        return self._changed(
            prior=as_prior(Normal(0.0, 1.0)),
            flat_prior=standard,
            _transport=transport.to(self.device, self.dtype),
        )

    def weights_of(self, theta: Tensor) -> Tensor:
        """Return the network's weights of ``theta``, ``(..., dim) -> (..., dim)``.

        They are other than ``theta`` for a transported model only.
        """
        density = self.density
        if isinstance(density, TransportedLogJoint):
            return density.carried(theta)
        return density.checked(theta)

    def _require_weights(self, what: str) -> None:
        """Raise ``ValueError`` for a transported model, whose ``theta`` are no weights."""
        if self._transport is not None:
            raise ValueError(f"{what} needs a model of weights, not a transported one")

    def untransformed(self) -> BayesianModel:
        """Return the model of the targets that the base of a transformed likelihood knows, such as
        standardised ones; the posterior is the same, and its density but for a constant.

        Any other model is returned itself.
        """
        if not isinstance(self.likelihood, Transformed):
            return self
        base, y = self.likelihood.base, self.likelihood.inverse(self.y)
        y = y if base.wide_targets else y.to(self.dtype)
        return self._changed(likelihood=base, y=y)

    def subset(self, rows: slice | Tensor) -> BayesianModel:
        """Return the same model of some rows of the data, whose likelihood is that of these rows
        alone.

        Args:
            rows: a slice, or int64 indices ``(m,)``; a row may come several times.

        Raises:
            ValueError: if rows is neither, or there are none.
            IndexError: if a row does not exist.
        """
        if not isinstance(rows, slice):
            rows = tensor("rows", rows, device=self.device)
            if rows.dtype != torch.int64 or rows.dim() != 1:
                raise ValueError(
                    f"rows must be a slice or int64 (m,), got {rows.dtype} {tuple(rows.shape)}"
                )
        x, y = self.x[rows], self.y[rows]
        if len(x) == 0:
            raise ValueError("rows has none of the rows of data")
        weights = None if self._row_weights is None else self._row_weights[rows]
        part = self._changed(x=x, y=y, _row_weights=weights)
        # what knows no data, and what is of the same rows
        part._parts, part.network = self._parts, self.network
        part._features = x if self._features is self.x else self._features[rows]
        return part

    @checked
    def extended(
        self,
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        row_weights: Tensor | np.ndarray | None = None,
    ) -> BayesianModel:
        """Return the same model of its rows of data and of new ones after them.

        Args:
            x: inputs ``(m, ...)``, as the model was given its own.
            y: targets ``(m,)`` or ``(m, targets)``.
            row_weights: how often each counts, ``(m,)``; once if None.

        Raises:
            ValueError: if they do not fit the model's, or their lengths differ.
        """
        more = self.inputs(x)
        targets = self.targets(y)
        if len(more) != len(targets):
            raise ValueError(
                f"y must have a value for each of the {len(more)} rows of x, got {len(targets)}"
            )
        weights = self._checked_weights(row_weights, len(more))
        if weights is not None or self._row_weights is not None:
            weights = _ones(len(more), more) if weights is None else weights
            weights = torch.cat([self.counts_of(), weights])
        both = torch.cat([self.x, more]), torch.cat([self.y, targets])
        return self._changed(x=both[0], y=both[1], _row_weights=weights)

    def _changed(self, **attributes: Any) -> BayesianModel:
        """Return a copy with other parts, without what was made of the old ones, and of no
        provenance.
        """
        changed = copy.copy(self)
        for name in _DERIVED:
            vars(changed).pop(name, None)
        vars(changed).update(attributes, _provenance=Provenance())
        return changed

    def _checked_weights(
        self, weights: Tensor | np.ndarray | None, rows: int
    ) -> Tensor | None:
        if weights is None:
            return None
        weights = tensor("row_weights", weights, device=self._device).double()
        if weights.shape != (rows,):
            raise ValueError(f"row_weights must be ({rows},), got {tuple(weights.shape)}")
        if not bool((finite("row_weights", weights) > 0).all()):
            raise ValueError(
                f"row_weights must be positive, got {float(weights.min()):g}: leave out rows that "
                "do not count"
            )
        rounded = weights.to(self._dtype)
        if not bool(((rounded > 0) & rounded.isfinite()).all()):
            raise ValueError(
                f"row_weights must be numbers that {self._dtype} holds, got "
                f"{float(weights.min()):g} to {float(weights.max()):g}"
            )
        return None if bool((weights == 1).all()) else weights.clone()

    def _y_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if self.likelihood.wide_targets else dtype

    def _laid_out(self, prior: Prior) -> FlatPrior:
        return FlatPrior.of(prior, self.spec, self.hyperparameters).to(
            self.device, self.dtype
        )

    # ---------------------------------------- evaluation

    @cached_property
    def network(self) -> Network:
        """The batched network: the fast path for perceptrons, ``vmap`` for the rest.

        Of a network that begins with constants it is the head, and takes `features`.
        """
        net, spec = self.net, self._architecture
        if self._parts is not None:
            net, spec = self._parts.head, self._parts.spec
        network = ChainNetwork(spec) if spec.layers else ModuleNetwork(net, spec)
        return network if self._anchor is None else LinearisedNetwork(network, self._anchor)

    @cached_property
    def density(self) -> LogJoint:
        """The log joint density and its parts, as they are evaluated."""
        if self._row_weights is None:
            return self._density(self.likelihood, self.y)
        return self._density(
            *Weighted.with_targets(self.likelihood, self.y, self._row_weights)
        )

    @cached_property
    def _of_rows(self) -> LogJoint:
        """The same where every row counts once."""
        if self._row_weights is None:
            return self.density
        return self._density(self.likelihood, self.y)

    def _density(self, likelihood: Likelihood, y: Tensor) -> LogJoint:
        spec = self.spec
        if self._parts is not None and self._anchor is None:
            spec = self._parts.spec
        given = (spec, self.network, likelihood, self.flat_prior)
        weights = LogJoint(*given, self._features, y, self.temperature, self._n_outputs)
        if self._transport is None:
            return weights
        return TransportedLogJoint(weights, self._transport, self.flat_prior)

    @cached_property
    def _parts(self) -> _Parts | None:
        """The network in two, if it begins with constants."""
        parts = trunk.split(self.net)
        if parts is None:
            return None
        spec = _labelled(parts.head)
        if spec.shapes != self.spec.network.shapes or spec.names != self.spec.network.names:
            return None  # its parameters come in another order
        return _Parts(parts.trunk, parts.head, spec.extend(*self._extension))

    @cached_property
    def _features(self) -> Tensor:
        """What the constants at the beginning of the network make of the training inputs, computed
        once; the inputs where there are none.
        """
        return self.x if self._parts is None else trunk.features(self._parts.trunk, self.x)

    def features(self, x: Tensor) -> Tensor:
        """Return what `network` takes for checked inputs; those of the last x are kept."""
        if x is self.x or self._parts is None:
            return self._features if x is self.x else x
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        seen = vars(self).get("_seen")
        if seen is None or seen[0] != key:
            # with x itself, whose place in memory is no other's as long as it is held
            seen = self._seen = (key, x, trunk.features(self._parts.trunk, x))
        return seen[2]

    @property
    def is_compiled(self) -> bool:
        """Whether gradients are computed by compiled code, whose last bits are not those of
        torch.
        """
        return self.density.fused is not None

    def symmetries(self) -> Symmetries:
        """Return the symmetries of the posterior: those of the network's function that keep the
        prior.
        """
        own = self.prior.symmetries(self.spec)
        if self._transport is None:
            return own
        carried = zip(own, self._transport.symmetries, strict=True)
        return Symmetries(*(ours & theirs for ours, theirs in carried))

    def known_symmetries(self) -> Symmetries:
        """Return `symmetries` for what cannot do without.

        Raises:
            ValueError: if the network could not be labelled, with the module or operation that is
                the reason.
        """
        self.spec.known_symmetries()
        return self.symmetries()

    def outputs(self, theta: Tensor, x: Tensor | np.ndarray | None = None) -> Tensor:
        """Evaluate the network, ``(..., dim) -> (..., n, out)``.

        Args:
            theta: weights.
            x: inputs; the training inputs if None.

        Raises:
            ValueError: if theta or x has the wrong shape, or x has NaN or infinite rows.
        """
        return self.density.outputs(theta, self.features(self.inputs(x)))

    def inputs(self, x: Tensor | np.ndarray | None, name: str = "x") -> Tensor:
        """Return checked inputs, called ``name``, on the model's device.

        The training inputs for None.
        """
        if x is None or x is self.x:
            return self.x
        checks.check_columns(name, x, self._columns)
        x = checks.new_inputs(name, x, self.x)
        if not x.is_floating_point():
            # an index beyond the table of an embedding is found out here
            checks.outputs_of(self.net, x)
        return x

    def targets(self, y: Tensor | np.ndarray | None, name: str = "y") -> Tensor:
        """Return checked targets, called ``name``, on the model's device.

        The training targets for None.
        """
        if y is None or y is self.y:
            return self.y
        y = checks.new_targets(name, y, self.likelihood, self._n_outputs)
        return y.to(
            self.device, self._y_dtype(self.dtype) if y.is_floating_point() else None
        )

    def likelihood_parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the learned likelihood parameters, positive, ``(..., *shape)`` each.

        The shape of a scalar is (1,).
        """
        return self.density.parameters(theta)

    def log_prior(self, theta: Tensor) -> Tensor:
        """Return the log prior density of ``theta``, untempered, ``(..., dim) -> (...)``."""
        return self.density.log_prior(theta)

    def log_likelihood(self, theta: Tensor) -> Tensor:
        """Return the log likelihood summed over the data, untempered, ``(..., dim) -> (...)``."""
        return self.density.log_likelihood(theta)

    def log_joint(self, theta: Tensor) -> Tensor:
        """Return (log prior + log likelihood) / temperature, ``(..., dim) -> (...)``."""
        return (self.log_prior(theta) + self.log_likelihood(theta)) / self.temperature

    def pointwise_log_likelihood(
        self,
        theta: Tensor,
        x: Tensor | np.ndarray | None = None,
        y: Tensor | np.ndarray | None = None,
    ) -> Tensor:
        """Return the log likelihood of every row, ``(..., dim) -> (..., n)``, as of one that counts
        once.

        Training data if x and y are None.
        """
        x, y = self.inputs(x), self.targets(y)
        if len(x) != len(y):
            raise ValueError(
                f"y must have a value for each of the {len(x)} rows of x, got {len(y)}"
            )
        return self._of_rows.pointwise_log_likelihood(theta, self.features(x), y)

    def log_likelihood_and_grad(
        self, theta: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the log likelihood and its gradient, ``(..., dim) -> (...), (..., dim)``.

        Differentiable again.

        Args:
            theta: weights.
            rows: int64 indices of the rows of data to use, ``(batch,)`` for all networks or
                ``(..., batch)`` with a batch for each; all the data if None. Both results are
                multiplied by n / batch, which makes them unbiased for the full ones if every row is
                equally likely.

        Raises:
            ValueError: if theta or rows has the wrong shape or dtype.
        """
        return self.density.log_likelihood_and_grad(theta, rows)

    def log_likelihood_grad(self, theta: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the gradient of the log likelihood alone, ``(..., dim) -> (..., dim)``.

        Differentiable again.
        """
        return self.density.log_likelihood_grad(theta, rows)

    def log_joint_and_grad(
        self, theta: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log_joint and its gradient, ``(..., dim) -> (...), (..., dim)``.

        Differentiable again.

        ``rows`` choose mini-batches as in `log_likelihood_and_grad`; the prior is always counted
        once.
        """
        return self.density.log_joint_and_grad(theta, rows)

    @property
    def target(self) -> Target:
        """`log_joint_and_grad` as chains move in it, without derivatives: with compiled steps,
        unless that method was replaced.
        """
        method = self.log_joint_and_grad
        if getattr(method, "__func__", None) is _LOG_JOINT_AND_GRAD:
            return self.density.target
        return Target(torch.no_grad()(method))

    def minibatch_log_joint_and_grad(
        self, theta: Tensor, generator: torch.Generator, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Estimate log_joint and its gradient without bias, from a batch of data of its own for
        every network.

        The batch is a stratified sample: the data in their order are cut into ``batch_size``
        stretches of equal length, and one row is drawn from each. Every row is equally likely, so
        the estimate is unbiased; its variance is never above that of drawing with replacement, and
        zero for ``batch_size = n``. The cost does not grow with n.

        Args:
            theta: ``(..., dim)``.
            generator: source of the rows, on the model's device.
            batch_size: rows in a batch, 1 to n.

        Raises:
            ValueError: if there are fewer rows of data than ``batch_size``, or theta has the wrong
                shape.
        """
        return self.density.minibatch_log_joint_and_grad(theta, generator, batch_size)

    def counts_of(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return how often rows of data count, float64 ``(m,)``: all of them, or those of these
        numbers.
        """
        every = (
            _ones(len(self.x), self.x) if self._row_weights is None else self._row_weights
        )
        return every[rows]

    def powers_of(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return to which powers the posterior holds the likelihoods of rows, float64 ``(m,)``:
        how often each counts, divided by the temperature.
        """
        return self.counts_of(rows) / self.temperature

    def some_rows(self, most: int) -> Tensor:
        """Return numbers of at most so many rows, spread evenly, that count alike: where rows have
        weights, each comes as often as it counts, and there are hardly more than these are worth.
        """
        if self._row_weights is None:
            return evenly(len(self.x), most).to(self.device)
        logs = self._row_weights.log()
        worth = max(kish_ess(logs), min(_FEW_ROWS, len(logs)))
        return counted_alike(logs, min(most, int(worth))).to(self.device)

    def random_rows(
        self, shape: tuple[int, ...], generator: torch.Generator, batch_size: int
    ) -> Tensor:
        """Draw the rows of mini-batches, int64 ``(*shape, batch_size)``, as
        `minibatch_log_joint_and_grad` does.

        Raises:
            ValueError: unless ``batch_size`` is between 1 and the number of rows.
        """
        return self.density.random_rows(shape, generator, batch_size)

    def at(self, theta: Tensor, rows: Tensor | None = None) -> Curvature:
        """Return the log likelihood around weights: its Gauss-Newton matrix, Hessian and the like,
        when asked for.

        Args:
            theta: ``(batch, dim)``.
            rows: use only these rows of the data, int64 ``(m,)``, scaled to all of them; for a
                Hessian also ``(batch, m)``.

        Raises:
            ValueError: if theta or rows has the wrong shape or dtype.
        """
        self._require_weights("at")
        return Curvature(self.density, theta, rows)

    @property
    def has_hessian(self) -> bool:
        """Whether `Curvature.grad_and_hessian` is known, at no cost."""
        return self.density.hessian is not None

    @property
    def has_gauss_newton_slope(self) -> bool:
        """Whether `Curvature.slope` is known, at no cost."""
        return self.density.has_gauss_newton_slope

    # ---------------------------------------- sampling and other views

    @checked
    def sample_prior(self, n: Count, seed: Seed) -> Tensor:
        """Draw ``(n, dim)`` from the prior."""
        return self.flat_prior.sample(n, seed)

    @checked
    def theta_of(self, net: nn.Module) -> Tensor:
        """Return the weights of a trained network as ``theta`` ``(dim,)``.

        Parameters of the prior are put at the mode of their density given the weights, those of the
        likelihood at 0.1.

        Raises:
            ValueError: if its parameters have other names or shapes, or its constants other values.
        """
        self._require_weights("theta_of")
        checks.check_alike(net, self.net, self.spec.names)
        given = dict(net.named_parameters())
        params = {
            name: given[name].detach().to(self.device, self.dtype)
            for name in self.spec.network.names
        }
        for each in self.hyperparameters:
            start = math.log(0.1) if each.positive else 0.0
            params[each.name] = torch.full(
                each.shape, start, device=self.device, dtype=self.dtype
            )
        return self.flat_prior.at_mode(self.spec.flatten(params))

    @property
    def is_transported(self) -> bool:
        """Whether ``theta`` are latent points of a flow, see `transported`."""
        return self._transport is not None

    @property
    def is_linearised(self) -> bool:
        """Whether the network is expanded about one point, see `linearised`."""
        return self._anchor is not None

    @checked
    def network_at(self, theta: Tensor) -> nn.Module:
        """Return a copy of the network with the weights ``theta`` ``(dim,)``.

        Constants stay as they are.

        Raises:
            ValueError: for a linearised model, which is no longer a network.
        """
        if self.is_linearised:
            raise ValueError("a linearised model is not a network with other weights")
        if self.spec.check(theta).dim() != 1:
            raise ValueError(f"theta must be ({self.dim},), got {tuple(theta.shape)}")
        net = copy.deepcopy(self.net)
        params = self.spec.unflatten(self.weights_of(theta))
        for name, parameter in net.named_parameters():
            if name in params:
                parameter.data.copy_(params[name])
        return net

    def to_pyro(self) -> Callable[[], None]:
        """Return the same model as a Pyro model: one site per tensor, for Pyro's samplers and
        guides.

        The sites are named as the tensors; the sites ``prior.<name>`` and ``likelihood.<name>`` of
        inferred parameters are the variables themselves, not their logarithms. Temperature scales
        both prior and likelihood.
        """
        self._require_weights("to_pyro")

        def log_likelihood(theta: Tensor) -> Tensor:
            values = self.pointwise_log_likelihood(theta)
            if self._row_weights is not None:
                values = values * self._row_weights.to(values.dtype)
            return values.sum(-1)

        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return pyro_model(
            self.prior,
            self.hyperparameters,
            self.spec,
            log_likelihood,
            self.temperature,
            like,
        )

    # ---------------------------------------- identity

    def fingerprint(self) -> str:
        """Return a hash of the data, the network, the prior, the likelihood and the temperature.

        It is the same in every process, and for the same model in another floating-point type that
        holds its values. Of the network count its code, settings, constants and buffers; the number
        in front is the version of the rule. Where something cannot be identified (see
        `unidentified`) no other process finds the same.
        """
        converted = self._provenance.converted
        if converted is not None and converted[1] == self._data_version():
            return converted[0]
        return self._identity().fingerprint

    def prior_fingerprint(self) -> str:
        """Return a hash of what ``theta`` means, how it is distributed before any data, and of the
        map to weights of a transported model.
        """
        carried = None if self._transport is None else self._transport.identity
        return digest((self.spec.shapes, self.flat_prior.describe(), carried))

    @property
    def unidentified(self) -> tuple[str, ...]:
        """What the fingerprint cannot identify, and where: runs of such a model cannot be resumed.

        Locks, open files, generators and the like, as attributes of the network, the likelihood or
        the prior.
        """
        return self._identity().unidentified

    def check_draws(self, draws: object) -> None:
        """Raise ``ValueError`` if draws say that they are draws of another posterior.

        `Draws` carry the fingerprint of their model. This model's are its own, those of the same
        model on another device or in another floating-point type, and for a linearised model those
        of the model that it expands. Plain weights say nothing and pass: ``draws.theta``, with
        ``draws.log_weights`` beside it, where draws of one posterior are to be used with another on
        purpose.
        """
        theirs = getattr(draws, "info", {}).get("model")
        data = self._data_version()
        if not isinstance(theirs, str) or self._provenance.recognises(theirs, data):
            return
        if not self.recognises(theirs):
            raise ValueError(
                f"these are draws of another model, with fingerprint {theirs}; this one has "
                f"{self.fingerprint()}. "
                "To use their weights all the same, pass draws.theta"
            )
        self._provenance = replace(self._provenance, recognised=(theirs, data))

    def recognises(self, fingerprint: str) -> bool:
        """Say whether a fingerprint is this model's.

        Of one of an earlier version, as far as that could see.
        """
        return fingerprint == (
            self.fingerprint() if ":" in fingerprint else self._identity().first_fingerprint
        )

    def _identity(self) -> ModelIdentity:
        return ModelIdentity(
            net=self.net,
            written=self._written,
            architecture=self._architecture,
            spec=self.spec,
            prior=self.prior,
            flat_prior=self.flat_prior,
            likelihood=self.likelihood,
            data=self._data(),
            temperature=self.temperature,
            anchor=self._anchor,
            transport=None if self._transport is None else self._transport.identity,
        )

    def _data_version(self) -> DataVersion:
        return DataVersion(*self._data())

    def _data(self) -> tuple[Tensor, ...]:
        weights = () if self._row_weights is None else (self._row_weights,)
        return (self.x, self.y, *weights)


def _ones(count: int, like: Tensor) -> Tensor:
    return torch.ones(count, dtype=torch.float64, device=like.device)


_LOG_JOINT_AND_GRAD = BayesianModel.log_joint_and_grad


def _labelled(net: nn.Module) -> WeightSpec:
    """Return the layout of a network's weights, with labels where they can be found."""
    try:
        return WeightSpec.of(copy.deepcopy(net))  # what tracing runs may change it
    except ValueError as error:
        return WeightSpec.unlabelled(net, str(error))
