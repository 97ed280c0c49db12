"""Draws of a prior that the posteriors of many small data sets are weighed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnnflow.arguments import Count, checked
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = ["PriorBank"]

_TOGETHER = 4096  # draws that are evaluated at once


@dataclass(frozen=True, eq=False)
class PriorBank:
    """Many draws of a prior and the networks that they are: `update` makes the posterior of any
    data set of them.

    Of few rows the weighted draws are the posterior, without a gradient; of more the best of them
    are moved. What a learned prior costs, its map, is paid once.

    Attributes:
        theta: draws of the prior, ``(n, dim)``; see `BayesianModel.transported` of what.
        weights: of the networks, ``(n, dim)``; ``theta`` itself unless the prior is learned.
        log_prior: log density of ``theta``, ``(n,)``, float64.
        prior: its fingerprint.

    Example:
        >>> import bnnflow as bf
        >>> def task(x, y):
        ...     layers = torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
        ...     given = bf.priors.Normal(), bf.likelihoods.Gaussian(0.3)
        ...     return bf.BayesianModel(torch.nn.Sequential(*layers), *given, x, y)
        >>> x = torch.linspace(-1, 1, 3)[:, None]
        >>> bank = PriorBank.of(task(x, x))
        >>> for y in (x.sin(), x.cos()):
        ...     draws = bf.update(task(x, y), bank)
        ...     print(draws.info["route"])
        weights
        weights
    """

    theta: Tensor
    weights: Tensor
    log_prior: Tensor
    prior: str

    @classmethod
    @checked
    def of(
        cls,
        model: BayesianModel,
        n: Count = 2**17,
        *,
        seed: Seed = 0,
        progress: bool = True,
    ) -> PriorBank:
        """Draw ``n`` networks from the prior of a model, whose data do not matter.

        Args:
            model: one of those whose posteriors are wanted.
            n: so many that some hundreds fit the data of each.
            seed: an int or a generator.
            progress: show a bar at a terminal.
        """
        theta = model.sample_prior(n, as_generator(seed, model.device))
        weights = []
        with torch.no_grad(), progress_bar(n, "bank", progress, "draw") as bar:
            for part in theta.split(_TOGETHER):
                weights.append(model.weights_of(part))
                bar.update(len(part))
            log_prior = model.log_prior(theta).double()
        return cls(theta, torch.cat(weights), log_prior, model.prior_fingerprint())

    def __repr__(self) -> str:
        """Return how many there are of what."""
        return f"PriorBank({len(self):,} draws of {self.theta.shape[1]:,} weights)"

    def __len__(self) -> int:
        """Return how many draws there are."""
        return len(self.theta)

    @checked
    def log_likelihood(self, model: BayesianModel) -> Tensor:
        """Return the log likelihood of a model's data by each network, ``(n,)``, float64.

        Raises:
            ValueError: if these are no draws of the model's prior.
        """
        if self.prior != model.prior_fingerprint():
            raise ValueError("draws are a bank of another prior than that of model")
        over_weights = model.density.over_weights
        parts = self.weights.to(model.device, model.dtype).split(_TOGETHER)
        with torch.no_grad():
            return torch.cat([over_weights.log_likelihood(part).double() for part in parts])
