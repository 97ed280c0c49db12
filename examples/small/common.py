"""What the small examples share: a perceptron, lines of a table, figures of panels.

Imported by the scripts beside it.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import nn

from bnnflow.report import style

OUT = Path("out")
torch.set_num_threads(1)  # a second gains little on such small products


def perceptron(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Return a perceptron with so many inputs, units in every hidden layer, and outputs."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def row(name: str, *cells: str | float | Sequence[float]) -> None:
    """Print a line of a table; a pair is a value with its standard error."""
    print(f"{name:24}" + "".join(f"{_shown(cell):>15}" for cell in cells), flush=True)


def _shown(cell: str | float | Sequence[float]) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:.3f}" if isinstance(cell, float) else "{:.3f} ± {:.3f}".format(*cell)


def panels(
    titles: Sequence[str], columns: int, size: tuple[float, float], *, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many inches, with a panel for each title, row by row, which share their
    axes or not.
    """
    figure = Figure(figsize=size, layout="constrained")
    shape = len(titles) // columns, columns
    axes = list(figure.subplots(*shape, sharex=share, sharey=share, squeeze=False).flat)
    for title, ax in zip(titles, axes, strict=True):
        ax.set_title(title, loc="left", fontsize=style.BODY, color=style.INK)
        style.quiet(ax)
    return figure, axes


def shades(*colours: str) -> LinearSegmentedColormap:
    """Return a colour map that goes through these colours."""
    return LinearSegmentedColormap.from_list("shades", colours)


def save(figure: Figure, name: str, x: str = "", y: str = "") -> None:
    """Label the common axes and write ``out/<name>.png``."""
    figure.supxlabel(x, fontsize=style.BODY, color=style.INK)
    figure.supylabel(y, fontsize=style.BODY, color=style.INK)
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / f"{name}.png", dpi=100)
    print(f"picture: {OUT / name}.png")
