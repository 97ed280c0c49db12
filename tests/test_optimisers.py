"""Muon's updates are those of its definition, and of torch's form of it."""

import math

import pytest
import torch
from torch import nn

from bnnflow.optimisers import Muon

SHAPES = [(8, 8), (6, 20), (20, 6), (8, 8)]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for shape in SHAPES
    ]


def gradients(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def walk(optimiser: torch.optim.Optimizer, own: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for parameter, grad in zip(own, gradients(step, own[0].dtype), strict=True):
            parameter.grad = grad
        optimiser.step()


def test_a_step_is_the_polynomial_of_the_singular_values() -> None:
    own, before = parameters(torch.float64), parameters(torch.float64)
    walk(Muon(own, 0.1, 0.5), own, 1)
    for new, old, grad in zip(own, before, gradients(0, torch.float64), strict=True):
        u, s, vt = torch.linalg.svd(grad, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        update = 0.2 * math.sqrt(max(grad.shape)) * (u * s) @ vt
        torch.testing.assert_close(new.data, old * (1 - 0.1 * 0.5) - 0.1 * update)


def test_steps_are_those_of_torch_within_its_bfloat16() -> None:
    own, theirs = parameters(torch.float32), parameters(torch.float32)
    walk(Muon(own, 0.1, 0.5), own, 6)
    options = {"weight_decay": 0.5, "adjust_lr_fn": "match_rms_adamw"}
    walk(torch.optim.Muon(theirs, 0.1, **options), theirs, 6)
    start = parameters(torch.float32)
    with torch.no_grad():
        moved = [(a - b).norm() for a, b in zip(own, start, strict=True)]
        apart = [(a - b).norm() for a, b in zip(own, theirs, strict=True)]
    assert all(gap < 0.02 * way for gap, way in zip(apart, moved, strict=True))


def test_what_has_no_gradient_stays() -> None:
    own, before = parameters(torch.float32), parameters(torch.float32)
    own[1].grad = torch.zeros(SHAPES[1])
    optimiser = Muon(own, 0.1, 0.0)
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))
    assert list(optimiser.state) == [own[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_precision_is_the_parameters(dtype: torch.dtype) -> None:
    own = parameters(dtype)
    optimiser = Muon(own, 0.1, 0.0)
    walk(optimiser, own, 2)
    assert all(optimiser.state[p]["momentum_buffer"].dtype == p.dtype == dtype for p in own)
