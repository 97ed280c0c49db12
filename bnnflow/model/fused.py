"""The log densities of perceptrons with their gradients, by the compiled library.

Chains are computed one by one, so results do not depend on the number of threads
(``torch.get_num_threads()``). Where there is no library (`bnnflow.compiled`), or something tracks
derivatives, the caller evaluates with torch instead.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnnflow.activations import Activation
from bnnflow.compiled import is_untracked_cpu, key_of, library
from bnnflow.dynamics import Point, Scheme
from bnnflow.model.likelihood import Likelihood
from bnnflow.model.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    HeteroscedasticStudentT,
    NegativeBinomial,
    Ordinal,
    Poisson,
    StudentT,
)
from bnnflow.model.likelihoods.shared import student_constant
from bnnflow.model.likelihoods.transformed import reduced
from bnnflow.model.priors import FlatPrior
from bnnflow.model.priors.log_scales import Shared
from bnnflow.model.priors.marginals import Marginal, rebuild
from bnnflow.weights import WeightSpec

__all__ = ["FusedDensity", "FusedNetwork"]

_ACTIVATIONS = {
    "identity": 0,
    "tanh": 1,
    "sigmoid": 2,
    "relu": 3,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
    "sin": 7,
}
_GIVEN_SCORE = 0
_LIKELIHOODS: dict[type, int] = {
    Gaussian: 1,
    HeteroscedasticGaussian: 2,
    Categorical: 3,
    Bernoulli: 4,
    StudentT: 5,
    Poisson: 6,
    NegativeBinomial: 7,
    Ordinal: 8,
    HeteroscedasticStudentT: 9,
}
# under a negative binomial law, where each whole number up to it costs a logarithm
LARGEST_COUNT = 10_000
# The families of the prior by the coordinate being the logarithm of a variable, and its name.
_FAMILIES = {
    (False, "Normal"): 0,
    (True, "LogNormal"): 0,
    (True, "HalfNormal"): 1,
    (False, "Laplace"): 2,
    (False, "StudentT"): 3,
    (False, "Cauchy"): 3,  # of one degree of freedom
    (True, "HalfCauchy"): 4,
    (True, "Gamma"): 5,
    (True, "InverseGamma"): 5,
    (True, "Exponential"): 5,
}
# Wider layers are left to torch, whose matrix products are blocked for the caches. Measured in us a
# gradient, compiled against torch, 500 rows, float32: 30-128-128-1 730 and 1140, 30-256-256-1 2650
# and 4520, 784-50-10 1180 and 1120, 30-512-512-1 14200 and 11400.
WIDEST = 256
# Multiplications that are worth a thread: about 400 us of work, where starting one takes 60.
_WORK_OF_A_THREAD = 4_000_000
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int64


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("inputs", "outputs", "weight", "bias", "activation")),
        ("frequency", ctypes.c_double),
    ]


class _Prior(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("start", "stop", "family")),
        *((name, _Pointer) for name in ("loc", "inverse_scale", "df")),
        ("constant", ctypes.c_double),
    ]


class _Scale(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("global", "local", "slab")),
        ("offset", ctypes.c_double),
        ("weights", _Int),
    ]


class _Run(ctypes.Structure):
    _fields_ = [(name, _Int) for name in ("start", "stop", "scale")]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("n_layers", "n_priors", "dim")),
        ("layers", ctypes.POINTER(_Layer)),
        ("priors", ctypes.POINTER(_Prior)),
        *(
            (name, _Int)
            for name in ("likelihood", "n_targets", "n_classes", "weighted", "learned")
        ),
        *((name, ctypes.c_double) for name in ("scale", "df", "log_slope")),
        *((name, _Int) for name in ("n_scales", "n_runs")),
        ("scales", ctypes.POINTER(_Scale)),
        ("runs", ctypes.POINTER(_Run)),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("chains", "n", "n_data", "threads", "drawn")),
        ("key", ctypes.c_uint64),
        *((name, _Int) for name in ("theta_stride", "x_stride", "y_stride", "rows_stride")),
        *((name, _Pointer) for name in ("theta", "x", "y", "score", "rows")),
        ("weights", _Pointer),
        ("weights_stride", _Int),
        *((name, _Pointer) for name in ("value", "grad", "outputs")),
    ]


class _Dynamics(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("microcanonical", "steps", "drifts")),
        *((name, _Pointer) for name in ("kick", "drift")),
        *((f"{name}_stride", _Int) for name in ("kick", "drift", "time", "scale")),
        *((name, _Pointer) for name in ("time", "scale", "theta", "velocity", "error")),
        ("keys", ctypes.POINTER(_Int)),
        ("share", ctypes.c_double),
    ]


class FusedNetwork:
    """The outputs of a perceptron and their pullback, for many weight vectors.

    Args:
        spec: the layout of ``theta``.
    """

    def __init__(self, spec: WeightSpec) -> None:
        self._spec = spec
        self._network_dim = spec.network.dim
        self._layers = _layers(spec)
        self._problem = _problem(self._layers, self._network_dim)
        self._problem.likelihood = _GIVEN_SCORE

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it was built from: addresses mean nothing elsewhere."""
        return type(self), (self._spec,)

    def applies(self, theta: Tensor, x: Tensor) -> bool:
        """Say whether these weights and inputs can be evaluated here."""
        return (
            _supported(self._spec)
            and theta.dtype == x.dtype
            and is_untracked_cpu(theta, x)
            and library(theta.dtype) is not None
        )

    def outputs(self, theta: Tensor, x: Tensor, per_network: bool) -> Tensor:
        """Return the outputs, ``(batch, n, out)``."""
        return self._run(theta, x, per_network, None).mT

    def vjp(
        self, theta: Tensor, x: Tensor, per_network: bool, grad_outputs: Tensor
    ) -> Tensor:
        """Carry a gradient by the outputs ``(batch, n, out)`` back to the weights,
        ``(batch, network dim)``.
        """
        return self._run(theta, x, per_network, grad_outputs.mT.contiguous())

    def squared_error(
        self, theta: Tensor, x: Tensor, y: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return half the sum of squared errors and its gradient.

        See `ChainNetwork.squared_error`.
        """
        theta, x, y = _strided(theta), x.contiguous(), y.contiguous()
        n, targets = y.shape[1:]
        rows = None if rows is None else rows.contiguous()
        used = n if rows is None else len(rows)
        value = theta.new_empty(len(theta), dtype=torch.float64)
        # One number more than the gradients have: the address of nothing is null, which means that
        # none are wanted.
        room = theta.new_empty(len(theta) * self._network_dim + 1)
        grad = room[:-1].view(len(theta), self._network_dim)
        problem = _problem(self._layers, self._network_dim)
        problem.likelihood, problem.n_targets, problem.scale = (
            _LIKELIHOODS[Gaussian],
            targets,
            1.0,
        )
        call = _Call(
            len(theta),
            used,
            n,
            threads_for(len(theta) * used * self._network_dim),
            0,
            0,
            theta.stride(0),
            0,
            y.stride(0),
            0,
            theta.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            None,
            None if rows is None else rows.data_ptr(),
            weights_of(-1.0, 0.0).data_ptr(),
            0,
            value.data_ptr(),
            room.data_ptr(),
            None,
        )
        _evaluate(theta.dtype, problem, call)
        # a perfect fit may round below
        return (value - used * targets * _HALF_LOG_2PI).clamp_(min=0.0), grad

    def _run(
        self, theta: Tensor, x: Tensor, per_network: bool, score: Tensor | None
    ) -> Tensor:
        theta, x = _strided(theta), x.flatten(2 if per_network else 1).contiguous()
        n, batch = x.shape[-2], len(theta)
        if x.shape[-1] != self._layers[0].inputs or (per_network and len(x) != batch):
            raise RuntimeError(
                f"inputs {tuple(x.shape)} do not fit {self._layers[0].inputs} features of {batch} "
                "networks"
            )
        shape = (
            (batch, self._network_dim)
            if score is not None
            else (batch, self._layers[-1].outputs, n)
        )
        result = theta.new_empty(shape)
        value = theta.new_empty(batch, dtype=torch.float64)
        call = _Call(
            batch,
            n,
            n,
            threads_for(batch * n * self._network_dim),
            0,
            0,
            theta.stride(0),
            x.stride(0) if per_network else 0,
            0,
            0,
            theta.data_ptr(),
            x.data_ptr(),
            None,
            None if score is None else score.data_ptr(),
            None,
            weights_of(1.0, 0.0).data_ptr(),
            0,
            value.data_ptr(),
            *((None, result.data_ptr()) if score is None else (result.data_ptr(), None)),
        )
        _evaluate(theta.dtype, self._problem, call)
        return result


class FusedDensity:
    """The log density of a perceptron's weights given data, with its gradient.

    Args:
        spec: the layout of ``theta``, likelihood parameters included.
        likelihood: one of this package's, or one of these in other units.
        prior: computed here if all of it is of a family in `_FAMILIES`, or normal around zero with
            scales of known `Shared` parameters; by torch otherwise.
        x: inputs, ``(n, ...)``.
        y: targets, as the likelihood validated them.
    """

    def __init__(
        self,
        spec: WeightSpec,
        likelihood: Likelihood,
        prior: FlatPrior,
        x: Tensor,
        y: Tensor,
    ) -> None:
        self._arguments = (spec, likelihood, prior, x, y)
        self._dim = spec.dim
        self._x = x.flatten(1).contiguous()
        likelihood, y, log_slope, row_weights = reduced(likelihood, y)
        columns = _columns(likelihood, y).to(x.dtype)
        counted = float(len(y)) if row_weights is None else float(row_weights.sum())
        if row_weights is not None:
            columns = torch.cat([columns, row_weights.to(x.dtype)[:, None]], 1)
        self._y = columns.contiguous()
        self._layers = _layers(spec)
        shared = None if prior.weights is None else prior.weights.shared
        ours = all(
            (each.log, type(each.distribution).__name__) in _FAMILIES
            for each in prior.marginals
        )
        ours = ours and (prior.weights is None or shared is not None)
        self.added_prior = None if ours else prior
        self._kept = [_prior(each, x.dtype) for each in prior.marginals] if ours else []
        self._priors = (_Prior * len(self._kept))(*(struct for struct, *_ in self._kept))
        problem = _problem(self._layers, spec.dim)
        if ours and shared is not None:
            self._scales, self._runs = _scales(shared), _runs(shared)
            problem.n_scales, problem.scales = len(self._scales), self._scales
            problem.n_runs, problem.runs = len(self._runs), self._runs
        problem.n_priors, problem.priors = len(self._priors), self._priors
        problem.log_slope = log_slope / counted  # of a row, on average
        problem.likelihood = _LIKELIHOODS[type(likelihood)]
        problem.weighted = int(row_weights is not None)
        problem.n_targets = self._y.shape[1] - problem.weighted
        learned = [f"likelihood.log_{name}" for name in likelihood.parameters]
        problem.learned = spec.slices[learned[0]].start if learned else -1
        if isinstance(likelihood, HeteroscedasticGaussian | HeteroscedasticStudentT):
            problem.scale = likelihood.min_scale
        elif isinstance(likelihood, NegativeBinomial):
            problem.scale = likelihood.dispersion or 1.0
        elif isinstance(likelihood, Ordinal):
            problem.n_classes = likelihood.n_classes
        elif isinstance(likelihood, Gaussian | StudentT):
            problem.scale = likelihood.scale or 1.0
        if isinstance(likelihood, StudentT | HeteroscedasticStudentT):
            problem.df = likelihood.df or 0.0
        self._problem = problem

    @classmethod
    def of(
        cls,
        spec: WeightSpec,
        likelihood: Likelihood,
        prior: FlatPrior,
        x: Tensor,
        y: Tensor,
    ) -> FusedDensity | None:
        """Return the compiled density, or None if the network, the likelihood or the machine does
        not allow it.
        """
        compiled, simple, *_ = reduced(likelihood, y)
        fits = (
            spec.layers
            and _supported(spec)
            and type(compiled) in _LIKELIHOODS
            and x.device.type == "cpu"
        )
        fits = fits and not (
            isinstance(compiled, NegativeBinomial) and bool((simple > LARGEST_COUNT).any())
        )
        learned = [spec.shapes[f"likelihood.log_{name}"] for name in compiled.parameters]
        # one for all targets
        fits = fits and (isinstance(compiled, Ordinal) or learned in ([], [(1,)]))
        return cls(spec, likelihood, prior, x, y) if fits and library(x.dtype) else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it was built from: addresses mean nothing elsewhere."""
        return type(self), self._arguments

    def __call__(
        self, theta: Tensor, rows: Tensor | None, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a weighted sum of log likelihood and log prior, and its gradient.

        Args:
            theta: ``(..., dim)``.
            rows: int64 indices of rows of data, ``(batch,)`` or ``(networks, batch)``; all of them
                if None.
            weights: of the log likelihood and of the log prior; see `weights_of`.

        Raises:
            IndexError: if a row does not exist.
        """
        if rows is None:
            return self._run(theta, len(self._x), weights)
        rows = rows.contiguous()
        stride = rows.shape[-1] if rows.dim() > 1 else 0
        return self._run(theta, rows.shape[-1], weights, rows.data_ptr(), stride)

    def minibatch(
        self,
        theta: Tensor,
        generator: torch.Generator,
        batch_size: int,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the same from rows of `stratified_rows`, which nobody sees, for every network its
        own.
        """
        return self._run(theta, batch_size, weights, drawn=1, key=key_of(generator))

    def follow(
        self,
        point: Point,
        time: Tensor,
        scale: Tensor,
        scheme: Scheme,
        weights: Tensor,
        *,
        microcanonical: bool = False,
        keys: Sequence[int] | None = None,
        share: float = 0.0,
    ) -> tuple[Point, Tensor]:
        """Let chains follow dynamics in a weighted sum of log likelihood and log prior: what
        `bnnflow.dynamics` says, without torch.

        Args:
            point: where they are; all of it in the model's type.
            time: of a step, one for all or ``(chain, 1)``.
            scale: ``(dim,)`` or ``(chain, dim)``.
            scheme: of every step.
            weights: see `weights_of`.
            microcanonical: whether velocities are of unit length.
            keys: one for every step, of the random numbers from which its velocities are partly
                drawn anew; one step without any if None.
            share: of what is drawn.

        Returns:
            Where they come to, and the errors of the energy ``(step, chain)`` of microcanonical
            steps.
        """
        theta, velocity, value, grad = (each.clone().contiguous() for each in point)
        time, scale = time.to(theta.dtype).contiguous(), scale.contiguous()
        chains, steps = len(theta), 1 if keys is None else len(keys)
        error = torch.zeros(steps, chains, dtype=torch.float64)
        kick, drift = (each.contiguous() for each in scheme)
        drifts = drift.shape[-1]
        numbers = None if keys is None else (ctypes.c_int64 * steps)(*keys)
        dynamics = _Dynamics(
            microcanonical, steps, drifts, kick.data_ptr(), drift.data_ptr(),
            *(each.shape[-1] if each.dim() > 1 else 0 for each in (kick, drift)),
            int(len(time) > 1), self._dim if scale.dim() > 1 else 0,
            time.data_ptr(), scale.data_ptr(), theta.data_ptr(), velocity.data_ptr(),
            error.data_ptr(), numbers, share,
        )  # fmt: skip
        call = self._call(theta, len(self._x), weights, value, grad, passes=steps * drifts)
        _evaluate(theta.dtype, self._problem, call, dynamics)
        return Point(theta, velocity, value, grad), error

    def _run(
        self,
        theta: Tensor,
        used: int,
        weights: Tensor,
        address: int | None = None,
        stride: int = 0,
        drawn: int = 0,
        key: int = 0,
    ) -> tuple[Tensor, Tensor]:
        flat = _strided(theta if theta.dim() == 2 else theta.reshape(-1, self._dim))
        value = torch.empty(theta.shape[:-1], dtype=torch.float64)
        grad = (
            torch.empty_like(theta)
            if theta.is_contiguous()
            else theta.new_empty(theta.shape)
        )
        call = self._call(flat, used, weights, value, grad)
        call.rows, call.rows_stride, call.drawn, call.key = address, stride, drawn, key
        _evaluate(theta.dtype, self._problem, call)
        if self.added_prior is not None and bool(weights[:, 1].any()):
            prior, prior_grad = self.added_prior.log_prob_and_grad(theta)
            weight = weights[:, 1]
            value = value + weight * prior
            grad = grad + weight.to(grad.dtype).unsqueeze(-1) * prior_grad
        return value, grad

    def _call(
        self,
        theta: Tensor,
        used: int,
        weights: Tensor,
        value: Tensor,
        grad: Tensor,
        passes: int = 1,
    ) -> _Call:
        """Describe what is wanted of weights ``(batch, dim)``, so many times."""
        batch = len(theta)
        return _Call(
            batch, used, len(self._x), threads_for(batch * used * self._dim * passes), 0, 0,
            theta.stride(0), 0, 0, 0,
            theta.data_ptr(), self._x.data_ptr(), self._y.data_ptr(), None, None,
            weights.data_ptr(), 2 if len(weights) > 1 else 0,
            value.data_ptr(), grad.data_ptr(), None,
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def weights_of(likelihood: float, prior: float) -> Tensor:
    """Return the factors of the log likelihood and of the log prior, float64 ``(1, 2)``, shared by
    all chains; chains with factors of their own have ``(chain, 2)``.
    """
    return torch.tensor([[likelihood, prior]], dtype=torch.float64)


# ---------------------------------------- descriptions


def _supported(spec: WeightSpec) -> bool:
    widths = [size for layer in spec.layers for size in spec.shapes[layer.weight]]
    return (
        all(_kind(layer.activation)[0] is not None for layer in spec.layers)
        and max(widths) <= WIDEST
    )


def _kind(activation: Activation) -> tuple[int | None, float]:
    """Return the number of an activation in the compiled code, None if it is not there, and its
    frequency.
    """
    family, _, parameter = activation.name.partition(":")
    if parameter and family != "sin":
        return None, 1.0
    return _ACTIVATIONS.get(family), float(parameter or 1.0)


def _layers(spec: WeightSpec) -> ctypes.Array[_Layer]:
    def describe(weight: str, bias: str | None, activation: Activation) -> _Layer:
        outputs, inputs = spec.shapes[weight]
        kind, frequency = _kind(activation)
        start = spec.slices[bias].start if bias else -1
        return _Layer(
            inputs, outputs, spec.slices[weight].start, start, kind or 0, frequency
        )

    return (_Layer * len(spec.layers))(*(describe(*layer) for layer in spec.layers))


def _problem(layers: ctypes.Array[_Layer], dim: int) -> _Problem:
    return _Problem(n_layers=len(layers), dim=dim, layers=layers, learned=-1, scale=1.0)


def _columns(likelihood: Likelihood, y: Tensor) -> Tensor:
    """Return targets ``(n, columns)``.

    Counts with the logarithms of their factorials behind them.
    """
    columns = y.reshape(len(y), -1)
    counts = isinstance(likelihood, Poisson | NegativeBinomial)
    return (
        torch.cat([columns, torch.lgamma(columns.double() + 1).to(columns)], 1)
        if counts
        else columns
    )


def _prior(marginal: Marginal, dtype: torch.dtype) -> tuple[_Prior, *tuple[Tensor, ...]]:
    """Return the description of a stretch of the prior, and the tensors that it points to."""
    d: Any = rebuild(marginal.distribution, lambda values: values.double())
    name, where = type(d).__name__, marginal.where
    zero = torch.zeros(where.stop - where.start, dtype=torch.float64)
    loc, df, at_zero = zero, zero + 1, zero
    if name in ("Gamma", "InverseGamma", "Exponential"):
        loc, inverse_scale = zero + (-1 if name == "InverseGamma" else 1), d.rate
        df = zero + 1 if name == "Exponential" else d.concentration
        logs = torch.lgamma(df) - df * d.rate.log()
    elif name == "HalfCauchy":
        loc, inverse_scale, logs = d.scale.log(), zero + 1, zero - math.log(2 / math.pi)
    else:
        loc, inverse_scale, df, logs = (
            getattr(d, "loc", zero),
            1 / d.scale,
            getattr(d, "df", df),
            d.scale.log(),
        )
        at_zero = zero + {
            "Laplace": -math.log(2),
            "HalfNormal": math.log(2) - _HALF_LOG_2PI,
        }.get(name, -_HALF_LOG_2PI)
    if name in ("StudentT", "Cauchy"):
        at_zero = student_constant(df)
    constant = math.fsum(at_zero.tolist()) - float(logs.sum())
    kept = [values.to(dtype).contiguous() for values in (loc, inverse_scale, df)]
    addresses = (values.data_ptr() for values in kept)
    return _Prior(
        where.start, where.stop, _FAMILIES[marginal.log, name], *addresses, constant
    ), *kept


def _scales(shared: Shared) -> ctypes.Array[_Scale]:
    counts = shared.owner.bincount(minlength=len(shared.offset))
    columns = zip(
        shared.parameters.tolist(), shared.offset.tolist(), counts.tolist(), strict=True
    )
    return (_Scale * len(counts))(
        *(_Scale(*where, offset, count) for where, offset, count in columns)
    )


def _runs(shared: Shared) -> ctypes.Array[_Run]:
    owners, lengths = shared.owner.unique_consecutive(return_counts=True)
    stops = lengths.cumsum(0)
    columns = zip((stops - lengths).tolist(), stops.tolist(), owners.tolist(), strict=True)
    return (_Run * len(owners))(*(_Run(*where) for where in columns))


def _strided(theta: Tensor) -> Tensor:
    """Return ``theta`` ``(batch, dim)`` with neighbouring coordinates side by side in memory."""
    return theta if theta.stride(1) == 1 else theta.contiguous()


def threads_for(multiplications: int) -> int:
    return max(1, min(torch.get_num_threads(), multiplications // _WORK_OF_A_THREAD))


def _evaluate(
    dtype: torch.dtype, problem: _Problem, call: _Call, dynamics: _Dynamics | None = None
) -> None:
    compiled = library(dtype)
    assert compiled is not None
    steps = None if dynamics is None else ctypes.byref(dynamics)
    status = compiled.bnnflow_evaluate(ctypes.byref(problem), ctypes.byref(call), steps)
    if status == 1:
        raise IndexError(f"rows must be between 0 and {call.n_data - 1}")
    if status:
        raise MemoryError("no memory left to evaluate the network")
