"""What files of transports have in common: checks of what they say, and the rows that a field looks
at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnflow.model import BayesianModel
from bnnflow.transport.field import Field
from bnnflow.transport.options import Solver
from bnnflow.weights import WeightSpec

__all__ = [
    "ROWS",
    "check_weights",
    "dtype_of",
    "rows_looked_at",
    "rows_to_look_at",
    "solver_of",
    "stored_solver",
]

ROWS = "context/rows"
"""The array of the rows of data that a field looks at, where these are not all."""


def check_weights(spec: WeightSpec, model: BayesianModel | None) -> None:
    """Raise ``ValueError`` if there is a model and its weights are not those of a file."""
    if model is not None and (model.spec.names, model.spec.shapes) != (
        spec.names,
        spec.shapes,
    ):
        raise ValueError(
            f"these are not the model's weights: names, shapes or order differ ({spec.dim} in the "
            f"file, {model.dim} in "
            "the model)"
        )


def rows_looked_at(velocity: Field) -> dict[str, np.ndarray]:
    """Return the rows of data that a field looks at, nothing where it looks at all of them or at
    none.
    """
    if velocity.posterior is None or velocity.posterior.rows is None:
        return {}
    return {ROWS: velocity.posterior.rows.cpu().numpy()}


def rows_to_look_at(
    arrays: Mapping[str, np.ndarray], model: BayesianModel
) -> Tensor | None:
    """Return the rows of data that the field of a file looks at, None for all.

    Raises:
        ValueError: if they are no rows of the model's data.
    """
    if ROWS not in arrays:
        return None
    rows, n = torch.from_numpy(arrays[ROWS]), len(model.x)
    if (
        rows.dtype != torch.int64
        or rows.dim() != 1
        or not bool(((rows >= 0) & (rows < n)).all())
    ):
        raise ValueError(f"its field looks at rows that are none of the model's {n}")
    return rows.to(model.device)


def dtype_of(name: Any) -> torch.dtype:
    """Return the floating-point type of that name."""
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{name!r} is no floating-point type")
    return found


def stored_solver(solver: Solver) -> dict[str, Any]:
    """Return what a file says of a solver; of its tolerances, where it has a use for them."""
    steps = solver.steps if isinstance(solver.steps, int) else list(solver.steps)
    said = {"solver": solver.rule, "steps": steps}
    adaptive = solver.evaluations is None
    return said | {"rtol": solver.rtol, "atol": solver.atol} if adaptive else said


def solver_of(header: Mapping[str, Any]) -> Solver:
    """Return the solver of a file.

    Raises:
        ValueError: if no flow is solved like that.
    """
    steps = header["steps"]
    if (steps if isinstance(steps, int) else len(steps)) > _STEPS:
        raise ValueError(f"no flow is solved in more than {_STEPS:,} steps")
    tolerances = {name: header[name] for name in ("rtol", "atol") if name in header}
    return Solver(header["solver"], steps, **tolerances)


_STEPS = 10**6
