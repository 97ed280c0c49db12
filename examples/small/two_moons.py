"""Two moons: what five methods say of the plane around the data.

Probability of a class, entropy of the label, and what of it more data would remove, the mutual
information of label and weights, in nats. Run: python examples/small/two_moons.py
"""

import torch
from common import panels, perceptron, row, save, shades
from sklearn.datasets import make_moons

import bnnflow as bf
from bnnflow.report import style

METHODS = {
    "HMC": (bf.HMC(), {"chains": 16, "warmup": 600, "draws": 300}),
    "VI": (bf.VI(), {}),
    "Laplace, linearised": (bf.Laplace(), {}),
    "MC dropout": (bf.MCDropout(), {}),
    "ensemble": (bf.DeepEnsemble(), {}),
}
SCORES = bf.metrics.accuracy, bf.metrics.lppd, bf.metrics.ece
BLUE, ORANGE, GREEN, PURPLE = style.PALETTE[:4]
MAPS = {  # their colours, from zero to the largest value
    "probability": (shades(BLUE, "white", ORANGE), 1.0),
    "entropy, 0 to 0.7": (shades("white", GREEN), 0.7),
    "information, 0 to 0.35": (shades("white", PURPLE), 0.35),
}


def moons(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = make_moons(n, noise=0.2, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def main() -> None:
    (x, y), (x_test, y_test) = moons(60, 0), moons(1000, 1)
    network, prior = perceptron(2, 16, 16, 2), bf.priors.Normal(1.0)
    model = bf.BayesianModel(network, prior, bf.likelihoods.Categorical(), x, y)
    a, b = torch.linspace(-3, 4, 60), torch.linspace(-3, 3.5, 60)
    figure, axes = panels([*METHODS, *[""] * 10], columns=5, size=(10.5, 6.4))
    row("1,000 new rows", "accuracy", "LPPD", "ECE", "CPU s")
    for column, (name, (method, sizes)) in enumerate(METHODS.items()):
        draws = bf.sample(model, method, seed=0, **sizes)
        shown = model.linearised(draws.posterior.loc) if "linear" in name else model
        test = bf.predict(shown, draws, x_test)
        pred = bf.predict(shown, draws, torch.cartesian_prod(a, b))
        row(name, *(score(test, y_test) for score in SCORES), draws.info["cpu_seconds"])
        values = pred.probs[:, 1], pred.aleatoric + pred.epistemic, pred.epistemic
        for ax, value, what in zip(axes[column::5], values, MAPS, strict=True):
            colours, top = MAPS[what]
            ax.contourf(a, b, value.reshape(60, 60).T, 20, cmap=colours, vmin=0, vmax=top)
            ax.scatter(*x.T, s=9, c=y, cmap="gray", edgecolor=style.INK, linewidth=0.6)
            ax.set_ylabel("" if column else what)
    save(figure, "two_moons")


if __name__ == "__main__":
    main()
