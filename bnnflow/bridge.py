"""The optimal bridge between two densities of which draws are known (Bennett 1976; Meng and Wong
1996).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bennett"]

_BEYOND = 50.0  # nats around all log ratios between which the answer is sought
_HALVINGS = 100


def bennett(
    forward: Tensor, reverse: Tensor, weights: Tensor, shift: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve mean_q s(l - c + shift) = e^shift mean_p s(c - l - shift) for c, by bisection.

    l = log p - log q, both unnormalised, s is the logistic function and e^shift the number of draws
    of p over that of q. The root is the log of p's normaliser over q's: the fixed point of Meng and
    Wong's iteration.

    Args:
        forward: l at draws of q, ``(..., n)`` float64.
        reverse: l at draws of p, ``(..., m)``.
        weights: of the draws of p, ``(..., m)``, summing to one.
        shift: see above.

    Returns:
        c ``(...)``, and the logistic functions at the draws of q ``(..., n)`` and of p
        ``(..., m)``; c is NaN where one of the sides has no finite l.
    """

    def sides(value: Tensor) -> tuple[Tensor, Tensor]:
        value = value.unsqueeze(-1) - shift
        return (forward - value).sigmoid(), (value - reverse).sigmoid()

    both = torch.cat([forward, reverse], -1)
    finite = both.isfinite()
    low = torch.where(finite, both, torch.inf).amin(-1) - _BEYOND
    high = torch.where(finite, both, -torch.inf).amax(-1) + _BEYOND
    more = torch.as_tensor(shift).exp()
    for _ in range(_HALVINGS):
        value = 0.5 * (low + high)
        ours, theirs = sides(value)
        below = ours.mean(-1) > more * (weights * theirs).sum(-1)
        low, high = torch.where(below, value, low), torch.where(below, high, value)
    some = forward.isfinite().any(-1) & reverse.isfinite().any(-1)
    low = torch.where(some, low, torch.nan)
    return low, *sides(low)
