"""The command line: from a file of rows to intervals, a report and a verdict."""

from bnnflow.cli.app import app

__all__ = ["app"]
