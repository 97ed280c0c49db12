"""The correction that moves every draw, and needs no density of the flow."""

from __future__ import annotations

import math

import torch

from bnnflow.draws import Draws
from bnnflow.inference.particles.evidence import evidence
from bnnflow.inference.particles.refine import refine
from bnnflow.transport.correction.job import CHUNK, WEIGHED, Job
from bnnflow.transport.correction.latent import Points
from bnnflow.transport.correction.verdict import Outcome

__all__ = ["refined"]

TRANSITIONS = 8  # transitions of each half of a refinement


def refined(job: Job, points: Points | None) -> Outcome:
    """Refine every draw twice, and see whether the second time still changes something."""
    known = 0 if points is None else len(points.x0)
    rest = [
        job.latent.forward_without_density(rows)
        for rows in job.x0[known:].split(CHUNK)
        if len(rows)
    ]
    theta = torch.cat(([] if points is None else [points.theta]) + rest)
    usable = theta.isfinite().all(1)
    if not bool(usable.all()):
        job.findings.mild.append(
            f"{int((~usable).sum())} of {len(theta)} draws were not finite and were left out"
        )
    first = refine(
        job.model, theta[usable], TRANSITIONS, seed=job.generator, progress=job.progress
    )
    second = first
    if not first.info["interrupted"]:
        second = refine(
            job.model, first.flat, TRANSITIONS, seed=job.generator, progress=job.progress
        )
        drift = float(
            (second.log_joint.mean() - first.log_joint.mean()).abs()
            / second.log_joint.std()
        )
        job.findings.moving(drift, 3 * math.sqrt(2 / first.n_draws))
    steps = first.info["steps"] + (second.info["steps"] if second is not first else 0)
    if second.info["interrupted"]:
        job.findings.stopped(
            f"after {steps} of {2 * TRANSITIONS} transitions: refine the draws again",
            severe=True,
        )
    if left := second.info["outliers"]:
        job.findings.mild.append(
            f"{left} of {second.n_draws} draws still lie far below all others: refine for longer"
        )
    gradients = sum(
        run.info["gradients_per_draw"]
        for run in {id(r): r for r in (first, second)}.values()
    )
    info = {
        "transitions": steps,
        "gradients_per_draw": gradients,
        "acceptance_rate": second.info["acceptance_rate"],
        "step_size": second.info["step_size"],
    }
    return Outcome(
        second.theta,
        second.log_joint,
        float(second.n_draws),
        info,
        evidence=_annealed(job, second),
    )


def _annealed(job: Job, draws: Draws) -> tuple[float, float] | None:
    """Return the evidence of refined draws, where it can be had at a price like theirs."""
    if (
        job.findings.interrupted
        or job.model.temperature != 1
        or job.model.dim > WEIGHED
        or draws.n_draws < 10
    ):
        return None
    try:
        return evidence(job.model, draws, seed=job.generator, progress=job.progress)
    except KeyboardInterrupt:
        job.findings.stopped("while the evidence was sought")
        return None
