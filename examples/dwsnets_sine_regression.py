"""Read the frequency of a sine wave from the weights of a network that represents it (Navon et al.
2023, section 7.1).

Each wave y = sin(b x) on [-pi, pi], b ~ U(0.5, 10), is fitted by a SIREN 1-32-32-1 of its own, and
networks over weights predict b. Phases and signs of the sines, exact symmetries, are fixed once for
the whole corpus; permutations are left to the methods. Every seed has training waves and starts of
its own; validation and test waves are common. Settings are chosen from some trials a method on the
validation waves of seed 0. Errors over seeds leave out that the test waves are a sample: a few of
them carry most of the squared error. Run: ``python examples/dwsnets_sine_regression.py [--full]``:
two minutes and few steps for everybody, or, in half an hour, the table of docs/experiments.md.
Interrupted runs go on where they stopped.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from weight_space import (
    WeightsMLP,
    WeightsTransformer,
    frame,
    interval,
    permutations,
    permuted,
    predict,
    squared_error,
    table,
    train,
)

from bnnflow import WeightSpec
from bnnflow.equivariant import DWSNet, GraphNet, INRs, TensorScaler, fit_inrs, siren
from bnnflow.symmetry import match, normalise_sign

OUT = Path("out")
LOWEST, HIGHEST = 0.5, 10.0
MEAN, SD = (LOWEST + HIGHEST) / 2, (HIGHEST - LOWEST) / math.sqrt(12)  # of b
# fits end at a mean squared error of 1e-5
W0, POINTS, FIT_STEPS, FIT_RATE = (
    10.0,
    128,
    400,
    1e-3,
)
BATCH = 32
RATES = (1e-3, 3e-3, 1e-2)
# weight decay, dropout; the first of them without --full
PENALTIES = {"dropout": ((0.01, 0.0), (0.01, 0.2)), "decay": ((0.01, 0.0), (0.3, 0.0))}
SLOW_SEEDS = {"GraphNet": 2}  # of --full; left out otherwise


class Sizes(NamedTuple):
    """How much of everything."""

    waves: tuple[int, ...]  # trained on
    tuned_at: int
    held_out: int
    test: int
    seeds: int
    steps: int
    penalties: int


FULL = Sizes((100, 200, 500, 1000, 2000), 500, 500, 1000, seeds=5, steps=500, penalties=2)
SMALL = Sizes((100, 1000), 100, 250, 500, seeds=2, steps=150, penalties=1)
WIDTH, DEPTH = 32, 2


class Trial(NamedTuple):
    """Settings to choose from."""

    rate: float
    decay: float
    dropout: float


class Method(NamedTuple):
    """How a method is built from its dropout, what of its own it does to weights, and what is tuned
    beside the rate.
    """

    build: Callable[[float], nn.Module]
    symmetry: Literal["none", "augment", "align"]
    penalty: Literal["dropout", "decay"]


def waves(sizes: Sizes) -> tuple[Tensor, Tensor, WeightSpec]:
    """Fit the waves of all seeds, or read the fits of an earlier run: weights, scaled frequencies,
    their meaning.
    """
    n = sizes.held_out + sizes.test + sizes.seeds * max(sizes.waves)
    b = LOWEST + (HIGHEST - LOWEST) * torch.rand(
        n, generator=torch.Generator().manual_seed(0)
    )
    path = OUT / "inrs" / f"sine-{n}.npz"
    if not path.is_file():
        x = torch.linspace(-math.pi, math.pi, POINTS).unsqueeze(-1)
        net = siren(1, 1, w0=W0)
        fits = fit_inrs(
            x,
            torch.sin(b.unsqueeze(-1) * x.T),
            net,
            steps=FIT_STEPS,
            learning_rate=FIT_RATE,
            seed=0,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        fits.save(path)
        errors = f"MSE: median {fits.mse.median():.1e}, max {fits.mse.max():.1e}"
        print(f"{n} fits in {fits.info['seconds']:.0f} s, {errors}", flush=True)
    fits = INRs.load(path)
    return normalise_sign(fits.theta, fits.spec), ((b - MEAN) / SD).unsqueeze(-1), fits.spec


def run(
    method: Method,
    corpus: tuple[Tensor, Tensor, WeightSpec],
    sizes: Sizes,
    *,
    size: int,
    seed: int,
    trial: Trial,
) -> dict[str, float]:
    """Train once on ``size`` waves of a seed.

    Return the mean squared errors of b and the CPU seconds.
    """
    theta, b, spec = corpus
    common = sizes.held_out + sizes.test
    begin = common + seed * max(sizes.waves)
    rows = torch.cat([torch.arange(common), torch.arange(begin, begin + size)])
    theta, b = theta[rows], b[rows]
    if method.symmetry == "align":
        theta = match(theta, spec, frame(theta[-size:], spec), group=permutations(spec))
        # in a common frame every entry has its own
        mean, sd = theta[-size:].mean(0), theta[-size:].std(0)
        theta = (theta - mean) / sd
    scaler = TensorScaler.fit(theta[-size:], spec)

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(-size, 0, (BATCH,), generator=generator)
        batch = (
            permuted(theta[chosen], spec, generator)
            if method.symmetry == "augment"
            else theta[chosen]
        )
        return scaler(batch).unsqueeze(-1), b[chosen]

    def error(net: nn.Module, part: slice) -> float:
        guesses = predict(net, lambda batch: scaler(batch).unsqueeze(-1), theta[part])
        return SD**2 * float((guesses - b[part]).square().mean())

    validate = partial(error, part=slice(sizes.held_out))
    torch.manual_seed(seed)
    net, lowest, seconds = train(
        method.build(trial.dropout), sample, squared_error, validate,
        steps=sizes.steps, learning_rate=trial.rate, weight_decay=trial.decay, seed=seed,
    )  # fmt: skip
    return {
        "validation": lowest,
        "test": error(net, slice(sizes.held_out, common)),
        "seconds": seconds,
    }


def draw(errors: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Plot test errors against the number of training networks."""
    sizes = list(errors["DWSNet"])
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for place, (name, by_size) in enumerate(errors.items()):
        mean, error = zip(*(interval(values) for values in by_size.values()), strict=True)
        shifted = [size * 1.02 ** (place - 2) for size in by_size]  # bars side by side
        axes.errorbar(
            shifted, mean, error, label=name, marker="o", markersize=4, capsize=2, lw=1.2
        )
    axes.axhline(SD**2, color="0.6", ls=":", lw=1)
    axes.annotate(
        "variance of b",
        (0.2, SD**2),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, -12),
        textcoords="offset points",
        color="0.4",
    )
    axes.set(xscale="log", yscale="log", xlabel="training networks", ylabel="test MSE of b")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def gaps(errors: dict[str, dict[int, list[float]]], name: str, size: int) -> list[float]:
    """Return how much larger the errors of a method are than those of DWSNet, seed by seed."""
    return [
        theirs - ours
        for theirs, ours in zip(errors[name][size], errors["DWSNet"][size], strict=False)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="five seeds, five sizes, three times the steps, GraphNet too: half an hour",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes, name = (FULL, "full") if args.full else (SMALL, "small")
    corpus = waves(sizes)
    spec = corpus[2]
    methods = {
        "DWSNet": Method(
            lambda _: DWSNet(spec, 1, 1, WIDTH, DEPTH, invariant=True), "none", "decay"
        ),
        "MLP": Method(
            lambda dropout: WeightsMLP(spec, 1, dropout=dropout), "none", "dropout"
        ),
        "MLP, permuted": Method(
            lambda dropout: WeightsMLP(spec, 1, dropout=dropout), "augment", "dropout"
        ),
        "MLP, aligned": Method(
            lambda dropout: WeightsMLP(spec, 1, dropout=dropout), "align", "dropout"
        ),
        "transformer, permuted": Method(
            lambda dropout: WeightsTransformer(spec, 1, WIDTH, DEPTH, dropout),
            "augment",
            "dropout",
        ),
    }
    if args.full:
        methods["GraphNet"] = Method(
            lambda _: GraphNet(spec, 1, 1, WIDTH, DEPTH, invariant=True), "none", "decay"
        )
    path = OUT / f"dwsnets_sine_regression_{name}.json"
    done = json.loads(path.read_text()) if path.is_file() else {}

    def remembered(name: str, size: int, seed: int, trial: Trial) -> dict[str, float]:
        key = f"{name}, {size} waves, seed {seed}, {trial}"
        if key not in done:
            done[key] = run(methods[name], corpus, sizes, size=size, seed=seed, trial=trial)
            path.write_text(json.dumps(done, indent=1))
            print(key, done[key], flush=True)
        return done[key]

    errors: dict[str, dict[int, list[float]]] = {}
    rows = []
    for name, method in methods.items():
        penalties = PENALTIES[method.penalty][: sizes.penalties]
        trials = [Trial(rate, *penalty) for rate in RATES for penalty in penalties]
        best = min(
            trials,
            key=lambda trial: remembered(name, sizes.tuned_at, 0, trial)["validation"],
        )
        own_seeds = range(SLOW_SEEDS.get(name, sizes.seeds))
        results = {
            size: [remembered(name, size, seed, best) for seed in own_seeds]
            for size in sizes.waves
        }
        errors[name] = {
            size: [each["test"] for each in some] for size, some in results.items()
        }
        seconds = sum(each["seconds"] for some in results.values() for each in some) / (
            len(own_seeds) * len(sizes.waves)
        )
        cells = [
            "{:.3f} ± {:.3f}".format(*interval(values)) for values in errors[name].values()
        ]
        settings = f"{best.rate:g}, {best.decay:g}, {best.dropout:g}"
        rows.append((name, str(len(own_seeds)), *cells, settings, f"{seconds:.0f}"))
    print(
        f"test MSE of b, in units of b^2 (variance {SD**2:.2f}): mean and standard error over seeds"
    )
    print(
        table(
            [
                "method",
                "seeds",
                *map(str, sizes.waves),
                "rate, decay, dropout",
                "CPU s a run",
            ],
            rows,
        )
    )
    print("difference to DWSNet, paired by seed: positive where DWSNet is better")
    paired = [
        (
            name,
            *(
                "{:+.3f} ± {:.3f}".format(*interval(gaps(errors, name, size)))
                for size in sizes.waves
            ),
        )
        for name in list(errors)[1:]
    ]
    print(table(["method", *map(str, sizes.waves)], paired))
    draw(errors, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
