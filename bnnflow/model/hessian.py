"""Second derivatives of the log likelihood of many perceptrons at once, in closed form.

With z_l = W_l a_{l-1} + b_l, a_l = f(z_l), delta_l the gradient by z_l and K_m the second
derivative by z_m of what layer m and those above make of it, the derivative by W_l[i, f] and
W_m[i', f'], l <= m, sums over the rows of data

    a_{l-1,f} (K_m dz_m/dz_l)[i', i] a_{m-1,f'} + delta_m[i'] (da_{m-1}/dz_l)[f', i] a_{l-1,f},

the second term for l < m alone (Bishop 1992). So every block of the matrix is a product of what
belongs to units and what belongs to inputs, over the rows: no Jacobian by the weights is formed,
and of the symmetric factors one half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bnnflow.activations import Activation
from bnnflow.forward_mode import jvp
from bnnflow.weights import WeightSpec

__all__ = ["ChainHessian", "OutputDerivatives"]

# weights, beyond which a dense matrix for every draw is more memory than it is worth
WIDEST = 4096


class OutputDerivatives(NamedTuple):
    """First and second derivatives of the log likelihood by outputs and logarithms of its ``size``
    parameters.
    """

    by_outputs: Tensor  # (batch, n, out)
    by_parameters: Tensor  # (batch, size), summed over rows
    outputs: Tensor | None  # (batch, n, out, out); None for zero
    mixed: Tensor  # (batch, size, n, out): by_outputs by the parameters
    # (batch, size, size), summed over rows: row i is the derivative by parameter i
    parameters: Tensor
    # (batch, size, n, out): by_parameters by the outputs; None for the same as mixed
    transposed: Tensor | None = None


class _Step(NamedTuple):
    """What the forward pass through one layer leaves; feature-major as in `ChainNetwork`."""

    weight: Tensor  # (batch, out, in)
    inputs: Tensor  # (in, n) or (batch, in, n); with a bias one row more, of ones
    slope: Tensor  # f'(z), (batch, out, n)
    bend: Tensor | None  # f''(z), (batch, out, n); None for zero


class ChainHessian:
    """The Hessian of a log likelihood by the weights of a perceptron, whatever its depth.

    Args:
        spec: the layout of ``theta``: a chain of affine layers, with the parameters of the
            likelihood at the end.
        parameters: how many those are.
    """

    def __init__(self, spec: WeightSpec, parameters: int) -> None:
        self._spec = spec
        # Of the data at once: so many that what is made of them is no more than eight times the
        # Hessian itself, or few.
        widest = max(max(spec.shapes[layer.weight]) for layer in spec.layers) + 1
        self.rows_at_once = max(64, 8 * spec.dim**2 // widest**2)
        self._first, self._second = _places(spec, parameters)

    @classmethod
    def of(cls, spec: WeightSpec, parameters: int) -> ChainHessian | None:
        """Return the Hessian, or None where the network is no chain of layers or has too many
        weights.
        """
        return cls(spec, parameters) if spec.layers and spec.dim <= WIDEST else None

    def __call__(
        self,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        curvature: Callable[[Tensor, Tensor], OutputDerivatives],
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient ``(batch, dim)`` and the Hessian ``(batch, dim, dim)``.

        Args:
            theta: ``(batch, dim)``.
            x: inputs ``(n, in)``, or ``(batch, n, in)`` with some for each network.
            y: their targets, ``(n, ...)`` or ``(batch, n, ...)``.
            curvature: what the likelihood makes of outputs ``(batch, n, out)`` and targets.
        """
        axis = x.dim() - 2
        parts = zip(
            x.split(self.rows_at_once, axis), y.split(self.rows_at_once, axis), strict=True
        )
        firsts, seconds = zip(
            *(self._sums(theta, *part, curvature) for part in parts), strict=True
        )
        first, second = (functools.reduce(torch.add, parts) for parts in (firsts, seconds))
        places = self._first.to(theta.device), self._second.to(theta.device)
        hessian = second.index_select(1, places[1]).unflatten(1, (len(places[0]), -1))
        return first.index_select(1, places[0]), hessian

    def along(self, theta: Tensor, x: Tensor, by_outputs: Tensor) -> Tensor:
        """Return the Hessian of the sum of outputs times constants ``(batch, n, out)``, for a spec
        of weights alone.

        Args:
            theta: ``(batch, dim)``.
            x: inputs ``(n, in)``.
            by_outputs: the constants.
        """

        def linear(outputs: Tensor, given: Tensor) -> OutputDerivatives:
            none = outputs.new_zeros(len(outputs), 0)
            return OutputDerivatives(
                given.movedim(0, 1),
                none,
                None,
                outputs[:, None][:, :0],
                none.unsqueeze(1)[:, :0],
            )

        return self(theta, x, by_outputs.movedim(1, 0), linear)[1]

    def gauss_newton(self, theta: Tensor, x: Tensor, information: Tensor) -> Tensor:
        """Return J^T F J with J the Jacobian of the outputs, ``(batch, dim, dim)``, for a spec of
        weights alone.

        Args:
            theta: ``(batch, dim)``.
            x: inputs ``(n, in)``.
            information: F, ``(batch, out, out, n)``.
        """
        parts = zip(
            x.split(self.rows_at_once), information.split(self.rows_at_once, 3), strict=True
        )
        sums = functools.reduce(torch.add, (self._products(theta, *part) for part in parts))
        size = theta.shape[1]
        return sums.index_select(1, self._second.to(theta.device)).unflatten(
            1, (size, size)
        )

    def _products(self, theta: Tensor, x: Tensor, information: Tensor) -> Tensor:
        """Return the entries of J^T F J in the order of `_places`, summed over the rows."""
        tape, _ = self._forward(theta, x)
        second = information.clone(memory_format=torch.contiguous_format)
        blocks = [theta.new_zeros(len(theta), 1)]
        for depth in reversed(range(len(tape))):
            step = tape[depth]
            second.mul_(step.slope.unsqueeze(1)).mul_(step.slope.unsqueeze(2))
            blocks.append(_within(second, step))
            if depth:
                lower = _carried(second, step.weight)
                blocks += _across(tape[: depth + 1], lower, None)
                second = (step.weight.mT @ lower.flatten(2)).unflatten(2, lower.shape[2:])
        return torch.cat([block.flatten(1) for block in blocks], 1)

    def _sums(
        self,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        curvature: Callable[[Tensor, Tensor], OutputDerivatives],
    ) -> tuple[Tensor, Tensor]:
        """Return the entries of both in the order of `_places`, summed over the rows."""
        tape, outputs = self._forward(theta, x)
        given = curvature(outputs.mT, y)
        # By the activations of a layer: the gradient and mixed derivatives (batch, 1 + size, out,
        # n), and second ones.
        first = torch.cat([given.by_outputs.unsqueeze(1), given.mixed], 1).mT
        second = given.outputs
        if second is not None:
            # (batch, out, out, n)
            second = second.movedim(1, -1).clone(memory_format=torch.contiguous_format)
        firsts, blocks = [], []
        for depth in reversed(range(len(tape))):
            step = tape[depth]
            second = _by_z(second, step, first[:, 0])
            first = first * step.slope.unsqueeze(1)
            firsts.append(
                _product(first.flatten(1, 2), step.inputs)
                .unflatten(1, first.shape[1:3])
                .flatten(2)
            )
            blocks.append(_within(second, step))
            if depth:
                lower = None if second is None else _times(second, step.weight)
                blocks += _across(tape[: depth + 1], lower, first[:, 0])
                second = (
                    None
                    if lower is None
                    else (step.weight.mT @ lower.flatten(2)).unflatten(2, lower.shape[2:])
                )
                first = step.weight.mT.unsqueeze(1) @ first
        by_weights = torch.cat(firsts, -1)  # (batch, 1 + size, network dim)
        zero = theta.new_zeros(len(theta), 1)
        gradient = torch.cat([by_weights[:, 0], given.by_parameters, zero], 1)
        entries = [by_weights[:, 1:], given.parameters, zero, *blocks]
        return gradient, torch.cat([part.flatten(1) for part in entries], 1)

    def _forward(self, theta: Tensor, x: Tensor) -> tuple[list[_Step], Tensor]:
        """Return what each layer leaves, and the outputs ``(batch, out, n)``."""
        spec, tape, h = self._spec, [], x.mT
        for layer in spec.layers:
            weight = theta[:, spec.slices[layer.weight]].unflatten(
                -1, spec.shapes[layer.weight]
            )
            z, inputs = weight @ h, h
            if layer.bias is not None:
                z = z + theta[:, spec.slices[layer.bias]].unsqueeze(-1)
                inputs = torch.cat([h, torch.ones_like(h[..., :1, :])], -2)
            h = layer.activation(z)
            slope = layer.activation.derivative(z, h)
            tape.append(_Step(weight, inputs, slope, _bend(layer.activation, z, h, slope)))
        return tape, h


def _by_z(second: Tensor | None, step: _Step, by_values: Tensor) -> Tensor | None:
    """Return K_m, ``(batch, out, out, n)``, its diagonal alone ``(batch, out, n)``, or None where
    all of it is zero.

    Args:
        second: the second derivative by the layer's activations, overwritten; None for zero.
        step: what the layer left.
        by_values: the gradient by its activations, ``(batch, out, n)``.
    """
    own = None if step.bend is None else by_values * step.bend
    if second is None:
        return own
    # in place: fresh memory costs more
    second.mul_(step.slope.unsqueeze(1)).mul_(step.slope.unsqueeze(2))
    if own is not None:
        second.diagonal(dim1=1, dim2=2).add_(own.mT)
    return second


def _within(second: Tensor | None, step: _Step) -> Tensor:
    """Return the block of a layer with itself, given K_m from `_by_z`: one half of units, one half
    of inputs.
    """
    if second is not None and second.dim() == 4:
        return _product(_half(second), _squares(step.inputs))
    (batch, units, _), inputs = step.slope.shape, step.inputs.shape[-2]
    block = step.slope.new_zeros(
        batch, units * (units + 1) // 2, inputs * (inputs + 1) // 2
    )
    if second is not None:
        block[:, _triangle(units).diagonal()] = _product(second, _squares(step.inputs))
    return block


def _times(second: Tensor, weight: Tensor) -> Tensor:
    """Return K_m W, ``(batch, out, in, n)``, given K_m or its diagonal."""
    return (
        second.unsqueeze(2) * weight.unsqueeze(3)
        if second.dim() == 3
        else _carried(second, weight)
    )


def _across(tape: list[_Step], lower: Tensor | None, delta: Tensor | None) -> list[Tensor]:
    """Return the blocks of the last layer m with each layer l below,
    ``(batch, out, out below, in, in below)``.

    Args:
        tape: of the layers up to this one.
        lower: K_m dz_m / da_{m-1}, ``(batch, out, in, n)``; None for zero.
        delta: the gradient by z_m, ``(batch, out, n)``; None leaves the curvature of the network
            out.
    """
    *below, step = tape
    blocks, reached = [], None
    for other in reversed(below):
        (batch, out, _), units = step.slope.shape, other.slope.shape[1]
        ends, starts = step.inputs.shape[-2], other.inputs.shape[-2]
        if lower is None:
            block = step.slope.new_zeros(batch, out, units, ends, starts)
        else:
            lower = lower * other.slope.unsqueeze(1)  # by z_l
            block = _product(
                lower.flatten(1, 2), _outer(step.inputs, other.inputs).flatten(-3, -2)
            )
            block = block.unflatten(1, (out, units)).unflatten(3, (ends, starts))
            lower = _carried(lower, other.weight)
        if delta is None:
            pass
        elif reached is None:  # each unit of a_{m-1} by its own z_{m-1}
            own = _product(
                _outer(delta, other.slope).flatten(1, 2), other.inputs
            ).unflatten(1, (out, units))
            block.diagonal(dim1=2, dim2=3).add_(own.mT)
            # a_{m-1} by a_{l-1}, (batch, in, ., n)
            reached = other.slope.unsqueeze(2) * other.weight.unsqueeze(3)
        else:
            reached = reached * other.slope.unsqueeze(1)
            own = _product(_outer(delta, other.inputs).flatten(1, 2), reached.flatten(1, 2))
            own = own.unflatten(1, (out, starts)).unflatten(3, reached.shape[1:3])
            block[:, :, :, : reached.shape[1]].add_(own.permute(0, 1, 4, 3, 2))
            reached = _carried(reached, other.weight)
        blocks.append(block)
    return blocks


def _carried(by_z: Tensor, weight: Tensor) -> Tensor:
    """Turn derivatives by z ``(batch, ., out, n)`` into those by what the layer reads,
    ``(batch, ., in, n)``.
    """
    return weight.mT.unsqueeze(1) @ by_z


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Sum over the rows of data: ``(batch, p, n)`` and ``(batch, q, n)`` or ``(q, n)`` to
    ``(batch, p, q)``.
    """
    return left @ right.mT


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Multiply all with all in every row of data, ``(..., p, n)`` and ``(..., q, n)`` to
    ``(..., p, q, n)``.
    """
    return left.unsqueeze(-2) * right.unsqueeze(-3)


def _squares(inputs: Tensor) -> Tensor:
    """Return `_half` of the outer product of ``(..., p, n)`` with itself."""
    rows, columns = torch.triu_indices(
        inputs.shape[-2], inputs.shape[-2], device=inputs.device
    )
    return inputs.index_select(-2, rows).mul_(inputs.index_select(-2, columns))


def _half(symmetric: Tensor) -> Tensor:
    """Return the upper triangle of matrices ``(..., p, p, n)`` row by row,
    ``(..., p (p + 1) / 2, n)``.
    """
    p = symmetric.shape[-2]
    rows, columns = torch.triu_indices(p, p, device=symmetric.device)
    return symmetric.flatten(-3, -2).index_select(-2, rows * p + columns)


def _bend(activation: Activation, z: Tensor, value: Tensor, slope: Tensor) -> Tensor | None:
    """Return f''(z), given also f(z) and f'(z); None for zero."""
    if activation.name == "tanh":
        return -2 * value * slope
    if activation.name in ("identity", "relu"):
        return None
    return jvp(
        lambda a: activation.derivative(a, activation(a)), (z,), (torch.ones_like(z),)
    )[1]


def _places(spec: WeightSpec, size: int) -> tuple[Tensor, Tensor]:
    """Return where each entry of the gradient ``(dim,)`` and of the Hessian ``(dim * dim,)`` is
    computed.
    """
    order = torch.arange(spec.dim)
    # of every layer, the last one first: where (out, in) are in theta, the bias as the last input
    tables = []
    for layer in reversed(spec.layers):
        columns = [order[spec.slices[layer.weight]].reshape(spec.shapes[layer.weight])]
        columns += (
            [] if layer.bias is None else [order[spec.slices[layer.bias]].unsqueeze(1)]
        )
        tables.append(torch.cat(columns, 1))
    weights, parameters = (
        torch.cat([table.flatten() for table in tables]),
        order[spec.dim - size :],
    )
    counted = len(weights) + size
    first = torch.full((spec.dim,), counted)
    first[torch.cat([weights, parameters])] = order[:counted]
    zero = size * counted
    second = torch.full((spec.dim, spec.dim), zero)
    mixed = torch.arange(size * len(weights)).reshape(size, len(weights))
    second[parameters[:, None], weights], second[weights[:, None], parameters] = (
        mixed,
        mixed.T,
    )
    second[parameters[:, None], parameters] = torch.arange(
        size * len(weights), zero
    ).reshape(size, size)
    start = zero + 1
    for m, table in enumerate(tables):
        out, inputs = table.shape
        pairs, squares = _triangle(out), _triangle(inputs)
        count = inputs * (inputs + 1) // 2
        block = start + count * pairs[:, None, :, None] + squares[None, :, None, :]
        second[table.flatten()[:, None], table.flatten()] = block.reshape(table.numel(), -1)
        start += count * out * (out + 1) // 2
        for other in tables[m + 1 :]:
            units, starts = other.shape
            block = torch.arange(start, start + table.numel() * other.numel())
            block = (
                block.reshape(out, units, inputs, starts)
                .transpose(1, 2)
                .reshape(table.numel(), -1)
            )
            second[table.flatten()[:, None], other.flatten()] = block
            second[other.flatten()[:, None], table.flatten()] = block.T
            start += block.numel()
    return first, second.flatten()


def _triangle(p: int) -> Tensor:
    """Return where `_half` puts each entry of a symmetric matrix, ``(p, p)``."""
    rows, columns = torch.triu_indices(p, p)
    places = torch.empty(p, p, dtype=torch.int64)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows))
    return places
