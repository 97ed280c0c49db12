"""Corrections of approximate draws towards the exact posterior, and what can be said of their success."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_args

import torch
from torch import Tensor

from bnnflow import verdicts
from bnnflow.arguments import Count, Fraction, checked
from bnnflow.draws import Draws, as_theta, strays
from bnnflow.gaussian import Gaussian, positive
from bnnflow.inference.hmc import hmc, rotation
from bnnflow.inference.smc import evidence, merging, next_fraction, relative_variance, systematic
from bnnflow.inference.trajectories import ChainState, functions, metropolis
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator, seed_in_words
from bnnflow.transport.importance import (
    HeldOut,
    Student,
    bridge,
    effective,
    khat_limit,
    log_mean,
    mixing,
    smoothed,
)
from bnnflow.transport.latent import Latent, Points, SolverError, Transport, crank_nicolson, log_normal
from bnnflow.transport.options import Density
from bnnflow.transport.verdict import Findings, Outcome, compare, copies_gap, solver_error
from bnnflow.types import CorrectionMethod, Kernel, LogDensityAndGrad, Seed
from bnnflow.warn import warn

__all__ = ["Correction", "correct", "refine"]

_CHUNK = 512  # densities between two looks at the keyboard
_PILOT = 256  # draws that are weighed where the weights only diagnose
_HELD_OUT = 1000  # the most held-out draws whose density is asked for
_COPIES = 64  # draws whose symmetric copies are looked up
_DEFENSIVE = 0.1  # share of the heavy tail in the mixture
_WEIGHED = 2000  # dimension beyond which an exact density is too dear to be asked for unless the caller does
_TEMPERED = 50  # dimension up to which "auto" tempers in latent space
_NEUTRA = 50  # dimension up to which gradients through the flow are paid
_REFINED = 8  # transitions of each half of a refinement
_BEHIND = 32  # more of them for draws that have not arrived,
_STEEP = 0.5  # whose reach aims at this acceptance rate
_LATENT = 0.3  # acceptance rate that latent moves aim at
_HAMILTONIAN = 0.8  # the same of Hamiltonian moves
_EQUAL = 0.99  # share of effective particles above which weights are as good as equal, and nothing is moved
_FRESH = 0.5  # share of independent proposals among the latent moves of chains
_WARM_UP = 60  # sweeps or transitions of chains that are thrown away,
_SETTLE = 1  # or so many of very many chains, if these forget quickly where they were,
_SLOWLY = 0.5  # which a correlation of neighbouring draws above this denies
_CROWD = 512  # the most chains
_SHORTEST = 8  # draws of one
_QUARTER = math.pi / 2  # time of a trajectory, in standard deviations: a quarter turn forgets where it began
_LONGEST = 16  # the most steps of one


class Correction(Draws):
    """Corrected draws; what `correct` returns, and `Draws` wherever these are accepted.

    Weighted draws have ``log_weights``, moved or resampled ones None; ``info`` holds all that was found. Beside the
    attributes of `Draws`:
    """

    @property
    def khat(self) -> float | None:
        """Pareto k-hat of the flow's weights (of the mixture's, for ``"defensive"``); None without densities."""
        return self.info["khat"]

    @property
    def ess(self) -> float:
        """Effective number of draws: of the weights, of the chains, or of the families of particles."""
        return self.info["ess"]

    @property
    def verdict(self) -> str:
        """What to do and why; begins with "trust", "trust after correction" or "do not trust"."""
        return self.info["verdict"]

    @property
    def method(self) -> str:
        """What was done, also where ``method`` was ``"auto"``."""
        return self.info["correction"]


def _with_density(name: str, flow: Any) -> Transport:
    """Return a flow that has a density over weights."""
    wanted = ("start", "forward", "forward_with_log_prob", "inverse_with_log_prob")
    if not all(hasattr(flow, each) for each in wanted):
        raise ValueError(
            f"{name}: {type(flow).__name__} has no density over weights, so there is nothing to weigh its draws with; "
            "a flow on a manifold needs a radial part that completes the measure"
        )
    return flow


@checked
def correct(
    model: BayesianModel,
    flow: Annotated[Transport, _with_density],
    n: Count = 4000,
    method: CorrectionMethod = "auto",
    *,
    seed: Seed = 0,
    held_out: Draws | Tensor | tuple[Tensor, Tensor | None] | None = None,
    density: Density | None = None,
    force: bool = False,
    progress: bool = True,
) -> Correction:
    """Turn a flow's draws into draws of the posterior, and say whether to trust them.

    With q the flow's density, p~ = exp(log_joint) and w = p~ / q:

    - ``"importance"``: draws of q, weighted by Pareto smoothed w (Vehtari et al. 2024).
    - ``"defensive"``: the same for a mixture of q and a tenth of a wide Student law (Hesterberg 1995), against tails
      that the flow has too light.
    - ``"resample"``: draws of q, resampled by their smoothed weights (Rubin 1988); equal weights, repeated draws.
    - ``"refine"``: `refine` on every draw, without weights; the evidence by annealing some of them back to the prior
      (`bnnflow.evidence`), which needs no density of the flow, up to dim 2000.
    - ``"smc"``: particles tempered from q to the posterior along N(x0; 0, I) w^b in latent space, resampled and moved
      by preconditioned Crank-Nicolson steps around their mean; only resampled where weights were all but equal.
    - ``"metropolis"``: chains that mix independent proposals from q, latent Crank-Nicolson steps and Hamiltonian
      transitions over weights, each exact.
    - ``"neutra"``: HMC in latent space (Hoffman et al. 2019), through the flow's derivatives: for small dim. It turns
      exactly in the latent law, or in a Gaussian near the posterior, and is kicked by what else there is.
    - ``"auto"``: importance sampling if k-hat allows it; else, where dim is at most 50, SMC; else refinement, which
      costs no densities. Beyond dim 2000 an exact density is too dear, and it refines at once.

    All need w but refinement, which uses it for the diagnosis alone. Densities are the solver's: of a `Flow` with fixed
    steps some draws tell whether RK4 with half of them or fewer will do, within a hundredth of a nat, and that is then
    taken (``info["solver_steps"]``). Else some are sent again with twice the steps. The verdict says if it matters, and
    errors of evidences include what it changes. Chains are hundreds of short ones where flows have few weights and
    chains forget quickly, and few long ones elsewhere.

    The evidence of weighted draws is the log of the mean raw weight, which is unbiased; its error is the delta
    method's. Held-out draws give a second, by the optimal bridge between them and the flow's; chains of
    ``"metropolis"`` and ``"neutra"`` take the bridge from the flow to themselves.

    Weights of a flow's own draws cannot tell of a mode that it has lost. Three things can: held-out draws, whose log
    weights must have the law that the corrected draws' have; the bridge, which sees all of their mass; and symmetric
    copies of the flow's own draws, which have the same posterior density. So the verdict is

    - ``"trust"`` if the flow's own draws will do: exact density, held-out draws that agree, and effective weights of
      nine draws in ten, so that no mean is off by more than a third of a standard deviation;
    - ``"trust after correction"`` if the corrected draws will do, without ``held_out`` as far as the flow can tell;
    - ``"do not trust"`` if something speaks against both.

    Args:
        model: the posterior.
        flow: a `Flow`, or whatever has its ``start``, ``solver``, ``forward``, ``forward_with_log_prob`` and
            ``inverse_with_log_prob``.
        n: number of draws, at least 50; chains round it up.
        method: see above.
        seed: an int or a generator.
        held_out: draws of chains that the flow did not see; at most 1000 of them are used.
        density: how the flow's densities are found; an estimated trace makes biased weights, and is refused for all but
            refinement.
        force: use an estimated density all the same (the result then says so), or ``"neutra"`` in any dimension.
        progress: show bars at a terminal.

    Returns:
        The draws, with ``khat``, ``ess``, ``log_evidence``, ``verdict`` and ``method``. Draws of weight zero and those
        without a finite density are left out and counted. After Ctrl-C what there is, with ``info["interrupted"]``.

    Raises:
        ValueError: if the flow has no density over weights, as a manifold flow without radii has none; if flow, model
            and held-out draws do not fit each other; for an estimated density without ``force``.
    """
    density = Density() if density is None else density
    _check(flow, model, n, method, density, force)
    generator = as_generator(seed, model.device)
    held = None if held_out is None else HeldOut.of(held_out, model, _HELD_OUT)
    wall, cpu = time.perf_counter(), time.process_time()
    latent = Latent(flow, model, density, generator, progress=progress)
    job = _Job(latent, model, n, flow.start(n, generator), generator, progress, Findings())
    points, chosen, why = _diagnose(job, method)
    outcome = _METHODS[chosen](job, points)
    info = _judge(job, chosen, why, points, outcome, held)
    info |= {
        "method": "correct",
        "settings": f"correct({chosen!r}, n={n}, {density})",
        "seed": seed_in_words(seed),
        "gradients": _gradients(outcome),
        "correction": chosen,
        "asked": method,
        "density_solves": latent.solves,
        "densities_broken": latent.broken,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "model": model.fingerprint(),
    }
    estimate = info["evidences"].get(chosen) or info["evidences"].get("bridge")
    if model.temperature != 1:
        info["log_tempered_normaliser"], estimate = estimate, None
    return Correction(
        outcome.theta,
        outcome.log_joint,
        outcome.stats,
        outcome.log_weights,
        estimate,
        info=outcome.info | info,
    )


def _gradients(outcome: Outcome) -> int:
    """Return the gradients of the posterior that all draws took, beside those of the flow's densities."""
    chains, draws, _ = outcome.theta.shape
    info = outcome.info
    return round(info.get("gradients_per_draw", 0) * chains * draws + info.get("gradients_per_chain", 0) * chains)


class _Job(NamedTuple):
    """What every method is given."""

    latent: Latent
    model: BayesianModel
    n: int
    x0: Tensor  # (n, dim), where the flow's draws start
    generator: torch.Generator
    progress: bool
    findings: Findings


def _check(flow: Transport, model: BayesianModel, n: int, method: str, density: Density, force: bool) -> None:
    """Refuse what cannot work."""
    if flow.dim != model.dim:
        raise ValueError(f"the flow has dim {flow.dim} and the model {model.dim}")
    if not isinstance(n, int) or n < 50:
        raise ValueError(f"n must be an integer of at least 50, got {n!r}")
    if method not in get_args(CorrectionMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(CorrectionMethod))}, got {method!r}")
    if density.trace != "exact" and method != "refine" and not force:
        raise ValueError(
            f"a density estimated by {density.trace!r} is unbiased only as a logarithm: weights made of it are biased. "
            "Use Density(trace='exact'), or method='refine', which needs no density; force=True insists"
        )
    if method == "neutra" and model.dim > _NEUTRA and not force:
        raise ValueError(
            f"neutra takes derivatives of the flow's density, and dim {model.dim} is above {_NEUTRA}: use "
            "method='metropolis' or 'refine'; force=True insists"
        )


# ---------------------------------------------------------------- weights of the flow's draws


def _diagnose(job: _Job, method: CorrectionMethod) -> tuple[Points | None, CorrectionMethod, str]:
    """Weigh the flow's draws, as many as the method wants; return them, what to do and why."""
    dim = job.model.dim
    if method != "auto":
        few = {"refine": _PILOT, "metropolis": 2 * _PILOT, "neutra": 2 * _PILOT}
        if method == "refine" and (job.latent.density.trace != "exact" or dim > _WEIGHED):
            return None, method, "as asked"
        return _weigh(job, few.get(method, job.n)), method, "as asked"
    if dim > _WEIGHED:
        return None, "refine", f"chosen since an exact density in dim {dim} is too dear"
    points = _weigh(job, _PILOT)
    weights, khat = smoothed(points.log_weight)
    if khat <= 1.0 and effective(weights) >= 0.01 * len(weights):
        points = _weigh(job, job.n, points)
        weights, khat = smoothed(points.log_weight)
        if khat <= khat_limit(len(weights)):
            return points, "importance", f"chosen for a k-hat of {khat:.2f}"
    found = f"k-hat is {khat:.2f}"
    if dim <= _TEMPERED:
        return _weigh(job, job.n, points), "smc", f"chosen since {found} and dim {dim} is small"
    return points, "refine", f"chosen since {found} and tempering in dim {dim} is dear"


def _weigh(job: _Job, n: int, points: Points | None = None) -> Points:
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


def _importance(job: _Job, points: Points | None) -> Outcome:
    assert points is not None
    return _weighted(job, points, [len(points.x0)])


def _weighted(job: _Job, points: Points, strata: list[int]) -> Outcome:
    """Return weighted draws and the evidence, from draws of a density or of parts of a mixture."""
    raw = points.log_weight
    weights, khat = smoothed(raw)
    ess, kept = effective(weights), weights > -math.inf
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


def _defensive(job: _Job, points: Points | None) -> Outcome:
    """Weigh by a mixture of the flow and a Student law fitted to other draws of it."""
    assert points is not None
    model, latent = job.model, job.latent
    others = latent.forward_without_density(latent.flow.start(max(200, min(4 * model.dim, 4000)), job.generator))
    student = Student.fit(others[others.isfinite().all(1)])
    heavy = max(2, round(_DEFENSIVE * len(points.x0)))
    light = len(points.x0) - heavy
    share = math.log(light / (light + heavy)), math.log(heavy / (light + heavy))
    extra = latent.inverse(student.sample(heavy, job.generator).to(points.theta))

    def mixture(points: Points) -> Points:
        log_q = torch.where(points.log_q.isnan(), -math.inf, points.log_q)
        return points._replace(log_q=torch.logaddexp(share[0] + log_q, share[1] + student.log_prob(points.theta)))

    both = Points(*(torch.cat(pair) for pair in zip(points.at(torch.arange(light)), extra, strict=True)))
    return _weighted(job, mixture(both), [light, heavy])._replace(q=mixture)


def _resample(job: _Job, points: Points | None) -> Outcome:
    """Resample by smoothed weights, systematically."""
    assert points is not None
    outcome = _importance(job, points)
    weights, _ = smoothed(points.log_weight)
    drawn = points.at(systematic(weights.unsqueeze(0), job.generator)[0])
    return outcome._replace(
        theta=drawn.theta.unsqueeze(0),
        log_joint=drawn.log_joint.unsqueeze(0),
        log_ratio=drawn.log_weight.unsqueeze(0),
        log_weights=None,
    )


# ---------------------------------------------------------------- moves


def _refine(job: _Job, points: Points | None) -> Outcome:
    """Refine every draw twice, and see whether the second time still changes something."""
    known = 0 if points is None else len(points.x0)
    rest = [job.latent.forward_without_density(rows) for rows in job.x0[known:].split(_CHUNK) if len(rows)]
    theta = torch.cat(([] if points is None else [points.theta]) + rest)
    usable = theta.isfinite().all(1)
    if not bool(usable.all()):
        job.findings.mild.append(f"{int((~usable).sum())} of {len(theta)} draws were not finite and were left out")
    first = refine(job.model, theta[usable], _REFINED, seed=job.generator, progress=job.progress)
    second = first
    if not first.info["interrupted"]:
        second = refine(job.model, first.flat, _REFINED, seed=job.generator, progress=job.progress)
        drift = float((second.log_joint.mean() - first.log_joint.mean()).abs() / second.log_joint.std())
        job.findings.moving(drift, 3 * math.sqrt(2 / first.n_draws))
    steps = first.info["steps"] + (second.info["steps"] if second is not first else 0)
    if second.info["interrupted"]:
        job.findings.stopped(f"after {steps} of {2 * _REFINED} transitions: refine the draws again", severe=True)
    if left := second.info["strays"]:
        job.findings.mild.append(f"{left} of {second.n_draws} draws still lie far below all others: refine for longer")
    gradients = sum(run.info["gradients_per_draw"] for run in {id(r): r for r in (first, second)}.values())
    info = {
        "transitions": steps,
        "gradients_per_draw": gradients,
        "acceptance_rate": second.info["acceptance_rate"],
        "step_size": second.info["step_size"],
    }
    return Outcome(second.theta, second.log_joint, float(second.n_draws), info, evidence=_annealed(job, second))


def _annealed(job: _Job, draws: Draws) -> tuple[float, float] | None:
    """Return the evidence of refined draws, where it can be had at a price like theirs."""
    if job.findings.interrupted or job.model.temperature != 1 or job.model.dim > _WEIGHED or draws.n_draws < 10:
        return None
    try:
        return evidence(job.model, draws, seed=job.generator, progress=job.progress)
    except KeyboardInterrupt:
        job.findings.stopped("while the evidence was sought")
        return None


def _smc(job: _Job, points: Points | None) -> Outcome:
    """Temper from the flow to the posterior (Del Moral, Doucet and Jasra 2006), along N(x0; 0, I) w^b."""
    assert points is not None
    _require_weights(points)
    n, flow_weights = len(points.x0), points.log_weight
    equal = torch.full((1, n), -math.log(n), dtype=torch.float64, device=points.x0.device)
    fraction, value, merged = (torch.zeros(1, dtype=torch.float64, device=points.x0.device) for _ in range(3))
    root = torch.arange(n, device=points.x0.device).unsqueeze(0)
    width, stuck, moves, temperatures = 0.5, 0.0, 0, 0
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
                left = effective(weights[0]) / n
                if left <= _EQUAL:
                    points, width, made, kept = _spread(job, points, width, float(fraction), left)
                    moves, stuck = moves + made, max(stuck, kept)
                bar.update()
                bar.set_postfix(at=f"{float(fraction):.2e}", width=f"{width:.2f}")
        except KeyboardInterrupt:
            job.findings.stopped(f"at inverse temperature {float(fraction):.2g}: these are no draws yet", severe=True)
    families = n**2 / float(root[0].bincount().double().square().sum())
    job.findings.effective(families)
    if stuck > 0.9:
        job.findings.mild.append("latent moves hardly change the particles: the flow is far from the posterior")
    error = float(relative_variance(equal, root, merged).sqrt())
    info = {"temperatures": temperatures, "moves": moves, "width": width}
    return Outcome(
        points.theta.unsqueeze(0),
        points.log_joint.unsqueeze(0),
        families,
        info,
        forward=flow_weights,
        log_ratio=points.log_weight.unsqueeze(0),
        evidence=None if job.findings.interrupted else (float(value), error),
    )


def _spread(job: _Job, points: Points, width: float, power: float, left: float) -> tuple[Points, float, int, float]:
    """Move particles until they forget their weights, in up to 30 steps; return how much they still remember.

    Where weights left half of the particles effective it takes 8 steps or more: with fewer they trail behind the
    temperature, the evidence is too small and its error too. Where weights were nearly equal there is little to forget.
    """
    least = max(1, math.ceil(16 * (1 - max(left, 0.5))))
    start, kept, made = points.log_weight, 1.0, 0
    own = _gaussian(points.x0, len(points.x0))
    around = Gaussian(own.loc, math.sqrt(1 + 1 / points.x0.shape[1]) * own.scale_tril)  # a little wider than they are
    for made in range(1, 31):
        kernel = crank_nicolson(job.latent, width, power=power, around=around)
        points, move = kernel.step(points, job.generator)
        width = min(1.0, width * math.exp(float(move.acceptance_rate.mean()) - _LATENT))
        kept = _correlation(start, points.log_weight)
        if made >= least and kept < 0.3:
            break
    return points, width, made, kept


def _gaussian(x0: Tensor, n: float) -> Gaussian:
    """Return the Gaussian of latent points that amount to n, shrunk to the latent law as if dim more had that."""
    dim = x0.shape[1]
    covariance = (n * torch.cov(x0.T).reshape(dim, dim) + dim * torch.eye(dim).to(x0)) / (n + dim)
    return Gaussian(x0.mean(0), torch.linalg.cholesky(covariance))


def _nearest(points: Points, generator: torch.Generator) -> Gaussian:
    """Return the latent law or the Gaussian of draws as the posterior weighs them, whichever is nearer to that."""
    weights, _ = smoothed(points.log_weight)
    drawn = points.at(systematic(weights.unsqueeze(0), generator)[0])
    latent = Gaussian(torch.zeros_like(drawn.x0[0]), torch.ones_like(drawn.x0[0]).diag())
    height = drawn.log_weight + log_normal(drawn.x0)
    guesses = (latent, _gaussian(drawn.x0, effective(weights)))
    return min(guesses, key=lambda guess: float((height - guess.log_prob(drawn.x0)).var()))


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two series where both are finite; zero if one of them is constant but for rounding."""
    usable = a.isfinite() & b.isfinite()
    pair = torch.stack([a[usable], b[usable]])  # (2, usable)
    if pair.shape[1] < 3 or float(pair.std(1).min()) < 1e-9:
        return 0.0
    return float(torch.corrcoef(pair)[0, 1])


class _Sweep(NamedTuple):
    """What a person wants to know of a sweep of `mixed`; ``(chain,)`` each."""

    acceptance_rate: Tensor  # of the latent move
    fresh: Tensor  # whether its proposal was independent
    hmc_acceptance_rate: Tensor
    n_steps: Tensor


def mixed(
    latent: Latent,
    log_joint_and_grad: LogDensityAndGrad,
    width: float,
    fresh: float,
    step_size: float,
    n_leapfrog: int,
    inverse_mass_matrix: Tensor,
    halfway: Callable[[Points], None] = lambda points: None,
    trajectory_jitter: float = 0.5,
) -> Kernel:
    """Build the kernel that makes a latent move, then a Hamiltonian transition over weights.

    The first, `crank_nicolson`, can jump between modes; the second knows the gradient. Each leaves the posterior
    invariant. A transition to where the flow has no density is rejected.

    Args:
        latent: the posterior in latent space.
        log_joint_and_grad: the same over weights.
        width: of the latent move.
        fresh: share of independent proposals.
        step_size: see `hmc`.
        n_leapfrog: see `hmc`.
        inverse_mass_matrix: see `hmc`.
        halfway: is told where the chains are after the first move.
        trajectory_jitter: see `hmc`.
    """
    jump = crank_nicolson(latent, width, fresh=fresh)
    walk = hmc(log_joint_and_grad, step_size, n_leapfrog, inverse_mass_matrix, trajectory_jitter=trajectory_jitter)

    def step(points: Points, generator: torch.Generator) -> tuple[Points, _Sweep]:
        points, move = jump.step(points, generator)
        halfway(points)
        theta = points.theta.to(inverse_mass_matrix)
        state, info = walk.step(walk.init(theta, generator), generator)
        rows = (state.theta != theta).any(1).nonzero().squeeze(1)
        if len(rows):
            moved = latent.inverse(state.theta[rows].to(points.theta))
            found = ~moved.lost
            points = Points(
                *(old.index_put((rows[found],), new[found]) for old, new in zip(points, moved, strict=True))
            )
        return points, _Sweep(move.acceptance_rate, move.fresh, info.acceptance_rate, info.n_steps + 1)

    return Kernel(jump.init, step)


class _Chains:
    """How many chains run, and for how long: many short ones if they forget quickly, else few long ones.

    One evaluation of a flow of few weights costs hardly more for hundreds of points than for a few. So hundreds of
    chains begin; after a short warm-up the correlation of neighbouring draws tells how long a chain has to be for R-hat
    to see that it converged. If that is very long, the first few of them go on, after a longer warm-up.

    Args:
        job: what is wanted.
        most: bound on the number of chains that are few.

    Attributes:
        count: number of chains.
        many: whether these are very many.
        warm_up: moves that are thrown away.
        draws: of each chain.
    """

    def __init__(self, job: _Job, most: int) -> None:
        self._n, self._few = job.n, min(most, max(4, job.n // 50))
        self.count = max(self._few, min(_CROWD, job.n // _SHORTEST, job.latent.wide))
        self.many = self.count > self._few
        self.warm_up = _SETTLE if self.many else _WARM_UP
        self.draws = math.ceil(job.n / self.count)

    def settle(self, before: Tensor, after: Tensor, *rates: Tensor) -> None:
        """Look at many chains after their short warm-up.

        Args:
            before: where they were before the last move, ``(chain, dim)``.
            after: where they are.
            rates: of acceptance, ``(chain,)`` each.
        """
        memory = max(_memory(before, after), *(1 - float(rate.mean()) for rate in rates))
        if memory > _SLOWLY:
            self.count, self.many, self.warm_up = self._few, False, _WARM_UP
        else:  # R-hat exceeds 1 by about memory / (1 - memory) over half the draws of a chain
            longest = max(_SHORTEST, math.ceil(40 * memory / (1 - memory)))
            self.count = max(self._few, min(self.count, self._n // longest))
            self.warm_up += round(3 * memory / (1 - memory))
        self.draws = math.ceil(self._n / self.count)


def _memory(before: Tensor, after: Tensor) -> float:
    """Return the mean correlation of coordinates ``(chain, dim)`` before and after a move, of those that vary."""
    pair = torch.stack([before, after]).double()
    pair = pair - pair.mean(1, keepdim=True)
    size = pair.square().sum(1).sqrt().prod(0)
    return float(((pair[0] * pair[1]).sum(0) / size)[size > 0].mean().nan_to_num(1.0))


def _metropolis(job: _Job, points: Points | None) -> Outcome:
    """Run chains of `mixed` from resampled draws of the flow."""
    assert points is not None
    model, latent, generator = job.model, job.latent, job.generator
    target = torch.no_grad()(model.log_joint_and_grad)
    chains = _Chains(job, 64)
    state = points.at(_starts(points, chains.count, generator))
    variance = points.theta[points.theta.isfinite().all(1)].double().var(0)
    mass = positive(variance).to(model.device, model.dtype)
    width, step_size, history = 1.0 if chains.many else 0.5, 0.5 * model.dim**-0.25, []
    gradients = 0.0
    drawn: list[Points] = []
    halfway: list[Points] = []  # of one sweep
    infos: list[_Sweep] = []
    with progress_bar(chains.warm_up + chains.draws, "metropolis", job.progress, "sweep") as bar:
        try:
            while len(drawn) < chains.draws:
                before = state
                lengths = (_leapfrogs(step_size), 1.0) if chains.many else (_LONGEST, 0.5)  # of few, none is the best
                halfway.clear()
                kernel = mixed(latent, target, width, _FRESH, step_size, lengths[0], mass, halfway.append, lengths[1])
                state, info = kernel.step(before, generator)
                gradients += float(info.n_steps.sum())
                bar.update()
                if len(history) < chains.warm_up:
                    nearby = info.acceptance_rate[~info.fresh]
                    if len(nearby):
                        width = min(1.0, width * math.exp(0.5 * (float(nearby.mean()) - _LATENT)))
                    step_size *= math.exp(float(info.hmc_acceptance_rate.mean()) - _HAMILTONIAN)
                    history.append([width, step_size])
                    if chains.many and len(history) == _SETTLE:
                        chains.settle(before.theta, state.theta, info.acceptance_rate, info.hmc_acceptance_rate)
                        state = state.at(torch.arange(chains.count))
                    if len(history) == chains.warm_up:  # from here on what its second half used on average
                        width, step_size = torch.tensor(history[len(history) // 2 :]).log().mean(0).exp().tolist()
                else:
                    drawn += [*halfway, state] if chains.many else [state]
                    infos.append(info)
        except KeyboardInterrupt:
            if not drawn:
                raise
            job.findings.stopped(f"after {len(drawn)} of {chains.draws} draws of each chain")
    del drawn[chains.draws :]
    stats = {name: torch.stack([getattr(info, name) for info in infos], 1) for name in _Sweep._fields}
    rate, anew = stats["acceptance_rate"], stats.pop("fresh")
    info = {
        "width": width,
        "step_size": step_size,
        "independent_acceptance_rate": float(rate[anew].mean()) if bool(anew.any()) else 0.0,
        "crank_nicolson_acceptance_rate": float(rate[~anew].mean()) if bool((~anew).any()) else 0.0,
        "hmc_acceptance_rate": float(stats["hmc_acceptance_rate"].double().mean()),
        "gradients_per_chain": round(gradients / chains.count),
    }
    if chains.many:  # two draws a sweep
        stats = {name: values.repeat_interleave(2, 1)[:, : len(drawn)] for name, values in stats.items()}
    theta, log_joint, ratio = (
        torch.stack([getattr(each, name) for each in drawn], 1) for name in ("theta", "log_joint", "log_weight")
    )
    return _chained(job, points, theta, log_joint, ratio, info, stats, info["independent_acceptance_rate"])


def _leapfrogs(step_size: float) -> int:
    """Return how many steps a quarter turn takes."""
    return max(1, min(_LONGEST, round(_QUARTER / step_size)))


def _neutra(job: _Job, points: Points | None) -> Outcome:
    """Run HMC on the latent points of resampled draws of the flow."""
    assert points is not None
    generator, latent = job.generator, job.latent
    target = latent.log_density_and_grad
    chains = _Chains(job, 16)
    rows = _starts(points, chains.count, generator)
    around = _nearest(points, generator)
    trajectory, unit = rotation(target, around), torch.ones_like(around.loc)
    step_size, n_steps, history = _QUARTER, 1, []
    state = ChainState(points.x0[rows], *target(points.x0[rows]))
    states, infos, gradients = [], [], float(chains.count)
    with progress_bar(chains.warm_up + chains.draws, "neutra", job.progress, "transition") as bar:
        try:
            while len(states) < chains.draws:
                before = state
                jitter = 1.0 if chains.many else 0.75  # few chains vary how far they turn: so they change modes
                n_steps = _leapfrogs(jitter * step_size)
                kernel = metropolis(target, trajectory, step_size, n_steps, unit, trajectory_jitter=jitter)
                state, info = kernel.step(before, generator)
                gradients += float(info.n_steps.sum())
                bar.update()
                if len(history) < chains.warm_up:
                    step_size = min(_QUARTER, step_size * math.exp(float(info.acceptance_rate.mean()) - _HAMILTONIAN))
                    history.append(step_size)
                    if chains.many and len(history) == _SETTLE:
                        chains.settle(before.theta, state.theta, info.acceptance_rate)
                        state = ChainState(*(part[: chains.count] for part in state))
                    if len(history) == chains.warm_up:
                        step_size = float(torch.tensor(history[len(history) // 2 :]).log().mean().exp())
                else:
                    states.append(state)
                    infos.append(info)
        except KeyboardInterrupt:
            if not states:
                raise
            job.findings.stopped(f"after {len(states)} of {chains.draws} draws of each chain")
    x0 = torch.stack([state.theta for state in states], 1)  # (chain, draw, dim)
    theta = torch.cat([latent.forward_without_density(rows) for rows in x0.flatten(0, 1).split(latent.chunk)])
    log_joint = latent.log_joint(theta).unflatten(0, x0.shape[:2])
    ratio = torch.stack([state.log_joint for state in states], 1) - log_normal(x0)
    stats = {name: torch.stack([getattr(info, name) for info in infos], 1) for name in infos[0]._fields}
    info = {
        "step_size": step_size,
        "n_leapfrog": n_steps,
        "hmc_acceptance_rate": float(stats["acceptance_rate"].double().mean()),
        "gradients_per_chain": round(gradients / chains.count),
    }
    return _chained(job, points, theta.unflatten(0, x0.shape[:2]), log_joint, ratio, info, stats, 1.0)


def _starts(points: Points, chains: int, generator: torch.Generator) -> Tensor:
    """Return rows drawn by their smoothed weights, ``(chains,)``."""
    _require_weights(points)
    weights, _ = smoothed(points.log_weight)
    parents = systematic(weights.unsqueeze(0), generator)[0]
    return parents[torch.randint(len(parents), (chains,), generator=generator, device=parents.device)]


def _require_weights(points: Points) -> None:
    if not bool((points.log_weight > -math.inf).any()):
        raise FloatingPointError("no draw of the flow has a finite weight")


def _chained(
    job: _Job,
    points: Points,
    theta: Tensor,
    log_joint: Tensor,
    ratio: Tensor,
    info: dict[str, Any],
    stats: dict[str, Tensor],
    acceptance: float,
) -> Outcome:
    """Judge chains, and bridge from the flow's draws to theirs."""
    seen = _features(job.model, theta.flatten(0, 1)).unflatten(0, theta.shape[:2])
    r_hat, ess = mixing(torch.cat([log_joint.unsqueeze(-1), ratio.unsqueeze(-1), seen], -1))
    job.findings.chains(r_hat, ess, acceptance)
    own = HeldOut(theta.flatten(0, 1), (theta.shape[0], theta.shape[1]))
    evidence = bridge(points.log_weight, ratio.flatten(), own)
    return Outcome(
        theta,
        log_joint,
        ess,
        info | {"r_hat": r_hat},
        forward=points.log_weight,
        log_ratio=ratio,
        evidence=evidence,
        stats=stats,
    )


# ---------------------------------------------------------------- judgement


def _features(model: BayesianModel, theta: Tensor) -> Tensor:
    """Return what networks ``(n, dim)`` predict at some inputs, or their weights where these are as good."""
    features = functions(model)
    theta = theta.to(model.device, model.dtype)
    with torch.no_grad():
        return torch.cat([(features(rows) if features else rows).double() for rows in theta.split(_CHUNK)])


def _judge(
    job: _Job, chosen: CorrectionMethod, why: str, points: Points | None, outcome: Outcome, held: HeldOut | None
) -> dict[str, Any]:
    """Look for what speaks against the result; return the verdict with all that it rests on."""
    findings, latent = job.findings, job.latent
    info: dict[str, Any] = {"khat": None, "ess": outcome.ess, "evidences": {}, "interrupted": findings.interrupted}
    done, raw = f"{chosen}, {why}", 0.0
    solver = SolverError()
    if points is not None:
        weights, khat = smoothed(points.log_weight)
        raw = effective(weights) / len(weights)
        info |= {"khat": outcome.info.get("khat", khat), "lost": int(points.lost.sum()), "effective_share": raw}
        if chosen in ("refine", "smc", "metropolis", "neutra"):
            done += f" (weights of the flow's own draws: k-hat {khat:.2f}, {raw:.0%} effective)"
        solver = solver_error(latent, points)
        info |= {"solver_error": solver.rms, "solver_steps": latent.flow.solver.steps}
        if chosen != "refine":
            findings.solver(solver.rms)
        rows = _starts(points, _COPIES, job.generator)
        info["copies_gap"] = copies_gap(findings, latent, points.theta[rows], job.generator, held is not None)
        if latent.density.trace != "exact":
            findings.severe.append(
                f"densities are estimates ({latent.density.trace}), and weights made of them are biased"
            )
    if outcome.evidence is not None:
        value, error = outcome.evidence
        if chosen != "refine":  # whose evidence rests on no density of the flow
            outcome = outcome._replace(evidence=(value, math.hypot(error, solver.shift)))
        info["evidences"][chosen] = outcome.evidence
    if held is not None:
        features = functools.partial(_features, job.model)
        info["held_out"] = compare(findings, latent, chosen, points, outcome, held, features, solver)
        info["evidences"] |= info["held_out"].pop("evidences")
    elif points is not None:
        findings.mild.append("without held_out draws a mode that the flow has lost cannot be excluded")
    else:
        findings.severe.append("nothing was compared: without densities only held_out draws can tell; give some")
    exact = points is not None and latent.density.trace == "exact" and solver.rms <= verdicts.SOLVER.good
    info["verdict"] = findings.conclusion(done, exact and held is not None, raw)
    return info


_METHODS: dict[CorrectionMethod, Callable[[_Job, Points | None], Outcome]] = {
    "importance": _importance,
    "defensive": _defensive,
    "resample": _resample,
    "refine": _refine,
    "smc": _smc,
    "metropolis": _metropolis,
    "neutra": _neutra,
}


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

    Each transition leaves the posterior invariant at its step size; the law of the draws comes closer to it with every
    step, whatever it was. One step size serves all draws: a short pilot on some of them finds it, and it follows the
    mean acceptance rate afterwards. Where a draw starts, the posterior may be too steep for it: in the first half of
    the steps a draw that has not moved takes the next at a quarter of its reach, and doubles it when it moves. Draws
    that even so lie far below all others at the end (one in a thousand can spoil a mean or an evidence) go on likewise,
    alone, for 32 steps at most. The mass matrix is the draws' own variance. Costs at most ``steps * n_leapfrog + 1``
    gradients a draw, those of the last ones apart, and less than one more for the pilot on large sets.

    Args:
        model: the posterior.
        draws: ``(..., dim)``; they may be draws of another posterior, of fewer data, say.
        steps: transitions.
        n_leapfrog: the most leapfrog steps of one transition; their number is uniform between half of it and all.
        target_acceptance: mean acceptance rate to aim at.
        seed: an int or a generator.
        chunk_size: draws that move together, which bounds the memory.
        progress: show a bar at a terminal.

    Returns:
        The moved draws, ``(1, n, dim)``; they are independent if those given were. ``info["strays"]`` says how many of
        them still lie far below all others. After Ctrl-C as they were after the last whole transition, with
        ``info["interrupted"]`` set.

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
        mass = torch.ones_like(flat[0]) if scale is None else scale.square().expand_as(flat[0]).to(flat)

    def adapted(step_size: float, acceptance: Tensor) -> float:
        return step_size * math.exp(float(acceptance.mean()) - target_acceptance)

    step_size = 0.5 * model.dim**-0.25
    pilot_rows = flat[torch.randperm(len(flat), generator=generator, device=flat.device)[:64]]
    pilot_steps, pilot_leapfrog = 0, 4
    tried = torch.zeros(1)  # until a step is accepted at all, however small it has to be
    while pilot_steps < 12 or (pilot_steps < 100 and not float(tried.mean()) > 0.2):
        kernel = hmc(target, step_size, pilot_leapfrog, mass, trajectory_jitter=1.0)
        _, info = kernel.step(kernel.init(pilot_rows, generator), generator)
        tried, pilot_steps = info.acceptance_rate, pilot_steps + 1
        step_size = adapted(step_size, tried)

    gradients = 1 + pilot_steps * (pilot_leapfrog + 1) * len(pilot_rows) / len(flat)
    kernel = hmc(target, step_size, n_leapfrog, mass)
    states = [kernel.init(rows, generator) for rows in flat.split(chunk_size)]
    reach = torch.ones(len(flat), 1, dtype=flat.dtype, device=flat.device)  # of every draw, relative to step_size
    acceptance, done = torch.zeros(1), 0
    with progress_bar(steps, "refine", progress, "step") as bar:
        try:
            for step in range(steps):
                early, moved = step < steps // 2, []
                if not early:
                    reach = torch.ones_like(reach)
                for state, own in zip(states, reach.split(chunk_size), strict=True):
                    kernel = hmc(target, step_size, n_leapfrog, mass * own.square() if early else mass)
                    moved.append(kernel.step(state, generator))
                stayed = [(new.theta == old.theta).all(1) for (new, _), old in zip(moved, states, strict=True)]
                states = [state for state, _ in moved]
                acceptance = torch.cat([info.acceptance_rate for _, info in moved])
                counts = [float(info.n_steps[0]) * len(info.n_steps) for _, info in moved]
                gradients += sum(counts) / len(flat)
                whole = (reach == 1).squeeze(1)
                if bool(whole.any()):
                    step_size = adapted(step_size, acceptance[whole])
                reach = torch.where(torch.cat(stayed).unsqueeze(1), reach / 4, (2 * reach).clamp(max=1.0))
                done += 1
                bar.update()
        except KeyboardInterrupt:
            warn(f"interrupted: returning the draws after {done} of {steps} steps")
    moved_theta = torch.cat([state.theta for state in states])
    log_joint = torch.cat([state.log_joint for state in states])
    behind = strays(log_joint)
    interrupted = done < steps
    if not interrupted and bool(behind.any()):
        kernel_of = functools.partial(hmc, target, step_size, n_leapfrog)
        spent, interrupted = _bring_up(moved_theta, log_joint, kernel_of, mass, generator)
        gradients += spent / len(flat)
        behind = strays(log_joint)
    info = {
        "method": "refine",
        "settings": f"refine(steps={steps}, n_leapfrog={n_leapfrog}, target_acceptance={target_acceptance})",
        "seed": seed_in_words(seed),
        "steps": done,
        "interrupted": interrupted,
        "n_leapfrog": n_leapfrog,
        "step_size": step_size,
        "acceptance_rate": float(acceptance.mean()),
        "gradients_per_draw": gradients,
        "gradients": round(gradients * len(flat)),
        "strays": int(behind.sum()),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "model": model.fingerprint(),
    }
    return Draws(moved_theta.unsqueeze(0), log_joint.unsqueeze(0), info=info)


def _bring_up(
    theta: Tensor, log_joint: Tensor, kernel_of: Callable[[Tensor], Kernel], mass: Tensor, generator: torch.Generator
) -> tuple[float, bool]:
    """Move the strays among draws ``(n, dim)``, in place, until none is left or for so many steps.

    Returns:
        How many gradients it took, and whether Ctrl-C came before the end.
    """
    reach, spent = torch.ones_like(theta[:, :1]), 0.0
    try:
        for _ in range(_BEHIND):
            rows = strays(log_joint).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            kernel = kernel_of(mass * reach[rows].square())
            state, info = kernel.step(kernel.init(theta[rows], generator), generator)
            theta[rows], log_joint[rows] = state.theta, state.log_joint
            change = 2 * (info.acceptance_rate.to(theta.dtype) - _STEEP)
            reach[rows] = (reach[rows] * change.exp().unsqueeze(1)).clamp(max=1.0)
            spent += (float(info.n_steps[0]) + 1) * len(rows)
    except KeyboardInterrupt:
        warn("interrupted: some draws still lie far below all others")
        return spent, True
    return spent, False
