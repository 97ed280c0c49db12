"""Likelihoods: the density of one row of data given the network's outputs.

Each is a small frozen class. ``outputs`` is ``(..., n, out)``; a learned parameter comes as a
positive tensor ``(..., *shape)``, ``(..., 1)`` for a scalar, in ``parameters`` and is
differentiated through its logarithm. ``score`` and ``fisher_factor`` are the first and second
derivatives in closed form; both stay differentiable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor
from torch.distributions import Chi2, Distribution, Gamma, HalfNormal, LogNormal

from bnnflow.arguments import checked, number, settle
from bnnflow.model.likelihood import Kind, Likelihood, Score, labels_of, real_targets
from bnnflow.seeding import isolated

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "NegativeBinomial",
    "Ordinal",
    "Poisson",
    "StudentT",
]

_LOG_2PI = math.log(2 * math.pi)
Parameters = dict[str, Tensor] | None


def _half_normal() -> Distribution:
    return HalfNormal(torch.tensor(1.0, dtype=torch.float64))


def _by_scipy(function: np.ufunc, *values: Tensor) -> Tensor:
    """Evaluate a special function that torch lacks, in float64 and without derivatives."""
    arrays = [value.detach().double().cpu().numpy() for value in values]
    return torch.as_tensor(function(*arrays)).to(values[0])


def _check_owners(parameters: dict[str, Distribution], n_outputs: int) -> None:
    """Raise unless every parameter is one for all outputs, or one for each."""
    for name, prior in parameters.items():
        shape = tuple(prior.batch_shape)
        if shape not in ((), (1,), (n_outputs,)):
            raise ValueError(
                f"{name}_prior must have shape () or ({n_outputs},), one for each "
                f"output, got {shape}"
            )


def _over_rows(terms: Tensor, parameter: Tensor) -> Tensor:
    """Sum ``(..., n, out)`` over rows, and over outputs if they share the parameter, to its
    ``(..., 1 or out)``.
    """
    return terms.sum((-1, -2)).unsqueeze(-1) if parameter.shape[-1] == 1 else terms.sum(-2)


def _repeated(each: float, outputs: Tensor, parameter: Tensor) -> Tensor:
    """Return as many times ``each`` as there are entries of outputs for one of the parameter,
    ``(..., 1 or out)``.
    """
    size = parameter.shape[-1]
    return torch.full_like(
        outputs[..., 0, :size], each * outputs.shape[-2] * (outputs.shape[-1] // size)
    )


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """y ~ N(outputs, scale^2), one scale for all rows, and for all targets or for each.

    Args:
        scale: the standard deviation of the noise, in units of y; None learns it.
        scale_prior: its prior when it is learned, any distribution on the positive numbers. One of
            shape ``(targets,)``, as ``HalfNormal(torch.ones(3))``, gives every target a scale of
            its own.

    Example:
        >>> Gaussian(scale_prior=HalfNormal(torch.ones(3))).parameters["scale"].batch_shape
        torch.Size([3])
    """

    scale: float | None = None
    scale_prior: Distribution = field(default_factory=_half_normal)
    kind: Kind = field(default="regression", init=False)

    def __post_init__(self) -> None:
        settle(self, number, "scale", above=0)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The scale, if it is learned."""
        return {} if self.scale is not None else {"scale": self.scale_prior}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, out)``."""
        _check_owners(self.parameters, n_outputs)
        return real_targets(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        scale = self._scale(outputs, parameters)
        return (-0.5 * ((y - outputs) / scale) ** 2 - scale.log() - 0.5 * _LOG_2PI).sum(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs and by log scale (summed over rows)."""
        scale = self._scale(outputs, parameters)
        residual = (y - outputs) / scale
        grads = {}
        if self.scale is None:
            grads["scale"] = _over_rows(residual**2 - 1, scale)
        return residual / scale, grads

    def whitened_score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return b with R b the gradient by the outputs, ``(..., n, out)``.

        R as in `fisher_factor`.
        """
        return (y - outputs) / self._scale(outputs, parameters)

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs, and that of log scale over
        all rows.
        """
        scale = self._scale(outputs, parameters)
        eye = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        factor = (eye / scale.unsqueeze(-1)).expand(*outputs.shape, outputs.shape[-1])
        information = {} if self.scale is not None else {"scale": _repeated(2.0, outputs, scale)}
        return factor, information

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the mean of y, ``(..., n, out)``."""
        return outputs

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, out)``."""
        return (self._scale(outputs, parameters) ** 2).expand_as(outputs)

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, out)``."""
        return torch.special.ndtr((y - outputs) / self._scale(outputs, parameters))

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, out)``."""
        noise = torch.randn(
            outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device
        )
        return outputs + self._scale(outputs, parameters) * noise

    def _scale(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        if self.scale is not None:
            return torch.as_tensor(self.scale, dtype=outputs.dtype, device=outputs.device)
        return parameters["scale"].unsqueeze(-2)  # (..., 1, 1)


@dataclass(frozen=True)
class HeteroscedasticGaussian(Likelihood):
    """y ~ N(m, s^2) with both from the network: 2 * targets outputs, the means and then the raw
    scales.

    Args:
        min_scale: added to softplus(raw scale), in units of y, so that no row is fitted with zero
            noise.
    """

    min_scale: float = 1e-3
    kind: Kind = field(default="regression", init=False)

    def __post_init__(self) -> None:
        settle(self, number, "min_scale", above=0)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """None are learned beside the network."""
        return {}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, out / 2)``."""
        if n_outputs % 2:
            raise ValueError(
                "HeteroscedasticGaussian needs 2 outputs a target (mean, raw scale), "
                f"got {n_outputs}"
            )
        return real_targets(y, n_outputs // 2)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        mean, raw = outputs.chunk(2, -1)
        scale = self._scale(raw)
        return (-0.5 * ((y - mean) / scale) ** 2 - scale.log() - 0.5 * _LOG_2PI).sum(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs."""
        mean, raw = outputs.chunk(2, -1)
        scale = self._scale(raw)
        residual = (y - mean) / scale
        return torch.cat([residual / scale, (residual**2 - 1) / scale * torch.sigmoid(raw)], -1), {}

    def whitened_score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return b with R b the gradient by the outputs, ``(..., n, out)``.

        R as in `fisher_factor`.
        """
        mean, raw = outputs.chunk(2, -1)
        residual = (y - mean) / self._scale(raw)
        return torch.cat([residual, (residual**2 - 1) / math.sqrt(2)], -1)

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs."""
        raw = outputs.chunk(2, -1)[1]
        scale = self._scale(raw)
        root = torch.cat([1 / scale, math.sqrt(2) * torch.sigmoid(raw) / scale], -1)
        return torch.diag_embed(root), {}

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the mean of y, ``(..., n, targets)``."""
        return outputs.chunk(2, -1)[0]

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, targets)``."""
        return self._scale(outputs.chunk(2, -1)[1]) ** 2

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, targets)``."""
        mean, raw = outputs.chunk(2, -1)
        return torch.special.ndtr((y - mean) / self._scale(raw))

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, targets)``."""
        mean, raw = outputs.chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self._scale(raw) * noise

    def _scale(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) + self.min_scale


@dataclass(frozen=True)
class StudentT(Likelihood):
    """y ~ outputs + scale * t with ``df`` degrees of freedom: regression that outliers do not
    spoil.

    Lange, Little & Taylor (1989).

    Args:
        df: degrees of freedom, above 2, so that predictions have a variance; small means heavy
            tails.
        scale: in units of y; None learns it. The standard deviation of the noise is scale * sqrt(df
            / (df - 2)).
        scale_prior: its prior when it is learned, any distribution on the positive numbers; one of
            shape ``(targets,)`` gives every target a scale of its own.

    Raises:
        ValueError: if df is not above 2 or the scale not positive.
    """

    df: float = 4.0
    scale: float | None = None
    scale_prior: Distribution = field(default_factory=_half_normal)
    kind: Kind = field(default="regression", init=False)

    def __post_init__(self) -> None:
        settle(self, number, "df", above=2)
        settle(self, number, "scale", above=0)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The scale, if it is learned."""
        return {} if self.scale is not None else {"scale": self.scale_prior}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, out)``."""
        _check_owners(self.parameters, n_outputs)
        return real_targets(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        scale = self._scale(outputs, parameters)
        z = (y - outputs) / scale
        constant = (
            math.lgamma((self.df + 1) / 2)
            - math.lgamma(self.df / 2)
            - 0.5 * math.log(self.df * math.pi)
        )
        return (constant - scale.log() - 0.5 * (self.df + 1) * (z * z / self.df).log1p()).sum(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs and by log scale (summed over rows)."""
        scale = self._scale(outputs, parameters)
        z = (y - outputs) / scale
        # bounded: an outlier pulls less the farther it lies
        slope = (self.df + 1) * z / (self.df + z * z)
        grads = {} if self.scale is not None else {"scale": _over_rows(slope * z - 1, scale)}
        return slope / scale, grads

    def whitened_score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return b with R b the gradient by the outputs, ``(..., n, out)``.

        R as in `fisher_factor`.
        """
        z = (y - outputs) / self._scale(outputs, parameters)
        return math.sqrt((self.df + 1) * (self.df + 3)) * z / (self.df + z * z)

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs, and that of log scale over
        all rows.
        """
        scale = self._scale(outputs, parameters)
        eye = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        factor = math.sqrt((self.df + 1) / (self.df + 3)) * eye / scale.unsqueeze(-1)
        each = 2 * self.df / (self.df + 3)
        information = {} if self.scale is not None else {"scale": _repeated(each, outputs, scale)}
        return factor.expand(*outputs.shape, outputs.shape[-1]), information

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the mean of y, ``(..., n, out)``."""
        return outputs

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, out)``."""
        return (self._scale(outputs, parameters) ** 2 * (self.df / (self.df - 2))).expand_as(
            outputs
        )

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, out)``; not differentiable."""
        z = (y - outputs) / self._scale(outputs, parameters)
        return _by_scipy(special.stdtr, torch.full_like(z, self.df), z)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, out)``."""
        noise = torch.randn(
            outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device
        )
        with isolated(generator):
            spread = Chi2(torch.full_like(outputs, self.df)).sample()
        return outputs + self._scale(outputs, parameters) * noise * (self.df / spread).sqrt()

    def _scale(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        if self.scale is not None:
            return torch.as_tensor(self.scale, dtype=outputs.dtype, device=outputs.device)
        return parameters["scale"].unsqueeze(-2)  # (..., 1, 1)


def _counts(y: Tensor, n_targets: int) -> Tensor:
    """Return counts as floating-point ``(n, targets)``, checked."""
    y = real_targets(y, n_targets)
    wrong = ((y < 0) | (y != y.floor())).any(-1).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        value = next(float(v) for v in y[row] if v < 0 or v != v.floor())
        raise ValueError(f"y in row {row} is {value:g}: counts are the whole numbers from 0")
    return y


@dataclass(frozen=True)
class Poisson(Likelihood):
    """y ~ Poisson(exp(outputs)): counts whose variance is their mean."""

    kind: Kind = field(default="regression", init=False)
    discrete: bool = field(default=True, init=False)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """None are learned beside the network."""
        return {}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return the counts as ``(n, out)``."""
        return _counts(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        return (y * outputs - outputs.exp() - torch.lgamma(y + 1)).sum(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs."""
        return y - outputs.exp(), {}

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs, their rates."""
        return torch.diag_embed((0.5 * outputs).exp()), {}

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the rates, ``(..., n, out)``."""
        return outputs.exp()

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, out)``."""
        return outputs.exp()

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, out)``."""
        inside = torch.special.gammaincc(y.floor().clamp(min=0) + 1, outputs.exp())
        return torch.where(y < 0, 0.0, inside)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, out)``."""
        return torch.poisson(outputs.exp(), generator=generator)


@dataclass(frozen=True)
class NegativeBinomial(Likelihood):
    """Counts with mean m = exp(outputs) and variance m + dispersion * m^2.

    Poisson where the dispersion vanishes.

    With r = 1 / dispersion, y is Poisson with a rate that is Gamma(r, r / m) (the "NB2" of Cameron
    & Trivedi 1986).

    Args:
        dispersion: None learns it.
        dispersion_prior: its prior when it is learned, any distribution on the positive numbers;
            one of shape ``(targets,)`` gives every target a dispersion of its own.

    Raises:
        ValueError: if the dispersion is not positive.
    """

    dispersion: float | None = None
    dispersion_prior: Distribution = field(default_factory=_half_normal)
    kind: Kind = field(default="regression", init=False)
    discrete: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        settle(self, number, "dispersion", above=0)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The dispersion, if it is learned."""
        return {} if self.dispersion is not None else {"dispersion": self.dispersion_prior}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return the counts as ``(n, out)``."""
        _check_owners(self.parameters, n_outputs)
        return _counts(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        dispersion = self._dispersion(outputs, parameters)
        # Differences of large terms as the dispersion vanishes: they want float64.
        r, y64 = 1 / dispersion.double(), y.double()
        ways = torch.lgamma(y64 + r) - torch.lgamma(r) - torch.lgamma(y64 + 1)
        logit = (outputs + dispersion.log()).double()  # log(dispersion * mean)
        log_prob = ways - r * F.softplus(logit) + y64 * F.logsigmoid(logit)
        return log_prob.sum(-1).to(outputs.dtype)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs and by log dispersion (summed over rows)."""
        dispersion = self._dispersion(outputs, parameters)
        r, y64 = 1 / dispersion.double(), y.double()
        logit = (outputs + dispersion.log()).double()
        by_outputs = y64 * torch.sigmoid(-logit) - r * torch.sigmoid(logit)
        if self.dispersion is not None:
            return by_outputs.to(outputs.dtype), {}
        ways = torch.digamma(y64 + r) - torch.digamma(r)
        by_log = by_outputs + r * (F.softplus(logit) - ways)  # (..., n, out)
        return by_outputs.to(outputs.dtype), {
            "dispersion": _over_rows(by_log, dispersion).to(outputs.dtype)
        }

    @property
    def has_fisher_factor(self) -> bool:
        """Only for a fixed dispersion: the information on a learned one is an infinite sum without
        a closed form.
        """
        return self.dispersion is not None

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs, for a fixed dispersion."""
        if self.dispersion is None:
            raise self._lack("fisher_factor")
        dispersion = self._dispersion(outputs, parameters)
        # mean / (1 + dispersion * mean)
        information = torch.sigmoid(outputs + dispersion.log()) / dispersion
        return torch.diag_embed(information.sqrt()), {}

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the mean of y, ``(..., n, out)``."""
        return outputs.exp()

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, out)``."""
        mean = outputs.exp()
        return mean + self._dispersion(outputs, parameters) * mean * mean

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, out)``; not differentiable."""
        dispersion = self._dispersion(outputs, parameters)
        success = torch.sigmoid(-(outputs + dispersion.log()))
        inside = _by_scipy(special.betainc, 1 / dispersion, y.floor().clamp(min=0) + 1, success)
        return torch.where(y < 0, 0.0, inside)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, out)``."""
        r = (1 / self._dispersion(outputs, parameters)).expand_as(outputs)
        with isolated(generator):
            rate = outputs.exp() * Gamma(r, r).sample()
        return torch.poisson(rate, generator=generator)

    def _dispersion(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        if self.dispersion is not None:
            return torch.as_tensor(self.dispersion, dtype=outputs.dtype, device=outputs.device)
        return parameters["dispersion"].unsqueeze(-2)  # (..., 1, 1)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """y ~ Categorical(softmax(outputs)); labels are 0 to out - 1."""

    kind: Kind = field(default="classification", init=False)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """None are learned beside the network."""
        return {}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return the labels as int64 ``(n,)``."""
        if n_outputs < 2:
            raise ValueError(
                "Categorical needs an output for every class; for one logit use Bernoulli"
            )
        return labels_of(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``."""
        index = y.expand(outputs.shape[:-1]).unsqueeze(-1)
        return outputs.gather(-1, index).squeeze(-1) - outputs.logsumexp(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs."""
        # Not softmax(-1): it is slow over a short axis that is not the fastest one.
        probs = (outputs - outputs.logsumexp(-1, keepdim=True)).exp()
        return F.one_hot(y, outputs.shape[-1]).to(outputs) - probs, {}

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T = diag(p) - p p^T: with u = sqrt(p), R = diag(u) (I - u u^T)."""
        u = (0.5 * outputs.log_softmax(-1)).exp()
        return torch.diag_embed(u) - (u * u).unsqueeze(-1) * u.unsqueeze(-2), {}

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the class probabilities, ``(..., n, classes)``."""
        return outputs.softmax(-1)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """y ~ Bernoulli(sigmoid(output)); one output, labels 0 and 1."""

    kind: Kind = field(default="classification", init=False)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """None are learned beside the network."""
        return {}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return the labels as int64 ``(n,)``."""
        if n_outputs != 1:
            raise ValueError(
                f"Bernoulli needs a network with one output, got {n_outputs}; use Categorical"
            )
        return labels_of(y, 2)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``."""
        logit = outputs.squeeze(-1)
        return F.logsigmoid(torch.where(y == 1, logit, -logit))

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs."""
        return y.unsqueeze(-1) - torch.sigmoid(outputs), {}

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T = p (1 - p)."""
        return (0.5 * (F.logsigmoid(outputs) + F.logsigmoid(-outputs))).exp().unsqueeze(-1), {}

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the class probabilities, ``(..., n, 2)``."""
        p = torch.sigmoid(outputs)
        return torch.cat([1 - p, p], -1)


@checked
@dataclass(frozen=True)
class Ordinal(Likelihood):
    """Ordered classes: P(y <= k) = sigmoid(c_k - output), the cumulative logit model (McCullagh
    1980).

    The first cutpoint is 0, since the output's bias takes its place; the positive gaps between the
    others are learned and are ``likelihood.log_gap`` in ``theta``. One output, labels 0 to
    n_classes - 1.

    Args:
        n_classes: three or more.
        gap_prior: the prior of each gap, a scalar distribution on the positive numbers.

    Raises:
        ValueError: for fewer classes.
    """

    n_classes: int
    gap_prior: Distribution = field(
        default_factory=lambda: LogNormal(
            torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        )
    )
    kind: Kind = field(default="classification", init=False)

    def __post_init__(self) -> None:
        if self.n_classes < 3:
            raise ValueError(
                f"n_classes must be at least 3, got {self.n_classes}; for two use Bernoulli"
            )

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The gaps between cutpoints, ``(n_classes - 2,)``."""
        return {"gap": self.gap_prior.expand(torch.Size([self.n_classes - 2]))}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return the labels as int64 ``(n,)``."""
        if n_outputs != 1:
            raise ValueError(f"Ordinal needs a network with one output, got {n_outputs}")
        return labels_of(y, self.n_classes)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``."""
        gap = parameters["gap"]
        upper, lower, y = self._margins(outputs, y, gap)
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), without cancellation
        below = torch.where(y < self.n_classes - 1, F.logsigmoid(upper), 0.0)
        above = torch.where(y > 0, F.logsigmoid(-lower), 0.0)
        index = (y - 1).clamp(0, self.n_classes - 3)
        between = (-torch.expm1(-gap)).log().expand(*y.shape[:-1], -1).gather(-1, index)
        inner = (y > 0) & (y < self.n_classes - 1)
        return below + above + torch.where(inner, between, 0.0)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the output and by the log gaps (summed over rows)."""
        by_output, by_gaps = self._row_scores(outputs, y, parameters["gap"])
        return by_output.unsqueeze(-1), {"gap": by_gaps.sum(-2)}

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return factors whose stack S has S S^T the Fisher information of a row's output and the
        log gaps.

        That of the output is ``(..., n, 1, classes)``, that of the gaps
        ``(..., n, gaps, classes)``: for each class the score times the root of its probability.
        """
        roots = self.mean(outputs, parameters).sqrt()  # (..., n, classes)
        scores = [
            self._row_scores(outputs, self._everywhere(outputs, label), parameters["gap"])
            for label in range(self.n_classes)
        ]
        by_output = torch.stack([score for score, _ in scores], -1) * roots
        by_gaps = torch.stack([score for _, score in scores], -1) * roots.unsqueeze(-2)
        return by_output.unsqueeze(-2), {"gap": by_gaps}

    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the class probabilities, ``(..., n, classes)``."""
        labels = range(self.n_classes)
        return torch.stack(
            [
                self.log_prob(outputs, self._everywhere(outputs, label), parameters).exp()
                for label in labels
            ],
            -1,
        )

    @staticmethod
    def _everywhere(outputs: Tensor, label: int) -> Tensor:
        return torch.full(outputs.shape[-2:-1], label, device=outputs.device)

    def _margins(self, outputs: Tensor, y: Tensor, gap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_y - output, c_{y-1} - output (of some class where there is no such cutpoint) and
        y, ``(..., n)``.
        """
        eta = outputs.squeeze(-1)
        y = y.expand(eta.shape)
        cutpoints = torch.cat([torch.zeros_like(gap[..., :1]), gap.cumsum(-1)], -1).expand(
            *eta.shape[:-1], -1
        )
        upper = cutpoints.gather(-1, y.clamp(max=self.n_classes - 2)) - eta
        lower = cutpoints.gather(-1, (y - 1).clamp(min=0)) - eta
        return upper, lower, y

    def _row_scores(self, outputs: Tensor, y: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Return every row's gradient by the output ``(..., n)`` and by the log gaps
        ``(..., n, gaps)``.
        """
        upper, lower, y = self._margins(outputs, y, gap)
        by_upper = torch.where(y < self.n_classes - 1, torch.sigmoid(-upper), 0.0)
        by_lower = torch.where(y > 0, torch.sigmoid(lower), 0.0)
        label, which = y.unsqueeze(-1), torch.arange(1, self.n_classes - 1, device=y.device)
        # Cutpoint k is the sum of the gaps 1 to k; class k also has the factor 1 - exp(-gap k).
        by_gaps = by_upper.unsqueeze(-1) * (label >= which) - by_lower.unsqueeze(-1) * (
            label > which
        )
        gap = gap.unsqueeze(-2)  # (..., 1, gaps)
        return by_lower - by_upper, (by_gaps + (label == which) / torch.expm1(gap)) * gap
