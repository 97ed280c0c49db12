"""The flow-matching transport from prior to posterior."""

from bnnflow.options import Checkpoint, Training
from bnnflow.transport.baselines import InCoordinates, fit_cnf, fit_coupling, fit_gaussian
from bnnflow.transport.batches import Reuse
from bnnflow.transport.bootstrap import fit_flow_without_draws
from bnnflow.transport.correct import Correction, correct, refine
from bnnflow.transport.couplings import Independent, Matched, MiniBatchOT, SinkhornOT
from bnnflow.transport.displacement import GaussNewton, GradientSteps
from bnnflow.transport.distillation import FlowMap, distil
from bnnflow.transport.field import Field
from bnnflow.transport.fitting import fit_flow
from bnnflow.transport.flow import Flow, GaussNewtonFlow
from bnnflow.transport.geometry import RiemannianPath, TangentVelocity
from bnnflow.transport.guidance import GuidedVelocity
from bnnflow.transport.manifold import CompletedFlow, ManifoldFlow, Radii, fit_manifold_flow
from bnnflow.transport.options import Density, Matching, Solver
from bnnflow.transport.paths import AffinePath, ProbabilityPath
from bnnflow.transport.solvers import integrate, integrate_sde, integrate_with_error, rows_within, time_grid
from bnnflow.transport.source import Source
from bnnflow.transport.targets import InformedPath
from bnnflow.transport.times import Beta, LogitNormal, TowardsEnd, Uniform
from bnnflow.transport.training import train
from bnnflow.transport.two_layer import TwoLayerVelocity
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
    "Checkpoint",
    "CompletedFlow",
    "Correction",
    "Density",
    "DriveVelocity",
    "Field",
    "Flow",
    "FlowMap",
    "GaussNewton",
    "GaussNewtonFlow",
    "GaussianVelocity",
    "GradientSteps",
    "GuidedVelocity",
    "InCoordinates",
    "Independent",
    "InformedPath",
    "InformedVelocity",
    "LogitNormal",
    "ManifoldFlow",
    "Matched",
    "Matching",
    "MiniBatchOT",
    "ProbabilityPath",
    "Radii",
    "ResidualVelocity",
    "Reuse",
    "RiemannianPath",
    "SinkhornOT",
    "Solver",
    "Source",
    "TangentVelocity",
    "TowardsEnd",
    "Training",
    "TwoLayerVelocity",
    "Uniform",
    "WeightsVelocity",
    "correct",
    "distil",
    "fit_cnf",
    "fit_coupling",
    "fit_flow",
    "fit_flow_without_draws",
    "fit_gaussian",
    "fit_manifold_flow",
    "integrate",
    "integrate_sde",
    "integrate_with_error",
    "refine",
    "rows_within",
    "time_grid",
    "train",
]
