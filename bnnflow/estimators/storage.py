"""Fitted estimators as files: settings, draws and rows of training, without pickle."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributions
from torch.distributions import Distribution

from bnnflow import inference, storage
from bnnflow.draws import Draws
from bnnflow.estimators.table import Table
from bnnflow.model import likelihoods, priors

if TYPE_CHECKING:
    from bnnflow.estimators.base import BayesianEstimator

__all__ = ["VERSION", "load", "save"]

VERSION = 1
_PUBLIC = {"priors": priors, "likelihoods": likelihoods, "inference": inference}


def save(estimator: BayesianEstimator, path: str | Path) -> Path:
    """Write a fitted estimator."""
    settings = estimator.get_params(deep=False)
    draws = estimator.draws_
    header = {
        "estimator": type(estimator).__name__,
        "settings": {name: _packed(name, value) for name, value in settings.items()},
        "table": estimator.table_.describe(),
        "names": getattr(estimator, "feature_names_in_", np.empty(0)).tolist(),
        "targets": estimator.target_names_,
        "inputs": estimator.n_features_in_,
        "fitted": estimator._fitted(),
        "likelihood": _packed("likelihood", estimator.model_.likelihood),
        "outputs": estimator.model_.outputs(
            draws.theta[:1, 0], estimator.model_.x[:1]
        ).shape[-1],
    }
    own, arrays = draws.to_file()
    model = estimator.model_
    arrays |= {"x": model.x.cpu().numpy(), "y": model.y.cpu().numpy()}
    if model.row_weights is not None:
        arrays["row_weights"] = model.row_weights.cpu().numpy()
    return storage.write(path, "estimator", VERSION, header | own, arrays)


def load(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> BayesianEstimator:
    """Rebuild an estimator from the contents of a file."""
    from bnnflow import estimators

    kinds = {name: getattr(estimators, name) for name in estimators.__all__}
    settings = {name: _unpacked(value) for name, value in header["settings"].items()}
    made = kinds[header["estimator"]](**settings)
    made.table_ = Table.from_description(header["table"])
    made.n_features_in_ = int(header["inputs"])
    if header["names"]:
        made.feature_names_in_ = np.asarray(header["names"], dtype=object)
    made.target_names_ = header.get("targets", [])
    made._restore(header["fitted"])
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    likelihood, weights = _unpacked(header["likelihood"]), arrays.get("row_weights")
    made.model_ = made._model(likelihood, x, y, header["outputs"], weights)
    made.draws_ = Draws.from_file(header, arrays)
    made.model_.check_draws(made.draws_)
    return made


def _packed(name: str, value: Any) -> Any:
    """Return a setting as plain values."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if isinstance(value, tuple | list):
        return {"tuple": [_packed(name, each) for each in value]}
    if isinstance(value, Distribution):
        return {
            "distribution": type(value).__name__,
            "arguments": {
                key: getattr(value, key).tolist() for key in value.arg_constraints
            },
        }
    kind = type(value).__name__
    for module, found in _PUBLIC.items():
        if getattr(found, kind, None) is type(value) and is_dataclass(value):
            parts = {
                each.name: getattr(value, each.name) for each in fields(value) if each.init
            }
            plain = {key: _packed(f"{name}.{key}", part) for key, part in parts.items()}
            return {"module": module, "kind": kind, "settings": plain}
    raise ValueError(f"{name}={value!r} cannot be written to a file: pickle the estimator")


def _unpacked(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    if "tuple" in plain:
        return tuple(_unpacked(each) for each in plain["tuple"])
    if "distribution" in plain:
        values = {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in plain["arguments"].items()
        }
        return _known(distributions, plain["distribution"])(**values)
    settings = {name: _unpacked(value) for name, value in plain["settings"].items()}
    return _known(_PUBLIC[plain["module"]], plain["kind"])(**settings)


def _known(module: Any, name: str) -> Any:
    """Return a public class of a module, and nothing else that a file may name."""
    if name not in module.__all__:
        raise ValueError(f"the file asks for {name!r}, which is none of {module.__name__}")
    return getattr(module, name)
