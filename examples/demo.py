"""The main job on real data: model, posterior, alignment, transport, likelihoods, model average, report.

Breast cancer (30-16-2) and a one-dimensional regression with a gap, each with the prior, a deep ensemble, variational
inference, Hamiltonian Monte Carlo, the raw flow and the refined flow side by side. Run: ``make demo``.
"""

import time
from pathlib import Path

import torch

import bnnflow as bf
from bnnflow.data import Dataset, gap_regression, load

OUT = Path("out")
DRAWS = 2000  # of every method that can give as many as one likes


def log(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


def compare(data: Dataset, model: bf.BayesianModel, training: float, title: str):
    """Run every method on one model and return its report."""
    log(f"{title}: {model.dim} weights, {len(data.x_train)} rows")
    results, seconds = {"prior": model.sample_prior(DRAWS, seed=1)}, {}
    results["ensemble"] = bf.sample(model, bf.DeepEnsemble(members=10), seed=1)
    log("deep ensemble done")
    results["VI"] = bf.sample(model, bf.VI(), chains=4, draws=DRAWS // 4, seed=1)
    log("variational inference done")
    results["HMC"] = draws = bf.sample(model, bf.HMC(), chains=16, warmup=300, draws=300, seed=1)
    log("Hamiltonian Monte Carlo done")
    print(bf.diagnose(draws, model, data.x_test))

    aligned = bf.align(draws, model)
    ratio = aligned.flat.var(0).sum() / draws.flat.var(0).sum()
    log(f"alignment: {1 - float(ratio):.0%} of the variance of the weights was the order and sign of hidden units")

    flow = bf.fit_flow(model, draws, budget=training, seed=1)
    flow.save(OUT / f"{data.name}-flow.npz")
    log(f"flow fitted: {flow.info['steps']} steps, loss {flow.info['loss']:.1f}")
    began = time.perf_counter()
    results["flow (raw)"] = theta = flow.sample(DRAWS, seed=1)
    seconds["flow (raw)"] = flow.info["seconds"] + time.perf_counter() - began
    log(f"{DRAWS} networks sampled in {time.perf_counter() - began:.1f} s")
    results["flow (refined)"] = refined = bf.refine(theta, model, steps=8, seed=1)
    seconds["flow (refined)"] = seconds["flow (raw)"] + refined.info["seconds"]
    some, steps = theta[:8], 4
    for trace in ("exact", "hutchinson"):
        log_q = flow.log_prob(some, trace=trace, probes=64, steps=steps)
        log(f"mean log density of the flow at 8 of its draws, {trace} trace: {float(log_q.mean()):.2f}")
    return bf.report(results, model, data.x_test, data.y_test, path=None, title=title, seconds=seconds)


def main() -> None:
    cancer = load("breast_cancer")
    net = torch.nn.Sequential(torch.nn.Linear(30, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Categorical(), cancer.x_train, cancer.y_train
    )
    first = compare(cancer, model, 45.0, "Breast cancer, 30-16-2")

    gap = gap_regression(seed=0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    model = bf.BayesianModel(net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.1), gap.x_train, gap.y_train)
    second = compare(gap, model, 45.0, "Regression with a gap, 1-16-1")

    made = type(first).combine([first, second], OUT / "demo.html", title="bnnflow: prior to posterior on two data sets")
    print(made)
    log(f"report: {made.path}")


if __name__ == "__main__":
    STARTED = time.perf_counter()
    main()
