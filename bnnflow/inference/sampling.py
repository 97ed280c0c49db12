"""`sample`: the entry point to every method."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnnflow.arguments import Count, Whole, checked, integer
from bnnflow.draws import Draws
from bnnflow.identity import digest, seed_identity, without_addresses
from bnnflow.inference.checkpoint import RunFolder
from bnnflow.inference.mcmc.hmc import HMC
from bnnflow.inference.start import as_start
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.options import Checkpoint
from bnnflow.ranks import connect
from bnnflow.seeding import as_generator, seed_in_words
from bnnflow.stopwatch import Stopwatch
from bnnflow.types import Seed
from bnnflow.warn import warn

__all__ = ["sample"]


@checked
def sample(  # noqa: PLR0913 - the one entry point, with eleven
    model: BayesianModel,
    method: Method | None = None,
    *,
    chains: Count | None = None,
    warmup: Whole | None = None,
    draws: Count | None = None,
    seed: Seed = 0,
    init: Tensor | nn.Module | Sequence[nn.Module] | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    progress: bool = True,
) -> Draws:
    """Draw from a model's posterior.

    Under ``torchrun`` the chains or particles are split over the processes, which adapt together;
    every process returns all draws, and the same script runs unchanged alone. Methods that have no
    chains run in full in every process.

    Args:
        model: the posterior.
        method: `HMC()` unless said otherwise. A flow is one, too: it takes a number of draws, and
            gives them as one chain.
        chains: number of chains, run as one batch; a method's own default if None.
        warmup: transitions spent on tuning, thrown away.
        draws: draws per chain.
        seed: an int or a generator; the same seed gives the same draws.
        init: where chains, climbs and fits begin: None for the method's own start, ``"prior"`` for
            draws of it, a trained network, a list of them, or weights ``(dim,)`` or ``(n, dim)``.
            Chains take one for all or one for each; `Laplace` polishes the best; `SWAG`,
            `MCDropout` and `DeepEnsemble` make one member of each; `VI` and `NormalizingFlowVI`
            take one. `SMC` has ``start``, a density, instead.
        device: where to run; the model's own device if None.
        dtype: floating-point type to run in; the model's own if None.
        checkpoint: a folder in which draws are kept as they come, and every 15 seconds all that is
            needed to go on; `bnnflow.load` reads the draws of it at any time. Memory then does not
            grow with the number of draws. A `Checkpoint` with ``resume`` goes on with the run that
            is there, if there is one, bit for bit as if it had never stopped (on CPU, with as many
            threads); a finished run is extended to ``draws``.
        progress: show a bar at a terminal.

    Returns:
        Draws; after Ctrl-C those made so far, with ``info["interrupted"]`` set.

    Raises:
        ValueError: before any work starts, if the numbers or ``init`` make no sense for the method,
            or ``checkpoint`` holds a run of something else, or one that is not to be resumed.
    """
    method = HMC() if method is None else method
    if device is not None or dtype is not None:
        model = model.to(device, dtype)
    place = Checkpoint.of(checkpoint)
    if place is not None and (unknown := model.unidentified):
        raise ValueError(
            "checkpoint needs a model that another process can recognise, but not "
            f"{', '.join(unknown)}"
        )
    seed = seed if isinstance(seed, torch.Generator) else integer("seed", seed)
    seed_of_run = seed_identity(seed)
    start = as_start(model, init)
    generator = as_generator(seed, model.device)
    ranks = connect(model.device)
    identity = {
        "method": type(method).__name__,
        "settings": without_addresses(repr(method)),
        "seed": seed_in_words(seed),
        "model": model.fingerprint(),
    }
    shared = {
        "chains": chains,
        "warmup": warmup,
        "dtype": str(model.dtype),
        "processes": ranks.size,
    }
    alike = (
        identity | shared | {"seed": seed_of_run, "draws": draws, "init": _described(start)}
    )
    with contextlib.ExitStack() as held:
        kept = None
        if place is not None:
            own = _own_identity(model, method, seed_of_run, start)
            kept = held.enter_context(
                RunFolder(place, identity | shared | own, ranks, model.device)
            )
        watch = Stopwatch()
        run = Run(generator, chains, warmup, draws, start, progress, kept, ranks, alike)
        result = _drawn(method, method.draw(model, run), model)
    info = identity | {"rows": len(model.x), "run": _asked(run)} | watch.read()
    if kept is not None:  # the seconds of all runs in this folder
        info["seconds"] = kept.seconds
    chains = result.n_chains * result.info.get("gradients_per_chain", 0)
    return replace(result, info=info | {"gradients": chains} | result.info)


def _asked(run: Run) -> dict[str, Any]:
    """Return the settings that were given, by name."""
    start = run.init
    init = f"as given, {tuple(start.shape)}" if isinstance(start, Tensor) else start
    asked = {"chains": run.chains, "warmup": run.warmup, "draws": run.draws, "init": init}
    return {name: value for name, value in asked.items() if value is not None}


def _drawn(method: Method, result: Any, model: BayesianModel) -> Draws:
    """Return what a method has drawn, after a look at it.

    Raises:
        TypeError: if it is something else than draws of the model's weights.
    """
    name = type(method).__name__
    if not isinstance(result, Draws):
        raise TypeError(f"{name}.draw must return Draws, got {type(result).__name__}")
    if result.dim != model.dim:
        raise ValueError(
            f"{name}.draw must return weights (chain, draw, {model.dim}), got "
            f"{tuple(result.theta.shape)}"
        )
    lost = int(result.log_joint.isnan().sum())
    if lost:
        warn(
            f"{name}: log_joint is NaN for {lost} of {result.log_joint.numel()} draws: these are "
            "none of the posterior"
        )
    return result


def _own_identity(
    model: BayesianModel, method: Method, seed: int | str, init: Tensor | str | None
) -> dict[str, Any]:
    """Return what else a run must agree on to be the same run.

    Hashes stand for values that would be long to print.
    """
    return {
        "seed": seed,
        "values of the settings": digest(method),
        "init": _described(init),
        "gradient": "compiled" if model.is_compiled else "by torch",
    }


def _described(init: Tensor | str | None) -> str | None:
    """Return a hash of weights, and ``init`` itself where it is none."""
    return digest(init) if isinstance(init, Tensor) else init
