"""Cost of the weight-space layers: CPU time, ATen calls and peak memory of a forward and backward
pass, one thread.

Every case runs in a process of its own. Memory is what the passes add to the features, which exist
already: outputs, gradients and everything kept for the backward pass. "live" is the peak of the
tensors that one pass allocates, by the profiler's record of every allocation; "RSS" is the highest
resident size of the process over that before the first pass, in which the allocator keeps what was
freed, so that it varies by some 20 MB. Calls are the ATen operators that ``torch.profiler`` counts
in one pass. Run: ``python tests/benchmarks/bench_dws.py [--quick]``.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time

import torch
from torch import nn

from bnnflow import WeightSpec
from bnnflow.equivariant import DWSLayer, DWSNet, Wiring

BATCH, FEATURES = 64, 64
CASES = {
    "2-32-32-1": (2, 32, 32, 1),
    "2-32x6-1": (2, *[32] * 6, 1),
    "30-16-16-2": (30, 16, 16, 2),
    "13-50-1": (13, 50, 1),
}
# The reference implementation is in no registry: measured elsewhere with the same passes, not run
# here.
REFERENCE = """published/measured elsewhere, not run here:
the reference implementation of Navon et al. (2023) takes 3.9 to 8 times
the time of this layer, 3,937 to 9,335 calls and 690 to 1,097 MB for such passes."""


def chain(*widths: int) -> WeightSpec:
    modules: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        modules += [nn.Linear(n_in, n_out), nn.Tanh()]
    return WeightSpec.of(nn.Sequential(*modules[:-1]))


def resident(which: str) -> float:
    """Return a resident size of this process in MB: ``VmRSS`` now, ``VmHWM`` at its highest."""
    with open("/proc/self/status") as status:
        return (
            next(int(line.split()[1]) for line in status if line.startswith(which)) / 1024
        )


def measure(what: str, case: str, rounds: int) -> dict[str, float]:
    """Return the figures of one module on one architecture; meant for a fresh process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = chain(*CASES[case])
    n_in = FEATURES if what.startswith("layer") else 1
    module: nn.Module
    if what == "layer":
        module = DWSLayer(spec, FEATURES, FEATURES)
    elif what == "layer, exact":
        module = DWSLayer(spec, FEATURES, FEATURES, slots=max(CASES[case]))
    else:
        module = DWSNet(
            spec, 1, 10, 64, 4, invariant=True, wiring=Wiring(shared=what == "shared net")
        )

    def work(batch: torch.Tensor) -> None:
        module.zero_grad()
        batch.grad = None
        module(batch).square().mean().backward()

    # inside a stack, a layer's argument needs a gradient; the weights of networks do not
    needs = n_in == FEATURES
    work(torch.randn(1, spec.dim, n_in, requires_grad=needs))  # loads the kernels
    features = torch.randn(BATCH, spec.dim, n_in, requires_grad=needs)
    before = resident("VmRSS")
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work(features)
        times.append(time.process_time() - start)
    memory = resident("VmHWM") - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work(features)
    assert profile.profiler is not None
    events: list = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = itertools.accumulate(
        event.nbytes() for event in events if event.name() == "[memory]"
    )
    calls = sum(
        event.count for event in profile.key_averages() if event.key.startswith("aten::")
    )
    parameters = sum(parameter.numel() for parameter in module.parameters())
    milliseconds = 1e3 * sorted(times)[len(times) // 2]
    return {
        "ms": milliseconds,
        "calls": calls,
        "live": max(live) / 2**20,
        "RSS": memory,
        "parameters": parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="three rounds instead of fifteen"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rounds = 3 if options.quick else 15
    if options.one:
        what, case = options.one
        print(json.dumps(measure(what, case, rounds)))
        return
    print(
        f"forward and backward, batch {BATCH}, one thread; layers with {FEATURES} features, "
        "networks 64 wide, 4 deep"
    )
    print(
        f"{'':14}{'':12}{'ms':>8}{'ms/net':>8}{'calls':>8}{'live MB':>9}"
        f"{'RSS MB':>8}{'parameters':>12}"
    )
    names = ["layer", "layer, exact", "net", "shared net"]
    for what, case in itertools.product(names, CASES):
        if what == "layer, exact" and case in ("2-32-32-1", "2-32x6-1"):  # exact already
            continue
        arguments = [
            sys.executable,
            __file__,
            "--one",
            what,
            case,
            *(["--quick"] if options.quick else []),
        ]
        run = subprocess.run(
            arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True
        )
        if run.returncode:
            sys.exit(run.stderr.decode())
        found = json.loads(run.stdout.splitlines()[-1])
        memory = f"{found['calls']:8.0f}{found['live']:9.0f}{found['RSS']:8.0f}"
        figures = f"{memory}{found['parameters']:12,.0f}"
        print(
            f"{what:14}{case:12}{found['ms']:8.1f}{found['ms'] / BATCH:8.2f}{figures}",
            flush=True,
        )
    print(REFERENCE)


if __name__ == "__main__":
    main()
