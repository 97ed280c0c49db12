"""The main job on real data: model, posterior, alignment, transport, likelihoods, model average,
report.

Breast cancer (30-16-2) and a one-dimensional regression with a gap, each with the prior, a deep
ensemble, variational inference, Hamiltonian Monte Carlo, the raw flow and the refined flow side by
side. Run: ``make demo``.
"""

import time
from pathlib import Path

import torch

import bnnflow as bf
from bnnflow.data import Dataset, gap_function, gap_regression, load
from bnnflow.report import Report, plots
from bnnflow.transport import Density

OUT = Path("out")
DRAWS = 1000  # of every method that gives as many as one likes
TRAINING = 45.0  # seconds for each flow
STARTED = time.perf_counter()


def log(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:4.0f} s] {text}", flush=True)


def compare(
    data: Dataset, model: bf.BayesianModel, trace: str, title: str
) -> tuple[dict, Report]:
    """Run every method on one model; return their draws and the report."""
    log(f"{title}: {model.dim} weights, {len(data.x_train)} rows")
    results, seconds = {"prior": model.sample_prior(DRAWS, seed=1)}, {}
    results["ensemble"] = bf.sample(model, bf.DeepEnsemble(members=10), seed=1)
    log("deep ensemble trained")
    results["VI"] = bf.sample(model, bf.VI(), chains=4, draws=DRAWS // 4, seed=1)
    log("variational posterior fitted")
    results["HMC"] = draws = bf.sample(
        model, bf.HMC(), chains=16, warmup=400, draws=400, seed=1
    )
    log("Hamiltonian Monte Carlo finished")
    print(bf.diagnose(model, draws, data.x_test, data.y_test))

    spread = bf.align(model, draws).flat.var(0).sum() / draws.flat.var(0).sum()
    log(
        f"alignment: order and sign of hidden units were {1 - float(spread):.0%} of the variance "
        "of the weights"
    )

    flow = bf.fit_flow(model, draws, seed=1, training=bf.Training(budget=TRAINING))
    flow.save(OUT / f"{data.name}-flow.npz")
    log(f"flow fitted in {flow.info['steps']} steps")
    results["flow (raw)"] = raw = bf.sample(model, flow, draws=DRAWS, seed=1)
    log(f"{DRAWS} networks sampled in {raw.info['seconds']:.1f} s")
    results["flow (refined)"] = refined = bf.refine(model, raw, seed=1)
    # with the training, which pays for every draw to come
    seconds["flow (raw)"] = flow.info["seconds"] + raw.info["seconds"]
    seconds["flow (refined)"] = seconds["flow (raw)"] + refined.info["seconds"]
    log(f"refined by {refined.info['gradients_per_draw']:.0f} gradients a network")
    log_q = flow.log_prob(raw.flat[:16], density=Density(trace=trace))
    log(
        f"log density of the flow ({trace} trace) at 16 of its draws: {log_q.mean():.1f}, sd "
        f"{log_q.std():.1f}"
    )
    report = bf.report(
        model, results, data.x_test, data.y_test, path=None, title=title, seconds=seconds
    )
    return results, report


def main() -> None:
    # a second thread gains little on such small products, and loses a lot on a busy machine
    torch.set_num_threads(1)
    cancer, gap = load("breast_cancer"), gap_regression(seed=0)
    net = torch.nn.Sequential(
        torch.nn.Linear(30, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
    )
    model = bf.BayesianModel(
        net,
        bf.priors.Normal(1.0),
        bf.likelihoods.Categorical(),
        cancer.x_train,
        cancer.y_train,
    )
    _, first = compare(cancer, model, "hutchinson", "Breast cancer, 30-16-2")

    net = torch.nn.Sequential(
        torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    )
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.1), gap.x_train, gap.y_train
    )
    results, second = compare(gap, model, "exact", "Regression with a gap, 1-16-1")

    made = Report.combine(
        [first, second], OUT / "demo.html", title="From prior to posterior on two data sets"
    )
    bands = {name: bf.predict(model, draws, gap.x_test) for name, draws in results.items()}
    figure = plots.predictive_band(
        bands, gap.x_train, gap.y_train, truth=gap_function(gap.x_test)
    )
    figure.savefig(OUT / "gap.png", dpi=110, bbox_inches="tight")
    print(made)
    log(f"report: {made.path}, bands: {OUT / 'gap.png'}")


if __name__ == "__main__":
    main()
