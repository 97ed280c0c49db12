"""The small examples run, at settings that take less time, and say what they compare."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bnnflow as bf
from bnnflow.inference import checkpoint

FOLDER = Path(__file__).parents[1] / "examples" / "small"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
CHAINS = {"chains": 2, "warmup": 10, "draws": 10}
pytestmark = pytest.mark.filterwarnings("ignore")  # of so few draws

Table = list[tuple[str, list[str]]]
"""The name in front of each printed line, and its cells."""


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
        return [(line[:24].strip(), line[24:].split()) for line in lines[:-1]]

    yield run
    for name in [*PROGRAMS, "common"]:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_example_has_fewer_than_sixty_lines(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60


def numbers(cells: list[str]) -> list[float]:
    return [float(cell) for cell in cells if cell != "±"]


@pytest.mark.slow
def test_bands_in_the_gap(table_of):
    quick = {
        "MCLMC": (bf.MCLMC(), CHAINS),
        "flow": (None, {"draws": 2}),
        "Laplace, linearised": (bf.Laplace(steps=50), {}),
    }
    quick |= {f"ensemble {i}": (bf.DeepEnsemble(members=2, steps=20), {}) for i in range(6)}
    training = bf.Training(steps=1, batch_size=8)
    _, hmc, *table = table_of("gap_bands", METHODS=quick, CHAINS=CHAINS, TRAINING=training)
    assert hmc[0] == "HMC"
    assert [name for name, _ in table] == list(quick)
    assert table[3][1][:3] == table[4][1][:3]  # of the same seed
    for _, cells in table:
        in_gap, elsewhere, covered, seconds = numbers(cells)
        assert min(in_gap, elsewhere, seconds) > 0
        assert 0 <= covered <= 1


def test_two_moons(table_of):
    quick = {
        "HMC": (bf.HMC(), CHAINS),
        "Laplace, linearised": (bf.Laplace(steps=50), {"draws": 10}),
    }
    quick |= {f"ensemble {i}": (bf.DeepEnsemble(members=2, steps=20), {}) for i in range(3)}
    _, *table = table_of("two_moons", METHODS=quick)
    assert [name for name, _ in table] == list(quick)
    for _, cells in table:
        accuracy, lppd, ece, _ = numbers(cells)
        assert 0.3 < accuracy <= 1
        assert lppd < 0 <= ece


def test_cold_posteriors(table_of):
    _, *table = table_of("cold_posteriors", TASKS=2, TEMPERATURES=[0.1, 1.0], SIZES=CHAINS)
    assert len(table) == 4
    for _, cells in table:
        _, error, *at_one = numbers(cells)
        assert error > 0
        assert at_one == [0, 0]  # what gains are measured from


def test_choose_by_evidence(table_of):
    few = bf.SMC(particles=20, moves=1)
    _, *table = table_of("choose_by_evidence", WIDTHS=(2, 8), SCALES=(2.0, 4.0), SMC=few)
    assert [name for name, _ in table] == [
        "2 units, scale 2",
        "8 units, scale 2",
        "8 units, scale 2",
        "8 units, scale 4",
    ]
    assert table[1][1] == table[2][1]
    for _, cells in table:
        assert numbers(cells)[1] > 0  # the error of the evidence


def test_prior_functions(table_of):
    _, *table = table_of("prior_functions", DEPTHS=(1, 2), DRAWS=200)
    assert len(table) == 6
    for _, cells in table:
        at_0, at_3, near, far = numbers(cells)
        assert min(at_0, at_3) > 0.5
        assert near > far  # functions are smooth


def test_active_learning(table_of):
    _, *table = table_of(
        "active_learning", SEEDS=range(2), LABELLED=range(10, 25, 5), SIZES=CHAINS
    )
    assert len(table) == 6
    for any_rows, unknown in zip(table[::2], table[1::2], strict=True):
        assert any_rows[1][:3] == unknown[1][:3]  # they begin with the same rows
        assert any_rows[1][3:] != unknown[1][3:]


def test_resuming(table_of, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", checkpoint.SECONDS)  # the example changes it
    at_once = {"Ctrl-C": (signal.SIGINT, 0), "kill -9": (signal.SIGKILL, 0)}
    table = table_of("resume", SIZES=CHAINS, STOPS=at_once)
    assert table[-1] == ("largest difference", ["0.0"])
