"""Corrections of approximate draws towards the exact posterior, and what can be said of their
success.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, get_args

from torch import Tensor

from bnnflow import verdicts
from bnnflow.arguments import Count, checked
from bnnflow.draws import Draws
from bnnflow.importance import khat_limit, kish_ess, psis
from bnnflow.model import BayesianModel
from bnnflow.seeding import as_generator, seed_in_words
from bnnflow.stopwatch import Stopwatch
from bnnflow.transport.correction.chains import latent_metropolis, neutra
from bnnflow.transport.correction.importance import HeldOut
from bnnflow.transport.correction.job import WEIGHED, Job, features_of, starts, weigh
from bnnflow.transport.correction.latent import Latent, Points, SolverError, Transport
from bnnflow.transport.correction.refinement import refined
from bnnflow.transport.correction.tempering import tempered
from bnnflow.transport.correction.verdict import (
    Findings,
    Outcome,
    compare,
    equivalent_modes_gap,
    solver_error,
)
from bnnflow.transport.correction.weighting import defensive, importance, resample
from bnnflow.transport.options import Density
from bnnflow.types import CorrectionMethod, Seed

__all__ = ["Correction", "correct"]

_PILOT = 256  # draws that are weighed where the weights only diagnose
_HELD_OUT = 1000  # the most held-out draws whose density is asked for
_COPIES = 64  # draws whose symmetric copies are looked up
_TEMPERED = 50  # dimension up to which "auto" tempers in latent space
_NEUTRA = 50  # dimension up to which gradients through the flow are paid


class Correction(Draws):
    """Corrected draws; what `correct` returns, and `Draws` wherever these are accepted.

    Weighted draws have ``log_weights``, moved or resampled ones None; ``info`` holds all that was
    found. Beside the attributes of `Draws`:
    """

    @property
    def khat(self) -> float | None:
        """Pareto k-hat of the flow's weights (of the mixture's, for ``"defensive"``).

        None without densities.
        """
        return self.info["khat"]

    @property
    def ess(self) -> float:
        """Effective number of draws: of the weights, of the chains, or of the families of
        particles.
        """
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
            f"{name}: {type(flow).__name__} has no density over weights, so there is nothing to "
            "weigh its draws with; "
            "a flow on a manifold needs a radial part that completes the measure"
        )
    return flow


_METHODS: dict[CorrectionMethod, Callable[[Job, Points | None], Outcome]] = {
    "importance": importance,
    "defensive": defensive,
    "resample": resample,
    "refine": refined,
    "smc": tempered,
    "metropolis": latent_metropolis,
    "neutra": neutra,
}


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
    - ``"defensive"``: the same for a mixture of q and a tenth of a wide Student law (Hesterberg
      1995), against tails that the flow has too light.
    - ``"resample"``: draws of q, resampled by their smoothed weights (Rubin 1988); equal weights,
      repeated draws.
    - ``"refine"``: `refine` on every draw, without weights; the evidence by annealing some of them
      back to the prior (`bnnflow.evidence`), which needs no density of the flow, up to dim 2000.
    - ``"smc"``: particles tempered from q to the posterior along N(x0; 0, I) w^b in latent space,
      resampled and moved by preconditioned Crank-Nicolson steps around their mean; only resampled
      where weights were all but equal.
    - ``"metropolis"``: chains that mix independent proposals from q, latent Crank-Nicolson steps
      and Hamiltonian transitions over weights, each exact.
    - ``"neutra"``: HMC in latent space (Hoffman et al. 2019), through the flow's derivatives: for
      small dim. It turns exactly in the latent law, or in a Gaussian near the posterior, and is
      kicked by what else there is.
    - ``"auto"``: importance sampling if k-hat allows it; else, where dim is at most 50, SMC; else
      refinement, which costs no densities. Beyond dim 2000 an exact density is too expensive, and
      it refines at once.

    All need w but refinement, which uses it for the diagnosis alone. Densities are the solver's: of
    a `Flow` with fixed steps some draws tell whether RK4 with half of them or fewer will do, within
    a hundredth of a nat, and that is then taken (``info["solver_steps"]``). Else some are sent
    again with twice the steps. The verdict says if it matters, and errors of evidences include what
    it changes. Chains are hundreds of short ones where flows have few weights and chains forget
    quickly, and few long ones elsewhere.

    The evidence of weighted draws is the log of the mean raw weight, which is unbiased; its error
    is the delta method's. Held-out draws give a second, by the optimal bridge between them and the
    flow's; chains of ``"metropolis"`` and ``"neutra"`` take the bridge from the flow to themselves.

    Weights of a flow's own draws cannot tell of a mode that it has lost. Three things can: held-out
    draws, whose log weights must have the law that the corrected draws' have; the bridge, which
    sees all of their mass; and symmetric copies of the flow's own draws, which have the same
    posterior density. So the verdict is

    - ``"trust"`` if the flow's own draws will do: exact density, held-out draws that agree, and
      effective weights of nine draws in ten, so that no mean is off by more than a third of a
      standard deviation;
    - ``"trust after correction"`` if the corrected draws will do, without ``held_out`` as far as
      the flow can tell;
    - ``"do not trust"`` if something speaks against both.

    Args:
        model: the posterior.
        flow: a `Flow`, or whatever has its ``start``, ``solver``, ``forward``,
            ``forward_with_log_prob`` and ``inverse_with_log_prob``.
        n: number of draws, at least 50; chains round it up.
        method: see above.
        seed: an int or a generator.
        held_out: draws of chains that the flow did not see; at most 1000 of them are used.
        density: how the flow's densities are found; an estimated trace makes biased weights, and is
            refused for all but refinement.
        force: use an estimated density all the same (the result then says so), or ``"neutra"`` in
            any dimension.
        progress: show bars at a terminal.

    Returns:
        The draws, with ``khat``, ``ess``, ``log_evidence``, ``verdict`` and ``method``. Draws of
        weight zero and those without a finite density are left out and counted. After Ctrl-C what
        there is, with ``info["interrupted"]``.

    Raises:
        ValueError: if the flow has no density over weights, as a manifold flow without radii has
            none; if flow, model and held-out draws do not fit each other; for an estimated density
            without ``force``.
    """
    density = Density() if density is None else density
    _check(flow, model, n, method, density, force)
    generator = as_generator(seed, model.device)
    held = None if held_out is None else HeldOut.of(held_out, model, _HELD_OUT)
    watch = Stopwatch()
    latent = Latent(flow, model, density, generator, progress=progress)
    job = Job(latent, model, n, flow.start(n, generator), generator, progress, Findings())
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
        **watch.read(),
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
    """Return the gradients of the posterior that all draws took, beside those of the flow's
    densities.
    """
    chains, draws, _ = outcome.theta.shape
    info = outcome.info
    return round(
        info.get("gradients_per_draw", 0) * chains * draws
        + info.get("gradients_per_chain", 0) * chains
    )


def _check(
    flow: Transport,
    model: BayesianModel,
    n: int,
    method: str,
    density: Density,
    force: bool,
) -> None:
    """Refuse what cannot work."""
    if flow.dim != model.dim:
        raise ValueError(f"the flow has dim {flow.dim} and the model {model.dim}")
    if not isinstance(n, int) or n < 50:
        raise ValueError(f"n must be an integer of at least 50, got {n!r}")
    if method not in get_args(CorrectionMethod):
        raise ValueError(
            f"method must be one of {', '.join(get_args(CorrectionMethod))}, got {method!r}"
        )
    if density.trace != "exact" and method != "refine" and not force:
        raise ValueError(
            f"a density estimated by {density.trace!r} is unbiased only as a logarithm: weights "
            "made of it are biased. "
            "Use Density(trace='exact'), or method='refine', which needs no density; force=True "
            "insists"
        )
    if method == "neutra" and model.dim > _NEUTRA and not force:
        raise ValueError(
            f"neutra takes derivatives of the flow's density, and dim {model.dim} is above "
            f"{_NEUTRA}: use "
            "method='metropolis' or 'refine'; force=True insists"
        )


def _diagnose(
    job: Job, method: CorrectionMethod
) -> tuple[Points | None, CorrectionMethod, str]:
    """Weigh the flow's draws, as many as the method wants; return them, what to do and why."""
    dim = job.model.dim
    if method != "auto":
        few = {"refine": _PILOT, "metropolis": 2 * _PILOT, "neutra": 2 * _PILOT}
        if method == "refine" and (job.latent.density.trace != "exact" or dim > WEIGHED):
            return None, method, "as asked"
        return weigh(job, few.get(method, job.n)), method, "as asked"
    if dim > WEIGHED:
        return (
            None,
            "refine",
            f"chosen since an exact density in dim {dim} is too expensive",
        )
    points = weigh(job, _PILOT)
    weights, khat = psis(points.log_weight)
    if khat <= 1.0 and kish_ess(weights) >= 0.01 * len(weights):
        points = weigh(job, job.n, points)
        weights, khat = psis(points.log_weight)
        if khat <= khat_limit(len(weights)):
            return points, "importance", f"chosen for a k-hat of {khat:.2f}"
    found = f"k-hat is {khat:.2f}"
    if dim <= _TEMPERED:
        return (
            weigh(job, job.n, points),
            "smc",
            f"chosen since {found} and dim {dim} is small",
        )
    return points, "refine", f"chosen since {found} and tempering in dim {dim} is expensive"


def _judge(
    job: Job,
    chosen: CorrectionMethod,
    why: str,
    points: Points | None,
    outcome: Outcome,
    held: HeldOut | None,
) -> dict[str, Any]:
    """Look for what speaks against the result; return the verdict with all that it rests on."""
    findings, latent = job.findings, job.latent
    info: dict[str, Any] = {
        "khat": None,
        "ess": outcome.ess,
        "evidences": {},
        "interrupted": findings.interrupted,
    }
    done, raw = f"{chosen}, {why}", 0.0
    solver = SolverError()
    if points is not None:
        own, solver = _judge_densities(job, chosen, points, held is not None)
        khat, raw = own["khat"], own["effective_share"]
        info |= own | {"khat": outcome.info.get("khat", khat)}
        if chosen in ("refine", "smc", "metropolis", "neutra"):
            done += (
                f" (weights of the flow's own draws: k-hat {khat:.2f}, {raw:.0%} effective)"
            )
    if outcome.evidence is not None:
        value, error = outcome.evidence
        if chosen != "refine":  # whose evidence rests on no density of the flow
            outcome = outcome._replace(evidence=(value, math.hypot(error, solver.shift)))
        info["evidences"][chosen] = outcome.evidence
    if held is not None:
        features = functools.partial(features_of, job.model)
        info["held_out"] = compare(
            findings, latent, chosen, points, outcome, held, features, solver
        )
        info["evidences"] |= info["held_out"].pop("evidences")
    elif points is not None:
        findings.mild.append(
            "without held_out draws a mode that the flow has lost cannot be excluded"
        )
    else:
        findings.severe.append(
            "nothing was compared: without densities only held_out draws can tell; give some"
        )
    exact = (
        points is not None
        and latent.density.trace == "exact"
        and solver.rms <= verdicts.SOLVER.good
    )
    info["verdict"] = findings.conclusion(done, exact and held is not None, raw)
    return info


def _judge_densities(
    job: Job, chosen: CorrectionMethod, points: Points, has_held_out: bool
) -> tuple[dict[str, Any], SolverError]:
    """Look at the weights of the flow's own draws, and at the densities that they are made of."""
    findings, latent = job.findings, job.latent
    weights, khat = psis(points.log_weight)
    solver = solver_error(latent, points)
    if chosen != "refine":
        findings.solver(solver.rms)
    rows = starts(points, _COPIES, job.generator)
    gap = equivalent_modes_gap(
        findings, latent, points.theta[rows], job.generator, has_held_out
    )
    if latent.density.trace != "exact":
        findings.severe.append(
            f"densities are estimates ({latent.density.trace}), and weights made of them are biased"
        )
    info = {
        "khat": khat,
        "lost": int(points.lost.sum()),
        "effective_share": kish_ess(weights) / len(weights),
        "solver_error": solver.rms,
        "solver_steps": latent.flow.solver.steps,
        "equivalent_modes_gap": gap,
    }
    return info, solver
