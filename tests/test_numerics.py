"""Laws that hold at every scale: what is exact stays exact, and what cannot be is said."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.transport import GaussNewton, time_grid

F64 = torch.float64


class Regression(NamedTuple):
    """Linear regression with fixed noise, its posterior and its evidence."""

    model: bf.BayesianModel
    mean: Tensor
    covariance: Tensor
    log_evidence: float

    def standardised(self, theta: Tensor) -> Tensor:
        """Return weights ``(..., dim)`` in coordinates in which the posterior is standard normal."""
        root = torch.linalg.cholesky(self.covariance)
        offset = (theta.double() - self.mean).reshape(-1, len(self.mean)).T
        return torch.linalg.solve_triangular(root, offset, upper=False).T


def regression(
    inputs: int = 2,
    outputs: int = 1,
    rows: int = 30,
    *,
    noise: float = 0.5,
    data: float = 1.0,
    scale: float = 1.0,
    loc: float = 0.0,
    temperature: float = 1.0,
    dtype: torch.dtype = F64,
) -> Regression:
    """Return y = W x + b + noise; data, noise and prior have the scales that are given."""
    g = torch.Generator().manual_seed(0)
    x = data * torch.randn(rows, inputs, generator=g, dtype=F64)
    weights = loc + scale * torch.randn(outputs, inputs + 1, generator=g, dtype=F64)
    design = torch.cat([x, torch.ones(rows, 1, dtype=F64)], 1)
    y = design @ weights.T + noise * torch.randn(rows, outputs, generator=g, dtype=F64)
    with torch.random.fork_rng(devices=[]):
        net = nn.Linear(inputs, outputs).to(dtype)
    model = bf.BayesianModel(
        net, priors.Normal(scale, loc), likelihoods.Gaussian(noise), x.to(dtype), y.to(dtype), temperature=temperature
    )
    dim = inputs + 1
    # In units of the prior: covariance (A^T A + I)^-1 by the singular values of A, exact at every scale.
    u, s, v = torch.linalg.svd(scale * design / noise, full_matrices=True)
    s = torch.cat([s, s.new_zeros(dim - len(s))])
    residual = (y - loc * design.sum(1, keepdim=True)) / noise
    along = u.T[: len(s)] @ residual  # (singular values, outputs)
    along = torch.cat([along, along.new_zeros(dim - len(along), outputs)])
    each = scale**2 * (v.T / (1 + s.square())) @ v
    means = loc + scale * v.T @ (s / (1 + s.square())).unsqueeze(1).mul(along)  # (dim, outputs)
    of_weights = [o * dim + i for o in range(outputs) for i in range(inputs)]
    places = of_weights + [o * dim + inputs for o in range(outputs)]  # the weights of each output, then the biases
    covariance = torch.block_diag(*[each] * outputs)[places][:, places]
    mean = means.T.reshape(-1)[places]
    # y ~ N(loc, noise^2 (I + A A^T)); at T = 1
    inside = residual.square().sum() - (s.square() / (1 + s.square())).unsqueeze(1).mul(along.square()).sum()
    value = -0.5 * inside - 0.5 * outputs * torch.log1p(s.square()).sum()
    value = value - rows * outputs * (0.5 * torch.log(torch.tensor(2 * torch.pi)) + torch.log(torch.tensor(noise)))
    return Regression(model, mean, temperature * covariance, float(value))


# ---------------------------------------------------------------- Gauss-Newton flows of linear models

SHAPES = [
    {},
    {"rows": 1},
    {"rows": 500},
    {"inputs": 1, "rows": 3},
    {"inputs": 20, "rows": 25},
    {"inputs": 3, "outputs": 2},
    {"noise": 0.01},
    {"noise": 10.0},
    {"data": 1e3},
    {"data": 1e-3},
    {"scale": 10.0, "noise": 0.01},
    {"scale": 0.1, "loc": 2.0},
    {"scale": 1e3, "loc": -2e3, "data": 1e-3},
    {"temperature": 0.25},
    {"temperature": 3.0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("displacement", [GaussNewton(), GaussNewton(2)], ids=["one step", "two steps"])
def test_a_gauss_newton_flow_is_exact_for_linear_gaussian_models(shape, displacement):
    """Its map is affine: where it takes a basis tells the mean and the covariance of all draws."""
    problem = regression(**shape)
    flow = bf.GaussNewtonFlow(problem.model, displacement, solver="rk4")
    basis = torch.cat([torch.zeros(1, flow.dim, dtype=F64), torch.eye(flow.dim, dtype=F64)])
    found = problem.standardised(flow.push(basis, steps=time_grid(60, 8.0)).detach())
    matrix = (found[1:] - found[0]).T
    assert found[0].abs().max() < 1e-6
    assert (matrix @ matrix.T - torch.eye(flow.dim, dtype=F64)).abs().max() < 2e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_second_gauss_newton_step_finds_nothing_left_to_do_in_single_precision(shape):
    problem = regression(**shape, dtype=torch.float32)
    x = torch.randn(8, problem.model.dim, generator=torch.Generator().manual_seed(1))
    fields = [bf.GaussNewtonFlow(problem.model, GaussNewton(steps)).velocity for steps in (1, 2)]
    for t in (0.0, 0.5, 0.99):
        one, two = (field(torch.tensor(t), x) for field in fields)
        assert (one - two).norm() < 1e-3 * one.norm()
