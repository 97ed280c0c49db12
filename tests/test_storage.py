"""Laws of what is saved: it comes back exactly, old files stay readable, and foreign ones are
refused.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bnnflow as bf
from bnnflow import WeightSpec, priors, storage
from bnnflow.equivariant import INRs, siren
from bnnflow.symmetry import Spheres
from bnnflow.transport import (
    CompletedFlow,
    Correction,
    Field,
    Flow,
    GaussNewton,
    GradientSteps,
    GuidedVelocity,
    InformedVelocity,
    ManifoldFlow,
    Radii,
    ScoreVelocity,
    Solver,
    Source,
    TangentVelocity,
    TransformedDensity,
    fit_coupling,
    fit_gaussian,
)
from bnnflow.transport.whitened import WhitenedPosterior
from tests.problems import built, chain, linear

GOLDEN = Path(__file__).parent / "golden" / "draws-v1.npz"
GOLDEN_INRS = GOLDEN.with_name("inrs-v1.npz")


def example(dtype: torch.dtype = torch.float32) -> bf.Draws:
    """Return the draws that the golden file holds, which no later version may change."""
    theta = torch.arange(12, dtype=dtype).reshape(2, 2, 3) / 8 - 0.5
    return bf.Draws(
        theta,
        torch.tensor([[-1.5, -2.5], [-3.5, -4.25]], dtype=torch.float64),
        {
            "acceptance_rate": torch.tensor([[0.5, 1.0], [0.25, 0.75]]),
            "diverging": torch.tensor([[False, True]] * 2),
        },
        log_weights=torch.tensor([[-0.5, -1.0], [-1.5, -2.0]], dtype=torch.float64),
        log_evidence=(-12.5, 0.25),
        posterior=bf.Gaussian(
            torch.tensor([1.0, 2.0, 3.0], dtype=dtype),
            torch.tensor([0.5, 0.25, 2.0], dtype=dtype),
        ),
        info={"method": "HMC", "step_size": 0.125, "interrupted": False, "divergences": 2},
    )


def check_equal(found: bf.Draws, expected: bf.Draws) -> None:
    assert torch.equal(found.theta, expected.theta)
    assert found.theta.dtype == expected.theta.dtype
    assert torch.equal(found.log_joint, expected.log_joint)
    assert found.log_joint.dtype == torch.float64
    assert found.stats.keys() == expected.stats.keys()
    for name, values in expected.stats.items():
        assert found.stats[name].dtype == values.dtype
        assert torch.equal(found.stats[name], values)
    assert (found.log_weights is None) == (expected.log_weights is None)
    if expected.log_weights is not None:
        assert torch.equal(found.log_weights, expected.log_weights)
    assert found.log_evidence == expected.log_evidence
    assert found.info == expected.info
    assert type(found.posterior) is type(expected.posterior)
    if isinstance(expected.posterior, bf.Gaussian):
        assert torch.equal(found.posterior.loc, expected.posterior.loc)
        assert torch.equal(found.posterior.scale_tril, expected.posterior.scale_tril)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_come_back_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    draws = example(dtype)
    path = draws.save(tmp_path / "draws.npz")
    check_equal(bf.Draws.load(path), draws)
    loaded = bf.load(path)
    assert isinstance(loaded, bf.Draws)
    check_equal(loaded, draws)


def test_draws_without_anything_optional(tmp_path: Path) -> None:
    draws = bf.Draws(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.float64))
    check_equal(bf.Draws.load(draws.save(tmp_path / "bare.npz")), draws)


@pytest.mark.parametrize(
    "method",
    [bf.HMC(), bf.VI(steps=10), bf.DeepEnsemble(2, 5)],
    ids=lambda m: type(m).__name__,
)
def test_what_samplers_return_can_be_saved(method, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        net = torch.nn.Linear(2, 1)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    model = bf.BayesianModel(
        net, bf.priors.Normal(), bf.likelihoods.Gaussian(), x, x.sum(1)
    )
    sizes = {"chains": 2, "draws": 3, "warmup": 5} if isinstance(method, bf.HMC) else {}
    draws = bf.sample(model, method, seed=0, **sizes)
    check_equal(bf.Draws.load(draws.save(tmp_path / "draws.npz")), draws)


def test_a_correction_comes_back_as_one(tmp_path: Path) -> None:
    draws = example()
    fixed = Correction(
        **(
            vars(draws)
            | {
                "info": {
                    "correction": "importance",
                    "khat": 0.3,
                    "ess": 5.0,
                    "verdict": "trust",
                }
            }
        )
    )
    found = bf.load(fixed.save(tmp_path / "fixed"))
    assert isinstance(found, Correction)
    assert (found.method, found.khat, found.ess, found.verdict) == (
        "importance",
        0.3,
        5.0,
        "trust",
    )
    assert type(bf.load(draws.save(tmp_path / "draws"))) is bf.Draws


def test_the_golden_file_stays_readable() -> None:
    check_equal(bf.Draws.load(GOLDEN), example())


def test_todays_files_have_the_layout_of_the_golden_one(tmp_path: Path) -> None:
    """A change here needs a new format version, a new golden file, and a reader that still knows
    the old one.
    """
    with np.load(example().save(tmp_path / "now.npz")) as now, np.load(GOLDEN) as golden:
        assert sorted(now.files) == sorted(golden.files)
        for name in golden.files:
            assert np.array_equal(now[name], golden[name])


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("draws", "draws.npz"),
        ("draws.npz", "draws.npz"),
        ("run.1.bin", "run.1.bin"),
        ("new/folder/draws", "new/folder/draws.npz"),
    ],
)
def test_paths(given: str, written: str, tmp_path: Path) -> None:
    assert example().save(tmp_path / given) == tmp_path / written
    check_equal(bf.load(str(tmp_path / written)), example())


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = example().save(tmp_path / "draws.npz")
    broken = bf.Draws(torch.zeros(1, 1, 1), torch.zeros(1, 1), info={"what": object()})
    with pytest.raises(TypeError, match="JSON"):
        broken.save(path)

    class Stops:
        def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write(path, "draws", 1, {}, {"theta": Stops()})  # type: ignore[dict-item]
    assert [each.name for each in tmp_path.iterdir()] == ["draws.npz"]
    check_equal(bf.Draws.load(path), example())


def test_files_have_the_permissions_of_any_other(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    path = example().save(tmp_path / "draws.npz")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    with zipfile.ZipFile(example().save(tmp_path / "draws.npz")) as file:
        for name in file.namelist():
            with file.open(name) as member:
                np.lib.format.read_array(member, allow_pickle=False)


# ---------------------------------------- implicit neural representations


def example_inrs(dtype: torch.dtype = torch.float32) -> INRs:
    """Return the networks that the golden file holds, which no later version may change."""
    spec = WeightSpec.of(siren(1, 2, (3,), w0=5.0))
    theta = torch.arange(2 * spec.dim, dtype=dtype).reshape(2, -1) / 8 - 1
    mse = torch.tensor([0.125, float("inf")], dtype=torch.float64)
    return INRs(
        theta,
        spec,
        mse,
        {"steps": 5, "learning_rate": 0.25, "batch_size": None, "diverged": 1},
    )


def check_equal_inrs(found: object, expected: INRs) -> None:
    assert isinstance(found, INRs)
    assert torch.equal(found.theta, expected.theta)
    assert found.theta.dtype == expected.theta.dtype
    assert torch.equal(found.mse, expected.mse)
    assert found.mse.dtype == torch.float64
    assert found.spec.describe() == expected.spec.describe()
    assert found.info == expected.info


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inrs_come_back_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    fits = example_inrs(dtype)
    path = fits.save(tmp_path / "fits")
    assert path == tmp_path / "fits.npz"
    check_equal_inrs(INRs.load(path), fits)
    check_equal_inrs(bf.load(path), fits)
    with pytest.raises(ValueError, match=r"holds 'inrs', expected one of \['draws'\]"):
        bf.Draws.load(path)


def test_the_golden_inrs_stay_readable() -> None:
    check_equal_inrs(bf.load(GOLDEN_INRS), example_inrs())


def test_todays_inrs_have_the_layout_of_the_golden_ones(tmp_path: Path) -> None:
    with (
        np.load(example_inrs().save(tmp_path / "now.npz")) as now,
        np.load(GOLDEN_INRS) as golden,
    ):
        assert sorted(now.files) == sorted(golden.files)
        for name in golden.files:
            assert np.array_equal(now[name], golden[name])


# ---------------------------------------- flows on manifolds, densities in coordinates


PRIOR = bf.priors.Normal(1.5, 0.25)


def exact_values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return values of no pattern that every floating-point type holds exactly."""
    return ((torch.arange(math.prod(shape)) * 5 % 13 - 6) / 64).to(dtype).reshape(shape)


def example_manifold_flow(
    dtype: torch.dtype = torch.float32, width: int = 4, *widths: int
) -> ManifoldFlow:
    """Return, by default, the flow that the golden file holds, which no later version may
    change.
    """
    spec = WeightSpec.of(built(lambda: chain(*(widths or (2, 3, 1)))))
    velocity = (
        built(lambda: TangentVelocity(spec, width, 1), dtype).requires_grad_(False).eval()
    )
    for parameter in velocity.parameters():
        parameter.copy_(exact_values(*parameter.shape))
    return ManifoldFlow(
        velocity,
        Spheres(spec),
        Solver("rk4", 3),
        {"steps": 5, "loss": 0.25, "held_out_loss": None},
    )


def example_completed_flow(*sizes: Any) -> CompletedFlow:
    """Return, by default, the flow that the golden file holds, which no later version may
    change.
    """
    flow = example_manifold_flow(*sizes)
    location = exact_values(flow.spheres.units).to(flow.like)
    return CompletedFlow(flow, Radii(location, 1 + location))


def example_density(dtype: torch.dtype = torch.float32) -> TransformedDensity:
    """Return the density that the golden file holds, which no later version may change."""
    model = linear(3, PRIOR, dtype)
    loc = torch.tensor([0.5, -1.0, 2.0])
    source = Source(
        model.flat_prior,
        loc,
        torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 0.5]]),
    )
    factor = torch.tensor(
        [[1.0, 0.0, 0.0], [-0.5, 0.75, 0.0], [0.25, 0.125, 2.0]], dtype=dtype
    )
    return TransformedDensity(
        bf.Gaussian(0.5 * loc.to(dtype), factor),
        source,
        {"matched": True, "shrinkage": 0.125},
    )


def coupling_density() -> TransformedDensity:
    model = linear(3)
    return fit_coupling(
        model,
        model.sample_prior(200, 1),
        couplings=3,
        hidden=16,
        progress=False,
        training=bf.Training(steps=20),
    )


def informed_model(targets: torch.Tensor) -> bf.BayesianModel:
    net = built(lambda: chain(2, 3, 1), torch.float32)
    return bf.BayesianModel(
        net, bf.priors.Normal(), bf.likelihoods.Gaussian(0.5), exact_values(4, 2), targets
    )


def example_informed_flow() -> Flow:
    """Return the flow that the golden file holds, which no later version may change."""
    model = informed_model(exact_values(4))
    proximal_steps = GradientSteps(2, memory=0.75), GaussNewton(1, iterations=3)
    field = built(
        lambda: InformedVelocity(model.spec, proximal_steps, 4, 1, heads=2), torch.float32
    )
    for parameter in field.requires_grad_(False).parameters():
        parameter.copy_(exact_values(*parameter.shape))
    return Flow.of(
        field.bind(WhitenedPosterior(model)),
        model,
        info={"steps": 5, "held_out_loss": None},
        solver=Solver(steps=3),
    )


EXAMPLES: dict[str, Callable[[], Any]] = {
    "manifold-flow": example_manifold_flow,
    "completed-flow": example_completed_flow,
    "in-coordinates": example_density,
}
OTHERS: dict[str, Callable[[], Any]] = {
    "wide manifold flow": lambda: example_manifold_flow(torch.float64, 16, 3, 6, 5, 2),
    "wide completed flow": lambda: example_completed_flow(torch.float32, 16, 3, 6, 5, 2),
    "density, float64": lambda: example_density(torch.float64),
    "coupling flow": coupling_density,
}


def check_same_law(found: Any, expected: Any) -> None:
    """Compare samples and log densities to the bit, and what else is known."""
    assert type(found) is type(expected)
    assert (
        found.info == expected.info
        if hasattr(expected, "info")
        else found.flow.info == expected.flow.info
    )
    theta = expected.sample(50, 0)
    again = found.sample(50, 0)
    assert again.dtype == theta.dtype
    assert torch.equal(again, theta)
    assert torch.equal(found.log_prob(theta[:3]), expected.log_prob(theta[:3]))
    assert not torch.equal(found.sample(50, 1), theta)


@pytest.mark.parametrize("name", EXAMPLES | OTHERS)
def test_transports_come_back_exactly(name: str, tmp_path: Path) -> None:
    expected = (EXAMPLES | OTHERS)[name]()
    path = expected.save(tmp_path / "law")
    check_same_law(type(expected).load(path), expected)
    check_same_law(bf.load(path), expected)
    if isinstance(expected, ManifoldFlow | CompletedFlow):
        found = bf.load(path)
        assert isinstance(found, ManifoldFlow | CompletedFlow)
        assert found.spec == expected.spec
        assert found.solver.steps == 3
    with zipfile.ZipFile(path) as file:
        for member in file.namelist():
            with file.open(member) as array:
                np.lib.format.read_array(array, allow_pickle=False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_golden_transports_stay_readable(name: str) -> None:
    check_same_law(bf.load(GOLDEN.with_name(f"{name}-v1.npz")), EXAMPLES[name]())


@pytest.mark.parametrize("name", EXAMPLES)
def test_todays_transports_have_the_layout_of_the_golden_ones(
    name: str, tmp_path: Path
) -> None:
    path = EXAMPLES[name]().save(tmp_path / "now.npz")
    with np.load(path) as now, np.load(GOLDEN.with_name(f"{name}-v1.npz")) as golden:
        assert sorted(now.files) == sorted(golden.files)
        for array in golden.files:
            assert np.array_equal(now[array], golden[array])


def test_the_golden_informed_flow_stays_readable_and_todays_files_have_its_layout(
    tmp_path: Path,
) -> None:
    path, model = GOLDEN.with_name("informed-flow-v2.npz"), informed_model(exact_values(4))
    expected, found = example_informed_flow(), bf.load(path, model)
    assert isinstance(found, Flow)
    assert (found.info, found.solver.steps) == (expected.info, 3)
    assert torch.allclose(found.sample(20, 0), expected.sample(20, 0), atol=1e-5)
    assert not torch.allclose(found.sample(20, 1), expected.sample(20, 0), atol=1e-1)
    with np.load(expected.save(tmp_path / "now.npz")) as now, np.load(path) as golden:
        assert sorted(now.files) == sorted(golden.files)
        headers = [json.loads(bytes(file["header"])) for file in (now, golden)]
        assert [each.pop("fingerprint").partition(":")[0] for each in headers] == [
            "2",
            "c624b5e7ede0726b",
        ]
        assert headers[0] == headers[1]
        for array in set(golden.files) - {"header"}:
            assert np.array_equal(now[array], golden[array])
    with pytest.raises(ValueError, match="not the model"):
        bf.load(path, informed_model(-exact_values(4)))


def test_the_golden_density_is_the_gaussian_it_says() -> None:
    """theta = 0.25 + 1.5 (loc + root x), with x Gaussian."""
    found, expected = bf.load(GOLDEN.with_name("in-coordinates-v1.npz")), example_density()
    assert isinstance(found, TransformedDensity)
    assert isinstance(expected.density, bf.Gaussian)
    assert expected.source.loc is not None
    assert expected.source.root is not None
    root, factor = expected.source.root.double(), expected.density.scale_tril.double()
    mean = 0.25 + 1.5 * (expected.source.loc + root @ expected.density.loc.double())
    law = torch.distributions.MultivariateNormal(
        mean, 2.25 * root @ factor @ factor.T @ root
    )
    theta = found.sample(20, 0)
    torch.testing.assert_close(
        found.log_prob(theta), law.log_prob(theta.double()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "make", [example_manifold_flow, example_completed_flow], ids=lambda make: make.__name__
)
def test_flows_on_manifolds_are_of_their_own_networks_only(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    path, x = make().save(tmp_path / "flow"), exact_values(4, 2)

    def model(net: Callable[[], torch.nn.Module]) -> bf.BayesianModel:
        return bf.BayesianModel(
            built(net, torch.float32),
            bf.priors.Normal(),
            bf.likelihoods.Gaussian(0.5),
            x,
            x[:, 0],
        )

    check_same_law(bf.load(path, model(lambda: chain(2, 3, 1))), make())
    for other in (lambda: chain(2, 4, 1), lambda: chain(2, 3, 1, activation=torch.nn.Tanh)):
        with pytest.raises(ValueError, match="not the model's weights"):
            bf.load(path, model(other))


def test_densities_are_of_their_own_prior_only(tmp_path: Path) -> None:
    path = example_density().save(tmp_path / "density")
    check_same_law(bf.load(path, linear(3, PRIOR, torch.float32)), example_density())
    for other in (linear(3), linear(4, PRIOR)):
        with pytest.raises(ValueError, match="another prior"):
            bf.load(path, other)


def test_a_prior_with_inferred_parameters_comes_from_the_model(tmp_path: Path) -> None:
    model = linear(3, bf.priors.Hierarchical(), torch.float32)
    density = fit_gaussian(model, model.sample_prior(100, 0))
    path = density.save(tmp_path / "density")
    check_same_law(bf.load(path, model), density)
    with pytest.raises(ValueError, match="needs its model"):
        bf.load(path)


def test_what_could_not_be_rebuilt_is_not_saved(tmp_path: Path) -> None:
    density, flow = example_density(), example_manifold_flow()

    class Foreign:
        def sample(self, n: int, seed: bf.types.Seed) -> torch.Tensor:
            return density.density.sample(n, seed)

        def log_prob(self, theta: torch.Tensor) -> torch.Tensor:
            return density.density.log_prob(theta)

    with pytest.raises(ValueError, match="cannot save a Foreign"):
        replace(density, density=Foreign()).save(tmp_path / "never")
    with pytest.raises(ValueError, match="cannot save a Identity"):
        replace(flow, velocity=Field.of(torch.nn.Identity())).save(tmp_path / "never")
    for velocity in (
        ScoreVelocity(),
        GuidedVelocity(flow.velocity, density.log_prob, density.source),
    ):
        with pytest.raises(ValueError, match=f"cannot save a {type(velocity).__name__}"):
            replace(example_completed_flow(), flow=replace(flow, velocity=velocity)).save(
                tmp_path / "never"
            )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_transports_are_not_read_as_one_another(name: str, tmp_path: Path) -> None:
    path = EXAMPLES[name]().save(tmp_path / "law")
    for other in {ManifoldFlow, CompletedFlow, TransformedDensity, Flow} - {
        type(EXAMPLES[name]())
    }:
        with pytest.raises(ValueError, match=f"holds '{name}', expected one of"):
            other.load(path)


# ---------------------------------------- refusals


def header(**values: object) -> np.ndarray:
    plain = {
        "format": "bnnflow",
        "kind": "draws",
        "version": 1,
        "info": {},
        "log_evidence": None,
    }
    return np.frombuffer(json.dumps(plain | values).encode(), dtype=np.uint8)


THETA, LOG_JOINT = np.zeros((1, 2, 3)), np.zeros((1, 2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"theta": THETA}, "was not written by bnnflow"),
        ({"theta": THETA, "header": np.arange(4.0)}, "was not written by bnnflow"),
        (
            {"theta": THETA, "header": np.frombuffer(b"[1, 2]", dtype=np.uint8)},
            "was not written by bnnflow",
        ),
        ({"theta": THETA, "header": header(format="other")}, "was not written by bnnflow"),
        ({"theta": THETA, "header": header(kind="cake")}, "holds 'cake', expected one of"),
        (
            {"theta": THETA, "header": header(version=2)},
            "has format version 2 of 'draws'; this bnnflow reads up to 1",
        ),
        ({"theta": np.array([{}], dtype=object), "header": header()}, "allow_pickle=False"),
        ({"header": np.array([{}], dtype=object)}, "was not written by bnnflow"),
    ],
    ids=[
        "no header",
        "odd header",
        "list header",
        "format",
        "kind",
        "newer",
        "pickled",
        "pickled header",
    ],
)
@pytest.mark.parametrize("load", [bf.Draws.load, bf.load], ids=["Draws.load", "load"])
def test_foreign_archives_are_refused(
    load, arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, **({"log_joint": LOG_JOINT} | arrays))
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"plain text", b"PK\x03\x04 cut short", b"\x80\x04}."],
    ids=["empty", "text", "cut", "pickle"],
)
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="was not written by bnnflow"):
        bf.load(path)


def test_single_arrays_and_cut_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", THETA)
    whole = example().save(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("array.npy", "half.npz"):
        with pytest.raises(ValueError, match="was not written by bnnflow"):
            bf.load(tmp_path / name)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bf.load(tmp_path / "nothing.npz")


def test_draws_are_not_read_from_another_kind(tmp_path: Path) -> None:
    path = storage.write(tmp_path / "flow.npz", "flow", 1, {}, {"weight": THETA})
    with pytest.raises(ValueError, match=r"holds 'flow', expected one of \['draws'\]"):
        bf.Draws.load(path)


# ---------------------------------------- whole or not at all


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(TypeError), storage.whole(path) as unfinished:
        unfinished.write_text("ne") + "w"  # type: ignore[operator]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    host = socket.gethostname()
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = tmp_path / "draws.npz"
    mine = tmp_path / f"draws.npz.{host}-{dead.pid}-1.tmp"
    others = [
        tmp_path / f"draws.npz.{host}-{os.getppid()}-1.tmp",  # it may be writing still
        tmp_path / f"draws.npz.elsewhere-{dead.pid}-1.tmp",  # nobody here can know
        tmp_path / f"other.npz.{host}-{dead.pid}-1.tmp",
        tmp_path / "draws.npz.notes.tmp",
    ]
    for each in (mine, *others):
        each.write_bytes(b"half")
    example().save(path)
    assert not mine.exists()
    assert {*tmp_path.iterdir()} == {path, *others}


@pytest.mark.parametrize("name", ["draws", "draws.npz", "draws.bnn"])
def test_one_rule_makes_a_path(name: str, tmp_path: Path) -> None:
    """Whatever a file was called when it was written, it is read by the same name."""
    path = example().save(tmp_path / name)
    check_equal(bf.Draws.load(tmp_path / name), example())
    found = bf.load(tmp_path / name)
    assert isinstance(found, bf.Draws)
    check_equal(found, example())
    replace(example(), log_weights=None).save(path)
    weights = priors.Empirical.from_file(tmp_path / name).weights
    assert isinstance(weights, torch.Tensor)
    assert torch.equal(weights, example().flat)


# ---------------------------------------- one run at a time


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with storage.Lock(folder, folder=True):
        with pytest.raises(
            ValueError,
            match=f"another run .process {os.getpid()} on .* is working on .*run",
        ):
            storage.Lock(folder, folder=True)
        storage.Lock(tmp_path / "a" / "other.npz", folder=False).release()
    assert list(tmp_path.iterdir()) == []  # nothing was written, so nothing is left
    folder.mkdir(parents=True)
    storage.Lock(folder, folder=True).release()
    assert list(folder.iterdir()) == []


def test_a_lock_dies_with_its_process_and_not_with_the_children(tmp_path: Path) -> None:
    """A killed process leaves no lock behind, though a child that it forked lives on."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom bnnflow.storage import Lock\n"
        "lock = Lock(Path(sys.argv[1]), folder=True)\n"
        "if os.fork() == 0:\n    print('forked', flush=True)\n"
        "sys.stdin.readline()\nos._exit(0)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        # by the child, once the hooks of its fork have run
        assert process.stdout.readline() == "forked\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on"):
            storage.Lock(tmp_path, folder=True)
        process.kill()
        process.wait()
        storage.Lock(tmp_path, folder=True).release()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="has no locks .*No locks available"):
        lock = storage.Lock(tmp_path, folder=True)
    lock.release()
    monkeypatch.setattr(storage, "fcntl", None)
    with pytest.warns(UserWarning, match="has no locks .*there is no flock"):
        storage.Lock(tmp_path, folder=True).release()
