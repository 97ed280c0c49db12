"""What the weight-space experiments share: the rivals, one training loop, tuning with one budget,
aligned corpora.

Imported by the ``dwsnets_*.py`` scripts beside it. Every network here takes scaled weights
``(batch, dim, 1)`` and returns ``(batch, out_features)``, as an invariant
`bnnflow.equivariant.DWSNet` does.
"""

import copy
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnflow import WeightSpec
from bnnflow.data import Dataset, load_images
from bnnflow.equivariant import (
    DWSNet,
    GraphNet,
    INRs,
    TensorScaler,
    Wiring,
    fit_images,
    siren,
)
from bnnflow.symmetry import match
from bnnflow.weights import Symmetries

OUT = Path("out")
# of the fits of images: frequency, Adam steps, coordinates a step
W0, FIT_STEPS, PIXELS = 20.0, 200, 128


class WeightsMLP(nn.Module):
    """A perceptron on the flattened weights, which knows nothing of their symmetries."""

    def __init__(
        self,
        spec: WeightSpec,
        out_features: int,
        width: int = 512,
        depth: int = 3,
        dropout: float = 0.1,
    ):
        super().__init__()
        modules: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise([spec.dim, *[width] * depth]):
            modules += [
                nn.Linear(inputs, outputs),
                nn.LayerNorm(outputs),
                nn.SiLU(),
                nn.Dropout(dropout),
            ]
        self.layers = nn.Sequential(*modules, nn.Linear(width, out_features))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.flatten(1))


class WeightsTransformer(nn.Module):
    """Attention over hidden units: tokens of their incoming weights, bias and outgoing weights,
    with positions.
    """

    def __init__(
        self,
        spec: WeightSpec,
        out_features: int,
        width: int = 64,
        depth: int = 3,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.layers, self.spec = spec.layers, spec
        shapes = [spec.shapes[layer.weight] for layer in spec.layers]
        self.lifts = nn.ModuleList(
            nn.Linear(shape[1] + 1 + after[0], width)
            for shape, after in itertools.pairwise(shapes)
        )
        self.last = nn.Linear(shapes[-1][0], width)  # the output biases are one more token
        tokens = sum(shape[0] for shape in shapes[:-1]) + 1
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, out_features),
        )

    def forward(self, features: Tensor) -> Tensor:
        params = self.spec.unflatten(features.squeeze(-1))
        tokens = [
            lift(
                torch.cat(
                    [
                        params[layer.weight],
                        params[layer.bias].unsqueeze(-1),
                        params[after.weight].mT,
                    ],
                    -1,
                )
            )
            for lift, (layer, after) in zip(
                self.lifts, itertools.pairwise(self.layers), strict=True
            )
        ]
        tokens.append(self.last(params[self.layers[-1].bias]).unsqueeze(1))
        return self.head(self.encoder(torch.cat(tokens, 1) + self.positions).mean(1))


class Residual(nn.Module):
    """Moves weights by what a network makes of them: maps ``theta`` to
    ``theta + step * sd * net(scaled theta)``.

    Maps ``(batch, dim)`` to ``(batch, dim)``; sd is that of each tensor. Where the network starts
    at zero, so does the move.
    """

    def __init__(self, net: nn.Module, scaler: TensorScaler, step: float):
        super().__init__()
        self.net, self.scaler, self.step = net, scaler, step

    def forward(self, theta: Tensor) -> Tensor:
        features = self.scaler(theta)
        return self.scaler.inverse(
            features + self.step * self.net(features.unsqueeze(-1)).reshape(theta.shape)
        )


class Constant(nn.Module):
    """The same result for all networks, ``(dim,)`` parameters that start at zero."""

    def __init__(self, spec: WeightSpec):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(spec.dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.values.expand(len(features), -1)


def movers(
    spec: WeightSpec, width: int, depth: int, frequency: float = 0.0
) -> dict[str, Callable[[], nn.Module]]:
    """Return what builds each network of the comparisons in which weights move; all start at zero.

    Width, depth and frequency are those of the DWSNet.
    """

    def perceptron() -> WeightsMLP:
        net = WeightsMLP(spec, spec.dim)
        for parameter in net.layers[-1].parameters():
            nn.init.zeros_(parameter)
        return net

    return {
        "same move": lambda: Constant(spec),
        "same move, aligned": lambda: Constant(spec),
        "MLP": perceptron,
        "MLP, permuted": perceptron,
        "MLP, aligned": perceptron,
        "DWSNet": lambda: DWSNet(
            spec, 1, 1, width, depth, wiring=Wiring(edge_width=8, frequency=frequency)
        ),
        "GraphNet": lambda: GraphNet(spec, 1, 1, 32, 3),
    }


def images(name: str | None) -> Dataset:
    """Return the images asked for, or the best that are there: MNIST, a part of it, the digits of
    scikit-learn.
    """
    folder = os.environ.get("BNNFLOW_DATA", "../shared/data")
    for candidate in [name] if name else ["mnist", "mnist10k"]:
        try:
            return load_images(candidate, folder=folder)
        except FileNotFoundError:
            if name:
                raise
    return load_images("digits")


def corpus(data: Dataset, views: int) -> tuple[list[INRs], INRs]:
    """Fit every training image ``views`` times and every test image once, or read the fits of an
    earlier run.
    """
    parts = []
    for name, x, seed in [
        *((f"train{v}", data.x_train, v) for v in range(views)),
        ("test", data.x_test, 1000),
    ]:
        path = OUT / "inrs" / f"{data.name}-{name}.npz"
        if not path.is_file():
            pixels = min(PIXELS, x[0].numel())
            fits = fit_images(
                x, siren(2, 1, w0=W0), steps=FIT_STEPS, batch_size=pixels, seed=seed
            )
            fits.save(path)
            print(
                f"{data.name} {name}: {len(fits)} fits in {fits.info['seconds']:.0f} s, "
                f"{fits.psnr.mean():.1f} dB"
            )
        parts.append(INRs.load(path))
    return parts[:-1], parts[-1]


def permutations(spec: WeightSpec) -> Symmetries:
    """Return the group of all permutations of hidden units, without signs and phases."""
    return Symmetries(frozenset(spec.widths), frozenset(), frozenset())


def permuted(theta: Tensor, spec: WeightSpec, generator: torch.Generator) -> Tensor:
    """Permute the hidden units of every network at random: the augmentation of the second rival."""
    return spec.transform(permutations(spec), generator, theta)[0]


def frame(theta: Tensor, spec: WeightSpec, rounds: int = 3) -> Tensor:
    """Return the running mean ``(dim,)`` to which training networks are matched, a mean modulo
    permutations.
    """
    mean = theta[0]
    for _ in range(rounds):
        mean = match(theta[:1000], spec, mean, group=permutations(spec)).mean(0)
    return mean


def train(
    net: nn.Module,
    sample: Callable[[torch.Generator], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    validate: Callable[[nn.Module], float],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    checks: int = 10,
    log: Callable[[str], None] | None = None,
) -> tuple[nn.Module, float, float]:
    """Train with AdamW, warm-up, cosine decay and clipped gradients.

    Keep the state that validates best.

    Args:
        net: the network.
        sample: draws a batch; its parts are what ``loss`` takes after the network.
        loss: ``loss(net, *batch)``.
        validate: the lower, the better.
        steps: of the optimiser.
        learning_rate: the highest.
        weight_decay: of AdamW.
        seed: of the batches.
        checks: how often to validate.
        log: takes a line at every check.

    Returns:
        The best network, its validation value and the CPU seconds that training took.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(
        net.parameters(), lr=learning_rate, weight_decay=weight_decay
    )
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(
            (step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        ),
    )
    best, lowest, began = copy.deepcopy(net.state_dict()), math.inf, time.process_time()
    for step in range(1, steps + 1):
        optimiser.zero_grad(set_to_none=True)
        loss(net, *sample(generator)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % max(1, steps // checks) == 0 or step == steps:
            net.eval()
            with torch.no_grad():
                value = validate(net)
            net.train()
            if value < lowest:
                best, lowest = copy.deepcopy(net.state_dict()), value
            if log is not None:
                log(
                    f"step {step:5d}: validation {value:.4f}, {time.process_time() - began:.0f} "
                    "CPU s"
                )
    net.load_state_dict(best)
    return net.eval(), lowest, time.process_time() - began


def predict(
    net: nn.Module, features: Callable[[Tensor], Tensor], theta: Tensor, chunk: int = 256
) -> Tensor:
    """Apply a trained network to many weights without keeping gradients."""
    with torch.no_grad():
        return torch.cat([net(features(part)) for part in theta.split(chunk)])


def cross_entropy(net: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(features), labels)


def accuracy(net: nn.Module, features: Tensor, labels: Tensor) -> float:
    """Return the fraction of labels that a trained network gets right."""
    with torch.no_grad():
        guesses = torch.cat([net(part).argmax(-1) for part in features.split(500)])
    return float((guesses == labels).float().mean())


def squared_error(net: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(net(features), targets)


def remembered(path: Path, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what an earlier run of this key left in a JSON file, or run it and add that to the
    file.
    """
    done = json.loads(path.read_text()) if path.is_file() else {}
    if key not in done:
        done[key] = run()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(done))
    return done[key]


def tuned(
    run: Callable[..., dict[str, Any]],
    path: Path,
    key: str,
    trials: Sequence[tuple[float, float]],
    *,
    steps: int,
    tuning_steps: int,
    seeds: int,
) -> tuple[tuple[float, float], list[dict[str, Any]]]:
    """Choose the trial with the lowest ``"validation"`` after few steps, and run it for every seed;
    see `remembered`.

    Args:
        run: takes the keywords rate, size, steps and seed.
        path: file of finished runs.
        key: what this run is called there.
        trials: learning rates and sizes.
        steps: of every final run.
        tuning_steps: of every trial.
        seeds: number of final runs.
    """

    def result(trial: tuple[float, float], steps: int, seed: int) -> dict[str, Any]:
        given = partial(run, rate=trial[0], size=trial[1], steps=steps, seed=seed)
        return remembered(path, f"{key}, {trial}, {steps} steps, seed {seed}", given)

    best = min(trials, key=lambda trial: result(trial, tuning_steps, 0)["validation"])
    return best, [result(best, steps, seed) for seed in range(seeds)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table for the terminal and for Markdown alike."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| "
        + " | ".join(str(cell).ljust(w) for cell, w in zip(row, widths, strict=True))
        + " |"
        for row in [head, *rows]
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    values_ = torch.tensor(values, dtype=torch.float64)
    return float(values_.mean()), float(values_.std() / math.sqrt(len(values))) if len(
        values
    ) > 1 else math.nan
