"""Have the chains met? R-hat and effective sample sizes of weights, of weights modulo symmetry, and
of functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow import diagnostics
from bnnflow.arguments import Count, checked
from bnnflow.draws import Draws, evenly
from bnnflow.model import BayesianModel
from bnnflow.predictive import Prediction, predict
from bnnflow.symmetry import match, sort_units
from bnnflow.symmetry.canonical import normalise_scale
from bnnflow.verdicts import R_HAT

__all__ = [
    "Agreement",
    "WeightConvergence",
    "agreement",
    "compare_chains",
    "nested_r_hat",
    "predicted_values",
    "weight_convergence",
]

MAX_ROWS = 100  # inputs at which functions are compared
MAX_ENTRIES = 1000  # of a tensor that are compared


class Agreement(NamedTuple):
    """How well chains agree about quantities, and how many draws they are worth.

    Attributes:
        r_hat: rank-normalised split R-hat of each quantity.
        nested_r_hat: rank-normalised nested R-hat.
        ess_bulk: bulk effective sample size, all chains together.
        ess_tail: tail effective sample size.
    """

    r_hat: np.ndarray
    nested_r_hat: np.ndarray
    ess_bulk: np.ndarray
    ess_tail: np.ndarray

    @property
    def worst(self) -> tuple[float, float, float, float]:
        """The largest R-hat, the largest nested R-hat and the smallest effective sample sizes."""
        worst_first = (
            self.r_hat.max(),
            self.nested_r_hat.max(),
            self.ess_bulk.min(),
            self.ess_tail.min(),
        )
        r_hat, nested, bulk, tail = map(float, worst_first)
        return r_hat, nested, bulk, tail


@dataclass(frozen=True, eq=False, repr=False)
class WeightConvergence:
    """Whether chains agree about weights, about weights modulo symmetry, and about functions.

    Printing shows a table.

    Attributes:
        raw: of the weights as they are, by tensor.
        aligned: of the weights modulo all symmetries of the function, by tensor; of the weights as
            they are, where the symmetries are not known.
        functions: of what the draws predict, ``(rows, outputs)``.
        chains: number of chains.
        draws: draws of each.
        superchains: groups of chains that the nested R-hat compares.
        unknown: why the symmetries of the network are not known; empty where they are.
    """

    raw: dict[str, Agreement]
    aligned: dict[str, Agreement]
    functions: Agreement
    chains: int
    draws: int
    superchains: int
    unknown: str = ""

    @property
    def worst_layer(self) -> str:
        """The tensor whose aligned R-hat is largest."""
        return max(self.aligned, key=lambda name: self.aligned[name].worst[0])

    @property
    def conclusion(self) -> str:
        """What the three comparisons together say."""
        raw, aligned = (
            max(each.worst[0] for each in by.values()) for by in (self.raw, self.aligned)
        )
        functions = self.functions.worst[0]
        if functions > R_HAT.bad:
            return (
                "chains disagree about predictions: they are in different modes of the function, "
                "or have not run long enough; no symmetry explains it"
            )
        if aligned > R_HAT.bad and self.unknown:
            return (
                f"chains agree about predictions but not about weights ({self.worst_layer}); "
                "whether a symmetry explains it is not known, since the symmetries of this "
                f"network are not: {self.unknown}"
            )
        if aligned > R_HAT.bad:
            return (
                "chains agree about predictions but not about weights, not even modulo symmetry "
                f"({self.worst_layer}): "
                "different weights make the same function"
            )
        if raw > R_HAT.bad:
            return "chains are in equivalent modes: they agree once the weights are aligned"
        return "chains agree about the weights themselves"

    def __str__(self) -> str:
        """Lay the table out for a terminal."""
        width = max(len("predictions"), *map(len, self.aligned)) + 2
        groups = (
            "" if self.superchains == self.chains else f" in {self.superchains} superchains"
        )
        compared = (
            "symmetries not known: as they are"
            if self.unknown
            else "aligned to one reference, modulo symmetry"
        )
        lines = [
            f"{self.chains} x {self.draws:,} draws{groups}; the worst entry of each tensor",
            f"{'':{width}}{'raw':>10}{compared:>44}",
            f"{'':{width}}{'R-hat':>10}{'R-hat':>11}{'nested':>11}{'bulk ESS':>11}{'tail ESS':>11}",
        ]
        for name, each in self.aligned.items():
            mark = (
                "  <- worst layer"
                if name == self.worst_layer and each.worst[0] > R_HAT.good
                else ""
            )
            lines.append(
                f"{name:{width}}{_ratio(self.raw[name].worst[0]):>10}" + _row(each) + mark
            )
        lines.append(f"{'predictions':{width}}{'':>10}" + _row(self.functions))
        return "\n".join([*lines, self.conclusion])

    __repr__ = __str__


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.2g}"


def _row(each: Agreement) -> str:
    r_hat, nested, bulk, tail = each.worst
    return f"{_ratio(r_hat):>11}{_ratio(nested):>11}{bulk:>11,.0f}{tail:>11,.0f}"


@checked
def weight_convergence(
    model: BayesianModel,
    draws: Draws,
    x: Tensor | np.ndarray | None = None,
    *,
    superchains: Count | None = None,
    reference: Tensor | None = None,
) -> WeightConvergence:
    """Compare chains in their weights, in their weights modulo symmetry, and in their functions.

    Chains in equivalent modes disagree about every weight and about nothing that matters. Here each
    draw is brought to one gauge: scales are normalised, where activations are homogeneous, then
    permutations and signs are matched to one reference for all chains. What disagreement is left is
    real. The symmetries are those of the function, so networks are compared whatever the prior; the
    result of any chain does not depend on which of its copies it visits. Where the symmetries are
    not known, because the network could not be labelled, the weights are compared as they are, and
    the result says so.

    Args:
        model: their model.
        draws: Markov chains, two or more of at least four draws.
        x: inputs at which functions are compared, at most 100 of them; the training inputs if None.
        superchains: groups of consecutive chains, each started at one point, for the nested R-hat
            of many short chains (Margossian et al. 2024); every chain on its own if None.
        reference: ``(dim,)``, what all draws are matched to; the draw of highest likelihood if
            None.

    Returns:
        The comparisons. Of tensors with more than 1,000 entries, as many are compared, evenly
        spaced.

    Raises:
        ValueError: for weighted draws, too few chains or draws, superchains that do not divide the
            chains, or weights that are not the model's.
    """
    model.spec.check(draws.theta)
    model.check_draws(draws)
    if draws.log_weights is not None:
        raise ValueError("weighted draws are no Markov chains: there is nothing to compare")
    if draws.n_chains < 2 or draws.n_draws < 4:
        raise ValueError(
            f"comparing needs 2 chains of 4 draws, got {draws.n_chains} of {draws.n_draws}"
        )
    superchains = draws.n_chains if superchains is None else superchains
    _check_superchains(superchains, draws.n_chains)
    aligned = _modulo_symmetry(draws, model, reference)
    functions = predicted_values(predict(model, draws.theta, x), draws.theta.shape[:2])[1]
    return WeightConvergence(
        _by_tensor(draws.theta, model, superchains),
        _by_tensor(aligned, model, superchains),
        agreement(functions, superchains),
        draws.n_chains,
        draws.n_draws,
        superchains,
        model.spec.unknown,
    )


def _modulo_symmetry(
    draws: Draws, model: BayesianModel, reference: Tensor | None
) -> Tensor:
    """Return the draws in one gauge, ``(chain, draw, dim)``."""
    spec, theta = model.spec, draws.theta.to(model.device, model.dtype)
    if reference is None:
        # The likelihood is the same on all copies of a network, the prior is not once scales move.
        with torch.no_grad():
            log_likelihood = draws.log_joint.to(
                model.device
            ) * model.temperature - model.log_prior(theta)
        reference = theta.flatten(0, 1)[log_likelihood.flatten().argmax()]
    spec.check(reference, "reference")
    if spec.unknown:
        return theta
    # Matching ends in a local optimum: all copies of a network must start from one form to end in
    # one.
    theta, reference = (
        sort_units(normalise_scale(each, spec), spec)
        for each in (theta, reference.to(theta))
    )
    return match(theta, spec, reference)


def _by_tensor(
    theta: Tensor, model: BayesianModel, superchains: int
) -> dict[str, Agreement]:
    compared = {}
    for name, where in model.spec.slices.items():
        size = where.stop - where.start
        entries = (
            np.linspace(0, size - 1, min(size, MAX_ENTRIES)).round().astype(int)
            + where.start
        )
        compared[name] = agreement(
            theta[..., torch.from_numpy(entries)].double().cpu().numpy(), superchains
        )
    return compared


def predicted_values(
    prediction: Prediction, shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return row numbers of up to 100 inputs, spread evenly, and what each draw predicts there.

    Args:
        prediction: by all draws.
        shape: of the draws, ``(chain, draw)``.

    Returns:
        ``(rows,)`` and ``(chain, draw, rows, outputs)``; of two classes only the second, whose
        probability says all.
    """
    rows = evenly(len(prediction), MAX_ROWS)
    found = torch.cat([chunk.cpu() for chunk in prediction.subset(rows).functions()])
    values = found.reshape(*shape, *found.shape[1:]).numpy()
    if prediction.kind == "classification" and values.shape[-1] == 2:
        values = values[..., 1:]
    return rows.numpy(), values


def agreement(values: np.ndarray, superchains: int) -> Agreement:
    """Compare chains of any quantities, ``(chain, draw, ...)``."""
    r_hat, bulk, tail = compare_chains(values)
    return Agreement(r_hat, nested_r_hat(values, superchains), bulk, tail)


def compare_chains(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rank-normalised split R-hat, bulk and tail ESS of ``(chain, draw, ...)``, ``(...)``
    each.

    Chains that are each constant but differ have infinite R-hat and no effective draws; quantities
    that never change have an R-hat of 1. A single chain is compared with itself, half against half.
    """
    halves = values
    if len(values) == 1:  # R-hat wants two chains
        half = values.shape[1] // 2
        halves = values[:, : 2 * half].reshape(2, half, *values.shape[2:])
    r_hat = diagnostics.rhat(halves)
    bulk, tail = diagnostics.ess(values, "bulk"), diagnostics.ess(values, "tail")
    constant = (values == values[:1, :1]).all((0, 1))
    r_hat = np.where(constant, 1.0, np.nan_to_num(r_hat, nan=np.inf))
    bulk, tail = (
        np.where(
            constant,
            values.shape[0] * values.shape[1],
            np.where(np.isinf(r_hat), 0.0, np.nan_to_num(ess)),
        )
        for ess in (bulk, tail)
    )
    return r_hat, bulk, tail


def nested_r_hat(values: np.ndarray, superchains: int) -> np.ndarray:
    """Return the rank-normalised nested R-hat of ``(chain, draw, ...)``, ``(...)`` (Margossian et
    al. 2024).

    sqrt(1 + B / W): B is the variance of the means of superchains, W the mean over superchains of
    the variance between the means of their chains plus that within chains. It asks whether the
    Monte Carlo estimate has forgotten where its superchains started, and is meaningful for many
    chains of few draws, of a single one even. As for R-hat the larger of two is returned: of the
    normalised ranks, and of their distance from the median.

    Args:
        values: chains of one superchain are consecutive.
        superchains: number of groups, at least 2, that divides the number of chains.

    Raises:
        ValueError: for any other number, or if neither chains nor draws leave anything to compare.
    """
    _check_superchains(superchains, len(values))
    if values.shape[0] == superchains and values.shape[1] == 1:
        raise ValueError("superchains of one chain of one draw have no variance within")
    folded = np.abs(values - np.median(values, axis=(0, 1)))
    return np.maximum(
        _plain_nested(diagnostics.normal_scores(values), superchains),
        _plain_nested(diagnostics.normal_scores(folded), superchains),
    )


def _plain_nested(values: np.ndarray, superchains: int) -> np.ndarray:
    # (superchain, chain, draw, ...)
    grouped = values.reshape(superchains, -1, *values.shape[1:])
    means = grouped.mean(2)
    within = grouped.var(2, ddof=1).mean((0, 1)) if grouped.shape[2] > 1 else 0.0
    between_chains = means.var(1, ddof=1).mean(0) if grouped.shape[1] > 1 else 0.0
    between = means.mean(1).var(0, ddof=1)
    with np.errstate(all="ignore"):
        ratio = np.sqrt(1 + between / (within + between_chains))
    return np.where(between == 0, 1.0, ratio)


def _check_superchains(superchains: int, chains: int) -> None:
    if superchains < 2 or chains % superchains:
        raise ValueError(
            f"superchains must be at least 2 and divide the {chains} chains, got {superchains}"
        )
