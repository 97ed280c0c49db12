"""Choose the width and the prior by the evidence of the training rows, and see what rows that were
held out say of the choice.

Run: python examples/small/choose_by_evidence.py
"""

import torch
from common import panels, perceptron, row, save

import bnnflow as bf
from bnnflow.report import style

WIDTHS, SCALES = (1, 2, 4, 8, 16, 32), (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
WIDTH, SCALE = 8, 2.0  # while the other one is varied
SMC, LAPLACE = bf.SMC(particles=500), bf.Laplace()
TITLES = (f"prior of scale {SCALE:g}", f"{WIDTH} hidden units", "", "")
BLUE, ORANGE = style.PALETTE[:2]


def evidence(width: int, scale: float) -> tuple[float, float, float, float]:
    """Return the log evidence, its standard error, Laplace's, and the held-out log score."""
    train, new = (bf.data.gap_regression(seed, n=n) for seed, n in ((0, 30), (1, 1000)))
    prior = bf.priors.FanIn(scale, bias_scale=scale)
    given = prior, bf.likelihoods.Gaussian(), train.x_train, train.y_train
    model = bf.BayesianModel(perceptron(1, width, 1), *given)
    draws, laplace = (bf.sample(model, method, seed=0) for method in (SMC, LAPLACE))
    lppd = bf.metrics.lppd(bf.predict(model, draws, new.x_train), new.y_train)
    found = *draws.log_evidence, laplace.log_evidence[0], lppd
    row(f"{width} units, scale {scale:g}", found[:2], *found[2:])
    return found


def main() -> None:
    figure, axes = panels(TITLES, columns=2, size=(8.6, 5.4), share=False)
    row("log evidence", "SMC", "Laplace", "held-out LPPD")
    tried = (WIDTHS, [(w, SCALE) for w in WIDTHS]), (SCALES, [(WIDTH, s) for s in SCALES])
    for column, (values, models) in enumerate(tried):
        value, error, laplace, lppd = torch.tensor([evidence(*each) for each in models]).T
        above, below = axes[column], axes[2 + column]
        above.errorbar(values, value, error, fmt="o-", color=BLUE, capsize=3, label="SMC")
        above.plot(values, laplace, "s--", color=ORANGE, label="Laplace")
        below.plot(values, lppd, "o-", color=style.INK)
        for ax in (above, below):
            ax.set_xscale("log", base=2)
            ax.set_xticks(values, [f"{each:g}" for each in values])
    axes[0].legend(frameon=False)
    axes[0].set_ylabel("log evidence of 30 rows")
    axes[2].set(xlabel="hidden units", ylabel="held-out log score a row")
    axes[3].set(xlabel="scale of the prior")
    save(figure, "choose_by_evidence")


if __name__ == "__main__":
    main()
