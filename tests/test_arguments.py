"""The gate of arguments: what is clear is converted, what is not is refused by name."""

import math

import numpy as np
import pytest
import torch

from bnnflow import arguments


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), torch.tensor(3), torch.tensor([3])])
def test_whole_numbers_become_int(value):
    result = arguments.integer("chains", value, least=1)
    assert type(result) is int
    assert result == 3


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), 3.0, np.float64(3), "3", None, [3], int])
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match="chains must be an integer"):
        arguments.integer("chains", value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_real_numbers_become_float(value):
    result = arguments.number("step_size", value, above=0)
    assert type(result) is float
    assert result == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 0, np.float32("nan"), torch.tensor(-1.0)])
def test_numbers_out_of_range_are_refused_by_name(value):
    with pytest.raises(ValueError, match="step_size must be positive and finite"):
        arguments.number("step_size", value, above=0)


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5, 0.5], 1j, torch.ones(2), float])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match="step_size must be a number"):
        arguments.number("step_size", value)


def test_arrays_are_copied_and_lose_their_derivative():
    array = np.ones((2, 3))
    result = arguments.tensor("x", array)
    array[:] = 0
    assert result.sum() == 6
    assert not arguments.tensor("x", torch.ones(3, requires_grad=True)).requires_grad
    assert arguments.tensor("x", [1, 2]).dtype == torch.int64
    assert arguments.tensor("x", [1.0, 2.0], dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "value",
    ["abc", None, ["a"], [[1], [1, 2]], np.ones(2) * 1j, torch.ones(2) * 1j, np.ma.masked_equal([1, 2], 2), object()],
)
def test_what_holds_no_real_numbers_is_refused_by_name(value):
    with pytest.raises(TypeError, match="x "):
        arguments.tensor("x", value)
