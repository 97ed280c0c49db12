"""Which rows to label next: those that the posterior knows least of, or any.

`Prediction.epistemic` is the standard deviation of the function for numbers, and the mutual
information of label and weights for classes. Run: python examples/small/active_learning.py
"""

from itertools import product

import torch
from common import panels, perceptron, row, save
from sklearn.datasets import load_breast_cancer, make_friedman1, make_moons
from sklearn.preprocessing import scale

import bnnflow as bf
from bnnflow.report import style

SEEDS, LABELLED, POOL = range(4), range(10, 55, 5), 400
SIZES = {"chains": 8, "warmup": 150, "draws": 50}
NUMBERS = bf.likelihoods.Standardised(bf.likelihoods.Gaussian(), loc=14.0, scale=5.0)
CLASSES = bf.likelihoods.Categorical()
PROBLEMS = {  # rows of a seed, outputs of the network
    "Friedman": (lambda s: make_friedman1(600, 5, noise=2, random_state=s), 1, NUMBERS),
    "two moons": (lambda s: make_moons(600, noise=0.15, random_state=s), 2, CLASSES),
    "breast cancer": (lambda s: load_breast_cancer(return_X_y=True), 2, CLASSES),
}
WAYS = {"any": style.GREY, "unknown": style.PALETTE[0]}


def nll(name: str, way: str, seed: int) -> list[float]:
    rows_of, outputs, likelihood = PROBLEMS[name]
    x, y = map(torch.tensor, rows_of(seed))
    x, scores = torch.tensor(scale(x)).float(), []
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    pool, test = order[:POOL], order[POOL:]
    for n in LABELLED:
        given = bf.priors.Normal(1.0), likelihood, x[pool[:n]], y[pool[:n]]
        model = bf.BayesianModel(perceptron(x.shape[1], 16, outputs), *given)
        draws = bf.sample(model, bf.HMC(), seed=seed, **SIZES)
        scores.append(-bf.metrics.lppd(bf.predict(model, draws, x[test]), y[test]))
        if way == "unknown":  # these come first
            unknown = bf.predict(model, draws, x[pool[n:]]).epistemic
            pool[n:] = pool[n:][unknown.argsort(descending=True)]
    return scores


def main() -> None:
    figure, axes = panels(list(PROBLEMS), columns=3, size=(9.6, 3.4), share=False)
    row("NLL by rows labelled", *map(str, LABELLED[::2]))
    for (ax, name), way in product(zip(axes, PROBLEMS, strict=True), WAYS):
        scores = torch.tensor([nll(name, way, seed) for seed in SEEDS])
        mean, error = scores.mean(0), scores.std(0) / len(SEEDS) ** 0.5
        row(f"{name}, {way}", *torch.stack([mean, error], 1)[::2].tolist())
        ax.errorbar(LABELLED, mean, error, fmt="o-", color=WAYS[way], label=way, capsize=2)
    axes[0].legend(frameon=False)
    save(figure, "active_learning", "rows labelled", "NLL, nats a row")


if __name__ == "__main__":
    main()
