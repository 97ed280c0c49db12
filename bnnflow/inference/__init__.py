"""Samplers and approximations: everything that turns a model into draws."""

from bnnflow.inference.adjusted_mclmc import AdjustedMCLMC
from bnnflow.inference.dropout import MCDropout
from bnnflow.inference.ensemble import DeepEnsemble
from bnnflow.inference.flow_vi import NormalizingFlowVI
from bnnflow.inference.hmc import HMC
from bnnflow.inference.laplace import Laplace
from bnnflow.inference.mclmc import MCLMC
from bnnflow.inference.pyro_nuts import PyroNUTS
from bnnflow.inference.run import Method, Run
from bnnflow.inference.sampling import sample
from bnnflow.inference.schedules import Constant, Cyclical, Polynomial
from bnnflow.inference.sghmc import SGHMC
from bnnflow.inference.sgld import SGLD
from bnnflow.inference.sgnht import SGNHT
from bnnflow.inference.smc import SMC
from bnnflow.inference.swag import SWAG
from bnnflow.inference.vi import VI

__all__ = [
    "HMC",
    "MCLMC",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "SMC",
    "SWAG",
    "VI",
    "AdjustedMCLMC",
    "Constant",
    "Cyclical",
    "DeepEnsemble",
    "Laplace",
    "MCDropout",
    "Method",
    "NormalizingFlowVI",
    "Polynomial",
    "PyroNUTS",
    "Run",
    "sample",
]
