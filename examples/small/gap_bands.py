"""Ten ways to draw networks, and how sure each is in a gap between the data.

Rows of the picture: samplers, fitted Gaussians, trained networks. Grey: Hamiltonian Monte Carlo.
Run: python examples/small/gap_bands.py
"""

from common import panels, perceptron, row, save

import bnnflow as bf
from bnnflow.report import style

CHAINS = {"chains": 16, "warmup": 300, "draws": 300}
TRAINING = bf.Training(steps=200, batch_size=128)  # of the flow, on the draws of HMC
METHODS = {
    "MCLMC": (bf.MCLMC(), CHAINS),
    "SMC": (bf.SMC(particles=250), {}),
    "flow": (None, {"draws": 1000}),
    "VI": (bf.VI(), {}),
    "Laplace": (bf.Laplace(), {}),
    "Laplace, linearised": (bf.Laplace(), {}),
    "SWAG": (bf.SWAG(), {}),
    "MC dropout": (bf.MCDropout(), {}),
    "ensemble": (bf.DeepEnsemble(), {}),
}


def main() -> None:
    data = bf.data.gap_regression(seed=0, n=30)
    x, y, grid = data.x_train, data.y_train, data.x_test[:, 0]
    prior, likelihood = bf.priors.Normal(1.5), bf.likelihoods.Gaussian(0.1)
    model = bf.BayesianModel(perceptron(1, 16, 1), prior, likelihood, x, y)
    hmc = bf.sample(model, bf.HMC(target_acceptance=0.95), seed=0, **CHAINS)
    known = bf.predict(model, hmc, data.x_test)
    exact, covered = known.interval(0.9), bf.metrics.coverage(known, data.y_test, 0.9)
    flow = bf.fit_flow(model, hmc, training=TRAINING, seed=0)
    gap = (grid > x[x < 0].max()) & (grid < x[x > 0].min())
    figure, axes = panels(list(METHODS), columns=3, size=(9.4, 6.6))
    row("width / HMC", "in the gap", "elsewhere", "90 % covers", "CPU s")
    row("HMC", 1.0, 1.0, covered, hmc.info["cpu_seconds"])
    for index, (name, (method, sizes)) in enumerate(METHODS.items()):
        draws = bf.sample(model, method or flow, seed=0, **sizes)
        shown = model.linearised(draws.posterior.loc) if "linear" in name else model
        pred = bf.predict(shown, draws, data.x_test)
        low, high = pred.interval(0.9)
        ratio = (high - low) / (exact[1] - exact[0])
        inside = bf.metrics.coverage(pred, data.y_test, 0.9)
        seconds = draws.info["cpu_seconds"] + (0 if method else flow.info["cpu_seconds"])
        row(name, float(ratio[gap].mean()), float(ratio[~gap].mean()), inside, seconds)
        ax, colour = axes[index], style.PALETTE[index // 3]
        ax.fill_between(grid, *exact, facecolor="#80889040", edgecolor=style.GREY)
        ax.fill_between(grid, low, high, color=colour, alpha=0.3, linewidth=0)
        ax.plot(grid, pred.mean, color=colour)
        ax.plot(x, y, ".", color=style.INK, markersize=4)
        ax.set_ylim(-2.8, 2.8)
    save(figure, "gap_bands", "x", "90 % of y")


if __name__ == "__main__":
    main()
