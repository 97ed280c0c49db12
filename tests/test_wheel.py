"""What is released is whole: a wheel, installed where nothing else of this project is, works."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = """
import sys
from pathlib import Path

import torch

import bnnflow as bf

home = Path(bf.__file__).parent
assert home.is_relative_to(sys.prefix), home
x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
model = bf.BayesianModel(net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.3), x, x.sum(1))
draws = bf.sample(model, bf.HMC(), chains=2, warmup=20, draws=20, seed=0, progress=False)
assert bf.predict(model, draws, x).interval(0.9)[0].shape == (20,)
draws.save("draws.npz")
assert torch.equal(bf.load("draws.npz").theta, draws.theta)
bf.report(model, draws, x, x.sum(1), path="report.html")
assert "</html>" in Path("report.html").read_text(encoding="utf-8")
print(bf.__version__)
"""


def done(*command, where, **options):
    """What a command prints; a failure shows what it said."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=where,
        capture_output=True,
        text=True,
        **options,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ROOT]
    made = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True
    )
    if "No module named pip" in made.stderr:
        pytest.skip("pip is not installed: no wheel can be built")
    if "No matching distribution found for hatchling" in made.stdout + made.stderr:
        pytest.skip("hatchling cannot be fetched: no wheel can be built")
    assert made.returncode == 0, made.stderr[-3000:]
    (path,) = folder.glob("bnnflow-*.whl")
    return path


@pytest.mark.slow
def test_a_wheel_holds_what_is_no_python_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = (ROOT / "bnnflow").rglob("*.py")
    others = ("compiled/fused.cpp", "report/template.html", "py.typed")
    wanted = {path.relative_to(ROOT).as_posix() for path in modules}
    assert {*wanted, *(f"bnnflow/{name}" for name in others)} <= {*names}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bnnflow"}


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """The dependencies are those of the tests, by a path that brings no editable install along."""
    home = tmp_path / "environment"
    done(sys.executable, "-m", "venv", "--without-pip", home, where=tmp_path)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    site = done(
        python,
        "-c",
        "import sysconfig; print(sysconfig.get_path('purelib'))",
        where=tmp_path,
    )
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel]
    done(*pip, where=tmp_path)
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site.strip(), "dependencies.pth").write_text("\n".join(dependencies))
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    version = done(python, "-c", SMOKE, where=tmp_path, env=alone).split()[-1]
    assert version in wheel.name
    told = done(scripts / "bnnflow", "--help", where=tmp_path, env=alone)
    assert "bnnflow fit" in told
    done(python, "-m", "bnnflow", "--help", where=tmp_path, env=alone)
