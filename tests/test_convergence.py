"""Copies of one chain agree modulo symmetry, different functions never do, and the figures are
ArviZ's.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.activations import Sine
from bnnflow.diagnosis.convergence import compare_chains, nested_r_hat
from bnnflow.diagnostics import import_arviz
from bnnflow.report import diagnose, plots, weight_convergence
from tests.problems import one_in

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(
    *widths: int, activation=nn.ReLU, likelihood=None, x=None, y=None
) -> bf.BayesianModel:
    with torch.random.fork_rng(devices=[]):
        modules: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            modules += [nn.Linear(n_in, n_out), activation()]
        net = nn.Sequential(*modules[:-1]).double()
    x = torch.randn(30, widths[0], generator=generator(1), dtype=F64) if x is None else x
    y = x.sum(1) if y is None else y
    return bf.BayesianModel(
        net, priors.Normal(), likelihood or likelihoods.Gaussian(), x, y
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Linear(2, 4),
            nn.Linear(4, 3),
            nn.Linear(3, 4),
            nn.Linear(4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.d(h + self.c(torch.relu(self.b(h))))


def model_from(module: type[nn.Module]) -> bf.BayesianModel:
    with torch.random.fork_rng(devices=[]):
        net = module().double()
    x = torch.randn(30, 2, generator=generator(1), dtype=F64)
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(), x, x.sum(1))


def as_draws(model: bf.BayesianModel, theta: Tensor) -> bf.Draws:
    return bf.Draws(theta, model.log_joint(theta), {"n_steps": torch.ones(theta.shape[:2])})


def random_walk(model: bf.BayesianModel, draws: int = 150, seed: int = 2) -> Tensor:
    """One chain ``(1, draw, dim)`` that stays near one network."""
    noise = torch.randn(draws, model.dim, generator=generator(seed), dtype=F64)
    centre = torch.randn(model.dim, generator=generator(seed + 1), dtype=F64)
    walk = [noise[0]]
    for step in noise[1:]:
        walk.append(0.7 * walk[-1] + 0.7 * step)
    return (centre + 0.15 * torch.stack(walk)).unsqueeze(0)


def copies(model: bf.BayesianModel, chain: Tensor, seed: int = 5) -> Tensor:
    """Move each of four copies of a chain by an element of the group of its own, the same for all
    its draws.
    """
    group = model.spec.symmetries()
    return torch.stack(
        [
            torch.stack(model.spec.transform(group, seed + number, *chain[0]))
            for number in range(4)
        ]
    )


def worst(by_tensor) -> float:
    return max(each.worst[0] for each in by_tensor.values())


NETS = {
    "relu": lambda: model_of(2, 4, 3, 1),
    "tanh": lambda: model_of(2, 4, 3, 1, activation=nn.Tanh),
    "sine": lambda: model_of(2, 4, 3, 1, activation=lambda: Sine(3.0)),
    "residual": lambda: model_from(Residual),
    "gelu": lambda: model_of(2, 5, 1, activation=nn.GELU),
    "relu without depth": lambda: model_of(2, 6, 1),
}


@pytest.mark.parametrize("name", one_in(2, NETS))
def test_copies_of_one_chain_agree_modulo_symmetry(name: str) -> None:
    model = NETS[name]()
    chain = random_walk(model)
    same = weight_convergence(model, as_draws(model, chain.expand(4, -1, -1)))
    moved = weight_convergence(model, as_draws(model, copies(model, chain)))
    assert worst(moved.raw) > 1.5
    for tensor, aligned in same.aligned.items():  # all entries, in whatever frame of units
        frames = (
            np.sort(moved.aligned[tensor].r_hat.ravel()),
            np.sort(aligned.r_hat.ravel()),
        )
        np.testing.assert_allclose(*frames, atol=0.005)
    np.testing.assert_allclose(moved.functions.r_hat, same.functions.r_hat, atol=0.005)
    # nothing is normalised, and one chain in one frame stays as it was
    if name in ("tanh", "gelu"):
        assert abs(worst(moved.aligned) - worst(same.raw)) < 0.005


def test_copies_of_a_sampled_chain_agree_modulo_symmetry() -> None:
    model = model_of(2, 5, 1, likelihood=likelihoods.Gaussian(0.1))
    draws = bf.sample(
        model, bf.HMC(), chains=1, warmup=150, draws=150, seed=0, progress=False
    )
    same = weight_convergence(model, as_draws(model, draws.theta.expand(4, -1, -1)))
    moved = weight_convergence(model, as_draws(model, copies(model, draws.theta)))
    assert worst(moved.raw) > 1.5
    assert abs(worst(moved.aligned) - worst(same.aligned)) < 0.005


def test_chains_in_different_functions_stay_apart() -> None:
    """Half of the data say y = 1.5 x and half y = -1.5 x: with heavy tails each line explains
    itself.
    """
    x = torch.linspace(-1, 1, 40, dtype=F64)[:, None]
    y = 1.5 * x[:, 0] * torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)
    model = model_of(
        1, 4, 1, activation=nn.Tanh, likelihood=likelihoods.StudentT(2.5, 0.05), x=x, y=y
    )
    line = model.spec.flatten({
        "0.weight": torch.full((4, 1), 0.5, dtype=F64),
        "0.bias": torch.zeros(4, dtype=F64),
        "2.weight": torch.full((1, 4), 0.75, dtype=F64),
        "2.bias": torch.zeros(1, dtype=F64),
    })  # fmt: skip
    other = line.clone()
    other[model.spec.slices["2.weight"]] *= -1
    init = torch.stack([line, line, other, other])
    draws = bf.sample(
        model, bf.HMC(), chains=4, warmup=60, draws=60, init=init, seed=0, progress=False
    )
    slope = model.outputs(draws.theta, torch.ones(1, 1, dtype=F64)).squeeze()
    assert (slope[:2] > 1).all()
    assert (slope[2:] < -1).all()
    result = weight_convergence(model, draws)
    assert worst(result.aligned) > 1.1
    assert result.functions.worst[0] > 1.1
    assert "different modes of the function" in result.conclusion
    verdict = diagnose(model, draws)
    assert verdict.verdict == "do not trust"
    assert any("weight_convergence" in reason for reason in verdict.reasons)


def test_a_given_reference_is_used() -> None:
    model = NETS["relu"]()
    chain = random_walk(model)
    draws = as_draws(model, copies(model, chain))
    own = weight_convergence(model, draws, reference=chain[0, 0])
    assert (
        abs(
            worst(own.aligned)
            - worst(weight_convergence(model, draws, reference=draws.theta[2, 0]).aligned)
        )
        < 0.005
    )
    with pytest.raises(ValueError, match="axis of length"):
        weight_convergence(model, draws, reference=chain[0, 0, 1:])


# ---------------------------------------- the figures


def test_figures_are_arvizs() -> None:
    values = np.random.default_rng(0).normal(size=(4, 40, 3)).cumsum(1)
    arviz = import_arviz()
    expected = (
        arviz.rhat,
        partial(arviz.ess, method="bulk"),
        partial(arviz.ess, method="tail", prob=(0.05, 0.95)),
    )
    for found, of in zip(compare_chains(values), expected, strict=True):
        np.testing.assert_allclose(found, [float(of(values[..., i])) for i in range(3)])


def test_nested_r_hat_of_superchains_of_one_chain_is_close_to_r_hat() -> None:
    values = np.random.default_rng(0).normal(size=(8, 400, 5))
    values[0, :, 0] += 3
    nested = nested_r_hat(values, 8)
    plain = compare_chains(values)[0]
    np.testing.assert_allclose(nested, plain, atol=0.05)
    assert nested[0] > 1.2
    assert (nested[1:] < 1.01).all()


def test_nested_r_hat_sees_superchains_but_not_chains() -> None:
    """With one draw a chain only the start of its superchain can be remembered."""
    rng = np.random.default_rng(0)
    free = rng.normal(size=(256, 1, 20))
    assert (nested_r_hat(free, 16) < 1.1).all()
    started = free + np.repeat(rng.normal(size=(16, 1, 20)) * 2, 16, axis=0)
    assert (nested_r_hat(started, 16) > 1.5).all()
    shuffled = started.reshape(16, 16, 1, 20).swapaxes(0, 1).reshape(256, 1, 20)
    assert (nested_r_hat(shuffled, 16) < 1.1).all()


def test_nested_r_hat_agrees_with_its_definition() -> None:
    """On values that are their own normal scores."""
    from scipy.special import ndtri

    scores = ndtri((np.random.default_rng(0).permutation(24) + 1 - 0.375) / 24.25).reshape(
        6, 4
    )
    means = scores.mean(1).reshape(3, 2)
    between = means.mean(1).var(ddof=1)
    within = (means.var(1, ddof=1) + scores.var(1, ddof=1).reshape(3, 2).mean(1)).mean()
    assert nested_r_hat(scores, 3) >= np.sqrt(1 + between / within) - 1e-12
    folded = np.abs(scores)
    if nested_r_hat(folded, 3) <= np.sqrt(1 + between / within):
        np.testing.assert_allclose(nested_r_hat(scores, 3), np.sqrt(1 + between / within))


@pytest.mark.parametrize("superchains", [0, 1, 3, 8])
def test_superchains_must_divide_the_chains(superchains: int) -> None:
    model = NETS["relu without depth"]()
    draws = as_draws(model, random_walk(model, 10).expand(4, -1, -1))
    with pytest.raises(ValueError, match="superchains"):
        weight_convergence(model, draws, superchains=superchains)


def test_statistics_that_are_not_numbers_do_not_pass() -> None:
    model = NETS["relu without depth"]()
    theta = random_walk(model, 40).expand(4, -1, -1)
    nothing = torch.full(theta.shape[:2], float("nan"), dtype=F64)
    for statistic, word in (
        ("acceptance_rate", "acceptance"),
        ("energy", "E-BFMI"),
        ("energy_variance", "energy errors"),
    ):
        draws = bf.Draws(
            theta,
            model.log_joint(theta),
            {statistic: nothing},
            info={"energy_variance": 1e-3},
        )
        assert any(word in reason for reason in diagnose(model, draws).reasons)


def test_what_cannot_be_compared_is_refused() -> None:
    model = NETS["relu without depth"]()
    theta = random_walk(model, 10)
    with pytest.raises(ValueError, match="2 chains of 4"):
        weight_convergence(model, as_draws(model, theta))
    with pytest.raises(ValueError, match="2 chains of 4"):
        weight_convergence(model, as_draws(model, theta[:, :3].expand(2, -1, -1)))
    weighted = bf.Draws(theta, model.log_joint(theta), log_weights=torch.zeros(1, 10))
    with pytest.raises(ValueError, match="weighted"):
        weight_convergence(model, weighted)


def test_the_table_names_the_worst_layer_and_the_picture_every_tensor() -> None:
    model = NETS["relu"]()
    theta = random_walk(model).repeat(4, 1, 1)
    theta[1:, :, model.spec.slices["2.bias"]] += torch.arange(1, 4, dtype=F64)[
        :, None, None
    ]
    result = weight_convergence(model, as_draws(model, theta), superchains=2)
    table = str(result)
    # scales carry a unit's bias into its weights
    assert result.worst_layer in ("2.bias", "2.weight")
    assert "2 superchains" in table
    (marked,) = [row for row in table.splitlines() if "worst layer" in row]
    assert marked.startswith(result.worst_layer)
    ax = plots.convergence(result).axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        *model.spec.names,
        "predictions",
    ]
