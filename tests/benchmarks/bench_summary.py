"""A summary of every weight at scale: CPU seconds of ``bf.summary`` for 1,000 and for 10,000
weights, as they were drawn and aligned, of 4 x 500 draws.

The draws are of the prior, whose units know no order: the most work for alignment. One thread. Run:
``python tests/benchmarks/bench_summary.py``.
"""

import itertools
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn

import bnnflow as bf

NETWORKS = ((20, 20, 20, 10), (80, 12, 3), (20, 80, 80, 10), (100, 97, 3))
CHAINS, DRAWS = 4, 500


def main() -> None:
    torch.set_num_threads(1)
    print("network, tanh        weights   as drawn    aligned  CPU s")
    for widths in NETWORKS:
        layers = [
            layer
            for pair in itertools.pairwise(widths)
            for layer in (nn.Linear(*pair), nn.Tanh())
        ]
        x, y = torch.randn(50, widths[0]), torch.arange(50) % widths[-1]
        model = bf.BayesianModel(
            nn.Sequential(*layers[:-1]),
            bf.priors.Normal(1.0),
            bf.likelihoods.Categorical(),
            x,
            y,
        )
        theta = model.sample_prior(CHAINS * DRAWS, seed=0)
        log_joint = model.log_joint(theta).reshape(CHAINS, DRAWS)
        draws = bf.Draws(theta.reshape(CHAINS, DRAWS, -1), log_joint)
        bf.summary(model, draws)  # imports, and compiles where nothing is compiled yet
        times = []
        for aligned in (False, True):
            start = time.process_time()
            bf.summary(model, draws, aligned=aligned)
            times.append(time.process_time() - start)
        print(
            f"{'-'.join(map(str, widths)):18s} {model.dim:9,d} {times[0]:10.2f} {times[1]:10.2f}"
        )


if __name__ == "__main__":
    main()
