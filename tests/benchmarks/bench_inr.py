"""Microseconds a network and a step of Adam: bnnflow's INR factory against loops over single fits.

The rival is what fits one SIREN: an ``nn.Sequential``, ``mse_loss``, autograd and
``torch.optim.Adam`` in each of its forms, eager and under ``torch.compile`` (forward, backward and
update; compiling is not counted), from the same starts, with the same schedule and the same
coordinates at every step. One core, one thread, float32; the fastest rival counts. Batches of 128
coordinates show what a step costs beside its arithmetic. All coordinates at once are arithmetic for
both: 2-32-32-1 takes 2.6 million multiplications a step there, some 50 us at the peak of an AVX-512
core. Run: ``python tests/benchmarks/bench_inr.py [--quick]``.
"""

import argparse
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import rivals
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from bnnflow import WeightSpec
from bnnflow.data import load_images
from bnnflow.equivariant import INRs, fit_inrs, image_grid, inr, siren

NETWORKS, STEPS, RATE, SEED = 256, 100, 3e-3, 0
SINGLE_FITS = 2  # of the rivals, in one measurement
ROUNDS = 5
FORMS: dict[str, dict[str, Any]] = {
    "single-tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def single_fit(
    net: nn.Module,
    theta: Tensor,
    x: Tensor,
    y: Tensor,
    batches: list[Tensor] | None,
    loss: Callable,
    form: dict[str, Any],
) -> float:
    """Fit one network from ``theta``, and return its mean squared error over all coordinates."""
    net.load_state_dict(WeightSpec.of(net).unflatten(theta))
    optimiser = torch.optim.Adam(net.parameters(), RATE, **form)
    for step in range(STEPS):
        some = (x, y) if batches is None else (x[batches[step]], y[batches[step]])
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - step / STEPS))
        optimiser.zero_grad()
        loss(*some).backward()
        optimiser.step()
    with torch.no_grad():
        return float(mse_loss(net(x), y))


def compare(
    title: str, x: Tensor, y: Tensor, net: nn.Module, batch_size: int | None, rounds: int
) -> None:
    generator = torch.Generator().manual_seed(SEED)
    starts = inr.starting_weights(WeightSpec.of(net), len(y), generator)
    rows = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    batches = (
        None
        if batch_size is None
        else [torch.randperm(len(x), generator=rows)[:batch_size] for _ in range(STEPS)]
    )
    errors: dict[str, Tensor] = {}

    def factory() -> float:
        fits: list[INRs] = []
        settings = {
            "steps": STEPS,
            "learning_rate": RATE,
            "batch_size": batch_size,
            "progress": False,
        }
        seconds = rivals.cpu(
            lambda: fits.append(fit_inrs(x, y, net, **settings, seed=SEED))
        )
        errors["bnnflow"] = fits[0].mse[:SINGLE_FITS]
        return seconds / (STEPS * len(y)) * 1e6

    def loop(name: str, loss: Callable, form: dict[str, Any]) -> Callable[[], float]:
        def measure() -> float:
            found: list[float] = []
            seconds = rivals.cpu(
                lambda: found.extend(
                    single_fit(net, starts[i], x, y[i], batches, loss, form)
                    for i in range(SINGLE_FITS)
                )
            )
            errors[name] = torch.tensor(found, dtype=torch.float64)
            return seconds / (STEPS * SINGLE_FITS) * 1e6

        return measure

    def eager(x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(net(x), y)

    measures: dict[str, Callable[[], float]] = {"bnnflow": factory}
    measures |= {
        f"loop, {name}": loop(f"loop, {name}", eager, form) for name, form in FORMS.items()
    }
    if shutil.which(os.environ.get("CXX", "g++")):
        measures["loop, compiled, fused"] = loop(
            "loop, compiled, fused", torch.compile(eager), FORMS["fused"]
        )
    samples = rivals.interleave(measures, rounds)
    rivals.table(title, samples, "bnnflow", {"the fastest loop": ("loop", 20.0)})
    print(
        f"  mean squared errors of the first {SINGLE_FITS} after {STEPS} steps, and decibels for a "
        "signal of range one:"
    )
    for name, mse in errors.items():
        print(
            f"  {name:32s}",
            *(f"{e:10.3e} ({-10 * math.log10(e):.2f} dB)" for e in mse.tolist()),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one round")
    rounds = 1 if parser.parse_args().quick else ROUNDS
    torch.set_num_threads(1)
    x = torch.linspace(-math.pi, math.pi, 1000).unsqueeze(-1)
    frequencies = torch.empty(NETWORKS, 1).uniform_(
        0.5, 10, generator=torch.Generator().manual_seed(SEED)
    )
    waves = torch.sin(frequencies * x.T).unsqueeze(-1)
    for batch_size in (None, 128):
        compare(
            f"sine waves, 1-32-32-1, {batch_size or 'all 1000'} points",
            x,
            waves,
            siren(1, 1, w0=5.0),
            batch_size,
            rounds,
        )
    if not (rivals.DATA / "mnist10k.npz").is_file():
        print("images skipped: no mnist10k.npz in $BNNFLOW_DATA")
        return
    images = (
        load_images("mnist10k", folder=rivals.DATA)
        .x_train[:NETWORKS]
        .reshape(NETWORKS, -1, 1)
        - 0.5
    )
    for batch_size in (None, 128):
        title = f"28 x 28 images, 2-32-32-1, {batch_size or 'all 784'} pixels"
        compare(title, image_grid(28, 28), images, siren(2, 1), batch_size, rounds)


if __name__ == "__main__":
    main()
