"""Pictures of chains: where they have been, and whether they agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

from bnnflow.draws import Draws
from bnnflow.report.style import BODY, GREY, INK, PALETTE, array, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["chains"]

_CHAINS = 12  # that are drawn
_POINTS = 150  # of a trace
_BINS = 16


def chains(draws: Draws, values: np.ndarray, what: str) -> Figure:
    """Plot the log joint of chains, draw by draw, and the ranks of a prediction in each.

    Chains that have converged scatter about one level, and their ranks about the line.

    Args:
        draws: chains, of which at most twelve are shown.
        values: ``(chain, draw)``, the prediction.
        what: its name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 2.5), layout="constrained")
    figure.patch.set_alpha(0)
    trace, ranks = figure.subplots(1, 2)
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
    for ax, across, up in (
        (trace, "draw", "log joint"),
        (ranks, f"rank of {what}", "share beside 1"),
    ):
        quiet(ax)
        ax.set_xlabel(across, fontsize=BODY, color=INK)
        ax.set_ylabel(up, fontsize=BODY, color=INK)
    return figure
