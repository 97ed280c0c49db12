"""The programs in the README and in the documentation run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_readme_program_runs_as_printed(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in program.splitlines() if line.strip()]) <= 11
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    accuracy, lppd = map(float, done.stdout.split())
    assert accuracy >= 0.85
    assert -0.25 < lppd < -0.15
    assert "<html" in (tmp_path / "report.html").read_text()


def program_of(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL))


def test_program_of_the_weight_space_page_runs(capsys):
    with torch.random.fork_rng(devices=[]):
        exec(compile(program_of("weight-space.md"), "weight-space.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "131 ('h1', None) (None, 'h1')"
    assert printed[-1] == "torch.Size([5, 3])"


def test_program_of_the_transport_page_runs(capsys):
    with torch.random.fork_rng(devices=[]):
        exec(compile(program_of("transport.md"), "transport.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("refine ") for line in printed)
    assert printed[-1] == f"torch.Size([20, {6 * 3 + 1}])"
