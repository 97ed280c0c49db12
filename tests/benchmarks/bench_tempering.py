"""Evidence and R-hat of posteriors whose modes chains never leave: parallel tempering, SMC and HMC.

Narrow networks 1-H-1 tanh with 40 rows and noise 0.1: two waves, a faster and a fastest one, and
steps. "Long" is the evidence of a run of parallel tempering many times as long. R-hat is the worst
of the predictions at ten rows. ``--yacht`` adds 6-16-16-1 ReLU with learned noise on yacht (R-hat
of the predictions at the test rows), which takes a quarter of an hour. Run: ``python
tests/benchmarks/bench_tempering.py [--seeds 2] [--long 2000] [--yacht] [NAME ...]``.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.diagnostics import rhat

NOISE, ROWS = 0.1, 40
METHOD = bf.ParallelTempering()
SIZES = {"chains": 8, "warmup": 150, "draws": 400}
LONG = {"chains": 16, "warmup": 500}
PARTICLES, RUNS = 250, 4


class Problem(NamedTuple):
    """What is fitted, and how."""

    function: Callable[[Tensor], Tensor]
    hidden: int
    scale: float  # of the prior


PROBLEMS = {
    "sin 2x": Problem(lambda x: (2 * x).sin(), 3, 1.0),
    "sin 4x": Problem(lambda x: (4 * x).sin(), 4, 2.0),
    "sin 6x": Problem(lambda x: (6 * x).sin(), 8, 3.0),
    "steps": Problem(lambda x: (x > 0.3).float() - (x < -0.7).float(), 6, 3.0),
}


def narrow(problem: Problem) -> bf.BayesianModel:
    """Return the posterior of a narrow network."""
    g = torch.Generator().manual_seed(1)
    x = 4 * torch.rand(ROWS, 1, generator=g) - 2
    y = problem.function(x) + NOISE * torch.randn(ROWS, 1, generator=g)
    net = nn.Sequential(
        nn.Linear(1, problem.hidden), nn.Tanh(), nn.Linear(problem.hidden, 1)
    )
    prior, likelihood = bf.priors.Normal(problem.scale), bf.likelihoods.Gaussian(NOISE)
    return bf.BayesianModel(net, prior, likelihood, x, y)


def yacht() -> tuple[bf.BayesianModel, Tensor]:
    """Return the posterior of yacht with learned noise, and test rows."""
    data = bf.data.load("yacht")
    net = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
    )
    prior, likelihood = bf.priors.Normal(1.0), bf.likelihoods.Gaussian()
    return (
        bf.BayesianModel(net, prior, likelihood, data.x_train, data.y_train),
        data.x_test,
    )


def timed(model: bf.BayesianModel, method: Any, **sizes: Any) -> tuple[bf.Draws, float]:
    """Return draws and their CPU seconds."""
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = bf.sample(model, method, progress=False, **sizes)
    return draws, time.process_time() - began


def worst_rhat(model: bf.BayesianModel, draws: bf.Draws, x: Tensor) -> float:
    """Return the worst R-hat of the predictions."""
    outputs = torch.stack([model.outputs(chain, x).flatten(1) for chain in draws.theta])
    return float(rhat(outputs.double().numpy()).max())


def show(name: str, found: bf.Draws, seconds: float, more: str = "") -> None:
    """Print one row."""
    each = found.info.get("log_evidence_of_ladders") or found.info["log_evidence_of_runs"]
    value, error = found.log_evidence or (float("nan"), float("nan"))
    print(
        f"  {name:22s} {seconds:6.1f} s  log evidence {value:7.2f} +- {error:.2f}, "
        f"{min(each):.1f} to {max(each):.1f}{more}",
        flush=True,
    )


def tempered(model: bf.BayesianModel, x: Tensor, name: str, **sizes: Any) -> None:
    """Print a row of parallel tempering."""
    draws, seconds = timed(model, METHOD, **sizes)
    trips = sum(draws.info["round_trips"]) / draws.n_chains
    more = f"; R-hat {worst_rhat(model, draws, x):.2f}, {trips:.1f} round trips a ladder, "
    show(name, draws, seconds, f"{more}barrier {draws.info['barrier']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--long", type=int, default=2000, help="draws of the long run")
    parser.add_argument("--yacht", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        model = narrow(PROBLEMS[name])
        x = model.x[::4]
        print(f"{name}, {model.dim} weights")
        for seed in range(options.seeds):
            tempered(model, x, "parallel tempering", seed=seed, **SIZES)
            smc, seconds = timed(model, bf.SMC(PARTICLES), chains=RUNS, seed=seed)
            show("SMC", smc, seconds)
        chains, seconds = timed(model, bf.HMC(), chains=32, warmup=300, draws=200, seed=0)
        print(
            f"  HMC, 32 chains         {seconds:6.1f} s  R-hat {worst_rhat(model, chains, x):.2f}"
        )
        if options.long:
            tempered(model, x, "long", seed=100, draws=options.long, **LONG)
    if options.yacht:
        model, x = yacht()
        print(f"yacht, {model.dim} weights")
        tempered(model, x, "parallel tempering", chains=4, warmup=1500, draws=3000)


if __name__ == "__main__":
    main()
