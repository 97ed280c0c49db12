"""`load`: read back whatever bnnflow saved."""

from __future__ import annotations

from pathlib import Path

from bnnflow import storage
from bnnflow.draws import Draws
from bnnflow.equivariant import INRs
from bnnflow.inference import checkpoint
from bnnflow.model import BayesianModel
from bnnflow.transport import Flow, FlowMap

__all__ = ["load"]


def load(path: str | Path, model: BayesianModel | None = None) -> Draws | Flow | FlowMap | INRs:
    """Read what ``save`` wrote (draws, a flow, a flow map, INRs), or the draws of a run from its checkpoint folder.

    Args:
        path: the file, or the folder given to ``sample(..., checkpoint=...)``; the run may be going on, or be dead.
        model: binds a likelihood-informed flow.

    Raises:
        ValueError: if the file is not bnnflow's, is newer than this version, or is an informed flow without a model;
            if a folder holds no draws.
    """
    if Path(path).is_dir():
        return checkpoint.load(path)
    header, arrays = storage.read(path, {"draws": 1, "flow": 2, "flow-map": 1, "inrs": 1})
    if header["kind"] == "draws":
        return Draws.from_file(header, arrays)
    if header["kind"] == "inrs":
        return INRs.from_file(header, arrays)
    if header["kind"] == "flow-map":
        return FlowMap.from_file(header, arrays, model)
    return Flow.from_file(header, arrays, model)
