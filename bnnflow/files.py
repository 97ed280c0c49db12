"""`load`: read back whatever bnnflow saved."""

from __future__ import annotations

from pathlib import Path

from bnnflow import storage
from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.transport import Flow

__all__ = ["load"]


def load(path: str | Path, model: BayesianModel | None = None) -> Draws | Flow:
    """Read draws or a flow from a file that ``save`` wrote.

    Args:
        path: the file.
        model: binds a likelihood-informed flow.

    Raises:
        ValueError: if the file is not bnnflow's, is newer than this version, or is an informed flow without a model.
    """
    header, arrays = storage.read(path, {"draws": 1, "flow": 1})
    if header["kind"] == "draws":
        return Draws.from_file(header, arrays)
    return Flow.from_file(header, arrays, model)
