"""Follow the units of a network's hidden layers through its graph, and label the weights that write and read them.

Every convolution and linear layer writes new units. Whatever keeps them apart (elementwise functions, pooling,
flattening, normalisation) hands them on, and an addition makes the units of both sides one. Inputs and outputs
have no units. Permutations act on all tensors that touch a unit. Signs and scales stop at a normalisation, whose
result does not scale with its input: they begin again with the weights that it applies.
"""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx, nn

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
    neutral: frozenset[tuple[str, int]]


def trace(net: nn.Module) -> Labels:
    """Label the axes of every parameter of ``net``; see `bnnflow.weights.WeightSpec.of`.

    Raises:
        ValueError: naming the first module, operation or parameter that cannot be labelled.
    """
    for name, module in net.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"cannot label module {name!r} ({type(module).__name__}): it has hooks")
    if type(net) is nn.Linear:
        axes: dict[str, tuple[str | None, ...]] = {name: (None,) * p.dim() for name, p in net.named_parameters()}
        layer = Layer("weight", None if net.bias is None else "bias", Activation("identity"))
        return Labels(axes, {}, (layer,), frozenset())
    try:
        return _Walk(net).follow(_Tracer(whole=False).graph_of(net))
    except ValueError:
        if not any(_constant(module) for module in net.modules()):
            raise
        return _Walk(net).follow(_Tracer(whole=True).graph_of(net))


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

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        mine = threading.get_ident() == self._thread
        return super().call_module(m, forward, args, kwargs) if mine else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        mine = threading.get_ident() == self._thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if mine else attr_val

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = activation_of(m) is not None or (self._whole and _constant(m))
        return whole or super().is_leaf_module(m, module_qualified_name)


class _Value(NamedTuple):
    """A tensor on its way through the network."""

    segment: int | None = None  # whose units it holds; None for what comes from the inputs alone
    width: int = 1  # number of units
    axis: int = -1  # where they are, counted from the end
    rank: int | None = None  # number of axes, where it is known
    flat: bool = False  # every unit owns a block of consecutive entries of its axis
    factor: float = 1.0  # the number that has multiplied it since it was written
    raw: bool = False  # no function has been applied to it since it was written


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

    A label is a set of units that are permuted together; a segment the part of their way between two normalisations,
    along which signs and scales are the same.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.modules = dict(net.named_modules())
        self.names = {id(parameter): name for name, parameter in net.named_parameters()}
        self.marks: dict[str, list[int | None]] = {n: [None] * p.dim() for n, p in net.named_parameters()}  # segments
        self.values: dict[fx.Node, _Value | _Shape] = {}
        self.labels, self.segments = _Classes(), _Classes()
        self.label_of: list[int] = []  # by segment
        self.fixed: set[int] = set()  # labels of units that inputs or outputs share
        self.pinned: set[int] = set()  # segments without signs and scales
        self.functions: list[tuple[int, str]] = []  # what is applied to which segment
        self.neutral: set[tuple[str, int]] = set()
        self.used: set[str] = set()
        self.layers: list[Layer] = []
        self.chain = True  # so far, nothing but Linear layers, each with at most one activation

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
                    raise ValueError(f"cannot label {type(self.net).__name__}: it must take one tensor")
                value = _Value()
            else:
                self.chain &= [n for n in node.all_input_nodes if isinstance(self.values[n], _Value)] == [previous]
                value = self._apply(node)
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
            raise ValueError(f"cannot label {type(self.net).__name__}: it must return one tensor")
        self.chain &= output is previous and value.factor == 1
        self._fix(value)
        if not self.used:
            raise ValueError(f"cannot label {type(self.net).__name__}: it has no Linear layer and no convolution")
        free = {name for name, parameter in self.net.named_parameters() if parameter.requires_grad}
        if left_over := free - self.used:
            raise ValueError(f"cannot label parameter {min(left_over)!r}: it belongs to no layer that the data visit")

        fixed = {self.labels.find(label) for label in self.fixed}
        pinned = {self.segments.find(segment) for segment in self.pinned}
        names: dict[int, str] = {}
        for label in map(self.labels.find, self.label_of):  # in the order of depth
            if label not in fixed:
                names.setdefault(label, f"h{len(names) + 1}")
        functions: dict[str, list[str]] = {name: [] for name in names.values()}
        for segment, function in self.functions:
            name = names.get(self._label(segment))
            if name and self.segments.find(segment) not in pinned and function not in functions[name]:
                functions[name].append(function)
        axes: dict[str, tuple[str | None, ...]] = {}
        neutral = set()
        for tensor, marks in self.marks.items():
            axes[tensor] = tuple(None if mark is None else names.get(self._label(mark)) for mark in marks)
            for axis, mark in enumerate(marks):
                still = mark is not None and self.segments.find(mark) in pinned
                if axes[tensor][axis] and (still or (tensor, axis) in self.neutral):
                    neutral.add((tensor, axis))
        activations = {name: Activation(" + ".join(found or ["norm"])) for name, found in functions.items()}
        return Labels(axes, activations, tuple(self.layers) if self.chain else (), frozenset(neutral))

    # ---------------------------------------------------------------- modules and operations

    def _apply(self, node: fx.Node) -> _Value:
        """Return what a module or an operation makes of its inputs."""
        if node.op == "get_attr":
            raise ValueError(f"cannot label {node.target!r}: a tensor that belongs to no layer")
        args = [self._resolve(arg) for arg in node.args]
        options = {key: self._resolve(arg) for key, arg in node.kwargs.items()}
        value = args.pop(0) if args else options.pop("input", None)
        if node.op == "call_module":
            result = self._module(node, self.modules[str(node.target)], value)
        else:
            result = self._operation(node, value, args, options)
        if result is None:
            raise self._refusal(node, "it is none of the layers and operations whose units can be followed")
        return result

    def _resolve(self, arg: Any) -> Any:
        return self.values[arg] if isinstance(arg, fx.Node) else arg

    def _module(self, node: fx.Node, module: nn.Module, value: _Value) -> _Value | None:
        if value.segment is None and _constant(module):
            self.chain = False
            return _Value()  # constant features of the inputs
        if type(module) is nn.Linear:
            return self._linear(node, module, value)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.__module__ == "torch.nn.modules.conv":
            return self._convolution(node, module, value)
        if type(module) in _NORMS:
            return self._norm(node, module, value)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise self._refusal(node, "its running statistics belong to units, but are no weights")
        if type(module) is nn.Identity or (type(module) in _DROPOUTS and not (module.training and module.p)):
            return value
        if type(module) is nn.Flatten:
            return self._flatten(node, value, module.start_dim, module.end_dim)
        if type(module) is nn.Unflatten and value.segment is None and module.dim != 0:
            self.chain = False
            return _Value()
        if module.__module__ == "torch.nn.modules.pooling":
            return self._pool(node, value, type(module).__name__)
        return self._function(value, activation_of(module))

    def _operation(self, node: fx.Node, value: Any, args: list[Any], options: dict[str, Any]) -> _Value | None:
        """Understand a function or a tensor method by its name."""
        name = getattr(node.target, "__name__", str(node.target))
        if name in ("add", "iadd", "sub", "isub") and not options and len(args) == 1:
            return self._add(node, value, args[0])
        if name in ("mul", "imul", "truediv", "itruediv", "neg") and not options:
            return self._multiply(name, value, *args)
        if not isinstance(value, _Value):
            return None
        if name == "flatten":
            return self._flatten(node, value, *_bound(args, options, start_dim=0, end_dim=-1))
        if name in ("view", "reshape") and not options:
            rows, *rest = args[0] if isinstance(args[0], tuple | list) else args
            kept = self._resolve(rows) in (_Shape.ROWS, -1) and len(rest) == 1 and isinstance(rest[0], int)
            return self._flatten(node, value, 1, -1) if kept else None
        if name in ("mean", "sum", "amax"):
            dims, keepdim = _bound(args, options, dim=None, keepdim=False)
            return self._reduce(node, value, dims, keepdim, name == "amax")
        if name == "squeeze" and args == [-1] and (value.width, value.axis, value.flat) == (1, -1, False):
            self.chain = False
            self._fix(value)
            return _Value()
        if node.target is F.dropout:
            rate, training, _ = _bound(args, options, p=0.5, training=True, inplace=False)
            return None if rate and training else value
        if "pool" in name:
            return self._pool(node, value, name)
        return self._function(value, activation_of(node.target, *args, **options))  # type: ignore[arg-type]

    def _linear(self, node: fx.Node, module: nn.Linear, value: _Value) -> _Value:
        """Write new units, and read those along the last axis."""
        if value.segment is not None:
            fits = module.in_features % value.width == 0 if value.flat else module.in_features == value.width
            if value.axis != -1 or not fits:
                raise self._refusal(node, "it does not read along the axis of the units before it")
        self._read(value)
        self.chain &= value.factor == 1
        written = self._segment()
        self._own(node, module, weight=(written, value.segment), bias=(written,))
        prefix = str(node.target)
        bias = None if module.bias is None else f"{prefix}.bias"
        self.layers.append(Layer(f"{prefix}.weight", bias, Activation("identity")))
        return _Value(written, module.out_features, -1, value.rank, raw=True)

    def _convolution(self, node: fx.Node, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, value: _Value) -> _Value:
        """Write new channels, or with a kernel for each channel keep them."""
        self.chain = False
        axis = -1 - len(module.kernel_size)
        if value.segment is not None and (value.axis, value.flat) != (axis, False):
            raise self._refusal(node, "it does not read along the axis of the units before it")
        self._read(value)
        if module.groups == 1:
            written = self._segment()
            self._own(node, module, weight=(written, value.segment), bias=(written,))
        elif module.groups == module.in_channels == module.out_channels:
            written = value.segment
            self._own(node, module, weight=(written,), bias=(written,))
            self.neutral.add((f"{node.target}.weight", 0))  # reads the units that it writes
        else:
            raise self._refusal(node, "its groups tie channels; one group, or one for each channel, can be labelled")
        return _Value(written, module.out_channels, axis, 1 - axis, raw=written is not None)

    def _norm(self, node: fx.Node, module: nn.Module, value: _Value) -> _Value:
        """Keep the units, but begin a new segment, whose signs and scales act on the norm's own weights."""
        self.chain = False
        if value.segment is None:
            self._own(node, module, weight=(None,), bias=(None,))
            return value
        labelled = True
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            shape = module.normalized_shape
            labelled = -value.axis == len(shape)
            fits = shape[0] == value.width or value.flat or not labelled
            allowed = len(shape) <= -value.axis and fits
        elif isinstance(module, nn.GroupNorm):
            allowed = value.rank == 1 - value.axis and module.num_groups in (1, module.num_channels)
        else:
            nd = int(type(module).__name__[-2])
            allowed = not module.track_running_stats and (value.axis, value.flat) == (-1 - nd, False)
        if not allowed:
            raise self._refusal(node, "it treats units differently, or keeps statistics of them")
        self._read(value)
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

    def _pool(self, node: fx.Node, value: _Value, name: str) -> _Value | None:
        found = re.fullmatch(r"(adaptive_?)?(avg|max)_?pool([123])d", name.lower())
        if not found or (value.segment is not None and (value.axis, value.flat) != (-1 - int(found[3]), False)):
            return None
        self.chain = False
        self._record(value, "max_pool") if found[2] == "max" else self._read(value)
        return value._replace(factor=1.0, raw=False)

    def _reduce(self, node: fx.Node, value: _Value, dims: Any, keepdim: bool, largest: bool) -> _Value | None:
        """Average, sum or take the largest over axes other than the units'."""
        self.chain = False
        if value.segment is None:
            return _Value()
        dims = [dims] if isinstance(dims, int) else list(dims or [])
        if not dims or not isinstance(keepdim, bool) or (value.rank is None and max(dims) >= 0):
            return None
        dims = [dim - (value.rank or 0) if dim >= 0 else dim for dim in dims]
        if value.axis in dims or -(value.rank or 0) in dims:
            raise self._refusal(node, "it reduces over units or over rows of data")
        self._record(value, "max_pool") if largest else self._read(value)
        value = value._replace(factor=1.0, raw=False)
        if keepdim:
            return value
        behind = sum(dim > value.axis for dim in dims)
        return value._replace(axis=value.axis + behind, rank=value.rank and value.rank - len(dims))

    def _flatten(self, node: fx.Node, value: _Value, start: Any, end: Any) -> _Value:
        """Join all axes but the rows; channels become blocks of consecutive entries."""
        if start != 1 or end not in (-1, (value.rank or 0) - 1):
            raise self._refusal(node, "all axes but the first must be joined")
        self.chain &= not self.layers
        self._read(value)
        blocks = value.segment is not None and (value.flat or value.axis < -1)
        return value._replace(axis=-1, rank=2, flat=blocks, raw=False)

    def _add(self, node: fx.Node, first: Any, second: Any) -> _Value | None:
        """Make the units of two tensors one; those of a sum with inputs are no units any more."""
        self.chain = False
        if not isinstance(first, _Value) or not isinstance(second, _Value):
            return None
        self._read(first)
        self._read(second)
        if first.segment is None or second.segment is None:
            units = second if first.segment is None else first
            self._fix(units)
            return units._replace(factor=1.0, raw=False)
        if (first.width, first.axis, first.flat) != (second.width, second.axis, second.flat):
            raise self._refusal(node, "its two sides have units of different number or place")
        self.segments.unite(first.segment, second.segment)
        self.labels.unite(self.label_of[first.segment], self.label_of[second.segment])
        return first._replace(rank=first.rank if first.rank == second.rank else None, factor=1.0, raw=False)

    def _multiply(self, name: str, first: Any, second: Any = -1.0) -> _Value | None:
        """Multiply or divide by a number."""
        if not isinstance(first, _Value) and "div" not in name:
            first, second = second, first
        if not isinstance(first, _Value) or not isinstance(second, int | float) or not second:
            return None
        return first._replace(factor=first.factor / second if "div" in name else first.factor * second)

    # ---------------------------------------------------------------- book-keeping

    def _segment(self, label: int | None = None) -> int:
        """Return a new segment, of new units unless their label is given."""
        self.label_of.append(self.labels.new() if label is None else label)
        return self.segments.new()

    def _label(self, segment: int) -> int:
        return self.labels.find(self.label_of[segment])

    def _own(self, node: fx.Node, module: nn.Module, **marks: tuple[int | None, ...]) -> None:
        """Note which units the axes of a module's parameters belong to; later axes belong to none."""
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


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class _Shape(Enum):
    """What a question about a tensor's shape returns."""

    WHOLE = "all sizes"
    ROWS = "the number of rows"
    OTHER = "another size"


def _asks_shape(node: fx.Node) -> bool:
    """Say whether a node reads sizes, not entries."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _asks_shape(node.args[0])
    return (node.op, node.target) == ("call_method", "size") or (node.target is getattr and node.args[1] == "shape")


def _shape(node: fx.Node) -> _Shape:
    """Return which sizes `x.shape`, `x.shape[0]`, `x.size()` or `x.size(0)` is."""
    if node.target is getattr or len(node.args) == 1:
        return _Shape.WHOLE
    return _Shape.ROWS if node.args[1] == 0 else _Shape.OTHER


def _bound(args: list[Any], options: dict[str, Any], **defaults: Any) -> list[Any]:
    """Return the values of named parameters, given by position, by name or not at all."""
    return [*args, *(options.get(key, default) for key, default in list(defaults.items())[len(args) :])]
