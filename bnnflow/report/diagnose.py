"""Can these draws be trusted? Convergence judged where it matters: in the predictions, not in the
weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow import verdicts
from bnnflow.arguments import checked
from bnnflow.draws import Draws, as_theta, unresolved
from bnnflow.model import BayesianModel
from bnnflow.report.convergence import compare_chains, predicted_values
from bnnflow.verdicts import Bounds, Findings, Verdict

__all__ = ["Diagnosis", "diagnose"]

Kind = Literal["chains", "weighted", "independent"]

# What a reader of an approximation's draws should know of it.
HINTS = {
    "Laplace": "draws of a wide Gaussian predict poorly through the network itself: predict with "
    "model.linearised(draws.posterior.loc) too, which is often better",
    "MCDropout": "the rate sets the width of the predictions, whatever the data",
}


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What is known about the convergence of draws. Printing it shows the verdict.

    Attributes:
        verdict: the short answer.
        reasons: why, each with what to do about it.
        kind: Markov ``"chains"``, ``"weighted"`` draws, or ``"independent"`` draws of an
            approximation.
        method: name of the method, if known.
        chains: number of chains.
        draws: draws in all.
        rows: ``(rows,)``, numbers of the inputs at which functions were compared.
        r_hat: ``(rows, outputs)`` rank-normalised split R-hat of what the draws predict; None
            without chains.
        ess_bulk: ``(rows, outputs)`` bulk effective sample size, all chains together.
        ess_tail: ``(rows, outputs)`` tail effective sample size.
        ess_weights: effective sample size of the weights, if there are weights.
        divergences: number of divergent transitions, if recorded.
        acceptance: mean acceptance rate, if recorded.
        e_bfmi: smallest E-BFMI of a chain, if energies were recorded.
        temperature: mean configurational temperature, if recorded: 1 where the law of the draws is
            right.
        log_evidence: value and standard error, if the method estimates it.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    kind: Kind
    method: str
    chains: int
    draws: int
    rows: np.ndarray | None = None
    r_hat: np.ndarray | None = None
    ess_bulk: np.ndarray | None = None
    ess_tail: np.ndarray | None = None
    ess_weights: float | None = None
    divergences: int | None = None
    acceptance: float | None = None
    e_bfmi: float | None = None
    temperature: float | None = None
    log_evidence: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Lay the verdict out for a terminal."""
        lines = [f"{self.method or 'draws'}: {self.verdict}"]
        lines += [f"  {line}" for line in self._figures()]
        lines += [f"  - {reason}" for reason in self.reasons]
        return "\n".join(lines)

    __repr__ = __str__

    def _figures(self) -> list[str]:
        if self.kind == "independent":
            return [f"{self.draws:,} draws"]
        lines = [f"{self.chains} x {self.draws // self.chains:,} draws"]
        if self.rows is not None and self.r_hat is not None:
            lines[0] += f"; predictions at {len(self.rows)} inputs"
            worst, median = np.max(self.r_hat), np.median(self.r_hat)
            lines.append(
                f"R-hat     worst {worst:8.3f}   median {median:8.3f}   (want <= "
                f"{verdicts.R_HAT.good})"
            )
        for name, values in (("bulk ESS", self.ess_bulk), ("tail ESS", self.ess_tail)):
            if values is not None:
                worst, median = np.min(values), np.median(values)
                lines.append(
                    f"{name}  worst {worst:8,.0f}   median {median:8,.0f}   (want >= "
                    f"{verdicts.ESS.good})"
                )
        if self.ess_weights is not None:
            lines.append(
                f"ESS of the weights {self.ess_weights:,.0f}   (want >= {verdicts.ESS.good})"
            )
        if self.log_evidence is not None:
            lines.append("log evidence {:.2f} ± {:.2f}".format(*self.log_evidence))
        counts = []
        if self.acceptance is not None:
            counts.append(f"acceptance {self.acceptance:.2f}")
        if self.divergences is not None:
            counts.append(f"divergences {self.divergences:,} of {self.draws:,}")
        if self.e_bfmi is not None:
            counts.append(f"E-BFMI {self.e_bfmi:.2f}")
        if self.temperature is not None:
            counts.append(f"configurational temperature {self.temperature:.2f} (want 1)")
        return lines + ([", ".join(counts)] if counts else [])


@checked
def diagnose(
    model: BayesianModel,
    draws: Draws | Tensor | tuple[Tensor, Tensor | None],
    x: Tensor | np.ndarray | None = None,
) -> Diagnosis:
    """Judge whether draws represent the posterior, as far as they themselves can tell.

    Draws with statistics of a sampler are Markov chains. For these, rank-normalised split R-hat and
    bulk and tail effective sample sizes (Vehtari et al. 2021) are computed of the predictions at up
    to 100 inputs, spread evenly: weights that differ by a symmetry of the network give the same
    predictions, so chains that never meet in weight space can still agree. Chains without an accept
    step (``info["exact"]`` is False) also have a bias that they cannot show, and get no better than
    "trust with care". Draws without statistics are independent draws of an approximation: there is
    nothing to compare, and the verdict says so. `weight_convergence` compares the weights
    themselves, modulo symmetry. Directions in weight space that the inputs do not determine move no
    prediction there: R-hat of the log prior speaks for them.

    Args:
        model: their model.
        draws: draws, weights ``(..., dim)``, or a pair of weights and log weights.
        x: inputs at which predictions are compared; the training inputs if None.

    Raises:
        ValueError: if the weights or x have the wrong shape.

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> from bnnflow.model import likelihoods
        >>> x = torch.linspace(-1, 1, 5)[:, None]
        >>> prior = torch.distributions.Normal(0.0, 1.0)
        >>> model = BayesianModel(net, prior, likelihoods.Gaussian(0.1), x, x)
        >>> diagnose(model, model.sample_prior(100, seed=0)).verdict
        'approximate: compare with an exact sampler'
    """
    theta, log_weights = as_theta(draws)
    model.spec.check(theta, "draws")
    model.check_draws(draws)
    if len(theta) == 0:
        raise ValueError("there are no draws to judge")
    x = model.inputs(x)
    if log_weights is not None:
        return _weighted(draws, theta, log_weights, model.temperature)
    if isinstance(draws, Draws) and draws.stats:
        return _chains(draws, model, x)
    return _independent(draws, len(theta))


def _method(draws: object) -> str:
    return str(draws.info.get("method", "")) if isinstance(draws, Draws) else ""


def _independent(draws: object, n: int) -> Diagnosis:
    reasons = [
        "these are not Markov chains: there are no chains to compare, so R-hat and ESS say "
        "nothing, and the convergence of an approximation to the posterior cannot be certified "
        "from its own draws; compare its predictions with those of an exact sampler such as HMC"
    ]
    if _method(draws) == "DeepEnsemble":
        reasons.insert(
            0,
            f"{n} members are {n} fitted networks, not draws: they have no effective sample size",
        )
    elif n < verdicts.ESS.bad:
        reasons.append(f"{n} draws are few: averages over them are noisy; take a thousand")
    if _method(draws) in HINTS:
        reasons.append(HINTS[_method(draws)])
    chains = draws.n_chains if isinstance(draws, Draws) else 1
    verdict: Verdict = "approximate: compare with an exact sampler"
    info = draws.info if isinstance(draws, Draws) else {}
    if info.get("diverged"):
        verdict = "do not trust"
        reasons.insert(0, "training diverged: take a tenth of the learning rate")
    if info.get("converged") is False:
        verdict = "do not trust"
        what = "the point that was expanded about is no mode of the posterior"
        if _method(draws) in ("VI", "NormalizingFlowVI"):
            what = (
                "the fit has not settled: in many coordinates its place or width is still far from "
                "the best of its family; take more steps, or a learning rate and a scale of the "
                "size of the weights"
            )
        reasons.insert(0, what)
    return Diagnosis(verdict, tuple(reasons), "independent", _method(draws), chains, n)


def _too_close(theta: Tensor) -> list[str]:
    """Return what speaks against draws that their floating-point type cannot tell apart."""
    count, kind = int(unresolved(theta).sum()), str(theta.dtype).removeprefix("torch.")
    if count == 0:
        return []
    return [
        f"draws of {count} of {theta.shape[1]} weights are closer than {kind} tells apart, or "
        "never move: standardise "
        "the data, take a float64 network"
    ]


def _weighted(
    draws: object, theta: Tensor, log_weights: Tensor, temperature: float
) -> Diagnosis:
    log_weights = log_weights.double() - log_weights.double().logsumexp(0)
    ess = float((-(2 * log_weights).logsumexp(0)).exp())
    verdict: Verdict = "trust with care" if ess >= verdicts.ESS.good else "do not trust"
    chains, method = draws.n_chains if isinstance(draws, Draws) else 1, _method(draws)
    evidence = draws.log_evidence if isinstance(draws, Draws) else None
    more = "take more particles" if method == "SMC" else "draw more"
    reasons = [
        "weighted draws have no chains to compare; repeat with another seed to see how far "
        "the results move"
    ]
    if method == "SMC":
        reasons = [
            "particles become exact as their number grows, and nothing in them says how "
            "many that takes: repeat with twice as many and see how far predictions and evidence "
            "move"
        ]
    if evidence is not None and evidence[1] > verdicts.EVIDENCE:
        reasons.insert(
            0, f"the log evidence has a standard error of {evidence[1]:.1f}: {more}"
        )
    if not ess >= verdicts.ESS.good:
        reasons.insert(
            0,
            f"the weights leave {ess:.0f} effective draws of {len(log_weights):,}; {more}",
        )
    lost = _lost_on_the_way(draws.info if isinstance(draws, Draws) else {}) + _too_close(
        theta
    )
    if lost:
        verdict, reasons = "do not trust", lost + reasons
    if temperature != 1:
        reasons.append(f"this is the posterior tempered at T = {temperature:g}")
    return Diagnosis(
        verdict,
        tuple(reasons),
        "weighted",
        method,
        chains,
        len(log_weights),
        ess_weights=ess,
        log_evidence=evidence,
    )


def _lost_on_the_way(info: dict[str, Any]) -> list[str]:
    """Return what speaks against particles that were tempered; nothing for other weighted draws."""
    reasons = []
    if not info.get("least_effective_share", 1.0) >= verdicts.LEFT_EFFECTIVE:
        reasons.append(
            f"a temperature has left only {info['least_effective_share']:.1e} of the particles "
            "effective: the "
            "likelihood is too steep for their number or for the precision of its numbers; "
            "standardise, or take float64"
        )
    if not info.get("first_ancestors", math.inf) >= verdicts.ANCESTORS:
        reasons.append(
            f"all particles of a run descend from {info['first_ancestors']:.3g} of the first: what "
            "the others knew is "
            "lost, and the error of the evidence is not known; take more particles"
        )
    return reasons


def _chains(draws: Draws, model: BayesianModel, x: Tensor) -> Diagnosis:
    findings = Findings(severe=_too_close(draws.flat))
    rows = r_hat = bulk = tail = None
    if draws.n_draws < 4:
        findings.severe.append("fewer than 4 draws a chain: nothing can be said; draw more")
    else:
        rows, values = predicted_values(model, draws, x)
        r_hat, bulk, tail = compare_chains(values)
        if bool((values != values[:1, :1]).any()):
            _agreement(
                findings,
                r_hat,
                float(min(bulk.min(), tail.min())),
                _r_hat_of_prior(draws, model),
            )
        else:
            findings.severe.append("no chain ever moved: reduce the step size")
    if draws.n_chains == 1:
        findings.mild.append(
            "one chain cannot show what it has not found: run at least four"
        )
    found = _statistics(draws)
    _transitions(findings, draws, found)
    _bias(findings, draws, found)
    if draws.info.get("interrupted"):
        findings.mild.append("the run was interrupted")
    if model.temperature != 1:
        findings.mild.append(f"this is the posterior tempered at T = {model.temperature:g}")
    return Diagnosis(
        findings.verdict,
        findings.reasons
        or ("chains agree, and there are enough effective draws of every prediction",),
        "chains",
        _method(draws),
        draws.n_chains,
        draws.n_chains * draws.n_draws,
        rows,
        r_hat,
        bulk,
        tail,
        divergences=found.divergences,
        acceptance=found.acceptance,
        e_bfmi=found.e_bfmi,
        temperature=found.temperature,
    )


def _r_hat_of_prior(draws: Draws, model: BayesianModel) -> float:
    log_prior = model.log_prior(draws.flat).reshape(draws.n_chains, draws.n_draws, 1)
    return float(compare_chains(log_prior.double().cpu().numpy())[0].max())


def _agreement(findings: Findings, r_hat: np.ndarray, ess: float, of_prior: float) -> None:
    """Judge whether chains agree, about predictions and about the rest, and how many draws they are
    worth.
    """
    worst = float(r_hat.max())
    findings.above(
        worst,
        verdicts.R_HAT,
        f"chains disagree about predictions (R-hat up to {worst:.4g}): run a longer warm-up and "
        "more draws, or start "
        "from a trained network or an ensemble; weight_convergence shows in which layer they "
        "differ",
    )
    if not math.isnan(of_prior):  # it is where the log prior never changes
        findings.above(
            of_prior,
            verdicts.R_HAT_OF_PRIOR,
            "chains disagree about weights that these inputs say little of (R-hat of the log prior "
            f"{of_prior:.3g}), and may about predictions elsewhere: standardise the data, run a "
            "longer warm-up and "
            "more draws",
        )
    more = (
        f"about {math.ceil(verdicts.ESS.good / ess)} times as many draws"
        if ess > 0
        else "many more draws"
    )
    findings.below(
        ess,
        verdicts.ESS,
        f"only {ess:.0f} effective draws of the worst prediction: take {more}",
    )


class _Statistics(NamedTuple):
    """What the sampler recorded, in one number each; None where it did not."""

    divergences: int | None
    acceptance: float | None
    e_bfmi: float | None
    temperature: float | None
    energy_variance: float | None


def _statistics(draws: Draws) -> _Statistics:
    def mean(name: str) -> float | None:
        return float(draws.stats[name].double().mean()) if name in draws.stats else None

    diverging, energy = draws.stats.get("diverging"), draws.stats.get("energy")
    return _Statistics(
        None if diverging is None else int(diverging.sum()),
        mean("acceptance_rate"),
        None if energy is None or draws.n_draws < 4 else _e_bfmi(energy),
        mean("configurational_temperature"),
        mean("energy_variance"),
    )


def _transitions(findings: Findings, draws: Draws, found: _Statistics) -> None:
    """Judge how the chains moved."""
    total = draws.n_chains * draws.n_draws
    if found.divergences:
        findings.above(
            found.divergences / total,
            Bounds(0.0, verdicts.DIVERGENCES),
            f"{found.divergences:,} of {total:,} transitions diverged: raise the target acceptance "
            "or run a longer "
            "warm-up",
        )
    if found.e_bfmi is not None and not found.e_bfmi >= verdicts.E_BFMI:
        findings.mild.append(
            f"E-BFMI {found.e_bfmi:.2f} is below {verdicts.E_BFMI}: energies are explored slowly; "
            "take more draws"
        )
    if found.acceptance is not None and not found.acceptance >= verdicts.ACCEPTANCE:
        findings.mild.append(
            f"acceptance is {found.acceptance:.2f}: run a longer warm-up or start with a smaller "
            "step size"
        )


def _bias(findings: Findings, draws: Draws, found: _Statistics) -> None:
    """Judge the bias of chains without an accept step, which agreeing chains do not show."""
    if draws.info.get("exact") is False:
        findings.mild.append(
            "there is no accept step: draws have a bias of the step size that agreeing chains do "
            "not show; compare predictions with those of an exact sampler such as HMC, or of a "
            "smaller step"
        )
    errors, asked = found.energy_variance, draws.info.get("energy_variance")
    if (
        errors is not None
        and asked is not None
        and not errors <= verdicts.ENERGY_VARIANCE * asked
    ):
        findings.severe.append(
            f"energy errors have variance {errors:.2g} a dimension where {asked:.2g} was asked: "
            "predictions are "
            "biased; run a longer warm-up, or an exact sampler such as HMC"
        )
    if (
        found.temperature is not None
        and not abs(found.temperature - 1) <= verdicts.TEMPERATURE
    ):
        cold = found.temperature < 1
        what = "chains are still near where they began; run longer" if cold else _TOO_SPREAD
        findings.mild.append(
            f"configurational temperature is {found.temperature:.2f} and should be 1: {what}"
        )


_TOO_SPREAD = "draws are too spread; take a smaller step size or less noisy gradients"


def _e_bfmi(energy: Tensor) -> float:
    """Return the smallest ratio, over chains, of the energy's squared steps to its variance."""
    energy = energy.double()
    steps = energy.diff(dim=1).square().mean(1)
    ratio = steps / energy.var(1, correction=0)
    return float(torch.nan_to_num(ratio, nan=0.0).min())
