"""Symmetry and density errors of a trained likelihood-informed flow on iris, as figures.

Loads the flows that ``bench_iris.py`` saved under out/. Run:
``python tests/benchmarks/bench_laws.py``.
"""

import time

import torch
from bench_iris import iris

import bnnflow as bf
from bnnflow.transport import Density, Solver

DRAWS = 64


def main() -> None:
    torch.set_num_threads(1)
    model, _, _ = iris()
    generator = torch.Generator().manual_seed(0)
    for name in ("informed", "weights"):
        flow = bf.load(f"out/iris-{name}.npz", model)
        assert isinstance(flow, bf.Flow)
        print(f"{name} field")
        for dtype in (torch.float32, torch.float64):
            field = flow.to("cpu", dtype).velocity
            x = torch.randn(256, model.dim, generator=generator).to(dtype)
            t = torch.rand(256, generator=generator).to(dtype)
            v = field(t, x)
            moved_x, moved_v = model.spec.transform(flow.velocity.symmetries, 1, x, v)
            error = (field(t, moved_x) - moved_v).abs().max() / v.abs().max()
            print(f"  equivariance error over max |v|, {dtype}: {float(error):.1e}")

        began = time.perf_counter()
        theta, log_q = flow.sample_with_log_prob(DRAWS, 1, solver=Solver("midpoint", 16))
        seconds = time.perf_counter() - began
        print(
            f"  exact log q with its draw, 16 midpoint steps: {seconds / DRAWS * 1e3:.0f} ms"
        )
        log_weights = model.log_joint(theta) - log_q
        print(
            f"  log weights of {DRAWS} draws: mean {float(log_weights.mean()):.2f}, sd "
            f"{float(log_weights.std()):.2f}"
        )
        for noise in ("rademacher", "gaussian"):
            began = time.perf_counter()
            estimate = flow.log_prob(
                theta,
                solver=Solver(steps=16),
                density=Density(trace="hutchinson", probes=8, noise=noise),
            )
            difference = estimate - log_q
            error = float(difference.std()) / DRAWS**0.5
            print(
                f"  Hutchinson, 8 {noise} probes: mean difference {float(difference.mean()):+.2f} "
                f"+- {error:.2f}, sd {float(difference.std()):.2f} nats, "
                f"{(time.perf_counter() - began) / DRAWS * 1e3:.0f} ms"
            )
        double = flow.to("cpu", torch.float64)
        for steps in (8, 16, 32):
            theta, forward = double.sample_with_log_prob(8, 2, solver=Solver("rk4", steps))
            reverse = double.log_prob(theta, solver=Solver("rk4", steps))
            print(
                f"  forward against reverse log q, {steps} RK4 steps: "
                f"{float((forward - reverse).abs().max()):.1e} nats"
            )


if __name__ == "__main__":
    main()
