"""Weight space: named tensors as one flat vector, the label of every axis, and the symmetry group that follows.

The layout of ``theta`` is the order of ``net.named_parameters()``, each tensor row-major, followed by whatever a
model appends (prior and likelihood parameters). Every axis of a tensor carries the label of the hidden layer
whose units it indexes, or None. Axis 0 is the side of the units themselves (their incoming weights and biases),
axis 1 the side of those who read them (their outgoing weights). Everything else here follows from the labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from bnnflow.activations import Activation, activation_of
from bnnflow.seeding import as_generator
from bnnflow.types import HierarchicalPrior, Prior, Seed

__all__ = ["Layer", "Symmetries", "WeightSpec"]


class Layer(NamedTuple):
    """One affine layer of a chain: its tensors by name, and the activation that follows it."""

    weight: str
    bias: str | None
    activation: Activation


class Symmetries(NamedTuple):
    """The hidden layers (by label) whose units may be permuted, flipped in sign, or rescaled."""

    permutation: frozenset[str]
    sign: frozenset[str]
    scale: frozenset[str]


@dataclass(frozen=True)
class WeightSpec:
    """What every entry of a flat weight vector means.

    Attributes:
        names: tensor names in the order of the flat vector.
        shapes: shape of each tensor.
        axes: a label or None for each axis of each tensor.
        activations: the activation of each hidden layer, by label.
        layers: the affine layers in order, where the network is a chain of them; empty otherwise.
        extras: the tensors that a model appended to the network's own.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        >>> spec = WeightSpec.of(net)
        >>> spec.dim, spec.axes["0.weight"], spec.axes["2.weight"]
        (131, ('h1', None), (None, 'h1'))
    """

    names: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[str | None, ...]]
    activations: dict[str, Activation]
    layers: tuple[Layer, ...] = ()
    extras: tuple[str, ...] = ()

    @classmethod
    def of(cls, net: nn.Module) -> WeightSpec:
        """Label the weights of a multi-layer perceptron.

        The network is traced, so a ``Sequential``, nested ones and a class with a ``forward`` of its own are all
        understood as long as data flows through one chain of ``Linear`` layers and elementwise activations.

        Args:
            net: any depth, one linear layer included, with or without biases.

        Raises:
            ValueError: naming the first module or operation that cannot be labelled.
        """
        layers = _trace_chain(net)
        parameters = dict(net.named_parameters())
        used = [name for layer in layers for name in (layer.weight, layer.bias) if name is not None]
        if len(set(used)) < len(used) or set(used) != set(parameters):
            odd_one = next((n for n in used if used.count(n) > 1), None) or (set(parameters) ^ set(used)).pop()
            raise ValueError(f"cannot label parameter {odd_one!r}: it is shared, or belongs to no linear layer")
        axes: dict[str, tuple[str | None, ...]] = {}
        activations = {}
        for index, layer in enumerate(layers):
            reads = f"h{index}" if index > 0 else None
            writes = f"h{index + 1}" if index < len(layers) - 1 else None
            axes[layer.weight] = (writes, reads)
            if layer.bias is not None:
                axes[layer.bias] = (writes,)
            if writes is not None:
                activations[writes] = layer.activation
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        return cls(tuple(shapes), shapes, {name: axes[name] for name in shapes}, activations, layers)

    @classmethod
    def unlabelled(cls, net: nn.Module) -> WeightSpec:
        """Describe the weights of any network without claiming a symmetry."""
        shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
        return cls(tuple(shapes), shapes, {name: (None,) * len(shape) for name, shape in shapes.items()}, {})

    def extend(
        self, extras: Mapping[str, tuple[int, ...]], axes: Mapping[str, tuple[str | None, ...]] | None = None
    ) -> WeightSpec:
        """Append tensors such as the parameters of a likelihood.

        Args:
            extras: their shapes, by name.
            axes: labels of those that are permuted with hidden units; signs and scales never act on them.
        """
        axes = axes or {}
        return replace(
            self,
            names=self.names + tuple(extras),
            shapes=self.shapes | dict(extras),
            axes=self.axes | {name: axes.get(name, (None,) * len(shape)) for name, shape in extras.items()},
            extras=self.extras + tuple(extras),
        )

    def parameter_axes(self, name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """Return the labels of a prior's parameter: those of the tensor that its name ends in, where sizes agree.

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
            >>> spec = WeightSpec.of(net)
            >>> spec.parameter_axes("local.2.weight", (1, 16)), spec.parameter_axes("scale.2.weight", (1,))
            ((None, 'h1'), (None,))
        """
        named = [tensor for tensor in self.names if name.endswith(f".{tensor}")]
        tensor = max(named, key=len, default=None)
        if tensor is None or len(shape) != len(self.shapes[tensor]):
            return (None,) * len(shape)
        sizes = zip(self.axes[tensor], shape, self.shapes[tensor], strict=True)
        return tuple(label if own == size else None for label, own, size in sizes)

    @property
    def network(self) -> WeightSpec:
        """The same space without the extras."""
        kept = [name for name in self.names if name not in self.extras]
        return replace(
            self,
            names=tuple(kept),
            shapes={name: self.shapes[name] for name in kept},
            axes={name: self.axes[name] for name in kept},
            extras=(),
        )

    def describe(self) -> dict[str, Any]:
        """Return plain values from which ``from_description`` rebuilds the spec."""
        return {
            "shapes": [[name, list(self.shapes[name]), list(self.axes[name])] for name in self.names],
            "activations": {label: activation.name for label, activation in self.activations.items()},
            "layers": [[layer.weight, layer.bias, layer.activation.name] for layer in self.layers],
            "extras": list(self.extras),
        }

    @classmethod
    def from_description(cls, values: dict[str, Any]) -> WeightSpec:
        """Rebuild a spec from what ``describe`` returned."""
        return cls(
            tuple(name for name, _, _ in values["shapes"]),
            {name: tuple(shape) for name, shape, _ in values["shapes"]},
            {name: tuple(axes) for name, _, axes in values["shapes"]},
            {label: Activation(name) for label, name in values["activations"].items()},
            tuple(Layer(weight, bias, Activation(name)) for weight, bias, name in values["layers"]),
            tuple(values["extras"]),
        )

    # ---------------------------------------------------------------- layout

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each tensor lies in the flat vector."""
        slices, start = {}, 0
        for name in self.names:
            stop = start + math.prod(self.shapes[name])
            slices[name] = slice(start, stop)
            start = stop
        return slices

    @property
    def dim(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def widths(self) -> dict[str, int]:
        """Number of units of each hidden layer, by label."""
        widths: dict[str, int] = {}
        for name in self.names:
            for label, size in zip(self.axes[name], self.shapes[name], strict=True):
                if label is not None:
                    widths[label] = min(size, widths.get(label, size))
        return widths

    def blocks(self, name: str) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
        """Return the shape and the labels of a tensor whose every labelled axis runs over units alone.

        An axis may be a multiple of its label's width: every unit then owns a block of consecutive entries, as a
        channel does once a convolution's output is flattened. Such an axis is split into (units, entries of one).

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
            >>> WeightSpec.of(net).blocks("2.weight")
            ((3, 16), (None, 'h1'))
        """
        shape: list[int] = []
        axes: list[str | None] = []
        for label, size in zip(self.axes[name], self.shapes[name], strict=True):
            width = size if label is None else self.widths[label]
            shape += [width] if size == width else [width, size // width]
            axes += [label] if size == width else [label, None]
        return tuple(shape), tuple(axes)

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Join named tensors ``(..., *shape)`` to ``theta`` ``(..., dim)``; leading axes broadcast.

        Raises:
            ValueError: if a tensor is missing, is left over, or has another shape.
        """
        if set(params) != set(self.names):
            raise ValueError(f"params must have exactly the tensors {list(self.names)}, got {sorted(params)}")
        parts = []
        for name in self.names:
            shape, tensor = self.shapes[name], params[name]
            lead = tensor.shape[: tensor.dim() - len(shape)]
            if tuple(tensor.shape[len(lead) :]) != shape:
                raise ValueError(f"{name} must end in shape {shape}, got {tuple(tensor.shape)}")
            parts.append(tensor.reshape(*lead, math.prod(shape)))
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)  # (..., dim)

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Split ``theta`` ``(..., dim)`` into named tensors ``(..., *shape)``.

        Raises:
            ValueError: if the last axis is not ``dim`` long.
        """
        self.check(theta)
        return {
            name: theta[..., where].reshape(*theta.shape[:-1], *self.shapes[name])
            for name, where in self.slices.items()
        }

    def check(self, theta: Tensor) -> None:
        """Raise ``ValueError`` unless the last axis of ``theta`` is ``dim`` long."""
        if theta.dim() == 0 or theta.shape[-1] != self.dim:
            raise ValueError(f"theta must end in an axis of length {self.dim}, got shape {tuple(theta.shape)}")

    # ---------------------------------------------------------------- the group action

    def permute(self, theta: Tensor, perms: Mapping[str, Tensor]) -> Tensor:
        """Reorder hidden units: unit i of the result is unit ``perms[label][i]`` of ``theta``.

        Args:
            theta: ``(..., dim)``.
            perms: ``(width,)`` or ``(..., width)`` integer tensors by label; layers left out stay as they are.
        """
        self.check(theta)
        self._check_labels(perms)
        parts = []
        for name, where in self.slices.items():
            shape = self.shapes[name]
            index = torch.zeros((), dtype=torch.long, device=theta.device)
            for axis, (label, size) in enumerate(zip(self.axes[name], shape, strict=True)):
                coordinate = (
                    perms[label] if label is not None and label in perms else torch.arange(size, device=theta.device)
                )
                trailing = (1,) * (len(shape) - axis - 1)
                along = coordinate.reshape(*coordinate.shape[:-1], *(1,) * axis, size, *trailing)
                index = index + along * math.prod(shape[axis + 1 :])
            parts.append((index + where.start).reshape(*index.shape[: index.dim() - len(shape)], -1))
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        index = torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)  # (..., dim)
        shape = torch.broadcast_shapes(theta.shape, index.shape)
        return theta.expand(shape).gather(-1, index.expand(shape))

    def flip(self, theta: Tensor, signs: Mapping[str, Tensor]) -> Tensor:
        """Flip the sign of everything that enters and leaves chosen units of odd activations.

        Args:
            theta: ``(..., dim)``.
            signs: ``(width,)`` or ``(..., width)`` tensors of +1 and -1 by label.
        """
        self._check_labels(signs, "sign", {label for label, f in self.activations.items() if f.odd})
        return theta * self._factors(theta, signs)

    def rescale(self, theta: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Multiply what enters a unit by its scale and divide what leaves it, for homogeneous activations.

        Args:
            theta: ``(..., dim)``.
            scales: ``(width,)`` or ``(..., width)`` positive tensors by label.
        """
        self._check_labels(scales, "scale", {label for label, f in self.activations.items() if f.homogeneous})
        if any(bool((scale <= 0).any()) for scale in scales.values()):
            raise ValueError("scales must be positive")
        return theta * self._factors(theta, scales)

    def _factors(self, theta: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the multiplier of every weight: its unit's scale, over the scales of the units it reads."""
        self.check(theta)
        parts = []
        for name, shape in self.shapes.items():
            factor = torch.ones(shape, dtype=theta.dtype, device=theta.device)
            for axis, label in enumerate(self.axes[name] if name not in self.extras else ()):
                if label is not None and label in scales:
                    scale = scales[label].to(theta)
                    along = scale.reshape(*scale.shape[:-1], *(1,) * axis, shape[axis], *(1,) * (len(shape) - axis - 1))
                    factor = factor * along if axis == 0 else factor / along
            parts.append(factor.reshape(*factor.shape[: factor.dim() - len(shape)], -1))
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)  # (..., dim)

    def _check_labels(
        self, elements: Mapping[str, Tensor], action: str = "permutation", allowed: set[str] | None = None
    ) -> None:
        for label, element in elements.items():
            if label not in self.widths:
                raise ValueError(f"no hidden layer {label!r}; there are {sorted(self.widths)}")
            if allowed is not None and label not in allowed:
                raise ValueError(
                    f"{label} has activation {self.activations[label].name}, which has no {action} symmetry"
                )
            if element.shape[-1] != self.widths[label]:
                raise ValueError(f"{action} of {label} must end in an axis of {self.widths[label]}")

    def symmetries(self, prior: Prior | HierarchicalPrior | None = None) -> Symmetries:
        """Return the symmetries of the network's function, or those that also keep a prior.

        A permutation keeps a prior whose distributions do not vary along the permuted axes, or vary only with
        parameters that are permuted too; a sign flip one that is even on every tensor that touches the layer; no
        proper prior keeps a rescaling.
        """
        labels = frozenset(self.activations)
        odd = frozenset(label for label, f in self.activations.items() if f.odd)
        homogeneous = frozenset(label for label, f in self.activations.items() if f.homogeneous)
        if prior is None:
            return Symmetries(labels, odd, homogeneous)
        network = self.network
        given, varies = _probe_parameters(network, prior)
        densities = _elementwise_densities(network, prior, given)
        uneven: set[str | None] = set()
        for name, density in densities.items():
            if not torch.allclose(density, density.flip(0), atol=1e-5):
                uneven |= set(network.axes[name])
        for label in labels - varies:
            for perm in _generators_of_permutations(network.widths[label]):
                moved = {
                    name: _reordered(value, network.parameter_axes(name, tuple(value.shape)), label, perm)
                    for name, value in given.items()
                }
                after = _elementwise_densities(network, prior, moved) if given else densities
                if not all(
                    torch.allclose(
                        after[name], _reordered(density, (None, *network.axes[name]), label, perm), atol=1e-5
                    )
                    for name, density in densities.items()
                ):
                    varies.add(label)
        return Symmetries(labels - varies, odd - uneven, frozenset())

    def random_symmetry(self, theta: Tensor, seed: Seed, prior: Prior | HierarchicalPrior | None = None) -> Tensor:
        """Apply a random element of the group to every network in ``theta`` ``(..., dim)``.

        Permutations and signs are uniform, scales log-normal. With a ``prior``, only what keeps it is used.
        """
        return self.transform(self.symmetries(prior), seed, theta)[0]

    def transform(self, group: Symmetries, seed: Seed, *thetas: Tensor) -> tuple[Tensor, ...]:
        """Move tensors of networks ``(..., dim)`` by random elements of ``group``, one for each network.

        Networks at the same place of different tensors are moved by the same element.
        """
        device, lead = thetas[0].device, thetas[0].shape[:-1]
        generator = as_generator(seed, device)

        def uniform(label: str) -> Tensor:
            return torch.rand(*lead, self.widths[label], generator=generator, device=device)

        perms = {label: uniform(label).argsort(-1) for label in sorted(group.permutation)}
        signs = {label: torch.where(uniform(label) < 0.5, -1.0, 1.0) for label in sorted(group.sign)}
        scales = {label: (2 * uniform(label) - 1).mul(1.5).exp() for label in sorted(group.scale)}
        results = []
        for each in thetas:
            result = self.permute(each, perms) if perms else each
            result = self.flip(result, signs) if signs else result
            results.append(self.rescale(result, scales) if scales else result)
        return tuple(results)

    @property
    def log_group_order(self) -> float:
        """Log of the number of permutations and sign flips that leave every function unchanged."""
        return sum(
            math.lgamma(width + 1) + (width * math.log(2) if self.activations[label].odd else 0.0)
            for label, width in self.widths.items()
        )


_PROBES = torch.linspace(-3, 3, 25, dtype=torch.float64)


def _probe_parameters(network: WeightSpec, prior: Prior | HierarchicalPrior) -> tuple[dict[str, Tensor], set[str]]:
    """Return values of a prior's parameters that no permutation keeps, and the labels along which their priors vary."""
    given: dict[str, Tensor] = {}
    varies: set[str] = set()
    generator = torch.Generator().manual_seed(0)
    distributions = prior.parameters(network) if hasattr(prior, "parameters") else {}  # type: ignore[union-attr]
    for name, distribution in distributions.items():
        distribution = unwrapped(distribution)
        shape = tuple(distribution.batch_shape) or (1,)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        given[name] = values.exp()  # any real parameter may be positive, too
        probes = _PROBES.exp().reshape(-1, *(1,) * len(shape)).expand(-1, *shape)
        density = distribution.log_prob(probes.to(_dtype_of(distribution))).double()
        for axis, label in enumerate(network.parameter_axes(name, shape), start=1):
            if label is not None and not torch.allclose(density, density.narrow(axis, 0, 1), atol=1e-5):
                varies.add(label)
    return given, varies


def _elementwise_densities(
    network: WeightSpec, prior: Prior | HierarchicalPrior, given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the log density of every entry of every tensor at the probes, ``(25, *shape)`` each."""
    inferred = hasattr(prior, "conditional")
    distributions = (
        prior.conditional(network, given) if inferred else prior.distributions(network)  # type: ignore[union-attr]
    )
    densities = {}
    for name, distribution in distributions.items():
        shape, distribution = network.shapes[name], unwrapped(distribution)
        values = _PROBES.reshape(-1, *(1,) * len(shape)).expand(-1, *shape)
        densities[name] = distribution.log_prob(values.to(_dtype_of(distribution))).double()  # (25, *shape)
    return densities


def _generators_of_permutations(n: int) -> list[Tensor]:
    """Return a transposition and a cycle, which generate all permutations of n things."""
    swap = torch.arange(n)
    swap[: min(n, 2)] = swap[: min(n, 2)].flip(0)
    return [swap, torch.arange(n).roll(1)]


def _reordered(values: Tensor, axes: tuple[str | None, ...], label: str, perm: Tensor) -> Tensor:
    """Reorder the axis that carries ``label``, if there is one."""
    return values.index_select(axes.index(label), perm) if label in axes else values


def unwrapped(distribution: torch.distributions.Distribution) -> torch.distributions.Distribution:
    """Return the elementwise distribution inside ``Independent`` and Pyro's masks."""
    while isinstance(distribution, torch.distributions.Independent) or type(distribution).__name__ == (
        "MaskedDistribution"
    ):
        distribution = distribution.base_dist  # type: ignore[attr-defined]
    return distribution


def _dtype_of(distribution: torch.distributions.Distribution) -> torch.dtype:
    """Return the dtype that a distribution's parameters have."""
    tensors = [getattr(distribution, name, None) for name in distribution.arg_constraints]
    return next(
        (t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), torch.get_default_dtype()
    )


def _trace_chain(net: nn.Module) -> tuple[Layer, ...]:
    """Follow the data through ``net`` and return its affine layers."""
    modules = dict(net.named_modules())
    for name, module in modules.items():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"cannot label module {name!r} ({type(module).__name__}): it has hooks")
    if type(net) is nn.Linear:
        return (Layer("weight", "bias" if net.bias is not None else None, Activation("identity")),)
    try:
        graph = fx.symbolic_trace(net).graph
    except Exception as error:
        raise ValueError(f"cannot trace {type(net).__name__}: {error}") from error

    layers: list[Layer] = []
    previous: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "output":
            if node.args != (previous,):
                raise ValueError(f"cannot label {type(net).__name__}: it must return one tensor")
            break
        what = _describe(node, modules)
        inputs = node.all_input_nodes
        if node.op == "placeholder" and previous is None:
            previous = node
            continue
        if len(inputs) != 1 or inputs[0] is not previous or len(node.users) != 1:
            raise ValueError(f"cannot label {what}: the network is not one chain of layers")
        previous = node
        module = modules[str(node.target)] if node.op == "call_module" else None
        if type(module) is nn.Linear:
            if any(parameter is other for parameter in module.parameters() for other in _used(layers, net)):
                raise ValueError(f"cannot label {what}: its parameters are used twice")
            prefix = str(node.target)
            bias = f"{prefix}.bias" if module.bias is not None else None
            layers.append(Layer(f"{prefix}.weight", bias, Activation("identity")))
            continue
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1) and not layers:
            continue
        if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not (module.training and module.p)):
            continue
        operation = module if module is not None else node.target
        activation = activation_of(operation, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]
        if activation is None or not layers or layers[-1].activation.name != "identity":
            raise ValueError(
                f"cannot label {what}: expected Linear layers with one elementwise activation between them"
            )
        layers[-1] = layers[-1]._replace(activation=activation)
    if not layers:
        raise ValueError(f"cannot label {type(net).__name__}: it has no Linear layer")
    return tuple(layers)


def _used(layers: list[Layer], net: nn.Module) -> list[nn.Parameter]:
    parameters = dict(net.named_parameters(remove_duplicate=False))
    return [parameters[name] for layer in layers for name in (layer.weight, layer.bias) if name is not None]


def _describe(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"module {str(node.target)!r} ({type(modules[str(node.target)]).__name__})"
    return f"operation {getattr(node.target, '__name__', node.target)!r}"
