"""The Bayesian model average, and how to score it."""

from bnnflow.predictive import metrics
from bnnflow.predictive.average import Prediction, predict

__all__ = ["Prediction", "metrics", "predict"]
