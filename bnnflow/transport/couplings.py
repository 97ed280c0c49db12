"""Couplings: which draw of the source travels to which draw of the target.

A coupling takes independent batches ``x0`` and ``x1`` and returns pairs with the same marginals, up
to one thing: the target is spread over its whole orbit. Every pair is moved by one random element
of the group that leaves the source invariant, the same for both ends. That keeps x0 ~ N(0, I)
whatever was matched, and lets a field see all modes.

Plans are permutations of x0: every draw of either batch is in one pair, and the order of x1 stays.
Scales are no symmetry of a normal source: where they shall not count, normalise both ends first,
which leaves nothing to match.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bnnflow.arguments import Count, Positive, checked
from bnnflow.symmetry import match
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["Coupling", "Independent", "Matched", "MiniBatchOT", "SinkhornOT"]


class Coupling(Protocol):
    """A rule that pairs a batch of the source with a batch of the target."""

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        spec: WeightSpec,
        group: Symmetries,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return pairs ``(batch, dim), (batch, dim)``."""
        ...


@dataclass(frozen=True)
class Independent:
    """Pairs as they come."""

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        spec: WeightSpec,
        group: Symmetries,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return pairs ``(batch, dim), (batch, dim)``."""
        _check(x0, x1, group)
        return over_orbit(x0, x1, spec, group, generator)


@dataclass(frozen=True)
class Matched:
    """Permute and flip each x0 to be as close as can be to its x1: straighter paths, for fewer
    solver steps.

    Raises:
        ValueError: if the prior keeps no symmetry of the network, so that there is nothing to match
            by, or if the symmetries of the network are not known.
    """

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        spec: WeightSpec,
        group: Symmetries,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return pairs ``(batch, dim), (batch, dim)``."""
        _check(x0, x1, group)
        _check_matchable(self, spec, group)
        return over_orbit(match(x0, spec, x1, group=group), x1, spec, group, generator)


@checked
@dataclass(frozen=True)
class MiniBatchOT:
    """Exact optimal transport between the two batches under the squared distance (Tong et al.
    2024).

    With ``matched`` the cost of a pair is its distance after `match`, and each pair is matched. All
    n^2 matchings would be too expensive, so most costs are bounds: both batches are matched to one
    draw of the target, and distances between the results bound those of matched pairs from above.
    The eight most promising sources of each target are then matched to it. Up to eight pairs the
    plan is exact, as far as `match` is: for one hidden layer.

    Args:
        matched: count distances modulo the permutations and signs that leave the source invariant.

    Raises:
        ValueError: with ``matched``, if the prior keeps no symmetry of the network, or its
            symmetries are not known.
    """

    matched: bool = False

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        spec: WeightSpec,
        group: Symmetries,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return pairs ``(batch, dim), (batch, dim)``."""
        _check(x0, x1, group)
        if not self.matched:
            return over_orbit(
                x0[optimal_permutation(squared_cost(x0, x1), spec.dim)],
                x1,
                spec,
                group,
                generator,
            )
        _check_matchable(self, spec, group)
        matching = partial(match, spec=spec, group=group)
        chosen = x0[optimal_permutation(_matched_cost(x0, x1, matching), spec.dim)]
        return over_orbit(matching(chosen, reference=x1), x1, spec, group, generator)


@checked
@dataclass(frozen=True)
class SinkhornOT:
    """A permutation drawn from the entropic plan between the two batches: between `MiniBatchOT` and
    `Independent`.

    Sinkhorn's iteration runs in the log domain in float64 (Cuturi 2013). Pairs drawn from its plan
    with replacement would lose a third of the targets, and the likeliest permutation is the exact
    plan again, whatever the regularisation. So the plan is rounded at random (dependent rounding,
    Gandhi et al. 2006): the permutation's mean, times 1/n, is the plan, up to ``tolerance`` and a
    thousandth.

    Args:
        regularisation: entropy's price, in standard deviations of the doubly centred cost over all
            pairs. A plan depends on no other part of the cost; the mean of the raw cost outgrows
            that part with the dimension, so that a price in its units would end in the independent
            coupling.
        tolerance: the most that the plan's marginals may be off, in total variation.
        max_iterations: of Sinkhorn's iteration; small regularisations need more.

    Raises:
        ValueError: if an argument is not positive.
        RuntimeError: if the marginals are off by more after ``max_iterations``.
    """

    regularisation: Positive = 0.1
    tolerance: Positive = 1e-3
    max_iterations: Count = 2000

    def __post_init__(self) -> None:
        if not (self.regularisation > 0 and self.tolerance > 0 and self.max_iterations > 0):
            raise ValueError(
                "regularisation, tolerance and max_iterations must be positive"
            )

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        spec: WeightSpec,
        group: Symmetries,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return pairs ``(batch, dim), (batch, dim)``."""
        _check(x0, x1, group)
        rows = drawn_permutation(self.plan(x0, x1), generator)
        return over_orbit(x0[rows], x1, spec, group, generator)

    def plan(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Return the entropic plan times n, ``(n, n)`` float64: rows and columns sum to one.

        Args:
            x0: rows of the plan, ``(n, dim)``.
            x1: its columns, ``(n, dim)``.
        """
        cost = doubly_centred(squared_cost(x0, x1))
        # zero for equal rows
        scale = cost.square().mean().sqrt().clamp(min=torch.finfo(cost.dtype).tiny)
        kernel = -cost / (self.regularisation * scale)
        u, v = torch.zeros_like(kernel[:, 0]), torch.zeros_like(kernel[0])
        error = math.inf
        for iteration in range(1, self.max_iterations + 1):
            u = -(kernel + v).logsumexp(1)
            v = -(kernel + u.unsqueeze(1)).logsumexp(0)
            if iteration % 10 == 0 or iteration == self.max_iterations:
                plan = (kernel + u.unsqueeze(1) + v).exp()  # columns are exact
                error = 0.5 * float((plan.sum(1) - 1).abs().mean())
                if error <= self.tolerance:
                    return plan
        raise RuntimeError(
            f"the marginals of the entropic plan are off by {error:.1e} after "
            f"{self.max_iterations} iterations: "
            "raise the regularisation or max_iterations"
        )


# ---------------------------------------- plans


# below this dimension POT's network simplex is faster than scipy's assignment, see
# bench_couplings.py
FLAT = 8
_CANDIDATES = 8  # sources of each target whose matched distance is computed exactly


def squared_cost(x0: Tensor, x1: Tensor) -> Tensor:
    """Return the part of the squared distances that plans depend on, ``(n, n)`` float64."""
    return -2 * x0.double() @ x1.double().T


def doubly_centred(cost: Tensor) -> Tensor:
    """Take from a cost what no permutation changes: the means of rows and columns."""
    cost = cost - cost.mean(0)
    return cost - cost.mean(1, keepdim=True)


def optimal_permutation(cost: Tensor, dim: int) -> Tensor:
    """Return the row that each column of a cost ``(n, n)`` gets in the cheapest permutation,
    ``(n,)``.

    Centred, the cost has the same solution, found up to eight times faster.
    """
    matrix = doubly_centred(cost).T.contiguous().cpu().numpy()  # (column, row)
    if dim < FLAT:
        import ot

        # whole masses: the solution is a permutation
        ones = torch.ones(len(matrix), dtype=torch.float64).numpy()
        rows = ot.emd(ones, ones, matrix, numItermax=10_000_000).argmax(1)
    else:
        rows = linear_sum_assignment(matrix)[1]
    return torch.from_numpy(rows).to(cost.device)


def _matched_cost(x0: Tensor, x1: Tensor, matching: Callable[..., Tensor]) -> Tensor:
    """Return squared distances after matching, ``(n, n)`` float64: of the likeliest pairs, and
    bounds of the others.
    """
    rough = torch.cdist(
        matching(x0, reference=x1[0]).double(), matching(x1, reference=x1[0]).double()
    ).square()
    # (candidate, n)
    likeliest = (
        doubly_centred(rough).topk(min(_CANDIDATES, len(x0)), 0, largest=False).indices
    )
    exact = torch.stack(
        [
            (matching(x0[rows], reference=x1) - x1).square().sum(-1, dtype=torch.float64)
            for rows in likeliest
        ]
    )
    return rough.scatter(0, likeliest, exact)


def drawn_permutation(plan: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a permutation whose mean is a doubly stochastic matrix ``(n, n)``: each column's row,
    ``(n,)``.

    Dependent rounding, one binary digit after the other, the lowest first. Entries with an odd
    digit lie on cycles that go from entry to entry along a row, along a column, and so on. All
    entries of a cycle are rounded up and down in turn, by a coin that says with which to begin, so
    that no sum and no mean changes.
    """
    digits = math.ceil(math.log2(len(plan))) + 10  # the rest is below 2^-11 of each sum
    units = _in_units(plan, digits)
    for digit in range(digits):
        # an even number in each row and column
        rows, columns = ((units >> digit) & 1).nonzero(as_tuple=True)
        entries = torch.arange(len(rows), device=plan.device)
        along_row = entries ^ 1  # entries come row by row, so neighbours are pairs
        order = columns.argsort(stable=True)
        along_column = order[order.argsort() ^ 1]
        label = _orbits(along_column[along_row])  # two for each cycle, of every other entry
        other = label[along_row]
        coins = torch.randint(
            0, 2, (len(entries),), generator=generator, device=plan.device
        )
        up = coins[torch.minimum(label, other)] ^ (label > other).long()
        units[rows, columns] += (2 * up - 1) << digit
    return units.argmax(0)


def _orbits(step: Tensor) -> Tensor:
    """Number the orbits of a permutation ``(n,)``: which one each point is on, ``(n,)``."""
    n = len(step)
    graph = csr_array(
        (np.ones(n, dtype=np.int8), step.cpu().numpy(), np.arange(n + 1)), shape=(n, n)
    )
    return torch.from_numpy(connected_components(graph)[1]).to(step)


def _in_units(plan: Tensor, digits: int) -> Tensor:
    """Return a matrix ``(n, n)`` of whole multiples of 2^-digits close to ``plan``, all of whose
    sums are one.
    """
    plan = plan / plan.sum(1, keepdim=True).clamp(min=1)
    plan = plan / plan.sum(0).clamp(min=1)
    units = (plan * 2**digits).floor().long()
    # What is missing goes to the cells that a walk from the first row and column to the last meets
    # (north-west corner).
    rows, columns = ((2**digits - units.sum(axis)).cumsum(0) for axis in (1, 0))
    stops = torch.cat([rows, columns]).unique()
    amounts = stops.diff(prepend=stops.new_zeros(1))
    cells = torch.searchsorted(rows, stops), torch.searchsorted(columns, stops)
    return units.index_put(cells, amounts, accumulate=True)


# ---------------------------------------- what all share


def _check(x0: Tensor, x1: Tensor, group: Symmetries) -> None:
    if x0.dim() != 2 or x0.shape != x1.shape or len(x0) == 0:
        raise ValueError(
            f"a coupling needs two batches (n, dim), got {tuple(x0.shape)} and {tuple(x1.shape)}"
        )
    if not bool(x0.isfinite().all() and x1.isfinite().all()):
        raise ValueError("cannot pair weights that are NaN or infinite")
    if group.scale or group.phase:
        raise ValueError(
            "only permutations and signs leave a normal source invariant; normalise "
            "scales on both ends"
        )


def _check_matchable(coupling: Coupling, spec: WeightSpec, group: Symmetries) -> None:
    name = type(coupling).__name__
    if not group.permutation and not group.sign:
        why = (
            f"; the symmetries of this network are not known: {spec.unknown}"
            if spec.unknown
            else ""
        )
        raise ValueError(
            f"{name} matches by a prior that is exchangeable over hidden units; use "
            f"Independent{why}"
        )


def over_orbit(
    x0: Tensor, x1: Tensor, spec: WeightSpec, group: Symmetries, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    if not any(group):
        return x0, x1
    x0, x1 = spec.transform(group, generator, x0, x1)
    return x0, x1
