"""Deep ensembles, trained in one batch."""

from __future__ import annotations

from dataclasses import dataclass

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.inference.run import Run
from bnnflow.inference.start import maximise, random_networks
from bnnflow.model import BayesianModel

__all__ = ["DeepEnsemble"]


@dataclass(frozen=True)
class DeepEnsemble:
    """Train independent networks to the posterior mode (Lakshminarayanan et al. 2017), all in one call.

    Approximates the posterior by the modes that random initialisations reach; nothing is left invariant. Each member
    climbs log_joint by full-batch Adam, so the prior acts as its weight decay.

    Args:
        members: number of networks.
        steps: Adam steps.
        learning_rate: its first value; a cosine takes it to zero.
    """

    members: int = 10
    steps: int = 2000
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        settle(self, integer, "members", "steps", least=1)
        settle(self, number, "learning_rate", above=0)

    def sample(self, model: BayesianModel, run: Run) -> Draws:
        """Train the members; see `bnnflow.sample`. They come as one chain of ``members`` draws."""
        run.refuse(self, "members and steps", "chains", "warmup", "draws", "init", "checkpoint")
        theta = random_networks(model.spec, self.members, run.generator, model.dtype)
        theta = maximise(model, theta, self.steps, self.learning_rate, run.progress, "ensemble")
        info = {"gradients_per_chain": self.steps}
        return Draws(theta.unsqueeze(0), model.log_joint(theta).unsqueeze(0), info=info)
