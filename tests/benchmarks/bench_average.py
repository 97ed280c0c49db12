"""Model averages at scale: 10,000 draws of a 30-16-16-2 network on 50,000 rows, what each quantity
takes in CPU seconds and in memory beyond its result.

Run: ``python tests/benchmarks/bench_average.py [draws] [rows] [quantity]``; without a quantity each
is measured in a process of its own, since a peak of memory cannot be taken back.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import bnnflow as bf

QUANTITIES: dict[str, Callable[[bf.predictive.Prediction], torch.Tensor]] = {
    "probs": lambda prediction: prediction.probs,
    "log_prob": lambda prediction: prediction.log_prob(torch.arange(len(prediction)) % 2),
    "sample of 100": lambda prediction: prediction.sample(100, seed=0),
}


def measured(quantity: str, draws: int, rows: int) -> str:
    """Return a line of the table."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.nn.Linear(30, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16)]
    net = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(16, 2))
    x = torch.randn(rows, 30, generator=generator)
    likelihood = bf.likelihoods.Categorical()
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), likelihood, x[:100], torch.arange(100) % 2
    )
    prediction = bf.predict(model, model.sample_prior(draws, seed=0), x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = time.process_time(), time.perf_counter()
    result = QUANTITIES[quantity](prediction)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    beyond = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    beyond -= result.numel() * result.element_size() / 2**20
    return f"{quantity:15s} {cpu:9.1f} {wall:9.1f} {max(0.0, beyond):12.0f}"


def main() -> None:
    given = sys.argv[1:]
    draws, rows = (
        int(given[i]) if len(given) > i else default
        for i, default in enumerate((10_000, 50_000))
    )
    if len(given) > 2:
        print(measured(given[2], draws, rows))
        return
    print(f"{draws:,} draws, {rows:,} rows, {torch.get_num_threads()} threads")
    print("                  CPU s    wall s  MB beyond result")
    for quantity in QUANTITIES:
        command = [sys.executable, __file__, str(draws), str(rows), quantity]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
