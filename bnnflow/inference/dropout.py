"""Monte-Carlo dropout: networks with random hidden units left out, as weight vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.inference.run import Run
from bnnflow.inference.start import Adam, cosine, random_networks
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.weights import WeightSpec

__all__ = ["MCDropout", "dropout_factors"]


@dataclass(frozen=True)
class MCDropout:
    """Train with dropout and keep it on for prediction (Gal and Ghahramani 2016).

    With theta * m the network whose dropped hidden units have their outgoing weights set to zero and all others
    divided by 1 - rate, Adam climbs E_m[log_likelihood(theta * m)] + log_prior(theta), and draws are theta * m for new
    masks m: ordinary weights, so that all that follows works on them. Approximates the posterior by the law of
    theta * m in the sense of the paper, a variational family whose width the rate fixes, whatever the data; nothing
    is left invariant, and there is no density. A temperature divides both terms and changes nothing here.

    Every mask is shared by all rows of the data, and each step averages over ``masks`` of them for each member. The
    hidden units come from the labels of ``model.spec``, so the network needs no ``nn.Dropout`` of its own; one that has
    them is passed in ``eval()`` mode, where they do nothing. Rates that differ between layers are not supported.

    Args:
        rate: probability that a hidden unit is dropped.
        members: networks trained independently; each is one chain of the draws.
        steps: Adam steps.
        learning_rate: its first value; a cosine takes it to zero.
        masks: masks in each step.
    """

    rate: float = 0.1
    members: int = 4
    steps: int = 2000
    learning_rate: float = 0.01
    masks: int = 4

    def __post_init__(self) -> None:
        settle(self, number, "rate", above=0, below=1)
        settle(self, integer, "members", "steps", "masks", least=1)
        settle(self, number, "learning_rate", above=0)

    def sample(self, model: BayesianModel, run: Run) -> Draws:
        """Train the members and draw masks, 250 each unless said otherwise; see `bnnflow.sample`."""
        run.refuse(self, "members and draws", "chains", "warmup", "init", "checkpoint")
        if not model.spec.layers or not model.spec.widths:
            raise ValueError(
                "MCDropout needs a perceptron with labelled hidden units; in other networks, put nn.Dropout where it "
                "belongs and train them elsewhere"
            )
        generator, spec, shape = run.generator, model.spec, (self.members, self.masks)
        theta = random_networks(spec, self.members, generator, model.dtype)
        adam = Adam(theta)
        with torch.no_grad(), progress_bar(self.steps, "MC dropout", run.progress, "step") as bar:
            for step in range(1, self.steps + 1):
                factors = dropout_factors(spec, self.rate, shape, generator, model.dtype)
                grad = model.log_likelihood_and_grad(theta.unsqueeze(1) * factors)[1]  # (members, masks, dim)
                grad = (grad * factors).mean(1) + _log_prior_grad(model, theta)
                theta = adam.step(theta, grad, cosine(self.learning_rate, step, self.steps))
                bar.update()
        draws = run.draws or 250
        factors = dropout_factors(spec, self.rate, (self.members, draws), generator, model.dtype)
        theta = theta.unsqueeze(1) * factors  # (members, draws, dim)
        return Draws(theta, model.log_joint(theta), info={"gradients_per_chain": self.steps * self.masks})


def dropout_factors(
    spec: WeightSpec, rate: float, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Draw masks over hidden units as multipliers of the weights, ``(*shape, dim)``.

    The weights that read a unit are multiplied by 0 with probability ``rate``, else by 1 / (1 - rate).
    """
    device = generator.device
    kept = {
        label: (torch.rand(*shape, width, generator=generator, device=device) >= rate).to(dtype) / (1 - rate)
        for label, width in sorted(spec.widths.items())
    }
    parts = []
    for name in spec.names:
        factor = torch.ones(*shape, *spec.shapes[name], dtype=dtype, device=device)
        reads = spec.axes[name][1:2]
        if reads and reads[0] is not None:
            factor = factor * kept[reads[0]].unsqueeze(-2)  # (*shape, out, in)
        parts.append(factor.flatten(len(shape)))
    return torch.cat(parts, -1)


def _log_prior_grad(model: BayesianModel, theta: Tensor) -> Tensor:
    value, vjp, *_ = torch.func.vjp(model.log_prior, theta)
    return vjp(torch.ones_like(value))[0]
