"""One file format for everything that is saved: an ``.npz`` of arrays with a JSON header, and no
pickle.

What is written is written whole or not at all, and is on disk when the call returns. What is read
is checked before it is believed: every array has the size that it declares and the checksum that it
was written with, the list of arrays has a checksum of its own, and nothing takes more memory than
the file is long.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import threading
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # no POSIX: `Lock` says that there is none
    fcntl = None

from bnnflow.warn import warn

__all__ = ["Lock", "described", "file_path", "found", "leftovers", "read", "whole", "write"]

FORMAT = "bnnflow"
_FIELDS = 64  # bytes that the further fields of a member's head do not reach


def file_path(path: str | Path) -> Path:
    """Return the file that a path means, to those who write it and to those who read it: ``.npz``
    without a suffix.
    """
    path = Path(path)
    return path if path.suffix else path.with_suffix(".npz")


def found(path: str | Path) -> Path:
    """Return the file to read: the one of this very name, or else what `file_path` says."""
    return Path(path) if Path(path).exists() else file_path(path)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Lend a file to write to, which then takes the place of ``path``.

    After an exception nothing has changed.

    Folders are made as needed. At the end the file is on disk under its name, so that a power cut
    leaves the old one or the new one. What a killed process has left of the same file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in leftovers(path):
        old.unlink(missing_ok=True)
    unfinished = path.with_name(
        f"{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.tmp"
    )
    try:
        yield unfinished
        _sync(unfinished)
        unfinished.replace(path)
        _sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def leftovers(path: Path) -> list[Path]:
    """Return the unfinished files that processes of this machine, killed since, have left beside
    ``path``.
    """
    name = re.compile(re.escape(f"{path.name}.{socket.gethostname()}-") + r"(\d+)-\d+\.tmp")
    found = [
        (name.fullmatch(each.name), each)
        for each in path.parent.glob(f"{_literal(path.name)}.*.tmp")
    ]
    return [each for match, each in found if match and not _alive(int(match[1]))]


def write(
    path: str | Path,
    kind: str,
    version: int,
    header: dict[str, Any],
    arrays: dict[str, np.ndarray],
) -> Path:
    """Write arrays and a JSON header to ``path``, whole or not at all.

    Args:
        path: the file; ``.npz`` is appended if it has no suffix.
        kind: what the file holds, such as ``"draws"``.
        version: version of that kind's layout.
        header: plain values.
        arrays: named arrays.
    """
    path = file_path(path)
    text = json.dumps({"format": FORMAT, "kind": kind, "version": version} | header)
    with whole(path) as unfinished:
        with unfinished.open("wb") as file:
            np.savez(file, header=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
        with zipfile.ZipFile(unfinished, "a") as archive:
            archive.comment = _checksum(archive)
    return path


def read(
    path: str | Path, kinds: dict[str, int]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the header and the arrays of a file.

    Args:
        path: the file, as it was given to `write`.
        kinds: the kinds that the caller understands, with the newest version of each.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: naming the file, if it is not ours, is damaged, is of another kind, or is newer
            than this version of bnnflow.
    """
    path = found(path)
    if not path.is_file():
        path.stat()  # a missing file is another matter
        raise ValueError(f"{path} is no file")
    with described(path, f"{path} was not written by bnnflow, or is damaged"):
        arrays = _members(path)
        header = json.loads(arrays.pop("header").tobytes().decode())
        if header["format"] != FORMAT:
            raise ValueError("another format")
        kind, version = str(header["kind"]), header["version"]
        if type(version) is not int:
            raise ValueError(f"the version is {version!r}")
    if kind not in kinds:
        raise ValueError(f"{path} holds {kind!r}, expected one of {sorted(kinds)}")
    if version > kinds[kind]:
        raise ValueError(
            f"{path} has format version {version} of {kind!r}; this bnnflow reads up "
            f"to {kinds[kind]}"
        )
    return header, arrays


@contextmanager
def described(path: str | Path, what: str | None = None) -> Iterator[None]:
    """Turn whatever goes wrong with the contents of a file into a ``ValueError`` that names it.

    A file may hold anything, so anything may go wrong: a missing entry, a number for a name, a
    nesting without end.

    Args:
        path: the file.
        what: the message; the path alone if None. What went wrong follows it.
    """
    try:
        yield
    except Exception as error:
        # it is not there, or not ours to read
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = (
            str(error)
            if isinstance(error, ValueError)
            else f"{type(error).__name__} {error}"
        )
        raise ValueError(f"{what or path}: {reason}") from error


def _members(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an archive; ``np.load`` believes what their heads say of their sizes."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # Ours are never compressed, so that together they are no longer than the file.
        if any(each.compress_type != zipfile.ZIP_STORED for each in members):
            raise ValueError("its arrays are compressed")
        ends = [*(each.header_offset for each in members[1:]), archive.start_dir]
        if not all(
            0 <= _gap(each, end) < _FIELDS for each, end in zip(members, ends, strict=True)
        ):
            # one is missing from the list, or longer than the file
            raise ValueError("its arrays do not fill it")
        # files of earlier versions have no comment
        if archive.comment not in (b"", _checksum(archive)):
            raise ValueError(
                "the list of its arrays does not have the checksum that was written"
            )
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"it has two arrays {name!r}")
            arrays[name] = _array(name, archive.read(member))
    return arrays


def _gap(member: zipfile.ZipInfo, end: int) -> int:
    """Return the bytes before ``end`` that are not a member's.

    It has a head of 30, its name, and further fields.
    """
    return (
        end - member.header_offset - 30 - len(member.filename.encode()) - member.file_size
    )


def _array(name: str, content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    heads = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in heads:
        raise ValueError(f"array {name!r} has version {version}")
    shape, fortran, dtype = heads[version](file)
    if dtype.hasobject:
        raise ValueError(
            f"array {name!r} holds Python objects, which are not read (allow_pickle=False)"
        )
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"array {name!r} is not as long as its shape {shape} says")
    values = np.frombuffer(content, dtype, offset=file.tell())
    # of its own, to be written to
    return values.reshape(shape, order="F" if fortran else "C").copy()


def _checksum(archive: zipfile.ZipFile) -> bytes:
    """Return what vouches for all members: each has the CRC of its content, and the reading
    compares it.
    """
    members = [(each.filename, each.file_size, each.CRC) for each in archive.infolist()]
    return f"bnnflow {zlib.crc32(repr(members).encode()):08x}".encode()


# ---------------------------------------- locks


class Lock:
    """A folder or a file that one run works on, and no other, until `release` or the end of the
    process.

    The lock belongs to the open file ``.lock`` (in the folder, or beside the file), and to nobody
    once the process is dead, however it died. It also keeps a second run of the same process out.

    Args:
        path: the folder, made if missing, or the file.
        folder: which of both it is.

    Raises:
        ValueError: if another run works on it.
    """

    def __init__(self, path: Path, *, folder: bool) -> None:
        place = path if folder else path.parent
        self._made = [each for each in (place, *place.parents) if not each.exists()]
        place.mkdir(parents=True, exist_ok=True)
        self._path = path / ".lock" if folder else path.with_name(f".{path.name}.lock")
        self._file = None
        while self._file is None:
            self._file = self._opened(path)
        _HELD.add(self)

    def _opened(self, path: Path) -> io.TextIOWrapper | None:
        """Return the locked file; None if it was removed by the run that held it before."""
        file = self._path.open("a+")
        try:
            if fcntl is None:
                raise OSError("there is no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200) or "another process"
            file.close()
            raise ValueError(
                f"another run ({holder}) is working on {path}: wait for its end"
            ) from None
        except OSError as error:
            warn(
                f"the file system of {path} has no locks ({error}): make sure that no other run "
                "works on it"
            )
            return file
        try:
            same = os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            same = False
        if not same:
            file.close()
            return None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        return file

    def release(self) -> None:
        """Let others in; folders that were made for nothing are removed."""
        if self._file is None:
            return
        self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None
        _HELD.discard(self)
        with suppress(OSError):  # unless something is in them
            for place in self._made:
                place.rmdir()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _forget(self) -> None:
        """Close the file in a forked process, which else would hold the lock when its parent is
        dead.
        """
        if self._file is not None:
            self._file.close()
            self._file = None


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in list(_HELD):
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


# ---------------------------------------- disk


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _literal(name: str) -> str:
    """Return a pattern for ``glob`` that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
