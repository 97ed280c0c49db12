"""A digest depends on what a value is, and on nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bnnflow.identity import digest, seed_identity, without_addresses
from tests.processes import run


@dataclass(frozen=True)
class Settings:
    """Some settings."""

    rate: float
    mass: torch.Tensor | None = None


class Plain:
    """An object with attributes, itself among them, and a value that is computed once and kept."""

    def __init__(self, rate: float) -> None:
        self.rate, self.me = rate, self

    @cached_property
    def squared(self) -> float:
        return self.rate**2


class Scaled(nn.Linear):
    """A module with an attribute of its own."""

    def __init__(self, scale: float, function: Any = torch.tanh) -> None:
        super().__init__(1, 1)
        self.scale, self.function = scale, function
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


def power(n: int) -> Any:
    return lambda x: x**n


PAIRS = {
    "numbers": (1, 2),
    "a number and its text": (1, "1"),
    "types": (1, 1.0),
    "signs of zero": (0.0, -0.0),
    "tensors": (torch.zeros(3), torch.zeros(3) + 1e-30),
    "shapes": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "dtypes": (torch.zeros(3), torch.zeros(3, dtype=torch.int32)),
    "arrays": (np.zeros(3), np.ones(3)),
    "nestings": ([[1], 2], [1, [2]]),
    "mappings": ({"a": 1}, {"b": 1}),
    "sets": ({1, 2}, {1, 3}),
    "settings": (Settings(1.0), Settings(2.0)),
    "settings with tensors": (Settings(1.0, torch.zeros(2)), Settings(1.0, torch.ones(2))),
    "objects": (Plain(1.0), Plain(2.0)),
    "modules": (Scaled(1.0), Scaled(2.0)),
    "modules with functions": (Scaled(1.0, power(2)), Scaled(1.0, power(3))),
    "code": (lambda x: x + 1, lambda x: x - 1),
    "constants of code": (lambda x: x + 1, lambda x: x + 2),
    "closures": (power(2), power(3)),
    "functions without code": (torch.tanh, torch.sin),
    "partial functions": (partial(pow, 2), partial(pow, 3)),
    "methods": (Plain(1.0).__init__, Plain(2.0).__init__),
    "classes": (Plain, Settings),
}


@pytest.mark.parametrize("name", PAIRS)
def test_different_values_have_different_digests(name: str) -> None:
    first, second = PAIRS[name]
    assert digest(first) != digest(second)
    assert digest(first) == digest(first)


def values() -> list[Any]:
    return [
        {"a": {"x", "y", "z"}, "b": 1},
        torch.arange(4.0),
        (1, None, b"x"),
        Settings(0.5, torch.ones(1)),
    ]


def test_equal_values_have_equal_digests_in_every_process(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from bnnflow.identity import digest
from tests.test_digest import values
Path({str(tmp_path / "digest")!r}).write_text(digest(values()))
"""
    assert run(program) == 0
    assert (tmp_path / "digest").read_text() == digest(values())
    assert digest(torch.arange(6).reshape(2, 3).T) == digest(
        torch.arange(6).reshape(2, 3).T.contiguous()
    )


def test_what_was_computed_and_kept_does_not_count() -> None:
    used = Plain(3.0)
    assert used.squared == 9
    assert digest(used) == digest(Plain(3.0))


def test_seeds_are_told_apart() -> None:
    one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    assert seed_identity(3) == 3
    assert seed_identity(one) != seed_identity(two)
    before = seed_identity(one)
    torch.rand(1, generator=one)
    assert seed_identity(one) != before
    assert (
        without_addresses("Method(function=<function f at 0x7f00>)")
        == "Method(function=<function f>)"
    )
