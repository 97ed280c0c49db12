"""Modes where the density has kinks: found, and told from places where a search has only
stopped.
"""

import numpy as np
import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.inference.approximate import kinks, laplace
from tests.problems import one_in

F64 = torch.float64


def relu_model(seed: int, kind: str, widths: tuple[int, ...]) -> bf.BayesianModel:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 3, generator=g, dtype=F64)
    y = x[:, 0].abs() - x[:, 1] * x[:, 2] + 0.3 * torch.randn(60, generator=g, dtype=F64)
    likelihood, outputs = likelihoods.Gaussian(None if kind == "learned noise" else 0.3), 1
    if kind == "classes":
        likelihood, outputs, y = (
            likelihoods.Categorical(),
            3,
            (y > 0).long() + (y > 1).long(),
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        modules: list[nn.Module] = []
        for n_in, n_out in zip((3, *widths), (*widths, outputs), strict=True):
            modules += [nn.Linear(n_in, n_out), nn.ReLU()]
        net = nn.Sequential(*modules[:-1]).double()
    return bf.BayesianModel(net, priors.Normal(), likelihood, x, y)


@pytest.mark.parametrize(
    ("kind", "widths", "seed"),
    one_in(
        2,
        [
            ("values", (8,), 0),
            ("values", (8,), 1),
            ("values", (20,), 0),
            ("values", (6, 6), 1),
            ("learned noise", (6,), 0),
            ("classes", (8,), 0),
            ("classes", (6, 6), 1),
        ],
    ),
)
def test_relu_networks_have_modes(kind: str, widths: tuple[int, ...], seed: int) -> None:
    """No warning, and no point of a cloud around the mode that is clearly higher."""
    model = relu_model(seed, kind, widths)
    draws = bf.sample(model, bf.Laplace(starts=3, steps=400), draws=400, seed=seed)
    assert draws.info["converged"]
    assert draws.log_evidence is not None
    mode, top = draws.posterior.loc, draws.info["log_joint_mode"]
    g = torch.Generator().manual_seed(9)
    for size in (1e-4, 1e-2, 0.1):
        offsets = (
            torch.randn(500, model.dim, generator=g, dtype=F64)
            @ draws.posterior.scale_tril.T
        )
        assert (
            float(model.log_joint(mode + size * offsets).max())
            < top + draws.info["left_to_gain"] + 1e-6
        )


def test_a_search_that_has_only_stopped_is_no_mode() -> None:
    model = relu_model(0, "values", (8,))
    with pytest.warns(UserWarning, match=r"no mode was found: .* promises .* nats"):
        draws = bf.sample(model, bf.Laplace(starts=1, steps=1, polish=1), draws=2, seed=0)
    assert not draws.info["converged"]
    assert draws.log_evidence is None
    assert bf.diagnose(model, draws).verdict == "do not trust"


def test_the_mode_of_a_laplace_prior_lies_in_its_kink() -> None:
    """An input that says nothing has a weight of exactly zero there (the lasso)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=g, dtype=F64)
    y = x[:, 0] + 0.5 * torch.randn(200, generator=g, dtype=F64)
    with torch.random.fork_rng(devices=[]):
        net = nn.Linear(3, 1, bias=False).double()
    model = bf.BayesianModel(net, priors.Laplace(0.01), likelihoods.Gaussian(0.5), x, y)
    theta = torch.zeros(3, dtype=F64)
    for _ in range(2000):  # proximal gradient
        theta = theta + (x.T @ (y - x @ theta)) / 0.25 / 2000
        theta = theta.sign() * (theta.abs() - 100 / 2000).clamp(min=0)
    mode, info = laplace.find_mode(model, torch.tensor([0.5, -0.3, 0.2], dtype=F64), 2000)
    assert (theta == 0).sum() == 2
    torch.testing.assert_close(mode, theta, rtol=0, atol=1e-4)
    assert info["converged"]


def ridged(matrix: np.ndarray, slopes: np.ndarray):
    """Return 1/2 x^T A x + sum_i |x_i| c_i - x^T b with its minimum at x = 0 where |b| <= c."""

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        value = 0.5 * x @ matrix @ x + slopes @ np.abs(x)
        return float(value), matrix @ x + slopes * np.sign(x)

    return function


def test_bfgs_ends_in_the_corner() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    function = ridged(root @ root.T + np.eye(6), np.array([3.0, 2.0, 1.0, 0.0, 0.0, 0.0]))
    found = kinks.minimise(function, rng.normal(size=6), np.eye(6), 500)
    assert np.abs(found).max() < 1e-5


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_what_is_left_to_gain_is_the_shortest_mixture(scale: float) -> None:
    cases = [
        ([[3.0, 4.0]], [3.0, 4.0]),
        ([[1.0, 1.0], [-1.0, 1.0], [0.0, -5.0]], [0.0, 0.0]),
        ([[1.0, 2.0], [1.0, -3.0], [4.0, 0.0]], [1.0, 0.0]),
        ([[0.0, 0.0], [1.0, 0.0]], [0.0, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
    ]
    for gradients, shortest in cases:
        found = kinks.shortest_mixture(scale * np.array(gradients))
        np.testing.assert_allclose(
            found, scale * np.array(shortest), rtol=0, atol=1e-5 * scale
        )
