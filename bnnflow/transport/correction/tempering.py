"""The correction that tempers from the flow to the posterior, in latent space."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnnflow.gaussian import Gaussian
from bnnflow.importance import kish_ess
from bnnflow.inference.mcmc.warmup import followed
from bnnflow.inference.particles.tempering import (
    merging,
    next_fraction,
    relative_variance,
    systematic,
)
from bnnflow.progress import progress_bar
from bnnflow.transport.correction.job import LATENT, Job, require_weights, shrunk_gaussian
from bnnflow.transport.correction.latent import Points, crank_nicolson
from bnnflow.transport.correction.verdict import Outcome

__all__ = ["tempered"]

# share of effective particles above which weights are as good as equal, and nothing is moved
_EQUAL = 0.99


def tempered(job: Job, points: Points | None) -> Outcome:
    """Temper from the flow to the posterior (Del Moral, Doucet and Jasra 2006), along N(x0; 0, I)
    w^b.
    """
    assert points is not None
    require_weights(points)
    n, flow_weights = len(points.x0), points.log_weight
    equal = torch.full((1, n), -math.log(n), dtype=torch.float64, device=points.x0.device)
    fraction, value, merged = (
        torch.zeros(1, dtype=torch.float64, device=points.x0.device) for _ in range(3)
    )
    root = torch.arange(n, device=points.x0.device).unsqueeze(0)
    beta, stuck, moves, temperatures = 0.5, 0.0, 0, 0
    with progress_bar(None, "SMC", job.progress, "temperature") as bar:
        try:
            while float(fraction) < 1:
                ratio = points.log_weight.unsqueeze(0)
                then = next_fraction(ratio, equal, fraction, 0.5)
                weights = equal + (then - fraction) * ratio
                total = weights.logsumexp(1)
                weights = weights - total
                parents = systematic(weights, job.generator)
                merged = merged + merging(weights, root)
                root, points = root.gather(1, parents), points.at(parents[0])
                value, fraction, temperatures = value + total, then, temperatures + 1
                left = kish_ess(weights[0]) / n
                if left <= _EQUAL:
                    points, beta, made, kept = _spread(
                        job, points, beta, float(fraction), left
                    )
                    moves, stuck = moves + made, max(stuck, kept)
                bar.update()
                bar.set_postfix(at=f"{float(fraction):.2e}", beta=f"{beta:.2f}")
        except KeyboardInterrupt:
            job.findings.stopped(
                f"at inverse temperature {float(fraction):.2g}: these are no draws yet",
                severe=True,
            )
    families = n**2 / float(root[0].bincount().double().square().sum())
    job.findings.kish_ess(families)
    if stuck > 0.9:
        job.findings.mild.append(
            "latent moves hardly change the particles: the flow is far from the posterior"
        )
    error = float(relative_variance(equal, root, merged).sqrt())
    info = {"temperatures": temperatures, "moves": moves, "beta": beta}
    return Outcome(
        points.theta.unsqueeze(0),
        points.log_joint.unsqueeze(0),
        families,
        info,
        forward=flow_weights,
        log_ratio=points.log_weight.unsqueeze(0),
        evidence=None if job.findings.interrupted else (float(value), error),
    )


def _spread(
    job: Job, points: Points, beta: float, power: float, left: float
) -> tuple[Points, float, int, float]:
    """Move particles until they forget their weights, in up to 30 steps.

    Return how much they still remember.

    Where weights left half of the particles effective it takes 8 steps or more: with fewer they
    trail behind the temperature, the evidence is too small and its error too. Where weights were
    nearly equal there is little to forget.
    """
    least = max(1, math.ceil(16 * (1 - max(left, 0.5))))
    start, kept, made = points.log_weight, 1.0, 0
    own = shrunk_gaussian(points.x0, len(points.x0))
    # a little wider than they are
    around = Gaussian(own.loc, math.sqrt(1 + 1 / points.x0.shape[1]) * own.scale_tril)
    for made in range(1, 31):
        kernel = crank_nicolson(job.latent, beta, power=power, around=around)
        points, move = kernel.step(points, job.generator)
        beta = min(1.0, followed(beta, float(move.acceptance_rate.mean()), LATENT))
        kept = _correlation(start, points.log_weight)
        if made >= least and kept < 0.3:
            break
    return points, beta, made, kept


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two series where both are finite.

    Zero if one of them is constant but for rounding.
    """
    usable = a.isfinite() & b.isfinite()
    pair = torch.stack([a[usable], b[usable]])  # (2, usable)
    if pair.shape[1] < 3 or float(pair.std(1).min()) < 1e-9:
        return 0.0
    return float(torch.corrcoef(pair)[0, 1])
