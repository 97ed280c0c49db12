"""Plots of weight space: barriers and loss planes, convergence by layer, the structure of an
equivariant map.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow.diagnosis.convergence import WeightConvergence
from bnnflow.report.style import BODY, GREY, INK, SMALL, array, colours, quiet
from bnnflow.symmetry.connectivity import Barrier, Path, Plane
from bnnflow.verdicts import R_HAT
from bnnflow.weights import WeightSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["barrier", "block_structure", "convergence", "loss_plane", "pair_orbits"]

MAX_CELLS = 110  # rows of a map whose entries can still be told apart


# ---------------------------------------- mode connectivity


def barrier(barriers: Mapping[str, Barrier], *, y_label: str = "loss") -> Figure:
    """Plot the losses along paths: the mean over pairs of networks, and the band of the middle 80%
    of them.

    Args:
        barriers: by the name of the path, see `bnnflow.symmetry.barrier`.
        y_label: what the loss is.

    Raises:
        ValueError: if there are none.
    """
    from matplotlib.figure import Figure

    if not barriers:
        raise ValueError("there are no barriers to plot")
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    figure.patch.set_alpha(0)
    ax = figure.subplots()
    quiet(ax)
    for (name, each), colour in zip(
        barriers.items(), colours(list(barriers)).values(), strict=True
    ):
        t, losses = array(each.t), array(each.losses.double()).reshape(-1, len(each.t))
        if len(losses) > 1:
            ax.fill_between(
                t,
                *np.quantile(losses, [0.1, 0.9], axis=0),
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        ax.plot(t, losses.mean(0), color=colour, linewidth=1.8, label=name)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["one network", "", "halfway", "", "the other"])
    ax.set_ylabel(y_label, fontsize=BODY, color=INK)
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    figure.legend(
        loc="outside upper left", ncols=4, frameon=False, fontsize=SMALL, labelcolor=INK
    )
    return figure


def loss_plane(
    plane: Plane,
    path: Path | None = None,
    *,
    names: tuple[str, str, str] = ("A", "B", "bend"),
) -> Figure:
    """Plot the loss on the plane through three networks (Garipov et al. 2018), and a path in it
    beside the line.

    Args:
        plane: see `bnnflow.symmetry.loss_plane`.
        path: from the first network to the second; it is projected on the plane.
        names: of the three networks.
    """
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    figure = Figure(figsize=(6.2, 4.4), layout="constrained")
    figure.patch.set_alpha(0)
    ax = figure.subplots()
    losses, x, y = array(plane.losses.double()), array(plane.x), array(plane.y)
    low, high = losses.min(), np.quantile(losses, 0.98)
    levels = low + (high - low) * np.geomspace(1e-3, 1, 13)  # dense where the valley is
    levels[0] = low
    norm = BoundaryNorm(levels, 256, extend="max")
    shown = losses.clip(low, None)
    filled = ax.contourf(x, y, shown, levels, norm=norm, cmap="cividis_r", extend="max")
    ax.contour(x, y, shown, levels[1:], colors="white", linewidths=0.4, alpha=0.7)
    ends = array(plane.networks)
    outline = [withStroke(linewidth=4, foreground="white")]
    ax.plot(
        *ends[:2].T, color=INK, linewidth=1.4, linestyle=(0, (4, 2)), path_effects=outline
    )
    if path is not None:
        route = array(plane.locate(path.at(torch.linspace(0, 1, 101, dtype=torch.float64))))
        ax.plot(*route.T, color=INK, linewidth=2, path_effects=outline)
    for name, (right, up) in zip(names, ends, strict=True):
        ax.plot(
            right,
            up,
            "o",
            color="white",
            markersize=7,
            markeredgecolor=INK,
            markeredgewidth=1.2,
        )
        above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        ax.annotate(
            name,
            (right, up),
            color=INK,
            fontsize=BODY,
            weight="bold",
            path_effects=outline,
            **above,
        )
    bar = figure.colorbar(filled, ax=ax, ticks=levels[::2])
    bar.ax.set_yticklabels([f"{level:.4g}" for level in levels[::2]])
    bar.set_label("loss", fontsize=BODY, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=INK)
    ax.set_aspect("equal")
    ax.tick_params(colors=INK, labelsize=SMALL, color=GREY)
    ax.set_xlabel("distance in weight space", fontsize=BODY, color=INK)
    return figure


# ---------------------------------------- convergence


def convergence(result: WeightConvergence) -> Figure:
    """Plot the worst R-hat of each tensor: of the raw weights against the aligned ones, and of the
    predictions.

    The axis shows R-hat - 1 on a log scale; the line is the usual limit, 1.01. Where the symmetries
    of the network are not known only the raw weights are shown, and the label of the axis says why.

    Args:
        result: of `bnnflow.report.weight_convergence`.
    """
    from matplotlib.figure import Figure

    names = list(result.aligned)
    raw, aligned = (
        [_excess(by[name].worst[0]) for name in names]
        for by in (result.raw, result.aligned)
    )
    functions = _excess(result.functions.worst[0])
    figure = Figure(figsize=(6.4, 1.3 + 0.32 * (len(names) + 1)), layout="constrained")
    figure.patch.set_alpha(0)
    ax = figure.subplots()
    quiet(ax)
    ax.set_xscale("log")
    before, after = list(colours(["raw", "aligned"]).values())[::-1]
    rows = np.arange(len(names))
    ax.hlines(rows, aligned, raw, color=GREY, alpha=0.5, linewidth=1.5)
    ax.plot(raw, rows, "o", color=before, markersize=7, label="raw weights")
    if not result.unknown:
        ax.plot(aligned, rows, "o", color=after, markersize=7, label="modulo symmetry")
    ax.plot([functions], [len(names)], "D", color=INK, markersize=6, label="predictions")
    ax.axvline(_excess(R_HAT.good), color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    low, high = min(*raw, *aligned, functions), max(*raw, *aligned, functions, 0.03)
    ax.set_xlim(min(low, 5e-3) / 1.4, high * 1.4)
    ticks = [
        tick
        for tick in (1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 4, 19, 99)
        if min(low, 5e-3) <= tick <= high
    ]
    ax.set_xticks(ticks, [f"{1 + tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_yticks(np.arange(len(names) + 1), [*names, "predictions"])
    ax.set_ylim(len(names) + 0.6, -0.6)
    label = "worst R-hat of the tensor (log scale of R-hat - 1)"
    if result.unknown:
        label += "\nsymmetries not known: " + textwrap.fill(result.unknown, 60)
    ax.set_xlabel(label, fontsize=BODY, color=INK)
    figure.legend(
        loc="outside upper left", ncols=3, frameon=False, fontsize=SMALL, labelcolor=INK
    )
    return figure


def _excess(r_hat: float) -> float:
    return min(max(r_hat - 1, 1e-4), 1e3)  # infinite for chains that are stuck apart


# ---------------------------------------- equivariant maps


class _Kind(NamedTuple):
    """What a block of an equivariant map does with hidden units."""

    name: str
    colour: str


_DENSE = _Kind("dense: every entry to every entry", "#4a5260")
_UNITS = _Kind("same units: own value, sums over the others", "#0072b2")
_POOL = _Kind("pool: sums over units", "#d55e00")
_BROADCAST = _Kind("broadcast: to all units alike", "#009e73")
_BOTH = _Kind("pool, then broadcast", "#9a5aa8")


def block_structure(spec: WeightSpec) -> Figure:
    """Draw the structure of the linear maps on weight space that commute with permutations (Navon
    et al. 2023).

    The picture is the dim x dim matrix of such a map: row i says how the new weight i is made from
    all the old ones. Entries in one orbit of the group on pairs of weights share one parameter.
    Inside the block of two tensors every orbit has a tone of its own, darkest where both weights
    belong to the same units; the hue says what the block does. Wide networks are drawn with fewer
    units and inputs, and the title says so: the pattern is the same.

    Args:
        spec: of any network with labels, not only of a chain.

    Raises:
        ValueError: if no tensor has a hidden axis, or the symmetries are not known.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    spec = spec.network
    spec.known_symmetries()
    if not spec.widths:
        raise ValueError(
            "no weight belongs to a hidden unit: every linear map is equivariant"
        )
    drawn, note = _narrowed(spec)
    image, kinds = _coloured(drawn)
    # Placed by hand, in inches: the automatic layout gives way to the aspect of the picture, and
    # texts overlap.
    side = min(8.0, 4.0 + 0.06 * drawn.dim)
    rows = _row_names(drawn)
    left = 0.45 + 0.075 * max(len(line) for row in rows for line in row.splitlines())
    top = 0.25 + 0.075 * max(map(len, drawn.names)) + (0.5 if note else 0.3)
    bottom = 1.15
    width, height = left + side + 0.15, top + side + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    ax = figure.add_axes((left / width, bottom / height, side / width, side / height))
    ax.imshow(image, interpolation="none", extent=(0, drawn.dim, drawn.dim, 0))
    _name_tensors(ax, drawn, rows)
    parameters = int(pair_orbits(drawn).max()) + 1
    entries = f"{drawn.dim} x {drawn.dim} entries"
    title = f"Equivariant linear maps: {parameters:,} parameters for {entries}"
    figure.text(
        0.1 / width,
        1 - 0.1 / height,
        title,
        va="top",
        fontsize=BODY + 2,
        color=INK,
        fontweight="bold",
    )
    if note:
        text = f"{note}; the network itself has {spec.dim:,} weights"
        figure.text(
            0.1 / width, 1 - 0.34 / height, text, va="top", fontsize=SMALL, color=INK
        )
    handles = [Patch(facecolor=kind.colour, label=kind.name) for kind in kinds]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(left / width, 0.05 / height),
        ncols=2,
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
        borderpad=0,
        borderaxespad=0,
    )
    return figure


def pair_orbits(spec: WeightSpec) -> Tensor:
    """Number the orbits of hidden permutations on pairs of weights, ``(dim, dim)``.

    Two pairs are in one orbit if and only if their tensors and unlabelled indices agree and, on
    every label, the same indices coincide. Entries of an equivariant linear map in one orbit are
    equal, and their number is its number of parameters.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> int(pair_orbits(WeightSpec.of(net)).max()) + 1
        100
    """
    orbits, found = torch.empty(spec.dim, spec.dim, dtype=torch.long), 0
    for row, rows in spec.slices.items():
        for column, columns in spec.slices.items():
            fixed, equal, _ = _pattern(spec, row, column)
            _, number = torch.unique(
                torch.stack([fixed, equal]).flatten(1), dim=1, return_inverse=True
            )
            orbits[rows, columns] = found + number.reshape(fixed.shape)
            found += int(number.max()) + 1
    return orbits


def _pattern(spec: WeightSpec, row: str, column: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return of every pair of entries of two tensors, ``(entries, entries)`` each, what decides its
    orbit.

    The unlabelled indices as one number, which indices on shared labels coincide as one number, and
    how many do.
    """
    (own, labels), (other, other_labels) = _indices(spec, row), _indices(spec, column)
    axes = [(label, index[:, None]) for label, index in zip(labels, own, strict=True)]
    axes += [
        (label, index[None, :]) for label, index in zip(other_labels, other, strict=True)
    ]
    shape = (own.shape[1], other.shape[1])
    fixed, equal, count = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for number, (label, index) in enumerate(axes):
        if label is None:
            fixed = fixed * (int(index.max()) + 1) + index
        for _, earlier in (
            (name, each)
            for name, each in axes[:number]
            if label is not None and name == label
        ):
            same = (index == earlier).long().expand(shape)
            equal, count = 2 * equal + same, count + same
    return fixed, equal, count


def _indices(spec: WeightSpec, name: str) -> tuple[Tensor, tuple[str | None, ...]]:
    """Return the index of every entry along every axis, ``(axes, entries)``, and the labels of the
    axes.
    """
    shape, axes = spec.unit_axes(name)
    return torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).flatten(
        1
    ), axes


def _narrowed(spec: WeightSpec) -> tuple[WeightSpec, str]:
    """Return the space of a like network that is small enough to draw, and what was done to it, if
    anything.
    """
    drawn, note = spec, ""
    for units, free in ((4, 3), (3, 2), (2, 2), (2, 1)):
        if drawn.dim <= MAX_CELLS:
            break
        shapes, axes = {}, {}
        for name in spec.names:
            sizes, axes[name] = spec.unit_axes(name)
            limits = [free if label is None else units for label in axes[name]]
            shapes[name] = tuple(map(min, sizes, limits))
        drawn = replace(spec, shapes=shapes, axes=axes, layers=())
        note = f"drawn with {units} units a layer and {free} of any other index"
    return drawn, note


def _coloured(spec: WeightSpec) -> tuple[np.ndarray, list[_Kind]]:
    """Return the picture ``(dim, dim, 3)`` and the kinds of blocks in it."""
    from matplotlib.colors import to_rgb

    image, found = np.empty((spec.dim, spec.dim, 3)), set()
    for row, rows in spec.slices.items():
        for column, columns in spec.slices.items():
            fixed, equal, count = _pattern(spec, row, column)
            # Tones go from coinciding units to distinct ones, then over the unlabelled indices.
            order = torch.stack([-count, -equal, fixed]).flatten(1)
            orbits, number = torch.unique(order, dim=1, return_inverse=True)
            darkest = 0.95 if bool((count > 0).any()) else 0.5
            tones = torch.linspace(
                darkest, 0.2 if orbits.shape[1] > 1 else darkest, orbits.shape[1]
            )
            strength = array(tones[number].reshape(fixed.shape))[..., None]
            kind = _kind(set(spec.axes[row]) - {None}, set(spec.axes[column]) - {None})
            image[rows, columns] = 1 - strength * (1 - np.array(to_rgb(kind.colour)))
            found.add(kind)
    return image, [
        kind for kind in (_DENSE, _UNITS, _POOL, _BROADCAST, _BOTH) if kind in found
    ]


def _kind(row: set[str | None], column: set[str | None]) -> _Kind:
    if row == column:
        return _UNITS if row else _DENSE
    if row < column:
        return _POOL
    return _BROADCAST if column < row else _BOTH


def _row_names(spec: WeightSpec) -> list[str]:
    """Return the name of every tensor above its shape, in units of hidden layers."""
    shapes = [
        [
            label or str(size)
            for label, size in zip(spec.axes[name], spec.shapes[name], strict=True)
        ]
        for name in spec.names
    ]
    return [
        f"{name}\n{' x '.join(shape)}"
        for name, shape in zip(spec.names, shapes, strict=True)
    ]


def _name_tensors(ax: Axes, spec: WeightSpec, rows: list[str]) -> None:
    """Mark where tensors end, and name them on both sides."""
    ticks = [(where.start + where.stop) / 2 for where in spec.slices.values()]
    for where in spec.slices.values():
        ax.axhline(where.stop, color="white", linewidth=2.2)
        ax.axvline(where.stop, color="white", linewidth=2.2)
    ax.set_xticks(ticks, list(spec.names), rotation=90, fontsize=SMALL, color=INK)
    ax.set_yticks(ticks, rows, fontsize=SMALL, color=INK, linespacing=1.4)
    ax.tick_params(length=0, labeltop=True, labelbottom=False, pad=4)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("from the old weights", fontsize=BODY, color=INK)
    ax.set_ylabel("to the new weights", fontsize=BODY, color=INK)
