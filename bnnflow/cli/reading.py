"""Tables from files: every cell as the text that stands there, and what had to be repaired, told.

Nothing is guessed in silence: what cannot be read in one way only is a ``ValueError``.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Notes", "Raw", "read"]

Raw = dict[str, np.ndarray]
"""Columns by name: ``(n,)`` object arrays of text, stripped; empty where nothing stands."""

Notes = list[str]
"""What was repaired or chosen, a line each, for the reader."""

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_BINARY = {
    b"PK": "a zip archive or a spreadsheet",
    b"\x1f\x8b": "compressed by gzip",
    b"PAR1": "a Parquet file",
    b"\xd0\xcf\x11\xe0": "a spreadsheet",
    b"%PDF": "a PDF",
}
_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_LOOKED_AT = 200  # lines by which the separator is found


def read(path: str | Path, notes: Notes, separator: str | None = None) -> Raw:
    """Read a table from a CSV or a Parquet file.

    Args:
        path: the file; ``.parquet`` and ``.pq`` are Parquet, anything else is text.
        notes: takes a line for whatever was repaired.
        separator: between the cells of a line; found by itself if None.

    Raises:
        ValueError: naming the file and, where there is one, the line.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "is not there"
        raise ValueError(f"{path} {what}")
    if path.suffix.lower() in (".parquet", ".pq"):
        raw = _parquet(path)
    else:
        text = _text(path, notes)
        try:
            raw = _table(text, separator, notes)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path.name}: {error}") from None
    if not len(next(iter(raw.values()), ())):
        raise ValueError(f"{path.name} has no rows below its header")
    return raw


# ---------------------------------------- bytes and text


def _text(path: Path, notes: Notes) -> str:
    content = path.read_bytes()
    for head, what in _BINARY.items():
        if content.startswith(head):
            raise ValueError(
                f"{path.name} is {what}, not text: save it as CSV (or .parquet)"
            )
    encoding = _encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        if encoding != "utf-8":
            raise ValueError(
                f"{path.name} is not the {encoding} that it begins as"
            ) from None
        text = _western(content)
        notes.append(f"{path.name} is not UTF-8: read as Windows-1252 (Western European)")
    visible = re.sub("[\ufeff\u200b]", "", text)
    if len(visible) < len(text):
        notes.append("invisible marks (byte order, zero width) are left out")
        text = visible
    if not text.strip():
        raise ValueError(f"{path.name} is empty")
    if "\x00" in text:
        raise ValueError(f"{path.name} holds zero bytes: it is not text, or damaged")
    return text


def _encoding(content: bytes) -> str:
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            return encoding
    head = content[:1000]
    if len(head) > 3 and head[1::2].count(0) > 0.4 * len(head) > 4 * head[::2].count(0):
        return "utf-16-le"
    if len(head) > 3 and head[::2].count(0) > 0.4 * len(head) > 4 * head[1::2].count(0):
        return "utf-16-be"
    return "utf-8"


def _western(content: bytes) -> str:
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:  # five bytes mean nothing there
        return content.decode("latin-1")


# ---------------------------------------- lines and cells


def _table(text: str, separator: str | None, notes: Notes) -> Raw:
    told = re.match(r'"?sep=(.)"?\r?\n', text)  # Excel's way to say it
    if told:
        text = text[told.end() :]
        separator = separator or told[1]
    separator = separator or _separator(text)
    if separator != ",":
        notes.append(
            f"cells are separated by {_SEPARATORS.get(separator, repr(separator))}"
        )
    header, *rows = _cells(text, separator, notes)
    names = _names(header, notes)
    columns = np.array(rows, object).reshape(len(rows), len(names)).T
    raw = dict(zip(names, columns, strict=True))
    return _without_row_numbers(raw, header, notes)


def _separator(text: str) -> str:
    """Return what separates the cells: the one by which all lines have equally many."""
    fits = []
    for separator in _SEPARATORS:
        lines = csv.reader(
            io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True
        )
        try:
            counts = [
                len(row) for row, _ in zip(_full(lines), range(_LOOKED_AT), strict=False)
            ]
        except csv.Error:
            continue
        if counts and counts[0] > 1:
            fits.append((Counter(counts)[counts[0]] / len(counts), separator))
    if not fits:
        return ","
    best = max(share for share, _ in fits)
    found = [separator for share, separator in fits if share == best]
    if len(found) > 1:
        which = " or ".join(_SEPARATORS[each] for each in found)
        raise ValueError(f"its cells may be separated by {which}: say which by --separator")
    return found[0]


def _full(lines: Any) -> Any:
    """Leave blank lines out."""
    return (row for row in lines if not _blank(row))


def _blank(row: list[str]) -> bool:
    return len(row) < 2 and not "".join(row).strip()


def _cells(text: str, separator: str, notes: Notes) -> list[list[str]]:
    """Return the cells of the lines, stripped, as many in each.

    Raises:
        ValueError: for a line that has more or fewer than the header.
    """
    lines = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        skipinitialspace=True,
        strict=True,
    )
    rows, broken, blank, skipped = [], 0, 0, 0
    try:
        for row in lines:
            if _blank(row):
                blank += bool(rows)
                continue
            skipped = blank  # those at the end do no harm
            broken += any("\n" in cell or "\r" in cell for cell in row)
            rows.append([cell.strip() for cell in row])
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"line {lines.line_num} has {len(row)} cells, the header {len(rows[0])}"
                )
    except csv.Error as error:
        raise ValueError(
            f"line {lines.line_num}: {error} (is a quote left open?)"
        ) from None
    if not rows:
        raise ValueError("there is nothing in it")
    if skipped:
        notes.append(f"{skipped} blank lines are skipped")
    if broken:
        notes.append(f"{broken} rows have line breaks inside quotes")
    return rows


def _names(header: list[str], notes: Notes) -> list[str]:
    """Return names of columns, of which none is empty or stands twice."""
    if all(re.fullmatch(r"[+-]?[\d.,]+", name) for name in header):
        notes.append(
            "the first line holds numbers only and is taken for the names of the columns: "
            "if it is a row, put a header above it"
        )
    names: dict[str, None] = {}
    taken = {*header}
    for number, name in enumerate(header, 1):
        given = name or f"column_{number}"
        unique, copy = given, 1
        while unique in names or (unique != name and unique in taken):
            copy += 1
            unique = f"{given}_{copy}"
        names[unique] = None
        if not name:
            notes.append(f"column {number} has no name: called {unique!r}")
        elif unique != name:
            notes.append(f"a further column {name!r}: called {unique!r}")
    return list(names)


def _without_row_numbers(raw: Raw, header: list[str], notes: Notes) -> Raw:
    """Leave out a first column without a name that only numbers the rows."""
    first = next(iter(raw))
    numbers = raw[first].tolist()
    counted = [[str(i + start) for i in range(len(numbers))] for start in (0, 1)]
    if header[0] or len(numbers) < 2 or numbers not in counted:
        return raw
    notes[:] = [note for note in notes if not note.startswith("column 1 has no name")]
    notes.append("the first column has no name and numbers the rows: left out")
    return {name: column for name, column in raw.items() if name != first}


# ---------------------------------------- Parquet


def _parquet(path: Path) -> Raw:
    try:
        import polars
    except ImportError:
        raise ValueError("Parquet files are read by polars: pip install polars") from None
    try:
        frame = polars.read_parquet(path)
    except (polars.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path.name}: {str(error).splitlines()[0]}") from None
    nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
    if nested:
        raise ValueError(f"{path.name}: columns that hold lists or records: {nested[:5]}")
    return {
        name: np.array([_written(value) for value in frame[name].to_list()] or [], object)
        for name in frame.columns
    }


def _written(value: Any) -> str:
    """Return a value as it would stand in a CSV file."""
    if value is None or value != value:
        return ""
    return repr(value) if isinstance(value, float) else str(value)
