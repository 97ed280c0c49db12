"""Optimisers of many points at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Adam", "cosine"]


class Adam:
    """The moments of Adam (Kingma and Ba 2015) over a batch of points, for climbing.

    Its steps have the size of the rate in units of the weights, and 1e-8 is in nats by these:
    networks for standardised data have weights of about one. In other units it may not arrive. So a
    method that needs a mode finds it by other means from here (`Laplace`), warms up, or says that
    it has not settled.
    """

    def __init__(self, theta: Tensor) -> None:
        self._first, self._second = torch.zeros_like(theta), torch.zeros_like(theta)
        self._steps = 0

    def step(self, theta: Tensor, grad: Tensor, rate: float) -> Tensor:
        """Return the points one step up the gradient; entries that are not finite count as zero."""
        self._steps += 1
        grad = torch.nan_to_num(grad, 0.0, 0.0, 0.0)
        self._first.lerp_(grad, 0.1)
        self._second.lerp_(grad.square(), 0.001)
        unbiased = self._first / (1 - 0.9**self._steps)
        return theta + rate * unbiased / (
            (self._second / (1 - 0.999**self._steps)).sqrt() + 1e-8
        )


def cosine(rate: float, step: int, steps: int) -> float:
    """Return a learning rate that falls to zero over ``steps`` steps, the first of which is 1."""
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
