"""Laws of the compiled dynamics: step for step what the readable ones do, for every model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor

import bnnflow as bf
from bnnflow import BayesianModel, dynamics, priors
from bnnflow.dynamics import MINIMAL_NORM, Point, Scheme, Target, random_directions
from bnnflow.inference.mcmc.adjusted_mclmc import adjusted_mclmc
from bnnflow.inference.mcmc.hmc import hmc
from bnnflow.inference.mcmc.mclmc import mclmc
from bnnflow.model import target as compiled_target
from bnnflow.model.target import PosteriorTarget
from tests.test_fused import (
    ACTIVATIONS,
    F32,
    F64,
    FREQUENCY,
    LIKELIHOODS,
    OURS,
    model_of,
    needs_compiler,
    points,
)

CHAINS = 5
PRIORS: dict[str, Any] = {
    "normal": priors.Normal(0.8, 0.1),
    "student": priors.StudentT(3.0, 0.7),
    "laplace": priors.Laplace(0.7),
    "hierarchical": priors.Hierarchical(),
    "by torch": td.Gumbel(0.0, 1.0),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(model: BayesianModel, scale: float = 0.7) -> Point:
    theta = points(model, CHAINS, scale=scale)
    value, grad = model.log_joint_and_grad(theta)
    return Point(theta, random_directions(theta, generator(4)), value, grad)


def units(model: BayesianModel, own: bool, time: float) -> tuple[Tensor, Tensor]:
    """Step sizes and scales, of every chain or shared."""
    shapes = ((CHAINS, 1), (CHAINS, model.dim)) if own else ((1,), (model.dim,))
    times, scales = (torch.rand(each, generator=generator(5), dtype=F64) for each in shapes)
    return (time * (0.5 + times)).to(model.dtype), (0.5 + scales).to(model.dtype)


def assert_same_way(
    target: PosteriorTarget, at: Point, time: Tensor, scale: Tensor
) -> None:
    """Compare every dynamics with the readable form in the same density, to the last bit."""
    readable = Target(target)
    scheme = Scheme.leapfrog(4)
    ends = [
        (
            each.hamiltonian(at, time, scale, scheme),
            *each.microcanonical(at, time, scale, scheme),
            *each.langevin(at, time, scale, 0.3, 3, generator(6)),
        )
        for each in (target, readable)
    ]
    for ours, theirs in zip(*ends, strict=True):
        both = (
            [(ours, theirs)] if isinstance(ours, Tensor) else zip(ours, theirs, strict=True)
        )
        for one, other in both:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood(likelihood: str, own: bool) -> None:
    model = model_of(likelihood, (3, 7, 4), temperature=0.7)
    assert isinstance(model.target, PosteriorTarget)
    assert_same_way(model.target, start(model), *units(model, own, 0.02))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    model = model_of(widths=(3, 7), activation=activation)
    at = start(model, 0.7 / FREQUENCY.get(activation, 1.0))
    assert_same_way(model.target, at, *units(model, True, 0.003))


@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior(prior: str) -> None:
    model = model_of("learned", (3, 7), prior=PRIORS[prior])
    assert_same_way(model.target, start(model), *units(model, True, 0.01))


def test_single_precision() -> None:
    model = model_of(widths=(3, 20), dtype=F32, n=70)
    assert_same_way(model.target, start(model), *units(model, True, 0.01))


@pytest.mark.parametrize("prior", ["normal", "by torch"])
def test_weights_of_every_chain(prior: str) -> None:
    model = model_of("learned", (3, 7), prior=PRIORS[prior])
    near, far = (torch.rand(CHAINS, generator=generator(i), dtype=F64) for i in (7, 8))
    target = PosteriorTarget(model.density, near, far)
    at = start(model)
    likelihood, grad = model.log_likelihood_and_grad(at.theta)
    log_prior, prior_grad = model.flat_prior.log_prob_and_grad(at.theta)
    value, ours = target(at.theta)
    torch.testing.assert_close(value, near * likelihood + far * log_prior)
    torch.testing.assert_close(ours, near[:, None] * grad + far[:, None] * prior_grad)
    at = at._replace(log_joint=value, grad=ours)
    assert_same_way(target, at, *units(model, True, 0.01))


def test_steps_into_nowhere_are_undone() -> None:
    """Where steps are far too long some are lost, and both forms lose the same."""
    model = model_of(widths=(3, 7))
    time, scale = units(model, True, 3.0)
    ends = [
        each.langevin(start(model), time, scale, 0.3, 1, generator(6))
        for each in (model.target, Target(model.target))
    ]
    lost = ~(ends[1][1][0].abs() < dynamics.DIVERGENCE)
    assert bool(lost.any())
    assert torch.equal(ends[0][0].theta[lost], start(model).theta[lost])
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_chain_without_a_density_spoils_no_other(lost: float) -> None:
    model = model_of(widths=(3, 7))
    at, (time, scale) = start(model), units(model, True, 0.01)
    spoiled = at._replace(theta=at.theta.index_fill(0, torch.tensor([1]), lost))
    others = [0, 2, 3, 4]
    for one, other in zip(
        model.target.hamiltonian(at, time, scale, Scheme.leapfrog(3)),
        model.target.hamiltonian(spoiled, time, scale, Scheme.leapfrog(3)),
        strict=True,
    ):
        assert torch.equal(one[others], other[others])


@needs_compiler
def test_neither_threads_nor_looks_for_an_interrupt_change_a_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(widths=(3, 7))
    at, (time, scale) = start(model), units(model, True, 0.01)

    def everything() -> list[Tensor]:
        target = model.target
        scheme = Scheme.leapfrog(7)
        adjusted, error = target.microcanonical(at, time, scale, scheme)
        free, errors = target.langevin(at, time, scale, 0.3, 5, generator())
        return [
            *target.hamiltonian(at, time, scale, scheme),
            *adjusted,
            *free,
            error,
            errors,
        ]

    whole, threads = everything(), torch.get_num_threads()
    monkeypatch.setattr("bnnflow.model.fused._WORK_OF_A_THREAD", 1)
    torch.set_num_threads(3)
    shared = everything()
    torch.set_num_threads(threads)
    monkeypatch.setattr(compiled_target, "_UNBROKEN", 1)
    for one, other, broken in zip(whole, shared, everything(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(broken, one, rtol=1e-14, atol=1e-14)


def test_parts_of_a_scheme_are_the_scheme() -> None:
    for scheme in (MINIMAL_NORM, Scheme.leapfrog(1), Scheme.leapfrog(torch.tensor([9, 4]))):
        for most in (1, 2, 4, 100):
            parts = compiled_target._parts(scheme, most)
            assert torch.equal(torch.cat([part.drift for part in parts], -1), scheme.drift)
            kicks = [parts[0].kick[..., :1], *(part.kick[..., 1:] for part in parts)]
            assert torch.equal(torch.cat(kicks, -1), scheme.kick)
            assert all(not bool(part.kick[..., 0].any()) for part in parts[1:])
            assert all(part.drift.shape[-1] <= most for part in parts)


def test_chains_may_make_as_many_steps_as_they_like() -> None:
    model = model_of("learned", (3, 7))
    at, (time, scale) = start(model), units(model, True, 0.02)
    n = torch.tensor([3, 1, 7, 7, 2])
    found = [
        each.hamiltonian(at, time, scale, Scheme.leapfrog(n))
        for each in (model.target, Target(model.target))
    ]
    for i, steps in enumerate(n.tolist()):
        alone = model.target.hamiltonian(at, time, scale, Scheme.leapfrog(steps))
        for each in found:
            for one, other in zip(each, alone, strict=True):
                assert torch.equal(one[i], other[i])


KERNELS = {
    "hmc": lambda target, ones: hmc(target, 0.02, 6, ones),
    "adjusted": lambda target, ones: adjusted_mclmc(target, 0.1, 6, ones),
    "mclmc": lambda target, ones: mclmc(target, 0.1, 2.0, ones, 4),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_seed_gives_the_same_draws_in_both_forms(kernel: str) -> None:
    model = model_of("learned", (3, 7))
    theta, ones = points(model, CHAINS), torch.ones(CHAINS, model.dim, dtype=F64)
    found = []
    for target in (model.log_joint_and_grad, Target(model.target)):
        ours, g = KERNELS[kernel](target, ones), generator(1)
        state, infos = ours.init(theta, g), []
        for _ in range(5):
            state, info = ours.step(state, g)
            infos.append(info)
        found.append((state, infos, torch.rand(3, generator=g)))
    (one, ones, last), (other, others, same) = found
    assert torch.equal(last, same)  # as many random numbers
    for ours, theirs in zip([one, *ones], [other, *others], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_a_target_is() -> None:
    model = model_of()
    assert Target.of(model.log_joint_and_grad) is model.target
    assert Target.of(model.target) is model.target
    other = Target.of(model.log_likelihood_and_grad)
    assert type(other) is Target
    theta = points(model, 2)
    torch.testing.assert_close(other(theta), model.log_likelihood_and_grad(theta))


def test_a_density_that_was_put_in_its_place_is_followed() -> None:
    model, calls = model_of(), 0
    real = model.log_joint_and_grad

    def counted(theta: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return real(theta)

    model.log_joint_and_grad = counted  # type: ignore[method-assign]
    bf.sample(model, bf.HMC(max_leapfrog=2), chains=2, warmup=2, draws=3, init="prior")
    assert calls > 5


def test_the_compiled_form_is_used_where_it_can_be() -> None:
    for name in OURS:
        model = model_of(name)
        at, (time, scale) = start(model), units(model, True, 0.1)
        there = model.target._compiled(at, time, scale) is not None  # type: ignore[attr-defined]
        assert there == model.is_compiled
        wide = at._replace(velocity=at.velocity.float())
        assert model.target._compiled(wide, time, scale) is None  # type: ignore[attr-defined]
