"""Neighbouring posteriors: `bf.update` beside chains of their own.

The posteriors of ``$BNNFLOW_DATA/reference``: iris (4-16-3 tanh, 131 weights) and yacht_s01
(6-50-1, 401), N(0, 1). Draws of all rows, 64 chains of HMC, go to the posterior of nine tenths of
them and back. "rms" is the error of predictive means at the test rows in posterior standard
deviations, "sd" the mean ratio of these, both against two other HMC runs together; what one run
has against them is the floor. With ``--folds`` ten-fold cross-validation of yacht_s01 by
`bf.compare`, with ten reruns for a rival: five CPU minutes. With ``--stream`` a tenth of the rows
and fifty batches of the others, one after another. One thread. Run:
``python tests/benchmarks/bench_update.py [--folds] [--stream]``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import bnnflow as bf

CHAINS = {"chains": 64, "warmup": 400, "draws": 100}


def problem(name: str) -> tuple[bf.BayesianModel, Tensor]:
    """Return a model and the inputs of its test rows."""
    folder = Path(os.environ.get("BNNFLOW_DATA", "../shared/data")) / "reference"
    file = np.load(folder / f"{name}.npz")
    torch.manual_seed(0)
    widths = (4, 16, 3) if name == "iris" else (6, 50, 1)
    net = nn.Sequential(
        nn.Linear(widths[0], widths[1]), nn.Tanh(), nn.Linear(widths[1], widths[2])
    )
    likelihood = (
        bf.likelihoods.Categorical() if name == "iris" else bf.likelihoods.Gaussian(0.1)
    )
    given = bf.priors.Normal(1.0), likelihood, file["Xtr"], file["ytr"]
    return bf.BayesianModel(net, *given), torch.as_tensor(file["Xte"]).float()


def chains(model: bf.BayesianModel, seed: int) -> bf.Draws:
    """Sample a posterior by chains of its own."""
    return bf.sample(model, bf.HMC(), **CHAINS, seed=seed, progress=False)


def timed(run: Callable[[], bf.Draws]) -> tuple[bf.Draws, float]:
    """Return draws and the CPU seconds that they took."""
    started = time.process_time()
    return run(), time.process_time() - started


def moments(model: bf.BayesianModel, draws: bf.Draws, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of what the networks say at ``x``."""
    parts = [model.outputs(rows, x) for rows in draws.flat.split(2048)]
    values = torch.cat(parts).double()
    if model.likelihood.kind == "classification":
        values = values.softmax(-1)
    values = values.flatten(1)
    weights = torch.full((len(values),), 1 / len(values), dtype=torch.float64)
    if draws.log_weights is not None:
        weights = draws.log_weights.flatten().softmax(0)
    mean = weights @ values
    return mean, (weights @ (values - mean).square()).sqrt()


def apart(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> str:
    """Return rms and ratio of standard deviations."""
    rms = float(((ours[0] - theirs[0]) / theirs[1]).square().mean().sqrt())
    return f"rms {rms:.3f}  sd {float((ours[1] / theirs[1]).log().mean().exp()):.3f}"


def neighbours(name: str) -> None:
    """Go to nine tenths of the rows and back."""
    model, x = problem(name)
    order = torch.randperm(len(model.x), generator=torch.Generator().manual_seed(3))
    every = chains(model, 0)
    for fold in range(2):
        kept = order[torch.arange(len(order)) % 10 != fold].sort().values
        part = model.subset(kept)
        fewer = chains(part, 1)
        for old, draws, new, way in (
            (model, every, part, "all rows to 90%"),
            (part, fewer, model, "90% to all rows"),
        ):
            own, rerun = timed(lambda new=new: chains(new, 2))
            other = chains(new, 3)
            theta = torch.cat([own.theta, other.theta])
            both = bf.Draws(theta, torch.cat([own.log_joint, other.log_joint]))
            truth = moments(new, both, x)
            updated, spent = timed(
                lambda new=new, draws=draws, old=old: bf.update(
                    new, draws, old, progress=False
                )
            )
            value, error = updated.info["log_evidence_change"]
            print(
                f"{name}, fold {fold}, {way}: {updated.info['route']:9s} "
                f"{updated.info['gradients_per_draw']:3.0f} gradients a draw  "
                f"{apart(moments(new, updated, x), truth)} (floor "
                f"{apart(moments(new, own, x), truth)})  evidence {value:+.2f} ± {error:.2f}  "
                f"{spent:.1f} CPU s, {spent / rerun:.3f} of a rerun",
                flush=True,
            )


def folds() -> None:
    """Score yacht_s01 by ten folds, carried and rerun."""
    model, _ = problem("yacht_s01")
    draws = chains(model, 0)
    spent, scores = {}, {}
    for way, refit in (("update", None), ("reruns", {"m": lambda part: chains(part, 1)})):
        started = time.process_time()
        table = bf.compare(
            {"m": (model, draws)}, folds=10, refit=refit, seed=0, progress=False
        )
        spent[way] = time.process_time() - started
        scores[way] = table.scores["m"].pointwise
    gap = scores["update"] - scores["reruns"]
    print(
        f"ten folds: {scores['update'].mean():.4f} and {scores['reruns'].mean():.4f} nats a row, "
        f"difference {gap.mean():+.4f} ± {gap.std() / len(gap) ** 0.5:.4f}; "
        f"{spent['update']:.0f} and {spent['reruns']:.0f} CPU s, ratio "
        f"{spent['update'] / spent['reruns']:.3f}"
    )


def stream(name: str) -> None:
    """Let a tenth of the rows be followed by the others in fifty batches."""
    whole, x = problem(name)
    order = torch.randperm(len(whole.x), generator=torch.Generator().manual_seed(3))
    first, rest = order.tensor_split([len(order) // 10])
    own, rerun = timed(lambda: chains(whole, 2))
    other = chains(whole, 3)
    theta = torch.cat([own.theta, other.theta])
    truth = moments(whole, bf.Draws(theta, torch.cat([own.log_joint, other.log_joint])), x)
    model = whole.subset(first)
    draws, sampled = timed(lambda: chains(model, 1))
    gradients, spent, change, routes = 0.0, 0.0, 0.0, Counter()
    for seed, rows in enumerate(rest.tensor_split(50)):
        model = model.extended(whole.x[rows], whole.y[rows])
        draws, seconds = timed(
            lambda model=model, draws=draws, seed=seed: bf.update(
                model, draws, seed=seed, progress=False
            )
        )
        spent += seconds
        gradients += draws.info["gradients_per_draw"]
        change += draws.info["log_evidence_change"][0]
        routes[draws.info["route"]] += 1
    print(
        f"{name}, {len(first)} rows and 50 batches: {dict(routes)}, {draws.flat.shape[0]} draws, "
        f"{gradients:.0f} gradients a draw  {apart(moments(whole, draws, x), truth)} (floor "
        f"{apart(moments(whole, own, x), truth)})  log p(later rows | first) {change:+.2f}  "
        f"{sampled:.1f} + {spent:.1f} CPU s, a rerun {rerun:.1f}",
        flush=True,
    )


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--folds", action="store_true", help="cross-validation too")
    parser.add_argument("--stream", action="store_true", help="fifty batches too")
    torch.set_num_threads(1)
    given = parser.parse_args()
    for name in ("iris", "yacht_s01"):
        neighbours(name)
        if given.stream:
            stream(name)
    if given.folds:
        folds()


if __name__ == "__main__":
    main()
