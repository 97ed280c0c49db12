"""Fingerprints: what tells posteriors apart, and whose draws are whose."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from bnnflow.identity import Identity
from bnnflow.model.likelihood import Likelihood
from bnnflow.model.priors import FlatPrior, Prior
from bnnflow.weights import WeightSpec, free_parameters

__all__ = ["DataVersion", "ModelIdentity", "Provenance"]

_VERSION = 2  # of what fingerprints cover; those of version 1 have no number


@dataclass(frozen=True)
class ModelIdentity:
    """All that a posterior is made of.

    Args:
        net: the network, whose free parameters are not part of it.
        written: the attributes of modules that a forward pass writes, which are not either.
        architecture: how the network is evaluated.
        spec: the layout of ``theta``.
        prior: as it was given.
        flat_prior: along ``theta``, with the priors of all parameters.
        likelihood: of a row of data.
        data: inputs, targets, and weights of rows that have any.
        temperature: by which the log density is divided.
        anchor: where the network is linearised, ``(dim,)``.
        transport: what tells the flow whose push-forward is the prior from others.
    """

    net: nn.Module
    written: Collection[str]
    architecture: WeightSpec
    spec: WeightSpec
    prior: Prior
    flat_prior: FlatPrior
    likelihood: Likelihood
    data: tuple[Tensor, ...]
    temperature: float
    anchor: Tensor | None
    transport: Any = None

    @property
    def fingerprint(self) -> str:
        """A hash of all of it, after the version of the rule."""
        return f"{_VERSION}:{self._identity.digest}"

    @property
    def unidentified(self) -> tuple[str, ...]:
        """What cannot be identified, and where."""
        return tuple(self._identity.unknown)

    @cached_property
    def _identity(self) -> Identity:
        layers, (x, y, *row_weights) = self.architecture.layers, self.data
        found = Identity(free_parameters(self.net), self.written)
        found.add(x, "x").add(y, "y").add(self.temperature, "temperature")
        found.add((self.spec.shapes, repr(layers)), "spec")
        found.add(self.flat_prior.identity(), "prior").add(
            self.likelihood.given, "likelihood"
        )
        if self.prior.has_parameters:
            found.add(self.prior.given, "prior")
        if not layers:  # the labels do not say what the network computes
            found.add(self.net, "net")
        for weights in row_weights:
            found.add(weights, "row_weights")
        if self.anchor is not None:
            found.add(self.anchor[: self.spec.network.dim], "anchor")
        if self.transport is not None:
            found.add(self.transport, "transport")
        return found

    @property
    def first_fingerprint(self) -> str:
        """The fingerprint as files of the first version have it, blind to much of what a module is
        made of.
        """
        digest, layers = hashlib.sha256(), self.architecture.layers
        for each in self.data:
            digest.update(repr(tuple(each.shape)).encode())
            digest.update(each.double().cpu().numpy().tobytes())
        digest.update(repr((self.spec.shapes, layers, self.temperature)).encode())
        digest.update(repr(self.flat_prior.describe()).encode())
        settings: dict[str, Any] = getattr(self.likelihood.given, "__dict__", {})
        plain = {
            key: each
            for key, each in settings.items()
            if isinstance(each, bool | int | float | str | None)
        }
        digest.update(repr((self.likelihood.name, plain)).encode())
        if not layers:
            digest.update(repr(self.net).encode())
            for name, buffer in self.net.named_buffers():
                digest.update(name.encode() + buffer.double().cpu().numpy().tobytes())
        if self.anchor is not None:
            weights = self.anchor[: self.spec.network.dim]
            digest.update(b"linearised" + weights.double().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


class DataVersion:
    """Tensors, and how often they had been changed in place."""

    def __init__(self, *data: Tensor) -> None:
        self._data = [(each, _version(each)) for each in data]

    def __eq__(self, other: object) -> bool:
        """Say whether both are of the same tensors, unchanged between."""
        if not isinstance(other, DataVersion):
            return NotImplemented
        if len(self._data) != len(other._data):
            return False
        pairs = zip(self._data, other._data, strict=True)
        return all(a is b and m == n for (a, m), (b, n) in pairs)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Provenance:
    """Whose draws a model takes beside those with its own fingerprint.

    Args:
        converted: the fingerprint of the model in another floating-point type that this is a copy
            of, and its data.
        expanded: the fingerprint of the model that a linearised one expands.
        recognised: the last fingerprint that was found to be the model's, and its data then: a
            fingerprint reads all data.
    """

    converted: tuple[str, DataVersion] | None = None
    expanded: str | None = None
    recognised: tuple[str, DataVersion] | None = None

    def recognises(self, fingerprint: str, data: DataVersion) -> bool:
        """Say whether a fingerprint is known to be that of a model of these data."""
        return fingerprint == self.expanded or self.recognised == (fingerprint, data)


def _version(data: Tensor) -> int:
    return 0 if data.is_inference() else data._version
