"""The flow-matching transport from prior to posterior."""

from bnnflow.options import Checkpoint, Training
from bnnflow.transport.amortised import fit_amortised
from bnnflow.transport.amortised_velocity import AmortisedVelocity
from bnnflow.transport.baselines import (
    TransformedDensity,
    fit_cnf,
    fit_coupling,
    fit_gaussian,
)
from bnnflow.transport.batches import Reuse
from bnnflow.transport.bootstrap import fit_flow_without_draws
from bnnflow.transport.correction.correct import Correction, correct
from bnnflow.transport.couplings import Independent, Matched, MiniBatchOT, SinkhornOT
from bnnflow.transport.distillation import FlowMap, distil
from bnnflow.transport.field import Field
from bnnflow.transport.fitting import fit_flow
from bnnflow.transport.flow import Flow, GaussNewtonFlow
from bnnflow.transport.geometry import RiemannianPath, TangentVelocity
from bnnflow.transport.guidance import GuidedVelocity
from bnnflow.transport.learned_prior import fit_prior
from bnnflow.transport.manifold import CompletedFlow, ManifoldFlow, Radii, fit_manifold_flow
from bnnflow.transport.options import Density, Matching, Solver
from bnnflow.transport.paths import AffinePath, ProbabilityPath
from bnnflow.transport.proximal_step import GaussNewton, GradientSteps
from bnnflow.transport.pushforward import Pushforward
from bnnflow.transport.sharpening import sharpen
from bnnflow.transport.solvers import (
    integrate,
    integrate_sde,
    integrate_with_error,
    largest_chunk,
    time_grid,
)
from bnnflow.transport.source import Source
from bnnflow.transport.targets import PosteriorTargets
from bnnflow.transport.times import Beta, LogitNormal, LogUniformNearEnd, Uniform
from bnnflow.transport.training import train
from bnnflow.transport.two_layer import TwoLayerVelocity
from bnnflow.transport.velocity import (
    GaussianVelocity,
    InformedVelocity,
    ResidualVelocity,
    ScoreVelocity,
    WeightsVelocity,
)

__all__ = [
    "AffinePath",
    "AmortisedVelocity",
    "Beta",
    "Checkpoint",
    "CompletedFlow",
    "Correction",
    "Density",
    "Field",
    "Flow",
    "FlowMap",
    "GaussNewton",
    "GaussNewtonFlow",
    "GaussianVelocity",
    "GradientSteps",
    "GuidedVelocity",
    "Independent",
    "InformedVelocity",
    "LogUniformNearEnd",
    "LogitNormal",
    "ManifoldFlow",
    "Matched",
    "Matching",
    "MiniBatchOT",
    "PosteriorTargets",
    "ProbabilityPath",
    "Pushforward",
    "Radii",
    "ResidualVelocity",
    "Reuse",
    "RiemannianPath",
    "ScoreVelocity",
    "SinkhornOT",
    "Solver",
    "Source",
    "TangentVelocity",
    "Training",
    "TransformedDensity",
    "TwoLayerVelocity",
    "Uniform",
    "WeightsVelocity",
    "correct",
    "distil",
    "fit_amortised",
    "fit_cnf",
    "fit_coupling",
    "fit_flow",
    "fit_flow_without_draws",
    "fit_gaussian",
    "fit_manifold_flow",
    "fit_prior",
    "integrate",
    "integrate_sde",
    "integrate_with_error",
    "largest_chunk",
    "sharpen",
    "time_grid",
    "train",
]
