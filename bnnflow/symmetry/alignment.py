"""Alignment: many networks in one gauge."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from bnnflow import arguments
from bnnflow.arguments import Count, checked
from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.symmetry.matching import match, match_activations
from bnnflow.symmetry.sinkhorn import sinkhorn_rebasin
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["Method", "align", "frechet_mean"]

Method = Literal["weights", "activations", "sinkhorn"]


@checked
def align(
    model: BayesianModel,
    draws: Draws | Tensor,
    *,
    reference: Tensor | None = None,
    rounds: Count = 5,
    method: Method = "weights",
) -> Draws | Tensor:
    """Bring all draws into one gauge, matched to their own running mean.

    Starts from the draw of highest log joint density and alternates between matching every draw to
    the mean and averaging (a Frechet mean modulo the group, see `frechet_mean`). Network functions
    and densities do not change.

    Args:
        model: whose symmetries, those that keep its prior too, are used.
        draws: draws, or weights ``(..., dim)``.
        reference: match to these weights ``(dim,)`` instead.
        rounds: the most rounds of matching and averaging.
        method: how to match: by weights (`match`), by activations on the model's data
            (`match_activations`), or by Sinkhorn re-basin (`sinkhorn_rebasin`), which is far
            slower.

    Returns:
        What was given, with aligned weights. They stay as they are if the network is known to have
        no symmetry, or the prior keeps none.

    Raises:
        ValueError: if the network could not be labelled, so that its symmetries are not known, with
            the module or operation that is the reason; if a weight is NaN or infinite; if the
            weights are not the model's, or the draws those of another model.
    """
    theta = arguments.tensor("draws", draws.theta if isinstance(draws, Draws) else draws)
    model.spec.check(theta, "draws")
    model.check_draws(draws)
    if theta.numel() == 0:
        raise ValueError("draws is empty: there is no network to align")
    flat = theta.reshape(-1, model.dim)
    group = model.known_symmetries()
    matching = _matching(method, model, group)
    if reference is not None:
        flat = matching(flat, arguments.tensor("reference", reference))
    elif group.permutation or group.sign:
        given = isinstance(draws, Draws)
        log_joint = (
            draws.log_joint.flatten()
            if given
            else model.log_joint(flat.to(model.device, model.dtype))
        )
        best = log_joint.nan_to_num(nan=-math.inf).argmax()
        flat, _ = frechet_mean(
            flat, model.spec, start=flat[best], rounds=rounds, matching=matching
        )
    return draws.with_theta(flat) if isinstance(draws, Draws) else flat.reshape(theta.shape)


@checked
def frechet_mean(
    theta: Tensor,
    spec: WeightSpec,
    *,
    start: Tensor | None = None,
    rounds: Count = 5,
    matching: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Match networks to their mean, and average them, in turn: a mean modulo the symmetries.

    With weight matching every round lowers the sum of squared distances to the mean, so that the
    rounds end in a local minimum: a Frechet mean of the orbits, as far as the matching finds the
    shortest distances.

    Args:
        theta: networks, ``(batch, dim)``.
        spec: what their entries mean.
        start: the first reference, ``(dim,)``; by default the first network.
        rounds: the most rounds; they end as soon as the mean stays where it is.
        matching: what brings networks ``(batch, dim)`` close to a reference ``(dim,)``; by default
            `match`.

    Returns:
        The matched networks ``(batch, dim)``, and their mean ``(dim,)``.

    Raises:
        ValueError: if theta is no batch of networks, or, without a matching, the symmetries are not
            known.
    """
    spec.check(theta)
    if theta.dim() != 2 or len(theta) == 0:
        raise ValueError(f"theta must be (batch, {spec.dim}), got {tuple(theta.shape)}")
    matching = matching or (lambda networks, reference: match(networks, spec, reference))
    mean = theta[0] if start is None else start
    for _ in range(rounds):
        theta = matching(theta, mean)
        last, mean = mean, theta.mean(0)
        if torch.allclose(mean, last, rtol=1e-4, atol=1e-5):
            break
    return theta, mean


def _matching(
    method: Method, model: BayesianModel, group: Symmetries
) -> Callable[[Tensor, Tensor], Tensor]:
    spec = model.spec
    if method == "weights":
        return lambda theta, reference: match(theta, spec, reference, group=group)
    if method == "activations":
        net = None if spec.layers else model.net
        return lambda theta, reference: match_activations(
            theta, spec, reference, model.x, net=net, group=group
        )
    if method == "sinkhorn":
        return lambda theta, reference: sinkhorn_rebasin(
            theta, spec, reference, group=group
        )
    raise ValueError(
        f"method must be 'weights', 'activations' or 'sinkhorn', got {method!r}"
    )
