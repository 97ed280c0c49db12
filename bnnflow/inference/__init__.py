"""Samplers and approximations: everything that turns a model into draws.

`sample` is the entry point to all methods, each of which has a module of its own. Exact: `HMC`,
`AdjustedMCLMC`, `ParallelTempering`, `PyroNUTS`, and `SMC` as its particles grow in number. With a
bias that is set: `MCLMC`, and on mini-batches `SGLD`, `SGHMC` and `SGNHT`, whose step sizes may
follow `Constant`, `Polynomial` or `Cyclical`. Fitted: `VI`, `NormalizingFlowVI`, `Laplace`, `SWAG`.
To compare with: `DeepEnsemble`, `MCDropout`. `evidence` is that of draws of any of the exact ones,
`update` carries draws to a neighbouring posterior, and a `PriorBank` to that of any data set.

`Method` is what a method of one's own must be, and `Run` what it is told. Kernels (`hmc.hmc`,
`mclmc.mclmc`, ...) and their warm-up (`trajectories.trajectory_warm_up`, `loop.warm_up`) work on
any density; `loop.run_chains` gives a kernel checkpoints, interrupts and processes.
"""

from bnnflow.inference.approximate.dropout import MCDropout
from bnnflow.inference.approximate.ensemble import DeepEnsemble
from bnnflow.inference.approximate.flow_vi import NormalizingFlowVI
from bnnflow.inference.approximate.laplace import Laplace
from bnnflow.inference.approximate.swag import SWAG
from bnnflow.inference.approximate.vi import VI
from bnnflow.inference.mcmc.adjusted_mclmc import AdjustedMCLMC
from bnnflow.inference.mcmc.hmc import HMC
from bnnflow.inference.mcmc.mclmc import MCLMC
from bnnflow.inference.mcmc.parallel_tempering import ParallelTempering
from bnnflow.inference.mcmc.pyro_nuts import PyroNUTS
from bnnflow.inference.particles.bank import PriorBank
from bnnflow.inference.particles.evidence import evidence
from bnnflow.inference.particles.refine import refine
from bnnflow.inference.particles.smc import SMC
from bnnflow.inference.particles.update import update
from bnnflow.inference.sampling import sample
from bnnflow.inference.stochastic.schedules import Constant, Cyclical, Polynomial
from bnnflow.inference.stochastic.sghmc import SGHMC
from bnnflow.inference.stochastic.sgld import SGLD
from bnnflow.inference.stochastic.sgnht import SGNHT
from bnnflow.method import Method, Run

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
    "ParallelTempering",
    "Polynomial",
    "PriorBank",
    "PyroNUTS",
    "Run",
    "evidence",
    "refine",
    "sample",
    "update",
]
