"""Classes at the defaults of the classifier beside scikit-learn's at their best: NLL, calibration
and CPU seconds on four tables.

Ten stratified splits, a fifth held out, by seed. Logistic regression with its penalty
cross-validated by the log score, a random forest of 500 trees, and a Gaussian process whose kernel
maximises its evidence; inputs standardised. ``p`` is that of a paired t-test over the splits. ECE
in ten bins over the held-out rows of all splits together; beside it what a calibrated classifier of
the same confidences would have, mean and 95% point of 1,000 draws. One thread. Run:
``python tests/benchmarks/bench_classes.py [--sets iris,wine] [--splits 10] [--rivals ...]``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import ttest_rel
from sklearn import datasets
from sklearn.ensemble import RandomForestClassifier
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bnnflow as bf

SETS: dict[str, Callable[..., Any]] = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
}
BINS = 10


def logistic(columns: int) -> Any:
    """Return a logistic regression, its penalty chosen by the log score."""
    model = LogisticRegressionCV(scoring="neg_log_loss", max_iter=5000)
    return make_pipeline(StandardScaler(), model)


def forest(columns: int) -> Any:
    """Return a forest of 500 trees."""
    return RandomForestClassifier(500, random_state=0)


def process(columns: int) -> Any:
    """Return a Gaussian process, whose kernel is found by its evidence."""
    kernel = ConstantKernel(10.0) * RBF(columns**0.5)
    return make_pipeline(
        StandardScaler(), GaussianProcessClassifier(kernel, random_state=0)
    )


METHODS = {
    "bnnflow": lambda columns: bf.BayesianMLPClassifier(),
    "logistic": logistic,
    "forest": forest,
    "gp": process,
}


def ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error of the predicted class."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidence - right, BINS)
    return float(np.abs(gaps).sum() / len(right))


def by_chance(confidence: np.ndarray) -> tuple[float, float]:
    """Return the mean and the 95% point of the ECE of a calibrated classifier."""
    rng = np.random.default_rng(0)
    found = [ece(confidence, rng.random(len(confidence)) < confidence) for _ in range(1000)]
    return float(np.mean(found)), float(np.quantile(found, 0.95))


def measured(name: str, methods: list[str], splits: int) -> None:
    """Print a line for each method on one set."""
    x, y = SETS[name](return_X_y=True)
    scores: dict[str, list[float]] = {}
    for method in methods:
        nll, confidence, right, seconds = [], [], [], []
        parts = StratifiedShuffleSplit(splits, test_size=0.2, random_state=0).split(x, y)
        for training, test in parts:
            begun = time.process_time()
            fitted = METHODS[method](x.shape[1]).fit(x[training], y[training])
            seconds.append(time.process_time() - begun)
            p = fitted.predict_proba(x[test])
            nll.append(float(-np.log(p[np.arange(len(test)), y[test]].clip(1e-15)).mean()))
            confidence.append(p.max(1))
            right.append(p.argmax(1) == y[test])
        scores[method] = nll
        sure, correct = np.concatenate(confidence), np.concatenate(right)
        mean, most = by_chance(sure)
        ours = scores["bnnflow"]
        p_value = "" if method == "bnnflow" else f"{ttest_rel(ours, nll).pvalue:8.3f}"
        print(
            f"{name:<14}{method:<10}{np.mean(nll):8.3f} ({np.std(nll) / splits**0.5:.3f})"
            f"{np.mean(correct):8.1%}{ece(sure, correct):8.3f} ({mean:.3f}, {most:.3f})"
            f"{np.mean(seconds):8.1f}{p_value}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--rivals", default="logistic,forest,gp")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        "set           method         NLL        right     ECE (by chance)    CPU s       p"
    )
    for each in given.sets.split(","):
        measured(each, ["bnnflow", *given.rivals.split(",")], given.splits)
