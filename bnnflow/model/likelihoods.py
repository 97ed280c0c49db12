"""Likelihoods: the density of one row of data given the network's outputs.

Each is a small frozen class. ``outputs`` is ``(..., n, out)``; a learned parameter comes as a positive tensor
``(..., 1)`` in ``parameters`` and is differentiated through its logarithm. ``score`` and ``fisher_factor`` are the
first and second derivatives in closed form; both stay differentiable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, HalfNormal

__all__ = ["Bernoulli", "Categorical", "Gaussian", "HeteroscedasticGaussian"]

_LOG_2PI = math.log(2 * math.pi)
Score = tuple[Tensor, dict[str, Tensor]]


def _real_targets(y: Tensor, n_targets: int) -> Tensor:
    """Return regression targets as ``(n, targets)``, checked."""
    if not y.is_floating_point():
        y = y.to(torch.get_default_dtype())
    y = y.unsqueeze(-1) if y.dim() == 1 else y
    if y.dim() != 2 or y.shape[1] != n_targets:
        raise ValueError(f"y must be (n,) or (n, {n_targets}) for this network, got {tuple(y.shape)}")
    return y


@dataclass(frozen=True)
class Gaussian:
    """y ~ N(outputs, scale^2), one scale for all rows and targets.

    Args:
        scale: the standard deviation of the noise, in units of y; None learns it.
        scale_prior: its prior when it is learned, any distribution on the positive numbers.
    """

    scale: float | None = None
    scale_prior: Distribution = field(default_factory=lambda: HalfNormal(torch.tensor(1.0, dtype=torch.float64)))
    kind: Literal["regression"] = field(default="regression", init=False)

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The scale, if it is learned."""
        return {} if self.scale is not None else {"scale": self.scale_prior}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, out)``."""
        return _real_targets(y, n_outputs)

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
            grads["scale"] = (residual**2 - 1).sum((-1, -2)).unsqueeze(-1)
        return residual / scale, grads

    def fisher_factor(self, outputs: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs, and that of log scale over all rows."""
        scale = self._scale(outputs, parameters)
        eye = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        factor = (eye / scale.unsqueeze(-1)).expand(*outputs.shape, outputs.shape[-1])
        rows = outputs.shape[-1] * outputs.shape[-2]
        information = {} if self.scale is not None else {"scale": torch.full_like(outputs[..., 0, :1], 2.0 * rows)}
        return factor, information

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the mean of y, ``(..., n, out)``."""
        return outputs

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, out)``."""
        return (self._scale(outputs, parameters) ** 2).expand_as(outputs)

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, out)``."""
        return torch.special.ndtr((y - outputs) / self._scale(outputs, parameters))

    def sample(self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Draw y given the weights, ``(..., n, out)``."""
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        return outputs + self._scale(outputs, parameters) * noise

    def _scale(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        if self.scale is not None:
            return torch.as_tensor(self.scale, dtype=outputs.dtype, device=outputs.device)
        return parameters["scale"].unsqueeze(-2)  # (..., 1, 1)


@dataclass(frozen=True)
class HeteroscedasticGaussian:
    """y ~ N(m, s^2) with both from the network: 2 * targets outputs, the means and then the raw scales.

    Args:
        min_scale: added to softplus(raw scale), in units of y, so that no row is fitted with zero noise.
    """

    min_scale: float = 1e-3
    kind: Literal["regression"] = field(default="regression", init=False)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """None are learned beside the network."""
        return {}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, out / 2)``."""
        if n_outputs % 2:
            raise ValueError(f"HeteroscedasticGaussian needs 2 outputs a target (mean, raw scale), got {n_outputs}")
        return _real_targets(y, n_outputs // 2)

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

    def fisher_factor(self, outputs: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs."""
        raw = outputs.chunk(2, -1)[1]
        scale = self._scale(raw)
        root = torch.cat([1 / scale, math.sqrt(2) * torch.sigmoid(raw) / scale], -1)
        return torch.diag_embed(root), {}

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the mean of y, ``(..., n, targets)``."""
        return outputs.chunk(2, -1)[0]

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, targets)``."""
        return self._scale(outputs.chunk(2, -1)[1]) ** 2

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, targets)``."""
        mean, raw = outputs.chunk(2, -1)
        return torch.special.ndtr((y - mean) / self._scale(raw))

    def sample(self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Draw y given the weights, ``(..., n, targets)``."""
        mean, raw = outputs.chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self._scale(raw) * noise

    def _scale(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) + self.min_scale


def _labels(y: Tensor, n_classes: int) -> Tensor:
    """Return class labels as int64 ``(n,)``, checked."""
    y = y.squeeze(-1) if y.dim() == 2 and y.shape[1] == 1 else y
    if y.dim() != 1:
        raise ValueError(f"class labels must be (n,), got {tuple(y.shape)}")
    labels = y.long()
    wrong = ((labels != y) | (labels < 0) | (labels >= n_classes)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"label {y[row].item()} in row {row} is not one of the classes 0 to {n_classes - 1}")
    return labels


@dataclass(frozen=True)
class Categorical:
    """y ~ Categorical(softmax(outputs)); labels are 0 to out - 1."""

    kind: Literal["classification"] = field(default="classification", init=False)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """None are learned beside the network."""
        return {}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return the labels as int64 ``(n,)``."""
        if n_outputs < 2:
            raise ValueError("Categorical needs an output for every class; for one logit use Bernoulli")
        return _labels(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``."""
        index = y.expand(outputs.shape[:-1]).unsqueeze(-1)
        return outputs.gather(-1, index).squeeze(-1) - outputs.logsumexp(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs."""
        # Not softmax(-1): it is slow over a short axis that is not the fastest one.
        probs = (outputs - outputs.logsumexp(-1, keepdim=True)).exp()
        return F.one_hot(y, outputs.shape[-1]).to(outputs) - probs, {}

    def fisher_factor(self, outputs: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T = diag(p) - p p^T: with u = sqrt(p), R = diag(u) (I - u u^T)."""
        u = (0.5 * outputs.log_softmax(-1)).exp()
        return torch.diag_embed(u) - (u * u).unsqueeze(-1) * u.unsqueeze(-2), {}

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the class probabilities, ``(..., n, classes)``."""
        return outputs.softmax(-1)


@dataclass(frozen=True)
class Bernoulli:
    """y ~ Bernoulli(sigmoid(output)); one output, labels 0 and 1."""

    kind: Literal["classification"] = field(default="classification", init=False)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """None are learned beside the network."""
        return {}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return the labels as int64 ``(n,)``."""
        if n_outputs != 1:
            raise ValueError(f"Bernoulli needs a network with one output, got {n_outputs}; use Categorical")
        return _labels(y, 2)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``."""
        logit = outputs.squeeze(-1)
        return F.logsigmoid(torch.where(y == 1, logit, -logit))

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs."""
        return y.unsqueeze(-1) - torch.sigmoid(outputs), {}

    def fisher_factor(self, outputs: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T = p (1 - p)."""
        return (0.5 * (F.logsigmoid(outputs) + F.logsigmoid(-outputs))).exp().unsqueeze(-1), {}

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the class probabilities, ``(..., n, 2)``."""
        p = torch.sigmoid(outputs)
        return torch.cat([1 - p, p], -1)
