"""What a divergence costs: the closed trace of a field with two hidden layers against Jacobians and
estimates.

CPU seconds of one thread, float32, velocity included. Run:
``python tests/benchmarks/bench_trace.py [dim] [batch]``; the published figures used 200 and 128.
"""

import sys
import time
from collections.abc import Callable

import torch

from bnnflow.transport.divergence import (
    exact_divergence,
    hutchinson_divergence,
    hutchpp_divergence,
    probe_noise,
)
from bnnflow.transport.two_layer import TwoLayerVelocity

DIM = int(sys.argv[1]) if len(sys.argv) > 1 else 200
BATCH = int(sys.argv[2]) if len(sys.argv) > 2 else 128
WIDTH = 256


def cpu(function: Callable[[], object], repeats: int) -> float:
    """Return the least CPU seconds of a call."""
    function()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    field = TwoLayerVelocity(DIM, WIDTH).requires_grad_(False)
    for parameter in field.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    x, t = torch.randn(BATCH, DIM, generator=generator), torch.tensor(0.4)

    def along(z: torch.Tensor) -> torch.Tensor:
        return field(t, z)

    def one(z: torch.Tensor) -> torch.Tensor:
        return field(t, z.unsqueeze(0)).squeeze(0)

    def jacobian(mode: Callable) -> torch.Tensor:
        return torch.func.vmap(mode(one))(x).diagonal(dim1=1, dim2=2).sum(-1)

    def loop() -> torch.Tensor:
        z = x.clone().requires_grad_()
        with torch.enable_grad():
            v = field(t, z)
            return sum(
                torch.autograd.grad(v[:, i].sum(), z, retain_graph=True)[0][:, i]
                for i in range(DIM)
            )

    def probes(n: int) -> torch.Tensor:
        return probe_noise("rademacher", n, x, generator)

    with torch.no_grad():
        exact = field.with_divergence(t, x)[1]
        base = cpu(lambda: field.with_divergence(t, x), 50)
        print(
            f"dim {DIM}, batch {BATCH}, width {WIDTH}; ms of CPU time a call, velocity included"
        )
        print(f"{'velocity alone':44s} {cpu(lambda: field(t, x), 50) * 1e3:9.2f}")
        print(f"{'closed trace':44s} {base * 1e3:9.2f}")
        whole = {
            "vmapped Jacobian, forward mode": lambda: jacobian(torch.func.jacfwd),
            "vmapped Jacobian, reverse mode": lambda: jacobian(torch.func.jacrev),
            "looped reverse mode": loop,
            "divergence without it, forward mode": lambda: exact_divergence(
                along, x, mode="forward"
            )[1],
            "divergence without it, reverse mode": lambda: exact_divergence(along, x)[1],
        }
        for name, function in whole.items():
            seconds = cpu(function, 3)
            error = float((function() - exact).abs().max())
            print(
                f"{name:44s} {seconds * 1e3:9.2f} {seconds / base:8.0f} x   largest difference "
                f"{error:.1e}"
            )
        estimates = {"Hutchinson": hutchinson_divergence, "Hutch++": hutchpp_divergence}
        for name, estimate in estimates.items():
            for n in (1, 9, 30) if name == "Hutchinson" else (9, 30):
                fixed = probes(n)
                seconds = cpu(lambda f=estimate, p=fixed: f(along, x, p), 10)
                drawn = [
                    estimate(along, x, probes(n))[1].reshape(-1, BATCH).mean(0)
                    for _ in range(50)
                ]
                sd = float(torch.stack(drawn).std(0).mean())
                label = f"{name}, {n} probe{'s' if n > 1 else ''}"
                print(
                    f"{label:44s} {seconds * 1e3:9.2f} {seconds / base:8.1f} x   sd {sd:.2f} nats"
                )


if __name__ == "__main__":
    main()
