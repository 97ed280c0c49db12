"""Three questions about draws, their answers, and the headline that they add up to."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from bnnflow import verdicts
from bnnflow.verdicts import Verdict

__all__ = ["Answer", "Diagnosis", "Finding", "Grade", "Kind"]

Grade = Literal["yes", "with care", "no", "not looked at"]
Kind = Literal["chains", "weighted", "independent"]


class Finding(NamedTuple):
    """One thing that was seen, what it makes of the answer, and what to do about it."""

    grade: Grade
    why: str
    next: str

    def __str__(self) -> str:
        return f"{self.why}: {self.next}" if self.next else self.why


@dataclass(frozen=True)
class Answer:
    """What is known of one question.

    Attributes:
        question: in words.
        grade: the answer in short.
        why: the gravest finding, or what speaks for a yes.
        next: what to do next; empty where there is nothing to do.
        findings: everything that speaks against a yes, the gravest first.
        figures: the numbers behind it, by name.
    """

    question: str
    grade: Grade
    why: str
    next: str
    findings: tuple[Finding, ...]
    figures: dict[str, Any]

    @classmethod
    def of(
        cls,
        question: str,
        findings: Sequence[Finding],
        good: str,
        figures: dict[str, Any],
    ) -> Answer:
        """Add findings up; ``good`` says why where there are none."""
        graded = sorted(findings, key=_gravity)
        if not graded:
            return cls(question, "yes", good, "", (), figures)
        first = graded[0]
        return cls(question, first.grade, first.why, first.next, tuple(graded), figures)

    def __str__(self) -> str:
        text = f"{self.question} {self.grade}: {self.why}"
        return f"{text}. Next: {self.next}" if self.next else text

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as plain values, for JSON."""
        return {
            "question": self.question,
            "answer": self.grade,
            "why": self.why,
            "next": self.next,
            "findings": [each._asdict() for each in self.findings],
            "figures": _plain(self.figures),
        }


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What is known of draws, in three answers and a headline. Printing it shows them.

    Attributes:
        predictions: may the predictions be used?
        model: does the model fit the data?
        draws: are these draws of the posterior, and how many are they worth?
        looked_at: where the predictions were looked at: ``"held-out rows"``,
            ``"leave-one-out"`` or ``""`` for nowhere.
        kind: Markov ``"chains"``, ``"weighted"`` draws, or ``"independent"`` draws of an
            approximation.
        method: name of the method, if known.
        n_chains: number of chains.
        n_draws: draws in all.
        rows: ``(rows,)``, numbers of the inputs at which functions were compared.
        r_hat: ``(rows, outputs)`` rank-normalised split R-hat of what the draws predict; None
            without chains.
        ess_bulk: ``(rows, outputs)`` bulk effective sample size, all chains together.
        ess_tail: ``(rows, outputs)`` tail effective sample size.
        ess_weights: effective sample size of the weights, if there are weights.
        divergences: number of divergent transitions, if recorded.
        acceptance: mean acceptance rate, if recorded.
        e_bfmi: smallest E-BFMI of a chain, if energies were recorded.
        temperature: mean configurational temperature, recorded or computed: 1 where the spread of
            the draws is right.
        log_evidence: value and standard error, if the method estimates it.
    """

    predictions: Answer
    model: Answer
    draws: Answer
    looked_at: str
    kind: Kind
    method: str
    n_chains: int
    n_draws: int
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

    @property
    def answers(self) -> tuple[Answer, Answer, Answer]:
        """The three answers in the order in which they are told."""
        return self.predictions, self.model, self.draws

    @property
    def verdict(self) -> Verdict:
        """The three answers in one word or two."""
        use, fits, drawn = (answer.grade for answer in self.answers)
        if use == "no" or fits == "no":
            return "do not trust"
        # Held-out rows vouch for the predictions, whatever the draws are worth otherwise.
        seen = self.looked_at == "held-out rows" and use != "not looked at"
        if drawn == "no":
            return "trust predictions only" if seen else "do not trust"
        if self.kind == "independent":
            if seen:
                return "trust predictions only"
            return "approximate: compare with an exact sampler"
        return "trust" if {use, fits, drawn} == {"yes"} else "trust with care"

    @property
    def headline(self) -> str:
        """What a user should do, in a sentence or two."""
        start = {
            "trust": "Use the predictions and the draws",
            "trust with care": "Use the predictions with care",
            "trust predictions only": "Use the predictions, not the draws themselves (no "
            "evidence, no summaries of weights)",
            "do not trust": "Do not use the predictions",
        }.get(
            self.verdict,
            "These draws are of an approximation that nothing here vouches for",
        )
        grave = self._gravest()
        text = f"{start}: {grave.why}."
        return f"{text} Next: {grave.next}." if grave.next else text

    def _gravest(self) -> Answer:
        """Return the answer that decides the headline."""
        if self.verdict == "trust predictions only":
            return self.predictions
        if self.verdict.startswith("approximate"):
            return self.draws
        return min(self.answers, key=_gravity)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Everything that speaks against a yes, of all three answers, the gravest first."""
        every = [each for answer in self.answers for each in answer.findings]
        return tuple(map(str, sorted(every, key=_gravity)))

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain values, for JSON."""
        kept = ("looked_at", "kind", "method", "n_chains", "n_draws", "ess_weights")
        kept += ("divergences", "acceptance", "e_bfmi", "temperature", "log_evidence")
        worst = {
            "r_hat": None if self.r_hat is None else self.r_hat.max(),
            "ess_bulk": None if self.ess_bulk is None else self.ess_bulk.min(),
            "ess_tail": None if self.ess_tail is None else self.ess_tail.min(),
        }
        return {
            "verdict": self.verdict,
            "headline": self.headline,
            "predictions": self.predictions.to_dict(),
            "model": self.model.to_dict(),
            "draws": self.draws.to_dict(),
            "reasons": list(self.reasons),
        } | _plain({name: getattr(self, name) for name in kept} | worst)

    def __str__(self) -> str:
        """Lay the answers out for a terminal."""
        lines = [f"{self.method or 'draws'}: {self.verdict}", self.headline]
        for answer in self.answers:
            lines.append(f"{answer.question} {answer.grade}")
            lines += [f"  - {each}" for each in answer.findings or (answer.why,)]
        return "\n".join([*lines, *(f"  {line}" for line in self._figures())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the answers in a notebook."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(answer.question)}</th>"
            f"<td>{answer.grade}</td><td style='text-align:left'>"
            + "<br>".join(
                html.escape(str(each)) for each in answer.findings or (answer.why,)
            )
            + "</td></tr>"
            for answer in self.answers
        )
        method = html.escape(self.method or "draws")
        return (
            f"<p><strong>{method}: {self.verdict}.</strong> {html.escape(self.headline)}</p>"
            f"<table>{rows}</table>"
        )

    def _figures(self) -> list[str]:
        if self.kind == "independent":
            lines = [f"{self.n_draws:,} draws"]
        else:
            lines = [f"{self.n_chains} x {self.n_draws // self.n_chains:,} draws"]
        if self.rows is not None and self.r_hat is not None:
            lines[0] += f"; predictions at {len(self.rows)} inputs"
            worst, median = np.max(self.r_hat), np.median(self.r_hat)
            lines.append(f"R-hat     worst {worst:8.3f}   median {median:8.3f}")
        for name, values in (("bulk ESS", self.ess_bulk), ("tail ESS", self.ess_tail)):
            if values is not None:
                worst, median = np.min(values), np.median(values)
                lines.append(f"{name}  worst {worst:8,.0f}   median {median:8,.0f}")
        if self.ess_weights is not None:
            lines.append(
                f"ESS of the weights {self.ess_weights:,.0f}   (want >= {verdicts.ESS.good})"
            )
        if self.log_evidence is not None:
            value, error = self.log_evidence
            known = f" ± {error:.2f}" if math.isfinite(error) else ", of unknown error"
            lines.append(f"log evidence {value:.2f}{known}")
        counts = []
        if self.acceptance is not None:
            counts.append(f"acceptance {self.acceptance:.2f}")
        if self.divergences is not None:
            counts.append(f"divergences {self.divergences:,} of {self.n_draws:,}")
        if self.e_bfmi is not None:
            counts.append(f"E-BFMI {self.e_bfmi:.2f}")
        if self.temperature is not None:
            counts.append(f"configurational temperature {self.temperature:.2f} (want 1)")
        return lines + ([", ".join(counts)] if counts else [])


def _gravity(graded: Finding | Answer) -> int:
    """Return the place of a grade, the gravest first."""
    return ("no", "not looked at", "with care", "yes").index(graded.grade)


def _plain(value: Any) -> Any:
    """Return numbers, lists and mappings that JSON can hold; None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
