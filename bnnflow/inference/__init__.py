"""Samplers and approximations: everything that turns a model into draws."""

from bnnflow.inference.ensemble import DeepEnsemble
from bnnflow.inference.hmc import HMC
from bnnflow.inference.sampling import Method, sample
from bnnflow.inference.vi import VI

__all__ = ["HMC", "VI", "DeepEnsemble", "Method", "sample"]
