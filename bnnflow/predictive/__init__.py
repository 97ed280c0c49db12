"""The Bayesian model average, and how to score it."""

from bnnflow.predictive import metrics
from bnnflow.predictive.average import Calibrated, Prediction, predict
from bnnflow.predictive.calibrated import calibrate
from bnnflow.predictive.stacked import Stacked, stacked

__all__ = [
    "Calibrated",
    "Prediction",
    "Stacked",
    "calibrate",
    "metrics",
    "predict",
    "stacked",
]
