"""One gate for arguments: what a caller meant where that is clear, else an error that names the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["choice", "flag", "integer", "number", "settle", "tensor"]


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
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
        if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        result = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be an integer, got {_shown(value)}") from None
    if (least is not None and result < least) or (most is not None and result > most):
        raise ValueError(f"{name} must be {_between(least, most)}, got {result}")
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
        if isinstance(value, bool | np.bool_ | str | bytes) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {_shown(value)}") from None
    bounds = {"above": above, "at least": least, "below": below, "at most": most}
    inside = (
        math.isfinite(result)
        and (above is None or result > above)
        and (least is None or result >= least)
        and (below is None or result < below)
        and (most is None or result <= most)
    )
    if not inside:
        said = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        raise ValueError(f"{name} must be finite{' and ' if said else ''}{said}, got {result!r}")
    return result


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return ``value`` if it is one of the words allowed.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {_shown(value)}")
    return value


def flag(name: str, value: Any) -> bool:
    """Return True or False, Python's or NumPy's.

    Raises:
        TypeError: if it is neither: the truth of a word or a number is nobody's intention.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")
    return bool(value)


def settle(settings: Any, check: Callable[..., Any], *names: str, **bounds: Any) -> None:
    """Check fields of a frozen dataclass while it is made, and keep the values that the check returns.

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


def tensor(name: str, value: Any, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Return real numbers as a tensor that tracks no derivative; arrays, frames and lists are copied.

    Args:
        name: of the argument, for the message.
        value: a tensor, an array, a pandas or polars frame or series, or lists of numbers.
        dtype: what floating-point values become; integers and bools stay what they are.
        device: where the tensor goes.

    Raises:
        TypeError: if it does not hold real numbers, or has masked or missing entries that no number stands for.
    """
    if isinstance(value, Tensor):
        result = value.detach()
    else:
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            raise TypeError(f"{name} has masked entries; fill them or leave their rows out")
        try:
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise TypeError
            result = torch.from_numpy(np.array(array, order="C", copy=True))
        except (TypeError, ValueError):
            raise TypeError(f"{name} must hold real numbers, got {_shown(value)}") from None
    if result.is_complex() or result.layout != torch.strided:
        raise TypeError(f"{name} must hold real numbers in a dense tensor, got {result.dtype}, {result.layout}")
    return result.to(device, dtype if result.is_floating_point() else None)


def _between(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f"between {least} and {most}"
    return f"at least {least}" if least is not None else f"at most {most}"


def _shown(value: Any) -> str:
    """Say what was given in a few words: a long array would hide the message."""
    text, kind = repr(value), type(value).__name__
    if len(text) <= 60:
        return f"{kind} {text}"
    shape = tuple(getattr(value, "shape", ()))
    return f"{kind} of shape {shape}" if shape else kind
