"""The flow-matching transport from prior to posterior."""

from bnnflow.transport.correct import refine
from bnnflow.transport.couplings import Independent, Matched
from bnnflow.transport.displacement import GaussNewton, GradientSteps
from bnnflow.transport.flow import Flow
from bnnflow.transport.training import fit_flow
from bnnflow.transport.velocity import GaussianVelocity, InformedVelocity, WeightsVelocity

__all__ = [
    "Flow",
    "GaussNewton",
    "GaussianVelocity",
    "GradientSteps",
    "Independent",
    "InformedVelocity",
    "Matched",
    "WeightsVelocity",
    "fit_flow",
    "refine",
]
