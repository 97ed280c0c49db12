"""The commands: what they take, and what they print."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bnnflow.cli import work
from bnnflow.tables import in_columns

__all__ = ["app"]

_MOST_NOTES = 20  # that are printed


class _OneLine(TyperGroup):
    """Commands whose errors are one line on stderr and exit code 2."""

    def main(self, args: Any = None, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in args
        given = [each for each in args if each != "--debug"]
        try:
            code = super().main(given, standalone_mode=False, **extra)
        except (typer.Abort, KeyboardInterrupt):
            code = _failed("interrupted", 130)
        except Exception as error:
            if debug:
                raise
            code = _failed(_in_one_line(error), 2)
        if standalone_mode:
            sys.exit(code or 0)
        return code


def _failed(message: str, code: int) -> int:
    typer.echo(f"bnnflow: {message}", err=True)
    return code


def _in_one_line(error: Exception) -> str:
    """Return what went wrong; for what nobody expected its kind, and how to learn more."""
    usage = getattr(error, "format_message", None)  # of the command line itself
    message = " ".join((usage() if usage else str(error)).split())
    if usage or isinstance(error, ValueError | TypeError | OSError):
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (--debug shows where)"


app = typer.Typer(
    name="bnnflow",
    cls=_OneLine,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Data = Annotated[Path, typer.Argument(help="The rows: a CSV or a Parquet file.")]
_Run = Annotated[Path, typer.Argument(help="The folder that bnnflow fit has written.")]
_TargetName = Annotated[str, typer.Option("--target", help="The column to predict.")]
_Task = Annotated[
    str,
    typer.Option(
        "--task", help="regression or classification; auto: classes if it holds words."
    ),
]
_Drop = Annotated[str, typer.Option("--drop", help="Columns to leave out: id,name.")]
_Separator = Annotated[
    str | None,
    typer.Option("--separator", help="Between cells, if it cannot be told (tab: '\\t')."),
]
_Decimal = Annotated[
    str | None,
    typer.Option(
        "--decimal", help="The mark before decimals, . or , where 1,234 may be either."
    ),
]
_Likelihood = Annotated[
    str,
    typer.Option(
        "--likelihood",
        help="heteroscedastic_student, heteroscedastic, normal, student, lognormal, gamma, "
        "poisson, negative_binomial or ordinal; auto chooses by what the target looks like, and "
        "says so.",
    ),
]
_Budget = Annotated[
    float | None,
    typer.Option("--budget", help="Seconds after which no further round of chains begins."),
]
_Seed = Annotated[
    int, typer.Option("--seed", min=0, help="The same seed gives the same result.")
]
_Network = Annotated[
    str, typer.Option("--network", help="Widths of the hidden layers, such as 16,16.")
]
_Draws = Annotated[
    int, typer.Option("--draws", help="Draws of the posterior that are kept.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Progress = Annotated[
    bool, typer.Option("--progress/--no-progress", help="Bars, where a person looks on.")
]


@app.callback(invoke_without_command=True)
def bnnflow(context: typer.Context) -> None:
    """From a file of rows to predictions that know how far they can be trusted.

    bnnflow fit houses.csv --target price --out run

    bnnflow check run

    bnnflow predict run new.csv --level 0.9 -o predicted.csv

    Errors are one line; --debug shows where they arose.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def fit(  # noqa: PLR0913
    data: _Data,
    target: _TargetName,
    out: Annotated[Path, typer.Option("--out", help="A folder of its own for the run.")],
    task: _Task = "auto",
    likelihood: _Likelihood = "auto",
    method: Annotated[
        str, typer.Option("--method", help="auto, " + ", ".join(work.METHODS) + ".")
    ] = "auto",
    network: _Network = "auto",
    draws: _Draws = 500,
    budget: _Budget = None,
    seed: _Seed = 0,
    all_rows: Annotated[
        bool,
        typer.Option("--all-rows", help="Fit all rows: hold none out to measure scores."),
    ] = False,
    drop: _Drop = "",
    separator: _Separator = None,
    decimal: _Decimal = None,
    as_json: _Json = False,
    progress: _Progress = True,
) -> None:
    """Fit a Bayesian neural network to a file.

    What its columns hold is found out, and said: numbers, dates (days since the first), words
    (categories), missing values (the median and a mark, or a category of their own). A tenth of
    the rows is held out and scored. The folder gets model.bnn, columns.json, summary.json and
    held_out.csv. After a kill the same command goes on; after its end it prints the summary.

    bnnflow fit houses.csv --target price --out run

    bnnflow fit flowers.parquet --target species --out flowers --seed 1 --json

    bnnflow fit visits.csv --target visits --out quick --method laplace --likelihood poisson
    """
    source = work.Data(
        data, target, task, _listed(drop), _character(separator), decimal, all_rows
    )
    settings = work.Settings(method, likelihood, _widths(network), draws, budget, seed)
    summary = work.fit(source, settings, out, progress=progress)
    _tell(summary["notes"])
    if as_json:
        typer.echo(json.dumps(summary))
        return
    if summary.pop("finished_before", False):
        typer.echo(f"{out} is finished: this is what came of it")
    typer.echo(
        f"{summary['task']} of {summary['target']}, {summary['rows']} rows, "
        f"{summary['seconds']:g} seconds"
    )
    typer.echo(f"likelihood: {summary['likelihood']}")
    if summary["scores"]:
        shown = ", ".join(
            f"{name} {value:.4g}" for name, value in summary["scores"].items()
        )
        typer.echo(f"on {summary['held_out_rows']} rows that were held out: {shown}")
    typer.echo(f"next: bnnflow check {out}; bnnflow predict {out} new.csv -o predicted.csv")


@app.command()
def predict(
    run: _Run,
    data: _Data,
    level: Annotated[
        float, typer.Option("--level", help="Probability of the intervals.")
    ] = 0.9,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A CSV file; printed if there is none."),
    ] = None,
    separator: _Separator = None,
    as_json: _Json = False,
) -> None:
    """Predict the rows of a file, a line each, in their order.

    For numbers: mean, sd, and the ends low and high of an interval that holds the target with the
    probability of --level. For classes: the label, and the probability of each.

    bnnflow predict run new.csv --level 0.9 -o predicted.csv
    """
    if out is not None and out.resolve() == data.resolve():
        raise ValueError(f"-o {out} is the file of the rows itself")
    notes: list[str] = []
    found = work.predict(run, data, notes, level, _character(separator))
    _tell(notes)
    if as_json:
        typer.echo(json.dumps(found))
        return
    lines = [list(found), *zip(*found.values(), strict=True)]
    if out is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
        return
    with out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    typer.echo(f"{len(lines) - 1} rows written to {out}")


@app.command()
def report(
    run: _Run,
    data: Annotated[
        Path | None, typer.Argument(help="Rows with their targets; those held out if none.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page; report.html in the run if none."),
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="Unit of the target, as EUR, for axes and scores.")
    ] = None,
) -> None:
    """Write a page on how good the predictions are, and how far the draws can be trusted.

    bnnflow report run

    bnnflow report run new_with_prices.csv -o page.html
    """
    notes: list[str] = []
    page = work.report(run, out or run / "report.html", notes, data, unit)
    _tell(notes)
    typer.echo(f"written to {page}")


@app.command()
def compare(  # noqa: PLR0913
    data: _Data,
    target: _TargetName,
    methods: Annotated[
        str, typer.Option("--methods", help="Of auto, " + ", ".join(work.METHODS) + ".")
    ] = "auto,laplace,vi,ensemble",
    task: _Task = "auto",
    likelihood: _Likelihood = "auto",
    network: _Network = "auto",
    draws: _Draws = 500,
    seed: _Seed = 0,
    drop: _Drop = "",
    separator: _Separator = None,
    decimal: _Decimal = None,
    as_json: _Json = False,
    progress: _Progress = True,
) -> None:
    """Score several methods on the same held-out rows.

    The log score is the mean log density (or probability) of what came: more is better.

    bnnflow compare houses.csv --target price --methods hmc,vi,ensemble
    """
    source = work.Data(data, target, task, _listed(drop), _character(separator), decimal)
    names = list(dict.fromkeys(_listed(methods)))
    if not names:
        raise ValueError("--methods names none")
    settings = [
        work.Settings(name, likelihood, _widths(network), draws, None, seed)
        for name in names
    ]
    rows, notes = work.compare(source, names, settings, progress=progress)
    _tell(notes)
    typer.echo(json.dumps(rows) if as_json else _table(rows))


@app.command()
def check(run: _Run, as_json: _Json = False) -> None:
    """Say whether the predictions of a run may be used, on the rows that it held out.

    The exit code is 0 if they may, 1 if with care, 3 if not.

    bnnflow check run && bnnflow predict run new.csv
    """
    found, code = work.check(run)
    if as_json:
        typer.echo(json.dumps(found.to_dict() | {"code": code}))
    else:
        typer.echo(str(found))
    raise typer.Exit(code)


# ---------------------------------------- options and tables


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _widths(text: str) -> tuple[int, ...] | str:
    if text == "auto":
        return text
    try:
        return tuple(int(part) for part in _listed(text))
    except ValueError:
        raise ValueError(f"--network must be widths such as 16,16, got {text!r}") from None


def _character(separator: str | None) -> str | None:
    if separator is None:
        return None
    separator = separator.replace("\\t", "\t")
    if len(separator) != 1 or separator in '"\r\n':
        raise ValueError(f"--separator must be one character, got {separator!r}")
    return separator


def _tell(notes: list[str]) -> None:
    """Print notes for a person: on stderr, the first of many."""
    for note in notes[:_MOST_NOTES]:
        typer.echo(f"note: {note}", err=True)
    if len(notes) > _MOST_NOTES:
        typer.echo(f"note: and {len(notes) - _MOST_NOTES} more", err=True)


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_shown(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(in_columns(cells))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return str(value)
