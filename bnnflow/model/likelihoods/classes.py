"""Likelihoods of classes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from bnnflow.arguments import checked
from bnnflow.model.likelihood import Kind, Likelihood, Score, labels_of
from bnnflow.model.likelihoods.shared import (
    Parameters,
)

__all__ = ["Bernoulli", "Categorical", "Ordinal"]


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
        # over a first axis: ten times as fast as over a short last one
        return outputs.transpose(-1, -2).contiguous().softmax(-2).transpose(-1, -2)


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
        return (0.5 * (F.logsigmoid(outputs) + F.logsigmoid(-outputs))).exp().unsqueeze(
            -1
        ), {}

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
        default_factory=lambda: td.LogNormal(
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

    def _margins(
        self, outputs: Tensor, y: Tensor, gap: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
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
