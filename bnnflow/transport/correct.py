"""Corrections of approximate draws towards the exact posterior."""

from __future__ import annotations

import math
import time
import warnings

import torch
from torch import Tensor

from bnnflow.draws import Draws, as_theta
from bnnflow.inference.hmc import hmc
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = ["refine"]


def refine(
    theta: Tensor | Draws | tuple[Tensor, Tensor | None],
    model: BayesianModel,
    steps: int = 8,
    *,
    n_leapfrog: int = 16,
    target_acceptance: float = 0.8,
    seed: Seed = 0,
    chunk_size: int = 1024,
    progress: bool = True,
) -> Draws:
    """Move every draw by a few jittered Hamiltonian Monte Carlo transitions.

    Each transition leaves the posterior invariant at its step size; the law of the draws comes closer to it with every
    step, whatever it was. One step size serves all draws: a short pilot on some of them finds it, and it follows the
    mean acceptance rate afterwards. The mass matrix is the draws' own variance. Costs at most
    ``steps * n_leapfrog + 1`` gradients a draw, and less than one more for the pilot on large sets.

    Args:
        theta: the draws, ``(..., dim)``.
        model: the posterior.
        steps: transitions.
        n_leapfrog: the most leapfrog steps of one transition; their number is uniform between half of it and all.
        target_acceptance: mean acceptance rate to aim at.
        seed: an int or a generator.
        chunk_size: draws that move together, which bounds the memory.
        progress: show a bar at a terminal.

    Returns:
        The moved draws, ``(1, n, dim)``; they are independent if those given were. After Ctrl-C as they were after the
        last whole transition, with ``info["interrupted"]`` set.

    Raises:
        ValueError: if the draws do not fit the model, are none, or carry weights.
    """
    flat, log_weights = as_theta(theta)
    model.spec.check(flat)
    if log_weights is not None:
        raise ValueError("refine moves draws of equal weight; resample weighted ones first")
    if steps < 1 or n_leapfrog < 1 or len(flat) < 1:
        raise ValueError("refine needs at least one draw, one step and one leapfrog step")
    started, cpu = time.perf_counter(), time.process_time()
    flat = flat.to(model.device, model.dtype)
    generator = as_generator(seed, model.device)
    target = torch.no_grad()(model.log_joint_and_grad)
    if len(flat) > 8:
        variance = flat.double().var(0)
        mass = torch.maximum(variance, 1e-4 * variance.mean()).to(flat.dtype)
    else:
        mass = torch.ones(model.dim, dtype=flat.dtype, device=flat.device)

    def adapted(step_size: float, acceptance: Tensor) -> float:
        return step_size * math.exp(float(acceptance.mean()) - target_acceptance)

    step_size = 0.5 * model.dim**-0.25
    pilot_rows = flat[torch.randperm(len(flat), generator=generator, device=flat.device)[:64]]
    pilot_steps, pilot_leapfrog = 12, 4
    for _ in range(pilot_steps):
        kernel = hmc(target, step_size, pilot_leapfrog, mass, trajectory_jitter=1.0)
        _, info = kernel.step(kernel.init(pilot_rows, generator), generator)
        step_size = adapted(step_size, info.acceptance_rate)

    gradients = 1 + pilot_steps * (pilot_leapfrog + 1) * len(pilot_rows) / len(flat)
    kernel = hmc(target, step_size, n_leapfrog, mass)
    states = [kernel.init(rows, generator) for rows in flat.split(chunk_size)]
    acceptance, done = torch.zeros(1), 0
    with progress_bar(steps, "refine", progress, "step") as bar:
        try:
            for _ in range(steps):
                kernel = hmc(target, step_size, n_leapfrog, mass)
                moved = [kernel.step(state, generator) for state in states]
                states = [state for state, _ in moved]
                acceptance = torch.cat([info.acceptance_rate for _, info in moved])
                counts = [float(info.n_steps[0]) * len(info.n_steps) for _, info in moved]
                gradients += sum(counts) / len(flat)
                step_size = adapted(step_size, acceptance)
                done += 1
                bar.update()
        except KeyboardInterrupt:
            warnings.warn(f"interrupted: returning the draws after {done} of {steps} steps", stacklevel=2)
    moved_theta = torch.cat([state.theta for state in states])
    log_joint = torch.cat([state.log_joint for state in states])
    info = {
        "method": "refine",
        "steps": done,
        "interrupted": done < steps,
        "n_leapfrog": n_leapfrog,
        "step_size": step_size,
        "acceptance_rate": float(acceptance.mean()),
        "gradients_per_draw": gradients,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "model": model.fingerprint(),
    }
    return Draws(moved_theta.unsqueeze(0), log_joint.unsqueeze(0), info=info)
