"""What a person reads: the verdict in the terminal, the HTML report, the plots, the ArviZ export."""

from bnnflow.report import plots
from bnnflow.report.arviz import to_arviz
from bnnflow.report.diagnose import Diagnosis, diagnose
from bnnflow.report.html import Report, report

__all__ = ["Diagnosis", "Report", "diagnose", "plots", "report", "to_arviz"]
