"""Runs that outlive their process: states that come back bit for bit, draws that stream to disk.

A run's folder holds one folder for each process, which one run at a time has to itself. In it,
``state-0.npz`` and ``state-1.npz`` are the last two states, each written whole or not at all; the
other files are draws, appended in the order (draw, chain, ...) as plain numbers. A state says how
many draws were on disk when it was written, and their checksum: whatever a killed process appended
after it is written anew, and whatever was damaged is noticed. If the newer state is damaged, or
draws that only it vouches for, the older one takes its place.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow import storage
from bnnflow.draws import Draws
from bnnflow.options import Checkpoint
from bnnflow.ranks import ALONE, Ranks
from bnnflow.warn import warn

__all__ = ["RunFolder", "Saved"]

SECONDS = 15.0
"""Time between two states on disk."""

_VERSION = 2  # 1 had no checksums, and the layout of the draws in a file of its own
_BLOCK = 2**22  # bytes of a file that are looked at together
_UNFINISHED = re.compile(r"state-[01]\.npz\..+\.tmp")


class Saved(NamedTuple):
    """A state as it was written, to the file ``path`` of number ``slot``."""

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]
    slot: int
    path: Path

    def state(self, name: str, template: Any) -> Any:
        """Return the state ``name``, with the structure, the dtypes and the device of
        ``template``.
        """
        with storage.described(self.path):
            return _rebuild(template, self._values(name))

    def restore(self, generator: torch.Generator) -> None:
        """Put a generator where it was."""
        with storage.described(self.path):
            generator.set_state(torch.from_numpy(self.arrays["generator/0"]))

    def has(self, name: str) -> bool:
        """Say whether a state of this name was saved."""
        return f"{name}/0" in self.arrays

    def _values(self, name: str) -> Iterator[np.ndarray]:
        i = 0
        while (key := f"{name}/{i}") in self.arrays:
            yield self.arrays[key]
            i += 1


class RunFolder:
    """A folder that one run is kept in, and works on alone until `release`.

    Args:
        checkpoint: where, a folder that is made if missing, and whether to go on with the run that
            is there.
        identity: what a run must agree on to be the same run; plain values by name.
        ranks: the processes that share it.
        device: by which they exchange messages.

    Raises:
        ValueError: if another run works on the folder; if it holds a run that is not to be resumed,
            or holds another run, one of an earlier version, one that is damaged beyond its last two
            states, or something else.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        identity: dict[str, Any],
        ranks: Ranks = ALONE,
        device: torch.device | str = "cpu",
    ) -> None:
        folder = Path(checkpoint.path)
        if folder.is_file():
            raise ValueError(f"checkpoint must be a folder, {folder} is a file")
        self.folder = folder / f"rank-{ranks.rank}"
        self._identity, self._ranks, self._device = (
            json.loads(json.dumps(identity)),
            ranks,
            torch.device(device),
        )
        self._started = self._last = time.monotonic()
        self._seconds, self._slot = 0.0, 0
        self._lock = self._locked()
        try:
            self.saved = self._open(folder, checkpoint.resume)
        except BaseException:
            self.release()
            raise

    def _locked(self) -> storage.Lock:
        """Take the folder; the first process does before the others, so that of two runs one gets
        all of them.
        """
        first = storage.Lock(self.folder, folder=True) if self._ranks.rank == 0 else None
        self._ranks.agree(0, self._device)
        return first or storage.Lock(self.folder, folder=True)

    def _open(self, folder: Path, resume: bool) -> Saved | None:
        """Return the state to go on from, and see that the folder holds this run or none."""
        for each in self.folder.iterdir():
            # of a process that was killed: nobody else works here
            if _UNFINISHED.fullmatch(each.name):
                each.unlink()
        states = _states(self.folder)
        saved = self._common(states)
        others = [each.name for each in self.folder.iterdir() if each.name != ".lock"]
        if not states and others:
            raise ValueError(
                f"{self.folder} is not empty, and what it holds is no run: "
                f"{', '.join(sorted(others)[:5])}"
            )
        if states and not resume:
            raise ValueError(
                f"{folder} already holds a run: go on with it by Checkpoint({str(folder)!r}, "
                "resume=True), "
                "or take another folder"
            )
        if states and states[-1].header["version"] < _VERSION:
            raise ValueError(
                f"{folder} holds a run of an earlier bnnflow, which kept no checksums: bf.load "
                "reads its draws, but a "
                "run must begin in another folder"
            )
        if saved is None:
            return None
        with storage.described(self.folder):
            theirs = saved.header["identity"]
            self._seconds = float(saved.header["seconds"])
            self._slot = 1 - saved.slot
        for name, value in self._identity.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"{folder} holds another run: its {name} is {theirs.get(name)}, not {value}"
                )
        return saved

    def release(self) -> None:
        """Let other runs work on the folder."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _common(self, states: list[Saved]) -> Saved | None:
        """Choose the newest state from which all processes can go on together.

        Once all of them draw, each goes on from its own newest. Before, they exchange messages, and
        must be at the same step; as they write at the same steps, one of the last two is common.
        """
        if self._ranks.size == 1:
            return states[-1] if states else None
        newest = [_progress(s) for s in states[-2:]]
        newest = [(-1, -1)] * (2 - len(newest)) + newest
        mine = torch.tensor(newest, device=self._device).unsqueeze(0)
        everyone = self._ranks.gather(mine).tolist()  # [[[stage, step], ...], ...]
        if all(theirs[-1][0] == 1 for theirs in everyone):
            return states[-1]
        steps = set.intersection(*({tuple(step) for step in theirs} for theirs in everyone))
        best = max(steps, default=(-1, -1))
        return next((s for s in states if _progress(s) == best), None)

    def due(self, together: bool, device: torch.device) -> bool:
        """Say whether it is time to write.

        The first process decides where all must write ``together``.
        """
        mine = time.monotonic() - self._last > SECONDS
        return bool(self._ranks.agree(int(mine), device)) if together else mine

    def save(
        self, header: dict[str, Any], generator: torch.Generator, **states: Any
    ) -> None:
        """Write states made of tensors, numbers and named tuples, and the generator's."""
        arrays = {f"generator/{0}": generator.get_state().numpy()}
        for name, state in states.items():
            arrays |= {f"{name}/{i}": _array(leaf) for i, leaf in enumerate(_leaves(state))}
        seconds = self._seconds + time.monotonic() - self._started
        header = {"identity": self._identity, "seconds": seconds} | header
        storage.write(
            self.folder / f"state-{self._slot}.npz", "checkpoint", _VERSION, header, arrays
        )
        self._slot = 1 - self._slot
        self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of all processes that worked on the run, one after another."""
        return self._seconds + time.monotonic() - self._started


class Stream:
    """Draws on their way to disk; memory holds one chunk at most.

    Args:
        folder: where the files are.
        saved: the state that vouches for the draws that are there already and stay; None if there
            are none.
        chunk: number of draws that are written together.
    """

    def __init__(self, folder: Path, saved: Saved | None, chunk: int) -> None:
        self._folder, self._chunk = folder, chunk
        self._pending: dict[str, list[Tensor]] = {}
        self._columns = {} if saved is None else _columns(saved.header)
        self.done = _draws(saved.header) if saved is not None else 0

    def append(self, values: dict[str, Tensor]) -> None:
        """Take one draw of every chain, ``(chain, ...)`` each.

        What goes to disk before it are draws that have been counted: `cut` takes none of them back.
        """
        if self._pending and len(self._pending["theta"]) >= self._chunk:
            self.flush()
        for name, value in values.items():
            self._pending.setdefault(name, []).append(value)

    def cut(self, draws: int) -> None:
        """Forget what was taken beyond so many draws, none of which is on disk."""
        left = draws - self.done
        self._pending = {n: values[:left] for n, values in self._pending.items() if left}

    def flush(self) -> None:
        """Write what is pending and wait until it is on disk."""
        if not self._pending:
            return
        count, columns = len(self._pending["theta"]), {}
        for name, values in self._pending.items():
            block = np.ascontiguousarray(torch.stack(values).cpu().numpy())
            column = self._columns.get(name) or _Column(block.shape[1:], block.dtype.str, 0)
            # In place of what a killed process appended: a file that others have mapped must not
            # become shorter.
            with (self._folder / _file(name)).open("r+b" if self.done else "wb") as file:
                file.seek(self.done * column.bytes)
                file.write(block.data)
                file.flush()
                os.fsync(file.fileno())
            columns[name] = column._replace(
                checksum=zlib.crc32(block.data, column.checksum)
            )
        self._columns, self.done, self._pending = columns, self.done + count, {}

    def describe(self) -> dict[str, Any]:
        """Return what a state must say of the draws that are on disk."""
        return {"columns": {name: list(column) for name, column in self._columns.items()}}

    def read(self) -> dict[str, Tensor]:
        """Return everything on disk as tensors ``(chain, draw, ...)`` that are read only when
        looked at.
        """
        return _read(self._folder, self._columns, self.done)


class _Column(NamedTuple):
    """What is on disk of one quantity: the shape of one draw ``(chain, ...)``, its type, and the
    CRC of all draws.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: int

    @property
    def bytes(self) -> int:
        """Length of one draw."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def load(folder: str | Path) -> Draws:
    """Return the draws that a run has left in its folder, finished or not, without its model.

    Raises:
        ValueError: if there is no run, it has no draws yet, or none of its states is intact.
    """
    parts, header = [], {}
    for place in sorted(Path(folder).glob("rank-*"), key=lambda p: (len(p.name), p.name)):
        states = _states(place)
        if states:
            with storage.described(place):
                header = states[-1].header
                done = _draws(header)
                parts.append(_read(place, _columns(header, place), done) if done else {})
    if not parts or not all(parts):
        raise ValueError(
            f"{folder} holds no draws yet" if parts else f"{folder} holds no run of bnnflow"
        )
    with storage.described(folder):
        shortest = min(part["theta"].shape[1] for part in parts)
        joined = {
            name: parts[0][name][:, :shortest]
            if len(parts) == 1
            else torch.cat([part[name][:, :shortest] for part in parts])
            for name in parts[0]
        }
        info = header["identity"] | header["info"]
        return Draws(joined.pop("theta"), joined.pop("log_joint"), joined, info=info)


# ---------------------------------------- files


def _file(name: str) -> str:
    return f"{name.replace('/', '-')}.bin"


def _read(folder: Path, columns: dict[str, _Column], done: int) -> dict[str, Tensor]:
    def tensor(name: str, column: _Column) -> Tensor:
        # Copy on write: the tensor may be changed, the file is not.
        mapped = np.memmap(
            folder / _file(name), dtype=column.dtype, mode="c", shape=(done, *column.shape)
        )
        return torch.from_numpy(mapped).transpose(0, 1)

    return {name: tensor(name, column) for name, column in columns.items()}


def _draws(header: dict[str, Any]) -> int:
    """Return how many draws were on disk when a state was written."""
    return header["step"] if header["stage"] == "sampling" else 0


def _columns(header: dict[str, Any], folder: Path | None = None) -> dict[str, _Column]:
    """Return what was on disk when a state was written.

    Version 1 kept it in the folder, without checksums.
    """
    if header["version"] < _VERSION and folder is not None:
        layout = storage.read(folder / "layout.npz", {"stream": 1})[0]["layout"]
        return {
            name: _Column(tuple(shape), dtype, -1)
            for name, (shape, dtype) in layout.items()
        }
    return {
        name: _Column(tuple(shape), dtype, crc)
        for name, (shape, dtype, crc) in header.get("columns", {}).items()
    }


def _states(folder: Path) -> list[Saved]:
    """Return the states of a folder, older first.

    The last one is intact, with all draws that it vouches for.

    Raises:
        ValueError: if there are states, but none is intact.
    """
    found, damaged = [], []
    for slot in (0, 1):
        path = folder / f"state-{slot}.npz"
        try:
            state = Saved(*storage.read(path, {"checkpoint": _VERSION}), slot, path)
            with storage.described(path):
                _progress(state)
            found.append(state)
        except FileNotFoundError:
            continue
        except ValueError as error:
            damaged.append(str(error))
    found.sort(key=_progress)
    while found and (harm := _harm(folder, found[-1].header)):
        damaged.append(harm)
        found.pop()
    if damaged and not found:
        raise ValueError(
            f"{folder} holds a run that is damaged: {'; '.join(damaged)}. Begin again "
            "in another folder"
        )
    if damaged:
        kept = found[-1].header
        warn(
            f"damaged: {'; '.join(damaged)}. The state before it is used, {kept['stage']} at step "
            f"{kept['step']}"
        )
    return found


def _harm(folder: Path, header: dict[str, Any]) -> str:
    """Say what is wrong with the draws that a state vouches for; nothing if they are intact."""
    try:
        with storage.described(folder):
            done = _draws(header)
            columns = _columns(header, folder) if done else {}
            if done and not {"theta", "log_joint"} <= columns.keys():
                raise ValueError("a state has no weights")
            for name, column in columns.items():
                path = folder / _file(name)
                there, due = path.stat().st_size, done * column.bytes
                if there < due:
                    raise ValueError(f"{path} has {there} bytes of {due}")
                if column.checksum >= 0 and _checksum(path, due) != column.checksum:
                    raise ValueError(
                        f"{path} is not what was written: its checksum differs"
                    )
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def _checksum(path: Path, length: int) -> int:
    """Return the CRC of the first bytes of a file."""
    value = 0
    with path.open("rb") as file:
        while length > 0 and (block := file.read(min(length, _BLOCK))):
            value = zlib.crc32(block, value)
            length -= len(block)
    return value


def _progress(saved: Saved) -> tuple[int, int]:
    step = saved.header["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"the step is {step!r}")
    if not 0 <= saved.header.get("gradients", 0.0) < math.inf:
        raise ValueError("the number of gradients is none")
    return int(saved.header["stage"] == "sampling"), step


# ---------------------------------------- states


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, tuple):
        for part in state:
            yield from _leaves(part)
    elif state is not None:
        yield state


def _array(leaf: Tensor | float | int | bool) -> np.ndarray:
    return leaf.detach().cpu().numpy() if isinstance(leaf, Tensor) else np.asarray(leaf)


def _rebuild(template: Any, values: Iterator[np.ndarray]) -> Any:
    if isinstance(template, tuple):
        parts = [_rebuild(part, values) for part in template]
        return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)
    if template is None:
        return None
    value = next(values)
    if isinstance(template, Tensor):
        return torch.from_numpy(value.copy()).to(template.device, template.dtype)
    return type(template)(value.item())
