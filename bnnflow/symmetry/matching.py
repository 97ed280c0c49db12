"""Alignment: the permutation and signs of hidden units that bring a network closest to a reference."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.types import HierarchicalPrior, Prior
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["align", "match", "sort_units"]


def match(
    theta: Tensor,
    spec: WeightSpec,
    reference: Tensor,
    *,
    group: Symmetries | None = None,
    sweeps: int = 5,
) -> Tensor:
    """Permute and flip hidden units so that each network is as close to its reference as can be found.

    Weight matching (Ainsworth et al. 2023): minimises the squared distance over the units of one hidden layer at a
    time, an assignment problem solved exactly, sweeping over the layers until nothing changes. With one hidden layer
    the result is the global minimum. Network functions do not change.

    Args:
        theta: networks, ``(..., dim)``.
        spec: what their entries mean.
        reference: ``(dim,)``, or ``(..., dim)`` for a reference of each network's own.
        group: the permutations and signs to use; by default all that keep the network's function.
        sweeps: the most passes over the hidden layers; one suffices for a single hidden layer.

    Returns:
        The matched networks, ``(..., dim)``.
    """
    group = spec.symmetries() if group is None else group
    flat = theta.reshape(-1, spec.dim)
    target = reference.expand_as(theta).reshape(-1, spec.dim)
    labels = [label for label in spec.activations if label in group.permutation | group.sign]  # in the order of depth
    if len(labels) <= 1:
        matched = _sweep(flat, spec, target, labels, group, set())
    else:
        # Descent finds a local optimum; of two starts, as given and greedy from the input side, the closer one wins.
        greedy = _sweep(flat, spec, target, labels, group, set(labels))
        starts = [_descend(start, spec, target, labels, group, sweeps) for start in (flat, greedy)]
        products = [(each * target).sum(-1, keepdim=True) for each in starts]
        matched = torch.where(products[0] >= products[1], *starts)
    return matched.reshape(theta.shape)


def _descend(
    flat: Tensor, spec: WeightSpec, target: Tensor, labels: list[str], group: Symmetries, sweeps: int
) -> Tensor:
    """Sweep over the hidden layers until nothing changes."""
    for _ in range(sweeps):
        new = _sweep(flat, spec, target, labels, group, set())
        if torch.equal(new, flat):
            break
        flat = new
    return flat


def _sweep(
    flat: Tensor, spec: WeightSpec, target: Tensor, labels: list[str], group: Symmetries, unsettled: set[str]
) -> Tensor:
    """Match one hidden layer after the other, by the tensors that touch no ``unsettled`` layer but the own one."""
    target_params = spec.unflatten(target)
    for label in labels:
        unsettled = unsettled - {label}
        gain = _inner_products(spec, label, spec.unflatten(flat), target_params, unsettled)  # (batch, n, n)
        signed = label in group.sign
        if label in group.permutation:
            perms = _assign(gain.abs() if signed else gain)
            flat = spec.permute(flat, {label: perms})
        else:
            perms = torch.arange(gain.shape[-1], device=gain.device).expand(gain.shape[:-1])
        if signed:
            chosen = gain.gather(-1, perms.unsqueeze(-1)).squeeze(-1)  # (batch, n)
            flat = spec.flip(flat, {label: torch.where(chosen < 0, -1.0, 1.0)})
    return flat


def _inner_products(
    spec: WeightSpec, label: str, params: dict[str, Tensor], target: dict[str, Tensor], without: set[str]
) -> Tensor:
    """Return ``(batch, n, n)``: entry (i, j) is the product of the reference's unit i with the network's unit j."""
    ours, theirs = [], []
    for name, axes in spec.axes.items():
        if label in axes and name not in spec.extras and not without.intersection(axes):
            axis, n = axes.index(label) + 1, spec.widths[label]
            ours.append(params[name].movedim(axis, 1).reshape(len(params[name]), n, -1))  # (batch, n, rest)
            theirs.append(target[name].movedim(axis, 1).reshape(len(target[name]), n, -1))
    return torch.bmm(torch.cat(theirs, -1), torch.cat(ours, -1).mT)


def _assign(gain: Tensor) -> Tensor:
    """Solve a batch of assignment problems, ``(batch, n, n) -> (batch, n)``; scipy has no batched solver."""
    problems = gain.detach().double().cpu().numpy()
    if not np.isfinite(problems).all():
        raise ValueError("cannot match weights that are NaN or infinite")
    columns = np.empty(problems.shape[:2], dtype=np.int64)
    for row, problem in enumerate(problems):
        columns[row] = linear_sum_assignment(problem, maximize=True)[1]
    return torch.from_numpy(columns).to(gain.device)


def align(
    draws: Draws | Tensor, model: BayesianModel, *, reference: Tensor | None = None, rounds: int = 5
) -> Draws | Tensor:
    """Bring all draws into one frame of units, matched to their own running mean.

    Starts from the draw of highest log joint density and alternates between matching every draw to the mean and
    averaging (a Frechet mean modulo the group). Network functions and densities do not change.

    Args:
        draws: draws, or weights ``(..., dim)``.
        model: whose symmetries, those that keep its prior too, are used.
        reference: match to these weights ``(dim,)`` instead.
        rounds: the most rounds of matching and averaging.

    Returns:
        What was given, with aligned weights.
    """
    theta = draws.theta if isinstance(draws, Draws) else draws
    flat = theta.reshape(-1, model.dim)
    group = model.spec.symmetries(model.prior)
    if reference is not None:
        flat = match(flat, model.spec, reference, group=group)
    else:
        log_joint = draws.log_joint.flatten() if isinstance(draws, Draws) else model.log_joint(flat)
        mean = flat[log_joint.argmax()]
        for _ in range(rounds):
            flat = match(flat, model.spec, mean, group=group)
            new_mean = flat.mean(0)
            if torch.allclose(new_mean, mean, rtol=1e-4, atol=1e-5):
                break
            mean = new_mean
    return draws.with_theta(flat) if isinstance(draws, Draws) else flat.reshape(theta.shape)


def sort_units(theta: Tensor, spec: WeightSpec, *, prior: Prior | HierarchicalPrior | None = None) -> Tensor:
    """Bring networks to a sorted canonical form: every unit's bias positive, where odd, and the biases increasing.

    Without biases the first incoming weight decides. Two networks of one orbit under permutations and signs have
    the same form, save for ties, which have probability zero.

    Args:
        theta: networks, ``(..., dim)``.
        spec: what their entries mean.
        prior: restrict the group to the symmetries that keep this prior too.
    """
    group = spec.symmetries(prior)
    for layer in spec.layers[:-1]:  # in the order of depth: a layer's key must not move again
        label = spec.axes[layer.weight][0]
        params = spec.unflatten(theta)
        key = params[layer.bias] if layer.bias is not None else params[layer.weight][..., 0]  # (..., n)
        if label in group.sign:
            theta = spec.flip(theta, {label: torch.where(key < 0, -1.0, 1.0)})
            key = key.abs()
        if label in group.permutation:
            theta = spec.permute(theta, {label: key.argsort(-1)})
    return theta
