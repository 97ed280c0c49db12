"""Edit images through the weights of their implicit representations (Zhou et al. 2023).

Every image is fitted by a SIREN of its own (2-32-32-1), and a network over weights says how to move
the weights so that the SIREN shows the dilated, or the eroded, digit: trained on the squared error
of random pixels, tested on SIRENs of unseen images. Phases and signs of the sines are fixed for the
whole corpus, permutations are left to the methods. Run: ``python examples/dwsnets_editing.py
[--full] [--data mnist|mnist10k|digits]``: two minutes on the small digits of scikit-learn, or, in a
quarter of an hour, the table of docs/experiments.md. Interrupted runs go on where they stopped.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from scipy import ndimage
from torch import Tensor, nn
from weight_space import (
    Residual,
    corpus,
    frame,
    images,
    interval,
    movers,
    permutations,
    permuted,
    table,
    train,
    tuned,
)

from bnnflow import WeightSpec
from bnnflow.equivariant import DWSNet, TensorScaler, Wiring, image_grid, render
from bnnflow.equivariant.inr import MID_GREY
from bnnflow.model.network import ChainNetwork
from bnnflow.symmetry import match, normalise_sign

OUT = Path("out")
# over 3 x 3 pixels
EDITS = {
    "dilation": ndimage.grey_dilation,
    "erosion": ndimage.grey_erosion,
}
# SIRENs and pixels a step; SIRENs that validate
BATCH, PIXELS, DECAY, HELD_OUT = 32, 196, 0.02, 250
PROBES, FREQUENCY = 7, 3.0  # a grid of 7 x 7 inputs; of the Fourier features of weights
# learning rate, size of the residual
TRIALS = [
    (1e-3, 0.3),
    (1e-3, 1.0),
    (3e-3, 0.3),
    (3e-3, 1.0),
]
# for a move without a network
SAME_TRIALS = [
    (3e-3, 1.0),
    (1e-2, 1.0),
    (3e-2, 1.0),
    (1e-1, 1.0),
]
WIDTH, DEPTH = 32, 3  # of the DWSNet
FULL, SMALL = (500, 3), (120, 2)  # steps, seeds
LEFT_OUT = ("GraphNet",)  # unless asked for: as slow as the DWSNet, and slower to learn
SHOWN = 8  # images in the figure


class Task(NamedTuple):
    """SIRENs ``(n, dim)`` and the images that they shall show ``(n, pixels)``, for training, held
    out, and test.
    """

    spec: WeightSpec
    scaler: TensorScaler
    theta: list[Tensor]
    aligned: list[Tensor]
    y: list[Tensor]
    side: int


def filtered(images: Tensor, edit: str) -> Tensor:
    """Return edited images ``(n, height, width)``, flattened."""
    return torch.from_numpy(EDITS[edit](images.numpy(), size=(1, 3, 3))).flatten(1)


class Probed(nn.Module):
    """A DWSNet that also sees what every hidden unit does at fixed inputs."""

    def __init__(
        self, spec: WeightSpec, scaler: TensorScaler, width: int, depth: int
    ) -> None:
        super().__init__()
        grid = torch.linspace(-0.9, 0.9, PROBES)
        self.x, self.network, self.scaler = (
            torch.cartesian_prod(grid, grid),
            ChainNetwork(spec),
            scaler,
        )
        self.net = DWSNet(
            spec,
            1,
            1,
            width,
            depth,
            unit_features=len(self.x),
            wiring=Wiring(edge_width=8, frequency=FREQUENCY),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.net(
            features,
            units=self.network.hidden(self.scaler.inverse(features.squeeze(-1)), self.x),
        )


def shown(net: nn.Module, theta: Tensor, task: Task) -> Tensor:
    """Return the images of moved SIRENs, ``(n, pixels)``."""
    with torch.no_grad():
        parts = [
            render(net(some), task.spec, task.side, task.side) for some in theta.split(250)
        ]
    return torch.cat(parts).flatten(1)


def learn(
    name: str, build: Callable[[], nn.Module], task: Task, *,
    rate: float, size: float, steps: int, seed: int,
) -> dict[str, float | list]:  # fmt: skip
    """Train one method.

    Return its errors on held-out and on test images, and the first test images as edited.
    """
    spec, network, x = task.spec, ChainNetwork(task.spec), image_grid(task.side, task.side)
    theta, held_out, test = task.aligned if name.endswith("aligned") else task.theta
    y, y_held_out, y_test = task.y

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(theta), (BATCH,), generator=generator)
        pixels = torch.randperm(len(x), generator=generator)[:PIXELS]
        batch = (
            permuted(theta[rows], spec, generator)
            if name.endswith("permuted")
            else theta[rows]
        )
        # the views of all images follow each other
        return batch, x[pixels], y[rows % len(y)][:, pixels]

    def loss(net: nn.Module, batch: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (network(net(batch), x).squeeze(-1) + MID_GREY - y).square().mean()

    def validate(net: nn.Module) -> float:
        return float((shown(net, held_out, task) - y_held_out).square().mean())

    torch.manual_seed(seed)
    net, lowest, seconds = train(
        Residual(build(), task.scaler, size), sample, loss, validate,
        steps=steps, learning_rate=rate, weight_decay=DECAY, seed=seed, checks=5,
    )  # fmt: skip
    pictures = shown(net, test, task)
    errors = (pictures - y_test).square().mean(-1)
    with torch.no_grad():
        move = (net(test[:500]) - test[:500]).norm(dim=-1) / test[:500].norm(dim=-1)
    result = {
        "validation": lowest,
        "test": float(errors.mean()),
        "spread": float(errors.std()) / len(errors) ** 0.5,
        "move": float(move.mean()),
        "seconds": seconds,
    }
    told = ", ".join(f"{key} {value:.3g}" for key, value in result.items())
    print(f"  {name}, {rate:g}, {size:g}, {steps} steps, seed {seed}: {told}", flush=True)
    return result | {"pictures": (255 * pictures[:SHOWN]).clamp(0, 255).int().tolist()}


def draw(edit: str, pictures: dict[str, Tensor], side: int, path: Path) -> None:
    """Show originals, targets and what every method makes of them, one row each."""
    figure = Figure(figsize=(0.9 * SHOWN + 1.8, 0.93 * len(pictures)), layout="constrained")
    grid = figure.subplots(len(pictures), SHOWN)
    for row, (name, values) in zip(grid, pictures.items(), strict=True):
        for axes, picture in zip(row, values.reshape(-1, side, side), strict=True):
            axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(f"{edit}: unseen images, edited through the weights")
    figure.savefig(path, dpi=130)


def compare(
    edit: str,
    task: Task,
    originals: Tensor,
    builds: dict[str, Callable[[], nn.Module]],
    path: Path,
    steps: int,
    seeds: int,
) -> None:
    """Tune and train all methods for one edit, print their table, draw what they do."""
    y_test, unmoved = task.y[2], render(task.theta[2], task.spec, task.side, task.side)
    ends = {
        "no edit": unmoved.flatten(1),
        "mean of the training targets": task.y[0].mean(0).expand_as(y_test),
        "rendered, pixels edited": filtered(unmoved, edit),
    }
    pictures = {"original": originals, "target": y_test[:SHOWN]}
    rows = []
    for name, image in ends.items():
        errors = 100 * (image - y_test).square().mean(-1)
        rows.append(
            (
                name,
                f"{errors.mean():.3f}",
                f"{errors.std() / len(errors) ** 0.5:.3f}",
                "",
                "",
                "",
            )
        )
    for name, build in builds.items():
        trials = SAME_TRIALS if "same" in name else TRIALS
        given = {"steps": steps, "tuning_steps": steps // 5, "seeds": seeds}
        trial, results = tuned(
            partial(learn, name, build, task), path, f"{edit}, {name}", trials, **given
        )
        means = {
            key: sum(each[key] for each in results) / seeds
            for key in results[0]
            if key != "pictures"
        }
        error = "{:.3f} ± {:.3f}".format(
            *interval([100 * each["test"] for each in results])
        )
        cells = (
            f"{100 * means['spread']:.3f}",
            f"{means['move']:.2f}",
            f"{trial[0]:g}, {trial[1]:g}",
        )
        rows.append((name, error, *cells, f"{means['seconds']:.0f}"))
        pictures[name] = torch.tensor(results[0]["pictures"]) / 255
    head = ["method", "test MSE, 1e-2", "error over images", "move", "rate, size", "CPU s"]
    print(f"\n{edit}\n{table(head, rows)}", flush=True)
    draw(edit, pictures, task.side, path.with_name(f"{path.stem}_{edit}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["mnist", "mnist10k", "digits"])
    parser.add_argument(
        "--full",
        action="store_true",
        help="MNIST, three seeds, four times the steps: a quarter of an hour",
    )
    parser.add_argument("--methods", nargs="*", help="only these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps, seeds = FULL if args.full else SMALL
    data = images(args.data if args.data or args.full else "digits")
    fits, test = corpus(data, 1)
    spec, n_train = test.spec, len(data.x_train) * 7 // 8
    held_out = slice(n_train, n_train + HELD_OUT)
    fitted = normalise_sign(fits[0].theta, spec)  # (images, dim)
    theta = [fitted[:n_train], fitted[held_out], normalise_sign(test.theta, spec)]
    reference = frame(theta[0], spec)
    aligned = [
        match(part, spec, reference, group=permutations(spec), sweeps=2) for part in theta
    ]
    scaler = TensorScaler.fit(theta[0], spec)
    builds = movers(spec, WIDTH, DEPTH, FREQUENCY) | {
        "DWSNet + probes": lambda: Probed(spec, scaler, WIDTH, DEPTH)
    }
    chosen = {
        name: builds[name]
        for name in args.methods or builds
        if args.methods or name not in LEFT_OUT
    }
    path = OUT / f"dwsnets_editing_{data.name}_{'full' if args.full else 'small'}.json"
    for edit in EDITS:
        targets = filtered(data.x_train, edit)
        y = [targets[:n_train], targets[held_out], filtered(data.x_test, edit)]
        task = Task(spec, scaler, theta, aligned, y, data.x_train.shape[-1])
        compare(edit, task, data.x_test[:SHOWN], chosen, path, steps, seeds)


if __name__ == "__main__":
    main()
