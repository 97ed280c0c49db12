"""The flow-matching transport from prior to posterior."""

from bnnflow.transport.correct import Correction, correct, refine
from bnnflow.transport.couplings import Independent, Matched, MiniBatchOT, SinkhornOT
from bnnflow.transport.displacement import GaussNewton, GradientSteps
from bnnflow.transport.flow import Flow, GaussNewtonFlow
from bnnflow.transport.guidance import GuidedVelocity
from bnnflow.transport.paths import AffinePath
from bnnflow.transport.solvers import integrate, integrate_sde, integrate_with_error, rows_within, time_grid
from bnnflow.transport.source import Source
from bnnflow.transport.times import Beta, LogitNormal, TowardsEnd, Uniform
from bnnflow.transport.training import fit_flow, train
from bnnflow.transport.velocity import (
    DriveVelocity,
    GaussianVelocity,
    InformedVelocity,
    ResidualVelocity,
    WeightsVelocity,
)

__all__ = [
    "AffinePath",
    "Beta",
    "Correction",
    "DriveVelocity",
    "Flow",
    "GaussNewton",
    "GaussNewtonFlow",
    "GaussianVelocity",
    "GradientSteps",
    "GuidedVelocity",
    "Independent",
    "InformedVelocity",
    "LogitNormal",
    "Matched",
    "MiniBatchOT",
    "ResidualVelocity",
    "SinkhornOT",
    "Source",
    "TowardsEnd",
    "Uniform",
    "WeightsVelocity",
    "correct",
    "fit_flow",
    "integrate",
    "integrate_sde",
    "integrate_with_error",
    "refine",
    "rows_within",
    "time_grid",
    "train",
]
