"""A prior learned from networks that were trained before."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from bnnflow import storage
from bnnflow.arguments import Positive, Whole, checked, finite
from bnnflow.draws import Draws
from bnnflow.model.priors.prior import Prior
from bnnflow.weights import WeightSpec

__all__ = ["Empirical"]


@checked
@dataclass(frozen=True, eq=False)
class Empirical(Prior):
    """Normal weights with the means and standard deviations of networks that were trained before.

    Args:
        weights: draws of flat weights ``(..., dim)``, a trained network, or its tensors by name (a
            ``state_dict``).
        per: statistics of every ``"tensor"`` over its entries, which keeps the units exchangeable,
            or of every ``"weight"`` over the draws, of which there must be two or more.
        zero_mean: normal around zero with the root mean square as scale, which keeps the symmetries
            of sign.
        min_scale: a lower bound of the standard deviations, in units of the weights: those of
            networks for standardised data are about one.
        extras: how many parameters of a prior or likelihood follow the network's weights in every
            draw.

    A tensor with a single value says nothing about a spread and is taken as normal around zero.

    Raises:
        ValueError: if the weights are not finite, or (in a model) have the wrong names, shapes or
            length.
    """

    weights: Tensor | Mapping[str, Tensor] | torch.nn.Module
    per: Literal["tensor", "weight"] = "tensor"
    zero_mean: bool = False
    min_scale: Positive = 1e-2
    extras: Whole = 0

    def __post_init__(self) -> None:
        if isinstance(self.weights, Tensor):
            if self.weights.dim() == 0 or self.weights.numel() == 0:
                raise ValueError(
                    f"weights must be (..., dim), got shape {tuple(self.weights.shape)}"
                )
            finite("weights", self.weights)

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> Empirical:
        """Read the weights from a file: a ``state_dict`` by ``torch.save``, or draws by
        ``Draws.save``.

        Nothing that a file could hold is executed.

        Raises:
            ValueError: if the file holds anything but tensors by name, or weighted draws.
        """
        path = storage.found(path)
        with storage.described(path, f"{path} is no file of weights"):
            ours = (
                zipfile.is_zipfile(path)
                and "header.npy" in zipfile.ZipFile(path).namelist()
            )
            loaded = (
                Draws.load(path)
                if ours
                else torch.load(path, map_location="cpu", weights_only=True)
            )
        if isinstance(loaded, Draws):
            if loaded.log_weights is not None:
                raise ValueError(f"{path} holds weighted draws; resample them first")
            return cls(loaded.flat, **options)
        if not isinstance(loaded, Mapping) or not all(
            isinstance(value, Tensor) for value in loaded.values()
        ):
            raise ValueError(f"{path} must hold a state_dict, tensors by name")
        return cls(dict(loaded), **options)

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return a normal distribution per tensor."""
        found: dict[str, Distribution] = {}
        for name, values in self._tensors(spec).items():  # (draws, *shape)
            if not bool(values.isfinite().all()):
                raise ValueError(f"the trained weights of {name} are not all finite")
            if self.per == "weight" and len(values) < 2:
                raise ValueError(
                    "one network has no spread of each weight; give several, or use per='tensor'"
                )
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
                    f"the trained weights have {flat.shape[1]} entries, the network {spec.dim}; if "
                    "parameters of a prior or likelihood follow the weights, say how many with "
                    f"extras=, got {self.extras}"
                )
            return spec.unflatten(flat[:, : spec.dim])
        named = (
            self.weights.state_dict()
            if isinstance(self.weights, torch.nn.Module)
            else self.weights
        )
        missing = [name for name in spec.names if name not in named]
        if missing:
            raise ValueError(
                f"the trained weights lack {missing}; they have {sorted(named)}"
            )
        tensors = {name: named[name].detach().double().cpu() for name in spec.names}
        for name, values in tensors.items():
            if tuple(values.shape) != spec.shapes[name]:
                raise ValueError(
                    f"the trained {name} is {tuple(values.shape)}, the network's "
                    f"{spec.shapes[name]}"
                )
        return {name: values.unsqueeze(0) for name, values in tensors.items()}
