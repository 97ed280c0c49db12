"""Posterior draws: what every sampler returns and everything downstream accepts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bnnflow import storage
from bnnflow.arguments import Estimate, checked
from bnnflow.calibration import Calibration
from bnnflow.gaussian import Gaussian
from bnnflow.posteriors import dimension, pack, unpack
from bnnflow.types import Posterior

__all__ = [
    "Draws",
    "Origin",
    "as_theta",
    "counted_alike",
    "evenly",
    "origin",
    "outliers",
    "unresolved",
]


@checked
@dataclass(frozen=True, repr=False)
class Draws:
    """Draws of flat weights with the statistics of the run that made them.

    Attributes:
        theta: ``(chain, draw, dim)``.
        log_joint: ``(chain, draw)``, float64.
        stats: statistics of the sampler, ``(chain, draw)`` each, named as ArviZ names them.
        log_weights: ``(chain, draw)`` if the draws are weighted.
        log_evidence: value and standard error, if the method estimates it.
        posterior: the density that the draws came from, if it has one.
        info: method, settings, seconds, gradient evaluations and whatever else a reader should
            know.
        calibration: how class probabilities that are predicted from them become calibrated ones;
            None for as they are.
    """

    theta: Tensor
    log_joint: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    log_weights: Tensor | None = None
    log_evidence: tuple[Estimate, Estimate] | None = None
    posterior: Posterior | None = None
    info: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", self.theta.detach())
        if self.theta.dim() != 3:
            raise ValueError(
                f"theta must be (chain, draw, dim), got {tuple(self.theta.shape)}"
            )
        for name, values in {
            "log_joint": self.log_joint,
            "log_weights": self.log_weights,
            **self.stats,
        }.items():
            if values is not None and values.shape != self.theta.shape[:2]:
                raise ValueError(
                    f"{name} must be {tuple(self.theta.shape[:2])}, got {tuple(values.shape)}"
                )

    @property
    def n_chains(self) -> int:
        """Number of chains."""
        return self.theta.shape[0]

    @property
    def n_draws(self) -> int:
        """Number of draws per chain."""
        return self.theta.shape[1]

    @property
    def dim(self) -> int:
        """Length of a weight vector."""
        return self.theta.shape[2]

    @property
    def flat(self) -> Tensor:
        """All draws in one axis, ``(chain * draw, dim)``."""
        return self.theta.flatten(0, 1)

    def __repr__(self) -> str:
        """Say how many draws of what there are, and where they come from, in one line."""
        parts = [f"{self.n_chains} x {self.n_draws:,} draws of {self.dim:,} weights"]
        if self.log_weights is not None:
            parts.append("weighted")
        if self.log_evidence is not None:
            parts.append("log evidence {:.2f} +- {:.2f}".format(*self.log_evidence))
        if "method" in self.info:
            parts.insert(0, str(self.info["method"]))
        if "seconds" in self.info:
            parts.append(f"{self.info['seconds']:.1f} s")
        return f"{type(self).__name__}({', '.join(parts)})"

    @checked
    def with_theta(self, theta: Tensor) -> Draws:
        """Return the same draws with other, equivalent weights (after alignment, say)."""
        if theta.numel() != self.theta.numel():
            raise ValueError(
                f"theta must be {tuple(self.theta.shape)}, got {tuple(theta.shape)}"
            )
        return replace(self, theta=theta.reshape(self.theta.shape))

    @checked
    def save(self, path: str | Path) -> Path:
        """Write to an ``.npz`` file without pickle; read it back with ``bnnflow.load``."""
        return storage.write(path, "draws", 1, *self.to_file())

    def to_file(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the contents of a file, from which `from_file` builds the draws."""
        arrays = {
            "theta": self.theta.cpu().numpy(),
            "log_joint": self.log_joint.cpu().numpy(),
        }
        arrays |= {
            f"stats/{name}": values.cpu().numpy() for name, values in self.stats.items()
        }
        if self.log_weights is not None:
            arrays["log_weights"] = self.log_weights.cpu().numpy()
        if isinstance(self.posterior, Gaussian):
            arrays["posterior/loc"] = self.posterior.loc.cpu().numpy()
            arrays["posterior/scale_tril"] = self.posterior.scale_tril.cpu().numpy()
        header: dict[str, Any] = {"info": self.info, "log_evidence": self.log_evidence}
        if self.posterior is not None and not isinstance(self.posterior, Gaussian):
            # Beside the layout of version 1, whose readers leave it out.
            tensors: dict[str, Tensor] = {}
            header["density"] = pack(self.posterior, "density", tensors)
            arrays |= {
                name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()
            }
        if self.calibration is not None:
            header["calibration"] = self.calibration.describe()
        return header, arrays

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Draws:
        """Read draws that ``save`` wrote."""
        with storage.described(path):
            return cls.from_file(*storage.read(path, {"draws": 1}))

    @classmethod
    def from_file(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Draws:
        """Build draws from the contents of a file."""
        tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
        posterior = unpack(header["density"], tensors) if header.get("density") else None
        if "posterior/loc" in tensors:
            posterior = Gaussian(tensors["posterior/loc"], tensors["posterior/scale_tril"])
        if posterior is not None and dimension(posterior) != tensors["theta"].shape[-1]:
            raise ValueError(
                f"the density of the draws is one of {dimension(posterior)} weights"
            )
        evidence = header["log_evidence"]
        if not tensors["theta"].is_floating_point() or (
            evidence and list(map(type, evidence)) != [float, float]
        ):
            raise ValueError(
                "these are no draws: weights and an evidence are floating-point numbers"
            )
        return cls(
            theta=tensors["theta"],
            log_joint=tensors["log_joint"],
            stats={
                name.removeprefix("stats/"): t
                for name, t in tensors.items()
                if name.startswith("stats/")
            },
            log_weights=tensors.get("log_weights"),
            log_evidence=tuple(evidence) if evidence else None,
            posterior=posterior,
            calibration=Calibration.from_description(header["calibration"])
            if header.get("calibration")
            else None,
            info=dict(header["info"]),
        )


Origin = Literal["posterior", "biased", "approximation", "networks", "unknown"]

_NETWORKS = ("DeepEnsemble", "MCDropout")
_APPROXIMATIONS = ("Laplace", "SWAG", "VI", "NormalizingFlowVI")
_FLOWS = ("Flow", "FlowMap", "ManifoldFlow", "CompletedFlow", "TransformedDensity")


def origin(draws: Draws) -> Origin:
    """Say what draws are of: the posterior, the posterior up to a bias of a sampler without an
    accept step, an approximation, or no posterior at all but trained networks.

    Weights bring draws of an approximation to the posterior. Draws that name no method and have no
    statistics are of unknown origin.
    """
    method = draws.info.get("method", "")
    if method in _NETWORKS:
        return "networks"
    if draws.log_weights is None and method in (*_APPROXIMATIONS, *_FLOWS):
        return "approximation"
    if draws.info.get("exact") is False:
        return "biased"
    return (
        "posterior" if method or draws.stats or draws.log_weights is not None else "unknown"
    )


def refuse_approximation(draws: Draws, name: str, otherwise: str = "") -> None:
    """Raise ``ValueError`` for draws that are of no posterior: of an approximation, unweighted, or
    of trained networks.

    Args:
        draws: what was given.
        name: of the argument, for the message.
        otherwise: what else a caller may do.
    """
    if origin(draws) in ("approximation", "networks"):
        raise ValueError(
            f"{name} of {draws.info['method']} are of no posterior: move them to one by "
            f"bf.refine{otherwise}"
        )


@checked
def as_theta(
    draws: Draws | Tensor | tuple[Tensor, Tensor | None], name: str = "draws"
) -> tuple[Tensor, Tensor | None]:
    """Accept draws, weights ``(..., dim)`` or a pair (weights, log weights).

    Return both flat over draws.

    Args:
        draws: what was given.
        name: of the argument, for the message.

    Raises:
        TypeError: if they are something else.
        ValueError: if there is not one log weight for each draw, one is NaN or +inf, or all are
            -inf.
    """
    if isinstance(draws, Draws):
        theta, weights = draws.theta, draws.log_weights
    else:
        theta, weights = draws if isinstance(draws, tuple) else (draws, None)
    if theta.dim() == 0 or theta.shape[-1] == 0:
        raise ValueError(
            f"{name} must be weights (..., dim), got shape {tuple(theta.shape)}"
        )
    flat = theta.detach().reshape(-1, theta.shape[-1])
    if weights is None:
        return flat, None
    weights = weights.detach().flatten()
    if len(weights) != len(flat):
        raise ValueError(f"{name}: {len(weights)} log weights for {len(flat)} draws")
    if bool((weights.isnan() | (weights == torch.inf)).any()):
        raise ValueError(f"{name}: log weights must not be NaN or +inf")
    if len(weights) and bool((weights == -torch.inf).all()):
        raise ValueError(f"{name} must not all have weight zero")
    return flat, weights


def evenly(count: int, most: int) -> Tensor:
    """Return at most so many of the numbers from 0 to ``count - 1``, evenly spaced."""
    chosen = torch.linspace(0, count - 1, min(count, most)).round().long()
    return chosen.clamp_(max=count - 1)  # float32 is too coarse for the last of 2^24


def counted_alike(log_weights: Tensor, count: int | None = None) -> Tensor:
    """Return numbers ``(count,)`` of draws that count alike, as many as there are if None, given
    their log weights: systematic resampling at fixed points, which keeps their order.
    """
    weights = log_weights.detach().flatten().double().cpu().softmax(0)
    count = len(weights) if count is None else count
    points = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.searchsorted(weights.cumsum(0), points).clamp_(max=len(weights) - 1)


def outliers(log_joint: Tensor) -> Tensor:
    """Say which draws are none of the posterior that the others are of, given the log densities
    ``(n,)`` of all.

    Those that lie further below the median than eight times the lower quartile and ten nats. Minus
    the log density of a Gaussian has a gamma law: of its own draws fewer than one in a million
    stray, whatever their dimension. A log density that is not finite strays.
    """
    values = log_joint.double().nan_to_num(nan=-torch.inf)
    low, middle = values.quantile(values.new_tensor([0.25, 0.5]))
    return ~(values >= middle - 8 * (middle - low) - 10)


def unresolved(theta: Tensor) -> Tensor:
    """Say of which weights the draws ``(n, dim)`` are closer than their floating-point type tells
    apart, ``(dim,)``.

    Those whose standard deviation is below four spacings of numbers of their size, a weight that
    never moves included.
    """
    sd, size = theta.double().std(0), theta.double().abs().amax(0)
    return ~(sd > 4 * torch.finfo(theta.dtype).eps * size)
