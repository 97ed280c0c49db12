"""What the commands do: from files to values and files. Nothing here prints."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bnnflow import inference, storage
from bnnflow.cli.columns import Column, Inputs, Target, decimal_mark
from bnnflow.cli.reading import Notes, Raw, read
from bnnflow.files import load
from bnnflow.method import Method
from bnnflow.predictive import metrics
from bnnflow.stopwatch import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor

    from bnnflow.diagnosis import Diagnosis
    from bnnflow.predictive import Prediction

__all__ = ["METHODS", "Data", "Settings", "check", "compare", "fit", "predict", "report"]

METHODS: dict[str, Callable[[], Method]] = {
    "hmc": inference.HMC,
    "mclmc": inference.MCLMC,
    "adjusted-mclmc": inference.AdjustedMCLMC,
    "sghmc": inference.SGHMC,
    "smc": inference.SMC,
    "parallel-tempering": inference.ParallelTempering,
    "laplace": inference.Laplace,
    "vi": inference.VI,
    "swag": inference.SWAG,
    "ensemble": inference.DeepEnsemble,
    "dropout": inference.MCDropout,
}
"""What ``--method`` may name, besides ``auto``."""

_HELD_OUT = 0.1  # share of the rows that scores are measured on
_LEVEL = 0.9  # of the intervals whose coverage is measured
_MARGIN = 0.01  # nats a row, within which methods are equal
# of `check`; any other verdict is 1
_CODES = {"trust": 0, "trust predictions only": 0, "do not trust": 3}


@dataclass(frozen=True)
class Data:
    """Which file, and how it is read.

    Attributes:
        path: the file.
        target: name of the column to predict.
        task: ``"auto"``, ``"regression"`` or ``"classification"``.
        drop: columns that are left out.
        separator: between cells; found if None.
        decimal: ``"."`` or ``","``, where the numbers of a column do not tell.
        all_rows: fit all rows, hold none out.
    """

    path: Path
    target: str
    task: str = "auto"
    drop: tuple[str, ...] = ()
    separator: str | None = None
    decimal: str | None = None
    all_rows: bool = False


@dataclass(frozen=True)
class Settings:
    """How it is fitted; see `bnnflow.BayesianMLPRegressor`."""

    method: str = "auto"
    likelihood: str = "auto"
    network: tuple[int, ...] | str = "auto"
    draws: int = 500
    budget: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("--method", self.method, ["auto", *METHODS])
        if self.budget is not None and self.method != "auto":
            raise ValueError("--budget bounds the rounds of --method auto only")


@dataclass(frozen=True)
class Split:
    """A file, parted."""

    inputs: Inputs
    target: Target
    fitted: Raw
    held_out: Raw
    notes: Notes = field(default_factory=list)


def fit(
    data: Data, settings: Settings, out: Path, *, progress: bool = False
) -> dict[str, Any]:
    """Fit a model to a file and write it, what was learned of the columns, and a summary to a
    folder.

    The same again after it was killed goes on with its chains, if it has any; after it has ended it
    returns the summary, with ``"finished_before"``.

    Raises:
        ValueError: if the folder holds anything else, or for what does not fit together.
    """
    _check(data)
    asked = _asked(data, settings)
    if _finished(out, asked):
        return _json(out / "summary.json") | {"finished_before": True}
    split = _split(data, settings.seed)
    lock = storage.Lock(out, folder=True)
    try:
        chains = out / "chains"
        if not (out / "asked.json").exists() or _json(out / "asked.json") != asked:
            shutil.rmtree(chains, ignore_errors=True)  # of another run, which never ended
        _write_json(out / "asked.json", asked)
        watch = Stopwatch()
        estimator = _fitted(split, settings, progress, chains)
        scores = _scores(estimator, split)
        summary = {
            "target": data.target,
            "task": split.target.task,
            "likelihood": getattr(estimator, "likelihood_", "Categorical"),
            "calibration": getattr(estimator, "calibration_", "none"),
            "method": settings.method,
            "rows": len(split.fitted[data.target]),
            "held_out_rows": len(split.held_out[data.target]),
            "scores": scores,
            "seconds": round(watch.seconds, 1),
            "notes": split.notes,
        }
        _write_raw(out / "held_out.csv", split.held_out)
        columns = {"target": asdict(split.target), "inputs": split.inputs.describe()}
        _write_json(out / "columns.json", columns)
        estimator.save(out / "model.bnn")
        _write_json(out / "summary.json", summary)
        shutil.rmtree(chains, ignore_errors=True)
    finally:
        lock.release()
    return summary


def predict(
    run: Path, path: Path, notes: Notes, level: float = 0.9, separator: str | None = None
) -> dict[str, list[Any]]:
    """Predict the rows of a file; return columns by name.

    Raises:
        ValueError: for a run that is not finished, or a file without the columns of training.
    """
    if not 0 < level < 1:
        raise ValueError(f"--level must lie strictly between 0 and 1, got {level:g}")
    estimator, inputs, target = _run(run)
    raw = read(path, notes, separator)
    with _telling(notes):
        frame = _frame(inputs.apply(raw, notes))
        if target["task"] == "classification":
            probs = estimator.predict_proba(frame)
            labels = estimator.classes_[probs.argmax(1)]
            named = {
                f"p_{c}": probs[:, i].tolist() for i, c in enumerate(estimator.classes_)
            }
            return {target["column"]["name"]: labels.tolist()} | named
        mean, sd = estimator.predict(frame, return_std=True)
        low, high = estimator.predict_interval(frame, level=level).T
    found = {"mean": mean, "sd": sd, "low": low, "high": high}
    return {name: values.ravel().tolist() for name, values in found.items()}


def report(
    run: Path,
    out: Path,
    notes: Notes,
    path: Path | None = None,
    unit: str | None = None,
) -> Path:
    """Write the HTML report on the held-out rows of a run, or on those of a file, with the target
    in a unit, if one is given.

    Raises:
        ValueError: if there are no such rows.
    """
    estimator, inputs, described = _run(run)
    raw = _rows_of(run, path, notes)
    if raw is None:
        raise ValueError(f"{run} held no rows out: name a file of rows with their targets")
    target = _target(described)
    name = target.column.name
    if name not in raw:
        raise ValueError(f"the file has no column {name!r}, the target")
    raw = _with_targets(raw, target, notes)
    with _telling(notes):
        x, y = _frame(inputs.apply(raw, notes)), target.read(raw[name], notes)
        estimator.report(out, x, y, targets=[name], units=None if unit is None else [unit])
    return out


def check(run: Path) -> tuple[Diagnosis, int]:
    """Return the diagnosis of a run, on the rows that it held out, and an exit code.

    0 where the predictions may be used, 1 with care, 3 where not.
    """
    estimator, inputs, described = _run(run)
    notes: Notes = []
    raw = _rows_of(run, None, notes)
    with _telling(notes):
        if raw is None:
            found = estimator.diagnose()
        else:
            target = _target(described)
            name = target.column.name
            raw = _with_targets(raw, target, notes)
            found = estimator.diagnose(
                _frame(inputs.apply(raw, notes)), target.read(raw[name], notes)
            )
    return found, _CODES.get(found.verdict, 1)


def compare(
    data: Data,
    methods: Sequence[str],
    settings: Sequence[Settings],
    *,
    progress: bool = False,
) -> tuple[list[dict[str, Any]], Notes]:
    """Fit a file by several methods and score them on the same held-out rows.

    A method that fails has an ``"error"`` in place of scores. Ctrl-C keeps the methods that are
    done. Methods are equal if the 95% interval of the difference of their log scores lies within
    0.01 nats.
    """
    _check(data)
    split = _split(data, settings[0].seed)
    if not len(split.held_out[data.target]):
        raise ValueError(f"{data.path.name} has too few rows to hold any out")
    rows, densities = [], {}
    told: dict[str, Notes] = {}
    for name, each in zip(methods, settings, strict=True):
        watch = Stopwatch()
        row: dict[str, Any] = {"method": name}
        told[name] = []
        try:
            estimator = _fitted(replace(split, notes=told[name]), each, progress)
            if estimator.draws_.info.get("interrupted"):  # to be compared with nothing
                raise KeyboardInterrupt
            row |= _scores(estimator, split)
            densities[name] = _log_densities(estimator, split)
        except ValueError as error:
            row["error"] = str(error)
        except KeyboardInterrupt:
            if not rows:
                raise
            split.notes.append(
                f"interrupted: not compared: {', '.join(methods[len(rows) :])}"
            )
            break
        rows.append(row | {"seconds": round(watch.seconds, 1)})
    if densities:
        _compare_pairwise(rows, densities)
    for note in dict.fromkeys(note for notes in told.values() for note in notes):
        said_by = [name for name, notes in told.items() if note in notes]
        everywhere = densities.keys() <= set(said_by)
        split.notes.append(note if everywhere else f"{', '.join(said_by)}: {note}")
    return rows, list(dict.fromkeys(split.notes))


# ---------------------------------------- from a file to a fit


def _check(data: Data) -> None:
    _one_of("--task", data.task, ["auto", "regression", "classification"])
    if data.decimal is not None:
        _one_of("--decimal", data.decimal, [".", ","])


def _one_of(option: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(choices)}, got {value!r}")


def _split(data: Data, seed: int) -> Split:
    """Read a file, find out what its columns hold, and part its rows."""
    notes: Notes = []
    raw = read(data.path, notes, data.separator)
    for name in (data.target, *data.drop):
        if name not in raw:
            some = ", ".join(list(raw)[:10]) + (", ..." if len(raw) > 10 else "")
            raise ValueError(f"{data.path.name} has no column {name!r}; it has {some}")
    if any(note.startswith(f"a further column {data.target!r}:") for note in notes):
        raise ValueError(
            f"{data.path.name} has several columns {data.target!r}, the target"
        )
    if data.target in data.drop:
        raise ValueError(f"--drop leaves out the target {data.target!r}")
    raw = {name: values for name, values in raw.items() if name not in data.drop}
    decimal = data.decimal or decimal_mark(raw)
    target = Target.look(data.target, raw[data.target], data.task, decimal, notes)
    raw = _with_targets(raw, target, notes)
    if len(raw[data.target]) < 2:
        raise ValueError(f"{data.path.name} has fewer than two rows with a target")
    y = target.read(raw[data.target], notes)
    if target.task == "classification":
        _check_classes(y, data.target, notes)
    training = np.ones(len(y), bool) if data.all_rows else _training(y, target.task, seed)
    features = {name: values for name, values in raw.items() if name != data.target}
    inputs = Inputs.learn(features, training, decimal, notes)
    return Split(inputs, target, _subset(raw, training), _subset(raw, ~training), notes)


def _check_classes(y: np.ndarray, name: str, notes: Notes) -> None:
    """Tell the classes; refuse more of them than can be learned."""
    counts = Counter(y.tolist()).most_common()
    if len(y) < 2 * len(counts):
        raise ValueError(
            f"the target {name!r} has {len(counts)} classes in {len(y)} rows, fewer than two each"
        )
    some = ", ".join(f"{label} ({count} rows)" for label, count in counts[:20])
    notes.append(f"{len(counts)} classes: {some}" + (", ..." if len(counts) > 20 else ""))


def _training(y: np.ndarray, task: str, seed: int) -> np.ndarray:
    """Say which rows are fitted, ``(n,)``: nine tenths, and one of every class."""
    training = np.ones(len(y), bool)
    order = np.random.default_rng(seed).permutation(len(y))
    training[order[: round(_HELD_OUT * len(y))]] = False
    if task == "classification":
        training |= ~np.isin(y, y[training])
    return training


def _fitted(
    split: Split, settings: Settings, progress: bool, chains: Path | None = None
) -> Any:
    """Fit the rows; a method that has chains keeps them in a folder until the fit is over."""
    from bnnflow import estimators  # loads scikit-learn

    options: dict[str, Any] = {
        "network": settings.network,
        "likelihood": settings.likelihood,
        "method": "auto" if settings.method == "auto" else METHODS[settings.method](),
        "budget": settings.budget,
        "n_draws": settings.draws,
        "random_state": settings.seed,
        "progress": progress,
    }
    classes = split.target.task == "classification"
    make: Any = (
        estimators.BayesianMLPClassifier if classes else estimators.BayesianMLPRegressor
    )
    frame = _frame(split.inputs.apply(split.fitted, []))
    with _telling(split.notes):
        y = split.target.read(split.fitted[split.target.column.name], [])
        refused = getattr(options["method"], "refused", ())
        kept = None if "checkpoint" in refused else chains
        return make(**options).fit(frame, y, checkpoint=kept)


def _scores(estimator: Any, split: Split) -> dict[str, float]:
    """Return scores on the rows that were held out; none if there are none."""
    if not len(split.held_out[split.target.column.name]):
        return {}
    prediction, targets = _held_out(estimator, split)
    scores = {"log_score": metrics.lppd(prediction, targets)}
    if split.target.task == "classification":
        return scores | {"accuracy": metrics.accuracy(prediction, targets)}
    return scores | {
        "rmse": metrics.rmse(prediction, targets),
        f"coverage_{_LEVEL:.0%}": metrics.coverage(prediction, targets, _LEVEL),
    }


def _log_densities(estimator: Any, split: Split) -> Tensor:
    """Return the log density of every row that was held out, ``(n,)``."""
    prediction, targets = _held_out(estimator, split)
    return prediction.log_prob(targets)


def _held_out(estimator: Any, split: Split) -> tuple[Prediction, Tensor]:
    """Return the prediction of the rows that were held out, and their targets."""
    raw = split.held_out
    y = split.target.read(raw[split.target.column.name], [])
    with _telling(split.notes):
        prediction = estimator.predict_dist(_frame(split.inputs.apply(raw, [])))
    return prediction, estimator._targets(y)


def _compare_pairwise(rows: list[dict[str, Any]], densities: dict[str, Tensor]) -> None:
    """Add to each method's row how its log score differs from the best one's, and its weight in the
    mixture of best log score.
    """
    from bnnflow.comparison import difference, stacking  # loads scikit-learn

    best = max(densities.values(), key=lambda values: float(values.mean()))
    n = len(best)
    weights = stacking(torch.stack(list(densities.values()), 1)).tolist()
    shares = dict(zip(densities, weights, strict=True))
    for row in rows:
        if (values := densities.get(row["method"])) is not None:
            gap = difference(values, best, margin=_MARGIN * n)
            row |= {"to_best": gap.elpd / n, "to_best_se": gap.se / n}
            row |= {"standing": gap.standing, "stacking": shares[row["method"]]}


def _frame(table: dict[str, np.ndarray]) -> Any:
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise ValueError("the command line needs pandas: pip install pandas") from None
    return pandas.DataFrame(table)


def _subset(raw: Raw, rows: np.ndarray) -> Raw:
    return {name: values[rows] for name, values in raw.items()}


def _with_targets(raw: Raw, target: Target, notes: Notes) -> Raw:
    """Return the rows whose target is there, and note how many are not."""
    known = target.known(raw[target.column.name])
    if known.all():
        return raw
    notes.append(f"{(~known).sum()} rows without a target are left out")
    return _subset(raw, known)


@contextmanager
def _telling(notes: Notes) -> Iterator[None]:
    """Take what the estimators warn of as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    told = [str(each.message) for each in caught if each.category is UserWarning]
    notes.extend(message for message in dict.fromkeys(told) if message not in notes)


# ---------------------------------------- runs


def _asked(data: Data, settings: Settings) -> dict[str, Any]:
    """Return what makes a run the same run: settings, and the contents of the file."""
    if not data.path.is_file():
        raise ValueError(f"{data.path} is not a file that is there")
    digest = hashlib.sha256(data.path.read_bytes()).hexdigest()
    asked = asdict(data) | asdict(settings) | {"path": data.path.name, "digest": digest}
    return json.loads(json.dumps(asked))


def _finished(out: Path, asked: dict[str, Any]) -> bool:
    """Say whether a folder holds this very run, at its end; not one that was killed.

    Raises:
        ValueError: if the folder holds anything else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
    if (out / "summary.json").exists():
        if _json(out / "asked.json") != asked:
            raise ValueError(
                f"{out} holds another run (other data or settings): name a new --out"
            )
        return True
    visible = [each.name for each in out.glob("*") if not each.name.startswith(".")]
    if visible and not any(name.startswith("asked.json") for name in visible):
        raise ValueError(
            f"{out} is not empty and holds no run ({visible[0]}): name a new --out"
        )
    return False


def _run(run: Path) -> tuple[Any, Inputs, dict[str, Any]]:
    """Return the estimator of a run, its inputs and its target."""
    if not (run / "summary.json").exists():
        state = "is not finished" if (run / "asked.json").exists() else "holds no run"
        raise ValueError(f"{run} {state}: make one by bnnflow fit")
    columns = _json(run / "columns.json")
    inputs = Inputs.from_description(columns["inputs"])
    return load(run / "model.bnn"), inputs, columns["target"]


def _target(described: dict[str, Any]) -> Target:
    return Target(Column(**described["column"]), described["task"])


def _rows_of(run: Path, path: Path | None, notes: Notes) -> Raw | None:
    """Return the rows of a file, or else those that a run has held out, if it has."""
    if path is not None:
        return read(path, notes)
    held_out = _json(run / "summary.json")["held_out_rows"]
    return read(run / "held_out.csv", notes, ",") if held_out else None


def _write_raw(path: Path, raw: Raw) -> None:
    with (
        storage.whole(path) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8") as f,
    ):
        csv.writer(f).writerows([list(raw), *zip(*raw.values(), strict=True)])


def _write_json(path: Path, content: Any) -> None:
    with storage.whole(path) as unfinished:
        unfinished.write_text(
            json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8"
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
