"""A run that is stopped by Ctrl-C, later killed, started again each time, and the same bit for bit.

A run in several processes goes on by the same command, too: torchrun --nproc-per-node=2
examples/torchrun_sampling.py. Run: python examples/small/resume.py
"""

import os
import signal
import tempfile
import time
from multiprocessing import Process

from common import panels, perceptron, row, save

import bnnflow as bf
from bnnflow.inference import checkpoint
from bnnflow.report import style

checkpoint.SECONDS = 0.5  # between two states on disk, in place of 15: the run is short
SIZES = {"chains": 4, "warmup": 300, "draws": 3000}
STOPS = {"Ctrl-C": (signal.SIGINT, 1000), "kill -9": (signal.SIGKILL, 2000)}


def run(folder: str | None = None) -> bf.Draws:
    data = bf.data.gap_regression(seed=0)
    given = bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.1), data.x_train, data.y_train
    model = bf.BayesianModel(perceptron(1, 16, 1), *given)
    kept = None if folder is None else bf.Checkpoint(folder, resume=True)
    return bf.sample(model, bf.MCLMC(), seed=0, checkpoint=kept, **SIZES)


def on_disk(folder: str) -> int:
    try:
        return bf.load(folder).n_draws  # at any time, from any process
    except ValueError:  # none yet
        return 0


def main() -> None:
    unbroken = run().log_joint[0]
    figure, (ax,) = panels(["one of four chains"], columns=1, size=(8, 3.4))
    ax.plot(unbroken, color=style.GREY, linewidth=2.5, alpha=0.5, label="never stopped")
    row("", "draws on disk")
    with tempfile.TemporaryDirectory() as folder:
        for name, (number, enough) in STOPS.items():
            process = Process(target=run, args=(folder,))
            process.start()
            while process.is_alive() and on_disk(folder) < enough:
                time.sleep(0.05)
            os.kill(process.pid, number)
            process.join()
            row(name, str(on_disk(folder)))
            ax.axvline(on_disk(folder), linestyle="--", color=style.INK)
            ax.text(on_disk(folder), 1, f" {name}", transform=ax.get_xaxis_transform())
        resumed = run(folder).log_joint[0]
    row(
        "to the end",
        str(len(resumed)),
        f"largest difference {(resumed - unbroken).abs().max()}",
    )
    ax.plot(resumed, color=style.PALETTE[0], linewidth=0.6, label="resumed twice")
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    save(figure, "resume", "draw", "log joint")


if __name__ == "__main__":
    main()
