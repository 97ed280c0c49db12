"""Classify images by the weights of their implicit neural representations (Navon et al. 2023,
section 6.2).

Every image is fitted by SIRENs of its own (2-32-32-1, several random starts an image), and networks
over weights are trained to tell its class from the weights alone: a DWSNet against a perceptron on
raw weights, with permutation augmentation, and on aligned weights, a transformer over units, and a
graph network. All see one corpus, split by image. Run: ``python
examples/dwsnets_inr_classification.py [--full] [--data mnist|fashion_mnist|digits]``: two minutes
on the small digits of scikit-learn, or, in hours, the table of docs/experiments.md.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from weight_space import (
    WeightsMLP,
    WeightsTransformer,
    accuracy,
    corpus,
    cross_entropy,
    frame,
    images,
    interval,
    permutations,
    permuted,
    table,
    train,
)

import bnnflow as bf
from bnnflow.equivariant import DWSNet, GraphNet, TensorScaler, Wiring, warp
from bnnflow.model.network import ChainNetwork
from bnnflow.symmetry import match, normalise_sign

OUT = Path("out")
# warp: its strength; probes: fixed inputs on a grid of 7 x 7
DECAY, WARP, PROBES = 0.02, 0.5, 7
TRIALS = [1e-3, 3e-3]  # learning rates, tried for a fifth of the steps
EXTRA = {"GraphNet": 1 / 3, "DWSNet + hidden probes": 1.0, "DWSNet + all probes": 1.0}
"""One seed and this share of the steps each, with the learning rate of the DWSNet."""
# left out without --full, unless asked for
SLOW = ("transformer", "GraphNet", "DWSNet + all probes")
# MNIST and Fashion-MNIST, 55,000 images: another corpus, shown beside --full only
PUBLISHED = {"DWSNet": (85.71, 67.06), "MLP, aligned": (58.98, 47.79)}


class Sizes(NamedTuple):
    """How much of everything."""

    views: int  # fits of a training image
    seeds: int
    steps: int
    batch_size: int
    width: int
    depth: int


FULL = Sizes(views=3, seeds=3, steps=1367, batch_size=128, width=64, depth=3)
SMALL = Sizes(views=1, seeds=2, steps=300, batch_size=32, width=32, depth=2)


def random_warp(
    theta: Tensor, spec: bf.WeightSpec, strength: float, generator: torch.Generator
) -> Tensor:
    """Turn, scale, shear and move the image of every network a little, exactly, by its first
    layer.
    """
    turn, shear, wide, high, *move = (
        (2 * torch.rand(6, len(theta), generator=generator) - 1) * strength
    ).unbind()
    rotation = torch.stack(
        [
            (0.35 * turn).cos(),
            -(0.35 * turn).sin(),
            (0.35 * turn).sin(),
            (0.35 * turn).cos(),
        ],
        -1,
    )
    stretch = torch.stack(
        [(0.15 * wide).exp(), 0.2 * shear, torch.zeros_like(turn), (0.15 * high).exp()], -1
    )
    matrix = rotation.unflatten(-1, (2, 2)) @ stretch.unflatten(-1, (2, 2))
    return warp(theta, spec, matrix, 0.15 * torch.stack(move, -1))


class Probed(nn.Module):
    """A DWSNet that also sees what every hidden unit does at fixed inputs, and if asked for, what
    the network does.
    """

    def __init__(
        self,
        spec: bf.WeightSpec,
        scaler: TensorScaler,
        outputs: bool,
        width: int,
        depth: int,
    ) -> None:
        super().__init__()
        grid = torch.linspace(-0.9, 0.9, PROBES)
        self.x = torch.cartesian_prod(grid, grid)
        self.network, self.scaler, self.outputs = ChainNetwork(spec), scaler, outputs
        context = len(self.x) if outputs else 0
        self.net = DWSNet(
            spec,
            1,
            10,
            width,
            depth,
            invariant=True,
            unit_features=len(self.x),
            context=context,
            wiring=Wiring(edge_width=4, frequency=3.0),
        )

    def forward(self, features: Tensor) -> Tensor:
        theta = self.scaler.inverse(features.squeeze(-1))
        units = self.network.hidden(theta, self.x)
        context = self.network(theta, self.x).squeeze(-1) if self.outputs else None
        return self.net(features, units=units, context=context)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["mnist", "mnist10k", "fashion_mnist", "digits"])
    parser.add_argument(
        "--full",
        action="store_true",
        help="MNIST, three fits an image, wider networks, more steps, all methods: hours",
    )
    parser.add_argument("--methods", nargs="*", help="only these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    views, seeds, steps, batch_size, width, depth = FULL if args.full else SMALL
    data = images(args.data if args.data or args.full else "digits")
    fits, test = corpus(data, views)
    spec = test.spec
    # (views, images, dim)
    theta = torch.stack([normalise_sign(part.theta, spec) for part in fits])
    # the rest of the training images chooses settings and the best state
    n_train = len(data.x_train) * 7 // 8
    theta_test, y, y_test = normalise_sign(test.theta, spec), data.y_train, data.y_test
    scaler = TensorScaler.fit(theta[:, :n_train], spec)
    reference = frame(theta[0, :n_train], spec)
    aligned = partial(
        match, spec=spec, reference=reference, group=permutations(spec), sweeps=2
    )

    builds: dict[str, Callable[[], nn.Module]] = {
        "DWSNet": lambda: DWSNet(
            spec,
            1,
            10,
            width,
            depth,
            invariant=True,
            wiring=Wiring(edge_width=4, frequency=3.0),
        ),
        "MLP": lambda: WeightsMLP(spec, 10),
        "MLP, permuted": lambda: WeightsMLP(spec, 10),
        "MLP, aligned": lambda: WeightsMLP(spec, 10),
        "transformer": lambda: WeightsTransformer(spec, 10),
        "GraphNet": lambda: GraphNet(spec, 1, 10, 32, 3, invariant=True),
        "DWSNet + hidden probes": lambda: Probed(spec, scaler, False, width, depth),
        "DWSNet + all probes": lambda: Probed(spec, scaler, True, width, depth),
    }

    def prepared(name: str, batch: Tensor, generator: torch.Generator | None) -> Tensor:
        """Do to a batch what belongs to the method, and scale it.

        Augmentation needs a generator.
        """
        if name == "MLP, aligned":
            batch = aligned(batch)
        elif name == "MLP, permuted" and generator is not None:
            batch = permuted(batch, spec, generator)
        return scaler(batch).unsqueeze(-1)

    def run(name: str, rate: float, steps: int, seed: int) -> tuple[float, float, float]:
        """Train once; return the accuracies on validation and test images and the CPU seconds."""

        def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            rows = torch.randint(n_train, (batch_size,), generator=generator)
            view = torch.randint(views, (batch_size,), generator=generator)
            batch = theta[view, rows]
            batch = normalise_sign(random_warp(batch, spec, WARP, generator), spec)
            return prepared(name, batch, generator), y[rows]

        held_out = prepared(name, theta[0, n_train:], None)
        unseen = prepared(name, theta_test, None)
        torch.manual_seed(seed)
        net, lowest, seconds = train(
            builds[name](),
            sample,
            cross_entropy,
            lambda net: -accuracy(net, held_out, y[n_train:]),
            steps=steps,
            learning_rate=rate,
            weight_decay=DECAY,
            seed=seed,
            log=lambda line: print(f"  {name}: {line}", flush=True),
        )
        return -lowest, accuracy(net, unseen, y_test), seconds

    path = (
        OUT
        / f"dwsnets_inr_classification_{data.name}_{'full' if args.full else 'small'}.json"
    )
    done = json.loads(path.read_text()) if path.is_file() else {}

    def remembered(key: str, *settings) -> tuple[float, float, float]:
        if key not in done:
            done[key] = run(*settings)
            path.write_text(json.dumps(done, indent=1))
        return done[key]

    rows = []
    head = ["method", "test accuracy, %", "sampling error", "rate", "CPU s"]
    head += ["published"] if args.full else []
    for name in args.methods or [name for name in builds if args.full or name not in SLOW]:
        tuned = "DWSNet" if name in EXTRA else name
        trials = [
            (remembered(f"{tuned} trial {trial}", tuned, trial, steps // 5, 0)[0], trial)
            for trial in TRIALS
        ]
        best = max(trials)[1]
        own_seeds = range(1 if name in EXTRA else seeds)
        trained = round(steps * EXTRA.get(name, 1.0))
        results = [
            remembered(f"{name} seed {seed}", name, best, trained, seed)
            for seed in own_seeds
        ]
        mean, error = interval([100 * result[1] for result in results])
        sampling = math.sqrt(mean * (100 - mean) / len(y_test))
        seconds = sum(result[2] for result in results) / len(results)
        published = PUBLISHED.get(name, ("", ""))[data.name.startswith("fashion")]
        shown = f"{mean:.1f} ± {error:.1f}" if len(results) > 1 else f"{mean:.1f}, one seed"
        cells = [name, shown, f"{sampling:.1f}", f"{best:g}", f"{seconds:.0f}"]
        rows.append([*cells, str(published)][: len(head)])
        print(table(head, rows), flush=True)


if __name__ == "__main__":
    main()
