"""Where the data pull an unfinished sample: approximations of the likelihood score E[grad u(x1) |
x_t].

With x0 ~ N(0, I), x_t = a x0 + b x1 and q = a^2 + b^2, the posterior of x1 given x_t is N(x1; mu,
s^2 I) exp(u(x1)) with mu = b x_t / q and s^2 = a^2 / q. Its mean is mu + s^2 w with w = E[grad
u(x1) | x_t] (Stein's identity). Both classes follow the mode y = mu + s^2 w instead, by iterating
on w itself, which stays finite where s vanishes. They are functions
``(posterior, mu, s2) -> (w, grad u(y))``, differentiable through every step: a density needs that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bnnflow.arguments import Count, Limit, Share, checked
from bnnflow.compiled import is_untracked_cpu
from bnnflow.model.factored import ClosedFactor, MatrixFactor
from bnnflow.transport.whitened import WhitenedPosterior

__all__ = ["GaussNewton", "GradientSteps", "LikelihoodScore", "ProximalStep", "Task"]


class LikelihoodScore(NamedTuple):
    """The pull of the data at one point of the path; ``(batch, dim)`` each."""

    w: Tensor  # proximal step over s^2
    grad: Tensor  # gradient of u at the displaced point


class ProximalStep(ABC):
    """``(posterior, mu (batch, dim), s2 (batch, 1)) -> LikelihoodScore``."""

    @property
    @abstractmethod
    def gradients(self) -> int:
        """Gradients of the likelihood, or systems of equations, that an evaluation takes."""

    @abstractmethod
    def __call__(
        self, posterior: WhitenedPosterior, mu: Tensor, s2: Tensor
    ) -> LikelihoodScore:
        """Return the likelihood score."""

    def with_jacobians(
        self, posterior: WhitenedPosterior, mu: Tensor, s2: Tensor
    ) -> tuple[LikelihoodScore, LikelihoodScore] | None:
        """Return the likelihood score and its derivatives by ``mu`` ``(batch, dim, dim)``.

        None if unknown.
        """
        return None


class Task(Protocol):
    """Anything with a gradient ``(batch, dim) -> (batch, dim)``, differentiable again."""

    def grad(self, x: Tensor) -> Tensor:
        """Return the gradient of u."""
        ...


# length of the finite difference, in standard deviations of the source: float32 needs it this long
_PROBE = 0.05


@checked
@dataclass(frozen=True)
class GradientSteps(ProximalStep):
    """Climb u(y) - |y - mu|^2 / (2 s^2) by gradient steps with momentum (Nesterov 1983).

    Each step is s^2 / (1 + s^2 lambda) times the residual, with lambda the positive part of the
    Rayleigh quotient of -u'' along it, by a finite difference: 2 ``steps`` + 1 gradients. The
    nearer to the top, the less is left for a network to learn. The quotient of one step alone jumps
    as its residual turns from point to point, and with it the field and its divergence. So the root
    of the sum of squares of s^2 lambda and ``memory`` times that of the step before takes its
    place, and momentum makes up for shorter steps.

    Args:
        steps: number of steps.
        max_norm: bound on the length of one step, in standard deviations of the source.
        memory: of curvatures, from one step to the next, from 0 to 1: more makes a smoother field
            of steps that reach less far.
    """

    steps: Count = 8
    max_norm: Limit = 1.0
    memory: Share = 0.9

    @property
    def gradients(self) -> int:
        """Two for each step, and one at the end."""
        return 2 * self.steps + 1

    def __call__(self, posterior: Task, mu: Tensor, s2: Tensor) -> LikelihoodScore:
        """Return the likelihood score."""
        w = before = torch.zeros_like(mu)
        curvature = torch.zeros_like(mu[:, :1])
        for step in range(self.steps):
            ahead = w + _momentum(step) * (w - before)
            grad = posterior.grad(mu + s2 * ahead)
            curvature = self._curvature(posterior, s2, mu, ahead, grad, curvature)
            w, before = (
                ahead + (grad - ahead) / self._divisor(s2, grad - ahead, curvature),
                w,
            )
        return LikelihoodScore(w, posterior.grad(mu + s2 * w))

    def with_jacobians(
        self, posterior: WhitenedPosterior, mu: Tensor, s2: Tensor
    ) -> tuple[LikelihoodScore, LikelihoodScore] | None:
        """Return the likelihood score, and the derivatives of both its parts by ``mu``,
        ``(batch, dim, dim)`` each.

        The same steps, beside each its derivative: a dense Hessian of u, and one product with that
        at the probe. None where `WhitenedPosterior.has_hessian` is false.
        """

        def gradient(w: Tensor, by_w: Tensor) -> tuple[Tensor, Tensor]:
            grad, hessian = posterior.at(mu + s2 * w).grad_and_hessian()  # type: ignore[misc]
            return grad, hessian @ _displaced(by_w, s2)

        if not posterior.has_hessian:
            return None
        w = before = torch.zeros_like(mu)
        by_w = by_before = mu.new_zeros(*mu.shape, mu.shape[-1])
        curvature, by_curvature = torch.zeros_like(mu[:, :1]), torch.zeros_like(mu)
        for step in range(self.steps):
            ahead = w + _momentum(step) * (w - before)
            by_ahead = torch.lerp(by_before, by_w, 1 + _momentum(step))
            grad, by_grad = gradient(ahead, by_ahead)
            values = (mu, ahead, grad, curvature)
            curvature, pullback, *_ = torch.func.vjp(
                lambda *at: self._curvature(posterior, s2, *at), *values
            )
            slope, of_ahead, of_grad, of_last = pullback(torch.ones_like(curvature))
            slope = (
                slope
                + MatrixFactor(by_ahead).transposed(of_ahead)
                + MatrixFactor(by_grad).transposed(of_grad)
            )
            by_curvature = slope + of_last * by_curvature
            residual, by_residual = grad - ahead, by_grad - by_ahead
            divisor, pullback, *_ = torch.func.vjp(
                lambda *at: self._divisor(s2, *at), residual, curvature
            )
            of_residual, of_curvature = pullback(torch.ones_like(divisor))
            # of the divisor
            slope = (
                MatrixFactor(by_residual).transposed(of_residual)
                + of_curvature * by_curvature
            )
            change, inverse = residual / divisor, (1 / divisor).unsqueeze(-1)
            moved = torch.addcmul(by_ahead, by_residual, inverse)
            moved.baddbmm_((change / divisor).unsqueeze(-1), slope.unsqueeze(-2), alpha=-1)
            w, before, by_w, by_before = ahead + change, w, moved, by_w
        grad, by_grad = gradient(w, by_w)
        return LikelihoodScore(w, grad), LikelihoodScore(by_w, by_grad)

    def _curvature(
        self, posterior: Task, s2: Tensor, mu: Tensor, w: Tensor, grad: Tensor, last: Tensor
    ) -> Tensor:
        """Return s^2 lambda at w, whose gradient is known, after that of the step before.

        ``(batch, 1)`` both.
        """
        residual = grad - w
        direction = residual / _square(residual).sqrt()
        change = (grad - posterior.grad(mu + s2 * w + _PROBE * direction)) * direction
        now = s2 * change.sum(-1, keepdim=True) / _PROBE
        # Smooth stand-ins for max(0, now), in the one of its two forms that takes no difference,
        # and for the larger of two: a kink would spoil the solver's order, and the root of zero has
        # no derivative.
        floor = 0.01 * s2 * s2 + 1e-12  # of s^2 lambda, a ratio of precisions
        size = now.abs() + (now * now + floor).sqrt()
        positive = 0.5 * torch.where(now > 0, size, floor / size)
        return (positive * positive + (self.memory * last) ** 2).sqrt()

    def _divisor(self, s2: Tensor, residual: Tensor, curvature: Tensor) -> Tensor:
        """Return what the residual is divided by, ``(batch, 1)``.

        A smooth stand-in for the bound on the step.
        """
        return (
            (1 + curvature) ** 2 + s2 * s2 * _square(residual) / self.max_norm**2
        ).sqrt()


def _displaced(by_w: Tensor, s2: Tensor) -> Tensor:
    """Return the derivative of mu + s^2 w by mu, given that of w."""
    by_y = s2.unsqueeze(-1) * by_w
    by_y.diagonal(dim1=-2, dim2=-1).add_(1)
    return by_y


def _momentum(step: int) -> float:
    """Return how far the last change is followed before the next."""
    return step / (step + 3)


@checked
@dataclass(frozen=True)
class GaussNewton(ProximalStep):
    """Solve the same problem with the likelihood linearised, (I + s^2 H) w = grad + s^2 H
    w_previous, H ~ -u''.

    H is the generalised Gauss-Newton matrix. Exact where the outputs are linear in the weights and
    the likelihood Gaussian. A dense step costs a Jacobian and a Cholesky factorisation of the
    smaller of dim and the number of rows times outputs; a matrix-free one about two gradients for
    each iteration of conjugate gradients, whatever the size.

    A step v promises by how much u changes, grad v - v H v / 2, and by how much its slope along v
    does, -v H v. As in a trust region, that is compared with what is found, over the first max_norm
    of it: with q^2 the sum of the squares of both differences over what it gains in all, the step
    is divided by sqrt(1 + r |v|^2 / max_norm^2), r = q^2 / (q^2 + 1/4). So a step that breaks its
    promise is bounded, and one that keeps it is not, however long: nothing is shortened where the
    likelihood is what it was linearised to. The difference in u alone changes its sign, and where
    it passes through zero the field would have a peak; both are zero together hardly anywhere else.

    Args:
        steps: number of steps.
        max_norm: bound on a step that breaks its promise, in standard deviations of the source.
        iterations: of conjugate gradients in a step, starting from the gradient; None for a dense
            solution.
    """

    steps: Count = 1
    max_norm: Limit = 3.0
    iterations: Count | None = None

    @property
    def gradients(self) -> int:
        """One for each step, and about two for each iteration of conjugate gradients in it."""
        return self.steps * (1 + 2 * (self.iterations or 0))

    def __call__(
        self, posterior: WhitenedPosterior, mu: Tensor, s2: Tensor
    ) -> LikelihoodScore:
        """Return the likelihood score.

        ``grad`` is the one before the last step, which costs nothing more.
        """
        w = torch.zeros_like(mu)
        grad = w
        for step in range(self.steps):
            y = mu if step == 0 else mu + s2 * w
            if self.iterations is None:
                linear = linearised(posterior, y, s2)
            else:
                linear = _MatrixFree(
                    *posterior.at(y).grad_and_product(), s2, self.iterations
                )
            grad, change = linear.grad, linear.change(w if step else None)
            w = w + change / self._shortened(posterior, y, s2, change, linear).divisor
        return LikelihoodScore(w, grad)

    def with_jacobians(
        self, posterior: WhitenedPosterior, mu: Tensor, s2: Tensor
    ) -> tuple[LikelihoodScore, LikelihoodScore] | None:
        """Return the likelihood score, and the derivatives of both its parts by ``mu``,
        ``(batch, dim, dim)`` each.

        The same dense steps, beside each its derivative. With c = w - w_previous before the bound,
        and v = s^2 c held fixed, (I + s^2 H) dc = d(grad - H v) - dw_previous: solved by weights
        always, see `Linearised.solve_each`. None for conjugate gradients, and where
        `WhitenedPosterior.has_gauss_newton_slope` is false.
        """
        if self.iterations is not None or not posterior.has_gauss_newton_slope:
            return None
        w = grad = torch.zeros_like(mu)
        by_w = by_grad = mu.new_zeros(*mu.shape, mu.shape[-1])
        for step in range(self.steps):
            first, y, by_y = step == 0, mu + s2 * w, _displaced(by_w, s2)
            linear = linearised(posterior, y, s2)
            wide = (
                linear
                if linear.by_weights
                else Linearised(posterior, y, s2, by_weights=True)
            )
            grad, change = linear.grad, linear.change(None if first else w)
            slope = posterior.at(y).slope(s2 * change)
            assert slope is not None
            by_change = wide.solve_each(
                slope if first else torch.baddbmm(by_w, slope, by_y, beta=-1)
            )
            bound = self._shortened(posterior, y, s2, change, linear)
            by_point, by_step = self._slopes(posterior, y, bound, slope)
            along = MatrixFactor(by_y).transposed(by_point) + s2 * MatrixFactor(
                by_change
            ).transposed(by_step)
            by_w = torch.addcmul(by_w, by_change, (1 / bound.divisor).unsqueeze(-1))
            by_w.baddbmm_(
                (change / bound.divisor**2).unsqueeze(-1), along.unsqueeze(-2), alpha=-1
            )
            w = w + change / bound.divisor
            if step == self.steps - 1:
                hessian = posterior.at(y).grad_and_hessian()
                assert hessian is not None
                by_grad = hessian[1] if first else hessian[1] @ by_y
        return LikelihoodScore(w, grad), LikelihoodScore(by_w, by_grad)

    def _shortened(
        self,
        posterior: WhitenedPosterior,
        y: Tensor,
        s2: Tensor,
        change: Tensor,
        linear: Linearised | _MatrixFree,
    ) -> _Shortened:
        """Compare what a step from y to y + s^2 change promises with what its first part does."""
        length2 = _dot(s2 * change, s2 * change) / self.max_norm**2
        part = (1 + length2).rsqrt().to(y.dtype)
        change = part * change
        step = s2 * change
        image = linear.times(step)
        bend, promised = _dot(step, image), _dot(step, linear.grad)
        before, _ = posterior.value_and_grad(y)
        after, grad = posterior.value_and_grad(y + step)
        gain = 1 + 0.5 * (_dot(step, change) + bend)
        rise = grad - linear.grad
        broken = ((after - before).unsqueeze(-1) - (promised - 0.5 * bend)) / gain
        turned = (_dot(step, rise) + bend) / gain
        broken, turned = broken.clamp(-_WORST, _WORST), turned.clamp(-_WORST, _WORST)
        square = broken.square() + turned.square()
        divisor = (1 + length2 * square / (square + _HALF**2)).sqrt().to(y.dtype)
        return _Shortened(
            divisor, broken, turned, length2, gain, part, step, rise, image, change
        )

    def _slopes(
        self, posterior: WhitenedPosterior, y: Tensor, bound: _Shortened, slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the divisor by y and by the whole step, ``(batch, dim)`` both.

        The slope is that of grad u - H w for the whole step w. With G = u'', w slope = w G less the
        slope of w H w.
        """
        divisor, broken, turned, length2, gain, part, step, rise, image, change = bound
        _, vjp, *_ = torch.func.vjp(posterior.grad, torch.cat([y, y + step]))
        # G v at both ends; G is symmetric
        curved, beyond = vjp(torch.cat([step, step]))[0].chunk(2)
        # of v H v / 2 by y
        inward = 0.5 * part * (curved - MatrixFactor(slope).transposed(step))
        square = broken.square() + turned.square()
        share = square / (square + _HALF**2)
        scale = (length2 * _HALF**2 / (square + _HALF**2).square() / gain).to(y.dtype)
        q, p, whole, norm2 = (
            broken.to(y.dtype),
            turned.to(y.dtype),
            step / part,
            self.max_norm**2,
        )
        by_y = q * (rise - curved + inward - q * inward)
        by_y = scale * (by_y + p * (beyond - curved + 2 * inward - p * inward))
        by_part = q * (rise + image - q * (change + image))
        by_part = scale * (by_part + p * (rise + beyond + 2 * image - p * (change + image)))
        bent = part**3 * _dot(by_part, whole).to(y.dtype) / norm2
        by_step = part * by_part - bent * whole + share.to(y.dtype) * whole / norm2
        return by_y / divisor, by_step / divisor


class _Shortened(NamedTuple):
    """What a step is divided by, and what that is made of; see `GaussNewton`.

    ``(batch, 1)``, in float64 between the divisor and the part, and ``(batch, dim)``.
    """

    divisor: Tensor
    broken: Tensor  # the promise of u, by this of the gain
    turned: Tensor  # that of its slope
    length2: Tensor  # |v|^2 / max_norm^2 of the whole step
    # what the part gains if it keeps its promise, and one nat: rounding of u breaks no promise
    gain: Tensor
    # of the step that is tried: no more than max_norm, beyond which u may not be finite
    part: Tensor
    step: Tensor  # that part, v
    rise: Tensor  # of the gradient on its way
    image: Tensor  # H v
    change: Tensor  # v / s^2


_HALF = 0.5  # of the gain: a promise broken by so much counts by half
_WORST = 1e6  # times the gain, from where a broken promise counts in full to the last digit
# how often a solution for rows is: of many rows the first is off by the condition times the
# precision
_REFINED = 2
# elements of the matrices that are made at once: what the caches of a CPU hold
BLOCK = 2**20


class Linearised:
    """The likelihood linearised at a point: its gradient, and H = A^T A + E with E None, a number
    or ``(dim, dim)``.

    Args:
        posterior: the posterior.
        x: the point, ``(batch, dim)``.
        s2: variances, ``(batch, 1)``.
        by_weights: solve the system of dim even where that of rows is smaller, as `solve_each`
            does.
    """

    def __init__(
        self,
        posterior: WhitenedPosterior,
        x: Tensor,
        s2: Tensor,
        *,
        by_weights: bool = False,
    ) -> None:
        self.grad, factor = posterior.at(x).factored
        self._residual = posterior.at(x).residual
        self._posterior, self._precision_shift, self._s2 = (
            posterior,
            posterior.precision_shift,
            s2,
        )
        self._scale: Tensor | None = None
        precision_shift, rows, dim = self._precision_shift, factor.rows, x.shape[-1]
        dense = precision_shift is not None and precision_shift.dim() > 0
        if precision_shift is not None and not dense:  # I + s^2 E is a number
            self._scale = 1 + s2 * precision_shift
            s2 = s2 / self._scale
        self._variance = s2.unsqueeze(-1)
        by_rows = not isinstance(factor, ClosedFactor) and rows < dim
        self.by_weights = (
            by_weights or not by_rows or (dense and isinstance(factor, MatrixFactor))
        )
        formed = isinstance(factor, ClosedFactor | MatrixFactor)
        self._factor = (
            MatrixFactor(factor.matrix) if self.by_weights and not formed else factor
        )  # type: ignore[union-attr]
        self._pairs = self._factor.pairs if isinstance(self._factor, ClosedFactor) else None
        idle = 0 if self._pairs is None else len(self._pairs.second)
        unknowns = dim - idle if self.by_weights else rows
        size = max(1, BLOCK // unknowns**2) if is_untracked_cpu(x, s2) else len(x)
        blocks = [
            self._root_of(slice(start, start + size))
            for start in range(0, max(1, len(x)), max(1, size))
        ]
        self.root = torch.cat(blocks) if len(blocks) > 1 else blocks[0]

    def _root_of(self, some: slice) -> Tensor:
        """Return the Cholesky factor of the system of these draws."""
        factor, variance, precision_shift = (
            self._factor,
            self._variance[some],
            self._precision_shift,
        )
        if self.by_weights:
            assert isinstance(factor, ClosedFactor | MatrixFactor)
            gram = (
                factor.normal(some)
                if isinstance(factor, MatrixFactor)
                else factor.compact_normal(some)
            )
        else:
            assert not isinstance(factor, ClosedFactor)
            gram = factor[some].gram()
        if precision_shift is not None and precision_shift.dim() > 0:
            gram = gram + precision_shift
        # into the memory that is there: fresh memory is expensive
        if is_untracked_cpu(gram, variance):
            gram.mul_(variance).diagonal(dim1=1, dim2=2).add_(1)
        else:
            gram = variance * gram + torch.eye(
                gram.shape[-1], dtype=gram.dtype, device=gram.device
            )
        return cholesky_or_nan(gram)

    def times(self, v: Tensor) -> Tensor:
        """Return H v, ``(batch, dim)``."""
        product = self._factor.transposed(self._factor.times(v))
        return (
            product
            if self._precision_shift is None
            else product + self._posterior.precision_shift_times(v)
        )

    def change(self, w: Tensor | None) -> Tensor:
        """Return (I + s^2 H)^-1 (grad - w), ``(batch, dim)``, what takes w to the solution.

        None is zero.

        The gradient of a sharp likelihood is far larger than the change: solved from it in float32,
        a step with 60 rows of noise 0.05 is off by half. So, if it is known as A^T b + r, the
        system is solved for b.
        """
        if self._residual is None:
            return self.solve(self.grad if w is None else self.grad - w)
        of_rows, rest = self._residual
        found = self._pulled(of_rows)
        if w is not None:
            rest = -w if rest is None else rest - w
        return found if rest is None else found + self.solve(rest)

    def solve(self, target: Tensor) -> Tensor:
        """Return (I + s^2 H)^-1 target, by the smaller of the two equivalent systems, refined
        once.
        """
        first = self._solved(target)
        return first + self._solved(target - first - self._s2 * self.times(first))

    def _solved(self, target: Tensor) -> Tensor:
        if self._scale is not None:
            target = target / self._scale
        if self.by_weights:
            return self._turned(
                target,
                lambda v: torch.cholesky_solve(v.unsqueeze(-1), self.root).squeeze(-1),
            )
        inner = self._solved_rows(self._factor.times(target))
        return target - self._variance.squeeze(-1) * self._factor.transposed(inner)

    def _turned(self, target: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        return solve(target) if self._pairs is None else self._pairs.solved(target, solve)

    def _pulled(self, rows: Tensor) -> Tensor:
        """Return (I + s^2 H)^-1 A^T rows, refined."""
        factor, s2 = self._factor, self._s2
        if self.by_weights:
            found = self._solved(factor.transposed(rows))
        else:
            found = factor.transposed(self._solved_rows(rows))
            found = found if self._scale is None else found / self._scale
        for _ in range(_REFINED):
            # sums over rows of what is small
            left = factor.transposed(rows - s2 * factor.times(found)) - found
            if self._precision_shift is not None:
                left = left - s2 * self._posterior.precision_shift_times(found)
            found = found + self._solved(left)
        return found

    def _solved_rows(self, rows: Tensor) -> Tensor:
        """Return (I + s^2 A A^T)^-1 rows, with s^2 over what `_scale` is."""
        half = torch.linalg.solve_triangular(self.root, rows.unsqueeze(-1), upper=False)
        return torch.linalg.solve_triangular(self.root.mT, half, upper=True).squeeze(-1)

    def solve_each(self, targets: Tensor) -> Tensor:
        """Return the same for many targets, ``(batch, dim, k)``; by weights only.

        The system of rows takes the difference of two matrices as large as the targets, of which
        too little is left in float32 where those are derivatives. Transposed: half as expensive as
        `torch.cholesky_solve`.
        """
        assert self.by_weights
        if self._scale is not None:
            targets = targets / self._scale.unsqueeze(-1)

        def solve(targets: Tensor) -> Tensor:
            half = torch.linalg.solve_triangular(
                self.root.mT, targets.mT, upper=True, left=False
            )
            return torch.linalg.solve_triangular(
                self.root, half, upper=False, left=False
            ).mT

        return self._turned(targets, solve)


def cholesky_or_nan(systems: Tensor) -> Tensor:
    """Return the Cholesky factors of systems I + s^2 H ``(batch, k, k)``, NaN where these are not
    finite.

    A sharp likelihood adds so much to the identity that rounding it takes away more than one, and
    the sum may be indefinite. As much as is rounded is then added to its diagonal, or ten times
    that if need be: what is solved with the factors is refined, and these draws alone lose
    something.
    """
    eye = torch.eye(systems.shape[-1], dtype=systems.dtype, device=systems.device)
    raised = systems
    for share in (1, 10, 100, 1000):
        try:
            return torch.linalg.cholesky(raised)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            failed = (torch.linalg.cholesky_ex(raised).info > 0)[:, None, None]
            trace = systems.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
            rounded = torch.finfo(systems.dtype).eps * trace * eye
            raised = torch.where(failed, systems + share * rounded, raised)
    factors, info = torch.linalg.cholesky_ex(raised)
    return torch.where((info > 0)[:, None, None], torch.nan, factors)


def linearised(posterior: WhitenedPosterior, x: Tensor, s2: Tensor) -> Linearised:
    """Return the linearisation at a point.

    That of the last one is kept, as target and field of a step share it.
    """
    if not is_untracked_cpu(x, s2):
        return Linearised(posterior, x, s2)
    kept = posterior.kept
    if (
        kept is None
        or kept[0].shape != x.shape
        or not (torch.equal(kept[0], x) and torch.equal(kept[1], s2))
    ):
        posterior.kept = kept = (x, s2, Linearised(posterior, x, s2))
    return kept[2]


@dataclass(frozen=True)
class _MatrixFree:
    """H by its products alone."""

    grad: Tensor
    times: Callable[[Tensor], Tensor]
    s2: Tensor
    iterations: int

    def change(self, w: Tensor | None) -> Tensor:
        """Approximate (I + s^2 H)^-1 (grad - w) by conjugate gradients.

        Differentiable through every iteration.
        """
        s2, residual = self.s2, self.grad if w is None else self.grad - w
        solution = torch.zeros_like(residual)
        # The 1e-30 stand for 0 / 0 where nothing is left: in units of the source no residual worth
        # a step is 1e-15.
        direction, size = residual, (residual * residual).sum(-1, keepdim=True)
        for _ in range(self.iterations):
            image = direction + s2 * self.times(direction)
            step = size / ((direction * image).sum(-1, keepdim=True) + 1e-30)
            solution = solution + step * direction
            residual = residual - step * image
            smaller = (residual * residual).sum(-1, keepdim=True)
            direction, size = residual + smaller / (size + 1e-30) * direction, smaller
        return solution


def _square(v: Tensor) -> Tensor:
    """Return squared lengths ``(batch, 1)``, in units of the source, N(0, I): 1e-6 of them is no
    length.
    """
    return (v * v).sum(-1, keepdim=True) + 1e-12


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products, ``(batch, 1)`` in float64."""
    return (a.double() * b).sum(-1, keepdim=True)
