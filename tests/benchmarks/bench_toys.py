"""Flows between 2-D sets beside torchcfm: exact W2 to fresh draws of the target, and normalised
path energy.

The same network, its first weights, batch and number of steps for all, without noise on the path.
"plain" is the loop of torchcfm's examples, Adam at 1e-3, in which only the pairs differ; "train" is
our own loop. Means over seeds, with the standard deviation between them; the W2 of fresh draws is
what two samples of the target have between them. The energy is |E int |v|^2 dt - W2^2| / W2^2 with
the squared W2 between source and target (Tong et al. 2024). Run:
``python tests/benchmarks/bench_toys.py [steps] [seeds]``, optionally after
``pip install --no-deps torchcfm``.
"""

import copy
import importlib.util
import math
import sys
import time
from collections.abc import Callable

import numpy as np
import ot
import sklearn.datasets
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.transport import (
    Independent,
    MiniBatchOT,
    SinkhornOT,
    integrate,
    time_grid,
    train,
)
from bnnflow.transport.couplings import Coupling
from bnnflow.weights import Symmetries

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
SEEDS = int(sys.argv[2]) if len(sys.argv) > 2 else 4
BATCH, DRAWS, WIDTH = 128, 2000, 64
TORCHCFM = importlib.util.find_spec("torchcfm") is not None
SPEC = bf.WeightSpec.unlabelled(nn.Linear(2, 1, bias=False))
NO_SYMMETRY = Symmetries(frozenset(), frozenset(), frozenset())

Sampler = Callable[[int, torch.Generator], Tensor]


def normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator)


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    return 5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.3 * normal(n, generator)


def moons(n: int, generator: torch.Generator) -> Tensor:
    seed = int(torch.randint(2**31, (), generator=generator))
    return (
        3
        * torch.from_numpy(
            sklearn.datasets.make_moons(n, noise=0.07, random_state=seed)[0]
        ).float()
        - 1
    )


def swiss_roll(n: int, generator: torch.Generator) -> Tensor:
    seed = int(torch.randint(2**31, (), generator=generator))
    points = sklearn.datasets.make_swiss_roll(n, noise=0.5, random_state=seed)[0]
    return torch.from_numpy(points[:, [0, 2]]).float() / 4


TASKS: dict[str, tuple[Sampler, Sampler]] = {
    "8 Gaussians to moons": (eight_gaussians, moons),
    "normal to 8 Gaussians": (normal, eight_gaussians),
    "normal to moons": (normal, moons),
    "normal to swiss roll": (normal, swiss_roll),
}


class Field(nn.Module):
    """A perceptron of x and t."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)]
        self.net = nn.Sequential(
            *(m for s in sizes for m in (nn.Linear(*s), nn.SELU())), nn.Linear(WIDTH, 2)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, t.expand(len(x)).unsqueeze(1).to(x)], 1))


Pairs = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
Batch = Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor]]


def pairs_of(source: Sampler, target: Sampler, coupling: Coupling) -> Pairs:
    return lambda n, g: coupling.pair(source(n, g), target(n, g), SPEC, NO_SYMMETRY, g)


def on_lines(pairs: Pairs) -> Batch:
    def batch(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        (x0, x1), t = pairs(BATCH, g), torch.rand(BATCH, generator=g)
        return t, torch.lerp(x0, x1, t.unsqueeze(1)), x1 - x0

    return batch


def of_torchcfm(source: Sampler, target: Sampler, name: str) -> Batch:
    from torchcfm import conditional_flow_matching

    matcher = getattr(conditional_flow_matching, name)(sigma=0.0)
    return lambda g: matcher.sample_location_and_conditional_flow(
        source(BATCH, g), target(BATCH, g)
    )


def plain(field: Field, batch: Batch, generator: torch.Generator) -> nn.Module:
    optimiser = torch.optim.Adam(field.parameters(), 1e-3)
    for _ in range(STEPS):
        t, x, velocity = batch(generator)
        loss = (field(t, x) - velocity).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return field


Method = Callable[[Field, Sampler, Sampler, torch.Generator], nn.Module]


def by_plain(coupling: Coupling) -> Method:
    return lambda field, a, b, g: plain(field, on_lines(pairs_of(a, b, coupling)), g)


def by_torchcfm(name: str) -> Method:
    return lambda field, a, b, g: plain(field, of_torchcfm(a, b, name), g)


def by_train(coupling: Coupling) -> Method:
    def fit(
        field: Field, source: Sampler, target: Sampler, generator: torch.Generator
    ) -> nn.Module:
        pairs = pairs_of(source, target, coupling)
        return train(
            field,
            pairs,
            seed=generator,
            progress=False,
            training=bf.Training(steps=STEPS, batch_size=BATCH, optimiser="adamw"),
        )[0]

    return fit


METHODS: dict[str, Method] = {
    "plain, Independent": by_plain(Independent()),
    "plain, SinkhornOT": by_plain(SinkhornOT()),
    "plain, MiniBatchOT": by_plain(MiniBatchOT()),
    "train, Independent": by_train(Independent()),
    "train, MiniBatchOT": by_train(MiniBatchOT()),
}
RIVALS: dict[str, Method] = {
    "plain, torchcfm CFM": by_torchcfm("ConditionalFlowMatcher"),
    "plain, torchcfm OT-CFM": by_torchcfm("ExactOptimalTransportConditionalFlowMatcher"),
}


def squared_w2(a: Tensor, b: Tensor) -> float:
    return float(
        ot.emd2([], [], torch.cdist(a, b).square().double().numpy(), numItermax=10_000_000)
    )


def judge(
    field: nn.Module, x0: Tensor, target: Tensor, shift: float
) -> tuple[float, float]:
    """Return W2 of where the field carries ``x0`` to ``target``, and the normalised energy of the
    paths.
    """

    def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        velocity = field(t, state[0])
        return velocity, velocity.double().square().sum(1)

    start = (x0, torch.zeros(len(x0), dtype=torch.float64))
    with torch.no_grad():
        x1, energy = integrate(slope, start, time_grid(50, power=1.0), "rk4")
    return squared_w2(x1, target) ** 0.5, abs(float(energy.mean()) - shift) / shift


def spread(values: list[float]) -> str:
    numbers = torch.tensor(values)
    return f"{float(numbers.mean()):7.3f} +- {float(numbers.std()) if len(values) > 1 else 0:.3f}"


def main() -> None:
    torch.set_num_threads(1)
    methods = METHODS | RIVALS if TORCHCFM else METHODS
    if not TORCHCFM:
        print("without torchcfm (pip install --no-deps torchcfm)")
    print(f"{STEPS} steps of {BATCH} pairs, {SEEDS} seeds, W2 of {DRAWS} draws")
    for task, (source, target) in TASKS.items():
        results: dict[str, list[tuple[float, float, float]]] = {
            name: [] for name in methods
        }
        floors = []
        for seed in range(SEEDS):
            judges = torch.Generator().manual_seed(1000 + seed)
            x0, fresh = source(DRAWS, judges), target(DRAWS, judges)
            floors.append(squared_w2(target(DRAWS, judges), fresh) ** 0.5)
            shift = squared_w2(source(DRAWS, judges), fresh)
            # torchcfm draws its times globally, and with numpy its pairs
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                first = Field()
                for name, method in methods.items():
                    began = time.process_time()
                    field = method(
                        copy.deepcopy(first),
                        source,
                        target,
                        torch.Generator().manual_seed(seed),
                    )
                    seconds = time.process_time() - began
                    results[name].append((*judge(field, x0, fresh, shift), seconds))
        print(f"\n{task:24s} {'W2':>16s} {'energy':>16s} {'CPU s':>7s}")
        print(f"{'fresh draws':24s} {spread(floors)}")
        for name, rows in results.items():
            w2, energy, seconds = zip(*rows, strict=True)
            print(
                f"{name:24s} {spread(list(w2))} {spread(list(energy))} {sum(seconds) / SEEDS:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
