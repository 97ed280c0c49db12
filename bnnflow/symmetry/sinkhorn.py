"""Re-basin by differentiable permutations: what weight matching is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnnflow.arguments import Count, Positive, checked
from bnnflow.inference.start import Adam
from bnnflow.seeding import as_generator
from bnnflow.symmetry.matching import assign, moved, paired
from bnnflow.types import Seed
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["sinkhorn_rebasin"]


@checked
def sinkhorn_rebasin(
    theta: Tensor,
    spec: WeightSpec,
    reference: Tensor,
    *,
    loss: Callable[[Tensor], Tensor] | None = None,
    group: Symmetries | None = None,
    steps: Count = 50,
    learning_rate: Positive = 0.1,
    temperature: Positive = 1.0,
    iterations: Count = 20,
    seed: Seed = 0,
) -> Tensor:
    """Permute and flip hidden units by gradient descent on soft permutations (Pena et al. 2023).

    The order of every hidden layer is a matrix of free parameters, made doubly stochastic by
    Sinkhorn's iteration and differentiated implicitly. Adam lowers the loss of the softly permuted
    networks, all layers together; the assignment closest to the last parameters is returned. Signs,
    which the paper has not, are the hyperbolic tangents of one more parameter for each unit. The
    defaults are those of the authors' code. Network functions do not change; a distance may grow
    where the descent fails.

    Args:
        theta: networks, ``(..., dim)``.
        spec: what their entries mean.
        reference: ``(dim,)``, or ``(..., dim)`` for a reference of each network's own.
        loss: what to lower, from softly permuted networks ``(batch, dim)`` to one number each,
            ``(batch,)``, where ``batch`` counts all networks; for instance the training loss half
            way to the reference. By default the squared distance to the reference.
        group: the permutations and signs to use; by default all that keep the network's function.
        steps: steps of Adam.
        learning_rate: their size.
        temperature: of Sinkhorn's operator; small is hard.
        iterations: of Sinkhorn's operator.
        seed: of the first parameters, which are the identity and a tenth of Gaussian noise.

    Returns:
        The permuted networks, ``(..., dim)``.

    Raises:
        ValueError: if a weight is NaN or infinite, if theta or reference has another shape, or if
            no group is given and the symmetries are not known.
    """
    group = spec.known_symmetries() if group is None else group
    flat, target = paired(theta, spec, reference)
    generator = as_generator(seed, flat.device)
    ordered, signed = sorted(group.permutation), sorted(group.sign)
    if not ordered and not signed:
        return theta
    sizes = [spec.widths[label] ** 2 for label in ordered] + [
        spec.widths[label] for label in signed
    ]

    def elements(parameters: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Split ``(batch, ...)`` into scores ``(batch, n, n)`` and signs ``(batch, n)`` by
        label.
        """
        parts = parameters.split(sizes, -1)
        scores = [
            part.unflatten(-1, (spec.widths[x], -1))
            for x, part in zip(ordered, parts, strict=False)
        ]
        return dict(zip(ordered, scores, strict=True)), dict(
            zip(signed, parts[len(ordered) :], strict=True)
        )

    def soft(parameters: Tensor) -> Tensor:
        scores, signs = elements(parameters)
        soft_perms = {
            label: soft_permutation(each / temperature, iterations)
            for label, each in scores.items()
        }
        return _mixed(
            flat, spec, soft_perms, {label: each.tanh() for label, each in signs.items()}
        )

    loss = loss or (lambda mixed: (mixed - target).square().sum(-1))
    noise = torch.randn(
        len(flat), sum(sizes), generator=generator, dtype=flat.dtype, device=flat.device
    )
    start = [torch.eye(spec.widths[label]).flatten() for label in ordered]
    start += [torch.ones(spec.widths[label]) for label in signed]
    parameters = torch.cat(start).to(flat) + 0.1 * noise
    adam = Adam(parameters)
    for _ in range(steps):
        parameters.requires_grad_()
        with torch.enable_grad():
            grad = torch.autograd.grad(loss(soft(parameters)).sum(), parameters)[0]
        parameters = adam.step(parameters.detach(), -grad, learning_rate)
    scores, signs = elements(parameters)
    perms = {label: assign(each) for label, each in scores.items()}
    flips = {
        label: torch.where(each < 0, -1.0, 1.0).to(flat) for label, each in signs.items()
    }
    return moved(theta.reshape(-1, spec.dim), spec, perms, flips).reshape(theta.shape)


def soft_permutation(scores: Tensor, iterations: int = 20) -> Tensor:
    """Return doubly stochastic matrices ``(..., n, n)``: exp(scores) with rows and columns scaled
    to sum to one.

    Derivatives are those of the limit, by the implicit function theorem (Eisenberger et al. 2022),
    at the cost of one linear system.
    """
    return _Sinkhorn.apply(scores, iterations)  # type: ignore[return-value]


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, iterations: int) -> Tensor:
        log_soft = scores
        for _ in range(iterations):
            log_soft = log_soft.log_softmax(-2)
            log_soft = log_soft.log_softmax(-1)
        soft = log_soft.exp()
        ctx.save_for_backward(soft)
        return soft

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # With soft = diag(e^u) exp(scores) diag(e^v), keeping the sums of rows and columns gives a
        # linear system in the adjoints of u and v. Eliminating u leaves a Laplacian, singular along
        # constants: the ridge fixes those.
        ((soft,), (grad,)) = ctx.saved_tensors, grads
        n = soft.shape[-1]
        weighted = soft * grad
        rows, columns = weighted.sum(-1), weighted.sum(-2)
        total = soft.sum(-1, keepdim=True)
        laplacian = torch.diag_embed(soft.sum(-2)) - soft.mT @ (soft / total)
        ridge = (
            10
            * n
            * torch.finfo(soft.dtype).eps
            * torch.eye(n, dtype=soft.dtype, device=soft.device)
        )
        rhs = columns.unsqueeze(-1) - soft.mT @ (rows.unsqueeze(-1) / total)
        factor, _ = torch.linalg.cholesky_ex(laplacian + ridge)
        v = torch.cholesky_solve(rhs, factor)  # (..., n, 1)
        u = (rows.unsqueeze(-1) - soft @ v) / total
        return weighted - soft * (u + v.mT), None


def _mixed(
    flat: Tensor, spec: WeightSpec, soft: dict[str, Tensor], signs: dict[str, Tensor]
) -> Tensor:
    """Mix the units of networks ``(batch, dim)`` by matrices ``(batch, n, n)``, then multiply them
    by soft signs.
    """
    parts = []
    for name in spec.names:
        shape, axes = spec.unit_axes(name)
        part = flat[:, spec.slices[name]].reshape(-1, *shape)
        for axis, (label, power) in enumerate(
            zip(axes, spec.scale_exponents(name), strict=True), start=1
        ):
            if label is None or name in spec.extras:
                continue
            moved = part.movedim(axis, 1)
            # (batch, n, entries)
            entries = moved.reshape(*moved.shape[:2], math.prod(moved.shape[2:]))
            entries = soft[label] @ entries if label in soft else entries
            entries = (
                signs[label].unsqueeze(2) * entries if label in signs and power else entries
            )
            part = entries.reshape(moved.shape).movedim(1, axis)
        parts.append(part.flatten(1))
    return torch.cat(parts, -1)  # (batch, dim)
