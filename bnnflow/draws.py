"""Posterior draws: what every sampler returns and everything downstream accepts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnflow import storage
from bnnflow.gaussian import Gaussian
from bnnflow.posteriors import dimension, pack, unpack
from bnnflow.types import Posterior

__all__ = ["Draws", "as_theta", "strays", "unresolved"]


@dataclass(frozen=True)
class Draws:
    """Draws of flat weights with the statistics of the run that made them.

    Attributes:
        theta: ``(chain, draw, dim)``.
        log_joint: ``(chain, draw)``, float64.
        stats: statistics of the sampler, ``(chain, draw)`` each, named as ArviZ names them.
        log_weights: ``(chain, draw)`` if the draws are weighted.
        log_evidence: value and standard error, if the method estimates it.
        posterior: the density that the draws came from, if it has one.
        info: method, settings, seconds, gradient evaluations and whatever else a reader should know.
    """

    theta: Tensor
    log_joint: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    log_weights: Tensor | None = None
    log_evidence: tuple[float, float] | None = None
    posterior: Posterior | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.theta.dim() != 3:
            raise ValueError(f"theta must be (chain, draw, dim), got {tuple(self.theta.shape)}")
        for name, values in {"log_joint": self.log_joint, "log_weights": self.log_weights, **self.stats}.items():
            if values is not None and values.shape != self.theta.shape[:2]:
                raise ValueError(f"{name} must be {tuple(self.theta.shape[:2])}, got {tuple(values.shape)}")

    @property
    def chains(self) -> int:
        """Number of chains."""
        return self.theta.shape[0]

    @property
    def draws(self) -> int:
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

    def with_theta(self, theta: Tensor) -> Draws:
        """Return the same draws with other, equivalent weights (after alignment, say)."""
        return replace(self, theta=theta.reshape(self.theta.shape))

    def save(self, path: str | Path) -> Path:
        """Write to an ``.npz`` file without pickle; read it back with ``bnnflow.load``."""
        arrays = {"theta": self.theta.cpu().numpy(), "log_joint": self.log_joint.cpu().numpy()}
        arrays |= {f"stats/{name}": values.cpu().numpy() for name, values in self.stats.items()}
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
            arrays |= {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        return storage.write(path, "draws", 1, header, arrays)

    @classmethod
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
            raise ValueError(f"the density of the draws is one of {dimension(posterior)} weights")
        evidence = header["log_evidence"]
        if not tensors["theta"].is_floating_point() or (evidence and list(map(type, evidence)) != [float, float]):
            raise ValueError("these are no draws: weights and an evidence are floating-point numbers")
        return cls(
            theta=tensors["theta"],
            log_joint=tensors["log_joint"],
            stats={name.removeprefix("stats/"): t for name, t in tensors.items() if name.startswith("stats/")},
            log_weights=tensors.get("log_weights"),
            log_evidence=tuple(evidence) if evidence else None,
            posterior=posterior,
            info=dict(header["info"]),
        )


def as_theta(draws: Draws | Tensor | tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Accept draws, weights ``(..., dim)`` or a pair (weights, log weights); return both flat over draws."""
    if isinstance(draws, Draws):
        weights = draws.log_weights
        return draws.flat, None if weights is None else weights.flatten()
    theta, weights = draws if isinstance(draws, tuple) else (draws, None)
    if not isinstance(theta, Tensor):
        raise TypeError(f"expected Draws or a tensor of weights, got {type(theta).__name__}")
    flat = theta.reshape(-1, theta.shape[-1])
    if weights is not None and weights.numel() != len(flat):
        raise ValueError(f"{weights.numel()} log weights for {len(flat)} draws")
    return flat, None if weights is None else weights.flatten()


def strays(log_joint: Tensor) -> Tensor:
    """Say which draws are none of the posterior that the others are of, given the log densities ``(n,)`` of all.

    Those that lie further below the median than eight times the lower quartile and ten nats. Minus the log density of
    a Gaussian has a gamma law: of its own draws fewer than one in a million stray, whatever their dimension. A log
    density that is not finite strays.
    """
    values = log_joint.double().nan_to_num(nan=-torch.inf)
    low, middle = values.quantile(values.new_tensor([0.25, 0.5]))
    return ~(values >= middle - 8 * (middle - low) - 10)


def unresolved(theta: Tensor) -> Tensor:
    """Say of which weights the draws ``(n, dim)`` are closer than their floating-point type tells apart, ``(dim,)``.

    Those whose standard deviation is below four spacings of numbers of their size, a weight that never moves included.
    """
    sd, size = theta.double().std(0), theta.double().abs().amax(0)
    return ~(sd > 4 * torch.finfo(theta.dtype).eps * size)
