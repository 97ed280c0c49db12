"""The programs in the README run as printed, and the reference is whole."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from sklearn.datasets import load_diabetes

import bnnflow as bf

ROOT = Path(__file__).parents[1]


def test_readme_program_runs_as_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, printed = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert len([line for line in printed.splitlines() if line.strip()]) <= 11
    program = smaller(printed, {"budget=20": "steps=8", "draws=1000": "draws=300"})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        exec(compile(program, "README.md", "exec"), {})
    accuracy, lppd = map(float, capsys.readouterr().out.split())
    assert accuracy >= 0.85
    assert -0.25 < lppd < -0.15
    assert "<html" in (tmp_path / "report.html").read_text()


def test_readme_goes_from_a_table_to_intervals_in_six_lines():
    program, _ = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert len([line for line in program.splitlines() if line.strip()]) <= 6
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    X["sex"] = np.where(X["sex"] > 0, "a", "b")
    X.loc[3:40:7, "bmi"] = np.nan
    given = {"df": X[:300], "y": y[:300], "df_new": X[300:]}
    exec(compile(program, "README.md", "exec"), given)
    inside = (y[300:] >= given["low"]) & (y[300:] <= given["high"])
    assert 0.8 < inside.mean() < 0.98


def smaller(program: str, changes: dict[str, str]) -> str:
    """Return a program at settings that take less time."""
    for printed, less in changes.items():
        assert printed in program, printed
        program = program.replace(printed, less)
    return program


# ---------------------------------------- the reference


def generator_of_the_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generate_api", ROOT / "docs" / "generate_api.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_public_name():
    generator = generator_of_the_reference()
    reference = set(re.findall(r"^::: (\S+)$", generator.reference(), re.MULTILINE))
    shown = {id(value_of(name)) for name in reference}
    for package in generator.packages():
        assert package.__name__ in reference
        names = {f"{package.__name__}.{name}" for name in package.__all__}
        assert {name for name in names if id(value_of(name)) not in shown} == set()
    assert {name for name in bf.__all__ if id(getattr(bf, name)) not in shown} == {
        "__version__"
    }


def value_of(path: str) -> object:
    head, _, name = path.rpartition(".")
    return (
        getattr(importlib.import_module(head), name)
        if head
        else importlib.import_module(path)
    )


def test_packages_of_the_reference_come_after_those_that_they_import():
    generator = generator_of_the_reference()
    seen: set[str] = set()
    for package in generator.packages():
        name = package.__name__.split(".")[1]
        seen.add(name)
        later = {each.__name__.split(".")[1] for each in generator.packages()} - seen
        assert not generator.imported_by(name) & later
