"""A run that Ctrl-C stops and `kill -9` ends, started again each time: the same bit for bit.

Run: python examples/small/resume.py, or torchrun --nproc-per-node=2 examples/torchrun_sampling.py
"""

import contextlib
import os
import signal
import tempfile
from multiprocessing import Process

from common import panels, perceptron, row, save

import bnnflow as bf
from bnnflow.inference import checkpoint
from bnnflow.report import style

SIZES = {"chains": 4, "warmup": 300, "draws": 3000}
STOPS = {"Ctrl-C": (signal.SIGINT, 1000), "kill -9": (signal.SIGKILL, 2000)}


def run(folder: str | None = None) -> bf.Draws:
    data = bf.data.gap_regression(seed=0)
    given = bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.1), data.x_train, data.y_train
    model = bf.BayesianModel(perceptron(1, 16, 1), *given)
    checkpoint.SECONDS = 0.5  # between two states on disk, in place of 15: the run is short
    kept = folder and bf.Checkpoint(folder, resume=True)
    return bf.sample(model, bf.MCLMC(), seed=0, checkpoint=kept, **SIZES)


def on_disk(folder: str) -> int:
    with contextlib.suppress(ValueError):  # there are none yet
        return bf.load(folder).n_draws  # at any time, from any process
    return 0


def main() -> None:
    unbroken = run().log_joint[0]
    figure, (ax,) = panels(["grey: never stopped, blue: resumed twice"], 1, (8, 3.2))
    ax.plot(unbroken, color=style.GREY, linewidth=2.5, alpha=0.5)
    with tempfile.TemporaryDirectory() as folder:
        for name, (number, enough) in STOPS.items():
            process = Process(target=run, args=(folder,))
            process.start()
            while process.is_alive() and on_disk(folder) < enough:
                process.join(0.05)
            os.kill(process.pid, number)
            process.join()
            row(name, f"{on_disk(folder)} draws kept")
            ax.axvline(on_disk(folder), linestyle="--", color=style.INK)
            ax.text(on_disk(folder), -31, f" {name}")
        resumed = run(folder).log_joint[0]
    row("largest difference", f"{(resumed - unbroken).abs().max()}")
    ax.plot(resumed, color=style.PALETTE[0], linewidth=0.6)
    save(figure, "resume", "draw", "log joint")


if __name__ == "__main__":
    main()
