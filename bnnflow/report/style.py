"""How every plot looks: one ink, one grey, one palette, quiet axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BODY", "GREY", "INK", "PALETTE", "SMALL", "array", "colours", "quiet"]

INK = "#1b1f24"  # text and axes; the HTML report lets it follow the page's own colour
GREY = "#808890"
# after Okabe and Ito
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b0578d",
    "#3a9bd9",
    "#c98a00",
)
SMALL, BODY = 9, 10  # font sizes in points


def colours(names: list[str]) -> dict[str, str]:
    """Return a colour for every method, the same in every plot of the same methods."""
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}


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
