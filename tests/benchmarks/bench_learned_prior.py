"""A flow as a learned prior, beside the best rivals that learn from the same tasks.

Tasks are sine waves, y = a sin(b x + c) + .1 noise (``waves``), the sinusoids of Rothfuss et al.
(2021, ``pacoh``), or the resistance of yacht hulls by Froude number (``hulls``, of which a seed
leaves two out; the two last rows of a random order are fresh), seen through a 1-16-1 tanh network.
The noise is known to all. From the training tasks `bf.fit_prior` learns a flow; rivals are
Gaussians and Gaussian mixtures over weights fitted to the same pooled draws, these draws as atoms,
Gaussian processes with a learned constant mean and an RBF or spectral-mixture kernel, and an
attentive neural process; where all tasks are seen at the same inputs also the Gaussian of their
curves, and processes about the mean curve. Choices (components, starts, widths, when to stop) are
made by a tenth of the training tasks, which nothing is fitted to. "The family itself" is the law
that tasks are drawn from: no prior does better on average.

All tasks of a family share a prior, so its atoms are drawn once, their functions kept on the grid
that inputs are points of, and all tasks are weighed at once: log evidence, log predictive density
of 60 fresh rows (LPPD, a row) and coverage of 90% intervals, after 3, 5, 8 and 12 rows. Evidence
from few effective atoms is too low on average: their number is printed beside it. Under the learned
prior, atoms that the first three rows choose are carried on by `bf.update`. Plain priors of tasks
from outside the family are sampled by `bf.SMC`. The learned prior is a map of a few evaluations
distilled from the flow and sharpened; distilled only with ``--steps 0``, the flow itself with
``--evaluations 0``.

What was computed is kept in out/bench_learned_prior and read by the next run. One thread, an hour
a seed by a map of three evaluations and two by the flow. Run:
``python tests/benchmarks/bench_learned_prior.py [--family pacoh] [--seeds 0] [--tasks 100]``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from scipy import stats
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.importance import psis
from bnnflow.transport import (
    Flow,
    FlowMap,
    Solver,
    WeightsVelocity,
    distil,
    fit_gaussian,
    sharpen,
)

OUT = Path("out/bench_learned_prior")
WIDTH, REACH, FRESH = 16, 2.0, 60
GRID = torch.linspace(-REACH, REACH, 241)[:, None]  # inputs are its points
ROWS = 3, 5, 8, 12
FROUDE = 3 + 18 * torch.arange(14)  # the points that are Froude numbers
FOLDS = 11  # of 22 hulls
SOLVER = Solver("midpoint", 4)
FIELD = {"width": 32, "depth": 3, "architecture": "signed"}
STEPS, TRAJECTORIES = 1500, 2**14
RANKED, SCALES = 200, (1.0, 2.0, 4.0)
BLOCK, ATOMS, FLOW_ATOMS = 2**14, 2**20, 2**17
LEAST, KHAT = 25, 0.7  # effective atoms, and k-hat, of a task that counts as done
CHOSEN = 4096  # copies of atoms, by the first rows of a task
RELEVANT, TOP = 14.0, 4096  # nats below the heaviest atom; heaviest atoms that give k-hat
STARTS, COMPONENTS = 4, (1, 2, 4, 8, 16, 32)
JUDGED, PATIENCE, LOOKS = (3, 5, 8, 12), 8, 60  # of a neural process
TEMPERING = bf.SMC(particles=128, moves=2, max_leapfrog=6, ess=0.6)  # through a flow
PLAIN = bf.SMC(particles=256, moves=2, max_leapfrog=16)
T = TypeVar("T")
Functions = Callable[[torch.Generator, int], Tensor]  # (n, grid), drawn from a family


# ---------------------------------------- families of tasks


def wave(g: torch.Generator, n: int, slowest: float = 1.5) -> Tensor:
    a, b, c = torch.rand(3, n, 1, generator=g)
    return (0.5 + a) * torch.sin((slowest + 1.5 * b) * GRID[:, 0] + 2 * math.pi * c)


def faster_wave(g: torch.Generator, n: int) -> Tensor:
    return wave(g, n, slowest=3.0)


def step_function(g: torch.Generator, n: int) -> Tensor:
    height, at = 2 * torch.rand(2, n, 1, generator=g) - 1
    return torch.where(GRID[:, 0] < at, -height, height)


def parabola(g: torch.Generator, n: int) -> Tensor:
    bend, at = 2 * torch.rand(2, n, 1, generator=g) - 1
    return bend * (GRID[:, 0] - at).square() - bend


def pacoh_wave(g: torch.Generator, n: int) -> Tensor:
    """Draw sinusoids of Rothfuss et al. (2021), of x divided by 2.5, as (y - 5) / 2."""
    a = 0.7 + 0.6 * torch.rand(n, 1, generator=g)
    shift, height, slope = torch.randn(3, n, 1, generator=g)
    x = 2.5 * GRID[:, 0]
    waves = a * torch.sin(1.5 * (x - 0.1 * shift))
    return (waves + (0.5 + 0.2 * slope) * x + 0.1 * height) / 2


OTHERS = step_function, parabola, faster_wave


class Tasks(NamedTuple):
    """Rows of many tasks, whose inputs are points of the grid."""

    at: Tensor  # (tasks, rows), numbers of the points
    y: Tensor  # (tasks, rows)

    def first(self, rows: int) -> Tasks:
        return Tasks(self.at[:, :rows], self.y[:, :rows])

    def less(self, mean: Tensor) -> Tasks:
        """Return the same tasks but for a mean ``(grid,)``."""
        return Tasks(self.at, (self.y - mean[self.at]).float())

    @property
    def fresh(self) -> Tasks:
        """The last rows of every task, or all where there are fewer."""
        return Tasks(self.at[:, -FRESH:], self.y[:, -FRESH:])

    def models(self, noise: float, scale: float = 1.0) -> list[bf.BayesianModel]:
        net = nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        given = net, bf.priors.Normal(scale), bf.likelihoods.Gaussian(noise)
        return [
            bf.BayesianModel(*given, GRID[at], y)
            for at, y in zip(self.at, self.y, strict=True)
        ]


def drawn(functions: Functions, noise: float, count: int, rows: int, seed: int) -> Tasks:
    """Draw tasks; the first rows of a task are the same however many there are."""
    at, y = [], []
    for number in range(count):
        g = torch.Generator().manual_seed(1000 * seed + number)
        values = functions(g, 1)[0]
        points = torch.randint(len(GRID), (rows,), generator=g)
        at.append(points)
        y.append(values[points] + noise * torch.randn(rows, generator=g))
    return Tasks(torch.stack(at), torch.stack(y))


@cache
def hulls() -> Tensor:
    """Return the resistance of 22 yacht hulls at 14 Froude numbers, as (sqrt(y) - 2.2) / 2.2,
    ``(22, 14)``.
    """
    data = bf.data.load("yacht")
    assert data.x_scaler is not None
    assert data.y_scaler is not None
    x = data.x_scaler.inverse(torch.cat([data.x_train, data.x_test])).double()
    y = data.y_scaler.inverse(torch.cat([data.y_train, data.y_test]))
    _, hull = (1000 * x[:, :-1]).round().unique(dim=0, return_inverse=True)
    order = (hull + x[:, -1]).argsort()  # Froude numbers are below one
    return ((y[order].clamp(min=0).sqrt() - 2.2) / 2.2).reshape(22, 14).float()


def known_hulls(seed: int, count: int) -> Tasks:
    """Return the hulls of a fold to learn from."""
    curves = torch.stack([each for n, each in enumerate(hulls()) if n % FOLDS != seed])
    return Tasks(FROUDE.expand(count, -1), curves[:count])


def unseen_hulls(seed: int, count: int) -> Tasks:
    """Return the two other hulls, in so many random orders of their rows: the last two of each,
    many times, are the fresh ones.
    """
    g = torch.Generator().manual_seed(seed)
    orders = torch.rand(count, 14, generator=g).argsort(1)
    orders = torch.cat([orders, orders[:, -2:].repeat(1, FRESH // 2 - 1)], 1)
    curves = hulls()[[seed, seed + FOLDS]].repeat_interleave(count // 2, 0)
    return Tasks(FROUDE[orders], curves.gather(1, orders))


def synthetic(functions: Functions, noise: float, rows: int, tasks: int) -> Family:
    """Return a family that is drawn from, of training tasks of so many rows."""
    return Family(
        noise,
        tasks,
        lambda seed, count: drawn(functions, noise, count, rows, seed),
        lambda seed, count: drawn(functions, noise, count, max(ROWS) + FRESH, 100 + seed),
        functions,
    )


class Family(NamedTuple):
    """Tasks that share a prior."""

    noise: float  # standard deviation, known to all
    tasks: int  # to learn from
    known: Callable[[int, int], Tasks]  # by seed, and how many
    unseen: Callable[[int, int], Tasks]
    functions: Functions | None = None  # their law, where it is known


FAMILIES = {
    "waves": synthetic(wave, 0.1, 30, 128),
    "pacoh": synthetic(pacoh_wave, 0.05, 5, 20),
    "hulls": Family(0.02, 20, known_hulls, unseen_hulls),
}


# ---------------------------------------- scores


class Scores(NamedTuple):
    """How a prior does on many tasks, ``(tasks,)``; NaN where it was not asked."""

    evidence: Tensor  # log evidence
    density: Tensor  # (tasks, fresh), log predictive density of every fresh row
    covered: Tensor  # share of the fresh rows inside their intervals of 90%
    ess: Tensor  # effective number of atoms
    khat: Tensor

    @property
    def lppd(self) -> Tensor:
        """Mean log predictive density of a fresh row, of every task."""
        return self.density.mean(1)

    @property
    def failed(self) -> Tensor:
        return (self.ess < LEAST) | (self.khat > KHAT)


def covered(shares: Tensor) -> Tensor:
    """Return the share of the rows that have between 5 and 95% of the predictive law below."""
    return ((shares >= 0.05) & (shares <= 0.95)).double().mean(-1)


def log_likelihoods(f: Tensor, tasks: Tasks, noise: float) -> Tensor:
    """Return the log likelihood of functions on the grid ``(n, grid)`` by all tasks
    ``(n, tasks)``.
    """
    count, rows = tasks.y.shape
    y = torch.zeros(count, len(GRID)).scatter_add_(1, tasks.at, tasks.y)
    hits = torch.zeros(count, len(GRID)).scatter_add_(1, tasks.at, torch.ones(count, rows))
    squares = tasks.y.square().sum(1) - 2 * f @ y.T + f.square() @ hits.T
    return -squares / (2 * noise**2) - rows * math.log(noise * math.sqrt(2 * math.pi))


class Average:
    """Means over the atoms of a prior, gathered block by block."""

    def __init__(self, fresh: Tasks, noise: float) -> None:
        self.fresh, self.noise = fresh, noise
        count = len(fresh.y)
        self.n = 0
        self.log_sum = torch.full((count,), -math.inf, dtype=torch.float64)
        self.log_squares = self.log_sum.clone()
        self.density = torch.full(fresh.y.shape, -math.inf, dtype=torch.float64)
        self.below = self.density.clone()
        self.top = torch.empty(0, count)

    def add(self, values: Tensor, f: Tensor) -> None:
        """Add atoms of log likelihoods ``(n, tasks)`` and functions ``(n, grid)``."""
        self.n += len(f)
        self.top = torch.cat([self.top, values])
        self.top = self.top.topk(min(TOP, len(self.top)), 0).values
        self.log_sum = torch.logaddexp(self.log_sum, values.double().logsumexp(0))
        self.log_squares = torch.logaddexp(
            self.log_squares, (2 * values.double()).logsumexp(0)
        )
        for task, (at, y) in enumerate(zip(*self.fresh, strict=True)):
            kept = (values[:, task] > self.top[0, task] - RELEVANT).nonzero()
            if len(kept):
                log_weights = values[kept, task].double()
                gaps = (y - f[kept, at]) / self.noise
                for total, parts in (
                    (self.density, log_normal(gaps, self.noise)),
                    (self.below, torch.special.log_ndtr(gaps)),
                ):
                    part = (log_weights + parts.double()).logsumexp(0)
                    total[task] = torch.logaddexp(total[task], part)

    def scores(self) -> Scores:
        relative = self.log_sum[:, None]
        khat = [psis(column)[1] for column in self.top.T]
        return Scores(
            self.log_sum - math.log(self.n),
            self.density - relative,
            covered((self.below - relative).exp()),
            (2 * self.log_sum - self.log_squares).exp(),
            torch.tensor(khat),
        )


def log_normal(gaps: Tensor, noise: Tensor | float) -> Tensor:
    """Return the log density of a normal law, given the standardised distance to its mean."""
    log_noise = torch.as_tensor(noise).log()
    return -0.5 * gaps.square() - log_noise - 0.5 * math.log(2 * math.pi)


def by_atoms(
    blocks: Iterable[Tensor],
    tasks: Tasks,
    noise: float,
    sizes: tuple[int, ...] = ROWS,
) -> dict[int, Scores]:
    """Score a prior by its draws, blocks of functions on the grid ``(n, grid)``: the first rows of
    each task are learned from, the last are fresh.
    """
    averages = {rows: Average(tasks.fresh, noise) for rows in sizes}
    for f in blocks:
        for rows, average in averages.items():
            average.add(log_likelihoods(f, tasks.first(rows), noise), f)
    return {rows: average.scores() for rows, average in averages.items()}


def by_tempering(models: Sequence[bf.BayesianModel], fresh: Tasks) -> Scores:
    """Score a prior by particles that go from it to each task's posterior."""
    found = []
    for model, at, y in zip(models, *fresh, strict=True):
        draws = bf.sample(model, PLAIN, chains=1, seed=0, progress=False)
        found.append(score_of(model, draws, Tasks(at[None], y[None])))
    return joined(found)


def score_of(model: bf.BayesianModel, draws: bf.Draws, fresh: Tasks) -> Scores:
    """Score draws of the posterior of one task."""
    assert draws.log_evidence is not None
    (at,), (y,) = fresh
    prediction = bf.predict(model, draws, GRID[at])
    unasked = torch.full((1,), math.nan)
    return Scores(
        torch.tensor(draws.log_evidence[:1], dtype=torch.float64),
        prediction.log_prob(y).double()[None],
        covered(prediction.cdf(y))[None],
        unasked,
        unasked,
    )


# ---------------------------------------- Gaussian processes


class Process(NamedTuple):
    """A Gaussian process with a constant mean and a spectral mixture for its kernel (Wilson & Adams
    2013): of one part of frequency zero, it is the RBF kernel.
    """

    mean: Tensor
    log_weights: Tensor  # (parts,)
    frequencies: Tensor
    log_widths: Tensor

    @classmethod
    def of(cls, raw: Tensor) -> Process:
        """Return the process of some parameters; one part keeps the frequency zero."""
        weights, frequencies, widths = raw[1:].chunk(3)
        if len(weights) == 1:
            frequencies = torch.zeros_like(frequencies)
        return cls(raw[0], weights, frequencies, widths)

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        gaps = (a[..., :, None] - b[..., None, :])[..., None] * 2 * math.pi
        decays = torch.exp(-0.5 * (gaps * self.log_widths.exp()).square())
        waves = torch.cos(gaps * self.frequencies)
        return (self.log_weights.exp() * decays * waves).sum(-1)

    def evidence(self, tasks: Tasks, noise: float) -> Tensor:
        """Return the log evidence of every task."""
        return self._law(tasks, noise).log_prob(tasks.y.double())

    def _law(self, tasks: Tasks, noise: float) -> torch.distributions.MultivariateNormal:
        x = GRID[:, 0].double()[tasks.at]
        covariance = self.covariance(x, x) + noise**2 * torch.eye(x.shape[1]).double()
        mean = self.mean.expand(x.shape)
        return torch.distributions.MultivariateNormal(mean, covariance)

    def scores(self, tasks: Tasks, rows: int, noise: float) -> Scores:
        given, fresh = tasks.first(rows), tasks.at[:, -FRESH:]
        law = self._law(given, noise)
        x, at = (GRID[:, 0].double()[each] for each in (given.at, fresh))
        own = self.log_weights.exp().sum() + noise**2
        return conditioned(
            law, given.y, tasks.y[:, -FRESH:], self.mean, self.covariance(at, x), own
        )


def conditioned(
    law: torch.distributions.MultivariateNormal,
    y: Tensor,
    fresh: Tensor,
    mean: Tensor,
    across: Tensor,
    variance: Tensor,
) -> Scores:
    """Score a Gaussian law of rows ``(tasks, n)`` by fresh rows ``(tasks, m)``, of which mean,
    covariance with the others ``(tasks, m, n)`` and variance are given.
    """
    solved = torch.linalg.solve(
        law.covariance_matrix, torch.cat([(y - law.mean)[..., None], across.mT], -1)
    )
    mean = mean + (across @ solved[..., :1])[..., 0]
    sd = (variance - (across * solved[..., 1:].mT).sum(-1)).sqrt()
    gaps = (fresh - mean) / sd
    unasked = torch.full((len(mean),), math.nan)
    return Scores(
        law.log_prob(y.double()),
        log_normal(gaps, sd),
        covered(torch.special.ndtr(gaps)),
        unasked,
        unasked,
    )


class Curves(NamedTuple):
    """The Gaussian of curves that are all seen at the same points (Ledoit & Wolf 2004)."""

    mean: Tensor  # (grid,)
    covariance: Tensor  # (grid, grid), of what was seen, noise included

    @classmethod
    def of(cls, tasks: Tasks) -> Curves:
        at, fit = tasks.at[0], LedoitWolf().fit(tasks.y.double().numpy())
        mean = torch.zeros(len(GRID), dtype=torch.float64)
        covariance = torch.eye(len(GRID), dtype=torch.float64)
        mean[at] = torch.from_numpy(fit.location_)
        covariance[at[:, None], at] = torch.from_numpy(fit.covariance_)
        return cls(mean, covariance)

    def scores(self, tasks: Tasks, rows: int) -> Scores:
        given, fresh = tasks.first(rows), tasks.at[:, -FRESH:]
        law = torch.distributions.MultivariateNormal(
            self.mean[given.at], self.covariance[given.at[:, :, None], given.at[:, None]]
        )
        across = self.covariance[fresh[:, :, None], given.at[:, None]]
        own = self.covariance.diagonal()[fresh]
        return conditioned(law, given.y, tasks.y[:, -FRESH:], self.mean[fresh], across, own)


def fitted_process(learned: Tasks, judges: Tasks, noise: float, parts: int) -> Process:
    """Return the process of largest evidence: of several starts the best by the judges."""
    found = [climbed(start, learned, noise, parts) for start in range(STARTS)]
    return max(found, key=lambda each: float(each.evidence(judges, noise).mean()))


def climbed(start: int, learned: Tasks, noise: float, parts: int) -> Process:
    """Maximise the evidence from a random start."""
    g = torch.Generator().manual_seed(start)
    frequencies = torch.rand(parts, generator=g) if parts > 1 else torch.zeros(1)
    weights = torch.full((parts,), -math.log(parts))
    widths = -2 + torch.randn(parts, generator=g)
    raw = torch.cat([torch.zeros(1), weights, frequencies, widths])
    raw = raw.double().requires_grad_()
    optimiser = torch.optim.LBFGS([raw], max_iter=80, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -Process.of(raw).evidence(learned, noise).mean()
        value.backward()
        return value

    optimiser.step(loss)
    return Process.of(raw.detach())


# ---------------------------------------- a neural process


class NeuralProcess(nn.Module):
    """An attentive conditional neural process (Garnelo et al. 2018, Kim et al. 2019), whose
    standard deviation is never below the known noise.
    """

    def __init__(self, noise: float, width: int) -> None:
        super().__init__()
        self.noise, self.heads = noise, 4
        self.values = perceptron(2, width, width)
        self.keys, self.queries = perceptron(1, width, width), perceptron(1, width, width)
        self.out = perceptron(2 * width + 1, width, 2)

    def forward(self, x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation at ``at`` ``(tasks, m)``, given rows
        ``(tasks, n)``.
        """
        values = self.values(torch.stack([x, y], -1))
        heads = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.queries(at[..., None]), self.keys(x[..., None]), values)
        )
        seen = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        whole = values.mean(1, keepdim=True).expand(-1, at.shape[1], -1)
        mean, spread = self.out(torch.cat([at[..., None], seen, whole], -1)).unbind(-1)
        sd = (self.noise**2 + nn.functional.softplus(spread).square()).sqrt()
        return mean, sd

    def scores(self, tasks: Tasks, rows: int) -> Scores:
        given, x = tasks.first(rows), GRID[:, 0]
        with torch.no_grad():
            mean, sd = self(x[given.at], given.y, x[tasks.at[:, -FRESH:]])
        gaps = ((tasks.y[:, -FRESH:] - mean) / sd).double()
        unasked = torch.full((len(mean),), math.nan)
        density = log_normal(gaps, sd.double())
        shares = covered(torch.special.ndtr(gaps))
        return Scores(unasked, density, shares, unasked, unasked)


def perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    layers = nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def fitted_neural_process(
    learned: Tasks, judges: Tasks, noise: float, seed: int
) -> NeuralProcess:
    """Train by random subsets of rows, and keep what predicts the judges best: widths, and when to
    stop.
    """
    g = torch.Generator().manual_seed(seed)
    x = GRID[:, 0]
    most = learned.y.shape[1]
    subsets = [  # the same at every look
        (n, torch.rand(judges.y.shape, generator=g).argsort(1)) for n in JUDGED if n < most
    ] * 4
    best, kept = -math.inf, None
    for width in (32, 64):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = NeuralProcess(noise, width)
        optimiser = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-3)
        averaged = torch.optim.swa_utils.AveragedModel(
            net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
        )
        looks = best_look = 0
        own = -math.inf
        while looks - best_look < PATIENCE and looks < LOOKS:
            for _ in range(50):
                n = int(torch.randint(1, min(16, most), (), generator=g))
                tasks = torch.randint(len(learned.y), (16,), generator=g)
                order = torch.rand(16, most, generator=g).argsort(1)
                at, y = (each[tasks].gather(1, order) for each in learned)
                mean, sd = net(x[at[:, :n]], y[:, :n], x[at[:, n:]])
                loss = -log_normal((y[:, n:] - mean) / sd, sd).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                averaged.update_parameters(net)
            looks += 1
            with torch.no_grad():
                total = 0.0
                for n, order in subsets:
                    at, y = (each.gather(1, order) for each in judges)
                    mean, sd = averaged(x[at[:, :n]], y[:, :n], x[at[:, n:]])
                    total += float(log_normal((y[:, n:] - mean) / sd, sd).mean())
            if total > own:
                own, best_look = total, looks
                if total > best:
                    best = total
                    kept = NeuralProcess(noise, width)
                    kept.load_state_dict(averaged.module.state_dict())
    assert kept is not None
    return kept.eval()


def kept(name: str, make: Callable[[], T]) -> T:
    """Return what was computed before, or compute it and keep it."""
    file = OUT / f"{name}.pt"
    if not file.exists():
        torch.save(make(), file)
    return torch.load(file, weights_only=False)


# ---------------------------------------- what is learned from the training tasks


class Mixture(NamedTuple):
    """A mixture of Gaussians over weights."""

    shares: Tensor  # (parts,)
    means: Tensor  # (parts, dim)
    factors: Tensor  # (parts, dim, dim), lower triangles

    def sample(self, n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        part = torch.multinomial(self.shares, n, replacement=True, generator=g)
        noise = torch.randn(n, self.means.shape[1], generator=g)
        theta = torch.empty_like(noise)
        for number in range(len(self.shares)):
            own = part == number
            theta[own] = self.means[number] + noise[own] @ self.factors[number].T
        return theta


def fitted_mixture(aligned: Tensor, judges: Tasks, noise: float, seed: int) -> Mixture:
    """Fit mixtures to aligned draws, and return the one by which the judges' first eight rows are
    likeliest.
    """
    best, found = -math.inf, None
    model = judges.models(noise)[0]
    for parts in COMPONENTS:
        fit = GaussianMixture(parts, reg_covar=1e-3, max_iter=60, random_state=seed)
        fit.fit(aligned.double().numpy())
        covariance = torch.from_numpy(fit.covariances_)
        mixture = Mixture(
            torch.from_numpy(fit.weights_).float(),
            torch.from_numpy(fit.means_).float(),
            torch.linalg.cholesky(covariance).float(),
        )
        rows = min(8, judges.y.shape[1])
        scores = by_atoms(
            functions_of(mixture.sample, 2**17, seed, model), judges, noise, (rows,)
        )
        score = float(scores[rows].evidence.mean())
        print(f"  mixture of {parts}: {score:.2f} nats for the judges", flush=True)
        if score > best:
            best, found = score, mixture
    assert found is not None
    return found


def functions_of(
    sample: Callable[[int, int], Tensor], atoms: int, seed: int, model: bf.BayesianModel
) -> Iterator[Tensor]:
    """Yield the functions on the grid of draws of a prior over weights."""
    with torch.no_grad():
        for number in range(max(1, atoms // BLOCK)):
            theta = sample(min(BLOCK, atoms), 1_000_003 * (seed + 1) + number)
            yield model.outputs(theta, GRID)[..., 0]


Results = dict[str, dict[int, Scores]]  # by prior, then by rows


class Learned(NamedTuple):
    """Training tasks and what is learned from them first."""

    tasks: Tasks
    models: list[bf.BayesianModel]
    draws: list[bf.Draws]  # of each posterior under N(0, 1)
    flow: Flow | FlowMap

    @property
    def pooled(self) -> Tensor:
        return torch.cat([each.theta[:, 3::4].flatten(0, 1) for each in self.draws])


def sample(model: bf.BayesianModel, seed: int) -> bf.Draws:
    """Sample the posterior of a training task."""
    method = bf.HMC(max_leapfrog=128)
    return bf.sample(
        model, method, chains=16, warmup=150, draws=24, seed=seed, progress=False
    )


def learned(name: str, seed: int, count: int, evaluations: int, steps: int) -> Learned:
    """Sample the posteriors of the first training tasks, fit the flow, distil it into a map of so
    many evaluations and sharpen this in so many steps, or read all this; the flow itself for none.
    """
    family, path = FAMILIES[name], OUT / f"{name}-{seed}-{count}"
    tasks = family.known(seed, count)
    models = tasks.models(family.noise)
    draws = []
    started = time.process_time()
    for number, model in enumerate(models):
        file = OUT / f"{name}-{seed}-task{number}.npz"
        if not file.exists():
            sample(model, number).save(file)
        draws.append(bf.Draws.load(file))
    sampled = time.process_time()
    file = path.with_suffix(".npz")
    if not file.exists():
        torch.manual_seed(seed)  # of the field at its start
        velocity = WeightsVelocity(models[0].spec, **FIELD)
        training = bf.Training(steps=STEPS)
        flow = bf.fit_prior(
            models, draws, velocity=velocity, training=training, seed=seed, progress=False
        )
        flow.save(file)
        spent = sampled - started, time.process_time() - sampled
        print("posteriors {:.0f} CPU s, flow {:.0f}".format(*spent), flush=True)
    flow = replace(Flow.load(file, models[0]), solver=SOLVER)
    prior: Flow | FlowMap = flow
    if evaluations:
        prior = kept(
            f"{path.name}-map{evaluations}",
            lambda: distil(
                flow,
                evaluations,
                trajectories=TRAJECTORIES,
                training=bf.Training(steps=STEPS),
                seed=seed,
                progress=False,
            ),
        )
    if steps:
        assert isinstance(prior, FlowMap)
        distilled = prior
        prior = kept(
            f"{path.name}-sharp{evaluations}-{steps}",
            lambda: sharpen(
                distilled,
                flow,
                models,
                draws,
                training=bf.Training(steps=steps, batch_size=128),
                seed=seed,
                progress=False,
            ),
        )
    return Learned(tasks, models, draws, prior)


def rivals(name: str, seed: int, known: Learned, unseen: Tasks) -> Results:
    """Score all priors on unseen tasks."""
    family = FAMILIES[name]
    noise, tasks, model = family.noise, known.tasks, known.models[0]
    most = len(tasks.y) - max(1, len(tasks.y) // 10)
    fitted = Tasks(tasks.at[:most], tasks.y[:most])
    judges = Tasks(tasks.at[most:], tasks.y[most:])

    def atoms(sample: Callable[[int, int], Tensor], count: int) -> dict[int, Scores]:
        return by_atoms(functions_of(sample, count, seed, model), unseen, noise)

    def itself(functions: Functions) -> dict[int, Scores]:
        g = torch.Generator().manual_seed(seed)
        drawn_ones = (functions(g, BLOCK) for _ in range(2 * FLOW_ATOMS // BLOCK))
        return by_atoms(drawn_ones, unseen, noise)

    def process(parts: int, mean: Tensor | None = None) -> dict[int, Scores]:
        given = fitted, judges, unseen
        known, chosen_by, asked = (
            given if mean is None else (one.less(mean) for one in given)
        )
        one = fitted_process(known, chosen_by, noise, parts)
        return {rows: one.scores(asked, rows, noise) for rows in ROWS}

    def tempered() -> dict[int, Scores]:
        return {
            rows: by_tempering(unseen.first(rows).models(noise), unseen.fresh)
            for rows in ROWS
        }

    def neural_process() -> dict[int, Scores]:
        net = fitted_neural_process(fitted, judges, noise, seed)
        return {rows: net.scores(unseen, rows) for rows in ROWS}

    def over_orbits() -> dict[int, Scores]:
        moved = model.spec.random_symmetry(known.pooled, seed, model.symmetries())
        return atoms(fit_gaussian(model, moved, matched=False, seed=0).sample, ATOMS // 4)

    def mixture() -> dict[int, Scores]:
        own = known.pooled.reshape(len(tasks.y), -1, model.dim)
        aligned = torch.as_tensor(bf.align(model, own.flatten(0, 1))).reshape(own.shape)[
            :most
        ]
        return atoms(
            fitted_mixture(aligned.flatten(0, 1), judges, noise, seed).sample, ATOMS
        )

    makers: dict[str, Callable[[], dict[int, Scores]]] = {}
    if family.functions is not None:
        makers["the family itself"] = partial(itself, family.functions)
    makers |= {
        "process, RBF": lambda: process(1),
        "process, spectral mixture": lambda: process(6),
        "neural process": neural_process,
        "N(0, 1)": lambda: atoms(model.sample_prior, ATOMS // 4),
        "its draws as atoms": lambda: atoms(lambda n, _: known.pooled, 1),
        "Gaussian": lambda: atoms(fit_gaussian(model, known.pooled, seed=0).sample, ATOMS),
        "Gaussian over orbits": over_orbits,
        "Gaussian mixture": mixture,
    }
    if bool((tasks.at == tasks.at[0]).all()):  # all were seen at the same points
        curves = Curves.of(tasks)
        makers |= {
            "Gaussian over curves": lambda: {n: curves.scores(unseen, n) for n in ROWS},
            "process, RBF, of what the mean curve leaves": lambda: process(1, curves.mean),
            "process, mixture, of what the mean curve leaves": lambda: process(
                6, curves.mean
            ),
            "N(0, 1), tempered": tempered,
        }
    return {
        title: kept(f"{name}-{seed}-{len(unseen.y)}-{title}", make)
        for title, make in makers.items()
    }


# ---------------------------------------- the learned prior itself


def latent(seed: int, block: int, dim: int) -> Tensor:
    """Return latent points of the learned prior ``(BLOCK, dim)``."""
    g = torch.Generator().manual_seed(1000 * seed + block)
    return torch.randn(BLOCK, dim, generator=g)


def bank_of(known: Learned, stem: str, seed: int) -> Tensor:
    """Return functions of draws of the flow on the grid ``(atoms, grid)``."""
    model = known.models[0]

    def block(number: int) -> Tensor:
        z = latent(seed, number, model.dim)
        with torch.no_grad():
            theta = model.transported(known.flow).weights_of(z)
            return model.outputs(theta, GRID)[..., 0]

    count = FLOW_ATOMS // BLOCK
    return torch.cat(
        [kept(f"{stem}-bank{each}", lambda n=each: block(n)) for each in range(count)]
    )


def carried(
    known: Learned, bank: Tensor, unseen: Tasks, noise: float, seed: int, stem: str
) -> dict[int, Scores]:
    """Score the learned prior beyond three rows: atoms chosen by the first three are carried by
    `bf.update` from each number of rows to the next.
    """
    dim = known.models[0].dim
    points = torch.cat([latent(seed, each, dim) for each in range(len(bank) // BLOCK)])

    def of(task: int) -> dict[int, Scores]:
        own = Tasks(unseen.at[task : task + 1], unseen.y[task : task + 1])
        models = {
            rows: own.first(rows).models(noise)[0].transported(known.flow) for rows in ROWS
        }
        draws = chosen(points, log_likelihoods(bank, own.first(ROWS[0]), noise), models[3])
        found, before = {}, models[ROWS[0]]
        for rows in ROWS[1:]:
            draws = bf.update(
                models[rows], draws, before, TEMPERING, seed=task, progress=False
            )
            before = models[rows]
            found[rows] = score_of(before, draws, own.fresh)
        return found

    each = [
        kept(f"{stem}-carried-{task}", lambda t=task: of(t))
        for task in range(len(unseen.y))
    ]
    return {rows: joined([one[rows] for one in each]) for rows in ROWS[1:]}


def chosen(points: Tensor, values: Tensor, model: bf.BayesianModel) -> bf.Draws:
    """Choose among atoms by their log likelihoods ``(atoms, 1)``, which are the model's."""
    weights = values[:, 0].double()
    total = weights.logsumexp(0)
    g = torch.Generator().manual_seed(0)
    edges = (weights - total).exp().cumsum(0)
    at = (torch.rand(1, generator=g) + torch.arange(CHOSEN)) / CHOSEN
    rows, counts = (
        torch.searchsorted(edges, at.double())
        .clamp(max=len(edges) - 1)
        .unique(return_counts=True)
    )
    theta = points[rows][None]
    with torch.no_grad():
        log_joint = model.log_joint(theta)
    error = float(((2 * weights).logsumexp(0) - 2 * total).exp().sqrt())
    return bf.Draws(
        theta,
        log_joint,
        log_weights=(counts.double() / CHOSEN).log()[None],
        log_evidence=(float(total) - math.log(len(values)), error),
        info={"method": "atoms", "model": model.fingerprint(), "rows": len(model.x)},
    )


def ranks(known: Learned, bank: Tensor, noise: float, seed: int) -> dict[str, float]:
    """Draw tasks of three rows from the learned prior, and test whether the ranks of what was drawn
    are uniform: p of Kolmogorov and Smirnov.
    """
    functions = functions_of(known.flow.sample, RANKED, seed + 500, known.models[0])
    truth = next(functions)
    g = torch.Generator().manual_seed(seed)
    at = torch.randint(len(GRID), (RANKED, 3), generator=g)
    y = truth.gather(1, at) + noise * torch.randn(RANKED, 3, generator=g)
    tasks = Tasks(at, y)
    values = log_likelihoods(bank, tasks, noise)
    weights = values.double().softmax(0)
    own = log_likelihoods(truth, tasks, noise).diagonal()
    found = {"log likelihood": (weights * (values < own)).sum(0)}
    for point in (20, 90, 150, 220):
        below = bank[:, point, None] < truth[:, point]
        found[f"f({float(GRID[point]):.2f})"] = (weights * below).sum(0)
    return {
        name: float(stats.kstest(each.clamp(0, 1).numpy(), "uniform").pvalue)
        for name, each in found.items()
    }


def outside(
    known: Learned, bank: Tensor, noise: float, count: int, stem: str, seed: int
) -> Results:
    """Score priors on eight rows of tasks of other families: the learned one by atoms, plain ones
    by particles.
    """
    found: Results = {}
    for family in OTHERS:
        tasks, title = drawn(family, noise, count, 8 + FRESH, 200 + seed), family.__name__
        found[f"{title}, learned"] = by_atoms(bank.split(BLOCK), tasks, noise, (8,))
        for scale in SCALES:
            models = tasks.first(8).models(noise, scale)
            found[f"{title}, N(0, {scale}^2)"] = kept(
                f"{stem}-{title}-{count}-{scale}",
                lambda models=models, tasks=tasks: {8: by_tempering(models, tasks.fresh)},
            )
    return found


def surprises(
    known: Learned, unseen: Tasks, noise: float, count: int, seed: int
) -> dict[str, Tensor]:
    """Return p-values of eight rows under the learned prior, of tasks of its own family and of
    others.
    """
    families = {"its own family": unseen} | {
        family.__name__: drawn(family, noise, count, 8, 200 + seed) for family in OTHERS
    }
    found = {}
    for title, tasks in families.items():
        models = tasks.first(8).models(noise)[:count]
        found[title] = torch.tensor(
            [bf.predictive.prior_p_value(each.transported(known.flow)) for each in models]
        )
    return found


def averaged(parts: Sequence[Scores], shares: Sequence[float]) -> Tensor:
    """Return the LPPD of every task under several priors, weighed by share and evidence."""
    logs = torch.stack(
        [each.evidence + math.log(share) for each, share in zip(parts, shares, strict=True)]
    )
    logs = logs.log_softmax(0)
    densities = torch.stack([each.density for each in parts])
    return (logs[..., None] + densities).logsumexp(0).mean(1)


# ---------------------------------------- the table


def computed(
    name: str, seed: int, count: int, others: int, evaluations: int, steps: int
) -> dict[str, Any]:
    """Do all of one seed, or read it."""
    family, prior = FAMILIES[name], f"{name}-{seed}"
    if evaluations:
        prior += f"-map{evaluations}" if not steps else f"-sharp{evaluations}-{steps}"
    stem, noise = f"{prior}-{count}", family.noise
    known = learned(name, seed, family.tasks, evaluations, steps)
    unseen = family.unseen(seed, count)
    scores = rivals(name, seed, known, unseen)
    model = known.models[0]
    bank = bank_of(known, prior, seed)
    atoms = by_atoms(bank.split(BLOCK), unseen, noise)
    scores["its own atoms"] = atoms
    scores["flow"] = {3: atoms[3]} | carried(known, bank, unseen, noise, seed, stem)
    result: dict[str, Any] = {"scores": scores}
    result["ranks"] = ranks(known, bank, noise, seed)
    if others:
        few = learned(name, seed, max(2, family.tasks // 4), evaluations, steps)
        gaussian = fit_gaussian(model, few.pooled, seed=0)
        result["few"] = {
            title: kept(
                f"{stem}-few-{title}",
                lambda prior=prior: by_atoms(
                    functions_of(prior.sample, 2**17, seed, model), unseen, noise
                ),
            )
            for title, prior in (("flow", few.flow), ("Gaussian", gaussian))
        }
        result["outside"] = outside(known, bank, noise, others, f"{name}-{seed}", seed)
        result["surprises"] = surprises(known, unseen, noise, others, seed)
    return result


def gap(ours: Tensor, theirs: Tensor) -> str:
    """Return the mean difference of tasks and its standard error."""
    each = ours - theirs
    return f"{float(each.mean()):+.3f} ± {float(each.std()) / len(each) ** 0.5:.3f}"


def joined(parts: Sequence[Scores]) -> Scores:
    return Scores(*(torch.cat(each) for each in zip(*parts, strict=True)))


def show(results: list[dict[str, Any]]) -> None:
    """Print all tables, seeds together."""
    every: Results = {
        name: {
            rows: joined([each["scores"][name][rows] for each in results]) for rows in ROWS
        }
        for name in results[0]["scores"]
    }
    for rows in ROWS:
        flow = every["flow"][rows]
        print(f"\n{rows} rows, {len(flow.evidence)} tasks: the flow's gain")
        for name, by_rows in every.items():
            one = by_rows[rows]
            print(
                f"  {name:26s} evidence {one.evidence.mean():8.3f} "
                f"({gap(flow.evidence, one.evidence)})  LPPD {one.lppd.mean():7.3f} "
                f"({gap(flow.lppd, one.lppd)})  covered {100 * one.covered.mean():.1f}%  "
                f"median ESS {one.ess.median():.0f}, fewer than {LEAST}: "
                f"{int((one.ess < LEAST).sum())}, k-hat > {KHAT}: {int((one.khat > KHAT).sum())}"
            )
    for number, result in enumerate(results):
        print(f"\nseed {number}")
        for rows in ROWS[1:]:
            weighed, moved = (
                result["scores"][each][rows] for each in ("its own atoms", "flow")
            )
            sure = weighed.ess >= LEAST
            apart = (weighed.evidence - moved.evidence)[sure]
            if not len(apart):
                continue
            print(
                f"  evidence at {rows} rows by atoms less by particles, where {LEAST} atoms or "
                f"more are effective ({int(sure.sum())} tasks): mean {apart.mean():+.3f}, largest "
                f"{apart.abs().max():.3f}"
            )
        print("  ranks, p:", {key: round(p, 3) for key, p in result["ranks"].items()})
        if "few" in result:
            flow, gaussian = result["few"].values()
            for rows in ROWS:
                difference = gap(flow[rows].evidence, gaussian[rows].evidence)
                print(f"  learned from few, {rows} rows: flow less Gaussian {difference}")
        if "outside" in result:
            for family in OTHERS:
                show_outside(family.__name__, result["outside"])
            for title, p in result["surprises"].items():
                print(f"  p of {title} at most .01: {int((p <= 0.01).sum())} of {len(p)}")


def show_outside(family: str, found: Results) -> None:
    """Print how much each average with a plain prior loses to the best single one."""
    learned_one = found[f"{family}, learned"][8]
    plain = [found[f"{family}, N(0, {scale}^2)"][8] for scale in SCALES]
    print(f"  {family}: evidence, LPPD of the learned prior", end=" ")
    print(f"{learned_one.evidence.mean():.2f}, {learned_one.lppd.mean():.3f}")
    for scale, one in zip(SCALES, plain, strict=True):
        print(f"    N(0, {scale}^2): {one.evidence.mean():.2f}, {one.lppd.mean():.3f}")
    wide = "all three scales", plain
    single = [(f"N(0, {s}^2)", [one]) for s, one in zip(SCALES, plain, strict=True)]
    for title, parts in [*single, wide]:
        for share in (0.5, 0.1):
            rest = [1 / len(parts)] * len(parts)
            alone = averaged(parts, rest)
            mixed = averaged([learned_one, *parts], [1 - share, *(share * r for r in rest)])
            print(f"    with {title}, share {share}: {gap(mixed, alone)} of that alone")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--family", choices=list(FAMILIES), default="waves")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=100, help="unseen ones")
    parser.add_argument(
        "--evaluations",
        type=int,
        default=3,
        help="of the distilled prior; 0: the flow itself",
    )
    parser.add_argument(
        "--steps", type=int, default=1500, help="of sharpening the distilled prior"
    )
    parser.add_argument("--others", type=int, default=16, help="tasks outside the family")
    given = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in given.seeds:
        results.append(
            computed(
                given.family,
                seed,
                given.tasks,
                given.others,
                given.evaluations,
                given.steps if given.evaluations else 0,
            )
        )
        show(results)


if __name__ == "__main__":
    main()
