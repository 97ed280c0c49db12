"""Whether to trust draws: one table of thresholds, and findings that add up to a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = ["Bounds", "Findings", "Verdict"]

Verdict = Literal[
    "trust",  # nothing speaks against the draws
    "trust with care",  # reservations, each of which is said
    # held-out rows vouch for predictions; evidences and summaries of weights are another matter
    "trust predictions only",
    "trust after correction",  # the corrected draws; those that they were made of will not do
    "approximate: compare with an exact sampler",  # nothing in the draws themselves can tell
    "do not trust",  # something speaks against them
]


class Bounds(NamedTuple):
    """Up to ``good`` (or from it on, where more is better) all is well.

    Beyond ``bad`` the draws are not to be used.
    """

    good: float
    bad: float


# ---------------------------------------- the thresholds, all of them

P_VALUE = 0.01  # of a test, below which chance is no explanation
# What is worth a word once chance does not explain it; twice as much forbids the use. Shares of
# rows inside intervals, and right beyond what they say; means of transforms; nats.
CALIBRATION = {
    "inside 50%": 0.08,
    "inside 90%": 0.05,
    "inside 95%": 0.04,
    "mean PIT": 0.07,
    "KS distance": 0.12,
    "log probability": 0.15,
    "right beyond it": 0.05,
    "right beyond it, less sure": 0.1,
    "right beyond it, more sure": 0.05,
}
IMPOSSIBLE = (
    20.0  # nats below a constant's, of a row: under the prediction, e^-20 of them are
)
RIVAL = Bounds(0.02, 0.2)  # nats a row by which a trivial rival is better
# of nine predictions of ten, in their standard deviations: .25 cost .03 nats
MONTE_CARLO = Bounds(0.25, 0.7)
KHAT = (
    0.7  # of Pareto-smoothed weights, above which their means mislead (Vehtari et al. 2024)
)
LEFT_OUT_FAILS = 0.1  # of the rows: more k-hats above, and leave-one-out says nothing
# of a chain's mean from that of the others, in standard deviations, beyond chance
SHIFT = Bounds(0.15, 0.5)
# of a chain's mean log prior or log joint: directions that data do not determine mix slowly
SHIFT_OF_DENSITY = Bounds(0.2, 1.0)
SPREAD = Bounds(0.15, 0.4)  # of the configurational temperature from 1, beyond chance
# of what approximations predict, once exact transitions have moved them, in standard deviations,
# beyond chance: where place is off by .4, 90% intervals hold 87%
MOVED = Bounds(0.2, 0.4)
SLOPE = Bounds(0.2, 0.5)  # mean gradient in its own standard deviations, beyond chance
PRIOR_SCALE = Bounds(
    5.0, 20.0
)  # of targets, in standard deviations of the prior predictive
PRIOR_WIDE = 100.0  # times the spread of the targets that the prior predictive has
PRIOR_P_VALUE = 0.01  # of the data under a learned prior
UNLIKE = 3.0  # nats of evidence by which the plain prior is better than a learned one
PRIOR_CONFLICT = 8.0  # sds by which the log prior of draws is below that of the prior's own
COLUMN_SCALE = 20.0  # of an input, beside that of the others
COLUMN_SPREAD = 2.0  # of new rows about the centre of training, beside that of training
UNITS = 0.5  # share of hidden units that do not respond to the inputs
COPIED = (
    0.1  # share of draws that are copies of others, beyond which they are not to be used
)
TIES = 0.2  # share of continuous targets whose value comes again

R_HAT = Bounds(1.01, 1.05)  # of functions and weights (Vehtari et al. 2021)
R_HAT_OF_MANY = Bounds(1.05, 1.2)  # of hundreds of short chains, whose own means are noisy
ESS = Bounds(400, 100)  # effective draws
# share of transitions; beyond the second the posterior has regions that the chains cannot enter
DIVERGENCES = Bounds(0.001, 0.01)
E_BFMI = 0.3  # below: the momenta do not explore the energy (Betancourt 2016)
ACCEPTANCE = 0.2  # below: steps are too long for where the chains are
# of moves in the latent space of a flow, below which the flow hardly helps
LATENT_ACCEPTANCE = 0.01
TEMPERATURE = 0.2  # from 1: beyond this the law of the draws is visibly wrong
# times what was asked for: unadjusted steps are too long for what they met
ENERGY_VARIANCE = 5.0

# of the first particles, in the mean run: fewer left say nothing of what was lost on the way
ANCESTORS = Bounds(30, 3)
# of the particles: a temperature that leaves fewer was too far from the last
LEFT_EFFECTIVE = 0.1
EVIDENCE = 1.0  # nats of standard error beyond which an evidence compares little
# nats between two, beyond three standard errors; a lost tenth of the mass is 0.105
EVIDENCES = Bounds(0.03, 0.1)

# effective share of weights from which no mean of raw draws is off by more than a third of its sd
RAW = 0.9
SOLVER = Bounds(0.1, 1.0)  # nats by which log weights change with a finer solver
DISTANCE = 0.1  # between held-out and corrected draws, beyond chance
# of the mean log joint, in its own sds, in the second half of a refinement
DRIFT = Bounds(0.1, 0.5)
COPIES = 3.0  # nats by which symmetric copies of a flow's draws are less likely than these
# share of held-out draws whose log weights exceed by 2 nats those of 98% of the corrected draws
UNSEEN = 0.05
FEW_HELD_OUT = 50  # effective held-out draws that can say little


@dataclass
class Findings:
    """What speaks against draws, in two grades, and what speaks for them.

    Attributes:
        severe: reasons not to trust the draws, each with what to do.
        mild: reservations.
        good: what speaks for them.
    """

    severe: list[str] = field(default_factory=list)
    mild: list[str] = field(default_factory=list)
    good: list[str] = field(default_factory=list)

    def above(self, value: float, bounds: Bounds, text: str) -> None:
        """Note a text as mild or severe if a value exceeds the bounds; NaN does."""
        if not value <= bounds.bad:
            self.severe.append(text)
        elif not value <= bounds.good:
            self.mild.append(text)

    def below(self, value: float, bounds: Bounds, text: str) -> None:
        """Note a text as mild or severe if a value falls short of the bounds; NaN does."""
        if not value >= bounds.bad:
            self.severe.append(text)
        elif not value >= bounds.good:
            self.mild.append(text)

    @property
    def verdict(self) -> Verdict:
        """The verdict that the findings add up to."""
        if self.severe:
            return "do not trust"
        return "trust with care" if self.mild else "trust"

    @property
    def reasons(self) -> tuple[str, ...]:
        """What speaks against the draws, the gravest first."""
        return (*self.severe, *self.mild)
