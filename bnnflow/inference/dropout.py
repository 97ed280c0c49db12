"""Monte-Carlo dropout: networks with random hidden units left out, as weight vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.inference.run import Run
from bnnflow.inference.start import Adam, cosine, first_points, of_divergence
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
        members: networks trained independently, each one chain of the draws; those of ``init`` are all trained on.
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
        run.refuse(self, "members and draws", "chains", "warmup", "checkpoint")
        if not model.spec.layers or not model.spec.widths:
            raise ValueError(
                "MCDropout needs a perceptron with labelled hidden units; in other networks, put nn.Dropout where it "
                "belongs and train them elsewhere"
            )
        generator, spec = run.generator, model.spec
        start = theta = first_points(model, run.init, self.members, generator)
        adam, members, objectives = Adam(theta), len(theta), []
        with torch.no_grad(), progress_bar(self.steps, "MC dropout", run.progress, "step") as bar:
            for step in range(1, self.steps + 1):
                factors = dropout_factors(spec, self.rate, (members, self.masks), generator, model.dtype)
                value, grad = model.log_likelihood_and_grad(theta.unsqueeze(1) * factors)  # (members, masks, ...)
                prior, prior_grad = _log_prior_and_grad(model, theta)
                grad = (grad * factors).mean(1) + prior_grad
                objectives.append(value.mean(1) + prior)  # (members,)
                theta = adam.step(theta, grad, cosine(self.learning_rate, step, self.steps))
                bar.update()
        # The objective is noisy: only a fall that no mask explains is a divergence.
        first, last = objectives[0], objectives[-1]
        lost = ~(last >= first - 1 - first.abs()) | ~theta.isfinite().all(-1)
        theta = torch.where(theta.isfinite().all(-1, keepdim=True), theta, start)
        draws = run.draws or 250
        factors = dropout_factors(spec, self.rate, (members, draws), generator, model.dtype)
        theta = theta.unsqueeze(1) * factors  # (members, draws, dim)
        info = {"gradients_per_chain": self.steps * self.masks}
        return Draws(theta, model.log_joint(theta), info=info | of_divergence(self, lost, self.learning_rate))


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


def _log_prior_and_grad(model: BayesianModel, theta: Tensor) -> tuple[Tensor, Tensor]:
    value, vjp, *_ = torch.func.vjp(model.log_prior, theta)
    return value, vjp(torch.ones_like(value))[0]
