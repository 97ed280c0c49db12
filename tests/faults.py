"""Models whose priors made their data, draws of their posteriors, and what may be wrong with
either: what the verdict is measured by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.draws import Draws
from tests.problems import F64, built, chain, generator, normal

CHAINS, DRAWS, NOISE = 4, 500, 0.5


class Problem:
    """Linear regression whose prior made the data; exact draws, and rows that were not fitted."""

    def __init__(self, seed: int, rows: int = 100, held_out: int = 100):
        net = self.net()
        columns = next(net.parameters()).shape[1]
        x = normal(rows + held_out, columns, seed=seed)
        unknown = bf.BayesianModel(
            net, priors.Normal(), likelihoods.Gaussian(NOISE), x, x[:, 0]
        )
        truth = normal(unknown.dim, seed=seed + 10_000)
        y = unknown.outputs(truth, x).squeeze(1) + NOISE * normal(
            len(x), seed=seed + 20_000
        )
        self.fitted, self.x, self.y = (x[:rows], y[:rows]), x[rows:], y[rows:]
        self.model = self.model_of(*self.fitted)
        self.seed = seed

    def net(self) -> nn.Module:
        return built(lambda: nn.Linear(3, 1))

    def model_of(self, x: Tensor, y: Tensor, noise: float = NOISE) -> bf.BayesianModel:
        """Return the model of other rows, or of other noise."""
        return bf.BayesianModel(
            self.net(), priors.Normal(), likelihoods.Gaussian(noise), x, y
        )

    def theta(
        self,
        model: bf.BayesianModel | None = None,
        noise: float = NOISE,
        draws: int = DRAWS,
    ) -> Tensor:
        """Return draws of a posterior, ``(CHAINS, draws, dim)``."""
        model = model or self.model
        design = torch.cat([model.x, torch.ones(len(model.x), 1, dtype=F64)], 1)
        precision = design.T @ design / noise**2 + torch.eye(model.dim, dtype=F64)
        mean = torch.linalg.solve(precision, design.T @ model.y.flatten() / noise**2)
        root = torch.linalg.cholesky(torch.linalg.inv(precision))
        return mean + normal(CHAINS, draws, model.dim, seed=self.seed + 30_000) @ root.T

    def dressed(
        self,
        theta: Tensor,
        log_joint: Tensor | None = None,
        model: bf.BayesianModel | None = None,
    ) -> Draws:
        """Return weights as the draws of a sampler that accepts nine proposals of ten."""
        shape = theta.shape[:2]
        if log_joint is None:
            log_joint = (model or self.model).log_joint(theta.flatten(0, 1)).reshape(shape)
        kept = {
            "acceptance_rate": torch.full(shape, 0.9, dtype=F64),
            "diverging": torch.zeros(shape, dtype=torch.bool),
        }
        return Draws(theta, log_joint.double(), kept)


class NetworkProblem(Problem):
    """The same of a network with two inputs and four tanh units, with draws of HMC: one of ten,
    for a verdict that asks for more of chains worth a hundred draws is right.
    """

    def net(self) -> nn.Module:
        return built(lambda: chain(2, 4, 1, activation=nn.Tanh))

    def theta(
        self,
        model: bf.BayesianModel | None = None,
        noise: float = NOISE,
        draws: int = DRAWS,
    ) -> Tensor:
        size = {"chains": CHAINS, "warmup": 500, "draws": 10 * draws, "seed": self.seed}
        long = bf.sample(model or self.model, bf.HMC(), **size, progress=False)
        return long.theta[:, ::10]


def faults(problem: Problem) -> Iterator[tuple[str, Draws]]:
    """Yield draws with a fault each, which no honest verdict trusts."""
    theta, other = problem.theta(), type(problem)(problem.seed + 500)
    shifted = theta.clone()
    shifted[0] += 0.3 * theta[0].std(0)
    yield "a chain shifted by .3 sd", problem.dressed(shifted)
    yield "stuck chains", problem.dressed(theta[:, :1].expand_as(theta).clone())
    nowhere = 0.05 * normal(*theta.shape, seed=problem.seed)
    yield "all in a mode that ignores x", problem.dressed(nowhere)
    of_prior = problem.model.sample_prior(CHAINS * DRAWS, seed=problem.seed)
    yield "the prior", problem.dressed(of_prior.reshape(theta.shape))
    theirs = other.theta()
    yield "another data set's posterior", other.dressed(theirs)
    half = theta.clone()
    half[:, DRAWS // 2 :] = half[:, : DRAWS // 2]
    yield "half the draws copied", problem.dressed(half)
    twice = theta.clone()
    twice[2:] = twice[:2]
    yield "chains copied", problem.dressed(twice)
    yield "a random log joint", problem.dressed(theta, normal(CHAINS, DRAWS, seed=1))
    centre = theta.mean(1, keepdim=True)
    yield "shrunk by half", problem.dressed(centre + 0.5 * (theta - centre))
    yield "weights times 1.5", problem.dressed(1.5 * theta)
    two = torch.cat([theta[:2], theirs[2:]])
    stored = torch.cat(
        [problem.dressed(theta[:2]).log_joint, other.dressed(theirs[2:]).log_joint]
    )
    yield "two chains of other data", problem.dressed(two, stored)
    yield (
        "the log joint of another run",
        problem.dressed(theta, other.dressed(theirs).log_joint),
    )


class Case(NamedTuple):
    """A fit with a fault, and the rows that it is judged on."""

    name: str
    model: bf.BayesianModel
    draws: Draws
    x: Tensor
    y: Tensor
    in_training: bool = True  # whether rows of training may tell


def faults_of_samplers(problem: Problem) -> Iterator[Case]:
    """Yield draws of samplers whose steps are ten times too long."""
    model, size = problem.model, {"chains": CHAINS, "seed": problem.seed, "progress": False}
    # its steps are proportional to the bias that they may cause, a tenth by default
    langevin = bf.sample(model, bf.SGLD(bias=0.999), warmup=100, draws=DRAWS, **size)
    yield Case("SGLD, steps times ten", model, langevin, problem.x, problem.y)
    tuned = bf.sample(model, bf.HMC(), warmup=100, draws=20, **size)
    long = 10 * float(tuned.stats["step_size"].mean())
    raw = bf.sample(model, bf.HMC(step_size=long), warmup=0, draws=DRAWS, **size)
    yield Case("HMC untuned, steps times ten", model, raw, problem.x, problem.y)


def faults_of_models(problem: Problem) -> Iterator[Case]:
    """Yield fits to wrong data, or of wrong models, each with draws of its own posterior."""

    def fit(
        name: str, x: Tensor, y: Tensor, new: Tensor, targets: Tensor, noise: float = NOISE
    ) -> Case:
        model = problem.model_of(x, y, noise)
        draws = problem.dressed(problem.theta(model, noise), model=model)
        return Case(name, model, draws, new, targets)

    x, y = problem.fitted
    new, targets = problem.x, problem.y
    for factor in (0.5, 2.0, 1.5):
        yield fit(f"noise times {factor}", x, y, new, targets, factor * NOISE)
    yield fit("raw targets", x, 150 + 80 * y, new, 150 + 80 * targets)
    shuffled = torch.cat([y, targets])[
        torch.randperm(len(y) + len(targets), generator=generator(problem.seed))
    ]
    yield fit("all targets shuffled", x, shuffled[: len(y)], new, shuffled[len(y) :])
    mixed = y[torch.randperm(len(y), generator=generator(problem.seed))]
    yield fit("targets of training shuffled", x, mixed, new, targets)

    def units(factor: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
        scale, shift = torch.ones(x.shape[1], dtype=F64), torch.zeros(x.shape[1], dtype=F64)
        scale[1], shift[1] = factor, offset
        return x * scale + shift, new * scale + shift

    known, later = units(40.0, 300.0)
    yield fit("a raw column", known, y, later, targets)
    known, later = units(1000.0)
    yield fit("a column times 1,000", known, y, later, targets)
    draws = problem.dressed(problem.theta())
    for name, factor in (("times 1,000", 1000.0), ("in cm for inches", 2.54)):
        later = units(factor)[1]
        told = f"a column of new rows {name}"
        yield Case(told, problem.model, draws, later, targets, in_training=False)
