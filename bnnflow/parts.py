"""A long computation kept part by part, so that it goes on where it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bnnflow import storage
from bnnflow.options import Checkpoint
from bnnflow.ranks import ALONE, Ranks
from bnnflow.warn import warn

__all__ = ["Parts"]


class Parts:
    """Finished parts in a folder, a file each, on which one run works alone.

    Args:
        checkpoint: the folder; nothing is kept if None.
        name: of the files, ``<name>-000000.npz`` and so on.
        run: what tells this computation from others, as plain values.
        ranks: the processes that share it; the first writes, and all read.

    Raises:
        ValueError: if the checkpoint is a file, holds a run and is not to be resumed, holds another
            one, or another process works on it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        name: str,
        run: dict[str, Any],
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder = None if checkpoint is None else Path(checkpoint.path)
        self._name, self._run = name, run
        self._first = ranks.rank == 0
        self._lock: storage.Lock | None = None
        if checkpoint is None or self.folder is None:
            return
        if self.folder.is_file():
            raise ValueError(f"checkpoint must be a folder, {self.folder} is a file")
        if self._first:
            self._lock = storage.Lock(self.folder, folder=True)
        try:
            self._check(self.folder, checkpoint.resume)
        except BaseException:
            self.__exit__()
            raise

    def _check(self, folder: Path, resume: bool) -> None:
        if self._first:  # of a process that was killed
            for unfinished in folder.glob(f"{self._name}-??????.npz.*.tmp"):
                unfinished.unlink()
        present = sorted(folder.glob(f"{self._name}-??????.npz"))
        if present and not resume:
            raise ValueError(
                f"{folder} holds a fit already: go on with it by Checkpoint({str(folder)!r}, "
                "resume=True), or take another folder"
            )
        for path in present:
            if self._read(path) is not None:  # the first that is intact speaks for all
                return

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def _path(self, index: int) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{self._name}-{index:06d}.npz"

    def read(self, index: int) -> dict[str, np.ndarray] | None:
        """Return a part, or None if it is not there or damaged: it is then made anew.

        Raises:
            ValueError: if it is one of another run.
        """
        path = self._path(index)
        return None if path is None or not path.is_file() else self._read(path)

    def _read(self, path: Path) -> dict[str, np.ndarray] | None:
        try:
            header, arrays = storage.read(path, {f"{self._name}-part": 1})
            with storage.described(path):
                run = header["run"]
        except ValueError as error:
            warn(f"damaged: {error}. What it held is made anew")
            return None
        if run != self._run:
            raise ValueError(
                f"{path.parent} was filled with other settings, another seed or other data"
            )
        return arrays

    def write(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep a part."""
        path = self._path(index)
        if path is not None and self._first:
            storage.write(path, f"{self._name}-part", 1, {"run": self._run}, arrays)
