"""Amortised posteriors: one training for all data sets that a model could have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bnnflow.arguments import checked, integer, number
from bnnflow.model import BayesianModel
from bnnflow.model.likelihoods import Gaussian
from bnnflow.options import Checkpoint, Training
from bnnflow.ranks import connect
from bnnflow.seeding import as_generator, isolated, seed_in_words
from bnnflow.transport.amortised_velocity import AmortisedVelocity, shallow_of, times
from bnnflow.transport.batches import Reuse
from bnnflow.transport.field import Field
from bnnflow.transport.flow import Flow
from bnnflow.transport.options import Solver
from bnnflow.transport.shallow import DataSets, Shallow
from bnnflow.transport.targets import Units
from bnnflow.transport.times import LogUniformNearEnd
from bnnflow.transport.training import Pairs, Task, run
from bnnflow.types import Seed

__all__ = ["fit_amortised"]

_TRAINING = Training(budget=900)
_SOLVER = Solver("midpoint", 10)  # with eight steps draws are two hundredths too narrow
_TIMES = LogUniformNearEnd(share=0.15)  # near the end targets have hardly any noise
_LAST = 1e-6  # least factor of x0 that is divided by
_MOST = 40.0  # of a squared error over its variance, for the gradient of that variance
# times its usual error a point may be off: what lies beyond, where steps led astray, would
# outweigh a batch
_OUTLIER = 40.0
_NEAR = 0.01  # of s where errors are divided by it


@checked
def fit_amortised(
    model: BayesianModel,
    *,
    rows: Sequence[int] = (10, 40),
    noise: Sequence[float] | None = None,
    widths: Sequence[int] | None = None,
    velocity: AmortisedVelocity | None = None,
    training: Training | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> Flow:
    """Train one flow for the posteriors of all data sets that a model could have.

    Weights are drawn from the prior, inputs from those of the model, targets from the likelihood:
    the weights are then an exact draw of the posterior of these data, so that training needs no
    chains and never sees a pair twice. `Flow.bind` gives the posterior of a data set; `refine`
    brings its draws nearer, `correct` weighs them.

    The posterior's gradient and the symmetries of hidden units take most noise from what is learned
    (see `PosteriorTargets`), and errors count in units of what is known at each point, so that
    directions on which the data decide are learned as well as the others.

    Args:
        model: a perceptron of one hidden layer of odd units, such as tanh, with a normal prior and
            a `Gaussian` likelihood of known scale. Its ``x`` are the inputs that data sets have
            some of; its ``y`` are not looked at. With a learned prior (`BayesianModel.transported`)
            an evaluation goes back through its flow once for every row, which is most of its cost.
        rows: the fewest and the most rows of a data set; about a hundred at most, as their number
            to the third is what an evaluation costs.
        noise: the least and the largest standard deviation of noise, log-uniform in between; the
            model's own if None.
        widths: of hidden layers, drawn from for every step; the model's own if None. The prior is
            then that of a model of such a width.
        velocity: a field to train on; a new one if None.
        training: a quarter of an hour if None.
        checkpoint: a file that keeps the state of training; see `bnnflow.transport.train`.
        seed: an int or a generator.
        progress: show a bar at a terminal.

    Returns:
        The flow, bound to ``model``. ``info`` has the ranges that it was trained for.

    Raises:
        ValueError: before any work, if the model is another one or a range is none.

    Source: simulation-based inference by flow matching (Wildberger et al. 2023), with the
    likelihood in the field.

    Example:
        >>> from bnnflow import BayesianModel, likelihoods, priors, sample
        >>> x = torch.linspace(-2, 2, 100)[:, None]
        >>> net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> model = BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), x, x[:, 0])
        >>> flow = fit_amortised(model, training=Training(steps=2), progress=False)
        >>> data = model.subset(torch.tensor([10, 40, 55, 80]))
        >>> sample(data, flow.bind(data), draws=20, seed=0).theta.shape
        torch.Size([1, 20, 13])
    """
    training = (training or _TRAINING).with_defaults(3e-3, "muon")
    if training.autocast or training.compile:
        raise ValueError("training: an amortised field is neither autocast nor compiled")
    own = shallow_of(model)
    simulated = _Simulated(
        _networks(model, own, widths),
        model.x.reshape(len(model.x), -1),
        _rows(rows),
        _noise(noise, model),
    )
    ranks = connect(model.device)
    generator = as_generator(seed, model.device)
    if velocity is None:
        with isolated(generator):
            field: Field = AmortisedVelocity(model.spec).to(model.device, model.dtype)
    else:
        field = velocity.on(model.spec).to(model.device, model.dtype).requires_grad_()
    told = {
        "rows": list(simulated.rows),
        "noise": list(simulated.noise),
        "widths": sorted(each.units for each in simulated.networks.values()),
    }
    identity = told | {"model": model.fingerprint()}
    ranks.check_same(identity | {"training": training}, model.device)
    task = _Simulations(field, simulated, None, _TIMES, Reuse(), None)
    info = run(
        task, training, checkpoint, generator, progress, ranks=ranks, identity=identity
    )
    info |= told | {"seed": seed_in_words(seed), "targets": "posterior"}
    return Flow.of(field, model, solver=_SOLVER, info=info)


@dataclass(frozen=True, eq=False)
class _Simulated:
    """Pairs of source and posterior draws, each with the data of its posterior.

    Attributes:
        networks: by the length of their weight vectors; one is drawn for every batch.
        inputs: that data sets have some of, ``(n, inputs)``.
        rows: fewest and most of a data set.
        noise: least and largest standard deviation.
    """

    networks: dict[int, Shallow]
    inputs: Tensor
    rows: tuple[int, int]
    noise: tuple[float, float]

    def __call__(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw x0 and x1, ``(n, dim)`` both, and the parts of `DataSets`."""
        like = {"device": self.inputs.device, "dtype": self.inputs.dtype}

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, **like)

        def whole(low: int, high: int, *shape: int) -> Tensor:
            device = self.inputs.device
            return torch.randint(low, high, shape, generator=generator, device=device)

        networks = list(self.networks.values())
        network = networks[int(whole(0, len(networks), 1))]
        x0, x1 = normal(n, network.dim), normal(n, network.dim)
        most = self.rows[1]
        counted = torch.arange(most, device=x0.device) < whole(self.rows[0], most + 1, n, 1)
        x = self.inputs[whole(0, len(self.inputs), n, most)]
        low, high = self.noise
        u = torch.rand(n, 1, generator=generator, **like)
        noise = low * (high / low) ** u
        y = network.outputs(x1, x) + noise * normal(n, most)
        counts = counted.to(y.dtype)
        return x0, x1, x, y * counts, counts, noise


class _Simulations(Task):
    """Training of an amortised field on simulated data sets."""

    @property
    def simulated(self) -> _Simulated:
        """What the pairs are drawn by."""
        assert isinstance(self.pairs, _Simulated)
        return self.pairs

    def batch(self, n: int, pairs: Pairs, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw times ``(n,)``, the means of x1 and of its likelihood's gradient over the orders and
        signs of units ``(n, 2, dim)``, points ``(n, dim)`` and data sets.
        """
        x0, x1, *parts = pairs(n, generator)
        t = self.times.sample(n, x0, generator)
        c = self.field.path.coefficients(t.unsqueeze(-1))
        x_t = c.a * x0 + c.b * x1
        network, data = self.simulated.networks[x1.shape[1]], DataSets(*parts)
        near = network.linearised(x1, data)
        grad = times(near.jacobian, near.residuals)
        values = torch.stack([x1, grad])
        tilt = x_t * c.b / c.a.clamp(min=_LAST).square()
        means, _ = _units(network, x1.device).average(tilt, values, generator)
        return t, means.movedim(0, 1), x_t, *parts

    def check(self, t: Tensor, *given: Tensor) -> bool:
        """Return False: the field is known, and draws no random numbers."""
        return False

    def errors(
        self, call: Callable[..., Tensor], t: Tensor, target: Tensor, *given: Tensor
    ) -> Tensor:
        """Return the squared errors of E[x1 | x_t] over their variances, and minus the log
        likelihood of these variances, ``(n,)``.

        What is learned from is x1 less a share of (I / s^2 + J J^T)^-1 (grad of the log density of
        x1 given x_t and the data), which has mean zero (Stein's identity). Any share does, so the
        field learns the one of the least variance. Variances of weights and rows only weigh the
        errors: a mean is not moved by weights that depend on x_t and the data alone.
        """
        x_t, *parts = given
        data, network = DataSets(*parts), self.simulated.networks[x_t.shape[1]]
        assert isinstance(self.field, AmortisedVelocity)
        read = self.field.read(network, t, x_t, data)
        x1, grad = target.unbind(1)
        control = x1 - read.mean - read.s2 * grad
        control = control - read.s2 * times(read.gain, times(read.jacobian.mT, control))
        learned_from = x1 - read.share * control
        found = read.mean + read.s2 * read.score
        size = (read.s2.sqrt() + _NEAR).square()
        weights = (-read.log_variances.detach()).exp() / size
        row_weights = (-read.row_log_variances.detach()).exp() * data.counted
        most = _OUTLIER * (x_t.shape[1] + data.counted.sum(1))

        def distance(error: Tensor) -> Tensor:
            rows = times(read.jacobian.mT, error)
            total = (error.square() * weights).sum(1) + (rows.square() * row_weights).sum(1)
            return torch.minimum(total, most)

        own = distance(learned_from.detach() - found)
        of_share = distance(learned_from - found.detach())
        error = (learned_from - found).detach()
        rows = times(read.jacobian.mT, error)
        fit = _deviance(error.square() / size, read.log_variances).sum(1)
        row_fit = _deviance(rows.square(), read.row_log_variances) * data.counted
        return (own + of_share + fit + row_fit.sum(1)) / 2

    def weighting(self, t: Tensor) -> Tensor:
        """Return ones: errors are in units of what is known."""
        return torch.ones_like(t)


def _deviance(squares: Tensor, log_variances: Tensor) -> Tensor:
    """Return twice minus the log likelihood of variances, up to a constant."""
    return (squares * (-log_variances).exp()).clamp(max=_MOST) + log_variances


def _units(network: Shallow, device: torch.device) -> Units:
    places = torch.arange(network.dim - 1, device=device).view(network.units, -1)
    return Units(places, places[:, :0], permuted=True)


# ---------------------------------------- what is given


def _networks(
    model: BayesianModel, own: Shallow, widths: Sequence[int] | None
) -> dict[int, Shallow]:
    """Return the networks that are simulated, by the length of their weight vectors."""
    if widths is None:
        return {own.dim: own}
    if model.is_transported:
        raise ValueError("widths: a learned prior is one of networks of one width")
    if isinstance(widths, str) or not len(widths):
        raise ValueError(f"widths must be some numbers of hidden units, got {widths!r}")
    found = {}
    for width in widths:
        units = integer("widths", width, least=1)
        with isolated():
            net = nn.Sequential(
                nn.Linear(own.inputs, units), nn.Tanh(), nn.Linear(units, 1)
            ).to(model.device, model.dtype)
        other = BayesianModel(net, model.prior, model.likelihood, model.x, model.y)
        shallow = replace(shallow_of(other), activation=own.activation)
        found[shallow.dim] = shallow
    return found


def _rows(rows: Sequence[int]) -> tuple[int, int]:
    low, high = _two("rows", rows)
    low, high = integer("rows", low, least=1), integer("rows", high, least=1)
    if low > high:
        raise ValueError(f"rows must be the fewest and the most, got {tuple(rows)}")
    return low, high


def _noise(noise: Sequence[float] | None, model: BayesianModel) -> tuple[float, float]:
    likelihood = model.likelihood
    assert isinstance(likelihood, Gaussian)
    assert likelihood.scale is not None
    if noise is None:
        return likelihood.scale, likelihood.scale
    low, high = (number("noise", each, above=0) for each in _two("noise", noise))
    if low > high:
        raise ValueError(f"noise must be the least and the largest, got {tuple(noise)}")
    return low, high


def _two(name: str, values: Sequence) -> tuple:
    if isinstance(values, str) or len(values) != 2:
        raise ValueError(f"{name} must be two numbers, got {values!r}")
    return tuple(values)
