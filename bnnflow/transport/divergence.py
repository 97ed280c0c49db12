"""The divergence of a function: exactly, by one product for each coordinate, or estimated from
random probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from bnnflow.forward_mode import jvp
from bnnflow.types import Noise, Trace

__all__ = [
    "chained_divergence",
    "divergence",
    "exact_divergence",
    "hutchinson_divergence",
    "hutchpp_divergence",
    "probe_noise",
]

VectorField = Callable[[Tensor], Tensor]
Velocity = Callable[[Tensor, Tensor], Tensor]


def _at_once(x: Tensor) -> int:
    """Return how many products to do in one call: more fall out of the caches of a CPU and cost up
    to twice as much.
    """
    return 1024 if x.device.type == "cpu" else 65536


def divergence(
    velocity: Velocity,
    t: Tensor,
    x: Tensor,
    trace: Trace = "exact",
    probes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the velocity and its divergence, the trace of its Jacobian.

    A `Field` may know better: ask for its ``with_divergence``.

    Args:
        velocity: ``(t, x) -> (batch, dim)``, acting on each row alone.
        t: a scalar or ``(batch,)``.
        x: ``(batch, dim)``.
        trace: ``"exact"``, one product with the Jacobian for every coordinate; ``"hutchinson"`` or
            ``"hutch++"``, unbiased estimates at one product a probe.
        probes: those of `probe_noise`, the same during a whole solve, or the solver would integrate
            noise.

    Returns:
        ``(batch, dim)`` and ``(batch,)`` float64.

    Raises:
        ValueError: for another ``trace``, or an estimate without probes.
    """
    if trace not in ("exact", "hutchinson", "hutch++"):
        raise ValueError(f"trace must be 'exact', 'hutchinson' or 'hutch++', got {trace!r}")
    if trace == "exact":
        probes = None
    elif probes is None:
        raise ValueError(f"trace={trace!r} needs probes")
    # Some rows at a time: large batches would cost more a row.
    rows = max(1, _at_once(x) // (min(x.shape[-1], 32) if probes is None else len(probes)))
    blocks = x.split(rows)
    times = t.split(rows) if t.dim() else [t] * len(blocks)
    noise = [None] * len(blocks) if probes is None else probes.split(rows, 1)
    parts = [
        _block(velocity, *each, trace) for each in zip(times, blocks, noise, strict=True)
    ]
    values, traces = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(traces)


def _block(
    velocity: Velocity, t: Tensor, x: Tensor, probes: Tensor | None, trace: Trace
) -> tuple[Tensor, Tensor]:
    """Return velocity and divergence of rows that go through at once."""
    if probes is None:
        return exact_divergence(lambda z: velocity(t, z), x)
    if trace == "hutch++":
        return hutchpp_divergence(lambda z: velocity(t, z), x, probes)
    value, estimates = hutchinson_divergence(lambda z: velocity(t, z), x, probes)
    return value, estimates.mean(0)


def exact_divergence(
    field: VectorField,
    x: Tensor,
    chunk_size: int | None = None,
    mode: Literal["reverse", "forward"] = "reverse",
) -> tuple[Tensor, Tensor]:
    """Return the velocity and its divergence, the trace of its Jacobian.

    One product with the Jacobian for each coordinate, ``chunk_size`` coordinates at a time.

    Args:
        field: ``(batch, dim) -> (batch, dim)``, acting on each row alone.
        x: ``(batch, dim)``.
        chunk_size: coordinates in one call, by default as many as are fastest together.
        mode: reverse mode evaluates the field once and takes about half the time of forward mode on
            a CPU; forward mode evaluates it once a chunk, and keeps no graph of it in memory.

    Returns:
        ``(batch, dim)`` and ``(batch,)`` float64.
    """
    batch, dim = x.shape
    chunk_size = max(1, _at_once(x) // max(1, batch)) if chunk_size is None else chunk_size
    velocity, products = (
        _pullback(field, x) if mode == "reverse" else (torch.empty(0), None)
    )
    total = torch.zeros(batch, dtype=torch.float64, device=x.device)
    # (chunk, dim)
    for rows in torch.eye(dim, dtype=x.dtype, device=x.device).split(chunk_size):
        directions = rows.unsqueeze(1).expand(-1, batch, -1)
        if products is None:
            velocity, images = _pushforward(field, x, directions)
        else:
            images = products(directions)
        # the diagonal's part of this chunk
        total = total + torch.einsum("cbd,cd->b", images, rows).double()
    return velocity, total


def chained_divergence(
    field: Callable[..., Tensor],
    x: Tensor,
    inner: Sequence[Tensor],
    jacobians: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return field(x, *inner) and its divergence by x, where the Jacobians of the inner values are
    known.

    One reverse-mode product for each coordinate, through ``field`` alone.

    Args:
        field: takes ``(batch, dim)`` each and returns ``(batch, dim)``, acting on each row alone.
        x: ``(batch, dim)``.
        inner: functions of x, at x, ``(batch, dim)`` each.
        jacobians: their derivatives by x, ``(batch, dim, dim)`` each.

    Returns:
        ``(batch, dim)`` and ``(batch,)`` float64.
    """
    batch, dim = x.shape
    velocity, pullback, *_ = torch.func.vjp(field, x, *inner)
    products = torch.func.vmap(pullback)
    eye = torch.eye(dim, dtype=x.dtype, device=x.device).unsqueeze(1).expand(-1, batch, -1)
    # (coordinate of x, batch, dim)
    columns = [eye, *(jacobian.permute(2, 0, 1) for jacobian in jacobians)]
    total = torch.zeros(batch, dtype=torch.float64, device=x.device)
    for rows in torch.arange(dim, device=x.device).split(
        max(1, _at_once(x) // max(1, batch))
    ):
        pairs = zip(products(eye[rows]), columns, strict=True)
        total = total + sum((image * column[rows]).sum((0, 2)) for image, column in pairs)
    return velocity, total


def probe_noise(noise: Noise, probes: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the probes of one solve, ``(probes, batch, dim)``, of zero mean and unit covariance.

    Raises:
        ValueError: for another law, or less than one probe.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    shape = (probes, *x.shape)
    if noise == "rademacher":
        bits = torch.randint(0, 2, shape, generator=generator, device=x.device)
        return (2 * bits - 1).to(x.dtype)
    if noise == "gaussian":
        return torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
    raise ValueError(f"noise must be 'rademacher' or 'gaussian', got {noise!r}")


def hutchinson_divergence(
    field: VectorField, x: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the velocity and an unbiased estimate of its divergence for each probe (Hutchinson
    1989).

    Reverse mode: one vector-Jacobian product a probe.

    Args:
        field: ``(batch, dim) -> (batch, dim)``, acting on each row alone.
        x: ``(batch, dim)``.
        probes: ``(probes, batch, dim)``, fixed during a solve.

    Returns:
        ``(batch, dim)`` and ``(probes, batch)`` float64.
    """
    velocity, products = _pullback(field, x)
    return velocity, _forms(products, probes)


def hutchpp_divergence(
    field: VectorField, x: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the velocity and an unbiased estimate of its divergence by Hutch++ (Meyer et al.
    2021).

    With m probes and k = m // 3: k products sketch the range of the Jacobian, k more give the trace
    within it exactly, and Hutchinson's estimate from the last m - 2k probes adds what is outside; m
    products in all, in two passes. The variance is that of the part outside times 2 / (m - 2k), so
    that it pays only where the k largest singular values hold more than about two thirds of the
    Jacobian's squared norm. Elsewhere it is up to three times that of `hutchinson_divergence`, and
    worse beside a multiple of the identity, as velocity fields have one: on the diagonal Rademacher
    probes have no error, their projections do. The frame turns with time: take shorter steps.

    Args:
        field: ``(batch, dim) -> (batch, dim)``, acting on each row alone.
        x: ``(batch, dim)``.
        probes: ``(probes, batch, dim)``, at least 3, fixed during a solve; the k in the middle are
            not used.

    Returns:
        ``(batch, dim)`` and ``(batch,)`` float64.

    Raises:
        ValueError: if there are less than three probes.
    """
    if len(probes) < 3:
        raise ValueError(f"Hutch++ needs at least 3 probes, got {len(probes)}")
    k = min(len(probes) // 3, x.shape[-1])
    velocity, products = _pullback(field, x)
    sketch = products(probes[:k])  # (k, batch, dim)
    frame = torch.linalg.qr(sketch.movedim(0, -1)).Q  # (batch, dim, k)
    outside = probes[2 * k :].movedim(0, -1)  # (batch, dim, m - 2k)
    outside = (outside - frame @ (frame.mT @ outside)).movedim(-1, 0)
    forms = _forms(products, torch.cat([frame.movedim(-1, 0), outside]))
    return velocity, forms[:k].sum(0) + forms[k:].mean(0)


def _pullback(field: VectorField, x: Tensor) -> tuple[Tensor, VectorField]:
    """Return the velocity and the function from directions ``(k, batch, dim)`` to their products
    with the Jacobian.
    """
    velocity, pullback, *_ = torch.func.vjp(field, x)
    return velocity, torch.func.vmap(lambda direction: pullback(direction)[0])


def _pushforward(
    field: VectorField, x: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the velocity and the Jacobian's products with directions ``(k, batch, dim)``, by
    forward mode.
    """

    def along(direction: Tensor) -> tuple[Tensor, Tensor]:
        value, tangent, *_ = jvp(field, (x,), (direction,))
        return value, tangent

    # The velocity does not depend on the direction: it is computed, and comes back, once.
    return torch.func.vmap(along, out_dims=(None, 0))(directions)  # type: ignore[return-value, arg-type]


def _forms(products: VectorField, directions: Tensor) -> Tensor:
    """Return the quadratic form of the Jacobian at each direction, ``(k, batch)`` float64."""
    return (products(directions) * directions).sum(-1, dtype=torch.float64)
