"""Where chains and ensembles start: random networks, and a short batched optimisation of all of
them.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bnnflow.arguments import tensor
from bnnflow.method import Run
from bnnflow.model import BayesianModel
from bnnflow.model.priors.conditional import Seen
from bnnflow.optimisers import Adam, cosine
from bnnflow.progress import Steps, progress_bar, until_interrupted
from bnnflow.ranks import ALONE, Ranks
from bnnflow.warn import warn
from bnnflow.weights import WeightSpec

__all__ = [
    "WARM_START",
    "Ascent",
    "Climb",
    "accelerated_ascent",
    "as_start",
    "first_points",
    "maximise",
    "of_divergence",
    "of_interrupt",
    "one_point",
    "random_networks",
    "random_points",
    "starting_points",
]  # fmt: skip

WARM_START = 300
"""Adam steps, one gradient each, that chains without an ``init`` climb."""


def random_points(model: BayesianModel, n: int, generator: torch.Generator) -> Tensor:
    """Draw `random_networks` ``(n, dim)``, with the prior's parameters at their medians."""
    theta = random_networks(model.spec, n, generator, model.dtype)
    own = of_the_prior(model)
    return torch.where(own, model.flat_prior.median, theta) if own.any() else theta


def random_networks(
    spec: WeightSpec, n: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Draw ``(n, dim)`` initial weights, uniform within 1 / sqrt(fan in) as PyTorch's layers do.

    Extras at log 0.1.
    """
    params, fan_in = {}, 1.0
    for name in spec.names:
        shape = spec.shapes[name]
        if name in spec.extras:
            params[name] = torch.full(
                (n, *shape), math.log(0.1), dtype=dtype, device=generator.device
            )
            continue
        fan_in = spec.fan_in(name) or fan_in  # a bias follows its weight
        uniform = torch.rand(
            n, *shape, generator=generator, device=generator.device, dtype=dtype
        )
        params[name] = (2 * uniform - 1) / math.sqrt(fan_in)
    return spec.flatten(params)


def of_the_prior(model: BayesianModel) -> Tensor:
    """Return which coordinates are parameters of the prior, ``(dim,)``."""
    own = torch.zeros(model.dim, dtype=torch.bool, device=model.device)
    for name in model.spec.extras:
        own[model.spec.slices[name]] = name.startswith("prior.")
    return own


class Climb:
    """The log joint density in the coordinates in which networks climb it.

    These are theta, unless the prior has parameters of its own. The density of a scale and its
    weights together has no bound where both go to zero, and a climb would end there, at a network
    that says nothing. It has one where weights are seen as multiples of their scales (non-centred;
    Papaspiliopoulos, Roberts & Skold 2007). A prior without the quantiles for that keeps its
    parameters where they are while weights climb.

    Args:
        model: the posterior.
        free: 1 for coordinates of theta that move and 0 for others, ``(dim,)``; None for all.
    """

    def __init__(self, model: BayesianModel, free: Tensor | None = None) -> None:
        self.model, self._free = model, free
        self._weights = model.flat_prior.weights if free is None else None
        if self._weights is not None and not self._weights.has_quantiles:
            self._weights, self._free = None, (~of_the_prior(model)).to(model.dtype)

    def coordinates(self, theta: Tensor) -> Tensor:
        """Return where a climb from ``theta`` ``(n, dim)`` begins, ``(n, dim)``."""
        return theta.clone() if self._weights is None else self._weights.non_centred(theta)

    def at(self, z: Tensor) -> tuple[Tensor, Seen]:
        """Return theta at coordinates, ``(n, dim)``, and how its density is seen there."""
        return (z, self._as_it_is) if self._weights is None else self._weights.centred(z)

    def theta(self, z: Tensor) -> Tensor:
        """Return theta at coordinates, ``(n, dim)``."""
        return self.at(z)[0]

    def log_joint_and_grad(
        self, z: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the log density and its gradient, of all rows or those chosen."""
        theta, seen = self.at(z)
        chosen = {} if rows is None else {"rows": rows}
        value, grad = self.model.log_joint_and_grad(theta, **chosen)
        return seen(value, grad, self.model.temperature)

    def log_joint(self, z: Tensor) -> Tensor:
        """Return the log density without a gradient, ``(n,)``."""
        theta, seen = self.at(z)
        return seen(
            self.model.log_joint(theta), torch.zeros_like(z), self.model.temperature
        )[0]

    def _as_it_is(
        self, value: Tensor, grad: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        return value, grad if self._free is None else grad * self._free


def maximise(
    model: BayesianModel,
    theta: Tensor,
    steps: int,
    learning_rate: float,
    progress: bool,
    description: str,
) -> Tensor:
    """Return the best points of a whole `accelerated_ascent`, ``(n, dim)``."""
    ascent = accelerated_ascent(model, theta, steps, learning_rate, progress, description)
    if ascent.steps.interrupted:
        raise KeyboardInterrupt
    return ascent.best


class Ascent(NamedTuple):
    """Where a climb of many points has come to."""

    best: Tensor
    """The best points that were seen, ``(n, dim)``."""
    diverged: Tensor
    """Which rows ended more than a nat, and a tenth of what they had gained, below their best,
    ``(n,)``.
    """
    steps: Steps


def accelerated_ascent(
    model: BayesianModel,
    theta: Tensor,
    steps: int,
    learning_rate: float,
    progress: bool,
    description: str,
    free: Tensor | None = None,
) -> Ascent:
    """Climb log_joint from every row of ``theta`` ``(n, dim)`` at once with Adam and a cosine
    schedule.

    A row whose density becomes NaN keeps its best point so far. It climbs in the coordinates of
    `Climb`, to which ``free`` goes. Ctrl-C ends the climb where it is.
    """
    climb, first = Climb(model, free), None
    z = climb.coordinates(theta)
    adam = Adam(z)
    best, best_value = (
        z.clone(),
        torch.full(z.shape[:1], -math.inf, dtype=torch.float64, device=z.device),
    )
    with (
        torch.no_grad(),
        progress_bar(steps, description, progress, "step") as bar,
        until_interrupted() as taken,
    ):
        for step in range(1, steps + 1):
            value, grad = climb.log_joint_and_grad(z)
            first = value if first is None else first
            better = value > best_value
            best = torch.where(better[:, None], z, best)
            best_value = torch.where(better, value, best_value)
            z = adam.step(z, grad, cosine(learning_rate, step, steps))
            taken.done = step
            bar.update()
    with torch.no_grad():
        value = climb.log_joint(z)
        best = climb.theta(torch.where((value > best_value)[:, None], z, best))
    top = torch.maximum(value, best_value)
    gained = top - first if first is not None else torch.zeros_like(top)
    return Ascent(best, ~(value >= top - 1 - 0.1 * gained), taken)


def of_divergence(
    method: object, diverged: Tensor, learning_rate: float | None
) -> dict[str, list[int]]:
    """Return what ``draws.info`` says of members whose training diverged, ``(members,)``, and warn
    of them.
    """
    lost = diverged.nonzero().flatten().tolist()
    if not lost:
        return {}
    rate = (
        "the measured learning rate"
        if learning_rate is None
        else f"learning_rate={learning_rate:g}"
    )
    warn(
        f"{type(method).__name__}: training diverged for {len(lost)} of {len(diverged)} members, "
        f"{lost[:5]}; {rate} is too large for this model, take a tenth of it"
    )
    return {"diverged": lost}


def of_interrupt(method: object, taken: Steps, planned: str) -> dict[str, bool]:
    """Return what ``draws.info`` says of a fit that Ctrl-C ended, and warn of it."""
    if taken.interrupted:
        warn(
            f"interrupted: {type(method).__name__} returns what it has after {taken.done} of "
            f"{planned}"
        )
    return {"interrupted": taken.interrupted}


def as_start(model: BayesianModel, init: Any) -> Tensor | Literal["prior"] | None:
    """Return what the caller calls ``init`` as weights ``(dim,)`` or ``(n, dim)``, or as it is for
    a word or None.

    Raises:
        TypeError: if it is none of a network, a list of networks, weights and a word.
        ValueError: if the networks or the weights do not fit the model, or the word is another one
            than "prior".
    """
    if init is None:
        return None
    if isinstance(init, str):
        if init != "prior":
            raise ValueError(
                f"init must be None, 'prior', a network, several networks or weights, got {init!r}"
            )
        return "prior"
    if isinstance(init, nn.Module) and not isinstance(init, nn.ModuleList):
        return _weights(model, "init", init)
    if isinstance(init, list | tuple | nn.ModuleList) and any(
        isinstance(each, nn.Module) for each in init
    ):
        if not all(isinstance(each, nn.Module) for each in init):
            raise TypeError("init must be networks or weights, got a mixture of both")
        return torch.stack(
            [_weights(model, f"init[{i}]", each) for i, each in enumerate(init)]
        )
    theta = tensor("init", init).to(model.device, model.dtype)
    model.spec.check(theta, "init")
    if theta.dim() not in (1, 2) or len(theta) == 0:
        raise ValueError(f"init must be (dim,) or (n, dim), got {tuple(theta.shape)}")
    return theta


def _weights(model: BayesianModel, name: str, net: nn.Module) -> Tensor:
    try:
        return model.theta_of(net)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def first_points(
    model: BayesianModel,
    init: Tensor | Literal["prior"] | None,
    n: int,
    generator: torch.Generator,
) -> Tensor:
    """Return ``(n, dim)`` points to climb from: random networks, prior draws, or copies of one
    point.

    Where ``init`` has several rows they are the points, whatever their number.

    Raises:
        ValueError: if log_joint is not finite at one of those given.
    """
    if init is None:
        return random_points(model, n, generator)
    if isinstance(init, str):
        return model.sample_prior(n, generator)
    theta = init.clone() if init.dim() == 2 else init.repeat(n, 1)
    _check_density(model, theta, "rows")
    return theta


def one_point(method: object, model: BayesianModel, run: Run) -> Tensor:
    """Return the point ``(dim,)`` that a fit of one density begins at.

    Raises:
        ValueError: if ``init`` has several.
    """
    theta = first_points(model, run.init, 1, run.generator)
    if len(theta) > 1:
        raise ValueError(
            f"{type(method).__name__} begins at one point, but init has {len(theta)}; "
            "give it one of them"
        )
    return theta[0]


def _check_density(model: BayesianModel, theta: Tensor, what: str) -> None:
    bad = (~model.log_joint(theta).isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"log_joint is not finite at the starting point of {what} {bad[:5]}: give another init"
        )


def starting_points(
    model: BayesianModel,
    chains: int,
    init: Tensor | Literal["prior"] | None,
    generator: torch.Generator,
    progress: bool,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return ``(chains, dim)`` starting points.

    Args:
        model: the posterior.
        chains: how many, in this process.
        init: None climbs from random networks for 300 Adam steps; ``"prior"`` takes prior draws;
            ``(dim,)`` weights start every chain there; ``(chains, dim)`` weights, for the chains of
            all processes, are used as they are.
        generator: the source of randomness.
        progress: whether to show a bar.
        ranks: the processes that share the chains.

    Raises:
        ValueError: if ``init`` does not fit, or log_joint is not finite there.
    """
    if isinstance(init, Tensor):
        every = chains * ranks.size
        if init.dim() == 2 and len(init) != every:
            raise ValueError(
                f"init must be (dim,) or ({every}, dim), got {tuple(init.shape)}"
            )
        theta = ranks.own(init.expand(every, -1)).clone()
    elif init is None:
        # Not from prior draws: with learned noise these begin millions of nats below the mode.
        theta = random_points(model, chains, generator)
        theta = maximise(model, theta, WARM_START, 0.02, progress, "warm start")
    else:
        theta = model.sample_prior(chains, generator)
    _check_density(model, theta, "chains")
    return theta
