"""Draws as ArviZ data: the groups are xarray data sets, and only the last step depends on ArviZ's
version.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnnflow.arguments import checked
from bnnflow.diagnostics import import_arviz, is_datatree
from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.predictive import predict
from bnnflow.weights import WeightSpec

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["function_values", "to_arviz"]

_SAMPLE = ("chain", "draw")


@checked
def to_arviz(
    model: BayesianModel,
    draws: Draws,
    x: Tensor | np.ndarray | None = None,
    y: Tensor | np.ndarray | None = None,
) -> Any:
    """Convert draws for ArviZ.

    Groups: ``posterior`` (one variable a tensor, its axes named by hidden layer: ``h1``),
    ``sample_stats`` (``lp`` and the sampler's statistics), ``predictions`` (``mean``, what each
    draw predicts at x), ``log_likelihood`` and ``observed_data`` (``y``, row by row),
    ``constant_data`` (``x``).

    ArviZ takes all draws of a posterior to count alike. Weighted draws are therefore resampled in
    proportion to their weights, without chance and in their order, so that copies stand side by
    side and effective sample sizes see them; the draws as they were, with their ``lp`` and
    ``log_weight``, are in a further group, ``weighted_posterior``.

    Args:
        model: their model.
        draws: the draws.
        x: inputs of ``predictions`` and ``log_likelihood``; the training inputs if None, which is
            what ``az.loo`` wants.
        y: targets at x. With x but without y the groups that need y are left out.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

    Raises:
        ValueError: if x or y does not fit, or y is given without x.
    """
    if x is None and y is not None:
        raise ValueError("y needs its x; leave both out for the training data")
    model.spec.check(draws.theta)
    model.check_draws(draws)
    inputs = model.inputs(x)
    has_targets = x is None or y is not None
    targets = model.targets(y) if has_targets else None
    if targets is not None and len(targets) != len(inputs):
        raise ValueError(
            f"y must have a value for each of the {len(inputs)} rows of x, got {len(targets)}"
        )
    weighted = draws if draws.log_weights is not None else None
    draws = _equally_weighted(draws)
    groups = {
        "posterior": _posterior(draws, model.spec),
        "sample_stats": _sample_stats(draws),
        "predictions": _dataset(
            {"mean": (function_values(model, draws, inputs), ("row", "output"))}
        ),
        "constant_data": _dataset(
            {"x": (_numpy(inputs), _names("row", "x", inputs.dim()))}, sampled=False
        ),
    }
    if targets is not None:
        values = _log_likelihood(draws, model, inputs, targets)
        groups["log_likelihood"] = _dataset({"y": (values, ("row",))})
        groups["observed_data"] = _dataset(
            {"y": (_numpy(targets), _names("row", "y", targets.dim()))}, sampled=False
        )
    if weighted is not None:
        groups["weighted_posterior"] = _weighted_posterior(weighted, model.spec)
    groups["posterior"].attrs |= {
        "inference_library": "bnnflow",
        "info": json.dumps(draws.info, default=str),
    }
    return _convert(groups)


def function_values(
    model: BayesianModel, draws: Draws, x: Tensor | np.ndarray | None = None
) -> np.ndarray:
    """Return what each draw predicts, ``(chain, draw, n, targets)`` or
    ``(chain, draw, n, classes)``, float64.
    """
    model.check_draws(draws)
    values = torch.cat(
        [chunk.cpu() for chunk in predict(model, draws.theta, x).functions()]
    )
    return values.reshape(draws.n_chains, draws.n_draws, *values.shape[1:]).numpy()


def _posterior(draws: Draws, spec: WeightSpec) -> Dataset:
    variables = {}
    for name, tensor in spec.unflatten(draws.theta).items():
        axes = spec.axes[name]
        dims = tuple(
            label
            if label and size == spec.widths[label] and label not in axes[:axis]
            else f"{name}_dim_{axis}"
            for axis, (label, size) in enumerate(zip(axes, spec.shapes[name], strict=True))
        )
        variables[name] = (_numpy(tensor), dims)
    return _dataset(variables)


def _sample_stats(draws: Draws) -> Dataset:
    stats = {"lp": draws.log_joint, **draws.stats}
    return _dataset({name: (_numpy(values), ()) for name, values in stats.items()})


def _weighted_posterior(draws: Draws, spec: WeightSpec) -> Dataset:
    assert draws.log_weights is not None
    of_draws = {
        "lp": (_numpy(draws.log_joint), ()),
        "log_weight": (_numpy(draws.log_weights), ()),
    }
    return _posterior(draws, spec).merge(_dataset(of_draws))


def _equally_weighted(draws: Draws) -> Draws:
    """Return as many draws that count alike: systematic resampling at fixed points, order kept."""
    if draws.log_weights is None:
        return draws
    weights = draws.log_weights.flatten().double().softmax(0)
    points = (
        torch.arange(len(weights), dtype=torch.float64, device=weights.device) + 0.5
    ) / len(weights)
    chosen = torch.searchsorted(weights.cumsum(0), points).clamp_(max=len(weights) - 1)

    def taken(values: Tensor) -> Tensor:
        return values.flatten(0, 1)[chosen.to(values.device)].reshape(values.shape)

    stats = {name: taken(values) for name, values in draws.stats.items()}
    return replace(
        draws,
        theta=taken(draws.theta),
        log_joint=taken(draws.log_joint),
        stats=stats,
        log_weights=None,
    )


def _log_likelihood(draws: Draws, model: BayesianModel, x: Tensor, y: Tensor) -> np.ndarray:
    """Return ``(chain, draw, n)``."""
    chunks = draws.flat.split(predict(model, draws.theta, x).chunk_size)
    with torch.no_grad():
        rows = [
            model.pointwise_log_likelihood(part.to(model.device, model.dtype), x, y).cpu()
            for part in chunks
        ]
    values = torch.cat(rows).double()
    return values.reshape(draws.n_chains, draws.n_draws, -1).numpy()


def _dataset(
    variables: dict[str, tuple[np.ndarray, tuple[str, ...]]], *, sampled: bool = True
) -> Dataset:
    import xarray

    lead = _SAMPLE if sampled else ()
    data = {name: ((*lead, *dims), values) for name, (values, dims) in variables.items()}
    sizes = {
        dim: size
        for dims, values in data.values()
        for dim, size in zip(dims, values.shape, strict=True)
    }
    return xarray.Dataset(
        data, coords={dim: np.arange(size) for dim, size in sizes.items()}
    )


def _convert(groups: dict[str, Dataset]) -> Any:
    if is_datatree():
        import xarray

        return xarray.DataTree.from_dict(groups)
    return import_arviz().InferenceData(**groups)


def _names(first: str, name: str, dims: int) -> tuple[str, ...]:
    return (first, *(f"{name}_dim_{axis}" for axis in range(1, dims)))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
