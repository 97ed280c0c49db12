"""Variational inference with Gaussian guides, through Pyro's autoguides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from bnnflow.arguments import choice, integer, number, settle
from bnnflow.draws import Draws
from bnnflow.gaussian import Gaussian
from bnnflow.inference.approximate.laplace import gauss_newton_precision
from bnnflow.inference.start import WARM_START, maximise, of_interrupt, one_point
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.posteriors import LowRankGaussian
from bnnflow.progress import progress_bar, until_interrupted
from bnnflow.seeding import isolated
from bnnflow.types import LogDensityAndGrad, Posterior
from bnnflow.warn import warn

__all__ = ["VI", "fit_guide", "flat_model", "independent_draws"]

LARGEST_FULL = 4000
"""Largest ``dim`` for a full covariance: its factor and Adam's moments take 24 dim^2 bytes in
float32.
"""


@dataclass(frozen=True)
class VI(Method):
    """Fit a Gaussian by maximising the ELBO (Hinton and van Camp 1993; Kucukelbir et al. 2017;
    Blundell et al. 2015).

    Approximates the posterior (at its temperature) by the Gaussian q that minimises KL(q || p) over
    its family, with Pyro's autoguides: ``rank=0`` independent coordinates (``AutoDiagonalNormal``),
    whose variances are known to be too small; ``rank=k`` a diagonal plus k directions
    (``AutoLowRankMultivariateNormal``); ``rank="full"`` any covariance
    (``AutoMultivariateNormal``), exact where the posterior is Gaussian. Each Adam step follows the
    path derivative of the ELBO, d theta / d phi times grad (log_joint - log q) at draws theta of q
    (Roeder et al. 2017); its noise vanishes where q fits, so that a rate decaying to zero ends on
    the optimum. The density is at ``draws.posterior``, the ELBO, a lower bound of the log evidence
    at temperature 1, at ``draws.info["elbo"]``, and whether the fit has settled at
    ``draws.info["converged"]``.

    Args:
        rank: the number of directions beside the diagonal, or ``"full"``.
        steps: Adam steps on the ELBO.
        learning_rate: its first value; a cosine takes it to zero.
        particles: Monte-Carlo samples of the ELBO a step; one gradient each.
        scale: standard deviation of every coordinate at the start, around random initial weights or
            those of ``init``. ``rank="full"`` starts elsewhere: 300 Adam steps up, or at ``init``,
            with the covariance that `Laplace` would have there, in whose coordinates it also takes
            its steps, so that correlated weights are no harder.
    """

    refused = ("warmup", "checkpoint")

    rank: int | Literal["full"] = 0
    steps: int = 2000
    learning_rate: float = 0.02
    particles: int = 8
    scale: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.rank, str):
            settle(self, choice, "rank", choices=("full",))
        else:
            settle(self, integer, "rank", least=0)
        settle(self, integer, "steps", "particles", least=1)
        settle(self, number, "learning_rate", "scale", above=0)

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Fit the guide and draw from it.

        See `bnnflow.sample`. ``chains`` only shapes the independent draws.
        """
        run.refuse(self, "steps")
        if self.rank == "full" and model.dim > LARGEST_FULL:
            raise ValueError(
                f"rank='full' is for dim up to {LARGEST_FULL}, got {model.dim}; use rank=20, say"
            )
        if self.rank == "full":
            return self._full(model, run)
        start = one_point(self, model, run)
        with isolated(run.generator):
            guide = _guide(self.rank, start, self.scale)
            found = fit_guide(model.log_joint_and_grad, guide, self, run.progress, "VI")
            q = guide.get_posterior()
        posterior: Gaussian | LowRankGaussian
        if self.rank == 0:
            posterior = Gaussian(q.mean.detach(), q.stddev.detach())
        else:
            posterior = LowRankGaussian(
                q.loc.detach(), q.cov_factor.detach(), q.cov_diag.detach()
            )
        return independent_draws(model, run, posterior, found)

    def _full(self, model: BayesianModel, run: Run) -> Draws:
        """Fit in the coordinates z of theta = loc + root z."""
        loc, given = one_point(self, model, run), isinstance(run.init, Tensor)
        if not given:
            loc = maximise(
                model, loc.unsqueeze(0), WARM_START, 0.02, run.progress, "VI: start"
            )[0]
        root = torch.eye(model.dim).to(loc) * self.scale
        if model.likelihood.has_fisher_factor:
            double = model.to(dtype=torch.float64)
            root = Gaussian.of_precision(
                loc, gauss_newton_precision(double, loc.double())
            ).scale_tril

        def target(z: Tensor) -> tuple[Tensor, Tensor]:
            value, grad = model.log_joint_and_grad(loc + z @ root.T)
            return value + root.diagonal().double().log().sum(), grad @ root

        with isolated(run.generator):
            guide = _guide("full", torch.zeros_like(loc), self.scale)
            found = fit_guide(target, guide, self, run.progress, "VI")
            q = guide.get_posterior()
        found["gradients_per_chain"] += 0 if given else WARM_START
        posterior = Gaussian(loc + root @ q.loc.detach(), root @ q.scale_tril.detach())
        return independent_draws(model, run, posterior, found)


def _guide(rank: int | Literal["full"], start: Tensor, scale: float) -> Any:
    from pyro.infer import autoguide

    flat = flat_model(start)
    where = autoguide.init_to_value(values={"theta": start})
    if rank == 0:
        return autoguide.AutoDiagonalNormal(flat, where, scale)
    if rank == "full":
        return autoguide.AutoMultivariateNormal(flat, where, scale)
    return autoguide.AutoLowRankMultivariateNormal(flat, where, scale, rank)


def flat_model(like: Tensor) -> Callable[[], None]:
    """Return a Pyro model with one site, ``theta``, shaped as ``like``: what a guide is built from.

    A guide's coordinates are then those of theta, and `fit_guide` brings the density.
    """
    import pyro
    import pyro.distributions as dist

    def flat() -> None:
        # A masked site has no density of its own, but unlike ImproperUniform it can be drawn.
        pyro.sample(
            "theta",
            dist.Normal(torch.zeros_like(like), torch.ones_like(like))
            .to_event(1)
            .mask(False),
        )

    return flat


class Settings(Protocol):
    """What `fit_guide` wants to know."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def particles(self) -> int: ...


def fit_guide(
    target: LogDensityAndGrad, guide: Any, settings: Settings, progress: bool, name: str
) -> dict[str, Any]:
    """Climb the ELBO of a continuous autoguide along its path derivative, and say what it took.

    Draws from the global generator: call it inside `isolated`. Ctrl-C ends the climb where it is.
    """
    import pyro

    steps, particles = settings.steps, settings.particles
    with pyro.get_param_store().scope():
        guide()  # builds the parameters
    # Gradients shrink by orders of magnitude on the way; a longer memory of them (0.999) would
    # stall the scales. All dim entries in a row of a triangular factor move at once, so that each
    # of them has to be slower.
    groups = [
        {
            "params": [p],
            "lr": settings.learning_rate / math.sqrt(len(p) if "scale_tril" in name else 1),
        }
        for name, p in guide.named_parameters()
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    broken, first = 0, None
    with progress_bar(steps, name, progress, "step") as bar, until_interrupted() as taken:
        for step in range(steps):
            with _divergence_named(name, settings):
                q = guide.get_posterior()
                theta = q.rsample((particles,))  # (particles, dim)
                at = theta.detach().requires_grad_()
                log_q = q.log_prob(at)
            (grad_q,) = torch.autograd.grad(log_q.sum(), at)
            with torch.no_grad():
                log_joint, grad = target(at)
            path = (grad - grad_q) / particles
            finite = path.isfinite().all(-1, keepdim=True)
            broken += int((~finite).sum())
            optimiser.zero_grad()
            theta.backward(torch.where(finite, -path, 0.0))
            optimiser.step()
            schedule.step()
            elbo = float((log_joint - log_q.detach()).mean())
            first = elbo if first is None else first
            taken.done = step + 1
            bar.update()
            if not bar.disable and step % 50 == 0:
                bar.set_postfix(elbo=f"{elbo:.1f}")
    with _divergence_named(name, settings):
        guide.get_posterior()
    found = {"gradients_per_chain": taken.done * particles, "elbo_start": first}
    found |= {"not_finite": broken} if broken else {}
    return found | of_interrupt(settings, taken, f"{steps} steps")


@contextmanager
def _divergence_named(name: str, settings: Settings) -> Iterator[None]:
    """Say why a guide's parameters are no longer those of a distribution: torch says so of tensors
    nobody knows.
    """
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise FloatingPointError(
            f"{name} diverged: learning_rate={settings.learning_rate:g} is too large for this "
            "model, take a tenth of it"
        ) from error


_SETTLED = 0.5  # of a standard deviation, or of a variance
_UNSETTLED = 0.1  # share of coordinates


def _is_settled(model: BayesianModel, posterior: Posterior) -> bool:
    """Say whether the ELBO is as good as flat along shifts and scales of nearly every coordinate.

    At its height E u = E (theta - c) u = 0 with u = grad (log_joint - log q), for every coordinate,
    which a fit that was stopped early, or whose steps are of another size than the posterior, does
    not meet. Of a normal law the first is the distance to its mean in its own units, the second 1
    less the ratio of the variances.
    """
    theta = (
        posterior.sample(_CHECKED, torch.Generator(model.device).manual_seed(0))
        .detach()
        .requires_grad_()
    )
    with torch.enable_grad():
        (grad_q,) = torch.autograd.grad(posterior.log_prob(theta).sum(), theta)
    theta = theta.detach()
    with torch.no_grad():
        u = (model.log_joint_and_grad(theta)[1] - grad_q).double()
        offset = theta.double() - theta.double().mean(0)
        terms = torch.stack([offset.std(0) * u, offset * u])  # (2, draws, dim)
        excess = terms.mean(1).abs() - 4 * terms.std(1) / math.sqrt(_CHECKED)
    return float((~(excess <= _SETTLED)).any(0).double().mean()) <= _UNSETTLED


_CHECKED = 256  # draws


def independent_draws(
    model: BayesianModel, run: Run, posterior: Posterior, info: dict[str, Any]
) -> Draws:
    """Return draws of a fitted density, shaped as chains, and its ELBO with its standard error."""
    chains, draws = run.chains or 4, run.draws or 1000
    theta = posterior.sample(chains * draws, run.generator)
    log_joint = model.log_joint(theta)
    gain = log_joint - posterior.log_prob(theta)
    error = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
    info = {
        "elbo": float(gain.mean()),
        "elbo_error": error,
        "converged": _is_settled(model, posterior),
    } | info
    broken = int((~gain.isfinite()).sum())
    if broken == len(gain):
        raise FloatingPointError(
            "the fit diverged: no draw of it has a finite density; take a tenth of learning_rate"
        )
    if broken or info["elbo"] < info["elbo_start"] - 1 - abs(info["elbo_start"]):
        info["diverged"] = True
        warn(
            f"the fit diverged: its ELBO is {info['elbo']:.4g}, {info['elbo_start']:.4g} when it "
            f"began, and log_joint is not finite at {broken} of {len(gain)} draws; take a smaller "
            "learning_rate or scale"
        )
    return Draws(
        theta.unflatten(0, (chains, draws)),
        log_joint.reshape(chains, draws),
        posterior=posterior,
        info=info,
    )
