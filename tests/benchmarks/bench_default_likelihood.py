"""What likelihoods and priors cost beside a normal one of fixed noise: gradients, draws of a flow,
and log densities.

Diabetes (442 rows), 10-8-1 tanh, CPU seconds in one process; the informed flow is the default one,
untrained, which costs as much as a trained one. Run: ``python
tests/benchmarks/bench_default_likelihood.py [repeats]``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.seeding import isolated

REPEATS = int(sys.argv[1]) if len(sys.argv) > 1 else 1

LIKELIHOODS: dict[str, tuple[Any, int]] = {  # and outputs
    "Gaussian, fixed": (likelihoods.Gaussian(0.7), 1),
    "Gaussian": (likelihoods.Gaussian(), 1),
    "StudentT, fixed": (likelihoods.StudentT(4.0, 0.6), 1),
    "StudentT": (likelihoods.StudentT(), 1),
    "Heteroscedastic": (likelihoods.HeteroscedasticGaussian(), 2),
    "Heteroscedastic StudentT": (likelihoods.HeteroscedasticStudentT(), 2),
    "Poisson": (likelihoods.Poisson(), 1),
    "NegativeBinomial, fixed": (likelihoods.NegativeBinomial(0.2), 1),
    "NegativeBinomial": (likelihoods.NegativeBinomial(), 1),
    "Bernoulli": (likelihoods.Bernoulli(), 1),
    "Categorical": (likelihoods.Categorical(), 3),
    "Ordinal": (likelihoods.Ordinal(3), 1),
}
PRIORS = {
    "Normal": priors.Normal(1.0),
    "FanIn": priors.FanIn(),
    "Laplace": priors.Laplace(0.7),
    "StudentT": priors.StudentT(4.0, 0.7),
    "Hierarchical": priors.Hierarchical(),
    "Horseshoe": priors.Horseshoe(),
}


def problem(likelihood: Any, outputs: int, prior: Any) -> bf.BayesianModel:
    """Return the posterior: targets are standardised, counted or cut into classes, as the
    likelihood wants them.
    """
    x, y = (torch.as_tensor(part).double() for part in load_diabetes(return_X_y=True))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    if likelihood.discrete:
        y = (3 * (0.5 * y).exp()).round()
    elif likelihood.kind == "classification":
        classes = 3 if isinstance(likelihood, likelihoods.Ordinal) else max(2, outputs)
        y = torch.bucketize(y, y.quantile(torch.arange(1, classes).double() / classes))
    with isolated(torch.Generator().manual_seed(0)):
        net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, outputs))
    return bf.BayesianModel(
        net, prior, likelihood, x.float(), y.float() if y.is_floating_point() else y
    )


def informed(model: bf.BayesianModel) -> bf.Flow:
    """Return the flow of `fit_flow` with its default field, all but untrained."""
    training = bf.Training(steps=1, batch_size=8, learning_rate=1e-12)
    return bf.fit_flow(model, model.sample_prior(64, 0), training=training, progress=False)


def cost(work: Callable[[], Any], times: int) -> float:
    """Return the least CPU seconds of some runs, of which the first makes what is kept.

    Of one where that is long.
    """
    seconds: list[float] = []
    while len(seconds) <= times and (not seconds or seconds[0] < 5):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def prices(model: bf.BayesianModel) -> list[float]:
    """Return the CPU milliseconds of a gradient of one of 16 chains, of a draw of 64, and of a
    density of 4.

    A density is that many evaluations of the divergence as the path is rough; the last but one
    price is of one of them.
    """
    theta = 0.3 * torch.randn(16, model.dim, generator=torch.Generator().manual_seed(1))
    gradient = cost(
        lambda: [model.log_joint_and_grad(theta) for _ in range(20)], 3 * REPEATS
    ) / (20 * 16)
    flow = informed(model)
    draw = cost(lambda: flow.sample(64, 0), REPEATS) / 64
    drawn = flow.sample(4, 1)
    x, t = flow.start(4, 0), torch.tensor(0.5)
    with torch.no_grad():
        divergence = cost(lambda: flow.velocity.with_divergence(t, x), REPEATS) / 4
    density = cost(lambda: flow.log_prob(drawn), REPEATS) / 4
    return [1e3 * each for each in (gradient, draw, divergence, density)]


def main() -> None:
    """Print the table, and every price over that of fixed noise under a normal prior."""
    torch.set_num_threads(1)
    cases = [(likelihood, "Normal") for likelihood in LIKELIHOODS]
    cases += [
        (likelihood, prior)
        for prior in list(PRIORS)[1:]
        for likelihood in ("Gaussian, fixed", "Gaussian")
    ]
    print("ms of CPU, and times that of fixed noise\n")
    print(
        f"{'likelihood':24s} {'prior':13s} {'gradient':>16s} {'draw':>16s} {'divergence':>16s} "
        f"{'log density':>16s}"
    )
    unit: list[float] = []
    for likelihood, prior in cases:
        found = prices(problem(*LIKELIHOODS[likelihood], PRIORS[prior]))
        unit = unit or found
        columns = [
            f"{value:9.3f} {value / one:6.2f}"
            for value, one in zip(found, unit, strict=True)
        ]
        print(f"{likelihood:24s} {prior:13s} " + " ".join(columns), flush=True)


if __name__ == "__main__":
    main()
