"""Implicit neural representations: small networks that each are one signal, fitted by the thousand.

A SIREN (Sitzmann et al. 2020, "Implicit Neural Representations with Periodic Activation Functions")
maps coordinates to the value of a signal there through sines, ``h = sin(w0 (W h + b))``, and ends
in a linear layer. The weights are those of an ordinary perceptron: w0 belongs to the activation and
is never folded into them. Images are functions of (column, row) in [-1, 1]^2, and the networks
represent the pixel less one half, so that an output of zero is mid-grey.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnnflow import storage
from bnnflow.activations import Sine
from bnnflow.arguments import Count, Positive, checked, finite
from bnnflow.model.network import ChainNetwork
from bnnflow.options import Checkpoint
from bnnflow.parts import Parts
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator
from bnnflow.stopwatch import Stopwatch
from bnnflow.types import Seed
from bnnflow.warn import warn
from bnnflow.weights import WeightSpec

__all__ = ["INRs", "fit_images", "fit_inrs", "image_grid", "render", "siren", "warp"]

MID_GREY = 0.5
_BETAS = (0.9, 0.999)  # of Adam


@dataclass(frozen=True, eq=False)
class INRs:
    """Fitted networks, one a signal.

    Attributes:
        theta: ``(n, dim)``.
        spec: what their entries mean.
        mse: ``(n,)`` float64, mean squared error of each fit over all coordinates; not finite where
            a fit diverged.
        info: settings of the fit, how many fits diverged, and the seconds that this run took.
    """

    theta: Tensor
    spec: WeightSpec
    mse: Tensor
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.theta)

    @property
    def psnr(self) -> Tensor:
        """Peak signal-to-noise ratio in decibels for signals of range one, ``(n,)``."""
        return -10 * self.mse.log10()

    def save(self, path: str | Path) -> Path:
        """Write to an ``.npz`` file without pickle; read it back with ``bnnflow.load``."""
        header = {"spec": self.spec.describe(), "info": self.info}
        return storage.write(
            path,
            "inrs",
            1,
            header,
            {"theta": self.theta.cpu().numpy(), "mse": self.mse.cpu().numpy()},
        )

    @classmethod
    def load(cls, path: str | Path) -> INRs:
        """Read what ``save`` wrote."""
        with storage.described(path):
            return cls.from_file(*storage.read(path, {"inrs": 1}))

    @classmethod
    def from_file(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> INRs:
        """Build networks from the contents of a file."""
        theta, mse = (torch.from_numpy(arrays[name]) for name in ("theta", "mse"))
        spec = WeightSpec.from_description(header["spec"])
        if theta.shape != (len(mse), spec.dim):
            raise ValueError(
                f"{len(mse)} networks of {spec.dim} weights cannot have theta {tuple(theta.shape)}"
            )
        return cls(theta, spec, mse, dict(header["info"]))


@checked
def siren(
    in_features: Count,
    out_features: Count,
    hidden: Sequence[int] = (32, 32),
    w0: Positive = 30.0,
    *,
    seed: Seed = 0,
) -> nn.Sequential:
    """Build a SIREN: linear layers with sin(w0 a) between them and a linear output, started as
    SIREN prescribes.

    Args:
        in_features: coordinates.
        out_features: channels of the signal.
        hidden: widths.
        w0: frequency of every sine. The larger, the finer the detail that a fit starts with: 30 for
            photographs, less for smooth signals.
        seed: of its weights.

    Raises:
        ValueError: for sizes below one or a w0 that is not positive.

    Example:
        >>> siren(2, 1)(image_grid(28, 28)).shape
        torch.Size([784, 1])
    """
    widths = [in_features, *hidden, out_features]
    if not hidden or min(widths) < 1:
        raise ValueError(f"a SIREN needs hidden layers and positive sizes, got {widths}")
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        modules += [nn.utils.skip_init(nn.Linear, inputs, outputs), Sine(w0)]
    net = nn.Sequential(*modules[:-1])
    spec = WeightSpec.of(net)
    net.load_state_dict(spec.unflatten(starting_weights(spec, 1, as_generator(seed))[0]))
    return net


@torch.no_grad()
@checked
def fit_inrs(
    x: Tensor,
    y: Tensor,
    net: nn.Module,
    *,
    steps: Count = 400,
    learning_rate: Positive = 3e-3,
    batch_size: Count | None = None,
    chunk: Count = 256,
    seed: Seed,
    checkpoint: Checkpoint | str | Path | None = None,
    progress: bool = True,
) -> INRs:
    """Fit one network to every signal, all from random starts of their own.

    Adam on the mean squared error, the learning rate constant for the first half and falling
    linearly to zero over the second. Starts are those of SIREN: W uniform in +-1/inputs in the
    first layer and in +-sqrt(6 / inputs) / w0 in the others, b uniform in +-1/sqrt(inputs). A chunk
    of networks is fitted at once by batched products (one compiled call a step on a CPU with a C++
    compiler). The starts depend on the seed alone; on such a CPU so does all that comes out,
    whatever the chunk and the number of threads.

    Args:
        x: coordinates, ``(n, in)``, float32 or float64.
        y: values of the signals there, ``(signals, n)`` or ``(signals, n, out)``.
        net: a chain of linear layers with sines between them, such as `siren` builds; its own
            weights are not used.
        steps: of Adam.
        learning_rate: of Adam.
        batch_size: coordinates drawn at random for each step, the same for all networks; all of
            them if None.
        chunk: networks that are fitted at once.
        seed: of the starts and of the coordinates drawn.
        checkpoint: a folder that keeps every finished chunk; a `Checkpoint` with ``resume`` goes on
            with what is there.
        progress: show a bar at a terminal.

    Returns:
        The networks, on the device and in the type of x.

    Raises:
        ValueError: for shapes that do not fit, data that are not finite, settings that make no
            sense, or a checkpoint folder that is in use and not to be resumed, or that other
            settings or data have filled.

    Example:
        >>> x = torch.linspace(-1, 1, 50).unsqueeze(-1)
        >>> waves = torch.sin(torch.tensor([[1.0], [2.0], [3.0]]) * x.T)
        >>> fits = fit_inrs(x, waves, siren(1, 1, (8,), w0=5.0), steps=200, seed=0)
        >>> fits.theta.shape, bool((fits.mse < waves.var(1)).all())
        (torch.Size([3, 25]), True)
    """
    spec = WeightSpec.of(net)
    y = y.unsqueeze(-1) if y.dim() == 2 else y
    _check(spec, x, y, steps, learning_rate, batch_size, chunk)
    watch = Stopwatch()
    generator = as_generator(seed)
    starts = starting_weights(spec, len(y), generator)
    rows_seed = int(torch.randint(2**62, (), generator=generator))
    settings = {
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "chunk": chunk,
    }
    described = {"spec": spec.describe(), "signals": len(y), **settings}
    data = hashlib.sha256()
    for tensor in (starts, x, y):
        data.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    described["data"] = data.hexdigest()
    kept = Parts(Checkpoint.of(checkpoint), "inrs", described)
    network = ChainNetwork(spec)
    fitted, errors = [], []
    with kept, progress_bar(len(y) * steps, "INRs", progress, "step") as bar:
        for index, some in enumerate(torch.arange(len(y)).split(chunk)):
            part = kept.read(index)
            if part is None:
                given = starts[some].to(x), x, y[some].to(x)
                found = fit_chunk(network, *given, settings, rows_seed, bar)
                part = {"theta": found[0].cpu().numpy(), "mse": found[1].cpu().numpy()}
                kept.write(index, part)
            else:
                bar.update(steps * len(some))
            fitted.append(torch.from_numpy(part["theta"]))
            errors.append(torch.from_numpy(part["mse"]))
    theta, mse = torch.cat(fitted).to(x), torch.cat(errors).to(x.device)
    diverged = int((~mse.isfinite()).sum())
    if diverged:
        warn(
            f"{diverged} of {len(y)} fits diverged: learning_rate={learning_rate:g} may be too "
            "large"
        )
    info = settings | {"seconds": watch.seconds, "diverged": diverged}
    return INRs(theta, spec, mse, info)


@checked
def fit_images(
    images: Tensor,
    net: nn.Module | None = None,
    *,
    steps: Count = 400,
    learning_rate: Positive = 3e-3,
    batch_size: Count | None = None,
    chunk: Count = 256,
    seed: Seed,
    checkpoint: Checkpoint | str | Path | None = None,
    progress: bool = True,
) -> INRs:
    """Fit one network to every image, as `fit_inrs` does to signals.

    Args:
        images: ``(n, height, width)`` or ``(n, height, width, channels)``, floats between 0 and 1.
        net: `siren` with 32 + 32 units and w0 = 30 if None.
        steps: of Adam.
        learning_rate: of Adam.
        batch_size: pixels drawn at random for each step, the same for all networks; all of them if
            None.
        chunk: networks that are fitted at once.
        seed: of the starts and of the pixels drawn.
        checkpoint: a folder that keeps every finished chunk; a `Checkpoint` with ``resume`` goes on
            with what is there.
        progress: show a bar at a terminal.

    Raises:
        ValueError: for images of another shape or outside [0, 1], and as `fit_inrs`.
    """
    if images.dim() not in (3, 4) or images.numel() == 0:
        raise ValueError(
            "images must be (n, height, width) or (n, height, width, channels), got "
            f"{tuple(images.shape)}"
        )
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise ValueError("images must hold floats between 0 and 1: divide bytes by 255")
    channels = images.shape[3] if images.dim() == 4 else 1
    return fit_inrs(
        image_grid(*images.shape[1:3]).to(images),
        images.reshape(len(images), -1, channels) - MID_GREY,
        siren(2, channels) if net is None else net,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        chunk=chunk,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )


@checked
def image_grid(height: Count, width: Count) -> Tensor:
    """Return the coordinates (column, row) of the pixels, row by row, ``(height * width, 2)`` in
    [-1, 1].
    """
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    return torch.stack([columns, rows], -1).reshape(-1, 2)


@checked
def render(theta: Tensor, spec: WeightSpec, height: Count, width: Count) -> Tensor:
    """Draw the images of networks ``(..., dim)``: ``(..., height, width)``, with a last axis for
    several channels.

    Raises:
        ValueError: if the networks do not take two coordinates.
    """
    spec.check(theta)
    if _in_features(spec) != 2:
        raise ValueError(
            f"spec: images are of two coordinates, these networks take {_in_features(spec)}"
        )
    outputs = (
        ChainNetwork(spec)(theta.reshape(-1, spec.dim), image_grid(height, width).to(theta))
        + MID_GREY
    )
    return outputs.reshape(*theta.shape[:-1], height, width, outputs.shape[-1]).squeeze(-1)


@checked
def warp(
    theta: Tensor, spec: WeightSpec, matrix: Tensor, shift: Tensor | None = None
) -> Tensor:
    """Return networks whose function is f(A x + t), without a fit: the first layer takes the change
    of coordinates.

    Turning, scaling, shearing and moving an image are exact in its weights.

    Args:
        theta: ``(..., dim)``, chains whose first layer has a bias if there is a shift.
        spec: what their entries mean.
        matrix: A, ``(in, in)`` or ``(..., in, in)``.
        shift: t, ``(in,)`` or ``(..., in)``.

    Raises:
        ValueError: for shapes that do not fit, or a shift without a bias that could take it.
    """
    spec.check(theta)
    inputs, first = _in_features(spec), spec.layers[0]
    if matrix.shape[-2:] != (inputs, inputs) or (
        shift is not None and shift.shape[-1:] != (inputs,)
    ):
        shapes = tuple(matrix.shape), None if shift is None else tuple(shift.shape)
        raise ValueError(
            f"these networks take {inputs} coordinates, which matrix and shift of shapes {shapes} "
            "do not fit"
        )
    finite("matrix", matrix)
    if shift is not None:
        finite("shift", shift)
    weight = theta[..., spec.slices[first.weight]].unflatten(-1, spec.shapes[first.weight])
    lead = np.broadcast_shapes(
        theta.shape[:-1], matrix.shape[:-2], shift.shape[:-1] if shift is not None else ()
    )
    moved = theta.expand(*lead, -1).clone()
    moved[..., spec.slices[first.weight]] = (weight @ matrix.to(theta)).flatten(-2)
    if shift is not None:
        if first.bias is None:
            raise ValueError("a shift of the inputs needs a bias in the first layer")
        moved[..., spec.slices[first.bias]] += (
            weight @ shift.to(theta).unsqueeze(-1)
        ).squeeze(-1)
    return moved


# ---------------------------------------- fitting


def _in_features(spec: WeightSpec) -> int:
    if not spec.layers:
        raise ValueError("net: INRs are chains of linear layers")
    return spec.shapes[spec.layers[0].weight][1]


def _check(
    spec: WeightSpec,
    x: Tensor,
    y: Tensor,
    steps: int,
    learning_rate: float,
    batch_size: int | None,
    chunk: int,
) -> None:
    inputs = _in_features(spec)
    if any(not layer.activation.name.startswith("sin") for layer in spec.layers[:-1]):
        raise ValueError("net: INRs have sines between their layers")
    outputs = spec.shapes[spec.layers[-1].weight][0]
    if x.dtype not in (torch.float32, torch.float64) or not y.is_floating_point():
        raise ValueError(
            f"x must be float32 or float64 and y floats, got {x.dtype} and {y.dtype}"
        )
    if x.dim() != 2 or x.shape[1] != inputs:
        raise ValueError(f"x must be (n, {inputs}) for this network, got {tuple(x.shape)}")
    if y.dim() != 3 or y.shape[1:] != (len(x), outputs) or len(y) == 0:
        raise ValueError(
            f"y must be (signals, {len(x)}, {outputs}) for this network, got {tuple(y.shape)}"
        )
    finite("x", x)
    finite("y", y.to(x.dtype))
    if batch_size is not None and not 0 < batch_size <= len(x):
        raise ValueError(
            f"batch_size must be between 1 and the {len(x)} coordinates, got {batch_size}"
        )


def starting_weights(spec: WeightSpec, n: int, generator: torch.Generator) -> Tensor:
    """Draw the starts of ``n`` networks, ``(n, dim)``."""
    bounds = torch.empty(spec.dim)
    for index, layer in enumerate(spec.layers):
        inputs = spec.shapes[layer.weight][1]
        w0 = float(spec.layers[index - 1].activation.name.partition(":")[2] or 1.0)
        bounds[spec.slices[layer.weight]] = (
            math.sqrt(6 / inputs) / w0 if index else 1 / inputs
        )
        if layer.bias is not None:
            bounds[spec.slices[layer.bias]] = 1 / math.sqrt(inputs)
    return (2 * torch.rand(n, spec.dim, generator=generator) - 1) * bounds


def fit_chunk(
    network: ChainNetwork,
    theta: Tensor,
    x: Tensor,
    y: Tensor,
    settings: dict[str, Any],
    rows_seed: int,
    bar: Any,
) -> tuple[Tensor, Tensor]:
    """Run Adam on a chunk, in the memory of theta.

    Return the weights and the mean squared errors.
    """
    steps, batch_size = settings["steps"], settings["batch_size"]
    generator = torch.Generator().manual_seed(rows_seed)
    mean, square, root = (
        torch.zeros_like(theta),
        torch.zeros_like(theta),
        torch.empty_like(theta),
    )
    for step in range(1, steps + 1):
        rows = (
            None
            if batch_size is None
            else torch.randperm(len(x), generator=generator)[:batch_size].to(x.device)
        )
        grad = network.squared_error(theta, x, y, rows)[1].mul_(
            2 / ((batch_size or len(x)) * y.shape[-1])
        )
        mean.lerp_(grad, 1 - _BETAS[0])
        square.mul_(_BETAS[1]).addcmul_(grad, grad, value=1 - _BETAS[1])
        rate = settings["learning_rate"] * min(1.0, 2 * (1 - (step - 1) / steps))
        torch.sqrt(square, out=root).div_(math.sqrt(1 - _BETAS[1] ** step)).add_(1e-8)
        theta.addcdiv_(mean, root, value=-rate / (1 - _BETAS[0] ** step))
        bar.update(len(theta))
    return theta, network.squared_error(theta, x, y)[0] * (2 / y[0].numel())
