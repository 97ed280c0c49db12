"""Laws of the posterior's own targets: the mean of pairs, less noise, and a refusal where the draws
are others.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.transport import (
    AffinePath,
    GaussianVelocity,
    Matched,
    PosteriorTargets,
    Source,
    WeightsVelocity,
)
from bnnflow.transport.targets import obeys_stein
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.weights import Symmetries
from tests.problems import (
    F64,
    built,
    chain,
    conjugate,
    generator,
    normal,
    regression,
    tiny_network,
)

PATHS = [AffinePath(), AffinePath("variance_preserving")]
NOTHING = Symmetries(frozenset(), frozenset(), frozenset())


def network(
    widths: tuple[int, ...], activation: type[nn.Module] = nn.Tanh
) -> bf.BayesianModel:
    net = built(lambda: chain(*widths, activation=activation))
    return bf.BayesianModel(
        net,
        priors.Normal(),
        likelihoods.Gaussian(0.5),
        normal(6, widths[0]),
        normal(6, 1, seed=1),
    )


def orbit(model: bf.BayesianModel, group: Symmetries, theta: Tensor) -> Tensor:
    """Return every image of a network, ``(elements, dim)``."""
    choices = []
    for label, width in model.spec.widths.items():
        perms = itertools.permutations(range(width))
        signs = (
            itertools.product([1.0, -1.0], repeat=width)
            if label in group.sign
            else [(1.0,) * width]
        )
        choices.append(
            [(label, perm, sign) for perm, sign in itertools.product(perms, list(signs))]
        )
    images = []
    for element in itertools.product(*choices):
        moved = model.spec.permute(
            theta, {label: torch.tensor(perm) for label, perm, _ in element}
        )
        flips = {
            label: torch.tensor(sign, dtype=F64)
            for label, _, sign in element
            if label in group.sign
        }
        images.append(model.spec.flip(moved, flips) if flips else moved)
    return torch.stack(images)


@pytest.mark.crossed
@pytest.mark.parametrize(
    ("widths", "activation"),
    [
        ((1, 3, 1), nn.Tanh),
        ((2, 4, 1), nn.ReLU),
        ((1, 2, 2, 1), nn.Tanh),
        ((1, 2, 3, 1), nn.ReLU),
    ],
)
@pytest.mark.parametrize("t", [0.1, 0.4, 0.7])
def test_average_over_the_orbit_has_its_exact_mean_and_less_variance(widths, activation, t):
    model = network(widths, activation)
    context = WhitenedPosterior(model)
    group = context.source.symmetries(model)
    x1 = normal(model.dim, seed=3)
    x_t = (1 - t) * normal(model.dim, seed=4) + t * x1
    images = orbit(model, group, x1)
    chances = (-(x_t - t * images).square().sum(-1) / (2 * (1 - t) ** 2)).softmax(0)
    path = PosteriorTargets(AffinePath(), context, group, x1.expand(2, -1), generator())
    n = 20000
    drawn = images[torch.multinomial(chances, n, replacement=True, generator=generator(5))]
    c = AffinePath().coefficients(torch.full((n, 1), t, dtype=F64))
    means = path.averaged(x_t.expand(n, -1), drawn, context.grad(drawn), c, generator(6))
    exact = torch.stack([chances @ images, chances @ context.grad(images)])
    # some elements are too rare to be seen
    error = means.std(1) / n**0.5 + 1e-5 * exact.abs().amax(1, keepdim=True)
    assert ((means.mean(1) - exact).abs() < 4.5 * error).all()
    assert means[0].var(0).sum() < 0.7 * drawn.var(0).sum() + 1e-12


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_target_of_a_gaussian_posterior_is_the_field_itself(path, scale):
    model, mean, covariance = regression()
    source = Source.scaled(model, scale)
    exact = GaussianVelocity(mean / scale, covariance / scale**2, path)
    x1 = mean / scale + normal(500, 4) @ torch.linalg.cholesky(covariance).mT / scale
    informed = PosteriorTargets(
        path, WhitenedPosterior(model, source), NOTHING, x1, generator(), newton=True
    )
    assert informed.shares.mean() > 0.8
    # what they are, but for the noise of the few pairs that they are fitted to
    informed.shares[:] = 1
    t = torch.linspace(0.01, 0.99, 500, dtype=F64)
    x_t, target = informed.point(normal(500, 4, seed=7), x1, t, generator(1))
    assert torch.allclose(x_t, path.point(normal(500, 4, seed=7), x1, t, generator(1))[0])
    assert torch.allclose(target, exact(t, x_t), atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("t", [0.2, 0.6, 0.95])
def test_target_without_curvature_has_the_field_as_its_mean(path, temperature, t):
    known = conjugate(temperature=temperature)
    prior = known.model.flat_prior
    mean, covariance = prior.to_normal(known.mean), known.covariance / 1.5**2
    c = path.coefficients(torch.tensor(t, dtype=F64))
    x_t = normal(4, seed=2)
    # x1 given x_t: a Gaussian prior of x1 and the Gaussian likelihood of x_t.
    posterior = torch.linalg.inv(
        torch.linalg.inv(covariance) + torch.eye(4, dtype=F64) * (c.b / c.a) ** 2
    )
    centre = posterior @ (torch.linalg.solve(covariance, mean) + c.b / c.a**2 * x_t)
    x1 = centre + normal(20000, 4, seed=3) @ torch.linalg.cholesky(posterior).mT
    draws = mean + normal(500, 4, seed=5) @ torch.linalg.cholesky(covariance).mT
    informed = PosteriorTargets(
        path, WhitenedPosterior(known.model), NOTHING, draws, generator()
    )
    _, target = informed.point(
        (x_t - c.b * x1) / c.a, x1, torch.full((20000,), t, dtype=F64), generator(1)
    )
    exact = GaussianVelocity(mean, covariance, path)(
        torch.tensor(t, dtype=F64), x_t.unsqueeze(0)
    )
    assert ((target.mean(0) - exact[0]).abs() < 4 * target.std(0) / 20000**0.5 + 1e-9).all()


def test_noise_is_a_fraction_of_that_of_pairs_at_both_ends_of_the_path():
    model = tiny_network()
    context = WhitenedPosterior(model)
    x1 = bf.sample(model, bf.HMC(), chains=32, warmup=200, draws=100, seed=0).flat
    informed = PosteriorTargets(
        AffinePath(),
        context,
        context.source.symmetries(model),
        x1,
        generator(),
        newton=True,
    )
    for t, most in ((0.05, 0.1), (0.97, 0.05)):
        times = torch.full((len(x1),), t, dtype=F64)
        x0 = normal(*x1.shape, seed=1)
        x_t, pairs = AffinePath().point(x0, x1, times, generator())
        target = informed.point(x0, x1, times, generator())[1]
        # What a linear regression on x_t leaves over, an upper bound of the noise.
        design = torch.cat([x_t, torch.ones(len(x_t), 1, dtype=F64)], 1)
        left = [
            (each - design @ torch.linalg.lstsq(design, each).solution).square().sum()
            for each in (target, pairs)
        ]
        assert left[0] < most * left[1]


def test_large_data_are_used_in_batches():
    x = normal(3000, 2)
    net = built(lambda: chain(2, 3, 1, activation=nn.Tanh))
    model = bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(5.0), x, x[:, 0])
    theta = model.sample_prior(8, 0)
    context = WhitenedPosterior(model)
    group = context.source.symmetries(model)
    for newton in (False, True):
        path = PosteriorTargets(
            AffinePath(), context, group, theta, generator(), newton=newton
        )
        _, target = path.point(
            normal(8, model.dim),
            theta,
            torch.linspace(0.1, 0.9, 8, dtype=F64),
            generator(3),
        )
        assert target.isfinite().all()
        gradients = [
            path.on_some_rows(generator(seed), 8).grad(theta) for seed in range(400)
        ]
        mean, error = torch.stack(gradients).mean(0), torch.stack(gradients).std(0) / 20
        assert ((mean - context.grad(theta)).abs() < 5 * error).all()


def test_last_times_are_finite():
    model = tiny_network(dtype=torch.float32)
    context = WhitenedPosterior(model)
    x1 = model.sample_prior(64, 0)
    path = PosteriorTargets(
        AffinePath(), context, context.source.symmetries(model), x1, generator()
    )
    t = torch.tensor([0.0, 1e-8, 1 - 1e-4, 1 - 1e-6, 1 - 6e-8, 1.0]).repeat(10)
    x_t, target = path.point(
        normal(60, model.dim, dtype=torch.float32), x1[:60], t, generator()
    )
    for values in (x_t, target, path.loss_weight(t)):
        assert values.isfinite().all()


def test_stein_tells_draws_of_the_posterior_from_others():
    known = conjugate()
    context = WhitenedPosterior(known.model)
    prior = known.model.flat_prior
    exact = (
        known.mean + normal(2000, 4, seed=1) @ torch.linalg.cholesky(known.covariance).mT
    )
    narrow = known.mean + 0.5 * (exact - known.mean)
    assert obeys_stein(context, prior.to_normal(exact))
    assert not obeys_stein(context, prior.to_normal(narrow))
    assert not obeys_stein(context, prior.to_normal(known.mean.expand(50, -1)))
    assert not obeys_stein(context, normal(2000, 4))


def test_fit_chooses_targets_and_refuses_what_they_cannot_be():
    model = tiny_network(dtype=torch.float32)
    draws = bf.sample(model, bf.HMC(), chains=32, warmup=100, draws=20, seed=0)
    field = built(lambda: WeightsVelocity(model.spec, 8, 1), torch.float32)

    def targets(draws: bf.Draws | Tensor = draws, **options: Any) -> str:
        training, matching = (
            bf.Training(steps=2, batch_size=8),
            bf.transport.Matching(**options),
        )
        return bf.fit_flow(
            model, draws, velocity=field, training=training, matching=matching
        ).info["targets"]

    assert targets() == targets(targets="posterior") == "posterior"
    assert (
        targets(targets="pairs")
        == targets(coupling=Matched())
        == targets(path=AffinePath(sigma=0.1))
        == "pairs"
    )
    best = draws.flat[model.log_joint(draws.flat).argmax()].expand(100, -1)
    assert targets(best) == targets(model.sample_prior(200, 0)) == "pairs"
    with pytest.raises(ValueError, match="not independent"):
        targets(targets="posterior", coupling=Matched())
    with pytest.raises(ValueError, match="noise of its own"):
        targets(targets="posterior", path=AffinePath(sigma=0.1))
    with pytest.raises(ValueError, match="Stein"):
        targets(best, targets="posterior")
    with pytest.raises(ValueError, match="targets must be one of 'auto'"):
        targets(targets="best")
    with pytest.raises(ValueError, match="sigma = 0"):
        PosteriorTargets(
            AffinePath(sigma=0.1),
            WhitenedPosterior(model),
            NOTHING,
            draws.flat,
            generator(),
        )
