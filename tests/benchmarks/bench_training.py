"""What `bnnflow.transport.train` costs beside the loop that one would write by hand, and where that
goes.

The bare loop has the same field, path, times, pairs, batch and optimisers, and nothing else: no
schedule, no weights of errors, no clipping, no check for gradients that are not finite, no moving
average, no loss by time, no progress bar. Blocks of both alternate in one process, each with a
fresh copy of the field and a fresh optimiser in its price (a millisecond or two), many of them, so
that a busy machine hurts both alike; asked is an overhead of at most 5%, the median of the ratios
of neighbours. "Calls" are the ATen operators that the profiler counts in a step, which no load
changes. Below that the parts of a step that the bare loop does not have, each timed alone as
`train` has it. A small field on few weights is the worst case: its step is little beside what is
done for every tensor. Last, a step of Muon beside torch's, which takes matrices one by one and in
bfloat16. Float32; CPU time of one thread, or time on the GPU's clock. Run: ``python
tests/benchmarks/bench_training.py [CASE ...] [--device cuda] [--blocks 15] [--seconds 2]``.
"""

import argparse
import copy
import itertools
import os
import statistics
from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from bench_throughput import clocked
from torch import Tensor, nn

from bnnflow import WeightSpec
from bnnflow.optimisers import Muon
from bnnflow.progress import progress_bar
from bnnflow.transport import (
    AffinePath,
    Field,
    LogUniformNearEnd,
    Training,
    TwoLayerVelocity,
    WeightsVelocity,
    train,
)
from bnnflow.types import Optimiser

ASKED = 0.05
REPEATS = 50  # of a part in one measurement
LEARNING_RATE, DECAY = 3e-3, 1e-3


class Case(NamedTuple):
    widths: tuple[int, ...]
    field: Callable[[WeightSpec], nn.Module]
    batch: int


CASES = {
    "small": Case((1, 4, 1), lambda spec: WeightsVelocity(spec, 16, 1), 64),
    "802": Case((30, 16, 16, 2), lambda spec: WeightsVelocity(spec, 16, 1), 256),
    "802-deep": Case((30, 16, 16, 2), lambda spec: WeightsVelocity(spec, 32, 4), 64),
    "802-flat": Case((30, 16, 16, 2), lambda spec: TwoLayerVelocity(spec.dim, 256), 256),
}


def spec_of(widths: tuple[int, ...]) -> WeightSpec:
    layers = [
        layer
        for pair in itertools.pairwise(widths)
        for layer in (nn.Linear(*pair), nn.ReLU())
    ]
    return WeightSpec.of(nn.Sequential(*layers[:-1]))


def optimisers(
    parameters: list[nn.Parameter], optimiser: Optimiser
) -> list[torch.optim.Optimizer]:
    matrices = [
        p for p in parameters if optimiser == "muon" and p.dim() == 2 and min(p.shape) > 4
    ]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, LEARNING_RATE, weight_decay=DECAY, foreach=True),
    ]
    if matrices:
        found.append(Muon(matrices, LEARNING_RATE, DECAY))
    return found


def bare(
    field: nn.Module,
    pairs: Callable,
    steps: int,
    batch: int,
    optimiser: Optimiser,
    device: str,
) -> None:
    path, times, generator = (
        AffinePath(),
        LogUniformNearEnd(),
        torch.Generator(device).manual_seed(0),
    )
    both = optimisers(list(field.parameters()), optimiser)
    for _ in range(steps):
        x0, x1 = pairs(batch, generator)
        t = times.sample(batch, x0, generator)
        x_t, target = path.point(x0, x1, t, generator)
        loss = (field(t, x_t) - target).square().sum(-1).mean()
        for each in both:
            each.zero_grad()
        loss.backward()
        for each in both:
            each.step()


def calls(block: Callable[[int], object]) -> float:
    """Return the ATen operators of one more step."""

    def counted(steps: int) -> int:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU]
        ) as profile:
            block(steps)
        return sum(
            event.count
            for event in profile.key_averages()
            if event.key.startswith("aten::")
        )

    return (counted(6) - counted(2)) / 4


def parts(
    field: Field, batch: int, optimiser: Optimiser, device: str
) -> dict[str, Callable[[], object]]:
    """Return what `train` does in a step and the bare loop does not, on parameters that have
    gradients.
    """
    parameters = [p for p in field.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    averages = [p.detach().clone() for p in parameters]
    errors, t = torch.rand(2, batch, device=device)
    graph = errors.clone().requires_grad_()
    bins = torch.zeros(2, 4, dtype=torch.float64, device=device)
    both = optimisers(parameters, optimiser)
    bar = progress_bar(None, "", False)

    def average() -> None:
        for mean, parameter in zip(averages, parameters, strict=True):
            mean.lerp_(parameter.detach(), 0.002)

    def loss_by_time() -> None:
        which = (t * 4).long().clamp_(max=3)
        bins.mul_(0.99)
        bins[0].index_add_(0, which, errors.detach().double())
        bins[1].index_add_(0, which, torch.ones_like(t, dtype=torch.float64))

    def weighted() -> None:
        (graph * field.loss_weight(t)).backward(errors)

    def rates() -> None:
        for group in (group for each in both for group in each.param_groups):
            group["lr"] = LEARNING_RATE

    return {
        "weights of errors": weighted,
        "norm of gradients, to clip them": lambda: float(
            nn.utils.get_total_norm(p.grad for p in parameters)
        ),  # type: ignore[misc]
        "moving average, every 4th step": average,
        "loss by time, every 4th step": loss_by_time,
        "learning rates, hidden bar": lambda: (rates(), bar.update()),
    }


def muon(field: nn.Module, device: str) -> str:
    """Return what a step of Muon takes, torch's and ours in turns."""
    matrices = [p for p in field.parameters() if p.dim() == 2 and min(p.shape) > 4]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    theirs = torch.optim.Muon(matrices, 0.0, adjust_lr_fn="match_rms_adamw")
    ours = Muon(matrices, 0.0, DECAY)
    times = [
        [clocked(each.step, device) for each in (theirs, ours)] for _ in range(REPEATS)
    ]
    torchs, own = (1e3 * statistics.median(each) for each in zip(*times, strict=True))
    return f"torch {torchs:.2f} ms, ours {own:.2f} ms, {torchs / own:.1f} times"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {list(CASES)}; all if none is named")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=15, help="of each loop")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block, about")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {sorted(unknown)}; there are {list(CASES)}")
    torch.set_num_threads(1)
    device = options.device
    where = (
        f"one thread, load {os.getloadavg()[0]:.1f}"
        if device == "cpu"
        else torch.cuda.get_device_name()
    )
    print(
        f"{where}, torch {torch.__version__}; {options.blocks} blocks of each loop in turns, "
        f"asked: {ASKED:.0%}"
    )
    for name, optimiser in itertools.product(options.cases or CASES, get_args(Optimiser)):
        case = CASES[name]
        spec = spec_of(case.widths)
        torch.manual_seed(0)
        field = case.field(spec).to(device)

        def pairs(
            n: int, generator: torch.Generator, dim: int = spec.dim
        ) -> tuple[Tensor, Tensor]:
            x0, x1 = torch.randn(2, n, dim, generator=generator, device=device)
            return x0, x1 + 1

        def block(
            whole: bool,
            steps: int,
            field=field,
            pairs=pairs,
            batch=case.batch,
            how=optimiser,
        ) -> float:
            own = copy.deepcopy(field)
            if whole:
                training = Training(
                    steps=steps,
                    batch_size=batch,
                    learning_rate=LEARNING_RATE,
                    optimiser=how,
                )
                settings = {
                    "path": AffinePath(),
                    "times": LogUniformNearEnd(),
                    "training": training,
                    "progress": False,
                }
                return clocked(lambda: train(own, pairs, **settings), device) / steps
            return (
                clocked(lambda: bare(own, pairs, steps, batch, how, device), device) / steps
            )

        block(True, 3)
        steps = max(5, int(options.seconds / block(False, 5)))
        found = []
        for index in range(options.blocks):
            first = block(index % 2 == 1, steps)  # each goes first in turn
            second = block(index % 2 == 0, steps)
            found.append((first, second) if index % 2 == 0 else (second, first))
        ratios = sorted(whole / own - 1 for own, whole in found)
        own, whole = (statistics.median(each) for each in zip(*found, strict=True))
        middle = statistics.median(ratios)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        shape = "-".join(map(str, case.widths))
        tensors = len(list(field.parameters()))
        sizes = f"{tensors} tensors, batch {case.batch}, {steps} steps a block"
        print(f"\n{name}: {shape}, {type(field).__name__}, {optimiser}, {sizes}")
        of_bare, of_train = (
            calls(lambda n, which=which: block(which, n)) for which in (False, True)
        )
        print(
            f"  a step: bare {own * 1e3:.2f} ms and {of_bare:,.0f} calls, "
            f"train {whole * 1e3:.2f} ms and {of_train:,.0f} calls (medians)"
        )
        verdict = "met" if middle <= ASKED else "missed"
        print(
            f"  overhead: median {middle:+.1%}, quartiles {low:+.1%} to {high:+.1%}: {verdict}",
            flush=True,
        )
        for part, work in parts(
            copy.deepcopy(field), case.batch, optimiser, device
        ).items():
            work()
            times = [
                clocked(lambda work=work: [work() for _ in range(REPEATS)], device)
                / REPEATS
                for _ in range(5)
            ]
            seconds = statistics.median(times)
            print(f"    {part:34s}{seconds * 1e6:8.0f} us {seconds / own:6.1%}")
        if optimiser == "muon":
            print(f"  a step of Muon: {muon(copy.deepcopy(field), device)}", flush=True)


if __name__ == "__main__":
    main()
