"""What every method of correction is given, and what they share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnnflow.gaussian import Gaussian
from bnnflow.importance import psis
from bnnflow.inference.mcmc.trajectories import predictions_as_features
from bnnflow.inference.particles.tempering import systematic
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.transport.correction.latent import Latent, Points
from bnnflow.transport.correction.verdict import Findings

__all__ = [
    "CHUNK",
    "LATENT",
    "WEIGHED",
    "Job",
    "features_of",
    "require_weights",
    "shrunk_gaussian",
    "starts",
    "weigh",
]

CHUNK = 512  # densities between two looks at the keyboard
LATENT = 0.3  # acceptance rate that latent moves aim at
# dimension beyond which an exact density is asked for only if the caller insists
WEIGHED = 2000


class Job(NamedTuple):
    """What every method is given."""

    latent: Latent
    model: BayesianModel
    n: int
    x0: Tensor  # (n, dim), where the flow's draws start
    generator: torch.Generator
    progress: bool
    findings: Findings


def weigh(job: Job, n: int, points: Points | None = None) -> Points:
    """Push the first ``n`` latent points with both densities, beyond those that are given."""
    if points is None:
        job.latent.settle(job.x0)
    parts = [] if points is None else [points]
    done, n = 0 if points is None else len(points.x0), min(n, job.n)
    if points is not None and done >= n:
        return points
    with progress_bar(n, "weights", job.progress, "draw", initial=done) as bar:
        try:
            for rows in job.x0[done:n].split(job.latent.chunk):
                parts.append(job.latent.forward(rows))
                bar.update(len(rows))
        except KeyboardInterrupt:
            if not parts:
                raise
            weighed = sum(len(part.x0) for part in parts)
            job.findings.stopped(f"after {weighed:,} of {n:,} draws were weighed")
    return Points(*(torch.cat(parts) for parts in zip(*parts, strict=True)))


def shrunk_gaussian(x0: Tensor, n: float) -> Gaussian:
    """Return the Gaussian of latent points that amount to n, shrunk to the latent law as if dim
    more had that.
    """
    dim = x0.shape[1]
    covariance = (n * torch.cov(x0.T).reshape(dim, dim) + dim * torch.eye(dim).to(x0)) / (
        n + dim
    )
    return Gaussian(x0.mean(0), torch.linalg.cholesky(covariance))


def starts(points: Points, chains: int, generator: torch.Generator) -> Tensor:
    """Return rows drawn by their smoothed weights, ``(chains,)``."""
    require_weights(points)
    weights, _ = psis(points.log_weight)
    parents = systematic(weights.unsqueeze(0), generator)[0]
    return parents[
        torch.randint(len(parents), (chains,), generator=generator, device=parents.device)
    ]


def require_weights(points: Points) -> None:
    """Raise ``FloatingPointError`` if no draw of the flow has a weight."""
    if not bool((points.log_weight > -math.inf).any()):
        raise FloatingPointError("no draw of the flow has a finite weight")


def features_of(model: BayesianModel, theta: Tensor) -> Tensor:
    """Return what networks ``(n, dim)`` predict at some inputs, or their weights where these are as
    good.
    """
    features = predictions_as_features(model)
    theta = theta.to(model.device, model.dtype)
    with torch.no_grad():
        return torch.cat(
            [(features(rows) if features else rows).double() for rows in theta.split(CHUNK)]
        )
