"""Embed sine waves by the weights of networks that represent them, without labels (Navon et al.
2023).

Each wave y = a sin(b x) on [-pi, pi], a, b ~ U(0, 10), is fitted by a SIREN 1-32-32-1 of its own,
which takes x / pi and returns y itself. Encoders see two views of the weights, each with Gaussian
noise and a mask of its own, and learn to tell which views belong together (SimCLR, Chen et al.
2020). A linear probe, fitted on the training waves, then reads (a, b) off the embeddings of unseen
waves. Phases and signs of the sines, exact symmetries, are fixed once for the whole corpus;
permutations are left to the methods. Every seed has training waves and starts of its own;
validation and test waves are common. With --full settings are chosen one after the other in five
short trials a method; they and the step to stop at are the only choices that see labels, those of
the validation waves. Run: ``python examples/dwsnets_self_supervised.py [--full] [--two-fits]``: two
minutes with the same settings for everybody, or, in an hour, the table of docs/experiments.md.
Interrupted runs go on where they stopped.
"""

import argparse
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
    remembered,
    table,
    train,
)

from bnnflow import WeightSpec
from bnnflow.equivariant import DWSNet, INRs, TensorScaler, Wiring, fit_inrs, siren
from bnnflow.symmetry import match, normalise_sign

OUT = Path("out")
HIGHEST = 10.0  # of a and b
# Navon et al.: mean squared error of (a, b) from the embeddings of DWSNets, beside --full only
PUBLISHED = 1.39
W0, POINTS, FIT_STEPS = 10.0, 128, 500
HELD_OUT, TEST = 500, 1000
# features, waves a batch, share of the weights of a view that are zeroed
EMBEDDING, BATCH, MASKED = 16, 256, 0.5
DECAY = 1e-2
EDGES, FREQUENCY = 4, 3.0  # channels of a matrix and sines of its weights in the DWSNet
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
TWO_FITS = "DWSNet, two fits a wave (not the published protocol)"


class Setting(NamedTuple):
    """What is tuned; noise is in standard deviations of a tensor, and centred weights have a mean
    of zero in each.
    """

    temperature: float = 0.1
    noise: float = 0.2
    rate: float = 3e-3
    centred: bool = True


# tried in this order
OTHERS = {
    "noise": 0.5,
    "centred": False,
    "temperature": 0.3,
    "rate": 1e-3,
}


class Sizes(NamedTuple):
    """How much of everything."""

    seeds: int
    training: int  # waves
    steps: int
    tried: int  # steps of a trial, none if 0


FULL = Sizes(seeds=3, training=2000, steps=500, tried=100)
SMALL = Sizes(seeds=2, training=500, steps=60, tried=0)
WIDTH, DEPTH = 32, 2


class Waves(NamedTuple):
    """Fits of every wave ``(fits, n, dim)``, their (a, b) ``(n, 2)``, and what the weights mean."""

    theta: Tensor
    targets: Tensor
    spec: WeightSpec


def waves(n: int, fits_each: int) -> Waves:
    """Fit the waves, or read the fits of an earlier run."""
    targets = HIGHEST * torch.rand(n, 2, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-1, 1, POINTS).unsqueeze(-1)
    y = targets[:, :1] * torch.sin(math.pi * targets[:, 1:] * x.T)
    net = siren(1, 1, w0=W0)
    fitted = []
    for seed in range(fits_each):
        path = OUT / "inrs" / f"waves-{n}-{seed}.npz"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            fits = fit_inrs(x, y, net, steps=FIT_STEPS, seed=seed)
            fits.save(path)
            error = fits.mse / y.square().mean(1)
            quality = (
                f"median {error.median():.1e}, 99 of 100 below {error.quantile(0.99):.1e}"
            )
            print(
                f"{n} fits in {fits.info['seconds']:.0f} s, error over power of the wave: "
                f"{quality}",
                flush=True,
            )
        fitted.append(INRs.load(path).theta)
    spec = WeightSpec.of(net)
    return Waves(normalise_sign(torch.stack(fitted), spec), targets, spec)


class Contrastive(nn.Module):
    """An encoder and the projection that only the contrastive loss sees."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Sequential(
            nn.Linear(EMBEDDING, EMBEDDING), nn.ReLU(), nn.Linear(EMBEDDING, EMBEDDING)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(self.encoder(features))


def view(scaled: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Return scaled weights with fresh noise, in standard deviations of their tensor, and a fresh
    mask.
    """
    noisy = scaled + noise * torch.randn(scaled.shape, generator=generator)
    return (noisy * (torch.rand(scaled.shape, generator=generator) >= MASKED)).unsqueeze(-1)


def nt_xent(net: nn.Module, views: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of finding the other view of each wave among all views of the batch, first all
    first views.
    """
    embedded = F.normalize(net(views), dim=-1)
    similar = (embedded @ embedded.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(similar, torch.arange(len(views)).roll(len(views) // 2))


def probe(features: Tensor, targets: Tensor) -> tuple[float, list[float]]:
    """Fit a ridge regression on training rows.

    Return the validation error and the test errors of a and of b.

    Rows are validation waves, test waves, training waves. The penalty is chosen on the validation
    waves.
    """
    fitted = features[HELD_OUT + TEST :].double()
    features = (features.double() - fitted.mean(0)) / fitted.std(0).clamp(min=1e-9)
    features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    known, truth = features[HELD_OUT + TEST :], targets.double()
    best: tuple[float, list[float]] = (math.inf, [])
    for ridge in RIDGES:
        gram = known.T @ known / len(known) + ridge * torch.eye(
            known.shape[1], dtype=known.dtype
        )
        weights = torch.linalg.solve(gram, known.T @ truth[HELD_OUT + TEST :] / len(known))
        errors = (features @ weights - truth).square()[: HELD_OUT + TEST]
        best = min(
            best, (float(errors[:HELD_OUT].mean()), errors[HELD_OUT:].mean(0).tolist())
        )
    return best


def moments(scaled: Tensor, spec: WeightSpec) -> Tensor:
    """Return five numbers of each tensor that no permutation changes, nothing learned."""
    parts = [scaled[:, where] for where in spec.slices.values()]
    of_each = [
        (w.mean(1), w.abs().mean(1), w.abs().amax(1), w.square().mean(1), w.pow(4).mean(1))
        for w in parts
    ]
    return torch.stack([number for numbers in of_each for number in numbers], 1)


class Experiment:
    """The corpus as each seed and method sees it, and one run on it."""

    def __init__(
        self, corpus: Waves, training: int, builds: dict[str, Callable[[], nn.Module]]
    ):
        self.corpus, self.training, self.builds = corpus, training, builds
        self.weights = cache(self._weights)

    def rows(self, seed: int) -> Tensor:
        """Return the waves of a seed: validation, test, training."""
        begin = HELD_OUT + TEST + seed * self.training
        return torch.cat(
            [torch.arange(HELD_OUT + TEST), torch.arange(begin, begin + self.training)]
        )

    def targets(self, seed: int) -> Tensor:
        """Return (a, b) of these waves."""
        return self.corpus.targets[self.rows(seed)]

    def _weights(self, seed: int, aligned: bool, centred: bool) -> Tensor:
        """Return the scaled weights of a seed's waves, ``(fits, n, dim)``."""
        theta, spec = self.corpus.theta[:, self.rows(seed)], self.corpus.spec
        if aligned:
            theta = match(
                theta,
                spec,
                frame(theta[0, -self.training :], spec),
                group=permutations(spec),
            )
        fitted = theta[0, -self.training :]
        return TensorScaler.fit(fitted if centred else torch.cat([fitted, -fitted]), spec)(
            theta
        )

    def run(self, name: str, seed: int, steps: int, setting: Setting) -> dict[str, Any]:
        """Train an encoder.

        Return probe errors before and after, the CPU seconds and the test embeddings.
        """
        scaled, targets = (
            self.weights(seed, name == "MLP, aligned", setting.centred),
            self.targets(seed),
        )

        def sample(generator: torch.Generator) -> tuple[Tensor]:
            chosen = torch.randint(-self.training, 0, (BATCH,), generator=generator)
            pair = [scaled[0, chosen], scaled[int(name == TWO_FITS), chosen]]
            if name == "MLP, permuted":
                pair = [permuted(each, self.corpus.spec, generator) for each in pair]
            return (torch.cat([view(each, setting.noise, generator) for each in pair]),)

        def embed(net: nn.Module) -> Tensor:
            return predict(
                net.get_submodule("encoder"), lambda batch: batch.unsqueeze(-1), scaled[0]
            )

        torch.manual_seed(seed)
        net = Contrastive(self.builds[name]())
        untrained = probe(embed(net.eval()), targets)[1]
        net, lowest, seconds = train(
            net.train(),
            sample,
            partial(nt_xent, temperature=setting.temperature),
            lambda net: probe(embed(net), targets)[0],
            steps=steps,
            learning_rate=setting.rate,
            weight_decay=DECAY,
            seed=seed,
            checks=5,
        )
        embedding = embed(net)
        result = {
            "validation": lowest,
            "test": probe(embedding, targets)[1],
            "untrained": untrained,
        }
        print(
            f"  {name}, seed {seed}, {steps} steps, {tuple(setting)}: {result}, {seconds:.0f} "
            "CPU s",
            flush=True,
        )
        return result | {
            "seconds": seconds,
            "embedding": embedding[HELD_OUT : HELD_OUT + TEST]
            .double()
            .round(decimals=3)
            .tolist(),
        }


def draw(embeddings: dict[str, Tensor], targets: Tensor, path: Path) -> None:
    """Plot t-SNE maps of embeddings, coloured by amplitude and by frequency."""
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(7.2, 6.6), layout="constrained")
    axes = figure.subplots(2, len(embeddings), squeeze=False)
    for column, (name, embedding) in enumerate(embeddings.items()):
        standard = (embedding - embedding.mean(0)) / embedding.std(0).clamp(min=1e-9)
        places = TSNE(random_state=0).fit_transform(standard.numpy())
        for row, label in enumerate(("amplitude a", "frequency b")):
            points = axes[row, column].scatter(
                *places.T, c=targets[:, row].numpy(), s=7, lw=0, vmin=0, vmax=HIGHEST
            )
            axes[row, column].set(xticks=[], yticks=[], title=name if row == 0 else None)
            axes[row, column].spines[:].set_color("0.8")
            if column == len(embeddings) - 1:
                figure.colorbar(points, ax=axes[row, :], label=label, aspect=30)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="three seeds, four times the waves, eight times the steps, tuned settings, the "
        "transformer too: an hour",
    )
    parser.add_argument(
        "--two-fits", action="store_true", help="one more row: views of two fits of a wave"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes, size = (FULL, "full") if args.full else (SMALL, "small")
    seeds = sizes.seeds
    corpus = waves(HELD_OUT + TEST + seeds * sizes.training, 2 if args.two_fits else 1)
    spec = corpus.spec

    def equivariant() -> nn.Module:
        return DWSNet(
            spec,
            1,
            EMBEDDING,
            WIDTH,
            DEPTH,
            invariant=True,
            wiring=Wiring(edge_width=EDGES, frequency=FREQUENCY),
        )

    builds: dict[str, Callable[[], nn.Module]] = {
        "MLP": lambda: WeightsMLP(spec, EMBEDDING),
        "MLP, permuted": lambda: WeightsMLP(spec, EMBEDDING),
        "MLP, aligned": lambda: WeightsMLP(spec, EMBEDDING),
        "DWSNet": equivariant,
    }
    if args.full:
        builds["transformer"] = lambda: WeightsTransformer(spec, EMBEDDING, WIDTH, DEPTH)
    if args.two_fits:
        builds[TWO_FITS] = equivariant
    experiment = Experiment(corpus, sizes.training, builds)
    path = OUT / f"dwsnets_self_supervised_{size}.json"

    def run(name: str, seed: int, steps: int, setting: Setting) -> dict[str, Any]:
        key = f"{name}, seed {seed}, {steps} steps, {tuple(setting)}"
        return remembered(path, key, lambda: experiment.run(name, seed, steps, setting))

    @cache
    def tuned(name: str) -> Setting:
        settings = [Setting()]
        for field, value in OTHERS.items() if sizes.tried else ():
            settings.append(settings[0]._replace(**{field: value}))
            settings.sort(key=lambda each: run(name, 0, sizes.tried, each)["validation"])
        return settings[0]

    def cell(errors: list[list[float]], which: int | None = None) -> str:
        return "{:.2f} ± {:.2f}".format(
            *interval([sum(e) / 2 if which is None else e[which] for e in errors])
        )

    truth = corpus.targets[HELD_OUT : HELD_OUT + TEST]
    mean = [(truth - HIGHEST / 2).square().mean(0).tolist()] * seeds
    fixed = [
        probe(
            moments(experiment.weights(seed, False, True)[0], spec),
            experiment.targets(seed),
        )[1]
        for seed in range(seeds)
    ]
    rows = [
        ["the mean of (a, b)", "", cell(mean), cell(mean, 0), cell(mean, 1), "", ""],
        [
            "25 moments, nothing learned",
            "",
            cell(fixed),
            cell(fixed, 0),
            cell(fixed, 1),
            "",
            "",
        ],
    ]
    shown: dict[str, Tensor] = {}
    for name in builds:
        setting = tuned("DWSNet" if name == TWO_FITS else name)
        runs = [run(name, seed, sizes.steps, setting) for seed in range(seeds)]
        before, after = (
            [each["untrained"] for each in runs],
            [each["test"] for each in runs],
        )
        seconds = f"{interval([each['seconds'] for each in runs])[0]:.0f}"
        choice = ", ".join(
            [
                *(f"{value:g}" for value in setting[:3]),
                "centred" if setting.centred else "as it is",
            ]
        )
        rows.append(
            [
                name,
                cell(before),
                cell(after),
                cell(after, 0),
                cell(after, 1),
                choice,
                seconds,
            ]
        )
        shown[name] = torch.tensor(runs[0]["embedding"])
    print(
        f"test MSE of a linear probe of {EMBEDDING} features; mean and standard error of {seeds} "
        "seeds"
    )
    head = [
        "encoder",
        "untrained",
        "MSE of (a, b)",
        "a",
        "b",
        "temperature, noise, rate, scaling",
        "CPU s a run",
    ]
    print(table(head, rows))
    if args.full:
        print(f"published for DWSNets: {PUBLISHED} (Navon et al. 2023)")
    draw(
        {name: shown[name] for name in ("DWSNet", "MLP", "MLP, aligned")},
        truth,
        path.with_suffix(".png"),
    )


if __name__ == "__main__":
    main()
