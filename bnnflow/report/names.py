"""What targets and classes are called, and in which units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bnnflow.model import BayesianModel
from bnnflow.predictive import predict

__all__ = ["Names"]


@dataclass(frozen=True)
class Names:
    """The names of a report, as far as they were given.

    Attributes:
        targets: of each target, one of labels; empty if unknown.
        units: of each target.
        classes: of each class.
    """

    targets: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: BayesianModel,
        targets: Sequence[str] | None,
        units: Sequence[str] | None,
        classes: Sequence[str] | None,
    ) -> Names:
        """Check names against what a model predicts.

        Raises:
            ValueError: naming the argument, for names that are too few or too many, empty or twice
                the same, units of labels, or classes of numbers.
        """
        of_classes = model.likelihood.kind == "classification"
        if of_classes and units is not None:
            raise ValueError("units are those of numbers, and the targets are labels")
        if not of_classes and classes is not None:
            raise ValueError("classes are those of labels, and the targets are numbers")
        zeros = torch.zeros(1, model.dim, dtype=model.dtype, device=model.device)
        width = next(predict(model, zeros, model.x[:1]).functions()).shape[-1]
        count = 1 if of_classes else width
        return cls(
            _distinct("targets", _texts("targets", targets, count)),
            _texts("units", units, count),
            _distinct("classes", _texts("classes", classes, width)),
        )

    def target(self, index: int) -> str:
        """Return the name of a target, with its unit."""
        name = self.targets[index] if self.targets else f"target {index}"
        return self._with_unit(name, index)

    @property
    def axis(self) -> str:
        """What an axis of targets is called: the one there is, or all of them."""
        if len(self.targets) > 1 or len(self.units) > 1:
            return "target"
        return self._with_unit(*(self.targets or ("target",)), 0)

    @property
    def unit(self) -> str:
        """The unit that all targets have; empty if there is none."""
        return self.units[0] if len(set(self.units)) == 1 else ""

    def _with_unit(self, name: str, index: int) -> str:
        return f"{name} ({self.units[index]})" if self.units else name


def _texts(argument: str, given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if given is None:
        return ()
    if isinstance(given, str):
        raise ValueError(f"{argument} must be a list of texts, got {given!r}")
    if len(given) != count:
        raise ValueError(f"{argument} has {len(given)} names for {count}")
    if not all(each.strip() for each in given):
        raise ValueError(f"{argument} has an empty name")
    return tuple(given)


def _distinct(argument: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"{argument} gives two the same name")
    return names
