"""One amortised flow on data sets that it has never seen, beside long HMC.

1-16-1 tanh, N(0, 1) on all weights; data sets of 10 to 40 rows at inputs uniform on [-2, 2] and
known noise of .1 to .5. ``bf.fit_amortised`` trains one flow on simulated data sets, once: first of
networks of 16 units, then of 8 to 32. Unseen data sets are of networks drawn from the prior, of 16,
8 and 32 units, and from outside: steps and fast waves of 20 rows with noise .1, which no network of
the prior is likely to make, and too much data (120 rows, noise .05).

"rms" is the error of the mean function in posterior standard deviations and "ratio" the geometric
mean of the ratios of standard deviations, both at 41 points of [-2, 2], against 32 chains of HMC
(300 + 400); 1,000 draws that are exact have an rms of about .032. "flagged" is the share of data
sets of which `bf.diagnose` says "do not trust", of those with an rms above .3 and of the others.
"refined" is `bf.refine`, 24 transitions of at most eight leapfrog steps; "untrained" the same field
before training; "short HMC" 16 chains with as many draws, warm-up included in its time. One thread.
Run: ``python tests/benchmarks/bench_amortised.py [--steps 16000] [--sets 200] [--others 20]``: two
hours; the flow stays in out/bench_amortised.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.transport import AmortisedVelocity, Flow, Solver

OUT = Path("out/bench_amortised")
WIDTH, REACH = 16, 2.0
ROWS, NOISE = (10, 40), (0.1, 0.5)
WIDTHS, STAGES = (8, 12, 16, 24, 32), (3, 5)  # and shares of the two stages of training
GRID = torch.linspace(-REACH, REACH, 41)[:, None]
DRAWS = 1000
REFINE = {"steps": 24, "n_leapfrog": 8}
LARGE = 0.3


def network(width: int, x: Tensor, y: Tensor, noise: float) -> bf.BayesianModel:
    """Return the posterior of a network."""
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
    return bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(noise), x, y
    )


def unseen(number: int, width: int = WIDTH) -> bf.BayesianModel:
    """Return the posterior of a data set drawn from the model."""
    g = torch.Generator().manual_seed(10_000 + number)
    rows = int(torch.randint(ROWS[0], ROWS[1] + 1, (), generator=g))
    noise = NOISE[0] * (NOISE[1] / NOISE[0]) ** float(torch.rand((), generator=g))
    x = 2 * REACH * torch.rand(rows, 1, generator=g) - REACH
    blank = network(width, GRID, GRID[:, 0], noise)
    f = blank.outputs(blank.sample_prior(1, g), x).flatten()
    return network(width, x, f + noise * torch.randn(rows, generator=g), noise)


def outside(
    number: int, function: Callable[[Tensor], Tensor], rows: int, noise: float
) -> bf.BayesianModel:
    """Return the posterior of a data set that no network of the prior is likely to make."""
    g = torch.Generator().manual_seed(20_000 + number)
    x = 2 * REACH * torch.rand(rows, 1, generator=g) - REACH
    y = function(x[:, 0] - 0.5 * float(torch.randn((), generator=g)))
    return network(WIDTH, x, y + noise * torch.randn(rows, generator=g), noise)


def families(sets: int, others: int) -> Iterator[tuple[str, list[bf.BayesianModel]]]:
    """Yield what is looked at, by name."""
    yield "unseen", [unseen(each) for each in range(sets)]
    yield "8 units", [unseen(each, 8) for each in range(others)]
    yield "32 units", [unseen(each, 32) for each in range(others)]
    for name, function, rows, noise in (
        ("steps", lambda x: 2 * x.sign(), 20, 0.1),
        ("fast waves", lambda x: (8 * x).sin(), 20, 0.1),
        ("too much data", lambda x: (2 * x).sin(), 120, 0.05),
    ):
        yield name, [outside(each, function, rows, noise) for each in range(others)]


class Found(NamedTuple):
    """What one data set shows of one method."""

    rms: float
    ratio: float
    flagged: bool
    seconds: float  # of 1,000 draws


def moments(model: bf.BayesianModel, draws: bf.Draws) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the function on the grid."""
    f = torch.cat([model.outputs(rows, GRID)[..., 0] for rows in draws.flat.split(4096)])
    return f.mean(0), f.std(0)


def timed(run: Callable[[], bf.Draws]) -> tuple[bf.Draws, float]:
    """Return draws and the CPU seconds that they took."""
    started = time.process_time()
    return run(), time.process_time() - started


def trained(steps: int) -> Flow:
    """Train the flow, or go on, or read it: the first steps on one width, the others on all."""
    inputs = torch.linspace(-REACH, REACH, 801)[:, None]
    model = network(WIDTH, inputs, inputs[:, 0], 0.2)
    flow: Flow | None = None
    for stage, widths in enumerate(((WIDTH,), WIDTHS)):
        file = OUT / f"flow-{steps}-{stage}.npz"
        if not file.exists():
            flow = bf.fit_amortised(
                model,
                rows=ROWS,
                noise=NOISE,
                widths=widths,
                velocity=None if flow is None else cast(AmortisedVelocity, flow.velocity),
                training=bf.Training(steps=STAGES[stage] * steps // sum(STAGES)),
                checkpoint=bf.Checkpoint(file.with_suffix(".training.npz"), resume=True),
            )
            flow.save(file)
            print(f"trained in {flow.info['cpu_seconds']:.0f} CPU s", flush=True)
        flow = Flow.load(file, model)
    assert flow is not None
    return flow


def look(model: bf.BayesianModel, flows: dict[str, Flow], seed: int) -> dict[str, Found]:
    """Compare all methods on one data set."""
    quiet = {"seed": seed, "progress": False}
    long = bf.sample(model, bf.HMC(), chains=32, warmup=300, draws=400, **quiet)
    mean, sd = moments(model, long)
    found = {}

    def keep(name: str, draws: bf.Draws, seconds: float) -> None:
        own, own_sd = moments(model, draws)
        found[name] = Found(
            float(((own - mean) / sd).square().mean().sqrt()),
            float((own_sd / sd).log().mean().exp()),
            bf.diagnose(model, draws).verdict == "do not trust",
            seconds,
        )

    for name, flow in flows.items():
        own = flow.bind(model) if model.dim == flow.dim else flow.transfer(model)
        raw, seconds = timed(
            lambda own=own: bf.sample(model, own, draws=DRAWS, seed=seed, progress=False)
        )
        keep(name, raw, seconds)
        refined, more = timed(lambda raw=raw: bf.refine(model, raw, **REFINE, **quiet))
        keep(f"{name}, refined", refined, seconds + more)
    given = {"chains": 16, "warmup": 150, "draws": -(-DRAWS // 16)}
    keep("short HMC", *timed(lambda: bf.sample(model, bf.HMC(), **given, **quiet)))
    return found


def show(name: str, found: list[dict[str, Found]]) -> None:
    """Print a table, of seconds for all draws."""
    print(f"\n{name}, {len(found)} data sets")
    for method in found[0]:
        rms, ratio, flagged, seconds = (
            torch.tensor(each, dtype=torch.float64)
            for each in zip(*(one[method] for one in found), strict=True)
        )
        flags = flagged.bool()
        far = rms > LARGE
        told = " ".join(
            f"{float(flags[which].double().mean()):.2f} of {int(which.sum())}"
            for which in (far, ~far)
            if which.any()
        )
        print(
            f"  {method:20s} rms {rms.median():.3f} (mean {rms.mean():.3f}, > .15: "
            f"{float((rms > 0.15).double().mean()):.2f}, > .3: {float(far.double().mean()):.2f}) "
            f"ratio {ratio.mean():.3f} ± {ratio.std():.3f}  {seconds.mean():.2f} CPU s  "
            f"flagged {told}",
            flush=True,
        )


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=16000, help="of training")
    parser.add_argument("--sets", type=int, default=200, help="unseen data sets")
    parser.add_argument("--others", type=int, default=20, help="of each other kind")
    given = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    flow = trained(given.steps)
    blank = unseen(0)
    untrained = Flow.of(
        AmortisedVelocity(blank.spec, 8, 1), blank, solver=Solver("midpoint", 10)
    )
    flows = {"amortised": flow, "untrained": untrained}
    for name, models in families(given.sets, given.others):
        show(name, [look(model, flows, seed) for seed, model in enumerate(models)])


if __name__ == "__main__":
    main()
