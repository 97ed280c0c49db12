"""Conditional flow matching: from pairs to a field, and from posterior draws to a flow."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bnnflow import storage
from bnnflow.arguments import Count, Positive, checked
from bnnflow.draws import Draws, as_theta
from bnnflow.equivariant.signed import has_signs
from bnnflow.identity import Identity, digest, seed_identity
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.ranks import ALONE, Ranks, connect
from bnnflow.seeding import as_generator, isolated
from bnnflow.transport.coordinates import Context
from bnnflow.transport.couplings import Coupling, Independent
from bnnflow.transport.displacement import GaussNewton, GradientSteps
from bnnflow.transport.field import Field, check_field
from bnnflow.transport.flow import Flow
from bnnflow.transport.paths import AffinePath, ProbabilityPath
from bnnflow.transport.source import Source
from bnnflow.transport.targets import ROWS, InformedPath, obeys_stein
from bnnflow.transport.times import Times, TowardsEnd
from bnnflow.transport.velocity import InformedVelocity, ResidualVelocity, WeightsVelocity
from bnnflow.types import Architecture, Optimiser, Seed
from bnnflow.warn import warn
from bnnflow.weights import NO_SYMMETRY, Symmetries

__all__ = ["fit_flow", "train"]

_STABLE = 0.7  # fraction of training at the full learning rate; it then decays to zero
_BINS = 4  # of the times by which the loss is reported
_CHECK = 100  # steps between looks at the held-out draws
_FOLLOWED = 4  # steps between updates of averages after the first hundred: of small tensors, they are dear
SECONDS = 60.0
"""Time between two states on disk."""
_VERSION = 3  # of a checkpoint; 2 did not say what it was a state of
_LONGEST = 30.0  # norm of a gradient
_DECAY = 1e-3  # of weights
_POOL = 64  # batches that are drawn together if they are used again,
_ELEMENTS = 2**28  # as far as they have no more numbers than these
_AFFORDABLE = 2**20  # rows times weights of a gradient for every pair, beyond which fields of weights go without

Weighting = Callable[[Tensor], Tensor]
Pairs = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""``(n, generator) -> x0 (n, dim), x1 (n, dim)``."""
Moves = Callable[..., tuple[Tensor, ...]]
"""``(seed, *points (n, dim)) -> points``: each row of all of them moved by one random symmetry."""


@checked
def fit_flow(
    model: BayesianModel,
    draws: Draws | Tensor | tuple[Tensor, Tensor | None],
    *,
    velocity: Literal["informed", "weights", "residual"] | nn.Module = "informed",
    coupling: Coupling | None = None,
    path: AffinePath | None = None,
    source: Source | None = None,
    times: Times | None = None,
    targets: Literal["auto", "posterior", "pairs"] = "auto",
    budget: Positive = 120.0,
    steps: Count | None = None,
    batch_size: Count = 256,
    reuse: Count = 1,
    learning_rate: Positive = 3e-3,
    optimiser: Optimiser = "muon",
    held_out: Draws | Tensor | None = None,
    patience: Count = 20,
    autocast: bool = False,
    compile: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    seed: Seed = 0,
    progress: bool = True,
) -> Flow:
    """Fit a transport from the prior to posterior draws by conditional flow matching (Lipman et al. 2023).

    Minimises E |v(t, x_t) - dx_t/dt|^2 over pairs of a `Coupling` on a path, whose minimiser is the marginal field
    that carries the source to the posterior. Works in the coordinates in which the source is N(0, I), and moves every
    pair by a random symmetry that keeps the source, unless the field declares that it has none. The weights returned
    are an exponential moving average. Under ``torchrun`` every process takes its share of the batch.

    Args:
        model: the posterior.
        draws: from it: `Draws`, weights ``(..., dim)``, or a pair (weights, log weights). Take many: a field that has
            met each of them fifty times begins to fit them in place of the posterior.
        velocity: ``"informed"`` sees the gradient of the likelihood: far more accurate on sharp posteriors, several
            gradients an evaluation. ``"weights"`` sees weights only: cheapest to sample. ``"residual"`` corrects the
            closed form of a Gaussian fit, for aligned draws. The network of the first two is a `SignedDWSNet` where the
            source keeps signs of all hidden units (tanh, an even prior), else a `DWSNet`. Or a field of your own.
        coupling: `Independent` unless said otherwise; `Matched` straightens the paths.
        path: of the pairs; that of the field unless said otherwise, and else linear.
        source: the law at t = 0; the prior if None.
        times: at which the field is trained; a third of them near the end unless said otherwise.
        targets: what the field is fitted to. ``"pairs"``: the velocity of each pair. ``"posterior"``: estimates of the
            same mean that know the posterior's gradient and symmetries, see `InformedPath`, a fifth of the noise or
            less; the draws must be the posterior's and the coupling independent. ``"auto"``: these where they are
            valid, as far as Stein's identity can tell, and cheap.
        budget: seconds of training, unless ``steps`` says how many.
        steps: optimiser steps; with them the same seed gives the same flow, on CPU bit for bit. A flow fitted by
            budget keeps its number in ``flow.info["steps"]``.
        batch_size: pairs a step, of all processes together.
        reuse: steps that see each pair, every time moved by another random symmetry. What a field computes of a point
            before anything that it learns, and the target there, are computed once and move along: above 1 where these
            are most of a step, as with Gauss-Newton displacements.
        learning_rate: at its height.
        optimiser: ``"muon"``: Muon (Jordan et al. 2024) for matrices, its updates scaled to the size of AdamW's, and
            AdamW for all else; or ``"adamw"`` for all, better for small changes of a trained field.
        held_out: draws that are not trained on, best of chains of their own: the state with the lowest loss on them is
            kept, and training ends when it does not fall any more.
        patience: looks at the held-out draws, one every 100 steps, without a lower loss before that.
        autocast: compute the field in bfloat16.
        compile: compile the field.
        checkpoint: a file that keeps the state of training, written every minute and at the end; ``.npz`` is appended
            if it has no suffix. One that holds a training already needs ``resume``.
        resume: go on from the checkpoint if it is there; with ``steps``, bit for bit on CPU. Only ``budget``,
            ``steps`` and ``patience`` may change.
        seed: an int or a generator.
        progress: show a bar at a terminal, with the loss for each quarter of the time.

    Returns:
        The flow; after Ctrl-C as far as it got, with ``info["interrupted"]`` set.

    Raises:
        ValueError: if there are no draws, they do not fit the model or are not finite, or the network's weights
            cannot be labelled and no field of your own is given; if ``targets="posterior"`` and the draws are not the
            posterior's, or not paired independently.
    """
    theta, log_weights = _checked(model, draws, "draws")
    given_seed = seed_identity(seed)
    source = Source(model.flat_prior) if source is None else source
    x1 = source.to_normal(theta)
    weights = None if log_weights is None else log_weights.double().softmax(0)
    coupling = coupling if coupling is not None else Independent()
    generator = as_generator(seed, model.device)
    with isolated(generator):
        field = _field(velocity, model, source, x1, path).to(model.device, model.dtype).train()
    # A field that declares no symmetry is for one cloud: spreading that over its orbit would undo the alignment.
    group = NO_SYMMETRY if field.symmetries is not None and not any(field.symmetries) else source.symmetries(model)

    def pairs_of(x1: Tensor, weights: Tensor | None) -> Pairs:
        def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            if weights is None:
                rows = torch.randint(len(x1), (n,), generator=generator, device=x1.device)
            else:
                rows = torch.multinomial(weights, n, replacement=True, generator=generator)
            x0 = torch.randn(n, model.dim, generator=generator, device=x1.device, dtype=x1.dtype)
            return coupling.pair(x0, x1[rows], model.spec, group, generator)

        return pairs

    context, pairs = Context(model, source), pairs_of(x1, weights)
    unseen = None
    if held_out is not None:
        others, other_weights = _checked(model, held_out, "held_out")
        if other_weights is not None:
            raise ValueError("held_out must be draws of equal weights")
        unseen = pairs_of(source.to_normal(others), None)
    along = path if path is not None else field.path
    identity = {
        "model": model.fingerprint(),
        "draws": digest((theta, log_weights)),
        "held-out draws": None if held_out is None else digest(as_theta(held_out)),
        "seed": given_seed,
        "velocity": velocity if isinstance(velocity, str) else type(velocity).__name__,
        "coupling": _told(coupling),
        "path": _told(along),
        "source": digest((source.describe(), source.arrays())),
        "targets": targets,
    }
    field = field.bind(context)
    along = _with_targets(targets, along, field, coupling, group, context, pairs, generator)
    _, info = train(
        field, pairs, path=along, times=times, budget=budget, steps=steps, batch_size=batch_size,
        reuse=reuse, moves=partial(model.spec.transform, group), learning_rate=learning_rate, optimiser=optimiser,
        held_out=unseen, patience=patience, autocast=autocast, compile=compile, checkpoint=checkpoint, resume=resume,
        seed=generator, progress=progress, ranks=connect(model.device), identity=identity,
    )  # fmt: skip
    info |= {
        "seed": seed if isinstance(seed, int) else "generator",
        "coupling": type(coupling).__name__,
        "targets": "posterior" if isinstance(along, InformedPath) else "pairs",
    }
    return Flow.of(field, model, source, info=info)


@checked
def train(
    field: nn.Module,
    pairs: Pairs,
    *,
    path: ProbabilityPath | None = None,
    times: Times | None = None,
    budget: Positive = 120.0,
    steps: Count | None = None,
    batch_size: Count = 256,
    reuse: Count = 1,
    moves: Moves | None = None,
    learning_rate: Positive = 3e-3,
    optimiser: Optimiser = "muon",
    held_out: Pairs | None = None,
    patience: Count = 20,
    autocast: bool = False,
    compile: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    seed: Seed = 0,
    progress: bool = True,
    ranks: Ranks = ALONE,
    identity: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train any field on pairs, in place; `fit_flow` is this for the posterior of a model.

    A linear warm-up, a constant stretch and a cosine to zero over the last 30 %; gradients clipped to norm 30, steps
    whose gradient is not finite left out; an exponential moving average of the weights.

    Args:
        field: a `Field`, or an ``nn.Module`` called as ``field(t (batch,), x (batch, dim))``. Squared errors are
            multiplied by the ``loss_weight`` of the path, or else of the field.
        pairs: draws pairs, ``(n, generator) -> (n, dim), (n, dim)``, on the field's device.
        path: how pairs travel; ``field.path`` if None, and else linear.
        times: at which the field is trained.
        budget: see `fit_flow`.
        steps: see `fit_flow`.
        batch_size: see `fit_flow`.
        reuse: see `fit_flow`; above 1 the field is called by its ``from_precomputed``.
        moves: a random symmetry for each row of points, targets and drives, to which the law of the pairs is invariant
            and ``precompute`` equivariant; made at every step with ``reuse`` above 1.
        learning_rate: see `fit_flow`.
        optimiser: see `fit_flow`.
        held_out: draws pairs of draws that are not trained on.
        patience: see `fit_flow`.
        autocast: see `fit_flow`.
        compile: see `fit_flow`.
        checkpoint: see `fit_flow`.
        resume: see `fit_flow`.
        seed: an int or a generator.
        progress: show a bar at a terminal.
        ranks: the processes that share the batch.
        identity: what else a run must agree on to go on with a checkpoint, plain values by name. Always compared are
            the field but for its weights, the first batch of the pairs, the times, and all settings but ``budget``,
            ``steps`` and ``patience``.

    Returns:
        The field with its averaged weights, in evaluation mode and without gradients, and how it was trained.

    Raises:
        ValueError: if a setting is out of range; if another run works on the checkpoint; if it holds a training and
            ``resume`` is not set, or is of another training, damaged, or no checkpoint of a training.
    """
    if resume and checkpoint is None:
        raise ValueError("resume=True needs the checkpoint that is to be resumed")
    own_batch = ranks.share("batch_size", batch_size)
    module, field = field, Field.of(field)
    path = field.path if path is None else path
    times = times if times is not None else TowardsEnd()
    first = next(field.parameters(), None)
    if first is None:
        raise ValueError("there is nothing to train: the field, or velocity, has no parameters")
    device = first.device
    seed_of_run = seed_identity(seed)
    shared = as_generator(seed, device)

    def weighting(t: Tensor) -> Tensor:
        weight = path.loss_weight(t)
        return field.loss_weight(t) if weight is None else weight

    fixed = None if held_out is None else _fixed_batch(held_out, path, times, 4 * batch_size, shared)
    generator = ranks.own_generator(shared)
    chance = int(torch.randint(2**62, (), generator=_copy(generator), device=device))
    state = _State(field, learning_rate, optimiser)
    held: contextlib.AbstractContextManager[_Kept | None] = contextlib.nullcontext()
    if checkpoint is not None:
        known = dict(identity or {}) | {
            "field": _structure(field),
            "held-out pairs": None if fixed is None else digest(fixed),
            "way of the pairs": _told(path),
            "times": _told(times),
            "batch_size": batch_size,
            "reuse": reuse,
            "learning_rate": learning_rate,
            "optimiser": optimiser,
            "autocast": autocast,
            "compile": compile,
            "generator": seed_of_run,
        }
        held = _Kept(checkpoint, resume, known, ranks, device)
    with held as kept:
        if kept is not None and kept.saved is not None:
            kept.check_pairs(lambda: pairs(own_batch, _copy(generator)))
            state.load(kept, generator, ranks)
        call: Callable[..., Tensor] = field if reuse == 1 else field.from_precomputed
        call = torch.compile(call) if compile else call
        precision = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
        clock = _Clock(state.seconds, state.cpu_seconds)
        total = steps if steps is not None else state.total
        saved, stopped, interrupted = time.perf_counter(), False, False
        random: bool | None = None  # whether the field draws numbers; not known before it has met a batch

        def draw() -> tuple[Tensor, ...]:
            x0, x1 = pairs(own_batch, generator)
            if kept is not None and kept.pairs is None:
                kept.pairs = digest((x0, x1))
            t = times.sample(own_batch, x0, generator)
            x_t, target = path.point(x0, x1, t, generator)
            return (t, target, x_t) if reuse == 1 else (t, target, x_t, *field.precompute(t, x_t))

        batches = _Batches(draw, reuse, moves, generator, state.count)

        def save() -> None:
            if kept is not None:
                state.seconds, state.cpu_seconds, state.total = clock.seconds, clock.cpu_seconds, total
                state.save(kept, batches.stream, ranks)

        with progress_bar(total, "flow", progress and ranks.rank == 0, "step", initial=state.count) as bar:
            try:
                while (total is None or state.count < total) and not stopped:
                    undecided = total is None and state.count % 7 == 0 and state.count > 0
                    if undecided and ranks.agree(int(clock.seconds > _STABLE * budget), device):
                        bar.total = total = state.count * 10 // 7
                        continue
                    t, target, *given = batches.take()
                    random = check_field(field, t, given[0]) if random is None else random
                    with precision, _chance(random, chance + state.count):
                        errors = (call(t, *given) - target).square().sum(-1)
                    state.step(errors, t, weighting, _rate(state.count, total), ranks)
                    bar.update()
                    if fixed is not None and state.count % _CHECK == 0:
                        stopped = state.look(fixed, weighting, patience)
                    if not bar.disable and state.count % 20 == 0:
                        left = f"{max(0.0, budget - clock.seconds):.0f}s" if steps is None else ""
                        shown = " ".join("-" if value is None else f"{value:.1f}" for value in state.losses)
                        bar.set_postfix(loss=shown, left=left)
                    if kept is not None and time.perf_counter() - saved > SECONDS:
                        save()
                        saved = time.perf_counter()
            except KeyboardInterrupt:
                if state.count == 0:
                    raise
                interrupted = True
                warn(f"interrupted: returning the flow after {state.count} steps")
        save()
    info = {
        "steps": state.count,
        "batch_size": batch_size,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "loss": state.loss,
        "loss_by_time": state.losses,
        "held_out_loss": None if held_out is None else state.lowest,
        "parameters": sum(p.numel() for p in field.parameters()),
        "stopped_early": stopped,
        "interrupted": interrupted,
    }
    state.finish()
    return module, info


def _checked(
    model: BayesianModel, draws: Draws | Tensor | tuple[Tensor, Tensor | None], what: str
) -> tuple[Tensor, Tensor | None]:
    theta, log_weights = as_theta(draws, what)
    model.spec.check(theta, what)
    model.check_draws(draws)
    theta = theta.to(model.device, model.dtype)
    finite = theta.isfinite().all(-1)
    if len(theta) == 0 or not bool(finite.all()):
        raise ValueError(f"fit_flow needs finite {what}; {int((~finite).sum())} of {len(theta)} are NaN or infinite")
    return theta, log_weights


def _field(
    velocity: str | nn.Module, model: BayesianModel, source: Source, x1: Tensor, path: AffinePath | None
) -> Field:
    if isinstance(velocity, nn.Module):
        return copy.deepcopy(Field.of(velocity).bind(None)).requires_grad_()
    signed = has_signs(model.spec) and source.symmetries(model).sign >= set(model.spec.widths)
    architecture: Architecture = "signed" if signed else "dws"
    if velocity == "weights":
        return WeightsVelocity(model.spec, architecture=architecture, path=path)
    if velocity == "residual":
        return ResidualVelocity.fit(model.spec, x1, path=path)
    if velocity == "informed":
        linearises = model.likelihood.kind == "regression" and model.likelihood.has_fisher_factor
        displacement = GaussNewton(2) if linearises else GradientSteps()
        return InformedVelocity(model.spec, displacement, architecture=architecture, path=path)
    raise ValueError(f"velocity must be 'informed', 'weights', 'residual' or a module, got {velocity!r}")


def _with_targets(
    targets: str,
    path: ProbabilityPath,
    field: Field,
    coupling: Coupling,
    group: Symmetries,
    context: Context,
    pairs: Pairs,
    generator: torch.Generator,
) -> ProbabilityPath:
    """Return the path with the targets asked for: those of the posterior, if ``"auto"``, only where they are sound."""
    if targets == "pairs":
        return path
    model = context.model
    price = min(len(model.x), ROWS) * model.dim
    # Without a symmetry the draws have been aligned, most likely, and are then no draws of the whole posterior.
    doubtful = not any(group) and any(model.spec.symmetries())
    if targets == "auto" and (doubtful or (price > _AFFORDABLE and not field.informed)):
        return path
    if not isinstance(coupling, Independent):
        why = "the pairs are not independent"
    elif not isinstance(path, AffinePath) or path.sigma:
        why = "the path is not affine, or has noise of its own"
    elif not obeys_stein(context, x1 := pairs(2048, generator)[1]):
        why = "the draws disagree with Stein's identity for this posterior, they are draws of something else"
    else:
        newton = any(isinstance(each, GaussNewton) and each.iterations is None for each in field.displacements)
        return InformedPath(path, context, group, x1, generator, newton=newton)
    if targets == "posterior":
        raise ValueError(f"targets='posterior' is not possible: {why}")
    return path


def _fixed_batch(
    pairs: Pairs, path: ProbabilityPath, times: Times, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return times, points and their velocities, to compare states of the field on."""
    x0, x1 = pairs(n, generator)
    t = times.sample(n, x0, generator)
    return t, *path.point(x0, x1, t, generator)


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


class _Clock:
    """Seconds of training, those of the runs before included."""

    def __init__(self, seconds: float, cpu_seconds: float) -> None:
        self._began = time.perf_counter() - seconds
        self._cpu_began = time.process_time() - cpu_seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu_began


class _Batches:
    """Batches of points with all that is computed once for each of them.

    Some batches are drawn together and gone through ``reuse`` times, every time in another order and moved by other
    symmetries; without reuse they are drawn one by one. The state of the generator before that is all that is needed to
    draw them again.

    Args:
        draw: a batch: times ``(n,)``, and tensors ``(n, dim)``.
        reuse: how many steps see a point.
        moves: symmetries by which points that are used again are moved.
        generator: of the draws and of the orders.
        count: how many batches have been taken before, since the generator was new.
    """

    def __init__(
        self,
        draw: Callable[[], tuple[Tensor, ...]],
        reuse: int,
        moves: Moves | None,
        generator: torch.Generator,
        count: int,
    ) -> None:
        self._draw, self._reuse, self._moves, self._generator = draw, reuse, moves, generator
        self._points: list[Tensor] = []
        self._orders: list[tuple[Tensor, int]] = []  # rows and a seed of the batches to come, the next one last
        self.stream = generator.get_state()  # from which, with the count, the batches to come follow
        if reuse > 1 and count:
            self._fill()
            left = len(self._orders) - count % len(self._orders)
            if left < len(self._orders):
                del self._orders[left:]
            else:  # the last ones were used up
                self._orders = []
                generator.set_state(self.stream)

    def take(self) -> list[Tensor]:
        """Return the next batch."""
        if self._reuse == 1:
            batch = list(self._draw())
        else:
            if not self._orders:
                self._fill()
            rows, seed = self._orders.pop()
            t, *points = (part[rows] for part in self._points)
            batch = [t, *(points if self._moves is None else self._moves(seed, *points))]
        if not self._orders:
            self.stream = self._generator.get_state()
        return batch

    def _fill(self) -> None:
        """Draw the points of some batches, and the orders in which they come."""
        generator = self._generator
        with torch.no_grad():
            drawn = [self._draw()]
            many = max(1, min(_POOL, _ELEMENTS // sum(part.numel() for part in drawn[0])))
            drawn += [self._draw() for _ in range(many - 1)]
        self._points = [torch.cat(parts) for parts in zip(*drawn, strict=True)]
        n, device = len(self._points[0]), self._points[0].device
        orders = [torch.randperm(n, generator=generator, device=device) for _ in range(self._reuse)]
        rows = [each for order in orders for each in order.chunk(many)]
        seeds = torch.randint(2**62, (len(rows),), generator=generator, device=device)
        self._orders = list(zip(rows, seeds.tolist(), strict=True))


class _Kept:
    """The file that one training is kept in, and works on alone.

    Args:
        checkpoint: the file.
        resume: go on with the training that is there, if there is one.
        identity: what it must agree on.
        ranks: the processes that share it; the first one writes.
        device: by which they exchange messages.

    Raises:
        ValueError: if another run works on the file; if it holds a training and ``resume`` is not set, or holds another
            training, one of an earlier version, or no intact checkpoint of one.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        resume: bool,
        identity: dict[str, Any],
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.file = storage.file_path(checkpoint)
        self._identity = json.loads(json.dumps(identity, default=str))
        self._lock = storage.Lock(self.file, folder=False) if ranks.rank == 0 else None
        ranks.agree(0, device)  # nobody reads what another run may be writing
        self._first = ranks.rank == 0
        self.pairs: str | None = None  # what tells those of the first batch apart
        try:
            self.saved = self._read(resume)
        except BaseException:
            self.__exit__()
            raise

    def _read(self, resume: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        if not self.file.exists():
            return None
        header, arrays = storage.read(self.file, {"training": _VERSION})  # what is none of ours is not replaced
        if not resume:
            raise ValueError(
                f"{self.file} already holds a training: pass resume=True to go on with it, or another file"
            )
        if header["version"] < _VERSION:
            raise ValueError(
                f"{self.file} is of an earlier bnnflow and does not say what it was trained on: begin anew"
            )
        with storage.described(self.file):
            theirs = header["identity"]
            for name, value in self._identity.items():
                if theirs.get(name) != value:
                    raise ValueError(f"holds the training of another {name}: {theirs.get(name)}, not {value}")
        return header, arrays

    def check_pairs(self, first: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Raise ``ValueError`` unless the first batch of the pairs is what it was in the first process."""
        assert self.saved is not None
        self.pairs = self.saved[0].get("pairs")
        if self._first and self.pairs is not None and digest(first()) != self.pairs:
            raise ValueError(f"{self.file} holds the training of other pairs: their first batch differs")

    def write(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Write a state, whole or not at all."""
        header |= {"identity": self._identity, "pairs": self.pairs}
        storage.write(self.file, "training", _VERSION, header, arrays)

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.release()


def _told(value: object) -> str:
    """Return what tells objects apart, with a name for the reader."""
    return f"{type(value).__name__} {digest(value)}"


def _chance(random: bool, seed: int) -> contextlib.AbstractContextManager[None]:
    """Let a field that draws numbers from the global generator draw those of a step, whatever came before."""
    return isolated(torch.Generator().manual_seed(seed)) if random else contextlib.nullcontext()


def _copy(generator: torch.Generator) -> torch.Generator:
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied


def _structure(field: Field) -> str:
    """Return what tells fields apart but for their weights, which are those of the checkpoint."""
    named = dict(field.named_parameters())
    # A field of the caller's own is what its code and its attributes make of its weights.
    described = field.describe() or Identity(named).add(field.bind(None), "field").digest
    parameters = [(name, tuple(p.shape), str(p.dtype)) for name, p in named.items()]
    return f"{type(field).__name__} {digest((described, parameters, dict(field.named_buffers())))}"


class _State:
    """The field, its optimiser, its moving average, and the best of the averages so far."""

    def __init__(self, field: Field, learning_rate: float, optimiser: Optimiser) -> None:
        self._field = field
        self._learning_rate = learning_rate
        self._parameters = [p for p in field.parameters() if p.requires_grad]
        self._optimisers = _optimisers(self._parameters, learning_rate, optimiser)
        self._averages = [p.detach().clone() for p in self._parameters]
        self._best: list[Tensor] | None = None
        self._bins = torch.zeros(2, _BINS, dtype=torch.float64, device=self._parameters[0].device)
        self.lowest, self.patience_used = math.inf, 0
        self.count = 0
        self.total: int | None = None
        self.seconds = self.cpu_seconds = 0.0

    @property
    def losses(self) -> list[float | None]:
        """Recent squared errors for each quarter of the time; None where there was none yet."""
        return [total / count if count else None for total, count in self._bins.T.tolist()]

    @property
    def loss(self) -> float:
        """Recent squared error over all times."""
        return float(self._bins[0].sum() / self._bins[1].sum())

    def step(self, errors: Tensor, t: Tensor, weighting: Weighting, rate: float, ranks: Ranks) -> None:
        """Take one step on the weighted mean of the errors ``(batch,)``, unless its gradient is not finite."""
        for parameter in self._parameters:
            parameter.grad = None
        (errors * weighting(t)).mean().backward()
        if ranks.size > 1:
            _average_gradients(self._parameters, ranks)
        norm = nn.utils.get_total_norm(p.grad for p in self._parameters if p.grad is not None)
        length = float(norm)
        self.count += 1
        if not math.isfinite(length):
            return
        if length > _LONGEST:
            nn.utils.clip_grads_with_norm_(self._parameters, _LONGEST, norm)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self._learning_rate * rate
            optimiser.step()
        since = 1 if self.count <= 100 else _FOLLOWED
        if self.count % since == 0:
            self._follow(errors.detach(), t, since)

    def _follow(self, errors: Tensor, t: Tensor, since: int) -> None:
        """Bring the moving averages of parameters and errors up to date, so many steps after the last time."""
        decay = min(0.998, self.count / (self.count + 20)) ** since
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - decay)
        which = (t * _BINS).long().clamp_(max=_BINS - 1)
        self._bins.mul_(0.99**since)
        self._bins[0].index_add_(0, which, errors.double())
        self._bins[1].index_add_(0, which, torch.ones_like(t, dtype=torch.float64))

    def look(self, batch: tuple[Tensor, Tensor, Tensor], weighting: Weighting, patience: int) -> bool:
        """Compare the average with the best so far on a fixed batch; say whether to stop."""
        t, x_t, target = batch
        with torch.no_grad(), self._swapped():
            errors = (self._field(t, x_t) - target).square().sum(-1)
        loss = float((errors * weighting(t)).mean())
        if loss < self.lowest:
            self.lowest, self.patience_used = loss, 0
            self._best = [average.clone() for average in self._averages]
        else:
            self.patience_used += 1
        return self.patience_used >= patience

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        """Lend the averages to the field."""
        own = [parameter.data for parameter in self._parameters]
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, data in zip(self._parameters, own, strict=True):
                parameter.data = data

    def finish(self) -> None:
        """Give the field its averaged weights, the best ones if there were held-out draws."""
        for parameter, average in zip(self._parameters, self._best or self._averages, strict=True):
            parameter.data.copy_(average)
        self._field.requires_grad_(False).eval()

    def save(self, kept: _Kept, stream: Tensor, ranks: Ranks) -> None:
        """Write everything that the rest of training depends on; the first process does."""
        streams = ranks.gather(stream.unsqueeze(0).to(self._bins.device))
        if ranks.rank > 0:
            return
        groups = {"parameter": self._parameters, "average": self._averages, "best": self._best or []}
        arrays = {f"{name}/{i}": value for name, values in groups.items() for i, value in enumerate(values)}
        for i, parameter in enumerate(self._parameters):
            for optimiser in self._optimisers:
                moments = optimiser.state.get(parameter, {})
                arrays |= {f"moments/{i}/{name}": value for name, value in moments.items()}
        arrays |= {"bins": self._bins, "generators": streams}
        header = {
            "shapes": [list(parameter.shape) for parameter in self._parameters],
            "count": self.count,
            "total": self.total,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "lowest": None if math.isinf(self.lowest) else self.lowest,
            "patience_used": self.patience_used,
        }
        kept.write(header, {name: v.detach().cpu().numpy() for name, v in arrays.items()})

    def load(self, kept: _Kept, generator: torch.Generator, ranks: Ranks) -> None:
        """Take over what `save` wrote."""
        assert kept.saved is not None
        with storage.described(kept.file):
            self._load(*kept.saved, generator, ranks)

    def _load(
        self, header: dict[str, Any], arrays: dict[str, np.ndarray], generator: torch.Generator, ranks: Ranks
    ) -> None:
        if header["shapes"] != [list(parameter.shape) for parameter in self._parameters]:
            raise ValueError("the checkpoint is of another field: its parameters have other shapes")
        values = {name: torch.from_numpy(array).to(self._bins.device) for name, array in arrays.items()}
        if len(values["generators"]) != ranks.size:
            raise ValueError(f"the checkpoint is of {len(values['generators'])} processes, not of {ranks.size}")
        for i, (parameter, average) in enumerate(zip(self._parameters, self._averages, strict=True)):
            for name, own in (("parameter", parameter.data), ("average", average)):
                if values[f"{name}/{i}"].shape != own.shape:  # to copy would be to broadcast
                    raise ValueError(f"{name} {i} has another shape than the field's")
                own.copy_(values[f"{name}/{i}"])
            moments = f"moments/{i}/"
            found = {name.removeprefix(moments): value for name, value in values.items() if name.startswith(moments)}
            owner = next(
                each for each in self._optimisers if any(parameter is p for p in each.param_groups[0]["params"])
            )
            if found:
                owner.state[parameter] = found
        if "best/0" in values:
            self._best = [values[f"best/{i}"] for i in range(len(self._parameters))]
        numbers = [header["count"], header["patience_used"], *([] if header["total"] is None else [header["total"]])]
        if any(type(number) is not int or number < 0 for number in numbers) or values["bins"].shape != self._bins.shape:
            raise ValueError("it has no count of steps")
        self._bins = values["bins"]
        self.count, self.total = header["count"], header["total"]
        self.seconds, self.cpu_seconds = float(header["seconds"]), float(header["cpu_seconds"])
        self.lowest = math.inf if header["lowest"] is None else float(header["lowest"])
        self.patience_used = header["patience_used"]
        generator.set_state(values["generators"][ranks.rank].cpu())


def _optimisers(
    parameters: list[nn.Parameter], learning_rate: float, optimiser: Optimiser
) -> list[torch.optim.Optimizer]:
    matrices = [p for p in parameters if optimiser == "muon" and p.dim() == 2 and min(p.shape) > 4]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    found: list[torch.optim.Optimizer] = []
    if others:
        found.append(torch.optim.AdamW(others, learning_rate, weight_decay=_DECAY, foreach=True))
    if matrices:
        options = {"weight_decay": _DECAY, "adjust_lr_fn": "match_rms_adamw"}
        found.append(torch.optim.Muon(matrices, learning_rate, **options))
    return found


def _average_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = ranks.mean(torch.cat([grad.flatten() for grad in grads]))
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
