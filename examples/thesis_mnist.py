"""Flows over the weights of MNIST classifiers: single networks, averages, guidance, starts for
training, other widths.

784-10-10 ReLU, 7,960 weights. Targets are late iterates of Adam from many random starts, on 8,000
digits; all figures are on 2,000 others. Three flows: Euclidean with a field that is equivariant to
permutations of hidden units; Euclidean towards targets that are aligned to their Frechet mean, with
a field that knows the place of every unit; and along the geodesics of the spheres that networks of
normalised scales live on, aligned. A Gaussian fitted to the aligned targets is the baseline.

The images are centred and rotated to their principal components, which changes no network but its
coordinates. A field is the closed form of independent Gaussian weights plus attention between the
hidden units, which sees the weights of the leading components only: those of all others hardly
touch the function.

After Erdogan (2025, "Geometric Flow Models over Neural Network Weights", arXiv 2504.03710), whose
figures are of all 60,000 digits, other targets, and Fashion-MNIST for guidance. Run: python
examples/thesis_mnist.py [--data FOLDER] [--full] ``FOLDER`` (or ``$BNNFLOW_DATA``) has
``mnist10k.npz``. Without --full networks and steps are few, and the run takes two minutes. Results
go to out/.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from weight_space import table

import bnnflow as bf
from bnnflow.equivariant.network import TimeEmbedding
from bnnflow.inference.start import random_networks
from bnnflow.report import plots
from bnnflow.symmetry import Spheres, frechet_mean, match
from bnnflow.transport import AffinePath, Field, Flow, Solver, train
from bnnflow.transport.geometry import RiemannianPath
from bnnflow.transport.manifold import ManifoldFlow
from bnnflow.weights import WeightSpec

OUT = Path("out")
SD = 0.2  # of the prior
RATE, ROWS = 0.01, 250  # Adam for networks: learning rate, and digits in a batch
LEADING, WIDTH, DEPTH, HEADS = 128, 128, 3, 4  # of a field
GENERATED, SOLVER_STEPS, AVERAGED = 400, 16, (1, 5, 10, 50)
# digits of another task, times at which they pull, gradient steps each time
FEW, PULLS, CLIMB = 1000, 6, 8
TUNED, WIDE, STEPS_OF_TUNING = 50, 32, (0, 1, 5, 25, 100)
FLOWS = {
    "Euclidean, unaligned": (False, False),
    "Euclidean, aligned": (True, False),
    "Geometric, aligned": (True, True),
}


class Block(nn.Module):
    """Attention between tokens ``(batch, tokens, WIDTH)`` and a perceptron on each, both modulated
    by time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modulate = nn.Linear(WIDTH, 6 * WIDTH)
        self.mix, self.join = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor, now: Tensor) -> Tensor:
        scale, shift, gate, scale_2, shift_2, gate_2 = self.modulate(now).chunk(6, -1)
        seen = self.mix(F.layer_norm(tokens, (WIDTH,)) * (1 + scale) + shift)
        # (batch, heads, tokens, own)
        query, key, value = seen.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heard = (
            F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        )
        tokens = tokens + (1 + gate) * self.join(heard)
        seen = self.widen(F.layer_norm(tokens, (WIDTH,)) * (1 + scale_2) + shift_2)
        return tokens + (1 + gate_2) * self.narrow(F.gelu(seen))


class Attention(nn.Module):
    """Attention between hidden units: features of units ``(batch, units, features)`` and of outputs
    ``(batch, 10)``.

    Every unit is a token, and the output biases are one more. Without ``places`` it commutes with
    permutations of the units, and takes any number of them.
    """

    def __init__(self, features: int, places: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(WIDTH)
        self.lift, self.lift_outputs = nn.Linear(features, WIDTH), nn.Linear(10, WIDTH)
        self.places = nn.Parameter(0.1 * torch.randn(places, WIDTH)) if places else None
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head, self.head_outputs = nn.Linear(WIDTH, features), nn.Linear(WIDTH, 10)
        for name, parameter in self.named_parameters():
            if name.startswith("head") or "modulate" in name:
                nn.init.zeros_(parameter)

    def forward(self, units: Tensor, outputs: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.lift(units) if self.places is None else self.lift(units) + self.places
        # (batch, units + 1, WIDTH)
        tokens = torch.cat([tokens, self.lift_outputs(outputs).unsqueeze(1)], 1)
        now = self.time(t).unsqueeze(1)
        for block in self.blocks:
            tokens = block(tokens, now)
        tokens = F.layer_norm(tokens, (WIDTH,))
        return self.head(tokens[:, :-1]), self.head_outputs(tokens[:, -1])


class UnitField(Field):
    """The closed-form field from the source to independent Gaussian weights, and what `Attention`
    adds to it.

    Args:
        spec: what the entries mean.
        targets: networks that the Gaussian is fitted to, ``(n, dim)``.
        placed: give every weight its own Gaussian and every unit a place; else all units share
            theirs.
        spheres: drop what is not tangent to them.
    """

    def __init__(
        self,
        spec: WeightSpec,
        targets: Tensor,
        placed: bool,
        spheres: Spheres | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.spheres = spec, spheres
        source = torch.ones(spec.dim)  # standard deviation of one coordinate of the source
        if spheres is not None:
            source = F.pad(spheres.sizes.float().rsqrt(), (0, 1), value=1.0)[spheres.owner]
        scaled = targets / source
        mean, square = scaled.mean(0), scaled.square().mean(0)
        if not placed:
            mean, square = (over_units(each, spec, spec) for each in (mean, square))
        self.source, self.mean, self.sd = (
            source,
            mean,
            (square - mean.square()).clamp(min=1e-6).sqrt(),
        )
        self.net = Attention(LEADING + 11, spec.widths["h1"] if placed else 0)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.expand(len(x)).to(x)
        now = t.unsqueeze(-1)
        variance = now**2 * self.sd**2 + (1 - now) ** 2
        away, scale = x / self.source - now * self.mean, variance.sqrt()
        known = self.mean + away * (now * self.sd**2 - (1 - now)) / variance
        velocity = self.source * (known + self.added(t, away / scale) * self.sd / scale)
        return velocity if self.spheres is None else self.spheres.tangent(x, velocity)

    def added(self, t: Tensor, x: Tensor) -> Tensor:
        """Return what attention makes of the weights of the leading inputs, ``(batch, dim)``."""
        first, bias, last, outputs = self.spec.unflatten(x).values()
        # (batch, units, features)
        units = torch.cat([first[..., :LEADING], bias.unsqueeze(-1), last.mT], -1)
        units, outputs = self.net(units, outputs, t)
        first, bias, last = units.split([LEADING, 1, 10], -1)
        parts = (F.pad(first, (0, 784 - LEADING)), bias.squeeze(-1), last.mT, outputs)
        return self.spec.flatten(dict(zip(self.spec.names, parts, strict=True)))

    def on(self, spec: WeightSpec) -> Self:
        """Return a field without places for networks of another width, with the same parameters."""
        other = copy.copy(self)
        other.spec = spec
        other.source, other.mean, other.sd = (
            over_units(each, self.spec, spec) for each in (self.source, self.mean, self.sd)
        )
        return other


def over_units(values: Tensor, spec: WeightSpec, other: WeightSpec) -> Tensor:
    """Average values of weights ``(dim,)`` over the hidden units, and give the averages to those of
    another network.
    """
    first, bias, last, outputs = spec.unflatten(values).values()
    parts = (
        first.mean(0, keepdim=True),
        bias.mean(0, keepdim=True),
        last.mean(1, keepdim=True),
        outputs,
    )
    shared = [
        part.expand(shape) for part, shape in zip(parts, other.shapes.values(), strict=True)
    ]
    return other.flatten(dict(zip(other.names, shared, strict=True)))


class Digits:
    """The digits, and tasks made of them.

    Every task's images are centred, and rotated by the same matrix.
    """

    def __init__(self, folder: str | None) -> None:
        self.data = bf.data.load_images("mnist10k", folder=folder)
        flat = self.data.x_train.flatten(1)
        # leading ones first
        self.axes = (
            torch.linalg.eigh(torch.cov(flat.double().T)).eigenvectors.flip(1).float()
        )

    def model(
        self,
        units: int = 10,
        task: Callable[[Tensor], Tensor] = torch.Tensor.clone,
        n: int = 8000,
    ) -> tuple[bf.BayesianModel, Tensor, Tensor]:
        """Return a model of the first ``n`` digits, and the 2,000 inputs and labels that it never
        sees.
        """
        seen, unseen = (
            task(images).flatten(1) for images in (self.data.x_train, self.data.x_test)
        )
        inputs, unseen = ((images - seen.mean(0)) @ self.axes for images in (seen, unseen))
        net = nn.Sequential(nn.Linear(784, units), nn.ReLU(), nn.Linear(units, 10))
        labels = self.data.y_train[:n]
        model = bf.BayesianModel(
            net, bf.priors.Normal(SD), bf.likelihoods.Categorical(), inputs[:n], labels
        )
        return model, unseen, self.data.y_test


TASKS = {
    "turned by 90 degrees": lambda images: images.rot90(1, (1, 2)),
    "inverted": lambda images: 1 - images,
}


class Test:
    """What networks ``(n, dim)`` are worth on unseen digits."""

    def __init__(self, model: bf.BayesianModel, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y

    def log_probs(self, theta: Tensor) -> Tensor:
        """Return log probabilities ``(n, digits, classes)``."""
        return torch.cat(
            [self.model.outputs(rows, self.x).log_softmax(-1) for rows in theta.split(100)]
        )

    def scores(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return accuracy and loss, ``(..., digits, classes) -> (...)``."""
        right = (log_probs.argmax(-1) == self.y).float().mean(-1)
        return right, -log_probs[..., torch.arange(len(self.y)), self.y].mean(-1)

    def accuracy(self, theta: Tensor) -> list[float]:
        """Return mean and standard deviation over the networks."""
        accuracy, _ = self.scores(self.log_probs(theta))
        return [float(accuracy.mean()), float(accuracy.std())]

    def worth(self, theta: Tensor) -> dict[str, Any]:
        """Return accuracy and loss of single networks and of averages, and how much the networks
        disagree.
        """
        log_probs = self.log_probs(theta)
        accuracy, loss = self.scores(log_probs)
        p, q = log_probs, log_probs.roll(1, 0)
        middle = torch.logaddexp(p, q) - math.log(2)
        # Jensen and Shannon's, in nats
        divergence = 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1)
        averages = {}
        for count in AVERAGED:
            groups = log_probs[: len(theta) // count * count].unflatten(0, (-1, count))
            found = self.scores(groups.logsumexp(1) - math.log(count))
            averages[count] = [[float(each.mean()), float(each.std())] for each in found]
        return {
            "accuracy": [float(accuracy.mean()), float(accuracy.std())],
            "loss": [float(loss.mean()), float(loss.std())],
            "averages": averages,
            "divergence": float(divergence.mean()),
        }


def adam(
    model: bf.BayesianModel,
    theta: Tensor,
    steps: int,
    keep: tuple[int, ...],
    decay: bool = False,
) -> Tensor:
    """Return networks after some steps of Adam on -log joint / n, ``(len(keep), n, dim)``.

    Batches are shared.

    With ``decay`` the learning rate falls to a twentieth over the last two thirds.
    """
    generator = torch.Generator().manual_seed(1)
    theta = theta.clone().requires_grad_()
    optimiser, kept = torch.optim.Adam([theta], RATE), []
    for step in range(steps + 1):
        if step in keep:
            kept.append(theta.detach().clone())
        rows = (
            None
            if len(model.x) <= FEW
            else torch.randint(len(model.x), (ROWS,), generator=generator)
        )
        theta.grad = -model.log_joint_and_grad(theta.detach(), rows)[1] / len(model.x)
        for group in optimiser.param_groups:
            group["lr"] = (
                RATE * min(1.0, max(0.05, 1.5 * (1 - step / steps))) if decay else RATE
            )
        optimiser.step()
    return torch.stack(kept)


def fit(
    model: bf.BayesianModel, targets: Tensor, placed: bool, curved: bool, steps: int
) -> tuple[Any, dict[str, Any]]:
    """Fit a flow to targets, which are aligned if ``placed``, and on the spheres if ``curved``.

    Say how it went.
    """
    spheres = Spheres(model.spec) if curved else None
    # the coordinates in which the prior is N(0, I)
    x1 = targets if curved else targets / SD

    def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x0 = (
            spheres.sample(n, generator)
            if spheres
            else torch.randn(n, model.dim, generator=generator)
        )
        return x0, x1[torch.randint(len(x1), (n,), generator=generator)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = UnitField(model.spec, x1, placed, spheres)
    path = RiemannianPath(spheres) if spheres else AffinePath()
    field, info = train(
        field,
        pairs,
        path=path,
        seed=0,
        training=bf.Training(steps=steps, batch_size=64, learning_rate=2e-3),
    )
    flow = ManifoldFlow(field, spheres) if spheres else Flow.of(field, model)
    return flow, info


def guidance(flow: Flow, digits: Digits) -> dict[str, Any]:
    """Bend the flow towards other tasks, and fine-tune by as many gradients on the same digits."""
    gradients, found = PULLS * (2 * CLIMB + 1), {}
    for name, task in TASKS.items():
        other, x, y = digits.model(task=task, n=FEW)
        test, tuned = (
            Test(other, x, y),
            partial(adam, other, steps=gradients, keep=(gradients,)),
        )
        unguided = flow.sample(TUNED, 2, solver=Solver(steps=SOLVER_STEPS))
        # The base pulls back to its own networks, the more so the later.
        bent = flow.guided(other, lambda t: 30 / (1.05 - t), steps=CLIMB, max_norm=20.0)
        default = random_networks(
            other.spec, TUNED, torch.Generator().manual_seed(2), other.dtype
        )
        found[name] = {
            "unguided": test.accuracy(unguided),
            "guided": test.accuracy(bent.sample(TUNED, 2, solver=Solver("euler", PULLS))),
            "fine-tuned from the flow": test.accuracy(tuned(unguided)[0]),
            "trained from the default start": test.accuracy(tuned(default)[0]),
        }
    return found


def starts(model: bf.BayesianModel, test: Test, given: dict[str, Tensor]) -> dict[str, Any]:
    """Train from each start, and from the default one and the prior, on all digits."""
    default = random_networks(
        model.spec, TUNED, torch.Generator().manual_seed(3), model.dtype
    )
    given = given | {"default start": default, "prior": model.sample_prior(TUNED, 3)}
    steps = partial(adam, model, steps=max(STEPS_OF_TUNING), keep=STEPS_OF_TUNING)
    return {
        name: [test.accuracy(at) for at in steps(theta)] for name, theta in given.items()
    }


def main(folder: str | None, full: bool) -> None:
    torch.set_num_threads(1)
    began = time.process_time()
    runs, iterates = (500, (300, 350, 400, 450, 500)) if full else (150, (200, 250, 300))
    steps = 3000 if full else 300
    digits = Digits(folder)
    model, x, y = digits.model()
    spec, spheres, test = model.spec, Spheres(model.spec), Test(model, x, y)
    start = random_networks(spec, runs, torch.Generator().manual_seed(0), model.dtype)
    # (iterates, runs, dim)
    networks = adam(model, start, max(iterates), iterates, decay=True)
    unseen = runs // 10  # runs that no flow sees, to compare distances with
    print(f"{runs} runs of Adam: {time.process_time() - began:.0f} CPU seconds", flush=True)
    # by whether they are normalised
    frames = {
        False: networks,
        True: spheres.project(networks),
    }
    means = {
        curved: frechet_mean(each[-1, unseen:], spec, rounds=10)[1]
        for curved, each in frames.items()
    }
    aligned = {curved: match(frames[curved], spec, mean) for curved, mean in means.items()}
    train_set = aligned[False][:, unseen:].flatten(0, 1)

    def distances(theta: Tensor) -> Tensor:
        """Return each network's distance to the nearest that the flows saw, aligned and with scales
        normalised.
        """
        theta = match(spheres.project(theta), spec, means[True])
        return torch.cdist(theta, aligned[True][:, unseen:].flatten(0, 1)).amin(1)

    def report(name: str, theta: Tensor, seconds: float | None = None) -> None:
        found[name] = test.worth(theta) | {
            "nearest": float(distances(theta[:100]).mean()),
            "seconds": seconds,
        }
        print(f"{name}: accuracy {found[name]['accuracy'][0]:.3f}", flush=True)

    found: dict[str, dict[str, Any]] = {}
    mix = torch.randperm(runs, generator=torch.Generator().manual_seed(0))
    report("targets", networks[-1, mix][:GENERATED])
    found["targets"]["nearest"] = float(distances(networks[-1, :unseen]).mean())
    weights = torch.randn(
        GENERATED, len(train_set), generator=torch.Generator().manual_seed(1)
    )
    gaussian = train_set.mean(0) + weights @ (train_set - train_set.mean(0)) / math.sqrt(
        len(train_set)
    )
    report("Gaussian, aligned", gaussian, 0.0)
    flows: dict[str, Any] = {}
    for name, (placed, curved) in FLOWS.items():
        targets = (aligned if placed else frames)[curved][:, unseen:].flatten(0, 1)
        flows[name], info = fit(model, targets, placed, curved, steps)
        report(
            name,
            flows[name].sample(GENERATED, 1, solver=Solver(steps=SOLVER_STEPS)),
            info["cpu_seconds"],
        )

    flow, shared = flows["Euclidean, aligned"], flows["Euclidean, unaligned"]
    guided = guidance(flow, digits)
    started = starts(
        model, test, {"flow": flow.sample(TUNED, 3, solver=Solver(steps=SOLVER_STEPS))}
    )
    wide, *unseen_digits = digits.model(WIDE)
    transferred = Flow.of(shared.velocity.on(wide.spec), wide).sample(
        TUNED, 3, solver=Solver(steps=SOLVER_STEPS)
    )
    widened = starts(wide, Test(wide, *unseen_digits), {"flow": transferred})
    seconds = time.process_time() - began
    results = {
        "worth": found,
        "guidance": guided,
        "starts": started,
        "width 32": widened,
        "seconds": seconds,
    }
    OUT.mkdir(exist_ok=True)
    (OUT / "thesis_mnist.json").write_text(json.dumps(results, indent=1))
    print("\n" + tables(results, full))
    pictures(results).savefig(OUT / "thesis_mnist.png", dpi=150)
    print(f"{seconds:.0f} CPU seconds; picture: {OUT}/thesis_mnist.png")


def spread(pair: list[float]) -> str:
    return f"{pair[0]:.3f} ± {pair[1]:.3f}"


def tables(results: dict[str, Any], full: bool) -> str:
    """Lay out all results; ± is the standard deviation over networks, or over averages."""

    def published(figures: str) -> str:
        return f" (published: {figures})" if full else ""

    worth = results["worth"]
    head = ("networks", "accuracy", "loss", "divergence", "nearest", "CPU s of training")
    single = [
        (
            name,
            spread(each["accuracy"]),
            spread(each["loss"]),
            f"{each['divergence']:.4f}",
            f"{each['nearest']:.2f}",
            "" if each["seconds"] is None else f"{each['seconds']:.0f}",
        )
        for name, each in worth.items()
    ]
    averages = [
        (
            name,
            *(
                f"{spread(each['averages'][k][0])}, {each['averages'][k][1][0]:.3f}"
                for k in AVERAGED
            ),
        )
        for name, each in worth.items()
    ]
    tasks = [
        (name, *(spread(each) for each in by.values()))
        for name, by in results["guidance"].items()
    ]
    rows = [
        (f"{width}, {name}", *(spread(each) for each in curve))
        for width, curves in ((10, results["starts"]), (WIDE, results["width 32"]))
        for name, curve in curves.items()
    ]
    parts = {
        "Single networks" + published("targets 0.933 and 0.231, best flow 0.786"): table(
            head, single
        ),
        "Averages: accuracy, loss" + published("about 0.94"): table(
            ("networks", *map(str, AVERAGED)), averages
        ),
        f"Other tasks, {FEW} digits and {PULLS * (2 * CLIMB + 1)} gradients"
        + published("guided 0.754 on Fashion-MNIST"): table(
            ("task", *next(iter(results["guidance"].values()))), tasks
        ),
        "Accuracy after steps of Adam"
        + published(f"transfer to width {WIDE} 0.890"): table(
            ("width, start", *map(str, STEPS_OF_TUNING)), rows
        ),
    }
    return "\n\n".join(f"{title}\n\n{part}" for title, part in parts.items())


def pictures(results: dict[str, Any]) -> Figure:
    """Draw averages against their number, and training from several starts."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    colours = plots.colours(list(results["worth"]))
    for name, each in results["worth"].items():
        axes[0].plot(
            AVERAGED,
            [each["averages"][k][0][0] for k in AVERAGED],
            "o-",
            ms=3,
            color=colours[name],
            label=name,
        )
    axes[0].set(
        xlabel="networks in an average", ylabel="accuracy on unseen digits", xscale="log"
    )
    for ax, curves, width in (
        (axes[1], results["starts"], 10),
        (axes[2], results["width 32"], WIDE),
    ):
        for name, colour in plots.colours(list(curves)).items():
            ax.plot(
                STEPS_OF_TUNING,
                [each[0] for each in curves[name]],
                "o-",
                ms=3,
                color=colour,
                label=name,
            )
        ax.set(xlabel=f"steps of Adam, width {width}", xscale="symlog", ylim=(0, 1))
    for ax in axes:
        ax.legend(frameon=False, fontsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of mnist10k.npz; $BNNFLOW_DATA if not given")
    parser.add_argument(
        "--full",
        action="store_true",
        help="500 networks and 3,000 steps: a quarter of an hour",
    )
    given = parser.parse_args()
    main(given.data, given.full)
