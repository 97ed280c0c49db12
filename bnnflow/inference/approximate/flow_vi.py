"""Variational inference with a normalising flow, through Pyro's ``AutoNormalizingFlow``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.inference.approximate.vi import fit_guide, flat_model, independent_draws
from bnnflow.inference.start import one_point
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.posteriors import CouplingFlow, coupling_flow, coupling_orders
from bnnflow.seeding import isolated

__all__ = ["NormalizingFlowVI"]


@dataclass(frozen=True)
class NormalizingFlowVI(Method):
    """Fit a normalising flow by maximising the ELBO (Rezende and Mohamed 2015), with Pyro's
    ``AutoNormalizingFlow``.

    Approximates the posterior (at its temperature) by the flow q that minimises KL(q || p). The
    flow is a stack of affine couplings between random halves of the coordinates (Dinh et al. 2017),
    then an elementwise scale and shift: unlike an inverse autoregressive flow it can be inverted in
    one pass, so that ``draws.posterior.log_prob`` knows the density of any theta. It starts as a
    Gaussian with independent coordinates and contains all of them. The steps are those of `VI`.

    Args:
        couplings: number of coupling layers.
        hidden: width of the network in each of them.
        steps: Adam steps on the ELBO.
        learning_rate: its first value; a cosine takes it to zero.
        particles: Monte-Carlo samples of the ELBO a step; one gradient each.
        scale: standard deviation of every coordinate at the start, around random initial weights or
            those of ``init``.
    """

    refused = ("warmup", "checkpoint")

    couplings: int = 4
    hidden: int = 64
    steps: int = 3000
    learning_rate: float = 0.005
    particles: int = 16
    scale: float = 0.05

    def __post_init__(self) -> None:
        settle(self, integer, "couplings", "hidden", "steps", "particles", least=1)
        settle(self, number, "learning_rate", "scale", above=0)

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Fit the flow and draw from it.

        See `bnnflow.sample`. ``chains`` only shapes the independent draws.
        """
        run.refuse(self, "steps")
        from pyro.distributions.torch_transform import ComposeTransformModule
        from pyro.infer.autoguide import AutoNormalizingFlow

        dim, generator = model.dim, run.generator
        start = one_point(self, model, run)
        permutations = coupling_orders(dim, self.couplings, generator)
        with isolated(generator):
            flow = coupling_flow(permutations, dim, self.hidden).to(start)
            *_, log_scale, loc = flow.parameters()
            loc.data.copy_(start)
            log_scale.data.fill_(math.log(self.scale))
            transforms = ComposeTransformModule(list(flow))  # type: ignore[arg-type]
            guide = AutoNormalizingFlow(flat_model(start), lambda _: transforms)
            found = fit_guide(
                model.log_joint_and_grad, guide, self, run.progress, "flow VI"
            )
        posterior = CouplingFlow(
            permutations,
            tuple(parameter.detach().clone() for parameter in flow.parameters()),
        )
        return independent_draws(model, run, posterior, found)
