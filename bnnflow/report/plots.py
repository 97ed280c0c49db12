"""Plots of predictions, side by side for several methods.

Each returns a figure and changes no global state.

The plots of `bnnflow.report.weight_plots` are here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from bnnflow.arguments import Count, checked
from bnnflow.draws import evenly
from bnnflow.predictive import Prediction, metrics
from bnnflow.report.chain_plots import chains
from bnnflow.report.style import (
    BODY,
    GREY,
    INK,
    SMALL,
    array,
    colours,
    markers,
    quiet,
)
from bnnflow.report.weight_plots import barrier, block_structure, convergence, loss_plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

__all__ = [
    "INK",
    "barrier",
    "block_structure",
    "chains",
    "colours",
    "confusion",
    "convergence",
    "log_weights",
    "loss_by_time",
    "loss_plane",
    "pit",
    "predictive",
    "predictive_band",
    "prior_functions",
    "reliability",
    "residuals",
    "scores",
]

_LIGHT, _STRONG = 0.22, 0.42  # opacity of the wide and the narrow band
_DASHES = (0, (4, 2))
_MAX_ROWS = 120
_MOST_POINTS = 300
_NATS = (-1000, -100, -10, -1, -0.4, -0.2, 0, 0.2, 0.4, 1, 10, 100)
_ROWS_OF_A_BIN = 10
_MOST_BINS = 20  # of a histogram of transforms
_LEAST_WEIGHT = -6.0  # power of ten, below which weights are counted together
_SHORT = 3  # letters of names that need not be turned
_MOST_NUMBERS = 10  # classes whose counts are written
_MAX_DRAWS = 2000  # bands need no more
_LONGEST_NAME = 24  # characters above the narrowest panel


@checked
def predictive_band(
    predictions: Mapping[str, Prediction],
    x_train: Tensor | np.ndarray | None = None,
    y_train: Tensor | np.ndarray | None = None,
    *,
    truth: Tensor | np.ndarray | None = None,
    x_label: str = "x",
    y_label: str = "y",
) -> Figure:
    """Plot one-dimensional regressions: mean, predictive 50% and 90% bands, and the band without
    noise.

    The inputs of the predictions are the grid. Bands use at most 2,000 draws, evenly spaced.

    Args:
        predictions: by method; one input feature and one target each.
        x_train: ``(n,)`` or ``(n, 1)``, training inputs to show.
        y_train: their targets.
        truth: the noiseless function at the predictions' inputs, if known.
        x_label: with units.
        y_label: with units.

    Raises:
        ValueError: for classes, several features or several targets.
    """
    _check(predictions, "regression")
    for name, prediction in predictions.items():
        if prediction.x.flatten(1).shape[1] != 1 or prediction.mean.dim() != 1:
            raise ValueError(f"{name} is not a regression of one target on one feature")
    figure, axes = _panels(list(predictions), height=2.9)
    for (name, prediction), ax in zip(predictions.items(), axes, strict=True):
        thin, colour = prediction.thinned(_MAX_DRAWS), colours(list(predictions))[name]
        x, order = prediction.x.flatten().sort()
        bands = array(thin.quantile([0.05, 0.25, 0.75, 0.95])[:, order])
        x = array(x)
        ax.fill_between(x, bands[0], bands[3], color=colour, alpha=_LIGHT, linewidth=0)
        ax.fill_between(x, bands[1], bands[2], color=colour, alpha=_STRONG, linewidth=0)
        for edge in _function_quantiles(thin, [0.05, 0.95])[:, array(order)]:
            ax.plot(x, edge, color=colour, linewidth=0.9, linestyle=_DASHES)
        ax.plot(x, array(prediction.mean[order]), color=colour, linewidth=1.8)
        if truth is not None:
            ax.plot(
                x,
                array(truth).ravel()[array(order)],
                color=INK,
                linewidth=0.9,
                linestyle=":",
            )
        if x_train is not None and y_train is not None:
            ax.plot(
                array(x_train).ravel(),
                array(y_train).ravel(),
                ".",
                color=INK,
                markersize=3.5,
            )
    means = [array(prediction.mean) for prediction in predictions.values()]
    _limit(axes, np.concatenate(means) if y_train is None else array(y_train).ravel())
    key = {
        "90% of y": _LIGHT,
        "50% of y": _STRONG,
        "90% of the function": _DASHES,
        "mean": "-",
    }
    _legend(
        figure,
        key
        | ({} if truth is None else {"truth": ":"})
        | ({} if x_train is None else {"data": "."}),
    )
    _labels(figure, axes, x_label, y_label)
    return figure


@checked
def reliability(
    predictions: Mapping[str, Prediction], y: Tensor | np.ndarray, bins: Count = 15
) -> Figure:
    """Plot calibration: accuracy against confidence for classes, empirical against nominal coverage
    for regression.

    The grey region holds 95% of the curves of a calibrated model with this many rows (for classes
    it is the error bar of each bin instead).

    Args:
        predictions: by method.
        y: labels or targets at their inputs.
        bins: most bins of the confidence: fewer of few rows, ten or more of which make a bin.
    """
    classes = next(iter(predictions.values())).kind == "classification"
    _check(predictions, "classification" if classes else "regression")
    bins = min(bins, max(3, len(next(iter(predictions.values()))) // _ROWS_OF_A_BIN))
    figure, axes = _panels(list(predictions), height=0, square=True)
    for (name, prediction), ax in zip(predictions.items(), axes, strict=True):
        colour = colours(list(predictions))[name]
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=1)
        if classes:
            _confidence_curve(ax, prediction, y, bins, colour)
        else:
            _coverage_curve(ax, prediction, y, colour)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        ticks = [0, 0.25, 0.5, 0.75, 1]
        ax.set_xticks(ticks, ["0", "", "0.5", "", "1"])
        ax.set_yticks(ticks, ["0", "", "0.5", "", "1"])
    if classes:
        _labels(
            figure, axes, "probability of the predicted class", "fraction predicted right"
        )
    else:
        _labels(figure, axes, "nominal coverage of central intervals", "targets inside")
    return figure


@checked
def predictive(
    predictions: Mapping[str, Prediction],
    y: Tensor | np.ndarray,
    *,
    label: str = "target",
) -> Figure:
    """Plot predictions at test rows against what was observed.

    Regression: mean and 90% interval of each row, in the order of the observed targets (at most
    120 rows, evenly spaced in that order; several targets are pooled, each in its own standard
    deviations from its mean). Classes: histograms of the probability of the predicted class, for
    rows predicted right and wrong.

    Args:
        predictions: by method.
        y: labels or targets at their inputs.
        label: of the target, with its unit.
    """
    if next(iter(predictions.values())).kind == "classification":
        return _confidences(predictions, y)
    _check(predictions, "regression")
    figure, axes = _panels(list(predictions), height=2.7)
    seen = _pooled(array(next(iter(predictions.values())).targets(y)), y)
    order = np.argsort(seen)[evenly(len(seen), _MAX_ROWS).numpy()]
    rank = np.arange(len(order))
    for (name, prediction), ax in zip(predictions.items(), axes, strict=True):
        colour = colours(list(predictions))[name]
        ends = prediction.thinned(_MAX_DRAWS).interval(0.9)
        low, high, mean = (_pooled(array(v), y)[order] for v in (*ends, prediction.mean))
        ax.vlines(rank, low, high, color=colour, alpha=_STRONG, linewidth=1.6)
        ax.plot(rank, mean, "o", color=colour, markersize=3)
        ax.plot(rank, seen[order], "_", color=INK, markersize=6, markeredgewidth=1.2)
        ax.set_xticks([])
    _limit(axes, seen)
    _legend(figure, {"90% interval": _STRONG, "mean": "o", "observed": "_"})
    _labels(figure, axes, "rows in the order of their targets", _plain(label))
    return figure


@checked
def scores(
    predictions: Mapping[str, Prediction], y: Tensor | np.ndarray, *, margin: float = 0.05
) -> Figure:
    """Plot log scores beside those of the best method, with 95% intervals of the paired
    differences.

    Args:
        predictions: by method.
        y: labels or targets at their inputs.
        margin: nats a row within which methods count as equal, drawn as a band.
    """
    from matplotlib.figure import Figure

    rows = {name: array(each.log_prob(y)) for name, each in predictions.items()}
    best = max(rows, key=lambda name: rows[name].mean())
    figure = Figure(figsize=(6.2, 0.9 + 0.27 * len(rows)), layout="constrained")
    figure.patch.set_alpha(0)
    ax = figure.subplots()
    quiet(ax)
    ax.axvspan(-margin, margin, color=GREY, alpha=0.25, linewidth=0)
    ax.axvline(0, color=GREY, linewidth=1)
    colour, marker = colours(list(rows)), markers(list(rows))
    for place, (name, values) in enumerate(rows.items()):
        gap = values - rows[best]
        error = 1.96 * gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else 0.0
        ax.errorbar(
            gap.mean(), -place, xerr=error, fmt=marker[name], color=colour[name], capsize=2
        )
    # one bad method leaves room for the others
    ax.set_xscale("symlog", linthresh=10 * margin, linscale=2)
    low, high = ax.get_xlim()
    ticks = [tick for tick in _NATS if low <= tick <= high]
    ax.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_yticks([-place for place in range(len(rows))], [_plain(name) for name in rows])
    ax.set_ylim(-len(rows) + 0.4, 0.6)
    ax.set_xlabel(f"nats a row beside {_plain(best)} (95%)", fontsize=BODY, color=INK)
    return figure


@checked
def residuals(
    predictions: Mapping[str, Prediction],
    y: Tensor | np.ndarray,
    *,
    label: str = "target",
) -> Figure:
    """Plot normal scores of test rows against what was predicted.

    A calibrated prediction scatters evenly about zero, nine in ten rows between the dashed lines,
    without a trend in height or width. At most 300 rows, evenly spaced; several targets are pooled,
    each in its own standard deviations from its mean.

    Args:
        predictions: by method, of numbers.
        y: their targets.
        label: of the target, with its unit.
    """
    _check(predictions, "regression")
    figure, axes = _panels(list(predictions), height=2.3)
    for (name, prediction), ax in zip(predictions.items(), axes, strict=True):
        u = array(metrics.pit(prediction, y)).ravel()
        z = ndtri(np.clip(u, 1e-6, 1 - 1e-6))
        mean = _pooled(array(prediction.mean), y)
        kept = evenly(len(z), _MOST_POINTS).numpy()
        ax.plot(
            mean[kept],
            z[kept],
            markers(list(predictions))[name],
            color=colours(list(predictions))[name],
            markersize=3,
            alpha=0.7,
        )
        for edge in (-1.645, 0, 1.645):
            ax.axhline(edge, color=GREY, linewidth=0.9, linestyle=_DASHES if edge else "-")
    _labels(figure, axes, f"predicted mean of {_plain(label)}", "normal score")
    return figure


@checked
def pit(predictions: Mapping[str, Prediction], y: Tensor | np.ndarray) -> Figure:
    """Plot histograms of probability integral transforms, flat for calibrated predictions.

    The grey band holds 95% of the columns of a calibrated prediction of so many independent rows.
    A hump in the middle says that predictions are too wide, a valley that they are too narrow, a
    slope that they lie to one side.

    Args:
        predictions: by method, of numbers.
        y: their targets.
    """
    from scipy.stats import binom

    _check(predictions, "regression")
    figure, axes = _panels(list(predictions), height=2.0)
    for (name, prediction), ax in zip(predictions.items(), axes, strict=True):
        u = array(metrics.pit(prediction, y)).ravel()
        bins = min(_MOST_BINS, max(2, len(u) // _ROWS_OF_A_BIN))
        low, high = binom.interval(0.95, len(u), 1 / bins)
        expected = len(u) / bins
        ax.axhspan(low / expected, high / expected, color=GREY, alpha=0.25, linewidth=0)
        ax.axhline(1, color=GREY, linewidth=1)
        count, edges = np.histogram(u, bins, (0, 1))
        colour = colours(list(predictions))[name]
        ax.stairs(count / expected, edges, color=colour, linewidth=1.6)
    top = max(ax.dataLim.y1 for ax in axes)
    axes[0].set(xlim=(0, 1), ylim=(0, 1.05 * top))
    _labels(figure, axes, "probability integral transform", "rows beside 1")
    return figure


@checked
def prior_functions(
    prior: Prediction, y: Tensor | np.ndarray, *, classes: Sequence[str] | None = None
) -> Figure | None:
    """Plot what the prior alone predicts, beside the data; None where no function of it is finite,
    or the targets never change.

    Numbers: how much each function of the prior varies over the rows, and where it lies, beside the
    targets. Classes: how sure its functions are, and how often they predict each class.

    Args:
        prior: a prediction by draws of the prior, at rows of training.
        y: their targets.
        classes: their names, if they have any.
    """
    from matplotlib.figure import Figure

    values = array(torch.cat(list(prior.functions())))  # (draws, n, targets or classes)
    seen = array(prior.targets(y))
    figure = Figure(figsize=(8.6, 2.4), layout="constrained")
    figure.patch.set_alpha(0)
    left, right = figure.subplots(1, 2)
    quiet(left)
    quiet(right)
    if prior.kind == "classification":
        _prior_of_classes(left, right, values, seen, classes)
        return figure
    shown = _prior_of_numbers(left, right, values, seen.reshape(len(seen), -1))
    return figure if shown else None


def _prior_of_classes(
    left: Axes,
    right: Axes,
    values: np.ndarray,
    seen: np.ndarray,
    classes: Sequence[str] | None,
) -> None:
    left.hist(values.max(-1).ravel(), 30, color=GREY, alpha=0.6)
    _name(left, "probability of the predicted class", "functions and rows")
    low, high = np.quantile(values.mean(1), [0.05, 0.95], axis=0)  # over draws
    place = np.arange(values.shape[-1])
    share = np.bincount(seen, minlength=len(place)) / len(seen)
    right.vlines(place, low, high, color=GREY, linewidth=4, alpha=0.6, label="prior, 90%")
    right.plot(place, share, "_", color=INK, markersize=14, label="rows")
    if len(place) <= _MOST_NUMBERS:
        _class_ticks(right, len(place), classes)
    else:
        right.set_xticks([])
    right.legend(frameon=False, fontsize=SMALL, labelcolor=INK)
    _name(right, "class", "frequency")


def _prior_of_numbers(
    left: Axes, right: Axes, values: np.ndarray, seen: np.ndarray
) -> bool:
    """Plot the spread and the place of functions beside those of targets ``(n, targets)``; say
    whether there was anything to plot.
    """
    with np.errstate(all="ignore"):  # of wide priors some functions overflow
        spread = (values.std(1) / seen.std(0)).ravel()
        away = ((values.mean(1) - seen.mean(0)) / seen.std(0)).ravel()
    spread = np.log10(spread[np.isfinite(spread) & (spread > 0)])
    away = away[np.isfinite(away)]
    if not len(spread) or not len(away):
        return False
    away = away.clip(*np.quantile(away, [0.01, 0.99]))
    for ax, each in ((left, spread), (right, away)):
        ax.hist(each, 30, color=GREY, alpha=0.6)
        ax.axvline(0, color=INK, linewidth=1.4)
    low, high = math.floor(min(spread.min(), -1)), math.ceil(max(spread.max(), 1))
    ticks = np.arange(low, high + 1, max(1, (high - low) // 6))
    left.set_xticks(ticks, [f"{10.0**tick:g}" for tick in ticks])
    _name(left, "sd over rows, beside that of the targets", "functions")
    _name(right, "mean over rows, in sds from the targets' mean", "functions")
    return True


@checked
def log_weights(
    weights: Mapping[str, Tensor], *, methods: Sequence[str] | None = None
) -> Figure:
    """Plot histograms of weights of draws, beside equal ones: how many draws carry the average.

    Args:
        weights: log weights by method, of any shape; they need not be normalised.
        methods: all that are compared, whose colours these are; those of ``weights`` if None.
    """
    figure, axes = _panels(list(weights), height=2.0)
    palette = colours(list(methods or weights))
    for (name, values), ax in zip(weights.items(), axes, strict=True):
        log_weight = values.flatten().double().log_softmax(0) + math.log(values.numel())
        shown = array(log_weight[log_weight > -math.inf]) / math.log(10)
        ax.hist(np.clip(shown, _LEAST_WEIGHT, None), 30, color=palette[name])
        ax.axvline(0, color=GREY, linewidth=1)
        effective = float((-(2 * log_weight.log_softmax(0)).logsumexp(0)).exp())
        text = f"{effective:,.0f} of {values.numel():,} effective"
        ax.text(
            0.02, 0.97, text, transform=ax.transAxes, va="top", fontsize=SMALL, color=INK
        )
        ax.set_ylim(top=1.25 * ax.get_ylim()[1])
    _labels(figure, axes, "weight beside an equal one, power of ten", "draws")
    return figure


@checked
def loss_by_time(
    losses: Mapping[str, Sequence[float | None]], *, methods: Sequence[str] | None = None
) -> Figure:
    """Plot the loss of flows in each part of the time from the prior (0) to the posterior (1).

    Args:
        losses: by flow, of equal parts of the time; None where it is not known.
        methods: all that are compared, whose colours these are; those of ``losses`` if None.
    """
    figure, axes = _panels(list(losses), height=2.0)
    palette = colours(list(methods or losses))
    for (name, values), ax in zip(losses.items(), axes, strict=True):
        edges = np.linspace(0, 1, len(values) + 1)
        height = np.array([math.nan if v is None else v for v in values])
        colour = palette[name]
        ax.bar(
            edges[:-1], height, np.diff(edges), align="edge", color=colour, alpha=_STRONG
        )
        ax.set_xlim(0, 1)
    _labels(figure, axes, "time", "loss")
    return figure


@checked
def confusion(
    predictions: Mapping[str, Prediction],
    y: Tensor | np.ndarray,
    *,
    classes: Sequence[str] | None = None,
) -> Figure:
    """Plot how many rows of each label were given each class.

    Args:
        predictions: by method, of classes.
        y: labels at their inputs.
        classes: their names, if they have any.
    """
    _check(predictions, "classification")
    figure, axes = _panels(list(predictions), height=0, square=True)
    for (name, prediction), ax in zip(predictions.items(), axes, strict=True):
        n_classes = prediction.probs.shape[1]
        seen, given = array(prediction.targets(y)), array(prediction.probs.argmax(1))
        count = np.zeros((n_classes, n_classes), int)
        np.add.at(count, (seen, given), 1)
        share = count / np.maximum(count.sum(1, keepdims=True), 1)
        ax.grid(False)
        colour = colours(list(predictions))[name]
        for label, predicted in np.argwhere(count):
            opacity = 0.1 + 0.5 * share[label, predicted]
            ax.add_patch(_square(predicted, label, colour, opacity))
            if n_classes <= _MOST_NUMBERS:
                ax.text(
                    predicted,
                    label,
                    str(count[label, predicted]),
                    ha="center",
                    va="center",
                    fontsize=SMALL,
                    color=INK,
                )
        ends = (-0.5, n_classes - 0.5)
        ax.set(xlim=ends, ylim=ends[::-1], aspect="equal")
        ax.set_yticks(range(n_classes), _class_ticks(ax, n_classes, classes))
    _labels(figure, axes, "class predicted", "label")
    return figure


# ---------------------------------------- panels


def _class_ticks(ax: Axes, count: int, classes: Sequence[str] | None) -> list[str]:
    """Name classes along the horizontal axis; return the names."""
    names = [_plain(name) for name in classes or map(str, range(count))]
    ax.set_xticks(range(count), names, rotation=30 if max(map(len, names)) > _SHORT else 0)
    return names


def _square(column: int, row: int, colour: str, opacity: float) -> Rectangle:
    from matplotlib.patches import Rectangle

    corner = (column - 0.5, row - 0.5)
    return Rectangle(corner, 1, 1, facecolor=colour, alpha=opacity, linewidth=0)


def _confidence_curve(
    ax: Axes, prediction: Prediction, y: Any, bins: int, colour: str
) -> None:
    binned = metrics.reliability(prediction, y, bins)
    filled = array(binned.rows) > 0
    confidence, accuracy, count = (
        array(v)[filled] for v in (binned.confidence, binned.accuracy, binned.rows)
    )
    # of the accuracy, if calibrated
    spread = 1.96 * np.sqrt(confidence * (1 - confidence) / count)
    share = count / count.sum()
    edges = array(binned.edges)
    ax.bar(
        edges[:-1][filled],
        share,
        np.diff(edges)[filled],
        align="edge",
        color=colour,
        alpha=_LIGHT,
        linewidth=0,
    )
    low, high = np.clip(confidence - spread, 0, 1), np.clip(confidence + spread, 0, 1)
    ax.vlines(confidence, low, high, color=GREY, alpha=0.45, linewidth=3)
    ax.plot(confidence, accuracy, color=colour, linewidth=1, alpha=0.6)
    ax.scatter(confidence, accuracy, 12 + 90 * share, color=colour, linewidth=0, zorder=3)
    ax.text(
        0.04,
        0.93,
        f"ECE {metrics.ece(prediction, y, bins):.3f}",
        color=INK,
        fontsize=SMALL,
        va="top",
    )


def _coverage_curve(ax: Axes, prediction: Prediction, y: Any, colour: str) -> None:
    distance = 2 * np.abs(array(metrics.pit(prediction, y)).ravel() - 0.5)
    levels = np.linspace(0, 1, 101)
    inside = np.searchsorted(np.sort(distance), levels, side="right") / len(distance)
    spread = 1.96 * np.sqrt(levels * (1 - levels) / len(distance))
    ax.fill_between(
        levels, levels - spread, levels + spread, color=GREY, alpha=0.25, linewidth=0
    )
    ax.plot(levels, inside, color=colour, linewidth=1.8, drawstyle="steps-post")
    ax.text(
        0.97,
        0.04,
        f"90%: {100 * (distance <= 0.9).mean():.0f}%",
        color=INK,
        fontsize=SMALL,
        ha="right",
    )


def _confidences(predictions: Mapping[str, Prediction], y: Tensor | np.ndarray) -> Figure:
    _check(predictions, "classification")
    figure, axes = _panels(list(predictions), height=2.5)
    for (name, prediction), ax in zip(predictions.items(), axes, strict=True):
        probs = prediction.probs
        edges = np.linspace(1 / probs.shape[-1], 1, 21).tolist()
        confidence = array(probs.max(-1).values)
        right = array(probs.argmax(-1) == prediction.targets(y))
        colour = colours(list(predictions))[name]
        ax.hist(
            confidence[right],
            edges,
            color=colour,
            alpha=0.45,
            label=f"right ({right.sum()})",
        )
        ax.hist(
            confidence[~right],
            edges,
            color=INK,
            rwidth=0.45,
            label=f"wrong ({(~right).sum()})",
        )
        ax.set_yscale("symlog", linthresh=10)
        ax.set_xlim(edges[0], 1)
        legend = ax.legend(
            frameon=False,
            fontsize=SMALL,
            loc="upper left",
            handlelength=1.2,
            labelcolor=INK,
        )
        legend.set_zorder(5)
    top = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ticks = [0, 5, 10] + [10**k for k in range(2, 8) if 10**k < top]
        ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.set_yticks([], minor=True)
        ax.set_ylim(0, 2.5 * top)
    _labels(figure, axes, "probability of the predicted class", "rows")
    return figure


def _panels(
    names: list[str], height: float, *, square: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a titled panel for every method and shared axes."""
    from matplotlib.figure import Figure

    n = len(names)
    columns = n if n <= 3 else (4 if square else 2) if n == 4 else 3
    rows = math.ceil(n / columns)
    width = {1: 3.4 if square else 6.2, 2: 6.2 if square else 8.6}.get(columns, 9.4)
    height = (width - 0.7) / columns + 0.1 if square else height
    figure = Figure(figsize=(width, 0.6 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.patch.set_alpha(0)
    axes = list(grid.ravel())
    for spare in axes[n:]:
        spare.set_visible(False)
    for index, (name, ax) in enumerate(zip(names, axes, strict=False)):
        ax.set_title(
            _plain(name),
            fontsize=BODY + 1,
            color=INK,
            loc="left",
            fontweight="bold",
        )
        quiet(ax)
        ax.tick_params(labelbottom=index + columns >= n)
    return figure, axes[:n]


def _limit(axes: list[Axes], seen: np.ndarray) -> None:
    """Bound the shared y axis by the data, so that a wild band cannot flatten the rest."""
    low, high = seen.min(), seen.max()
    margin = 0.6 * (high - low) if high > low else 1.0
    axes[0].set_ylim(low - margin, high + margin)


def _pooled(values: np.ndarray, y: Tensor | np.ndarray) -> np.ndarray:
    """Return values of targets ``(n,)`` or ``(n, targets)`` in one axis; of several, each in
    standard deviations of its y from their mean.
    """
    if values.ndim == 1:
        return values
    seen = array(y).reshape(values.shape)
    spread = seen.std(0)
    return ((values - seen.mean(0)) / np.where(spread > 0, spread, 1)).ravel()


def _legend(figure: Figure, key: Mapping[str, Any]) -> None:
    """Name the marks above the panels: a number is a band's opacity, the rest a line style or a
    marker.

    Marks that differ in colour between methods are grey here; the panels' titles name the methods.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for label, mark in key.items():
        colour = INK if label in ("truth", "data", "observed") else GREY
        if isinstance(mark, float):
            handles.append(
                Patch(facecolor=colour, alpha=mark + 0.15, linewidth=0, label=label)
            )
        elif mark in (".", "o", "_"):
            handles.append(
                Line2D(
                    [],
                    [],
                    color=colour,
                    marker=mark,
                    linestyle="",
                    markersize=5,
                    label=label,
                )
            )
        else:
            handles.append(Line2D([], [], color=colour, linestyle=mark, label=label))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
        columnspacing=1.4,
        handlelength=1.6,
    )


def _name(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=BODY, color=INK)
    ax.set_ylabel(y, fontsize=BODY, color=INK)


def _labels(figure: Figure, axes: list[Axes], x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=BODY, color=INK)
    figure.supylabel(y, fontsize=BODY, color=INK)


def _function_quantiles(prediction: Prediction, levels: list[float]) -> np.ndarray:
    """Return quantiles over draws of what a draw predicts, without noise, ``(levels, n)``."""
    # (draws, n)
    values, order = torch.cat(list(prediction.functions())).squeeze(-1).sort(0)
    below = prediction.log_weights.exp()[order].cumsum(0)
    index = [
        (below < level).sum(0, keepdim=True).clamp(max=len(values) - 1) for level in levels
    ]
    return array(torch.cat([values.gather(0, i) for i in index]))


def _plain(name: str) -> str:
    """Return a name as short text, in which no dollar sign begins a formula."""
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 10]}…{name[-9:]}"
    return name.replace("$", r"\$")


def _check(predictions: Mapping[str, Prediction], kind: str) -> None:
    if not predictions:
        raise ValueError("there are no predictions to plot")
    for name, prediction in predictions.items():
        if prediction.kind != kind:
            raise ValueError(
                f"{name} is a prediction for {prediction.kind}, expected {kind}"
            )
