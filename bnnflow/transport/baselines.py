"""Densities fitted to draws by maximum likelihood: what a flow from the prior has to beat at the
same budget.

All work on draws that are matched modulo the symmetries of the network, so that they are unimodal,
in coordinates in which a Gaussian fit to them is N(0, I). The Gaussian is the first baseline, and
where the other two start. Their parameters are those with the highest likelihood of held-out draws
on the way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bnnflow import storage
from bnnflow.arguments import Count, checked
from bnnflow.draws import Draws, as_theta
from bnnflow.gaussian import Gaussian
from bnnflow.method import Sampleable
from bnnflow.model import BayesianModel
from bnnflow.options import Training
from bnnflow.posteriors import (
    CouplingFlow,
    coupling_flow,
    coupling_orders,
    dimension,
    pack,
    unpack,
)
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator, isolated, seed_in_words
from bnnflow.stopwatch import Stopwatch
from bnnflow.symmetry import align
from bnnflow.transport.flow import Flow
from bnnflow.transport.options import Solver
from bnnflow.transport.paths import AffinePath
from bnnflow.transport.solvers import integrate, time_grid
from bnnflow.transport.source import Source
from bnnflow.transport.stored import dtype_of
from bnnflow.transport.two_layer import TwoLayerVelocity
from bnnflow.types import Posterior, Seed
from bnnflow.warn import warn

__all__ = ["TransformedDensity", "fit_cnf", "fit_coupling", "fit_gaussian"]

_LOOK = 25  # optimiser steps between two looks at the held-out draws
_SHRINKAGES = (1e-3, 1e-2, 0.03, 0.1, 0.3)

Given = Draws | Tensor | tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class TransformedDensity(Sampleable):
    """A density in the coordinates of a source, as a density over weights; a `Posterior`.

    Attributes:
        density: over x, the coordinates in which the source is N(0, I).
        source: the coordinates.
        info: how it was fitted.
    """

    density: Posterior
    source: Source
    info: dict[str, Any] = field(default_factory=dict)

    def sample(self, n: int, seed: Seed = 0) -> Tensor:
        """Draw ``(n, dim)``."""
        return self.source.from_normal(self.density.sample(n, seed))

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density, ``(..., dim) -> (...)`` in float64."""
        return self.density.log_prob(
            self.source.to_normal(theta)
        ) + self.source.log_jacobian(theta)

    def save(self, path: str | Path) -> Path:
        """Write density and coordinates to an ``.npz`` file without pickle.

        `bnnflow.load` reads it back.

        Raises:
            ValueError: if the density is not one of `bnnflow.posteriors`.
        """
        tensors: dict[str, Tensor] = {}
        density = pack(self.density, "density", tensors)
        if density is None:
            raise ValueError(
                f"cannot save a {type(self.density).__name__}: it is no density of "
                "bnnflow.posteriors"
            )
        header = {
            "density": density,
            "source": self.source.describe(),
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "info": self.info,
        }
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        return storage.write(
            path, "in-coordinates", 1, header, arrays | self.source.arrays()
        )

    @classmethod
    def load(
        cls, path: str | Path, model: BayesianModel | None = None
    ) -> TransformedDensity:
        """Read a density that ``save`` wrote.

        Args:
            path: the file.
            model: gives a prior with inferred parameters; no other needs it, but it must have the
                file's prior.

        Raises:
            ValueError: if the file holds something else, the model has another prior, or there is
                none to give one.
        """
        with storage.described(path):
            return cls.from_file(*storage.read(path, {"in-coordinates": 1}), model)

    @classmethod
    def from_file(
        cls,
        header: dict[str, Any],
        arrays: dict[str, np.ndarray],
        model: BayesianModel | None,
    ) -> TransformedDensity:
        """Build a density from the contents of a file."""
        if model is not None and model.flat_prior.describe() != header["source"]["prior"]:
            raise ValueError(
                "this density lives in the coordinates of another prior, or of another network's"
            )
        source = Source.from_description(
            header["source"], arrays, dtype_of(header["dtype"]), model
        )
        tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
        density = unpack(header["density"], tensors)
        if dimension(density) != source.dim:
            raise ValueError(
                f"a density over {dimension(density)} coordinates of {source.dim}"
            )
        return cls(density, source, dict(header["info"]))


@checked
def fit_gaussian(
    model: BayesianModel,
    draws: Given,
    *,
    matched: bool = True,
    held_out: Given | None = None,
    seed: Seed = 0,
) -> TransformedDensity:
    """Fit one Gaussian with a full covariance, in the standard normal coordinates of the prior.

    The covariance is shrunk towards its diagonal as much as the held-out draws like best.

    Args:
        model: the posterior.
        draws: from it: `Draws`, weights ``(..., dim)``, or a pair (weights, log weights).
        matched: permute and flip units to a running mean first (`align`). The density is then that
            of one gauge of units: its evidence lacks the logarithm of the order of the group. Draws
            of a network whose symmetries are not known stay as they are, and ``info["symmetries"]``
            says why.
        held_out: draws that are not fitted, best of chains of their own; a tenth of the others if
            None.
        seed: decides which tenth.

    Raises:
        ValueError: if there are less than ten draws, they do not fit the model or are not finite.
    """
    data = _prepare(model, draws, held_out, matched, as_generator(seed, model.device))
    like = data.x
    unit = Gaussian(torch.zeros_like(like[0]), torch.ones_like(like[0]))
    held_out_log_prob = float(unit.log_prob(data.unseen).mean()) + data.log_jacobian
    info = _matching(model, matched) | {
        "shrinkage": data.shrinkage,
        "held_out": held_out_log_prob,
    }
    return TransformedDensity(unit, data.source, info)


@checked
def fit_coupling(
    model: BayesianModel,
    draws: Given,
    *,
    matched: bool = True,
    couplings: Count = 8,
    hidden: Count = 128,
    held_out: Given | None = None,
    training: Training | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> TransformedDensity:
    """Fit a static coupling flow (RealNVP; Dinh et al. 2017) by maximum likelihood of the draws.

    Affine couplings between random halves of the coordinates, then an elementwise scale and shift,
    on top of the Gaussian of `fit_gaussian`, at which it starts.

    Args:
        model: the posterior.
        draws: from it: `Draws`, weights ``(..., dim)``, or a pair (weights, log weights).
        matched: see `fit_gaussian`.
        couplings: number of coupling layers.
        hidden: width of the network in each of them.
        held_out: draws that are not fitted, best of chains of their own; a tenth of the others if
            None.
        training: how long and how fast: by default 120 seconds, with Adam at a learning rate of
            1e-3, which falls when the likelihood of the held-out draws has not gained for
            ``training.patience`` looks, one every 25 steps, and in the last 30%; training ends at
            the fourth time. There is no other optimiser.
        seed: an int or a generator.
        progress: show a bar at a terminal.

    Returns:
        The density; after Ctrl-C as far as it got, with ``info["interrupted"]`` set.

    Raises:
        ValueError: if there are less than ten draws, they do not fit the model or are not finite.
    """
    training = _by_adam(training)
    generator = as_generator(seed, model.device)
    data = _prepare(model, draws, held_out, matched, generator)
    import pyro.distributions as dist

    orders = coupling_orders(model.dim, couplings, generator)
    with isolated(generator):
        layers = coupling_flow(orders, model.dim, hidden).to(data.x)
    base = dist.Normal(torch.zeros_like(data.x[0]), torch.ones_like(data.x[0])).to_event(1)
    flow = dist.TransformedDistribution(base, list(layers))  # type: ignore[arg-type]

    def log_prob(x: Tensor) -> Tensor:
        # Pyro caches the inverse of a tensor, with the parameters of then
        return flow.log_prob(x.clone()).double()

    climb = _Climb(layers, log_prob, log_prob, data, training)
    info = climb.run(generator, progress, "coupling flow")
    fitted = CouplingFlow(
        orders, tuple(parameter.detach().clone() for parameter in layers.parameters())
    )
    info |= _matching(model, matched) | {"seed": seed_in_words(seed)}
    return TransformedDensity(fitted, data.source, info)


@checked
def fit_cnf(
    model: BayesianModel,
    draws: Given,
    *,
    matched: bool = True,
    width: Count = 256,
    solver_steps: Count = 4,
    held_out: Given | None = None,
    training: Training | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> Flow:
    """Fit a continuous normalising flow by maximum likelihood through its differential equation
    (FFJORD).

    A `TwoLayerVelocity` with its closed trace, without the noise of an estimated one (Grathwohl et
    al. 2019), starting at the Gaussian of `fit_gaussian`. The gradient is that of the discretised
    solve (Onken and Ruthotto 2020), whose times are drawn anew at every step, or the field would
    learn errors of one grid that make up for its own. Held-out draws are judged, and the flow runs,
    with four times as many steps.

    Args:
        model: the posterior.
        draws: from it: `Draws`, weights ``(..., dim)``, or a pair (weights, log weights).
        matched: see `fit_gaussian`.
        width: units of each hidden layer of the field.
        solver_steps: Runge-Kutta steps in training.
        held_out: draws that are not fitted, best of chains of their own; a tenth of the others if
            None.
        training: how long and how fast: by default 120 seconds, with Adam at a learning rate of
            1e-3, which falls when the likelihood of the held-out draws has not gained for
            ``training.patience`` looks, one every 25 steps, and in the last 30%; training ends at
            the fourth time. There is no other optimiser.
        seed: an int or a generator.
        progress: show a bar at a terminal.

    Returns:
        The flow; ``info["solver_error"]`` is the mean absolute difference of held-out log densities
        between its steps and twice as many. After Ctrl-C as far as it got, with
        ``info["interrupted"]`` set.

    Raises:
        ValueError: if there are less than ten draws, they do not fit the model or are not finite.
    """
    training = _by_adam(training)
    generator = as_generator(seed, model.device)
    data = _prepare(model, draws, held_out, matched, generator)
    with isolated(generator):
        # On this path the field of a target that equals the source is zero: the flow starts as the
        # identity.
        velocity = TwoLayerVelocity(
            model.dim, width, path=AffinePath("variance_preserving")
        ).to(data.x)

    def log_prob(x: Tensor, grid: Tensor) -> Tensor:
        def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return velocity.closed_divergence(t, state[0])

        start = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        x0, change = integrate(slope, (x, start), grid.flip(0), "rk4")
        return (
            change
            - 0.5 * (x0 * x0).sum(-1, dtype=torch.float64)
            - 0.5 * model.dim * math.log(2 * math.pi)
        )

    def noisy(x: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, solver_steps + 1, dtype=torch.float64, device=x.device)
        shift = (
            torch.rand(
                solver_steps - 1, generator=generator, device=x.device, dtype=torch.float64
            )
            - 0.5
        )
        grid[1:-1] += 0.8 * shift / solver_steps
        return log_prob(x, grid)

    own = time_grid(4 * solver_steps, device=model.device)
    climb = _Climb(velocity, noisy, lambda x: log_prob(x, own), data, training)
    info = climb.run(generator, progress, "continuous flow")
    with torch.no_grad():
        some, finer = data.unseen[:256], time_grid(8 * solver_steps, device=model.device)
        error = (log_prob(some, own) - log_prob(some, finer)).abs().mean()
    info |= _matching(model, matched) | {
        "seed": seed_in_words(seed),
        "solver_error": float(error),
    }
    field = velocity.requires_grad_(False)
    return Flow.of(
        field, model, data.source, solver=Solver("rk4", 4 * solver_steps), info=info
    )


# ---------------------------------------- what they share


class _Data(NamedTuple):
    """Draws in the coordinates in which their Gaussian fit is N(0, I)."""

    x: Tensor  # (n, dim), to fit
    unseen: Tensor  # (m, dim), to judge by
    source: Source
    shrinkage: float
    # mean over the unseen: what log densities over x lack to be those over weights
    log_jacobian: float


def _by_adam(training: Training | None) -> Training:
    """Return how a density is fitted, with the defaults.

    ``ValueError`` for what only fields can be trained with.
    """
    training = training or Training()
    if training.optimiser is not None or training.autocast or training.compile:
        raise ValueError(
            "training: densities are fitted by Adam, and neither by autocast nor compiled"
        )
    return training.with_defaults(1e-3, "adamw")


def _rate(training: Training, count: int, spent: float) -> float:
    """Return the learning rate as a fraction: linear warm-up, constant, then straight to zero in
    the last 30%.
    """
    done = spent / training.budget if training.steps is None else count / training.steps
    return min(1.0, (count + 1) / 50) * min(1.0, max(0.0, 1 - done) / 0.3)


def _matching(model: BayesianModel, matched: bool) -> dict[str, Any]:
    """Return what ``info`` says about matching."""
    if matched and model.spec.unknown:
        return {"matched": False, "symmetries": f"not known: {model.spec.unknown}"}
    return {"matched": matched}


def _prepare(
    model: BayesianModel,
    draws: Given,
    held_out: Given | None,
    matched: bool,
    generator: torch.Generator,
) -> _Data:
    """Check the draws, match them, split them, and fit the Gaussian in whose coordinates they are
    returned.
    """
    matched = _matching(model, matched)["matched"]

    def framed(theta: Tensor, reference: Tensor | None = None) -> Tensor:
        return align(model, theta, reference=reference) if matched else theta  # type: ignore[return-value]

    theta = framed(_equal(model, draws, generator, "draws"))
    if held_out is None:
        order = torch.randperm(len(theta), generator=generator, device=model.device)
        unseen, theta = theta[order].tensor_split([len(theta) // 10])
    else:
        unseen = framed(_equal(model, held_out, generator, "held_out"), theta.mean(0))
    unseen = unseen[:512]
    prior = Source(model.flat_prior)
    z, z_unseen = prior.to_normal(theta).double(), prior.to_normal(unseen).double()

    def likelihood(shrinkage: float) -> float:
        return float(Gaussian.fit(z, shrinkage=shrinkage).log_prob(z_unseen).mean())

    shrinkage = max(_SHRINKAGES, key=likelihood)
    factor = Gaussian.fit(z, shrinkage=shrinkage).scale_tril
    values, vectors = torch.linalg.eigh(factor @ factor.T)
    source = Source(
        model.flat_prior, z.mean(0), vectors * values.clamp(min=1e-12).sqrt() @ vectors.T
    )
    log_jacobian = float(source.log_jacobian(unseen).mean())
    return _Data(
        source.to_normal(theta), source.to_normal(unseen), source, shrinkage, log_jacobian
    )


def _equal(
    model: BayesianModel, draws: Given, generator: torch.Generator, name: str
) -> Tensor:
    """Return checked draws of equal weight, ``(n, dim)``: weighted ones are resampled."""
    theta, log_weights = as_theta(draws, name)
    model.spec.check(theta, name)
    model.check_draws(draws)
    theta = theta.to(model.device, model.dtype)
    bad = int((~theta.isfinite().all(-1)).sum())
    if bad or len(theta) < 10:
        raise ValueError(
            f"{name} must be ten finite draws or more; {bad} of {len(theta)} are NaN or infinite"
        )
    if log_weights is None:
        return theta
    weights = log_weights.double().softmax(0).to(model.device)
    return theta[
        torch.multinomial(weights, len(theta), replacement=True, generator=generator)
    ]


class _Climb:
    """Likelihood training of a density; the parameters that held-out draws like best are kept."""

    def __init__(
        self,
        module: nn.Module,
        log_prob: Callable[[Tensor], Tensor],
        judge: Callable[[Tensor], Tensor],
        data: _Data,
        training: Training,
    ) -> None:
        self.module, self.log_prob, self.judge = module, log_prob, judge
        self.data, self.training = data, training
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        assert training.learning_rate is not None
        self.learning_rate = training.learning_rate
        self.optimiser = torch.optim.Adam(self.parameters, self.learning_rate, foreach=True)
        self.watch = Stopwatch()
        self.count = self.since = self.drops = self.broken = 0
        self.best, self.kept = self.look(), copy.deepcopy(module.state_dict())

    def look(self) -> float:
        """Return the mean log density of the held-out draws, in weight space."""
        with torch.no_grad():
            return float(self.judge(self.data.unseen).mean()) + self.data.log_jacobian

    def run(self, generator: torch.Generator, progress: bool, name: str) -> dict[str, Any]:
        """Climb to the end, and say how it went."""
        interrupted, steps = False, self.training.steps
        with progress_bar(steps, name, progress, "step") as bar:
            try:
                while not self.ended():
                    self.step(generator)
                    bar.update()
                    if self.count % _LOOK == 0 or self.count == steps:
                        value = self.keep_the_best()
                        if not bar.disable:
                            bar.set_postfix(
                                log_prob=f"{value:.2f}", best=f"{self.best:.2f}"
                            )
            except KeyboardInterrupt:
                if self.count == 0:
                    raise
                interrupted = True
                warn(f"interrupted: returning the density after {self.count} steps")
        self.module.load_state_dict(self.kept)
        return {
            "steps": self.count,
            "batch_size": self.training.batch_size,
            "held_out": self.best,
            "shrinkage": self.data.shrinkage,
            "not_finite": self.broken,
            **self.watch.read(),
            "parameters": sum(p.numel() for p in self.parameters),
            "interrupted": interrupted,
        }

    def ended(self) -> bool:
        """Say whether the learning rate fell four times, or steps or budget are used up."""
        if self.drops == 4:
            return True
        if self.training.steps is None:
            return self.watch.seconds > self.training.budget
        return self.count == self.training.steps

    def step(self, generator: torch.Generator) -> None:
        """Take one step of Adam; one whose gradient is not finite is left out."""
        rate = _rate(self.training, self.count, self.watch.seconds)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * 0.3**self.drops * rate
        x, size = self.data.x, self.training.batch_size
        rows = torch.randint(len(x), (size,), generator=generator, device=x.device)
        loss = -self.log_prob(x[rows]).mean()
        self.optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 10.0)
        if bool(norm.isfinite()):
            self.optimiser.step()
        else:
            self.broken += 1
        self.count += 1

    def keep_the_best(self) -> float:
        """Look at the held-out draws; where nothing was gained for long, go back to the best."""
        value = self.look()
        if value > self.best:
            self.best, self.kept, self.since = (
                value,
                copy.deepcopy(self.module.state_dict()),
                0,
            )
        elif self.since + 1 < self.training.patience:
            self.since += 1
        else:
            self.since, self.drops = 0, self.drops + 1
            self.module.load_state_dict(self.kept)
        return value
