"""Can a corrected flow be trusted? What was found, as sentences, and the verdict that follows from
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnnflow import verdicts
from bnnflow.importance import Estimate, khat_limit
from bnnflow.transport.correction.importance import HeldOut, bridge, ks_distance
from bnnflow.transport.correction.latent import Latent, Points, SolverError
from bnnflow.warn import warn

__all__ = [
    "Findings",
    "Outcome",
    "SolverError",
    "compare",
    "equivalent_modes_gap",
    "solver_error",
]

_MARGIN, _QUANTILE = 2.0, 0.98
# root inverse sizes that Kolmogorov-Smirnov distances of one law exceed once in 20,000 times
_CHANCE = 2.3
_NATS = 0.1  # by which log weights may differ between draws of one law
_TWICE = 32  # draws that travel again, with a finer solver
_SOME = 256  # corrected draws that are looked up where their densities are not known yet


class Outcome(NamedTuple):
    """What every method of correction gives."""

    theta: Tensor  # (chain, draw, dim)
    log_joint: Tensor  # (chain, draw)
    ess: float
    info: dict[str, Any]
    forward: Tensor | None = None  # log weights of draws of q, (n,)
    # log p - log q at theta, (chain, draw); None where q was not evaluated
    log_ratio: Tensor | None = None
    log_weights: Tensor | None = None  # (chain, draw), normalised
    evidence: Estimate | None = None
    stats: dict[str, Tensor] = {}  # noqa: RUF012
    # puts the density q that was sampled into points
    q: Callable[[Points], Points] = lambda points: points


@dataclass
class Findings(verdicts.Findings):
    """What was found of a corrected flow.

    Attributes:
        interrupted: whether Ctrl-C cut the work short.
    """

    interrupted: bool = False

    def stopped(self, when: str, *, severe: bool = False) -> None:
        """Note an interrupt, and warn of it."""
        warn(f"interrupted {when}")
        self.interrupted = True
        (self.severe if severe else self.mild).append(f"interrupted {when}")

    def weights(self, khat: float, ess: float, n: int, lost: int) -> None:
        """Judge importance weights that the result rests on."""
        limit = khat_limit(n)
        if khat <= limit:
            self.good.append(
                f"k-hat {khat:.2f} is below {limit:.2f}, {ess:.0f} of {n:,} draws are effective"
            )
        else:
            self.severe.append(
                f"k-hat {khat:.2f} of {n:,} draws is above {limit:.2f}: a few weights decide "
                "everything; refine the "
                "draws (method='refine'), or train the flow for longer"
            )
        self.kish_ess(ess)
        if lost:
            self.mild.append(
                f"{lost:,} of {n:,} draws have no finite weight and were left out"
            )

    def kish_ess(self, ess: float) -> None:
        """Judge an effective number of draws."""
        self.below(ess, verdicts.ESS, f"only {ess:.0f} effective draws: take more")

    def chains(self, r_hat: float, ess: float, acceptance: float) -> None:
        """Judge Markov chains."""
        self.above(
            r_hat,
            verdicts.R_HAT_OF_MANY,
            f"chains disagree (R-hat {r_hat:.3f}): take more draws",
        )
        if r_hat <= verdicts.R_HAT_OF_MANY.good:
            self.good.append(f"R-hat is {r_hat:.3f}, {ess:.0f} draws are effective")
        self.kish_ess(ess)
        if acceptance < verdicts.LATENT_ACCEPTANCE:
            self.mild.append(
                f"only {acceptance:.1%} of the latent proposals are accepted: the flow hardly helps"
            )

    def solver(self, rms: float) -> None:
        """Judge what the solver's steps do to log weights."""
        self.above(
            rms,
            verdicts.SOLVER,
            f"log weights change by {rms:.2g} nats with a finer solver: their density is not "
            "exact; give the flow a "
            "solver of more steps",
        )

    def moving(self, drift: float, noise: float) -> None:
        """Judge draws by how far their mean log joint still moved in the second half of a
        refinement.
        """
        moved = f"the mean log joint still moved by {drift:.2f} standard deviations"
        self.above(drift - noise, verdicts.DRIFT, f"{moved}: refine for longer")

    def evidences(self, name: str, one: Estimate, bridge: Estimate) -> None:
        """Compare an evidence that sees what the flow sees with one that sees what the held-out
        draws see.
        """
        apart, error = bridge[0] - one[0], math.hypot(one[1], bridge[1])
        first, second = (f"{value:.3f} ± {error:.3f}" for value, error in (one, bridge))
        said = f"log evidence {first} by {name} and {second} by the bridge"
        if not abs(apart) > max(3 * error, verdicts.EVIDENCES.good):
            self.good.append(f"{said} agree")
        elif not abs(apart) > verdicts.EVIDENCES.bad:
            self.mild.append(f"{said} differ a little")
        elif apart > 0:
            self.severe.append(
                f"{said} differ: the flow has lost about {-math.expm1(-apart):.0%} of the "
                "posterior's mass (a mode, "
                "perhaps), which no correction from its own draws can find; train it on draws of "
                "all modes"
            )
        else:
            self.severe.append(
                f"{said} differ: the held-out draws have lost modes that the flow has, or are few"
            )

    def unseen(self, share: float) -> None:
        """Judge how many held-out draws are where corrected draws hardly ever are.

        Chains may stick to their modes.
        """
        if share > verdicts.UNSEEN:
            self.severe.append(
                f"{share:.0%} of the held-out draws are where corrected ones hardly ever are: the "
                "flow has lost a "
                "part of the posterior (a mode, perhaps); train it on draws of all modes, or, if "
                "it was trained on aligned draws, give held_out draws aligned alike"
            )

    def same_law(self, apart: float, ours: float, theirs: float) -> None:
        """Judge the distance of the laws of corrected and held-out draws, each of so many effective
        draws.
        """
        chance = _CHANCE * math.sqrt(1 / ours + 1 / theirs)
        if theirs < verdicts.FEW_HELD_OUT:
            self.mild.append(
                f"the held-out draws amount to only {theirs:.0f} independent ones, "
                "which can say little"
            )
        if not apart > chance:
            self.good.append(
                "held-out and corrected draws have one law, as far as they tell"
            )
            return
        found = f"distance {apart:.2f}, {chance:.2f} by chance"
        text = f"held-out and corrected draws differ in law ({found})"
        (self.severe if apart - chance > verdicts.DISTANCE else self.mild).append(text)

    def equivalent_modes(self, gap: float, error: float, held_out: bool) -> None:
        """Judge a flow by the density that it gives to symmetric copies of its own draws."""
        if gap > max(verdicts.COPIES, 4 * error):
            text = (
                f"the flow gives symmetric copies of its own draws a density e^-{gap:.1f} of "
                "theirs: it has lost modes"
            )
            if held_out:
                self.mild.append(
                    f"{text}, and an evidence is that of the copies that it has"
                )
            else:
                self.severe.append(
                    f"{text}; if it was trained on aligned draws on purpose, give held_out draws "
                    "aligned alike"
                )

    def conclusion(self, done: str, certain: bool, raw: float) -> str:
        """Return the verdict in words: what to do, and why.

        Args:
            done: what the correction did and why.
            certain: whether the flow's density is exact and held-out draws were compared.
            raw: effective share of the flow's own draws.
        """
        if self.severe:
            return f"{self.verdict}: {done}; " + "; ".join(self.reasons)
        said = "; ".join([done, *self.good, *self.mild])
        if certain and raw >= verdicts.RAW and not self.mild:
            return f"trust: the flow's own draws need no correction; {said}"
        return f"trust after correction: use these draws, not the flow's own; {said}"


def solver_error(latent: Latent, points: Points) -> SolverError:
    """Return what a finer solver changes.

    Some draws are sent again by one if that is not known yet.
    """
    if latent.error is not None:
        return latent.error
    rows = (~points.lost).nonzero().squeeze(1)[:_TWICE]
    again = latent.forward(points.x0[rows], latent.flow.solver.finer())
    return SolverError.of(points.log_weight[rows], again.log_weight)


def equivalent_modes_gap(
    findings: Findings,
    latent: Latent,
    theta: Tensor,
    generator: torch.Generator,
    held_out: bool,
) -> float | None:
    """Return by how many nats a flow prefers draws ``(n, dim)`` to symmetric copies.

    None without known symmetries.
    """
    spec = latent.model.spec
    if spec.unknown and not held_out:
        findings.mild.append(
            f"the symmetries of the network are not known ({spec.unknown}): whether the flow has "
            "lost symmetric copies "
            "of its draws was not looked at; give held_out draws"
        )
    group = latent.model.symmetries()
    if not (group.permutation or group.sign):
        return None
    (copies,) = spec.transform(group, generator, theta)
    ours, theirs = latent.inverse(theta).log_q, latent.inverse(copies).log_q
    gaps = (ours - theirs.nan_to_num(nan=-math.inf)).clamp(max=1e3)
    gaps = gaps[gaps.isfinite()]
    gap = float(gaps.mean())
    findings.equivalent_modes(gap, float(gaps.std()) / math.sqrt(len(gaps)), held_out)
    return gap


def compare(
    findings: Findings,
    latent: Latent,
    name: str,
    points: Points | None,
    outcome: Outcome,
    held: HeldOut,
    features: Callable[[Tensor], Tensor],
    solver: SolverError,
) -> dict[str, Any]:
    """Compare corrected draws with held-out ones: their laws, their log weights, and two evidences.

    Args:
        findings: where to note what it means.
        latent: flow and posterior.
        name: of the method.
        points: draws of the flow; None where there are no densities.
        outcome: the corrected draws.
        held: the held-out draws.
        features: ``(n, dim) -> (n, features)``, what the laws are compared in beside log joint and
            log weight.
        solver: what the solver's steps change; its shift counts as an error of each evidence.
    """
    theta, log_joint = outcome.theta.flatten(0, 1), outcome.log_joint.flatten()
    ratio = None if outcome.log_ratio is None else outcome.log_ratio.flatten()
    if ratio is None:
        rows = (
            torch.linspace(0, len(theta) - 1, min(len(theta), _SOME))
            .long()
            .to(theta.device)
        )
        theta, log_joint = theta[rows], log_joint[rows]
    held_joint = latent.log_joint(held.theta)
    weights = torch.full(
        (len(theta),), -math.log(len(theta)), dtype=torch.float64, device=theta.device
    )
    if outcome.log_weights is not None:
        weights = outcome.log_weights.flatten()
    ours, theirs = (
        [features(theta), log_joint.unsqueeze(1)],
        [features(held.theta), held_joint.unsqueeze(1)],
    )
    count, found = held.ess(held_joint), {"draws": len(held.theta), "evidences": {}}
    if points is not None:
        ratio = (
            latent.inverse(theta.to(points.theta)).log_weight if ratio is None else ratio
        )
        pulled = outcome.q(latent.inverse(held.theta.to(points.theta)))
        reverse = torch.where(pulled.lost, math.inf, pulled.log_joint - pulled.log_q)
        most = _quantile(ratio, weights, _QUANTILE) + _MARGIN
        findings.unseen(float(held.weights.exp()[reverse > most].sum()))
        count = min(count, held.ess(reverse.clamp(max=most)))
        ours, theirs = [*ours, ratio.unsqueeze(1)], [*theirs, reverse.unsqueeze(1)]
        found |= _scores(findings, name, points, outcome, held, reverse, solver.shift)
    a, b = torch.cat(ours, 1), torch.cat(theirs, 1)
    tolerance = torch.zeros(a.shape[1]).to(b)
    if points is not None:
        # of log weights, which were found on the way there and on the way back
        tolerance[-1] = _NATS + 3 * solver.rms
    apart = ks_distance(a, weights, b, held.weights, tolerance)
    findings.same_law(apart, min(outcome.ess, len(theta)), count)
    return found | {"effective": count, "distance": apart}


def _scores(
    findings: Findings,
    name: str,
    points: Points,
    outcome: Outcome,
    held: HeldOut,
    reverse: Tensor,
    shift: float,
) -> dict[str, Any]:
    """Score q by held-out draws, whose log weights are ``reverse``, and estimate the evidence with
    them.
    """
    forward = points.log_weight if outcome.forward is None else outcome.forward
    both = bridge(forward, reverse, held)
    evidences: dict[str, Estimate] = {}
    if both is not None:
        both = evidences["bridge"] = both[0], math.hypot(both[1], shift)
    if both is not None and outcome.evidence is not None:
        findings.evidences(name, outcome.evidence, both)
    elif both is None and outcome.log_weights is not None:
        findings.severe.append(
            "the flow's draws and the held-out ones hardly overlap: no evidence rests on both"
        )
    # With weights w scaled to mean 1 over q, 1 / E_p[w] is the effective share of q's draws as the
    # posterior sees it.
    share = held.weights + reverse
    forward_ess = float((-share.logsumexp(0) - (held.weights - reverse).logsumexp(0)).exp())
    return {
        "log_ratio": float((held.weights.exp() * reverse).sum()),
        "log_ratio_sd": float(_weighted_sd(reverse, held.weights.exp())),
        "forward_ess": forward_ess,
        "evidences": evidences,
    }


def _quantile(values: Tensor, log_weights: Tensor, level: float) -> float:
    values, order = values.sort()
    below = log_weights.exp()[order].cumsum(0)
    return float(values[int((below < level * below[-1]).sum())])


def _weighted_sd(values: Tensor, weights: Tensor) -> Tensor:
    mean = (weights * values).sum()
    return (weights * (values - mean).square()).sum().sqrt()
