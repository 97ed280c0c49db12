"""Many copies of one network, evaluated at once.

Both classes answer the same three questions for a batch of flat weights ``theta`` ``(batch, dim)`` and inputs ``x``:
the outputs, the outputs with their pullback, and the outputs with their Jacobian. The inputs are ``(n, ...)``, the
same for every network, or with ``per_network=True`` ``(batch, n, ...)``: inputs of their own, as for independent
mini-batches. ``ChainNetwork`` writes the backward pass of a perceptron out, in compiled code where that can run and
in batched matrix products elsewhere; ``ModuleNetwork`` maps any module with ``vmap``. Everything is differentiable
again, forwards and backwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnnflow.model.factored import FactoredJacobian, Outer
from bnnflow.model.fused import FusedNetwork, plain
from bnnflow.weights import Layer, WeightSpec

__all__ = ["ChainNetwork", "ModuleNetwork", "Pullback"]

Pullback = Callable[[Tensor], Tensor]
"""Gradient by the outputs ``(batch, n, out)`` to gradient by the weights ``(batch, dim)``."""


class _Step(NamedTuple):
    """What the forward pass through one layer leaves for the backward pass; feature-major."""

    h: Tensor  # (in, n) or (batch, in, n)
    a: Tensor  # (batch, out, n)
    value: Tensor  # (batch, out, n)


class ChainNetwork:
    """A perceptron: alternating affine layers and elementwise activations.

    Activations are kept feature-major, ``(batch, features, n)``, so that every product is one batched GEMM with the
    rows of data along its fastest axis.
    """

    def __init__(self, spec: WeightSpec) -> None:
        self._spec = spec
        self._layers = spec.layers
        self._fused = FusedNetwork(spec)
        self._memory = _Memory()

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self._spec.shapes[self._layers[0].weight][1]

    def __call__(self, theta: Tensor, x: Tensor, *, per_network: bool = False) -> Tensor:
        """Return the outputs, ``(batch, n, out)``."""
        if self._fused.applies(theta, x):
            return self._fused.outputs(theta, x, per_network)
        return self._forward(theta, x, per_network)[-1].value.mT

    def hidden(self, theta: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Return the activations of every hidden layer by label, ``(batch, width, n)``."""
        tape = self._forward(theta, x, False)
        return {label: step.value for label, step in zip(self._spec.activations, tape, strict=False)}

    def pullback(
        self, theta: Tensor, x: Tensor, *, per_network: bool = False, reuse: bool = False
    ) -> tuple[Tensor, Pullback]:
        """Return the outputs and the function that carries a gradient by them back to the weights.

        With ``reuse`` both are good until the next such call in this thread, which may write into their memory.
        """
        if self._fused.applies(theta, x):

            def compiled(grad_outputs: Tensor) -> Tensor:
                if plain(grad_outputs):
                    return self._fused.pull(theta, x, per_network, grad_outputs)
                return self._backward(theta, self._forward(theta, x, per_network), grad_outputs.mT)

            return self._fused.outputs(theta, x, per_network), compiled
        memory = self._memory if reuse and plain(theta, x) else None
        tape = self._forward(theta, x, per_network, memory)

        def pull(grad_outputs: Tensor) -> Tensor:
            return self._backward(theta, tape, grad_outputs.mT, memory if plain(grad_outputs) else None)

        return tape[-1].value.mT, pull

    def squared_error(self, theta: Tensor, x: Tensor, y: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return half the sum of squared errors ``(batch,)``, and its gradient ``(batch, dim)``.

        Args:
            theta: ``(batch, dim)``.
            x: inputs ``(n, in)`` that all networks share.
            y: targets of each network's own, ``(batch, n, out)``.
            rows: use these rows of x and y only, int64 ``(m,)``.
        """
        outputs = self._spec.shapes[self._layers[-1].weight][0]
        if x.shape[1:] != (self.in_features,) or y.shape != (len(theta), len(x), outputs):
            raise RuntimeError(
                f"inputs {tuple(x.shape)} and targets {tuple(y.shape)} do not fit {len(theta)} networks "
                f"{self.in_features} -> {outputs}"
            )
        if self._fused.applies(theta, x) and plain(y) and y.dtype == x.dtype:
            return self._fused.squared_error(theta, x, y, rows)
        if rows is not None:
            x, y = x[rows], y[:, rows]
        fitted, pull = self.pullback(theta, x, reuse=True)
        residual = fitted - y
        return 0.5 * residual.double().square().sum((1, 2)), pull(residual)

    def jacobian(self, theta: Tensor, x: Tensor, *, per_network: bool = False) -> tuple[Tensor, Tensor]:
        """Return the outputs and their derivative by the weights, ``(batch, n, out, dim)``."""
        tape = self._forward(theta, x, per_network)
        params = self._params(theta)
        out, n = tape[-1].value.shape[-2:]
        batch = theta.shape[0]
        # delta[b, k, j, i]: derivative of output k by pre-activation j, at row i
        delta = torch.eye(out, dtype=theta.dtype, device=theta.device).reshape(1, out, out, 1).expand(batch, -1, -1, n)
        blocks: dict[str, Tensor] = {}
        for layer, step in zip(reversed(self._layers), reversed(tape), strict=True):
            delta = delta * layer.activation.derivative(step.a, step.value).unsqueeze(1)
            h = step.h if step.h.dim() == 3 else step.h.expand(batch, *step.h.shape)
            blocks[layer.weight] = torch.einsum("bkji,bfi->bikjf", delta, h).flatten(3)
            if layer.bias is not None:
                blocks[layer.bias] = delta.permute(0, 3, 1, 2)
            if layer is not self._layers[0]:
                delta = torch.einsum("bjf,bkji->bkfi", params[layer.weight], delta)
        names = [name for name in self._spec.names if name in blocks]
        return tape[-1].value.mT, torch.cat([blocks[name] for name in names], -1)

    def factored(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Callable[[Tensor], FactoredJacobian]]:
        """Return the outputs, and what makes S^T J of mixtures S of them, ``(batch, n, out, rank)``, without J."""
        tape = self._forward(theta, x, False)
        params = self._params(theta)
        names = tuple(name for name in self._spec.names if name in params)

        def made(seeds: Tensor) -> FactoredJacobian:
            leaving = seeds.movedim(2, 1)  # (batch, out, n, rank): derivatives by what leaves a layer
            parts = []
            for layer, step in zip(reversed(self._layers), reversed(tape), strict=True):
                if layer.activation.name != "identity":
                    leaving = leaving * layer.activation.derivative(step.a, step.value).unsqueeze(-1)
                parts.append(Outer(layer, step.h, leaving))
                if layer is not self._layers[0]:
                    leaving = (params[layer.weight].mT @ leaving.flatten(2)).unflatten(2, leaving.shape[2:])
            return FactoredJacobian(parts[::-1], names, dict.fromkeys(names, 1.0))

        return tape[-1].value.mT, made

    def _params(self, theta: Tensor) -> dict[str, Tensor]:
        spec = self._spec
        return {
            name: theta[:, spec.slices[name]].unflatten(-1, spec.shapes[name])
            for layer in self._layers
            for name in (layer.weight, layer.bias)
            if name is not None
        }

    def _forward(self, theta: Tensor, x: Tensor, per_network: bool, memory: _Memory | None = None) -> list[_Step]:
        params = self._params(theta)
        h = x.flatten(2 if per_network else 1).mT  # (in, n), shared by every network, or (batch, in, n)
        tape = []
        for layer in self._layers:
            a = self._affine(params, layer, h, memory)
            value = layer.activation.overwrite(a) if memory and layer.activation.reusable else layer.activation(a)
            tape.append(_Step(h, a, value))
            h = value
        return tape

    @staticmethod
    def _affine(params: dict[str, Tensor], layer: Layer, h: Tensor, memory: _Memory | None) -> Tensor:
        weight = params[layer.weight]  # (batch, out, in)
        bias = None if layer.bias is None else params[layer.bias].unsqueeze(-1)
        if memory is None and h.dim() == 2:
            product = torch.matmul(weight, h)
            return product if bias is None else product + bias
        h = h.expand(len(weight), *h.shape[-2:])
        out = None if memory is None else memory.take(layer.weight, weight, *weight.shape[:2], h.shape[-1])
        return torch.bmm(weight, h, out=out) if bias is None else torch.baddbmm(bias, weight, h, out=out)

    def _backward(self, theta: Tensor, tape: list[_Step], delta: Tensor, memory: _Memory | None = None) -> Tensor:
        params = self._params(theta)
        grads: dict[str, Tensor] = {}
        for layer, step in zip(reversed(self._layers), reversed(tape), strict=True):
            activation, given = layer.activation, layer is self._layers[-1]
            if memory and activation.reusable and not given:
                delta = activation.pull(delta, step.value)
            elif activation.name != "identity":
                delta = delta * activation.derivative(step.a, step.value)  # (batch, out, n)
            grads[layer.weight] = torch.matmul(delta, step.h.mT).flatten(1)
            if layer.bias is not None:
                grads[layer.bias] = delta.sum(-1)
            if layer is not self._layers[0]:
                weight = params[layer.weight].mT
                out = memory and memory.take(f"delta of {layer.weight}", weight, *weight.shape[:2], delta.shape[-1])
                delta = torch.bmm(weight, delta, out=out)
        return torch.cat([grads[name] for name in self._spec.names if name in grads], -1)  # (batch, dim)


class _Memory(threading.local):
    """Tensors that are written again and again, for each thread its own.

    Fresh memory is what large batches cost most on a CPU: the system zeroes its pages, and takes them back after one
    use.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[_Memory], tuple[()]]:
        return _Memory, ()  # copies begin with nothing

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return the tensor of this name, with whatever is in it; a new one if it is of another shape or type."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != shape or kept.dtype != like.dtype:
            kept = self._kept[name] = like.new_empty(shape)
        return kept


class ModuleNetwork:
    """Any module that maps a batch of inputs to a batch of outputs, through ``vmap(functional_call)``."""

    def __init__(self, net: nn.Module, spec: WeightSpec) -> None:
        self._net = net  # holds the parameters that are constants, and the buffers
        self._names = tuple(name for name in spec.names if name not in spec.extras)
        self._slices = [spec.slices[name] for name in self._names]
        self._shapes = [spec.shapes[name] for name in self._names]

    def _one(self, theta: Tensor, x: Tensor) -> Tensor:
        """Evaluate the network with one weight vector, ``(dim,) -> (n, out)``."""
        parts = zip(self._names, self._slices, self._shapes, strict=True)
        params = {name: theta[where].reshape(shape) for name, where, shape in parts}
        outputs = torch.func.functional_call(self._net, params, (x,))
        if not isinstance(outputs, Tensor):
            raise ValueError(f"the network must return one tensor, got {type(outputs).__name__}")
        return outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs

    def __call__(self, theta: Tensor, x: Tensor, *, per_network: bool = False) -> Tensor:
        """Return the outputs, ``(batch, n, out)``."""
        return torch.func.vmap(self._one, _in_dims(per_network), randomness="error")(theta, x)

    def pullback(
        self, theta: Tensor, x: Tensor, *, per_network: bool = False, reuse: bool = False
    ) -> tuple[Tensor, Pullback]:
        """Return the outputs and the function that carries a gradient by them back to the weights."""
        size = self._slices[-1].stop
        outputs, vjp, *_ = torch.func.vjp(lambda weights: self(weights, x, per_network=per_network), theta[:, :size])
        return outputs, lambda grad_outputs: vjp(grad_outputs)[0]

    def jacobian(self, theta: Tensor, x: Tensor, *, per_network: bool = False) -> tuple[Tensor, Tensor]:
        """Return the outputs and their derivative by the weights, ``(batch, n, out, dim)``."""
        size = self._slices[-1].stop
        one = torch.func.vmap(torch.func.jacrev(self._one), _in_dims(per_network))
        return self(theta, x, per_network=per_network), one(theta[:, :size], x)


def _in_dims(per_network: bool) -> tuple[int, int | None]:
    return (0, 0 if per_network else None)
