"""CPU milliseconds of one plan, by batch and dimension, beside POT and torchcfm.

And what matching a plan costs.

The first table shows where POT's network simplex stops to be faster than scipy's assignment on the
centred cost (the switch inside `MiniBatchOT`). Best of several, all in turn, CPU time of the
process, one thread. torchcfm is optional: ``pip install --no-deps torchcfm``. Run:
``python tests/benchmarks/bench_couplings.py``.
"""

import importlib.util
import itertools
import time
import warnings
from collections.abc import Callable

import ot
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.transport import Independent, Matched, MiniBatchOT, SinkhornOT, couplings
from bnnflow.weights import Symmetries

BATCHES, DIMENSIONS, REPEATS = (64, 256, 1024), (2, 4, 8, 16, 131, 500), 5
WIDE = 1024  # batches from here on are timed twice
TORCHCFM = importlib.util.find_spec("torchcfm") is not None


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def best(rivals: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least CPU milliseconds of every rival, taken in turns."""
    times = {name: float("inf") for name in rivals}
    for _, (name, work) in itertools.product(range(repeats), rivals.items()):
        began = time.process_time()
        work()
        times[name] = min(times[name], 1e3 * (time.process_time() - began))
    return times


def rivals(x0: Tensor, x1: Tensor) -> dict[str, Callable[[], object]]:
    n, dim = x0.shape
    ones = torch.full((n,), 1 / n, dtype=torch.float64).numpy()
    raw = torch.cdist(x0, x1).square().double().numpy()
    spec = bf.WeightSpec.unlabelled(nn.Linear(dim, 1, bias=False))
    none = Symmetries(frozenset(), frozenset(), frozenset())
    sinkhorn = SinkhornOT()
    centred = couplings.doubly_centred(couplings.squared_cost(x0, x1))
    price = 0.1 * float(centred.square().mean().sqrt())
    cost = couplings.squared_cost(x0, x1)

    def by(flat: int) -> None:
        switch, couplings.FLAT = couplings.FLAT, flat
        try:
            couplings.optimal_permutation(cost, dim)
        finally:
            couplings.FLAT = switch

    found: dict[str, Callable[[], object]] = {
        "assignment": lambda: by(0),
        "simplex": lambda: by(10**9),
        "MiniBatchOT": lambda: MiniBatchOT().pair(x0, x1, spec, none, generator()),
        "POT emd": lambda: ot.emd(ones, ones, raw, numItermax=10_000_000),
        "SinkhornOT": lambda: sinkhorn.pair(x0, x1, spec, none, generator()),
        "its plan": lambda: sinkhorn.plan(x0, x1),
        "POT sinkhorn": lambda: ot.sinkhorn(
            ones, ones, raw, price, method="sinkhorn_log", stopThr=1e-3 / n**0.5
        ),
    }
    if TORCHCFM:
        from torchcfm.optimal_transport import OTPlanSampler

        exact = OTPlanSampler(method="exact")
        found["torchcfm exact"] = lambda: exact.sample_plan(x0, x1)
    return found


def by_size() -> None:
    names: list[str] = []
    for n, dim in itertools.product(BATCHES, DIMENSIONS):
        x0, noise = torch.randn(2, n, dim, generator=generator())
        x1 = 2 + noise * torch.linspace(0.3, 2, dim)
        work = rivals(x0, x1)
        if n >= WIDE:
            work = {
                name: each
                for name, each in work.items()
                if "inkhorn" not in name and name != "its plan"
            }
        if not names:
            names = list(rivals(x0, x1))
            print(f"{'n':>5s} {'dim':>4s}" + "".join(f"{name:>15s}" for name in names))
        times = best(work, 2 if n >= WIDE else REPEATS)
        cells = (f"{times[name]:15.2f}" if name in times else f"{'':15s}" for name in names)
        print(f"{n:5d} {dim:4d}" + "".join(cells), flush=True)


def by_network() -> None:
    print(
        "\nper batch, and the mean squared distance of its pairs; targets of one mode, spread "
        "over the group"
    )
    for widths, n in itertools.product(((4, 16, 3), (30, 16, 16, 2)), (64, 256)):
        layers = [
            layer
            for pair in itertools.pairwise(widths)
            for layer in (nn.Linear(*pair), nn.Tanh())
        ]
        spec = bf.WeightSpec.of(nn.Sequential(*layers[:-1]))
        group = spec.symmetries()._replace(scale=frozenset())
        x0, noise = torch.randn(2, n, spec.dim, generator=generator())
        centre = torch.randn(spec.dim, generator=generator())
        (x1,) = spec.transform(group, 0, 1.2 * centre + 0.5 * noise)
        print(f"{'-'.join(map(str, widths))}, dim {spec.dim}, n {n}")
        for coupling in (
            Independent(),
            MiniBatchOT(),
            SinkhornOT(),
            Matched(),
            MiniBatchOT(matched=True),
        ):
            pair = lambda coupling=coupling: coupling.pair(x0, x1, spec, group, generator())  # noqa: E731, B023
            distance = float((pair()[0] - pair()[1]).square().sum(-1).mean())
            print(
                f"  {coupling!r:75s} {best({'': pair}, 3)['']:8.1f} ms {distance:8.1f}",
                flush=True,
            )


def lost() -> None:
    """Say how many targets a plan sampled with replacement loses."""
    from torchcfm.optimal_transport import OTPlanSampler

    x0, noise = torch.randn(2, 256, 131, generator=generator())
    with torch.random.fork_rng():
        drawn = OTPlanSampler(method="exact").sample_plan(x0, 2 + noise)[1]
    print(
        f"\ntorchcfm's exact plan keeps {len(drawn.unique(dim=0))} of 256 targets, ours all of them"
    )


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="ot")
    if not TORCHCFM:
        print("without torchcfm (pip install --no-deps torchcfm)")
    by_size()
    by_network()
    if TORCHCFM:
        lost()


if __name__ == "__main__":
    main()
