"""Names of axes: which axis of a tensor is a hidden layer, the inputs or the classes, and what its
entries are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bnnflow.model import BayesianModel
from bnnflow.predictive import predict

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["Axes", "Variables"]

_SAMPLE = ("chain", "draw")
_LARGEST = 2.0**53  # whole number that is as exact in floating point

Variables = dict[str, tuple[Tensor, tuple[str, ...]]]
"""Tensors by name, and the dimensions of each, those of the draws apart."""


@dataclass(frozen=True)
class Axes:
    """The dimensions of what a model infers and predicts.

    Attributes:
        model: the model.
        predicted: the dimension of what a draw predicts: ``"class"`` or ``"target"``.
        outputs: that of the network's outputs, ``"output"`` where they are no predictions.
        sizes: of the dimensions that can be given names.
        coords: the names that were given.
    """

    model: BayesianModel
    predicted: str
    outputs: str
    sizes: dict[str, int]
    coords: dict[str, list[Any]]

    @classmethod
    def of(cls, model: BayesianModel, coords: Mapping[str, Sequence[Any]] | None) -> Axes:
        """Find the axes of a model, and check the names that are given to their entries.

        Raises:
            ValueError: if there is no such axis, it has another length, or a name comes twice.
        """
        zeros = model.x.new_zeros(1, model.dim, dtype=model.dtype)
        n_predicted = next(predict(model, zeros, model.x[:1]).functions()).shape[-1]
        n_outputs = model.outputs(zeros, model.x[:1]).shape[-1]
        predicted = "class" if model.likelihood.kind == "classification" else "target"
        outputs = predicted if n_outputs == n_predicted else "output"
        sizes = {outputs: n_outputs, predicted: n_predicted, **model.spec.widths}
        given = {name: list(names) for name, names in (coords or {}).items()}
        if model.x.dim() == 2:
            sizes["input"] = model.x.shape[1]
            given = {"input": list(model.columns)} | given if model.columns else given
        for name, names in given.items():
            _check_names(name, names, sizes)
        return cls(model, predicted, outputs, sizes, given)

    def weights(self, theta: Tensor) -> Variables:
        """Return the tensors of ``theta``, and beside logarithms of parameters these themselves.

        The last layer comes first: so dimensions appear in the order that every tensor has them in,
        without which ArviZ 1.x exchanges rows of its summary.
        """
        tensors = self.model.spec.unflatten(theta)
        found = {name: (tensors[name], self._of(name)) for name in reversed(tensors)}
        for each in self.model.hyperparameters:
            found[each.site] = (each.value(tensors[each.name]), self._of(each.name))
        return found

    def inputs(self, x: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Return inputs with their dimensions."""
        rest = ["input"] if x.dim() == 2 else [f"x_dim_{i}" for i in range(1, x.dim())]
        return x, ("row", *rest)

    def targets(self, y: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Return targets ``(..., n, targets)`` or labels ``(..., n)`` with their dimensions, those
        of draws apart; a single target has no axis.

        Counts become integers, for which ArviZ draws histograms.
        """
        likelihood = self.model.likelihood
        if likelihood.kind == "classification":
            return y, ("row",)
        if likelihood.discrete and bool(
            (y.abs() < _LARGEST).all() & (y == y.floor()).all()
        ):
            y = y.long()
        return (y.squeeze(-1), ("row",)) if y.shape[-1] == 1 else (y, ("row", "target"))

    def dataset(self, variables: Variables, *, sampled: bool = True) -> Dataset:
        """Return a data set, in which ``chain`` and ``draw`` come first if ``sampled``."""
        import xarray

        lead = _SAMPLE if sampled else ()
        dims = {*lead, *(dim for _, own in variables.values() for dim in own)}
        data = {
            _free(name, dims): ((*lead, *own), values.detach().cpu().numpy())
            for name, (values, own) in variables.items()
        }
        sizes = {
            dim: size
            for own, values in data.values()
            for dim, size in zip(own, values.shape, strict=True)
        }
        coords = {dim: self.coords.get(dim, np.arange(size)) for dim, size in sizes.items()}
        return xarray.Dataset(data, coords=coords)

    def _of(self, name: str) -> tuple[str, ...]:
        """Return the dimensions of a tensor: a hidden layer, inputs, outputs, or its own."""
        spec = self.model.spec
        ends = self._ends()
        labels, found = spec.axes[name], []
        for axis, size in enumerate(spec.shapes[name]):
            label = labels[axis] or ends.get((name, axis))
            whole = label is not None and size == self.sizes.get(label)
            known = whole and label not in labels[:axis]
            found.append(label if known and label else f"{name}_dim_{axis}")
        return tuple(found)

    def _ends(self) -> dict[tuple[str, int], str]:
        """Return which axes are inputs and outputs: those without a label of the one tensor that
        reads, or writes, anything but hidden units.
        """
        spec, net = self.model.spec, self.model.net
        if not all(each.requires_grad for each in net.parameters()):
            return {}  # constants read and write, too
        names = [name for name in spec.names if len(spec.shapes[name]) > 1]
        names = [name for name in names if name not in spec.extras]
        written = {name: int(name in spec.transposed) for name in names}
        writers = [name for name in names if spec.axes[name][written[name]] is None]
        readers = [name for name in names if spec.axes[name][1 - written[name]] is None]
        ends = {}
        if len(writers) == 1:
            (name,) = writers
            bias = f"{name.removesuffix('weight')}bias"
            ends = {(name, written[name]): self.outputs, (bias, 0): self.outputs}
        if len(readers) == 1 and "input" in self.sizes:
            (name,) = readers
            ends[name, 1 - written[name]] = "input"
        return ends


def _check_names(axis: str, names: list[Any], sizes: dict[str, int]) -> None:
    if axis not in sizes:
        raise ValueError(
            f"coords names {axis!r}, which is no axis; the axes are {', '.join(sorted(sizes))}"
        )
    if len(names) != sizes[axis]:
        raise ValueError(f"coords has {len(names)} names for {sizes[axis]} of {axis!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"coords gives two of {axis!r} the same name")


def _free(name: str, dims: set[str]) -> str:
    """Return a name that xarray takes for a variable: no path, and none of a dimension."""
    name = name.replace("/", ".")
    return f"{name}_" if name in dims else name
