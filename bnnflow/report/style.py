"""How every plot looks: one ink, one grey, one palette, quiet axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BODY",
    "GREY",
    "INK",
    "PALETTE",
    "SMALL",
    "array",
    "colours",
    "markers",
    "quiet",
]

INK = "#1b1f24"  # text and axes; the HTML report lets it follow the page's own colour
GREY = "#808890"
# Twelve hues that are told apart on white and on near black; with the markers, in print too.
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#c0408a",
    "#b58900",
    "#6a51c9",
    "#17a2b8",
    "#8c4a2f",
    "#7d9b00",
    "#c8102e",
    "#6b7280",
    "#e38ac0",
)
MARKERS = "osD^vPX<>hdp"
SMALL, BODY = 9, 10  # font sizes in points


def colours(names: list[str]) -> dict[str, str]:
    """Return a colour for every method, the same in every plot of the same methods."""
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}


def markers(names: list[str]) -> dict[str, str]:
    """Return a marker for every method, as `colours` does."""
    return {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(names)}


def quiet(ax: Axes) -> None:
    """Leave of the axes what a reader needs."""
    ax.patch.set_alpha(0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=INK, labelsize=SMALL, color=GREY, length=3)
    ax.grid(True, color=GREY, alpha=0.18, linewidth=0.6)
    ax.set_axisbelow(True)


def array(values: Any) -> np.ndarray:
    """Return a tensor's values, or anything array-like, as an array."""
    return (
        values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    )
