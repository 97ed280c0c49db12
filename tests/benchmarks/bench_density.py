"""Log densities where the truth is known: Bayesian linear regression, 4 weights, float64.

The closed-form field shows the solver's error, a trained one that of training. Run:
``python tests/benchmarks/bench_density.py [seconds of training]``; the published figures used 60.
"""

import sys
import time

import torch

import bnnflow as bf
from bnnflow.transport import GaussianVelocity, Solver

BUDGET = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0


def linear_regression(
    dtype: torch.dtype,
) -> tuple[bf.BayesianModel, bf.Gaussian, torch.Tensor]:
    """Return the model, its exact posterior, and the posterior's covariance."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    y = (
        x @ torch.tensor([1.0, -2.0, 0.5]).double()
        + 0.3
        + 0.5 * torch.randn(30, generator=generator).double()
    )
    net = torch.nn.Linear(3, 1, dtype=dtype)
    model = bf.BayesianModel(net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.5), x, y)
    design = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    covariance = torch.linalg.inv(
        design.T @ design / 0.25 + torch.eye(4, dtype=torch.float64)
    )
    mean = covariance @ (design.T @ y / 0.25)
    return model, bf.Gaussian(mean, torch.linalg.cholesky(covariance)), covariance


def main() -> None:
    torch.set_num_threads(1)
    model, exact, covariance = linear_regression(torch.float64)
    theta = exact.sample(200, 0)
    flow = bf.Flow.of(GaussianVelocity(exact.loc, covariance), model)
    print("closed-form field, float64: largest |log q - log p| over 200 posterior draws")
    for solver in ("midpoint", "rk4"):
        for steps in (16, 32, 64, 128):
            error = (
                (flow.log_prob(theta, solver=Solver(solver, steps)) - exact.log_prob(theta))
                .abs()
                .max()
            )
            print(f"  {solver:9s} {steps:4d} steps {float(error):.1e}", flush=True)

    model, exact, _ = linear_regression(torch.float32)
    draws = exact.sample(20000, 1).float()
    for velocity in ("weights", "informed"):
        flow = bf.fit_flow(
            model, draws, velocity=velocity, seed=0, training=bf.Training(budget=BUDGET)
        )
        sampled, log_q = flow.sample_with_log_prob(2000, 2, solver=Solver("rk4", 16))
        held_out = exact.sample(2000, 3).float()
        began = time.perf_counter()
        forward = log_q - exact.log_prob(sampled.double())
        reverse = exact.log_prob(held_out.double()) - flow.log_prob(
            held_out, solver=Solver("rk4", 16)
        )
        print(
            f"trained {velocity} field, {flow.info['cpu_seconds']:.0f} CPU s, {flow.info['steps']} "
            f"steps: KL(q|p) {float(forward.mean()):.4f} +- "
            f"{float(forward.std()) / 2000**0.5:.4f}, KL(p|q) {float(reverse.mean()):.4f} +- "
            f"{float(reverse.std()) / 2000**0.5:.4f}, mean |log q - log p| "
            f"{float(reverse.abs().mean()):.4f} nats "
            f"({(time.perf_counter() - began) / 2000 * 1e3:.1f} ms a log density)",
            flush=True,
        )


if __name__ == "__main__":
    main()
