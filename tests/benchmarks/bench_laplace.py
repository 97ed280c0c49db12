"""Laplace from a trained network beside laplace-torch: test LPPD, ECE, CPU seconds, and the memory
of ours.

Digits, 1,438 training rows, N(0, 1): a perceptron 64-8-10 and a convolutional network of 776
weights, both trained with weight decay 1, which is that prior. Linearised predictions, by draws
and by the probit approximation of their logits, and through the network itself; means over splits.
laplace-torch, where it is installed, finds one prior precision, or one a tensor, by the marginal
likelihood. ``--memory`` prints the peak of each structure of ours on the convolutional network
instead, every measurement in a process of its own. One thread. Run:
``python tests/benchmarks/bench_laplace.py [--splits 3] [--memory]``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import math
import resource
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.seeding import isolated

DRAWS, BINS = 1000, 15
ROWS = (200, 1100, 10000)
OTHERS = importlib.util.find_spec("laplace") is not None
STRUCTURES = ("full", "diagonal", "last_layer", *(["kronecker"] if OTHERS else []))


class Digits(NamedTuple):
    """Images ``(n, 1, 8, 8)`` and labels, to train and to test on."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def perceptron() -> nn.Module:
    """Return a network of 610 weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))


def convnet() -> nn.Module:
    """Return a network of 776 weights."""
    first = [nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)]
    second = [nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)]
    last = [nn.Flatten(), nn.Linear(32, 10), nn.Tanh(), nn.Linear(10, 10)]
    return nn.Sequential(*first, *second, *last)


def digits(split: int) -> Digits:
    """Return a split of the data."""
    data = bf.data.load("digits", seed=split)
    x, x_test = (images.reshape(-1, 1, 8, 8) for images in (data.x_train, data.x_test))
    return Digits(x, data.y_train, x_test, data.y_test)


def posterior(net: nn.Module, x: Tensor, y: Tensor) -> bf.BayesianModel:
    """Return the model of these rows."""
    return bf.BayesianModel(net, priors.Normal(1.0), likelihoods.Categorical(), x, y)


def trained(build: Callable[[], nn.Module], data: Digits, epochs: int = 200) -> nn.Module:
    """Return a network after Adam on batches of 128, with the prior as weight decay."""
    n, generator = len(data.x), torch.Generator().manual_seed(0)
    with isolated(generator):
        net = build()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(n, generator=generator).split(128):
            optimiser.zero_grad()
            decay = sum(weights.square().sum() for weights in net.parameters()) / (2 * n)
            (F.cross_entropy(net(data.x[batch]), data.y[batch]) + decay).backward()
            optimiser.step()
        schedule.step()
    return net


def ours(net: nn.Module, data: Digits, method: bf.Laplace) -> Iterator[Tensor]:
    """Fit ours and yield probabilities: linearised by draws, by probit, through the network."""
    model = posterior(net, data.x, data.y)
    draws = bf.sample(
        model, method, init=net, chains=1, draws=DRAWS, seed=0, progress=False
    )
    mode = draws.posterior.loc  # type: ignore[union-attr]
    linearised = model.linearised(mode)
    yield bf.predict(linearised, draws, data.x_test).probs
    variance = linearised.outputs(draws.flat, data.x_test).var(0)
    yield (model.outputs(mode, data.x_test) / (1 + math.pi / 8 * variance).sqrt()).softmax(
        -1
    )
    yield bf.predict(model, draws, data.x_test).probs


def theirs(
    net: nn.Module, data: Digits, structure: str, precisions: int
) -> Iterator[Tensor]:
    """Fit laplace-torch, with so many prior precisions, and yield the same."""
    fitted = importlib.import_module("laplace").Laplace(
        net, "classification", subset_of_weights="all", hessian_structure=structure
    )
    rows = torch.utils.data.TensorDataset(data.x, data.y)
    fitted.fit(torch.utils.data.DataLoader(rows, batch_size=256))
    fitted.optimize_prior_precision(
        method="marglik", n_steps=300, init_prior_prec=torch.ones(precisions)
    )
    yield fitted(data.x_test, pred_type="glm", link_approx="mc", n_samples=DRAWS)
    yield fitted(data.x_test, pred_type="glm", link_approx="probit")
    yield fitted(data.x_test, pred_type="nn", link_approx="mc", n_samples=DRAWS)


def alternatives(net: nn.Module, data: Digits) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """Return what is compared; each yields class probabilities at the test rows."""
    methods = {
        "Laplace()": bf.Laplace(),
        "averaged": bf.Laplace(hessian="averaged"),
        "evidence": bf.Laplace(prior_precision="evidence"),
        "evidence, diagonal": bf.Laplace("diagonal", prior_precision="evidence"),
        "evidence, last layer": bf.Laplace("last_layer", prior_precision="evidence"),
    }
    if OTHERS:
        methods["kronecker"] = bf.Laplace("kronecker")
    found = {name: partial(ours, net, data, method) for name, method in methods.items()}
    for structure in ("full", "kron", "diag") if OTHERS else ():
        for count in (1, len(list(net.parameters()))):
            found[f"laplace-torch {structure}, {count}"] = partial(
                theirs, net, data, structure, count
            )
    return {"the network itself": lambda: iter([net(data.x_test).softmax(-1)]), **found}


def scores(probs: Tensor, y: Tensor) -> tuple[float, float]:
    """Return LPPD and the expected calibration error."""
    probs = probs.double()
    confidence, label = probs.max(-1)
    gaps = confidence - (label == y).double()
    bins = (BINS * confidence).long().clamp(max=BINS - 1)
    error = torch.zeros(BINS, dtype=torch.float64).index_add(
        0, bins, gaps
    ).abs().sum() / len(y)
    return float(probs.gather(1, y[:, None]).log().mean()), float(error)


def compare(splits: int) -> None:
    """Print LPPD / ECE of every kind of prediction, and CPU seconds of the fit with all three."""
    for build in (perceptron, convnet):
        found: dict[str, list[list[float]]] = defaultdict(list)
        for split in range(splits):
            data = digits(split)
            for name, work in alternatives(trained(build, data), data).items():
                began = time.process_time()
                pairs = [scores(probs.detach(), data.y_test) for probs in work()]
                seconds = time.process_time() - began
                found[name].append([*itertools.chain(*pairs), seconds])
        title = f"{build.__name__}, LPPD / ECE"
        print(f"\n{title:24s} {'linearised':>15s} {'probit':>15s} {'network':>15s}  CPU s")
        for name, rows in found.items():
            *means, seconds = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
            pairs = zip(means[::2], means[1::2], strict=True)
            columns = " ".join(
                f"{f'{lppd:.3f} / {error:.3f}':>15s}" for lppd, error in pairs
            )
            print(f"{name:24s} {columns:47s} {seconds:6.1f}", flush=True)


def peak(structure: Any, rows: int) -> None:
    """Print the memory and CPU seconds of one Laplace on so many rows, the data over and over."""
    data = digits(0)
    chosen = torch.arange(rows) % len(data.x)
    data = data._replace(x=data.x[chosen], y=data.y[chosen])
    net = trained(convnet, data, epochs=max(10, 100_000 // rows))
    model = posterior(net, data.x, data.y)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    method = bf.Laplace(structure, polish=100)
    bf.sample(model, method, init=net, chains=1, draws=DRAWS, seed=0, progress=False)
    most, seconds = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        time.process_time() - began,
    )
    print(
        f"{structure:12s} {rows:6d} {most >> 10:6d} {(most - before) >> 10:12d} {seconds:6.1f}"
    )


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument(
        "--peak", nargs=2, metavar=("STRUCTURE", "ROWS"), help="of one Laplace"
    )
    parser.add_argument("--memory", action="store_true", help="peaks of every structure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # modes that are not reached, or not the network's own
    if arguments.peak:
        peak(arguments.peak[0], int(arguments.peak[1]))
    elif arguments.memory:
        print(
            f"{'structure':12s} {'rows':>6s} {'MB':>6s} {'above start':>12s} {'CPU s':>6s}"
        )
        for structure in STRUCTURES:
            for rows in ROWS:
                command = [sys.executable, __file__, "--peak", structure, str(rows)]
                subprocess.run(command, check=True)
    else:
        compare(arguments.splits)


if __name__ == "__main__":
    main()
