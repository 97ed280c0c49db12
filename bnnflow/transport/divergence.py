"""The divergence of a velocity field: exactly, or by Hutchinson's estimate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bnnflow.types import Noise

__all__ = ["exact_divergence", "hutchinson_divergence", "probe_noise"]

VectorField = Callable[[Tensor], Tensor]


def exact_divergence(field: VectorField, x: Tensor, chunk_size: int = 32) -> tuple[Tensor, Tensor]:
    """Return the velocity and its divergence, the trace of its Jacobian.

    Forward mode: one tangent for each coordinate, ``chunk_size`` coordinates at a time; the primal values are
    computed once a chunk.

    Args:
        field: ``(batch, dim) -> (batch, dim)``, acting on each row alone.
        x: ``(batch, dim)``.
        chunk_size: coordinates in one call; more is faster and takes more memory.

    Returns:
        ``(batch, dim)`` and ``(batch,)`` float64.
    """
    dim = x.shape[-1]
    divergence = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    velocity = torch.empty(0)
    basis = torch.eye(dim, dtype=x.dtype, device=x.device)
    for start in range(0, dim, chunk_size):
        rows = basis[start : start + chunk_size]  # (chunk, dim)

        def along(direction: Tensor) -> tuple[Tensor, Tensor]:
            value, tangent, *_ = torch.func.jvp(field, (x,), (direction.expand_as(x),))
            return value, tangent

        # The velocity does not depend on the direction: it is computed, and comes back, once.
        values, tangents = torch.func.vmap(along, out_dims=(None, 0))(rows)  # type: ignore[arg-type]
        picked = torch.einsum("cbd,cd->b", tangents, rows)  # the diagonal's part of this chunk
        velocity, divergence = values, divergence + picked.double()
    return velocity, divergence


def probe_noise(noise: Noise, probes: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the probes of one solve, ``(probes, batch, dim)``, of zero mean and unit covariance."""
    shape = (probes, *x.shape)
    if noise == "rademacher":
        bits = torch.randint(0, 2, shape, generator=generator, device=x.device)
        return (2 * bits - 1).to(x.dtype)
    if noise == "gaussian":
        return torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
    raise ValueError(f"noise must be 'rademacher' or 'gaussian', got {noise!r}")


def hutchinson_divergence(field: VectorField, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the velocity and an unbiased estimate of its divergence for each probe (Hutchinson 1989).

    Reverse mode: one vector-Jacobian product a probe.

    Args:
        field: ``(batch, dim) -> (batch, dim)``, acting on each row alone.
        x: ``(batch, dim)``.
        probes: ``(probes, batch, dim)``, fixed during a solve.

    Returns:
        ``(batch, dim)`` and ``(probes, batch)`` float64.
    """
    velocity, pullback, *_ = torch.func.vjp(field, x)
    products = torch.func.vmap(lambda probe: pullback(probe)[0])(probes)  # (probes, batch, dim)
    return velocity, (products * probes).sum(-1, dtype=torch.float64)
