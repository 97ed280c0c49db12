"""A fuzzer of files: whatever happens to one, it is read as it was, or refused by a ``ValueError``
that names it.
"""

from __future__ import annotations

import json
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bnnflow as bf
from bnnflow import WeightSpec, storage
from bnnflow.posteriors import (
    Conditional,
    CouplingFlow,
    KroneckerGaussian,
    LowRankGaussian,
    Mixture,
)
from bnnflow.transport import (
    Flow,
    FlowMap,
    ResidualVelocity,
    Source,
    TwoLayerVelocity,
    WeightsVelocity,
)
from tests import test_storage as made
from tests.problems import built, chain, one_in

GOLDEN = Path(__file__).parent / "golden"
MODEL = made.informed_model(made.exact_values(4))
ONES = torch.ones(3)
KRONECKER = KroneckerGaussian(
    ONES[:2], (torch.eye(2),), (torch.eye(1),), (torch.ones(2, 1),)
)
SIGNED = WeightSpec.of(
    built(lambda: chain(2, 3, 1, activation=torch.nn.Tanh), torch.float32)
)


KINDS = ("draws", "inrs", "flow", "manifold-flow", "completed-flow", "in-coordinates")


def flow(velocity: Callable[[], torch.nn.Module], **source: Any) -> Flow:
    field = built(velocity, torch.float32).requires_grad_(False)
    spec = getattr(field, "spec", MODEL.spec)
    return Flow(
        field.eval(),
        Source(MODEL.flat_prior, **source),
        spec,
        MODEL.fingerprint(),
        info={"steps": 1},
    )


def draws(posterior: Any) -> bf.Draws:
    return bf.Draws(
        torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.float64), posterior=posterior
    )


def coupling() -> CouplingFlow:
    from bnnflow.posteriors import coupling_flow

    orders = (torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0]))
    with torch.random.fork_rng():
        parameters = coupling_flow(orders, 3, 4).parameters()
        return CouplingFlow(orders, tuple(each.detach().clone() for each in parameters))


MADE: dict[str, Callable[[], Any]] = {
    "draws": made.example,
    "draws of a low-rank density": lambda: draws(
        LowRankGaussian(ONES, torch.ones(3, 1), ONES)
    ),
    "draws of a mixture": lambda: draws(
        Mixture((bf.Gaussian(ONES, ONES), bf.Gaussian(2 * ONES, ONES)))
    ),
    "draws of a restricted density": lambda: draws(
        Conditional(ONES, torch.tensor([0, 2]), KRONECKER)
    ),
    "draws of couplings": lambda: draws(coupling()),
    "inrs": made.example_inrs,
    "weights flow": lambda: flow(lambda: WeightsVelocity(MODEL.spec, 4, 1)),
    "signed flow": lambda: flow(
        lambda: WeightsVelocity(SIGNED, 4, 1, architecture="signed", heads=2)
    ),
    "graph flow": lambda: flow(
        lambda: WeightsVelocity(MODEL.spec, 4, 1, architecture="graph"), root=1.5
    ),
    "residual flow": lambda: flow(
        lambda: ResidualVelocity.fit(MODEL.spec, MODEL.sample_prior(30, 0), 4, 1)
    ),
    "two-layer flow": lambda: flow(
        lambda: TwoLayerVelocity(MODEL.dim, 4), loc=torch.ones(MODEL.dim)
    ),
    "informed flow": made.example_informed_flow,
    "flow on rows": lambda: made.example_informed_flow().on_batch(2, 0),
    "flow map": lambda: FlowMap(
        *_parts(made.example_informed_flow()), torch.tensor([0.0, 0.5, 1.0]), {"steps": 1}
    ),
    "manifold-flow": made.example_manifold_flow,
    "completed-flow": made.example_completed_flow,
    "in-coordinates": made.example_density,
}


def _parts(whole: Flow) -> tuple[Any, ...]:
    return whole.velocity, whole.source, whole.spec


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of file that is written today, and those of earlier versions."""
    folder = tmp_path_factory.mktemp("files")
    written = {
        name: make().save(folder / name.replace(" ", "-")) for name, make in MADE.items()
    }
    return written | {path.name: path for path in sorted(GOLDEN.glob("*.npz"))}


NAMES = [*MADE, *(path.name for path in sorted(GOLDEN.glob("*.npz")))]


def load(path: Path) -> Any:
    needs = "informed" in path.name or "on-rows" in path.name or "flow-map" in path.name
    return bf.load(path, MODEL if needs else None)


def written_again(value: Any, folder: Path) -> tuple[Any, dict[str, bytes]]:
    header, arrays = storage.read(
        value.save(folder / "again.npz"), {"flow-map": 1, **dict.fromkeys(KINDS, 2)}
    )
    return header, {
        name: each.tobytes() + str(each.shape).encode() for name, each in arrays.items()
    }


def outcome(path: Path, expected: Any) -> str:
    """Load a file and say how it went; fail unless it went as it must."""
    try:
        found = load(path)
    except ValueError as error:
        return (
            "refused" if str(path) in str(error) else f"refused without its name: {error}"
        )
    assert expected is None or written_again(found, path.parent) == expected
    return "equal" if expected is not None else "taken"


def harmed(whole: bytes, chance: random.Random, count: int) -> Iterator[bytes]:
    """Cut a file short, flip bits of it, and overwrite stretches, at places that the seed
    decides.
    """
    for _ in range(count):
        at = chance.randrange(len(whole))
        yield whole[:at]
        yield whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
        length = min(chance.randrange(1, 64), len(whole) - at)
        yield whole[:at] + chance.randbytes(length) + whole[at + length :]
    # the list of the arrays, on which all else hangs
    for at in range(1, min(90, len(whole)), 3):
        yield whole[:-at] + bytes([whole[-at] ^ 1 << at % 8]) + whole[len(whole) - at + 1 :]


@pytest.mark.parametrize("name", one_in(2, NAMES[::-1]))
def test_a_damaged_file_is_read_as_it_was_or_refused_by_name(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    whole, path = files[name].read_bytes(), tmp_path / files[name].name
    path.write_bytes(whole)
    expected = written_again(load(path), tmp_path)
    seen = []
    for content in harmed(whole, random.Random(name), 8):
        path.write_bytes(content)
        seen.append(outcome(path, expected))
    assert set(seen) <= {"refused", "equal"}
    assert seen.count("refused") > 24


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**7,
    10**30,
    1.5,
    float("nan"),
    "",
    "../x",
    [],
    [[]],
    {},
    [1],
    {"kind": "gaussian"},
)
DEEP = "[" * 100_000 + "]" * 100_000


def altered(value: Any, chance: random.Random) -> Any:
    """Return a header with one entry, however deep, left out or replaced by something odd."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        if chance.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        return value | {key: altered(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        return [*value[:at], altered(value[at], chance), *value[at + 1 :]]
    return chance.choice(ODD)


def rewrite(path: Path, text: str, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, header=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", one_in(2, NAMES))
def test_a_hostile_file_is_taken_at_its_word_or_refused_by_name(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    """Headers and arrays are replaced in well-formed archives: nothing raises what it should not,
    nor takes long.
    """
    header, arrays = storage.read(files[name], dict.fromkeys((*KINDS, "flow-map"), 9))
    path, chance = tmp_path / files[name].name, random.Random(name)
    for _ in range(15):
        rewrite(path, json.dumps(altered(header, chance)), arrays)
        assert outcome(path, None) in ("refused", "taken")
    for key in chance.sample(sorted(arrays), min(6, len(arrays))):
        for other in (
            None,
            arrays[key][:0] if arrays[key].ndim else None,
            arrays[key].astype(str),
            np.zeros((2, 2, 2)),
        ):
            rewrite(
                path,
                json.dumps(header),
                {n: v for n, v in (arrays | {key: other}).items() if v is not None},
            )
            assert outcome(path, None) in ("refused", "taken")
    rewrite(path, DEEP, arrays)
    assert outcome(path, None) == "refused"


@pytest.mark.parametrize("number", [10**7, 10**12])
@pytest.mark.parametrize("key", ["depth", "width", "heads", "dim"])
def test_no_field_is_built_that_is_larger_than_its_file(
    key: str, number: int, files: dict[str, Path], tmp_path: Path
) -> None:
    for name in (
        "signed flow",
        "residual flow",
        "two-layer flow",
        "informed flow",
        "manifold-flow",
    ):
        header, arrays = storage.read(files[name], dict.fromkeys((*KINDS, "flow-map"), 9))
        velocity = header["velocity"]
        place = (
            velocity["gaussian"] if key == "dim" and "gaussian" in velocity else velocity
        )
        if key not in place:
            continue
        place[key] = number
        rewrite(tmp_path / files[name].name, json.dumps(header), arrays)
        with pytest.raises(
            ValueError, match=f"a field of {key} {number} has more numbers than the"
        ):
            load(tmp_path / files[name].name)


def test_no_array_is_longer_than_its_file(tmp_path: Path) -> None:
    """Neither what compression blows up nor what a head promises is ever allocated."""
    path = made.example().save(tmp_path / "draws.npz")
    arrays = dict(np.load(path))
    np.savez_compressed(
        path, **(arrays | {"theta": np.zeros((100, 1000, 100), np.float32)})
    )
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"draws.npz .*its arrays are compressed"):
        bf.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                shape = (10**9, 10**3) if name == "theta" else values.shape
                head = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, head)
                file.write(values.tobytes())
    with pytest.raises(ValueError, match=r"array 'theta' is not as long as its shape"):
        bf.load(path)
    spec = {
        "shapes": [["0.weight", [10**6, 10**6], [None, None]]],
        "activations": {},
        "layers": [],
        "extras": [],
    }
    storage.write(
        path,
        "inrs",
        1,
        {"spec": spec, "info": {}},
        {"theta": np.zeros((1, 1)), "mse": np.zeros(1)},
    )
    with pytest.raises(ValueError, match=r"draws.npz: a space of 1000000000000 weights"):
        bf.load(path)


def test_a_damaged_run_is_read_as_it_was_or_refused_by_name(tmp_path: Path) -> None:
    """The same for the folder of a run: what is loaded is what was drawn, or an older part of it
    with a warning.
    """
    x = torch.linspace(-1, 1, 8).unsqueeze(-1)
    line = built(lambda: torch.nn.Linear(1, 1), torch.float32)
    model = bf.BayesianModel(line, bf.priors.Normal(), bf.likelihoods.Gaussian(0.5), x, x)
    for n in (3, 6):
        whole = bf.sample(
            model,
            bf.SGLD(),
            chains=2,
            warmup=0,
            draws=n,
            seed=0,
            checkpoint=bf.Checkpoint(tmp_path / "run", resume=True),
        ).theta.clone()
    chance, seen = random.Random(0), []
    for path in sorted((tmp_path / "run" / "rank-0").iterdir()):
        kept = path.read_bytes()
        for content in [*harmed(kept, chance, 4)][:30]:
            path.write_bytes(content)
            with pytest.MonkeyPatch.context() as patch:
                told: list[Any] = []
                patch.setattr(
                    "warnings.warn", lambda *given, told=told, **_: told.append(given)
                )
                try:
                    found = bf.load(tmp_path / "run").theta
                except ValueError as error:
                    seen.append(
                        "refused" if str(tmp_path / "run") in str(error) else str(error)
                    )
                    continue
            assert torch.equal(found, whole[:, : found.shape[1]])
            assert found.shape[1] == 6 or told
            seen.append("equal" if found.shape[1] == 6 else "older")
        path.write_bytes(kept)
    assert {*seen} == {"equal", "older", "refused"}


def test_a_hostile_state_is_gone_on_with_or_refused_by_name(tmp_path: Path) -> None:
    """Entries of a state are left out or replaced, in a well-formed file."""
    x = torch.linspace(-1, 1, 8).unsqueeze(-1)
    line = built(lambda: torch.nn.Linear(1, 1), torch.float32)
    model = bf.BayesianModel(line, bf.priors.Normal(), bf.likelihoods.Gaussian(0.5), x, x)

    def run(draws: int) -> torch.Tensor:
        return bf.sample(
            model,
            bf.SGLD(),
            chains=2,
            warmup=0,
            draws=draws,
            seed=0,
            checkpoint=bf.Checkpoint(tmp_path / "run", resume=True),
        ).theta.clone()

    def attempt() -> str:
        try:
            run(5)
        except ValueError as error:
            return "refused" if str(tmp_path / "run") in str(error) else str(error)
        return "taken"

    run(3)
    folder, chance = tmp_path / "run" / "rank-0", random.Random(0)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in folder.glob("state-*.npz"):
            header, arrays = storage.read(path, {"checkpoint": 9})
            changes = [(altered(header, chance), arrays) for _ in range(30)]
            changes += [
                (header, {n: v for n, v in arrays.items() if n != name}) for name in arrays
            ]
            for text, values in changes:
                rewrite(path, json.dumps(text), values)
                seen.add(attempt())
                for each, content in kept.items():
                    each.write_bytes(content)
    assert seen == {"taken", "refused"}
