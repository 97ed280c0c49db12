"""The pictures of a report, with what they are of: as text that goes into the page."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow.diagnosis import weight_convergence
from bnnflow.diagnosis.convergence import predicted_values
from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.predictive import Prediction, predict
from bnnflow.report import plots
from bnnflow.report.compare import MARGIN, Comparison, Evaluation
from bnnflow.report.names import Names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ChainPictures", "Picture", "Pictures", "of_chains", "pictures", "unique"]

_MOST_CLASSES = 20  # of a table of confusion
_MOST_ALIGNED = 2000  # weights that a report aligns
_DRAWS_ALIGNED = 400
_PRIOR_DRAWS = 200
_PRIOR_ROWS = 200


_COORDINATES = re.compile(r'\b(?:d|x|y|points|transform)="[^"]*"')
_LONG = re.compile(r"(\.\d\d)\d+")  # a hundredth of a point is not seen


class Picture(NamedTuple):
    """A picture, ready to be put into the page."""

    svg: str
    caption: str


class ChainPictures(NamedTuple):
    """What is shown of one method's chains beside its diagnosis."""

    picture: Picture
    layers: str


class Pictures(NamedTuple):
    """The pictures of all methods together."""

    answers: tuple[Picture, ...]  # of calibration and predictions
    calibration: tuple[Picture, ...]  # in detail
    prior: tuple[Picture, ...]
    weights: tuple[Picture, ...]  # of draws, and how flows were fitted


_Shown = list[tuple["Figure", str]]


def pictures(
    comparison: Comparison, model: BayesianModel, y: Tensor, names: Names
) -> Pictures:
    """Draw everything that methods are compared by.

    Args:
        comparison: of the methods.
        model: theirs.
        y: targets of the rows that were predicted.
        names: of targets and classes.
    """
    predictions = {e.name: e.prediction for e in comparison.evaluations}
    answers, detail = [], []
    if model.likelihood.kind == "classification":
        answers = _of_classes(predictions, y, names)
    elif all(prediction.has_intervals for prediction in predictions.values()):
        answers = _of_numbers(predictions, model, y, names)
        detail = _calibration(predictions, y, names)
    if len(predictions) > 1:
        text = (
            "Log scores beside the best, with 95% intervals of the paired differences over "
            "rows. Within the grey band methods predict alike for most purposes; an interval that "
            "leaves it says that these rows cannot tell."
        )
        answers.insert(0, (plots.scores(predictions, y, margin=MARGIN), text))
    of = ", ".join(predictions)
    return Pictures(
        _drawn(answers, of),
        _drawn(detail, of),
        _drawn(_prior(model, names), "the prior"),
        _drawn(_weights(comparison.evaluations), "these methods"),
    )


def _drawn(shown: _Shown, of: str) -> tuple[Picture, ...]:
    return tuple(
        Picture(_svg(figure, f"{text.split('.')[0]} of {of}"), text)
        for figure, text in shown
    )


def _of_classes(predictions: dict[str, Prediction], y: Tensor, names: Names) -> _Shown:
    calibration = (
        "Calibration. Accuracy against the probability of the predicted class, in as many bins as "
        "the rows allow. A calibrated method stays within the grey bars, which hold 95% of a "
        "bin's outcomes; below the diagonal it is too sure. Columns at the foot show the share of "
        "rows in each bin."
    )
    spread = (
        "Confidence. Rows by the probability of the predicted class, for those predicted "
        "right and wrong; the count axis is logarithmic above 10. Mistakes should be made with "
        "doubt."
    )
    confusion = (
        "Confusion. Rows by their label and the class that was predicted; the diagonal is "
        "right."
    )
    shown = [
        (plots.reliability(predictions, y), calibration),
        (plots.predictive(predictions, y), spread),
    ]
    if next(iter(predictions.values())).probs.shape[1] <= _MOST_CLASSES:
        figure = plots.confusion(predictions, y, classes=names.classes or None)
        shown.append((figure, confusion))
    return shown


def _of_numbers(
    predictions: dict[str, Prediction], model: BayesianModel, y: Tensor, names: Names
) -> _Shown:
    calibration = (
        "Calibration. Share of targets inside central predictive intervals of every nominal "
        "coverage. The grey region holds 95% of outcomes of a calibrated method, level by level; "
        "below it intervals are too narrow, above too wide."
    )
    single = model.x.flatten(1).shape[1] == 1 and y.shape[-1] == 1
    if single:
        figure = plots.predictive_band(predictions, model.x, model.y, y_label=names.axis)
        spread = (
            "Predictions. Mean, 50% and 90% bands of the target, and between dashed lines 90% "
            "of the function itself (without noise), at these inputs; dots are training data. "
            "The vertical axis is bounded by the data."
        )
    else:
        figure = plots.predictive(predictions, y, label=names.axis)
        spread = (
            "Predictions. Mean and 90% interval of rows, in the order of the observed "
            "target; at most 120 rows are drawn."
        ) + _standardised(y)
    return [(plots.reliability(predictions, y), calibration), (figure, spread)]


def _calibration(predictions: dict[str, Prediction], y: Tensor, names: Names) -> _Shown:
    residuals = (
        "Residuals. Normal scores of targets under their predictions, against the predicted "
        "mean: nine in ten lie between the dashed lines where predictions are calibrated; a trend "
        "in height is a wrong mean, one in width a wrong noise."
    ) + _standardised(y)
    transforms = (
        "Probability integral transforms. Flat where predictions are calibrated: a valley in the "
        "middle says that they are too narrow, a hump that they are too wide, a slope that they "
        "lie to one side. The grey band holds 95% of the columns of a calibrated method with so "
        "many rows."
    )
    return [
        (plots.residuals(predictions, y, label=names.axis), residuals),
        (plots.pit(predictions, y), transforms),
    ]


def _standardised(y: Tensor) -> str:
    return (
        " Each target is in its own standard deviations from its mean."
        if y.shape[-1] > 1
        else ""
    )


def _prior(model: BayesianModel, names: Names) -> _Shown:
    rows = model.some_rows(_PRIOR_ROWS)
    prior = predict(model, model.sample_prior(_PRIOR_DRAWS, seed=0), model.x[rows])
    y = model.y[rows]
    if prior.kind == "classification":
        text = (
            "Prior predictive. Left how sure functions of the prior are on rows of training, right "
            "how often they predict each class, beside how often it is seen. A prior that is sure "
            "before it has seen data is hard to teach."
        )
    else:
        text = (
            "Prior predictive. Functions of the prior at rows of training: left how much each "
            "varies, right where it lies, beside the targets (the lines). A prior far from the "
            "line has to be overcome by the data."
        )
    figure = plots.prior_functions(prior, y, classes=names.classes or None)
    return [] if figure is None else [(figure, text)]


def _weights(evaluations: tuple[Evaluation, ...]) -> _Shown:
    weights = {
        e.name: e.prediction.log_weights
        for e in evaluations
        if e.diagnosis.kind == "weighted"
    }
    losses = {
        e.name: e.entry.info["loss_by_time"]
        for e in evaluations
        if e.entry.info.get("loss_by_time")
    }
    methods, shown = [e.name for e in evaluations], []
    if weights:
        text = (
            "Weights of draws. Beside equal ones (0), as powers of ten; few draws far to the right "
            "carry the average."
        )
        shown.append((plots.log_weights(weights, methods=methods), text))
    if losses:
        text = (
            "Loss of flows. In each part of the time from the prior (0) to the posterior (1): "
            "where the field is least known."
        )
        shown.append((plots.loss_by_time(losses, methods=methods), text))
    return shown


# ---------------------------------------- chains


def of_chains(comparison: Comparison, model: BayesianModel) -> dict[str, ChainPictures]:
    """Return pictures of chains, and how their weights agree modulo symmetry, by method."""
    shown = {}
    for e in comparison.evaluations:
        d, draws = e.diagnosis, e.entry.draws
        if d.r_hat is None or d.rows is None or not isinstance(draws, Draws):
            continue
        row, output = np.unravel_index(int(d.r_hat.argmax()), d.r_hat.shape)
        at = int(d.rows[row])
        one = e.prediction.subset(torch.tensor([at]))
        shape = draws.n_chains, draws.n_draws
        values = predicted_values(one, shape)[1][..., 0, output]
        figure = plots.chains(draws, values, f"the prediction of row {at}")
        text = (
            f"Chains of {e.name}. Left the log joint, draw by draw, of at most twelve; then the "
            "ranks of the prediction that chains agree least about, even where they agree."
        )
        if d.e_bfmi is not None:
            text += (
                " Right energies and their changes from draw to draw, which should be nearly as "
                f"wide: E-BFMI {d.e_bfmi:.2f} in the worst chain."
            )
        picture = Picture(_svg(figure, f"Traces and ranks of {e.name}"), text)
        shown[e.name] = ChainPictures(picture, _layers(model, draws))
    return shown


def _layers(model: BayesianModel, draws: Draws) -> str:
    """Return how chains agree layer by layer; nothing where that would take long or cannot be."""
    if draws.n_chains < 2 or draws.n_draws < 4 or model.dim > _MOST_ALIGNED:
        return ""
    every = max(1, draws.n_chains * draws.n_draws // _DRAWS_ALIGNED)
    thin = replace(
        draws,
        theta=draws.theta[:, ::every],
        log_joint=draws.log_joint[:, ::every],
        stats={name: values[:, ::every] for name, values in draws.stats.items()},
    )
    if thin.n_draws < 4 or not bool(thin.log_joint.isfinite().all()):
        return ""
    return str(weight_convergence(model, thin))


# ---------------------------------------- text


def _svg(figure: Figure, label: str) -> str:
    """Render a figure as an inline picture: text stays text, ink takes the page's colour."""
    import html

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bnnflow"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _COORDINATES.sub(lambda found: _LONG.sub(r"\1", found[0]), text)
    text = re.sub(
        r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"',
        r'\1 style="max-width:\2pt"',
        text,
        count=1,
    )
    text = text.replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(label, quote=True)}" ', 1
    )
    return text.replace(plots.INK, "currentColor").strip()


def unique(svg: str, prefix: str) -> str:
    """Prefix every identifier, so that pictures on one page do not refer to each other's parts."""
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    return svg.replace("url(#", f"url(#{prefix}")
