"""Laws of the couplings: marginals, optimality, and plans that are permutations decided by one
generator.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from torch import nn

import bnnflow as bf
from bnnflow import priors
from bnnflow.symmetry import match
from bnnflow.transport import Source, couplings
from bnnflow.transport.couplings import Independent, Matched, MiniBatchOT, SinkhornOT
from bnnflow.weights import Symmetries
from tests.problems import built, generator, network, normal

NO_SYMMETRY = Symmetries(frozenset(), frozenset(), frozenset())
ALL = [Independent(), Matched(), MiniBatchOT(), MiniBatchOT(matched=True), SinkhornOT(0.3)]


def perceptron(*hidden: int, prior=None) -> bf.BayesianModel:
    return network("gaussian", hidden, torch.float32, prior)


def flat(dim: int) -> bf.WeightSpec:
    return bf.WeightSpec.unlabelled(built(lambda: nn.Linear(dim, 1, bias=False)))


def batches(n: int, dim: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a source and a target far from symmetric, so that a plan has something to pull at."""
    x0, noise = normal(2, n, dim, seed=seed, dtype=torch.float32)
    return x0, 2 + 0.5 * noise * torch.linspace(0.1, 3, dim)


def cost(x0: torch.Tensor, x1: torch.Tensor) -> float:
    return float((x0.double() - x1).square().sum(-1).mean())


# ---------------------------------------- marginals


def source_p_value(coupling: couplings.Coupling) -> tuple[float, int]:
    """Return the smallest p-value over all weights that x0 of 16 batches is standard normal."""
    model = perceptron(6)
    pairs = []
    for seed in range(16):
        x0, x1 = batches(128, model.dim, seed)
        pairs.append(
            coupling.pair(
                x0,
                x1,
                model.spec,
                Source(model.flat_prior).symmetries(model),
                generator(seed),
            )[0]
        )
    columns = torch.cat(pairs).T
    return min(stats.kstest(column.numpy(), "norm").pvalue for column in columns), model.dim


@pytest.mark.parametrize("coupling", ALL, ids=repr)
def test_source_stays_standard_normal_in_every_weight(coupling):
    p_value, dim = source_p_value(coupling)
    assert p_value > 0.001 / dim


@pytest.mark.parametrize("coupling", [Matched(), MiniBatchOT(matched=True)], ids=repr)
def test_matching_without_the_random_element_would_bias_the_source(coupling, monkeypatch):
    """The power of the test above."""
    monkeypatch.setattr(couplings, "over_orbit", lambda x0, x1, *_: (x0, x1))
    assert source_p_value(coupling)[0] < 1e-8


@pytest.mark.parametrize("coupling", ALL, ids=repr)
def test_every_draw_of_either_batch_is_in_one_pair(coupling):
    model = perceptron(5)
    x0, x1 = batches(50, model.dim)
    paired = coupling.pair(
        x0, x1, model.spec, Source(model.flat_prior).symmetries(model), generator()
    )
    # a group element keeps the norm
    for before, after in zip((x0, x1), paired, strict=True):
        assert torch.allclose(
            before.norm(dim=1).sort().values, after.norm(dim=1).sort().values, rtol=1e-5
        )
    # the order of x1 stays
    assert torch.allclose(paired[1].norm(dim=1), x1.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("coupling", ALL, ids=repr)
def test_both_ends_are_moved_by_one_random_element(coupling, monkeypatch):
    model = perceptron(5, 4)
    x0, x1 = batches(40, model.dim)
    group = Source(model.flat_prior).symmetries(model)
    moved = coupling.pair(x0, x1, model.spec, group, generator(3))
    monkeypatch.setattr(couplings, "over_orbit", lambda x0, x1, *_: (x0, x1))
    still = coupling.pair(x0, x1, model.spec, group, generator(3))
    assert torch.equal(still[1], x1)
    assert not torch.allclose(moved[1], x1)
    assert torch.allclose(
        (moved[0] - moved[1]).norm(dim=1), (still[0] - still[1]).norm(dim=1), rtol=1e-4
    )
    x = normal(7, 2, dtype=torch.float32)
    assert torch.allclose(model.outputs(moved[0], x), model.outputs(still[0], x), atol=1e-4)


@pytest.mark.parametrize("coupling", ALL, ids=repr)
def test_plans_are_reproducible_from_one_generator(coupling):
    model = perceptron(4)
    x0, x1 = batches(30, model.dim)
    group = Source(model.flat_prior).symmetries(model)

    def pair(seed):
        return coupling.pair(x0, x1, model.spec, group, generator(seed))

    state = torch.get_rng_state()
    first, again, other = pair(0), pair(0), pair(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------- optimality


@pytest.mark.parametrize("dim", [1, 3, 7, 8, 20])
def test_exact_plan_is_the_cheapest_permutation(dim):
    x0, x1 = batches(6, dim)
    paired, _ = MiniBatchOT().pair(x0, x1, flat(dim), NO_SYMMETRY, generator())
    best = min(cost(x0[list(order)], x1) for order in itertools.permutations(range(6)))
    assert cost(paired, x1) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("dim", [2, 12])
def test_plan_is_a_permutation_when_draws_repeat(dim):
    x0, x1 = batches(60, dim)
    x1 = x1[torch.randint(10, (60,), generator=generator())]  # as draws with replacement do
    for coupling in (MiniBatchOT(), SinkhornOT()):
        paired, _ = coupling.pair(x0, x1, flat(dim), NO_SYMMETRY, generator())
        assert torch.equal(paired[:, 0].sort().values, x0[:, 0].sort().values)
    equal = x1[:1].expand(60, -1)
    paired, _ = SinkhornOT().pair(x0, equal, flat(dim), NO_SYMMETRY, generator())
    assert torch.equal(paired[:, 0].sort().values, x0[:, 0].sort().values)


def test_both_solvers_give_the_same_plan(monkeypatch):
    x0, x1 = batches(200, 8)
    by_assignment, _ = MiniBatchOT().pair(x0, x1, flat(8), NO_SYMMETRY, generator())
    monkeypatch.setattr(couplings, "FLAT", 9)
    by_simplex, _ = MiniBatchOT().pair(x0, x1, flat(8), NO_SYMMETRY, generator())
    assert torch.equal(by_assignment, by_simplex)


@pytest.mark.parametrize("hidden", [(6,), (5, 4)])
def test_each_coupling_is_cheaper_than_the_one_before(hidden):
    model = perceptron(*hidden)
    x0, x1 = batches(100, model.dim)
    # targets of all modes
    spread = model.spec.transform(Source(model.flat_prior).symmetries(model), 0, x1)[0]
    couplings_in_order = [
        Independent(),
        MiniBatchOT(),
        Matched(),
        MiniBatchOT(matched=True),
    ]
    pairs = [
        c.pair(
            x0, spread, model.spec, Source(model.flat_prior).symmetries(model), generator()
        )
        for c in couplings_in_order
    ]
    costs = [cost(*pair) for pair in pairs]
    assert all(after < 0.97 * before for before, after in itertools.pairwise(costs)), costs


def matched_costs(
    x0: torch.Tensor, x1: torch.Tensor, model: bf.BayesianModel
) -> torch.Tensor:
    """Return all n^2 squared distances after matching, ``(n, n)``."""
    n, group = len(x0), Source(model.flat_prior).symmetries(model)
    ours, theirs = x0.repeat_interleave(n, 0), x1.repeat(n, 1)
    return (
        (match(ours, model.spec, theirs, group=group) - theirs)
        .double()
        .square()
        .sum(-1)
        .reshape(n, n)
    )


def test_matched_plan_of_a_small_batch_is_the_cheapest_over_permutations_and_group():
    model = perceptron(5)
    x0, x1 = batches(7, model.dim)
    paired, target = MiniBatchOT(matched=True).pair(
        x0, x1, model.spec, Source(model.flat_prior).symmetries(model), generator()
    )
    costs = matched_costs(x0, x1, model)
    best = min(
        costs[list(order), range(7)].mean() for order in itertools.permutations(range(7))
    )
    assert cost(paired, target) == pytest.approx(float(best), rel=1e-5)


def test_matched_plan_of_a_large_batch_is_near_the_cheapest():
    model = perceptron(16)
    x0, x1 = batches(64, model.dim)
    group = Source(model.flat_prior).symmetries(model)
    (x1,) = model.spec.transform(group, 0, x1)
    paired, target = MiniBatchOT(matched=True).pair(x0, x1, model.spec, group, generator())
    costs = matched_costs(x0, x1, model)
    best = float(costs[couplings.optimal_permutation(costs, model.dim), range(64)].mean())
    matched = float(costs.diagonal().mean())
    # 0.27 by the bounds alone
    assert best < cost(paired, target) < best + 0.13 * (matched - best)


# ---------------------------------------- the entropic plan


@pytest.mark.parametrize("dim", [2, 500, 5000])
def test_entropic_plan_agrees_with_pot_and_its_entropy_does_not_depend_on_the_dimension(
    dim,
):
    import ot

    x0, x1 = batches(40, dim)
    coupling = SinkhornOT(0.3, tolerance=1e-9)
    plan = coupling.plan(x0, x1)
    raw = torch.cdist(x0.double(), x1.double()).square()
    centred = raw - raw.mean(0) - raw.mean(1, keepdim=True) + raw.mean()
    price = 0.3 * float(centred.square().mean().sqrt())
    ones = torch.ones(40, dtype=torch.float64).numpy()
    other = ot.sinkhorn(
        ones,
        ones,
        raw.numpy(),
        price,
        method="sinkhorn_log",
        numItermax=5000,
        stopThr=1e-10,
    )
    assert torch.allclose(plan, torch.from_numpy(other), atol=1e-6)
    # log of the number of partners
    entropy = float(-torch.special.xlogy(plan, plan).sum(1).mean())
    assert 0.3 < entropy < 3.2  # independent: 3.7, exact: 0


@pytest.mark.parametrize("regularisation", [0.02, 0.1, 1.0, 100.0])
def test_marginals_of_the_entropic_plan_are_as_close_as_asked(regularisation):
    x0, x1 = batches(60, 20)
    for tolerance in (1e-2, 1e-4):
        plan = SinkhornOT(regularisation, tolerance, 20000).plan(x0, x1)
        assert 0.5 * float((plan.sum(1) - 1).abs().mean()) <= tolerance
        assert (plan.sum(0) - 1).abs().max() < 1e-9


def test_sinkhorn_lies_between_the_exact_and_the_independent_coupling():
    x0, x1 = batches(100, 10)
    order = [
        MiniBatchOT(),
        SinkhornOT(0.1),
        SinkhornOT(0.5),
        SinkhornOT(2.0),
        Independent(),
    ]
    costs = [cost(*c.pair(x0, x1, flat(10), NO_SYMMETRY, generator())) for c in order]
    assert costs == sorted(costs)
    exact = MiniBatchOT().pair(x0, x1, flat(10), NO_SYMMETRY, generator())[0]
    sharp = SinkhornOT(0.003, max_iterations=20000).pair(
        x0, x1, flat(10), NO_SYMMETRY, generator()
    )[0]
    assert (exact == sharp).all(1).float().mean() > 0.9


@pytest.mark.parametrize("regularisation", [0.1, 1.0])
def test_permutations_are_the_plan_on_average(regularisation):
    n, draws = 12, 300
    x0, x1 = batches(n, 3)
    coupling = SinkhornOT(regularisation, tolerance=1e-6)
    plan, g = coupling.plan(x0, x1), generator(7)
    counts = torch.zeros(n, n, dtype=torch.float64)
    for _ in range(draws):
        rows = couplings.drawn_permutation(plan, g)
        assert torch.equal(rows.sort().values, torch.arange(n))
        counts[rows, torch.arange(n)] += 1
    error = (plan * (1 - plan) / draws).sqrt() + 1e-3
    assert ((counts / draws - plan).abs() < 4.5 * error).all()
    # Far from the likeliest permutation each time, where the plan is diffuse.
    assert (counts > 0).sum() > (3 * n if regularisation == 1.0 else n)


def test_sinkhorn_that_does_not_converge_raises():
    x0, x1 = batches(60, 10)
    with pytest.raises(RuntimeError, match=r"marginals .* off by .* after 10 iterations"):
        SinkhornOT(0.01, max_iterations=10).plan(x0, x1)
    for bad in ({"regularisation": 0.0}, {"tolerance": -1.0}, {"max_iterations": 0}):
        with pytest.raises(ValueError, match=r"must be (positive|at least 1)"):
            SinkhornOT(**bad)


# ---------------------------------------- refusals


@pytest.mark.parametrize("coupling", ALL, ids=repr)
def test_symmetries_that_the_source_has_not_raise(coupling):
    model = perceptron(5)
    x0, x1 = batches(8, model.dim)
    group = Source(model.flat_prior).symmetries(model)
    for more in ({"scale": frozenset({"h1"})}, {"phase": frozenset({"h1"})}):
        with pytest.raises(ValueError, match="only permutations and signs"):
            coupling.pair(x0, x1, model.spec, group._replace(**more), generator())
    with pytest.raises(ValueError, match="two batches"):
        coupling.pair(x0, x1[:4], model.spec, group, generator())
    x0[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        coupling.pair(x0, x1, model.spec, group, generator())


@pytest.mark.parametrize("coupling", [Matched(), MiniBatchOT(matched=True)], ids=repr)
def test_matching_needs_a_symmetry(coupling):
    with pytest.raises(ValueError, match=rf"{type(coupling).__name__} .* exchangeable"):
        coupling.pair(*batches(8, 4), flat(4), NO_SYMMETRY, generator())


def test_prior_that_keeps_no_signs_is_matched_by_permutations_alone():
    model = perceptron(6, prior=priors.PerTensor({}, torch.distributions.Normal(0.5, 1.0)))
    group = Source(model.flat_prior).symmetries(model)
    assert group.permutation == {"h1"}
    assert not group.sign
    x0, x1 = batches(64, model.dim)
    paired, _ = MiniBatchOT(matched=True).pair(x0, x1, model.spec, group, generator())
    # a flip would change sums
    assert torch.allclose(paired.sum(1).sort().values, x0.sum(1).sort().values, atol=1e-4)
