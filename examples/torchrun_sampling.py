"""A long run that several processes share, and that goes on where it was when it is started again.

Alone:          python examples/torchrun_sampling.py
Two processes:  torchrun --nproc-per-node=2 examples/torchrun_sampling.py
More draws:     the same command with a number after it, such as 2000
While it runs:  python -c "import bnnflow as bf; print(bf.load('out/torchrun-1').theta.shape)"

Kill it at any time and start it again.
"""

import os
import sys

import torch

import bnnflow as bf

CHAINS = 8  # over all processes; a multiple of their number
DRAWS = int(sys.argv[1]) if len(sys.argv) > 1 else 500
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
FOLDER = f"out/torchrun-{PROCESSES}"  # a run goes on only with as many processes as it began with


def main() -> None:
    torch.set_num_threads(1)  # processes share the cores
    data = bf.data.load("diabetes")
    net = torch.nn.Sequential(
        torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    )
    prior = bf.priors.FanIn()
    model = bf.BayesianModel(
        net, prior, bf.likelihoods.Gaussian(), data.x_train, data.y_train
    )
    draws = bf.sample(
        model,
        bf.HMC(),
        chains=CHAINS,
        warmup=300,
        draws=DRAWS,
        seed=0,
        checkpoint=bf.Checkpoint(FOLDER, resume=True),
    )
    # every process has all draws; one of them reports
    if int(os.environ.get("RANK", "0")) == 0:
        pred = bf.predict(model, draws, data.x_test)
        print(bf.diagnose(model, draws, data.x_test, data.y_test))
        print(
            f"{tuple(draws.theta.shape)} draws in {draws.info['seconds']:.1f} s over all starts, "
            f"kept in {FOLDER}"
        )
        print(
            f"LPPD {bf.metrics.lppd(pred, data.y_test):.3f}, CRPS "
            f"{bf.metrics.crps(pred, data.y_test):.3f}"
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
