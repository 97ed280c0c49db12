"""What corrections of a small model cost: CPU seconds of every method, and how good its draws and
its evidence are.

Linear regression of 30 rows, 3 weights, whose posterior is known, with the default flow after 300
steps; and with ``diabetes`` a tanh network of 98 weights with the default likelihood, 200 draws.
One process, one thread. Run: ``python tests/benchmarks/bench_correct.py [method ...] [diabetes]``.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any, get_args

import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.seeding import isolated
from bnnflow.types import CorrectionMethod


def linear() -> bf.BayesianModel:
    """Return the regression on two inputs."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(30, 2, generator=g)
    y = x @ torch.tensor([[1.0], [-0.5]]) + 0.3 + 0.5 * torch.randn(30, 1, generator=g)
    with isolated(torch.Generator().manual_seed(0)):
        net = nn.Linear(2, 1)
    return bf.BayesianModel(net, priors.Normal(1.0), likelihoods.Gaussian(0.5), x, y)


def diabetes() -> bf.BayesianModel:
    """Return the network of 98 weights."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.as_tensor(part) for part in load_diabetes(return_X_y=True))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    with isolated(torch.Generator().manual_seed(0)):
        net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))
    return bf.BayesianModel(
        net, priors.Normal(1.0), likelihoods.Gaussian(), x.float(), y.float().unsqueeze(1)
    )


def closed_form(model: bf.BayesianModel) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return mean, standard deviations and log evidence of the linear model's posterior."""
    design = torch.cat(
        [model.x.double(), torch.ones(len(model.x), 1, dtype=torch.float64)], 1
    )
    y, eye = model.y.double().flatten(), torch.eye(3, dtype=torch.float64)
    covariance = torch.linalg.inv(design.T @ design / 0.25 + eye)
    marginal = 0.25 * torch.eye(len(y), dtype=torch.float64) + design @ design.T
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros_like(y), marginal
    ).log_prob(y)
    return covariance @ design.T @ y / 0.25, covariance.diagonal().sqrt(), float(evidence)


def fitted(model: bf.BayesianModel, steps: int) -> bf.Flow:
    """Return the default flow, fitted to draws of HMC."""
    draws = bf.sample(
        model, bf.HMC(), chains=16, warmup=500, draws=500, seed=0, progress=False
    )
    return bf.fit_flow(
        model, draws, seed=0, progress=False, training=bf.Training(steps=steps)
    )


def corrected(
    flow: bf.Flow, model: bf.BayesianModel, n: int, method: Any
) -> tuple[float, bf.Draws]:
    """Return the CPU seconds and the draws."""
    began = time.process_time()
    fixed = bf.correct(model, flow, n, method, seed=0, progress=False)
    return time.process_time() - began, fixed


def main(arguments: list[str]) -> None:
    """Print a line for each method, and one for the larger model if it is asked for."""
    torch.set_num_threads(1)
    methods = [each for each in arguments if each != "diabetes"] or list(
        get_args(CorrectionMethod)
    )
    model = linear()
    flow, (mean, sd, evidence) = fitted(model, 300), closed_form(model)
    print(
        f"{'method':11s} {'CPU s':>6s} {'ESS':>6s} {'densities':>9s} {'mean / error':>12s} "
        f"{'sd':>12s} evidence"
    )
    for method in methods:
        seconds, fixed = corrected(flow, model, 4000, method)
        theta = fixed.flat.double()
        logs = (
            torch.zeros(len(theta))
            if fixed.log_weights is None
            else fixed.log_weights.flatten()
        )
        share = logs.double().softmax(0).unsqueeze(1)
        centre = (share * theta).sum(0)
        off = float(((centre - mean) / sd).abs().max()) * math.sqrt(fixed.info["ess"])
        ratio = (share * (theta - centre).square()).sum(0).sqrt() / sd
        value, error = fixed.log_evidence or (math.nan, math.nan)
        print(
            f"{method:11s} {seconds:6.1f} {fixed.info['ess']:6.0f} "
            f"{fixed.info['density_solves']:9d} {off:12.2f} "
            f"{float(ratio.min()):5.3f}-{float(ratio.max()):5.3f} {value - evidence:+.4f} +- "
            f"{error:.4f}",
            flush=True,
        )
    if "diabetes" in arguments:
        model = diabetes()
        seconds, fixed = corrected(fitted(model, 200), model, 200, "auto")
        print(
            f"diabetes, 98 weights, 200 draws: {seconds:.0f} CPU s, "
            f"{fixed.info['density_solves']} densities"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
