"""Nine sets of data, many ways to predict them: how good and how calibrated, at what cost.

Run: python examples/uci.py --data DIR [--sets boston,yacht --splits 0,1 --methods bnnflow,forest]
Two sets, two splits and three methods take a minute; --full takes all nine sets, whose largest
need hours, and prints the best published figures, which are means of 20 splits, beside them.
A file of DIR, such as boston.npz, holds X, y and the rows of each test split as test_0, test_1, ...
Fits that the CSV already has are not run again. Other packages (bde, ngboost, catboost) get an
environment each beside the CSV, which the first run makes.
"""

import argparse
import csv
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import norm

import bnnflow as bf

# Mean test NLL with 20 splits and 50 hidden units: the best published, and ensembles of five
PUBLISHED = {
    "boston": (2.40, 2.41),
    "concrete": (2.93, 3.06),
    "energy": (0.61, 1.38),
    "kin8nm": (-1.28, -1.20),
    "naval": (-6.33, -5.63),
    "power": (2.78, 2.79),
    "protein": (2.77, 2.83),
    "wine": (0.93, 0.94),
    "yacht": (0.73, 1.18),
}
BNNFLOW = {
    "bnnflow": "auto",
    "ensemble": bf.DeepEnsemble(),
    "dropout": bf.MCDropout(),
    "laplace": bf.Laplace(),
    "vi": bf.VI(),
    "swag": bf.SWAG(),
}
RIVALS = {  # and the packages of their environments; none for those of scikit-learn, which is here
    "forest": (),
    "gp": (),
    "bde": ("sklearn-contrib-bde",),
    "ngboost": ("ngboost",),
    "catboost": ("catboost", "scikit-learn"),
}
METHODS = (*BNNFLOW, "flow", *RIVALS)
FLOW_STEPS, FLOW_DRAWS = 100, 200  # trained on draws of the default method: minutes
REFINED = 32  # transitions of HMC from each draw of the flow, which alone are too wide
LEVEL = 0.9  # of the intervals
MOST_GP = 2000  # rows that a Gaussian process can take
FIELDS = ("set", "split", "method", "nll", "rmse", "coverage", "width", "cpu_seconds")


class Normals:
    """A mixture of normal laws for each row, with what the scores need of a `Prediction`."""

    def __init__(self, loc: np.ndarray, scale: np.ndarray):
        self.loc, self.scale = loc, scale  # (components, n)
        self.mean = loc.mean(0)

    def log_prob(self, y: np.ndarray) -> np.ndarray:
        return logsumexp(norm.logpdf(y, self.loc, self.scale), axis=0) - np.log(
            len(self.loc)
        )

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def quantile(self, q: float) -> np.ndarray:
        every = max(1, len(self.loc) // 1000)
        loc, scale = self.loc[::every], self.scale[::every]
        ends = norm.ppf(q, loc, scale)
        low, high = ends.min(0), ends.max(0)
        for _ in range(40):
            middle = (low + high) / 2
            below = norm.cdf(middle, loc, scale).mean(0) < q
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


def fit(method, python, x, y, x_new):
    """Return predictions in units of y, and the CPU seconds of the fit."""
    if method in BNNFLOW:
        begun = time.process_time()
        fitted = bf.BayesianMLPRegressor(method=BNNFLOW[method]).fit(x, y)
        return fitted.predict_dist(x_new), time.process_time() - begun
    if method == "flow":
        begun = time.process_time()
        fitted = flown(bf.BayesianMLPRegressor().fit(x, y))
        return fitted.predict_dist(x_new), time.process_time() - begun
    centre, scale = x.mean(0), x.std(0)
    scale[scale == 0] = 1.0
    rows = {
        "x": (x - centre) / scale,
        "y": (y - y.mean()) / y.std(),
        "x_new": (x_new - centre) / scale,
    }
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "rows.npz"), Path(folder, "predictions.npz")
        np.savez(given, **rows)
        program = Path(__file__).with_name("uci_rivals.py")
        command = [python, program, method, given, found]
        done = subprocess.run(command, capture_output=True, text=True)  # bars and all
        if done.returncode:
            raise RuntimeError(f"{method} failed:\n{done.stderr}")
        with np.load(found) as held:
            laws = Normals(y.mean() + y.std() * held["loc"], y.std() * held["scale"])
            return laws, float(held["seconds"])


def flown(fitted):
    """Return a fitted regressor whose draws come from a flow, refined, instead of its chains."""
    model, draws, training = fitted.model_, fitted.draws_, bf.Training(steps=FLOW_STEPS)
    flow = bf.fit_flow(model, draws, velocity="weights", training=training, progress=False)
    raw = bf.sample(model, flow, draws=FLOW_DRAWS, progress=False)
    fitted.draws_ = bf.refine(model, raw, REFINED, progress=False)
    return fitted


def run(task):
    """Return the row of one fit."""
    folder, name, split, method, python = task
    torch.set_num_threads(1)
    x, y, test = load(folder, name, split)
    training = np.setdiff1d(np.arange(len(y)), test)
    pred, seconds = fit(method, python, x[training], y[training], x[test])
    mean, (low, high) = np.asarray(pred.mean), map(np.asarray, pred.interval(LEVEL))
    inside = (y[test] >= low) & (y[test] <= high)
    scores = {
        "nll": -float(np.mean(np.asarray(pred.log_prob(y[test])))),
        "rmse": float(np.sqrt(np.mean((mean - y[test]) ** 2))),
        "coverage": float(inside.mean()),
        "width": float((high - low).mean()),
        "cpu_seconds": seconds,
    }
    return {"set": name, "split": split, "method": method} | {
        key: f"{value:.6g}" for key, value in scores.items()
    }


def fits(tasks, jobs):
    """Yield rows as they come, from so many processes."""
    if jobs == 1:
        yield from map(run, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(run, tasks)


def load(folder, name, split):
    with np.load(Path(folder, f"{name}.npz")) as held:
        if f"test_{split}" not in held:
            raise SystemExit(f"{name} has no split {split}")
        return (
            held["X"].astype(float),
            held["y"].astype(float).ravel(),
            held[f"test_{split}"],
        )


def read(path):
    """Return the rows of a CSV, without those that a kill cut: too short, too long, or with no end
    of line, where the last number may be half of one.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    rows = csv.DictReader(lines)
    return [row for row in rows if None not in row and None not in row.values()]


def add(path, row):
    """Put a row at the end of the file: several runs may write to it."""
    before = path.read_bytes() if path.exists() else b""
    whole = b"\n" in before  # else a kill cut the header
    with path.open("a" if whole else "w", newline="") as file:
        if whole and not before.endswith(b"\n"):  # a row that a kill cut is made too long
            file.write("," * len(FIELDS) + "\r\n")
        writer = csv.DictWriter(file, FIELDS)
        if not whole:
            writer.writeheader()
        writer.writerow(row)


def python_of(method, folder):
    """Return the Python that runs a method; its environment is made if it is not there."""
    if not RIVALS.get(method):
        return sys.executable
    home = folder / method
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        print(f"making {home}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *RIVALS[method]], check=True)
    return python


def table(rows, full):
    """Print means over splits with standard errors, and paired differences to bnnflow."""
    for name in dict.fromkeys(row["set"] for row in rows):
        if full and name in PUBLISHED:
            best, ensembles = PUBLISHED[name]
            print(
                f"\npublished NLL: {best:.2f} at best, {ensembles:.2f} by ensembles of five"
            )
        print(
            f"{name:9} splits {'NLL':>15} {'RMSE':>17} in {LEVEL:.0%} {'width':>8} {'CPU s':>7}"
            "   NLL beside bnnflow"
        )
        ours = column(rows, name, "bnnflow", "nll")
        for method in (m for m in METHODS if column(rows, name, m, "nll")):
            nll, rmse, inside, width, seconds = (
                np.array(list(column(rows, name, method, key).values()))
                for key in ("nll", "rmse", "coverage", "width", "cpu_seconds")
            )
            print(
                f"{method:9} {len(nll):6} {nll.mean():7.3f} ({error(nll):.3f})"
                f" {rmse.mean():8.4g} ({error(rmse):.4f}) {inside.mean():6.1%} {width.mean():8.4g}"
                f" {seconds.mean():7.1f}   {paired(column(rows, name, method, 'nll'), ours)}"
            )


def column(rows, name, method, key):
    """Return one score of one method by split."""
    chosen = [row for row in rows if row["set"] == name and row["method"] == method]
    return {int(row["split"]): float(row[key]) for row in chosen}


def error(values):
    return values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan


def paired(theirs, ours):
    """Return the mean difference over the splits that both have, and its t value."""
    gaps = np.array(
        [theirs[split] - ours[split] for split in sorted(theirs.keys() & ours.keys())]
    )
    if not len(gaps) or not gaps.any():
        return ""
    return f"{gaps.mean():+.3f}, t = {gaps.mean() / error(gaps):.1f}"


def names(text):
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME.npz")
    parser.add_argument("--sets", type=names, help="yacht,boston, or with --full all nine")
    parser.add_argument("--splits", type=names, default=["0", "1"])
    parser.add_argument("--full", action="store_true", help="all sets: hours")
    parser.add_argument("--methods", type=names, default=["bnnflow", "ensemble", "laplace"])
    parser.add_argument(
        "--jobs", type=int, default=1, help="fits at a time, of one thread each"
    )
    parser.add_argument("--out", type=Path, default=Path("out/uci.csv"))
    parser.add_argument("--bde-python", type=Path, help="of an environment that has bde")
    given = parser.parse_args()
    if unknown := set(given.methods) - set(METHODS):
        parser.error(f"unknown methods {sorted(unknown)}, choose from {', '.join(METHODS)}")
    given.sets = given.sets or (list(PUBLISHED) if given.full else ["yacht", "boston"])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    pythons = {"bde": given.bde_python} if given.bde_python else {}
    for method in set(given.methods) - set(pythons):
        pythons[method] = python_of(method, given.out.parent.resolve())

    rows = read(given.out)
    done = {(row["set"], row["split"], row["method"]) for row in rows}
    tasks = []
    for name in given.sets:
        for split in given.splits:
            count = len(load(given.data, name, split)[1])
            for method in given.methods:
                if method == "gp" and count > MOST_GP:
                    print(f"{name}: {count} rows are too many for a Gaussian process")
                elif (name, split, method) not in done:
                    tasks.append((given.data, name, split, method, pythons[method]))
    for row in fits(tasks, given.jobs):
        rows.append(row)
        add(given.out, row)
        print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    table(rows, given.full)


if __name__ == "__main__":
    main()
