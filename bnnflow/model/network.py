"""Many copies of one network, evaluated at once.

Both classes answer the same three questions for a batch of flat weights ``theta`` ``(batch, dim)``
and inputs ``x``: the outputs, the outputs with their pullback, and the outputs with their Jacobian.
The inputs are ``(n, ...)``, the same for every network, or with ``per_network=True``
``(batch, n, ...)``: inputs of their own, as for independent mini-batches. ``ChainNetwork`` writes
the backward pass of a perceptron out, in compiled code where that can run and in batched matrix
products elsewhere; ``ModuleNetwork`` maps any module with ``vmap``. Everything is differentiable
again, forwards and backwards.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnnflow.compiled import is_tracked, is_untracked_cpu
from bnnflow.model.factored import FactoredJacobian, Outer
from bnnflow.model.fused import FusedNetwork
from bnnflow.weights import Layer, WeightSpec

__all__ = ["ChainNetwork", "ModuleNetwork", "Pullback"]

Pullback = Callable[[Tensor], Tensor]
"""Gradient by the outputs ``(batch, n, out)`` to gradient by the weights ``(batch, dim)``."""

LARGEST_BLOCK = 2**24
"""Numbers that an evaluation may write at once, where nothing follows derivatives: 64 MB in
float32.
"""

# Networks take turns where they are fewer than these, or where an operation writes more numbers
# than these. Measured (CPU, one thread): the price through vmap over that of turns, by numbers an
# operation: layer norm 1,800 .41, 7,000 .53 to .77, 29,000 1.1, 450,000 2.6; convolutions 4,400
# .30, 18,000 .45, 70,000 .71, 280,000 1.5; attention 2,000 .30, 8,000 .52, 33,000 1.3, 130,000 2.1;
# embedding 17,000 .41, 69,000 .65. Starting vmap costs 3 to 4 networks' turns.
FEW_NETWORKS = 6
SMALL_OPERATION = 2**14


def at_once(n: int, elements: int) -> tuple[int, int]:
    """Return how many of ``n`` rows, and how many networks, stay within the largest block.

    Args:
        n: rows of data.
        elements: numbers that one network writes for one row.
    """
    rows = min(n, max(1, LARGEST_BLOCK // elements))
    return rows, max(1, LARGEST_BLOCK // (rows * elements))


class _Step(NamedTuple):
    """What the forward pass through one layer leaves for the backward pass; feature-major."""

    h: Tensor  # (in, n) or (batch, in, n)
    a: Tensor  # (batch, out, n)
    value: Tensor  # (batch, out, n)


class ChainNetwork:
    """A perceptron: alternating affine layers and elementwise activations.

    Activations are kept feature-major, ``(batch, features, n)``, so that every product is one
    batched GEMM with the rows of data along its fastest axis.
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

    def elements(self, x: Tensor) -> int:
        """Return how many numbers one network writes for one row of ``x`` ``(n, ...)``."""
        return 2 * sum(self._spec.shapes[layer.weight][0] for layer in self._layers)

    def at_once(self, x: Tensor, n: int) -> tuple[int, int]:
        """Return how many of ``n`` rows like those of ``x``, and networks, stay within the largest
        block.
        """
        return at_once(n, self.elements(x))

    def hidden(self, theta: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Return the activations of every hidden layer by label, ``(batch, width, n)``."""
        tape = self._forward(theta, x, False)
        return {
            label: step.value
            for label, step in zip(self._spec.activations, tape, strict=False)
        }

    def pullback(
        self, theta: Tensor, x: Tensor, *, per_network: bool = False, reuse: bool = False
    ) -> tuple[Tensor, Pullback]:
        """Return the outputs and the function that carries a gradient by them back to the weights.

        With ``reuse`` both are good until the next such call in this thread, which may write into
        their memory.
        """
        if self._fused.applies(theta, x):

            def compiled(grad_outputs: Tensor) -> Tensor:
                if is_untracked_cpu(grad_outputs):
                    return self._fused.vjp(theta, x, per_network, grad_outputs)
                return self._backward(
                    theta, self._forward(theta, x, per_network), grad_outputs.mT
                )

            return self._fused.outputs(theta, x, per_network), compiled
        memory = self._memory if reuse and is_untracked_cpu(theta, x) else None
        tape = self._forward(theta, x, per_network, memory)

        def vjp(grad_outputs: Tensor) -> Tensor:
            return self._backward(
                theta,
                tape,
                grad_outputs.mT,
                memory if is_untracked_cpu(grad_outputs) else None,
            )

        return tape[-1].value.mT, vjp

    def squared_error(
        self, theta: Tensor, x: Tensor, y: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
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
                f"inputs {tuple(x.shape)} and targets {tuple(y.shape)} do not fit {len(theta)} "
                f"networks {self.in_features} -> {outputs}"
            )
        if self._fused.applies(theta, x) and is_untracked_cpu(y) and y.dtype == x.dtype:
            return self._fused.squared_error(theta, x, y, rows)
        if rows is not None:
            x, y = x[rows], y[:, rows]
        fitted, vjp = self.pullback(theta, x, reuse=True)
        residual = fitted - y
        return 0.5 * residual.double().square().sum((1, 2)), vjp(residual)

    def jacobian(
        self,
        theta: Tensor,
        x: Tensor,
        *,
        per_network: bool = False,
        names: Collection[str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs and their derivative by the weights, or some of them,
        ``(batch, n, out, dim)``.
        """
        tape = self._forward(theta, x, per_network)
        params = self._params(theta)
        wanted = [
            name
            for name in self._spec.names
            if name in params and (names is None or name in names)
        ]
        out, n = tape[-1].value.shape[-2:]
        batch = theta.shape[0]
        # delta[b, k, j, i]: derivative of output k by pre-activation j, at row i
        delta = (
            torch.eye(out, dtype=theta.dtype, device=theta.device)
            .reshape(1, out, out, 1)
            .expand(batch, -1, -1, n)
        )
        blocks: dict[str, Tensor] = {}
        for layer, step in zip(reversed(self._layers), reversed(tape), strict=True):
            if blocks.keys() >= set(wanted):
                break  # the layers below are not asked for
            delta = delta * layer.activation.derivative(step.a, step.value).unsqueeze(1)
            h = step.h if step.h.dim() == 3 else step.h.expand(batch, *step.h.shape)
            if layer.weight in wanted:
                blocks[layer.weight] = torch.einsum("bkji,bfi->bikjf", delta, h).flatten(3)
            if layer.bias in wanted:
                blocks[layer.bias] = delta.permute(0, 3, 1, 2)
            if layer is not self._layers[0]:
                delta = torch.einsum("bjf,bkji->bkfi", params[layer.weight], delta)
        none = theta.new_zeros(batch, n, out, 0)
        return tape[-1].value.mT, torch.cat([blocks[name] for name in wanted] or [none], -1)

    def products(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Pullback, Pullback]:
        """Return the outputs, what takes directions of theta to those of the outputs, and the
        pullback.
        """
        outputs, vjp = self.pullback(theta, x)
        tape, params = self._forward(theta, x, False), self._params(theta)
        slopes = [
            layer.activation.derivative(*step[1:])
            for layer, step in zip(self._layers, tape, strict=True)
        ]

        def jvp(v: Tensor) -> Tensor:
            given, moved = self._params(v), None
            for layer, step, slope in zip(self._layers, tape, slopes, strict=True):
                along = given[layer.weight] @ step.h
                if layer.bias is not None:
                    along = along + given[layer.bias].unsqueeze(-1)
                if moved is not None:
                    along = along + params[layer.weight] @ moved
                moved = along * slope
            assert moved is not None
            return moved.mT

        return outputs, jvp, vjp

    def factored(
        self, theta: Tensor, x: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], FactoredJacobian]]:
        """Return the outputs, and what makes S^T J of mixtures S of them,
        ``(batch, n, out, rank)``, without J.
        """
        tape = self._forward(theta, x, False)
        params = self._params(theta)
        names = tuple(name for name in self._spec.names if name in params)

        def made(seeds: Tensor) -> FactoredJacobian:
            # (batch, out, n, rank): derivatives by what leaves a layer
            leaving = seeds.movedim(2, 1)
            parts = []
            for layer, step in zip(reversed(self._layers), reversed(tape), strict=True):
                if layer.activation.name != "identity":
                    leaving = leaving * layer.activation.derivative(
                        step.a, step.value
                    ).unsqueeze(-1)
                parts.append(Outer(layer, step.h, leaving))
                if layer is not self._layers[0]:
                    leaving = (params[layer.weight].mT @ leaving.flatten(2)).unflatten(
                        2, leaving.shape[2:]
                    )
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

    def _forward(
        self, theta: Tensor, x: Tensor, per_network: bool, memory: _Memory | None = None
    ) -> list[_Step]:
        params = self._params(theta)
        # (in, n), shared by every network, or (batch, in, n)
        h = x.flatten(2 if per_network else 1).mT
        tape = []
        for layer in self._layers:
            a = self._affine(params, layer, h, memory)
            value = (
                layer.activation.overwrite(a)
                if memory and layer.activation.reusable
                else layer.activation(a)
            )
            tape.append(_Step(h, a, value))
            h = value
        return tape

    @staticmethod
    def _affine(
        params: dict[str, Tensor], layer: Layer, h: Tensor, memory: _Memory | None
    ) -> Tensor:
        weight = params[layer.weight]  # (batch, out, in)
        bias = None if layer.bias is None else params[layer.bias].unsqueeze(-1)
        if memory is None and h.dim() == 2:
            product = torch.matmul(weight, h)
            return product if bias is None else product + bias
        h = h.expand(len(weight), *h.shape[-2:])
        out = (
            None
            if memory is None
            else memory.take(layer.weight, weight, *weight.shape[:2], h.shape[-1])
        )
        return (
            torch.bmm(weight, h, out=out)
            if bias is None
            else torch.baddbmm(bias, weight, h, out=out)
        )

    def _backward(
        self, theta: Tensor, tape: list[_Step], delta: Tensor, memory: _Memory | None = None
    ) -> Tensor:
        params = self._params(theta)
        grads: dict[str, Tensor] = {}
        for layer, step in zip(reversed(self._layers), reversed(tape), strict=True):
            activation, given = layer.activation, layer is self._layers[-1]
            if memory and activation.reusable and not given:
                delta = activation.vjp(delta, step.value)
            elif activation.name != "identity":
                delta = delta * activation.derivative(step.a, step.value)  # (batch, out, n)
            grads[layer.weight] = torch.matmul(delta, step.h.mT).flatten(1)
            if layer.bias is not None:
                grads[layer.bias] = delta.sum(-1)
            if layer is not self._layers[0]:
                weight = params[layer.weight].mT
                out = memory and memory.take(
                    f"delta of {layer.weight}", weight, *weight.shape[:2], delta.shape[-1]
                )
                delta = torch.bmm(weight, delta, out=out)
        # (batch, dim)
        return torch.cat([grads[name] for name in self._spec.names if name in grads], -1)


class _Memory(threading.local):
    """Tensors that are written again and again, for each thread its own.

    Fresh memory is what large batches cost most on a CPU: the system zeroes its pages, and takes
    them back after one use.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[_Memory], tuple[()]]:
        return _Memory, ()  # copies begin with nothing

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return the tensor of this name, with whatever is in it.

        A new one if it is of another shape or type.
        """
        kept = self._kept.get(name)
        if kept is None or kept.shape != shape or kept.dtype != like.dtype:
            kept = self._kept[name] = like.new_empty(shape)
        return kept


class ModuleNetwork:
    """Any module that maps a batch of inputs to a batch of outputs, each row by itself.

    Where derivatives are followed, and where operations are so small that calling them costs more
    than what they compute, all networks go through ``vmap``. Elsewhere they take turns, which is
    faster: torch has better code for one network than for many, and the caches hold one. Sizes
    decide, not a clock, so results are the same each time.

    Args:
        net: the module; it keeps its buffers, and the parameters that ``spec`` does not name.
        spec: the layout of ``theta``.
    """

    def __init__(self, net: nn.Module, spec: WeightSpec) -> None:
        self._names = tuple(name for name in spec.names if name not in spec.extras)
        self._shapes = [spec.shapes[name] for name in self._names]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self._dim = sum(self._sizes)
        self._module = _OwnModule(net, self._names)
        self._costs: dict[tuple[int, ...], _Cost] = {}

    def __call__(self, theta: Tensor, x: Tensor, *, per_network: bool = False) -> Tensor:
        """Return the outputs, ``(batch, n, out)``."""
        if not self._take_turns(theta, x, per_network):
            return self._mapped(theta, x, per_network)
        inputs = self._inputs(theta, x, per_network)
        with torch.no_grad():
            return torch.stack(
                [self._one(*each) for each in zip(theta, inputs, strict=True)]
            )

    def pullback(
        self, theta: Tensor, x: Tensor, *, per_network: bool = False, reuse: bool = False
    ) -> tuple[Tensor, Pullback]:
        """Return the outputs and the function that carries a gradient by them back to the weights.

        With ``reuse`` the function may be called once.
        """

        def mapped() -> tuple[Tensor, Pullback]:
            weights = theta[:, : self._dim]
            outputs, vjp, *_ = torch.func.vjp(
                lambda weights: self._mapped(weights, x, per_network), weights
            )
            return outputs, lambda grad_outputs: vjp(grad_outputs)[0]

        if not self._take_turns(theta, x, per_network):
            return mapped()
        leaves = [
            weights.requires_grad_() for weights in theta[:, : self._dim].detach().unbind()
        ]
        with torch.enable_grad():
            inputs = self._inputs(theta, x, per_network)
            tapes = [self._one(*each) for each in zip(leaves, inputs, strict=True)]

        def vjp(grad_outputs: Tensor) -> Tensor:
            if is_tracked(grad_outputs):
                return mapped()[1](grad_outputs)
            parts = zip(tapes, leaves, grad_outputs, strict=True)
            # What a tape keeps is freed as it is read, which spares fresh memory.
            keep = not reuse
            return torch.stack(
                [torch.autograd.grad(tape, leaf, by, keep)[0] for tape, leaf, by in parts]
            )

        return torch.stack([tape.detach() for tape in tapes]), vjp

    def jacobian(
        self,
        theta: Tensor,
        x: Tensor,
        *,
        per_network: bool = False,
        names: Collection[str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs and their derivative by the weights, or some of them,
        ``(batch, n, out, dim)``.

        Row by row, many at once: with the rows together, each output would be followed back to
            every row.
        """
        wanted = [i for i, name in enumerate(self._names) if names is None or name in names]
        if not wanted:
            outputs = self(theta, x, per_network=per_network)
            return outputs, outputs.new_zeros(*outputs.shape, 0)

        def of_row(
            some: tuple[Tensor, ...], others: list[Tensor], row: Tensor
        ) -> tuple[Tensor, Tensor]:
            params = list(others)
            for i, param in zip(wanted, some, strict=True):
                params[i] = param
            outputs = self._evaluated(params, row.unsqueeze(0)).squeeze(0)
            return outputs, outputs

        def of_network(weights: Tensor, rows: Tensor) -> Any:
            params = self._parts(weights)
            some = tuple(params[i] for i in wanted)
            with sdpa_kernel(SDPBackend.MATH):
                return torch.func.vmap(
                    torch.func.jacrev(of_row, has_aux=True), (None, None, 0)
                )(some, params, rows)

        if not self._take_turns(theta, x, per_network):
            blocks, outputs = torch.func.vmap(of_network, _in_dims(per_network))(theta, x)
            return outputs, torch.cat([block.flatten(3) for block in blocks], -1)
        found = [
            of_network(*each)
            for each in zip(theta, x if per_network else [x] * len(theta), strict=True)
        ]
        jacobian = torch.stack(
            [torch.cat([block.flatten(2) for block in blocks], -1) for blocks, _ in found]
        )
        return torch.stack([outputs for _, outputs in found]), jacobian

    def elements(self, x: Tensor) -> int:
        """Return how many numbers one network writes for one row of ``x`` ``(n, ...)``."""
        return self._cost(x).elements

    def at_once(self, x: Tensor, n: int) -> tuple[int, int]:
        """Return how many of ``n`` rows like those of ``x``, and networks, stay within the largest
        block.
        """
        return at_once(n, self.elements(x))

    def _one(self, theta: Tensor, x: Tensor) -> Tensor:
        """Evaluate the network with one weight vector, ``(dim,) -> (n, out)``."""
        return self._evaluated(self._parts(theta), x)

    def _parts(self, theta: Tensor) -> list[Tensor]:
        """Return the tensors within ``(dim,)``."""
        parts = theta[: self._dim].split_with_sizes(self._sizes)
        return [
            part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)
        ]

    def _evaluated(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        outputs = self._module.evaluate(params, x)
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"the network must return one tensor, got {type(outputs).__name__}"
            )
        return outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs

    def _mapped(self, theta: Tensor, x: Tensor, per_network: bool) -> Tensor:
        # Fused attention can neither be mapped nor be differentiated forwards or twice.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(self._one, _in_dims(per_network), randomness="error")(
                theta, x
            )

    def _inputs(self, theta: Tensor, x: Tensor, per_network: bool) -> list[Tensor]:
        """Return the inputs of every network, in the memory format that suits the module."""
        inputs = list(x) if per_network else [x]
        if self._cost(inputs[0]).channels_last:
            inputs = [each.to(memory_format=torch.channels_last) for each in inputs]
        return inputs if per_network else inputs * len(theta)

    def _take_turns(self, theta: Tensor, x: Tensor, per_network: bool) -> bool:
        """Say whether the networks are evaluated one by one; see the class."""
        if (
            is_tracked(theta, x)
            or theta.device.type != "cpu"
            or torch.compiler.is_compiling()
        ):
            return False
        if torch.is_inference_mode_enabled() or theta.is_inference() or x.is_inference():
            return False  # there can be no tape of these
        rows = x[0] if per_network else x
        cost = self._cost(rows)
        return (
            len(theta) < FEW_NETWORKS
            or len(rows) * cost.elements > SMALL_OPERATION * cost.operations
        )

    def _cost(self, x: Tensor) -> _Cost:
        """Return what a row of x costs, found out once for every shape of rows."""
        if (found := self._costs.get(x.shape[1:])) is None:
            found = self._costs[x.shape[1:]] = self._measured(x)
        return found

    def _measured(self, x: Tensor) -> _Cost:
        theta = torch.linspace(-1, 1, self._dim, dtype=self._module.dtype, device=x.device)
        with torch.no_grad(), _Counting() as counted:
            self._one(theta, x[:1])
        images = (
            x.dim() == 4
            and self._module.convolves
            and self._takes_channels_last(theta, x[:2])
        )
        return _Cost(counted.elements, counted.operations, images)

    def _takes_channels_last(self, theta: Tensor, x: Tensor) -> bool:
        theta = theta.requires_grad_()
        try:
            with torch.enable_grad():
                outputs = self._one(theta, x.to(memory_format=torch.channels_last))
                torch.autograd.grad(outputs.sum(), theta)
        except RuntimeError:  # a view that needs the other format
            return False
        return True


class _Cost(NamedTuple):
    """What it takes to evaluate one network."""

    elements: int  # numbers written for a row of data
    operations: int
    # whether the rows are images that may lie in memory so, as convolutions prefer
    channels_last: bool


class _Counting(TorchDispatchMode):
    """Count the operations that write new tensors, and the numbers in these."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            self.elements += sum(each.numel() for each in made)
            self.operations += bool(made)
        return result


class _OwnModule(threading.local):
    """A module into which weights are put, for each thread its own.

    Buffers and constants are shared with the module that it is a copy of.
    """

    def __init__(self, net: nn.Module, names: tuple[str, ...]) -> None:
        self._arguments = net, names
        constants = [
            parameter for name, parameter in net.named_parameters() if name not in names
        ]
        self._module = copy.deepcopy(
            net, {id(each): each for each in (*constants, *net.buffers())}
        )
        _avoid_fast_path(self._module)
        self.convolves = any(
            isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in net.modules()
        )
        parameters = dict(self._module.named_parameters())
        self.dtype = parameters[names[0]].dtype
        order = {id(parameters[name]): i for i, name in enumerate(names)}
        self._places = [
            (module._parameters, key, order[id(parameter)])
            for module in self._module.modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in order
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def evaluate(self, params: Sequence[Tensor], x: Tensor) -> Any:
        """Return what the module makes of inputs with these parameters, in the order of
        ``names``.
        """
        before = [owner[key] for owner, key, _ in self._places]
        try:
            for owner, key, i in self._places:
                owner[key] = params[i]  # type: ignore[assignment]
            return self._module(x)
        finally:
            for (owner, key, _), parameter in zip(self._places, before, strict=True):
                owner[key] = parameter


def _avoid_fast_path(net: nn.Module) -> None:
    """Let attention be computed by operations that can be mapped and differentiated.

    In evaluation torch has code for it that cannot; training without dropout is the same function.
    """
    for module in net.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.training, module.dropout = True, 0.0
            module.forward = functools.partial(_attend, module.forward)  # type: ignore[method-assign]
        elif isinstance(
            module,
            nn.TransformerEncoder | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer,
        ):
            # its dropout is a module of its own, and stays in evaluation
            module.training = True


def _attend(
    forward: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any = None,
    need_weights: bool = True,
    *rest: Any,
    key_padding_mask: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with all weights at hand: without them torch's code is a single operation."""
    mask = key_padding_mask if mask is None else mask
    outputs, weights = forward(query, key, value, mask, True, *rest, **options)
    return outputs, weights if need_weights else None


def _in_dims(per_network: bool) -> tuple[int, int | None]:
    return (0, 0 if per_network else None)
