"""Draws moved towards the posterior by a few Hamiltonian transitions each."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bnnflow.arguments import Count, Fraction, checked
from bnnflow.draws import Draws, as_theta, outliers
from bnnflow.gaussian import positive
from bnnflow.inference.mcmc.hmc import hmc
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator, seed_in_words
from bnnflow.types import Kernel, LogDensityAndGrad, Seed
from bnnflow.warn import warn

__all__ = ["refine"]

_BEHIND = 32  # more transitions at most, of draws that have not arrived
_PILOT_LEAPFROG = 4  # steps of a transition that only looks for a step size
_STEEP = 0.5  # acceptance rate that their step scales aim at


@checked
def refine(
    model: BayesianModel,
    draws: Draws | Tensor | tuple[Tensor, Tensor | None],
    steps: Count = 8,
    *,
    n_leapfrog: Count = 16,
    target_acceptance: Fraction = 0.8,
    seed: Seed = 0,
    chunk_size: Count = 1024,
    progress: bool = True,
) -> Draws:
    """Move every draw by a few jittered Hamiltonian Monte Carlo transitions.

    Each transition leaves the posterior invariant at its step size; the law of the draws comes
    closer to it with every step, whatever it was. One step size serves all draws: a short pilot on
    some of them finds it, and it follows the mean acceptance rate afterwards. Where a draw starts,
    the posterior may be too steep for it: in the first half of the steps a draw that has not moved
    takes the next at a quarter of its step scale, and doubles it when it moves. Draws that even so
    lie far below all others at the end (one in a thousand can spoil a mean or an evidence) go on
    likewise, alone, for 32 steps at most. The mass matrix is the draws' own variance. Costs at most
    ``steps * n_leapfrog + 1`` gradients a draw, those of the last ones apart, and less than one
    more for the pilot on large sets.

    Args:
        model: the posterior.
        draws: ``(..., dim)``; they may be draws of another posterior, of fewer data, say.
        steps: transitions.
        n_leapfrog: the most leapfrog steps of one transition; their number is uniform between half
            of it and all.
        target_acceptance: mean acceptance rate to aim at.
        seed: an int or a generator.
        chunk_size: draws that move together, which bounds the memory.
        progress: show a bar at a terminal.

    Returns:
        The moved draws, ``(1, n, dim)``; they are independent if those given were.
        ``info["outliers"]`` says how many of them still lie far below all others. After Ctrl-C as
        they were after the last whole transition, with ``info["interrupted"]`` set.

    Raises:
        ValueError: if the draws do not fit the model, are none, are not finite, or carry weights.
    """
    flat, log_weights = as_theta(draws, "draws")
    model.spec.check(flat, "draws")
    if log_weights is not None:
        raise ValueError("refine moves draws of equal weight; resample weighted ones first")
    if broken := int((~flat.isfinite().all(1)).sum()):
        raise ValueError(f"{broken} of {len(flat)} draws are NaN or infinite: leave them out")
    if len(flat) < 1:
        raise ValueError("refine needs at least one draw")
    started, cpu = time.perf_counter(), time.process_time()
    flat = flat.to(model.device, model.dtype)
    generator = as_generator(seed, model.device)
    target = torch.no_grad()(model.log_joint_and_grad)
    if len(flat) > 8:
        variance = flat.double().var(0)
        mass = positive(variance).to(flat.dtype)
    else:
        scale = model.flat_prior.scale
        mass = (
            torch.ones_like(flat[0])
            if scale is None
            else scale.square().expand_as(flat[0]).to(flat)
        )

    pilot = flat[torch.randperm(len(flat), generator=generator, device=flat.device)[:64]]
    step_size, tries = _first_step_size(target, pilot, mass, target_acceptance, generator)
    gradients = 1 + tries * (_PILOT_LEAPFROG + 1) * len(pilot) / len(flat)
    kernel = hmc(target, step_size, n_leapfrog, mass)
    states = [kernel.init(rows, generator) for rows in flat.split(chunk_size)]
    # of every draw, relative to step_size
    step_scale = torch.ones(len(flat), 1, dtype=flat.dtype, device=flat.device)
    acceptance, done = torch.zeros(1), 0
    with progress_bar(steps, "refine", progress, "step") as bar:
        try:
            for step in range(steps):
                early, moved = step < steps // 2, []
                if not early:
                    step_scale = torch.ones_like(step_scale)
                for state, own in zip(states, step_scale.split(chunk_size), strict=True):
                    kernel = hmc(
                        target, step_size, n_leapfrog, mass * own.square() if early else mass
                    )
                    moved.append(kernel.step(state, generator))
                stayed = [
                    (new.theta == old.theta).all(1)
                    for (new, _), old in zip(moved, states, strict=True)
                ]
                states = [state for state, _ in moved]
                acceptance = torch.cat([info.acceptance_rate for _, info in moved])
                counts = [float(info.n_steps[0]) * len(info.n_steps) for _, info in moved]
                gradients += sum(counts) / len(flat)
                whole = (step_scale == 1).squeeze(1)
                if bool(whole.any()):
                    step_size = _adapted(step_size, acceptance[whole], target_acceptance)
                step_scale = torch.where(
                    torch.cat(stayed).unsqueeze(1), step_scale / 4, (2 * step_scale).clamp(max=1.0)
                )
                done += 1
                bar.update()
        except KeyboardInterrupt:
            warn(f"interrupted: returning the draws after {done} of {steps} steps")
    moved_theta = torch.cat([state.theta for state in states])
    log_joint = torch.cat([state.log_joint for state in states])
    behind = outliers(log_joint)
    interrupted = done < steps
    if not interrupted and bool(behind.any()):
        kernel_of = functools.partial(hmc, target, step_size, n_leapfrog)
        spent, interrupted = _bring_up(moved_theta, log_joint, kernel_of, mass, generator)
        gradients += spent / len(flat)
        behind = outliers(log_joint)
    info = {
        "method": "refine",
        "settings": f"refine(steps={steps}, n_leapfrog={n_leapfrog}, "
        f"target_acceptance={target_acceptance})",
        "seed": seed_in_words(seed),
        "steps": done,
        "interrupted": interrupted,
        "n_leapfrog": n_leapfrog,
        "step_size": step_size,
        "acceptance_rate": float(acceptance.mean()),
        "gradients_per_draw": gradients,
        "gradients": round(gradients * len(flat)),
        "outliers": int(behind.sum()),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "model": model.fingerprint(),
    }
    return Draws(moved_theta.unsqueeze(0), log_joint.unsqueeze(0), info=info)


def _adapted(step_size: float, acceptance: Tensor, target_acceptance: float) -> float:
    return step_size * math.exp(float(acceptance.mean()) - target_acceptance)


def _first_step_size(
    target: LogDensityAndGrad,
    theta: Tensor,
    mass: Tensor,
    target_acceptance: float,
    generator: torch.Generator,
) -> tuple[float, int]:
    """Return a step size at which some draws ``(n, dim)`` move, and how many transitions it took to
    find it.
    """
    step_size, tries = 0.5 * theta.shape[1] ** -0.25, 0
    tried = torch.zeros(1)  # until a step is accepted at all, however small it has to be
    while tries < 12 or (tries < 100 and not float(tried.mean()) > 0.2):
        kernel = hmc(target, step_size, _PILOT_LEAPFROG, mass, trajectory_jitter=1.0)
        _, info = kernel.step(kernel.init(theta, generator), generator)
        tried, tries = info.acceptance_rate, tries + 1
        step_size = _adapted(step_size, tried, target_acceptance)
    return step_size, tries


def _bring_up(
    theta: Tensor,
    log_joint: Tensor,
    kernel_of: Callable[[Tensor], Kernel],
    mass: Tensor,
    generator: torch.Generator,
) -> tuple[float, bool]:
    """Move the outliers among draws ``(n, dim)``, in place, until none is left or for so many
    steps.

    Returns:
        How many gradients it took, and whether Ctrl-C came before the end.
    """
    step_scale, spent = torch.ones_like(theta[:, :1]), 0.0
    try:
        for _ in range(_BEHIND):
            rows = outliers(log_joint).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            kernel = kernel_of(mass * step_scale[rows].square())
            state, info = kernel.step(kernel.init(theta[rows], generator), generator)
            theta[rows], log_joint[rows] = state.theta, state.log_joint
            change = 2 * (info.acceptance_rate.to(theta.dtype) - _STEEP)
            step_scale[rows] = (step_scale[rows] * change.exp().unsqueeze(1)).clamp(max=1.0)
            spent += (float(info.n_steps[0]) + 1) * len(rows)
    except KeyboardInterrupt:
        warn("interrupted: some draws still lie far below all others")
        return spent, True
    return spent, False
