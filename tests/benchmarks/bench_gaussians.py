"""From N(0, I) to N(1, I) on the 802 weights of 30-16-16-2: does a learned field keep the spread?

The marginal field of such pairs is (x1_hat - x) / (1 - t). Whoever integrates x1_hat - x0 instead
ends with too little spread (0.49 in place of 1, exact denoiser). Here a `WeightsVelocity` learns
the velocity; no Gaussian in closed form, no noise injected. 40,000 draws, so that the standard
error of each weight's spread is 0.35%. One thread, CPU seconds. Run: ``python
tests/benchmarks/bench_gaussians.py [steps of training]``.
"""

import sys
import time

import torch
from torch import Tensor, nn

from bnnflow import WeightSpec
from bnnflow.transport import Training, WeightsVelocity, integrate, time_grid, train

DRAWS = 40_000
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 500


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)]
    spec = WeightSpec.of(nn.Sequential(*layers))

    def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x0, x1 = torch.randn(2, n, spec.dim, generator=generator)
        return x0, x1 + 1

    field, info = train(
        WeightsVelocity(spec, 8, 1),
        pairs,
        seed=0,
        training=Training(steps=STEPS, batch_size=64),
    )
    print(
        f"{spec.dim} weights, {info['steps']} steps, {info['cpu_seconds']:.0f} CPU s, loss "
        f"{info['loss']:.1f}"
    )
    print(
        "                         mean of each weight    standard deviation of each weight "
        "(asked: 0.97 to 1.03)"
    )
    for name, solver, grid in (
        ("RK4, 8 steps", "rk4", time_grid(8)),
        ("Euler, 100 equal steps", "euler", torch.linspace(0, 1, 101, dtype=torch.float64)),
    ):
        began, ends = time.process_time(), []
        with torch.no_grad():
            for x0 in torch.randn(
                DRAWS, spec.dim, generator=torch.Generator().manual_seed(1)
            ).split(256):
                ends += integrate(
                    lambda t, state: (field(t, state[0]),), (x0,), grid, solver
                )  # type: ignore[arg-type]
        x1 = torch.cat(ends)
        mean, sd, seconds = x1.mean(0), x1.std(0), time.process_time() - began
        print(
            f"{name:22s}   {float(mean.min()):.4f} to {float(mean.max()):.4f}       "
            f"{float(sd.min()):.4f} to {float(sd.max()):.4f}, mean {float(sd.mean()):.4f}   "
            f"{seconds:.0f} CPU s, {DRAWS / seconds:.0f} draws a second",
            flush=True,
        )


if __name__ == "__main__":
    main()
