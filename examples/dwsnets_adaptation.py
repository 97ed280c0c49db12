"""Move digit classifiers to another domain by a residual on their weights (Navon et al. 2023).

More than a thousand small classifiers are trained on clean digits, from starts of their own. A
network over weights reads one and says how to move it, so that it works on digits that are turned,
or noisy: trained on the cross entropy of moved classifiers on target images, tested on classifiers
and images that it has not seen. In a second corpus every classifier has labels of its own (a random
renumbering of the ten digits): one good classifier written over all does not help there, what each
one knows must be kept. Run: ``python examples/dwsnets_adaptation.py [--full]``: two minutes on
turned digits, or, in a quarter of an hour, the table of docs/experiments.md. Interrupted runs go on
where they stopped.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from weight_space import (
    Residual,
    frame,
    interval,
    movers,
    permutations,
    permuted,
    table,
    train,
    tuned,
)

import bnnflow as bf
from bnnflow.data import load_images
from bnnflow.equivariant import TensorScaler
from bnnflow.model.network import ChainNetwork
from bnnflow.symmetry import match

OUT = Path("out")
DEGREES, NOISE = 45.0, 0.5  # of the two target domains
N_TRAIN, N_HELD_OUT, N_TEST = 900, 100, 200  # classifiers
# of the classifiers; images a step, there and later
FIT_STEPS, FIT_RATE, ROWS = (
    300,
    3e-3,
    64,
)
BATCH, DECAY = 32, 0.02
# learning rate, size of the residual
TRIALS = [
    (1e-3, 0.3),
    (1e-3, 1.0),
    (3e-3, 0.3),
    (3e-3, 1.0),
]
# for a move without a network
SAME_TRIALS = [
    (3e-2, 1.0),
    (1e-1, 1.0),
    (3e-1, 1.0),
    (1.0, 1.0),
]
HIDDEN, WIDTH, DEPTH = [16, 16], 32, 3  # of a classifier; of the DWSNet
# steps, seeds, domains
FULL: tuple[int, int, tuple[str, ...]] = (400, 3, ("turned", "noisy"))
SMALL: tuple[int, int, tuple[str, ...]] = (80, 2, ("turned",))
LEFT_OUT = ("GraphNet",)  # at 64 inputs and more its edges cost several times the rest


class Task(NamedTuple):
    """Classifiers, the class that each gives every digit ``(classifiers, 10)``, and images by
    part.
    """

    spec: bf.WeightSpec
    theta: Tensor
    classes: Tensor
    x: dict[str, Tensor]
    y: dict[str, Tensor]


def shifted(images: Tensor, domain: str, generator: torch.Generator) -> Tensor:
    """Turn images ``(n, height, width)`` or add noise to them, and flatten them."""
    if domain == "noisy":
        images = images + NOISE * torch.randn(images.shape, generator=generator)
    if domain == "turned":
        cosine, sine = math.cos(math.radians(DEGREES)), math.sin(math.radians(DEGREES))
        matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]).expand(
            len(images), -1, -1
        )
        grid = F.affine_grid(
            matrix, [len(images), 1, *images.shape[1:]], align_corners=False
        )
        images = F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)
    return images.flatten(1)


def fitted(
    theta: Tensor, task: Task, classes: Tensor, domain: str, generator: torch.Generator
) -> Tensor:
    """Train classifiers with Adam, all at once, each on mini-batches of its own."""
    network = ChainNetwork(task.spec)
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    pool = torch.stack(
        [shifted(task.x["train"], domain, generator) for _ in range(4)]
    ).flatten(0, 1)
    y = task.y["train"].repeat(4)
    for step in range(1, FIT_STEPS + 1):
        rows = torch.randint(len(y), (len(theta), ROWS), generator=generator)
        logits, vjp = network.pullback(theta, pool[rows], per_network=True)
        grad = vjp(logits.softmax(-1) - F.one_hot(classes.gather(1, y[rows]), 10)) / ROWS
        mean, square = mean.lerp(grad, 0.1), square.lerp(grad.square(), 0.001)
        rate = FIT_RATE * min(1.0, 2 * (1 - (step - 1) / FIT_STEPS))
        theta = theta - rate * (mean / (1 - 0.9**step)) / (
            (square / (1 - 0.999**step)).sqrt() + 1e-8
        )
    return theta


def task(own_labels: bool) -> Task:
    """Load the images and train the classifiers, or read those of an earlier run."""
    images = load_images("digits")
    x_train, n = images.x_train, len(images.x_train) * 4 // 5
    x = {"train": x_train[:n], "held out": x_train[n:], "test": images.x_test}
    y = {"train": images.y_train[:n], "held out": images.y_train[n:], "test": images.y_test}
    sizes = [x_train[0].numel(), *HIDDEN, 10]
    layers = [
        part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())
    ][:-1]
    spec = bf.WeightSpec.of(nn.Sequential(*layers))
    total, generator = N_TRAIN + N_HELD_OUT + N_TEST, torch.Generator().manual_seed(0)
    classes = torch.arange(10).expand(total, 10)
    if own_labels:
        classes = torch.rand(total, 10, generator=generator).argsort(-1)
    path = OUT / "classifiers" / f"digits-{'own' if own_labels else 'common'}.pt"
    made = Task(spec, torch.empty(0), classes, x, y)
    if not path.is_file():
        bounds = torch.cat(
            # torch's default
            [torch.full(((i + 1) * o,), i**-0.5) for i, o in itertools.pairwise(sizes)]
        )
        starts = (2 * torch.rand(total, spec.dim, generator=generator) - 1) * bounds
        chunks = zip(starts.split(200), classes.split(200), strict=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            torch.cat(
                [fitted(theta, made, some, "clean", generator) for theta, some in chunks]
            ),
            path,
        )
    return made._replace(theta=torch.load(path))


def accuracies(
    theta: Tensor, classes: Tensor, task: Task, domain: str, part: str
) -> Tensor:
    """Return the accuracy of every classifier on a part of the images, moved to a domain."""
    x = shifted(task.x[part], domain, torch.Generator().manual_seed(1))
    with torch.no_grad():
        guesses = torch.cat(
            [ChainNetwork(task.spec)(some, x).argmax(-1) for some in theta.split(50)]
        )
    return (guesses == classes[:, task.y[part]]).float().mean(-1)


def adapt(
    name: str,
    build: Callable[[], nn.Module],
    task: Task,
    domain: str,
    *,
    rate: float,
    size: float,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Train one method.

    Return its loss on held-out classifiers and images, and how unseen classifiers fare.
    """
    spec, network, theta = task.spec, ChainNetwork(task.spec), task.theta
    if name.endswith("aligned"):
        theta = match(theta, spec, frame(theta[:N_TRAIN], spec), group=permutations(spec))
    scaler = TensorScaler.fit(theta[:N_TRAIN], spec)
    held_out, test = slice(N_TRAIN, N_TRAIN + N_HELD_OUT), slice(N_TRAIN + N_HELD_OUT, None)
    x_held_out = shifted(task.x["held out"], domain, torch.Generator().manual_seed(2))

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        nets = torch.randint(N_TRAIN, (BATCH,), generator=generator)
        rows = torch.randint(len(task.y["train"]), (ROWS,), generator=generator)
        batch = (
            permuted(theta[nets], spec, generator)
            if name.endswith("permuted")
            else theta[nets]
        )
        return (
            batch,
            shifted(task.x["train"][rows], domain, generator),
            task.classes[nets][:, task.y["train"][rows]],
        )

    def loss(net: nn.Module, batch: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(net(batch), x).flatten(0, 1), y.flatten())

    def validate(net: nn.Module) -> float:
        return float(
            loss(
                net,
                theta[held_out],
                x_held_out,
                task.classes[held_out][:, task.y["held out"]],
            )
        )

    torch.manual_seed(seed)
    net, lowest, seconds = train(
        Residual(build(), scaler, size), sample, loss, validate,
        steps=steps, learning_rate=rate, weight_decay=DECAY, seed=seed,
    )  # fmt: skip
    with torch.no_grad():
        moved = net(theta[test])
    found = accuracies(moved, task.classes[test], task, domain, "test")
    result = {
        "validation": lowest,
        "target": float(found.mean()),
        "spread": float(found.std()),
        "clean": float(accuracies(moved, task.classes[test], task, "clean", "test").mean()),
        "move": float(
            ((moved - theta[test]).norm(dim=-1) / theta[test].norm(dim=-1)).mean()
        ),
        "seconds": seconds,
    }
    shown = ", ".join(f"{key} {value:.3g}" for key, value in result.items())
    print(f"  {domain}, {name}, {rate:g}, {size:g}, seed {seed}: {shown}", flush=True)
    return result


def draw(panels: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Plot the accuracies of all methods, one panel for each corpus and domain."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (title, found) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        for row, (name, values) in enumerate(found.items()):
            mean, error = interval(values)
            colour = (
                "0.65"
                if len(values) == 1
                else "tab:blue"
                if name == "DWSNet"
                else "tab:orange"
            )
            bar = axes.barh(
                row,
                mean,
                xerr=0.0 if math.isnan(error) else error,
                color=colour,
                height=0.7,
            )
            axes.bar_label(bar, fmt="%.0f", padding=2, fontsize="small")
        axes.set_yticks(range(len(found)), list(found))
        axes.set(title=title, xlabel="accuracy on target images, %", xlim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis() if axes.get_subplotspec().is_first_col() else None
    figure.savefig(path, dpi=150)


def compare(
    corpus: Task,
    domain: str,
    title: str,
    path: Path,
    steps: int,
    seeds: int,
    methods: list[str] | None,
) -> dict[str, list[float]]:
    """Tune and train all methods, print their table, and return the accuracies in per cent of every
    seed.
    """
    builds = movers(corpus.spec, WIDTH, DEPTH)
    theta, classes = corpus.theta[-N_TEST:], corpus.classes[-N_TEST:]
    fine_tuned = fitted(theta, corpus, classes, domain, torch.Generator().manual_seed(3))
    found, rows = {}, []
    for name, moved in {"no adaptation": theta, "each fine-tuned": fine_tuned}.items():
        target, clean = (
            100 * accuracies(moved, classes, corpus, where, "test")
            for where in (domain, "clean")
        )
        move = ((moved - theta).norm(dim=-1) / theta.norm(dim=-1)).mean()
        found[name] = [float(target.mean())]
        spread = target.std() / N_TEST**0.5
        rows.append(
            (
                name,
                f"{target.mean():.1f}",
                f"{spread:.1f}",
                f"{clean.mean():.1f}",
                f"{move:.2f}",
                "",
                "",
            )
        )
    for name in methods or [name for name in builds if name not in LEFT_OUT]:
        run = partial(adapt, name, builds[name], corpus, domain)
        trials = SAME_TRIALS if "same" in name else TRIALS
        given = {"steps": steps, "tuning_steps": steps // 2, "seeds": seeds}
        best, results = tuned(run, path, f"{title}, {name}", trials, **given)
        found[name] = [100 * each["target"] for each in results]
        means = {key: sum(each[key] for each in results) / seeds for key in results[0]}
        accuracy = "{:.1f} ± {:.1f}".format(*interval(found[name]))
        clean, spread = (
            f"{100 * means['clean']:.1f}",
            f"{100 * means['spread'] / N_TEST**0.5:.1f}",
        )
        chosen = f"{best[0]:g}, {best[1]:g}"
        rows.append(
            (
                name,
                accuracy,
                spread,
                clean,
                f"{means['move']:.2f}",
                chosen,
                f"{means['seconds']:.0f}",
            )
        )
    head = [
        "method",
        "target accuracy, %",
        "error over classifiers",
        "clean digits, %",
        "move",
        "rate, size",
        "CPU s",
    ]
    print(f"\n{title}\n{table(head, rows)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="noisy digits too, three seeds, three times the steps: a quarter of an hour",
    )
    parser.add_argument("--methods", nargs="*", help="only these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps, seeds, domains = FULL if args.full else SMALL
    path = OUT / f"dwsnets_adaptation_{'full' if args.full else 'small'}.json"
    panels = {}
    for labels in ("common", "own"):
        corpus = task(own_labels=labels == "own")
        for domain in domains:
            title = f"{domain}, {labels} labels"
            panels[title] = compare(corpus, domain, title, path, steps, seeds, args.methods)
    draw(panels, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
