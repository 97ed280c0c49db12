"""A field that reads the rows of its data, so that one training serves data sets never seen."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from bnnflow.arguments import Count, checked
from bnnflow.model import BayesianModel
from bnnflow.model.likelihoods import Gaussian
from bnnflow.model.transported import TransportedLogJoint
from bnnflow.seeding import isolated
from bnnflow.transport.field import Field
from bnnflow.transport.paths import AffinePath, Coefficients
from bnnflow.transport.shallow import DataSets, Linearised, Shallow, affine_layers
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["AmortisedVelocity", "Read", "data_of", "shallow_of"]

_LONGEST = 2.0  # Gauss-Newton step, in standard deviations of the prior
_LEAST = 0.02  # of s where it divides
_FLOOR = 0.02  # least variance of errors that training resolves, see `Read`
_LARGE = 4.0  # root mean square of a unit's odd channels, which are kept below it


class Read(NamedTuple):
    """What is made of points and their data sets, in the coordinates of `Shallow`.

    The variances are those of E[x1 | x_t] from what it is learned from: of every weight in units of
    s^2, and of the linearised outputs of every row in units of the noise's.
    """

    score: Tensor  # (batch, dim), w with E[x1 | x_t] = mu + s^2 w
    log_variances: Tensor  # (batch, dim)
    row_log_variances: Tensor  # (batch, rows)
    share: Tensor  # (batch, 1), of the control variate in what is learned from
    mean: Tensor  # (batch, dim), mu
    s2: Tensor  # (batch, 1)
    jacobian: Tensor  # (batch, dim, rows), of the outputs in units of the noise
    gain: Tensor  # (batch, dim, rows), J (I + s^2 J^T J)^-1


@checked
class AmortisedVelocity(Field):
    """A velocity that reads its data row by row, for perceptrons of one hidden layer.

    A few Gauss-Newton steps lead to where prior, x_t and data agree. Around this point units and
    rows exchange messages along the units' activations: rows know their residuals and leverages,
    units their weights, how far they moved and how well they are known. What comes out says how far
    the step is trusted, weight by weight, and corrects both the weights and the rows' targets, for
    a last linear solve. Its parameters depend on the number of inputs alone, not on the width of
    the hidden layer, nor on rows or noise. Permuted and mirrored units move equally permuted and
    mirrored weights.

    Untrained it is the field of Gauss-Newton steps.

    Args:
        spec: the meaning of the weights.
        width: channels.
        depth: rounds of messages.
        newton: Gauss-Newton steps.
        path: the path of the pairs.

    Raises:
        ValueError: if the network has not one hidden layer of odd units and one output, or the path
            a sigma; when bound, if the prior is neither normal around zero nor the push-forward of
            a flow with these symmetries, or the likelihood not `Gaussian` of known scale.
    """

    def __init__(
        self,
        spec: WeightSpec,
        width: Count = 32,
        depth: Count = 3,
        *,
        newton: Count = 2,
        path: AffinePath | None = None,
    ) -> None:
        super().__init__()
        inputs = spec.shapes[affine_layers(spec)[0].weight][1]
        of_a_unit = inputs + 2
        labels = frozenset(spec.widths)
        self.symmetries = Symmetries(labels, labels, frozenset())
        self.path = path if path is not None else AffinePath()
        if self.path.sigma:
            raise ValueError("path: an amortised field needs one with sigma = 0")
        self._config = {"width": width, "depth": depth, "newton": newton}
        self._bound: tuple[Shallow, DataSets] | None = None
        self.whole = _perceptron(11, width)
        self.odd = nn.Linear(4 * of_a_unit, width, bias=False)
        self.even = _perceptron(5 * of_a_unit, width)
        self.row = _perceptron(inputs + 6, width)
        self.rounds = nn.ModuleList(_Messages(width) for _ in range(depth))
        self.gate = nn.Linear(width, width)
        self.moves = nn.Linear(width, of_a_unit, bias=False)
        self.trust = nn.Linear(width, of_a_unit)
        self.bias = _perceptron(width, width, 2)
        self.targets = _perceptron(width, width, 1)
        self.unit_variances = _perceptron(width, width, of_a_unit)
        self.row_variances = _perceptron(width, width, 1)
        self.rest = _perceptron(width, width, 2)
        for last in (
            self.moves,
            self.trust,
            self.bias[-1],
            self.targets[-1],
            self.unit_variances[-1],
            self.row_variances[-1],
            self.rest[-1],
        ):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    # ---------------------------------------- as a field

    @property
    def informed(self) -> bool:
        """True."""
        return True

    @property
    def gradients(self) -> int:
        """Systems of equations that an evaluation solves."""
        return self._config["newton"] + 1

    def bind(self, posterior: WhitenedPosterior | None) -> Self:
        """Return the same field, sharing its weights, with the data of another model, or none."""
        other = copy.copy(self)
        other.posterior, other._bound = posterior, None
        if posterior is not None:
            if posterior.source.loc is not None or posterior.source.root is not None:
                raise ValueError(
                    "an amortised field starts from the prior, not from a source"
                )
            other._bound = shallow_of(posterior.model), data_of(posterior)
        return other

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``."""
        if self._bound is None:
            raise RuntimeError("an amortised velocity must be bound to a model first")
        shallow, data = self._bound
        t = t.expand(len(x)).to(x.dtype)
        read = self.read(shallow, t, x[:, shallow.order], data.expand(len(x)))
        c = Coefficients(*(part.unsqueeze(-1) for part in self.path.coefficients(t)))
        score = torch.empty_like(x).index_copy(1, shallow.order, read.score)
        return c.drift * x + c.score_gain * score

    def on(self, spec: WeightSpec) -> Field:
        """Return the field with the same parameters for a hidden layer of another width.

        Raises:
            ValueError: if the networks differ in more than the width.
        """
        with isolated():
            other = AmortisedVelocity(spec, path=self.path, **self._config)
        return self.lent_to(other)

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the module is rebuilt."""
        return {"kind": "amortised", "path": self.path.describe()} | self._config

    # ---------------------------------------- what is learned

    def read(self, shallow: Shallow, t: Tensor, x: Tensor, data: DataSets) -> Read:
        """Read data sets at points.

        Args:
            shallow: the networks.
            t: times, ``(batch,)``.
            x: points in the coordinates of ``shallow``, ``(batch, dim)``.
            data: a data set for each point.
        """
        c = Coefficients(*(part.unsqueeze(-1) for part in self.path.coefficients(t)))
        s2, mean = c.a * c.a / c.q, x * c.b / c.q
        at, near, inverse = self._steps(shallow, mean, s2, data)
        away = at - mean
        aims = near.residuals + times(near.jacobian.mT, away)
        gain = near.jacobian @ inverse
        units, rows, whole = self._features(
            shallow, data, near, s2, mean, at, aims, gain, inverse
        )
        units, rows, whole = self._exchanged(units, rows, whole, near, data)
        odd, even = units
        moves = self.moves(odd * self.gate(even).sigmoid()).flatten(1)
        trust, end = self.trust(even).flatten(1), self.bias(whole)
        moves = torch.cat([moves, end[:, :1]], 1)
        trust = torch.cat([1 + trust, 1 + end[:, 1:]], 1)
        aims = aims + self.targets(rows).squeeze(-1) * data.counted
        variances, share = self.rest(whole).chunk(2, 1)
        variances = torch.cat([self.unit_variances(even).flatten(1), variances], 1)
        curved = s2.square() * near.jacobian.square().sum(1)  # what a line misses of a row
        row_variances = self.row_variances(rows).squeeze(-1) + (0.05 + curved).log()
        return Read(
            trust * times(gain, aims) + moves / (s2.sqrt() + _LEAST),
            _floored(variances),
            _floored(row_variances),
            (share + 2).sigmoid(),
            mean,
            s2,
            near.jacobian,
            gain,
        )

    def _steps(
        self, shallow: Shallow, mean: Tensor, s2: Tensor, data: DataSets
    ) -> tuple[Tensor, Linearised, Tensor]:
        """Return where Gauss-Newton steps lead, the networks there, and (I + s^2 J^T J)^-1."""
        at, scaled = mean, s2.unsqueeze(-1)
        eye = torch.eye(data.x.shape[1], dtype=mean.dtype, device=mean.device)

        def around(at: Tensor) -> tuple[Linearised, Tensor]:
            near = shallow.linearised(at, data)
            system = eye + scaled * (near.jacobian.mT @ near.jacobian)
            return near, torch.linalg.cholesky_ex(system)[0]

        for _ in range(self._config["newton"]):
            near, root = around(at)
            aims = near.residuals + times(near.jacobian.mT, at - mean)
            solved = torch.cholesky_solve(aims.unsqueeze(-1), root).squeeze(-1)
            step = mean + s2 * times(near.jacobian, solved) - at
            length2 = step.square().sum(1, keepdim=True)
            at = at + step / (1 + length2 / _LONGEST**2).sqrt()
        near, root = around(at)
        return at, near, torch.cholesky_inverse(root)

    def _features(
        self,
        shallow: Shallow,
        data: DataSets,
        near: Linearised,
        s2: Tensor,
        mean: Tensor,
        at: Tensor,
        aims: Tensor,
        gain: Tensor,
        inverse: Tensor,
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return channels of units, odd and even ones ``(batch, units, width)``, of rows
        ``(batch, rows, width)`` and of all together ``(batch, width)``.
        """
        s = s2.sqrt()
        score = (at - mean) / (s + _LEAST)
        slope = s * times(near.jacobian, near.residuals)
        known = s2 * (gain * near.jacobian).sum(-1)  # share of each weight's variance
        (mean_u, mean_b), (at_u, at_b), (score_u, score_b) = map(
            shallow.by_unit, (mean, at, score)
        )
        slope_u, known_u = (shallow.by_unit(each)[0] for each in (slope, known))
        count = data.counted.sum(1, keepdim=True)
        chi2 = near.residuals.square().sum(1, keepdim=True)
        whole = self.whole(
            torch.cat(
                [
                    s,
                    (s + 1e-3).log(),
                    data.noise.log(),
                    count.log() / 2,
                    s2,
                    chi2.log1p() / 3,
                    (chi2 / count).log1p(),
                    mean_b,
                    at_b,
                    score_b.asinh(),
                    known[:, -1:],
                ],
                1,
            )
        )
        odd = self.odd(torch.cat([mean_u, at_u, score_u.asinh(), slope_u.asinh()], -1))
        even = self.even(
            torch.cat(
                [
                    at_u.square().log1p(),
                    score_u.square().log1p(),
                    known_u,
                    (at_u * mean_u).asinh(),
                    (score_u * at_u).asinh(),
                ],
                -1,
            )
        )
        rows = self.row(
            torch.cat(
                [
                    data.x,
                    torch.stack(
                        [
                            near.residuals.asinh(),
                            near.outputs.asinh(),
                            data.y.asinh(),
                            1 - inverse.diagonal(dim1=1, dim2=2),  # leverage
                            (aims - near.residuals).asinh(),
                            (s2 * near.jacobian.square().sum(1)).log1p() / 3,
                        ],
                        -1,
                    ),
                ],
                -1,
            )
        )
        rows = (rows + whole.unsqueeze(1)) * data.counted.unsqueeze(-1)
        return (odd, even + whole.unsqueeze(1)), rows, whole

    def _exchanged(
        self,
        units: tuple[Tensor, Tensor],
        rows: Tensor,
        whole: Tensor,
        near: Linearised,
        data: DataSets,
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        counted = data.counted.unsqueeze(-1)
        count = counted.sum(1, keepdim=True)
        odd, even = units
        for messages in self.rounds:
            odd, even, rows, whole = messages(
                odd, even, rows, whole, near.activations, near.slopes, counted, count
            )
        return (odd, even), rows, whole


class _Messages(nn.Module):
    """One round of messages between units, rows and all together."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def linear(bias: bool = False, factor: int = 1) -> nn.Linear:
            return nn.Linear(width, factor * width, bias=bias)

        self.row_norm, self.even_norm, self.whole_norm = (
            nn.LayerNorm(width) for _ in range(3)
        )
        self.row, self.row_of_odd, self.row_of_even = linear(True), linear(), linear()
        self.row_of_whole, self.row_out = linear(), linear(True)
        self.even, self.even_of_rows, self.even_of_mean = linear(True), linear(), linear()
        self.left, self.right = linear(), linear()
        self.even_of_whole, self.even_out = linear(), linear(True)
        self.odd, self.odd_of_rows, self.gates = linear(), linear(), linear(True, 2)
        self.whole, self.whole_of_even, self.whole_of_rows = (
            linear(True),
            linear(),
            linear(),
        )
        self.whole_out = linear(True)

    def forward(
        self,
        odd: Tensor,
        even: Tensor,
        rows: Tensor,
        whole: Tensor,
        activations: Tensor,
        slopes: Tensor,
        counted: Tensor,
        count: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        units = odd.shape[1]
        hidden = (
            self.row(self.row_norm(rows))
            + activations.mT @ self.row_of_odd(odd) / units**0.5
            + slopes.mT @ self.row_of_even(even) / units
            + self.row_of_whole(whole).unsqueeze(1)
        )
        rows = rows + self.row_out(silu(hidden)) * counted
        normed = self.even_norm(even)
        shared = self.even_of_mean(normed.mean(1)) + self.even_of_whole(whole)
        hidden = (
            self.even(normed)
            + slopes @ self.even_of_rows(rows) / count
            + self.left(odd) * self.right(odd)
            + shared.unsqueeze(1)
        )
        even = even + self.even_out(silu(hidden))
        own, heard = self.gates(self.even_norm(even)).sigmoid().chunk(2, -1)
        odd = (
            odd + self.odd(odd) * own + activations @ self.odd_of_rows(rows) / count * heard
        )
        odd = odd / (1 + odd.square().mean(-1, keepdim=True) / _LARGE**2).sqrt()
        hidden = (
            self.whole(self.whole_norm(whole))
            + self.whole_of_even(even.mean(1))
            + self.whole_of_rows(rows.sum(1) / count.squeeze(1))
        )
        return odd, even, rows, whole + self.whole_out(silu(hidden))


def _perceptron(inputs: int, width: int, outputs: int | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs or width)
    )


def times(matrix: Tensor, v: Tensor) -> Tensor:
    """Multiply matrices ``(batch, n, m)`` and vectors ``(batch, m)``."""
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def _floored(log_variances: Tensor) -> Tensor:
    return (log_variances.exp() + _FLOOR).log()


def shallow_of(model: BayesianModel) -> Shallow:
    """Return the network of a model unit by unit.

    Raises:
        ValueError: if the field does not know such a model.
    """
    if model.temperature != 1:
        raise ValueError(f"model must have temperature 1, got {model.temperature}")
    if model.row_weights is not None:
        raise ValueError("model must have no row_weights: an amortised field knows none")
    if not isinstance(model.likelihood, Gaussian) or model.likelihood.scale is None:
        raise ValueError(
            f"model must have likelihoods.Gaussian of a known scale, got {model.likelihood}"
        )
    density = model.density
    if not isinstance(density, TransportedLogJoint):
        return Shallow.of(model.spec, model.flat_prior)
    hidden = frozenset(model.spec.widths)
    if not (model.symmetries().permutation == model.symmetries().sign == hidden):
        raise ValueError(
            "model must have a prior whose flow moves with permuted and mirrored hidden units, "
            'such as a WeightsVelocity of architecture "signed"'
        )
    return Shallow.of(model.spec, model.flat_prior, density.transport)


def data_of(posterior: WhitenedPosterior) -> DataSets:
    """Return the data of a model as one data set."""
    model = posterior.model
    if posterior.rows is not None:
        raise ValueError("an amortised field reads all rows")
    likelihood = model.likelihood
    assert isinstance(likelihood, Gaussian)
    y = model.y.reshape(1, -1)
    noise = torch.full_like(y[:, :1], float(likelihood.scale or 0.0))
    return DataSets(model.x.unsqueeze(0), y, torch.ones_like(y), noise)
