"""The report: one HTML file that reads without scripts; nothing is loaded from anywhere."""

from __future__ import annotations

import datetime
import io
import math
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow import storage
from bnnflow.arguments import checked
from bnnflow.diagnosis import Diagnosis, weight_convergence
from bnnflow.diagnosis.convergence import predicted_values
from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.predictive import Prediction
from bnnflow.report import plots
from bnnflow.report.compare import (
    MARGIN,
    Comparison,
    Evaluation,
    compare,
    duration,
    gather,
)
from bnnflow.tables import in_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "report"]


class _Column(NamedTuple):
    key: str
    label: str
    format: str
    about: str


_COLUMNS = (
    _Column("accuracy", "accuracy", ".1%", "fraction of rows predicted right"),
    _Column("rmse", "RMSE", ".4f", "root mean squared error of the predictive mean"),
    _Column(
        "lppd",
        "LPPD",
        ".3f",
        "mean log density of the rows under the mixture over "
        "draws, ± its standard error over rows, nats; higher is better",
    ),
    _Column(
        "brier",
        "Brier",
        ".4f",
        "squared error of the class probabilities, summed over classes; lower is better",
    ),
    _Column(
        "crps",
        "CRPS",
        ".4f",
        "continuous ranked probability score, units of the target; lower is better",
    ),
    _Column(
        "ece",
        "ECE",
        ".3f",
        "expected calibration error, 15 bins; biased upwards on few rows, so never marked",
    ),
    _Column(
        "coverage_90",
        "90 % cover",
        ".1%",
        "targets inside the central 90 % interval; 90 % is best",
    ),
    _Column(
        "log_likelihood",
        "log lik.",
        ",.1f",
        "log likelihood of the training data, mean over draws",
    ),
    _Column(
        "log_joint",
        "log joint",
        ",.1f",
        "log joint density of weights and training data, mean over draws",
    ),
    _Column("draws", "draws", ",", "draws of the weights"),
    _Column("seconds", "seconds", ".3g", "wall-clock time to obtain them"),
    _Column("seconds_per_1000_draws", "s / 1,000", ".3g", "the same for 1,000 draws"),
    _Column(
        "gradients",
        "gradients",
        ",.0f",
        "gradient evaluations of all chains, members or draws",
    ),
)


_NOTE = (
    "No rows were held out: scores and pictures are of the rows of training, which flatter every "
    "method; the answers about predictions leave rows out one at a time, where that works."
)
_MOST_CLASSES = 20  # of a table of confusion
_MOST_ALIGNED = 2000  # weights that a report aligns
_DRAWS_ALIGNED = 400
_COST = ("log_likelihood", "log_joint", "draws", "seconds_per_1000_draws")


class _Picture(NamedTuple):
    """A picture, ready to be put into the page."""

    svg: str
    caption: str


class _Chains(NamedTuple):
    """What is shown of one method's chains beside its diagnosis."""

    picture: _Picture
    layers: str


@dataclass(frozen=True, eq=False)
class Section:
    """One experiment of a report: everything the template shows."""

    title: str
    comparison: Comparison
    figures: tuple[_Picture, ...]
    chains: dict[str, _Chains]
    about: dict[str, str]
    note: str


@dataclass(frozen=True, eq=False)
class Report:
    """A finished report; printing it shows the comparison table.

    Attributes:
        title: heading of the page.
        sections: one for each experiment.
        path: the file, or None if it has not been written.
    """

    title: str
    sections: tuple[Section, ...]
    path: Path | None = None

    @property
    def table(self) -> list[dict[str, Any]]:
        """One dict for each method: the unrounded numbers of the comparison table, by
        ``experiment``.
        """
        return [
            {"experiment": section.title, **e.row}
            for section in self.sections
            for e in section.comparison.evaluations
        ]

    @classmethod
    @checked
    def combine(
        cls, reports: Iterable[Report], path: str | Path, *, title: str | None = None
    ) -> Report:
        """Write several reports into one file, a section each, in the order given.

        Args:
            reports: made by `report`, with ``path=None`` if they need no file of their own.
            path: the file.
            title: heading of the page; the first report's if None.

        Raises:
            ValueError: if there are no reports, or path is a folder.
        """
        reports = list(reports)
        if not reports:
            raise ValueError("there are no reports to combine")
        sections = tuple(section for each in reports for section in each.sections)
        return cls(title or reports[0].title, sections).write(path)

    @checked
    def write(self, path: str | Path) -> Report:
        """Write the page, whole or not at all, making folders as needed, and return the report with
        its path.
        """
        path = _check_path(path)
        page = self.html()
        with storage.whole(path) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
        return Report(self.title, self.sections, path)

    def html(self) -> str:
        """Return the page."""
        import jinja2

        text = (
            resources.files("bnnflow.report")
            .joinpath("template.html")
            .read_text(encoding="utf-8")
        )
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["duration"] = duration
        shown = [
            _Shown.of(section, number)
            for number, section in enumerate(self.sections, start=1)
        ]
        return environment.from_string(text).render(
            title=self.title,
            sections=shown,
            versions=_versions(),
            date=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        )

    def __repr__(self) -> str:
        """Say what it compares in one line."""
        names = [e.name for each in self.sections for e in each.comparison.evaluations]
        where = "" if self.path is None else f", path={str(self.path)!r}"
        return f"Report({self.title!r}, methods={names}{where})"

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in a frame of its own."""
        import html

        page = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" title="{html.escape(self.title)}" '
            'style="width:100%;height:40rem;border:0"></iframe>'
        )

    def __str__(self) -> str:
        """Lay the comparison out for a terminal."""
        blocks = []
        for section in self.sections:
            columns = _columns(section.comparison)
            head = ["method", *(column.label for column in columns), "verdict"]
            lines = [
                [
                    e.name,
                    *(_plain(e, column) for column in columns),
                    e.diagnosis.verdict.split(":")[0],
                ]
                for e in section.comparison.evaluations
            ]
            rule = [
                "-" * max(map(len, column)) for column in zip(head, *lines, strict=True)
            ]
            aligned = in_columns([head, rule, *lines], right=range(1, len(head) - 1))
            blocks.append(
                "\n".join([section.title, "", *aligned, "", section.comparison.headline])
            )
        if self.path is not None:
            blocks.append(f"written to {self.path}")
        return "\n\n".join(blocks)


@checked
def report(
    model: BayesianModel,
    results: Draws | Mapping[str, Any],
    x_test: Tensor | np.ndarray | None = None,
    y_test: Tensor | np.ndarray | None = None,
    path: str | Path | None = "report.html",
    *,
    title: str | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Report:
    """Compare methods on rows and write what a reader needs to judge them into one HTML file.

    The page starts with what to do and three answers (may the predictions be used, does the model
    fit, are these draws of the posterior), then compares the methods in a table, shows calibration
    and predictions, and, folded, the chains, the settings of each run, and the versions of the
    software. It needs no network, and no scripts to be read.

    Args:
        model: the model that all of them are draws of.
        results: `Draws`; or, by name, `Draws`, weights ``(..., dim)``, a pair of weights and log
            weights, anything with ``theta`` and ``log_weights``, or a posterior with
            ``sample(n, seed)``, of which 4,000 draws are taken.
        x_test: ``(n, ...)``, rows that were not fitted. Without them predictions are judged by
            leave-one-out, and scores are those of the rows of training, as the page says.
        y_test: ``(n,)`` or ``(n, targets)``.
        path: the file; None writes none (see `Report.combine`, which puts several reports into
            one).
        title: heading.
        seconds: wall-clock time of each method, where ``draws.info`` does not have it or should not
            be believed.

    Raises:
        ValueError: before any work, for methods, inputs or targets that do not fit, one of x_test
            and y_test without the other, or a path that is a folder.

    Example:
        >>> net = torch.nn.Linear(2, 2)
        >>> from bnnflow.model import likelihoods
        >>> x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> prior = torch.distributions.Normal(0.0, 1.0)
        >>> model = BayesianModel(net, prior, likelihoods.Categorical(), x, y)
        >>> made = report(model, {"prior": model.sample_prior(50, seed=0)}, x, y, path=None)
        >>> len(made.table)
        1
    """
    named = (
        {str(results.info.get("method", "draws")): results}
        if isinstance(results, Draws)
        else results
    )
    methods = gather(named, model, seconds)
    held_out = x_test is not None
    if held_out != (y_test is not None):
        raise ValueError("x_test and y_test come together: rows and their targets")
    x, y = model.inputs(x_test, "x_test"), model.targets(y_test, "y_test")
    if len(x) != len(y):
        raise ValueError(f"x_test has {len(x)} rows and y_test has {len(y)}")
    if path is not None:
        _check_path(path)
    kind = model.likelihood.kind
    title = title or f"Posterior comparison: {kind}, {model.dim:,} weights"
    comparison = compare(methods, model, x, y, seconds, held_out=held_out)
    section = Section(
        title,
        comparison,
        _figures(comparison, model, y),
        _chains(comparison, model),
        _about(model, len(y) if held_out else 0),
        "" if held_out else _NOTE,
    )
    made = Report(title, (section,))
    return made if path is None else made.write(path)


# ---------------------------------------- what the template shows


_GRADES = {
    "yes": "good",
    "no": "bad",
    "trust": "good",
    "trust predictions only": "good",
    "do not trust": "bad",
}


class _Shown(NamedTuple):
    """A section in the template's terms: text and cells, no logic left."""

    number: int
    title: str
    headline: str
    lead: str
    answers: list[dict[str, str]]
    methods: list[dict[str, Any]]
    columns: list[_Column]
    rows: list[list[dict[str, Any]]]
    cost: list[_Column]
    cost_rows: list[list[dict[str, Any]]]
    several: bool
    regression: bool
    chosen: str | None
    figures: list[dict[str, Any]]
    convergence: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    about: dict[str, str]
    note: str

    @classmethod
    def of(cls, section: Section, number: int) -> _Shown:
        comparison = section.comparison
        evaluations = comparison.evaluations
        every = _columns(comparison)
        columns = [column for column in every if column.key not in _COST]
        cost = [column for column in every if column.key in _COST]
        lead = next((e for e in evaluations if e.name == comparison.chosen), evaluations[0])
        return cls(
            number=number,
            title=section.title,
            headline=comparison.headline,
            lead=lead.name,
            answers=_answers(lead),
            methods=_methods(comparison),
            columns=columns,
            rows=_cells(comparison, columns),
            cost=cost,
            cost_rows=_cells(comparison, cost),
            several=len(evaluations) > 1,
            regression=evaluations[0].prediction.kind == "regression",
            chosen=comparison.chosen,
            figures=[
                _inline(figure, f"s{number}f{i}-")
                for i, figure in enumerate(section.figures)
            ],
            convergence=[
                _convergence(e, section.chains.get(e.name), f"s{number}c{i}-")
                for i, e in enumerate(evaluations)
                if e.diagnosis.r_hat is not None
            ],
            runs=[_run(e) for e in evaluations],
            about=section.about,
            note=section.note,
        )


def _inline(picture: _Picture, prefix: str) -> dict[str, Any]:
    from markupsafe import Markup

    return {"svg": Markup(_unique(picture.svg, prefix)), "caption": picture.caption}


def _answers(e: Evaluation) -> list[dict[str, str]]:
    return [
        {
            "question": answer.question,
            "answer": answer.grade,
            "grade": _GRADES.get(answer.grade, "fair"),
            "why": _upper(answer.why),
            "next": _upper(answer.next),
        }
        for answer in e.diagnosis.answers
    ]


def _methods(comparison: Comparison) -> list[dict[str, Any]]:
    names = [e.name for e in comparison.evaluations]
    palette = plots.colours(names)
    return [
        {
            "name": e.name,
            "colour": palette[e.name],
            "verdict": e.diagnosis.verdict,
            "grade": _grade(e.diagnosis),
            "remark": remark,
            "answers": [
                {
                    "question": answer.question,
                    "answer": answer.grade,
                    "grade": _GRADES.get(answer.grade, "fair"),
                    "findings": [
                        _upper(str(each)) for each in answer.findings or (answer.why,)
                    ],
                }
                for answer in e.diagnosis.answers
            ],
        }
        for e, remark in zip(comparison.evaluations, comparison.remarks, strict=True)
    ]


def _grade(d: Diagnosis) -> str:
    """Return the colour of a verdict: green only where the predictions are without reserve."""
    if d.verdict == "trust predictions only" and d.predictions.grade != "yes":
        return "fair"
    return _GRADES.get(d.verdict, "fair")


def _cells(comparison: Comparison, columns: list[_Column]) -> list[list[dict[str, Any]]]:
    """Return the text of cells, the values that they are sorted by, and how they are marked."""
    marked = {key for e in comparison.evaluations for key in e.row["best"]}

    def mark(e: Evaluation, key: str) -> str:
        if key in e.row["best"]:
            return "best"
        return "blank" if key in marked else ""

    return [
        [
            {
                "text": _plain(e, column),
                "value": e.row.get(column.key),
                "mark": mark(e, column.key),
            }
            for column in columns
        ]
        for e in comparison.evaluations
    ]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _columns(comparison: Comparison) -> list[_Column]:
    rows = [e.row for e in comparison.evaluations]
    return [
        column
        for column in _COLUMNS
        if any(row.get(column.key) is not None for row in rows)
    ]


def _plain(e: Evaluation, column: _Column) -> str:
    value = e.row.get(column.key)
    if value is None:
        return "–"
    text = _number(value, column.format)
    if column.key == "lppd" and not math.isnan(e.row["lppd_se"]):
        text += f" ± {_number(e.row['lppd_se'], column.format)}"
    return text


def _number(value: float, form: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return (
            "–" if math.isnan(value) else f"{value}".replace("inf", "∞").replace("-", "−")
        )
    if form in (".3g", ".3f", ",.1f") and abs(value) >= 1000:
        form = ",.0f"
    return format(value, form).replace("-", "−").replace("%", " %")


def _convergence(e: Evaluation, chains: _Chains | None, prefix: str) -> dict[str, Any]:
    d = e.diagnosis
    assert d.r_hat is not None
    assert d.ess_bulk is not None
    assert d.ess_tail is not None
    assert d.rows is not None
    order = np.argsort(-d.r_hat, axis=None, kind="stable")[:5]
    worst = []
    for row, output in zip(*np.unravel_index(order, d.r_hat.shape), strict=True):
        classes = e.prediction.kind == "classification"
        output_name = int(output) + (1 if classes and d.r_hat.shape[1] == 1 else 0)
        worst.append(
            {
                "row": int(d.rows[row]),
                "output": output_name,
                "r_hat": _number(float(d.r_hat[row, output]), ".3f"),
                "bulk": _number(float(d.ess_bulk[row, output]), ",.0f"),
                "tail": _number(float(d.ess_tail[row, output]), ",.0f"),
            }
        )
    summary = [
        (
            label,
            _number(float(worst), form),
            _number(float(np.median(values)), form),
            wanted,
        )
        for label, values, worst, form, wanted in (
            ("R-hat", d.r_hat, d.r_hat.max(), ".3f", "about 1"),
            ("bulk ESS", d.ess_bulk, d.ess_bulk.min(), ",.0f", "at least 400"),
            ("tail ESS", d.ess_tail, d.ess_tail.min(), ",.0f", "at least 400"),
        )
    ]
    counts = {
        "chains × draws": f"{d.n_chains} × {d.n_draws // d.n_chains:,}",
        "configurational temperature": None
        if d.temperature is None
        else f"{d.temperature:.2f} (1 is right)",
        "acceptance": None if d.acceptance is None else f"{d.acceptance:.2f}",
        "divergences": None
        if d.divergences is None
        else f"{d.divergences:,} of {d.n_draws:,}",
        "E-BFMI, smallest": None if d.e_bfmi is None else f"{d.e_bfmi:.2f}",
        "inputs compared": f"{len(d.rows):,}",
    }
    return {
        "name": e.name,
        "picture": None if chains is None else _inline(chains.picture, prefix),
        "layers": "" if chains is None else chains.layers,
        "summary": summary,
        "worst": worst,
        "several_outputs": e.prediction.kind == "classification" or d.r_hat.shape[1] > 1,
        "output_label": "class" if e.prediction.kind == "classification" else "target",
        "counts": {key: value for key, value in counts.items() if value is not None},
    }


def _run(e: Evaluation) -> dict[str, Any]:
    draws = e.entry.draws
    shape = tuple((draws.theta if isinstance(draws, Draws) else draws[0]).shape[:-1])
    facts = {"draws": " × ".join(f"{size:,}" for size in shape) or "1"}
    if e.entry.seconds is not None:
        facts["time"] = duration(e.entry.seconds)
    evidence = draws.log_evidence if isinstance(draws, Draws) else None
    if evidence is not None:
        value, error = evidence
        known = (
            f" ± {error:.2f}"
            if math.isfinite(error)
            else f" ({e.entry.info.get('method', 'error unknown')})"
        )
        facts["log evidence"] = f"{value:.2f}".replace("-", "−") + known
    hidden = {"seconds", "settings", "method"}
    for key, value in e.entry.info.items():
        if key not in hidden:
            facts[str(key).replace("_", " ")] = _fact(value)
    settings = (
        e.entry.info.get("settings") or e.entry.info.get("method") or "weights as given"
    )
    return {"name": e.name, "settings": str(settings), "facts": facts}


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, list | tuple):
        value = ", ".join(map(_fact, value))
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= 200 else text[:200] + " …"


def _about(model: BayesianModel, rows: int) -> dict[str, str]:
    widths = ", ".join(f"{name}: {width}" for name, width in model.spec.widths.items())
    about = {
        "weights": f"{model.dim:,}" + (f" (hidden units {widths})" if widths else ""),
        "likelihood": repr(model.likelihood).replace(f", kind='{model.likelihood.kind}'", "")
        .replace(f"kind='{model.likelihood.kind}'", ""),
        "prior": _describe(model.prior),
        "training rows": f"{len(model.x):,}",
        "test rows": f"{rows:,}",
        "fingerprint": model.fingerprint(),
    }  # fmt: skip
    if model.spec.unknown:
        about["symmetries"] = f"not known: {model.spec.unknown}"
    if model.temperature != 1:
        about["temperature"] = f"{model.temperature:g}"
    return about


def _describe(value: Any) -> str:
    text = re.sub(r"<(?:[\w.]+\.)?(\w+) object at 0x[0-9a-f]+>", r"\1", repr(value))
    return text if len(text) <= 300 else text[:300] + " …"


@cache
def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    for package in ("bnnflow", "numpy", "arviz", "matplotlib", "pyro-ppl"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return dict(
        sorted(versions.items(), key=lambda item: (item[0] != "bnnflow", item[0].lower()))
    )


def _check_path(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, {path} is a folder")
    return path


# ---------------------------------------- pictures


def _figures(
    comparison: Comparison, model: BayesianModel, y: Tensor
) -> tuple[_Picture, ...]:
    predictions = {e.name: e.prediction for e in comparison.evaluations}
    classes = model.likelihood.kind == "classification"
    shown = _of_classes(predictions, y) if classes else _of_numbers(predictions, model, y)
    if len(predictions) > 1:
        text = (
            "Log scores beside the best, with 95 % intervals of the paired differences over "
            "rows. Within the grey band methods predict alike for most purposes; an interval that "
            "leaves it says that these rows cannot tell."
        )
        shown.insert(0, (plots.scores(predictions, y, margin=MARGIN), text))
    names = ", ".join(predictions)
    return tuple(
        _Picture(_svg(figure, f"{text.split('.')[0]} of {names}"), text)
        for figure, text in shown
    )


def _of_classes(predictions: dict[str, Prediction], y: Tensor) -> list[tuple[Figure, str]]:
    calibration = (
        "Calibration. Accuracy against the probability of the predicted class, in as many bins as "
        "the rows allow. A calibrated method stays within the grey bars, which hold 95 % of a "
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
        shown.append((plots.confusion(predictions, y), confusion))
    return shown


def _of_numbers(
    predictions: dict[str, Prediction], model: BayesianModel, y: Tensor
) -> list[tuple[Figure, str]]:
    calibration = (
        "Calibration. Share of targets inside central predictive intervals of every nominal "
        "coverage. The grey region holds 95 % of outcomes of a calibrated method, level by level; "
        "below it intervals are too narrow, above too wide."
    )
    residuals = (
        "Residuals. Normal scores of targets under their predictions, against the predicted "
        "mean: nine in ten lie between the dashed lines where predictions are calibrated; a trend "
        "in height is a wrong mean, one in width a wrong noise."
    )
    single = model.x.flatten(1).shape[1] == 1 and y.shape[-1] == 1
    if single:
        figure = plots.predictive_band(predictions, model.x, model.y)
        spread = (
            "Predictions. Mean, 50 % and 90 % bands of the target, and between dashed lines 90 % "
            "of the function itself (without noise), at these inputs; dots are training data. "
            "The vertical axis is bounded by the data."
        )
    else:
        figure = plots.predictive(predictions, y)
        spread = (
            "Predictions. Mean and 90 % interval of rows, in the order of the observed "
            "target; at most 120 rows are drawn."
        )
    return [
        (plots.reliability(predictions, y), calibration),
        (figure, spread),
        (plots.residuals(predictions, y), residuals),
    ]


def _chains(comparison: Comparison, model: BayesianModel) -> dict[str, _Chains]:
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
            f"Chains of {e.name}. Left the log joint, draw by draw, of at most twelve; right the "
            "ranks of the prediction that chains agree least about, even where they agree."
        )
        picture = _Picture(_svg(figure, f"Traces and ranks of {e.name}"), text)
        shown[e.name] = _Chains(picture, _layers(model, draws))
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


def _unique(svg: str, prefix: str) -> str:
    """Prefix every identifier, so that pictures on one page do not refer to each other's parts."""
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    return svg.replace("url(#", f"url(#{prefix}")
