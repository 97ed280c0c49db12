"""Batches of pairs for training: drawn one by one, or some together that are gone through several
times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnflow.arguments import Count, checked

__all__ = ["Batches", "Moves", "Reuse"]

POOL = 64  # batches that are drawn together if they are used again,
ELEMENTS = 2**28  # as far as they have no more numbers than these

Moves = Callable[..., tuple[Tensor, ...]]
"""``(seed, *points (n, dim)) -> points``: each row of all of them moved by one random symmetry."""


@checked
@dataclass(frozen=True)
class Reuse:
    """How often training uses what it has computed of a pair.

    Attributes:
        steps: that see each pair. Above 1 the field is called by its ``from_precomputed``.
        moves: a random symmetry for each row of points, targets and what was precomputed, to which
            the law of the pairs is invariant and ``precompute`` equivariant; made at every step if
            there are several.
    """

    steps: Count = 1
    moves: Moves | None = None


class Batches:
    """Batches of points with all that is computed once for each of them.

    Some batches are drawn together and gone through ``reuse`` times, every time in another order
    and moved by other symmetries; without reuse they are drawn one by one. The state of the
    generator before that is all that is needed to draw them again.

    Args:
        draw: a batch: times ``(n,)``, and tensors ``(n, dim)``.
        reuse: how many steps see a point, and how it is moved in between.
        generator: of the draws and of the orders.
        count: how many batches have been taken before, since the generator was new.
    """

    def __init__(
        self,
        draw: Callable[[], tuple[Tensor, ...]],
        reuse: Reuse,
        generator: torch.Generator,
        count: int,
    ) -> None:
        self._draw = draw
        self._reuse = reuse
        self._generator = generator
        self._points: list[Tensor] = []
        # rows and a seed of the batches to come, the next one last
        self._orders: list[tuple[Tensor, int]] = []
        # from which, with the count, the batches to come follow
        self.stream = generator.get_state()
        if reuse.steps > 1 and count:
            self._fill()
            left = len(self._orders) - count % len(self._orders)
            if left < len(self._orders):
                del self._orders[left:]
            else:  # the last ones were used up
                self._orders = []
                generator.set_state(self.stream)

    def take(self) -> list[Tensor]:
        """Return the next batch."""
        if self._reuse.steps == 1:
            batch = list(self._draw())
        else:
            if not self._orders:
                self._fill()
            rows, seed = self._orders.pop()
            t, *points = (part[rows] for part in self._points)
            batch = [
                t,
                *(
                    points
                    if self._reuse.moves is None
                    else self._reuse.moves(seed, *points)
                ),
            ]
        if not self._orders:
            self.stream = self._generator.get_state()
        return batch

    def _fill(self) -> None:
        """Draw the points of some batches, and the orders in which they come."""
        generator = self._generator
        with torch.no_grad():
            drawn = [self._draw()]
            many = max(1, min(POOL, ELEMENTS // sum(part.numel() for part in drawn[0])))
            drawn += [self._draw() for _ in range(many - 1)]
        self._points = [torch.cat(parts) for parts in zip(*drawn, strict=True)]
        n, device = len(self._points[0]), self._points[0].device
        orders = [
            torch.randperm(n, generator=generator, device=device)
            for _ in range(self._reuse.steps)
        ]
        rows = [each for order in orders for each in order.chunk(many)]
        seeds = torch.randint(2**62, (len(rows),), generator=generator, device=device)
        self._orders = list(zip(rows, seeds.tolist(), strict=True))
