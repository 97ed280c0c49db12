"""The small examples run, at settings that take less time, and say what they compare."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bnnflow as bf

FOLDER = Path(__file__).parents[1] / "examples" / "small"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
CHAINS = {"chains": 2, "warmup": 10, "draws": 10}
pytestmark = pytest.mark.filterwarnings("ignore")  # of so few draws

Table = dict[str, list[str]]
"""The cells of each printed line behind its name."""


@pytest.fixture
def table_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, seeded
) -> Iterator[Callable[..., Table]]:
    """Return a function that runs an example with other constants, and returns its table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name: str, **constants: object) -> Table:
        example = importlib.import_module(name)
        for constant, value in constants.items():
            assert hasattr(example, constant)
            monkeypatch.setattr(example, constant, value)
        with seeded(0):
            example.main()
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f"picture: out/{name}.png"
        return {line[:24].strip(): line[24:].split() for line in lines[:-1]}

    yield run
    for name in [*PROGRAMS, "common"]:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_example_has_fewer_than_sixty_lines(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60


def test_bands_in_the_gap(table_of):
    quick = {
        "MCLMC": (bf.MCLMC(), CHAINS),
        "flow": (None, {"draws": 2}),
        "Laplace, linearised": (bf.Laplace(steps=50), {}),
    }
    quick |= {f"ensemble {i}": (bf.DeepEnsemble(members=2, steps=20), {}) for i in range(6)}
    training = bf.Training(steps=1, batch_size=8)
    table = table_of("gap_bands", METHODS=quick, CHAINS=CHAINS, TRAINING=training)
    assert list(table)[1:] == list(quick)
    assert table["ensemble 0"][:3] == table["ensemble 1"][:3]  # of the same seed
    for cells in list(table.values())[1:]:
        wide_in_gap, wide_elsewhere, covered, seconds = map(float, cells)
        assert min(wide_in_gap, wide_elsewhere, seconds) > 0
        assert 0 <= covered <= 1


def test_two_moons(table_of):
    quick = {
        "HMC": (bf.HMC(), CHAINS),
        "Laplace, linearised": (bf.Laplace(steps=50), {"draws": 10}),
    }
    quick |= {f"ensemble {i}": (bf.DeepEnsemble(members=2, steps=20), {}) for i in range(3)}
    table = table_of("two_moons", METHODS=quick)
    assert list(table)[1:] == list(quick)
    for cells in list(table.values())[1:]:
        accuracy, lppd, ece, _ = map(float, cells)
        assert 0.3 < accuracy <= 1
        assert lppd < 0 <= ece
