"""Targets of training with far less noise: the posterior's gradient and its symmetries in place of
one draw.

Flow matching regresses on the velocity of a pair, whose mean given x_t is the field. Anything else
with that mean does as well. A pair says nothing of what other draws could have come to the same
x_t: other signs and orders of the same hidden units, of which there are too many for chance, and
neighbours, of which the gradient of the posterior knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnnflow.transport.paths import AffinePath, Coefficients, ProbabilityPath
from bnnflow.transport.proximal_step import linearised
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["ROWS", "PosteriorTargets", "Units", "obeys_stein"]

_NODES = 24  # times at which the control is fitted, denser towards 1
_ROUNDS = 32  # of exchanges of units
_LAST = 1e-6  # least factor of x0 that is divided by
# of the data in a gradient, if there are more: its noise is one more that the control is fitted to
ROWS = 1024


class PosteriorTargets(ProbabilityPath):
    """A path for independent pairs whose targets have the same mean given x_t as its own, and less
    variance.

    Two steps. (1) The target is averaged over the orbit of x1: given x_t, the elements of the group
    that keeps the source are weighted by the density of x_t. Over signs of units the mean is a
    tanh; over their orders it is that of a few rounds of Gibbs sampling, which starts from a draw
    of that law, x1 itself. (2) With x1 ~ N(0, I) exp(u(x1)),
    ``score_gain * grad u(x1) + drift * x_t`` has the mean of the field as well (Stein's identity;
    target score matching, De Bortoli et al. 2024). Its noise vanishes towards t = 1, where that of
    a pair does not. The difference of both, of mean zero, is a control variate; with ``newton`` it
    is multiplied by (I + s^2 H)^-1 first, H the Gauss-Newton matrix at the mean of the pairs that
    pass through x_t, which makes the target of a Gaussian posterior free of noise. The number by
    which it counts depends on time alone and is fitted to draws beforehand.

    Unbiased only where x1 are draws of the posterior and independent of x0.

    Args:
        path: whose pairs these are, with ``sigma`` = 0.
        posterior: the posterior.
        group: symmetries that keep the source and the posterior.
        x1: draws of the posterior ``(n, dim)``, to fit the control to.
        generator: of the pairs that it is fitted to.
        newton: precondition by the curvature: for sharp posteriors of a few hundred rows or
            weights.

    Raises:
        ValueError: if the path has noise of its own.
    """

    def __init__(
        self,
        path: AffinePath,
        posterior: WhitenedPosterior,
        group: Symmetries,
        x1: Tensor,
        generator: torch.Generator,
        *,
        newton: bool = False,
    ) -> None:
        if path.sigma:
            raise ValueError("informed targets need a path with sigma = 0")
        self._path, self._posterior, self._newton = path, posterior, newton
        self._units = _units(posterior.model.spec, group, x1.device)
        self._nodes = (
            1
            - (1 - torch.linspace(0, 1, _NODES, device=x1.device, dtype=x1.dtype)).square()
        )
        self.shares = self._fitted(x1, generator)

    def point(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return where each pair is at its time and a target there, ``(batch, dim)`` both, for t
        ``(batch,)``.
        """
        x_t, target, control = self._parts(x0, x1, t, generator)
        return x_t, target + self._share(t).unsqueeze(-1) * control

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return what squared errors at t count, in the shape of ``t``.

        Up to a floor and a ceiling, b / (a (a b' - a' b)): the integral of errors so weighted
        bounds the divergence of a stochastic flow from the posterior (Song et al. 2021). The noise
        of pairs would not allow it.
        """
        c = self._path.coefficients(t)
        return 0.1 + (c.b / (c.a * c.wronskian)).clamp(max=10)

    def _parts(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t, the target averaged over the orbit, and the control variate."""
        c = self._path.coefficients(t.unsqueeze(-1))
        x_t, velocity = c.a * x0 + c.b * x1, c.da * x0 + c.db * x1
        c = c._replace(a=c.a.clamp(min=_LAST))
        means = self.averaged(
            x_t, x1, self.on_some_rows(generator, len(x1)).grad(x1), c, generator
        )
        target = velocity + c.wronskian / c.a * (means[0] - x1)
        control = c.drift * x_t + c.score_gain * means[1] - target
        if self._newton:
            control = linearised(
                self.on_some_rows(generator), x_t * c.b / c.q, c.a * c.a / c.q
            ).solve(control)
        return x_t, target, control

    def on_some_rows(self, generator: torch.Generator, *batch: int) -> WhitenedPosterior:
        """Return the posterior with random rows of large data, others for each of a batch."""
        posterior = self._posterior
        if len(posterior.model.x) <= ROWS or posterior.rows is not None:
            return posterior
        return posterior.on_rows(posterior.model.random_rows(batch, generator, ROWS))

    def averaged(
        self,
        x_t: Tensor,
        x1: Tensor,
        grad: Tensor,
        c: Coefficients,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the means of x1 and of its gradient over the orbit given x_t,
        ``(2, batch, dim)``.
        """
        now = torch.stack([x1, grad])
        if not self._units:
            return now
        total = torch.zeros_like(now)
        for units in self._units:  # each given the others, which then move on
            mean, now = units.average(x_t * (c.b / (c.a * c.a)), now, generator)
            total = total + mean
        return total / len(self._units)

    def _share(self, t: Tensor) -> Tensor:
        """Return how much of the control variate is added at each time."""
        position = (1 - (1 - t).clamp(min=0).sqrt()) * (_NODES - 1)
        left = position.long().clamp(max=_NODES - 2)
        return torch.lerp(self.shares[left], self.shares[left + 1], position - left)

    def _fitted(self, x1: Tensor, generator: torch.Generator) -> Tensor:
        """Return the shares with the least variance at the nodes."""
        per_node = 32 if self._newton else 128
        rows = torch.randint(
            len(x1), (_NODES * per_node,), generator=generator, device=x1.device
        )
        x0 = torch.randn(
            len(rows), x1.shape[1], generator=generator, device=x1.device, dtype=x1.dtype
        )
        times = self._nodes.clamp(max=1 - 1e-3).repeat_interleave(per_node)
        products, squares = [], []
        for some in torch.arange(len(rows), device=x1.device).split(256):
            x_t, target, control = self._parts(
                x0[some], x1[rows[some]], times[some], generator
            )
            c = self._path.coefficients(times[some].unsqueeze(-1))
            products.append(((target - c.drift * x_t) * control).sum(-1))
            squares.append((control * control).sum(-1))
        product, square = (
            torch.cat(each).unflatten(0, (_NODES, per_node)).sum(1)
            for each in (products, squares)
        )
        return (-product / square.clamp(min=torch.finfo(square.dtype).tiny)).clamp(0, 1)


def obeys_stein(posterior: WhitenedPosterior, x1: Tensor) -> bool:
    """Say whether draws ``(n, dim)`` obey Stein's identity of the posterior, E[x .

    Grad log p(x)] = -dim.

    Up to a tenth and four standard errors, taken as if the draws were independent.
    """
    x = x1[torch.linspace(0, len(x1) - 1, min(len(x1), 2048)).long()]
    products = torch.cat(
        [(part * (posterior.grad(part) - part)).sum(-1) for part in x.split(256)]
    ).double()
    error = (
        products.std() / len(products) ** 0.5
        if len(products) > 1
        else products.abs().mean()
    )
    dim = x.shape[1]
    return bool((products.mean() + dim).abs() <= 0.1 * dim + 4 * error)


@dataclass(frozen=True)
class Units:
    """The weights of the units of one hidden layer.

    Attributes:
        signed: places of the weights that a sign acts on, ``(width, k)``; k may be 0.
        still: places of the others that belong to a unit, ``(width, m)``.
        permuted: whether units may change places.
    """

    signed: Tensor
    still: Tensor
    permuted: bool

    def average(
        self, tilt: Tensor, values: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Average over the orbit, and move to a random element of it.

        Args:
            tilt: b x_t / a^2, ``(batch, dim)``: its product with an element of the orbit is the
                element's log weight.
            values: x1 and what moves along with it, ``(2, batch, dim)``.
            generator: of the moves.

        Returns:
            The means and the moved values, ``(2, batch, dim)`` each.
        """
        # (2, batch, width, k)
        flip, stay = (
            values[..., self.signed],
            values[..., self.still],
        )
        turns = tilt[:, self.signed] @ flip[0].mT  # (batch, place, unit)
        weights = _log_cosh(turns) + tilt[:, self.still] @ stay[0].mT
        share, order = self._exchanged(weights, generator)
        mean, moved = values.clone(), values.clone()
        mean[..., self.signed] = (share * turns.tanh()) @ flip
        mean[..., self.still] = share @ stay
        turn = turns.gather(2, order.unsqueeze(-1)).squeeze(-1)
        u = torch.rand(turn.shape, generator=generator, device=turn.device)
        sign = torch.where(u < (2 * turn).sigmoid(), 1, -1)
        index = order[None, :, :, None]
        moved[..., self.signed] = sign.unsqueeze(-1) * flip.gather(2, index.expand_as(flip))
        moved[..., self.still] = stay.gather(2, index.expand_as(stay))
        return mean, moved

    def _exchanged(
        self, weights: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Gibbs sampling of orders by exchanges of pairs, all pairs of a random pairing at once.

        Returns:
            How often which unit stood at each place, ``(batch, place, unit)``, and the last order
            ``(batch, place)``.
        """
        batch, width, _ = weights.shape
        order = torch.arange(width, device=weights.device).expand(batch, width)
        share = torch.eye(width, dtype=weights.dtype, device=weights.device).repeat(
            batch, 1, 1
        )
        if not self.permuted or width == 1:
            return share, order
        places = torch.arange(width, device=weights.device)
        # the last one of an odd number stays alone
        beside = (places ^ 1).clamp(max=width - 1)
        own, one = (
            weights.diagonal(dim1=1, dim2=2),
            weights.new_ones(()).expand(batch, width, 1),
        )
        for _ in range(_ROUNDS):
            shuffled = torch.randperm(width, generator=generator, device=weights.device)
            partner = torch.empty_like(shuffled)
            partner[shuffled] = shuffled[beside]
            exchanged = order[:, partner]
            other = weights.gather(2, exchanged.unsqueeze(-1)).squeeze(-1)
            gain = other - own
            u = torch.rand(batch, width, generator=generator, device=weights.device)
            u = torch.where(places < partner, u, u[:, partner])  # one for both of a pair
            swap = u < (gain + gain[:, partner]).sigmoid()
            order, own = torch.where(swap, exchanged, order), torch.where(swap, other, own)
            share.scatter_add_(2, order.unsqueeze(-1), one)
        return share / (1 + _ROUNDS), order


def _units(spec: WeightSpec, group: Symmetries, device: torch.device) -> list[Units]:
    """Find the weights of every hidden layer's units.

    Layers with weights between their own units are left out.
    """
    found = []
    for label, width in spec.widths.items():
        signed, still = [], []
        tangled = False
        for name, where in spec.slices.items():
            shape, axes = spec.unit_axes(name)
            places = torch.arange(where.start, where.stop, device=device).reshape(shape)
            tangled = tangled or axes.count(label) > 1
            if label in axes:
                axis = axes.index(label)
                flips = label in group.sign and spec.scale_exponents(name)[axis] != 0
                (signed if flips else still).append(
                    places.movedim(axis, 0).reshape(width, -1)
                )
        if not tangled and (label in group.permutation or label in group.sign):
            empty = torch.empty(width, 0, dtype=torch.long, device=device)
            weights = (torch.cat([empty, *signed], 1), torch.cat([empty, *still], 1))
            found.append(Units(*weights, label in group.permutation))
    return found


def _log_cosh(x: Tensor) -> Tensor:
    """Return log cosh up to a constant."""
    size = x.abs()
    return size + torch.log1p((-2 * size).exp())
