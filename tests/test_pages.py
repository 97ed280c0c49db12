"""Every program of the documentation runs, and every link leads somewhere."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from bnnflow.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RIVALS = ("jax", "laplace", "numpyro", "posteriors", "bde")
"""Packages of others: a block that imports one is left out where it is not installed."""


def blocks_of(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


SLOW = ("coming-from.md", "index.md", "inference.md", "transport.md")
WITH_PROGRAMS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    if blocks_of(name)
]

QUICK_FIT = {
    "random_state=0)": "random_state=0, method=bf.DeepEnsemble(members=4, steps=200))"
}

SMALLER: dict[str, dict[str, str]] = {
    "coming-from.md": QUICK_FIT,
    "how-to/compare.md": {
        "warmup=150, draws=100": "warmup=50, draws=40",
        "refits=10": "refits=1",
    },
    "how-to/counts.md": {
        "method=bf.MCLMC()": "method=bf.DeepEnsemble(members=4, steps=200)",
        "warmup=100, draws=50": "warmup=10, draws=5",
    },
    "how-to/many-tasks.md": {
        "range(128)": "range(4)",
        "width=32, depth=3": "width=4, depth=1",
        "steps=1500": "steps=3",
        "trajectories=2**14": "trajectories=64",
        "tasks, seed=0)\nprior.save": (
            "tasks, seed=0, training=bf.Training(steps=2, batch_size=8))\nprior.save"
        ),
        "particles=256": "particles=64",
        "2**17": "2**10",
    },
    "how-to/network.md": {"warmup=50, draws=50": "warmup=10, draws=5"},
    "how-to/serve.md": {
        "method=bf.MCLMC()": "method=bf.DeepEnsemble(members=4, steps=200)"
    },
    "how-to/table.md": QUICK_FIT,
    "index.md": {
        "chains=16, warmup=500, draws=1000": "chains=4, warmup=50, draws=50",
        "training=bf.Training(budget=60)": (
            "velocity='weights', training=bf.Training(steps=2, batch_size=32)"
        ),
        "draws=4000": "draws=100",
    },
    "inference.md": {
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
    },
    "tables.md": {
        "BayesianMLPRegressor().fit(df[:100]": (
            "BayesianMLPRegressor(method=bf.DeepEnsemble(members=4, steps=200)).fit(df[:100]"
        )
    },
    "transport.md": {
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
    },
    "extending.md": {
        "chains=8, warmup=100, draws=100": "chains=4, warmup=20, draws=20",
        "HMC(trajectory_length=0.5)": "HMC(trajectory_length=0.1)",
    },
}
"""What is replaced in a page's program, so that it takes seconds."""


def smaller(program: str, changes: dict[str, str]) -> str:
    """Return a program at settings that take less time."""
    for printed, less in changes.items():
        assert printed in program, printed
        program = program.replace(printed, less)
    return program


def runs_here(block: str) -> bool:
    """Say whether the packages of others that a block imports are installed."""
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(block))
        for name in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    return all(importlib.util.find_spec(name) for name in imported & set(RIVALS))


@pytest.mark.filterwarnings("ignore")  # of so few draws
@pytest.mark.parametrize("page", WITH_PROGRAMS)
def test_the_program_of_a_page_runs(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    seeded: Callable,
) -> None:
    monkeypatch.chdir(tmp_path)
    here = [block for block in blocks_of(page) if runs_here(block)]
    program = smaller("\n".join(here), SMALLER.get(page, {}))
    names = {"__name__": "page"}  # of a module, which dataclasses look up
    monkeypatch.setitem(sys.modules, "page", ModuleType("page"))
    with seeded(0):
        exec(compile(program, page, "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    if page in SAID:
        SAID[page](printed)


def said_by_tables(printed: list[str]) -> None:
    chosen, inside, verdict = printed
    assert chosen.startswith("Standardised(HeteroscedasticStudentT): y is continuous")
    assert 70 <= int(inside.split("%")[0]) <= 100
    assert verdict
    assert Path("report.html").exists()


def said_by_weight_space(printed: list[str]) -> None:
    assert printed[0] == "131 ('h1', None) (None, 'h1')"
    assert printed[-1] == "torch.Size([5, 3])"


def said_by_transport(printed: list[str]) -> None:
    assert any(line.startswith("refine ") for line in printed)
    assert f"torch.Size([20, {6 * 3 + 1}])" in printed
    weights = next(
        n for n, line in enumerate(printed) if line.endswith("Size([1, 64, 13])")
    )
    assert "learned from" in printed[weights + 1]  # of the mixture with a plain prior
    assert printed[-1].endswith(
        f"torch.Size([1, 200, {8 * 3 + 1}])"
    )  # an amortised posterior


def said_by_inference(printed: list[str]) -> None:
    assert printed[0].startswith("torch.Size([4, 50, 98]) ['acceptance_rate', ")
    assert "('prior.log_scale', 'likelihood.log_scale')" in printed
    assert "torch.Size([4, 10, 98])" in printed  # read from the folder of the run
    scales = [float(each) for each in re.findall(r"[\d.]+", printed[-1].split("tensor")[1])]
    assert scales == pytest.approx([0.1, 1.0, 10.0], rel=0.2)


def said_by_extending(printed: list[str]) -> None:
    acceptance, noise, log_q = printed
    assert 0.5 < float(acceptance.split()[1]) < 1
    assert 0.05 < float(noise.split()[1]) < 1
    assert log_q == "log q (4,)"


def said_by_the_quickstart(printed: list[str]) -> None:
    assert 70 <= int(printed[0].split("%")[0]) <= 100
    assert "<html" in Path("report.html").read_text()


def said_by_strangers(printed: list[str]) -> None:
    mutual, entropy, handed_on = printed
    assert float(mutual.split()[-1]) > 0.85
    assert float(entropy.split()[-1]) > 0.8
    strangers, others = re.findall(r"(\d+)%", handed_on)
    assert int(strangers) > 50 > int(others)


def said_by_many_tasks(printed: list[str]) -> None:
    before, after = printed[0].strip("[]").split(", ")
    assert float(before) < 0
    assert float(after) < 0
    assert "learned from" in printed[1]
    assert "before the data" in printed[2]


SAID: dict[str, Callable[[list[str]], None]] = {
    "extending.md": said_by_extending,
    "how-to/many-tasks.md": said_by_many_tasks,
    "how-to/out-of-distribution.md": said_by_strangers,
    "inference.md": said_by_inference,
    "quickstart.md": said_by_the_quickstart,
    "tables.md": said_by_tables,
    "transport.md": said_by_transport,
    "weight-space.md": said_by_weight_space,
}
"""What a program prints, where a page says what to expect."""


def test_the_commands_of_the_quickstart_run(tmp_path, monkeypatch, seeded):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks_of("quickstart.md")[0], "quickstart.md", "exec"), {})
    commands = [
        shlex.split(line)
        for block in blocks_of("quickstart.md", "sh")
        for line in block.splitlines()
        if line.startswith("bnnflow ")
    ]
    assert [command for _, command, *_ in commands] == ["fit", "check", "predict", "report"]
    for _, command, *options in commands:
        quick = ["--method", "ensemble"] if command == "fit" else []
        done = CliRunner().invoke(app, [command, *options, *quick])
        assert done.exit_code in ((0, 1, 3) if command == "check" else (0,)), done.output
    assert len(Path("predicted.csv").read_text().splitlines()) == 151
    assert Path("run/report.html").exists()


def test_each_program_of_ones_own_has_fewer_than_thirty_lines():
    setting, sampler, taken, likelihood, field = map(
        str.splitlines, blocks_of("extending.md")
    )
    for program in (setting, sampler + taken, likelihood, field):
        assert len([line for line in program if line.strip()]) < 30


# ---------------------------------------- links and pictures

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def prose_of(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
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


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_every_picture_is_shown_and_described():
    shown = {
        ((page.parent / path).resolve(), words.strip())
        for page in PAGES
        for words, path in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", prose_of(page))
    }
    assert {path for path, _ in shown} == {
        path.resolve() for path in (DOCS / "images").glob("*.png")
    }
    assert all(len(words) > 20 for _, words in shown)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of so few draws
def test_the_pictures_of_the_explanations_are_drawn(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("draw", DOCS / "images" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    quick = {
        "HERE": tmp_path,
        "CHAINS": 4,
        "WARMUP": 5,
        "DRAWS": 50,
        "STEPS": 2,
        "SHOWN": 20,
        "SOLVER": 4,
        "RAW": 50,
        "REPEATS": 20,
    }
    for constant, value in quick.items():
        assert hasattr(draw, constant)
        monkeypatch.setattr(draw, constant, value)
    draw.main([])
    told = capsys.readouterr().out
    for name in draw.PICTURES:
        assert name in told
        assert (DOCS / "images" / f"explain-{name}.png").exists()
        assert (tmp_path / f"explain-{name}.png").read_bytes().startswith(b"\x89PNG")
