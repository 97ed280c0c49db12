"""Pyro's No-U-Turn sampler: an exact sampler written by others, to compare ours with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnflow.arguments import flag, integer, number, settle
from bnnflow.draws import Draws
from bnnflow.inference.start import WARM_START, starting_points
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar, until_interrupted
from bnnflow.seeding import isolated
from bnnflow.warn import warn

__all__ = ["PyroNUTS"]


@dataclass(frozen=True)
class PyroNUTS(Method):
    """Sample with Pyro's NUTS (Hoffman and Gelman 2014; multinomial as Betancourt 2017): slow, and
    an oracle.

    Leaves the posterior (at its temperature) invariant once warm-up has ended. The chains run one
    after the other in this process, each with a seed, a step size and a diagonal mass matrix of its
    own, on ``log_joint`` over ``theta``.

    Args:
        max_tree_depth: at most 2 ** max_tree_depth leapfrog steps a draw.
        target_acceptance: the mean acceptance rate that warm-up aims at.
        full_mass: learn a full mass matrix.
    """

    refused = ("checkpoint",)

    max_tree_depth: int = 10
    target_acceptance: float = 0.8
    full_mass: bool = False

    def __post_init__(self) -> None:
        settle(self, integer, "max_tree_depth", least=1)
        settle(self, number, "target_acceptance", above=0, below=1)
        settle(self, flag, "full_mass")

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Run the chains, 4 of 500 + 500 unless said otherwise; see `bnnflow.sample`.

        Ctrl-C returns the chains that are complete, or what the first one has drawn, with
        ``info["interrupted"]``.
        """
        run.refuse(self, "chains, warmup, draws and init")
        chains, draws = run.chains_or(4), run.draws or 500
        warmup = 500 if run.warmup is None else run.warmup
        starts = starting_points(model, chains, run.init, run.generator, run.progress)
        finished: list[_Chain] = []
        chain = _Chain(model)
        with (
            progress_bar(
                chains * (warmup + draws), "Pyro NUTS", run.progress, "draw"
            ) as bar,
            until_interrupted() as drawn,
        ):
            for start in starts:
                chain = _Chain(model)
                with isolated(run.generator):  # another seed for every chain
                    for _ in chain.run(self, start, warmup, draws, bar):
                        drawn.done += 1
                finished.append(chain)
        kept = finished or [chain]
        if drawn.interrupted:
            warn(
                f"interrupted: returning {len(kept)} of {chains} chains, "
                f"with {len(kept[0].theta)} of {draws} draws"
            )
        theta = torch.stack([torch.stack(each.theta) for each in kept])
        stats = {
            name: torch.tensor([each.stats[name][: len(each.theta)] for each in kept])
            for name in kept[0].stats
        }
        stats["acceptance_rate"] = stats["acceptance_rate"].double()
        info = {
            "step_size": [each.step_size for each in kept],
            "warmup": warmup,
            "gradients_per_chain": sum(each.gradients for each in kept) / len(kept)
            + (WARM_START if run.init is None else 0),
            "divergences": int(stats["diverging"].sum()),
            "interrupted": drawn.interrupted,
        }
        return Draws(theta, model.log_joint(theta), stats, info=info)


class _Chain:
    """One chain: what it has drawn so far."""

    def __init__(self, model: BayesianModel) -> None:
        self._model = model
        self.theta: list[Tensor] = []
        self.stats: dict[str, list[Any]] = {
            "acceptance_rate": [],
            "diverging": [],
            "n_steps": [],
        }
        self.gradients, self.step_size = 0, 0.0

    def _potential(self, site: dict[str, Tensor]) -> Tensor:
        """Return -log_joint, whose gradient the model has computed already."""
        theta = site["theta"]
        self.gradients += 1
        with torch.no_grad():
            value, grad = self._model.log_joint_and_grad(theta.detach().unsqueeze(0))
        value, grad = value[0].to(theta.dtype), grad[0]
        return -(value + ((theta - theta.detach()) * grad).sum())

    def run(
        self, method: PyroNUTS, start: Tensor, warmup: int, draws: int, bar: Any
    ) -> Iterator[None]:
        """Warm up, then draw, and yield after each draw."""
        from pyro.infer import NUTS

        kernel = NUTS(
            potential_fn=self._potential,
            target_accept_prob=method.target_acceptance,
            max_tree_depth=method.max_tree_depth,
            full_mass=method.full_mass,
        )
        kernel.initial_params = site = {"theta": start}
        kernel.setup(warmup)
        for _ in range(warmup):
            site = kernel.sample(site)
            bar.update()
        self.step_size, mean = float(kernel.step_size), 0.0
        for i in range(draws):
            before, diverged = (
                self.gradients,
                len(kernel.diagnostics()["divergences"]) if i else 0,
            )
            site = kernel.sample(site)
            # Pyro keeps only the running mean of the acceptance rate.
            mean, previous = kernel._mean_accept_prob, mean
            self.stats["acceptance_rate"].append(mean * (i + 1) - previous * i)
            self.stats["diverging"].append(
                len(kernel.diagnostics()["divergences"]) > diverged
            )
            self.stats["n_steps"].append(self.gradients - before)
            self.theta.append(site["theta"].detach().clone())
            bar.update()
            yield
        kernel.cleanup()
