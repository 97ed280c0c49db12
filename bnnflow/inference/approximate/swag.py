"""Stochastic weight averaging, Gaussian: what a constant-rate SGD trajectory visits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.forward_mode import jvp
from bnnflow.gaussian import positive
from bnnflow.inference.start import first_points, maximise, of_divergence, of_interrupt
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.posteriors import LowRankGaussian, Mixture
from bnnflow.progress import Steps, progress_bar, until_interrupted

__all__ = ["SWAG"]

# nats a weight below its mode, as ten posterior standard deviations in every direction would be
_FAR = 50.0


@dataclass(frozen=True)
class SWAG(Method):
    """Fit Gaussians to trajectories of SGD (Maddox et al. 2019), several at once (MultiSWAG: Wilson
    and Izmailov 2020).

    Each member climbs to a mode by Adam, or begins at a network that ``init`` gives, then follows
    theta <- theta + (rate / n) grad log_joint on mini-batches at a constant rate. Its ``snapshots``
    have mean m and deviations D; the member is N(m, (diag(var) + D D^T / (rank - 1)) / 2) with the
    last ``rank`` deviations. Approximates the posterior by the mixture of its members; how well
    depends on the noise of the mini-batches and the rate, and nothing is left invariant. The
    mixture's density is at ``draws.posterior``; chain i of the draws comes from member i.

    The default rate is that at which the stationary law of SGD comes closest to the posterior, 2
    dim / trace of the gradient's covariance (Mandt, Hoffman and Blei 2017), but never more than a
    quarter of 2 / (largest curvature), at which SGD becomes unstable; both are measured at each
    member's mode. ``draws.info["converged"]`` is False where the mean of a member is nowhere near a
    mode, because ``steps`` were too few, or of another size than the weights.

    Args:
        members: independent trajectories; where ``init`` gives several networks, one for each of
            them.
        rank: deviations that are kept, at least 2.
        snapshots: points of a trajectory that are averaged, at least ``rank``.
        every: SGD steps between two snapshots.
        steps: Adam steps before.
        learning_rate: of SGD, on the mean log_joint of a row of data; None measures it, see above.
        batch_size: rows in a mini-batch; None takes a tenth of the data, 128 at most.
    """

    refused = ("chains", "warmup", "checkpoint")

    members: int = 4
    rank: int = 20
    snapshots: int = 50
    every: int = 20
    steps: int = 2000
    learning_rate: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        settle(self, integer, "members", "every", "steps", "batch_size", least=1)
        settle(self, integer, "rank", least=2)
        settle(self, integer, "snapshots", least=self.rank)
        settle(self, number, "learning_rate", above=0)

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Train and draw, 250 from each member unless said otherwise; see `bnnflow.sample`."""
        run.refuse(self, "members and draws")
        n, generator = len(model.x), run.generator
        batch_size = self.batch_size or max(1, min(128, n // 10))
        # refuses a batch larger than the data
        model.random_rows((1,), generator, batch_size)
        theta = first_points(model, run.init, self.members, generator)
        given = isinstance(run.init, Tensor)
        if not given:
            theta = maximise(model, theta, self.steps, 0.01, run.progress, "SWAG: modes")
        with torch.no_grad():
            # (members, 1), on the summed log_joint
            rate = self._rate(model, theta, generator, batch_size)
            trajectory, restarts, taken = self._trajectory(
                model, theta, rate, generator, batch_size, run.progress
            )
            settled = _to_gain(model, trajectory.mean(0)) < _FAR * model.dim
        diverged = of_divergence(self, restarts > 0, self.learning_rate)
        members = Mixture(
            tuple(gaussian_of_snapshots(each, self.rank) for each in trajectory.unbind(1))
        )
        draws = run.draws or 250
        theta = torch.stack(
            [member.sample(draws, generator) for member in members.components]
        )
        info = {
            "gradients_per_chain": (0 if given else self.steps)
            + taken.done * self.every * batch_size / n,
            "learning_rate": (rate.flatten() * n).tolist(),
            "batch_size": batch_size,
            "restarts": int(restarts.sum()),
            "converged": bool(settled.all()),
        }
        info |= diverged | of_interrupt(self, taken, f"{self.snapshots} snapshots")
        return Draws(theta, model.log_joint(theta), posterior=members, info=info)

    def _rate(
        self,
        model: BayesianModel,
        theta: Tensor,
        generator: torch.Generator,
        batch_size: int,
    ) -> Tensor:
        if self.learning_rate is not None:
            return torch.full_like(theta[:, :1], self.learning_rate / len(model.x))
        grads = torch.stack(
            [
                model.minibatch_log_joint_and_grad(theta, generator, batch_size)[1]
                for _ in range(20)
            ]
        )
        noise = grads.var(0).sum(-1, keepdim=True)
        direction = torch.randn(
            theta.shape, generator=generator, device=theta.device, dtype=theta.dtype
        )
        size = direction.norm(dim=-1, keepdim=True)
        for _ in range(20):  # power iteration on the Hessian
            direction = direction / size
            direction = jvp(
                lambda at: model.log_joint_and_grad(at)[1], (theta,), (direction,)
            )[1]
            size = direction.norm(dim=-1, keepdim=True)
        # all rows in a batch have no noise
        return torch.minimum(2 * model.dim / noise, 0.5 / size)

    def _trajectory(
        self,
        model: BayesianModel,
        theta: Tensor,
        rate: Tensor,
        generator: torch.Generator,
        batch_size: int,
        progress: bool,
    ) -> tuple[Tensor, Tensor, Steps]:
        """Return the snapshots ``(snapshots, members, dim)``, how often each member had left,
        ``(members,)``, and how many stretches between snapshots were taken.

        One that has left begins again at its mode. Ctrl-C ends the trajectory where it is, once
        there are two snapshots to tell a width by.
        """
        home, kept, restarts = (
            theta,
            [],
            torch.zeros(len(theta), dtype=torch.int64, device=theta.device),
        )
        lowest = model.log_joint(home) - _FAR * model.dim
        total = self.snapshots * self.every
        with (
            progress_bar(total, "SWAG", progress, "step") as bar,
            until_interrupted(least=2) as taken,
        ):
            for step in range(1, total + 1):
                grad = model.minibatch_log_joint_and_grad(theta, generator, batch_size)[1]
                theta = theta + rate * grad
                lost = ~theta.isfinite().all(-1)
                if step % self.every == 0:
                    lost |= ~(model.log_joint(theta) >= lowest)
                if bool(lost.any()):
                    restarts += lost
                    theta = torch.where(lost[:, None], home, theta)
                if step % self.every == 0:
                    kept.append(theta)
                    taken.done = len(kept)
                bar.update()
        return torch.stack(kept), restarts, taken


def gaussian_of_snapshots(points: Tensor, rank: int) -> LowRankGaussian:
    """Fit one member to its snapshots ``(snapshots, dim)``, half diagonal and half of low rank."""
    mean = points.mean(0)
    deviations = (points - mean)[-rank:]  # fewer after an interrupt
    variance = positive(points.var(0, correction=0))
    return LowRankGaussian(
        mean,
        deviations.T.contiguous() / math.sqrt(2 * (len(deviations) - 1)),
        0.5 * variance,
    )


def _to_gain(model: BayesianModel, theta: Tensor) -> Tensor:
    """Return the nats that the best step along the gradient gains, were log_joint quadratic,
    ``(n, dim) -> (n,)``.
    """
    grad = model.log_joint_and_grad(theta)[1]
    size = grad.norm(dim=-1, keepdim=True)
    along = torch.where(size > 0, grad / size, 0.0)
    curved = jvp(lambda at: model.log_joint_and_grad(at)[1], (theta,), (along,))[1]
    curvature = (curved * along).sum(-1).double().abs()
    return torch.where(
        size.squeeze(-1) > 0, 0.5 * size.squeeze(-1).double().square() / curvature, 0.0
    )
