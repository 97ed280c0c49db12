"""Laws of implicit neural representations: fits are those of Adam, alone or together, and warps are
exact.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import WeightSpec, compiled, storage
from bnnflow.activations import Sine
from bnnflow.data import load_images
from bnnflow.equivariant import (
    INRs,
    fit_images,
    fit_inrs,
    image_grid,
    inr,
    render,
    siren,
    warp,
)
from bnnflow.model import fused
from bnnflow.model.network import ChainNetwork, ModuleNetwork

F32, F64 = torch.float32, torch.float64
needs_compiler = pytest.mark.skipif(
    compiled.library(F64) is None, reason="no C++ compiler, or BNNFLOW_FUSED=0"
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain(*widths: int, w0: float = 5.0, bias: bool = True) -> nn.Sequential:
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        modules += [nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias), Sine(w0)]
    return nn.Sequential(*modules[:-1])


def waves(n: int = 5, points: int = 40, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """Sine waves on [-pi, pi]: coordinates ``(points, 1)`` and values ``(n, points)``."""
    x = torch.linspace(-math.pi, math.pi, points, dtype=dtype).unsqueeze(-1)
    return x, torch.sin(torch.linspace(0.5, 4.0, n, dtype=dtype).unsqueeze(-1) * x.T)


NET = siren(1, 1, (8, 8), w0=3.0)


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def each_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the compiled code and without it."""
    if not request.param:
        for home in (fused, compiled.routines):
            monkeypatch.setattr(home, "library", lambda dtype: None)
    elif compiled.library(F32) is None:
        pytest.skip("no C++ compiler, or BNNFLOW_FUSED=0")


# ---------------------------------------- fits


@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
def test_sine_waves_are_fitted(dtype: torch.dtype) -> None:
    x, y = waves(dtype=dtype)
    fits = fit_inrs(x, y, siren(1, 1, (16, 16), w0=3.0), steps=300, seed=0)
    assert fits.theta.shape == (5, fits.spec.dim)
    assert fits.theta.dtype == dtype
    assert (fits.mse < 1e-3 * y.square().mean(1)).all()
    assert fits.info["diverged"] == 0


def test_digits_are_fitted_and_drawn_again() -> None:
    images = load_images("digits").x_train[:20]
    fits = fit_images(images, steps=100, seed=0)
    assert len(fits) == 20
    assert (fits.psnr > 30).all()
    drawn = render(fits.theta, fits.spec, 8, 8)
    torch.testing.assert_close(
        (drawn - images).double().square().mean((1, 2)), fits.mse, rtol=1e-4, atol=1e-8
    )
    torch.testing.assert_close(fits.psnr, -10 * torch.log10(fits.mse))


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize(
    ("widths", "bias"), [((1, 6, 2), True), ((1, 5, 4, 3, 2), True), ((1, 6, 5, 2), False)]
)
@pytest.mark.usefixtures("each_path")
def test_fits_are_those_of_torchs_adam_one_by_one(
    widths: tuple[int, ...], bias: bool, batch_size: int | None
) -> None:
    net, steps, rate = chain(*widths, bias=bias).double(), 12, 0.01
    x, one = waves(3, dtype=F64)
    y = torch.stack([one, one.square()], -1)
    together = fit_inrs(
        x, y, net, steps=steps, learning_rate=rate, batch_size=batch_size, seed=3
    )
    g = generator(3)
    starts = inr.starting_weights(together.spec, 3, g)
    rows_seed = int(torch.randint(2**62, (), generator=g))
    for i in range(3):
        net.load_state_dict(together.spec.unflatten(starts[i].double()))
        optimiser = torch.optim.Adam(net.parameters(), lr=rate)
        g = generator(rows_seed)
        for step in range(steps):
            rows = (
                torch.arange(40)
                if batch_size is None
                else torch.randperm(40, generator=g)[:batch_size]
            )
            optimiser.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
            optimiser.zero_grad()
            nn.functional.mse_loss(net(x[rows]), y[i, rows]).backward()
            optimiser.step()
        alone = together.spec.flatten(dict(net.named_parameters())).detach()
        torch.testing.assert_close(together.theta[i], alone, rtol=1e-9, atol=1e-11)
        error = nn.functional.mse_loss(net(x), y[i]).detach()
        torch.testing.assert_close(together.mse[i], error, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("batch_size", [None, 11])
@needs_compiler
def test_fits_depend_neither_on_the_chunk_nor_on_threads(batch_size: int | None) -> None:
    x, y = waves(23, 600)
    settings: dict[str, Any] = {
        "net": chain(1, 33, 31, 1),
        "steps": 10,
        "batch_size": batch_size,
        "seed": 0,
    }
    expected = fit_inrs(x, y, **settings)
    for chunk in (1, 7):
        found = fit_inrs(x, y, **settings, chunk=chunk)
        assert torch.equal(found.theta, expected.theta)
        assert torch.equal(found.mse, expected.mse)
    try:
        torch.set_num_threads(3)
        assert batch_size is not None or fused.threads_for(23 * 600 * expected.spec.dim) > 1
        found = fit_inrs(x, y, **settings)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found.theta, expected.theta)
    assert torch.equal(found.mse, expected.mse)


@pytest.mark.usefixtures("each_path")
def test_fits_depend_on_the_seed_alone() -> None:
    x, y = waves()
    first, again, other = (
        fit_inrs(x, y, NET, steps=5, batch_size=9, seed=seed)
        for seed in (1, generator(1), 2)
    )
    assert torch.equal(first.theta, again.theta)
    assert not torch.equal(first.theta, other.theta)
    assert not torch.equal(first.theta[0], first.theta[1])


def test_what_is_tracked_is_fitted_all_the_same() -> None:
    x, y = waves()
    expected = fit_inrs(x, y, NET, steps=5, seed=0)
    found = fit_inrs(
        x.clone().requires_grad_(), y.clone().requires_grad_(), NET, steps=5, seed=0
    )
    assert torch.equal(found.theta, expected.theta)
    assert not found.theta.requires_grad


def test_arguments_are_left_as_they_are() -> None:
    x, y = waves()
    before = x.clone(), y.clone(), NET[0].weight.clone()
    fit_inrs(x, y, NET, steps=3, seed=0)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert torch.equal(NET[0].weight, before[2])


def test_a_fit_that_diverges_is_counted_and_spoils_no_other() -> None:
    x, y = waves()
    y[2] *= 1e30  # the square of its gradient overflows
    with pytest.warns(UserWarning, match="1 of 5 fits diverged"):
        fits = fit_inrs(x, y, NET, steps=5, seed=0)
    assert fits.info["diverged"] == 1
    assert fits.mse.isfinite().tolist() == [True, True, False, True, True]


def test_starts_are_those_of_siren() -> None:
    spec = WeightSpec.of(siren(3, 2, (50, 40), w0=20.0))
    theta = spec.unflatten(inr.starting_weights(spec, 500, generator()))
    bounds = {
        "0.weight": 1 / 3,
        "2.weight": math.sqrt(6 / 50) / 20,
        "4.weight": math.sqrt(6 / 40) / 20,
        "0.bias": 1 / math.sqrt(3),
        "2.bias": 1 / math.sqrt(50),
        "4.bias": 1 / math.sqrt(40),
    }
    for name, bound in bounds.items():
        drawn = theta[name] / bound
        assert drawn.abs().max() <= 1
        assert abs(float(drawn.mean())) < 5 / math.sqrt(3 * drawn.numel())
        assert abs(float(drawn.square().mean()) - 1 / 3) < 5 * math.sqrt(
            4 / 45 / drawn.numel()
        )


def test_sirens_keep_the_size_of_activations_from_layer_to_layer() -> None:
    net, h = siren(2, 1, (256,) * 4, seed=1), image_grid(16, 16)
    for module in net[:-1]:
        h = module(h)
        if isinstance(module, Sine):
            assert 0.6 < float(h.detach().std()) < 0.8  # the arcsine law has 0.71
    assert torch.equal(siren(2, 1, seed=1)[0].weight, siren(2, 1, seed=1)[0].weight)
    assert not torch.equal(siren(2, 1, seed=1)[0].weight, siren(2, 1, seed=2)[0].weight)


# ---------------------------------------- gradients


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(F32, 2e-5), (F64, 1e-12)], ids=["f32", "f64"]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("each_path")
def test_squared_errors_and_gradients_are_those_of_autograd(
    bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    net = chain(2, 7, 5, 3, bias=bias).to(dtype)
    spec, g = WeightSpec.of(net), generator()
    theta = inr.starting_weights(spec, 4, g).to(dtype)
    x, y = (
        torch.rand(50, 2, generator=g, dtype=dtype),
        torch.rand(4, 50, 3, generator=g, dtype=dtype),
    )
    # not side by side in memory
    every_other = torch.arange(50).reshape(25, 2).T.contiguous().T[:, 1]
    for rows in (None, torch.tensor([3, 3, 0]), every_other):
        value, grad = ChainNetwork(spec).squared_error(theta, x, y, rows)
        exact = theta.double().requires_grad_()
        some = slice(None) if rows is None else rows
        outputs = ModuleNetwork(net.double(), spec)(exact, x[some].double())
        expected = 0.5 * (outputs - y[:, some].double()).square().sum((1, 2))
        (slope,) = torch.autograd.grad(expected.sum(), exact)
        assert value.dtype == F64
        assert grad.dtype == dtype
        torch.testing.assert_close(value, expected.detach(), rtol=tolerance, atol=tolerance)
        assert ((grad - slope).norm(dim=-1) <= tolerance * slope.norm(dim=-1)).all()


@pytest.mark.usefixtures("each_path")
def test_a_perfect_fit_has_no_error() -> None:
    spec = WeightSpec.of(NET)
    theta, x = inr.starting_weights(spec, 3, generator()), waves()[0]
    network = ChainNetwork(spec)
    value, grad = network.squared_error(theta, x, network(theta, x))
    assert (value >= 0).all()
    assert (value < 1e-10).all()
    assert (grad.abs() < 1e-5).all()


@pytest.mark.usefixtures("each_path")
def test_rows_and_shapes_that_do_not_exist() -> None:
    spec = WeightSpec.of(NET)
    network, (x, y) = ChainNetwork(spec), waves(3)
    theta, y = inr.starting_weights(spec, 3, generator()), y.unsqueeze(-1)
    with pytest.raises(IndexError):
        network.squared_error(theta, x, y, torch.tensor([0, 40]))
    for bad in (
        (x[1:], y),
        (x.expand(-1, 2), y),
        (x, y[1:]),
        (x, y.expand(-1, -1, 2)),
        (x[:, 0], y),
    ):
        with pytest.raises(RuntimeError, match="do not fit 3 networks 1 -> 1"):
            network.squared_error(theta, *bad)


# ---------------------------------------- images and warps


@pytest.mark.parametrize(("height", "width"), [(2, 3), (5, 4), (1, 1)])
def test_the_grid_runs_along_rows(height: int, width: int) -> None:
    grid = image_grid(height, width).reshape(height, width, 2)
    assert torch.equal(grid[..., 0], torch.linspace(-1, 1, width).expand(height, width))
    assert torch.equal(
        grid[..., 1], torch.linspace(-1, 1, height).unsqueeze(-1).expand(height, width)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_rendering_is_the_network_on_the_grid(channels: int) -> None:
    net = siren(2, channels, (6,), seed=4)
    spec = WeightSpec.of(net)
    theta = spec.flatten(dict(net.named_parameters())).detach()
    expected = net(image_grid(5, 4)).detach().reshape(5, 4, channels) + 0.5
    for lead in ((), (2,), (2, 3)):
        image = render(theta.expand(*lead, -1), spec, 5, 4)
        assert image.shape == (*lead, 5, 4, *([channels] if channels > 1 else []))
        torch.testing.assert_close(
            image.reshape(*lead, 5, 4, channels), expected.expand(*lead, -1, -1, -1)
        )
    with pytest.raises(ValueError, match="two coordinates, these networks take 1"):
        render(torch.zeros(WeightSpec.of(NET).dim), WeightSpec.of(NET), 2, 2)


def test_images_of_several_channels() -> None:
    images = torch.rand(3, 4, 5, 2, generator=generator())
    fits = fit_images(
        images, siren(2, 2, (24,), w0=10.0), steps=400, learning_rate=0.01, seed=0
    )
    errors = (
        (render(fits.theta, fits.spec, 4, 5) - images).double().square().mean((1, 2, 3))
    )
    torch.testing.assert_close(errors, fits.mse, rtol=1e-3, atol=1e-8)
    assert (fits.mse < 1e-3).all()
    assert fit_images(images, steps=1, seed=0).spec.shapes["4.weight"] == (2, 32)


@pytest.mark.parametrize("lead", [(), (4,)], ids=["one map", "a map each"])
def test_warps_are_exact(lead: tuple[int, ...]) -> None:
    g = generator()
    spec = WeightSpec.of(siren(2, 3, (9, 7)))
    theta = inr.starting_weights(spec, 4, g).double()
    x = torch.rand(30, 2, generator=g, dtype=F64)
    matrix, shift = (
        torch.randn(*lead, *size, generator=g, dtype=F64) for size in ((2, 2), (2,))
    )
    network = ChainNetwork(spec)
    moved = x @ matrix.mT + (shift if not lead else shift.unsqueeze(1))
    expected = (
        network(theta, moved) if not lead else network(theta, moved, per_network=True)
    )
    torch.testing.assert_close(
        network(warp(theta, spec, matrix, shift), x), expected, rtol=1e-10, atol=1e-10
    )
    identity = torch.eye(2, dtype=F64)
    torch.testing.assert_close(warp(theta, spec, identity), theta, rtol=0, atol=0)
    back = warp(warp(theta, spec, identity, torch.ones(2)), spec, identity, -torch.ones(2))
    torch.testing.assert_close(back, theta)
    turned = warp(theta[0], spec, torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    torch.testing.assert_close(
        render(turned, spec, 6, 6), render(theta[0], spec, 6, 6).rot90()
    )


def test_warps_that_make_no_sense() -> None:
    spec = WeightSpec.of(siren(2, 1, (4,)))
    theta = torch.zeros(spec.dim)
    for bad in ((torch.eye(3),), (torch.eye(2), torch.zeros(3)), (torch.zeros(2),)):
        with pytest.raises(ValueError, match="take 2 coordinates"):
            warp(theta, spec, *bad)
    bare = WeightSpec.of(chain(2, 4, 1, bias=False))
    with pytest.raises(ValueError, match="needs a bias"):
        warp(torch.zeros(bare.dim), bare, torch.eye(2), torch.ones(2))
    with pytest.raises(ValueError, match="must end in an axis"):
        warp(theta[1:], spec, torch.eye(2))


# ---------------------------------------- interruption


def count_calls(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Count gradients; interrupt at one of them."""
    calls = [0]
    plain = ChainNetwork.squared_error

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == stop_at:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(ChainNetwork, "squared_error", counted)
    return calls


@pytest.mark.parametrize("batch_size", [None, 9])
def test_an_interrupted_fit_goes_on_bit_for_bit(
    batch_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = waves(7)
    settings: dict[str, Any] = {
        "net": NET,
        "steps": 5,
        "batch_size": batch_size,
        "chunk": 2,
        "seed": 0,
    }
    expected = fit_inrs(x, y, **settings)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        count_calls(patch, stop_at=15)  # in the third of four chunks of 5 + 1 gradients
        with pytest.raises(KeyboardInterrupt):
            fit_inrs(x, y, **settings, checkpoint=folder)
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(
        ValueError, match="holds a fit already: go on with it by Checkpoint"
    ):
        fit_inrs(x, y, **settings, checkpoint=folder)
    for gradients in (12, 0):  # the other two chunks, and nothing any more
        with monkeypatch.context() as patch:
            calls = count_calls(patch)
            found = fit_inrs(
                x, y, checkpoint=bf.Checkpoint(folder, resume=True), **settings
            )
        assert calls == [gradients]
        assert torch.equal(found.theta, expected.theta)
        assert torch.equal(found.mse, expected.mse)


def test_a_checkpoint_is_of_one_run(tmp_path: Path) -> None:
    x, y = waves(3)
    settings: dict[str, Any] = {
        "net": NET,
        "steps": 3,
        "seed": 0,
        "checkpoint": bf.Checkpoint(tmp_path, resume=True),
    }
    fit_inrs(x, y, **settings)  # nothing to go on with is no error
    others: list[dict[str, Any]] = [
        {"steps": 4},
        {"seed": 1},
        {"learning_rate": 0.1},
        {"batch_size": 5},
        {"chunk": 2},
        {"net": siren(1, 1, (8, 9), w0=3.0)},
        {"net": siren(1, 1, (8, 8), w0=4.0)},
    ]
    for other in others:
        with pytest.raises(ValueError, match="other settings, another seed or other data"):
            fit_inrs(x, y, **(settings | other))
    for data in ((x, y + 1), (x + 1, y), (x, y[:2]), (x.double(), y)):
        with pytest.raises(ValueError, match="other settings, another seed or other data"):
            fit_inrs(*data, **settings)


def test_a_fit_has_its_folder_to_itself_and_mends_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = waves(3)
    settings: dict[str, Any] = {
        "net": NET,
        "steps": 3,
        "seed": 0,
        "chunk": 1,
        "checkpoint": tmp_path / "run",
    }
    resumed = settings | {"checkpoint": bf.Checkpoint(tmp_path / "run", resume=True)}
    refused, fit = [], inr.fit_chunk

    def meanwhile(*given: Any) -> Any:
        with pytest.raises(ValueError, match=r"another run .* is working on .*run"):
            fit_inrs(x, y, **resumed)
        refused.append(True)
        return fit(*given)

    monkeypatch.setattr(inr, "fit_chunk", meanwhile)
    expected = fit_inrs(x, y, **settings)
    assert len(refused) == 3
    monkeypatch.undo()
    first, second, _ = sorted((tmp_path / "run").iterdir())
    first.write_bytes(first.read_bytes()[:-30])
    (tmp_path / "run" / f"{second.name}.1.tmp").write_bytes(b"half")
    with pytest.warns(UserWarning, match="damaged: .*inrs-000000.npz .*made anew") as told:
        found = fit_inrs(x, y, **resumed)
    # the line that called, not one of the package
    assert told.pop(UserWarning).filename == __file__
    assert torch.equal(found.theta, expected.theta)
    assert len(list((tmp_path / "run").iterdir())) == 3
    second.write_bytes(b"")
    first.unlink()
    other = resumed | {"seed": 1}
    with (
        pytest.warns(UserWarning, match="made anew"),
        pytest.raises(ValueError, match="another seed"),
    ):
        fit_inrs(x, y, **other)
    with pytest.raises(ValueError, match="must be a folder"):
        fit_inrs(x, y, **(settings | {"checkpoint": first.parent / second.name}))


def _fit_forty(**settings: Any) -> INRs:
    x = torch.linspace(-3, 3, 200).unsqueeze(-1)
    y = torch.sin(torch.arange(1.0, 41).unsqueeze(-1) * x.T)
    return fit_inrs(x, y, siren(1, 1), steps=150, chunk=2, seed=0, **settings)


def _die_after_two(folder: Path) -> None:
    """Fit until two chunks are on disk, and be killed there."""
    write, kept = storage.write, itertools.count(1)

    def writing(*arguments: Any) -> Path:
        path = write(*arguments)
        if next(kept) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    storage.write = writing
    _fit_forty(checkpoint=folder)


@pytest.mark.slow
def test_a_killed_fit_goes_on_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = multiprocessing.get_context("fork").Process(
        target=_die_after_two, args=(folder,)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
    assert 2 <= len(list(folder.glob("inrs-*.npz"))) < 20
    found, expected = (
        _fit_forty(checkpoint=bf.Checkpoint(folder, resume=True)),
        _fit_forty(),
    )
    assert torch.equal(found.theta, expected.theta)
    assert torch.equal(found.mse, expected.mse)


# ---------------------------------------- files and bars


def test_fits_come_back_exactly(tmp_path: Path) -> None:
    x, y = waves(dtype=F64)
    fits = fit_inrs(x, y, NET, steps=3, seed=0)
    path = fits.save(tmp_path / "fits")
    for found in (INRs.load(path), bf.load(path)):
        assert isinstance(found, INRs)
        assert torch.equal(found.theta, fits.theta)
        assert torch.equal(found.mse, fits.mse)
        assert found.theta.dtype == F64
        assert found.info == fits.info
        assert found.spec.describe() == fits.spec.describe()
        torch.testing.assert_close(
            ChainNetwork(found.spec)(found.theta, x), ChainNetwork(fits.spec)(fits.theta, x)
        )


def test_the_bar_is_silent_off_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x, y = waves(3)
    fit_inrs(x, y, NET, steps=3, seed=0)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fit_inrs(x, y, NET, steps=3, seed=0, progress=False)
    assert capfd.readouterr() == ("", "")
    for _ in range(2):  # computed, and read
        fit_inrs(
            x, y, NET, steps=3, seed=0, checkpoint=bf.Checkpoint(tmp_path, resume=True)
        )
        assert "9/9" in capfd.readouterr().err


# ---------------------------------------- refusals

X, Y = waves(3)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no chain": (
        {"net": nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Linear(4, 1))},
        "chains of linear layers",
    ),
    "no sines": (
        {"net": nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))},
        "sines between",
    ),
    "coordinates": ({"net": siren(2, 1)}, r"x must be \(n, 2\)"),
    "no axis": ({"x": X[:, 0]}, r"x must be \(n, 1\)"),
    "channels": ({"net": siren(1, 2)}, r"y must be \(signals, 40, 2\)"),
    "points": ({"y": Y[:, 1:]}, r"y must be \(signals, 40, 1\)"),
    "one signal": ({"y": Y[0]}, r"y must be \(signals, 40, 1\)"),
    "no signals": ({"y": Y[:0]}, r"y must be \(signals, 40, 1\)"),
    "integers": ({"x": X.long()}, "float32 or float64"),
    "half": ({"x": X.half()}, "float32 or float64"),
    "integer values": ({"y": Y.long()}, "y floats"),
    "nan": ({"y": Y / 0}, "finite"),
    "infinite": ({"x": X / 0}, "finite"),
    "steps": ({"steps": 0}, "steps must be at least 1"),
    "rate": ({"learning_rate": math.nan}, "learning_rate must be positive"),
    "chunk": ({"chunk": 0}, "chunk must be at least 1"),
    "batch": ({"batch_size": 0}, "batch_size must be at least 1"),
    "large batch": ({"batch_size": 41}, "batch_size must be between 1 and the 40"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_reason(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = BAD[name]
    calls = count_calls(monkeypatch)
    with pytest.raises(ValueError, match=message):
        fit_inrs(**({"x": X, "y": Y, "net": NET, "seed": 0} | change))
    assert calls == [0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(8, 8), "images must be"),
        (torch.zeros(0, 8, 8), "images must be"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), "divide bytes by 255"),
        (torch.full((2, 8, 8), 255.0), "between 0 and 1"),
        (torch.full((2, 8, 8), math.nan), "between 0 and 1"),
    ],
)
def test_bad_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_images(images, seed=0)


@pytest.mark.parametrize(
    "sizes", [(0, 1, (3,)), (1, 0, (3,)), (1, 1, (0,)), (1, 1, ())], ids=str
)
def test_bad_sizes_are_refused(sizes: tuple[int, int, tuple[int, ...]]) -> None:
    with pytest.raises(
        ValueError, match=r"hidden layers and positive sizes|must be at least 1"
    ):
        siren(*sizes)
    with pytest.raises(ValueError, match="w0 must be positive"):
        siren(1, 1, w0=0.0)
