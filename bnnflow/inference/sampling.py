"""`sample`: the one door to every method."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from bnnflow.draws import Draws
from bnnflow.inference.hmc import HMC
from bnnflow.model import BayesianModel
from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = ["Method", "sample"]


class Method(Protocol):
    """A way to get posterior draws; `HMC`, `VI` and `DeepEnsemble` are three."""

    def sample(
        self,
        model: BayesianModel,
        *,
        chains: int | None,
        warmup: int | None,
        draws: int | None,
        generator: torch.Generator,
        init: Tensor | nn.Module | str | None,
        progress: bool,
    ) -> Draws:
        """Return draws; a None leaves the choice to the method."""
        ...


def sample(
    model: BayesianModel,
    method: Method | None = None,
    *,
    chains: int | None = None,
    warmup: int | None = None,
    draws: int | None = None,
    seed: Seed = 0,
    init: Tensor | nn.Module | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Draws:
    """Draw from a model's posterior.

    Args:
        model: the posterior.
        method: `HMC()` unless said otherwise.
        chains: number of chains, run as one batch; a method's own default if None.
        warmup: transitions spent on tuning, thrown away.
        draws: draws per chain.
        seed: an int or a generator; the same seed gives the same draws.
        init: None for the method's own start, ``"prior"``, a trained network, or weights ``(dim,)`` or
            ``(chains, dim)``.
        device: where to run; the model's own device if None.
        dtype: floating-point type to run in; the model's own if None.
        progress: show a bar at a terminal.

    Returns:
        Draws; after Ctrl-C those made so far, with ``info["interrupted"]`` set.

    Raises:
        ValueError: before any work starts, if the numbers or ``init`` make no sense for the method.
    """
    method = method if method is not None else HMC()
    if isinstance(method, type) or not hasattr(method, "sample"):
        raise ValueError(f"method must be a method such as HMC(), got {method!r}")
    for name, number, least in (("chains", chains, 1), ("warmup", warmup, 0), ("draws", draws, 1)):
        if number is not None and (not isinstance(number, int) or number < least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    if device is not None or dtype is not None:
        model = model.to(device, dtype)
    generator = as_generator(seed, model.device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = method.sample(
        model, chains=chains, warmup=warmup, draws=draws, generator=generator, init=init, progress=progress
    )
    info = {
        "method": type(method).__name__,
        "settings": repr(method),
        "seed": seed if isinstance(seed, int) else "generator",
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "model": model.fingerprint(),
    }
    return replace(result, info=info | result.info)
