"""R-hat, effective sample sizes and Pareto smoothing: what ArviZ computes, from either of its
generations.

ArviZ 0.x is one package that smooths log weights; 1.x is several, and smooths the weights that
belong to log *likelihoods*, the negative of what is given. Both are wrapped here and nowhere else.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any, Literal

import numpy as np

__all__ = ["ess", "import_arviz", "is_datatree", "psis", "rhat"]


def import_arviz() -> ModuleType:
    """Import ArviZ without the announcement that it makes on import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def is_datatree() -> bool:
    """Say whether ArviZ keeps its groups in an xarray ``DataTree``, as it does from 1.0 on."""
    return hasattr(import_arviz(), "convert_to_datatree")


def rhat(values: np.ndarray) -> np.ndarray:
    """Return the rank-normalised split R-hat of ``(chain, draw, ...)``, ``(...)`` (Vehtari et al.
    2021).
    """
    return _of_chains("rhat", values)


def ess(values: np.ndarray, method: Literal["bulk", "tail", "mean"]) -> np.ndarray:
    """Return the effective sample size of ``(chain, draw, ...)``, ``(...)``, all chains together.

    ``"tail"`` is the smaller one of the 5 % and the 95 % quantile.
    """
    options = {"prob": (0.05, 0.95)} if method == "tail" else {}
    return _of_chains("ess", values, method=method, **options)


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Smooth the largest of the log weights ``(n,)`` by a generalised Pareto law (Vehtari et al.
    2024).

    Returns:
        The smoothed log weights, normalised to sum to one, and the law's shape, k-hat: infinite
        where the tail is too short to fit.
    """
    arviz = import_arviz()
    if is_datatree():
        from arviz_stats.base import array_stats  # type: ignore[import-not-found]  # of 1.x

        smoothed, khat = array_stats.psislw(-log_weights)
    else:
        smoothed, khat = arviz.psislw(log_weights)
    return np.asarray(smoothed), float(khat)


def _of_chains(diagnostic: str, values: np.ndarray, **options: Any) -> np.ndarray:
    import xarray

    flat = _standardised(values.reshape(*values.shape[:2], -1))
    series = xarray.Dataset({"values": (("chain", "draw", "quantity"), flat)})
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = getattr(import_arviz(), diagnostic)(series, **options)["values"]
    return found.to_numpy().reshape(values.shape[2:])


def _standardised(values: np.ndarray) -> np.ndarray:
    """Bring every quantity of ``(chain, draw, quantity)`` to one scale: ArviZ takes a range below
    1e-15 for none.
    """
    offset = values.astype(np.float64) - values[:1, :1]
    reach = np.abs(offset).max((0, 1), keepdims=True, initial=0.0)
    return offset / np.where(reach > 0, reach, 1.0)
