"""Follow the units of a network's hidden layers through its graph, and label the weights that write
and read them.

Every convolution, linear layer and embedding writes new units. Whatever keeps them apart
(elementwise functions, pooling, reshaping, normalisation) hands them on, and an addition makes the
units of both sides one. Inputs and outputs have no units. Permutations act on all tensors that
touch a unit. Signs and scales stop at a normalisation, whose result does not scale with its input:
they begin again with the weights that it applies.
"""

from __future__ import annotations

import math
import operator
import re
import threading
from collections.abc import Callable, Sequence
from enum import Enum
from itertools import pairwise
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bnnflow.activations import Activation, activation_of

__all__ = ["Labels", "Layer", "trace"]


class Layer(NamedTuple):
    """One affine layer of a chain: its tensors by name, and the activation that follows it."""

    weight: str
    bias: str | None
    activation: Activation


class Labels(NamedTuple):
    """What `trace` finds; the fields of a `bnnflow.weights.WeightSpec`."""

    axes: dict[str, tuple[str | None, ...]]
    activations: dict[str, Activation]
    layers: tuple[Layer, ...]
    scale_free_axes: frozenset[tuple[str, int]]
    transposed: frozenset[str] = frozenset()


def trace(net: nn.Module) -> Labels:
    """Label the axes of every parameter of ``net``; see `bnnflow.weights.WeightSpec.of`.

    Raises:
        ValueError: naming the first module, operation or parameter that cannot be labelled.
    """
    for name, module in net.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            reason = "it has hooks, or a forward that is not that of its class"
            raise ValueError(
                f"cannot label module {name!r} ({type(module).__name__}): {reason}"
            )
    if type(net) is nn.Linear:
        axes: dict[str, tuple[str | None, ...]] = {
            name: (None,) * p.dim() for name, p in net.named_parameters()
        }
        layer = Layer(
            "weight", None if net.bias is None else "bias", Activation("identity")
        )
        return Labels(axes, {}, (layer,), frozenset())
    if type(net).__module__.startswith("torch.nn.") and not list(net.children()):
        return _unwrapped(trace(nn.Sequential(net)))
    try:
        return _Walk(net).follow(_Tracer(whole=False).graph_of(net))
    except ValueError:
        if not any(_constant(module) for module in net.modules()):
            raise
        return _Walk(net).follow(_Tracer(whole=True).graph_of(net))


def _unwrapped(found: Labels) -> Labels:
    """Return the labels of a module, given those of a ``Sequential`` of it alone."""
    bare = {name: name.removeprefix("0.") for name in found.axes}
    return Labels(
        {bare[name]: axes for name, axes in found.axes.items()},
        found.activations,
        (),
        frozenset((bare[name], axis) for name, axis in found.scale_free_axes),
        frozenset(bare[name] for name in found.transposed),
    )


def _constant(module: nn.Module) -> bool:
    """Say whether a module has parameters, and none of them is free."""
    flags = [parameter.requires_grad for parameter in module.parameters()]
    return bool(flags) and not any(flags)


# torch.fx replaces the methods of nn.Module for the whole process, and puts them back.
_PATCHED = threading.Lock()


class _Tracer(fx.Tracer):
    """Traces through every module but torch's own and the activations that are known.

    One thread at a time; what other threads call meanwhile is called as ever.

    Args:
        whole: leave modules whose parameters are all constants whole, too.
    """

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self._whole = whole

    def graph_of(self, net: nn.Module) -> fx.Graph:
        """Return the graph of a network, or raise ``ValueError``."""
        with _PATCHED:
            self._thread = threading.get_ident()
            try:
                return self.trace(net)
            except Exception as error:
                raise ValueError(f"cannot trace {type(net).__name__}: {error}") from error

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        mine = threading.get_ident() == self._thread
        return (
            super().call_module(m, forward, args, kwargs)
            if mine
            else forward(*args, **kwargs)
        )

    def getattr(
        self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]
    ) -> Any:
        mine = threading.get_ident() == self._thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if mine else attr_val

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = activation_of(m) is not None or (self._whole and _constant(m))
        return whole or super().is_leaf_module(m, module_qualified_name)


class _Part(NamedTuple):
    """A factor of the size of an axis: some digits of the number of a unit, or a position.

    The entries of an axis are numbered row-major by its parts, as those of a tensor by its axes.
    """

    size: int | None  # None where it depends on the data
    stride: int = 0  # units from one digit to the next; 0 for positions


_Axis = tuple[_Part, ...]
_POSITIONS: _Axis = (_Part(None),)


class _Value(NamedTuple):
    """A tensor on its way through the network."""

    # whose units it holds; None for what comes from the inputs alone
    segment: int | None = None
    width: int = 1  # number of units
    axes: tuple[_Axis, ...] = ()  # the last axes, as far as they are known
    whole: bool = False  # these are all axes, rows first
    factor: float = 1.0  # the number that has multiplied it since it was written
    raw: bool = False  # no function has been applied to it since it was written
    # a tensor of the module itself, of which it is made without any inputs
    stored: str = ""

    def axis(self, number: Any) -> int | None:
        """Return the index of an axis counted from the end, or None where its place is not
        known.
        """
        if not isinstance(number, int) or isinstance(number, bool):
            return None
        if self.whole and 0 <= number < len(self.axes):
            return number - len(self.axes)
        return number if -len(self.axes) <= number < 0 else None

    def holds(self, axis: int) -> bool:
        """Say whether an axis runs over all units, each with one block of consecutive entries."""
        units = [part for part in self.axes[axis] if part.stride]
        return (
            bool(units)
            and units == list(self.axes[axis][: len(units)])
            and units == _ordered(units, self.width)
        )


def _ordered(units: Sequence[_Part], width: int) -> list[_Part]:
    """Return the parts from the largest stride down, if they number all units; else none."""
    found = sorted(units, key=lambda part: -part.stride)
    expected = width
    for part in found:
        if part.size is None or part.size * part.stride != expected:
            return []
        expected = part.stride
    return found if expected == 1 else []


class _Classes:
    """Disjoint sets of numbers that grow together (union-find)."""

    def __init__(self) -> None:
        self._parents: list[int] = []

    def new(self) -> int:
        self._parents.append(len(self._parents))
        return len(self._parents) - 1

    def find(self, member: int) -> int:
        while self._parents[member] != member:
            member = self._parents[member]
        return member

    def unite(self, first: int, second: int) -> None:
        self._parents[self.find(second)] = self.find(first)


class _Walk:
    """One walk through a graph in the order of its data.

    A label is a set of units that are permuted together; a segment the part of their way between
    two normalisations, along which signs and scales are the same.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.modules = dict(net.named_modules())
        self.names = {id(parameter): name for name, parameter in net.named_parameters()}
        self.shapes = {
            name: tuple(parameter.shape) for name, parameter in net.named_parameters()
        }
        # segments
        self.marks: dict[str, list[int | None]] = {
            n: [None] * len(s) for n, s in self.shapes.items()
        }
        self.values: dict[fx.Node, _Value | _Shape] = {}
        self.labels, self.segments = _Classes(), _Classes()
        self.label_of: list[int] = []  # by segment
        self.widths: list[tuple[int, int]] = []  # of segments, as they are seen on the way
        self.fixed: set[int] = set()  # labels of units that inputs or outputs share
        self.pinned: set[int] = set()  # segments without signs and scales
        self.functions: list[tuple[int, str]] = []  # what is applied to which segment
        self.scale_free_axes: set[tuple[str, int]] = set()
        self.transposed: set[str] = set()  # tensors whose second axis is the written one
        self.used: set[str] = set()
        self.layers: list[Layer] = []
        # so far, nothing but Linear layers, each with at most one activation
        self.chain = True

    def follow(self, graph: fx.Graph) -> Labels:
        """Visit every node and return what was found."""
        *nodes, output = graph.nodes
        previous = None
        for node in nodes:
            if _asks_shape(node):
                self.values[node] = _shape(node)
                continue
            if node.op == "placeholder":
                if previous is not None:
                    raise ValueError(
                        f"cannot label {type(self.net).__name__}: it must take one tensor"
                    )
                value = _Value()
            elif node.op == "get_attr":
                value = self._stored(str(node.target))
            else:
                self.chain &= [
                    n for n in node.all_input_nodes if isinstance(self.values[n], _Value)
                ] == [previous]
                value = self._apply(node)
            if value.segment is not None:
                self.widths.append((value.segment, value.width))
            readers = sum(not _asks_shape(user) for user in node.users)
            if value.raw and readers > 1:
                self._read(value)
            self.chain &= readers == 1
            self.values[node] = value
            previous = node
        return self._finish(output.args[0], previous)

    def _finish(self, output: Any, previous: fx.Node | None) -> Labels:
        """Name the labels, now that it is known which of them are one."""
        value = self.values.get(output) if isinstance(output, fx.Node) else None
        if not isinstance(value, _Value):
            raise ValueError(
                f"cannot label {type(self.net).__name__}: it must return one tensor"
            )
        self.chain &= output is previous and value.factor == 1
        self._fix(value)
        if not self.used:
            raise ValueError(
                f"cannot label {type(self.net).__name__}: it has no Linear layer and no convolution"
            )
        free = {
            name
            for name, parameter in self.net.named_parameters()
            if parameter.requires_grad
        }
        if left_over := free - self.used:
            raise ValueError(
                f"cannot label parameter {min(left_over)!r}: it belongs to no layer "
                "that the data visit"
            )

        fixed = {self.labels.find(label) for label in self.fixed}
        pinned = {self.segments.find(segment) for segment in self.pinned}
        names: dict[int, str] = {}
        for label in map(self.labels.find, self.label_of):  # in the order of depth
            if label not in fixed:
                names.setdefault(label, f"h{len(names) + 1}")
        functions: dict[str, list[str]] = {name: [] for name in names.values()}
        for segment, function in self.functions:
            name = names.get(self._label(segment))
            if (
                name
                and self.segments.find(segment) not in pinned
                and function not in functions[name]
            ):
                functions[name].append(function)
        axes: dict[str, tuple[str | None, ...]] = {}
        scale_free_axes = set()
        for tensor, marks in self.marks.items():
            axes[tensor] = tuple(
                None if mark is None else names.get(self._label(mark)) for mark in marks
            )
            for axis, mark in enumerate(marks):
                still = mark is not None and self.segments.find(mark) in pinned
                if axes[tensor][axis] and (still or (tensor, axis) in self.scale_free_axes):
                    scale_free_axes.add((tensor, axis))
        self._check_widths(axes, names)
        activations = {
            name: Activation(" + ".join(found or ["norm"]))
            for name, found in functions.items()
        }
        layers = tuple(self.layers) if self.chain else ()
        return Labels(
            axes,
            activations,
            layers,
            frozenset(scale_free_axes),
            frozenset(self.transposed),
        )

    def _check_widths(
        self, axes: dict[str, tuple[str | None, ...]], names: dict[int, str]
    ) -> None:
        """Refuse blocks of units that cut each other, and units that no tensor counts."""
        for name in names.values():
            seen = sorted(
                {
                    width
                    for segment, width in self.widths
                    if names.get(self._label(segment)) == name
                }
            )
            stored = [
                size
                for tensor, labels in axes.items()
                for label, size in zip(labels, self.shapes[tensor], strict=True)
                if label == name
            ]
            if any(large % small for small, large in pairwise(seen)) or seen[0] != min(
                stored
            ):
                raise ValueError(
                    f"cannot label {type(self.net).__name__}: it reshapes the units of {name} to "
                    "blocks that no tensor "
                    "counts, or that cut each other"
                )

    # ---------------------------------------- modules and operations

    def _stored(self, name: str) -> _Value:
        """Return a buffer or a constant that the forward pass itself takes, which inputs alone may
        meet.
        """
        if name in self.marks and operator.attrgetter(name)(self.net).requires_grad:
            raise ValueError(f"cannot label {name!r}: a tensor that belongs to no layer")
        self.chain = False
        return _Value(stored=name)

    def _apply(self, node: fx.Node) -> _Value:
        """Return what a module or an operation makes of its inputs."""
        args = [self._resolve(arg) for arg in node.args]
        options = {key: self._resolve(arg) for key, arg in node.kwargs.items()}
        tensors = [
            value
            for n in node.all_input_nodes
            if isinstance(value := self.values[n], _Value)
        ]
        stored = next((value.stored for value in tensors if value.stored), "")
        if stored and any(value.segment is not None for value in tensors):
            raise ValueError(f"cannot label {stored!r}: a tensor that belongs to no layer")
        value = args.pop(0) if args else options.pop("input", None)
        if node.op == "call_module":
            result = self._module(node, self.modules[str(node.target)], value)
        else:
            result = self._operation(node, value, args, options)
        if result is None and self._is_of_inputs(node, tensors):
            self.chain = False
            result = _Value(stored=stored if all(value.stored for value in tensors) else "")
        if result is None:
            raise self._refusal(
                node, "it is none of the layers and operations whose units can be followed"
            )
        return result

    def _resolve(self, arg: Any) -> Any:
        return self.values[arg] if isinstance(arg, fx.Node) else arg

    def _is_of_inputs(self, node: fx.Node, tensors: list[_Value]) -> bool:
        """Say whether a node sees no units, has no weights and is not random: it makes inputs of
        inputs.
        """
        name = str(getattr(node.target, "__name__", node.target))
        if (
            any(value.segment is not None for value in tensors)
            or "drop" in name
            or "rand" in name
        ):
            return False
        if node.op != "call_module":
            return True
        module = self.modules[str(node.target)]
        has_weights = any(parameter.requires_grad for parameter in module.parameters())
        return not has_weights and not (module.training and "Drop" in type(module).__name__)

    def _module(  # noqa: C901 - a branch for every kind of layer
        self, node: fx.Node, module: nn.Module, value: _Value
    ) -> _Value | None:
        if value.segment is None and _constant(module):
            self.chain = False
            return _Value()  # constant features of the inputs
        if type(module) is nn.Linear:
            return self._linear(node, module, value)
        if isinstance(module, _ConvNd) and type(module) in _CONVOLUTIONS:
            return self._convolution(node, module, value)
        if (
            type(module) is nn.Embedding
            and value.segment is None
            and module.max_norm is None
        ):
            return self._embedding(node, module)
        if type(module) in _NORMS:
            return self._norm(node, module, value)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise self._refusal(
                node, "its running statistics belong to units, but are no weights"
            )
        if type(module) is nn.Identity or (
            type(module) in _DROPOUTS and not (module.training and module.p)
        ):
            return value
        if type(module) is nn.Flatten:
            return self._flatten(node, value, module.start_dim, module.end_dim)
        if type(module) is nn.Unflatten:
            return self._unflatten(value, module.dim, module.unflattened_size)
        if type(module) in _LOCAL:
            return self._local_layer(node, module, value)
        if type(module) is nn.Upsample:
            return self._over_space(node, value, "")
        if module.__module__ == "torch.nn.modules.pooling":
            return self._pooling(node, module, value)
        return self._function(value, activation_of(module))

    def _local_layer(
        self, node: fx.Node, module: nn.Module, value: _Value
    ) -> _Value | None:
        """Understand a layer that pads or shuffles positions, unless it pads with a number of its
        own.
        """
        constant = getattr(module, "value", 0)
        return None if constant else self._local(node, value, *_LOCAL[type(module)])

    def _pooling(self, node: fx.Node, module: nn.Module, value: _Value) -> _Value | None:
        """Understand a layer of torch's that pools, unless it also says where the largest were."""
        if getattr(module, "return_indices", False):
            return None
        return self._pool(
            node, value, type(module).__name__, getattr(module, "output_size", None)
        )

    def _operation(
        self, node: fx.Node, value: Any, args: list[Any], options: dict[str, Any]
    ) -> _Value | None:
        """Understand a function or a tensor method by its name."""
        name = getattr(node.target, "__name__", str(node.target))
        if name in ("add", "iadd", "sub", "isub") and not options and len(args) == 1:
            return self._add(node, value, args[0])
        if name in ("mul", "imul", "truediv", "itruediv", "neg") and not options:
            return self._multiply(name, value, *args)
        if not isinstance(value, _Value):
            return None
        if name == "flatten":
            return self._flatten(
                node, value, *_bound(args, options, start_dim=0, end_dim=-1)
            )
        if name in ("mean", "sum", "amax"):
            dims, keepdim = _bound(args, options, dim=None, keepdim=False)
            return self._reduce(node, value, dims, keepdim, name == "amax")
        if name in ("contiguous", "clone") and not args and not options:
            return value
        if name in _RESHAPING and not options:
            return getattr(self, f"_{_RESHAPING[name]}")(value, *args)
        if node.target is F.dropout:
            rate, training, _ = _bound(args, options, p=0.5, training=True, inplace=False)
            return None if rate and training else value
        if node.target is F.interpolate:
            return self._over_space(node, value, "")
        if "pool" in name:
            sizes = args[0] if "adaptive" in name and args else options.get("output_size")
            return (
                None
                if options.get("return_indices")
                else self._pool(node, value, name, sizes)
            )
        return self._function(value, activation_of(node.target, *args, **options))  # type: ignore[arg-type]

    # ---------------------------------------- layers

    def _linear(self, node: fx.Node, module: nn.Linear, value: _Value) -> _Value:
        """Write new units, and read those along the last axis."""
        if value.segment is not None:
            sizes = [part.size for part in value.axes[-1]] if value.axes else []
            known = math.prod(size for size in sizes if size is not None)
            if None in sizes and known == 0:
                raise self._refusal(node, "what it reads has no units")
            fits = (
                module.in_features % known == 0
                if None in sizes
                else module.in_features == known
            )
            if not value.axes or not value.holds(-1) or not fits:
                raise self._refusal(
                    node, "it does not read along the axis of the units before it"
                )
        self._read(value)
        self.chain &= value.factor == 1
        written = self._segment()
        self._own(node, module, weight=(written, value.segment), bias=(written,))
        prefix = str(node.target)
        bias = None if module.bias is None else f"{prefix}.bias"
        self.layers.append(Layer(f"{prefix}.weight", bias, Activation("identity")))
        axes = (*value.axes[:-1], (_Part(module.out_features, 1),))
        return _Value(written, module.out_features, axes, value.whole, raw=True)

    def _embedding(self, node: fx.Node, module: nn.Embedding) -> _Value:
        """Write new units along the columns of a table, for rows of words."""
        self.chain = False
        written = self._segment()
        self._own(node, module, weight=(None, written))
        self.transposed.add(f"{node.target}.weight")
        axes = ((), _POSITIONS, (_Part(module.embedding_dim, 1),))
        return _Value(written, module.embedding_dim, axes, True, raw=True)

    def _convolution(self, node: fx.Node, module: _ConvNd, value: _Value) -> _Value:
        """Write new channels, or with a kernel for each channel keep them."""
        self.chain = False
        nd = len(module.kernel_size)
        value = self._by_channel(node, value, nd, module.in_channels)
        self._read(value)
        transposed = isinstance(module, _ConvTransposeNd)
        if module.groups == 1:
            written = self._segment()
            weight = (value.segment, written) if transposed else (written, value.segment)
            self._own(node, module, weight=weight, bias=(written,))
            self.transposed |= {f"{node.target}.weight"} if transposed else set()
        elif module.groups == module.in_channels == module.out_channels:
            written = value.segment
            self._own(node, module, weight=(written,), bias=(written,))
            # reads the units that it writes
            self.scale_free_axes.add((f"{node.target}.weight", 0))
        else:
            raise self._refusal(
                node,
                "its groups tie channels; one group, or one for each channel, can be labelled",
            )
        if written is None:
            return _Value()
        axes = ((), (_Part(module.out_channels, 1),), *(_POSITIONS,) * nd)
        return _Value(written, module.out_channels, axes, True, raw=True)

    def _by_channel(
        self, node: fx.Node, value: _Value, nd: int, channels: int | None = None
    ) -> _Value:
        """Return a value whose units are channels, for what mixes or counts positions along the
        last ``nd`` axes.

        Units that reshaping has spread over channels and positions move in blocks from here on:
            channel by channel.
        """
        if value.segment is None:
            return value
        if len(value.axes) < nd + 1:
            raise self._refusal(
                node, "it does not read along the axis of the units before it"
            )
        before, axis, behind = (
            value.axes[: -nd - 1],
            value.axes[-nd - 1],
            value.axes[len(value.axes) - nd :],
        )
        lowest = min((part.stride for part in axis), default=0)
        size = math.prod(part.size or 0 for part in axis)
        coarse = tuple(part._replace(stride=part.stride // max(lowest, 1)) for part in axis)
        apart = not any(part.stride for each in before for part in each)
        fits = (
            channels in (None, size)
            and size * lowest == value.width
            and list(coarse) == _ordered(coarse, size)
        )
        if not (lowest and apart and fits):
            raise self._refusal(
                node, "it does not read along the axis of the units before it"
            )
        self.widths.append((value.segment, size))
        free = tuple(tuple(part._replace(stride=0) for part in each) for each in behind)
        return value._replace(width=size, axes=(*before, coarse, *free))

    def _norm(self, node: fx.Node, module: nn.Module, value: _Value) -> _Value:
        """Keep the units, but begin a new segment, whose signs and scales act on the norm's own
        weights.
        """
        self.chain = False
        if value.segment is None:
            self._own(node, module, weight=(None,), bias=(None,))
            return value
        labelled = True
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            k = len(module.normalized_shape)
            units = [
                i - len(value.axes)
                for i, axis in enumerate(value.axes)
                if any(part.stride for part in axis)
            ]
            labelled = units == [-k]
            allowed = len(units) == 1 and value.holds(units[0]) and units[0] <= -k
            plain = labelled and all(part.size is not None for part in value.axes[-k])
            if (
                plain
                and math.prod(part.size or 0 for part in value.axes[-k])
                != module.normalized_shape[0]
            ):
                allowed = False
        elif isinstance(module, nn.GroupNorm):
            allowed = (
                value.whole
                and len(value.axes) > 1
                and module.num_groups in (1, module.num_channels)
            )
            if allowed:
                value = self._by_channel(
                    node, value, len(value.axes) - 2, module.num_channels
                )
        else:
            allowed = not module.track_running_stats
            if allowed:
                value = self._by_channel(node, value, int(type(module).__name__[-2]), None)
        if not allowed:
            raise self._refusal(
                node, "it treats units differently, or keeps statistics of them"
            )
        self._read(value)
        assert value.segment is not None
        written = self._segment(self.label_of[value.segment])
        self.pinned.add(value.segment)
        if getattr(module, "weight", None) is None or not labelled:
            self.pinned.add(written)
        marks = (written if labelled else None,)
        self._own(node, module, weight=marks, bias=marks)
        return value._replace(segment=written, factor=1.0, raw=True)

    def _function(self, value: _Value, activation: Activation | None) -> _Value | None:
        """Apply an elementwise function; a number before a sine is its frequency."""
        if activation is None:
            return None
        family, _, parameter = activation.name.partition(":")
        if family == "sin" and value.factor != 1:
            activation = Activation(f"sin:{float(parameter or 1) * value.factor}")
        elif value.factor != 1:
            self.chain = False
        if self.layers and self.layers[-1].activation.name == "identity":
            self.layers[-1] = self.layers[-1]._replace(activation=activation)
        else:
            self.chain = False
        self._record(value, activation.name)
        return value._replace(factor=1.0, raw=False)

    def _pool(self, node: fx.Node, value: _Value, name: str, sizes: Any) -> _Value | None:
        found = re.fullmatch(r"(adaptive_?)?(avg|max)_?pool([123])d", name.lower())
        if not found:
            return None
        nd = int(found[3])
        value = self._local(node, value, nd, "max_pool" if found[2] == "max" else "")
        if not found[1] or value.segment is None:
            return value
        sizes = sizes if isinstance(sizes, tuple | list) else [sizes] * nd
        positions = tuple(
            (_Part(size if isinstance(size, int) else None),) for size in sizes
        )
        return value._replace(axes=(*value.axes[:-nd], *positions))

    def _local(self, node: fx.Node, value: _Value, nd: int, function: str) -> _Value:
        """Compute something of the last ``nd`` axes of each channel: an average, or a largest
        value.
        """
        self.chain = False
        value = self._by_channel(node, value, nd)
        if function:
            self._record(value, function)
        else:
            self._read(value)
        axes = (
            (*value.axes[: len(value.axes) - nd], *(_POSITIONS,) * nd) if value.axes else ()
        )
        return value._replace(axes=axes, factor=1.0, raw=False)

    def _over_space(self, node: fx.Node, value: _Value, function: str) -> _Value | None:
        """Compute something of all axes behind the channels."""
        if value.segment is None:
            return None
        return (
            self._local(node, value, len(value.axes) - 2, function) if value.whole else None
        )

    def _reduce(
        self, node: fx.Node, value: _Value, dims: Any, keepdim: bool, largest: bool
    ) -> _Value | None:
        """Average, sum or take the largest over axes other than the units'."""
        self.chain = False
        if value.segment is None:
            return None
        numbers = [dims] if isinstance(dims, int) else list(dims or [])
        if not numbers or not isinstance(keepdim, bool):
            return None
        taken = set()
        for number in numbers:
            axis = value.axis(number)
            if axis is None and (value.whole or number >= 0):
                return None
            taken.add(len(value.axes) + (number if axis is None else axis))
        axes = [axis for number, axis in enumerate(value.axes) if number in taken]
        if (value.whole and 0 in taken) or any(
            part.stride for axis in axes for part in axis
        ):
            raise self._refusal(node, "it reduces over units or over rows of data")
        self._record(value, "max_pool") if largest else self._read(value)
        left = [() if number in taken else axis for number, axis in enumerate(value.axes)]
        kept = (
            left
            if keepdim
            else [axis for number, axis in enumerate(left) if number not in taken]
        )
        return value._replace(axes=tuple(kept), factor=1.0, raw=False)

    # ---------------------------------------- other shapes

    def _flatten(self, node: fx.Node, value: _Value, start: Any, end: Any) -> _Value | None:
        """Join axes; channels become blocks of consecutive entries."""
        self.chain &= not self.layers and (start, end) == (1, -1)
        if start == 0:
            raise self._refusal(node, "the rows must stay apart")
        if value.segment is None:
            return _Value()
        # what reads it finds out whether there are more axes
        if not value.whole and (start, end) == (1, -1):
            return value._replace(axes=((), _joined(value.axes)), whole=True)
        first, last = value.axis(start), value.axis(end)
        if (
            first is None
            or last is None
            or last < first
            or (value.whole and -first == len(value.axes))
        ):
            return None
        after = value.axes[last + 1 :] if last < -1 else ()
        joined = _joined(value.axes[len(value.axes) + first : len(value.axes) + last + 1])
        return value._replace(axes=(*value.axes[:first], joined, *after))

    def _unflatten(self, value: _Value, dim: Any, *sizes: Any) -> _Value | None:
        """Cut an axis."""
        self.chain = False
        axis = value.axis(dim)
        if (
            value.segment is None
            or axis is None
            or (value.whole and -axis == len(value.axes))
        ):
            # Of a tensor (n, ..., units), as a layer leaves it, axis 1 is the last one if there are
            # but two.
            axis = (
                -1 if value.segment is not None and not value.whole and dim == 1 else None
            )
        if axis is None:
            return None
        cut = _cut(value.axes[axis], _sizes(sizes))
        if cut is None:
            return None
        whole = value.whole or dim == 1
        before = ((),) if whole and not value.whole else value.axes[:axis]
        after = value.axes[axis + 1 :] if axis < -1 else ()
        return value._replace(axes=(*before, *cut, *after), whole=whole)

    def _view(self, value: _Value, *sizes: Any) -> _Value | None:
        """Give all axes but the rows another shape."""
        rows, *rest = _sizes(sizes) or (None,)
        rows = self._resolve(rows)
        if rows not in (_Shape.ROWS, -1) or (rows == -1 and -1 in rest):
            return None
        rest = [self._resolve(size) for size in rest]
        self.chain &= not self.layers and len(rest) == 1
        if value.segment is None:
            return _Value()
        parts = _joined(value.axes[1:] if value.whole else value.axes)
        if len(rest) == 1:  # what reads it finds out whether it fits
            return value._replace(axes=((), parts), whole=True)
        cut = _cut(parts, rest) if value.whole or -1 not in rest else None
        return None if cut is None else value._replace(axes=((), *cut), whole=True)

    def _permute(self, value: _Value, *dims: Any) -> _Value | None:
        """Bring the axes into another order, rows first."""
        self.chain = False
        order = [value.axis(dim) for dim in _sizes(dims) or ()]
        if None in order or sorted(map(int, order)) != [*range(-len(value.axes), 0)]:  # type: ignore[arg-type]
            return None
        if not value.whole or order[0] != -len(value.axes):
            return None
        return value._replace(
            axes=tuple(value.axes[axis] for axis in order if axis is not None)
        )

    def _transpose(self, value: _Value, first: Any, second: Any) -> _Value | None:
        """Exchange two axes."""
        self.chain = False
        a, b = value.axis(first), value.axis(second)
        rows = -len(value.axes) if value.whole else 0
        if a is None or b is None or rows in (a, b):
            return None
        axes = list(value.axes)
        axes[a], axes[b] = axes[b], axes[a]
        return value._replace(axes=tuple(axes))

    def _squeeze(self, value: _Value, dim: Any = None) -> _Value | None:
        """Drop an axis of size 1; a single unit has no others to change places with."""
        self.chain = False
        axis = value.axis(dim)
        if axis is None or any(part.size != 1 for part in value.axes[axis]):
            return None
        if any(part.stride for part in value.axes[axis]):
            self._fix(value)
            return _Value()
        if value.whole and -axis == len(value.axes):
            return None
        after = value.axes[axis + 1 :] if axis < -1 else ()
        return value._replace(axes=(*value.axes[:axis], *after))

    def _unsqueeze(self, value: _Value, dim: Any) -> _Value | None:
        """Insert an axis of size 1 behind the rows."""
        self.chain = False
        if value.segment is None or not isinstance(dim, int):
            return None
        number = dim + len(value.axes) + 1 if dim < 0 else dim
        if not 0 < number <= len(value.axes) or (dim >= 0 and not value.whole):
            return None
        return value._replace(axes=(*value.axes[:number], (), *value.axes[number:]))

    def _getitem(self, value: _Value, index: Any) -> _Value | None:
        """Take some positions of axes without units."""
        self.chain = False
        index = index if isinstance(index, tuple) else (index,)
        if (
            value.segment is None
            or not value.whole
            or any(not isinstance(i, int | slice | type(...)) for i in index)
        ):
            return None
        named = [each for each in index if each is not ...]
        if len(named) < len(index) - 1 or len(named) > len(value.axes):
            return None
        at = index.index(...) if ... in index else len(index)
        every = [slice(None)] * (len(value.axes) - len(named))
        axes = []
        for number, (axis, each) in enumerate(
            zip(value.axes, [*named[:at], *every, *named[at:]], strict=True)
        ):
            if each == slice(None):
                axes.append(axis)
            elif number == 0 or any(part.stride for part in axis):
                return None
            elif isinstance(each, slice):
                axes.append(_POSITIONS)
        return value._replace(axes=tuple(axes))

    # ---------------------------------------- arithmetic

    def _add(self, node: fx.Node, first: Any, second: Any) -> _Value | None:
        """Make the units of two tensors one; those of a sum with inputs are no units any more."""
        self.chain = False
        if not isinstance(first, _Value) or not isinstance(second, _Value):
            return None
        if first.segment is None and second.segment is None:
            return None
        self._read(first)
        self._read(second)
        if first.segment is None or second.segment is None:
            units = second if first.segment is None else first
            self._fix(units)
            return units._replace(factor=1.0, raw=False)
        first, second = self._nested(first, second), self._nested(second, first)
        common = -min(len(first.axes), len(second.axes))
        alike = [
            [_numbering(axis) for axis in value.axes[common:]] for value in (first, second)
        ]
        more = [axis for value in (first, second) for axis in value.axes[:common]]
        if (
            first.width != second.width
            or alike[0] != alike[1]
            or any(part.stride for axis in more for part in axis)
        ):
            raise self._refusal(
                node, "its two sides have units of different number or place"
            )
        self.segments.unite(first.segment, second.segment)
        self.labels.unite(self.label_of[first.segment], self.label_of[second.segment])
        same = first.whole and second.whole and not more
        axes = tuple(
            own if own == other else _positions_open(own)
            for own, other in zip(first.axes[common:], second.axes[common:], strict=True)
        )
        return first._replace(axes=axes, whole=same, factor=1.0, raw=False)

    def _nested(self, value: _Value, other: _Value) -> _Value:
        """Return a value of single entries in blocks of units, if the other side of a sum has so
        many fewer units.
        """
        if value.width <= other.width or value.width % other.width or not value.axes:
            return value
        entries = [part.size for part in value.axes[-1]]
        if not value.holds(-1) or None in entries:
            return value
        length = math.prod(size for size in entries if size is not None)
        if value.segment is not None:
            self.widths.append((value.segment, other.width))
        blocks = (_Part(other.width, 1), _Part(length // other.width))
        return value._replace(width=other.width, axes=(*value.axes[:-1], blocks))

    def _multiply(self, name: str, first: Any, second: Any = -1.0) -> _Value | None:
        """Multiply or divide by a number."""
        if not isinstance(first, _Value) and "div" not in name:
            first, second = second, first
        if (
            not isinstance(first, _Value)
            or not isinstance(second, int | float)
            or not second
        ):
            return None
        return first._replace(
            factor=first.factor / second if "div" in name else first.factor * second
        )

    # ---------------------------------------- book-keeping

    def _segment(self, label: int | None = None) -> int:
        """Return a new segment, of new units unless their label is given."""
        self.label_of.append(self.labels.new() if label is None else label)
        return self.segments.new()

    def _label(self, segment: int) -> int:
        return self.labels.find(self.label_of[segment])

    def _own(
        self, node: fx.Node, module: nn.Module, **marks: tuple[int | None, ...]
    ) -> None:
        """Note which units the axes of a module's parameters belong to.

        Later axes belong to none.
        """
        for key, parameter in module.named_parameters(recurse=False):
            name = self.names[id(parameter)]
            if name in self.used:
                raise self._refusal(node, "its parameters are used twice")
            self.used.add(name)
            self.marks[name][: len(marks[key])] = marks[key]

    def _record(self, value: _Value, function: str) -> None:
        if value.segment is not None:
            self.functions.append((value.segment, function))

    def _read(self, value: _Value) -> None:
        """Note that units are read, as they were written if nothing has been applied to them."""
        if value.raw:
            self._record(value, "identity")

    def _fix(self, value: _Value) -> None:
        """Take the label from units that cannot move, since inputs or outputs cannot."""
        if value.segment is not None:
            self.fixed.add(self.label_of[value.segment])

    def _refusal(self, node: fx.Node, reason: str) -> ValueError:
        what = f"operation {getattr(node.target, '__name__', node.target)!r}"
        if node.op == "call_module":
            what = f"module {str(node.target)!r} ({type(self.modules[str(node.target)]).__name__})"
        return ValueError(f"cannot label {what}: {reason}")


_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Modules that pad every channel alike: how many axes, and what they compute beside weighted sums.
_LOCAL: dict[type[nn.Module], tuple[int, str]] = {
    getattr(nn, f"{kind}Pad{nd}d"): (nd, "")
    for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
    for nd in (1, 2, 3)
}
_RESHAPING = {  # functions and methods of tensors, and what they do
    "unflatten": "unflatten",
    "view": "view",
    "reshape": "view",
    "permute": "permute",
    "transpose": "transpose",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "squeeze": "squeeze",
    "unsqueeze": "unsqueeze",
    "getitem": "getitem",
}


def _joined(axes: Sequence[_Axis]) -> _Axis:
    return tuple(part for axis in axes for part in axis)


def _sizes(sizes: tuple[Any, ...]) -> list[Any]:
    """Return sizes that were given one by one or as one sequence."""
    return (
        list(sizes[0])
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list)
        else list(sizes)
    )


def _cut(parts: _Axis, sizes: Sequence[Any]) -> list[_Axis] | None:
    """Cut an axis to axes of these sizes, one of which may be -1.

    None where they do not say where.
    """
    if any(not isinstance(size, int) for size in sizes) or list(sizes).count(-1) > 1:
        return None
    if all(part.size is not None for part in parts):
        total, known = (
            math.prod(part.size or 0 for part in parts),
            math.prod(s for s in sizes if s != -1),
        )
        sizes = [total // known if size == -1 else size for size in sizes]
        if math.prod(sizes) != total:
            return None
    elif -1 in sizes[:-1]:
        return None
    rest, axes = list(parts), []
    for size in sizes:
        axis: list[_Part] = []
        while size != 1 and size != -1:
            part = rest.pop(0) if rest else _Part(1, 1)
            # nothing but positions is left
            if part.size is None and not any(each.stride for each in rest):
                rest[:0] = [part]
                part = _Part(size)
            if part.size in (None, 1):
                return None
            taken = math.gcd(part.size, size)
            if taken not in (part.size, size):
                return None
            left = part.size // taken
            axis.append(_Part(taken, part.stride * left))
            rest[:0] = [_Part(left, part.stride)] if left > 1 else []
            size //= taken
        axes.append(tuple(axis) if size == 1 else tuple(rest))
    return axes


def _numbering(axis: _Axis) -> tuple[_Part | None, ...]:
    """Return which units an axis holds, and where there are positions between them, however
    many.
    """
    found = [part if part.stride else None for part in axis]
    return tuple(
        each
        for number, each in enumerate(found)
        if each or number == 0 or found[number - 1]
    )


def _positions_open(axis: _Axis) -> _Axis:
    """Forget the sizes of positions."""
    return tuple(each or _Part(None) for each in _numbering(axis))


class _Shape(Enum):
    """What a question about a tensor's shape returns."""

    WHOLE = "all sizes"
    ROWS = "the number of rows"
    OTHER = "another size"


def _asks_shape(node: fx.Node) -> bool:
    """Say whether a node reads sizes, not entries."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _asks_shape(node.args[0])
    return (node.op, node.target) == ("call_method", "size") or (
        node.target is getattr and node.args[1] == "shape"
    )


def _shape(node: fx.Node) -> _Shape:
    """Return which sizes `x.shape`, `x.shape[0]`, `x.size()` or `x.size(0)` is."""
    if node.target is getattr or len(node.args) == 1:
        return _Shape.WHOLE
    return _Shape.ROWS if node.args[1] == 0 else _Shape.OTHER


def _bound(args: list[Any], options: dict[str, Any], **defaults: Any) -> list[Any]:
    """Return the values of named parameters, given by position, by name or not at all."""
    return [
        *args,
        *(
            options.get(key, default)
            for key, default in list(defaults.items())[len(args) :]
        ),
    ]
