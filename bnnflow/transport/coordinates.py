"""The posterior in the coordinates in which the source is N(0, I): where every flow lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnflow.model import BayesianModel
from bnnflow.model.arrowhead import Arrowhead
from bnnflow.model.factored import BorderedFactor, ClosedFactor, Factor, MatrixFactor
from bnnflow.model.fused import plain
from bnnflow.model.priors.flat import Placed
from bnnflow.transport.source import Source

__all__ = ["Context"]


class Context:
    """What a likelihood-informed velocity may ask of a model, in the coordinates x of a source.

    With theta = from_normal(x), u(x) = log posterior(x) - log N(x; 0, I) up to a constant. From the prior, at
    temperature 1, that is the log likelihood, since the prior's density and the Jacobian of the coordinates cancel.

    Args:
        model: the posterior.
        source: the law at t = 0; the prior if None.
        rows: use only these rows of the data, int64 ``(m,)``, with their likelihood scaled to that of all.

    Raises:
        ValueError: if the prior has no such coordinates.
    """

    def __init__(self, model: BayesianModel, source: Source | None = None, rows: Tensor | None = None) -> None:
        self.model, self.rows = model, rows
        self.source = Source(model.flat_prior) if source is None else source
        self.dim = model.dim
        self.kept: tuple[Tensor, Tensor, Any] | None = None  # where it was linearised last, see `linearised`
        self._last: _Point | None = None  # where it was asked last
        self._prior = model.flat_prior
        self._inverse_temperature = 1 / model.temperature
        self._scales = self._tensor_scales()
        self.excess = self._excess()

    def grad(self, x: Tensor) -> Tensor:
        """Return the gradient of u, ``(batch, dim) -> (batch, dim)``; differentiable again."""
        at = self._at(x)
        return self._finish(x, at, self.model.log_likelihood_grad(at.theta, self.rows))

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return u up to a constant and its gradient, ``(batch,)`` in float64 and ``(batch, dim)``."""
        point = self._point(x)
        if point.value_and_grad is not None:
            return point.value_and_grad
        at = point.at
        value, grad = self.model.log_likelihood_and_grad(at.theta, self.rows)
        value = value * self._inverse_temperature
        if self._inverse_temperature != 1:
            value = value + (self._inverse_temperature - 1) * self._prior.log_prob(at.theta)
        if not self.source.is_prior:
            value = value + 0.5 * (x.double().square() - at.z.double().square()).sum(-1)
        point.value_and_grad = value, self._finish(x, at, grad)
        return point.value_and_grad

    def _at(self, x: Tensor) -> Placed:
        """Return the same point in the coordinates of the prior."""
        return self._point(x).at

    def _point(self, x: Tensor) -> _Point:
        """Return what is computed of a point once; the last one is kept, as a step asks of it again and again."""
        if not plain(x):
            return _Point(x, self._prior.at(self.source.to_prior(x)))
        last = self._last
        if last is None or last.x.dtype != x.dtype or not torch.equal(last.x, x):
            x = x.clone()  # the caller's may change
            self._last = last = _Point(x, self._prior.at(self.source.to_prior(x)))
        return last

    @property
    def has_hessian(self) -> bool:
        """Whether `hessian` returns anything, at no cost."""
        return self.model.has_hessian

    @property
    def has_gauss_newton_slope(self) -> bool:
        """Whether `gauss_newton_slope` returns anything, at no cost."""
        return self.model.has_gauss_newton_slope

    def hessian(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the gradient of u and its Hessian, ``(batch, dim)`` and ``(batch, dim, dim)``, in closed form.

        None where the model has none.
        """
        if not self.has_hessian:
            return None
        at = self._at(x)
        grad, hessian = self.model.log_likelihood_hessian(at.theta, self.rows)  # type: ignore[misc]
        return self._finish(x, at, grad), self._finish_second(at, grad, at.slope.both(hessian))

    def gauss_newton_slope(self, x: Tensor, v: Tensor) -> Tensor | None:
        """Return the derivative of grad u - (A^T A + `excess`) v at fixed v, ``(batch, dim, dim)``.

        As in `gauss_newton`, in closed form. Row i is that of element i; the matrix is not symmetric. None where the
        model has none.
        """
        if not self.has_gauss_newton_slope:
            return None
        at, v = self._at(x), self.source.pull(v)
        slope = at.slope
        by_theta = slope.times(v)
        second = self.model.gauss_newton_slope(at.theta, by_theta, self.rows)
        assert second is not None
        if self._affine:
            return self._finish_second(at, torch.zeros_like(x), slope.both(second))
        # As x moves, so does the direction v in theta, and what is left of the gradient is pulled back differently.
        grad, factor = self.model.gauss_newton(at.theta, self.rows)
        left = grad - MatrixFactor(factor).transposed(MatrixFactor(factor).times(by_theta))
        turned = at.turn(v).right(factor.mT @ factor)
        return self._finish_second(at, left, slope.left(slope.right(second) - turned))

    def gauss_newton(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of u and a factor A, ``(batch, rows, dim)``: -u'' ~ A^T A + `excess`."""
        at = self._at(x)
        grad, factor = self.model.gauss_newton(at.theta, self.rows)
        factor = at.slope.right(factor) * self._inverse_temperature**0.5
        return self._finish(x, at, grad), self.source.pull(factor)

    def gauss_newton_factored(self, x: Tensor) -> tuple[Tensor, Factor | ClosedFactor]:
        """Return the same with A as its factors, where that is faster and, if something is tracked, differentiable."""
        at = self._at(x)
        if plain(x):
            slope, root = at.slope, self._inverse_temperature**0.5
            tempered = Arrowhead(root * slope.diagonal, None if slope.columns is None else root * slope.columns)
            closed = self.model.gauss_newton_closed(at.theta, tempered, self.source.pull, self.rows)
            if closed is not None:
                return self.value_and_grad(x)[1], closed
        if self._scales is not None:
            found = self.model.gauss_newton_factored(at.theta, self.rows)
            if found is not None:
                grad, weights, below = found
                weights = weights.scaled(self._scales)
                if below.shape[1] == 0:
                    return self._finish(x, at, grad), weights
                root = self._inverse_temperature**0.5 * (1.0 if self.source.root is None else self.source.root)
                own = root * at.slope.diagonal[:, self.model.spec.network.dim :]
                return self._finish(x, at, grad), BorderedFactor(weights, own * below)
        grad, matrix = self.gauss_newton(x)
        return grad, MatrixFactor(matrix)

    def gauss_newton_residual(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return b ``(batch, rows)`` and r ``(batch, dim)`` with grad u = A^T b + r, r None where it is zero.

        A as in `gauss_newton`; None as in `BayesianModel.gauss_newton_residual`.
        """
        at = self._at(x)
        found = self.model.gauss_newton_residual(at.theta, self.rows)
        if found is None:
            return None
        bare = self.source.is_prior and self._inverse_temperature == 1
        return found * self._inverse_temperature**0.5, None if bare else self._finish(x, at, torch.zeros_like(x))

    def gauss_newton_product(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the gradient of u and the function v -> H v, ``(batch, dim)``, of the same matrix, never formed."""
        at, source = self._at(x), self.source
        grad, product = self.model.gauss_newton_product(at.theta, self.rows)

        def times(v: Tensor) -> Tensor:
            by_theta = product(at.push(source.pull(v))) * self._inverse_temperature
            image = source.pull(at.pull(by_theta))
            return image if self.excess is None else image + self.excess_times(v)

        return self._finish(x, at, grad), times

    def excess_times(self, v: Tensor) -> Tensor:
        """Return `excess` v, ``(batch, dim)``."""
        assert self.excess is not None
        return self.excess * v if self.excess.dim() == 0 else v @ self.excess

    def _finish(self, x: Tensor, at: Placed, grad: Tensor) -> Tensor:
        """Turn the gradient of the log likelihood by theta into that of u by x."""
        grad = self._by_prior(at, grad)
        return grad if self.source.is_prior else self.source.pull(grad - at.z) + x

    def _finish_second(self, at: Placed, grad: Tensor, second: Tensor) -> Tensor:
        """Turn the second derivative by z of the log likelihood alone into that of u by x, in its memory.

        Args:
            at: the point in the coordinates of the prior.
            grad: the gradient by theta that belongs to it.
            second: its derivative by theta, carried to z.
        """
        second.mul_(self._inverse_temperature)
        if self._inverse_temperature != 1:  # with the curvature of the prior
            self._prior.bend_of(lambda z: self._by_prior(self._prior.at(z), grad), at.z).add_to(second)
        elif not self._affine:
            at.bend(grad).add_to(second)
        if not self.source.is_prior:
            second.diagonal(dim1=-2, dim2=-1).sub_(1)
            second = self.source.pull(self.source.pull(second).mT).mT  # root (. - I) root
            second.diagonal(dim1=-2, dim2=-1).add_(1)
        return second

    @property
    def _affine(self) -> bool:
        """Whether theta is an affine function of x."""
        return self._prior.scale is not None

    def _by_prior(self, at: Placed, grad: Tensor) -> Tensor:
        """Temper the gradient of the log likelihood by theta, and turn it into one by z."""
        grad = grad * self._inverse_temperature
        if self._inverse_temperature != 1:
            grad = grad + (self._inverse_temperature - 1) * self._prior.log_prob_and_grad(at.theta)[1]
        return at.pull(grad)

    def _excess(self) -> Tensor | None:
        """Return what -u'' has beside the likelihood: root^2 / T - 1, a number or ``(dim, dim)``; None for nothing.

        At a temperature other than 1 the prior's own curvature is known where it is normal, and left out elsewhere.
        """
        excess, like = self.source.excess, {"dtype": self.source.dtype, "device": self.source.device}
        if self._inverse_temperature == 1 or self._prior.scale is None:
            return excess
        dense = excess is not None and excess.dim() > 0
        eye = torch.eye(self.dim, **like) if dense else torch.ones((), **like)
        square = eye if excess is None else excess + eye
        return self._inverse_temperature * square - eye

    def _tensor_scales(self) -> dict[str, float] | None:
        """Return d theta / d x, tempered, for every tensor of weights, if it is one number in each."""
        scale, root = self._prior.scale_of(self.model.spec.network.dim), self.source.root
        if scale is None or (root is not None and root.dim() > 0):
            return None
        tensors = {name: scale[where] for name, where in self.model.spec.network.slices.items()}
        if any(bool((values != values[0]).any()) for values in tensors.values()):
            return None
        factor = self._inverse_temperature**0.5 * (1.0 if root is None else float(root))
        return {name: factor * float(values[0]) for name, values in tensors.items()}

    def batch(self, size: int, generator: torch.Generator) -> Context:
        """Return the context with a random part of the data in place of all of them."""
        return self.on_rows(self.model.random_rows((), generator, size))

    def on_rows(self, rows: Tensor) -> Context:
        """Return the context with these rows of the data, ``(m,)`` or ``(batch, m)`` with a choice for each point."""
        return Context(self.model, self.source, rows)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Context:
        """Return the same context elsewhere."""
        rows = None if self.rows is None else self.rows.to(device)
        return Context(self.model.to(device, dtype), self.source.to(device, dtype), rows)


@dataclass
class _Point:
    """What is asked of a point x several times."""

    x: Tensor  # (batch, dim)
    at: Placed  # in the coordinates of the prior
    value_and_grad: tuple[Tensor, Tensor] | None = None
