"""Matching: the permutation and signs of hidden units that bring a network closest to a
reference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from bnnflow.arguments import Count, checked, finite
from bnnflow.compiled import assigned
from bnnflow.model.network import ChainNetwork
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["match", "match_activations"]


@checked
def match(
    theta: Tensor,
    spec: WeightSpec,
    reference: Tensor,
    *,
    group: Symmetries | None = None,
    sweeps: Count = 20,
) -> Tensor:
    """Permute and flip hidden units so that each network is as close to its reference as can be
    found.

    Weight matching (Ainsworth et al. 2023): minimises the squared distance over the units of one
    hidden layer at a time, an assignment problem solved exactly, until nothing changes. With one
    hidden layer the result is the global minimum. With more, descent finds a local one, so it
    starts from the best of the units as given and two guesses, made from the inputs up and from the
    outputs down, in which the layers still to come are compared by what no permutation of theirs
    changes (the bound of Gilmore and Lawler). Network functions do not change, and no distance
    grows. Scales and phases stay: bring both sides to `normalise_scale` first where they should not
    count.

    Args:
        theta: networks, ``(..., dim)``.
        spec: what their entries mean; any labels, shared ones and channels of convolutions
            included.
        reference: ``(dim,)``, or ``(..., dim)`` for a reference of each network's own.
        group: the permutations and signs to use; by default all that keep the network's function.
        sweeps: the most passes over the hidden layers after the guesses; one suffices for a single
            hidden layer.

    Returns:
        The matched networks, ``(..., dim)``.

    Raises:
        ValueError: if a weight is NaN or infinite, if theta or reference has another shape, or if
            no group is given and the symmetries are not known.
    """
    group = spec.known_symmetries() if group is None else group
    flat, target = paired(theta, spec, reference)
    # in the order of depth
    labels = [
        label for label in spec.activations if label in group.permutation | group.sign
    ]
    if not labels:
        return theta
    given, size = theta.reshape(-1, spec.dim), max(16, _BLOCK // spec.dim)
    matched = []
    for start in range(0, max(1, len(flat)), size):
        rows = slice(start, start + size)
        theirs = target if len(target) == 1 else target[rows]
        search = _Search(flat[rows], spec, theirs, group)
        search.best_of_starts(labels, sweeps)
        matched.append(search.apply(given[rows]))
    return torch.cat(matched).reshape(theta.shape)


@checked
def match_activations(
    theta: Tensor,
    spec: WeightSpec,
    reference: Tensor,
    x: Tensor,
    *,
    net: nn.Module | None = None,
    group: Symmetries | None = None,
) -> Tensor:
    """Permute and flip hidden units so that their activations on data correlate most with those of
    a reference.

    Activation matching (Li et al. 2016; Ainsworth et al. 2023): every hidden layer is one
    assignment problem on the correlations over the rows, and no layer depends on another. A unit
    that is constant on the data correlates with none. Network functions do not change, and the
    result does not depend on the scales of units.

    Args:
        theta: networks, ``(..., dim)``.
        spec: what their entries mean.
        reference: ``(dim,)``, or ``(..., dim)`` for a reference of each network's own.
        x: data, ``(n, ...)``.
        net: the network, needed unless it is a perceptron. Units are then compared before their
            activation, as the modules with weights of their own (linear layers, convolutions,
            norms) return them.
        group: the permutations and signs to use; by default all that keep the network's function.

    Returns:
        The matched networks, ``(..., dim)``.

    Raises:
        ValueError: if a weight is NaN or infinite, if theta or reference has another shape, if no
            group is given and the symmetries are not known, or if the activations of a layer cannot
            be found.
    """
    group = spec.known_symmetries() if group is None else group
    flat, target = paired(theta, spec, reference)
    x = _rows(x, flat)
    labels = [
        label for label in spec.activations if label in group.permutation | group.sign
    ]
    shared = _correlates(target, spec, x, net) if len(target) == 1 else None
    perms: dict[str, list[Tensor]] = {label: [] for label in labels}
    signs: dict[str, list[Tensor]] = {label: [] for label in labels}
    for rows in torch.arange(len(flat), device=flat.device).split(_CHUNK):
        ours = _correlates(flat[rows], spec, x, net)
        theirs = shared or _correlates(target[rows], spec, x, net)
        for label in labels:
            product = _products(list(zip(ours[label], theirs[label], strict=True)))
            gain = (
                _Gain(torch.zeros_like(product), product)
                if label in group.sign
                else _Gain(product, None)
            )
            for kept, new in zip(
                (perms, signs), gain.best(label in group.permutation), strict=True
            ):
                kept[label].append(new)
    flips = {label: torch.cat(signs[label]) for label in labels if label in group.sign}
    orders = {label: torch.cat(perms[label]) for label in labels}
    return moved(theta.reshape(-1, spec.dim), spec, orders, flips).reshape(theta.shape)


_CHUNK = 256  # networks whose activations are held at once
_BLOCK = 2**21  # weights that are matched at once


def paired(theta: Tensor, spec: WeightSpec, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return the networks ``(batch, dim)`` and their references, ``(1, dim)`` if they share one."""
    for name, weights in (("theta", theta), ("reference", reference)):
        spec.check(weights, name)
        if not weights.is_floating_point():
            raise TypeError(f"{name} must hold floating-point numbers, got {weights.dtype}")
        if not bool(weights.to(theta.dtype).isfinite().all()):
            raise ValueError(
                f"{name} holds weights that are NaN or infinite, which cannot be matched"
            )
    if reference.dim() > 1 and reference.shape != theta.shape:
        raise ValueError(
            f"reference must be ({spec.dim},) or {tuple(theta.shape)}, got {tuple(reference.shape)}"
        )
    flat = theta.detach().reshape(-1, spec.dim)
    target = reference.detach().to(theta)
    return flat, target.reshape(1, -1) if target.dim() == 1 else target.reshape(
        -1, spec.dim
    )


class _Gain(NamedTuple):
    """What the network's unit j is worth at the reference's place i, entry (i, j) of
    ``(batch, n, n)``.

    Attributes:
        still: the part that no sign changes.
        flips: the part that changes sign with unit j, if it may.
    """

    still: Tensor
    flips: Tensor | None

    def best(self, permutes: bool) -> tuple[Tensor, Tensor]:
        """Return the order ``(batch, n)`` and the signs ``(batch, n)`` of largest total gain."""
        total = self.still if self.flips is None else self.still + self.flips.abs()
        identity = torch.arange(total.shape[1], device=total.device).expand(total.shape[:2])
        perms = assign(total) if permutes else identity
        if self.flips is None:
            return perms, torch.ones_like(perms, dtype=total.dtype)
        return perms, torch.where(_picked(self.flips, perms) < 0, -1.0, 1.0).to(total)

    def improves(self, perms: Tensor, signs: Tensor) -> Tensor:
        """Say for which networks ``(batch,)`` an order and signs are better than to leave the units
        as they are.
        """
        found, now = (
            _picked(self.still, perms).sum(1),
            self.still.diagonal(dim1=1, dim2=2).sum(1),
        )
        if self.flips is not None:
            found = found + (_picked(self.flips, perms) * signs).sum(1)
            now = now + self.flips.diagonal(dim1=1, dim2=2).sum(1)
        return found > now


class _Search:
    """A batch of networks, the gauge that each is in, and the reference that it is brought closer
    to.

    Maximises the inner product of network and reference, which is the same as to minimise their
    distance. Tensors are kept apart and in the current gauge, ``(batch, *blocks)``, and a step
    writes only those that it moves.
    """

    def __init__(
        self, flat: Tensor, spec: WeightSpec, target: Tensor, group: Symmetries
    ) -> None:
        self.flat, self.spec, self.target, self.group = flat, spec, target, group
        labels = group.permutation | group.sign
        self.axes, self.ours, self.theirs = {}, {}, {}
        for name in spec.names:
            shape, axes = spec.unit_axes(name)
            if name not in spec.extras and labels.intersection(axes):
                self.axes[name] = list(zip(axes, spec.scale_exponents(name), strict=True))
                self.ours[name] = flat[:, spec.slices[name]].reshape(-1, *shape).clone()
                self.theirs[name] = target[:, spec.slices[name]].reshape(-1, *shape)
        self.batch, self.device = len(flat), flat.device
        self.perms = {
            label: torch.arange(spec.widths[label], device=flat.device).repeat(len(flat), 1)
            for label in labels
        }
        self.signs = {
            label: flat.new_ones(len(flat), spec.widths[label]) for label in group.sign
        }
        self.stale = {
            label: torch.ones(len(flat), dtype=torch.bool, device=flat.device)
            for label in labels
        }

    def best_of_starts(self, labels: list[str], sweeps: int) -> None:
        """Descend from the best of the units as given and the guesses from either end."""
        for guess in (labels, labels[::-1]) if len(labels) > 1 else ():
            other = _Search(self.flat, self.spec, self.target, self.group)
            other.guess(guess)
            other.descend(labels, min(1, sweeps))
            self.take(other, other.value() > self.value())
        self.descend(labels, sweeps)

    def guess(self, labels: list[str]) -> None:
        """Match one label after the other, those still to come compared by what their order and
        signs cannot change.
        """
        unsettled = set(labels)
        for label in labels:
            self._move(
                label,
                *self._gain(label, None, unsettled).best(label in self.group.permutation),
                None,
            )
            unsettled.remove(label)
        if labels[-1] not in self._neighbours(labels[-1]):
            self.stale[labels[-1]][:] = False  # the others were settled

    def descend(self, labels: list[str], sweeps: int) -> None:
        """Match one label after the other, given all others, until nothing changes.

        A network's label is looked at again only after one that shares a tensor with it has
        changed since.
        """
        for _ in range(sweeps):
            for label in labels:
                rows = self.stale[label].nonzero().squeeze(1)
                if len(rows):
                    changed = self._improve(label, rows)
                    self.stale[label][rows] = False
                    for other in self._neighbours(label).intersection(labels):
                        self.stale[other][changed] = True
            if not any(bool(waiting.any()) for waiting in self.stale.values()):
                break

    def value(self) -> Tensor:
        """Return the inner product of every network with its reference, ``(batch,)``."""
        products = [
            (self.ours[name] * self.theirs[name]).flatten(1).sum(1) for name in self.axes
        ]
        return torch.stack(products).sum(0)

    def take(self, other: _Search, where: Tensor) -> None:
        """Replace the networks ``where`` ``(batch,)`` by those of another search from the same
        start.
        """
        rows = where.nonzero().squeeze(1)
        for own, new in (
            (self.ours, other.ours),
            (self.perms, other.perms),
            (self.signs, other.signs),
            (self.stale, other.stale),
        ):
            for key in own:
                own[key].index_copy_(0, rows, new[key][rows])

    def apply(self, flat: Tensor) -> Tensor:
        """Bring the networks ``(batch, dim)`` from the gauge that they were given in to the current
        one.
        """
        return moved(flat, self.spec, self.perms, self.signs)

    def _improve(self, label: str, rows: Tensor) -> Tensor:
        """Match a label of some networks, given all others; return those that came closer."""
        gain = self._gain(label, self._some(rows), set())
        perms, signs = gain.best(label in self.group.permutation)
        better = gain.improves(perms, signs)
        rows, perms, signs = rows[better], perms[better], signs[better]
        if len(rows) == 0:
            return rows
        if label in self._neighbours(label):
            return self._try(label, perms, signs, rows)
        self._move(label, perms, signs, self._some(rows))
        return rows

    def _try(self, label: str, perms: Tensor, signs: Tensor, rows: Tensor) -> Tensor:
        """Move units whose gain was linearised, and take back where that was too far.

        Return what stays moved.
        """
        before = self.value()[rows]
        self._move(label, perms, signs, rows)
        failed = self.value()[rows] <= before
        back = perms[failed].argsort(1)
        self._move(label, back, signs[failed].gather(1, back), rows[failed])
        return rows[~failed]

    def _gain(self, label: str, rows: Tensor | None, unsettled: set[str]) -> _Gain:
        """Return the gains of some networks' units, ``(rows, n, n)``.

        Along unsettled axes entries are compared in sorted order, which bounds the product from
        above.
        """
        signed = label in self.group.sign
        still: list[tuple[Tensor, Tensor]] = []
        flips: list[tuple[Tensor, Tensor]] = []
        for name, axes in self.axes.items():
            ours, theirs = self.ours[name], self.theirs[name]
            if rows is not None:
                ours, theirs = (
                    ours[rows],
                    theirs if len(theirs) == 1 < self.batch else theirs[rows],
                )
            for axis in (i for i, each in enumerate(axes) if each[0] == label):
                free = [
                    i for i, each in enumerate(axes) if i != axis and each[0] in unsettled
                ]
                blind = any(
                    axes[i][1] and axes[i][0] in self.group.sign for i in (axis, *free)
                ) and bool(free)
                pair = [
                    _by_unit(_sorted(side, free, blind), axis + 1)
                    for side in (ours, theirs)
                ]
                (flips if signed and axes[axis][1] and not free else still).append(
                    (pair[0], pair[1])
                )
        product = _products(flips) if flips else None
        if still:
            return _Gain(_products(still), product)
        assert product is not None
        return _Gain(torch.zeros_like(product), product)

    def _move(self, label: str, perms: Tensor, signs: Tensor, rows: Tensor | None) -> None:
        """Bring the units of some networks into another order, then flip them by ``signs``
        ``(rows, n)``.
        """
        for name, axes in self.axes.items():
            mine = [
                (i, power) for i, (each, power) in enumerate(axes, start=1) if each == label
            ]
            part = self.ours[name] if rows is None or not mine else self.ours[name][rows]
            for axis, power in mine:
                shape = (
                    len(perms),
                    *(1,) * (axis - 1),
                    perms.shape[1],
                    *(1,) * (part.dim() - axis - 1),
                )
                if label in self.group.permutation:
                    part = part.gather(axis, perms.reshape(shape).expand(part.shape))
                if label in self.group.sign and power:
                    part = part * signs.reshape(shape)
            if mine:
                self._write(self.ours, name, part, rows)
        of = slice(None) if rows is None else rows
        self._write(self.perms, label, self.perms[label][of].gather(1, perms), rows)
        if label in self.group.sign:
            self._write(
                self.signs, label, self.signs[label][of].gather(1, perms) * signs, rows
            )

    @staticmethod
    def _write(
        where: dict[str, Tensor], name: str, part: Tensor, rows: Tensor | None
    ) -> None:
        if rows is None:
            where[name] = part
        else:
            where[name].index_copy_(0, rows, part)

    def _some(self, rows: Tensor) -> Tensor | None:
        """Return None for all rows, which need no copies."""
        return None if len(rows) == self.batch else rows

    def _neighbours(self, label: str) -> set[str]:
        """Return the labels that share a tensor with this one.

        Itself only if it has two axes of one tensor.
        """
        found: set[str] = set()
        for axes in self.axes.values():
            labels = [each for each, _ in axes if each is not None]
            if label in labels:
                labels.remove(label)
                found.update(labels)
        return found


def _sorted(side: Tensor, free: list[int], blind: bool) -> Tensor:
    """Sort a tensor ``(batch, *blocks)``, or with ``blind`` its absolute values, along free axes of
    the blocks.
    """
    side = side.abs() if blind else side
    for axis in free:
        if side.is_cpu and side.dtype in (torch.float32, torch.float64):
            side = torch.from_numpy(np.sort(side.numpy(), axis + 1))  # ten times as fast
        else:
            side = side.sort(axis + 1)[0]
    return side


def _by_unit(side: Tensor, axis: int) -> Tensor:
    """Return what belongs to each unit of an axis, ``(batch, n, entries)``."""
    moved = side.movedim(axis, 1)
    return moved.reshape(*moved.shape[:2], math.prod(moved.shape[2:]))


def _products(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the inner products of units, ``(batch, n, n)``, of parts
    ``(batch or 1, n, entries)``.
    """
    ours = torch.cat([a for a, _ in pairs], 2)
    theirs = torch.cat([b for _, b in pairs], 2)
    return (theirs[0] if len(theirs) == 1 else theirs) @ ours.mT


def _picked(gain: Tensor, perms: Tensor) -> Tensor:
    """Return what each place gains, ``(batch, n)``."""
    return gain.gather(2, perms.unsqueeze(2)).squeeze(2)


def moved(
    flat: Tensor, spec: WeightSpec, perms: dict[str, Tensor], signs: dict[str, Tensor]
) -> Tensor:
    """Bring the units of networks ``(batch, dim)`` into another order, then flip them."""
    flat = spec.permute(flat, perms) if perms else flat
    return spec.flip(flat, signs) if signs else flat


def assign(gain: Tensor) -> Tensor:
    """Solve a batch of assignment problems: which j each i gets, ``(batch, n, n) -> (batch, n)``.

    By compiled code, or where there is none by scipy; of several solutions they may find different
    ones.

    Raises:
        ValueError: if a gain is not finite.
    """
    columns = assigned(gain)
    return _by_scipy(gain) if columns is None else columns


def _by_scipy(gain: Tensor) -> Tensor:
    """Solve by scipy, which has no batched solver, what is not solved already since the best j of
    every i are all different.
    """
    if not bool(gain.isfinite().all()):
        raise ValueError(
            f"weights are too large to be matched: their products overflow {gain.dtype}"
        )
    perms = gain.argmax(2)
    taken = torch.zeros_like(perms).scatter_(1, perms, 1)
    rows = (taken.sum(1) < perms.shape[1]).nonzero().squeeze(1)
    costs = gain[rows].neg().double().cpu().numpy()
    columns = np.empty(costs.shape[:2], dtype=np.int64)
    for row, cost in enumerate(costs):
        columns[row] = linear_sum_assignment(cost)[1]
    perms[rows] = torch.from_numpy(columns).to(gain.device)
    return perms


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """Return data in the type of the weights, checked; integers may be indices, and stay."""
    if x.dim() < 2 or len(x) == 0:
        raise ValueError(
            f"x must be (n, ...) with at least two axes and one row, got {tuple(x.shape)}"
        )
    x = x.detach()
    return finite("x", x.to(like) if x.is_floating_point() else x.to(like.device))


def _correlates(
    flat: Tensor, spec: WeightSpec, x: Tensor, net: nn.Module | None
) -> dict[str, list[Tensor]]:
    """Return the activations of every label, ``(batch, width, n)`` each, centred and of unit
    norm.
    """
    if net is not None:
        own = copy.deepcopy(net).to(flat)  # weights and hooks are put into it
        found = torch.func.vmap(lambda theta: _recorded(theta, spec, x, own))(flat)
    elif spec.layers:
        found = {
            label: [values] for label, values in ChainNetwork(spec).hidden(flat, x).items()
        }
    else:
        raise ValueError(
            "the activations of a network that is no perceptron are found through the "
            "network: pass net"
        )
    for tensors in found.values():
        for i, values in enumerate(tensors):
            centred = values - values.mean(2, keepdim=True)
            norm = centred.norm(dim=2, keepdim=True)
            silent = norm <= 1e-6 * values.norm(dim=2, keepdim=True)
            tensors[i] = torch.where(silent, 0.0, centred / torch.where(silent, 1.0, norm))
    return found


def _recorded(
    theta: Tensor, spec: WeightSpec, x: Tensor, net: nn.Module
) -> dict[str, list[Tensor]]:
    """Run one network ``(dim,)`` and return what the modules that write each label return,
    ``(width, n)`` each.
    """
    found: dict[str, list[Tensor]] = {label: [] for label in spec.activations}
    network, signed, hooks = spec.network, spec.symmetries().sign, []
    for prefix, module in net.named_modules():
        name = f"{prefix}.weight".removeprefix(".")
        written = network.written(name) if name in network.axes else 0
        label = network.unit_axes(name)[1][written] if name in network.axes else None
        # What a normalisation has still to come for keeps its sign when the unit is flipped.
        if label is not None and (
            network.scale_exponents(name)[written] or label not in signed
        ):
            hooks.append(
                module.register_forward_hook(
                    _keep(found[label], spec.widths[label], _unit_axis(module, name))
                )
            )
    try:
        torch.func.functional_call(net, network.unflatten(theta[: network.dim]), (x,))
    finally:
        for hook in hooks:
            hook.remove()
    for label, outputs in found.items():
        if not outputs:
            raise ValueError(
                f"the activations of {label} cannot be found: no module with a weight of its own "
                "returns them"
            )
    return found


def _keep(
    outputs: list[Tensor], width: int, axis: int
) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a hook that appends a module's output by units, ``(width, n)``."""
    return lambda module, inputs, output: outputs.append(
        output.movedim(axis, 0).reshape(width, -1)
    )


def _unit_axis(module: nn.Module, name: str) -> int:
    """Return the axis of a module's output that runs over its units."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return -1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return -len(module.normalized_shape)
    if isinstance(module, _ConvNd | nn.GroupNorm | _InstanceNorm):
        return 1
    raise ValueError(
        f"the activations behind {name} cannot be found: {type(module).__name__} is no known module"
    )
