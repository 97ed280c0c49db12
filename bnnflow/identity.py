"""What a value is made of, as a hash: the same in every process, another for every difference that
could matter.

Numbers, texts, containers, arrays and tensors count by value; functions by their compiled code,
defaults, and what they close over or look up; objects by their class and attributes; classes and
functions of installed libraries by name, others by their code. Addresses, the order of sets, line
numbers, comments and docstrings do not count.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import os
import re
import sys
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.utils import lazy_property

from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = ["Identity", "digest", "seed_identity", "without_addresses"]

_PROCESS = os.urandom(8)
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(Ellipsis),
    type(NotImplemented),
)
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, np.dtype)
# whether two are one object says nothing
_BY_VALUE = (Tensor, np.ndarray, np.generic, tuple, frozenset)
_BUILTIN = (
    types.BuiltinFunctionType,
    np.ufunc,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)
# Of a module: what is written apart, or does not change what it computes.
_OF_MODULES = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_TRANSFORMS = {"_cached_x_y", "_inv"}
# a flag of classes; those that ``exec`` makes say that they belong to builtins
_HEAP_TYPE = 1 << 9
_ELEMENTS = 2**20  # of a tensor that are converted at once


def digest(value: Any) -> str:
    """Return the hash of one value, sixteen hexadecimal digits."""
    return Identity().add(value, "value").digest


def seed_identity(seed: Seed) -> int | str:
    """Return what tells seeds apart: the number, or a hash of a generator's state before it is
    used.

    Raises:
        TypeError: if ``seed`` is neither.
    """
    if isinstance(seed, torch.Generator):
        return f"generator {digest(seed.get_state())}"
    return as_generator(seed).initial_seed()


def without_addresses(text: str) -> str:
    """Return a representation without the addresses of objects, which differ from process to
    process.
    """
    return re.sub(r" at 0x[0-9a-f]+", "", text)


class Identity:
    """A hash that values are added to.

    Args:
        variables: tensors whose values do not count, with the names that stand for them.
        skipped: paths of attributes that do not count.

    Attributes:
        unknown: where what cannot be identified was found, ``"net.lock (lock)"``. The hash then is
            that of no other process, since whether two such values are the same cannot be told.
    """

    def __init__(
        self, variables: Mapping[str, Tensor] | None = None, skipped: Collection[str] = ()
    ) -> None:
        self.unknown: list[str] = []
        self._skipped = skipped
        self._hash = hashlib.sha256()
        self._variables = {id(tensor): name for name, tensor in (variables or {}).items()}
        self._seen: dict[int, int] = {}
        # modules of the caller's, and the names of their members
        self._looked_up: set[tuple[int, str]] = set()
        # what was seen must live on, or its address could be used again
        self._alive: list[Any] = []

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits."""
        return self._hash.hexdigest()[:16]

    def add(self, value: Any, path: str) -> Identity:
        """Add a value; ``path`` says where it was found."""
        if isinstance(value, _PLAIN) and type(value) in _PLAIN:
            self._write(type(value).__name__, repr(value))
        elif isinstance(value, _NAMED):
            self._write("named", str(value))
        elif id(value) in self._variables:
            self._write("variable", self._variables[id(value)])
        elif isinstance(value, _BY_VALUE):
            self._add_new(value, path)
        elif id(value) in self._seen:
            self._write("seen", str(self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)
            self._add_new(value, path)
        return self

    def _write(self, *words: str) -> None:
        for word in words:
            self._hash.update(f"{len(word)}:{word}".encode())

    def _add_all(self, kind: str, values: Iterable[Any], path: str) -> None:
        values = list(values)
        self._write(kind, str(len(values)))
        for value in values:
            self.add(value, path)

    def _add_new(self, value: Any, path: str) -> None:
        for kinds, add in _RULES:
            if isinstance(value, kinds):
                add(self, value, path)
                return self._add_extras(value, path)
        return self._add_object(value, path)

    def _add_extras(self, value: Any, path: str) -> None:
        """Add what a value holds beside what its kind does: attributes of a function, or of a class
        derived from it.
        """
        kept = isinstance(value, _PLAIN_CONTAINERS) and getattr(value, "__dict__", None)
        if kept:
            self._add_mapping(kept, path)

    # ---------------------------------------- data

    def _add_derived(self, value: Any, path: str) -> None:
        """Add a number or a text of a class of its own."""
        base: Any = next(kind for kind in type(value).__mro__ if kind in _PLAIN)
        self.add(type(value), path)
        self._write(base.__name__, base.__repr__(value))

    def _add_tensor(self, value: Tensor, path: str) -> None:
        """Add the values in double precision, so that a model and its conversion to it are the
        same.
        """
        value = value.detach()
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        value = value.to_dense() if value.layout != torch.strided else value
        kind = "float" if value.is_floating_point() else str(value.dtype)
        self._write("tensor", kind, str(tuple(value.shape)))
        for part in value.reshape(-1).split(_ELEMENTS):
            part = part.double() if part.is_floating_point() else part
            self._hash.update(part.cpu().contiguous().numpy().data)

    def _add_array(self, value: np.ndarray | np.generic, path: str) -> None:
        if value.dtype.kind in "biufc":
            self._add_tensor(torch.from_numpy(np.array(value)), path)
        else:
            self._write("array", str(value.dtype), str(value.shape))
            self._add_all("entries", value.tolist() if value.ndim else [value.item()], path)

    def _add_mapping(self, value: Mapping[Any, Any], path: str) -> None:
        self._write(type(value).__qualname__)
        for key, each in value.items():
            at = f"{path}.{key}" if isinstance(key, str) else path
            if at not in self._skipped:
                self.add(key, at)
                self.add(each, at)
        self._write("end")

    def _add_sequence(self, value: Any, path: str) -> None:
        self._add_all(type(value).__qualname__, value, path)

    def _add_set(self, value: Any, path: str) -> None:
        parts = []
        for each in value:
            part = Identity().add(each, path)
            parts.append(part.digest)
            self._mark(part.unknown)
        self._write("set", *sorted(parts))

    # ---------------------------------------- code

    def _add_function(self, value: types.FunctionType, path: str) -> None:
        if _installed(value.__module__) and value.__module__ != "builtins":
            return self._write("function", f"{value.__module__}.{value.__qualname__}")
        self._add_code(value.__code__, value.__doc__, path)
        self.add(value.__defaults__, path)
        self.add(value.__kwdefaults__, path)
        cells = [
            cell.cell_contents if _filled(cell) else None
            for cell in value.__closure__ or ()
        ]
        for name, each in zip(value.__code__.co_freevars, cells, strict=True):
            self.add(each, f"{path}.{name}")
        for name in _globals_of(value.__code__):
            if name in value.__globals__:
                self._add_global(
                    value.__globals__[name], _names_of(value.__code__), f"{path}.{name}"
                )
        return None

    def _add_global(self, value: Any, names: Collection[str], path: str) -> None:
        """Add what a function looks up: of a module that is not installed, those of its members
        that code names.
        """
        self.add(value, path)
        if isinstance(value, types.ModuleType) and not _installed(value.__name__):
            for name in names:
                if name in vars(value) and (id(value), name) not in self._looked_up:
                    self._looked_up.add((id(value), name))
                    self._add_global(vars(value)[name], names, f"{path}.{name}")

    def _add_code(self, code: types.CodeType, doc: str | None, path: str) -> None:
        constants = list(code.co_consts)
        if doc is not None and constants and constants[0] == doc:
            constants[0] = None
        self._write("code", code.co_code.hex())
        self._add_all(
            "names",
            (*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars),
            path,
        )
        self._write("constants", str(len(constants)))
        for constant in constants:
            if isinstance(constant, types.CodeType):
                self._add_code(constant, None, path)
            else:
                self.add(constant, path)

    def _add_method(self, value: types.MethodType, path: str) -> None:
        self._add_all("method", (value.__func__, value.__self__), path)

    def _add_builtin(self, value: Any, path: str) -> None:
        owner = getattr(value, "__self__", None)
        self._write(
            "builtin",
            f"{getattr(value, '__module__', None)}."
            f"{getattr(value, '__qualname__', value.__name__)}",
        )
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.add(owner, path)

    def _add_partial(self, value: functools.partial[Any], path: str) -> None:
        self._add_all("partial", (value.func, value.args, value.keywords), path)

    def _add_descriptor(self, value: Any, path: str) -> None:
        parts = ("fget", "fset", "fdel", "func", "__func__")
        self._add_all(
            type(value).__qualname__, (getattr(value, part, None) for part in parts), path
        )

    def _add_library(self, value: types.ModuleType, path: str) -> None:
        self._write("library", value.__name__)

    def _add_class(self, value: type, path: str) -> None:
        """Add the name, and the code and constants of classes that are not installed."""
        written_in_python = bool(value.__flags__ & _HEAP_TYPE)
        if _installed(value.__module__) and not (
            value.__module__ == "builtins" and written_in_python
        ):
            return self._write("class", f"{value.__module__}.{value.__qualname__}")
        self._write("class", value.__qualname__)
        self._add_all("bases", value.__bases__, path)
        for name, member in vars(value).items():
            written = (
                callable(member) or hasattr(member, "__get__") or not name.startswith("__")
            )
            if (
                written
                and name not in _OF_CLASSES
                and not isinstance(member, types.GetSetDescriptorType)
            ):
                self.add(name, path)
                self.add(member, f"{path}.{name}")
        return None

    # ---------------------------------------- objects

    def _add_module(self, value: nn.Module, path: str) -> None:
        self.add(type(value), path)
        own = {name: each for name, each in vars(value).items() if name not in _OF_MODULES}
        if _asks_training(type(value)):
            own["training"] = value.training
        for held in (value._parameters, value._buffers, value._modules, own):
            self._add_mapping(held, path)
        for hooks in _HOOKS:
            self._add_all(hooks, getattr(value, hooks).values(), path)

    def _add_distribution(self, value: Distribution, path: str) -> None:
        """Add what defines it, not what was computed from that and kept."""
        kind = type(value)
        lazy = {
            name
            for name in dir(kind)
            if isinstance(getattr(kind, name, None), lazy_property)
        }
        self._add_attributes(value, path, lazy | {"_validate_args"})

    def _add_transform(self, value: Transform, path: str) -> None:
        self._add_attributes(value, path, _OF_TRANSFORMS)

    def _add_enum(self, value: enum.Enum, path: str) -> None:
        self._add_all("enum", (type(value).__qualname__, value.name), path)

    def _add_attributes(self, value: Any, path: str, but: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.add(type(value), path)
        but = but | {
            name
            for name in vars(value)
            if isinstance(_of_class(value, name), functools.cached_property)
        }
        self._add_mapping(
            {name: each for name, each in vars(value).items() if name not in but}, path
        )

    def _add_object(self, value: Any, path: str) -> None:
        """Add an object by its attributes, or as it would be pickled."""
        if hasattr(value, "__wrapped__"):
            self.add(value.__wrapped__, path)
            return None
        if (
            type(value).__reduce_ex__ is object.__reduce_ex__
            and type(value).__reduce__ is object.__reduce__
        ):
            slots = [
                name
                for kind in type(value).__mro__
                for name in vars(kind).get("__slots__", ())
            ]
            if hasattr(value, "__dict__") and not slots:
                return self._add_attributes(value, path)
        try:
            reduced = value.__reduce_ex__(4)
        # whatever an object's own code raises: it does not want to be pickled
        except Exception:
            self._mark([f"{path} ({type(value).__name__})"])
            return self._write("unknown", type(value).__qualname__, str(id(value)))
        if isinstance(reduced, str):
            return self._write("global", reduced)
        function, arguments, *state = reduced
        self._add_all(
            "reduced", (function, arguments, *(_listed(part) for part in state)), path
        )
        return None

    def _mark(self, unknown: list[str]) -> None:
        self.unknown += unknown
        if unknown:
            self._hash.update(_PROCESS)


_OF_CLASSES = {
    "__init__",
    "__repr__",
    "__str__",
    "__dict__",
    "__weakref__",
    "__doc__",
    "__module__",
    "_abc_impl",
}
_PLAIN_CONTAINERS = (
    Tensor,
    np.ndarray,
    dict,
    list,
    tuple,
    set,
    frozenset,
    types.FunctionType,
    int,
    float,
    str,
)
_DESCRIPTORS = (property, classmethod, staticmethod, functools.cached_property)
_RULES: tuple[tuple[Any, Any], ...] = (
    (Tensor, Identity._add_tensor),
    (np.ndarray | np.generic, Identity._add_array),
    (enum.Enum, Identity._add_enum),
    (int | float | complex | str | bytes, Identity._add_derived),
    (dict | types.MappingProxyType, Identity._add_mapping),
    (list | tuple, Identity._add_sequence),
    (set | frozenset, Identity._add_set),
    (types.FunctionType, Identity._add_function),
    (types.MethodType, Identity._add_method),
    (_BUILTIN, Identity._add_builtin),
    (functools.partial, Identity._add_partial),
    (_DESCRIPTORS, Identity._add_descriptor),
    (types.ModuleType, Identity._add_library),
    (type, Identity._add_class),
    (nn.Module, Identity._add_module),
    (Distribution, Identity._add_distribution),
    (Transform, Identity._add_transform),
)


def _installed(module: str | None) -> bool:
    """Say whether a module belongs to Python, to this package or to an installed one, and not to
    the caller.
    """
    root = (module or "__main__").partition(".")[0]
    if root == "__main__" or root in sys.stdlib_module_names:
        return root != "__main__"
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root == "bnnflow" or "site-packages" in file or "dist-packages" in file


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _globals_of(code: types.CodeType) -> list[str]:
    """Return the global names that code looks up, its nested functions included, in order."""
    names = [
        each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"
    ]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _globals_of(constant)
    return list(dict.fromkeys(names))


def _names_of(code: types.CodeType) -> list[str]:
    """Return the names that code looks up anywhere, its nested functions included, in order."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_of(constant)
    return list(dict.fromkeys(names))


def _asks_training(kind: type) -> bool:
    """Say whether a caller's own class reads ``self.training``."""
    own = [each for each in kind.__mro__ if not _installed(each.__module__)]
    functions = [
        member
        for each in own
        for member in vars(each).values()
        if isinstance(member, types.FunctionType)
    ]
    return any("training" in function.__code__.co_names for function in functions)


def _of_class(value: Any, name: str) -> Any:
    """Return what an object's class, or one of its bases, holds under a name; None for nothing."""
    return next(
        (vars(kind)[name] for kind in type(value).__mro__ if name in vars(kind)), None
    )


def _listed(part: Any) -> Any:
    """Return the state, or the items that an iterator gives."""
    return list(part) if hasattr(part, "__next__") else part
