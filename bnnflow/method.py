"""What a method of getting draws is, what it is asked to do, and flows and other densities as
methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.progress import until_interrupted
from bnnflow.ranks import ALONE, Ranks
from bnnflow.types import Seed
from bnnflow.warn import warn

if TYPE_CHECKING:
    from bnnflow.inference.checkpoint import RunFolder

__all__ = ["Method", "Run", "Sampleable"]


@dataclass(frozen=True)
class Run:
    """The settings that every method shares; a None leaves the choice to the method.

    Args:
        generator: the source of randomness, the same in every process.
        chains: number of chains, over all processes.
        warmup: transitions spent on tuning.
        draws: draws per chain.
        init: where to start, ``(dim,)`` or ``(n, dim)`` as the model computes; ``"prior"`` for
            draws of it.
        progress: whether a bar may be shown.
        checkpoint: where the run is kept.
        ranks: the processes that share the run.
        alike: what all of them must have been given, by name.
    """

    generator: torch.Generator
    chains: int | None = None
    warmup: int | None = None
    draws: int | None = None
    init: Tensor | Literal["prior"] | None = None
    progress: bool = False
    checkpoint: RunFolder | None = None
    ranks: Ranks = ALONE
    alike: Mapping[str, object] = field(default_factory=dict)

    def chains_or(self, default: int) -> int:
        """Return the number of chains: as asked, else one for each row of ``init``, else
        ``default``.
        """
        rows = (
            len(self.init)
            if isinstance(self.init, Tensor) and self.init.dim() == 2
            else None
        )
        return self.chains or rows or default

    def refuse(self, method: Method, takes: str) -> None:
        """Raise ``ValueError`` if a setting was given that ``method`` has ``refused``."""
        given = [name for name in method.refused if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"{type(method).__name__} takes {takes}, not {', '.join(given)}"
            )


class Method(ABC):
    """A way to get posterior draws: a frozen dataclass of settings, checked when it is made.

    Attributes:
        refused: the settings of a `Run` that it knows nothing of; `Run.refuse` raises for them.
    """

    refused: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Return draws; their ``info`` counts ``gradients``, or ``gradients_per_chain``."""


class Sampleable(Method):
    """A distribution over the weights, such as a flow: ``sample`` gives independent draws of it.

    They are draws of *it*: `refine` and `correct` bring them to the posterior.
    """

    refused = ("chains", "warmup", "init", "checkpoint")

    @abstractmethod
    def sample(self, n: int, seed: Seed = 0) -> Tensor:
        """Draw ``(n, dim)``."""

    def batches(self, n: int, seed: Seed) -> Iterator[Tensor]:
        """Yield the draws of `sample`, ``(some, dim)`` at a time, in their order."""
        yield self.sample(n, seed)

    @property
    def gradients_per_draw(self) -> int | None:
        """Gradients of the likelihood that a draw takes, none by default.

        None if that is not known.
        """
        return 0

    @property
    def about(self) -> dict[str, Any]:
        """What a reader of its draws should know of how it was made; nothing by default."""
        return {}

    def check_model(self, model: BayesianModel) -> None:
        """Raise ``ValueError`` if this is no distribution over the model's weights, or one of
        another posterior.
        """

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Return draws as one chain, as many as were asked for, else 1,000.

        Ctrl-C returns those of the batches that are done, with ``info["interrupted"]``.
        """
        run.refuse(self, "draws")
        self.check_model(model)
        wanted, parts = run.draws or 1000, []
        with until_interrupted() as taken:
            for part in self.batches(wanted, run.generator):
                parts.append(model.spec.check(part, "draws of the method"))
                taken.done += len(part)
        theta = torch.cat(parts).to(model.device, model.dtype)
        if taken.interrupted:
            warn(f"interrupted: returning the {len(theta)} of {wanted} draws made so far")
        with torch.no_grad():
            log_joint = model.log_joint(theta)
        each = self.gradients_per_draw
        info = {
            "gradients": None if each is None else each * len(theta),
            "interrupted": taken.interrupted,
        }
        info |= self.about
        return Draws(theta.unsqueeze(0), log_joint.unsqueeze(0), info=info)
