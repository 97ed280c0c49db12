"""From posterior draws to a flow: `fit_flow`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bnnflow.arguments import checked
from bnnflow.draws import Draws, as_theta
from bnnflow.equivariant.signed import has_signs
from bnnflow.identity import digest, seed_identity
from bnnflow.model import BayesianModel
from bnnflow.options import Checkpoint, Training
from bnnflow.ranks import connect
from bnnflow.seeding import as_generator, isolated, seed_in_words
from bnnflow.transport.batches import Reuse
from bnnflow.transport.couplings import Coupling, Independent
from bnnflow.transport.field import Field
from bnnflow.transport.flow import Flow
from bnnflow.transport.options import Matching
from bnnflow.transport.paths import AffinePath, ProbabilityPath
from bnnflow.transport.proximal_step import GaussNewton, GradientSteps
from bnnflow.transport.source import Source
from bnnflow.transport.targets import ROWS, PosteriorTargets, obeys_stein
from bnnflow.transport.training import Task, described, run
from bnnflow.transport.velocity import InformedVelocity, ResidualVelocity, WeightsVelocity
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.types import Architecture, Seed
from bnnflow.weights import NO_SYMMETRY, Symmetries, WeightSpec

__all__ = ["fit_flow"]

# rows times weights of a gradient for every pair, beyond which fields of weights go without
_AFFORDABLE = 2**20

Given = Draws | Tensor | tuple[Tensor, Tensor | None]
"""Draws, weights ``(..., dim)``, or a pair (weights, log weights)."""


@checked
def fit_flow(
    model: BayesianModel,
    draws: Given,
    *,
    velocity: Literal["informed", "weights", "residual"] | nn.Module = "informed",
    source: Source | None = None,
    matching: Matching | None = None,
    training: Training | None = None,
    held_out: Draws | Tensor | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> Flow:
    """Fit a transport from the prior to posterior draws by conditional flow matching (Lipman et al.
    2023).

    Minimises E |v(t, x_t) - dx_t/dt|^2 over pairs of a coupling on a path, whose minimiser is the
    marginal field that carries the source to the posterior. Works in the coordinates in which the
    source is N(0, I), and moves every pair by a random symmetry that keeps the source, unless the
    field declares that it has none. The weights returned are an exponential moving average. Under
    ``torchrun`` every process takes its share of the batch.

    Args:
        model: the posterior.
        draws: from it: `Draws`, weights ``(..., dim)``, or a pair (weights, log weights). Take
            many: a field that has met each of them fifty times begins to fit them in place of the
            posterior.
        velocity: ``"informed"`` sees the gradient of the likelihood: far more accurate on sharp
            posteriors, several gradients an evaluation. ``"weights"`` sees weights only: cheapest
            to sample. ``"residual"`` corrects the closed form of a Gaussian fit, for aligned draws.
            The network of the first two is a `SignedDWSNet` where the source keeps signs of all
            hidden units (tanh, an even prior), else a `DWSNet`. Or a field of your own.
        source: the law at t = 0; the prior if None.
        matching: coupling, path, times and targets of the pairs; the defaults of `Matching` if
            None.
        training: how long and how fast: by default 120 seconds, with Muon at a learning rate of
            3e-3. A flow fitted by budget keeps its number of steps in ``flow.info["steps"]``.
        held_out: draws that are not trained on, best of chains of their own: the state with the
            lowest loss on them is kept, and training ends when it has not fallen for
            ``training.patience`` looks, one every 100 steps.
        checkpoint: a file that keeps the state of training, written every minute and at the end;
            ``.npz`` is appended if it has no suffix. A `Checkpoint` with ``resume`` goes on from
            it; with a number of steps, bit for bit on CPU. Only ``budget``, ``steps`` and
            ``patience`` may change.
        seed: an int or a generator.
        progress: show a bar at a terminal, with the loss for each quarter of the time.

    Returns:
        The flow; after Ctrl-C as far as it got, with ``info["interrupted"]`` set.

    Raises:
        ValueError: if there are no draws, they do not fit the model or are not finite, or the
            network's weights cannot be labelled and no field of your own is given; if
            ``targets="posterior"`` and the draws are not the posterior's, or not paired
            independently; if another run works on the checkpoint, or it holds a training that is
            another one or is not to be resumed.
    """
    theta, log_weights = _checked(model, draws, "draws")
    given_seed = seed_identity(seed)
    matching = matching or Matching()
    source = Source(model.flat_prior) if source is None else source
    posterior = WhitenedPosterior(model, source)
    x1 = source.to_normal(theta)
    generator = as_generator(seed, model.device)
    with isolated(generator):
        field = _field(velocity, model, source, x1, matching.path)
    field = field.to(model.device, model.dtype).train()
    group = source.symmetries(model)
    if field.symmetries is not None and not any(field.symmetries):
        # A field that declares no symmetry is for one mode: spreading that over its orbit would
        # undo the alignment.
        group = NO_SYMMETRY
    pairs = _CoupledDraws(
        x1, _normalised(log_weights), matching.coupling, model.spec, group
    )
    unseen = None
    if held_out is not None:
        unseen = replace(pairs, x1=_held_out(model, held_out, source), weights=None)
    path = matching.path if matching.path is not None else field.path
    identity = {
        "model": model.fingerprint(),
        "draws": digest((theta, log_weights)),
        "held-out draws": None if held_out is None else digest(as_theta(held_out)),
        "seed": given_seed,
        "velocity": velocity if isinstance(velocity, str) else type(velocity).__name__,
        "coupling": described(matching.coupling),
        "path": described(path),
        "source": digest((source.describe(), source.arrays())),
        "targets": matching.targets,
    }
    field = field.bind(posterior)
    way = _with_targets(matching.targets, path, field, pairs, posterior, generator)
    reuse = Reuse(matching.reuse, partial(model.spec.transform, group))
    task = Task(field, pairs, way, matching.times, reuse, unseen)
    ranks = connect(model.device)
    # of the draws each process may hold a part
    shared = {name: value for name, value in identity.items() if "draws" not in name}
    ranks.check_same(shared | {"training": training}, model.device)
    info = run(
        task, training, checkpoint, generator, progress, ranks=ranks, identity=identity
    )
    info |= {
        "seed": seed_in_words(seed),
        "coupling": type(matching.coupling).__name__,
        "targets": "posterior" if isinstance(way, PosteriorTargets) else "pairs",
    }
    return Flow.of(field, model, source, info=info)


@dataclass(frozen=True)
class _CoupledDraws:
    """Pairs of source and posterior draws, in the coordinates in which the source is N(0, I)."""

    x1: Tensor  # (draws, dim)
    weights: Tensor | None  # (draws,), of the draws; equal ones if None
    coupling: Coupling
    spec: WeightSpec
    group: Symmetries

    def __call__(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw pairs, ``(n, dim)`` both."""
        like = {"generator": generator, "device": self.x1.device}
        if self.weights is None:
            rows = torch.randint(len(self.x1), (n,), **like)
        else:
            rows = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        x0 = torch.randn(n, self.x1.shape[1], dtype=self.x1.dtype, **like)
        return self.coupling.pair(x0, self.x1[rows], self.spec, self.group, generator)


def _normalised(log_weights: Tensor | None) -> Tensor | None:
    return None if log_weights is None else log_weights.double().softmax(0)


def _held_out(model: BayesianModel, held_out: Draws | Tensor, source: Source) -> Tensor:
    theta, log_weights = _checked(model, held_out, "held_out")
    if log_weights is not None:
        raise ValueError("held_out must be draws of equal weights")
    return source.to_normal(theta)


def _checked(model: BayesianModel, draws: Given, what: str) -> tuple[Tensor, Tensor | None]:
    theta, log_weights = as_theta(draws, what)
    model.spec.check(theta, what)
    model.check_draws(draws)
    theta = theta.to(model.device, model.dtype)
    finite = theta.isfinite().all(-1)
    if len(theta) == 0 or not bool(finite.all()):
        raise ValueError(
            f"fit_flow needs finite {what}; {int((~finite).sum())} of {len(theta)} "
            "are NaN or infinite"
        )
    return theta, log_weights


def _field(
    velocity: str | nn.Module,
    model: BayesianModel,
    source: Source,
    x1: Tensor,
    path: AffinePath | None,
) -> Field:
    if isinstance(velocity, nn.Module):
        return copy.deepcopy(Field.of(velocity).bind(None)).requires_grad_()
    signed = has_signs(model.spec) and source.symmetries(model).sign >= set(
        model.spec.widths
    )
    architecture: Architecture = "signed" if signed else "dws"
    if velocity == "weights":
        return WeightsVelocity(model.spec, architecture=architecture, path=path)
    if velocity == "residual":
        return ResidualVelocity.fit(model.spec, x1, path=path)
    if velocity == "informed":
        linearises = (
            model.likelihood.kind == "regression" and model.likelihood.has_fisher_factor
        )
        proximal_step = GaussNewton(2) if linearises else GradientSteps()
        return InformedVelocity(
            model.spec, proximal_step, architecture=architecture, path=path
        )
    raise ValueError(
        f"velocity must be 'informed', 'weights', 'residual' or a module, got {velocity!r}"
    )


def _with_targets(
    targets: str,
    path: ProbabilityPath,
    field: Field,
    pairs: _CoupledDraws,
    posterior: WhitenedPosterior,
    generator: torch.Generator,
) -> ProbabilityPath:
    """Return the path with the targets asked for: those of the posterior, if ``"auto"``, only where
    they are sound.
    """
    if targets == "pairs":
        return path
    model = posterior.model
    price = min(len(model.x), ROWS) * model.dim
    # Without a symmetry the draws have been aligned, most likely, and are then no draws of the
    # whole posterior.
    doubtful = not any(pairs.group) and any(model.spec.symmetries())
    if targets == "auto" and (doubtful or (price > _AFFORDABLE and not field.informed)):
        return path
    if not isinstance(pairs.coupling, Independent):
        why = "the pairs are not independent"
    elif not isinstance(path, AffinePath) or path.sigma:
        why = "the path is not affine, or has noise of its own"
    elif not obeys_stein(posterior, x1 := pairs(2048, generator)[1]):
        why = (
            "the draws disagree with Stein's identity: they are draws of another posterior"
        )
    else:
        newton = any(
            isinstance(each, GaussNewton) and each.iterations is None
            for each in field.proximal_steps
        )
        return PosteriorTargets(path, posterior, pairs.group, x1, generator, newton=newton)
    if targets == "posterior":
        raise ValueError(f"targets='posterior' is not possible: {why}")
    return path
