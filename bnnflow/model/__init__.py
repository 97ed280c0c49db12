"""What is inferred: priors, likelihoods and the Bayesian model."""

from bnnflow.model import likelihoods, priors
from bnnflow.model.bayesian import BayesianModel

__all__ = ["BayesianModel", "likelihoods", "priors"]
