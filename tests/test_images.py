"""Laws of the image loaders: what was written is read, scaled to [0, 1], and everything else is
refused.
"""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bnnflow.data import load_images

PARTS = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
         "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip
SIZES = {"train": 7, "test": 3}


def pixels(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 5, 4), dtype=np.uint8), rng.integers(
        0, 10, n, dtype=np.uint8
    )


def idx(array: np.ndarray) -> bytes:
    """Return an array as LeCun's page describes the format: two zeros, the type, the axes, the
    sizes, the bytes.
    """
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        + array.tobytes()
    )


def write_idx(folder: Path, compressed: bool = False, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, files in PARTS.items():
        for file, array in zip(files, pixels(SIZES[part], seed), strict=True):
            (folder / f"{file}.gz" if compressed else folder / file).write_bytes(
                gzip.compress(idx(array)) if compressed else idx(array)
            )


@pytest.fixture(autouse=True)
def without_data(monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Hide the data of this machine from all tests but the one that asks where they are."""
    where = os.environ.get("BNNFLOW_DATA")
    monkeypatch.delenv("BNNFLOW_DATA", raising=False)
    return where


def test_digits_are_split_by_the_seed() -> None:
    one, same, other = load_images(), load_images("digits", seed=0), load_images(seed=1)
    assert one.x_train.shape == (1438, 8, 8)
    assert one.x_test.shape == (359, 8, 8)
    assert one.classes == 10
    assert one.x_train.dtype == torch.float32
    assert one.y_train.dtype == torch.int64
    assert float(one.x_train.min()) == 0
    assert float(one.x_train.max()) == 1
    assert torch.equal(one.x_train, same.x_train)
    assert not torch.equal(one.y_test, other.y_test)
    total = [
        float(torch.cat([data.x_train, data.x_test]).double().sum())
        for data in (one, other)
    ]
    assert total[0] == total[1]
    assert repr(one) == "Dataset(digits: 8 x 8 pixels, 1438 + 359 rows, 10 classes)"


@pytest.mark.parametrize("label_type", [np.uint8, np.int64])
def test_an_npz_is_split_in_its_order(
    label_type: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = pixels(10)
    np.savez(tmp_path / "letters.npz", images=images, labels=labels.astype(label_type))
    monkeypatch.setenv("BNNFLOW_DATA", str(tmp_path))
    for data in (
        load_images("letters", folder=tmp_path, test_fraction=0.3),
        load_images("letters", test_fraction=0.3),
    ):
        x, y = (
            torch.cat([data.x_train, data.x_test]),
            torch.cat([data.y_train, data.y_test]),
        )
        assert torch.equal((x * 255).round().byte(), torch.from_numpy(images))
        assert torch.equal(y, torch.from_numpy(labels.astype(np.int64)))
        assert len(data.x_test) == len(data.y_test) == 3
        assert x.dtype == torch.float32


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "."),
        ("fashion_mnist", "fashion-mnist"),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_idx_files_keep_their_published_split(
    name: str, below: str, compressed: bool, tmp_path: Path
) -> None:
    write_idx(tmp_path / below, compressed)
    data = load_images(name, folder=tmp_path)
    for part, x, y in (
        ("train", data.x_train, data.y_train),
        ("test", data.x_test, data.y_test),
    ):
        images, labels = pixels(SIZES[part])
        assert torch.equal(x, torch.from_numpy(images) / 255)
        assert torch.equal(y, torch.from_numpy(labels).long())


def test_the_two_sets_are_not_confused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path / "MNIST/raw", seed=1)
    write_idx(tmp_path / "FashionMNIST/raw", seed=2)
    write_idx(tmp_path, seed=3)  # somebody's
    monkeypatch.setenv("BNNFLOW_DATA", str(tmp_path))
    for folder in (None, tmp_path):
        for name, seed in (("mnist", 1), ("fashion_mnist", 2)):
            found = load_images(name, folder=folder).x_test
            assert torch.equal(found, torch.from_numpy(pixels(3, seed)[0]) / 255)
    for file in (tmp_path / "FashionMNIST/raw").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="fashion_mnist"):
        load_images("fashion_mnist")


def test_the_digits_beside_the_checkout(
    without_data: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_data is None or not (Path(without_data) / "mnist10k.npz").is_file():
        pytest.skip("no mnist10k.npz in $BNNFLOW_DATA")
    monkeypatch.setenv("BNNFLOW_DATA", without_data)
    data = load_images("mnist10k")
    assert data.x_train.shape == (8000, 28, 28)
    assert data.x_test.shape == (2000, 28, 28)
    assert data.classes == 10
    assert 0.12 < float(data.x_train.mean()) < 0.14


# ---------------------------------------- refusals


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fractions_leave_something(fraction: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        load_images(test_fraction=fraction)


def test_too_few_images(tmp_path: Path) -> None:
    images, labels = pixels(2)
    np.savez(tmp_path / "few.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match="leaves no images"):
        load_images("few", folder=tmp_path, test_fraction=0.1)


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: pass folder= or set BNNFLOW_DATA.*letters\.npz"
    ):
        load_images("letters")
    with pytest.raises(
        FileNotFoundError,
        match=r"train-images-idx3-ubyte.*nowhere: pass folder= or set BNNFLOW_DATA",
    ):
        load_images("mnist")
    with pytest.raises(
        FileNotFoundError, match=r"looked at .*letters\.npz.*Known sets are digits, mnist"
    ):
        load_images("letters", folder=tmp_path)
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"t10k-labels-idx1-ubyte .*never downloads"
    ):
        load_images("mnist", folder=tmp_path)
    monkeypatch.setenv("BNNFLOW_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no files train-images-idx3-ubyte"):
        load_images("mnist")  # files of either set might lie there


IMAGES, LABELS = pixels(6)
BAD_ARRAYS = {
    "names": {"x": IMAGES, "labels": LABELS},
    "axes": {"images": IMAGES.reshape(6, -1), "labels": LABELS},
    "type": {"images": IMAGES / 255, "labels": LABELS},
    "lengths": {"images": IMAGES, "labels": LABELS[1:]},
    "float labels": {"images": IMAGES, "labels": LABELS / 2},
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_other_arrays_are_refused(what: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **BAD_ARRAYS[what])
    with pytest.raises(ValueError, match=r"bad\.npz.*images"):
        load_images("bad", folder=tmp_path)


WHOLE = idx(pixels(7)[0])
BAD_BYTES = {
    "empty": b"",
    "head cut": WHOLE[:13],
    "cut": WHOLE[:-1],
    "too long": WHOLE + b"0",
    "labels": idx(pixels(7)[1]),
    "magic": b"\x00\x00\x0d\x03" + WHOLE[4:],
    "gzip in a plain file": gzip.compress(WHOLE),
}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("what", BAD_BYTES)
def test_broken_idx_files_are_refused(what: str, compressed: bool, tmp_path: Path) -> None:
    write_idx(tmp_path, compressed)
    content = BAD_BYTES[what]
    file = tmp_path / (PARTS["train"][0] + ".gz" * compressed)
    file.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte(\.gz)? is no idx file"):
        load_images("mnist", folder=tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, -3])
def test_broken_gzip_files_are_refused(keep: int, tmp_path: Path) -> None:
    write_idx(tmp_path, compressed=True)
    file = tmp_path / f"{PARTS['train'][0]}.gz"
    for content in (
        file.read_bytes()[:keep],
        b"no gzip at all",
        file.read_bytes()[:20] + b"\xff" * 30,
    ):
        file.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"train-images-idx3-ubyte\.gz is no idx file, or it is cut short",
        ):
            load_images("mnist", folder=tmp_path)


def test_images_and_labels_must_match(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / PARTS["test"][1]).write_bytes(idx(pixels(4)[1]))
    with pytest.raises(ValueError, match=r"has 3 images, .* has 4 labels"):
        load_images("mnist", folder=tmp_path)
