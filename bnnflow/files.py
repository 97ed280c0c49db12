"""`load`: read back whatever bnnflow saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bnnflow import storage
from bnnflow.arguments import checked
from bnnflow.draws import Draws
from bnnflow.equivariant import INRs
from bnnflow.inference import checkpoint
from bnnflow.model import BayesianModel
from bnnflow.transport import (
    CompletedFlow,
    Correction,
    Flow,
    FlowMap,
    ManifoldFlow,
    TransformedDensity,
)

if TYPE_CHECKING:
    from bnnflow.estimators.base import BayesianEstimator

__all__ = ["load"]

Saved = Draws | INRs | Flow | FlowMap | ManifoldFlow | CompletedFlow | TransformedDensity

_VERSIONS = {
    "estimator": 1,
    "draws": 1,
    "inrs": 1,
    "flow": 2,
    "flow-map": 1,
    "manifold-flow": 1,
    "completed-flow": 1,
    "in-coordinates": 1,
}
_WITH_MODEL = {
    "flow": Flow,
    "flow-map": FlowMap,
    "manifold-flow": ManifoldFlow,
    "completed-flow": CompletedFlow,
    "in-coordinates": TransformedDensity,
}


@checked
def load(path: str | Path, model: BayesianModel | None = None) -> Saved | BayesianEstimator:
    """Read what ``save`` wrote (an estimator, draws, INRs, a flow, a density), or the draws of a
    run from its checkpoint folder.

    Args:
        path: the file, or the folder given to ``sample(..., checkpoint=...)``; the run may be going
            on, or be dead.
        model: binds a likelihood-informed flow; draws, other flows and densities are checked
            against it if given.

    Raises:
        ValueError: naming the file, if it is not bnnflow's, is damaged, is newer than this version,
            needs a model or does not fit the one that is given; if a folder holds no draws, or none
            that are intact.
    """
    if Path(path).is_dir():
        draws = checkpoint.load(path)
        if model is not None:
            model.check_draws(draws)
        return draws
    header, arrays = storage.read(path, _VERSIONS)
    kind = header["kind"]
    with storage.described(storage.found(path)):
        if kind == "estimator":
            from bnnflow.estimators import storage as estimators  # loads scikit-learn

            return estimators.load(header, arrays)
        if kind == "inrs":
            return INRs.from_file(header, arrays)
        if kind != "draws":
            return _WITH_MODEL[kind].from_file(header, arrays, model)
        draws = (Correction if "correction" in header["info"] else Draws).from_file(
            header, arrays
        )
        if model is not None:
            model.check_draws(draws)
        return draws
