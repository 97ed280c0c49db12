"""One posterior, many ways to draw from it: scores, verdicts, seconds, and a report that compares
them.

A regression on scikit-learn's diabetes set, 10-8-1. Run: python examples/compare_samplers.py
"""

import torch

import bnnflow as bf

OUT = "out/compare_samplers.html"
METHODS = {
    "HMC": (bf.HMC(), {"chains": 8, "warmup": 400, "draws": 500}),
    "adjusted MCLMC": (bf.AdjustedMCLMC(), {"chains": 8, "warmup": 400, "draws": 500}),
    "MCLMC": (bf.MCLMC(), {"chains": 8, "warmup": 200, "draws": 500}),
    "SMC": (bf.SMC(particles=500), {"chains": 2}),
    "SGHMC": (bf.SGHMC(batch_size=32), {"chains": 8, "warmup": 400, "draws": 1000}),
    "Laplace": (bf.Laplace(), {"draws": 500}),
    "VI": (bf.VI(), {"draws": 500}),
    "VI, rank 10": (bf.VI(rank=10), {"draws": 500}),
    "SWAG": (bf.SWAG(), {"draws": 500}),
    "ensemble": (bf.DeepEnsemble(members=10), {}),
    "MC dropout": (bf.MCDropout(), {"draws": 500}),
}


def scores(pred: bf.predictive.Prediction, y: torch.Tensor) -> str:
    lppd, crps = bf.metrics.lppd(pred, y), bf.metrics.crps(pred, y)
    inside = bf.metrics.coverage(pred, y, 0.9)
    return f"LPPD {lppd:7.3f}  CRPS {crps:.3f}  90% interval {inside:4.0%}"


def main() -> None:
    torch.set_num_threads(1)
    data = bf.data.load("diabetes")
    net = torch.nn.Sequential(
        torch.nn.Linear(10, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )
    # With variances of 1 / fan in the prior expects functions of the size of the standardised
    # targets.
    model = bf.BayesianModel(
        net, bf.priors.FanIn(), bf.likelihoods.Gaussian(), data.x_train, data.y_train
    )
    results = {}
    for name, (method, sizes) in METHODS.items():
        results[name] = draws = bf.sample(model, method, seed=0, **sizes)
        line = scores(bf.predict(model, draws, data.x_test), data.y_test)
        verdict = bf.diagnose(model, draws, data.x_test, data.y_test).verdict
        print(
            f"{name:15} {line}  {draws.info['cpu_seconds']:5.1f} CPU s  {verdict}",
            flush=True,
        )
        if draws.log_evidence is not None:
            value, error = draws.log_evidence
            print(f"{'':15} log evidence {value:.1f}, standard error {error:.1f}")

    laplace = results["Laplace"]
    linear = bf.predict(model.linearised(laplace.posterior.loc), laplace, data.x_test)
    print(f"{'  linearised':15} {scores(linear, data.y_test)}")

    made = bf.report(
        model,
        results,
        data.x_test,
        data.y_test,
        path=OUT,
        title="Diabetes, 10-8-1, eleven methods",
    )
    print(f"\n{made.sections[0].comparison.headline}\nreport: {made.path}")


if __name__ == "__main__":
    main()
