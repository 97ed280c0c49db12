"""The gate of arguments: what is clear is converted, what is not is refused by name."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bnnflow import arguments


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.array(3), torch.tensor(3), torch.tensor([3])]
)
def test_whole_numbers_become_int(value):
    result = arguments.integer("chains", value, least=1)
    assert type(result) is int
    assert result == 3


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), torch.tensor(True), 3.0, np.float64(3), "3", None, [3], int],
)
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match="chains must be an integer"):
        arguments.integer("chains", value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_real_numbers_become_float(value):
    result = arguments.number("step_size", value, above=0)
    assert type(result) is float
    assert result == 0.5


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -1, 0, np.float32("nan"), torch.tensor(-1.0)]
)
def test_numbers_out_of_range_are_refused_by_name(value):
    with pytest.raises(ValueError, match="step_size must be positive and finite"):
        arguments.number("step_size", value, above=0)


@pytest.mark.parametrize(
    "value",
    [
        "0.5",
        None,
        True,
        [0.5, 0.5],
        1j,
        np.complex64(1),
        np.array(1j),
        torch.tensor(1j),
        bytearray(b"1"),
        torch.ones(2),
    ],
)
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
    [
        *("abc", None, ["a"], [[1], [1, 2]], object(), bytearray(b"ab"), memoryview(b"ab")),
        *(np.ones(2) * 1j, torch.ones(2) * 1j, np.ma.masked_equal([1, 2], 2)),
        *(torch.eye(2).to_sparse(), torch.ones(2, device="meta")),
        *([np.ma.masked_equal([1, 2], 2)], ([1.0, np.ma.masked],)),
    ],
)
def test_what_holds_no_real_numbers_is_refused_by_name(value):
    with pytest.raises(TypeError, match="x "):
        arguments.tensor("x", value)


def test_columns_of_digits_in_quotes_are_names():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(
        TypeError, match="x has 'zip' among its columns, which holds no numbers"
    ):
        arguments.tensor(
            "x", pandas.DataFrame({"a": [1.0, 2.0], "zip": ["94110", "10001"]})
        )


def test_columns_of_one_name_are_refused():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match="columns of the same name"):
        arguments.tensor("x", pandas.DataFrame([[1.0, 2.0]], columns=["a", "a"]))


@arguments.checked
def rows_of(x: torch.Tensor, y: torch.Tensor | None = None) -> int:
    return len(x)


def test_rows_with_the_same_labels_in_another_order_are_refused():
    pandas = pytest.importorskip("pandas")
    x, y = pandas.DataFrame({"a": [1.0, 2.0, 3.0]}), pandas.Series([1.0, 2.0, 3.0])
    shuffled = y.iloc[[2, 0, 1]]
    assert (
        rows_of(x, y)
        == rows_of(x, shuffled.to_numpy())
        == rows_of(x.iloc[[2, 0, 1]], shuffled)
        == 3
    )
    # places are all that there is
    assert rows_of(x, y.set_axis([10, 11, 12])) == rows_of(x, y=None) == 3
    for wrong in (shuffled, y.sort_values(ascending=False)):
        with pytest.raises(ValueError, match="same labels in another order"):
            rows_of(x, wrong)
    # another row was dropped of each
    with pytest.raises(ValueError, match="same labels in another order"):
        rows_of(x.drop(0), y.drop(1))


@arguments.checked
def sizes_of(draws: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]) -> object:
    return len(draws), type(draws).__name__


def test_a_pair_is_no_tensor_where_pairs_are_asked_for():
    theta = np.ones((3, 1))
    assert sizes_of((theta, np.zeros((3, 1)))) == (2, "tuple")
    assert sizes_of([theta, theta]) == (2, "Tensor")


class Unruly:
    """An object that answers no question about itself."""

    def __getattr__(self, name):
        raise RuntimeError(name)


@pytest.mark.parametrize("check", [arguments.integer, arguments.number, arguments.flag])
def test_objects_that_answer_nothing_are_refused_by_name(check):
    with pytest.raises(TypeError, match="n must be"):
        check("n", Unruly())


@arguments.checked
def evaluated(
    function: Callable[[int, int], int], device: torch.device | str = "cpu"
) -> int:
    return function(1, 2)


def test_functions_are_held_to_the_number_of_their_arguments():
    assert evaluated(max) == 2
    assert evaluated(lambda *numbers: len(numbers)) == 2
    for wrong in (len, lambda: 0, lambda a: 0, torch.nn.Identity(), int):
        with pytest.raises(TypeError, match="function must be a function"):
            evaluated(wrong)


@pytest.mark.parametrize("device", ["cuda:99", "meta"])
def test_devices_that_are_not_there_are_refused_by_name(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
        evaluated(max, device)
