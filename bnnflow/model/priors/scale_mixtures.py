"""Scale mixtures of normals: priors whose scales are inferred beside the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from bnnflow.arguments import checked, choice, number, settle
from bnnflow.model.priors.log_scales import GroupScales, HorseshoeScales, LogScales
from bnnflow.model.priors.marginals import exact
from bnnflow.model.priors.prior import Prior
from bnnflow.weights import WeightSpec

__all__ = ["Hierarchical", "Horseshoe", "OutputScales"]


@checked
@dataclass(frozen=True)
class Hierarchical(Prior):
    """Normal weights whose standard deviation is inferred, one for every tensor.

    w ~ N(0, s_k^2) in tensor k, s_k ~ ``scale_prior`` independently: the data decide how large the
    weights of a layer are (MacKay 1992; Neal 1996). ``theta`` holds log s_k as
    ``prior.log_scale.<tensor>``.

    Args:
        scale_prior: a distribution on the positive numbers.
        fan_in: divide the standard deviations of matrices and kernels by sqrt(fan in), so that one
            scale means functions of one size at every width.
    """

    scale_prior: Distribution = field(default_factory=lambda: td.HalfNormal(exact(1.0)))
    fan_in: bool = False

    def parameters(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return the prior of every tensor's scale."""
        return {f"scale.{name}": self.scale_prior for name in spec.names}

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, Distribution]:
        """Return a normal distribution per tensor given the scales."""
        return {
            name: _centred(
                _aligned(parameters[f"scale.{name}"], shape) * self.factor(spec, name)
            )
            for name, shape in spec.shapes.items()
        }

    def log_scales(self, spec: WeightSpec) -> LogScales | None:
        """Return the scales of the weights.

        None for a class derived from this one, which may say otherwise.
        """
        if type(self) is not Hierarchical:
            return None
        network = spec.network
        sizes = torch.tensor([math.prod(network.shapes[name]) for name in network.names])
        factors = [self.factor(network, name) for name in network.names]
        each = torch.arange(len(sizes))
        log_factors = torch.tensor(factors, dtype=torch.float64).log()
        return GroupScales(each.repeat_interleave(sizes), each, log_factors)

    def factor(self, spec: WeightSpec, name: str) -> float:
        """Return what a tensor's scale is multiplied by."""
        fan_in = spec.fan_in(name) if self.fan_in else None
        return 1.0 if fan_in is None else 1 / math.sqrt(fan_in)


@checked
@dataclass(frozen=True)
class OutputScales(Prior):
    """Normal weights, and a size of the function that is inferred, one for every output.

    w ~ N(0, scale^2), but the weights that make output k of the last matrix are N(0, s_k^2), with
    s_k ~ ``scale_prior`` independently. What the network can say has a size of its own then,
    whatever the targets' units and the width of its last layer, and few rows are not outshouted by
    a prior of wide functions. ``theta`` holds log s_k as ``prior.log_scale.<tensor>``.

    Args:
        scale_prior: a distribution on the positive numbers.
        scale: standard deviation of all other weights.

    Raises:
        ValueError: from the model, if the network has no matrix or kernel that writes its outputs.
    """

    scale_prior: Distribution = field(
        default_factory=lambda: td.LogNormal(exact(0.0), exact(1.0))
    )
    scale: float = 1.0

    def __post_init__(self) -> None:
        settle(self, number, "scale", above=0)

    def parameters(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return the prior of every output's scale."""
        name = _last_matrix(spec)
        return {f"scale.{name}": self.scale_prior.expand((spec.shapes[name][0],))}

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, Distribution]:
        """Return a normal distribution per tensor given the scales."""
        last = _last_matrix(spec)
        scales = parameters[f"scale.{last}"]
        ones = (1,) * (len(spec.shapes[last]) - 1)
        of_others = _centred(exact(self.scale).to(scales))
        found: dict[str, Distribution] = dict.fromkeys(spec.names, of_others)
        return found | {last: _centred(scales.reshape((*scales.shape, *ones)))}

    def log_scales(self, spec: WeightSpec) -> LogScales | None:
        """Return the scales of the weights.

        None for a class derived from this one, which may say otherwise.
        """
        if type(self) is not OutputScales:
            return None
        network = spec.network
        last = _last_matrix(network)
        outputs = network.shapes[last][0]
        owner = torch.full((network.dim,), outputs)  # the group of all other weights
        where = network.slices[last]
        owner[where] = torch.arange(outputs).repeat_interleave(
            (where.stop - where.start) // outputs
        )
        parameter = torch.cat([torch.arange(outputs), torch.tensor([-1])])
        log_factors = torch.zeros(outputs + 1, dtype=torch.float64)
        log_factors[-1] = math.log(self.scale)
        return GroupScales(owner, parameter, log_factors)


@dataclass(frozen=True)
class Horseshoe(Prior):
    """The regularised horseshoe: most weights, or whole units, are shrunk to zero and a few are
    left alone.

    In every matrix or kernel w_ij ~ N(0, tau^2 l_j^2 c^2 / (c^2 + tau^2 l_j^2)), with half-Cauchy
    scales, tau of the tensor and l_j local (Carvalho, Polson & Scott 2010), and c^2 ~
    InverseGamma(slab_df / 2, slab_df slab_scale^2 / 2), which bounds what escapes shrinkage by a
    Student-t slab (Piironen & Vehtari 2017). Biases are N(0, bias_scale^2).

    ``theta`` holds the weights themselves, so the formulation is centred, and the logarithms of the
    scales: ``prior.log_global.<tensor>`` (tau), ``prior.log_local.<tensor>`` (l) and
    ``prior.log_slab.<tensor>`` (c^2). With one local scale for all the weights that leave a unit
    (Ghosh, Yao & Doshi-Velez 2018) many weights inform each scale and the posterior has no deep
    funnels; with one for every weight expect small steps.

    Args:
        global_scale: tau ~ HalfCauchy(global_scale). For p0 relevant inputs of p and n rows of
            standardised data, p0 / (p - p0) / sqrt(n) is a good guess.
        slab_scale: size of the weights that are not shrunk.
        slab_df: degrees of freedom of the slab.
        local: a local scale for every ``"unit"`` (or input) that a tensor reads, or for every
            ``"weight"``.
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
                half = exact(self.slab_df / 2)
                read = 0 if name in spec.transposed else 1
                of_units = tuple(
                    size if axis == read else 1 for axis, size in enumerate(shape)
                )
                local = shape if self.local == "weight" else of_units
                found[f"global.{name}"] = td.HalfCauchy(exact(self.global_scale))
                found[f"local.{name}"] = td.HalfCauchy(exact(1.0).expand(local))
                found[f"slab.{name}"] = td.InverseGamma(half, half * self.slab_scale**2)
        return found

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, Distribution]:
        """Return a normal distribution per tensor given the scales."""
        found: dict[str, Distribution] = {}
        for name, shape in spec.shapes.items():
            if len(shape) > 1:
                # (..., *shape)
                wide = (
                    _aligned(parameters[f"global.{name}"], shape)
                    * parameters[f"local.{name}"]
                )
                slab = _aligned(parameters[f"slab.{name}"], shape).sqrt()
                # no square of a huge or tiny scale
                found[name] = _centred(wide / torch.hypot(slab, wide) * slab)
            else:
                found[name] = _centred(exact(self.bias_scale))
        return found

    def log_scales(self, spec: WeightSpec) -> LogScales | None:
        """Return the scales of the weights.

        None for a class derived from this one, which may say otherwise.
        """
        return HorseshoeScales(spec, self.bias_scale) if type(self) is Horseshoe else None


def _last_matrix(spec: WeightSpec) -> str:
    """Return the last matrix or kernel that writes outputs: no hidden unit is one."""
    matrices = [
        name
        for name, shape in spec.shapes.items()
        if len(shape) > 1 and name not in spec.transposed and spec.axes[name][0] is None
    ]
    if not matrices:
        raise ValueError("prior OutputScales needs a network whose last tensor is a matrix")
    return matrices[-1]


def _aligned(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give a scalar parameter ``(..., 1)`` the axes of a tensor of ``shape``, ``(..., 1, 1)`` for a
    matrix.
    """
    return values.reshape((*values.shape[:-1], *(1,) * len(shape)))


def _centred(scale: Tensor) -> td.Normal:
    return td.Normal(
        torch.zeros((), dtype=scale.dtype, device=scale.device), scale, validate_args=False
    )
