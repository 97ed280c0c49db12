"""Draw the pictures of the explanations into this folder, and print the figures that they quote.

Run: python docs/images/draw.py [names ...]
Names are those of the functions; all of them take a CPU minute. White behind them, so that they can
be read on dark pages too.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.diagnostics import psis, rhat
from bnnflow.report import style

HERE = Path(__file__).parent
GRID = torch.linspace(-3.5, 3.5, 80)[:, None]
CHAINS, WARMUP, DRAWS = 16, 300, 1000
STEPS, PAIRS = 400, 128  # of the flow's training
SHOWN, SOLVER, RAW = 400, 40, 1000  # networks, steps of their way, scored draws
REPEATS = 200  # of an estimate by importance sampling
BLUE, ORANGE, GREEN = style.PALETTE[:3]


def problem(temperature: float = 1.0) -> tuple[bf.BayesianModel, bf.data.Dataset]:
    """Return a regression with a gap between its rows, by four hidden units."""
    data = bf.data.gap_regression(0, n=40, noise=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    model = bf.BayesianModel(
        net,
        bf.priors.Normal(1.5),
        bf.likelihoods.Gaussian(0.2),
        data.x_train,
        data.y_train,
        temperature=temperature,
    )
    return model, data


def sampled(model: bf.BayesianModel) -> bf.Draws:
    """Return draws that every picture can use."""
    return bf.sample(model, bf.HMC(), chains=CHAINS, warmup=WARMUP, draws=DRAWS, seed=0)


def panels(
    titles: Sequence[str], size: tuple[float, float], share: bool
) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many inches with a panel for each title, side by side."""
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = list(
        figure.subplots(1, len(titles), sharex=share, sharey=share, squeeze=False).flat
    )
    for title, ax in zip(titles, axes, strict=True):
        ax.set_title(title, loc="left", fontsize=style.BODY, color=style.INK)
        style.quiet(ax)
    return figure, axes


def band(ax: Axes, functions: Tensor, colour: str) -> None:
    """Draw where 90 % of the functions ``(draw, x)`` are, and a few of them."""
    low, high = functions.quantile(torch.tensor([0.05, 0.95]), 0)
    ax.fill_between(GRID[:, 0], low, high, color=colour, alpha=0.25, linewidth=0)
    ax.plot(GRID[:, 0], functions[:: max(1, len(functions) // 8)].T, color=colour, lw=0.8)


def functions(model: bf.BayesianModel, theta: Tensor) -> Tensor:
    """Return the networks' outputs on the grid, ``(draw, x)``."""
    return model.outputs(theta, GRID).squeeze(-1)


def symmetries() -> Figure:
    """Every hidden unit of every draw: what it reads, and what it writes."""
    model, _ = problem()
    draws = sampled(model)
    figure, axes = panels(("as drawn", "aligned"), (6.4, 3.2), share=True)
    for ax, each in zip(axes, (draws, bf.align(model, draws)), strict=True):
        params = model.spec.unflatten(each.theta[:, ::50].flatten(0, 1))
        reads, writes = params["0.weight"][..., 0], params["2.weight"][..., 0, :]
        for unit, colour in enumerate(style.PALETTE[:4]):
            ax.plot(
                reads[:, unit],
                writes[:, unit],
                ".",
                color=colour,
                ms=3,
                label=f"unit {unit + 1}",
            )
        ax.set_xlabel("weight that the unit reads with")
    axes[0].set_ylabel("weight that it writes with")
    axes[1].legend(frameon=False, fontsize=style.SMALL, markerscale=2)
    before, after = (
        each.theta.flatten(0, 1).var(0)[model.spec.slices["0.weight"]].mean()
        for each in (draws, bf.align(model, draws))
    )
    copies = 2**4 * math.factorial(4)
    print(
        f"symmetries: {copies} copies; variance of first-layer weights {before:.2f}, "
        f"aligned {after:.2f}"
    )
    return figure


def convergence() -> Figure:
    """R-hat of weights, of aligned weights and of predictions, for one run."""
    model, _ = problem()
    draws = sampled(model)
    aligned = bf.align(model, draws)
    outputs = functions(model, draws.theta.flatten(0, 1)).unflatten(0, (CHAINS, DRAWS))
    figure, (ax,) = panels(("",), (6.4, 3.0), share=False)
    found = {
        "weights": draws.theta,
        "aligned weights": aligned.theta,
        "predictions": outputs,
    }
    for (name, values), colour in zip(found.items(), (ORANGE, BLUE, GREEN), strict=True):
        each = torch.from_numpy(rhat(values.double().numpy())).sort().values
        ax.plot(torch.linspace(0, 1, len(each)), each, "-o", ms=3, color=colour, label=name)
        print(
            f"convergence: R-hat of {name}: median {each.median():.3f}, worst {each.max():.3f}"
        )
    ax.axhline(1.01, color=style.GREY, lw=1, ls="--")
    ax.set(xlabel="share of the quantities", ylabel="R-hat", yscale="log")
    ax.set_yticks([1, 1.05, 1.1, 1.2, 1.3], ["1", "1.05", "1.1", "1.2", "1.3"])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=style.SMALL)
    return figure


def temperature() -> Figure:
    """One posterior at three temperatures."""
    temperatures = (0.1, 1.0, 10.0)
    figure, axes = panels(
        [f"T = {each:g}" for each in temperatures], (7.6, 2.8), share=True
    )
    for ax, each, colour in zip(axes, temperatures, (BLUE, GREEN, ORANGE), strict=True):
        model, data = problem(each)
        draws = sampled(model)
        band(ax, functions(model, draws.flat[::20]), colour)
        ax.plot(data.x_train, data.y_train, ".", color=style.INK, ms=3)
        spread = functions(model, draws.flat[::20]).std(0)
        near = (GRID - data.x_train.T).abs().amin(1) < 0.1
        print(
            f"temperature {each:g}: sd of the functions {spread[near].mean():.2f} at the rows, "
            f"{spread[~near].mean():.2f} elsewhere"
        )
    axes[0].set(ylim=(-3, 3), ylabel="y")
    axes[1].set_xlabel("x")
    return figure


def flow() -> Figure:
    """What a flow does to networks on their way from the prior to the posterior."""
    model, data = problem()
    draws = sampled(model)
    began = time.process_time()
    fitted = bf.fit_flow(
        model, draws, seed=0, training=bf.Training(steps=STEPS, batch_size=PAIRS)
    )
    seconds = time.process_time() - began
    times, x = (
        (0.0, 0.25, 0.5, 0.75, 1.0),
        fitted.start(SHOWN, torch.Generator().manual_seed(1)),
    )
    figure, axes = panels([f"t = {each:g}" for each in times], (9.6, 2.4), share=True)
    now = 0
    with torch.no_grad():
        for ax, until in zip(axes, times, strict=True):
            while now < until * SOLVER:  # midpoint rule
                at = torch.tensor(now / SOLVER)
                middle = x + 0.5 / SOLVER * fitted.velocity(at, x)
                x = x + fitted.velocity(at + 0.5 / SOLVER, middle) / SOLVER
                now += 1
            band(ax, functions(model, fitted.source.from_normal(x)), BLUE)
            ax.plot(data.x_train, data.y_train, ".", color=style.INK, ms=3)
    axes[0].set(ylim=(-5, 5), ylabel="y")
    axes[2].set_xlabel("x")
    raw = bf.sample(model, fitted, draws=RAW, seed=1)
    for name, each in {
        "HMC": draws,
        "flow": raw,
        "flow, refined": bf.refine(model, raw),
    }.items():
        likelihood = float(model.log_likelihood(each.flat).mean())
        score = bf.metrics.lppd(bf.predict(model, each, data.x_test), data.y_test)
        print(f"flow: {name}: log likelihood {likelihood:.1f}, LPPD {score:.3f}")
    print(f"flow: {seconds:.0f} CPU s of training")
    return figure


def khat() -> Figure:
    """The error of an estimate by importance sampling, and the k-hat of its weights.

    The target is N(0, I), the proposal narrower or wider in each of up to 128 dimensions.
    """
    generator = torch.Generator().manual_seed(0)
    figure, (ax,) = panels(("",), (6.4, 3.0), share=False)
    for scale, colour in zip((0.9, 0.8, 1.2), (BLUE, ORANGE, GREEN), strict=True):
        points = []
        for dim in (1, 2, 4, 8, 16, 32, 64, 128):
            z = torch.randn(REPEATS, 1000, dim, generator=generator)
            squares = z.square().sum(-1, dtype=torch.float64)
            log_weights = 0.5 * squares * (1 - scale**2) + dim * math.log(scale)
            log_evidence = log_weights.logsumexp(1) - math.log(1000)  # 0 is right
            shapes = torch.tensor([psis(each.numpy())[1] for each in log_weights[:20]])
            shape, error = (
                float(shapes.median()),
                float(log_evidence.square().mean().sqrt()),
            )
            points.append((shape, error))
            print(
                f"khat: sds times {scale:g}, {dim} dimensions: {shape:.2f}, error {error:.3f}"
            )
        label = f"sds times {scale:g}"
        ax.plot(*zip(*points, strict=True), "o-", ms=4, color=colour, label=label)
    ax.axvline(0.7, color=style.GREY, lw=1, ls="--")
    ax.set(
        xlabel="k-hat of 1,000 weights",
        ylabel="error of log evidence",
        yscale="log",
        xlim=(-0.5, None),
    )
    ax.legend(frameon=False, fontsize=style.SMALL)
    return figure


PICTURES = {
    each.__name__: each for each in (symmetries, convergence, temperature, flow, khat)
}


def main(names: Sequence[str]) -> None:
    """Draw the pictures of these names, or all."""
    torch.set_num_threads(1)
    for name in names or PICTURES:
        PICTURES[name]().savefig(HERE / f"explain-{name}.png", dpi=100)


if __name__ == "__main__":
    main(sys.argv[1:])
