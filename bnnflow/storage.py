"""One file format for everything that is saved: an ``.npz`` of arrays with a JSON header, and no pickle."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read", "write"]

FORMAT = "bnnflow"


def write(path: str | Path, kind: str, version: int, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    """Write arrays and a JSON header to ``path``, whole or not at all.

    Args:
        path: the file; ``.npz`` is appended if it has no suffix.
        kind: what the file holds, such as ``"draws"``.
        version: version of that kind's layout.
        header: plain values.
        arrays: named arrays.
    """
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "kind": kind, "version": version} | header)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, header=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def read(path: str | Path, kinds: dict[str, int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the header and the arrays of a file.

    Args:
        path: the file.
        kinds: the kinds that the caller understands, with the newest version of each.

    Raises:
        ValueError: if the file is not ours, is of another kind, or is newer than this version of bnnflow.
    """
    if not zipfile.is_zipfile(path):
        Path(path).stat()  # a missing file is another matter
        raise ValueError(f"{path} was not written by bnnflow")
    with np.load(path, allow_pickle=False) as file:
        try:
            header = json.loads(file["header"].tobytes().decode())
            ours = header["format"] == FORMAT
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} was not written by bnnflow") from error
        if not ours:
            raise ValueError(f"{path} was not written by bnnflow")
        arrays = {name: file[name] for name in file.files if name != "header"}
    kind, version = header["kind"], header["version"]
    if kind not in kinds:
        raise ValueError(f"{path} holds {kind!r}, expected one of {sorted(kinds)}")
    if version > kinds[kind]:
        raise ValueError(f"{path} has format version {version} of {kind!r}; this bnnflow reads up to {kinds[kind]}")
    return header, arrays
