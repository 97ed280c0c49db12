"""What the small examples share: a perceptron, lines of a table, figures of panels.

Imported by the scripts beside it.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import nn

from bnnflow.report import style

OUT = Path("out")


def perceptron(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Return a perceptron with so many inputs, units in every hidden layer, and outputs."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def row(name: str, *cells: str | float) -> None:
    """Print a line of a table."""
    shown = (cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells)
    print(f"{name:20}" + "".join(f"{cell:>13}" for cell in shown), flush=True)


def panels(
    titles: Sequence[str], columns: int, size: tuple[float, float], *, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many inches, with a panel for each title, row by row, which share their
    axes or not.
    """
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(titles) // columns, columns, sharex=share, sharey=share)
    axes = list(grid.flat)
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
