"""What the benchmarks against other libraries share: one core, one posterior written for each
library, one clock.

Import this before jax, which reads its flags once. Everything runs on one core and one thread in
float32, and is charged the CPU time of its process. The network is d-50-1 tanh with N(0, 1) on
every weight and Gaussian noise of 0.1.
"""

# ruff: noqa: E402  # the environment is set before anything reads it

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def idlest_core() -> int:
    """Return the core of those allowed that was idle longest over a fifth of a second."""

    def idle() -> dict[int, int]:
        rows = (line.split() for line in Path("/proc/stat").read_text().splitlines())
        return {
            int(row[0][3:]): int(row[4])
            for row in rows
            if row[0][:3] == "cpu" and row[0] != "cpu"
        }

    before = idle()
    time.sleep(0.2)
    after = idle()
    return max(
        os.sched_getaffinity(0), key=lambda core: after.get(core, 0) - before.get(core, 0)
    )


if hasattr(os, "sched_setaffinity"):
    # no library can start more threads than there are cores
    os.sched_setaffinity(0, {idlest_core()})
os.environ["OMP_NUM_THREADS"] = "1"
# 512: a little faster here (0 to 5%) than jax's default of 256, on a processor with AVX-512.
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false --xla_cpu_prefer_vector_width=512"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("BNNFLOW_DATA", str(Path(__file__).parents[3] / "shared" / "data"))

import numpy as np
import torch

import bnnflow as bf

torch.set_num_threads(1)

HIDDEN, NOISE = 50, 0.1
DATA = Path(os.environ["BNNFLOW_DATA"])


def require(*modules: str, files: tuple[str, ...] = ()) -> None:
    """End the script, saying why, where a rival or the data are missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    missing += [str(DATA / file) for file in files if not (DATA / file).is_file()]
    if missing:
        print(
            f"skipped: needs {', '.join(missing)} (pip install -c constraints.txt -e '.[bench]'; "
            "$BNNFLOW_DATA)"
        )
        sys.exit(0)


def machine() -> str:
    """Say what the figures were measured on."""
    import jax

    load = os.getloadavg()[0]
    versions = f"torch {torch.__version__}, jax {jax.__version__}"
    return f"one core of {os.cpu_count()}, load {load:.1f}, float32, {versions}"


# ---------------------------------------- the posterior


def bnnflow_model(
    x: np.ndarray | torch.Tensor, y: np.ndarray | torch.Tensor
) -> bf.BayesianModel:
    """Return the model that all others repeat."""
    net = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 1)
    )
    return bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(NOISE), x, y
    )


def split(theta: Any) -> tuple[Any, Any, Any, Any]:
    """Cut ``(..., dim)`` of any library into weights (50, d), bias (50,), weights (50,), bias
    ().
    """
    inputs = (theta.shape[-1] - 1) // HIDDEN - 2
    first = HIDDEN * inputs
    weights = theta[..., :first].reshape(*theta.shape[:-1], HIDDEN, inputs)
    return (
        weights,
        theta[..., first : first + HIDDEN],
        theta[..., first + HIDDEN : -1],
        theta[..., -1],
    )


def join(params: tuple[Any, ...]) -> np.ndarray:
    """Undo ``split`` for batches ``(chain, draw, ...)``."""
    arrays = [np.asarray(part) for part in params]
    lead = arrays[-1].shape
    return np.concatenate([part.reshape(*lead, -1) for part in arrays], -1)


def jax_log_likelihood(params: tuple[Any, ...], batch: tuple[Any, Any]) -> Any:
    """Log likelihood without constants.

    X is ``(d, n)``, which with parameters in a tuple is jax's fastest layout.

    Flat parameters or x ``(n, d)`` cost 1.2 to 2 times as much.
    """
    import jax.numpy as jnp

    (weights, bias, head, shift), (x, y) = params, batch
    outputs = head @ jnp.tanh(weights @ x + bias[:, None]) + shift
    return -0.5 * jnp.sum(jnp.square((y - outputs) / NOISE))


def jax_log_prior(params: tuple[Any, ...]) -> Any:
    """Log prior without constants."""
    return -0.5 * sum((part**2).sum() for part in params)


def torch_log_joint(
    params: tuple[Any, ...], x: torch.Tensor, y: torch.Tensor, weight: float = 1.0
) -> torch.Tensor:
    """Return the same for one chain in plain torch, the fastest of the layouts tried.

    X is ``(d, n)``.
    """
    weights, bias, head, shift = params
    outputs = head @ torch.tanh(torch.addmm(bias[:, None], weights, x)) + shift
    prior = (
        weights.square().sum() + bias.square().sum() + head.square().sum() + shift.square()
    )
    return -0.5 * weight * (y - outputs).square().sum() / NOISE**2 - 0.5 * prior


# ---------------------------------------- the clock


def cpu(work: Callable[[], Any]) -> float:
    """Return the CPU seconds that the whole process, all its threads, spends on ``work``."""
    began = time.process_time()
    work()
    return time.process_time() - began


def interleave(
    rivals: dict[str, Callable[[], float]], rounds: int
) -> dict[str, np.ndarray]:
    """Return the measurements of every rival, taken in turns A B C A B C ..., so that a busy
    machine hurts all alike.

    Every rival runs once before, to compile and to warm the caches.
    """
    for measure in rivals.values():
        measure()
    samples = [[measure() for measure in rivals.values()] for _ in range(rounds)]
    return dict(zip(rivals, np.array(samples).T, strict=True))


def table(
    title: str,
    samples: dict[str, np.ndarray],
    own: str,
    targets: dict[str, tuple[str, float]],
) -> None:
    """Print medians, spreads and the ratio of medians, rival / own, beside what is asked.

    Args:
        title: what was measured, in microseconds.
        samples: one array for each row.
        own: the row that the others are compared with.
        targets: least ratio asked, by row: ``(rows that count together, number)``; the fastest of
            them counts.
    """
    print(f"\n{title}\n{'':34s} {'median':>8s} {'10%':>8s} {'90%':>8s} {'times own':>10s}")
    mine = float(np.median(samples[own]))
    for name, values in samples.items():
        low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
        print(f"{name:34s} {median:8.1f} {low:8.1f} {high:8.1f} {median / mine:10.2f}")
    for group, (prefix, least) in targets.items():
        best = min(
            (float(np.median(v)) for name, v in samples.items() if name.startswith(prefix)),
            default=None,
        )
        if best is not None:
            asked(f"{group} / own", least, best / mine)
    sys.stdout.flush()


def asked(what: str, least: float, measured: float) -> None:
    """Print a ratio beside the least that is asked of it."""
    print(
        f"  {what}: asked {least:g}, measured {measured:.2f}: "
        f"{'reached' if measured >= least else 'MISSED'}"
    )
