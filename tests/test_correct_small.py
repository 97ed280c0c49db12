"""Corrections of a model of few weights: closed forms at every scale, many short chains, the cheapest rule that does."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.draws import as_theta
from bnnflow.gaussian import Gaussian
from bnnflow.inference.trajectories import metropolis
from bnnflow.transport import Flow, GaussianVelocity, GaussNewtonFlow
from bnnflow.transport.importance import mixing
from bnnflow.transport.latent import Latent, log_normal, rotation
from bnnflow.types import Trace
from tests.problems import F64, built, check_moments, collected, conjugate, generator

MODULE = importlib.import_module("bnnflow.transport.latent")


def linear(unit: float = 1.0, inputs: float = 1.0) -> tuple[bf.BayesianModel, Tensor, Tensor, float]:
    """Return a linear regression in other units, with mean, covariance and log evidence of its posterior."""
    g = generator(1)
    x = torch.randn(30, 2, generator=g, dtype=F64)
    y = x @ torch.tensor([1.0, -0.5], dtype=F64) + 0.3 + 0.5 * torch.randn(30, generator=g, dtype=F64)
    x, y, noise = inputs * x, unit * y, 0.5 * unit
    scale = unit * torch.tensor([1 / inputs, 1 / inputs, 1.0], dtype=F64)
    prior = priors.Normal({"weight": float(scale[0]), "bias": unit})
    net = built(lambda: nn.Linear(2, 1))
    model = bf.BayesianModel(net, prior, likelihoods.Gaussian(noise), x.float(), y.float().unsqueeze(1))
    design = torch.cat([model.x.double(), torch.ones(30, 1, dtype=F64)], 1) * scale / noise
    targets = model.y.double().squeeze(1) / noise
    precision = design.T @ design + torch.eye(3, dtype=F64)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (design.T @ targets)
    energy = targets @ targets - mean @ precision @ mean
    evidence = -0.5 * energy - 0.5 * precision.logdet() - 15 * math.log(2 * math.pi) - 30 * math.log(noise)
    return model, scale * mean, scale[:, None] * covariance * scale, float(evidence)


def check_draws(fixed: bf.Draws, mean: Tensor, covariance: Tensor, ess: float) -> None:
    theta, weights = as_theta(fixed)
    share = torch.full((len(theta),), 1 / len(theta), dtype=F64) if weights is None else weights.exp()
    sd = covariance.diagonal().sqrt()
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance / sd / sd[:, None]), ((theta - mean) / sd).T, upper=False
    )
    assert ((share * white).sum(1).abs() < 4.5 / math.sqrt(ess)).all()
    assert ((share * (white**2 - 1)).sum(1).abs() < 4.5 * math.sqrt(2 / ess)).all()


# ---------------------------------------------------------------- the closed form, in any units


@pytest.mark.parametrize(("unit", "inputs"), [(1.0, 1.0), (1e-8, 1.0), (1e8, 1.0), (1.0, 1e-8), (1.0, 1e8)])
@pytest.mark.parametrize("method", ["importance", "resample", "refine", "smc", "metropolis"])
def test_a_linear_regression_is_corrected_in_any_units(method: Any, unit: float, inputs: float) -> None:
    model, mean, covariance, evidence = linear(unit, inputs)
    flow = GaussNewtonFlow(model, steps=8)
    fixed = bf.correct(flow, model, 600, method, seed=0)
    assert fixed.verdict.startswith("trust after correction")
    assert fixed.ess > 300
    check_draws(fixed, mean, covariance, min(fixed.ess, 600))
    value, error = fixed.log_evidence
    assert error < 0.15
    assert abs(value - evidence) < 4 * error + 0.02
