"""How a table becomes the numbers that a network sees."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np

from bnnflow.warn import warn

__all__ = ["Column", "Columns", "Table", "columns_of", "is_frame", "ordered"]

Columns = dict[str, np.ndarray]
"""Columns by name, ``(n,)`` each: float64 numbers, or an object array of words."""

_MOST_LEVELS = 50  # categories of a column that get an input of their own
_REPEATED = 10  # times as many rows as were given that weights may repeat them to


@dataclass(frozen=True)
class Column:
    """What was learned of a column of a table.

    Attributes:
        name: of the column; its number in an array.
        levels: its categories, of which each has an input; empty for numbers.
        pooled: whether there were others, too rare to have one.
        centre: what is taken off each of its inputs.
        scale: by which that is divided.
    """

    name: str
    levels: tuple[str, ...]
    pooled: bool
    centre: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs made of it."""
        return [f"{self.name}={level}" for level in self.levels] or [self.name]


@dataclass(frozen=True)
class Table:
    """The columns of a table that carry something, and how each is encoded.

    Numbers are standardised. A category becomes an input for each of its levels, two wide. Columns
    that never change are left out.
    """

    columns: tuple[Column, ...]
    dropped: tuple[str, ...]

    @classmethod
    def fit(cls, given: Columns) -> Table:
        """Learn how columns are encoded.

        Raises:
            ValueError: if no column changes.
        """
        columns, dropped = [], []
        for name, values in given.items():
            column = _fitted(name, values)
            if column is None:
                dropped.append(name)
            else:
                columns.append(column)
        if not columns:
            raise ValueError(
                "X has no column that changes from row to row: nothing can be learned"
            )
        if dropped:
            warn(f"columns that never change are left out: {_listed(dropped)}")
        return cls(tuple(columns), tuple(dropped))

    def transform(self, given: Columns) -> np.ndarray:
        """Encode columns, ``(n, inputs)`` in float64.

        A category that was not there in training has none of the levels, and is warned of.

        Raises:
            ValueError: for words where there were numbers.
        """
        blocks, unseen = [], Counter[str]()
        for column in self.columns:
            values = given[column.name]
            if column.levels:
                levels = _levels(values)
                known = np.asarray(column.levels, dtype=object)
                block = (levels[:, None] == known).astype(np.float64)
                if not column.pooled:
                    unseen[column.name] = int((block.sum(1) == 0).sum())
            elif values.dtype == object:
                raise ValueError(
                    f"column {column.name!r} held numbers in training, and now {values[0]!r}"
                )
            else:
                block = values[:, None]
            blocks.append((block - np.asarray(column.centre)) / np.asarray(column.scale))
        if told := [f"{name} ({count} rows)" for name, count in unseen.items() if count]:
            warn(
                f"categories that training never saw count as none of its levels: {_listed(told)}"
            )
        return np.concatenate(blocks, 1)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs of the network."""
        return [name for column in self.columns for name in column.inputs]

    def describe(self) -> dict[str, Any]:
        """Return it as a dict that JSON can hold."""
        return {
            "columns": [vars(column) for column in self.columns],
            "dropped": self.dropped,
        }

    @classmethod
    def from_description(cls, described: dict[str, Any]) -> Table:
        """Rebuild a table from `describe`."""
        columns = [
            Column(
                each["name"],
                tuple(each["levels"]),
                each["pooled"],
                tuple(each["centre"]),
                tuple(each["scale"]),
            )
            for each in described["columns"]
        ]
        return cls(tuple(columns), tuple(described["dropped"]))


def is_frame(X: Any) -> bool:
    """Say whether X is a DataFrame, of pandas or of polars."""
    return hasattr(X, "columns") and hasattr(X, "shape") and hasattr(X, "__getitem__")


def names_of(y: Any) -> list[str]:
    """Return the names that a frame or a series gives to targets; none of an array."""
    if is_frame(y):
        return [str(name) for name in y.columns]
    name = getattr(y, "name", None)
    return [name] if isinstance(name, str) and name else []


def columns_of(X: Any) -> Columns:
    """Return the columns of a frame or of an array ``(n, columns)`` by name.

    Raises:
        ValueError: for missing or infinite values, dates, or two columns of one name.
    """
    if not is_frame(X):
        return {str(i): column for i, column in enumerate(np.asarray(X, np.float64).T)}
    names = [str(name) for name in X.columns]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"X has several columns of one name: {_listed(repeated)}")
    found, missing, infinite = {}, [], []
    for index, name in enumerate(names):
        series = X.iloc[:, index] if hasattr(X, "iloc") else X[:, index]
        values = np.asarray(series)
        if values.dtype.kind in "Mm":
            raise ValueError(
                f"column {name!r} holds dates or times: give numbers, such as days since the first"
            )
        if values.dtype.kind == "c":
            raise ValueError(f"Complex data not supported: column {name!r}")
        gone = _missing(values)
        if gone.any():
            missing.append(f"{name} ({int(gone.sum())} rows)")
            continue
        found[name] = _plain(values)
        if found[name].dtype != object and not np.isfinite(found[name]).all():
            infinite.append(name)
    if missing:
        raise ValueError(
            f"X contains NaN: missing values in {_listed(missing)}. Fill them first, for example "
            "by sklearn.impute.SimpleImputer"
        )
    if infinite:
        raise ValueError(f"X contains infinity in {_listed(infinite)}")
    return found


def ordered(
    columns: Columns, y: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return rows in an order of their own, so that fits do not depend on that of the caller.

    Args:
        columns: of the table.
        y: targets ``(n, targets)`` or labels ``(n,)``.
        weights: how often each row counts, ``(n,)``; rows of weight zero are left out.

    Returns:
        int64 ``(m,)``, and their weights ``(m,)``: None for whole numbers, as long as these make
        the table no more than ten times as long. Rows then come as often as they count.

    Raises:
        ValueError: for weights that are negative or all zero.
    """
    rows = np.arange(len(y))
    if weights is not None:
        if (weights < 0).any():
            raise ValueError(f"sample_weight must not be negative, got {weights.min():g}")
        if not weights.any():
            raise ValueError("sample_weight is zero for every row")
        counts = np.round(weights)
        if np.array_equal(counts, weights) and counts.sum() <= _REPEATED * len(weights):
            rows, weights = np.repeat(rows, counts.astype(np.int64)), None
        else:
            rows = rows[weights > 0]
    keys = [
        np.unique(_levels(values), return_inverse=True)[1]
        if values.dtype == object
        else values
        for values in columns.values()
    ]
    keys += list(y.reshape(len(y), -1).T)
    if weights is not None:
        keys.append(weights)
    rows = rows[np.lexsort([key[rows] for key in keys])]
    return rows, None if weights is None else weights[rows]


def _missing(values: np.ndarray) -> np.ndarray:
    """Say which values are missing, ``(n,)``."""
    if values.dtype.kind == "f":
        return np.isnan(values)
    if values.dtype != object:
        return np.zeros(len(values), bool)
    absent = ("NAType", "NaTType")
    return np.array(
        [
            value is None
            or type(value).__name__ in absent
            or (isinstance(value, float) and value != value)
            for value in values
        ],
        bool,
    )


def _plain(values: np.ndarray) -> np.ndarray:
    """Return numbers as float64, and anything else as objects."""
    if values.dtype.kind in "biuf":
        return values.astype(np.float64)
    if all(isinstance(value, Number | np.bool_) for value in values):
        return values.astype(np.float64)
    return values.astype(object)


def _levels(values: np.ndarray) -> np.ndarray:
    """Return categories as words, ``(n,)``."""
    if values.dtype != object:  # numbers where there were words
        values = values.astype(object)
    return np.array([str(value) for value in values], dtype=object)


def _fitted(name: str, values: np.ndarray) -> Column | None:
    """Return what a column is, None if it never changes."""
    if values.dtype != object:
        if (values == values[0]).all():
            return None
        return Column(name, (), False, (float(values.mean()),), (float(values.std()),))
    counts = Counter(_levels(values))
    if len(counts) == 1:
        return None
    levels = sorted(level for level, _ in counts.most_common(_MOST_LEVELS))
    rest = len(counts) - len(levels)
    if rest:
        warn(
            f"column {name!r} has {len(counts)} categories: the rarest {rest} count as one"
        )
    shares = [counts[level] / len(values) for level in levels]
    return Column(name, tuple(levels), rest > 0, tuple(shares), (0.5,) * len(levels))


def _listed(names: list[str]) -> str:
    rest = len(names) - 10
    return ", ".join(names[:10]) + (f" and {rest} more" if rest > 0 else "")
