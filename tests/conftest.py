"""What holds for every test: one torch thread, repeatable examples, and no global state left
changed.
"""

import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import settings

collect_ignore = ["benchmarks"]  # scripts, run by `make bench`

torch.set_num_threads(1)

# Data beside the checkout are used where they are present; tests that need them skip elsewhere.
_BESIDE = Path(__file__).parents[2] / "shared" / "data"
if _BESIDE.is_dir():
    os.environ.setdefault("BNNFLOW_DATA", str(_BESIDE))
# A shell that starts the tests in the background has Ctrl-C ignored, which Python inherits.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.load_profile("ci")  # the same examples on every run, and no deadline


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a `crossed` test, `make test` runs as few cases as show every value of every argument, and
    `make validate` the other combinations.
    """
    cases = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("crossed"):
            cases[item.nodeid.split("[")[0]].append(item)
    for of_one_test in cases.values():
        rest = {item: _values(item) for item in of_one_test}
        unseen = set().union(*rest.values())
        while unseen:
            unseen -= rest.pop(max(rest, key=lambda item: len(unseen & rest[item])))
        for item in rest:
            item.add_marker("validate")


def _values(item: pytest.Function) -> set[tuple[str, tuple[int, ...]]]:
    """Return what a case takes from each of its parametrisations."""
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    given = item.callspec.params
    return {
        (str(of), tuple(id(given[name.strip()]) for name in _split(of))) for of in names
    }


def _split(names: str | Sequence[str]) -> Sequence[str]:
    return names.split(",") if isinstance(names, str) else names


@pytest.fixture(autouse=True)
def leaves_no_trace() -> Iterator[None]:
    """Fail a test that changed torch's global generator or default dtype, and put them back."""
    generator, dtype = torch.get_rng_state(), torch.get_default_dtype()
    yield
    drew = not torch.equal(generator, torch.get_rng_state())
    left = torch.get_default_dtype()
    torch.set_rng_state(generator)
    torch.set_default_dtype(dtype)
    if drew:
        pytest.fail(
            "the global generator was used: pass a seed, or build networks inside `with seeded(0):`"
        )
    if left != dtype:
        pytest.fail(f"the default dtype was left at {left}")


@pytest.fixture(scope="session")
def seeded():
    """Return a context in which the global generator starts from a seed: how a test builds its
    networks.

    with seeded(0):
        net = torch.nn.Linear(3, 2)
    """

    @contextmanager
    def fork(seed: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield

    return fork
