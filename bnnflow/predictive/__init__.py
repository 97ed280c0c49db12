"""The Bayesian model average, and how to score it."""

from bnnflow.predictive import metrics
from bnnflow.predictive.average import Prediction, predict
from bnnflow.predictive.stacked import Stacked, stacked

__all__ = ["Prediction", "Stacked", "metrics", "predict", "stacked"]
