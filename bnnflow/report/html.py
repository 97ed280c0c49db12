"""The report: one HTML file that reads without scripts; nothing is loaded from anywhere."""

from __future__ import annotations

import datetime
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow import storage
from bnnflow.arguments import checked
from bnnflow.diagnosis import Diagnosis
from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.predictive import metrics
from bnnflow.report import plots
from bnnflow.report.compare import Comparison, Evaluation, compare, duration, gather
from bnnflow.report.figures import (
    ChainPictures,
    Picture,
    Pictures,
    of_chains,
    pictures,
    unique,
)
from bnnflow.report.names import Names
from bnnflow.report.reproduce import program
from bnnflow.tables import in_columns

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
        "90% cover",
        ".1%",
        "targets inside the central 90% interval; 90% is best",
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
    _Column(
        "log_evidence",
        "log evidence",
        ",.2f",
        "of the model, ± its standard error, where the method estimates it",
    ),
    _Column("draws", "draws", ",", "draws of the weights"),
    _Column("seconds", "seconds", ".3g", "wall-clock time to obtain them"),
    _Column(
        "seconds_per_1000_draws", "s / 1,000", ".3g", "wall-clock time for 1,000 draws"
    ),
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
_COST = (
    "log_likelihood",
    "log_joint",
    "log_evidence",
    "draws",
    "seconds_per_1000_draws",
)
_WITH_ERROR = ("lppd", "log_evidence")
_WITH_UNIT = ("rmse", "crps")


@dataclass(frozen=True, eq=False)
class Section:
    """One experiment of a report: everything the template shows."""

    title: str
    comparison: Comparison
    pictures: Pictures
    chains: dict[str, ChainPictures]
    about: dict[str, str]
    notes: list[str]
    names: Names
    by_target: tuple[dict[str, float], ...]
    program: str


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
            columns = _columns(section)
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
                "\n".join(
                    [
                        section.title,
                        "",
                        *aligned,
                        "",
                        section.comparison.headline,
                        *section.notes,
                    ]
                )
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
    targets: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
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
        targets: name of each target, as ``["price"]``; of labels the one name that they have.
        units: of each target, as ``["EUR"]``.
        classes: name of each class, as ``["setosa", "versicolor", "virginica"]``.

    Raises:
        ValueError: before any work, for methods, inputs, targets or names that do not fit, one of
            x_test and y_test without the other, or a path that is a folder.

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
    if (x_test is None) != (y_test is None):
        raise ValueError("x_test and y_test come together: rows and their targets")
    notes = []
    empty = [
        each is not None and tuple(each.shape[:1]) == (0,) for each in (x_test, y_test)
    ]
    if all(empty):
        notes.append("x_test has no rows.")
        x_test = y_test = None
    held_out = x_test is not None
    x, y = model.inputs(x_test, "x_test"), model.targets(y_test, "y_test")
    if len(x) != len(y):
        raise ValueError(f"x_test has {len(x)} rows and y_test has {len(y)}")
    if path is not None:
        _check_path(path)
    names = Names.of(model, targets, units, classes)
    kind = model.likelihood.kind
    comparison = compare(methods, model, x, y, seconds, held_out=held_out)
    entries = [e.entry for e in comparison.evaluations]
    what = "Posterior" if len(entries) == 1 else "Posterior comparison"
    title = title or f"{what}: {kind}, {model.dim:,} weights"
    section = Section(
        title,
        comparison,
        pictures(comparison, model, y, names),
        of_chains(comparison, model),
        _about(model, len(y) if held_out else 0, names),
        notes + _notes(comparison, model, held_out=held_out),
        names,
        _by_target(comparison, y),
        program(entries, model, names, _versions(), held_out=held_out),
    )
    made = Report(title, (section,))
    return made if path is None else made.write(path)


def _notes(comparison: Comparison, model: BayesianModel, *, held_out: bool) -> list[str]:
    """Return what a reader should know of what the page leaves out."""
    notes = [f"{name} is left out: {why}." for name, why in comparison.left_out.items()]
    if not held_out:
        notes.append(_NOTE)
    likelihood = model.likelihood
    if likelihood.kind == "regression" and not (
        likelihood.has_cdf and likelihood.has_variance
    ):
        notes.append(
            f"{likelihood.name} has no cdf and variance: there are no intervals to look at."
        )
    return notes


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
    figures: dict[str, list[dict[str, Any]]]
    targets: list[_Column]
    target_rows: list[list[dict[str, Any]]]
    program: str
    convergence: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    about: dict[str, str]
    notes: list[str]

    @classmethod
    def of(cls, section: Section, number: int) -> _Shown:
        comparison = section.comparison
        evaluations = comparison.evaluations
        every = _columns(section)
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
            figures={
                kind: [
                    _inline(each, f"s{number}{kind}{i}-") for i, each in enumerate(group)
                ]
                for kind, group in section.pictures._asdict().items()
            },
            targets=_target_columns(section),
            target_rows=_target_cells(section),
            program=section.program,
            convergence=[
                _convergence(e, section, f"s{number}c{i}-")
                for i, e in enumerate(evaluations)
                if e.diagnosis.r_hat is not None
            ],
            runs=[_run(e) for e in evaluations],
            about=section.about,
            notes=section.notes,
        )


def _inline(picture: Picture, prefix: str) -> dict[str, Any]:
    from markupsafe import Markup

    return {"svg": Markup(unique(picture.svg, prefix)), "caption": picture.caption}


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


def _columns(section: Section) -> list[_Column]:
    rows = [e.row for e in section.comparison.evaluations]
    unit = section.names.unit
    return [
        column._replace(label=f"{column.label} ({unit})")
        if unit and column.key in _WITH_UNIT
        else column
        for column in _COLUMNS
        if any(row.get(column.key) is not None for row in rows)
    ]


def _by_target(comparison: Comparison, y: Tensor) -> tuple[dict[str, float], ...]:
    """Return root mean squared errors and coverage of each target, by method; none of one."""
    if y.dim() < 2 or y.shape[1] < 2:
        return ()
    rows = []
    for e in comparison.evaluations:
        targets = e.prediction.targets(y)
        rmse = (e.prediction.mean - targets).square().mean(0).sqrt()
        row = {f"rmse {i}": value for i, value in enumerate(rmse.tolist())}
        if e.prediction.model.likelihood.has_cdf:
            inside = (metrics.pit(e.prediction, y) - 0.5).abs() <= 0.45
            covered = inside.double().mean(0).tolist()
            row |= {f"coverage {i}": value for i, value in enumerate(covered)}
        rows.append(row)
    return tuple(rows)


def _target_columns(section: Section) -> list[_Column]:
    """Return the columns of the table by target."""
    if not section.by_target:
        return []
    kinds = {"rmse": ("RMSE", ".4g"), "coverage": ("90% cover", ".1%")}
    keys = [key.split() for key in section.by_target[0]]
    return [
        _Column(
            f"{kind} {i}",
            f"{section.names.target(int(i))}: {kinds[kind][0]}",
            kinds[kind][1],
            "",
        )
        for kind, i in sorted(keys, key=lambda key: int(key[1]))
    ]


def _plain(e: Evaluation, column: _Column) -> str:
    value = e.row.get(column.key)
    if value is None:
        return "–"
    text = _number(value, column.format)
    if column.key in _WITH_ERROR and not math.isnan(e.row[f"{column.key}_se"]):
        text += f" ± {_number(e.row[f'{column.key}_se'], column.format)}"
    return text


def _number(value: float, form: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return (
            "–" if math.isnan(value) else f"{value}".replace("inf", "∞").replace("-", "−")
        )
    if form in (".3g", ".3f", ",.1f") and abs(value) >= 1000:
        form = ",.0f"
    return format(value, form).replace("-", "−")


def _target_cells(section: Section) -> list[list[dict[str, Any]]]:
    columns = _target_columns(section)
    return [
        [
            {"text": _number(row[c.key], c.format), "value": row[c.key], "mark": ""}
            for c in columns
        ]
        for row in section.by_target
    ]


def _convergence(e: Evaluation, section: Section, prefix: str) -> dict[str, Any]:
    d, chains, names = e.diagnosis, section.chains.get(e.name), section.names
    assert d.r_hat is not None
    assert d.ess_bulk is not None
    assert d.ess_tail is not None
    assert d.rows is not None
    order = np.argsort(-d.r_hat, axis=None, kind="stable")[:5]
    worst = []
    for row, output in zip(*np.unravel_index(order, d.r_hat.shape), strict=True):
        classes = e.prediction.kind == "classification"
        number = int(output) + (1 if classes and d.r_hat.shape[1] == 1 else 0)
        known = names.classes if classes else names.targets
        worst.append(
            {
                "row": int(d.rows[row]),
                "output": known[number] if known else number,
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
    hidden = {"seconds", "settings", "method", "run", "fitted"}
    for key, value in e.entry.info.items():
        if key not in hidden:
            # a seed is a name, to be copied, and no amount
            shown = str(value) if key == "seed" else _fact(value)
            facts[str(key).replace("_", " ")] = shown
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


def _about(model: BayesianModel, rows: int, names: Names) -> dict[str, str]:
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
    if names.targets or names.units:
        count = max(len(names.targets), len(names.units))
        about["targets"] = ", ".join(map(names.target, range(count)))
    if names.classes:
        about["classes"] = ", ".join(names.classes)
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
