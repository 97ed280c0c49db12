"""Draws and log densities a second of flows on the 802 weights of 30-16-16-2, for several fields
and chunk sizes.

The project wants 100,000 draws in 10 seconds and 10,000 exact log densities in 60. Fields are not
trained, but what starts at zero is made random, so that all of their work is done. Draws take 8
midpoint steps (16 evaluations; a map of `distil` 4), log densities the divergence at 16 nodes and
17 midpoint steps. What would take long is measured on fewer steps or points and scaled up: a dear
field's draws on one midpoint step, all log densities but those of a closed trace on two nodes of a
few points. Float32; CPU time of one thread, or time on the GPU's clock. Run: ``python
tests/benchmarks/bench_throughput.py [FIELD ...] [--device cuda] [--rounds 3]``.
"""

import argparse
import inspect
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import bnnflow as bf
from bnnflow.transport import (
    Density,
    Flow,
    FlowMap,
    GradientSteps,
    InformedVelocity,
    Solver,
    TwoLayerVelocity,
    WeightsVelocity,
    distil,
)

CHUNKS = (128, 512, 2048)
DRAWS, DRAWS_ASKED, DRAWS_SECONDS = 2048, 100_000, 10
EXACT_ASKED, EXACT_SECONDS = 10_000, 60
STEPS, PROBES = 8, 8
LONG = 1.5  # seconds of a measurement from which it is scaled up
DEFAULT = inspect.signature(Flow.sample).parameters["chunk_size"].default
FIELDS = {
    "DWS 16/1": lambda spec: WeightsVelocity(spec, 16, 1),
    "DWS 32/2": lambda spec: WeightsVelocity(spec, 32, 2),
    "DWS 64/4": lambda spec: WeightsVelocity(spec, 64, 4),
    "two-layer 256": lambda spec: TwoLayerVelocity(spec.dim, 256),
    "informed 16/1": lambda spec: InformedVelocity(spec, GradientSteps(), 16, 1),
}
MAPS = {f"map of {name}": name for name in ("DWS 16/1", "two-layer 256")}


def problem(device: str) -> bf.BayesianModel:
    data = bf.data.load("breast_cancer")
    net = nn.Sequential(
        nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
    )
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Categorical(), data.x_train, data.y_train
    )
    return model.to(device, torch.float32)


def transport(name: str, model: bf.BayesianModel) -> Flow | FlowMap:
    """Return a flow, or a map, in which no parameter is zero."""
    torch.manual_seed(0)
    field = FIELDS[MAPS.get(name, name)](model.spec)
    for parameter in field.requires_grad_(False).parameters():
        if not bool(parameter.any()):
            parameter.normal_(std=0.02)
    flow = Flow.of(field.to(model.device, model.dtype), model)
    if name in MAPS:
        return distil(
            flow,
            4,
            trajectories=64,
            progress=False,
            training=bf.Training(steps=1, batch_size=64),
        )
    return flow


def clocked(work: Callable[[], object], device: str) -> float:
    """Return CPU seconds, or seconds until the GPU is done."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def draws(flow: Flow | FlowMap, device: str, rounds: int) -> dict[int, float]:
    """Return the median seconds of a draw for each chunk size, measured in turns."""

    def work(chunk: int, steps: int, n: int = DRAWS) -> float:
        options = {} if isinstance(flow, FlowMap) else {"solver": Solver("midpoint", steps)}
        return clocked(lambda: flow.sample(n, 0, chunk_size=chunk, **options), device) / n

    steps = STEPS
    if (
        isinstance(flow, Flow)
        and (work(128, 1, 128), work(128, 1, 128))[1] * STEPS * DRAWS > LONG
    ):
        steps = 1
    scale = 1 if isinstance(flow, FlowMap) else STEPS / steps
    for chunk in CHUNKS:
        work(chunk, 1, chunk)
    found = [[work(chunk, steps) * scale for chunk in CHUNKS] for _ in range(rounds)]
    return {
        chunk: statistics.median(each)
        for chunk, each in zip(CHUNKS, zip(*found, strict=True), strict=True)
    }


def exact(flow: Flow, device: str) -> float:
    """Return the seconds of an exact log density.

    Jacobians go through 1,024 products at once on a CPU.
    """
    closed = isinstance(flow.velocity, TwoLayerVelocity)
    n = 512 if closed else (4 if device == "cpu" else 256)
    steps = STEPS if closed else 1
    theta = flow.source.from_normal(flow.start(n, 0))
    flow.log_prob(theta[:1], solver=Solver(steps=1))
    return (
        clocked(lambda: flow.log_prob(theta, solver=Solver(steps=steps)), device)
        * STEPS
        / (steps * n)
    )


def hutchinson(flow: Flow, device: str, chunk: int) -> float:
    """Return the seconds of an estimated log density."""
    theta = flow.source.from_normal(flow.start(chunk, 0))

    def work(points: torch.Tensor = theta) -> torch.Tensor:
        return flow.log_prob(
            points,
            chunk_size=chunk,
            solver=Solver(steps=1),
            density=Density(trace="hutchinson", probes=PROBES),
        )

    work(theta[:8])
    return clocked(work, device) * STEPS / chunk


def met(seconds: float, asked: float) -> str:
    return f"{seconds:9,.1f} s {'met' if seconds <= asked else f'missed ({seconds / asked:.1f} x)'}"


def main() -> None:
    names = [*FIELDS, *MAPS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fields", nargs="*", help=f"of {names}; all if none is named")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if unknown := set(options.fields) - set(names):
        parser.error(f"no field {sorted(unknown)}; there are {names}")
    torch.set_num_threads(1)
    device = options.device
    model = problem(device)
    where = (
        f"one thread, load {os.getloadavg()[0]:.1f}"
        if device == "cpu"
        else torch.cuda.get_device_name()
    )
    print(f"{model.dim} weights, {len(model.x)} rows, {where}, torch {torch.__version__}")
    print(
        f"asked: {DRAWS_ASKED:,} draws in {DRAWS_SECONDS} s, {EXACT_ASKED:,} exact log densities "
        f"in {EXACT_SECONDS} s"
    )
    for name in options.fields or names:
        flow = transport(name, model)
        found = draws(flow, device, options.rounds)
        best = min(found, key=lambda chunk: found[chunk])
        print(f"\n{name}")
        print(
            "  draws a second    "
            + "".join(f"{f'{1 / s:,.0f} in {c}s':>17}" for c, s in found.items())
        )
        if DEFAULT in found:
            print(
                f"                    fastest {best}; the default of {DEFAULT}: "
                f"{found[DEFAULT] / found[best]:.2f} x"
            )
        print(
            f"  {DRAWS_ASKED:9,} draws  {met(found[best] * DRAWS_ASKED, DRAWS_SECONDS)}",
            flush=True,
        )
        if isinstance(flow, FlowMap):
            print("  no density")
            continue
        seconds = exact(flow, device)
        print(
            f"  {EXACT_ASKED:9,} exact  {met(seconds * EXACT_ASKED, EXACT_SECONDS)}, "
            f"{1 / seconds:,.3g} a second"
        )
        if isinstance(flow.velocity, TwoLayerVelocity):  # estimates would only cost more
            continue
        estimated = {chunk: hutchinson(flow, device, chunk) for chunk in (128, 512)}
        print(
            f"  {PROBES} probes, a second"
            + "".join(f"{f'{1 / s:,.3g} in {c}s':>17}" for c, s in estimated.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
