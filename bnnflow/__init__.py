"""bnnflow: posteriors of neural networks, sampled, aligned, transported and reported."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnnflow import data, equivariant, inference, model, predictive, symmetry, transport
    from bnnflow.comparison import compare, mix_priors
    from bnnflow.diagnosis import diagnose, weight_convergence
    from bnnflow.draws import Draws
    from bnnflow.estimators import BayesianMLPClassifier, BayesianMLPRegressor
    from bnnflow.files import load
    from bnnflow.gaussian import Gaussian
    from bnnflow.inference import (
        HMC,
        MCLMC,
        SGHMC,
        SGLD,
        SGNHT,
        SMC,
        SWAG,
        VI,
        AdjustedMCLMC,
        DeepEnsemble,
        Laplace,
        MCDropout,
        NormalizingFlowVI,
        ParallelTempering,
        PriorBank,
        PyroNUTS,
        evidence,
        refine,
        sample,
        update,
    )
    from bnnflow.model import BayesianModel, likelihoods, priors
    from bnnflow.options import Checkpoint, Training
    from bnnflow.predictive import metrics, predict
    from bnnflow.report import report, summary, to_arviz
    from bnnflow.symmetry import align
    from bnnflow.transport import (
        Flow,
        GaussNewtonFlow,
        correct,
        fit_amortised,
        fit_flow,
        fit_prior,
    )
    from bnnflow.weights import WeightSpec

__version__ = "0.1.0"

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
    "BayesianMLPClassifier",
    "BayesianMLPRegressor",
    "BayesianModel",
    "Checkpoint",
    "DeepEnsemble",
    "Draws",
    "Flow",
    "GaussNewtonFlow",
    "Gaussian",
    "Laplace",
    "MCDropout",
    "NormalizingFlowVI",
    "ParallelTempering",
    "PriorBank",
    "PyroNUTS",
    "Training",
    "WeightSpec",
    "__version__",
    "align",
    "compare",
    "correct",
    "data",
    "diagnose",
    "equivariant",
    "evidence",
    "fit_amortised",
    "fit_flow",
    "fit_prior",
    "inference",
    "likelihoods",
    "load",
    "metrics",
    "mix_priors",
    "model",
    "predict",
    "predictive",
    "priors",
    "refine",
    "report",
    "sample",
    "summary",
    "symmetry",
    "to_arviz",
    "transport",
    "update",
    "weight_convergence",
]

# Where each name lives. They are imported on first use (PEP 562): a script pays only for the
# packages it enters.
_HOMES = {
    "comparison": ("compare", "mix_priors"),
    "diagnosis": ("diagnose", "weight_convergence"),
    "draws": ("Draws",),
    "estimators": ("BayesianMLPClassifier", "BayesianMLPRegressor"),
    "files": ("load",),
    "gaussian": ("Gaussian",),
    "inference": (
        "HMC",
        "MCLMC",
        "SGHMC",
        "SGLD",
        "SGNHT",
        "SMC",
        "SWAG",
        "VI",
        "AdjustedMCLMC",
        "DeepEnsemble",
        "Laplace",
        "MCDropout",
        "NormalizingFlowVI",
        "ParallelTempering",
        "PriorBank",
        "PyroNUTS",
        "evidence",
        "refine",
        "sample",
        "update",
    ),
    "model": ("BayesianModel", "likelihoods", "priors"),
    "options": ("Checkpoint", "Training"),
    "predictive": ("metrics", "predict"),
    "report": ("summary", "to_arviz"),
    "symmetry": ("align",),
    "transport": (
        "Flow",
        "GaussNewtonFlow",
        "correct",
        "fit_amortised",
        "fit_flow",
        "fit_prior",
    ),
    "weights": ("WeightSpec",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"bnnflow.{home}"), name)
    if name in __all__:  # a package; `report` is one that can be called
        return import_module(f"bnnflow.{name}")
    raise AttributeError(f"module 'bnnflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
