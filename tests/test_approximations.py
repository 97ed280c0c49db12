"""Laws of the approximations: closed forms on conjugate regression, densities that integrate, and known bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module], dtype: torch.dtype = F64) -> nn.Module:
    """Build a network from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().to(dtype)


class Conjugate(NamedTuple):
    """Bayesian linear regression with fixed noise, and its posterior."""

    model: bf.BayesianModel
    mean: Tensor
    covariance: Tensor
    log_evidence: float


def conjugate(n: int = 25, dtype: torch.dtype = F64, temperature: float = 1.0, correlation: float = 0.0) -> Conjugate:
    """Return the problem at a temperature; the evidence is that at temperature 1."""
    g, noise, scale = generator(1), 0.5, 1.5
    x = torch.randn(n, 3, generator=g, dtype=F64)
    x = torch.stack([x[:, 0], correlation * x[:, 0] + x[:, 1], x[:, 2]], 1)
    y = x @ torch.tensor([1.0, -0.5, 0.02], dtype=F64) + 0.3 + noise * torch.randn(n, generator=g, dtype=F64)
    net = built(lambda: nn.Linear(3, 1), dtype)
    model = bf.BayesianModel(net, priors.Normal(scale), likelihoods.Gaussian(noise), x, y, temperature=temperature)
    design = torch.cat([x, torch.ones(n, 1, dtype=F64)], 1)
    covariance = torch.linalg.inv(design.T @ design / noise**2 + torch.eye(4, dtype=F64) / scale**2)
    marginal = noise**2 * torch.eye(n, dtype=F64) + scale**2 * design @ design.T
    evidence = torch.distributions.MultivariateNormal(torch.zeros(n, dtype=F64), marginal).log_prob(y)
    return Conjugate(model, covariance @ design.T @ y / noise**2, temperature * covariance, float(evidence))
