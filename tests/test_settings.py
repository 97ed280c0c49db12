"""Every method checks its settings when it is made: one law for all of their fields."""

import math
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import pytest

import bnnflow as bf
from bnnflow.inference import Cyclical, Polynomial

METHODS: list[type] = [
    bf.HMC,
    bf.AdjustedMCLMC,
    bf.MCLMC,
    bf.SGLD,
    bf.SGHMC,
    bf.SGNHT,
    bf.SMC,
    bf.ParallelTempering,
    bf.PyroNUTS,
    bf.VI,
    bf.NormalizingFlowVI,
    bf.Laplace,
    bf.SWAG,
    bf.DeepEnsemble,
    bf.MCDropout,
    Cyclical,
    Polynomial,
]
FIELDS = [(method, field.name) for method in METHODS for field in fields(method)]
NOT_NUMBERS = {"start", "schedule", "preconditioner", "prior_precision"}
OPEN_COUNTS = {"batch_size", "steps"}  # whole numbers where they are given


def default(method: type, name: str) -> Any:
    return next(field.default for field in fields(method) if field.name == name)


def is_number(method: type, name: str) -> bool:
    value = default(method, name)
    return name not in NOT_NUMBERS and not isinstance(value, bool | str)


NUMBERS = [pair for pair in FIELDS if is_number(*pair)]


@pytest.mark.parametrize(("method", "name"), NUMBERS)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1, np.float64("nan"), np.int64(-3)], ids=repr
)
def test_numbers_without_sense_are_refused_by_name(
    method: type, name: str, value: Any
) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        method(**{name: value})


@pytest.mark.parametrize(("method", "name"), FIELDS)
@pytest.mark.parametrize(
    "value", ["word", [1], object(), float], ids=["word", "list", "object", "class"]
)
def test_values_of_another_kind_are_refused_by_name(
    method: type, name: str, value: Any
) -> None:
    if name == "schedule" and value is float:
        return  # a schedule is any callable
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        method(**{name: value})


@pytest.mark.parametrize(("method", "name"), FIELDS)
def test_none_is_a_choice_only_where_it_is_the_default(method: type, name: str) -> None:
    if default(method, name) is None:
        assert getattr(method(**{name: None}), name) is None
        return
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        method(**{name: None})


@pytest.mark.parametrize(("method", "name"), NUMBERS)
def test_scalars_of_numpy_are_pythons(method: type, name: str) -> None:
    value = default(method, name)
    assert value is not MISSING
    value = (5 if name in OPEN_COUNTS else 0.5) if value is None else value or 5
    other = np.int64(value) if isinstance(value, int) else np.float64(value)
    assert repr(method(**{name: other})) == repr(method(**{name: value})), (
        "the identity of a checkpoint"
    )
