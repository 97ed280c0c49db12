"""Linear mode connectivity before and after alignment: many trained networks, every method, loss
and cost.

Breast cancer, 30-16-16-2 ReLU. Each network is paired with the next and one of the two is aligned
to the other. Along the way between them are measured the loss on unseen rows and the energy, -log
joint / n, that training lowered. Erdogan (2025, arXiv 2504.03710) reports a midpoint loss of .244
for unaligned networks of this architecture and .070 for aligned ones. Run: python
examples/dwsnets_alignment.py [--full]
"""

import argparse
import pathlib
import time
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.report import plots
from bnnflow.symmetry import (
    Barrier,
    Curve,
    Geodesic,
    Path,
    barrier_along,
    fit_curve,
    loss_plane,
    match,
    match_activations,
    normalise_scale,
    sinkhorn_rebasin,
    sort_units,
)

OUT = pathlib.Path("out")
NETWORKS, FULL_NETWORKS = 100, 1000
TRAINING = 1000  # Adam steps
SINKHORN_PAIRS, FULL_SINKHORN_PAIRS = 20, 200
CURVE_STEPS = 300
SHOWN = ("none", "weight matching", "Bezier curve")


def main(networks: int, sinkhorn_pairs: int) -> None:
    torch.set_num_threads(1)
    data = bf.data.load("breast_cancer")
    net = nn.Sequential(
        nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Categorical(), data.x_train, data.y_train
    )
    ensemble = bf.DeepEnsemble(members=networks, steps=TRAINING)
    ends = bf.sample(model, ensemble, seed=0).flat
    starts, spec, n = ends.roll(1, 0), model.spec, len(data.x_train)

    def test_loss(theta: Tensor) -> Tensor:
        return -model.pointwise_log_likelihood(theta, data.x_test, data.y_test).mean(-1)

    def train_loss(theta: Tensor) -> Tensor:
        return -model.log_likelihood(theta) / n

    def energy(theta: Tensor) -> Tensor:
        return -model.log_joint(theta) / n

    def midway(theta: Tensor) -> Tensor:  # what Sinkhorn re-basin may lower
        return train_loss((theta + starts[: len(theta)]) / 2)

    accuracy = (model.outputs(ends, data.x_test).argmax(-1) == data.y_test).float().mean()
    print(
        f"{networks} networks: test loss {test_loss(ends).mean():.3f}, accuracy {accuracy:.3f}\n"
    )
    results: dict[str, Barrier] = {}

    def run(
        name: str, pairs: int, method: Callable[[], Path | tuple[Tensor, Tensor]]
    ) -> None:
        began = time.process_time()
        found = method()
        seconds = (time.process_time() - began) / pairs
        path = Curve(torch.stack(found, -2)) if isinstance(found, tuple) else found
        results[name] = barrier_along(path, test_loss)
        print(row(name, results[name], barrier_along(path, energy), seconds), flush=True)

    def normalised() -> tuple[Tensor, Tensor]:
        return normalise_scale(starts, spec), normalise_scale(ends, spec)

    def both() -> tuple[Tensor, Tensor]:
        a, b = normalised()
        return a, match(b, spec, a)

    few = slice(sinkhorn_pairs)
    print(
        f"{'':36}{'midpoint loss':>17}{'barrier':>17}{'area':>9}"
        f"{'energy barrier':>18}{'CPU ms a net':>15}"
    )
    run("none", networks, lambda: (starts, ends))
    run("scales normalised", networks, normalised)
    run(
        "sorted units", networks, lambda: (sort_units(starts, spec), sort_units(ends, spec))
    )
    run("weight matching", networks, lambda: (starts, match(ends, spec, starts)))
    run("scales normalised, weight matching", networks, both)
    run(
        "activation matching",
        networks,
        lambda: (starts, match_activations(ends, spec, starts, data.x_train)),
    )
    for name, loss in {"distance": None, "midpoint": midway}.items():

        def rebasin(
            loss: Callable[[Tensor], Tensor] | None = loss,
        ) -> tuple[Tensor, Tensor]:
            return starts[few], sinkhorn_rebasin(
                ends[few], spec, starts[few], loss=loss, seed=0
            )

        run(f"Sinkhorn re-basin, {name}", sinkhorn_pairs, rebasin)
    print("other paths than the straight line")
    run("geodesic", networks, lambda: Geodesic(starts, ends, spec))
    run("geodesic, weight matching", networks, lambda: Geodesic(*both(), spec))
    run(
        "Bezier curve",
        networks,
        lambda: fit_curve(starts, ends, energy, steps=CURVE_STEPS, samples=2, seed=0),
    )
    midpoints = f"midpoint loss: {results['none'].midpoint.mean():.3f} unaligned, "
    midpoints += f"{results['weight matching'].midpoint.mean():.3f} aligned"
    published = "; published: .244 and .070, of other networks"
    print("\n" + midpoints + (published if networks == FULL_NETWORKS else ""))

    OUT.mkdir(exist_ok=True)
    save(histogram(results), "midpoints")
    paths = plots.barrier({name: results[name] for name in SHOWN}, y_label="test loss")
    save(paths, "paths")
    widest = int(results["none"].maximum.argmax())
    curve = fit_curve(starts[widest], ends[widest], energy, steps=CURVE_STEPS, seed=0)
    plane = loss_plane(*curve.control[[0, 2, 1]], energy)
    save(plots.loss_plane(plane, curve), "plane")
    print(f"pictures: {OUT}/dwsnets_alignment_*.png")


def row(name: str, found: Barrier, energies: Barrier, seconds: float) -> str:
    def interval(values: Tensor) -> str:
        return f"{values.mean():.3f} +- {values.std() / len(values) ** 0.5:.3f}"

    cells = f"{interval(found.midpoint):>17}{interval(found.maximum):>17}{found.area.mean():9.3f}"
    return f"{name:36}{cells}{interval(energies.maximum):>18}{1000 * seconds:15.2f}"


def save(figure: Figure, name: str) -> None:
    """Write a picture on white, which plots for reports leave out."""
    figure.patch.set_alpha(1)
    figure.savefig(OUT / f"dwsnets_alignment_{name}.png", dpi=150, facecolor="white")


def histogram(results: dict[str, Barrier]) -> Figure:
    """Draw the midpoint losses of all pairs."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    bins = torch.linspace(0, float(results["none"].midpoint.quantile(0.99)), 41).tolist()
    for name, colour in plots.colours(list(SHOWN)).items():
        midpoint = results[name].midpoint
        ax.hist(
            midpoint.clamp(max=bins[-1]).tolist(),
            bins,
            color=colour,
            alpha=0.55,
            label=name,
        )
        ax.axvline(float(midpoint.mean()), color=colour, linewidth=1.5)
    ax.set(
        xlabel="test loss half way between two networks (lines: means)",
        ylabel="pairs of networks",
        xlim=(0, bins[-1]),
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help=f"{FULL_NETWORKS} networks")
    full = parser.parse_args().full
    main(
        FULL_NETWORKS if full else NETWORKS, FULL_SINKHORN_PAIRS if full else SINKHORN_PAIRS
    )
