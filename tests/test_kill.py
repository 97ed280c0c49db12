"""Sequences of SIGKILL, of two processes at once, and of damage: a run ends exact to the bit, or is
refused by name.

A sequence is one folder or file and several processes, one after another or together. Each process
is forked, and dies at a moment that the seed decides: at the k-th time that it opens, writes,
syncs, renames or locks something, before or after or halfway through, or (``signal``) when its
parent's signal happens to reach it. The last one is let through.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import storage
from bnnflow.equivariant import fit_inrs, siren
from bnnflow.inference import checkpoint
from bnnflow.transport import Matching, training
from tests.processes import run

EXACT, REFUSED, KILLED = 0, 3, -signal.SIGKILL
MODES = ("kills", "first state", "signal", "two at once", "damage")


def model() -> bf.BayesianModel:
    x = torch.linspace(-1.5, 1.5, 6).unsqueeze(-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
    return bf.BayesianModel(
        net, bf.priors.Normal(), bf.likelihoods.Gaussian(0.3), x, x.sin()
    )


def sampled(method: Any, **sizes: int) -> Callable[[Path | None], torch.Tensor]:
    def run(place: Path | None) -> torch.Tensor:
        given = (
            {}
            if place is None
            else {"checkpoint": bf.Checkpoint(place / "run", resume=True)}
        )
        draws = bf.sample(
            model(),
            method,
            chains=2,
            seed=3,
            init="prior",
            progress=False,
            **sizes,
            **given,
        )
        numbers = [
            draws.theta.flatten(),
            draws.log_joint.flatten(),
            *(v.flatten() for v in draws.stats.values()),
        ]
        return torch.cat([each.double() for each in numbers])

    return run


def smc(place: Path | None) -> torch.Tensor:
    given = (
        {} if place is None else {"checkpoint": bf.Checkpoint(place / "run", resume=True)}
    )
    draws = bf.sample(
        model(), bf.SMC(particles=10, moves=1), chains=2, seed=3, progress=False, **given
    )
    assert draws.log_weights is not None
    return torch.cat([draws.theta.flatten().double(), draws.log_weights.flatten()])


def flow(place: Path | None) -> torch.Tensor:
    """A field of weights on the draws, with a generator of its own, for a few steps."""
    own = model()
    given = (
        {} if place is None else {"checkpoint": bf.Checkpoint(place / "run", resume=True)}
    )
    fitted = bf.fit_flow(
        own,
        own.sample_prior(30, 0),
        velocity="weights",
        progress=False,
        training=bf.Training(steps=5, batch_size=8),
        matching=Matching(targets="pairs"),
        **given,
    )
    return torch.cat(
        [value.flatten().double() for value in fitted.velocity.state_dict().values()]
    )


def inrs(place: Path | None) -> torch.Tensor:
    x = torch.linspace(-1, 1, 10).unsqueeze(-1)
    given = (
        {} if place is None else {"checkpoint": bf.Checkpoint(place / "run", resume=True)}
    )
    waves = (torch.arange(1.0, 5).unsqueeze(-1) * x.T).sin()
    return fit_inrs(
        x, waves, siren(1, 1, (4,)), steps=2, chunk=1, seed=0, progress=False, **given
    ).theta.double()


WORK: dict[str, Callable[[Path | None], torch.Tensor]] = {
    "HMC": sampled(bf.HMC(max_leapfrog=4), warmup=3, draws=5),
    "SGLD": sampled(bf.SGLD(batch_size=3, thinning=1), warmup=2, draws=6),
    "SMC": smc,
    "fit_flow": flow,
    "fit_inrs": inrs,
}


# ---------------------------------------- one process


class Fate:
    """Kill this process at the ``at``-th event of its way to disk; without a number, count them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def event(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str, *, half: bool = False) -> None:
        """Make events before and after a function.

        ``half``: and with half of the file that it has written.
        """
        function = getattr(owner, name)

        def watched(*given: Any, **options: Any) -> Any:
            self.event()
            result = function(*given, **options)
            if half:
                self.count += 1
                if self.count == self.at:
                    file = given[0]
                    file.flush()
                    file.truncate(file.tell() // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            self.event()
            return result

        setattr(owner, name, watched)

    def watch(self) -> None:
        self.around(os, "fsync")
        self.around(os, "replace")
        self.around(os, "mkdir")
        self.around(np, "savez", half=True)
        self.around(storage.fcntl, "flock")
        self.around(checkpoint.Stream, "flush")


def process(work: str, place: Path, at: int | None, wait: Path | None = None) -> int:
    """Start a process on a place and return its number.

    It ends in EXACT, REFUSED or KILLED, or tells what it met.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        checkpoint.SECONDS = training.SECONDS = -1.0  # a state after every step
        warnings.simplefilter("ignore")
        fate = Fate(at)
        fate.watch()
        while wait is not None and not wait.exists():
            time.sleep(0.001)
        values = WORK[work](place)
        np.save(place / f"values-{os.getpid()}.npy", values.numpy())
        (place / "events").write_text(str(fate.count))
        code = EXACT
    except ValueError as error:
        named = str(place / "run") in str(error)
        (place / f"told-{os.getpid()}").write_text(str(error))
        code = REFUSED if named else 1
    except BaseException:
        (place / f"told-{os.getpid()}").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def told(place: Path) -> str:
    return "; ".join(path.read_text()[-1500:] for path in place.glob("told-*"))


def exact(place: Path, expected: np.ndarray) -> bool:
    found = list(place.glob("values-*.npy"))
    return bool(found) and all(
        np.array_equal(np.load(path), expected, equal_nan=True) for path in found
    )


# ---------------------------------------- sequences


def damage(place: Path, chance: random.Random) -> None:
    files = sorted(
        path
        for path in place.rglob("*")
        if path.is_file() and path.suffix in (".npz", ".bin")
    )
    if not files:
        return
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    if not content:
        return
    at = chance.randrange(len(content))
    if chance.random() < 0.5:
        del content[at:]
    else:
        content[at] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def sequence(
    work: str, mode: str, seed: int, place: Path, events: int, expected: np.ndarray
) -> tuple[str, int]:
    """Play one sequence; say how it ended, and how many processes were killed on the way."""
    chance = random.Random(f"{work} {mode} {seed}")
    place.mkdir(parents=True)
    killed = 0
    for _ in range(1 if mode == "damage" else 3):
        at = chance.randrange(1, 16 if mode == "first state" else events + 1)
        if mode == "two at once":
            start = place / "start"
            start.unlink(missing_ok=True)
            children = [
                process(work, place, at if i == 0 else None, start) for i in range(2)
            ]
            start.touch()
        else:
            children = [process(work, place, None if mode == "signal" else at)]
        if mode == "signal":
            time.sleep(chance.random() * 0.15)
            os.kill(children[0], signal.SIGKILL)
        codes = [end(child) for child in children]
        killed += codes.count(KILLED)
        if 1 in codes or not {*codes} <= {EXACT, REFUSED, KILLED}:
            return f"failed: {codes} {told(place)}", killed
        if mode != "two at once" and REFUSED in codes:
            return f"failed: refused though nobody else was there: {told(place)}", killed
        if (
            mode == "two at once"
            and REFUSED in codes
            and "is working on" not in told(place)
        ):
            return f"failed: refused for another reason: {told(place)}", killed
    if mode == "damage":
        damage(place, chance)
    code = end(process(work, place, None))
    left = [str(path) for path in place.rglob("*") if path.name.endswith((".tmp", ".lock"))]
    if code == EXACT and exact(place, expected):
        return ("exact" if not left else f"failed: it left {left}"), killed
    if code == REFUSED and mode == "damage":
        return "refused by name", killed
    return f"failed: {code} {told(place)}", killed


def play(
    works: list[str], modes: list[str], count: int, folder: Path
) -> tuple[dict[str, int], int]:
    """Play ``count`` sequences of every work and mode.

    Count how they ended, and the processes that were killed.
    """
    torch.set_num_threads(1)
    ends: Counter[str] = Counter()
    kills = 0
    for work in works:
        whole = folder / work / "whole"
        whole.mkdir(parents=True)
        expected = WORK[work](None).numpy()
        assert end(process(work, whole, None)) == EXACT, told(whole)
        assert exact(whole, expected)
        events = int((whole / "events").read_text())
        for mode in modes:
            for seed in range(count):
                place = folder / work / mode.replace(" ", "-") / str(seed)
                how, killed = sequence(work, mode, seed, place, events, expected)
                ends[f"{work}, {mode}: {how}"] += 1
                kills += killed
    return dict(ends), kills


def played(
    works: list[str], modes: list[str], count: int, folder: Path
) -> tuple[dict[str, int], int]:
    """The same in a process of its own, which forks safely: it has one thread."""
    given = (works, modes, count, folder)
    program = f"""
import json
from pathlib import PosixPath
from tests.test_kill import play
PosixPath({str(folder / "ends.json")!r}).write_text(json.dumps(play(*{given!r})))
"""
    folder.mkdir(exist_ok=True)
    assert run(program, CUDA_VISIBLE_DEVICES="") == 0
    ends, kills = json.loads((folder / "ends.json").read_text())
    return ends, kills


def check(ends: dict[str, int], kills: int, count: int) -> None:
    failed = [each for each in ends if "failed" in each]
    assert not failed, "\n".join(failed)
    assert sum(ends.values()) == count
    assert kills >= count  # most sequences hold more than one


@pytest.mark.slow
def test_a_few_sequences_end_exact_or_refused_by_name(tmp_path: Path) -> None:
    check(*played(["SGLD", "fit_flow"], list(MODES), 1, tmp_path), 10)


@pytest.mark.validate
@pytest.mark.parametrize("work", WORK)
def test_three_hundred_sequences_end_exact_or_refused_by_name(
    work: str, tmp_path: Path
) -> None:
    """Sixty of every work."""
    ends, kills = played([work], list(MODES), 12, tmp_path)
    print(json.dumps(ends, indent=1), f"{kills} kills")
    check(ends, kills, 60)
