"""Pictures of chains: where they have been, and whether they agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

from bnnflow.draws import Draws
from bnnflow.report.style import BODY, GREY, INK, PALETTE, SMALL, array, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["chains"]

_CHAINS = 12  # that are drawn
_POINTS = 150  # of a trace
_BINS = 16


def chains(draws: Draws, values: np.ndarray, what: str) -> Figure:
    """Plot the log joint of chains, draw by draw, the ranks of a prediction in each, and, where
    energies were recorded, their law beside that of their changes (Betancourt 2017).

    Chains that have converged scatter about one level, and their ranks about the line. Energies
    whose changes are much narrower than they are explored slowly.

    Args:
        draws: chains, of which at most twelve are shown.
        values: ``(chain, draw)``, the prediction.
        what: its name.
    """
    from matplotlib.figure import Figure

    energy = draws.stats.get("energy")
    panels = 2 if energy is None else 3
    figure = Figure(figsize=(8.6 if energy is None else 9.4, 2.5), layout="constrained")
    figure.patch.set_alpha(0)
    trace, ranks, *rest = figure.subplots(1, panels)
    every = max(1, draws.n_draws // _POINTS)
    log_joint = array(draws.log_joint)[:_CHAINS, ::every]
    for index, chain in enumerate(log_joint):
        colour = PALETTE[index % len(PALETTE)]
        trace.plot(np.arange(len(chain)) * every, chain, color=colour, linewidth=0.8)
    order = rankdata(values).reshape(values.shape) - 1
    bins = max(2, min(_BINS, values.shape[1] // 10))
    edges = np.linspace(0, values.size, bins + 1)
    expected = values.shape[1] / bins
    for index, chain in enumerate(order[:_CHAINS]):
        count, _ = np.histogram(chain, edges)
        ranks.stairs(count / expected, edges, color=PALETTE[index % len(PALETTE)])
    ranks.axhline(1, color=GREY, linewidth=1)
    ranks.set_ylim(bottom=0)
    named = [(trace, "draw", "log joint"), (ranks, f"rank of {what}", "share beside 1")]
    if energy is not None:
        _energies(rest[0], array(energy))
        named.append((rest[0], "energy", "density"))
    for ax, across, up in named:
        quiet(ax)
        ax.set_xlabel(across, fontsize=BODY, color=INK)
        ax.set_ylabel(up, fontsize=BODY, color=INK)
    return figure


def _energies(ax: Axes, energy: np.ndarray) -> None:
    """Plot energies ``(chain, draw)`` about their means, and their changes from draw to draw."""
    about = (energy - energy.mean(1, keepdims=True)).ravel()
    changes = np.diff(energy, axis=1).ravel()
    bins = np.histogram_bin_edges(np.concatenate([about, changes]), 30).tolist()
    ax.hist(about, bins, density=True, color=GREY, alpha=0.5, label="about its mean")
    ax.hist(changes, bins, density=True, histtype="step", color=INK, label="changes")
    ax.set_yticks([])
    ax.set_ylim(top=1.45 * ax.get_ylim()[1])
    ax.legend(frameon=False, fontsize=SMALL, labelcolor=INK, loc="upper left")
