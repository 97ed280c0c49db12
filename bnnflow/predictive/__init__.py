"""The Bayesian model average, and how to score it."""

from bnnflow.predictive import metrics
from bnnflow.predictive.average import Calibrated, Prediction, predict
from bnnflow.predictive.calibrated import calibrate
from bnnflow.predictive.checks import (
    PredictiveCheck,
    calibration_check,
    predictive_check,
    prior_p_value,
)
from bnnflow.predictive.stacked import Stacked, stacked

__all__ = [
    "Calibrated",
    "Prediction",
    "PredictiveCheck",
    "Stacked",
    "calibrate",
    "calibration_check",
    "metrics",
    "predict",
    "predictive_check",
    "prior_p_value",
    "stacked",
]
