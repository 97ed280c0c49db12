"""Priors over weights, and the flat density that a model makes of them.

A prior names one elementwise distribution per tensor, fixed or given parameters that are inferred beside the weights.
``FlatPrior`` lays them out along ``theta``: the weights, then the parameters of the prior, then those of the
likelihood. The coordinate of a positive parameter is its logarithm (with the Jacobian). It also knows the map to
standard normal coordinates, in which the transport works.
"""

from __future__ import annotations

import copy
import math
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution, constraints

from bnnflow import storage
from bnnflow.arguments import Positive, Whole, checked, choice, finite, number, positive, settle
from bnnflow.draws import Draws
from bnnflow.forward_mode import jvp
from bnnflow.model.arrowhead import Arrowhead, Bend
from bnnflow.model.quantiles import FAMILIES, QuantileTable
from bnnflow.seeding import as_generator, isolated
from bnnflow.types import HierarchicalPrior, Prior, Seed
from bnnflow.weights import WeightSpec, unwrapped

__all__ = [
    "Empirical",
    "FanIn",
    "FlatPrior",
    "Hierarchical",
    "Horseshoe",
    "Independent",
    "Laplace",
    "Normal",
    "PerTensor",
    "StudentT",
    "as_prior",
]

_LOG_2PI = math.log(2 * math.pi)


def _exact(value: float) -> Tensor:
    """Keep a setting in double precision; a model rounds it to its own."""
    return torch.tensor(float(value), dtype=torch.float64)


@checked
@dataclass(frozen=True)
class Independent:
    """One distribution for every weight, independently.

    Args:
        distribution: any scalar torch or Pyro distribution on the real line.
    """

    distribution: Distribution

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return the same distribution for every tensor."""
        return dict.fromkeys(spec.names, self.distribution)


def Normal(scale: float = 1.0, loc: float = 0.0) -> Independent:
    """Return independent normal weights with standard deviation ``scale``."""
    return Independent(td.Normal(_exact(number("loc", loc)), _exact(positive("scale", scale))))


def Laplace(scale: float = 1.0, loc: float = 0.0) -> Independent:
    """Return independent Laplace weights."""
    return Independent(td.Laplace(_exact(number("loc", loc)), _exact(positive("scale", scale))))


def StudentT(df: float = 4.0, scale: float = 1.0, loc: float = 0.0) -> Independent:
    """Return independent Student-t weights."""
    df, loc, scale = positive("df", df), number("loc", loc), positive("scale", scale)
    return Independent(td.StudentT(_exact(df), _exact(loc), _exact(scale)))


@dataclass(frozen=True)
class FanIn:
    """Normal weights with variance ``scale**2 / fan_in``, biases with standard deviation ``bias_scale``.

    Keeps the prior over functions of the same size at every width (Neal, 1996), whatever the layer; what fan in means
    for each, `WeightSpec.fan_in` says.
    """

    scale: float = 1.0
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        settle(self, number, "scale", "bias_scale", above=0)

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return a normal distribution per tensor."""
        scales = {}
        for name in spec.names:
            fan_in = spec.fan_in(name)
            scales[name] = self.bias_scale if fan_in is None else self.scale / math.sqrt(fan_in)
        return {name: td.Normal(_exact(0.0), _exact(scale)) for name, scale in scales.items()}


@checked
@dataclass(frozen=True)
class PerTensor:
    """A distribution for each tensor by name, and one for the rest.

    Args:
        by_name: distributions that broadcast to the shape of their tensor.
        default: for every tensor that is not named; without it every tensor must be.
    """

    by_name: Mapping[str, Distribution]
    default: Distribution | None = None

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return a distribution per tensor; raise ``ValueError`` for unknown or missing names."""
        unknown = set(self.by_name) - set(spec.names)
        missing = set(spec.names) - set(self.by_name)
        if unknown:
            raise ValueError(f"prior names {sorted(unknown)}, but the network's tensors are {list(spec.names)}")
        if missing and self.default is None:
            raise ValueError(f"prior has no distribution for {sorted(missing)} and no default")
        return {name: self.by_name.get(name, self.default) for name in spec.names}  # type: ignore[misc]


@checked
@dataclass(frozen=True)
class Hierarchical:
    """Normal weights whose standard deviation is inferred, one for every tensor.

    w ~ N(0, s_k^2) in tensor k, s_k ~ ``scale_prior`` independently: the data decide how large the weights of a layer
    are (MacKay 1992; Neal 1996). ``theta`` holds log s_k as ``prior.log_scale.<tensor>``.

    Args:
        scale_prior: a distribution on the positive numbers.
        fan_in: divide the standard deviations of matrices and kernels by sqrt(fan in), so that one scale means
            functions of one size at every width.
    """

    scale_prior: Distribution = field(default_factory=lambda: td.HalfNormal(_exact(1.0)))
    fan_in: bool = False

    def parameters(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return the prior of every tensor's scale."""
        return {f"scale.{name}": self.scale_prior for name in spec.names}

    def conditional(self, spec: WeightSpec, parameters: dict[str, Tensor]) -> dict[str, Distribution]:
        """Return a normal distribution per tensor given the scales."""
        return {
            name: _centred(_aligned(parameters[f"scale.{name}"], shape) * self.factor(spec, name))
            for name, shape in spec.shapes.items()
        }

    def factor(self, spec: WeightSpec, name: str) -> float:
        """Return what a tensor's scale is multiplied by."""
        fan_in = spec.fan_in(name) if self.fan_in else None
        return 1.0 if fan_in is None else 1 / math.sqrt(fan_in)


@dataclass(frozen=True)
class Horseshoe:
    """The regularised horseshoe: most weights, or whole units, are shrunk to zero and a few are left alone.

    In every matrix or kernel w_ij ~ N(0, tau^2 l_j^2 c^2 / (c^2 + tau^2 l_j^2)), with half-Cauchy scales, tau of the
    tensor and l_j local (Carvalho, Polson & Scott 2010), and c^2 ~ InverseGamma(slab_df / 2, slab_df slab_scale^2 / 2),
    which bounds what escapes shrinkage by a Student-t slab (Piironen & Vehtari 2017). Biases are N(0, bias_scale^2).

    ``theta`` holds the weights themselves, so the formulation is centred, and the logarithms of the scales:
    ``prior.log_global.<tensor>`` (tau), ``prior.log_local.<tensor>`` (l) and ``prior.log_slab.<tensor>`` (c^2). With
    one local scale for all the weights that leave a unit (Ghosh, Yao & Doshi-Velez 2018) many weights inform each
    scale and the posterior has no deep funnels; with one for every weight expect small steps.

    Args:
        global_scale: tau ~ HalfCauchy(global_scale). For p0 relevant inputs of p and n rows of standardised data,
            p0 / (p - p0) / sqrt(n) is a good guess.
        slab_scale: size of the weights that are not shrunk.
        slab_df: degrees of freedom of the slab.
        local: a local scale for every ``"unit"`` (or input) that a tensor reads, or for every ``"weight"``.
        bias_scale: standard deviation of the biases.

    Raises:
        ValueError: if a scale is not positive, or ``local`` is something else.
    """

    global_scale: float = 0.1
    slab_scale: float = 2.0
    slab_df: float = 4.0
    local: Literal["unit", "weight"] = "unit"
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        settle(self, number, "global_scale", "slab_scale", "slab_df", "bias_scale", above=0)
        settle(self, choice, "local", choices=("unit", "weight"))

    def parameters(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return the priors of the global, local and slab scales of every matrix or kernel."""
        found: dict[str, Distribution] = {}
        for name, shape in spec.shapes.items():
            if len(shape) > 1:
                half = _exact(self.slab_df / 2)
                read = 0 if name in spec.transposed else 1
                of_units = tuple(size if axis == read else 1 for axis, size in enumerate(shape))
                local = shape if self.local == "weight" else of_units
                found[f"global.{name}"] = td.HalfCauchy(_exact(self.global_scale))
                found[f"local.{name}"] = td.HalfCauchy(_exact(1.0).expand(local))
                found[f"slab.{name}"] = td.InverseGamma(half, half * self.slab_scale**2)
        return found

    def conditional(self, spec: WeightSpec, parameters: dict[str, Tensor]) -> dict[str, Distribution]:
        """Return a normal distribution per tensor given the scales."""
        found: dict[str, Distribution] = {}
        for name, shape in spec.shapes.items():
            if len(shape) > 1:
                wide = _aligned(parameters[f"global.{name}"], shape) * parameters[f"local.{name}"]  # (..., *shape)
                slab = _aligned(parameters[f"slab.{name}"], shape).sqrt()
                found[name] = _centred(wide / torch.hypot(slab, wide) * slab)  # no square of a huge or tiny scale
            else:
                found[name] = _centred(_exact(self.bias_scale))
        return found


def _aligned(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give a scalar parameter ``(..., 1)`` the axes of a tensor of ``shape``, ``(..., 1, 1)`` for a matrix."""
    return values.reshape((*values.shape[:-1], *(1,) * len(shape)))


def _centred(scale: Tensor) -> td.Normal:
    return td.Normal(torch.zeros((), dtype=scale.dtype, device=scale.device), scale, validate_args=False)


@checked
@dataclass(frozen=True, eq=False)
class Empirical:
    """Normal weights with the means and standard deviations of networks that were trained before.

    Args:
        weights: draws of flat weights ``(..., dim)``, a trained network, or its tensors by name (a ``state_dict``).
        per: statistics of every ``"tensor"`` over its entries, which keeps the units exchangeable, or of every
            ``"weight"`` over the draws, of which there must be two or more.
        zero_mean: normal around zero with the root mean square as scale, which keeps the symmetries of sign.
        min_scale: a lower bound of the standard deviations, in units of the weights: those of networks for
            standardised data are about one.
        extras: how many parameters of a prior or likelihood follow the network's weights in every draw.

    A tensor with a single value says nothing about a spread and is taken as normal around zero.

    Raises:
        ValueError: if the weights are not finite, or (in a model) have the wrong names, shapes or length.
    """

    weights: Tensor | Mapping[str, Tensor] | torch.nn.Module
    per: Literal["tensor", "weight"] = "tensor"
    zero_mean: bool = False
    min_scale: Positive = 1e-2
    extras: Whole = 0

    def __post_init__(self) -> None:
        if isinstance(self.weights, Tensor):
            if self.weights.dim() == 0 or self.weights.numel() == 0:
                raise ValueError(f"weights must be (..., dim), got shape {tuple(self.weights.shape)}")
            finite("weights", self.weights)

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> Empirical:
        """Read the weights from a file: a ``state_dict`` by ``torch.save``, or draws by ``Draws.save``.

        Nothing that a file could hold is executed.

        Raises:
            ValueError: if the file holds anything but tensors by name, or weighted draws.
        """
        path = storage.found(path)
        with storage.described(path, f"{path} is no file of weights"):
            ours = zipfile.is_zipfile(path) and "header.npy" in zipfile.ZipFile(path).namelist()
            loaded = Draws.load(path) if ours else torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(loaded, Draws):
            if loaded.log_weights is not None:
                raise ValueError(f"{path} holds weighted draws; resample them first")
            return cls(loaded.flat, **options)
        if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise ValueError(f"{path} must hold a state_dict, tensors by name")
        return cls(dict(loaded), **options)

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return a normal distribution per tensor."""
        found: dict[str, Distribution] = {}
        for name, values in self._tensors(spec).items():  # (draws, *shape)
            if not bool(values.isfinite().all()):
                raise ValueError(f"the trained weights of {name} are not all finite")
            if self.per == "weight" and len(values) < 2:
                raise ValueError("one network has no spread of each weight; give several, or use per='tensor'")
            axes = (0,) if self.per == "weight" else tuple(range(values.dim()))
            loc = values.mean(axes)
            if self.zero_mean or values.numel() == 1:
                loc = torch.zeros_like(loc)
            scale = (values - loc).square().mean(axes).sqrt().clamp(min=self.min_scale)
            found[name] = td.Normal(loc, scale)
        return found

    def _tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        """Return the trained tensors as float64 ``(draws, *shape)``."""
        if isinstance(self.weights, Tensor):
            flat = self.weights.detach().reshape(-1, self.weights.shape[-1]).double().cpu()
            if flat.shape[1] != spec.dim + self.extras:
                raise ValueError(
                    f"the trained weights have {flat.shape[1]} entries, the network {spec.dim}; if parameters of a "
                    f"prior or likelihood follow the weights, say how many with extras=, got {self.extras}"
                )
            return spec.unflatten(flat[:, : spec.dim])
        named = self.weights.state_dict() if isinstance(self.weights, torch.nn.Module) else self.weights
        missing = [name for name in spec.names if name not in named]
        if missing:
            raise ValueError(f"the trained weights lack {missing}; they have {sorted(named)}")
        tensors = {name: named[name].detach().double().cpu() for name in spec.names}
        for name, values in tensors.items():
            if tuple(values.shape) != spec.shapes[name]:
                raise ValueError(f"the trained {name} is {tuple(values.shape)}, the network's {spec.shapes[name]}")
        return {name: values.unsqueeze(0) for name, values in tensors.items()}


def as_prior(
    prior: Prior | HierarchicalPrior | Distribution | Mapping[str, Distribution],
) -> Prior | HierarchicalPrior:
    """Accept a prior, one distribution for every weight, or a dict of them per tensor."""
    if isinstance(prior, Distribution):
        return Independent(prior)
    if isinstance(prior, Mapping):
        return PerTensor(prior)
    if hasattr(prior, "parameters") != hasattr(prior, "conditional"):
        raise ValueError(f"{type(prior).__name__}: a prior with parameters has both parameters and conditional")
    if not (hasattr(prior, "distributions") or hasattr(prior, "conditional")):
        raise ValueError(f"prior must be a Prior, a Distribution or a dict of them, got {type(prior).__name__}")
    return prior


class Extra(NamedTuple):
    """A parameter of the prior or of the likelihood: one tensor of ``theta`` after the weights."""

    name: str  # in theta: "likelihood.log_scale"
    key: str  # to the prior or likelihood: "scale"
    site: str  # to Pyro: "likelihood.scale"
    distribution: Distribution
    shape: tuple[int, ...]
    positive: bool  # the coordinate in theta is the logarithm

    def value(self, coordinate: Tensor) -> Tensor:
        """Return the parameter of its coordinate."""
        return coordinate.exp() if self.positive else coordinate


def extras_of(prior: Prior | HierarchicalPrior, spec: WeightSpec) -> list[Extra]:
    """Return the inferred parameters of a prior; none for one that fixes everything."""
    if not hasattr(prior, "parameters"):
        return []
    found = []
    for key, distribution in prior.parameters(spec).items():  # type: ignore[union-attr]
        positive = _on_half_line(unwrapped(distribution))
        found.append(_extra("prior", key, distribution, positive))
    return found


def positive_extras(parameters: Mapping[str, Distribution]) -> list[Extra]:
    """Return the learned parameters of a likelihood."""
    return [_extra("likelihood", key, distribution, True) for key, distribution in parameters.items()]


def _extra(owner: str, key: str, distribution: Distribution, positive: bool) -> Extra:
    shape = tuple(unwrapped(distribution).batch_shape) or (1,)
    name = f"{owner}.log_{key}" if positive else f"{owner}.{key}"
    return Extra(name, key, f"{owner}.{key}", distribution, shape, positive)


# Derivatives of log densities by the variable, and of those of positive variables by their logarithm u, with its
# Jacobian. Others come from automatic differentiation, which takes ten times as long for so few operations.
_SLOPES: dict[type[Distribution], Callable[[Any, Tensor], Tensor]] = {
    td.Normal: lambda d, x: (d.loc - x) / d.scale**2,
    td.Laplace: lambda d, x: (d.loc - x).sign() / d.scale,
    td.StudentT: lambda d, x: (d.df + 1) * (d.loc - x) / (d.df * d.scale**2 + (x - d.loc) ** 2),
}
_LOG_SLOPES: dict[type[Distribution], Callable[[Any, Tensor], Tensor]] = {
    td.HalfNormal: lambda d, u: 1 - (u.exp() / d.scale) ** 2,
    td.HalfCauchy: lambda d, u: -torch.tanh(u - d.scale.log()),
    td.LogNormal: lambda d, u: (d.loc - u) / d.scale**2,
    td.Gamma: lambda d, u: d.concentration - d.rate * u.exp(),
    td.InverseGamma: lambda d, u: d.rate * (-u).exp() - d.concentration,
    td.Exponential: lambda d, u: 1 - d.rate * u.exp(),
}


@dataclass(frozen=True)
class _Block:
    """A stretch of ``theta`` with one distribution; ``log`` says that theta is the logarithm of its variable."""

    where: slice
    distribution: Distribution  # of shape (size,)
    log: bool = False

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the elementwise log density in the coordinate ``theta`` ``(..., size)``."""
        if self.log:
            return self.distribution.log_prob(theta.exp()) + theta
        return self.distribution.log_prob(theta)

    @cached_property
    def table(self) -> QuantileTable | None:
        """The map to normal coordinates where torch has no inverse cdf."""
        return QuantileTable(self.distribution) if type(self.distribution) in FAMILIES else None

    @cached_property
    def exact(self) -> _Block:
        """The same in float64, as tails want it."""
        return _Block(self.where, rebuild(self.distribution, lambda v: v.double()), self.log)

    def to_normal(self, theta: Tensor) -> Tensor:
        """Map ``theta`` ``(..., size)`` to standard normal coordinates."""
        d = self.distribution
        if isinstance(d, td.Normal):
            return (theta - d.loc) / d.scale
        if self.table is not None:
            return self.table.to_normal(theta.double()).to(theta.dtype)
        value = theta.double().exp() if self.log else theta.double()
        # Neither tail may round to probability zero or one: z is kept between -37 and 8.
        p = self.exact.distribution.cdf(value).clamp(_TINY, 1 - _EPSILON)
        return torch.special.ndtri(p).to(theta.dtype)

    def from_normal(self, z: Tensor) -> Tensor:
        """Map standard normal coordinates ``(..., size)`` back."""
        d = self.distribution
        if isinstance(d, td.Normal):
            return d.loc + d.scale * z
        if self.table is not None:
            return self.table.from_normal(z.double()).to(z.dtype)
        value = self.exact.distribution.icdf(torch.special.ndtr(z.double()).clamp(_TINY, 1 - _EPSILON))
        return (value.log() if self.log else value).to(z.dtype)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and second derivative of `from_normal`, ``(..., size)`` each; differentiable again.

        From phi(z) = p(theta) theta', which also gives theta'' = -theta' (z + theta' d log p / d theta).
        """
        d = self.distribution
        if isinstance(d, td.Normal):
            return d.scale.expand_as(z), torch.zeros_like(z)
        if self.table is not None:
            first, second = self.table.derivatives(z.double())
        else:
            exact, z64 = self.exact, z.double()
            log_p, score = exact.log_prob_and_grad(exact.from_normal(z64))
            first = (-0.5 * (z64 * z64 + _LOG_2PI) - log_p).exp()
            second = -first * (z64 + first * score)
        return first.to(z.dtype), second.to(z.dtype)

    def log_prob_and_grad(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the elementwise log density and its derivative, ``(..., size)`` each; differentiable again."""
        slope = (_LOG_SLOPES if self.log else _SLOPES).get(type(self.distribution))
        if slope is not None:
            return self.log_prob(theta), slope(self.distribution, theta)
        value, vjp, *_ = torch.func.vjp(self.log_prob, theta)
        return value, vjp(torch.ones_like(value))[0]


_UNVALIDATED = threading.Lock()
_inside: list[bool] = []  # one entry for every context that is open, in any thread


@contextmanager
def unvalidated() -> Iterator[None]:
    """Let distributions take any parameters: a scale that overflows is a divergence to survive, not a mistake.

    Torch has one switch for the whole process; the last thread to leave puts it back.
    """
    with _UNVALIDATED:
        _inside.append(_inside[0] if _inside else Distribution._validate_args)
        Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        with _UNVALIDATED:
            before = _inside.pop()
            if not _inside:
                Distribution.set_default_validate_args(before)


class _TensorScales:
    """The log scales of the weights under `Hierarchical`: one parameter for every tensor."""

    def __init__(self, prior: Hierarchical, spec: WeightSpec) -> None:
        network = spec.network
        self._size = network.dim
        sizes = torch.tensor([math.prod(network.shapes[name]) for name in network.names])
        factors = torch.tensor([prior.factor(network, name) for name in network.names], dtype=torch.float64)
        self._owner = torch.arange(len(sizes)).repeat_interleave(sizes)  # (network dim,)
        self._log_factors = factors.log().repeat_interleave(sizes)

    def __call__(self, theta: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the log scales ``(..., network dim)``, and how a gradient by them becomes one by the parameters."""
        logs = theta[..., self._size :]

        def pull(grad: Tensor) -> Tensor:
            return grad.new_zeros(*grad.shape[:-1], logs.shape[-1]).index_add(-1, self._owner, grad)

        return logs.index_select(-1, self._owner) + self._log_factors.to(theta.dtype), pull

    def curved(self, theta: Tensor) -> Curved:
        """Return the log scales and their derivatives by the parameters."""
        each = torch.nn.functional.one_hot(self._owner, theta.shape[-1] - self._size).to(theta.dtype)
        none = theta.new_zeros(*theta.shape[:-1], self._size)
        return Curved(self(theta)[0], each.expand(*theta.shape[:-1], -1, -1), none, each)


class Curved(NamedTuple):
    """Log scales of weights, and their derivatives by the parameters: the second is ``bend`` along times along."""

    log_scales: Tensor  # (batch, weights)
    slope: Tensor  # (batch, weights, parameters)
    bend: Tensor  # (batch, weights)
    along: Tensor  # (weights, parameters)


class _HorseshoeScales:
    """The log scales of the weights under `Horseshoe`."""

    def __init__(self, prior: Horseshoe, spec: WeightSpec) -> None:
        network = spec.network
        self._size = network.dim
        self._of_biases = torch.full((network.dim,), math.log(prior.bias_scale), dtype=torch.float64)
        places, owners = [], []
        for name, where in network.slices.items():
            shape = network.shapes[name]
            if len(shape) > 1:
                self._of_biases[where] = 0.0
                places.append(torch.arange(where.start, where.stop))
                indices = []
                for kind in ("global", "local", "slab"):
                    extra = f"prior.log_{kind}.{name}"
                    at = torch.arange(spec.slices[extra].start, spec.slices[extra].stop) - network.dim
                    at = at.reshape(spec.shapes[extra]) if kind == "local" else at
                    indices.append(at.expand(shape).flatten())
                owners.append(torch.stack(indices))
        self._places = torch.cat(places)  # (matrix entries,)
        self._owners = torch.cat(owners, 1)  # (3, matrix entries)

    def __call__(self, theta: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the log scales ``(..., network dim)``, and how a gradient by them becomes one by the parameters."""
        logs = theta[..., self._size :]
        tau, local, slab = (logs.index_select(-1, owner) for owner in self._owners)
        wide = 2 * (tau + local)  # log variance without the slab
        of_matrices = -0.5 * torch.logaddexp(-slab, -wide)  # 1 / variance = 1 / c^2 + 1 / (tau l)^2
        share = torch.sigmoid(slab - wide)  # of the variance's change that follows tau and l, not c

        def pull(grad: Tensor) -> Tensor:
            grad = grad.index_select(-1, self._places)
            parts = (grad * share, grad * share, 0.5 * grad * (1 - share))
            total = grad.new_zeros(*grad.shape[:-1], logs.shape[-1])
            for owner, part in zip(self._owners, parts, strict=True):
                total = total.index_add(-1, owner, part)
            return total

        fixed = self._of_biases.to(theta.dtype).expand(*theta.shape[:-1], -1)
        return fixed.index_add(-1, self._places, of_matrices), pull

    def curved(self, theta: Tensor) -> Curved:
        """Return the log scales and their derivatives by the parameters."""
        logs = theta[..., self._size :]
        tau, local, slab = (logs.index_select(-1, owner) for owner in self._owners)
        share = torch.sigmoid(slab - 2 * (tau + local))
        places, size = self._places, logs.shape[-1]
        along = theta.new_zeros(self._size, size)
        slope = theta.new_zeros(*theta.shape[:-1], self._size, size)
        for owner, part, weight in zip(self._owners, (share, share, 0.5 * (1 - share)), (2.0, 2.0, -1.0), strict=True):
            along[places, owner] = weight
            slope[..., places, owner] = part
        bend = torch.zeros_like(theta[..., : self._size]).index_add(-1, places, -0.5 * share * (1 - share))
        return Curved(self(theta)[0], slope, bend, along)


class _GivenParameters:
    """The weights given the parameters of their prior.

    In closed form for the priors of this module, by automatic differentiation for others.
    """

    def __init__(self, prior: HierarchicalPrior, network: WeightSpec, extras: list[Extra]) -> None:
        self.prior, self.network, self.extras = prior, network, extras
        self.spec = network.extend({extra.name: extra.shape for extra in extras})
        self._scales: _TensorScales | _HorseshoeScales | None = None
        if type(prior) is Hierarchical:
            self._scales = _TensorScales(prior, self.spec)
        elif type(prior) is Horseshoe:
            self._scales = _HorseshoeScales(prior, self.spec)
        self._check()

    def to(self, device: torch.device | str) -> _GivenParameters:
        """Return the same on another device; a user's own constants are scalars, which go anywhere."""
        moved = copy.copy(self)
        if self._scales is not None:
            moved._scales = copy.copy(self._scales)
            for name, value in vars(self._scales).items():
                setattr(moved._scales, name, value.to(device) if isinstance(value, Tensor) else value)
        return moved

    def distributions(self, values: dict[str, Tensor]) -> dict[str, Distribution]:
        """Return the elementwise distribution of every tensor, given coordinates ``(..., *shape)`` by name in theta."""
        given = {extra.key: extra.value(values[extra.name]) for extra in self.extras}
        with unvalidated():
            return {name: unwrapped(d) for name, d in self.prior.conditional(self.network, given).items()}

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return log p(weights | parameters), ``(..., weights and parameters) -> (...)`` in float64."""
        return self._by_torch(theta) if self._scales is None else self._normal(theta)[0]

    def log_prob_and_grad(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return it with its gradient by weights and parameters; differentiable again."""
        if self._scales is not None:
            return self._normal(theta)
        value, vjp, *_ = torch.func.vjp(self._by_torch, theta)
        return value, vjp(torch.ones_like(value))[0]

    def _by_torch(self, theta: Tensor) -> Tensor:
        values = self.spec.unflatten(theta)
        total = torch.zeros(theta.shape[:-1], dtype=torch.float64, device=theta.device)
        for name, distribution in self.distributions(values).items():
            with unvalidated():
                terms = distribution.log_prob(values[name])
            total = total + terms.flatten(theta.dim() - 1).sum(-1, dtype=torch.float64)
        return total

    def _normal(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density of w ~ N(0, s^2) and its gradient: -w / s^2, and w^2 / s^2 - 1 by log s."""
        assert self._scales is not None
        log_scales, pull = self._scales(theta)
        inverse = (-log_scales).exp()
        z = theta[..., : self.network.dim] * inverse
        value = -(0.5 * z * z + log_scales).sum(-1, dtype=torch.float64) - 0.5 * self.network.dim * _LOG_2PI
        return value, torch.cat([-z * inverse, pull(z * z - 1)], -1)

    def sample(self, coordinates: Tensor, generator: torch.Generator) -> Tensor:
        """Draw weights ``(n, network dim)`` given the parameters' coordinates ``(n, parameters)``."""
        n = len(coordinates)
        values = self.spec.unflatten(torch.cat([coordinates.new_zeros(n, self.network.dim), coordinates], -1))
        distributions = self.distributions(values)
        with isolated(generator):
            drawn = {
                name: distributions[name].expand(torch.Size((n, *self.network.shapes[name]))).sample().to(coordinates)
                for name in self.network.names
            }
        return self.network.flatten(drawn)

    def families(self) -> list[Distribution]:
        """Return the distribution of every tensor at some value of the parameters."""
        values = self.spec.unflatten(torch.zeros(self.spec.dim, dtype=torch.float64))
        return list(self.distributions(values).values())

    def to_normal(self, theta: Tensor) -> Tensor:
        """Map weights and parameters to normal coordinates of the weights, ``(..., network dim)``."""
        if self._scales is not None:
            return theta[..., : self.network.dim] * (-self._scales(theta)[0]).exp()
        values = self.spec.unflatten(theta)
        with unvalidated():
            parts = {
                name: torch.special.ndtri(d.cdf(values[name].double()).clamp(_TINY, 1 - _EPSILON))
                for name, d in self.distributions({n: v.double() for n, v in values.items()}).items()
            }
        return self.network.flatten(parts).to(theta.dtype)

    def from_normal(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Map normal coordinates ``(..., network dim)`` to weights, given the parameters' coordinates in theta."""
        theta = torch.cat([z, parameters], -1)
        if self._scales is not None:
            return z * self._scales(theta)[0].exp()
        values = {name: value.double() for name, value in self.spec.unflatten(theta).items()}
        with unvalidated():
            parts = {
                name: d.icdf(torch.special.ndtr(values[name]).clamp(_TINY, 1 - _EPSILON))
                for name, d in self.distributions(values).items()
            }
        return self.network.flatten(parts).to(theta.dtype)

    # What follows takes theta ``(batch, dim)`` of a whole prior, and both derivatives of the parameters' coordinates.
    # For the priors of this module alone: weights are z times the exponential of a log scale.

    @property
    def closed(self) -> bool:
        """Whether the derivatives of the weights are known."""
        return self._scales is not None

    def pull(self, theta: Tensor, vectors: Tensor, first: Tensor) -> Tensor:
        """Turn gradients by theta, of more leading axes if need be, into those by z."""
        assert self._scales is not None
        start, stop = self.network.dim, self.spec.dim
        log_scales, of_parameters = self._scales(theta[..., :stop])
        by_weights = vectors[..., :start]
        own = vectors[..., start:stop] + of_parameters(by_weights * theta[..., :start])
        return torch.cat([by_weights * log_scales.exp(), own, vectors[..., stop:]], -1) * first

    def slope(self, theta: Tensor, first: Tensor) -> Arrowhead:
        """Return d theta / d z."""
        weights, curved, _ = self._curved(theta)
        columns = weights.unsqueeze(-1) * curved.slope * self._own(first).unsqueeze(-2)
        return Arrowhead(self._joined(curved.log_scales.exp(), first), columns)

    def turn(self, theta: Tensor, v: Tensor, first: Tensor, second: Tensor) -> Arrowhead:
        """Return the derivative by z of the slope times v, v fixed."""
        weights, curved, own = self._curved(theta)
        scales, step = curved.log_scales.exp(), self._own(v).unsqueeze(-1)
        slope, along = (part * self._own(first).unsqueeze(-2) for part in (curved.slope, curved.along))
        moved = (slope @ step).squeeze(-1)  # log scales along v
        columns = slope * (v[:, : own.start] * scales + weights * moved).unsqueeze(-1)
        columns = columns + along * (weights * curved.bend * (along @ step).squeeze(-1)).unsqueeze(-1)
        columns = columns + weights.unsqueeze(-1) * curved.slope * (self._own(second) * self._own(v)).unsqueeze(-2)
        return Arrowhead(self._joined(scales * moved, second * v), columns)

    def bend(self, theta: Tensor, grad: Tensor, first: Tensor, second: Tensor) -> Bend:
        """Return the derivative by z of the gradient pulled back to z, ``grad`` fixed."""
        weights, curved, own = self._curved(theta)
        by_weights = grad[:, : own.start]
        slope, along = (part * self._own(first).unsqueeze(-2) for part in (curved.slope, curved.along))
        by_scales = weights * by_weights
        block = (slope * by_scales.unsqueeze(-1)).mT @ slope
        block = block + (along * (by_scales * curved.bend).unsqueeze(-1)).mT @ along
        by_own = self._own(grad) + (by_scales.unsqueeze(-2) @ curved.slope).squeeze(-2)
        block = block + torch.diag_embed(by_own * self._own(second))
        columns = slope * (by_weights * curved.log_scales.exp()).unsqueeze(-1)
        diagonal = torch.cat([torch.zeros_like(theta[:, : own.stop]), (second * grad)[:, own.stop :]], 1)
        return Bend(Arrowhead(diagonal, columns), block)

    def _curved(self, theta: Tensor) -> tuple[Tensor, Curved, slice]:
        """Return the weights, their log scales, and where in theta the parameters are."""
        assert self._scales is not None
        start, stop = self.network.dim, self.spec.dim
        return theta[:, :start], self._scales.curved(theta[:, :stop]), slice(start, stop)

    def _own(self, values: Tensor) -> Tensor:
        return values[:, self.network.dim : self.spec.dim]

    def _joined(self, of_weights: Tensor, values: Tensor) -> Tensor:
        return torch.cat([of_weights, values[:, self.network.dim :]], 1)

    def describe(self) -> list[dict[str, Any]]:
        """Say what the distributions are at two settings of the parameters."""
        count = self.spec.dim - self.network.dim
        described = []
        for reach in (0.3, 0.7):
            coordinates = torch.cat([torch.zeros(self.network.dim), reach * torch.arange(count).cos()]).double()
            for name, d in self.distributions(self.spec.unflatten(coordinates)).items():
                parameters = {k: v.double().tolist() for k, v in _parameters(d).items()}
                described.append({"name": name, "family": type(d).__name__, "parameters": parameters})
        return described

    def _check(self) -> None:
        """Raise ``ValueError`` unless the prior says what a prior with parameters must say."""
        values = self.spec.unflatten(torch.zeros(2, self.spec.dim, dtype=torch.float64))
        distributions = self.distributions(values)
        if set(distributions) != set(self.network.names):
            odd = sorted(set(distributions) ^ set(self.network.names))
            raise ValueError(f"the prior's conditional must name exactly the network's tensors; {odd} are not both")
        for name, d in distributions.items():
            shape = (2, *self.network.shapes[name])
            if d.event_shape or not isinstance(d.support, type(constraints.real)):
                raise ValueError(f"prior of {name!r}: {type(d).__name__} is not elementwise on the real line")
            if not _broadcasts(d.batch_shape, shape):
                raise ValueError(
                    f"prior of {name!r} given two values of the parameters has shape {tuple(d.batch_shape)}, which "
                    f"does not broadcast to {shape}; the parameters have leading axes"
                )


class FlatPrior:
    """The prior density along the flat weight vector.

    Args:
        spec: the layout of ``theta``, extras included.
        distributions: one per tensor, broadcasting to its shape; for a prior with inferred parameters of the extras
            alone.
        positive: names of the tensors whose coordinate is the logarithm of their variable.
        weights: the weights given the prior's parameters, which are the first of the extras.

    Raises:
        ValueError: if a distribution does not fit its tensor, is not elementwise, or has the wrong support.
    """

    def __init__(
        self,
        spec: WeightSpec,
        distributions: Mapping[str, Distribution],
        positive: frozenset[str],
        weights: _GivenParameters | None = None,
    ) -> None:
        self.dim = spec.dim
        self._weights = weights
        blocks = []
        for name, where in spec.slices.items():
            if weights is not None and name in weights.network.names:
                continue
            distribution = elementwise(name, distributions[name], spec.shapes[name], name in positive)
            blocks.append(_Block(where, rebuild(distribution, lambda v: v.reshape(-1)), name in positive))
        self._blocks = _merged(blocks)

    @classmethod
    def of(cls, prior: Prior | HierarchicalPrior, spec: WeightSpec, extras: list[Extra]) -> FlatPrior:
        """Lay out a prior and the priors of all inferred parameters.

        Args:
            prior: the prior over the weights.
            spec: the layout of ``theta``.
            extras: the parameters of the prior, then those of the likelihood.
        """
        own = [extra for extra in extras if extra.name.startswith("prior.")]
        distributions = {extra.name: extra.distribution for extra in extras}
        positive = frozenset(extra.name for extra in extras if extra.positive)
        if not hasattr(prior, "conditional"):
            return cls(spec, prior.distributions(spec.network) | distributions, positive)  # type: ignore[union-attr]
        if not own:
            raise ValueError(f"{type(prior).__name__} has no parameters to infer; give it distributions(spec) instead")
        given = _GivenParameters(prior, spec.network, own)  # type: ignore[arg-type]
        return cls(spec, distributions, positive, given)

    @property
    def _normal(self) -> td.Normal | None:
        """The whole prior as one normal distribution, if it is one: the usual case, and the fast one."""
        first = self._blocks[0].distribution
        alone = len(self._blocks) == 1 and self._weights is None
        return first if alone and isinstance(first, td.Normal) else None

    @property
    def scale(self) -> Tensor | None:
        """The standard deviations ``(dim,)``, if the whole prior is normal: what its coordinates are scaled by."""
        normal = self._normal
        return None if normal is None else normal.scale

    def scale_of(self, count: int) -> Tensor | None:
        """Return the standard deviations of the first coordinates ``(count,)``, if these are normal whatever others."""
        first = self._blocks[0]
        alone = self._weights is None and isinstance(first.distribution, td.Normal)
        return first.distribution.scale[:count] if alone and first.where.stop >= count else None  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self._first.dtype

    @property
    def _first(self) -> Tensor:
        return next(iter(_parameters(self._blocks[0].distribution).values()))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FlatPrior:
        """Return the same prior with its parameters elsewhere."""
        moved = object.__new__(FlatPrior)
        moved.dim = self.dim
        moved._weights = None if self._weights is None else self._weights.to(device)
        moved._blocks = [
            _Block(b.where, rebuild(b.distribution, lambda v: v.to(device, dtype)), b.log) for b in self._blocks
        ]
        return moved

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density, ``(..., dim) -> (...)`` in float64."""
        normal = self._normal
        if normal is not None:
            z = (theta - normal.loc) / normal.scale
            constant = normal.scale.double().log().sum() + 0.5 * self.dim * _LOG_2PI
            return -0.5 * (z * z).sum(-1, dtype=torch.float64) - constant
        parts = [block.log_prob(theta[..., block.where]).sum(-1, dtype=torch.float64) for block in self._blocks]
        if self._weights is not None:
            parts.append(self._weights.log_prob(theta[..., : self._weights.spec.dim]))
        return torch.stack(parts).sum(0)

    def log_prob_and_grad(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density and its gradient, differentiable again."""
        normal = self._normal
        if normal is not None:
            return self.log_prob(theta), (normal.loc - theta) / normal.scale**2
        pairs = [block.log_prob_and_grad(theta[..., block.where]) for block in self._blocks]
        parts = [value.sum(-1, dtype=torch.float64) for value, _ in pairs]
        grad = torch.cat([grad for _, grad in pairs], -1)
        if self._weights is not None:
            inner, start = self._weights.spec.dim, self._weights.network.dim
            value, by_all = self._weights.log_prob_and_grad(theta[..., :inner])
            parts.append(value)
            own, rest = grad[..., : inner - start], grad[..., inner - start :]
            grad = torch.cat([by_all[..., :start], by_all[..., start:] + own, rest], -1)
        return torch.stack(parts).sum(0), grad

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)``."""
        generator = as_generator(seed, self.device)
        parts = []
        for block in self._blocks:
            d = block.distribution
            if isinstance(d, td.Normal):
                noise = torch.randn(n, *d.loc.shape, generator=generator, device=self.device, dtype=self.dtype)
                value = d.loc + d.scale * noise
            else:
                with isolated(generator):
                    value = d.sample((n,))
            parts.append(value.log() if block.log else value)
        theta = torch.cat(parts, -1)  # (n, dim), or without the weights
        if self._weights is not None:
            count = self._weights.spec.dim - self._weights.network.dim
            theta = torch.cat([self._weights.sample(theta[:, :count], generator), theta], -1)
        return theta

    def settled(self, theta: Tensor) -> Tensor:
        """Move the prior's parameters to the mode of their density given the weights, ``(dim,) -> (dim,)``.

        The modes of log parameters are sought within exp(-5) and exp(5): a tensor of zeros has none.
        """
        if self._weights is None:
            return theta
        prior, start, stop = self.to(theta.device, torch.float64), self._weights.network.dim, self._weights.spec.dim
        bounded = torch.cat([
            torch.full((math.prod(extra.shape),), extra.positive, device=theta.device) for extra in self._weights.extras
        ])  # fmt: skip
        before, after = theta[:start].double(), theta[stop:].double()
        free = torch.zeros(stop - start, dtype=torch.float64, device=theta.device, requires_grad=True)

        def coordinates() -> Tensor:
            return torch.where(bounded, 5 * torch.tanh(free / 5), free)

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = -prior.log_prob(torch.cat([before, coordinates(), after]))
            value.backward()
            return value

        optimiser = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")
        with torch.enable_grad():
            optimiser.step(loss)  # type: ignore[arg-type]
        found = coordinates().detach()
        found = found if bool(found.isfinite().all()) else torch.zeros_like(found)
        return torch.cat([theta[:start], found.to(theta), theta[stop:]])

    # ------------------------------------------------ standard normal coordinates

    def require_coordinates(self) -> None:
        """Raise ``ValueError`` if a distribution has no cdf and inverse cdf to make normal coordinates from."""
        families = [block.distribution for block in self._blocks if block.table is None]
        if self._weights is not None:
            families += self._weights.families()
        for distribution in families:
            if not isinstance(distribution, td.Normal):
                try:
                    distribution.icdf(distribution.cdf(torch.ones(1, device=self.device)))
                except NotImplementedError as error:
                    name = type(distribution).__name__
                    raise ValueError(
                        f"a transport from a {name} prior needs its cdf and inverse cdf, which torch does not have; "
                        "use a Normal, Laplace, Cauchy or another prior with both"
                    ) from error

    def to_normal(self, theta: Tensor) -> Tensor:
        """Map ``theta`` to coordinates in which the prior is N(0, I).

        Elementwise and increasing; weights with inferred prior parameters are mapped given the parameters.
        """
        parts = [block.to_normal(theta[..., block.where]) for block in self._blocks]
        if self._weights is not None:
            parts.insert(0, self._weights.to_normal(theta[..., : self._weights.spec.dim]))
        return torch.cat(parts, -1)

    def from_normal(self, z: Tensor) -> Tensor:
        """Map standard normal coordinates back to ``theta``."""
        parts = [block.from_normal(z[..., block.where]) for block in self._blocks]
        if self._weights is not None:
            start, stop = self._weights.network.dim, self._weights.spec.dim
            given = torch.cat(parts, -1)[..., : stop - start]
            parts.insert(0, self._weights.from_normal(z[..., :start], given))
        return torch.cat(parts, -1)

    def log_jacobian(self, theta: Tensor) -> Tensor:
        """Return log |d to_normal / d theta|, ``(..., dim) -> (...)`` in float64: prior over standard normal."""
        normal = self._normal
        if normal is not None:
            return -normal.scale.double().log().sum().expand(theta.shape[:-1])
        z = self.to_normal(theta)
        return self.log_prob(theta) + 0.5 * (z * z).sum(-1, dtype=torch.float64) + 0.5 * self.dim * _LOG_2PI

    def at(self, z: Tensor) -> Placed:
        """Return the point ``(..., dim)`` of standard normal coordinates, where the map and its derivatives are."""
        return Placed(self, z)

    def pull(self, z: Tensor, vectors: Tensor) -> Tensor:
        """Turn gradients by theta ``(..., dim)`` into gradients by z; more leading axes of vectors are allowed."""
        return self.at(z).pull(vectors)

    def push(self, z: Tensor, vectors: Tensor) -> Tensor:
        """Turn directions in z ``(..., dim)`` into directions in theta."""
        return self.at(z).push(vectors)

    def bend_of(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Bend:
        """Return the derivative of a gradient by z ``(batch, dim)``, by automatic differentiation.

        Of a function in which weights meet no other weights: one forward derivative for all of them, and one for each
        parameter of the prior.
        """
        along, *each = self._partials(function, z).unbind(0)
        if not each:
            return Bend(Arrowhead(along, None), None)
        start, stop = self._given
        columns = torch.stack(each, -1)  # (batch, dim, parameters)
        diagonal = torch.cat([along[:, :start], torch.zeros_like(along[:, start:stop]), along[:, stop:]], 1)
        return Bend(Arrowhead(diagonal, columns[:, :start]), columns[:, start:stop])

    def _arrowhead(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Arrowhead:
        """Return the derivative of a function that mixes coordinates as `from_normal` does, by the same derivatives."""
        arrow, block = self.bend_of(function, z)
        assert block is not None
        start, stop = self._given
        own = block.diagonal(dim1=1, dim2=2)
        return arrow._replace(diagonal=torch.cat([arrow.diagonal[:, :start], own, arrow.diagonal[:, stop:]], 1))

    def _partials(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Return derivatives along all coordinates but the prior's parameters, and along each of those.

        ``(1 + parameters, batch, dim)``.
        """
        start, stop = self._given
        along = torch.ones(1, self.dim, device=z.device, dtype=z.dtype)
        along[:, start:stop] = 0
        each = torch.eye(self.dim, device=z.device, dtype=z.dtype)[start:stop]

        def derivative(direction: Tensor) -> Tensor:
            return jvp(function, (z,), (direction.expand_as(z),))[1]

        if start == stop:
            return derivative(along[0]).unsqueeze(0)
        return torch.func.vmap(derivative)(torch.cat([along, each]))

    @property
    def _given(self) -> tuple[int, int]:
        """Where the parameters of the prior are, which the weights before them meet."""
        return (0, 0) if self._weights is None else (self._weights.network.dim, self._weights.spec.dim)

    def _derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return both derivatives of `from_normal`; 1 and 0 for weights that follow parameters of the prior."""
        pairs = [block.derivatives(z[..., block.where]) for block in self._blocks]
        if self._weights is not None:
            weights = z[..., : self._weights.network.dim]
            pairs.insert(0, (torch.ones_like(weights), torch.zeros_like(weights)))
        if len(pairs) == 1:
            return pairs[0]
        first, second = zip(*pairs, strict=True)
        return torch.cat(first, -1), torch.cat(second, -1)

    # ------------------------------------------------ storage

    def describe(self) -> list[dict[str, Any]]:
        """Return the blocks as plain values from which ``from_description`` rebuilds a prior without parameters."""
        weights = [] if self._weights is None else self._weights.describe()
        return weights + [
            {
                "start": block.where.start,
                "stop": block.where.stop,
                "log": block.log,
                "family": type(block.distribution).__name__,
                "parameters": {k: v.tolist() for k, v in _parameters(block.distribution).items()},
            }
            for block in self._blocks
        ]

    def identity(self) -> list[Any]:
        """Return what tells priors apart, as plain values and tensors."""
        weights = [] if self._weights is None else self._weights.describe()
        blocks = [
            (b.where.start, b.where.stop, b.log, type(b.distribution).__name__, _parameters(b.distribution))
            for b in self._blocks
        ]
        return [weights, blocks]

    @classmethod
    def from_description(cls, blocks: list[dict[str, Any]], dtype: torch.dtype) -> FlatPrior:
        """Rebuild a prior from ``describe``; only families of ``torch.distributions`` are accepted."""
        prior = object.__new__(cls)
        prior._blocks, prior._weights = [], None
        for block in blocks:
            if block["family"] not in td.__all__:
                raise ValueError(f"no distribution {block['family']!r} in torch.distributions")
            family = getattr(td, block["family"])
            parameters = {k: torch.tensor(v, dtype=dtype) for k, v in block["parameters"].items()}
            prior._blocks.append(_Block(slice(block["start"], block["stop"]), family(**parameters), block["log"]))
        prior.dim = prior._blocks[-1].where.stop
        return prior


class Placed:
    """The map from standard normal coordinates z to theta at one point: each part is computed once.

    Args:
        prior: whose map.
        z: the point, ``(..., dim)``; ``(batch, dim)`` for matrices.
    """

    def __init__(self, prior: FlatPrior, z: Tensor) -> None:
        self.z = z
        self._prior, self._weights = prior, prior._weights

    @cached_property
    def theta(self) -> Tensor:
        """What z stands for."""
        return self._prior.from_normal(self.z)

    @cached_property
    def _derivatives(self) -> tuple[Tensor, Tensor]:
        return self._prior._derivatives(self.z)

    def pull(self, vectors: Tensor) -> Tensor:
        """Turn gradients by theta ``(..., dim)`` into gradients by z; more leading axes of vectors are allowed."""
        if self._weights is None:
            return vectors * self._derivatives[0]
        if self._weights.closed:
            return self._weights.pull(self.theta, vectors, self._derivatives[0])
        z = self.z.expand_as(vectors)
        return torch.func.vjp(self._prior.from_normal, z)[1](vectors)[0]  # type: ignore[misc]

    def push(self, vectors: Tensor) -> Tensor:
        """Turn directions in z ``(..., dim)`` into directions in theta."""
        if self._weights is None:
            return vectors * self._derivatives[0]
        return jvp(self._prior.from_normal, (self.z,), (vectors,))[1]

    @cached_property
    def slope(self) -> Arrowhead:
        """The derivative of theta by z; differentiable again."""
        if self._weights is None:
            return Arrowhead(self._derivatives[0], None)
        if self._weights.closed:
            return self._weights.slope(self.theta, self._derivatives[0])
        return self._prior._arrowhead(self._prior.from_normal, self.z)

    def turn(self, v: Tensor) -> Arrowhead:
        """Return the derivative by z of ``slope`` v, v ``(batch, dim)`` fixed."""
        if self._weights is None:
            return Arrowhead(self._derivatives[1] * v, None)
        if self._weights.closed:
            return self._weights.turn(self.theta, v, *self._derivatives)
        return self._prior._arrowhead(lambda z: self._prior.push(z, v), self.z)

    def bend(self, grad: Tensor) -> Bend:
        """Return the derivative by z of ``pull(grad)``, ``grad`` ``(batch, dim)`` fixed."""
        if self._weights is None:
            return Bend(Arrowhead(self._derivatives[1] * grad, None), None)
        if self._weights.closed:
            return self._weights.bend(self.theta, grad, *self._derivatives)
        return self._prior.bend_of(lambda z: self._prior.pull(z, grad), self.z)


_TINY = 1e-300  # probabilities have no units: these two are next to 0 and 1 in float64
_EPSILON = 1e-16


def _parameters(distribution: Distribution) -> dict[str, Tensor]:
    """Return the tensors that define a distribution; redundant ones (probs beside logits) are left out."""
    names = [name for name in distribution.arg_constraints if name in distribution.__dict__]
    if not names:  # transformed families (HalfNormal, LogNormal) keep theirs behind properties
        names = list(distribution.arg_constraints)
    return {name: torch.as_tensor(getattr(distribution, name)) for name in names}


def rebuild(distribution: Distribution, change: Callable[[Tensor], Tensor]) -> Distribution:
    """Return the same family with ``change`` applied to every parameter."""
    family = getattr(td, type(distribution).__name__)
    return family(**{name: change(value) for name, value in _parameters(distribution).items()}, validate_args=False)


def elementwise(name: str, distribution: Distribution, shape: tuple[int, ...], positive: bool) -> Distribution:
    """Check one tensor's distribution and expand it to the tensor's shape, without event axes."""
    distribution = unwrapped(distribution)
    family = type(distribution).__name__
    if distribution.event_shape:
        raise ValueError(f"prior of {name!r}: {family} is not elementwise")
    if family not in td.__all__ or not distribution.arg_constraints:
        raise ValueError(
            f"prior of {name!r}: {family} is not a family of torch.distributions with parameters of its own"
        )
    _check_parameters(name, distribution)
    support = distribution.support
    if positive and not _on_half_line(distribution):
        raise ValueError(f"prior of {name!r} must have positive support, {family} has {support}")
    if not positive and not isinstance(support, type(constraints.real)):
        raise ValueError(f"prior of {name!r} must have the real line as support, {family} has {support}")
    if not _broadcasts(distribution.batch_shape, shape):
        raise ValueError(f"prior of {name!r} has shape {tuple(distribution.batch_shape)}, the tensor {shape}")
    return rebuild(distribution, lambda v: v.detach().expand(shape))


def _check_parameters(name: str, distribution: Distribution) -> None:
    """Check what torch checks when a distribution is made, unless that was switched off, as ``python -O`` does."""
    for key, value in _parameters(distribution).items():
        constraint = distribution.arg_constraints[key]
        if constraints.is_dependent(constraint):
            continue
        if not bool((constraint.check(value) & value.isfinite()).all()):
            raise ValueError(f"prior of {name!r}: {key} of {type(distribution).__name__} is out of range: {value}")


def _on_half_line(distribution: Distribution) -> bool:
    """Whether the support is the positive numbers."""
    support = distribution.support
    half_line = isinstance(support, (type(constraints.positive), type(constraints.nonnegative)))
    return half_line and bool(torch.as_tensor(support.lower_bound).eq(0).all())  # type: ignore[union-attr]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether ``shape`` broadcasts to ``to``."""
    try:
        return tuple(torch.broadcast_shapes(shape, to)) == tuple(to)
    except RuntimeError:
        return False


def _merged(blocks: list[_Block]) -> list[_Block]:
    """Join neighbouring stretches of normals, and of one family of logarithms: few flat operations are fast."""
    merged: list[_Block] = []
    for block in blocks:
        last = merged[-1] if merged else None
        alike = last is not None and type(last.distribution) is type(block.distribution) and last.log == block.log
        if last is not None and alike and (block.log or isinstance(block.distribution, td.Normal)):
            ours, theirs = _parameters(last.distribution), _parameters(block.distribution)
            family = getattr(td, type(block.distribution).__name__)
            joined = family(**{name: torch.cat([ours[name], theirs[name]]) for name in ours}, validate_args=False)
            merged[-1] = _Block(slice(last.where.start, block.where.stop), joined, block.log)
        else:
            merged.append(block)
    return merged
