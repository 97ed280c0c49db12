"""Variational inference through Pyro's autoguides."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bnnflow.draws import Draws
from bnnflow.gaussian import Gaussian
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.seeding import isolated

__all__ = ["VI"]


@dataclass(frozen=True)
class VI:
    """Fit a mean-field Gaussian with Pyro's ``AutoNormal`` (Blundell et al. 2015; Kucukelbir et al. 2017).

    Approximates the posterior by the Gaussian with independent coordinates that minimises KL(q || p); its variances
    are known to be too small. The density is at ``draws.posterior``.

    Args:
        steps: Adam steps on the ELBO.
        learning_rate: its first value; it decays to a tenth.
        particles: Monte-Carlo samples of the ELBO a step.
    """

    steps: int = 2000
    learning_rate: float = 0.02
    particles: int = 8

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "particles"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def sample(
        self,
        model: BayesianModel,
        *,
        chains: int | None,
        warmup: int | None,
        draws: int | None,
        generator: torch.Generator,
        init,
        progress: bool,
    ) -> Draws:
        """Fit the guide and draw from it; see `bnnflow.sample`. ``chains`` only shapes the independent draws."""
        if warmup is not None or init is not None:
            raise ValueError("VI has neither warm-up nor init; it takes steps")
        import pyro
        from pyro.infer import SVI, Trace_ELBO
        from pyro.infer.autoguide import AutoNormal
        from pyro.optim import ClippedAdam

        chains, draws = chains or 4, draws or 1000
        with isolated(generator), pyro.get_param_store().scope():
            target = model.to_pyro()
            guide = AutoNormal(target, init_scale=0.05)
            decay = 0.1 ** (1 / max(1, self.steps))
            optimiser = ClippedAdam({"lr": self.learning_rate, "lrd": decay})
            elbo = Trace_ELBO(num_particles=self.particles, vectorize_particles=True, max_plate_nesting=0)
            svi = SVI(target, guide, optimiser, elbo)
            losses = []
            with progress_bar(self.steps, "VI", progress, "step") as bar:
                for _ in range(self.steps):
                    losses.append(float(svi.step()))  # type: ignore[arg-type]
                    bar.update()
                    if not bar.disable and len(losses) % 50 == 0:
                        bar.set_postfix(elbo=f"{-sum(losses[-50:]) / 50:.1f}")
            stored = dict(pyro.get_param_store().items())

        def flat(kind: str) -> torch.Tensor:
            # Sites live on constrained spaces, but a guide's parameters on the unconstrained ones of theta.
            sites = {name: name.replace("likelihood.log_", "likelihood.") for name in model.spec.names}
            return model.spec.flatten({n: stored[f"AutoNormal.{kind}.{site}"].detach() for n, site in sites.items()})

        posterior = Gaussian(flat("locs"), flat("scales"))
        theta = posterior.sample(chains * draws, generator)
        tail = losses[-max(1, self.steps // 20) :]
        info = {"elbo": -sum(tail) / len(tail), "gradients_per_chain": self.steps * self.particles}
        log_joint = model.log_joint(theta).reshape(chains, draws)
        return Draws(theta.reshape(chains, draws, -1), log_joint, posterior=posterior, info=info)
