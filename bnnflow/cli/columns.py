"""What the text in a table means: numbers, dates or words; and what stands for missing values."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from bnnflow.cli.reading import Notes, Raw

__all__ = ["Column", "Inputs", "Target", "decimal_mark", "missing"]

_MISSING = {"", "na", "n/a", "nan", "null", "#n/a", "#na", "<na>", "nat"}
_BLANK = {"-", "--", "?", ".", "none", "nil", "missing", "unknown"}  # among numbers
_ENDLESS = {"inf", "+inf", "-inf", "infinity", "+infinity", "-infinity"}
_MOSTLY = 0.9  # share of numbers from which the words among them count as missing
_LONG = 20  # rows that are not numbered by accident
_MANY = 50  # different words, over half of the rows, that are names rather than categories
_GROUP = "[ '\u2019\u00a0\u202f\u2009]"  # between thousands, besides points and commas
_OTHER = {".": ",", ",": "."}
_UNIT = re.compile(r"([+-]?)([$€£¥]?)\s*(.*?)\s*([%$€£¥]?)")
_CODE = re.compile(r"[+-]?(0\d+|\d{16,})")  # of which a float would lose digits
_DATE = re.compile(
    r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?( ?(Z|UTC|[+-]\d\d:?\d\d))?)?"
)
_MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_UNCLEAR_DATE = re.compile(
    rf"(\d{{1,4}}[./-]\d{{1,2}}[./-]\d{{1,4}}|\d{{1,2}}[ .-]*{_MONTH}[ .,-]*\d{{2,4}}"
    rf"|{_MONTH}[ .]*\d{{1,2}},? +\d{{4}})([T ,]+\d{{1,2}}:\d\d.*)?"
    r"|\d{1,2}:\d\d(:\d\d)?( ?[AP]M)?",
    re.IGNORECASE,
)


def _number(decimal: str) -> re.Pattern[str]:
    """Return how numbers are written with this decimal mark."""
    thousands = _OTHER[decimal]
    exponent = r"(?:[eE][+-]?\d+)?"
    grouped = rf"[1-9]\d{{0,2}}(?:(?:[{thousands}]\d{{3}})+|(?:{_GROUP}\d{{3}})+)"
    return re.compile(
        rf"[+-]?(?:(?:\d+|{grouped})(?:[{decimal}]\d*)?|[{decimal}]\d+){exponent}"
    )


_NUMBER = {mark: _number(mark) for mark in (".", ",")}


def missing(text: str) -> bool:
    """Say whether a cell means that nothing is known."""
    return text.lower() in _MISSING


@dataclass(frozen=True)
class Column:
    """What a column holds, and how it is read.

    Attributes:
        name: of the column.
        kind: ``"numbers"``, ``"dates"`` (days since ``origin``) or ``"words"``.
        decimal: the mark before decimals, ``"."`` or ``","``.
        unit: a sign that stands at every number, such as ``"%"``.
        origin: the first date.
        fill: what stands for missing numbers; None where training had none to learn it from.
        indicator: whether another column says where numbers were missing.
    """

    name: str
    kind: str
    decimal: str = "."
    unit: str = ""
    origin: str = ""
    fill: float | None = None
    indicator: bool = False

    @property
    def indicator_name(self) -> str:
        """Name of the column that says where numbers were missing."""
        return f"{self.name} is missing"

    @classmethod
    def look(
        cls, name: str, values: np.ndarray, decimal: str | None, notes: Notes
    ) -> Column:
        """Find out what a column holds.

        Args:
            name: of the column.
            values: its text.
            decimal: the mark before decimals, where the column itself does not tell.
            notes: takes what was chosen.

        Raises:
            ValueError: naming the column, for what can be read in more than one way.
        """
        present = [text for text in values if not missing(text)]
        known = [text for text in present if text.lower() not in _BLANK | _ENDLESS]
        of = max(1, len(known))
        if sum(bool(_DATE.fullmatch(text)) for text in known) >= _MOSTLY * of and known:
            origin = min(_moment(name, text) for text in known if _DATE.fullmatch(text))
            notes.append(f"column {name!r} holds dates: days since {origin:%Y-%m-%d}")
            return cls(name, "dates", origin=origin.isoformat())
        if 2 * sum(bool(_UNCLEAR_DATE.fullmatch(text)) for text in known) > of:
            raise ValueError(
                f"column {name!r} holds dates or times such as {known[0]!r}, which can be read in "
                f"several ways: write 2026-01-31, or leave it out by --drop {name!r}"
            )
        bare = [_parts(text) for text in known]
        numbers = [(unit, text) for unit, text in bare if _like_a_number(text)]
        if any(_CODE.fullmatch(text) for _, text in numbers):
            notes.append(
                f"column {name!r} holds codes (leading zeros, or 16 digits): words"
            )
            return cls(name, "words")
        if not numbers or len(numbers) < _MOSTLY * of:
            if len(numbers) > (1 - _MOSTLY) * of:
                notes.append(
                    f"column {name!r} mixes numbers and words: all are taken for words"
                )
            return cls(name, "words")
        if any(text.lower() in _ENDLESS for text in present):
            raise ValueError(
                f"column {name!r} holds infinite numbers: fill or leave them out"
            )
        return cls._numbers(name, numbers, decimal, notes)

    @classmethod
    def _numbers(
        cls, name: str, numbers: list[tuple[str, str]], decimal: str | None, notes: Notes
    ) -> Column:
        units = {unit for unit, _ in numbers}
        if len(units) > 1:
            some = " and ".join(repr(unit) if unit else "no sign" for unit in sorted(units))
            raise ValueError(f"column {name!r} mixes numbers with {some}")
        (unit,) = units
        texts = {text for _, text in numbers}
        mark = _mark(name, texts) or decimal or "."
        if unit:
            notes.append(f"column {name!r}: the sign {unit!r} is taken off its numbers")
        if mark == "," and any("," in text for text in texts):
            notes.append(f"column {name!r} has decimal commas")
        return cls(name, "numbers", mark, unit)

    def read(self, values: np.ndarray, notes: Notes, *, strict: bool = False) -> np.ndarray:
        """Return numbers, NaN where they are missing, or words, ``"missing"`` where they are.

        Raises:
            ValueError: if none of the cells holds what the column held in training; with ``strict``
                if one of them does not.
        """
        if self.kind == "words":
            return np.array(
                ["missing" if missing(text) else text for text in values], object
            )
        result, strange = np.full(len(values), math.nan), Counter[str]()
        for row, text in enumerate(values):
            if missing(text) or text.lower() in _BLANK:
                continue
            value = self._value(text)
            if value is None:
                strange[text] += 1
            else:
                result[row] = value
        if np.isinf(result).any():
            raise ValueError(f"column {self.name!r} holds numbers too large for a computer")
        if strange:
            some = ", ".join(repr(text[:30]) for text in list(strange)[:5])
            told = (
                f"column {self.name!r}: {strange.total()} cells are no {self.kind} ({some})"
            )
            if strict or np.isnan(result).all():
                raise ValueError(told)
            notes.append(f"{told}: taken for missing")
        if self.kind == "numbers":
            self._tell_of_thousands(values, notes)
        return result

    def _tell_of_thousands(self, values: np.ndarray, notes: Notes) -> None:
        separators = re.compile(f"[{_OTHER[self.decimal]}]|{_GROUP}")
        for text in values:
            value = self._value(text) if separators.search(_parts(text)[1]) else None
            if value is not None:
                notes.append(
                    f"column {self.name!r} has thousands separators: {text!r} is {value:.15g} "
                    f"(if that is a decimal mark, say so by --decimal)"
                )
                return

    def _value(self, text: str) -> float | None:
        if self.kind == "dates":
            if not _DATE.fullmatch(text):
                return None
            since = _moment(self.name, text) - datetime.fromisoformat(self.origin)
            return since.total_seconds() / 86400
        unit, bare = _parts(text)
        return _value(bare, self.decimal) if unit == self.unit else None


@dataclass(frozen=True)
class Inputs:
    """How the columns of a file become those of a table without gaps."""

    columns: tuple[Column, ...]

    @classmethod
    def learn(cls, raw: Raw, rows: np.ndarray, decimal: str | None, notes: Notes) -> Inputs:
        """Learn what columns hold from all rows, and what fills gaps from ``rows``, those of
        training.
        """
        kept = []
        for name, values in raw.items():
            column = Column.look(name, values, decimal, notes)
            found = column.read(values, notes)
            if _counts(column, found):
                notes.append(
                    f"column {name!r} numbers the rows: if that says nothing of them, leave it "
                    f"out by --drop {name}"
                )
            learned = _filled(column, found[rows], notes)
            if learned is not None:
                kept.append(learned)
        marks = {column.indicator_name for column in kept if column.indicator}
        if taken := marks & {*raw}:
            raise ValueError(
                f"rename the column {min(taken)!r}: one of that name marks the gaps"
            )
        if not kept:
            raise ValueError("there is no column to predict from")
        return cls(tuple(kept))

    def apply(self, raw: Raw, notes: Notes) -> dict[str, np.ndarray]:
        """Return columns without gaps, of numbers or of words.

        Raises:
            ValueError: naming columns that are not there.
        """
        if absent := [column.name for column in self.columns if column.name not in raw]:
            raise ValueError(
                f"columns that training had are not there: {', '.join(absent[:10])}"
            )
        table = {}
        for column in self.columns:
            values = column.read(raw[column.name], notes)
            if column.kind != "words":
                gaps = np.isnan(values)
                if gaps.any() and not column.indicator:
                    notes.append(
                        f"column {column.name!r}: {gaps.sum()} cells are missing, as none was in "
                        f"training: taken for the median, {column.fill:g}"
                    )
                values[gaps] = column.fill
                if column.indicator:
                    table[column.indicator_name] = gaps.astype(float)
            table[column.name] = values
        return table

    def describe(self) -> list[dict[str, Any]]:
        """Return it as JSON holds it."""
        return [asdict(column) for column in self.columns]

    @classmethod
    def from_description(cls, described: list[dict[str, Any]]) -> Inputs:
        """Rebuild it from `describe`."""
        return cls(tuple(Column(**each) for each in described))


@dataclass(frozen=True)
class Target:
    """What is predicted.

    Attributes:
        column: where it stands.
        task: ``"regression"`` or ``"classification"``.
    """

    column: Column
    task: str

    @classmethod
    def look(
        cls, name: str, values: np.ndarray, task: str, decimal: str | None, notes: Notes
    ) -> Target:
        """Find out what is to be predicted.

        Raises:
            ValueError: naming the column, for dates, and for words among the numbers of a
                regression.
        """
        told: Notes = []
        column = Column.look(name, values, decimal, told)
        if column.kind == "dates":
            raise ValueError(f"the target {name!r} holds dates: give numbers, such as days")
        if task == "auto" and any("mixes" in note for note in told):
            raise ValueError(
                f"the target {name!r} mixes numbers and words: clean it, or say --task "
                "classification"
            )
        if task == "regression" and column.kind == "words":
            raise ValueError(f"the target {name!r} holds words: --task classification")
        if task == "auto":
            task = "regression" if column.kind == "numbers" else "classification"
            notes.append(f"{task}: {name!r} holds {column.kind}")
        notes.extend(told)
        return cls(column, task)

    def read(self, values: np.ndarray, notes: Notes) -> np.ndarray:
        """Return numbers, or labels as text.

        Raises:
            ValueError: for missing ones, and words among numbers.
        """
        read = self.column.read(values, notes, strict=True)
        if self.column.kind == "words":
            return read.astype(str)
        if np.isnan(read).any():
            raise ValueError(f"the target {self.column.name!r} is missing in some rows")
        if self.task == "regression":
            return read
        return np.array([str(int(v)) if v == int(v) else repr(float(v)) for v in read])

    def known(self, values: np.ndarray) -> np.ndarray:
        """Say in which rows the target is there, ``(n,)``."""
        numeric = self.column.kind == "numbers"
        return np.array(
            [
                not (missing(text) or (numeric and text.lower() in _BLANK))
                for text in values
            ],
            bool,
        )


# ---------------------------------------- numbers and dates


def _parts(text: str) -> tuple[str, str]:
    """Return a sign such as % or $, and the number without it."""
    match = _UNIT.fullmatch(text.replace("\u2212", "-"))
    if match is None:
        return "", text
    sign, before, number, after = match.groups()
    return before + after, sign + number


def _like_a_number(text: str) -> bool:
    return any(pattern.fullmatch(text) for pattern in _NUMBER.values())


def _value(text: str, decimal: str) -> float | None:
    if not _NUMBER[decimal].fullmatch(text):
        return None
    thousands = _OTHER[decimal]
    return float(re.sub(f"[{thousands}]|{_GROUP}", "", text).replace(decimal, "."))


def decimal_mark(raw: Raw) -> str | None:
    """Return the one decimal mark that the numbers of a file can only have; None if they may have
    either, or have both.
    """
    marks = set()
    for values in raw.values():
        texts = {_parts(text)[1] for text in {*values}}
        only = _only({text for text in texts if _like_a_number(text)})
        marks |= {mark for mark, found in only.items() if found}
    return marks.pop() if len(marks) == 1 else None


def _only(texts: set[str]) -> dict[str, list[str]]:
    """Return the numbers that can be read with one decimal mark only, by that mark."""
    return {
        mark: [text for text in texts if not _NUMBER[other].fullmatch(text)]
        for mark, other in _OTHER.items()
    }


def _mark(name: str, texts: set[str]) -> str | None:
    """Return the decimal mark that the numbers of a column can only have, None if they may have
    either.
    """
    only = _only(texts)
    if only["."] and only[","]:
        raise ValueError(
            f"column {name!r} mixes decimal points and commas: {min(only['.'])!r}, "
            f"{min(only[','])!r}"
        )
    return next((mark for mark, found in only.items() if found), None)


def _moment(name: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.replace(" UTC", "Z").replace(" Z", "Z"))
    except ValueError:
        raise ValueError(f"column {name!r}: there is no date {text!r}") from None
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


# ---------------------------------------- gaps


def _counts(column: Column, values: np.ndarray) -> bool:
    """Say whether numbers go up by one from row to row, in a table too long for an accident."""
    long = column.kind == "numbers" and len(values) >= _LONG
    return long and bool((np.diff(values) == 1).all())


def _filled(column: Column, values: np.ndarray, notes: Notes) -> Column | None:
    """Return a column with what fills its gaps; None if it is of no use."""
    name = column.name
    if column.kind == "words":
        different = len({*values})
        if different > _MANY and different > len(values) / 2:
            notes.append(
                f"column {name!r} has {different} different words in {len(values)} rows: left out"
            )
            return None
        gaps = int((values == "missing").sum())
        if gaps == len(values):
            notes.append(f"column {name!r} is empty: left out")
            return None
        some = ", ".join(sorted({*values})[:5]) + (", ..." if different > 5 else "")
        notes.append(f"column {name!r} holds words, {different} of them: {some}")
        if gaps:
            notes.append(f"column {name!r}: {gaps} missing, a category of their own")
        return column
    gaps = np.isnan(values)
    if gaps.all():
        notes.append(f"column {name!r} is empty: left out")
        return None
    fill = float(np.median(values[~gaps]))
    if gaps.any():
        notes.append(
            f"column {name!r}: {gaps.sum()} missing, taken for the median {fill:g} and marked by a "
            "column of their own"
        )
    return replace(column, fill=fill, indicator=bool(gaps.any()))
