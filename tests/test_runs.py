"""Runs that are stopped, killed, resumed, extended, read while they go on, and shared between
processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.inference import checkpoint, loop
from tests.problems import one_in
from tests.processes import run, run_ranks

SIZES = {"chains": 2, "warmup": 60, "draws": 30}
METHODS = [
    bf.HMC(max_leapfrog=16),
    bf.AdjustedMCLMC(max_leapfrog=16),
    bf.MCLMC(thinning=3),
    bf.SGLD(batch_size=4),
    bf.SGHMC(batch_size=4),
    bf.SGNHT(),
    bf.SMC(particles=40, moves=1),
    bf.ParallelTempering(levels=4, max_leapfrog=4),
]


def named(method: bf.inference.Method) -> str:
    return type(method).__name__


names = [*map(named, METHODS)]


def model(seed: int = 2) -> bf.BayesianModel:
    g = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1.5, 1.5, 8).unsqueeze(-1)
    y = (2 * x).sin() + 0.2 * torch.randn(8, 1, generator=g)
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(), x, y)


def sizes(method) -> dict[str, int]:
    return {"chains": 2} if isinstance(method, bf.SMC) else SIZES


def same(first: bf.Draws, second: bf.Draws) -> None:
    """Check that two runs agree to the last bit."""
    assert first.theta.shape == second.theta.shape
    assert torch.equal(first.theta, second.theta)
    assert torch.equal(first.log_joint, second.log_joint)
    assert set(first.stats) == set(second.stats)
    for name, values in first.stats.items():
        assert torch.equal(values, second.stats[name]), name
    assert first.log_evidence == second.log_evidence
    for name in ("step_size", "gradients_per_chain"):
        assert first.info.get(name) == second.info.get(name)


EVALUATIONS = (
    "log_joint_and_grad",
    "log_likelihood_and_grad",
    "minibatch_log_joint_and_grad",
)


class PowerCut(BaseException):
    """What no code may catch."""


def cut(target: bf.BayesianModel, at: int, error: type[BaseException] = PowerCut) -> None:
    """Let the ``at``-th evaluation of the model fail."""
    calls = [0]

    def cutting(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == at:
                raise error
            return function(*args, **kwargs)

        return call

    for name in EVALUATIONS:
        setattr(target, name, cutting(getattr(target, name)))


def run_and_count(method) -> tuple[bf.Draws, int]:
    """Return the draws of a run, and how often it evaluated the model."""
    target, calls = model(), 0
    for name in EVALUATIONS:
        function = getattr(target, name)

        def count(*args, function=function, **kwargs):
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        setattr(target, name, count)
    return bf.sample(target, method, seed=3, **sizes(method)), calls


@pytest.mark.parametrize("method", one_in(2, METHODS), ids=names)
def test_a_run_that_was_cut_goes_on_bit_for_bit(
    method, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)  # a state after every step
    whole, calls = run_and_count(method)
    for part in (0.5, 0.9):
        target = model()
        cut(target, max(1, int(part * calls)))
        with pytest.raises(PowerCut):
            bf.sample(
                target, method, seed=3, checkpoint=tmp_path / str(part), **sizes(method)
            )
        resumed = bf.sample(
            model(),
            method,
            seed=3,
            checkpoint=bf.Checkpoint(tmp_path / str(part), resume=True),
            **sizes(method),
        )
        same(resumed, whole)
        assert not list((tmp_path / str(part)).rglob("*.tmp"))


@pytest.mark.parametrize(
    "method", [each for each in METHODS if not isinstance(each, bf.SMC)], ids=named
)
def test_a_draw_that_ctrl_c_breaks_off_is_made_anew(method, tmp_path: Path) -> None:
    """With the random numbers that it began with: the run is the one that was never stopped."""
    whole, calls = run_and_count(method)
    target = model()
    cut(target, calls - 10, KeyboardInterrupt)
    with pytest.warns(UserWarning, match="interrupted: returning"):
        part = bf.sample(target, method, seed=3, checkpoint=tmp_path, **SIZES)
    assert 0 < part.n_draws < whole.n_draws
    assert torch.equal(part.theta, whole.theta[:, : part.n_draws])
    kept = bf.Checkpoint(tmp_path, resume=True)
    same(bf.sample(model(), method, seed=3, checkpoint=kept, **SIZES), whole)


@pytest.mark.slow
# a file may be left open between two lines of Python
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_may_come_at_any_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "CHUNK_BYTES", 1)  # a draw at a time goes to disk
    given = {"method": bf.HMC(max_leapfrog=2), "seed": 3, "init": "prior"}
    given |= {"chains": 1, "warmup": 2, "draws": 2}
    watched = {loop._draw, loop._Progress.drawn}
    watched |= {checkpoint.Stream.append, checkpoint.Stream.flush}
    code = {function.__code__ for function in watched}

    def drawn(folder: Path, at: int | None = None) -> tuple[bf.Draws | None, int]:
        """Interrupt the ``at``-th line of them; return the draws, and the lines so far."""
        lines = 0

        def line(frame, event: str, _):
            nonlocal lines
            if event == "line":
                lines += 1
                if lines == at:
                    raise KeyboardInterrupt
            return line

        kept = bf.Checkpoint(folder, resume=True)
        before = sys.gettrace()
        sys.settrace(lambda frame, *_: line if frame.f_code in code else None)
        try:
            return bf.sample(model(), checkpoint=kept, **given), lines
        except KeyboardInterrupt:
            return None, lines
        finally:
            sys.settrace(before)

    whole, lines = drawn(tmp_path / "whole")
    assert lines > 100
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "interrupted")
        for at in range(1, lines, 7):
            part, _ = drawn(tmp_path / str(at), at)
            if part is not None:
                assert torch.equal(part.theta, whole.theta[:, : part.n_draws])
            same(drawn(tmp_path / str(at))[0], whole)


def test_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    same(
        bf.sample(model(), seed=1, checkpoint=tmp_path, **SIZES),
        bf.sample(model(), seed=1, **SIZES),
    )


def test_what_a_dying_process_appended_is_cut_off(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    whole = bf.sample(model(), seed=1, **SIZES)
    bf.sample(model(), seed=1, checkpoint=tmp_path, **(SIZES | {"draws": 12}))
    for path in (tmp_path / "rank-0").glob("*.bin"):
        with path.open("ab") as file:
            file.write(b"half a draw")
    same(
        bf.sample(
            model(), seed=1, checkpoint=bf.Checkpoint(tmp_path, resume=True), **SIZES
        ),
        whole,
    )


def test_a_finished_run_is_extended(tmp_path: Path) -> None:
    whole = bf.sample(model(), seed=1, **(SIZES | {"draws": 50}))
    first = bf.sample(model(), seed=1, checkpoint=tmp_path, **SIZES)
    same(
        bf.sample(
            model(),
            seed=1,
            checkpoint=bf.Checkpoint(tmp_path, resume=True),
            **SIZES | {"draws": 50},
        ),
        whole,
    )
    assert torch.equal(first.theta, whole.theta[:, :30])
    shorter = bf.sample(
        model(),
        seed=1,
        checkpoint=bf.Checkpoint(tmp_path, resume=True),
        **SIZES | {"draws": 20},
    )
    assert torch.equal(shorter.theta, whole.theta[:, :20])


def test_draws_are_read_from_the_folder(tmp_path: Path) -> None:
    draws = bf.sample(model(), seed=1, checkpoint=tmp_path / "run", **SIZES)
    loaded = bf.load(tmp_path / "run")
    assert torch.equal(loaded.theta, draws.theta)
    assert torch.equal(loaded.stats["n_steps"], draws.stats["n_steps"])
    assert loaded.info["method"] == "HMC"
    loaded.theta.zero_()  # the file is not changed by what is done to the tensor
    assert torch.equal(bf.load(tmp_path / "run").theta, draws.theta)
    loaded.save(tmp_path / "draws.npz")
    with pytest.raises(ValueError, match="holds no run"):
        bf.load(tmp_path)


def test_an_interrupted_warm_up_has_no_draws_yet(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    target = model()
    cut(target, 330)  # in the warm-up, after the warm start
    with pytest.raises(PowerCut):
        bf.sample(target, seed=1, checkpoint=tmp_path, **SIZES)
    with pytest.raises(ValueError, match="holds no draws yet"):
        bf.load(tmp_path)


def test_memory_does_not_grow_with_the_draws(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "CHUNK_BYTES", 2 * 10 * 4 * 8)  # eight draws of two chains
    largest = [0]
    flush = checkpoint.Stream.flush

    def watched(self) -> None:
        largest[0] = max(largest[0], len(self._pending.get("theta", [])))
        flush(self)

    monkeypatch.setattr(checkpoint.Stream, "flush", watched)
    draws = bf.sample(
        model(), bf.SGLD(), seed=1, checkpoint=tmp_path, chains=2, warmup=0, draws=100
    )
    assert largest[0] <= 8
    same(draws, bf.sample(model(), bf.SGLD(), seed=1, chains=2, warmup=0, draws=100))


def test_folders_are_not_mixed_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    bf.sample(model(), seed=1, checkpoint=run, **SIZES)
    with pytest.raises(ValueError, match="already holds a run"):
        bf.sample(model(), seed=1, checkpoint=run, **SIZES)
    for other, what in (
        ({"seed": 2}, "seed is 1, not 2"),
        ({"chains": 3}, "chains is 2, not 3"),
        ({"method": bf.HMC(target_acceptance=0.7)}, "settings is"),
        ({"model": model(seed=5)}, "model is"),
        ({"dtype": torch.float64}, "dtype is torch.float32, not torch.float64|model is"),
    ):
        arguments = (
            {
                "model": model(),
                "method": bf.HMC(),
                "seed": 1,
                "checkpoint": bf.Checkpoint(run, resume=True),
            }
            | SIZES
            | other
        )
        with pytest.raises(ValueError, match=what):
            bf.sample(**arguments)
    (tmp_path / "other" / "rank-0").mkdir(parents=True)
    (tmp_path / "other" / "rank-0" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        bf.sample(model(), seed=1, checkpoint=tmp_path / "other", **SIZES)
    with pytest.raises(ValueError, match="takes steps"):
        bf.sample(model(), bf.VI(steps=5), checkpoint=tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------- one run at a time, and the whole of it


def start(tmp_path: Path, **changes) -> bf.Draws:
    place = bf.Checkpoint(tmp_path / "run", resume=changes.pop("resume", True))
    arguments = {"model": model(), "method": bf.SGLD(), "seed": 1, "checkpoint": place}
    return bf.sample(**(arguments | {"chains": 2, "warmup": 3, "draws": 12} | changes))


def test_a_run_has_its_folder_to_itself(tmp_path: Path, monkeypatch) -> None:
    """A second run is refused while the first one works, in this process or another.

    The draws can be read.
    """
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    target, found = model(), []
    own = target.log_joint_and_grad

    def meanwhile(*arguments, **options):
        if not found and (tmp_path / "run" / "rank-0" / "theta.bin").is_file():
            with pytest.raises(
                ValueError,
                match=rf"another run .process {os.getpid()} on .* is working on .*run",
            ):
                start(tmp_path, method=bf.HMC())
            found.append(bf.load(tmp_path / "run"))
        return own(*arguments, **options)

    target.log_joint_and_grad = meanwhile
    whole = start(tmp_path, model=target, method=bf.HMC())
    assert found
    assert torch.equal(found[0].theta, whole.theta[:, : found[0].n_draws])
    assert not (tmp_path / "run" / "rank-0" / ".lock").exists()
    same(start(tmp_path, method=bf.HMC()), whole)  # the folder is free again
    with pytest.raises(ValueError, match="takes steps"):
        start(tmp_path / "new", method=bf.VI(steps=5), resume=False)
    assert not (tmp_path / "new").exists()


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) * 3 // 4 :]
    else:
        content[len(content) * 3 // 4] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flip"])
@pytest.mark.parametrize("what", ["state", "theta.bin", "log_joint.bin", "n_steps.bin"])
def test_a_damaged_file_is_found_and_the_older_state_takes_over(
    what: str, how: str, tmp_path: Path, monkeypatch
) -> None:
    whole = start(tmp_path / "whole")
    start(tmp_path, draws=4)
    folder = tmp_path / "run" / "rank-0"
    earlier = {path.name for path in folder.glob("state-*")}
    start(tmp_path, draws=12)
    newest = max(folder.glob("state-*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(earlier) == 2
    damage(newest if what == "state" else folder / what, how)
    with pytest.warns(
        UserWarning,
        match=f"damaged: .*{newest.name if what == 'state' else what}.*sampling at step 4",
    ):
        assert torch.equal(bf.load(tmp_path / "run").theta, whole.theta[:, :4])
    with pytest.warns(UserWarning, match="damaged"):
        same(start(tmp_path), whole)
    assert torch.equal(bf.load(tmp_path / "run").theta, whole.theta)  # and is mended


@pytest.mark.parametrize("how", ["cut", "flip"])
def test_without_an_intact_state_a_run_is_refused(how: str, tmp_path: Path) -> None:
    start(tmp_path)
    start(tmp_path, draws=13)
    damage(tmp_path / "run" / "rank-0" / "theta.bin", how)
    content = (tmp_path / "run" / "rank-0" / "theta.bin").read_bytes()
    (tmp_path / "run" / "rank-0" / "theta.bin").write_bytes(
        content[:5] + b"?" + content[6:]
    )
    for attempt in (lambda: start(tmp_path), lambda: bf.load(tmp_path / "run")):
        with pytest.raises(ValueError, match=r"run.* is damaged: .*theta.bin"):
            attempt()


def test_a_run_killed_in_its_first_state_begins_again(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    folder = tmp_path / "run" / "rank-0"
    folder.mkdir(parents=True)
    (folder / "state-0.npz.1234.tmp").write_bytes(b"half")
    (folder / ".lock").write_text("process 1234 on this")
    same(start(tmp_path, resume=False), whole)
    assert not list(folder.glob("*.tmp"))
    (tmp_path / "other" / "run" / "rank-0").mkdir(parents=True)
    foreign = tmp_path / "other" / "run" / "rank-0" / "state-0.npz.notes"
    foreign.write_text("mine")
    with pytest.raises(ValueError, match=r"what it holds is no run: state-0.npz.notes"):
        start(tmp_path / "other")
    assert foreign.read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="must be a folder"):
        start(tmp_path, checkpoint=tmp_path / "file")


def test_a_run_of_the_first_version_can_be_read_and_not_gone_on_with(
    tmp_path: Path,
) -> None:
    shutil.copytree(Path(__file__).parent / "golden" / "run-v1", tmp_path / "run")
    draws = bf.load(tmp_path / "run")
    assert draws.theta.shape == (2, 3, 11)
    torch.testing.assert_close(
        model().log_joint(draws.theta), draws.log_joint, rtol=1e-4, atol=1e-3
    )
    with pytest.raises(ValueError, match="of an earlier bnnflow"):
        start(tmp_path, warmup=1)
    damage(tmp_path / "run" / "rank-0" / "theta.bin", "cut")
    with (
        pytest.warns(
            UserWarning, match=r"theta.bin has 198 bytes of 264.*sampling at step 0"
        ),
        pytest.raises(ValueError, match="no draws yet"),
    ):
        bf.load(tmp_path / "run")


def test_a_run_is_known_by_all_that_shapes_it(tmp_path: Path) -> None:
    target = model()
    theta = target.sample_prior(2, 0)

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    class ByTorch(bf.BayesianModel):
        is_compiled = False

    wide, wider = (
        bf.Gaussian(torch.zeros(11), torch.eye(11) * scale) for scale in (1, 1 + 1e-6)
    )
    slow = model()
    slow.__class__ = ByTorch
    differing = {
        "init": ({"init": theta}, {"init": theta + 1e-6}),
        "init of a network": (
            {"init": target.network_at(theta[0])},
            {"init": target.network_at(theta[1])},
        ),
        "seed": ({"seed": generator(1)}, {"seed": generator(2)}),
        "seed, an integer": ({"seed": 1}, {"seed": generator(1)}),
        "values of the settings": (
            {"method": bf.SMC(particles=10, start=wide), "warmup": None, "draws": None},
            {"method": bf.SMC(particles=10, start=wider)},
        ),
    }
    if target.is_compiled:
        differing["gradient"] = ({}, {"model": slow})
    for name, (first, second) in differing.items():
        where = tmp_path / name
        begun = start(where, **first)
        again = first | (
            {"seed": generator(1)} if isinstance(first.get("seed"), torch.Generator) else {}
        )
        same(start(where, **again), begun)
        what = name.partition(" of a")[0].partition(",")[0]
        with pytest.raises(
            ValueError, match=rf"(?s)holds another run: its ({what}|settings) is .*, not "
        ):
            start(where, **(first | second))


# ---------------------------------------- real processes

# Runs whose clock goes on by a second whenever they look at it, and that are killed at the look
# numbered DIE_AT.
SCRIPT = """
import itertools, os, signal, sys
from types import SimpleNamespace
import bnnflow as bf
from bnnflow.inference import checkpoint
from tests.test_runs import METHODS, model, names, sizes
rank, looks = os.environ.get("RANK", "0"), itertools.count()
fatal = int(os.environ.get("DIE_AT", "-1")) if rank == os.environ.get("DYING_RANK", "0") else -1
def look():
    now = next(looks)
    if now == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(now)
checkpoint.time = SimpleNamespace(monotonic=look)
checkpoint.SECONDS = {seconds}
for name in {chosen}:
    method = METHODS[names.index(name)]
    kept = bf.Checkpoint({folder!r} + name, resume=True)
    draws = bf.sample(model(), method, seed=3, checkpoint=kept, **(sizes(method) | {options}))
    if draws.info.get("interrupted"):
        sys.exit("interrupted")
    draws.save({out!r} + name + "-" + rank)
"""


def script(tmp_path: Path, *chosen: str, seconds: float = 1.0, **options) -> str:
    return SCRIPT.format(
        seconds=seconds, chosen=chosen, options=options,
        folder=str(tmp_path / "run-"), out=str(tmp_path / "draws-"),
    )  # fmt: skip


@pytest.mark.parametrize("name", one_in(2, ["HMC", "SMC"]))
def test_killed_again_and_again(name: str, tmp_path: Path) -> None:
    """SIGKILL at several steps; the run that gets through is the run that nobody touched."""
    program = script(tmp_path, name)
    for look in (6, 6):
        assert run(program, DIE_AT=str(look)) == -signal.SIGKILL
        assert list(tmp_path.rglob("state-*.npz"))
    assert run(program) == 0
    method = METHODS[names.index(name)]
    same(
        bf.load(tmp_path / f"draws-{name}-0.npz"),
        bf.sample(model(), method, seed=3, **sizes(method)),
    )


SHARED = ("HMC", "MCLMC", "ParallelTempering", "SMC")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of each of these methods by two processes."""
    folder = tmp_path_factory.mktemp("shared")
    path = folder / "script.py"
    path.write_text(script(folder, *SHARED, seconds=1e9))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *command, str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_share_a_run(name: str, shared: Path) -> None:
    first, second = (bf.load(shared / f"draws-{name}-{rank}.npz") for rank in (0, 1))
    same(first, second)
    alone = bf.sample(
        model(), METHODS[names.index(name)], seed=3, **sizes(METHODS[names.index(name)])
    )
    assert first.theta.shape == alone.theta.shape
    # the processes drew other numbers
    assert len(np.unique(first.theta[:, -1].numpy(), axis=0)) == 2
    torch.testing.assert_close(
        model().log_joint(first.theta), first.log_joint, rtol=1e-4, atol=1e-3
    )
    if name == "SMC":
        assert (
            abs(first.log_evidence[0] - alone.log_evidence[0])
            < 5 * first.log_evidence[1] + 1.5
        )


@pytest.mark.parametrize("name", ["HMC", "SMC"])
def test_a_rank_that_dies_does_not_lose_the_run(
    name: str, shared: Path, tmp_path: Path
) -> None:
    program = script(tmp_path, name)
    assert run_ranks(program, DYING_RANK="1", DIE_AT="6")[1] == -signal.SIGKILL
    assert list(tmp_path.rglob("state-*.npz"))
    assert run_ranks(program) == [0, 0]
    resumed = bf.load(tmp_path / f"draws-{name}-0.npz")
    same(resumed, bf.load(shared / f"draws-{name}-0.npz"))


UNLIKE = """
import os, torch, bnnflow as bf
from tests.test_runs import model

rank = int(os.environ["RANK"])
training = bf.Training(steps=2 + rank, batch_size=16)
posterior, another = model(), model(seed=rank)
prior = posterior.sample_prior(50, 0)
sizes = dict(chains=2, warmup=4, draws=4, seed=0)
calls = dict(
    model=lambda: bf.sample(another, bf.HMC(), **sizes),
    seed=lambda: bf.sample(posterior, bf.SMC(particles=20), seed=rank),
    draws=lambda: bf.sample(posterior, bf.HMC(), **sizes | dict(draws=4 + rank)),
    init=lambda: bf.sample(posterior, bf.HMC(), init=prior[rank], **sizes),
    settings=lambda: bf.sample(posterior, bf.HMC(target_acceptance=0.8 + 0.1 * rank), **sizes),
    training=lambda: bf.fit_flow(posterior, prior, velocity="weights", training=training),
)
said = []
for name, call in calls.items():
    try:
        call()
    except ValueError as error:
        said += [f"{{name}}: {{error}}"]
open(f"{folder}/said-{{rank}}", "w").write(chr(10).join(said))
bf.sample(posterior, bf.HMC(), **sizes)
"""


def test_processes_that_share_a_run_are_given_the_same(tmp_path: Path) -> None:
    assert run_ranks(UNLIKE.format(folder=tmp_path)) == [0, 0]
    for rank in (0, 1):
        said = (tmp_path / f"said-{rank}").read_text().splitlines()
        assert [each.split(":")[0] for each in said] == [
            "model",
            "seed",
            "draws",
            "init",
            "settings",
            "training",
        ]
        for each in said:
            name, _, message = each.partition(": ")
            assert message.startswith(f"{name} must be the same in all 2 processes")


RESUMED = """
import os, torch, bnnflow as bf
from tests.test_runs import model
from tests.problems import one_in

posterior = model()
draws = posterior.sample_prior(50, 0)


def fitted(steps, checkpoint=None):
    training = bf.Training(steps=steps, batch_size=16)
    return bf.fit_flow(
        posterior, draws, velocity="weights", training=training, checkpoint=checkpoint
    ).sample(20, 1)


path = "{folder}/training"
fitted(3, path)
resumed = fitted(6, bf.Checkpoint(path, resume=True))
rank = os.environ["RANK"]
open(f"{folder}/same-{{rank}}", "w").write(str(torch.equal(resumed, fitted(6))))
"""


def test_two_processes_go_on_with_a_training(tmp_path: Path) -> None:
    assert run_ranks(RESUMED.format(folder=tmp_path)) == [0, 0]
    assert [(tmp_path / f"same-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
