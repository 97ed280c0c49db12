"""The posterior in the coordinates in which the source is N(0, I): where every flow lives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bnnflow.compiled import is_untracked_cpu
from bnnflow.model import BayesianModel
from bnnflow.model.arrowhead import Arrowhead
from bnnflow.model.curvature import Curvature
from bnnflow.model.factored import BorderedFactor, ClosedFactor, Factor, MatrixFactor
from bnnflow.model.priors.flat import Placed
from bnnflow.transport.source import Source

__all__ = ["WhitenedCurvature", "WhitenedPosterior"]


class WhitenedPosterior:
    """What a likelihood-informed velocity may ask of a model, in the coordinates x of a source.

    With theta = from_normal(x), u(x) = log posterior(x) - log N(x; 0, I) up to a constant. From the
    prior, at temperature 1, that is the log likelihood, since the prior's density and the Jacobian
    of the coordinates cancel.

    Args:
        model: the posterior.
        source: the law at t = 0; the prior if None.
        rows: use only these rows of the data, int64 ``(m,)``, with their likelihood scaled to that
            of all.

    Raises:
        ValueError: if the prior has no such coordinates.
    """

    def __init__(
        self, model: BayesianModel, source: Source | None = None, rows: Tensor | None = None
    ) -> None:
        self.model, self.rows = model, rows
        self.source = Source(model.flat_prior) if source is None else source
        self.dim = model.dim
        # where it was linearised last, see `linearised`
        self.kept: tuple[Tensor, Tensor, Any] | None = None
        self._last: WhitenedCurvature | None = None  # where it was asked last
        self.prior = model.flat_prior
        self.inverse_temperature = 1 / model.temperature
        self.scales = self._tensor_scales()
        self.precision_shift = self._precision_shift()

    def at(self, x: Tensor) -> WhitenedCurvature:
        """Return u around ``x`` ``(batch, dim)``.

        The last one is kept, as a step asks of it again and again.
        """
        if not is_untracked_cpu(x):
            return WhitenedCurvature(self, x)
        last = self._last
        if last is None or last.x.dtype != x.dtype or not torch.equal(last.x, x):
            # the caller's may change
            self._last = last = WhitenedCurvature(self, x.clone())
        return last

    def grad(self, x: Tensor) -> Tensor:
        """Return the gradient of u, ``(batch, dim) -> (batch, dim)``; differentiable again."""
        return self.at(x).grad

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return u up to a constant and its gradient, ``(batch,)`` in float64 and
        ``(batch, dim)``.
        """
        return self.at(x).value_and_grad

    @property
    def has_hessian(self) -> bool:
        """Whether `WhitenedCurvature.grad_and_hessian` is known, at no cost."""
        return self.model.has_hessian

    @property
    def has_gauss_newton_slope(self) -> bool:
        """Whether `WhitenedCurvature.slope` is known, at no cost."""
        return self.model.has_gauss_newton_slope

    def precision_shift_times(self, v: Tensor) -> Tensor:
        """Return `precision_shift` v, ``(batch, dim)``."""
        assert self.precision_shift is not None
        return (
            self.precision_shift * v
            if self.precision_shift.dim() == 0
            else v @ self.precision_shift
        )

    def _precision_shift(self) -> Tensor | None:
        """Return what -u'' has beside the likelihood: root^2 / T - 1, a number or ``(dim, dim)``.

        None for nothing.

        At a temperature other than 1 the prior's own curvature is known where it is normal, and
        left out elsewhere.
        """
        precision_shift, like = (
            self.source.precision_shift,
            {"dtype": self.source.dtype, "device": self.source.device},
        )
        if self.inverse_temperature == 1 or self.prior.scale is None:
            return precision_shift
        dense = precision_shift is not None and precision_shift.dim() > 0
        eye = torch.eye(self.dim, **like) if dense else torch.ones((), **like)
        square = eye if precision_shift is None else precision_shift + eye
        return self.inverse_temperature * square - eye

    def _tensor_scales(self) -> dict[str, float] | None:
        """Return d theta / d x, tempered, for every tensor of weights, if it is one number in
        each.
        """
        scale, root = self.prior.scale_of(self.model.spec.network.dim), self.source.root
        if scale is None or (root is not None and root.dim() > 0):
            return None
        tensors = {
            name: scale[where] for name, where in self.model.spec.network.slices.items()
        }
        if any(bool((values != values[0]).any()) for values in tensors.values()):
            return None
        factor = self.inverse_temperature**0.5 * (1.0 if root is None else float(root))
        return {name: factor * float(values[0]) for name, values in tensors.items()}

    def batch(self, size: int, generator: torch.Generator) -> WhitenedPosterior:
        """Return the posterior with a random part of the data in place of all of them."""
        return self.on_rows(self.model.random_rows((), generator, size))

    def on_rows(self, rows: Tensor) -> WhitenedPosterior:
        """Return the posterior with these rows of the data, ``(m,)`` or ``(batch, m)`` with a
        choice for each point.
        """
        return WhitenedPosterior(self.model, self.source, rows)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> WhitenedPosterior:
        """Return the same posterior elsewhere."""
        rows = None if self.rows is None else self.rows.to(device)
        return WhitenedPosterior(
            self.model.to(device, dtype), self.source.to(device, dtype), rows
        )


class WhitenedCurvature:
    """The curvature of a model's log likelihood, carried to the coordinates x of a whitened
    posterior.

    Its members are those of `Curvature`, of u in place of the log likelihood: -u'' ~ A^T A + E,
    with E the posterior's ``precision_shift``.

    Args:
        posterior: gives the coordinates and u.
        x: the point, ``(batch, dim)``.
    """

    def __init__(self, posterior: WhitenedPosterior, x: Tensor) -> None:
        self.x = x
        self._posterior = posterior
        self._source = posterior.source
        self._prior = posterior.prior
        self._inverse_temperature = posterior.inverse_temperature

    @cached_property
    def _at(self) -> Placed:
        """The same point in the coordinates of the prior."""
        return self._prior.at(self._source.to_prior(self.x))

    @cached_property
    def _likelihood(self) -> Curvature:
        """The curvature by the weights."""
        return self._posterior.model.at(self._at.theta, self._posterior.rows)

    @cached_property
    def grad(self) -> Tensor:
        """Gradient of u, ``(batch, dim)``."""
        posterior, theta = self._posterior, self._at.theta
        return self._carried(posterior.model.log_likelihood_grad(theta, posterior.rows))

    @cached_property
    def value_and_grad(self) -> tuple[Tensor, Tensor]:
        """U up to a constant and its gradient, ``(batch,)`` in float64 and ``(batch, dim)``."""
        posterior, at = self._posterior, self._at
        value, grad = posterior.model.log_likelihood_and_grad(at.theta, posterior.rows)
        value = value * self._inverse_temperature
        if self._inverse_temperature != 1:
            value = value + (self._inverse_temperature - 1) * self._prior.log_prob(at.theta)
        if not self._source.is_prior:
            value = value + 0.5 * (self.x.double().square() - at.z.double().square()).sum(
                -1
            )
        return value, self._carried(grad)

    # ---------------------------------------- Gauss-Newton

    def grad_and_factor(self) -> tuple[Tensor, Tensor]:
        """Return the gradient and the factor A as a matrix, ``(batch, rows, dim)``."""
        grad, factor = self._likelihood.grad_and_factor()
        factor = self._at.slope.right(factor) * self._inverse_temperature**0.5
        return self._carried(grad), self._source.vjp(factor)

    @cached_property
    def factored(self) -> tuple[Tensor, Factor | ClosedFactor]:
        """The same with A as its factors, where that is faster and, if something is tracked,
        differentiable.
        """
        if is_untracked_cpu(self.x):
            closed = self._likelihood.closed(self._tempered_slope, self._source.vjp)
            if closed is not None:
                return self.value_and_grad[1], closed
        scales = self._posterior.scales
        found = None if scales is None else self._likelihood.factored()
        if scales is None or found is None:
            grad, matrix = self.grad_and_factor()
            return grad, MatrixFactor(matrix)
        grad, weights, below = found
        weights = weights.scaled(scales)
        if below.shape[1] == 0:
            return self._carried(grad), weights
        root = self._inverse_temperature**0.5 * (
            1.0 if self._source.root is None else self._source.root
        )
        own = root * self._at.slope.diagonal[:, self._posterior.model.spec.network.dim :]
        return self._carried(grad), BorderedFactor(weights, own * below)

    @property
    def _tempered_slope(self) -> Arrowhead:
        (diagonal, columns, own), root = self._at.slope, self._inverse_temperature**0.5
        if self._source.root is not None and self._source.root.dim() > 0:
            own = None  # of x, every coordinate meets all others
        return Arrowhead(root * diagonal, None if columns is None else root * columns, own)

    @cached_property
    def residual(self) -> tuple[Tensor, Tensor | None] | None:
        """B ``(batch, rows)`` and r ``(batch, dim)`` with grad u = A^T b + r.

        R is None where it is zero.

        None as `Curvature.residual`.
        """
        found = self._likelihood.residual
        if found is None:
            return None
        bare = self._source.is_prior and self._inverse_temperature == 1
        rest = None if bare else self._carried(torch.zeros_like(self.x))
        return found * self._inverse_temperature**0.5, rest

    def grad_and_product(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the gradient and the function v -> (A^T A + E) v, ``(batch, dim)``, without a
        Jacobian.
        """
        posterior, source, at = self._posterior, self._source, self._at
        grad, product = self._likelihood.grad_and_product()

        def times(v: Tensor) -> Tensor:
            by_theta = product(at.jvp(source.vjp(v))) * self._inverse_temperature
            image = source.vjp(at.vjp(by_theta))
            return (
                image
                if posterior.precision_shift is None
                else image + posterior.precision_shift_times(v)
            )

        return self._carried(grad), times

    # ---------------------------------------- second derivatives

    def grad_and_hessian(self) -> tuple[Tensor, Tensor] | None:
        """Return the gradient and the Hessian of u, ``(batch, dim, dim)``, in closed form.

        None where none is known.
        """
        found = self._likelihood.grad_and_hessian()
        if found is None:
            return None
        grad, hessian = found
        return self._carried(grad), self._second(grad, self._at.slope.both(hessian))

    def slope(self, v: Tensor) -> Tensor | None:
        """Return the derivative of grad u - (A^T A + E) v at fixed v ``(batch, dim)``,
        ``(batch, dim, dim)``.

        In closed form; None where none is known. Row i is that of element i; the matrix is not
        symmetric.
        """
        if not self._posterior.has_gauss_newton_slope:
            return None
        at, v = self._at, self._source.vjp(v)
        by_theta = at.slope.times(v)
        second = self._likelihood.slope(by_theta)
        assert second is not None
        if self._affine:
            return self._second(torch.zeros_like(self.x), at.slope.both(second))
        # As x moves, so does the direction v in theta, and what is left of the gradient is pulled
        # back differently.
        grad, factor = self._likelihood.grad_and_factor()
        left = grad - MatrixFactor(factor).transposed(MatrixFactor(factor).times(by_theta))
        turned = at.turn(v).right(factor.mT @ factor)
        return self._second(left, at.slope.left(at.slope.right(second) - turned))

    # ---------------------------------------- change of coordinates

    @property
    def _affine(self) -> bool:
        """Whether theta is an affine function of x."""
        return self._prior.scale is not None

    def _carried(self, grad: Tensor) -> Tensor:
        """Turn the gradient of the log likelihood by theta into that of u by x."""
        grad = self._by_prior(self._at, grad)
        return (
            grad if self._source.is_prior else self._source.vjp(grad - self._at.z) + self.x
        )

    def _by_prior(self, at: Placed, grad: Tensor) -> Tensor:
        """Temper the gradient of the log likelihood by theta, and turn it into one by z."""
        grad = grad * self._inverse_temperature
        if self._inverse_temperature != 1:
            grad = (
                grad
                + (self._inverse_temperature - 1)
                * self._prior.log_prob_and_grad(at.theta)[1]
            )
        return at.vjp(grad)

    def _second(self, grad: Tensor, second: Tensor) -> Tensor:
        """Turn the second derivative by z of the log likelihood alone into that of u by x, in its
        memory.

        Args:
            grad: the gradient by theta that belongs to it.
            second: its derivative by theta, carried to z.
        """
        source, at = self._source, self._at
        second.mul_(self._inverse_temperature)
        if self._inverse_temperature != 1:  # with the curvature of the prior
            self._prior.bend_of(
                lambda z: self._by_prior(self._prior.at(z), grad), at.z
            ).add_to(second)
        elif not self._affine:
            at.bend(grad).add_to(second)
        if not source.is_prior:
            second.diagonal(dim1=-2, dim2=-1).sub_(1)
            second = source.vjp(source.vjp(second).mT).mT  # root (. - I) root
            second.diagonal(dim1=-2, dim2=-1).add_(1)
        return second
