"""Guidance: bend a flow towards a task that it was not fitted to, by the task's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from bnnflow.arguments import Count, Limit, checked
from bnnflow.model import BayesianModel
from bnnflow.transport.field import Field
from bnnflow.transport.paths import Coefficients
from bnnflow.transport.proximal_step import GradientSteps, LikelihoodScore
from bnnflow.transport.source import Source
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.weights import NO_SYMMETRY

__all__ = ["GuidedVelocity"]

Guide = BayesianModel | Callable[[Tensor], Tensor]


@checked
class GuidedVelocity(Field):
    """A field plus the pull of a task: approximately the field to p1(theta) exp(strength G(theta)).

    With the base field's estimate of x1 and of its spread, N(E[x1 | x_t], s^2 I), the pull is that
    of `ScoreVelocity`: score_gain(t) E[grad G(x1)], the expectation taken by `GradientSteps` on G.
    Exact to the accuracy of those steps where the base is the source itself; where the base knows
    x1 better than s, too strong late on.

    Args:
        field: the base.
        guide: a model of the task, whose log likelihood is G, or G itself:
            ``(batch, dim) weights -> (batch,)``.
        source: gives the coordinates.
        strength: a number, or a function of the time ``(batch,) -> (batch,)``; negative strengths
            repel.
        steps: gradient steps of the pull; 2 ``steps`` + 1 gradients of G an evaluation.
        max_norm: bound on the length of one such step, in standard deviations of the source.
    """

    def __init__(
        self,
        field: nn.Module,
        guide: Guide,
        source: Source,
        strength: float | Callable[[Tensor], Tensor] = 1.0,
        *,
        steps: Count = 2,
        max_norm: Limit = 2.0,
    ) -> None:
        super().__init__()
        self.field = Field.of(field)
        self.path, self.symmetries = self.field.path, NO_SYMMETRY
        self._guide, self._source, self._strength = guide, source, strength
        self._proximal_step = GradientSteps(steps, max_norm)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``."""
        t = t.expand(x.shape[0]).to(x.dtype)
        base = self.field(t, x)
        c = Coefficients(*(part.unsqueeze(-1) for part in self.path.coefficients(t)))
        _, x1 = self.path.ends(t, x, base)
        strength = (
            self._strength(t)
            if callable(self._strength)
            else torch.full_like(t, self._strength)
        )
        task = _Task(self._guide, self._source, strength.unsqueeze(-1))
        score: LikelihoodScore = self._proximal_step(task, x1, c.a * c.a / c.q)
        return base + c.score_gain * score.w

    @property
    def gradients(self) -> int:
        """Gradients of the likelihood, and of the guide, that an evaluation takes."""
        return self.field.gradients + self._proximal_step.gradients

    @property
    def informed(self) -> bool:
        """Whether the base looks at a posterior."""
        return self.field.informed

    @property
    def posterior(self) -> WhitenedPosterior | None:  # type: ignore[override]
        """What the base is bound to."""
        return self.field.posterior

    def bind(self, posterior: WhitenedPosterior | None) -> Self:
        """Return the same guidance of the base bound to another posterior, or to none."""
        other = copy.copy(self)
        other._modules = self._modules | {"field": self.field.bind(posterior)}
        return other


class _Task:
    """The gradient of strength * G by the flow's coordinates."""

    def __init__(self, guide: Guide, source: Source, strength: Tensor) -> None:
        self._guide, self._source, self._strength = guide, source, strength

    def grad(self, x: Tensor) -> Tensor:
        """Return it at ``(batch, dim)``; differentiable again."""
        at = self._source.prior.at(self._source.to_prior(x))
        if isinstance(self._guide, BayesianModel):
            grad = self._guide.log_likelihood_grad(at.theta)
        else:
            value, pullback, *_ = torch.func.vjp(self._guide, at.theta)
            (grad,) = pullback(torch.ones_like(value))
        return self._strength * self._source.vjp(at.vjp(grad))
