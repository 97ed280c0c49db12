"""What a prior over weights says of functions, by activation and depth: no data are looked at.

Eight functions of each prior, and the band that holds 90 % of a thousand.
Run: python examples/small/prior_functions.py
"""

import torch
from common import panels, perceptron, row, save
from torch import nn

import bnnflow as bf
from bnnflow.report import style


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


ACTIVATIONS = {"ReLU": nn.ReLU, "tanh": nn.Tanh, "sine": Sine}
DEPTHS = (1, 2, 4, 8)  # hidden layers
WIDTH, DRAWS, SHOWN = 64, 1000, 8
PRIOR = bf.priors.FanIn(1.5)  # weights of variance 1.5² / fan in, biases of variance 1


def main() -> None:
    x = torch.linspace(-3, 3, 121)
    kinds = [(name, depth) for name in ACTIVATIONS for depth in DEPTHS]
    titles = [f"{name}, {depth} hidden" for name, depth in kinds]
    figure, axes = panels(titles, columns=len(DEPTHS), size=(9.6, 6.2))
    row("f(x) of the prior", "sd at 0", "sd at 3", "corr(0, 1)", "corr(0, 3)")
    for ax, title, (name, depth) in zip(axes, titles, kinds, strict=True):
        net = perceptron(1, *[WIDTH] * depth, 1, activation=ACTIVATIONS[name])
        model = bf.BayesianModel(net, PRIOR, bf.likelihoods.Gaussian(0.1), x[:, None], x)
        f = model.outputs(model.sample_prior(DRAWS, seed=1))[..., 0]  # (draws, 121)
        at_0, at_1, at_3 = f[:, [60, 80, 120]].double().T
        _, *corr = torch.stack([at_0, at_1, at_3]).corrcoef()[0]
        row(title, *map(float, (at_0.std(), at_3.std(), *corr)))
        band = f.quantile(torch.tensor([0.05, 0.95]), 0)
        ax.fill_between(x, *band, color=style.GREY, alpha=0.2, linewidth=0)
        colour = style.PALETTE[list(ACTIVATIONS).index(name)]
        ax.plot(x, f[:SHOWN].T, color=colour, linewidth=1)
        ax.set_ylim(-6, 6)
    save(figure, "prior_functions", "x", "f(x)")


if __name__ == "__main__":
    main()
