"""Deep ensembles, trained in one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.inference.start import (
    accelerated_ascent,
    first_points,
    of_divergence,
    of_interrupt,
)
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel

__all__ = ["DeepEnsemble"]

_STEPS = 2000


@dataclass(frozen=True)
class DeepEnsemble(Method):
    """Train independent networks to the posterior mode (Lakshminarayanan et al. 2017), all in one
    call.

    Approximates the posterior by the modes that random initialisations reach; nothing is left
    invariant. Each member climbs log_joint by full-batch Adam, so the prior acts as its weight
    decay.

    ``bf.sample(model, DeepEnsemble(), init=[net, ...])`` makes an ensemble of networks that were
    trained already. They stay as they are; only what the model infers beside their weights (the
    noise, scales of the prior) climbs to its mode. With ``steps`` they are trained on.

    Args:
        members: number of networks; those of ``init`` are all taken, whatever it says.
        steps: Adam steps; None for 2,000, or none where ``init`` gives trained networks.
        learning_rate: its first value; a cosine takes it to zero.
    """

    refused = ("chains", "warmup", "draws", "checkpoint")

    members: int = 10
    steps: int | None = None
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        settle(self, integer, "members", "steps", least=1)
        settle(self, number, "learning_rate", above=0)

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Train the members; see `bnnflow.sample`. They come as one chain of ``members`` draws."""
        run.refuse(self, "members and steps")
        given = run.init if isinstance(run.init, Tensor) else None
        if given is not None and given.dim() == 1:
            raise ValueError(
                "init must be several networks for DeepEnsemble: copies of one are no ensemble"
            )
        theta = first_points(model, run.init, self.members, run.generator)
        steps, free = self.steps, None
        if steps is None and given is not None:
            steps, free = _STEPS if model.spec.extras else 0, _beside_the_weights(model)
        steps = _STEPS if steps is None else steps
        ascent = accelerated_ascent(
            model, theta, steps, self.learning_rate, run.progress, "ensemble", free
        )
        theta, info = ascent.best, {"gradients_per_chain": ascent.steps.done}
        info |= of_divergence(self, ascent.diverged, self.learning_rate)
        info |= of_interrupt(self, ascent.steps, f"{steps} steps")
        return Draws(theta.unsqueeze(0), model.log_joint(theta).unsqueeze(0), info=info)


def _beside_the_weights(model: BayesianModel) -> Tensor:
    """Return 1 for coordinates that are no weights of the network, and 0 for those that are,
    ``(dim,)``.
    """
    free = torch.zeros(model.dim, dtype=model.dtype, device=model.device)
    for name in model.spec.extras:
        free[model.spec.slices[name]] = 1.0
    return free
