"""Laws of the cache of compiled code: it loads only what its owner compiled, and asks a bad
compiler once.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnnflow import BayesianModel, compiled, likelihoods, priors
from bnnflow.compiled import building

F64 = torch.float64
CXX = next(filter(None, map(shutil.which, ["c++", "g++", "clang++"])), None)

needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Start from empty caches, and a process that has said and loaded nothing."""
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    temporary.mkdir(mode=0o700)
    monkeypatch.setenv("BNNFLOW_CACHE", str(cache))
    monkeypatch.delenv("BNNFLOW_FUSED", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    building.say_once.cache_clear()
    compiled.library.cache_clear()
    yield cache
    compiled.library.cache_clear()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library of this machine's own cache, which `quick` compilers copy in turn."""
    library = compiled.library(F64)
    if library is None:
        pytest.skip("no library")
    return Path(shutil.copy(library._name, tmp_path_factory.mktemp("made")))


def compiler(path: Path, script: str) -> str:
    """Write a stand-in for a compiler, which counts its calls.

    The last of its arguments is the output.
    """
    path.write_text(f'#!/bin/sh\necho >> "{path}.calls"\nfor out; do :; done\n{script}\n')
    path.chmod(0o700)
    return str(path)


def calls(path: str) -> int:
    counted = Path(f"{path}.calls")
    return len(counted.read_text().splitlines()) if counted.exists() else 0


def give_up_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let patience end once a stand-in for a compiler runs, whatever the clock says."""
    wait, begun = subprocess.Popen.wait, Path(f"{path}.calls")

    def waited(process: Any, timeout: float | None = None) -> int:
        while timeout is not None and process.poll() is None:
            if begun.exists():
                raise subprocess.TimeoutExpired(process.args, timeout)
            time.sleep(0.01)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", waited)


@pytest.fixture
def quick(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make `$CXX` a compiler that takes no time."""
    path = compiler(tmp_path / "quick", f'cp "{made}" "$out"')
    monkeypatch.setenv("CXX", path)
    return path


def loaded() -> bool:
    """Ask for the library as a new process does."""
    compiled.library.cache_clear()
    return compiled.library(F64) is not None


def _loaded(_: int) -> bool:
    return loaded()


def works() -> None:
    """Check that a model has a gradient, compiled or not."""
    net = nn.Sequential(nn.utils.skip_init(nn.Linear, 2, 3, dtype=F64), nn.Tanh())
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    model = BayesianModel(
        net, priors.Normal(), likelihoods.Gaussian(), x, x @ torch.ones(2, 3, dtype=F64)
    )
    theta = model.sample_prior(2, seed=0)
    value, grad = model.log_joint_and_grad(theta.clone().requires_grad_())
    torch.testing.assert_close(
        model.log_joint_and_grad(theta), (value.detach(), grad.detach())
    )


# ---------------------------------------- kept


@needs_compiler
def test_compiled_once_for_the_next_processes(fresh: Path, quick: str) -> None:
    assert loaded()
    works()
    assert loaded()
    assert calls(quick) == 1
    (library,) = fresh.iterdir()
    assert library.suffix == ".so"
    assert fresh.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_processes_may_compile_at_the_same_time(
    fresh: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the second begins
    both = compiler(tmp_path / "slow", f'sleep 0.5; cp "{made}" "$out"')
    monkeypatch.setenv("CXX", both)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(_loaded, range(2), chunksize=1))
    assert {path.suffix for path in fresh.iterdir()} == {".so"}


@needs_compiler
def test_another_compiler_makes_a_library_of_its_own(
    made: Path, quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded()
    other = compiler(tmp_path / "other", f'cp "{made}" "$out"')
    monkeypatch.setenv("CXX", other)
    assert loaded()
    assert calls(other) == 1


# ---------------------------------------- damaged


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    ["truncated", "garbage", "empty", "a flipped bit", "another library", "a folder"],
)
def test_a_damaged_library_is_made_again(
    damage: str, fresh: Path, quick: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded()
    (library,) = fresh.iterdir()
    whole = library.read_bytes()
    library.unlink()  # this process has it mapped
    if damage == "truncated":
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "garbage":
        library.write_bytes(b"garbage")
    elif damage == "empty":
        library.write_bytes(b"")
    elif damage == "a flipped bit":
        library.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif damage == "another library":
        library.symlink_to(Path(sys.executable).resolve())
    else:
        library.mkdir()
    assert loaded()
    works()
    assert len(caplog.records) == 1 + (damage == "a folder")
    if damage != "a folder":  # which is not taken away: the library goes elsewhere
        library.chmod(0o700)
        assert library.read_bytes() == whole
        assert loaded()
        assert calls(quick) == 2


@needs_compiler
def test_a_library_that_others_may_write_is_made_again(fresh: Path, quick: str) -> None:
    assert loaded()
    (library,) = fresh.iterdir()
    library.chmod(0o777)
    assert loaded()
    assert calls(quick) == 2
    assert library.stat().st_mode & 0o022 == 0


# ---------------------------------------- folders


@needs_compiler
@pytest.mark.parametrize(
    "why", ["group", "world", "parent", "stranger", "link", "a file", "cannot be made"]
)
def test_a_folder_that_cannot_be_trusted_is_not_used(
    why: str,
    fresh: Path,
    quick: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if why == "a file":
        fresh.write_text("")
    elif why == "cannot be made":
        monkeypatch.setenv("BNNFLOW_CACHE", "/dev/null/cache")
    elif why == "link":
        (fresh.parent / "open").mkdir()
        (fresh.parent / "open").chmod(0o777)
        fresh.symlink_to(fresh.parent / "open")
    else:
        fresh.mkdir(mode=0o700)
    if why == "parent":
        (fresh.parent / "open").mkdir(mode=0o700)
        (fresh.parent / "open").chmod(0o777)
        monkeypatch.setenv("BNNFLOW_CACHE", str(fresh.parent / "open" / "cache"))
    elif why == "stranger":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(fresh, 12345, 12345)
    elif why in ("group", "world"):
        fresh.chmod(0o770 if why == "group" else 0o777)
    assert loaded()
    assert loaded()
    assert calls(quick) == 1, "kept in the private folder"
    (message,) = [record.getMessage() for record in caplog.records]
    assert "is not kept in" in message
    assert not fresh.is_dir() or not any(fresh.iterdir())
    private = Path(tempfile.gettempdir()) / f"bnnflow-{os.getuid()}"
    assert private.stat().st_mode & 0o777 == 0o700
    assert any(private.glob("*.so"))


@needs_compiler
@pytest.mark.parametrize("how", ["no room", "read only"])
def test_a_folder_that_cannot_be_written_gives_way_to_the_next(
    how: str,
    fresh: Path,
    quick: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mkdtemp, write = tempfile.mkdtemp, Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.is_relative_to(fresh):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    def read_only(suffix: Any = None, prefix: Any = None, dir: Any = None) -> str:
        if dir is not None and Path(dir) == fresh:
            raise OSError(errno.EROFS, "Read-only file system")
        return mkdtemp(suffix, prefix, dir)

    monkeypatch.setattr(
        *(
            (Path, "write_bytes", full)
            if how == "no room"
            else (tempfile, "mkdtemp", read_only)
        )
    )
    assert loaded()
    assert loaded()
    works()
    assert calls(quick) == 1, "kept in the private folder"
    (message,) = [record.getMessage() for record in caplog.records]
    assert "is not kept in" in message
    assert not any(fresh.iterdir())


@needs_compiler
def test_a_private_folder_that_was_there_before_us_is_not_trusted(
    fresh: Path, quick: str, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.write_text("")
    taken = Path(tempfile.gettempdir()) / f"bnnflow-{os.getuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    assert loaded()
    works()
    assert len(caplog.records) == 2
    assert not any(taken.iterdir())


@needs_compiler
@pytest.mark.parametrize("home", [None, "", "relative", "/dev/null", "/nowhere/at/all"])
@pytest.mark.parametrize("xdg", [None, "relative"])
def test_every_home(
    home: str | None, xdg: str | None, quick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BNNFLOW_CACHE")
    monkeypatch.setattr(
        os.path, "expanduser", lambda path: path.replace("~", home) if home else path
    )
    if home == "/nowhere/at/all":
        monkeypatch.setattr(Path, "mkdir", _refusing("/nowhere"))
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert loaded()
    works()
    assert not Path("relative").exists()
    assert not Path("~").exists()


def _refusing(root: str):
    mkdir = Path.mkdir

    def refusing(path: Path, *args: object, **options: object) -> None:
        if str(path).startswith(root):
            raise PermissionError(f"no permission for {path}")
        mkdir(path, *args, **options)  # type: ignore[arg-type]

    return refusing


# ---------------------------------------- compilers


HANGS = "sleep 1000 & sleep 1000"
FAILURES = {
    "hangs": (HANGS, "did not end"),
    "fails": ("echo no such header >&2; exit 3", "no such header"),
    "makes nothing": ("exit 0", "made no library"),
    "makes garbage": ('echo garbage > "$out"', "failed"),
    "makes half a library": ('head -c 9000 "{made}" > "$out"', "failed"),
    "makes another library": ('cp "{python}" "$out"', "failed"),
    "kills itself": ("kill -9 $$", "failed"),
}


@needs_compiler
@pytest.mark.parametrize("failure", FAILURES)
def test_a_compiler_that_fails_is_asked_once(
    failure: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script, said = FAILURES[failure]
    bad = compiler(
        tmp_path / "bad",
        script.replace("{made}", str(made)).replace("{python}", sys.executable),
    )
    monkeypatch.setenv("CXX", bad)
    if failure == "hangs":
        give_up_on(bad, monkeypatch)
    assert not loaded()
    works()
    (record,) = caplog.records
    assert said in record.getMessage()
    assert record.levelname == "WARNING"
    assert not loaded(), "the next process"
    assert calls(bad) == 1, "does not ask again"
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".failed"]


@needs_compiler
def test_a_failure_is_forgotten(
    made: Path,
    fresh: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = compiler(tmp_path / "bad", "exit 1")
    monkeypatch.setenv("CXX", bad)
    assert not loaded()
    (failure,) = fresh.iterdir()
    old = failure.stat().st_mtime - 2 * building.REMEMBERED
    os.utime(failure, (old, old))
    assert not loaded()
    assert calls(bad) == 2
    compiler(tmp_path / "bad", f'cp "{made}" "$out"')  # mended: another file
    assert loaded()


def test_without_any_compiler(
    fresh: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CXX", raising=False)
    assert not loaded()
    works()
    (record,) = caplog.records
    assert "no C++ compiler found" in record.getMessage()


def test_switched_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BNNFLOW_FUSED", "0")
    assert not loaded()
    works()
    assert not caplog.records


@needs_compiler
def test_what_a_hanging_compiler_started_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    end = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    script = f'(echo >> "{tmp_path}/child.calls"; exec sleep 1000) > "{held}" & wait'
    monkeypatch.setenv("CXX", compiler(tmp_path / "bad", script))
    give_up_on(str(tmp_path / "child"), monkeypatch)
    assert not loaded()
    os.set_blocking(end, True)
    assert os.read(end, 1) == b""  # nobody holds it any more; else this takes 1,000 seconds
    os.close(end)
