"""One gate for arguments: what a caller meant where that is clear, else an error that names the
argument.

Public functions and classes are `checked`: their annotations say what every argument must be, and
hold. `Count`, `Positive` and their like are numbers in a range. What depends on other arguments is
checked by hand, in the same words.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import operator
import os
import pathlib
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Count",
    "Estimate",
    "Fraction",
    "Limit",
    "NonNegative",
    "Positive",
    "Range",
    "Share",
    "Whole",
    "checked",
    "choice",
    "columns_of",
    "finite",
    "flag",
    "integer",
    "number",
    "numbers",
    "positive",
    "settle",
    "shaped",
    "shown",
    "tensor",
    "tracked",
]


class Range(NamedTuple):
    """The bounds of an annotated number: the keywords of `integer` or `number`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None


Count = Annotated[int, Range(least=1)]
Whole = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(above=0, below=1)]
Share = Annotated[float, Range(least=0, most=1)]


def integer(
    name: str, value: Any, *, least: int | None = None, most: int | None = None
) -> int:
    """Return a whole number as an ``int``: Python's, NumPy's, or a tensor of one element.

    Args:
        name: of the argument, for the message.
        value: what was given.
        least: smallest value allowed.
        most: largest value allowed.

    Raises:
        TypeError: unless it is a whole number; a bool is none.
        ValueError: if it is out of range.
    """
    try:
        if (
            isinstance(value, bool | np.bool_)
            or getattr(value, "dtype", None) == torch.bool
        ):
            raise TypeError
        result = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None
    if (least is not None and result < least) or (most is not None and result > most):
        raise ValueError(f"{name} must be {_between(least, most)}, got {result}")
    if abs(result) >= 2**63:
        raise ValueError(f"{name} must be below 2**63")
    return result


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """Return a finite real number as a ``float``: Python's, NumPy's, or a tensor of one element.

    Args:
        name: of the argument, for the message.
        value: what was given.
        above: the value must be larger than this.
        least: smallest value allowed.
        below: the value must be smaller than this.
        most: largest value allowed.

    Raises:
        TypeError: unless it is a real number; a bool is none.
        ValueError: if it is NaN, infinite or out of range.
    """
    try:
        if (
            isinstance(value, bool | str | bytes | bytearray)
            or getattr(value, "dtype", None) in _NOT_REAL
        ):
            raise TypeError
        result = float(value)
    except OverflowError:
        result = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {shown(value)}") from None
    inside = (
        math.isfinite(result)
        and (above is None or result > above)
        and (least is None or result >= least)
        and (below is None or result < below)
        and (most is None or result <= most)
    )
    if not inside:
        raise ValueError(
            f"{name} must be {_within(above, least, below, most)}, got {result!r}"
        )
    return result


def positive(name: str, value: Any) -> float:
    """Return a positive, finite real number as a ``float``.

    Raises:
        TypeError: unless it is a real number.
        ValueError: if it is NaN, infinite, zero or negative.
    """
    return number(name, value, above=0)


def numbers(name: str, value: Any, *, above: float | None = None) -> tuple[float, ...]:
    """Return one number, or several in a sequence, a tensor or an array, as a tuple.

    Raises:
        TypeError: unless they are real numbers.
        ValueError: if there are none, or one is NaN, infinite or not above the bound.
    """
    several = isinstance(value, tuple | list) or len(getattr(value, "shape", ())) == 1
    values = tuple(
        number(name, each, above=above) for each in (value if several else (value,))
    )
    if not values:
        raise ValueError(f"{name} has no number")
    return values


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return ``value`` if it is one of the words allowed.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}"
        )
    return value


def flag(name: str, value: Any) -> bool:
    """Return True or False, Python's or NumPy's.

    Raises:
        TypeError: if it is neither: the truth of a word or a number is nobody's intention.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def settle(settings: Any, check: Callable[..., Any], *names: str, **bounds: Any) -> None:
    """Check fields of a frozen dataclass while it is made, and keep the values that the check
    returns.

    None passes where it is the field's default, as a choice left open.

    Args:
        settings: the dataclass, in its ``__post_init__``.
        check: `integer`, `number`, `choice` or `flag`.
        names: of the fields.
        bounds: what else the check is told, for all of them.

    Raises:
        TypeError: as the check does.
        ValueError: as the check does.
    """
    defaults = {field.name: field.default for field in fields(settings)}
    for name in names:
        value = getattr(settings, name)
        if value is not None or defaults[name] is not None:
            object.__setattr__(settings, name, check(name, value, **bounds))


def tensor(
    name: str,
    value: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return real numbers as a tensor that tracks no derivative.

    Arrays, frames and lists are copied.

    Args:
        name: of the argument, for the message.
        value: a tensor, an array, a pandas or polars frame or series, or lists of numbers.
        dtype: what floating-point values become; integers and bools stay what they are.
        device: where the tensor goes.

    Raises:
        TypeError: if it does not hold real numbers, or has masked or missing entries that no number
            stands for.
    """
    result = tracked(name, value).detach()
    return result.to(device, dtype if result.is_floating_point() else None)


def tracked(name: str, value: Any) -> Tensor:
    """Return real numbers as a dense tensor as `tensor` does, but one that was given as it is, with
    its derivatives.
    """
    result = value if isinstance(value, Tensor) else torch.from_numpy(_array(name, value))
    if (
        result.is_complex()
        or result.layout != torch.strided
        or result.is_meta
        or result.is_quantized
    ):
        raise TypeError(
            f"{name} must be a dense tensor of real numbers, got {result.dtype}, {result.layout}"
        )
    if result is not value and (columns := columns_of(value)):
        setattr(result, _COLUMNS, columns)
    return result


_COLUMNS = "columns"


def columns_of(value: Any) -> tuple[str, ...]:
    """Return the names of the columns of a frame, or of the tensor that `tracked` made of one.

    None if they have none.

    What is computed from such a tensor has none.
    """
    columns = getattr(value, _COLUMNS, None)
    names = () if columns is None or callable(columns) else tuple(columns)
    return names if all(isinstance(name, str) for name in names) else ()


def finite(name: str, values: Tensor) -> Tensor:
    """Return ``values`` if all are finite.

    Raises:
        ValueError: naming the first rows that are not.
    """
    wrong = ~values.isfinite()
    bad = (
        (wrong.flatten(1).any(1) if values.dim() > 1 else wrong.reshape(-1))
        .nonzero()
        .flatten()
    )
    if len(bad):
        if values.dim() == 0:
            raise ValueError(f"{name} must be finite, got {values.item()}")
        rows = ", ".join(str(int(row)) for row in bad[:5]) + (
            ", ..." if len(bad) > 5 else ""
        )
        raise ValueError(
            f"{name} has NaN or infinite values in {len(bad)} of {len(values)} rows: {rows}"
        )
    return values


def shaped(name: str, values: Tensor, *sizes: int | None, lead: bool = False) -> Tensor:
    """Return finite ``values`` of this shape.

    Args:
        name: of the argument, for the message.
        values: what was given.
        sizes: of the axes; None for any size but zero.
        lead: whether other axes may come before these.

    Raises:
        ValueError: for another shape, NaN or infinity.
    """
    own = values.shape[max(values.dim() - len(sizes), 0) :]
    fits = len(own) == len(sizes) and (lead or values.dim() == len(sizes))
    if not fits or any(
        size != (wanted or size or -1) for size, wanted in zip(own, sizes, strict=True)
    ):
        said = ["..."] * lead + [
            "any" if wanted is None else str(wanted) for wanted in sizes
        ]
        raise ValueError(
            f"{name} must be ({', '.join(said)}), got shape {tuple(values.shape)}"
        )
    return finite(name, values)


def estimate(name: str, value: Any) -> float:
    """Return a number that may be infinite, or NaN where it is not known.

    Raises:
        TypeError: unless it is a real number.
    """
    try:
        return number(name, value)
    except ValueError:  # of the right kind
        return math.inf if value > 0 else -math.inf if value < 0 else math.nan


def limit(name: str, value: Any) -> float:
    """Return a positive number; infinity stands for no limit.

    Raises:
        TypeError: unless it is a real number.
        ValueError: unless it is positive.
    """
    result = estimate(name, value)
    if not result > 0:
        raise ValueError(f"{name} must be positive, got {result!r}")
    return result


Estimate = Annotated[float, estimate]
Limit = Annotated[float, limit]
F = TypeVar("F", bound=Callable[..., Any])
Gate = Callable[[str, Any], Any]
"""``(name, value) -> value`` as the function takes it.

A ``TypeError`` or ``ValueError`` names the argument.
"""


def checked(target: F) -> F:
    """Hold the arguments of a function, or of the making of a class, to their annotations.

    Numbers, bools and words become Python's own, arrays, lists and frames become tensors where a
    ``Tensor`` is asked for, and whatever is something else is refused by name before any work
    starts. Tensors keep their derivatives.

    Example:
        >>> @checked
        ... def half(n: Count) -> float:
        ...     return n / 2
        >>> half(np.int64(4))
        2.0
        >>> half(0)
        Traceback (most recent call last):
        ...
        ValueError: n must be at least 1, got 0
    """
    if isinstance(target, type):
        target.__init__ = checked(target.__init__)
        return target  # type: ignore[return-value]
    signature = inspect.signature(target)

    @functools.wraps(target)
    def through_the_gate(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return target(*args, **kwargs)  # Python says best what is missing or too much
        gates = _gates(target)
        _check_order(bound.arguments)
        for name, value in bound.arguments.items():
            if name in gates:
                bound.arguments[name] = gates[name](name, value)
        return target(*bound.args, **bound.kwargs)

    return through_the_gate  # type: ignore[return-value]


def _check_order(given: Mapping[str, Any]) -> None:
    """Refuse an x and a y of pandas whose rows have the same labels, or some of them, in other
    places.
    """
    x, y = (_labels(given.get(name)) for name in ("x", "y"))
    if x is None or y is None or x == y:
        return
    shared = len({*x} & {*y})
    # labels that pandas made up
    numbered = any(labels == list(range(len(labels))) for labels in (x, y))
    if shared and (not numbered or shared == len(x) == len(y)):
        raise ValueError(
            "the rows of x and y have the same labels in another order: bring them into one, as by "
            "y.loc[x.index], or pass y.to_numpy() if their order is right"
        )


def _labels(value: Any) -> list[Any] | None:
    """Return the labels of the rows of a frame or series of pandas; None for anything else."""
    index: Any = getattr(value, "index", None)
    return index.tolist() if hasattr(index, "tolist") else None


@functools.cache
def _gates(function: Callable[..., Any]) -> dict[str, Gate]:
    """Return the gate of every annotated argument."""
    kinds = {
        name: parameter.kind
        for name, parameter in inspect.signature(function).parameters.items()
    }
    gates: dict[str, Gate] = {}
    for name, annotation in _resolved(function).items():
        gate = _gate(annotation)
        if kinds[name] is inspect.Parameter.VAR_KEYWORD:
            gate = _options(annotation)
        elif kinds[name] is inspect.Parameter.VAR_POSITIONAL:
            gate = _items(tuple, gate)
        gates[name] = gate
    return gates


def _resolved(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of the arguments as objects.

    What is returned may be known to type checkers only.
    """
    own = {
        name: value for name, value in function.__annotations__.items() if name != "return"
    }
    holder = types.SimpleNamespace(__annotations__=own)
    return typing.get_type_hints(
        holder, globalns=getattr(function, "__globals__", None), include_extras=True
    )


def _gate(annotation: Any) -> Gate:
    """Return the gate of whatever an annotation says."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        gate = arguments[1]
        return _ranged(arguments[0], gate._asdict()) if isinstance(gate, Range) else gate
    if origin in (Union, types.UnionType):
        return _either(arguments)
    if origin is Literal:
        return functools.partial(_word, arguments)
    if origin in (dict, Mapping, collections.abc.Mapping):
        return _mapping(_gate(arguments[1]))
    if origin is tuple and (len(arguments) != 2 or arguments[1] is not Ellipsis):
        return _record(tuple(map(_gate, arguments)))
    if origin in (list, tuple, Sequence, collections.abc.Sequence):
        return _items(list if origin is list else tuple, _gate(arguments[0]))
    if origin is collections.abc.Callable:
        return functools.partial(
            _callable, None if arguments[0] is Ellipsis else len(arguments[0])
        )
    return _SIMPLE.get(annotation) or _instance(origin or annotation)


def _ranged(kind: type, bounds: dict[str, float | None]) -> Gate:
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return functools.partial(integer if kind is int else number, **given)  # type: ignore[arg-type]


def _either(options: tuple[Any, ...]) -> Gate:
    """Return the gate of a union: the first option that takes the value."""
    # their gates take strings
    words = {str} & {str for each in options if each in (pathlib.Path, torch.device)}
    gates = list(
        dict.fromkeys(
            _gate(each) for each in options if each not in {types.NoneType, *words}
        )
    )
    records = [_gate(each) for each in options if get_origin(each) is tuple]
    optional = types.NoneType in options

    def gate(name: str, value: Any) -> Any:
        if value is None and optional:
            return None
        refusals = []
        # two arrays are a tensor as well
        for each in records if records and isinstance(value, tuple) else gates:
            try:
                return each(name, value)
            except (TypeError, ValueError) as refusal:
                refusals.append(refusal)
        close = [
            each
            for each in refusals
            if isinstance(each, ValueError) or not str(each).startswith(f"{name} must be ")
        ]
        if close or len(refusals) == 1:
            raise (close or refusals)[0] from None
        wanted = dict.fromkeys(_wanted(name, str(refusal)) for refusal in refusals)
        raise TypeError(
            f"{name} must be {' or '.join(wanted)}, got {shown(value)}"
        ) from None

    return gate


def _wanted(name: str, refusal: str) -> str:
    """Return what a message says that the argument must be."""
    return refusal.removeprefix(f"{name} must be ").partition(", got ")[0]


def _word(choices: tuple[str, ...], name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}"
        )
    return choice(name, value, choices)


def _mapping(of: Gate) -> Gate:
    def gate(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict, got {shown(value)}")
        return {key: of(f"{name}[{key!r}]", each) for key, each in value.items()}

    return gate


def _record(gates: tuple[Gate, ...]) -> Gate:
    def gate(name: str, value: Any) -> Any:
        if not isinstance(value, tuple) or len(value) != len(gates):
            raise TypeError(f"{name} must be a tuple of {len(gates)}, got {shown(value)}")
        return tuple(
            each(f"{name}[{i}]", part)
            for i, (each, part) in enumerate(zip(gates, value, strict=True))
        )

    return gate


def _items(kind: type, of: Gate) -> Gate:
    def gate(name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray | Tensor) and value.ndim == 1:
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(
            value, str | bytes | bytearray | memoryview
        ):
            raise TypeError(f"{name} must be a list, got {shown(value)}")
        return kind(of(f"{name}[{i}]", each) for i, each in enumerate(value))

    return gate


def _options(annotation: Any) -> Gate:
    """Return the gate of keyword arguments: those of a ``TypedDict``, or all of one kind."""
    typed = next((each for each in get_args(annotation) if typing.is_typeddict(each)), None)
    hints = {} if typed is None else typing.get_type_hints(typed, include_extras=True)
    gates = {name: _gate(each) for name, each in hints.items()}

    def gate(name: str, value: dict[str, Any]) -> dict[str, Any]:
        if typed and (unknown := value.keys() - gates.keys()):
            raise TypeError(
                f"there is no option {min(unknown)!r}; the options are {', '.join(sorted(gates))}"
            )
        return {key: gates.get(key, _anything)(key, each) for key, each in value.items()}

    return gate


def _instance(kind: Any) -> Gate:
    """Return the gate of a class or a protocol."""
    if not isinstance(kind, type) or kind is object:
        return _anything
    protocol = getattr(kind, "_is_protocol", False)
    members = _members(kind) if protocol else ()

    def gate(name: str, value: Any) -> Any:
        fits = (
            all(_alike(kind, member, value) for member in members)
            if protocol
            else isinstance(value, kind)
        )
        if not fits or (isinstance(value, type) and not issubclass(kind, type)):
            article = "an" if kind.__name__[0] in "AEIOU" else "a"
            raise TypeError(f"{name} must be {article} {kind.__name__}, got {shown(value)}")
        return value

    return gate


def _alike(protocol: type, member: str, value: Any) -> bool:
    """Say whether a value has a member of a protocol, which can be called as that is."""
    if not hasattr(value, member):
        return False
    asked = getattr(protocol, member, None)
    if isinstance(value, type) or member == "__call__" or not inspect.isfunction(asked):
        return True
    every = list(inspect.signature(asked).parameters.values())[1:]  # without self
    needed = [
        p for p in every if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return len(needed) < len(every) or _takes(getattr(value, member), len(needed))


def _members(protocol: type) -> tuple[str, ...]:
    """Return what a protocol asks for; ``__call__`` alone among the private names."""
    bases = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False)]
    names = {
        name
        for base in bases
        for name in (*vars(base), *getattr(base, "__annotations__", ()))
    }
    return tuple(
        sorted(name for name in names if name == "__call__" or not name.startswith("_"))
    )


def _anything(name: str, value: Any) -> Any:
    return value


def _callable(count: int | None, name: str, value: Any) -> Any:
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be a function, got {shown(value)}")
    if count is not None and not _takes(
        value.forward if isinstance(value, torch.nn.Module) else value, count
    ):
        raise TypeError(
            f"{name} must be a function of {count} arguments, got {shown(value)}"
        )
    return value


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Say whether a function can be called with so many arguments.

    One that does not tell is believed.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    return str(value)


def _path(name: str, value: Any) -> Any:
    if not isinstance(value, os.PathLike | str) or isinstance(value, type) or value == "":
        raise TypeError(f"{name} must be a path, got {shown(value)}")
    return value


def _device(name: str, value: Any) -> torch.device:
    try:
        device = torch.device(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a device such as 'cpu' or 'cuda:0', got {shown(value)}"
        ) from None
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(f"{name} {str(device)!r} cannot be used here: {reason}") from None
    return device


def _dtype(name: str, value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(
            f"{name} must be a floating-point type such as torch.float32, got {shown(value)}"
        )
    return value


def _array(name: str, value: Any) -> np.ndarray:
    """Return a copy of real numbers as a contiguous array in this machine's own byte order."""
    # NumPy takes them for numbers
    if isinstance(value, bool | np.bool_ | bytearray | memoryview):
        raise TypeError(f"{name} must be a tensor of real numbers, got {shown(value)}")
    if _masked(value):
        raise TypeError(f"{name} has masked entries; fill them or leave their rows out")
    # a frame, whose columns may be of several types
    if hasattr(value, "columns") and hasattr(value, "dtypes"):
        if len(set(value.columns)) < len(value.columns):
            raise TypeError(
                f"{name} has columns of the same name: {', '.join(map(str, value.columns))}"
            )
        columns = [
            _column(f"{name} has {column!r}", value[column]) for column in value.columns
        ]
        return np.stack(columns, 1) if columns else np.empty((len(value), 0))
    array = _numbers(value)
    if array is None or (array.size == 0 and isinstance(value, list | tuple)):
        raise TypeError(f"{name} must be a tensor of real numbers, got {shown(value)}")
    array = np.array(array, order="C", copy=True)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.size and array.max() > np.iinfo(np.int64).max:
            raise TypeError(
                f"{name} must be a tensor of numbers below 2**63, got {array.max()}"
            )
        return array.astype(np.int64)
    known = array.dtype.itemsize <= 8
    return array.astype(array.dtype.newbyteorder("=") if known else np.float64, copy=False)


def _masked(value: Any) -> bool:
    """Say whether an array, or one in a list of them, has masked entries."""
    if isinstance(value, list | tuple):
        return any(_masked(each) for each in value)
    return isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value)


def _column(where: str, column: Any) -> np.ndarray:
    array = _numbers(column)
    if array is None:
        raise TypeError(
            f"{where} among its columns, which holds no numbers but {column.dtype}: "
            "encode it, or drop it"
        )
    return array


def _numbers(value: Any) -> np.ndarray | None:
    """Return the array that a value is, or None if it holds anything but real numbers."""
    try:
        array = np.asarray(value)
        # numbers with missing ones among them
        if array.dtype.kind == "O" and hasattr(value, "to_numpy"):
            # names, though of digits
            if any(isinstance(each, str | bytes) for each in array.flat):
                return None
            array = value.to_numpy(dtype=float, na_value=math.nan)
    except (TypeError, ValueError, RuntimeError):
        return None
    return array if array.dtype.kind in "biuf" else None


def _within(
    above: float | None, least: float | None, below: float | None, most: float | None
) -> str:
    if above is not None and below is not None:
        return f"strictly between {above:g} and {below:g}"
    bounds = {"above": above, "at least": least, "below": below, "at most": most}
    said = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
    return " and ".join(
        ["positive" if each == "above 0" else each for each in said] + ["finite"]
    )


def _between(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f"between {least} and {most}"
    return f"at least {least}" if least is not None else f"at most {most}"


def shown(value: Any) -> str:
    """Say what was given in a few words: a long array would hide the message."""
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    kind = type(value).__name__
    try:
        shape = getattr(value, "shape", ())
        if isinstance(shape, tuple) and shape:
            return f"{kind} of shape {tuple(shape)}"
        text = repr(value)
    except Exception:  # it may be anything
        return kind
    return f"{kind} {text}" if len(text) <= 60 else kind


_NOT_REAL: frozenset[Any] = frozenset(
    [
        torch.bool,
        torch.complex32,
        torch.complex64,
        torch.complex128,
        *(np.dtype(code) for code in "?FDG"),
    ]
)
"""What `float` would take the truth or the real part of."""

_SIMPLE: dict[Any, Gate] = {
    Any: _anything,
    bool: flag,
    float: number,
    int: integer,
    str: _text,
    pathlib.Path: _path,
    Tensor: tracked,
    np.ndarray: tracked,
    torch.device: _device,
    torch.dtype: _dtype,
}
