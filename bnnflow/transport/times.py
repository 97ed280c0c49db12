"""At which times a field is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Beta as BetaDistribution

from bnnflow.arguments import Positive, Share, checked
from bnnflow.seeding import isolated

__all__ = ["Beta", "LogUniformNearEnd", "LogitNormal", "Times", "Uniform"]


class Times(Protocol):
    """A law of times in [0, 1)."""

    def sample(self, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw ``(n,)`` times with device and dtype of ``like``."""
        ...


@dataclass(frozen=True)
class Uniform:
    """All times alike."""

    def sample(self, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw ``(n,)`` times."""
        return torch.rand(n, generator=generator, device=like.device, dtype=like.dtype)


@checked
@dataclass(frozen=True)
class LogUniformNearEnd:
    """A share of the times log-uniform towards 1, where sharp posteriors have their error.

    The others uniform.

    Args:
        share: how many.
        decades: the nearest are 10^-decades before the end.
    """

    share: Share = 0.3
    decades: Positive = 2.0

    def sample(self, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw ``(n,)`` times."""
        u, which = torch.rand(
            2, n, generator=generator, device=like.device, dtype=like.dtype
        )
        return torch.where(which < 1 - self.share, u, 1 - 10 ** (-self.decades * u))


@checked
@dataclass(frozen=True)
class Beta:
    """Times t ~ Beta(a, b); a > b looks more at the end.

    Args:
        a: first shape, positive.
        b: second shape, positive.
    """

    a: Positive = 2.0
    b: Positive = 1.0

    def sample(self, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw ``(n,)`` times."""
        with isolated(generator):
            drawn = BetaDistribution(
                like.new_tensor(self.a), like.new_tensor(self.b)
            ).sample((n,))
        return _before_end(drawn)


@checked
@dataclass(frozen=True)
class LogitNormal:
    """Times whose logit is N(loc, scale^2) (Esser et al. 2024).

    Args:
        loc: mean of the logit; above 0 looks more at the end.
        scale: its standard deviation.
    """

    loc: float = 0.0
    scale: Positive = 1.0

    def sample(self, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw ``(n,)`` times."""
        noise = torch.randn(n, generator=generator, device=like.device, dtype=like.dtype)
        return _before_end(torch.sigmoid(self.loc + self.scale * noise))


def _before_end(t: Tensor) -> Tensor:
    return t.clamp(max=1 - torch.finfo(t.dtype).eps)
