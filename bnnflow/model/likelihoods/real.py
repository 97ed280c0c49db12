"""Likelihoods of real numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from bnnflow.arguments import number, settle
from bnnflow.model.likelihood import Kind, Likelihood, Score, real_targets
from bnnflow.model.likelihoods.shared import (
    LOG_2PI,
    Parameters,
    StudentTable,
    check_owners,
    half_normal,
    over_rows,
    repeated,
    student_log_density,
    student_pull,
    student_slope,
)
from bnnflow.seeding import isolated

__all__ = ["Gaussian", "HeteroscedasticGaussian", "HeteroscedasticStudentT", "StudentT"]


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """y ~ N(outputs, scale^2), one scale for all rows, and for all targets or for each.

    Args:
        scale: the standard deviation of the noise, in units of y; None learns it.
        scale_prior: its prior when it is learned, any distribution on the positive numbers. One of
            shape ``(targets,)``, as ``HalfNormal(torch.ones(3))``, gives every target a scale of
            its own.

    Example:
        >>> import torch
        >>> from torch.distributions import HalfNormal
        >>> Gaussian(scale_prior=HalfNormal(torch.ones(3))).parameters["scale"].batch_shape
        torch.Size([3])
    """

    scale: float | None = None
    scale_prior: Distribution = field(default_factory=half_normal)
    kind: Kind = field(default="regression", init=False)

    def __post_init__(self) -> None:
        settle(self, number, "scale", above=0)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The scale, if it is learned."""
        return {} if self.scale is not None else {"scale": self.scale_prior}

    @property
    def is_bounded(self) -> bool:
        """Whether the scale is known: one that is learned can be as small as errors are."""
        return self.scale is not None

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, out)``."""
        check_owners(self.parameters, n_outputs)
        return real_targets(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        scale = self._scale(outputs, parameters)
        return (-0.5 * ((y - outputs) / scale) ** 2 - scale.log() - 0.5 * LOG_2PI).sum(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs and by log scale (summed over rows)."""
        scale = self._scale(outputs, parameters)
        residual = (y - outputs) / scale
        grads = {}
        if self.scale is None:
            grads["scale"] = over_rows(residual**2 - 1, scale)
        return residual / scale, grads

    def whitened_score(
        self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]
    ) -> Tensor:
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
        information = (
            {} if self.scale is not None else {"scale": repeated(2.0, outputs, scale)}
        )
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
        return (-0.5 * ((y - mean) / scale) ** 2 - scale.log() - 0.5 * LOG_2PI).sum(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs."""
        mean, raw = outputs.chunk(2, -1)
        scale = self._scale(raw)
        residual = (y - mean) / scale
        return torch.cat(
            [residual / scale, (residual**2 - 1) / scale * torch.sigmoid(raw)], -1
        ), {}

    def whitened_score(
        self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]
    ) -> Tensor:
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
        return next(self.cdfs(outputs, y[None], parameters))

    def cdfs(
        self, outputs: Tensor, values: Tensor, parameters: dict[str, Tensor]
    ) -> Iterator[Tensor]:
        """Yield the `cdf` at each of several values of y, ``(k, n, targets)``."""
        mean, raw = outputs.chunk(2, -1)
        scale = self._scale(raw)  # once: it costs more than all the rest
        for y in values:
            yield torch.special.ndtr((y - mean) / scale)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, targets)``."""
        mean, raw = outputs.chunk(2, -1)
        noise = torch.randn(
            mean.shape, generator=generator, dtype=mean.dtype, device=mean.device
        )
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
    scale_prior: Distribution = field(default_factory=half_normal)
    kind: Kind = field(default="regression", init=False)

    def __post_init__(self) -> None:
        settle(self, number, "df", above=2)
        settle(self, number, "scale", above=0)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The scale, if it is learned."""
        return {} if self.scale is not None else {"scale": self.scale_prior}

    @property
    def is_bounded(self) -> bool:
        """Whether the scale is known: one that is learned can be as small as errors are."""
        return self.scale is not None

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, out)``."""
        check_owners(self.parameters, n_outputs)
        return real_targets(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        scale = self._scale(outputs, parameters)
        z = (y - outputs) / scale
        return (student_log_density(z, self._df) - scale.log()).sum(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs and by log scale (summed over rows)."""
        scale = self._scale(outputs, parameters)
        z = (y - outputs) / scale
        slope = student_pull(z, self._df)
        grads = {} if self.scale is not None else {"scale": over_rows(slope * z - 1, scale)}
        return slope / scale, grads

    def whitened_score(
        self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]
    ) -> Tensor:
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
        information = (
            {} if self.scale is not None else {"scale": repeated(each, outputs, scale)}
        )
        return factor.expand(*outputs.shape, outputs.shape[-1]), information

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the mean of y, ``(..., n, out)``."""
        return outputs

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, out)``."""
        return (
            self._scale(outputs, parameters) ** 2 * (self.df / (self.df - 2))
        ).expand_as(outputs)

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, out)``; not differentiable."""
        return next(self.cdfs(outputs, y[None], parameters))

    def cdfs(
        self, outputs: Tensor, values: Tensor, parameters: dict[str, Tensor]
    ) -> Iterator[Tensor]:
        """Yield the `cdf` at each of several values of y, ``(k, n, out)``."""
        table = StudentTable(self._df.to(outputs.device))
        scale = self._scale(outputs, parameters)
        for y in values:
            yield table((y - outputs) / scale)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, out)``."""
        noise = torch.randn(
            outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device
        )
        with isolated(generator):
            spread = td.Chi2(torch.full_like(outputs, self.df)).sample()
        return (
            outputs + self._scale(outputs, parameters) * noise * (self.df / spread).sqrt()
        )

    @property
    def _df(self) -> Tensor:
        return torch.tensor(self.df, dtype=torch.float64)

    def _scale(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        if self.scale is not None:
            return torch.as_tensor(self.scale, dtype=outputs.dtype, device=outputs.device)
        return parameters["scale"].unsqueeze(-2)  # (..., 1, 1)


def _mostly_light() -> Distribution:
    """Return the usual prior of df - 2, of mean 20 (Juarez & Steel 2010)."""
    shape, rate = torch.tensor([2.0, 0.1], dtype=torch.float64).unbind()
    return td.Gamma(shape, rate)


@dataclass(frozen=True)
class HeteroscedasticStudentT(Likelihood):
    """y ~ m + s * t with m and s from the network: 2 * targets outputs, the means and then the raw
    scales, as of `HeteroscedasticGaussian`, and tails that are learned.

    Few degrees of freedom mean rows far from what the network says; many of them a normal law.

    Args:
        df: degrees of freedom, above 2, so that predictions have a variance; None learns them.
        min_scale: added to softplus(raw scale), in units of y.
        excess_df_prior: the prior of df - 2 when it is learned, any distribution on the positive
            numbers; by default Gamma(2, 0.1) (Juarez & Steel 2010).

    Raises:
        ValueError: if df is not above 2 or min_scale not positive.
    """

    df: float | None = None
    min_scale: float = 1e-3
    excess_df_prior: Distribution = field(default_factory=_mostly_light)
    kind: Kind = field(default="regression", init=False)

    def __post_init__(self) -> None:
        settle(self, number, "df", above=2)
        settle(self, number, "min_scale", above=0)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """``excess_df``, the degrees of freedom beyond two, if they are learned."""
        return {} if self.df is not None else {"excess_df": self.excess_df_prior}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, out / 2)``."""
        check_owners(self.parameters, 1)
        if n_outputs % 2:
            raise ValueError(
                "HeteroscedasticStudentT needs 2 outputs a target (mean, raw scale), "
                f"got {n_outputs}"
            )
        return real_targets(y, n_outputs // 2)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        z, scale, df = self._standardised(outputs, y, parameters)
        return (student_log_density(z, df) - scale.log()).sum(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs and by log (df - 2) (summed over rows)."""
        z, scale, df = self._standardised(outputs, y, parameters)
        pull = student_pull(z, df)
        raw = outputs.chunk(2, -1)[1]
        by_outputs = torch.cat(
            [pull / scale, (pull * z - 1) / scale * torch.sigmoid(raw)], -1
        )
        if self.df is not None:
            return by_outputs, {}
        by_df = student_slope(df) + 0.5 * (pull * z / df - (z * z / df).log1p())
        excess = parameters["excess_df"]
        return by_outputs, {"excess_df": excess * over_rows(by_df, excess)}

    @property
    def has_whitened_score(self) -> bool:
        """Whether the degrees of freedom are fixed: learned ones share information with outputs."""
        return self.df is not None

    def whitened_score(
        self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]
    ) -> Tensor:
        """Return b with R b the gradient by the outputs, ``(..., n, out)``.

        R as in `fisher_factor`.
        """
        if not self.has_whitened_score:
            raise self._lack("whitened_score")
        z, _, df = self._standardised(outputs, y, parameters)
        pull = student_pull(z, df)
        by_mean = pull * ((df + 3) / (df + 1)).sqrt()
        return torch.cat([by_mean, (pull * z - 1) * ((df + 3) / (2 * df)).sqrt()], -1)

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs; where df is learned, with
        one column more, and the row below it that log (df - 2) has, ``(..., n, 1, out + 1)``.
        """
        raw = outputs.chunk(2, -1)[1]
        scale, df = self._scale(raw), self._df(outputs, parameters)
        by_mean = ((df + 1) / (df + 3)).sqrt() / scale
        by_log_scale = (2 * df / (df + 3)).sqrt()
        by_raw = by_log_scale * torch.sigmoid(raw) / scale
        factor = torch.diag_embed(torch.cat([by_mean, by_raw], -1))
        if self.df is not None:
            return factor, {}
        # Lange, Little & Taylor (1989), of df and log scale; in double precision, for what is left
        # of the terms is small
        df = df.double()
        of_df = (torch.polygamma(1, df / 2) - torch.polygamma(1, (df + 1) / 2)) / 4
        of_df = of_df - (df + 5) / (2 * df * (df + 1) * (df + 3))
        shared = -2 / ((df + 1) * (df + 3)) / by_log_scale
        own = (raw.shape[-1] * (of_df - shared**2)).clamp(min=0).sqrt()
        zeros, ones = torch.zeros_like(raw), torch.ones_like(raw)
        row = torch.cat([zeros, shared * ones, own * ones[..., :1]], -1) * (df - 2)
        row = row.to(raw)
        return F.pad(factor, (0, 1)), {"excess_df": row.unsqueeze(-2)}

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the mean of y, ``(..., n, targets)``."""
        return outputs.chunk(2, -1)[0]

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, targets)``."""
        df = self._df(outputs, parameters)
        return self._scale(outputs.chunk(2, -1)[1]) ** 2 * (df / (df - 2))

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, targets)``; not differentiable."""
        return next(self.cdfs(outputs, y[None], parameters))

    def cdfs(
        self, outputs: Tensor, values: Tensor, parameters: dict[str, Tensor]
    ) -> Iterator[Tensor]:
        """Yield the `cdf` at each of several values of y, ``(k, n, targets)``."""
        mean, raw = outputs.chunk(2, -1)
        scale, table = self._scale(raw), StudentTable(self._df(outputs, parameters))
        for y in values:
            yield table((y - mean) / scale)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, targets)``."""
        mean, raw = outputs.chunk(2, -1)
        noise = torch.randn(
            mean.shape, generator=generator, dtype=mean.dtype, device=mean.device
        )
        df = self._df(outputs, parameters).expand_as(mean)
        with isolated(generator):
            spread = td.Chi2(df).sample()
        return mean + self._scale(raw) * noise * (df / spread).sqrt()

    def _standardised(
        self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return residuals in scales, the scales, and the degrees of freedom ``(..., 1, 1)``."""
        mean, raw = outputs.chunk(2, -1)
        scale = self._scale(raw)
        return (y - mean) / scale, scale, self._df(outputs, parameters)

    def _scale(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) + self.min_scale

    def _df(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        if self.df is not None:
            return torch.as_tensor(self.df, dtype=outputs.dtype, device=outputs.device)
        return 2 + parameters["excess_df"].unsqueeze(-2)  # (..., 1, 1)
