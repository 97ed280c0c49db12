"""Corrections by weights: importance sampling with Pareto smoothing, a defensive mixture,
resampling.
"""

from __future__ import annotations

import math

import torch

from bnnflow.importance import kish_ess, log_mean, psis
from bnnflow.inference.particles.tempering import systematic
from bnnflow.transport.correction.importance import Student
from bnnflow.transport.correction.job import Job
from bnnflow.transport.correction.latent import Points
from bnnflow.transport.correction.verdict import Outcome

__all__ = ["defensive", "importance", "resample"]

_DEFENSIVE = 0.1  # share of the heavy tail in the mixture


def importance(job: Job, points: Points | None) -> Outcome:
    """Weigh the draws of the flow."""
    assert points is not None
    return _weighted(job, points, [len(points.x0)])


def _weighted(job: Job, points: Points, strata: list[int]) -> Outcome:
    """Return weighted draws and the evidence, from draws of a density or of parts of a mixture."""
    raw = points.log_weight
    weights, khat = psis(raw)
    ess, kept = kish_ess(weights), weights > -math.inf
    job.findings.weights(khat, ess, len(raw), int(points.lost.sum()))
    if not bool(kept.any()):
        raise FloatingPointError("no draw of the flow has a finite weight")
    return Outcome(
        points.theta[kept].unsqueeze(0),
        points.log_joint[kept].unsqueeze(0),
        ess,
        {"khat": khat},
        forward=raw,
        log_ratio=raw[kept].unsqueeze(0),
        log_weights=weights[kept].unsqueeze(0),
        evidence=log_mean(raw, *strata),
    )


def defensive(job: Job, points: Points | None) -> Outcome:
    """Weigh by a mixture of the flow and a Student law fitted to other draws of it."""
    assert points is not None
    model, latent = job.model, job.latent
    others = latent.forward_without_density(
        latent.flow.start(max(200, min(4 * model.dim, 4000)), job.generator)
    )
    student = Student.fit(others[others.isfinite().all(1)])
    heavy = max(2, round(_DEFENSIVE * len(points.x0)))
    light = len(points.x0) - heavy
    share = math.log(light / (light + heavy)), math.log(heavy / (light + heavy))
    extra = latent.inverse(student.sample(heavy, job.generator).to(points.theta))

    def mixture(points: Points) -> Points:
        log_q = torch.where(points.log_q.isnan(), -math.inf, points.log_q)
        return points._replace(
            log_q=torch.logaddexp(
                share[0] + log_q, share[1] + student.log_prob(points.theta)
            )
        )

    both = Points(
        *(
            torch.cat(pair)
            for pair in zip(points.at(torch.arange(light)), extra, strict=True)
        )
    )
    return _weighted(job, mixture(both), [light, heavy])._replace(q=mixture)


def resample(job: Job, points: Points | None) -> Outcome:
    """Resample by smoothed weights, systematically."""
    assert points is not None
    outcome = importance(job, points)
    weights, _ = psis(points.log_weight)
    drawn = points.at(systematic(weights.unsqueeze(0), job.generator)[0])
    return outcome._replace(
        theta=drawn.theta.unsqueeze(0),
        log_joint=drawn.log_joint.unsqueeze(0),
        log_ratio=drawn.log_weight.unsqueeze(0),
        log_weights=None,
    )
