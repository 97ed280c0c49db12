"""Canonical forms: one network for each orbit of the symmetry group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnnflow.arguments import checked
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["normalise_scale", "normalise_sign", "sort_units"]


@checked
def sort_units(
    theta: Tensor, spec: WeightSpec, *, group: Symmetries | None = None
) -> Tensor:
    """Bring networks to a sorted canonical form: every unit's bias positive, where odd, and the
    biases increasing.

    Biases of sines are first brought within a quarter turn of zero, by shifts of half a turn. A
    layer without biases is sorted by its first incoming weight. Layers are sorted in the order of
    depth, so that this weight is one from an input or from a unit that is already in its place. Two
    networks of one orbit under permutations, signs and phases have the same form, save for ties,
    which have probability zero. Scales are left as they are: see `normalise_scale`.

    Args:
        theta: networks, ``(..., dim)``.
        spec: what their entries mean.
        group: what may be done to them; all symmetries of the network's function if None.

    Raises:
        ValueError: if nothing that a layer reads is in its place before it, or if the symmetries
            are not known.
    """
    spec.check(theta)
    group = spec.known_symmetries() if group is None else group
    movable = group.permutation | group.sign | group.phase
    for (
        label
    ) in spec.activations:  # in the order of depth: a layer's key must not move again
        if label in movable:
            unsettled = movable.difference(
                list(spec.activations)[: list(spec.activations).index(label)]
            )
            key = _key(theta, spec, label, unsettled, label in group.sign)  # (..., n)
            if label in group.phase:
                half_turn = spec.activations[label].half_turn
                assert half_turn is not None
                turns = -(key / half_turn).round()
                theta, key = spec.shift(theta, {label: turns}), key + half_turn * turns
            if label in group.sign:
                theta = spec.flip(theta, {label: torch.where(key < 0, -1.0, 1.0)})
                key = key.abs()
            if label in group.permutation:
                theta = spec.permute(theta, {label: key.argsort(-1)})
    return theta


def _key(
    theta: Tensor, spec: WeightSpec, label: str, unsettled: frozenset[str], signed: bool
) -> Tensor:
    """Return one number for each unit, ``(..., width)``, that no unsettled layer can change: a bias
    if there is one.
    """
    written = _written(spec, label, unsettled)
    candidates = [
        name
        for name in written
        if spec.scale_exponents(name)[spec.written(name)] or not signed
    ]
    if not candidates:
        raise ValueError(
            f"nothing sorts the units of {label}: all that they read are units of unsorted layers"
        )
    name = min(candidates, key=lambda each: len(spec.unit_axes(each)[0]))
    return _units(theta, spec, name)[..., 0]


@checked
def normalise_scale(theta: Tensor, spec: WeightSpec, *, last_layer: bool = False) -> Tensor:
    """Give every unit with a scale symmetry incoming weights of unit norm, and multiply what leaves
    it accordingly.

    The incoming weights of a unit are those and its bias together, the bias being a weight from a
    constant input (Pittorino et al. 2022). Layers are normalised in the order of depth, which the
    inputs alone fix: the result is the same for all networks of one orbit under scales, and network
    functions do not change. Units that several tensors write, as in residual networks, are divided
    by the joint norm of the tensors that read inputs or earlier layers only: a joint norm with what
    later layers write back would move again when those are normalised. Units without any such
    weight but zeros stay as they are.

    Args:
        theta: networks, ``(..., dim)``.
        spec: what their entries mean.
        last_layer: divide the output layer by its norm, too. This multiplies all outputs of a
            network by one number: no argmax changes, but every predictive probability, and with
            them losses, likelihoods and calibration. It is wrong for a Bayesian predictive, and is
            here for comparison with published figures.

    Raises:
        ValueError: if ``last_layer`` is asked of a network that has no single output layer, or if
            the symmetries are not known.
    """
    outputs = _output_layer(spec) if last_layer else []
    theta, _ = split_scale(theta, spec)
    if outputs:
        where = torch.zeros(spec.dim, dtype=torch.bool, device=theta.device)
        for name in outputs:
            where[spec.slices[name]] = True
        norm = theta[..., where].norm(dim=-1, keepdim=True)
        theta = torch.where(where & (norm > 0), theta / norm, theta)
    return theta


def split_scale(theta: Tensor, spec: WeightSpec) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what `normalise_scale` makes of networks, and the norms of their units,
    ``(..., width)`` by label.

    ``spec.rescale`` takes the first by the second to the networks again. The norm of a unit without
    weights is 1.
    """
    spec.check(theta)
    norms: dict[str, Tensor] = {}
    for label, names in scale_tensors(spec).items():
        # (..., n)
        norm = torch.cat([_units(theta, spec, name) for name in names], -1).norm(dim=-1)
        norms[label] = torch.where(norm > torch.finfo(norm.dtype).tiny, norm, 1.0)
        theta = spec.rescale(theta, {label: 1 / norms[label]})
    return theta, norms


def scale_tensors(spec: WeightSpec) -> dict[str, list[str]]:
    """Return the tensors that fix the norms of each label's units, in the order of depth."""
    scalable = spec.known_symmetries().scale
    tensors = {}
    for index, label in enumerate(spec.activations):
        unsettled = scalable.difference(list(spec.activations)[:index])
        names = [
            name
            for name in _written(spec, label, unsettled)
            if spec.scale_exponents(name)[spec.written(name)]
        ]
        if label in scalable and names:
            tensors[label] = names
    return tensors


@checked
def normalise_sign(theta: Tensor, spec: WeightSpec) -> Tensor:
    """Fix the phases of sines and the signs of units of odd activations.

    Permutations are left as they are.

    A phase is fixed by a bias within a quarter turn of zero, a sign by the first weight between the
    unit and an input or an output being positive, or by its bias where it touches neither. The
    result is the same for all networks of one orbit under phases and signs, and network functions
    do not change.

    Args:
        theta: networks, ``(..., dim)``.
        spec: what their entries mean.

    Raises:
        ValueError: if the symmetries are not known, or nothing fixes the signs of a layer.
    """
    spec.check(theta)
    group = spec.known_symmetries()
    for label in spec.activations:
        if label in group.phase:
            half_turn = spec.activations[label].half_turn
            assert half_turn is not None
            bias = next(name for name in spec.names if spec.axes[name] == (label,))
            turns = (theta[..., spec.slices[bias]] / half_turn).round().long()
            theta = spec.shift(theta, {label: -turns})
    for label in spec.activations:
        if label in group.sign:
            theta = spec.flip(
                theta, {label: torch.where(_sign_key(theta, spec, label) < 0, -1.0, 1.0)}
            )
    return theta


def _sign_key(theta: Tensor, spec: WeightSpec, label: str) -> Tensor:
    """Return a number of each unit, ``(..., width)``, that changes sign with it and with nothing
    else.
    """
    own = [
        name
        for name in spec.names
        if [each for each in spec.axes[name] if each is not None] == [label]
    ]
    own = [name for name in own if any(spec.scale_exponents(name))]
    if not own:
        raise ValueError(
            f"nothing fixes the signs of {label}: no bias, input or output touches its units"
        )
    name = max(own, key=lambda each: len(spec.shapes[each]))
    axes = spec.unit_axes(name)[1]
    tensor = theta[..., spec.slices[name]].unflatten(-1, spec.unit_axes(name)[0])
    return (
        tensor.movedim(axes.index(label) - len(axes), -len(axes)).flatten(-len(axes) + 1)[
            ..., 0
        ]
        if len(axes) > 1
        else tensor
    )


def _written(spec: WeightSpec, label: str, unsettled: frozenset[str]) -> list[str]:
    """Return the tensors that hold what enters the units of a label, from inputs and settled labels
    alone.
    """
    found = []
    for name in (name for name in spec.names if name not in spec.extras):
        axes = list(spec.unit_axes(name)[1])
        if axes.pop(spec.written(name)) == label and not unsettled.intersection(axes):
            found.append(name)
    return found


def _units(theta: Tensor, spec: WeightSpec, name: str) -> Tensor:
    """Return a tensor by the units that it writes, ``(..., width, entries)``."""
    shape, written = spec.unit_axes(name)[0], spec.written(name)
    tensor = (
        theta[..., spec.slices[name]]
        .unflatten(-1, shape)
        .movedim(written - len(shape), -len(shape))
    )
    return tensor.reshape(
        *theta.shape[:-1], shape[written], math.prod(shape) // shape[written]
    )


def _output_layer(spec: WeightSpec) -> list[str]:
    """Return the names of the tensors that write the outputs."""
    names = [
        name
        for name in spec.names
        if name not in spec.extras and spec.unit_axes(name)[1][spec.written(name)] is None
    ]
    if sum(len(spec.shapes[name]) > 1 for name in names) != 1:
        raise ValueError("last_layer=True needs a network with one output layer")
    return names
