"""The programs in the README and in the documentation run as printed."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
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


def test_program_of_the_tables_page_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(program_of("tables.md"), "tables.md", "exec"), {})
    chosen, inside, verdict = capsys.readouterr().out.splitlines()
    assert chosen.startswith("Standardised(HeteroscedasticGaussian): y is continuous")
    assert 70 <= int(inside.split("%")[0]) <= 100
    assert verdict
    assert (tmp_path / "report.html").exists()


def program_of(page: str) -> str:
    return "\n".join(
        re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    )


def test_program_of_the_weight_space_page_runs(capsys):
    with torch.random.fork_rng(devices=[]):
        exec(compile(program_of("weight-space.md"), "weight-space.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "131 ('h1', None) (None, 'h1')"
    assert printed[-1] == "torch.Size([5, 3])"


def smaller(program: str, changes: dict[str, str]) -> str:
    """Return a program at settings that take less time."""
    for printed, less in changes.items():
        assert printed in program, printed
        program = program.replace(printed, less)
    return program


@pytest.mark.filterwarnings("ignore:log densities of")  # four steps are few
def test_program_of_the_transport_page_runs(capsys):
    changes = {
        "training=training, seed=0)\n": """training=training, seed=0, velocity=small)
flow = replace(flow, solver=bf.transport.Solver(steps=3))
""",
        "training = bf": """from dataclasses import replace
small = bf.transport.InformedVelocity(model.spec, bf.transport.GradientSteps(1), width=8, depth=1)
training = bf""",
        "Solver(steps=8)": "Solver(steps=2)",
        "quick.sample(200": "quick.sample(50",
        "width=32, depth=2": "width=8, depth=1",
        "trajectories=64": "trajectories=16",
    }
    program = smaller(program_of("transport.md"), changes)
    with torch.random.fork_rng(devices=[]):
        exec(compile(program, "transport.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("refine ") for line in printed)
    assert printed[-1] == f"torch.Size([20, {6 * 3 + 1}])"


@pytest.mark.filterwarnings("ignore")  # of so few draws
def test_program_of_the_inference_page_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {
        "chains=8, warmup=200, draws=200": "chains=4, warmup=50, draws=50",
        "SMC(particles=200)": "SMC(particles=20)",
        "bf.evidence(model, draws)": "bf.evidence(model, draws, bf.SMC(100, moves=1))",
        "chains=8, warmup=100, draws=100": "chains=4, warmup=20, draws=20",
        "SGHMC(batch_size=32, control_variates=True, thinning=10)": (
            "SGHMC(batch_size=32, control_variates=True, thinning=2, step_size=1e-3)"
        ),
        "DeepEnsemble(members=4)": "DeepEnsemble(members=4, steps=100)",
        "chains=4, warmup=100, draws=50": "chains=4, warmup=20, draws=10",
        "chains=4, warmup=100, draws=80": "chains=4, warmup=20, draws=15",
        "more.theta[:, :50]": "more.theta[:, :10]",
        "bf.SGHMC(batch_size=32), chains=4, warmup=20, draws=10": (
            "bf.SGHMC(batch_size=8, step_size=1e-3), chains=2, warmup=4, draws=2, init='prior'"
        ),
        "bf.predict(images, draws, digits.x_test), digits.y_test": (
            "bf.predict(images, draws, digits.x_test[:20]), digits.y_test[:20]"
        ),
    }
    program = smaller(program_of("inference.md"), changes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        exec(compile(program, "inference.md", "exec"), {"__name__": __name__})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("torch.Size([4, 50, 98]) ['acceptance_rate', ")
    assert "('prior.log_scale', 'likelihood.log_scale')" in printed
    assert "torch.Size([4, 10, 98])" in printed  # read from the folder of the run
    scales = [float(each) for each in re.findall(r"[\d.]+", printed[-1].split("tensor")[1])]
    assert scales == pytest.approx([0.1, 1.0, 10.0], rel=0.2)


# ---------------------------------------- programs of one's own


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_programs_of_the_extending_page_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {
        "chains=8, warmup=100, draws=100": "chains=4, warmup=20, draws=20",
        "HMC(trajectory_length=0.5)": "HMC(trajectory_length=0.1)",
    }
    program = smaller(program_of("extending.md"), changes)
    exec(compile(program, "extending.md", "exec"), {"__name__": __name__})
    acceptance, noise, log_q = capsys.readouterr().out.splitlines()
    assert 0.5 < float(acceptance.split()[1]) < 1
    assert 0.05 < float(noise.split()[1]) < 1
    assert log_q == "log q (4,)"


def test_each_program_of_ones_own_has_fewer_than_thirty_lines():
    setting, sampler, taken, likelihood, field = map(
        str.splitlines, blocks_of("extending.md")
    )
    for program in (setting, sampler + taken, likelihood, field):
        assert len([line for line in program if line.strip()]) < 30


# ---------------------------------------- the reference, and links


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


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md" and file.name != "api.md":
            assert anchor in anchors_of(file), target


def anchors_of(file: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return {
        re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
        for title in titles
    }
