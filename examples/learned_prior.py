"""A prior learned from many tasks: what a flow knows that no single posterior holds.

Every task is a sine wave, y = a sin(b x + c) + .1 noise with a in .5 to 1.5, b in 1.5 to 3 and any
c, seen through a 1-16-1 tanh network. The posteriors of the training tasks, 30 rows each, are
pooled, `bf.fit_prior` fits one flow to them, and its push-forward is the prior of tasks that it has
never seen. Beside it stand the plain N(0, 1), the Gaussian with the mean and covariance of the same
pooled draws, those draws themselves as atoms of equal weight, and a Gaussian process with an RBF
kernel whose scales maximise the evidence of the training tasks.

"Log evidence" is that of a task's first rows, by importance sampling from each prior at 3 rows, in
closed form for the process; at 8 rows by `bf.SMC` in the coordinates of each prior. "LPPD" is the
log predictive density of 60 fresh rows, in nats a row. Mean difference to the flow over unseen
tasks with its standard error. The last rows are tasks from outside the family, steps and parabolas:
there a learned prior must be expected to lose.

Run: python examples/learned_prior.py [--full]: few tasks and little training, or, in an hour, 128
tasks to learn from and 100 unseen ones. The picture and the flow go to out/learned_prior.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from weight_space import table

import bnnflow as bf
from bnnflow.report import style
from bnnflow.transport import Solver, WeightsVelocity, fit_gaussian

OUT = Path("out/learned_prior")
WIDTH, NOISE, FRESH, REACH = 16, 0.1, 60, 2.0
ATOMS = 4  # prior draws in units of the bank of a flow
CHUNK = 8192  # weight vectors evaluated together


class Sizes(NamedTuple):
    """How much is done."""

    tasks: int  # to learn from
    steps: int  # of training
    unseen: int  # by importance sampling
    tempered: int  # unseen ones by SMC
    bank: int  # draws of a prior
    particles: int


SMALL = Sizes(tasks=32, steps=400, unseen=30, tempered=3, bank=8192, particles=128)
FULL = Sizes(tasks=128, steps=1500, unseen=100, tempered=100, bank=32768, particles=256)
SOLVER = Solver("midpoint", 4)
Function = Callable[[Tensor], Tensor]


def wave(g: torch.Generator) -> Function:
    a, b, c = torch.rand(3, generator=g)
    return lambda x: (0.5 + a) * torch.sin((1.5 + 1.5 * b) * x + 2 * math.pi * c)


def step_function(g: torch.Generator) -> Function:
    height, at = 2 * torch.rand(2, generator=g) - 1
    return lambda x: torch.where(x < at, -height, height)


def parabola(g: torch.Generator) -> Function:
    bend, at = 2 * torch.rand(2, generator=g) - 1
    return lambda x: bend * (x - at).square() - bend


class Task(NamedTuple):
    """Rows to learn from, and fresh ones."""

    model: bf.BayesianModel
    x: Tensor
    y: Tensor


def task(seed: int, rows: int, family: Callable[[torch.Generator], Function]) -> Task:
    g = torch.Generator().manual_seed(seed)
    function = family(g)
    x = REACH * (2 * torch.rand(rows + FRESH, 1, generator=g) - 1)
    y = function(x[:, 0]) + NOISE * torch.randn(rows + FRESH, generator=g)
    net = nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    given = bf.priors.Normal(1.0), bf.likelihoods.Gaussian(NOISE), x[:rows], y[:rows]
    return Task(bf.BayesianModel(net, *given), x[rows:], y[rows:])


# ---------------------------------------- priors that weights come from


def by_weights(one: Task, bank: Tensor) -> tuple[float, float]:
    """Return log evidence and LPPD by the likelihood of prior draws."""
    model = one.model
    values = torch.cat([model.log_likelihood(rows) for rows in bank.split(CHUNK)])
    evidence = float(values.logsumexp(0)) - math.log(len(bank))
    kept = values > values.max() - 25
    weights = values[kept].log_softmax(0)
    fresh = model.pointwise_log_likelihood(bank[kept], one.x, one.y).double()
    return evidence, float((fresh + weights[:, None]).logsumexp(0).mean())


def by_tempering(one: Task, carried: bf.BayesianModel, sizes: Sizes) -> tuple[float, float]:
    """Return log evidence and LPPD by particles in the coordinates of the prior."""
    smc = bf.SMC(particles=sizes.particles, moves=2, max_leapfrog=6, ess=0.6)
    draws = bf.sample(carried, smc, chains=1, seed=0, progress=False)
    prediction = bf.predict(carried, draws, one.x)
    assert draws.log_evidence is not None
    return draws.log_evidence[0], bf.metrics.lppd(prediction, one.y)


# ---------------------------------------- the Gaussian process


def kernel(a: Tensor, b: Tensor, log_scales: Tensor) -> Tensor:
    height, length = log_scales.exp()
    return height**2 * torch.exp(-0.5 * ((a - b.T) / length) ** 2)


def process(one: Task, log_scales: Tensor) -> tuple[float, float]:
    """Return log evidence and LPPD of the process."""
    x, y = one.model.x.double(), one.model.y.double().flatten()
    covariance = kernel(x, x, log_scales) + NOISE**2 * torch.eye(len(x)).double()
    law = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance)
    across = kernel(one.x.double(), x, log_scales)
    solved = torch.linalg.solve(covariance, torch.cat([y[:, None], across.T], 1))
    mean = across @ solved[:, 0]
    variance = log_scales[0].exp() ** 2 - (across * solved[:, 1:].T).sum(1) + NOISE**2
    fresh = torch.distributions.Normal(mean, variance.sqrt()).log_prob(one.y.double())
    return float(law.log_prob(y)), float(fresh.mean())


def tuned_process(tasks: list[Task]) -> Tensor:
    """Return the log scales of largest evidence."""
    log_scales = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_scales], max_iter=40)

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for each in tasks[:64]:
            x, y = each.model.x.double(), each.model.y.double().flatten()
            covariance = kernel(x, x, log_scales) + NOISE**2 * torch.eye(len(x)).double()
            law = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance)
            total = total - law.log_prob(y)
        total.backward()
        return total

    optimiser.step(loss)
    return log_scales.detach()


# ---------------------------------------- the table


def compared(name: str, results: dict[str, list[tuple[float, float]]]) -> list[list[str]]:
    """Return the rows of the table: differences to the flow."""
    values = {key: torch.tensor(each, dtype=torch.float64) for key, each in results.items()}
    flow = values["flow"]
    rows = [[name, "flow", *(f"{each:.2f}" for each in flow.mean(0).tolist())]]
    for key, each in values.items():
        if key != "flow":
            gap = each - flow
            error = gap.std(0) / len(gap) ** 0.5
            cells = zip(gap.mean(0).tolist(), error.tolist(), strict=True)
            rows.append(["", key, *(f"{m:+.2f} ± {e:.2f}" for m, e in cells)])
    return rows


def drawn(one: Task, priors: dict[str, Tensor]) -> None:
    """Draw functions of each prior, and the posterior of a task of three rows."""
    figure = Figure(figsize=(3.2 * len(priors), 5.4))
    axes = figure.subplots(2, len(priors), sharex=True, sharey=True)
    grid = torch.linspace(-REACH - 0.5, REACH + 0.5, 120)[:, None]
    for column, (name, bank) in zip(axes.T, priors.items(), strict=True):
        spread = torch.linspace(0, len(bank) - 1, 12).long()  # atoms come task by task
        functions = one.model.outputs(bank[spread], grid)[..., 0]
        weights = one.model.log_likelihood(bank[:CHUNK]).softmax(0)
        chosen = torch.multinomial(
            weights, 12, replacement=True, generator=torch.Generator().manual_seed(0)
        )
        after = one.model.outputs(bank[chosen], grid)[..., 0]
        for ax, lines in zip(column, (functions, after), strict=True):
            ax.plot(grid[:, 0], lines.T, color=style.PALETTE[0], alpha=0.5, lw=1)
            ax.set_ylim(-4, 4)
        column[1].plot(one.model.x[:, 0], one.model.y.flatten(), "o", color=style.INK)
        column[0].set_title(name)
    axes[0, 0].set_ylabel("the prior")
    axes[1, 0].set_ylabel("after three rows")
    figure.tight_layout()
    figure.savefig(OUT / "learned_prior.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="sizes that take an hour")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes, seed = (FULL if given.full else SMALL), 10_000 * given.seed
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)

    started = time.process_time()
    learned = [task(seed + each, 30, wave) for each in range(sizes.tasks)]
    models = [each.model for each in learned]
    posteriors = [
        bf.sample(each, bf.HMC(max_leapfrog=128), chains=16, warmup=150, draws=24,
                  seed=number, progress=False)
        for number, each in enumerate(models)
    ]  # fmt: skip
    print(f"posteriors of {sizes.tasks} tasks: {time.process_time() - started:.0f} CPU s")
    started = time.process_time()
    velocity = WeightsVelocity(models[0].spec, width=32, depth=3, architecture="signed")
    training = bf.Training(steps=sizes.steps)
    flow = bf.fit_prior(
        models, posteriors, velocity=velocity, training=training, seed=given.seed
    )
    flow = replace(flow, solver=SOLVER)
    flow.save(OUT / "flow.npz")
    spent, judged = time.process_time() - started, flow.info["log_evidence"][0]
    print(f"the flow: {spent:.0f} CPU s")
    plain = flow.info["log_evidence_plain"]
    print(f"held-out tasks at 3 rows: {judged:.2f} nats, {plain:.2f} under N(0, 1)")

    pooled = torch.cat([each.theta[:, 3::4].flatten(0, 1) for each in posteriors])
    gaussian = fit_gaussian(models[0], pooled, seed=0)
    with torch.no_grad():
        priors = {
            "flow": flow.sample(sizes.bank, 1),
            "N(0, 1)": models[0].sample_prior(ATOMS * sizes.bank, 1),
            "Gaussian": gaussian.sample(ATOMS * sizes.bank, 1),
            "atoms": pooled,
        }
    scales = tuned_process(learned)
    drawn(task(seed + 5000, 3, wave), priors)
    rows = []
    for name, family, count in (
        ("3 rows", wave, sizes.unseen),
        ("3 rows of steps", step_function, sizes.unseen),
        ("3 rows of parabolas", parabola, sizes.unseen),
    ):
        unseen = [task(seed + 5000 + each, 3, family) for each in range(count)]
        results = {
            key: [by_weights(each, bank) for each in unseen] for key, bank in priors.items()
        }
        results["process"] = [process(each, scales) for each in unseen]
        rows += compared(name, results)
    unseen = [task(seed + 5000 + each, 8, wave) for each in range(sizes.tempered)]
    results = {
        "flow": [
            by_tempering(each, each.model.transported(flow), sizes) for each in unseen
        ],
        "N(0, 1)": [by_tempering(each, each.model, sizes) for each in unseen],
        "process": [process(each, scales) for each in unseen],
    }
    rows += compared("8 rows", results)
    print(table(["", "prior", "log evidence", "LPPD a row"], rows))


if __name__ == "__main__":
    main()
