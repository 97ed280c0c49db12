"""The interface of priors over the weights of a network."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from bnnflow.arguments import checked
from bnnflow.model.adapted import Adapted, Interface
from bnnflow.model.priors.log_scales import LogScales
from bnnflow.model.priors.marginals import dtype_of, unwrapped
from bnnflow.weights import Symmetries, WeightSpec, generators_of_permutations, reordered

__all__ = ["FixedPrior", "HierarchicalPrior", "Prior"]


class FixedPrior(Protocol):
    """What an object must have to be taken for a prior of fixed distributions."""

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return a distribution per tensor name; each must broadcast to the tensor's shape."""
        ...


class HierarchicalPrior(Protocol):
    """What an object must have to be taken for a prior with parameters: see `Prior`."""

    def parameters(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return the prior of every parameter; its batch shape is the parameter's."""
        ...

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, Distribution]:
        """Return the distribution of every tensor of the network given the parameters."""
        ...


class Prior(Interface):
    """One elementwise distribution for every tensor of a network.

    Write ``distributions`` if all of them are fixed. If they depend on parameters that are inferred
    beside the weights, such as their scales, write ``parameters`` and ``conditional`` instead.

    ``theta`` holds the network's weights, then these parameters, each in an unconstrained
    coordinate: the logarithm of one whose distribution lives on the positive numbers
    (``prior.log_<name>``), a real one itself (``prior.<name>``). A parameter called
    ``<anything>.<tensor>`` with an axis as long as the tensor's is permuted with the tensor's units
    there.
    """

    @staticmethod
    def of(prior: Prior | FixedPrior | HierarchicalPrior) -> Prior:
        """Return a prior itself, and any other object with the methods of one as a prior.

        Raises:
            TypeError: for an object that has neither ``distributions`` nor ``conditional``.
            ValueError: for a prior that has only one of ``parameters`` and ``conditional``.
        """
        if not isinstance(prior, Prior):
            if not (hasattr(prior, "distributions") or hasattr(prior, "conditional")):
                raise TypeError(
                    f"prior must be a Prior, a Distribution or a dict of them, got {prior!r}"
                )
            prior = _Adapted(prior)
        if prior._has("parameters") != prior._has("conditional"):
            raise ValueError(
                f"{prior.name}: a prior with parameters has both parameters and conditional"
            )
        return prior

    @property
    def has_parameters(self) -> bool:
        """Whether it has parameters that are inferred beside the weights."""
        return self._has("conditional")

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return a distribution per tensor name; each must broadcast to the tensor's shape."""
        raise ValueError(f"{self.name} has no fixed distributions")

    def parameters(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return the prior of every parameter, none by default.

        Its batch shape is the parameter's, ``(1,)`` for a scalar.
        """
        return {}

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, Distribution]:
        """Return the distribution of every tensor given the parameters, ``(..., *shape)`` each.

        The distributions are elementwise and must broadcast to ``(..., *shape of the tensor)``.
        """
        return self.distributions(spec)

    def log_scales(self, spec: WeightSpec) -> LogScales | None:
        """Return the scales of the weights given the parameters.

        None if they are not known to be normal around zero.

        Args:
            spec: the layout of the weights and the prior's parameters.
        """
        return None

    @checked
    def symmetries(self, spec: WeightSpec) -> Symmetries:
        """Return the symmetries of the network's function that leave this prior unchanged.

        A permutation keeps a prior whose distributions do not vary along the permuted axes, or vary
        only with parameters that are permuted too; a sign flip one that is even on every tensor
        that it acts on; no proper prior keeps a rescaling or a shift in phase. Of a network that
        could not be labelled none are known, though there may be some: see `WeightSpec.unknown`.
        """
        own, network = spec.symmetries(), spec.network
        given, varies = _probe_parameters(network, self)
        densities = _elementwise_densities(network, self, given)
        for label in own.permutation - varies:
            for perm in generators_of_permutations(network.widths[label]):
                moved = {
                    name: reordered(
                        value, network.parameter_axes(name, tuple(value.shape)), label, perm
                    )
                    for name, value in given.items()
                }
                after = _elementwise_densities(network, self, moved) if given else densities
                before = {
                    name: reordered(density, (None, *network.axes[name]), label, perm)
                    for name, density in densities.items()
                }
                if not all(
                    torch.allclose(after[name], before[name], atol=1e-5) for name in before
                ):
                    varies.add(label)
        return Symmetries(own.permutation - varies, own.sign - _uneven(network, densities))

    def _has(self, member: str) -> bool:
        return getattr(type(self), member) is not getattr(Prior, member)


class _Adapted(Adapted, Prior):
    """An object with the methods of a prior as one."""

    _optional = ("distributions", "parameters", "conditional")


# ---------------------------------------- what keeps a prior

# Where densities are compared: whatever a prior's scale, some of these are less than a decade from
# it.
_SCALES = torch.logspace(-8, 8, 17, dtype=torch.float64)
_PROBES = torch.cat([-_SCALES.flip(0), _SCALES])


def _probe_parameters(
    network: WeightSpec, prior: Prior
) -> tuple[dict[str, Tensor], set[str]]:
    """Return values of a prior's parameters that no permutation keeps, and the labels along which
    their priors vary.
    """
    given: dict[str, Tensor] = {}
    varies: set[str] = set()
    generator = torch.Generator().manual_seed(0)
    for name, distribution in prior.parameters(network).items():
        distribution = unwrapped(distribution)
        shape = tuple(distribution.batch_shape) or (1,)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        given[name] = values.exp()  # any real parameter may be positive, too
        probes = _SCALES.reshape(-1, *(1,) * len(shape)).expand(-1, *shape)
        density = distribution.log_prob(probes.to(dtype_of(distribution))).double()
        for axis, label in enumerate(network.parameter_axes(name, shape), start=1):
            if label is not None and not torch.allclose(
                density, density.narrow(axis, 0, 1), atol=1e-5
            ):
                varies.add(label)
    return given, varies


def _elementwise_densities(
    network: WeightSpec, prior: Prior, given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the log density of every entry of every tensor at the probes, ``(probes, *shape)``
    each.
    """
    densities = {}
    for name, distribution in prior.conditional(network, given).items():
        shape, distribution = network.shapes[name], unwrapped(distribution)
        values = _PROBES.reshape(-1, *(1,) * len(shape)).expand(-1, *shape)
        densities[name] = distribution.log_prob(values.to(dtype_of(distribution))).double()
    return densities


def _uneven(network: WeightSpec, densities: dict[str, Tensor]) -> set[str]:
    """Return the labels whose signs act on a tensor of a density that is not even."""
    uneven: set[str] = set()
    for name, density in densities.items():
        if not torch.allclose(density, density.flip(0), atol=1e-5):
            scale_exponents = zip(
                network.unit_axes(name)[1], network.scale_exponents(name), strict=True
            )
            uneven |= {
                label for label, power in scale_exponents if power and label is not None
            }
    return uneven
