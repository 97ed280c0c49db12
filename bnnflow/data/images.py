"""Images and labels: idx files (MNIST and its kin), ``.npz`` files, scikit-learn's digits.

Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import importlib
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnnflow import storage
from bnnflow.arguments import Fraction, Whole, checked
from bnnflow.data.loaders import Dataset

__all__ = ["load_images"]

# Where the four idx files of each set usually lie, below the folder. Both sets call them by the
# same names.
IDX = {
    "mnist": ("mnist", "MNIST/raw"),
    "fashion_mnist": ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw"),
}
_PARTS = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
          "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip
# number of axes to the first four bytes of an idx file of unsigned bytes
_MAGIC = {3: 0x0803, 1: 0x0801}


@checked
def load_images(
    name: str = "digits",
    *,
    folder: str | Path | None = None,
    test_fraction: Fraction = 0.2,
    seed: Whole = 0,
) -> Dataset:
    """Load grey images with labels, pixels between 0 and 1.

    ``digits`` (8 x 8) comes with scikit-learn; a part chosen by ``seed`` is the test part.
    ``mnist`` and ``fashion_mnist`` are the four published idx files, plain or with ``.gz``, in one
    of the usual folders below the folder, such as ``MNIST/raw``, or in ``folder`` itself; their
    published split is kept. Every other name is ``<name>.npz`` in the folder with ``images``
    ``(n, height, width)`` uint8 and ``labels`` ``(n,)``; its last rows are the test part.

    Args:
        name: of the set.
        folder: where the files are; ``$BNNFLOW_DATA`` if None.
        test_fraction: share of the rows to test on, where there is no published split.
        seed: of the split of ``digits``.

    Returns:
        A data set with ``x_train`` ``(n, height, width)`` float32 and ``y_train`` ``(n,)`` int64.

    Raises:
        ValueError: for a fraction outside (0, 1), or files that hold something else.
        FileNotFoundError: saying which files are wanted.

    Example:
        >>> load_images("digits").x_train.shape
        torch.Size([1438, 8, 8])
    """
    if not 0 < test_fraction < 1:
        raise ValueError(
            f"test_fraction must lie strictly between 0 and 1, got {test_fraction}"
        )
    if name == "digits":
        raw: Any = importlib.import_module("sklearn.datasets").load_digits()
        order = np.random.default_rng(seed).permutation(len(raw.images))
        return _split(name, raw.images[order], raw.target[order], test_fraction, white=16)
    root = folder if folder is not None else os.environ.get("BNNFLOW_DATA")
    if name in IDX:
        folders = [] if root is None else [Path(root) / below for below in IDX[name]]
        # Only the caller can know whose files lie in a folder itself.
        folders += [] if folder is None else [Path(folder)]
        return _dataset(
            name, *_part(name, "train", folders), *_part(name, "test", folders), white=255
        )
    path = Path(root or ".") / f"{name}.npz"
    if root is None or not path.is_file():
        where = (
            str(path) if root is not None else "nowhere: pass folder= or set BNNFLOW_DATA"
        )
        raise FileNotFoundError(
            f"no images for {name!r} (looked at {where}). Known sets are digits, {', '.join(IDX)}; "
            f"any other is a file {name}.npz with the arrays images (n, height, width) uint8 and "
            "labels (n,). bnnflow never downloads."
        )
    with storage.described(path), np.load(path, allow_pickle=False) as file:
        if not {"images", "labels"} <= set(file.files):
            raise ValueError(
                f"{path} must have the arrays images and labels, it has {file.files}"
            )
        images, labels = file["images"], file["labels"]
    fits = (
        images.ndim == 3 and images.dtype == np.uint8 and labels.shape == images.shape[:1]
    )
    if not fits or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: images must be (n, height, width) uint8 and labels (n,) integers, got "
            f"{images.shape} {images.dtype} and {labels.shape} {labels.dtype}"
        )
    return _split(name, images, labels, test_fraction, white=255)


def _split(
    name: str, images: np.ndarray, labels: np.ndarray, test_fraction: float, white: int
) -> Dataset:
    n_train = len(images) - round(test_fraction * len(images))
    if not 0 < n_train < len(images):
        raise ValueError(
            f"test_fraction={test_fraction} leaves no images to train or to test on"
        )
    return _dataset(
        name, images[:n_train], labels[:n_train], images[n_train:], labels[n_train:], white
    )


def _dataset(
    name: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    white: int,
) -> Dataset:
    x = [
        torch.from_numpy(np.asarray(part, dtype=np.float32) / white)
        for part in (x_train, x_test)
    ]
    y = [torch.from_numpy(np.asarray(part, dtype=np.int64)) for part in (y_train, y_test)]
    return Dataset(name, x[0], y[0], x[1], y[1])


def _part(name: str, part: str, folders: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Read the images and the labels of a part from the first folder that has both."""
    for folder in folders:
        images, labels = (_present(folder / file) for file in _PARTS[part])
        if images is not None and labels is not None:
            x, y = _idx(images, 3), _idx(labels, 1)
            if len(x) != len(y):
                raise ValueError(
                    f"{images} has {len(x)} images, {labels} has {len(y)} labels"
                )
            return x, y
    looked = ", ".join(map(str, folders)) or "nowhere: pass folder= or set BNNFLOW_DATA"
    wanted = " and ".join(_PARTS[part])
    raise FileNotFoundError(
        f"no files {wanted} (or with .gz) of {name}; looked in {looked}. bnnflow never downloads."
    )


def _present(path: Path) -> Path | None:
    """Return the file or its compressed form, whichever is there."""
    return next(
        (file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None
    )


def _idx(path: Path, axes: int) -> np.ndarray:
    """Read an idx file of unsigned bytes."""
    data = path.read_bytes()
    start = 4 * (axes + 1)
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        magic, *shape = struct.unpack(f">{axes + 1}I", data[:start])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is no idx file, or it is cut short: {error}") from error
    if magic != _MAGIC[axes] or len(data) != start + math.prod(shape):
        raise ValueError(
            f"{path} is no idx file of unsigned bytes with {axes} axes, or it is cut short"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
