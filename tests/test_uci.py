"""The comparison over tables of data: what it writes, and that it goes on where it was."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bnnflow.estimators import recipe

PROGRAM = Path(__file__).parents[1] / "examples" / "uci.py"


@pytest.fixture(scope="module")
def uci() -> ModuleType:
    spec = importlib.util.spec_from_file_location("uci", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_fit_is_scored_once(uci, tmp_path, monkeypatch, capsys):
    g = np.random.default_rng(0)
    x = g.uniform(-2, 2, (80, 2))
    y = 50 + 10 * x[:, 0] + g.normal(0, 1, 80)
    np.savez(
        tmp_path / "line.npz", X=x, y=y, test_0=np.arange(20), test_1=np.arange(20, 40)
    )
    out = tmp_path / "runs" / "uci.csv"

    def run(methods: str) -> list[dict[str, str]]:
        given = f"--data {tmp_path} --sets line --splits 0 --methods {methods} --out {out}"
        monkeypatch.setattr(sys, "argv", ["uci.py", *given.split()])
        uci.main()
        with out.open(newline="") as file:
            return list(csv.DictReader(file))

    first = run("ensemble")
    second = run("ensemble,gp")
    assert second[0] == first[0]  # nor was it fitted again: its CPU seconds are the same
    assert [row["method"] for row in second] == ["ensemble", "gp"]
    for row in second:  # noise of standard deviation 1, in units of y
        assert 0.7 < float(row["rmse"]) < 1.8
    gp = second[1]
    assert float(gp["nll"]) == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.5)
    assert float(gp["width"]) == pytest.approx(2 * 1.645, rel=0.3)
    with out.open("a") as file:
        file.write("line,0,catb")  # of a run that was killed
    third = run("forest")
    assert third[:2] == second
    assert third[-1]["method"] == "forest"
    run("ensemble,gp")
    last = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in last] == ["line", "ensemble", "forest", "gp"]


@pytest.mark.slow
def test_a_flow_takes_the_place_of_the_chains(uci, monkeypatch):
    monkeypatch.setattr(uci, "FLOW_STEPS", 1)
    monkeypatch.setattr(uci, "FLOW_DRAWS", 5)
    for name, small in {"WARM_UP": 10, "DRAWS": 10, "LONGER": 1, "ROUNDS": 1}.items():
        monkeypatch.setattr(recipe, name, small)
    x = np.random.default_rng(0).uniform(-2, 2, (40, 1))
    prediction, seconds = uci.fit("flow", None, x, 50 + 10 * x[:, 0], x[:5])
    assert len(prediction.theta) == 5
    assert np.isfinite(prediction.mean.numpy()).all()
    assert seconds > 0


def test_mixtures_of_normal_laws_have_the_quantiles_of_their_draws(uci):
    g = np.random.default_rng(0)
    loc, scale = g.normal(0, 2, (5, 3)), g.uniform(0.5, 2, (5, 3))
    mixture = uci.Normals(loc, scale)
    drawn = (loc[:, None] + scale[:, None] * g.normal(size=(5, 40_000, 3))).reshape(-1, 3)
    assert np.stack(mixture.interval(0.9)) == pytest.approx(
        np.quantile(drawn, [0.05, 0.95], axis=0), abs=0.05
    )
    density = np.exp(mixture.log_prob(np.zeros(3)))
    assert density == pytest.approx((np.abs(drawn) < 0.25).mean(0) / 0.5, rel=0.05)


def test_differences_are_paired_by_split(uci):
    ours, theirs = {0: 1.0, 1: 5.0, 2: 2.0}, {1: 5.3, 0: 1.1, 7: 0.0}
    assert uci.paired(theirs, ours) == "+0.200, t = 2.0"


def test_a_row_that_a_kill_cut_anywhere_is_none(uci, tmp_path):
    """Not even where all but the end of its last number was written."""
    row = dict.fromkeys(uci.FIELDS, "12.5")
    rows = [row | {"split": str(split)} for split in range(3)]
    whole = tmp_path / "whole.csv"
    for each in rows[:2]:
        uci.add(whole, each)
    assert uci.read(whole) == rows[:2]
    content, cut = whole.read_bytes(), tmp_path / "cut.csv"
    for size in range(len(content) + 1):
        cut.write_bytes(content[:size])
        kept = max(0, content[:size].count(b"\n") - 1)
        assert uci.read(cut) == rows[:kept]
        uci.add(cut, rows[2])
        assert uci.read(cut) == [*rows[:kept], rows[2]]
