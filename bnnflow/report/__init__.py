"""What a person reads: the verdict in the terminal, the HTML report, the plots, the ArviZ
export.
"""

import sys
import types
from typing import Any

from bnnflow.diagnosis import Diagnosis, WeightConvergence, diagnose, weight_convergence
from bnnflow.report import plots
from bnnflow.report.arviz import summary, to_arviz
from bnnflow.report.html import Report, report

__all__ = [
    "Diagnosis",
    "Report",
    "WeightConvergence",
    "diagnose",
    "plots",
    "report",
    "summary",
    "to_arviz",
    "weight_convergence",
]


class _CallableModule(types.ModuleType):
    """``bnnflow.report(...)`` makes a report, ``bnnflow.report.plots`` is a module: one name serves
    both.
    """

    def __call__(self, *args: Any, **options: Any) -> Report:
        return report(*args, **options)


sys.modules[__name__].__class__ = _CallableModule
