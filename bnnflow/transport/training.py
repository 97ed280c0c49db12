"""Conditional flow matching from the prior to posterior draws."""

from __future__ import annotations

import copy
import math
import time
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from bnnflow.draws import Draws, as_theta
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator, isolated
from bnnflow.transport.coordinates import Context
from bnnflow.transport.couplings import Coupling, Independent, source_symmetries
from bnnflow.transport.displacement import GaussNewton, GradientSteps
from bnnflow.transport.flow import Flow
from bnnflow.transport.velocity import InformedVelocity, WeightsVelocity, bound
from bnnflow.types import Seed

__all__ = ["fit_flow"]

_STABLE = 0.7  # fraction of training at the full learning rate; it then decays to zero


def fit_flow(
    model: BayesianModel,
    draws: Draws | Tensor | tuple[Tensor, Tensor | None],
    *,
    velocity: Literal["informed", "weights"] | nn.Module = "informed",
    coupling: Coupling | None = None,
    budget: float = 120.0,
    steps: int | None = None,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    seed: Seed = 0,
    progress: bool = True,
) -> Flow:
    """Fit a transport from the prior to posterior draws by conditional flow matching (Lipman et al. 2023).

    Minimises E |v(t, (1 - t) x0 + t x1) - (x1 - x0)|^2 over pairs of a `Coupling`, whose minimiser is the marginal
    field that carries the prior to the posterior. Works in the prior's standard normal coordinates, and moves
    every pair by a random symmetry that keeps the prior. The weights returned are an exponential moving average.

    Args:
        model: the posterior.
        draws: from it: `Draws`, weights ``(..., dim)``, or a pair (weights, log weights).
        velocity: ``"informed"`` sees the gradient of the likelihood: far more accurate on sharp posteriors, several
            gradients an evaluation. ``"weights"`` sees weights only: cheapest to sample. Or a field of your own.
        coupling: `Independent` unless said otherwise; `Matched` straightens the paths.
        budget: seconds of training, unless ``steps`` says how many.
        steps: optimiser steps; with them the same seed gives the same flow, on CPU bit for bit. A flow fitted by
            budget keeps its number in ``flow.info["steps"]``.
        batch_size: pairs a step.
        learning_rate: of AdamW.
        seed: an int or a generator.
        progress: show a bar at a terminal.

    Returns:
        The flow; after Ctrl-C as far as it got, with ``info["interrupted"]`` set.

    Raises:
        ValueError: if there are no draws, they do not fit the model or are not finite, or the network's weights
            cannot be labelled and no field of your own is given.
    """
    theta, log_weights = as_theta(draws)
    model.spec.check(theta)
    theta = theta.to(model.device, model.dtype)
    finite = theta.isfinite().all(-1)
    if len(theta) == 0 or not bool(finite.all()):
        raise ValueError(f"fit_flow needs finite draws; {int((~finite).sum())} of {len(theta)} are NaN or infinite")
    if (steps is not None and steps < 1) or not budget > 0:
        raise ValueError("steps must be at least 1 and budget positive")
    context = Context(model)
    targets = model.flat_prior.to_normal(theta)
    weights = None if log_weights is None else log_weights.double().softmax(0)
    coupling = coupling if coupling is not None else Independent()
    generator = as_generator(seed, model.device)
    with isolated(generator):
        field = bound(_field(velocity, model).to(model.device, model.dtype).train(), context)
    trainer = _Trainer(field, learning_rate)
    group = source_symmetries(model)
    started, cpu = time.perf_counter(), time.process_time()
    total, interrupted = steps, False
    with progress_bar(total, "flow", progress, "step") as bar:
        try:
            while total is None or trainer.count < total:
                if total is None and trainer.count % 7 == 0 and trainer.count > 0:
                    spent = time.perf_counter() - started
                    if spent > _STABLE * budget:
                        bar.total = total = trainer.count * 10 // 7
                        continue
                if weights is None:
                    rows = torch.randint(len(targets), (batch_size,), generator=generator, device=model.device)
                else:
                    rows = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
                x0 = torch.randn(batch_size, model.dim, generator=generator, device=model.device, dtype=model.dtype)
                x0, x1 = coupling.pair(x0, targets[rows], model.spec, group, generator)
                t = _times(batch_size, generator, model.device, model.dtype)
                loss = trainer.step(t, x0, x1, _rate(trainer.count, total))
                bar.update()
                if not bar.disable and trainer.count % 20 == 0:
                    left = f"{max(0.0, budget - time.perf_counter() + started):.0f}s" if steps is None else ""
                    bar.set_postfix(loss=f"{float(loss):.1f}", left=left)
        except KeyboardInterrupt:
            if trainer.count == 0:
                raise
            interrupted = True
            warnings.warn(f"interrupted: returning the flow after {trainer.count} steps", stacklevel=2)
    info = {
        "steps": trainer.count,
        "seed": seed if isinstance(seed, int) else "generator",
        "batch_size": batch_size,
        "coupling": type(coupling).__name__,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "loss": trainer.loss,
        "parameters": sum(p.numel() for p in field.parameters()),
        "interrupted": interrupted,
    }
    return Flow.of(trainer.average, model, info=info)


def _field(velocity: str | nn.Module, model: BayesianModel) -> nn.Module:
    if isinstance(velocity, nn.Module):
        return copy.deepcopy(bound(velocity, None)).requires_grad_()
    if velocity == "weights":
        return WeightsVelocity(model.spec)
    if velocity == "informed":
        linearises = model.likelihood.kind == "regression" and hasattr(model.likelihood, "fisher_factor")
        return InformedVelocity(model.spec, GaussNewton() if linearises else GradientSteps())
    raise ValueError(f"velocity must be 'informed', 'weights' or a module, got {velocity!r}")


def _times(n: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw times in [0, 1): 70 % uniform, 30 % log-uniform towards 1, where sharp posteriors have their error."""
    u, which = torch.rand(2, n, generator=generator, device=device, dtype=dtype)
    late = 1 - 10 ** (-2 * u)
    return torch.where(which < 0.7, u, late)


def _rate(count: int, total: int | None) -> float:
    """Return the learning rate as a fraction: linear warm-up, constant, then a cosine to zero.

    While ``total`` is still unknown training is in the constant part, so that a run by budget can be repeated by its
    number of steps.
    """
    warm = min(1.0, (count + 1) / 100)
    if total is None or count < _STABLE * total:
        return warm
    done = (count - _STABLE * total) / ((1 - _STABLE) * total)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class _Trainer:
    """The field, its optimiser and its moving average."""

    def __init__(self, field: nn.Module, learning_rate: float) -> None:
        self._field = field
        self._learning_rate = learning_rate
        self._parameters = [p for p in field.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self._parameters, learning_rate, weight_decay=1e-3, foreach=True)
        self._averages = [p.detach().clone() for p in self._parameters]
        self.count = 0
        self.loss = math.nan

    def step(self, t: Tensor, x0: Tensor, x1: Tensor, rate: float) -> Tensor:
        """Take one step on the flow-matching loss; a step whose gradient is not finite is skipped."""
        for group in self._optimiser.param_groups:
            group["lr"] = self._learning_rate * rate
        x_t = torch.lerp(x0, x1, t.unsqueeze(-1))
        loss = (self._field(t, x_t) - (x1 - x0)).square().sum(-1).mean()
        self._optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, 30.0)
        self.count += 1
        if bool(norm.isfinite()):
            self._optimiser.step()
            decay = min(0.998, self.count / (self.count + 20))
            for average, parameter in zip(self._averages, self._parameters, strict=True):
                average.lerp_(parameter.detach(), 1 - decay)
            value = float(loss.detach())
            self.loss = value if math.isnan(self.loss) else self.loss + 0.01 * (value - self.loss)
        return loss.detach()

    @property
    def average(self) -> nn.Module:
        """The field with its averaged weights."""
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.data.copy_(average)
        return self._field.requires_grad_(False)
