"""Powers of class probabilities, learned from rows that were left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Calibration"]

_SPREAD = 0.5  # standard deviation of the logarithm of a power, before rows are seen
_REACH = 1.5  # of that logarithm, at most
_POWERS = 31


@dataclass(frozen=True)
class Calibration:
    """Class probabilities p become the mean over powers a of p^a / sum p^a: temperature scaling
    (Guo et al. 2017) whose temperature 1 / a is not one number, but has a distribution.

    Attributes:
        powers: a, above 1 for probabilities that were not sure enough.
        weights: of each power; they sum to one.
        gain: what they win in log probability, summed over the rows that they were learned from.
        error: standard error of the gain.
    """

    powers: tuple[float, ...]
    weights: tuple[float, ...]
    gain: float = math.nan
    error: float = math.nan

    @classmethod
    def learned(cls, log_probs: Tensor, labels: Tensor) -> Self | None:
        """Return the posterior of a power that is log-normal around 1.

        Args:
            log_probs: of the classes, for rows that were left out, ``(n, classes)`` float64.
            labels: their classes, ``(n,)``.

        Returns:
            None where the gain is not above its standard error: probabilities are best left alone.
        """
        if len(labels) < 2:
            return None
        logs = torch.linspace(-_REACH, _REACH, _POWERS, dtype=torch.float64)
        index = labels.unsqueeze(1)
        scores = torch.stack(
            [_to_the(each, log_probs).gather(1, index).sum() for each in logs.exp()]
        )
        weights = (scores - 0.5 * (logs / _SPREAD).square()).softmax(0)
        made = cls(tuple(logs.exp().tolist()), tuple(weights.tolist()))
        gains = (made(log_probs) - log_probs).gather(1, index).squeeze(1)
        gain, error = float(gains.sum()), float(gains.std() * len(gains) ** 0.5)
        return cls(made.powers, made.weights, gain, error) if gain > error else None

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Turn log probabilities ``(..., classes)`` into calibrated ones."""
        parts = [
            _to_the(power, log_probs) + math.log(weight)
            for power, weight in zip(self.powers, self.weights, strict=True)
            if weight > 0
        ]
        return torch.stack(parts).logsumexp(0)

    @property
    def power(self) -> float:
        """The mean power."""
        return sum(a * w for a, w in zip(self.powers, self.weights, strict=True))

    def __str__(self) -> str:
        """Say what is done, and what it is worth."""
        return (
            f"probabilities to the power {self.power:.2f}, which leave-one-out prefers by "
            f"{self.gain:.1f} +- {self.error:.1f} nats"
        )

    def describe(self) -> dict[str, Any]:
        """Return the whole as plain values, from which ``Calibration(**...)`` is made again."""
        return {
            "powers": list(self.powers),
            "weights": list(self.weights),
            "gain": self.gain,
            "error": self.error,
        }

    @classmethod
    def from_description(cls, plain: dict[str, Any]) -> Self:
        """Rebuild it.

        Raises:
            ValueError: for what is none.
        """
        powers, weights = (tuple(map(float, plain[key])) for key in ("powers", "weights"))
        sound = len(powers) == len(weights) and all(0 < a < math.inf for a in powers)
        if not sound or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
            raise ValueError("a calibration is positive powers whose weights sum to one")
        return cls(powers, weights, float(plain["gain"]), float(plain["error"]))


def _to_the(power: Any, log_probs: Tensor) -> Tensor:
    return (power * log_probs).log_softmax(-1)
