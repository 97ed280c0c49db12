"""Alignment: time a network, planted permutations found, and weight matching against Sinkhorn
re-basin.

One thread, charged the CPU time of the process. Networks for the comparison are 30-16-16-2 ReLU
perceptrons trained by Adam on breast cancer from independent starts, aligned to one of them. Both
methods are bnnflow's own and batched over networks; the Sinkhorn baseline differentiates implicitly
and has the settings of its authors, and the fastest found. The barrier is the largest excess of the
training loss over the line between the losses of the ends, at 25 points. Run:
``python tests/benchmarks/bench_alignment.py [--quick]``.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import WeightSpec
from bnnflow.inference.start import Adam, cosine
from bnnflow.model.network import ChainNetwork
from bnnflow.symmetry import barrier, match, match_activations, sinkhorn_rebasin
from bnnflow.weights import Symmetries

torch.set_num_threads(1)

WIDTHS = (30, 16, 16, 2)
NETWORKS = 1_000  # in a timed batch
SINKHORN_STEPS = (30, 50, 100, 200)  # the authors' example takes 50
ASKED_MS, ASKED_RATIO = 1.0, 30.0


def perceptron(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> WeightSpec:
    """Return the weight space of a perceptron."""
    modules: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        modules += [nn.Linear(n_in, n_out), activation()]
    return WeightSpec.of(nn.Sequential(*modules[:-1]))


def initial(spec: WeightSpec, n: int, seed: int) -> Tensor:
    """Draw networks ``(n, dim)`` as torch initialises linear layers: uniform within 1 /
    sqrt(inputs).
    """
    fan_in = {}
    for layer in spec.layers:
        for name in (layer.weight, layer.bias):
            fan_in[name] = spec.shapes[layer.weight][1]
    bounds = [
        torch.full(
            (spec.slices[name].stop - spec.slices[name].start,), fan_in[name] ** -0.5
        )
        for name in fan_in
    ]
    return torch.cat(bounds) * (
        2 * torch.rand(n, spec.dim, generator=torch.Generator().manual_seed(seed)) - 1
    )


def timed(work: Callable[[], Tensor], rounds: int = 3) -> tuple[Tensor, float]:
    """Return a result, and the median CPU milliseconds a network."""
    result, seconds = work(), []
    for _ in range(rounds):
        began = time.process_time()
        result = work()
        seconds.append(time.process_time() - began)
    return result, median(seconds) * 1e3 / len(result)


def times() -> None:
    """Print milliseconds a network of `match`."""
    print(
        f"\nMilliseconds a network, {'-'.join(map(str, WIDTHS))}, batch of {NETWORKS} (asked: "
        f"{ASKED_MS})"
    )
    for activation in (nn.ReLU, nn.Tanh):
        spec = perceptron(*WIDTHS, activation=activation)
        reference, theta = initial(spec, 1, 0)[0], initial(spec, NETWORKS, 1)
        own = initial(spec, NETWORKS, 2)
        (near,) = spec.transform(finite(spec), 3, reference + 0.1 * theta)
        for what, networks, target in (
            ("independent networks, one reference", theta, reference),
            ("independent networks, a reference each", theta, own),
            ("one network in many frames, 10% noise", near, reference),
        ):
            _, ms = timed(
                lambda networks=networks, target=target, spec=spec: match(
                    networks, spec, target
                )
            )
            print(f"  {activation.__name__:5} {what:42} {ms:7.3f}")


def finite(spec: WeightSpec) -> Symmetries:
    return spec.symmetries()._replace(scale=frozenset(), phase=frozenset())


def recoveries(count: int) -> None:
    """Print how many planted elements are found, and how many of the rest ended closer than the
    planted one.
    """
    print(
        f"\nPlanted permutations (and signs, Tanh) found of {count}; + as close or closer elsewhere"
    )
    noises = (0.0, 0.05, 0.1, 0.2, 0.4)
    print(f"  {'':22}" + "".join(f"noise {noise:<8.0%}" for noise in noises))
    for activation, n_in, width in itertools.product(
        (nn.ReLU, nn.Tanh), (2, 10), (8, 16, 32)
    ):
        cells = []
        for noise in noises:
            found = {
                depth: planted(activation, n_in, width, depth, noise, count)
                for depth in (2, 3, 4, 5)
            }
            worst = min(found.values())
            cells.append(f"{worst[0]}" + (f"+{worst[1]}" if worst[1] else ""))
        name = f"{activation.__name__} {n_in}-{width}...-2"
        print(f"  {name:22}" + "".join(f"{cell:14}" for cell in cells))
    print("  (the worst of 2, 3, 4 and 5 hidden layers; noise relative to the weights)")


def planted(
    activation: Any, n_in: int, width: int, depth: int, noise: float, count: int
) -> tuple[int, int]:
    spec = perceptron(n_in, *[width] * depth, 2, activation=activation)
    reference = initial(spec, count, depth).double()
    near = reference + noise * initial(spec, count, 10 + depth)
    found = match(spec.transform(finite(spec), 1, near)[0], spec, reference)
    same = (found == near).all(-1)
    closer = (found - reference).norm(dim=-1) <= (near - reference).norm(dim=-1)
    return int(same.sum()), int((closer & ~same).sum())


def trained(spec: WeightSpec, x: Tensor, y: Tensor, n: int, steps: int) -> Tensor:
    """Train networks ``(n, dim)`` on the cross-entropy by full-batch Adam, all at once."""
    network, theta = ChainNetwork(spec), initial(spec, n, 5)
    adam, labels = Adam(theta), nn.functional.one_hot(y).to(x)
    for step in range(1, steps + 1):
        outputs, vjp = network.pullback(theta, x)
        theta = adam.step(
            theta, vjp((labels - outputs.softmax(-1)) / len(x)), cosine(0.01, step, steps)
        )
    return theta


def against_sinkhorn(networks: int, steps: int) -> None:
    """Print barriers, distances and times of every method on trained networks."""
    data = bf.data.load("breast_cancer")
    x, y = data.x_train.float(), data.y_train.long().flatten()
    spec = perceptron(*WIDTHS)
    network = ChainNetwork(spec)

    def loss(theta: Tensor) -> Tensor:
        logits = network(theta.reshape(-1, spec.dim), x)  # (batch, n, 2)
        losses = nn.functional.cross_entropy(
            logits.mT, y.expand(len(logits), -1), reduction="none"
        ).mean(-1)
        return losses.reshape(theta.shape[:-1])

    theta = trained(spec, x, y, networks + 1, steps)
    reference, theta = theta[0], theta[1:]

    methods: dict[str, Callable[[], Tensor]] = {
        "as trained": lambda: theta,
        "weight matching": lambda: match(theta, spec, reference),
        "weight matching, guesses alone": lambda: match(theta, spec, reference, sweeps=0),
        "activation matching": lambda: match_activations(theta, spec, reference, x),
    }
    for count in SINKHORN_STEPS:
        methods[f"Sinkhorn, {count} steps"] = lambda count=count: sinkhorn_rebasin(
            theta, spec, reference, steps=count
        )
    methods["Sinkhorn, tuned, 30 steps"] = lambda: sinkhorn_rebasin(
        theta, spec, reference, steps=30, learning_rate=0.3, temperature=3.0
    )
    methods["Sinkhorn, midpoint loss, 50"] = lambda: sinkhorn_rebasin(
        theta, spec, reference, loss=lambda soft: loss((soft + reference) / 2)
    )
    print(
        f"\n{networks} networks trained {steps} Adam steps on breast cancer (loss "
        f"{loss(theta).mean():.4f}), to one"
    )
    print(
        f"  {'':32}{'barrier':>9}{'midpoint':>10}{'distance':>10}{'ms a net':>10}"
        f"{'x matching':>12}{'x guesses':>11}"
    )
    own: dict[str, float] = {}
    for name, method in methods.items():
        moved, ms = timed(method, 1)
        found = barrier(reference, moved, loss)
        if name.startswith("weight"):
            own[name] = ms
        matching, guesses = (
            (ms / each for each in own.values())
            if name.startswith("Sinkhorn")
            else (1.0, 1.0)
        )
        ratio = f"{matching:12.1f}{guesses:11.1f}" if name.startswith("Sinkhorn") else ""
        far = (moved - reference).norm(dim=-1).mean()
        print(
            f"  {name:32}{found.maximum.mean():9.4f}{found.midpoint.mean():10.4f}"
            f"{far:10.3f}{ms:10.3f}{ratio}"
        )
    print(f"  (asked: weight matching {ASKED_RATIO:.0f} times cheaper at the same barrier)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer networks")
    quick = parser.parse_args().quick
    print(
        f"one thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, float32, torch "
        f"{torch.__version__}"
    )
    times()
    recoveries(20 if quick else 100)
    against_sinkhorn(networks=20 if quick else 300, steps=500)


if __name__ == "__main__":
    main()
