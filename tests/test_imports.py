"""The borders of the package: importing it is light, and no room imports a later one."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bnnflow"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room may import those before it, never those after it.
ROOMS = [
    "types",
    "warn",
    "verdicts",
    "arguments",
    "options",
    "forward_mode",
    "activations",
    "seeding",
    "identity",
    "storage",
    "progress",
    "stopwatch",
    "tables",
    "ranks",
    "parts",
    "bridge",
    "diagnostics",
    "importance",
    "compiled",
    "dynamics",
    "optimisers",
    "gaussian",
    "posteriors",
    "tracing",
    "weights",
    "calibration",
    "draws",
    "data",
    "model",
    "method",
    "inference",
    "symmetry",
    "equivariant",
    "transport",
    "predictive",
    "diagnosis",
    "report",
    "estimators",
    "comparison",
    "files",
    "cli",
    "__main__",
]
STRANGERS = {("transport", "inference")}
EXCEPT = (
    "transport/correction/",
    "transport/bootstrap.py",
    "transport/learned_prior.py",
    "transport/sharpening.py",
)
LOADED_ON_FIRST_USE = {
    "pyro",
    "ot",
    "arviz",
    "matplotlib",
    "sklearn",
    "xarray",
    "pandas",
    "torchdiffeq",
}


def without_annotations(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which load nothing."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) in {
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        }:
            for node in child.orelse:
                yield from without_annotations(node)
        else:
            yield from without_annotations(child)


def imported_rooms(source: str, package: list[str]) -> Iterator[tuple[int, str]]:
    """The line and the room of every import of bnnflow in a module of `package`, a dotted name as a
    list.

    "" is the package itself, which imports every room and so is later than all of them.
    """
    for node in without_annotations(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "bnnflow" and name != ["bnnflow", "__version__"]:
                yield node.lineno, name[1] if name[1:] and name[1] in ROOMS else ""


def trespasses(path: str, source: str) -> list[str]:
    """What the module at `path` (relative to the package) may not import, one line each."""
    *folders, file = path.split("/")
    here = folders[0] if folders else file.removesuffix(".py")
    found = []
    for line, room in imported_rooms(source, ["bnnflow", *folders]):
        later = room == "" or ROOMS.index(room) > ROOMS.index(here)
        if later or ((here, room) in STRANGERS and not path.startswith(EXCEPT)):
            found.append(
                f"bnnflow/{path}:{line}: {here} imports {room or 'the whole package'}"
            )
    return found


def test_importing_the_package_is_light():
    script = "import sys, bnnflow; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert not LOADED_ON_FIRST_USE & set(loaded.split())


def test_a_first_fit_loads_no_algebra_system():
    """As `torch.broadcast_shapes` would, which is most of a second of a small table's fit."""
    script = (
        "import sys, numpy, bnnflow; x = numpy.eye(9); method = bnnflow.DeepEnsemble(steps=2); "
        "bnnflow.BayesianMLPRegressor((2,), method=method).fit(x, x[:, 0] + x[:, 1] * 0.5); "
        "print('sympy' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.split() == ["False"]


def test_every_module_lies_in_a_known_room():
    top = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert top <= {*ROOMS, "__init__"}, (
        "name the new room in ROOMS, after all that it imports"
    )


@pytest.mark.parametrize("path", [p.relative_to(PACKAGE).as_posix() for p in MODULES])
def test_imports_go_down_the_list(path):
    if path != "__init__.py":
        assert not trespasses(path, (PACKAGE / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("model/bayesian.py", "from bnnflow.weights import WeightSpec", True),
        ("model/bayesian.py", "from .priors import Normal", True),
        ("model/bayesian.py", "from ..inference.mcmc.hmc import HMC", False),
        ("model/bayesian.py", "from bnnflow import inference", False),
        ("model/bayesian.py", "def f():\n    import bnnflow.report.plots", False),
        ("model/bayesian.py", "import bnnflow", False),
        ("model/bayesian.py", "from bnnflow import __version__", True),
        ("weights.py", "from bnnflow.draws import Draws", False),
        ("draws.py", "from .weights import WeightSpec", True),
        ("types.py", "if TYPE_CHECKING:\n    from bnnflow.weights import WeightSpec", True),
        (
            "types.py",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import bnnflow.weights",
            False,
        ),
        ("transport/field.py", "from bnnflow.inference import hmc", False),
        ("transport/correction/chains.py", "from bnnflow.inference import hmc", True),
        ("inference/mcmc/hmc.py", "from bnnflow.transport import correct", False),
    ],
)
def test_the_rule_itself(path, source, allowed):
    assert (not trespasses(path, source)) is allowed
