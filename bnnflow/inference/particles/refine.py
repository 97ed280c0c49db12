"""Draws moved towards the posterior by a few Hamiltonian transitions each."""

from __future__ import annotations

import torch
from torch import Tensor

from bnnflow.arguments import Count, Fraction, checked
from bnnflow.draws import Draws, as_theta, outliers
from bnnflow.gaussian import positive
from bnnflow.inference.mcmc.hmc import hmc
from bnnflow.inference.mcmc.trajectories import ChainState
from bnnflow.inference.mcmc.warmup import followed
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator, seed_in_words
from bnnflow.stopwatch import Stopwatch
from bnnflow.types import Kernel, LogDensityAndGrad, Seed
from bnnflow.warn import warn

__all__ = ["PILOTS", "piloted", "refine"]

_BEHIND = 32  # more transitions at most, of draws that have not arrived
PILOTS = 64  # draws at most that look for a step size
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
    theta = _checked(model, draws).to(model.device, model.dtype)
    watch = Stopwatch()
    move = _Refinement(model, theta, n_leapfrog, target_acceptance, chunk_size, seed)
    move.find_step_size()
    interrupted = move.run(steps, progress)
    interrupted = interrupted or move.bring_up()
    info = {
        "method": "refine",
        "settings": f"refine(steps={steps}, n_leapfrog={n_leapfrog}, "
        f"target_acceptance={target_acceptance})",
        "seed": seed_in_words(seed),
        "steps": move.done,
        "interrupted": interrupted,
        "n_leapfrog": n_leapfrog,
        "step_size": move.step_size,
        "acceptance_rate": float(move.acceptance.mean()),
        "gradients_per_draw": move.gradients / len(theta),
        "gradients": round(move.gradients),
        "outliers": int(outliers(move.log_joint).sum()),
        **watch.read(),
        "model": model.fingerprint(),
        "rows": len(model.x),
    }
    return Draws(move.theta.unsqueeze(0), move.log_joint.unsqueeze(0), info=info)


def _checked(
    model: BayesianModel, draws: Draws | Tensor | tuple[Tensor, Tensor | None]
) -> Tensor:
    """Return the draws as ``(n, dim)``."""
    theta, log_weights = as_theta(draws, "draws")
    model.spec.check(theta, "draws")
    if log_weights is not None:
        raise ValueError("refine moves draws of equal weight; resample weighted ones first")
    if broken := int((~theta.isfinite().all(1)).sum()):
        raise ValueError(
            f"{broken} of {len(theta)} draws are NaN or infinite: leave them out"
        )
    if len(theta) < 1:
        raise ValueError("refine needs at least one draw")
    return theta


def _mass(model: BayesianModel, theta: Tensor) -> Tensor:
    """Return an inverse mass matrix ``(dim,)``: the variance of the draws, of few the prior's."""
    if len(theta) > 8:
        return positive(theta.double().var(0)).to(theta.dtype)
    scale = model.flat_prior.scale
    if scale is None:
        return torch.ones_like(theta[0])
    return scale.square().expand_as(theta[0]).to(theta)


def piloted(
    target: LogDensityAndGrad,
    theta: Tensor,
    mass: Tensor,
    step_size: float,
    target_acceptance: float,
    generator: torch.Generator,
) -> tuple[float, int]:
    """Return a step size at which some of the draws ``(n, dim)`` move, and the gradients that it
    took to find.
    """
    rows = torch.randperm(len(theta), generator=generator, device=theta.device)[:PILOTS]
    pilot, tries = theta[rows], 0
    # until a step is accepted at all, however small it has to be
    rate = torch.zeros(1)
    while tries < 12 or (tries < 100 and not float(rate.mean()) > 0.2):
        kernel = hmc(target, step_size, _PILOT_LEAPFROG, mass, trajectory_jitter=1.0)
        _, info = kernel.step(kernel.init(pilot, generator), generator)
        rate, tries = info.acceptance_rate, tries + 1
        step_size = followed(step_size, float(rate.mean()), target_acceptance)
    return step_size, tries * (_PILOT_LEAPFROG + 1) * len(pilot)


class _Refinement:
    """Draws ``(n, dim)`` on their way."""

    def __init__(
        self,
        model: BayesianModel,
        theta: Tensor,
        n_leapfrog: int,
        target_acceptance: float,
        chunk_size: int,
        seed: Seed,
    ) -> None:
        self.theta, self.chunk_size = theta, chunk_size
        self.n_leapfrog, self.target_acceptance = n_leapfrog, target_acceptance
        self.generator = as_generator(seed, model.device)
        self.target: LogDensityAndGrad = model.target
        self.mass = _mass(model, theta)
        self.step_size = 0.5 * model.dim**-0.25
        self.acceptance, self.done = torch.zeros(1), 0
        self.gradients = 0.0  # of all draws together

    def kernel(self, mass: Tensor) -> Kernel:
        """Return a transition at the step size that all share."""
        return hmc(self.target, self.step_size, self.n_leapfrog, mass)

    def adapt(self, acceptance: Tensor) -> None:
        """Follow the acceptance rate that was asked for."""
        mean = float(acceptance.mean())
        self.step_size = followed(self.step_size, mean, self.target_acceptance)

    def find_step_size(self) -> None:
        """Find a step size at which some draws move."""
        self.step_size, tries = piloted(
            self.target,
            self.theta,
            self.mass,
            self.step_size,
            self.target_acceptance,
            self.generator,
        )
        self.gradients += tries

    def run(self, steps: int, progress: bool) -> bool:
        """Move all draws so many times, and say whether Ctrl-C came before the end."""
        kernel = self.kernel(self.mass)
        states = [
            kernel.init(rows, self.generator) for rows in self.theta.split(self.chunk_size)
        ]
        self.gradients += len(self.theta)
        # of every draw, relative to step_size
        step_scale = torch.ones_like(self.theta[:, :1])
        with progress_bar(steps, "refine", progress, "step") as bar:
            try:
                for step in range(steps):
                    if step >= steps // 2:
                        step_scale = torch.ones_like(step_scale)
                    states, stayed = self.step(states, step_scale)
                    step_scale = torch.where(
                        stayed.unsqueeze(1), step_scale / 4, (2 * step_scale).clamp(max=1.0)
                    )
                    self.done += 1
                    bar.update()
            except KeyboardInterrupt:
                warn(f"interrupted: returning the draws after {self.done} of {steps} steps")
        self.theta = torch.cat([state.theta for state in states])
        self.log_joint = torch.cat([state.log_joint for state in states])
        return self.done < steps

    def step(
        self, states: list[ChainState], step_scale: Tensor
    ) -> tuple[list[ChainState], Tensor]:
        """Move all draws once; return them, and ``(n,)`` which of them stayed where they were."""
        moved = []
        for state, own in zip(states, step_scale.split(self.chunk_size), strict=True):
            kernel = self.kernel(self.mass * own.square())
            moved.append(kernel.step(state, self.generator))
        stayed = [
            (new.theta == old.theta).all(1)
            for (new, _), old in zip(moved, states, strict=True)
        ]
        self.acceptance = torch.cat([info.acceptance_rate for _, info in moved])
        self.gradients += sum(
            float(info.n_steps[0]) * len(info.n_steps) for _, info in moved
        )
        whole = (step_scale == 1).squeeze(1)
        if bool(whole.any()):
            self.adapt(self.acceptance[whole])
        return [state for state, _ in moved], torch.cat(stayed)

    def bring_up(self) -> bool:
        """Move the outliers alone, until none is left or for so many steps; say whether Ctrl-C came
        before the end.
        """
        theta, log_joint = self.theta, self.log_joint
        step_scale = torch.ones_like(theta[:, :1])
        try:
            for _ in range(_BEHIND):
                rows = outliers(log_joint).nonzero().squeeze(1)
                if len(rows) == 0:
                    break
                kernel = self.kernel(self.mass * step_scale[rows].square())
                state, info = kernel.step(
                    kernel.init(theta[rows], self.generator), self.generator
                )
                theta[rows], log_joint[rows] = state.theta, state.log_joint
                change = 2 * (info.acceptance_rate.to(theta.dtype) - _STEEP)
                step_scale[rows] = (step_scale[rows] * change.exp().unsqueeze(1)).clamp(
                    max=1.0
                )
                self.gradients += (float(info.n_steps[0]) + 1) * len(rows)
        except KeyboardInterrupt:
            warn("interrupted: some draws still lie far below all others")
            return True
        return False
