"""A short hash of any value: whether two runs were given the same."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["digest", "seed_identity", "without_addresses"]


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that depend on all that a value is made of, and on nothing else.

    Numbers, texts, arrays and tensors (with their types), containers, modules (their parameters and buffers), functions
    (their code and what they close over), and objects (their attributes; those with an underscore, where things are
    cached, are left out). It is the same in another process.
    """
    hashed = hashlib.sha256()
    _feed(hashed, value, ())
    return hashed.hexdigest()[:16]


def seed_identity(seed: int | torch.Generator) -> int | str:
    """Return what tells seeds apart: the number, or a hash of a generator's state before it is used."""
    if isinstance(seed, torch.Generator):
        return f"generator {digest(seed.get_state())}"
    return int(seed)


def _feed(hashed: Any, value: Any, inside: tuple[int, ...]) -> None:
    """Add a value to a hash; ``inside`` are the objects that it is part of, which it may refer back to."""

    def parts(kind: str, *values: Any) -> None:
        hashed.update(f"{kind} {len(values)} ".encode())
        for each in values:
            _feed(hashed, each, (*inside, id(value)))

    if id(value) in inside:
        hashed.update(b"itself ")
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
        hashed.update(f"{type(value).__name__} {value!r} ".encode())
    elif isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        hashed.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        hashed.update(flat.view(torch.uint8).numpy().data if len(flat) else b"")
    elif isinstance(value, np.ndarray | np.generic):
        hashed.update(f"{value.dtype} {value.shape} ".encode())
        hashed.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        parts("mapping", *sorted(((str(key), each) for key, each in value.items()), key=lambda item: item[0]))
    elif isinstance(value, list | tuple):
        parts(type(value).__name__, *value)
    elif isinstance(value, AbstractSet):
        parts("set", *sorted(map(digest, value)))
    elif isinstance(value, nn.Module):
        parts(_name(type(value)), without_addresses(repr(value)), value.state_dict(), *map(_plain, value.modules()))
    elif isinstance(value, FunctionType):
        closed = [cell.cell_contents for cell in value.__closure__ or ()]
        constants = [each for each in value.__code__.co_consts if not hasattr(each, "co_code")]
        parts(_name(value), value.__code__.co_code, constants, value.__defaults__, closed)
    elif isinstance(value, MethodType):
        parts(_name(value), value.__self__)
    elif isinstance(value, partial):
        parts("partial", value.func, value.args, value.keywords)
    elif hasattr(value, "__qualname__"):  # a class, or a function without code of its own
        parts(_name(value))
    elif dataclasses.is_dataclass(value):
        parts(_name(type(value)), *((f.name, getattr(value, f.name)) for f in dataclasses.fields(value)))
    else:
        own = getattr(value, "__dict__", {}).items()
        parts(_name(type(value)), {name: each for name, each in own if not name.startswith("_")})


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are no parameters, buffers or modules, as far as they are plain."""
    kinds = bool | int | float | str | Tensor | FunctionType
    return {
        name: value for name, value in vars(module).items() if isinstance(value, kinds) and not name.startswith("_")
    }


def without_addresses(text: str) -> str:
    """Return a representation without the addresses of objects, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
