"""Three weight-space flows in three couplings, on breast cancer: what single generated networks are
worth.

30-16-16-2 ReLU. Targets are iterates of Adam from many starts. Three geometries: Euclidean;
Normalised, Euclidean towards networks of normalised scales and normalised again at the end;
Geometric, along geodesics of the spheres that normalised networks live on. Three couplings:
unaligned, with a field that is equivariant to permutations; aligned to the targets' Frechet mean,
with a field that knows the place of every weight; and aligned with optimal transport within each
batch. Every flow also runs guided by the log likelihood of the training rows, but for the Geometric
ones: a `ManifoldFlow` has no guidance. After Erdogan (2025, "Geometric Flow Models over Neural
Network Weights", arXiv 2504.03710), whose figures are of another split, other targets and other
fields. Run: python examples/thesis_breast_cancer.py [--full] [--cells "Geometric, aligned" ...]:
fields of few steps, or, in a quarter of an hour, the table of docs/benchmarks.md. Every finished
cell is kept in out/, run again to resume; so is its field in out/thesis_breast_cancer/: without the
JSON file the cells are evaluated again, not trained.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from weight_space import remembered, table

import bnnflow as bf
from bnnflow.equivariant import DWSNet, Wiring
from bnnflow.report import plots
from bnnflow.symmetry import Spheres, barrier, frechet_mean
from bnnflow.transport import (
    AffinePath,
    Field,
    Flow,
    Independent,
    MiniBatchOT,
    Solver,
    train,
)
from bnnflow.transport.geometry import RiemannianPath
from bnnflow.transport.manifold import ManifoldFlow
from bnnflow.weights import Symmetries, WeightSpec

OUT = Path("out")
STARTS, ITERATES = 400, (60, 70, 80, 90, 100)  # of Adam, at learning rate 0.01
BATCH, WIDTH, DEPTH, SOLVER_STEPS = 128, 48, 2, (1, 2, 4, 8, 16)
# Of guidance: the strength is that of STRENGTHS whose networks come nearest to the targets' loss on
# *training* rows.
STRENGTH, CLIMB, STRENGTHS = 30.0, 2, (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)
GEOMETRIES, COUPLINGS = (
    ("Euclidean", "Normalised", "Geometric"),
    ("unaligned", "aligned", "aligned + OT"),
)
LOWEST = 0.955  # accuracy in the picture


class Sizes(NamedTuple):
    """How much of everything."""

    steps: int  # of training
    generated: int  # networks
    cells: tuple[str, ...]


FULL = Sizes(700, 500, tuple(f"{a}, {b}" for a in GEOMETRIES for b in COUPLINGS))
SMALL = Sizes(
    100, 200, ("Euclidean, unaligned", "Euclidean, aligned", "Geometric, aligned")
)
PUBLISHED = {  # accuracy and loss, shown beside --full only
    "targets": (0.992, 0.048),
    "Euclidean, unaligned": (0.998, 0.101),
    "Euclidean, aligned": (0.998, 0.070),
    "Euclidean, aligned + OT": (0.993, 0.053),
    "Normalised, unaligned": (0.993, 0.027),
    "Geometric, aligned": (0.993, 0.018),
}


class Residual(Field):
    """What a `DWSNet` adds to the closed-form field from the source to a Gaussian that is fitted to
    the targets.

    Args:
        spec: what the entries mean.
        source: standard deviations of the source, ``(dim,)``.
        targets: networks that the Gaussian is fitted to, ``(n, dim)``.
        placed: give it their mean and covariance, and let the network know the place of every
            weight by features of its own; else mean and variance of each tensor, which keeps the
            field equivariant to permutations.
        spheres: drop what is not tangent to them.
    """

    def __init__(
        self,
        spec: WeightSpec,
        source: Tensor,
        targets: Tensor,
        placed: bool,
        spheres: Spheres | None,
    ) -> None:
        super().__init__()
        self.spheres = spheres
        scaled = targets / source
        if placed:
            mean, covariance = scaled.mean(0), torch.cov(scaled.double().T)
            covariance = 0.95 * covariance + 0.05 * covariance.diagonal().diag()
            variance, vectors = (each.float() for each in torch.linalg.eigh(covariance))
            sd = covariance.diagonal().float().sqrt()
        else:
            parts = [scaled[:, where] for where in spec.slices.values()]
            mean = torch.cat([part.mean().expand(part.shape[1]) for part in parts])
            sd = torch.cat([part.std().expand(part.shape[1]) for part in parts])
            variance, vectors = sd.square(), torch.empty(0)
        # No buffers: they are not kept with the parameters, the targets give them again.
        self.source, self.mean, self.sd, self.variance, self.vectors = (
            source,
            mean,
            sd.clamp(min=1e-3),
            variance,
            vectors,
        )
        self.codes = nn.Parameter(0.1 * torch.randn(spec.dim, 3)) if placed else None
        self.net = DWSNet(
            spec, 7 if placed else 2, 1, WIDTH, DEPTH, time=True, wiring=Wiring(heads=0)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.expand(len(x)).to(x)
        now = t.unsqueeze(-1)
        away = x / self.source - now * self.mean
        gain = (now * self.variance - (1 - now)) / (now**2 * self.variance + (1 - now) ** 2)
        known = self.mean + (
            away * gain
            if self.codes is None
            else (away @ self.vectors * gain) @ self.vectors.T
        )
        scale = (now**2 * self.sd**2 + (1 - now) ** 2).sqrt()
        features = torch.stack(
            [away / scale, (known - self.mean) * scale / self.sd.clamp(min=0.1)], -1
        )
        if self.codes is not None:
            # (dim, 5)
            fixed = torch.cat([torch.stack([self.mean, self.sd.log()], -1), self.codes], -1)
            features = torch.cat([features, fixed.expand(len(x), -1, -1)], -1)
        velocity = self.source * (
            known + self.net(features, t).squeeze(-1) * self.sd / scale
        )
        return velocity if self.spheres is None else self.spheres.tangent(x, velocity)


def iterates(model: bf.BayesianModel) -> Tensor:
    """Return networks on the way of Adam from many random starts,
    ``(STARTS * len(ITERATES), dim)``.

    It descends -log joint / n on all rows: the cross-entropy with a weight decay of 1 / n, the
    prior's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = (30, 16, 16, 2)
        starts = [
            torch.cat(
                [
                    p.flatten()
                    for i in range(3)
                    for p in nn.Linear(sizes[i], sizes[i + 1]).parameters()
                ]
            )
            for _ in range(STARTS)
        ]
    theta = torch.stack(starts).detach().requires_grad_()
    optimiser, kept = torch.optim.Adam([theta], 0.01), []
    for step in range(1, max(ITERATES) + 1):
        theta.grad = -model.log_joint_and_grad(theta.detach())[1] / len(model.x)
        optimiser.step()
        if step in ITERATES:
            kept.append(theta.detach().clone())
    return torch.cat(kept)


def experiment(sizes: Sizes, full: bool) -> None:
    torch.set_num_threads(1)
    data = bf.data.load("breast_cancer")
    net = nn.Sequential(
        nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Categorical(), data.x_train, data.y_train
    )
    spec, spheres = model.spec, Spheres(model.spec)
    targets = iterates(model)

    def loss(theta: Tensor) -> Tensor:
        return -model.pointwise_log_likelihood(theta, data.x_test, data.y_test).mean(-1)

    def training_loss(theta: Tensor) -> float:
        return float(-model.log_likelihood(theta).mean() / len(model.x))

    def worth(theta: Tensor) -> dict[str, Any]:
        """Accuracy and loss of single networks on unseen rows.

        How neighbours differ, and the barriers between them.

        A generator of one network could have the best loss: the differences say whether it is one
            of many.
        """
        logits = model.outputs(theta, data.x_test)
        right = (logits.argmax(-1) == data.y_test).float().mean(-1)
        probs = logits.softmax(-1)[..., 0]
        found = barrier(theta[:200], theta[:200].roll(1, 0), loss, points=11)
        return {
            "accuracy": float(right.mean()),
            "accuracy_error": float(right.std()) / len(right) ** 0.5,
            "loss": float(loss(theta).mean()),
            "difference": float((probs - probs.roll(1, 0)).abs().mean()),
            "barriers": found.maximum.tolist(),
        }

    def fitted(
        name: str, geometry: str, coupling: str
    ) -> tuple[Flow | ManifoldFlow, float]:
        """Return the flow of a cell and the CPU seconds of its training, now or in an earlier
        run.
        """
        placed, curved = coupling != "unaligned", geometry == "Geometric"
        x1 = targets if geometry == "Euclidean" else spheres.project(targets)
        x1 = frechet_mean(x1, spec)[0] if placed else x1
        rule = MiniBatchOT() if coupling == "aligned + OT" else Independent()
        # A common permutation of both ends would undo the alignment.
        group = Symmetries(
            frozenset() if placed else spec.symmetries().permutation,
            frozenset(),
            frozenset(),
        )

        def source(n: int, generator: torch.Generator) -> Tensor:
            return (
                spheres.sample(n, generator)
                if curved
                else torch.randn(n, spec.dim, generator=generator)
            )

        def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(x1), (n,), generator=generator)
            return rule.pair(source(n, generator), x1[rows], spec, group, generator)

        on_sphere = torch.cat([spheres.sizes, torch.ones(1)])[spheres.owner].float()
        # of one coordinate of the source
        sd = on_sphere.rsqrt() if curved else torch.ones(spec.dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            field = Residual(spec, sd, x1, placed, spheres if curved else None)
        file = OUT / "thesis_breast_cancer" / f"{name}.pt"
        if file.is_file():
            kept = torch.load(file, weights_only=True)
            field.load_state_dict(kept["field"])
            field.requires_grad_(False)
        else:
            path = RiemannianPath(spheres) if curved else AffinePath()
            field, info = train(
                field,
                pairs,
                path=path,
                seed=0,
                training=bf.Training(steps=sizes.steps, batch_size=BATCH),
            )
            kept = {"field": field.state_dict(), "seconds": info["cpu_seconds"]}
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(kept, file)
        # The prior is the source of a flow that is not on the spheres.
        return ManifoldFlow(field, spheres) if curved else Flow.of(field, model), kept[
            "seconds"
        ]

    def run(name: str, geometry: str, coupling: str) -> dict[str, Any]:
        flow, seconds = fitted(name, geometry, coupling)

        def generated(
            flow: Flow | ManifoldFlow, count: int, networks: int = sizes.generated
        ) -> Tensor:
            theta = flow.sample(networks, 1, solver=Solver(steps=count))
            return spheres.project(theta) if geometry == "Normalised" else theta

        def by_steps(flow: Flow | ManifoldFlow) -> dict[str, Any]:
            found = {count: worth(generated(flow, count)) for count in SOLVER_STEPS}
            curve = {
                count: (each["accuracy"], each["loss"]) for count, each in found.items()
            }
            return found[max(SOLVER_STEPS)] | {"by_steps": curve}

        result = by_steps(flow) | {"training": seconds}
        if isinstance(flow, Flow):
            result["guided"] = by_steps(flow.guided(model, STRENGTH, steps=CLIMB))
            result["strengths"] = [
                training_loss(
                    generated(
                        flow.guided(model, strength, steps=CLIMB), max(SOLVER_STEPS), 100
                    )
                )
                for strength in STRENGTHS
            ]
        return result

    path = OUT / "thesis_breast_cancer.json"
    truth = worth(
        targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    )
    results, rows = {"targets": truth}, [row("targets", truth, full)]
    for geometry in GEOMETRIES:
        for coupling in COUPLINGS:
            name = f"{geometry}, {coupling}"
            key = f"{name}, {sizes.steps} steps, {sizes.generated} networks"
            if name in sizes.cells:
                results[name] = remembered(path, key, partial(run, key, geometry, coupling))
                rows.append(row(name, results[name], full))
                print(" ".join(f"{cell:24}" for cell in rows[-1]), flush=True)
    print(
        f"\n{len(targets)} targets; {sizes.generated} generated networks a cell, "
        f"{max(SOLVER_STEPS)} midpoint steps\n"
    )
    head = (
        "networks",
        "accuracy",
        "loss",
        "difference",
        "barrier",
        "guided: accuracy",
        "guided: loss",
        "guided: difference",
        "CPU s of training",
        "published: accuracy, loss",
    )
    print(table(head if full else head[:-1], rows))
    if scans := [found["strengths"] for found in results.values() if "strengths" in found]:
        losses = torch.tensor(scans).mean(0).tolist()
        shown = ", ".join(
            f"{strength:g}: {each:.4f}"
            for strength, each in zip(STRENGTHS, losses, strict=True)
        )
        print(
            f"\nguidance of strength {STRENGTH:g}; training loss by strength, mean over cells: "
            f"{shown};",
            end=" ",
        )
        print(f"of the targets: {training_loss(targets):.4f}")
        gradients = ", ".join(f"{2 * count * (2 * CLIMB + 1)}" for count in SOLVER_STEPS)
        print(
            f"gradients of the log likelihood a draw: {gradients} at "
            f"{', '.join(map(str, SOLVER_STEPS))} steps"
        )
    OUT.mkdir(exist_ok=True)
    pictures(results).savefig(OUT / "thesis_breast_cancer.png", dpi=150)
    print(f"picture: {OUT}/thesis_breast_cancer.png")


def row(name: str, found: dict[str, Any], full: bool) -> tuple[str, ...]:
    guided, published = found.get("guided"), PUBLISHED.get(name)
    cells = (
        name,
        *scores(found),
        f"{sum(found['barriers']) / len(found['barriers']):.3f}",
        *(scores(guided) if guided else ("", "", "")),
        f"{found['training']:.0f}" if "training" in found else "",
        f"{published[0]:.3f}, {published[1]:.3f}" if published else "",
    )
    return cells if full else cells[:-1]


def scores(found: dict[str, Any]) -> tuple[str, str, str]:
    return (
        f"{found['accuracy']:.3f} ± {found['accuracy_error']:.3f}",
        f"{found['loss']:.3f}",
        f"{found['difference']:.3f}",
    )


def pictures(results: dict[str, dict[str, Any]]) -> Figure:
    """Draw the barriers between generated networks, and accuracy against the solver's steps, a
    column a geometry.
    """
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 3, sharex="row", sharey="row")
    colours = {"targets": plots.INK} | plots.colours(list(COUPLINGS))
    for geometry, upper, lower in zip(GEOMETRIES, *axes, strict=True):
        upper.set_title(geometry, loc="left", fontweight="bold")
        upper.ecdf(results["targets"]["barriers"], color=colours["targets"])
        lower.axhline(results["targets"]["accuracy"], color=colours["targets"], linewidth=1)
        for coupling in COUPLINGS:
            found = results.get(f"{geometry}, {coupling}")
            if found is None:
                continue
            upper.ecdf(found["barriers"], color=colours[coupling])
            for each, style in ((found, "o-"), (found.get("guided"), "o--")):
                if each:
                    accuracies = [accuracy for accuracy, _ in each["by_steps"].values()]
                    lower.plot(
                        SOLVER_STEPS, accuracies, style, color=colours[coupling], ms=3.5
                    )
                    for count, accuracy in zip(SOLVER_STEPS, accuracies, strict=True):
                        if accuracy < LOWEST:
                            lower.text(
                                count,
                                LOWEST,
                                f"↓ {accuracy:.3f}",
                                va="bottom",
                                fontsize=8,
                                color=colours[coupling],
                            )
        # nearly all barriers of aligned networks are zero
        upper.set_xscale("symlog", linthresh=0.01, linscale=0.8)
        upper.set_xticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
        upper.set(
            xlabel="loss barrier between two networks", xlim=(-3e-4, 1), ylim=(0, 1.02)
        )
        lower.set_xscale("log", base=2)
        lower.set_xticks(SOLVER_STEPS, [str(count) for count in SOLVER_STEPS])
        lower.set(xlabel="midpoint steps", ylim=(LOWEST, None))
        for ax in (upper, lower):
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.25)
            ax.tick_params(labelleft=True)
    axes[0, 0].set_ylabel("share of pairs with at most this barrier")
    axes[1, 0].set_ylabel("accuracy of single networks")
    axes[1, 2].text(
        16, LOWEST + 0.001, "no guidance\non the spheres", ha="right", color="grey"
    )
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    handles.append(Line2D([], [], color="grey", linestyle="-", label="without guidance"))
    handles.append(Line2D([], [], color="grey", linestyle="--", label="with guidance"))
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full", action="store_true", help="nine cells of 700 steps: a quarter of an hour"
    )
    parser.add_argument("--cells", nargs="*", choices=FULL.cells, help="these only")
    given = parser.parse_args()
    sizes = FULL if given.full else SMALL
    experiment(sizes._replace(cells=tuple(given.cells or sizes.cells)), given.full)


if __name__ == "__main__":
    main()
