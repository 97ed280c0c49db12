"""What a diagnosis and a report cost, in CPU seconds and beside the sampling.

One, four and eleven methods on diabetes (scikit-learn's copy) and iris; draws of one sampler stand
for all of them, moved a little, which costs as much.

Run: ``python tests/benchmarks/bench_report.py``.
"""

import time
import warnings

import torch
from sklearn.datasets import load_diabetes, load_iris

import bnnflow as bf

torch.set_num_threads(1)


def problem(kind: str) -> tuple[bf.BayesianModel, torch.Tensor, torch.Tensor]:
    """Return a model of four fifths of the rows, and the others."""
    x, y = (load_diabetes if kind == "diabetes" else load_iris)(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / x.std(0)).float()
    likelihood, outputs = bf.likelihoods.Categorical(), 3
    y = torch.tensor(y)
    if kind == "diabetes":
        likelihood, outputs = bf.likelihoods.HeteroscedasticGaussian(), 2
        y = ((y - y.mean()) / y.std()).float()
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    new, old = rows[: len(x) // 5], rows[len(x) // 5 :]
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs)
    )
    prior = bf.priors.Normal(1.0)
    return bf.BayesianModel(net, prior, likelihood, x[old], y[old]), x[new], y[new]


def seconds(work) -> tuple[float, object]:
    """Return the CPU seconds of a call, and what it returned."""
    start = time.process_time()
    made = work()
    return time.process_time() - start, made


def main() -> None:
    """Print a table."""
    print(f"{'':10}{'what':12}{'CPU s':>8}{'of sampling':>13}{'MB':>7}")
    for kind in ("diabetes", "iris"):
        model, x, y = problem(kind)

        def sampled(model=model) -> bf.Draws:
            return bf.sample(
                model, bf.HMC(), chains=4, warmup=300, draws=400, seed=0, progress=False
            )

        cost, draws = seconds(sampled)
        print(f"{kind:10}{'sampling':12}{cost:8.2f}")
        bf.report(model, draws, x, y, path=None)  # what is loaded on first use
        spent, _ = seconds(lambda m=model, d=draws, x=x, y=y: bf.diagnose(m, d, x, y))
        print(f"{kind:10}{'diagnosis':12}{spent:8.2f}{spent / cost:12.0%}")
        noise = torch.randn(draws.theta.shape, generator=torch.Generator().manual_seed(1))
        for count in (1, 4, 11):
            methods = {
                f"method {i}": draws.with_theta(draws.theta + 0.01 * i * noise)
                for i in range(count)
            }
            spent, made = seconds(
                lambda m=model, d=methods, x=x, y=y: bf.report(m, d, x, y, path=None).html()
            )
            size = len(made.encode()) / 1e6
            name = f"report of {count}"
            print(f"{kind:10}{name:12}{spent:8.2f}{spent / cost:12.0%}{size:8.2f}")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
