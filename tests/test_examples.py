"""The experiments over weights run, at sizes that take a second, and show published figures only
beside the sizes that compare with them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bnnflow as bf

FOLDER = Path(__file__).parents[1] / "examples"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py"))
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of so few steps


def few_images(_: str | None) -> bf.data.Dataset:
    """Return some digits."""
    data = bf.data.load_images("digits")
    return replace(
        data,
        x_train=data.x_train[:48],
        y_train=data.y_train[:48],
        x_test=data.x_test[:24],
        y_test=data.y_test[:24],
    )


TINY: dict[str, Callable[[ModuleType], dict[str, Any]]] = {
    "dwsnets_sine_regression": lambda m: {
        "FIT_STEPS": 2,
        "RATES": (1e-3,),
        "SMALL": m.Sizes((20, 30), 20, 10, 20, seeds=2, steps=2, penalties=1),
    },
    "dwsnets_inr_classification": lambda m: {
        "images": few_images,
        "FULL": m.Sizes(views=2, seeds=2, steps=6, batch_size=8, width=8, depth=1),
        "SMALL": m.Sizes(views=1, seeds=2, steps=6, batch_size=8, width=8, depth=1),
    },
    "dwsnets_self_supervised": lambda m: {
        "FIT_STEPS": 2,
        "HELD_OUT": 20,
        "TEST": 40,
        "BATCH": 8,
        "FULL": m.Sizes(seeds=2, training=60, steps=2, tried=1),
        "SMALL": m.Sizes(seeds=2, training=60, steps=2, tried=0),
    },
    "dwsnets_adaptation": lambda m: {
        "FIT_STEPS": 2,
        "N_TRAIN": 20,
        "N_HELD_OUT": 5,
        "N_TEST": 10,
        "BATCH": 2,
        "TRIALS": m.TRIALS[:1],
        "SAME_TRIALS": m.SAME_TRIALS[:1],
        "SMALL": (2, 2, ("turned",)),
    },
    "dwsnets_editing": lambda m: {
        "images": few_images,
        "HELD_OUT": 6,
        "BATCH": 2,
        "SHOWN": 2,
        "TRIALS": m.TRIALS[:1],
        "SAME_TRIALS": m.SAME_TRIALS[:1],
        "SMALL": (5, 2),
    },
    "one_flow_several_tasks": lambda m: {
        "WIDTH": 8,
        "DEPTH": 1,
        "BATCH": 8,
        "SOLVER_STEPS": 1,
        "REFINE": (1, 1),
        "CHAINS": 4,
        "LONG": (40, 20),
        "SHORT": (100, 100),  # long enough for Stein's identity on any processor
        "SMALL": m.SMALL._replace(
            tasks=2,
            unseen=2,
            widths=(16,),
            steps=2,
            tuning=1,
            draws=32,
            weighed=2,
            solver=2,
            particles=10,
        ),
    },
    "learned_prior": lambda m: {
        "WIDTH": 4,
        "SOLVER": m.Solver("midpoint", 1),
        "SMALL": m.Sizes(tasks=3, steps=2, unseen=2, tempered=2, bank=100, particles=10),
    },
    "thesis_breast_cancer": lambda m: {
        "STARTS": 20,
        "ITERATES": (2, 4),
        "SOLVER_STEPS": (1, 2),
        "STRENGTHS": (0.0, 30.0),
        "FULL": m.FULL._replace(steps=2, generated=10, cells=m.SMALL.cells),
        "SMALL": m.SMALL._replace(steps=2, generated=10, cells=m.SMALL.cells[2:]),
    },
}
PUBLISHED = {
    "dwsnets_inr_classification": "85.71",
    "dwsnets_self_supervised": "1.39",
    "thesis_breast_cancer": "0.992, 0.048",
}


@pytest.fixture
def example(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seeded: Callable,
) -> Iterator[Callable[..., None]]:
    """Return a function that runs the program of this name with arguments, at tiny sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(importlib.import_module("weight_space"), "FIT_STEPS", 2)
    module = importlib.import_module(request.param)
    for constant, value in TINY[request.param](module).items():
        assert hasattr(module, constant)
        monkeypatch.setattr(module, constant, value)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [request.param, *arguments])
        with seeded(0):
            module.main()

    yield run
    for name in PROGRAMS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("example", TINY, indirect=True)
def test_an_experiment_runs(example, request, capsys):
    name = request.node.callspec.params["example"]
    example()
    small = capsys.readouterr().out
    assert "published" not in small
    assert "|" in small  # a table
    if name in PUBLISHED:
        example("--full")
        assert PUBLISHED[name] in capsys.readouterr().out
