"""A run that is stopped by Ctrl-C, later killed, started again each time, and the same bit for bit.

A run in several processes goes on by the same command, too: torchrun --nproc-per-node=2
examples/torchrun_sampling.py. Run: python examples/small/resume.py
"""

import os
import signal
import tempfile
import time
from multiprocessing import Process

import torch
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
    unbroken = run()
    figure, (ax,) = panels([""], columns=1, size=(8, 3.4))
    ax.plot(
        unbroken.log_joint[0], color=style.GREY, linewidth=2.5, alpha=0.5, label="unbroken"
    )
    row("stopped by", "draws on disk")
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
        resumed = run(folder)
    same = torch.equal(resumed.theta, unbroken.theta)
    row("the end", str(resumed.n_draws), "the same draws" if same else "OTHER DRAWS")
    ax.plot(
        resumed.log_joint[0], color=style.PALETTE[0], linewidth=0.6, label="resumed twice"
    )
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    save(figure, "resume", "draw of the first chain", "log joint")


if __name__ == "__main__":
    main()
