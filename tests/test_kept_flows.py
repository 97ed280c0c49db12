"""Trainings that are kept in a file: whose they are, that nobody shares them, and what is done
about damage.
"""

from __future__ import annotations

import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import storage
from bnnflow.transport import (
    AffinePath,
    Field,
    Matched,
    Matching,
    Source,
    WeightsVelocity,
    train,
    training_state,
)
from bnnflow.transport.times import Uniform
from tests.problems import built
from tests.test_storage import exact_values, informed_model

MODEL = informed_model(exact_values(4))
DRAWS = MODEL.sample_prior(40, 0)


def fit(file: Path, **changes: Any) -> bf.Flow:
    """Fit by a few steps, and go on with what the file holds.

    Changes name arguments, or fields of their values.
    """
    options = {"model": MODEL, "draws": DRAWS, "velocity": "weights", "progress": False}
    values = {
        "training": bf.Training(steps=4, batch_size=8),
        "matching": Matching(),
        "checkpoint": bf.Checkpoint(file, True),
    }
    for argument, value in values.items():
        own = {
            name: changes.pop(name)
            for name in {*changes} & {each.name for each in fields(value)}
        }
        options[argument] = replace(value, **own)
    return bf.fit_flow(**(options | changes))


def same(first: bf.Flow, second: bf.Flow) -> None:
    state = second.velocity.state_dict()
    assert all(
        torch.equal(value, state[name])
        for name, value in first.velocity.state_dict().items()
    )


def pairs(n: int, generator: torch.Generator, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, n, MODEL.dim, generator=generator)
    return x[0], x[1] + shift


def field() -> WeightsVelocity:
    return built(lambda: WeightsVelocity(MODEL.spec, 8, 1), torch.float32)


OTHERS: dict[str, dict[str, Any]] = {
    "model": {"model": informed_model(-exact_values(4))},
    "draws": {"draws": DRAWS + 1e-6},
    "draws with weights": {"draws": (DRAWS, torch.zeros(40))},
    "held-out draws": {"held_out": DRAWS[:8]},
    "seed": {"seed": 1},
    "seed, a generator": {"seed": torch.Generator().manual_seed(0)},
    "velocity": {"velocity": "residual"},
    "field": {"velocity": built(lambda: WeightsVelocity(MODEL.spec, 16, 1), torch.float32)},
    "coupling": {"coupling": Matched()},
    "path": {"path": AffinePath("variance_preserving")},
    "source": {"source": Source.scaled(MODEL, 1.1)},
    "targets": {"targets": "pairs"},
    "times": {"times": Uniform()},
    "batch_size": {"batch_size": 4},
    "reuse": {"reuse": 2},
    "learning_rate": {"learning_rate": 1e-3},
    "optimiser": {"optimiser": "adamw"},
    "autocast": {"autocast": True},
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training with a velocity by name, and one with a field."""
    folder = tmp_path_factory.mktemp("kept")
    fit(folder / "name")
    fit(folder / "field", velocity=field())
    return {"name": folder / "name.npz", "field": folder / "field.npz"}


@pytest.mark.parametrize("name", OTHERS)
def test_a_training_is_known_by_all_that_shapes_it(
    name: str, kept: dict[str, Path], tmp_path: Path
) -> None:
    file = shutil.copy(kept["field" if name == "field" else "name"], tmp_path / "flow.npz")
    before = file.read_bytes()
    what = name.partition(" with")[0].partition(",")[0]
    with pytest.raises(
        ValueError, match=f"flow.npz.* holds the training of another {what}: "
    ):
        fit(file, **OTHERS[name])
    assert file.read_bytes() == before


def test_what_may_change_may(kept: dict[str, Path], tmp_path: Path) -> None:
    file = shutil.copy(kept["name"], tmp_path / "flow.npz")
    more = fit(file, steps=6, patience=3, budget=1.0)
    assert more.info["steps"] == 6
    same(fit(file, steps=6), more)


@pytest.mark.parametrize("changes", [{}, {"seed": 5}, {"velocity": "residual"}])
def test_a_training_is_not_replaced_without_resume(
    changes: dict[str, Any], kept: dict[str, Path], tmp_path: Path
) -> None:
    file = shutil.copy(kept["name"], tmp_path / "flow.npz")
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match=r"flow\.npz already holds a training: go on with it by Checkpoint"
    ):
        fit(file, resume=False, **changes)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["flow", "flow.npz", "flow.bnn", "flow.v2"])
def test_a_training_is_resumed_whatever_its_file_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of both processes are those of one, and no step is made twice."""
    whole, counts = fit(tmp_path / "whole", steps=6), []
    step = training_state.TrainingState.step
    monkeypatch.setattr(
        training_state.TrainingState,
        "step",
        lambda self, *given: (counts.append(1), step(self, *given)),
    )
    fit(tmp_path / name, steps=3)
    same(fit(tmp_path / name, steps=6), whole)
    assert len(counts) == 6
    assert len(list(tmp_path.iterdir())) == 2


def test_pairs_of_ones_own_are_compared_by_their_first_batch(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "checkpoint": bf.Checkpoint(tmp_path / "own", resume=True),
        "progress": False,
    }
    few, more = bf.Training(steps=2, batch_size=8), bf.Training(steps=4, batch_size=8)
    train(field(), pairs, training=few, **options)
    with pytest.raises(ValueError, match="holds the training of other pairs"):
        train(
            field(), lambda n, generator: pairs(n, generator, 2.0), training=more, **options
        )
    train(field(), lambda n, generator: pairs(n, generator, 1.0), training=more, **options)


def test_a_training_has_its_file_to_itself(tmp_path: Path) -> None:
    file, refused = tmp_path / "flow", []

    def meanwhile(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if not refused:
            refused.append(True)
            with pytest.raises(
                ValueError, match=r"another run .process \d+ on .* is working on .*flow.npz"
            ):
                fit(file)
        return pairs(n, generator)

    train(
        field(),
        meanwhile,
        checkpoint=file,
        progress=False,
        training=bf.Training(steps=2, batch_size=8),
    )
    assert refused
    assert [each.name for each in tmp_path.iterdir()] == ["flow.npz"]


def test_what_is_no_checkpoint_is_neither_read_nor_replaced(
    kept: dict[str, Path], tmp_path: Path
) -> None:
    whole = kept["name"].read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    saved = fit(tmp_path / "flow").save(tmp_path / "saved")
    for content, message in (
        (b"my thesis", "was not written by bnnflow"),
        (whole[: len(whole) // 2], "or is damaged"),
        (bytes(flipped), "or is damaged"),
        (saved.read_bytes(), "holds 'flow', expected one of"),
    ):
        file = tmp_path / "other.npz"
        file.write_bytes(content)
        for resume in (True, False):
            with pytest.raises(
                ValueError, match=f"other.npz {message}|other.npz.*{message}"
            ):
                fit(file, resume=resume)
        assert file.read_bytes() == content
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ValueError, match=r"folder.npz is no file"):
        fit(tmp_path / "folder")


def test_a_training_of_an_earlier_version_is_refused(
    kept: dict[str, Path], tmp_path: Path
) -> None:
    header, arrays = storage.read(kept["name"], {"training": 3})
    old = {
        name: value
        for name, value in header.items()
        if name not in ("identity", "pairs", "version")
    }
    file = storage.write(tmp_path / "old", "training", 2, old, arrays)
    with pytest.raises(ValueError, match=r"old.npz is of an earlier bnnflow"):
        fit(file)


def test_a_state_of_other_shapes_is_refused(kept: dict[str, Path], tmp_path: Path) -> None:
    """To copy a number into a matrix would be to fill it."""
    header, arrays = storage.read(kept["name"], {"training": 3})
    values = {name: header[name] for name in header.keys() - {"format", "kind", "version"}}
    file = storage.write(
        tmp_path / "odd",
        "training",
        3,
        values,
        arrays | {"parameter/0": arrays["parameter/0"][:1, :1]},
    )
    with pytest.raises(ValueError, match=r"odd.npz: parameter 0 has another shape"):
        fit(file)


class Leaning(Field):
    """A field of the caller's own with a number that is not learned."""

    def __init__(self, lean: float) -> None:
        super().__init__()
        self.lean = lean
        self.level = torch.nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.level * x + self.lean


class Straight(Leaning):
    """The same parameters in other code."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.level * x


def test_a_field_says_what_it_does_not_know() -> None:
    plain = Field.of(built(lambda: torch.nn.Linear(3, 3)))
    assert not plain.has_closed_divergence
    with pytest.raises(NotImplementedError, match="a Linear has no closed divergence"):
        plain.closed_divergence(torch.tensor(0.5), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="a Linear is tied to its own weights"):
        plain.on(MODEL.spec)


def test_a_field_of_the_callers_own_is_known_by_its_code_and_attributes(
    tmp_path: Path,
) -> None:
    first = fit(tmp_path / "own", velocity=Leaning(0.5))
    same(first, fit(tmp_path / "own", velocity=Leaning(0.5)))
    for other in (Leaning(0.6), Straight(0.5)):
        with pytest.raises(ValueError, match=r"training of another (field|velocity)"):
            fit(tmp_path / "own", velocity=other)


class Own(nn.Module):
    """A field with something between its layers."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(MODEL.dim + 1, 16), between, nn.SiLU(), nn.Linear(16, MODEL.dim)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, t.to(x).reshape(-1, 1).expand(len(x), 1)], -1))


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (
            nn.BatchNorm1d(16),
            r"'net\.1\.running_mean' is written while the field is evaluated.* LayerNorm",
        ),
        (nn.BatchNorm1d(16, track_running_stats=False), "cannot take one row"),
        (Centred(), "makes a row's velocity depend on the other rows"),
    ],
)
def test_a_field_keeps_rows_apart_and_nothing_beside_its_weights(
    between: nn.Module, message: str
) -> None:
    own = built(lambda: Own(between), torch.float32)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    with pytest.raises(ValueError, match=f"velocity: .*{message}"):
        train(own, pairs, progress=False, training=bf.Training(steps=2, batch_size=8))
    assert own.training
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


class Plain(nn.Module):
    """A module as one writes it at first, for rows of t and x."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.net = nn.Linear(MODEL.dim + 1, outputs)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([t[:, None], x], 1))


class Beside(Plain):
    """It casts nothing, but makes one row of a scalar."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(t.expand(len(x)), x)


def test_times_have_the_type_of_the_points() -> None:
    own = built(lambda: Beside(MODEL.dim), torch.float32)
    options = {"training": bf.Training(steps=2, batch_size=8), "progress": False}
    flow = bf.fit_flow(MODEL, DRAWS, velocity=own, **options)
    assert flow.log_prob(flow.sample(3, 0)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Beside(1), r"must return \(4, \d+\) for so many points, got \(4, 1\)"),
        (lambda: Plain(MODEL.dim), r"must take a scalar t too.* serves both"),
    ],
)
def test_fields_of_the_wrong_shape_are_refused_before_training(
    make: Any, message: str
) -> None:
    own = built(make, torch.float32)
    with pytest.raises(ValueError, match=f"velocity: the field {message}"):
        train(own, pairs, progress=False, training=bf.Training(steps=2, batch_size=8))


def test_a_frozen_normalisation_is_a_constant_of_the_field() -> None:
    own = built(lambda: Own(nn.BatchNorm1d(16).eval()), torch.float32)
    train(own, pairs, progress=False, training=bf.Training(steps=2, batch_size=8))
    assert torch.equal(own.net[1].running_mean, torch.zeros(16))


def test_dropout_in_a_field_follows_the_seed(
    seeded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the global generator, and whether or not a training was broken off."""

    def fitted(**options: Any) -> Tensor:
        own = built(lambda: Own(nn.Dropout(0.5)), torch.float32)
        train(
            own,
            pairs,
            progress=False,
            training=bf.Training(steps=6, batch_size=8),
            **options,
        )
        return torch.cat([value.flatten() for value in own.state_dict().values()])

    whole = fitted()
    with seeded(7):
        assert torch.equal(fitted(), whole)
    assert not torch.equal(fitted(seed=1), whole)
    step, counts = training_state.TrainingState.step, []

    def stopping(self: Any, *given: Any) -> None:
        counts.append(step(self, *given))
        if len(counts) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training_state.TrainingState, "step", stopping)
    with pytest.warns(UserWarning, match="after 3 steps"):
        fitted(checkpoint=tmp_path / "run")
    monkeypatch.setattr(training_state.TrainingState, "step", step)
    assert torch.equal(
        fitted(checkpoint=bf.Checkpoint(tmp_path / "run", resume=True)), whole
    )


@pytest.mark.parametrize("reuse", [1, 3])
def test_ctrl_c_waits_for_the_end_of_a_step(
    reuse: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole", reuse=reuse)
    step, counts = training_state.TrainingState.step, []

    def stopping(self: Any, *given: Any) -> None:
        counts.append(None)
        if len(counts) == 2:
            signal.raise_signal(signal.SIGINT)
        step(self, *given)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(training_state.TrainingState, "step", stopping)
    with pytest.warns(UserWarning, match="after 2 steps"):
        assert fit(tmp_path / "run", reuse=reuse).info["interrupted"]
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(training_state.TrainingState, "step", step)
    resumed = fit(tmp_path / "run", reuse=reuse)
    for name, value in whole.velocity.state_dict().items():
        assert torch.equal(resumed.velocity.state_dict()[name], value)
