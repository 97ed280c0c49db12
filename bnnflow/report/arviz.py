"""Draws as ArviZ data: the groups are xarray data sets, and only the last step depends on ArviZ's
version.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnnflow.arguments import checked
from bnnflow.diagnostics import import_arviz, is_datatree, summarised
from bnnflow.draws import Draws, counted_alike, origin
from bnnflow.model import BayesianModel
from bnnflow.predictive import predict
from bnnflow.report.axes import Axes, Variables
from bnnflow.seeding import as_generator
from bnnflow.symmetry import frechet_mean, match
from bnnflow.types import Seed

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import Dataset

__all__ = ["summary", "to_arviz"]

_MOST_PRIOR = 1000  # draws of the prior that are exported
_MATCHED = 64  # draws that a gauge is found from

_LAWS = {
    "posterior": "the posterior",
    "biased": "the posterior, up to a bias of the sampler, which has no accept step",
    "approximation": "an approximation of the posterior",
    "networks": "no posterior: trained networks",
    "unknown": "an unknown origin",
}


@checked
def to_arviz(
    model: BayesianModel,
    draws: Draws,
    x: Tensor | np.ndarray | None = None,
    y: Tensor | np.ndarray | None = None,
    *,
    aligned: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    seed: Seed = 0,
) -> Any:
    """Convert draws for ArviZ, in the groups of its schema.

    - ``posterior``: a variable for each tensor of the network and for each parameter of prior and
      likelihood (``likelihood.scale`` beside ``likelihood.log_scale``); ``sample_stats``: ``lp``
      and the sampler's statistics.
    - ``log_likelihood``, ``posterior_predictive`` and ``observed_data``: ``y`` of the rows of
      training, as ``az.loo``, ``az.plot_ppc`` and ``az.loo_pit`` want it; ``constant_data``: their
      ``x``, and ``row_weights`` where rows have weights. ``log_likelihood`` is then that of rows
      that count once: ``az.loo`` leaves out a part of a row, and `compare` all of it.
    - ``prior`` and ``prior_predictive``: the same of as many draws of the prior, 1,000 at most.
    - ``predictions``: at x, ``mean``, what each draw predicts, ``y``, drawn from it, and with
      targets ``log_prob``, their log density; ``predictions_constant_data``: ``x``, and ``y`` if it
      is given.
    - ``weighted_posterior``: of weighted draws, what was given.

    Axes are named: hidden layers (``h1``), ``input``, and ``target``, ``class`` or ``output``. With
    several targets ``log_likelihood`` is joint over them, and ``data.sel(target=...)`` is the data
    of one.

    Posteriors of networks have many copies, with units exchanged or turned around, and a marginal
    over all of them describes no unit. Weights are therefore aligned, brought into one gauge as
    `bnnflow.align` does, which changes no function.

    ArviZ takes all draws of a posterior to count alike. Weighted draws are therefore resampled in
    proportion to their weights, without chance and in their order, so that copies stand side by
    side and effective sample sizes see them.

    Attributes of ``posterior`` say what was done: ``draws_of`` (the posterior, an approximation, or
    no posterior at all), ``aligned``, ``resampled``, ``calibration`` (of class probabilities, which
    is not applied), and the method's ``info``.

    ``az.summary`` takes minutes for many weights; see `summary`.

    Args:
        model: their model.
        draws: the draws.
        x: inputs of ``predictions``; the training inputs if None.
        y: targets at x.
        aligned: bring weights into one gauge; False leaves them as they were drawn.
        coords: names along axes, such as ``{"class": ["cat", "dog"]}``. Inputs are called as the
            columns of the frame that the model was made of.
        seed: of the prior and of drawn targets.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

    Raises:
        ValueError: if x or y does not fit, y is given without x, draws are NaN or infinite or of
            another model, or coords names an axis that is not there or has another length.
    """
    if x is None and y is not None:
        raise ValueError("y needs its x; leave both out for the training data")
    axes = Axes.of(model, coords)
    given, targets = model.inputs(x), model.targets(y)
    if y is not None and len(targets) != len(given):
        raise ValueError(
            f"y must have a value for each of the {len(given)} rows of x, got {len(targets)}"
        )
    predict(model, draws)  # refuses draws that are not the model's, or not finite
    generator = as_generator(seed, model.device)
    equal = _equally_weighted(draws)
    here = _predicted(axes, equal.theta, model.x, model.y, generator)
    there = here if x is None else _predicted(axes, equal.theta, given, y, generator)
    n_prior = min(equal.n_chains * equal.n_draws, _MOST_PRIOR)
    prior = model.sample_prior(n_prior, generator)[None]
    ahead = _predicted(axes, prior, model.x, None, generator)
    posterior = axes.dataset(
        axes.weights(_gauged(model, equal) if aligned else equal.theta)
    )
    groups = {
        "posterior": posterior.assign_attrs(_attributes(model, draws, aligned)),
        "sample_stats": axes.dataset(_statistics(equal)),
        "log_likelihood": axes.dataset({"y": here["log_prob"]}),
        "posterior_predictive": axes.dataset(_only(here, "y")),
        "observed_data": axes.dataset({"y": axes.targets(model.y)}, sampled=False),
        "constant_data": axes.dataset(_constants(axes, model), sampled=False),
        "prior": axes.dataset(axes.weights(prior)),
        "prior_predictive": axes.dataset(_only(ahead, "y")),
        "predictions": axes.dataset(there if x is not None else _only(here, "mean", "y")),
    }
    if x is not None:
        new = {"x": axes.inputs(given)} | (
            {} if y is None else {"y": axes.targets(targets)}
        )
        groups["predictions_constant_data"] = axes.dataset(new, sampled=False)
    if draws.log_weights is not None:
        log_weight = {"log_weight": (draws.log_weights, ())}
        weighted = axes.weights(draws.theta) | _statistics(draws) | log_weight
        groups["weighted_posterior"] = axes.dataset(weighted)
    return _convert({name: group for name, group in groups.items() if group.data_vars})


def _constants(axes: Axes, model: BayesianModel) -> Variables:
    weights = (
        {} if model.row_weights is None else {"row_weights": (model.row_weights, ("row",))}
    )
    return {"x": axes.inputs(model.x), **weights}


@checked
def summary(model: BayesianModel, draws: Draws, *, aligned: bool = True) -> DataFrame:
    """Summarise every weight: what ``az.summary`` of `to_arviz` says, in a small part of the time.

    Weighted draws are resampled and weights aligned as there. R-hat and effective sizes are those
    of Vehtari et al. (2021), as ArviZ computes them.

    Args:
        model: their model.
        draws: the draws.
        aligned: bring weights into one gauge first.

    Returns:
        A pandas frame, a row for each weight, ``0.weight[3, age]``, with ``mean``, ``sd``, the
        quantiles ``5%`` and ``95%``, ``mcse_mean`` (the standard error of the mean), ``ess_bulk``,
        ``ess_tail`` and ``r_hat``.

    Raises:
        ValueError: if draws are NaN or infinite, or of another model.
    """
    import pandas

    predict(model, draws)  # refuses draws that are not the model's, or not finite
    equal = _equally_weighted(draws)
    theta = _gauged(model, equal) if aligned else equal.theta
    axes = Axes.of(model, None)
    data = axes.dataset(axes.weights(theta))
    labels, values = [], []
    for name, variable in data.data_vars.items():
        names = [data[dim].to_numpy() for dim in variable.dims[2:]]
        places = (", ".join(map(str, place)) for place in itertools.product(*names))
        labels += [f"{name}[{place}]" if names else str(name) for place in places]
        values.append(variable.to_numpy().reshape(*theta.shape[:2], -1))
    return pandas.DataFrame(summarised(np.concatenate(values, 2)), index=labels)


def _predicted(
    axes: Axes,
    theta: Tensor,
    x: Tensor,
    y: Tensor | np.ndarray | None,
    generator: torch.Generator,
) -> Variables:
    """Return what draws ``(chain, draw, dim)`` say of some rows: ``mean``; ``y``, if the likelihood
    can draw it; ``log_prob``, if there are targets.
    """
    prediction = predict(axes.model, theta, x)
    parts = zip(*prediction.by_draw(y, generator), strict=True)

    def joined(part: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([each.cpu() for each in part]).unflatten(0, theta.shape[:2])

    mean, sample, log_prob = (None if part[0] is None else joined(part) for part in parts)
    assert mean is not None
    found: Variables = {"mean": (mean, ("row", axes.predicted))}
    if sample is not None:
        found["y"] = axes.targets(sample)
    if log_prob is not None:
        found["log_prob"] = (log_prob, ("row",))
    return found


def _only(variables: Variables, *names: str) -> Variables:
    return {name: variables[name] for name in names if name in variables}


def _statistics(draws: Draws) -> Variables:
    stats = {"lp": draws.log_joint, **draws.stats}
    return {name: (values, ()) for name, values in stats.items()}


def _gauged(model: BayesianModel, draws: Draws) -> Tensor:
    """Return the weights of draws, aligned where there is a symmetry to align by: all matched to
    the mean of some, since a gauge need only be the same for all.
    """
    if _ungauged(model):
        return draws.theta
    flat, group = draws.flat, model.symmetries()
    best = draws.log_joint.flatten().nan_to_num(nan=-math.inf).argmax()

    def matched(theta: Tensor, reference: Tensor) -> Tensor:
        return match(theta, model.spec, reference, group=group, sweeps=2)

    some = flat[:: math.ceil(len(flat) / _MATCHED)]
    _, mean = frechet_mean(some, model.spec, start=flat[best], rounds=3, matching=matched)
    return matched(draws.theta, mean)


def _ungauged(model: BayesianModel) -> str:
    """Return why weights cannot be aligned, empty if they can."""
    if model.spec.unknown:
        return f"the symmetries are not known: {model.spec.unknown}"
    group = model.symmetries()
    return "" if group.permutation or group.sign else "the posterior has no symmetries"


def _attributes(model: BayesianModel, draws: Draws, aligned: bool) -> dict[str, str]:
    """Return what a reader of the draws should know of them."""
    group = model.symmetries()
    layers = ", ".join(sorted(group.permutation | group.sign))
    gauge = f"matched to their mean by exchanges and signs of the units of {layers}"
    why_not = _ungauged(model) if aligned else "left as they were drawn"
    attrs = {
        "inference_library": "bnnflow",
        "draws_of": _LAWS[origin(draws)],
        "aligned": f"no: {why_not}" if why_not else f"yes: {gauge}",
        "info": json.dumps(draws.info, default=str),
    }
    if draws.calibration is not None:
        attrs["calibration"] = f"not applied here: {draws.calibration}"
    if draws.log_weights is not None:
        weights = draws.log_weights.flatten().double().softmax(0)
        attrs["resampled"] = (
            f"{len(weights)} weighted draws, worth {float(1 / weights.square().sum()):.0f}, "
            "resampled systematically in proportion to their weights"
        )
    return attrs


def _equally_weighted(draws: Draws) -> Draws:
    """Return as many draws that count alike: systematic resampling at fixed points, order kept."""
    if draws.log_weights is None:
        return draws
    chosen = counted_alike(draws.log_weights)

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


def _convert(groups: dict[str, Dataset]) -> Any:
    if is_datatree():
        import xarray

        return xarray.DataTree.from_dict(groups)
    return import_arviz().InferenceData(**groups)
