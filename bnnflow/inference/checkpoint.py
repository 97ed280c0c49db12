"""Runs that outlive their process: states that come back bit for bit, draws that stream to disk.

A run's folder holds one folder for each process. In it, ``state-0.npz`` and ``state-1.npz`` are the last two states,
each written whole or not at all; the other files are draws, appended in the order (draw, chain, ...) as plain numbers.
A state says how many draws were on disk when it was written: whatever a killed process appended after it is cut off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow import storage
from bnnflow.draws import Draws
from bnnflow.ranks import ALONE, Ranks

__all__ = ["Checkpoint", "Saved"]

SECONDS = 15.0
"""Time between two states on disk."""


class Saved(NamedTuple):
    """A state as it was written."""

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def state(self, name: str, template: Any) -> Any:
        """Return the state ``name``, with the structure, the dtypes and the device of ``template``."""
        return _rebuild(template, self._values(name))

    def has(self, name: str) -> bool:
        """Say whether a state of this name was saved."""
        return f"{name}/0" in self.arrays

    def _values(self, name: str) -> Iterator[np.ndarray]:
        i = 0
        while (key := f"{name}/{i}") in self.arrays:
            yield self.arrays[key]
            i += 1


class Checkpoint:
    """A folder that one run is kept in.

    Args:
        folder: where; made if missing.
        resume: go on with the run that is there, if there is one.
        identity: what a run must agree on to be the same run.
        ranks: the processes that share it.

    Raises:
        ValueError: if the folder holds a run and ``resume`` is not set, or holds another run.
    """

    def __init__(self, folder: str | Path, resume: bool, identity: dict[str, Any], ranks: Ranks = ALONE) -> None:
        self.folder = Path(folder) / f"rank-{ranks.rank}"
        self._identity, self._ranks = identity, ranks
        self._started = self._last = time.monotonic()
        self._seconds, self._slot = 0.0, 0
        self.saved = self._common(_states(self.folder))
        if self.saved is not None:
            if not resume:
                raise ValueError(f"{folder} already holds a run: pass resume=True to go on with it, or another folder")
            theirs = self.saved.header["identity"]
            for name, value in identity.items():
                if theirs.get(name) != value:
                    raise ValueError(f"{folder} holds another run: its {name} is {theirs.get(name)}, not {value}")
            self._seconds = self.saved.header["seconds"]
            self._slot = 1 - self.saved.header["slot"]
        elif self.folder.exists() and any(self.folder.iterdir()) and not _states(self.folder):
            raise ValueError(f"{self.folder} is not empty, and what it holds is no run")

    def _common(self, states: list[Saved]) -> Saved | None:
        """Choose the newest state from which all processes can go on together.

        Once all of them draw, each goes on from its own newest. Before, they exchange messages, and must be at the
        same step; as they write at the same steps, one of the last two is common.
        """
        if self._ranks.size == 1:
            return states[-1] if states else None
        newest = [_progress(s) for s in states[-2:]]
        newest = [(-1, -1)] * (2 - len(newest)) + newest
        everyone = self._ranks.gather(torch.tensor(newest).unsqueeze(0)).tolist()  # [[[stage, step], ...], ...]
        if all(theirs[-1][0] == 1 for theirs in everyone):
            return states[-1]
        steps = set.intersection(*({tuple(step) for step in theirs} for theirs in everyone))
        best = max(steps, default=(-1, -1))
        return next((s for s in states if _progress(s) == best), None)

    def due(self, together: bool, device: torch.device) -> bool:
        """Say whether it is time to write; the first process decides where all must write ``together``."""
        mine = time.monotonic() - self._last > SECONDS
        return bool(self._ranks.agree(int(mine), device)) if together else mine

    def save(self, header: dict[str, Any], generator: torch.Generator, **states: Any) -> None:
        """Write states made of tensors, numbers and named tuples, and the generator's."""
        arrays = {f"generator/{0}": generator.get_state().numpy()}
        for name, state in states.items():
            arrays |= {f"{name}/{i}": _array(leaf) for i, leaf in enumerate(_leaves(state))}
        seconds = self._seconds + time.monotonic() - self._started
        header = {"identity": self._identity, "seconds": seconds, "slot": self._slot} | header
        storage.write(self.folder / f"state-{self._slot}.npz", "checkpoint", 1, header, arrays)
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
        done: number of draws that are there already and stay.
        chunk: number of draws that are written together.
    """

    def __init__(self, folder: Path, done: int, chunk: int) -> None:
        self.folder, self.done, self._chunk = folder, done, chunk
        self._pending: dict[str, list[Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.layout = _read_layout(folder) if done else {}
        for name, (shape, dtype) in self.layout.items():
            with (folder / f"{_file(name)}.bin").open("r+b") as file:
                file.truncate(done * int(np.prod(shape)) * np.dtype(dtype).itemsize)

    def append(self, values: dict[str, Tensor]) -> None:
        """Take one draw of every chain, ``(chain, ...)`` each."""
        for name, value in values.items():
            self._pending.setdefault(name, []).append(value)
        if len(self._pending["theta"]) >= self._chunk:
            self.flush()

    def flush(self) -> None:
        """Write what is pending and wait until it is on disk."""
        if not self._pending:
            return
        count = len(self._pending["theta"])
        blocks = {name: torch.stack(values).cpu().numpy() for name, values in self._pending.items()}
        if not self.layout:
            self.layout = {name: (block.shape[1:], block.dtype.str) for name, block in blocks.items()}
            _write_layout(self.folder, self.layout)
        mode = "ab" if self.done else "wb"
        for name, block in blocks.items():
            with (self.folder / f"{_file(name)}.bin").open(mode) as file:
                file.write(np.ascontiguousarray(block).data)
                file.flush()
                os.fsync(file.fileno())
        self.done += count
        self._pending = {}

    def read(self) -> dict[str, Tensor]:
        """Return everything on disk as tensors ``(chain, draw, ...)`` that are read only when looked at."""
        return _read(self.folder, self.layout, self.done)


def load(folder: str | Path) -> Draws:
    """Return the draws that a run has left in its folder, finished or not, without its model.

    Raises:
        ValueError: if there is no run, or it has no draws yet.
    """
    parts, header = [], {}
    for place in sorted(Path(folder).glob("rank-*"), key=lambda p: int(p.name.removeprefix("rank-"))):
        states = _states(place)
        if states:
            header = states[-1].header
            done = header["step"] if header["stage"] == "sampling" else 0
            parts.append(_read(place, _read_layout(place), done) if done else {})
    if not parts or not all(parts):
        raise ValueError(f"{folder} holds no draws yet" if parts else f"{folder} holds no run of bnnflow")
    shortest = min(part["theta"].shape[1] for part in parts)
    joined = {
        name: parts[0][name][:, :shortest]
        if len(parts) == 1
        else torch.cat([part[name][:, :shortest] for part in parts])
        for name in parts[0]
    }
    return Draws(joined.pop("theta"), joined.pop("log_joint"), joined, info=header["identity"] | header["info"])


# ---------------------------------------------------------------- files


def _file(name: str) -> str:
    return name.replace("/", "-")


def _read(folder: Path, layout: dict[str, Any], done: int) -> dict[str, Tensor]:
    def tensor(name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        # Copy on write: the tensor may be changed, the file is not.
        mapped = np.memmap(folder / f"{_file(name)}.bin", dtype=dtype, mode="c", shape=(done, *shape))
        return torch.from_numpy(mapped).transpose(0, 1)

    return {name: tensor(name, tuple(shape), dtype) for name, (shape, dtype) in layout.items()}


def _write_layout(folder: Path, layout: dict[str, Any]) -> None:
    storage.write(folder / "layout.npz", "stream", 1, {"layout": layout}, {})


def _read_layout(folder: Path) -> dict[str, Any]:
    return storage.read(folder / "layout.npz", {"stream": 1})[0]["layout"]


def _states(folder: Path) -> list[Saved]:
    """Return the states of a folder, older first."""
    found = [Saved(*storage.read(path, {"checkpoint": 1})) for path in sorted(folder.glob("state-?.npz"))]
    return sorted(found, key=_progress)


def _progress(saved: Saved) -> tuple[int, int]:
    return int(saved.header["stage"] == "sampling"), saved.header["step"]


# ---------------------------------------------------------------- states


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
