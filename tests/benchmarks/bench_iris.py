"""The iris reference posterior (4-16-3 tanh, N(0, 1) on 131 weights): HMC, flows, and refinement
from every start.

Compares with the converged NUTS run in ``$BNNFLOW_DATA/reference/iris.npz``. One thread, so that
seconds are CPU seconds. Run: ``python tests/benchmarks/bench_iris.py [seconds of training]``; the
published figures used 470.
"""

import os
import sys
import time
from pathlib import Path

import arviz
import numpy as np
import torch

import bnnflow as bf
from bnnflow.transport import InformedVelocity

DRAWS = 4096
BUDGET = float(sys.argv[1]) if len(sys.argv) > 1 else 470.0
DATA = Path(os.environ.get("BNNFLOW_DATA", Path(__file__).parents[3] / "shared" / "data"))


def iris() -> tuple[bf.BayesianModel, torch.Tensor, torch.Tensor]:
    """Return the reference's model and test rows; end the script where its file is missing."""
    if not (DATA / "reference" / "iris.npz").is_file():
        print(f"skipped: needs reference/iris.npz under $BNNFLOW_DATA (looked in {DATA})")
        sys.exit(0)
    reference = np.load(DATA / "reference" / "iris.npz")
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    )
    model = bf.BayesianModel(
        net,
        bf.priors.Normal(1.0),
        bf.likelihoods.Categorical(),
        reference["Xtr"],
        reference["ytr"],
    )
    return (
        model,
        torch.as_tensor(reference["Xte"]).float(),
        torch.as_tensor(reference["yte"]),
    )


def row(
    name: str,
    model: bf.BayesianModel,
    theta: torch.Tensor,
    x,
    y,
    gradients: float,
    seconds: float,
) -> None:
    """Print one line: LPPD with its Monte-Carlo error over independent draws, and the log
    likelihood's law.
    """
    probs = torch.cat([model.outputs(part, x).softmax(-1) for part in theta.split(4096)])
    probs = probs[:, torch.arange(len(y)), y].double()  # (draw, row)
    mean = probs.mean(0)
    lppd = float(mean.log().mean())
    error = float((probs / mean).mean(1).std() / len(probs) ** 0.5)
    ll = torch.cat([model.log_likelihood(part) for part in theta.split(4096)])
    low, median = np.quantile(ll.numpy(), [0.05, 0.5])
    log_joint = torch.cat([model.log_joint(part) for part in theta.split(4096)])
    print(
        f"{name:34s} {lppd:8.4f} +- {error:.4f} {float(ll.mean()):9.2f} {median:8.2f} {low:8.2f} "
        f"{float(log_joint.mean()):9.2f} {gradients:9.0f} {seconds:9.1f}",
        flush=True,
    )


def main() -> None:
    torch.set_num_threads(1)
    model, x, y = iris()
    print("reference NUTS: LPPD -0.1907, log joint -202.14 (sd 8.05)")
    print(
        f"{'draws':34s} {'LPPD':>8s}    {'MC error':7s} {'log lik.':>8s} {'median':>8s} "
        f"{'5%':>8s} {'log joint':>9s} {'gradients':>9s} {'seconds':>9s}"
    )

    draws = bf.sample(model, bf.HMC(), chains=64, warmup=300, draws=400, seed=0)
    row(
        "HMC",
        model,
        draws.flat,
        x,
        y,
        draws.info["gradients_per_chain"] / draws.n_draws,
        draws.info["seconds"],
    )
    probs = model.outputs(draws.theta, x).softmax(-1).numpy()
    rhat = arviz.rhat(arviz.convert_to_dataset({"p": probs}))["p"].max()
    print(
        f"  log joint {float(draws.log_joint.mean()):.2f}, sd {float(draws.log_joint.std()):.2f}, ",
        end="",
    )
    print(
        f"max R-hat of test probabilities {float(rhat):.4f}, {draws.info['divergences']} "
        "divergences"
    )

    matched = bf.Gaussian.fit(bf.align(model, draws).flat)
    untrained = bf.Flow.of(InformedVelocity(model.spec), model)
    starts = {
        "prior": lambda: model.sample_prior(DRAWS, 1),
        "matched Gaussian": lambda: matched.sample(DRAWS, 1),
    }
    starts["untrained informed field"] = lambda: untrained.sample(DRAWS, 1)
    for name, velocity in (("informed flow", "informed"), ("weights-only flow", "weights")):
        flow = bf.fit_flow(
            model, draws, velocity=velocity, seed=0, training=bf.Training(budget=BUDGET)
        )
        flow.save(f"out/iris-{velocity}.npz")
        print(
            f"  {name}: {flow.info['steps']} steps, {flow.info['cpu_seconds']:.0f} CPU s, ",
            end="",
        )
        print(f"{flow.info['parameters']} parameters, loss {flow.info['loss']:.1f}")
        starts[name] = lambda flow=flow: flow.sample(DRAWS, 1)

    # Midpoint: two evaluations a step, of 2 * 3 + 1 gradients each for the informed fields.
    cost = dict.fromkeys(
        ("untrained informed field", "informed flow"), untrained.solver.steps * 2 * 7
    )
    for name, start in starts.items():
        began = time.perf_counter()
        theta = start()
        seconds = time.perf_counter() - began
        row(name, model, theta, x, y, cost.get(name, 0), seconds)
        refined = bf.refine(model, theta, 8, seed=2)
        gradients = cost.get(name, 0) + refined.info["gradients_per_draw"]
        row(
            f"  + refine ({refined.info['gradients_per_draw']:.0f} gradients)",
            model,
            refined.flat,
            x,
            y,
            gradients,
            seconds + refined.info["seconds"],
        )


if __name__ == "__main__":
    main()
