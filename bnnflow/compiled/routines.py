"""Compiled for the CPU: random numbers, steps of samplers and assignment problems, and the library
that holds them and the densities of perceptrons.

The source is ``fused.cpp`` beside this file. The machine's own C++ compiler (``$CXX``, ``c++``,
``g++`` or ``clang++``) makes a library of it the first time that it is needed, which takes a few
seconds, and `bnnflow.compiled.building` keeps it for later processes. Where that does not work,
which is said once, or ``BNNFLOW_FUSED=0`` is set, or something tracks derivatives, the caller
computes with torch instead: same numbers to rounding, only slower. Random numbers are the
exception: with a library they come from Threefry, without one from torch, so a seed gives the same
draws only where both runs have a library or neither has.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bnnflow.compiled.building import say_once, shared_library

__all__ = [
    "assigned",
    "is_tracked",
    "is_untracked_cpu",
    "key_of",
    "langevin",
    "library",
    "max_norm",
    "normal_like",
    "stratified_rows",
    "turned",
    "unit",
]

_SCALARS = {torch.float32: "float", torch.float64: "double"}
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-pthread",
)

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int64


def is_untracked_cpu(*tensors: Tensor) -> bool:
    """Say whether tensors are ordinary memory on the CPU and nothing tracks their derivatives."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    here = all(
        tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)
        for tensor in tensors
    )
    return here and not is_tracked(*tensors)


def is_tracked(*tensors: Tensor) -> bool:
    """Say whether anything follows the derivatives of one of the tensors, or maps over it."""
    tracking = torch.is_grad_enabled()
    return any(
        (tracking and tensor.requires_grad)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]
        or (
            forward_ad._current_level >= 0
            and forward_ad.unpack_dual(tensor).tangent is not None
        )
        for tensor in tensors
    )


# ---------------------------------------- random numbers and steps


def normal_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers with the shape, the type and the device of a tensor.

    On the CPU one integer of the generator is the key from which the compiled Threefry (Salmon et
    al. 2011) makes them all, in less than half the time of ``torch.randn``, which takes over where
    there is no library.

    Args:
        like: says what they look like.
        generator: advances by one integer, or as ``torch.randn`` advances it; on the tensor's
            device.
    """
    compiled = library(like.dtype) if like.is_cpu else None
    if compiled is None:
        return torch.randn(
            like.shape, generator=generator, device=like.device, dtype=like.dtype
        )
    normals = torch.empty(like.shape, dtype=like.dtype)
    compiled.bnnflow_normals(key_of(generator), normals.numel(), normals.data_ptr())
    return normals


def langevin(
    theta: Tensor,
    grad: Tensor,
    metric: Tensor,
    root: Tensor,
    drift: float,
    spread: float,
    generator: torch.Generator,
) -> Tensor:
    """Return theta + drift * metric * grad + spread * root * noise, the noise as from
    `normal_like`.

    Args:
        theta: ``(chain, dim)``.
        grad: ``(chain, dim)``.
        metric: ``(dim,)`` or ``(chain, dim)``.
        root: like ``metric``.
        drift: factor of the gradient.
        spread: factor of the noise.
        generator: source of the noise.
    """
    compiled = library(theta.dtype) if _dense(theta, grad, metric, root) else None
    if compiled is None:
        moved = torch.addcmul(theta, grad, metric, value=drift)
        return moved.addcmul_(normal_like(theta, generator), root, value=spread)
    moved = torch.empty_like(theta)
    compiled.bnnflow_langevin(
        key_of(generator),
        *theta.shape,
        theta.data_ptr(),
        grad.data_ptr(),
        metric.data_ptr(),
        root.data_ptr(),
        0 if metric.dim() == 1 else theta.shape[1],
        drift,
        spread,
        moved.data_ptr(),
    )
    return moved


def max_norm(grad: Tensor, root: Tensor, value: Tensor) -> float:
    """Return a bound on the longest grad * root of all chains, not finite if something is not.

    Args:
        grad: ``(chain, dim)``.
        root: ``(dim,)`` or ``(chain, dim)``.
        value: ``(chain,)``, float64; what else must be finite.
    """
    compiled = (
        library(grad.dtype)
        if _dense(grad, grad, root, root) and value.is_contiguous()
        else None
    )
    if compiled is None or value.dtype != torch.float64:
        return float(torch.linalg.vector_norm(grad * root)) + 0 * float(value.sum())
    stride = 0 if root.dim() == 1 else grad.shape[1]
    return compiled.bnnflow_longest(
        *grad.shape, grad.data_ptr(), root.data_ptr(), stride, value.data_ptr()
    )


def turned(direction: Tensor, grad: Tensor, time: Tensor) -> tuple[Tensor, Tensor] | None:
    """Turn directions towards gradients, ``(chain, dim)`` each, for times ``(1,)`` or
    ``(chain, 1)``, as `bnnflow.dynamics.momentum_update` does.

    Returns:
        The new directions and the changes of kinetic energy ``(chain,)``; None where the library
        cannot.
    """
    same = direction.dtype == grad.dtype == time.dtype
    plain = same and is_untracked_cpu(direction, grad, time)
    compiled = library(grad.dtype) if plain and direction.dim() == 2 else None
    if compiled is None:
        return None
    new, grad, time = direction.clone().contiguous(), grad.contiguous(), time.contiguous()
    change = torch.empty(len(new), dtype=torch.float64)
    compiled.bnnflow_turn(
        *new.shape,
        new.data_ptr(),
        grad.data_ptr(),
        time.data_ptr(),
        int(time.numel() > 1),
        change.data_ptr(),
    )
    return new, change


def unit(vectors: Tensor) -> Tensor:
    """Return vectors ``(chain, dim)`` divided by their lengths."""
    plain = is_untracked_cpu(vectors) and vectors.dim() == 2
    compiled = library(vectors.dtype) if plain else None
    if compiled is None:
        return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    vectors = vectors.clone().contiguous()
    compiled.bnnflow_normalise(*vectors.shape, vectors.data_ptr())
    return vectors


def _dense(theta: Tensor, grad: Tensor, metric: Tensor, root: Tensor) -> bool:
    """Say whether these are what compiled code takes for ``(chain, dim)`` twice, and ``(dim,)`` or
    the same twice.
    """
    return (
        theta.is_cpu
        and theta.dtype == grad.dtype == metric.dtype == root.dtype
        and theta.shape == grad.shape
        and metric.shape == root.shape
        and (metric.dim() == 1 or metric.shape == theta.shape)
        and theta.is_contiguous()
        and grad.is_contiguous()
        and metric.is_contiguous()
        and root.is_contiguous()
    )


def stratified_rows(
    shape: tuple[int, ...],
    size: int,
    n: int,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Tensor | None:
    """Draw one row of each of ``size`` equal stretches of ``n`` rows, int64 ``(*shape, size)``.

    As `normal_like` does.

    Args:
        shape: of the batches.
        size: rows in a batch.
        n: rows that exist.
        generator: advances by one integer.
        dtype: of the library that is used; None is returned where there is none, or the generator
            is not on the CPU.
    """
    compiled = library(dtype) if generator.device.type == "cpu" else None
    if compiled is None:
        return None
    rows = torch.empty((*shape, size), dtype=torch.int64)
    compiled.bnnflow_rows(key_of(generator), math.prod(shape), size, n, rows.data_ptr())
    return rows


def key_of(generator: torch.Generator) -> int:
    """Draw the key from which compiled code makes its random numbers."""
    return torch.empty((), dtype=torch.int64).random_(generator=generator).item()  # type: ignore[return-value]


def assigned(gain: Tensor) -> Tensor | None:
    """Solve assignment problems ``(batch, n, n)``: the columns ``(batch, n)`` of largest total
    gain.

    None where there is no library, or a gain is not finite.
    """
    gain = gain.detach().contiguous()
    compiled = library(gain.dtype) if is_untracked_cpu(gain) else None
    if compiled is None:
        return None
    columns = torch.empty(gain.shape[:2], dtype=torch.int64)
    failed = compiled.bnnflow_assign(*gain.shape[:2], gain.data_ptr(), columns.data_ptr())
    return None if failed else columns


# ---------------------------------------- the library


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the compiled library for a floating-point type, or None where there can be none."""
    scalar = _SCALARS.get(dtype)
    if scalar is None or os.environ.get("BNNFLOW_FUSED") == "0":
        return None
    try:
        loaded = shared_library(
            Path(__file__).with_name("fused.cpp"), [*_FLAGS, f"-DSCALAR={scalar}"]
        )
    except OSError as error:
        say_once(
            f"perceptrons are evaluated by torch, several times as slowly as compiled: {error}"
        )
        return None
    loaded.bnnflow_normals.argtypes = [ctypes.c_uint64, _Int, _Pointer]
    loaded.bnnflow_rows.argtypes = [ctypes.c_uint64, _Int, _Int, _Int, _Pointer]
    number = ctypes.c_double
    loaded.bnnflow_langevin.argtypes = [
        ctypes.c_uint64, _Int, _Int, *[_Pointer] * 4, _Int, number, number, _Pointer
    ]  # fmt: skip
    loaded.bnnflow_turn.argtypes = [
        _Int, _Int, _Pointer, _Pointer, _Pointer, _Int, _Pointer
    ]  # fmt: skip
    loaded.bnnflow_normalise.argtypes = [_Int, _Int, _Pointer]
    loaded.bnnflow_longest.argtypes = [_Int, _Int, _Pointer, _Pointer, _Int, _Pointer]
    for function in (
        loaded.bnnflow_normals,
        loaded.bnnflow_rows,
        loaded.bnnflow_langevin,
        loaded.bnnflow_turn,
        loaded.bnnflow_normalise,
    ):
        function.restype = None
    loaded.bnnflow_longest.restype = ctypes.c_double
    loaded.bnnflow_assign.argtypes = [_Int, _Int, _Pointer, _Pointer]
    return loaded
