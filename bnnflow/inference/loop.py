"""The one sampling loop: step a kernel, keep what it draws, survive an interrupt."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tqdm import tqdm

from bnnflow.draws import Draws
from bnnflow.types import Kernel

__all__ = ["run"]


def run(kernel: Kernel, state: Any, draws: int, generator: torch.Generator, bar: tqdm) -> Draws:
    """Step ``kernel`` ``draws`` times from ``state`` and collect every state.

    Ctrl-C stops early and returns what was drawn, with a warning and ``info["interrupted"]``; before the first draw
    there is nothing to return and the interrupt goes on.

    Args:
        kernel: its states have ``theta`` and ``log_joint``, its infos one ``(chain,)`` tensor a statistic.
        state: where to start.
        draws: number of transitions.
        generator: the source of randomness.
        bar: is advanced by one for each transition.
    """
    chains, dim = state.theta.shape
    theta = torch.empty(chains, draws, dim, dtype=state.theta.dtype, device=state.theta.device)
    log_joint = torch.empty(chains, draws, dtype=torch.float64, device=theta.device)
    stats: dict[str, torch.Tensor] = {}
    done = 0
    try:
        for draw in range(draws):
            state, info = kernel.step(state, generator)
            theta[:, draw], log_joint[:, draw] = state.theta, state.log_joint
            for name, value in info._asdict().items():
                if name not in stats:
                    stats[name] = torch.empty(chains, draws, dtype=value.dtype, device=value.device)
                stats[name][:, draw] = value
            done = draw + 1
            bar.update()
            if not bar.disable and draw % 10 == 0:
                bar.set_postfix(
                    accept=f"{float(stats['acceptance_rate'][:, :done].mean()):.2f}",
                    divergences=int(stats["diverging"][:, :done].sum()),
                )
    except KeyboardInterrupt:
        if done == 0:
            raise
        warnings.warn(f"interrupted: returning the {done} of {draws} draws made so far", stacklevel=2)
    return Draws(
        theta[:, :done],
        log_joint[:, :done],
        {name: values[:, :done] for name, values in stats.items()},
        info={"interrupted": done < draws},
    )
