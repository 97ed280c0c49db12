"""Estimators for tables of data, as scikit-learn's: the whole street behind ``fit`` and
``predict``.
"""

from bnnflow.estimators.classifier import BayesianMLPClassifier
from bnnflow.estimators.regressor import BayesianMLPRegressor

__all__ = ["BayesianMLPClassifier", "BayesianMLPRegressor"]
