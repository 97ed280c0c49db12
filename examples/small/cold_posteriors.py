"""Does a posterior predict better at another temperature? Only where the model is wrong.

Eight regressions (grey) are drawn from the prior itself; then the model's noise or prior is wrong.
Run: python examples/small/cold_posteriors.py
"""

import torch
from common import panels, perceptron, row, save

import bnnflow as bf
from bnnflow.report import style

TEMPERATURES = [0.1, 0.3, 1.0, 3.0, 10.0]
TASKS, ROWS = 8, 30
TRUTH = bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.2)
ASSUMED = {
    "the model is right": TRUTH,
    "noise twice too large": (TRUTH[0], bf.likelihoods.Gaussian(0.4)),
    "noise half as large": (TRUTH[0], bf.likelihoods.Gaussian(0.1)),
    "prior a third as wide": (bf.priors.Normal(1 / 3), TRUTH[1]),
}
SIZES = {"chains": 16, "warmup": 150, "draws": 60}


def regression(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(ROWS + 500, 1, generator=generator) - 2
    model = bf.BayesianModel(perceptron(1, 16, 1), *TRUTH, x, x[:, 0])
    truth = bf.predict(model, model.sample_prior(1, generator), x)
    return x, truth.sample(1, generator)[0].float()


def score(assumed: tuple, temperature: float, seed: int) -> float:
    x, y = regression(seed)
    given = *assumed, x[:ROWS], y[:ROWS]
    model = bf.BayesianModel(perceptron(1, 16, 1), *given, temperature=temperature)
    draws = bf.sample(model, bf.HMC(), seed=seed, **SIZES)
    return bf.metrics.lppd(bf.predict(model, draws, x[ROWS:]), y[ROWS:])


def main() -> None:
    figure, axes = panels(list(ASSUMED), columns=2, size=(8, 5.2), share=False)
    row("gain by temperature", *map(str, TEMPERATURES))
    for name, ax, colour in zip(ASSUMED, axes, style.PALETTE, strict=False):
        runs = [
            [score(ASSUMED[name], t, seed) for t in TEMPERATURES] for seed in range(TASKS)
        ]
        gain = torch.tensor(runs) - torch.tensor(runs)[:, [TEMPERATURES.index(1.0)]]
        mean, error = gain.mean(0), gain.std(0) / TASKS**0.5
        row(name, *torch.stack([mean, error], 1).tolist())
        ax.semilogx(TEMPERATURES, gain.T, color=style.GREY, linewidth=0.7)
        ax.errorbar(TEMPERATURES, mean, 2 * error, fmt="o-", color=colour, capsize=3)
        ax.axvline(1.0, color=style.INK, linewidth=0.8, linestyle=":")
    save(figure, "cold_posteriors", "temperature", "gain in held-out log score, nats a row")


if __name__ == "__main__":
    main()
