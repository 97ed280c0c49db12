"""Optimisers: of many points at once, and of the matrices of a network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Adam", "Muon", "cosine"]

_MOMENTUM = 0.95
_POLYNOMIAL = (3.4445, -4.775, 2.0315)  # steepest at zero (Jordan et al. 2024)


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


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose singular values are made about equal, in updates of
    the size of AdamW's (Liu et al. 2025).

    As ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, but in the parameters' own precision,
    and matrices of one shape together: torch computes in bfloat16, one by one, which on a processor
    without such instructions takes most of the time of a training.

    Args:
        parameters: matrices ``(rows, columns)``.
        lr: learning rate.
        weight_decay: share of a parameter that a step of rate one takes away.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        """Make a step along the gradients that are there."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kind = parameter.shape, parameter.dtype, parameter.device
                    alike[kind].append(parameter)
            for (shape, *_), parameters in alike.items():
                updates = _orthogonal(torch.stack([self._momentum(p) for p in parameters]))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-rate)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """Return the gradient, averaged over steps and one step ahead (Nesterov)."""
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        average = state["momentum_buffer"].lerp_(grad, 1 - _MOMENTUM)
        return grad.lerp(average, _MOMENTUM)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Move singular values of matrices ``(k, rows, columns)`` to about one, by five steps of a
    Newton-Schulz iteration.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return _orthogonal(matrices.mT).mT
    a, b, c = _POLYNOMIAL
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def cosine(rate: float, step: int, steps: int) -> float:
    """Return a learning rate that falls to zero over ``steps`` steps, the first of which is 1."""
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
