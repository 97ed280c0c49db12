"""A C++ source made into a shared library for this machine, and kept in a cache that only its owner
can have written.

Loading a library runs it, so one is loaded only from a folder and a file that belong to the user
(or to root) and that nobody else may write, and only if its name holds the checksum of what is in
it: half a library, or a damaged one, is made again. A compiler that fails or hangs is remembered
for an hour, so that not every process waits for it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["CompilationError", "say_once", "shared_library"]

_ROOM = 2**22  # bytes that a library and what it is made of take at most
PATIENCE = 60.0  # seconds for the compiler; it takes four of a CPU's
REMEMBERED = 3600.0  # seconds for which a failure is not tried again

# Of a new library in a process of its own, which it may end: half a file, or instructions that are
# not known here.
_TRIAL = (
    "import ctypes, sys; "
    "ctypes.CDLL(sys.argv[1]).bnnflow_normals(1, 64, ctypes.create_string_buffer(512))"
)

_log = logging.getLogger(__name__)


class CompilationError(OSError):
    """There is no compiler here, or it does not make a library of the source."""


@functools.cache
def say_once(message: str) -> None:
    """Log a warning, the first time that this process has it to say."""
    _log.warning(message)


def shared_library(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Return the library of a source, compiled unless a cache holds it.

    The cache is ``$BNNFLOW_CACHE``, else ``bnnflow`` in the user's cache folder; where that cannot
    be used, which is said once, a private folder beside the temporary files.

    Args:
        source: the C++ file.
        flags: for the compiler.

    Raises:
        CompilationError: if there is no compiler, it fails, or what it makes cannot be loaded.
        OSError: if no folder can be written.
    """
    compiler = _compiler()
    command = [compiler, *flags]
    known = Path(compiler).stat()
    key = [
        source.read_bytes(),
        repr((known.st_size, known.st_mtime_ns)),
        *command,
        *_processor(),
    ]
    digest = hashlib.sha256(
        b"\0".join(each if isinstance(each, bytes) else each.encode() for each in key)
    )
    name = f"fused-{digest.hexdigest()[:16]}"
    for folder in _folders():
        try:
            _make_private(folder)
            return _loaded(folder, name, [*command, str(source)])
        except CompilationError:
            raise
        except OSError as error:
            say_once(f"compiled code is not kept in {folder}: {error}")
    raise OSError("no folder can hold compiled code")


def _compiler() -> str:
    candidates = [os.environ.get("CXX") or "c++", "c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        raise CompilationError("no C++ compiler found")
    return os.path.abspath(found)


def _loaded(folder: Path, name: str, command: list[str]) -> ctypes.CDLL:
    """Return the library of this name in a private folder, made if there is none that is whole."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        if _is_whole(path):
            return ctypes.CDLL(str(path))
        say_once(f"{path} is damaged, and made again")
        path.unlink(missing_ok=True)
    failure = folder / f"{name}.failed"
    if _is_recent(failure):
        reason = failure.read_text(errors="replace")
        raise CompilationError(
            f"{reason} (tried within the last hour; delete {failure} to try again now)"
        )
    try:
        return ctypes.CDLL(str(_made(folder, name, command)))
    except CompilationError as error:
        with contextlib.suppress(OSError):
            failure.write_text(str(error))
        raise


def _made(folder: Path, name: str, command: list[str]) -> Path:
    """Compile, and return the library's path.

    Renamed when it is complete, so that nobody sees half of it.

    Raises:
        CompilationError: if the compiler or the library is at fault.
        OSError: if the folder is, as one that is full.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="making-") as scratch:
        room = Path(scratch) / "room"
        room.write_bytes(bytes(_ROOM))
        room.unlink()
        fresh = Path(scratch) / "library.so"
        _run([*command, "-o", str(fresh)], Path(scratch) / "messages")
        if not fresh.is_file():
            raise CompilationError(f"{command[0]} made no library")
        fresh.chmod(0o700)
        _run([sys.executable, "-I", "-c", _TRIAL, str(fresh)], Path(scratch) / "trial")
        return fresh.replace(folder / f"{name}-{_checksum(fresh)}.so")


def _run(command: list[str], messages: Path) -> None:
    """Run a command, and end it with all that it started if it takes too long."""
    with messages.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"TMPDIR": str(messages.parent)},  # which has room
            )
        except OSError as error:
            raise CompilationError(f"{command[0]} cannot be run: {error}") from error
    try:
        status = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise CompilationError(
            f"{command[0]} did not end within {PATIENCE:g} seconds"
        ) from None
    finally:
        _end(process)
    if status:
        said = messages.read_text(errors="replace").strip().splitlines()
        raise CompilationError(
            f"{command[0]} failed with status {status}: {said[-1][:200] if said else ''}"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # what a compiler calls outlives it
        else:
            process.kill()
        process.wait()


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _is_whole(path: Path) -> bool:
    """Say whether a library is what its name says, and was written by nobody else."""
    try:
        status = path.lstat()
        ours = stat.S_ISREG(status.st_mode) and _owned(status)
        return ours and path.stem.rpartition("-")[2] == _checksum(path)
    except OSError:
        return False


def _is_recent(path: Path) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    return 0 <= age < REMEMBERED


# ---------------------------------------- folders


def _folders() -> Iterator[Path]:
    """Yield where the library may be kept, the best place first."""
    if folder := os.environ.get("BNNFLOW_CACHE"):
        yield Path(folder).absolute()
    else:
        root = os.environ.get("XDG_CACHE_HOME") or (
            "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
        )
        root = os.path.expanduser(root)
        if os.path.isabs(root):
            yield Path(root) / "bnnflow"
    yield (
        Path(tempfile.gettempdir())
        / f"bnnflow-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    )
    own = tempfile.mkdtemp(prefix="bnnflow-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    yield Path(own)


def _make_private(folder: Path) -> None:
    """Make a folder; raise ``PermissionError`` if others may write or replace it, or libraries
    cannot be loaded.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()
    if not _owned(folder.stat()):
        raise PermissionError(f"others may write {folder}, or it is another user's")
    for parent in folder.parents:
        status = parent.stat()
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise PermissionError(f"others may write {parent}")
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise PermissionError("nothing there may be executed")


def _owned(status: os.stat_result) -> bool:
    """Say whether a file is this user's or root's, and nobody else may write it."""
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (
        stat.S_IWGRP | stat.S_IWOTH
    )


def _processor() -> Sequence[str]:
    """Return what tells processors apart: a library made for one may not run on another that shares
    the cache.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next(
        (line for line in lines if line.lower().startswith(("flags", "features"))), ""
    )
    model = next((line for line in lines if line.startswith("model name")), "")
    return sys.platform, platform.machine(), platform.processor(), model, flags
