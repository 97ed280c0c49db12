"""May these draws be used, and what for? The verdict, and how chains are compared."""

from bnnflow.diagnosis.answers import Answer, Diagnosis, Finding
from bnnflow.diagnosis.convergence import WeightConvergence, weight_convergence
from bnnflow.diagnosis.diagnose import diagnose

__all__ = [
    "Answer",
    "Diagnosis",
    "Finding",
    "WeightConvergence",
    "diagnose",
    "weight_convergence",
]
