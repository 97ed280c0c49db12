"""Curvature of the log likelihood around some weights, each part computed when it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from functools import cached_property

import torch
from torch import Tensor

from bnnflow.forward_mode import jvp
from bnnflow.model.arrowhead import Arrowhead
from bnnflow.model.factored import ClosedFactor, FactoredJacobian
from bnnflow.model.hessian import OutputDerivatives
from bnnflow.model.log_joint import LogJoint
from bnnflow.model.network import ChainNetwork, Pullback

__all__ = ["Curvature"]


class Curvature:
    """The log likelihood around weights ``theta``: gradient, Gauss-Newton matrix, Hessian.

    The Gauss-Newton matrix of -log likelihood is A^T A. Its factor A ``(batch, rows, dim)`` is the
    network's Jacobian times a square root of the likelihood's Fisher information. What comes with a
    gradient has that of its own forward pass, equal to `grad` up to rounding. What takes little
    memory is computed once, matrices whenever they are asked for.

    Args:
        density: of the data given the weights.
        theta: ``(batch, dim)``.
        rows: use only these rows of the data, int64 ``(m,)``, scaled to all of them; for a Hessian
            also ``(batch, m)``.

    Raises:
        ValueError: if theta or rows has the wrong shape or dtype.
    """

    def __init__(
        self, density: LogJoint, theta: Tensor, rows: Tensor | None = None
    ) -> None:
        self._density = density
        self._spec = density.spec
        self._network = density.network
        self._likelihood = density.likelihood
        self.theta, self._rows, self._scale = density.batch(theta, rows)

    @cached_property
    def _x(self) -> Tensor:
        # The very tensor where all rows are used, by which a linearised network knows it.
        return self._density.x if self._rows is None else self._density.x[self._rows]

    @cached_property
    def _y(self) -> Tensor:
        return self._density.y if self._rows is None else self._density.y[self._rows]

    @cached_property
    def _parameters(self) -> dict[str, Tensor]:
        return self._density.parameters(self.theta)

    @cached_property
    def grad(self) -> Tensor:
        """Gradient of the log likelihood, ``(batch, dim)``."""
        return self._density.log_likelihood_grad(self.theta, self._rows)

    # ---------------------------------------- the Gauss-Newton factor

    def grad_and_factor(
        self, names: Collection[str] | None = None, changes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient ``(batch, dim)``, and the factor A ``(batch, rows, dim)`` as a
        matrix.

        Args:
            names: take the derivatives by these tensors of the network only, in the order of theta;
                the parameters of prior and likelihood follow them all the same.
            changes: of the weights that the derivatives are by, ``(k, weights)``: the Fisher
                information is averaged over the outputs that the linearised network has there.

        Raises:
            ValueError: if the likelihood has no ``fisher_factor``.
        """
        self._require_fisher_factor()
        density, parameters = self._density, self._parameters
        # (batch, n, out, network dim)
        outputs, jacobian = self._network.jacobian(self.theta, self._x, names=names)
        grad_outputs, grad_parameters = density.score(outputs, self._y, parameters)
        if changes is None:
            factor, information = self._likelihood.information(outputs, self._y, parameters)
        else:
            moves = torch.einsum("bnkd,sd->bsnk", jacobian, changes)
            factor, information = self._averaged_factor(outputs.unsqueeze(1) + moves)
        grad = torch.einsum("bnk,bnkd->bd", grad_outputs, jacobian)
        grad = density.with_parameters(grad, grad_parameters)
        # (batch, rows, network dim)
        by_weights = torch.einsum("bnkr,bnkd->bnrd", factor, jacobian).flatten(1, 2)
        whole = self._bordered(by_weights, information, grad.shape[-1])
        return (
            (grad, whole)
            if self._scale == 1
            else (self._scale * grad, self._scale**0.5 * whole)
        )

    def _bordered(
        self, by_weights: Tensor, information: dict[str, Tensor], dim: int
    ) -> Tensor:
        """Return A of all columns, with rows of their own for parameters that are independent of
        the outputs.
        """
        batch, size = by_weights.shape[:2]
        columns, below = [by_weights, by_weights.new_zeros(batch, size, self._of_prior)], []
        for each in information.values():
            # factors that share their rows with the outputs, (batch, n, size, rank)
            if each.dim() == 4:
                columns.append(each.mT.flatten(1, 2))
            else:  # independent of the outputs: Fisher information (batch, size)
                start = sum(column.shape[-1] for column in columns)
                columns.append(by_weights.new_zeros(batch, size, each.shape[-1]))
                own = torch.diag_embed(each.sqrt())  # (batch, size, size)
                below.append(
                    torch.nn.functional.pad(own, (start, dim - start - each.shape[-1]))
                )
        return torch.cat([torch.cat(columns, -1), *below], 1)

    def _averaged_factor(self, outputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``fisher_factor`` of the information averaged over outputs
        ``(batch, k, n, out)``.
        """
        batch, k = outputs.shape[:2]
        repeated = {
            name: each.repeat_interleave(k, 0) for name, each in self._parameters.items()
        }
        factor, information = self._likelihood.information(
            outputs.flatten(0, 1), self._y, repeated
        )
        each_of = {
            name: each.unflatten(0, (batch, k)) for name, each in information.items()
        }
        shared = [name for name, each in each_of.items() if each.dim() == 5]
        parts = [factor.unflatten(0, (batch, k)), *(each_of[name] for name in shared)]
        whole = torch.cat(parts, -2)  # (batch, k, n, out and parameters, rank)
        mean = (whole @ whole.mT).mean(1)
        values, vectors = torch.linalg.eigh(mean)
        roots = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)).split(
            [part.shape[-2] for part in parts], -2
        )
        averaged = {name: each.mean(1) for name, each in each_of.items()} | dict(
            zip(shared, roots[1:], strict=True)
        )
        return roots[0], averaged

    def factored(self) -> tuple[Tensor, FactoredJacobian, Tensor] | None:
        """Return `grad_and_factor` with A as its factors, several times as fast where rows are
        fewer than dim.

        The gradient, the rows by the weights, and ``(batch, parameters)``: what every parameter of
        the likelihood has in a row of its own below them. None where rows are not fewer, where the
        network is no perceptron, where the prior has parameters, and where those of the likelihood
        share their Fisher information with the outputs.
        """
        network, theta, scale = self._network, self.theta, self._scale
        if (
            self._of_prior
            or not isinstance(network, ChainNetwork)
            or not self._likelihood.has_fisher_factor
        ):
            return None
        outputs, factored = network.factored(theta, self._x)
        grad_outputs, grad_parameters = self._density.score(
            outputs, self._y, self._parameters
        )
        factor, others = self._likelihood.information(outputs, self._y, self._parameters)
        if _shared(others) or factor.shape[1] * factor.shape[-1] >= self._density.dim:
            return None
        by_weights = factored(grad_outputs.unsqueeze(-1)).transposed(
            torch.ones_like(outputs[..., 0])
        )
        grad = scale * self._density.with_parameters(by_weights, grad_parameters)
        return grad, factored(scale**0.5 * factor), self._below(others)

    def closed(self, slope: Arrowhead, vjp: Pullback) -> ClosedFactor | None:
        """Return the factor A by other coordinates without forming it; not differentiable.

        None where there are fewer rows than weights, no closed second derivatives, and where
        parameters of the likelihood share their Fisher information with the outputs.

        Args:
            slope: derivative of ``theta`` by coordinates.
            vjp: carries vectors of these to those of others that they are a symmetric linear
                function of.
        """
        network, density, theta, scale = (
            self._network,
            self._density,
            self.theta,
            self._scale,
        )
        if not density.has_gauss_newton_slope or not isinstance(network, ChainNetwork):
            return None
        x = self._x.flatten(1)
        outputs, jvp, back = network.products(theta, x)
        factor, others = self._likelihood.information(outputs, self._y, self._parameters)
        if _shared(others) or factor.shape[1] * factor.shape[-1] < density.dim:
            return None
        factor = factor.permute(0, 2, 3, 1).contiguous()  # (batch, out, rank, n)

        def product(some: slice) -> Tensor:
            information = scale * (
                factor[some].unsqueeze(2) * factor[some].unsqueeze(1)
            ).sum(3)
            return density.network_hessian.gauss_newton(
                theta[some, : density.weights], x, information
            )

        return ClosedFactor(
            jvp, back, scale**0.5 * factor, self._below(others), slope, vjp, product
        )

    def _below(self, information: dict[str, Tensor]) -> Tensor:
        """Return what parameters have in rows of their own, ``(batch, parameters)``."""
        own = ((self._scale * each).sqrt() for each in information.values())
        return torch.cat([self.theta[:, :0], *own], 1)

    @cached_property
    def residual(self) -> Tensor | None:
        """Whitened residuals b ``(batch, rows)``, with A^T b the gradient.

        Steps made from them keep in float32 what they lose when made from the gradient, where the
        likelihood is sharp. None where it has no ``whitened_score``; normal and Student laws have
        one.
        """
        if not self._likelihood.has_whitened_score:
            return None
        outputs, parameters = self._network(self.theta, self._x), self._parameters
        by_parameters = self._density.score(outputs, self._y, parameters)[1]
        information = self._likelihood.information(outputs, self._y, parameters)[1]
        of_rows = self._likelihood.whitened_score(outputs, self._y, parameters)
        others = [by_parameters[name] / each.sqrt() for name, each in information.items()]
        return self._scale**0.5 * torch.cat([of_rows.flatten(1), *others], 1)

    # ---------------------------------------- products

    def grad_and_product(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the gradient ``(batch, dim)``, and the function v -> A^T A v, ``(batch, dim)``,
        without a Jacobian.

        Each product costs about two gradients.

        Raises:
            ValueError: if the likelihood has no ``fisher_factor``.
        """
        self._require_fisher_factor()
        density, theta, x, y, scale = (
            self._density,
            self.theta,
            self._x,
            self._y,
            self._scale,
        )
        some, several = density.block_size(theta, x, len(x))
        if some >= len(x) and several >= len(theta):
            grad, product = self._linearised(theta, x, y)
            return scale * grad, lambda v: scale * product(v)

        # What linearises all of it would be too much to keep, so that every product begins anew.
        def of_block(
            both: Tensor, x: Tensor, y: Tensor, per_network: bool
        ) -> tuple[Tensor]:
            theta, v = both.split(density.dim, 1)
            return (self._linearised(theta, x, y)[1](v),)

        def in_blocks(v: Tensor) -> Tensor:
            parts = density.in_blocks(of_block, torch.cat([theta, v], 1), x, y)
            return scale * functools.reduce(torch.add, (each for (each,) in parts))

        return self.grad, in_blocks

    def _linearised(
        self, theta: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return `grad_and_product` of these networks and rows, unscaled."""
        density, network = self._density, self._network
        outputs, pullback = network.pullback(theta, x)
        parameters = density.parameters(theta)
        grad_outputs, grad_parameters = density.score(outputs, y, parameters)
        start = density.dim - density.n_parameters

        def product(v: Tensor) -> Tensor:
            tangent = jvp(lambda weights: network(weights, x), (theta,), (v,))[1]
            by_outputs, by_parameters = self._informed(
                outputs, y, parameters, tangent, v[:, start:]
            )
            return density.with_parameters(pullback(by_outputs), by_parameters)

        return density.with_parameters(pullback(grad_outputs), grad_parameters), product

    # ---------------------------------------- second derivatives

    def grad_and_hessian(self) -> tuple[Tensor, Tensor] | None:
        """Return the gradient and the Hessian of the log likelihood, ``(batch, dim)`` and
        ``(batch, dim, dim)``.

        The exact one, with the curvature of the network that A leaves out, for about a hundred
        compiled gradients. None where only automatic differentiation knows it: networks that are no
        chains of linear layers, linearised ones, and those of so many weights that a dense matrix
        for each is too much.
        """
        closed, theta, rows, scale = (
            self._density.hessian,
            self.theta,
            self._rows,
            self._scale,
        )
        if closed is None:
            return None
        x = self._x.flatten(1 if rows is None or rows.dim() == 1 else 2)
        grad, hessian = closed(
            theta, x, self._y, lambda outputs, y: self._derivatives(outputs, y)
        )
        return (grad, hessian) if scale == 1 else (scale * grad, scale * hessian)

    def slope(self, v: Tensor) -> Tensor | None:
        """Return the derivative by theta of grad - A^T A v at fixed v, ``(batch, dim, dim)``, in
        closed form.

        Row i is that of element i; the matrix is not symmetric. None where there is no closed
        Hessian or no ``fisher_factor``.

        Args:
            v: ``(batch, dim)``.
        """
        density, scale = self._density, self._scale
        if not density.has_gauss_newton_slope:
            return None
        out = density.n_outputs
        # no more than eight times the result at once, or little
        size = max(64, 8 * density.dim // out)
        parts = zip(self._x.flatten(1).split(size), self._y.split(size), strict=True)
        slope = functools.reduce(torch.add, (self._slope(v, *part) for part in parts))
        slope = slope if scale == 1 else scale * slope
        if not self._of_prior:
            return slope
        start, stop = density.weights, density.weights + self._of_prior
        whole = slope.new_zeros(len(slope), density.dim, density.dim)
        for rows, theirs in (
            (slice(start), slice(start)),
            (slice(start, None), slice(stop, None)),
        ):
            whole[:, theirs, :start] = slope[:, rows, :start]
            whole[:, theirs, stop:] = slope[:, rows, start:]
        return whole

    def _slope(self, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return `slope` of these rows, by the weights and the likelihood's parameters.

        With J the Jacobian of the outputs and F the Fisher information of outputs and parameters,
        grad - A^T A v by the weights is J^T r, with r what F leaves of the score when it has met J
        v and v. Its derivative is the network's curvature along r, and J^T (M J - F D): M is the
        derivative of r by outputs with J v held fixed, and D the derivative of J v, which is that
        of J along v.
        """
        network, theta, n_parameters = self._network, self.theta, self._density.n_parameters
        assert isinstance(network, ChainNetwork)

        def parts(weights: Tensor, seeds: Tensor) -> list[tuple[Tensor, Tensor]]:
            return [
                (part.entering, part.leaving)
                for part in network.factored(weights, x)[1](seeds).parts
            ]

        outputs, along, *_ = jvp(lambda weights: network(weights, x), (theta,), (v,))
        given = self._derivatives(
            outputs, y, (along, v[:, self._density.dim - n_parameters :])
        )
        assert given.outputs is not None
        factor, others = self._likelihood.information(outputs, y, self._parameters)
        information, eye = (
            factor @ factor.mT,
            torch.eye(outputs.shape[-1], dtype=theta.dtype, device=theta.device),
        )
        eye = eye.expand_as(information).contiguous()
        mixed = network.factored(theta, x)[1]  # S -> S^T J
        changes = jvp(parts, (theta, -information), (v, given.outputs.mT))[1]
        change = mixed(-information).tangent(changes)  # M J - F D
        jacobian = mixed(eye).matrix
        bent = self._density.network_hessian.along(theta, x, given.by_outputs)
        if not n_parameters:
            return bent.baddbmm_(jacobian.mT, change)
        assert given.transposed is not None
        by_weights = given.transposed.flatten(2) @ jacobian
        shared = [each for each in others.values() if each.dim() == 4]
        # the information of outputs and parameters together, (batch, n, parameters, out)
        if shared:
            cross = (torch.cat(shared, 2) @ factor.mT).movedim(2, 1).flatten(2)
            moved = jvp(parts, (theta, eye), (v, torch.zeros_like(eye)))[1]
            by_weights = by_weights - cross @ mixed(eye).tangent(moved)
        above = torch.cat(
            [bent.baddbmm_(jacobian.mT, change), jacobian.mT @ given.mixed.flatten(2).mT], 2
        )
        return torch.cat([above, torch.cat([by_weights, given.parameters.mT], 2)], 1)

    def _derivatives(
        self, outputs: Tensor, y: Tensor, along: tuple[Tensor, Tensor] | None = None
    ) -> OutputDerivatives:
        """Return what the likelihood makes of outputs: derivatives of its score, which cost next to
        nothing.

        With ``along``, a change of the outputs and of the logarithms of its parameters, of the
        score less the Fisher information of both times that.
        """
        density, theta = self._density, self.theta
        out, start = outputs.shape[-1], density.dim - density.n_parameters
        weights, logs = theta[:, :start], theta[:, start:]

        def score(outputs: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
            parameters = density.parameters(torch.cat([weights, logs], 1))
            by_outputs, by_parameters = density.score(outputs, y, parameters)
            if along is not None:
                of_outputs, of_parameters = self._informed(outputs, y, parameters, *along)
                by_outputs = by_outputs - of_outputs
                by_parameters = {
                    name: by_parameters[name] - each for name, each in of_parameters.items()
                }
            named = [by_parameters[name].flatten(1) for name in parameters]
            return by_outputs, torch.cat([logs[:, :0], *named], 1)

        def derivative(of_logs: Tensor) -> Tensor:
            tangents = torch.zeros_like(outputs), of_logs.expand_as(logs)
            return jvp(score, (outputs, logs), tangents)[1][0]

        # Reverse mode: in forward mode torch takes half a millisecond for every constant that it
        # meets.
        (by_outputs, by_logs), vjp, *_ = torch.func.vjp(score, outputs, logs)
        size = logs.shape[1]
        eye = torch.eye(out + size, dtype=theta.dtype, device=theta.device)
        seeds = (
            eye[:, None, None, :out].expand(-1, *outputs.shape),
            eye[:, None, out:].expand(-1, *logs.shape),
        )
        # (element, batch, ...)
        of_outputs, of_logs = torch.func.vmap(lambda *seed: vjp(seed))(*seeds)
        transposed = of_outputs[out:].movedim(0, 1)
        mixed = transposed
        # the information is no derivative: nothing is symmetric
        if along is not None and size:
            mixed = torch.func.vmap(derivative)(eye[out:, out:]).movedim(0, 1)
        return OutputDerivatives(
            by_outputs,
            by_logs,
            of_outputs[:out].movedim(0, -2),
            mixed,
            of_logs[out:].movedim(0, -1),
            transposed,
        )

    # ---------------------------------------- Fisher information

    @property
    def _of_prior(self) -> int:
        """How many parameters of the prior lie between the weights and those of the likelihood."""
        return self._density.dim - self._density.weights - self._density.n_parameters

    def _require_fisher_factor(self) -> None:
        if not self._likelihood.has_fisher_factor:
            raise ValueError(f"{self._likelihood.name} has no fisher_factor")

    def _informed(
        self,
        outputs: Tensor,
        y: Tensor,
        parameters: dict[str, Tensor],
        along: Tensor,
        logs: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the Fisher information of outputs and log parameters times changes of both, by
        each of them.
        """
        factor, information = self._likelihood.information(outputs, y, parameters)
        sizes = [each.shape[-1] for each in parameters.values()]
        changes = dict(zip(parameters, logs.split(sizes, -1), strict=True))
        inner = (factor.mT @ along.unsqueeze(-1)).squeeze(-1)  # (batch, n, rank)
        shared = {name: each for name, each in information.items() if each.dim() == 4}
        for name, each in shared.items():
            inner = inner + torch.einsum("bnsr,bs->bnr", each, changes[name])
        by_parameters = {
            name: torch.einsum("bnsr,bnr->bs", each, inner)
            if name in shared
            else each * changes[name]
            for name, each in information.items()
        }
        return (factor @ inner.unsqueeze(-1)).squeeze(-1), by_parameters


def _shared(information: dict[str, Tensor]) -> bool:
    """Say whether a parameter of the likelihood shares its Fisher information with the outputs."""
    return any(each.dim() == 4 for each in information.values())
